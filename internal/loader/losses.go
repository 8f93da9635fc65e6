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

// losses reads what the kernel side could not tell of.
type losses struct {
	settings, counters *ebpf.Map
	// skippable are the programs, by name, that the kernel skips where another task is interrupted in the same one.
	skippable map[string]*ebpf.Program

	mu      sync.Mutex
	changes uint32             // of the counters, when they were read
	read    map[LossKey]uint64 // nil: not yet
	skipped uint64             // what was made known; only grows
}

func openLosses(all map[string]*ebpf.Map, links map[string]link.Link) (*losses, error) {
	l := &losses{settings: all[imansMapSettings], counters: all[imansMapLosses], skippable: make(map[string]*ebpf.Program)}
	for name, program := range links {
		info, err := program.Info()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("look at link %s: %w", name, err), l.close())
		}
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open program %s: %w", name, err), l.close())
		}
		if p.Type() == ebpf.Tracing && !standsIn(name) {
			l.skippable[name] = p
		} else {
			p.Close()
		}
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

// Losses returns how many events were lost since the programs were loaded, those of no namespace under the zero one. The counters only
// grow.
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
	l.skipped = max(l.skipped, skipped)
	all := maps.Clone(l.read)
	if l.skipped > 0 {
		all[LossKey{Reason: event.LossProgramSkipped}] = l.skipped
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
		read[LossKey{event.MountNS{Inum: key.Inum, ID: key.ID}, event.Loss(key.Reason)}] = count
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read loss counters: %w", err)
	}
	l.changes, l.read = changes, read
	return nil
}

// countSkipped returns how often a program was skipped and no other one stood in for it.
func (l *losses) countSkipped() (uint64, error) {
	var missed uint64
	for _, p := range l.skippable {
		stats, err := p.Stats()
		if err != nil {
			return 0, fmt.Errorf("read how often a program was skipped: %w", err)
		}
		missed += stats.RecursionMisses
	}
	var stoodIn uint32
	if err := l.settings.Lookup(uint32(settingStandIns), &stoodIn); err != nil {
		return 0, fmt.Errorf("read how often a skipped program was stood in for: %w", err)
	}
	// Read after the others, so it may be ahead; modulo 2^32, as it is counted.
	return uint64(max(0, int32(uint32(missed)-stoodIn))), nil
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
