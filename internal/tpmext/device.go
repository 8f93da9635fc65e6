package tpmext

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// device is a TPM behind the kernel's driver. The descriptor blocks and is kept from Go's poller, because with O_NONBLOCK the
// driver answers a read before the response is there with 0 bytes. Source: drivers/char/tpm/tpm-dev-common.c.
type device struct {
	path string
	mu   sync.Mutex // guards fd: Close waits for a Send under way, which nothing can interrupt
	fd   int        // -1: closed
}

func openDevice(path string) (*device, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("open %s: %w: it admits one program at a time and has one; a TPM 2.0 has /dev/tpmrm0, too, which admits many",
			path, err)
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("open %s: %w: this machine has no TPM 2.0 driver for it; look at `ls /dev/tpm*`", path, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("open %s: %w: run as root, or in a container allow the device", path, err)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &device{path: path, fd: fd}, nil
}

// Send implements transport.TPM. The driver takes a command by one write and gives its response by one read. A write that was
// interrupted is not repeated: the command may have run.
func (d *device) Send(command []byte) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return nil, fmt.Errorf("write %s: closed", d.path)
	}
	n, err := unix.Write(d.fd, command)
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", d.path, err)
	}
	if n != len(command) {
		return nil, fmt.Errorf("write %s: %d of %d bytes", d.path, n, len(command))
	}
	response := make([]byte, maxResponse)
	for {
		n, err = unix.Read(d.fd, response)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.path, err)
	}
	if n < headerSize || binary.BigEndian.Uint32(response[2:]) != uint32(n) {
		return nil, fmt.Errorf("read %s: %d bytes are no whole response", d.path, n)
	}
	return response[:n], nil
}

// Close implements io.Closer.
func (d *device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return nil
	}
	err := unix.Close(d.fd)
	d.fd = -1
	return err
}
