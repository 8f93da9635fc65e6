package digest

import (
	"os"
	"testing"

	"imans.dev/imans-agent/internal/need"
)

func TestMain(m *testing.M) { os.Exit(need.RunClean(m)) }
