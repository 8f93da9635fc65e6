package main

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

var (
	attachedAK = "000b" + strings.Repeat("a1", 32)
	endedAK    = "000b" + strings.Repeat("a2", 32)
	otherAK    = "000b" + strings.Repeat("a3", 32)
)

// nativeList writes a list with one vTPM that is attached and one that has ended, and returns PCR 10 in SHA-256.
func nativeList(t *testing.T) (path, value string) {
	t.Helper()
	d := ima.ZeroDigest(ima.SHA256)
	boot, err := imalog.BootAggregate(10, imalog.NG, d)
	if err != nil {
		t.Fatal(err)
	}
	list := []*imalog.Entry{boot}
	for i, ak := range []string{attachedAK, endedAK} {
		name, err := binding.ParseName(ak)
		if err != nil {
			t.Fatal(err)
		}
		id := binding.ID{Inum: 7, NSID: uint64(70 + i), Number: 1}
		a := binding.Attach{ID: id, TPM: binding.TPM20, Way: binding.Socket, PCR: 10, Container: "c1", EK: name, AK: name, ImageDigest: d}
		list = append(list, bound(t, binding.AttachName, &a))
	}
	end := binding.End{ID: binding.ID{Inum: 7, NSID: 71, Number: 1}, Cause: binding.Lost, Entries: 3, Values: []ima.Digest{d}}
	list = append(list, bound(t, binding.EndName, &end))
	replay := imalog.NewReplay(ima.SHA256)
	var b []byte
	for _, e := range list {
		b = e.AppendBinary(b, ima.SHA1)
		replay.Extend(e)
	}
	path = filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, replay.Value(10, ima.SHA256).String()
}

func bound(t *testing.T, name string, of interface{ Encode() ([]byte, error) }) *imalog.Entry {
	t.Helper()
	b, err := of.Encode()
	if err != nil {
		t.Fatal(err)
	}
	e, err := imalog.NewBuffer(10, name, ima.SHA256, b)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func runVerify(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), append([]string{"verify"}, args...), &out, &errs)
	return status, out.String(), errs.String()
}

// A list vouches for the vTPM that is attached, for no other, and says so by its exit status.
func TestVerifyAKName(t *testing.T) {
	path, value := nativeList(t)
	for _, c := range []struct {
		name   string
		args   []string
		status int
		says   string
	}{
		{"no key asked for", nil, 0, "AK " + attachedAK},
		{"the attached one", []string{"--ak-name", attachedAK}, 0, "yes: " + attachedAK},
		{"the attached one, in capitals", []string{"--ak-name", strings.ToUpper(attachedAK)}, 0, "yes: " + attachedAK},
		{"one that has ended", []string{"--ak-name", endedAK}, exitBad, "NO: " + endedAK},
		{"one that never was", []string{"--ak-name", otherAK}, exitBad, "NO: " + otherAK},
		{"proven", []string{"--ak-name", attachedAK, "--pcr", "10=" + value}, 0, "entry 1, proven"},
		{"the values prove nothing of it", []string{"--ak-name", attachedAK, "--pcr", "11=sha256:" + strings.Repeat("00", 32)}, exitBad, "NO"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, out, errs := runVerify(t, append(c.args, path)...)
			if status != c.status || !strings.Contains(strings.Join(strings.Fields(out), " "), c.says) {
				t.Errorf("status %d\n%s%s", status, out, errs)
			}
		})
	}
	if status, _, errs := runVerify(t, "--ak-name", "000b12", path); status != exitUsage || !strings.Contains(errs, "--ak-name") {
		t.Errorf("a Name cut: status %d, %s", status, errs)
	}
}

func TestVerifyBindingsJSON(t *testing.T) {
	path, value := nativeList(t)
	status, out, errs := runVerify(t, "--json", "--ak-name", endedAK, "--pcr", "10="+value, path)
	var j resultJSON
	if err := json.Unmarshal([]byte(out), &j); err != nil || status != exitBad {
		t.Fatalf("status %d, %v\n%s%s", status, err, out, errs)
	}
	if len(j.Bindings) != 2 || j.VouchesFor == nil || *j.VouchesFor || j.OK || len(j.Broken) != 0 || j.Trust != "" {
		t.Fatalf("%s", out)
	}
	first, second := j.Bindings[0], j.Bindings[1]
	if first.End != nil || !first.Proven || first.Entry != 1 || first.AK != attachedAK || first.Namespace != "7:70" || first.Number != 1 ||
		first.Container != "c1" || first.Way != "socket" || first.TPM != "2.0" || first.ImageDigest != ima.ZeroDigest(ima.SHA256).String() {
		t.Errorf("attached: %+v", first)
	}
	if e := second.End; e == nil || e.Cause != "lost" || e.Entries != 3 || !e.Proven || e.Entry != 3 || len(e.Values) != 1 {
		t.Errorf("ended: %+v", e)
	}
}

// What the agent gives values of is hardware or software, and that is told.
func TestVerifyTrust(t *testing.T) {
	path, value := nativeList(t)
	for _, c := range []struct {
		software bool
		want     backing
	}{{true, software}, {false, hardware}} {
		dir := t.TempDir()
		listener, err := net.Listen("unix", filepath.Join(dir, control.SocketName))
		if err != nil {
			t.Fatal(err)
		}
		answer := control.PCRs{PCR: 10, Values: []string{value}, Software: c.software}
		server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(answer) })}
		go server.Serve(listener) // ends with Close
		status, out, errs := runVerify(t, "--ns", "native", "--run-dir", dir, path)
		words := strings.Fields(out)
		if i := slices.Index(words, "trust"); status != 0 || i < 0 || words[i+1] != string(c.want)+":" {
			t.Errorf("status %d\n%s%s", status, out, errs)
		}
		_, out, _ = runVerify(t, "--json", "--ns", "native", "--run-dir", dir, path)
		var j resultJSON
		if err := json.Unmarshal([]byte(out), &j); err != nil || j.Trust != c.want {
			t.Errorf("%v: %s", err, out)
		}
		server.Close()
	}
}
