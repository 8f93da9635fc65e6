package imafs

import (
	"context"
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/imalog"
)

// viewOf returns the view of the namespace of that inode number; if it is the caller's, by its unique id.
func (s *fileSystem) viewOf(ctx context.Context, h *fuse.InHeader, inum uint32) (View, error) {
	ns := event.MountNS{Inum: inum}
	if own, err := callerMountNS(h.Pid); err == nil && own.Inum == inum {
		ns = own
	}
	return s.views.View(ctx, ns)
}

// size returns how long the caller's own file is; that of another namespace has none.
func (s *fileSystem) size(ctx context.Context, h *fuse.InHeader, node uint64) (uint64, error) {
	inum, f, _ := fileOf(node)
	if own, err := callerNS(h.Pid); err != nil || own != inum {
		return 0, nil
	}
	view, err := s.viewOf(ctx, h, inum)
	if err != nil {
		return 0, err
	}
	if !f.kind.early() && !view.Active() {
		return 0, nil
	}
	if f.kind == kindASCII || f.kind == kindBinary {
		if err := barrier(ctx, view); err != nil {
			return 0, err
		}
		return uint64(s.sizes.of(ctx, view, f)), nil
	}
	if f.kind == kindNewNS {
		return uint64(len("0\n")), nil
	}
	t, err := newTask(h.Caller)
	if err != nil {
		return 0, err
	}
	text, err := content(f.kind, t, view)(ctx)
	return uint64(len(text)), err
}

// GetAttr implements fuse.RawFileSystem.
func (s *fileSystem) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	ctx, stop := s.request(&in.InHeader, cancel)
	defer stop()
	err := s.attr(ctx, &in.InHeader, in.NodeId, &out.Attr)
	if _, f, ok := fileOf(in.NodeId); err == nil && ok && f != nil {
		out.Size, err = s.size(ctx, &in.InHeader, in.NodeId)
	}
	return s.status(err)
}

// SetAttr implements fuse.RawFileSystem. A truncation changes nothing, as in securityfs: opening with O_TRUNC asks for one.
func (s *fileSystem) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Valid&(fuse.FATTR_MODE|fuse.FATTR_UID|fuse.FATTR_GID) != 0 {
		return fuse.EPERM
	}
	ctx, stop := s.request(&in.InHeader, cancel)
	defer stop()
	if in.Valid&(fuse.FATTR_SIZE|fuse.FATTR_FH) == fuse.FATTR_SIZE {
		if err := s.access(ctx, &in.InHeader, wantWrite); err != nil {
			return s.status(err)
		}
	}
	return s.status(s.attr(ctx, &in.InHeader, in.NodeId, &out.Attr))
}

// Access implements fuse.RawFileSystem.
func (s *fileSystem) Access(cancel <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	ctx, stop := s.request(&in.InHeader, cancel)
	defer stop()
	return s.status(s.access(ctx, &in.InHeader, in.Mask))
}

func (s *fileSystem) access(ctx context.Context, h *fuse.InHeader, want uint32) error {
	var a fuse.Attr
	if err := s.attr(ctx, h, h.NodeId, &a); err != nil || want == 0 {
		return err
	}
	t, err := newTask(h.Caller)
	if err != nil {
		return err
	}
	return t.may(Owner{a.Uid, a.Gid}, a.Mode, want)
}

// OpenDir implements fuse.RawFileSystem.
func (s *fileSystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	if !isFolder(in.NodeId) {
		return fuse.ENOTDIR
	}
	return fuse.OK
}

// Open implements fuse.RawFileSystem.
func (s *fileSystem) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ctx, stop := s.request(&in.InHeader, cancel)
	defer stop()
	fh, err := s.openFile(ctx, in)
	out.Fh, out.OpenFlags = fh, fuse.FOPEN_DIRECT_IO
	return s.status(err)
}

func (s *fileSystem) openFile(ctx context.Context, in *fuse.OpenIn) (uint64, error) {
	_, f, ok := fileOf(in.NodeId)
	if !ok || f == nil {
		return 0, unix.ESTALE
	}
	t, err := newTask(in.Caller)
	if err != nil {
		return 0, err
	}
	view, err := s.views.View(ctx, t.NS)
	if err != nil {
		return 0, fmt.Errorf("open %s of namespace %v: %w", f.name, t.NS, err)
	}
	if ended(view) {
		return 0, ErrEnded
	}
	if err := allow(t, view, f, in.Flags&unix.O_ACCMODE); err != nil {
		return 0, err
	}
	if err := s.open.reserve(t.NS); err != nil {
		return 0, err
	}
	h, err := s.newHandle(ctx, f, t, view, in.Flags)
	if err != nil {
		s.open.unreserve(t.NS)
		return 0, err
	}
	return s.open.add(t.NS, h), nil
}

// allow decides, in this order: the mode, whether the namespace is active, and what the file itself asks of who opens it.
func allow(t *task, view View, f *file, mode uint32) error {
	want := uint32(wantRead)
	switch mode {
	case unix.O_WRONLY:
		want = wantWrite
	case unix.O_RDWR:
		want = wantRead | wantWrite
	}
	if err := t.may(view.Owner(), f.mode, want); err != nil {
		return err
	}
	switch {
	case !f.kind.early() && !view.Active() && !(f.kind == kindPolicy && want == wantWrite && view.Lazy()):
		return unix.EACCES
	case f.kind == kindPolicy && want == wantRead|wantWrite:
		return unix.EACCES
	case want&wantWrite != 0 && !t.administers():
		return unix.EACCES
	case f.kind == kindPolicy && !t.administers():
		return unix.EPERM
	}
	return nil
}

// newHandle opens a file for a task that may.
func (s *fileSystem) newHandle(ctx context.Context, f *file, t *task, view View, flags uint32) (handle, error) {
	where := position{appending: flags&unix.O_APPEND != 0}
	switch f.kind {
	case kindASCII:
		l := &list{view: view, entries: view.List(), format: (*imalog.Entry).AppendASCII, bank: f.bank}
		return l, l.open(ctx)
	case kindBinary:
		l := &list{view: view, entries: view.List(), format: (*imalog.Entry).AppendBinary, bank: f.bank}
		return l, l.open(ctx)
	case kindPolicy:
		if flags&unix.O_ACCMODE == unix.O_WRONLY {
			w := &policyWriter{
				open: s.open, log: s.log, view: view, task: t, position: where,
				ino: nsNode(t.NS.Inum, int(kindPolicy)+1),
			}
			return w, w.begin()
		}
	}
	h := &setting{text: text{view: view, fill: content(f.kind, t, view)}, set: change(f.kind, t, view), position: where}
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		return h, nil
	}
	return h, h.open(ctx)
}

// Read implements fuse.RawFileSystem.
func (s *fileSystem) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	h, ok := s.open.get(in.Fh)
	if !ok {
		return nil, s.status(errUnexpected)
	}
	buf = buf[:min(len(buf), int(in.Size))]
	ctx, stop := s.request(&in.InHeader, cancel)
	defer stop()
	n, err := h.read(ctx, buf, int64(in.Offset))
	if err != nil {
		return nil, s.status(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// Write implements fuse.RawFileSystem.
func (s *fileSystem) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	h, ok := s.open.get(in.Fh)
	if !ok {
		return 0, s.status(errUnexpected)
	}
	ctx, stop := s.request(&in.InHeader, cancel)
	defer stop()
	n, err := h.write(ctx, data, int64(in.Offset))
	return uint32(n), s.status(err)
}

// Flush implements fuse.RawFileSystem.
func (s *fileSystem) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	h, ok := s.open.get(in.Fh)
	if !ok {
		return s.status(errUnexpected)
	}
	return s.status(h.flush(in.Pid))
}

// Fsync implements fuse.RawFileSystem: there is nothing to wait for.
func (s *fileSystem) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.EINVAL }

// Release implements fuse.RawFileSystem.
func (s *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { s.open.remove(in.Fh) }

// StatFs implements fuse.RawFileSystem.
func (s *fileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.NameLen = 4096, 255
	return fuse.OK
}
