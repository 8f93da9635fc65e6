// Package standing is how a process stands among others where time or memory is short.
package standing

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Ranges of what the kernel takes. Source: setpriority(2), proc(5).
const (
	NiceMin, NiceMax = -20, 19
	OOMMin, OOMMax   = -1000, 1000
)

// Nice sets how soon this process runs among others, from NiceMin to NiceMax, the latest; so will what it starts.
func Nice(nice int) error {
	set := map[int]bool{}
	for { // it is a thread's; one that had its turn to come may have started another meanwhile
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		before := len(set)
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil {
				return err
			}
			if set[tid] {
				continue
			}
			if err := unix.Setpriority(unix.PRIO_PROCESS, tid, nice); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("set nice to %d: %w; less than before takes CAP_SYS_NICE", nice, err)
			}
			set[tid] = true
		}
		if len(set) == before {
			return nil
		}
	}
}

// OOMScore sets how soon the kernel ends this process, and what it starts, when memory runs out: from OOMMin, never, to OOMMax, first.
func OOMScore(adj int) error {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(adj)), 0); err != nil {
		return fmt.Errorf("set oom_score_adj to %d: %w; less than before takes CAP_SYS_RESOURCE", adj, err)
	}
	return nil
}

// lockMax is how much a process may lock that this one starts, in bytes: more than the program has.
const lockMax = 64 << 20

// StayInMemory keeps the program's own code and constants in memory. Where memory is short the kernel takes such pages away, as it can
// read them again, and a program that needs each of them now and then stands still for many seconds. What this process starts may do so, too.
func StayInMemory() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return fmt.Errorf("read how much may be locked in memory: %w", err)
	}
	if limit.Cur < lockMax {
		limit.Cur, limit.Max = lockMax, max(limit.Max, lockMax)
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
			return fmt.Errorf("lock the program in memory: %w; give it CAP_SYS_RESOURCE, or ulimit -l %d", err, lockMax>>10)
		}
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var start, end uintptr
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &start, &end, &mode); err != nil {
			return fmt.Errorf("read /proc/self/maps: %w", err)
		}
		if !strings.HasSuffix(lines.Text(), " "+exe) || mode[1] == 'w' {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, start, end-start, 0); errno != 0 {
			return fmt.Errorf("lock the program in memory: %w", errno)
		}
	}
	return lines.Err()
}
