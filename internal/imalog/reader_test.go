package imalog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"imans.dev/imans-agent/internal/ima"
)

func sampleValues(t testing.TB, name string) FieldValues {
	t.Helper()
	d, err := ima.NewDigest(ima.SHA256, bytes.Repeat([]byte{0xd1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return FieldValues{Digest: d, Name: name}
}

func sample(t testing.TB, template, name string) *Entry {
	t.Helper()
	e, err := NewEntry(10, template, sampleValues(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// TestReaderCut cuts every vector at every byte (every fifth of a long one): between two entries that is the list's
// end, inside one it is a cut entry, and never anything else.
func TestReaderCut(t *testing.T) {
	for _, v := range loadVectors(t) {
		list := v.read(t, ima.SHA256, "bin")
		ends := map[int]int{0: 0} // where an entry ends: how many there are
		r := NewReader(bytes.NewReader(list), ima.SHA256)
		for n := 1; ; n++ {
			if _, err := r.Next(); err != nil {
				break
			}
			ends[int(r.End())] = n
		}
		last, entries := 0, 0
		step := 1
		if len(list) > 3000 {
			step = 5
		}
		for at := range list {
			if n, ok := ends[at]; ok {
				last, entries = at, n
			} else if at%step != 0 {
				continue
			}
			r := NewReader(bytes.NewReader(list[:at]), ima.SHA256)
			for range entries {
				if _, err := r.Next(); err != nil {
					t.Fatalf("%s cut at %d: %v", v.name, at, err)
				}
			}
			_, err := r.Next()
			if at == last {
				if err != io.EOF {
					t.Errorf("%s cut at %d, between entries: %v", v.name, at, err)
				}
				continue
			}
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || !corrupt.Cut || !errors.Is(err, io.ErrUnexpectedEOF) ||
				corrupt.Offset != int64(last) || corrupt.Entry != entries || r.End() != int64(at) {
				t.Fatalf("%s cut at %d: %#v, End %d", v.name, at, err, r.End())
			}
			if _, again := r.Next(); again != err {
				t.Errorf("%s cut at %d: the second time %v", v.name, at, again)
			}
		}
	}
}

// TestReaderCorrupt changes one thing of the second of three entries. Offsets are those of the sha1 list's fields.
func TestReaderCorrupt(t *testing.T) {
	const pcr, digest, nameSize, name, dataSize, digestSize, algo = 0, 4, 24, 28, 34, 38, 42
	pathSize := digestSize + 4 + 8 + 32
	put := func(at int, n uint32) func([]byte) {
		return func(e []byte) { binary.LittleEndian.PutUint32(e[at:], n) }
	}
	add := func(at int, n int) func([]byte) {
		return func(e []byte) { e[at] = byte(int(e[at]) + n) }
	}
	tests := []struct {
		name   string
		change func(entry []byte)
		reason string
	}{
		{"PCR 24", put(pcr, 24), "PCR 24"},
		{"PCR of many bytes", put(pcr, 1<<31), "PCR 2147483648"},
		{"no template name", put(nameSize, 0), "template name of 0 bytes"},
		{"long template name", put(nameSize, 256), "template name of 256 bytes"},
		{"huge template name", put(nameSize, 1<<32-1), "template name of 4294967295 bytes"},
		{"template name into the data", put(nameSize, 200), "byte 0x00"},
		{"unknown template", func(e []byte) { e[name+5] = 'h' }, `"ima-nh": unknown`},
		{"template with another field", func(e []byte) { copy(e[name:], "n-ng|d") }, "field"},
		{"data too long", put(dataSize, 1<<20+1), "data of 1048577 bytes"},
		{"data over the end, shown by its fields", put(dataSize, 1<<20), "behind the last field"},
		{"data into the next entry", add(dataSize, 4), "behind the last field"},
		{"data one byte short", add(dataSize, -1), "does not fit"},
		{"data empty", put(dataSize, 0), "ends before field d-ng"},
		{"digest field over the end", put(digestSize, 1<<16), "does not fit"},
		{"digest field of 4 GiB", put(digestSize, 1<<32-1), "does not fit"},
		{"digest field short", add(digestSize, -1), "does not fit"},
		{"name field longer", add(pathSize, 1), "does not fit"},
		{"name field shorter", add(pathSize, -1), "must end in its only zero byte"},
		{"digest without colon", func(e []byte) { e[algo+6] = ';' }, "colon"},
		{"zero in the name", func(e []byte) { e[pathSize+6] = 0 }, "only zero byte"},
	}
	first := sample(t, NG, "/first").AppendBinary(nil, ima.SHA1)
	second := sample(t, NG, "/second").AppendBinary(nil, ima.SHA1)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			list := append(bytes.Clone(first), second...)
			tt.change(list[len(first):])
			list = append(list, sample(t, NG, "/third").AppendBinary(nil, ima.SHA1)...)
			r := NewReader(bytes.NewReader(list), ima.SHA1)
			if _, err := r.Next(); err != nil {
				t.Fatal(err)
			}
			_, err := r.Next()
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || corrupt.Cut || errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("got %v, want corruption that is no cut", err)
			}
			if corrupt.Entry != 1 || corrupt.Offset != int64(len(first)) || !strings.Contains(corrupt.Reason, tt.reason) {
				t.Errorf("got entry %d at %d: %s; want %q", corrupt.Entry, corrupt.Offset, corrupt.Reason, tt.reason)
			}
		})
	}
}

// TestReaderLegacyName: the zeros that pad a hashed name must not let two lists have one digest.
func TestReaderLegacyName(t *testing.T) {
	e, err := NewEntry(10, IMA, FieldValues{Digest: ima.ZeroDigest(ima.SHA1), Name: "/a"})
	if err != nil {
		t.Fatal(err)
	}
	list := append(e.AppendBinary(nil, ima.SHA1), 0)
	list[len(list)-1-2-4]++ // the name's length
	var corrupt *CorruptError
	if _, err := NewReader(bytes.NewReader(list), ima.SHA1).Next(); !errors.As(err, &corrupt) || corrupt.Cut {
		t.Errorf("a name padded in the list: %v", err)
	}
}

// TestReaderError: what the disk says is not taken for a statement about the list.
func TestReaderError(t *testing.T) {
	broken := errors.New("disk on fire")
	list := sample(t, NG, "/a").AppendBinary(nil, ima.SHA1)
	for at := range list {
		r := NewReader(io.MultiReader(bytes.NewReader(list[:at]), iotest.ErrReader(broken)), ima.SHA1)
		_, err := r.Next()
		var corrupt *CorruptError
		if !errors.Is(err, broken) || errors.As(err, &corrupt) {
			t.Errorf("after %d bytes: %v", at, err)
		}
	}
	if _, err := NewReader(bytes.NewReader(list), 200).Next(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("unknown bank: %v", err)
	}
}

// TestReaderGrows: after io.EOF between two entries a list may be read on.
func TestReaderGrows(t *testing.T) {
	var list bytes.Buffer
	r := NewReader(&list, ima.SHA1)
	for range 3 {
		if _, err := r.Next(); err != io.EOF {
			t.Fatalf("empty: %v", err)
		}
		list.Write(sample(t, NG, "/a").AppendBinary(nil, ima.SHA1))
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestReaderLarge reads an entry larger than any buffer, and makes sure that a length alone costs no memory.
func TestReaderLarge(t *testing.T) {
	v := sampleValues(t, "large")
	v.Buf = bytes.Repeat([]byte("0123456789abcdef"), 40_000)
	e, err := NewEntry(10, Buf, v)
	if err != nil {
		t.Fatal(err)
	}
	list := e.AppendBinary(nil, ima.SHA384)
	got, err := NewReader(iotest.OneByteReader(bytes.NewReader(list)), ima.SHA384).Next()
	if err != nil || !bytes.Equal(got.AppendBinary(nil, ima.SHA384), list) {
		t.Errorf("640 KB read back: %v", err)
	}
	var into Entry
	r := NewReader(bytes.NewReader(list[:200]), ima.SHA384)
	if err := r.ReadInto(&into); !errors.Is(err, io.ErrUnexpectedEOF) || cap(into.data) > 4096 {
		t.Errorf("a cut entry that says 640 KB: %v, %d bytes kept", err, cap(into.data))
	}
	v.Buf = make([]byte, 1<<20)
	if _, err := NewEntry(10, Buf, v); err == nil {
		t.Error("an entry was made that can't be read back")
	}
}

func TestReadInto(t *testing.T) {
	list := sample(t, NG, "/b").AppendBinary(sample(t, NG, "/a/long/name").AppendBinary(nil, ima.SHA1), ima.SHA1)
	var e Entry
	r := NewReader(bytes.NewReader(list), ima.SHA1)
	for _, want := range []string{"/a/long/name", "/b"} {
		if err := r.ReadInto(&e); err != nil || e.Name() != want || e.Digest(ima.SHA1) != r.StoredDigest() {
			t.Errorf("%q, %v; want %q", e.Name(), err, want)
		}
	}
	many := bytes.NewReader(bytes.Repeat(list, 500))
	if n := testing.AllocsPerRun(10, func() {
		many.Reset(bytes.Repeat(list, 500))
		r := NewReader(many, ima.SHA1)
		for r.ReadInto(&e) == nil {
		}
	}); n > 10 {
		t.Errorf("%v allocations for reading 1,000 entries", n)
	}
}
