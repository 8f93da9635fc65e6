// Command mapstore changes bytes of a file by storing them through a shared mapping, as no shell command does.
//
//	mapstore FILE OFFSET TEXT
//
// Exit status: 0 done; 1 it could not be done; 2 misuse.
package main

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "mapstore: want FILE OFFSET TEXT")
		os.Exit(2)
	}
	offset, err := strconv.Atoi(os.Args[2])
	if err == nil {
		err = store(os.Args[1], offset, os.Args[3])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mapstore:", err)
		os.Exit(1)
	}
}

// store overwrites what is at the offset. The file keeps its size.
func store(path string, offset int, text string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if offset < 0 || int64(offset+len(text)) > st.Size() {
		return fmt.Errorf("%s has %d bytes: %d at %d do not fit", path, st.Size(), len(text), offset)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", path, err)
	}
	// Read first: on tmpfs the kernel takes no notice of a store to a page that was.
	if string(m[offset:offset+len(text)]) == text {
		return fmt.Errorf("%s has that text at %d already", path, offset)
	}
	copy(m[offset:], text)
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return unix.Munmap(m)
}
