//go:build vm

package guest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// disk is a file system whose device fails when it is told to: a device-mapper target over a loop device.
type disk struct {
	t                 *testing.T
	name, loop, mount string
	device            string
	sectors           string
}

// newDisk mounts one. options are mkfs.ext4's.
func newDisk(t *testing.T, mount, options string) *disk {
	t.Helper()
	sh(t, "modprobe -a dm_mod dm_flakey loop")
	dir := tempDir(t, "/root")
	d := &disk{t: t, name: filepath.Base(dir), mount: mount}
	d.loop = sh(t, fmt.Sprintf("truncate -s 64M %[1]s/disk && losetup --find --show %[1]s/disk", dir))
	t.Cleanup(func() { exec.Command("losetup", "--detach", d.loop).Run() })
	d.sectors = sh(t, "blockdev --getsz "+d.loop)
	sh(t, fmt.Sprintf("dmsetup create --noudevsync %s --table '%s'", d.name, d.table("")))
	t.Cleanup(func() { exec.Command("dmsetup", "remove", "--force", "--noudevsync", d.name).Run() })
	d.device = "/dev/" + sh(t, "dmsetup info --columns --noheadings -o blkdevname "+d.name)
	sh(t, fmt.Sprintf("mkfs.ext4 -q %s %s && mkdir -p %s", options, d.device, mount))
	d.up()
	t.Cleanup(func() { exec.Command("umount", "--lazy", mount).Run() })
	return d
}

// failsAll is a device of which nothing can be read or written.
const failsAll = "all"

func (d *disk) up() {
	d.t.Helper()
	sh(d.t, fmt.Sprintf("mount %s %s", d.device, d.mount))
}

// table is that of a device whose writes fail, or all that is not in memory; none: of one that works.
func (d *disk) table(fails string) string {
	switch fails {
	case "":
		return fmt.Sprintf("0 %s linear %s 0", d.sectors, d.loop)
	case failsAll:
		return fmt.Sprintf("0 %s error", d.sectors)
	}
	return fmt.Sprintf("0 %s flakey %s 0 0 3600 1 %s", d.sectors, d.loop, fails)
}

// set swaps the table under the mounted file system.
func (d *disk) set(fails string) {
	d.t.Helper()
	sh(d.t, fmt.Sprintf("dmsetup suspend --noflush --nolockfs --noudevsync %[1]s && dmsetup load --noudevsync %[1]s --table '%[2]s' && dmsetup resume --noudevsync %[1]s",
		d.name, d.table(fails)))
}

// Writes to the state folder's disk fail, by write or by sync, for a while or until the file system is mended. Nothing is extended that is
// not on the disk, the agent says what is wrong and goes on, or the next one does, and nothing is lost.
func TestNeverSilentDiskFaults(t *testing.T) {
	sample(t, "6.1")
	for _, c := range []struct {
		name, options string
		then          func(a *agent, d *disk)
	}{
		// Without a journal the file system bears errors: the agent goes on by itself.
		{"goes away", "-O ^has_journal", func(a *agent, d *disk) { d.set("") }},
		{"killed meanwhile", "-O ^has_journal", func(a *agent, d *disk) {
			a.signal(syscall.SIGKILL)
			d.set("")
			a.start()
		}},
		// With one it is of no use after the first error, until it is checked and mounted anew.
		{"journal", "", func(a *agent, d *disk) {
			a.awaitSaid("check it (fsck), mount it anew", 1)
			time.Sleep(7 * time.Second) // the journal is written every five
			a.signal(syscall.SIGTERM)
			if !strings.Contains(a.log.String(), "are not in the log") || a.cmd.ProcessState.ExitCode() == 0 {
				a.t.Errorf("the agent stopped with exit status %d: %s", a.cmd.ProcessState.ExitCode(), tail(a.log.String(), 1000))
			}
			d.set("")
			sh(a.t, fmt.Sprintf("umount %s && { e2fsck -fy %s || [ $? -le 2 ]; }", d.mount, d.device))
			d.up()
			a.start()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newAgent(t, "--ns-tpm", "none")
			d := newDisk(t, a.dir+"/state", c.options)
			a.start()
			dir := tempDir(t, "/root")
			before := startLoad(t, dir+"/before", 5, 1).wait()
			a.register() // these programs are measured, too: once, and before
			d.set("")
			a.caughtUp()
			a.settled("native")
			register := a.register()
			d.set("error_writes")
			digests := startLoad(t, dir+"/during", sized(20, 100, 1000), 2).wait()
			a.awaitSaid("can't write the list, waiting; nothing is lost", 1)
			if now := a.register(); now != register {
				t.Errorf("extended while nothing gets to the disk: PCR %s was %s, is %s", nativePCR, register, now)
			}
			c.then(a, d)
			for path, sum := range startLoad(t, dir+"/after", 5, 1).wait() {
				digests[path] = sum
			}
			for path, sum := range before {
				digests[path] = sum
			}
			a.catchesUp()
			a.settled("native")
			// What counts is on the disk, not in the kernel's memory.
			sh(t, "echo 3 >/proc/sys/vm/drop_caches")
			a.eachOnce(digests, true)
			a.verify("native")
		})
	}
}

// A program's disk fails before it is hashed: a violation names it, and says why. When the disk is well again, so is its entry.
func TestNeverSilentReadErrors(t *testing.T) {
	sample(t, "6.1")
	for _, mode := range []string{"agent", "kernel"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			own := a.settled("native").Name()
			dir := tempDir(t, "/root") + "/mnt"
			d := newDisk(t, dir, "-O ^has_journal")
			sums := map[string]string{}
			for i := range 3 {
				path := fmt.Sprintf("%s/p%d", dir, i)
				size := 300 << 10
				if i == 0 {
					size = 20 << 20 // which the agent maps, where it may
				}
				content := append(tinyProgram(path), bytes.Repeat([]byte(path+"\n"), size/(len(path)+1))...)
				if err := os.WriteFile(path, content, 0o755); err != nil {
					t.Fatal(err)
				}
				sums[path] = digestOf(content)
			}
			sh(t, "sync && echo 1 >/proc/sys/vm/drop_caches") // files, but not their names
			for path := range sums {
				firstPage(t, path)
			}
			d.set(failsAll)
			for path := range sums {
				runProgram(t, path)
			}
			a.caughtUp()
			measured, violations := names(a.list("native"))
			for path := range sums {
				if measured[path] != 0 || violations[path] == 0 {
					t.Errorf("%s: %d entries, %d violations", path, measured[path], violations[path])
				}
				awaitLog(t, a, fmt.Sprintf(`"reason":"read_error","file":"%s","ns":"%s"`, path, own))
			}
			d.set("")
			for path := range sums {
				runProgram(t, path)
			}
			a.eachOnce(sums, true)
			a.verifyNow("native")
		})
	}
}

// firstPage has the kernel keep the first page of a file, and no other.
func firstPage(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
}

// register is the native list's register as tpm2_pcrread has it.
func (a *agent) register() string {
	a.t.Helper()
	return run(a.t, "tpm2_pcrread", "-T", "device:/dev/tpmrm0", "sha256:"+nativePCR)
}

// awaitSaid waits until the agent's log has a text so many times, or more often: it comes through a pipe.
func (a *agent) awaitSaid(text string, times int) {
	a.t.Helper()
	for began := time.Now(); strings.Count(a.log.String(), text) < times; time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > time.Minute {
			a.t.Fatalf("the agent does not say %d times %q: %s", times, text, tail(a.log.String(), 3000))
		}
	}
}

// Somebody removes logs, or the whole state folder, cleans /run, or sets the clock, while the agent runs.
func TestNeverSilentSurroundings(t *testing.T) {
	sample(t, "6.1")
	a := startAgent(t, "--namespaces", "all")
	dir := tempDir(t, "/root")
	c := &crashes{t: t, a: a, dir: dir + "/programs"}
	c.standing = c.open()
	work := func(t *testing.T) {
		c.t, a.t = t, t
		c.execute(nil, false)
		c.execute(c.standing, false)
		c.execute(nil, false)
	}
	defer func() { a.t = t }()
	work(t)
	c.check()
	t.Run("log removed", func(t *testing.T) {
		work(t)
		sh(t, fmt.Sprintf("rm -r %s/state/boots/*/native", a.dir))
		work(t)
		a.awaitSaid("it is written anew", 1)
		work(t)
		c.check()
		a.verify("native")
		c.check()
	})
	t.Run("run cleaned", func(t *testing.T) {
		work(t)
		sh(t, fmt.Sprintf("find %s/run -xdev -mindepth 1 ! -name fs -delete", a.dir))
		work(t)
		a.awaitSocket()
		c.check()
		sh(t, fmt.Sprintf("find %s/run -xdev -mindepth 1 ! -name fs -delete", a.dir))
		a.signal(syscall.SIGKILL)
		work(t)
		a.start()
		c.check()
	})
	t.Run("clock", func(t *testing.T) {
		path := dir + "/changed"
		version := func(n int) {
			if err := os.WriteFile(path, tinyProgram(fmt.Sprint(path, n)), 0o755); err != nil {
				t.Fatal(err)
			}
			runProgram(t, path)
			runProgram(t, path)
		}
		const year = 365 * 24 * 3600
		defer sh(t, fmt.Sprintf("date -s @%d", time.Now().Unix()))
		version(0)
		for n, jump := range []int{year, -2 * year, year} {
			sh(t, fmt.Sprintf("date -s @%d", time.Now().Unix()+int64(jump)))
			work(t)
			version(1 + n)
			c.check()
			if bytes.Contains(a.log.Bytes(), []byte("does not answer")) {
				t.Errorf("a deadline moved with the clock: %s", tail(a.log.String(), 2000))
			}
		}
		a.signal(syscall.SIGKILL)
		sh(t, fmt.Sprintf("date -s @%d", time.Now().Unix()-year))
		work(t)
		a.start()
		version(4)
		c.check()
		if measured, violations := names(a.list("native")); measured[path] != 5 || violations[path] != 0 {
			t.Errorf("a file with 5 contents has %d entries, %d violations", measured[path], violations[path])
		}
	})
	// The whole folder goes, with the records of vTPMs. The lists stay; the next agent says that the vTPM is lost.
	t.Run("state removed", func(t *testing.T) {
		work(t)
		sh(t, fmt.Sprintf("rm -r %s/state", a.dir))
		work(t)
		a.awaitSaid(`native`, 1)
		a.awaitSaid("it is written anew", 2)
		c.check()
		a.verify("native")
		measured, violations := names(a.list(c.standing.name))
		if violations[fmt.Sprintf("imans-lost/vtpm_lost/%s/1", a.namespaces()[c.standing.inum].Name())] != 1 {
			t.Errorf("the list does not say that its vTPM is lost: %v", violations)
		}
		for _, p := range c.ran {
			if p.box == c.standing && measured[p.path] != 1 {
				t.Errorf("%s has %d entries", p.path, measured[p.path])
			}
		}
	})
}

// awaitSocket waits until the agent can be asked again.
func (a *agent) awaitSocket() {
	a.t.Helper()
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		if err := a.answers(time.Minute); err == nil {
			return
		} else if time.Since(began) > time.Minute {
			a.t.Fatalf("the control socket is gone: %v", err)
		}
	}
}
