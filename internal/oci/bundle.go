package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// specMax bounds a spec: nobody writes a larger one.
const specMax = 64 << 20

// Bundle is the folder from which a container is created.
type Bundle struct {
	Dir    string
	Config string // file of the spec, below Dir unless absolute; none: config.json
}

func (b Bundle) path() string {
	switch {
	case b.Config == "":
		return filepath.Join(b.Dir, "config.json")
	case filepath.IsAbs(b.Config):
		return b.Config
	}
	return filepath.Join(b.Dir, b.Config)
}

// firstPath is where the spec that was there first is kept, for root to read: it may hold a password.
func (b Bundle) firstPath() string { return b.path() + ".imans" }

// firstSpec is the spec that an edit of ours replaced.
type firstSpec struct {
	Edited string `json:"edited_sha256"` // of what it was replaced by
	Spec   string `json:"spec"`
}

// Read returns the bundle's spec, as it was before an edit of ours. One that somebody has changed since counts as it is.
func (b Bundle) Read() ([]byte, error) {
	spec, err := readBounded(b.path())
	if err != nil {
		return nil, fmt.Errorf("read the spec: %w", err)
	}
	kept, err := os.ReadFile(b.firstPath())
	if errors.Is(err, fs.ErrNotExist) {
		return spec, nil
	} else if err != nil {
		return nil, fmt.Errorf("read the spec that was there first: %w", err)
	}
	var first firstSpec
	if err := json.Unmarshal(kept, &first); err != nil {
		return nil, fmt.Errorf("read the spec that was there first: %s: %w; make the bundle anew", b.firstPath(), err)
	}
	if first.Edited == sum(spec) {
		return []byte(first.Spec), nil
	}
	return spec, nil
}

// Write puts the edited spec into the place of the one that Read returned, with the same mode and owner. A crash leaves the old
// or the new, and never one of which the first is lost.
func (b Bundle) Write(first, edited []byte) error {
	if string(first) != string(edited) {
		if err := replace(b.firstPath(), encode(firstSpec{sum(edited), string(first)}), 0o600, -1, -1); err != nil {
			return fmt.Errorf("keep the spec that was there first: %w", err)
		}
	}
	there, err := readBounded(b.path())
	if err == nil && string(there) == string(edited) {
		return nil
	}
	st, err := os.Stat(b.path())
	if err != nil {
		return fmt.Errorf("write the spec: %w", err)
	}
	uid, gid := -1, -1
	if owner, ok := st.Sys().(*syscall.Stat_t); ok {
		uid, gid = int(owner.Uid), int(owner.Gid)
	}
	if err := replace(b.path(), edited, st.Mode().Perm(), uid, gid); err != nil {
		return fmt.Errorf("write the spec: %w", err)
	}
	return nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > specMax {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, st.Size(), specMax)
	}
	return io.ReadAll(io.LimitReader(f, specMax))
}

// replace puts a file in place of any other of that name; uid and gid -1 are the caller's. Bundles do not outlive a crash of the
// machine, so nothing is synced.
func replace(path string, content []byte, mode fs.FileMode, uid, gid int) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Chown(uid, gid)
	}
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func sum(text []byte) string {
	digest := sha256.Sum256(text)
	return hex.EncodeToString(digest[:])
}
