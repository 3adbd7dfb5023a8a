// Package lifecycle starts and ends long-running commands: what to close and
// in which order, what a signal means, and how to go into the background.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// DefaultStepTimeout bounds one step of closing that has no bound of its own,
// so that a command always ends.
const DefaultStepTimeout = 2 * time.Minute

// Stack is what has to be closed, innermost first: steps run in the reverse of
// the order in which they were pushed, so that a consumer, opened after what
// it depends on, ends before it.
//
// Safe for concurrent use. Once closed, always closed: a step pushed later
// runs at once.
type Stack struct {
	mu     sync.Mutex
	steps  []step
	closed bool
	done   chan struct{} // closed when Close has run every step
	err    error         // valid once done is closed
}

type step struct {
	name    string
	timeout time.Duration
	fn      func(context.Context) error
}

// Push adds a step. The context it is given ends after timeout, 0 meaning
// [DefaultStepTimeout]; a step that stays deaf to that is abandoned, and named
// in the error of Close. If the stack is closed already, fn runs now, and its
// error is returned.
func (s *Stack) Push(name string, timeout time.Duration, fn func(context.Context) error) error {
	if timeout == 0 {
		timeout = DefaultStepTimeout
	}
	st := step{name, timeout, fn}
	s.mu.Lock()
	if !s.closed {
		s.steps = append(s.steps, st)
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	return st.run(context.Background())
}

// PushCloser adds a step that can't be cut short.
func (s *Stack) PushCloser(name string, fn func() error) error {
	return s.Push(name, 0, func(context.Context) error { return fn() })
}

// Close runs all steps, each whatever became of the others, and returns their
// errors joined. When ctx ends, the steps are told so and given up on. Calls
// after the first wait for it and return the same error.
func (s *Stack) Close(ctx context.Context) error {
	s.mu.Lock()
	if s.closed {
		done := s.done
		s.mu.Unlock()
		<-done
		return s.err
	}
	s.closed = true
	s.done = make(chan struct{})
	steps := s.steps
	s.steps = nil
	s.mu.Unlock()

	var errs []error
	for i := len(steps) - 1; i >= 0; i-- {
		errs = append(errs, steps[i].run(ctx))
	}
	s.err = errors.Join(errs...)
	close(s.done)
	return s.err
}

// grace is how long a step may take to notice that its context has ended.
const grace = time.Second

func (st step) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, st.timeout,
		fmt.Errorf("not done within %v: %w", st.timeout, context.DeadlineExceeded))
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- st.fn(ctx) }()
	select {
	case err := <-done:
		return st.wrap(err)
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return st.wrap(err)
	case <-time.After(grace):
		return st.wrap(context.Cause(ctx))
	}
}

func (st step) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", st.name, err)
}
