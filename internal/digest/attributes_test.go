package digest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/need"
)

// setXattr sets an extended attribute, or skips the test where it may not.
func setXattr(t *testing.T, path, name string, value []byte) {
	t.Helper()
	if err := unix.Setxattr(path, name, value, 0); errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) {
		need.Skip(t, "%s can't be set here: %v", name, err)
	} else if err != nil {
		t.Fatal(err)
	}
}

func TestReadAttributes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o711|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a, err := readAttributes(f)
	if want := (&Attributes{Mode: unix.S_IFREG | unix.S_ISUID | 0o711}); err != nil || !reflect.DeepEqual(a, want) {
		t.Errorf("without any: %+v, %v, want %+v", a, err, want)
	}
	signature, caps := []byte("\x03\x02\x04keyidsignature"), append([]byte{1, 0, 0, 2}, make([]byte, 16)...)
	setXattr(t, path, "security.evm", []byte("\x05\x02\x04portable"))
	setXattr(t, path, "security.capability", caps)
	setXattr(t, path, "security.ima", signature)
	if a, err = readAttributes(f); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.IMA, signature) || string(a.EVM) != "\x05\x02\x04portable" || !bytes.Equal(a.XattrValues, append(signature, caps...)) {
		t.Errorf("attributes %+v", a)
	}
	if !reflect.DeepEqual(a.XattrNames, []string{"security.ima", "security.capability"}) || !reflect.DeepEqual(a.XattrLengths, []uint32{17, 20}) {
		t.Errorf("names %v, lengths %v", a.XattrNames, a.XattrLengths)
	}
}

// A file that was changed since the event has attributes that are not the event's.
func TestReadAttributesOfTheEvent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	ev := &event.File{Path: path, Process: event.Process{TGID: uint32(os.Getpid())}, Flags: event.Overlay}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	ev.Content.Ino, ev.Content.Size, ev.SeenIno = st.Ino, uint64(st.Size), st.Ino
	ev.Content.CtimeSec, ev.Content.CtimeNsec = st.Ctim.Sec, uint32(st.Ctim.Nsec)
	if a, err := ReadAttributes(ev, nil); err != nil || a.Mode != unix.S_IFREG|0o644 {
		t.Errorf("unchanged: %+v, %v", a, err)
	}
	ev.Content.CtimeNsec ^= 1
	if a, err := ReadAttributes(ev, nil); !errors.Is(err, ErrChanged) || a != nil {
		t.Errorf("changed: %+v, %v", a, err)
	}
	ev.Content.Ino, ev.SeenIno = 1, 1
	if a, err := ReadAttributes(ev, nil); !errors.Is(err, ErrUnreachable) || a != nil {
		t.Errorf("another: %+v, %v", a, err)
	}
}

func TestAlgoOfSecurityIMA(t *testing.T) {
	zeros := make([]byte, 60)
	with := func(head ...byte) []byte { return append(head, zeros...) }
	for name, c := range map[string]struct {
		xattr []byte
		want  ima.HashAlgo
	}{
		"none":                            {nil, 0},
		"a byte":                          {[]byte{3}, 0},
		"signature, SHA-512":              {with(3, 2, 6), ima.SHA512},
		"signature without its end":       {with(3, 2, 6)[:9], 0},
		"signature of version 1":          {with(3, 1, 6), 0},
		"signature of no algorithm":       {with(3, 2, 200), 0},
		"not computed here":               {with(3, 2, 17), 0},
		"fs-verity's, SHA-256":            {with(6, 3, 4), ima.SHA256},
		"fs-verity's of another version":  {with(6, 2, 4), 0},
		"digest that says SHA-1":          {with(4, 2), ima.SHA1},
		"digest that says what is none":   {with(4, 0xff), 0},
		"old digest, SHA-1":               {append([]byte{1}, bytes.Repeat([]byte{7}, 20)...), ima.SHA1},
		"old digest, MD5 and zeros":       {append(append([]byte{1}, bytes.Repeat([]byte{7}, 16)...), 0, 0, 0, 0), ima.MD5},
		"old digest, MD5":                 {append([]byte{1}, bytes.Repeat([]byte{7}, 16)...), ima.MD5},
		"old digest of no algorithm size": {with(1), 0},
		"an HMAC":                         {with(2, 4), 0},
	} {
		got, ok := (&Attributes{IMA: c.xattr}).Algo()
		if ok != (c.want != 0) || ok && got != c.want {
			t.Errorf("%s: %v, %v, want %v", name, got, ok, c.want)
		}
	}
}
