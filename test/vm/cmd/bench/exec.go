package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"imans.dev/imans-agent/test/vm"
)

//go:embed c/spawn.c
var spawnSource []byte

//go:embed c/nothing.c
var nothingSource []byte

//go:embed exec.sh
var execScript []byte

const (
	execKernel = "6.12"
	execRounds = 7
	execSpawns = 200
)

// benchExec compares the instructions of an exec without us, with us, and with the kernel's own IMA.
func benchExec(ctx context.Context, dir string) ([]figure, error) {
	if err := vm.Missing(); err != nil {
		return nil, err
	}
	repo, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	payload, err := vm.BuildPayload(ctx, repo, filepath.Join(dir, "payload"), vm.PayloadOptions{})
	if err != nil {
		return nil, err
	}
	if err := compile(ctx, payload.Dir); err != nil {
		return nil, err
	}
	k, err := vm.Find(execKernel)
	if err != nil {
		return nil, err
	}
	cache, err := vm.OpenCache("", func(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) })
	if err != nil {
		return nil, err
	}
	img, err := cache.Prepare(ctx, k)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	outcome, err := img.Run(ctx, vm.Machine{
		Command: fmt.Sprintf("exec bash /payload/exec.sh %d %d", execRounds, execSpawns),
		Payload: payload.Dir, Icount: true, Limit: 15 * time.Minute, Output: &out,
	})
	if err != nil {
		return nil, err
	}
	if outcome.Status != 0 {
		return nil, fmt.Errorf("the measurement failed:\n%s", out.String())
	}
	return execFigures(out.String())
}

// compile makes the spawn loop and the programs that it runs.
func compile(ctx context.Context, dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "exec.sh"), execScript, 0o755); err != nil {
		return err
	}
	for _, c := range []struct {
		name   string
		source []byte
		flags  []string
	}{{"spawn", spawnSource, []string{"-static"}}, {"static", nothingSource, []string{"-static"}}, {"dynamic", nothingSource, nil}} {
		args := append([]string{"-O2", "-x", "c", "-", "-o", filepath.Join(dir, c.name)}, c.flags...)
		cmd := exec.CommandContext(ctx, "gcc", args...)
		cmd.Stdin = bytes.NewReader(c.source)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("compile %s: %w; install the packages gcc and libc6-dev\n%s", c.name, err, out)
		}
	}
	return nil
}

func execFigures(output string) ([]figure, error) {
	values := map[string][]float64{}
	for line := range strings.Lines(output) {
		var condition, kind string
		var ns float64
		if n, _ := fmt.Sscan(line, &condition, &kind, &ns); n == 3 {
			values[condition+" "+kind] = append(values[condition+" "+kind], ns)
		}
	}
	var figures []figure
	for _, kind := range []string{"static", "dynamic"} {
		bare, agent, ima := values["second-nothing "+kind], values["second-agent "+kind], values["second-kernel-ima "+kind]
		if len(bare) != 1+2*execRounds || len(agent) != execRounds || len(ima) != execRounds {
			return nil, fmt.Errorf("not all rounds of %s programs were measured:\n%s", kind, output)
		}
		with := more("second", kind, "the agent", agent, func(i int) float64 { return (bare[i] + bare[i+1]) / 2 })
		with.target = "at most +0.5%"
		base := mean(bare[execRounds+1:])
		figures = append(figures, with,
			more("second", kind, "the kernel's IMA", ima, func(int) float64 { return base }),
			more("second", kind, "nothing, one round later", bare[1:execRounds+1], func(i int) float64 { return bare[i] }))
	}
	for _, kind := range []string{"static", "dynamic"} {
		base := mean(values["first-nothing "+kind])
		for _, with := range []struct{ condition, name string }{{"agent", "the agent"}, {"kernel-ima", "the kernel's IMA"}} {
			v := values["first-"+with.condition+" "+kind]
			if len(v) != execRounds {
				return nil, fmt.Errorf("not all first rounds of %s programs were measured:\n%s", kind, output)
			}
			figures = append(figures, more("first", kind, with.name, v, func(int) float64 { return base }))
		}
	}
	return figures, nil
}

// more compares each round with its base.
func more(which, kind, with string, values []float64, base func(round int) float64) figure {
	f := figure{name: fmt.Sprintf("%s exec, %s: more instructions with %s", which, kind, with), format: "%+.2f%%"}
	bases := 0.0
	for i, ns := range values {
		f.ratios = append(f.ratios, (ns/base(i)-1)*100)
		bases += base(i)
	}
	f.parts = fmt.Sprintf("%.0f : %.0f instructions", mean(values), bases/float64(len(values)))
	return f
}

func mean(values []float64) float64 {
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}
