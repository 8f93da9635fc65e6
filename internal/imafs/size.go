package imafs

import (
	"context"
	"sync"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
)

// sizes knows how long the lists are as files. Its lock is never held while something waits.
type sizes struct {
	mu    sync.Mutex
	ascii map[*measure.List]*asciiSize // those that someone asked for
}

// asciiSize is the length of an ascii list of SHA-1, up to an entry: the next one who asks goes on from there.
type asciiSize struct {
	view View

	mu      sync.Mutex
	entries int
	bytes   int64
}

func newSizes() *sizes { return &sizes{ascii: make(map[*measure.List]*asciiSize)} }

// of returns how long a file is now; 0 if it is no list.
func (s *sizes) of(ctx context.Context, view View, f *file) int64 {
	list := view.List()
	if list == nil || f.kind != kindASCII && f.kind != kindBinary {
		return 0
	}
	more := int64(f.bank.Size() - ima.SHA1.Size()) // that each entry has
	if f.kind == kindBinary {
		status := list.Status()
		return status.Size + more*int64(status.Entries)
	}
	a := s.ofList(list, view)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.measure(ctx, list)
	return a.bytes + 2*more*int64(a.entries) // in hexadecimal
}

// ofList returns what is known of a list, and forgets those that ended.
func (s *sizes) ofList(list *measure.List, view View) *asciiSize {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.ascii[list]
	if a == nil {
		for l, other := range s.ascii {
			if ended(other.view) {
				delete(s.ascii, l)
			}
		}
		a = &asciiSize{view: view}
		s.ascii[list] = a
	}
	return a
}

// measure goes on to the list's end, or as far as it gets.
func (a *asciiSize) measure(ctx context.Context, list *measure.List) {
	r, n, err := list.Reader(a.entries)
	if err != nil {
		return
	}
	var e imalog.Entry
	var line []byte
	for i := range n {
		if i%cancelEvery == 0 && ctx.Err() != nil || r.ReadInto(&e) != nil {
			return
		}
		line = e.AppendASCII(line[:0], ima.SHA1)
		a.bytes += int64(len(line))
		a.entries++
	}
}
