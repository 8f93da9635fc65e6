package proc

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Fields of Stat.
const (
	StatState  = 0  // a letter
	StatParent = 1  // process number
	StatStart  = 19 // clock ticks of 10 ms since boot
)

// Stat returns the fields of /proc/PID/stat behind the program's name, which may hold anything: the first is the state. There are
// all that the constants name. Source: fs/proc/array.c, do_task_stat.
func Stat(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	fields, err := parseStat(string(b))
	if err != nil {
		return nil, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	return fields, nil
}

func parseStat(text string) ([]string, error) {
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) <= StatStart {
		return nil, fmt.Errorf("%d fields behind the name", len(fields))
	}
	return fields, nil
}

// Namespace returns the inode number of a task's namespace; kind is its name in /proc/PID/ns. It may be held up: see Ask.
func Namespace(pid int, kind string) (uint32, error) {
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		return 0, err
	}
	n, err := parseNamespace(link)
	if err != nil {
		return 0, fmt.Errorf("read the %s namespace of task %d: %w", kind, pid, err)
	}
	return n, nil
}

// parseNamespace reads KIND:[NUMBER].
func parseNamespace(link string) (uint32, error) {
	_, number, _ := strings.Cut(strings.TrimSuffix(link, "]"), "[")
	n, err := strconv.ParseUint(number, 10, 32)
	return uint32(n), err
}
