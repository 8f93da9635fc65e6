package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

const replayPairs = 9

// benchReplay compares imans-agent verify with evmctl: the same list in a file, the same values of the same registers, as programs
// from start to end. evmctl replays SHA-1 and SHA-256 whatever it is given.
func benchReplay(ctx context.Context, dir string) ([]figure, error) {
	const n = 1_000_000
	agent := filepath.Join(dir, "imans-agent")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", agent, "./cmd/imans-agent").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build imans-agent: %w\n%s", err, out)
	}
	var list []byte
	replay := imalog.NewReplay(ima.SHA1, ima.SHA256)
	first, err := imalog.BootAggregate(10, imalog.NG, ima.ZeroDigest(ima.SHA256))
	if err != nil {
		return nil, err
	}
	for i := range n {
		e := first
		if i > 0 {
			e = makeEntry(i)
		}
		list = e.AppendBinary(list, ima.SHA1)
		replay.Extend(e)
	}
	path := filepath.Join(dir, "list")
	if err := os.WriteFile(path, list, 0o600); err != nil {
		return nil, err
	}
	verifyArgs := []string{"verify", path}
	evmctlArgs := []string{"ima_measurement", "--ignore-violations"}
	for _, bank := range replay.Banks() {
		verifyArgs = append(verifyArgs, "--pcr", fmt.Sprintf("10=%v", replay.Value(10, bank)))
		var text []byte
		for pcr := range 24 {
			text = fmt.Appendf(text, "PCR-%02d: %x\n", pcr, replay.Value(pcr, bank).Bytes())
		}
		file := filepath.Join(dir, "pcrs-"+bank.String())
		if err := os.WriteFile(file, text, 0o600); err != nil {
			return nil, err
		}
		evmctlArgs = append(evmctlArgs, "--pcrs", bank.String()+","+file)
	}
	evmctlArgs = append(evmctlArgs, path)
	ours, theirs, err := pairs(replayPairs,
		func() (cost, error) { return program(ctx, agent, verifyArgs...) },
		func() (cost, error) { return program(ctx, "evmctl", evmctlArgs...) })
	if err != nil {
		return nil, err
	}
	fig := figure{name: fmt.Sprintf("verifying %d entries, SHA-1 and SHA-256: speed to evmctl", n), format: "%.1f times", target: "at least 10 times"}
	fig.ratios = ratios(ours, theirs, wall)
	fig.parts = fmt.Sprintf("%v : %v", middle(ours, wall).Round(time.Millisecond), middle(theirs, wall).Round(time.Millisecond))
	work := figure{name: "the same, in processor time of all processors", format: "%.1f times", ratios: ratios(ours, theirs, cpu)}
	work.parts = fmt.Sprintf("%v : %v", middle(ours, cpu).Round(time.Millisecond), middle(theirs, cpu).Round(time.Millisecond))
	return []figure{fig, work}, nil
}

// program runs a program to its end, which must be a good one.
func program(ctx context.Context, name string, args ...string) (cost, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out []byte
	c, err := timed(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		return c, fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	c.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return c, nil
}
