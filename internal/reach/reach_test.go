package reach

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/tpmshare"
	"imans.dev/imans-agent/internal/vtpm"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		need.Skip(t, "a network namespace needs root")
	}
}

// start runs a vTPM by socket.
func start(t *testing.T) *vtpm.Instance {
	t.Helper()
	i, err := vtpm.Start(t.Context(), vtpm.Config{Program: need.Program(t, "swtpm"), Dir: filepath.Join(t.TempDir(), "tpm")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Stop() })
	return i
}

// inside is a process with a network and a mount namespace of its own.
func inside(t *testing.T) Process {
	t.Helper()
	cmd := exec.Command(need.Program(t, "unshare"), "--net", "--mount", "sh", "-c", "echo; exec sleep 600")
	var out bytes.Buffer
	cmd.Stderr = &out
	ready, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		t.Fatalf("make a network namespace: %v %s", err, &out)
	}
	inum, err := MountNS(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return Process{cmd.Process.Pid, inum}
}

// asks sends TPM2_GetRandom from the process's network namespace, and reports whether a TPM answered.
func (p Process) asks(t *testing.T) bool {
	t.Helper()
	const line = `exec 3<>/dev/tcp/127.0.0.1/2321 && printf '\x80\x01\x00\x00\x00\x0c\x00\x00\x01\x7b\x00\x08' >&3 && head -c 10 <&3 | od -An -tx1`
	out, err := exec.Command("nsenter", "--target", strconv.Itoa(p.PID), "--net", "bash", "-c", line).CombinedOutput()
	return err == nil && strings.Join(strings.Fields(string(out)), "") == "80010000001400000000"
}

// A container's programs reach the TPM while it is open, and the agent all the time.
func TestServe(t *testing.T) {
	needRoot(t)
	w, i, p := New(zap.NewNop()), start(t), inside(t)
	tpm, share, err := w.Open(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	if p.asks(t) {
		t.Error("a TPM answers before it is served")
	}
	other := p
	other.Inum++
	if err := w.Serve(t.Context(), i.Dir(), other, 10); err == nil || !strings.Contains(err.Error(), "now, not in") {
		t.Errorf("serve a process of another namespace: %v", err)
	}
	for range 2 { // the second time nothing is done
		if err := w.Serve(t.Context(), i.Dir(), p, 10); err != nil {
			t.Fatal(err)
		}
	}
	if !p.asks(t) {
		t.Error("no answer")
	}
	if _, err := tpm.ReadPCR(t.Context(), 10); err != nil {
		t.Error(err)
	}
	if err := errors.Join(tpm.Close(), share.Close(), share.Close()); err != nil {
		t.Error(err)
	}
	if p.asks(t) {
		t.Error("an answer after Close")
	}
	if err := w.Serve(t.Context(), i.Dir(), p, 10); err != nil {
		t.Errorf("serve one that is not open: %v", err)
	}
	tpm, share, err = w.Open(t.Context(), i) // nobody is connected any more
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tpm.Close(), share.Close()); err != nil {
		t.Error(err)
	}
}

func TestServeRefuses(t *testing.T) {
	needRoot(t)
	w, i := New(zap.NewNop()), start(t)
	tpm, share, err := w.Open(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	inum, err := MountNS(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Serve(t.Context(), i.Dir(), Process{os.Getpid(), inum}, 10); !errors.Is(err, tpmshare.ErrHostNetwork) {
		t.Errorf("serve the agent's own network: %v", err)
	}
	if err := errors.Join(tpm.Close(), share.Close()); err != nil {
		t.Error(err)
	}
}

// A TPM that hangs holds nobody up who ends its sharing.
func TestCloseOfAHungTPM(t *testing.T) {
	needRoot(t)
	w, i, p := New(zap.NewNop()), start(t), inside(t)
	tpm, share, err := w.Open(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Serve(t.Context(), i.Dir(), p, 10); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(i.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	asked := make(chan bool, 1)
	go func() { asked <- p.asks(t) }()
	time.Sleep(200 * time.Millisecond)
	done := make(chan error, 1)
	go func() { done <- errors.Join(tpm.Close(), share.Close()) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Close waits for a TPM that hangs")
	}
	if <-asked {
		t.Error("a TPM that hangs answers")
	}
}
