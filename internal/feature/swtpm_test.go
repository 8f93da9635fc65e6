package feature

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pretend makes a program that says it is swtpm of a version.
func pretend(t *testing.T, line string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "swtpm")
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+line+"'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSwtpmVersion(t *testing.T) {
	for line, want := range map[string]string{
		"TPM emulator version 0.7.1, Copyright (c) 2014-2021 IBM Corp.":             "",
		"TPM emulator version 0.10.0, Copyright (c) 2014-2022 IBM Corp. and others": "",
		"TPM emulator version 1.0.0":                                                "",
		"TPM emulator version 0.6.3, Copyright (c) 2014-2021 IBM Corp.":             "version 0.6 is too old; install the package swtpm in version 0.7 or later",
		"something else":               "not to be told",
		"TPM emulator version unknown": "not to be told",
	} {
		found, err := Swtpm(pretend(t, line))
		var missing *Unsupported
		switch {
		case want == "" && (err != nil || found != line):
			t.Errorf("%s: found %q, %v", line, found, err)
		case want != "" && (!errors.As(err, &missing) || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, want %q", line, err, want)
		}
	}
	if _, err := Swtpm("no-such-swtpm"); err == nil || !strings.Contains(err.Error(), "no program no-such-swtpm") {
		t.Errorf("none: %v", err)
	}
}

// What is said of the native list's TPM: what it is, or the ways out.
func TestNativeTPM(t *testing.T) {
	program := pretend(t, "TPM emulator version 0.7.1")
	for name, c := range map[string]struct {
		config Config
		want   []string
		ok     bool
	}{
		"software":      {Config{TPM: "swtpm", Swtpm: program}, []string{"software: TPM emulator version 0.7.1"}, true},
		"no swtpm":      {Config{TPM: "swtpm", Swtpm: "no-such-swtpm"}, []string{"--tpm swtpm: no program", "install the package swtpm", "--tpm none"}, false},
		"none":          {Config{TPM: "none", Swtpm: program}, []string{"no TPM proves the native list", "--tpm swtpm"}, false},
		"a socket":      {Config{TPM: "unix:/run/tpm", Swtpm: program}, []string{"software: unix:/run/tpm"}, true},
		"a device":      {Config{TPM: "/dev/null", Swtpm: program}, []string{"hardware: /dev/null"}, true},
		"none is there": {Config{TPM: "/dev/tpm-none", Swtpm: program}, []string{"/dev/tpm-none", "--tpm swtpm", "--tpm none"}, false},
	} {
		for _, p := range Probes(c.config) {
			if p.Name != "TPM" {
				continue
			}
			found, err := p.Run()
			if p.Required() || (err == nil) != c.ok {
				t.Errorf("%s: found %q, %v", name, found, err)
			}
			if err != nil {
				found = err.Error()
			}
			for _, want := range c.want {
				if !strings.Contains(found, want) {
					t.Errorf("%s: no %q in %q", name, want, found)
				}
			}
		}
	}
}
