package proc

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unicode"
)

// FuzzStat: whatever a program calls itself, the fields are those behind its name, all that the constants name.
func FuzzStat(f *testing.F) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	_, behind, _ := strings.Cut(string(own), ")")
	f.Add("cat", behind)
	f.Add("a) S 1 (b", behind)
	f.Add("", " S 1")
	f.Fuzz(func(t *testing.T, name, behind string) {
		fields, err := parseStat("7 (" + name + ")" + behind)
		if err != nil {
			return
		}
		if len(fields) <= StatStart {
			t.Fatalf("%d fields", len(fields))
		}
		for _, field := range fields {
			if field == "" || strings.ContainsFunc(field, unicode.IsSpace) || !strings.Contains(behind, field) {
				t.Fatalf("field %q of %q behind the name", field, behind)
			}
		}
	})
}

// FuzzNamespace: a number that is taken is that of the link.
func FuzzNamespace(f *testing.F) {
	f.Add("mnt:[4026532281]")
	f.Add("mnt:[4294967296]")
	f.Add("/some/file")
	f.Fuzz(func(t *testing.T, link string) {
		n, err := parseNamespace(link)
		if again, err2 := parseNamespace(fmt.Sprintf("mnt:[%d]", n)); err == nil && (err2 != nil || again != n) {
			t.Fatalf("%q is %d; written and read again %d, %v", link, n, again, err2)
		}
	})
}

// FuzzCgroupName: a name is one folder's, of the line of cgroup v2.
func FuzzCgroupName(f *testing.F) {
	f.Add("0::/system.slice/docker-5b3211.scope\n")
	f.Add("12:cpu:/one\n1:name=systemd:/two\n0::/kubepods/pod1/three\n")
	f.Add("0::/\n")
	f.Fuzz(func(t *testing.T, text string) {
		name := cgroupName(text)
		if strings.ContainsAny(name, "/\n") || name != "" && !strings.Contains(text, name) {
			t.Fatalf("%q of %q", name, text)
		}
	})
}
