package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// recover reads the log and finds out how much of it the TPM holds. Three answers: all of it; a prefix, and the extender sends
// the rest; neither, and that is ErrDiverged. Nothing is changed before the answer is known.
func (l *List) recover(ctx context.Context) (Recovery, error) {
	cut, err := l.scan()
	if err != nil {
		return Recovery{}, err
	}
	recovery := Recovery{Entries: l.logged, CutBytes: cut}
	l.accepted = l.logged
	if l.config.TPM != nil {
		if err := l.match(ctx); err != nil {
			return recovery, err
		}
		recovery.Unextended = l.logged - l.extended
	}
	if cut > 0 {
		// The crash came in the middle of a write: what was cut was never synced, so never extended, and its event comes again.
		l.log.Warn("removing an incomplete entry at the log's end", zap.Int64("bytes", cut))
		if err := l.file.Truncate(l.loggedSize); err != nil {
			return recovery, fmt.Errorf("remove an incomplete entry: %w", err)
		}
	}
	return recovery, nil
}

// each reads the log's entries and returns how many bytes an incomplete one at the end has.
func (l *List) each(visit func(e *imalog.Entry, r *imalog.Reader) error) (cut int64, err error) {
	r := imalog.NewReader(io.NewSectionReader(l.file, 0, math.MaxInt64), ima.SHA1)
	for {
		e, err := r.Next()
		var corrupt *imalog.CorruptError
		switch {
		case err == io.EOF:
			return 0, nil
		case errors.As(err, &corrupt) && corrupt.Cut:
			return r.End() - r.Offset(), nil
		case errors.As(err, &corrupt):
			return 0, fmt.Errorf("%w: %w; keep the folder as evidence, move it away, and restart", ErrAltered, err)
		case err != nil:
			return 0, err
		}
		if err := visit(e, r); err != nil {
			return 0, err
		}
	}
}

// scan counts and indexes the log and fills the set of known entries.
func (l *List) scan() (cut int64, err error) {
	return l.each(func(e *imalog.Entry, r *imalog.Reader) error {
		if !e.Violation() && e.Digest(ima.SHA1) != r.StoredDigest() {
			return fmt.Errorf("%w: entry %d (%q) at byte %d does not match its digest; keep the folder as evidence, move it away, and restart",
				ErrAltered, l.logged, e.Name(), r.Offset())
		}
		if e.Violation() {
			l.violations++
		} else {
			l.config.Store.add(&l.ids, keyOf(e))
		}
		l.logged++
		l.loggedSize = r.End()
		if l.logged%indexEvery == 0 {
			l.index = append(l.index, l.loggedSize)
		}
		return nil
	})
}

// match finds the longest prefix of the log that the registers hold.
func (l *List) match(ctx context.Context) error {
	t := l.config.TPM
	pcrs := map[int]bool{l.config.PCR: true}
	if _, err := l.each(func(e *imalog.Entry, _ *imalog.Reader) error { pcrs[e.PCR()] = true; return nil }); err != nil {
		return err
	}
	held := make(map[int]map[ima.HashAlgo]ima.Digest)
	for pcr := range pcrs {
		v, err := t.ReadPCR(ctx, pcr)
		if err != nil {
			return err
		}
		held[pcr] = v
	}
	replay := imalog.NewReplay(t.Banks()...)
	matches := func() bool {
		for pcr := range pcrs {
			if !equal(held[pcr], values(replay, t.Banks(), pcr)) {
				return false
			}
		}
		return true
	}
	longest, n := -1, 0
	if matches() {
		longest = 0
	}
	_, err := l.each(func(e *imalog.Entry, _ *imalog.Reader) error {
		replay.Extend(e)
		n++
		if matches() {
			longest = n
		}
		return nil
	})
	if err != nil {
		return err
	}
	return l.judge(longest, n, held[l.config.PCR], values(replay, t.Banks(), l.config.PCR))
}

func (l *List) judge(longest, entries int, held, replayed map[ima.HashAlgo]ima.Digest) error {
	switch {
	case longest >= 0:
		l.extended = longest
		return nil
	case entries == 0:
		return fmt.Errorf("%w: PCR %d is %v and the log is empty; choose a PCR that nothing else uses (--pcr), or reset the TPM by a reboot",
			ErrForeign, l.config.PCR, held)
	}
	return fmt.Errorf("%w: PCR %d is %v, which none of the log's %d entries leads to (all of them lead to %v); "+
		"something else extended it, or the log was changed: keep both as evidence, then reboot, which begins new lists",
		ErrDiverged, l.config.PCR, held, entries, replayed)
}
