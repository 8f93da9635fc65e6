// Package need leaves tests out that want what the machine lacks, and makes that a failure where IMANS_REQUIRE_VM is set: there
// everything is to be had. Only tests import it.
package need

import (
	"os"
	"os/exec"
	"testing"
)

// Skip skips the test, or fails it where nothing may be left out.
func Skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("IMANS_REQUIRE_VM") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// Program returns where a program is.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Skip(t, "%s is missing: %v", name, err)
	}
	return path
}
