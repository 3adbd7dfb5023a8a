package faulty

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/memferry/memferry"
)

// Volatile is a backend whose writes reach the one below when they are synced,
// and are lost if it crashes before: a disk with a write cache.
//
// It is made for tests, and simple: one lock is held during all its work, also
// the backend's below.
type Volatile struct {
	b memferry.Backend

	mu     sync.RWMutex
	cache  map[int64][]byte // by page number; written and not synced
	closed bool
}

var (
	_ memferry.Backend    = (*Volatile)(nil)
	_ memferry.ZeroWriter = (*Volatile)(nil)
)

// NewVolatile wraps b, which is closed with it.
func NewVolatile(b memferry.Backend) *Volatile {
	return &Volatile{b: b, cache: map[int64][]byte{}}
}

// Crash drops what was not synced, but for the pages (by offset) that keep
// says were written all the same; nil keeps none. The backend works on, as
// after a reboot.
func (v *Volatile) Crash(keep func(off int64) bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var errs error
	for page, p := range v.cache {
		if keep != nil && keep(page*memferry.PageSize) {
			_, err := v.b.WriteAt(p, page*memferry.PageSize)
			errs = errors.Join(errs, err)
		}
	}
	clear(v.cache)
	return errs
}

// Unsynced returns how many pages a crash would lose.
func (v *Volatile) Unsynced() int {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return len(v.cache)
}

// Size is that of the wrapped backend.
func (v *Volatile) Size() int64 { return v.b.Size() }

func (v *Volatile) checkLocked(op string) error {
	if v.closed {
		return fmt.Errorf("%s: %w", op, memferry.ErrClosed)
	}
	return nil
}

// ReadAt reads what was written last, synced or not.
func (v *Volatile) ReadAt(p []byte, off int64) (int, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if err := v.checkLocked("read"); err != nil {
		return 0, err
	}
	n, err := v.b.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	for done := 0; done < n; {
		page, at := (off+int64(done))/memferry.PageSize, (off+int64(done))%memferry.PageSize
		m := min(n-done, int(memferry.PageSize-at))
		if c, ok := v.cache[page]; ok {
			copy(p[done:done+m], c[at:])
		}
		done += m
	}
	return n, err
}

// WriteAt keeps p for the next Sync.
func (v *Volatile) WriteAt(p []byte, off int64) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.checkLocked("write"); err != nil {
		return 0, err
	}
	if err := memferry.CheckRange("write", off, int64(len(p)), v.Size()); err != nil {
		return 0, err
	}
	if memferry.CapabilitiesOf(v.b).ReadOnly {
		return 0, fmt.Errorf("write: %w", memferry.ErrReadOnly)
	}
	for done := 0; done < len(p); {
		page, at := (off+int64(done))/memferry.PageSize, (off+int64(done))%memferry.PageSize
		c, err := v.pageLocked(page)
		if err != nil {
			return done, err
		}
		done += copy(c[at:], p[done:])
	}
	return len(p), nil
}

// pageLocked returns a page's place in the cache.
func (v *Volatile) pageLocked(page int64) ([]byte, error) {
	if c, ok := v.cache[page]; ok {
		return c, nil
	}
	off := page * memferry.PageSize
	c := make([]byte, min(memferry.PageSize, v.Size()-off))
	if _, err := v.b.ReadAt(c, off); err != nil {
		return nil, err
	}
	v.cache[page] = c
	return c, nil
}

// WriteZeroes writes zeroes, which a crash takes as well.
func (v *Volatile) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	if err := memferry.CheckRange("write zeroes", off, n, v.Size()); err != nil {
		return err
	}
	if flags&memferry.ZeroFast != 0 {
		return fmt.Errorf("fast zeroing: %w", memferry.ErrNotSupported)
	}
	zeroes := make([]byte, min(n, 1<<20))
	for n > 0 {
		m, err := v.WriteAt(zeroes[:min(n, int64(len(zeroes)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(m), n-int64(m)
	}
	return nil
}

// Sync writes what was kept to the wrapped backend, and syncs that.
func (v *Volatile) Sync() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.checkLocked("sync"); err != nil {
		return err
	}
	for page, p := range v.cache {
		if _, err := v.b.WriteAt(p, page*memferry.PageSize); err != nil {
			return err
		}
	}
	if err := v.b.Sync(); err != nil {
		return err
	}
	clear(v.cache)
	return nil
}

// Close closes the wrapped backend, and drops what was not synced.
func (v *Volatile) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	clear(v.cache)
	return v.b.Close()
}

// Capabilities are few: what else the wrapped backend can do would show what
// is not synced as lost already.
func (v *Volatile) Capabilities() memferry.Capabilities {
	inner := memferry.CapabilitiesOf(v.b)
	c := memferry.Capabilities{ReadOnly: inner.ReadOnly}
	if !c.ReadOnly {
		c.ZeroWriter = v
	}
	return c
}
