package vtpm

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzFolder: whatever the files of a vTPM's folder hold, they are read or refused; what they name is in that folder.
func FuzzFolder(f *testing.F) {
	f.Add([]byte(`{"ek":"000b","ak":"000b","ek_certificate":"ek.der","banks":["sha1","sha256"]}`))
	f.Add([]byte(`{"ek_certificate":"..","banks":[]}`))
	f.Add([]byte(`{"pid":12,"start":"5","version":"2.0"}`))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := t.TempDir()
		for _, name := range []string{identityName, recordName} {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if i, err := ReadIdentity(dir); err == nil && filepath.Dir(i.EKCertificate) != dir {
			t.Fatalf("the certificate is %s, and the folder %s", i.EKCertificate, dir)
		}
		readRecord(dir)
		path := filepath.Join(dir, recordName)
		if key, err := readKey(path); (key == nil) == (err == nil) {
			t.Fatalf("key %v, %v", key, err)
		}
		if c, err := readCertificate(path); (c == nil) == (err == nil) {
			t.Fatalf("certificate %v, %v", c, err)
		}
	})
}
