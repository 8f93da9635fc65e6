// Package tpmtest runs swtpm for tests. It is the only TPM double that tests may use: no answer of a TPM is made up.
package tpmtest

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// Swtpm is a running swtpm with a state folder of its own. It is killed at the end of the test.
type Swtpm struct {
	Dir    string // its working folder: state, sockets
	Socket string // path of the data socket
	tpm12  bool
	t      testing.TB
	cmd    *exec.Cmd
	output bytes.Buffer
	exited chan struct{}
}

// Start runs a new swtpm, started up by TPM2_Startup(CLEAR).
func Start(t testing.TB) *Swtpm {
	t.Helper()
	return StartFlags(t, "not-need-init,startup-clear")
}

// StartFlags is Start with other --flags, such as "not-need-init" for a TPM that nobody has started up.
func StartFlags(t testing.TB, flags string) *Swtpm {
	t.Helper()
	return start(t, false, flags)
}

// StartTPM12 is Start of a TPM 1.2.
func StartTPM12(t testing.TB) *Swtpm {
	t.Helper()
	return StartTPM12Flags(t, "not-need-init,startup-clear")
}

// StartTPM12Flags is StartFlags of a TPM 1.2.
func StartTPM12Flags(t testing.TB, flags string) *Swtpm {
	t.Helper()
	return start(t, true, flags)
}

func start(t testing.TB, tpm12 bool, flags string) *Swtpm {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Fatalf("%v; install the package swtpm", err)
	}
	dir := t.TempDir()
	s := &Swtpm{Dir: dir, Socket: filepath.Join(dir, "tpm"), tpm12: tpm12, t: t}
	s.Run(flags)
	t.Cleanup(s.Kill)
	return s
}

// Address returns the address for tpmext.Open.
func (s *Swtpm) Address() string { return "unix:" + s.Socket }

// Run starts swtpm on the state that an earlier one left, which Kill has ended.
func (s *Swtpm) Run(flags string) {
	s.t.Helper()
	os.Remove(s.Socket)
	// Relative paths: a socket's address has room for 107 bytes only, and test folders have long names.
	args := []string{"socket", "--tpmstate", "dir=" + s.Dir, "--server", "type=unixio,path=tpm",
		"--ctrl", "type=unixio,path=tpm.ctrl", "--flags", flags}
	if !s.tpm12 {
		args = append(args, "--tpm2")
	}
	s.cmd = exec.Command("swtpm", args...)
	s.cmd.Dir = s.Dir
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that panics leaves none behind
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	cmd, started, exited := s.cmd, make(chan error), make(chan struct{})
	s.exited = exited
	go func() {
		runtime.LockOSThread() // the signal comes when the thread ends, and Go ends threads
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(exited)
	}()
	if err := <-started; err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if s.accepts() {
			return
		}
		select {
		case <-exited:
			s.t.Fatalf("swtpm ended: %s", s.output.String())
		default:
		}
		if time.Now().After(deadline) {
			s.Kill()
			s.t.Fatalf("swtpm takes no connection: %s", s.output.String())
		}
	}
}

// accepts tries to connect; the socket is there a moment before it listens.
func (s *Swtpm) accepts() bool {
	dir, err := os.Open(s.Dir)
	if err != nil {
		s.t.Fatal(err)
	}
	defer dir.Close()
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/tpm", dir.Fd()))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// Kill ends swtpm at once, as a crash would: what its PCRs held is gone. A second Kill does nothing.
func (s *Swtpm) Kill() {
	s.cmd.Process.Kill()
	<-s.exited
}
