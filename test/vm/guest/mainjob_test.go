//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What runs in a namespace is in its list and its ancestors', each by its own policy, and in nobody else's.
func TestMainJobTwoContainers(t *testing.T) {
	sample(t, "6.1")
	a := newAgent(t)
	// Children don't name what user 1234 owns; the native policy does.
	a.args = append(a.args, "--ns-policy", a.write("ns-policy", "dont_measure fowner=1234\n"+execPolicy))
	a.start()
	program := func(name string) func(string) {
		return func(root string) {
			makeProgram(t, filepath.Join(root, "bin", name))
			makeProgram(t, filepath.Join(root, "bin", "parent-only"))
			if err := os.Chown(filepath.Join(root, "bin", "parent-only"), 1234, 0); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, "bin", "shared"), tinyProgram("the same in both"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	one := startContainer(t, "one", "/bin/only-one; /bin/shared; /bin/parent-only; unshare -m /bin/nested", func(root string) {
		program("only-one")(root)
		makeProgram(t, filepath.Join(root, "bin", "nested"))
	})
	two := startContainer(t, "two", "/bin/only-two; /bin/shared; /bin/parent-only", program("only-two"))

	want := []struct {
		file                 string
		native, inOne, inTwo int
	}{
		{"/bin/only-one", 1, 1, 0},
		{"/bin/only-two", 1, 0, 1},
		{"/bin/shared", 1, 1, 1},
		{"/bin/parent-only", 2, 0, 0}, // two files: each has its own path's text in it
		{"/bin/nested", 1, 1, 0},
		{"/bin/busybox", 1, 1, 1},
	}
	native, _ := names(a.list("native"))
	inOne, _ := names(a.list(one.ns()))
	inTwo, _ := names(a.list(two.ns()))
	for _, w := range want {
		if native[w.file] != w.native || inOne[w.file] != w.inOne || inTwo[w.file] != w.inTwo {
			t.Errorf("%s: native %d, one %d, two %d; want %+v", w.file, native[w.file], inOne[w.file], inTwo[w.file], w)
		}
	}
	root := a.settled("native")
	for _, c := range []*container{one, two} {
		if n := a.settled(c.ns()); n.Parent != root.Name() || n.Violations != 0 {
			t.Errorf("container %s: %+v", c.id, n)
		}
	}
	a.verify("native", one.ns(), two.ns())
	inum := mountNS(t, one.pid)
	socket := strings.TrimPrefix(a.settled(one.ns()).TPM, "unix:")
	one.stop()
	a.awaitGone(inum)
	// Its list is told of no more at once; its vTPM is shut down first, then its folder goes.
	left := func() (paths []string) {
		for _, pattern := range []string{socket, a.dir + "/state/boots/*/ns/" + fmt.Sprint(inum) + "-*"} {
			found, err := filepath.Glob(pattern)
			if err != nil {
				t.Fatal(err)
			}
			paths = append(paths, found...)
		}
		return paths
	}
	for deadline := time.Now().Add(time.Minute); len(left()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the namespace is outlived by %v", left())
		}
	}
}

// A program run at depth d is in the lists of d and of all above it, of none below.
func TestMainJobDepth32(t *testing.T) {
	leave(t)
	const depth = 32
	a := newAgent(t)
	// Only the programs of this test: each level's shell is nobody's concern.
	a.args = append(a.args, "--ns-policy", a.write("ns-policy", "measure func=BPRM_CHECK fowner=4321\n"))
	a.start()
	dir := tempDir(t, "/root")
	for d := 1; d <= depth; d++ {
		path := fmt.Sprintf("%s/at-%d", dir, d)
		makeProgram(t, path)
		if err := os.Chown(path, 4321, 0); err != nil {
			t.Fatal(err)
		}
	}
	sh(t, "mkfifo "+dir+"/stop")
	script := filepath.Join(dir, "down")
	err := os.WriteFile(script, []byte(fmt.Sprintf(`#!/bin/bash
readlink /proc/self/ns/mnt >%[1]s/ns-$1
%[1]s/at-$1
if [ $1 = %[2]d ]; then : >%[1]s/bottom; else unshare -m %[1]s/down $(($1 + 1)) & fi
read line <%[1]s/stop
wait
`, dir, depth)), 0o755)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", script, "1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		sh(t, "exec 3<>"+dir+"/stop; for i in $(seq 40); do echo; done >&3; sleep 2")
		cmd.Process.Kill()
		cmd.Wait()
	}()
	sh(t, fmt.Sprintf("for i in $(seq 2400); do [ -e %s/bottom ] && exit 0; sleep 0.1; done; exit 1", dir))

	for at := 1; at <= depth; at++ {
		inum := strings.Trim(sh(t, fmt.Sprintf("cat %s/ns-%d", dir, at)), "mnt:[]")
		got, _ := names(a.list(inum))
		for d := 1; d <= depth; d++ {
			if in := got[fmt.Sprintf("%s/at-%d", dir, d)] == 1; in != (d >= at) {
				t.Errorf("the program run at depth %d is in the list of depth %d: %v", d, at, in)
			}
		}
	}
	native, _ := names(a.list("native"))
	for d := 1; d <= depth; d++ {
		if native[fmt.Sprintf("%s/at-%d", dir, d)] != 1 {
			t.Errorf("the program run at depth %d is not in the native list", d)
		}
	}
	bottom := strings.Trim(sh(t, fmt.Sprintf("cat %s/ns-%d", dir, depth)), "mnt:[]")
	if n := a.settled(bottom); n.Depth != depth {
		t.Errorf("the innermost namespace has depth %d", n.Depth)
	}
	a.verify("native", bottom)
}

// An inode number comes back for the next namespace at once: their lists must never meet.
func TestMainJobInodeNumberReuse(t *testing.T) {
	a := startAgent(t)
	dir := tempDir(t, "/root")
	seen := map[uint32]int{}
	reused := 0
	for i := range sized(10, 40, 100) {
		file := fmt.Sprintf("%s/of-%d", dir, i)
		makeProgram(t, file)
		cmd := exec.Command("unshare", "-m", "/bin/bash", "-c", file+"; echo up; read line")
		in, _ := cmd.StdinPipe()
		out, _ := cmd.StdoutPipe()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		inum := mountNS(t, cmd.Process.Pid)
		if _, ok := seen[inum]; ok {
			reused++
		}
		seen[inum] = i
		got, _ := names(a.list(fmt.Sprint(inum)))
		for name := range got {
			if n, err := strconv.Atoi(strings.TrimPrefix(name, dir+"/of-")); err == nil && n != i {
				t.Errorf("namespace %d with inode number %d has an entry of namespace %d", i, inum, n)
			}
		}
		if got[file] != 1 {
			t.Errorf("namespace %d lacks its own entry: %v", i, got)
		}
		in.Close()
		cmd.Wait()
	}
	if reused == 0 {
		t.Error("no inode number came back: nothing was shown")
	}
}

// Changed content is measured again, unchanged content is not, whoever changes it and however it is reached.
func TestMainJobChangedContent(t *testing.T) {
	sample(t, "6.1", "6.18")
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			base, tmpfs := mountOverlay(t, func(lower string) { makeProgram(t, lower+"/below") }), tempDir(t, "/tmp")
			for _, file := range []string{base + "/plain", tmpfs + "/plain", base + "/merged/below", base + "/merged/above"} {
				if !strings.HasSuffix(file, "below") {
					makeProgram(t, file)
				}
				var want []string
				for version := range 3 {
					if version > 0 {
						sh(t, fmt.Sprintf("sleep 0.05; printf v%d >>%s; sleep 0.05", version, file))
					}
					for range 3 {
						runProgram(t, file)
					}
					want = append(want, "sha256:"+strings.Fields(sh(t, "sha256sum "+file))[0])
				}
				var got []string
				for _, e := range a.list("native") {
					if e.Name() == file {
						got = append(got, e.FileDigest().String())
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%s: entries %v, want %v", file, got, want)
				}
			}
		})
	}
}

// Content without a name: memfd, deleted files; and a mapping made executable afterwards.
func TestMainJobOddContent(t *testing.T) {
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			dir := tempDir(t, "/root")
			makeProgram(t, dir+"/deleted")
			sh(t, fmt.Sprintf(`exec 9<%s/deleted; rm %s/deleted; /proc/self/fd/9`, dir, dir))
			memfdDigest := runMemfd(t, false)
			mapped := dir + "/mapped"
			makeProgram(t, mapped)
			mapExecutableLater(t, mapped)

			measured, violations := map[string]string{}, map[string]bool{}
			for _, e := range a.list("native") {
				if e.Violation() {
					violations[e.Name()] = true
				} else {
					measured[e.Name()] = e.FileDigest().String()
				}
			}
			if measured["memfd:odd"] != memfdDigest && !(mode == "agent" && violations["memfd:odd"]) {
				t.Errorf("memfd: %q, want %s", measured["memfd:odd"], memfdDigest)
			}
			if measured[dir+"/deleted"] == "" && !(mode == "agent" && violations[dir+"/deleted"]) {
				t.Errorf("a deleted file left no entry: %v %v", measured, violations)
			}
			if measured[mapped] == "" {
				t.Errorf("a mapping made executable left no entry: %v", violations)
			}
		})
	}
}
