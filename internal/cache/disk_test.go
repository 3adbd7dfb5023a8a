package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
)

// disk is a simulated directory with two images: what processes see, and what
// is on the medium. Only Sync and syncDir move something from the one to the
// other for certain.
type disk struct {
	inodes  map[string]*inode // as seen
	durable map[string]*inode // names on the medium
	steps   int               // operations that changed something
	crashAt int               // all operations fail from this one on; 0: never
	full    bool              // no file can grow
	syncErr bool              // fsync fails
	stuck   bool              // files can't be cut
}

var errCrashed = errors.New("the machine is off")

type inode struct {
	data   []byte   // as seen
	synced []byte   // on the medium
	lost   [][2]int // failed to be written once, and is not tried again
}

// settle makes p, a copy of data, what is on the medium.
func (i *inode) settle(p []byte) []byte {
	for _, l := range i.lost {
		if end := min(l[1], len(p)); l[0] < end {
			clear(p[l[0]:end])
		}
	}
	return p
}

func (i *inode) clone() *inode {
	return &inode{slices.Clone(i.data), slices.Clone(i.synced), slices.Clone(i.lost)}
}

func newDisk() *disk {
	return &disk{inodes: map[string]*inode{}, durable: map[string]*inode{}}
}

// step counts an operation that is about to change something.
func (d *disk) step() error {
	d.steps++
	if d.crashAt > 0 && d.steps >= d.crashAt {
		return errCrashed
	}
	return nil
}

// killed returns the disk as the next process finds it.
func (d *disk) killed() *disk {
	n := newDisk()
	for name, i := range d.inodes {
		n.inodes[name] = i.clone()
	}
	for name, i := range d.durable {
		for seen, j := range d.inodes {
			if i == j {
				n.durable[name] = n.inodes[seen]
			}
		}
		if n.durable[name] == nil {
			n.durable[name] = i.clone()
		}
	}
	return n
}

// powerLost returns the disk as the next boot finds it: of what was not synced,
// any sectors may have been written, and any operations on names, in order.
func (d *disk) powerLost(r *rand.Rand) *disk {
	names := d.durable
	if r.IntN(2) == 0 {
		names = d.inodes
	}
	n := newDisk()
	for name, i := range names {
		data, seen := slices.Clone(i.synced), i.settle(slices.Clone(i.data))
		const sector = 64
		for off := 0; off < len(seen); off += sector {
			if r.IntN(3) > 0 {
				continue
			}
			end := min(off+sector, len(seen))
			if end > len(data) {
				data = append(data, make([]byte, end-len(data))...)
			}
			copy(data[off:end], seen[off:end])
		}
		n.inodes[name] = &inode{data: data, synced: slices.Clone(data)}
	}
	n.durable = maps.Clone(n.inodes)
	return n
}

func (d *disk) list() ([]string, error) { return slices.Collect(maps.Keys(d.inodes)), nil }

func (d *disk) read(name string, limit int64) ([]byte, error) {
	i := d.inodes[name]
	if i == nil {
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return slices.Clone(i.data), nil
}

func (d *disk) create(name string) (handle, error) {
	if err := d.step(); err != nil {
		return nil, err
	}
	i := &inode{}
	d.inodes[name] = i
	return &diskFile{d, i}, nil
}

func (d *disk) open(name string) (handle, error) {
	if i := d.inodes[name]; i != nil {
		return &diskFile{d, i}, nil
	}
	return nil, fs.ErrNotExist
}

func (d *disk) rename(from, to string) error {
	if err := d.step(); err != nil {
		return err
	}
	d.inodes[to] = d.inodes[from]
	delete(d.inodes, from)
	return nil
}

func (d *disk) remove(name string) error {
	if err := d.step(); err != nil {
		return err
	}
	delete(d.inodes, name)
	return nil
}

func (d *disk) syncDir() error {
	if err := d.step(); err != nil {
		return err
	}
	if d.syncErr {
		return syscall.EIO
	}
	d.durable = maps.Clone(d.inodes)
	return nil
}

type diskFile struct {
	d *disk
	i *inode
}

func (f *diskFile) WriteAt(p []byte, off int64) (int, error) {
	err := f.d.step()
	n := len(p)
	if err != nil {
		n = len(p) * 2 / 3 // the write that is cut off
		if f.d.steps > f.d.crashAt {
			return 0, err
		}
	}
	if f.d.full && int(off)+n > len(f.i.data) {
		n, err = max(0, min(n/2, 10)), syscall.ENOSPC
	}
	if end := int(off) + n; end > len(f.i.data) {
		f.i.data = append(f.i.data, make([]byte, end-len(f.i.data))...)
	}
	copy(f.i.data[off:], p[:n])
	return n, err
}

func (f *diskFile) Truncate(n int64) error {
	if err := f.d.step(); err != nil {
		return err
	}
	if f.d.stuck {
		return syscall.EIO
	}
	f.i.data = f.i.data[:n]
	return nil
}

func (f *diskFile) Sync() error {
	if err := f.d.step(); err != nil {
		return err
	}
	if f.d.syncErr {
		// As Linux does: what could not be written is forgotten to be unwritten.
		f.i.lost = append(f.i.lost, [2]int{len(f.i.synced), len(f.i.data)})
		return syscall.EIO
	}
	f.i.synced = f.i.settle(slices.Clone(f.i.data))
	return nil
}

func (f *diskFile) Close() error { return nil }
