// Package grant gives containers their vTPMs: it answers what a runtime asks before it creates a container, attaches the vTPM to
// the container's namespace before its first program runs, and follows the container's life to its removal.
//
// It is the oci.Containers of an agent: Open finds what an earlier agent left, Run takes back what has become of no use, until its
// context ends.
//
// # What is promised
//
// A container's vTPM lives in a folder of the container's, not of its mount namespace: one that is stopped and started again finds
// its keys and NV storage as it left them, and PCRs that begin anew, as after a machine's reset. The folder goes when the container
// is removed and its namespace has ended; one that somebody else manages is never removed. Everything a container is granted is on
// record before the grant is given out, so that a crash of the agent leaves nothing that the next one does not find.
//
// The first vTPM of a container is its list's: its namespace's entries, from the first on, are extended into it, and the native list
// names it. Others are the container's alone.
package grant

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/reach"
	"imans.dev/imans-agent/internal/vtpm"
)

const (
	// lookEvery is how often Run looks whether containers are gone.
	lookEvery = 2 * time.Second
	// unclaimedAfter is how long a grant waits for its container to be created.
	unclaimedAfter = 5 * time.Minute
	// endAfter is how long the tree has for the end of a namespace's TPM.
	endAfter = 5 * time.Minute
	// endTimeout bounds how long a container that is started again waits for the end of its last run.
	endTimeout = 10 * time.Second
)

// Config says what a Containers works with.
type Config struct {
	Dir       string // of the containers' folders, on the file system of the pool; absolute
	Window    string // folder at which the agent has the window mounted; "": containers get none
	Pool      *vtpm.Pool
	Authority *vtpm.Authority
	Swtpm     string // program
	User      string // that swtpm runs as; "": the agent's own
	Tree      *namespace.Tree
	// Do changes the tree when all that is recorded is in the lists. It returns early only when the agent ends.
	Do func(context.Context, func(context.Context) error) error
	// Load gives a namespace the rules of a policy by its name. It is called within Do.
	Load func(ctx context.Context, ns event.MountNS, policy string) error
	// Process finds a process of the mount namespace with that inode number, and the id of its container, if it has one.
	Process func(inum uint32) (pid int, container string, err error)
	Ways    *reach.Ways // by which the tree opens vTPMs
	Log     *zap.Logger
}

// Containers grants containers what they ask for. All its methods may be called from several goroutines.
type Containers struct {
	Config
	mu    sync.Mutex
	known map[string]*container
}

var _ oci.Containers = (*Containers)(nil)

// ErrRunning means that a container of this id is running.
var ErrRunning = errors.New("a container of this id is running; remove it first")

// Open finds the containers that an earlier agent left.
func Open(c Config) (*Containers, error) {
	if err := durable.Mkdir(c.Dir); err != nil {
		return nil, fmt.Errorf("containers' folder: %w; choose another with --state-dir", err)
	}
	g := &Containers{Config: c, known: make(map[string]*container)}
	entries, err := os.ReadDir(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("containers' folder: %w", err)
	}
	for _, e := range entries {
		one, err := g.open(e.Name())
		if errors.Is(err, os.ErrNotExist) { // a crash before the record: nobody has got anything
			err = os.RemoveAll(filepath.Join(c.Dir, e.Name()))
		} else if err == nil {
			g.known[e.Name()] = one
		}
		if err != nil {
			return nil, fmt.Errorf("container %s: %w; move its folder away and restart", e.Name(), err)
		}
	}
	return g, nil
}

// Run takes back what containers have no use for any more, until ctx ends.
func (g *Containers) Run(ctx context.Context) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			for _, c := range g.all() {
				if err := g.look(c); err != nil {
					g.Log.Warn("a container's vTPM stays for now", zap.String("container", c.id), zap.Error(err))
				}
			}
		}
	}
}

func (g *Containers) all() []*container {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []*container
	for _, c := range g.known {
		all = append(all, c)
	}
	return all
}

// find returns a container by its id; nil: it is not known.
func (g *Containers) find(id string) *container {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.known[id]
}

// lock returns a container by its id, locked; nil: it is not known.
func (g *Containers) lock(id string) *container {
	for c := g.find(id); c != nil; c = g.find(id) {
		c.mu.Lock()
		if g.find(id) == c {
			return c
		}
		c.mu.Unlock() // dropped meanwhile
	}
	return nil
}

// take is lock, for one that need not be known.
func (g *Containers) take(id string) *container {
	for {
		g.mu.Lock()
		if g.known[id] == nil {
			g.known[id] = &container{id: id, dir: filepath.Join(g.Dir, id)}
		}
		g.mu.Unlock()
		if c := g.lock(id); c != nil {
			return c
		}
	}
}

// Prepare implements oci.Containers, as do the next ones.
func (g *Containers) Prepare(ctx context.Context, r oci.Request) (oci.Grant, error) {
	if !r.Wants() {
		return g.window(oci.Grant{}), nil
	}
	c := g.take(r.ID)
	defer c.mu.Unlock()
	first := c.State == ""
	grant, err := g.prepare(ctx, c, r)
	switch {
	case err == nil:
	case first:
		err = errors.Join(err, g.drop(c))
	case c.State == prepared: // else its last run goes on
		err = errors.Join(err, g.halt(c))
	}
	if err != nil {
		return oci.Grant{}, fmt.Errorf("prepare container %s: %w", r.ID, err)
	}
	return g.window(grant), nil
}

// window adds the window on the container's own IMA.
func (g *Containers) window(grant oci.Grant) oci.Grant {
	if g.Window != "" {
		grant.Mounts = append(grant.Mounts, oci.Mount{Source: g.Window, Destination: "/sys/kernel/security"})
	}
	return grant
}

// prepare starts the container's TPMs. A second call before the container is there finds them running.
func (g *Containers) prepare(ctx context.Context, c *container, r oci.Request) (oci.Grant, error) {
	if c.State == created {
		if err := g.awaitEnd(ctx, c); err != nil {
			return oci.Grant{}, err
		}
	}
	if len(r.VTPMs) == 0 && r.VTPM {
		r.VTPMs = []oci.VTPM{{}}
	}
	r.VTPMs, c.passwords = slices.Clone(r.VTPMs), nil
	for i := range r.VTPMs {
		c.passwords = append(c.passwords, r.VTPMs[i].EncryptionPassword)
		r.VTPMs[i].EncryptionPassword = ""
	}
	c.life = life{Request: r, State: prepared, Since: time.Now(), Socket: r.Socket}
	// Commit point: from here on the next agent finds what is made below.
	if err := c.record(); err != nil {
		return oci.Grant{}, err
	}
	var grant oci.Grant
	for n, ask := range c.Request.VTPMs {
		device, err := g.start(ctx, c, n)
		if err != nil {
			return oci.Grant{}, err
		}
		if c.Socket {
			grant.Env = reach.Environment()
			continue
		}
		devices, err := nodes(device, name(n, ask), r)
		if err != nil {
			return oci.Grant{}, err
		}
		grant.Devices = append(grant.Devices, devices...)
	}
	return grant, nil
}

// name is what a container's n-th TPM is called in it.
func name(n int, ask oci.VTPM) string {
	if ask.Name != "" {
		return ask.Name
	}
	return fmt.Sprintf("tpm%d", n)
}

// nodes are a TPM's devices as the container sees them: /dev/NAME, and with tpmrm for tpm in it the kernel's resource manager.
// In a user namespace the node is the host's, and belongs to the container's root.
func nodes(d vtpm.Device, name string, r oci.Request) ([]oci.Device, error) {
	var devices []oci.Device
	for _, one := range []struct {
		path string
		node vtpm.Node
	}{{"/dev/" + name, d.TPM}, {"/dev/tpmrm" + strings.TrimPrefix(name, "tpm"), d.RM}} {
		if one.node.Path == "" {
			continue
		}
		if r.UserNamespace {
			if err := os.Chown(one.node.Path, int(r.RootUID), int(r.RootGID)); err != nil {
				return nil, fmt.Errorf("give the container's root its device: %w", err)
			}
		}
		devices = append(devices, oci.Device{
			Path: one.path, HostPath: one.node.Path, Type: "c", Major: one.node.Major, Minor: one.node.Minor, FileMode: 0o600,
		})
	}
	return devices, nil
}

// Created attaches the container's first TPM to its mount namespace. If that fails its TPMs end: they would prove nothing.
func (g *Containers) Created(ctx context.Context, id string, pid int) error {
	c := g.lock(id)
	if c == nil {
		return fmt.Errorf("container %s was granted nothing; its runtime is to ask before it creates it", id)
	}
	defer c.mu.Unlock()
	granted := c.State == prepared
	if err := g.created(ctx, c, pid); err != nil {
		if granted && !c.Attached { // what is attached ends with the namespace
			err = errors.Join(err, g.halt(c))
		}
		return fmt.Errorf("container %s: %w", id, err)
	}
	return nil
}

// Stopped ends the TPMs that do not end with the namespace.
func (g *Containers) Stopped(_ context.Context, id string) error {
	c := g.lock(id)
	if c == nil {
		return nil
	}
	defer c.mu.Unlock()
	return g.stop(c)
}

// Removed takes note that the container will not be started again; Run does the rest.
func (g *Containers) Removed(_ context.Context, id string) error {
	c := g.lock(id)
	if c == nil {
		return nil
	}
	defer c.mu.Unlock()
	c.Deleted = true
	return c.record()
}

// There takes note that, of the containers that the runtime's plugin asks for, only these are still there: others were removed while
// nobody told. Those whose specs were read are not the plugin's.
func (g *Containers) There(_ context.Context, ids []string) error {
	var errs []error
	for _, c := range g.all() {
		if !slices.Contains(ids, c.id) {
			errs = append(errs, c.missed())
		}
	}
	return errors.Join(errs...)
}
