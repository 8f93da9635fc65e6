package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

//go:embed rounds.sh
var roundsScript []byte

const (
	execKernel = "6.12"
	execRounds = 5
	execSpawns = 250
	execBoots  = 3 // with the kernel's command line as it is and with tcbOption, in turns
	bootRounds = 2

	// tcbOption makes the kernel's IMA measure from power-on: programs, executable mappings, files that root opens.
	tcbOption = "ima_policy=tcb"
)

// benchExec compares the instructions of an exec without us, with us, and with the kernel's own IMA: with a policy as ours, and with
// the one of its own that it has when it boots with tcbOption.
func benchExec(ctx context.Context, dir string) ([]figure, error) {
	img, payload, err := counting(ctx, filepath.Join(dir, "exec"))
	if err != nil {
		return nil, err
	}
	outputs, err := measureExec(ctx, img, payload)
	if err != nil {
		return nil, err
	}
	return execFigures(outputs)
}

// count runs a command in a machine whose clock counts instructions, and returns what it prints.
func count(ctx context.Context, dir, command string) (string, error) {
	img, payload, err := counting(ctx, dir)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	outcome, err := img.Run(ctx, vm.Machine{Command: command, Payload: payload, Icount: true, Limit: 40 * time.Minute, Output: &out})
	if err == nil && outcome.Status != 0 {
		err = fmt.Errorf("the measurement failed:\n%s", out.String())
	}
	return out.String(), err
}

// counting prepares what a machine that counts instructions boots, and in dir what it runs.
func counting(ctx context.Context, dir string) (*vm.Image, string, error) {
	if err := vm.Missing(); err != nil {
		return nil, "", err
	}
	repo, err := os.Getwd()
	if err != nil {
		return nil, "", err
	}
	payload, err := vm.BuildPayload(ctx, repo, dir, vm.PayloadOptions{})
	if err != nil {
		return nil, "", err
	}
	if err := compile(ctx, payload.Dir); err != nil {
		return nil, "", err
	}
	k, err := vm.Find(execKernel)
	if err != nil {
		return nil, "", err
	}
	cache, err := vm.OpenCache("", func(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) })
	if err != nil {
		return nil, "", err
	}
	img, err := cache.Prepare(ctx, k)
	return img, payload.Dir, err
}

// measureExec boots the machines, one after the other, and returns all that exec.sh printed.
func measureExec(ctx context.Context, img *vm.Image, payload string) (string, error) {
	var out bytes.Buffer
	boot := func(arguments, append string) error {
		outcome, err := img.Run(ctx, vm.Machine{
			Command: "exec bash /payload/exec.sh " + arguments, Append: append,
			Payload: payload, Icount: true, Limit: 20 * time.Minute, Output: &out,
		})
		if err == nil && outcome.Status != 0 {
			err = fmt.Errorf("the measurement failed:\n%s", out.String())
		}
		return err
	}
	for range execBoots {
		if err := boot(fmt.Sprintf("alone %d %d boot", bootRounds, execSpawns), ""); err != nil {
			return "", err
		}
		if err := boot(fmt.Sprintf("alone %d %d tcb", bootRounds, execSpawns), tcbOption); err != nil {
			return "", err
		}
	}
	err := boot(fmt.Sprintf("compare %d %d", execRounds, execSpawns), "")
	return out.String(), err
}

// compile makes the loops and the programs that they run.
func compile(ctx context.Context, dir string) error {
	for name, script := range map[string][]byte{"exec.sh": execScript, "rounds.sh": roundsScript, "clone.sh": cloneScript, "vtpm.sh": vtpmScript, "latency.sh": latencyScript, "gate.sh": gateScript} {
		if err := os.WriteFile(filepath.Join(dir, name), script, 0o755); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		name   string
		source []byte
		flags  []string
	}{{"spawn", spawnSource, []string{"-static"}}, {"clone", cloneSource, []string{"-static"}}, {"static", nothingSource, []string{"-static"}}, {"dynamic", nothingSource, nil}} {
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
	values := readings(output)
	var figures []figure
	for _, kind := range []string{"static", "dynamic"} {
		bare, agent, ima := values["second-nothing "+kind], values["second-agent "+kind], values["second-kernel-ima "+kind]
		boot, tcb := values["second-boot "+kind], values["second-tcb "+kind]
		if len(bare) != 1+2*execRounds || len(agent) != execRounds || len(ima) != execRounds ||
			len(boot) != execBoots*bootRounds || len(tcb) != len(boot) {
			return nil, fmt.Errorf("not all rounds of %s programs were measured:\n%s", kind, output)
		}
		with := more("second", kind, "the agent", agent, func(i int) float64 { return (bare[i] + bare[i+1]) / 2 })
		with.target = "at most +0.5%"
		base := mean(bare[execRounds+1:])
		peer := more("second", kind, "the kernel's IMA, "+tcbOption, tcb, func(i int) float64 { return boot[i] })
		figures = append(figures, with, peer, share(kind, with, peer),
			more("second", kind, "the kernel's IMA, our policy", ima, func(int) float64 { return base }),
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

// readings are the numbers of lines "CONDITION KIND NUMBER", by condition and kind.
func readings(output string) map[string][]float64 {
	values := map[string][]float64{}
	for line := range strings.Lines(output) {
		var condition, kind string
		var ns float64
		if n, _ := fmt.Sscan(line, &condition, &kind, &ns); n == 3 {
			values[condition+" "+kind] = append(values[condition+" "+kind], ns)
		}
	}
	return values
}

// share is what the agent costs as a part of what the peer costs in the middle.
func share(kind string, with, peer figure) figure {
	f := figure{name: fmt.Sprintf("second exec, %s: the agent's cost as a part of the kernel IMA's with %s", kind, tcbOption), format: "%.2f"}
	if kind == "dynamic" {
		f.target = "at most 0.5"
	}
	middle := median(slices.Sorted(slices.Values(peer.ratios)))
	for _, r := range with.ratios {
		f.ratios = append(f.ratios, r/middle)
	}
	f.parts = fmt.Sprintf("%+.2f%% : %+.2f%%", median(slices.Sorted(slices.Values(with.ratios))), middle)
	return f
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
