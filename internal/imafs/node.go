package imafs

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
)

// Nodes are numbered without a table: those of a namespace by its inode number and the file's place in files, the fixed ones by
// numbers that fit no namespace. The inode numbers that stat shows are the same.
const (
	nodeRoot      = fuse.FUSE_ROOT_ID
	nodeIntegrity = 2
	nodeLink      = 3 // ima
	nodeOwnLink   = 4 // integrity/ima
	nodeSpaces    = 5 // .ns

	fileBits = 8
	nsFolder = 0 // of a namespace's nodes, its folder; files[i] is number i+1
)

const spacesName = ".ns"

func nsNode(inum uint32, number int) uint64 { return uint64(inum)<<fileBits | uint64(number) }

// fileOf returns what a node is of which namespace; nil for the namespace's folder. ok is false for the fixed nodes and for
// numbers that are none.
func fileOf(node uint64) (inum uint32, f *file, ok bool) {
	inum = uint32(node >> fileBits)
	number := int(node & (1<<fileBits - 1))
	if inum == 0 || node>>fileBits != uint64(inum) || number > len(files) {
		return 0, nil, false
	}
	if number > nsFolder {
		f = &files[number-1]
	}
	return inum, f, true
}

// kind is what a file's handles do.
type kind int

const (
	kindActive kind = iota
	kindHash
	kindTemplate
	kindNewNS
	kindPolicy
	kindASCII
	kindBinary
	kindCount
	kindViolations
)

// early reports whether the file can be opened before the namespace is active.
func (k kind) early() bool { return k <= kindNewNS }

type file struct {
	name string
	mode uint32
	kind kind
	bank ima.HashAlgo // of a list
}

// files are those of a namespace's folder, in the order they are listed.
var files = []file{
	{"active", 0o644, kindActive, 0},
	{"hash", 0o644, kindHash, 0},
	{"template_name", 0o644, kindTemplate, 0},
	{"newns", 0o600, kindNewNS, 0},
	{"policy", 0o600, kindPolicy, 0},
	{"ascii_runtime_measurements", 0o440, kindASCII, ima.SHA1},
	{"ascii_runtime_measurements_sha1", 0o440, kindASCII, ima.SHA1},
	{"ascii_runtime_measurements_sha256", 0o440, kindASCII, ima.SHA256},
	{"ascii_runtime_measurements_sha384", 0o440, kindASCII, ima.SHA384},
	{"ascii_runtime_measurements_sha512", 0o440, kindASCII, ima.SHA512},
	{"binary_runtime_measurements", 0o440, kindBinary, ima.SHA1},
	{"binary_runtime_measurements_sha1", 0o440, kindBinary, ima.SHA1},
	{"binary_runtime_measurements_sha256", 0o440, kindBinary, ima.SHA256},
	{"binary_runtime_measurements_sha384", 0o440, kindBinary, ima.SHA384},
	{"binary_runtime_measurements_sha512", 0o440, kindBinary, ima.SHA512},
	{"runtime_measurements_count", 0o440, kindCount, 0},
	{"violations", 0o440, kindViolations, 0},
}

// Lookup implements fuse.RawFileSystem. The names of a namespace's folder are those of the caller's, whichever folder it is.
func (s *fileSystem) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	node, err := lookup(h, name)
	if err == nil {
		ctx, stop := s.request(h, cancel)
		defer stop()
		err = s.attr(ctx, h, node, &out.Attr)
		if _, f, ok := fileOf(node); err == nil && ok && f != nil {
			out.Size, err = s.size(ctx, h, node) // sendfile(2) stops there, and asks no more
		}
	}
	out.NodeId = node
	return s.status(err)
}

func lookup(h *fuse.InHeader, name string) (uint64, error) {
	switch {
	case h.NodeId == nodeRoot && name == "integrity":
		return nodeIntegrity, nil
	case h.NodeId == nodeRoot && name == "ima":
		return nodeLink, nil
	case h.NodeId == nodeRoot && name == spacesName:
		return nodeSpaces, nil
	case h.NodeId == nodeIntegrity && name == "ima":
		return nodeOwnLink, nil
	}
	inum, err := callerNS(h.Pid)
	if err != nil {
		return 0, err
	}
	if h.NodeId == nodeSpaces {
		if name != strconv.FormatUint(uint64(inum), 10) {
			return 0, unix.ENOENT
		}
		return nsNode(inum, nsFolder), nil
	}
	if _, f, ok := fileOf(h.NodeId); ok && f == nil {
		for i := range files {
			if files[i].name == name {
				return nsNode(inum, i+1), nil
			}
		}
	}
	return 0, unix.ENOENT
}

// Readlink implements fuse.RawFileSystem.
func (s *fileSystem) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	if h.NodeId == nodeLink {
		return []byte("integrity/ima"), fuse.OK
	}
	if h.NodeId != nodeOwnLink {
		return nil, fuse.EINVAL
	}
	inum, err := callerNS(h.Pid)
	return fmt.Appendf(nil, "../%s/%d", spacesName, inum), s.status(err)
}

// ReadDir implements fuse.RawFileSystem. The folder of the namespaces looks empty.
func (s *fileSystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	entries := []fuse.DirEntry{{Name: ".", Mode: fuse.S_IFDIR, Ino: in.NodeId}, {Name: "..", Mode: fuse.S_IFDIR}}
	switch in.NodeId {
	case nodeRoot:
		entries = append(entries, fuse.DirEntry{Name: "integrity", Mode: fuse.S_IFDIR, Ino: nodeIntegrity},
			fuse.DirEntry{Name: "ima", Mode: fuse.S_IFLNK, Ino: nodeLink})
	case nodeIntegrity:
		entries = append(entries, fuse.DirEntry{Name: "ima", Mode: fuse.S_IFLNK, Ino: nodeOwnLink})
	case nodeSpaces:
	default:
		inum, err := callerNS(in.Pid)
		if err != nil {
			return s.status(err)
		}
		for i := range files {
			entries = append(entries, fuse.DirEntry{Name: files[i].name, Mode: fuse.S_IFREG, Ino: nsNode(inum, i+1)})
		}
	}
	for i := in.Offset; i < uint64(len(entries)); i++ {
		entries[i].Off = i + 1
		if !out.AddDirEntry(entries[i]) {
			break
		}
	}
	return fuse.OK
}

// attr fills in what stat shows, but the size.
func (s *fileSystem) attr(ctx context.Context, h *fuse.InHeader, node uint64, a *fuse.Attr) error {
	a.Ino, a.Nlink, a.Blksize = node, 1, 4096
	inum, f, ok := fileOf(node)
	switch {
	case node == nodeLink, node == nodeOwnLink:
		a.Mode = fuse.S_IFLNK | 0o777
	case node == nodeRoot, node == nodeIntegrity, node == nodeSpaces:
		a.Mode, a.Nlink = fuse.S_IFDIR|0o755, 2
	case !ok:
		return unix.ESTALE
	default:
		view, err := s.viewOf(ctx, h, inum)
		if err != nil {
			return err
		}
		owner := view.Owner()
		a.Uid, a.Gid = owner.UID, owner.GID
		if f == nil {
			a.Mode, a.Nlink = fuse.S_IFDIR|0o755, 2
			break
		}
		a.Mode = fuse.S_IFREG | f.mode
	}
	a.SetTimes(&s.started, &s.started, &s.started)
	return nil
}

func isFolder(node uint64) bool {
	_, f, ok := fileOf(node)
	return node == nodeRoot || node == nodeIntegrity || node == nodeSpaces || ok && f == nil
}

// trimLine takes one newline, or one zero byte as of a C string, from the end of what was written.
func trimLine(data []byte) string {
	s := string(data)
	if t, ok := strings.CutSuffix(s, "\n"); ok {
		return t
	}
	return strings.TrimSuffix(s, "\x00")
}
