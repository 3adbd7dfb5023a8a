package fuse

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
)

const (
	// killPoll is how often the process that waits for a request is checked
	// for being killed. The kernel reports only the first signal.
	killPoll = 50 * time.Millisecond

	// killPatience is when that begins without a signal: the kernel reports
	// none to those that wait for O_DIRECT with CAP_ASYNC_DIO.
	killPatience = 500 * time.Millisecond
)

// requestContext is the context of one request. It is done when the process
// that waits for the request is being killed or the mount ends; see the
// package's section on interrupts. The goroutine that watches is started by
// the first call of Done, so requests that need not wait don't pay for it.
type requestContext struct {
	interrupted <-chan struct{} // closed by the library at the first signal
	tid         uint32          // thread that waits, 0 if none does
	ended       <-chan struct{} // closed when requests must be given up
	gone        func() bool     // the mount is not there any more; slow

	mu       sync.Mutex
	done     chan struct{}
	finished chan struct{}
	err      error
}

func (f *fileSystem) requestContext(cancel <-chan struct{}, h *gofuse.InHeader) *requestContext {
	return &requestContext{interrupted: cancel, tid: h.Pid, ended: f.ended, gone: f.gone}
}

func (c *requestContext) Deadline() (time.Time, bool) { return time.Time{}, false }

func (c *requestContext) Value(any) any { return nil }

func (c *requestContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *requestContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		c.finished = make(chan struct{})
		go c.watch(c.finished)
	}
	return c.done
}

// finish ends the watch. The request's channel must not be used afterwards:
// the library gives it to another request.
func (c *requestContext) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.finished != nil {
		close(c.finished)
		c.finished = nil
	}
}

func (c *requestContext) cancel() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = context.Canceled
		close(c.done)
	}
}

func (c *requestContext) watch(finished <-chan struct{}) {
	timer := time.NewTimer(killPatience)
	defer timer.Stop()
	for interrupted := c.interrupted; ; timer.Reset(killPoll) {
		select {
		case <-finished:
			return
		case <-c.ended:
			c.cancel()
			return
		case <-interrupted:
			interrupted = nil // it stays closed
		case <-timer.C:
		}
		if beingKilled(c.tid) || c.gone() {
			c.cancel()
			return
		}
	}
}

// beingKilled reports whether SIGKILL is pending for a thread: the kernel
// turns every fatal signal into that, for each thread of the process
// (complete_signal in kernel/signal.c; proc_pid_status(5), SigPnd). A thread
// that can't be seen, in another PID namespace or gone, is taken for alive.
func beingKilled(tid uint32) bool {
	if tid == 0 {
		return false
	}
	b, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(tid), 10) + "/status")
	if err != nil {
		return false
	}
	const sigkill = 1 << (9 - 1)
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		hex, ok := strings.CutPrefix(s.Text(), "SigPnd:")
		if !ok {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		return err == nil && mask&sigkill != 0
	}
	return false
}
