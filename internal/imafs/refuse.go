package imafs

import "github.com/hanwen/go-fuse/v2/fuse"

// What follows can't be done in securityfs either; without these the caller would hear that there is no such system call.

// Create implements fuse.RawFileSystem.
func (s *fileSystem) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return fuse.EACCES
}

// Mknod implements fuse.RawFileSystem.
func (s *fileSystem) Mknod(<-chan struct{}, *fuse.MknodIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EACCES
}

// Mkdir implements fuse.RawFileSystem.
func (s *fileSystem) Mkdir(<-chan struct{}, *fuse.MkdirIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

// Unlink implements fuse.RawFileSystem.
func (s *fileSystem) Unlink(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EPERM }

// Rmdir implements fuse.RawFileSystem.
func (s *fileSystem) Rmdir(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EPERM }

// Rename implements fuse.RawFileSystem.
func (s *fileSystem) Rename(<-chan struct{}, *fuse.RenameIn, string, string) fuse.Status {
	return fuse.EPERM
}

// Link implements fuse.RawFileSystem.
func (s *fileSystem) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

// Symlink implements fuse.RawFileSystem.
func (s *fileSystem) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}
