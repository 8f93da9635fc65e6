package imalog

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/need"
)

// evmctl runs `evmctl ima_measurement` over a list and PCR files of both banks that it knows, and returns what it
// printed.
func evmctl(t *testing.T, list []byte, replay *Replay, args ...string) (string, error) {
	t.Helper()
	program := need.Program(t, "evmctl")
	dir := t.TempDir()
	file := filepath.Join(dir, "list")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	args = append([]string{"ima_measurement", "-v"}, args...)
	for _, bank := range []ima.HashAlgo{ima.SHA1, ima.SHA256} {
		var pcrs []byte
		for pcr := range 24 {
			pcrs = fmt.Appendf(pcrs, "PCR-%02d: %x\n", pcr, replay.Value(pcr, bank).Bytes())
		}
		path := filepath.Join(dir, bank.String())
		if err := os.WriteFile(path, pcrs, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--pcrs", bank.String()+","+path)
	}
	out, err := exec.Command(program, append(args, file)...).CombinedOutput()
	return string(out), err
}

func writeAll(entries []*Entry) (list []byte, replay *Replay) {
	replay = NewReplay(banks()...)
	for _, e := range entries {
		list = e.AppendBinary(list, ima.SHA1)
		replay.Extend(e)
	}
	return list, replay
}

// TestEvmctl has the other program read what we write, compute the same PCR values, print the same lines, and find a
// change.
func TestEvmctl(t *testing.T) {
	for _, v := range loadVectors(t) {
		t.Run(v.name, func(t *testing.T) {
			var entries []*Entry
			violations, mixed := false, false
			for i := range v.Entries {
				if v.Entries[i].Values == nil {
					continue
				}
				e := v.Entries[i].make(t)
				entries = append(entries, e)
				violations = violations || e.Violation()
				mixed = mixed || e.Template() == "n-ng|d-ngv2|sig|iuid|imode" // evmctl takes the first field for the digest
			}
			if mixed {
				entries, violations = []*Entry{entries[0], entries[3]}, false
			}
			list, replay := writeAll(entries)
			out, err := evmctl(t, list, replay, "--ignore-violations")
			if err != nil || !strings.Contains(out, "Matched per TPM bank calculated digest(s).") {
				t.Fatalf("evmctl: %v\n%s", err, out)
			}
			if violations {
				if out, err := evmctl(t, list, replay); err == nil {
					t.Errorf("without --ignore-violations evmctl took the violation for a match:\n%s", out)
				}
			}
			changed := bytes.Clone(list)
			changed[4+20+4+len(entries[0].Template())+8]++ // in the first entry's file digest
			if out, err := evmctl(t, changed, replay, "--ignore-violations"); err == nil {
				t.Errorf("evmctl took a changed list for good:\n%s", out)
			}
		})
	}
}

// TestEvmctlLines compares evmctl's verbose lines with our ascii list, for a list whose names need no escaping.
func TestEvmctlLines(t *testing.T) {
	for _, template := range []string{NG, IMA} {
		var entries []*Entry
		for i := range 20 {
			v := FieldValues{Digest: ima.ZeroDigest(ima.SHA1), Name: fmt.Sprintf("/usr/lib/file number %d", i)}
			e, err := NewEntry(10, template, v)
			if err != nil {
				t.Fatal(err)
			}
			entries = append(entries, e)
		}
		list, replay := writeAll(entries)
		out, err := evmctl(t, list, replay)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, e := range entries {
			if line := string(e.AppendASCII(nil, ima.SHA1)); !strings.Contains(out, line) {
				t.Errorf("evmctl has no line %q in\n%s", line, out)
			}
		}
	}
}

// TestEvmctlZeroViolations: evmctl's way without --ignore-violations is ExtendZeroViolations.
func TestEvmctlZeroViolations(t *testing.T) {
	v, err := NewViolation(10, NG, sampleValues(t, "/a"))
	if err != nil {
		t.Fatal(err)
	}
	replay := NewReplay(banks()...)
	replay.ExtendZeroViolations(v)
	if out, err := evmctl(t, v.AppendBinary(nil, ima.SHA1), replay); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
