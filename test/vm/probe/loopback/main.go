// Command loopback shows a folder through FUSE, as a file system that keeps no change counter: the kernel can't tell when a file changes.
//
//	loopback FOLDER MOUNTPOINT
//
// It prints "mounted" and ends when it is unmounted. Exit status: 0 unmounted; 1 it could not be mounted; 2 misuse.
package main

import (
	"fmt"
	"os"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "loopback: want FOLDER MOUNTPOINT")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "loopback:", err)
		os.Exit(1)
	}
}

func serve(dir, mountpoint string) error {
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		return fmt.Errorf("show %s: %w", dir, err)
	}
	server, err := fs.Mount(mountpoint, root, &fs.Options{MountOptions: fuse.MountOptions{DirectMount: true, AllowOther: true, FsName: "loopback"}})
	if err != nil {
		return fmt.Errorf("mount %s: %w", mountpoint, err)
	}
	fmt.Println("mounted")
	server.Wait()
	return nil
}
