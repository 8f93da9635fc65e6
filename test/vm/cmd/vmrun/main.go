// Command vmrun boots a stock kernel, runs a command in it as root and exits with the command's status.
//
//	vmrun [-kernel 6.12] [-append OPTIONS] [-icount] [-timeout 10m] [-share DIR] [-copy FILE]… [-disk IMAGE]… -- COMMAND…
//
// One argument is a line of bash; several are a program and its arguments. Files given by -copy are in /payload, the
// folder given by -share is /host. Exit status 125 means that there is no status of the command to give.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"imans.dev/imans-agent/test/vm"
)

const statusNone = 125

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	status, err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "vmrun:", err)
	}
	os.Exit(status)
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	var m vm.Machine
	var copies, disks list
	flags := flag.NewFlagSet("vmrun", flag.ContinueOnError)
	flags.SetOutput(stderr)
	kernel := flags.String("kernel", "6.12", "kernel of the matrix")
	flags.StringVar(&m.Append, "append", "", "more kernel command line, such as ima_policy=tcb")
	flags.BoolVar(&m.Icount, "icount", false, "let the guest's clock count instructions")
	flags.IntVar(&m.CPUs, "cpus", 0, "virtual CPUs")
	flags.IntVar(&m.Memory, "memory", 0, "MiB of memory")
	flags.DurationVar(&m.Limit, "timeout", 0, "longest time from power-on to power-off")
	flags.StringVar(&m.Share, "share", "", "folder to show at /host")
	flags.Var(&copies, "copy", "file to show in /payload; may be repeated")
	flags.Var(&disks, "disk", "raw disk image to attach; may be repeated")
	clear := flags.Bool("clear", false, "remove everything from the cache and end")
	if err := flags.Parse(args); err != nil {
		return statusNone, err
	}
	cache, err := vm.OpenCache("", func(format string, args ...any) { fmt.Fprintf(stderr, "vmrun: "+format+"\n", args...) })
	if err != nil {
		return statusNone, err
	}
	if *clear {
		if err := cache.Clear(); err != nil {
			return statusNone, err
		}
		return 0, nil
	}
	if flags.NArg() == 0 {
		return statusNone, errors.New("no command; see vmrun -help")
	}
	m.Command, m.Disks, m.Output = commandLine(flags.Args()), disks, stdout
	if err := vm.Missing(); err != nil {
		return statusNone, err
	}
	return boot(ctx, cache, *kernel, m, copies)
}

// boot prepares the image and runs the machine.
func boot(ctx context.Context, cache *vm.Cache, kernel string, m vm.Machine, copies []string) (int, error) {
	k, err := vm.Find(kernel)
	if err != nil {
		return statusNone, err
	}
	img, err := cache.Prepare(ctx, k)
	if err != nil {
		return statusNone, err
	}
	if m.Share != "" {
		if m.Share, err = filepath.Abs(m.Share); err != nil {
			return statusNone, err
		}
	}
	if m.Payload, err = os.MkdirTemp("", "vmrun-"); err != nil {
		return statusNone, err
	}
	defer os.RemoveAll(m.Payload)
	for _, file := range copies {
		if err := vm.CopyFile(file, filepath.Join(m.Payload, filepath.Base(file))); err != nil {
			return statusNone, err
		}
	}
	out, err := img.Run(ctx, m)
	if err != nil {
		return statusNone, err
	}
	return out.Status, nil
}

// commandLine turns the arguments into a line of bash.
func commandLine(args []string) string {
	if len(args) == 1 {
		return args[0]
	}
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = vm.Quote(a)
	}
	return "exec " + strings.Join(words, " ")
}
