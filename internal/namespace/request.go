package namespace

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/proc"
)

// request is a process's wish that the next mount namespace cloned by its process tree be an IMA namespace of its own.
type request struct {
	tgid, parent uint32 // of the process that asked
}

// maxRequests bounds the wishes that wait for a clone: processes may ask and never clone.
const maxRequests = 1024

// RequestNew makes the next mount namespace that is cloned out of ns by a process, by its descendants, or, once it has ended, by
// its parent's, active at its birth. A second request before that changes nothing, nor does one by a process in the place of
// another that has asked and ended, as the commands of a shell are.
func (t *Tree) RequestNew(ns event.MountNS, tgid uint32) error {
	s, ok := t.known(ns)
	if !ok {
		return ErrEnded
	}
	asker := request{tgid: tgid, parent: parentOf(tgid)}
	if slices.ContainsFunc(s.requests, func(r request) bool { return r.tgid == tgid || r.passedTo(asker.parent) }) {
		return nil
	}
	s.requests = slices.DeleteFunc(s.requests, func(r request) bool { return !alive(r.tgid) && !alive(r.parent) })
	if len(s.requests) >= maxRequests {
		return fmt.Errorf("%d requests for a namespace wait already: %w", maxRequests, syscall.ENOSPC)
	}
	s.requests = append(s.requests, asker)
	return nil
}

// WithdrawNew takes back every request that a clone by a process would take.
func (t *Tree) WithdrawNew(ns event.MountNS, tgid uint32) error {
	s, ok := t.known(ns)
	if !ok {
		return ErrEnded
	}
	chain := chainOf(tgid)
	s.requests = slices.DeleteFunc(s.requests, func(r request) bool { return r.serves(chain) })
	return nil
}

// Requested reports whether there is a request that a clone by a process would take.
func (t *Tree) Requested(ns event.MountNS, tgid uint32) (bool, error) {
	s, ok := t.known(ns)
	if !ok {
		return false, ErrEnded
	}
	chain := chainOf(tgid)
	return slices.ContainsFunc(s.requests, func(r request) bool { return r.serves(chain) }), nil
}

// requested takes the request that a birth fulfils; false: nobody asked.
func (s *State) requested(b *event.Birth) bool {
	chain := append([]uint32{b.Creator}, b.Ancestors[:]...)
	i := slices.IndexFunc(s.requests, func(r request) bool { return r.serves(chain) })
	if i < 0 {
		return false
	}
	s.requests = slices.Delete(s.requests, i, i+1)
	return true
}

// serves reports whether a clone takes the request: chain is its creator, the creator's parent, and so on.
func (r request) serves(chain []uint32) bool {
	return slices.Contains(chain, r.tgid) || slices.ContainsFunc(chain, r.passedTo)
}

// passedTo reports whether the request has passed to a process: who asked is gone, and was its child. Init's children are no family.
func (r request) passedTo(tgid uint32) bool {
	return r.parent > 1 && r.parent == tgid && !alive(r.tgid)
}

// chainOf returns a process and its ancestors, as many as a birth tells.
func chainOf(tgid uint32) []uint32 {
	chain := []uint32{tgid}
	for range len(event.Birth{}.Ancestors) {
		if tgid = parentOf(tgid); tgid == 0 {
			break
		}
		chain = append(chain, tgid)
	}
	return chain
}

func alive(tgid uint32) bool { return tgid != 0 && syscall.Kill(int(tgid), 0) != syscall.ESRCH }

// parentOf returns a process's parent, 0 if it is gone.
func parentOf(pid uint32) uint32 {
	fields, err := proc.Stat(int(pid))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(fields[proc.StatParent], 10, 32)
	return uint32(n)
}

// readIDMaps reads the id maps of a process's user namespace.
func readIDMaps(p event.Process) (ima.IDMaps, error) {
	var maps ima.IDMaps
	for _, m := range []struct {
		file string
		to   *ima.IDMap
	}{{"uid_map", &maps.UIDs}, {"gid_map", &maps.GIDs}} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.TGID, m.file))
		if err != nil {
			return ima.IDMaps{}, fmt.Errorf("read id map: %w", err)
		}
		if *m.to, err = ima.ParseIDMap(b); err != nil {
			return ima.IDMaps{}, err
		}
	}
	return maps, nil
}
