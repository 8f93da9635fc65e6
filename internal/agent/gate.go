package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/container"
	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/gate"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/namespace"
)

// Gate says what is held up until it is measured.
type Gate struct {
	Mode    string        // of containers: one of namespace.GateModes
	Timeout time.Duration // that an open is held up at most
	Closed  bool          // all gates are closed: what was not measured by then may not be used
}

// A TPM takes some of it, and what waits for a program waits no longer than that.
const (
	gateTimeoutMin = 100 * time.Millisecond
	gateTimeoutMax = time.Minute
)

// GuardCommand is the subcommand that runs a gate's guard.
const GuardCommand = "gate-guard"

// guardFile says which process guards the gates.
func guardFile(runDir string) string { return filepath.Join(runDir, "gate-guard.json") }

// gates are the tree's gates.
type gates struct {
	*gate.Gates
	tree *namespace.Tree
	pump *pump
	log  *zap.Logger
}

// newGates makes gates for a tree that is set with set before the first is opened.
func newGates(c Config, log *zap.Logger) *gates {
	g := &gates{log: log}
	g.Gates = gate.New(gate.Config{
		Ask: g.ask, Below: func(owner event.MountNS, inum uint32) (bool, bool) { return g.tree.Below(owner, inum) },
		Missed: g.missed, Dropped: g.dropped, Timeout: c.Gate.Timeout, Closed: c.Gate.Closed, Log: log,
	}, []string{GuardCommand}, guardFile(c.RunDir))
	return g
}

// Open marks what the namespace has mounted.
func (g *gates) Open(ns event.MountNS, mode namespace.GateMode) error {
	return g.mark(ns, mode, g.Gates.Open)
}

// Renew marks that and nothing else.
func (g *gates) Renew(ns event.MountNS, mode namespace.GateMode) error {
	return g.mark(ns, mode, g.Gates.Renew)
}

func (g *gates) mark(ns event.MountNS, mode namespace.GateMode, mark func(owner event.MountNS, its, machine gate.Mounts, how gate.How) error) error {
	t, err := container.Process(ns.Inum)
	if err != nil {
		return err
	}
	its, err := mounts(container.Mounts(t))
	if err != nil {
		return err
	}
	defer its.Root.Close()
	its.PID = t.PID
	machine, err := mounts(container.MachineMounts())
	if err != nil {
		return err
	}
	defer machine.Root.Close()
	return mark(ns, its, machine, gate.How{All: mode.All(), Closed: mode.Closed()})
}

// mounts makes of what package container returns what package gate takes.
func mounts(root *os.File, all []container.Mount, err error) (gate.Mounts, error) {
	m := gate.Mounts{Root: root, All: make([]gate.Mount, len(all))}
	for i, one := range all {
		m.All[i] = gate.Mount(one)
	}
	return m, err
}

// ask has a file measured, and waits until it is in all TPMs concerned. It is hashed here, so that a large file holds up nobody else.
func (g *gates) ask(ctx context.Context, owner event.MountNS, a *gate.Asked) error {
	q := namespace.Question{Owner: owner, Inum: a.Inum, Event: a.Event, File: a.File, Digests: make(map[ima.HashAlgo]ima.Digest)}
	algos := g.tree.AskAlgos(a.Inum)
	sums, err := digest.Sum(ctx, a.File, a.Event, algos...)
	if err != nil {
		return err
	}
	for i, algo := range algos {
		q.Digests[algo] = sums[i]
	}
	var waiting namespace.Waiting
	err = g.pump.do(ctx, func(whole context.Context) (err error) {
		if err := ctx.Err(); err != nil {
			return err // the file is used by now: an entry would hide from the hook that it was not measured before
		}
		waiting, err = g.tree.Ask(whole, q)
		return err
	})
	if errors.Is(err, namespace.ErrNotBelow) {
		return gate.ErrNotConcerned
	}
	if err != nil {
		return err
	}
	return waiting.Extended(ctx)
}

// missed records that a file is used before it was measured. Nobody waits for it: the open was held up long enough.
func (g *gates) missed(owner event.MountNS, a *gate.Asked) {
	name := a.Event.Path
	go func() { // ends with the violation, however long the lists are behind, or the agent
		if err := g.pump.do(context.Background(), func(ctx context.Context) error { return g.tree.Missed(ctx, owner, name) }); err != nil {
			g.log.Error("a violation is not recorded", zap.Stringer("ns", owner), zap.String("file", name), zap.Error(err))
		}
	}()
}

// dropped puts the gates back that the guard opened. The guard does not wait for that, however long the lists are behind.
func (g *gates) dropped() {
	go func() {
		err := g.pump.do(context.Background(), func(context.Context) error {
			g.tree.ReopenGates()
			return nil
		})
		if err != nil {
			g.log.Error("gates stay open", zap.Error(err))
		}
	}()
}
