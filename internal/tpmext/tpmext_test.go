package tpmext

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext/tpmtest"
)

func open(t *testing.T, address string) *TPM {
	t.Helper()
	tpm, err := Open(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm.Close() })
	return tpm
}

// digests returns one for each bank, every byte of it b.
func digests(t *testing.T, banks []ima.HashAlgo, b byte) []ima.Digest {
	t.Helper()
	var ds []ima.Digest
	for _, bank := range banks {
		d, err := ima.NewDigest(bank, bytes.Repeat([]byte{b}, bank.Size()))
		if err != nil {
			t.Fatal(err)
		}
		ds = append(ds, d)
	}
	return ds
}

func read(t *testing.T, tpm *TPM, pcr int) map[ima.HashAlgo]ima.Digest {
	t.Helper()
	v, err := tpm.ReadPCR(t.Context(), pcr)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestExtendAllBanks(t *testing.T) {
	tpm := open(t, tpmtest.Start(t).Address())
	banks := tpm.Banks()
	if len(banks) < 2 {
		t.Fatalf("active banks %v, want several", banks)
	}
	want := make(map[ima.HashAlgo][]byte)
	for _, b := range []byte{1, 2} {
		if err := tpm.Extend(t.Context(), 10, digests(t, banks, b)); err != nil {
			t.Fatal(err)
		}
		for _, bank := range banks {
			hash, _ := bank.Hash()
			h := hash.New()
			old := want[bank]
			if old == nil {
				old = make([]byte, bank.Size())
			}
			h.Write(old)
			h.Write(bytes.Repeat([]byte{b}, bank.Size()))
			want[bank] = h.Sum(nil)
		}
	}
	for bank, d := range read(t, tpm, 10) {
		if !bytes.Equal(d.Bytes(), want[bank]) {
			t.Errorf("PCR 10 is %v, want %x", d, want[bank])
		}
		delete(want, bank)
	}
	if len(want) != 0 {
		t.Errorf("banks not read: %v", want)
	}
}

func TestExtendRefusesWrongDigests(t *testing.T) {
	tpm := open(t, tpmtest.Start(t).Address())
	all := digests(t, tpm.Banks(), 1)
	for name, ds := range map[string][]ima.Digest{
		"none": nil, "one missing": all[1:], "one twice": append(all[:len(all)-1:len(all)-1], all[0]),
		"one too many": append(all[:len(all):len(all)], all[0]), "an empty one": append(all[:len(all)-1:len(all)-1], ima.Digest{}),
	} {
		if err := tpm.Extend(t.Context(), 10, ds); err == nil || errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v, want a refusal", name, err)
		}
	}
	for _, pcr := range []int{-1, NumPCRs} {
		if err := tpm.Extend(t.Context(), pcr, all); err == nil {
			t.Errorf("PCR %d was extended", pcr)
		}
		if _, err := tpm.ReadPCR(t.Context(), pcr); err == nil {
			t.Errorf("PCR %d was read", pcr)
		}
	}
	for bank, d := range read(t, tpm, 10) {
		if !d.IsZero() {
			t.Errorf("a refused extend changed bank %v to %v", bank, d)
		}
	}
}

// recorder keeps the commands that pass to a real TPM.
type recorder struct {
	transport.TPMCloser
	sent [][]byte
}

func (r *recorder) Send(b []byte) ([]byte, error) {
	r.sent = append(r.sent, bytes.Clone(b))
	return r.TPMCloser.Send(b)
}

func TestExtendCommandIsGoTPMs(t *testing.T) {
	swtpm := tpmtest.Start(t)
	conn, err := dialUnix(t.Context(), swtpm.Socket)
	if err != nil {
		t.Fatal(err)
	}
	rec := &recorder{TPMCloser: conn}
	tpm, err := OpenDialer(t.Context(), "recorded", func(context.Context) (transport.TPMCloser, error) { return rec, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	ds := digests(t, tpm.Banks(), 7)
	rec.sent = nil
	if err := tpm.Extend(t.Context(), 11, ds); err != nil {
		t.Fatal(err)
	}
	theirs := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(11), Auth: tpm2.PasswordAuth(nil)}}
	for _, d := range ds {
		hash, _ := tpmAlgo(d.Algo())
		theirs.Digests.Digests = append(theirs.Digests.Digests, tpm2.TPMTHA{HashAlg: hash, Digest: d.Bytes()})
	}
	if _, err := theirs.Execute(tpm); err != nil {
		t.Fatal(err)
	}
	if len(rec.sent) != 2 || !bytes.Equal(rec.sent[0], rec.sent[1]) {
		t.Errorf("sent %x", rec.sent)
	}
}

// TestOtherTool compares with tpm2-tools, which has its own marshalling.
func TestOtherTool(t *testing.T) {
	swtpm := tpmtest.Start(t)
	tpm := open(t, swtpm.Address())
	if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 9)); err != nil {
		t.Fatal(err)
	}
	want := read(t, tpm, 10)
	tpm.Close() // swtpm serves one connection at a time
	cmd := exec.Command("tpm2_pcrread", "-T", "swtpm:path=tpm", "sha1:10+sha256:10")
	cmd.Dir = swtpm.Dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, bank := range []ima.HashAlgo{ima.SHA1, ima.SHA256} {
		if hex := fmt.Sprintf("%X", want[bank].Bytes()); !strings.Contains(string(out), "0x"+hex) {
			t.Errorf("tpm2_pcrread has no %s:\n%s", hex, out)
		}
	}
}

func TestBootAggregate(t *testing.T) {
	tpm := open(t, tpmtest.Start(t).Address())
	for pcr := range 11 {
		if err := tpm.Extend(t.Context(), pcr, digests(t, tpm.Banks(), byte(pcr+1))); err != nil {
			t.Fatal(err)
		}
	}
	h1, h256 := sha1.New(), sha256.New()
	for pcr := range 10 {
		v := read(t, tpm, pcr)
		if pcr < 8 {
			h1.Write(v[ima.SHA1].Bytes())
		}
		h256.Write(v[ima.SHA256].Bytes())
	}
	for _, c := range []struct {
		ask, bank ima.HashAlgo
		want      []byte
	}{
		{ima.SHA1, ima.SHA1, h1.Sum(nil)}, {ima.SHA256, ima.SHA256, h256.Sum(nil)},
		{ima.MD5, ima.SHA256, h256.Sum(nil)}, // no such bank
	} {
		d, err := tpm.BootAggregate(t.Context(), c.ask)
		if err != nil || d.Algo() != c.bank || !bytes.Equal(d.Bytes(), c.want) {
			t.Errorf("boot aggregate for %v: %v, %v; want %v:%x", c.ask, d, err, c.bank, c.want)
		}
	}
	tpm.banks = []ima.HashAlgo{ima.SHA384}
	if d, err := tpm.BootAggregate(t.Context(), ima.MD5); err != nil || d != ima.ZeroDigest(ima.MD5) {
		t.Errorf("without a suitable bank: %v, %v; want zero", d, err)
	}
}

// TestReadManyPCRs needs several commands: a TPM gives at most 8 digests at once.
func TestReadManyPCRs(t *testing.T) {
	tpm := open(t, tpmtest.Start(t).Address())
	var pcrs []int
	for pcr := range 16 {
		pcrs = append(pcrs, pcr)
		if err := tpm.Extend(t.Context(), pcr, digests(t, tpm.Banks(), byte(pcr))); err != nil {
			t.Fatal(err)
		}
	}
	got, err := tpm.ReadPCRs(t.Context(), pcrs...)
	if err != nil || len(got) != len(pcrs) {
		t.Fatalf("%d PCRs, %v", len(got), err)
	}
	for pcr, values := range got {
		for bank, d := range read(t, tpm, pcr) {
			if values[bank] != d {
				t.Errorf("PCR %d: %v, alone %v", pcr, values[bank], d)
			}
		}
	}
}

// meddler extends PCR 10 of the real TPM before each PCR read but the first times, as another program would.
type meddler struct {
	transport.TPMCloser
	command []byte
	times   int
}

func (m *meddler) Send(b []byte) ([]byte, error) {
	if cc := tpm2.TPMCC(binary.BigEndian.Uint32(b[6:])); cc == tpm2.TPMCCPCRRead && m.times > 0 {
		m.times--
		if _, err := m.TPMCloser.Send(m.command); err != nil {
			return nil, err
		}
	}
	return m.TPMCloser.Send(b)
}

func TestReadRejectsMovedCounter(t *testing.T) {
	for _, c := range []struct {
		times  int
		stable bool
	}{{5, true}, {1000, false}} {
		swtpm := tpmtest.Start(t)
		m := &meddler{times: 0}
		tpm, err := OpenDialer(t.Context(), "meddled", func(ctx context.Context) (transport.TPMCloser, error) {
			conn, err := dialUnix(ctx, swtpm.Socket)
			m.TPMCloser = conn
			return m, err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer tpm.Close()
		m.command = appendExtend(nil, 10, digests(t, tpm.Banks(), 1))
		m.times = c.times
		got, err := tpm.ReadPCRs(t.Context(), 0, 1, 2, 3, 10)
		if c.stable {
			m.times = 0
			if err != nil || got[10][ima.SHA256] != read(t, tpm, 10)[ima.SHA256] {
				t.Errorf("read %v, %v; want the value after the last extend", got[10], err)
			}
		} else if !errors.Is(err, ErrUnstable) {
			t.Errorf("always overtaken: %v, want ErrUnstable", err)
		}
	}
}

// refuser answers some commands with a response code instead of passing them to the real TPM.
type refuser struct {
	transport.TPMCloser
	tag   uint16 // of the responses
	code  tpm2.TPMRC
	times int
}

func (r *refuser) Send(b []byte) ([]byte, error) {
	if r.times == 0 {
		return r.TPMCloser.Send(b)
	}
	r.times--
	response := binary.BigEndian.AppendUint16(nil, r.tag)
	response = binary.BigEndian.AppendUint32(response, headerSize)
	return binary.BigEndian.AppendUint32(response, uint32(r.code)), nil
}

func openRefuser(t *testing.T) (*TPM, *refuser) {
	t.Helper()
	swtpm := tpmtest.Start(t)
	r := &refuser{tag: uint16(tpm2.TPMSTNoSessions)}
	tpm, err := OpenDialer(t.Context(), "refusing", func(ctx context.Context) (transport.TPMCloser, error) {
		conn, err := dialUnix(ctx, swtpm.Socket)
		r.TPMCloser = conn
		return r, err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm.Close() })
	return tpm, r
}

func TestRetry(t *testing.T) {
	for _, code := range []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting} {
		tpm, r := openRefuser(t)
		r.code, r.times = code, 4
		if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); err != nil {
			t.Errorf("%v: %v", code, err)
		}
		once := sha256.Sum256(append(make([]byte, 32), bytes.Repeat([]byte{1}, 32)...))
		if got := read(t, tpm, 10)[ima.SHA256]; !bytes.Equal(got.Bytes(), once[:]) {
			t.Errorf("%v: PCR 10 is %v, want one extend", code, got)
		}

		r.times = 1000
		tpm.pauses.total = 10 * time.Millisecond
		if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); !errors.Is(err, code) || errors.Is(err, ErrUnavailable) {
			t.Errorf("always %v: %v", code, err)
		}

		tpm.pauses = pauses{first: time.Minute, longest: time.Minute, total: time.Hour}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if err := tpm.Extend(ctx, 10, digests(t, tpm.Banks(), 1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("given up while %v: %v", code, err)
		}
		cancel()
		r.times = 0
		read(t, tpm, 10) // the connection is still good
	}
}

func TestFailureMode(t *testing.T) {
	tpm, r := openRefuser(t)
	r.code, r.times = tpm2.TPMRCFailure, 1000
	_, err := tpm.ReadPCR(t.Context(), 10)
	if !errors.Is(err, ErrFailureMode) || !strings.Contains(err.Error(), "reset of the machine") {
		t.Errorf("ReadPCR: %v", err)
	}
	if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); !errors.Is(err, ErrFailureMode) {
		t.Errorf("Extend: %v", err)
	}
}

func TestNotStarted(t *testing.T) {
	swtpm := tpmtest.StartFlags(t, "not-need-init")
	if _, err := Open(t.Context(), swtpm.Address()); !errors.Is(err, ErrNotStarted) || !strings.Contains(err.Error(), "startup-clear") {
		t.Errorf("%v, want ErrNotStarted and what to do", err)
	}
}

func TestDeadTPM(t *testing.T) {
	swtpm := tpmtest.Start(t)
	tpm := open(t, swtpm.Address())
	banks := tpm.Banks()
	before, err := tpm.Resets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	swtpm.Kill()
	for range 2 {
		if err := tpm.Extend(t.Context(), 10, digests(t, banks, 1)); !errors.Is(err, ErrUnavailable) {
			t.Errorf("Extend: %v, want ErrUnavailable", err)
		}
	}
	if err := tpm.Reopen(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Reopen: %v, want ErrUnavailable", err)
	}
	swtpm.Run("not-need-init,startup-clear")
	if err := tpm.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := tpm.Extend(t.Context(), 10, digests(t, banks, 1)); err != nil {
		t.Error(err)
	}
	after, err := tpm.Resets(t.Context())
	if err != nil || after == before {
		t.Errorf("resets %+v then %+v, %v: the reset does not show", before, after, err)
	}
	if err := tpm.Close(); err != nil {
		t.Error(err)
	}
	if err := tpm.Reopen(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Reopen after Close: %v", err)
	}
}

func TestReopenKeepsPCRs(t *testing.T) {
	tpm := open(t, tpmtest.Start(t).Address())
	if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); err != nil {
		t.Fatal(err)
	}
	want := read(t, tpm, 10)[ima.SHA256]
	if err := tpm.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := read(t, tpm, 10)[ima.SHA256]; got != want {
		t.Errorf("PCR 10 is %v after Reopen, was %v", got, want)
	}
}

func TestLongSocketPath(t *testing.T) {
	swtpm := tpmtest.Start(t)
	open(t, "unix:"+swtpm.Dir+strings.Repeat("/.", 60)+"/tpm") // over the 107 bytes of a socket address
}

func TestTCP(t *testing.T) {
	swtpm := tpmtest.Start(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go relay(l, swtpm.Socket)
	tpm := open(t, "tcp:"+l.Addr().String())
	if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); err != nil {
		t.Error(err)
	}
}

// relay passes one connection on, in both directions one byte at a time from the TPM, so that responses come in pieces.
func relay(l net.Listener, socket string) {
	c, err := l.Accept()
	if err != nil {
		return
	}
	defer c.Close()
	s, err := net.Dial("unix", socket)
	if err != nil {
		return
	}
	defer s.Close()
	go func() {
		b := make([]byte, 1)
		for {
			if _, err := s.Read(b); err != nil {
				return
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	b := make([]byte, maxResponse)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if _, err := s.Write(b[:n]); err != nil {
			return
		}
	}
}

// TestSilentTPM: a listener that never answers, as swtpm while it serves another connection.
func TestSilentTPM(t *testing.T) {
	swtpm := tpmtest.Start(t)
	open(t, swtpm.Address())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := Open(ctx, swtpm.Address())
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "one at a time") {
		t.Errorf("%v", err)
	}
}

func TestCancelledExtendIsUnavailable(t *testing.T) {
	swtpm := tpmtest.Start(t)
	first := open(t, swtpm.Address())
	banks := first.Banks()
	first.mu.Lock()
	first.conn = &stuck{TPMCloser: first.conn, block: make(chan struct{})}
	first.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := first.Extend(ctx, 10, digests(t, banks, 1))
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want ErrUnavailable and the context's error", err)
	}
	if err := first.Extend(ctx, 10, digests(t, banks, 1)); errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want the context's error alone: nothing was sent", err)
	}
}

// stuck does not return from Send before Close.
type stuck struct {
	transport.TPMCloser
	block chan struct{}
}

func (s *stuck) Send([]byte) ([]byte, error) {
	<-s.block
	return nil, net.ErrClosed
}

func (s *stuck) Close() error {
	close(s.block)
	return s.TPMCloser.Close()
}

func TestAddresses(t *testing.T) {
	for _, bad := range []string{"", "tpm0", "unix:", "tcp:", "tcp:host", "http://x"} {
		if _, err := Open(t.Context(), bad); err == nil || errors.Is(err, ErrUnavailable) {
			t.Errorf("Open(%q): %v, want what an address looks like", bad, err)
		}
	}
	for _, absent := range []string{"/dev/tpm-that-is-not-there", "unix:/nowhere", "tcp:127.0.0.1:1"} {
		if _, err := Open(t.Context(), absent); !errors.Is(err, ErrUnavailable) {
			t.Errorf("Open(%q): %v, want ErrUnavailable", absent, err)
		}
	}
}

func TestNoDevice(t *testing.T) {
	// A character device that takes a command and gives no response.
	if _, err := Open(t.Context(), "/dev/null"); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "no whole response") {
		t.Errorf("/dev/null as TPM: %v", err)
	}
}

func BenchmarkExtend(b *testing.B) {
	tpm, err := Open(b.Context(), tpmtest.Start(b).Address())
	if err != nil {
		b.Fatal(err)
	}
	defer tpm.Close()
	var ds []ima.Digest
	for _, bank := range tpm.Banks() {
		ds = append(ds, ima.ZeroDigest(bank))
	}
	b.Run("tpmext", func(b *testing.B) {
		for b.Loop() {
			if err := tpm.Extend(b.Context(), 10, ds); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-tpm", func(b *testing.B) {
		cmd := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(10), Auth: tpm2.PasswordAuth(nil)}}
		for _, d := range ds {
			hash, _ := tpmAlgo(d.Algo())
			cmd.Digests.Digests = append(cmd.Digests.Digests, tpm2.TPMTHA{HashAlg: hash, Digest: d.Bytes()})
		}
		for b.Loop() {
			if _, err := cmd.Execute(tpm); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// What is computed of a TPM that has just been started is what it says.
func TestStartedBootAggregate(t *testing.T) {
	tpm := open(t, tpmtest.Start(t).Address())
	for _, algo := range []ima.HashAlgo{ima.MD5, ima.SHA1, ima.SHA224, ima.SHA256, ima.SHA384, ima.SHA512} {
		d, err := tpm.BootAggregate(t.Context(), algo)
		if want := StartedBootAggregate(tpm.Banks(), algo); err != nil || d != want {
			t.Errorf("%v: the TPM says %v, %v, want %v", algo, d, err, want)
		}
	}
	if d := StartedBootAggregate(nil, ima.SHA512); d != ima.ZeroDigest(ima.SHA512) {
		t.Errorf("without banks %v", d)
	}
}
