package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/oci"
)

const (
	// attachTimeout bounds how long a container waits for its vTPM to be attached. Runtimes wait longer for a hook.
	attachTimeout = 30 * time.Second
	// stateMax bounds what a runtime may say.
	stateMax = 16 << 20
)

// newHook is what the specs that the wrapper edits have the runtime run. Without --required it never keeps a container from
// being created or deleted, but for one that asks for what makes no sense.
func newHook() *cobra.Command {
	var runDir string
	var required, ask bool
	cmd := &cobra.Command{
		Use:   "runtime-hook createRuntime|poststop",
		Short: "tell the agent what has become of a container; OCI runtimes run it as a hook",
		Long: `runtime-hook reads an OCI state from standard input, as runtimes give it to hooks. At createRuntime it tells the agent which
process is in the container's namespaces, and returns when the vTPM is attached to them; at poststop that the container is gone.
With --ask it first asks for the vTPM, which the container reaches by socket: nobody has asked before it was created.`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] != oci.CreateRuntime && args[0] != oci.Poststop {
				return usageError{fmt.Errorf("hook %q: want %s or %s", args[0], oci.CreateRuntime, oci.Poststop)}
			}
			err := tellState(cmd.Context(), client(runDir), args[0], cmd.InOrStdin(), ask, &required)
			var field *oci.FieldError
			if err != nil && !required && !errors.As(err, &field) {
				runtimeLog{}.warn(fmt.Sprintf("%s: %v", args[0], err))
				return nil
			}
			return err
		},
	}
	addRunDir(cmd, &runDir)
	cmd.Flags().BoolVar(&ask, "ask", false, "at createRuntime, ask for a vTPM by socket")
	cmd.Flags().BoolVar(&required, "required", false, "fail, and the container with it, if the agent can't be told")
	return cmd
}

// tellState passes a state on to the agent. It sets required if it reads in the spec that the container asks for that.
func tellState(ctx context.Context, c *control.Client, stage string, in io.Reader, ask bool, required *bool) error {
	text, err := io.ReadAll(io.LimitReader(in, stateMax))
	if err != nil {
		return fmt.Errorf("read the state on standard input: %w", err)
	}
	s, err := oci.ParseState(text)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	if stage == oci.CreateRuntime {
		if ask {
			if err := askBySocket(ctx, c, s, required); err != nil {
				return fmt.Errorf("container %s gets no vTPM: %w", s.ID, err)
			}
		}
		if err := c.ContainerCreated(ctx, s.ID, s.PID); err != nil {
			return fmt.Errorf("container %s has no vTPM attached: %w", s.ID, err)
		}
		return nil
	}
	var stopped, removed error
	if err := c.ContainerStopped(ctx, s.ID); err != nil {
		stopped = fmt.Errorf("say that container %s has stopped: %w", s.ID, err)
	}
	if err := c.ContainerRemoved(ctx, s.ID); err != nil { // whatever became of the first: nobody tells it again
		removed = fmt.Errorf("say that container %s is deleted: %w", s.ID, err)
	}
	return errors.Join(stopped, removed)
}

// askBySocket asks for a vTPM for a container whose spec can't be changed any more.
func askBySocket(ctx context.Context, c *control.Client, s oci.State, required *bool) error {
	spec, err := oci.Bundle{Dir: s.Bundle}.Read()
	if err != nil {
		return err
	}
	r, err := oci.ParseRequest(spec, s.ID, s.Bundle, true)
	if err != nil {
		return err
	}
	*required = *required || r.Required
	r.VTPM, r.VTPMs, r.Socket = true, nil, true
	_, err = c.PrepareContainer(ctx, r)
	return err
}
