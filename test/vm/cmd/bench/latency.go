package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
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
// a multiple of one bare extend of that TPM. Then it counts how many programs ran before the TPM of their namespace had them, without a gate
// and with one, with which none may.
func benchLatency(ctx context.Context, dir string) ([]figure, error) {
	img, payload, err := counting(ctx, filepath.Join(dir, "latency"))
	if err != nil {
		return nil, err
	}
	rows := &rows{figures: map[string]*figure{}}
	ungated := 0
	for range latencyRounds {
		var out bytes.Buffer
		outcome, err := img.Run(ctx, vm.Machine{
			Command: fmt.Sprintf("exec bash /payload/latency.sh %d", latencyPrograms), Payload: payload, Limit: 30 * time.Minute, Output: &out,
		})
		if err == nil && outcome.Status != 0 {
			err = errors.New("the measurement failed")
		}
		early := 0
		if err == nil {
			early, err = rows.addMachine(readings(out.String()))
		}
		if err != nil {
			return nil, fmt.Errorf("%w:\n%s", err, out.String())
		}
		ungated += early
	}
	if ungated > 0 {
		return rows.all(), fmt.Errorf("%d programs ran before their TPM had them, though there was a gate", ungated)
	}
	return rows.all(), nil
}

// rows are figures by their names, in the order in which they came.
type rows struct {
	figures map[string]*figure
	order   []string
}

// add adds a ratio to a row.
func (r *rows) add(row figure, ratio float64) {
	f := r.figures[row.name]
	if f == nil {
		f = &row
		r.figures[row.name], r.order = f, append(r.order, row.name)
	}
	f.ratios, f.parts = append(f.ratios, ratio), row.parts
}

func (r *rows) all() []figure {
	var all []figure
	for _, name := range r.order {
		all = append(all, *r.figures[name])
	}
	return all
}

// addMachine adds what one machine measured, and returns how many programs ran early with a gate.
func (r *rows) addMachine(values map[string][]float64) (ungated int, err error) {
	bare := values["bare extend"]
	if len(bare) == 0 {
		return 0, errors.New("no extend was measured")
	}
	slices.Sort(bare)
	toExtend := func(name string, micros float64) {
		r.add(figure{name: name, format: "%.1f", parts: fmt.Sprintf("%.2f : %.2f ms", micros/1000, median(bare)/1000)}, micros/median(bare))
	}
	for _, c := range latencyConditions {
		for _, part := range []string{"p50", "p99", "max"} {
			v := values[c.name+" "+part]
			if len(v) != 1 {
				return 0, fmt.Errorf("no %s of %s was measured", part, c.name)
			}
			toExtend(fmt.Sprintf("hook to extended PCR, to a bare extend, %s: %s", c.said, part), v[0])
		}
	}
	for _, condition := range []string{"none", "gate"} {
		after, n := values["first-act "+condition], latencyPrograms
		if len(after) != n {
			return 0, fmt.Errorf("%d of %d programs (%s) said when their TPM had them", len(after), n, condition)
		}
		slices.Sort(after)
		early := len(slices.DeleteFunc(slices.Clone(after), func(micros float64) bool { return micros == 0 }))
		row := figure{name: "ran before their TPM had them, gate: " + condition, format: "%.1f%%", parts: fmt.Sprintf("%d of %d programs", early, n)}
		if condition == "gate" {
			row.target, ungated = "none", early
		}
		r.add(row, float64(early)/float64(n)*100)
		for _, part := range []struct {
			said string
			at   int
		}{{"p50", (n - 1) / 2}, {"p99", n*99/100 - 1}, {"max", n - 1}} {
			toExtend(fmt.Sprintf("ran for, until their TPM had them, to a bare extend, gate: %s: %s", condition, part.said), after[part.at])
		}
	}
	return ungated, nil
}
