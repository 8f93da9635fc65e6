package grant

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/reach"
	"imans.dev/imans-agent/internal/vtpm"
)

// byHandPrefix begins the ids, and so the folders' names, of what was attached by hand; no runtime's id has a comma in it.
const byHandPrefix = "ns,"

// byHand reports whether the TPM was attached to a running namespace: it goes when that ends.
func (c *container) byHand() bool { return strings.HasPrefix(c.id, byHandPrefix) }

// Attach gives a running namespace, by a name as namespace.Tree.Find takes it, a vTPM for its list, which its programs reach by socket,
// as the grant's environment says. It is there when Attach returns, and ends with the namespace, or by Release.
//
// Errors: *namespace.NotFoundError, namespace.ErrNative, namespace.ErrAttached, measure.ErrForeign for a list that began without a TPM, and
// tpmshare.ErrHostNetwork.
func (g *Containers) Attach(ctx context.Context, name string) (oci.Grant, error) {
	view, err := g.Tree.Find(name)
	if err != nil {
		return oci.Grant{}, err
	}
	ns := view.Info.NS
	if view.Info.Depth == 0 {
		return oci.Grant{}, namespace.ErrNative
	}
	if err := g.attachByHand(ctx, ns); err != nil {
		return oci.Grant{}, fmt.Errorf("attach a vTPM to namespace %v: %w", ns, err)
	}
	return oci.Grant{Env: reach.Environment()}, nil
}

func (g *Containers) attachByHand(ctx context.Context, ns event.MountNS) error {
	if g.attached(ns) {
		return namespace.ErrAttached
	}
	pid, of, err := g.Process(ns.Inum)
	if err != nil {
		return err
	}
	c := g.take(fmt.Sprintf("%s%d,%d", byHandPrefix, ns.Inum, ns.ID))
	defer c.mu.Unlock()
	if c.State != "" { // its last one is lost, or was released
		if err := errors.Join(g.awaitEnd(ctx, c), vtpm.Remove(g.config(c, 0))); err != nil {
			return err
		}
	}
	c.life = life{
		Request: oci.Request{ID: c.id, VTPM: true, VTPMs: []oci.VTPM{{}}}, State: prepared, Since: time.Now(), Deleted: true, Socket: true, Of: of,
	}
	// Commit point: from here on the next agent finds what is made below, and what is not attached goes.
	if err := c.record(); err != nil {
		return err
	}
	if _, err = g.start(ctx, c, 0); err == nil {
		err = g.created(ctx, c, pid)
	}
	if err != nil {
		return errors.Join(err, g.drop(c))
	}
	return nil
}

// Release takes the vTPM of a running namespace's list away, however it came there, and ends it. The list goes on without one, and both
// lists say so. Errors: *namespace.NotFoundError, namespace.ErrNotAttached.
func (g *Containers) Release(ctx context.Context, name string) error {
	view, err := g.Tree.Find(name)
	if err != nil {
		return err
	}
	ns := view.Info.NS
	c := g.holder(ns)
	if c == nil {
		return fmt.Errorf("release the vTPM of namespace %v: %w", ns, namespace.ErrNotAttached)
	}
	defer c.mu.Unlock()
	g.settle(ctx, c)
	err = g.Do(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, attachTimeout)
		defer cancel()
		return g.Tree.ReleaseTPM(ctx, ns, binding.Released)
	})
	if err != nil {
		return err
	}
	c.Attached = false
	if c.byHand() {
		c.State, c.Namespace = stopped, event.MountNS{} // Run drops it
	}
	return c.record()
}

// attached reports whether a namespace's list has been given a vTPM.
func (g *Containers) attached(ns event.MountNS) bool {
	view, err := g.Tree.Lookup(ns)
	return err == nil && view.Info.Attached
}

// holder returns the container whose TPM a namespace's list has, locked; nil: there is none.
func (g *Containers) holder(ns event.MountNS) *container {
	for _, c := range g.all() {
		c.mu.Lock()
		if c.Attached && c.Namespace == ns && g.attached(ns) {
			return c
		}
		c.mu.Unlock()
	}
	return nil
}
