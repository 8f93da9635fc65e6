package namespace

import (
	"testing"
	"time"
)

func TestLatencies(t *testing.T) {
	l := newLatencies()
	if got := l.get(); got != (Latency{}) {
		t.Errorf("of nothing: %+v", got)
	}
	for i := range 1000 {
		l.note(time.Duration(i+1) * time.Millisecond)
	}
	got := l.get()
	near := func(d, want time.Duration) bool { return d >= want && d <= want+want/10 }
	if got.Count != 1000 || got.Max != time.Second || !near(got.P50, 500*time.Millisecond) || !near(got.P99, 990*time.Millisecond) {
		t.Errorf("%+v", got)
	}
	l.note(-time.Second) // a clock that is no clock
	if got := l.get(); got.Count != 1001 || got.Max != time.Second {
		t.Errorf("%+v", got)
	}
}
