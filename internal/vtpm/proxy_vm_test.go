//go:build vm

package vtpm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

// proxyConfig is an instance by device.
func proxyConfig(t *testing.T) Config {
	t.Helper()
	c := config(t)
	c.Socket, c.Proxy = "", true
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := exec.Command("sh", "-c", "dmesg | grep -i tpm | tail -20").CombinedOutput()
			t.Logf("the kernel says:\n%s", out)
		}
	})
	return c
}

func deviceOf(t *testing.T, i *Instance) Device {
	t.Helper()
	d, ok := i.Device()
	if !ok {
		t.Fatal("the instance has no device")
	}
	return d
}

// devices lists what the kernel has of TPMs, and its nodes.
func devices(t *testing.T) string {
	t.Helper()
	var all []string
	for _, pattern := range []string{sysfsTPM + "/*", sysfsRM + "/*", "/dev/tpm*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return strings.Join(all, " ")
}

func lacks(t *testing.T, paths ...string) {
	t.Helper()
	for _, p := range paths {
		if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", p, err)
		}
	}
}

// stopGone stops an instance and makes sure that its devices have gone.
func stopGone(t *testing.T, i *Instance) {
	t.Helper()
	d := deviceOf(t, i)
	if err := i.Stop(); err != nil {
		t.Error(err)
	}
	lacks(t, d.TPM.Path, d.RM.Path, fmt.Sprintf("%s/tpm%d", sysfsTPM, d.Number), fmt.Sprintf("%s/tpmrm%d", sysfsRM, d.Number))
}

// tool runs a program of tpm2-tools on a device.
func tool(t *testing.T, path, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=device:"+path)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s on %s: %v\n%s", name, strings.Join(args, " "), path, err, out)
	}
	return string(out)
}

// Two TPMs, each on devices of its own, usable by the agent and by programs at the same time, with the identity it was given; both
// are adopted with their registers, and nothing is left of them when they are stopped.
func TestVTPMProxyDevices(t *testing.T) {
	before := devices(t)
	a := authority(t)
	var configs [2]Config
	var instances [2]*Instance
	for n := range configs {
		configs[n] = proxyConfig(t)
		identity := provisioned(t, configs[n], a)
		begun := time.Now()
		instances[n] = start(t, configs[n])
		t.Logf("started in %v", time.Since(begun))
		d := deviceOf(t, instances[n])
		if instances[n].Address() != fmt.Sprintf("/dev/tpmrm%d", d.Number) || d.RM.Path != instances[n].Address() {
			t.Errorf("address %s of %+v", instances[n].Address(), d)
		}
		for path, want := range map[string]bool{d.TPM.Path: true, d.RM.Path: true, "/dev/tpm0": false, "/dev/tpmrm0": false} {
			if got, err := IsProxy(path); got != want || err != nil {
				t.Errorf("IsProxy(%s): %v, %v; want %v", path, got, err, want)
			}
		}
		pcr(t, instances[n].Address(), byte(n+1))
		if out := tool(t, d.RM.Path, "tpm2_readpublic", "-c", fmt.Sprintf("%#x", EKHandle)); !strings.Contains(out, identity.EK) {
			t.Errorf("the endorsement key is not %s:\n%s", identity.EK, out)
		}
	}
	for n, i := range instances {
		want := pcr(t, i.Address(), 0)
		d := deviceOf(t, i)
		mine, err := tpmext.Open(t.Context(), i.Address())
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{d.RM.Path, d.TPM.Path} { // beside the agent's connection
			if out := tool(t, path, "tpm2_pcrread", "sha256:10"); !strings.Contains(out, strings.ToUpper(fmt.Sprintf("%x", want.Bytes()))) {
				t.Errorf("%s reads another PCR 10 than %v:\n%s", path, want, out)
			}
		}
		mine.Close()
		i.Close()
		adopted, err := Adopt(Config{Dir: configs[n].Dir})
		if err != nil {
			t.Fatal(err)
		}
		if got := deviceOf(t, adopted); got != d {
			t.Errorf("adopted %+v, was %+v", got, d)
		}
		if got := pcr(t, adopted.Address(), 0); got != want || got.IsZero() {
			t.Errorf("PCR 10 is %v after adoption, was %v", got, want)
		}
		instances[n] = adopted
	}
	if x, y := pcr(t, instances[0].Address(), 0), pcr(t, instances[1].Address(), 0); x == y {
		t.Errorf("both have %v in PCR 10", x)
	}
	for _, i := range instances {
		stopGone(t, i)
	}
	if after := devices(t); after != before {
		t.Errorf("devices %s, before %s", after, before)
	}
}

// The kernel gives up on a command that a TPM has no time for. Who opens it waits for longer.
func TestVTPMProxyThatIsSlow(t *testing.T) {
	i := start(t, proxyConfig(t))
	t.Cleanup(func() { i.Stop() })
	if err := syscall.Kill(i.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	time.AfterFunc(3*time.Second, func() { syscall.Kill(i.PID(), syscall.SIGCONT) })
	pcr(t, i.Address(), 1)
	if waited := time.Since(began); waited < 2*time.Second {
		t.Errorf("it answered after %v", waited)
	}
}

// What swtpm holds is its own: its user can open neither the door to the driver nor another's device or state.
func TestVTPMProxyIsUnprivileged(t *testing.T) {
	c := proxyConfig(t)
	i := start(t, c)
	t.Cleanup(func() { i.Stop() })
	checkStatus(t, i.PID(), "CapPrm:", "\t0000000000000000")
	checkStatus(t, i.PID(), "NoNewPrivs:", "\t1")
	checkDescriptors(t, i.PID(), c.Dir)
	d := deviceOf(t, i)
	for _, path := range []string{vtpmxPath, d.TPM.Path, d.RM.Path, filepath.Join(c.Dir, recordName)} {
		cmd := exec.Command("setpriv", "--reuid="+unprivileged, "--clear-groups", "test", "-r", path)
		if err := cmd.Run(); err == nil {
			t.Errorf("%s can read %s", unprivileged, path)
		}
	}
}

// A TPM whose process dies takes its devices along. It is started again on request only: another device, the same keys, new registers.
func TestVTPMProxyRestart(t *testing.T) {
	c := proxyConfig(t)
	identity := provisioned(t, c, authority(t))
	i := start(t, c)
	pcr(t, i.Address(), 1)
	d := deviceOf(t, i)
	if err := syscall.Kill(i.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !i.ended(5 * time.Second) {
		t.Error("still running after a kill")
	}
	if err := i.awaitDeviceGone(); err != nil {
		t.Error(err)
	}
	i.Close()
	lacks(t, d.TPM.Path, d.RM.Path)
	if _, err := Adopt(c); !errors.Is(err, ErrLost) {
		t.Errorf("Adopt: %v, want ErrLost", err)
	}
	if _, err := Start(t.Context(), c); !errors.Is(err, ErrLost) {
		t.Errorf("Start: %v, want ErrLost", err)
	}
	c.Restart = true
	i = start(t, c)
	t.Cleanup(func() { i.Stop() })
	if got := pcr(t, i.Address(), 0); !got.IsZero() {
		t.Errorf("PCR 10 after a restart is %v", got)
	}
	checkQuote(t, connect(t, i), identity.AK)
}

// An agent that was killed before it recorded the TPM: the next Start ends that one, and its device goes.
func TestVTPMProxyUnrecorded(t *testing.T) {
	before := devices(t)
	c := proxyConfig(t)
	orphan := start(t, c)
	if err := os.Remove(filepath.Join(c.Dir, recordName)); err != nil {
		t.Fatal(err)
	}
	i := start(t, c)
	if orphan.Running() {
		t.Error("the first still runs")
	}
	if err := orphan.awaitDeviceGone(); err != nil {
		t.Error(err)
	}
	orphan.Close()
	if err := i.Stop(); err != nil {
		t.Error(err)
	}
	if after := devices(t); after != before {
		t.Errorf("devices %s, before %s", after, before)
	}
}

// A device without a node is no lost TPM: the message says how to make the node, and that works.
func TestVTPMProxyWithoutNode(t *testing.T) {
	c := proxyConfig(t)
	i := start(t, c)
	d := deviceOf(t, i)
	t.Cleanup(func() {
		i.Stop()
		os.Remove(d.RM.Path) // the kernel removes only nodes that it made
	})
	if err := os.Remove(d.RM.Path); err != nil {
		t.Fatal(err)
	}
	mknod := fmt.Sprintf("mknod %s c %d %d", d.RM.Path, d.RM.Major, d.RM.Minor)
	if _, err := Adopt(c); err == nil || errors.Is(err, ErrLost) || !strings.Contains(err.Error(), mknod) {
		t.Fatalf("Adopt without a node: %v; want to read %q", err, mknod)
	}
	if err := unix.Mknod(d.RM.Path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt(c); err == nil || !strings.Contains(err.Error(), "is not the device") {
		t.Errorf("Adopt with another device's node: %v", err)
	}
	if err := os.Remove(d.RM.Path); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("sh", "-c", mknod).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	a, err := Adopt(c)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	pcr(t, i.Address(), 1)
}

// One that hangs is ended all the same, with its device.
func TestVTPMProxyHung(t *testing.T) {
	i := start(t, proxyConfig(t))
	d := deviceOf(t, i)
	if err := syscall.Kill(i.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := i.Stop(); err != nil {
		t.Error(err)
	}
	lacks(t, d.TPM.Path, d.RM.Path)
}

// One that the kernel gave up on, or that it waits for in vain, is tried again, not for ever.
func TestVTPMProxyIsTriedAgain(t *testing.T) {
	before := devices(t)
	c := proxyConfig(t)
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	c.Program = filepath.Join(dir, "swtpm")
	tried := fmt.Sprintf("/proc/self/fd/%d/tried", stateFD)
	for name, script := range map[string]string{
		"once":   "#!/bin/sh\n[ -e " + tried + " ] || { : >" + tried + "; exit 0; }\nexec /usr/bin/swtpm \"$@\"\n",
		"hung":   "#!/bin/sh\n[ -e " + tried + " ] || { : >" + tried + "; exec sleep 1d; }\nexec /usr/bin/swtpm \"$@\"\n",
		"always": "#!/bin/sh\nexit 0\n",
	} {
		if err := os.WriteFile(c.Program, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		i, err := Start(t.Context(), c)
		if (name != "always") != (err == nil) || err != nil && !errors.Is(err, errDriverGaveUp) {
			t.Errorf("gave up %s: %v", name, err)
		}
		if err != nil {
			continue
		}
		pcr(t, i.Address(), 1)
		if err := errors.Join(i.Stop(), Remove(c)); err != nil {
			t.Error(err)
		}
	}
	if after := devices(t); after != before {
		t.Errorf("devices %s, before %s", after, before)
	}
}

// However many are started at once, a few are at a time.
func TestVTPMProxyTakesTurns(t *testing.T) {
	before := devices(t)
	dir := t.TempDir()
	folder := filepath.Join(dir, "starting")
	if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Mkdir(folder, 0o777), os.Chmod(folder, 0o777)); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\ncd " + folder + "\n: >$$; set -- $(ls) -- \"$@\"\nn=0; while [ $1 != -- ]; do n=$((n+1)); shift; done; shift\n" +
		"echo $n >>../seen; sleep 0.3; rm $$\nexec /usr/bin/swtpm \"$@\"\n"
	program := filepath.Join(dir, "swtpm")
	if err := errors.Join(os.WriteFile(program, []byte(script), 0o755), os.WriteFile(filepath.Join(dir, "seen"), nil, 0o666),
		os.Chmod(filepath.Join(dir, "seen"), 0o666)); err != nil {
		t.Fatal(err)
	}
	var starts sync.WaitGroup
	for range 3 * cap(starting) {
		c := proxyConfig(t)
		c.Program = program
		starts.Go(func() {
			i, err := Start(t.Context(), c)
			if err == nil {
				err = errors.Join(i.Stop(), Remove(c))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	starts.Wait()
	seen, err := os.ReadFile(filepath.Join(dir, "seen"))
	counts := strings.Fields(string(seen))
	if err != nil || len(counts) < 3*cap(starting) {
		t.Errorf("%d starts were seen, %v", len(counts), err)
	}
	for _, n := range counts {
		if n, err := strconv.Atoi(n); err != nil || n > cap(starting) {
			t.Errorf("%d started at once, want at most %d: %v", n, cap(starting), err)
		}
	}
	if after := devices(t); after != before {
		t.Errorf("devices %s, before %s", after, before)
	}
}

func TestVTPMProxyTPM12(t *testing.T) {
	c := proxyConfig(t)
	c.Version = TPM12
	begun := time.Now()
	i := start(t, c)
	t.Logf("started in %v", time.Since(begun))
	d := deviceOf(t, i)
	if d.RM.Path != "" || i.Address() != d.TPM.Path {
		t.Errorf("address %s of %+v", i.Address(), d)
	}
	pcrs, err := os.ReadFile(fmt.Sprintf("%s/tpm%d/pcrs", sysfsTPM, d.Number))
	if err != nil || !strings.Contains(string(pcrs), "PCR-10: 00 00") {
		t.Errorf("the kernel reads no PCR 10 of it: %s, %v", pcrs, err)
	}
	lentTPM12(t, d)
	i.Close()
	i, err = Adopt(Config{Dir: c.Dir})
	if err != nil {
		t.Fatal(err)
	}
	if i.Address() != d.TPM.Path {
		t.Errorf("address %s after adoption, was %s", i.Address(), d.TPM.Path)
	}
	if err := i.Stop(); err != nil {
		t.Error(err)
	}
	lacks(t, d.TPM.Path)
}

// lentTPM12 extends and reads a device of a TPM 1.2 that others use as well: one at a time has it.
func lentTPM12(t *testing.T, d Device) {
	t.Helper()
	tpm, err := tpmext.Open(t.Context(), d.TPM.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	held := func() *os.File { // a TPM that is open here is open nowhere else
		t.Helper()
		f, err := os.OpenFile(d.TPM.Path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	held().Close()
	extend := func() error {
		d, err := ima.NewDigest(ima.SHA1, make([]byte, 20))
		if err != nil {
			t.Fatal(err)
		}
		return tpm.Extend(t.Context(), 10, []ima.Digest{d})
	}
	if err := extend(); err != nil {
		t.Error(err)
	}
	other := held()
	defer other.Close()
	before, err := tpm.ReadPCR(t.Context(), 10)
	if err != nil || before[ima.SHA1].IsZero() {
		t.Errorf("PCR 10 while another program has the TPM: %v, %v", before, err)
	}
	if err := extend(); !errors.Is(err, tpmext.ErrUnavailable) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("extend while another program has the TPM: %v", err)
	}
	if again, err := tpmext.Open(t.Context(), d.TPM.Path); err != nil {
		t.Errorf("open while another program has the TPM: %v", err)
	} else {
		again.Close()
	}
	time.AfterFunc(100*time.Millisecond, func() { other.Close() })
	if err := extend(); err != nil {
		t.Errorf("extend while another program is about to be done: %v", err)
	}
	if after, err := tpm.ReadPCR(t.Context(), 10); err != nil || after[ima.SHA1] == before[ima.SHA1] {
		t.Errorf("PCR 10 after an extend: %v, %v", after, err)
	}
}

// Many in turn leave no device, no process and no descriptor.
func TestVTPMProxyLeavesNothing(t *testing.T) {
	once := func() {
		c := proxyConfig(t)
		i := start(t, c)
		pcr(t, i.Address(), 1)
		if err := i.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := Remove(c); err != nil {
			t.Fatal(err)
		}
	}
	once() // what the runtime opens once and for all is open then
	before, open := devices(t), folders(t, "/proc/self/fd")
	for range 10 {
		once()
	}
	if after := devices(t); after != before {
		t.Errorf("devices %s, before %s", after, before)
	}
	// The last process's descriptor is closed by a goroutine of its own.
	for deadline := time.Now().Add(20 * time.Second); folders(t, "/proc/self/fd") > open; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors, before %d", folders(t, "/proc/self/fd"), open)
		}
	}
}
