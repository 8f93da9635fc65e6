package oci

import (
	"encoding/json"
	"slices"
)

// CDIKind and CDIDevice name, with = between them, the device of the Container Device Interface.
const (
	CDIKind   = "imans.dev/vtpm"
	CDIDevice = "auto"
	// cdiVersion is the oldest that has all that CDI uses.
	cdiVersion = "0.5.0"
)

// CDI returns a specification, JSON, of the device imans.dev/vtpm=auto: the grant's mounts and environment, and hooks that ask the agent at
// runDir for a vTPM by socket when the container's namespaces are there. A specification is written before there is any container, so
// it can't name the device nodes of a vTPM that is made for one. program is this program. Source: cncf-tags/container-device-interface,
// SPEC.md.
func CDI(program, runDir string, g Grant) ([]byte, error) {
	type hook struct {
		HookName string   `json:"hookName"`
		Path     string   `json:"path"`
		Args     []string `json:"args"`
		Timeout  int      `json:"timeout"`
	}
	type mount struct {
		HostPath      string   `json:"hostPath"`
		ContainerPath string   `json:"containerPath"`
		Type          string   `json:"type"`
		Options       []string `json:"options"`
	}
	type edits struct {
		Env    []string `json:"env,omitempty"`
		Hooks  []hook   `json:"hooks"`
		Mounts []mount  `json:"mounts,omitempty"`
	}
	type device struct {
		Name           string `json:"name"`
		ContainerEdits edits  `json:"containerEdits"`
	}
	e := edits{Env: g.Env}
	hooks := AgentHooks(program, runDir, false)
	for _, h := range hooks.CreateRuntime {
		e.Hooks = append(e.Hooks, hook{CreateRuntime, h.Path, slices.Insert(slices.Clone(h.Args), 2, "--ask"), h.Timeout})
	}
	for _, h := range hooks.Poststop {
		e.Hooks = append(e.Hooks, hook{Poststop, h.Path, h.Args, h.Timeout})
	}
	for _, m := range g.Mounts {
		e.Mounts = append(e.Mounts, mount{m.Source, m.Destination, "bind", WindowOptions()})
	}
	return json.MarshalIndent(struct {
		Version string   `json:"cdiVersion"`
		Kind    string   `json:"kind"`
		Devices []device `json:"devices"`
	}{cdiVersion, CDIKind, []device{{CDIDevice, e}}}, "", "  ")
}
