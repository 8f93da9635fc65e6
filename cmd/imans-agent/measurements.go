package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

func newMeasurements() *cobra.Command {
	var runDir, format, bank string
	var follow, asJSON bool
	cmd := &cobra.Command{
		Use:   "measurements ID",
		Short: "print a namespace's measurement list",
		Long: `measurements prints the list of a namespace, named by its inode number, INUM:ID, or "native".
What ran before the call is in it. The binary format is the kernel's binary_runtime_measurements.`,
		Example: `  imans-agent measurements native
  imans-agent measurements 4026532281 --format binary >list && imans-agent verify list
  imans-agent measurements 4026532281 --follow`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if asJSON {
				format = "json"
			}
			if format != "ascii" && format != "binary" && format != "json" {
				return usageError{fmt.Errorf("--format %s: want ascii, binary or json", format)}
			}
			body, err := client(runDir).Measurements(cmd.Context(), args[0], format, bank, follow)
			if err != nil {
				return err
			}
			defer body.Close()
			if _, err = io.Copy(cmd.OutOrStdout(), body); err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("read the list: %w", err)
			}
			return nil
		},
	}
	addRunDir(cmd, &runDir)
	cmd.Flags().StringVar(&format, "format", "ascii", "ascii, binary or json")
	cmd.Flags().StringVar(&bank, "bank", "sha1", "bank of the template digests: sha1 (the classic list), sha256, sha384 or sha512")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with entries as they come")
	cmd.Flags().BoolVar(&asJSON, "json", false, "the same as --format json")
	return cmd
}
