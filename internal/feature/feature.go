// Package feature says what this machine has and lacks for the agent: one probe for each fact.
//
// A probe is a value with a name, what it is for, and a function. It only looks; nothing on the machine is changed. Each
// missing feature comes with the exact fix. Required ones keep the agent from starting; the others take something away that
// the probe's Without tells. With internal/loader this is the only package that uses cilium/ebpf.
package feature

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Unsupported is a feature that this machine lacks.
type Unsupported struct {
	Name  string
	Since string // first kernel version that has it; "" if it is no matter of version
	Cause string
	Fix   string
}

// Error says what is missing and what to do.
func (u *Unsupported) Error() string { return fmt.Sprintf("%s: %s; %s", u.Name, u.Cause, u.Fix) }

// Probe looks for one feature.
type Probe struct {
	Name    string
	Purpose string // what the agent needs it for
	Without string // what is lost without it; "" if it is required
	Since   string
	detect  func() (found string, err error)
	fix     string
}

// Required reports whether the agent can't start without the feature.
func (p Probe) Required() bool { return p.Without == "" }

// Run looks. It returns what was found, or an *Unsupported.
func (p Probe) Run() (found string, err error) {
	found, err = p.detect()
	if err != nil {
		return "", &Unsupported{Name: p.Name, Since: p.Since, Cause: err.Error(), Fix: p.fix}
	}
	return found, nil
}

// NewTypes returns a place for the kernel's types: whoever looks there first reads them. They take tens of megabytes, so drop it
// when the programs are loaded.
func NewTypes() *btf.Cache { return btf.NewCache() }

// Config names what the probes look at where that is configurable.
type Config struct {
	Types  *btf.Cache // nil: of its own
	TPM    string     // of the native list, as --tpm: a device, swtpm or none; any other address is not probed
	PinDir string
	Swtpm  string // name or path of the program
}

// Probes returns all probes, the required ones first.
func Probes(c Config) []Probe {
	if c.Types == nil {
		c.Types = NewTypes()
	}
	return []Probe{
		{Name: "privileges", Purpose: "to load programs and look into containers", detect: privileges,
			fix: "run as root, in the host's user and pid namespaces (a container: privileged, with the host's pid namespace)"},
		{Name: "BPF LSM", Purpose: "to see each file before it runs", Since: "5.7", detect: bpfLSM,
			fix: "add bpf to the lsm= list of the kernel's command line, e.g. lsm=landlock,lockdown,yama,integrity,apparmor,bpf, and reboot"},
		{Name: "BTF", Purpose: "to fit the programs to this kernel", Since: "5.2", detect: func() (string, error) { return kernelBTF(c.Types) },
			fix: "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (every stock kernel of Debian 11, Ubuntu 20.10, Fedora 31 and later)"},
		{Name: "LSM programs", Purpose: "to see each file before it runs", Since: "5.7", detect: func() (string, error) { return lsmPrograms(c.Types) },
			fix: "boot a kernel of version 6.1 or later, outside a sandbox that refuses bpf(2)"},
		{Name: "lockdown", Purpose: "to read kernel memory from programs", detect: lockdown,
			fix: "boot without lockdown=confidentiality (lockdown=integrity is fine)"},
		{Name: "BPF file system", Purpose: "to keep the programs at work while the agent restarts", detect: func() (string, error) { return bpffs(c.PinDir) },
			fix: "mount -t bpf bpf /sys/fs/bpf"},
		{Name: "ring buffer", Purpose: "to hand events over", Since: "5.8", detect: ringBuffer,
			fix: "boot a kernel of version 6.1 or later"},
		{Name: "kernel digest", Purpose: "to have a file's digest before a byte of it runs", Since: "5.18", detect: func() (string, error) { return kernelDigest(c.Types) },
			fix: "boot a kernel built with CONFIG_IMA=y", Without: "the agent hashes files itself, shortly after the event (--digest=agent)"},
		{Name: "TPM", Purpose: "to anchor the native list", detect: func() (string, error) { return nativeTPM(c.TPM, c.Swtpm) },
			fix: nativeFix(c.TPM), Without: "no TPM proves the native list (--tpm none)"},
		swtpmProbe(c.Swtpm),
		{Name: "overlayfs types", Purpose: "to tell one layer's file from another's", detect: func() (string, error) { return overlayTypes(c.Types) },
			fix: "modprobe overlay", Without: "files of overlayfs are looked at every time they run"},
		{Name: "vTPM proxy", Purpose: "to put /dev/tpm0 into containers", Since: "4.8", detect: device("/dev/vtpmx"),
			fix: "modprobe tpm_vtpm_proxy (a kernel built with CONFIG_TCG_VTPM_PROXY has it)", Without: "namespaces have their vTPMs by socket, and containers get no TPM device"},
		{Name: "FUSE", Purpose: "to show each container its own ima folder", detect: device("/dev/fuse"),
			fix: "modprobe fuse", Without: "containers have no window on their lists"},
	}
}

// Missing runs the required probes and joins what is missing; nil if nothing is.
func Missing(c Config) error {
	var errs []error
	for _, p := range Probes(c) {
		if !p.Required() {
			continue
		}
		if _, err := p.Run(); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// KernelDigest reports whether the kernel can be asked for a file's digest.
func KernelDigest(types *btf.Cache) bool {
	_, err := kernelDigest(types)
	return err == nil
}

func privileges() (string, error) {
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("running as user %d, not root", os.Geteuid())
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return "", fmt.Errorf("read capabilities: %w", err)
	}
	var missing []string
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}, {unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"}} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return "", fmt.Errorf("without %s", strings.Join(missing, ", "))
	}
	return "root", nil
}

func bpfLSM() (string, error) {
	list, err := os.ReadFile("/sys/kernel/security/lsm")
	if err != nil {
		return "", fmt.Errorf("the list of security modules can't be read (%w); is securityfs mounted on /sys/kernel/security?", err)
	}
	names := strings.Split(strings.TrimSpace(string(list)), ",")
	for _, n := range names {
		if n == "bpf" {
			return strings.TrimSpace(string(list)), nil
		}
	}
	return "", fmt.Errorf("bpf is not among the active security modules (%s)", strings.TrimSpace(string(list)))
}

func kernelBTF(types *btf.Cache) (string, error) {
	if _, err := types.Kernel(); err != nil {
		return "", fmt.Errorf("the kernel's types can't be read: %w", err)
	}
	return "/sys/kernel/btf/vmlinux", nil
}

// lsmPrograms loads a program that does nothing.
func lsmPrograms(types *btf.Cache) (string, error) {
	const name = "imans_probe"
	spec := &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{name: {
		Name: name, Type: ebpf.LSM, AttachType: ebpf.AttachLSMMac, AttachTo: "file_mprotect", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	}}}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Cache: types})
	if err != nil {
		return "", fmt.Errorf("the kernel refuses LSM programs: %w", err)
	}
	loaded.Close()
	return release(), nil
}

func lockdown() (string, error) {
	mode, err := os.ReadFile("/sys/kernel/security/lockdown")
	if err != nil {
		return "none", nil // built without it
	}
	if strings.Contains(string(mode), "[confidentiality]") {
		return "", errors.New("the kernel is locked down for confidentiality, so programs can't read its memory")
	}
	return strings.TrimSpace(string(mode)), nil
}

func bpffs(pinDir string) (string, error) {
	dir := filepath.Dir(pinDir)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", fmt.Errorf("look at %s: %w", dir, err)
	}
	const magic = 0xcafe4a11 // BPF_FS_MAGIC
	if uint32(st.Type) != magic {
		return "", fmt.Errorf("%s is not a BPF file system", dir)
	}
	return dir, nil
}

func ringBuffer() (string, error) {
	if err := features.HaveMapType(ebpf.RingBuf); err != nil {
		return "", fmt.Errorf("no ring buffer maps: %w", err)
	}
	return "yes", nil
}

// kernelDigest looks for what bpf_ima_file_hash calls: a kernel without IMA, or too old, has no such function.
func kernelDigest(types *btf.Cache) (string, error) {
	spec, err := types.Kernel()
	if err != nil {
		return "", fmt.Errorf("the kernel's types can't be read: %w", err)
	}
	var fn *btf.Func
	if err := spec.TypeByName("ima_file_hash", &fn); err != nil {
		return "", fmt.Errorf("kernel %s has no ima_file_hash: %w", release(), err)
	}
	return "bpf_ima_file_hash", nil
}

func overlayTypes(types *btf.Cache) (string, error) {
	if _, err := types.Module("overlay"); err != nil {
		return "", fmt.Errorf("the overlay module's types can't be read (is it loaded?): %w", err)
	}
	return "/sys/kernel/btf/overlay", nil
}

func device(path string) func() (string, error) {
	return func() (string, error) {
		st, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		if st.Mode()&os.ModeCharDevice == 0 {
			return "", fmt.Errorf("%s is not a character device", path)
		}
		return path, nil
	}
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
