package imafs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/policy"
)

const (
	bprm = "measure func=BPRM_CHECK \n"
	mmap = "measure func=MMAP_CHECK \n"
)

// TestPolicyWrites: what each write takes and returns, and what is in force after the close.
func TestPolicyWrites(t *testing.T) {
	type write struct {
		data string
		n    int
		err  error
	}
	page := os.Getpagesize()
	for name, c := range map[string]struct {
		writes []write
		rules  string
	}{
		"one rule":           {[]write{{"measure func=BPRM_CHECK\n", 24, nil}}, bprm},
		"no newline":         {[]write{{"measure func=BPRM_CHECK", 23, nil}}, bprm},
		"two writes":         {[]write{{"measure func=BPRM_CHECK\n", 24, nil}, {"measure func=MMAP_CHECK\n", 24, nil}}, bprm + mmap},
		"two lines":          {[]write{{"measure func=BPRM_CHECK\nmeasure func=MMAP_CHECK\n", 24, nil}}, bprm},
		"indented":           {[]write{{" \tmeasure func=BPRM_CHECK\n", 26, nil}}, bprm},
		"comment and blank":  {[]write{{"# x\nmeasure", 4, nil}, {"\n", 1, nil}, {"  \n", 3, nil}, {"measure func=BPRM_CHECK\n", 24, nil}}, bprm},
		"only a comment":     {[]write{{"# x\n", 4, nil}}, ""},
		"nothing":            {nil, ""},
		"bad rule":           {[]write{{"measure func=NONE\n", 0, unix.EINVAL}}, ""},
		"good then bad":      {[]write{{"measure func=BPRM_CHECK\n", 24, nil}, {"mesure\n", 0, unix.EINVAL}}, ""},
		"bad then good":      {[]write{{"mesure\n", 0, unix.EINVAL}, {"measure func=BPRM_CHECK\n", 24, nil}}, ""},
		"zero ends a line":   {[]write{{"measure func=BPRM_CHECK\x00rest\n", 24, nil}}, bprm},
		"zeros":              {[]write{{"\x00\x00\x00\x00", 1, nil}}, ""},
		"not UTF-8":          {[]write{{"measure func=\xff\xfe\n", 0, unix.EINVAL}}, ""},
		"a page":             {[]write{{strings.Repeat(" ", page) + "measure func=BPRM_CHECK\n", page - 1, nil}}, ""},
		"a page of rule":     {[]write{{"measure func=BPRM_CHECK" + strings.Repeat(" ", page), page - 1, nil}}, bprm},
		"garbage of 1 MiB":   {[]write{{strings.Repeat("garbage", 1<<20/7), 0, unix.EINVAL}}, ""},
		"a line of 1 MiB":    {[]write{{"measure fsname=" + strings.Repeat("x", 1<<20), page - 1, nil}}, "-"},
		"rules of 1 MiB":     {[]write{{strings.Repeat("measure func=BPRM_CHECK\n", 1<<20/24), 24, nil}}, bprm},
		"a relative path":    {[]write{{"etc/policy\n", 0, unix.EINVAL}}, ""},
		"a path to nowhere":  {[]write{{"/nonexistent/policy\n", 0, unix.ENOENT}}, ""},
		"a path to a folder": {[]write{{"/etc\n", 0, unix.EACCES}}, ""},
		"a path to a device": {[]write{{"/dev/zero\n", 0, unix.EACCES}}, ""},
		"a path to a link":   {[]write{{"/proc/self/exe\n", 0, unix.ELOOP}}, ""},
		"a long path":        {[]write{{"/" + strings.Repeat("x/", page), 0, unix.ENOENT}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w, v := openActive(t)
			fd := mustOpen(t, w.path("policy"), unix.O_WRONLY)
			for _, c := range c.writes {
				if n, err := unix.Write(fd, []byte(c.data)); err != c.err || err == nil && n != c.n {
					t.Errorf("write %.40q: %d, %v; want %d, %v", c.data, n, err, c.n, c.err)
				}
			}
			if v.rules() != "" {
				t.Errorf("in force before the close: %q", v.rules())
			}
			if err := unix.Close(fd); err != nil {
				t.Errorf("close: %v", err)
			}
			if c.rules == "-" {
				c.rules = "measure fsname=" + strings.Repeat("x", page-1-15) + " \n"
			}
			if v.rules() != c.rules {
				t.Errorf("in force %.100q, want %.100q", v.rules(), c.rules)
			}
			if b, err := os.ReadFile(w.path("policy")); err != nil || string(b) != v.rules() {
				t.Errorf("read back %.100q, %v", b, err)
			}
		})
	}
}

// TestPolicyByTools: what shells and tools do to the file.
func TestPolicyByTools(t *testing.T) {
	many := strings.Repeat("measure func=BPRM_CHECK\n", 300)
	for name, c := range map[string]struct{ script, out, rules string }{
		"echo":               {`echo measure func=BPRM_CHECK > $W/ima/policy; cat $W/ima/policy`, bprm, bprm},
		"busybox printf":     {`busybox sh -c "printf 'measure func=BPRM_CHECK\nmeasure func=MMAP_CHECK\n' > $W/ima/policy"`, "", bprm + mmap},
		"a second appends":   {`for f in BPRM MMAP; do echo measure func=${f}_CHECK > $W/ima/policy; done`, "", bprm + mmap},
		">>":                 {`for f in BPRM MMAP; do echo measure func=${f}_CHECK; done >> $W/ima/policy`, "", bprm + mmap},
		"programs in a list": {`(/bin/echo measure func=BPRM_CHECK; /bin/echo measure func=MMAP_CHECK) > $W/ima/policy`, "", bprm + mmap},
		"the last is bad":    {`(/bin/echo measure func=BPRM_CHECK; /bin/echo mesure 2>/dev/null) > $W/ima/policy || echo $?`, "1\n", ""},
		"bad, then good":     {`echo mesure 2>/dev/null > $W/ima/policy || echo $?; echo measure func=BPRM_CHECK > $W/ima/policy`, "1\n", bprm},
		"cat":                {`cat $P > $W/ima/policy`, "", strings.ReplaceAll(many, "\n", " \n")},
		"busybox cat":        {`busybox cat $P > $W/ima/policy; grep -c ^ $W/ima/policy`, "300\n", strings.ReplaceAll(many, "\n", " \n")},
		"cp":                 {`cp $P $W/ima/policy`, "", strings.ReplaceAll(many, "\n", " \n")},
		"dd":                 {`dd if=$P of=$W/ima/policy bs=24 2>/dev/null`, "", strings.ReplaceAll(many, "\n", " \n")},
		"path":               {`echo $P > $W/ima/policy`, "", strings.ReplaceAll(many, "\n", " \n")},
		"read and write":     {`exec 3<>$W/ima/policy || true`, "sh: 1: cannot create P: Permission denied\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			w, v := openActive(t)
			p := filepath.Join(t.TempDir(), "policy")
			if err := os.WriteFile(p, []byte(many), 0o600); err != nil {
				t.Fatal(err)
			}
			out, _ := w.shell(strings.ReplaceAll(c.script, "$P", p))
			if want := strings.ReplaceAll(c.out, " P:", " "+w.dir+"/ima/policy:"); out != want {
				t.Errorf("printed %q, want %q", out, want)
			}
			if v.rules() != c.rules {
				t.Errorf("in force %q, want %q", v.rules(), c.rules)
			}
		})
	}
}

// TestPolicyLoad: a file is found in the root of who names it, with that one's rights.
func TestPolicyLoad(t *testing.T) {
	w, v := openActive(t)
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("good", "# comment\nmeasure func=BPRM_CHECK\n\nmeasure func=MMAP_CHECK", 0o644)
	write("bad", "measure func=BPRM_CHECK\nmeasure\nx\n", 0o644)
	write("zero", "measure func=BPRM_CHECK\n\x00", 0o644)
	write("empty", "", 0o644)
	write("secret", "measure func=BPRM_CHECK\n", 0o600)
	write("large", "measure\n", 0o644)
	if err := os.Truncate(filepath.Join(root, "large"), policyMax+1); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Mkfifo(filepath.Join(root, "fifo"), 0o666), os.Symlink("/good", filepath.Join(root, "link")),
		os.Symlink("../../../../good", filepath.Join(root, "up")), os.Mkdir(filepath.Join(root, "w"), 0o755)); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{
		"/good": nil, "/link": nil, "/up": nil, "/../../good\n": nil, "/bad": unix.EINVAL, "/zero": unix.EINVAL,
		"/empty": unix.EINVAL, "/fifo": unix.EACCES, "/large": unix.EFBIG, "/missing": unix.ENOENT, "/secret": unix.EACCES,
		filepath.Join(root, "good"): unix.ENOENT,
	} {
		uid := 0
		if path == "/secret" {
			uid = 65534
		}
		v.set(func() { v.policy = new(policy.Policy) })
		n, err := writeIn(t, w, root, uid, path)
		if err != want || err == nil && n != len(path) {
			t.Errorf("write %q: %d, %v, want %v", path, n, err, want)
		}
		rules := ""
		if want == nil {
			rules = bprm + mmap
		}
		if v.rules() != rules {
			t.Errorf("after %q in force: %q", path, v.rules())
		}
	}
}

// writeIn writes to the policy from a process with another root and other ids for files.
func writeIn(t *testing.T, w *window, root string, uid int, data string) (int, error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"IMAFS_TEST_WRITE=" + data, "IMAFS_TEST_FILE=" + w.path("policy"), "IMAFS_TEST_ROOT=" + root, fmt.Sprint("IMAFS_TEST_UID=", uid)}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var n, no int
	if _, err := fmt.Sscan(string(out), &n, &no); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	if no != 0 {
		return n, syscall.Errno(no)
	}
	return n, nil
}

// TestOneWriter: a second one gets EBUSY until the last close of the first, and not after.
func TestOneWriter(t *testing.T) {
	w, v := openActive(t)
	at := w.path("policy")
	fd := mustOpen(t, at, unix.O_WRONLY)
	if err := openErr(at, unix.O_WRONLY); err != unix.EBUSY {
		t.Errorf("a second writer: %v", err)
	}
	if err := openErr(at, unix.O_RDONLY); err != nil {
		t.Errorf("a reader: %v", err)
	}
	twin, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, []byte("measure func=BPRM_CHECK\n")); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if err := openErr(at, unix.O_WRONLY); err != unix.EBUSY || v.rules() != "" {
		t.Errorf("with a descriptor still open: %v, in force %q", err, v.rules())
	}
	if _, err := unix.Write(twin, []byte("measure func=MMAP_CHECK\n")); err != nil {
		t.Errorf("write to the other descriptor: %v", err)
	}
	unix.Close(twin)
	if v.rules() != bprm+mmap {
		t.Errorf("in force %q", v.rules())
	}
	if err := openErr(at, unix.O_WRONLY); err != nil {
		t.Errorf("after the last close: %v", err)
	}
	w.want(`for i in $(seq 100); do echo > $W/ima/policy || echo busy; done; : > $W/ima/policy; : > $W/ima/policy`, "")
}

// TestWriterElsewhere: a descriptor that went on to another mount namespace is not seen: the first close counts, and what is
// written then is one more policy.
func TestWriterElsewhere(t *testing.T) {
	w, v := openActive(t)
	at := w.path("policy")
	fd := mustOpen(t, at, unix.O_WRONLY)
	twin, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	far := exec.Command("sh", "-c", `echo measure func=MMAP_CHECK; read x; echo measure func=CREDS_CHECK; read x`)
	far.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	far.Stdout = os.NewFile(uintptr(twin), at)
	in, err := far.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := far.Start(); err != nil {
		t.Fatal(err)
	}
	far.Stdout.(*os.File).Close()
	time.Sleep(200 * time.Millisecond) // for the write; nothing else tells of it
	unix.Close(fd)
	if v.rules() != mmap {
		t.Errorf("in force %q", v.rules())
	}
	if err := openErr(at, unix.O_WRONLY); err != nil {
		t.Errorf("another writer: %v", err)
	}
	fmt.Fprintln(in)
	time.Sleep(200 * time.Millisecond)
	if err := openErr(at, unix.O_WRONLY); err != unix.EBUSY {
		t.Errorf("another writer, while one writes there: %v", err)
	}
	fmt.Fprintln(in)
	if err := far.Wait(); err != nil {
		t.Error(err)
	}
	if want := mmap + "measure func=CREDS_CHECK \n"; v.rules() != want {
		t.Errorf("in force %q, want %q", v.rules(), want)
	}
}

// TestWriterBecomesAnother: a process that executes a program closes the descriptor in doing so, and proc may not tell of it before
// that is done. The close goes on, and the rules are in force soon.
func TestWriterBecomesAnother(t *testing.T) {
	w, v := openActive(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	const line = `open(F, ">", $ARGV[0]) && syswrite(F, "measure func=MMAP_CHECK\n") && exec "true"; exit 1`
	if out, err := exec.CommandContext(ctx, "perl", "-e", line, w.path("policy")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for v.rules() != mmap {
		if ctx.Err() != nil {
			t.Fatalf("in force %q", v.rules())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestCloseWaits: close(2) returns when the rules are in force, whoever is in a hurry, and says what was wrong with them.
func TestCloseWaits(t *testing.T) {
	w, v := openActive(t)
	v.set(func() { v.apply = func() { time.Sleep(300 * time.Millisecond) } })
	start := time.Now()
	w.want(`echo measure func=BPRM_CHECK > $W/ima/policy`, "")
	if time.Since(start) < 300*time.Millisecond || v.rules() != bprm {
		t.Errorf("the close came back after %v, in force %q", time.Since(start), v.rules())
	}
	v.set(func() { v.apply = nil })
	fd := mustOpen(t, w.path("policy"), unix.O_WRONLY)
	for range rulesMax {
		if _, err := unix.Write(fd, []byte("measure func=BPRM_CHECK\n")); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Close(fd); err != unix.ENOSPC {
		t.Errorf("close with a rule too many: %v", err)
	}
	if v.rules() != bprm {
		t.Errorf("%d bytes in force", len(v.rules()))
	}
}

// TestWriterKilled: its rules take effect when it is gone, as the kernel's do, and others can write.
func TestWriterKilled(t *testing.T) {
	w, v := openActive(t)
	out, err := w.shell(`echo measure func=BPRM_CHECK > $W/ima/policy; exec > $W/ima/policy; echo measure func=MMAP_CHECK; kill -9 $$`)
	if err == nil {
		t.Errorf("not killed: %q", out)
	}
	if v.rules() != bprm+mmap {
		t.Errorf("in force %q", v.rules())
	}
	if err := openErr(w.path("policy"), unix.O_WRONLY); err != nil {
		t.Error(err)
	}
}

// TestManyRules: a hundred thousand, and more than one writer may keep in memory.
func TestManyRules(t *testing.T) {
	w, v := openActive(t)
	file := filepath.Join(t.TempDir(), "policy")
	rules := bytes.Repeat([]byte("measure func=BPRM_CHECK\n"), 100_000)
	if err := os.WriteFile(file, rules, 0o600); err != nil {
		t.Fatal(err)
	}
	fd := mustOpen(t, w.path("policy"), unix.O_WRONLY)
	if _, err := unix.Write(fd, []byte(file)); err != nil {
		t.Errorf("load 100,000 rules: %v", err)
	}
	line := []byte("measure fsname=" + strings.Repeat("x", 4000) + "\n")
	var err error
	for i := 0; i < policyMax/4000+1 && err == nil; i++ {
		_, err = unix.Write(fd, line)
	}
	if err != unix.ENOSPC {
		t.Errorf("without end: %v", err)
	}
	if err := unix.Close(fd); err != nil || v.applied != 0 {
		t.Errorf("close: %v, applied %d times", err, v.applied)
	}
}
