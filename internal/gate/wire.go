package gate

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
)

// The agent tells its guard, a message each: a byte of these and a group's name, which is a number in 8 bytes and the namespace's inode number
// in 4, little endian, or for sayAnswered a question's number in 4.
const (
	sayAdd       = 'a' // with the group's descriptor (SCM_RIGHTS)
	sayAddClosed = 'c' // the same, of a gate that is closed while nobody answers
	sayRemove    = 'r'
	sayAlive     = 'h' // alone; the guard says it back
	sayLeave     = 'l' // alone; closed gates are not removed any more, but held so when the agent has ended
	sayAnswered  = 'n' // alone but for the number
	// And the guard the agent:
	sayAsked   = 'q' // the group, the task in 4 bytes, the question's number in 4, 1 in one if the file is to run; with the file's descriptor
	sayDropped = 'd' // alone; it took the agent for hanging and let all through
)

const (
	messageSize  = 1 + 8 + 4
	askedSize    = messageSize + 4 + 4 + 1
	answeredSize = 1 + 4
)

// appendName adds a group's name to a message.
func appendName(message []byte, name event.MountNS) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(message, name.ID), name.Inum)
}

// nameIn returns the group's name in a message.
func nameIn(message []byte) event.MountNS {
	return event.MountNS{ID: binary.LittleEndian.Uint64(message[1:]), Inum: binary.LittleEndian.Uint32(message[9:])}
}

// handedOn is a question that the guard does not answer itself.
type handedOn struct {
	group  event.MountNS // by its name
	task   uint32
	number int32 // what the answer names
	exec   bool  // the file is to run
}

// append adds the question to a message.
func (h handedOn) append(message []byte) []byte {
	message = appendName(append(message, sayAsked), h.group)
	message = binary.LittleEndian.AppendUint32(message, h.task)
	message = binary.LittleEndian.AppendUint32(message, uint32(h.number))
	if h.exec {
		return append(message, 1)
	}
	return append(message, 0)
}

// handedOnIn returns the question in a message; false: there is none.
func handedOnIn(message []byte) (handedOn, bool) {
	if len(message) != askedSize || message[0] != sayAsked || message[askedSize-1] > 1 {
		return handedOn{}, false
	}
	task, number := binary.LittleEndian.Uint32(message[messageSize:]), binary.LittleEndian.Uint32(message[messageSize+4:])
	return handedOn{nameIn(message), task, int32(number), message[askedSize-1] == 1}, true
}

// descriptorIn returns the one descriptor of a control message.
func descriptorIn(oob []byte) (int, error) {
	controls, err := unix.ParseSocketControlMessage(oob)
	if err == nil && len(controls) == 1 && len(controls[0].Data)%4 == 0 { // ParseUnixRights takes that for granted
		var fds []int
		if fds, err = unix.ParseUnixRights(&controls[0]); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, fmt.Errorf("a message without a descriptor: %w", cmp.Or(err, errors.ErrUnsupported))
}

// control calls f with a file's descriptor, which stays open meanwhile. Unlike Fd it leaves the file's mode alone.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := raw.Control(func(fd uintptr) { result = f(int(fd)) }); err != nil {
		return err
	}
	return result
}

// respond answers a question of a group by its number. unix.ENOENT: there is none.
func respond(group int, number int32, allow bool) error {
	r := unix.FanotifyResponse{Fd: number, Response: unix.FAN_DENY}
	if allow {
		r.Response = unix.FAN_ALLOW
	}
	_, err := unix.Write(group, (*[unsafe.Sizeof(r)]byte)(unsafe.Pointer(&r))[:])
	return err
}

// unmark takes all of a group's marks on file systems off.
func unmark(group int) error {
	return unix.FanotifyMark(group, unix.FAN_MARK_FLUSH|unix.FAN_MARK_FILESYSTEM, 0, unix.AT_FDCWD, "")
}
