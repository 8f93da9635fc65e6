package vm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	rootSuite    = "bookworm"
	rootDiskSize = "3G"
	rootDiskFile = "root.ext4"
	busyboxFile  = "busybox"
)

// rootPackages are installed on the root disk besides Debian's essential ones.
func rootPackages() []string {
	return []string{
		"swtpm", "swtpm-tools", "tpm2-tools", "ima-evm-utils", "runc", "crun", "iproute2", "procps", "kmod", "attr",
		"podman", "docker.io", "conmon", "catatonit", "busybox-static", "e2fsprogs", "xfsprogs", "btrfs-progs", "strace", "openssl",
		"keyutils", "nfs-kernel-server",
	}
}

// rootDisk returns a folder with the Debian root disk and the static busybox that is on it.
func (c *Cache) rootDisk(ctx context.Context) (string, error) {
	recipe := fmt.Sprintf("layout 1\n%s %s\n%s\n", rootSuite, rootDiskSize, strings.Join(rootPackages(), " "))
	return c.entry(ctx, "root", recipe, func(ctx context.Context, dir string) error {
		suites := []string{rootSuite, rootSuite + "-updates", rootSuite + "-security"}
		lines, err := sourceLines(ctx, suites)
		if err != nil {
			return err
		}
		sources := filepath.Join(dir, "sources.list")
		if err := os.WriteFile(sources, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
			return fmt.Errorf("write apt's sources: %w", err)
		}
		tarball := filepath.Join(dir, "root.tar")
		if _, err := command(ctx, "", "mmdebstrap", "--quiet", "--variant=minbase", "--architectures=amd64",
			"--include="+strings.Join(rootPackages(), ","),
			"--aptopt=Acquire::Languages none", "--aptopt=Acquire::Retries 3",
			"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
			"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=force-unsafe-io",
			rootSuite, tarball, sources); err != nil {
			return fmt.Errorf("install Debian %s: %w", rootSuite, err)
		}
		return makeDisk(ctx, dir, tarball)
	})
}

// makeDisk turns the tarball into an ext4 disk. Without root's rights fakeroot keeps the owners of files.
func makeDisk(ctx context.Context, dir, tarball string) error {
	const script = `set -e
mkdir tree
tar -xf "$1" -C tree
cp tree/bin/busybox "$4"
truncate -s "$2" "$3"
mke2fs -q -t ext4 -L root -m 0 -E lazy_itable_init=0,nodiscard -d tree "$3"
rm -rf tree "$1"`
	args := []string{"sh", "-c", script, "sh", tarball, rootDiskSize, rootDiskFile, busyboxFile}
	if os.Geteuid() != 0 {
		args = append([]string{"fakeroot"}, args...)
	}
	if _, err := command(ctx, dir, args[0], args[1:]...); err != nil {
		return fmt.Errorf("make the root disk: %w", err)
	}
	return nil
}
