// Package measure keeps measurement lists: append-only, without duplicates, on disk before they are in a TPM.
//
// Open recovers a list from its log, or begins one with its boot_aggregate. Append hands in an entry and returns a Receipt to
// wait on: Logged, then Extended. Close ends the work and keeps the log; Remove deletes it, as the namespace has ended.
//
// # What is promised
//
// The log is the list: the classic binary_runtime_measurements, byte for byte. An entry is written and synced before its extend
// is sent, and entries are extended in their order, so that at every moment the PCR is what some prefix of the log replays to.
// The extender always reads what it extends back from the log: that is the same path in everyday work and after a crash.
//
// An entry with the same template data and PCR as an earlier one is not appended again; violations always are. Source:
// security/integrity/ima/ima_queue.c, ima_add_template_entry. Unlike there, append comes before extend.
//
// # What can go wrong
//
// A full disk or a dead TPM is waited out: nothing is lost, Status tells. A failed sync is fatal to the list, since the log's state
// is then unknown: every Receipt gets the error, and the list is recovered by Open. A PCR that no prefix explains is ErrDiverged,
// never mended.
package measure

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

var (
	// ErrDiverged means that the PCR holds what no prefix of the log replays to: log or TPM was tampered with, or something else
	// extends the same PCR.
	ErrDiverged = errors.New("log and PCR contradict each other")
	// ErrAltered means that the log is not what was written: entries changed or damaged.
	ErrAltered = errors.New("the log was altered")
	// ErrForeign means that a list is to begin on a PCR that something else has extended already.
	ErrForeign = errors.New("the PCR was extended by something else")
	// ErrClosed means that the list was closed before the entry got there.
	ErrClosed = errors.New("the list is closed")
)

// LogName is the log's file name within its folder.
const LogName = "binary_runtime_measurements"

// TPM is what a list needs of its TPM: *tpmext.TPM, and in tests one that fails at chosen steps.
type TPM interface {
	Banks() []ima.HashAlgo
	ReadPCR(ctx context.Context, pcr int) (map[ima.HashAlgo]ima.Digest, error)
	Extend(ctx context.Context, pcr int, digests []ima.Digest) error
	BootAggregate(ctx context.Context, bank ima.HashAlgo) (ima.Digest, error)
	Reopen(ctx context.Context) error
}

// File is what a list needs of its log: *os.File, and in tests one that fails at chosen steps.
type File interface {
	ReadAt(b []byte, off int64) (int, error)
	WriteAt(b []byte, off int64) (int, error)
	Truncate(size int64) error
	Sync() error
	Close() error
}

// Config says what a list is.
type Config struct {
	Dir      string       // its folder; exists
	PCR      int          // of its boot_aggregate, and of the PCR checked when the log is empty
	Template string       // of its boot_aggregate
	Algo     ima.HashAlgo // of its boot_aggregate
	TPM      TPM          // nil: the list is not anchored
	Store    *Store
	Log      *zap.Logger
	OpenFile func(path string) (File, error) // nil: the file itself
}

// List is one measurement list. Append is for one goroutine; everything else for any.
type List struct {
	config Config
	log    *zap.Logger
	file   File
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed and replaced whenever something below moves

	// Written by Append, taken by the writer.
	pending      []byte
	pendingEnds  []int64 // of each pending entry, within pending
	ids          bitmap  // of the Store's ids that the list holds
	accepted     int     // entries handed in
	violations   int
	closed       bool
	fatal        error
	writeTrouble error

	// Written by the writer.
	logged     int   // entries in the log, durable
	loggedSize int64 // bytes
	index      []int64

	// Written by the extender.
	extended   int
	tpmTrouble error
}

// indexEvery is how many entries lie between two kept offsets of the log.
const indexEvery = 256

// Recovery tells what Open found.
type Recovery struct {
	Entries    int   // in the log
	CutBytes   int64 // of an incomplete entry at the log's end, removed
	Unextended int   // entries that were logged but not extended before
}

// Open recovers the list in the folder, or begins it. Errors: ErrAltered, ErrDiverged, ErrForeign, with numbers and what to do;
// then neither log nor TPM was changed. The list's goroutines end with Close.
func Open(ctx context.Context, c Config) (*List, Recovery, error) {
	if c.OpenFile == nil {
		c.OpenFile = func(path string) (File, error) { return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) }
	}
	path := filepath.Join(c.Dir, LogName)
	file, err := c.OpenFile(path)
	if err != nil {
		return nil, Recovery{}, fmt.Errorf("open list: %w", err)
	}
	l := &List{config: c, log: c.Log.With(zap.String("log", path)), file: file, changed: make(chan struct{})}
	recovery, err := l.recover(ctx)
	if err != nil {
		file.Close()
		c.Store.release(&l.ids)
		return nil, recovery, fmt.Errorf("open list %s: %w", path, err)
	}
	ctx, l.cancel = context.WithCancel(context.Background())
	l.done.Go(func() { l.write(ctx) })
	if c.TPM != nil {
		l.done.Go(func() { l.extend(ctx) })
	}
	if l.accepted == 0 {
		err = l.begin(ctx)
	}
	if err != nil {
		return nil, recovery, errors.Join(fmt.Errorf("open list %s: %w", path, err), l.Close())
	}
	return l, recovery, nil
}

// begin appends the first entry. Without a TPM the digest is zero, as the kernel's is.
func (l *List) begin(ctx context.Context) error {
	d := ima.ZeroDigest(l.config.Algo)
	if t := l.config.TPM; t != nil {
		bank := t.Banks()[0]
		for _, b := range t.Banks() {
			if b == l.config.Algo {
				bank = b
			}
		}
		var err error
		if d, err = t.BootAggregate(ctx, bank); err != nil {
			return err
		}
	}
	e, err := imalog.BootAggregate(l.config.PCR, l.config.Template, d)
	if err != nil {
		return err
	}
	l.Append(e)
	return nil
}

// Receipt waits for what becomes of an entry.
type Receipt struct {
	list *List
	n    int // how many entries must be through
}

// Append hands an entry in. A duplicate is not appended; its Receipt waits for the earlier one.
func (l *List) Append(e *imalog.Entry) Receipt {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.fatal != nil {
		return Receipt{l, l.accepted + 1}
	}
	if e.Violation() {
		l.violations++
	} else if !l.config.Store.add(&l.ids, keyOf(e)) {
		return Receipt{l, l.accepted}
	}
	l.pending = e.AppendBinary(l.pending, ima.SHA1)
	l.pendingEnds = append(l.pendingEnds, int64(len(l.pending)))
	l.accepted++
	l.notify()
	return Receipt{l, l.accepted}
}

// notify wakes all who wait. l.mu is held.
func (l *List) notify() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// await waits until ready says so; it is called with l.mu held.
func (l *List) await(ctx context.Context, ready func() bool) error {
	for {
		l.mu.Lock()
		ok, changed, fatal, closed := ready(), l.changed, l.fatal, l.closed
		l.mu.Unlock()
		switch {
		case ok:
			return nil
		case fatal != nil:
			return fatal
		case closed:
			return ErrClosed
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Logged waits until the entry is in the log, durable.
func (r Receipt) Logged(ctx context.Context) error {
	return r.list.await(ctx, func() bool { return r.list.logged >= r.n })
}

// Extended waits until the entry is in the TPM; without a TPM, until it is logged.
func (r Receipt) Extended(ctx context.Context) error {
	if r.list.config.TPM == nil {
		return r.Logged(ctx)
	}
	return r.list.await(ctx, func() bool { return r.list.extended >= r.n })
}

// Barrier waits until all that was handed in so far is in the log.
func (l *List) Barrier(ctx context.Context) error {
	l.mu.Lock()
	n := l.accepted
	l.mu.Unlock()
	return Receipt{l, n}.Logged(ctx)
}

// Status is a list's state at one moment.
type Status struct {
	Entries    int // in the log
	Violations int // handed in
	Extended   int // in the TPM; 0 without one
	Size       int64
	LogError   error // why writing waits; nil if it does not
	TPMError   error // why extending waits; nil if it does not
	Fatal      error // the list has ended by this
}

// Status returns the list's state.
func (l *List) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Status{
		Entries: l.logged, Violations: l.violations, Extended: l.extended, Size: l.loggedSize,
		LogError: l.writeTrouble, TPMError: l.tpmTrouble, Fatal: l.fatal,
	}
}

// Close ends the list's work. Entries handed in and not yet logged are written first; what is logged and not extended is
// extended by the next Open.
func (l *List) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := l.Barrier(ctx)
	l.mu.Lock()
	l.closed = true
	l.notify()
	l.mu.Unlock()
	l.cancel()
	l.done.Wait()
	l.config.Store.release(&l.ids)
	return errors.Join(err, l.file.Close())
}

// Remove deletes the log: the namespace has ended. Close first.
func Remove(dir string) error {
	if err := os.Remove(filepath.Join(dir, LogName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove list: %w", err)
	}
	return nil
}
