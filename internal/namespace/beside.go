package namespace

import (
	"errors"
	"os"
)

// beside is a file beside a list's log, of records that an agent leaves to the next one of the same boot. It needs no sync: the machine's
// crash is the end of what it is about.
type beside struct {
	path string
	size int64 // of the whole records
}

// read returns the file's bytes; none if there is no file.
func (f *beside) read() ([]byte, error) {
	b, err := os.ReadFile(f.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// append adds a record. What an error left of one is overwritten by the next.
func (f *beside) append(record []byte) (err error) {
	file, err := os.OpenFile(f.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if _, err := file.WriteAt(record, f.size); err != nil {
		return err
	}
	f.size += int64(len(record))
	return nil
}
