package loader

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"imans.dev/imans-agent/internal/event"
)

// hold is struct imans_hold.
type hold struct {
	Boottime     uint64
	Told, Writes uint32
}

// rawInode is struct imans_inode.
type rawInode struct {
	Ino             uint64
	Dev, Generation uint32
}

// Hold tells the kernel side to tell of an inode's next writer, for one that an earlier set of programs held. One that is held stays as
// it is; where there is no room every inode counts as held.
func (k *Kernel) Hold(i event.Inode) error {
	err := k.maps[imansMapHeldInodes].Update(rawInode{i.Ino, i.Dev, i.Generation}, hold{}, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return nil
	}
	if err != nil {
		return k.set(settingHoldAll, true)
	}
	return nil
}

// Writes returns how often a file was opened for writing since its inode is held, or inodes are, as a file event says how often by then. It
// goes round. False: it is not held.
func (k *Kernel) Writes(inodes ...event.Inode) (count uint32, held bool, err error) {
	for _, i := range inodes {
		var h hold
		err := k.maps[imansMapHeldInodes].Lookup(rawInode{i.Ino, i.Dev, i.Generation}, &h)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return 0, false, nil
		} else if err != nil {
			return 0, false, fmt.Errorf("look for a held inode: %w", err)
		}
		count += h.Writes
	}
	return count, true, nil
}

// TrimHolds makes room if held inodes had none, which it reports: those go that are held since before some time and that nobody wants any
// more. Their records must have been handled. It looks at each held inode, so it is not to be called often when it had little success.
func (k *Kernel) TrimHolds(before time.Duration, wanted func(event.Inode) bool) (full bool, err error) {
	var all uint32
	if err := k.maps[imansMapSettings].Lookup(uint32(settingHoldAll), &all); err != nil || all == 0 {
		return false, err
	}
	return true, k.trimHolds(before, wanted)
}

func (k *Kernel) trimHolds(before time.Duration, wanted func(event.Inode) bool) error {
	m := k.maps[imansMapHeldInodes]
	var old []rawInode
	var i rawInode
	var h hold
	it := m.Iterate()
	for it.Next(&i, &h) {
		if time.Duration(h.Boottime) < before && !wanted(event.Inode{Dev: i.Dev, Generation: i.Generation, Ino: i.Ino}) {
			old = append(old, i)
		}
	}
	if err := it.Err(); errors.Is(err, ebpf.ErrIterationAborted) {
		return nil // too much came and went; another time
	} else if err != nil {
		return fmt.Errorf("list held inodes: %w", err)
	}
	for _, i := range old {
		if err := m.Delete(i); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("let go of an inode: %w", err)
		}
	}
	if len(old) == 0 {
		return nil // all are wanted: every inode goes on to count as held
	}
	return k.set(settingHoldAll, false)
}
