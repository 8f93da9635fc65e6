// Command loopback shows a folder through FUSE, as a file system that keeps no change counter: the kernel can't tell when a file changes.
//
//	loopback FOLDER MOUNTPOINT [SECONDS]
//
// The kernel may take names and attributes for what they were for a second, or the seconds given. It prints "mounted" and ends when it is unmounted. Exit status: 0 unmounted; 1 it could not be mounted; 2 misuse.
package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

func main() {
	seconds, err := 1, error(nil)
	if len(os.Args) == 4 {
		seconds, err = strconv.Atoi(os.Args[3])
	}
	if len(os.Args) < 3 || len(os.Args) > 4 || err != nil {
		fmt.Fprintln(os.Stderr, "loopback: want FOLDER MOUNTPOINT [SECONDS]")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], time.Duration(seconds)*time.Second); err != nil {
		fmt.Fprintln(os.Stderr, "loopback:", err)
		os.Exit(1)
	}
}

func serve(dir, mountpoint string, keep time.Duration) error {
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		return fmt.Errorf("show %s: %w", dir, err)
	}
	server, err := fs.Mount(mountpoint, root, &fs.Options{
		EntryTimeout: &keep, AttrTimeout: &keep, MountOptions: fuse.MountOptions{DirectMount: true, AllowOther: true, FsName: "loopback"},
	})
	if err != nil {
		return fmt.Errorf("mount %s: %w", mountpoint, err)
	}
	fmt.Println("mounted")
	server.Wait()
	return nil
}
