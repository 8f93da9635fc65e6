package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/agent"
	"imans.dev/imans-agent/internal/gate"
)

// guardSocket is the descriptor by which the agent speaks to the guard that it started.
const guardSocket = 3

// newGuard is the process that opens the gates when the agent hangs.
func newGuard() *cobra.Command {
	return &cobra.Command{
		Use: agent.GuardCommand + " AGENT MILLISECONDS", Hidden: true, Args: exactly(2),
		Short: "take the questions of gates, and answer them when the agent does not; the agent runs it",
		RunE: func(_ *cobra.Command, args []string) error {
			pid, err := strconv.Atoi(args[0])
			if err != nil || pid <= 0 {
				return usageError{fmt.Errorf("%q: want a process number", args[0])}
			}
			ms, err := strconv.Atoi(args[1])
			if err != nil || ms <= 0 {
				return usageError{fmt.Errorf("%q: want milliseconds", args[1])}
			}
			return gate.Guard(guardSocket, pid, time.Duration(ms)*time.Millisecond)
		},
	}
}

func newNSGate(runDir *string, asJSON *bool) *cobra.Command {
	return &cobra.Command{
		Use: "gate ID off|exec|all|exec-closed|all-closed", Short: "say what waits in one until it is measured and extended", Args: exactly(2),
		Long: `gate has programs (exec), or each file that may be mapped executable (all), wait in a namespace and those below it until their entries
are in the logs and the TPMs of all lists that want them. Closed, what is not measured in time may not be used, and nothing may that needs an
answer while the agent is down.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := client(*runDir).SetGate(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			if *asJSON {
				return printJSON(cmd, n)
			}
			return printNamespace(cmd, n)
		},
	}
}
