package ima

// Func is the place in the kernel at which a file (or buffer) is looked at: the value of a policy rule's func=.
// The zero value means "no function named". Source: enum ima_hooks in security/integrity/ima/ima.h.
type Func uint8

// The functions in the kernel's order.
const (
	FuncNone Func = iota
	FileCheck
	MmapCheck
	MmapCheckReqprot
	BPRMCheck
	CredsCheck
	PostSetattr
	ModuleCheck
	FirmwareCheck
	KexecKernelCheck
	KexecInitramfsCheck
	PolicyCheck
	KexecCmdline
	KeyCheck
	CriticalData
	SetxattrCheck
	numFuncs
)

var funcNames = [numFuncs]string{
	"NONE", "FILE_CHECK", "MMAP_CHECK", "MMAP_CHECK_REQPROT", "BPRM_CHECK", "CREDS_CHECK", "POST_SETATTR",
	"MODULE_CHECK", "FIRMWARE_CHECK", "KEXEC_KERNEL_CHECK", "KEXEC_INITRAMFS_CHECK", "POLICY_CHECK", "KEXEC_CMDLINE",
	"KEY_CHECK", "CRITICAL_DATA", "SETXATTR_CHECK",
}

// String returns the kernel's name, such as BPRM_CHECK.
func (f Func) String() string {
	if f < numFuncs {
		return funcNames[f]
	}
	return "UNKNOWN"
}

// FuncByName returns the function of that kernel name. The aliases PATH_CHECK and FILE_MMAP are accepted; NONE and
// POST_SETATTR, which no policy may name, are not.
func FuncByName(name string) (Func, bool) {
	switch name {
	case "PATH_CHECK":
		return FileCheck, true
	case "FILE_MMAP":
		return MmapCheck, true
	case "NONE", "POST_SETATTR":
		return FuncNone, false
	}
	for i, n := range funcNames {
		if n == name {
			return Func(i), true
		}
	}
	return FuncNone, false
}

// Mask is what is asked of a file: the kernel's MAY_* bits. Source: include/linux/fs.h.
type Mask uint8

// The bits that a policy can name.
const (
	MayExec   Mask = 0x1
	MayWrite  Mask = 0x2
	MayRead   Mask = 0x4
	MayAppend Mask = 0x8
)

// Action is a set of what a policy decides for one event.
type Action uint8

// The actions; "dont_" rules decide the absence of one.
const (
	Measure Action = 1 << iota
	Appraise
	Audit
	Hash
)

// DefaultPCR is the register that IMA extends unless told otherwise: CONFIG_IMA_MEASURE_PCR_IDX.
const DefaultPCR = 10
