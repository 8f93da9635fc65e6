package loader

import (
	"encoding/binary"
	"fmt"
	"testing"
)

// producer writes records into memory laid out as the kernel lays out a ring buffer.
type producer struct {
	consumer, pages []byte
	page, size      int
	at              uint64
}

func newProducer(size int) *producer {
	const page = 4096
	// Backed by uint64 so that the counters are aligned as mmap aligns them.
	return &producer{consumer: make([]byte, page), pages: make([]byte, page+2*size), page: page, size: size}
}

func (p *producer) put(length uint32, payload string) {
	header := make([]byte, ringHeaderSize)
	binary.NativeEndian.PutUint32(header, length)
	for i, b := range append(header, payload...) {
		at := (int(p.at) + i) % p.size
		p.pages[p.page+at] = b
		p.pages[p.page+p.size+at] = b
	}
	p.at += (uint64(len(payload)) + ringHeaderSize + 7) &^ 7
	binary.NativeEndian.PutUint64(p.pages, p.at)
}

func TestRingCommit(t *testing.T) {
	p := newProducer(4096)
	p.put(3, "one")
	p.put(4|ringDiscard, "gone")
	p.put(3, "two")
	r := newRing(p.consumer, p.pages, p.page, p.size)
	if got := string(r.next()); got != "one" {
		t.Fatalf("first record %q", got)
	}
	again := newRing(p.consumer, p.pages, p.page, p.size)
	if got := string(again.next()); got != "one" {
		t.Fatalf("after a crash before commit: first record %q", got)
	}
	r.commit()
	again = newRing(p.consumer, p.pages, p.page, p.size)
	if got := string(again.next()); got != "two" {
		t.Fatalf("after commit: first record %q", got)
	}
	if got := again.next(); got != nil {
		t.Fatalf("a record %q beyond the last", got)
	}
}

func TestRingStopsAtBusyRecord(t *testing.T) {
	p := newProducer(4096)
	p.put(3|ringBusy, "one")
	p.put(3, "two")
	r := newRing(p.consumer, p.pages, p.page, p.size)
	if got := r.next(); got != nil {
		t.Fatalf("read %q past a record still being filled", got)
	}
	if r.backlog() == 0 {
		t.Fatal("no backlog although two records wait")
	}
	binary.NativeEndian.PutUint32(p.pages[p.page:], 3)
	if got := string(r.next()) + string(r.next()); got != "onetwo" {
		t.Fatalf("read %q after the first was submitted", got)
	}
}

func TestRingWraps(t *testing.T) {
	p := newProducer(64)
	r := newRing(p.consumer, p.pages, p.page, p.size)
	for range 100 {
		p.put(9, "ninebytes")
		if got := string(r.next()); got != "ninebytes" {
			t.Fatalf("read %q", got)
		}
		r.commit()
	}
}

// FuzzRing: whatever a kernel side records, discards and is still at, and whenever an agent reads, commits or dies, each record is read whole
// and in order, and what is committed never again. A byte is a record's size or, by its low bits, what else is done.
func FuzzRing(f *testing.F) {
	f.Add([]byte{0, 17, 2, 3, 64, 5})
	f.Add([]byte{8, 9, 10, 3, 4, 5, 3})
	f.Add([]byte{0xf8, 3, 4, 0xf8, 3, 4, 0xf8, 5, 3})
	f.Fuzz(func(t *testing.T, acts []byte) {
		p := newProducer(512)
		r := newRing(p.consumer, p.pages, p.page, p.size)
		var wait, read []string // records that are to be read, and those that were, uncommitted
		var busy []uint64       // where records are that are not done
		for n, act := range acts {
			payload := fmt.Sprintf("%0*d", int(act>>3), n)
			switch act & 7 {
			case 0, 1, 2:
				if r.backlog()+uint64(len(payload))+2*ringHeaderSize > uint64(p.size) {
					continue // as the kernel: it counts a loss
				}
				word := uint32(len(payload))
				if act&7 == 1 {
					word |= ringDiscard
				} else {
					wait = append(wait, payload)
				}
				if act&7 == 2 {
					busy = append(busy, p.at)
					word |= ringBusy
				}
				p.put(word, payload)
			case 3:
				for b := r.next(); b != nil; b = r.next() {
					if len(wait) == 0 || string(b) != wait[0] || len(busy) > 0 && r.position > busy[0] {
						t.Fatalf("read %q, want the first of %q; busy are %d", b, wait, busy)
					}
					read, wait = append(read, wait[0]), wait[1:]
				}
				if len(busy) == 0 && len(wait) > 0 {
					t.Fatalf("not read: %q", wait)
				}
			case 4:
				r.commit()
				read = nil
			case 5: // the next agent
				r = newRing(p.consumer, p.pages, p.page, p.size)
				wait, read = append(read, wait...), nil
			default:
				for _, at := range busy {
					word := p.pages[p.page+int(at)%p.size:]
					binary.NativeEndian.PutUint32(word, binary.NativeEndian.Uint32(word)&^ringBusy)
				}
				busy = nil
			}
		}
	})
}
