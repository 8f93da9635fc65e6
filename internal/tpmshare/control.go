package tpmshare

import (
	"encoding/binary"
	"io"
	"net"
	"time"
)

// Commands of swtpm's control channel: u32 code, then what the command takes; the answer is u32 result, then what it gives. Big
// endian. Source: swtpm's include/swtpm/tpm_ioctl.h, "Commands used by the non-CUSE TPMs".
//
// The TCG software stack's swtpm interface sends CMD_SET_LOCALITY(0) as it begins, each command on a connection of its own, and
// CMD_INIT only if it is asked to reset the TPM. IBM's sends nothing here (TPM_SERVER_TYPE=raw).
const (
	ctrlGetCapability     = 0x01
	ctrlGetTPMEstablished = 0x04
	ctrlSetLocality       = 0x05
	ctrlCancelTPMCommand  = 0x09
	ctrlGetConfig         = 0x0f
	ctrlSetBufferSize     = 0x11
)

// Bits of CMD_GET_CAPABILITY's answer, one for each of the commands above but itself.
const ctrlCapabilities = 1<<2 | 1<<3 | 1<<5 | 1<<11 | 1<<13

// Results of TPM 1.2, which the control channel has. Source: TPM Main Part 2, section 16.
const (
	ctrlBadOrdinal  = 0x0a
	ctrlBadLocality = 0x3d
)

// serveControl answers the commands that change nothing, as swtpm would, until the client ends the connection or sends another:
// that is refused, and the connection ended, because what follows it is not known. The limit is for each command.
func serveControl(conn net.Conn, limit time.Duration) {
	for {
		if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
			return
		}
		var code [4]byte
		if _, err := io.ReadFull(conn, code[:]); err != nil {
			return
		}
		response, last, err := control(binary.BigEndian.Uint32(code[:]), conn)
		if err != nil {
			return
		}
		if _, err := conn.Write(response); err != nil || last {
			return
		}
	}
}

// control reads what a command takes, and returns the answer, and whether it is the last.
func control(code uint32, r io.Reader) (response []byte, last bool, err error) {
	switch code {
	case ctrlGetCapability: // u64 capabilities, of which the upper half is the result
		return binary.BigEndian.AppendUint64(nil, ctrlCapabilities), false, nil
	case ctrlGetTPMEstablished: // u8 bit: no measured launch, and padding
		return make([]byte, 8), false, nil
	case ctrlSetLocality:
		var locality [1]byte
		if _, err := io.ReadFull(r, locality[:]); err != nil {
			return nil, false, err
		}
		if locality[0] != 0 {
			return binary.BigEndian.AppendUint32(nil, ctrlBadLocality), false, nil
		}
		return make([]byte, 4), false, nil
	case ctrlCancelTPMCommand: // nothing is cancelled: it may be another's
		return make([]byte, 4), false, nil
	case ctrlGetConfig: // u32 flags: no keys
		return make([]byte, 8), false, nil
	case ctrlSetBufferSize: // u32 size, 0 to ask; the answer is the size, the least and the most
		var size [4]byte
		if _, err := io.ReadFull(r, size[:]); err != nil {
			return nil, false, err
		}
		response := make([]byte, 4)
		for range 3 {
			response = binary.BigEndian.AppendUint32(response, maxCommand)
		}
		return response, false, nil
	}
	return binary.BigEndian.AppendUint32(nil, ctrlBadOrdinal), true, nil
}
