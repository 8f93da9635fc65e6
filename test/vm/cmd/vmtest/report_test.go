package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"imans.dev/imans-agent/test/vm"
)

func TestReport(t *testing.T) {
	good := kernelRun{kernel: vm.Kernel{Name: "6.1"}, boot: time.Second, total: 2 * time.Second,
		results: vm.Results{Passed: []string{"s.TestA", "s.TestB"}, Skipped: []string{"s.TestC"}}}
	bad := kernelRun{kernel: vm.Kernel{Name: "6.12"}, results: vm.Results{Passed: []string{"s.TestA"}, Failed: []string{"s.TestB"}}}
	crashed := kernelRun{kernel: vm.Kernel{Name: "6.12"}, err: &vm.CrashError{Kernel: "6.12", Reason: "the kernel panicked"}}
	gone := kernelRun{kernel: vm.Kernel{Name: "6.18"}, err: fmt.Errorf("build: %w", &vm.UnavailableError{Kernel: "6.18", Reason: "no package"})}
	unsteady := good.then(kernelRun{kernel: vm.Kernel{Name: "6.1"}})
	unsteady.unsteady = []string{"s.TestB"}
	offline := kernelRun{kernel: vm.Kernel{Name: "6.18"}, err: errors.New("no network")}
	tests := []struct {
		name   string
		runs   []kernelRun
		failed bool
		last   string
		lines  []string
	}{
		{name: "all well", runs: []kernelRun{good}, last: "2 passed, 0 failed, 1 skipped", lines: []string{"skipped on 6.1: s.TestC"}},
		{name: "a test failed", runs: []kernelRun{good, bad}, failed: true, last: "3 passed, 1 failed, 1 skipped",
			lines: []string{"failed on 6.12: s.TestB"}},
		{name: "a test failed once", runs: []kernelRun{unsteady}, last: "2 passed, 0 failed, 1 skipped",
			lines: []string{"failed on 6.1, and passed when it ran again: s.TestB"}},
		{name: "a machine crashed", runs: []kernelRun{good, crashed}, failed: true, last: "2 passed, 1 failed, 1 skipped",
			lines: []string{"failed on 6.12: kernel 6.12: the kernel panicked"}},
		{name: "a kernel is gone", runs: []kernelRun{good, gone}, last: "2 passed, 0 failed, 1 skipped",
			lines: []string{"kernel 6.18 is not to be had: no package", "6.18    not to be had"}},
		{name: "a kernel could not be fetched", runs: []kernelRun{good, offline}, failed: true, last: "2 passed, 1 failed, 1 skipped"},
		{name: "nothing ran", runs: []kernelRun{gone}, failed: true, last: "0 passed, 0 failed, 0 skipped"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			if failed := report(&out, tt.runs); failed != tt.failed {
				t.Errorf("failed is %v, want %v", failed, tt.failed)
			}
			lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
			if last := lines[len(lines)-1]; last != tt.last {
				t.Errorf("last line %q, want %q", last, tt.last)
			}
			for _, want := range tt.lines {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no line %q in:\n%s", want, &out)
				}
			}
		})
	}
}

func TestParse(t *testing.T) {
	o, err := parse([]string{"-kernel", "6.18,6.1", "-soak"}, &bytes.Buffer{})
	if err != nil || len(o.kernels) != 2 || o.kernels[0].Name != "6.18" || !o.soak || !o.programs {
		t.Errorf("got %+v, %v", o, err)
	}
	for _, args := range [][]string{{"-kernel", "6.2"}, {"-parallel", "0"}, {"-short", "-soak"}, {"stray"}, {"-nosuch"}} {
		if _, err := parse(args, &bytes.Buffer{}); err == nil {
			t.Errorf("%v was accepted", args)
		}
	}
}

func TestThen(t *testing.T) {
	first := kernelRun{err: errors.New("it crashed"), results: vm.Results{
		Passed: []string{"s.TestA"}, Failed: []string{"s.TestB", "s.TestC"}, Skipped: []string{"s.TestD"}}}
	run := first.then(kernelRun{results: vm.Results{Passed: []string{"s.TestB", "s.TestE"}, Failed: []string{"s.TestC"}}})
	if run.err != nil || !slices.Equal(run.results.Passed, []string{"s.TestA", "s.TestB", "s.TestE"}) ||
		!slices.Equal(run.results.Failed, []string{"s.TestC"}) || !slices.Equal(run.results.Skipped, []string{"s.TestD"}) {
		t.Errorf("results %+v, %v", run.results, run.err)
	}
	if !slices.Equal(run.unsteady, []string{"s.TestB", "it crashed"}) {
		t.Errorf("unsteady %v", run.unsteady)
	}
	if again := first.then(first); again.err == nil || !slices.Equal(again.results.Failed, first.results.Failed) {
		t.Errorf("what fails twice is %+v, %v", again.results, again.err)
	}
}
