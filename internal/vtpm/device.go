package vtpm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNoProxy means that this machine can't make proxy devices: the driver is missing, or not to be used from here. A vTPM by socket
// can be had.
var ErrNoProxy = errors.New("no vTPM proxy")

// errDriverGaveUp means that the driver closed the server end before it registered the device: some command was not answered in the
// time that the kernel gives it, down to 750 ms, which happens on a machine with too much to do. Nobody has used the TPM yet, so it
// can be tried again.
var errDriverGaveUp = errors.New("the kernel gave up on swtpm, which takes too long to answer; start fewer at a time, and look at dmesg")

// errNotRegistered means that the driver waits for an answer that does not come, which it does for up to two minutes.
var errNotRegistered = errors.New("the kernel has not registered the device, though swtpm runs; look at dmesg")

// gaveUpTries is how often a device is made that the driver gives up on, hungTries, how often one that it waits for.
const (
	gaveUpTries = 20
	hungTries   = 3
)

// Device is what the kernel made of an instance: two character devices of the host, until the instance ends.
type Device struct {
	Number uint32 `json:"number"` // N of /dev/tpmN
	TPM    Node   `json:"tpm"`    // /dev/tpmN, which admits one program at a time
	RM     Node   `json:"rm"`     // /dev/tpmrmN, by way of the kernel's resource manager; zero for a TPM 1.2
}

// Node is a character device.
type Node struct {
	Path  string `json:"path"`
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
}

const (
	vtpmxPath = "/dev/vtpmx"
	// sysfsTPM and sysfsRM list the devices that the kernel has, each a folder of the device's name.
	sysfsTPM = "/sys/class/tpm"
	sysfsRM  = "/sys/class/tpmrm"
	// vtpmProxyIOCNewDev is VTPM_PROXY_IOC_NEW_DEV, _IOWR(0xa1, 0x00, struct vtpm_proxy_new_dev). Source: linux/vtpm_proxy.h.
	vtpmProxyIOCNewDev = 0xc014a100
	// vtpmProxyFlagTPM2 is VTPM_PROXY_FLAG_TPM2.
	vtpmProxyFlagTPM2 = 1
	// nodePatience is how long a device's node may come after the device: devtmpfs has it at once, a device manager soon.
	nodePatience = 2 * time.Second
	// registerPatience is how long the driver may take with a TPM 2.0. It exchanges a dozen short commands.
	registerPatience = 15 * time.Second
)

// vtpmProxyNewDev is struct vtpm_proxy_new_dev of linux/vtpm_proxy.h.
type vtpmProxyNewDev struct {
	flags  uint32 // in
	number uint32 // the rest: out
	fd     uint32
	major  uint32
	minor  uint32
}

// newDevice is a device that the driver is about to register, once what holds the server end answers.
type newDevice struct {
	number, major, minor uint32
	server               *os.File
}

// openProxy opens the door to the driver.
func openProxy() (*os.File, error) {
	f, err := os.OpenFile(vtpmxPath, os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("%w: %w; modprobe tpm_vtpm_proxy (CONFIG_TCG_VTPM_PROXY), or give vTPMs by socket", ErrNoProxy, err)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("%w: %w; run as root and, in a container, allow the device", ErrNoProxy, err)
	}
	return f, err
}

// makeDevice has the driver make a device. It is there once something answers at the server end, and until that end is closed.
func makeDevice(vtpmx *os.File, v Version) (*newDevice, error) {
	var dev vtpmProxyNewDev
	if v == TPM20 {
		dev.flags = vtpmProxyFlagTPM2
	}
	// The descriptor comes without close-on-exec: no other process may start before it is set, or the device would outlive its TPM.
	syscall.ForkLock.RLock()
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, vtpmx.Fd(), vtpmProxyIOCNewDev, uintptr(unsafe.Pointer(&dev)))
	if errno == 0 {
		unix.CloseOnExec(int(dev.fd))
	}
	syscall.ForkLock.RUnlock()
	switch errno {
	case 0:
		return &newDevice{number: dev.number, major: dev.major, minor: dev.minor, server: os.NewFile(uintptr(dev.fd), "vtpm server end")}, nil
	case unix.ENOSPC:
		return nil, fmt.Errorf("make vTPM device: the kernel has no more of its 65,536 TPM devices: %w; end vTPMs that are not used any more", errno)
	case unix.EPERM:
		return nil, fmt.Errorf("make vTPM device: %w: %w; CAP_SYS_ADMIN is needed", ErrNoProxy, errno)
	}
	return nil, fmt.Errorf("make vTPM device: %w; look at the kernel's log (dmesg)", errno)
}

// await waits until the device and its nodes are there. The driver registers a device once it could talk to the TPM: it sends
// TPM2_SelfTest, and TPM2_Startup only if that says TPM_RC_INITIALIZE, so one that has been started up stays as it is. Source:
// tpm2_auto_startup in drivers/char/tpm/tpm2-cmd.c, vtpm_proxy_work in drivers/char/tpm/tpm_vtpm_proxy.c.
func (d *newDevice) await(ctx context.Context, p *process) (device Device, id uint64, err error) {
	name := fmt.Sprintf("tpm%d", d.number)
	device = Device{Number: d.number, TPM: Node{Path: "/dev/" + name, Major: d.major, Minor: d.minor}}
	for began := time.Now(); !hasNumbers(filepath.Join(sysfsTPM, name), device.TPM); {
		if p.config.Version == TPM20 && time.Since(began) > registerPatience {
			return Device{}, 0, fmt.Errorf("await the kernel's device %s: %w", name, errNotRegistered)
		}
		if err := p.pause(ctx); err != nil {
			return Device{}, 0, fmt.Errorf("await the kernel's device %s: %w", name, err)
		}
	}
	if p.config.Version == TPM20 {
		rm := fmt.Sprintf("tpmrm%d", d.number)
		for device.RM.Path == "" {
			if major, minor, err := numbers(filepath.Join(sysfsRM, rm)); err == nil {
				device.RM = Node{Path: "/dev/" + rm, Major: major, Minor: minor}
			} else if err := p.pause(ctx); err != nil {
				return Device{}, 0, fmt.Errorf("await the kernel's device %s: %w", rm, err)
			}
		}
	}
	if id, err = sysfsID(device); err != nil {
		return Device{}, 0, err
	}
	for deadline := time.Now().Add(nodePatience); ; {
		if err = device.check(); err == nil {
			return device, id, nil
		}
		if time.Now().After(deadline) {
			return Device{}, 0, err
		}
		if err := p.pause(ctx); err != nil {
			return Device{}, 0, err
		}
	}
}

// check makes sure that each node is there and is the device.
func (d Device) check() error {
	for _, n := range []Node{d.TPM, d.RM} {
		if n.Path == "" {
			continue // a TPM 1.2
		}
		var st unix.Stat_t
		if err := unix.Stat(n.Path, &st); err != nil {
			return fmt.Errorf("%s is missing though the kernel has the device %d:%d: %w; mount devtmpfs there, or mknod %s c %d %d",
				n.Path, n.Major, n.Minor, err, n.Path, n.Major, n.Minor)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(n.Major, n.Minor) {
			return fmt.Errorf("%s is not the device %d:%d; remove it, and mount devtmpfs there or mknod %s c %d %d",
				n.Path, n.Major, n.Minor, n.Path, n.Major, n.Minor)
		}
	}
	return nil
}

// awaitDeviceGone waits until the kernel has taken the device away, which it does when the process has ended.
func (i *Instance) awaitDeviceGone() error {
	if i.device == nil {
		return nil
	}
	for deadline := time.Now().Add(stopPatience); ; time.Sleep(time.Millisecond) {
		if id, err := sysfsID(*i.device); err != nil || id != i.deviceID {
			return nil // gone, and perhaps another has its number
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("stop vTPM: %s is still there though its TPM has ended; look at the kernel's log (dmesg)", i.device.TPM.Path)
		}
	}
}

// IsProxy reports whether a TPM's device, such as /dev/tpmrm0, is one that the proxy driver made, for whomever: software. On a
// machine without a TPM of its own the first vTPM is /dev/tpm0.
func IsProxy(path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false, fmt.Errorf("look at %s: %w; look at `ls /dev/tpm*`", path, err)
	}
	// The proxy driver's are the only TPMs without a parent device. Source: vtpm_proxy_create_proxy_dev, device_add.
	folder, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/char/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return false, fmt.Errorf("look for %s in sysfs: %w; give the path of a TPM's device", path, err)
	}
	return strings.HasPrefix(folder, "/sys/devices/virtual/tpm"), nil
}

// sysfsID returns the number of a device's folder in sysfs, which no later folder has.
func sysfsID(d Device) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(sysfsTPM, fmt.Sprintf("tpm%d", d.Number)), &st); err != nil {
		return 0, fmt.Errorf("look for TPM %d in sysfs: %w", d.Number, err)
	}
	return st.Ino, nil
}

// numbers reads a device's numbers in its folder in sysfs.
func numbers(folder string) (major, minor uint32, err error) {
	b, err := os.ReadFile(filepath.Join(folder, "dev"))
	if err != nil {
		return 0, 0, err
	}
	if _, err := fmt.Sscanf(strings.TrimSpace(string(b)), "%d:%d", &major, &minor); err != nil {
		return 0, 0, fmt.Errorf("read %s/dev: %w", folder, err)
	}
	return major, minor, nil
}

// hasNumbers reports whether a folder in sysfs is there and is a node's.
func hasNumbers(folder string, n Node) bool {
	major, minor, err := numbers(folder)
	return err == nil && major == n.Major && minor == n.Minor
}
