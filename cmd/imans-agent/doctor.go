package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/feature"
)

// finding is what doctor says of one feature.
type finding struct {
	Feature  string `json:"feature"`
	Purpose  string `json:"purpose"`
	OK       bool   `json:"ok"`
	Required bool   `json:"required"`
	Found    string `json:"found,omitempty"`
	Problem  string `json:"problem,omitempty"`
	Without  string `json:"without,omitempty"`
}

func newDoctor() *cobra.Command {
	var c feature.Config
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "say what this machine has and lacks, each with the fix",
		Long: `doctor looks for everything the agent needs or can use. It changes nothing.
Exit status 3 means that something required is missing.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var findings []finding
			lacking := 0
			for _, p := range feature.Probes(c) {
				f := finding{Feature: p.Name, Purpose: p.Purpose, Required: p.Required()}
				found, err := p.Run()
				if f.OK = err == nil; f.OK {
					f.Found = found
				} else {
					f.Problem, f.Without = err.Error(), p.Without
					if f.Required {
						lacking++
					}
				}
				findings = append(findings, f)
			}
			if err := printFindings(cmd, findings, asJSON); err != nil {
				return err
			}
			if lacking > 0 {
				return fmt.Errorf("%d required feature(s) missing: %w", lacking, errors.New("see the fixes above"))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&c.TPM, "tpm", defaultTPM, "TPM of the native list, as the agent gets it: a device, swtpm or none")
	cmd.Flags().StringVar(&c.PinDir, "pin-dir", defaultPinDir, "folder on a bpffs")
	cmd.Flags().StringVar(&c.Swtpm, "swtpm", "swtpm", "the swtpm program")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printFindings(cmd *cobra.Command, findings []finding, asJSON bool) error {
	if asJSON {
		return printJSON(cmd, findings)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	for _, f := range findings {
		switch {
		case f.OK:
			fmt.Fprintf(w, "ok\t%s\t%s\n", f.Feature, f.Found)
		case f.Required:
			fmt.Fprintf(w, "MISSING\t%s\t%s\n", f.Feature, f.Problem)
		default:
			fmt.Fprintf(w, "absent\t%s\t%s (without it: %s)\n", f.Feature, f.Problem, f.Without)
		}
	}
	return w.Flush()
}

func printJSON(cmd *cobra.Command, v any) error {
	e := json.NewEncoder(cmd.OutOrStdout())
	e.SetIndent("", "  ")
	return e.Encode(v)
}
