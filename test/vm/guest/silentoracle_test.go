//go:build vm

package guest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/imalog"
)

// What docs/beside-the-kernel.md says, which is held to these lines: the numbers are the kernel's IMA's and ours, on besideKernel.
const (
	besideKernel = "6.12"

	besideWriters = `
| it is mapped, and changed | 1, 1 | 1, 1 | 0, 0 | 0, 1 |
| its descriptor is open as well | 1, 1 | 1, 1 | 1, 1 | 1, 1 |
| it is opened for writing twice, and not changed | 1, 1 | 1, 1 | 0, 0 | 0, 1 |
| it is opened for reading and writing | 1, 1 | 1, 1 | 0, 0 | 0, 1 |
| it is truncated by its opening | 1, 1 | 1, 1 | 0, 0 | 0, 1 |
| it is opened by another link | 1, 1 | 1, 1 | 0, 0 | 0, 1 |
| changed, mapped anew, changed again | 2, 2 | 2, 2 | 0, 1 | 0, 2 |
| it is open for writing before it is mapped | 1, 1 | 1, 1 | 1, 1 | 1, 1 |
| it is not mapped any more | 0, 0 | 0, 0 | 0, 0 | 0, 0 |
| its mapping is made executable later | 0, 1 | 0, 1 | 0, 0 | 0, 1 |
| others open it for reading | 0, 0 | 0, 0 | 0, 0 | 0, 0 |
| another file takes its name | 0, 0 | 0, 0 | 0, 0 | 0, 0 |
| it is a running program (ETXTBSY) | 0, 0 | 0, 0 | 0, 0 | 0, 0 |
`
	besideContents = `
| append | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| overwrite | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| write anew | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| truncate | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| store through a mapping | 2, 2 | 1, 2 | 2, 2 | 2, 2 |
| write by O_DIRECT | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| rename over | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| unlink | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| another link | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| mount over | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
| move the mount | 2, 2 | 2, 2 | 2, 2 | 2, 2 |
`
	besideOddCode = `
| a program in memory | yes | yes |
| a deleted program | yes | yes |
| execveat of a descriptor | yes | yes |
| a script and its interpreter | yes | yes |
| a file by binfmt_misc, and its interpreter | yes | yes |
| a program by ld.so | yes | yes |
| a mapping made executable (mprotect) | no | yes |
| a mapping with READ_IMPLIES_EXEC | yes | yes |
| remap_file_pages with READ_IMPLIES_EXEC | yes | yes |
| a 32-bit program | yes | yes |
| in a chroot | yes | yes |
| after pivot_root | yes | yes |
`
)

// besidePlaces are the file systems of the tables' columns.
var besidePlaces = []string{"disk", "memory", lowerPlace, "overlay, upper"}

// besides compares the lines of a table, each from a case's name on, with what it is to be.
func besides(t *testing.T, want string, got []string) {
	t.Helper()
	text := "\n" + strings.Join(got, "\n") + "\n"
	t.Logf("beside the kernel's IMA:%s", text)
	if os.Getenv("IMANS_VM_KERNEL") == besideKernel && text != want {
		t.Errorf("docs/beside-the-kernel.md, and this test, have it otherwise:%s", want)
	}
}

// oursHaveTheirs checks that a list has each entry of the kernel's as often, by the digest, or more often.
func oursHaveTheirs(t *testing.T, ours, theirs []*imalog.Entry) {
	t.Helper()
	have := digestsOf(ours)
	for sum, n := range digestsOf(theirs) {
		if have[sum] < n {
			t.Errorf("the kernel's list has %d entries with %s, ours %d", n, sum, have[sum])
		}
	}
}

// Beside the kernel's own IMA: ours has each violation that it has, as often, or more often.
func TestNeverSilentZWriters(t *testing.T) {
	sample(t, besideKernel)
	a := startAgent(t)
	loadKernelPolicy(t)
	a.caughtUp()
	var table []string
	for _, c := range writerCases(a) {
		t.Run(c.name, func(t *testing.T) {
			a := a.in(t)
			line := "| " + c.says
			places := writerPlaces(t)
			for _, place := range besidePlaces {
				path := places[place] + "/file"
				had := len(kernelList(t))
				c.do(t, path)
				ourList := a.list("native")
				theirList := kernelList(t)[had:]
				_, ours := names(ourList)
				_, theirs := names(theirList)
				oursHaveTheirs(t, ourList, theirList)
				n := theirs[path] + theirs[path+".link"] // the writer's name for it; ours is the list's
				least := n
				if os.Getenv("IMANS_VM_KERNEL") == "6.1" {
					least = min(n, c.want) // one for each open, which later kernels have made one for each content, as ours is
				}
				if ours[path] < least {
					t.Errorf("%s: the kernel's list has %d violations, ours %d", place, n, ours[path])
				}
				for name := range theirs {
					if ours[strings.TrimSuffix(name, ".link")] == 0 {
						t.Errorf("%s: the kernel's list has a violation of %s, ours has none", place, name)
					}
				}
				line += fmt.Sprintf(" | %d, %d", n, ours[path])
			}
			table = append(table, line+" |")
		})
	}
	besides(t, besideWriters, table)
}

// Whatever changed content the kernel's IMA measures again, ours does, as often, or more often.
func TestNeverSilentZContents(t *testing.T) {
	sample(t, besideKernel)
	a := startAgent(t)
	loadKernelPolicy(t)
	a.caughtUp()
	lower := lowerRacePlace(t)
	places := []racePlace{{fs: "ext4", dir: tempDir(t, "/root")}, {fs: "tmpfs", dir: tempDir(t, "/tmp")}, lower, {fs: "upper", dir: lower.dir + "/upper"}}
	var table []string
	for i, way := range contentWays {
		line := "| " + way.name
		for _, place := range places {
			path := place.path(t, 0, i)
			had := len(kernelList(t))
			want := way.want(t, path)
			want.run(t, path+way.first)
			a.caughtUp()
			way.change(t, path)
			want.run(t, path+way.then)
			a.caughtUp()
			ours, theirs := a.list("native"), kernelList(t)[had:]
			want.check(t, ours, false)
			oursHaveTheirs(t, ours, theirs)
			line += fmt.Sprintf(" | %d, %d", want.entries(theirs), want.entries(ours))
		}
		table = append(table, line+" |")
	}
	besides(t, besideContents, table)
}

// entries counts those of what ran, by its paths.
func (w *contentWant) entries(list []*imalog.Entry) int {
	n := 0
	for _, e := range list {
		if !e.Violation() && slices.Contains(w.paths, e.Name()) {
			n++
		}
	}
	return n
}

// Whatever odd way the kernel's IMA has an entry for, ours has one with the same digest, as often, or more often.
func TestNeverSilentZOddCode(t *testing.T) {
	sample(t, besideKernel)
	a := startAgent(t)
	loadKernelPolicy(t)
	a.caughtUp()
	had := len(kernelList(t))
	runs := runOddCode(t, tempDir(t, "/root"))
	ourList, theirList := a.list("native"), kernelList(t)[had:]
	oursHaveTheirs(t, ourList, theirList)
	ours, theirs := digestsOf(ourList), digestsOf(theirList)
	has := func(in map[string]int, sums []string) string {
		for _, sum := range sums {
			if in[sum] == 0 {
				return "no"
			}
		}
		return "yes"
	}
	var table []string
	for _, r := range runs {
		table = append(table, fmt.Sprintf("| %s | %s | %s |", r.name, has(theirs, r.sums), has(ours, r.sums)))
		if has(ours, r.sums) == "no" {
			t.Errorf("%s: no entry with one of %v", r.name, r.sums)
		}
	}
	besides(t, besideOddCode, table)
}
