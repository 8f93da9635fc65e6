// Package digest finds the digest of a file's content, and proves that it is of the very content that an event saw.
//
// Open finds the file that an event means: the same inode, in the namespace in which the event happened. Sum hashes it
// once, in all the algorithms asked for, and compares device, subvolume, inode, change time and size before and after. A Cache keeps
// digests by content identity, so that a file which many namespaces use is read once.
//
// What can't be proven is an error, never a guess: ErrUnreachable (the file is gone or another stands in its place),
// ErrChanged (the content moved before or while it was read), or the read's own error. The caller records a violation.
//
// The proof rests on the inode's change time, which stands still between the steps of the clock that it is taken from, and at times for longer. So
// Old and Settled tell whether a content's identity stands for its bytes; only then may it be cached or skipped next time.
package digest

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
)

var (
	// ErrUnreachable means that the file an event saw can't be opened any more.
	ErrUnreachable = errors.New("the file is gone or another stands in its place")
	// ErrChanged means that the content is not, or may not be, what the event saw.
	ErrChanged = errors.New("the content changed")
)

// oldAge is longer than the clock of change times ever stands still: its steps come late where the machine is slow, or virtual and not being run.
const oldAge = time.Minute

// Old reports whether content was so old at the time of the wall clock that any change since has moved its change time.
func Old(c event.Content, at time.Time) bool { return at.Sub(c.Ctime()) >= oldAge }

// Settled reports whether each change from a time on gives the content another change time. clock is what ClockOfChanges was then. Whether it
// was changed before, with the same change time, is another question. A file system that counts whole seconds shows none of their parts.
func Settled(c event.Content, clock time.Time) bool {
	if c.CtimeNsec == 0 {
		return clock.Unix() > c.CtimeSec
	}
	return clock.After(c.Ctime())
}

// ClockOfChanges returns the clock that the kernel takes change times from (ktime_get_coarse_real_ts64, in include/linux/timekeeping.h).
func ClockOfChanges() (time.Time, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts)
	return time.Unix(ts.Unix()), err
}

// Local reports whether this kernel itself keeps the files of a file system, so that reading one waits for nobody else. Network and
// user-space file systems may be in the hands of whoever would like to hold up the reader. Source: include/uapi/linux/magic.h.
func Local(fsMagic uint64) bool {
	switch fsMagic {
	case 0x01021994, // tmpfs
		0x858458f6, // ramfs
		0xca451a4e: // bcachefs
		return true
	}
	return Versioned(fsMagic)
}

// Versioned reports whether an unchanged change time can mean unchanged content: the file system is Local, and moves the time by each
// change. tmpfs and ramfs don't: a page that was read through a shared mapping is stored to without the kernel's notice (mm/memory.c,
// do_shared_fault; they have no page_mkwrite and count no dirty pages). Nor does bcachefs: an inode of a snapshot may be as one of another in all
// that the event tells; of btrfs it tells the subvolume.
func Versioned(fsMagic uint64) bool {
	switch fsMagic {
	case 0xef53, // ext2, ext3, ext4
		0x58465342, // xfs
		0x9123683e, // btrfs
		0x73717368, // squashfs
		0xe0f5e1e2, // erofs
		0xf2f52010, // f2fs
		0x9660:     // iso9660
		return true
	}
	return false
}

// Sum hashes the open file in each algorithm by one pass. It fails with ErrChanged unless the file is the content that the
// event saw, before and after, and with ctx's cause once that has ended. A file that is not Local may be in the hands of whoever would like to
// hold up the caller, and the way to any file, too: what ctx does not end is a system call that does not come back.
func Sum(ctx context.Context, f *os.File, ev *event.File, algos ...ima.HashAlgo) ([]ima.Digest, error) {
	if err := errors.Join(sameSubvolume(f, ev), Same(f, ev)); err != nil {
		return nil, err
	}
	hashes := make([]hash.Hash, len(algos))
	for i, a := range algos {
		h, ok := a.Hash()
		if !ok {
			return nil, fmt.Errorf("hash %s: this program has no %s", f.Name(), a)
		}
		hashes[i] = h.New()
	}
	total, err := read(ctx, f, ev.Content.Size, Versioned(ev.RealFS.Magic), hashes)
	if err != nil {
		return nil, fmt.Errorf("hash %s: %w", f.Name(), err)
	}
	if err := Same(f, ev); err != nil {
		return nil, err
	}
	if total != ev.Content.Size {
		return nil, fmt.Errorf("%w: read %d bytes of %d", ErrChanged, total, ev.Content.Size)
	}
	sums := make([]ima.Digest, len(algos))
	for i, a := range algos {
		d, err := ima.NewDigest(a, hashes[i].Sum(nil))
		if err != nil {
			return nil, err
		}
		sums[i] = d
	}
	return sums, nil
}

// Same checks that an open file, if only for its path, is the inode and the version that the event saw. Under overlayfs statx shows the real
// inode's number, size and times, but a device of the overlay's own. Errors: ErrUnreachable, ErrChanged, or that of statx.
func Same(f *os.File, ev *event.File) error {
	var st unix.Statx_t
	want := unix.STATX_INO | unix.STATX_SIZE | unix.STATX_CTIME | unix.STATX_TYPE
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, want, &st); err != nil {
		return fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	c := ev.Content
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%w: not a regular file", ErrUnreachable)
	}
	if st.Ino != c.Ino && st.Ino != ev.SeenIno {
		return fmt.Errorf("%w: inode %d, want %d", ErrUnreachable, st.Ino, c.Ino)
	}
	if !onOverlay(f, ev) && st.Dev_major<<20|st.Dev_minor != c.Dev && !anonymousDevices(ev.SeenFS.Magic) {
		return fmt.Errorf("%w: device %d:%d, want %d:%d", ErrUnreachable, st.Dev_major, st.Dev_minor, c.Dev>>20, c.Dev&0xfffff)
	}
	if st.Ctime.Sec != c.CtimeSec || st.Ctime.Nsec != c.CtimeNsec || st.Size != c.Size {
		return fmt.Errorf("%w: changed at %d.%09d with %d bytes, the event saw %d.%09d with %d",
			ErrChanged, st.Ctime.Sec, st.Ctime.Nsec, st.Size, c.CtimeSec, c.CtimeNsec, c.Size)
	}
	return nil
}

// onOverlay reports whether an open file is overlayfs's own. A mapping that is made executable later is of the real file, and leads to that one.
func onOverlay(f *os.File, ev *event.File) bool {
	if ev.Flags&event.Mprotect == 0 {
		return ev.Flags&event.Overlay != 0
	}
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC
}

// anonymousDevices reports whether statx shows another device than the superblock's: each btrfs subvolume has its own. The event has the
// subvolume's number; sameSubvolume compares that.
func anonymousDevices(fsMagic uint64) bool { return fsMagic == unix.BTRFS_SUPER_MAGIC }

// sameSubvolume checks that a file that is open for reading is of the subvolume of btrfs that the event saw. Below overlayfs that can't be
// asked for, nor was it seen where btrfs was not there when the kernel side began.
func sameSubvolume(f *os.File, ev *event.File) error {
	if ev.Content.Subvolume == 0 || onOverlay(f, ev) {
		return nil
	}
	const inoLookup = 0xd0009412 // BTRFS_IOC_INO_LOOKUP: _IOWR(0x94, 18, struct btrfs_ioctl_ino_lookup_args)
	var args struct {
		root, object uint64
		name         [4080]byte
	}
	args.object = 256 // BTRFS_FIRST_FREE_OBJECTID: of the root alone; anybody may ask
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), inoLookup, uintptr(unsafe.Pointer(&args))); errno != 0 {
		return fmt.Errorf("ask for the subvolume of %s: %w", f.Name(), errno)
	}
	if want := ev.Content.Subvolume >> 32; args.root != want {
		return fmt.Errorf("%w: subvolume %d, want %d", ErrUnreachable, args.root, want)
	}
	return nil
}
