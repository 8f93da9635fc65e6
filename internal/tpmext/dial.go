package tpmext

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"
)

// Dialer makes a connection to a TPM, at Open and at each Reopen.
type Dialer func(ctx context.Context) (transport.TPMCloser, error)

// headerSize is that of a command's and of a response's header: u16 tag, u32 size of the whole, u32 command or response code.
const headerSize = 10

// maxResponse is the kernel driver's buffer (TPM_BUFSIZE); no response is longer.
const maxResponse = 4096

// commandTimeout ends a command that a socket TPM never answers. It is above the longest that the TCG allows a command.
const commandTimeout = 5 * time.Minute

// NewDialer returns how to reach an address, as Open takes it: a path of a device, "unix:PATH" or "tcp:HOST:PORT".
func NewDialer(address string) (Dialer, error) {
	kind, rest, _ := strings.Cut(address, ":")
	switch {
	case strings.HasPrefix(address, "/"):
		return func(context.Context) (transport.TPMCloser, error) { return openDevice(address) }, nil
	case kind == "unix" && rest != "":
		return func(ctx context.Context) (transport.TPMCloser, error) { return dialUnix(ctx, rest) }, nil
	case kind == "tcp":
		if _, _, err := net.SplitHostPort(rest); err != nil {
			return nil, fmt.Errorf("TPM address %q: %w", address, err)
		}
		return func(ctx context.Context) (transport.TPMCloser, error) { return dialSocket(ctx, "tcp", rest) }, nil
	}
	return nil, fmt.Errorf("TPM address %q: give a device such as /dev/tpmrm0, unix:PATH or tcp:HOST:PORT", address)
}

// dialUnix connects to a socket whose path may be longer than the 107 bytes that a socket address has room for: then by way
// of a descriptor of its directory.
func dialUnix(ctx context.Context, path string) (transport.TPMCloser, error) {
	if len(path) < len(unix.RawSockaddrUnix{}.Path) {
		return dialSocket(ctx, "unix", path)
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", path, err)
	}
	defer unix.Close(dir)
	conn, err := dialSocket(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path)))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", path, err)
	}
	return conn, nil
}

func dialSocket(ctx context.Context, network, address string) (transport.TPMCloser, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &socket{conn: conn}, nil
}

// socket is a kept connection to swtpm's data channel, which carries bare commands and responses.
type socket struct {
	conn   net.Conn
	header [headerSize]byte
}

// Send implements transport.TPM: the whole command, then a response of the size that its header tells. The response is the
// caller's.
func (s *socket) Send(command []byte) ([]byte, error) {
	if err := s.conn.SetDeadline(time.Now().Add(commandTimeout)); err != nil {
		return nil, err
	}
	if _, err := s.conn.Write(command); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(s.conn, s.header[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(s.header[2:])
	if size < headerSize || size > maxResponse {
		return nil, fmt.Errorf("a response of %d bytes: whatever answers is no TPM", size)
	}
	response := make([]byte, size)
	copy(response, s.header[:])
	if _, err := io.ReadFull(s.conn, response[headerSize:]); err != nil {
		return nil, err
	}
	return response, nil
}

// Close implements io.Closer; it ends a Send that is under way.
func (s *socket) Close() error { return s.conn.Close() }
