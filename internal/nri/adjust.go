package nri

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"

	"imans.dev/imans-agent/internal/oci"
)

// adjust turns a grant into the runtime's words. The runtime replaces devices and mounts of the same path, permits each device in
// the device cgroup, and sorts mounts so that the window comes behind sysfs. As oci.Edit it leaves variables that are set alone,
// and binds the host's node where a container can't have one of its own.
func adjust(ctr *api.Container, g oci.Grant) (*api.ContainerAdjustment, error) {
	a := &api.ContainerAdjustment{}
	bind := hasUserNamespace(ctr)
	for _, d := range g.Devices {
		place := path.Clean(d.Path)
		if !bind {
			if slices.ContainsFunc(ctr.GetMounts(), func(m *api.Mount) bool { return path.Clean(m.GetDestination()) == place }) {
				a.RemoveMount(place)
			}
			a.AddDevice(device(d, place))
			continue
		}
		if d.HostPath == "" {
			return nil, fmt.Errorf("granted device %s has no path on the host: a container with a user namespace needs it", d.Path)
		}
		if slices.ContainsFunc(ctr.GetLinux().GetDevices(), func(n *api.LinuxDevice) bool { return path.Clean(n.GetPath()) == place }) {
			a.RemoveDevice(place)
		}
		// Only a device permits itself, and in a user namespace it is the host's node of the same path: so it is there under that
		// name, too.
		a.AddDevice(device(d, d.HostPath))
		a.AddMount(&api.Mount{Source: d.HostPath, Destination: place, Type: "bind", Options: []string{"bind"}})
	}
	for _, m := range g.Mounts {
		options := m.Options
		if len(options) == 0 {
			options = oci.WindowOptions()
		}
		a.AddMount(&api.Mount{Source: m.Source, Destination: path.Clean(m.Destination), Type: "bind", Options: options})
	}
	for _, v := range g.Env {
		name, value, _ := strings.Cut(v, "=")
		if !slices.ContainsFunc(ctr.GetEnv(), func(set string) bool { return strings.HasPrefix(set, name+"=") }) {
			a.AddEnv(name, value)
		}
	}
	if len(g.Hooks.CreateRuntime)+len(g.Hooks.Poststop) > 0 {
		a.AddHooks(&api.Hooks{CreateRuntime: hooks(g.Hooks.CreateRuntime), Poststop: hooks(g.Hooks.Poststop)})
	}
	return a, nil
}

func device(d oci.Device, place string) *api.LinuxDevice {
	out := &api.LinuxDevice{
		Path: place, Type: d.Type, Major: int64(d.Major), Minor: int64(d.Minor), Uid: api.UInt32(d.UID), Gid: api.UInt32(d.GID),
	}
	if d.FileMode != 0 {
		out.FileMode = api.FileMode(fs.FileMode(d.FileMode))
	}
	return out
}

func hooks(list []oci.Hook) []*api.Hook {
	var out []*api.Hook
	for _, h := range list {
		hook := &api.Hook{Path: h.Path, Args: h.Args}
		if h.Timeout > 0 {
			hook.Timeout = api.Int(h.Timeout)
		}
		out = append(out, hook)
	}
	return out
}
