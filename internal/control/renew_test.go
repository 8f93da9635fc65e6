package control

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"
)

// One that cleans /run takes the socket, or its whole folder: it comes again, and asking goes on.
func TestSocketIsMadeAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", SocketName)
	s, err := Listen(path, Config{Do: func(ctx context.Context, f func(context.Context) error) error { return f(ctx) }, Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	connected := NewClient(path)
	ask := func(c *Client) error {
		body, err := c.get(t.Context(), "/v1/openapi.yaml")
		if err == nil {
			err = body.Close()
		}
		return err
	}
	if err := ask(connected); err != nil {
		t.Fatal(err)
	}
	for _, gone := range []string{path, filepath.Dir(path)} {
		if err := os.RemoveAll(gone); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			err := ask(NewClient(path))
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
		for file, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
			if st, err := os.Stat(file); err != nil || st.Mode().Perm() != want {
				t.Errorf("%s: %v, %v", file, st.Mode(), err)
			}
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("after the end the socket is there: %v", err)
	}
}
