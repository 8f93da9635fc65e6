// Package loader owns the kernel side: it loads, attaches, pins and adopts the BPF programs, and reads and writes their maps.
//
// Call Open once; then Next and Commit from one goroutine; everything else from any. Close leaves the programs at work:
// they go on recording into their pinned maps, and the next Open adopts them, so that a restart of the agent loses nothing.
// Unload takes them out of the kernel.
//
// It promises that a record is given back to the kernel only by Commit, that what it adopts is what this very build would
// have loaded (the object's hash is pinned beside it, and every object's type is checked), and that a set found incomplete
// is never used. It does not promise that no record was lost: the kernel side counts those, and Losses tells.
package loader

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
)

// Options says how the kernel side is loaded.
type Options struct {
	PinDir       string // a folder on a bpffs; made if missing, mode 0700
	RingSize     uint32 // bytes; a power of two and a multiple of the page size
	KernelDigest bool   // ask the kernel for digests
}

// Origin is how Open came by the kernel side.
type Origin int

// The ways.
const (
	Loaded   Origin = iota // there was none
	Adopted                // an earlier agent's, whole and of this build
	Replaced               // an earlier one was incomplete or of another build; what ran in between is unknown
)

// Kernel is the kernel side at work.
type Kernel struct {
	maps   map[string]*ebpf.Map
	links  map[string]link.Link
	ring   *ring
	origin Origin
}

// Origin tells how Open came by the programs.
func (k *Kernel) Origin() Origin { return k.origin }

// Next returns the next record's bytes, or nil if there is none now. They are valid until Commit.
func (k *Kernel) Next() []byte { return k.ring.next() }

// Commit gives back all records that Next returned. Call it when their entries are in the log.
func (k *Kernel) Commit() { k.ring.commit() }

// Backlog returns how many bytes of records wait for Commit.
func (k *Kernel) Backlog() uint64 { return k.ring.backlog() }

// Tasks returns every task with its mount namespace, and registers those namespaces with the kernel side.
func (k *Kernel) Tasks() ([]event.Task, error) {
	iter, ok := k.links[imansProgImansIterTask].(*link.Iter)
	if !ok {
		return nil, errors.New("list tasks: the iterator is not loaded")
	}
	r, err := iter.Open()
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", err)
	}
	return event.DecodeTasks(b)
}

// mountNamespace is struct imans_mount_namespace.
type mountNamespace struct {
	Parent     uint64
	Policy     uint64
	Inum       uint32
	ParentInum uint32
	Flags      uint32
	Pad        uint32
}

// Flags of bpf/event.h.
const (
	flagIgnoreIDs          = 1 // IMANS_IGNORE_IDS
	settingDistrustOverlay = 1 // IMANS_DISTRUST_OVERLAY
)

// Registered returns the mount namespaces that the kernel side knows, each with its parent (zero: not known).
func (k *Kernel) Registered() (map[event.MountNS]event.MountNS, error) {
	parents := make(map[event.MountNS]event.MountNS)
	var id uint64
	var entry mountNamespace
	it := k.maps[imansMapMountNamespaces].Iterate()
	for it.Next(&id, &entry) {
		parents[event.MountNS{Inum: entry.Inum, ID: id}] = event.MountNS{Inum: entry.ParentInum, ID: entry.Parent}
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list registered namespaces: %w", err)
	}
	return parents, nil
}

// SetPolicy tells the kernel side which generation of policies judges a namespace's events from now on, and whether any
// of their rules names an id. Content measured under another generation is an event again. A namespace that has died
// meanwhile is no error.
func (k *Kernel) SetPolicy(ns, parent event.MountNS, generation uint64, ignoreIDs bool) error {
	entry := mountNamespace{Parent: parent.ID, Policy: generation, Inum: ns.Inum, ParentInum: parent.Inum}
	if ignoreIDs {
		entry.Flags = flagIgnoreIDs
	}
	err := k.maps[imansMapMountNamespaces].Update(ns.ID, entry, ebpf.UpdateExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("set policy generation of namespace %v: %w", ns, err)
	}
	return nil
}

// MarkMeasured tells the kernel side that this content needs no event any more. When its map is full it is emptied, and
// events flow once more.
func (k *Kernel) MarkMeasured(key event.MeasuredKey) error {
	m := k.maps[imansMapMeasuredContents]
	err := m.Update(key, uint32(1), ebpf.UpdateAny)
	if errors.Is(err, unix.E2BIG) {
		if err = k.forget(func(event.MeasuredKey) bool { return true }); err == nil {
			err = m.Update(key, uint32(1), ebpf.UpdateAny)
		}
	}
	if err != nil {
		return fmt.Errorf("mark content as measured: %w", err)
	}
	return nil
}

// Forget drops marks. One that is not there is no error.
func (k *Kernel) Forget(keys []event.MeasuredKey) error {
	for _, key := range keys {
		if err := k.maps[imansMapMeasuredContents].Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget measured content: %w", err)
		}
	}
	return nil
}

// ForgetNamespace drops all that was marked as measured for a namespace that has ended. It goes through the whole map; Forget is
// quicker for who knows the keys.
func (k *Kernel) ForgetNamespace(ns event.MountNS) error {
	return k.forget(func(key event.MeasuredKey) bool { return key.MountNS == ns.ID })
}

// forget deletes the keys that match. An iteration disturbed by the deletions may miss some; it is repeated until a pass
// finds none.
func (k *Kernel) forget(match func(event.MeasuredKey) bool) error {
	m := k.maps[imansMapMeasuredContents]
	for {
		var keys []event.MeasuredKey
		var key event.MeasuredKey
		var value uint32
		it := m.Iterate()
		for it.Next(&key, &value) {
			if match(key) {
				keys = append(keys, key)
			}
		}
		if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
			return fmt.Errorf("list measured contents: %w", err)
		}
		if len(keys) == 0 {
			return nil
		}
		if err := k.Forget(keys); err != nil {
			return err
		}
	}
}

// LossKey names a counter of lost events.
type LossKey struct {
	NS     event.MountNS
	Reason event.Loss
}

// Losses returns how many events were lost since the programs were loaded. The counters only grow.
func (k *Kernel) Losses() (map[LossKey]uint64, error) {
	losses := make(map[LossKey]uint64)
	var key struct {
		ID           uint64
		Inum, Reason uint32
	}
	var count uint64
	it := k.maps[imansMapLosses].Iterate()
	for it.Next(&key, &count) {
		losses[LossKey{event.MountNS{Inum: key.Inum, ID: key.ID}, event.Loss(key.Reason)}] = count
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read loss counters: %w", err)
	}
	return losses, nil
}

// ForgetLosses drops the counters of a namespace that has ended, once they are recorded.
func (k *Kernel) ForgetLosses(key LossKey) error {
	raw := struct {
		ID           uint64
		Inum, Reason uint32
	}{key.NS.ID, key.NS.Inum, uint32(key.Reason)}
	if err := k.maps[imansMapLosses].Delete(raw); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget loss counter: %w", err)
	}
	return nil
}

// DistrustOverlay tells the kernel side whether to ask the kernel for digests of overlayfs files: once the kernel's own IMA
// has a policy, it may answer from a cache that does not notice a change of the real inode.
func (k *Kernel) DistrustOverlay(distrust bool) error {
	var flags uint32
	if distrust {
		flags = settingDistrustOverlay
	}
	if err := k.maps[imansMapSettings].Update(uint32(0), flags, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("set overlay distrust: %w", err)
	}
	return nil
}

// Close releases what this process holds. The kernel side goes on recording.
func (k *Kernel) Close() error {
	var errs []error
	if k.ring != nil {
		errs = append(errs, k.ring.close())
	}
	for _, l := range k.links {
		errs = append(errs, l.Close())
	}
	for _, m := range k.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
