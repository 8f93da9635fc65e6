//go:build vm

package guest

import (
	"bytes"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What the kernel shows of this process, and the agent asks for, is where its first thread is. Go ends other threads with the goroutines that
// locked them in another namespace, and not that one.
func init() { runtime.LockOSThread() }

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestHarnessKernel(t *testing.T) {
	want := os.Getenv("IMANS_VM_KERNEL")
	if want == "" {
		t.Fatal("IMANS_VM_KERNEL is not set")
	}
	if got := readFile(t, "/proc/sys/kernel/osrelease"); !strings.HasPrefix(got, want+".") {
		t.Errorf("running kernel %s, want a %s", got, want)
	}
}

func TestHarnessSecurityModules(t *testing.T) {
	lsm := strings.Split(readFile(t, "/sys/kernel/security/lsm"), ",")
	if !slices.Contains(lsm, "bpf") {
		t.Errorf("bpf is not among the active security modules %v", lsm)
	}
	if _, err := os.Stat("/sys/kernel/security/ima/ascii_runtime_measurements"); err != nil {
		t.Errorf("the kernel's IMA: %v", err)
	}
}

func TestHarnessTypeInformation(t *testing.T) {
	const magic = "\x9f\xeb" // BTF_MAGIC, little endian
	if btf := readFile(t, "/sys/kernel/btf/vmlinux"); !strings.HasPrefix(btf, magic) {
		t.Errorf("/sys/kernel/btf/vmlinux starts with %q", btf[:2])
	}
	if _, err := os.Stat("/sys/kernel/btf/overlay"); err != nil {
		t.Errorf("type information of the overlay module: %v", err)
	}
}

func TestHarnessTPM(t *testing.T) {
	if v := readFile(t, "/sys/class/tpm/tpm0/tpm_version_major"); v != "2" {
		t.Fatalf("TPM version %s, want 2", v)
	}
	pcr := func() string { return run(t, "tpm2_pcrread", "-T", "device:/dev/tpmrm0", "sha256:16") }
	before := pcr()
	digest := strings.Repeat("5a", sha256.Size)
	run(t, "tpm2_pcrextend", "-T", "device:/dev/tpmrm0", "16:sha256="+digest)
	if after := pcr(); after == before {
		t.Errorf("PCR 16 is unchanged by an extend: %s", after)
	}
}

// TestHarnessFileSystems writes through an overlay on each file system that later tests put below one.
func TestHarnessFileSystems(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			dir := t.TempDir()
			disk, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
			run(t, "truncate", "-s", "320M", disk)
			run(t, "mkfs."+fs, "-q", disk)
			if err := os.Mkdir(mnt, 0o755); err != nil {
				t.Fatal(err)
			}
			run(t, "mount", "-o", "loop", disk, mnt)
			t.Cleanup(func() { run(t, "umount", mnt) })
			for _, sub := range []string{"lower", "upper", "work", "merged"} {
				if err := os.Mkdir(filepath.Join(mnt, sub), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(mnt, "lower/file"), []byte("old"), 0o644); err != nil {
				t.Fatal(err)
			}
			merged := filepath.Join(mnt, "merged")
			options := "lowerdir=" + mnt + "/lower,upperdir=" + mnt + "/upper,workdir=" + mnt + "/work"
			if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { run(t, "umount", merged) })
			if err := os.WriteFile(filepath.Join(merged, "file"), []byte("new"), 0o644); err != nil {
				t.Fatal(err)
			}
			if got := readFile(t, filepath.Join(mnt, "upper/file")); got != "new" {
				t.Errorf("the upper layer has %q, want new", got)
			}
			if got := readFile(t, filepath.Join(mnt, "lower/file")); got != "old" {
				t.Errorf("the lower layer has %q, want old", got)
			}
		})
	}
}

func TestHarnessMounts(t *testing.T) {
	for path, magic := range map[string]int64{
		"/sys/fs/bpf":          unix.BPF_FS_MAGIC,
		"/sys/fs/cgroup":       unix.CGROUP2_SUPER_MAGIC,
		"/sys/kernel/security": unix.SECURITYFS_MAGIC,
		"/":                    unix.EXT4_SUPER_MAGIC,
	} {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			t.Errorf("%s: %v", path, err)
		} else if st.Type != magic {
			t.Errorf("%s is of type %#x, want %#x", path, st.Type, magic)
		}
	}
	if !strings.Contains(readFile(t, "/proc/mounts"), "host /host 9p ") { // statfs of 9p gives the host's type
		t.Error("/host is not the host's folder")
	}
	if err := os.WriteFile("/host/left-by-guest", []byte("x"), 0o644); err != nil {
		t.Errorf("write to the share: %v", err)
	}
	if err := os.WriteFile("/payload/file", nil, 0o644); err == nil {
		t.Error("the payload is writable")
	}
}

// TestHarnessVTPM makes a TPM through the kernel's proxy driver, as the agent does for namespaces.
func TestHarnessVTPM(t *testing.T) {
	if _, err := os.Stat("/dev/vtpmx"); err != nil {
		t.Fatalf("the kernel's TPM proxy: %v", err)
	}
}

func TestHarnessContainer(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, "rootfs/bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "cp", "/bin/busybox", bin)
	spec := exec.Command("runc", "spec")
	spec.Dir = dir
	if out, err := spec.CombinedOutput(); err != nil {
		t.Fatalf("runc spec: %v %s", err, out)
	}
	path := filepath.Join(dir, "config.json")
	text := strings.Replace(readFile(t, path), `"terminal": true`, `"terminal": false`, 1)
	text = strings.Replace(text, `"sh"`, `"/bin/busybox", "echo", "hello"`, 1)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, runtime := range []string{"runc", "crun"} {
		out, err := exec.Command(runtime, "run", "--bundle", dir, "harness").CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("hello")) {
			t.Errorf("%s run: %v\n%s", runtime, err, out)
		}
	}
}
