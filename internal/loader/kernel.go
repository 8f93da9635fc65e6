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
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
)

// Options says how the kernel side is loaded.
type Options struct {
	PinDir       string     // a folder on a bpffs; made if missing, mode 0700
	RingSize     uint32     // bytes; a power of two and a multiple of the page size
	KernelDigest bool       // ask the kernel for digests
	Types        *btf.Cache // nil: of its own
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
	held
	losses *losses
	ring   *ring
	slots  *slots
	origin Origin
}

// Origin tells how Open came by the programs.
func (k *Kernel) Origin() Origin { return k.origin }

// ID returns what tells this set of programs and maps from any other: an agent that finds another than the one before it did knows that
// something may have run unseen.
func (k *Kernel) ID() string { return hex.EncodeToString(k.id[:]) }

// Next returns the next record's bytes, or nil if there is none now. They are valid until Commit.
func (k *Kernel) Next() []byte { return k.ring.next() }

// Commit gives back all records that Next returned. Call it when their entries are in the log.
func (k *Kernel) Commit() { k.ring.commit() }

// Backlog returns how many bytes of records wait for Commit.
func (k *Kernel) Backlog() uint64 { return k.ring.backlog() }

// Positions returns how many bytes of records were made since the ring buffer was, and how many of them Commit gave back.
func (k *Kernel) Positions() (recorded, committed uint64) { return k.ring.positions() }

// Wait returns when records may have come, or ctx has ended. Nothing is lost by not calling it: Next finds all records.
func (k *Kernel) Wait(ctx context.Context) error {
	if err := k.set(settingWake, true); err != nil {
		return err
	}
	if err := k.ring.wait(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

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
	Inum       uint32
	ParentInum uint32
}

// namespacePolicy is struct imans_namespace_policy.
type namespacePolicy struct {
	Generation uint64
	Flags      uint32
	Pad        uint32
	ID         uint64
}

// Of bpf/event.h.
const (
	flagIgnoreIDs        = 1          // IMANS_IGNORE_IDS
	flagKnownIDs         = 2          // IMANS_KNOWN_IDS
	firstInum            = 0xefffff00 // IMANS_FIRST_INUM
	settingDistrustCache = 0          // IMANS_DISTRUST_CACHE
	settingWake          = 1          // IMANS_WAKE
	settingHoldAll       = 2          // IMANS_HOLD_ALL
	settingLosses        = 3          // IMANS_LOSSES
	settingStandIns      = 4          // IMANS_STAND_INS, one for each of functions
)

// Registered returns the mount namespaces that the kernel side knows, each with its parent (zero: not known): those alive, and those whose end
// was not handled yet.
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

// Alive returns those of them that have not ended.
func (k *Kernel) Alive() (map[event.MountNS]bool, error) {
	alive := make(map[event.MountNS]bool)
	var ns event.MountNS
	it := k.maps[imansMapNamespaceIds].Iterate()
	for it.Next(&ns.Inum, &ns.ID) {
		alive[ns] = true
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list namespaces alive: %w", err)
	}
	return alive, nil
}

// Unregister forgets a namespace whose end is handled. One that is not known is no error.
func (k *Kernel) Unregister(ns event.MountNS) error {
	if err := k.maps[imansMapMountNamespaces].Delete(ns.ID); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("unregister namespace %v: %w", ns, err)
	}
	return nil
}

// Policy is what the kernel side knows of the policies that judge a namespace's events.
type Policy struct {
	Generation uint64 // of the whole chain; unique among all namespaces
	IgnoreIDs  bool   // none of their rules names an id
	KnownIDs   bool   // the namespace's id maps need not be sent any more
}

// SetPolicy tells the kernel side what judges a namespace's events from now on. Content measured under another generation is an
// event again. A namespace that has died meanwhile is no error; where there is no room for one, its events flow each time.
func (k *Kernel) SetPolicy(ns, parent event.MountNS, p Policy) error {
	known := mountNamespace{Parent: parent.ID, Inum: ns.Inum, ParentInum: parent.Inum}
	err := k.maps[imansMapMountNamespaces].Update(ns.ID, known, ebpf.UpdateExist)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("set parent of namespace %v: %w", ns, err)
	}
	var alive uint64
	if err := k.maps[imansMapNamespaceIds].Lookup(ns.Inum, &alive); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("look whether namespace %v is alive: %w", ns, err)
	}
	if alive != ns.ID {
		return nil
	}
	m := k.maps[imansMapNamespacePolicies]
	index := ns.Inum - firstInum
	if index >= m.MaxEntries() {
		return nil
	}
	entry := namespacePolicy{Generation: p.Generation, ID: ns.ID}
	if p.IgnoreIDs {
		entry.Flags |= flagIgnoreIDs
	}
	if p.KnownIDs {
		entry.Flags |= flagKnownIDs
	}
	if err := m.Update(index, entry, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("set policy generation of namespace %v: %w", ns, err)
	}
	return nil
}

// marks returns the map that a key belongs to, and the key as it is there.
func (k *Kernel) marks(key event.MeasuredKey) (*ebpf.Map, any) {
	if key.IDsIgnored() {
		return k.maps[imansMapMeasuredContents], key.Content
	}
	return k.maps[imansMapMeasuredBySubject], key
}

// Marked is what MarkMeasured came to.
type Marked struct {
	New     bool // it was not marked before
	Emptied bool // its map was full and was emptied: no other mark of its kind is left
}

// MarkMeasured tells the kernel side that this content needs no event any more. When its map is full it is emptied, and
// events flow once more.
func (k *Kernel) MarkMeasured(key event.MeasuredKey) (Marked, error) {
	m, raw := k.marks(key)
	done := Marked{New: true}
	err := m.Update(raw, uint32(1), ebpf.UpdateNoExist)
	if errors.Is(err, unix.E2BIG) {
		done.Emptied = true
		if err = k.empty(key.IDsIgnored()); err == nil {
			err = m.Update(raw, uint32(1), ebpf.UpdateNoExist)
		}
	}
	if errors.Is(err, ebpf.ErrKeyExist) {
		done.New, err = false, nil
	}
	if err != nil {
		return done, fmt.Errorf("mark content as measured: %w", err)
	}
	if key.IDsIgnored() {
		k.slots.put(key.Content)
	}
	return done, nil
}

// Forget drops marks. One that is not there is no error.
func (k *Kernel) Forget(keys []event.MeasuredKey) error {
	for _, key := range keys {
		if key.IDsIgnored() {
			k.slots.drop(key.Content)
		}
		m, raw := k.marks(key)
		if err := m.Delete(raw); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget measured content: %w", err)
		}
	}
	return nil
}

// ForgetAll drops all marks, as for an agent that has just begun: it gives every namespace a new generation.
func (k *Kernel) ForgetAll() error {
	k.slots.clear()
	return errors.Join(k.empty(true), k.empty(false))
}

// empty drops the marks of one kind.
func (k *Kernel) empty(idsIgnored bool) error {
	if idsIgnored {
		return empty[event.MeasuredContent](k.maps[imansMapMeasuredContents])
	}
	return empty[event.MeasuredKey](k.maps[imansMapMeasuredBySubject])
}

// emptyBatch is how many keys one call deletes at most.
const emptyBatch = 4096

// empty deletes all keys, going through the map once: entries come only from this process.
func empty[K any](m *ebpf.Map) error {
	keys, values := make([]K, emptyBatch), make([]uint32, emptyBatch)
	var at ebpf.MapBatchCursor
	for {
		_, err := m.BatchLookupAndDelete(&at, keys, values, nil)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // that was the last
		} else if err != nil {
			return fmt.Errorf("forget measured contents: %w", err)
		}
	}
}

// DistrustCache tells the kernel side not to ask the kernel for digests of files below overlayfs, or on file systems that others change:
// once the kernel's own IMA has a policy, it answers from a cache that does not notice their changes.
func (k *Kernel) DistrustCache(distrust bool) error { return k.set(settingDistrustCache, distrust) }

func (k *Kernel) set(setting uint32, on bool) error {
	var value uint32
	if on {
		value = 1
	}
	if err := k.maps[imansMapSettings].Update(setting, value, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("write setting %d: %w", setting, err)
	}
	return nil
}

// Close releases what this process holds. The kernel side goes on recording.
func (k *Kernel) Close() error {
	var errs []error
	if k.ring != nil {
		errs = append(errs, k.ring.close())
	}
	if k.slots != nil {
		errs = append(errs, k.slots.close())
	}
	if k.losses != nil {
		errs = append(errs, k.losses.close())
	}
	return errors.Join(append(errs, k.held.close())...)
}
