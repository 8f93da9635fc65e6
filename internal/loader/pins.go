package loader

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// The pin folder: one file a map and a link, and the build, which is pinned last and so says that the set is whole. It has two values: the
// build, and the set's own id.
const (
	mapPrefix  = "map_"
	linkPrefix = "link_"
	buildPin   = "build"
)

// bpfFSMagic is BPF_FS_MAGIC of include/uapi/linux/magic.h.
const bpfFSMagic = 0xcafe4a11

// ErrNotBPFFS means that the pin folder is not on a bpffs.
var ErrNotBPFFS = errors.New("not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf")

// pins is a set of programs and maps that outlives the agent in a folder of a bpffs.
type pins struct {
	dir      string
	maps     []string // those that a later agent needs; the others belong to the programs alone
	programs []string // in the order in which they are attached
	build    [sha256.Size]byte
}

// held is what this process has open of a set.
type held struct {
	id    [sha256.Size]byte // that no other set has
	maps  map[string]*ebpf.Map
	links map[string]link.Link
}

func newHeld() held { return held{maps: map[string]*ebpf.Map{}, links: map[string]link.Link{}} }

func (h held) close() error {
	var errs []error
	for _, l := range h.links {
		errs = append(errs, l.Close())
	}
	for _, m := range h.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// open adopts the set that is pinned, if it is of this build, or replaces it by what load puts into the kernel. After an error nothing
// new is left pinned or attached.
func (p pins) open(spec *ebpf.CollectionSpec, load func() (*ebpf.Collection, error)) (held, Origin, error) {
	h, err := p.adopt(spec)
	if err == nil {
		return h, Adopted, nil
	}
	origin := Loaded
	if !errors.Is(err, os.ErrNotExist) {
		origin = Replaced
	}
	if err := Unload(p.dir); err != nil {
		return held{}, origin, err
	}
	collection, err := load()
	if err != nil {
		return held{}, origin, fmt.Errorf("load programs: %w", err)
	}
	defer collection.Close()
	if h, err = p.pin(collection); err != nil {
		return held{}, origin, errors.Join(err, Unload(p.dir))
	}
	return h, origin, nil
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

// adopt opens a pinned set. An error that is os.ErrNotExist means that there is none at all.
func (p pins) adopt(spec *ebpf.CollectionSpec) (_ held, err error) {
	if entries, err := os.ReadDir(p.dir); err == nil && len(entries) == 0 {
		return held{}, os.ErrNotExist
	}
	h := newHeld()
	if h.id, err = p.check(); err != nil {
		return held{}, err
	}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	for _, name := range p.maps {
		m, err := ebpf.LoadPinnedMap(filepath.Join(p.dir, mapPrefix+name), nil)
		if err != nil {
			return held{}, fmt.Errorf("adopt map %s: %v", name, err)
		}
		h.maps[name] = m
		if err := spec.Maps[name].Compatible(m); err != nil {
			return held{}, fmt.Errorf("adopt map %s: %w", name, err)
		}
	}
	for _, name := range p.programs {
		l, err := link.LoadPinnedLink(filepath.Join(p.dir, linkPrefix+name), nil)
		if err != nil {
			return held{}, fmt.Errorf("adopt link %s: %v", name, err)
		}
		h.links[name] = l
		if err := checkLink(l, spec.Programs[name]); err != nil {
			return held{}, fmt.Errorf("adopt link %s: %w", name, err)
		}
	}
	return h, nil
}

// check compares the pinned build with ours, and returns the set's id.
func (p pins) check() (id [sha256.Size]byte, err error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(p.dir, buildPin), nil)
	if err != nil {
		return id, fmt.Errorf("the pinned set is incomplete: %v", err)
	}
	defer m.Close()
	var pinned [sha256.Size]byte
	if err := m.Lookup(uint32(0), &pinned); err != nil {
		return id, fmt.Errorf("read the pinned build: %v", err)
	}
	if pinned != p.build {
		return id, errors.New("the pinned set is of another build")
	}
	if err := m.Lookup(uint32(1), &id); err != nil {
		return id, fmt.Errorf("read the pinned set's id: %v", err)
	}
	return id, nil
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

// pin attaches what was loaded, and pins it.
func (p pins) pin(collection *ebpf.Collection) (_ held, err error) {
	h := newHeld()
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	for _, name := range p.maps {
		m := collection.DetachMap(name)
		h.maps[name] = m
		if err := m.Pin(filepath.Join(p.dir, mapPrefix+name)); err != nil {
			return held{}, fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for _, name := range p.programs {
		l, err := attach(collection.Programs[name])
		if err != nil {
			return held{}, fmt.Errorf("attach %s: %w", name, err)
		}
		h.links[name] = l
		if err := l.Pin(filepath.Join(p.dir, linkPrefix+name)); err != nil {
			return held{}, fmt.Errorf("pin link %s: %w", name, err)
		}
	}
	rand.Read(h.id[:])
	return h, p.commit(h.id)
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

// commit pins the build: before it a crash leaves a set that the next open replaces, after it one that it adopts.
func (p pins) commit(id [sha256.Size]byte) error {
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "imans_build", Type: ebpf.Array, KeySize: 4, ValueSize: sha256.Size, MaxEntries: 2,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: p.build}, {Key: uint32(1), Value: id}},
	})
	if err != nil {
		return fmt.Errorf("make build map: %w", err)
	}
	defer m.Close()
	if err := m.Pin(filepath.Join(p.dir, buildPin)); err != nil {
		return fmt.Errorf("pin build map: %w", err)
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
