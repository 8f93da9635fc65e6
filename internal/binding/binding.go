package binding

import (
	"fmt"
	"strconv"

	"imans.dev/imans-agent/internal/ima"
)

// Names of the native list's entries. Critical data is named by its event, as in the kernel; the label, by which the kernel's
// policies choose, is in no list. Source: ima_measure_critical_data in security/integrity/ima/ima_main.c.
const (
	AttachName = "imans-vtpm"
	EndName    = "imans-vtpm-end"
)

// version is that of the format.
const version = 1

// ID says which attachment an entry is about: the Number-th vTPM of a namespace's list. It is comparable.
type ID struct {
	Inum   uint32 // of the mount namespace
	NSID   uint64 // the kernel's unique id of the namespace, which is not used again before the next boot
	Number uint32 // from 1
}

// Namespace returns the namespace as INUM:ID.
func (i ID) Namespace() string { return fmt.Sprintf("%d:%d", i.Inum, i.NSID) }

// String returns INUM:ID#NUMBER.
func (i ID) String() string { return fmt.Sprintf("%s#%d", i.Namespace(), i.Number) }

func (i ID) check() error {
	if i.Inum == 0 || i.NSID == 0 || i.Number == 0 {
		return fmt.Errorf("%v is no attachment: inode number, id and number are from 1", i)
	}
	return nil
}

// Version is that of the TPM library specification which a vTPM follows.
type Version uint32

// The versions.
const (
	TPM12 Version = 1
	TPM20 Version = 2
)

// String returns 1.2 or 2.0.
func (v Version) String() string {
	switch v {
	case TPM12:
		return "1.2"
	case TPM20:
		return "2.0"
	}
	return "version-" + strconv.FormatUint(uint64(v), 10)
}

// Way is how a container reaches its vTPM.
type Way uint32

// The ways.
const (
	Proxy  Way = 1 // a device of the kernel's vTPM proxy driver
	Socket Way = 2 // a socket in the container's network namespace
)

// String returns the way's name.
func (w Way) String() string {
	switch w {
	case Proxy:
		return "proxy"
	case Socket:
		return "socket"
	}
	return "way-" + strconv.FormatUint(uint64(w), 10)
}

// Cause is why a list has a vTPM no more.
type Cause uint32

// The causes.
const (
	Ended    Cause = 1 // the namespace has ended
	Released Cause = 2 // someone asked for it; the namespace goes on
	Lost     Cause = 3 // it died, and its PCRs with it
	Replaced Cause = 4 // the list went over to another
)

// String returns the cause's name.
func (c Cause) String() string {
	switch c {
	case Ended:
		return "ended"
	case Released:
		return "released"
	case Lost:
		return "lost"
	case Replaced:
		return "replaced"
	}
	return "cause-" + strconv.FormatUint(uint64(c), 10)
}

// Attach says that a namespace's list was given a vTPM.
type Attach struct {
	ID
	TPM Version
	Way Way
	PCR int // of the namespace's list, in the vTPM
	// Claimed by the container runtime; "" and none where not known.
	Container   string // id
	Image       string // reference
	ImageDigest ima.Digest
	// Names of the vTPM's keys; none for TPM 1.2, which has no Names.
	EK, AK Name
}

// End says that a namespace's list has a vTPM no more.
type End struct {
	ID
	Cause   Cause
	Entries uint64       // of the list, that the vTPM has got: Values are what they lead to
	Values  []ima.Digest // of the list's PCR at the end, by rising algorithm number; none if they could not be read
}

// maxPCR is the last register of a TPM that follows the PC Client platform's profile.
const maxPCR = 23

// maxText is how many bytes a text may have. An image reference has at most some 500.
const maxText = 4096

// maxValues is more banks than a TPM has.
const maxValues = 16

func (a *Attach) check() error {
	if err := a.ID.check(); err != nil {
		return err
	}
	switch {
	case a.TPM != TPM12 && a.TPM != TPM20:
		return fmt.Errorf("TPM %v is none of 1.2 and 2.0", a.TPM)
	case a.Way != Proxy && a.Way != Socket:
		return fmt.Errorf("%v is none of proxy and socket", a.Way)
	case a.PCR < 0 || a.PCR > maxPCR:
		return fmt.Errorf("PCR %d is not one of 0 to %d", a.PCR, maxPCR)
	case a.TPM == TPM12 && (a.EK != "" || a.AK != ""):
		return fmt.Errorf("a TPM 1.2 has no Names of keys")
	case a.TPM == TPM20 && (a.EK == "" || a.AK == ""):
		return fmt.Errorf("the Names of a TPM 2.0's EK and AK are missing")
	}
	return nil
}

func (e *End) check() error {
	if err := e.ID.check(); err != nil {
		return err
	}
	if e.Cause < Ended || e.Cause > Replaced {
		return fmt.Errorf("%v is none of ended, released, lost and replaced", e.Cause)
	}
	if len(e.Values) > maxValues {
		return fmt.Errorf("%d PCR values, at most %d are possible", len(e.Values), maxValues)
	}
	for i, v := range e.Values {
		if v.IsNone() || i > 0 && v.Algo() <= e.Values[i-1].Algo() {
			return fmt.Errorf("the PCR values are not one for each bank, by rising algorithm number")
		}
	}
	return nil
}

// parseDigest reads the one form that a digest has.
func parseDigest(text string) (ima.Digest, error) {
	d, err := ima.ParseDigest(text)
	if err == nil && d.String() != text {
		err = fmt.Errorf("digest %q: want small hexadecimal digits", text)
	}
	return d, err
}
