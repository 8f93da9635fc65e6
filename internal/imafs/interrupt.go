package imafs

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// dyingEvery is how often it is looked whether a caller that got a signal is dying.
const dyingEvery = 50 * time.Millisecond

// request returns a context for what a request may wait for, and what ends it. It is cancelled when the caller is being killed or
// the window goes. Any other signal is let wait: the kernel tells of all alike, and once only, and programs do not expect to be
// interrupted in reading a file.
func (s *fileSystem) request(h *fuse.InHeader, cancel <-chan struct{}) (context.Context, context.CancelFunc) {
	caller := h.Caller
	ctx, stop := context.WithCancel(fuse.NewContext(context.Background(), &caller))
	go func() {
		select {
		case <-ctx.Done():
			return
		case <-s.stopping:
		case <-cancel:
			s.awaitDying(ctx, caller.Pid)
		}
		stop()
	}()
	return ctx, stop
}

// awaitDying waits until a task is dying or gone, the window goes, or the request is over.
func (s *fileSystem) awaitDying(ctx context.Context, tid uint32) {
	for !dying(tid) {
		select {
		case <-ctx.Done():
			return
		case <-s.stopping:
			return
		case <-time.After(dyingEvery):
		}
	}
}

// dying reports whether a task has SIGKILL pending, which is what the kernel makes of a signal that kills.
func dying(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return true
	}
	return killed(string(b))
}

// killed reports whether the text of a status file tells of a pending SIGKILL.
func killed(text string) bool {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err == nil && set&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}
