package vm

import (
	"bufio"
	"fmt"
	"io"
)

// cpioWriter writes the "new ASCII" archive format that the kernel unpacks as its initial file system
// (Documentation/driver-api/early-userspace/buffer-format.rst): a header of 13 hexadecimal fields, the name, the content;
// name and content each padded to four bytes. The first error is kept and returned by Close.
type cpioWriter struct {
	w     *bufio.Writer
	inode int
	err   error
}

const (
	cpioRegular = 0o100000
	cpioFolder  = 0o040000
	cpioTrailer = "TRAILER!!!"
	cpioHeader  = 110
)

func newCPIO(w io.Writer) *cpioWriter { return &cpioWriter{w: bufio.NewWriterSize(w, 1<<20)} }

// Dir adds a folder.
func (c *cpioWriter) Dir(name string) { c.member(name, cpioFolder|0o755, nil) }

// File adds a regular file.
func (c *cpioWriter) File(name string, mode int, content []byte) {
	c.member(name, cpioRegular|mode, content)
}

// Close ends the archive; the underlying writer stays open.
func (c *cpioWriter) Close() error {
	c.member(cpioTrailer, 0, nil)
	if c.err == nil {
		c.err = c.w.Flush()
	}
	return c.err
}

func (c *cpioWriter) member(name string, mode int, content []byte) {
	if c.err != nil {
		return
	}
	c.inode++
	// magic, inode, mode, uid, gid, links, mtime, size, device major and minor, rdev major and minor, name size, checksum
	_, c.err = fmt.Fprintf(c.w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	c.pad(cpioHeader + len(name) + 1)
	if c.err == nil {
		_, c.err = c.w.Write(content)
	}
	c.pad(len(content))
}

// pad writes zeros up to a multiple of four after n bytes.
func (c *cpioWriter) pad(n int) {
	if c.err == nil {
		_, c.err = c.w.Write(make([]byte, -n&3))
	}
}
