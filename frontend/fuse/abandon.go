package fuse

import "context"

// maxUncancelled bounds the calls under way that a backend gives no means to
// cancel: Sync, and the writing of zeroes. Whoever comes later waits, or is
// killed, here.
const maxUncancelled = 64

// uncancelled lets requests be given up whose backend knows no context. A
// process that was killed stays until its request is answered
// (request_wait_answer in fs/fuse/dev.c), so the answer must not wait for a
// remote that is away; the call itself goes on, until the backend's own
// patience ends.
type uncancelled chan struct{}

func newUncancelled() uncancelled { return make(uncancelled, maxUncancelled) }

// call runs fn, and returns early, with ctx's error, when ctx is done.
func (u uncancelled) call(ctx context.Context, fn func() error) error {
	select {
	case u <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	result := make(chan error, 1)
	go func() {
		defer func() { <-u }()
		result <- fn()
	}()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
