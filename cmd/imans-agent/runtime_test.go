package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/oci"
)

// TestMain is this program if the test binary is called by one of its names: the tests run it, and runtimes run its hooks.
func TestMain(m *testing.M) {
	if name := filepath.Base(os.Args[0]); name == "imans-agent" || name == "imans-runtime" {
		main()
	}
	os.Exit(need.RunClean(m))
}

// granted is an agent's side that grants /dev/null's device as a TPM, and writes down what it is told.
type granted struct {
	mu     sync.Mutex
	told   []string
	asked  oci.Request
	refuse error
}

func (g *granted) tell(text string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.told = append(g.told, text)
	return g.refuse
}

// heard returns what it was told since the last time, and what was asked for last.
func (g *granted) heard() (told []string, asked oci.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	told, g.told = g.told, nil
	return told, g.asked
}

func (g *granted) Prepare(_ context.Context, r oci.Request) (oci.Grant, error) {
	err := g.tell("prepare " + r.ID)
	g.mu.Lock()
	g.asked = r
	g.mu.Unlock()
	return oci.Grant{
		Devices: []oci.Device{{Path: "/dev/tpm0", HostPath: "/dev/null", Type: "c", Major: 1, Minor: 3, FileMode: 0o666}},
		Env:     []string{"TPM2TOOLS_TCTI=device:/dev/tpm0"},
	}, err
}

func (g *granted) Created(_ context.Context, id string, pid int) error {
	outside, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	if inside, err := os.Readlink("/proc/" + itoa(pid) + "/ns/mnt"); err != nil || inside == outside {
		return errors.Join(err, errors.New("the process is in the host's mount namespace"))
	}
	return g.tell("created " + id)
}

func (g *granted) Stopped(_ context.Context, id string) error { return g.tell("stopped " + id) }
func (g *granted) Removed(_ context.Context, id string) error { return g.tell("removed " + id) }

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

// serveContainers is an agent's socket; it returns the run folder.
func serveContainers(t *testing.T, c oci.Containers) string {
	t.Helper()
	dir := t.TempDir()
	s, err := control.Listen(filepath.Join(dir, control.SocketName), control.Config{Containers: c, Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return dir
}

// program returns this program under a name.
func program(t *testing.T, name string) string {
	t.Helper()
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(own, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func settings(t *testing.T, s runtimeSettings) string {
	t.Helper()
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "runtime.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// bundle makes one whose program is a shell command; extra goes into the top of the spec.
func bundle(t *testing.T, command, extra string) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "rootfs")
	for _, d := range []string{"bin", "proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if busybox, err := exec.LookPath("busybox"); err == nil {
		if out, err := exec.Command("cp", busybox, filepath.Join(root, "bin/sh")).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	}
	args, err := json.Marshal([]string{"/bin/sh", "-c", command})
	if err != nil {
		t.Fatal(err)
	}
	spec := `{"ociVersion":"1.0.2","process":{"cwd":"/","user":{"uid":0,"gid":0},"args":` + string(args) + `,"env":["PATH=/bin"]},
		"root":{"path":"rootfs"},"mounts":[{"destination":"/proc","type":"proc","source":"proc"},
		{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755"]}],
		"linux":{"namespaces":[{"type":"mount"},{"type":"pid"}]}` + extra + `}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(spec), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// status runs a program and returns what it wrote and its exit status.
func status(t *testing.T, dir string, args ...string) (string, int) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func TestRuntimeRunc(t *testing.T) {
	need.Program(t, "runc")
	need.Program(t, "busybox")
	g := &granted{}
	file := settings(t, runtimeSettings{Runtime: "runc", RunDir: serveContainers(t, g), OnFailure: onFailureFail, DefaultVTPM: true})
	agent := program(t, "imans-agent")
	state := t.TempDir()
	dir := bundle(t, `[ -c /dev/tpm0 ] && echo "$TPM2TOOLS_TCTI"; exit 7`, "")
	if out, code := status(t, dir, "runc", "--root", state, "run", "without"); code != 7 {
		need.Skip(t, "runc runs no container here: exit status %d: %s", code, out)
	}
	for range 2 { // from one bundle twice
		out, code := status(t, dir, agent, "runtime", "--settings", file, "--root", state, "run", "imans-test-1")
		if code != 7 || out != "device:/dev/tpm0\n" {
			t.Errorf("exit status %d, output %q", code, out)
		}
		want := []string{"prepare imans-test-1", "created imans-test-1", "stopped imans-test-1", "removed imans-test-1"}
		told, asked := g.heard()
		if !slices.Equal(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
		if asked.Bundle != dir || !asked.VTPM {
			t.Errorf("asked %+v", asked)
		}
	}
	spec, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil || strings.Count(string(spec), `"/dev/tpm0"`) != 1 || strings.Count(string(spec), "createRuntime") != 2 {
		t.Errorf("a second edit stands on the first: %s, %v", spec, err)
	}
}

// In a user namespace the device is the host's node of the vTPM, bound under the container's name.
func TestRuntimeRuncUserNamespace(t *testing.T) {
	need.Program(t, "runc")
	need.Program(t, "busybox")
	g := &granted{}
	file := settings(t, runtimeSettings{Runtime: "runc", RunDir: serveContainers(t, g), OnFailure: onFailureFail, DefaultVTPM: true})
	dir := bundle(t, `[ -c /dev/tpm0 ] && echo "$TPM2TOOLS_TCTI"; exit 7`, "")
	path := filepath.Join(dir, "config.json")
	spec, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	mapping := `[{"containerID":0,"hostID":100000,"size":65536}]`
	spec = []byte(strings.Replace(string(spec), `{"type":"pid"}]`, `{"type":"pid"},{"type":"user"}],"uidMappings":`+mapping+`,"gidMappings":`+mapping, 1))
	if err := os.WriteFile(path, spec, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("chown", "-R", "100000:100000", filepath.Join(dir, "rootfs")).CombinedOutput(); err != nil {
		need.Skip(t, "chown: %v: %s", err, out)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	if out, code := status(t, dir, "runc", "--root", state, "run", "without"); code != 7 {
		need.Skip(t, "runc runs no container with a user namespace here: exit status %d: %s", code, out)
	}
	out, code := status(t, dir, program(t, "imans-agent"), "runtime", "--settings", file, "--root", state, "run", "imans-test-2")
	if code != 7 || out != "device:/dev/tpm0\n" {
		t.Errorf("exit status %d, output %q", code, out)
	}
	if _, asked := g.heard(); !asked.UserNamespace || asked.RootUID != 100000 || asked.RootGID != 100000 {
		t.Errorf("asked %+v", asked)
	}
}

// The wrapper hands arguments, output, exit status and signals through, whatever the agent does.
func TestRuntimePassesThrough(t *testing.T) {
	fake := filepath.Join(t.TempDir(), "imitated")
	script := "#!/bin/sh\necho \"$@\"\n[ \"$1\" = die ] && kill -TERM $$\nexit 42\n"
	if err := os.WriteFile(fake, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("IMANS_RUNTIME", fake)
	wrapper, agent := program(t, "imans-runtime"), program(t, "imans-agent")
	down := []string{agent, "runtime", "--run-dir", t.TempDir(), "--real", fake}
	for name, args := range map[string][]string{
		"no command": {}, "state": {"state", "c1"}, "spaces": {"exec", "c1", "a  b", ""}, "options": {"--what", "x", "list", "-q"},
		"doubt": {"list", "--root"}, "deletion": {"delete", "-f", "c1"}, "no bundle": {"create", "-b", "/nowhere", "c1"},
	} {
		t.Run(name, func(t *testing.T) {
			out, code := status(t, "/", append(slices.Clone(down), args...)...)
			if code != 42 || out != strings.Join(args, " ")+"\n" {
				t.Errorf("exit status %d, output %q", code, out)
			}
			if out, code := status(t, "/", append([]string{wrapper}, args...)...); code != 42 || out != strings.Join(args, " ")+"\n" {
				t.Errorf("by name: exit status %d, output %q", code, out)
			}
		})
	}
	if _, code := status(t, "/", append(down, "die")...); code != -1 {
		t.Errorf("exit status %d of one that a signal ended, want none", code)
	}
	if out, code := status(t, "/", append(down, "--what", "create", "c1")...); code != 42 || !strings.Contains(out, "not understood") {
		t.Errorf("an unknown option: exit status %d, output %q", code, out)
	}
}

func TestRuntimeAgentDown(t *testing.T) {
	fake := filepath.Join(t.TempDir(), "imitated")
	if err := os.WriteFile(fake, []byte("#!/bin/sh\nexit 42\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	agent, nowhere := program(t, "imans-agent"), t.TempDir()
	refusing := serveContainers(t, &granted{refuse: errors.New("no policy of that name; imans-agent policy list")})
	for name, c := range map[string]struct {
		extra, onFailure, runDir string
		code                     int
		says                     string
	}{
		"goes on":          {"", onFailureContinue, nowhere, 42, "goes on without a vTPM"},
		"fails":            {"", onFailureFail, nowhere, exitLacks, "start one"},
		"required":         {`,"annotations":{"imans.dev/required":"true"}`, onFailureContinue, nowhere, exitLacks, "start one"},
		"not asked":        {`,"annotations":{"imans.dev/vtpm":"false"}`, onFailureFail, nowhere, 42, ""},
		"wrong annotation": {`,"annotations":{"imans.dev/vtpm":"yes"}`, onFailureContinue, nowhere, exitLacks, `is "yes"`},
		"refused":          {"", onFailureFail, refusing, exitLacks, "no policy of that name"},
		"refused, goes on": {"", onFailureContinue, refusing, 42, "no policy of that name"},
		"garbage":          {`,,`, onFailureContinue, nowhere, 42, "parse config.json"},
		"garbage, fails":   {`,,`, onFailureFail, nowhere, exitLacks, "parse config.json"},
		"no containers":    {"", onFailureFail, serveContainers(t, nil), exitLacks, "grants containers nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			file := settings(t, runtimeSettings{RunDir: c.runDir, OnFailure: c.onFailure, DefaultVTPM: true})
			log := filepath.Join(t.TempDir(), "log.json")
			out, code := status(t, bundle(t, "true", c.extra), agent, "runtime", "--settings", file, "--real", fake,
				"--log", log, "--log-format", "json", "create", "c1")
			written, err := os.ReadFile(log)
			if err != nil && c.says != "" {
				t.Error(err)
			}
			var line struct{ Level, Msg string }
			if c.says != "" && (json.Unmarshal(written, &line) != nil || line.Level != map[int]string{42: "warning"}[code] && line.Level != "error") {
				t.Errorf("logged %s", written)
			}
			if code != c.code || !strings.Contains(line.Msg, c.says) || code == 42 && out != "" {
				t.Errorf("exit status %d, output %q, log %q; want %d, %q", code, out, line.Msg, c.code, c.says)
			}
		})
	}
}

func TestRuntimeSettings(t *testing.T) {
	agent := program(t, "imans-agent")
	for text, says := range map[string]string{
		`{`: "parse", `{"runtme":"runc"}`: "runtme", `{"on_failure":"explode"}`: "explode", `{"run_dir":"here"}`: "here", `{"default_vtpm":1}`: "default_vtpm", `{"wait_seconds":0}`: "wait_seconds",
	} {
		file := filepath.Join(t.TempDir(), "runtime.json")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, code := status(t, "/", agent, "runtime", "--settings", file, "--real", "true", "create", "c1"); code != exitLacks || !strings.Contains(out, says) {
			t.Errorf("%s: exit status %d, output %q", text, code, out)
		}
		if out, code := status(t, "/", agent, "runtime", "--settings", file, "--real", "true", "kill", "c1"); code != 0 {
			t.Errorf("%s: kill: exit status %d, output %q", text, code, out)
		}
	}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, real := range []string{own, "/nowhere/runc"} {
		if out, code := status(t, "/", agent, "runtime", "--real", real, "state", "c1"); code != exitLacks || !strings.Contains(out, "--real") {
			t.Errorf("%s: exit status %d, output %q", real, code, out)
		}
	}
}

func TestHook(t *testing.T) {
	g := &granted{}
	agent, dir, wrong := program(t, "imans-agent"), serveContainers(t, g), t.TempDir()
	if err := os.WriteFile(filepath.Join(wrong, "config.json"), []byte(`{"annotations":{"imans.dev/gate":"ajar"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args  []string
		state string
		code  int
	}{
		"poststop":          {[]string{"--run-dir", dir, "poststop"}, `{"id":"c1"}`, 0},
		"host's namespace":  {[]string{"--run-dir", dir, "--required", "createRuntime"}, `{"id":"c1","pid":` + itoa(os.Getpid()) + `}`, exitLacks},
		"no process":        {[]string{"--run-dir", dir, "--required", "createRuntime"}, `{"id":"c1"}`, exitLacks},
		"garbage":           {[]string{"--run-dir", dir, "createRuntime"}, `{`, 0},
		"garbage, required": {[]string{"--run-dir", dir, "--required", "createRuntime"}, `{`, exitLacks},
		"wrong annotation":  {[]string{"--run-dir", dir, "--ask", "createRuntime"}, `{"id":"c1","pid":1,"bundle":"` + wrong + `"}`, exitLacks},
		"agent down":        {[]string{"--run-dir", t.TempDir(), "createRuntime"}, `{"id":"c1","pid":1}`, 0},
		"no such stage":     {[]string{"prestart"}, `{}`, exitUsage},
	} {
		cmd := exec.Command(agent, append([]string{"runtime-hook"}, c.args...)...)
		cmd.Stdin = strings.NewReader(c.state)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != c.code {
			t.Errorf("%s: %v, want exit status %d; output %s", name, err, c.code, out)
		}
	}
	if told, _ := g.heard(); !slices.Equal(told, []string{"stopped c1", "removed c1"}) {
		t.Errorf("told %q", told)
	}
}
