package policy

import (
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// AlgoSet is a set of hash algorithms: bit n stands for the kernel's algorithm n. The zero value means that none is
// named, so that any will do.
type AlgoSet uint32

// Allows reports whether the set has the algorithm, or is empty.
func (s AlgoSet) Allows(a ima.HashAlgo) bool { return s == 0 || a < 32 && s&(1<<a) != 0 }

// String returns the names in the kernel's order, with commas between.
func (s AlgoSet) String() string {
	var names []string
	for a := ima.HashAlgo(0); a.Valid(); a++ {
		if s&(1<<a) != 0 {
			names = append(names, a.String())
		}
	}
	return strings.Join(names, ",")
}

// uncomputable reports whether Linux 6.12 has a name, but no implementation, for an algorithm: a rule may not name it.
// Source: the folder crypto, which registers none of these names.
func uncomputable(a ima.HashAlgo) bool {
	switch a {
	case ima.RMD128, ima.RMD256, ima.RMD320, ima.TGR128, ima.TGR160, ima.TGR192:
		return true
	}
	return false
}
