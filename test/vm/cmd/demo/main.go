// Command demo boots a stock kernel with a TPM and shows the main job there: scripts/demo.sh tells what. It exits with the
// demonstration's own status.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"imans.dev/imans-agent/test/vm"
)

// kernel is the stock kernel of the demonstration: of Debian 12's backports.
const kernel = "6.12"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, stdout, stderr io.Writer) error {
	if err := vm.Missing(); err != nil {
		return err
	}
	repo, err := os.Getwd()
	if err != nil {
		return err
	}
	k, err := vm.Find(kernel)
	if err != nil {
		return err
	}
	cache, err := vm.OpenCache("", func(format string, args ...any) { fmt.Fprintf(stderr, "demo: "+format+"\n", args...) })
	if err != nil {
		return err
	}
	img, err := cache.Prepare(ctx, k)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	payload, err := vm.BuildPayload(ctx, repo, dir, vm.PayloadOptions{})
	if err != nil {
		return err
	}
	if err := vm.CopyFile(filepath.Join(repo, "test/vm/scripts/demo.sh"), filepath.Join(payload.Dir, "demo.sh")); err != nil {
		return err
	}
	fmt.Fprintf(stderr, "demo: booting %s with an emulated TPM\n", img.Version)
	out, err := img.Run(ctx, vm.Machine{Command: "exec bash /payload/demo.sh", Payload: payload.Dir, Limit: 4 * time.Minute, Output: stdout})
	if err != nil {
		return err
	}
	if out.Status != 0 {
		return errors.New("the demonstration failed")
	}
	fmt.Fprintf(stderr, "demo: done; the machine ran for %v\n", out.Total.Round(time.Second))
	return nil
}
