package proc

import (
	"testing"
	"time"
)

// A look that hangs is left behind, some at most, and counted until it has come back.
func TestWithin(t *testing.T) {
	var b Behind
	if got, err := Within(&b, time.Minute, func() int { return 7 }); got != 7 || err != nil || b.Count() != 0 {
		t.Errorf("%d, %v, %d left behind", got, err, b.Count())
	}
	hang := make(chan struct{})
	hangs := func() int { <-hang; return 7 }
	for n := range BehindMax {
		if got, err := Within(&b, time.Millisecond, hangs); got != 0 || err != ErrHangs || b.Count() != n+1 {
			t.Fatalf("%d, %v, %d left behind", got, err, b.Count())
		}
	}
	if got, err := Within(&b, time.Minute, func() int { t.Error("it looked"); return 7 }); got != 0 || err != ErrManyHang {
		t.Errorf("%d, %v", got, err)
	}
	close(hang)
	for deadline := time.Now().Add(10 * time.Second); b.Count() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d left behind", b.Count())
		}
	}
}
