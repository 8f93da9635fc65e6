package namespace

import (
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
