package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// newVTPM is vtpm: it gives running containers a vTPM, or takes it away.
func newVTPM() *cobra.Command {
	var runDir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "vtpm",
		Short: "give a running container a vTPM, or take its vTPM away",
		Long: `A container that is created by imans-agent runtime, or through NRI, has its vTPM from its first program on. vtpm attach is for
one that is running already.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().BoolVar(&asJSON, "json", false, "print JSON")
	addRunDir(cmd, &runDir)
	cmd.AddCommand(
		&cobra.Command{
			Use:   "attach ID",
			Short: "give the list of a running namespace a vTPM, and its programs the use of it",
			Long: `attach gives the list of a running mount namespace, named as imans-agent ns has it, a vTPM: what is in the list already is extended
into it, in order. The programs of the container's network namespace reach it on 127.0.0.1, port 2321, by the variables that are printed;
tpm2-tools find it there by themselves. A container on the host's network can't have one this way. It ends with the namespace.`,
			Args: exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				grant, err := client(runDir).AttachVTPM(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd, grant)
				}
				for _, v := range grant.Env {
					if _, err := fmt.Fprintf(cmd.OutOrStdout(), "export %s\n", v); err != nil {
						return err
					}
				}
				return nil
			},
		},
		&cobra.Command{
			Use:   "release ID",
			Short: "take away and end the vTPM that a namespace's list was given",
			Long: `release ends the vTPM of a running container, however it came by it. The namespace's list goes on without one, for good, and says so; the
native list has the vTPM's last values.`,
			Args: exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return client(runDir).ReleaseVTPM(cmd.Context(), args[0])
			},
		})
	return cmd
}
