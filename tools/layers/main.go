// Command layers checks that the packages below internal import each other along the layers of table.go only. It names
// each offending import and exits 1 if there is one. Test files are free to import what they like.
//
// Run it from the repository's root, with no arguments: go run ./tools/layers.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

func main() {
	packages, err := list()
	if err != nil {
		fmt.Fprintln(os.Stderr, "layers:", err)
		os.Exit(2)
	}
	faults := check(packages)
	for _, f := range faults {
		fmt.Fprintln(os.Stderr, f)
	}
	if len(faults) > 0 {
		os.Exit(1)
	}
}

// goPackage is what go list tells of a package.
type goPackage struct {
	ImportPath string
	Module     struct{ Path string }
	Imports    []string
}

// name is the path below the module.
func (p goPackage) name() string { return strings.TrimPrefix(p.ImportPath, p.Module.Path+"/") }

// list asks the go command for the module's packages and their imports.
func list() ([]goPackage, error) {
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Module,Imports", "./...")
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var packages []goPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages, nil
		} else if err != nil {
			return nil, fmt.Errorf("read go list's answer: %w", err)
		}
		packages = append(packages, p)
	}
}

// check returns a line for each import that the table forbids.
func check(packages []goPackage) []string {
	var faults []string
	for _, p := range packages {
		faults = append(faults, checkRestricted(p)...)
		if strings.HasPrefix(p.name(), "internal/") {
			faults = append(faults, checkLayers(p)...)
			continue
		}
		for _, imported := range p.Imports {
			if internal(p, imported) == "agent" && !strings.HasPrefix(p.name(), "cmd/") {
				faults = append(faults, p.name()+" imports internal/agent: only cmd may")
			}
		}
	}
	return faults
}

// checkLayers looks at the imports of one package below internal.
func checkLayers(p goPackage) []string {
	name := strings.TrimPrefix(p.name(), "internal/")
	own := layer(name)
	if own < 0 {
		return []string{p.name() + " is in no layer: add it to tools/layers/table.go"}
	}
	var faults []string
	count := 0
	for _, imported := range p.Imports {
		if strings.HasPrefix(imported, p.Module.Path+"/cmd/") {
			faults = append(faults, fmt.Sprintf("%s imports %s: nothing imports a command", p.name(), imported))
		}
		other := internal(p, imported)
		if other == "" {
			continue
		}
		count++
		switch at := layer(other); {
		case at == own:
			faults = append(faults, fmt.Sprintf("%s imports internal/%s sideways: both are in layer %d", p.name(), other, own))
		case at > own:
			faults = append(faults, fmt.Sprintf("%s (layer %d) imports internal/%s above it (layer %d)", p.name(), own, other, at))
		}
	}
	if count > ownImports && !slices.Contains(hubs(), name) {
		faults = append(faults, fmt.Sprintf("%s imports %d of our packages, at most %d are allowed", p.name(), count, ownImports))
	}
	return faults
}

// checkRestricted looks for modules that the package may not import.
func checkRestricted(p goPackage) []string {
	var faults []string
	for _, imported := range p.Imports {
		for module, allowed := range restricted() {
			if imported != module && !strings.HasPrefix(imported, module+"/") {
				continue
			}
			if !slices.Contains(allowed, strings.TrimPrefix(p.name(), "internal/")) {
				faults = append(faults, fmt.Sprintf("%s imports %s: only internal/{%s} may", p.name(), imported, strings.Join(allowed, ",")))
			}
		}
	}
	return faults
}

// internal returns the name below internal of an imported package, or "" for another one.
func internal(p goPackage, imported string) string {
	name, ok := strings.CutPrefix(imported, p.Module.Path+"/internal/")
	if !ok {
		return ""
	}
	return name
}

// layer is the index of a package's layer, -1 for a package that the table lacks.
func layer(name string) int {
	return slices.IndexFunc(layers(), func(l []string) bool { return slices.Contains(l, name) })
}
