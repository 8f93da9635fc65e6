package tpmshare

import (
	"bytes"
	"encoding/binary"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
)

// addCommands adds one command of each code, and some that are cut.
func addCommands(f *testing.F) {
	var codes []tpm2.TPMCC
	for code := range commands {
		codes = append(codes, code)
	}
	slices.Sort(codes) // so that the corpus has names that stay
	for _, code := range codes {
		handles := []tpm2.TPMHandle{firstTransient, firstLoadedSession, 10}[:commands[code].handles]
		command := withPassword(code, handles, 0, 0, 0, 1)
		f.Add(command)
		f.Add(command[:len(command)-6])
	}
	f.Add(getRandom)
	f.Add(getRandom[:9])
}

// FuzzParseRequest: any bytes are taken apart without panic; what is taken apart lies within the command, and lies as Part 1 says.
func FuzzParseRequest(f *testing.F) {
	addCommands(f)
	f.Fuzz(func(t *testing.T, command []byte) {
		q, rc := parseRequest(bytes.Clone(command))
		if rc != tpm2.TPMRCSuccess {
			if response := answer(rc); len(response) != headerSize || responseCode(response) != rc {
				t.Fatalf("refused by %x", response)
			}
			return
		}
		if binary.BigEndian.Uint32(command[2:]) != uint32(len(command)) || len(command) > maxCommand || len(q.session) > maxSessions {
			t.Fatalf("%d bytes, %d sessions", len(command), len(q.session))
		}
		area := len(command) - len(q.params) - headerSize - 4*q.handles
		if !q.tagged && (area != 0 || len(q.session) != 0) || q.tagged && (len(q.session) == 0 || area < 4+minAuthorization) {
			t.Fatalf("an authorization area of %d bytes with sessions %#x", area, q.session)
		}
		if !bytes.HasSuffix(command, q.params) {
			t.Fatalf("parameters %x", q.params)
		}
		for i := range q.handles {
			if binary.BigEndian.Uint32(command[headerSize+4*i:]) != uint32(q.handle[i]) {
				t.Fatalf("handle %d is %#x", i, uint32(q.handle[i]))
			}
			q.setHandle(i, q.handle[i])
		}
		if !bytes.Equal(q.raw, command) {
			t.Fatalf("changed to %x", q.raw)
		}
		rules{measured, protected}.refuse(q)
	})
}

// stream is a connection from which bytes come, and then nothing.
type stream struct {
	net.Conn
	*bytes.Reader
}

func (s stream) Read(b []byte) (int, error)      { return s.Reader.Read(b) }
func (s stream) SetReadDeadline(time.Time) error { return nil }

// FuzzReadCommand: of what a client sends each command is read as it says where it ends, and no more of it.
func FuzzReadCommand(f *testing.F) {
	f.Add(slices.Concat(getRandom, getRandom))
	f.Add(getRandom[:9])
	f.Add([]byte{0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, sent []byte) {
		r := bytes.NewReader(sent)
		c := &connection{Conn: stream{Reader: r}, server: &Server{}}
		for {
			left := sent[len(sent)-r.Len():]
			raw, rc := c.readCommand(0)
			if raw == nil {
				if rc != tpm2.TPMRCSuccess && len(left)-r.Len() != headerSize {
					t.Fatalf("refused by %#x after %d bytes", uint32(rc), len(left)-r.Len())
				}
				return
			}
			if rc != tpm2.TPMRCSuccess || len(raw) > maxCommand || len(left)-r.Len() != len(raw) || !bytes.HasPrefix(left, raw) {
				t.Fatalf("%x with %#x, of %x", raw, uint32(rc), left)
			}
		}
	})
}

// FuzzDiag: of the kernel's answers only one to the question tells a socket, the one that was asked for.
func FuzzDiag(f *testing.F) {
	id := []byte{0x09, 0x11, 0xc0, 0x01, 127, 0, 0, 1}
	answer := make([]byte, diagMessage)
	binary.NativeEndian.PutUint16(answer[4:], sockDiagFamily)
	binary.NativeEndian.PutUint32(answer[8:], 7)
	copy(answer[diagMessageID:], id)
	answer[diagInode] = 9
	f.Add(answer, uint32(7), id)
	f.Add(answer[:diagMessage-1], uint32(7), id)
	refused := make([]byte, netlinkHeader+20)
	binary.NativeEndian.PutUint16(refused[4:], unix.NLMSG_ERROR)
	binary.NativeEndian.PutUint32(refused[netlinkHeader:], ^uint32(unix.ENOENT)+1)
	f.Add(refused, uint32(0), id)
	f.Fuzz(func(t *testing.T, answer []byte, seq uint32, id []byte) {
		id = id[:min(len(id), diagID)]
		inode, answers, err := parseDiag(answer, seq, id)
		if inode != 0 && (!answers || err != nil || !bytes.Contains(answer, id) || !bytes.Contains(answer, binary.NativeEndian.AppendUint32(nil, seq))) {
			t.Fatalf("inode %d, %v, %v of %x", inode, answers, err, answer)
		}
	})
}

// FuzzControl: any bytes are answered, or read to their end.
func FuzzControl(f *testing.F) {
	for code := range byte(20) {
		f.Add([]byte{0, 0, 0, code, 0, 0, 0, 0})
	}
	f.Fuzz(func(t *testing.T, commands []byte) {
		r := bytes.NewReader(commands)
		for r.Len() >= 4 {
			var code [4]byte
			r.Read(code[:])
			response, last, err := control(binary.BigEndian.Uint32(code[:]), r)
			if err != nil {
				if r.Len() != 0 {
					t.Fatalf("%v with %d bytes left", err, r.Len())
				}
				return
			}
			if len(response) < 4 || len(response) > 16 {
				t.Fatalf("answer %x", response)
			}
			if refused := binary.BigEndian.Uint32(response) == ctrlBadOrdinal; refused != last {
				t.Fatalf("answer %x, last %v", response, last)
			}
		}
	})
}

// victim has what a hostile client is not to touch.
type victim struct {
	*testClient
	key     key
	session tpm2.Session
	pcr     string
}

// check uses what the victim has, and looks at what the TPM holds.
func (v *victim) check(t *testing.T, tpm *TPM, pcr string) {
	t.Helper()
	if _, err := (tpm2.ReadPublic{ObjectHandle: v.key}).Execute(v, v.session); err != nil {
		t.Fatalf("the victim's key and session: %v", err)
	}
	if pcr != v.pcr {
		t.Fatalf("PCR 10 is %s, was %s", pcr, v.pcr)
	}
	if loaded, err := tpm.handles(firstTransient); err != nil || len(loaded) != 0 {
		t.Fatalf("loaded between two commands: %#x, %v", loaded, err)
	}
	if loaded, err := tpm.handles(firstLoadedSession); err != nil || len(loaded) != 0 {
		t.Fatalf("sessions loaded between two commands: %#x, %v", loaded, err)
	}
	saved, err := tpm.handles(firstSavedSession)
	if err != nil || len(saved) != len(tpm.sessions.all) {
		t.Fatalf("saved sessions %#x, %v; known are %d", saved, err, len(tpm.sessions.all))
	}
	for h, one := range tpm.sessions.all {
		if h != one.handle || !one.given && one.context == nil || !slices.Contains(saved, h) {
			t.Fatalf("session %#x: %+v", uint32(h), one)
		}
	}
}

// FuzzSpace: commands of a hostile client, one behind the other in the input, leave another client's object and session and the
// measured PCR as they were, and nothing loaded; and no response names a handle that is not the client's.
func FuzzSpace(f *testing.F) {
	addCommands(f)
	start := rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCStartAuthSession, append([]byte{0x40, 0, 0, 7, 0x40, 0, 0, 7, 0, 16},
		append(make([]byte, 16), 0, 0, 1, 0, 0x10, 0, 0x0b)...)...)
	sequence := rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCHashSequenceStart, 0, 0, 0, 0x0b)
	save := rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCContextSave, 0x80, 0, 0, 0)
	restart := rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCPolicyRestart, 3, 0, 0, 1)
	flush := rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCFlushContext, 3, 0, 0, 1)
	list := rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCGetCapability, 0, 0, 0, 1, 0x80, 0, 0, 0, 0, 0, 0, 9)
	f.Add(slices.Concat(start, start, restart, flush))
	f.Add(slices.Concat(sequence, sequence, save, list))
	f.Add(slices.Concat(sequence, withPassword(tpm2.TPMCCSequenceComplete, []tpm2.TPMHandle{firstTransient}, 0, 0, 0x40, 0, 0, 7), list))
	f.Add(slices.Concat(start, rawCommand(tpm2.TPMSTNoSessions, tpm2.TPMCCContextSave, 3, 0, 0, 1), flush))

	tpm, _ := openTPM(f)
	agent := openAgent(f, tpm)
	clients := newClients(f, tpm, 1)
	v := victim{testClient: clients[0], pcr: pcr10(f, agent)}
	v.key, v.session = v.primary(), v.testClient.session(tpm2.Audit())
	f.Fuzz(func(t *testing.T, commands []byte) {
		hostile := newClients(t, tpm, 1)[0]
		for n := 0; len(commands) >= headerSize && n < 50; n++ {
			size := min(max(int(binary.BigEndian.Uint32(commands[2:])), headerSize), len(commands))
			response, err := hostile.Send(commands[:size])
			if err != nil {
				t.Fatal(err)
			}
			checkHandle(t, hostile, commands[:size], response)
			commands = commands[size:]
		}
		hostile.end()
		v.testClient.t = t
		v.check(t, tpm, pcr10(t, agent))
	})
}

// checkHandle checks that a response's handle is one that the client has.
func checkHandle(t *testing.T, c *testClient, command, response []byte) {
	q, rc := parseRequest(bytes.Clone(command))
	if rc != tpm2.TPMRCSuccess || !q.creates || responseCode(response) != tpm2.TPMRCSuccess {
		return
	}
	h := tpm2.TPMHandle(binary.BigEndian.Uint32(response[headerSize:]))
	space := c.TPM.(direct).c.space
	if one := space.tpm.sessions.all[h]; space.objects[h] == nil && (one == nil || one.owner != space) {
		t.Fatalf("%s gave %#x", q.name, uint32(h))
	}
}
