package oci

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Annotations by which a container says what it wants. On a pod they count for each of its containers.
const (
	AnnotationVTPM     = "imans.dev/vtpm"     // "true" or "false"
	AnnotationPolicy   = "imans.dev/policy"   // name of a policy that the agent has
	AnnotationGate     = "imans.dev/gate"     // one of Gates
	AnnotationRequired = "imans.dev/required" // "true": no container without what it asks for; "false": it goes on without
)

// Gates are what a container can ask to have held up until it is measured, each more than the one before. It gets no less than others do.
func Gates() []string { return []string{"off", "exec", "all", "exec-closed", "all-closed"} }

// Request is what a container asks for. Everything in it is claimed by whoever wrote the spec.
type Request struct {
	ID     string `json:"id"`
	Bundle string `json:"bundle,omitempty"` // folder of the spec; none for a request that no spec was read for

	VTPM     bool   `json:"vtpm"`
	VTPMs    []VTPM `json:"vtpms,omitempty"`  // none: one, as the agent makes them
	Policy   string `json:"policy,omitempty"` // none: the one for new namespaces
	Gate     string `json:"gate,omitempty"`   // none: as off
	Required bool   `json:"required,omitempty"`
	Socket   bool   `json:"socket,omitempty"` // its vTPM is to be no device: the spec can't have one added any more

	Image       string `json:"image,omitempty"` // reference, where known
	ImageDigest string `json:"image_digest,omitempty"`
	Name        string `json:"name,omitempty"` // of the container in its pod
	Pod         string `json:"pod,omitempty"`
	Namespace   string `json:"namespace,omitempty"` // of the pod

	// UserNamespace says that the container has a user namespace, and then RootUID and RootGID who its root is on the host: a
	// device's node there must be his. They are 0 if the spec does not say.
	UserNamespace bool   `json:"user_namespace,omitempty"`
	RootUID       uint32 `json:"root_uid,omitempty"`
	RootGID       uint32 `json:"root_gid,omitempty"`

	// Homes are folders that the container's manager keeps for it from its creation to its removal: docker and podman delete a
	// container in the runtime at each stop, and create it anew, by the same id, at the next start. Empty: when the runtime
	// deletes the container, it is removed.
	Homes []string `json:"homes,omitempty"`
}

// Wants reports whether the container asks for anything.
func (r Request) Wants() bool { return r.VTPM || r.Policy != "" || r.WantsGate() }

// WantsGate reports whether the container asks for a gate.
func (r Request) WantsGate() bool { return r.Gate != "" && r.Gate != Gates()[0] }

// MayReturn reports whether the container may be started again by the same id after the runtime has deleted it: one of its homes
// is still there.
func (r Request) MayReturn() bool {
	return slices.ContainsFunc(r.Homes, func(dir string) bool {
		_, err := os.Lstat(dir)
		return err == nil
	})
}

// Check says what is wrong with a request that came from elsewhere.
func (r Request) Check() error {
	if err := CheckID(r.ID); err != nil {
		return err
	}
	if r.Policy != "" && !isName(r.Policy) {
		return &FieldError{annotation(AnnotationPolicy), quote(r.Policy), nameReason}
	}
	if r.Gate != "" {
		if err := checkGate(r.Gate); err != nil {
			return err
		}
	}
	for i, v := range r.VTPMs {
		if err := v.check(fmt.Sprintf("linux.resources.vtpms[%d]", i)); err != nil {
			return err
		}
	}
	return checkVTPMs(r.VTPMs)
}

// idMax bounds a container's id, which names folders.
const idMax = 255

// CheckID says what is wrong with a container's id.
func CheckID(id string) error {
	if id == "" || len(id) > idMax || id == "." || id == ".." || strings.Trim(id, letters+"_+-.") != "" {
		return fmt.Errorf("container id %s: want 1 to %d characters, of letters, digits, _, +, . and -, and not . or .. alone", quote(id), idMax)
	}
	return nil
}

const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

const (
	nameMax    = 64
	nameReason = "want a name of at most 64 letters, digits, and _ - . that begins with a letter or a digit"
)

// isName reports whether a name can stand for a file without leading anywhere else.
func isName(name string) bool {
	return name != "" && len(name) <= nameMax && strings.ContainsRune(letters, rune(name[0])) && strings.Trim(name, letters+"_-.") == ""
}

// ParseRequest reads what the container of a spec asks for. byDefault is whether one that says nothing of it gets a vTPM; a pod's
// sandbox, which runs nothing of anybody's, only gets one that asks. It returns a FieldError, or what encoding/json says of a
// text that is no JSON.
func ParseRequest(spec []byte, id, bundle string, byDefault bool) (Request, error) {
	if err := CheckID(id); err != nil {
		return Request{}, err
	}
	root, err := parseSpec(spec)
	if err != nil {
		return Request{}, err
	}
	view, err := look(root)
	if err != nil {
		return Request{}, err
	}
	r := Request{ID: id, Bundle: bundle, UserNamespace: view.userNamespace()}
	if r.UserNamespace {
		r.RootUID, r.RootGID = hostID(view.Linux.UIDMappings), hostID(view.Linux.GIDMappings)
	}
	if r.VTPMs, err = parseVTPMs(view.Linux.Resources.VTPMs); err != nil {
		return Request{}, err
	}
	r.VTPM = byDefault || len(r.VTPMs) > 0
	if err := r.annotate(view.Annotations); err != nil {
		return Request{}, err
	}
	r.Homes = homes(id, bundle, view.Mounts)
	return r, nil
}

// hostID returns what id 0 of a user namespace is outside.
func hostID(mappings []idMapping) uint32 {
	for _, m := range mappings {
		if m.ContainerID == 0 && m.Size > 0 {
			return m.HostID
		}
	}
	return 0
}

// managedID is the length of the ids that docker, podman and CRI-O give.
const managedID = 64

// homes returns the folders named by the container's id that the bundle or a mount's source is in, outside of /run, which
// managers use for what is there while a container runs. With ids that people choose nothing follows from such a name.
func homes(id, bundle string, mounts []specMount) []string {
	if len(id) != managedID || strings.Trim(id, "0123456789abcdef") != "" {
		return nil
	}
	paths := []string{bundle}
	for _, m := range mounts {
		paths = append(paths, m.Source)
	}
	var found []string
	for _, p := range paths {
		before, _, ok := strings.Cut(filepath.Clean(p)+"/", "/"+id+"/")
		home := filepath.Join(before, id)
		if ok && before != "" && !strings.HasPrefix(home, "/run/") && !strings.HasPrefix(home, "/var/run/") && !slices.Contains(found, home) {
			found = append(found, home)
		}
	}
	return found
}

func quote(s string) string { return string(encode(s)) }

func annotation(key string) string { return fmt.Sprintf("annotations[%q]", key) }

// parseVTPMs reads the form of linux.resources.vtpms that was proposed to the runtime specification.
func parseVTPMs(list []json.RawMessage) ([]VTPM, error) {
	var vtpms []VTPM
	for i, raw := range list {
		field := fmt.Sprintf("linux.resources.vtpms[%d]", i)
		v, err := parseVTPM(field, raw)
		if err != nil {
			return nil, err
		}
		vtpms = append(vtpms, v)
	}
	return vtpms, checkVTPMs(vtpms)
}
