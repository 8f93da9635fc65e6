//go:build vm

package guest

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// Containers come and go for long, many at a time, each with a vTPM of its own, and programs run in all of them: each is in the lists that it
// belongs to, once and in order; what is archived of a container verifies; nothing is left of it.
func TestNeverSilentComingAndGoing(t *testing.T) {
	sample(t, "6.1")
	many, long := sized(4, 20, 100), time.Duration(sized(20, 120, 3600))*time.Second
	c := newCrashes(t, "kernel")
	before := c.a.leavings()
	for _, grows := range []string{"measured_contents", "measured_by_subject"} { // with what ran
		before[grows] = math.MaxInt
	}
	leave := func() {
		b := c.boxes[0]
		c.boxes = c.boxes[1:]
		c.end(b)
		c.checkArchive(b)
	}
	came := 0
	for began := time.Now(); time.Since(began) < long && !t.Failed(); came++ {
		if len(c.boxes) == many {
			leave()
		}
		c.boxes = append(c.boxes, c.open())
		c.execute(c.boxes[len(c.boxes)-1], false)
		for range 10 {
			c.execute(c.boxes[rand.N(len(c.boxes))], false)
		}
		c.execute(nil, false)
	}
	if !t.Failed() {
		c.check()
	}
	for len(c.boxes) > 0 {
		leave()
	}
	t.Logf("%d containers, up to %d at a time; %d programs", came, many, len(c.ran))
	c.a.asBefore(before, 16<<10) // the native list has all that ran
}
