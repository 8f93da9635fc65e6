package ima

import "testing"

func TestParseIDMap(t *testing.T) {
	m, err := ParseIDMap([]byte("         0     100000       1000\n      1000       1000          1\n"))
	if err != nil || len(m) != 2 || m[0] != (IDRange{0, 100000, 1000}) || m[1] != (IDRange{1000, 1000, 1}) {
		t.Errorf("%v, %v", m, err)
	}
	if m, err := ParseIDMap(nil); err != nil || len(m) != 0 {
		t.Errorf("one that is not written yet: %v, %v", m, err)
	}
	if m, err := ParseIDMap([]byte("0 x 1\n")); err == nil {
		t.Errorf("no number: %v", m)
	}
}

func TestIDMap(t *testing.T) {
	m := IDMap{{Inside: 0, Outside: 100000, Count: 1000}, {Inside: 1000, Outside: 1000, Count: 1}, {Inside: 4294967000, Outside: 5, Count: 100}}
	for _, c := range []struct{ inside, outside uint32 }{
		{0, 100000}, {999, 100999}, {1000, 1000}, {4294967000, 5}, {4294967099, 104},
	} {
		if got := m.ToHost(c.inside); got != c.outside {
			t.Errorf("ToHost(%d) = %d, want %d", c.inside, got, c.outside)
		}
		if got := m.FromHost(c.outside); got != c.inside {
			t.Errorf("FromHost(%d) = %d, want %d", c.outside, got, c.inside)
		}
	}
	for _, id := range []uint32{1001, 4294967100, 4294966999, NoID} {
		if got := m.ToHost(id); got != NoID {
			t.Errorf("ToHost(%d) = %d, want none", id, got)
		}
	}
	for _, id := range []uint32{0, 4, 105, 99999, 101000, NoID} {
		if got := m.FromHost(id); got != NoID {
			t.Errorf("FromHost(%d) = %d, want none", id, got)
		}
	}
	if id := InitialIDs().FromHost(NoID - 1); id != NoID-1 {
		t.Errorf("the initial map has no id %d: %d", NoID-1, id)
	}
	if id := (IDMap)(nil).FromHost(0); id != NoID {
		t.Errorf("the empty map has an id: %d", id)
	}
}
