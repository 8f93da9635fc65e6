package vtpm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/tpmext"
)

const testIndex = 0x01500001

// A restarted TPM has its keys and NV storage, counters too, and new PCRs. It is restarted on request only, and not beside itself.
func TestRestartKeepsKeysAndNV(t *testing.T) {
	c := config(t)
	identity := provisioned(t, c, authority(t))
	i := start(t, c)
	pcr(t, i.Address(), 1)
	tpm := connect(t, i)
	defineCounter(t, tpm)
	count(t, tpm, true)
	want := count(t, tpm, true)
	tpm.Close()
	again := c
	again.Restart = true
	if _, err := Start(t.Context(), again); err == nil || !strings.Contains(err.Error(), "serves it") {
		t.Errorf("restart beside a running one: %v", err)
	}
	if err := i.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), c); !errors.Is(err, ErrLost) {
		t.Errorf("Start without Restart: %v, want ErrLost", err)
	}
	i = start(t, again)
	t.Cleanup(func() { i.Stop() })
	if got := pcr(t, i.Address(), 0); !got.IsZero() {
		t.Errorf("PCR 10 after a restart is %v", got)
	}
	tpm = connect(t, i)
	if got := count(t, tpm, false); got != want {
		t.Errorf("the counter is %s after a restart, was %s", got, want)
	}
	checkQuote(t, tpm, identity.AK)
	tpm.Close()
	if a, err := Adopt(c); err != nil || a.PID() != i.PID() {
		t.Errorf("adopt the restarted one: %v", err)
	} else {
		a.Close()
	}
}

// defineCounter makes a counter that swtpm keeps in memory, until TPM2_Shutdown.
func defineCounter(t *testing.T, tpm *tpmext.TPM) {
	t.Helper()
	_, err := tpm2.NVDefineSpace{
		AuthHandle: withoutPassword(tpm2.TPMRHOwner),
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: testIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NT: tpm2.TPMNTCounter, Orderly: true, NoDA: true},
		}),
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
}

// count reads the counter, after an increment if asked to.
func count(t *testing.T, tpm *tpmext.TPM, increment bool) string {
	t.Helper()
	owner := withoutPassword(tpm2.TPMRHOwner)
	name := func() tpm2.NamedHandle {
		index, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(testIndex)}.Execute(tpm)
		if err != nil {
			t.Fatal(err)
		}
		return tpm2.NamedHandle{Handle: testIndex, Name: index.NVName}
	}
	if increment {
		if _, err := (tpm2.NVIncrement{AuthHandle: owner, NVIndex: name()}).Execute(tpm); err != nil {
			t.Fatal(err)
		}
	}
	value, err := tpm2.NVRead{AuthHandle: owner, NVIndex: name(), Size: 8}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", value.Data.Buffer)
}

// unprivileged is a user that every system has.
const unprivileged = "nobody"

// An instance of another user has no privileges, no groups, no environment and no descriptors but its own, though the folders above
// its own are closed to it; and whoever it is given to next finds its state.
func TestInstanceOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		need.Skip(t, "running as another user needs root")
	}
	u, err := user.Lookup(unprivileged)
	if err != nil {
		need.Skip(t, "%v", err)
	}
	c := config(t)
	if err := os.Chmod(filepath.Dir(c.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	c.User = unprivileged
	identity := provisioned(t, c, authority(t))
	i := start(t, c)
	checkStatus(t, i.PID(), "Uid:", strings.Repeat("\t"+u.Uid, 4))
	checkStatus(t, i.PID(), "Gid:", strings.Repeat("\t"+u.Gid, 4))
	checkStatus(t, i.PID(), "Groups:", "\t ")
	checkStatus(t, i.PID(), "CapPrm:", "\t0000000000000000")
	checkStatus(t, i.PID(), "NoNewPrivs:", "\t1")
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", i.PID())); err != nil || len(env) != 0 {
		t.Errorf("environment %q, %v", env, err)
	}
	checkDescriptors(t, i.PID(), c.Dir)
	if arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", i.PID())); err != nil || !strings.HasPrefix(string(arguments), "swtpm:"+c.Socket+"\x00") {
		t.Errorf("the arguments %q do not begin with the instance's name, %v", arguments, err)
	}
	for name, want := range map[string]string{"": "0", lockName: "0", recordName: "0", stateName: u.Uid, stateName + "/tpm2-00.permall": u.Uid} {
		st, err := os.Stat(filepath.Join(c.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(st.Sys().(*syscall.Stat_t).Uid); got != want {
			t.Errorf("%q belongs to user %s, want %s", name, got, want)
		}
	}
	pcr(t, i.Address(), 1)
	if err := i.Stop(); err != nil {
		t.Fatal(err)
	}
	c.User, c.Restart = "", true
	i = start(t, c)
	t.Cleanup(func() { i.Stop() })
	checkStatus(t, i.PID(), "Uid:", strings.Repeat("\t0", 4))
	checkQuote(t, connect(t, i), identity.AK)
}

func checkStatus(t *testing.T, pid int, field, want string) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, field); ok && strings.TrimSuffix(value, "\n") == want {
			return
		}
	}
	t.Errorf("%s is not %q in:\n%s", field, want, b)
}

// checkDescriptors makes sure that a process has nothing open outside its folder but pipes, sockets and /dev/null.
func checkDescriptors(t *testing.T, pid int, dir string) {
	t.Helper()
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(fds)
	if err != nil || len(entries) < stateFD {
		t.Fatalf("%d descriptors, %v", len(entries), err)
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(fds, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		own := strings.HasPrefix(target, dir+"/") || target == os.DevNull ||
			strings.HasPrefix(target, "pipe:") || strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "anon_inode:")
		if !own {
			t.Errorf("descriptor %s is %s", e.Name(), target)
		}
	}
}

// What an earlier swtpm put into its folder gives its user nothing of anyone else's.
func TestStateOfAnotherUserIsNotFollowed(t *testing.T) {
	if os.Geteuid() != 0 {
		need.Skip(t, "handing files over needs root")
	}
	c := config(t)
	c.User = unprivileged
	state := filepath.Join(c.Dir, stateName)
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	others := filepath.Join(filepath.Dir(c.Dir), "others")
	if err := os.WriteFile(others, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := errors.Join(os.Symlink(others, filepath.Join(state, "symbolic")), os.Link(others, filepath.Join(state, "hard")),
		syscall.Mkfifo(filepath.Join(state, "fifo"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	i := start(t, c)
	t.Cleanup(func() { i.Stop() })
	st, err := os.Stat(others)
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("root's file was given away: %v, %v", st.Sys(), err)
	}
}

func TestUnknownUser(t *testing.T) {
	c := config(t)
	c.User = "user-that-is-not-there"
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "useradd") {
		t.Errorf("Start: %v", err)
	}
}

// Without the driver nothing is begun, and the caller can tell.
func TestNoProxy(t *testing.T) {
	if _, err := os.Stat(vtpmxPath); err == nil {
		t.Skip("this machine has the vTPM proxy")
	}
	c := config(t)
	c.Proxy = true
	if _, err := Start(t.Context(), c); !errors.Is(err, ErrNoProxy) || !strings.Contains(err.Error(), "modprobe tpm_vtpm_proxy") {
		t.Errorf("Start: %v, want ErrNoProxy", err)
	}
	if _, err := os.Stat(c.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder was made: %v", err)
	}
}

// What an instance keeps under a password is of no use without it, and nobody is shown the password.
func TestPassword(t *testing.T) {
	c, a := config(t), authority(t)
	c.Password = "correct horse"
	want := provisioned(t, c, a)
	i := start(t, c)
	for _, file := range []string{"cmdline", "environ"} {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", i.PID(), file)); err != nil || bytes.Contains(b, []byte("horse")) {
			t.Errorf("%s: %q, %v", file, b, err)
		}
	}
	if _, name := readPublic(t, connect(t, i), AKHandle); name != want.AK {
		t.Errorf("the attestation key is %s, want %s", name, want.AK)
	}
	if err := i.Stop(); err != nil {
		t.Fatal(err)
	}
	c.Restart = true
	for _, password := range []string{"", "battery staple"} {
		other := c
		other.Password = password
		if i, err := Start(t.Context(), other); err == nil {
			t.Errorf("password %q starts it", password)
			i.Stop()
		}
	}
	i = start(t, c)
	t.Cleanup(func() { i.Stop() })
	if _, name := readPublic(t, connect(t, i), AKHandle); name != want.AK {
		t.Errorf("after a restart the attestation key is %s, want %s", name, want.AK)
	}
	c.Password = strings.Repeat("x", passwordMax+1)
	c.Dir = filepath.Join(t.TempDir(), "tpm")
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a long one: %v", err)
	}
}
