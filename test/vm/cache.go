package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// unusedLimit is how long an entry of an older recipe stays after its last use.
	unusedLimit = 7 * 24 * time.Hour
	lockPoll    = 200 * time.Millisecond
)

// Cache keeps built kernels and disks outside the work tree. It is safe for use by many processes at once.
type Cache struct {
	dir string
	log func(format string, args ...any)
}

// OpenCache opens the cache in dir, or in imans-vm under the user's cache folder ($XDG_CACHE_HOME, else ~/.cache) when dir
// is empty. What takes time is told through log.
func OpenCache(dir string, log func(format string, args ...any)) (*Cache, error) {
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find the cache folder: %w; set XDG_CACHE_HOME", err)
		}
		dir = filepath.Join(base, "imans-vm")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("find the cache folder: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "locks"), 0o755); err != nil {
		return nil, fmt.Errorf("make the cache folder: %w", err)
	}
	return &Cache{dir: dir, log: log}, nil
}

// Dir is the cache's folder.
func (c *Cache) Dir() string { return c.dir }

// entry returns the folder that build made for this recipe, building it if it is not there. The folder appears whole or
// not at all: a crash before the rename leaves a folder named *.partial, which the next build removes.
func (c *Cache) entry(ctx context.Context, kind, recipe string, build func(ctx context.Context, dir string) error) (string, error) {
	sum := sha256.Sum256([]byte(recipe))
	name := kind + "-" + hex.EncodeToString(sum[:8])
	path := filepath.Join(c.dir, name)
	if c.use(path) {
		return path, nil
	}
	unlock, err := c.lock(ctx, name)
	if err != nil {
		return "", err
	}
	defer unlock()
	if c.use(path) {
		return path, nil
	}
	partial := path + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return "", fmt.Errorf("clear %s: %w", partial, err)
	}
	if err := os.Mkdir(partial, 0o755); err != nil {
		return "", fmt.Errorf("make cache entry: %w", err)
	}
	defer os.RemoveAll(partial)
	start := time.Now()
	c.log("building %s", kind)
	if err := build(ctx, partial); err != nil {
		return "", fmt.Errorf("build %s: %w", kind, err)
	}
	if err := os.Rename(partial, path); err != nil {
		return "", fmt.Errorf("keep cache entry: %w", err)
	}
	c.log("built %s in %.0f s", kind, time.Since(start).Seconds())
	c.prune(kind, path)
	return path, nil
}

// use reports whether the entry exists and notes the time of its use.
func (c *Cache) use(path string) bool {
	now := time.Now()
	return os.Chtimes(path, now, now) == nil
}

// lock takes the named lock, waiting until ctx ends. The lock goes with the process.
func (c *Cache) lock(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(c.dir, "locks", name), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open cache lock: %w", err)
	}
	for told := false; ; {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock cache entry %s: %w", name, err)
		}
		if !told {
			c.log("waiting for another run that builds %s", name)
			told = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock cache entry %s: %w", name, context.Cause(ctx))
		case <-time.After(lockPoll):
		}
	}
}

// prune removes entries of the same kind that older recipes made and nobody used for a week. A failure to remove costs
// disk space only and is not reported.
func (c *Cache) prune(kind, keep string) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		path := filepath.Join(c.dir, e.Name())
		hash, ok := strings.CutPrefix(e.Name(), kind+"-")
		if !ok || len(hash) != 16 || path == keep {
			continue
		}
		if st, err := e.Info(); err == nil && time.Since(st.ModTime()) > unusedLimit {
			_ = os.RemoveAll(path)
		}
	}
}

// Clear removes every entry of the cache.
func (c *Cache) Clear() error {
	if err := os.RemoveAll(c.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clear the cache: %w", err)
	}
	return nil
}
