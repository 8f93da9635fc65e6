package main

import (
	"context"
	_ "embed"
	"fmt"
	"path/filepath"
)

//go:embed vtpm.sh
var vtpmScript []byte

const (
	vtpmRounds     = 5
	vtpmContainers = 4 // in a round, of each kind
)

// benchVTPM compares the start of a container that gets a vTPM of the pool with that of one that gets none, each by runc and the wrapper,
// from the command's beginning until the container's program runs; and takes the memory of a vTPM.
func benchVTPM(ctx context.Context, dir string) ([]figure, error) {
	output, err := count(ctx, filepath.Join(dir, "vtpm"), fmt.Sprintf("exec bash /payload/vtpm.sh %d %d", vtpmRounds, vtpmContainers))
	if err != nil {
		return nil, err
	}
	return vtpmFigures(output)
}

func vtpmFigures(output string) ([]figure, error) {
	values := readings(output)
	with, without := values["with start"], values["without start"]
	grown, grownWithout, swtpm := values["with agent"], values["without agent"], values["with swtpm"]
	if len(with) != vtpmRounds*vtpmContainers || len(without) != len(with) || len(swtpm) != len(with) ||
		len(grown) != vtpmRounds || len(grownWithout) != vtpmRounds {
		return nil, fmt.Errorf("not all rounds were measured:\n%s", output)
	}
	start := figure{
		name: "start of a container with a vTPM of the pool, to one without", format: "%.2f",
		parts: fmt.Sprintf("%.0f : %.0f million instructions and waits", mean(with)/1e6, mean(without)/1e6),
	}
	own := figure{name: "memory of a vTPM: its swtpm", format: "%.1f MiB", parts: "proportional set size"}
	agent := figure{name: "the same: growth of the agent", format: "%.2f MiB",
		parts: fmt.Sprintf("%.2f MiB a container without", mean(grownWithout)/1024)}
	for i := range vtpmRounds {
		of := func(v []float64) float64 { return mean(v[i*vtpmContainers : (i+1)*vtpmContainers]) }
		start.ratios = append(start.ratios, of(with)/of(without))
		own.ratios = append(own.ratios, of(swtpm)/1024)
		agent.ratios = append(agent.ratios, grown[i]/1024)
	}
	return []figure{start, own, agent}, nil
}
