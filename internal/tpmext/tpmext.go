// Package tpmext reads and extends PCRs of a TPM 2.0 or 1.2, over go-tpm's transport.
//
// Open connects to a device, a Unix socket or a TCP port, and keeps that one connection: swtpm serves one client at a time, and
// a new connection for each command costs half as much again. Commands are sent one at a time, in the order of the calls.
//
// Open finds out which of the two it talks to. A TPM 1.2 has one bank, SHA-1, and its device admits one program at a time: that one is
// open during commands only, each waits for a moment if another program has it, and while that goes on it is ErrUnavailable. Commands
// of a TPM 2.0 that a TPM 1.2 does not know are ErrVersion.
//
// It promises that Extend extends all active banks by one command, or tells that it does not know: after ErrUnavailable a
// command may or may not have been carried out. The caller then calls Reopen and reads the register before it extends again.
// Only what the TPM asks to have again, having done nothing (TPM_RC_RETRY, TPM_RC_YIELDED, TPM_RC_TESTING), is sent again.
// Registers that are read together are of one moment, by the TPM's update counter.
//
// A TPM is itself a transport.TPM: any command of go-tpm's tpm2 can be run on it, between the extends.
//
// Source: TCG TPM 2.0 Library, Part 3, section 22 (PCR commands), Part 2, section 6.6 (response codes); tpm12.go names TPM 1.2's.
package tpmext

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
)

var (
	// ErrUnavailable means that the connection is lost: whether the command was carried out is not known. Reopen may help.
	ErrUnavailable = errors.New("TPM unavailable")
	// ErrFailureMode means that the TPM refuses everything until it is reset, since its self-test failed: TPM_RC_FAILURE.
	ErrFailureMode = errors.New("TPM in failure mode; only a reset of the machine (or a restart of swtpm) brings it back")
	// ErrNotStarted means that nobody sent TPM2_Startup: TPM_RC_INITIALIZE.
	ErrNotStarted = errors.New("TPM not started; the firmware does that, for swtpm the flag startup-clear")
	// ErrVersion means that the TPM is a TPM 1.2, which does not know the command.
	ErrVersion = errors.New("a TPM 1.2, which can't do that; use a TPM 2.0")
	// ErrUnstable means that each time registers were read by several commands, another program extended between them.
	ErrUnstable = errors.New("the PCRs keep changing")
)

// openTimeout bounds connecting and the first command, so that a TPM which is there and silent is noticed. A device's driver gives up on
// that command much earlier, as soon as a machine has too much to do: it is sent again.
const openTimeout = 10 * time.Second

// TPM is a connection to a TPM. Its methods may be called from several goroutines.
type TPM struct {
	address string
	dial    Dialer
	pauses  pauses

	mu     sync.Mutex          // held while a command runs; guards what follows
	conn   transport.TPMCloser // nil while the connection is lost
	banks  []ima.HashAlgo      // active, in the TPM's order
	closed bool
	tpm12  bool   // it is a TPM 1.2
	lent   bool   // its device is open during commands only
	extend []byte // scratch: the TPM2_PCR_Extend being sent
}

// Open connects to the TPM at an address: a device's path such as /dev/tpmrm0, "unix:PATH" or "tcp:HOST:PORT" (swtpm's data
// channel). It fails if the TPM does not answer, has no active PCR bank, or has not been started.
func Open(ctx context.Context, address string) (*TPM, error) {
	dial, err := NewDialer(address)
	if err != nil {
		return nil, err
	}
	return OpenDialer(ctx, address, dial)
}

// OpenDialer is Open for a TPM that is reached in another way; address stands for it in messages.
func OpenDialer(ctx context.Context, address string, dial Dialer) (*TPM, error) {
	t := &TPM{address: address, dial: dial, pauses: retryPauses}
	if isDevice12(address) {
		t.tpm12, t.lent, t.banks = true, true, []ima.HashAlgo{ima.SHA1}
	}
	if err := t.Reopen(ctx); err != nil {
		return nil, err
	}
	return t, nil
}

// Address returns the address given to Open.
func (t *TPM) Address() string { return t.address }

// Reopen drops the connection, if there is one, and makes a new one. Errors: ErrUnavailable if the TPM can't be reached or does
// not answer, ErrNotStarted, ErrFailureMode.
func (t *TPM) Reopen(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return fmt.Errorf("open TPM %s: %w: closed", t.address, ErrUnavailable)
	}
	t.drop()
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if t.lent { // there is nothing to connect between commands
		if _, err := t.read12(ctx, 0); err != nil {
			return fmt.Errorf("open TPM %s: %w", t.address, err)
		}
		return nil
	}
	banks, err := t.connect(ctx)
	for errors.Is(err, unix.ETIME) && ctx.Err() == nil { // the kernel gave up on a command, which took more than 750 ms
		banks, err = t.connect(ctx)
	}
	if err == nil && len(banks) == 0 {
		err = errors.New("no active PCR bank; allocate one (tpm2_pcrallocate sha256:all) and reset the TPM")
	}
	if err != nil {
		t.drop()
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("%w; is another program connected? swtpm serves one at a time", err)
		}
		return fmt.Errorf("open TPM %s: %w", t.address, err)
	}
	t.banks = banks
	return nil
}

// connect makes a connection and has the TPM say which banks are active. t.mu is held.
func (t *TPM) connect(ctx context.Context) ([]ima.HashAlgo, error) {
	conn, err := t.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	t.conn = conn
	banks, err := t.activeBanks(ctx)
	if errors.Is(err, ErrVersion) {
		banks, err = []ima.HashAlgo{ima.SHA1}, t.open12(ctx)
	}
	return banks, err
}

// drop gives up the connection. t.mu is held.
func (t *TPM) drop() {
	if t.conn != nil {
		t.conn.Close() // its error says nothing that the command's did not
		t.conn = nil
	}
}

// Close ends the connection for good; it waits for a command under way.
func (t *TPM) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.drop()
	return nil
}

// Banks returns the hash algorithms of the active PCR banks, in the TPM's order.
func (t *TPM) Banks() []ima.HashAlgo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.banks)
}
