package fuse

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// outside runs f, which may ask our own mounts, on a thread that holds none of
// this process's descriptors.
//
// A request that was read from /dev/fuse is waited for even by a thread that is
// being killed (request_wait_answer in fs/fuse/dev.c). If that thread is one of
// the process that should answer, and has its descriptors, these are never
// closed, the connection is never cut, and the process stays for ever, with
// all its locks. The thread here has a table of its own: once the others are
// gone, the kernel closes the last descriptor, fails the request, and the
// thread ends as well.
//
// Descriptors that f opens exist on this thread alone; f must close them.
func outside(f func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked, so that the thread ends with the goroutine.
		runtime.LockOSThread()
		dropDescriptors()
		result <- f()
	}()
	return <-result
}

// dropDescriptors gives this thread a table of descriptors of its own, with
// nothing in it but what the Go runtime uses on any thread. Where a sandbox
// forbids that, all works as without, but for being killed.
func dropDescriptors() {
	if unix.Unshare(unix.CLONE_FILES) != nil {
		return
	}
	const dir = "/proc/thread-self/fd"
	list, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range list {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= unix.Stderr {
			continue
		}
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || strings.HasPrefix(to, "anon_inode:[eventpoll]") || strings.HasPrefix(to, "anon_inode:[eventfd]") {
			continue
		}
		unix.Close(fd) //nolint:errcheck // nobody else sees it
	}
}
