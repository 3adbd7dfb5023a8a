package bench

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"
)

// Direct compares a direct and a managed mount of the same server without a
// delay: when is which better?
func Direct(ctx context.Context, e *Env) error {
	at, err := e.endpoint("unix")
	if err != nil {
		return err
	}
	s, err := serverAt(at, e.memferry, "serve", "--listen", listenURL(at), "d="+e.data)
	if err != nil {
		return err
	}
	defer s.stop()
	modes := map[string][]string{"direct": {"--direct"}, "managed": nil, "managed, on demand": {"--pull=demand"}}
	var subjects []Subject
	for _, name := range []string{"direct", "managed", "managed, on demand"} {
		subjects = append(subjects, Subject{name, func(ctx context.Context) ([]Value, error) {
			return e.mountLife(ctx, at.uri("d"), modes[name]...)
		}})
	}
	e.Compare(ctx, "direct", "at 0 ms", subjects...)
	return ctx.Err()
}

// mountLife mounts and does what people do, one after the other.
func (e *Env) mountLife(ctx context.Context, uri string, flags ...string) ([]Value, error) {
	begin := time.Now()
	m, err := e.mount(ctx, uri, flags...)
	if err != nil {
		return nil, err
	}
	ready := time.Since(begin)
	values, err := e.useMount(ctx, m.path)
	return append([]Value{milliseconds("ready", ready)}, values...), errors.Join(err, m.umount())
}

func (e *Env) useMount(ctx context.Context, path string) ([]Value, error) {
	once, first, err := cat(path, e.Size)
	if err != nil {
		return nil, err
	}
	if err := forget(path); err != nil {
		return nil, err
	}
	again, _, err := cat(path, e.Size)
	if err != nil {
		return nil, err
	}
	random, err := e.fio(ctx, "--ioengine=psync", "--direct=1", "--filename="+path, "--rw=randread", "--bs=4k")
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	if _, _, err := run(ctx, "dd", "if="+e.data, "of="+path, "bs=1M", "conv=notrunc,fsync", "status=none"); err != nil {
		return nil, err
	}
	values := []Value{
		milliseconds("first read", first),
		rate("first cat", e.Size, once),
		rate("second cat, cold page cache", e.Size, again),
		rate("write and fsync", e.Size, time.Since(begin)),
	}
	for _, v := range only(random, "p50", "p99") {
		v.Metric = "4K O_DIRECT read " + v.Metric
		values = append(values, v)
	}
	return values, nil
}

// Memory measures resident sizes.
func Memory(ctx context.Context, e *Env) error {
	at, err := e.endpoint("unix")
	if err != nil {
		return err
	}
	s, err := serverAt(at, e.memferry, "serve", "--listen", listenURL(at), "d="+e.data, "huge=mem:?size=1T")
	if err != nil {
		return err
	}
	defer s.stop()
	e.Compare(ctx, "memory", "under load",
		Subject{"serve", func(ctx context.Context) ([]Value, error) {
			most := sample(s)
			_, _, err := run(ctx, "nbdcopy", "--connections=8", "--requests=64", "--request-size=1048576", at.uri("d"), "null:")
			return []Value{mebibytes(most())}, err
		}},
		Subject{"mount", func(ctx context.Context) ([]Value, error) {
			m, err := e.mount(ctx, at.uri("d"))
			if err != nil {
				return nil, err
			}
			most := sample(m.process)
			_, _, err = cat(m.path, e.Size)
			return []Value{mebibytes(most())}, errors.Join(err, m.umount())
		}},
	)
	e.Compare(ctx, "memory", "1 TiB sparse",
		Subject{"mount", func(ctx context.Context) ([]Value, error) { return e.mountHuge(ctx, at.uri("huge")) }})
	return ctx.Err()
}

func (e *Env) mountHuge(ctx context.Context, uri string) ([]Value, error) {
	begin := time.Now()
	m, err := e.mount(ctx, uri)
	if err != nil {
		return nil, err
	}
	ready := time.Since(begin)
	most := sample(m.process)
	f, err := os.Open(m.path)
	if err == nil {
		for i := range int64(64) {
			if _, err = f.ReadAt(make([]byte, 4096), i<<34); err != nil {
				break
			}
		}
		err = errors.Join(err, f.Close())
	}
	time.Sleep(time.Second) // what the pull takes
	return []Value{mebibytes(most()), milliseconds("ready", ready)}, errors.Join(err, m.umount())
}

func mebibytes(n int64) Value { return Value{"resident", "MiB", Lower, float64(n) / (1 << 20)} }

// sample watches a process's memory until the function it returns is called,
// which returns the most that it saw.
func sample(p *process) (stop func() int64) {
	var most int64
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			most = max(most, p.ownMemory())
			select {
			case <-done:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	})
	return func() int64 {
		close(done)
		wg.Wait()
		return most
	}
}
