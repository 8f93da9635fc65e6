package tpmshare

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"go.uber.org/zap"
)

// testClient is a client, whatever its way to the TPM.
type testClient struct {
	transport.TPM
	t testing.TB
}

// direct is a client without a connection; it implements transport.TPM.
type direct struct {
	s *Server
	c *client
}

// newClients makes clients without connections.
func newClients(t testing.TB, tpm *TPM, n int) (clients []*testClient) {
	s := &Server{tpm: tpm, rules: rules{measured, protected}, log: zap.NewNop(), told: make(map[tpm2.TPMCC]bool)}
	for range n {
		clients = append(clients, &testClient{direct{s, &client{space: newSpace(tpm, false)}}, t})
	}
	return clients
}

// Send implements transport.TPM.
func (d direct) Send(command []byte) ([]byte, error) {
	return d.s.pass(context.Background(), d.c, slices.Clone(command))
}

// end is what the end of its process is to a client.
func (c *testClient) end() {
	d := c.TPM.(direct)
	d.s.end(d.c)
}

// storage and signing are templates of keys that a TPM makes quickly.
var (
	storage = tpm2.New2B(tpm2.ECCSRKTemplate)
	signing = tpm2.New2B(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
			SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
		}),
	})
)

// key is an object by the handle that a client has for it.
type key = tpm2.NamedHandle

func (c *testClient) primary() key {
	c.t.Helper()
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: storage}.Execute(c)
	if err != nil {
		c.t.Fatal(err)
	}
	return key{Handle: rsp.ObjectHandle, Name: rsp.Name}
}

// signingKey makes a key and loads it.
func (c *testClient) signingKey(parent key) key {
	c.t.Helper()
	made, err := tpm2.Create{ParentHandle: parent, InPublic: signing}.Execute(c)
	if err != nil {
		c.t.Fatal(err)
	}
	loaded, err := tpm2.Load{ParentHandle: parent, InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(c)
	if err != nil {
		c.t.Fatal(err)
	}
	return key{Handle: loaded.ObjectHandle, Name: loaded.Name}
}

// sign signs a digest with a key, by an authorization session.
func (c *testClient) sign(k key, s tpm2.Session) error {
	digest := tpm2.TPM2BDigest{Buffer: make([]byte, 32)}
	signed, err := tpm2.Sign{KeyHandle: tpm2.AuthHandle{Handle: k.Handle, Name: k.Name, Auth: s}, Digest: digest,
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull}}.Execute(c)
	if err != nil {
		return err
	}
	_, err = tpm2.VerifySignature{KeyHandle: k, Digest: digest, Signature: signed.Signature}.Execute(c)
	return err
}

// session starts an HMAC session, by which parameters are authenticated.
func (c *testClient) session(options ...tpm2.AuthOption) tpm2.Session {
	c.t.Helper()
	s, _, err := tpm2.HMACSession(c, tpm2.TPMAlgSHA256, 16, options...)
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// handles asks for those of one kind.
func (c *testClient) handles(first tpm2.TPMHandle) []tpm2.TPMHandle {
	c.t.Helper()
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: 100}.Execute(c)
	if err != nil {
		c.t.Fatal(err)
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		c.t.Fatal(err)
	}
	return list.Handle
}

func wantRC(t testing.TB, what string, err error, want tpm2.TPMRC) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// useMany loads six objects and three sessions, and uses them in turns.
func (c *testClient) useMany() {
	c.t.Helper()
	parent := c.primary()
	var keys []key
	var sessions []tpm2.Session
	for range 5 {
		keys = append(keys, c.signingKey(parent))
	}
	for range 3 {
		sessions = append(sessions, c.session())
	}
	for i := range 15 {
		if err := c.sign(keys[i%5], sessions[i%3]); err != nil {
			c.t.Errorf("use %d: %v", i, err)
		}
	}
}

// Eight clients have six objects and three sessions each loaded, in a TPM with room for three of each, and use them all in turns.
func TestManyClientsShareThreePlaces(t *testing.T) {
	tpm, _ := openTPM(t)
	var running sync.WaitGroup
	clients := newClients(t, tpm, 8)
	for _, c := range clients {
		running.Go(func() {
			c.useMany()
			if h := c.handles(firstTransient); len(h) != 6 || h[0] != firstTransient || h[5] != firstTransient+5 {
				t.Errorf("objects %#x, want 6", h)
			}
			if h := c.handles(firstTransient + 4); len(h) != 2 {
				t.Errorf("objects from the fifth on: %#x", h)
			}
			if h := c.handles(firstLoadedSession); len(h) != 3 {
				t.Errorf("sessions %#x, want 3", h)
			}
		})
	}
	running.Wait()
	for _, c := range clients {
		c.end()
	}
	if left := leftovers(t, tpm); len(left) != 0 {
		t.Errorf("left in the TPM: %#x", left)
	}
}

func TestOthersHandlesDoNotExist(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	clients := newClients(t, tpm, 2)
	mine, other := clients[0], clients[1]
	k := mine.primary()
	session := mine.session()
	policy, _, err := tpm2.PolicySession(mine, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		t.Fatal(err)
	}
	agentSession, closeSession, err := tpm2.HMACSession(agent, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.ReadPublic{ObjectHandle: k.Handle}.Execute(other)
	wantRC(t, "another's object", err, tpm2.TPMRCReferenceH0)
	_, err = tpm2.ReadPublic{ObjectHandle: k.Handle + 0x100}.Execute(mine)
	wantRC(t, "an object that is not there", err, tpm2.TPMRCReferenceH0)
	_, err = tpm2.FlushContext{FlushHandle: k}.Execute(other)
	wantRC(t, "flush of another's object", err, tpm2.TPMRCHandle)
	_, err = tpm2.PolicyGetDigest{PolicySession: policy.Handle()}.Execute(other)
	wantRC(t, "another's policy session", err, tpm2.TPMRCReferenceH0)
	for _, s := range []tpm2.TPMHandle{session.Handle(), policy.Handle(), agentSession.Handle()} {
		_, err = tpm2.FlushContext{FlushHandle: s}.Execute(other)
		wantRC(t, "flush of another's session", err, tpm2.TPMRCHandle)
		_, err = tpm2.ContextSave{SaveHandle: s}.Execute(other)
		wantRC(t, "save of another's session", err, tpm2.TPMRCReferenceH0)
	}
	own := other.primary()
	if own.Handle != k.Handle {
		t.Errorf("handles %#x and %#x: one tells of the other", own.Handle, k.Handle)
	}
	parent := tpm2.AuthHandle{Handle: own.Handle, Name: own.Name, Auth: session}
	_, err = tpm2.Create{ParentHandle: parent, InPublic: signing}.Execute(other)
	wantRC(t, "another's session as authorization", err, tpm2.TPMRCReferenceS0)
	if h := other.handles(firstLoadedSession); len(h) != 0 {
		t.Errorf("sees sessions %#x", h)
	}
	parent = tpm2.AuthHandle{Handle: k.Handle, Name: k.Name, Auth: session}
	if _, err := (tpm2.Create{ParentHandle: parent, InPublic: signing}).Execute(mine); err != nil {
		t.Errorf("its own session: %v", err)
	}
	if err := closeSession(); err != nil {
		t.Error(err)
	}
}

// A session goes from one client to another by its saved context, once.
func TestSavedSessionIsGivenAway(t *testing.T) {
	tpm, _ := openTPM(t)
	clients := newClients(t, tpm, 2)
	mine, other := clients[0], clients[1]
	policy, _, err := tpm2.PolicySession(mine, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		t.Fatal(err)
	}
	saved, err := tpm2.ContextSave{SaveHandle: policy.Handle()}.Execute(mine)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.PolicyGetDigest{PolicySession: policy.Handle()}.Execute(mine)
	wantRC(t, "a session that was saved", err, tpm2.TPMRCReferenceH0)
	if h := mine.handles(firstSavedSession); len(h) != 1 || h[0] != policy.Handle() {
		t.Errorf("saved sessions %#x", h)
	}
	mine.end()
	loaded, err := tpm2.ContextLoad{Context: saved.Context}.Execute(other)
	if err != nil {
		t.Fatal(err)
	}
	if tpm2.TPMHandle(loaded.LoadedHandle) != policy.Handle() {
		t.Errorf("loaded %#x, saved %#x", loaded.LoadedHandle, policy.Handle())
	}
	if _, err := (tpm2.PolicyGetDigest{PolicySession: policy.Handle()}).Execute(other); err != nil {
		t.Error(err)
	}
	if _, err := (tpm2.ContextLoad{Context: saved.Context}).Execute(clients[0]); err == nil {
		t.Error("the same context was loaded twice")
	}
	if _, err := (tpm2.PolicyGetDigest{PolicySession: policy.Handle()}).Execute(other); err != nil {
		t.Error(err)
	}
}

// Sequence objects change with each use, and end with the last.
func TestSequence(t *testing.T) {
	tpm, _ := openTPM(t)
	c := newClients(t, tpm, 1)[0]
	var sequences []tpm2.TPMHandle
	for range 5 {
		started, err := tpm2.HashSequenceStart{HashAlg: tpm2.TPMAlgSHA256}.Execute(c)
		if err != nil {
			t.Fatal(err)
		}
		sequences = append(sequences, started.SequenceHandle)
	}
	part := tpm2.TPM2BMaxBuffer{Buffer: []byte("ab")}
	whole := tpm2.TPM2BMaxBuffer{Buffer: []byte("ababab")}
	want, err := tpm2.Hash{Data: whole, HashAlg: tpm2.TPMAlgSHA256, Hierarchy: tpm2.TPMRHNull}.Execute(c)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, h := range sequences {
			if _, err := (tpm2.SequenceUpdate{SequenceHandle: h, Buffer: part}).Execute(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, h := range sequences {
		got, err := tpm2.SequenceComplete{SequenceHandle: h, Buffer: part, Hierarchy: tpm2.TPMRHNull}.Execute(c)
		if err != nil {
			t.Fatal(err)
		}
		if string(got.Result.Buffer) != string(want.OutHash.Buffer) {
			t.Errorf("hash %x, want %x", got.Result.Buffer, want.OutHash.Buffer)
		}
	}
	if h := c.handles(firstTransient); len(h) != 0 {
		t.Errorf("objects left: %#x", h)
	}
}

func TestOnlyOwnAnswersWithoutHMAC(t *testing.T) {
	tpm, _ := openTPM(t)
	c := newClients(t, tpm, 1)[0]
	handles := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(firstTransient), PropertyCount: 1}
	_, err := handles.Execute(c, c.session(tpm2.Audit()))
	wantRC(t, "TPM_CAP_HANDLES with a session", err, tpm2.TPMRCAuthContext)
	if _, err := (tpm2.GetCapability{Capability: tpm2.TPMCapAlgs, PropertyCount: 1}).Execute(c, c.session(tpm2.Audit())); err != nil {
		t.Error(err)
	}
}
