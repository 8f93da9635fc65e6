package tpmshare

import (
	"github.com/google/go-tpm/tpm2"
)

// Bounds of what is in the TPM. swtpm keeps 64 sessions (TPM_PT_ACTIVE_SESSIONS_MAX), all spaces together; what is left over is the
// agent's.
const (
	maxAllSessions   = 48 // of all clients
	maxOwnSessions   = 16 // of one client
	maxGivenSessions = 24 // that clients saved and nobody has loaded again
)

// session is one that the TPM holds a place for: its handle is the TPM's, because the handle is what an HMAC is computed over.
// Source: Part 1, section 16 (the Name of a session).
type session struct {
	handle  tpm2.TPMHandle
	owner   *space
	context []byte // its saved context; nil while it is loaded, and when given
	given   bool   // its owner saved it by TPM2_ContextSave: whoever has that context may load it
	savedAt int    // sessions.saves at that moment
}

// sessions are all of a TPM's.
//
// A TPM numbers the contexts of sessions that it saves, and refuses to save more when the oldest is TPM_PT_CONTEXT_GAP_MAX behind
// (TPM_RC_CONTEXT_GAP; Part 1, section 30). So old ones are loaded and saved anew in time.
type sessions struct {
	all   map[tpm2.TPMHandle]*session
	gap   int // TPM_PT_CONTEXT_GAP_MAX
	saves int // how many sessions have been saved
}

// reset is what a new connection needs: only the known sessions are left. When they were saved is not asked; it counts from now on.
func (s *sessions) reset(gap int, known map[tpm2.TPMHandle]bool) {
	s.gap = gap
	for h := range s.all {
		if !known[h] {
			delete(s.all, h)
		}
	}
}

func (s *sessions) owned(by *space) (n int) {
	for _, one := range s.all {
		if one.owner == by && !one.given {
			n++
		}
	}
	return n
}

// oldest returns the session that was saved first, of the given ones only or of all; nil if there is none.
func (s *sessions) oldest(given bool) *session {
	var first *session
	for _, one := range s.all {
		saved := one.given || !given && one.context != nil
		if saved && (first == nil || one.savedAt < first.savedAt) {
			first = one
		}
	}
	return first
}

func (s *sessions) given() (n int) {
	for _, one := range s.all {
		if one.given {
			n++
		}
	}
	return n
}

// forget flushes a session.
func (t *TPM) forget(one *session) {
	t.flush(one.handle) // if it is not there any more, so much the better
	delete(t.sessions.all, one.handle)
}

// closeGap loads and saves the oldest sessions anew, until none is more than half the gap behind. A given one can't be saved anew,
// as its context is with a client: it is flushed.
func (t *TPM) closeGap() {
	for {
		one := t.sessions.oldest(false)
		if one == nil || t.sessions.saves-one.savedAt <= t.sessions.gap/2 {
			return
		}
		if one.given || t.swapIn(one) != tpm2.TPMRCSuccess || !t.swapOut(one) {
			t.forget(one)
		}
	}
}

// swapIn loads a session that this package saved.
func (t *TPM) swapIn(one *session) tpm2.TPMRC {
	h, rc := t.load(one.context)
	switch {
	case rc != tpm2.TPMRCSuccess:
		return rc
	case h != one.handle:
		return tpm2.TPMRCHandle
	}
	one.context = nil
	return tpm2.TPMRCSuccess
}

// swapOut saves a session; false if it is not there, because a command ended it, or can't be saved.
func (t *TPM) swapOut(one *session) bool {
	context, rc := t.save(one.handle)
	if rc != tpm2.TPMRCSuccess {
		return false
	}
	t.sessions.saves++
	one.context, one.savedAt = context, t.sessions.saves
	return true
}

// makeRoom makes room for one more session; false if there is none.
func (t *TPM) makeRoom() bool {
	if len(t.sessions.all) < maxAllSessions {
		return true
	}
	one := t.sessions.oldest(true)
	if one == nil {
		return false
	}
	t.forget(one)
	return true
}

// give marks a session as saved by its owner, and flushes the oldest such one if they are too many.
func (t *TPM) give(one *session) {
	t.sessions.saves++
	one.context, one.given, one.savedAt = nil, true, t.sessions.saves
	if t.sessions.given() > maxGivenSessions {
		t.forget(t.sessions.oldest(true))
	}
}
