package imafs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/policy"
)

// unmounted is the file system without a mount: its requests come from the test.
func unmounted(f *testing.F) (*fileSystem, *fakeViews) {
	views := &fakeViews{t: f, dir: f.TempDir(), store: measure.NewStore(), spaces: make(map[uint32]*fakeView)}
	f.Cleanup(func() {
		for _, v := range views.all() {
			if l := v.List(); l != nil {
				l.Close()
			}
		}
	})
	return &fileSystem{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), views: views, log: zap.NewNop(), started: time.Now(), open: newOpenFiles(),
		sizes: newSizes(), stopping: make(chan struct{}),
	}, views
}

// FuzzRequests: whatever node, name, handle and offset a request of the kernel's has, it is answered, and nobody comes to another
// namespace's file.
func FuzzRequests(f *testing.F) {
	s, _ := unmounted(f)
	own, err := callerMountNS(uint32(os.Getpid()))
	if err != nil {
		f.Fatal(err)
	}
	for number := range len(files) + 1 {
		f.Add(nsNode(own.Inum, number), "policy", uint64(0), uint64(0), uint32(unix.O_RDONLY), []byte("sha256\n"))
		f.Add(nsNode(own.Inum, number), "hash", uint64(1), uint64(3), uint32(unix.O_WRONLY), []byte("sha256\n"))
	}
	f.Add(uint64(nodeRoot), "ima", uint64(7), uint64(1)<<63, uint32(unix.O_RDWR), []byte("1"))
	f.Add(nsNode(own.Inum+1, 1), "ima", uint64(1), uint64(0), uint32(unix.O_RDONLY), []byte("1"))
	f.Fuzz(func(t *testing.T, node uint64, name string, fh, offset uint64, flags uint32, data []byte) {
		h := fuse.InHeader{NodeId: node, Caller: fuse.Caller{Pid: uint32(os.Getpid())}}
		never := make(chan struct{})
		var entry fuse.EntryOut
		if s.Lookup(never, &h, name, &entry) == fuse.OK {
			if inum, _, ok := fileOf(entry.NodeId); ok && inum != own.Inum {
				t.Fatalf("%q below node %#x is of namespace %d", name, node, inum)
			}
		}
		var attr fuse.AttrOut
		s.GetAttr(never, &fuse.GetAttrIn{InHeader: h}, &attr)
		s.SetAttr(never, &fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{InHeader: h, Valid: flags}}, &attr)
		s.Access(never, &fuse.AccessIn{InHeader: h, Mask: flags})
		s.Readlink(never, &h)
		s.OpenDir(never, &fuse.OpenIn{InHeader: h, Flags: flags}, &fuse.OpenOut{})
		s.ReadDir(never, &fuse.ReadIn{InHeader: h, Offset: offset}, fuse.NewDirEntryList(make([]byte, 4096), offset))
		buf := make([]byte, 512)
		s.Read(never, &fuse.ReadIn{InHeader: h, Fh: fh, Offset: offset, Size: 512}, buf)
		s.Write(never, &fuse.WriteIn{InHeader: h, Fh: fh, Offset: offset}, data)
		var out fuse.OpenOut
		if s.Open(never, &fuse.OpenIn{InHeader: h, Flags: flags}, &out) != fuse.OK {
			return
		}
		if n, status := s.Write(never, &fuse.WriteIn{InHeader: h, Fh: out.Fh, Offset: offset}, data); status == fuse.OK && int(n) > len(data) {
			t.Fatalf("%d of %d bytes are written", n, len(data))
		}
		s.Read(never, &fuse.ReadIn{InHeader: h, Fh: out.Fh, Offset: offset, Size: 512}, buf)
		s.Flush(never, &fuse.FlushIn{InHeader: h, Fh: out.Fh})
		s.Release(never, &fuse.ReleaseIn{InHeader: h, Fh: out.Fh})
	})
}

// A caller one of whose groups can't be told has no rights by the others.
func TestCallerGroups(t *testing.T) {
	for text, want := range map[string]int{"Groups:\t1 2 \n": 2, "Groups:\t \n": 0, "Groups:\t1 x 2\n": -1, "Groups:\t1 -2 3\n": -1} {
		var one task
		if err := one.parseStatus(text); (err != nil) != (want < 0) || len(one.groups) != max(want, 0) {
			t.Errorf("%q: %v, %v", text, one.groups, err)
		}
	}
}

// FuzzCaller: what the kernel says of a caller and of its files is read as it says it, or refused whole.
func FuzzCaller(f *testing.F) {
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(own))
	f.Add("Name:\tcat\nTgid:\t4422\nGroups:\t0 27 1000 \nSigPnd:\t0000000000000100\nCapEff:\t000001ffffffffff\n")
	f.Add("Groups:\t1 x 2\n")
	f.Add("pos:\t0\nflags:\t0100001\nmnt_id:\t31\nino:\t4422\n")
	f.Fuzz(func(t *testing.T, text string) {
		killed(text)
		flags, inode := parseFDInfo(text)
		if f, i := parseFDInfo(fmt.Sprintf("flags:\t0%o\nino:\t%d\n", flags, inode)); f != flags || i != inode {
			t.Fatalf("flags %o and inode %d, read again %o and %d", flags, inode, f, i)
		}
		var one, again task
		if one.parseStatus(text) != nil {
			return
		}
		said := fmt.Sprintf("Tgid:\t%d\nCapEff:\t%016x\nGroups:\t%s \n", one.TGID, one.caps, strings.Trim(fmt.Sprint(one.groups), "[]"))
		if err := again.parseStatus(said); err != nil || !reflect.DeepEqual(again, one) {
			t.Fatalf("%+v, read again %+v, %v", one, again, err)
		}
	})
}

// FuzzPolicyWrite: what is written to a policy, a piece after the other, takes effect as its lines parse by themselves, and all of it or
// nothing. A byte of lengths says where each piece ends.
func FuzzPolicyWrite(f *testing.F) {
	f.Add([]byte("measure func=BPRM_CHECK\n# comment\nmeasure func=MMAP_CHECK mask=MAY_EXEC\n"), []byte{24, 10})
	f.Add([]byte("measure\x00dont_measure\n"), []byte{3})
	f.Add([]byte("nonsense\n"), []byte{})
	s, views := unmounted(f)
	f.Fuzz(func(t *testing.T, text, lengths []byte) {
		view := &fakeView{
			views: views, policy: new(policy.Policy), ended: make(chan struct{}), barrier: func(context.Context) error { return nil },
		}
		w := &policyWriter{open: s.open, log: zap.NewNop(), view: view, task: &task{Caller: Caller{NS: event.MountNS{Inum: 1, ID: 1}}}}
		if err := errors.Join(s.open.reserve(w.task.NS), w.begin()); err != nil {
			t.Fatal(err)
		}
		defer s.open.unreserve(w.task.NS)
		failed, offset := false, int64(0)
		for len(text) > 0 && !failed {
			n := len(text)
			if len(lengths) > 0 {
				n, lengths = min(n, int(lengths[0])), lengths[1:]
			}
			if n == 0 {
				continue
			}
			if text[0] == '/' {
				break // that is a file's name
			}
			took, err := w.write(t.Context(), text[:n], offset)
			if failed = err != nil; failed {
				break
			}
			if took < 1 || took > n {
				t.Fatalf("%d of %d bytes are taken", took, n)
			}
			text, offset = text[took:], offset+int64(took)
		}
		written := string(w.rules)
		w.release()
		want := ""
		if !failed {
			p, err := policy.Parse("written", []byte(written))
			if err != nil {
				t.Fatalf("taken line by line, and refused as a whole: %q, %v", written, err)
			}
			want = p.String()
		}
		if got := view.rules(); got != want {
			t.Fatalf("in force: %q, want %q; written %q", got, want, written)
		}
	})
}
