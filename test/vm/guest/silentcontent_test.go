//go:build vm

package guest

import (
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

// That the kernel reads a file to hash it is no change of the file, though xfs counts it as one: nobody has read it before.
func TestNeverSilentFirstRead(t *testing.T) {
	a := startAgent(t, "--digest", "kernel")
	for _, p := range contentPlaces(t, "FUSE", "NFS") { // whose servers have the change times: those may be others at the next look
		path := p.dir + "/unread"
		sum := makeProgram(t, path)
		time.Sleep(50 * time.Millisecond) // the access time would stay as it is
		mapped(t, path)()
		list := a.list("native")
		entries := digestsOf(list)[fmt.Sprintf("sha256:%x", sum)]
		if _, violations := names(list); entries != 1 || violations[path] != 0 {
			t.Errorf("%s: %d entries, %d violations", p.fs, entries, violations[path])
		}
	}
	a.verifyNow("native")
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
