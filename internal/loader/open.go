package loader

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

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
	set := pins{o.PinDir, pinnedMaps(), attachedPrograms(), build(o)}
	held, origin, err := set.open(spec, func() (*ebpf.Collection, error) { return loadPrograms(spec, o) })
	if err != nil {
		return nil, err
	}
	k := &Kernel{held: held, origin: origin}
	if origin != Adopted {
		// While they were attached one after the other some had nobody to stand in for.
		for _, function := range functions {
			if err := k.maps[imansMapSettings].Put(settingStandIns+function, uint32(0)); err != nil {
				return nil, errors.Join(fmt.Errorf("set how often a skipped program was stood in for: %w", err), k.Close())
			}
		}
		if err := reserveLosses(k.maps[imansMapLosses]); err != nil {
			return nil, errors.Join(err, k.Close())
		}
	}
	return k, k.start()
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

// attachedPrograms are in the order in which they are attached: those of namespaces first, as an event's namespace should be known. Of
// tracing programs at one function the kernel runs the one first that was attached last (kernel/bpf/trampoline.c), so who stands in for
// another comes before it.
func attachedPrograms() []string {
	return []string{
		imansProgImansProcFreeInumAgain, imansProgImansProcFreeInum, imansProgImansCopyMntNsAgain, imansProgImansCopyMntNs,
		imansProgImansSwitchTaskNamespacesAgain, imansProgImansSwitchTaskNamespaces, imansProgImansIterTask,
		imansProgImansWriteAccessAgain, imansProgImansWriteAccess,
		imansProgImansBprmCheckSecurity, imansProgImansMmapFile, imansProgImansFileMprotect,
	}
}

// loadPrograms puts programs into the kernel.
func loadPrograms(spec *ebpf.CollectionSpec, o Options) (*ebpf.Collection, error) {
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
	return ebpf.NewCollectionWithOptions(spec, options)
}

// overlayTypes returns the overlay module's types, loading the module if need be: the programs are fitted to them at load, as to those of all
// modules that are loaded by then. Btrfs is not loaded for it: each run of a file of a btrfs that came later is an event until the programs are
// loaded anew. Nil where overlayfs is built in or missing; an overlayfs file whose real inode is not found is then flagged as such.
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
