package container

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseMounts(t *testing.T) {
	const text = `23 30 0:21 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
611 23 0:58 / /sys/kernel/security rw,nosuid,nodev,noexec,relatime - fuse.imans imans rw,user_id=0,group_id=0,allow_other
612 23 0:58 /ima /mnt/with\040blank\011tab\012line\134slash\043sign ro,relatime master:3 propagate_from:2 - fuse.imans imans rw
613 23 8:1 /a\0404 /x rw shared:12 master:3 - ext4 /dev/sda1 rw
614 23 0:60 / /y ro - tmpfs  rw
`
	want := []mount{
		{23, unix.Mkdev(0, 21), "/", "/sys", false, 7, "sysfs", "sysfs"},
		{611, unix.Mkdev(0, 58), "/", "/sys/kernel/security", false, 0, "fuse.imans", "imans"},
		{612, unix.Mkdev(0, 58), "/ima", "/mnt/with blank\ttab\nline\\slash#sign", true, 0, "fuse.imans", "imans"},
		{613, unix.Mkdev(8, 1), "/a 4", "/x", false, 12, "ext4", "/dev/sda1"},
		{614, unix.Mkdev(0, 60), "/", "/y", true, 0, "tmpfs", ""},
	}
	got, err := parseMounts(text)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Fatalf("%d mounts, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("line %d: got  %+v\nwant %+v", i+1, got[i], want[i])
		}
	}
	if w := windows(got); len(w) != 2 || w[0].Point != SecurityFS || w[1].Root != "/ima" || !w[1].ReadOnly {
		t.Errorf("windows: %+v", w)
	}
}

func TestParseMountsRefuses(t *testing.T) {
	for _, line := range []string{
		"\n", "23\n", "23 30 0:21 / /sys rw - sysfs sysfs\n", "23 30 0:21 / /sys rw shared:7 sysfs sysfs rw\n",
		"x 30 0:21 / /sys rw - sysfs sysfs rw\n", "23 30 0 / /sys rw - sysfs sysfs rw\n", "23 30 0:y / /sys rw - sysfs sysfs rw\n",
		"23 30 0:21 / /sys rw shared:z - sysfs sysfs rw\n",
	} {
		if m, err := parseMounts(line); err == nil {
			t.Errorf("%q was read as %+v", line, m)
		}
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "plain": "plain", `\040`: " ", `a\134040`: `a\040`, `end\`: `end\`, `end\04`: `end\04`, `\999`: `\999`, `\777`: `\777`, `\-01`: `\-01`,
		`\+12`: `\+12`,
	} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
}

// What this machine has parses, and shows the root.
func TestReadMounts(t *testing.T) {
	mounts, err := readMounts(unix.AT_FDCWD, "/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if m.point == "/" {
			return
		}
	}
	t.Errorf("no mount of the root among %+v", mounts)
}

func FuzzMounts(f *testing.F) {
	if own, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(string(own))
	}
	f.Add("612 23 0:58 /ima /mnt/with\\040blank ro,relatime master:3 - fuse.imans imans rw\n")
	f.Add("1 2 3:4 / / rw shared:1 - t  o")
	f.Fuzz(func(t *testing.T, text string) {
		mounts, err := parseMounts(text)
		if err != nil {
			return
		}
		if lines := strings.Count(text, "\n"); len(mounts) < lines || len(mounts) > lines+1 {
			t.Errorf("%d mounts of %d lines", len(mounts), lines)
		}
		for _, m := range mounts {
			if m.id < 0 || m.shared < 0 || len(m.point) > len(text) {
				t.Errorf("%+v", m)
			}
		}
	})
}
