package namespace

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"imans.dev/imans-agent/internal/event"
)

// held is which inodes a list tells of, and by which names: who opens one for writing while it is in use makes what the list tells
// doubtful. After a boot inodes begin anew.
// Memory: about 50 bytes an inode.
//
// The goroutine that handles records uses it.
type held struct {
	beside
	at map[event.Inode]heldRecord
	// unsaved are names for which there was no room on the disk.
	unsaved map[event.Inode]string
}

// heldRecord is where an inode's name is in the file, and what tells it from another.
type heldRecord struct {
	offset int64
	sum    uint32 // CRC-32 of the name
}

// heldName is the file's name in a namespace's folder.
const heldName = "held_inodes"

// A record of the file: four numbers, little endian, of which the length says how much of a name follows.
const (
	heldHeader  = 20
	heldDropped = ^uint32(0) // as a length: the inode is not held any more
	heldNameMax = 1 << 16
)

// openHeld reads what an earlier agent wrote, if there was one. What is not whole at the end was not written.
func openHeld(dir string) (*held, error) {
	h := &held{
		beside: beside{path: filepath.Join(dir, heldName)}, at: make(map[event.Inode]heldRecord), unsaved: make(map[event.Inode]string),
	}
	b, err := h.read()
	if err != nil {
		return nil, fmt.Errorf("read which inodes a list tells of: %w", err)
	}
	for int64(len(b))-h.size >= heldHeader {
		i, n := decodeHeld(b[h.size:])
		if n == heldDropped {
			delete(h.at, i)
			n = 0
		} else if n >= heldNameMax || h.size+heldHeader+int64(n) > int64(len(b)) {
			break
		} else {
			h.at[i] = heldRecord{h.size, crc32.ChecksumIEEE(b[h.size+heldHeader:][:n])}
		}
		h.size += heldHeader + int64(n)
	}
	if h.size < int64(len(b)) {
		if err := os.Truncate(h.path, h.size); err != nil {
			return nil, fmt.Errorf("cut what is not whole: %w", err)
		}
	}
	return h, nil
}

func decodeHeld(b []byte) (i event.Inode, length uint32) {
	le := binary.LittleEndian
	return event.Inode{Dev: le.Uint32(b[4:]), Generation: le.Uint32(b[8:]), Ino: le.Uint64(b[12:])}, le.Uint32(b)
}

// add holds an inode by a name, the latest: numbers of inodes are given again, so it need not be the same file. After an error it is
// held all the same, and the next agent does not know.
func (h *held) add(i event.Inode, name string) error {
	name = name[:min(len(name), heldNameMax-1)]
	r := heldRecord{h.size, crc32.ChecksumIEEE([]byte(name))}
	if known, ok := h.at[i]; ok && known.sum == r.sum {
		return nil
	}
	err := h.note(i, uint32(len(name)), name)
	if err != nil {
		h.unsaved[i] = name
	} else {
		delete(h.unsaved, i)
	}
	h.at[i] = r
	return err
}

// drop lets go of an inode. After an error the next agent holds it again.
func (h *held) drop(i event.Inode) error {
	delete(h.at, i)
	delete(h.unsaved, i)
	return h.note(i, heldDropped, "")
}

func (h *held) note(i event.Inode, length uint32, name string) error {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, length)
	b = le.AppendUint32(b, i.Dev)
	b = le.AppendUint32(b, i.Generation)
	if err := h.append(append(le.AppendUint64(b, i.Ino), name...)); err != nil {
		return fmt.Errorf("note which inodes a list tells of: %w", err)
	}
	return nil
}

// name returns the name by which an inode is held; false: it is not, or, with an error, its name can't be read.
func (h *held) name(i event.Inode) (string, bool, error) {
	r, ok := h.at[i]
	if !ok {
		return "", false, nil
	}
	if name, ok := h.unsaved[i]; ok {
		return name, true, nil
	}
	f, err := os.Open(h.path)
	if err != nil {
		return "", false, fmt.Errorf("read which inodes a list tells of: %w", err)
	}
	defer f.Close()
	b := make([]byte, heldHeader+heldNameMax)
	n, err := f.ReadAt(b, r.offset)
	if err != nil && err != io.EOF {
		return "", false, fmt.Errorf("read which inodes a list tells of: %w", err)
	}
	found, length := decodeHeld(b)
	if n < heldHeader || found != i || heldHeader+int64(length) > int64(n) {
		return "", false, fmt.Errorf("read which inodes a list tells of: %s is not what this agent wrote", h.path)
	}
	return string(b[heldHeader : heldHeader+length]), true, nil
}
