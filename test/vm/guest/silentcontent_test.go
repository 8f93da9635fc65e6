//go:build vm

package guest

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/imalog"
)

// contentWay is a way to change what a path runs: a line of shell that has the path as $p.
type contentWay struct {
	name, line string

	before      string // a line that is run first
	first, then string // what is added to the path for what runs before and after the change
}

var contentWays = []contentWay{
	{name: "append", line: `printf changed >>$p`},
	{name: "overwrite", line: `printf CHANGED | dd of=$p bs=1 seek=140 conv=notrunc status=none`},
	{name: "write anew", line: `head -c 300 $p >$p.new; printf anew >>$p.new; cat $p.new >$p`},
	{name: "truncate", line: `truncate -s -3 $p`},
	{name: "store through a mapping", line: `mapstore $p 140 STORED`},
	{name: "write by O_DIRECT", line: `head -c 4096 /dev/zero >>$p; sync $p; printf 'DIRECT%506s' ' ' | dd of=$p bs=512 seek=4 oflag=direct conv=notrunc status=none || printf no >>$p`},
	{name: "rename over", line: `(cat $p; printf other) >$p.new; chmod 755 $p.new; mv $p.new $p`},
	{name: "unlink", line: `(cat $p; printf other) >$p.new; rm $p; cp $p.new $p; chmod 755 $p`},
	{name: "another link", line: `ln $p $p.link; printf linked >>$p.link`},
	{name: "mount over", line: `(cat $p; printf over) >$p.over; chmod 755 $p.over; mount --bind $p.over $p`},
	{name: "move the mount", line: `mount --move $p.d/a $p.d/b && printf moved >>$p.d/b/p`, first: ".d/a/p", then: ".d/b/p",
		before: `mkdir $p.d && mount -t tmpfs m $p.d && mount --make-private $p.d && mkdir $p.d/a $p.d/b && mount -t tmpfs n $p.d/a && cp $p $p.d/a/p`},
}

// However a file changes between two runs, its list has what ran: the digest, or with the agent's digests a violation, and never another.
func TestNeverSilentContent(t *testing.T) {
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			for i, place := range contentPlaces(t) {
				if short() && mode == "agent" && i > 0 {
					break
				}
				t.Run(place.fs, func(t *testing.T) {
					a := a.in(t)
					var wants []contentWant
					for i, way := range contentWays {
						path := fmt.Sprintf("%s/p%d", place.dir, i)
						makeProgram(t, path)
						time.Sleep(50 * time.Millisecond) // else its content is too young to be known again
						want := way.want(t, path)
						want.run(t, path+way.first)
						a.caughtUp()
						way.change(t, path)
						want.run(t, path+way.then)
						a.caughtUp()
						wants = append(wants, want)
					}
					wants = append(wants, place.changedBehind(t, a)...)
					list := a.list("native")
					for _, want := range wants {
						want.check(t, list, mode == "kernel")
					}
				})
			}
			a.verifyNow("native")
		})
	}
}

// want prepares a program for the change.
func (w contentWay) want(t *testing.T, path string) contentWant {
	t.Helper()
	t.Cleanup(func() { exec.Command("sh", "-c", fmt.Sprintf("umount -l %[1]s %[1]s.d", path)).Run() })
	if w.before != "" {
		sh(t, fmt.Sprintf("p=%s; %s", path, w.before))
	}
	return contentWant{way: w.name, paths: []string{path + w.first, path + w.then}}
}

func (w contentWay) change(t *testing.T, path string) {
	t.Helper()
	sh(t, fmt.Sprintf("p=%s; sleep 0.02; %s", path, w.line))
}

// contentWant is what ran by some paths.
type contentWant struct {
	way   string
	paths []string
	sums  []string
}

// run runs a program, whose content is what its digest says.
func (w *contentWant) run(t *testing.T, path string) {
	t.Helper()
	w.is(t, path)
	runProgram(t, path)
}

// is notes what a file is that is about to be used.
func (w *contentWant) is(t *testing.T, path string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	w.sums = append(w.sums, digestOf(content))
}

// check looks for what ran in a list; all: no violation will do for it.
func (w *contentWant) check(t *testing.T, list []*imalog.Entry, all bool) {
	t.Helper()
	var found []string
	violations := 0
	for _, e := range list {
		switch {
		case !slices.Contains(w.paths, e.Name()):
		case e.Violation():
			violations++
		default:
			found = append(found, e.FileDigest().String())
		}
	}
	for _, sum := range found {
		if !slices.Contains(w.sums, sum) {
			t.Errorf("%s: %v has %s, which never ran", w.way, w.paths, sum)
		}
	}
	missing := 0
	for _, sum := range w.sums {
		if !slices.Contains(found, sum) {
			missing++
		}
	}
	if missing > violations || all && missing > 0 {
		t.Errorf("%s: %v ran as %v; entries %v, %d violations", w.way, w.paths, w.sums, found, violations)
	}
}

// oddRun is a way to run something, and what must be in the list for it.
type oddRun struct {
	name string
	sums []string
}

// runOddCode runs code by ways that are not the usual one.
func runOddCode(t *testing.T, dir string) []oddRun {
	t.Helper()
	var runs []oddRun
	file := func(name string) (path, sum string) {
		path = filepath.Join(dir, name)
		return path, fmt.Sprintf("sha256:%x", makeProgram(t, path))
	}
	did := func(name string, sums ...string) { runs = append(runs, oddRun{name, sums}) }

	did("a program in memory", runMemfd(t))
	deleted, sum := file("deleted")
	sh(t, fmt.Sprintf("exec 9<%[1]s; rm %[1]s; /proc/self/fd/9", deleted))
	did("a deleted program", sum)
	at, sum := file("at")
	executeAt(t, at)
	did("execveat of a descriptor", sum)
	interpreter, sum := file("interpreter")
	script := []byte("#!" + interpreter + "\n")
	if err := os.WriteFile(dir+"/script", script, 0o755); err != nil {
		t.Fatal(err)
	}
	runProgram(t, dir+"/script")
	did("a script and its interpreter", sum, digestOf(script))
	other, sum := file("other-interpreter")
	magic := []byte("IMANSodd\n")
	if err := os.WriteFile(dir+"/misc", magic, 0o755); err != nil {
		t.Fatal(err)
	}
	registerOdd(t, other)
	runProgram(t, dir+"/misc")
	did("a file by binfmt_misc, and its interpreter", sum, digestOf(magic))
	linked := dir + "/linked"
	sh(t, fmt.Sprintf("cp /bin/true %[1]s; printf x >>%[1]s; /lib64/ld-linux-x86-64.so.2 %[1]s", linked))
	did("a program by ld.so", "sha256:"+sh(t, "sha256sum "+linked+" | cut -c 1-64"))
	later, sum := file("later")
	mapExecutableLater(t, later)
	did("a mapping made executable (mprotect)", sum)
	implied, sum := file("implied")
	mapImplied(t, implied)
	did("a mapping with READ_IMPLIES_EXEC", sum)
	remapped, sum := file("remapped")
	remapImplied(t, remapped)
	did("remap_file_pages with READ_IMPLIES_EXEC", sum)
	old := dir + "/32-bit"
	if err := os.WriteFile(old, tinyProgram32(old), 0o755); err != nil {
		t.Fatal(err)
	}
	runProgram(t, old)
	did("a 32-bit program", digestOf(tinyProgram32(old)))
	for _, c := range []struct{ name, way string }{
		{"in a chroot", "chroot %[1]s/root /p"},
		{"after pivot_root", "unshare -m sh -c 'cd %[1]s/root && mount --bind . . && cd . && cd %[1]s/root && pivot_root . old && exec /p'"},
	} {
		root := dir + "/root"
		sh(t, fmt.Sprintf("rm -rf %[1]s; mkdir -p %[1]s/old", root))
		content := tinyProgram(c.way)
		if err := os.WriteFile(root+"/p", content, 0o755); err != nil {
			t.Fatal(err)
		}
		sh(t, fmt.Sprintf(c.way, dir))
		did(c.name, digestOf(content))
	}
	return runs
}

// executeAt runs a program by its descriptor alone: execveat with AT_EMPTY_PATH, by a shell's child.
func executeAt(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("perl", "-e", `my $e = ""; syscall(322, 3, $e, 0, 0, 0x1000); die $!`) // execveat
	cmd.ExtraFiles = []*os.File{f}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("execveat: %v %s", err, out)
	}
}

// mapImplied maps a file for reading in a process whose personality makes that executable.
func mapImplied(t *testing.T, path string) {
	t.Helper()
	const mmap = `syscall(135, 0x0400000) >= 0 or die $!; open F, "<", $ARGV[0] or die; ` + // personality(READ_IMPLIES_EXEC)
		`my $a = syscall(9, 0, 4096, 1, 2, fileno(F), 0); $a != -1 or die $!` // mmap(PROT_READ, MAP_PRIVATE)
	if out, err := exec.Command("perl", "-e", mmap, path).CombinedOutput(); err != nil {
		t.Fatalf("map with READ_IMPLIES_EXEC: %v %s", err, out)
	}
}

// remapImplied maps a file for reading, then has the mapping made anew in a process whose personality makes that executable.
func remapImplied(t *testing.T, path string) {
	t.Helper()
	const remap = `open F, "+<", $ARGV[0] or die; my $a = syscall(9, 0, 4096, 1, 1, fileno(F), 0); $a != -1 or die $!; ` + // mmap(PROT_READ, MAP_SHARED), which is none where it is open for reading only
		`syscall(135, 0x0400000) >= 0 or die $!; syscall(216, $a, 4096, 0, 0, 0) == 0 or die $!; ` + // personality(READ_IMPLIES_EXEC), remap_file_pages
		`open M, "<", "/proc/self/maps" or die; grep { /^\S+ r-xs .*\Q$ARGV[0]\E$/ } <M> or die "not executable"`
	if out, err := exec.Command("perl", "-e", remap, path).CombinedOutput(); err != nil {
		t.Fatalf("remap with READ_IMPLIES_EXEC: %v %s", err, out)
	}
}

// Code that is run in an odd way is in the list all the same.
func TestNeverSilentOddCode(t *testing.T) {
	sample(t, "6.18")
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			runs := runOddCode(t, tempDir(t, "/root"))
			found, violations := map[string]bool{}, 0
			for _, e := range a.list("native") {
				if e.Violation() {
					violations++
				} else {
					found[e.FileDigest().String()] = true
				}
			}
			missing := 0
			for _, r := range runs {
				for _, sum := range r.sums {
					if !found[sum] {
						missing++
						if mode == "kernel" {
							t.Errorf("%s: no entry with %s", r.name, sum)
						}
					}
				}
			}
			if missing > violations {
				t.Errorf("%d contents are missing, and there are %d violations", missing, violations)
			}
			a.verifyNow("native")
		})
	}
}

// insideWays are odd ways to run a file p, of a folder $d, in a namespace of its own.
var insideWays = []struct{ name, line string }{
	{"chroot", `chroot $d /p`},
	{"pivot_root", `cd $d && mount --bind . . && cd $d && pivot_root . old && /p`},
	{"binfmt_misc", `$d/misc`},
	{"a script", `$d/script`},
	{"a descriptor", `exec 9<$d/p && /proc/self/fd/9`},
}

// What a namespace runs in an odd way is in its own list, and in the native one.
func TestNeverSilentOddCodeInside(t *testing.T) {
	sample(t, "6.18")
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode, "--namespaces", "all", "--ns-tpm", "none")
			for _, way := range insideWays {
				dir := tempDir(t, "/root")
				sh(t, "mkdir "+dir+"/old")
				sums := []string{fmt.Sprintf("sha256:%x", makeProgram(t, dir+"/p"))}
				for name, text := range map[string]string{"script": "#!" + dir + "/p\n", "misc": "IMANSodd\n" + dir} {
					if err := os.WriteFile(dir+"/"+name, []byte(text), 0o755); err != nil {
						t.Fatal(err)
					}
					if strings.HasSuffix(way.line, "/"+name) {
						sums = append(sums, digestOf([]byte(text)))
					}
				}
				registerOdd(t, dir+"/p")
				ns := runInside(t, fmt.Sprintf("d=%s; %s", dir, way.line))
				for _, name := range []string{ns, "native"} {
					list := a.list(name)
					found := digestsOf(list)
					_, violations := names(list)
					for _, sum := range sums {
						// By another root's path the agent finds the file while its process is there only.
						if found[sum] != 1 && (mode == "kernel" || violations["/p"] == 0) || mode == "kernel" && len(violations) > 0 {
							t.Errorf("%s: %d entries with %s in the list of %s, violations %v", way.name, found[sum], sum, name, violations)
						}
					}
				}
				if found := digestsOf(a.list(runInside(t, ":"))); found[sums[0]] > 0 {
					t.Errorf("%s: it is in a neighbour's list", way.name)
				}
			}
		})
	}
}

// registerOdd has a program interpret files that begin with IMANSodd, until the test ends.
func registerOdd(t *testing.T, interpreter string) {
	t.Helper()
	sh(t, fmt.Sprintf("m=/proc/sys/fs/binfmt_misc; [ -e $m/register ] || mount -t binfmt_misc b $m; ! [ -e $m/imans ] || echo -1 >$m/imans; printf ':imans:M::IMANSodd::%s:' >$m/register", interpreter))
	t.Cleanup(func() { os.WriteFile("/proc/sys/fs/binfmt_misc/imans", []byte("-1"), 0) })
}

// runInside runs a line of shell in a namespace of its own, which lives until the test ends, and returns its name.
func runInside(t *testing.T, line string) string {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "{ "+line+"; } && echo ran; read line")
	in, err := cmd.StdinPipe()
	out, errOut := cmd.StdoutPipe()
	if err = errors.Join(err, errOut, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "ran\n" {
		t.Errorf("%s: %q, %v", line, said, err)
	}
	return fmt.Sprint(mountNS(t, cmd.Process.Pid))
}

// Who enters a namespace from outside is measured in it from then on.
func TestNeverSilentOutsider(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all", "--ns-tpm", "none")
	dir := tempDir(t, "/root")
	makeProgram(t, dir+"/p")
	inside := exec.Command("unshare", "--mount", "cat")
	in, err := inside.StdinPipe()
	if err = errors.Join(err, inside.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); inside.Wait() })
	sh(t, fmt.Sprintf("until [ $(readlink /proc/%d/ns/mnt) != $(readlink /proc/self/ns/mnt) ]; do sleep 0.05; done", inside.Process.Pid))
	ns := fmt.Sprint(mountNS(t, inside.Process.Pid))
	runProgram(t, dir+"/p")
	if measured, _ := names(a.list(ns)); measured[dir+"/p"] != 0 {
		t.Error("what ran outside is in the list")
	}
	sh(t, fmt.Sprintf("nsenter --mount=/proc/%d/ns/mnt %s/p", inside.Process.Pid, dir))
	if measured, violations := names(a.list(ns)); measured[dir+"/p"] != 1 || len(violations) > 0 {
		t.Errorf("what an outsider ran: entries %v, violations %v", measured, violations)
	}
}

// oddNames are names that could be taken for something else in a list, or do not fit.
var oddNames = []string{
	"with some  spaces", "line\nbreak", "10 " + "ff ima-ng sha256:00 /bin/forged\n10 aa", "tab\tand\rreturn", "bell\x07\x1b[31m", "invalid\xff\xfeutf8",
	"\\n", "percent%20", "quote\"'`$(x)", " (deleted)", "imans-lost", "boot_aggregate",
}

// Nothing that a name contains makes a line of the ascii list, and the binary list has each name as it is.
func TestNeverSilentOddNames(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t)
	dir := tempDir(t, "/root")
	paths := map[string]bool{}
	for _, name := range oddNames {
		path := dir + "/" + name
		makeProgram(t, path)
		runProgram(t, path)
		paths[strings.ReplaceAll(path, " ", "_")] = true // as the kernel does
	}
	long := dir
	for len(long) < 3000 {
		long += "/" + fmt.Sprintf("%0200d", len(long))
	}
	makeProgram(t, long+"/p")
	runProgram(t, long+"/p")
	paths[long+"/p"] = true
	beyond := tooLong(t, dir)
	a.cli("measurements", "native") // which is measured itself
	list := a.list("native")
	measured, violations := names(list)
	for path := range paths {
		if measured[path] != 1 {
			t.Errorf("%q: %d entries", path, measured[path])
		}
	}
	if measured[beyond] != 1 || len(violations) > 0 {
		t.Errorf("a path that is too long: %d entries of its last component; violations %v", measured[beyond], violations)
	}
	ascii := a.cli("measurements", "native")
	lines := 0
	for _, b := range []byte(ascii) {
		if b == '\n' {
			lines++
		} else if b < ' ' || b == 0x7f {
			t.Errorf("a control byte %#x in the ascii list", b)
		}
	}
	if lines != len(list) {
		t.Errorf("the ascii list has %d lines, the list %d entries", lines, len(list))
	}
	a.verifyNow("native")
}

// tooLong runs a program whose path is longer than PATH_MAX, and returns its name.
func tooLong(t *testing.T, dir string) string {
	t.Helper()
	const name = "beyond-path-max"
	sh(t, fmt.Sprintf(`cd %s; d=$(printf '%%0200d' 7); for i in $(seq 25); do mkdir $d && cd $d || exit 1; done; cp %s ./%s && ./%[3]s`, dir, dir+"/boot_aggregate", name))
	return name
}

// A container's root reaches neither the agent's folders, sockets and pins nor its process, whatever capabilities a runtime gives it.
func TestNeverSilentOutOfReach(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all", "--ns-tpm", "none")
	for _, dir := range []string{a.dir + "/state", a.dir + "/run", "/sys/fs/bpf/" + filepath.Base(a.dir)} {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil || st.Mode&0o077 != 0 && dir != a.dir+"/run" || st.Uid != 0 {
			t.Errorf("%s: mode %o, owner %d, %v", dir, st.Mode, st.Uid, err)
		}
	}
	c := startContainer(t, "reaches", fmt.Sprintf(`mkdir -p /sys/fs/bpf
tried() { "$@" >/dev/null 2>&1 && echo "$*" >>/reached; }
tried busybox ls /proc
tried busybox ls %[1]s/state
tried busybox ls %[1]s/run
tried busybox ls /sys/fs/bpf/%[2]s
tried kill -9 %[3]d
tried busybox ls /proc/%[3]d/root/
tried busybox nsenter -t %[3]d -m busybox true`, a.dir, filepath.Base(a.dir), a.cmd.Process.Pid), func(string) {})
	if reached := readFile(t, c.root+"/reached"); reached != "busybox ls /proc" {
		t.Errorf("a container's root could, of which the first is meant: %s", reached)
	}
	if _, err := a.client().Status(t.Context()); err != nil {
		t.Errorf("the agent: %v", err)
	}
}
