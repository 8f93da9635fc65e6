package verify

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/need"
)

// evmctl returns the command that holds a list against the values of PCR 10. The file of values must begin with PCR-00.
func evmctl(t testing.TB, list []byte, value ima.Digest, args ...string) []string {
	t.Helper()
	var text []byte
	for pcr := range 24 {
		v := ima.ZeroDigest(value.Algo())
		if pcr == 10 {
			v = value
		}
		text = fmt.Appendf(text, "PCR-%02d: %x\n", pcr, v.Bytes())
	}
	dir := t.TempDir()
	file, values := filepath.Join(dir, "list"), filepath.Join(dir, "pcrs")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(values, text, 0o600); err != nil {
		t.Fatal(err)
	}
	command := append([]string{need.Program(t, "evmctl"), "ima_measurement"}, args...)
	return append(command, "--pcrs", value.Algo().String()+","+values, file)
}

// TestAgreesWithEvmctl asks both about good and bad lists, and how many entries the value covers.
func TestAgreesWithEvmctl(t *testing.T) {
	made := entries(t, 40, nil)
	withViolation := append(append([]*imalog.Entry{}, made...), violation(t, "/v"))
	swapped := append([]*imalog.Entry{}, made...)
	swapped[7], swapped[8] = swapped[8], swapped[7]
	flip := func(at int) func([]byte) { return func(b []byte) { b[at] ^= 1 } }
	tests := []struct {
		name   string
		list   []*imalog.Entry
		value  []*imalog.Entry // that lead to it
		change func([]byte)
		good   bool
	}{
		{"whole list", made, made, nil, true},
		{"trailing entries", made, made[:17], nil, true},
		{"violation", withViolation, withViolation, nil, true},
		{"swapped", swapped, made, nil, false},
		{"missing", made[:39], made, nil, false},
		{"file digest changed", made, made, flip(60), false},
		{"template digest changed", made, made, flip(10), false},
	}
	for _, bank := range []ima.HashAlgo{ima.SHA1, ima.SHA256} {
		for _, tt := range tests {
			t.Run(bank.String()+"/"+tt.name, func(t *testing.T) {
				list := encode(tt.list, ima.SHA1)
				if tt.change != nil {
					tt.change(list)
				}
				given := after(tt.value, []ima.HashAlgo{bank}, 10)
				command := evmctl(t, list, given[10][bank], "-v", "--ignore-violations", "--verify-bank="+bank.String())
				out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
				if (err == nil) != tt.good {
					t.Errorf("evmctl: %v\n%s", err, out)
				}
				res := check(t, list, Options{PCRs: given})
				if (res.Err() == nil && res.Proven.Matched) != tt.good {
					t.Errorf("%+v, %v", res.Proven, res.Err())
				}
				where := fmt.Sprintf("%s PCR-10: succeed at entry %d\n", bank, res.Proven.Prefix)
				if tt.good && (!bytes.Contains(out, []byte(where)) || res.Proven.Prefix != len(tt.value)) {
					t.Errorf("evmctl does not say %q, prefix %d:\n%s", where, res.Proven.Prefix, out)
				}
			})
		}
	}
}

// benchList is a list of many entries such as a file system has, without and with the values that it leads to.
func benchList(t testing.TB, n int) (list []byte, values map[ima.HashAlgo]ima.Digest) {
	t.Helper()
	replay := imalog.NewReplay(allBanks()...)
	d := parse(t, "sha256:"+strings.Repeat("b0", 32))
	for i := range n {
		name := imalog.BootAggregateName
		if i > 0 {
			name = fmt.Sprintf("/usr/lib/x86_64-linux-gnu/some/path/libexample-%07d.so", i)
		}
		e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: d, Name: name})
		if err != nil {
			t.Fatal(err)
		}
		list = e.AppendBinary(list, ima.SHA1)
		replay.Extend(e)
	}
	values = make(map[ima.HashAlgo]ima.Digest)
	for _, bank := range allBanks() {
		values[bank] = replay.Value(10, bank)
	}
	return list, values
}

// BenchmarkEvmctl reports how many times as fast as evmctl a list in a file is verified: both read the file, check
// every template digest and replay to the same value. Each round times both, so that a busy machine hits both; the
// ratio is of the sums.
func BenchmarkEvmctl(b *testing.B) {
	const n = 200_000
	list, values := benchList(b, n)
	for _, banks := range [][]ima.HashAlgo{{ima.SHA1}, {ima.SHA256}, {ima.SHA1, ima.SHA256}} {
		b.Run(strings.Trim(fmt.Sprint(banks), "[]"), func(b *testing.B) {
			command := evmctl(b, list, values[banks[0]])
			given := pcrs{10: {}}
			for _, bank := range banks {
				given[10][bank] = values[bank]
			}
			var theirs, ours time.Duration
			for b.Loop() {
				start := time.Now()
				if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				middle := time.Now()
				f, err := os.Open(command[len(command)-1])
				if err != nil {
					b.Fatal(err)
				}
				res, err := List(f, Options{PCRs: given})
				f.Close()
				if err != nil || res.Err() != nil || res.Proven.Entries != n {
					b.Fatalf("%v, %v, %+v", err, res.Err(), res.Proven)
				}
				ours += time.Since(middle)
				theirs += middle.Sub(start)
			}
			b.ReportMetric(float64(theirs)/float64(ours), "x-evmctl")
			b.ReportMetric(float64(ours)/float64(b.N)/n, "ns/entry")
			b.ReportMetric(float64(theirs)/float64(b.N)/n, "evmctl-ns/entry")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkList verifies a list in memory.
func BenchmarkList(b *testing.B) {
	const n = 100_000
	list, values := benchList(b, n)
	for _, bank := range allBanks() {
		b.Run(bank.String(), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				res, err := List(bytes.NewReader(list), Options{PCRs: pcrs{10: {bank: values[bank]}}})
				if err != nil || res.Proven.Entries != n {
					b.Fatalf("%v, %+v", err, res.Proven)
				}
			}
			b.ReportMetric(float64(b.Elapsed())/float64(b.N)/n, "ns/entry")
		})
	}
}
