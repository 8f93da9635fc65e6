package gate

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Waiting returns the numbers of all tasks that wait for an answer of a fanotify group, whoever's it is. Source: fs/notify/fanotify/fanotify.c,
// fanotify_handle_event. One whose place in the kernel this process may not see is left out.
func Waiting() []int { return asleep("[0-9]*", "fanotify_") }

// heldUp reports whether a process that was ended is not gone, as who waits at one of its groups holds another of them (see letGo).
func heldUp(pid int) bool { return len(asleep(strconv.Itoa(pid), "fsnotify_destroy_group")) > 0 }

// asleep returns the tasks of some processes that sleep in a function of the kernel, by the beginning of its name.
func asleep(processes, function string) (tasks []int) {
	places, err := filepath.Glob(filepath.Join("/proc", processes, "task/[0-9]*/wchan"))
	if err != nil {
		return nil
	}
	for _, path := range places {
		place, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(place), function) {
			continue
		}
		if task, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			tasks = append(tasks, task)
		}
	}
	return tasks
}
