package loader

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// The pin folder: one file a map and a link, and the build, which is pinned last and so says that the set is whole.
const (
	mapPrefix  = "map_"
	linkPrefix = "link_"
	buildPin   = "build"
)

// bpfFSMagic is BPF_FS_MAGIC of include/uapi/linux/magic.h.
const bpfFSMagic = 0xcafe4a11

// ErrNotBPFFS means that the pin folder is not on a bpffs.
var ErrNotBPFFS = errors.New("not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf")

// Open adopts the kernel side that an earlier agent of this build pinned, or else loads, attaches and pins its own. A set
// of another build, or one found incomplete, is taken out first, and Origin then says Replaced.
//
// Errors: ErrNotBPFFS; a *ebpf.VerifierError where the kernel refuses a program (its %+v has the verifier's whole log);
// otherwise the system call's. After an error nothing new is left pinned or attached.
func Open(o Options) (*Kernel, error) {
	if err := preparePinDir(o.PinDir); err != nil {
		return nil, err
	}
	spec, err := loadImans()
	if err != nil {
		return nil, err
	}
	if err := configure(spec, o); err != nil {
		return nil, err
	}
	origin := Loaded
	k, err := adopt(spec, o)
	if err == nil {
		k.origin = Adopted
		return k, k.start()
	}
	if !errors.Is(err, os.ErrNotExist) {
		origin = Replaced
	}
	if err := Unload(o.PinDir); err != nil {
		return nil, err
	}
	if k, err = load(spec, o); err != nil {
		return nil, errors.Join(err, Unload(o.PinDir))
	}
	k.origin = origin
	return k, k.start()
}

func preparePinDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make pin folder: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at pin folder %s: %w", dir, err)
	}
	if uint32(st.Type) != bpfFSMagic {
		os.Remove(dir)
		return fmt.Errorf("pin folder %s: %w", dir, ErrNotBPFFS)
	}
	return os.Chmod(dir, 0o700)
}

func configure(spec *ebpf.CollectionSpec, o Options) error {
	page := uint32(os.Getpagesize())
	if o.RingSize < page || o.RingSize&(o.RingSize-1) != 0 {
		return fmt.Errorf("ring buffer size %d: want a power of two, at least a page of %d bytes", o.RingSize, page)
	}
	spec.Maps[imansMapEvents].MaxEntries = o.RingSize
	if err := spec.Variables[imansVarImansKernelDigest].Set(o.KernelDigest); err != nil {
		return fmt.Errorf("set kernel digest: %w", err)
	}
	return nil
}

// writeAccessBefore68 is what mnt_get_write_access was called before Linux 6.8.
const writeAccessBefore68 = "__mnt_want_write"

// fit gives the programs the name that a function has in this kernel.
func fit(spec *ebpf.CollectionSpec, types *btf.Cache) error {
	kernel, err := types.Kernel()
	if err != nil {
		return fmt.Errorf("read the kernel's types: %w", err)
	}
	var f *btf.Func
	name := spec.Programs[imansProgImansWriteAccess].AttachTo
	if err := kernel.TypeByName(name, &f); errors.Is(err, btf.ErrNotFound) {
		name = writeAccessBefore68
	} else if err != nil {
		return fmt.Errorf("look for %s in the kernel's types: %w", name, err)
	}
	for _, program := range []string{imansProgImansWriteAccess, imansProgImansWriteAccessAgain} {
		spec.Programs[program].AttachTo = name
	}
	return nil
}

// build identifies what Open would load: the object and the options baked into it.
func build(o Options) [sha256.Size]byte {
	h := sha256.New()
	h.Write(_ImansBytes)
	binary.Write(h, binary.LittleEndian, o.RingSize)
	binary.Write(h, binary.LittleEndian, o.KernelDigest)
	return [sha256.Size]byte(h.Sum(nil))
}

// pinnedMaps are the maps that outlive the agent; the others belong to the programs alone.
func pinnedMaps() []string {
	return []string{
		imansMapEvents, imansMapHeldInodes, imansMapLosses, imansMapMeasuredBySubject, imansMapMeasuredContents, imansMapMeasuredSlots,
		imansMapMountNamespaces, imansMapNamespaceIds, imansMapNamespacePolicies, imansMapSettings,
	}
}

// adopt opens a pinned set. An error that is os.ErrNotExist means that there is none at all.
func adopt(spec *ebpf.CollectionSpec, o Options) (_ *Kernel, err error) {
	if entries, err := os.ReadDir(o.PinDir); err == nil && len(entries) == 0 {
		return nil, os.ErrNotExist
	}
	if err := checkBuild(o); err != nil {
		return nil, err
	}
	k := &Kernel{maps: map[string]*ebpf.Map{}, links: map[string]link.Link{}}
	defer func() {
		if err != nil {
			k.Close()
		}
	}()
	for _, name := range pinnedMaps() {
		m, err := ebpf.LoadPinnedMap(filepath.Join(o.PinDir, mapPrefix+name), nil)
		if err != nil {
			return nil, fmt.Errorf("adopt map %s: %v", name, err)
		}
		k.maps[name] = m
		if err := spec.Maps[name].Compatible(m); err != nil {
			return nil, fmt.Errorf("adopt map %s: %w", name, err)
		}
	}
	for name, program := range spec.Programs {
		l, err := link.LoadPinnedLink(filepath.Join(o.PinDir, linkPrefix+name), nil)
		if err != nil {
			return nil, fmt.Errorf("adopt link %s: %v", name, err)
		}
		k.links[name] = l
		if err := checkLink(l, program); err != nil {
			return nil, fmt.Errorf("adopt link %s: %w", name, err)
		}
	}
	return k, nil
}

// checkBuild compares the pinned build with ours.
func checkBuild(o Options) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(o.PinDir, buildPin), nil)
	if err != nil {
		return fmt.Errorf("the pinned set is incomplete: %v", err)
	}
	defer m.Close()
	var pinned [sha256.Size]byte
	if err := m.Lookup(uint32(0), &pinned); err != nil {
		return fmt.Errorf("read the pinned build: %w", err)
	}
	if pinned != build(o) {
		return errors.New("the pinned set is of another build")
	}
	return nil
}

// checkLink makes sure that a pin is the link that it is named for.
func checkLink(l link.Link, program *ebpf.ProgramSpec) error {
	info, err := l.Info()
	if err != nil {
		return err
	}
	p, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return fmt.Errorf("open its program: %w", err)
	}
	defer p.Close()
	pi, err := p.Info()
	if err != nil {
		return err
	}
	// The kernel keeps the first 15 bytes of a name.
	name := program.Name[:min(len(program.Name), 15)]
	if p.Type() != program.Type || pi.Name != name && pi.Name != program.Name {
		return fmt.Errorf("is a %v program %q, want a %v program %q", p.Type(), pi.Name, program.Type, name)
	}
	if t := info.Tracing(); t != nil && uint32(t.AttachType) != uint32(program.AttachType) {
		return fmt.Errorf("is attached as %d, want %d", t.AttachType, program.AttachType)
	}
	return nil
}

// load puts programs into the kernel, attaches and pins them.
func load(spec *ebpf.CollectionSpec, o Options) (_ *Kernel, err error) {
	if o.Types == nil {
		o.Types = btf.NewCache()
	}
	if err := fit(spec, o.Types); err != nil {
		return nil, err
	}
	options := ebpf.CollectionOptions{Cache: o.Types}
	if overlay := overlayTypes(o.Types); overlay != nil {
		options.Programs.ExtraRelocationTargets = []*btf.Spec{overlay}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, options)
	if err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	defer collection.Close()
	k := &Kernel{maps: map[string]*ebpf.Map{}, links: map[string]link.Link{}}
	defer func() {
		if err != nil {
			k.Close()
		}
	}()
	for _, name := range pinnedMaps() {
		m := collection.DetachMap(name)
		k.maps[name] = m
		if err := m.Pin(filepath.Join(o.PinDir, mapPrefix+name)); err != nil {
			return nil, fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	// Namespace programs first: an event's namespace should be known.
	for _, name := range []string{
		imansProgImansProcFreeInum, imansProgImansCopyMntNs, imansProgImansSwitchTaskNamespaces, imansProgImansIterTask,
		imansProgImansWriteAccess, imansProgImansWriteAccessAgain, imansProgImansBprmCheckSecurity, imansProgImansMmapFile, imansProgImansFileMprotect,
	} {
		l, err := attach(collection.Programs[name])
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", name, err)
		}
		k.links[name] = l
		if err := l.Pin(filepath.Join(o.PinDir, linkPrefix+name)); err != nil {
			return nil, fmt.Errorf("pin link %s: %w", name, err)
		}
	}
	return k, pinBuild(o)
}

// overlayTypes returns the overlay module's types, loading the module if need be: the programs are fitted to them at load.
// Nil where overlayfs is built in or missing; an overlayfs file whose real inode is not found is then flagged as such.
func overlayTypes(types *btf.Cache) *btf.Spec {
	overlay, err := types.Module("overlay")
	if err != nil {
		if exec.Command("modprobe", "overlay").Run() != nil {
			return nil
		}
		if overlay, err = types.Module("overlay"); err != nil {
			return nil
		}
	}
	return overlay
}

func attach(p *ebpf.Program) (link.Link, error) {
	info, err := p.Info()
	if err != nil {
		return nil, err
	}
	switch {
	case p.Type() == ebpf.LSM:
		return link.AttachLSM(link.LSMOptions{Program: p})
	case info.Name == imansProgImansIterTask[:15]:
		return link.AttachIter(link.IterOptions{Program: p})
	}
	return link.AttachTracing(link.TracingOptions{Program: p})
}

// pinBuild is the commit point: before it a crash leaves a set that the next Open replaces, after it one that it adopts.
func pinBuild(o Options) error {
	sum := build(o)
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "imans_build", Type: ebpf.Array, KeySize: 4, ValueSize: sha256.Size, MaxEntries: 1,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: sum}},
	})
	if err != nil {
		return fmt.Errorf("make build map: %w", err)
	}
	defer m.Close()
	if err := m.Pin(filepath.Join(o.PinDir, buildPin)); err != nil {
		return fmt.Errorf("pin build map: %w", err)
	}
	return nil
}

func (k *Kernel) start() error {
	var err error
	if k.ring, err = openRing(k.maps[imansMapEvents]); err != nil {
		return errors.Join(err, k.Close())
	}
	if k.slots, err = openSlots(k.maps[imansMapMeasuredSlots]); err != nil {
		return errors.Join(err, k.Close())
	}
	if k.losses, err = openLosses(k.maps, k.links); err != nil {
		return errors.Join(err, k.Close())
	}
	return nil
}

// Unload takes a pinned kernel side out of the kernel: what has no pin and no process holding it is detached. The build goes
// first, so that a set half removed is never adopted. A folder that does not exist is no error.
func Unload(pinDir string) error {
	entries, err := os.ReadDir(pinDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("unload: %w", err)
	}
	if err := os.Remove(filepath.Join(pinDir, buildPin)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unload: %w", err)
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(pinDir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("unload: %w", err)
		}
	}
	return nil
}
