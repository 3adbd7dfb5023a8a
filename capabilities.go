package memferry

import (
	"context"
	"os"
)

// Trimmer is implemented by backends that can give storage back.
type Trimmer interface {
	// Trim says that the n bytes at off are no longer needed. Until they are
	// written again they read as zero or as before.
	Trim(off, n int64) error
}

// ZeroFlags qualify a [ZeroWriter] call.
type ZeroFlags uint8

const (
	// ZeroNoHole asks that the range stays allocated.
	ZeroNoHole ZeroFlags = 1 << iota
	// ZeroFast asks for ErrNotSupported, with nothing written, where zeroing
	// would be no faster than writing zeroes.
	ZeroFast
)

// ZeroWriter is implemented by backends that write zeroes without being sent
// them.
type ZeroWriter interface {
	// WriteZeroes makes the n bytes at off read as zero, under the rules of
	// WriteAt.
	WriteZeroes(off, n int64, flags ZeroFlags) error
}

// ExtentFlags tell what is known of an extent; zero means allocated data.
type ExtentFlags uint8

const (
	// ExtentHole says that no storage is allocated for the range.
	ExtentHole ExtentFlags = 1 << iota
	// ExtentZero says that the range reads as zero.
	ExtentZero
)

// Extent is a run of bytes of one kind.
type Extent struct {
	Off, Len int64 // bytes
	Flags    ExtentFlags
}

// MaxExtents bounds how many extents one call returns.
const MaxExtents = 4096

// Extenter is implemented by backends that know where their data is.
type Extenter interface {
	// Extents describes [off, off+n) from its start: at least one extent, at
	// most [MaxExtents], contiguous, each longer than zero, the first starting
	// at off and none reaching past off+n. It may stop early; call again from
	// where it stopped. n must be greater than zero and the range within Size.
	Extents(ctx context.Context, off, n int64) ([]Extent, error)
}

// ReadOp is one read of a batch: P is filled from Off, and N and Err are set
// as ReadAt would return them.
type ReadOp struct {
	Off int64
	P   []byte
	N   int
	Err error
}

// BatchReader is implemented by backends for which many reads in one call cost
// less than one by one.
type BatchReader interface {
	// ReadBatch performs all ops, in any order. The error concerns the batch as
	// a whole; those of single reads are in their ReadOp.
	ReadBatch(ctx context.Context, ops []ReadOp) error
}

// Generationer is implemented by backends that can tell whether their content
// is still the same.
type Generationer interface {
	// Generation returns a tag that changes when the content does, however it
	// was changed. Tags are compared for equality only; an empty tag means
	// unknown.
	Generation(ctx context.Context) (string, error)
}

// Fencer is implemented by remote backends whose requests may outlive the
// process that made them: in the network, or in a server that has not noticed
// its end. Each such backend makes its requests in the name of a session, by
// which a later one can end them.
type Fencer interface {
	// Session is the name of this backend's session: constant, unlike that of
	// any other, at most [MaxSession] printable bytes, and a secret, since
	// whoever knows it can end the session.
	Session() string
	// Fence ends another session, which may have ended long ago. Once it has
	// returned nil, no request of that session changes the content any more:
	// each was carried out before, or never will be.
	Fence(ctx context.Context, session string) error
}

// MaxSession bounds the name of a session, in bytes.
const MaxSession = 48

// ContextReader is implemented by backends whose reads can be abandoned.
type ContextReader interface {
	// ReadAtContext is ReadAt that returns early, with ctx's error, when ctx is
	// done. p may be written to until it returns, not after.
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

// ContextWriter is implemented by backends whose writes can be abandoned.
type ContextWriter interface {
	// WriteAtContext is WriteAt that returns early, with ctx's error, when ctx
	// is done; what it leaves in the range is then unknown.
	WriteAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

// StreamReader is implemented by remote backends that can deliver a read in
// pieces as they arrive, so that the caller holds no buffer meanwhile.
type StreamReader interface {
	// ReadStream reads the n bytes at off, which must lie within Size, and
	// passes them to sink in pieces that do not overlap, in any order, together
	// covering the range when it returns nil. A piece with a nil p is n zero
	// bytes; otherwise n is len(p), and p is valid only during the call. Calls
	// to sink do not overlap. An error of sink ends the read and is returned.
	ReadStream(ctx context.Context, off, n int64, sink func(off, n int64, p []byte) error) error
}

// Viewer is implemented by backends that are mapped memory. A view is the
// memory itself; a write through the backend shows in it at once.
//
// The mapping must hold nothing but the backend's bytes and be unmapped when it
// is no longer needed, not used for something else: who has a view may give
// references to its pages to the kernel (vmsplice(2)), which keeps them for a
// while after ReleaseView.
type Viewer interface {
	// View returns the n bytes at off for reading. The caller must call
	// ReleaseView once when done; Close waits for that.
	View(off, n int64) ([]byte, error)
	// ViewForWrite returns them for writing, and counts as a write of all of
	// them, whatever the caller then stores.
	ViewForWrite(off, n int64) ([]byte, error)
	// ReleaseView ends the use of one view.
	ReleaseView()
}

// Filer is implemented by backends whose bytes are those of a file, offset by
// offset, for splice, passthrough and reflinks.
type Filer interface {
	// File returns the file. It belongs to the backend: don't close it, and
	// don't use it after the backend's Close.
	File() *os.File
}

// ReadOnlyer is implemented by backends that may refuse writes.
type ReadOnlyer interface {
	// ReadOnly reports whether every write fails with ErrReadOnly.
	ReadOnly() bool
}

// BlockSizes are the constraints of a backend on offsets and lengths, in bytes.
type BlockSizes struct {
	Min       int64 // offsets and lengths must be multiples; 0 or 1: none
	Preferred int64 // best performance from multiples of this; 0: unknown
	Max       int64 // longest read or write; 0: none
}

// BlockSizer is implemented by backends with such constraints or preferences.
type BlockSizer interface {
	BlockSizes() BlockSizes
}

// Capabilities are the optional interfaces of a backend; nil means absent.
type Capabilities struct {
	Trimmer       Trimmer
	ZeroWriter    ZeroWriter
	Extenter      Extenter
	BatchReader   BatchReader
	Generationer  Generationer
	Fencer        Fencer
	ContextReader ContextReader
	ContextWriter ContextWriter
	StreamReader  StreamReader
	Viewer        Viewer
	Filer         Filer
	ReadOnly      bool
	BlockSizes    BlockSizes
}

// Capabler is implemented by decorators, whose method set says nothing about
// what the decorated backend can do.
type Capabler interface {
	Capabilities() Capabilities
}

// CapabilitiesOf tells what b can do beyond [Backend]. Ask once, when b is
// opened: the answer does not change.
func CapabilitiesOf(b Backend) Capabilities {
	if c, ok := b.(Capabler); ok {
		return c.Capabilities()
	}
	var c Capabilities
	c.Trimmer, _ = b.(Trimmer)
	c.ZeroWriter, _ = b.(ZeroWriter)
	c.Extenter, _ = b.(Extenter)
	c.BatchReader, _ = b.(BatchReader)
	c.Generationer, _ = b.(Generationer)
	c.Fencer, _ = b.(Fencer)
	c.ContextReader, _ = b.(ContextReader)
	c.ContextWriter, _ = b.(ContextWriter)
	c.StreamReader, _ = b.(StreamReader)
	c.Viewer, _ = b.(Viewer)
	c.Filer, _ = b.(Filer)
	if r, ok := b.(ReadOnlyer); ok {
		c.ReadOnly = r.ReadOnly()
	}
	if s, ok := b.(BlockSizer); ok {
		c.BlockSizes = s.BlockSizes()
	}
	return c
}
