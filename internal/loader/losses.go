package loader

import (
	"errors"
	"fmt"
	"maps"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"imans.dev/imans-agent/internal/event"
)

// LossKey names a counter of lost events.
type LossKey struct {
	NS     event.MountNS
	Reason event.Loss
}

// rawLossKey is struct imans_loss_key.
type rawLossKey struct {
	ID           uint64
	Inum, Reason uint32
}

// functions are those at which two programs stand, by the first of them: enum imans_function of bpf/standin.h. The kernel skips such a program
// where another task is interrupted in it; the second, of the same name and "_again", then does what it would have done.
var functions = map[string]uint32{
	imansProgImansWriteAccess: 0, imansProgImansCopyMntNs: 1, imansProgImansSwitchTaskNamespaces: 2, imansProgImansProcFreeInum: 3,
}

// skippedReason is what a skipped program of those at a function is told as.
func skippedReason(program string) event.Loss {
	if program == imansProgImansWriteAccess {
		return event.LossWriterLost
	}
	return event.LossProgramSkipped
}

// losses reads what the kernel side could not tell of.
type losses struct {
	settings, counters *ebpf.Map
	skippable          map[string]*ebpf.Program // those of functions

	mu      sync.Mutex
	changes uint32                // of the counters, when they were read
	read    map[LossKey]uint64    // nil: not yet
	skipped map[event.Loss]uint64 // what was made known; only grows
}

// reserveLosses gives the counters that are of no namespace their room, before others take it all: those of writers, and those that stand in for
// counters without room.
func reserveLosses(m *ebpf.Map) error {
	for _, reason := range []event.Loss{
		event.LossRingBufferFull, event.LossNamespaceMapFull, event.LossNoMountNamespace, event.LossWriterLost,
	} {
		if err := m.Put(rawLossKey{Reason: uint32(reason)}, uint64(0)); err != nil {
			return fmt.Errorf("make a loss counter: %w", err)
		}
	}
	return nil
}

func openLosses(all map[string]*ebpf.Map, links map[string]link.Link) (*losses, error) {
	l := &losses{
		settings: all[imansMapSettings], counters: all[imansMapLosses],
		skippable: make(map[string]*ebpf.Program), skipped: make(map[event.Loss]uint64),
	}
	for name, program := range links {
		if _, ok := functions[name]; !ok {
			continue
		}
		info, err := program.Info()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("look at link %s: %w", name, err), l.close())
		}
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open program %s: %w", name, err), l.close())
		}
		l.skippable[name] = p
	}
	return l, nil
}

func (l *losses) close() error {
	var errs []error
	for _, p := range l.skippable {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// Losses returns how many events were lost since the programs were loaded, those of no namespace, and writers, under the zero one. The counters
// only grow.
func (k *Kernel) Losses() (map[LossKey]uint64, error) {
	l := k.losses
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.readCounters(); err != nil {
		return nil, err
	}
	skipped, err := l.countSkipped()
	if err != nil {
		return nil, err
	}
	all := maps.Clone(l.read)
	for reason, n := range skipped {
		if l.skipped[reason] = max(l.skipped[reason], n); l.skipped[reason] > 0 {
			all[LossKey{Reason: reason}] += l.skipped[reason]
		}
	}
	return all, nil
}

// readCounters goes through the whole map only where something was added since it last did.
func (l *losses) readCounters() error {
	var changes uint32
	if err := l.settings.Lookup(uint32(settingLosses), &changes); err != nil {
		return fmt.Errorf("read whether events were lost: %w", err)
	}
	if l.read != nil && l.changes == changes {
		return nil
	}
	read := make(map[LossKey]uint64)
	var key rawLossKey
	var count uint64
	it := l.counters.Iterate()
	for it.Next(&key, &count) {
		if count > 0 {
			read[LossKey{event.MountNS{Inum: key.Inum, ID: key.ID}, event.Loss(key.Reason)}] = count
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read loss counters: %w", err)
	}
	l.changes, l.read = changes, read
	return nil
}

// countSkipped returns how often programs were skipped that no others stood in for.
func (l *losses) countSkipped() (map[event.Loss]uint64, error) {
	skipped := make(map[event.Loss]uint64)
	for name, p := range l.skippable {
		missed, stoodIn, err := l.madeUpFor(name, p)
		if err != nil {
			return nil, err
		}
		// The second was read after the first, so it may be ahead; modulo 2^32, as it is counted.
		skipped[skippedReason(name)] += uint64(max(0, int32(uint32(missed)-stoodIn)))
	}
	return skipped, nil
}

// madeUpFor returns how often a program was skipped, and how often another one stood in for it.
func (l *losses) madeUpFor(name string, p *ebpf.Program) (missed uint64, stoodIn uint32, err error) {
	stats, err := p.Stats()
	if err != nil {
		return 0, 0, fmt.Errorf("read how often a program was skipped: %w", err)
	}
	if err := l.settings.Lookup(settingStandIns+functions[name], &stoodIn); err != nil {
		return 0, 0, fmt.Errorf("read how often a skipped program was stood in for: %w", err)
	}
	return stats.RecursionMisses, stoodIn, nil
}

// ForgetLosses drops the counters of a namespace that has ended, once they are recorded.
func (k *Kernel) ForgetLosses(key LossKey) error {
	l := k.losses
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.read, key)
	raw := rawLossKey{key.NS.ID, key.NS.Inum, uint32(key.Reason)}
	if err := l.counters.Delete(raw); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget loss counter: %w", err)
	}
	return nil
}
