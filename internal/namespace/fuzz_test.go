package namespace

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/policy"
)

func fuzzFile(t *testing.T, name string, content []byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// FuzzHeld: whatever a crash left of which inodes a list tells of, the next agent reads the part that is whole, each name of it, and what is
// added to it is there for the one after.
func FuzzHeld(f *testing.F) {
	dir := f.TempDir()
	h, err := openHeld(dir)
	if err != nil {
		f.Fatal(err)
	}
	one := event.Inode{Dev: 1, Ino: 2}
	for _, do := range []func() error{
		func() error { return h.add(one, "/usr/bin/one") }, func() error { return h.add(event.Inode{Dev: 1, Ino: 3}, "") }, func() error { return h.drop(one) },
	} {
		if err := do(); err != nil {
			f.Fatal(err)
		}
	}
	whole, err := os.ReadFile(filepath.Join(dir, heldName))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:len(whole)-3])
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := fuzzFile(t, heldName, content)
		h, err := openHeld(dir)
		if err != nil {
			t.Fatal(err)
		}
		for inode := range h.at {
			if _, ok, err := h.name(inode); !ok || err != nil {
				t.Fatalf("the name of %v: %v, %v", inode, ok, err)
			}
		}
		added := event.Inode{Dev: 9, Generation: 9, Ino: 9}
		if err := h.add(added, "/added"); err != nil {
			t.Fatal(err)
		}
		again, err := openHeld(dir)
		if err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(again.at, h.at) {
			t.Fatalf("read again: %v, was %v", again.at, h.at)
		}
		if name, _, err := again.name(added); name != "/added" || err != nil {
			t.Fatalf("added and read again: %q, %v", name, err)
		}
	})
}

// FuzzTold: whatever a crash left of what violations a list told, the next agent reads and adds to.
func FuzzTold(f *testing.F) {
	f.Add(make([]byte, toldSize))
	f.Add(make([]byte, 2*toldSize-1))
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := fuzzFile(t, toldName, content)
		told, err := openTold(dir, true)
		if err != nil {
			t.Fatal(err)
		}
		key := toldKey{1 << 40, 7}
		if err := told.note(key, 12); err != nil {
			t.Fatal(err)
		}
		again, err := openTold(dir, true)
		if err != nil || again.before[key] != 12 || len(again.before) > len(content)/toldSize+1 {
			t.Fatalf("read again: %v, %v", again, err)
		}
	})
}

// FuzzState: a namespace's record is taken, and then recorded as it was, or refused.
func FuzzState(f *testing.F) {
	rules, err := policy.Parse("seed", []byte("measure func=BPRM_CHECK uid=7\n"))
	if err != nil {
		f.Fatal(err)
	}
	s := &State{tree: New(Config{Log: zap.NewNop()}), ns: event.MountNS{Inum: 7, ID: 8}, template: "ima-ng", algo: 4, own: true, policy: rules, given: 2}
	b, err := json.Marshal(s.description())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"inum":1,"id":2,"hash":"sha1","template":"ima","attached":{"vtpm":{},"binding":"AA=="}}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		left, err := leftStates(fuzzFile(t, filepath.Join("one", stateFileName), content))
		if err != nil {
			return
		}
		for ns, file := range left {
			s := &State{tree: New(Config{NSPolicy: &policy.Policy{}, Log: zap.NewNop()}), ns: ns}
			if s.restore(file) != nil {
				continue
			}
			b, err := json.Marshal(s.description())
			if err != nil {
				t.Fatal(err)
			}
			var again stateFile
			if err := json.Unmarshal(b, &again); err != nil {
				t.Fatal(err)
			}
			s = &State{tree: s.tree, ns: ns}
			if err := s.restore(again); err != nil {
				t.Fatalf("recorded as %s, and refused: %v", b, err)
			}
		}
	})
}

// FuzzLossName: a name that is taken for that of lost events is the one that those have.
func FuzzLossName(f *testing.F) {
	f.Add(lossName(event.LossNotGated, event.MountNS{Inum: 7, ID: 8}, 9))
	f.Add("imans-lost/vtpm_lost/1:2/3")
	f.Add("/bin/true")
	f.Fuzz(func(t *testing.T, name string) {
		key, count, ok := parseLossName(name)
		if !ok {
			return
		}
		if again, n, ok := parseLossName(lossName(key.Reason, key.NS, count)); !ok || again != key || n != count {
			t.Fatalf("%q is %v, %d; written and read again %v, %d, %v", name, key, count, again, n, ok)
		}
	})
}
