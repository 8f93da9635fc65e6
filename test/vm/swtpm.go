package vm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

const swtpmStart = 10 * time.Second

// hardwareTPM is the software TPM that the guest sees as its hardware one.
type hardwareTPM struct {
	socket string
	cmd    *exec.Cmd
	done   chan struct{}
}

// startTPM starts a new TPM with its state in dir (an absolute path). QEMU sends the power-on itself, so no start-up flag
// is given.
func startTPM(ctx context.Context, dir string) (*hardwareTPM, error) {
	t := &hardwareTPM{socket: filepath.Join(dir, "tpm.sock"), done: make(chan struct{})}
	state := filepath.Join(dir, "tpm")
	if err := os.Mkdir(state, 0o700); err != nil {
		return nil, fmt.Errorf("make the TPM's state folder: %w", err)
	}
	t.cmd = exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--ctrl", "type=unixio,path="+t.socket)
	tieToUs(t.cmd)
	var said bytes.Buffer
	t.cmd.Stdout, t.cmd.Stderr = &said, &said
	if err := t.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the hardware TPM: %w", err)
	}
	go func() {
		_ = t.cmd.Wait() // ends when QEMU does, or killed by stop
		close(t.done)
	}()
	for deadline := time.Now().Add(swtpmStart); ; {
		if _, err := os.Stat(t.socket); err == nil {
			return t, nil
		}
		select {
		case <-t.done:
			return nil, fmt.Errorf("start the hardware TPM: swtpm ended: %s", lastLines(said.String(), 5))
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.stop()
			return nil, fmt.Errorf("start the hardware TPM: no socket after %s", swtpmStart)
		}
	}
}

// stop kills the TPM and waits for its end.
func (t *hardwareTPM) stop() {
	_ = t.cmd.Cancel()
	<-t.done
}
