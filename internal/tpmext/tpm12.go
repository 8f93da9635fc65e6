package tpmext

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
)

// What follows is of a TPM 1.2. Its registers are of one bank, SHA-1. Source: TCG TPM Main Part 3 (commands), section 16; Part 2
// (structures), sections 6 (tags) and 16 (return codes).
const (
	tagRequest12     = 0x00c1 // TPM_TAG_RQU_COMMAND: a command without authorization
	ordinalExtend12  = 0x14   // TPM_ORD_Extend
	ordinalPCRRead12 = 0x15   // TPM_ORD_PcrRead
)

// Return codes of a TPM 1.2 that something is decided by.
const (
	failedSelfTest12 = tpm2.TPMRC(0x1c)  // TPM_FAILEDSELFTEST
	notStarted12     = tpm2.TPMRC(0x26)  // TPM_INVALID_POSTINIT
	retry12          = tpm2.TPMRC(0x800) // TPM_RETRY
	testing12        = tpm2.TPMRC(0x802) // TPM_DOING_SELFTEST
)

// Code12 is a TPM 1.2's return code that stands for no other error of this package.
type Code12 uint32

// Error returns the code as the specification's tables have it.
func (c Code12) Error() string {
	return fmt.Sprintf("TPM 1.2 return code %#x; TPM Main Part 2, section 16, names it", uint32(c))
}

// error12 is what a TPM 1.2's return code means; nil for success.
func error12(rc tpm2.TPMRC) error {
	switch rc {
	case tpm2.TPMRCSuccess:
		return nil
	case failedSelfTest12:
		return ErrFailureMode
	case notStarted12:
		return ErrNotStarted
	}
	return Code12(rc)
}

// command12 sends a command on one register and returns the register's value, with which a TPM 1.2 answers both of them.
func (t *TPM) command12(ctx context.Context, ordinal uint32, pcr int, parameter []byte) (ima.Digest, error) {
	size := ima.SHA1.Size()
	b := binary.BigEndian.AppendUint16(nil, tagRequest12)
	b = binary.BigEndian.AppendUint32(b, uint32(headerSize+4+len(parameter)))
	b = binary.BigEndian.AppendUint32(b, ordinal)
	b = binary.BigEndian.AppendUint32(b, uint32(pcr))
	response, err := t.roundTrip(ctx, append(b, parameter...))
	if err != nil {
		return ima.Digest{}, err
	}
	if err := error12(responseCode(response)); err != nil {
		return ima.Digest{}, err
	}
	if len(response) != headerSize+size {
		return ima.Digest{}, fmt.Errorf("a response of %d bytes, want %d", len(response), headerSize+size)
	}
	return ima.NewDigest(ima.SHA1, response[headerSize:])
}

// extend12 extends by TPM_Extend (Part 3, section 16.1).
func (t *TPM) extend12(ctx context.Context, pcr int, d ima.Digest) error {
	_, err := t.command12(ctx, ordinalExtend12, pcr, d.Bytes())
	return err
}

// read12 reads a register by TPM_PcrRead (Part 3, section 16.2), or has the kernel do that, whose own commands nobody keeps out.
func (t *TPM) read12(ctx context.Context, pcr int) (ima.Digest, error) {
	d, err := t.command12(ctx, ordinalPCRRead12, pcr, nil)
	if errors.Is(err, unix.EBUSY) {
		path := filepath.Join(sysfsOf(t.address), "pcr-sha1", strconv.Itoa(pcr))
		if b, sysfsErr := os.ReadFile(path); sysfsErr == nil {
			return sysfsDigest(path, b)
		}
	}
	return d, err
}

func sysfsDigest(path string, text []byte) (ima.Digest, error) {
	value, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		return ima.Digest{}, fmt.Errorf("read %s: %w", path, err)
	}
	return ima.NewDigest(ima.SHA1, value)
}

// readPCRs12 reads registers, twice if they are several: a TPM 1.2 has no update counter, but a register that is what it was has
// not been extended, so what is the same in two rounds was so all at once between them.
func (t *TPM) readPCRs12(ctx context.Context, pcrs []int) (map[int]map[ima.HashAlgo]ima.Digest, error) {
	var before map[int]ima.Digest
	for range unstableTries {
		now := make(map[int]ima.Digest)
		for _, pcr := range pcrs {
			d, err := t.read12(ctx, pcr)
			if err != nil {
				return nil, err
			}
			now[pcr] = d
		}
		if len(pcrs) < 2 || maps.Equal(now, before) {
			values := make(map[int]map[ima.HashAlgo]ima.Digest)
			for pcr, d := range now {
				values[pcr] = map[ima.HashAlgo]ima.Digest{ima.SHA1: d}
			}
			return values, nil
		}
		before = now
	}
	return nil, fmt.Errorf("%w: %d reads were overtaken by extends of another program", ErrUnstable, unstableTries)
}

// open12 finds out whether a TPM that does not know TPM 2.0's commands is a TPM 1.2 that can be used. Its device, which admits one
// program at a time and has no resource manager, is opened for each command.
func (t *TPM) open12(ctx context.Context) error {
	t.tpm12 = true
	_, t.lent = t.conn.(*device)
	_, err := t.read12(ctx, 0)
	return err
}

// sysfsOf is the kernel's folder of a TPM's device.
func sysfsOf(address string) string { return filepath.Join("/sys/class/tpm", filepath.Base(address)) }

// isDevice12 reports whether an address is a device of a TPM 1.2 as the kernel says, so that it need not be opened for that:
// another program may have it.
func isDevice12(address string) bool {
	if !strings.HasPrefix(address, "/dev/") {
		return false
	}
	b, err := os.ReadFile(filepath.Join(sysfsOf(address), "tpm_version_major"))
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// lentPauses is how long a command waits for a device that another program has.
var lentPauses = pauses{first: time.Millisecond, longest: 20 * time.Millisecond, total: time.Second}

// borrow opens a device that is open during commands only. Nothing has been sent when it fails.
func (t *TPM) borrow(ctx context.Context) error {
	begun, pause := time.Now(), lentPauses.first
	for {
		conn, err := t.dial(ctx)
		if err == nil {
			t.conn = conn
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Since(begun)+pause > lentPauses.total {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w, after %w", ErrUnavailable, ctx.Err(), err)
		}
		pause = min(2*pause, lentPauses.longest)
	}
}
