package tpmshare

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/tpmext/tpmtest"
)

// What is answered is answered as swtpm does, but for the capabilities; all else is refused, and changes nothing.
func TestControlChannel(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	s := start(t, tpm)
	var r replay
	r.extend(t, agent)
	real := tpmtest.Start(t)
	for name, c := range map[string]struct {
		command []byte
		want    []byte // nil: what swtpm answers
	}{
		"GET_CAPABILITY":       {[]byte{0, 0, 0, 1}, []byte{0, 0, 0, 0, 0, 0, 0x28, 0x2c}},
		"GET_TPMESTABLISHED":   {[]byte{0, 0, 0, 4}, nil},
		"SET_LOCALITY 0":       {[]byte{0, 0, 0, 5, 0}, nil},
		"SET_LOCALITY 4":       {[]byte{0, 0, 0, 5, 4}, []byte{0, 0, 0, ctrlBadLocality}},
		"CANCEL_TPM_CMD":       {[]byte{0, 0, 0, 9}, nil},
		"GET_CONFIG":           {[]byte{0, 0, 0, 15}, nil},
		"an unknown one":       {[]byte{0, 0, 0, 0x77}, nil},
		"INIT":                 {[]byte{0, 0, 0, 2, 0, 0, 0, 1}, []byte{0, 0, 0, ctrlBadOrdinal}},
		"SHUTDOWN":             {[]byte{0, 0, 0, 3}, []byte{0, 0, 0, ctrlBadOrdinal}},
		"HASH_START":           {[]byte{0, 0, 0, 6}, []byte{0, 0, 0, ctrlBadOrdinal}},
		"STORE_VOLATILE":       {[]byte{0, 0, 0, 10}, []byte{0, 0, 0, ctrlBadOrdinal}},
		"RESET_TPMESTABLISHED": {[]byte{0, 0, 0, 11, 0}, []byte{0, 0, 0, ctrlBadOrdinal}},
		"GET_STATEBLOB":        {append([]byte{0, 0, 0, 12}, make([]byte, 12)...), []byte{0, 0, 0, ctrlBadOrdinal}},
		"SET_STATEBLOB":        {append([]byte{0, 0, 0, 13}, make([]byte, 12)...), []byte{0, 0, 0, ctrlBadOrdinal}},
		"STOP":                 {[]byte{0, 0, 0, 14}, []byte{0, 0, 0, ctrlBadOrdinal}},
		"SET_DATAFD":           {[]byte{0, 0, 0, 16}, []byte{0, 0, 0, ctrlBadOrdinal}},
		"GET_INFO":             {append([]byte{0, 0, 0, 18}, make([]byte, 16)...), []byte{0, 0, 0, ctrlBadOrdinal}},
		"LOCK_STORAGE":         {[]byte{0, 0, 0, 19, 0, 0, 0, 1}, []byte{0, 0, 0, ctrlBadOrdinal}},
	} {
		if c.want == nil {
			c.want = controlExchange(t, dialControl(t, real), c.command)
		}
		if got := controlExchange(t, s.dial(controlAddress), c.command); !bytes.Equal(got, c.want) {
			t.Errorf("%s: %x, want %x", name, got, c.want)
		}
	}
	// The size that can be chosen of swtpm's buffer is one here.
	if got := controlExchange(t, s.dial(controlAddress), []byte{0, 0, 0, 17, 0, 0, 0, 0}); len(got) != 16 || got[6] != 0x10 {
		t.Errorf("SET_BUFFERSIZE: %x", got)
	}
	r.extend(t, agent)
	r.check(t, agent)
}

func dialControl(t *testing.T, s *tpmtest.Swtpm) net.Conn {
	t.Helper()
	dir, err := os.Open(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/tpm.ctrl", dir.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// controlExchange sends a command, and reads until nothing more comes.
func controlExchange(t *testing.T, conn net.Conn, command []byte) []byte {
	t.Helper()
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write(command); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := conn.Read(b)
	if err != nil && err != io.EOF {
		t.Fatalf("%x: %v", command, err)
	}
	return b[:n]
}
