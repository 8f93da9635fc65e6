package digest

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"runtime/debug"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// readSize is the size in bytes of one read: the fastest measured with SHA-256. Reading ahead in another goroutine costs
	// more than it gains: the kernel reads ahead, and what waking another processor costs is lost in a virtual machine.
	readSize = 256 << 10
	// mapFrom is the size in bytes from which on a file is mapped, which spares the copy. Unmapping interrupts the other
	// processors, so for a shorter one the copy is cheaper.
	mapFrom = 16 << 20
	// mapSize is how many bytes are mapped at a time, populateSize how many of them are brought in by one call.
	mapSize, populateSize = 64 << 20, 4 << 20
)

// errFault means that mapped content could not be reached: the file is shorter than it was, or its disk failed.
var errFault = errors.New("fault in mapped content")

// read writes the file's content to each hash and returns its length. Where mapping does not work or breaks off, reading does
// or says why not. A file whose holes would take memory if they were mapped (tmpfs) must not be.
func read(ctx context.Context, f *os.File, size uint64, mayMap bool, hashes []hash.Hash) (uint64, error) {
	writers := make([]io.Writer, len(hashes))
	for i, h := range hashes {
		writers[i] = h
	}
	w := untilDone{ctx, io.MultiWriter(writers...)}
	if mayMap && size >= mapFrom && populates() {
		if readMapped(f, size, w) == nil {
			return size, nil
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		for _, h := range hashes {
			h.Reset()
		}
	}
	n, err := io.CopyBuffer(w, io.NewSectionReader(f, 0, math.MaxInt64), make([]byte, max(min(size+1, readSize), 512)))
	return uint64(n), err
}

// populates reports whether MADV_POPULATE_READ gives up on a page that can't be read. Before Linux 6.9 it tries for ever (mm/madvise.c,
// madvise_populate).
var populates = sync.OnceValue(func() bool {
	var u unix.Utsname
	var major, minor int
	if unix.Uname(&u) != nil {
		return false
	}
	n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return n == 2 && (major > 6 || major == 6 && minor >= 9)
})

// untilDone is a writer that refuses once its context has ended, with the cause.
type untilDone struct {
	ctx context.Context
	io.Writer
}

// Write writes, or refuses.
func (w untilDone) Write(b []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	return w.Writer.Write(b)
}

// readMapped writes size bytes of the file out of its page cache. After an error the writer may have got any part of them.
func readMapped(f *os.File, size uint64, w io.Writer) error {
	for at := uint64(0); at < size; at += mapSize {
		content, err := unix.Mmap(int(f.Fd()), int64(at), int(min(size-at, mapSize)), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		unix.Madvise(content, unix.MADV_SEQUENTIAL) // may be refused: it is advice
		err = writeMapped(w, content)
		if err2 := unix.Munmap(content); err == nil {
			err = err2
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writeMapped brings the content in by a system call before the writer touches it: where a disk or a server hangs, a system call
// holds up this goroutine alone, a page fault all of them. What is lost again before it is read makes a fault all the same; the
// signal of one that fails becomes errFault.
func writeMapped(w io.Writer, content []byte) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if _, ok := p.(interface{ Addr() uintptr }); !ok { // runtime.Error's, of memory that can't be reached
				panic(p)
			}
			err = errFault
		}
	}()
	for part := range slices.Chunk(content, populateSize) {
		if err := unix.Madvise(part, unix.MADV_POPULATE_READ); err != nil {
			return err
		}
		for piece := range slices.Chunk(part, readSize) { // the second of several hashes finds it in the processor's cache
			if _, err := w.Write(piece); err != nil {
				return err
			}
		}
	}
	return nil
}
