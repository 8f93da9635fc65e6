package vm

import (
	"fmt"
	"slices"
	"strings"
)

// Kernel is one stock kernel of the matrix.
type Kernel struct {
	// Name is the series, such as "6.12".
	Name string
	// CPUs is the number of virtual CPUs it is booted with.
	CPUs int
	// sources are tried in order until one has the kernel.
	sources []source
}

// source says where in Debian's archive a kernel may be.
type source struct {
	suites []string
	// pattern is a regular expression of package names; the newest that matches is taken.
	pattern string
}

// Matrix is every kernel that the tests run on, oldest first.
func Matrix() []Kernel {
	return []Kernel{
		{Name: "6.1", CPUs: 2, sources: []source{
			{suites: []string{"bookworm", "bookworm-updates", "bookworm-security"}, pattern: `^linux-image-6\.1\.[0-9]+-[0-9]+-amd64$`},
		}},
		{Name: "6.12", CPUs: 2, sources: []source{
			{suites: []string{"bookworm", "bookworm-updates", "bookworm-security"}, pattern: `^linux-image-6\.12\.[0-9.+a-z]+-amd64$`},
			{suites: []string{"trixie", "trixie-updates", "trixie-security"}, pattern: `^linux-image-6\.12\.[0-9.+a-z]+-amd64$`},
		}},
		// With two CPUs 6.18 has panicked at boot under QEMU's translator; with one it never did.
		{Name: "6.18", CPUs: 1, sources: []source{
			{suites: []string{"trixie-backports"}, pattern: `^linux-image-6\.18\.[0-9.+a-z]+-amd64$`},
		}},
	}
}

// Find returns the kernel of the matrix with that name.
func Find(name string) (Kernel, error) {
	kernels := Matrix()
	if i := slices.IndexFunc(kernels, func(k Kernel) bool { return k.Name == name }); i >= 0 {
		return kernels[i], nil
	}
	names := make([]string, len(kernels))
	for i, k := range kernels {
		names[i] = k.Name
	}
	return Kernel{}, fmt.Errorf("kernel %q is not in the matrix; choose from %s", name, strings.Join(names, ", "))
}

// UnavailableError says that Debian's archive has no such kernel (any more). It is not a failure of the network.
type UnavailableError struct {
	Kernel string
	Reason string
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("kernel %s is not to be had: %s", e.Kernel, e.Reason)
}
