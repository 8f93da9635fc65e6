//go:build vm

package loader

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
)

const testPins = "/sys/fs/bpf/imans-test"

func open(t *testing.T, o Options) *Kernel {
	t.Helper()
	if o.PinDir == "" {
		o.PinDir = testPins
	}
	if o.RingSize == 0 {
		o.RingSize = 1 << 20
	}
	k, err := Open(o)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	return k
}

// program copies /bin/true to a new inode with content of its own.
func program(t *testing.T, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, path...)
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

func execs(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command(path).CombinedOutput(); err != nil {
		t.Fatalf("run %s: %v %s", path, err, out)
	}
}

// files drains the ring and returns the file events of one path.
func files(t *testing.T, k *Kernel, path string) []*event.File {
	t.Helper()
	var found []*event.File
	for b := k.Next(); b != nil; b = k.Next() {
		r, err := event.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if f, ok := r.(*event.File); ok && f.Path == path {
			found = append(found, f)
		}
	}
	k.Commit()
	return found
}

func TestKernelExecEvent(t *testing.T) {
	k := open(t, Options{KernelDigest: true})
	defer Unload(testPins)
	defer k.Close()
	judgeAll(t, k)
	for _, dir := range []string{"/root", "/tmp"} {
		path := filepath.Join(dir, "imans-exec")
		sum := program(t, path)
		defer os.Remove(path)
		execs(t, path)
		got := files(t, k, path)
		if len(got) == 0 {
			t.Fatalf("%s: no event", path)
		}
		f := got[0]
		if f.Func != ima.BPRMCheck || string(f.Digest.Bytes()) != string(sum[:]) {
			t.Errorf("%s: %v, digest %v want %x, errno %d", path, f.Func, f.Digest, sum, f.Errno)
		}
		if f.Content.Size == 0 || f.Content.Ino == 0 || time.Since(f.Content.Ctime()) > time.Hour {
			t.Errorf("%s: content %+v", path, f.Content)
		}
		execs(t, path)
		again := files(t, k, path)
		if len(again) == 0 {
			t.Fatalf("%s: no event the second time, though nothing was marked", path)
		}
		for _, f := range again {
			if _, err := k.MarkMeasured(f.MeasuredKey()); err != nil {
				t.Fatal(err)
			}
		}
		execs(t, path)
		if got := files(t, k, path); len(got) != 0 {
			t.Errorf("%s: %d events after it was marked as measured: %+v", path, len(got), got[0])
		}
		program(t, path)
		os.Chmod(path, 0o700)
		execs(t, path)
		if got := files(t, k, path); len(got) == 0 {
			t.Errorf("%s: no event after it changed", path)
		}
	}
}

// judgeAll gives each namespace a policy that names no id.
func judgeAll(t *testing.T, k *Kernel) {
	t.Helper()
	if _, err := k.Tasks(); err != nil {
		t.Fatal(err)
	}
	known, err := k.Registered()
	if err != nil {
		t.Fatal(err)
	}
	for ns, parent := range known {
		if err := k.SetPolicy(ns, parent, Policy{Generation: ns.ID, IgnoreIDs: true}); err != nil {
			t.Fatal(err)
		}
	}
}

// A mark counts for the subject it was made for where rules name ids, and for everyone where none does. All are forgotten at once.
func TestKernelMarks(t *testing.T) {
	k := open(t, Options{KernelDigest: true})
	defer Unload(testPins)
	defer k.Close()
	judgeAll(t, k)
	path := "/root/imans-marks"
	program(t, path)
	defer os.Remove(path)
	known, err := k.Registered()
	if err != nil {
		t.Fatal(err)
	}
	as := func(uid string) []*event.File {
		if out, err := exec.Command("setpriv", "--reuid="+uid, path).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		return files(t, k, path)
	}
	if err := os.Chmod("/root", 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod("/root", 0o700)
	for _, c := range []struct {
		ignoreIDs bool
		another   int // events of another subject once the first one's are marked
	}{{true, 0}, {false, 2}} {
		for ns, parent := range known {
			if err := k.SetPolicy(ns, parent, Policy{Generation: 1000 + ns.ID, IgnoreIDs: c.ignoreIDs}); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range as("0") {
			if _, err := k.MarkMeasured(f.MeasuredKey()); err != nil {
				t.Fatal(err)
			}
		}
		if got := as("0"); len(got) != 0 {
			t.Errorf("ignore ids %v: %d events of a marked content", c.ignoreIDs, len(got))
		}
		if got := as("65534"); len(got) < c.another || c.another == 0 && len(got) != 0 {
			t.Errorf("ignore ids %v: %d events of another subject, want %d", c.ignoreIDs, len(got), c.another)
		}
		if err := k.ForgetAll(); err != nil {
			t.Fatal(err)
		}
		if got := as("0"); len(got) == 0 {
			t.Errorf("ignore ids %v: no event after all was forgotten", c.ignoreIDs)
		}
	}
}

// Whoever waits is woken by a record, not before, and by the end of the context.
func TestKernelWait(t *testing.T) {
	k := open(t, Options{})
	defer Unload(testPins)
	defer k.Close()
	files(t, k, "")
	ctx, cancel := context.WithCancel(context.Background())
	woken := make(chan error, 1)
	go func() { woken <- k.Wait(ctx) }()
	select {
	case err := <-woken:
		t.Fatalf("woken by nothing: %v, backlog %d", err, k.Backlog())
	case <-time.After(300 * time.Millisecond):
	}
	execs(t, "/bin/true")
	if err := <-woken; err != nil || k.Backlog() == 0 {
		t.Fatalf("woken by a record: %v, backlog %d", err, k.Backlog())
	}
	if err := k.Wait(ctx); err != nil {
		t.Errorf("records waiting: %v", err)
	}
	files(t, k, "")
	go func() { woken <- k.Wait(ctx) }()
	cancel()
	if err := <-woken; err != nil {
		t.Errorf("ended by the context: %v", err)
	}
}

func TestKernelAdoption(t *testing.T) {
	k := open(t, Options{KernelDigest: true})
	defer Unload(testPins)
	if k.Origin() != Loaded {
		t.Fatalf("origin %v, want loaded", k.Origin())
	}
	k.Close()
	path := "/root/imans-adopt"
	program(t, path)
	defer os.Remove(path)
	execs(t, path)
	k = open(t, Options{KernelDigest: true})
	if k.Origin() != Adopted {
		t.Fatalf("origin %v, want adopted", k.Origin())
	}
	if len(files(t, k, path)) == 0 {
		t.Error("an exec while no agent ran left no event")
	}
	k.Close()
	if err := os.Remove(testPins + "/link_imans_mmap_file"); err != nil {
		t.Fatal(err)
	}
	k = open(t, Options{KernelDigest: true})
	if k.Origin() != Replaced {
		t.Errorf("origin %v of a partial set, want replaced", k.Origin())
	}
	k.Close()
	k = open(t, Options{KernelDigest: false})
	if k.Origin() != Replaced {
		t.Errorf("origin %v of another build, want replaced", k.Origin())
	}
	k.Close()
	if err := Unload(testPins); err != nil {
		t.Fatal(err)
	}
	k = open(t, Options{})
	if k.Origin() != Loaded {
		t.Errorf("origin %v after unload, want loaded", k.Origin())
	}
	k.Close()
}

func TestKernelNamespaces(t *testing.T) {
	k := open(t, Options{})
	defer Unload(testPins)
	defer k.Close()
	tasks, err := k.Tasks()
	if err != nil {
		t.Fatal(err)
	}
	var native event.MountNS
	for _, task := range tasks {
		if task.Process.PID == 1 {
			native = task.NS
		}
	}
	if native.IsZero() || native.ID == 0 {
		t.Fatalf("process 1's namespace is %v of %d tasks", native, len(tasks))
	}
	known, err := k.Registered()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := known[native]; !ok {
		t.Errorf("native namespace %v is not registered: %v", native, known)
	}
	if out, err := exec.Command("unshare", "-m", "/bin/true").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	births, deaths := map[event.MountNS]event.MountNS{}, map[event.MountNS]bool{}
	deadline := time.Now().Add(5 * time.Second)
	for len(deaths) == 0 && time.Now().Before(deadline) {
		for b := k.Next(); b != nil; b = k.Next() {
			r, err := event.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			switch r := r.(type) {
			case *event.Birth:
				births[r.NS] = r.Parent
			case *event.Death:
				deaths[r.NS] = true
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	k.Commit()
	if len(births) != 1 || len(deaths) != 1 {
		t.Fatalf("births %v, deaths %v", births, deaths)
	}
	for ns, parent := range births {
		if parent != native || !deaths[ns] {
			t.Errorf("namespace %v: parent %v, want %v; deaths %v", ns, parent, native, deaths)
		}
	}
}

func TestKernelLossIsCounted(t *testing.T) {
	k := open(t, Options{RingSize: uint32(os.Getpagesize())})
	defer Unload(testPins)
	defer k.Close()
	for range 20 {
		execs(t, "/bin/true")
	}
	losses, err := k.Losses()
	if err != nil {
		t.Fatal(err)
	}
	var lost uint64
	for key, n := range losses {
		if key.Reason != event.LossRingBufferFull || key.NS.IsZero() {
			t.Errorf("%+v lost %d", key, n)
		}
		lost += n
	}
	if lost == 0 {
		t.Error("no loss was counted with a ring buffer of one page")
	}
}

// Where there are too many counters a loss is counted for no namespace.
func TestKernelLossIsCountedWithoutRoom(t *testing.T) {
	k := open(t, Options{RingSize: uint32(os.Getpagesize())})
	defer Unload(testPins)
	defer k.Close()
	m := k.maps[imansMapLosses]
	for i := range m.MaxEntries() {
		if err := m.Put(rawLossKey{ID: uint64(i) + 1<<40, Reason: 1}, uint64(0)); errors.Is(err, unix.E2BIG) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		execs(t, "/bin/true")
	}
	losses, err := k.Losses()
	if err != nil {
		t.Fatal(err)
	}
	if losses[LossKey{Reason: event.LossRingBufferFull}] == 0 {
		t.Errorf("nothing was counted for no namespace: %v", losses)
	}
	var count uint64
	if err := m.Lookup(rawLossKey{Reason: uint32(event.LossWriterLost)}, &count); err != nil {
		t.Errorf("the counter of writers: %v", err)
	}
}

// Both ends find the same slot: a mark that is in none of the hash maps any more is still found, until it is forgotten.
func TestKernelMarkIsFoundInItsSlot(t *testing.T) {
	k := open(t, Options{KernelDigest: true})
	defer Unload(testPins)
	defer k.Close()
	judgeAll(t, k)
	for _, path := range []string{"/root/imans-slot", "/tmp/imans-slot"} {
		program(t, path)
		defer os.Remove(path)
		execs(t, path)
		var keys []event.MeasuredKey
		for _, f := range files(t, k, path) {
			keys = append(keys, f.MeasuredKey())
			if _, err := k.MarkMeasured(f.MeasuredKey()); err != nil {
				t.Fatal(err)
			}
		}
		if err := k.empty(true); err != nil {
			t.Fatal(err)
		}
		execs(t, path)
		if got := files(t, k, path); len(keys) == 0 || len(got) != 0 {
			t.Errorf("%s: %d marks, %d events though they are in their slots", path, len(keys), len(got))
		}
		for _, key := range keys {
			at := &k.slots.table[slotOf(key.Content)]
			at.sequence |= 1 // as a writer leaves it that was killed
		}
		execs(t, path)
		if got := files(t, k, path); len(got) != len(keys) {
			t.Errorf("%s: %d events of %d while their slots are being written", path, len(got), len(keys))
		}
		for _, key := range keys {
			if _, err := k.MarkMeasured(key); err != nil {
				t.Fatal(err)
			}
		}
		if err := k.Forget(keys); err != nil {
			t.Fatal(err)
		}
		execs(t, path)
		if got := files(t, k, path); len(got) != len(keys) {
			t.Errorf("%s: %d events of %d after all was forgotten", path, len(got), len(keys))
		}
	}
}

// A map of marks that is full is emptied in one pass, and whoever marks is told, so that nobody keeps what is gone.
func TestKernelMarksFull(t *testing.T) {
	k := open(t, Options{})
	defer Unload(testPins)
	defer k.Close()
	for _, ignored := range []bool{true, false} {
		key := event.MeasuredKey{Content: event.MeasuredContent{Policy: 1, Func: 4}}
		if ignored {
			key.Content.Func |= uint32(event.IDsIgnored) << 8
		}
		m, _ := k.marks(key)
		filling := time.Now()
		for i := range m.MaxEntries() {
			key.Content.Ino = uint64(i)
			if done, err := k.MarkMeasured(key); err != nil || done != (Marked{New: true}) {
				t.Fatalf("mark %d: %+v, %v", i, done, err)
			}
		}
		if done, err := k.MarkMeasured(key); err != nil || done != (Marked{}) {
			t.Errorf("a second time: %+v, %v", done, err)
		}
		key.Content.Ino = 1 << 32
		began := time.Now()
		if done, err := k.MarkMeasured(key); err != nil || done != (Marked{New: true, Emptied: true}) {
			t.Errorf("one too many: %+v, %v", done, err)
		}
		took, filled := time.Since(began), began.Sub(filling)
		t.Logf("filled in %v, emptied in %v", filled, took)
		if took > filled/3 {
			t.Error("want a third of it at most")
		}
		keys := 0
		for raw, err := m.NextKeyBytes(nil); raw != nil || err != nil; raw, err = m.NextKeyBytes(raw) {
			if keys++; err != nil {
				t.Fatal(err)
			}
		}
		if keys != 1 {
			t.Errorf("%d marks, want the last alone", keys)
		}
	}
}

// Of two programs at a function the one that stands in runs second, and has nothing to do where the first was not skipped.
func TestKernelStandsInSecond(t *testing.T) {
	k := open(t, Options{})
	defer Unload(testPins)
	defer k.Close()
	for range 20 { // each of another pid, which no word is left of
		if out, err := exec.Command("unshare", "--mount", "sh", "-c", ": >"+filepath.Join(t.TempDir(), "written")).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	missed, stoodIn := stoodInFor(t, k)
	if t.Logf("skipped %d times, stood in for %d times", missed, stoodIn); stoodIn != uint32(missed) {
		t.Error("want as often")
	}
}

// Many tasks do the same at once, more than there are processors: on a preemptible kernel some are interrupted in the program.
func TestKernelSkippedProgramIsMadeUpFor(t *testing.T) {
	k := open(t, Options{RingSize: 1 << 26})
	defer Unload(testPins)
	defer k.Close()
	dir := t.TempDir()
	for name, do := range map[string]func(i int) error{
		"writers": func(i int) error {
			fd, err := unix.Open(filepath.Join(dir, strconv.Itoa(i)), unix.O_CREAT|unix.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			return unix.Close(fd)
		},
		"namespaces": func(int) error { return unix.Unshare(unix.CLONE_NEWNS) },
	} {
		var tasks sync.WaitGroup
		end := time.Now().Add(3 * time.Second)
		for i := range 16 {
			tasks.Go(func() {
				runtime.LockOSThread() // and never unlocked
				for time.Now().Before(end) {
					if err := do(i); err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			})
		}
		tasks.Wait()
		missed, stoodIn := stoodInFor(t, k)
		t.Logf("%s: skipped %d times, stood in for %d times", name, missed, stoodIn)
	}
	losses, err := k.Losses()
	if err != nil {
		t.Fatal(err)
	}
	missed, _ := stoodInFor(t, k)
	for key, n := range losses { // now and then both are skipped, and that is told
		if key.NS != (event.MountNS{}) || key.Reason != event.LossProgramSkipped && key.Reason != event.LossWriterLost || n > missed/20 {
			t.Errorf("%d of %v, skipped %d times", n, key, missed)
		}
	}
}

// stoodInFor returns how often programs were skipped so far, and how often others stood in for one.
func stoodInFor(t *testing.T, k *Kernel) (missed uint64, stoodIn uint32) {
	t.Helper()
	if len(k.losses.skippable) != len(functions) {
		t.Fatalf("%d programs can be skipped, want %d", len(k.losses.skippable), len(functions))
	}
	for name, p := range k.losses.skippable {
		m, s, err := k.losses.madeUpFor(name, p)
		if err != nil {
			t.Fatal(err)
		}
		if int32(s-uint32(m)) > 0 {
			t.Errorf("%s was skipped %d times and stood in for %d times", name, m, s)
		}
		missed, stoodIn = missed+m, stoodIn+s
	}
	return missed, stoodIn
}

// The verifier gives up at a million instructions, and each takes time at every load. Older ones follow more ways to the same place.
func TestKernelProgramsAreVerifiedQuickly(t *testing.T) {
	k := open(t, Options{})
	defer Unload(testPins)
	defer k.Close()
	for name, l := range k.links {
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		pi, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		n, ok := pi.VerifiedInstructions()
		t.Logf("%s: %d", name, n)
		if !ok || n > 50000 {
			t.Errorf("%s: the verifier looked at %d instructions, want at most 50000", name, n)
		}
	}
}
