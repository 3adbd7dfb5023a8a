package lifecycle

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// SignalError is the cause of a context that a signal ended.
type SignalError struct{ Signal os.Signal }

func (e *SignalError) Error() string { return fmt.Sprintf("interrupted by %v", e.Signal) }

// Unwrap makes a SignalError a kind of context.Canceled.
func (e *SignalError) Unwrap() error { return context.Canceled }

// Signals turns SIGINT and SIGTERM into two contexts. The first signal asks to
// finish: take no more work, flush, unmount, close. The second one asks to
// stop waiting for that.
type Signals struct {
	ctx, hard context.Context
	stop      func()
}

// Watch starts to listen for signals. Call Stop when done.
func Watch(parent context.Context) *Signals {
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM)
	s := watch(parent, ch)
	stop := s.stop
	s.stop = func() { signal.Stop(ch); stop() }
	return s
}

// Unwatched gives contexts that only parent ends.
func Unwatched(parent context.Context) *Signals { return watch(parent, nil) }

func watch(parent context.Context, ch <-chan os.Signal) *Signals {
	ctx, cancel := context.WithCancelCause(parent)
	// The end of the parent is a request to finish, not to give up.
	hard, cancelHard := context.WithCancelCause(context.WithoutCancel(parent))
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		end := cancel
		for {
			select {
			case sig := <-ch:
				end(&SignalError{sig})
				end = cancelHard
			case <-quit:
				return
			}
		}
	}()
	var once sync.Once
	return &Signals{ctx: ctx, hard: hard, stop: func() {
		once.Do(func() {
			close(quit)
			<-done
			cancel(nil)
			cancelHard(nil)
		})
	}}
}

// Context ends at the first signal.
func (s *Signals) Context() context.Context { return s.ctx }

// Hard ends at the second signal.
func (s *Signals) Hard() context.Context { return s.hard }

// Stop ends both contexts and gives signals their usual meaning again.
func (s *Signals) Stop() { s.stop() }
