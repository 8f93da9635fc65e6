package namespace

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/event"
)

func TestHeld(t *testing.T) {
	dir := t.TempDir()
	open := func() *held {
		t.Helper()
		h, err := openHeld(dir)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	a, b, c := event.Inode{Dev: 1, Ino: 2}, event.Inode{Dev: 1, Generation: 7, Ino: 2}, event.Inode{Dev: 3, Ino: 1 << 40}
	long := strings.Repeat("n", 70000)
	h := open()
	for _, one := range []struct {
		inode event.Inode
		name  string
	}{{a, "/another/name"}, {b, long}, {a, "/usr/bin/a"}, {a, "/usr/bin/a"}, {c, ""}} {
		if err := h.add(one.inode, one.name); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.drop(c); err != nil {
		t.Fatal(err)
	}
	check := func(h *held) {
		t.Helper()
		for inode, want := range map[event.Inode]string{a: "/usr/bin/a", b: long[:heldNameMax-1]} {
			if name, ok, err := h.name(inode); !ok || err != nil || name != want {
				t.Errorf("%v is %.20q, %v, %v", inode, name, ok, err)
			}
		}
		for _, inode := range []event.Inode{c, {}} {
			if name, ok, err := h.name(inode); ok || err != nil {
				t.Errorf("%v is held as %q, %v", inode, name, err)
			}
		}
	}
	check(h)
	check(open())

	// A crash in the middle of a record.
	f, err := os.OpenFile(h.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(strings.Repeat("\x01\x00\x00\x00", 5)); err != nil {
		t.Fatal(err)
	}
	f.Close()
	h = open()
	check(h)
	if err := h.add(c, "/c"); err != nil {
		t.Fatal(err)
	}
	if name, ok, err := open().name(c); name != "/c" || !ok || err != nil {
		t.Errorf("after a crash: %q, %v, %v", name, ok, err)
	}
	// No room on the disk: it is held as long as the agent lives.
	path := h.path
	h.path = dir + "/missing/folder"
	if err := h.add(event.Inode{Ino: 9}, "/kept"); err == nil {
		t.Error("nothing was wrong")
	}
	if name, ok, err := h.name(event.Inode{Ino: 9}); name != "/kept" || !ok || err != nil {
		t.Errorf("without room: %q, %v, %v", name, ok, err)
	}
	if err := h.drop(event.Inode{Ino: 9}); err == nil {
		t.Error("nothing was wrong")
	}
	if name, ok, err := h.name(event.Inode{Ino: 9}); ok || err != nil {
		t.Errorf("dropped, it is held as %q, %v", name, err)
	}
	h.path = path
	if err := os.WriteFile(h.path, make([]byte, 3), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.name(c); err == nil {
		t.Error("a changed file was believed")
	}
}

// However often names change, the file is not much larger than what it tells.
func TestHeldStaysSmall(t *testing.T) {
	dir := t.TempDir()
	h, err := openHeld(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{strings.Repeat("a", 4000), strings.Repeat("b", 4000)}
	one, other := event.Inode{Dev: 1, Ino: 1}, event.Inode{Dev: 1, Ino: 2}
	most := int64(0)
	for i := range 1000 {
		if err := errors.Join(h.add(one, names[i%2]), h.add(other, "/other"), h.drop(other)); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(h.path)
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, st.Size())
	}
	if most > 100<<10 {
		t.Errorf("a file of up to %d bytes for one name of 4000", most)
	}
	if h, err = openHeld(dir); err != nil {
		t.Fatal(err)
	}
	if name, ok, err := h.name(one); name != names[1] || !ok || err != nil || len(h.at) != 1 || h.live != 4020 {
		t.Errorf("%.20q, %v, %v of %d inodes, %d bytes", name, ok, err, len(h.at), h.live)
	}
}

// What is written anew has the names that had no room before; where it can't be written, what was there is still right.
func TestHeldWrittenAnew(t *testing.T) {
	dir := t.TempDir()
	h, err := openHeld(dir)
	if err != nil {
		t.Fatal(err)
	}
	inode := func(i int) event.Inode { return event.Inode{Dev: 1, Ino: uint64(i)} }
	for i := range 10 {
		if err := h.add(inode(i), fmt.Sprint("/", i)); err != nil {
			t.Fatal(err)
		}
	}
	check := func(first int) {
		t.Helper()
		for i := range 11 {
			name, ok, err := h.name(inode(i))
			if held := i >= first; ok != held || err != nil || held && name != fmt.Sprint("/", i) {
				t.Errorf("%d: %q, %v, %v", i, name, ok, err)
			}
		}
	}
	path := h.path
	h.path = dir + "/missing/folder"
	if err := h.add(inode(10), "/10"); err == nil {
		t.Error("nothing was wrong")
	}
	h.path = path
	if err := os.Mkdir(path+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := h.dropFirst(2); err == nil {
		t.Error("nothing was wrong")
	}
	check(2)
	if err := h.dropFirst(3); err != nil {
		t.Fatal(err)
	}
	check(5)
	if h, err = openHeld(dir); err != nil {
		t.Fatal(err)
	}
	check(5)

	// No agent writes one so large.
	if err := os.Truncate(path, heldFileMax+(1<<20)); err != nil {
		t.Fatal(err)
	}
	if _, err := openHeld(dir); err == nil || !strings.Contains(err.Error(), "more than an agent writes") {
		t.Errorf("a file of %d bytes: %v", heldFileMax+(1<<20), err)
	}
}

// A file that can't be written anew grows no more from some size on; what comes is held all the same.
func TestHeldThatCanNotBeWrittenAnew(t *testing.T) {
	dir := t.TempDir()
	h, err := openHeld(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(h.path+".new/full", 0o700); err != nil {
		t.Fatal(err)
	}
	one := event.Inode{Dev: 1, Ino: 1}
	if err := h.add(one, "/first"); err != nil {
		t.Fatal(err)
	}
	h.size = heldFileMax
	if err := h.add(one, "/second"); err == nil {
		t.Error("nothing was wrong")
	}
	if name, ok, err := h.name(one); name != "/second" || !ok || err != nil {
		t.Errorf("%q, %v, %v", name, ok, err)
	}
}
