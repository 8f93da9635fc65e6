package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"imans.dev/imans-agent/test/vm"
)

//go:embed latency.sh
var latencyScript []byte

const (
	latencyPrograms = 200 // in each condition
	latencyRounds   = 3   // machines
)

// latencyConditions is how programs come, and what that is to a reader.
var latencyConditions = []struct{ name, said string }{
	{"quiet", "a program every 100 ms"}, {"steady", "a program every 10 ms"}, {"burst", "programs one after the other"},
}

// benchLatency measures the time from the kernel's hook until the machine's TPM has the entry, in which what runs is not anchored yet, as
// a multiple of one bare extend of that TPM.
func benchLatency(ctx context.Context, dir string) ([]figure, error) {
	img, payload, err := counting(ctx, filepath.Join(dir, "latency"))
	if err != nil {
		return nil, err
	}
	figures := map[string]*figure{}
	var order []string
	for range latencyRounds {
		var out bytes.Buffer
		outcome, err := img.Run(ctx, vm.Machine{
			Command: fmt.Sprintf("exec bash /payload/latency.sh %d", latencyPrograms), Payload: payload, Limit: 10 * time.Minute, Output: &out,
		})
		if err == nil && outcome.Status != 0 {
			err = fmt.Errorf("the measurement failed:\n%s", out.String())
		}
		if err != nil {
			return nil, err
		}
		values := readings(out.String())
		bare := values["bare extend"]
		if len(bare) == 0 {
			return nil, fmt.Errorf("no extend was measured:\n%s", out.String())
		}
		slices.Sort(bare)
		for _, c := range latencyConditions {
			for _, part := range []string{"p50", "p99", "max"} {
				v := values[c.name+" "+part]
				if len(v) != 1 {
					return nil, fmt.Errorf("no %s of %s was measured:\n%s", part, c.name, out.String())
				}
				name := fmt.Sprintf("hook to extended PCR, to a bare extend, %s: %s", c.said, part)
				f := figures[name]
				if f == nil {
					f = &figure{name: name, format: "%.1f"}
					figures[name], order = f, append(order, name)
				}
				f.ratios = append(f.ratios, v[0]/median(bare))
				f.parts = fmt.Sprintf("%.2f : %.2f ms", v[0]/1000, median(bare)/1000)
			}
		}
	}
	var all []figure
	for _, name := range order {
		all = append(all, *figures[name])
	}
	return all, nil
}
