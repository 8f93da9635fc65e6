package loader

import (
	"testing"

	"imans.dev/imans-agent/internal/event"
)

// A slot holds one content; what replaces it has another sequence, and what is not there can't be dropped.
func TestSlotIsWrittenWhole(t *testing.T) {
	s := &slots{table: make([]slot, 1<<slotBits)}
	first := event.MeasuredContent{Policy: 1, Ino: 2, Change: 3, Ctime: 4, Dev: 5, Generation: 6, SeenDev: 7, Func: 8}
	second := first
	second.Change = 9 // the index knows neither version nor device
	at := &s.table[slotOf(first)]
	if slotOf(second) != slotOf(first) {
		t.Fatal("another version has another slot")
	}
	for i, step := range []struct {
		do   func()
		want event.MeasuredContent
	}{
		{func() { s.put(first) }, first},
		{func() { s.put(second) }, second},
		{func() { s.drop(first) }, second},
		{func() { s.drop(second) }, event.MeasuredContent{}},
		{func() { s.put(first) }, first},
		{s.clear, event.MeasuredContent{}},
		{func() { at.sequence |= 1; s.put(first) }, first}, // after a writer that was killed
	} {
		before := at.sequence
		step.do()
		if at.words != wordsOf(step.want) {
			t.Errorf("step %d: %v", i, at.words)
		}
		if at.sequence&1 != 0 || at.sequence < before || (at.sequence == before) != (i == 2) {
			t.Errorf("step %d: sequence from %d to %d", i, before, at.sequence)
		}
	}
}
