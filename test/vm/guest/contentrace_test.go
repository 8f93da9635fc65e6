//go:build vm

package guest

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/imalog"
)

// raceUses are how a file is used that is changed before the agent has looked at it.
var raceUses = []string{"run", raceAgain, raceMapped}

const (
	raceAgain  = "run again afterwards"
	raceMapped = "mapped meanwhile"
)

// racePlace is a folder in which programs are made, or were by a prefix of their names.
type racePlace struct {
	fs, dir string
	made    bool
}

// path returns where a program is that is changed in one way.
func (p racePlace) path(t *testing.T, use, way int) string {
	t.Helper()
	path := fmt.Sprintf("%s/%d-%d", p.dir, use, way)
	if !p.made {
		makeProgram(t, path)
	}
	return path
}

// lowerRacePlace is an overlay whose programs are in the lower layer, so that a change copies them up.
func lowerRacePlace(t *testing.T) racePlace {
	t.Helper()
	dir := mountOverlay(t, func(lower string) {
		for use := range raceUses {
			for way := range contentWays {
				racePlace{dir: lower}.path(t, use, way)
			}
		}
	})
	return racePlace{"overlayfs, lower", dir + "/merged", true}
}

// racePlaces are the plainest, or all kinds of file systems but some where there is time.
func racePlaces(t *testing.T, but ...string) []racePlace {
	t.Helper()
	if short() {
		return []racePlace{{fs: "ext4", dir: tempDir(t, "/root")}, lowerRacePlace(t)}
	}
	places := []racePlace{lowerRacePlace(t)}
	for _, p := range contentPlaces(t, but...) {
		places = append(places, racePlace{fs: p.fs, dir: p.dir})
	}
	return places
}

// A file that is changed between its event and its hash is in the list as what ran: by that digest, or by a violation, and not by what it is
// now. What runs afterwards is in it by its own digest.
func TestNeverSilentContentRace(t *testing.T) {
	sample(t, "6.12")
	for _, mode := range []string{"agent", "kernel"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			for n, place := range racePlaces(t) {
				t.Run(place.fs, func(t *testing.T) {
					a := a.in(t)
					for use := range raceUses {
						var ways []int
						for way := range contentWays {
							if !short() || (n+use+way)%len(raceUses) == 0 {
								ways = append(ways, way)
							}
						}
						a.races(t, place, use, ways, mode == "kernel")
					}
				})
			}
			a.verifyNow("native")
		})
	}
}

// races changes files in some ways while the agent stands still, and looks what it makes of that. all: no violation will do.
func (a *agent) races(t *testing.T, place racePlace, use int, ways []int, all bool) {
	t.Helper()
	a.caughtUp()
	var wants []contentWant
	a.cmd.Process.Signal(syscall.SIGSTOP)
	for _, i := range ways {
		way, path := contentWays[i], place.path(t, use, i)
		want := way.want(t, path)
		want.way += ", " + raceUses[use]
		switch raceUses[use] {
		case raceMapped:
			want.is(t, path+way.first)
			release := mapped(t, path+way.first)
			way.change(t, path)
			release()
		case raceAgain:
			want.run(t, path+way.first)
			way.change(t, path)
			want.run(t, path+way.then)
		default:
			want.run(t, path+way.first)
			way.change(t, path)
		}
		wants = append(wants, want)
	}
	a.cmd.Process.Signal(syscall.SIGCONT)
	a.catchesUp()
	list := a.list("native")
	found := digestsOf(list)
	for _, want := range wants {
		want.check(t, list, all)
		if last := want.sums[len(want.sums)-1]; raceUses[use] == raceAgain && found[last] == 0 {
			t.Errorf("%s: what ran last, and is as it was then, %s, has no entry", want.way, last)
		}
	}
	if t.Failed() {
		for line := range strings.Lines(a.log.String()) {
			if strings.Contains(line, place.dir) {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
}

// What waits at a gate may be changed meanwhile: what then runs is in the list by its own digest, and a violation says that nobody waited for that.
func TestNeverSilentGateRace(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t, "--namespaces", "all", "--gate-timeout", "30s")
	places := racePlaces(t, "FUSE", "NFS") // which are not watched
	g := startGated(t, a, "exec")
	for n, place := range places {
		t.Run(place.fs, func(t *testing.T) {
			warm := place.path(t, 0, 0)
			g.runs(warm)
			for use, hold := range []string{"TPM", "agent"} {
				for i, way := range contentWays {
					if way.before != "" || short() && (i+n)%2 != use {
						continue
					}
					g.race(t, way, place.path(t, use+1, i), hold)
				}
			}
		})
	}
	a.verifyNow(g.ns)
}

// race changes a program while it waits for the list's TPM, or for the agent, which has not looked at it yet.
func (g *gated) race(t *testing.T, way contentWay, path, hold string) {
	t.Helper()
	want := way.want(t, path)
	want.is(t, path)
	opened, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0) // which is no reader
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(opened)
	stopped := map[string]*os.Process{"agent": g.cmd.Process, "TPM": g.tpmProcess()}[hold]
	time.Sleep(50 * time.Millisecond)
	stopped.Signal(syscall.SIGSTOP)
	cmd := g.command(path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.waitsFor("it waits", func() bool {
		return heldUp(t, cmd.Process.Pid) && (hold == "agent" || digestsOf(g.list(g.ns))[want.sums[0]] > 0)
	})
	if way.name == "mount over" {
		sh(t, fmt.Sprintf("(cat %[1]s; printf over) >%[1]s.over; chmod 755 %[1]s.over", path))
		g.within(t, func() error { return unix.Mount(path+".over", path, "", unix.MS_BIND, "") })
	} else {
		way.change(t, path)
	}
	stopped.Signal(syscall.SIGCONT)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%s: %v", path, err)
	}
	asked := want.sums[0]
	want.way, want.sums = way.name+", held up by the "+hold, nil
	want.is(t, fmt.Sprintf("/proc/self/fd/%d", opened))
	ran := want.sums[0]
	list := g.list(g.ns)
	_, violations := names(list)
	if digestsOf(list)[ran] == 0 {
		t.Errorf("%s: %s ran as %s, which has no entry; violations %v", want.way, path, ran, violations)
	}
	if hold == "TPM" && asked != ran {
		if violations[path] == 0 {
			t.Errorf("%s: %s was asked about as %s, ran as %s, and no violation names it", want.way, path, asked, ran)
		}
		list = slices.DeleteFunc(list, func(e *imalog.Entry) bool { return e.FileDigest().String() == asked })
	}
	want.check(t, list, true)
}

// heldUp reports whether a command of gated waits in its exec.
func heldUp(t *testing.T, pid int) bool {
	t.Helper()
	return strings.HasPrefix(readFile(t, fmt.Sprintf("/proc/%d/syscall", pid)), fmt.Sprint(unix.SYS_EXECVE, " ")) &&
		readFile(t, fmt.Sprintf("/proc/%d/comm", pid)) == "nsenter"
}

// within calls a function in the namespace, which takes no program.
func (g *gated) within(t *testing.T, call func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", g.pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Unshare(unix.CLONE_FS)
		}
		if err == nil {
			err = unix.Setns(ns, unix.CLONE_NEWNS)
		}
		if err == nil {
			err = call()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// tpmProcess is that of its vTPM.
func (g *gated) tpmProcess() *os.Process {
	g.t.Helper()
	pid, err := strconv.Atoi(g.tpm)
	if err != nil {
		g.t.Fatal(err)
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		g.t.Fatal(err)
	}
	return p
}

// digestsOf counts a list's entries by their files' digests.
func digestsOf(list []*imalog.Entry) map[string]int {
	found := map[string]int{}
	for _, e := range list {
		if !e.Violation() {
			found[e.FileDigest().String()]++
		}
	}
	return found
}
