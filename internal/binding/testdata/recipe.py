#!/usr/bin/env python3
"""Writes vectors.json: buffers of bindings, from the package comment's description; nothing of the Go code.

Run it as: python3 recipe.py [FOLDER]
"""
import hashlib
import json
import os
import struct
import sys


def u32(n):
    return struct.pack("<I", n)


def text(s):
    b = s.encode() if isinstance(s, str) else s
    return u32(len(b)) + b


def ident(version, inum, nsid, number):
    return u32(version) + u32(inum) + struct.pack("<Q", nsid) + u32(number)


def attach(inum=4026532281, nsid=7, number=1, tpm=2, way=1, pcr=10, container="c1", image="alpine", digest="",
           ek=b"\x00\x0b" + bytes(32), ak=b"\x00\x0b" + b"\xff" * 32, version=1):
    b = ident(version, inum, nsid, number) + u32(tpm) + u32(way) + u32(pcr)
    return b + text(container) + text(image) + text(digest) + text(ek) + text(ak)


def end(inum=4026532281, nsid=7, number=1, cause=1, entries=42, values=(), version=1):
    b = ident(version, inum, nsid, number) + u32(cause) + struct.pack("<Q", entries) + u32(len(values))
    return b + b"".join(text(v) for v in values)


def value(algo, of=b"pcr"):
    return algo + ":" + hashlib.new(algo, of).hexdigest()


ABC = value("sha256", b"abc")
EVERY = [value(a) for a in ("sha1", "sha256", "sha384", "sha512")]

GOOD = {
    "attach": attach(),
    "attach, all there is to know": attach(
        4294967295, 2**64 - 1, 2**32 - 1, 2, 2, 23, "é" * 2048, "registry.example:5000/a/b:1@" + ABC, ABC,
        b"\x00\x0c" + bytes(range(48)), b"\x00\x29" + bytes(range(64))),
    "attach, TPM 1.2": attach(tpm=1, ek=b"", ak=b""),
    "attach, nothing known of the container": attach(container="", image=""),
    "end": end(values=EVERY),
    "end, lost": end(cause=3, entries=0),
    "end, one bank": end(number=3, cause=4, entries=2**64 - 1, values=[EVERY[1]]),
}

BAD = {
    "attach, nothing": b"",
    "attach, version 0": attach(version=0),
    "attach, version 2": attach(version=2),
    "attach, cut": attach()[:-1],
    "attach, a byte more": attach() + b"\0",
    "attach, no inode number": attach(inum=0),
    "attach, no id": attach(nsid=0),
    "attach, number 0": attach(number=0),
    "attach, TPM 3": attach(tpm=3),
    "attach, way 0": attach(way=0),
    "attach, PCR 24": attach(pcr=24),
    "attach, PCR beyond an int": attach(pcr=2**32 - 1),
    "attach, a newline": attach(container="a\nb"),
    "attach, a character that turns the line around": attach(image="a\u202eb"),
    "attach, not UTF-8": attach(container=b"\xff"),
    "attach, too long": attach(container="x" * 4097),
    "attach, length beyond the end": attach()[:32] + u32(2**32 - 1) + attach()[36:],
    "attach, digest in capitals": attach(digest=ABC[:7] + ABC[7:].upper()),
    "attach, digest too short": attach(digest=ABC[:-2]),
    "attach, digest of no algorithm": attach(digest="crc32:00000000"),
    "attach, Name of no algorithm": attach(ek=b"\x00\x0a" + bytes(32)),
    "attach, Name too short": attach(ak=b"\x00\x0b" + bytes(31)),
    "attach, Name of a byte": attach(ak=b"\x00"),
    "attach, no AK": attach(ak=b""),
    "attach, no EK": attach(ek=b""),
    "attach, TPM 1.2 with a Name": attach(tpm=1, ak=b""),
    "end, version 9": end(version=9),
    "end, number 0": end(number=0),
    "end, cause 0": end(cause=0),
    "end, cause 5": end(cause=5),
    "end, values in another order": end(values=EVERY[::-1]),
    "end, a bank twice": end(values=[EVERY[1]] * 2),
    "end, an empty value": end(values=[""]),
    "end, too many values": end(values=[EVERY[1]] * 17),
    "end, cut": end(values=EVERY)[:-1],
    "end, count beyond the end": end()[:-4] + u32(3),
    "end, bytes too many": end() + u32(0),
}


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    vectors = [{"name": n, "good": good, "buffer": b.hex()} for good, of in ((True, GOOD), (False, BAD)) for n, b in of.items()]
    with open(os.path.join(folder, "vectors.json"), "w", encoding="utf-8") as f:
        json.dump(vectors, f, indent=1)
        f.write("\n")


main()
