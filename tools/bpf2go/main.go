// Command bpf2go is the one door to generated code: it compiles bpf/*.bpf.c for amd64 and arm64 with a pinned compiler
// into internal/loader, and turns bpf/loss.json into a C enum, Go names and a documentation table.
//
// Run it from the repository's root, with no arguments: go run ./tools/bpf2go. The same sources give the same bytes.
package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// The pinned tools: another version may give other bytes. Debian 12's packages clang-19, llvm-19 and libbpf-dev.
const (
	clang         = "clang-19"
	clangVersion  = "19.1.7"
	strip         = "llvm-strip-19"
	libbpfVersion = "#define LIBBPF_MINOR_VERSION 1\n"
	libbpfHeader  = "/usr/include/bpf/libbpf_version.h"
)

func main() {
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bpf2go:", err)
		os.Exit(1)
	}
}

func run(stdout io.Writer) error {
	if err := checkTools(); err != nil {
		return err
	}
	if err := generateLosses("bpf/loss.json"); err != nil {
		return err
	}
	for _, name := range []string{"imans", "protect"} {
		cmd := exec.Command("go", "tool", "bpf2go",
			"-cc", clang, "-strip", strip, "-target", "amd64,arm64",
			"-go-package", "loader", "-output-dir", "internal/loader",
			"-cflags", "-O2 -g -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers -Werror -mcpu=v3 -Ibpf",
			name, "bpf/"+name+".bpf.c")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("compile bpf/%s.bpf.c: %w\n%s", name, err, out)
		}
	}
	fmt.Fprintln(stdout, "generated: internal/loader/{imans,protect}_*_bpfel.{go,o}, bpf/loss.h, internal/event/loss.go, docs/losses.md")
	return nil
}

// checkTools refuses tools of another version, because their output would differ from the committed files.
func checkTools() error {
	out, err := exec.Command(clang, "--version").Output()
	if err != nil {
		return fmt.Errorf("find %s: %w; install Debian 12's packages clang-19, llvm-19 and libbpf-dev", clang, err)
	}
	if first, _, _ := strings.Cut(string(out), "\n"); !strings.Contains(first, clangVersion) {
		return fmt.Errorf("%s is %q, the pinned one is %s (Debian 12's package)", clang, first, clangVersion)
	}
	header, err := os.ReadFile(libbpfHeader)
	if err != nil {
		return fmt.Errorf("find libbpf's headers: %w; install Debian 12's package libbpf-dev", err)
	}
	if !strings.Contains(string(header), libbpfVersion) {
		return fmt.Errorf("%s is not of libbpf 1.1, the pinned one (Debian 12's package libbpf-dev)", libbpfHeader)
	}
	return nil
}
