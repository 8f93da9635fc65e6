//go:build vm

// What a file is known by, and when it may be another. The name sorts before oracle_test.go: these tests need the kernel's digests of all files.

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/imalog"
)

// overwrite writes over a file's content, of the same length. It reads no time, as from 6.13 on a look at one makes the next finer.
func overwrite(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Close())
}

// changedAt returns a file's change time and inode number.
func changedAt(t *testing.T, path string) (unix.Timespec, uint64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ctim, st.Ino
}

// wantDigests looks for an entry for each content that ran by a path, and for none that never ran.
func wantDigests(t *testing.T, list []*imalog.Entry, path string, contents ...[]byte) {
	t.Helper()
	wantTold(t, list, true, path, contents...)
}

// wantTold is the same where a violation will do, unless it must be an entry.
func wantTold(t *testing.T, list []*imalog.Entry, entry bool, path string, contents ...[]byte) {
	t.Helper()
	want := contentWant{way: "the same identity", paths: []string{path}}
	for _, c := range contents {
		want.sums = append(want.sums, digestOf(c))
	}
	want.check(t, list, entry)
}

// btrfsDisk makes a btrfs and mounts it.
func btrfsDisk(t *testing.T) (dir string) {
	t.Helper()
	dir = tempDir(t, "/root")
	sh(t, fmt.Sprintf("cd %s && truncate -s 320M disk && mkfs.btrfs -q disk && mkdir mnt && mount -o loop disk mnt", dir))
	t.Cleanup(func() { exec.Command("umount", dir+"/mnt").Run() })
	return dir + "/mnt"
}

// twins makes two subvolumes of a folder, the second a snapshot of the first, whose program p has one inode number and one change time, and not
// the same bytes. It returns them and their programs.
func twins(t *testing.T, mnt, folder string) (subvolumes [2]string, programs [2][]byte) {
	t.Helper()
	for i := range 100 {
		for n, name := range []string{"benign", "mutant"} {
			subvolumes[n], programs[n] = fmt.Sprintf("%s/%s/%s%d", mnt, folder, name, i), tinyProgram(name+folder+mnt)
		}
		if err := os.MkdirAll(filepath.Dir(subvolumes[0]), 0o755); err != nil {
			t.Fatal(err)
		}
		sh(t, "btrfs subvolume create "+subvolumes[0])
		makeProgram(t, subvolumes[0]+"/p")
		if err := os.WriteFile(subvolumes[0]+"/p", programs[0], 0o755); err != nil {
			t.Fatal(err)
		}
		sh(t, fmt.Sprintf("btrfs subvolume snapshot %s %s", subvolumes[0], subvolumes[1]))
		err := overwrite(subvolumes[0]+"/p", programs[0])
		if err = errors.Join(err, overwrite(subvolumes[1]+"/p", programs[1])); err != nil {
			t.Fatal(err)
		}
		times, inos := [2]unix.Timespec{}, [2]uint64{}
		for n := range 2 {
			times[n], inos[n] = changedAt(t, subvolumes[n]+"/p")
		}
		if times[0] == times[1] && inos[0] == inos[1] {
			time.Sleep(50 * time.Millisecond) // else its content is too young to be known again
			return subvolumes, programs
		}
	}
	t.Fatal("no two files were changed at the same time")
	return subvolumes, programs
}

// Nothing but its subvolume tells a file of btrfs from its twin in a snapshot: the file system's device and the inode's number, generation,
// count of changes, change time and size are the same.
func TestNeverSilentSnapshots(t *testing.T) {
	sample(t, "6.12")
	t.Run("loaded later", func(t *testing.T) {
		if out, err := exec.Command("sh", "-c", "! [ -e /sys/module/btrfs ] || modprobe -r btrfs").CombinedOutput(); err != nil {
			t.Skipf("btrfs is in use: %s", out)
		}
		a := startAgent(t)
		testTwins(t, a, btrfsDisk(t), false)
	})
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			mnt := btrfsDisk(t)
			a := startAgent(t, "--digest", mode)
			t.Run("beside one another", func(t *testing.T) { testTwins(t, a.in(t), mnt, true) })
			t.Run("below overlays", func(t *testing.T) { testTwinsBelow(t, a.in(t), mnt) })
			t.Run("of one number", func(t *testing.T) { testTwinsNumber(t, a.in(t), mnt) })
			a.verifyNow("native")
		})
	}
}

// testTwins runs twins in turns. known: the kernel side knows btrfs, so none needs an event once it is measured.
func testTwins(t *testing.T, a *agent, mnt string, known bool) {
	dirs, programs := twins(t, mnt, "beside")
	inTurns := func() {
		for range 5 {
			for _, dir := range dirs {
				runProgram(t, dir+"/p")
				a.caughtUp()
			}
		}
	}
	inTurns()
	before, err := a.client().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	inTurns()
	after, err := a.client().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := after.Events - before.Events; known && n > 0 || !known && n < 10 {
		t.Errorf("10 runs of what is measured made %d events, and btrfs is known: %t", n, known)
	}
	list := a.list("native")
	for n, dir := range dirs {
		wantDigests(t, list, dir+"/p", programs[n])
	}
}

// testTwinsBelow runs twins as the lower layer of one overlay after another, which have one device.
func testTwinsBelow(t *testing.T, a *agent, mnt string) {
	dirs, programs := twins(t, mnt, "below")
	work := tempDir(t, "/root")
	sh(t, fmt.Sprintf("mkdir %[1]s/none %[1]s/merged", work))
	for _, dir := range dirs {
		sh(t, fmt.Sprintf("mount -t overlay -o lowerdir=%s:%s/none overlay %[2]s/merged", dir, work))
		runProgram(t, work+"/merged/p")
		a.caughtUp()
		sh(t, fmt.Sprintf("umount %s/merged", work))
	}
	wantDigests(t, a.list("native"), work+"/merged/p", programs[0], programs[1])
}

// testTwinsNumber gives the second twin's snapshot the number of the first one's: the highest is given again by the next mount.
func testTwinsNumber(t *testing.T, a *agent, mnt string) {
	dirs, programs := twins(t, mnt, "number")
	var numbers []string
	for _, dir := range dirs {
		sh(t, fmt.Sprintf("btrfs subvolume snapshot %s %s/again", dir, mnt))
		numbers = append(numbers, sh(t, fmt.Sprintf("btrfs inspect-internal rootid %s/again", mnt)))
		runProgram(t, mnt+"/again/p")
		a.caughtUp()
		sh(t, fmt.Sprintf("btrfs subvolume delete -c %[1]s/again && btrfs subvolume sync %[1]s && umount %[1]s && mount -o loop %[1]s/../disk %[1]s", mnt))
	}
	if numbers[0] != numbers[1] {
		t.Errorf("subvolumes %v: want one number", numbers)
	}
	wantDigests(t, a.list("native"), mnt+"/again/p", programs[0], programs[1])
}

// inMemory makes a file that is in no file system, of a name, with content, and maps it so that it can be changed later; seals are set
// afterwards, and those that bear no such mapping before.
func inMemory(t *testing.T, name string, flags int, content []byte, mapped bool, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	size := 4096
	if flags&unix.MFD_HUGETLB != 0 {
		size = 2 << 20
	}
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	copy(m, content)
	if mapped {
		t.Cleanup(func() { unix.Munmap(m) })
	} else if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
	if seals != 0 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// Who has a file in memory can change it by a descriptor or a mapping that the kernel does not count as a writer's: a violation, unless it is
// sealed.
func TestNeverSilentInMemory(t *testing.T) {
	sample(t, "6.18")
	sh(t, "echo 4 >/proc/sys/vm/nr_hugepages")
	t.Cleanup(func() { exec.Command("sh", "-c", "echo 0 >/proc/sys/vm/nr_hugepages").Run() })
	a := startAgent(t)
	for _, c := range []struct {
		name   string
		flags  int
		mapped bool
		seals  int
		want   int // violations
	}{
		{"mapped", 0, true, 0, 1},
		{"open", 0, false, 0, 1},
		{"sealed-size", 0, true, unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL, 1},
		{"sealed-later", 0, true, unix.F_SEAL_FUTURE_WRITE, 1},
		{"sealed", 0, false, unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL, 0},
		{"huge", unix.MFD_HUGETLB, true, 0, 1},
		{"huge-sealed", unix.MFD_HUGETLB, false, unix.F_SEAL_WRITE, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			content := tinyProgram(c.name)
			f := inMemory(t, c.name, c.flags, content, c.mapped, c.seals)
			for range 3 {
				if c.flags&unix.MFD_HUGETLB == 0 {
					cmd := exec.Command("/proc/self/fd/3")
					cmd.ExtraFiles = []*os.File{f}
					if out, err := cmd.CombinedOutput(); err != nil {
						t.Fatalf("run: %v %s", err, out)
					}
					continue
				}
				m, err := unix.Mmap(int(f.Fd()), 0, 2<<20, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
				if err = errors.Join(err, unix.Munmap(m)); err != nil {
					t.Fatal(err)
				}
			}
			measured, violations := names(a.in(t).list("native"))
			if name := "memfd:" + c.name; violations[name] != c.want || measured[name] != 1 {
				t.Errorf("%d entries, want 1; %d violations, want %d", measured[name], violations[name], c.want)
			}
		})
	}
	a.verifyNow("native")
}

// An overlay's upper file, or one of a higher layer, may be nothing but owner and mode: the bytes are those of a lower one. The agent can't see when
// those were changed, so what it hashes is a violation.
func TestNeverSilentMetacopy(t *testing.T) {
	sample(t, "6.1", "6.18")
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) { testMetacopy(t, startAgent(t, "--digest", mode), mode == "kernel") })
	}
}

func testMetacopy(t *testing.T, a *agent, entries bool) {
	dir := tempDir(t, "/root")
	sh(t, fmt.Sprintf("cd %s && mkdir lower middle upper work merged", dir))
	merged := dir + "/merged/p"
	var first, second, third []byte // of one length in all cases, as an overlay keeps the one that it saw
	runThrough := func(t *testing.T, options string, prepare func()) {
		t.Helper()
		name := fmt.Sprintf("%-60s", t.Name())
		first, second, third = tinyProgram("first!"+name), tinyProgram("second"+name), tinyProgram("third!"+name)
		sh(t, fmt.Sprintf("cd %s && mount -t overlay -o metacopy=on,%s overlay merged", dir, options))
		t.Cleanup(func() { exec.Command("umount", dir+"/merged").Run() })
		if err := os.WriteFile(dir+"/lower/p", first, 0o755); err != nil {
			t.Fatal(err)
		}
		prepare()
		time.Sleep(50 * time.Millisecond) // else its content is too young to be known again
		for _, content := range [][]byte{first, second} {
			if err := overwrite(dir+"/lower/p", content); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond)
			runProgram(t, merged)
			a.caughtUp()
		}
	}
	only := func(t *testing.T, layer string) {
		t.Helper()
		if _, err := unix.Lgetxattr(dir+layer+"/p", "trusted.overlay.metacopy", nil); err != nil {
			t.Fatalf("%s/p is not without data: %v", layer, err)
		}
	}
	t.Run("upper", func(t *testing.T) {
		runThrough(t, "lowerdir=lower,upperdir=middle,workdir=work", func() { sh(t, "chmod 711 "+merged); only(t, "/middle") })
		list := a.in(t).list("native")
		wantTold(t, list, entries, merged, first, second)
		before := len(list)
		for range 3 {
			runProgram(t, merged)
		}
		if err := overwrite(merged, third); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		runProgram(t, merged)
		list = a.in(t).list("native")
		wantTold(t, list, entries, merged, first, second, third)
		if n := slices.IndexFunc(list[before:], func(e *imalog.Entry) bool { return e.Violation() }); entries && n >= 0 {
			t.Errorf("a violation of %s", list[before+n].Name())
		}
	})
	t.Run("higher layer", func(t *testing.T) {
		sh(t, fmt.Sprintf("cd %s && rm -rf middle work && mkdir middle work && mount -t overlay -o metacopy=on,lowerdir=lower,upperdir=middle,workdir=work overlay merged && chmod 711 merged/p && umount merged", dir))
		only(t, "/middle")
		had := len(a.in(t).list("native"))
		runThrough(t, "lowerdir=middle:lower", func() {})
		wantTold(t, a.in(t).list("native")[had:], entries, merged, first, second)
	})
	a.verifyNow("native")
}

// A file that the agent hashes after the event, and that is written to before it does, within one tick of the change time.
func TestNeverSilentTick(t *testing.T) {
	sample(t, "6.12")
	for mode, use := range map[string]func(path string, then func() error) error{"kernel": usedLater, "agent": usedAtOnce} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			dir := tempDir(t, "/root")
			const files = 200
			contents := [2][]byte{tinyProgram("before"), tinyProgram("after!")}
			for i := range files {
				path := fmt.Sprintf("%s/f%d", dir, i)
				if err := os.WriteFile(path, contents[0], 0o755); err != nil {
					t.Fatal(err)
				}
				if err := use(path, func() error { return overwrite(path, contents[1]) }); err != nil {
					t.Fatal(err)
				}
			}
			list := a.list("native")
			_, violations := names(list)
			wrong := 0
			for _, e := range list {
				if !e.Violation() && filepath.Dir(e.Name()) == dir && e.FileDigest().String() == digestOf(contents[1]) {
					wrong++
				}
			}
			t.Logf("of %d files %d have violations", files, len(violations))
			if wrong > 0 {
				t.Errorf("%d of %d files have the digest of what was written after their use", wrong, files)
			}
			a.verifyNow("native")
		})
	}
}

// A file system that counts change times in whole seconds, as ext4 with small inodes does: what is changed within one is measured again.
func TestNeverSilentTickOfASecond(t *testing.T) {
	sample(t, "6.1")
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			dir := onDisk(t, "ext4 -I 128").dir
			var sums []string
			for i := range 5 {
				path := fmt.Sprintf("%s/f%d", dir, i)
				for _, text := range []string{"before", "after!"} {
					content := tinyProgram(fmt.Sprint(text, i))
					sums = append(sums, digestOf(content))
					if err := os.WriteFile(path, content, 0o755); err != nil {
						t.Fatal(err)
					}
					for range 2 {
						time.Sleep(30 * time.Millisecond)
						mapped(t, path)()
						a.caughtUp()
					}
				}
			}
			found := digestsOf(a.list("native"))
			for i, sum := range sums {
				if found[sum] == 0 {
					t.Errorf("f%d: %s has no entry", i/2, sum)
				}
			}
			a.verifyNow("native")
		})
	}
}

// usedLater maps a file, makes the mapping executable and takes it away. What is there when then is done is looked at by the agent.
func usedLater(path string, then func() error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	m, err := unix.MmapPtr(int(f.Fd()), 0, nil, 4096, unix.PROT_READ, unix.MAP_PRIVATE)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	err = errors.Join(unix.Mprotect(unsafe.Slice((*byte)(m), 4096), unix.PROT_READ|unix.PROT_EXEC), unix.MunmapPtr(m, 4096), then())
	if err != nil {
		return err
	}
	if f, err = os.Open(path); err != nil {
		return err
	}
	_, err = unix.MmapPtr(int(f.Fd()), 0, m, 4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_FIXED_NOREPLACE) // it stays until the tests end
	if errors.Is(err, unix.EEXIST) {
		err = nil // another goroutine has mapped something there: the agent finds nothing to look at
	}
	return errors.Join(err, f.Close())
}

// usedAtOnce maps a file executable and takes the mapping away.
func usedAtOnce(path string, then func() error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return errors.Join(unix.Munmap(m), then())
}
