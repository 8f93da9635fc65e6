package nri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"go.uber.org/zap/zaptest"

	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/oci"
)

// granted grants a TPM and a window, and writes down what it is told.
type granted struct {
	mu     sync.Mutex
	told   []string
	asked  []oci.Request
	refuse error
	held   chan struct{} // Prepare waits for it, whatever its context says
}

func (g *granted) tell(text string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.told = append(g.told, text)
	return g.refuse
}

func (g *granted) heard() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.told)
}

func (g *granted) Prepare(_ context.Context, r oci.Request) (oci.Grant, error) {
	if g.held != nil {
		<-g.held
	}
	g.mu.Lock()
	g.asked = append(g.asked, r)
	g.mu.Unlock()
	return oci.Grant{
		Devices: []oci.Device{{Path: "/dev/tpm0", HostPath: "/dev/tpm7", Type: "c", Major: 10, Minor: 61, FileMode: 0o600, UID: 4}},
		Mounts:  []oci.Mount{{Source: "/run/imans/fs", Destination: "/sys/kernel/security"}},
		Env:     []string{"A=grant", "B=grant"},
		Hooks:   oci.Hooks{Poststop: []oci.Hook{{Path: "/bin/true", Timeout: 3}}},
	}, g.tell("prepare " + r.ID)
}

func (g *granted) Created(_ context.Context, id string, pid int) error {
	return g.tell(fmt.Sprintf("created %s %d", id, pid))
}
func (g *granted) Stopped(_ context.Context, id string) error { return g.tell("stopped " + id) }
func (g *granted) Removed(_ context.Context, id string) error { return g.tell("removed " + id) }

func (g *granted) there(_ context.Context, ids []string) error {
	return g.tell(fmt.Sprint("there ", ids))
}

// startRuntime starts the runtime's side of the interface; there is what it has when a plugin connects.
func startRuntime(socket, dir string, pod *api.PodSandbox, there ...*api.Container) (*adaptation.Adaptation, error) {
	synchronize := func(ctx context.Context, with adaptation.SyncCB) error {
		_, err := with(ctx, []*api.PodSandbox{pod}, there)
		return err
	}
	update := func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil }
	r, err := adaptation.New("containerd", "2.1.0", synchronize, update, adaptation.WithSocketPath(socket),
		adaptation.WithPluginPath(dir), adaptation.WithPluginConfigPath(dir))
	if err != nil {
		return nil, err
	}
	return r, r.Start()
}

// runtimeSocket is set for a process of the tests that is a runtime with a running container, c0, until it is killed.
const runtimeSocket = "IMANS_TEST_NRI_SOCKET"

func TestMain(m *testing.M) {
	if socket := os.Getenv(runtimeSocket); socket != "" {
		pod := testPod(map[string]string{oci.AnnotationVTPM: "true"})
		if _, err := startRuntime(socket, filepath.Dir(socket), pod, testContainer("c0")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		select {}
	}
	os.Exit(need.RunClean(m))
}

// run runs the plugin until the test ends.
func run(t *testing.T, c Config) {
	t.Helper()
	c.Log = zaptest.NewLogger(t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, c) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("it does not end")
		}
	})
}

// eventually tries until done or a deadline.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func testPod(annotations map[string]string) *api.PodSandbox {
	return &api.PodSandbox{Id: "p1", Name: "web", Namespace: "prod", Annotations: annotations, Labels: map[string]string{"tier": "front"}}
}

func testContainer(id string) *api.Container {
	return &api.Container{
		Id: id, PodSandboxId: "p1", Name: "c", Pid: 41, Env: []string{"A=mine"}, Image: &api.Image{Name: "r/i:1", Digest: "sha256:77"},
		Mounts: []*api.Mount{{Destination: "/sys", Type: "sysfs", Source: "sysfs"}, {Destination: "/dev/tpm0", Type: "bind", Source: "/dev/tpm0"}},
		Linux:  &api.LinuxContainer{Namespaces: []*api.LinuxNamespace{{Type: "mount"}}},
	}
}

// create creates a container until the plugin, which may not be connected yet, has been asked.
func create(t *testing.T, r *adaptation.Adaptation, pod *api.PodSandbox, ctr *api.Container) *api.ContainerAdjustment {
	t.Helper()
	var a *api.ContainerAdjustment
	eventually(t, "adjust", func() bool {
		rsp, err := r.CreateContainer(t.Context(), &api.CreateContainerRequest{Pod: pod, Container: ctr})
		if err != nil {
			t.Fatal(err)
		}
		a = rsp.GetAdjust()
		return len(a.GetMounts()) > 0
	})
	return a
}

func TestNRI(t *testing.T) {
	g := &granted{}
	socket := filepath.Join(t.TempDir(), "nri.sock")
	run(t, Config{Containers: g, There: g.there, Socket: socket}) // before there is a runtime
	first := exec.Command(os.Args[0])
	first.Env = append(os.Environ(), runtimeSocket+"="+socket)
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "tell of what there is", func() bool { return slices.Contains(g.heard(), "created c0 41") })
	if !slices.Contains(g.heard(), "there [c0]") {
		t.Errorf("told %q", g.heard())
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	first.Wait() // killed, which is no other error
	pod, ctr := testPod(map[string]string{oci.AnnotationVTPM: "true", oci.AnnotationPolicy: "strict"}), testContainer("c1")
	r, err := startRuntime(socket, t.TempDir(), pod)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	a := create(t, r, pod, ctr)
	if d := a.GetLinux().GetDevices(); len(d) != 1 || d[0].GetPath() != "/dev/tpm0" || d[0].GetMajor() != 10 || d[0].GetMinor() != 61 || d[0].GetUid().GetValue() != 4 {
		t.Errorf("devices %v", d)
	}
	var mounts []string
	for _, m := range a.GetMounts() {
		mounts = append(mounts, m.GetSource()+" at "+m.GetDestination())
	}
	slices.Sort(mounts)
	if want := []string{" at -/dev/tpm0", "/run/imans/fs at /sys/kernel/security"}; !slices.Equal(mounts, want) {
		t.Errorf("mounts %q, want %q", mounts, want)
	}
	if env := a.GetEnv(); len(env) != 1 || env[0].GetKey() != "B" || env[0].GetValue() != "grant" {
		t.Errorf("environment %v", env)
	}
	if h := a.GetHooks().GetPoststop(); len(h) != 1 || h[0].GetTimeout().GetValue() != 3 {
		t.Errorf("hooks %v", h)
	}
	want := oci.Request{ID: "c1", VTPM: true, Policy: "strict", Image: "r/i:1", ImageDigest: "sha256:77", Name: "c", Pod: "web", Namespace: "prod"}
	if got := g.asked[0]; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("asked %+v, want %+v", got, want)
	}
	g.told = nil
	event := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	event(r.StartContainer(t.Context(), &adaptation.StartContainerRequest{Pod: pod, Container: ctr}))
	_, err = r.StopContainer(t.Context(), &api.StopContainerRequest{Pod: pod, Container: ctr})
	event(err)
	event(r.RemoveContainer(t.Context(), &adaptation.RemoveContainerRequest{Pod: pod, Container: ctr}))
	if got, want := g.heard(), []string{"created c1 41", "stopped c1", "removed c1"}; !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

func TestNRIUserNamespace(t *testing.T) {
	ctr := testContainer("c1")
	ctr.Linux.Namespaces = append(ctr.Linux.Namespaces, &api.LinuxNamespace{Type: "user"})
	ctr.Linux.Devices = []*api.LinuxDevice{{Path: "/dev/tpm0"}}
	g := &granted{}
	grant, err := g.Prepare(t.Context(), oci.Request{})
	if err != nil {
		t.Fatal(err)
	}
	a, err := adjust(ctr, grant)
	if err != nil {
		t.Fatal(err)
	}
	d := a.GetLinux().GetDevices()
	if len(d) != 2 || d[0].GetPath() != "-/dev/tpm0" || d[1].GetPath() != "/dev/tpm7" {
		t.Errorf("devices %v", d)
	}
	if m := a.GetMounts()[0]; m.GetSource() != "/dev/tpm7" || m.GetDestination() != "/dev/tpm0" {
		t.Errorf("mount %v", m)
	}
	grant.Devices[0].HostPath = ""
	if _, err := adjust(ctr, grant); err == nil {
		t.Error("a device without a path on the host was granted to a user namespace")
	}
}

func TestNRIChoice(t *testing.T) {
	for name, c := range map[string]struct {
		config         Config
		pod, container map[string]string
		want           bool
	}{
		"nothing":                 {},
		"annotation":              {pod: map[string]string{oci.AnnotationVTPM: "true"}, want: true},
		"policy":                  {pod: map[string]string{oci.AnnotationPolicy: "p"}, want: true},
		"namespace":               {config: Config{Namespaces: []string{"other", "prod"}}, want: true},
		"other namespace":         {config: Config{Namespaces: []string{"pro"}}},
		"namespace, not this pod": {config: Config{Namespaces: []string{"prod"}}, pod: map[string]string{oci.AnnotationVTPM: "false"}},
		"label":                   {config: Config{Labels: []string{"tier=front"}}, want: true},
		"other label":             {config: Config{Labels: []string{"tier=back", "tier"}}},
		"not this container":      {pod: map[string]string{oci.AnnotationVTPM: "true"}, container: map[string]string{oci.AnnotationVTPM: "false"}},
		"this container alone":    {container: map[string]string{oci.AnnotationVTPM: "true"}, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctr := testContainer("c1")
			ctr.Annotations = c.container
			r, err := (&plugin{c.config}).request(testPod(c.pod), ctr)
			if err != nil || r.Wants() != c.want {
				t.Errorf("wants %t, %v, want %t", r.Wants(), err, c.want)
			}
		})
	}
}

func TestNRITimeout(t *testing.T) {
	for allowed, want := range map[time.Duration]time.Duration{
		0: DefaultTimeout, 2 * time.Second: DefaultTimeout, time.Minute: 45 * time.Second,
	} {
		if got := timeout(allowed); got != want {
			t.Errorf("of %v that the runtime allows it takes %v, want %v", allowed, got, want)
		}
	}
}

// Whatever the agent does, a container is created within a bound or refused where that was asked for.
func TestNRIFailure(t *testing.T) {
	asking, required := map[string]string{oci.AnnotationVTPM: "true"}, map[string]string{oci.AnnotationVTPM: "true", oci.AnnotationRequired: "true"}
	held := make(chan struct{})
	slow := &granted{held: held}
	for name, c := range map[string]struct {
		g           *granted
		annotations map[string]string
		says        string
	}{
		"refused":           {&granted{refuse: errors.New("out of TPMs")}, asking, ""},
		"refused, required": {&granted{refuse: errors.New("out of TPMs")}, required, "out of TPMs"},
		"slow":              {slow, asking, ""},
		"slow, required":    {slow, required, "keep more vTPMs ready"},
		"wrong annotation":  {&granted{}, map[string]string{oci.AnnotationVTPM: "1"}, `is "1"`},
		"wrong gate":        {&granted{}, map[string]string{oci.AnnotationGate: "true"}, `is "true"`},
		"wrong policy":      {&granted{}, map[string]string{oci.AnnotationPolicy: "a/b"}, `is "a/b"`},
	} {
		t.Run(name, func(t *testing.T) {
			p := &plugin{Config{Containers: c.g, Timeout: 50 * time.Millisecond, Log: zaptest.NewLogger(t)}}
			began := time.Now()
			a, _, err := p.CreateContainer(t.Context(), testPod(c.annotations), testContainer("c1"))
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want %q", err, c.says)
			}
			if a != nil || time.Since(began) > 10*time.Second {
				t.Errorf("after %v: %v", time.Since(began), a)
			}
		})
	}
	close(held)
	eventually(t, "give back late grants", func() bool {
		return len(slices.DeleteFunc(slow.heard(), func(s string) bool { return s != "removed c1" })) == 2
	})
	p := &plugin{Config{Containers: &granted{}, Timeout: time.Second, Log: zaptest.NewLogger(t)}}
	ctr := testContainer("c1")
	ctr.Pid = 0
	if err := p.StartContainer(t.Context(), testPod(asking), ctr); err != nil {
		t.Errorf("a runtime that names no process: %v", err)
	}
	if err := p.StartContainer(t.Context(), testPod(required), ctr); err == nil {
		t.Error("a runtime that names no process: started, though the vTPM is required")
	}
}
