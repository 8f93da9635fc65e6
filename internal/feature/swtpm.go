package feature

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// The oldest swtpm that the tests run with: Debian 12's.
const (
	swtpmMajor = 0
	swtpmMinor = 7
)

const swtpmFix = "install the package swtpm in version 0.7 or later (Debian 12, Ubuntu 24.04 and later have it), " +
	"or name the program with --swtpm"

// Swtpm looks for the program by its name or path. An *Unsupported: it is missing, or too old.
func Swtpm(program string) (found string, err error) { return swtpmProbe(program).Run() }

func swtpmProbe(program string) Probe {
	return Probe{
		Name: "swtpm", Purpose: "to give each namespace a TPM of its own", detect: func() (string, error) { return swtpm(program) },
		fix: swtpmFix, Without: "the lists of namespaces are not anchored (--ns-tpm none)",
	}
}

func swtpm(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("no program %s: %w", program, err)
	}
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("run %s --version: %w", path, err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	if err := checkSwtpmVersion(first); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return first, nil
}

// checkSwtpmVersion reads the line by which swtpm tells its version, such as "TPM emulator version 0.7.1, Copyright (c) …".
func checkSwtpmVersion(line string) error {
	_, version, ok := strings.Cut(line, "version ")
	var major, minor int
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); !ok || err != nil {
		return fmt.Errorf("its version is not to be told from %q", line)
	}
	if major < swtpmMajor || major == swtpmMajor && minor < swtpmMinor {
		return fmt.Errorf("version %d.%d is too old", major, minor)
	}
	return nil
}

// nativeTPM looks for the native list's TPM, by its address as --tpm takes it.
func nativeTPM(address, program string) (string, error) {
	switch {
	case address == "none":
		return "", errors.New("--tpm none: no TPM proves the native list")
	case address == "swtpm":
		found, err := swtpm(program)
		if err != nil {
			return "", fmt.Errorf("--tpm swtpm: %w", err)
		}
		return "software: " + found, nil
	case !strings.HasPrefix(address, "/"):
		return "software: " + address + " (not probed)", nil
	}
	found, err := device(address)()
	if err != nil {
		if others, _ := filepath.Glob("/dev/tpm*"); len(others) > 0 {
			return "", fmt.Errorf("%w; there are %s", err, strings.Join(others, ", "))
		}
		return "", err
	}
	return "hardware: " + found, nil
}

// nativeFix is what to do about a native TPM that is not there.
func nativeFix(address string) string {
	switch address {
	case "none":
		return "name the machine's own (--tpm /dev/tpmrm0), or have one in software (--tpm swtpm)"
	case "swtpm":
		return swtpmFix + ", or run with --tpm none"
	}
	return "enable the TPM in the firmware, or run with --tpm swtpm (one in software) or --tpm none"
}
