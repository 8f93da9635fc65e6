// Package event holds what a kernel hook saw, as Go values, and the one decoder of the kernel side's records.
//
// It is pure: it reads bytes, opens nothing and runs on any OS. bpf/event.h is the other half; every offset used here is
// compared with the compiled object by a test of internal/loader. A record is decoded once; its value is then only read.
//
// Records come from this machine's kernel in its own byte order (little endian on amd64 and arm64). What a record says of
// a path, a file system name or a process was true when the hook ran, and may not be true any more.
package event

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"imans.dev/imans-agent/internal/ima"
)

// MountNS names a mount namespace for good: its inode number, as lsns prints it, and the kernel's 64-bit id, which is never
// given twice. The zero value names none. An inode number alone is reused and names nothing.
type MountNS struct {
	Inum uint32
	ID   uint64
}

// String returns "inum:id".
func (n MountNS) String() string { return fmt.Sprintf("%d:%d", n.Inum, n.ID) }

// MarshalText implements encoding.TextMarshaler: "inum:id".
func (n MountNS) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *MountNS) UnmarshalText(text []byte) error {
	inum, id, _ := strings.Cut(string(text), ":")
	i, err := strconv.ParseUint(inum, 10, 32)
	if err != nil {
		return fmt.Errorf("mount namespace %q: want INUM:ID", text)
	}
	n.Inum = uint32(i)
	if n.ID, err = strconv.ParseUint(id, 10, 64); err != nil {
		return fmt.Errorf("mount namespace %q: want INUM:ID", text)
	}
	return nil
}

// IsZero reports whether n names no namespace.
func (n MountNS) IsZero() bool { return n == MountNS{} }

// Content names the bytes of a file: the real inode that holds them (under overlayfs that of a layer) and the version of
// its content. Two equal values mean the same bytes where Trusted says so. Usable as a map key.
type Content struct {
	Dev        uint32 // kernel dev_t: major << 20 | minor
	Generation uint32 // tells an inode number's reuse apart
	Ino        uint64
	Subvolume  uint64 // of btrfs: root number << 32 | transaction of the snapshot; 0 elsewhere, and where not known
	Change     uint64 // i_version shifted right by one; 0 where the file system keeps none
	Size       uint64 // bytes
	CtimeSec   int64  // change time, seconds since 1970
	CtimeNsec  uint32
}

// Ctime returns the change time.
func (c Content) Ctime() time.Time { return time.Unix(c.CtimeSec, int64(c.CtimeNsec)) }

// Process names a process for good: its thread group id in the initial pid namespace and when it started.
type Process struct {
	TGID, PID uint32
	Start     time.Duration // since boot, suspend included
}

// Subject is the ids of the task that acted, as the initial user namespace numbers them.
type Subject struct {
	UID, EUID, SUID uint32
	GID, EGID, SGID uint32
}

// Flags is what a hook noticed beside the fields: enum imans_flag of bpf/event.h.
type Flags uint32

// The flags.
const (
	Reqprot     Flags = 1 << iota // the caller itself asked for PROT_EXEC
	Mprotect                      // from file_mprotect: no path; VMAStart and VMAEnd say where
	Unlinked                      // the name was gone when the hook ran
	Writers                       // someone had the file open for writing, or may write to it in memory
	Changed                       // the version moved while the kernel hashed
	Versioned                     // the file system keeps i_version
	Overlay                       // Content is of an overlayfs file's real inode
	NameOnly                      // Path is the last component only
	FSNameCut                     // a file system name or subtype did not fit its field
	RealUnknown                   // an overlayfs file whose real inode could not be found, or one of btrfs whose subvolume could not
	SetUIDCap                     // CAP_SETUID is effective
	SetGIDCap                     // CAP_SETGID is effective
	IDsIgnored                    // no rule of the namespace's chain names an id
)

// Header is what all records share.
type Header struct {
	NS       MountNS
	Boottime time.Duration // when the hook ran, since boot, suspend included
	Sequence uint64        // of the record, from 0 at load
}

// File is one file about to be run or mapped executable.
type File struct {
	Header
	Process  Process
	Subject  Subject
	Func     ima.Func // BPRMCheck or MmapCheck
	Flags    Flags
	Content  Content
	RealFS   FileSystem // of the real inode; Name and Subtype are empty where Overlay
	Nlink    uint32
	Writes   uint32     // how often it was opened for writing since its inodes are held, by then; goes round
	Policy   uint64     // generation of the chain's policies that the kernel side filtered by
	SeenFS   FileSystem // of the file as opened: what rules see
	SeenIno  uint64
	SeenDev  uint32
	FOwner   uint32
	FGroup   uint32
	Path     string // as the task saw it; any bytes but zero
	VMAStart uint64 // with Mprotect: the mapping
	VMAEnd   uint64
	Digest   ima.Digest // the kernel's; none if it could not give one
	Errno    int32      // why not: a positive errno, 0 if there is a digest
}

// FileSystem is what rules can name of a file system.
type FileSystem struct {
	Magic   uint64
	UUID    [16]byte
	Name    string
	Subtype string
}

// Inode names an inode for as long as it is in memory. An overlayfs inode's generation is 0. Usable as a map key.
type Inode struct {
	Dev        uint32 // kernel dev_t: major << 20 | minor
	Generation uint32
	Ino        uint64
}

// Inodes returns the inodes by which a writer may reach the file: as it was opened, and under overlayfs the one that holds its bytes.
func (f *File) Inodes() []Inode {
	inodes := []Inode{{f.Content.Dev, f.Content.Generation, f.Content.Ino}}
	if f.Flags&Overlay != 0 {
		inodes = append(inodes, Inode{Dev: f.SeenDev, Ino: f.SeenIno})
	}
	return inodes
}

// Write is a file that was measured, that someone has open for reading, and that Process is about to open for writing.
type Write struct {
	Header  // the writer's namespace
	Process Process
	Subject Subject
	Inode   Inode
}

// Birth is a mount namespace that came to be, or was first met (Parent zero: not known).
type Birth struct {
	Header
	Parent    MountNS
	Creator   uint32    // thread group id
	Ancestors [8]uint32 // thread group ids of the creator's parent, its parent and so on
}

// Death is a mount namespace that is gone.
type Death struct{ Header }

// Move is a process that entered Header.NS.
type Move struct {
	Header
	From    MountNS
	Process Process
}

// IDMaps is how the user namespace that owns Header.NS numbers ids. Empty maps are not written yet; they are written once.
type IDMaps struct {
	Header
	ima.IDMaps
	Cut bool // a map has more ranges than a record holds, and is empty here
}

// Task is one task as the task iterator reports it.
type Task struct {
	NS, ParentNS MountNS // ParentNS: of the task's parent; zero if it has none
	Process      Process
}

// MeasuredContent is what the kernel side looks content up by that needs no event: struct imans_measured_content.
type MeasuredContent struct {
	Policy     uint64 // generation; names the namespace too
	Ino        uint64
	Change     uint64 // i_version shifted right by one; the size where the file system keeps none
	Ctime      uint64 // seconds << 30 | nanoseconds
	Subvolume  uint64 // as in Content
	Dev        uint32
	Generation uint32
	SeenDev    uint32
	Func       uint32 // function | flags << 8
}

// MeasuredKey is the same with the subject's ids, which are zero where IDsIgnored: struct imans_measured_key.
type MeasuredKey struct {
	Content MeasuredContent
	UID     uint32
	EUID    uint32
	SUID    uint32
	GID     uint32
	EGID    uint32
	SGID    uint32
}

// IDsIgnored reports whether the key's content alone is looked up.
func (k MeasuredKey) IDsIgnored() bool { return Flags(k.Content.Func>>8)&IDsIgnored != 0 }

// MeasuredKey returns the key that the kernel side looked up before it sent f.
func (f *File) MeasuredKey() MeasuredKey {
	seen := f.Flags & (Reqprot | IDsIgnored)
	c := MeasuredContent{
		Policy: f.Policy, Ino: f.Content.Ino, Change: f.Content.Size,
		Ctime:     uint64(f.Content.CtimeSec)<<ctimeNsecBits | uint64(f.Content.CtimeNsec),
		Subvolume: f.Content.Subvolume, Dev: f.Content.Dev, Generation: f.Content.Generation, SeenDev: f.SeenDev,
	}
	if f.Flags&Versioned != 0 {
		c.Change = f.Content.Change
	}
	k := MeasuredKey{}
	if seen&IDsIgnored == 0 {
		seen |= f.Flags & (SetUIDCap | SetGIDCap)
		k.UID, k.EUID, k.SUID = f.Subject.UID, f.Subject.EUID, f.Subject.SUID
		k.GID, k.EGID, k.SGID = f.Subject.GID, f.Subject.EGID, f.Subject.SGID
	}
	c.Func = uint32(f.Func) | uint32(seen)<<8
	k.Content = c
	return k
}
