package verify

import (
	"bytes"
	"io"
	"runtime"
	"sync"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// The digests of entries don't depend on each other; only extending has to go in order. So one goroutine reads, some
// hash, and the caller's extends and compares, a batch of entries at a time. Batches are used again, so memory does not
// grow with the list.
const (
	batchSize = 1024      // to hand a batch over costs microseconds
	readSize  = 256 << 10 // bytes
	sumSize   = ima.MaxDigestSize
)

// item is one entry read.
type item struct {
	entry       imalog.Entry
	offset, end int64
	stored      [sumSize]byte // the template digest in the list
	altered     bool          // stored is not the digest of the data
}

// batch is the unit that goes from goroutine to goroutine; who holds it owns it.
type batch struct {
	items  [batchSize]item
	n      int
	sums   []byte // for each item and bank what is extended, sumSize bytes apart
	err    error  // what came after the last item
	hashed chan struct{}
}

// run takes the whole list through the checker. It returns what ended it, nil for the list's end.
func (c *checker) run(r *imalog.Reader) error {
	workers := min(runtime.GOMAXPROCS(0), 4)
	batches := 2*workers + 2
	free, work, ordered := make(chan *batch, batches), make(chan *batch, batches), make(chan *batch, batches)
	for range batches {
		free <- &batch{sums: make([]byte, batchSize*len(c.banks)*sumSize), hashed: make(chan struct{}, 1)}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(work)
		defer close(ordered)
		for b := range free {
			b.fill(r)
			work <- b
			ordered <- b
			if b.err != nil {
				return
			}
		}
	})
	for range workers {
		wg.Go(func() {
			for b := range work {
				b.hash(c.fileBank, c.banks, c.opts.ZeroViolations)
				b.hashed <- struct{}{}
			}
		})
	}
	var end error
	stride := len(c.banks) * sumSize
	for b := range ordered {
		<-b.hashed
		for i := range b.items[:b.n] {
			c.add(&b.items[i], b.sums[i*stride:(i+1)*stride])
		}
		end = b.err
		free <- b
	}
	wg.Wait()
	if end == io.EOF {
		return nil
	}
	return end
}

// fill reads the next entries.
func (b *batch) fill(r *imalog.Reader) {
	b.err = nil
	for b.n = 0; b.n < batchSize; b.n++ {
		it := &b.items[b.n]
		if b.err = r.ReadInto(&it.entry); b.err != nil {
			return
		}
		it.offset, it.end = r.Offset(), r.End()
		r.AppendStoredDigest(it.stored[:0])
	}
}

// hash computes what each entry extends in each bank, and whether the list's digest is that of the data. A violation
// has no digest to compare. The list's own bank is computed in any case, once.
func (b *batch) hash(fileBank ima.HashAlgo, banks []ima.HashAlgo, zeroViolations bool) {
	stride := len(banks) * sumSize
	var own [sumSize]byte
	for i := range b.items[:b.n] {
		it := &b.items[i]
		sum := it.entry.AppendDigest(own[:0], fileBank)
		it.altered = !bytes.Equal(sum, it.stored[:len(sum)])
		for j, bank := range banks {
			at := i*stride + j*sumSize
			dst := b.sums[at:at:(at + sumSize)]
			switch {
			case it.entry.Violation() && zeroViolations:
				it.entry.AppendDigest(dst, bank)
			case bank == fileBank && !it.entry.Violation():
				_ = append(dst, sum...)
			default:
				it.entry.AppendExtendDigest(dst, bank)
			}
		}
	}
}
