package uffd

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// newEvent makes an eventfd, by which the reading of faults is ended.
func newEvent() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return fd, nil
}

// signalEvent makes an eventfd readable, for good.
func signalEvent(fd int) error {
	// Eight bytes that are more than zero, whatever the order of bytes is.
	_, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 1})
	return err
}

// underWay are the pages whose faults are being served: a wait that a signal
// interrupted is reported again.
type underWay struct {
	mu    sync.Mutex
	pages map[uint64]bool
}

// begin reports whether nobody serves the page yet; then end must follow.
func (u *underWay) begin(page uint64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pages[page] {
		return false
	}
	if u.pages == nil {
		u.pages = make(map[uint64]bool)
	}
	u.pages[page] = true
	return true
}

func (u *underWay) end(page uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.pages, page)
}
