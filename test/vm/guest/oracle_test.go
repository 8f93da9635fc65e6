//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

const kernelIMA = "/sys/kernel/security/ima/"

// kernelList returns the kernel's own measurement list.
func kernelList(t *testing.T) []*imalog.Entry {
	t.Helper()
	f, err := os.Open(kernelIMA + "binary_runtime_measurements")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return readList(t, f)
}

// identity is what must be equal in both lists: template and data, by their digest.
func identity(e *imalog.Entry) string { return e.Template() + " " + e.Digest(ima.SHA256).String() }

// The kernel's own IMA measures the same workload by the same policy: ours has every entry that it has, and none that it lacks.
// The name sorts last: a policy once written stays until the machine is off.
func TestMainJobZOracle(t *testing.T) {
	template := strings.Fields(readFile(t, kernelIMA+"ascii_runtime_measurements"))[2]
	a := newAgent(t, "--template", template)
	a.start()
	before := map[string]bool{}
	if err := os.WriteFile(kernelIMA+"policy", []byte(execPolicy), 0o600); err != nil {
		t.Fatalf("load the policy into the kernel: %v", err)
	}
	if _, err := a.client().Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, e := range a.list("native") {
		before[identity(e)] = true
	}
	had := len(kernelList(t))
	workload(t)
	oursAfter := a.list("native")
	theirs := kernelList(t)[had:]
	ours := map[string]bool{}
	for _, e := range oursAfter {
		ours[identity(e)] = true
	}
	theirSet := map[string]bool{}
	distinct := map[string]bool{}
	for _, e := range theirs {
		theirSet[identity(e)] = true
		distinct[e.Name()] = true
		if !ours[identity(e)] {
			t.Errorf("the kernel has %s, ours has not", strings.TrimSpace(string(e.AppendASCII(nil, ima.SHA256))))
		}
	}
	for _, e := range oursAfter {
		if id := identity(e); !before[id] && !theirSet[id] {
			t.Errorf("ours has %s, the kernel has not", strings.TrimSpace(string(e.AppendASCII(nil, ima.SHA256))))
		}
	}
	t.Logf("template %s: %d entries of the kernel's IMA, of %d files; %d of ours", template, len(theirs), len(distinct), len(oursAfter))
	if len(distinct) < 200 {
		t.Errorf("only %d distinct files were compared", len(distinct))
	}
}

// workload runs what a list should tell apart: programs on several file systems, libraries, scripts, changed files.
func workload(t *testing.T) {
	t.Helper()
	disk, memory := tempDir(t, "/root"), tempDir(t, "/tmp")
	for i := range 80 {
		for _, dir := range []string{disk, memory} {
			path := fmt.Sprintf("%s/p%d", dir, i)
			makeProgram(t, path)
			runProgram(t, path)
			runProgram(t, path)
		}
	}
	overlay := tempDir(t, "/root")
	sh(t, fmt.Sprintf("cd %s && mkdir lower upper work merged", overlay))
	for i := range 20 {
		makeProgram(t, fmt.Sprintf("%s/lower/p%d", overlay, i))
	}
	sh(t, fmt.Sprintf("cd %s && mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged", overlay))
	t.Cleanup(func() { exec.Command("umount", overlay+"/merged").Run() })
	for i := range 20 {
		runProgram(t, fmt.Sprintf("%s/merged/p%d", overlay, i))
	}
	makeProgram(t, overlay+"/merged/new")
	runProgram(t, overlay+"/merged/new")
	// Changed and run again: on disk, in memory, copied up.
	for _, path := range []string{disk + "/p0", memory + "/p0", overlay + "/merged/p0", overlay + "/merged/new"} {
		for version := range 2 {
			sh(t, fmt.Sprintf("sleep 0.05; printf again%d >>%s; sleep 0.05", version, path))
			runProgram(t, path)
			runProgram(t, path)
		}
	}
	// Scripts, and an interpreter of our own.
	makeProgram(t, disk+"/interpreter")
	for i := range 10 {
		script := filepath.Join(disk, fmt.Sprintf("script%d", i))
		line := "#!/bin/bash\n: " + script + "\n"
		if i%2 == 0 {
			line = "#!" + disk + "/interpreter\n: " + script + "\n"
		}
		if err := os.WriteFile(script, []byte(line), 0o755); err != nil {
			t.Fatal(err)
		}
		runProgram(t, script)
	}
	// Dynamically linked programs and their libraries, names with spaces, links.
	sh(t, "ls / | grep -c . | sort | uniq | head -1 | tail -1 | tr a b | cut -c1 | wc -l >/dev/null; find /etc -maxdepth 1 | xargs ls -d >/dev/null; "+
		"sed p /etc/hostname >/dev/null; tar cf - /etc/hostname 2>/dev/null | gzip | od | cksum >/dev/null; date >/dev/null; df / >/dev/null; "+
		"openssl version >/dev/null 2>&1 || true; perl -e 1; ps >/dev/null; ip link >/dev/null; getfattr / >/dev/null; mount >/dev/null; lsns >/dev/null 2>&1 || true")
	makeProgram(t, disk+"/with some  spaces")
	runProgram(t, disk+"/with some  spaces")
	sh(t, fmt.Sprintf("ln %[1]s/p1 %[1]s/hard; ln -s p2 %[1]s/soft; %[1]s/hard; %[1]s/soft", disk))
}
