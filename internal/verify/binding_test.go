package verify

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

func keyName(c string) binding.Name { return binding.Name("\x00\x0b" + strings.Repeat(c, 32)) }

func attachOf(id binding.ID, ak binding.Name) *binding.Attach {
	return &binding.Attach{ID: id, TPM: binding.TPM20, Way: binding.Proxy, PCR: 10, Container: "c1", EK: keyName("e"), AK: ak}
}

func endOf(id binding.ID) *binding.End {
	return &binding.End{ID: id, Cause: binding.Ended, Entries: 5, Values: []ima.Digest{ima.ZeroDigest(ima.SHA256)}}
}

// bound makes the entry of a binding, with PCR and name.
func bound(t testing.TB, pcr int, name string, of interface{ Encode() ([]byte, error) }) *imalog.Entry {
	t.Helper()
	b, err := of.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return buffer(t, pcr, name, b)
}

func buffer(t testing.TB, pcr int, name string, b []byte) *imalog.Entry {
	t.Helper()
	e, err := imalog.NewBuffer(pcr, name, ima.SHA256, b)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Bindings are told with their ends, and proven as far as the values cover their entries.
func TestBindings(t *testing.T) {
	first, second, other := binding.ID{Inum: 7, NSID: 70, Number: 1}, binding.ID{Inum: 7, NSID: 70, Number: 2}, binding.ID{Inum: 8, NSID: 80, Number: 1}
	list := entries(t, 1, nil)
	list = append(list,
		bound(t, 10, binding.AttachName, attachOf(first, keyName("1"))),  // 2
		bound(t, 11, binding.AttachName, attachOf(other, keyName("3"))),  // 3
		bound(t, 10, binding.EndName, endOf(first)),                      // 4
		bound(t, 10, binding.AttachName, attachOf(second, keyName("2"))), // 5
	)
	values := after(list, allBanks(), 10)
	trailing := append(list[:len(list):len(list)], bound(t, 10, binding.EndName, endOf(second))) // 6
	for _, c := range []struct {
		name                string
		list                []*imalog.Entry
		values              pcrs
		proven              [3]bool // first, other, second
		second              bool    // has ended
		vouchesAny, vouches [3]bool
	}{
		{"values of PCR 10", list, values, [3]bool{true, false, true}, false, [3]bool{false, true, true}, [3]bool{false, false, true}},
		{"no values", list, nil, [3]bool{}, false, [3]bool{false, true, true}, [3]bool{}},
		{"an end behind what is proven", trailing, values, [3]bool{true, false, true}, true, [3]bool{false, true, false}, [3]bool{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := List(bytes.NewReader(encode(c.list, ima.SHA1)), Options{PCRs: c.values})
			if err := errors.Join(err, r.Err()); err != nil || len(r.Bindings) != 3 {
				t.Fatalf("%d bindings, %v", len(r.Bindings), err)
			}
			for i, b := range r.Bindings {
				if want := []binding.ID{first, other, second}[i]; b.ID != want || b.Entry != []int{2, 3, 5}[i] || b.Proven != c.proven[i] {
					t.Errorf("binding %d is %+v", i, b)
				}
				if got := [2]bool{r.VouchesFor(b.AK, false), r.VouchesFor(b.AK, true)}; got != [2]bool{c.vouchesAny[i], c.vouches[i]} {
					t.Errorf("vouches for %v: %v", b.ID, got)
				}
			}
			if e := r.Bindings[0].End; e == nil || e.Entry != 4 || e.Proven != c.proven[0] || e.Cause != binding.Ended || e.Entries != 5 {
				t.Errorf("first end %+v", e)
			}
			if e := r.Bindings[2].End; (e != nil) != c.second || e != nil && e.Proven {
				t.Errorf("second end %+v", e)
			}
			if r.VouchesFor("", false) || r.VouchesFor(keyName("9"), false) {
				t.Error("vouches for a key that is in no entry")
			}
		})
	}
}

// A TPM 1.2 has no Names: a binding without one vouches for no key.
func TestBindingWithoutNames(t *testing.T) {
	a := attachOf(binding.ID{Inum: 7, NSID: 70, Number: 1}, "")
	a.TPM, a.EK = binding.TPM12, ""
	list := append(entries(t, 0, nil), bound(t, 10, binding.AttachName, a))
	r, err := List(bytes.NewReader(encode(list, ima.SHA1)), Options{})
	if err := errors.Join(err, r.Err()); err != nil || len(r.Bindings) != 1 || r.VouchesFor("", false) {
		t.Errorf("%+v, %v", r.Bindings, err)
	}
}

// What stands in a binding's place and is none is told.
func TestMalformedBindings(t *testing.T) {
	id := binding.ID{Inum: 7, NSID: 70, Number: 1}
	good, err := attachOf(id, keyName("1")).Encode()
	if err != nil {
		t.Fatal(err)
	}
	attach := bound(t, 10, binding.AttachName, attachOf(id, keyName("1")))
	disguised := func(template string) *imalog.Entry {
		e, err := imalog.NewEntry(10, template, imalog.FieldValues{
			Digest: attach.FileDigest(), Name: binding.AttachName, Buf: good, Sig: append([]byte{3}, good...),
		})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	wrong, err := imalog.NewEntry(10, imalog.Buf, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: binding.AttachName, Buf: good})
	if err != nil {
		t.Fatal(err)
	}
	lost, err := imalog.NewViolation(10, imalog.Buf, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: binding.EndName})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		list   []*imalog.Entry
		reason string
	}{
		{"bytes", []*imalog.Entry{buffer(t, 10, binding.AttachName, []byte("x"))}, "ends within"},
		{"a newer format", []*imalog.Entry{buffer(t, 10, binding.EndName, []byte{2, 0, 0, 0})}, "as new as the one"},
		{"a digest of something else", []*imalog.Entry{wrong}, "that of its buffer"},
		{"another template's name", []*imalog.Entry{disguised("d-ng|n-ng|buf")}, "its template"},
		{"another field", []*imalog.Entry{disguised(imalog.Sig)}, "its template"},
		{"a violation", []*imalog.Entry{lost}, "a violation"},
		{"attached twice", []*imalog.Entry{attach, attach}, "already"},
		{"an end of nothing", []*imalog.Entry{bound(t, 10, binding.EndName, endOf(id))}, "never attached"},
		{"ended twice", []*imalog.Entry{attach, bound(t, 10, binding.EndName, endOf(id)), bound(t, 10, binding.EndName, endOf(id))}, "ended by entry 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			list := append(entries(t, 0, nil), c.list...)
			r, err := List(bytes.NewReader(encode(list, ima.SHA1)), Options{PCRs: after(list, allBanks(), 10)})
			if err != nil || len(r.Broken) != 1 {
				t.Fatalf("broken %v, %v", r.Broken, err)
			}
			b := r.Broken[0]
			if b.Kind != MalformedBinding || b.Entry != len(list)-1 || !strings.Contains(b.Reason, c.reason) {
				t.Errorf("entry %d, %v: %s", b.Entry, b.Kind, b.Reason)
			}
		})
	}
}

// Files of those names, and other critical data, are no bindings.
func TestNoBindings(t *testing.T) {
	list := entries(t, 0, nil)
	for _, name := range []string{"/" + binding.AttachName, binding.AttachName} {
		e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: name})
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	list = append(list, buffer(t, 10, "kernel_version", []byte("6.12")))
	r, err := List(bytes.NewReader(encode(list, ima.SHA1)), Options{})
	if err := errors.Join(err, r.Err()); err != nil || len(r.Bindings) != 0 {
		t.Errorf("%+v, %v", r.Bindings, err)
	}
}
