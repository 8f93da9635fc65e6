package tpmshare

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// maxObjects is how many objects one client may have loaded.
const maxObjects = 32

// space is what one client sees of a TPM: its own objects, under handles that this package gives out, and its own sessions.
//
// Between two turns nothing is loaded in the TPM: before a command what it names is loaded, after it what is left is saved and
// flushed. So one command needs no more places than it has handles, and a client that is gone leaves no objects. Who has the turn
// may call the methods.
type space struct {
	tpm     *TPM
	agent   bool // the agent's: the bounds of sessions are not for it
	objects map[tpm2.TPMHandle]*object
}

// object is a transient object, by its saved context (TPMS_CONTEXT).
type object struct {
	context []byte
	loaded  tpm2.TPMHandle // the TPM's handle, during a command
}

func newSpace(t *TPM, agent bool) *space {
	return &space{tpm: t, agent: agent, objects: make(map[tpm2.TPMHandle]*object)}
}

// empty reports whether nothing would be lost with the space.
func (s *space) empty() bool { return len(s.objects) == 0 && s.tpm.sessions.owned(s) == 0 }

// end flushes everything but the sessions whose contexts the client has saved: another may load those.
func (s *space) end() {
	clear(s.objects)
	for _, one := range s.tpm.sessions.all {
		if one.owner == s && !one.given {
			s.tpm.forget(one)
		}
	}
}

// execute runs a command. The error is errLost: whether the command was carried out is not known.
func (s *space) execute(q *request) ([]byte, error) {
	if s.tpm.conn == nil {
		return nil, errLost
	}
	s.tpm.flushLeft()
	switch q.code {
	case tpm2.TPMCCFlushContext:
		return s.flushContext(q), nil
	case tpm2.TPMCCGetCapability:
		if response := s.ownHandles(q); response != nil {
			return response, nil
		}
	}
	if rc := s.room(q); rc != tpm2.TPMRCSuccess {
		return answer(rc), nil
	}
	s.tpm.closeGap()
	u := use{space: s}
	if rc := u.load(q); rc != tpm2.TPMRCSuccess {
		u.unload()
		return answer(rc), nil
	}
	response, err := s.tpm.sendPatiently(q.raw)
	if err != nil {
		return nil, err
	}
	if responseCode(response) == tpm2.TPMRCSuccess {
		response = u.done(q, response)
	}
	u.unload()
	return response, nil
}

// room says whether what a command is going to load still has room.
func (s *space) room(q *request) tpm2.TPMRC {
	if !q.creates {
		return tpm2.TPMRCSuccess
	}
	// TPM2_ContextLoad loads either; the saved handle of a session is the session's.
	toSession := q.code == tpm2.TPMCCStartAuthSession || q.code == tpm2.TPMCCContextLoad && isSession(savedHandle(q.params))
	switch {
	case !toSession && len(s.objects) >= maxObjects:
		return tpm2.TPMRCObjectMemory
	case toSession && !s.agent && s.tpm.sessions.owned(s) >= maxOwnSessions:
		return tpm2.TPMRCSessionHandles
	case q.code == tpm2.TPMCCStartAuthSession && !s.agent && !s.tpm.makeRoom():
		return tpm2.TPMRCSessionHandles
	}
	return tpm2.TPMRCSuccess
}

// flushContext is TPM2_FlushContext of what is the client's own. Source: Part 3, section 28.4.
func (s *space) flushContext(q *request) []byte {
	if q.tagged {
		return answer(tpm2.TPMRCAuthContext)
	}
	if len(q.params) != 4 {
		return answer(tpm2.TPMRCCommandSize)
	}
	h := tpm2.TPMHandle(binary.BigEndian.Uint32(q.params))
	if s.objects[h] != nil {
		delete(s.objects, h)
		return answer(tpm2.TPMRCSuccess)
	}
	one := s.tpm.sessions.all[h]
	if one == nil || one.owner != s {
		return answer(atParameter(tpm2.TPMRCHandle, 0))
	}
	rc := s.tpm.flush(h)
	if rc == tpm2.TPMRCSuccess {
		delete(s.tpm.sessions.all, h)
	}
	return answer(rc)
}

// ownHandles is TPM2_GetCapability of TPM_CAP_HANDLES for objects and sessions: the client's own, from the one asked for on. For all
// else it is nil, and the TPM is asked. Source: Part 3, section 30.2.
func (s *space) ownHandles(q *request) []byte {
	if len(q.params) != 12 || tpm2.TPMCap(binary.BigEndian.Uint32(q.params)) != tpm2.TPMCapHandles {
		return nil
	}
	first := tpm2.TPMHandle(binary.BigEndian.Uint32(q.params[4:]))
	var own []tpm2.TPMHandle
	switch kind := first &^ 0xFFFFFF; kind {
	case firstTransient:
		for h := range s.objects {
			own = append(own, h)
		}
	case firstLoadedSession, firstSavedSession:
		for h, one := range s.tpm.sessions.all {
			if one.owner == s && one.given == (kind == firstSavedSession) {
				own = append(own, h)
			}
		}
	default:
		return nil
	}
	if q.tagged {
		return answer(tpm2.TPMRCAuthContext) // no HMAC can be made for an answer that is not the TPM's
	}
	// Sessions are asked for, and come, by their number: the upper byte says which list, and in the answer which type.
	number := func(h tpm2.TPMHandle) tpm2.TPMHandle { return h & 0xFFFFFF }
	own = slices.DeleteFunc(own, func(h tpm2.TPMHandle) bool { return number(h) < number(first) })
	slices.SortFunc(own, func(a, b tpm2.TPMHandle) int { return int(number(a)) - int(number(b)) })
	count := min(uint64(binary.BigEndian.Uint32(q.params[8:])), maxHandles)
	var body bytes.Buffer
	body.WriteByte(0) // moreData
	if uint64(len(own)) > count {
		body.Bytes()[0] = 1
		own = own[:count]
	}
	b := binary.BigEndian.AppendUint32(body.Bytes(), uint32(tpm2.TPMCapHandles))
	b = binary.BigEndian.AppendUint32(b, uint32(len(own)))
	for _, h := range own {
		b = binary.BigEndian.AppendUint32(b, uint32(h))
	}
	return answer(tpm2.TPMRCSuccess, b...)
}
