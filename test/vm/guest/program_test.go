//go:build vm

package guest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// tinyProgram is a static program that exits at once: an ELF header, one program header, and exit(0). What makes its content
// unique follows behind.
func tinyProgram(unique string) []byte {
	const base, headers = 0x400000, 64 + 56
	code := []byte{0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05} // xor edi,edi; mov eax,60; syscall
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	size := uint64(headers + len(code))
	for _, v := range []any{
		uint16(2), uint16(62), uint32(1), uint64(base + headers), uint64(64), uint64(0), uint32(0),
		uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(0x1000),
	} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	b.Write(code)
	b.WriteString(unique)
	return b.Bytes()
}

// tinyProgram32 is the same for 32-bit x86.
func tinyProgram32(unique string) []byte {
	const base, headers = 0x400000, 52 + 32
	code := []byte{0x31, 0xdb, 0x31, 0xc0, 0x40, 0xcd, 0x80} // xor ebx,ebx; xor eax,eax; inc eax; int 0x80
	var b bytes.Buffer
	b.WriteString("\x7fELF\x01\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	size := uint32(headers + len(code))
	for _, v := range []any{
		uint16(2), uint16(3), uint32(1), uint32(base + headers), uint32(52), uint32(0), uint32(0),
		uint16(52), uint16(32), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(0), uint32(base), uint32(base), size, size, uint32(5), uint32(0x1000),
	} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	b.Write(code)
	b.WriteString(unique)
	return b.Bytes()
}

// makeProgram writes a program of its own content and returns its SHA-256.
func makeProgram(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	content := tinyProgram(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Error(err)
	}
	// A fork in another goroutine would inherit the descriptor, and a program open for writing does not run (ETXTBSY).
	syscall.ForkLock.RLock()
	err := os.WriteFile(path, content, 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Error(err)
	}
	return sha256.Sum256(content)
}

// runProgram runs a program and expects it to succeed.
func runProgram(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command(path).CombinedOutput(); err != nil {
		t.Errorf("run %s: %v %s", path, err, out)
	}
}

// tempDir makes a folder on the root disk (ext4), or below another.
func tempDir(t *testing.T, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "work")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// mountOverlay makes an overlay on the root disk, whose folders stand beside one another in what it returns: lower, upper, work and merged.
// prepare puts files into the lower layer.
func mountOverlay(t *testing.T, prepare func(lower string)) (dir string) {
	t.Helper()
	dir = tempDir(t, "/root")
	sh(t, fmt.Sprintf("cd %s && mkdir lower upper work merged", dir))
	prepare(dir + "/lower")
	sh(t, fmt.Sprintf("cd %s && mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged", dir))
	t.Cleanup(func() { exec.Command("umount", "-l", dir+"/merged").Run() })
	return dir
}

// digestOf is a content's SHA-256 as the digest of an entry.
func digestOf(content []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(content)) }

// container is a runc container that lives until the test ends.
type container struct {
	t    *testing.T
	id   string
	root string
	pid  int
}

// startContainer runs a line of shell in a container of its own root, then keeps it alive. prepare may put files below the root.
func startContainer(t *testing.T, id, line string, prepare func(root string)) *container {
	t.Helper()
	bundle := tempDir(t, "/root")
	c := &container{t: t, id: id, root: filepath.Join(bundle, "rootfs")}
	for _, dir := range []string{"bin", "proc", "dev", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(c.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	sh(t, fmt.Sprintf("cp /bin/busybox %[1]s/bin/busybox; for l in sh sleep unshare; do ln -s busybox %[1]s/bin/$l; done", c.root))
	prepare(c.root)
	script := line + "\n: >/ready\nwhile [ ! -e /stop ]; do sleep 0.1; done\n"
	if err := os.WriteFile(filepath.Join(c.root, "script"), []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	// All capabilities, so that the container may make mount namespaces itself.
	sh(t, fmt.Sprintf(`cd %s && runc spec && sed -i -e 's/"terminal": true/"terminal": false/' -e 's/"readonly": true/"readonly": false/' \
		-e 's/"sh"/"sh", "\/script"/' -e 's/"CAP_KILL"/"CAP_KILL", "CAP_SYS_ADMIN"/' config.json`, bundle))
	sh(t, fmt.Sprintf("cd %s && runc run --detach --pid-file pid %s >log 2>&1 </dev/null || { cat log; exit 1; }", bundle, id))
	t.Cleanup(func() { exec.Command("runc", "delete", "--force", id).Run() })
	sh(t, fmt.Sprintf("for i in $(seq 600); do [ -e %s/ready ] && exit 0; sleep 0.1; done; cat %s/log; exit 1", c.root, bundle))
	if _, err := fmt.Sscan(sh(t, "cat "+bundle+"/pid"), &c.pid); err != nil {
		t.Fatal(err)
	}
	return c
}

// ns returns the name of the container's mount namespace.
func (c *container) ns() string { return fmt.Sprint(mountNS(c.t, c.pid)) }

// stop ends the container.
func (c *container) stop() {
	c.t.Helper()
	sh(c.t, "runc delete --force "+c.id)
}
