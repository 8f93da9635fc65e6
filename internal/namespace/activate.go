package namespace

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/policy"
)

// Mode is how a mount namespace comes to be an IMA namespace. Whatever the mode, one can be activated by hand, from within by its
// window or from outside by the control socket. Until then it shares its parent's fate.
type Mode string

// The modes.
const (
	All        Mode = "all"        // each one, at its birth, with the policy for new namespaces
	OnRequest  Mode = "newns"      // those asked for by RequestNew before they were cloned, likewise
	Lazy       Mode = "lazy"       // when a policy is first written to it
	Containers Mode = "containers" // those that a container runtime's integration activates
)

// Modes are all modes.
func Modes() []Mode { return []Mode{All, OnRequest, Lazy, Containers} }

var (
	// ErrActive means that a setting was to be changed after activation.
	ErrActive = fmt.Errorf("the namespace is active already: %w", syscall.EBUSY)
	// ErrInactive means that the namespace has to be activated first.
	ErrInactive = fmt.Errorf("the namespace is not active; activate it first: %w", syscall.EACCES)
	// ErrEnded means that the namespace is gone.
	ErrEnded = errors.New("the namespace has ended")
	// ErrTooManyRules means that a namespace has as many rules as it may have.
	ErrTooManyRules = fmt.Errorf("the namespace has as many rules as it may have: %w", syscall.ENOSPC)
)

// Activate makes a namespace an IMA namespace with an empty policy: its list begins, with boot_aggregate. One that is active already
// stays as it is. Like all that changes the tree, it is called by the goroutine that handles records.
func (t *Tree) Activate(ctx context.Context, ns event.MountNS) error {
	s, ok := t.known(ns)
	if !ok {
		return ErrEnded
	}
	if !s.active {
		if err := s.activate(&policy.Policy{}); err != nil {
			return err
		}
	}
	return s.begin(ctx)
}

// Lazy reports whether a policy written to a namespace that is not active makes it so.
func (t *Tree) Lazy() bool { return t.config.Mode == Lazy }

// begin makes sure that an active namespace has its list.
func (s *State) begin(ctx context.Context) error {
	if s.ended {
		return fmt.Errorf("the list has ended: %w", syscall.EIO)
	}
	if err := s.open(ctx); err != nil {
		return errors.Join(err, s.giveUp(ctx, err))
	}
	return s.list.Barrier(ctx)
}

// activate makes a namespace active; its list comes with its first entry.
func (s *State) activate(p *policy.Policy) error {
	t := s.tree
	t.mu.Lock()
	s.active, s.own, s.policy = true, true, p
	t.mu.Unlock()
	t.log.Info("namespace activated", zap.Stringer("ns", s.ns), zap.String("hash", s.algo.String()), zap.String("template", s.template))
	return t.publish(s)
}

// SetHash chooses the hash of a namespace's files, before it is active.
func (t *Tree) SetHash(ns event.MountNS, name string) error {
	algo, ok := ima.HashAlgoByName(name)
	if _, can := algo.Hash(); !ok || !can {
		return fmt.Errorf("hash %q is not one that can be computed here: %w", name, syscall.EINVAL)
	}
	return t.configure(ns, func(s *State) error {
		if err := imalog.CheckDigest(s.template, algo); err != nil {
			return fmt.Errorf("%w: %w", err, syscall.EINVAL)
		}
		s.algo = algo
		return nil
	})
}

// SetTemplate chooses the template of a namespace's entries, before it is active.
func (t *Tree) SetTemplate(ns event.MountNS, name string) error {
	if err := imalog.CheckTemplate(name); err != nil {
		return fmt.Errorf("%w: %w", err, syscall.EINVAL)
	}
	return t.configure(ns, func(s *State) error {
		if imalog.CheckDigest(name, s.algo) != nil {
			s.algo = ima.SHA1 // as the kernel hashes for the old templates
		}
		s.template = name
		return nil
	})
}

func (t *Tree) configure(ns event.MountNS, set func(*State) error) error {
	s, ok := t.known(ns)
	if !ok {
		return ErrEnded
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.active {
		return ErrActive
	}
	return set(s)
}

// AppendPolicy adds rules whose ids are those of maps, those of whoever wrote them. They judge the next event. In mode Lazy it
// activates the namespace. Of more rules than a namespace may have, the first are taken and the error is ErrTooManyRules.
func (t *Tree) AppendPolicy(ctx context.Context, ns event.MountNS, rules *policy.Policy, maps ima.IDMaps) error {
	s, ok := t.known(ns)
	switch {
	case !ok:
		return ErrEnded
	case s == t.native:
		return fmt.Errorf("the native policy is that of --policy: %w", syscall.EPERM)
	}
	if !s.active && t.config.Mode != Lazy {
		return ErrInactive
	}
	rules, err := writtenRules(rules, maps)
	if err != nil {
		return err
	}
	var tooMany error
	if room := t.config.MaxRules - len(s.rules()); len(rules.Rules()) > room {
		rules, tooMany = rules.First(max(room, 0)), ErrTooManyRules
	}
	p := policy.Append(s.policy, rules)
	if !s.active {
		p = rules
	}
	if err := s.setPolicy(ctx, p); err != nil {
		return err
	}
	return tooMany
}

// writtenRules returns rules with the ids of who wrote them. Source: ima_parse_rule, which refuses an id without a kernel id.
func writtenRules(rules *policy.Policy, maps ima.IDMaps) (*policy.Policy, error) {
	mapped, unmapped := rules.WrittenIn(maps)
	if unmapped != nil {
		return nil, fmt.Errorf("rule %q names an id that its writer's user namespace does not have: %w", unmapped.Text, syscall.EINVAL)
	}
	return mapped, nil
}

// CheckPolicy says why rules by themselves could not be appended now. From any goroutine.
func (t *Tree) CheckPolicy(ns event.MountNS, rules *policy.Policy, maps ima.IDMaps) error {
	if _, err := writtenRules(rules, maps); err != nil {
		return err
	}
	s, ok := t.known(ns)
	if !ok {
		return ErrEnded
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(s.rules())+len(rules.Rules()) > t.config.MaxRules {
		return ErrTooManyRules
	}
	return nil
}

// rules returns the rules that a namespace has of its own.
func (s *State) rules() []*policy.Rule {
	if !s.active || s.parent == nil {
		return nil
	}
	return s.policy.Rules()
}

// setPolicy puts a policy into force. It is on record before, so that a restart has it.
func (s *State) setPolicy(ctx context.Context, p *policy.Policy) error {
	if !s.active {
		if err := s.activate(p); err != nil {
			return err
		}
		return s.begin(ctx)
	}
	t := s.tree
	t.mu.Lock()
	before, own := s.policy, s.own
	s.policy, s.own = p, true
	t.mu.Unlock()
	err := s.begin(ctx)
	if err == nil {
		err = s.record()
	}
	if err != nil {
		t.mu.Lock()
		s.policy, s.own = before, own
		t.mu.Unlock()
		return err
	}
	return t.publish(s)
}

// nsPolicy returns the policy for new namespaces in a namespace of those ids, whose numbers its rules mean.
func (c *Config) nsPolicy(ids ima.IDMaps) *policy.Policy {
	p, _ := c.NSPolicy.WrittenIn(ids)
	return p
}

// idMaps returns how the namespace numbers ids.
func (s *State) idMaps() ima.IDMaps {
	s.tree.mu.Lock()
	defer s.tree.mu.Unlock()
	return s.ids
}

// IDMaps takes note of how a namespace numbers ids.
func (t *Tree) IDMaps(m *event.IDMaps) error {
	s, ok := t.known(m.NS)
	if !ok {
		return nil
	}
	maps := m.IDMaps
	if m.Cut {
		var err error
		if maps, err = readIDMaps(s.leader); err != nil {
			t.log.Warn("a namespace's id maps are not known yet", zap.Stringer("ns", s.ns), zap.Error(err))
			return nil // sent again with the next file
		}
	}
	t.mu.Lock()
	s.ids = maps
	s.idsKnown = len(maps.UIDs) > 0 && len(maps.GIDs) > 0
	renumbered := s.active && !s.own && t.config.NSPolicy.NamesAnyIDs()
	if renumbered {
		s.policy = t.config.nsPolicy(maps)
	}
	t.mu.Unlock()
	if renumbered {
		return t.publish(s)
	}
	return t.tell(s)
}

// tell gives the kernel side a namespace's part of what it knows.
func (t *Tree) tell(s *State) error {
	t.mu.Lock()
	p := loader.Policy{Generation: s.generation, IgnoreIDs: true, KnownIDs: s.idsKnown}
	for n := s; n != nil; n = n.parent {
		p.IgnoreIDs = p.IgnoreIDs && (!n.active || !n.policy.NamesIDs())
	}
	parent := s.parentNS()
	t.mu.Unlock()
	return t.config.Kernel.SetPolicy(s.ns, parent, p)
}
