package measure

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// FuzzOpen: whatever a log holds, a list goes on with all of its whole entries, having cut what is not whole at its end; or it is refused,
// and the log is left as it was.
func FuzzOpen(f *testing.F) {
	whole := entry(f, 1).AppendBinary(nil, ima.SHA1)
	whole = entry(f, 2).AppendBinary(whole, ima.SHA1)
	f.Add(whole)
	f.Add(violation(f).AppendBinary(whole, ima.SHA1))
	f.Add(whole[:len(whole)-5])
	f.Fuzz(func(t *testing.T, log []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, LogName)
		if err := os.WriteFile(path, log, 0o600); err != nil {
			t.Fatal(err)
		}
		open := func() (int, error) {
			l, r, err := Open(t.Context(), Config{Dir: dir, PCR: 10, Template: imalog.NG, Algo: ima.SHA256, Store: NewStore(), Log: zap.NewNop()})
			if err != nil {
				return 0, err
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			return r.Entries, nil
		}
		entries, err := open()
		now, readErr := os.ReadFile(path)
		if readErr != nil {
			t.Fatal(readErr)
		}
		if err != nil {
			if !bytes.Equal(now, log) {
				t.Fatalf("refused (%v), and changed", err)
			}
			return
		}
		if !bytes.HasPrefix(now, wholeEntries(log)) {
			t.Fatal("what was whole is changed")
		}
		if again, err := open(); err != nil || again < entries {
			t.Fatalf("opened again: %d entries, had %d; %v", again, entries, err)
		}
	})
}

// wholeEntries returns the log without what is not whole at its end.
func wholeEntries(log []byte) (whole []byte) {
	r := imalog.NewReader(bytes.NewReader(log), ima.SHA1)
	for {
		e, err := r.Next()
		if err != nil {
			return whole
		}
		whole = e.AppendBinary(whole, ima.SHA1)
	}
}
