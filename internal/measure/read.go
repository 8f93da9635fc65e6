package measure

import (
	"context"
	"fmt"
	"io"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// indexEvery is how many entries lie between two kept offsets of the log.
const indexEvery = 256

// noteLogged counts an entry that ends at the given offset of the log. l.mu is held, or the list not open yet.
func (l *List) noteLogged(end int64) {
	l.logged.advance(l.logged.n + 1)
	l.loggedSize = end
	if l.logged.n%indexEvery == 0 {
		l.index = append(l.index, end)
	}
}

// Reader returns a reader of the log as it is now, from entry number first (0 is boot_aggregate), and how many entries it has.
// The log only grows, so the reader stays good.
func (l *List) Reader(first int) (*imalog.Reader, int, error) {
	l.mu.Lock()
	size, entries := l.loggedSize, l.logged.n
	var at int64
	n := min(first, entries) / indexEvery
	if n > 0 {
		at = l.index[n-1]
	}
	l.mu.Unlock()
	r := imalog.NewReader(io.NewSectionReader(l.file, at, size-at), ima.SHA1)
	var e imalog.Entry
	for i := n * indexEvery; i < min(first, entries); i++ {
		if err := r.ReadInto(&e); err != nil {
			return nil, 0, fmt.Errorf("read list: %w", err)
		}
	}
	return r, max(0, entries-first), nil
}

// Snapshot returns the log's bytes as they are now: a binary_runtime_measurements.
func (l *List) Snapshot() *io.SectionReader {
	l.mu.Lock()
	defer l.mu.Unlock()
	return io.NewSectionReader(l.file, 0, l.loggedSize)
}

// PCRs returns the list's register in each bank, as the TPM has it now. Without a TPM it is an error.
func (l *List) PCRs(ctx context.Context) (map[ima.HashAlgo]ima.Digest, error) {
	tpm := l.currentTPM()
	if tpm == nil {
		return nil, fmt.Errorf("read PCR %d: this list has no TPM, or it is being started", l.config.PCR)
	}
	return tpm.ReadPCR(ctx, l.config.PCR)
}

// tail reads the log from an offset on, and goes on with what is logged later. It never sees what is not durable yet.
type tail struct {
	list *List
	at   int64
}

// Read implements io.Reader; io.EOF means for now.
func (t *tail) Read(b []byte) (int, error) {
	t.list.mu.Lock()
	left := t.list.loggedSize - t.at
	t.list.mu.Unlock()
	if left <= 0 {
		return 0, io.EOF
	}
	n, err := t.list.file.ReadAt(b[:min(int64(len(b)), left)], t.at)
	t.at += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}
