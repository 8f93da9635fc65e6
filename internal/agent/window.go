package agent

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/container"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imafs"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/policy"
)

// views is the tree as the window shows it.
type views struct {
	tree *namespace.Tree
	pump *pump
}

// View implements imafs.Views.
func (v *views) View(ctx context.Context, ns event.MountNS) (imafs.View, error) {
	found, err := v.tree.Lookup(ns)
	if err != nil || ns.ID == 0 {
		// Its birth may be on the way; without an id, what is known may be one that has ended and had the same inode number.
		if err := v.pump.barrier(ctx); err != nil {
			return nil, err
		}
		if found, err = v.tree.Lookup(ns); err != nil {
			return nil, imafs.ErrEnded
		}
	}
	return &view{views: v, ns: found.Info.NS, gone: found.Gone}, nil
}

// view implements imafs.View.
type view struct {
	*views
	ns   event.MountNS
	gone <-chan struct{}
}

// now returns what there is to see; of a namespace that has ended nothing.
func (v *view) now() namespace.View {
	found, err := v.tree.Lookup(v.ns)
	if err != nil {
		return namespace.View{Policy: &policy.Policy{}}
	}
	return found
}

// do changes the tree in the goroutine that handles records, after all that is recorded.
func (v *view) do(ctx context.Context, change func(context.Context) error) error {
	err := v.pump.do(ctx, change)
	if errors.Is(err, namespace.ErrEnded) {
		return imafs.ErrEnded
	}
	return err
}

// Ended implements imafs.View, as do all methods from here on.
func (v *view) Ended() <-chan struct{} { return v.gone }

func (v *view) Owner() imafs.Owner {
	ids := v.now().Info.IDs
	return imafs.Owner{UID: ids.UIDs.ToHost(0), GID: ids.GIDs.ToHost(0)}
}

func (v *view) Active() bool { return v.now().Info.Active }

func (v *view) Lazy() bool { return v.tree.Lazy() }

func (v *view) Activate(ctx context.Context) error {
	return v.do(ctx, func(ctx context.Context) error { return v.tree.Activate(ctx, v.ns) })
}

func (v *view) HashName() string     { return v.now().Info.Algo.String() }
func (v *view) TemplateName() string { return v.now().Info.Template }

func (v *view) SetHash(name string) error {
	return v.do(context.Background(), func(context.Context) error { return v.tree.SetHash(v.ns, name) })
}

func (v *view) SetTemplate(name string) error {
	return v.do(context.Background(), func(context.Context) error { return v.tree.SetTemplate(v.ns, name) })
}

func (v *view) RequestNew(ctx context.Context, c *imafs.Caller) error {
	return v.do(ctx, func(context.Context) error { return v.tree.RequestNew(v.ns, c.TGID) })
}

func (v *view) WithdrawNew(ctx context.Context, c *imafs.Caller) error {
	return v.do(ctx, func(context.Context) error { return v.tree.WithdrawNew(v.ns, c.TGID) })
}

func (v *view) Requested(ctx context.Context, c *imafs.Caller) (asked bool, err error) {
	answer := make(chan bool, 1) // the change may be made when nobody waits any more
	err = v.do(ctx, func(context.Context) error {
		asked, err := v.tree.Requested(v.ns, c.TGID)
		answer <- asked
		return err
	})
	if err != nil {
		return false, err
	}
	return <-answer, nil
}

// Barrier also begins the list of a namespace that is active and has none yet.
func (v *view) Barrier(ctx context.Context) error {
	if now := v.now(); now.Info.Active && now.List == nil {
		return v.do(ctx, func(ctx context.Context) error { return v.tree.Activate(ctx, v.ns) })
	}
	return v.pump.barrier(ctx)
}

func (v *view) List() *measure.List { return v.now().List }

func (v *view) PolicyText(c *imafs.Caller) string {
	return v.now().Policy.StringIn(callerMaps(c))
}

func (v *view) CheckPolicy(c *imafs.Caller, text []byte) error {
	p, err := parseRules(text)
	if err != nil {
		return err
	}
	return v.tree.CheckPolicy(v.ns, p, callerMaps(c)) // now, as many programs don't look at what close returns
}

func (v *view) AppendPolicy(ctx context.Context, c *imafs.Caller, text []byte) error {
	p, err := parseRules(text)
	if err != nil {
		return err
	}
	return v.do(ctx, func(ctx context.Context) error { return v.tree.AppendPolicy(ctx, v.ns, p, callerMaps(c)) })
}

func callerMaps(c *imafs.Caller) ima.IDMaps { return ima.IDMaps{UIDs: c.UIDs, GIDs: c.GIDs} }

// parseRules reads rules that a namespace is given.
func parseRules(text []byte) (*policy.Policy, error) {
	const name = "policy"
	p, err := policy.Parse(name, text)
	if err == nil {
		err = p.CheckWired(name, wired)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, syscall.EINVAL)
	}
	return p, nil
}

// reattachTimeout bounds how long the control socket waits for reattach.
const reattachTimeout = 30 * time.Second

// reattach brings the windows of running containers back to life. What a container holds up goes on behind.
func reattach(ctx context.Context, dir string, log *zap.Logger) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		targets, err := container.Processes()
		n := 0
		if err == nil {
			n, err = container.Reattach(ctx, dir, targets)
		}
		if err != nil {
			log.Warn("some windows are not alive again; imans-agent ns window ID tries once more", zap.Error(err))
		}
		if n > 0 {
			log.Info("windows of running containers are alive again", zap.Int("windows", n))
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
	case <-time.After(reattachTimeout):
		log.Warn("the windows of running containers are not alive again yet")
	}
}
