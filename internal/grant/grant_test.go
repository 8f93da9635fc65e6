package grant

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/vtpm"
)

// config is that of an agent without the driver: swtpm is a program that is not there.
func config(dir string) Config {
	return Config{Dir: dir, Swtpm: "no-such-swtpm", Tree: namespace.New(namespace.Config{Log: zap.NewNop()}), Log: zap.NewNop()}
}

func open(t *testing.T, c Config) *Containers {
	t.Helper()
	g, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// leave writes a record as an earlier agent left it.
func leave(t *testing.T, g *Containers, l life) *container {
	t.Helper()
	c := &container{id: l.Request.ID, dir: filepath.Join(g.Dir, l.Request.ID), life: l}
	if err := c.record(); err != nil {
		t.Fatal(err)
	}
	g.known[c.id] = c
	return c
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, os.ErrNotExist)
}

func TestOpenFindsWhatWasLeft(t *testing.T) {
	dir := t.TempDir()
	want := life{
		Request: oci.Request{ID: "one", VTPM: true, VTPMs: []oci.VTPM{{Name: "tpm5"}}}, State: stopped, Since: time.Now().UTC().Round(0),
		Deleted: true,
	}
	leave(t, open(t, config(dir)), want)
	if err := os.MkdirAll(filepath.Join(dir, "half-made", "tpm0"), 0o700); err != nil {
		t.Fatal(err)
	}
	g := open(t, config(dir))
	c := g.find("one")
	if c == nil || c.Request.VTPMs[0].Name != "tpm5" || c.State != stopped || !c.Deleted || !c.Since.Equal(want.Since) {
		t.Errorf("found %+v", c)
	}
	if there(filepath.Join(dir, "half-made")) {
		t.Error("a folder without a record is still there")
	}
	if err := os.WriteFile(filepath.Join(dir, "one", recordName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(config(dir)); err == nil || !strings.Contains(err.Error(), "move its folder away") {
		t.Errorf("a damaged record: %v", err)
	}
}

// A container that can't have what it asks for leaves nothing, and one that ran before loses nothing.
func TestPrepareThatFails(t *testing.T) {
	g := open(t, config(t.TempDir()))
	ask := oci.Request{ID: "c", VTPM: true, VTPMs: []oci.VTPM{{EncryptionPassword: "secret"}}}
	if _, err := g.Prepare(t.Context(), ask); err == nil || !strings.Contains(err.Error(), "install the package swtpm") || strings.Contains(err.Error(), "secret") {
		t.Errorf("without swtpm: %v", err)
	}
	if there(filepath.Join(g.Dir, "c")) || g.find("c") != nil {
		t.Error("something is left of it")
	}
	keys := filepath.Join(g.Dir, "c", "tpm0")
	leave(t, g, life{Request: oci.Request{ID: "c", VTPM: true, VTPMs: []oci.VTPM{{}}}, State: stopped})
	if err := os.MkdirAll(keys, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Prepare(t.Context(), ask); err == nil {
		t.Error("no error")
	}
	if b, err := os.ReadFile(filepath.Join(g.Dir, "c", recordName)); err != nil || strings.Contains(string(b), "secret") {
		t.Errorf("the record: %s, %v", b, err)
	}
	if c := g.find("c"); c == nil || c.State != stopped || !there(keys) {
		t.Errorf("after a failed start the container is %+v, its keys are there: %v", c, there(keys))
	}
}

func TestWhatIsNotAskedFor(t *testing.T) {
	g := open(t, config(t.TempDir()))
	g.Window = "/run/imans/fs"
	grant, err := g.Prepare(t.Context(), oci.Request{ID: "plain"})
	if err != nil || len(grant.Devices) > 0 || len(grant.Mounts) != 1 || grant.Mounts[0].Source != g.Window {
		t.Errorf("granted %+v, %v", grant, err)
	}
	if err := g.Created(t.Context(), "plain", os.Getpid()); err == nil || !strings.Contains(err.Error(), "granted nothing") {
		t.Errorf("created: %v", err)
	}
	if err := errors.Join(g.Stopped(t.Context(), "plain"), g.Removed(t.Context(), "plain")); err != nil {
		t.Errorf("one that is not known: %v", err)
	}
}

// What a container kept goes when it is removed: not before its manager's folder, and never from a folder that others manage.
func TestLook(t *testing.T) {
	g := open(t, config(t.TempDir()))
	home, own, theirs := t.TempDir(), filepath.Join(t.TempDir(), "own"), filepath.Join(t.TempDir(), "theirs")
	for _, dir := range []string{own, theirs} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	ask := oci.Request{ID: "c", VTPM: true, Homes: []string{home}, VTPMs: []oci.VTPM{{}, {StatePath: own}, {StatePath: theirs, StatePathIsManaged: true}}}
	c := leave(t, g, life{Request: ask, State: created, Namespace: event.MountNS{Inum: 4026532000, ID: 9}})
	look := func(want state) {
		t.Helper()
		if err := g.look(c); err != nil || c.State != want {
			t.Fatalf("it is %s, %v; want %s", c.State, err, want)
		}
	}
	look(stopped) // its namespace is gone
	if err := g.Removed(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	look(stopped)
	if !there(c.dir) || !there(own) {
		t.Error("gone while its manager keeps it")
	}
	if err := os.Remove(home); err != nil {
		t.Fatal(err)
	}
	look(stopped)
	if there(c.dir) || there(own) || !there(theirs) || g.find("c") != nil {
		t.Errorf("after its removal: folder %v, own state %v, managed state %v", there(c.dir), there(own), there(theirs))
	}
	late := leave(t, g, life{Request: oci.Request{ID: "late", VTPMs: []oci.VTPM{{}}}, State: prepared, Since: time.Now()})
	if err := g.look(late); err != nil || late.State != prepared {
		t.Errorf("a new grant: %s, %v", late.State, err)
	}
	late.Since = time.Now().Add(-2 * unclaimedAfter)
	for range 2 {
		if err := g.look(late); err != nil {
			t.Fatal(err)
		}
	}
	if there(late.dir) {
		t.Error("a grant that nobody claimed is still there")
	}
}

func TestNodes(t *testing.T) {
	d := vtpm.Device{TPM: vtpm.Node{Path: "/dev/tpm7", Major: 253, Minor: 7}, RM: vtpm.Node{Path: "/dev/tpmrm7", Major: 252, Minor: 65543}}
	for name, want := range map[string][]string{"tpm0": {"/dev/tpm0", "/dev/tpmrm0"}, "second": {"/dev/second", "/dev/tpmrmsecond"}} {
		devices, err := nodes(d, name, oci.Request{})
		if err != nil || len(devices) != len(want) {
			t.Fatalf("%s: %+v, %v", name, devices, err)
		}
		for i, path := range want {
			if devices[i].Path != path || devices[i].Type != "c" || devices[i].Minor != []uint32{7, 65543}[i] {
				t.Errorf("%s: %+v", name, devices[i])
			}
		}
	}
	if devices, err := nodes(vtpm.Device{TPM: d.TPM}, "tpm0", oci.Request{}); err != nil || len(devices) != 1 {
		t.Errorf("a TPM 1.2: %+v, %v", devices, err)
	}
}

// Of the plugin's containers those that are gone are dropped; another's, and one that is being created, are not.
func TestThere(t *testing.T) {
	g := open(t, config(t.TempDir()))
	for id, l := range map[string]life{
		"stays":   {State: stopped},
		"gone":    {State: stopped},
		"runs":    {State: created, Namespace: event.MountNS{Inum: 4, ID: 4}},
		"comes":   {State: prepared, Since: time.Now()},
		"wrapped": {State: stopped, Request: oci.Request{Bundle: "/srv/wrapped"}},
	} {
		l.Request.ID = id
		leave(t, g, l)
	}
	if err := g.There(t.Context(), []string{"stays", "another"}); err != nil {
		t.Fatal(err)
	}
	for _, c := range g.all() {
		for range 2 { // the first look finds that its namespace is gone
			if err := g.look(c); err != nil {
				t.Error(err)
			}
		}
	}
	for id, want := range map[string]bool{"stays": true, "gone": false, "runs": false, "comes": true, "wrapped": true} {
		if got := there(filepath.Join(g.Dir, id)); got != want {
			t.Errorf("%s is there: %t, want %t", id, got, want)
		}
	}
}
