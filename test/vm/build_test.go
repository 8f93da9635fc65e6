package vm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/need"
)

func TestCompareNumbers(t *testing.T) {
	order := []string{
		"",
		"linux-image-6.1.0-9-amd64",
		"linux-image-6.1.0-56-amd64",
		"linux-image-6.12.9+deb12-amd64",
		"linux-image-6.12.88+deb12-amd64",
		"linux-image-6.12.117+deb12-amd64",
	}
	for i := range order {
		for j := range order {
			got := compareNumbers(order[i], order[j])
			if want := i - j; (got < 0) != (want < 0) || (got > 0) != (want > 0) {
				t.Errorf("compare %q with %q: %d", order[i], order[j], got)
			}
		}
	}
}

func TestModuleOrder(t *testing.T) {
	const dep = `kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/mbcache.ko.xz kernel/fs/jbd2/jbd2.ko.xz
kernel/lib/crc16.ko.xz:
kernel/fs/mbcache.ko.xz:
kernel/fs/jbd2/jbd2.ko.xz:
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz
kernel/net/9p/9pnet.ko.xz:
kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz
kernel/drivers/tpm/tpm-vtpm-proxy.ko.xz:
`
	got, err := parseModuleOrder(strings.NewReader(dep), []string{"virtio_blk", "ext4", "9p", "9pnet_virtio", "tpm_vtpm_proxy"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"kernel/fs/jbd2/jbd2.ko.xz", "kernel/fs/mbcache.ko.xz", "kernel/lib/crc16.ko.xz", "kernel/fs/ext4/ext4.ko.xz",
		"kernel/net/9p/9pnet.ko.xz", "kernel/fs/9p/9p.ko.xz", "kernel/net/9p/9pnet_virtio.ko.xz",
		"kernel/drivers/tpm/tpm-vtpm-proxy.ko.xz",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if _, err := parseModuleOrder(strings.NewReader("no colon\n"), nil); err == nil {
		t.Error("a line without a colon was accepted")
	}
}

// TestCPIO has another program read the archive.
func TestCPIO(t *testing.T) {
	busybox := need.Program(t, "busybox")
	var archive bytes.Buffer
	w := newCPIO(&archive)
	w.Dir("folder")
	contents := map[string]string{"folder/empty": "", "folder/odd": "abcde", "top": strings.Repeat("x", 70000)}
	for name, content := range contents {
		w.File(name, 0o640, []byte(content))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command(busybox, "cpio", "-i", "-d", "-m")
	cmd.Dir, cmd.Stdin = dir, &archive
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	for name, want := range contents {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "top")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode of top: %v, %v; want 0640", st.Mode(), err)
	}
}

func TestFindSuites(t *testing.T) {
	repo := t.TempDir()
	for name, text := range map[string]string{
		"a/x_test.go":          "//go:build vm\n\npackage a\n\nfunc TestOne(t *testing.T) {}\nfunc TestTwo(t *testing.T) {}\nfunc helper() {}\n",
		"a/plain_test.go":      "package a\n\nfunc TestPlain(t *testing.T) {}\n",
		"b/c/y_test.go":        "// Licence.\n\n//go:build linux && vm\n\npackage c_test\n\nfunc TestThree(t *testing.T) {}\n",
		"b/not_test.go":        "//go:build !vm\n\npackage b\n\nfunc TestOther(t *testing.T) {}\n",
		"b/testdata/z_test.go": "//go:build vm\n\npackage z\n\nfunc TestData(t *testing.T) {}\n",
	} {
		path := filepath.Join(repo, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		run  string
		want []string
	}{
		{"", []string{"a ^(TestOne|TestTwo)$", "b/c ^(TestThree)$"}},
		{"T(wo|hree)", []string{"a ^(TestTwo)$", "b/c ^(TestThree)$"}},
		{"One/sub/x", []string{"a ^(TestOne)$/sub/x"}},
		{"Plain", nil},
	} {
		suites, err := findSuites(repo, tt.run)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range suites {
			got = append(got, s.Name+" "+s.pattern())
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("run %q: got %q, want %q", tt.run, got, tt.want)
		}
	}
	if _, err := findSuites(repo, "("); err == nil {
		t.Error("a broken expression was accepted")
	}
}

func TestTakes(t *testing.T) {
	for run, want := range map[string]bool{"": true, "^TestVTPMNRI$": true, "TestVTPMAsked": false} {
		suites, err := findSuites("../..", run)
		if err != nil {
			t.Fatal(err)
		}
		if got := takes(suites, containerdTests); got != want {
			t.Errorf("the tests of %q take containerd: %t, want %t", run, got, want)
		}
	}
}

func TestFind(t *testing.T) {
	for _, k := range Matrix() {
		if got, err := Find(k.Name); err != nil || got.Name != k.Name {
			t.Errorf("Find(%q) = %v, %v", k.Name, got.Name, err)
		}
	}
	if _, err := Find("2.6"); err == nil {
		t.Error("a kernel outside the matrix was found")
	}
}

func TestQuote(t *testing.T) {
	for _, s := range []string{"", "plain", "it's $HOME `x` \\ \"y\"\nz"} {
		out, err := exec.Command("sh", "-c", "printf %s "+Quote(s)).Output()
		if err != nil || string(out) != s {
			t.Errorf("the shell read %q as %q, %v", s, out, err)
		}
	}
}

func TestWithout(t *testing.T) {
	p := &Payload{Suites: []Suite{{"a", []string{"TestA", "TestB", "TestC"}, "sub"}, {"b", []string{"TestA"}, ""}}}
	left := p.Without(Results{Passed: []string{"a.TestA", "b.TestA"}, Skipped: []string{"a.TestC"}, Failed: []string{"a.TestB"}})
	if len(left.Suites) != 1 || !reflect.DeepEqual(left.Suites[0], Suite{"a", []string{"TestB"}, "sub"}) {
		t.Errorf("left %+v", left.Suites)
	}
	if !strings.Contains(left.Script(time.Minute), "-test.run='^(TestB)$/sub'") || len(p.Suites) != 2 {
		t.Errorf("the script is %s; the whole has %d suites", left.Script(time.Minute), len(p.Suites))
	}
}
