package main

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// cost is what one piece of work took.
type cost struct {
	wall time.Duration
	cpu  time.Duration // user and system, on all processors
}

// pairs measures two pieces of work in turn, each pair in the other order than the one before, so that what else the machine does
// falls on both alike. It returns what they took in each pair.
func pairs(n int, ours, theirs func() (cost, error)) (a, b []cost, err error) {
	for i := range n {
		x, y := ours, theirs
		if i%2 == 1 {
			x, y = y, x
		}
		cx, err := x()
		if err != nil {
			return nil, nil, err
		}
		cy, err := y()
		if err != nil {
			return nil, nil, err
		}
		if i%2 == 1 {
			cx, cy = cy, cx
		}
		a, b = append(a, cx), append(b, cy)
	}
	return a, b, nil
}

func wall(c cost) time.Duration { return c.wall }
func cpu(c cost) time.Duration  { return c.cpu }

// ratios divides theirs by ours, pair by pair: how many times as fast ours is.
func ratios(ours, theirs []cost, by func(cost) time.Duration) []float64 {
	r := make([]float64, len(ours))
	for i := range r {
		r[i] = float64(by(theirs[i])) / float64(by(ours[i]))
	}
	return r
}

// middle is the median.
func middle(costs []cost, by func(cost) time.Duration) time.Duration {
	var s []float64
	for _, c := range costs {
		s = append(s, float64(by(c)))
	}
	slices.Sort(s)
	return time.Duration(median(s))
}

// timed takes what f costs this process.
func timed(f func() error) (cost, error) {
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		return cost{}, err
	}
	start := time.Now()
	err := f()
	took := time.Since(start)
	if err == nil {
		err = unix.Getrusage(unix.RUSAGE_SELF, &after)
	}
	used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	return cost{wall: took, cpu: time.Duration(used)}, err
}
