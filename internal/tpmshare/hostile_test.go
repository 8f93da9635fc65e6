package tpmshare

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// rawCommand makes a command of bytes; its size field is right.
func rawCommand(tag tpm2.TPMST, code tpm2.TPMCC, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(tag))
	b = binary.BigEndian.AppendUint32(b, uint32(headerSize+len(body)))
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return append(b, body...)
}

// withPassword is a command with handles, each authorized by the empty password.
func withPassword(code tpm2.TPMCC, handles []tpm2.TPMHandle, params ...byte) []byte {
	var body []byte
	for _, h := range handles {
		body = append(body, handleBytes(h)...)
	}
	body = append(body, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0)
	return rawCommand(tpm2.TPMSTSessions, code, append(body, params...)...)
}

var getRandom = rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCGetRandom, 0, 8)

// exchange sends bytes and returns the response's code.
func exchange(t testing.TB, conn net.Conn, command []byte) tpm2.TPMRC {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(command); err != nil {
		t.Fatal(err)
	}
	response, err := readResponse(conn)
	if err != nil {
		t.Fatal(err)
	}
	return responseCode(response)
}

// Clients that send everything that would break the log: the PCR replays, and the TPM goes on.
func TestHostileClients(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	s := start(t, tpm)
	var r replay
	r.extend(t, agent)
	conn := s.dial(commandAddress)
	sha256 := append([]byte{0, 0, 0, 1, 0, 0x0b}, bytes.Repeat([]byte{1}, 32)...) // TPML_DIGEST_VALUES
	for name, c := range map[string]struct {
		command []byte
		want    tpm2.TPMRC
	}{
		"extend":   {withPassword(tpm2.TPMCCPCRExtend, []tpm2.TPMHandle{10}, sha256...), tpm2.TPMRCLocality},
		"event":    {withPassword(tpm2.TPMCCPCREvent, []tpm2.TPMHandle{10}, 0, 1, 1), tpm2.TPMRCLocality},
		"reset":    {withPassword(tpm2.TPMCCPCRReset, []tpm2.TPMHandle{10}), tpm2.TPMRCLocality},
		"clear":    {withPassword(tpm2.TPMCCClear, []tpm2.TPMHandle{tpm2.TPMRHLockout}), tpm2.TPMRCCommandCode},
		"startup":  {rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCStartup, 0, 0), tpm2.TPMRCCommandCode},
		"shutdown": {rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCShutdown, 0, 0), tpm2.TPMRCCommandCode},
		"platform": {withPassword(tpm2.TPMCCHierarchyChanegAuth, []tpm2.TPMHandle{tpm2.TPMRHPlatform}, 0, 0),
			atHandle(tpm2.TPMRCHierarchy, 0)},
		"a vendor's": {rawCommand(tpm2.TPMSTNoSessions, 1<<29|1), tpm2.TPMRCCommandCode},
		"unknown":    {rawCommand(tpm2.TPMSTNoSessions, 0x1ff), tpm2.TPMRCCommandCode},
	} {
		if rc := exchange(t, conn, c.command); rc != c.want {
			t.Errorf("%s: %#x, want %#x", name, uint32(rc), uint32(c.want))
		}
	}
	for code, c := range commands { // whatever they hold
		if c.refused == "" {
			continue
		}
		handles := []tpm2.TPMHandle{tpm2.TPMRHOwner, tpm2.TPMRHOwner, tpm2.TPMRHOwner}
		if rc := exchange(t, conn, withPassword(code, handles[:c.handles], 0, 0)); rc != tpm2.TPMRCCommandCode {
			t.Errorf("TPM2_%s: %#x", c.name, uint32(rc))
		}
	}
	dir := t.TempDir()
	for _, args := range [][]string{
		{"tpm2_pcrreset", "10"}, {"tpm2_pcrextend", "10:sha256=" + string(bytes.Repeat([]byte("01"), 32))},
		{"tpm2_clear"}, {"tpm2_shutdown"}, {"tpm2_startup", "-c"}, {"tpm2_dictionarylockout", "-c"},
		{"tpm2_createprimary", "-C", "p"}, {"tpm2_changeauth", "-c", "e", "new"}, {"tpm2_pcrallocate", "sha1:none"},
	} {
		if out, err := s.tool(dir, args[0], args[1:]...); err == nil {
			t.Errorf("%v was allowed: %s", args, out)
		}
	}
	r.extend(t, agent)
	r.check(t, agent)
}

// Commands that are no commands. Where it is known how long one is the connection goes on; else it ends behind the answer.
func TestBadCommands(t *testing.T) {
	tpm, _ := openTPM(t)
	s := start(t, tpm)
	good := s.dial(commandAddress)
	lying := bytes.Clone(getRandom)
	binary.BigEndian.PutUint32(lying[2:], 11) // one byte less than there is
	for name, c := range map[string]struct {
		command []byte
		want    tpm2.TPMRC
		ends    bool
	}{
		"a bad tag":           {rawCommand(0x00C1, tpm2.TPMCCGetRandom, 0, 8), badTag, true},
		"a size of 9":         {[]byte{0x80, 1, 0, 0, 0, 9, 0, 0, 1, 0x7b}, tpm2.TPMRCCommandSize, true},
		"a size of 4 GiB":     {[]byte{0x80, 1, 255, 255, 255, 255, 0, 0, 1, 0x7b}, tpm2.TPMRCCommandSize, true},
		"one byte too many":   {rawCommand(0x8001, tpm2.TPMCCGetRandom, make([]byte, maxCommand-headerSize+1)...), tpm2.TPMRCCommandSize, true},
		"the longest":         {rawCommand(0x8001, tpm2.TPMCCGetRandom, make([]byte, maxCommand-headerSize)...), tpm2.TPMRCSize, false},
		"no parameters":       {rawCommand(0x8001, tpm2.TPMCCGetRandom), tpm2.TPMRCInsufficient, false},
		"no handle":           {rawCommand(0x8001, tpm2.TPMCCReadPublic, 0x80), tpm2.TPMRCInsufficient, false},
		"no authorization":    {rawCommand(0x8002, tpm2.TPMCCGetRandom, 0, 0), tpm2.TPMRCAuthSize, false},
		"short authorization": {rawCommand(0x8002, tpm2.TPMCCGetRandom, 0, 0, 0, 200, 1), tpm2.TPMRCAuthSize, false},
		"flush of nothing":    {rawCommand(0x8001, tpm2.TPMCCFlushContext, 1), tpm2.TPMRCCommandSize, false},
		"flush of a PCR":      {rawCommand(0x8001, tpm2.TPMCCFlushContext, 0, 0, 0, 10), tpm2.TPMRCHandle, false},
		"load of nothing":     {rawCommand(0x8001, tpm2.TPMCCContextLoad), tpm2.TPMRCInsufficient, false},
	} {
		conn := s.dial(commandAddress)
		if rc := exchange(t, conn, c.command); !errors.Is(rc, c.want) && rc != c.want {
			t.Errorf("%s: %#x, want %#x", name, uint32(rc), uint32(c.want))
		}
		if c.ends {
			if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: the connection goes on: %d, %v", name, n, err)
			}
		} else if rc := exchange(t, conn, getRandom); rc != tpm2.TPMRCSuccess {
			t.Errorf("after %s: %#x", name, uint32(rc))
		}
		conn.Close()
	}
	conn := s.dial(commandAddress)
	if rc := exchange(t, conn, lying); rc == tpm2.TPMRCSuccess {
		t.Error("a command whose size field lies was carried out")
	}
	if rc := exchange(t, good, getRandom); rc != tpm2.TPMRCSuccess {
		t.Errorf("another connection: %#x", uint32(rc))
	}
}

// Clients that send half a command, never read, or only connect, in all places that there are: the agent goes on, the next is sent
// away, and when their time is over the places are free again.
func TestPlacesAreBounded(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	s := startTimed(t, tpm, times{idle: time.Minute, command: 500 * time.Millisecond, answer: 500 * time.Millisecond})
	var slow []net.Conn
	for i := range maxConnections {
		conn := s.dial(commandAddress)
		slow = append(slow, conn)
		if i%2 == 0 {
			conn.Write(getRandom[:5])
		}
	}
	next := s.dial(commandAddress)
	response, err := readResponse(next)
	if err != nil || responseCode(response) != tpm2.TPMRCRetry {
		t.Errorf("one connection too many: %x, %v", response, err)
	}
	var r replay
	for range 50 {
		r.extend(t, agent)
	}
	r.check(t, agent)
	for _, conn := range slow {
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("a slow client's connection: %v, want its end", err)
		}
	}
	if rc := exchange(t, s.dial(commandAddress), getRandom); rc != tpm2.TPMRCSuccess {
		t.Errorf("a connection afterwards: %#x", uint32(rc))
	}
}

func TestClientThatNeverReads(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	s := startTimed(t, tpm, times{idle: time.Minute, command: time.Minute, answer: 300 * time.Millisecond})
	deaf := s.dial(commandAddress)
	deaf.(*net.TCPConn).SetReadBuffer(1)
	ended := make(chan error, 1)
	go func() {
		capability := rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCGetCapability, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 200) // 0.5 KiB of answer
		for {
			if _, err := deaf.Write(bytes.Repeat(capability, 100)); err != nil {
				ended <- err
				return
			}
		}
	}()
	var r replay
	other := s.dial(commandAddress)
	for range 20 {
		r.extend(t, agent)
		if rc := exchange(t, other, getRandom); rc != tpm2.TPMRCSuccess {
			t.Fatalf("another connection: %#x", uint32(rc))
		}
	}
	r.check(t, agent)
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Error("the connection goes on")
	}
}

// One process has a share of the places only.
func TestConnectionsOfOneClient(t *testing.T) {
	tpm, _ := openTPM(t)
	s := start(t, tpm)
	if out, err := s.process("connect").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
