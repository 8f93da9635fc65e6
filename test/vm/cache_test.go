package vm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func testCache(t *testing.T) *Cache {
	t.Helper()
	c, err := OpenCache(t.TempDir(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestEntryIsBuiltOnce asks for one entry from many goroutines, each with a cache of its own as processes have.
func TestEntryIsBuiltOnce(t *testing.T) {
	dir := t.TempDir()
	var builds atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c, err := OpenCache(dir, t.Logf)
			if err != nil {
				t.Error(err)
				return
			}
			path, err := c.entry(t.Context(), "thing", "recipe", func(_ context.Context, dir string) error {
				builds.Add(1)
				time.Sleep(50 * time.Millisecond)
				return os.WriteFile(filepath.Join(dir, "file"), []byte("made"), 0o644)
			})
			if err != nil {
				t.Error(err)
				return
			}
			if got, err := os.ReadFile(filepath.Join(path, "file")); string(got) != "made" {
				t.Errorf("entry has %q, %v", got, err)
			}
		})
	}
	wg.Wait()
	if n := builds.Load(); n != 1 {
		t.Errorf("built %d times, want once", n)
	}
}

func TestEntryFollowsRecipe(t *testing.T) {
	c := testCache(t)
	build := func(context.Context, string) error { return nil }
	first, err := c.entry(t.Context(), "thing", "one", build)
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.entry(t.Context(), "thing", "two", build)
	if err != nil {
		t.Fatal(err)
	}
	if first == second {
		t.Error("another recipe gave the same entry")
	}
}

// TestFailedBuildLeavesNothing also checks that what a killed build left behind is not taken for an entry.
func TestFailedBuildLeavesNothing(t *testing.T) {
	c := testCache(t)
	broken := errors.New("broken")
	path, err := c.entry(t.Context(), "thing", "recipe", func(_ context.Context, dir string) error {
		return errors.Join(os.WriteFile(filepath.Join(dir, "half"), nil, 0o644), broken)
	})
	if !errors.Is(err, broken) || path != "" {
		t.Fatalf("got %q, %v; want the build's error", path, err)
	}
	path, err = c.entry(t.Context(), "thing", "recipe", func(_ context.Context, dir string) error {
		// What a build that is killed now would leave is dir itself; the next one starts with an empty folder.
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("the folder has %v from the failed build", left)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path+".partial", "stale"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	built := false
	if _, err := c.entry(t.Context(), "thing", "recipe", func(_ context.Context, dir string) error {
		built = true
		if _, err := os.Stat(filepath.Join(dir, "stale")); err == nil {
			t.Error("a killed build's file is in the new entry")
		}
		return nil
	}); err != nil || !built {
		t.Errorf("built %v, %v; want a new build", built, err)
	}
}

func TestLockWaitEndsWithContext(t *testing.T) {
	c := testCache(t)
	unlock, err := c.lock(t.Context(), "thing")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.lock(ctx, "thing"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
}

func TestPrune(t *testing.T) {
	c := testCache(t)
	build := func(context.Context, string) error { return nil }
	unused, _ := c.entry(t.Context(), "thing", "unused", build)
	recent, _ := c.entry(t.Context(), "thing", "recent", build)
	other, _ := c.entry(t.Context(), "other", "unused", build)
	old := time.Now().Add(-unusedLimit - time.Hour)
	for _, path := range []string{unused, other} {
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.entry(t.Context(), "thing", "new", build); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{unused: false, recent: true, other: true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", filepath.Base(path), err == nil, want)
		}
	}
}
