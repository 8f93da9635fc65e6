package namespace

import "imans.dev/imans-agent/internal/event"

// inodes remembers what an inode's content was when a list took it last. The kernel's IMA keeps that with the inode: a file that
// is linked or renamed is not measured again, and one that fell out of the inode cache may be. So a bounded memory will do.
//
// The goroutine that handles records uses it.
type inodes struct {
	max   int
	count int
	taken map[uint64]map[inodeKey]measured // by the unique ids of the lists' namespaces
}

// inodeKey is an inode as a list's namespace sees it: an overlayfs inode is not its layer's.
type inodeKey struct {
	pcr        int
	dev        uint32
	generation uint32
	ino        uint64
	subvolume  uint64
}

// inodesMax is how many are remembered, of all lists together: at about 200 bytes each.
const inodesMax = 65536

func newInodes() *inodes {
	return &inodes{max: inodesMax, taken: make(map[uint64]map[inodeKey]measured)}
}

// same reports whether the list took this inode with this content last, and remembers it. It was looked at anew: this
// saves an entry, never a look at the file.
func (i *inodes) same(n *State, pcr int, ev *event.File, m measured) bool {
	k := inodeKey{pcr: pcr, dev: ev.SeenDev, generation: ev.Content.Generation, ino: ev.SeenIno, subvolume: ev.Content.Subvolume}
	list := i.taken[n.ns.ID]
	before, ok := list[k]
	if ok && before == m {
		return true
	}
	if !ok {
		if i.count >= i.max {
			i.drop(list)
		}
		if list == nil {
			list = make(map[inodeKey]measured)
			i.taken[n.ns.ID] = list
		}
		i.count++
	}
	list[k] = m
	return false
}

// drop forgets one inode: of that list, so that no other pays for it, or of any if it has none.
func (i *inodes) drop(list map[inodeKey]measured) {
	for _, other := range i.taken {
		if len(list) > 0 {
			break
		}
		list = other
	}
	for k := range list {
		delete(list, k)
		i.count--
		break
	}
}

// forget lets go of what a list that ended took.
func (i *inodes) forget(list uint64) {
	i.count -= len(i.taken[list])
	delete(i.taken, list)
}
