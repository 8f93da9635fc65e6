package imalog

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// FuzzReader: any bytes read without panic; each entry read is written again as it was but for a template digest that
// was not the data's; what is written is read as the same; its line in the ascii list is one line; and errors tell
// where.
func FuzzReader(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(v.read(f, ima.SHA1, "bin"), uint8(ima.SHA1))
		f.Add(v.read(f, ima.SHA256, "bin"), uint8(ima.SHA256))
	}
	f.Fuzz(func(t *testing.T, list []byte, algo uint8) {
		bank := ima.HashAlgo(algo)
		if CheckBank(bank) != nil {
			bank = ima.SHA1
		}
		r := NewReader(bytes.NewReader(list), bank)
		replay := NewReplay(bank)
		for n := 0; ; n++ {
			e, err := r.Next()
			if err != nil {
				checkEnd(t, r, err, n, len(list))
				return
			}
			checkEntry(t, e, bank, r.StoredDigest(), list[r.Offset():r.End()])
			replay.Extend(e)
			if replay.Value(e.PCR(), bank).IsZero() {
				t.Fatalf("entry %d left PCR %d at zero", n, e.PCR())
			}
		}
	})
}

func checkEnd(t *testing.T, r *Reader, err error, entries, size int) {
	if err == io.EOF {
		if r.End() != int64(size) {
			t.Fatalf("io.EOF at byte %d of %d", r.End(), size)
		}
		return
	}
	var corrupt *CorruptError
	if !errors.As(err, &corrupt) || corrupt.Entry != entries || corrupt.Offset != r.Offset() || r.End() > int64(size) {
		t.Fatalf("%v after %d entries, at %d to %d of %d bytes", err, entries, r.Offset(), r.End(), size)
	}
	if corrupt.Cut != errors.Is(err, io.ErrUnexpectedEOF) || corrupt.Cut && r.End() != int64(size) {
		t.Fatalf("cut %v, %v, End %d of %d", corrupt.Cut, err, r.End(), size)
	}
}

func checkEntry(t *testing.T, e *Entry, bank ima.HashAlgo, stored ima.Digest, from []byte) {
	written := e.AppendBinary(nil, bank)
	if len(written) != len(from) || e.Size(bank) != len(from) {
		t.Fatalf("%d bytes read, %d written, Size %d", len(from), len(written), e.Size(bank))
	}
	copy(from[4:4+bank.Size()], e.AppendDigest(nil, bank))
	if !bytes.Equal(written, from) {
		t.Fatalf("read\n%x\nwritten\n%x", from, written)
	}
	if e.Violation() != stored.IsZero() {
		t.Fatalf("violation %v, digest %v", e.Violation(), stored)
	}
	again, err := NewReader(bytes.NewReader(written), bank).Next()
	if err != nil || !bytes.Equal(again.AppendBinary(nil, bank), written) {
		t.Fatalf("written, then read: %v", err)
	}
	line := e.AppendASCII(nil, bank)
	if bytes.IndexByte(line, '\n') != len(line)-1 || bytes.ContainsAny(line, "\r\v\f\x00\x1b\u0085\u2028\u2029") {
		t.Fatalf("more than one line: %q", line)
	}
	e.FileDigest()
	e.Name()
}

// FuzzNewEntry: what the constructors make is read back as it was given.
func FuzzNewEntry(f *testing.F) {
	f.Add("ima-ng", uint8(10), "/bin/sh", []byte(nil), uint8(ima.SHA256), false)
	f.Add("ima-sig", uint8(10), "/a b", []byte{3, 1, 2}, uint8(ima.SHA512), false)
	f.Add("ima", uint8(11), "/tmp/\n", []byte(nil), uint8(ima.SHA1), true)
	f.Add("ima-buf", uint8(23), "kexec-cmdline", []byte("quiet"), uint8(ima.SHA384), false)
	f.Add("d-ngv2|n|evmsig|imode", uint8(0), "n", []byte{5}, uint8(ima.MD5), false)
	f.Fuzz(func(t *testing.T, template string, pcr uint8, name string, blob []byte, algo uint8, violation bool) {
		v := FieldValues{Digest: ima.ZeroDigest(ima.HashAlgo(algo)), Name: name, Sig: blob, EVMSig: blob, Buf: blob,
			Modsig: blob, Verity: len(blob)&1 == 1, File: len(blob)&2 == 2, XattrValues: blob}
		makeOne := NewEntry
		if violation {
			makeOne = NewViolation
		}
		e, err := makeOne(int(pcr), template, v)
		if err != nil {
			return
		}
		for _, bank := range banks() {
			r := NewReader(bytes.NewReader(e.AppendBinary(nil, bank)), bank)
			got, err := r.Next()
			if err != nil {
				t.Fatalf("%s %q: %v", template, name, err)
			}
			if !bytes.Equal(got.Data(), e.Data()) || got.PCR() != int(pcr) || got.Template() != template ||
				got.Violation() != violation || r.StoredDigest() != e.Digest(bank) {
				t.Fatalf("made %+v, read %+v", e, got)
			}
		}
	})
}
