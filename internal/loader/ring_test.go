package loader

import (
	"encoding/binary"
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
