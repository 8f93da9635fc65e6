//go:build vm

package guest

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// serves mounts a folder through FUSE in the namespace. The kernel keeps what it knows of names for some seconds.
func (g *gated) serves(behind, at, seconds string) *exec.Cmd {
	g.t.Helper()
	sh(g.t, "mkdir -p "+behind+" "+at)
	server := g.command("loopback", behind, at, seconds)
	if err := server.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		server.Process.Kill()
		server.Wait()
	})
	g.waitsFor("it is mounted", func() bool { return g.command("mountpoint", "-q", at).Run() == nil })
	return server
}

// begins starts a command that is ended with the test.
func (g *gated) begins(cmd *exec.Cmd) {
	g.t.Helper()
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
}

// neverOpen checks that the guard did not take the agent for hanging.
func (g *gated) neverOpen() {
	g.t.Helper()
	if log := g.log.String(); strings.Contains(log, "the gates were open") {
		g.t.Errorf("the gates were open: %s", tail(log, 2000))
	}
}

// Who sees the machine below a file system that he lets hang, and runs a file that he has open, holds up nobody else: his path can't be found.
func TestNeverSilentHangsInItsRoot(t *testing.T) {
	sample(t, "6.1")
	a := startAgent(t, "--namespaces", "all", "--gate-timeout", "10s")
	g, other := startGated(t, a, "exec"), startGated(t, a, "exec")
	server := g.serves(g.dir+"/behind", g.dir+"/hanging", "1")
	program := g.dir + "/program" // a script would need its interpreter in there
	sh(t, "cp /bin/busybox "+program)
	const line = `open F, "<", $ARGV[0] or die; chroot $ARGV[1] or die; chdir "/" or die; $| = 1; print "in\n"; <STDIN>; ` +
		`my ($e, $a) = ("", pack("P", "busybox") . pack("P", "true") . pack("Q", 0)); syscall(322, fileno(F), $e, $a, 0, 0x1000); die $!` // execveat
	cmd := g.command("perl", "-e", line, program, g.dir+"/hanging")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "in\n" {
		t.Fatalf("%q, %v", said, err)
	}
	server.Process.Signal(syscall.SIGSTOP)
	time.Sleep(2 * time.Second)
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	g.waitsFor("the look hangs", func() bool { return strings.Contains(g.log.String(), "looking at the file hangs") })
	g.waits("meanwhile")
	other.waits("elsewhere")
	g.neverOpen()
	server.Process.Signal(syscall.SIGCONT) // another security module may look the path up, too
	if err := cmd.Wait(); err != nil {
		t.Errorf("what was not looked at: %v", err)
	}
	g.caughtUp()
	if n := len(g.violations()); n == 0 {
		t.Error("no violation tells of it")
	}
	g.verifyNow(g.ns)
}

// An overlay whose layer hangs when a file of it is opened, or read, holds up nobody else, the guard least of all.
func TestNeverSilentHangsInALayer(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t, "--namespaces", "all", "--gate-timeout", "10s")
	g, other := startGated(t, a, "exec"), startGated(t, a, "exec")
	sh(t, "mkdir -p "+g.dir+"/behind "+g.dir+"/upper "+g.dir+"/work "+g.dir+"/merged")
	for i := range 3 {
		makeProgram(t, g.dir+"/behind/p"+string(rune('0'+i)))
	}
	server := g.serves(g.dir+"/behind", g.dir+"/hanging", "3600")
	g.runs("mount", "-t", "overlay", "-o", "lowerdir="+g.dir+"/hanging,upperdir="+g.dir+"/upper,workdir="+g.dir+"/work", "overlay", g.dir+"/merged")
	g.cli("ns", "gate", g.ns, "all") // which looks at the mounts anew
	g.cli("ns", "gate", g.ns, "exec")
	g.runs("/bin/sh", "-c", "ls -l "+g.dir+"/merged/p*")
	server.Process.Signal(syscall.SIGSTOP)
	for i := range 3 {
		g.begins(g.command(g.dir + "/merged/p" + string(rune('0'+i))))
	}
	time.Sleep(3 * time.Second)
	g.waits("meanwhile")
	other.waits("elsewhere")
	g.neverOpen()
	server.Process.Signal(syscall.SIGCONT)
	g.waitsFor("all have run", func() bool {
		g.caughtUp()
		measured, _ := names(g.list(g.ns))
		return measured[g.dir+"/merged/p0"] == 1 && measured[g.dir+"/merged/p1"] == 1 && measured[g.dir+"/merged/p2"] == 1
	})
	g.verifyNow(g.ns)
}

// A file that it would take hours to hash is a violation, and others do not wait for hours. What ran at a gate meanwhile ran unmeasured, and the list
// says so.
func TestNeverSilentEndlessFile(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all", "--gate-timeout", "8s")
	g := startGated(t, a, "exec")
	g.runs("/bin/sh", "-c", ":")
	endless := tempDir(t, "/root") + "/endless"
	if err := os.WriteFile(endless, []byte(endless), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(endless, 4<<40); err != nil {
		t.Fatal(err)
	}
	a.caughtUp()
	began := time.Now()
	mapExecutableLater(t, endless)
	time.Sleep(time.Second)
	path, ran := g.script("meanwhile")
	g.runs(path)
	if !exists(ran) {
		t.Errorf("%s did not run", path)
	}
	a.catchesUp()
	if took := time.Since(began); took > 3*time.Minute {
		t.Errorf("the list was behind for %v", took)
	}
	if measured, violations := names(a.list("native")); measured[endless] != 0 || violations[endless] != 1 {
		t.Errorf("%d entries, %d violations of what can't be hashed", measured[endless], violations[endless])
	}
	measured, violations := names(g.list(g.ns))
	if measured[path] != 1 || violations[path] == 0 {
		t.Errorf("what ran meanwhile: %d entries, %d violations; all: %v", measured[path], violations[path], violations)
	}
	g.neverOpen()
	a.verifyNow("native")
	a.verifyNow(g.ns)
}
