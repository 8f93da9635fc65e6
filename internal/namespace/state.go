package namespace

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/policy"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/vtpm"
)

// State is everything that ends with a namespace. Only Tree makes, lists and frees it.
type State struct {
	tree   *Tree
	ns     event.MountNS
	dir    string
	pcr    int
	born   time.Time
	origin string // how it came to be known

	// Guarded by tree.mu.
	active     bool   // it is an IMA namespace; else it shares its parent's fate
	own        bool   // its policy was written to it
	template   string // of its entries
	algo       ima.HashAlgo
	ids        ima.IDMaps // how its user namespace numbers ids
	idsKnown   bool       // they will not change any more
	parent     *State     // nil: the native namespace
	children   []*State
	policy     *policy.Policy // swapped whole
	generation uint64         // of the chain's policies
	list       *measure.List  // nil until the first entry
	swtpm      *vtpm.Instance // nil: none yet, or lost
	attached   *attached      // the vTPM that it was given; nil: none, or one of its own; read without the lock by who writes it
	leader     event.Process  // the first process seen in it
	entered    int            // processes that came in from outside
	gate       GateMode       // "": as GateOff
	gateSince  time.Duration  // since boot; what ran earlier was not held up and was not to be

	// The goroutine that handles records only.
	gateLooked time.Time // when new file systems were last looked for
	gateEarly  bool      // it was given its gate before its first program
	ended      bool      // the list can't go on; its ancestors' lists say so
	looks      allowance // of a container: for its files
	requests   []request // for clones that are to be active
	marks      marks     // that the kernel side has of it
	tpm        *tpmext.TPM
	starting   *start // of a vTPM; nil: none was started by this agent
	given      uint32 // how many it was given so far
	root       *digest.Root
	writers    map[event.Content]bool // contents whose open writers are on record
	held       *held                  // inodes that the list tells of; nil until it is open
	told       *told                  // records that the list told violations of; likewise
	lostLog    bool                   // the log is not where it is to be, which was said

	gone chan struct{} // closed when the namespace has ended
}

// stateFile is what a namespace's folder says of it.
type stateFile struct {
	Inum       uint32 `json:"inum"`
	ID         uint64 `json:"id"`
	ParentInum uint32 `json:"parent_inum"`
	ParentID   uint64 `json:"parent_id"`
	Template   string `json:"template"`
	Hash       string `json:"hash"`
	// What was written to it; none: it has the policy for new namespaces.
	Policy []policy.Part `json:"policy,omitempty"`
	Own    bool          `json:"own,omitempty"` // it was written to, if only nothing

	Given    uint32        `json:"given,omitempty"` // how many vTPMs it was given
	Attached *attachedFile `json:"attached,omitempty"`

	Gate      GateMode      `json:"gate,omitempty"`
	GateSince time.Duration `json:"gate_since,omitempty"`
}

const stateFileName = "namespace.json"

func (t *Tree) nsDir() string { return nsDir(t.config.Dir) }

// nsDir is the folder of the namespaces' folders in a boot's.
func nsDir(boot string) string { return filepath.Join(boot, "ns") }

// nativeDir is the native list's folder in a boot's.
func nativeDir(boot string) string { return filepath.Join(boot, "native") }

// NativeBegun reports whether the native list in a boot's folder has entries.
func NativeBegun(boot string) (bool, error) {
	st, err := os.Stat(filepath.Join(nativeDir(boot), measure.LogName))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil && st.Size() > 0, err
}

// leftStates returns what the namespaces' folders say that an earlier agent of this boot left.
func leftStates(dir string) (map[event.MountNS]stateFile, error) {
	left := make(map[event.MountNS]stateFile)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list namespaces' folders: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name(), stateFileName)
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // a crash between making the folder and recording it: nothing was in it yet
		}
		var f stateFile
		if err == nil {
			err = json.Unmarshal(b, &f)
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w; move its folder away and restart", path, err)
		}
		left[event.MountNS{Inum: f.Inum, ID: f.ID}] = f
	}
	return left, nil
}

// restore makes a namespace what an earlier agent recorded.
func (s *State) restore(f stateFile) error {
	algo, ok := ima.HashAlgoByName(f.Hash)
	p, err := s.policy, error(nil)
	if !s.active {
		p = s.tree.config.nsPolicy(s.ids)
	}
	if f.Own {
		p, err = restorePolicy(f.Policy)
	}
	if err != nil || !ok || imalog.CheckTemplate(f.Template) != nil {
		return fmt.Errorf("restore namespace %v from %s: hash %q, template %q, %v; move its folder away and restart",
			s.ns, s.dir, f.Hash, f.Template, err)
	}
	s.active, s.template, s.algo, s.policy, s.own = true, f.Template, algo, p, f.Own
	s.given = f.Given
	s.gate, s.gateSince = f.Gate, f.GateSince
	if f.Attached != nil {
		if s.attached, err = f.Attached.restore(); err != nil {
			return fmt.Errorf("restore namespace %v from %s: its vTPM: %w; move its folder away and restart", s.ns, s.dir, err)
		}
	}
	return nil
}

func restorePolicy(parts []policy.Part) (*policy.Policy, error) {
	p := &policy.Policy{}
	for _, part := range parts {
		rules, err := policy.Parse(stateFileName, []byte(part.Text))
		if err != nil {
			return nil, err
		}
		rules, _ = rules.WrittenIn(part.IDs)
		p = policy.Append(p, rules)
	}
	return p, nil
}

// record writes the state file, if the namespace has a folder.
func (s *State) record() error {
	if s.parent == nil || s.list == nil {
		return nil
	}
	return s.writeRecord()
}

func (s *State) writeRecord() error {
	b, err := json.Marshal(s.description())
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(s.dir, stateFileName), b)
}

func (s *State) description() stateFile {
	p := s.parentNS()
	f := stateFile{
		Inum: s.ns.Inum, ID: s.ns.ID, ParentInum: p.Inum, ParentID: p.ID, Template: s.template, Hash: s.algo.String(),
	}
	if s.own {
		f.Own, f.Policy = true, s.policy.Parts()
	}
	f.Given = s.given
	f.Gate, f.GateSince = s.gate, s.gateSince
	if s.attached != nil {
		f.Attached = s.attached.file()
	}
	return f
}

func (s *State) parentNS() event.MountNS {
	if s.parent == nil {
		return event.MountNS{}
	}
	return s.parent.ns
}

// vtpmConfig is that of a vTPM of the namespace's own.
func (s *State) vtpmConfig() vtpm.Config {
	return vtpm.Config{
		Program: s.tree.config.Swtpm, User: s.tree.config.SwtpmUser, Dir: filepath.Join(s.dir, "tpm"),
		Socket: filepath.Join(s.tree.config.RunDir, "tpm", fmt.Sprintf("%d-%d", s.ns.Inum, s.ns.ID)),
	}
}

// open begins or recovers the namespace's list and vTPM. It does nothing if they are open.
func (s *State) open(ctx context.Context) error {
	if s.list != nil {
		return nil
	}
	if err := s.makeFolder(ctx); err != nil {
		return err
	}
	if s.attached != nil {
		return s.openAttached(ctx)
	}
	if s.tree.config.Swtpm == "" {
		return s.openList(ctx, measure.Config{})
	}
	if s.starting != nil { // its list could not be opened just now
		return s.openLate(ctx)
	}
	tpm, err := s.adoptTPM(ctx)
	if errors.Is(err, errNeverStarted) {
		if err := s.startTPM(); err != nil {
			return err
		}
		return s.openLate(ctx)
	}
	if err == nil {
		s.tpm = tpm
		return s.openList(ctx, measure.Config{TPM: tpm})
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := s.openList(ctx, measure.Config{}); err != nil {
		return err
	}
	return s.noTPM(err)
}

// diskPause is how long a full or faulty disk is given before it is tried again.
const diskPause = 500 * time.Millisecond

// makeFolder makes the namespace's folder, which says whose it is. A full or faulty disk is waited out, as by a list: a namespace that
// begins at a bad moment has its list all the same.
func (s *State) makeFolder(ctx context.Context) error {
	for said := false; ; said = true {
		err := durable.Mkdir(s.dir)
		if err == nil {
			fault.NamespaceFolder.Pass()
			err = s.writeRecord()
		}
		if err == nil {
			fault.NamespaceRecorded.Pass()
			return nil
		}
		if !durable.Troubled(err) {
			return err
		}
		if !said {
			s.tree.log.Warn("can't begin a namespace's list, waiting; nothing is lost; "+durable.Advice(err), zap.Stringer("ns", s.ns), zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(diskPause):
		}
	}
}

// noTPM says of a vTPM that is lost, or not to be had: the list goes on without. The other namespaces are not concerned.
func (s *State) noTPM(cause error) error {
	s.tree.log.Error("a namespace has no vTPM, its list is not anchored", zap.Stringer("ns", s.ns), zap.Error(cause))
	return s.appendViolation(lossName(event.LossVtpmLost, s.ns, 1), event.LossVtpmLost)
}

// giveUp ends the list of a namespace for good and has its ancestors' lists say so. The others are not concerned. The native list
// can't be given up: its error is the agent's.
func (s *State) giveUp(ctx context.Context, cause error) error {
	if s.parent == nil || ctx.Err() != nil {
		return cause
	}
	if s.ended {
		return nil
	}
	s.ended = true
	s.tree.log.Error("a namespace's list ended", zap.Stringer("ns", s.ns), zap.Error(cause))
	return s.parent.recordLoss(ctx, lossName(event.LossListEnded, s.ns, 1), event.LossListEnded)
}

// openList opens the list with the TPM, or the Late one, that m names.
func (s *State) openList(ctx context.Context, m measure.Config) error {
	if err := s.openHeld(); err != nil {
		return err
	}
	if s.told == nil {
		var err error
		if s.told, err = openTold(s.dir, s.tree.again); err != nil {
			return err
		}
	}
	c := s.tree.config
	m.Dir, m.PCR, m.Template, m.Algo, m.Store, m.Log = s.dir, s.pcr, s.template, s.algo, s.tree.store, c.Log
	list, recovery, err := measure.Open(ctx, m)
	if err != nil {
		return err
	}
	if recovery.Entries > 0 {
		c.Log.Info("list recovered", zap.Stringer("ns", s.ns), zap.Int("entries", recovery.Entries),
			zap.Int("extended again", recovery.Unextended), zap.Int64("cut bytes", recovery.CutBytes))
	}
	if err := s.checkPCRs(ctx, list, recovery); err != nil {
		return errors.Join(err, list.Close())
	}
	s.tree.mu.Lock()
	s.list = list
	s.tree.mu.Unlock()
	return nil
}

// checkPCRs makes sure, when a list begins, that the registers which the policy's rules name are nobody else's.
func (s *State) checkPCRs(ctx context.Context, list *measure.List, recovery measure.Recovery) error {
	if recovery.Entries > 1 {
		return nil // they hold what the list extended, which Open has looked at
	}
	for _, pcr := range s.policy.PCRs() {
		if pcr == s.pcr {
			continue
		}
		if err := list.CheckPCR(ctx, pcr); err != nil {
			return fmt.Errorf("a rule with pcr=%d: %w", pcr, err)
		}
	}
	return nil
}

// wallTime is what the wall clock would have shown at a time since boot if it had always been as it is now: what a file's change time is
// compared with. The clock may have been set since this agent started.
func wallTime(boot time.Duration) time.Time { return time.Now().Add(boot - sinceBoot()) }

// sinceBoot returns the time since boot, suspend included.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // not on Linux; then there are no events either
	}
	return time.Duration(ts.Nano())
}
