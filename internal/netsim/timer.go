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

const (
	// maxLateness bounds how late a sleep is expected to end, and so for how
	// long one that ends in time has the processor spin.
	maxLateness = 100 * time.Microsecond
	// latenessMemory is how many sleeps it is remembered for.
	latenessMemory = 8
)

// lateness learns how late sleeps end at least: the time that the kernel and the
// Go runtime take to wake a goroutine. What comes on top of it is load, which
// the next sleep may not have.
type lateness struct {
	least, next time.Duration // of the last latenessMemory sleeps, and of those since
	n           int           // how many those are
}

// usual returns how much later than asked for the next sleep will end.
func (l *lateness) usual() time.Duration { return l.least }

// note takes in how late a sleep has ended.
func (l *lateness) note(d time.Duration) {
	d = min(max(d, 0), maxLateness)
	if l.n == 0 || d < l.next {
		l.next = d
	}
	if d < l.least {
		l.least = d
	}
	if l.n++; l.n == latenessMemory {
		l.least, l.n = l.next, 0
	}
}
