//go:build vm

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// oracleTemplates are those that files of a group of their own are measured by, from oracleGroup on: all but imalog.IMA, which
// evmctl does not take beside others, and which the kernel can be booted with (vmtest -append ima_template=ima).
var oracleTemplates = []string{imalog.Sig, imalog.NGv2, imalog.Sigv2, imalog.Buf, imalog.Modsig, imalog.EVMSig}

const oracleGroup = 3000

// oraclePolicy measures what runs, some files by other templates.
func oraclePolicy() string {
	var rules strings.Builder
	for i, template := range oracleTemplates {
		for _, f := range []string{"BPRM_CHECK", "MMAP_CHECK"} {
			fmt.Fprintf(&rules, "measure func=%s mask=MAY_EXEC fgroup=%d template=%s\n", f, oracleGroup+i, template)
		}
	}
	return rules.String() + execPolicy
}

const kernelIMA = "/sys/kernel/security/ima/"

// kernelPolicy loads oraclePolicy into the kernel, which takes one only once.
var kernelPolicy = sync.OnceValue(func() error { return os.WriteFile(kernelIMA+"policy", []byte(oraclePolicy()), 0o600) })

// loadKernelPolicy has the kernel's own IMA measure what runs, from the first call on. Tests of before are not to meet that: files' names
// give the order.
func loadKernelPolicy(t *testing.T) {
	t.Helper()
	if err := kernelPolicy(); err != nil {
		t.Fatalf("load the policy into the kernel: %v", err)
	}
}

// kernelList returns the kernel's own measurement list.
func kernelList(t *testing.T) []*imalog.Entry {
	t.Helper()
	return readListFile(t, kernelIMA+"binary_runtime_measurements")
}

// identity is what must be equal in both lists: template and data, by their digest.
func identity(e *imalog.Entry) string { return e.Template() + " " + e.Digest(ima.SHA256).String() }

// The kernel's own IMA measures the same workload by the same policy: ours has every entry that it has, and none that it lacks.
// The name sorts last: a policy once written stays until the machine is off.
func TestMainJobZOracle(t *testing.T) {
	template := strings.Fields(readFile(t, kernelIMA+"ascii_runtime_measurements"))[2]
	a := newAgent(t, "--template", template)
	a.args = append(a.args, "--policy", a.write("policy", oraclePolicy()))
	a.start()
	before := map[string]bool{}
	loadKernelPolicy(t)
	a.caughtUp()
	for _, e := range a.list("native") {
		before[identity(e)] = true
	}
	had := len(kernelList(t))
	a.workload(t)
	a.attributesWorkload(t)
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
	for _, name := range oracleTemplates {
		n := 0
		for _, e := range theirs {
			if e.Template() == name {
				n++
			}
		}
		if n < 10 {
			t.Errorf("only %d entries of template %s were compared", n, name)
		}
	}
	t.Logf("template %s: %d entries of the kernel's IMA, of %d files; %d of ours", template, len(theirs), len(distinct), len(oursAfter))
	if len(distinct) < 200 {
		t.Errorf("only %d distinct files were compared", len(distinct))
	}
}

// caughtUp returns when the lists have all that ran before. What the agent itself reads of a file, it reads after the event: on a busy
// machine that may be later than the next change, and then it says so instead of guessing.
func (a *agent) caughtUp() {
	a.t.Helper()
	if _, err := a.client().Status(a.t.Context()); err != nil {
		a.t.Fatal(err)
	}
}

// workload runs what a list should tell apart: programs on several file systems, libraries, scripts, changed files.
func (a *agent) workload(t *testing.T) {
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
	overlay := mountOverlay(t, func(lower string) {
		for i := range 20 {
			makeProgram(t, fmt.Sprintf("%s/p%d", lower, i))
		}
	})
	for i := range 20 {
		runProgram(t, fmt.Sprintf("%s/merged/p%d", overlay, i))
	}
	makeProgram(t, overlay+"/merged/new")
	runProgram(t, overlay+"/merged/new")
	// Changed and run again: on disk, in memory, copied up.
	for _, path := range []string{disk + "/p0", memory + "/p0", overlay + "/merged/p0", overlay + "/merged/new"} {
		for version := range 2 {
			a.caughtUp()
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

// attributesWorkload runs files with all that templates show of one: extended attributes, owners, modes.
func (a *agent) attributesWorkload(t *testing.T) {
	t.Helper()
	overlay := tempDir(t, "/root")
	sh(t, "cd "+overlay+" && mkdir lower upper work merged")
	disk, memory, lower, merged := tempDir(t, "/root"), tempDir(t, "/tmp"), overlay+"/lower", overlay+"/merged"
	blob := func(head ...byte) string { return string(head) + strings.Repeat("s", 70) }
	caps := string([]byte{1, 0, 0, 2}) + strings.Repeat("\x00", 16)
	files := []struct {
		name   string
		owner  int
		mode   uint32
		xattrs map[string]string

		otherAlgo bool // security.ima is of another algorithm than the namespace's
	}{
		{"plain", 0, 0o755, nil, false},
		{"others", 70001, 0o4711, nil, false},
		{"signed", 0, 0o755, map[string]string{"ima": blob(3, 2, 4)}, false},
		{"signed-sha512", 0, 0o555, map[string]string{"ima": blob(3, 2, 6)}, true},
		{"signed-sha1", 0, 0o755, map[string]string{"ima": blob(3, 2, 2)}, true},
		{"signed-badly", 0, 0o755, map[string]string{"ima": blob(3, 9, 6)}, false},
		{"verity", 0, 0o755, map[string]string{"ima": blob(6, 3, 4)}, false},
		{"digest", 0, 0o755, map[string]string{"ima": string([]byte{4, 4}) + strings.Repeat("d", 32)}, false},
		{"old-digest", 0, 0o755, map[string]string{"ima": "\x01" + strings.Repeat("d", 20)}, true},
		{"portable", 1, 0o700, map[string]string{"evm": blob(5, 2, 4)}, false},
		{"not-portable", 1, 0o755, map[string]string{"evm": blob(3, 2, 4)}, false},
		{"both", 2, 0o2755, map[string]string{"evm": blob(5, 2, 4), "ima": blob(3, 2, 4)}, false},
		{"labels", 3, 0o1755, map[string]string{"selinux": "system_u:object_r:bin_t:s0\x00", "SMACK64": "_", "SMACK64EXEC": "label", "apparmor": "x y"}, false},
		{"capable", 0, 0o755, map[string]string{"capability": caps}, false},
		{"all", 65534, 0o7755, map[string]string{"selinux": "a\x00", "ima": blob(3, 2, 4), "capability": caps, "evm": blob(5, 2, 4), "other": "not EVM's"}, false},
	}
	create := func(path string, group, owner int, mode uint32, xattrs map[string]string) {
		t.Helper()
		makeProgram(t, path)
		errs := []error{os.Chown(path, owner, group), unix.Chmod(path, mode)}
		for name, value := range xattrs {
			errs = append(errs, unix.Setxattr(path, "security."+name, []byte(value), 0))
		}
		if err := errors.Join(errs...); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	for i := range oracleTemplates {
		for _, dir := range []string{disk, memory, lower} {
			for _, f := range files {
				if f.otherAlgo && !imalog.ShowsAttributes(oracleTemplates[i]) {
					f.xattrs = nil // the kernel would hash by it all the same; see docs/ima-namespaces.md
				}
				create(fmt.Sprintf("%s/%d-%s", dir, i, f.name), oracleGroup+i, f.owner, f.mode, f.xattrs)
			}
		}
	}
	sh(t, "cd "+overlay+" && mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged")
	t.Cleanup(func() { exec.Command("umount", merged).Run() })
	for i := range oracleTemplates {
		for _, dir := range []string{disk, memory, merged} {
			for _, f := range files {
				runProgram(t, fmt.Sprintf("%s/%d-%s", dir, i, f.name))
			}
			// Signed anew and run again, then with another mode: on an overlay that is an entry more where the template shows it.
			path := fmt.Sprintf("%s/%d-signed", dir, i)
			a.caughtUp()
			if err := unix.Setxattr(path, "security.ima", []byte(blob(3, 2, 4)+"anew"), 0); err != nil {
				t.Fatal(err)
			}
			runProgram(t, path)
			a.caughtUp()
			sh(t, "chmod 711 "+path)
			runProgram(t, path)
		}
	}
}
