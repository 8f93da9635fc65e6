//go:build vm

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// mapped has a file mapped executable until the returned function is called. Its descriptor is closed, as by a linker.
func mapped(t *testing.T, path string) (release func()) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return func() { unix.Munmap(m) }
}

// openForWriting opens a file for writing, writes what is given, and closes it.
func openForWriting(path string, flags int, write string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|flags, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(write)
	return errors.Join(err, f.Close())
}

// writerCase is a way to open a file for writing.
type writerCase struct {
	name string
	says string                          // the same in words
	do   func(t *testing.T, path string) // the file is there and was not measured yet
	want int                             // violations that name the file
	less int                             // of them on an overlay whose file is of a lower layer: a mapping of that is not concerned
}

// openBefore is the case of a file that is open for writing before it is measured: the violation is open_writers there, else tomtou.
const openBefore = "open for writing already"

// writerCases are ways to open measured files for writing, while they are in use or not. The agent has looked before each change, or it
// would find the file changed.
func writerCases(a *agent) []writerCase {
	write := func(t *testing.T, path string, flags int, text string) {
		t.Helper()
		a.caughtUp()
		if err := openForWriting(path, flags, text); err != nil {
			t.Error(err)
		}
	}
	return []writerCase{
		{"in use", "it is mapped, and changed", func(t *testing.T, path string) {
			defer mapped(t, path)()
			write(t, path, os.O_APPEND, "changed")
		}, 1, 1},
		{"open", "its descriptor is open as well", func(t *testing.T, path string) {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			defer mapped(t, path)()
			write(t, path, os.O_APPEND, "changed")
		}, 1, 0},
		{"in use, not changed", "it is opened for writing twice, and not changed", func(t *testing.T, path string) {
			defer mapped(t, path)()
			write(t, path, 0, "")
			write(t, path, 0, "")
		}, 1, 1},
		{"for reading and writing", "it is opened for reading and writing", func(t *testing.T, path string) {
			defer mapped(t, path)()
			a.caughtUp()
			sh(t, "exec 3<>"+path)
		}, 1, 1},
		{"truncated", "it is truncated by its opening", func(t *testing.T, path string) {
			defer mapped(t, path)()
			write(t, path, os.O_TRUNC, "")
		}, 1, 1},
		{"by another link", "it is opened by another link", func(t *testing.T, path string) {
			defer mapped(t, path)()
			a.caughtUp() // a link is a change, too
			if err := os.Link(path, path+".link"); err != nil {
				t.Error(err)
			}
			write(t, path+".link", os.O_APPEND, "changed")
		}, 1, 1},
		{"again, with new content", "changed, mapped anew, changed again", func(t *testing.T, path string) {
			release := mapped(t, path)
			write(t, path, os.O_APPEND, "changed")
			release()
			defer mapped(t, path)()
			write(t, path, os.O_APPEND, "again")
		}, 2, 1},
		{openBefore, "it is open for writing before it is mapped", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			mapped(t, path)()
			a.caughtUp()
		}, 1, 0},
		{"not in use any more", "it is not mapped any more", func(t *testing.T, path string) {
			mapped(t, path)()
			write(t, path, os.O_APPEND, "changed")
		}, 0, 0},
		{"made executable later", "its mapping is made executable later", func(t *testing.T, path string) {
			mapExecutableLater(t, path)
			write(t, path, os.O_APPEND, "changed")
		}, 1, 1},
		{"read only by others", "others open it for reading", func(t *testing.T, path string) {
			defer mapped(t, path)()
			a.caughtUp()
			sh(t, "cat "+path+" >/dev/null")
		}, 0, 0},
		{"replaced", "another file takes its name", func(t *testing.T, path string) {
			defer mapped(t, path)()
			a.caughtUp()
			sh(t, fmt.Sprintf("cp %[1]s %[1]s.new && mv %[1]s.new %[1]s", path))
		}, 0, 0},
		{"a running program", "it is a running program (ETXTBSY)", func(t *testing.T, path string) {
			sh(t, "cp /bin/busybox "+path)
			cmd := exec.Command(path)
			cmd.Args[0] = "cat"
			in, err := cmd.StdinPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer in.Close()
			if err := openForWriting(path, 0, ""); !errors.Is(err, unix.ETXTBSY) {
				t.Errorf("open a running program for writing: %v", err)
			}
		}, 0, 0},
	}
}

// lowerPlace is an overlay's file that nobody has written to.
const lowerPlace = "overlay, lower"

// writerPlaces makes folders of the kinds of file systems that a writer may find a file on, each with a file named file.
func writerPlaces(t *testing.T) map[string]string {
	t.Helper()
	places := map[string]string{"disk": tempDir(t, "/root"), "memory": tempDir(t, "/tmp")}
	overlay := mountOverlay(t, func(lower string) { makeProgram(t, lower+"/file") })
	places[lowerPlace] = overlay + "/merged"
	if err := os.Mkdir(overlay+"/merged/upper", 0o755); err != nil {
		t.Fatal(err)
	}
	places["overlay, upper"] = overlay + "/merged/upper"
	for place, dir := range places {
		if place != lowerPlace {
			makeProgram(t, dir+"/file")
		}
	}
	return places
}

// A file that is opened for writing while someone has it open as measured is a violation of its name, once for each content.
func TestNeverSilentWriters(t *testing.T) {
	a := startAgent(t)
	own := a.settled("native").Name()
	for i, c := range writerCases(a) {
		t.Run(c.name, func(t *testing.T) {
			a := a.in(t)
			reason := "tomtou"
			if c.name == openBefore {
				reason = "open_writers"
			}
			places := writerPlaces(t)
			if short() && i > 1 {
				places = map[string]string{"disk": places["disk"], lowerPlace: places[lowerPlace]}
			}
			for place, dir := range places {
				path := dir + "/file"
				want := c.want
				if place == lowerPlace {
					want -= c.less
				}
				c.do(t, path)
				measured, violations := names(a.list("native"))
				if violations[path] != want || measured[path] == 0 {
					t.Errorf("%s: %d violations, want %d; %d entries", place, violations[path], want, measured[path])
				}
				said := fmt.Sprintf(`"msg":"violation","reason":"%s","file":"%s","ns":"%s"`, reason, path, own)
				a.awaitSaid(said, want)
				if n := strings.Count(a.log.String(), said); n != want {
					t.Errorf("%s: the agent's log has %d records %s, want %d: %s", place, n, said, want, tail(a.log.String(), 1000))
				}
			}
		})
	}
	a.verifyNow("native")
}

// startHolder runs a program in a mount namespace of its own, with a library if one is given, until the test ends. It returns the namespace.
func startHolder(t *testing.T, preload string) (name string) {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", "LD_PRELOAD="+preload+" cat; :")
	in, err := cmd.StdinPipe()
	out, errOut := cmd.StdoutPipe()
	if err = errors.Join(err, errOut, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil { // it runs
		t.Fatal(err)
	}
	return fmt.Sprint(mountNS(t, cmd.Process.Pid))
}

// It is a violation in the lists that tell of the file, and in no others; whatever became of the agent in between.
func TestNeverSilentWritersOfContainers(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t, "--namespaces", "all", "--ns-tpm", "none") // a vTPM would end with the kernel side below
	dir := tempDir(t, "/root")
	file := dir + "/lib.so"
	sh(t, "cp /lib/x86_64-linux-gnu/libm.so.6 "+file)
	holder := func(preload string) string { return startHolder(t, preload) }
	of, other := holder(file), holder("")
	a.caughtUp()
	check := func(when string, wants map[string]int) {
		t.Helper()
		wants[other] = 0
		for ns, want := range wants {
			if _, violations := names(a.list(ns)); violations[file] != want {
				t.Errorf("%s: %d violations in %s's list, want %d", when, violations[file], ns, want)
			}
		}
	}
	write := func(text string) {
		t.Helper()
		if err := openForWriting(file, os.O_APPEND, text); err != nil {
			t.Fatal(err)
		}
	}
	check("before", map[string]int{of: 0, "native": 0})
	write("1")
	check("while it runs", map[string]int{of: 1, "native": 1})

	again := holder(file)
	a.caughtUp()
	a.signal(syscall.SIGKILL)
	write("2")
	a.start()
	check("while the agent was away", map[string]int{again: 1, "native": 2})

	last := holder(file)
	a.caughtUp()
	a.signal(syscall.SIGKILL)
	run(t, program, append([]string{"unload"}, a.folders()...)...)
	a.start()
	write("3")
	check("after the kernel side began anew", map[string]int{last: 1, "native": 3})
	a.verifyNow("native")
}

// A writer that there was no room to tell of is a violation in each list that tells of files, though the writer is in none of their namespaces,
// and though the agent comes to know of a list after the writer. The next writer is told of.
func TestNeverSilentWritersLost(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all", "--ns-tpm", "none", "--ring-size", "64")
	dir := tempDir(t, "/root")
	file, lateFile := dir+"/lib.so", dir+"/late.so"
	sh(t, fmt.Sprintf("cp /lib/x86_64-linux-gnu/libm.so.6 %s; cp /lib/x86_64-linux-gnu/libm.so.6 %s; echo >>%[2]s", file, lateFile))
	of := startHolder(t, file)
	var writes []string // small records, for what is left of the room
	for i := range 20 {
		path := fmt.Sprintf("%s/small%d", dir, i)
		makeProgram(t, path)
		defer mapped(t, path)()
		writes = append(writes, path)
	}
	a.caughtUp()
	a.cmd.Process.Signal(syscall.SIGSTOP)
	late := startHolder(t, lateFile)
	startLoad(t, tempDir(t, "/root"), 100, 1).wait()
	for _, path := range append(writes, file, lateFile) {
		if err := openForWriting(path, 0, ""); err != nil {
			t.Error(err)
		}
	}
	a.cmd.Process.Signal(syscall.SIGCONT)
	a.caughtUp()
	told := map[string]int{}
	for ns, path := range map[string]string{of: file, late: lateFile, "native": file} {
		measured, violations := names(a.list(ns))
		told[ns] = count(violations, "imans-lost/writer_lost/0:0/")
		if violations[path] != 0 || measured[path] != 1 {
			t.Errorf("%s: %d entries, %d violations of %s: the writer was not lost", ns, measured[path], violations[path], path)
		}
		if told[ns] == 0 {
			t.Errorf("%s: no violation of the lost writer: %v", ns, violations)
		}
	}
	// A restart tells nothing twice.
	a.signal(syscall.SIGKILL)
	a.start()
	a.caughtUp()
	for ns, had := range told {
		if _, violations := names(a.list(ns)); count(violations, "imans-lost/writer_lost/0:0/") != had {
			t.Errorf("%s: %v, had %d of lost writers", ns, violations, had)
		}
	}
	if err := openForWriting(file, 0, ""); err != nil {
		t.Error(err)
	}
	a.caughtUp()
	for _, ns := range []string{of, "native"} {
		if _, violations := names(a.list(ns)); violations[file] != 1 {
			t.Errorf("%s: %d violations of %s, which is written to again", ns, violations[file], file)
		}
	}
	a.verifyNow("native")
}

// Two names of a file that someone keeps open for writing are as many events as he likes. What is kept of them does not grow with those.
func TestNeverSilentWritersOfManyNames(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t)
	dir := tempDir(t, "/root")
	for range 12 {
		dir += "/" + strings.Repeat("d", 250)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := dir + "/file"
	makeProgram(t, path)
	if err := os.Link(path, path+".link"); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mapped(t, path)()
	a.caughtUp()
	native := strings.TrimSpace(sh(t, "ls -d "+a.dir+"/state/boots/*/native"))
	size := func(name string) int64 {
		st, err := os.Stat(native + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	held, list := size("held_inodes"), size("binary_runtime_measurements")
	for range sized(100, 500, 100000) {
		mapped(t, path+".link")()
		mapped(t, path)()
	}
	a.caughtUp()
	if grown := size("held_inodes") - held; grown > 16<<10 {
		t.Errorf("held_inodes grew by %d bytes, the list by %d", grown, size("binary_runtime_measurements")-list)
	}
	_, violations := names(a.list("native"))
	if violations[path] != 1 || violations[path+".link"] != 0 {
		t.Errorf("%d violations of the file, %d of its link", violations[path], violations[path+".link"])
	}
}
