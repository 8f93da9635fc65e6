package imafs

import (
	"sync"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
)

// handlesMax is how many files a namespace can have open.
const handlesMax = 1024

// openFiles is what is open, of all namespaces. Its lock is never held while something waits.
type openFiles struct {
	mu      sync.Mutex
	next    uint64
	handles map[uint64]openFile
	spaces  map[event.MountNS]*space // those with open files
}

type openFile struct {
	handle
	ns event.MountNS
}

// space is what a namespace's open files share.
type space struct {
	used    int           // handles, and a policy file being loaded
	writer  *policyWriter // who has the policy open for writing
	loading bool          // a policy file is being read; its file system may never answer
}

func newOpenFiles() *openFiles {
	return &openFiles{handles: make(map[uint64]openFile), spaces: make(map[event.MountNS]*space)}
}

// reserve makes room for a handle.
func (o *openFiles) reserve(ns event.MountNS) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.spaces[ns]
	if s == nil {
		s = new(space)
		o.spaces[ns] = s
	}
	if s.used >= handlesMax {
		return unix.EMFILE
	}
	s.used++
	return nil
}

// unreserve gives the room back.
func (o *openFiles) unreserve(ns event.MountNS) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.drop(ns)
}

func (o *openFiles) drop(ns event.MountNS) {
	s := o.spaces[ns]
	if s.used--; s.used == 0 {
		delete(o.spaces, ns)
	}
}

// add numbers a handle for which there is room.
func (o *openFiles) add(ns event.MountNS, h handle) uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.next++
	o.handles[o.next] = openFile{h, ns}
	return o.next
}

func (o *openFiles) get(fh uint64) (handle, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f, ok := o.handles[fh]
	return f.handle, ok
}

func (o *openFiles) remove(fh uint64) {
	o.mu.Lock()
	f, ok := o.handles[fh]
	delete(o.handles, fh)
	o.mu.Unlock()
	if ok {
		f.release() // before its room is given back: it may be the writer
		o.unreserve(f.ns)
	}
}

// setWriter makes w the one writer of a namespace's policy if there is none; else it returns who is.
func (o *openFiles) setWriter(w *policyWriter) (other *policyWriter) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.spaces[w.task.NS]
	if s.writer != nil && s.writer != w {
		return s.writer
	}
	s.writer = w
	return nil
}

func (o *openFiles) unsetWriter(w *policyWriter) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if s := o.spaces[w.task.NS]; s != nil && s.writer == w {
		s.writer = nil
	}
}

// startLoading reports whether no other policy file is being loaded. The caller has a file open.
func (o *openFiles) startLoading(ns event.MountNS) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.spaces[ns]
	if s.loading {
		return false
	}
	s.loading = true
	s.used++
	return true
}

func (o *openFiles) stopLoading(ns event.MountNS) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.spaces[ns].loading = false
	o.drop(ns)
}
