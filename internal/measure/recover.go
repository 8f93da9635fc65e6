package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// Recovery tells what Open found.
type Recovery struct {
	Entries    int   // in the log
	CutBytes   int64 // of an incomplete entry at the log's end, removed
	Unextended int   // entries that were logged but not extended before
}

// registers is one register's value in each bank that can be replayed.
type registers map[ima.HashAlgo]ima.Digest

// String lists the banks' values in one order.
func (r registers) String() string {
	var s []string
	for _, bank := range slices.Sorted(maps.Keys(r)) {
		s = append(s, r[bank].String())
	}
	return strings.Join(s, " ")
}

// matches reports whether a register that was read holds the same; banks that can't be replayed don't count.
func (r registers) matches(held map[ima.HashAlgo]ima.Digest) bool {
	for bank, v := range r {
		if held[bank] != v {
			return false
		}
	}
	return true
}

func values(r *imalog.Replay, pcr int) registers {
	m := make(registers)
	for _, b := range r.Banks() {
		m[b] = r.Value(pcr, b)
	}
	return m
}

func allZero(held map[ima.HashAlgo]ima.Digest) bool {
	for _, d := range held {
		if !d.IsZero() {
			return false
		}
	}
	return true
}

func foreign(pcr int, held map[ima.HashAlgo]ima.Digest) error {
	return fmt.Errorf("%w: PCR %d is %v, and the log has no entry for it; choose a PCR that nothing else uses "+
		"(--pcr, or pcr= in the policy), or reset the TPM by a reboot", ErrForeign, pcr, registers(held))
}

// recover reads the log and finds out how much of it the TPM holds. Three answers: all of it; a prefix, and the extender sends
// the rest; neither, and that is ErrDiverged. Nothing is changed before the answer is known.
func (l *List) recover(ctx context.Context) (Recovery, *extender, error) {
	var m *matcher
	if l.config.TPM != nil {
		m = newMatcher(l.config.TPM)
		if err := m.hold(ctx, l.config.PCR); err != nil {
			return Recovery{}, nil, err
		}
	}
	cut, err := l.scan(ctx, m)
	if err != nil {
		return Recovery{}, nil, err
	}
	recovery := Recovery{Entries: l.logged.n, CutBytes: cut}
	l.accepted.n, l.unrecent = l.logged.n, l.logged.n
	x := &extender{list: l}
	if m != nil {
		if err := m.judge(l.logged.n, l.config.PCR); err != nil {
			return recovery, nil, err
		}
		x = m.extender(l)
		recovery.Unextended = l.logged.n - l.extended.n
	}
	if cut > 0 {
		// The crash came in the middle of a write: what was cut was never synced, so never extended, and its event comes again.
		l.log.Warn("removing an incomplete entry at the log's end", zap.Int64("bytes", cut))
		fault.ListCut.Pass()
		if err := l.file.Truncate(l.loggedSize); err != nil {
			return recovery, nil, fmt.Errorf("remove an incomplete entry: %w", err)
		}
	}
	if err := l.rewrite(x.at); err != nil {
		return recovery, nil, err
	}
	fault.ListRecovered.Pass()
	return recovery, x, nil
}

// rewriteSize is how many bytes are written anew at a time.
const rewriteSize = 1 << 20

// rewrite makes durable what was found in the log from an offset on. The agent before may have died between writing and syncing, or of
// a sync that did not succeed: then the kernel has the bytes, and does not know any more that the disk has not.
func (l *List) rewrite(from int64) error {
	if from == l.loggedSize {
		return nil
	}
	b := make([]byte, min(rewriteSize, l.loggedSize-from))
	for at := from; at < l.loggedSize; at += int64(len(b)) {
		b = b[:min(int64(len(b)), l.loggedSize-at)]
		if _, err := l.file.ReadAt(b, at); err != nil {
			return fmt.Errorf("read what is to be written anew: %w; %s", err, durable.Advice(err))
		}
		if _, err := l.file.WriteAt(b, at); err != nil {
			return fmt.Errorf("write anew what was not extended: %w; %s", err, durable.Advice(err))
		}
	}
	if err := l.file.Sync(); err != nil {
		return fmt.Errorf("sync what was not extended: %w; %s", err, durable.Advice(err))
	}
	return nil
}

// scan counts and indexes the log, fills the set of known entries, and replays. It returns how many bytes an incomplete entry at
// the end has.
func (l *List) scan(ctx context.Context, m *matcher) (cut int64, err error) {
	const evidence = "keep the folder as evidence, move it away, and restart"
	r := imalog.NewReader(io.NewSectionReader(l.file, 0, math.MaxInt64), ima.SHA1)
	var e imalog.Entry
	for {
		err := r.ReadInto(&e)
		var corrupt *imalog.CorruptError
		switch {
		case err == io.EOF:
			return 0, nil
		case errors.As(err, &corrupt) && corrupt.Cut:
			return r.End() - r.Offset(), nil
		case errors.As(err, &corrupt):
			return 0, fmt.Errorf("%w: %w; %s", ErrAltered, err, evidence)
		case err != nil:
			return 0, err
		}
		if !e.Violation() && e.Digest(ima.SHA1) != r.StoredDigest() {
			return 0, fmt.Errorf("%w: entry %d (%q) at byte %d does not match its digest; %s",
				ErrAltered, l.logged.n, e.Name(), r.Offset(), evidence)
		}
		if e.Violation() {
			l.violations++
		} else {
			l.config.Store.add(&l.ids, keyOf(&e))
		}
		l.pcrs |= 1 << e.PCR()
		l.noteLogged(r.End())
		if m != nil {
			if err := m.add(ctx, &e, r.End()); err != nil {
				return 0, err
			}
		}
	}
}

// matcher finds the longest prefix of a log that the registers hold.
type matcher struct {
	tpm     TPM
	replay  *imalog.Replay
	banks   []ima.HashAlgo                      // that can be replayed
	held    map[int]map[ima.HashAlgo]ima.Digest // what the TPM has, of each register that the log names
	entries int
	longest int // entries of the longest prefix that matches so far; -1: not even none
	end     int64
}

func newMatcher(t TPM) *matcher {
	replay := imalog.NewReplay(t.Banks()...)
	return &matcher{tpm: t, replay: replay, banks: replay.Banks(), held: make(map[int]map[ima.HashAlgo]ima.Digest)}
}

// hold reads a register that the log names for the first time, so that it is zero in the replay up to here. If the TPM has
// another value, no prefix up to here matches.
func (m *matcher) hold(ctx context.Context, pcr int) error {
	held, err := m.tpm.ReadPCR(ctx, pcr)
	if err != nil {
		return err
	}
	m.held[pcr] = held
	if !values(m.replay, pcr).matches(held) {
		m.longest = -1
	}
	return nil
}

// add takes the next entry, which ends at the given offset.
func (m *matcher) add(ctx context.Context, e *imalog.Entry, end int64) error {
	if _, ok := m.held[e.PCR()]; !ok {
		if err := m.hold(ctx, e.PCR()); err != nil {
			return err
		}
	}
	m.replay.Extend(e)
	m.entries++
	if m.matches() {
		m.longest, m.end = m.entries, end
	}
	return nil
}

func (m *matcher) matches() bool {
	for pcr, held := range m.held {
		for _, bank := range m.banks {
			if held[bank] != m.replay.Value(pcr, bank) {
				return false
			}
		}
	}
	return true
}

// judge says whether the list may go on.
func (m *matcher) judge(entries, pcr int) error {
	switch {
	case m.longest >= 0:
		return nil
	case entries == 0:
		return foreign(pcr, m.held[pcr])
	}
	var held, replayed []string
	for _, pcr := range slices.Sorted(maps.Keys(m.held)) {
		held = append(held, fmt.Sprintf("PCR %d is %v", pcr, registers(m.held[pcr])))
		replayed = append(replayed, fmt.Sprintf("PCR %d %v", pcr, values(m.replay, pcr)))
	}
	return fmt.Errorf("%w: %s, which none of the log's %d entries leads to (all of them lead to %s); something else extended it, "+
		"or the log was changed: keep both as evidence, then reboot, which begins new lists",
		ErrDiverged, strings.Join(held, ", "), entries, strings.Join(replayed, ", "))
}

// extender makes the one that sends what is behind the longest prefix.
func (m *matcher) extender(l *List) *extender {
	l.extended.n = m.longest
	known := make(map[int]bool)
	for pcr := range m.held {
		known[pcr] = true
	}
	return &extender{list: l, tpm: m.tpm, banks: m.tpm.Banks(), known: known, at: m.end}
}
