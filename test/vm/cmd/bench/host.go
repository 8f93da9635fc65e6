package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/verify"
	"imans.dev/imans-agent/internal/vtpm"
)

const rounds = 5

// benchHash compares the agent's hashing of a large file with SHA-256 of the same bytes in memory.
func benchHash(_ context.Context, dir string) ([]figure, error) {
	content := make([]byte, 256<<20)
	for i := range content {
		content[i] = byte(i * 7)
	}
	path := filepath.Join(dir, "large")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(path)
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		return nil, err
	}
	ev := &event.File{Path: path, Content: event.Content{
		Dev: st.Dev_major<<20 | st.Dev_minor, Ino: st.Ino, Size: st.Size, CtimeSec: st.Ctime.Sec, CtimeNsec: st.Ctime.Nsec}}
	fig := figure{name: "hashing a 256 MiB file: speed to plain SHA-256 in memory", format: "%.3f", target: "at least 0.95"}
	for range rounds {
		start := time.Now()
		if _, err := digest.Sum(f, ev, ima.SHA256); err != nil {
			return nil, err
		}
		ours := time.Since(start)
		start = time.Now()
		sha256.Sum256(content)
		plain := time.Since(start)
		fig.ratios = append(fig.ratios, float64(plain)/float64(ours))
		fig.parts = fmt.Sprintf("%.0f : %.0f MB/s", 268.4/ours.Seconds(), 268.4/plain.Seconds())
	}
	return []figure{fig}, nil
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

func makeEntry(n int) *imalog.Entry {
	sum := sha256.Sum256([]byte(fmt.Sprint(n)))
	d, err := ima.NewDigest(ima.SHA256, sum[:])
	if err != nil {
		panic(err)
	}
	e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: d, Name: fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libsomething-%d.so.1", n)})
	if err != nil {
		panic(err)
	}
	return e
}

// benchExtend compares a list's extending with a bare loop of the same commands, with digests made before, on a connection of
// the same kind.
func benchExtend(ctx context.Context, dir string) ([]figure, error) {
	const n = 20_000
	fig := figure{name: "extending a list's TPM: rate to a bare loop of prepared commands", format: "%.3f", target: "at least 0.95"}
	for round := range rounds {
		bare, stopBare, err := startTPM(ctx, dir, fmt.Sprintf("bare%d", round))
		if err != nil {
			return nil, err
		}
		listed, stopListed, err := startTPM(ctx, dir, fmt.Sprintf("listed%d", round))
		if err != nil {
			stopBare()
			return nil, err
		}
		bareTime, err := bareExtends(ctx, bare, n)
		var listTime time.Duration
		if err == nil {
			listTime, err = listExtends(ctx, listed, filepath.Join(dir, fmt.Sprintf("list%d", round)), n)
		}
		stopBare()
		stopListed()
		if err != nil {
			return nil, err
		}
		fig.ratios = append(fig.ratios, float64(bareTime)/float64(listTime))
		fig.parts = fmt.Sprintf("%.0f : %.0f a second", n/listTime.Seconds(), n/bareTime.Seconds())
	}
	return []figure{fig}, nil
}

func bareExtends(ctx context.Context, t *tpmext.TPM, n int) (time.Duration, error) {
	var digests []ima.Digest
	for _, b := range t.Banks() {
		digests = append(digests, makeEntry(0).ExtendDigest(b))
	}
	start := time.Now()
	for range n {
		if err := t.Extend(ctx, 10, digests); err != nil {
			return 0, err
		}
	}
	return time.Since(start), nil
}

func listExtends(ctx context.Context, t *tpmext.TPM, dir string, n int) (time.Duration, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, err
	}
	l, _, err := measure.Open(ctx, measure.Config{
		Dir: dir, PCR: 10, Template: imalog.NG, Algo: ima.SHA256, TPM: t, Store: measure.NewStore(), Log: zap.NewNop(),
	})
	if err != nil {
		return 0, err
	}
	entries := make([]*imalog.Entry, n)
	for i := range entries {
		entries[i] = makeEntry(i)
	}
	for _, e := range entries {
		l.Append(e)
	}
	if err := l.Barrier(ctx); err != nil {
		return 0, err
	}
	// From here on only the TPM is waited for; what it got while the log was written counts for neither side.
	before, start := l.Status().Extended, time.Now()
	if err := l.Settle(ctx); err != nil {
		return 0, err
	}
	each := time.Since(start) / time.Duration(l.Status().Extended-before)
	return each * time.Duration(n), l.Close()
}

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

// benchReplay compares verifying a list with evmctl's replay of the same list.
func benchReplay(ctx context.Context, dir string) ([]figure, error) {
	const n = 100_000
	var list []byte
	replay := imalog.NewReplay(ima.SHA1, ima.SHA256)
	first, err := imalog.BootAggregate(10, imalog.NG, ima.ZeroDigest(ima.SHA256))
	if err != nil {
		return nil, err
	}
	for i := range n {
		e := first
		if i > 0 {
			e = makeEntry(i)
		}
		list = e.AppendBinary(list, ima.SHA1)
		replay.Extend(e)
	}
	path := filepath.Join(dir, "list")
	if err := os.WriteFile(path, list, 0o600); err != nil {
		return nil, err
	}
	args := []string{"ima_measurement", "--ignore-violations"}
	values := map[int]map[ima.HashAlgo]ima.Digest{10: {}}
	for _, bank := range replay.Banks() {
		values[10][bank] = replay.Value(10, bank)
		var text []byte
		for pcr := range 24 {
			text = fmt.Appendf(text, "PCR-%02d: %x\n", pcr, replay.Value(pcr, bank).Bytes())
		}
		file := filepath.Join(dir, "pcrs-"+bank.String())
		if err := os.WriteFile(file, text, 0o600); err != nil {
			return nil, err
		}
		args = append(args, "--pcrs", bank.String()+","+file)
	}
	fig := figure{name: fmt.Sprintf("verifying %d entries, SHA-1 and SHA-256: speed to evmctl", n), format: "%.1f times", target: "at least 10 times"}
	for range rounds {
		start := time.Now()
		r, err := verify.List(bytes.NewReader(list), verify.Options{PCRs: values})
		if err == nil {
			err = r.Err()
		}
		if err != nil {
			return nil, err
		}
		ours := time.Since(start)
		start = time.Now()
		if out, err := exec.CommandContext(ctx, "evmctl", append(args, path)...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("evmctl: %w\n%s", err, out)
		}
		theirs := time.Since(start)
		fig.ratios = append(fig.ratios, float64(theirs)/float64(ours))
		fig.parts = fmt.Sprintf("%v : %v", ours.Round(time.Millisecond), theirs.Round(time.Millisecond))
	}
	return []figure{fig}, nil
}
