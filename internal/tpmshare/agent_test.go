package tpmshare

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

// extendAgent extends PCR 10 as a list does, by a digest of the given byte.
func extendAgent(t testing.TB, agent *tpmext.TPM, b byte) {
	t.Helper()
	var digests []ima.Digest
	for _, bank := range agent.Banks() {
		d, err := ima.NewDigest(bank, bytes.Repeat([]byte{b}, bank.Size()))
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, d)
	}
	if err := agent.Extend(t.Context(), 10, digests); err != nil {
		t.Fatal(err)
	}
}

// pcr10 returns the SHA-256 bank's PCR 10.
func pcr10(t testing.TB, agent *tpmext.TPM) string {
	t.Helper()
	values, err := agent.ReadPCR(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(values[ima.SHA256].Bytes())
}

// replay is a list in small: what PCR 10 must hold.
type replay struct {
	n     int
	value [32]byte
}

func (r *replay) extend(t testing.TB, agent *tpmext.TPM) {
	t.Helper()
	r.n++
	extendAgent(t, agent, byte(r.n))
	hash, _ := ima.SHA256.Hash()
	h := hash.New()
	h.Write(r.value[:])
	h.Write(bytes.Repeat([]byte{byte(r.n)}, 32))
	copy(r.value[:], h.Sum(nil))
}

func (r *replay) check(t testing.TB, agent *tpmext.TPM) {
	t.Helper()
	if got := pcr10(t, agent); got != hex.EncodeToString(r.value[:]) {
		t.Errorf("PCR 10 is %s, %d extends replay to %x", got, r.n, r.value)
	}
}

// A dead TPM is a failure to clients, until the agent opens it again: nobody else does, and no command is sent twice.
func TestDeadTPM(t *testing.T) {
	tpm, swtpm := openTPM(t)
	agent := openAgent(t, tpm)
	c := newClients(t, tpm, 1)[0]
	k, s := c.primary(), c.session()
	swtpm.Kill()
	_, err := tpm2.GetRandom{BytesRequested: 8}.Execute(c)
	wantRC(t, "a dead TPM", err, tpm2.TPMRCFailure)
	if err := agent.Extend(t.Context(), 10, nil); err == nil {
		t.Error("an extend of a dead TPM")
	}
	if _, err := agent.ReadPCR(t.Context(), 10); !errors.Is(err, tpmext.ErrUnavailable) {
		t.Errorf("the agent is told %v, want ErrUnavailable", err)
	}
	if err := agent.Reopen(t.Context()); !errors.Is(err, tpmext.ErrUnavailable) {
		t.Errorf("Reopen of a dead TPM: %v, want ErrUnavailable", err)
	}
	swtpm.Run("not-need-init,startup-clear")
	_, err = tpm2.GetRandom{BytesRequested: 8}.Execute(c)
	wantRC(t, "a TPM that is back before the agent says so", err, tpm2.TPMRCFailure)
	if err := agent.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.GetRandom{BytesRequested: 8}).Execute(c); err != nil {
		t.Error(err)
	}
	_, err = tpm2.PolicyGetDigest{PolicySession: s.Handle()}.Execute(c)
	wantRC(t, "a session of the TPM before", err, tpm2.TPMRCReferenceH0)
	if _, err := (tpm2.ReadPublic{ObjectHandle: k}).Execute(c); err != nil { // the seeds are as they were, and the key with them
		wantRC(t, "an object of the TPM before", err, tpm2.TPMRCReferenceH0)
	}
}

// What was loaded when the connection broke is flushed with the next.
func TestBrokenConnection(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	c := newClients(t, tpm, 1)[0]
	k, s := c.primary(), c.session(tpm2.Audit())
	loaded := tpm.sessions.all[s.Handle()]
	if rc := tpm.swapIn(loaded); rc != tpm2.TPMRCSuccess { // as in the middle of a command
		t.Fatal(rc)
	}
	tpm.conn.Close()
	_, err := agent.ReadPCR(t.Context(), 10)
	if !errors.Is(err, tpmext.ErrUnavailable) {
		t.Errorf("the agent is told %v, want ErrUnavailable", err)
	}
	if err := agent.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, tpm); len(left) != 0 {
		t.Errorf("in the TPM: %#x", left)
	}
	if _, err := (tpm2.ReadPublic{ObjectHandle: k}).Execute(c); err != nil {
		t.Errorf("an object that was not loaded: %v", err)
	}
}

// While a client's command takes its time, the agent gives up when its context ends, without having sent anything.
func TestAgentDoesNotWaitForEver(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	c := &testClient{agent, t}
	c.session()
	if err := tpm.turns.take(t.Context(), false); err != nil { // a client's command
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := agent.ReadPCRs(ctx, 10); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ReadPCRs: %v, want the deadline", err)
	}
	tpm.turns.give()
	if err := agent.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pcr10(t, agent) == "" {
		t.Error("no value")
	}
	if left := leftovers(t, tpm); len(left) != 0 {
		t.Errorf("left in the TPM: %#x", left)
	}
}

// The agent's objects and sessions do not count among its clients', and are its own.
func TestAgentsObjects(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := &testClient{openAgent(t, tpm), t}
	clients := newClients(t, tpm, 1)
	agent.useMany()
	clients[0].useMany()
	if _, err := (tpm2.Clear{AuthHandle: tpm2.TPMRHPlatform}).Execute(agent); err != nil {
		t.Errorf("refused to the agent: %v", err)
	}
}

// While clients keep the TPM busy, an extend waits for one command of theirs, and they still have their turns.
func TestAgentComesFirst(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	const flood = 16
	var running sync.WaitGroup
	stop := make(chan struct{})
	counts := make([]int, flood)
	for i, c := range newClients(t, tpm, flood) {
		running.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := (tpm2.GetRandom{BytesRequested: 32}).Execute(c); err != nil {
					t.Error(err)
					return
				}
				counts[i]++
			}
		})
	}
	time.Sleep(20 * time.Millisecond) // they are in each other's way by now
	var r replay
	begun := time.Now()
	for range 1000 {
		r.extend(t, agent)
	}
	took := time.Since(begun)
	close(stop)
	running.Wait()
	r.check(t, agent)
	all, least := 0, counts[0]
	for _, n := range counts {
		all, least = all+n, min(least, n)
	}
	// By turns among equals the agent would have one in seventeen, so that 16,000 commands of the clients would run meanwhile.
	if all > 6*r.n {
		t.Errorf("%d commands of clients during %d extends in %v", all, r.n, took)
	}
	if least == 0 {
		t.Errorf("clients' commands: %v", counts)
	}
}
