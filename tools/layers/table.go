package main

// layers are the packages below internal, from the bottom up: a package imports only from layers before its own, never
// sideways. A new package is added here; an exception needs an architecture decision record.
func layers() [][]string {
	return [][]string{
		{"confine", "fault", "ima", "need", "proc", "standing", "tpmext/tpmtest"},
		{"event", "policy", "imalog", "binding", "durable", "feature", "oci"},
		{"loader", "digest", "tpmext", "verify"},
		{"measure", "appraise", "vtpm", "tpmshare", "gate"},
		{"namespace", "reach"},
		{"imafs", "container", "grant", "nri", "attest"},
		{"control"},
		{"agent"},
	}
}

// restricted names modules that only some of our packages may import.
func restricted() map[string][]string {
	return map[string][]string{
		"github.com/cilium/ebpf": {"loader", "feature"},
	}
}

// hubs may import more than ownImports of our packages.
func hubs() []string { return []string{"agent", "namespace"} } // docs/adr/0004

// ownImports is how many of our own packages one package may import.
const ownImports = 8
