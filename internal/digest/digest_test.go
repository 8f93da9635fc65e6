package digest

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"hash"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/need"
)

// eventOf makes the event that a hook would send for a file of this process.
func eventOf(t *testing.T, path string) *event.File {
	t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS, &st); err != nil {
		t.Fatal(err)
	}
	ev := &event.File{Path: path, Process: event.Process{TGID: uint32(os.Getpid())}, Nlink: st.Nlink}
	ev.Content = event.Content{
		Dev: st.Dev_major<<20 | st.Dev_minor, Ino: st.Ino, Size: st.Size, CtimeSec: st.Ctime.Sec, CtimeNsec: st.Ctime.Nsec,
	}
	return ev
}

func writeFile(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestSumSeveralAlgorithmsInOneRead(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 100_000)
	path := filepath.Join(t.TempDir(), "f")
	for _, size := range []int{0, 1, readSize - 1, readSize, readSize + 1, len(content)} {
		writeFile(t, path, content[:size])
		ev := eventOf(t, path)
		f, err := Open(ev, nil)
		if err != nil {
			t.Fatal(err)
		}
		sums, err := Sum(t.Context(), f, ev, ima.SHA256, ima.SHA512)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		want256, want512 := sha256.Sum256(content[:size]), sha512.Sum512(content[:size])
		if !bytes.Equal(sums[0].Bytes(), want256[:]) || !bytes.Equal(sums[1].Bytes(), want512[:]) {
			t.Errorf("%d bytes: %v", size, sums)
		}
	}
}

// Each way in which the file behind an event can be another by the time the agent gets to it.
func TestOpenNeverTakesAnotherFile(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		change func(path string) error
		want   error
	}{
		"unlinked": {os.Remove, ErrUnreachable},
		"replaced": {func(path string) error {
			other := path + ".new"
			writeFile(t, other, []byte("same size"))
			return os.Rename(other, path)
		}, ErrUnreachable},
		"written": {func(path string) error {
			time.Sleep(20 * time.Millisecond)
			return os.WriteFile(path, []byte("size same"), 0o755)
		}, ErrChanged},
		"truncated": {func(path string) error { return os.Truncate(path, 3) }, ErrChanged},
		"now a FIFO": {func(path string) error {
			os.Remove(path)
			return unix.Mkfifo(path, 0o600)
		}, ErrUnreachable},
		"now a link to another": {func(path string) error {
			os.Remove(path)
			writeFile(t, path+".target", []byte("same size"))
			return os.Symlink(path+".target", path)
		}, ErrUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			writeFile(t, path, []byte("same size"))
			keep, err := os.Open(path) // so that the inode number is not reused at once
			if err != nil {
				t.Fatal(err)
			}
			defer keep.Close()
			ev := eventOf(t, path)
			if err := c.change(path); err != nil {
				t.Fatal(err)
			}
			f, err := Open(ev, nil)
			if f != nil {
				f.Close()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("Open: %v, want %v", err, c.want)
			}
		})
	}
}

func TestSumNoticesChangeAfterOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	writeFile(t, path, []byte("content"))
	ev := eventOf(t, path)
	f, err := Open(ev, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	time.Sleep(20 * time.Millisecond)
	writeFile(t, path, []byte("another"))
	if _, err := Sum(t.Context(), f, ev, ima.SHA256); !errors.Is(err, ErrChanged) {
		t.Errorf("Sum: %v, want %v", err, ErrChanged)
	}
}

func TestOpenThroughRootAndMapping(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	writeFile(t, path, bytes.Repeat([]byte{1}, os.Getpagesize()))
	ev := eventOf(t, path)
	self := event.Process{TGID: uint32(os.Getpid()), Start: startOf(t, os.Getpid())}
	if !Alive(self) {
		t.Fatal("this process is not alive")
	}
	root, err := OpenRoot(self)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	ev.Process = event.Process{TGID: 1 << 30}
	f, err := Open(ev, root)
	if err != nil {
		t.Fatalf("through the kept root, its process gone: %v", err)
	}
	mapping, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_PRIVATE)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapping)
	ev.Process, ev.Flags = self, event.Mprotect
	ev.VMAStart, ev.VMAEnd = mappingOf(t, path)
	ev.Path = ""
	if got, err := MappingPath(ev); err != nil || got != path {
		t.Errorf("MappingPath: %q, %v", got, err)
	}
	if os.Getuid() != 0 {
		return // map_files asks for a capability
	}
	f, err = Open(ev, nil)
	if err != nil {
		t.Fatalf("through the mapping: %v", err)
	}
	f.Close()
}

func TestCacheDropsTheOldest(t *testing.T) {
	c := NewCache(2)
	content := func(ino uint64) event.Content { return event.Content{Ino: ino} }
	d := ima.ZeroDigest(ima.SHA256)
	c.Put(content(1), d)
	c.Put(content(2), d)
	c.Get(content(1), ima.SHA256)
	c.Put(content(3), d)
	if c.Len() != 2 || c.Get(content(2), ima.SHA256) != (ima.Digest{}) || c.Get(content(1), ima.SHA256) != d {
		t.Errorf("kept %d, with 2: %v", c.Len(), c.Get(content(2), ima.SHA256))
	}
	if got := c.Get(content(1), ima.SHA512); !got.IsNone() {
		t.Errorf("a digest of another algorithm: %v", got)
	}
}

func TestOldAndSettled(t *testing.T) {
	c := event.Content{CtimeSec: 1000, CtimeNsec: 500}
	at := func(sec, nsec int64) time.Time { return time.Unix(sec, nsec) }
	if Old(c, at(1059, 0)) || Old(c, at(900, 0)) || !Old(c, at(1060, 500)) {
		t.Error("old must mean a minute old")
	}
	if Settled(c, at(1000, 500)) || Settled(c, at(999, 600)) || !Settled(c, at(1000, 501)) {
		t.Error("settled must mean that the clock is past the change time")
	}
	whole := event.Content{CtimeSec: 1000}
	if Settled(whole, at(1000, 999_999_999)) || !Settled(whole, at(1001, 0)) {
		t.Error("a change time in whole seconds is past when the second is")
	}
}

// The clock is that of a new file's change time.
func TestClockOfChanges(t *testing.T) {
	before, err := ClockOfChanges()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "f")
	writeFile(t, path, []byte("content"))
	ctime := eventOf(t, path).Content.Ctime()
	for after := before; !after.After(ctime); time.Sleep(time.Millisecond) {
		if after, err = ClockOfChanges(); err != nil || after.After(before.Add(time.Minute)) {
			t.Fatalf("clock %v, changed %v, %v", after, ctime, err)
		}
	}
	if ctime.Before(before) {
		t.Errorf("changed at %v, the clock was %v before", ctime, before)
	}
}

// TestSumMapped: a file that is long enough to be mapped, in several windows with an odd end.
func TestSumMapped(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcde"), (mapSize+mapFrom)/15)
	path := filepath.Join(t.TempDir(), "f")
	for _, size := range []int{mapFrom - 1, mapFrom, mapFrom + 1, len(content)} {
		writeFile(t, path, content[:size])
		ev := eventOf(t, path)
		ev.RealFS.Magic = 0xef53 // mapped only where that is known to be well
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		sums, err := Sum(t.Context(), f, ev, ima.SHA256, ima.SHA1)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		want256, want1 := sha256.Sum256(content[:size]), sha1.Sum(content[:size])
		if !bytes.Equal(sums[0].Bytes(), want256[:]) || !bytes.Equal(sums[1].Bytes(), want1[:]) {
			t.Errorf("%d bytes: %v", size, sums)
		}
	}
}

// truncating cuts the file at the first write to it.
type truncating struct {
	file *os.File
	to   int64
	done bool
}

func (w *truncating) Write(b []byte) (int, error) {
	if !w.done {
		w.done = true
		if err := w.file.Truncate(w.to); err != nil {
			return 0, err
		}
	}
	sha256.Sum256(b)
	return len(b), nil
}

// TestMappedFileCut: a file that is cut while it is mapped is an error, not the end of the process, whether its end is missing
// from the pages brought in already or from those to come; and Sum finds what changed by reading.
func TestMappedFileCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, to := range []int64{0, readSize / 2, populateSize} {
		writeFile(t, path, make([]byte, mapFrom))
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := readMapped(f, mapFrom, &truncating{file: f, to: to}); err == nil {
			t.Errorf("cut to %d bytes: no error", to)
		}
		h := sha256.New()
		n, err := read(t.Context(), f, mapFrom, true, []hash.Hash{h})
		want := sha256.Sum256(make([]byte, to))
		if err != nil || n != uint64(to) || !bytes.Equal(h.Sum(nil), want[:]) {
			t.Errorf("cut to %d bytes: read %d bytes, %v", to, n, err)
		}
		f.Close()
	}
}

// What takes too long is broken off, mapped or read.
func TestSumEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "long")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<40); err != nil {
		need.Skip(t, "a file of a terabyte in the temporary folder: %v", err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, magic := range []uint64{0xef53, 0x01021994} {
		ev := eventOf(t, path)
		ev.RealFS.Magic = magic
		ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, os.ErrDeadlineExceeded)
		if _, err := Sum(ctx, f, ev, ima.SHA256); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%#x: %v, want %v", magic, err, os.ErrDeadlineExceeded)
		}
		cancel()
	}
}

// The holes of a file on tmpfs are read without taking memory.
func TestHolesTakeNoMemory(t *testing.T) {
	f, err := os.CreateTemp("/dev/shm", "holes")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var fs unix.Statfs_t
	if err := unix.Statfs(f.Name(), &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		need.Skip(t, "/dev/shm is no tmpfs: %v", err)
	}
	if err := f.Truncate(2 * mapFrom); err != nil {
		t.Fatal(err)
	}
	ev := eventOf(t, f.Name())
	ev.RealFS.Magic = uint64(fs.Type)
	if _, err := Sum(t.Context(), f, ev, ima.SHA256); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(f.Name(), &st); err != nil || st.Blocks != 0 {
		t.Errorf("%d blocks, %v", st.Blocks, err)
	}
}
