package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/format"
	"os"
	"strings"
)

// losses is the shape of bpf/loss.json.
type losses struct {
	Doc     string `json:"doc"`
	Reasons []struct {
		ID   uint32 `json:"id"`
		Name string `json:"name"` // lower case, words joined by "_"; part of violation names
		Side string `json:"side"` // kernel or agent
		Doc  string `json:"doc"`
	} `json:"reasons"`
}

const generatedMark = "Code generated from bpf/loss.json by tools/bpf2go. DO NOT EDIT."

// generateLosses writes the C enum, the Go names and the documentation table.
func generateLosses(source string) error {
	text, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	var l losses
	if err := json.Unmarshal(text, &l); err != nil {
		return fmt.Errorf("read %s: %w", source, err)
	}
	for i, r := range l.Reasons {
		if r.ID != uint32(i+1) {
			return fmt.Errorf("read %s: reason %q has id %d, want %d: ids run from 1 without gaps", source, r.Name, r.ID, i+1)
		}
	}
	goText, err := format.Source([]byte(l.goText()))
	if err != nil {
		return fmt.Errorf("format internal/event/loss.go: %w", err)
	}
	for path, content := range map[string][]byte{
		"bpf/loss.h": []byte(l.cText()), "internal/event/loss.go": goText, "docs/losses.md": []byte(l.docText()),
	} {
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
			continue
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (l losses) cText() string {
	var b strings.Builder
	fmt.Fprintf(&b, "/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */\n/* %s */\n", generatedMark)
	b.WriteString("#ifndef IMANS_LOSS_H\n#define IMANS_LOSS_H\n\nenum imans_loss {\n")
	for _, r := range l.Reasons {
		fmt.Fprintf(&b, "\tIMANS_LOSS_%s = %d,\n", strings.ToUpper(r.Name), r.ID)
	}
	b.WriteString("};\n\n#endif\n")
	return b.String()
}

func (l losses) goText() string {
	var b strings.Builder
	fmt.Fprintf(&b, "// %s\n\npackage event\n\n", generatedMark)
	fmt.Fprintf(&b, "// Loss is a reason for which an event did not become an ordinary entry. docs/losses.md explains each.\ntype Loss uint32\n\n")
	b.WriteString("// The reasons of bpf/loss.json.\nconst (\n")
	for _, r := range l.Reasons {
		fmt.Fprintf(&b, "\tLoss%s Loss = %d // %s side\n", camel(r.Name), r.ID, r.Side)
	}
	b.WriteString(")\n\nvar lossNames = [...]string{\"none\"")
	for _, r := range l.Reasons {
		fmt.Fprintf(&b, ", %q", r.Name)
	}
	b.WriteString("}\n\n// String returns the name that violation entries carry.\nfunc (l Loss) String() string {\n" +
		"\tif int(l) < len(lossNames) {\n\t\treturn lossNames[l]\n\t}\n\treturn \"unknown\"\n}\n")
	return b.String()
}

func (l losses) docText() string {
	var b strings.Builder
	fmt.Fprintf(&b, "<!-- %s -->\n# Losses\n\n%s\n\n", generatedMark, l.Doc)
	b.WriteString("| id | name | counted by | what happened |\n|---|---|---|---|\n")
	for _, r := range l.Reasons {
		fmt.Fprintf(&b, "| %d | `%s` | %s | %s |\n", r.ID, r.Name, r.Side, r.Doc)
	}
	return b.String()
}

// camel turns ring_buffer_full into RingBufferFull.
func camel(name string) string {
	var b strings.Builder
	for word := range strings.SplitSeq(name, "_") {
		if word == "id" {
			word = "ID"
		}
		b.WriteString(strings.ToUpper(word[:1]) + word[1:])
	}
	return b.String()
}
