package tpmshare

import (
	"encoding/binary"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// use is what one command has loaded.
type use struct {
	space    *space
	objects  []tpm2.TPMHandle // the client's handles
	sessions []*session
}

// load loads what the command names, and writes the TPM's handles into it. What is not the client's own does not exist for it: the
// response codes are the TPM's for handles of nothing. Source: Part 2, section 6.6.3 (TPM_RC_REFERENCE_…).
func (u *use) load(q *request) tpm2.TPMRC {
	for i, h := range q.handle[:q.handles] {
		missing := tpm2.TPMRCReferenceH0 + tpm2.TPMRC(i)
		switch {
		case isTransient(h):
			real, rc := u.loadObject(h, missing)
			if rc != tpm2.TPMRCSuccess {
				return rc
			}
			q.setHandle(i, real)
		case isSession(h):
			if rc := u.loadSession(h, missing); rc != tpm2.TPMRCSuccess {
				return rc
			}
		}
	}
	for i, h := range q.session {
		if !isSession(h) { // TPM_RS_PW, or what the TPM refuses
			continue
		}
		if rc := u.loadSession(h, tpm2.TPMRCReferenceS0+tpm2.TPMRC(i)); rc != tpm2.TPMRCSuccess {
			return rc
		}
	}
	return tpm2.TPMRCSuccess
}

func (u *use) loadObject(h tpm2.TPMHandle, missing tpm2.TPMRC) (tpm2.TPMHandle, tpm2.TPMRC) {
	o := u.space.objects[h]
	if o == nil {
		return 0, missing
	}
	if slices.Contains(u.objects, h) {
		return o.loaded, tpm2.TPMRCSuccess
	}
	real, rc := u.space.tpm.load(o.context)
	if rc != tpm2.TPMRCSuccess {
		if !isWarning(rc) { // it does not load, and never will: the TPM began anew
			delete(u.space.objects, h)
			rc = missing
		}
		return 0, rc
	}
	o.loaded = real
	u.objects = append(u.objects, h)
	return real, tpm2.TPMRCSuccess
}

func (u *use) loadSession(h tpm2.TPMHandle, missing tpm2.TPMRC) tpm2.TPMRC {
	one := u.space.tpm.sessions.all[h]
	if one == nil || one.owner != u.space || one.given {
		return missing
	}
	if slices.Contains(u.sessions, one) {
		return tpm2.TPMRCSuccess
	}
	if rc := u.space.tpm.swapIn(one); isWarning(rc) {
		return rc
	} else if rc != tpm2.TPMRCSuccess {
		u.space.tpm.forget(one)
		return missing
	}
	u.sessions = append(u.sessions, one)
	return tpm2.TPMRCSuccess
}

// isWarning reports whether a response code says that the command may succeed later. Source: Part 2, section 6.6.1.
func isWarning(rc tpm2.TPMRC) bool { return rc&0x980 == 0x900 || rc == tpm2.TPMRCFailure }

// done takes note of what a command did that succeeded, and returns the response with the client's handle in it.
func (u *use) done(q *request, response []byte) []byte {
	if q.code == tpm2.TPMCCContextSave && len(u.sessions) == 1 {
		u.space.tpm.give(u.sessions[0])
		u.sessions = nil
	}
	if !q.creates {
		return response
	}
	if len(response) < headerSize+4 {
		return answer(tpm2.TPMRCFailure)
	}
	area := response[headerSize:]
	h := tpm2.TPMHandle(binary.BigEndian.Uint32(area))
	if isSession(h) {
		u.adoptSession(h)
		return response
	}
	mine, rc := u.adoptObject(h)
	if rc != tpm2.TPMRCSuccess {
		return answer(rc)
	}
	binary.BigEndian.PutUint32(area, uint32(mine))
	return response
}

// adoptSession makes a session the space's that was just started, or loaded from a context that its owner gave away.
func (u *use) adoptSession(h tpm2.TPMHandle) {
	one := &session{handle: h, owner: u.space}
	u.space.tpm.sessions.all[h] = one
	u.sessions = append(u.sessions, one)
}

// adoptObject gives an object that was just loaded a handle of the client's, the lowest free one as a TPM does.
func (u *use) adoptObject(real tpm2.TPMHandle) (tpm2.TPMHandle, tpm2.TPMRC) {
	context, rc := u.space.tpm.save(real)
	if rc != tpm2.TPMRCSuccess {
		u.space.tpm.flush(real)
		return 0, rc
	}
	mine := firstTransient
	for u.space.objects[mine] != nil {
		mine++
	}
	u.space.objects[mine] = &object{context: context, loaded: real}
	u.objects = append(u.objects, mine)
	return mine, tpm2.TPMRCSuccess
}

// unload saves and flushes what is loaded. What is not there any more was ended by the command.
func (u *use) unload() {
	t := u.space.tpm
	for _, h := range u.objects {
		o := u.space.objects[h]
		if isSequence(o.context) {
			context, rc := t.save(o.loaded)
			if rc != tpm2.TPMRCSuccess && t.conn != nil {
				delete(u.space.objects, h)
			} else if rc == tpm2.TPMRCSuccess {
				o.context = context
			}
		}
		t.flush(o.loaded)
		o.loaded = 0
	}
	for _, one := range u.sessions {
		if !t.swapOut(one) {
			t.forget(one)
		}
	}
}

// isSequence reports whether a saved context is that of a sequence object, whose state changes with each use.
func isSequence(context []byte) bool { return savedHandle(context) == savedSequence }

// savedSequence is the savedHandle of a sequence object. Source: Part 2, section 14.6.
const savedSequence tpm2.TPMHandle = 0x80000001

// savedHandle reads that field of a TPMS_CONTEXT: u64 sequence, u32 savedHandle, u32 hierarchy, and the blob. It is 0 if there
// is none.
func savedHandle(context []byte) tpm2.TPMHandle {
	if len(context) < 12 {
		return 0
	}
	return tpm2.TPMHandle(binary.BigEndian.Uint32(context[8:]))
}
