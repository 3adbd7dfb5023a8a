// Package faulty makes backends fail on purpose, for tests and simulations.
//
// [New] wraps a backend with rules: where a [Predicate] holds for an
// operation, a [Fault] happens to it. Predicates compose:
//
//	faulty.New(b, faulty.Options{Seed: seed, Rules: []faulty.Rule{
//		{When: faulty.And(faulty.Kinds(faulty.Write), faulty.Chance(0.01)), Fault: faulty.Fault{Err: syscall.EIO}},
//		{When: faulty.First(3, faulty.Kinds(faulty.Read)), Fault: faulty.Fault{Delay: time.Second}},
//	}})
//
// [NewVolatile] wraps a backend so that a simulated power loss takes what was
// not synced.
package faulty

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/gate"
)

// Kind is a kind of operation.
type Kind uint8

// The kinds of operations.
const (
	Read Kind = iota
	Write
	Sync
	Trim
	Zero
	Extents
	Generation
	Fence
	kinds
)

func (k Kind) String() string {
	names := [kinds]string{"read", "write", "sync", "trim", "zero", "extents", "generation", "fence"}
	if k < kinds {
		return names[k]
	}
	return "unknown"
}

// Op is an operation that is about to happen.
type Op struct {
	Kind     Kind
	Off, Len int64
	// Roll is a random number from 0 to 1, drawn for this operation from the
	// seed.
	Roll float64
}

// Fault is what happens to an operation. Its parts happen in the order of the
// fields; the zero value does nothing.
type Fault struct {
	// Delay is how long the operation waits first. Close and the operation's
	// context end the wait.
	Delay time.Duration
	// Hang makes it wait for those two alone.
	Hang bool
	// Lose makes a write, trim, zero or sync return nil without being done.
	Lose bool
	// Short performs a read or write for the first so many bytes alone, and
	// then fails with Err, or io.ErrUnexpectedEOF if that is nil.
	Short int64
	// Done performs the operation before it fails with Err: the answer is lost,
	// not the request.
	Done bool
	// Err is returned, and without Short or Done, instead of the operation.
	Err error
}

// Rule is a fault and when it happens.
type Rule struct {
	When  Predicate
	Fault Fault
}

// Options configure a Backend. The zero value adds no faults.
type Options struct {
	// Seed makes Chance repeatable, as far as the order of operations is.
	Seed uint64
	// Rules are looked at in order, and the first whose predicate holds is
	// applied.
	Rules []Rule
}

// Backend is a backend with faults. What would go around them (views, files,
// batches, streams) it does not offer.
type Backend struct {
	b     memferry.Backend
	inner memferry.Capabilities
	caps  memferry.Capabilities

	mu    sync.Mutex
	rand  *rand.Rand
	rules []Rule

	ops      [kinds]atomic.Int64
	injected atomic.Int64

	gate    gate.Gate
	closing context.Context
	cancel  context.CancelFunc
	close   func() error
}

var (
	_ memferry.Backend  = (*Backend)(nil)
	_ memferry.Capabler = (*Backend)(nil)
)

// New wraps b, which is closed with it.
func New(b memferry.Backend, o Options) *Backend {
	f := &Backend{
		b:     b,
		inner: memferry.CapabilitiesOf(b),
		rand:  rand.New(rand.NewPCG(o.Seed, 1)),
		rules: o.Rules,
	}
	f.closing, f.cancel = context.WithCancel(context.Background())
	f.close = sync.OnceValue(func() error {
		f.gate.Shut()
		f.cancel()
		err := b.Close() // unblocks the calls that are in b
		<-f.gate.Idle()
		return err
	})
	f.caps = f.capabilities()
	return f
}

func (f *Backend) capabilities() memferry.Capabilities {
	c := memferry.Capabilities{
		ContextReader: f,
		ReadOnly:      f.inner.ReadOnly,
		BlockSizes:    f.inner.BlockSizes,
	}
	if !c.ReadOnly {
		c.ContextWriter = f
	}
	if f.inner.Trimmer != nil {
		c.Trimmer = f
	}
	if f.inner.ZeroWriter != nil {
		c.ZeroWriter = f
	}
	if f.inner.Extenter != nil {
		c.Extenter = f
	}
	if f.inner.Generationer != nil {
		c.Generationer = f
	}
	if f.inner.Fencer != nil {
		c.Fencer = f
	}
	return c
}

// Capabilities are those of the wrapped backend that faults can happen to.
func (f *Backend) Capabilities() memferry.Capabilities { return f.caps }

// SetRules replaces the rules for the operations to come.
func (f *Backend) SetRules(rules ...Rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = rules
}

// Ops returns how many operations of a kind there were.
func (f *Backend) Ops(k Kind) int64 { return f.ops[k].Load() }

// Injected returns how many operations a rule was applied to.
func (f *Backend) Injected() int64 { return f.injected.Load() }

// match draws the operation's number and returns its fault.
func (f *Backend) match(op Op) Fault {
	f.ops[op.Kind].Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	op.Roll = f.rand.Float64()
	for _, r := range f.rules {
		if r.When(op) {
			f.injected.Add(1)
			return r.Fault
		}
	}
	return Fault{}
}

// apply performs an operation with what its fault does to it. do performs the
// first n bytes of it.
func (f *Backend) apply(ctx context.Context, op Op, do func(ctx context.Context, n int64) (int, error)) (int, error) {
	if !f.gate.Enter() {
		return 0, fmt.Errorf("%v: %w", op.Kind, memferry.ErrClosed)
	}
	defer f.gate.Leave()
	fault := f.match(op)
	if err := f.wait(ctx, op, fault); err != nil {
		return 0, err
	}
	switch {
	case fault.Lose && op.Kind != Read && op.Kind != Extents && op.Kind != Generation && op.Kind != Fence:
		return int(op.Len), nil
	case fault.Short > 0 && fault.Short < op.Len && (op.Kind == Read || op.Kind == Write):
		if fault.Err == nil {
			fault.Err = io.ErrUnexpectedEOF
		}
		n, err := do(ctx, fault.Short)
		if err != nil {
			return n, err
		}
	case fault.Done, fault.Err == nil:
		n, err := do(ctx, op.Len)
		if err != nil || fault.Err == nil {
			return n, err
		}
		return 0, injected(op, fault.Err)
	default:
		return 0, injected(op, fault.Err)
	}
	return int(fault.Short), injected(op, fault.Err)
}

func injected(op Op, err error) error {
	return fmt.Errorf("%v of %d bytes at %d: injected: %w", op.Kind, op.Len, op.Off, err)
}

func (f *Backend) wait(ctx context.Context, op Op, fault Fault) error {
	if fault.Delay <= 0 && !fault.Hang {
		return nil
	}
	var timer <-chan time.Time // for ever, if it hangs
	if !fault.Hang {
		t := time.NewTimer(fault.Delay)
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-timer:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%v: %w", op.Kind, ctx.Err())
	case <-f.closing.Done():
		return fmt.Errorf("%v: %w", op.Kind, memferry.ErrClosed)
	}
}

// Size is that of the wrapped backend.
func (f *Backend) Size() int64 { return f.b.Size() }

// Close ends waits and closes the wrapped backend.
func (f *Backend) Close() error { return f.close() }

// ReadAt reads, with faults.
func (f *Backend) ReadAt(p []byte, off int64) (int, error) {
	return f.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext reads, with faults.
func (f *Backend) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return f.apply(ctx, Op{Kind: Read, Off: off, Len: int64(len(p))}, func(ctx context.Context, n int64) (int, error) {
		if f.inner.ContextReader != nil {
			return f.inner.ContextReader.ReadAtContext(ctx, p[:n], off)
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return f.b.ReadAt(p[:n], off)
	})
}

// WriteAt writes, with faults.
func (f *Backend) WriteAt(p []byte, off int64) (int, error) {
	return f.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext writes, with faults.
func (f *Backend) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := memferry.CheckRange("write", off, int64(len(p)), f.Size()); err != nil {
		return 0, err
	}
	return f.apply(ctx, Op{Kind: Write, Off: off, Len: int64(len(p))}, func(ctx context.Context, n int64) (int, error) {
		if f.inner.ContextWriter != nil {
			return f.inner.ContextWriter.WriteAtContext(ctx, p[:n], off)
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return f.b.WriteAt(p[:n], off)
	})
}

// Sync syncs, with faults.
func (f *Backend) Sync() error {
	return f.simple(context.Background(), Op{Kind: Sync}, func(context.Context) error { return f.b.Sync() })
}

func (f *Backend) simple(ctx context.Context, op Op, do func(context.Context) error) error {
	_, err := f.apply(ctx, op, func(ctx context.Context, n int64) (int, error) { return int(n), do(ctx) })
	return err
}

// Trim trims, with faults.
func (f *Backend) Trim(off, n int64) error {
	if err := memferry.CheckRange("trim", off, n, f.Size()); err != nil {
		return err
	}
	return f.simple(context.Background(), Op{Kind: Trim, Off: off, Len: n}, func(context.Context) error {
		if f.inner.Trimmer == nil {
			return fmt.Errorf("trim: %w", memferry.ErrNotSupported)
		}
		return f.inner.Trimmer.Trim(off, n)
	})
}

// WriteZeroes writes zeroes, with faults.
func (f *Backend) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	if err := memferry.CheckRange("write zeroes", off, n, f.Size()); err != nil {
		return err
	}
	return f.simple(context.Background(), Op{Kind: Zero, Off: off, Len: n}, func(context.Context) error {
		if f.inner.ZeroWriter == nil {
			return fmt.Errorf("write zeroes: %w", memferry.ErrNotSupported)
		}
		return f.inner.ZeroWriter.WriteZeroes(off, n, flags)
	})
}

// Extents asks for extents, with faults.
func (f *Backend) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	var e []memferry.Extent
	err := f.simple(ctx, Op{Kind: Extents, Off: off, Len: n}, func(ctx context.Context) error {
		if f.inner.Extenter == nil {
			return fmt.Errorf("extents: %w", memferry.ErrNotSupported)
		}
		var err error
		e, err = f.inner.Extenter.Extents(ctx, off, n)
		return err
	})
	return e, err
}

// Generation asks for the generation, with faults.
func (f *Backend) Generation(ctx context.Context) (string, error) {
	var g string
	err := f.simple(ctx, Op{Kind: Generation}, func(ctx context.Context) error {
		if f.inner.Generationer == nil {
			return nil
		}
		var err error
		g, err = f.inner.Generationer.Generation(ctx)
		return err
	})
	return g, err
}

// Session is that of the wrapped backend.
func (f *Backend) Session() string {
	if f.inner.Fencer == nil {
		return ""
	}
	return f.inner.Fencer.Session()
}

// Fence ends another session, with faults.
func (f *Backend) Fence(ctx context.Context, session string) error {
	return f.simple(ctx, Op{Kind: Fence}, func(ctx context.Context) error {
		if f.inner.Fencer == nil {
			return fmt.Errorf("fence: %w", memferry.ErrNotSupported)
		}
		return f.inner.Fencer.Fence(ctx, session)
	})
}
