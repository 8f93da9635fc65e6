// Package vtpm runs swtpm instances: the TPM of each namespace but the native one.
//
// Start makes an instance, Adopt finds one that an earlier agent started: an instance survives the agent, because its PCRs live
// in its memory only. Stop ends it, Remove ends it and deletes what it kept. An instance that died has lost its PCRs; Adopt then
// returns ErrLost, and nothing here ever starts another in its place: the list must say so first.
//
// An instance listens on a Unix socket that only root may use, speaks the TPM's own protocol on it, and has been started up
// (TPM2_Startup(CLEAR)) exactly once, by itself. It serves one connection at a time.
package vtpm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/proc"
	"imans.dev/imans-agent/internal/tpmext"
)

// ErrLost means that an instance is not running any more: what its PCRs held is gone.
var ErrLost = errors.New("the vTPM is not running any more, its PCRs are lost")

// startTimeout bounds how long a new instance may take until it answers: making its seeds takes a while on a slow machine.
const startTimeout = 60 * time.Second

// Config says where an instance lives.
type Config struct {
	Program string // swtpm's name or path
	Dir     string // its state, log and process file; absolute
	Socket  string // its socket's path; absolute, at most 102 bytes; the control channel is SOCKET.ctrl
}

// Instance is one running swtpm.
type Instance struct {
	config Config
	pidfd  int
	pid    int
}

// processFile records which process serves a folder.
type processFile struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // field 22 of /proc/PID/stat: with the pid it names the process for good
}

const processFileName = "process.json"

// lockName is a file in Config.Dir that the process has locked as long as it lives, by a descriptor that it inherits.
const lockName = "lock"

// pidName is a file in Config.Dir that swtpm writes its process number to before it serves.
const pidName = "swtpm.pid"

// controlSuffix is where the TCG software stack's swtpm interface (tpm2-tools -T swtpm:path=SOCKET) looks for the control channel.
const controlSuffix = ".ctrl"

// Start makes the folder, runs an instance in it and waits until it answers. It fails if one was started in that folder before:
// Adopt or Remove that.
func Start(ctx context.Context, c Config) (*Instance, error) {
	if len(c.Socket+controlSuffix) > 107 {
		return nil, fmt.Errorf("start vTPM: the socket path %s has %d bytes, at most 102 work; choose a shorter --run-dir",
			c.Socket, len(c.Socket))
	}
	if err := durable.Mkdir(c.Dir); err != nil {
		return nil, fmt.Errorf("start vTPM: %w", err)
	}
	if _, err := os.Stat(filepath.Join(c.Dir, processFileName)); err == nil {
		return nil, fmt.Errorf("start vTPM: %s was in use before", c.Dir)
	}
	if err := os.MkdirAll(filepath.Dir(c.Socket), 0o700); err != nil {
		return nil, fmt.Errorf("start vTPM: %w", err)
	}
	lock, err := takeOver(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("start vTPM: %w", err)
	}
	defer lock.Close()
	removeSockets(c)
	log, err := os.OpenFile(filepath.Join(c.Dir, "swtpm.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start vTPM: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(c.Program, "socket", "--tpm2",
		"--tpmstate", stateOption(c),
		"--server", "type=unixio,path="+c.Socket+",mode=0600",
		"--ctrl", "type=unixio,path="+c.Socket+controlSuffix+",mode=0600",
		"--flags", "not-need-init,startup-clear",
		"--pid", "file="+filepath.Join(c.Dir, pidName))
	cmd.ExtraFiles = []*os.File{lock} // the lock is the process's from now on, and ends with it
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start vTPM: %w; install the package swtpm, or run with --ns-tpm none", err)
	}
	exited := make(chan struct{})
	go func() { // ends with the process; without it a dead instance would stay a zombie
		cmd.Wait()
		close(exited)
	}()
	i, err := open(c, cmd.Process.Pid)
	if err == nil {
		err = i.await(ctx, exited)
	}
	if err == nil {
		err = i.record()
	}
	if err != nil {
		cmd.Process.Kill()
		<-exited
		if i != nil {
			i.Close()
		}
		return nil, fmt.Errorf("start vTPM: %w", err)
	}
	return i, nil
}

func open(c Config, pid int) (*Instance, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &Instance{config: c, pidfd: fd, pid: pid}, nil
}

// record is the commit point: before it a crash leaves a process that nobody has used, which the next Start ends; after it Adopt
// finds the instance.
func (i *Instance) record() error {
	start, err := startTime(i.pid)
	if err != nil {
		return err
	}
	b, err := json.Marshal(processFile{PID: i.pid, Start: start})
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(i.config.Dir, processFileName), b)
}

// await waits until the instance answers, started up.
func (i *Instance) await(ctx context.Context, exited <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		tpm, err := tpmext.Open(ctx, i.Address())
		if err == nil {
			return tpm.Close()
		}
		if !errors.Is(err, tpmext.ErrUnavailable) {
			return err
		}
		select {
		case <-exited:
			return fmt.Errorf("swtpm ended: %s", lastLine(filepath.Join(i.config.Dir, "swtpm.log")))
		case <-ctx.Done():
			return fmt.Errorf("swtpm does not answer: %w", err)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// Adopt finds the instance that was started in the folder. ErrLost: it is not running any more, or another process has its
// number. An error that is os.ErrNotExist: none was ever started there.
func Adopt(c Config) (*Instance, error) {
	b, err := os.ReadFile(filepath.Join(c.Dir, processFileName))
	if err != nil {
		return nil, fmt.Errorf("adopt vTPM: %w", err)
	}
	var p processFile
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("adopt vTPM in %s: %w", c.Dir, err)
	}
	i, err := open(c, p.PID)
	if err != nil {
		return nil, fmt.Errorf("adopt vTPM in %s: %w", c.Dir, ErrLost)
	}
	// The descriptor holds the process; only now can its start time not change any more.
	if start, err := startTime(p.PID); err != nil || start != p.Start || !serves(p.PID, c) {
		i.Close()
		return nil, fmt.Errorf("adopt vTPM in %s: %w", c.Dir, ErrLost)
	}
	return i, nil
}

// Address returns the instance's address for tpmext.Open.
func (i *Instance) Address() string { return "unix:" + i.config.Socket }

// PID returns the instance's process number.
func (i *Instance) PID() int { return i.pid }

// Running reports whether the process is alive.
func (i *Instance) Running() bool {
	return unix.PidfdSendSignal(i.pidfd, 0, nil, 0) == nil && !i.ended(0)
}

func (i *Instance) ended(timeout time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(i.pidfd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(timeout); ; timeout = max(0, time.Until(deadline)) {
		n, err := unix.Poll(fds, int(timeout.Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

// Close lets go of the instance without ending it.
func (i *Instance) Close() error { return unix.Close(i.pidfd) }

// Stop ends the instance: its PCRs are gone. One that does not end by itself within five seconds is killed.
func (i *Instance) Stop() error {
	defer i.Close()
	defer removeSockets(i.config)
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(i.pidfd, s, nil, 0); errors.Is(err, unix.ESRCH) {
			return nil
		} else if err != nil {
			return fmt.Errorf("stop vTPM: %w", err)
		}
		if i.ended(5 * time.Second) {
			return nil
		}
	}
	return fmt.Errorf("stop vTPM: process %d does not end", i.pid)
}

// Remove deletes what an instance kept in its folder. Stop it first.
func Remove(c Config) error {
	removeSockets(c)
	if err := os.RemoveAll(c.Dir); err != nil {
		return fmt.Errorf("remove vTPM: %w", err)
	}
	return nil
}

func removeSockets(c Config) {
	os.Remove(c.Socket)
	os.Remove(c.Socket + controlSuffix)
}

func startTime(pid int) (string, error) {
	fields, err := proc.Stat(pid)
	if err != nil {
		return "", err
	}
	if state := fields[proc.StatState]; state == "Z" || state == "X" {
		return "", os.ErrProcessDone
	}
	return fields[proc.StatStart], nil
}

func lastLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}
