package vtpm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
)

// PoolConfig says what a pool keeps ready.
type PoolConfig struct {
	Dir       string // its folder, of its own, on the file system of those that Take is asked for; absolute
	Size      int    // how many TPMs Run keeps ready; 0: each is made when it is taken
	Program   string // swtpm's name or path
	User      string // as Config.User
	Authority *Authority
	Banks     []ima.HashAlgo // active PCR banks; nil: those that swtpm has by default
}

// calm is how long nothing must have been taken before a successor is made: making keys takes a processor, which those that are being
// started need.
const calm = 2 * time.Second

// Pool keeps provisioned TPMs ready, so that what starts one does not wait for its keys. Its methods may be called from several
// goroutines; one process at a time uses a pool's folder.
type Pool struct {
	config PoolConfig
	taken  chan struct{} // has room for one: Run looks again

	mu    sync.Mutex
	ready []string // paths of folders
}

// OpenPool finds the TPMs that were ready when the last agent ended. What it left half-made, and what another authority certified
// or has other banks than the configuration asks for, is removed.
func OpenPool(ctx context.Context, c PoolConfig) (*Pool, error) {
	p := &Pool{config: c, taken: make(chan struct{}, 1)}
	if err := p.load(ctx); err != nil {
		return nil, fmt.Errorf("open the pool of vTPMs: %w", err)
	}
	return p, nil
}

func (p *Pool) load(ctx context.Context) error {
	if err := durable.Mkdir(p.config.Dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(p.config.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(p.config.Dir, e.Name())
		if p.usable(dir) {
			p.ready = append(p.ready, dir)
			continue
		}
		if err := discard(ctx, dir); err != nil {
			return err
		}
	}
	return nil
}

// usable reports whether a folder was provisioned as the configuration asks for.
func (p *Pool) usable(dir string) bool {
	i, err := ReadIdentity(dir)
	if err != nil || i.issuedBy(p.config.Authority) != nil {
		return false
	}
	return p.config.Banks == nil || slices.Equal(slices.Sorted(slices.Values(i.Banks)), slices.Sorted(slices.Values(p.config.Banks)))
}

// discard ends the swtpm that an earlier agent may have left in a half-made folder, and removes the folder.
func discard(ctx context.Context, dir string) error {
	if st, err := os.Lstat(dir); err == nil && st.IsDir() {
		lock, err := takeOver(ctx, Config{Dir: dir})
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	return os.RemoveAll(dir)
}

// Run provisions TPMs, one at a time, whenever fewer than Size are ready, until the context ends: then it returns nil. While some are
// ready it waits for a moment in which none is taken. It returns the first error; the pool can still be used, and Run be called again.
func (p *Pool) Run(ctx context.Context) error {
	for {
		for p.Ready() < p.config.Size {
			dir, err := p.provision(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				return fmt.Errorf("fill the pool of vTPMs: %w", err)
			}
			p.put(dir)
		}
		select {
		case <-p.taken:
			p.awaitCalm(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// awaitCalm waits until nothing is taken any more, or nothing is ready any more.
func (p *Pool) awaitCalm(ctx context.Context) {
	for p.Ready() > 0 {
		select {
		case <-p.taken:
		case <-time.After(calm):
			return
		case <-ctx.Done():
			return
		}
	}
}

// Ready returns how many TPMs can be taken without waiting.
func (p *Pool) Ready() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ready)
}

// Take moves a provisioned TPM to a folder, which must not exist, or be empty; it is Config.Dir of the instance to start then. If
// none is ready, it provisions one first. A crash leaves the TPM in the pool or in the folder, never in part.
func (p *Pool) Take(ctx context.Context, dir string) (Identity, error) {
	identity, err := p.take(ctx, dir)
	if err != nil {
		return Identity{}, fmt.Errorf("take a vTPM for %s: %w", dir, err)
	}
	return identity, nil
}

func (p *Pool) take(ctx context.Context, dir string) (Identity, error) {
	fault.GrantAsked.Pass()
	from, ok := p.get()
	if !ok {
		var err error
		if from, err = p.provision(ctx); err != nil {
			return Identity{}, err
		}
	}
	if err := durable.Mkdir(filepath.Dir(dir)); err != nil {
		p.put(from)
		return Identity{}, err
	}
	// Commit point: the folder is the pool's before, the caller's after. os.Rename would refuse an empty folder in the new place.
	if err := unix.Rename(from, dir); err != nil {
		p.put(from)
		switch {
		case errors.Is(err, unix.EXDEV):
			err = fmt.Errorf("%w; put the pool on the file system of the namespaces' folders", err)
		case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST):
			err = fmt.Errorf("%w; that folder has a vTPM or something else already, take another", err)
		}
		return Identity{}, fmt.Errorf("rename %s: %w", from, err)
	}
	fault.GrantTaken.Pass()
	if err := errors.Join(durable.SyncDir(filepath.Dir(dir)), durable.SyncDir(p.config.Dir)); err != nil {
		return Identity{}, err
	}
	return ReadIdentity(dir)
}

// get takes the oldest ready folder out of the list, and has Run look for a successor.
func (p *Pool) get() (dir string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ready) == 0 {
		return "", false
	}
	dir, p.ready = p.ready[0], p.ready[1:]
	select {
	case p.taken <- struct{}{}:
	default: // it has been told
	}
	return dir, true
}

func (p *Pool) put(dir string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready = append(p.ready, dir)
}

// provision makes a folder with a new TPM. One that was not finished is removed.
func (p *Pool) provision(ctx context.Context) (dir string, err error) {
	c := Config{Program: p.config.Program, User: p.config.User, Dir: filepath.Join(p.config.Dir, rand.Text())}
	if _, err := Provision(ctx, c, p.config.Authority, p.config.Banks); err != nil {
		return "", errors.Join(err, os.RemoveAll(c.Dir))
	}
	return c.Dir, nil
}
