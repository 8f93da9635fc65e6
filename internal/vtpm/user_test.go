package vtpm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/need"
)

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
	c.User, c.Restart = "root", true
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

// whose returns the user and the group of a process.
func whose(t *testing.T, pid int) (uid, gid uint32) {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil {
		t.Fatal(err)
	}
	return st.Uid, st.Gid
}

// readsState reports whether a process of the one instance's user, and no more, can read the state of the other.
func readsState(t *testing.T, of, other *Instance) bool {
	t.Helper()
	uid, gid := whose(t, of.PID())
	cmd := exec.Command("cat", fmt.Sprintf("/proc/%d/fd/%d/tpm2-00.permall", other.PID(), stateFD))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	out, err := startedWithoutPrivileges(cmd)
	if err != nil && !strings.Contains(out, "Permission denied") {
		t.Fatalf("%v: %s", err, out)
	}
	return err == nil
}

// startedWithoutPrivileges runs a command as swtpm is run.
func startedWithoutPrivileges(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := startWithoutPrivileges(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}

// Unless told otherwise each instance is a user of its own, which reaches nothing of another's and is nobody's when the instance has ended. The keys
// stay.
func TestInstancesOfTheirOwnUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		need.Skip(t, "running as another user needs root")
	}
	a := authority(t)
	var configs [2]Config
	var instances [2]*Instance
	var identities [2]Identity
	for n := range instances {
		configs[n] = config(t)
		identities[n] = provisioned(t, configs[n], a)
		instances[n] = start(t, configs[n])
	}
	t.Cleanup(func() { instances[0].Stop() })
	for n, i := range instances {
		uid, gid := whose(t, i.PID())
		if uid < ownFirst || uid >= ownFirst+ownCount || gid != uid || !isUser(uid) {
			t.Errorf("instance %d is user %d of group %d, in use: %v", n, uid, gid, isUser(uid))
		}
		checkStatus(t, i.PID(), "Groups:", "\t ")
		if !readsState(t, i, i) {
			t.Error("an instance's user can't read its own state")
		}
		if readsState(t, i, instances[1-n]) {
			t.Error("an instance's user can read another's state")
		}
		for _, socket := range []string{"s", "s.ctrl"} {
			st, err := os.Stat(filepath.Join(configs[n].Dir, stateName, socket))
			if err != nil || st.Mode().Perm() != 0o600 || st.Sys().(*syscall.Stat_t).Uid != uid {
				t.Errorf("the socket %s is %v, %v, want user %d's alone", socket, st, err, uid)
			}
		}
		pcr(t, i.Address(), 1)
	}
	before, _ := whose(t, instances[1].PID())
	if err := instances[1].Stop(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); isUser(before); time.Sleep(time.Millisecond) { // it has ended, and is waited for elsewhere
		if time.Now().After(deadline) {
			t.Fatalf("user %d is in use though its instance has ended", before)
		}
	}
	configs[1].Restart = true
	instances[1] = start(t, configs[1])
	t.Cleanup(func() { instances[1].Stop() })
	checkQuote(t, connect(t, instances[1]), identities[1].AK)
}

// An instance that an earlier agent started as root goes on, and has a user of its own from its next start on.
func TestInstanceOfRootIsAdopted(t *testing.T) {
	if os.Geteuid() != 0 {
		need.Skip(t, "running as another user needs root")
	}
	c := config(t)
	c.User = "root"
	identity := provisioned(t, c, authority(t))
	i := start(t, c)
	if uid, gid := whose(t, i.PID()); uid != 0 || gid != 0 {
		t.Errorf("it is user %d of group %d, want root", uid, gid)
	}
	want := pcr(t, i.Address(), 1)
	i.Close()
	c.User = ""
	i, err := Adopt(c)
	if err != nil {
		t.Fatal(err)
	}
	if got := pcr(t, i.Address(), 0); got != want {
		t.Errorf("PCR 10 is %v after the adoption, was %v", got, want)
	}
	if err := i.Stop(); err != nil {
		t.Fatal(err)
	}
	c.Restart = true
	i = start(t, c)
	t.Cleanup(func() { i.Stop() })
	if uid, _ := whose(t, i.PID()); uid < ownFirst {
		t.Errorf("it is user %d after a restart", uid)
	}
	checkQuote(t, connect(t, i), identity.AK)
}

func TestUsers(t *testing.T) {
	for name, c := range map[string]struct {
		want  syscall.Credential
		error string
	}{
		"root":                   {want: syscall.Credential{}},
		"0":                      {want: syscall.Credential{}},
		"1234567890":             {want: syscall.Credential{Uid: 1234567890, Gid: 1234567890}},
		"4294967294":             {want: syscall.Credential{Uid: 4294967294, Gid: 4294967294}},
		"4294967295":             {error: "want a number from 0 to 4294967294"},
		"4294967296":             {error: "want a number from 0 to 4294967294"},
		"-1":                     {error: "useradd"},
		"user-that-is-not-there": {error: "useradd"},
	} {
		got, err := Config{User: name}.credential()
		switch {
		case c.error != "":
			if err == nil || !strings.Contains(err.Error(), c.error) {
				t.Errorf("%s: %v, %v, want %q", name, got, err, c.error)
			}
		case err != nil || got.Uid != c.want.Uid || got.Gid != c.want.Gid || len(got.Groups) > 0:
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, c.want)
		}
	}
}

func TestUnknownUser(t *testing.T) {
	c := config(t)
	c.User = "user-that-is-not-there"
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "useradd") {
		t.Errorf("Start: %v", err)
	}
}
