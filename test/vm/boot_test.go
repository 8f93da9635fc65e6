package vm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/need"
)

// image prepares a kernel, or skips the test where no machine is to be had; IMANS_REQUIRE_VM=1 makes that a failure.
func image(t *testing.T) *Image {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a machine")
	}
	if err := Missing(); err != nil {
		need.Skip(t, "%v", err)
	}
	cache, err := OpenCache("", t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	k, err := Find("6.12")
	if err != nil {
		t.Fatal(err)
	}
	img, err := cache.Prepare(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestRun runs one machine that uses everything a Machine can ask for.
func TestRun(t *testing.T) {
	img := image(t)
	dir := t.TempDir()
	share, payload, disk := filepath.Join(dir, "share"), filepath.Join(dir, "pay,load"), filepath.Join(dir, "disk")
	for _, d := range []string{share, payload} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(payload, "probe"), []byte("#!/bin/sh\necho from the payload\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	var output bytes.Buffer
	out, err := img.Run(t.Context(), Machine{
		Command: `probe; echo "$WORD"; cat /proc/cmdline; echo error >&2
echo written | dd of=/dev/vdb status=none; echo left >/host/left; exit 42`,
		Environment: []string{"WORD=it's here"}, Append: "imans.test=1", Payload: payload, Share: share,
		Disks: []string{disk}, Icount: true, Limit: 4 * time.Minute, Output: &output,
	})
	if err != nil {
		t.Fatal(err)
	}
	if out.Status != 42 {
		t.Errorf("status %d, want 42", out.Status)
	}
	if out.Boot <= 0 || out.Boot > out.Total {
		t.Errorf("boot took %s of %s", out.Boot, out.Total)
	}
	for _, want := range []string{"from the payload\n", "it's here\n", " imans.test=1\n", "error\n"} {
		if !strings.Contains(output.String(), want) {
			t.Errorf("no %q in the output:\n%s", want, &output)
		}
	}
	if got, err := os.ReadFile(filepath.Join(share, "left")); string(got) != "left\n" {
		t.Errorf("the share has %q, %v", got, err)
	}
	if got, err := os.ReadFile(disk); !bytes.HasPrefix(got, []byte("written\n")) {
		t.Errorf("the disk starts with %q, %v", got[:8], err)
	}
}

// TestRunThatDoesNotEnd covers the ends of a machine that leave no exit status, on machines that boot side by side.
func TestRunThatDoesNotEnd(t *testing.T) {
	img := image(t)
	t.Run("panic", func(t *testing.T) {
		t.Parallel()
		var output bytes.Buffer
		_, err := img.Run(t.Context(), Machine{Command: "echo before; sync; echo c >/proc/sysrq-trigger", Output: &output})
		var crash *CrashError
		if !errors.As(err, &crash) || crash.Reason != "the kernel panicked" {
			t.Fatalf("got %v, want a panic", err)
		}
		if !strings.Contains(crash.Console, "sysrq triggered crash") {
			t.Errorf("the console's end does not show the panic:\n%s", crash.Console)
		}
		if output.String() != "before\n" {
			t.Errorf("output before the panic: %q", output.String())
		}
	})
	t.Run("panic while booting", func(t *testing.T) {
		t.Parallel()
		var output bytes.Buffer
		_, err := img.Run(t.Context(), Machine{Command: "true", Append: "rdinit=/nonexistent root=/nonexistent", Output: &output})
		var crash *CrashError
		if !errors.As(err, &crash) || crash.Reason != reasonPanic {
			t.Fatalf("got %v, want a panic", err)
		}
		again := bootAttempts - 1
		if haveKVM() {
			again = 0
		}
		if n := strings.Count(output.String(), "booting it again"); n != again {
			t.Errorf("booted again %d times, want %d:\n%s", n, again, &output)
		}
	})
	t.Run("limit", func(t *testing.T) {
		t.Parallel()
		_, err := img.Run(t.Context(), Machine{Command: "sleep 600", Limit: 3 * time.Second})
		var crash *CrashError
		if !errors.As(err, &crash) || crash.Reason != "not done after 3s" {
			t.Errorf("got %v, want the limit", err)
		}
	})
	t.Run("interrupt", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancelCause(t.Context())
		interrupt := errors.New("interrupted")
		time.AfterFunc(2*time.Second, func() { cancel(interrupt) })
		if _, err := img.Run(ctx, Machine{Command: "sleep 600"}); !errors.Is(err, interrupt) {
			t.Errorf("got %v, want the interrupt", err)
		}
	})
}
