package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// newNSWindow is ns window: it puts the window into a running container, or takes it away.
func newNSWindow(runDir *string, asJSON *bool) *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use:   "window ID",
		Short: "put a namespace's own IMA folder over /sys/kernel/security in it",
		Long: `window mounts the namespace's own IMA folder over /sys/kernel/security in a running container, where tools expect it.
The container need not do anything. If it is there already, nothing changes.`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client(*runDir)
			ask, verb := c.AttachWindow, "is at"
			if detach {
				ask, verb = c.DetachWindow, "is no longer at"
			}
			w, err := ask(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if *asJSON {
				return printJSON(cmd, w)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "the window of %s %s %s, as process %d sees it\n", w.Namespace, verb, w.Path, w.PID)
			return err
		},
	}
	cmd.Flags().BoolVar(&detach, "detach", false, "take it away again")
	return cmd
}
