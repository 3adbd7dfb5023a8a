package region

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestPushTimesOutOnce: a remote that does not answer costs a Push IOTimeout, by
// the clock of a bubble, whatever it is asked first.
func TestPushTimesOutOnce(t *testing.T) {
	for _, kind := range []string{"write", "generation", "sync"} {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const timeout = time.Minute
				f := newRemote(pattern(1<<20, 1))
				r, err := Open(t.Context(), f, newLocal(1<<20), Options{
					IOTimeout: timeout, PushInterval: -1, PushIdle: -1, PushBacklog: -1, Pull: PullNone,
				})
				if err != nil {
					t.Fatal(err)
				}
				f.setHook(func(ctx context.Context, o op) error {
					if o.kind != kind && (kind == "sync" || o.kind == "generation") {
						return nil
					}
					ctx, cancel := context.WithTimeout(ctx, timeout) // as a client does for Sync
					defer cancel()
					<-ctx.Done()
					return ctx.Err()
				})
				if _, err := r.WriteAt(pattern(pageSize, 2), 0); err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				if err := r.Push(t.Context()); !timedOut(err) {
					t.Errorf("push: %v", err)
				}
				if d := time.Since(begin); d < timeout || d > timeout+time.Second {
					t.Errorf("the push failed after %v; IOTimeout is %v", d, timeout)
				}
				f.setHook(nil)
				if err := r.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
		})
	}
}
