package loader

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Protection keeps who is in a container from processes and from the pins: signals, limits, scheduling, ptrace and /proc are refused there, and so
// is removing a pin. What a protected process starts is protected from its birth. It outlives the agent, as Kernel does.
type Protection struct{ held }

// protectionDir is the folder of its pins, beside the others.
func protectionDir(pinDir string) string { return filepath.Clean(pinDir) + "-protect" }

// OpenProtection adopts or makes the protection of the pins in pinDir, its own and Kernel's, and protects this process. Open, if it is to
// replace what is pinned, comes after it. Errors are those of Open.
func OpenProtection(pinDir string) (*Protection, error) {
	folders, err := protectedFolders(pinDir)
	if err != nil {
		return nil, err
	}
	host, err := hostMountNamespace()
	if err != nil {
		return nil, err
	}
	spec, err := loadProtect()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(spec.Variables[protectVarImansFolders].Set(folders), spec.Variables[protectVarImansHostMntns].Set(host)); err != nil {
		return nil, fmt.Errorf("set what is protected: %w", err)
	}
	h := sha256.New()
	h.Write(_ProtectBytes)
	binary.Write(h, binary.LittleEndian, folders)
	binary.Write(h, binary.LittleEndian, host)
	set := pins{
		dir:  protectionDir(pinDir),
		maps: []string{protectMapProtectedProcesses, protectMapRefusals},
		programs: []string{
			protectProgImansTaskAlloc, protectProgImansTaskKill, protectProgImansFileSendSigiotask, protectProgImansTaskSetrlimit,
			protectProgImansTaskSetscheduler, protectProgImansTaskSetnice, protectProgImansTaskSetioprio,
			protectProgImansPtraceAccessCheck, protectProgImansInodeRename, protectProgImansInodeUnlink,
		},
		build: [sha256.Size]byte(h.Sum(nil)),
	}
	joinProtected(set.dir)
	opened, _, err := set.open(spec, func() (*ebpf.Collection, error) { return ebpf.NewCollection(spec) })
	if err != nil {
		return nil, fmt.Errorf("protection: %w", err)
	}
	p := &Protection{opened}
	if err := p.Add(os.Getpid()); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// RemoveProtection takes the protection out of the kernel. That there is none is no error.
func RemoveProtection(pinDir string) error {
	dir := protectionDir(pinDir)
	joinProtected(dir)
	return Unload(dir)
}

// Add protects a process, and what it starts from now on.
func (p *Protection) Add(pid int) error { return protect(p.maps[protectMapProtectedProcesses], pid) }

// Refused returns how many attempts were refused since the protection was loaded.
func (p *Protection) Refused() (uint64, error) {
	var count uint64
	if err := p.maps[protectMapRefusals].Lookup(uint32(0), &count); err != nil {
		return 0, fmt.Errorf("read how many attempts were refused: %w", err)
	}
	return count, nil
}

// Close releases what this process holds; the protection goes on.
func (p *Protection) Close() error { return p.close() }

func protect(processes *ebpf.Map, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("protect process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if err := processes.Update(int32(fd), uint32(1), ebpf.UpdateAny); err != nil {
		return fmt.Errorf("protect process %d: %w", pid, err)
	}
	return nil
}

// joinProtected protects this process by what is pinned already, if there is any: an agent that is in a container itself could not replace
// an earlier one's pins otherwise. Where it doesn't work, what comes next says why.
func joinProtected(dir string) {
	processes, err := ebpf.LoadPinnedMap(filepath.Join(dir, mapPrefix+protectMapProtectedProcesses), nil)
	if err != nil {
		return
	}
	defer processes.Close()
	protect(processes, os.Getpid())
}

// protectedFolders are those of the pins, made if missing.
func protectedFolders(pinDir string) (folders [2]protectImansFolder, err error) {
	for i, dir := range []string{pinDir, protectionDir(pinDir)} {
		if err := preparePinDir(dir); err != nil {
			return folders, err
		}
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return folders, fmt.Errorf("look at pin folder %s: %w", dir, err)
		}
		folders[i] = protectImansFolder{Ino: st.Ino, Dev: unix.Major(st.Dev)<<20 | unix.Minor(st.Dev)}
	}
	return folders, nil
}

// hostMountNamespace returns the inode number of the first process's.
func hostMountNamespace() (uint32, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/1/ns/mnt", &st); err != nil {
		return 0, fmt.Errorf("look at the host's mount namespace: %w", err)
	}
	return uint32(st.Ino), nil
}
