package loader

import (
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"

	"imans.dev/imans-agent/internal/event"
)

// The offsets that internal/event decodes by, against the compiled object's own types: one line for each field of bpf/event.h.
const layout = `
imans_header 32: kind 0, inum 4, mntns 8, boottime 16, sequence 24
imans_subject 40: tgid 0, pid 4, start_boottime 8, uid 16, euid 20, suid 24, gid 28, egid 32, sgid 36
imans_version 40: ino 0, change 8, ctime 16, subvolume 24, dev 32, generation 36
imans_content 80: version 0, size 40, nlink 48, writes 52, fs_magic 56, fs_uuid 64
imans_digest 72: algo 0, pad 4, sum 8
imans_file 368: header 0, subject 32, content 72, policy 152, seen_ino 160, seen_magic 168, seen_uuid 176, seen_dev 192, fowner 196, fgroup 200, func 204, flags 208, path_len 212, vma_start 216, vma_end 224, digest 232, fs_name 304, fs_subtype 336
imans_inode 16: ino 0, dev 8, generation 12
imans_write 88: header 0, subject 32, inode 72
imans_hold 16: boottime 0, told 8, writes 12
imans_birth 80: header 0, parent 32, parent_inum 40, tgid 44, ancestors 48
imans_id_range 12: inside 0, outside 4, count 8
imans_id_maps 160: header 0, users 32, groups 36, uids 40, gids 100
imans_death 32: header 0
imans_move 56: header 0, from 32, from_inum 40, tgid 44, start_boottime 48
imans_task 40: mntns 0, parent_mntns 8, start_boottime 16, inum 24, parent_inum 28, tgid 32, pid 36
imans_measured_content 56: policy 0, version 8, seen_dev 48, func 52
imans_measured_slot 64: sequence 0, content 8
imans_measured_key 80: content 0, uid 56, euid 60, suid 64, gid 68, egid 72, sgid 76
imans_mount_namespace 16: parent 0, inum 8, parent_inum 12
imans_namespace_policy 24: generation 0, flags 8, pad 12, mntns 16
`

func TestLayoutIsTheObjects(t *testing.T) {
	spec, err := loadImans()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(layout) {
		line = strings.TrimSpace(line)
		name, fields, ok := strings.Cut(line, ": ")
		if !ok {
			continue
		}
		name, size, _ := strings.Cut(name, " ")
		var s *btf.Struct
		if err := spec.Types.TypeByName(name, &s); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, m := range s.Members {
			got = append(got, m.Name+" "+strconv.Itoa(int(m.Offset.Bytes())))
		}
		if joined := strings.Join(got, ", "); joined != fields || strconv.Itoa(int(s.Size)) != size {
			t.Errorf("%s is %d: %s\nwant %s: %s", name, s.Size, joined, size, fields)
		}
	}
	for name, sizes := range map[string][2]uintptr{
		"key":             {unsafe.Sizeof(event.MeasuredKey{}), unsafe.Sizeof(imansImansMeasuredKey{})},
		"slot":            {unsafe.Sizeof(slot{}), unsafe.Sizeof(imansImansMeasuredSlot{})},
		"inode":           {unsafe.Sizeof(rawInode{}), unsafe.Sizeof(imansImansInode{})},
		"hold":            {unsafe.Sizeof(hold{}), unsafe.Sizeof(imansImansHold{})},
		"mount namespace": {unsafe.Sizeof(mountNamespace{}), unsafe.Sizeof(imansImansMountNamespace{})},
		"policy":          {unsafe.Sizeof(namespacePolicy{}), unsafe.Sizeof(imansImansNamespacePolicy{})},
	} {
		if sizes[0] != sizes[1] {
			t.Errorf("%s: %d bytes in Go, %d in the object", name, sizes[0], sizes[1])
		}
	}
	if event.FileSize != 368 || event.BirthSize != 80 || event.IDMapsSize != 160 || event.DeathSize != 32 || event.MoveSize != 56 || event.WriteSize != 88 || event.TaskSize != 40 {
		t.Error("sizes of internal/event are not those above")
	}
}
