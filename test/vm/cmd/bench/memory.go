package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
)

// benchMemory takes the memory of entries that a chain of 32 lists holds.
func benchMemory(ctx context.Context, dir string) ([]figure, error) {
	const entries, lists = 100_000, 32
	fig := figure{name: fmt.Sprintf("memory of %d entries in %d lists", entries, lists), format: "%.0f bytes an entry", target: "at most 200 bytes"}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	store := measure.NewStore()
	var chain []*measure.List
	for i := range lists {
		folder := filepath.Join(dir, fmt.Sprintf("memory%d", i))
		if err := os.Mkdir(folder, 0o700); err != nil {
			return nil, err
		}
		l, _, err := measure.Open(ctx, measure.Config{Dir: folder, PCR: 10, Template: imalog.NG, Algo: ima.SHA256, Store: store, Log: zap.NewNop()})
		if err != nil {
			return nil, err
		}
		chain = append(chain, l)
	}
	for i := range entries {
		e := makeEntry(i)
		for _, l := range chain {
			l.Append(e)
		}
		if i%4096 == 0 {
			for _, l := range chain {
				if err := l.Barrier(ctx); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, l := range chain {
		if err := l.Barrier(ctx); err != nil {
			return nil, err
		}
	}
	fig.ratios = []float64{float64(heap()-before) / entries}
	for i, l := range chain {
		if err := l.Close(); err != nil {
			return nil, err
		}
		os.RemoveAll(filepath.Join(dir, fmt.Sprintf("memory%d", i)))
	}
	fig.parts = "heap after garbage collection"
	return []figure{fig}, nil
}
