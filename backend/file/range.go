package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/extent"
)

const (
	punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroRange = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE

	// probeLen is how much is punched behind the end of a file to see whether
	// that works.
	probeLen = 4096
	// zeroBuffer is how many zeroes are written at once where nothing better
	// is left.
	zeroBuffer = 256 << 10
)

// medium is what was found out about the file when it was opened.
type medium struct {
	device bool
	block  int64 // logical block size of a device
}

// openDevice asks a block device for its sizes.
func (b *Backend) openDevice() error {
	b.medium.device = true
	return b.control("ioctl", func(fd int) error {
		var n uint64
		if err := ioctl(fd, unix.BLKGETSIZE64, unsafe.Pointer(&n)); err != nil {
			return err
		}
		if n > memferry.MaxSize {
			return fmt.Errorf("size %d: larger than %d", n, int64(memferry.MaxSize))
		}
		b.size = int64(n)
		block, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
		if err == nil && (block <= 0 || block&(block-1) != 0) {
			err = fmt.Errorf("block size %d", block)
		}
		b.medium.block = int64(block)
		return err
	})
}

func ioctl(fd int, request uint, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// probe fills b.caps.
func (b *Backend) probe() {
	b.caps.Filer = b
	if !b.medium.device {
		if b.seek(unix.SEEK_DATA, 0) == nil {
			b.caps.Extenter = b
		}
		b.caps.Generationer = b
	}
	if b.caps.ReadOnly {
		return
	}
	b.caps.ZeroWriter = b
	if b.canPunch() {
		b.caps.Trimmer = b
	}
}

// seek reports whether the file can be asked for data and holes.
func (b *Backend) seek(whence int, off int64) error {
	return b.control("seek", func(fd int) error {
		_, err := unix.Seek(fd, off, whence)
		if err == unix.ENXIO { // no data from there on
			return nil
		}
		return err
	})
}

func (b *Backend) canPunch() bool {
	if b.medium.device {
		return b.canDiscard()
	}
	var st unix.Statfs_t
	if b.control("statfs", func(fd int) error { return unix.Fstatfs(fd, &st) }) == nil {
		switch st.Type {
		case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.F2FS_SUPER_MAGIC:
			// Known without a try, which would change the file's times, and so
			// its generation, whenever it is opened.
			return true
		}
	}
	// Behind the end, where there is nothing to lose.
	end := (b.size + probeLen - 1) &^ (probeLen - 1)
	return b.fallocate(punchHole, end, probeLen) == nil
}

// canDiscard asks sysfs (Documentation/ABI/stable/sysfs-block). A partition
// has no queue of its own.
func (b *Backend) canDiscard() bool {
	var st unix.Stat_t
	if b.control("stat", func(fd int) error { return unix.Fstat(fd, &st) }) != nil {
		return false
	}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	for _, queue := range []string{"queue/", "../queue/"} {
		raw, err := os.ReadFile(dir + queue + "discard_max_bytes")
		if err == nil {
			n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
			return err == nil && n > 0
		}
	}
	return false
}

func (b *Backend) fallocate(mode uint32, off, n int64) error {
	defer b.known.forget()
	return b.control("fallocate", func(fd int) error {
		return ignoringEINTR(func() error { return unix.Fallocate(fd, mode, off, n) })
	})
}

func (b *Backend) blockIoctl(request uint, off, n int64) error {
	return b.control("ioctl", func(fd int) error {
		r := [2]uint64{uint64(off), uint64(n)}
		return ioctl(fd, request, unsafe.Pointer(&r))
	})
}

// unsupported reports whether err says that the file can't do that at all.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) ||
		errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENODEV)
}

// Trim punches a hole. On a block device, only whole blocks are discarded; the
// kernel is first asked for a discard after which they read as zero.
func (b *Backend) Trim(off, n int64) error {
	if err := b.checkWrite("trim", off, n); err != nil {
		return err
	}
	if b.medium.device {
		end := (off + n) &^ (b.medium.block - 1)
		off = (off + b.medium.block - 1) &^ (b.medium.block - 1)
		n = end - off
	}
	if n <= 0 {
		return nil
	}
	err := b.fallocate(punchHole, off, n)
	if unsupported(err) && b.medium.device {
		err = b.blockIoctl(unix.BLKDISCARD, off, n)
	}
	if unsupported(err) {
		return fmt.Errorf("%w: %w", memferry.ErrNotSupported, err)
	}
	return noSpace(err)
}

// WriteZeroes takes the cheapest way that the file has and flags allow.
func (b *Backend) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	const op = "write zeroes"
	if err := b.checkWrite(op, off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	// The edges of whole blocks; the same as the range where there are none.
	first, last := off, off+n
	if b.medium.device {
		first = (off + b.medium.block - 1) &^ (b.medium.block - 1)
		last = (off + n) &^ (b.medium.block - 1)
	}
	if first >= last {
		return b.writeZeroes(off, n)
	}
	err := b.zeroBlocks(first, last-first, flags)
	if unsupported(err) {
		if flags&memferry.ZeroFast != 0 {
			return fmt.Errorf("%s: fast zeroing: %w", b.f.Name(), memferry.ErrNotSupported)
		}
		err = b.writeZeroes(first, last-first)
	}
	if err != nil {
		return noSpace(err)
	}
	if err := b.writeZeroes(off, first-off); err != nil {
		return err
	}
	return b.writeZeroes(last, off+n-last)
}

// zeroBlocks asks the kernel for zeroes.
func (b *Backend) zeroBlocks(off, n int64, flags memferry.ZeroFlags) error {
	err := error(unix.EOPNOTSUPP)
	if flags&memferry.ZeroNoHole == 0 {
		err = b.fallocate(punchHole, off, n)
	}
	// For a device without the command, the kernel itself writes zeroes here
	// (blkdev_issue_zeroout), which is not fast.
	if slow := b.medium.device; unsupported(err) && !(slow && flags&memferry.ZeroFast != 0) {
		err = b.fallocate(zeroRange, off, n)
		if slow && unsupported(err) {
			err = b.blockIoctl(unix.BLKZEROOUT, off, n)
		}
	}
	return err
}

var zeroes [zeroBuffer]byte

func (b *Backend) writeZeroes(off, n int64) error {
	for n > 0 {
		w, err := b.f.WriteAt(zeroes[:min(n, zeroBuffer)], off)
		if err != nil {
			return noSpace(err)
		}
		off, n = off+int64(w), n-int64(w)
	}
	return nil
}

// Extents asks for data and holes (lseek(2), SEEK_DATA and SEEK_HOLE).
func (b *Backend) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if b.views.Closed() {
		return nil, b.closed("extents")
	}
	if err := memferry.CheckRange("extents", off, n, b.size); err != nil || n == 0 {
		return nil, fmt.Errorf("%s: extents of %d bytes at %d: %w", b.f.Name(), n, off, memferry.ErrOutOfRange)
	}
	var extents []memferry.Extent
	err := b.control("seek", func(fd int) error {
		var err error
		extents, err = b.extents(ctx, fd, off, off+n)
		return err
	})
	return extents, err
}

// extents looks for data and holes in [off, end).
func (b *Backend) extents(ctx context.Context, fd int, off, end int64) ([]memferry.Extent, error) {
	l := extent.New(off, end)
	// Each round adds two at most.
	for l.Next() < end && len(l.Extents) < memferry.MaxExtents-1 {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		known, changes, ok := b.known.find(l.Next())
		if ok {
			l.Add(known, 0)
			continue
		}
		data, err := unix.Seek(fd, l.Next(), unix.SEEK_DATA)
		if err == unix.ENXIO { // a hole up to the end
			l.Add(end, extent.Hole)
			break
		}
		if err != nil {
			return nil, err
		}
		l.Add(data, extent.Hole)
		if l.Next() >= end {
			break
		}
		next, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err == unix.ENXIO { // cut off meanwhile
			next = end
		} else if err != nil {
			return nil, err
		}
		if next > data {
			b.known.found(data, next, changes)
			l.Add(next, 0)
		}
	}
	return l.Extents, nil
}
