// Command bench measures what the agent costs and prints it as ratios, each of two things measured in one run, with their
// spread over several rounds: smallest, median, largest.
//
// The costs of an exec, of a mount namespace and of a container's vTPM are counted in instructions, in a virtual machine whose clock counts them (QEMU's -icount), so they do not
// depend on the host's load. Hashing, extending and verifying are measured in pairs, one of ours and one of theirs in turn, each
// pair giving a ratio: of wall time, and where both sides only compute also of processor time, which other work on the machine
// changes less.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"text/tabwriter"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// figure is one row: a ratio, what it was aimed at, and what its parts were.
type figure struct {
	name   string
	ratios []float64
	format string // of one ratio
	target string
	parts  string
}

// run measures what is named, or all.
func run(ctx context.Context, only []string, stdout, stderr io.Writer) error {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var figures []figure
	for _, b := range []struct {
		name    string
		measure func(context.Context, string) ([]figure, error)
	}{
		{"exec", benchExec}, {"clone", benchClone}, {"hash", benchHash}, {"extend", benchExtend}, {"memory", benchMemory}, {"replay", benchReplay},
		{"vtpm", benchVTPM}, {"latency", benchLatency}, {"gate", benchGate},
	} {
		if len(only) > 0 && !slices.Contains(only, b.name) {
			continue
		}
		fmt.Fprintf(stderr, "bench: %s\n", b.name)
		f, err := b.measure(ctx, dir)
		figures = append(figures, f...)
		if err != nil {
			return errors.Join(fmt.Errorf("%s: %w", b.name, err), print(stdout, figures))
		}
	}
	return print(stdout, figures)
}

func print(w io.Writer, figures []figure) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "FIGURE\tMEDIAN\tSPREAD\tTARGET\tMEASURED")
	for _, f := range figures {
		s := slices.Sorted(slices.Values(f.ratios))
		spread := fmt.Sprintf(f.format+" … "+f.format, s[0], s[len(s)-1])
		fmt.Fprintf(t, "%s\t"+f.format+"\t%s\t%s\t%s\n", f.name, median(s), spread, cmp.Or(f.target, "-"), f.parts)
	}
	return t.Flush()
}

// median of sorted values.
func median(s []float64) float64 {
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}
