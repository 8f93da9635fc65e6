// Command vmtest runs the tests of the vm build tag on the kernels of the matrix.
//
//	vmtest [-run REGEXP] [-kernel 6.1,6.12] [-timeout 20m] [-parallel 3] [-short | -soak] [-again]
//	[-cover FILE] [-programs=false] [-append OPTIONS]
//
// It ends with a table and a line "N passed, N failed, N skipped". A kernel that Debian's archive does not have (any more)
// is named before the table and counted nowhere. Exit status: 0 all passed, 1 something failed or nothing ran, 2 misuse
// or no machine to be had.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"imans.dev/imans-agent/test/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	failed, err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "vmtest:", err)
		os.Exit(2)
	case failed:
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	run, cover, more string
	limit            time.Duration
	parallel         int
	short, soak      bool
	again            bool
	programs         bool
	kernels          []vm.Kernel
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (failed bool, err error) {
	o, err := parse(args, stderr)
	if err != nil {
		return false, err
	}
	if err := vm.Missing(); err != nil {
		return false, err
	}
	repo, err := os.Getwd()
	if err != nil {
		return false, err
	}
	out := &lockedWriter{w: stdout}
	cache, err := vm.OpenCache("", func(format string, args ...any) { fmt.Fprintf(out, "vmtest: "+format+"\n", args...) })
	if err != nil {
		return false, err
	}
	work, err := os.MkdirTemp("", "vmtest-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(work)
	m := &matrix{options: o, cache: cache, repo: repo, work: work, out: out}
	runs, err := m.run(ctx)
	if err != nil {
		return false, err
	}
	if err := m.writeCoverage(ctx, runs); err != nil {
		return false, err
	}
	return report(stdout, runs), nil
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("vmtest", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.run, "run", "", "run only the tests that match, as go test -run")
	kernels := flags.String("kernel", "", "kernels of the matrix, separated by commas (default all)")
	flags.DurationVar(&o.limit, "timeout", 20*time.Minute, "longest time for one machine")
	flags.IntVar(&o.parallel, "parallel", 3, "machines at a time; without KVM each keeps one processor busy")
	flags.BoolVar(&o.short, "short", false, "set IMANS_SHORT=1 for the tests, and with all kernels IMANS_SAMPLE=1")
	flags.BoolVar(&o.soak, "soak", false, "set IMANS_SOAK=1 for the tests")
	flags.BoolVar(&o.again, "again", false, "run what fails once more on another machine: an emulated one can stall, or crash by itself; the table names it")
	flags.StringVar(&o.cover, "cover", "", "measure coverage and write the profile to this file")
	flags.BoolVar(&o.programs, "programs", true, "put the agent and the probe programs into the machine")
	flags.StringVar(&o.more, "append", "", "more kernel command line")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q; see vmtest -help", flags.Arg(0))
	}
	if o.short && o.soak {
		return o, errors.New("-short and -soak: choose one")
	}
	if o.parallel < 1 {
		return o, fmt.Errorf("-parallel %d: at least one machine", o.parallel)
	}
	if *kernels == "" {
		o.kernels = vm.Matrix()
		return o, nil
	}
	for name := range strings.SplitSeq(*kernels, ",") {
		k, err := vm.Find(name)
		if err != nil {
			return o, err
		}
		o.kernels = append(o.kernels, k)
	}
	return o, nil
}
