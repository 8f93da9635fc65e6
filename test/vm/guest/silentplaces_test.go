//go:build vm

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
)

// contentPlace is a folder on one kind of file system.
type contentPlace struct {
	fs, dir string
	behind  string // the same folder where the file system's server has it; none: it has none
}

// contentKinds make a place of each kind.
var contentKinds = []struct {
	fs   string
	make func(t *testing.T) contentPlace
}{
	{"ext4", func(t *testing.T) contentPlace { return contentPlace{dir: tempDir(t, "/root")} }},
	{"tmpfs", func(t *testing.T) contentPlace { return contentPlace{dir: tempDir(t, "/tmp")} }},
	{"xfs", func(t *testing.T) contentPlace { return onDisk(t, "xfs") }},
	{"btrfs", func(t *testing.T) contentPlace { return onDisk(t, "btrfs") }},
	{"overlayfs", func(t *testing.T) contentPlace {
		return contentPlace{dir: mountOverlay(t, func(string) {}) + "/merged"}
	}},
	{"FUSE", loopback},
	{"NFS", nfs},
}

// contentShares are the kinds that a kernel has when time is short: all of them on one or the other.
var contentShares = map[string][]string{"6.1": {"xfs", "tmpfs"}, "6.12": {"btrfs", "overlayfs"}, "6.18": {"ext4", "FUSE", "NFS"}}

// contentPlaces makes one of each kind but some, or of those that are this kernel's share.
func contentPlaces(t *testing.T, but ...string) []contentPlace {
	t.Helper()
	var places []contentPlace
	for _, kind := range contentKinds {
		if slices.Contains(but, kind.fs) || short() && !slices.Contains(contentShares[os.Getenv("IMANS_VM_KERNEL")], kind.fs) {
			continue
		}
		place := kind.make(t)
		place.fs = kind.fs
		places = append(places, place)
	}
	return places
}

// onDisk makes a file system of a kind in a file.
func onDisk(t *testing.T, fs string) contentPlace {
	t.Helper()
	dir := tempDir(t, "/root")
	sh(t, fmt.Sprintf("truncate -s 320M %[1]s/disk && mkfs.%[2]s -q %[1]s/disk && mkdir %[1]s/mnt && mount -o loop %[1]s/disk %[1]s/mnt", dir, fs))
	t.Cleanup(func() { exec.Command("umount", "-l", dir+"/mnt").Run() })
	return contentPlace{dir: dir + "/mnt"}
}

// loopback mounts a folder through FUSE.
func loopback(t *testing.T) contentPlace {
	t.Helper()
	dir := tempDir(t, "/root")
	sh(t, fmt.Sprintf("mkdir %[1]s/behind %[1]s/mnt", dir))
	cmd := exec.Command("loopback", dir+"/behind", dir+"/mnt")
	out, err := cmd.StdoutPipe()
	if err = errors.Join(err, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir+"/mnt").Run(); cmd.Process.Kill(); cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("mount through FUSE: %v", err)
	}
	return contentPlace{dir: dir + "/mnt", behind: dir + "/behind"}
}

// nfs exports a folder by the kernel's NFS server, and mounts it from there. Version 4 alone needs no rpcbind.
func nfs(t *testing.T) contentPlace {
	t.Helper()
	dir := tempDir(t, "/root")
	t.Cleanup(func() {
		exec.Command("sh", "-c", "umount -l "+dir+"/mnt; rpc.nfsd 0; exportfs -ua; pkill 'rpc.mountd|nfsdcld'").Run()
	})
	sh(t, fmt.Sprintf(`modprobe -a nfsd nfs nfsv4 && ip link set lo up && cd %[1]s && mkdir -p behind mnt /var/lib/nfs/rpc_pipefs /var/lib/nfs/nfsdcld
mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
mountpoint -q /var/lib/nfs/rpc_pipefs || mount -t rpc_pipefs rpc /var/lib/nfs/rpc_pipefs
exportfs -o rw,no_root_squash,no_subtree_check,fsid=0,insecure 127.0.0.1:%[1]s/behind
nfsdcld >/dev/null 2>&1 </dev/null
rpc.nfsd --no-nfs-version 3 --grace-time 10 4 && rpc.mountd --no-nfs-version 3 >/dev/null 2>&1 </dev/null && timeout 60 mount -t nfs -o vers=4.2 127.0.0.1:/ mnt`, dir))
	return contentPlace{dir: dir + "/mnt", behind: dir + "/behind"}
}

// behindWays are ways to change a file where the client does not see it: by the server. Each is a line of shell that has its path as $p.
var behindWays = []struct{ name, line string }{
	{"append behind", `printf changed >>$p`},
	{"overwrite behind, the same size and time of change", `cp -p $p $p.t; printf CHANGED | dd of=$p bs=1 seek=140 conv=notrunc status=none; touch -r $p.t $p`},
	{"rename over behind", `(cat $p; printf other) >$p.new; chmod 755 $p.new; mv $p.new $p`},
	{"write anew behind", `head -c 300 $p >$p.new; printf anew >>$p.new; cat $p.new >$p`},
}

// changedBehind runs programs that are changed by the server of the file system, if it has one.
func (p contentPlace) changedBehind(t *testing.T, a *agent) []contentWant {
	t.Helper()
	var wants []contentWant
	for i, way := range behindWays {
		if p.behind == "" {
			break
		}
		name := fmt.Sprintf("/behind%d", i)
		makeProgram(t, p.dir+name)
		want := contentWant{way: way.name, paths: []string{p.dir + name}}
		want.run(t, p.dir+name)
		a.caughtUp()
		sh(t, fmt.Sprintf("p=%s%s; sleep 1.1; %s", p.behind, name, way.line)) // FUSE asks for what it knows after a second
		want.run(t, p.dir+name)
		a.caughtUp()
		if want.sums[0] == want.sums[1] {
			t.Errorf("%s: what ran the second time is not what was changed", way.name)
		}
		wants = append(wants, want)
	}
	return wants
}
