package vtpm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

func config(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	return Config{Program: "swtpm", Dir: filepath.Join(dir, "tpm"), Socket: filepath.Join(dir, "s")}
}

func start(t *testing.T, c Config) *Instance {
	t.Helper()
	i, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// pcr extends PCR 10 by a digest of the given byte, unless it is 0, and returns the register's value.
func pcr(t *testing.T, address string, b byte) ima.Digest {
	t.Helper()
	tpm, err := tpmext.Open(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	if b != 0 {
		var digests []ima.Digest
		for _, bank := range tpm.Banks() {
			d, err := ima.NewDigest(bank, bytes.Repeat([]byte{b}, bank.Size()))
			if err != nil {
				t.Fatal(err)
			}
			digests = append(digests, d)
		}
		if err := tpm.Extend(t.Context(), 10, digests); err != nil {
			t.Fatal(err)
		}
	}
	values, err := tpm.ReadPCR(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	return values[ima.SHA256]
}

func TestInstanceIsAdoptedWithItsPCR(t *testing.T) {
	c := config(t)
	first := start(t, c)
	want := pcr(t, first.Address(), 1)
	first.Close()
	i, err := Adopt(c)
	if err != nil {
		t.Fatal(err)
	}
	if got := pcr(t, i.Address(), 0); got != want || got.IsZero() {
		t.Errorf("PCR 10 is %v after adoption, was %v", got, want)
	}
	if err := i.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if err := Remove(c); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
}

// The folder of the sockets may be gone, or be another, when the next agent comes; without one the socket is in the instance's folder.
func TestInstanceIsAdoptedAtAnotherSocket(t *testing.T) {
	c := config(t)
	first := start(t, c)
	want := pcr(t, first.Address(), 1)
	first.Close()
	if err := errors.Join(os.Remove(c.Socket), os.Remove(c.Socket+controlSuffix)); err != nil {
		t.Fatal(err)
	}
	for _, socket := range []string{"", filepath.Join(t.TempDir(), "run", "s")} {
		c.Socket = socket
		i, err := Adopt(c)
		if err != nil {
			t.Fatal(err)
		}
		if got := pcr(t, i.Address(), 0); got != want {
			t.Errorf("PCR 10 is %v at %s, was %v", got, i.Address(), want)
		}
		if socket == "" {
			i.Close()
		} else if err := i.Stop(); err != nil {
			t.Error(err)
		}
	}
}

func TestDeadInstanceIsLostNotReplaced(t *testing.T) {
	c := config(t)
	i := start(t, c)
	if err := syscall.Kill(i.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); i.Running() && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if i.Running() {
		t.Error("still running after a kill")
	}
	i.Close()
	if _, err := Adopt(c); !errors.Is(err, ErrLost) {
		t.Errorf("Adopt: %v, want ErrLost", err)
	}
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "in use before") {
		t.Errorf("Start in a used folder: %v", err)
	}
}

func TestAdoptNothing(t *testing.T) {
	if _, err := Adopt(config(t)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Adopt: %v, want os.ErrNotExist", err)
	}
}

func TestAdoptRefusesAnotherProcess(t *testing.T) {
	c := config(t)
	i := start(t, c)
	defer i.Stop()
	path := filepath.Join(c.Dir, recordName)
	if err := os.WriteFile(path, []byte(`{"pid":1,"start":"12345"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt(c); !errors.Is(err, ErrLost) {
		t.Errorf("Adopt of another process: %v, want ErrLost", err)
	}
}

// A record that can't be read is not the same as none, or as one of an instance that ended.
func TestBrokenRecord(t *testing.T) {
	c := config(t)
	i := start(t, c)
	defer i.Stop()
	if err := os.WriteFile(filepath.Join(c.Dir, recordName), []byte(`{"pid":`), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Restart = true
	_, adoptErr := Adopt(c)
	_, startErr := Start(t.Context(), c)
	for _, err := range []error{adoptErr, startErr} {
		if err == nil || errors.Is(err, ErrLost) || errors.Is(err, os.ErrNotExist) {
			t.Errorf("a broken record: %v", err)
		}
	}
	if !i.Running() {
		t.Error("the instance was ended")
	}
}

// An instance whose device has no node here runs: it is neither lost nor was it never started.
func TestDeviceWithoutNodeIsNeitherLostNorNew(t *testing.T) {
	c := config(t)
	i := start(t, c)
	defer i.Stop()
	r, err := readRecord(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	r.Device = &Device{TPM: Node{Path: filepath.Join(t.TempDir(), "tpm7"), Major: 10, Minor: 7}}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.Dir, recordName), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt(c); err == nil || errors.Is(err, ErrLost) || errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "mknod") {
		t.Errorf("Adopt: %v", err)
	}
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "in use before") || !i.Running() {
		t.Errorf("Start: %v; the instance runs: %v", err, i.Running())
	}
}

// An agent that was killed between starting swtpm and recording it: the next Start ends that one and has a new one serve.
func TestUnrecordedInstanceIsEnded(t *testing.T) {
	c := config(t)
	orphan := start(t, c)
	pcr(t, orphan.Address(), 1)
	if err := os.Remove(filepath.Join(c.Dir, recordName)); err != nil {
		t.Fatal(err)
	}
	i := start(t, c)
	defer i.Stop()
	if orphan.Running() || !i.Running() {
		t.Errorf("the first runs: %v, the second: %v", orphan.Running(), i.Running())
	}
	orphan.Close()
	if got := pcr(t, i.Address(), 0); !got.IsZero() {
		t.Errorf("PCR 10 of a new instance is %v", got)
	}
}

func TestEndUnrecorded(t *testing.T) {
	c, other := config(t), config(t)
	i, bystander := start(t, c), start(t, other)
	defer i.Close()
	defer bystander.Stop()
	if err := EndUnrecorded(t.Context(), c); err != nil || i.Running() || !bystander.Running() {
		t.Errorf("%v; it runs: %v; another folder's: %v", err, i.Running(), bystander.Running())
	}
	if err := EndUnrecorded(t.Context(), config(t)); err != nil {
		t.Errorf("where there is no folder: %v", err)
	}
}

// What was removed with its record is ended; what is there, and what is elsewhere, goes on.
func TestEndRemoved(t *testing.T) {
	c, other := config(t), config(t)
	beside := c
	beside.Dir, beside.Socket = filepath.Join(filepath.Dir(c.Dir), "beside"), c.Socket+"2"
	removed, there, elsewhere := start(t, c), start(t, beside), start(t, other)
	defer removed.Close()
	defer there.Stop()
	defer elsewhere.Stop()
	for _, dir := range []string{c.Dir, other.Dir} {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(c.Dir), link); err != nil {
		t.Fatal(err)
	}
	if n, err := EndRemoved(link); n != 1 || err != nil {
		t.Errorf("%d ended, %v", n, err)
	}
	if removed.Running() || !there.Running() || !elsewhere.Running() {
		t.Errorf("the removed one runs: %v, one beside it: %v, one elsewhere: %v", removed.Running(), there.Running(), elsewhere.Running())
	}
}

// locked makes a folder that is in use.
func locked(t *testing.T) (Config, *os.File) {
	t.Helper()
	c := config(t)
	if err := os.Mkdir(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := takeOver(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return c, lock
}

// An agent that was killed between the fork and what that then executes: the process has the lock, and does not look like swtpm yet.
func TestEndUnrecordedWhileItStarts(t *testing.T) {
	c, lock := locked(t)
	late := exec.Command("sh", "-c", "sleep 0.3 3<&-; exec tail -qf /dev/null "+stateOption)
	late.ExtraFiles = []*os.File{lock}
	if err := errors.Join(late.Start(), lock.Close()); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- late.Wait() }()
	if err := EndUnrecorded(t.Context(), c); err != nil {
		t.Errorf("EndUnrecorded: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(time.Second):
		t.Error("it runs")
		late.Process.Kill()
	}
}

// The lock is the folder's, whoever has it.
func TestFolderInUse(t *testing.T) {
	c, lock := locked(t)
	defer lock.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Start(ctx, c); err == nil || !strings.Contains(err.Error(), "is in use") {
		t.Errorf("Start in a folder that is locked: %v", err)
	}
}

// A failed Start leaves a folder that can be tried again, and nothing that runs.
func TestFailedStartCanBeRepeated(t *testing.T) {
	c := config(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Start(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Start: %v", err)
	}
	if _, err := Adopt(c); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Adopt after a failed Start: %v, want os.ErrNotExist", err)
	}
	i := start(t, c)
	if err := i.Stop(); err != nil {
		t.Error(err)
	}
}

func TestStartTellsWhatIsWrong(t *testing.T) {
	c := config(t)
	c.Program = "swtpm-that-is-not-there"
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "install the package swtpm") {
		t.Errorf("no program: %v", err)
	}
	c = config(t)
	c.Program = "false"
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "swtpm ended") {
		t.Errorf("a program that ends: %v", err)
	}
	c.Socket = "/" + strings.Repeat("x", 107)
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "--run-dir") {
		t.Errorf("a long socket path: %v", err)
	}
}
