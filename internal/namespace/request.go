package namespace

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
)

// request is a process's wish that the next mount namespace cloned by its process tree be an IMA namespace of its own.
type request struct {
	tgid, parent uint32 // of the process that asked
}

// maxRequests bounds the wishes that wait for a clone: processes may ask and never clone.
const maxRequests = 1024

// RequestNew makes the next mount namespace that is cloned out of ns by a process, by its descendants, or, once it has ended, by
// its parent's, active at its birth. A second request before that changes nothing.
func (t *Tree) RequestNew(ns event.MountNS, tgid uint32) error {
	s, ok := t.known(ns)
	if !ok {
		return ErrEnded
	}
	if slices.ContainsFunc(s.requests, func(r request) bool { return r.tgid == tgid }) {
		return nil
	}
	s.requests = slices.DeleteFunc(s.requests, func(r request) bool { return !alive(r.tgid) && !alive(r.parent) })
	if len(s.requests) >= maxRequests {
		return fmt.Errorf("%d requests for a namespace wait already: %w", maxRequests, syscall.ENOSPC)
	}
	s.requests = append(s.requests, request{tgid: tgid, parent: parentOf(tgid)})
	return nil
}

// requested takes the request that a birth fulfils; false: nobody asked.
func (s *State) requested(b *event.Birth) bool {
	chain := append([]uint32{b.Creator}, b.Ancestors[:]...)
	for i, r := range s.requests {
		if slices.Contains(chain, r.tgid) || r.parent > 1 && slices.Contains(chain, r.parent) && !alive(r.tgid) {
			s.requests = slices.Delete(s.requests, i, i+1)
			return true
		}
	}
	return false
}

func alive(tgid uint32) bool { return tgid != 0 && syscall.Kill(int(tgid), 0) != syscall.ESRCH }

// parentOf returns a process's parent, 0 if it is gone. Source: proc_pid_stat(5), the field after the state.
func parentOf(pid uint32) uint32 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 2 {
		return 0
	}
	n, _ := strconv.ParseUint(string(fields[1]), 10, 32)
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
