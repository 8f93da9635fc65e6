package policy

import (
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

func TestMapIDs(t *testing.T) {
	p, err := Parse("test", []byte("measure func=BPRM_CHECK uid=0\nmeasure func=MMAP_CHECK gid<7 fowner>0 fgroup=9\ndont_measure uid=9\n"))
	if err != nil {
		t.Fatal(err)
	}
	m := ima.IDMaps{UIDs: ima.IDMap{{Outside: 1000, Count: 5}}, GIDs: ima.IDMap{{Inside: 5, Outside: 50, Count: 5}}}
	mapped, unmapped := p.MapIDs(m.UIDs.ToHost, m.GIDs.ToHost)
	want := "measure func=BPRM_CHECK uid=1000 \nmeasure func=MMAP_CHECK gid<52 fowner>1000 fgroup=54 \ndont_measure uid=4294967295 \n"
	if mapped.String() != want {
		t.Errorf("mapped:\n%swant:\n%s", mapped, want)
	}
	if unmapped == nil || unmapped.Line != 3 {
		t.Errorf("the rule without an id there: %v", unmapped)
	}
	if p.String() == mapped.String() || p.Rules()[0].uid.id != 0 {
		t.Error("the policy itself was changed")
	}
	initial := ima.InitialMaps()
	if same, unmapped := p.MapIDs(initial.UIDs.ToHost, initial.GIDs.FromHost); unmapped != nil || same.String() != p.String() {
		t.Errorf("the initial map changed it: %v\n%s", unmapped, same)
	}
}
