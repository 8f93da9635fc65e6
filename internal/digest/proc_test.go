package digest

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// startOf returns when a process started, from /proc.
func startOf(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks int64
	if _, err := fmt.Sscan(fields[19], &ticks); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// mappingOf returns where this process has a file mapped.
func mappingOf(t *testing.T, path string) (start, end uint64) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(strings.TrimSpace(line), path) {
			if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
				t.Fatal(err)
			}
			return start, end
		}
	}
	t.Fatalf("%s is not mapped", path)
	return 0, 0
}
