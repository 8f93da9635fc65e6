package ima

import (
	"fmt"
	"testing"
)

// FuzzParseDigest: a digest that is taken is written as it is read.
func FuzzParseDigest(f *testing.F) {
	f.Add("sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709")
	f.Add("sha256:00")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDigest(text)
		if err != nil {
			return
		}
		if again, err := ParseDigest(d.String()); err != nil || again != d {
			t.Fatalf("%q is %v; read again %v, %v", text, d, again, err)
		}
	})
}

// FuzzParseIDMap: an id that a map gives the host's is given back.
func FuzzParseIDMap(f *testing.F) {
	f.Add([]byte("         0          0 4294967295\n"), uint32(7))
	f.Add([]byte("0 100000 65536\n65536 1 1\n"), uint32(65536))
	f.Fuzz(func(t *testing.T, text []byte, id uint32) {
		m, err := ParseIDMap(text)
		if err != nil {
			return
		}
		for _, r := range m {
			if again, err := ParseIDMap(fmt.Appendf(nil, "%d %d %d\n", r.Inside, r.Outside, r.Count)); err != nil || again[0] != r {
				t.Fatalf("%v read again: %v, %v", r, again, err)
			}
		}
		if outside := m.ToHost(id); len(m) == 1 && outside != NoID && m.FromHost(outside) != id {
			t.Fatalf("%v: %d is %d outside, and that is %d", m, id, outside, m.FromHost(outside))
		}
	})
}
