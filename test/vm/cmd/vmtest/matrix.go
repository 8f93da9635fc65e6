package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"imans.dev/imans-agent/test/vm"
)

const (
	// suiteMargin is how much earlier than the machine a suite times out, so that its goroutines' stacks are seen.
	suiteMargin = 20 * time.Second
	shortName   = "IMANS_SHORT"
	sampleName  = "IMANS_SAMPLE"
	soakName    = "IMANS_SOAK"
	requireName = "IMANS_REQUIRE_VM"
)

// matrix runs the same tests on several kernels.
type matrix struct {
	options
	cache *vm.Cache
	repo  string
	work  string
	out   io.Writer
}

// kernelRun is what one kernel's machine came to.
type kernelRun struct {
	kernel  vm.Kernel
	results vm.Results
	boot    time.Duration
	total   time.Duration
	cover   string
	err     error
	// unsteady is what went wrong the first time and not the second.
	unsteady []string
}

// run builds the payload once and runs it on each kernel, at most m.parallel at a time. Kernels and the root disk are
// fetched while the payload compiles.
func (m *matrix) run(ctx context.Context) ([]kernelRun, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var payload *vm.Payload
	compiled := make(chan struct{})
	go func() {
		defer close(compiled)
		var err error
		if payload, err = m.compile(ctx); err != nil {
			cancel(err)
		}
	}()
	runs := make([]kernelRun, len(m.kernels))
	slots := make(chan struct{}, m.parallel)
	var wg sync.WaitGroup
	for i, k := range m.kernels {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			img, err := m.cache.Prepare(ctx, k)
			<-compiled
			if err == nil && ctx.Err() == nil {
				runs[i] = m.one(ctx, img, payload)
			} else {
				runs[i] = kernelRun{kernel: k, err: err}
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return runs, nil
}

// compile builds the payload. That no test was chosen is an error.
func (m *matrix) compile(ctx context.Context) (*vm.Payload, error) {
	o := vm.PayloadOptions{Tests: true, Run: m.options.run, NoPrograms: !m.programs, Cover: m.cover != ""}
	if !m.sampled() {
		o.Cache = m.cache
	}
	payload, err := vm.BuildPayload(ctx, m.repo, filepath.Join(m.work, "payload"), o)
	if err == nil && len(payload.Suites) == 0 {
		return nil, fmt.Errorf("no test of the vm build tag matches %q", m.options.run)
	}
	return payload, err
}

// one runs the payload on one kernel, and what did not pass once more if that is asked for.
func (m *matrix) one(ctx context.Context, img *vm.Image, payload *vm.Payload) kernelRun {
	run := m.boot(ctx, img, payload)
	if !m.again || ctx.Err() != nil || run.err == nil && len(run.results.Failed) == 0 {
		return run
	}
	left := payload.Without(run.results)
	if len(left.Suites) == 0 {
		return run
	}
	fmt.Fprintf(m.out, "vmtest: %s: what failed or did not run, once more on another machine\n", img.Kernel.Name)
	return run.then(m.boot(ctx, img, left))
}

// then is what a run came to, after another of what did not pass in it.
func (r kernelRun) then(again kernelRun) kernelRun {
	for _, test := range r.results.Failed {
		if slices.Contains(again.results.Passed, test) {
			again.unsteady = append(again.unsteady, test)
		}
	}
	if r.err != nil && again.err == nil {
		again.unsteady = append(again.unsteady, r.err.Error())
	}
	again.boot, again.total = r.boot, r.total+again.total
	again.results.Passed = append(r.results.Passed, again.results.Passed...)
	again.results.Skipped = append(r.results.Skipped, again.results.Skipped...)
	return again
}

// boot runs the payload on one machine.
func (m *matrix) boot(ctx context.Context, img *vm.Image, payload *vm.Payload) kernelRun {
	k := img.Kernel
	run := kernelRun{kernel: k}
	share := filepath.Join(m.work, "share-"+k.Name)
	run.cover = filepath.Join(share, "cover")
	if run.err = os.MkdirAll(run.cover, 0o755); run.err != nil {
		return run
	}
	results := vm.NewResultWriter(m.out, k.Name+" | ")
	fmt.Fprintf(m.out, "vmtest: booting %s (%s)\n", k.Name, img.Version)
	outcome, err := img.Run(ctx, vm.Machine{
		Command: payload.Script(m.limit - suiteMargin), Environment: m.environment(k), Append: m.more,
		Payload: payload.Dir, Share: share, Limit: m.limit, Output: results,
	})
	run.boot, run.total = outcome.Boot, outcome.Total
	counted, closeErr := results.Close()
	run.results, run.err = counted, errors.Join(err, closeErr)
	if err == nil && outcome.Status != 0 && len(counted.Failed) == 0 {
		run.err = errors.Join(run.err, fmt.Errorf("the guest's test script ended with status %d", outcome.Status))
	}
	return run
}

// sampled reports whether tests may leave themselves to one kernel, or to a longer run.
func (m *matrix) sampled() bool { return m.short && len(m.kernels) == len(vm.Matrix()) }

// environment is what tests may ask about.
func (m *matrix) environment(k vm.Kernel) []string {
	env := []string{"IMANS_VM_KERNEL=" + k.Name}
	if m.short {
		env = append(env, shortName+"=1")
	}
	if m.sampled() {
		env = append(env, sampleName+"=1")
	}
	if m.soak {
		env = append(env, soakName+"=1")
	}
	if v := os.Getenv(requireName); v != "" {
		env = append(env, requireName+"="+v)
	}
	if m.cover != "" {
		env = append(env, "GOCOVERDIR=/host/cover")
	}
	return env
}

// writeCoverage merges the counters of all machines into one profile.
func (m *matrix) writeCoverage(ctx context.Context, runs []kernelRun) error {
	if m.cover == "" {
		return nil
	}
	var dirs []string
	for _, r := range runs {
		if found, _ := filepath.Glob(filepath.Join(r.cover, "covcounters.*")); len(found) > 0 {
			dirs = append(dirs, r.cover)
		}
	}
	if dirs == nil {
		return errors.New("no machine left coverage counters")
	}
	cmd := exec.CommandContext(ctx, "go", "tool", "covdata", "textfmt", "-i="+strings.Join(dirs, ","), "-o="+m.cover)
	cmd.Dir = m.repo
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("merge coverage: %w\n%s", err, out)
	}
	fmt.Fprintf(m.out, "vmtest: coverage profile in %s\n", m.cover)
	return nil
}

// lockedWriter lets several machines write lines to one place.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
