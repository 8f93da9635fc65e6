package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/vtpm"
)

const (
	extendPairs = 31
	extendChunk = 2000 // commands
)

// benchExtend compares a list's extending with a bare loop of the same commands, with digests made before, on a connection of
// the same kind to a TPM of the same kind, a chunk of one and a chunk of the other.
func benchExtend(ctx context.Context, dir string) ([]figure, error) {
	bare, stopBare, err := startTPM(ctx, dir, "bare")
	if err != nil {
		return nil, err
	}
	defer stopBare()
	listed, stopListed, err := startTPM(ctx, dir, "listed")
	if err != nil {
		return nil, err
	}
	defer stopListed()
	folder := filepath.Join(dir, "extended")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return nil, err
	}
	l, _, err := measure.Open(ctx, measure.Config{
		Dir: folder, PCR: 10, Template: imalog.NG, Algo: ima.SHA256, TPM: listed, Store: measure.NewStore(), Log: zap.NewNop(),
	})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	next := 0
	ours, theirs, err := pairs(extendPairs,
		func() (cost, error) {
			next += extendChunk
			return listExtends(ctx, l, next-extendChunk, next)
		},
		func() (cost, error) { return bareExtends(ctx, bare) })
	if err != nil {
		return nil, err
	}
	rate := func(c []cost) float64 { return 1 / middle(c, wall).Seconds() }
	return []figure{{
		name: "extending a list's TPM: rate to a bare loop of prepared commands", format: "%.3f", target: "at least 0.95",
		ratios: ratios(ours, theirs, wall), parts: fmt.Sprintf("%.0f : %.0f a second", rate(ours), rate(theirs)),
	}}, nil
}

// bareExtends returns what one command took.
func bareExtends(ctx context.Context, t *tpmext.TPM) (cost, error) {
	var digests []ima.Digest
	for _, b := range t.Banks() {
		digests = append(digests, makeEntry(0).ExtendDigest(b))
	}
	start := time.Now()
	for range extendChunk {
		if err := t.Extend(ctx, 10, digests); err != nil {
			return cost{}, err
		}
	}
	return cost{wall: time.Since(start) / extendChunk}, nil
}

// listExtends hands in entries of some numbers and returns what one extend took, once all were in the log: from there on only
// the TPM is waited for. What it got before counts for neither side.
func listExtends(ctx context.Context, l *measure.List, from, to int) (cost, error) {
	entries := make([]*imalog.Entry, 0, to-from)
	for i := from; i < to; i++ {
		entries = append(entries, makeEntry(i))
	}
	for _, e := range entries {
		l.Append(e)
	}
	if err := l.Barrier(ctx); err != nil {
		return cost{}, err
	}
	before, start := l.Status().Extended, time.Now()
	if err := l.Settle(ctx); err != nil {
		return cost{}, err
	}
	took := time.Since(start)
	n := l.Status().Extended - before
	if n < extendChunk/4 {
		return cost{}, fmt.Errorf("only %d of %d extends were left when the log was synced: the disk is too slow for this", n, to-from)
	}
	return cost{wall: took / time.Duration(n)}, nil
}

// startTPM starts a swtpm and connects.
func startTPM(ctx context.Context, dir, name string) (*tpmext.TPM, func(), error) {
	i, err := vtpm.Start(ctx, vtpm.Config{Program: "swtpm", Dir: filepath.Join(dir, name), Socket: filepath.Join(dir, name+".s")})
	if err != nil {
		return nil, nil, err
	}
	t, err := tpmext.Open(ctx, i.Address())
	if err != nil {
		i.Stop()
		return nil, nil, err
	}
	return t, func() { t.Close(); i.Stop() }, nil
}
