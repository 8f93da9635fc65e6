package imafs

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLayout: both ways to a file lead to it, everything is listed, and owners and modes are the kernel's.
func TestLayout(t *testing.T) {
	w, v := openActive(t)
	v.set(func() { v.owner = Owner{100000, 100001} })
	w.want(`cd $W; ls -A; echo -; ls -A integrity; echo -; ls -A .ns`, "ima\nintegrity\n-\nima\n-\n")
	w.want(`cat $W/ima/active $W/integrity/ima/active; cd $W/ima; cat active ./active`, "1\n1\n1\n1\n")
	var want []string
	for _, f := range files {
		want = append(want, fmt.Sprintf("%s %o 100000:100001", f.name, f.mode))
	}
	w.want(`cd $W/ima && stat -c '%n %a %u:%g' $(ls -U)`, strings.Join(want, "\n")+"\n")
	w.want(`cd $W/ima/ && stat -Lc '%a %u:%g %F' .`, "755 100000:100001 directory\n")
	w.want(`df $W >/dev/null && ls -l $W/ima/ | wc -l`, fmt.Sprintln(len(files)+1))
}

// TestBoundOverSecurityfs: where a container has it, both paths work, also if only the ima folder of another namespace is bound.
func TestBoundOverSecurityfs(t *testing.T) {
	w := open(t)
	script := `mount -t tmpfs none /mnt && mkdir /mnt/security /mnt/ima && mount --bind $W /mnt/security && mount --bind $W/ima /mnt/ima
		echo sha512 > /mnt/security/ima/hash
		cat /mnt/security/ima/hash /mnt/security/integrity/ima/hash /mnt/ima/hash
		exec unshare -m sh -c 'cat /mnt/security/ima/hash /mnt/ima/hash; cd /mnt/ima; echo md5 > hash; cat /mnt/security/ima/hash'`
	w.want(script, "sha512\nsha512\nsha512\nsha256\nsha256\nmd5\n", newNS)
	if got := w.own().HashName(); got != "sha256" {
		t.Errorf("the test's own namespace got %s", got)
	}
}

// TestNothingCanBeMade: as in securityfs.
func TestNothingCanBeMade(t *testing.T) {
	w, _ := openActive(t)
	at := w.path("policy")
	for what, c := range map[string]struct{ got, want error }{
		"create":       {openErr(w.path("new"), unix.O_CREAT|unix.O_WRONLY), unix.EACCES},
		"mkdir":        {unix.Mkdir(w.path("new"), 0o700), unix.EPERM},
		"mknod":        {unix.Mknod(w.path("new"), unix.S_IFIFO, 0), unix.EACCES},
		"unlink":       {unix.Unlink(at), unix.EPERM},
		"rename":       {unix.Rename(at, w.path("hash")), unix.EPERM},
		"link":         {unix.Link(at, w.path("new")), unix.EPERM},
		"symlink":      {unix.Symlink(at, w.path("new")), unix.EPERM},
		"rmdir":        {unix.Rmdir(w.dir + "/integrity"), unix.EPERM},
		"chmod":        {unix.Chmod(at, 0o666), unix.EPERM},
		"chown":        {unix.Chown(at, 1, 1), unix.EPERM},
		"truncate":     {unix.Truncate(at, 0), nil},
		"missing":      {openErr(w.path("nothing"), unix.O_RDONLY), unix.ENOENT},
		"another's":    {openErr(w.dir+"/.ns/4026531000/policy", unix.O_RDONLY), unix.ENOENT},
		"a folder":     {openErr(w.path("policy/x"), unix.O_RDONLY), unix.ENOTDIR},
		"execute":      {unix.Access(at, unix.X_OK), unix.EACCES},
		"read, write":  {unix.Access(at, unix.R_OK|unix.W_OK), nil},
		"search there": {unix.Access(w.path(""), unix.X_OK), nil},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", what, c.got, c.want)
		}
	}
}

// TestBeforeActivation: what can be opened, and what can be set, before and after.
func TestBeforeActivation(t *testing.T) {
	w := open(t)
	v := w.own()
	for _, f := range files {
		flags := unix.O_RDONLY
		if f.kind == kindNewNS {
			flags = unix.O_WRONLY
		}
		want := error(unix.EACCES)
		if f.kind.early() {
			want = nil
		}
		if err := openErr(w.path(f.name), flags); !errors.Is(err, want) {
			t.Errorf("open %s before: %v, want %v", f.name, err, want)
		}
	}
	if err := openErr(w.path("policy"), unix.O_WRONLY); err != unix.EACCES {
		t.Errorf("open policy for writing before: %v", err)
	}
	w.want(`cd $W/ima; cat active hash template_name; echo sha512 > hash; printf ima-sig > template_name; cat hash template_name`,
		"0\nsha256\nima-ng\nsha512\nima-sig\n")
	for _, c := range []struct {
		file, data string
		want       error
	}{
		{"hash", "sha3000\n", unix.EINVAL}, {"hash", "", nil}, {"hash", "\n", unix.EINVAL}, {"hash", "sha1\nsha1\n", unix.EINVAL},
		{"hash", strings.Repeat("x", 100000), unix.EINVAL}, {"hash", "sha\x00", unix.EINVAL}, {"hash", "sha384\x00", nil},
		{"template_name", "ima-old", unix.EINVAL}, {"template_name", "\xff\xfe", unix.EINVAL}, {"template_name", "d-ng|n-ng|sig\n", nil},
		{"active", "0\n", unix.EINVAL}, {"active", "2", unix.EINVAL}, {"active", "11", unix.EINVAL}, {"active", "1\n\n", unix.EINVAL},
		{"active", "1 ", unix.EINVAL}, {"active", "\x001", unix.EINVAL}, {"active", strings.Repeat("1", 1<<20), unix.EINVAL},
		{"active", "1\n", nil}, {"active", "1\n", unix.EBUSY}, {"active", "0\n", unix.EBUSY},
		{"hash", "sha1\n", unix.EBUSY}, {"template_name", "ima\n", unix.EBUSY},
	} {
		fd := mustOpen(t, w.path(c.file), unix.O_WRONLY|unix.O_TRUNC)
		if n, err := unix.Write(fd, []byte(c.data)); !errors.Is(err, c.want) || err == nil && n != len(c.data) {
			t.Errorf("write %.20q to %s: %d, %v, want %v", c.data, c.file, n, err, c.want)
		}
		unix.Close(fd)
	}
	w.want(`cd $W/ima; cat active hash template_name runtime_measurements_count violations policy
		cut -d' ' -f3- ascii_runtime_measurements | cut -c1-21`, "1\nsha384\nd-ng|n-ng|sig\n1\n0\nd-ng|n-ng|sig sha384:\n")
	if v.hash != "sha384" {
		t.Errorf("the view has %s", v.hash)
	}
}

// TestSettingsWriteAgain: several writes through one descriptor, and where they may go.
func TestSettingsWriteAgain(t *testing.T) {
	w := open(t)
	w.want(`cd $W/ima; (echo sha1; /bin/echo sha384) > hash; cat hash; (echo md5; echo sha512) >> hash; cat hash`, "sha384\nsha512\n")
	fd := mustOpen(t, w.path("hash"), unix.O_RDWR)
	if _, err := unix.Pwrite(fd, []byte("sha1"), 3); err != unix.EINVAL {
		t.Errorf("write at 3: %v", err)
	}
	if _, err := unix.Pwrite(fd, []byte("sha1"), 0); err != nil {
		t.Errorf("write at 0: %v", err)
	}
	b := make([]byte, 10)
	if n, err := unix.Pread(fd, b, 0); err != nil || string(b[:n]) != "sha1\n" {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

// TestNewNS: the request comes with who made it, can be read, and taken back.
func TestNewNS(t *testing.T) {
	w := open(t)
	w.want(`cd $W/ima; cat newns; echo 1 > newns; cat newns; stat -c %s,%a newns; echo 0 > newns; cat newns; echo 0 > newns && cat newns`,
		"0\n1\n2,600\n0\n0\n")
	w.want(`cat $W/ima/newns 2>/dev/null || echo refused; (echo 1 > $W/ima/newns) 2>/dev/null || echo refused`, "refused\nrefused\n", as(65534))
	if err := os.WriteFile(w.path("newns"), []byte("1\n"), 0); err != nil {
		t.Fatal(err)
	}
	for _, garbage := range []string{"2\n", "\n", "-1", "01", "1 ", "yes", "\x00", strings.Repeat("1", 1<<20)} {
		if err := os.WriteFile(w.path("newns"), []byte(garbage), 0); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%.20q: %v", garbage, err)
		}
	}
	fd := mustOpen(t, w.path("newns"), unix.O_RDWR)
	if got := readAll(t, fd, 1); string(got) != "1\n" {
		t.Errorf("read %q", got)
	}
	v := w.own()
	if len(v.requested) != 1 || v.requested[0].TGID != uint32(os.Getpid()) || v.requested[0].NS.Inum != v.ns.Inum {
		t.Errorf("requests %+v", v.requested)
	}
}
