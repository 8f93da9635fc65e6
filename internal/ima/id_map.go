package ima

import (
	"bytes"
	"fmt"
)

// NoID is the id that no user or group has: what a map gives where it has no room for an id.
const NoID = ^uint32(0)

// OverflowID is what programs are shown for an id that their user namespace does not have.
// Source: include/linux/highuid.h, DEFAULT_OVERFLOWUID.
const OverflowID = 65534

// IDRange is a line of /proc/PID/uid_map or gid_map.
type IDRange struct {
	Inside  uint32 // first id in the user namespace
	Outside uint32 // first id in the initial user namespace
	Count   uint32
}

// IDMap says how a user namespace numbers ids. The zero value has none of them.
type IDMap []IDRange

// ParseIDMap parses /proc/PID/uid_map or gid_map. Its outer ids are those of whoever opened it.
func ParseIDMap(text []byte) (IDMap, error) {
	var m IDMap
	for line := range bytes.Lines(text) {
		var r IDRange
		if _, err := fmt.Sscan(string(line), &r.Inside, &r.Outside, &r.Count); err != nil {
			return nil, fmt.Errorf("parse id map: %w", err)
		}
		m = append(m, r)
	}
	return m, nil
}

// InitialIDs is the map of the initial user namespace.
func InitialIDs() IDMap { return IDMap{{Count: NoID}} }

// ToHost returns what an id of the user namespace is in the initial one; NoID if it is none there.
func (m IDMap) ToHost(id uint32) uint32 {
	for _, r := range m {
		if id-r.Inside < r.Count && id >= r.Inside {
			return r.Outside + (id - r.Inside)
		}
	}
	return NoID
}

// FromHost returns what an id of the initial user namespace is in this one; NoID if it is none here.
func (m IDMap) FromHost(id uint32) uint32 {
	for _, r := range m {
		if id-r.Outside < r.Count && id >= r.Outside {
			return r.Inside + (id - r.Outside)
		}
	}
	return NoID
}

// ShowHost is FromHost for people and programs to read: OverflowID instead of NoID.
func (m IDMap) ShowHost(id uint32) uint32 {
	if id = m.FromHost(id); id == NoID {
		return OverflowID
	}
	return id
}

// IDMaps is how a user namespace numbers users and groups.
type IDMaps struct{ UIDs, GIDs IDMap }

// InitialMaps are the maps of the initial user namespace.
func InitialMaps() IDMaps { return IDMaps{UIDs: InitialIDs(), GIDs: InitialIDs()} }
