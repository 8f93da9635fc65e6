package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/verify"
)

// backing is what stands behind PCR values; "" if that is not known.
type backing string

const (
	hardware backing = "hardware"
	software backing = "software"
)

func backingOf(isSoftware bool) backing {
	if isSoftware {
		return software
	}
	return hardware
}

// verdict is what verify tells of a list.
type verdict struct {
	verify.Result
	valuesGiven bool
	trust       backing
	ak          binding.Name // "": none is asked for
}

// ok is the one bit of the exit status: nothing is broken, given values prove at least an entry, and the key that was asked for is
// vouched for.
func (v *verdict) ok() bool {
	return v.Err() == nil && v.Entries > 0 && (!v.valuesGiven || v.Proven.Entries > 0) && (v.ak == "" || v.vouches())
}

func (v *verdict) vouches() bool { return v.VouchesFor(v.ak, v.valuesGiven) }

func (v *verdict) print(cmd *cobra.Command) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	row("entries", "%d, %d of them violations", v.Entries, v.Violations)
	row("boot aggregate", "%v", v.BootAggregate)
	for _, c := range v.Computed {
		row("replays to", "PCR %d %v", c.PCR, c.Value)
	}
	switch {
	case !v.valuesGiven:
		row("proven", "nothing: no PCR values given (--tpm, --ns, --pcr10)")
	case !v.Proven.Matched:
		row("proven", "nothing: no beginning of the list leads to the given PCR values")
	default:
		row("proven", "%d entries, %d of them violations, by the given PCR values", v.Proven.Entries, v.Proven.Violations)
		row("only claimed", "%d entries behind those, %d of other PCRs", v.Claimed.Trailing, v.Claimed.Uncovered)
	}
	switch v.trust {
	case software:
		row("trust", "software: a TPM that is a program is as honest as the host that runs it; for a container's, verify the host's native list with --ak-name")
	case hardware:
		row("trust", "hardware: the machine's own TPM")
	}
	for i := range v.Bindings {
		printBinding(w, &v.Bindings[i])
	}
	if v.ak != "" {
		row("vouches for", "%s %v", map[bool]string{true: "yes:", false: "NO:"}[v.vouches()], v.ak)
	}
	for _, b := range v.Broken {
		row("BROKEN", "%v", b)
	}
	if v.BrokenMore > 0 {
		row("BROKEN", "and %d more", v.BrokenMore)
	}
	if v.ok() {
		row("verdict", "ok")
	} else {
		row("verdict", "BAD")
	}
	return w.Flush()
}

func printBinding(w io.Writer, b *verify.Binding) {
	words := []string{fmt.Sprintf("%v", b.ID)}
	for _, s := range []struct{ name, value string }{{"container", b.Container}, {"image", b.Image}, {"digest", digestText(b.ImageDigest)}} {
		if s.value != "" {
			words = append(words, s.name, s.value)
		}
	}
	fmt.Fprintf(w, "vTPM\t%s\n", strings.Join(words, " "))
	fmt.Fprintf(w, "\tTPM %v by %v, PCR %d, attached by entry %d, %s\n", b.TPM, b.Way, b.PCR, b.Entry, howSure(b.Proven))
	if b.AK != "" {
		fmt.Fprintf(w, "\tEK %v\n\tAK %v\n", b.EK, b.AK)
	}
	e := b.End
	if e == nil {
		return
	}
	fmt.Fprintf(w, "\t%v after %d entries, by entry %d, %s\n", e.Cause, e.Entries, e.Entry, howSure(e.Proven))
	for _, value := range e.Values {
		fmt.Fprintf(w, "\tlast PCR %d %v\n", b.PCR, value)
	}
}

func howSure(proven bool) string {
	if proven {
		return "proven"
	}
	return "only claimed"
}

// digestText is "" for no digest.
func digestText(d ima.Digest) string {
	if d.IsNone() {
		return ""
	}
	return d.String()
}

// resultJSON is a verdict for programs.
type resultJSON struct {
	OK            bool          `json:"ok"`
	Entries       int           `json:"entries"`
	Violations    int           `json:"violations"`
	BootAggregate string        `json:"boot_aggregate"`
	Computed      []string      `json:"computed"` // PCR=ALGORITHM:HEX
	Proven        int           `json:"proven"`
	Claimed       int           `json:"claimed"`
	Trust         backing       `json:"trust,omitempty"` // hardware or software; none if the agent was not asked
	Bindings      []bindingJSON `json:"bindings"`
	VouchesFor    *bool         `json:"vouches_for,omitempty"` // the key of --ak-name
	Broken        []brokenJSON  `json:"broken"`
}

type bindingJSON struct {
	Namespace   string          `json:"namespace"` // inum:id
	Number      uint32          `json:"number"`    // the how manieth vTPM of the namespace, from 1
	Container   string          `json:"container,omitempty"`
	Image       string          `json:"image,omitempty"`
	ImageDigest string          `json:"image_digest,omitempty"`
	TPM         string          `json:"tpm"` // 1.2 or 2.0
	Way         string          `json:"way"` // proxy or socket
	PCR         int             `json:"pcr"`
	EK          string          `json:"ek,omitempty"` // TPM Names, hexadecimal
	AK          string          `json:"ak,omitempty"`
	Entry       int             `json:"entry"`
	Proven      bool            `json:"proven"`
	End         *bindingEndJSON `json:"end,omitempty"` // none: attached
}

type bindingEndJSON struct {
	Cause   string   `json:"cause"`
	Entries uint64   `json:"entries"` // of the namespace's list, that the vTPM has got
	Values  []string `json:"values"`  // ALGORITHM:HEX
	Entry   int      `json:"entry"`
	Proven  bool     `json:"proven"`
}

type brokenJSON struct {
	Kind   string `json:"kind"`
	Entry  int    `json:"entry"`
	Offset int64  `json:"offset"`
	Reason string `json:"reason"`
}

func (v *verdict) json() resultJSON {
	j := resultJSON{
		OK: v.ok(), Entries: v.Entries, Violations: v.Violations, BootAggregate: v.BootAggregate.String(), Proven: v.Proven.Entries,
		Claimed: v.Entries - v.Proven.Entries, Trust: v.trust, Computed: []string{}, Bindings: []bindingJSON{}, Broken: []brokenJSON{},
	}
	for _, c := range v.Computed {
		j.Computed = append(j.Computed, fmt.Sprintf("%d=%v", c.PCR, c.Value))
	}
	for i := range v.Bindings {
		j.Bindings = append(j.Bindings, jsonBinding(&v.Bindings[i]))
	}
	if v.ak != "" {
		vouches := v.vouches()
		j.VouchesFor = &vouches
	}
	for _, b := range v.Broken {
		j.Broken = append(j.Broken, brokenJSON{b.Kind.String(), b.Entry, b.Offset, b.Reason})
	}
	return j
}

func jsonBinding(b *verify.Binding) bindingJSON {
	j := bindingJSON{
		Namespace: b.Namespace(), Number: b.Number, Container: b.Container, Image: b.Image, ImageDigest: digestText(b.ImageDigest),
		TPM: b.TPM.String(), Way: b.Way.String(), PCR: b.PCR, EK: b.EK.String(), AK: b.AK.String(), Entry: b.Entry, Proven: b.Proven,
	}
	if e := b.End; e != nil {
		j.End = &bindingEndJSON{Cause: e.Cause.String(), Entries: e.Entries, Values: []string{}, Entry: e.Entry, Proven: e.Proven}
		for _, value := range e.Values {
			j.End.Values = append(j.End.Values, value.String())
		}
	}
	return j
}
