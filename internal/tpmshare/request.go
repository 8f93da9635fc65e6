package tpmshare

import (
	"encoding/binary"

	"github.com/google/go-tpm/tpm2"
)

// headerSize is that of a command's and of a response's header: u16 tag, u32 size of the whole, u32 command or response code; big
// endian, as all that follows. Source: Part 1, section 18.
const headerSize = 10

// maxCommand is the size of the longest command that is passed on, swtpm's TPM_PT_MAX_COMMAND_SIZE.
const maxCommand = 4096

// maxSessions is how many sessions an authorization area has at most. Source: Part 1, section 18.
const maxSessions = 3

// minAuthorization is the size of the shortest authorization: u32 handle, u16 nonce size, u8 attributes, u16 HMAC size.
const minAuthorization = 9

// badTag is TPM_RC_BAD_TAG, which go-tpm has no name for. The response to it has the tag of TPM 1.2. Source: Part 2, section 6.6.3.
const badTag tpm2.TPMRC = 0x1E

// request is a client's command, taken apart as far as it has to be.
type request struct {
	*command
	code    tpm2.TPMCC
	raw     []byte            // the whole; the handles in it are changed before it is sent
	handle  [3]tpm2.TPMHandle // the handle area: the first command.handles of them
	session []tpm2.TPMHandle  // the sessions that the authorization area names
	tagged  bool              // TPM_ST_SESSIONS: it has an authorization area
	params  []byte            // the parameter area
}

// parseRequest takes a command apart: one whose size field is its size, that this package knows, and whose handle and authorization
// areas lie within it. Else it returns the response code that a TPM answers with. What the parameters hold is the TPM's to check.
func parseRequest(raw []byte) (*request, tpm2.TPMRC) {
	if len(raw) < headerSize {
		return nil, tpm2.TPMRCCommandSize
	}
	tag := tpm2.TPMST(binary.BigEndian.Uint16(raw))
	if tag != tpm2.TPMSTNoSessions && tag != tpm2.TPMSTSessions {
		return nil, badTag
	}
	if binary.BigEndian.Uint32(raw[2:]) != uint32(len(raw)) || len(raw) > maxCommand {
		return nil, tpm2.TPMRCCommandSize
	}
	q := &request{raw: raw, code: tpm2.TPMCC(binary.BigEndian.Uint32(raw[6:])), tagged: tag == tpm2.TPMSTSessions}
	q.command = commands[q.code]
	if q.command == nil {
		return nil, tpm2.TPMRCCommandCode
	}
	rest := raw[headerSize:]
	for i := range q.handles {
		if len(rest) < 4 {
			return nil, atHandle(tpm2.TPMRCInsufficient, i)
		}
		q.handle[i] = tpm2.TPMHandle(binary.BigEndian.Uint32(rest))
		rest = rest[4:]
	}
	if !q.tagged {
		q.params = rest
		return q, tpm2.TPMRCSuccess
	}
	if len(rest) < 4 {
		return nil, tpm2.TPMRCAuthSize
	}
	size := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	if size < minAuthorization || uint64(size) > uint64(len(rest)) {
		return nil, tpm2.TPMRCAuthSize
	}
	q.params = rest[size:]
	return q, q.parseAuthorizations(rest[:size])
}

// parseAuthorizations reads an authorization area behind its size.
func (q *request) parseAuthorizations(area []byte) tpm2.TPMRC {
	for len(area) > 0 {
		if len(area) < minAuthorization || len(q.session) == maxSessions {
			return tpm2.TPMRCAuthSize
		}
		q.session = append(q.session, tpm2.TPMHandle(binary.BigEndian.Uint32(area)))
		nonce := int(binary.BigEndian.Uint16(area[4:]))
		if len(area) < minAuthorization+nonce {
			return tpm2.TPMRCAuthSize
		}
		area = area[7+nonce:] // u32 handle, u16 size, nonce, u8 attributes
		hmac := int(binary.BigEndian.Uint16(area))
		if len(area) < 2+hmac {
			return tpm2.TPMRCAuthSize
		}
		area = area[2+hmac:]
	}
	return tpm2.TPMRCSuccess
}

// setHandle changes a handle of the handle area.
func (q *request) setHandle(i int, h tpm2.TPMHandle) {
	binary.BigEndian.PutUint32(q.raw[headerSize+4*i:], uint32(h))
}

// handleType returns what a handle is of. Source: Part 2, section 7.2 (TPM_HT).
func handleType(h tpm2.TPMHandle) tpm2.TPMHT { return tpm2.TPMHT(h >> 24) }

func isTransient(h tpm2.TPMHandle) bool { return handleType(h) == tpm2.TPMHTTransient }

func isSession(h tpm2.TPMHandle) bool {
	return handleType(h) == tpm2.TPMHTHMACSession || handleType(h) == tpm2.TPMHTPolicySession
}

// atHandle says which handle of the handle area, from 0 on, a response code of format 1 is about. Source: Part 2, section 6.6.1.
func atHandle(rc tpm2.TPMRC, i int) tpm2.TPMRC { return rc | tpm2.TPMRC(i+1)<<8 }

// atParameter says the same of a parameter.
func atParameter(rc tpm2.TPMRC, i int) tpm2.TPMRC { return rc | 0x40 | tpm2.TPMRC(i+1)<<8 }

// answer returns a response without authorizations: a response code, and the parameters if it is success.
func answer(rc tpm2.TPMRC, params ...byte) []byte {
	tag := tpm2.TPMSTNoSessions
	if rc == badTag {
		tag = tpm2.TPMSTRspCommand
	}
	b := make([]byte, 0, headerSize+len(params))
	b = binary.BigEndian.AppendUint16(b, uint16(tag))
	b = binary.BigEndian.AppendUint32(b, uint32(headerSize+len(params)))
	b = binary.BigEndian.AppendUint32(b, uint32(rc))
	return append(b, params...)
}

// responseCode reads a whole header's last field.
func responseCode(response []byte) tpm2.TPMRC {
	return tpm2.TPMRC(binary.BigEndian.Uint32(response[6:]))
}
