package namespace

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"imans.dev/imans-agent/internal/event"
)

// held is which inodes a list tells of, and by which names: who opens one for writing while it is in use makes what the list tells
// doubtful. After a boot inodes begin anew.
// Memory: about 50 bytes an inode. The file has at most as many bytes that count no more as bytes that count, and heldSlack.
//
// The goroutine that handles records uses it.
type held struct {
	beside
	at map[event.Inode]heldRecord
	// unsaved are names for which there was no room on the disk.
	unsaved map[event.Inode]string
	live    int64 // bytes of the records that count
	compact int64 // the file's size below which it is not to be written anew
	// When it is full: so many inodes, or so many bytes of records that count.
	maxInodes int
	maxBytes  int64
}

// heldRecord is where an inode's name is in the file, and what tells it from another.
type heldRecord struct {
	offset int64
	sum    uint32 // CRC-32 of the name
	length uint16 // of the name
}

func (r heldRecord) size() int64 { return heldHeader + int64(r.length) }

// heldName is the file's name in a namespace's folder.
const heldName = "held_inodes"

// A record of the file: four numbers, little endian, of which the length says how much of a name follows.
const (
	heldHeader  = 20
	heldDropped = ^uint32(0) // as a length: the inode is not held any more
	heldNameMax = 1 << 16
)

const (
	// heldInodes is how many inodes a list holds at most: as many as the kernel side does for all.
	heldInodes = 262144
	// heldBytes is how large the records of what a list holds may be.
	heldBytes = 16 << 20
	// heldSlack is how many bytes that count no more are not worth writing the file anew.
	heldSlack = 64 << 10
	// heldFileMax is how large the file may be, where the disk let no smaller one be written.
	heldFileMax = 3 * heldBytes
)

// openHeld reads what an earlier agent wrote, if there was one. What is not whole at the end was not written.
func openHeld(dir string) (*held, error) {
	h := &held{
		beside: beside{path: filepath.Join(dir, heldName)}, at: make(map[event.Inode]heldRecord), unsaved: make(map[event.Inode]string),
		maxInodes: heldInodes, maxBytes: heldBytes,
	}
	f, err := h.open(heldFileMax + heldHeader + heldNameMax)
	if f != nil {
		err = errors.Join(h.load(f), f.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("read which inodes a list tells of: %w", err)
	}
	return h, nil
}

// load goes through the file, of which it has no more in memory than one record.
func (h *held) load(f *os.File) error {
	r := bufio.NewReaderSize(f, heldHeader+heldNameMax)
	for {
		b, err := r.Peek(heldHeader)
		if err == nil {
			i, n := decodeHeld(b)
			if n == heldDropped {
				h.forget(i)
				b = b[:heldHeader]
			} else if n >= heldNameMax {
				err = io.EOF
			} else if b, err = r.Peek(heldHeader + int(n)); err == nil {
				h.put(i, heldRecord{h.size, crc32.ChecksumIEEE(b[heldHeader:]), uint16(n)})
			}
		}
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		h.size += int64(len(b))
		if _, err := r.Discard(len(b)); err != nil {
			return err
		}
	}
	st, err := f.Stat()
	if err == nil && st.Size() > h.size {
		err = os.Truncate(h.path, h.size)
	}
	if err != nil {
		return fmt.Errorf("cut what is not whole: %w", err)
	}
	return nil
}

func decodeHeld(b []byte) (i event.Inode, length uint32) {
	le := binary.LittleEndian
	return event.Inode{Dev: le.Uint32(b[4:]), Generation: le.Uint32(b[8:]), Ino: le.Uint64(b[12:])}, le.Uint32(b)
}

func appendHeld(b []byte, i event.Inode, length uint32, name string) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, length)
	b = le.AppendUint32(b, i.Dev)
	b = le.AppendUint32(b, i.Generation)
	return append(le.AppendUint64(b, i.Ino), name...)
}

func (h *held) put(i event.Inode, r heldRecord) {
	h.forget(i)
	h.at[i] = r
	h.live += r.size()
}

func (h *held) forget(i event.Inode) {
	if r, ok := h.at[i]; ok {
		h.live -= r.size()
		delete(h.at, i)
		delete(h.unsaved, i)
	}
}

// has reports whether an inode is held.
func (h *held) has(i event.Inode) bool {
	_, ok := h.at[i]
	return ok
}

// add holds an inode by a name, the latest: numbers of inodes are given again, so it need not be the same file. After an error it is
// held all the same, and the next agent does not know.
func (h *held) add(i event.Inode, name string) error {
	name = name[:min(len(name), heldNameMax-1)]
	r := heldRecord{h.size, crc32.ChecksumIEEE([]byte(name)), uint16(len(name))}
	if known, ok := h.at[i]; ok && known.sum == r.sum && known.length == r.length {
		return nil
	}
	err := h.note(i, uint32(len(name)), name)
	h.put(i, r)
	if err != nil {
		h.unsaved[i] = name
	}
	h.tidy()
	return err
}

// drop lets go of an inode. After an error the next agent holds it again.
func (h *held) drop(i event.Inode) error {
	h.forget(i)
	err := h.note(i, heldDropped, "")
	h.tidy()
	return err
}

func (h *held) note(i event.Inode, length uint32, name string) error {
	err := fmt.Errorf("%s has %d bytes and could not be written anew", h.path, h.size)
	if h.size < heldFileMax {
		err = h.append(appendHeld(nil, i, length, name))
	}
	if err != nil {
		return fmt.Errorf("note which inodes a list tells of: %w", err)
	}
	return nil
}

// full reports how many inodes must go before another one has room: none, or the half that was held first.
func (h *held) full() (surplus int) {
	if len(h.at) < h.maxInodes && h.live < h.maxBytes {
		return 0
	}
	return (len(h.at) + 1) / 2
}

// dropFirst lets go of so many inodes, those that were held first. After an error the next agent holds them again.
func (h *held) dropFirst(n int) error {
	for _, i := range h.inOrder()[:n] {
		h.forget(i)
	}
	return h.rewrite()
}

// inOrder returns the inodes in the order in which their records were written.
func (h *held) inOrder() []event.Inode {
	return slices.SortedFunc(maps.Keys(h.at), func(a, b event.Inode) int { return cmp.Compare(h.at[a].offset, h.at[b].offset) })
}

// tidy writes the file anew if more of it counts no more than does. Where the disk does not let it, it grows for a while before the next try,
// up to heldFileMax.
func (h *held) tidy() {
	if dead := h.size - h.live; dead <= h.live || dead <= heldSlack || h.size < h.compact {
		return
	}
	if h.rewrite() != nil {
		h.compact = h.size + heldSlack
	}
}

// rewrite has the file be of what counts only. A crash leaves the old one or the new one.
func (h *held) rewrite() error {
	b := make([]byte, 0, h.live)
	order := h.inOrder()
	f, err := os.Open(h.path)
	if err == nil {
		defer f.Close()
	} else if !errors.Is(err, os.ErrNotExist) { // there was no room for any of them
		return fmt.Errorf("write anew which inodes a list tells of: %w", err)
	}
	for _, i := range order {
		name, err := h.nameIn(f, i)
		if err != nil {
			return err
		}
		b = appendHeld(b, i, uint32(len(name)), name)
	}
	if err := h.replace(b); err != nil {
		return fmt.Errorf("write anew which inodes a list tells of: %w", err)
	}
	offset := int64(0)
	for _, i := range order {
		r := h.at[i]
		r.offset = offset
		h.at[i] = r
		offset += r.size()
	}
	h.compact = 0
	clear(h.unsaved)
	return nil
}

// name returns the name by which an inode is held; false: it is not, or, with an error, its name can't be read.
func (h *held) name(i event.Inode) (string, bool, error) {
	if !h.has(i) {
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
	name, err := h.nameIn(f, i)
	return name, err == nil, err
}

// nameIn returns the name of an inode that is held.
func (h *held) nameIn(f *os.File, i event.Inode) (string, error) {
	if name, ok := h.unsaved[i]; ok {
		return name, nil
	}
	r := h.at[i]
	b := make([]byte, r.size())
	if _, err := f.ReadAt(b, r.offset); err != nil && err != io.EOF {
		return "", fmt.Errorf("read which inodes a list tells of: %w", err)
	}
	name := b[heldHeader:]
	if found, length := decodeHeld(b); found != i || length != uint32(r.length) || crc32.ChecksumIEEE(name) != r.sum {
		return "", fmt.Errorf("read which inodes a list tells of: %s is not what this agent wrote", h.path)
	}
	return string(name), nil
}
