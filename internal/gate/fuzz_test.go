package gate

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
)

// FuzzKindOf: any file of a container's has a kind, without a panic; one that is none of ELF's is other.
func FuzzKindOf(f *testing.F) {
	own, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own[:4096])
	f.Add([]byte("#!/bin/sh\n"))
	f.Fuzz(func(t *testing.T, file []byte) {
		kind := kindOf(bytes.NewReader(file))
		if kind != other && !bytes.HasPrefix(file, []byte(elf.ELFMAG)) {
			t.Fatalf("a file that begins with %q is taken for kind %d", file[:min(len(file), 4)], kind)
		}
	})
}

// FuzzStatus: what a task's status says is numbers or nothing, whatever the task calls itself.
func FuzzStatus(f *testing.F) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(text))
	f.Add("Name:\ta:b\nTgid:\t7\nUid:\t1\t2\t3\t4\nCapEff:\t00000000000000ff\n")
	f.Fuzz(func(t *testing.T, text string) {
		s := parseStatus(text)
		s.number("Tgid")
		s.hex("CapEff")
		if ids := s.numbers("Uid"); len(ids) > len(s["Uid"]) {
			t.Fatalf("%d ids in %q", len(ids), s["Uid"])
		}
	})
}

// FuzzHeard: whatever a guard is told, one message after the other, each of a size before it, it closes each descriptor that it was given
// once, when the group is removed or with the guard.
func FuzzHeard(f *testing.F) {
	name := appendName(nil, event.MountNS{Inum: 7, ID: 1})
	message := func(parts ...[]byte) []byte {
		whole := bytes.Join(parts, nil)
		return append([]byte{byte(len(whole))}, whole...)
	}
	add, remove := message([]byte{sayAdd}, name), message([]byte{sayRemove}, name)
	f.Add(append(bytes.Clone(add), remove...))
	f.Add(append(bytes.Clone(add), add...))
	f.Add(append(message([]byte{sayAddClosed}, name), append(message([]byte{sayLeave}, nil), remove...)...))
	f.Add(append(message([]byte{sayAnswered}, binary.LittleEndian.AppendUint32(nil, 3)), message([]byte{sayLeave}, nil)...))
	f.Add(append(message([]byte{sayAlive}), remove...))
	f.Fuzz(func(t *testing.T, messages []byte) {
		null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(null)
		w := &watch{conn: -1, null: null, groups: make(map[event.MountNS]*group), waiting: make(map[int32]waiting)}
		before := descriptors(t)
		for len(messages) > 0 {
			n := min(int(messages[0]), len(messages)-1, messageSize)
			message := messages[1 : 1+n]
			messages = messages[1+n:]
			if n == 0 {
				continue // an agent that has ended
			}
			var oob []byte
			given := -1
			if message[0] == sayAdd || message[0] == sayAddClosed { // the kernel puts a descriptor in, not whoever writes the message
				if given, err = unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, 0); err != nil {
					t.Fatal(err)
				}
				oob = unix.UnixRights(given)
			}
			if err := w.heard(message, oob); err != nil {
				t.Fatalf("%q: %v", message, err)
			}
		}
		for _, g := range w.all() {
			g.close()
		}
		if after := descriptors(t); after != before {
			t.Fatalf("%d descriptors are open, %d were before", after, before)
		}
	})
}

// descriptors counts those of /dev/null: what else fuzzing opens comes and goes.
func descriptors(t *testing.T) (n int) {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		if to, err := os.Readlink("/proc/self/fd/" + one.Name()); err == nil && to == "/dev/null" {
			n++
		}
	}
	return n
}

// FuzzHandedOn: what the agent takes for a question is what a guard says that has it.
func FuzzHandedOn(f *testing.F) {
	whole := handedOn{event.MountNS{Inum: 4026532281, ID: 7}, 4422, 9, true}.append(nil)
	f.Add(whole)
	f.Add(whole[:messageSize])
	f.Add([]byte{sayDropped})
	f.Fuzz(func(t *testing.T, message []byte) {
		h, ok := handedOnIn(message)
		if said := h.append(nil); ok && !bytes.Equal(said, message) {
			t.Fatalf("%+v of %x is said as %x", h, message, said)
		}
	})
}

// FuzzGuardState: which guard an agent had is read as it was recorded, or refused and nobody is ended.
func FuzzGuardState(f *testing.F) {
	f.Add([]byte(`{"pid":4422,"start":"123456"}`))
	f.Add([]byte(`{"pid":-1}{}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		s, err := parseGuard(content)
		if err != nil {
			if s != (guardState{}) {
				t.Fatalf("%+v, though %v", s, err)
			}
			return
		}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseGuard(b); err != nil || again != s {
			t.Fatalf("recorded and read again: %+v, was %+v; %v", again, s, err)
		}
	})
}

// FuzzDescriptor: a control message has one descriptor, or it is refused.
func FuzzDescriptor(f *testing.F) {
	f.Add(unix.UnixRights(5))
	f.Add(unix.UnixRights(5, 6))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, oob []byte) {
		if fd, err := descriptorIn(oob); err == nil && len(oob) < unix.CmsgSpace(4)-4 {
			t.Fatalf("descriptor %d in %d bytes", fd, len(oob))
		} else if err != nil && fd != -1 {
			t.Fatalf("descriptor %d with error %v", fd, err)
		}
	})
}
