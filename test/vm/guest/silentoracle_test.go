//go:build vm

package guest

import (
	"strings"
	"testing"
)

// Beside the kernel's own IMA: ours has each violation that it has.
func TestNeverSilentZWriters(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t)
	loadKernelPolicy(t)
	a.caughtUp()
	for _, c := range writerCases(a) {
		t.Run(c.name, func(t *testing.T) {
			a := a.in(t)
			for place, dir := range writerPlaces(t) {
				had := len(kernelList(t))
				c.do(t, dir+"/file")
				_, ours := names(a.list("native"))
				_, theirs := names(kernelList(t)[had:])
				t.Logf("%s: violations of the kernel's IMA %d, ours %d", place, theirs[dir+"/file"]+theirs[dir+"/file.link"], ours[dir+"/file"])
				for name := range theirs { // the writer's for it; ours is the list's
					if ours[strings.TrimSuffix(name, ".link")] == 0 {
						t.Errorf("%s: the kernel's list has a violation of %s, ours has none", place, name)
					}
				}
			}
		})
	}
}

// Whatever odd way the kernel's IMA has an entry for, ours has one with the same digest.
func TestNeverSilentZOddCode(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t)
	loadKernelPolicy(t)
	a.caughtUp()
	had := len(kernelList(t))
	runs := runOddCode(t, tempDir(t, "/root"))
	ours, theirs := map[string]bool{}, map[string]bool{}
	for _, e := range a.list("native") {
		ours[e.FileDigest().String()] = true
	}
	for _, e := range kernelList(t)[had:] {
		if sum := e.FileDigest().String(); !ours[sum] {
			t.Errorf("the kernel's list has %s with %s, ours has not", e.Name(), sum)
		}
		theirs[e.FileDigest().String()] = true
	}
	for _, r := range runs {
		for _, sum := range r.sums {
			t.Logf("%s: the kernel's IMA %t, ours %t", r.name, theirs[sum], ours[sum])
			if !ours[sum] {
				t.Errorf("%s: no entry with %s", r.name, sum)
			}
		}
	}
}
