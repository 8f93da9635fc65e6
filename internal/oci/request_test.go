package oci

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const testID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParseRequest(t *testing.T) {
	r, err := ParseRequest(readTestdata(t, "podman.json"), testID, "/var/lib/containers/storage/overlay-containers/"+testID+"/userdata", false)
	if err != nil {
		t.Fatal(err)
	}
	if !r.VTPM || r.Policy != "strict-1.2" || r.Required || r.ImageDigest != "sha256:77aa" || len(r.VTPMs) != 2 {
		t.Errorf("%+v", r)
	}
	if !r.UserNamespace || r.RootUID != 165536 || r.RootGID != 165537 {
		t.Errorf("root is %d, %d", r.RootUID, r.RootGID)
	}
	want := VTPM{"/var/lib/t/a", true, "2", true, "tss", "sha1,sha256", "secret-word", "tpm0"}
	if r.VTPMs[0] != want || !slices.Equal(want.Banks(), []string{"sha1", "sha256"}) {
		t.Errorf("vTPM %+v", r.VTPMs[0])
	}
	if !slices.Equal(r.Homes, []string{"/var/lib/containers/storage/overlay-containers/" + testID}) {
		t.Errorf("homes %v", r.Homes)
	}
	if err := r.Check(); err != nil {
		t.Error(err)
	}
	docker, err := ParseRequest(readTestdata(t, "docker.json"), testID, "/run/containerd/io.containerd.runtime.v2.task/moby/"+testID, true)
	if err != nil {
		t.Fatal(err)
	}
	if !docker.VTPM || !slices.Equal(docker.Homes, []string{"/var/lib/docker/containers/" + testID}) {
		t.Errorf("%+v", docker)
	}
}

func TestRequestAnnotations(t *testing.T) {
	for name, c := range map[string]struct {
		annotations string
		want        Request
	}{
		"none":        {`{}`, Request{VTPM: true}},
		"off":         {`{"imans.dev/vtpm":"false"}`, Request{}},
		"required":    {`{"imans.dev/required":"true"}`, Request{VTPM: true, Required: true}},
		"policy only": {`{"imans.dev/vtpm":"false","imans.dev/policy":"p"}`, Request{Policy: "p"}},
		"gate":        {`{"imans.dev/gate":"all"}`, Request{VTPM: true, Gate: "all"}},
		"no gate":     {`{"imans.dev/gate":"off"}`, Request{VTPM: true, Gate: "off"}},
		"containerd": {`{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.image-name":"r/i:1","io.kubernetes.cri.sandbox-name":"web",
			"io.kubernetes.cri.sandbox-namespace":"prod","io.kubernetes.cri.container-name":"c"}`,
			Request{VTPM: true, Image: "r/i:1", Pod: "web", Namespace: "prod", Name: "c"}},
		"containerd sandbox": {`{"io.kubernetes.cri.container-type":"sandbox","imans.dev/policy":"p"}`, Request{}},
		"CRI-O": {`{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.ImageName":"r/i","io.kubernetes.pod.name":"web",
			"io.kubernetes.cri-o.Annotations":"{\"imans.dev/policy\":\"pod\",\"imans.dev/vtpm\":\"false\"}","imans.dev/vtpm":"true"}`,
			Request{VTPM: true, Policy: "pod", Image: "r/i", Pod: "web"}},
		"CRI-O garbage": {`{"io.kubernetes.cri-o.Annotations":"{"}`, Request{VTPM: true}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := ParseRequest([]byte(`{"annotations":`+c.annotations+`}`), "c1", "/b", true)
			if err != nil {
				t.Fatal(err)
			}
			c.want.ID, c.want.Bundle = "c1", "/b"
			if string(encode(r)) != string(encode(c.want)) {
				t.Errorf("got %s, want %s", encode(r), encode(c.want))
			}
		})
	}
}

func TestRequestRefuses(t *testing.T) {
	vtpms := func(list string) string { return `{"linux":{"resources":{"vtpms":` + list + `}}}` }
	for name, c := range map[string]struct{ spec, field, value string }{
		"vtpm":             {`{"annotations":{"imans.dev/vtpm":"maybe"}}`, `annotations["imans.dev/vtpm"]`, `"maybe"`},
		"required":         {`{"annotations":{"imans.dev/required":""}}`, `annotations["imans.dev/required"]`, `""`},
		"gate":             {`{"annotations":{"imans.dev/gate":"ajar"}}`, `annotations["imans.dev/gate"]`, `"ajar"`},
		"gate of nothing":  {`{"annotations":{"imans.dev/gate":""}}`, `annotations["imans.dev/gate"]`, `""`},
		"policy":           {`{"annotations":{"imans.dev/policy":"../x"}}`, `annotations["imans.dev/policy"]`, `"../x"`},
		"version":          {vtpms(`[{"vtpmVersion":"3"}]`), "linux.resources.vtpms[0].vtpmVersion", `"3"`},
		"version number":   {vtpms(`[{"vtpmVersion":2}]`), "linux.resources.vtpms[0].vtpmVersion", ""},
		"relative path":    {vtpms(`[{"statePath":"a"}]`), "linux.resources.vtpms[0].statePath", `"a"`},
		"path out":         {vtpms(`[{"statePath":"/a/.."}]`), "linux.resources.vtpms[0].statePath", `"/a/.."`},
		"managed nothing":  {vtpms(`[{"statePathIsManaged":true}]`), "linux.resources.vtpms[0].statePathIsManaged", "true"},
		"bank":             {vtpms(`[{},{"pcrBanks":"sha1,md5"}]`), "linux.resources.vtpms[1].pcrBanks", `"sha1,md5"`},
		"bank of 1.2":      {vtpms(`[{"vtpmVersion":"1.2","pcrBanks":"sha256"}]`), "linux.resources.vtpms[0].pcrBanks", `"sha256"`},
		"user":             {vtpms(`[{"runAs":"-o root"}]`), "linux.resources.vtpms[0].runAs", `"-o root"`},
		"name":             {vtpms(`[{"vtpmName":"../null"}]`), "linux.resources.vtpms[0].vtpmName", `"../null"`},
		"one path twice":   {vtpms(`[{"statePath":"/a"},{"statePath":"/a"}]`), "linux.resources.vtpms[1].statePath", `"/a"`},
		"too many":         {vtpms(`[` + strings.Repeat(`{},`, 16) + `{}]`), "linux.resources.vtpms", "a list of 17"},
		"password, number": {vtpms(`[{"encryptionPassword":12345}]`), "linux.resources.vtpms[0].encryptionPassword", ""},
		"no object":        {vtpms(`["x"]`), "linux.resources.vtpms[0]", `"x"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseRequest([]byte(c.spec), "c1", "/b", true)
			var field *FieldError
			if !errors.As(err, &field) || field.Field != c.field || field.Value != c.value {
				t.Errorf("got %v, want an error of %s and %s", err, c.field, c.value)
			}
			if err != nil && strings.Contains(err.Error(), "12345") {
				t.Errorf("the password is shown: %v", err)
			}
		})
	}
	for _, id := range []string{"", ".", "..", "a/b", "a b", strings.Repeat("x", 256), "a\n"} {
		if _, err := ParseRequest([]byte(`{}`), id, "/b", true); err == nil {
			t.Errorf("id %q was taken", id)
		}
	}
}

func TestMayReturn(t *testing.T) {
	home := filepath.Join(t.TempDir(), testID)
	r := Request{Homes: []string{home}}
	if r.MayReturn() {
		t.Error("its home is not there")
	}
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	if !r.MayReturn() {
		t.Error("its home is there")
	}
}
