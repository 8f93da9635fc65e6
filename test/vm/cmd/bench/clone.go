package main

import (
	"context"
	_ "embed"
	"fmt"
	"path/filepath"
)

//go:embed c/clone.c
var cloneSource []byte

//go:embed clone.sh
var cloneScript []byte

const (
	cloneRounds = 3
	clones      = 1000
)

// benchClone compares the instructions of a mount namespace's life without us, with us where nobody activates it, and where it is
// active from its birth; and those of reading a counter of ours, which is a barrier, and the kernel's.
func benchClone(ctx context.Context, dir string) ([]figure, error) {
	output, err := count(ctx, filepath.Join(dir, "clone"), fmt.Sprintf("exec bash /payload/clone.sh %d %d", cloneRounds, clones))
	if err != nil {
		return nil, err
	}
	values := readings(output)
	var figures []figure
	for _, row := range []struct{ condition, kind, name string }{
		{"lazy", "clone", "mount namespace that nobody activates, to one without the agent"},
		{"all", "clone", "active mount namespace in which nothing runs, to one without the agent"},
		{"lazy", "program", "the same with a program in it, not activated"},
		{"all", "program", "the same with a program in it, active: a list begins and ends"},
		{"all", "reading", "reading a list's counter, a barrier, to reading the kernel's"},
	} {
		with, bare := values[row.condition+" "+row.kind], values["nothing "+row.kind]
		if len(with) != cloneRounds || len(bare) != 1+2*cloneRounds {
			return nil, fmt.Errorf("not all rounds were measured:\n%s", output)
		}
		f := figure{name: row.name, format: "%.2f", parts: fmt.Sprintf("%.0f : %.0f instructions", mean(with), mean(bare))}
		for i, v := range with {
			at := 2 * i // the reading before it
			if row.condition == "all" {
				at++
			}
			f.ratios = append(f.ratios, v/((bare[at]+bare[at+1])/2))
		}
		figures = append(figures, f)
	}
	return figures, nil
}
