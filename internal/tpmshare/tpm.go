package tpmshare

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"imans.dev/imans-agent/internal/tpmext"
)

// errLost means that there is no connection to the TPM.
var errLost = errors.New("no connection to the TPM")

// TPM is the only connection to a TPM, which the agent and the clients of one or more Servers share. Its methods may be called from
// several goroutines.
type TPM struct {
	dial  tpmext.Dialer
	turns turns

	mu   sync.Mutex
	left []*space // guarded by mu: of connections of the agent's that were closed

	// Of whoever has the turn:
	conn     transport.TPMCloser // nil while the connection is lost
	closed   bool
	sessions sessions
}

// Open connects to a TPM, and flushes all that is loaded in it: nobody is left who knows the handles.
func Open(ctx context.Context, dial tpmext.Dialer) (*TPM, error) {
	t := &TPM{dial: dial, sessions: sessions{all: make(map[tpm2.TPMHandle]*session)}}
	if err := t.connect(ctx); err != nil {
		return nil, err
	}
	return t, nil
}

// Agent connects the agent: it implements tpmext.Dialer, so that a tpmext.TPM works through what it returns, before the clients.
// Nothing is refused to the agent, but it too has handles of its own, which are flushed when it closes the connection.
//
// If the connection to the TPM is lost, it is made anew, for the clients too; until then all of them get TPM_RC_FAILURE. No command
// is sent twice.
func (t *TPM) Agent(ctx context.Context) (transport.TPMCloser, error) {
	if err := t.turns.take(ctx, true); err != nil {
		return nil, err
	}
	defer t.turns.give()
	if t.conn == nil {
		if err := t.connect(ctx); err != nil {
			return nil, err
		}
	}
	a := &agent{tpm: t, space: newSpace(t, true)}
	a.closed, a.cancel = context.WithCancel(context.Background())
	return a, nil
}

// Close ends the connection for good; it waits for the command under way.
func (t *TPM) Close() error {
	if err := t.turns.take(context.Background(), true); err != nil {
		return err
	}
	defer t.turns.give()
	t.closed = true
	t.drop()
	return nil
}

// connect makes the connection. Sessions that clients saved are kept if the TPM still has them. The turn is the caller's.
func (t *TPM) connect(ctx context.Context) error {
	if t.closed {
		return errors.New("share the TPM: closed")
	}
	conn, err := t.dial(ctx)
	if err != nil {
		return fmt.Errorf("share the TPM: %w", err)
	}
	t.conn = conn
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err = t.clean()
	if !stop() {
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		t.drop()
		return fmt.Errorf("share the TPM: %w", err)
	}
	return nil
}

// drop gives up the connection.
func (t *TPM) drop() {
	if t.conn != nil {
		t.conn.Close() // its error says nothing that the command's did not
		t.conn = nil
	}
}

// clean flushes what is loaded, and the saved sessions that nobody here knows; and forgets those that the TPM does not know.
func (t *TPM) clean() error {
	gap, err := t.property(tpm2.TPMPTContextGapMax)
	if err != nil {
		return fmt.Errorf("TPM2_GetCapability of TPM_PT_CONTEXT_GAP_MAX: %w", err)
	}
	known := make(map[tpm2.TPMHandle]bool)
	for _, first := range []tpm2.TPMHandle{firstTransient, firstLoadedSession, firstSavedSession} {
		handles, err := t.handles(first)
		if err != nil {
			return fmt.Errorf("TPM2_GetCapability of TPM_CAP_HANDLES from %#x on: %w", uint32(first), err)
		}
		for _, h := range handles {
			if first == firstSavedSession && t.sessions.all[h] != nil {
				known[h] = true
			} else if rc := t.flush(h); rc != tpm2.TPMRCSuccess {
				return fmt.Errorf("TPM2_FlushContext of %#x: %w", uint32(h), rc)
			}
		}
	}
	t.sessions.reset(int(gap), known)
	return nil
}

// Where lists of handles begin; for sessions, the list of the loaded and that of the saved ones, whatever their type.
// Source: Part 3, section 30.2.1.
const (
	firstLoadedSession tpm2.TPMHandle = 0x02000000
	firstSavedSession  tpm2.TPMHandle = 0x03000000
	firstTransient     tpm2.TPMHandle = 0x80000000
)

// maxHandles is above the number of handles of one kind that a TPM has, and below what one response has room for.
const maxHandles = 254

func (t *TPM) handles(first tpm2.TPMHandle) ([]tpm2.TPMHandle, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: maxHandles}.Execute(raw{t})
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, err
	}
	return list.Handle, nil
}

func (t *TPM) property(p tpm2.TPMPT) (uint32, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(p), PropertyCount: 1}.Execute(raw{t})
	if err != nil {
		return 0, err
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return 0, err
	}
	if len(list.TPMProperty) != 1 || list.TPMProperty[0].Property != p {
		return 0, errors.New("the TPM does not say")
	}
	return list.TPMProperty[0].Value, nil
}

// raw is the TPM for who has the turn; it implements transport.TPM.
type raw struct{ t *TPM }

// Send implements transport.TPM.
func (r raw) Send(command []byte) ([]byte, error) { return r.t.send(command) }

// send sends a command and returns a response with a whole header. After an error the connection is gone: a response that comes
// late must not be taken for that of the next command.
func (t *TPM) send(command []byte) ([]byte, error) {
	if t.conn == nil {
		return nil, errLost
	}
	response, err := t.conn.Send(command)
	if err == nil && (len(response) < headerSize || binary.BigEndian.Uint32(response[2:]) != uint32(len(response))) {
		err = fmt.Errorf("%d bytes are no whole response", len(response))
	}
	if err != nil {
		t.drop()
		return nil, fmt.Errorf("%w: %w", errLost, err)
	}
	return response, nil
}

// How long the TPM is given that asks to have a command again, having done nothing: swtpm does when it first has to note that
// dictionary attack protection is in use.
const (
	firstPause = time.Millisecond
	lastPause  = 256 * time.Millisecond
)

// sendPatiently is send, again if the TPM asks for that, as the kernel's resource manager does. After half a second it is for the
// client to go on. Source: Part 2, section 6.6.3 (TPM_RC_RETRY, TPM_RC_YIELDED, TPM_RC_TESTING).
func (t *TPM) sendPatiently(command []byte) ([]byte, error) {
	for pause := firstPause; ; pause *= 2 {
		response, err := t.send(command)
		if err != nil {
			return nil, err
		}
		rc := responseCode(response)
		if rc != tpm2.TPMRCRetry && rc != tpm2.TPMRCYielded && rc != tpm2.TPMRCTesting || pause > lastPause {
			return response, nil
		}
		time.Sleep(pause)
	}
}

// run sends a command of this package's own, without authorizations, and returns what is behind the response's header. That the
// connection is lost is TPM_RC_FAILURE.
func (t *TPM) run(code tpm2.TPMCC, body []byte) ([]byte, tpm2.TPMRC) {
	b := make([]byte, 0, headerSize+len(body))
	b = binary.BigEndian.AppendUint16(b, uint16(tpm2.TPMSTNoSessions))
	b = binary.BigEndian.AppendUint32(b, uint32(headerSize+len(body)))
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	response, err := t.send(append(b, body...))
	if err != nil {
		return nil, tpm2.TPMRCFailure
	}
	return response[headerSize:], responseCode(response)
}

func handleBytes(h tpm2.TPMHandle) []byte { return binary.BigEndian.AppendUint32(nil, uint32(h)) }

// save returns the saved context (TPMS_CONTEXT) of an object, which stays loaded, or of a session, which does not.
func (t *TPM) save(h tpm2.TPMHandle) ([]byte, tpm2.TPMRC) {
	return t.run(tpm2.TPMCCContextSave, handleBytes(h))
}

// load loads a saved context.
func (t *TPM) load(context []byte) (tpm2.TPMHandle, tpm2.TPMRC) {
	b, rc := t.run(tpm2.TPMCCContextLoad, context)
	if rc != tpm2.TPMRCSuccess {
		return 0, rc
	}
	if len(b) != 4 {
		return 0, tpm2.TPMRCFailure
	}
	return tpm2.TPMHandle(binary.BigEndian.Uint32(b)), rc
}

// flush flushes an object or a session, loaded or saved.
func (t *TPM) flush(h tpm2.TPMHandle) tpm2.TPMRC {
	_, rc := t.run(tpm2.TPMCCFlushContext, handleBytes(h))
	return rc
}

// agent is a connection of the agent's.
type agent struct {
	tpm    *TPM
	space  *space
	closed context.Context // ends by Close
	cancel context.CancelFunc
}

// Send implements transport.TPM.
func (a *agent) Send(command []byte) ([]byte, error) {
	q, rc := parseRequest(bytes.Clone(command)) // handles are changed in it, and the caller may send it again
	if rc != tpm2.TPMRCSuccess {
		return answer(rc), nil
	}
	if err := a.tpm.turns.take(a.closed, true); err != nil {
		return nil, err // nothing was sent
	}
	defer a.tpm.turns.give()
	if err := a.closed.Err(); err != nil {
		return nil, err
	}
	if conn := a.tpm.conn; conn != nil {
		stop := context.AfterFunc(a.closed, func() { conn.Close() })
		defer func() {
			if !stop() {
				a.tpm.drop()
			}
		}()
	}
	return a.space.execute(q)
}

// Close implements io.Closer. It ends a Send that is under way: one that waits for its turn does nothing, one that the TPM does not
// answer ends with the connection to the TPM. It does not wait for a client's command; what the agent has in the TPM is flushed
// before the next.
func (a *agent) Close() error {
	a.tpm.mu.Lock()
	a.tpm.left = append(a.tpm.left, a.space)
	a.tpm.mu.Unlock()
	a.cancel()
	if a.tpm.turns.take(a.closed, true) == nil { // at once, or not at all
		defer a.tpm.turns.give()
		a.tpm.flushLeft()
	}
	return nil
}

// flushLeft flushes what the agent's closed connections have. The turn is the caller's.
func (t *TPM) flushLeft() {
	t.mu.Lock()
	left := t.left
	t.left = nil
	t.mu.Unlock()
	for _, s := range left {
		s.end()
	}
}
