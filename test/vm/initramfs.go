package vm

import (
	"bufio"
	"context"
	_ "embed"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed scripts/initramfs.sh
var initramfsScript []byte

//go:embed scripts/guest.sh
var guestScript []byte

// initramfs returns the path of a small initial file system: busybox, the boot modules and the two scripts.
func (c *Cache) initramfs(ctx context.Context, img *Image, busybox string) (string, error) {
	recipe := fmt.Sprintf("layout 1\n%s\n%s\n%v\n%s\n%s", img.vmlinuz, busybox, bootModules(), initramfsScript, guestScript)
	dir, err := c.entry(ctx, "initramfs-"+img.Kernel.Name, recipe, func(ctx context.Context, dir string) error {
		f, err := os.Create(filepath.Join(dir, "initramfs"))
		if err != nil {
			return err
		}
		defer f.Close()
		w := newCPIO(f)
		if err := fillInitramfs(ctx, w, img, busybox); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		return f.Close()
	})
	return filepath.Join(dir, "initramfs"), err
}

// fillInitramfs writes the archive's members.
func fillInitramfs(ctx context.Context, w *cpioWriter, img *Image, busybox string) error {
	for _, dir := range []string{"bin", "modules", "proc", "sys", "dev", "newroot"} {
		w.Dir(dir)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return fmt.Errorf("read busybox: %w", err)
	}
	w.File("bin/busybox", 0o755, program)
	w.File("init", 0o755, initramfsScript)
	w.File("guest.sh", 0o755, guestScript)

	base := filepath.Join(img.modules, img.Version)
	order, err := moduleOrder(base, bootModules())
	if err != nil {
		return err
	}
	var names strings.Builder
	for _, path := range order {
		module, err := readModule(ctx, filepath.Join(base, path))
		if err != nil {
			return err
		}
		name := moduleName(path) + ".ko"
		w.File("modules/"+name, 0o644, module)
		names.WriteString(name + "\n")
	}
	w.File("modules/order", 0o644, []byte(names.String()))
	return nil
}

// readModule returns a module uncompressed.
func readModule(ctx context.Context, path string) ([]byte, error) {
	var module []byte
	var err error
	switch filepath.Ext(path) {
	case ".xz":
		module, err = command(ctx, "", "xz", "-dc", path)
	case ".zst":
		module, err = command(ctx, "", "zstd", "-dcq", path)
	default:
		module, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	return module, nil
}

// moduleOrder returns the files of the named modules and of all they depend on, in the order to load them, relative to
// base. Names that have no file are built into the kernel.
func moduleOrder(base string, names []string) ([]string, error) {
	f, err := os.Open(filepath.Join(base, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("read module dependencies: %w", err)
	}
	defer f.Close()
	return parseModuleOrder(f, names)
}

// parseModuleOrder does moduleOrder's work on the text of a modules.dep file, whose lines say "FILE: DEPENDENCY…" with the
// dependency to be loaded first at the end.
func parseModuleOrder(dep io.Reader, names []string) ([]string, error) {
	needs := make(map[string][]string)
	lines := bufio.NewScanner(dep)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		file, deps, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("read module dependencies: line %q has no colon", lines.Text())
		}
		order := strings.Fields(deps)
		slices.Reverse(order)
		needs[moduleName(file)] = append(order, file)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read module dependencies: %w", err)
	}
	var order []string
	for _, name := range names {
		for _, file := range needs[name] {
			if !slices.Contains(order, file) {
				order = append(order, file)
			}
		}
	}
	return order, nil
}

// moduleName is the name by which the kernel knows a module file, with underscores for hyphens.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".")
	return strings.ReplaceAll(name, "-", "_")
}
