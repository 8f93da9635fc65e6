package namespace

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/proc"
)

func TestAllowance(t *testing.T) {
	var a allowance
	now := time.Now()
	limit := func(after, want time.Duration) {
		t.Helper()
		now = now.Add(after)
		if got := a.limit(now); got != want {
			t.Errorf("limit %v, want %v", got, want)
		}
	}
	limit(0, lookFree+allowanceMax)
	a.spend(lookFree / 2) // which is free
	limit(0, lookFree+allowanceMax)
	a.spend(lookFree + 20*time.Second)
	limit(0, lookFree+allowanceMax-20*time.Second)
	limit(8*time.Second, lookFree+allowanceMax-18*time.Second)
	a.spend(time.Hour)
	limit(0, lookFree)
	limit(time.Hour, lookFree+allowanceMax)
}

// A container's looks are of one allowance, whichever of its namespaces they are for, and of another than its neighbours'.
func TestAllowanceOfContainer(t *testing.T) {
	native := &State{}
	container, other := &State{parent: native}, &State{parent: native}
	below := &State{parent: &State{parent: container}}
	if below.allowance() != &container.looks || container.allowance() != &container.looks || other.allowance() == &container.looks || native.allowance() != &native.looks {
		t.Error("the allowances are not the containers'")
	}
}

func TestLookWithin(t *testing.T) {
	a := allowance{at: time.Now()} // nothing is left
	if got, err := lookWithin(&a, func(context.Context) (int, error) { return 7, nil }); got != 7 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
	cause := errors.New("unreadable")
	if _, err := lookWithin(&a, func(context.Context) (int, error) { return 0, cause }); err != cause {
		t.Errorf("%v, want %v", err, cause)
	}
	_, err := lookWithin(&a, func(ctx context.Context) (int, error) {
		<-ctx.Done()
		return 0, context.Cause(ctx)
	})
	if !errors.Is(err, os.ErrDeadlineExceeded) || a.behind.Count() != 0 {
		t.Errorf("a long one: %v, %d left behind", err, a.behind.Count())
	}
	hang := make(chan struct{})
	hangs := func(context.Context) (int, error) { <-hang; return 0, nil }
	for range proc.BehindMax {
		if _, err := lookWithin(&a, hangs); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("one that hangs: %v", err)
		}
	}
	began := time.Now()
	if _, err := lookWithin(&a, hangs); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > lookFree {
		t.Errorf("with too many that hang: %v after %v", err, time.Since(began))
	}
	close(hang)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := lookWithin(&a, func(context.Context) (int, error) { return 0, nil }); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("when they have come back: %v", err)
		}
	}
}
