package vtpm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"imans.dev/imans-agent/internal/ima"
)

func poolConfig(t *testing.T, size int) PoolConfig {
	t.Helper()
	return PoolConfig{Dir: filepath.Join(t.TempDir(), "pool"), Size: size, Program: "swtpm", Authority: authority(t)}
}

func openPool(t *testing.T, c PoolConfig) *Pool {
	t.Helper()
	p, err := OpenPool(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// fill runs the pool; the returned function ends that.
func fill(t *testing.T, p *Pool) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func awaitReady(t *testing.T, p *Pool, n int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); p.Ready() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d are ready, want %d", p.Ready(), n)
		}
	}
}

func folders(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A pool refills itself, and what it hands out is another TPM each time, which starts where it was put.
func TestPoolRefills(t *testing.T) {
	p := openPool(t, poolConfig(t, 2))
	stop := fill(t, p)
	defer stop()
	awaitReady(t, p, 2)
	seen := make(map[string]bool)
	for range 3 {
		c := config(t)
		identity, err := p.Take(t.Context(), c.Dir)
		if err != nil {
			t.Fatal(err)
		}
		seen[identity.EK] = true
		i := start(t, c)
		t.Cleanup(func() { i.Stop() })
		if _, ek := readPublic(t, connect(t, i), EKHandle); ek != identity.EK {
			t.Errorf("endorsement key %s, want %s", ek, identity.EK)
		}
	}
	if len(seen) != 3 {
		t.Errorf("%d identities of 3 TPMs", len(seen))
	}
	awaitReady(t, p, 2)
	stop()
	if n := folders(t, p.config.Dir); n != 2 {
		t.Errorf("%d folders in the pool, want 2", n)
	}
}

// With nothing ready, and nobody who fills the pool, whoever takes makes one.
func TestPoolTakeFromEmpty(t *testing.T) {
	p := openPool(t, poolConfig(t, 0))
	c := config(t)
	if err := os.Mkdir(c.Dir, 0o700); err != nil { // an empty folder is replaced
		t.Fatal(err)
	}
	if _, err := p.Take(t.Context(), c.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Take(t.Context(), c.Dir); err == nil || !strings.Contains(err.Error(), "take another") {
		t.Errorf("taken to where one is: %v", err)
	}
	if p.Ready() != 1 {
		t.Errorf("%d are ready after a Take that failed, want the one that it made", p.Ready())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p = openPool(t, poolConfig(t, 0))
	if _, err := p.Take(ctx, config(t).Dir); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if n := folders(t, p.config.Dir); n != 0 {
		t.Errorf("%d folders are left of a Take that was cancelled", n)
	}
}

// After a crash what is whole is used, and what is not is removed, with the swtpm that is still at work in it.
func TestPoolAfterCrash(t *testing.T) {
	pc := poolConfig(t, 0)
	whole, half := filepath.Join(pc.Dir, "whole"), filepath.Join(pc.Dir, "half")
	identity := provisioned(t, Config{Program: "swtpm", Dir: whole}, pc.Authority)
	c := Config{Program: "swtpm", Dir: half, Socket: config(t).Socket}
	orphan := start(t, c)
	defer orphan.Close()
	if err := os.Remove(filepath.Join(half, recordName)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(pc.Dir, "stray"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := openPool(t, pc)
	if n := folders(t, pc.Dir); n != 1 || p.Ready() != 1 {
		t.Errorf("%d folders, %d ready; want 1 and 1", n, p.Ready())
	}
	if orphan.Running() {
		t.Error("the swtpm of the half-made TPM still runs")
	}
	got, err := p.Take(t.Context(), config(t).Dir)
	if err != nil || got.EK != identity.EK {
		t.Errorf("took %s, %v; want %s", got.EK, err, identity.EK)
	}
}

// What was made for another configuration is not handed out.
func TestPoolOfAnotherConfiguration(t *testing.T) {
	pc := poolConfig(t, 0)
	for name, change := range map[string]func(*PoolConfig){
		"banks":     func(c *PoolConfig) { c.Banks = []ima.HashAlgo{ima.SHA256} },
		"authority": func(c *PoolConfig) { c.Authority = authority(t) },
	} {
		provisioned(t, Config{Program: "swtpm", Dir: filepath.Join(pc.Dir, name)}, pc.Authority)
		changed := pc
		change(&changed)
		if p := openPool(t, changed); p.Ready() != 0 || folders(t, pc.Dir) != 0 {
			t.Errorf("%s: %d are ready of another configuration", name, p.Ready())
		}
	}
}

func TestPoolRunTellsWhatIsWrong(t *testing.T) {
	pc := poolConfig(t, 1)
	pc.Program = "swtpm-that-is-not-there"
	p := openPool(t, pc)
	if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "install the package swtpm") {
		t.Errorf("Run: %v", err)
	}
	if n := folders(t, pc.Dir); n != 0 {
		t.Errorf("%d folders are left", n)
	}
}

// A successor is not made while others are being started, unless there is none left for them.
func TestPoolAwaitsCalm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &Pool{taken: make(chan struct{}, 1), ready: []string{"one", "two"}}
		begun := time.Now()
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.awaitCalm(t.Context())
		}()
		time.Sleep(calm / 2)
		p.get()
		<-done
		if took := time.Since(begun); took != calm+calm/2 {
			t.Errorf("calm after %v, with a TPM taken after %v", took, calm/2)
		}
		p.get()
		begun = time.Now()
		p.awaitCalm(t.Context())
		if took := time.Since(begun); took != 0 {
			t.Errorf("nothing is ready, and a successor waits for %v", took)
		}
	})
}
