package main

import (
	"slices"
	"testing"
)

func TestCheck(t *testing.T) {
	const module = "example.org/m"
	tests := []struct {
		name, from string
		imports    []string
		want       []string
	}{
		{name: "down", from: "internal/measure", imports: []string{module + "/internal/imalog", module + "/internal/tpmext", "fmt"}},
		{name: "sideways", from: "internal/policy", imports: []string{module + "/internal/event"},
			want: []string{"internal/policy imports internal/event sideways: both are in layer 1"}},
		{name: "up", from: "internal/ima", imports: []string{module + "/internal/agent"},
			want: []string{"internal/ima (layer 0) imports internal/agent above it (layer 7)"}},
		{name: "new package", from: "internal/util", want: []string{"internal/util is in no layer: add it to tools/layers/table.go"}},
		{name: "below a listed one", from: "internal/ima/sub",
			want: []string{"internal/ima/sub is in no layer: add it to tools/layers/table.go"}},
		{name: "command", from: "internal/agent", imports: []string{module + "/cmd/x"},
			want: []string{"internal/agent imports example.org/m/cmd/x: nothing imports a command"}},
		{name: "ebpf in loader", from: "internal/loader", imports: []string{"github.com/cilium/ebpf", "github.com/cilium/ebpf/link"}},
		{name: "ebpf elsewhere", from: "internal/namespace", imports: []string{"github.com/cilium/ebpf/link"},
			want: []string{"internal/namespace imports github.com/cilium/ebpf/link: only internal/{loader,feature} may"}},
		{name: "ebpf in a command", from: "cmd/x", imports: []string{"github.com/cilium/ebpf"},
			want: []string{"cmd/x imports github.com/cilium/ebpf: only internal/{loader,feature} may"}},
		{name: "command and agent", from: "cmd/x", imports: []string{module + "/internal/agent"}},
		{name: "tool and agent", from: "test/x", imports: []string{module + "/internal/agent"},
			want: []string{"test/x imports internal/agent: only cmd may"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := goPackage{ImportPath: module + "/" + tt.from, Imports: tt.imports}
			p.Module.Path = module
			if got := check([]goPackage{p}); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestTooManyImports(t *testing.T) {
	var p goPackage
	p.Module.Path = "m"
	p.ImportPath = "m/internal/control"
	for _, l := range layers()[:5] {
		for _, name := range l {
			p.Imports = append(p.Imports, "m/internal/"+name)
		}
	}
	if got := check([]goPackage{p}); len(got) != 1 {
		t.Errorf("%d imports of our own: got %q, want one fault", len(p.Imports), got)
	}
}
