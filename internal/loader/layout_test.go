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
imans_content 72: ino 0, change 8, size 16, ctime_sec 24, ctime_nsec 32, dev 36, generation 40, nlink 44, fs_magic 48, fs_uuid 56
imans_file 360: header 0, subject 32, content 72, policy 144, seen_ino 152, seen_magic 160, seen_uuid 168, seen_dev 184, fowner 188, fgroup 192, func 196, flags 200, path_len 204, vma_start 208, vma_end 216, digest_algo 224, pad 228, digest 232, fs_name 296, fs_subtype 328
imans_birth 48: header 0, parent 32, parent_inum 40, tgid 44
imans_death 32: header 0
imans_move 56: header 0, from 32, from_inum 40, tgid 44, start_boottime 48
imans_task 40: mntns 0, parent_mntns 8, start_boottime 16, inum 24, parent_inum 28, tgid 32, pid 36
imans_measured_key 96: mntns 0, policy 8, ino 16, change 24, size 32, ctime_sec 40, ctime_nsec 48, dev 52, generation 56, func 60, uid 64, euid 68, suid 72, gid 76, egid 80, sgid 84, seen_dev 88, pad 92
imans_mount_namespace 32: parent 0, policy 8, inum 16, parent_inum 20, flags 24, pad 28
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
		"mount namespace": {unsafe.Sizeof(mountNamespace{}), unsafe.Sizeof(imansImansMountNamespace{})},
	} {
		if sizes[0] != sizes[1] {
			t.Errorf("%s: %d bytes in Go, %d in the object", name, sizes[0], sizes[1])
		}
	}
	if event.FileSize != 360 || event.BirthSize != 48 || event.DeathSize != 32 || event.MoveSize != 56 || event.TaskSize != 40 {
		t.Error("sizes of internal/event are not those above")
	}
}
