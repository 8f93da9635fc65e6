package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/control"
)

// addRunDir adds the flag that says where the agent's socket is.
func addRunDir(cmd *cobra.Command, dir *string) {
	cmd.PersistentFlags().StringVar(dir, "run-dir", defaultRunDir, "folder with the agent's socket")
}

func client(runDir string) *control.Client {
	return control.NewClient(filepath.Join(runDir, control.SocketName))
}

func newNS() *cobra.Command {
	var runDir string
	var asJSON bool
	list := func(cmd *cobra.Command, _ []string) error {
		namespaces, err := client(runDir).Namespaces(cmd.Context())
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(cmd, namespaces)
		}
		return printTree(cmd, namespaces)
	}
	cmd := &cobra.Command{
		Use:   "ns",
		Short: "show the mount namespaces and their lists, and put windows into them",
		Long:  "ns shows the tree of mount namespaces. A namespace is named by its inode number, as lsns prints it, or INUM:ID where it must be exact.",
		Args:  exactly(0),
		RunE:  list,
	}
	cmd.PersistentFlags().BoolVar(&asJSON, "json", false, "print JSON")
	addRunDir(cmd, &runDir)
	cmd.AddCommand(
		newNSWindow(&runDir, &asJSON), newNSGate(&runDir, &asJSON),
		&cobra.Command{Use: "list", Short: "all namespaces, parents first", Args: exactly(0), RunE: list},
		&cobra.Command{
			Use: "activate ID", Short: "make one an IMA namespace of its own, with an empty policy", Args: exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				n, err := client(runDir).Activate(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd, n)
				}
				return printNamespace(cmd, n)
			},
		},
		&cobra.Command{
			Use: "show ID", Short: "one namespace", Args: exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				n, err := client(runDir).Namespace(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd, n)
				}
				return printNamespace(cmd, n)
			},
		})
	return cmd
}

func printTree(cmd *cobra.Command, namespaces []control.Namespace) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAMESPACE\tCONTAINER\tENTRIES\tVIOLATIONS\tEXTENDED\tPCR\tTPM\tSTATE")
	for _, n := range namespaces {
		fmt.Fprintf(w, "%s%s\t%s\t%d\t%d\t%d\t%d\t%s\t%s\n", strings.Repeat("  ", n.Depth), n.Name(), orDash(n.Container),
			n.Entries, n.Violations, n.Extended, n.PCR, tpmWord(n), n.State)
	}
	return w.Flush()
}

// tpmWord is a namespace's TPM in a word.
func tpmWord(n control.Namespace) string {
	switch {
	case n.Depth == 0 && n.Trust == control.Hardware:
		return "native"
	case n.Depth == 0:
		return string(n.Trust)
	case n.TPM != "":
		return "swtpm"
	}
	return "-"
}

// trustLine says what stands behind a namespace's PCR.
func trustLine(n control.Namespace) string {
	switch n.Trust {
	case control.Hardware:
		return "hardware: the machine's own TPM"
	case control.Software:
		return "software: a TPM that is a program is as honest as the host that runs it"
	case control.Nothing:
		return "none: no TPM proves this list"
	}
	return "-"
}

func printNamespace(cmd *cobra.Command, n control.Namespace) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	for _, row := range [][2]any{
		{"namespace", n.Name()}, {"parent", orDash(n.Parent)}, {"depth", n.Depth}, {"origin", n.Origin}, {"born", n.Born},
		{"container", orDash(n.Container)}, {"first process", n.PID}, {"entered from outside", n.Entered}, {"entries", n.Entries},
		{"violations", n.Violations}, {"extended", n.Extended}, {"pcr", n.PCR}, {"tpm", orDash(n.TPM)}, {"trust", trustLine(n)},
		{"rules", n.Rules}, {"gate", orDash(n.Gate)}, {"state", n.State}, {"trouble", orDash(n.Trouble)},
	} {
		fmt.Fprintf(w, "%s\t%v\n", row[0], row[1])
	}
	return w.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
