package namespace

import "imans.dev/imans-agent/internal/event"

// inodes remembers what an inode's content was when a list took it last. The kernel's IMA keeps that with the inode: a file that
// is linked or renamed is not measured again, and one that fell out of the inode cache may be. So a bounded memory will do.
//
// The goroutine that handles records uses it.
type inodes struct {
	max   int
	taken map[inodeKey]measured
}

// inodeKey is an inode as a list's namespace sees it: an overlayfs inode is not its layer's.
type inodeKey struct {
	list       uint64 // the namespace's unique id
	pcr        int
	dev        uint32
	generation uint32
	ino        uint64
}

// inodesMax is how many are remembered, of all lists together: at about 200 bytes each.
const inodesMax = 65536

func newInodes() *inodes { return &inodes{max: inodesMax, taken: make(map[inodeKey]measured)} }

// same reports whether the list took this inode with this content last, and remembers it. It was looked at anew: this
// saves an entry, never a look at the file.
func (i *inodes) same(n *State, pcr int, ev *event.File, m measured) bool {
	k := inodeKey{list: n.ns.ID, pcr: pcr, dev: ev.SeenDev, generation: ev.Content.Generation, ino: ev.SeenIno}
	if i.taken[k] == m {
		return true
	}
	if len(i.taken) >= i.max {
		for old := range i.taken {
			delete(i.taken, old)
			break
		}
	}
	i.taken[k] = m
	return false
}
