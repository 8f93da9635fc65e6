package measure

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// numbered makes the n-th of many different entries, as long as usual ones.
func numbered(tb testing.TB, n int) *imalog.Entry {
	tb.Helper()
	var sum [32]byte
	binary.LittleEndian.PutUint64(sum[:], uint64(n)+1)
	d, err := ima.NewDigest(ima.SHA256, sum[:])
	if err != nil {
		tb.Fatal(err)
	}
	name := fmt.Sprintf("/usr/lib/x86_64-linux-gnu/lib-%08d.so", n)
	e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: d, Name: name})
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

// bareLoop extends n times by go-tpm alone.
func bareLoop(tb testing.TB, t transport.TPM, banks []ima.HashAlgo, n int) time.Duration {
	tb.Helper()
	algorithms := map[ima.HashAlgo]tpm2.TPMAlgID{
		ima.SHA1: tpm2.TPMAlgSHA1, ima.SHA256: tpm2.TPMAlgSHA256, ima.SHA384: tpm2.TPMAlgSHA384, ima.SHA512: tpm2.TPMAlgSHA512,
	}
	cmd := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(16), Auth: tpm2.PasswordAuth(nil)}}
	for _, bank := range banks {
		cmd.Digests.Digests = append(cmd.Digests.Digests, tpm2.TPMTHA{HashAlg: algorithms[bank], Digest: make([]byte, bank.Size())})
	}
	begun := time.Now()
	for range n {
		if _, err := cmd.Execute(t); err != nil {
			tb.Fatal(err)
		}
	}
	return time.Since(begun)
}

// preparedLoop extends n times with digests that are there already.
func (b *bench) preparedLoop(n int) time.Duration {
	b.t.Helper()
	var ds []ima.Digest
	for _, bank := range b.tpm.Banks() {
		ds = append(ds, ima.ZeroDigest(bank))
	}
	begun := time.Now()
	for range n {
		if err := b.tpm.Extend(b.t.Context(), 16, ds); err != nil {
			b.t.Fatal(err)
		}
	}
	return time.Since(begun)
}

// listLoop appends n entries from number first on, and waits until they are extended.
func (b *bench) listLoop(l *List, first, n int) time.Duration {
	b.t.Helper()
	entries := make([]*imalog.Entry, n)
	for i := range entries {
		entries[i] = numbered(b.t, first+i)
	}
	begun := time.Now()
	for _, e := range entries {
		l.Append(e)
	}
	await(b.t, l.Settle)
	return time.Since(begun)
}

// TestExtendRate: a list extends at 95 % or more of the rate of a bare loop of go-tpm on the same connection. The rounds
// alternate, and the best of each counts, so that what else the machine does matters little.
func TestExtendRate(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	const n = 1000
	bare, list := time.Hour, time.Hour
	for round := range 5 {
		bare = min(bare, bareLoop(t, b.tpm, b.tpm.Banks(), n))
		list = min(list, b.listLoop(l, round*n, n))
	}
	l.Close()
	t.Logf("bare loop %v, list %v each: %.2f of its rate", bare/n, list/n, bare.Seconds()/list.Seconds())
	if bare.Seconds() < 0.95*list.Seconds() {
		t.Errorf("a list extends in %v, a bare loop in %v each", list/n, bare/n)
	}
}

func BenchmarkExtend(b *testing.B) {
	bench := newBench(b)
	l, _ := bench.open(bench.config())
	defer l.Close()
	const n = 2000
	var bare, prepared, list time.Duration
	done := 0
	for b.Loop() {
		bare += bareLoop(b, bench.tpm, bench.tpm.Banks(), n)
		prepared += bench.preparedLoop(n)
		list += bench.listLoop(l, done, n)
		done += n
	}
	b.ReportMetric(float64(list.Nanoseconds())/float64(done), "ns/entry")
	b.ReportMetric(bare.Seconds()/list.Seconds(), "of-go-tpm-loop")
	b.ReportMetric(prepared.Seconds()/list.Seconds(), "of-prepared-loop")
}

// sink is a log that is never read: it takes all and keeps nothing.
type sink struct{}

func (sink) ReadAt([]byte, int64) (int, error)      { return 0, io.EOF }
func (sink) WriteAt(b []byte, _ int64) (int, error) { return len(b), nil }
func (sink) Truncate(int64) error                   { return nil }
func (sink) Sync() error                            { return nil }
func (sink) Stat() (os.FileInfo, error)             { return nil, os.ErrInvalid }
func (sink) Fd() uintptr                            { return ^uintptr(0) }
func (sink) Close() error                           { return nil }

// memoryPerEntry hands n entries to each of some lists, as a chain of namespaces does, and returns the heap's growth in bytes
// by entry.
func memoryPerEntry(tb testing.TB, lists, n int) float64 {
	tb.Helper()
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	store := NewStore()
	var chain []*List
	for range lists {
		l, _, err := Open(tb.Context(), Config{
			PCR: 10, Template: imalog.NG, Algo: ima.SHA256, Store: store, Log: zap.NewNop(),
			OpenFile: func(string) (File, error) { return sink{}, nil },
		})
		if err != nil {
			tb.Fatal(err)
		}
		chain = append(chain, l)
	}
	for i := range n {
		e := numbered(tb, i)
		for _, l := range chain {
			l.Append(e)
		}
	}
	for _, l := range chain {
		await(tb, l.Settle)
		if s := l.Status(); s.Entries != n+1 {
			tb.Fatalf("%d entries, want %d", s.Entries, n+1)
		}
	}
	perEntry := float64(heap()-before) / float64(n)
	for _, l := range chain {
		l.Close()
	}
	if store.Len() != 0 {
		tb.Errorf("%d entries of no list are left", store.Len())
	}
	return perEntry
}

// TestMemoryPerEntry holds a smaller number of entries to the target for a million.
func TestMemoryPerEntry(t *testing.T) {
	for _, lists := range []int{1, 32} {
		got := memoryPerEntry(t, lists, 40000)
		t.Logf("%d lists: %.0f bytes of heap for each entry", lists, got)
		if got > 200 {
			t.Errorf("%d lists: %.0f bytes of heap for each entry, want at most 200", lists, got)
		}
	}
}

func BenchmarkMemoryPerEntry(b *testing.B) {
	for _, lists := range []int{1, 32} {
		b.Run(fmt.Sprintf("lists=%d", lists), func(b *testing.B) {
			for b.Loop() {
				b.ReportMetric(memoryPerEntry(b, lists, 1_000_000), "heap-B/entry")
			}
		})
	}
}

// BenchmarkRecovery opens a list of 100,000 entries that are all extended.
func BenchmarkRecovery(b *testing.B) {
	bench := newBench(b)
	l, _ := bench.open(bench.config())
	const n = 100_000
	for i := range n {
		l.Append(numbered(b, i))
	}
	if err := l.Settle(b.Context()); err != nil {
		b.Fatal(err)
	}
	l.Close()
	for b.Loop() {
		l, r := bench.open(bench.config())
		if r.Entries != n+1 || r.Unextended != 0 {
			b.Fatalf("%+v", r)
		}
		l.Close()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/entry")
}
