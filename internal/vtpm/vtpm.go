// Package vtpm runs swtpm instances: the TPM of each namespace but the native one.
//
// An agent calls OpenAuthority and OpenPool once and has Pool.Run at work; for each TPM Pool.Take (or Provision, or neither: the TPM
// has no identity then) and Start, or Adopt if there is one; at the end Stop and Remove.
//
// Start makes an instance, Adopt finds one that an earlier agent started: an instance survives the agent, because its PCRs live
// in its memory only. Stop ends it, Remove deletes what it kept. An instance that died has lost its PCRs; Adopt then returns
// ErrLost, and nothing here starts another in its place (the list must say so first), unless Config.Restart asks for that: keys
// and NV storage are then as they were left, and the PCRs begin anew.
//
// An instance is reached by a Unix socket that only root may use, or is a device of the kernel's vTPM proxy driver (Config.Proxy).
// It has been started up (TPM2_Startup(CLEAR)) exactly once, and its platform hierarchy is closed, as a machine's firmware does it.
// A socket serves one connection at a time, /dev/tpmN one program, /dev/tpmrmN any number.
//
// Provision gives a folder its identity before the first start: endorsement key, certificate, attestation key. A Pool keeps such
// folders ready. What an identity is worth: it shows that an instance is the one that the agent recorded, never more than that,
// because the host's root can read an instance's keys.
//
// A folder holds process.json, lock, swtpm.log, identity.json and ek.der, which are root's, and state, which is the user's that
// swtpm runs as. swtpm gets the folder state by a descriptor: it can reach nothing else of it, whatever the modes of the parents.
// Unless Config.User says otherwise each process is a user of its own, by a number that it has as long as it runs: no instance can
// read, signal or trace another.
package vtpm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/tpmext"
)

// ErrLost means that an instance is not running any more: what its PCRs held is gone.
var ErrLost = errors.New("the vTPM is not running any more, its PCRs are lost")

// Version is which TPM an instance is.
type Version int

// TPM20 is the zero value. A TPM 1.2 is to be had as a proxy device only, and without identity.
const (
	TPM20 Version = iota
	TPM12
)

// String returns the version's number.
func (v Version) String() string {
	if v == TPM12 {
		return "1.2"
	}
	return "2.0"
}

// Config says where an instance lives, and what it is.
type Config struct {
	Program string  // swtpm's name or path
	Dir     string  // its folder; absolute
	Socket  string  // where its socket is to be found, unless Proxy; absolute, at most 102 bytes, the control channel is SOCKET.ctrl; or ""
	Proxy   bool    // the instance is a device of the kernel's vTPM proxy driver; Adopt does not ask, the folder tells
	Version Version // Adopt does not ask, the folder tells
	User    string  // name or number of the user that swtpm runs as; "": one that no other process has, or the agent's own if that is not root
	Restart bool    // Start uses a folder whose instance is lost
	// Password encrypts what the instance keeps (AES-256, the key by PBKDF2); "": not encrypted. Nothing here keeps it.
	Password string `json:"-"`
}

// Instance is one running swtpm.
type Instance struct {
	config   Config
	pidfd    int
	pid      int
	device   *Device // nil: by socket
	deviceID uint64  // tells the device from a later one of the same number
}

// controlSuffix is where the TCG software stack's swtpm interface (tpm2-tools -T swtpm:path=SOCKET) looks for the control channel.
const controlSuffix = ".ctrl"

// starting has a token of each instance that is being started. With more at once none would be there sooner, as each takes a processor; but
// each would answer the kernel later, which gives up on those that are late. Half of the processors are left to the kernel's side and to others.
var starting = make(chan struct{}, max(1, runtime.NumCPU()/2))

// turn is how long others wait for one that is being started, at most: it may hang.
const turn = 10 * time.Second

// startTimeout bounds how long a new instance may take until it answers: making its seeds takes a while on a slow machine.
const startTimeout = 60 * time.Second

// Start makes the folder, runs an instance in it and waits until it answers. It fails if one was started in that folder before:
// Adopt or Remove that, or set Config.Restart. Instances that are started at once take turns, one for every two processors. ErrNoProxy:
// Config.Proxy is set and the machine has no vTPM proxy; nothing was done.
func Start(ctx context.Context, c Config) (*Instance, error) {
	i, err := startServing(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("start vTPM: %w", err)
	}
	return i, nil
}

func startServing(ctx context.Context, c Config) (*Instance, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	var vtpmx *os.File
	if c.Proxy {
		var err error
		if vtpmx, err = openProxy(); err != nil {
			return nil, err
		}
		defer vtpmx.Close()
	}
	if err := durable.Mkdir(c.Dir); err != nil {
		return nil, err
	}
	if err := checkUnused(c); err != nil {
		return nil, err
	}
	lock, err := takeOver(ctx, c)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if !c.Proxy {
		if err := linkSockets(c); err != nil {
			return nil, err
		}
	}
	for gaveUp, hung := 0, 0; ; {
		i, err := startOnce(ctx, c, lock, vtpmx)
		switch {
		case errors.Is(err, errDriverGaveUp):
			gaveUp++
		case errors.Is(err, errNotRegistered):
			hung++
		default:
			return i, err
		}
		if gaveUp == gaveUpTries || hung == hungTries {
			return nil, err
		}
	}
}

// startOnce tries to start an instance when it is its turn.
func startOnce(ctx context.Context, c Config, lock, vtpmx *os.File) (*Instance, error) {
	select {
	case starting <- struct{}{}:
		end := sync.OnceFunc(func() { <-starting })
		defer end()
		defer time.AfterFunc(turn, end).Stop()
	case <-ctx.Done():
		return nil, fmt.Errorf("await the start of other vTPMs: %w", ctx.Err())
	}
	p, err := run(c, lock, vtpmx)
	if err != nil {
		return nil, err
	}
	fault.VTPMStarted.Pass()
	i, err := p.serve(ctx)
	if err != nil {
		p.kill()
		return nil, err
	}
	return i, nil
}

func (c Config) check() error {
	switch {
	case c.Version == TPM12 && !c.Proxy:
		return fmt.Errorf("version 1.2 is there as a proxy device only: %w", tpmext.ErrVersion)
	case !c.Proxy && len(c.Socket+controlSuffix) > 107:
		return fmt.Errorf("the socket path %s has %d bytes, at most 102 work; choose a shorter --run-dir", c.Socket, len(c.Socket))
	}
	return nil
}

// checkUnused keeps a lost TPM from being replaced without a word.
func checkUnused(c Config) error {
	i, err := Adopt(c)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case c.Restart && errors.Is(err, ErrLost):
		return nil
	case err == nil:
		err = fmt.Errorf("process %d serves it", i.PID())
		i.Close()
	}
	return fmt.Errorf("%s was in use before: %w; adopt or remove that one", c.Dir, err)
}

// Adopt finds the instance that was started in the folder. ErrLost: it is not running any more, or another process has its
// number. An error that is os.ErrNotExist: none was ever started there.
func Adopt(c Config) (*Instance, error) {
	r, err := readRecord(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("adopt vTPM in %s: %w", c.Dir, err)
	}
	c.Proxy, c.Version = r.Device != nil, r.version()
	i := &Instance{config: c, pid: r.PID, device: r.Device, deviceID: r.DeviceID}
	i.pidfd, err = unix.PidfdOpen(r.PID, 0)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL): // none, or a thread of another process
		return nil, fmt.Errorf("adopt vTPM in %s: %w", c.Dir, ErrLost)
	case err != nil:
		return nil, fmt.Errorf("adopt vTPM in %s: open process %d: %w", c.Dir, r.PID, err)
	}
	err = i.reach(r.Start)
	if errors.Is(err, os.ErrNotExist) {
		err = errors.New(err.Error()) // as it is, it would say that no instance was started
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("adopt vTPM in %s: %w", c.Dir, err), i.Close())
	}
	return i, nil
}

// reach makes sure that an adopted instance is the process that was recorded, serves its folder, and is where it is looked for. The
// instance's descriptor holds the process: its start time can't change any more.
func (i *Instance) reach(recorded string) error {
	start, err := startTime(i.pid)
	switch {
	case errors.Is(err, os.ErrProcessDone), errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
		return ErrLost
	case err != nil:
		return err
	case start != recorded:
		return ErrLost
	}
	found, err := look(i.pid, func(pid int) (bool, error) { return serves(pid, i.config) })
	switch {
	case err != nil:
		return err
	case !found:
		return ErrLost
	case i.device != nil:
		err = i.device.check()
		if err != nil && i.ended(stopPatience) {
			return ErrLost // it was ending: the kernel takes the device away before the process is gone
		}
		return err
	}
	return linkSockets(i.config) // the folder of the sockets need not have survived
}

// Address returns the instance's address for tpmext.Open.
func (i *Instance) Address() string {
	switch {
	case i.device == nil:
		return i.config.socketAddress()
	case i.config.Version == TPM12:
		return i.device.TPM.Path
	}
	return i.device.RM.Path
}

func (c Config) socketAddress() string {
	if c.Socket == "" {
		return "unix:" + filepath.Join(c.Dir, stateName, socketName)
	}
	return "unix:" + c.Socket
}

// Dir returns the instance's folder.
func (i *Instance) Dir() string { return i.config.Dir }

// PID returns the instance's process number.
func (i *Instance) PID() int { return i.pid }

// Device returns the instance's devices; false: it is reached by its socket.
func (i *Instance) Device() (Device, bool) {
	if i.device == nil {
		return Device{}, false
	}
	return *i.device, true
}

// Running reports whether the process is alive.
func (i *Instance) Running() bool {
	return unix.PidfdSendSignal(i.pidfd, 0, nil, 0) == nil && !i.ended(0)
}

func (i *Instance) ended(timeout time.Duration) bool { return endsWithin(i.pidfd, timeout) }

// endsWithin waits for the end of a process, by its descriptor.
func endsWithin(pidfd int, timeout time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(timeout); ; timeout = max(0, time.Until(deadline)) {
		n, err := unix.Poll(fds, int(timeout.Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

// Ended returns the instances whose process has ended, by one system call for all of them.
func Ended(all []*Instance) []*Instance {
	fds := make([]unix.PollFd, len(all))
	for n, i := range all {
		fds[n] = unix.PollFd{Fd: int32(i.pidfd), Events: unix.POLLIN}
	}
	if n, err := unix.Poll(fds, 0); err != nil || n == 0 {
		return nil // an interrupted look finds nothing; the next one does
	}
	var ended []*Instance
	for n, fd := range fds {
		if fd.Revents != 0 {
			ended = append(ended, all[n])
		}
	}
	return ended
}

// Close lets go of the instance without ending it.
func (i *Instance) Close() error { return unix.Close(i.pidfd) }

const (
	// shutdownPatience is how long an instance may take to save what it keeps in memory.
	shutdownPatience = time.Second
	// stopPatience is how long it may then take to end, before it is made to.
	stopPatience = 5 * time.Second
)

// Stop ends the instance, after TPM2_Shutdown(CLEAR) so that all of its NV storage is kept; its PCRs are gone, and its devices
// too when Stop returns. One that does not end by itself within five seconds is killed.
func (i *Instance) Stop() error {
	defer i.Close()
	defer removeSockets(i.config)
	i.shutdown()
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(i.pidfd, s, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("stop vTPM: %w", err)
		}
		if i.ended(stopPatience) {
			return i.awaitDeviceGone()
		}
	}
	return fmt.Errorf("stop vTPM: process %d does not end; look at its state in /proc/%d/stack", i.pid, i.pid)
}

// Remove deletes what an instance kept in its folder. Stop it first.
func Remove(c Config) error {
	removeSockets(c)
	if err := os.RemoveAll(c.Dir); err != nil {
		return fmt.Errorf("remove vTPM: %w", err)
	}
	return nil
}

// linkSockets makes the paths at which the sockets are to be found. The sockets themselves are in the folder that swtpm may write.
func linkSockets(c Config) error {
	if c.Socket == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(c.Socket), 0o700); err != nil {
		return err
	}
	removeSockets(c)
	if err := os.Symlink(filepath.Join(c.Dir, stateName, socketName), c.Socket); err != nil {
		return err
	}
	return os.Symlink(filepath.Join(c.Dir, stateName, socketName+controlSuffix), c.Socket+controlSuffix)
}

func removeSockets(c Config) {
	if c.Socket != "" {
		os.Remove(c.Socket)
		os.Remove(c.Socket + controlSuffix)
	}
}
