package backend

import (
	"fmt"

	"github.com/memferry/memferry"
)

// ReadOnly returns b without its writes: they fail with memferry.ErrReadOnly.
// Closing it closes b.
func ReadOnly(b memferry.Backend) memferry.Backend {
	c := memferry.CapabilitiesOf(b)
	c.Trimmer, c.ZeroWriter, c.ContextWriter = nil, nil, nil
	c.ReadOnly = true
	if c.Viewer != nil {
		c.Viewer = readOnlyViewer{c.Viewer}
	}
	return &readOnly{Backend: b, capabilities: c}
}

type readOnly struct {
	memferry.Backend
	capabilities memferry.Capabilities
}

func (r *readOnly) Capabilities() memferry.Capabilities { return r.capabilities }

// WriteAt refuses. The range goes first, as everywhere.
func (r *readOnly) WriteAt(p []byte, off int64) (int, error) {
	if err := memferry.CheckRange("write", off, int64(len(p)), r.Size()); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("write of %d bytes at %d: %w", len(p), off, memferry.ErrReadOnly)
}

type readOnlyViewer struct{ memferry.Viewer }

func (readOnlyViewer) ViewForWrite(off, n int64) ([]byte, error) {
	return nil, fmt.Errorf("view for writing of %d bytes at %d: %w", n, off, memferry.ErrReadOnly)
}
