package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"path/filepath"
	"time"

	"imans.dev/imans-agent/test/vm"
)

//go:embed gate.sh
var gateScript []byte

const (
	gateRounds = 3
	gateSpawns = 250
)

// benchGate compares an exec in a gated namespace with one that nothing is attached to: the second of a program in instructions, the first in
// instructions and, in a machine whose clock is the host's, by the clock.
func benchGate(ctx context.Context, dir string) ([]figure, error) {
	img, payload, err := counting(ctx, filepath.Join(dir, "gate"))
	if err != nil {
		return nil, err
	}
	var figures []figure
	for _, by := range []struct {
		said  string
		count bool
		rest  int
	}{{"instructions", true, 90}, {"the clock", false, 6}} {
		var out bytes.Buffer
		outcome, err := img.Run(ctx, vm.Machine{
			Command: fmt.Sprintf("exec bash /payload/gate.sh %d %d %d", gateRounds, gateSpawns, by.rest),
			Payload: payload, Icount: by.count, Limit: 20 * time.Minute, Output: &out,
		})
		if err == nil && outcome.Status != 0 {
			err = fmt.Errorf("the measurement failed:\n%s", out.String())
		}
		if err != nil {
			return figures, err
		}
		f, err := gateFigures(out.String(), by.said)
		if err != nil {
			return figures, err
		}
		figures = append(figures, f...)
	}
	return figures, nil
}

func gateFigures(output, by string) ([]figure, error) {
	values := readings(output)
	var figures []figure
	for _, kind := range []string{"static", "dynamic"} {
		bare, gate := values["second-nothing "+kind], values["second-gate "+kind]
		fresh, agent, gated := values["first-nothing "+kind], values["first-agent "+kind], values["first-gate "+kind]
		if len(bare) != 1+gateRounds || len(gate) != gateRounds || len(fresh) != gateRounds || len(agent) != gateRounds || len(gated) != gateRounds {
			return nil, fmt.Errorf("not all rounds of %s programs were measured:\n%s", kind, output)
		}
		second := figure{name: fmt.Sprintf("second exec, %s, gated, to one with nothing, by %s", kind, by), format: "%+.2f%%"}
		if by == "instructions" {
			second.target = "at most +1%"
		}
		first := figure{name: fmt.Sprintf("first exec, %s, gated, to one with the agent and no gate, by %s", kind, by), format: "%.1f times"}
		for i := range gate {
			second.ratios = append(second.ratios, (gate[i]/((bare[i]+bare[i+1])/2)-1)*100)
			first.ratios = append(first.ratios, gated[i]/agent[i])
		}
		second.parts = fmt.Sprintf("%.0f : %.0f ns", mean(gate), mean(bare))
		first.parts = fmt.Sprintf("%.0f : %.0f : %.0f ns (gated : agent : nothing)", mean(gated), mean(agent), mean(fresh))
		figures = append(figures, second, first)
	}
	return figures, nil
}
