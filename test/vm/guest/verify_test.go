//go:build vm

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// verify checks lists against their TPMs, by our own tool and by others': the agent is stopped, so that the TPMs can be read
// without it, and started again.
func (a *agent) verify(namespaces ...string) {
	a.t.Helper()
	type list struct {
		file, address, tcti string
		pcr                 int
	}
	var lists []list
	var folders []string
	for _, ns := range namespaces {
		n := a.settled(ns)
		l := list{filepath.Join(a.dir, "list-"+n.Name()), "/dev/tpmrm0", "device:/dev/tpmrm0", n.PCR}
		if n.TPM != "" {
			l.address, l.tcti = n.TPM, "swtpm:path="+strings.TrimPrefix(n.TPM, "unix:")
		}
		lists = append(lists, l)
		folders = append(folders, n.Name())
	}
	a.stop()
	for i, l := range lists {
		// The log on disk is the list; nothing is added to it while the agent is stopped.
		folder := "ns/" + strings.Replace(folders[i], ":", "-", 1)
		if namespaces[i] == "native" {
			folder = "native"
		}
		sh(a.t, fmt.Sprintf("cp %s/state/boots/*/%s/binary_runtime_measurements %s", a.dir, folder, l.file))
		status, out := exits(a.t, program, "verify", l.file, "--tpm", l.address)
		if status != 0 {
			a.t.Errorf("imans-agent verify %s: exit status %d\n%s", l.file, status, tail(out, 2000))
		}
		args := []string{"ima_measurement", "--ignore-violations"}
		for _, bank := range []string{"sha1", "sha256"} {
			args = append(args, "--pcrs", bank+","+a.pcrFile(l.tcti, bank))
		}
		status, out = exits(a.t, "evmctl", append(args, l.file)...)
		if status != 0 {
			a.t.Errorf("evmctl ima_measurement %s: exit status %d\n%s", l.file, status, tail(out, 2000))
		}
	}
	a.start()
}

// pcrFile reads all registers of a bank by tpm2_pcrread and writes them as evmctl wants them.
func (a *agent) pcrFile(tcti, bank string) string {
	a.t.Helper()
	out := run(a.t, "tpm2_pcrread", "-T", tcti, bank+":all")
	var text []byte
	for _, m := range regexp.MustCompile(`(?m)^ *(\d+) *: 0x([0-9A-F]+)$`).FindAllStringSubmatch(out, -1) {
		text = fmt.Appendf(text, "PCR-%02s: %s\n", m[1], strings.ToLower(m[2]))
	}
	path := filepath.Join(a.dir, "pcrs-"+bank)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// stop ends the agent as systemd does.
func (a *agent) stop() {
	a.t.Helper()
	a.signal(syscall.SIGTERM)
	if code := a.cmd.ProcessState.ExitCode(); code != 0 {
		a.t.Errorf("the agent stopped with exit status %d: %s", code, tail(a.log.String(), 2000))
	}
}

// awaitGone waits until the agent knows no namespace of that inode number.
func (a *agent) awaitGone(inum uint32) {
	a.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if _, ok := a.namespaces()[inum]; !ok {
			return
		}
	}
	a.t.Errorf("namespace %d does not go: %+v", inum, a.namespaces()[inum])
}
