package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	defaultMemory = 3072 // MiB
	defaultLimit  = 10 * time.Minute
	outputPoll    = 50 * time.Millisecond
	consoleTail   = 80 // lines shown of a crashed machine
	runFolder     = ".vm"
	bootAttempts  = 3
	reasonPanic   = "the kernel panicked"
)

// errLimit is the cause of a context that ended because of Machine.Limit.
var errLimit = errors.New("time limit reached")

// Machine says how to boot an image and what to run on it. The zero value of a field means its default.
type Machine struct {
	// Command is run as root by bash, in /root.
	Command string
	// Environment is added to the command's environment, as "NAME=value".
	Environment []string
	// Append is added to the kernel's command line, such as "ima_policy=tcb".
	Append string
	// Payload is a folder shown read-only at /payload; empty means an empty one.
	Payload string
	// Share is a folder shown at /host; what the guest writes there stays. Empty means one that is removed afterwards.
	Share string
	// Disks are raw images, seen as /dev/vdb and on; changes to them stay.
	Disks []string
	// Icount lets the guest's clock count executed instructions, one nanosecond each: the same work takes the same time on
	// any host. It means TCG and one CPU.
	Icount bool
	// CPUs overrides the kernel's number.
	CPUs int
	// Memory is in MiB.
	Memory int
	// Limit is the longest time from power-on to power-off.
	Limit time.Duration
	// Output gets what the command prints, as it prints it.
	Output io.Writer
}

// Outcome is what a machine that powered off by itself left.
type Outcome struct {
	// Status is the command's exit status.
	Status int
	// Boot is the time from power-on to the command's start, Total that to power-off.
	Boot, Total time.Duration
}

// CrashError says that a machine did not come to its regular end.
type CrashError struct {
	Kernel string
	// Reason says what happened: a panic, a time limit, QEMU's own failure.
	Reason string
	// Console is the end of the guest's console.
	Console string
}

func (e *CrashError) Error() string {
	return fmt.Sprintf("kernel %s: %s; end of its console:\n%s", e.Kernel, e.Reason, e.Console)
}

// Run boots the image, runs the command and powers off. It returns an error only if there is no exit status to return: a
// *CrashError, or what kept the machine from starting. When ctx ends, QEMU and the TPM are killed.
//
// Under TCG with two CPUs a kernel now and then panics while it boots, in its own code patching, before anything of ours runs.
// Such a machine is booted again, and m.Output says so; a panic later than that is never forgiven.
func (img *Image) Run(ctx context.Context, m Machine) (Outcome, error) {
	for attempt := 1; ; attempt++ {
		out, err := img.runOnce(ctx, m)
		var crash *CrashError
		if attempt == bootAttempts || !errors.As(err, &crash) || out.Boot > 0 || crash.Reason != reasonPanic || haveKVM() {
			return out, err
		}
		if m.Output != nil {
			fmt.Fprintf(m.Output, "kernel %s panicked while booting under emulation; booting it again\n", img.Kernel.Name)
		}
	}
}

func (img *Image) runOnce(ctx context.Context, m Machine) (Outcome, error) {
	work, err := os.MkdirTemp("", "imans-vm-")
	if err != nil {
		return Outcome{}, fmt.Errorf("make the machine's folder: %w", err)
	}
	defer os.RemoveAll(work)
	if m.Limit == 0 {
		m.Limit = defaultLimit
	}
	if m.Output == nil {
		m.Output = io.Discard
	}
	if err := m.layOut(work); err != nil {
		return Outcome{}, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.Limit, errLimit)
	defer cancel()
	tpm, err := startTPM(ctx, work)
	if err != nil {
		return Outcome{}, err
	}
	defer tpm.stop()
	return img.power(ctx, m, work, tpm)
}

// layOut fills in the folders that were not chosen and writes the command where guest.sh looks for it.
func (m *Machine) layOut(work string) error {
	for _, dir := range []*string{&m.Payload, &m.Share} {
		if *dir == "" {
			made, err := os.MkdirTemp(work, "shared-")
			if err != nil {
				return fmt.Errorf("make a shared folder: %w", err)
			}
			*dir = made
		}
	}
	run := filepath.Join(m.Share, runFolder)
	if err := os.RemoveAll(run); err != nil {
		return fmt.Errorf("clear the share: %w", err)
	}
	if err := os.Mkdir(run, 0o755); err != nil {
		return fmt.Errorf("prepare the share: %w", err)
	}
	var env strings.Builder
	for _, v := range m.Environment {
		name, value, _ := strings.Cut(v, "=")
		fmt.Fprintf(&env, "export %s=%s\n", name, Quote(value))
	}
	for name, text := range map[string]string{"command": m.Command + "\n", "environment": env.String(), "output": ""} {
		if err := os.WriteFile(filepath.Join(run, name), []byte(text), 0o644); err != nil {
			return fmt.Errorf("prepare the share: %w", err)
		}
	}
	return nil
}

// power runs QEMU to its end while copying the command's output.
func (img *Image) power(ctx context.Context, m Machine, work string, tpm *hardwareTPM) (Outcome, error) {
	console := filepath.Join(work, "console")
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", img.arguments(m, console, tpm.socket)...)
	tieToUs(qemu)
	var said bytes.Buffer
	qemu.Stdout, qemu.Stderr = &said, &said
	start := time.Now()
	if err := qemu.Start(); err != nil {
		return Outcome{}, fmt.Errorf("start QEMU: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- qemu.Wait() }()
	boot, qemuErr := follow(m, start, ended)
	out := Outcome{Boot: boot, Total: time.Since(start)}

	status, err := os.ReadFile(filepath.Join(m.Share, runFolder, "status"))
	if err == nil {
		if out.Status, err = strconv.Atoi(strings.TrimSpace(string(status))); err == nil {
			return out, nil
		}
	}
	tail, _ := os.ReadFile(console)
	crash := &CrashError{Kernel: img.Kernel.Name, Console: lastLines(string(tail), consoleTail)}
	switch {
	case errors.Is(context.Cause(ctx), errLimit):
		crash.Reason = fmt.Sprintf("not done after %s", m.Limit)
	case ctx.Err() != nil:
		return out, context.Cause(ctx)
	case bytes.Contains(tail, []byte("Kernel panic")):
		crash.Reason = reasonPanic
	case qemuErr != nil:
		crash.Reason = fmt.Sprintf("QEMU: %v: %s", qemuErr, lastLines(said.String(), 5))
	default:
		crash.Reason = "powered off without an exit status"
	}
	return out, crash
}

// follow copies the command's output until QEMU ends, and returns the time that booting took (0 if it never came up).
func follow(m Machine, start time.Time, ended <-chan error) (boot time.Duration, err error) {
	up := filepath.Join(m.Share, runFolder, "up")
	output, openErr := os.Open(filepath.Join(m.Share, runFolder, "output"))
	if openErr != nil {
		return 0, errors.Join(openErr, <-ended)
	}
	defer output.Close()
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case <-time.After(outputPoll):
		}
		if boot == 0 {
			if _, statErr := os.Stat(up); statErr == nil {
				boot = time.Since(start)
			}
		}
		if _, copyErr := io.Copy(m.Output, output); copyErr != nil {
			err = errors.Join(err, fmt.Errorf("copy the command's output: %w", copyErr))
		}
	}
	return boot, err
}

// arguments is QEMU's command line.
func (img *Image) arguments(m Machine, console, tpmSocket string) []string {
	cpus, memory := m.CPUs, m.Memory
	if cpus == 0 {
		cpus = img.Kernel.CPUs
	}
	if memory == 0 {
		memory = defaultMemory
	}
	var args []string
	switch {
	case m.Icount:
		cpus = 1
		args = []string{"-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=0,align=off,sleep=off", "-cpu", "max"}
	case haveKVM():
		args = []string{"-accel", "kvm", "-cpu", "host"}
	default:
		// One thread for all CPUs: with one each, a CPU may run a breakpoint of the kernel's code patching after the other has taken it
		// away, and the kernel panics (int3 in a function that a BPF program is being attached to).
		//
		// The emulator takes string instructions one byte at a time where the CPU says that they are fast (ERMS), and ends a block of code at
		// each access to user memory where there is SMAP: without both all takes a quarter less time.
		args = []string{"-accel", "tcg,thread=single,tb-size=512", "-cpu", "max,erms=off,smap=off"}
	}
	args = append(args,
		"-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(memory), "-no-reboot",
		"-display", "none", "-monitor", "none", "-parallel", "none", "-vga", "none", "-net", "none", "-serial", "file:"+console,
		"-kernel", img.vmlinuz, "-initrd", img.initramfs,
		"-append", strings.TrimSpace("console=ttyS0 quiet panic=-1 oops=panic mitigations=off "+m.Append),
		"-drive", "file="+escape(img.disk)+",if=virtio,format=raw,snapshot=on",
		"-chardev", "socket,id=tpmchar,path="+escape(tpmSocket), "-tpmdev", "emulator,id=tpm,chardev=tpmchar",
		"-device", "tpm-tis,tpmdev=tpm",
	)
	for _, disk := range m.Disks {
		args = append(args, "-drive", "file="+escape(disk)+",if=virtio,format=raw")
	}
	share := func(tag, path, more string) {
		args = append(args, "-virtfs", "local,path="+escape(path)+",mount_tag="+tag+",security_model=none"+more)
	}
	share("host", m.Share, "")
	share("modules", img.modules, ",readonly=on")
	share("payload", m.Payload, ",readonly=on")
	return args
}

// escape doubles the commas of a path, as QEMU's option syntax wants.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// Quote makes s one word of a shell command.
func Quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
