//go:build vm

package guest

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/namespace"
)

// crashPatience is how long an armed agent may go without coming to its point.
const crashPatience = 3 * time.Minute

// crashes has an agent die at chosen points while programs run one after the other, and checks what the next agents make of it.
type crashes struct {
	t        *testing.T
	a        *agent
	dir      string
	ran      []*crashProgram // in the order in which they ran
	standing *crashBox       // lives as long as the test
	boxes    []*crashBox     // of this run
	deaths   int
	again    int // of them, while the next agent caught up
}

// crashProgram is a program that ran once.
type crashProgram struct {
	path, digest string
	gone         bool // its file was removed at once: with the agent's digest, a violation may name it instead
	box          *crashBox
}

// crashBox is a mount namespace whose shell runs what it is told.
type crashBox struct {
	name  string // as imans-agent ns has it
	inum  uint32
	ended bool
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
}

// The agent is killed at each point of package fault, the next one takes over: nothing is lost, doubled or reordered in the native list or
// a container's, and the TPMs' registers replay. A point that the agent does not come to is a failure.
func TestNeverSilentCrashPoints(t *testing.T) {
	points := slices.DeleteFunc(fault.All(), func(p fault.Point) bool { return p == fault.KernelSideTold }) // TestNeverSilentKernelSide has that
	if os.Getenv("IMANS_SAMPLE") != "" {                                                                    // those of an entry's way, each on one of the kernels
		third := slices.Index([]string{"6.1", "6.12", "6.18"}, os.Getenv("IMANS_VM_KERNEL"))
		points = slices.DeleteFunc(points, func(p fault.Point) bool { return int(p)%3 != third || !often(p) && p != fault.ListCut })
	}
	rounds := (sized(len(points), 2*len(points), 1000) + len(points) - 1) / len(points) // half of them in each mode
	for i, mode := range []string{"agent", "kernel"} {
		t.Run("digest="+mode, func(t *testing.T) {
			of, rounds := points, (rounds+1)/2
			if mode == "kernel" { // by which no file is gone before it is hashed
				if short() {
					t.Skip("in a longer run: make test-vm RUN=" + t.Name())
				}
				of = slices.DeleteFunc(slices.Clone(points), func(p fault.Point) bool { return p == fault.ViolationNoted })
			}
			began, done, deaths, again, programs := time.Now(), 0, 0, 0, 0
			for round := range rounds { // each of an agent of its own, as what is looked at after a death grows with each program
				t.Run(fmt.Sprint(round), func(t *testing.T) {
					c := newCrashes(t, mode)
					for _, p := range of {
						t.Run(p.String(), func(t *testing.T) {
							c.t, c.a.t = t, t
							c.run(p, round+i)
							done++
						})
					}
					c.t, c.a.t = t, t
					c.noSwtpmLeft()
					deaths, again, programs = deaths+c.deaths, again+c.again, programs+len(c.ran)
				})
			}
			t.Logf("%d runs of %d points in %v: %d deaths, %d of them of an agent that caught up; %d programs, each in the list once",
				done, len(of), time.Since(began).Round(time.Second), deaths+again, again, programs)
		})
	}
}

// newCrashes starts an agent that hashes files itself, or leaves that to the kernel.
func newCrashes(t *testing.T, mode string) *crashes {
	t.Helper()
	a := newAgent(t, "--namespaces", "all", "--digest", mode)
	a.args = append(a.args, "--archive", a.dir+"/archive")
	c := &crashes{t: t, a: a, dir: tempDir(t, "/root")}
	a.start()
	c.standing = c.open()
	return c
}

// often reports whether each program passes a point; others take a namespace, or a file that is written anew.
func often(p fault.Point) bool {
	name := p.String()
	return strings.HasPrefix(name, "record-") || strings.HasPrefix(name, "log-") || strings.HasPrefix(name, "extend")
}

// run is one crash, and what comes after it.
func (c *crashes) run(p fault.Point, run int) {
	c.t.Helper()
	passes := 3
	if often(p) {
		passes = 12
	}
	c.boxes = nil
	c.a.signal(syscall.SIGTERM)
	if p == fault.ListCut {
		c.die(fault.LogTorn, 1+run%passes)
		c.die(p, 1)
	} else {
		c.die(p, 1+run%passes)
	}
	c.execute(nil, false) // nobody looks
	c.execute(c.standing, false)
	if run%2 == 1 {
		c.dieCatchingUp(p)
	}
	c.a.start()
	c.execute(nil, false)
	c.a.catchesUp()
	c.check()
	for _, b := range c.boxes {
		c.end(b)
	}
}

// die arms a point, and has the agent work until it dies of it.
func (c *crashes) die(p fault.Point, pass int) {
	c.t.Helper()
	c.a.fault = fmt.Sprintf("%v:%d", p, pass)
	c.a.launch()
	c.a.fault = ""
	grants := strings.HasPrefix(p.String(), "grant-")
	for began := time.Now(); ; {
		c.execute(nil, false)
		c.execute(c.standing, false)
		c.execute(nil, true)
		if !often(p) && !c.dead(0) {
			c.namespace(grants)
		}
		if c.dead(50 * time.Millisecond) {
			break
		}
		if time.Since(began) > crashPatience {
			c.t.Fatalf("the agent does not come to %v for the %d. time: %s", p, pass, tail(c.a.log.String(), 2000))
		}
	}
	c.killed()
	c.deaths++
}

// namespace is the life of one, with a vTPM of its own or one that it is given.
func (c *crashes) namespace(grant bool) {
	b := c.open()
	c.boxes = append(c.boxes, b)
	c.execute(b, false)
	if grant {
		// It fails if the agent dies of it.
		exec.Command(program, "vtpm", "attach", b.name, "--run-dir", c.a.dir+"/run").Run()
	}
	c.execute(b, false)
	if len(c.boxes)%2 == 0 || grant { // else it outlives the agent
		c.end(b)
	}
}

// dieCatchingUp has the next agent die, too: of the same point, or as soon as it is there.
func (c *crashes) dieCatchingUp(p fault.Point) {
	c.t.Helper()
	c.a.fault = fmt.Sprintf("%v:1", p)
	c.a.launch()
	c.a.fault = ""
	for began := time.Now(); !c.dead(20 * time.Millisecond); {
		if c.a.answers(crashPatience) == nil || time.Since(began) > crashPatience {
			c.a.cmd.Process.Kill()
		}
	}
	c.killed()
	c.again++
}

// dead reports whether the agent has ended, or does so soon.
func (c *crashes) dead(soon time.Duration) bool {
	select {
	case <-c.a.exited:
		return true
	case <-time.After(soon):
		return false
	}
}

// killed checks that the agent died as it was to.
func (c *crashes) killed() {
	c.t.Helper()
	if s, ok := c.a.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGKILL {
		c.t.Fatalf("the agent ended by itself, %v: %s", c.a.cmd.ProcessState, tail(c.a.log.String(), 3000))
	}
}

// execute runs a program of its own content, in the native namespace or in a box.
func (c *crashes) execute(b *crashBox, gone bool) {
	c.t.Helper()
	p := &crashProgram{path: fmt.Sprintf("%s/p%d", c.dir, len(c.ran)), gone: gone, box: b}
	p.digest = fmt.Sprintf("sha256:%x", makeProgram(c.t, p.path))
	if b == nil {
		runProgram(c.t, p.path)
	} else {
		b.tell(c.t, p.path)
	}
	if gone {
		os.Remove(p.path)
	}
	c.ran = append(c.ran, p)
}

// open makes a box, with a network of its own in which a vTPM can be reached.
func (c *crashes) open() *crashBox {
	c.t.Helper()
	b := &crashBox{cmd: exec.Command("unshare", "--mount", "--net", "/bin/sh")}
	in, err := b.cmd.StdinPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	out, err := b.cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	b.in, b.out = in, bufio.NewReader(out)
	if err := b.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	b.tell(c.t, "ip link set lo up")
	b.inum = mountNS(c.t, b.cmd.Process.Pid)
	b.name = fmt.Sprint(b.inum)
	c.a.t.Cleanup(func() { c.end(b) })
	return b
}

// tell has the box's shell run a line.
func (b *crashBox) tell(t *testing.T, line string) {
	t.Helper()
	if _, err := fmt.Fprintf(b.in, "%s && echo ran || echo failed\n", line); err != nil {
		t.Fatal(err)
	}
	if said, err := b.out.ReadString('\n'); err != nil || said != "ran\n" {
		t.Fatalf("in the box: %s: %q, %v", line, said, err)
	}
}

// end ends a box.
func (c *crashes) end(b *crashBox) {
	if !b.ended {
		b.ended = true
		b.in.Close()
		b.cmd.Wait()
	}
}

// check holds all lists against what ran.
func (c *crashes) check() {
	c.t.Helper()
	if !c.a.hasNoLosses() {
		return
	}
	c.inOrder("the native list", c.a.list("native"), func(*crashProgram) bool { return true })
	c.a.verifyNow("native")
	for _, b := range append([]*crashBox{c.standing}, c.boxes...) {
		if b.ended {
			c.checkArchive(b)
			continue
		}
		c.inOrder("the list of "+b.name, c.a.list(b.name), b.ran)
		c.a.verifyNow(b.name)
	}
}

// ran reports whether a program ran in the box.
func (b *crashBox) ran(p *crashProgram) bool { return p.box == b }

// checkArchive holds what is archived of a box that has ended against what ran in it, and removes it.
func (c *crashes) checkArchive(b *crashBox) {
	c.t.Helper()
	folder := c.archived(b)
	c.inOrder("the archive of "+b.name, readArchived(c.t, folder), b.ran)
	if status, out := exits(c.t, program, "verify", folder); status != 0 {
		c.t.Errorf("verify %s: exit status %d\n%s", folder, status, tail(out, 2000))
	}
	os.RemoveAll(folder)
}

// skipped reports whether a reason is that of a program that a preemptible kernel skipped.
func skipped(reason string) bool {
	return reason == event.LossProgramSkipped.String() || reason == event.LossWriterLost.String()
}

// hasNoLosses checks that the agent tells of none, but for a program that a preemptible kernel skipped.
func (a *agent) hasNoLosses() bool {
	a.t.Helper()
	client := a.client()
	defer client.Close()
	s, err := client.Status(a.t.Context())
	maps.DeleteFunc(s.Lost, func(reason string, _ uint64) bool { return skipped(reason) })
	if err != nil || len(s.Lost) != 0 {
		a.t.Errorf("losses %v, %v: %s", s.Lost, err, tail(a.log.String(), 2000))
		return false
	}
	return true
}

// archived waits for the folder of a box that has ended: it is there whole, and once, and nothing else is left of the box. Inode numbers
// are given again, so which folder is its own is told by what ran in it.
func (c *crashes) archived(b *crashBox) string {
	c.t.Helper()
	alive := 0
	for _, other := range c.boxes {
		if other.inum == b.inum && !other.ended {
			alive++
		}
	}
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		var found []string
		all, err := filepath.Glob(fmt.Sprintf("%s/archive/[^.]*-%d-*", c.a.dir, b.inum))
		for _, folder := range all {
			if slices.ContainsFunc(readArchived(c.t, folder), func(e *imalog.Entry) bool { return c.ranIn(b, e.Name()) }) {
				found = append(found, folder)
			}
		}
		left, _ := filepath.Glob(fmt.Sprintf("%s/state/boots/*/ns/%d-*", c.a.dir, b.inum))
		partial, _ := filepath.Glob(fmt.Sprintf("%s/archive/.partial-*-%d-*", c.a.dir, b.inum))
		if err == nil && len(found) == 1 && len(left) == alive && len(partial) == 0 {
			return found[0]
		}
		if time.Since(began) > time.Minute {
			c.t.Fatalf("box %s: archived %v, left %v of %d alive, in part %v, %v: %s",
				b.name, found, left, alive, partial, err, tail(c.a.log.String(), 3000))
		}
	}
}

// readArchived returns the list of a folder in the archive.
func readArchived(t *testing.T, folder string) []*imalog.Entry {
	t.Helper()
	return readListFile(t, filepath.Join(folder, namespace.ArchivedList))
}

// ranIn reports whether a program ran in a box.
func (c *crashes) ranIn(b *crashBox, path string) bool {
	return slices.ContainsFunc(c.ran, func(p *crashProgram) bool { return b.ran(p) && p.path == path })
}

// inOrder checks that a list has each of the programs that concern it once, in the order in which they ran.
func (c *crashes) inOrder(what string, list []*imalog.Entry, concerns func(*crashProgram) bool) {
	c.t.Helper()
	type found struct{ first, entries, violations int }
	at := map[string]*found{}
	for i, e := range list {
		if !strings.HasPrefix(e.Name(), c.dir+"/") {
			if parts := strings.Split(e.Name(), "/"); e.Violation() && (len(parts) < 2 || !skipped(parts[1])) {
				c.t.Errorf("%s has a violation %s", what, e.Name())
			}
			continue
		}
		f := at[e.Name()]
		if f == nil {
			f = &found{first: i}
			at[e.Name()] = f
		}
		if e.Violation() {
			f.violations++
		} else {
			f.entries++
		}
	}
	last, lastPath := -1, ""
	for _, p := range c.ran {
		if !concerns(p) {
			continue
		}
		f := at[p.path]
		delete(at, p.path)
		switch {
		case f == nil:
			c.t.Errorf("%s lacks %s", what, p.path)
			continue
		case f.first < last:
			c.t.Errorf("%s has %s before %s, which ran earlier", what, p.path, lastPath)
		case p.gone && (f.entries > 1 || f.violations > 2):
			c.t.Errorf("%s has %s %d times, and %d violations", what, p.path, f.entries, f.violations)
		case !p.gone && (f.entries != 1 || f.violations != 0):
			c.t.Errorf("%s has %s %d times, and %d violations", what, p.path, f.entries, f.violations)
		case f.entries == 1 && fmt.Sprint(list[f.first].FileDigest()) != p.digest && !list[f.first].Violation():
			c.t.Errorf("%s has %s as %v, want %s", what, p.path, list[f.first].FileDigest(), p.digest)
		}
		last, lastPath = f.first, p.path
	}
	for path := range at {
		c.t.Errorf("%s has %s, which did not run there", what, path)
	}
}

// noSwtpmLeft checks that no vTPM has outlived its namespace.
func (c *crashes) noSwtpmLeft() {
	c.t.Helper()
	c.end(c.standing)
	c.a.awaitGone(c.standing.inum)
	for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		out, _ := exec.Command("pgrep", "-a", "swtpm").Output()
		var left []string
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, c.a.dir) {
				left = append(left, strings.TrimSpace(line))
			}
		}
		if len(left) <= len(c.a.namespaces())-1 {
			return
		}
		if time.Since(began) > time.Minute {
			c.t.Errorf("vTPMs without a namespace: %v; namespaces %v", left, c.a.namespaces())
			return
		}
	}
}
