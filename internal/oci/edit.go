package oci

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Edit returns a spec with what is granted added, and without linux.resources.vtpms, which is ours to read and unknown to runtimes.
//
// Devices replace those of the same path, and so does what a mount put there: nothing of the host's is left in their place. A
// rule that allows each stands behind all others, the one that denies everything included. Mounts come last, so that sysfs or
// whatever is mounted above their place is there; their place is not masked. Variables that the spec sets stay. Hooks come behind
// those that are there.
//
// In a user namespace nobody can make device nodes, and runtimes bind the host's node of the same path instead: the machine's
// own TPM. So there the device's node on the host is bound under the container's path.
//
// It returns a FieldError, or what encoding/json says of a text that is no JSON. A container with the host's whole /dev bound
// over its own is refused: a device put there would appear on the host.
func Edit(spec []byte, g Grant) ([]byte, error) {
	if err := g.check(); err != nil {
		return nil, err
	}
	root, err := parseSpec(spec)
	if err != nil {
		return nil, err
	}
	view, err := look(root)
	if err != nil {
		return nil, err
	}
	if g.empty() && len(view.Linux.Resources.VTPMs) == 0 {
		return spec, nil
	}
	if len(g.Devices) > 0 && slices.ContainsFunc(view.Mounts, bindsDev) {
		return nil, &FieldError{Field: "mounts", Reason: "the host's /dev is bound over the container's, so it can't have a TPM of its own;" +
			` leave that mount out, or ask for none: annotation ` + AnnotationVTPM + `="false"`}
	}
	bind := view.userNamespace()
	if bind {
		for _, d := range g.Devices {
			if !absolute(d.HostPath) {
				return nil, fmt.Errorf("granted device %s: host path is %q: a container with a user namespace needs it", d.Path, d.HostPath)
			}
		}
	}
	for _, edit := range []func() error{
		func() error { return editResources(root, g.Devices) },
		func() error { return editDevices(root, g.Devices, bind) },
		func() error { return editMounts(root, g, bind) },
		func() error { return unmask(root, g.Mounts) },
		func() error { return editEnv(root, g.Env) },
		func() error { return editHooks(root, g.Hooks) },
	} {
		if err := edit(); err != nil {
			return nil, err
		}
	}
	return root.encode(), nil
}

func parseSpec(spec []byte) (*object, error) {
	root, err := parseObject(spec)
	if err != nil {
		return nil, fmt.Errorf("parse config.json: %w", err)
	}
	return root, nil
}

func bindsDev(m specMount) bool {
	return path.Clean(m.Destination) == "/dev" && (m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind"))
}

type deviceRule struct {
	Allow  bool   `json:"allow"`
	Type   string `json:"type"`
	Major  uint32 `json:"major"`
	Minor  uint32 `json:"minor"`
	Access string `json:"access"`
}

func editResources(root *object, devices []Device) error {
	return root.change("", []string{"linux", "resources"}, func(at string, o *object) error {
		o.remove("vtpms")
		return o.changeList(at, "devices", func(_ string, list []json.RawMessage) ([]json.RawMessage, error) {
			for _, d := range devices {
				list = append(list, encode(deviceRule{true, d.Type, d.Major, d.Minor, "rwm"}))
			}
			return list, nil
		})
	})
}

type deviceNode struct {
	Path     string `json:"path"`
	Type     string `json:"type"`
	Major    uint32 `json:"major"`
	Minor    uint32 `json:"minor"`
	FileMode uint32 `json:"fileMode,omitempty"`
	UID      uint32 `json:"uid"`
	GID      uint32 `json:"gid"`
}

func editDevices(root *object, devices []Device, bind bool) error {
	return root.change("", []string{"linux"}, func(at string, o *object) error {
		return o.changeList(at, "devices", func(at string, list []json.RawMessage) ([]json.RawMessage, error) {
			list, err := without(at, list, "path", devices)
			if err != nil || bind {
				return list, err
			}
			for _, d := range devices {
				list = append(list, encode(deviceNode{path.Clean(d.Path), d.Type, d.Major, d.Minor, d.FileMode, d.UID, d.GID}))
			}
			return list, nil
		})
	})
}

// without leaves out the elements whose member key names the path of a device.
func without(at string, list []json.RawMessage, key string, devices []Device) ([]json.RawMessage, error) {
	var kept []json.RawMessage
	for i, raw := range list {
		field := fmt.Sprintf("%s[%d]", at, i)
		o, err := parseObject(raw)
		if err != nil {
			return nil, wrong(field, raw, err.Error())
		}
		var place string
		if value, ok := o.get(key); ok {
			if err := decode(join(field, key), value, &place, "want a string"); err != nil {
				return nil, err
			}
		}
		if !slices.ContainsFunc(devices, func(d Device) bool { return path.Clean(d.Path) == path.Clean(place) }) {
			kept = append(kept, raw)
		}
	}
	return kept, nil
}

type mountEntry struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options"`
}

func editMounts(root *object, g Grant, bind bool) error {
	return root.changeList("", "mounts", func(at string, list []json.RawMessage) ([]json.RawMessage, error) {
		list, err := without(at, list, "destination", g.Devices)
		if err != nil {
			return nil, err
		}
		for _, d := range g.Devices {
			if bind { // no other option: the kernel refuses to drop those that the host's mount of /dev has
				list = append(list, encode(mountEntry{path.Clean(d.Path), "bind", d.HostPath, []string{"bind"}}))
			}
		}
		for _, m := range g.Mounts {
			options := m.Options
			if len(options) == 0 {
				options = WindowOptions()
			}
			list = append(list, encode(mountEntry{path.Clean(m.Destination), "bind", m.Source, options}))
		}
		return list, nil
	})
}

// unmask lets the places of mounts be seen: masks come after all mounts.
func unmask(root *object, mounts []Mount) error {
	if len(mounts) == 0 {
		return nil
	}
	return root.change("", []string{"linux"}, func(at string, o *object) error {
		return o.changeList(at, "maskedPaths", func(_ string, list []json.RawMessage) ([]json.RawMessage, error) {
			return slices.DeleteFunc(list, func(raw json.RawMessage) bool {
				var masked string
				return json.Unmarshal(raw, &masked) == nil &&
					slices.ContainsFunc(mounts, func(m Mount) bool { return path.Clean(m.Destination) == path.Clean(masked) })
			}), nil
		})
	})
}

// editEnv adds variables. A spec without a process has nobody to have them.
func editEnv(root *object, env []string) error {
	if _, ok := root.get("process"); !ok || len(env) == 0 {
		return nil
	}
	return root.change("", []string{"process"}, func(at string, o *object) error {
		return o.changeList(at, "env", func(at string, list []json.RawMessage) ([]json.RawMessage, error) {
			set := make(map[string]bool)
			for i, raw := range list {
				var v string
				if err := decode(fmt.Sprintf("%s[%d]", at, i), raw, &v, "want a string"); err != nil {
					return nil, err
				}
				name, _, _ := strings.Cut(v, "=")
				set[name] = true
			}
			for _, v := range env {
				if name, _, _ := strings.Cut(v, "="); !set[name] {
					list = append(list, encode(v))
				}
			}
			return list, nil
		})
	})
}

func editHooks(root *object, h Hooks) error {
	return root.change("", []string{"hooks"}, func(at string, o *object) error {
		for _, kind := range []struct {
			key   string
			hooks []Hook
		}{{"createRuntime", h.CreateRuntime}, {"poststop", h.Poststop}} {
			err := o.changeList(at, kind.key, func(_ string, list []json.RawMessage) ([]json.RawMessage, error) {
				for _, hook := range kind.hooks {
					list = append(list, encode(hook))
				}
				return list, nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// specView is what of a spec is looked at before it is edited.
type specView struct {
	Annotations map[string]string
	Mounts      []specMount
	Linux       struct {
		Namespaces  []specNamespace `json:"namespaces"`
		UIDMappings []idMapping     `json:"uidMappings"`
		GIDMappings []idMapping     `json:"gidMappings"`
		Resources   struct {
			VTPMs []json.RawMessage `json:"vtpms"`
		} `json:"resources"`
	}
}

type specMount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options"`
}

type specNamespace struct {
	Type string `json:"type"`
}

type idMapping struct {
	ContainerID uint32 `json:"containerID"`
	HostID      uint32 `json:"hostID"`
	Size        uint32 `json:"size"`
}

func (v specView) userNamespace() bool {
	return slices.Contains(v.Linux.Namespaces, specNamespace{"user"})
}

// look reads the few members that we need, each by its own name, so that an error names it.
func look(root *object) (specView, error) {
	var v specView
	for _, m := range []struct {
		key    string
		to     any
		reason string
	}{
		{"annotations", &v.Annotations, "want an object of strings"},
		{"mounts", &v.Mounts, "want a list of mounts"},
		{"linux", &v.Linux, "want an object"},
	} {
		if raw, ok := root.get(m.key); ok {
			if err := decode(m.key, bytes.TrimSpace(raw), m.to, m.reason); err != nil {
				return v, err
			}
		}
	}
	return v, nil
}
