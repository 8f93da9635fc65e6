package namespace

import (
	"context"
	"math"
	"sync"
	"time"

	"imans.dev/imans-agent/internal/measure"
)

// Latency is how long it took from a kernel hook until the entry was in the machine's TPM, since the agent's start: the time in which code
// runs whose measurement nothing anchors yet. A percentile is at most a tenth above what it was.
type Latency struct {
	Count         uint64 // entries that were timed
	P50, P99, Max time.Duration
}

const (
	// latencyMax bounds how many entries are timed at once; further ones are not timed.
	latencyMax = 65536
	// latencySteps is how many classes there are for a doubling of the time.
	latencySteps = 8
)

// latencies times entries of one list, one after the other as they are extended.
type latencies struct {
	mu      sync.Mutex
	waiting chan timed
	classes map[int]uint64 // by the logarithm of the time, in steps
	count   uint64
	max     time.Duration
}

// timed is an entry on its way, and when its hook ran, since boot.
type timed struct {
	receipt measure.Receipt
	hook    time.Duration
}

func newLatencies() *latencies {
	return &latencies{waiting: make(chan timed, latencyMax), classes: make(map[int]uint64)}
}

// add has an entry timed. It never waits.
func (l *latencies) add(r measure.Receipt, hook time.Duration) {
	select {
	case l.waiting <- timed{r, hook}:
	default:
	}
}

// run times entries until ctx ends.
func (l *latencies) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case t := <-l.waiting:
			if t.receipt.Extended(ctx) == nil {
				l.note(sinceBoot() - t.hook)
			}
		}
	}
}

func (l *latencies) note(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.classes[int(math.Ceil(math.Log2(float64(max(d, 1)))*latencySteps))]++
	l.count++
	l.max = max(l.max, d)
}

// get returns what was found so far.
func (l *latencies) get() Latency {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Latency{Count: l.count, P50: l.percentile(0.50), P99: l.percentile(0.99), Max: l.max}
}

// percentile returns the upper end of the class in which a part of all entries ends.
func (l *latencies) percentile(part float64) time.Duration {
	lowest := math.MaxInt
	for c := range l.classes {
		lowest = min(lowest, c)
	}
	seen, want := uint64(0), uint64(math.Ceil(part*float64(l.count)))
	for c := lowest; seen < want; c++ {
		if seen += l.classes[c]; seen >= want {
			return min(l.max, time.Duration(math.Exp2(float64(c)/latencySteps)))
		}
	}
	return 0
}
