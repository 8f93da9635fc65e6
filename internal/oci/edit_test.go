package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func testGrant() Grant {
	return Grant{
		Devices: []Device{
			{Path: "/dev/tpm0", HostPath: "/dev/tpm7", Type: "c", Major: 10, Minor: 61, FileMode: 0o600},
			{Path: "/dev/tpmrm0", HostPath: "/dev/tpmrm7", Type: "c", Major: 253, Minor: 65543, FileMode: 0o660, GID: 5},
		},
		Mounts: []Mount{{Source: "/run/imans/fs", Destination: "/sys/kernel/security"}},
		Env:    []string{"TPM2TOOLS_TCTI=device:/dev/tpmrm0"},
		Hooks:  AgentHooks("/usr/bin/imans-agent", "/run/imans", true),
	}
}

// testSpec is what the tests look at in an edited spec, read by other structures than the editor's.
type testSpec struct {
	Process struct{ Env []string }
	Mounts  []struct {
		Destination, Type, Source string
		Options                   []string
	}
	Hooks map[string][]struct {
		Path string
		Args []string
	}
	Linux struct {
		Devices   []map[string]any
		Resources struct {
			Devices []map[string]any
			VTPMs   []any
		}
		MaskedPaths []string
	}
}

func readTestdata(t testing.TB, name string) []byte {
	t.Helper()
	spec, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func edited(t *testing.T, spec []byte, g Grant) testSpec {
	t.Helper()
	out, err := Edit(spec, g)
	if err != nil {
		t.Fatal(err)
	}
	var s testSpec
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestEdit(t *testing.T) {
	for name, bound := range map[string]bool{
		"runc.json": false, "crun.json": false, "docker.json": false, "runc-rootless.json": true, "podman.json": true,
	} {
		t.Run(name, func(t *testing.T) {
			s := edited(t, readTestdata(t, name), testGrant())
			last := s.Mounts[len(s.Mounts)-1]
			if last.Destination != "/sys/kernel/security" || last.Source != "/run/imans/fs" || !slices.Contains(last.Options, "bind") {
				t.Errorf("the last mount is %+v", last)
			}
			nodes, binds := 0, 0
			for _, d := range s.Linux.Devices {
				if p := d["path"]; p == "/dev/tpm0" || p == "/dev/tpmrm0" {
					nodes++
				}
			}
			for _, m := range s.Mounts {
				if m.Destination == "/dev/tpm0" && m.Source == "/dev/tpm7" || m.Destination == "/dev/tpmrm0" && m.Source == "/dev/tpmrm7" {
					binds++
				} else if strings.HasPrefix(m.Destination, "/dev/tpm") {
					t.Errorf("something else of the host's is in the place of a device: %+v", m)
				}
			}
			if want := map[bool][2]int{false: {2, 0}, true: {0, 2}}[bound]; nodes != want[0] || binds != want[1] {
				t.Errorf("%d nodes and %d binds, want %v", nodes, binds, want)
			}
			rules := s.Linux.Resources.Devices
			for i, minor := range []float64{61, 65543} {
				r := rules[len(rules)-2+i]
				if r["allow"] != true || r["access"] != "rwm" || r["minor"] != minor {
					t.Errorf("rule %d from the end is %v", 2-i, r)
				}
			}
			if len(s.Hooks["createRuntime"]) != 1 || len(s.Hooks["poststop"]) != 1 || s.Hooks["createRuntime"][0].Args[0] != "imans-agent" {
				t.Errorf("hooks: %+v", s.Hooks)
			}
			if len(s.Linux.Resources.VTPMs) != 0 {
				t.Errorf("vtpms are left: %v", s.Linux.Resources.VTPMs)
			}
		})
	}
}

// What a grant does not concern is as it was: fields that nobody knows, each digit, the order of members.
func TestEditKeeps(t *testing.T) {
	spec := readTestdata(t, "docker.json")
	out, err := Edit(spec, testGrant())
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		`18446744073709551615`, `9223372036854771712`, `{"b": 1.50, "a": [1e3]}`, `libnetwork-setkey`, `"TPM2TOOLS_TCTI=device:/dev/mine"`,
		`/dev/fuse`, `{"allow": false, "access": "rwm"}`,
	} {
		if !bytes.Contains(out, []byte(text)) {
			t.Errorf("%s is gone", text)
		}
	}
	if bytes.Contains(out, []byte("device:/dev/tpmrm0")) {
		t.Error("a variable that the spec sets was set anew")
	}
	if s := edited(t, spec, testGrant()); !slices.Equal(s.Linux.MaskedPaths, []string{"/proc/kcore", "/sys/firmware"}) {
		t.Errorf("masked: %v", s.Linux.MaskedPaths)
	}
	before, err := parseObject(spec)
	if err != nil {
		t.Fatal(err)
	}
	after, err := parseObject(out)
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range before.members {
		if after.members[i].key != m.key {
			t.Errorf("member %d is %s, was %s", i, after.members[i].key, m.key)
		}
	}
	unchanged, err := Edit(spec, Grant{})
	if err != nil || !bytes.Equal(unchanged, spec) {
		t.Errorf("nothing granted, and the text has changed; error %v", err)
	}
	podman := readTestdata(t, "podman.json")
	if out, err = Edit(podman, Grant{}); err != nil || bytes.Contains(out, []byte("vtpms")) || bytes.Contains(out, []byte("secret")) {
		t.Errorf("nothing granted: %s, error %v; want no vtpms", out, err)
	}
}

func TestEditSmall(t *testing.T) {
	for name, spec := range map[string]string{
		"nothing": `{}`, "null": `{"linux":null,"mounts":null,"hooks":null,"process":null}`,
		"null below": `{"linux":{"resources":null,"devices":null},"process":{"env":null},"hooks":{"poststop":null}}`,
	} {
		t.Run(name, func(t *testing.T) {
			s := edited(t, []byte(spec), testGrant())
			if len(s.Linux.Devices) != 2 || len(s.Linux.Resources.Devices) != 2 || len(s.Mounts) != 1 || len(s.Hooks) != 2 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestEditRefuses(t *testing.T) {
	for name, c := range map[string]struct{ spec, field string }{
		"garbage":      {"\x00\xff", ""},
		"empty":        {"", ""},
		"cut short":    {`{"linux":{"dev`, ""},
		"a list":       {`[]`, ""},
		"two specs":    {`{}{}`, ""},
		"twice":        {`{"linux":{},"linux":{}}`, ""},
		"linux":        {`{"linux":7}`, "linux"},
		"resources":    {`{"linux":{"resources":"no"}}`, "linux.resources"},
		"rules":        {`{"linux":{"resources":{"devices":{}}}}`, "linux.resources.devices"},
		"devices":      {`{"linux":{"devices":"/dev/tpm0"}}`, "linux.devices"},
		"device":       {`{"linux":{"devices":[4]}}`, "linux.devices[0]"},
		"device path":  {`{"linux":{"devices":[{"path":4}]}}`, "linux.devices[0].path"},
		"mounts":       {`{"mounts":{}}`, "mounts"},
		"destination":  {`{"mounts":[{"destination":["/"]}]}`, "mounts.destination"},
		"env":          {`{"process":{"env":[1]}}`, "process.env[0]"},
		"hooks":        {`{"hooks":[]}`, "hooks"},
		"hook list":    {`{"hooks":{"poststop":7}}`, "hooks.poststop"},
		"annotations":  {`{"annotations":{"a":1}}`, "annotations"},
		"the host's":   {`{"mounts":[{"destination":"/dev/","source":"/dev","options":["rbind"]}]}`, "mounts"},
		"namespaces":   {`{"linux":{"namespaces":{"type":"user"}}}`, "linux.namespaces"},
		"negative ids": {`{"linux":{"uidMappings":[{"hostID":-1}]}}`, "linux.uidMappings.hostID"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := Edit([]byte(c.spec), testGrant())
			var field *FieldError
			switch {
			case err == nil:
				t.Fatalf("taken: %s", out)
			case errors.As(err, &field) != (c.field != ""):
				t.Errorf("error %v; a field's: want %t", err, c.field != "")
			case field != nil && field.Field != c.field:
				t.Errorf("error %v names %s, want %s", err, field.Field, c.field)
			}
		})
	}
}

func TestEditLarge(t *testing.T) {
	spec := append([]byte(`{"annotations":{"a":"`), bytes.Repeat([]byte("x"), 10<<20)...)
	spec = append(spec, `"},"process":{"env":["A=1"]}}`...)
	if s := edited(t, spec, testGrant()); !slices.Equal(s.Process.Env, []string{"A=1", "TPM2TOOLS_TCTI=device:/dev/tpmrm0"}) {
		t.Errorf("env: %v", s.Process.Env)
	}
	deep := []byte(`{"x":` + strings.Repeat("[", 1<<20) + `}`)
	if _, err := Edit(deep, testGrant()); err == nil {
		t.Error("a million levels were taken")
	}
}

func TestEditGrant(t *testing.T) {
	for name, g := range map[string]Grant{
		"relative device": {Devices: []Device{{Path: "dev/tpm0", Type: "c"}}},
		"type":            {Devices: []Device{{Path: "/dev/tpm0", Type: "p"}}},
		"no source":       {Mounts: []Mount{{Destination: "/x"}}},
		"no value":        {Env: []string{"A"}},
		"relative hook":   {Hooks: Hooks{Poststop: []Hook{{Path: "x"}}}},
	} {
		if _, err := Edit([]byte(`{}`), g); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := Edit([]byte(`{"linux":{"namespaces":[{"type":"user"}]}}`), Grant{Devices: []Device{{Path: "/dev/tpm0", Type: "c"}}}); err == nil {
		t.Error("a device without a path on the host was granted to a user namespace")
	}
}

// FuzzEdit checks that whatever is taken comes out as JSON that says the same of what the grant does not concern.
func FuzzEdit(f *testing.F) {
	for _, name := range []string{"docker.json", "podman.json", "crun.json"} {
		spec, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(spec)
	}
	f.Fuzz(func(t *testing.T, spec []byte) {
		out, err := Edit(spec, testGrant())
		if err != nil {
			return
		}
		var before, after map[string]any
		if err := json.Unmarshal(spec, &before); err != nil {
			t.Fatalf("taken, and is no JSON: %v", err)
		}
		if err := json.Unmarshal(out, &after); err != nil {
			t.Fatalf("made no JSON: %v\n%s", err, out)
		}
		for _, key := range []string{"linux", "mounts", "hooks", "process"} {
			delete(before, key)
			delete(after, key)
		}
		if !reflect.DeepEqual(before, after) {
			t.Errorf("was %v, is %v", before, after)
		}
	})
}
