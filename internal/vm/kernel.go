package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// EnvKernel names the variable with the Debian package of the kernel to boot:
// a meta-package, or one with a version in its name.
const EnvKernel = "MEMFERRY_VM_KERNEL"

// defaultKernel has nbd, ublk and userfaultfd with all that 6.12 brings.
// linux-image-cloud-amd64, of 6.1, is the older one of Debian 12.
const defaultKernel = "linux-image-6.12-cloud-amd64"

// kernel is an unpacked kernel package.
type kernel struct {
	image   string            // vmlinuz
	modules map[string]string // by name: the .ko.xz or .ko
}

// findKernel returns the kernel of the package that EnvKernel names. What was
// downloaded once is kept in the user's cache directory.
func findKernel(ctx context.Context) (*kernel, error) {
	name := os.Getenv(EnvKernel)
	if name == "" {
		name = defaultKernel
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	pkg, err := resolvePackage(ctx, name)
	if err != nil {
		// Without the package lists, what is there is as good as the newest.
		if have := newestCached(cache, name); have != "" {
			return openKernel(have)
		}
		return nil, err
	}
	dir := filepath.Join(cache, pkg)
	if _, err := os.Stat(dir); err != nil {
		if err := download(ctx, cache, pkg); err != nil {
			return nil, err
		}
	}
	return openKernel(dir)
}

func cacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = filepath.Join(os.TempDir(), "cache") // no HOME
	}
	dir = filepath.Join(dir, "memferry", "vm")
	return dir, os.MkdirAll(dir, 0o755)
}

// newestCached is the directory of the cached package that the meta-package
// name has stood for, or empty.
func newestCached(cache, name string) string {
	series := strings.TrimSuffix(name, "-cloud-amd64") // linux-image, or with a series
	found, _ := filepath.Glob(filepath.Join(cache, series+"*"))
	for i := len(found) - 1; i >= 0; i-- {
		if !strings.HasSuffix(found[i], tempSuffix) {
			return found[i]
		}
	}
	return ""
}

// resolvePackage follows a meta-package to the one with the kernel in it.
func resolvePackage(ctx context.Context, name string) (string, error) {
	out, err := output(ctx, "", "apt-cache", "depends", "--important", name)
	if err != nil || out == "" {
		updateLists(ctx)
		out, err = output(ctx, "", "apt-cache", "depends", "--important", name)
	}
	if err != nil {
		return "", fmt.Errorf("look for the kernel package %s: %w; on Debian 12, run `apt-get update` as root", name, err)
	}
	for _, l := range strings.Split(out, "\n") {
		if dep, ok := strings.CutPrefix(strings.TrimSpace(l), "Depends: "); ok && strings.HasPrefix(dep, "linux-image-") {
			return dep, nil
		}
	}
	return name, nil
}

// updateLists refreshes apt's lists of packages, which a new machine has none
// of and an old one stale ones. Only root can.
func updateLists(ctx context.Context) {
	_, _ = output(ctx, "", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", "update")
}

// tempSuffix marks what is being unpacked.
const tempSuffix = ".tmp"

// download puts the unpacked package into the cache.
func download(ctx context.Context, cache, pkg string) error {
	tmp, err := os.MkdirTemp(cache, pkg+".*"+tempSuffix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // a leftover in a cache
	get := []string{"-qq", "-o", "Acquire::Retries=3", "download", pkg}
	if _, err = output(ctx, tmp, "apt-get", get...); err != nil {
		updateLists(ctx)
		_, err = output(ctx, tmp, "apt-get", get...)
	}
	if err != nil {
		return fmt.Errorf("download the kernel package %s: %w", pkg, err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("download the kernel package %s: got %d packages", pkg, len(debs))
	}
	root := filepath.Join(tmp, "root")
	if _, err := output(ctx, "", "dpkg-deb", "-x", debs[0], root); err != nil {
		return fmt.Errorf("unpack %s: %w", debs[0], err)
	}
	dir := filepath.Join(cache, pkg)
	if err := os.Rename(root, dir); err != nil {
		if _, serr := os.Stat(dir); serr != nil { // not by another run either
			return err
		}
	}
	return nil
}

func openKernel(dir string) (*kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return nil, fmt.Errorf("%s holds %d kernels; remove it", dir, len(images))
	}
	k := &kernel{image: images[0], modules: map[string]string{}}
	err = filepath.WalkDir(filepath.Join(dir, "lib", "modules"), func(p string, _ os.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(p), ".ko"); ok {
			k.modules[moduleName(name)] = p
		}
		return err
	})
	return k, err
}

// moduleName is name as the kernel writes it, whose files' names may have "-".
func moduleName(name string) string { return strings.ReplaceAll(name, "-", "_") }

// module is one to be loaded.
type module struct {
	name  string
	image []byte
}

// load returns the named modules and what they depend on, in the order in
// which they can be loaded. Those that the kernel does not have are left out.
func (k *kernel) load(ctx context.Context, names ...string) ([]module, error) {
	var out []module
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		file := k.modules[name]
		if seen[name] || file == "" {
			return nil // built in, perhaps
		}
		seen[name] = true
		image, err := readModule(ctx, file)
		if err != nil {
			return err
		}
		deps, err := dependencies(image)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for _, d := range deps {
			if err := visit(d); err != nil {
				return err
			}
		}
		out = append(out, module{name, image})
		return nil
	}
	for _, n := range names {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func readModule(ctx context.Context, file string) ([]byte, error) {
	if !strings.HasSuffix(file, ".xz") {
		return os.ReadFile(file)
	}
	out, err := output(ctx, "", "xz", "-dc", file)
	return []byte(out), err
}

// dependencies reads what modinfo(8) shows as "depends" and "softdep ... pre".
func dependencies(image []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("not a kernel module")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	var deps []string
	for _, l := range strings.Split(string(info), "\x00") {
		if d, ok := strings.CutPrefix(l, "depends="); ok && d != "" {
			deps = append(deps, strings.Split(d, ",")...)
		}
		if d, ok := strings.CutPrefix(l, "softdep=pre: "); ok {
			deps = append(deps, strings.Fields(d)...)
		}
	}
	return deps, nil
}

// output runs a program and returns what it wrote. An error has what it
// complained about in it.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
