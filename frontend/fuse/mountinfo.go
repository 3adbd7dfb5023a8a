package fuse

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fsSubtype is what tells our mounts from all others.
const (
	fsSubtype = "memferry"
	fsType    = "fuse." + fsSubtype
)

// mountEntry is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type mountEntry struct {
	dev  uint64
	path string
	fs   string
}

func (m mountEntry) ours() bool { return m.fs == fsType }

// mountsAt returns the mounts on path, the topmost last.
func mountsAt(path string) ([]mountEntry, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	return parseMounts(f, func(m mountEntry) bool { return m.path == path })
}

// parseMounts returns the entries that keep chooses. Lines that don't look
// right are skipped.
func parseMounts(r io.Reader, keep func(mountEntry) bool) ([]mountEntry, error) {
	var found []mountEntry
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if m, ok := parseMount(s.Text()); ok && keep(m) {
			found = append(found, m)
		}
	}
	return found, s.Err()
}

func parseMount(line string) (mountEntry, bool) {
	before, after, ok := strings.Cut(line, " - ")
	fields, fs := strings.Fields(before), strings.Fields(after)
	if !ok || len(fields) < 6 || len(fs) < 1 {
		return mountEntry{}, false
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(fields[2], "%d:%d", &major, &minor); err != nil {
		return mountEntry{}, false
	}
	return mountEntry{
		dev: unix.Mkdev(major, minor), path: unescapeMount(fields[4]), fs: fs[0],
	}, true
}

// unescapeMount undoes the octal escapes of blanks and backslashes.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// resolve returns the path by which mountinfo knows it. The last component
// need not exist, nor answer.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if path == "/" {
		return path, nil
	}
	if target, err := filepath.EvalSymlinks(path); err == nil {
		return target, nil
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(path)), nil
}
