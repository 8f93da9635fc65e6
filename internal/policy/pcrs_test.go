package policy

import (
	"slices"
	"testing"
)

func TestPCRs(t *testing.T) {
	p, err := Parse("test", []byte("measure func=BPRM_CHECK pcr=12\nmeasure func=MMAP_CHECK\nmeasure uid=0 func=FILE_CHECK pcr=12\nmeasure func=MODULE_CHECK pcr=9\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got := p.PCRs(); !slices.Equal(got, []int{12, 9}) {
		t.Errorf("PCRs: %v", got)
	}
}
