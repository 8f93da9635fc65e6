package grant

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/reach"
	"imans.dev/imans-agent/internal/vtpm"
)

// attachTimeout bounds how long the lists of all namespaces wait while one of them goes over to its TPM, which answers some ten commands
// meanwhile. It takes milliseconds, and on an emulated machine with others that start, seconds.
const attachTimeout = 15 * time.Second

// settleTimeout bounds how long a container waits for TPMs to catch up.
const settleTimeout = 10 * time.Second

// start starts the container's n-th TPM, or finds it running. The first time it gets an identity; later it has what it had.
// Where the machine has no vTPM proxy it is by socket, which the container's record says.
func (g *Containers) start(ctx context.Context, c *container, n int) (vtpm.Device, error) {
	ask, config := c.Request.VTPMs[n], g.config(c, n)
	if n < len(c.passwords) {
		config.Password = c.passwords[n]
	}
	i, err := vtpm.Adopt(config)
	switch {
	case errors.Is(err, vtpm.ErrLost):
		config.Restart = true
	case errors.Is(err, os.ErrNotExist):
		if err := g.provision(ctx, config, ask); err != nil {
			return vtpm.Device{}, err
		}
	case err != nil:
		return vtpm.Device{}, err
	}
	if i == nil {
		if i, err = g.startOne(ctx, c, config); err != nil {
			return vtpm.Device{}, err
		}
	}
	device, ok := i.Device()
	c.Socket = !ok
	return device, i.Close()
}

// startOne starts an instance, by socket where the machine has no vTPM proxy.
func (g *Containers) startOne(ctx context.Context, c *container, config vtpm.Config) (*vtpm.Instance, error) {
	i, err := vtpm.Start(ctx, config)
	if errors.Is(err, vtpm.ErrNoProxy) {
		return g.startBySocket(ctx, c, config, err)
	}
	return i, err
}

// startBySocket starts the container's only TPM where there is no proxy, for the reason given.
func (g *Containers) startBySocket(ctx context.Context, c *container, config vtpm.Config, reason error) (*vtpm.Instance, error) {
	if len(c.Request.VTPMs) > 1 || config.Version == vtpm.TPM12 {
		return nil, fmt.Errorf("%w; by socket a container has one TPM, of version 2.0", reason)
	}
	c.Socket, config.Proxy = true, false
	// Commit point: from here on the next agent knows the way.
	if err := c.record(); err != nil {
		return nil, err
	}
	g.Log.Info("a container's vTPM is reached by socket", zap.String("container", c.id), zap.NamedError("why", reason))
	return vtpm.Start(ctx, config)
}

// provision gives a folder that has none an identity: one of the pool's, unless something else is asked for.
func (g *Containers) provision(ctx context.Context, config vtpm.Config, ask oci.VTPM) error {
	if config.Version == vtpm.TPM12 {
		return nil
	}
	if _, err := vtpm.ReadIdentity(config.Dir); err == nil {
		return nil // a crash came before its first start
	}
	if ask.PCRBanks == "" && ask.RunAs == "" && ask.StatePath == "" && config.Password == "" {
		_, err := g.Pool.Take(ctx, config.Dir)
		return err
	}
	var banks []ima.HashAlgo
	for _, name := range ask.Banks() {
		bank, ok := ima.HashAlgoByName(name)
		if !ok {
			return fmt.Errorf("linux.resources.vtpms: pcrBanks: no bank %s; leave it out", name)
		}
		banks = append(banks, bank)
	}
	_, err := vtpm.Provision(ctx, config, g.Authority, banks)
	return err
}

// created attaches the first TPM, if there is one, to the mount namespace of a process of the container.
func (g *Containers) created(ctx context.Context, c *container, pid int) error {
	inum, err := reach.MountNS(pid)
	if err != nil {
		return err
	}
	if view, err := g.Tree.Lookup(event.MountNS{Inum: inum}); c.State == created && err == nil && view.Info.NS == c.Namespace {
		if c.Attached || !c.listTPM() {
			return nil // told a second time
		}
	} else if c.State != prepared {
		return fmt.Errorf("nothing is prepared for it, it is %s", c.State)
	}
	c.PID = pid
	if err := g.attach(ctx, c, inum); err != nil {
		return err
	}
	if err := g.gate(ctx, c); err != nil {
		return err
	}
	g.settle(ctx, c)
	return nil
}

// gate opens the gate that the container asks for. Without it only one goes on that does not insist.
func (g *Containers) gate(ctx context.Context, c *container) error {
	if !c.Request.WantsGate() {
		return nil
	}
	err := g.Do(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, attachTimeout)
		defer cancel()
		return g.Tree.RaiseGate(ctx, c.Namespace, namespace.GateMode(c.Request.Gate))
	})
	if err != nil && !c.Request.Required {
		g.Log.Error("a container goes on without the gate that it asks for", zap.String("container", c.id), zap.String("gate", c.Request.Gate), zap.Error(err))
		return nil
	} else if err != nil {
		return fmt.Errorf("it asks for the gate %q: %w", c.Request.Gate, err)
	}
	return nil
}

// settle waits until the container's TPM has what was measured in its namespace, and the machine's that the namespace has that TPM.
// The native list's may be slow, or gone: that is told of elsewhere, and the container is not held up by it for longer.
func (g *Containers) settle(ctx context.Context, c *container) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for _, name := range []string{c.Namespace.String(), "native"} {
		view, err := g.Tree.Find(name)
		if err == nil && view.List != nil {
			err = view.List.Settle(ctx)
		}
		if err != nil {
			g.Log.Warn("a container starts before the TPMs have all", zap.String("container", c.id), zap.String("list of", name), zap.Error(err))
		}
	}
}

// attach gives the first TPM to the mount namespace with that inode number.
func (g *Containers) attach(ctx context.Context, c *container, inum uint32) error {
	var a namespace.Attachment
	var openErr error
	if c.listTPM() { // opened before the lists wait
		a, openErr = g.attachment(ctx, c)
	}
	err := g.Do(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, attachTimeout)
		defer cancel()
		view, err := g.Tree.Lookup(event.MountNS{Inum: inum})
		if err != nil {
			return err
		}
		ns := view.Info.NS
		if c.Request.Policy != "" {
			if err := g.Load(ctx, ns, c.Request.Policy); err != nil {
				return err
			}
		}
		c.State, c.Namespace = created, ns
		if !c.listTPM() || openErr != nil {
			return errors.Join(openErr, c.record())
		}
		if c.Socket {
			if err := g.serve(ctx, c, view.Info.PCR); err != nil {
				return errors.Join(err, c.record())
			}
		}
		// Commit point: from here on the tree ends the TPM, if the namespace has got it, and else the next look does.
		c.Attached = true
		if err = c.record(); err == nil {
			err = g.Tree.AttachTPM(ctx, ns, a)
		}
		if err != nil {
			c.Attached = false
			return errors.Join(err, c.record())
		}
		return nil
	})
	if err != nil && a.TPM != nil {
		err = errors.Join(err, closeAttachment(a))
	}
	return err
}

// attachment opens the first TPM, and says what the native list is to say of it.
func (g *Containers) attachment(ctx context.Context, c *container) (namespace.Attachment, error) {
	a := namespace.Attachment{Config: g.config(c, 0), Keep: true}
	a.Binding = binding.Attach{TPM: binding.TPM12, Way: binding.Proxy, Container: c.id, Image: c.Request.Image}
	if c.Socket {
		a.Binding.Way = binding.Socket
	}
	if c.byHand() {
		a.Binding.Container = c.Of
	}
	var err error
	if a.Config.Version == vtpm.TPM20 {
		a.Binding.TPM = binding.TPM20
		if err := nameKeys(&a.Binding, a.Config.Dir); err != nil {
			return a, err
		}
	}
	if d := c.Request.ImageDigest; d != "" {
		if a.Binding.ImageDigest, err = ima.ParseDigest(d); err != nil {
			g.Log.Warn("an image's digest is left out", zap.String("container", c.id), zap.Error(err))
		}
	}
	if a.Instance, err = vtpm.Adopt(a.Config); err != nil {
		return a, err
	}
	if a.TPM, a.Share, err = g.Ways.Open(ctx, a.Instance); err != nil {
		return a, errors.Join(err, a.Instance.Close())
	}
	return a, nil
}

// closeAttachment lets go of a TPM that was not attached; it goes on.
func closeAttachment(a namespace.Attachment) error {
	err := a.TPM.Close()
	if a.Share != nil {
		err = errors.Join(err, a.Share.Close())
	}
	return errors.Join(err, a.Instance.Close())
}

// serve lets the container's programs use its TPM, which is open, by socket.
func (g *Containers) serve(ctx context.Context, c *container, pcr int) error {
	return g.Ways.Serve(ctx, g.config(c, 0).Dir, reach.Process{PID: c.PID, Inum: c.Namespace.Inum}, pcr)
}

// serveAgain is serve for a container that an earlier agent served, or that had an accident.
func (g *Containers) serveAgain(c *container) error {
	view, err := g.Tree.Lookup(c.Namespace)
	if err != nil {
		return nil // it ends
	}
	ctx, cancel := context.WithTimeout(context.Background(), attachTimeout)
	defer cancel()
	if err := g.serve(ctx, c, view.Info.PCR); err != nil {
		return fmt.Errorf("its programs can't reach it: %w", err)
	}
	return nil
}

// nameKeys fills in which keys a TPM 2.0 has.
func nameKeys(b *binding.Attach, dir string) error {
	id, err := vtpm.ReadIdentity(dir)
	if err != nil {
		return err
	}
	if b.EK, err = binding.ParseName(id.EK); err != nil {
		return err
	}
	b.AK, err = binding.ParseName(id.AK)
	return err
}
