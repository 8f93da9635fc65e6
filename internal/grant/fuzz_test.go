package grant

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"imans.dev/imans-agent/internal/oci"
)

// FuzzRecord: a container's record is read, and then recorded as it was, or refused.
func FuzzRecord(f *testing.F) {
	b, err := json.Marshal(life{Request: oci.Request{ID: "one", VTPM: true, VTPMs: []oci.VTPM{{Name: "tpm5"}}, Gate: "exec"}, State: stopped})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"request":{"id":"../x","vtpms":[{"statePath":"/"}]},"state":"created","namespace":{"Inum":1,"ID":2}}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		g := &Containers{Config: Config{Dir: t.TempDir()}}
		dir := filepath.Join(g.Dir, "one")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, recordName), content, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := g.open("one")
		if err != nil {
			return
		}
		if c.Request.ID != c.id || c.dir != dir {
			t.Fatalf("the record of %s is of %q", c.id, c.Request.ID)
		}
		for n := range c.Request.VTPMs {
			if place := g.config(c, n).Dir; !filepath.IsAbs(place) {
				t.Fatalf("vTPM %d is at %q", n, place)
			}
		}
		if err := c.record(); err != nil {
			t.Fatal(err)
		}
		again, err := g.open("one")
		if err != nil || !reflect.DeepEqual(again.Request, c.Request) || again.State != c.State {
			t.Fatalf("recorded and read again: %+v, was %+v; %v", again, c, err)
		}
	})
}
