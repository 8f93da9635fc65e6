package tpmshare

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/need"
)

// clientVerb tells a test program that was started as a client what to do.
const clientVerb = "IMANS_TEST_TPM_CLIENT"

// dialled sends commands on a kept connection, or each on a connection of its own as the TCG software stack's swtpm interface does. It
// implements transport.TPM.
type dialled struct {
	kept net.Conn
}

func (d dialled) Send(command []byte) ([]byte, error) {
	conn := d.kept
	if conn == nil {
		var err error
		if conn, err = net.Dial("tcp4", commandAddress); err != nil {
			return nil, err
		}
		defer conn.Close()
	}
	if _, err := conn.Write(command); err != nil {
		return nil, err
	}
	return readResponse(conn)
}

func readResponse(r io.Reader) ([]byte, error) {
	b := make([]byte, headerSize, maxCommand)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(b[2:])
	if size < headerSize || size > maxCommand {
		return nil, fmt.Errorf("a response of %d bytes", size)
	}
	b = b[:size]
	_, err := io.ReadFull(r, b[headerSize:])
	return b, err
}

// TestClientProcess is a client in a process of its own, started by process.
func TestClientProcess(t *testing.T) {
	verb, rest, _ := strings.Cut(os.Getenv(clientVerb), " ")
	c := &testClient{dialled{}, t}
	switch verb {
	case "":
	case "many":
		conn, err := net.Dial("tcp4", commandAddress)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		(&testClient{dialled{conn}, t}).useMany()
	case "hold": // what it has outlives its connections, while it lives
		k, s := c.primary(), c.session()
		if err := c.sign(c.signingKey(k), s); err != nil {
			t.Fatal(err)
		}
		fmt.Printf("holds %d %d\n", k.Handle, s.Handle())
		io.Copy(io.Discard, os.Stdin)
		if err := c.sign(c.signingKey(k), s); err != nil {
			t.Fatal(err)
		}
	case "steal":
		var object, session tpm2.TPMHandle
		if _, err := fmt.Sscan(rest, &object, &session); err != nil {
			t.Fatal(err)
		}
		_, err := tpm2.ReadPublic{ObjectHandle: object}.Execute(c)
		wantRC(t, "another process's object", err, tpm2.TPMRCReferenceH0)
		_, err = tpm2.FlushContext{FlushHandle: session}.Execute(c)
		wantRC(t, "another process's session", err, tpm2.TPMRCHandle)
		_, err = tpm2.ContextSave{SaveHandle: session}.Execute(c)
		wantRC(t, "another process's session", err, tpm2.TPMRCReferenceH0)
		if h := append(c.handles(firstTransient), c.handles(firstLoadedSession)...); len(h) != 0 {
			t.Errorf("sees %#x", h)
		}
	case "connect":
		for i := range maxOwnConnections + 1 {
			want := tpm2.TPMRCSuccess
			if i == maxOwnConnections {
				want = tpm2.TPMRCRetry
			}
			conn, err := net.Dial("tcp4", commandAddress)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if rc := exchange(t, conn, getRandom); rc != want {
				t.Errorf("connection %d: %#x, want %#x", i, uint32(rc), uint32(want))
			}
		}
	default:
		t.Fatalf("verb %q", verb)
	}
}

// process is the test program as a client in the namespace.
func (s *share) process(verb string) *exec.Cmd {
	cmd := s.command(s.t.TempDir(), os.Args[0], "-test.run=^TestClientProcess$", "-test.v")
	cmd.Env = append(cmd.Env, clientVerb+"="+verb)
	return cmd
}

func TestProcessesAreClients(t *testing.T) {
	tpm, _ := openTPM(t)
	s := start(t, tpm)
	holder := s.process("hold")
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	object, session, lines := "", "", bufio.NewScanner(stdout)
	for session == "" && lines.Scan() {
		fmt.Sscanf(lines.Text(), "holds %s %s", &object, &session)
	}
	if session == "" {
		t.Fatal("the holder holds nothing")
	}
	if out, err := s.process("steal " + object + " " + session).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	stdin.Close() // it goes on with what it has
	rest, _ := io.ReadAll(stdout)
	if err := holder.Wait(); err != nil {
		t.Errorf("%v: %s", err, rest)
	}
	waitClean(t, tpm)
}

// A process that is killed leaves nothing in the TPM.
func TestKilledProcess(t *testing.T) {
	tpm, _ := openTPM(t)
	s := start(t, tpm)
	holder := s.process("hold")
	if _, err := holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(stdout); lines.Scan() && !strings.HasPrefix(lines.Text(), "holds "); {
	}
	if left := leftovers(t, tpm); len(left) != 1 {
		t.Errorf("in the TPM while it lives: %#x, want its session", left)
	}
	holder.Process.Kill()
	holder.Wait()
	waitClean(t, tpm)
	if clients := s.server.processes(); len(clients) != 0 {
		t.Errorf("%d clients are left", len(clients))
	}
}

// waitClean waits until nothing is in the TPM.
func waitClean(t *testing.T, tpm *TPM) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		left := leftovers(t, tpm)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left in the TPM: %#x", left)
		}
	}
}

// Eight processes at once with six objects and three sessions each, by kept connections, and four that use tpm2-tools; the agent's
// extends go on meanwhile.
func TestManyProcesses(t *testing.T) {
	need.Program(t, "tpm2_createprimary")
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	s := start(t, tpm)
	var running sync.WaitGroup
	for range 8 {
		running.Go(func() {
			if out, err := s.process("many").CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	for range 4 {
		dir := t.TempDir()
		running.Go(func() { s.useTools(dir) })
	}
	ended := make(chan struct{})
	go func() {
		running.Wait()
		close(ended)
	}()
	var r replay
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		r.extend(t, agent)
		select {
		case <-tick.C:
		case <-ended:
			r.check(t, agent)
			waitClean(t, tpm)
			return
		}
	}
}

// useTools makes a key with tpm2-tools and uses it through a session.
func (s *share) useTools(dir string) {
	for _, args := range []string{
		"tpm2_createprimary -Q -G ecc -c p.ctx",
		"tpm2_create -Q -C p.ctx -G ecc -u k.pub -r k.priv",
		"tpm2_load -Q -C p.ctx -u k.pub -r k.priv -c k.ctx",
		"tpm2_startauthsession --hmac-session -S s.ctx",
		"tpm2_sign -Q -c k.ctx -p session:s.ctx -g sha256 -o sig k.pub",
		"tpm2_verifysignature -Q -c k.ctx -g sha256 -s sig -m k.pub",
		"tpm2_flushcontext s.ctx",
	} {
		words := strings.Fields(args)
		if _, err := s.tool(dir, words[0], words[1:]...); err != nil {
			s.t.Error(err)
			return
		}
	}
}
