package vm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	containerdVersion = "v2.2.9"
	containerdModule  = "github.com/containerd/containerd/v2"
	// containerdTags leave out what no test wants.
	containerdTags = "no_btrfs no_devmapper no_zfs no_tracing"
	// containerdFolder is where a payload has the programs. They are not in its top: guest.sh does not install them.
	containerdFolder = "containerd"
	// containerdTests is in the names of the tests that take them.
	containerdTests = "NRI"
)

// containerdPrograms are built; Debian's release has no containerd that tells plugins which process a container's is.
func containerdPrograms() []string { return []string{"containerd", "containerd-shim-runc-v2", "ctr"} }

// containerd returns a folder with containerd's programs, static, built from the Go module proxy.
func (c *Cache) containerd(ctx context.Context) (string, error) {
	args := []string{"GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0", "go", "install", "-trimpath", "-tags=" + containerdTags,
		"-ldflags=-s -w -X " + containerdModule + "/version.Version=" + containerdVersion}
	for _, name := range containerdPrograms() {
		args = append(args, containerdModule+"/cmd/"+name+"@"+containerdVersion)
	}
	return c.entry(ctx, "containerd", strings.Join(args, "\n"), func(ctx context.Context, dir string) error {
		_, err := command(ctx, dir, "env", append([]string{"GOBIN=" + dir}, args...)...)
		return err
	})
}

// addContainerd puts containerd into the payload.
func (p *Payload) addContainerd(ctx context.Context, cache *Cache) error {
	from, err := cache.containerd(ctx)
	if err != nil {
		return err
	}
	to := filepath.Join(p.Dir, containerdFolder)
	if err := os.Mkdir(to, 0o755); err != nil {
		return fmt.Errorf("put containerd into the payload: %w", err)
	}
	for _, name := range containerdPrograms() {
		if err := CopyFile(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			return fmt.Errorf("put containerd into the payload: %w", err)
		}
	}
	return nil
}
