package namespace

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
)

// told is which records a list told violations of. An entry that comes a second time, as the agent died before it gave the record back, is
// known to the list; a violation may well come twice, so what tells them apart is kept here. It is of use to the next agent of the same
// kernel side until that has caught up.
//
// The goroutine that handles records uses it.
type told struct {
	beside
	before map[toldKey]uint32 // by an earlier agent: the number of the entry
}

// toldKey is one violation of a record.
type toldKey struct {
	sequence uint64
	sum      uint32 // CRC-32 of the entry's data
}

const (
	// toldName is the file's name in a namespace's folder.
	toldName = "told_violations"
	// toldSize is that of a record of the file: three numbers, little endian.
	toldSize = 16
	// toldEnough is how large the file gets before what it has of records that were given back is dropped.
	toldEnough = 64 << 10
	// toldMax is how large it may be: a violation of each record that the largest ring buffer has room for is less.
	toldMax = 1 << 30
)

// tell appends a record's violation, unless an earlier agent did; appended: the receipt is of it.
func (s *State) tell(sequence uint64, e *imalog.Entry) (receipt measure.Receipt, appended bool) {
	key := toldKey{sequence, crc32.ChecksumIEEE(e.Data())}
	if s.told.already(s.list, key) {
		return receipt, false
	}
	// Before the entry can be in the log: an agent that dies in between leaves a number that the list does not come to, or another's.
	if err := s.told.note(key, s.list.Accepted()); err != nil {
		s.tree.log.Warn("the next agent may tell a violation again", zap.String("file", e.Name()), zap.Stringer("ns", s.ns), zap.Error(err))
	}
	s.tree.toldEnough = s.tree.toldEnough || s.told.size >= toldEnough
	fault.ViolationNoted.Pass()
	return s.list.Append(e), true
}

// openTold reads what an earlier agent wrote; again: its records may come again.
func openTold(dir string, again bool) (*told, error) {
	t := &told{beside: beside{path: filepath.Join(dir, toldName)}, before: make(map[toldKey]uint32)}
	if !again {
		return t, t.forget()
	}
	f, err := t.open(toldMax)
	if f != nil {
		err = errors.Join(t.load(f), f.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("read what violations a list told: %w", err)
	}
	return t, nil
}

func (t *told) load(f *os.File) error {
	le, r := binary.LittleEndian, bufio.NewReader(f)
	for b := make([]byte, toldSize); ; t.size += toldSize {
		if _, err := io.ReadFull(r, b); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		} else if err != nil {
			return err
		}
		t.before[toldKey{le.Uint64(b), le.Uint32(b[8:])}] = le.Uint32(b[12:])
	}
}

// already reports whether an earlier agent's violation of the record is in the list.
func (t *told) already(list *measure.List, key toldKey) bool {
	number, ok := t.before[key]
	if !ok {
		return false
	}
	r, left, err := list.Reader(int(number))
	if err != nil || left == 0 {
		return false // it came to nothing
	}
	e, err := r.Next()
	return err == nil && e.Violation() && crc32.ChecksumIEEE(e.Data()) == key.sum
}

// note writes down a violation that is about to become the list's entry of that number.
func (t *told) note(key toldKey, number int) error {
	le := binary.LittleEndian
	b := le.AppendUint32(le.AppendUint64(nil, key.sequence), key.sum)
	if err := t.append(le.AppendUint32(b, uint32(number))); err != nil {
		return fmt.Errorf("note a violation: %w", err)
	}
	return nil
}

// forget drops what was noted: no record will come again.
func (t *told) forget() error {
	t.before, t.size = nil, 0
	if err := os.Remove(t.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget noted violations: %w", err)
	}
	return nil
}

// forgetTold drops what was noted of records that are given back, where it has become much. Till CaughtUp there may be others among them.
func (t *Tree) forgetTold() {
	if !t.toldEnough || !t.caughtUp {
		return
	}
	t.toldEnough = false
	if err := t.forgetAllTold(); err != nil {
		t.log.Warn("noted violations go on to take room", zap.Error(err))
	}
}

// CaughtUp says that all records of an earlier agent are handled and given back.
func (t *Tree) CaughtUp() error {
	t.caughtUp = true
	return t.forgetAllTold()
}

func (t *Tree) forgetAllTold() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, s := range t.states {
		if s.told != nil {
			errs = append(errs, s.told.forget())
		}
	}
	return errors.Join(errs...)
}
