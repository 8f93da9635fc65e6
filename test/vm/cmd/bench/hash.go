package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
)

const hashPairs = 41

// benchHash compares the agent's hashing of a large file with SHA-256 of the same bytes in memory.
func benchHash(_ context.Context, dir string) ([]figure, error) {
	content := make([]byte, 64<<20)
	for i := range content {
		content[i] = byte(i * 7)
	}
	path := filepath.Join(dir, "large")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(path)
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		return nil, err
	}
	ev := &event.File{Path: path, RealFS: event.FileSystem{Magic: unix.EXT4_SUPER_MAGIC}, Content: event.Content{
		Dev: st.Dev_major<<20 | st.Dev_minor, Ino: st.Ino, Size: st.Size, CtimeSec: st.Ctime.Sec, CtimeNsec: st.Ctime.Nsec}}
	ours, plain, err := pairs(hashPairs,
		func() (cost, error) {
			return timed(func() error {
				_, err := digest.Sum(context.Background(), f, ev, ima.SHA256)
				return err
			})
		},
		func() (cost, error) {
			return timed(func() error {
				sha256.Sum256(content)
				return nil
			})
		})
	if err != nil {
		return nil, err
	}
	rate := func(c []cost, by func(cost) time.Duration) float64 {
		return float64(len(content)) / 1e6 / middle(c, by).Seconds()
	}
	return []figure{{
		name: "hashing a 64 MiB file: speed to plain SHA-256 in memory", format: "%.3f", target: "at least 0.95",
		ratios: ratios(ours, plain, wall), parts: fmt.Sprintf("%.0f : %.0f MB/s", rate(ours, wall), rate(plain, wall)),
	}, {
		name: "the same, in processor time of all processors", format: "%.3f",
		ratios: ratios(ours, plain, cpu), parts: fmt.Sprintf("%.0f : %.0f MB/s", rate(ours, cpu), rate(plain, cpu)),
	}}, nil
}
