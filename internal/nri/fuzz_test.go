package nri

import (
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/oci"
)

// FuzzContainer: whatever a runtime says of a pod and a container, the container gets what passes the agent's own check, or is refused by
// the annotation's name.
func FuzzContainer(f *testing.F) {
	f.Add("c1", "true", "web", "exec", "/dev/tpm0", "user", "A=1")
	f.Add("../c", "1", "../web", "ajar", "", "mount", "")
	g := &granted{}
	f.Fuzz(func(t *testing.T, id, vtpm, policy, gate, place, kind, env string) {
		p := &plugin{Config{Containers: g, Timeout: DefaultTimeout, Log: zap.NewNop()}}
		pod := &api.PodSandbox{Annotations: map[string]string{oci.AnnotationVTPM: vtpm, oci.AnnotationPolicy: policy}}
		ctr := &api.Container{
			Id: id, Annotations: map[string]string{oci.AnnotationGate: gate}, Env: []string{env}, Mounts: []*api.Mount{{Destination: place}, nil},
			Linux: &api.LinuxContainer{Namespaces: []*api.LinuxNamespace{{Type: kind}, nil}, Devices: []*api.LinuxDevice{{Path: place}, nil}},
		}
		r, err := p.request(pod, ctr)
		if err != nil && !strings.Contains(err.Error(), "imans.dev/") && oci.CheckID(id) == nil {
			t.Fatalf("refused without saying why: %v", err)
		}
		if err == nil && r.Check() != nil {
			t.Fatalf("%+v: %v", r, r.Check())
		}
		if _, _, err2 := p.CreateContainer(t.Context(), pod, ctr); err != nil && err2 == nil {
			t.Fatalf("created, though %v", err)
		}
		p.CreateContainer(t.Context(), nil, nil)
	})
}
