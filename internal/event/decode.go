package event

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"imans.dev/imans-agent/internal/ima"
)

// Sizes in bytes of the fixed parts of bpf/event.h's structures.
const (
	HeaderSize = 32
	FileSize   = 368
	BirthSize  = 80
	DeathSize  = 32
	MoveSize   = 56
	TaskSize   = 40
	IDMapsSize = 160
	WriteSize  = 88
)

const (
	kindFile   = 1
	kindBirth  = 2
	kindDeath  = 3
	kindMove   = 4
	kindIDMaps = 5
	kindWrite  = 6
)

// ctimeNsecBits is where the nanoseconds of a packed change time end.
const ctimeNsecBits = 30

// PathMax is the longest path that a record carries, in bytes: the kernel's PATH_MAX.
const PathMax = 4096

// Record is one decoded record: *File, *Write, *Birth, *Death, *Move or *IDMaps.
type Record interface {
	// Origin returns the part that all records share.
	Origin() Header
}

// Origin returns the header itself.
func (h Header) Origin() Header { return h }

// DecodeError is a record that is not as bpf/event.h describes: agent and kernel side are of different versions.
type DecodeError struct {
	Kind   uint32 // as the record says; 0 if it is too short to say
	Length int    // bytes
	Reason string
}

// Error tells what was wrong.
func (e *DecodeError) Error() string {
	return fmt.Sprintf("decode record of kind %d, %d bytes: %s", e.Kind, e.Length, e.Reason)
}

// Decode reads one ring buffer record. It copies what it keeps. The only error is a *DecodeError.
func Decode(b []byte) (Record, error) {
	if len(b) < HeaderSize {
		return nil, &DecodeError{Length: len(b), Reason: "shorter than a header"}
	}
	kind := u32(b, 0)
	bad := func(format string, args ...any) (Record, error) {
		return nil, &DecodeError{Kind: kind, Length: len(b), Reason: fmt.Sprintf(format, args...)}
	}
	sizes := map[uint32]int{
		kindFile: FileSize, kindBirth: BirthSize, kindDeath: DeathSize, kindMove: MoveSize, kindIDMaps: IDMapsSize, kindWrite: WriteSize,
	}
	size, ok := sizes[kind]
	if !ok {
		return bad("unknown kind")
	}
	if len(b) < size {
		return bad("shorter than its kind's %d bytes", size)
	}
	h := Header{NS: mountNS(b, 8, 4), Boottime: time.Duration(u64(b, 16)), Sequence: u64(b, 24)}
	switch kind {
	case kindBirth:
		birth := &Birth{Header: h, Parent: mountNS(b, 32, 40), Creator: u32(b, 44)}
		for i := range birth.Ancestors {
			birth.Ancestors[i] = u32(b, 48+4*i)
		}
		return birth, nil
	case kindIDMaps:
		m := &IDMaps{Header: h}
		m.UIDs, m.Cut = decodeIDMap(b, u32(b, 32), 40)
		gids, cut := decodeIDMap(b, u32(b, 36), 100)
		m.GIDs, m.Cut = gids, m.Cut || cut
		return m, nil
	case kindWrite:
		w := &Write{Header: h, Inode: Inode{Ino: u64(b, 72), Dev: u32(b, 80), Generation: u32(b, 84)}}
		w.Process, w.Subject = decodeSubject(b)
		return w, nil
	case kindDeath:
		return &Death{h}, nil
	case kindMove:
		tgid := u32(b, 44)
		return &Move{Header: h, From: mountNS(b, 32, 40), Process: Process{tgid, tgid, time.Duration(u64(b, 48))}}, nil
	}
	f := decodeFile(b, h)
	if err := f.finish(b); err != "" {
		return bad("%s", err)
	}
	return f, nil
}

// idRanges is how many ranges of a map a record has room for.
const idRanges = 5

// decodeIDMap reads a map of n ranges; cut: they did not fit.
func decodeIDMap(b []byte, n uint32, at int) (m ima.IDMap, cut bool) {
	if n > idRanges {
		return nil, true
	}
	for range n {
		m = append(m, ima.IDRange{Inside: u32(b, at), Outside: u32(b, at+4), Count: u32(b, at+8)})
		at += 12
	}
	return m, false
}

// decodeSubject reads who acted, where all records that tell it have it.
func decodeSubject(b []byte) (Process, Subject) {
	return Process{TGID: u32(b, 32), PID: u32(b, 36), Start: time.Duration(u64(b, 40))},
		Subject{UID: u32(b, 48), EUID: u32(b, 52), SUID: u32(b, 56), GID: u32(b, 60), EGID: u32(b, 64), SGID: u32(b, 68)}
}

// decodeFile reads the fields of fixed place.
func decodeFile(b []byte, h Header) *File {
	f := &File{
		Header:   h,
		Nlink:    u32(b, 120),
		Writes:   u32(b, 124),
		RealFS:   FileSystem{Magic: u64(b, 128), UUID: [16]byte(b[136:152])},
		Policy:   u64(b, 152),
		SeenIno:  u64(b, 160),
		SeenFS:   FileSystem{Magic: u64(b, 168), UUID: [16]byte(b[176:192]), Name: cString(b[304:336]), Subtype: cString(b[336:368])},
		SeenDev:  u32(b, 192),
		FOwner:   u32(b, 196),
		FGroup:   u32(b, 200),
		Func:     ima.Func(u32(b, 204)),
		Flags:    Flags(u32(b, 208)),
		VMAStart: u64(b, 216),
		VMAEnd:   u64(b, 224),
	}
	f.Process, f.Subject = decodeSubject(b)
	ctime := u64(b, 88)
	f.Content = Content{
		Ino: u64(b, 72), Size: u64(b, 112), CtimeSec: int64(ctime) >> ctimeNsecBits, CtimeNsec: uint32(ctime & (1<<ctimeNsecBits - 1)),
		Subvolume: u64(b, 96), Dev: u32(b, 104), Generation: u32(b, 108),
	}
	if f.Flags&Versioned != 0 {
		f.Content.Change = u64(b, 80)
	}
	if f.Flags&Overlay == 0 {
		f.RealFS = f.SeenFS
	}
	return f
}

// finish checks and takes the fields that can be wrong; it returns what is, or "".
func (f *File) finish(b []byte) string {
	if fn := u32(b, 204); fn != uint32(ima.BPRMCheck) && fn != uint32(ima.MmapCheck) {
		return fmt.Sprintf("function %d is not one that is hooked", fn)
	}
	n := u32(b, 212)
	if n > PathMax || FileSize+int(n) > len(b) {
		return fmt.Sprintf("a path of %d bytes does not fit", n)
	}
	f.Path = string(b[FileSize : FileSize+int(n)])
	if strings.IndexByte(f.Path, 0) >= 0 {
		return "a zero byte in the path"
	}
	if f.Flags&Unlinked != 0 {
		f.Path = strings.TrimSuffix(f.Path, " (deleted)")
	}
	algo := int32(u32(b, 232))
	if algo < 0 {
		f.Errno = -algo
		return ""
	}
	a := ima.HashAlgo(algo)
	if algo > 255 || !a.Valid() || a.Size() == 0 {
		return fmt.Sprintf("hash algorithm %d is unknown", algo)
	}
	d, err := ima.NewDigest(a, b[240:240+a.Size()])
	if err != nil {
		return err.Error()
	}
	f.Digest = d
	return ""
}

// DecodeTasks reads what the task iterator wrote.
func DecodeTasks(b []byte) ([]Task, error) {
	if len(b)%TaskSize != 0 {
		return nil, &DecodeError{Length: len(b), Reason: fmt.Sprintf("not a multiple of a task's %d bytes", TaskSize)}
	}
	tasks := make([]Task, 0, len(b)/TaskSize)
	for ; len(b) > 0; b = b[TaskSize:] {
		tasks = append(tasks, Task{
			NS: mountNS(b, 0, 24), ParentNS: mountNS(b, 8, 28),
			Process: Process{TGID: u32(b, 32), PID: u32(b, 36), Start: time.Duration(u64(b, 16))},
		})
	}
	return tasks, nil
}

func u32(b []byte, at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
func u64(b []byte, at int) uint64 { return binary.NativeEndian.Uint64(b[at:]) }

func mountNS(b []byte, id, inum int) MountNS { return MountNS{Inum: u32(b, inum), ID: u64(b, id)} }

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
