package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"imans.dev/imans-agent/test/vm"
)

// report prints what failed, the table of kernels and the closing line. A machine without a regular end counts as one
// failure more; so does a matrix in which no test ran.
func report(w io.Writer, runs []kernelRun) (failed bool) {
	var all vm.Results
	crashes := 0
	fmt.Fprintln(w)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "kernel\tpassed\tfailed\tskipped\tboot\ttotal")
	var notes []string
	for _, r := range runs {
		for _, t := range r.results.Failed {
			notes = append(notes, fmt.Sprintf("failed on %s: %s", r.kernel.Name, t))
		}
		for _, t := range r.unsteady {
			notes = append(notes, fmt.Sprintf("failed on %s, and passed when it ran again: %s", r.kernel.Name, t))
		}
		for _, t := range r.results.Skipped {
			notes = append(notes, fmt.Sprintf("skipped on %s: %s", r.kernel.Name, t))
		}
		var gone *vm.UnavailableError
		if errors.As(r.err, &gone) {
			notes = append(notes, gone.Error())
			fmt.Fprintf(table, "%s\tnot to be had\n", r.kernel.Name)
			continue
		}
		broken := 0
		if r.err != nil {
			broken = 1
			notes = append(notes, fmt.Sprintf("failed on %s: %v", r.kernel.Name, r.err))
		}
		crashes += broken
		all.Add(r.results)
		fmt.Fprintf(table, "%s\t%d\t%d\t%d\t%s\t%s\n", r.kernel.Name, len(r.results.Passed), len(r.results.Failed)+broken,
			len(r.results.Skipped), r.boot.Round(100*time.Millisecond), r.total.Round(100*time.Millisecond))
	}
	for _, n := range notes {
		fmt.Fprintln(w, n)
	}
	table.Flush()
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", len(all.Passed), len(all.Failed)+crashes, len(all.Skipped))
	return len(all.Failed)+crashes > 0 || len(all.Passed) == 0
}
