// Command imans-agent gives every mount namespace its own IMA on a stock kernel: a policy, a measurement list, a vTPM.
//
//	imans-agent --policy FILE            run the agent
//	imans-agent doctor                   what this machine has and lacks
//	imans-agent ns [list | show ID]      the namespaces
//	imans-agent ns window ID             put a namespace's IMA folder over /sys/kernel/security in it
//	imans-agent measurements ID          a list
//	imans-agent policy check|show|load   policies
//	imans-agent verify FILE              replay a list and compare it with a PCR
//	imans-agent vtpm attach|release ID   give a running container a vTPM, or take it away
//	imans-agent runtime ARGS             be an OCI runtime that gives containers their vTPM
//	imans-agent runtime-hook STAGE       what that runtime's hooks run
//	imans-agent cdi                      print a CDI specification
//	imans-agent unload                   take the kernel side out and end the vTPMs
//
// Exit status: 0 done; 1 the thing checked is bad; 2 usage; 3 the machine or the agent's surroundings lack something.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/agent"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/policy"
)

// version is set when a release is linked.
var version = "dev"

// Exit statuses.
const (
	exitBad   = 1
	exitUsage = 2
	exitLacks = 3
)

// The first thread is the main goroutine's alone. What becomes another program does so there: the other threads do not have the signal of the
// parent's death. And a goroutine that has its thread be in a namespace, or a user, for good does not come to have this one, which Go does not end
// with it: what the kernel shows of a process is what its first thread is.
func init() { runtime.LockOSThread() }

func main() {
	args := commandLine(os.Args)
	ctx := context.Background()
	if !isRuntime(args) {
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		defer stop()
	}
	os.Exit(run(ctx, args, os.Stdout, os.Stderr))
}

// errBad is an answer, not a failure: the thing checked is bad, and what is wrong has been said.
var errBad = errors.New("bad")

// usageError is a mistake in the command line.
type usageError struct{ error }

// run executes the command line and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if errors.Is(err, errBad) {
		return exitBad
	}
	fmt.Fprintf(stderr, "imans-agent: %v\n", err)
	var usage usageError
	var option *agent.UsageError
	var syntax *policy.SyntaxError
	switch {
	case errors.As(err, &usage), errors.As(err, &option), errors.As(err, &syntax):
		return exitUsage
	case errors.Is(err, measure.ErrDiverged), errors.Is(err, measure.ErrAltered):
		return exitBad
	}
	return exitLacks
}

func newRoot() *cobra.Command {
	root := newAgent()
	root.Version = version
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, c.CommandPath())}
	})
	root.AddCommand(newDoctor(), newNS(), newMeasurements(), newPolicy(), newVerify(), newUnload(), newGuard(), newRuntime(), newHook(), newVTPM(), newCDI())
	return root
}

// exactly checks the number of arguments, as a usage error.
func exactly(n int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return usageError{fmt.Errorf("%s takes %d argument(s), got %d; see --help", c.CommandPath(), n, len(args))}
		}
		return nil
	}
}
