package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/agent"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/reach"
)

// newCDI is cdi: it prints a specification for runtimes that know the Container Device Interface.
func newCDI() *cobra.Command {
	var runDir string
	cmd := &cobra.Command{
		Use:   "cdi",
		Short: "print a CDI specification, by which --device imans.dev/vtpm=auto gives a container a vTPM",
		Long: `cdi prints a specification of the Container Device Interface. With it podman, docker, containerd and CRI-O give a container that asks
for the device imans.dev/vtpm=auto a vTPM, which its programs reach by socket in the container's own network namespace, and its IMA
folder at /sys/kernel/security. No other runtime is needed.`,
		Example: `  mkdir -p /etc/cdi && imans-agent cdi >/etc/cdi/imans.json
  podman run --device imans.dev/vtpm=auto alpine`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			own, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w; mount /proc", err)
			}
			spec, err := oci.CDI(own, runDir, oci.Grant{
				Env:    reach.Environment(),
				Mounts: []oci.Mount{{Source: filepath.Join(runDir, agent.WindowName), Destination: "/sys/kernel/security"}},
			})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", spec)
			return err
		},
	}
	addRunDir(cmd, &runDir)
	return cmd
}
