package digest

import (
	"container/list"
	"sync"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
)

// Cache keeps digests by content identity, the least recently used dropped first. Safe for concurrent use.
type Cache struct {
	mu     sync.Mutex
	max    int
	recent *list.List // of *cached, newest first
	byKey  map[cacheKey]*list.Element
	hashed uint64
}

type cacheKey struct {
	content event.Content
	algo    ima.HashAlgo
}

type cached struct {
	key    cacheKey
	digest ima.Digest
}

// NewCache makes a cache of at most max digests.
func NewCache(max int) *Cache {
	return &Cache{max: max, recent: list.New(), byKey: make(map[cacheKey]*list.Element)}
}

// Get returns the digest of a content, or none.
func (c *Cache) Get(content event.Content, algo ima.HashAlgo) ima.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.byKey[cacheKey{content, algo}]
	if !ok {
		return ima.Digest{}
	}
	c.recent.MoveToFront(e)
	return e.Value.(*cached).digest
}

// Put keeps a digest. Only for a content whose identity stands for its bytes, on a file system that is Versioned.
func (c *Cache) Put(content event.Content, d ima.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := cacheKey{content, d.Algo()}
	if e, ok := c.byKey[key]; ok {
		e.Value.(*cached).digest = d
		c.recent.MoveToFront(e)
		return
	}
	c.byKey[key] = c.recent.PushFront(&cached{key, d})
	if c.recent.Len() > c.max {
		oldest := c.recent.Back()
		c.recent.Remove(oldest)
		delete(c.byKey, oldest.Value.(*cached).key)
	}
}

// CountHashed notes that a file was read to be hashed.
func (c *Cache) CountHashed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hashed++
}

// Hashed returns how many files were read to be hashed.
func (c *Cache) Hashed() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hashed
}

// Len returns how many digests are kept.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.recent.Len()
}
