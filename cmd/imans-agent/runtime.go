package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/oci"
)

// wrapperPrefix begins the names by which this program is a runtime: imans-runc stands for runc, imans-runtime for the default.
const wrapperPrefix = "imans-"

// defaultWait bounds in seconds how long the creation of a container waits for the agent, which may have to make a TPM, and many more
// for others that are created at once. It is less than kubelet's two minutes.
const defaultWait = 90

// removeTimeout bounds how long a deletion waits to tell the agent, which learns of the end without it, too.
const removeTimeout = 2 * time.Second

// commandLine returns the arguments of a command line. Called by the name of a runtime this program is imans-agent runtime.
func commandLine(argv []string) []string {
	name := filepath.Base(argv[0])
	real, ok := strings.CutPrefix(name, wrapperPrefix)
	switch {
	case !ok || real == "agent":
		return argv[1:]
	case real == "runtime":
		return slices.Concat([]string{"runtime", "--"}, argv[1:])
	}
	return slices.Concat([]string{"runtime", "--named", real, "--"}, argv[1:])
}

// isRuntime reports whether arguments are those of the wrapper, which becomes another program: signals are that one's.
func isRuntime(args []string) bool { return len(args) > 0 && args[0] == "runtime" }

func newRuntime() *cobra.Command {
	return &cobra.Command{
		Use:   "runtime [--real PROGRAM] [--run-dir DIR] [--settings FILE] [--] ARGS…",
		Short: "an OCI runtime that gives containers their vTPM and window, and is runc or crun for the rest",
		Long: `runtime is to be given to docker, podman or whatever starts containers, as their runtime. At create, run and restore it asks
the agent what the container is granted, adds that to the bundle's config.json, and then becomes the real runtime; all else is
the real runtime's from the start.

Called by the name imans-runc or imans-crun (a link to this program) it takes no options of its own and stands for runc or crun;
called imans-runtime, for the runtime of IMANS_RUNTIME or of the settings. /etc/imans/runtime.json has them:

  {"runtime": "runc", "run_dir": "/run/imans", "on_failure": "continue", "default_vtpm": true,
   "wait_seconds": 90}

wait_seconds is how long a container's creation waits for the agent. on_failure says what becomes of a container if the agent is down or
refuses: "continue" without, or "fail". The container's annotations come first: imans.dev/vtpm, imans.dev/policy, imans.dev/gate,
imans.dev/required.`,
		Example: `  imans-agent runtime --real crun run --bundle /srv/web web
  ln -s imans-agent /usr/local/bin/imans-runc && podman --runtime /usr/local/bin/imans-runc run alpine`,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && (args[0] == "--help" || args[0] == "-h") {
				return cmd.Help()
			}
			o, args, err := runtimeOptions(args)
			if err != nil {
				return err
			}
			return runRuntime(cmd.Context(), o, args)
		},
	}
}

// runtimeFlags are the wrapper's own options.
type runtimeFlags struct {
	real, named, runDir, settings string
}

// runtimeOptions takes the wrapper's own options off the front of a command line; what follows is the runtime's.
func runtimeOptions(args []string) (runtimeFlags, []string, error) {
	var f runtimeFlags
	flags := map[string]*string{"--real": &f.real, "--named": &f.named, "--run-dir": &f.runDir, "--settings": &f.settings}
	for len(args) > 0 {
		if args[0] == "--" {
			return f, args[1:], nil
		}
		name, value, has := strings.Cut(args[0], "=")
		to := flags[name]
		switch {
		case to == nil:
			return f, args, nil
		case has:
			*to, args = value, args[1:]
		case len(args) == 1:
			return f, nil, usageError{fmt.Errorf("%s has no value; see imans-agent runtime --help", name)}
		default:
			*to, args = args[1], args[2:]
		}
	}
	return f, args, nil
}

// runRuntime does what is ours to do and becomes the real runtime. It returns only if it can't, or if the container must not be
// created.
func runRuntime(ctx context.Context, f runtimeFlags, args []string) error {
	s, settingsErr := readSettings(f.settings)
	if f.runDir != "" {
		s.RunDir = f.runDir
	}
	inv, parseErr := oci.ParseArgs(args)
	log := runtimeLog{inv}
	env := os.Getenv("IMANS_RUNTIME")
	program, err := realRuntime(f, env, s)
	if err == nil && (mayCreate(args) || f.real+f.named+env == "") { // what exists can be stopped and deleted
		err = settingsErr
	}
	switch {
	case err != nil:
	case parseErr != nil && mayCreate(args):
		log.warn(fmt.Sprintf("the command line is not understood and handed on as it is, so a container gets no vTPM: %v", parseErr))
	case parseErr != nil:
	case inv.Command == "create" || inv.Command == "run" || inv.Command == "restore":
		err = prepareContainer(ctx, inv, s, log)
	case inv.Command == "delete" && inv.ID != "":
		told, cancel := context.WithTimeout(ctx, removeTimeout)
		client(s.RunDir).ContainerRemoved(told, inv.ID) // the agent may be down; it sees the end of a namespace itself
		cancel()
	}
	if err != nil {
		log.fail(err)
		return err
	}
	err = syscall.Exec(program, slices.Concat([]string{program}, args), os.Environ())
	return fmt.Errorf("run %s: %w", program, err)
}

// mayCreate reports whether a command line could be about a new container.
func mayCreate(args []string) bool {
	return slices.ContainsFunc(args, func(a string) bool { return a == "create" || a == "run" || a == "restore" })
}

// realRuntime finds the program to become.
func realRuntime(f runtimeFlags, env string, s runtimeSettings) (string, error) {
	name := "runc"
	for _, n := range []string{f.real, f.named, env, s.Runtime} {
		if n != "" {
			name = n
			break
		}
	}
	program, err := lookRuntime(name)
	if err != nil {
		return "", fmt.Errorf("find the real runtime: %w; install it, or name another with --real or in %s", err, defaultSettings)
	}
	own, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w; mount /proc", err)
	}
	if sameFile(own, program) {
		return "", fmt.Errorf("the real runtime %s is this program; name another with --real or in %s", program, defaultSettings)
	}
	return filepath.Abs(program)
}

// systemPath is where programs are looked for by those that podman starts without PATH.
const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// lookRuntime finds a program by its name, also for callers without PATH.
func lookRuntime(name string) (string, error) {
	program, err := exec.LookPath(name)
	if err == nil || os.Getenv("PATH") != "" || strings.ContainsRune(name, filepath.Separator) {
		return program, err
	}
	for _, dir := range filepath.SplitList(systemPath) {
		if program, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return program, nil
		}
	}
	return "", err
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// prepareContainer adds to a bundle's spec what the agent grants. An error means that the container must not be created; what
// else went wrong is logged, and the container gets nothing.
func prepareContainer(ctx context.Context, inv oci.Invocation, s runtimeSettings, log runtimeLog) error {
	required := s.OnFailure == onFailureFail
	err := grantContainer(ctx, inv, s, &required)
	var field *oci.FieldError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &field):
		return fmt.Errorf("container %s: %w", inv.ID, err)
	case required:
		return fmt.Errorf("container %s is not created without what it asks for: %w", inv.ID, err)
	}
	log.warn(fmt.Sprintf("container %s goes on without a vTPM: %v", inv.ID, err))
	return nil
}

// grantContainer sets required as soon as the spec says so.
func grantContainer(ctx context.Context, inv oci.Invocation, s runtimeSettings, required *bool) error {
	dir, err := filepath.Abs(inv.Bundle.Dir)
	if err != nil {
		return fmt.Errorf("find the bundle: %w", err)
	}
	inv.Bundle.Dir = dir
	spec, err := inv.Bundle.Read()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the runtime says it better
	} else if err != nil {
		return err
	}
	ask, err := oci.ParseRequest(spec, inv.ID, dir, s.DefaultVTPM)
	if err != nil {
		return err
	}
	*required = *required || ask.Required
	var grant oci.Grant
	var refused error
	if ask.Wants() {
		if grant, refused = askGrant(ctx, ask, s); refused != nil && *required {
			return refused
		}
	}
	edited, err := oci.Edit(spec, grant)
	if err == nil {
		err = inv.Bundle.Write(spec, edited)
	}
	return errors.Join(refused, err)
}

// askGrant asks the agent, and adds the hooks by which it learns of the container's life.
func askGrant(ctx context.Context, ask oci.Request, s runtimeSettings) (oci.Grant, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.WaitSeconds)*time.Second)
	defer cancel()
	grant, err := client(s.RunDir).PrepareContainer(ctx, ask)
	if err != nil {
		return oci.Grant{}, err
	}
	own, err := os.Executable()
	if err != nil {
		return oci.Grant{}, fmt.Errorf("find this program: %w; mount /proc", err)
	}
	hooks := oci.AgentHooks(own, s.RunDir, ask.Required || s.OnFailure == onFailureFail)
	grant.Hooks.CreateRuntime = append(grant.Hooks.CreateRuntime, hooks.CreateRuntime...)
	grant.Hooks.Poststop = append(grant.Hooks.Poststop, hooks.Poststop...)
	return grant, nil
}
