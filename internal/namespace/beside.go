package namespace

import (
	"errors"
	"fmt"
	"os"
)

// beside is a file beside a list's log, of records that an agent leaves to the next one of the same boot. It needs no sync: the machine's
// crash is the end of what it is about.
type beside struct {
	path string
	size int64 // of the whole records
}

// open opens the file to read it; nil: there is none. One that is larger than an agent writes is an error.
func (f *beside) open(max int64) (*os.File, error) {
	file, err := os.Open(f.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	if err == nil && st.Size() > max {
		err = fmt.Errorf("%s has %d bytes, more than an agent writes; move it away and restart", f.path, st.Size())
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
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

// replace has the file be of other records. A crash of the agent, or an error, leaves the old ones.
func (f *beside) replace(records []byte) error {
	next := f.path + ".new"
	err := os.WriteFile(next, records, 0o600)
	if err == nil {
		err = os.Rename(next, f.path)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(next))
	}
	f.size = int64(len(records))
	return nil
}
