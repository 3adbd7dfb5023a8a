package fuse

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	// maxHolders is how many processes a busy mount's error names.
	maxHolders = 3
	// maxProcesses bounds the search for them.
	maxProcesses = 20000
)

// holders names the processes that have something of path open, mapped or as
// their directory, as far as we may see that. It compares names only, because
// asking a file could block.
func holders(path string) []string {
	proc, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []string
	for i, e := range proc {
		if i > maxProcesses || len(found) == maxHolders {
			break
		}
		if _, err := strconv.Atoi(e.Name()); err != nil || !holds(filepath.Join("/proc", e.Name()), path) {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
		found = append(found, fmt.Sprintf("%s (pid %s)", bytes.TrimSpace(comm), e.Name()))
	}
	return found
}

func holds(process, path string) bool {
	within := func(p string) bool {
		rest, ok := strings.CutPrefix(p, path)
		return ok && (rest == "" || rest[0] == '/' || strings.HasPrefix(rest, " (deleted)"))
	}
	for _, name := range []string{"cwd", "root", "exe"} {
		if p, err := os.Readlink(filepath.Join(process, name)); err == nil && within(p) {
			return true
		}
	}
	fds, _ := os.ReadDir(filepath.Join(process, "fd"))
	for _, fd := range fds {
		if p, err := os.Readlink(filepath.Join(process, "fd", fd.Name())); err == nil && within(p) {
			return true
		}
	}
	maps, _ := os.ReadFile(filepath.Join(process, "maps"))
	for line := range bytes.Lines(maps) {
		if i := bytes.IndexByte(line, '/'); i >= 0 && within(string(bytes.TrimSpace(line[i:]))) {
			return true
		}
	}
	return false
}
