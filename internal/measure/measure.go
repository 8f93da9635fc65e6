// Package measure keeps measurement lists: append-only, without duplicates, on disk before they are in a TPM.
//
// Open recovers a list from its log, or begins one with its boot_aggregate. Append hands in an entry and returns a Receipt to
// wait on: Logged, then Extended. Close ends the work and keeps the log: deleting the folder is for whoever made it.
//
// # What is promised
//
// The log is the list: the classic binary_runtime_measurements, byte for byte. An entry is written and synced before its extend
// is sent, and entries are extended in their order, so that at every moment the PCRs are what some prefix of the log replays to.
// The extender always reads what it extends back from the log: that is the same path in everyday work and after a crash.
//
// A list need not wait for its TPM: with Late it begins, or goes on, while the TPM is being started. Everything is logged meanwhile,
// and extended from the first entry on when the TPM is there; its registers are looked at before. Nor need it keep its TPM: Anchor
// takes it over to another that has just been started, Detach away from the one it has.
//
// An entry with the same template data and PCR as an earlier one is not appended again; violations always are. As in the
// kernel, append comes before extend. Source: security/integrity/ima/ima_queue.c, ima_add_template_entry.
//
// Memory does not grow with what waits for a TPM, nor with the number of lists that hold an entry, but for a bit: see Store.
//
// # What can go wrong
//
// A full or faulty disk or a dead TPM is waited out: nothing is lost, Status tells. What a write or a sync did not get to the disk is
// written anew, and so is what Open finds in the log and not in the TPM, before it is extended. PCRs that no prefix explains are
// ErrDiverged, never mended; nor is a PCR used that something else has extended, which is ErrForeign.
//
// BUG: a TPM that is reset while the list is open and idle is noticed at the next Open, or when a command fails; extends go on
// till then. It would take a look at TPM2_ReadClock before each batch.
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

	"imans.dev/imans-agent/internal/durable"
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
	Stat() (os.FileInfo, error)
	Fd() uintptr
	Close() error
}

// Config says what a list is.
type Config struct {
	Dir      string       // its folder; exists
	PCR      int          // of its boot_aggregate, and of the PCR checked when the log is empty
	Template string       // of its boot_aggregate
	Algo     ima.HashAlgo // of its boot_aggregate
	TPM      TPM          // nil: the list is not anchored, but for Late
	Late     *Late        // instead of TPM: one that is being started
	Store    *Store
	Log      *zap.Logger
	OpenFile func(path string) (File, error) // nil: the file itself
}

// List is one measurement list. Its methods are for any goroutine.
type List struct {
	config  Config
	log     *zap.Logger
	file    File
	cancel  context.CancelFunc // ends a TPM command under way
	done    sync.WaitGroup     // the writer and the extender
	writing sync.Mutex         // held while the log changes
	ended   chan struct{}      // closed when endErr is set
	moves   chan *move         // taken by the extender

	mu         sync.Mutex // guards what follows
	endErr     error      // ErrClosed, or fatal
	fatal      error
	violations int // handed in
	ids        bitmap
	pcrs       uint32 // a bit for each register that an entry handed in names

	// Added to by Append, taken by the writer.
	accepted    mark // entries handed in
	pending     []byte
	pendingEnds []int64 // of each pending entry, within pending
	pendingMax  int     // bytes at which Append waits

	// Of Append alone: which entry a duplicate is one of. Entries that have left recent count as number unrecent, which is
	// not lower than theirs.
	recent   map[uint32]int
	unrecent int

	// Written by the writer.
	logged       mark    // entries in the log, durable
	loggedSize   int64   // their bytes
	index        []int64 // where each 256th ends
	writeTrouble error

	// Written by the extender.
	extended   mark
	tpmTrouble error
	tpm        TPM                // nil: none, or not yet
	interrupt  context.CancelFunc // of the TPM command under way
}

// pendingMax bounds the memory that entries may take while the disk is full. Then Append waits, its caller stops taking events
// from the kernel side, and what that can't keep either is counted as lost.
const pendingMax = 64 << 20

// recentMax is how many entries are remembered by number, for their duplicates.
const recentMax = 256

// Open recovers the list in the folder, or begins it. Errors: ErrAltered, ErrDiverged, ErrForeign, with numbers and what to do;
// then neither log nor TPM was changed. durable.ErrLocked: another process has it open. The context is for opening only. The
// list owns two goroutines, a writer and an extender, that end with Close; the extender has a helper while it extends.
func Open(ctx context.Context, c Config) (*List, Recovery, error) {
	if c.OpenFile == nil {
		c.OpenFile = func(path string) (File, error) { return durable.OpenLog(path) }
	}
	path := filepath.Join(c.Dir, LogName)
	file, err := c.OpenFile(path)
	if err != nil {
		return nil, Recovery{}, fmt.Errorf("open list: %w", err)
	}
	l := &List{
		config: c, log: c.Log.With(zap.String("log", path)), file: file, ended: make(chan struct{}), moves: make(chan *move),
		recent: make(map[uint32]int), pendingMax: pendingMax, tpm: c.TPM,
	}
	l.extended.off = c.TPM == nil && c.Late == nil
	recovery, x, err := l.recover(ctx)
	var first *imalog.Entry
	if err == nil && l.logged.n == 0 {
		first, err = l.bootAggregate(ctx)
	}
	if err != nil {
		c.Store.release(&l.ids)
		return nil, recovery, errors.Join(fmt.Errorf("open list %s: %w", path, err), file.Close())
	}
	var running context.Context
	running, l.cancel = context.WithCancel(context.Background())
	l.done.Go(l.write)
	l.done.Go(func() { x.run(running) })
	if first != nil {
		l.Append(first)
	}
	return l, recovery, nil
}

// bootAggregate makes the first entry. Without a TPM the digest is zero, as the kernel's is.
func (l *List) bootAggregate(ctx context.Context) (*imalog.Entry, error) {
	d := ima.ZeroDigest(l.config.Algo)
	if late := l.config.Late; late != nil {
		d = late.BootAggregate
	}
	if t := l.config.TPM; t != nil {
		var err error
		if d, err = t.BootAggregate(ctx, l.config.Algo); err != nil {
			return nil, err
		}
	}
	return imalog.BootAggregate(l.config.PCR, l.config.Template, d)
}

// Append hands an entry in. A duplicate is not appended; its Receipt is the first one's. Entries of several goroutines come in some
// order, those of one in its own. It waits only while the disk is full and too much is pending.
func (l *List) Append(e *imalog.Entry) Receipt {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.pending) > l.pendingMax && l.endErr == nil {
		batch := l.accepted.n - len(l.pendingEnds) // what the writer has taken
		l.mu.Unlock()
		l.await(context.Background(), &l.logged, batch+1) // its error is endErr
		l.mu.Lock()
	}
	if l.endErr != nil {
		return Receipt{l, l.accepted.n + 1}
	}
	if e.Violation() {
		l.violations++
	} else if id, added := l.config.Store.add(&l.ids, keyOf(e)); !added {
		n, ok := l.recent[id]
		if !ok {
			n = l.unrecent
		}
		return Receipt{l, n}
	} else {
		if len(l.recent) == recentMax {
			l.unrecent = l.accepted.n
			clear(l.recent)
		}
		l.recent[id] = l.accepted.n + 1
	}
	l.pcrs |= 1 << e.PCR()
	l.pending = e.AppendBinary(l.pending, ima.SHA1)
	l.pendingEnds = append(l.pendingEnds, int64(len(l.pending)))
	l.accepted.advance(l.accepted.n + 1)
	return Receipt{l, l.accepted.n}
}

// Holds reports whether an entry was handed in that this one would be a duplicate of.
func (l *List) Holds(e *imalog.Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.config.Store.has(&l.ids, keyOf(e))
}

// CheckPCR reports whether entries for a register can be appended, such as one that a policy names: ErrForeign if something
// else has extended it. It is for a register that the list has not used yet; an entry for one that fails here ends the list.
func (l *List) CheckPCR(ctx context.Context, pcr int) error {
	tpm := l.currentTPM()
	if tpm == nil {
		return nil // the extender looks, when the first entry comes
	}
	held, err := tpm.ReadPCR(ctx, pcr)
	if err == nil && !allZero(held) {
		err = foreign(pcr, held)
	}
	return err
}

// Status is a list's state at one moment.
type Status struct {
	Entries    int  // in the log
	Violations int  // handed in
	Anchored   bool // it has a TPM, or waits for one that is being started
	Extended   int  // in the TPM; 0 without one
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
		Entries: l.logged.n, Violations: l.violations, Anchored: !l.extended.off, Extended: l.extended.n, Size: l.loggedSize,
		LogError: l.writeTrouble, TPMError: l.tpmTrouble, Fatal: l.fatal,
	}
}

// closeTimeout bounds how long Close waits for the disk, and then for a TPM command under way.
const closeTimeout = 10 * time.Second

// Close ends the list's work. Entries handed in and not yet logged are written first, and if the disk does not take them that is
// an error; what is logged and not extended is extended by the next Open.
func (l *List) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := l.Barrier(ctx)
	if err != nil && !errors.Is(err, ErrClosed) {
		l.mu.Lock()
		err = fmt.Errorf("close list: %d entries are not in the log: %w", l.accepted.n-l.logged.n, err)
		l.mu.Unlock()
	}
	l.mu.Lock()
	l.end(ErrClosed)
	l.mu.Unlock()
	// The command is let finish: the connection stays good, and the next Open has nothing to find out.
	kill := time.AfterFunc(closeTimeout, l.cancel)
	l.done.Wait()
	kill.Stop()
	l.cancel()
	l.config.Store.release(&l.ids)
	return errors.Join(err, l.file.Close())
}
