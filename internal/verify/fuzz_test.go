package verify

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// FuzzList: any bytes are judged without panic, the numbers add up, and the values that a list itself leads to prove
// all of it.
func FuzzList(f *testing.F) {
	files, err := filepath.Glob("../imalog/testdata/vectors/*.sha1.bin")
	if err != nil || len(files) == 0 {
		f.Fatalf("%d lists: %v", len(files), err)
	}
	for _, file := range files {
		list, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(list, uint16(0))
		f.Add(list, uint16(len(list)/2))
	}
	f.Fuzz(func(t *testing.T, list []byte, flip uint16) {
		if len(list) > 0 {
			list = bytes.Clone(list)
			list[int(flip)%len(list)] ^= byte(flip >> 8)
		}
		res := check(t, list, Options{Banks: []ima.HashAlgo{ima.SHA256, ima.SHA512}})
		if res.Proven != (Proven{}) || res.Size > int64(len(list)) || res.Size < int64(len(list)) && len(res.Broken) == 0 {
			t.Fatalf("without values: %+v of %d bytes", res, len(list))
		}
		given := make(pcrs)
		for _, c := range res.Computed {
			if given[c.PCR] == nil {
				given[c.PCR] = make(map[ima.HashAlgo]ima.Digest)
			}
			given[c.PCR][c.Value.Algo()] = c.Value
		}
		again := check(t, list, Options{PCRs: given})
		if res.Entries > 0 && (again.Proven.Entries != res.Entries || again.Proven.End != res.Size) {
			t.Fatalf("held against itself: %+v of %d entries", again.Proven, res.Entries)
		}
		if len(again.Broken) != len(res.Broken) || again.BrokenMore != res.BrokenMore {
			t.Fatalf("broken %v, held against itself %v", res.Err(), again.Err())
		}
	})
}
