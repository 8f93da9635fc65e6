package imafs

import (
	"bytes"
	"context"
	"sort"
	"sync"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
)

const (
	markEvery   = 1024 // entries between two known offsets
	cancelEvery = 256  // entries between two looks at whether anyone still waits
	leastChunk  = 4096 // bytes that are made at a time, for readers of a byte at a time
)

// list is an open measurement list. It makes what is read when it is read.
type list struct {
	view    View
	entries *measure.List
	format  func(e *imalog.Entry, dst []byte, bank ima.HashAlgo) []byte
	bank    ima.HashAlgo

	mu    sync.Mutex
	limit int  // entries that there are to this reader
	begun bool // something was read
	atEnd bool // the reader was told that it is at the end

	buf   []byte // what was made and not read yet
	at    int64  // its offset
	next  int    // the entry behind it
	marks []mark // by rising offset
}

// mark is where an entry begins.
type mark struct {
	entry int
	at    int64
}

func (l *list) open(ctx context.Context) error {
	if l.entries == nil { // ended just now
		return ErrEnded
	}
	if err := barrier(ctx, l.view); err != nil {
		return err
	}
	l.limit = l.entries.Status().Entries
	return nil
}

// read returns what there is, up to the end that the list had at open. A read behind the end, after one was told that it is the
// end, and one from the start again, look for what has come since.
func (l *list) read(ctx context.Context, dest []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ended(l.view) {
		return 0, ErrEnded
	}
	if off == 0 && l.begun {
		if err := l.open(ctx); err != nil {
			return 0, err
		}
	}
	l.begun = true
	l.seek(off)
	for l.end() < off+int64(len(dest)) && l.next < l.limit {
		if err := l.fill(ctx, off, max(len(dest), leastChunk)); err != nil {
			return 0, err
		}
	}
	if l.end() <= off {
		if !l.atEnd {
			l.atEnd = true
			return 0, nil
		}
		if err := l.open(ctx); err != nil || l.next >= l.limit {
			return 0, err
		}
		if err := l.fill(ctx, off, max(len(dest), leastChunk)); err != nil || l.end() <= off {
			return 0, err
		}
	}
	l.atEnd = false
	n := copy(dest, l.buf[off-l.at:])
	l.buf, l.at = bytes.Clone(l.buf[off-l.at+int64(n):]), off+int64(n)
	return n, nil
}

func (l *list) end() int64 { return l.at + int64(len(l.buf)) }

// seek goes to the last known place that is not behind off, unless it is nearer already.
func (l *list) seek(off int64) {
	i := sort.Search(len(l.marks), func(i int) bool { return l.marks[i].at > off })
	var m mark
	if i > 0 {
		m = l.marks[i-1]
	}
	if off < l.at || m.at > l.end() {
		l.buf, l.at, l.next = nil, m.at, m.entry
	}
}

// fill makes more, from the next entry on, until there are n bytes from off on or the reader's last entry is there. What lies
// before off is not kept.
func (l *list) fill(ctx context.Context, off int64, n int) error {
	r, _, err := l.entries.Reader(l.next)
	if err != nil {
		return err
	}
	var e imalog.Entry
	for ; l.next < l.limit && l.end() < off+int64(n); l.next++ {
		if l.next%cancelEvery == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if l.next%markEvery == 0 && (len(l.marks) == 0 || l.marks[len(l.marks)-1].entry < l.next) {
			l.marks = append(l.marks, mark{l.next, l.end()})
		}
		if err := r.ReadInto(&e); err != nil {
			return err
		}
		l.buf = l.format(&e, l.buf, l.bank)
		if l.end() <= off {
			l.at, l.buf = l.end(), l.buf[:0]
		}
	}
	return nil
}

func (l *list) write(context.Context, []byte, int64) (int, error) { return 0, unix.EINVAL }
func (l *list) flush(uint32) error                                { return nil }
func (l *list) release()                                          {}
