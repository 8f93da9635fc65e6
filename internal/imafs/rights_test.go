package imafs

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// userNS runs the command as root of a new user namespace, whose root is that id here, with a mount namespace of its own.
func userNS(id int) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: id, Size: 1000}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = ids, ids
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
		cmd.SysProcAttr.Credential = &syscall.Credential{}
	}
}

// withoutCaps keeps the user, root, and takes its capabilities.
func withoutCaps(cmd *exec.Cmd) {
	cmd.Args = []string{"setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "sh", "-c", cmd.Args[2]}
	cmd.Path, _ = exec.LookPath("setpriv")
}

// TestRights: who may do what, from which user namespace.
func TestRights(t *testing.T) {
	try := `cd $W/ima
		for f in ascii_runtime_measurements policy; do cat $f >/dev/null 2>&1 && echo read $f; done
		(echo measure func=BPRM_CHECK > policy) 2>/dev/null && echo wrote policy
		(echo 1 > newns) 2>/dev/null && echo wrote newns
		cat active`
	const all = "read ascii_runtime_measurements\nread policy\nwrote policy\nwrote newns\n1\n"
	join := func(options ...func(*exec.Cmd)) []func(*exec.Cmd) { return options }
	for name, c := range map[string]struct {
		owner   uint32
		options []func(*exec.Cmd)
		wrap    string // around the script
		want    string
	}{
		"host root, in its namespace":                 {0, nil, "%s", all},
		"host root, in one of another's":              {100000, nil, "%s", all},
		"another user":                                {0, join(as(65534)), "%s", "1\n"},
		"the owner without capabilities":              {65534, join(as(65534)), "%s", "read ascii_runtime_measurements\n1\n"},
		"root without capabilities":                   {0, join(withoutCaps), "%s", "read ascii_runtime_measurements\n1\n"},
		"root without capabilities, another's":        {100000, join(withoutCaps), "%s", "1\n"},
		"root of its user namespace":                  {100000, join(userNS(100000)), "%s", all},
		"root of a user namespace in another's mount": {0, nil, "unshare -Ur sh -c '%s'", "read ascii_runtime_measurements\n1\n"},
		"no root there":                               {100000, join(userNS(100000)), "setpriv --reuid 7 --regid 7 --clear-groups sh -c '%s'", "1\n"},
		"root of one further in":                      {100000, join(userNS(100000)), "unshare -Urm sh -c '%s'", all},
		"who came in from further out":                {100000, nil, "unshare -Urm sleep 9 & sleep 0.5; nsenter -m -t $! sh -c '%s'; kill $!", all},
	} {
		t.Run(name, func(t *testing.T) {
			w := open(t)
			w.views.onNew(func(v *fakeView) {
				v.set(func() { v.owner = Owner{c.owner, c.owner} })
				if err := v.Activate(t.Context()); err != nil {
					t.Error(err)
				}
			})
			w.want(fmt.Sprintf(c.wrap, try), c.want, c.options...)
			for _, v := range w.views.all() {
				var by *Caller
				v.set(func() { by = v.wrote })
				if by != nil && len(c.options) > 0 {
					if m := by.UIDs; len(m) != 1 || m[0].Inside != 0 || m[0].Outside != c.owner || by.UserNS == 0 {
						t.Errorf("the writer's ids: %+v", by)
					}
				}
			}
		})
	}
}

// TestNamespacesApart: many at once, each writes and reads its own hash, template, policy and lists, and none sees another's.
func TestNamespacesApart(t *testing.T) {
	w, own := openActive(t)
	script := `cd /; for i in 1 2 3; do
		[ "$(cat $W/ima/active)" = 0 ] || echo active; cat $W/ima/policy 2>/dev/null && echo readable
		echo sha512 > $W/ima/hash || echo hash; done
		n=$0; [ $((n % 2)) = 0 ] && echo sha1 > $W/ima/hash; echo ima-sig > $W/ima/template_name; echo 1 > $W/ima/active || echo activate
		for i in $(seq $((n + 1))); do echo "dont_measure uid=$n" > $W/ima/policy || echo policy; done
		[ $(grep -c "uid=$n " $W/ima/policy) = $((n + 1)) ] || echo rules
		[ $(grep -c ^ $W/integrity/ima/policy) = $((n + 1)) ] || echo more rules
		grep -q "ima-sig $([ $((n % 2)) = 0 ] && echo sha1 || echo sha512):" $W/ima/ascii_runtime_measurements || echo list
		[ $(cat $W/ima/runtime_measurements_count) = 1 ] || echo count; ls -i $W/ima/ | sort -u | wc -l; cd $W/ima && pwd -P >/dev/null || echo lost`
	const children = 24
	var all sync.WaitGroup
	for i := range children {
		all.Go(func() {
			out, err := w.shell(script, newNS, func(c *exec.Cmd) { c.Args = append(c.Args, fmt.Sprint(i)) })
			if err != nil || out != fmt.Sprintln(len(files)) {
				t.Errorf("child %d: %v: %s", i, err, out)
			}
		})
	}
	all.Wait()
	if own.rules() != "" || own.HashName() != "sha256" {
		t.Errorf("the test's own namespace has %q, %s", own.rules(), own.HashName())
	}
	if n := len(w.views.all()); n < 2 || n > children+1 {
		t.Errorf("%d namespaces", n)
	}
}

// TestOpenDecidesByCaller: a descriptor of another namespace's file shows that one's; opening anew by it shows the caller's.
func TestOpenDecidesByCaller(t *testing.T) {
	w, own := openActive(t)
	fill(t, own.list, 0, 1)
	folder := mustOpen(t, w.path(""), unix.O_PATH)
	list := mustOpen(t, w.path("runtime_measurements_count"), unix.O_RDONLY)
	w.views.onNew(func(v *fakeView) {
		if err := v.Activate(t.Context()); err != nil {
			t.Error(err)
		}
	})
	w.want(`cat <&4; cat /proc/self/fd/3/runtime_measurements_count; cat /proc/self/fd/4`, "2\n1\n1\n", newNS, func(cmd *exec.Cmd) {
		for _, fd := range []int{folder, list} {
			twin, err := unix.Dup(fd)
			if err != nil {
				t.Fatal(err)
			}
			f := os.NewFile(uintptr(twin), "")
			t.Cleanup(func() { f.Close() })
			cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		}
	})
}
