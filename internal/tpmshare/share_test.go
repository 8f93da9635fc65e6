package tpmshare

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/vishvananda/netns"
	"go.uber.org/zap/zaptest"

	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/tpmext/tpmtest"
)

// openTPM shares a new swtpm.
func openTPM(t testing.TB) (*TPM, *tpmtest.Swtpm) {
	t.Helper()
	swtpm := tpmtest.Start(t)
	return openAt(t, swtpm.Address()), swtpm
}

func openAt(t testing.TB, address string) *TPM {
	t.Helper()
	dial, err := tpmext.NewDialer(address)
	if err != nil {
		t.Fatal(err)
	}
	tpm, err := Open(t.Context(), dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm.Close() })
	return tpm
}

// openAgent is the agent's way to a shared TPM.
func openAgent(t testing.TB, tpm *TPM) *tpmext.TPM {
	t.Helper()
	agent, err := tpmext.OpenDialer(t.Context(), "shared", tpm.Agent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Close() })
	return agent
}

// newNetns makes a network namespace; its loopback device is down.
func newNetns(t testing.TB) *os.File {
	t.Helper()
	if os.Geteuid() != 0 {
		need.Skip(t, "a network namespace needs root")
	}
	var ns *os.File
	onThread(func() bool {
		home, err := netns.Get()
		if err != nil {
			t.Error(err)
			return true
		}
		defer home.Close()
		made, err := netns.New()
		if err != nil {
			t.Errorf("make a network namespace: %v", err)
			return true
		}
		ns = os.NewFile(uintptr(made), "netns")
		return netns.Set(home) == nil
	})
	if ns == nil {
		t.FailNow()
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// share is a TPM with a container's clients.
type share struct {
	t      testing.TB
	ns     *os.File
	tpm    *TPM
	server *Server
	stop   func() // ends the Server; at the end of the test if not before
}

// measured and protected are what clients of the tests may not touch.
var (
	measured  = []int{10, 11}
	protected = []tpm2.TPMHandle{0x81010001, 0x01C10001}
)

// start shares a TPM with a namespace of its own.
func start(t testing.TB, tpm *TPM) *share {
	t.Helper()
	return startTimed(t, tpm, clientTimes)
}

// startTimed is start with other times for clients.
func startTimed(t testing.TB, tpm *TPM, limits times) *share {
	t.Helper()
	ns := newNetns(t)
	server, err := Listen(t.Context(), Config{TPM: tpm, Netns: ns, Measured: measured, Protected: protected, Log: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	server.times = limits
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	ended := false
	s := &share{t: t, ns: ns, tpm: tpm, server: server, stop: func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}}
	t.Cleanup(s.stop)
	return s
}

// dial connects to the Server from outside of all processes of the namespace, so that each connection is a client.
func (s *share) dial(address string) net.Conn {
	s.t.Helper()
	var conn net.Conn
	err := inside(s.ns, func() (err error) {
		conn, err = net.Dial("tcp4", address)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// inside runs a function in a network namespace. The thread goes back: where it ended, so would the programs that it started.
func inside(ns *os.File, f func() error) (err error) {
	onThread(func() bool {
		var home netns.NsHandle
		if home, err = netns.Get(); err != nil {
			return true
		}
		defer home.Close()
		if err = netns.Set(netns.NsHandle(ns.Fd())); err == nil {
			err = f()
		}
		return netns.Set(home) == nil
	})
	return err
}

// command is a program in the namespace, with a folder of its own and the swtpm interface chosen.
func (s *share) command(dir, program string, args ...string) *exec.Cmd {
	s.t.Helper()
	need.Program(s.t, program)
	cmd := exec.Command(need.Program(s.t, "nsenter"), append([]string{"--net=/proc/self/fd/3", program}, args...)...)
	cmd.Dir = dir
	cmd.ExtraFiles = []*os.File{s.ns}
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:host=127.0.0.1,port=2321", "TSS2_LOG=all+error")
	return cmd
}

// tool runs a program in the namespace and returns what it writes.
func (s *share) tool(dir, program string, args ...string) (string, error) {
	out, err := s.command(dir, program, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// must is tool, where nothing may go wrong.
func (s *share) must(dir, program string, args ...string) string {
	s.t.Helper()
	out, err := s.tool(dir, program, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// leftovers returns the handles of what is in a TPM, when nobody uses it any more.
func leftovers(t *testing.T, tpm *TPM) (left []tpm2.TPMHandle) {
	t.Helper()
	if err := tpm.turns.take(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	defer tpm.turns.give()
	for _, first := range []tpm2.TPMHandle{firstTransient, firstLoadedSession, firstSavedSession} {
		handles, err := tpm.handles(first)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, handles...)
	}
	return left
}

func TestHostNetworkIsRefused(t *testing.T) {
	f, err := OpenNetns(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Listen(t.Context(), Config{Netns: f}); !errors.Is(err, ErrHostNetwork) {
		t.Errorf("Listen in the agent's network namespace: %v, want ErrHostNetwork", err)
	}
}

func TestPortTaken(t *testing.T) {
	tpm, _ := openTPM(t)
	s := start(t, tpm)
	if _, err := Listen(t.Context(), Config{TPM: tpm, Netns: s.ns}); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second Listen: %v, want EADDRINUSE", err)
	}
	s.stop()
	again, err := Listen(t.Context(), Config{TPM: tpm, Netns: s.ns})
	if err != nil {
		t.Fatalf("Listen after Run has ended: %v", err)
	}
	again.Close()
}

// What is outside the namespace does not reach the TPM.
func TestOnlyTheNamespaceReachesIt(t *testing.T) {
	tpm, _ := openTPM(t)
	s := start(t, tpm)
	neighbour := newNetns(t)
	if err := inside(neighbour, func() error {
		if err := raiseLoopback(); err != nil {
			return err
		}
		if conn, err := net.Dial("tcp4", commandAddress); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("dial from another namespace: %v, %v", conn, err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	s.dial(commandAddress)
}

func TestTools(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	s := start(t, tpm)
	dir := t.TempDir()
	extendAgent(t, agent, 1)
	if out := s.must(dir, "tpm2_pcrread", "sha256:10"); !strings.Contains(strings.ToLower(out), pcr10(t, agent)) {
		t.Errorf("tpm2_pcrread: %s, want %s", out, pcr10(t, agent))
	}
	if out := s.must(dir, "tpm2_getrandom", "--hex", "8"); len(strings.TrimSpace(out)) != 16 {
		t.Errorf("tpm2_getrandom: %q", out)
	}
	s.must(dir, "tpm2_createprimary", "-Q", "-c", "p.ctx")
	s.must(dir, "tpm2_create", "-Q", "-C", "p.ctx", "-G", "ecc", "-u", "k.pub", "-r", "k.priv")
	s.must(dir, "tpm2_load", "-Q", "-C", "p.ctx", "-u", "k.pub", "-r", "k.priv", "-c", "k.ctx")
	if err := os.WriteFile(filepath.Join(dir, "m"), []byte("message"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.must(dir, "tpm2_sign", "-Q", "-c", "k.ctx", "-g", "sha256", "-o", "sig", "m")
	s.must(dir, "tpm2_verifysignature", "-Q", "-c", "k.ctx", "-g", "sha256", "-s", "sig", "-m", "m")
	s.must(dir, "tpm2_hash", "-Q", "m")
	s.must(dir, "tpm2_pcrextend", "16:sha256="+strings.Repeat("01", 32))
	s.must(dir, "tpm2_pcrreset", "16")
	// A policy session that goes from program to program by its saved context.
	s.must(dir, "tpm2_startauthsession", "-S", "s.ctx", "--policy-session")
	s.must(dir, "tpm2_policypcr", "-Q", "-S", "s.ctx", "-l", "sha256:10", "-L", "policy")
	s.must(dir, "tpm2_create", "-Q", "-C", "p.ctx", "-L", "policy", "-i", "m", "-u", "d.pub", "-r", "d.priv")
	s.must(dir, "tpm2_load", "-Q", "-C", "p.ctx", "-u", "d.pub", "-r", "d.priv", "-c", "d.ctx")
	if out := s.must(dir, "tpm2_unseal", "-c", "d.ctx", "-p", "session:s.ctx"); out != "message" {
		t.Errorf("tpm2_unseal: %q", out)
	}
	s.must(dir, "tpm2_flushcontext", "s.ctx")
	s.stop()
	if left := leftovers(t, tpm); len(left) != 0 {
		t.Errorf("left in the TPM: %#x", left)
	}
}
