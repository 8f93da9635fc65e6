package measure

import (
	"crypto/sha256"
	"encoding/binary"
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

// key stands for an entry's template data, template and PCR.
type key [sha256.Size]byte

func keyOf(e *imalog.Entry) key {
	h := sha256.New()
	var pcr [4]byte
	binary.LittleEndian.PutUint32(pcr[:], uint32(e.PCR()))
	h.Write(pcr[:])
	h.Write([]byte(e.Template()))
	h.Write([]byte{0})
	h.Write(e.Data())
	return key(h.Sum(nil))
}

// NewStore makes an empty store.
func NewStore() *Store { return &Store{ids: make(map[key]uint32)} }

// Len returns how many different entries the lists hold.
func (s *Store) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ids)
}

// add puts an entry into a list's bitmap; false if it was there.
func (s *Store) add(b *bitmap, k key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.ids[k]
	if ok && b.has(id) {
		return false
	}
	if !ok {
		id = s.newID(k)
	}
	s.refs[id]++
	b.set(id)
	return true
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
	for i, word := range b.words {
		for ; word != 0; word &= word - 1 {
			id := uint32(i*64 + bits.TrailingZeros64(word))
			if s.refs[id]--; s.refs[id] == 0 {
				delete(s.ids, s.keys[id])
				s.free = append(s.free, id)
			}
		}
	}
	b.words = nil
}

// bitmap is a set of ids.
type bitmap struct{ words []uint64 }

func (b *bitmap) has(id uint32) bool {
	i := int(id / 64)
	return i < len(b.words) && b.words[i]&(1<<(id%64)) != 0
}

func (b *bitmap) set(id uint32) {
	i := int(id / 64)
	if i >= len(b.words) {
		b.words = append(b.words, make([]uint64, i+1-len(b.words))...)
	}
	b.words[i] |= 1 << (id % 64)
}
