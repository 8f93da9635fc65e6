package imafs

import (
	"context"
	"errors"
	"os"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/measure"
)

// status is what the caller of a file gets for an error, nil included.
func (s *fileSystem) status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	no := errno(err)
	if no == syscall.EIO {
		s.log.Warn("a request of a namespace's window failed", zap.Error(err))
	}
	return fuse.Status(no)
}

func errno(err error) syscall.Errno {
	var no syscall.Errno
	switch {
	case errors.Is(err, ErrEnded), errors.Is(err, os.ErrClosed), errors.Is(err, measure.ErrClosed):
		return syscall.ENODEV
	case errors.Is(err, context.DeadlineExceeded):
		return syscall.EAGAIN
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	case errors.As(err, &no) && no != 0:
		return no
	}
	return syscall.EIO
}

// refused makes EINVAL of an error that names no other number.
func refused(err error) error {
	if err != nil && errno(err) == syscall.EIO {
		return syscall.EINVAL
	}
	return err
}
