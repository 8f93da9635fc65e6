package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/agent"
)

func newPolicy() *cobra.Command {
	var runDir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "check and show policies",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError{fmt.Errorf("policy check FILE, or policy show ID; see --help")}
		},
	}
	addRunDir(cmd, &runDir)
	check := &cobra.Command{
		Use: "check FILE", Short: "say whether the agent would take a policy, and print it as the kernel would", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := agent.LoadPolicy(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, map[string]any{"policy": args[0], "rules": len(p.Rules()), "text": p.String()})
			}
			fmt.Fprint(cmd.OutOrStdout(), p.String())
			return nil
		},
	}
	check.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	show := &cobra.Command{
		Use: "show ID", Short: "print a namespace's rules", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			body, err := client(runDir).Policy(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer body.Close()
			_, err = io.Copy(cmd.OutOrStdout(), body)
			return err
		},
	}
	cmd.AddCommand(check, show)
	return cmd
}
