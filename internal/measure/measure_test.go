package measure

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/tpmext/tpmtest"
)

// bench is a folder with a real swtpm beside it.
type bench struct {
	t     testing.TB
	dir   string
	swtpm *tpmtest.Swtpm
	tpm   *tpmext.TPM
}

func newBench(t testing.TB) *bench {
	t.Helper()
	return benchOf(t, tpmtest.Start(t))
}

func benchOf(t testing.TB, swtpm *tpmtest.Swtpm) *bench {
	t.Helper()
	tpm, err := tpmext.Open(t.Context(), swtpm.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm.Close() })
	return &bench{t, t.TempDir(), swtpm, tpm}
}

func (b *bench) config() Config {
	return Config{
		Dir: b.dir, PCR: 10, Template: imalog.NG, Algo: ima.SHA256, TPM: b.tpm, Store: NewStore(),
		Log: zap.NewNop(),
	}
}

func (b *bench) open(c Config) (*List, Recovery) {
	b.t.Helper()
	l, r, err := Open(b.t.Context(), c)
	if err != nil {
		b.t.Fatal(err)
	}
	return l, r
}

func entry(t testing.TB, n int) *imalog.Entry {
	t.Helper()
	d, err := ima.NewDigest(ima.SHA256, bytes.Repeat([]byte{byte(n + 1)}, 32))
	if err != nil {
		t.Fatal(err)
	}
	e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: d, Name: fmt.Sprintf("/bin/program-%d", n)})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func violation(t testing.TB) *imalog.Entry {
	t.Helper()
	e, err := imalog.NewViolation(10, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: "/lost"})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// check is the oracle: it reads the log's file anew, replays it, and compares with what the TPM says of every register.
func (b *bench) check() []string {
	b.t.Helper()
	f, err := os.Open(filepath.Join(b.dir, LogName))
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	r := imalog.NewReader(f, ima.SHA1)
	replay := imalog.NewReplay(b.tpm.Banks()...)
	var names []string
	for {
		e, err := r.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			b.t.Fatal(err)
		}
		replay.Extend(e)
		names = append(names, e.Name())
	}
	for pcr := range 17 {
		held, err := b.tpm.ReadPCR(b.t.Context(), pcr)
		if err != nil {
			b.t.Fatal(err)
		}
		for bank, v := range held {
			if replay.Value(pcr, bank) != v {
				b.t.Errorf("%s: PCR %d is %v, the log replays to %v", bank, pcr, v, replay.Value(pcr, bank))
			}
		}
	}
	return names
}

func await(t testing.TB, wait func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := wait(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestListKeepsOrderAndDropsDuplicates(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	for i := range 600 {
		if e := entry(t, i%300); l.Holds(e) != (i >= 300) {
			t.Fatalf("entry %d is said to be held: %v", i, l.Holds(e))
		}
		l.Append(entry(t, i%300))
	}
	l.Append(violation(t))
	await(t, l.Append(violation(t)).Extended)
	s := l.Status()
	if s.Entries != 303 || s.Extended != 303 || s.Violations != 2 {
		t.Errorf("status %+v, want 1 + 300 + 2 entries", s)
	}
	names := b.check()
	if names[0] != imalog.BootAggregateName || names[1] != "/bin/program-0" || names[300] != "/bin/program-299" {
		t.Errorf("order: %s, %s … %s", names[0], names[1], names[300])
	}
	r, n, err := l.Reader(299)
	if err != nil || n != 4 {
		t.Fatalf("%d entries from 299, %v", n, err)
	}
	if e, err := r.Next(); err != nil || e.Name() != "/bin/program-298" {
		t.Errorf("entry 299 is %v, %v", e, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(entry(t, 999)).Logged(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
}

func TestRecoveryContinuesTheList(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	await(t, l.Append(entry(t, 1)).Extended)
	l.Close()
	c := b.config()
	c.TPM = nil // an agent that logs and never gets to extend
	l, _ = b.open(c)
	await(t, l.Append(entry(t, 2)).Logged)
	await(t, l.Append(violation(t)).Logged)
	l.Close()
	l, r := b.open(b.config())
	if r.Entries != 4 || r.Unextended != 2 {
		t.Errorf("recovery %+v, want 4 entries, 2 of them not extended", r)
	}
	await(t, l.Append(entry(t, 1)).Extended)
	await(t, l.Append(entry(t, 3)).Extended)
	l.Close()
	if names := b.check(); len(names) != 5 {
		t.Errorf("entries %v, want the duplicate known from before the restart", names)
	}
}

func TestRecoveryOfDamagedLogs(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(b []byte) []byte
		want   error
		keep   int
	}{
		"cut in the last entry":     {func(b []byte) []byte { return append(b, b[:20]...) }, nil, 3},
		"an extended entry cut off": {func(b []byte) []byte { return b[:len(b)-5] }, ErrDiverged, 0},
		"a byte of a name changed":  {func(b []byte) []byte { b[len(b)-3] ^= 1; return b }, ErrAltered, 0},
		"a length changed":          {func(b []byte) []byte { b[24+6] = 0xff; return b }, ErrAltered, 0},
		"emptied":                   {func([]byte) []byte { return nil }, ErrForeign, 0},
		"an entry of ours inserted": {func(b []byte) []byte { return append(b[:len(b):len(b)], b...) }, nil, 6},
		"two valid entries swapped": {swapLastTwo, ErrDiverged, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			l, _ := b.open(b.config())
			l.Append(entry(t, 1))
			await(t, l.Append(entry(t, 2)).Extended)
			l.Close()
			path := filepath.Join(b.dir, LogName)
			log, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			log = c.damage(log)
			if err := os.WriteFile(path, log, 0o600); err != nil {
				t.Fatal(err)
			}
			l, _, err = Open(t.Context(), b.config())
			if !errors.Is(err, c.want) {
				t.Fatalf("Open: %v, want %v", err, c.want)
			}
			if c.want != nil {
				if now, _ := os.ReadFile(path); !bytes.Equal(now, log) {
					t.Error("the log was changed though it was refused")
				}
				return
			}
			await(t, l.Append(entry(t, 1)).Extended)
			if s := l.Status(); s.Entries != c.keep {
				t.Errorf("%d entries, want %d", s.Entries, c.keep)
			}
			l.Close()
			b.check()
		})
	}
}

// swapLastTwo exchanges two entries of the same length.
func swapLastTwo(b []byte) []byte {
	r := imalog.NewReader(bytes.NewReader(b), ima.SHA1)
	var at []int64
	for {
		if _, err := r.Next(); err != nil {
			break
		}
		at = append(at, r.Offset())
	}
	n := len(at)
	swapped := append([]byte(nil), b[:at[n-2]]...)
	swapped = append(swapped, b[at[n-1]:]...)
	return append(swapped, b[at[n-2]:at[n-1]]...)
}

func TestListWithoutTPM(t *testing.T) {
	b := newBench(t)
	c := b.config()
	c.TPM = nil
	l, _ := b.open(c)
	await(t, l.Append(entry(t, 1)).Extended)
	r, _, err := l.Reader(0)
	if err != nil {
		t.Fatal(err)
	}
	e, err := r.Next()
	if err != nil || e.Name() != imalog.BootAggregateName || !e.FileDigest().IsZero() {
		t.Errorf("first entry %v, %v", e, err)
	}
	l.Close()
}

func TestStoreSharesAndForgets(t *testing.T) {
	s := NewStore()
	var a, b bitmap
	for i := range 1000 {
		k := key{byte(i), byte(i >> 8)}
		id, added := s.add(&a, k)
		again, twice := s.add(&a, k)
		other, addedToOther := s.add(&b, k)
		if !added || twice || !addedToOther || again != id || other != id {
			t.Fatalf("add: %d %v, %d %v, %d %v", id, added, again, twice, other, addedToOther)
		}
	}
	if s.Len() != 1000 {
		t.Errorf("%d entries for two lists of the same 1000", s.Len())
	}
	s.release(&a)
	if s.Len() != 1000 {
		t.Errorf("%d entries left while the other list holds them", s.Len())
	}
	s.release(&b)
	if s.Len() != 0 {
		t.Errorf("%d entries left of no list", s.Len())
	}
	if _, added := s.add(&a, key{1}); !added || len(s.keys) != 1000 {
		t.Errorf("an id was not reused: %d keys", len(s.keys))
	}
}

// The file system fills up, then has room again.
func TestFullDiskIsWaitedOut(t *testing.T) {
	b := newBench(t)
	c := b.config()
	full := &faults{failures: map[string]int{}}
	c.OpenFile = full.open
	l, _ := b.open(c)
	await(t, l.Append(entry(t, 1)).Extended)
	full.fail("write", 3)
	r := l.Append(entry(t, 2))
	await(t, r.Extended)
	if full.left("write") != 0 {
		t.Error("the fault was never met")
	}
	l.Close()
	if names := b.check(); len(names) != 3 {
		t.Errorf("entries %v", names)
	}
}

// TestFailedSyncIsWrittenAnew: after a sync that did not succeed the kernel may have marked as clean what is not on the disk. So all of it
// is written again, and nothing of it is extended before.
func TestFailedSyncIsWrittenAnew(t *testing.T) {
	b := newBench(t)
	c := b.config()
	faulty := &faults{failures: map[string]int{}, cause: syscall.EIO}
	var written, synced atomic.Int64 // bytes: of writes since the last sync that succeeded; up to which it did
	c.OpenFile = func(path string) (File, error) {
		f, err := faulty.open(path)
		return &forgetful{f.(*faultyFile), &written, &synced}, err
	}
	c.TPM = &afterSync{b.tpm, t, filepath.Join(b.dir, LogName), &synced}
	l, _ := b.open(c)
	await(t, l.Settle)
	await(t, l.Append(entry(t, 1)).Extended)
	faulty.fail("sync", 3)
	r := l.Append(entry(t, 2))
	for l.Status().LogError == nil && faulty.left("sync") > 0 {
		time.Sleep(time.Millisecond)
	}
	await(t, r.Extended)
	if s := l.Status(); s.LogError != nil || s.Fatal != nil {
		t.Errorf("afterwards: %+v", s)
	}
	l.Close()
	if names := b.check(); len(names) != 3 {
		t.Errorf("entries %v", names)
	}
}

// forgetful is a log whose pages are clean after a sync, whether it succeeded or not.
type forgetful struct {
	*faultyFile
	written, synced *atomic.Int64
}

func (f *forgetful) WriteAt(b []byte, off int64) (int, error) {
	n, err := f.faultyFile.WriteAt(b, off)
	f.written.Store(off + int64(n))
	return n, err
}

func (f *forgetful) Sync() error {
	err := f.faultyFile.Sync()
	if dirty := f.written.Swap(0); err == nil && dirty > 0 {
		f.synced.Store(dirty)
	}
	return err
}

// afterSync is a TPM that looks, before each extend, whether the whole log is on the disk.
type afterSync struct {
	*tpmext.TPM
	t      *testing.T
	path   string
	synced *atomic.Int64
}

func (a *afterSync) Extend(ctx context.Context, pcr int, digests []ima.Digest) error {
	if st, err := os.Stat(a.path); err != nil || st.Size() > a.synced.Load() {
		a.t.Errorf("extended while %d bytes are on the disk: %v, %v", a.synced.Load(), st, err)
	}
	return a.TPM.Extend(ctx, pcr, digests)
}

// TestRecoveredIsSyncedFirst: what an agent wrote and did not sync, or could not, is written anew and synced before it is extended.
func TestRecoveredIsSyncedFirst(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	await(t, l.Append(entry(t, 1)).Extended)
	l.Close()
	path := filepath.Join(b.dir, LogName)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, entry(t, 2).AppendBinary(before, ima.SHA1), 0o600); err != nil {
		t.Fatal(err)
	}
	c := b.config()
	faulty := &faults{failures: map[string]int{"sync": 1}, cause: syscall.EIO}
	c.OpenFile = faulty.open
	if _, _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), "dmesg") {
		t.Errorf("opened with a disk that does not sync: %v", err)
	}
	var written, synced atomic.Int64
	c = b.config()
	c.OpenFile = func(path string) (File, error) {
		f, err := faulty.open(path)
		return &forgetful{f.(*faultyFile), &written, &synced}, err
	}
	c.TPM = &afterSync{b.tpm, t, path, &synced}
	l, r := b.open(c)
	if r.Unextended != 1 {
		t.Errorf("recovered %+v", r)
	}
	await(t, l.Settle)
	l.Close()
	if names := b.check(); len(names) != 3 {
		t.Errorf("entries %v", names)
	}
}
