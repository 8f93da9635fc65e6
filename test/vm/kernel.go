package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Image is a kernel and a root disk, ready to boot.
type Image struct {
	// Kernel is the matrix entry.
	Kernel Kernel
	// Version is what uname -r prints.
	Version string

	vmlinuz   string
	modules   string
	initramfs string
	disk      string
}

// bootModules are what finds the root disk and the host's folders; guest.sh loads the rest through modprobe. Those that a
// kernel has built in are passed over.
func bootModules() []string {
	return []string{"virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "9p", "9pnet_virtio"}
}

// prunedModules are drivers that no emulated machine has and no test wants; they are most of a kernel package.
func prunedModules() []string {
	return []string{
		"sound", "drivers/gpu", "drivers/media", "drivers/net/ethernet", "drivers/net/wireless", "drivers/infiniband",
		"drivers/staging", "drivers/iio", "drivers/isdn", "drivers/scsi", "drivers/usb", "drivers/hid", "drivers/mtd",
		"drivers/hwmon", "drivers/accel",
	}
}

// Prepare builds what booting the kernel takes, or finds it in the cache. An *UnavailableError says that Debian's
// archive has no such kernel.
func (c *Cache) Prepare(ctx context.Context, k Kernel) (*Image, error) {
	var root string
	var rootErr error
	built := make(chan struct{})
	go func() {
		defer close(built)
		root, rootErr = c.rootDisk(ctx)
	}()
	dir, err := c.kernel(ctx, k)
	<-built
	if err := errors.Join(err, rootErr); err != nil {
		return nil, err
	}
	version, err := os.ReadFile(filepath.Join(dir, "version"))
	if err != nil {
		return nil, fmt.Errorf("read the version of kernel %s: %w", k.Name, err)
	}
	img := &Image{
		Kernel: k, Version: string(version),
		vmlinuz: filepath.Join(dir, "vmlinuz"), modules: filepath.Join(dir, "lib/modules"), disk: filepath.Join(root, rootDiskFile),
	}
	if img.initramfs, err = c.initramfs(ctx, img, filepath.Join(root, busyboxFile)); err != nil {
		return nil, err
	}
	return img, nil
}

// kernel returns a folder with vmlinuz, version and lib/modules/VERSION.
func (c *Cache) kernel(ctx context.Context, k Kernel) (string, error) {
	recipe := fmt.Sprintf("layout 1\n%+v\nwithout %v\n", k.sources, prunedModules())
	return c.entry(ctx, "kernel-"+k.Name, recipe, func(ctx context.Context, dir string) error {
		work := filepath.Join(dir, "work")
		deb, version, err := fetchKernel(ctx, work, k)
		if err != nil {
			return err
		}
		c.log("unpacking %s", filepath.Base(deb))
		tree := filepath.Join(work, "tree")
		if _, err := command(ctx, "", "dpkg-deb", "-x", deb, tree); err != nil {
			return fmt.Errorf("unpack %s: %w", deb, err)
		}
		if err := keepKernel(ctx, tree, dir, version); err != nil {
			return err
		}
		return os.RemoveAll(work)
	})
}

// fetchKernel downloads the kernel's package from the first source that has it.
func fetchKernel(ctx context.Context, work string, k Kernel) (deb, version string, err error) {
	var tried []string
	for i, src := range k.sources {
		a, err := openArchive(ctx, filepath.Join(work, fmt.Sprintf("apt%d", i)), src.suites)
		tried = append(tried, src.suites...)
		if errors.Is(err, errNoSuite) {
			continue
		}
		if err != nil {
			return "", "", err
		}
		pkg, err := a.find(ctx, src.pattern)
		if err != nil {
			return "", "", err
		}
		if pkg == "" {
			continue
		}
		deb, err := a.download(ctx, work, pkg)
		return deb, strings.TrimPrefix(pkg, "linux-image-"), err
	}
	return "", "", &UnavailableError{k.Name, "no package of it in Debian's " + strings.Join(tried, ", ")}
}

// keepKernel moves what a boot needs out of an unpacked package.
func keepKernel(ctx context.Context, tree, dir, version string) error {
	if err := os.Rename(filepath.Join(tree, "boot", "vmlinuz-"+version), filepath.Join(dir, "vmlinuz")); err != nil {
		return fmt.Errorf("find the kernel in its package: %w", err)
	}
	from := filepath.Join(tree, "lib/modules", version)
	if _, err := os.Stat(from); err != nil {
		from = filepath.Join(tree, "usr/lib/modules", version)
	}
	to := filepath.Join(dir, "lib/modules", version)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("make the modules folder: %w", err)
	}
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("find the modules in the package: %w", err)
	}
	for _, sub := range prunedModules() {
		if err := os.RemoveAll(filepath.Join(to, "kernel", sub)); err != nil {
			return fmt.Errorf("drop modules: %w", err)
		}
	}
	if _, err := command(ctx, "", "depmod", "-b", dir, version); err != nil {
		return fmt.Errorf("index the modules: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "version"), []byte(version), 0o644); err != nil {
		return fmt.Errorf("note the kernel's version: %w", err)
	}
	return nil
}
