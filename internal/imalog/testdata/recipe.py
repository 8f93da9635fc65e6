#!/usr/bin/env python3
"""Writes the measurement lists under vectors/, from the format as the kernel's source gives it and hashlib; nothing of
the Go code.

For each list NAME: NAME.json (what each entry is made from, its fields, and the PCR values that the list leads to),
NAME.BANK.bin (binary_runtime_measurements_BANK; sha1 is the classic file) and NAME.BANK.ascii. Run it as:
python3 recipe.py [FOLDER]
"""
import hashlib
import json
import os
import struct
import sys

BANKS = ("sha1", "sha256", "sha384", "sha512")
FORMATS = {
    "ima": "d|n",
    "ima-ng": "d-ng|n-ng",
    "ima-sig": "d-ng|n-ng|sig",
    "ima-ngv2": "d-ngv2|n-ng",
    "ima-sigv2": "d-ngv2|n-ng|sig",
    "ima-buf": "d-ng|n-ng|buf",
    "ima-modsig": "d-ng|n-ng|sig|d-modsig|modsig",
    "evm-sig": "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode",
}
SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
HEX = ("sig", "buf", "modsig", "evmsig", "xattrlengths", "xattrvalues", "d")


def u32(n):
    return struct.pack("<I", n)


def digest_field(algo, digest):
    return algo.encode() + b":\0" + digest


class Entry:
    """One entry, its fields given as bytes by field id; values is what the Go test makes the same entry from."""

    def __init__(self, template, fields, values, pcr=10, violation=False):
        self.template, self.pcr, self.violation, self.values = template, pcr, violation, values
        self.fields = [(i, fields.get(i, b"")) for i in FORMATS.get(template, template).split("|")]

    def hashed(self):
        if self.template == "ima":
            digest, name = self.fields[0][1], self.fields[1][1]
            return digest + name + bytes(256 - len(name))
        return self.data()

    def data(self):
        return b"".join(u32(len(b)) + b for _, b in self.fields)

    def digest(self, bank):
        return bytes(SIZES[bank]) if self.violation else hashlib.new(bank, self.hashed()).digest()

    def extended(self, bank):
        return b"\xff" * SIZES[bank] if self.violation else self.digest(bank)

    def binary(self, bank):
        head = u32(self.pcr) + self.digest(bank) + u32(len(self.template)) + self.template.encode()
        if self.template == "ima":
            name = self.fields[1][1][:-1]
            return head + self.fields[0][1] + u32(len(name)) + name
        return head + u32(len(self.data())) + self.data()

    def ascii(self, bank):
        line = b"%2d %s %s" % (self.pcr, self.digest(bank).hex().encode(), self.template.encode())
        for field, data in self.fields:
            line += b" " + show(field, data)
        return line + b"\n"

    def describe(self):
        return {"pcr": self.pcr, "template": self.template, "violation": self.violation, "values": self.values,
                "fields": [[i, b.hex()] for i, b in self.fields]}


def show(field, data):
    if not data:
        return b""
    if field in HEX:
        return data.hex().encode()
    if field in ("iuid", "igid", "imode"):
        return str(int.from_bytes(data, "little")).encode()
    if field.startswith("d-"):
        algo, digest = data.split(b"\0", 1)
        return algo + digest.hex().encode()
    return escape(data.rstrip(b"\0"))


def escape(name):
    out = b""
    for c in name.decode("utf-8", "surrogateescape"):
        raw = c.encode("utf-8", "surrogateescape")
        stray = 0xDC80 <= ord(c) < 0xDCA0
        if ord(c) <= 0x20 or 0x7F <= ord(c) < 0xA0 or c in "\u2028\u2029" or stray:
            raw = b"".join(b"\\%03o" % b for b in raw)
        out += raw
    return out


def text(algo, what):
    return hashlib.new(algo, what.encode()).digest()


def make(template, name, algo="sha256", digest=None, pcr=10, violation=False, old_digest=None, stored=None, **more):
    """An entry of a file: values for the constructor and, beside, the bytes that must come of them."""
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    digest = text(algo, repr(name)) if digest is None else digest
    values = {"digest": algo + ":" + digest.hex(), "name": raw.hex()}
    zero = bytes(SIZES[algo])
    shown = zero if violation else digest
    kept = (raw if stored is None else stored).replace(b" ", b"_") + b"\0"
    ng = digest_field(algo, shown)
    fields = {"d": bytes(20) if violation else digest, "n": kept, "d-ng": ng, "n-ng": raw.replace(b" ", b"_") + b"\0",
              "d-ngv2": (b"verity:" if more.get("verity") and not violation else b"ima:") + ng}
    for key in ("sig", "evmsig", "buf", "modsig", "xattrvalues"):
        if key in more:
            values[key] = more[key].hex()
    if more.get("verity"):
        values["verity"] = True
    sig, evmsig = more.get("sig", b""), more.get("evmsig", b"")
    fields["evmsig"] = evmsig if evmsig[:1] == b"\5" else b""
    fields["sig"] = sig if sig[:1] in (b"\3", b"\6") and not violation else fields["evmsig"]
    if not violation:
        fields["buf"] = more.get("buf", b"")
        if "modsig" in more:
            values["modsigdigest"] = "sha512:" + text("sha512", "m").hex()
            fields["modsig"], fields["d-modsig"] = more["modsig"], digest_field("sha512", text("sha512", "m"))
    if "inode" in more:
        uid, gid, mode = more["inode"]
        values["inode"] = [uid, gid, mode]
        fields["iuid"], fields["igid"], fields["imode"] = u32(uid), u32(gid), struct.pack("<H", mode)
        names = more.get("xattrnames", [])
        lengths = more.get("xattrlengths", [])
        values["xattrnames"], values["xattrlengths"] = names, lengths
        fields["xattrnames"] = ("|".join(names) + "\0").encode() if names else b""
        fields["xattrlengths"] = b"".join(u32(n) for n in lengths)
        fields["xattrvalues"] = more.get("xattrvalues", b"")
    if old_digest is not None:
        values, fields["d-ng"] = None, digest_field(algo, old_digest)
    return Entry(template, fields, values, pcr, violation)


def boot(template, algo="sha256", zero=False, pcr=10):
    digest = bytes(SIZES[algo]) if zero else text(algo, "boot")
    return make(template, "boot_aggregate", algo, digest, pcr)


LONG = "/" + "d" * 200 + "/" + "f" * 100
SIG = b"\3\2\4" + bytes(range(64))
EVM = b"\5\2\4" + bytes(range(64, 128))
CAPS = bytes.fromhex("0100000200040000000000000000000000000000")

LISTS = {
    "example": [make("ima-ng", "/bin/sh", "sha256", hashlib.sha256(b"").digest())],
    "ima": [
        boot("ima", "sha1"),
        make("ima", "/usr/bin/true", "sha1"),
        make("ima", "/opt/a program (deleted)", "sha1"),
        make("ima", "n" * 255, "sha1"),
        make("ima", LONG, "sha1", stored=b"f" * 100),
        make("ima", "e" * 300, "sha1", stored=b"e" * 255),
        make("ima", "/var/log/written", "sha256", violation=True),
        make("ima", "/usr/bin/false", "sha1", pcr=11),
    ],
    "ima-ng": [
        boot("ima-ng"),
        make("ima-ng", "/usr/bin/true", "sha256"),
        make("ima-ng", "/usr/bin/true", "sha1"),
        make("ima-ng", "/usr/bin/true", "sha384"),
        make("ima-ng", "/usr/bin/true", "sha512"),
        make("ima-ng", "/usr/bin/true", "md5"),
        make("ima-ng", "/opt/a program (deleted)"),
        make("ima-ng", "/lib/systemd/system/system-systemd\\x2dcryptsetup.slice"),
        make("ima-ng", "/tmp/\n10 00 ima-ng sha256:00 /bin/forged"),
        make("ima-ng", "/tmp/tab\tbell\a escape\x1b[2J delete\x7f"),
        make("ima-ng", "/home/zo\u00eb/\u65e5\u672c\u8a9e"),
        make("ima-ng", "/tmp/next\u0085line\u2028separator\u2029paragraph\u00a0space"),
        make("ima-ng", "/tmp/not utf-8 \udc85 \udcff \udcc3"),
        make("ima-ng", "/var/log/written", violation=True),
        make("ima-ng", "/var/log/written", violation=True),
        make("ima-ng", "/zero", "sha256", bytes(32)),
        make("ima-ng", "/firmware", "sha256", pcr=9),
        make("ima-ng", LONG * 20),
    ],
    "ima-ng-old-violation": [
        boot("ima-ng", zero=True),
        make("ima-ng", "/var/log/written", violation=True, old_digest=bytes(20)),
    ],
    "ima-sig": [
        boot("ima-sig"),
        make("ima-sig", "/usr/bin/signed", sig=SIG),
        make("ima-sig", "/usr/bin/verity", sig=b"\6" + SIG[1:]),
        make("ima-sig", "/usr/bin/plain"),
        make("ima-sig", "/usr/bin/hashed", sig=b"\4\4" + bytes(32)),
        make("ima-sig", "/usr/bin/portable", evmsig=EVM),
        make("ima-sig", "/usr/bin/both", sig=SIG, evmsig=EVM),
        make("ima-sig", "/usr/bin/hmac", sig=b"\4\4" + bytes(32), evmsig=b"\2" + bytes(20)),
        make("ima-sig", "/usr/bin/signed", sig=SIG, evmsig=EVM, violation=True),
    ],
    "ima-ngv2": [boot("ima-ngv2"), make("ima-ngv2", "/a", verity=True), make("ima-ngv2", "/b"),
                 make("ima-ngv2", "/a", verity=True, violation=True)],
    "ima-sigv2": [boot("ima-sigv2"), make("ima-sigv2", "/a", verity=True, sig=b"\6" + SIG[1:]),
                  make("ima-sigv2", "/b")],
    "ima-buf": [boot("ima-buf"), make("ima-buf", "kexec-cmdline", buf=b"root=/dev/vda quiet\n"),
                make("ima-buf", "empty"),
                make("ima-buf", "large", buf=bytes(range(256)) * 4)],
    "ima-modsig": [boot("ima-modsig"), make("ima-modsig", "/lib/modules/m.ko", modsig=b"0\x82" + bytes(90), sig=SIG),
                   make("ima-modsig", "/lib/modules/plain.ko"),
                   make("ima-modsig", "/lib/modules/m.ko", modsig=b"0\x82", violation=True)],
    "evm-sig": [boot("evm-sig"),
                make("evm-sig", "/usr/bin/ping", evmsig=EVM, inode=(0, 0, 0o104755),
                     xattrnames=["security.selinux", "security.capability"],
                     xattrlengths=[5, len(CAPS)], xattrvalues=b"t_bin" + CAPS),
                make("evm-sig", "/usr/bin/none", inode=(1000, 4294967295, 0o100644))],
    "formats": [boot("d-ng|n-ng"), make("d|n", "/old form, with lengths", "md5"),
                make("n-ng|d-ngv2|sig|iuid|imode", "/x", sig=SIG, inode=(7, 8, 0o100600)),
                make("d-ng|n-ng", "/a"), make("d|n", "/v", violation=True)],
}


def main(folder):
    os.makedirs(folder, exist_ok=True)
    for name, entries in LISTS.items():
        pcrs = {}
        for bank in BANKS:
            with open(os.path.join(folder, "%s.%s.bin" % (name, bank)), "wb") as f:
                f.writelines(e.binary(bank) for e in entries)
            with open(os.path.join(folder, "%s.%s.ascii" % (name, bank)), "wb") as f:
                f.writelines(e.ascii(bank) for e in entries)
            for e in entries:
                value = pcrs.setdefault(str(e.pcr), {}).setdefault(bank, bytes(SIZES[bank]))
                pcrs[str(e.pcr)][bank] = hashlib.new(bank, value + e.extended(bank)).digest()
        described = {"entries": [e.describe() for e in entries],
                     "pcrs": {p: {b: v.hex() for b, v in banks.items()} for p, banks in pcrs.items()}}
        with open(os.path.join(folder, name + ".json"), "w") as f:
            json.dump(described, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "vectors"))
