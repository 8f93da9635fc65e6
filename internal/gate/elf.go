package gate

import (
	"bytes"
	"debug/elf"
	"io"
	"os"
)

// fileKind is what an exec makes of a file.
type fileKind int

const (
	other       fileKind = iota // a script, a static program, or what binfmt_misc knows
	dynamic                     // an ELF program that names an interpreter, which the exec opens next
	interpreter                 // an ELF shared object that names none: such an interpreter, or a static program that can be moved
)

// kindOf looks at the file's headers. A file that is no sound ELF file is other.
func kindOf(f io.ReaderAt) fileKind {
	e, err := elf.NewFile(f)
	if err != nil {
		return other
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			return dynamic
		}
	}
	if e.Type == elf.ET_DYN {
		return interpreter
	}
	return other
}

// isELF reports whether a regular file begins as ELF files do.
func isELF(f *os.File) (bool, error) {
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return false, err
	}
	magic := make([]byte, len(elf.ELFMAG))
	if _, err := f.ReadAt(magic, 0); err == io.EOF {
		return false, nil
	} else if err != nil {
		return false, err
	}
	return bytes.Equal(magic, []byte(elf.ELFMAG)), nil
}
