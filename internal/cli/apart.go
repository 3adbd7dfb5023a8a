package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// checkApart refuses a mountpoint that is what the mount stands on, or lies
// within it, or the other way round: the mount would hide its own source or
// cache, and wait for itself.
func (a *app) checkApart(mountpoint, rawURL, cacheDir string) error {
	if source := a.sourcePath(rawURL); source != "" && overlap(mountpoint, source) {
		return apartError(mountpoint, "the source", source)
	}
	if cacheDir != "" && overlap(mountpoint, cacheDir) {
		return apartError(mountpoint, "the cache", cacheDir)
	}
	return nil
}

func apartError(mountpoint, what, path string) error {
	return withRemedy(fmt.Errorf("mountpoint %s: overlaps with %s of the mount, %s", mountpoint, what, path), "choose another PATH")
}

// sourcePath is where rawURL's bytes lie on this host, absolute; empty if they
// don't.
func (a *app) sourcePath(rawURL string) string {
	u, _, err := a.backends().Lookup(rawURL)
	if err != nil || u.Path == "" || u.Scheme != "file" && u.Scheme != "dir" {
		return ""
	}
	abs, err := filepath.Abs(u.Path)
	if err != nil {
		return ""
	}
	return abs
}

// overlap tells whether two absolute paths name one file, or one lies within
// the other.
func overlap(a, b string) bool {
	ia, errA := os.Stat(a)
	ib, errB := os.Stat(b)
	if errA == nil && errB == nil && os.SameFile(ia, ib) {
		return true // also by a hard link
	}
	a, b = resolve(a), resolve(b)
	return within(a, b) || within(b, a)
}

func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// resolve follows the symbolic links of the part of path that exists.
func resolve(path string) string {
	if followed, err := filepath.EvalSymlinks(path); err == nil || path == filepath.Dir(path) {
		return followed
	}
	return filepath.Join(resolve(filepath.Dir(path)), filepath.Base(path))
}
