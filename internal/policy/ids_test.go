package policy

import (
	"reflect"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// few are the maps of a user namespace of ten users and two ranges of groups, the outer ones in another order than the inner.
var few = ima.IDMaps{
	UIDs: ima.IDMap{{Outside: 1000, Count: 10}},
	GIDs: ima.IDMap{{Inside: 0, Outside: 5000, Count: 10}, {Inside: 10, Outside: 100, Count: 10}},
}

func TestWrittenInIsShownToReaders(t *testing.T) {
	p := mustParse(t, "measure func=BPRM_CHECK uid=0\nmeasure func=MMAP_CHECK gid<7 fowner>0 fgroup=12\ndont_measure uid<900\nmeasure func=BPRM_CHECK\n")
	written, unmapped := p.WrittenIn(few)
	if unmapped == nil || unmapped.Line != 3 {
		t.Errorf("the rule without an id on the host: %v", unmapped)
	}
	other := ima.IDMaps{UIDs: ima.IDMap{{Inside: 5, Outside: 1000, Count: 1}}, GIDs: ima.IDMap{{Inside: 70, Outside: 5000, Count: 10}}}
	for name, c := range map[string]struct {
		reader ima.IDMaps
		want   string
	}{
		"its own":  {few, p.String()},
		"the host": {ima.InitialMaps(), "measure func=BPRM_CHECK uid=1000 \nmeasure func=MMAP_CHECK gid<5007 fowner>1000 fgroup=102 \ndont_measure uid<65534 \nmeasure func=BPRM_CHECK \n"},
		"another":  {other, "measure func=BPRM_CHECK uid=5 \nmeasure func=MMAP_CHECK gid<77 fowner>5 fgroup=65534 \ndont_measure uid<65534 \nmeasure func=BPRM_CHECK \n"},
		"of none":  {ima.IDMaps{}, "measure func=BPRM_CHECK uid=65534 \nmeasure func=MMAP_CHECK gid<65534 fowner>65534 fgroup=65534 \ndont_measure uid<65534 \nmeasure func=BPRM_CHECK \n"},
	} {
		if got := written.StringIn(c.reader); got != c.want {
			t.Errorf("to %s:\n%swant:\n%s", name, got, c.want)
		}
	}
	if p.Rules()[0].ids != nil || p.Rules()[0].uid.in != nil {
		t.Error("the policy itself was changed")
	}
	if same, unmapped := p.WrittenIn(ima.InitialMaps()); unmapped != nil || same != p {
		t.Errorf("the initial maps changed it: %v", unmapped)
	}
}

// Rules match the users whom a user of the namespace means by them.
func TestMatchInUserNamespace(t *testing.T) {
	const host0, first, last, beyond, nobody = 0, 1000, 1009, 1010, ima.NoID
	for rule, want := range map[string][]uint32{
		"uid=0":            {first},
		"uid=9":            {last},
		"uid=10":           {}, // it has none
		"uid<1":            {first},
		"uid<1000":         {first, last}, // all that it has
		"uid<10":           {first, last},
		"uid<0":            {},
		"uid>0":            {host0, last, beyond, nobody}, // everyone but its root
		"uid>8":            {host0, last, beyond, nobody},
		"uid>1000":         {host0, beyond, nobody},
		"fowner<1000":      {first, last},
		"fowner>0":         {host0, last, beyond, nobody},
		"fowner=10":        {},
		"euid<5":           {first},
		"uid<1000 uid=bad": nil,
	} {
		p, err := Parse("test", []byte("measure func=BPRM_CHECK "+rule+"\n"))
		if want == nil {
			if err == nil {
				t.Errorf("%s was taken", rule)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		p, _ = p.WrittenIn(few)
		got := []uint32{}
		for _, id := range []uint32{host0, first, last, beyond, nobody} {
			q := &Query{Func: ima.BPRMCheck, UID: id, EUID: id, SUID: id, FOwner: id}
			if p.Match(q).Actions != 0 {
				got = append(got, id)
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s matches %v, want %v", rule, got, want)
		}
	}
}

// Ranges that lie in another order outside are compared as they lie inside.
func TestMatchGroupsAsTheyAreCountedInside(t *testing.T) {
	p, unmapped := mustParse(t, "measure func=BPRM_CHECK gid>9 fgroup<12\n").WrittenIn(few)
	if unmapped != nil {
		t.Fatal(unmapped)
	}
	for gid, want := range map[uint32]bool{100: true, 109: true, 5009: false, 5000: false} {
		for fgroup, below := range map[uint32]bool{5000: true, 101: true, 102: false, 99: false} {
			q := &Query{Func: ima.BPRMCheck, GID: gid, FGroup: fgroup}
			if got := p.Match(q).Actions != 0; got != (want && below) {
				t.Errorf("gid %d, fgroup %d: %v", gid, fgroup, got)
			}
		}
	}
}

func TestPartsMakeThePolicyAgain(t *testing.T) {
	inside, _ := mustParse(t, "measure func=BPRM_CHECK uid<900\nmeasure func=MMAP_CHECK gid=12\n").WrittenIn(few)
	p := Append(Append(mustParse(t, "dont_measure uid=7\nmeasure func=BPRM_CHECK\n"), inside), mustParse(t, "measure func=BPRM_CHECK fowner>3\n"))
	parts := p.Parts()
	if len(parts) != 3 || parts[1].Text != "measure func=BPRM_CHECK uid<900 \nmeasure func=MMAP_CHECK gid=12 \n" {
		t.Fatalf("parts %+v", parts)
	}
	again := &Policy{}
	for _, part := range parts {
		rules, _ := mustParse(t, part.Text).WrittenIn(part.IDs)
		again = Append(again, rules)
	}
	for _, maps := range []ima.IDMaps{few, ima.InitialMaps()} {
		if got := again.StringIn(maps); got != p.StringIn(maps) {
			t.Errorf("again:\n%swant:\n%s", got, p.StringIn(maps))
		}
	}
	if parts := new(Policy).Parts(); parts != nil {
		t.Errorf("of none %v", parts)
	}
}

func TestNamesAnyIDs(t *testing.T) {
	for rule, want := range map[string]bool{
		"measure func=BPRM_CHECK": false, "measure func=BPRM_CHECK uid=0": true, "measure func=BPRM_CHECK fgroup<3": true, "measure func=BPRM_CHECK fowner=0": true,
	} {
		if got := mustParse(t, rule+"\n").NamesAnyIDs(); got != want {
			t.Errorf("%s: %v", rule, got)
		}
	}
}
