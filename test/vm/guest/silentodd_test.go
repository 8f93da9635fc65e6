//go:build vm

package guest

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// oddRun is a way to run something, and what must be in the list for it.
type oddRun struct {
	name string
	sums []string
}

// runOddCode runs code by ways that are not the usual one.
func runOddCode(t *testing.T, dir string) []oddRun {
	t.Helper()
	var runs []oddRun
	file := func(name string) (path, sum string) {
		path = filepath.Join(dir, name)
		return path, fmt.Sprintf("sha256:%x", makeProgram(t, path))
	}
	did := func(name string, sums ...string) { runs = append(runs, oddRun{name, sums}) }

	did("a program in memory", runMemfd(t, true))
	deleted, sum := file("deleted")
	sh(t, fmt.Sprintf("exec 9<%[1]s; rm %[1]s; /proc/self/fd/9", deleted))
	did("a deleted program", sum)
	at, sum := file("at")
	executeAt(t, at)
	did("execveat of a descriptor", sum)
	interpreter, sum := file("interpreter")
	script := []byte("#!" + interpreter + "\n")
	if err := os.WriteFile(dir+"/script", script, 0o755); err != nil {
		t.Fatal(err)
	}
	runProgram(t, dir+"/script")
	did("a script and its interpreter", sum, digestOf(script))
	other, sum := file("other-interpreter")
	magic := []byte("IMANSodd\n")
	if err := os.WriteFile(dir+"/misc", magic, 0o755); err != nil {
		t.Fatal(err)
	}
	registerOdd(t, other)
	runProgram(t, dir+"/misc")
	did("a file by binfmt_misc, and its interpreter", sum, digestOf(magic))
	linked := dir + "/linked"
	sh(t, fmt.Sprintf("cp /bin/true %[1]s; printf x >>%[1]s; /lib64/ld-linux-x86-64.so.2 %[1]s", linked))
	did("a program by ld.so", "sha256:"+sh(t, "sha256sum "+linked+" | cut -c 1-64"))
	later, sum := file("later")
	mapExecutableLater(t, later)
	did("a mapping made executable (mprotect)", sum)
	implied, sum := file("implied")
	mapImplied(t, implied)
	did("a mapping with READ_IMPLIES_EXEC", sum)
	remapped, sum := file("remapped")
	remapImplied(t, remapped)
	did("remap_file_pages with READ_IMPLIES_EXEC", sum)
	old := dir + "/32-bit"
	if err := os.WriteFile(old, tinyProgram32(old), 0o755); err != nil {
		t.Fatal(err)
	}
	runProgram(t, old)
	did("a 32-bit program", digestOf(tinyProgram32(old)))
	for _, c := range []struct{ name, way string }{
		{"in a chroot", "chroot %[1]s/root /p"},
		{"after pivot_root", "unshare -m sh -c 'cd %[1]s/root && mount --bind . . && cd . && cd %[1]s/root && pivot_root . old && exec /p'"},
	} {
		root := dir + "/root"
		sh(t, fmt.Sprintf("rm -rf %[1]s; mkdir -p %[1]s/old", root))
		content := tinyProgram(c.way)
		if err := os.WriteFile(root+"/p", content, 0o755); err != nil {
			t.Fatal(err)
		}
		sh(t, fmt.Sprintf(c.way, dir))
		did(c.name, digestOf(content))
	}
	return runs
}

// executeAt runs a program by its descriptor alone: execveat with AT_EMPTY_PATH, by a shell's child.
func executeAt(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("perl", "-e", `my $e = ""; syscall(322, 3, $e, 0, 0, 0x1000); die $!`) // execveat
	cmd.ExtraFiles = []*os.File{f}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("execveat: %v %s", err, out)
	}
}

// mapImplied maps a file for reading in a process whose personality makes that executable.
func mapImplied(t *testing.T, path string) {
	t.Helper()
	const mmap = `syscall(135, 0x0400000) >= 0 or die $!; open F, "<", $ARGV[0] or die; ` + // personality(READ_IMPLIES_EXEC)
		`my $a = syscall(9, 0, 4096, 1, 2, fileno(F), 0); $a != -1 or die $!` // mmap(PROT_READ, MAP_PRIVATE)
	if out, err := exec.Command("perl", "-e", mmap, path).CombinedOutput(); err != nil {
		t.Fatalf("map with READ_IMPLIES_EXEC: %v %s", err, out)
	}
}

// remapImplied maps a file for reading, then has the mapping made anew in a process whose personality makes that executable.
func remapImplied(t *testing.T, path string) {
	t.Helper()
	const remap = `open F, "+<", $ARGV[0] or die; my $a = syscall(9, 0, 4096, 1, 1, fileno(F), 0); $a != -1 or die $!; ` + // mmap(PROT_READ, MAP_SHARED), which is none where it is open for reading only
		`syscall(135, 0x0400000) >= 0 or die $!; syscall(216, $a, 4096, 0, 0, 0) == 0 or die $!; ` + // personality(READ_IMPLIES_EXEC), remap_file_pages
		`open M, "<", "/proc/self/maps" or die; grep { /^\S+ r-xs .*\Q$ARGV[0]\E$/ } <M> or die "not executable"`
	if out, err := exec.Command("perl", "-e", remap, path).CombinedOutput(); err != nil {
		t.Fatalf("remap with READ_IMPLIES_EXEC: %v %s", err, out)
	}
}

// Code that is run in an odd way is in the list all the same.
func TestNeverSilentOddCode(t *testing.T) {
	sample(t, "6.18")
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			runs := runOddCode(t, tempDir(t, "/root"))
			found, violations := map[string]bool{}, 0
			for _, e := range a.list("native") {
				if e.Violation() {
					violations++
				} else {
					found[e.FileDigest().String()] = true
				}
			}
			missing := 0
			for _, r := range runs {
				for _, sum := range r.sums {
					if !found[sum] {
						missing++
						if mode == "kernel" {
							t.Errorf("%s: no entry with %s", r.name, sum)
						}
					}
				}
			}
			if missing > violations {
				t.Errorf("%d contents are missing, and there are %d violations", missing, violations)
			}
			a.verifyNow("native")
		})
	}
}

// insideWays are odd ways to run a file p, of a folder $d, in a namespace of its own.
var insideWays = []struct{ name, line string }{
	{"chroot", `chroot $d /p`},
	{"pivot_root", `cd $d && mount --bind . . && cd $d && pivot_root . old && /p`},
	{"binfmt_misc", `$d/misc`},
	{"a script", `$d/script`},
	{"a descriptor", `exec 9<$d/p && /proc/self/fd/9`},
}

// What a namespace runs in an odd way is in its own list, and in the native one.
func TestNeverSilentOddCodeInside(t *testing.T) {
	sample(t, "6.18")
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode, "--namespaces", "all", "--ns-tpm", "none")
			for _, way := range insideWays {
				dir := tempDir(t, "/root")
				sh(t, "mkdir "+dir+"/old")
				sums := []string{fmt.Sprintf("sha256:%x", makeProgram(t, dir+"/p"))}
				for name, text := range map[string]string{"script": "#!" + dir + "/p\n", "misc": "IMANSodd\n" + dir} {
					if err := os.WriteFile(dir+"/"+name, []byte(text), 0o755); err != nil {
						t.Fatal(err)
					}
					if strings.HasSuffix(way.line, "/"+name) {
						sums = append(sums, digestOf([]byte(text)))
					}
				}
				registerOdd(t, dir+"/p")
				ns := runInside(t, fmt.Sprintf("d=%s; %s", dir, way.line))
				for _, name := range []string{ns, "native"} {
					list := a.list(name)
					found := digestsOf(list)
					_, violations := names(list)
					for _, sum := range sums {
						// By another root's path the agent finds the file while its process is there only.
						if found[sum] != 1 && (mode == "kernel" || violations["/p"] == 0) || mode == "kernel" && len(violations) > 0 {
							t.Errorf("%s: %d entries with %s in the list of %s, violations %v", way.name, found[sum], sum, name, violations)
						}
					}
				}
				if found := digestsOf(a.list(runInside(t, ":"))); found[sums[0]] > 0 {
					t.Errorf("%s: it is in a neighbour's list", way.name)
				}
			}
		})
	}
}

// registerOdd has a program interpret files that begin with IMANSodd, until the test ends.
func registerOdd(t *testing.T, interpreter string) {
	t.Helper()
	sh(t, fmt.Sprintf("m=/proc/sys/fs/binfmt_misc; [ -e $m/register ] || mount -t binfmt_misc b $m; ! [ -e $m/imans ] || echo -1 >$m/imans; printf ':imans:M::IMANSodd::%s:' >$m/register", interpreter))
	t.Cleanup(func() { os.WriteFile("/proc/sys/fs/binfmt_misc/imans", []byte("-1"), 0) })
}

// runInside runs a line of shell in a namespace of its own, which lives until the test ends, and returns its name.
func runInside(t *testing.T, line string) string {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "{ "+line+"; } && echo ran; read line")
	in, err := cmd.StdinPipe()
	out, errOut := cmd.StdoutPipe()
	if err = errors.Join(err, errOut, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "ran\n" {
		t.Errorf("%s: %q, %v", line, said, err)
	}
	return fmt.Sprint(mountNS(t, cmd.Process.Pid))
}
