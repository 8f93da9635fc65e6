package event

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// fileRecord builds a record as bpf/file.h does.
func fileRecord(path string, change func(b []byte)) []byte {
	b := make([]byte, FileSize+512)
	put32 := func(at int, v uint32) { binary.NativeEndian.PutUint32(b[at:], v) }
	put64 := func(at int, v uint64) { binary.NativeEndian.PutUint64(b[at:], v) }
	put32(0, kindFile)
	put32(4, 4026532281)
	put64(8, 7)
	put64(24, 99)
	put32(32, 1234)
	put64(72, 555)
	put64(80, 21)
	put64(88, 1700000000<<30|5)
	put64(96, 257<<32|7)
	put32(104, 8<<20|1)
	put64(112, 4096)
	put32(124, 6)
	put64(152, 3)
	put32(204, uint32(ima.BPRMCheck))
	put32(212, uint32(len(path)))
	put32(232, uint32(ima.SHA256))
	b[240] = 0xab
	copy(b[304:], "ext4")
	copy(b[FileSize:], path)
	if change != nil {
		change(b)
	}
	return b
}

func TestDecodeFile(t *testing.T) {
	r, err := Decode(fileRecord("/bin/true", nil))
	if err != nil {
		t.Fatal(err)
	}
	f := r.(*File)
	if f.NS.String() != "4026532281:7" || f.Sequence != 99 || f.Path != "/bin/true" || f.Process.TGID != 1234 || f.Writes != 6 {
		t.Errorf("decoded %+v", f)
	}
	if f.Digest.Algo() != ima.SHA256 || f.Digest.Bytes()[0] != 0xab || f.Errno != 0 {
		t.Errorf("digest %v, errno %d", f.Digest, f.Errno)
	}
	if f.SeenFS.Name != "ext4" || f.RealFS.Name != "ext4" {
		t.Errorf("file system %+v", f.SeenFS)
	}
	if f.Content != (Content{Ino: 555, Size: 4096, CtimeSec: 1700000000, CtimeNsec: 5, Subvolume: 257<<32 | 7, Dev: 8<<20 | 1}) {
		t.Errorf("content %+v", f.Content)
	}
	c := f.MeasuredKey().Content
	if c.Ino != 555 || c.Change != 4096 || c.Ctime != 1700000000<<30|5 || c.Subvolume != 257<<32|7 || c.Func != uint32(ima.BPRMCheck) || c.Policy != 3 {
		t.Errorf("key %+v", c)
	}
}

func TestDecodeFileFlags(t *testing.T) {
	set := func(flags Flags) func([]byte) {
		return func(b []byte) { binary.NativeEndian.PutUint32(b[208:], uint32(flags)) }
	}
	deleted := fileRecord("/tmp/x (deleted)", set(Unlinked))
	if r, err := Decode(deleted); err != nil || r.(*File).Path != "/tmp/x" {
		t.Errorf("unlinked: %v, %v", r, err)
	}
	versioned := fileRecord("/x", set(Versioned))
	if r, err := Decode(versioned); err != nil || r.(*File).Content.Change != 21 || r.(*File).MeasuredKey().Content.Change != 21 {
		t.Errorf("a file system that counts changes: %+v, %v", r, err)
	}
	honest := fileRecord("/tmp/x (deleted)", nil)
	if r, err := Decode(honest); err != nil || r.(*File).Path != "/tmp/x (deleted)" {
		t.Errorf("a file really called so: %v, %v", r, err)
	}
	withIDs := fileRecord("/x", func(b []byte) {
		set(SetUIDCap | Reqprot)(b)
		binary.NativeEndian.PutUint32(b[48:], 1000)
	})
	r, err := Decode(withIDs)
	if err != nil {
		t.Fatal(err)
	}
	if k := r.(*File).MeasuredKey(); k.UID != 1000 || k.Content.Func != uint32(ima.BPRMCheck)|uint32(SetUIDCap|Reqprot)<<8 || k.IDsIgnored() {
		t.Errorf("key %+v", k)
	}
	ignored := fileRecord("/x", func(b []byte) {
		set(SetUIDCap | Reqprot | IDsIgnored)(b)
		binary.NativeEndian.PutUint32(b[48:], 1000)
	})
	if r, err = Decode(ignored); err != nil {
		t.Fatal(err)
	}
	if k := r.(*File).MeasuredKey(); k.UID != 0 || k.Content.Func != uint32(ima.BPRMCheck)|uint32(Reqprot|IDsIgnored)<<8 || !k.IDsIgnored() {
		t.Errorf("key with ids ignored %+v", k)
	}
}

func TestDecodeIDMaps(t *testing.T) {
	b := make([]byte, IDMapsSize)
	put32 := func(at int, v uint32) { binary.NativeEndian.PutUint32(b[at:], v) }
	put32(0, kindIDMaps)
	put32(32, 2)
	for i, v := range []uint32{0, 100000, 1000, 1000, 1000, 1} {
		put32(40+4*i, v)
	}
	put32(36, 6)
	r, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	m := r.(*IDMaps)
	if len(m.UIDs) != 2 || m.UIDs.ToHost(5) != 100005 || m.UIDs.ToHost(1000) != 1000 || m.UIDs.ToHost(1001) != ima.NoID {
		t.Errorf("users %v", m.UIDs)
	}
	if !m.Cut || len(m.GIDs) != 0 {
		t.Errorf("a map of six ranges: %v, cut %v", m.GIDs, m.Cut)
	}
	put32(36, 0)
	if r, err := Decode(b); err != nil || r.(*IDMaps).Cut || len(r.(*IDMaps).GIDs) != 0 {
		t.Errorf("a map that is not written yet: %+v, %v", r, err)
	}
}

func TestDecodeBirth(t *testing.T) {
	b := make([]byte, BirthSize)
	put32 := func(at int, v uint32) { binary.NativeEndian.PutUint32(b[at:], v) }
	put32(0, kindBirth)
	put32(44, 70)
	put32(48, 60)
	put32(76, 1)
	r, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if f := r.(*Birth); f.Creator != 70 || f.Ancestors != [8]uint32{60, 0, 0, 0, 0, 0, 0, 1} {
		t.Errorf("birth %+v", f)
	}
}

func TestDecodeWrite(t *testing.T) {
	b := make([]byte, WriteSize)
	put32 := func(at int, v uint32) { binary.NativeEndian.PutUint32(b[at:], v) }
	put32(0, kindWrite)
	put32(32, 70)
	put32(48, 1000)
	put32(72, 5)
	put32(80, 8<<20|1)
	put32(84, 9)
	r, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if w := r.(*Write); w.Process.TGID != 70 || w.Subject.UID != 1000 || w.Inode != (Inode{Dev: 8<<20 | 1, Generation: 9, Ino: 5}) {
		t.Errorf("write %+v", w)
	}
	f := &File{Content: Content{Dev: 1, Generation: 2, Ino: 3}, SeenDev: 4, SeenIno: 5}
	if got := f.Inodes(); len(got) != 1 || got[0] != (Inode{1, 2, 3}) {
		t.Errorf("inodes %+v", got)
	}
	f.Flags = Overlay
	if got := f.Inodes(); len(got) != 2 || got[1] != (Inode{Dev: 4, Ino: 5}) {
		t.Errorf("inodes of an overlayfs file %+v", got)
	}
}

func TestDecodeRefuses(t *testing.T) {
	put32 := func(at int, v uint32) func([]byte) {
		return func(b []byte) { binary.NativeEndian.PutUint32(b[at:], v) }
	}
	for name, c := range map[string]struct {
		record []byte
		reason string
	}{
		"empty":             {nil, "shorter than a header"},
		"unknown kind":      {fileRecord("/x", put32(0, 77)), "unknown kind"},
		"cut":               {fileRecord("/x", nil)[:FileSize-1], "shorter than its kind"},
		"path beyond":       {fileRecord("/x", put32(212, 513)), "does not fit"},
		"path too long":     {fileRecord("/x", put32(212, 1<<31)), "does not fit"},
		"zero in path":      {fileRecord("/x\x00y", nil), "zero byte"},
		"unknown function":  {fileRecord("/x", put32(204, 9)), "not one that is hooked"},
		"unknown algorithm": {fileRecord("/x", put32(232, 200)), "hash algorithm"},
	} {
		_, err := Decode(c.record)
		var bad *DecodeError
		if !errors.As(err, &bad) || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: error %v, want %q", name, err, c.reason)
		}
	}
	if _, err := DecodeTasks(make([]byte, TaskSize+1)); err == nil {
		t.Error("DecodeTasks took a cut task")
	}
}

// FuzzDecodeTasks: tasks are read as the iterator wrote them, all or none.
func FuzzDecodeTasks(f *testing.F) {
	one := make([]byte, TaskSize)
	for i := range one {
		one[i] = byte(i)
	}
	f.Add(one)
	f.Add(append(one, make([]byte, TaskSize)...))
	f.Add(one[:TaskSize-1])
	f.Fuzz(func(t *testing.T, b []byte) {
		tasks, err := DecodeTasks(b)
		if err != nil {
			if len(tasks) != 0 || len(b)%TaskSize == 0 {
				t.Fatalf("%d tasks of %d bytes, and %v", len(tasks), len(b), err)
			}
			return
		}
		var again []byte
		ne := binary.NativeEndian
		for _, task := range tasks {
			for _, n := range []uint64{task.NS.ID, task.ParentNS.ID, uint64(task.Process.Start)} {
				again = ne.AppendUint64(again, n)
			}
			for _, n := range []uint32{task.NS.Inum, task.ParentNS.Inum, task.Process.TGID, task.Process.PID} {
				again = ne.AppendUint32(again, n)
			}
		}
		if !bytes.Equal(again, b) {
			t.Fatalf("%x, written again %x", b, again)
		}
	})
}

// FuzzMountNS: a namespace's name that is taken is written as it is read.
func FuzzMountNS(f *testing.F) {
	f.Add("4026532281:7")
	f.Add("4026532281")
	f.Add("4294967296:18446744073709551616")
	f.Fuzz(func(t *testing.T, text string) {
		var n, again MountNS
		if n.UnmarshalText([]byte(text)) != nil {
			return
		}
		if err := again.UnmarshalText([]byte(n.String())); err != nil || again != n {
			t.Fatalf("%q is %v; read again %v, %v", text, n, again, err)
		}
	})
}

// FuzzDecode: a record is decoded or refused, and no path is longer than the kernel's own.
func FuzzDecode(f *testing.F) {
	f.Add(fileRecord("/bin/true", nil))
	f.Add(fileRecord("/bin/true", nil)[:FileSize])
	f.Add(make([]byte, BirthSize))
	f.Add(make([]byte, IDMapsSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decode(b)
		if (r == nil) == (err == nil) {
			t.Fatalf("record %v with error %v", r, err)
		}
		if file, ok := r.(*File); ok && len(file.Path) > PathMax {
			t.Fatalf("a path of %d bytes", len(file.Path))
		}
	})
}
