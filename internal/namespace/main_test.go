package namespace

import (
	"os"
	"testing"

	"imans.dev/imans-agent/internal/need"
)

// An agent that crashes, as some tests have it, closes no vTPM's pidfd.
func TestMain(m *testing.M) { os.Exit(need.RunClean(m, "anon_inode:[pidfd]")) }
