package agent

import (
	"path/filepath"
	"strings"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/nri"
)

// NoNRI is the socket of an agent that is no plugin of a container runtime.
const NoNRI = "off"

// NRI is what the command line says of Kubernetes' containers.
type NRI struct {
	Socket     string   // of the container runtime, absolute, or NoNRI
	Namespaces []string // pod namespaces whose containers get a vTPM without asking
	Labels     []string // NAME=VALUE; so do those of pods that have one of these
	Required   bool     // containers that are to get a vTPM fail without it
}

// check refuses options that make no sense, with swtpm as the namespaces' TPMs or without.
func (n NRI) check(swtpm bool) error {
	if n.Socket == NoNRI {
		for name, given := range map[string]bool{
			"--nri-namespace": len(n.Namespaces) > 0, "--nri-label": len(n.Labels) > 0, "--nri-required": n.Required,
		} {
			if given {
				return usage("%s: without --nri no container is asked about; add --nri SOCKET, such as --nri %s", name, nri.DefaultSocket)
			}
		}
		return nil
	}
	if !filepath.IsAbs(n.Socket) {
		return usage("--nri %q: want the absolute path of the runtime's socket, such as %s, or %s", n.Socket, nri.DefaultSocket, NoNRI)
	}
	if !swtpm {
		return usage("--nri %s: with --ns-tpm none there are no vTPMs to give; use --ns-tpm swtpm", n.Socket)
	}
	for _, name := range n.Namespaces {
		if name == "" || strings.ContainsAny(name, "/,= \t\n") {
			return usage("--nri-namespace %q: want the name of one namespace of pods; the option may be given several times", name)
		}
	}
	for _, label := range n.Labels {
		if name, _, ok := strings.Cut(label, "="); !ok || name == "" || strings.ContainsAny(label, ", \t\n") {
			return usage("--nri-label %q: want NAME=VALUE; the option may be given several times", label)
		}
	}
	return nil
}

// plugin is the plugin's configuration for an agent that gives containers what they ask for.
func (n NRI) plugin(given *containers, log *zap.Logger) nri.Config {
	return nri.Config{
		Containers: given.granted, There: given.granted.There, Socket: n.Socket, Namespaces: n.Namespaces, Labels: n.Labels, Required: n.Required,
		Log: log.Named("nri"),
	}
}
