package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/agent"
)

func newUnload() *cobra.Command {
	var c agent.Config
	cmd := &cobra.Command{
		Use:   "unload",
		Short: "take the kernel side out and end the vTPMs of this boot",
		Long: `unload opens the gates that a stopped agent left closed, detaches the programs that it left at work, and ends its vTPMs, whose PCRs are then gone: those of
namespaces, all those of containers, running or not, and that of the native list if it has one in software. A list that has lost
its TPM so proves nothing any more; the native list of --tpm swtpm has to be moved away before the next start of the same boot.
The lists stay on disk. It refuses while an agent runs.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := agent.Unload(c); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "unloaded")
			return nil
		},
	}
	cmd.Flags().StringVar(&c.StateDir, "state-dir", defaultStateDir, "folder for lists and vTPM state")
	cmd.Flags().StringVar(&c.RunDir, "run-dir", defaultRunDir, "folder for sockets")
	cmd.Flags().StringVar(&c.PinDir, "pin-dir", defaultPinDir, "folder with the kernel side's pins")
	return cmd
}
