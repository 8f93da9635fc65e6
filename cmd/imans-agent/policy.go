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
		Short: "check, show and load policies",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError{fmt.Errorf("policy check FILE, policy show ID, or policy load FILE; see --help")}
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
	var ns string
	load := &cobra.Command{
		Use: "load FILE --ns ID", Short: "append a file's rules to a namespace's, all of them or none",
		Long: `load appends a file's rules to those of a namespace, from outside. They judge the next event. Ids in them are the host's.
One bad rule, or one more than the namespace may have, and nothing is loaded.`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := agent.LoadPolicy(args[0])
			if err != nil {
				return err
			}
			n, err := client(runDir).LoadPolicy(cmd.Context(), ns, []byte(p.String()))
			if err != nil {
				return fmt.Errorf("load %s into %s: %w", args[0], ns, err)
			}
			if asJSON {
				return printJSON(cmd, n)
			}
			return printNamespace(cmd, n)
		},
	}
	load.Flags().StringVar(&ns, "ns", "", "the namespace")
	load.MarkFlagRequired("ns")
	load.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.AddCommand(check, show, load)
	return cmd
}
