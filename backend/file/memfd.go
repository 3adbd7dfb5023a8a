package file

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/size"
)

// NewMemfd returns a backend in a new memory file (memfd_create(2)) of n zero
// bytes, which is gone when it is closed; name shows in /proc alone. It is
// sparse and mapped as well: a memferry.Viewer beside everything that a file
// can do. Its size is sealed.
//
// Pages take memory from their first write, and also when a hole is looked at
// through a view; ReadAt doesn't do that.
func NewMemfd(name string, n int64) (*Backend, error) {
	if err := (Options{Size: n}).validate(); err != nil {
		return nil, fmt.Errorf("memfd %s: %w", name, err)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("create memfd %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), "memfd:"+name)
	b, err := New(f, Options{Size: n})
	if err != nil {
		return nil, err
	}
	if err := b.sealAndMap(); err != nil {
		_ = f.Close()
		return nil, err
	}
	return b, nil
}

func (b *Backend) sealAndMap() error {
	// Its times don't tell of writes through the mapping.
	b.caps.Generationer = nil
	b.caps.Viewer = b
	b.mapped = []byte{}
	return b.control("map", func(fd int) error {
		const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			return fmt.Errorf("seal: %w", err)
		}
		if b.size == 0 {
			return nil
		}
		m, err := unix.Mmap(fd, 0, int(b.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
		if err != nil {
			return fmt.Errorf("reserve %s of address space: %w", size.Format(b.size), err)
		}
		b.mapped = m
		return nil
	})
}

// View returns the mapping of a memfd; other files have none.
func (b *Backend) View(off, n int64) ([]byte, error) {
	if b.mapped == nil {
		return nil, fmt.Errorf("%s: view: %w", b.f.Name(), memferry.ErrNotSupported)
	}
	if !b.views.Enter() {
		return nil, b.closed("view")
	}
	if err := memferry.CheckRange("view", off, n, b.size); err != nil {
		b.views.Leave()
		return nil, fmt.Errorf("%s: %w", b.f.Name(), err)
	}
	return b.mapped[off : off+n : off+n], nil
}

// ViewForWrite is View: the kernel itself sees what is written.
func (b *Backend) ViewForWrite(off, n int64) ([]byte, error) { return b.View(off, n) }

// ReleaseView ends the use of a view.
func (b *Backend) ReleaseView() { b.views.Leave() }
