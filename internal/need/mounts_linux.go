package need

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Mounts wants leave to mount FUSE file systems. The test program then has the machine's windows to itself until it ends: another's
// would be in the mount namespaces that it makes.
func Mounts(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "mounting needs root")
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		Skip(t, "mounting needs /dev/fuse: %v", err)
	}
	f.Close()
	if err := alone(); err != nil {
		t.Fatalf("wait for other tests that mount: %v", err)
	}
}

// alone waits for the lock, which ends with the process.
var alone = sync.OnceValue(func() error {
	fd, err := unix.Open(filepath.Join(os.TempDir(), "imans-test-mounts.lock"), unix.O_CREAT|unix.O_RDONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	for {
		if err = unix.Flock(fd, unix.LOCK_EX); err != unix.EINTR {
			return err
		}
	}
})
