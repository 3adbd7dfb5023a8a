package netsim

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// timer sleeps with the precision of the kernel's high-resolution timers and
// can be woken. One goroutine sleeps, any may wake.
type timer struct {
	f  *os.File
	mu sync.Mutex // guards what follows
	fd int        // of f; -1 once closed
}

func newTimer() (*timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("timerfd_create: %w", err)
	}
	return &timer{f: os.NewFile(uintptr(fd), "timerfd"), fd: fd}, nil
}

// arm makes the next sleep end after d. A wake that follows shortens it.
func (t *timer) arm(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd < 0 {
		return
	}
	// A zero value would disarm it: timerfd_settime(2).
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(max(int64(d), 1))}
	unix.TimerfdSettime(t.fd, 0, &spec, nil) //nolint:errcheck // fails for bad arguments only
}

func (t *timer) wake() { t.arm(0) }

// sleep returns when the armed time has come, or the timer is closed.
func (t *timer) sleep() {
	var expirations [8]byte
	t.f.Read(expirations[:]) //nolint:errcheck // closed, and then there is nothing to wait for
}

func (t *timer) close() {
	t.mu.Lock()
	t.fd = -1
	t.mu.Unlock()
	t.f.Close() //nolint:errcheck // nothing can be lost
}
