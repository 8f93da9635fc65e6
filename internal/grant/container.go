package grant

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/vtpm"
)

// state is what a container has come to.
type state string

const (
	prepared state = "prepared" // it may be created now
	created  state = "created"  // its namespace is there
	stopped  state = "stopped"  // it may be started again
)

const recordName = "container.json"

// life is what a container's folder says of it.
type life struct {
	Request   oci.Request   `json:"request"`
	State     state         `json:"state"`
	Since     time.Time     `json:"since"` // of the request
	Namespace event.MountNS `json:"namespace,omitzero"`
	PID       int           `json:"pid,omitempty"`      // of a process in its namespaces
	Attached  bool          `json:"attached,omitempty"` // the tree has the first TPM, and ends it
	Deleted   bool          `json:"deleted,omitempty"`  // by the runtime
	Socket    bool          `json:"socket,omitempty"`   // its TPM is no device: its programs reach it in their network namespace
	Of        string        `json:"of,omitempty"`       // id of the running container that it was attached to by hand, if that has one
}

// container is one that was granted TPMs. Its methods are called with mu held.
type container struct {
	id  string
	dir string

	mu sync.Mutex // one request at a time; guards what follows, and the folder
	life
	left      time.Time // since when its namespace is known to be gone
	passwords []string  // of its TPMs' state; on no record, as whoever starts it gives them each time
}

func (g *Containers) open(id string) (*container, error) {
	c := &container{id: id, dir: filepath.Join(g.Dir, id)}
	b, err := os.ReadFile(filepath.Join(c.dir, recordName))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &c.life); err != nil {
		return nil, fmt.Errorf("read %s: %w", recordName, err)
	}
	if c.Request.ID != id {
		return nil, fmt.Errorf("read %s: it is of container %q; move the folder %s away", recordName, c.Request.ID, c.dir)
	}
	return c, nil
}

// record puts down what has become of the container.
func (c *container) record() error {
	if err := durable.Mkdir(c.dir); err != nil {
		return err
	}
	b, err := json.Marshal(c.life)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(c.dir, recordName), b)
}

// config says where the container's n-th TPM lives.
func (g *Containers) config(c *container, n int) vtpm.Config {
	ask := c.Request.VTPMs[n]
	config := vtpm.Config{Program: g.Swtpm, User: g.User, Proxy: !c.Socket, Dir: filepath.Join(c.dir, fmt.Sprintf("tpm%d", n))}
	if ask.StatePath != "" {
		config.Dir = ask.StatePath
	}
	if ask.RunAs != "" {
		config.User = ask.RunAs
	}
	if ask.Version == "1.2" {
		config.Version = vtpm.TPM12
	}
	return config
}

// running returns the instances of the container that run, by the number of their TPM.
func (g *Containers) running(c *container) (map[int]*vtpm.Instance, error) {
	found := make(map[int]*vtpm.Instance)
	var errs []error
	for n := range c.Request.VTPMs {
		i, err := vtpm.Adopt(g.config(c, n))
		switch {
		case err == nil:
			found[n] = i
		case !errors.Is(err, vtpm.ErrLost) && !errors.Is(err, os.ErrNotExist):
			errs = append(errs, err)
		}
	}
	return found, errors.Join(errs...)
}

// stop ends the TPMs of the container, but for the first one of a container whose namespace has it: the tree ends that, when the
// native list has its last values.
func (g *Containers) stop(c *container) error {
	found, err := g.running(c)
	errs := []error{err}
	for n, i := range found {
		if n == 0 && c.Attached {
			errs = append(errs, i.Close())
		} else {
			errs = append(errs, i.Stop())
		}
	}
	return errors.Join(errs...)
}

// listTPM reports whether the container has a TPM for its list, which is its first.
func (c *container) listTPM() bool {
	return len(c.Request.VTPMs) > 0
}

// lives reports whether the container's namespace is still there.
func (g *Containers) lives(c *container) bool {
	_, err := g.Tree.Lookup(c.Namespace)
	return err == nil
}

// awaitEnd waits until the container's last run is over: it is being started again.
func (g *Containers) awaitEnd(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	for {
		found, err := g.running(c)
		for _, i := range found {
			i.Close()
		}
		if err != nil || len(found) == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ErrRunning
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// look takes back what the container has no use for any more.
func (g *Containers) look(c *container) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.State == prepared && (c.Deleted || time.Since(c.Since) > unclaimedAfter):
		c.Deleted = true
		return g.finish(c)
	case c.State == created && !g.lives(c):
		if c.left.IsZero() {
			c.left = time.Now()
		}
		found, err := g.running(c)
		first := found[0] != nil && c.Attached
		for _, i := range found {
			i.Close()
		}
		if err != nil || first && time.Since(c.left) < endAfter {
			return err
		}
		return g.finish(c)
	case c.State == created && c.Attached && c.Socket:
		return g.serveAgain(c)
	case c.State == stopped:
		return g.finish(c)
	}
	return nil
}

// finish ends all TPMs of the container if it has not stopped yet, and forgets it if it will not be started again.
func (g *Containers) finish(c *container) error {
	switch {
	case c.Deleted && !c.Request.MayReturn():
		return g.drop(c)
	case c.State != stopped:
		return g.halt(c)
	}
	return nil
}

// missed takes note of the container's removal if it is one of the plugin's and has been created.
func (c *container) missed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Request.Bundle != "" || c.Deleted || c.State != created && c.State != stopped {
		return nil
	}
	c.Deleted = true
	return c.record()
}

// halt ends all TPMs of the container, and notes that it has stopped.
func (g *Containers) halt(c *container) error {
	c.State, c.Namespace, c.Attached = stopped, event.MountNS{}, false
	if err := g.stop(c); err != nil {
		return err
	}
	return c.record()
}

// drop ends and forgets a container, and removes what was kept for it, but for folders that somebody else manages.
func (g *Containers) drop(c *container) error {
	if err := g.halt(c); err != nil {
		return err
	}
	for n, ask := range c.Request.VTPMs {
		if ask.StatePath == "" || ask.StatePathIsManaged {
			continue
		}
		if err := vtpm.Remove(g.config(c, n)); err != nil {
			return err
		}
	}
	// Commit point: a crash before it leaves a record by which the next agent does the same.
	if err := os.RemoveAll(c.dir); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.known, c.id)
	return nil
}
