package tpmshare

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

// In what order those have their turns who wait for one.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var turns turns
		if err := turns.take(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		var order []string
		var running sync.WaitGroup
		wait := func(name string, agent bool) {
			running.Go(func() {
				if err := turns.take(t.Context(), agent); err != nil {
					t.Error(err)
					return
				}
				order = append(order, name)
				turns.give()
			})
			synctest.Wait() // until it waits
		}
		wait("first client", false)
		wait("second client", false)
		var want []string
		for range agentRow + 2 {
			wait("agent", true)
		}
		for range agentRow {
			want = append(want, "agent")
		}
		want = append(want, "first client", "agent", "agent", "second client")
		turns.give()
		running.Wait()
		if !slices.Equal(order, want) {
			t.Errorf("turns %q, want %q", order, want)
		}
		if turns.held || turns.row != 0 {
			t.Errorf("at the end %+v", &turns)
		}
	})
}

func TestTurnNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var turns turns
		if err := turns.take(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error, 1)
		go func() { gone <- turns.take(ctx, false) }()
		synctest.Wait()
		cancel()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("take: %v", err)
		}
		turns.give()
		if turns.held {
			t.Error("the turn went to who does not wait any more")
		}
	})
}
