package verify

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

type pcrs = map[int]map[ima.HashAlgo]ima.Digest

func allBanks() []ima.HashAlgo { return []ima.HashAlgo{ima.SHA1, ima.SHA256, ima.SHA384, ima.SHA512} }

func parse(t testing.TB, s string) ima.Digest {
	t.Helper()
	d, err := ima.ParseDigest(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// entries makes a boot aggregate and n files; every one whose number pcrOf knows goes to that PCR.
func entries(t testing.TB, n int, pcrOf map[int]int) []*imalog.Entry {
	t.Helper()
	d := parse(t, "sha256:"+strings.Repeat("b0", 32))
	made := make([]*imalog.Entry, n+1)
	for i := range made {
		pcr, ok := pcrOf[i]
		if !ok {
			pcr = 10
		}
		var err error
		if i == 0 {
			made[i], err = imalog.BootAggregate(pcr, imalog.NG, d)
		} else {
			made[i], err = imalog.NewEntry(pcr, imalog.NG, imalog.FieldValues{Digest: d, Name: fmt.Sprintf("/bin/%d", i)})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return made
}

func violation(t testing.TB, name string) *imalog.Entry {
	t.Helper()
	e, err := imalog.NewViolation(10, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func encode(list []*imalog.Entry, bank ima.HashAlgo) []byte {
	var b []byte
	for _, e := range list {
		b = e.AppendBinary(b, bank)
	}
	return b
}

// after returns the values of some PCRs and banks that the entries lead to.
func after(list []*imalog.Entry, banks []ima.HashAlgo, registers ...int) pcrs {
	r := imalog.NewReplay(banks...)
	for _, e := range list {
		r.Extend(e)
	}
	values := make(pcrs)
	for _, pcr := range registers {
		values[pcr] = make(map[ima.HashAlgo]ima.Digest)
		for _, bank := range banks {
			values[pcr][bank] = r.Value(pcr, bank)
		}
	}
	return values
}

func check(t testing.TB, list []byte, opts Options) Result {
	t.Helper()
	res, err := List(bytes.NewReader(list), opts)
	if err != nil {
		t.Fatal(err)
	}
	if res.Claimed.Trailing+res.Claimed.Uncovered+res.Proven.Entries != res.Entries {
		t.Errorf("%d entries, but proven %+v, claimed %+v", res.Entries, res.Proven, res.Claimed)
	}
	return res
}

// kinds lists what is broken as "kind@entry".
func kinds(res Result) string {
	var out []string
	for _, b := range res.Broken {
		out = append(out, fmt.Sprintf("%s@%d", b.Kind, b.Entry))
	}
	return strings.Join(out, " ")
}

// TestVectors holds the lists that another program made against the PCR values that it computed.
func TestVectors(t *testing.T) {
	files, err := filepath.Glob("../imalog/testdata/vectors/*.json")
	if err != nil || len(files) < 11 {
		t.Fatalf("%d vectors: %v", len(files), err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var v struct {
			Entries []struct{ Violation bool }
			PCRs    map[string]map[string]string
		}
		if err := json.Unmarshal(text, &v); err != nil {
			t.Fatal(err)
		}
		given, violations := make(pcrs), 0
		for number, values := range v.PCRs {
			pcr, err := strconv.Atoi(number)
			if err != nil {
				t.Fatal(err)
			}
			given[pcr] = make(map[ima.HashAlgo]ima.Digest)
			for bank, value := range values {
				d := parse(t, bank+":"+value)
				given[pcr][d.Algo()] = d
			}
		}
		for _, e := range v.Entries {
			if e.Violation {
				violations++
			}
		}
		base := strings.TrimSuffix(filepath.Base(file), ".json")
		for _, bank := range allBanks() {
			t.Run(base+"/"+bank.String(), func(t *testing.T) {
				list, err := os.ReadFile(strings.TrimSuffix(file, "json") + bank.String() + ".bin")
				if err != nil {
					t.Fatal(err)
				}
				res := check(t, list, Options{FileBank: bank, PCRs: given})
				booted := base != "example"
				want := Proven{Matched: true, Prefix: len(v.Entries), End: int64(len(list)), Entries: len(v.Entries),
					Violations: violations, BootAggregate: booted}
				if res.Proven != want || res.Violations != violations || res.Claimed != (Claimed{}) {
					t.Errorf("proven %+v, want %+v; claimed %+v", res.Proven, want, res.Claimed)
				}
				if booted != (res.Err() == nil) || !booted && kinds(res) != "boot-aggregate@0" {
					t.Errorf("broken: %v", res.Err())
				}
				for _, c := range res.Computed {
					if given[c.PCR][c.Value.Algo()] != c.Value {
						t.Errorf("PCR %d computed %s, want %s", c.PCR, c.Value, given[c.PCR][c.Value.Algo()])
					}
				}
				if len(res.Computed) != 4*len(v.PCRs) {
					t.Errorf("%d values computed", len(res.Computed))
				}
			})
		}
	}
}

func TestWithoutPCRs(t *testing.T) {
	list := append(entries(t, 3, nil), violation(t, "/v"))
	res := check(t, encode(list, ima.SHA1), Options{})
	want := after(list, []ima.HashAlgo{ima.SHA1}, 10)[10][ima.SHA1]
	if res.Proven != (Proven{}) || res.Claimed.Trailing != 5 || res.Violations != 1 || res.Err() != nil {
		t.Errorf("%+v", res)
	}
	if len(res.Computed) != 1 || res.Computed[0] != (PCRValue{10, want}) {
		t.Errorf("computed %v, want %s", res.Computed, want)
	}
	if res.BootAggregate != parse(t, "sha256:"+strings.Repeat("b0", 32)) {
		t.Errorf("boot aggregate %s", res.BootAggregate)
	}
	if res := check(t, nil, Options{}); kinds(res) != "boot-aggregate@0" {
		t.Errorf("empty list: %v", res.Err())
	}
}

// TestEveryPrefix: the list goes on behind the values, from none of it to all of it, over several batches.
func TestEveryPrefix(t *testing.T) {
	list := entries(t, 600, nil)
	list[300] = violation(t, "/v")
	bytes := encode(list, ima.SHA256)
	offset := 0
	for n := 0; n <= len(list); n++ {
		if n > 0 {
			offset += list[n-1].Size(ima.SHA256)
		}
		if n > 3 && n < len(list)-3 && n%37 != 0 && (n < 254 || n > 258) && (n < 299 || n > 302) {
			continue
		}
		res := check(t, bytes, Options{FileBank: ima.SHA256, PCRs: after(list[:n], []ima.HashAlgo{ima.SHA1, ima.SHA384}, 10)})
		want := Proven{Matched: true, Prefix: n, End: int64(offset), Entries: n, BootAggregate: n > 0}
		if n > 300 {
			want.Violations = 1
		}
		if res.Proven != want || res.Claimed.Trailing != len(list)-n || res.Err() != nil {
			t.Errorf("values after %d entries: %+v, %+v, %v", n, res.Proven, res.Claimed, res.Err())
		}
	}
}

// TestEveryByte changes each byte of a list in several ways. Nothing passes, and what breaks names the right entry. (No
// violation is in it: its data may be changed, see TestViolationIsOnlyClaimed.)
func TestEveryByte(t *testing.T) {
	made := entries(t, 3, map[int]int{2: 11})
	list := encode(made, ima.SHA1)
	given := after(made, []ima.HashAlgo{ima.SHA256}, 10, 11)
	at, entry := 0, 0
	for i := range list {
		if i == at+made[entry].Size(ima.SHA1) {
			at, entry = i, entry+1
		}
		for _, flip := range []byte{0x01, 0x02, 0x80, 0xff} {
			list[i] ^= flip
			res := check(t, list, Options{PCRs: given})
			list[i] ^= flip
			if len(res.Broken) == 0 {
				t.Fatalf("byte %d, flip %#x: nothing found", i, flip)
			}
			first := res.Broken[0]
			if first.Kind != PCRMismatch && (first.Entry != entry || first.Offset != int64(at)) {
				t.Errorf("byte %d, flip %#x, of entry %d at %d: %v", i, flip, entry, at, first)
			}
			inPCR, inDigest := i-at < 4, i-at >= 4 && i-at < 24
			switch {
			case first.Kind == PCRMismatch && !inPCR:
				t.Errorf("byte %d, flip %#x: only found by %v", i, flip, first)
			case inDigest && (!res.Proven.Matched || res.Proven.Entries != 4 ||
				kinds(res) != fmt.Sprintf("template-digest@%d", entry)):
				t.Errorf("byte %d, flip %#x, of a template digest: %+v, %v", i, flip, res.Proven, res.Err())
			case !inDigest && res.Proven.Entries > 0:
				t.Errorf("byte %d, flip %#x: proven %+v", i, flip, res.Proven)
			}
		}
	}
}

// TestWrongOrder: each entry by itself is good.
func TestWrongOrder(t *testing.T) {
	made := entries(t, 4, nil)
	given := after(made, []ima.HashAlgo{ima.SHA1, ima.SHA256}, 10)
	tests := map[string][]*imalog.Entry{
		"missing":  {made[0], made[1], made[3], made[4]},
		"last":     made[:4],
		"doubled":  {made[0], made[1], made[1], made[2], made[3], made[4]},
		"swapped":  {made[0], made[2], made[1], made[3], made[4]},
		"inserted": {made[0], made[1], made[2], violation(t, "/v"), made[3], made[4]},
	}
	for name, list := range tests {
		res := check(t, encode(list, ima.SHA1), Options{PCRs: given})
		want := fmt.Sprintf("pcr-mismatch@%d pcr-mismatch@%d", len(list), len(list))
		if res.Proven != (Proven{}) || kinds(res) != want || res.Claimed.Trailing != len(list) {
			t.Errorf("%s: %+v, %v", name, res.Proven, res.Err())
		}
	}
}

// TestViolationIsOnlyClaimed: a violation's name may be changed without anyone noticing, but not that it is one.
func TestViolationIsOnlyClaimed(t *testing.T) {
	made := append(entries(t, 1, nil), violation(t, "/true"))
	given := after(made, []ima.HashAlgo{ima.SHA256}, 10)
	changed := bytes.Replace(encode(made, ima.SHA1), []byte("/true"), []byte("/fals"), 1)
	if res := check(t, changed, Options{PCRs: given}); res.Err() != nil || res.Proven.Violations != 1 {
		t.Errorf("another name: %+v, %v", res.Proven, res.Err())
	}
	file, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: "/true"})
	if err != nil {
		t.Fatal(err)
	}
	turned := encode([]*imalog.Entry{made[0], file}, ima.SHA1)
	if res := check(t, turned, Options{PCRs: given}); kinds(res) != "pcr-mismatch@2" {
		t.Errorf("a violation turned into a file: %v", res.Err())
	}
	asEvmctl := imalog.NewReplay(ima.SHA256)
	for _, e := range made {
		asEvmctl.ExtendZeroViolations(e)
	}
	zeros := pcrs{10: {ima.SHA256: asEvmctl.Value(10, ima.SHA256)}}
	for _, zero := range []bool{false, true} {
		res := check(t, encode(made, ima.SHA1), Options{PCRs: zeros, ZeroViolations: zero})
		if res.Proven.Matched != zero {
			t.Errorf("ZeroViolations %v: %+v", zero, res.Proven)
		}
	}
}

func TestSeveralPCRs(t *testing.T) {
	made := entries(t, 5, map[int]int{1: 11, 3: 11, 5: 12})
	list := encode(made, ima.SHA1)
	sha256 := []ima.HashAlgo{ima.SHA256}
	at := func(pcr, n int) pcrs { return after(made[:n], sha256, pcr) }
	both := func(a, b pcrs) pcrs {
		out := make(pcrs)
		for _, p := range []pcrs{a, b} {
			for n, v := range p {
				out[n] = v
			}
		}
		return out
	}
	tests := []struct {
		name    string
		given   pcrs
		proven  Proven
		claimed Claimed
		broken  string
	}{
		{"PCR 10 only", at(10, 6), Proven{Matched: true, Prefix: 5, Entries: 3, BootAggregate: true}, Claimed{1, 2}, ""},
		{"PCR 11 only", at(11, 6), Proven{Matched: true, Prefix: 4, Entries: 2}, Claimed{2, 2}, ""},
		{"PCR 10 and 11", both(at(10, 6), at(11, 6)),
			Proven{Matched: true, Prefix: 5, Entries: 5, BootAggregate: true}, Claimed{1, 0}, ""},
		{"PCR 10 and 11 some time before", both(at(10, 3), at(11, 3)),
			Proven{Matched: true, Prefix: 3, Entries: 3, BootAggregate: true}, Claimed{3, 0}, ""},
		{"at different times", both(at(10, 1), at(11, 6)), Proven{}, Claimed{6, 0}, "pcr-mismatch@6 pcr-mismatch@6"},
		{"one of them wrong", both(at(10, 6), pcrs{11: {ima.SHA256: parse(t, "sha256:"+strings.Repeat("11", 32))}}), Proven{},
			Claimed{6, 0}, "pcr-mismatch@6"},
		{"a PCR that nobody extended", at(13, 6), Proven{Matched: true}, Claimed{6, 0}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := check(t, list, Options{PCRs: tt.given})
			res.Proven.End = 0
			if res.Proven != tt.proven || res.Claimed != tt.claimed || kinds(res) != tt.broken {
				t.Errorf("proven %+v, claimed %+v, broken %v", res.Proven, res.Claimed, res.Err())
			}
		})
	}
	// Two banks of one register that stopped at different entries.
	split := pcrs{10: {ima.SHA1: after(made[:3], allBanks(), 10)[10][ima.SHA1], ima.SHA256: at(10, 6)[10][ima.SHA256]}}
	res := check(t, list, Options{PCRs: split})
	if kinds(res) != "pcr-mismatch@6 pcr-mismatch@6" || !strings.Contains(res.Err().Error(), "3 entries lead to sha1:") {
		t.Errorf("banks apart: %v", res.Err())
	}
}

func TestBootAggregate(t *testing.T) {
	made := entries(t, 1, nil)
	b0, b1 := parse(t, "sha256:"+strings.Repeat("b0", 32)), parse(t, "sha256:"+strings.Repeat("b1", 32))
	notAggregate, err := imalog.NewViolation(10, imalog.NG, imalog.FieldValues{Digest: b0, Name: imalog.BootAggregateName})
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		list   []*imalog.Entry
		want   ima.Digest
		reason string
	}{
		{"any", made, ima.Digest{}, ""},
		{"expected", made, b0, ""},
		{"another", made, b1, "was expected"},
		{"other algorithm", made, ima.ZeroDigest(ima.SHA1), "was expected"},
		{"not first", []*imalog.Entry{made[1], made[0]}, ima.Digest{}, "begins with"},
		{"violation", []*imalog.Entry{notAggregate, made[1]}, ima.Digest{}, "is a violation"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := check(t, encode(tt.list, ima.SHA1), Options{BootAggregate: tt.want, PCRs: after(tt.list, allBanks(), 10)})
			if (tt.reason == "") != (res.Err() == nil) || tt.reason != "" && (kinds(res) != "boot-aggregate@0" ||
				!strings.Contains(res.Err().Error(), tt.reason)) {
				t.Errorf("%v", res.Err())
			}
			if res.Proven.Entries != 2 || res.Proven.BootAggregate == res.BootAggregate.IsNone() {
				t.Errorf("%+v, %s", res.Proven, res.BootAggregate)
			}
		})
	}
}

// TestCutBehindThePrefix: what the values prove stays proven.
func TestCutBehindThePrefix(t *testing.T) {
	made := entries(t, 5, nil)
	list := encode(made, ima.SHA1)
	size := int64(len(encode(made[:5], ima.SHA1)))
	given := after(made[:4], []ima.HashAlgo{ima.SHA256}, 10)
	res := check(t, list[:len(list)-1], Options{PCRs: given})
	var replay *ReplayError
	err := res.Err()
	if !errors.As(err, &replay) || replay.Kind != Cut || replay.Entry != 5 || replay.Offset != size ||
		!errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut: %v", err)
	}
	if res.Proven.Prefix != 4 || res.Claimed.Trailing != 1 || res.Entries != 5 || res.Size != size {
		t.Errorf("cut: %+v", res)
	}
	list[size+24] = 0xff // the length of the template's name
	res = check(t, list, Options{PCRs: given})
	var corrupt *imalog.CorruptError
	if !errors.As(res.Err(), &corrupt) || kinds(res) != "corrupt@5" || res.Proven.Prefix != 4 {
		t.Errorf("corrupt: %+v, %v", res.Proven, res.Err())
	}
}

func TestErrors(t *testing.T) {
	broken := errors.New("disk on fire")
	made := entries(t, 500, nil)
	list := encode(made, ima.SHA1)
	r := io.MultiReader(bytes.NewReader(list), iotest.ErrReader(broken))
	res, err := List(r, Options{PCRs: after(made, allBanks(), 10)})
	if !errors.Is(err, broken) || res.Proven.Prefix != 501 {
		t.Errorf("%v, %+v", err, res.Proven)
	}
	b0 := parse(t, "sha256:"+strings.Repeat("b0", 32))
	for name, opts := range map[string]Options{
		"file bank":    {FileBank: ima.SM3},
		"bank":         {Banks: []ima.HashAlgo{ima.MD5}},
		"PCR":          {PCRs: pcrs{24: {ima.SHA256: b0}}},
		"no value":     {PCRs: pcrs{10: {}}},
		"no digest":    {PCRs: pcrs{10: {ima.SHA256: ima.Digest{}}}},
		"other bank's": {PCRs: pcrs{10: {ima.SHA1: b0}}},
		"PCR's bank":   {PCRs: pcrs{10: {ima.SM3: ima.ZeroDigest(ima.SM3)}}},
	} {
		if res, err := List(bytes.NewReader(list), opts); err == nil || !reflect.DeepEqual(res, Result{}) {
			t.Errorf("%s: %v, %+v", name, err, res)
		}
	}
}

// TestManyBroken: the answer stays small, and all goroutines have ended.
func TestManyBroken(t *testing.T) {
	made := entries(t, 300, nil)
	list := encode(made, ima.SHA1)
	at := 0
	for _, e := range made {
		list[at+4] ^= 1
		at += e.Size(ima.SHA1)
	}
	before := runtime.NumGoroutine()
	res := check(t, list, Options{Banks: allBanks()})
	if len(res.Broken) != 100 || res.BrokenMore != 201 || !strings.Contains(res.Err().Error(), "and 201 more") {
		t.Errorf("%d broken, %d more", len(res.Broken), res.BrokenMore)
	}
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("%d goroutines, %d before", n, before)
	}
	for _, k := range []Kind{Cut, Corrupt, TemplateDigest, BootAggregate, PCRMismatch} {
		if strings.HasPrefix(k.String(), "kind-") {
			t.Errorf("kind %d has no name", k)
		}
	}
}
