package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/proc"
)

// Namespace is one mount namespace, as JSON has it.
type Namespace struct {
	Inum       uint32 `json:"inum"`
	ID         uint64 `json:"id"`
	Parent     string `json:"parent,omitempty"` // inum:id; none for the native namespace
	Depth      int    `json:"depth"`
	Origin     string `json:"origin"`
	Born       string `json:"born"` // RFC 3339
	Container  string `json:"container,omitempty"`
	PID        uint32 `json:"pid,omitempty"` // of the first process seen
	Entered    int    `json:"entered"`       // processes that came in from outside
	Entries    int    `json:"entries"`
	Extended   int    `json:"extended"`
	Violations int    `json:"violations"`
	PCR        int    `json:"pcr"`
	TPM        string `json:"tpm,omitempty"`   // address; none for the machine's own
	Trust      Trust  `json:"trust,omitempty"` // what stands behind its PCR; none before its first entry
	State      string `json:"state"`           // shared: as its parent; idle: nothing measured yet; measuring; waiting: see trouble; ended: see trouble
	Trouble    string `json:"trouble,omitempty"`
	Rules      int    `json:"rules"`
	Gate       string `json:"gate,omitempty"` // what waits there until it is measured: exec or all
}

// Trust is what stands behind a PCR.
type Trust string

// Hardware is the machine's own TPM, Software one that is a program of the host, Nothing no TPM: the list proves nothing.
const (
	Hardware Trust = "hardware"
	Software Trust = "software"
	Nothing  Trust = "none"
)

// Name returns inum:id.
func (n Namespace) Name() string { return fmt.Sprintf("%d:%d", n.Inum, n.ID) }

// Status is what the agent has counted since it began.
type Status struct {
	Namespaces int               `json:"namespaces"`
	Events     uint64            `json:"events"`
	Entries    int               `json:"entries"`    // different ones, however many lists hold them
	Hashed     uint64            `json:"hashed"`     // files read by the agent
	Asked      uint64            `json:"asked"`      // questions of gates
	Goroutines int               `json:"goroutines"` // of the agent
	HeapLive   uint64            `json:"heap_live"`  // bytes of the agent's memory that were in use at its last garbage collection
	Lost       map[string]uint64 `json:"lost"`       // events lost before they reached the agent, since the programs were loaded
	Violations map[string]uint64 `json:"violations"` // events that the agent could not measure, by reason
	Latency    Latency           `json:"latency"`    // from a kernel hook to the native list's extended register
}

// Latency is how long it took, since the agent's start.
type Latency struct {
	Count uint64 `json:"count"` // entries that were timed
	P50   int64  `json:"p50_us"`
	P99   int64  `json:"p99_us"`
	Max   int64  `json:"max_us"`
}

// PCRs is one register in each bank.
type PCRs struct {
	PCR      int      `json:"pcr"`
	Values   []string `json:"values"`   // ALGORITHM:HEX
	Software bool     `json:"software"` // the TPM is a program, as honest as its host
}

// Digests returns the values. An error: what was answered is none.
func (p PCRs) Digests() ([]ima.Digest, error) {
	var digests []ima.Digest
	for _, text := range p.Values {
		d, err := ima.ParseDigest(text)
		if err != nil {
			return nil, fmt.Errorf("read the agent's answer: %w", err)
		}
		digests = append(digests, d)
	}
	return digests, nil
}

// Entry is one entry of a list, as JSON has it.
type Entry struct {
	Number         int    `json:"number"` // from 0
	PCR            int    `json:"pcr"`
	TemplateDigest string `json:"template_digest"` // ALGORITHM:HEX
	Template       string `json:"template"`
	Digest         string `json:"digest"`
	Name           string `json:"name"` // bytes that are not UTF-8 are replaced
	Violation      bool   `json:"violation,omitempty"`
}

func jsonNamespace(i namespace.Info) Namespace {
	n := Namespace{
		Inum: i.NS.Inum, ID: i.NS.ID, Depth: i.Depth, Origin: i.Origin, Born: i.Born.UTC().Format(time.RFC3339),
		PID: i.Leader.TGID, Container: proc.CgroupName(int(i.Leader.TGID)), Entered: i.Entered, Entries: i.Status.Entries,
		Extended: i.Status.Extended, Violations: i.Status.Violations, PCR: i.PCR, TPM: i.TPM,
		Trust: trust(i), Rules: i.Rules, Gate: gateWord(i.Gate),
	}
	if !i.Parent.IsZero() {
		n.Parent = i.Parent.String()
	}
	trouble := errors.Join(i.Status.Fatal, i.Status.LogError, i.Status.TPMError)
	switch {
	case i.Status.Fatal != nil:
		n.State = "ended"
	case trouble != nil:
		n.State = "waiting"
	case !i.Active:
		n.State = "shared"
	case i.Listed:
		n.State = "measuring"
	default:
		n.State = "idle"
	}
	if trouble != nil {
		n.Trouble = trouble.Error()
	}
	return n
}

func trust(i namespace.Info) Trust {
	switch {
	case !i.Listed:
		return ""
	case !i.Status.Anchored:
		return Nothing
	case i.Software:
		return Software
	}
	return Hardware
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) {
	counters, err := s.tree.Counters()
	if err != nil {
		s.fail(w, http.StatusServiceUnavailable, err)
		return
	}
	l := counters.Latency
	s.reply(w, Status{
		Namespaces: counters.Namespaces, Events: counters.Events, Entries: counters.Entries, Hashed: counters.Hashed, Asked: counters.Asked,
		Goroutines: runtime.NumGoroutine(), HeapLive: heapLive(), Lost: counters.Lost, Violations: counters.Violations,
		Latency: Latency{l.Count, l.P50.Microseconds(), l.P99.Microseconds(), l.Max.Microseconds()},
	})
}

func heapLive() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

func (s *Server) namespaces(w http.ResponseWriter, r *http.Request) {
	list := []Namespace{}
	for _, i := range s.tree.List() {
		if sees(r, i) {
			list = append(list, shown(r, i))
		}
	}
	s.reply(w, list)
}

// shown is a namespace as the caller may see it: from inside there is nothing outside.
func shown(r *http.Request, i namespace.Info) Namespace {
	n := jsonNamespace(i)
	if !isHost(r) {
		n.Parent, n.PID, n.Container = "", 0, ""
	}
	return n
}

// find answers 404 or 409 itself.
func (s *Server) find(w http.ResponseWriter, r *http.Request) (namespace.View, bool) {
	v, err := s.tree.Find(r.PathValue("name"))
	if err == nil && !sees(r, v.Info) || err != nil && !isHost(r) {
		err = &namespace.NotFoundError{Name: r.PathValue("name")} // whether there is one is not its business
	}
	var missing *namespace.NotFoundError
	switch {
	case errors.As(err, &missing) && len(missing.Matches) > 0:
		s.fail(w, http.StatusConflict, err)
	case err != nil:
		s.fail(w, http.StatusNotFound, err)
	}
	return v, err == nil
}

func (s *Server) namespace(w http.ResponseWriter, r *http.Request) {
	if v, ok := s.find(w, r); ok {
		s.reply(w, shown(r, v.Info))
	}
}

func (s *Server) activate(w http.ResponseWriter, r *http.Request) {
	v, ok := s.find(w, r)
	if !ok {
		return
	}
	ns := v.Info.NS
	s.changed(w, r, v.Info, s.do(r.Context(), func(ctx context.Context) error { return s.tree.Activate(ctx, ns) }))
}

// changed answers what came of a change of the namespace: how it is now, or why nothing was changed.
func (s *Server) changed(w http.ResponseWriter, r *http.Request, i namespace.Info, err error) {
	if errors.Is(err, namespace.ErrInactive) {
		err = fmt.Errorf("%w; first: imans-agent ns activate %v", err, i.NS)
	}
	if err != nil {
		s.fail(w, http.StatusConflict, err)
		return
	}
	if v, ok := s.find(w, r); ok {
		s.reply(w, shown(r, v.Info))
	}
}

func (s *Server) pcrs(w http.ResponseWriter, r *http.Request) {
	v, ok := s.find(w, r)
	if !ok {
		return
	}
	if v.List == nil {
		s.fail(w, http.StatusNotFound, fmt.Errorf("namespace %v has no list yet: nothing was measured in it", v.Info.NS))
		return
	}
	if trust(v.Info) == Nothing {
		s.fail(w, http.StatusNotFound, notProven(v.Info))
		return
	}
	values, err := v.List.PCRs(r.Context())
	if err != nil {
		s.fail(w, http.StatusServiceUnavailable, err)
		return
	}
	answer := PCRs{PCR: v.Info.PCR, Software: v.Info.Software}
	for _, d := range values {
		answer.Values = append(answer.Values, d.String())
	}
	slices.Sort(answer.Values)
	s.reply(w, answer)
}

// notProven says why there are no PCRs.
func notProven(i namespace.Info) error {
	if i.Depth == 0 {
		return errors.New("no TPM proves the native list: the agent runs with --tpm none; --tpm swtpm has one in software")
	}
	return fmt.Errorf("no TPM proves the list of namespace %v: it never had one, or has lost it", i.NS)
}

func (s *Server) measurements(w http.ResponseWriter, r *http.Request) {
	v, ok := s.find(w, r)
	if !ok {
		return
	}
	q := r.URL.Query()
	bank := ima.SHA1
	if name := q.Get("bank"); name != "" {
		if bank, ok = ima.HashAlgoByName(name); ok {
			ok = imalog.CheckBank(bank) == nil
		}
		if !ok {
			s.fail(w, http.StatusBadRequest, fmt.Errorf("bank %q: want sha1, sha256, sha384 or sha512", name))
			return
		}
	}
	format, ok := formats[q.Get("format")]
	if !ok {
		s.fail(w, http.StatusBadRequest, fmt.Errorf("format %q: want ascii, binary or json", q.Get("format")))
		return
	}
	w.Header().Set("Content-Type", format.contentType)
	w.WriteHeader(http.StatusOK)
	s.stream(w, r, v, format, bank, q.Get("follow") == "true")
}

// stream writes the list, entry by entry, and with follow goes on until the list or the request ends.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, v namespace.View, f format, bank ima.HashAlgo, follow bool) {
	flush := http.NewResponseController(w).Flush
	for next := 0; v.List != nil; {
		reader, n, err := v.List.Reader(next)
		if err != nil {
			return
		}
		var out []byte
		for range n {
			e, err := reader.Next()
			if err != nil {
				return
			}
			if out = f.append(out, next, e, bank); len(out) > 64<<10 {
				if _, err := w.Write(out); err != nil {
					return
				}
				out = out[:0]
			}
			next++
		}
		if _, err := w.Write(out); err != nil || flush() != nil || !follow {
			return
		}
		if v.List.AwaitEntries(r.Context(), next) != nil {
			return
		}
	}
}

// format is one way to write a list.
type format struct {
	contentType string
	append      func(dst []byte, number int, e *imalog.Entry, bank ima.HashAlgo) []byte
}

var formats = map[string]format{
	"":       {"text/plain; charset=utf-8", appendASCII},
	"ascii":  {"text/plain; charset=utf-8", appendASCII},
	"binary": {"application/octet-stream", appendBinary},
	"json":   {"application/x-ndjson", appendJSON},
}

func appendASCII(dst []byte, _ int, e *imalog.Entry, bank ima.HashAlgo) []byte {
	return e.AppendASCII(dst, bank)
}

func appendBinary(dst []byte, _ int, e *imalog.Entry, bank ima.HashAlgo) []byte {
	return e.AppendBinary(dst, bank)
}

func appendJSON(dst []byte, number int, e *imalog.Entry, bank ima.HashAlgo) []byte {
	line, err := json.Marshal(Entry{
		Number: number, PCR: e.PCR(), TemplateDigest: e.Digest(bank).String(), Template: e.Template(),
		Digest: e.FileDigest().String(), Name: e.Name(), Violation: e.Violation(),
	})
	if err != nil {
		return dst // no field of it can fail to marshal
	}
	return append(append(dst, line...), '\n')
}
