package imafs

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/need"
)

// TestListFormats: each list file is its bank's, in its format, with violations and a name that would break a line.
func TestListFormats(t *testing.T) {
	w, v := openActive(t)
	fill(t, v.list, 0, 3000)
	e, err := imalog.NewViolation(10, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: "/a\nb c"})
	if err != nil {
		t.Fatal(err)
	}
	v.list.Append(e)
	v.list.Append(e)
	fill(t, v.list, 3000, 10)
	for _, f := range files {
		var want bytes.Buffer
		switch f.kind {
		case kindASCII:
			expected(t, v.list, (*imalog.Entry).AppendASCII, f.bank, &want)
		case kindBinary:
			expected(t, v.list, (*imalog.Entry).AppendBinary, f.bank, &want)
		case kindCount:
			want.WriteString("3013\n")
		case kindViolations:
			want.WriteString("2\n")
		default:
			continue
		}
		for _, size := range []int{7, 4096, 65536, 1 << 20} {
			if size == 7 && f.bank != ima.SHA384 {
				continue // slow, and no other than the rest
			}
			if got := readAll(t, mustOpen(t, w.path(f.name), unix.O_RDONLY), size); !bytes.Equal(got, want.Bytes()) {
				t.Errorf("%s by %d bytes: %d bytes, want %d", f.name, size, len(got), want.Len())
			}
		}
		var st unix.Stat_t
		if err := unix.Stat(w.path(f.name), &st); err != nil || st.Size != int64(want.Len()) {
			t.Errorf("%s: size %d, %v, want that of %d bytes", f.name, st.Size, err, want.Len())
		}
	}
}

// TestListTools: what people use on it.
func TestListTools(t *testing.T) {
	w, v := openActive(t)
	fill(t, v.list, 0, 500)
	w.want(`cd $W/ima; grep -c program ascii_runtime_measurements; wc -l < ascii_runtime_measurements_sha256
		dd if=binary_runtime_measurements bs=1 count=4 2>/dev/null | od -An -tu4 | tr -d ' '; busybox tail -n1 ascii_runtime_measurements | cut -d' ' -f5
		cp ascii_runtime_measurements /proc/self/fd/1 | wc -l; tail -n2 ascii_runtime_measurements | wc -l; [ -r policy ] && [ -w policy ] && echo may
		cmp ascii_runtime_measurements ascii_runtime_measurements_sha1 && ! cmp -s ascii_runtime_measurements ascii_runtime_measurements_sha256 && echo banks`,
		"500\n501\n10\n/usr/bin/program-499\n501\n2\nmay\nbanks\n")
	evmctl := need.Program(t, "evmctl")
	// Not all digests of a list can be compared, for want of a TPM: it is the parse that counts.
	out, err := w.shell(evmctl + ` ima_measurement --ignore-violations --pcrs sha256,/dev/null $W/ima/binary_runtime_measurements; true`)
	if err != nil || strings.Contains(out, "nable to") {
		t.Errorf("evmctl: %v\n%s", err, out)
	}
}

// TestListOffsets: reads at any offset, in any order, are parts of the same whole.
func TestListOffsets(t *testing.T) {
	w, v := openActive(t)
	fill(t, v.list, 0, 5000)
	var want bytes.Buffer
	expected(t, v.list, (*imalog.Entry).AppendASCII, ima.SHA256, &want)
	fd := mustOpen(t, w.path("ascii_runtime_measurements_sha256"), unix.O_RDONLY)
	random := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		off, b := random.IntN(want.Len()), make([]byte, 1+random.IntN(20000))
		n, err := unix.Pread(fd, b, int64(off))
		if err != nil || !bytes.Equal(b[:n], want.Bytes()[off:min(off+len(b), want.Len())]) {
			t.Fatalf("%d bytes at %d: %d, %v", len(b), off, n, err)
		}
	}
	if n, err := unix.Pread(fd, make([]byte, 10), int64(want.Len())+1000); n != 0 || err != nil {
		t.Errorf("behind the end: %d, %v", n, err)
	}
}

// TestListGrows: a reader gets the list as it was at open, then, reading on at the end, what came since; a new reader all; one
// that goes back to the start all as well.
func TestListGrows(t *testing.T) {
	w, v := openActive(t)
	fill(t, v.list, 0, 10)
	fd := mustOpen(t, w.path("ascii_runtime_measurements"), unix.O_RDONLY)
	fill(t, v.list, 10, 10)
	lines := func() int { return bytes.Count(readAll(t, fd, 1000), []byte("\n")) }
	if n := lines(); n != 11 {
		t.Errorf("%d lines, want those at open, 11", n)
	}
	if n := lines(); n != 10 {
		t.Errorf("%d lines behind the end, want 10", n)
	}
	if n := lines(); n != 0 {
		t.Errorf("%d lines where nothing is new", n)
	}
	fill(t, v.list, 20, 5)
	if n := lines(); n != 5 {
		t.Errorf("%d lines, want 5", n)
	}
	fill(t, v.list, 25, 1)
	unix.Seek(fd, 0, io.SeekStart)
	if n := lines(); n != 27 {
		t.Errorf("%d lines from the start, want 27", n)
	}
	count := mustOpen(t, w.path("runtime_measurements_count"), unix.O_RDONLY)
	if b := readAll(t, count, 10); string(b) != "27\n" {
		t.Errorf("count %q", b)
	}
	fill(t, v.list, 26, 1)
	b := make([]byte, 10)
	if n, err := unix.Pread(count, b, 0); err != nil || string(b[:n]) != "28\n" {
		t.Errorf("count, read again: %q, %v", b[:n], err)
	}
}

// TestFollow: tail -f, both kinds.
func TestFollow(t *testing.T) {
	for _, tail := range []string{"tail -s 0.05 -f", "tail -n +1 -s 0.05 -f", "busybox tail -s 1 -f"} {
		t.Run(tail, func(t *testing.T) {
			w, v := openActive(t)
			fill(t, v.list, 0, 3)
			done := make(chan string)
			go func() {
				out, _ := w.shell("timeout 10 " + tail + " $W/ima/ascii_runtime_measurements | grep -m1 program-77")
				done <- out
			}()
			eventually(t, "tail opens", func() bool { return heldForReading(w, v) })
			time.Sleep(100 * time.Millisecond)
			fill(t, v.list, 77, 1)
			time.Sleep(1500 * time.Millisecond)
			fill(t, v.list, 100, 1) // for tail to notice that nobody listens
			if out := <-done; !strings.Contains(out, "program-77") {
				t.Errorf("printed %q", out)
			}
		})
	}
}

func heldForReading(w *window, v *fakeView) bool {
	out, _ := w.shell(`grep -ls 'ino:.*'` + fmt.Sprint(nsNode(v.ns.Inum, 6)) + ` /proc/[0-9]*/fdinfo/*`)
	return out != ""
}

// TestLongListIsStreamed: 200,000 entries are right, and held neither by the reader at work nor by one that stopped in between.
func TestLongListIsStreamed(t *testing.T) {
	w, v := openActive(t)
	const entries = 200_000
	fill(t, v.list, 0, entries)
	want := sha256.New()
	expected(t, v.list, (*imalog.Entry).AppendASCII, ima.SHA512, want)
	at := w.path("ascii_runtime_measurements_sha512")
	stopped := mustOpen(t, at, unix.O_RDONLY)
	io.CopyN(io.Discard, fdReader(stopped), 10<<20)
	base := heap()
	fd, got, most, size := mustOpen(t, at, unix.O_RDONLY), sha256.New(), uint64(0), 0
	start := time.Now()
	for b, i := make([]byte, 128<<10), 0; ; i++ {
		n, err := unix.Read(fd, b)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		got.Write(b[:n])
		size += n
		if i%64 == 0 {
			most = max(most, heap())
		}
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("it reads otherwise than it is")
	}
	if grown := int64(most) - int64(base); grown > 4<<20 {
		t.Errorf("%d bytes of heap for a list of %d", grown, size)
	}
	t.Logf("%d bytes in %v, heap +%d", size, time.Since(start), int64(most)-int64(base))
	start = time.Now()
	last := make([]byte, 4096)
	if n, err := unix.Pread(fd, last, int64(size-100)); err != nil || n != 100 || !bytes.HasSuffix(last[:n], fmt.Appendf(nil, "-%d\n", entries-1)) {
		t.Errorf("the last bytes: %q, %v", last[:n], err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("to the end of a list that was read: %v", d)
	}
}

type fdReader int

func (f fdReader) Read(b []byte) (int, error) { return unix.Read(int(f), b) }

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
