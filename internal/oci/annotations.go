package oci

import (
	"encoding/json"
	"slices"
	"strings"
)

// crioAnnotations is where CRI-O puts a pod's annotations, as JSON in one of its own.
const crioAnnotations = "io.kubernetes.cri-o.Annotations"

// What managers tell of a container in annotations, the first that is there counts: containerd's CRI, CRI-O, the OCI's own.
var (
	imageKeys     = []string{"io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName", "org.opencontainers.image.ref.name"}
	digestKeys    = []string{"org.opencontainers.image.base.digest"}
	nameKeys      = []string{"io.kubernetes.cri.container-name", "io.kubernetes.container.name", "io.kubernetes.cri-o.ContainerName"}
	podKeys       = []string{"io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name", "io.kubernetes.cri-o.KubeName"}
	namespaceKeys = []string{"io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace", "io.kubernetes.cri-o.Namespace"}
	kindKeys      = []string{"io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"}
)

func first(annotations map[string]string, keys []string) string {
	for _, key := range keys {
		if v := annotations[key]; v != "" {
			return v
		}
	}
	return ""
}

// Describe fills in what a manager tells of a container in annotations, and leaves the rest as it is.
func (r *Request) Describe(annotations map[string]string) {
	for to, keys := range map[*string][]string{&r.Image: imageKeys, &r.ImageDigest: digestKeys, &r.Name: nameKeys, &r.Pod: podKeys, &r.Namespace: namespaceKeys} {
		if v := first(annotations, keys); v != "" {
			*to = v
		}
	}
	if _, digest, ok := strings.Cut(r.Image, "@"); ok {
		r.ImageDigest = digest
	}
}

// annotate fills in what the annotations of a spec say.
func (r *Request) annotate(annotations map[string]string) error {
	r.Describe(annotations)
	if first(annotations, kindKeys) == "sandbox" {
		r.VTPM = len(r.VTPMs) > 0
		return nil // the pod's annotations are about its containers
	}
	return r.Ask(withPod(annotations))
}

// withPod adds those of a pod that came wrapped; the container's own count more.
func withPod(annotations map[string]string) map[string]string {
	var pod map[string]string
	if json.Unmarshal([]byte(annotations[crioAnnotations]), &pod) != nil {
		return annotations // CRI-O's own to get right; a container runs without, too
	}
	merged := make(map[string]string)
	for _, from := range []map[string]string{pod, annotations} {
		for k, v := range from {
			merged[k] = v
		}
	}
	return merged
}

// Ask takes over what annotations ask for. Those that are not there leave the request as it is. It returns a FieldError.
func (r *Request) Ask(annotations map[string]string) error {
	for key, to := range map[string]*bool{AnnotationVTPM: &r.VTPM, AnnotationRequired: &r.Required} {
		switch v, ok := annotations[key]; {
		case !ok:
		case v == "true" || v == "false":
			*to = v == "true"
		default:
			return &FieldError{annotation(key), quote(v), `want "true" or "false"`}
		}
	}
	name, ok := annotations[AnnotationPolicy]
	if ok && !isName(name) {
		return &FieldError{annotation(AnnotationPolicy), quote(name), nameReason}
	}
	if ok {
		r.Policy = name
	}
	if gate, ok := annotations[AnnotationGate]; ok {
		if err := checkGate(gate); err != nil {
			return err
		}
		r.Gate = gate
	}
	if !r.VTPM {
		r.VTPMs = nil
	}
	return nil
}

func checkGate(gate string) error {
	if !slices.Contains(Gates(), gate) {
		return &FieldError{annotation(AnnotationGate), quote(gate), `want "off", "exec", "all", "exec-closed" or "all-closed"`}
	}
	return nil
}
