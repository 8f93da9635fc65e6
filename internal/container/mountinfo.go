package container

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is one line of /proc/PID/mountinfo.
type mount struct {
	id     int
	dev    uint64
	root   string
	point  string
	ro     bool // this mount, whatever its file system is
	shared int  // number of the peer group; 0: none
	fsType string
	source string
}

// ours reports whether the mount says that it is of our file system. A container that may mount can say so, too.
func (m mount) ours() bool { return m.fsType == FSType && m.source == Source }

func (m mount) window() Window {
	return Window{Point: m.point, Root: m.root, ID: m.id, Dev: m.dev, ReadOnly: m.ro}
}

// readMounts reads and parses a mountinfo file.
func readMounts(dir int, path string) ([]mount, error) {
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	return parseMounts(string(text))
}

// parseMounts parses the text of a mountinfo file.
func parseMounts(text string) ([]mount, error) {
	var mounts []mount
	for line := range strings.Lines(text) {
		m, err := parseMount(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("parse mountinfo line %d: %w", len(mounts)+1, err)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// parseMount parses a line: ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG[:VALUE]…] - TYPE SOURCE SUPER-OPTIONS. Names have
// blanks, tabs, newlines, backslashes and, since Linux 6.6, number signs as \ and three octal digits.
func parseMount(line string) (mount, error) {
	var m mount
	fields := strings.Split(line, " ")
	const fixed = 6
	dash := fixed
	for dash < len(fields) && fields[dash] != "-" {
		dash++
	}
	if len(fields) < dash+4 {
		return m, fmt.Errorf("%d fields, want at least %d", len(fields), dash+4)
	}
	id, err := strconv.ParseUint(fields[0], 10, 31)
	if err != nil {
		return m, fmt.Errorf("mount id: %w", err)
	}
	major, minor, _ := strings.Cut(fields[2], ":")
	ma, err := strconv.ParseUint(major, 10, 32)
	if err != nil {
		return m, fmt.Errorf("device: %w", err)
	}
	mi, err := strconv.ParseUint(minor, 10, 32)
	if err != nil {
		return m, fmt.Errorf("device: %w", err)
	}
	for _, tag := range fields[fixed:dash] {
		if group, ok := strings.CutPrefix(tag, "shared:"); ok {
			n, err := strconv.ParseUint(group, 10, 31)
			if err != nil {
				return m, fmt.Errorf("peer group: %w", err)
			}
			m.shared = int(n)
		}
	}
	m.id, m.dev = int(id), unix.Mkdev(uint32(ma), uint32(mi))
	m.root, m.point, m.ro = unescape(fields[3]), unescape(fields[4]), fields[5] == "ro" || strings.HasPrefix(fields[5], "ro,")
	m.fsType, m.source = unescape(fields[dash+1]), unescape(fields[dash+2])
	return m, nil
}

// unescape undoes the kernel's octal escapes. What is none stays as it is.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b = append(b, byte(c))
				i += 3
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}
