package main

import (
	"crypto/sha256"
	"fmt"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// makeEntry makes the n-th of many different entries, as long as usual ones.
func makeEntry(n int) *imalog.Entry {
	sum := sha256.Sum256([]byte(fmt.Sprint(n)))
	d, err := ima.NewDigest(ima.SHA256, sum[:])
	if err != nil {
		panic(err)
	}
	e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: d, Name: fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libsomething-%d.so.1", n)})
	if err != nil {
		panic(err)
	}
	return e
}
