// Package oci edits the specification of a container that a runtime is about to create, so that the container gets what the
// agent grants it: the device nodes of its own vTPM, its window, environment variables and hooks.
//
// The order is: Bundle.Read, ParseRequest, whoever answers requests makes a Grant, Edit, Bundle.Write; then the runtime runs.
// ParseArgs says what a command line of a runtime is about, and ParseState what a runtime tells a hook.
//
// # What is promised
//
// A spec comes out of Edit with everything in it that the grant does not concern: unknown fields, the members' order and numbers
// are as they were. An edit is never edited again: Bundle keeps the spec that was there first, and a container that is created
// anew from the same bundle begins with that. All that a Request says is claimed by whoever wrote the spec, who is whoever may
// start containers; no list vouches for it.
//
// Nothing here asks the kernel or the agent. Source: the OCI runtime specification 1.2, config.md, config-linux.md and runtime.md.
package oci

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Containers is who grants containers what they need and follows their lives: the agent. A container of an id that it does not
// know is no error in Stopped and Removed. All may be called for different containers at the same time.
type Containers interface {
	// Prepare makes what a container asks for, before it is created. Asked again for the same id before Created, it grants the
	// same. A grant whose container never comes is taken back in the end.
	Prepare(ctx context.Context, r Request) (Grant, error)
	// Created says which process is in the container's namespaces, before the container's first program runs.
	Created(ctx context.Context, id string, pid int) error
	// Stopped says that the container's processes have ended.
	Stopped(ctx context.Context, id string) error
	// Removed says that the runtime deletes the container. What was kept for it goes once its namespace has ended, and, where
	// Request.Homes has folders, when the last of them is gone: docker and podman delete at each stop, and create anew.
	Removed(ctx context.Context, id string) error
}

// Grant is what a container is given. The zero Grant is nothing.
type Grant struct {
	Devices []Device `json:"devices,omitempty"`
	Mounts  []Mount  `json:"mounts,omitempty"`
	Env     []string `json:"env,omitempty"` // NAME=VALUE; a variable that the spec sets is left alone
	Hooks   Hooks    `json:"hooks,omitzero"`
}

// Device is a device node for a container.
type Device struct {
	Path     string `json:"path"`      // in the container
	HostPath string `json:"host_path"` // of the same device on the host: bound where the container can't have a node of its own
	Type     string `json:"type"`      // c or b
	Major    uint32 `json:"major"`
	Minor    uint32 `json:"minor"`
	FileMode uint32 `json:"mode,omitempty"` // permission bits; 0: the runtime's choice
	UID      uint32 `json:"uid,omitempty"`  // as the container numbers them
	GID      uint32 `json:"gid,omitempty"`
}

// Mount is a bind mount for a container.
type Mount struct {
	Source      string   `json:"source"`
	Destination string   `json:"destination"`
	Options     []string `json:"options,omitempty"` // none: WindowOptions
}

// WindowOptions returns what the mount of a window is: nothing in it is a program or a device, and no mount passes it.
func WindowOptions() []string { return []string{"bind", "nosuid", "noexec", "nodev", "private"} }

// Hooks are programs that the runtime runs as the host's root.
type Hooks struct {
	CreateRuntime []Hook `json:"create_runtime,omitempty"` // the namespaces are made; the container's first program does not run yet
	Poststop      []Hook `json:"poststop,omitempty"`       // the runtime has deleted the container
}

// Hook is one program.
type Hook struct {
	Path    string   `json:"path"`
	Args    []string `json:"args,omitempty"` // the first is the program's name
	Timeout int      `json:"timeout,omitempty"`
}

// empty reports whether nothing is granted.
func (g Grant) empty() bool {
	return len(g.Devices) == 0 && len(g.Mounts) == 0 && len(g.Env) == 0 && len(g.Hooks.CreateRuntime) == 0 && len(g.Hooks.Poststop) == 0
}

// check refuses what no runtime could make sense of.
func (g Grant) check() error {
	for _, d := range g.Devices {
		if !absolute(d.Path) || d.Type != "c" && d.Type != "b" {
			return fmt.Errorf("granted device %q of type %q: want an absolute path and type c or b", d.Path, d.Type)
		}
	}
	for _, m := range g.Mounts {
		if !absolute(m.Source) || !absolute(m.Destination) {
			return fmt.Errorf("granted mount of %q at %q: want absolute paths", m.Source, m.Destination)
		}
	}
	for _, v := range g.Env {
		if i := strings.IndexByte(v, '='); i < 1 || strings.ContainsRune(v, 0) {
			return fmt.Errorf("granted variable %q: want NAME=VALUE", v)
		}
	}
	for _, h := range slices.Concat(g.Hooks.CreateRuntime, g.Hooks.Poststop) {
		if !absolute(h.Path) {
			return fmt.Errorf("granted hook %q: want an absolute path", h.Path)
		}
	}
	return nil
}

func absolute(path string) bool {
	return strings.HasPrefix(path, "/") && !strings.ContainsRune(path, 0)
}
