package measure

import (
	"crypto/sha256"
	"math/bits"
	"sync"

	"imans.dev/imans-agent/internal/imalog"
)

// Store knows which entries there are, each once, however many lists hold it: a list keeps one bit for each. Entries themselves
// are on disk. Safe for concurrent use; the bitmaps are their lists' own.
//
// Memory: 32 bytes of key, 4 of count and the map's share for each entry, one bit for each list and id.
type Store struct {
	mu   sync.Mutex
	ids  map[key]uint32
	keys []key // by id
	refs []uint32
	free []uint32
}

// key stands for an entry's template data and PCR, which is what the kernel compares. Source: ima_lookup_digest_entry in
// security/integrity/ima/ima_queue.c.
type key [sha256.Size]byte

func keyOf(e *imalog.Entry) key {
	h := sha256.New()
	h.Write([]byte{byte(e.PCR())})
	h.Write(e.Data())
	var k key
	h.Sum(k[:0])
	return k
}

// NewStore makes an empty store.
func NewStore() *Store { return &Store{ids: make(map[key]uint32)} }

// Len returns how many different entries the lists hold.
func (s *Store) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ids)
}

// add puts an entry into a list's bitmap and returns its id; added is false if it was there.
func (s *Store) add(b *bitmap, k key) (id uint32, added bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.ids[k]
	if ok && b.has(id) {
		return id, false
	}
	if !ok {
		id = s.newID(k)
	}
	s.refs[id]++
	b.set(id)
	return id, true
}

// has reports whether a list's bitmap has an entry.
func (s *Store) has(b *bitmap, k key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.ids[k]
	return ok && b.has(id)
}

func (s *Store) newID(k key) uint32 {
	var id uint32
	if n := len(s.free); n > 0 {
		id, s.free = s.free[n-1], s.free[:n-1]
		s.keys[id] = k
	} else {
		id = uint32(len(s.keys))
		s.keys, s.refs = append(s.keys, k), append(s.refs, 0)
	}
	s.ids[k] = id
	return id
}

// release takes a list's entries out; an entry that no list holds any more is forgotten.
func (s *Store) release(b *bitmap) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.each(func(id uint32) {
		if s.refs[id]--; s.refs[id] == 0 {
			delete(s.ids, s.keys[id])
			s.free = append(s.free, id)
		}
	})
	b.pages = nil
}

// bitmap is a set of ids, in pages that are there only where there are ids: a short list among long ones is short.
type bitmap struct{ pages []*page }

type page [64]uint64

const pageBits = 64 * 64

func (b *bitmap) has(id uint32) bool {
	i, at := int(id/pageBits), id%pageBits
	return i < len(b.pages) && b.pages[i] != nil && b.pages[i][at/64]&(1<<(at%64)) != 0
}

func (b *bitmap) set(id uint32) {
	i, at := int(id/pageBits), id%pageBits
	for i >= len(b.pages) {
		b.pages = append(b.pages, nil)
	}
	if b.pages[i] == nil {
		b.pages[i] = new(page)
	}
	b.pages[i][at/64] |= 1 << (at % 64)
}

func (b *bitmap) each(visit func(id uint32)) {
	for i, p := range b.pages {
		if p == nil {
			continue
		}
		for j, word := range p {
			for ; word != 0; word &= word - 1 {
				visit(uint32(i*pageBits + j*64 + bits.TrailingZeros64(word)))
			}
		}
	}
}
