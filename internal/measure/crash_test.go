package measure

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/tpmext"
)

// errCrash is what the agent would see of its own death: nothing that it does afterwards has any effect.
var errCrash = errors.New("crashed")

// What became of the step at which the agent died.
const (
	lost = "lost" // never carried out
	half = "half" // of a write
	done = "done" // carried out; nobody learned of it
)

// machine counts the steps of I/O and dies at one of them.
type machine struct {
	mu      sync.Mutex
	only    string // the steps that count; "": all
	step    int
	crashAt int // 0: never
	how     string
	name    string // of the step at which it died
	died    chan struct{}
}

func newMachine(crashAt int, how string) *machine {
	return &machine{crashAt: crashAt, how: how, died: make(chan struct{})}
}

func (m *machine) dead() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.name != ""
}

// do carries out a step; part is what half of it would be.
func (m *machine) do(name string, all, part func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.name != "" {
		return errCrash
	}
	if m.only == "" || m.only == name {
		m.step++
	}
	if m.step != m.crashAt || m.only != "" && m.only != name {
		return all()
	}
	m.name = name
	close(m.died)
	switch {
	case m.how == done:
		return errors.Join(errCrash, all())
	case m.how == half && part != nil:
		return errors.Join(errCrash, part())
	}
	return errCrash
}

type mortalFile struct {
	*os.File
	m      *machine
	synced int64
}

func (m *machine) open(path string) (File, error) {
	f := &mortalFile{m: m}
	err := m.do("open", func() (err error) {
		f.File, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err == nil {
			f.synced = f.size()
		}
		return err
	}, nil)
	if err != nil && f.File != nil {
		f.File.Close()
	}
	return f, err
}

func (f *mortalFile) size() int64 {
	st, err := f.File.Stat()
	if err != nil {
		return 0
	}
	return st.Size()
}

func (f *mortalFile) WriteAt(b []byte, off int64) (n int, err error) {
	err = f.m.do("write", func() (err error) { n, err = f.File.WriteAt(b, off); return err },
		func() (err error) { n, err = f.File.WriteAt(b[:len(b)/2], off); return err })
	return n, err
}

func (f *mortalFile) ReadAt(b []byte, off int64) (int, error) {
	if f.m.dead() {
		return 0, errCrash
	}
	return f.File.ReadAt(b, off)
}

func (f *mortalFile) Sync() error {
	return f.m.do("sync", func() error { f.synced = f.size(); return f.File.Sync() }, nil)
}

func (f *mortalFile) Truncate(size int64) error {
	return f.m.do("truncate", func() error { f.synced = min(f.synced, size); return f.File.Truncate(size) }, nil)
}

type mortalTPM struct {
	*tpmext.TPM
	m *machine
}

func (t *mortalTPM) Extend(ctx context.Context, pcr int, digests []ima.Digest) error {
	return t.m.do("extend", func() error { return t.TPM.Extend(ctx, pcr, digests) }, nil)
}

func (t *mortalTPM) Reopen(ctx context.Context) error {
	if t.m.dead() {
		return errCrash
	}
	return t.TPM.Reopen(ctx)
}

// life opens the list on a machine, appends all entries, and ends without a last word if the machine dies. It returns the names
// of the entries that were acknowledged.
func (b *bench) life(m *machine, entries []*imalog.Entry, loseUnsynced bool) (acknowledged []string) {
	b.t.Helper()
	c := b.config()
	var file *mortalFile
	c.TPM = &mortalTPM{b.tpm, m}
	c.OpenFile = func(path string) (File, error) {
		f, err := m.open(path)
		file = f.(*mortalFile)
		return f, err
	}
	l, _, err := Open(b.t.Context(), c)
	if err == nil {
		finished := make(chan struct{})
		go func() {
			select {
			case <-m.died:
				l.mu.Lock()
				l.end(errCrash)
				l.mu.Unlock()
			case <-finished:
			}
		}()
		acknowledged = appendAll(b.t.Context(), l, entries)
		close(finished)
		l.Close()
	} else if !m.dead() {
		b.t.Fatal(err)
	}
	if m.dead() && loseUnsynced && file.File != nil {
		if err := os.Truncate(filepath.Join(b.dir, LogName), file.synced); err != nil {
			b.t.Fatal(err)
		}
	}
	return acknowledged
}

// appendAll appends the first half one by one, and the second half together.
func appendAll(ctx context.Context, l *List, entries []*imalog.Entry) (acknowledged []string) {
	n := len(entries) / 2
	for _, e := range entries[:n] {
		r := l.Append(e)
		if r.Logged(ctx) == nil {
			acknowledged = append(acknowledged, e.Name())
		}
		r.Extended(ctx)
	}
	var rs []Receipt
	for _, e := range entries[n:] {
		rs = append(rs, l.Append(e))
	}
	for i, r := range rs {
		if r.Extended(ctx) == nil {
			acknowledged = append(acknowledged, entries[n+i].Name())
		}
	}
	return acknowledged
}

func someEntries(t testing.TB) []*imalog.Entry {
	var es []*imalog.Entry
	for i := range 6 {
		es = append(es, entry(t, i))
	}
	es[1] = entryOf(t, 11, "/bin/in-another-register")
	es[4] = entryOf(t, 12, "/bin/in-a-third")
	return es
}

// judge checks, after the ordinary start path: the log replays to the TPM, each entry is there once, none that was acknowledged
// lost its place to a later one.
func (b *bench) judge(entries []*imalog.Entry, acknowledged []string) {
	b.t.Helper()
	got := b.check()
	want := []string{imalog.BootAggregateName}
	for _, e := range entries {
		want = append(want, e.Name())
	}
	if !slices.Equal(got, want) {
		b.t.Errorf("entries %v, want %v", got, want)
	}
	for _, name := range acknowledged {
		if !slices.Contains(got, name) {
			b.t.Errorf("%s was acknowledged and is not there", name)
		}
	}
}

// TestCrashAtEachStep kills the agent at each step of I/O, lost or carried out and unacknowledged, with and without the page
// cache; then the ordinary start path, to which all events come again; then the oracle.
func TestCrashAtEachStep(t *testing.T) {
	var mu sync.Mutex
	met := make(map[string]int) // deaths at each step; those without one under ""
	for at := 1; met[""] == 0; at++ {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			for _, how := range []string{lost, half, done} {
				for _, loseUnsynced := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/unsynced-lost=%v", how, loseUnsynced), func(t *testing.T) {
						t.Parallel()
						step := crash(t, at, how, loseUnsynced)
						mu.Lock()
						met[step]++
						mu.Unlock()
					})
				}
			}
		})
	}
	for _, step := range []string{"open", "write", "sync", "extend"} {
		if met[step] == 0 {
			t.Errorf("step %s was never met", step)
		}
	}
}

func crash(t *testing.T, at int, how string, loseUnsynced bool) (step string) {
	b := newBench(t)
	entries := someEntries(t)
	m := newMachine(at, how)
	acknowledged := b.life(m, entries, loseUnsynced)
	if rest := b.life(newMachine(0, ""), entries, false); len(rest) != len(entries) {
		t.Errorf("after the restart only %v were acknowledged", rest)
	}
	b.judge(entries, acknowledged)
	if t.Failed() {
		t.Logf("the agent died at %q", m.name)
	}
	return m.name
}

// TestCrashInRecovery kills the agent again at each step of the restart after a crash that left half an entry, and after one that
// left entries to extend.
func TestCrashInRecovery(t *testing.T) {
	names := make(map[string]bool)
	for _, first := range []struct{ step, how string }{{"write", half}, {"sync", done}} {
		for at, met := 1, true; met; at++ {
			for _, how := range []string{lost, done} {
				b := newBench(t)
				entries := someEntries(t)
				m1 := newMachine(3, first.how)
				m1.only = first.step
				acknowledged := b.life(m1, entries, false)
				m2 := newMachine(at, how)
				acknowledged = append(acknowledged, b.life(m2, entries, false)...)
				met = m2.dead()
				names[m2.name] = true
				b.life(newMachine(0, ""), entries, false)
				b.judge(entries, acknowledged)
				b.swtpm.Kill()
				if t.Failed() {
					t.Fatalf("first %s %s, then step %d (%s) %s", m1.name, m1.how, at, m2.name, how)
				}
			}
		}
	}
	for _, step := range []string{"truncate", "extend", "write"} {
		if !names[step] {
			t.Errorf("step %s was never met in recovery", step)
		}
	}
}

// anchoredLife is a life in which the list, with entries in its old TPM, goes over to another.
func (b *bench) anchoredLife(old *bench, m *machine, entries []*imalog.Entry, loseUnsynced bool) (acknowledged []string) {
	b.t.Helper()
	c := old.config()
	var file *mortalFile
	c.OpenFile = func(path string) (File, error) {
		f, err := newMachine(0, "").open(path)
		file = f.(*mortalFile)
		return f, err
	}
	l, _ := old.open(c)
	n := len(entries) / 2
	for _, e := range entries[:n] {
		await(b.t, l.Append(e).Extended)
		acknowledged = append(acknowledged, e.Name())
	}
	file.m = m // from here on it can die
	finished := make(chan struct{})
	go func() {
		select {
		case <-m.died:
			l.mu.Lock()
			l.end(errCrash)
			l.mu.Unlock()
		case <-finished:
		}
	}()
	l.Append(entries[n])
	if _, err := l.Anchor(b.t.Context(), &mortalTPM{b.tpm, m}); err != nil && !m.dead() {
		b.t.Fatal(err)
	}
	for _, e := range entries[n:] {
		if l.Append(e).Extended(b.t.Context()) == nil {
			acknowledged = append(acknowledged, e.Name())
		}
	}
	close(finished)
	l.Close()
	if m.dead() && loseUnsynced {
		if err := os.Truncate(filepath.Join(b.dir, LogName), file.synced); err != nil {
			b.t.Fatal(err)
		}
	}
	return acknowledged
}

// TestCrashWhileAnchoring kills the agent at each step of I/O from the call on; then the ordinary start path with the new TPM, to
// which all events come again; then the oracle on the new TPM.
func TestCrashWhileAnchoring(t *testing.T) {
	met := make(map[string]int)
	for at := 1; met[""] == 0; at++ {
		for _, how := range []string{lost, half, done} {
			for _, loseUnsynced := range []bool{false, true} {
				old := newBench(t)
				b := old.another()
				entries := someEntries(t)
				m := newMachine(at, how)
				acknowledged := b.anchoredLife(old, m, entries, loseUnsynced)
				met[m.name]++
				if rest := b.life(newMachine(0, ""), entries, false); len(rest) != len(entries) {
					t.Errorf("after the restart only %v were acknowledged", rest)
				}
				b.judge(entries, acknowledged)
				old.swtpm.Kill()
				b.swtpm.Kill()
				if t.Failed() {
					t.Fatalf("the agent died at step %d, %q, %s, unsynced lost %v", at, m.name, how, loseUnsynced)
				}
			}
		}
	}
	for _, step := range []string{"write", "sync", "extend"} {
		if met[step] == 0 {
			t.Errorf("step %s was never met", step)
		}
	}
}

func entryOf(t testing.TB, pcr int, name string) *imalog.Entry {
	t.Helper()
	e, err := imalog.NewEntry(pcr, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return e
}
