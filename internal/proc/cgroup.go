package proc

import (
	"fmt"
	"os"
	"strings"
)

// CgroupName returns the last part of a process's control group (cgroup v2), which container runtimes name by the container's id; "" if
// there is none to be seen. Claimed by whoever made the group; no list vouches for it.
func CgroupName(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	return cgroupName(string(b))
}

func cgroupName(text string) string {
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return strings.TrimSuffix(path[strings.LastIndexByte(path, '/')+1:], ".scope")
		}
	}
	return ""
}
