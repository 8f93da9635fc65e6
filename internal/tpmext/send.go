package tpmext

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// pauses is how long to wait before a command is sent again, and when to give up.
type pauses struct {
	first, longest, total time.Duration
}

// retryPauses gives a hardware TPM that is testing itself the seconds that it may take.
var retryPauses = pauses{first: time.Millisecond, longest: 250 * time.Millisecond, total: 30 * time.Second}

// Send implements transport.TPM, for commands that this package has no method for. The response code is the caller's to read.
func (t *TPM) Send(input []byte) ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.roundTrip(context.Background(), input)
}

// command is the TPM for the length of one method call, with the call's context; t.mu is held. It implements transport.TPM.
type command struct {
	t   *TPM
	ctx context.Context
}

// Send implements transport.TPM.
func (c command) Send(input []byte) ([]byte, error) { return c.t.roundTrip(c.ctx, input) }

// roundTrip sends a command, again if the TPM asks for that, and returns a response with a whole header. t.mu is held.
func (t *TPM) roundTrip(ctx context.Context, input []byte) ([]byte, error) {
	begun, pause := time.Now(), t.pauses.first
	for {
		response, err := t.sendOnce(ctx, input)
		if err != nil {
			return nil, err
		}
		rc := responseCode(response)
		if !askedToRetry(rc) || time.Since(begun)+pause > t.pauses.total {
			return response, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done(): // the TPM did nothing, and the connection is good
			return nil, fmt.Errorf("%w, after %w", ctx.Err(), rc)
		}
		pause = min(2*pause, t.pauses.longest)
	}
}

// sendOnce sends a command. After an error the connection is gone: a response that comes late must not be taken for that of
// the next command.
func (t *TPM) sendOnce(ctx context.Context, input []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err // nothing was sent
	}
	if t.lent && !t.closed {
		if err := t.borrow(ctx); err != nil {
			return nil, err
		}
		defer t.drop()
	}
	if t.conn == nil {
		return nil, fmt.Errorf("%w: no connection to %s", ErrUnavailable, t.address)
	}
	conn := t.conn
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	response, err := conn.Send(input)
	if !stop() { // closed, or about to be
		t.conn = nil
		if err != nil {
			err = ctx.Err()
		}
	}
	if err == nil && len(response) < headerSize {
		err = fmt.Errorf("a response of %d bytes", len(response))
	}
	if err != nil {
		t.drop()
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return response, nil
}

// responseCode reads a whole header's last field.
func responseCode(response []byte) tpm2.TPMRC {
	return tpm2.TPMRC(binary.BigEndian.Uint32(response[6:]))
}

// askedToRetry reports whether the TPM did nothing and wants the same command again. Source: Part 2, section 6.6.3. What a TPM 1.2
// says then is no code of a TPM 2.0.
func askedToRetry(rc tpm2.TPMRC) bool {
	return rc == tpm2.TPMRCRetry || rc == tpm2.TPMRCYielded || rc == tpm2.TPMRCTesting || rc == retry12 || rc == testing12
}

// tpm12Codes is where the response codes of a TPM 1.2 end and those of a TPM 2.0 begin. Source: Part 2, section 6.6.2.
const tpm12Codes = tpm2.TPMRC(0x100)

// named says what failed, and names the response codes that callers decide by.
func named(name string, err error) error {
	var rc tpm2.TPMRC
	switch {
	case errors.As(err, &rc) && rc < tpm12Codes:
		return fmt.Errorf("%s: %w", name, ErrVersion)
	case errors.Is(err, tpm2.TPMRCFailure):
		return fmt.Errorf("%s: %w", name, ErrFailureMode)
	case errors.Is(err, tpm2.TPMRCInitialize):
		return fmt.Errorf("%s: %w", name, ErrNotStarted)
	}
	return fmt.Errorf("%s: %w", name, err)
}
