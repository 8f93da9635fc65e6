package vtpm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/proc"
	"imans.dev/imans-agent/internal/tpmext"
)

// Names in Config.Dir.
const (
	recordName = "process.json"
	lockName   = "lock" // locked by the process as long as it lives, by a descriptor that it inherits
	logName    = "swtpm.log"
	stateName  = "state"
	socketName = "s" // in the folder state; the control channel is beside it
)

// Descriptors that swtpm starts with, in the order of exec.Cmd.ExtraFiles.
const (
	lockFD  = 3
	stateFD = 4
	nextFD  = 5 // that of the password, if there is one; then the device's server end
)

// stateOption is the argument that says where swtpm keeps its state.
var stateOption = fmt.Sprintf("dir=/proc/self/fd/%d,mode=0600", stateFD)

// process is a swtpm that was started and nobody uses yet.
type process struct {
	config Config
	cmd    *exec.Cmd
	exited chan struct{} // closed when it has ended
	device *newDevice    // nil: by socket
}

// run starts swtpm in a locked folder. vtpmx is nil, or makes the device that swtpm serves. The lock is the process's from now on.
func run(c Config, lock, vtpmx *os.File) (*process, error) {
	credential, err := c.credential()
	if err != nil {
		return nil, err
	}
	state, err := openState(c, credential)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	log, err := os.OpenFile(filepath.Join(c.Dir, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{config: c, cmd: exec.Command(c.Program, arguments(c)...), exited: make(chan struct{})}
	p.cmd.Args[0] += ":" + c.name()
	p.cmd.ExtraFiles = []*os.File{lock, state}
	if c.Password != "" {
		password, err := passwordPipe(c.Password)
		if err != nil {
			return nil, err
		}
		defer password.Close()
		p.cmd.ExtraFiles = append(p.cmd.ExtraFiles, password)
	}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env, p.cmd.Dir = []string{}, "/"
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: credential}
	if vtpmx != nil {
		if p.device, err = makeDevice(vtpmx, c.Version); err != nil {
			return nil, err
		}
		defer p.device.server.Close()
		p.cmd.ExtraFiles = append(p.cmd.ExtraFiles, p.device.server)
	}
	if err := startWithoutPrivileges(p.cmd); errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w; let every user execute it and read its libraries, and run with CAP_SETUID and CAP_SETGID, or give --swtpm-user root", err)
	} else if err != nil {
		return nil, fmt.Errorf("%w; install the package swtpm, or run with --ns-tpm none (the native list: --tpm none)", err)
	}
	if p.device != nil {
		p.hurry(-20)
	} else {
		p.hurry(0)
	}
	go func() { // ends with the process; without it a dead instance would stay a zombie
		p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// hurry sets how soon the process is run among others, from -20 to 19, the latest. The driver gives swtpm 750 ms for some answers until it
// has registered the device, and minutes later. 0 is as any program, whatever the agent itself is: who floods a TPM gets no more time than
// others. It is without effect where the agent may not do that (CAP_SYS_NICE).
func (p *process) hurry(nice int) {
	unix.Setpriority(unix.PRIO_PROCESS, p.cmd.Process.Pid, nice)
}

// name is what tells the process from others in the output of ps: nothing else of its arguments does.
func (c Config) name() string {
	if c.Proxy || c.Socket == "" {
		return c.Dir
	}
	return c.Socket
}

func arguments(c Config) []string {
	way := []string{"socket",
		"--server", fmt.Sprintf("type=unixio,path=/proc/self/fd/%d/%s,mode=0600", stateFD, socketName),
		"--ctrl", fmt.Sprintf("type=unixio,path=/proc/self/fd/%d/%s,mode=0600", stateFD, socketName+controlSuffix)}
	if c.Proxy {
		// The driver asks for locality 0 by a command that swtpm wants to be told to accept; it takes none of that kind from programs.
		proxyFD := nextFD
		if c.Password != "" {
			proxyFD++
		}
		way = []string{"chardev", "--fd", fmt.Sprint(proxyFD), "--locality", "allow-set-locality"}
	}
	if c.Password != "" {
		way = append(way, "--key", fmt.Sprintf("pwdfd=%d,mode=aes-256-cbc,kdf=pbkdf2", nextFD))
	}
	if c.Version == TPM20 {
		way = append(way, "--tpm2")
	}
	return append(way, "--tpmstate", stateOption, "--flags", "not-need-init,startup-clear")
}

// passwordMax is what fits into a pipe that nobody reads yet.
const passwordMax = 4096

// passwordPipe returns where swtpm reads a password, which no argument or environment shows.
func passwordPipe(password string) (*os.File, error) {
	if len(password) > passwordMax {
		return nil, fmt.Errorf("the password has %d bytes, at most %d work", len(password), passwordMax)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_, err = w.WriteString(password)
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// startWithoutPrivileges starts a command that has no capabilities, whatever its user, and can gain no privileges by what it executes.
func startWithoutPrivileges(cmd *exec.Cmd) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which can't be set back, ends with the goroutine
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = dropBounding()
		}
		if err == nil {
			err = cmd.Start()
		}
		result <- err
	}()
	return <-result
}

// dropBounding leaves no capability to what this thread executes, not even as root. An agent without CAP_SETPCAP can't: then root's swtpm has what
// the agent was bounded to.
func dropBounding() error {
	for capability := uintptr(0); ; capability++ {
		switch err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPERM): // beyond the last one
			return nil
		case err != nil:
			return fmt.Errorf("take capabilities away: %w", err)
		}
	}
}

// serve waits until the process answers, closes its platform hierarchy and records it.
func (p *process) serve(ctx context.Context) (*Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	i := &Instance{config: p.config, pid: p.cmd.Process.Pid}
	if p.device != nil {
		device, id, err := p.device.await(ctx, p)
		if err != nil {
			return nil, err
		}
		i.device, i.deviceID = &device, id
		p.hurry(0)
	}
	if p.config.Version == TPM20 {
		tpm, err := p.open(ctx, i.Address())
		if err != nil {
			return nil, err
		}
		err = tpm.ClosePlatform(ctx)
		if err = errors.Join(err, tpm.Close()); err != nil {
			return nil, err
		}
	}
	pidfd, err := unix.PidfdOpen(i.pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", i.pid, err)
	}
	i.pidfd = pidfd
	fault.VTPMServing.Pass()
	if err := i.writeRecord(); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	fault.VTPMRecorded.Pass()
	return i, nil
}

// open waits until the process answers at an address.
func (p *process) open(ctx context.Context, address string) (*tpmext.TPM, error) {
	for {
		tpm, err := tpmext.Open(ctx, address)
		if err == nil || !errors.Is(err, tpmext.ErrUnavailable) {
			return tpm, err
		}
		if err := p.pause(ctx); err != nil {
			return nil, fmt.Errorf("await an answer at %s: %w", address, err)
		}
	}
}

// pause waits a moment for the process to go on; it fails if it has ended or the time is up.
func (p *process) pause(ctx context.Context) error {
	select {
	case <-p.exited:
		if p.device != nil && p.cmd.ProcessState.Success() { // so swtpm ends when its client goes
			return errDriverGaveUp
		}
		log := filepath.Join(p.config.Dir, logName)
		return fmt.Errorf("swtpm ended: %s; its messages are in %s", lastLine(log), log)
	case <-ctx.Done():
		return fmt.Errorf("swtpm does not answer: %w", ctx.Err())
	case <-time.After(2 * time.Millisecond):
		return nil
	}
}

// kill ends the process, which nobody uses.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.exited
	removeSockets(p.config)
}

// shutdown has the TPM save what it keeps in memory of its NV storage (counters and indexes that are orderly), which swtpm before
// 0.8 does not do by itself. It waits no longer than shutdownPatience: one that hangs, or that is busy with another's connection,
// is ended without. A TPM 1.2 has nothing of that kind.
func (i *Instance) shutdown() {
	if i.config.Version != TPM20 {
		return
	}
	done := make(chan struct{})
	ctx, cancel := context.WithTimeout(context.Background(), shutdownPatience)
	defer cancel()
	go func() { // ends at the latest with the process
		defer close(done)
		tpm, err := tpmext.Open(ctx, i.Address())
		if err != nil {
			return
		}
		defer tpm.Close()
		tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(tpm) // what can't be saved is not to be had any more
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// record is what process.json holds.
type record struct {
	PID      int     `json:"pid"`
	Start    string  `json:"start"` // field 22 of /proc/PID/stat: with the pid it names the process for good
	Version  string  `json:"version,omitempty"`
	Device   *Device `json:"device,omitempty"`
	DeviceID uint64  `json:"device_id,omitempty"`
}

func (r record) version() Version {
	if r.Version == TPM12.String() {
		return TPM12
	}
	return TPM20
}

// writeRecord is the commit point: before it a crash leaves a process that nobody has used, which the next Start ends; after it Adopt
// finds the instance. A restarted one's folder names the lost one until then.
func (i *Instance) writeRecord() error {
	start, err := startTime(i.pid)
	if err != nil {
		return err
	}
	b, err := json.Marshal(record{PID: i.pid, Start: start, Version: i.config.Version.String(), Device: i.device, DeviceID: i.deviceID})
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(i.config.Dir, recordName), b)
}

func readRecord(dir string) (record, error) {
	var r record
	b, err := os.ReadFile(filepath.Join(dir, recordName))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
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
