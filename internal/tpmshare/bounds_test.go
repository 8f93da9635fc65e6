package tpmshare

import (
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// One client's bounds are its own, and it gets what it had when it flushes something.
func TestBoundsOfOneClient(t *testing.T) {
	tpm, _ := openTPM(t)
	clients := newClients(t, tpm, 5)
	c := clients[0]
	var err error
	n := 0
	for ; err == nil && n < 100; n++ {
		_, err = tpm2.HashSequenceStart{HashAlg: tpm2.TPMAlgSHA256}.Execute(c)
	}
	wantRC(t, "too many objects", err, tpm2.TPMRCObjectMemory)
	if n != maxObjects+1 {
		t.Errorf("%d objects", n-1)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: firstTransient + 3}).Execute(c); err != nil {
		t.Error(err)
	}
	again, err := tpm2.HashSequenceStart{HashAlg: tpm2.TPMAlgSHA256}.Execute(c)
	if err != nil || again.SequenceHandle != firstTransient+3 {
		t.Errorf("after a flush: %+v, %v", again, err)
	}
	all := 0
	for _, c := range clients {
		n, err = 0, nil
		for ; err == nil && n < 100; n++ {
			_, _, err = tpm2.HMACSession(c, tpm2.TPMAlgSHA256, 16)
		}
		wantRC(t, "too many sessions", err, tpm2.TPMRCSessionHandles)
		all += n - 1
	}
	if all != maxAllSessions {
		t.Errorf("%d sessions of all clients, want %d", all, maxAllSessions)
	}
	agent := openAgent(t, tpm)
	_, closeSession, err := tpm2.HMACSession(agent, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		t.Fatalf("no session is left for the agent: %v", err)
	}
	if err := closeSession(); err != nil {
		t.Error(err)
	}
}

// Saved sessions that nobody loads again do not fill the TPM: the oldest give way.
func TestGivenSessionsGiveWay(t *testing.T) {
	tpm, _ := openTPM(t)
	c := newClients(t, tpm, 1)[0]
	var contexts []tpm2.TPMSContext
	for range 100 {
		s := c.session()
		saved, err := tpm2.ContextSave{SaveHandle: s.Handle()}.Execute(c)
		if err != nil {
			t.Fatal(err)
		}
		contexts = append(contexts, saved.Context)
	}
	if h := c.handles(firstSavedSession); len(h) != maxGivenSessions {
		t.Errorf("%d saved sessions, want %d", len(h), maxGivenSessions)
	}
	if _, err := (tpm2.ContextLoad{Context: contexts[0]}).Execute(c); err == nil {
		t.Error("the oldest was loaded")
	}
	if _, err := (tpm2.ContextLoad{Context: contexts[99]}).Execute(c); err != nil {
		t.Errorf("the newest: %v", err)
	}
	c.handles(firstSavedSession)
	if _, err := (tpm2.FlushContext{FlushHandle: c.handles(firstSavedSession)[0]}).Execute(c); err != nil {
		t.Errorf("flush of its own saved session: %v", err)
	}
}

// A session that is not used while others are stays usable, however often they are saved.
func TestContextGap(t *testing.T) {
	tpm, _ := openTPM(t)
	tpm.sessions.gap = 16 // what a TPM may have that numbers contexts by a byte is 255
	clients := newClients(t, tpm, 2)
	parent := clients[0].primary()
	quiet := clients[0].session(tpm2.Audit())
	busyParent, busy := clients[1].primary(), clients[1].session(tpm2.Audit())
	for range 100 {
		_, err := tpm2.ReadPublic{ObjectHandle: busyParent}.Execute(clients[1], busy)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range tpm.sessions.all {
			if age := tpm.sessions.saves - one.savedAt; age > tpm.sessions.gap/2+2 {
				t.Fatalf("a session is %d contexts behind", age)
			}
		}
	}
	if _, err := (tpm2.ReadPublic{ObjectHandle: parent}).Execute(clients[0], quiet); err != nil {
		t.Error(err)
	}
}
