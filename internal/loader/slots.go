package loader

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
)

// Of bpf/event.h.
const (
	slotBits   = 12                 // IMANS_SLOT_BITS
	slotFactor = 0x9e3779b97f4a7c15 // IMANS_SLOT_FACTOR
)

// slot is struct imans_measured_slot. Ctime and the rest are written as words, each at once.
type slot struct {
	sequence uint64
	words    [7]uint64 // struct imans_measured_content
}

// slots are the marks that the kernel side finds without hashing, in memory shared with it. This process alone writes, and a
// sequence that is odd, or another than before, tells a reader that what it saw may be half of each of two contents. A writer
// that was killed leaves its slot odd, and so unused until the next write.
type slots struct {
	mu     sync.Mutex
	memory []byte
	table  []slot
}

func openSlots(m *ebpf.Map) (*slots, error) {
	memory, err := unix.Mmap(m.FD(), 0, int(m.MaxEntries())*int(unsafe.Sizeof(slot{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map slots of measured contents: %w", err)
	}
	return &slots{memory: memory, table: unsafe.Slice((*slot)(unsafe.Pointer(&memory[0])), m.MaxEntries())}, nil
}

// slotOf is the index that imans_is_in_slot of bpf/measured.h looks at.
func slotOf(c event.MeasuredContent) uint64 {
	return (c.Ino + c.Policy<<24 + uint64(c.Func)) * slotFactor >> (64 - slotBits)
}

func wordsOf(c event.MeasuredContent) [7]uint64 { return *(*[7]uint64)(unsafe.Pointer(&c)) }

// put makes c the content of its slot.
func (s *slots) put(c event.MeasuredContent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table[slotOf(c)].write(wordsOf(c))
}

// drop takes c out if it is there.
func (s *slots) drop(c event.MeasuredContent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := &s.table[slotOf(c)]; at.words == wordsOf(c) {
		at.write([7]uint64{})
	}
}

// clear empties all. No policy has the generation 0.
func (s *slots) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.table {
		s.table[i].write([7]uint64{})
	}
}

// write needs each store to be seen no earlier than those before it, which Go's atomic ones are.
func (at *slot) write(words [7]uint64) {
	sequence := at.sequence | 1
	atomic.StoreUint64(&at.sequence, sequence)
	for i, w := range words {
		atomic.StoreUint64(&at.words[i], w)
	}
	atomic.StoreUint64(&at.sequence, sequence+1)
}

func (s *slots) close() error { return unix.Munmap(s.memory) }
