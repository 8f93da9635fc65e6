package loader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cilium/ebpf"
)

// Bits of a record's length word. Source: include/uapi/linux/bpf.h (BPF_RINGBUF_*).
const (
	ringBusy       = 1 << 31
	ringDiscard    = 1 << 30
	ringHeaderSize = 8
)

// ring reads a BPF ring buffer and gives records back to the kernel only on commit. So the buffer is a journal: what was
// read and not committed is read again by the next process that opens the map.
//
// One goroutine reads; another may wait. Layout (kernel/bpf/ringbuf.c): a page whose first 8 bytes are the consumer's position, a page
// whose first 8 bytes are the producer's, then the data, mapped twice in a row so that no record is ever split.
type ring struct {
	consumerPage []byte
	producerPage []byte // with the data behind it
	data         []byte
	mask         uint64
	position     uint64   // of the next record to read; at or after the committed one
	wake         *os.File // the map, pollable
}

// openRing maps the buffer and starts at what the last reader committed.
func openRing(m *ebpf.Map) (*ring, error) {
	page, size := unix.Getpagesize(), int(m.MaxEntries())
	consumer, err := unix.Mmap(m.FD(), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map ring buffer's consumer page: %w", err)
	}
	producer, err := unix.Mmap(m.FD(), int64(page), page+2*size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		unix.Munmap(consumer)
		return nil, fmt.Errorf("map ring buffer's data: %w", err)
	}
	r := newRing(consumer, producer, page, size)
	if r.wake, err = pollable(m.FD()); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// pollable returns a file that the runtime's poller watches.
func pollable(fd int) (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("copy ring buffer's descriptor: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make ring buffer pollable: %w", err)
	}
	return os.NewFile(uintptr(fd), "ring buffer"), nil
}

// wait returns when the kernel side wakes us, or there are records already, or ctx has ended.
func (r *ring) wait(ctx context.Context) error {
	conn, err := r.wake.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for records: %w", err)
	}
	r.wake.SetReadDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { r.wake.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	asked := false
	err = conn.Read(func(uintptr) bool {
		again := asked
		asked = true
		return again || r.backlog() > 0
	})
	if err != nil {
		return fmt.Errorf("wait for records: %w", err)
	}
	return nil
}

func newRing(consumer, producer []byte, page, size int) *ring {
	r := &ring{consumerPage: consumer, producerPage: producer, data: producer[page:], mask: uint64(size - 1)}
	r.position = atomic.LoadUint64(position(consumer))
	return r
}

// position returns the 8-byte aligned counter at the beginning of a page.
func position(page []byte) *uint64 { return (*uint64)(unsafe.Pointer(&page[0])) }

// next returns the next record, or nil if none is complete. The bytes are the buffer's own: they are valid until commit.
// A record still being filled by a hook ends the reading, as its successors' order depends on it.
func (r *ring) next() []byte {
	for r.position < atomic.LoadUint64(position(r.producerPage)) {
		at := r.position & r.mask
		// Pairs with the xchg in bpf_ringbuf_commit: the record's bytes are visible once the busy bit is gone.
		length := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[at])))
		if length&ringBusy != 0 {
			return nil
		}
		size := uint64(length &^ (ringBusy | ringDiscard))
		r.position += (size + ringHeaderSize + 7) &^ 7
		if length&ringDiscard == 0 {
			return r.data[at+ringHeaderSize : at+ringHeaderSize+size : at+ringHeaderSize+size]
		}
	}
	return nil
}

// commit gives all records read so far back to the kernel.
func (r *ring) commit() { atomic.StoreUint64(position(r.consumerPage), r.position) }

// positions returns how many bytes the kernel side has recorded in all, and how many of them were committed.
func (r *ring) positions() (recorded, committed uint64) {
	return atomic.LoadUint64(position(r.producerPage)), atomic.LoadUint64(position(r.consumerPage))
}

// backlog returns how many bytes wait, read but uncommitted ones included.
func (r *ring) backlog() uint64 {
	recorded, committed := r.positions()
	return recorded - committed
}

func (r *ring) close() error {
	errs := []error{unix.Munmap(r.consumerPage), unix.Munmap(r.producerPage)}
	if r.wake != nil {
		errs = append(errs, r.wake.Close())
	}
	return errors.Join(errs...)
}
