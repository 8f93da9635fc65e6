package proc

import (
	"testing"
	"time"
)

func TestAsk(t *testing.T) {
	if answer, ok := Ask(1, func() int { return 7 }); !ok || answer != 7 {
		t.Errorf("got %d, %v", answer, ok)
	}
	hold := make(chan struct{})
	held := func() int { <-hold; return 7 }
	if _, ok := Ask(2, held); ok {
		t.Error("an answer from a look that does not come back")
	}
	began := time.Now()
	if _, ok := Ask(2, func() int { return 7 }); ok || time.Since(began) >= Patience {
		t.Error("a process that one look hangs at was looked at again")
	}
	if _, ok := Ask(1, func() int { return 7 }); !ok {
		t.Error("one process holds up the look at another")
	}
	close(hold)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, ok := Ask(2, func() int { return 7 }); ok {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("the process is not looked at again")
		}
	}
}
