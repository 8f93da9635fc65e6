// Package agent wires the parts together and owns their goroutines. Only the command imports it.
//
// Run checks the machine, opens the kernel side and the tree, serves the control socket, and then turns records into entries
// until its context ends. Stopping leaves the kernel side and the vTPMs at work: the next Run of the same boot takes over where
// this one stopped, and nothing that ran in between is missing from the lists.
package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/confine"
	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/feature"
	"imans.dev/imans-agent/internal/gate"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imafs"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/nri"
	"imans.dev/imans-agent/internal/policy"
	"imans.dev/imans-agent/internal/reach"
	"imans.dev/imans-agent/internal/standing"
	"imans.dev/imans-agent/internal/vtpm"
)

// Config is what the command line says.
type Config struct {
	Policy    string // file, or the name of a built-in policy: the native namespace's
	NSPolicy  string // the same: what new namespaces start with; "": as Policy
	StateDir  string // made if missing
	Archive   string // folder for namespaces that end, made if missing; "": their state goes
	RunDir    string // for sockets; made if missing
	PinDir    string // on a bpffs
	TPM       string // the native list's: address for tpmext.Open, "swtpm" for one of the agent's own, or "none"
	PCR       int    // of the native list
	NSTPM     string // "swtpm" or "none"
	Swtpm     string // the program's name or path
	SwtpmUser string // that vTPMs run as; "": each as one of its own
	Pool      int    // vTPMs kept ready for containers
	PolicyDir string // policies that containers may name
	NRI       NRI
	Gate      Gate
	Protect   bool   // who is in a container is kept from the agent and its vTPMs by the kernel
	Confine   bool   // once started, capabilities and system calls that are not needed are given up
	Nice      int    // of the agent's threads
	OOMAdj    int    // oom_score_adj of the agent and its vTPMs
	Digest    string // "auto", "kernel" or "agent"
	Template  string
	Hash      string // of files, as IMA's ima_hash
	Mode      string // how namespaces become active: one of namespace.Modes
	MaxRules  int    // that a namespace may have
	RingSize  uint32 // bytes
}

var (
	// ErrRunning means that another agent uses the same state folder.
	ErrRunning = errors.New("another imans-agent is running; stop it first (systemctl stop imans-agent)")
	// ErrSharedPCR means that the kernel's own IMA extends the PCR that the native list was to use.
	ErrSharedPCR = errors.New("the kernel's own IMA extends this PCR; choose one that nothing else uses, such as --pcr 11")
)

// UsageError is an option or a policy that makes no sense.
type UsageError struct{ err error }

// Error says what to give instead.
func (e *UsageError) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *UsageError) Unwrap() error { return e.err }

func usage(format string, args ...any) error { return &UsageError{fmt.Errorf(format, args...)} }

// Run runs the agent until ctx ends, which is no error. Errors of the machine are *feature.Unsupported, of a policy
// *policy.SyntaxError, of a list measure.ErrDiverged, ErrAltered or ErrForeign.
func Run(ctx context.Context, c Config, log *zap.Logger) (err error) {
	types := feature.NewTypes()
	if err := feature.Missing(feature.Config{Types: types, TPM: c.TPM, PinDir: c.PinDir, Swtpm: c.Swtpm}); err != nil {
		return err
	}
	kernelDigests := feature.KernelDigest(types)
	treeConfig, err := prepare(c, kernelDigests, log)
	if err != nil {
		return err
	}
	unlock, err := lock(c.StateDir)
	if err != nil {
		return err
	}
	defer unlock()
	for _, err := range []error{standing.Nice(c.Nice), standing.OOMScore(c.OOMAdj), standing.StayInMemory()} {
		if err != nil {
			log.Warn("where memory or time is short the agent is as any program", zap.Error(err))
		}
	}
	if treeConfig.Dir, err = bootDir(c.StateDir, log); err != nil {
		return err
	}
	if n, err := vtpm.EndRemoved(c.StateDir); err != nil {
		return err
	} else if n > 0 {
		log.Warn("vTPMs whose folder was removed are ended", zap.Int("vtpms", n))
	}
	closeTPM, err := openNative(ctx, c, &treeConfig)
	if err != nil {
		return err
	}
	defer closeTPM()
	protection, err := protect(c, treeConfig.Dir, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, protection.close()) }()
	kernel, err := loader.Open(loader.Options{
		PinDir: c.PinDir, RingSize: c.RingSize, KernelDigest: useKernelDigest(c, kernelDigests, log), Types: types,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kernel.Close()) }()
	treeConfig.Kernel = kernel
	ways := reach.New(log.Named("containers"))
	treeConfig.OpenTPM = ways.Open
	held := newGates(c, log.Named("gate"))
	treeConfig.Gates = held
	tree := namespace.New(treeConfig)
	held.tree = tree
	defer func() { err = errors.Join(err, tree.Close()) }()
	defer func() { err = errors.Join(err, held.Shutdown()) }() // first: who waits must not wait for what has stopped
	if err := tree.Start(ctx); err != nil {
		return hint(err, treeConfig.NativeSocket != "")
	}
	return serve(ctx, c, parts{kernel, tree, ways, held, protection}, log)
}

// parts are what the agent serves with.
type parts struct {
	kernel     *loader.Kernel
	tree       *namespace.Tree
	ways       *reach.Ways
	gates      *gates
	protection *protection
}

// serve runs the pump and the control socket until one fails or ctx ends.
func serve(ctx context.Context, c Config, with parts, log *zap.Logger) error {
	if c.Confine {
		if err := errors.Join(confine.Capabilities(), confine.SystemCalls()); err != nil {
			return fmt.Errorf("%w; run it as root with CAP_SYS_ADMIN and CAP_SETPCAP, or with --confine=false", err)
		}
	}
	tree := with.tree
	p := newPump(with.kernel, tree, log)
	with.gates.pump, p.expire = p, with.gates.Expire
	if err := p.catchUp(ctx); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	windowDir := filepath.Join(c.RunDir, WindowName)
	config := control.Config{Tree: tree, Do: p.do, ParseRules: parseRules, WindowDir: windowDir, Log: log}
	var given *containers
	if c.NSTPM == "swtpm" {
		var err error
		if given, err = openContainers(ctx, c, p, tree, with.ways, log); err != nil {
			return err
		}
		config.Containers, config.Running = given.granted, given.granted
	}
	server, err := control.Listen(filepath.Join(c.RunDir, control.SocketName), config)
	if err != nil {
		return err
	}
	window, err := imafs.Mount(windowDir, &views{tree, p}, log.Named("window"))
	if err != nil {
		log.Warn("containers have no window on their IMA; load the kernel module fuse (modprobe fuse) and restart", zap.Error(err))
	}
	if given != nil {
		if window != nil {
			given.granted.Window = windowDir
		}
		group.Go(func() error { return given.granted.Run(ctx) })
		group.Go(func() error { return fill(ctx, given.pool, log) })
		if c.NRI.Socket != NoNRI {
			group.Go(func() error { return nri.Run(ctx, c.NRI.plugin(given, log)) })
		}
	}
	log.Info("measuring", zap.Int("namespaces", len(tree.List())), zap.String("socket", server.Path()))
	group.Go(func() error { return p.run(ctx) })
	group.Go(func() error { // once there is someone to answer
		return p.do(ctx, func(context.Context) error {
			tree.ReopenGates()
			with.gates.Ready()
			return nil
		})
	})
	group.Go(func() error { return p.watch(ctx) })
	group.Go(func() error { return with.protection.watch(ctx) })
	if window != nil {
		group.Go(func() error { return window.Run(ctx) })
	}
	group.Go(func() error {
		if window != nil { // before the first answer: who gets one finds the windows alive
			reattach(ctx, windowDir, log)
		}
		return server.Run(ctx)
	})
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	log.Info("stopped; the kernel side goes on recording until the next start, or imans-agent unload")
	return nil
}

// prepare reads policies and checks options.
func prepare(c Config, kernelDigests bool, log *zap.Logger) (namespace.Config, error) {
	none := namespace.Config{}
	native, err := LoadPolicy(c.Policy)
	if err != nil {
		return none, err
	}
	ns := native
	if c.NSPolicy != "" {
		if ns, err = LoadPolicy(c.NSPolicy); err != nil {
			return none, err
		}
	}
	algo, ok := ima.HashAlgoByName(c.Hash)
	if _, can := algo.Hash(); !ok || !can {
		return none, usage("--hash %s: want sha1, sha224, sha256, sha384 or sha512", c.Hash)
	}
	if !slices.Contains(wired.Templates, c.Template) {
		return none, usage("--template %s: want one of %v", c.Template, wired.Templates)
	}
	if err := imalog.CheckDigest(c.Template, algo); err != nil {
		return none, usage("--template %s with --hash %s: %w", c.Template, c.Hash, err)
	}
	if !slices.Contains(namespace.Modes(), namespace.Mode(c.Mode)) {
		return none, usage("--namespaces %s: want one of %v", c.Mode, namespace.Modes())
	}
	if !slices.Contains(namespace.GateModes(), namespace.GateMode(c.Gate.Mode)) {
		return none, usage("--gate %s: want one of %v", c.Gate.Mode, namespace.GateModes())
	}
	if c.Gate.Timeout < gateTimeoutMin || c.Gate.Timeout > gateTimeoutMax {
		return none, usage("--gate-timeout %v: want %v to %v", c.Gate.Timeout, gateTimeoutMin, gateTimeoutMax)
	}
	if c.Nice < standing.NiceMin || c.Nice > standing.NiceMax {
		return none, usage("--nice %d: want %d to %d", c.Nice, standing.NiceMin, standing.NiceMax)
	}
	if c.OOMAdj < standing.OOMMin || c.OOMAdj > standing.OOMMax {
		return none, usage("--oom-score-adj %d: want %d to %d", c.OOMAdj, standing.OOMMin, standing.OOMMax)
	}
	if c.MaxRules < 1 {
		return none, usage("--max-rules %d: want at least 1", c.MaxRules)
	}
	if c.Pool < 0 {
		return none, usage("--vtpm-pool %d: want 0 or more", c.Pool)
	}
	if err := vtpm.CheckUser(c.SwtpmUser); err != nil {
		return none, usage("--swtpm-user: %w", err)
	}
	if c.PCR < 0 || c.PCR > 23 {
		return none, usage("--pcr %d: want 0 to 23", c.PCR)
	}
	t := namespace.Config{
		RunDir: c.RunDir, NativePolicy: native, NSPolicy: ns, Mode: namespace.Mode(c.Mode), Gate: namespace.GateMode(c.Gate.Mode), MaxRules: c.MaxRules, NativePCR: c.PCR, Template: c.Template, Algo: algo, Log: log,
	}
	switch c.NSTPM {
	case "swtpm":
		t.Swtpm, t.SwtpmUser = c.Swtpm, c.SwtpmUser
	case "none":
	default:
		return none, usage("--ns-tpm %s: want swtpm or none", c.NSTPM)
	}
	if err := c.NRI.check(c.NSTPM == "swtpm"); err != nil {
		return none, err
	}
	if c.Archive != "" {
		if t.Archive, err = prepareArchive(c.Archive); err != nil {
			return none, usage("--archive %s: %w; choose another folder", c.Archive, err)
		}
	}
	if c.Digest != "auto" && c.Digest != "kernel" && c.Digest != "agent" {
		return none, usage("--digest %s: want auto, kernel or agent", c.Digest)
	}
	if c.Digest == "kernel" && !kernelDigests {
		return none, errors.New("--digest kernel: this kernel gives no digests; use auto or agent")
	}
	return t, nil
}

// prepareArchive makes sure that the folder is there and can be written to.
func prepareArchive(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := durable.Mkdir(dir); err != nil {
		return "", err
	}
	probe, err := os.MkdirTemp(dir, ".probe-")
	if err != nil {
		return "", err
	}
	return dir, os.Remove(probe)
}

// LoadPolicy reads a policy file, or takes a built-in policy by its name, and checks that everything it asks for is done.
func LoadPolicy(nameOrFile string) (*policy.Policy, error) {
	p, ok := policy.Builtin(nameOrFile)
	if !ok {
		text, err := os.ReadFile(nameOrFile)
		if err != nil {
			return nil, fmt.Errorf("read policy: %w; give a file, or one of tcb, exec and the other built-in names", err)
		}
		if p, err = policy.Parse(nameOrFile, text); err != nil {
			return nil, err
		}
	}
	if len(p.Rules()) == 0 {
		return nil, usage("policy %s has no rules: nothing would be measured; add one, such as measure func=BPRM_CHECK", nameOrFile)
	}
	if err := p.CheckWired(nameOrFile, wired); err != nil {
		return nil, err
	}
	return p, nil
}

// wired is what this version does of the policy language.
var wired = policy.Wired{
	Funcs:   []ima.Func{ima.BPRMCheck, ima.MmapCheck, ima.MmapCheckReqprot},
	Actions: []policy.Action{policy.Measure, policy.Audit},
	Templates: []string{
		imalog.IMA, imalog.NG, imalog.NGv2, imalog.Sig, imalog.Sigv2, imalog.Buf, imalog.Modsig, imalog.EVMSig,
	},
	MaxPCR: 23,
}

func useKernelDigest(c Config, can bool, log *zap.Logger) bool {
	use := c.Digest != "agent" && can
	if c.Digest == "auto" && !use {
		log.Warn("the kernel gives no digests: files are hashed shortly after the event")
	}
	return use
}

// WindowName is the folder in the run folder at which the window is mounted.
const WindowName = "fs"

// lock keeps a second agent out of the state folder.
func lock(dir string) (unlock func(), err error) {
	if err := durable.Mkdir(dir); err != nil {
		return nil, fmt.Errorf("state folder: %w; choose another with --state-dir", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state folder: %w; choose another with --state-dir", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		err = fmt.Errorf("lock state folder %s: %w", dir, ErrRunning)
		if waiting := gate.Waiting(); len(waiting) > 0 {
			err = fmt.Errorf("%w; if it was killed it may not end before what waits at its gates: kill %v", err, waiting)
		}
		return nil, err
	}
	return func() { f.Close() }, nil
}

// bootDir makes the folder of this boot's state. Those of earlier boots stay as they are: their namespaces and PCRs are gone.
func bootDir(stateDir string, log *zap.Logger) (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	dir := filepath.Join(stateDir, "boots", strings.TrimSpace(string(id)))
	if err := durable.Mkdir(dir); err != nil {
		return "", fmt.Errorf("state folder: %w", err)
	}
	others, err := os.ReadDir(filepath.Dir(dir))
	if err == nil && len(others) > 1 {
		log.Info("lists of earlier boots are kept; delete what is not needed", zap.String("folder", filepath.Dir(dir)), zap.Int("boots", len(others)-1))
	}
	return dir, nil
}
