package namespace

import "testing"

// What an agent told of a record before it died, the next one does not tell again; what it did not get to, it tells.
func TestTold(t *testing.T) {
	h := newHost(t, "")
	h.measure("/first")
	tell := func(sequence uint64, name string, want bool) {
		t.Helper()
		e, err := h.s.newViolation(name)
		if err != nil {
			t.Fatal(err)
		}
		receipt, appended := h.s.tell(sequence, e)
		if appended != want {
			t.Fatalf("record %d, %s: appended %t, want %t", sequence, name, appended, want)
		}
		if appended {
			if err := receipt.Logged(soon(t)); err != nil {
				t.Fatal(err)
			}
		}
	}
	tell(5, "/a", true)
	tell(5, "/b", true)
	tell(6, "/a", true)
	// The agent dies after the note of one more, and before its entry.
	e, err := h.s.newViolation("/never")
	if err != nil {
		t.Fatal(err)
	}
	key := toldKey{7, 1}
	if err := h.s.told.note(key, h.s.list.Accepted()); err != nil {
		t.Fatal(err)
	}
	h.restart("")
	tell(5, "/a", false)
	tell(5, "/b", false)
	tell(6, "/a", false)
	if _, appended := h.s.tell(7, e); !appended {
		t.Error("what was noted and not logged is not told")
	}
	tell(8, "/a", true)
	if err := h.tree.CaughtUp(); err != nil {
		t.Fatal(err)
	}
	tell(5, "/a", true) // another kernel side's numbers
	h.restart("")
	tell(5, "/a", false)
	if n := h.s.list.Status().Violations; n != 6 {
		t.Errorf("%d violations, want 6", n)
	}
}

// Violations of records that are given back are not noted any longer; of those that an earlier agent may have left they are.
func TestToldStaysSmall(t *testing.T) {
	h := newHost(t, "")
	h.measure("/first")
	e, err := h.s.newViolation("/a")
	if err != nil {
		t.Fatal(err)
	}
	tell := func(first, n uint64) {
		for i := range n {
			h.s.tell(first+i, e)
		}
		if err := h.tree.Finish(); err != nil {
			t.Fatal(err)
		}
	}
	tell(0, 5000)
	if err := h.s.list.Barrier(soon(t)); err != nil {
		t.Fatal(err)
	}
	if h.s.told.size != 5000*toldSize {
		t.Errorf("before it has caught up: %d bytes", h.s.told.size)
	}
	h.restart("")
	if _, appended := h.s.tell(4999, e); appended {
		t.Error("a violation is told twice")
	}
	if err := h.tree.CaughtUp(); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(10) {
		tell(10000*(i+1), 1000)
		if size := h.s.told.size; size > toldEnough+1000*toldSize {
			t.Fatalf("%d bytes", size)
		}
	}
}
