package fuse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/frontend"
)

const (
	// busyRetries and busyDelay are how long Close waits for those that look
	// at every new mount for a moment, such as indexers.
	busyRetries = 20
	busyDelay   = 25 * time.Millisecond

	// endTimeout is how long the kernel may take to end the connection of an
	// unmounted file system before it must be mounted elsewhere too.
	endTimeout = 10 * time.Second
)

// Device is a mounted file. Its states are mounted, then ended, for ever.
type Device struct {
	fs     *fileSystem
	target target
	path   string // of the file
	dev    uint64
	log    *slog.Logger

	// ended is closed once nothing is mounted or served any more.
	ended chan struct{}
	// unwatch ends what watchInvalidate began.
	unwatch func()

	mu     sync.Mutex // serializes Close, Detach and Abort; held across I/O
	synced error      // what the last flush came to
}

var _ frontend.Device = (*Device)(nil)

// Mount makes b a file at path, and returns when the file can be used. The
// backend stays the caller's, to be closed after the device. ctx is only for
// the time of the call.
func Mount(ctx context.Context, b memferry.Backend, path string, o Options) (*Device, error) {
	caps := memferry.CapabilitiesOf(b)
	o, err := o.withDefaults(caps)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	t, err := prepareTarget(path)
	if err != nil {
		return nil, err
	}
	d, err := mount(b, caps, t, o)
	if err != nil {
		t.remove()
		return nil, err
	}
	return d, nil
}

func mount(b memferry.Backend, caps memferry.Capabilities, t target, o Options) (*Device, error) {
	a, err := attach(t, o)
	if err != nil {
		return nil, err
	}
	fs, err := newFileSystem(b, caps, o, a.fileRoot)
	if err != nil {
		a.abandon(t)
		return nil, err
	}
	// The library takes a descriptor that is mounted already by this name.
	server, err := gofuse.NewServer(fs, "/dev/fd/"+strconv.Itoa(a.fd), serverOptions(fs, o))
	if err != nil {
		a.fd = -1 // the library has closed it
		a.abandon(t)
		fs.buffers.close() //nolint:errcheck // nothing uses it
		return nil, fmt.Errorf("mount %s: FUSE handshake: %w", t.path, err)
	}
	fs.opens.server = server
	d := &Device{fs: fs, target: t, path: t.path, log: o.Logger, ended: make(chan struct{})}
	if t.dir {
		d.path = filepath.Join(t.path, o.Name)
	}
	fs.gone = func() bool { return !d.mounted() }
	d.unwatch = fs.watchInvalidate(b)
	go d.serve(server)
	if err := d.start(&a, o); err != nil {
		a.hide()  //nolint:errcheck // the first error is returned
		d.Abort() //nolint:errcheck // likewise
		return nil, err
	}
	return d, nil
}

// abandon takes down a mount that never got a server.
func (a *attachment) abandon(t target) {
	a.discard()
	if mounts, err := mountsAt(t.path); err == nil && len(mounts) > 0 && mounts[len(mounts)-1].ours() {
		detach(t.path) //nolint:errcheck // an earlier error is being returned
	}
}

func serverOptions(fs *fileSystem, o Options) *gofuse.MountOptions {
	mo := &gofuse.MountOptions{
		Name:                    fsSubtype,
		FsName:                  fsSubtype,
		MaxWrite:                maxRequest,
		MaxBackground:           maxBackground,
		CongestionThreshold:     congestionThreshold,
		MaxInflightRequestBytes: maxPendingInput,
		// A backing file on overlayfs is itself one layer deep.
		MaxStackDepth:            2,
		DisableXAttrs:            true,
		DisableReadDirPlus:       true,
		ExplicitDataCacheControl: true,
		ExtraCapabilities:        gofuse.CAP_ASYNC_DIO | gofuse.CAP_DIRECT_IO_ALLOW_MMAP,
		DisableSplice:            true,
		Logger:                   slog.NewLogLogger(o.Logger.With("component", "go-fuse").Handler(), slog.LevelDebug),
		PanicHandler: func(v any) gofuse.Status {
			o.Logger.Error("panic in a FUSE request", "panic", v, "stack", string(debug.Stack()))
			return gofuse.EIO
		},
	}
	if fs.writeBack {
		mo.ExtraCapabilities |= gofuse.CAP_WRITEBACK_CACHE
		mo.DisabledCapabilities |= gofuse.CAP_PASSTHROUGH // the kernel wants one or the other
	}
	return mo
}

// serve answers requests until the file system is unmounted, by whomever, and
// then removes what is left.
func (d *Device) serve(server *gofuse.Server) {
	server.Serve()
	d.unwatch()
	d.fs.giveUp()
	d.fs.repairs.Wait()
	if d.mounted() { // aborted, not unmounted
		if err := detach(d.target.path); err != nil {
			d.log.Warn("can't unmount", "path", d.target.path, "err", err)
		}
	}
	d.fs.buffers.close() //nolint:errcheck // can't fail on our own mapping
	d.target.remove()
	close(d.ended)
}

// start puts the file in its place and prepares the kernel.
func (d *Device) start(a *attachment, o Options) error {
	if err := a.reveal(d.target, o.Name); err != nil {
		return err
	}
	if err := outside(d.introduce); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	d.setReadAhead(o.ReadAhead)
	d.fs.self.Store(&mountedFile{path: d.path, dev: d.dev})
	return nil
}

// introduce looks at the file as the kernel shows it.
func (d *Device) introduce() error {
	fd, err := openRetry(d.path, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "open", Path: d.path, Err: err}
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: d.path, Err: err}
	}
	if st.Size != d.fs.size {
		return fmt.Errorf("%s: the kernel shows %d bytes of %d", d.path, st.Size, d.fs.size)
	}
	d.dev = st.Dev
	// Once told that there is nothing to poll, the kernel does not ask again.
	// Were it to ask within the Go runtime's poller, the thread would block
	// where the scheduler can't replace it.
	unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0) //nolint:errcheck // the answer is of no interest
	return nil
}

// setReadAhead raises the limit of 128 KiB that the handshake can only lower.
// Page faults of a mapping would otherwise crawl.
func (d *Device) setReadAhead(n int64) {
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(d.dev), unix.Minor(d.dev))
	if err := os.WriteFile(name, []byte(strconv.FormatInt(n>>10, 10)), 0); err != nil {
		d.log.Debug("the kernel's read-ahead stays at 128 KiB", "err", err)
	}
}

// mounted reports whether our mount is the one on the path.
func (d *Device) mounted() bool {
	mounts, err := mountsAt(d.target.path)
	if err != nil || len(mounts) == 0 {
		return false
	}
	top := mounts[len(mounts)-1]
	return top.ours() && (d.dev == 0 || top.dev == d.dev)
}

// Path is the file's.
func (d *Device) Path() string { return d.path }

// Passthrough reports whether the kernel reads the file without us.
func (d *Device) Passthrough() bool { return d.fs.opens.usesPassthrough() }

// Sync makes the kernel write out what it caches, and syncs the backend. The
// process that serves the file should use it rather than File; see the
// package's section on deadlocks.
func (d *Device) Sync() error {
	self := d.fs.self.Load()
	if d.fs.readOnly || self == nil {
		return nil
	}
	if err := self.with(unix.O_RDONLY, fsync); err != nil {
		return fmt.Errorf("sync %s: %w", d.path, err)
	}
	return nil
}

// File opens the file. See the package's section on deadlocks.
func (d *Device) File() (*os.File, error) {
	flags := unix.O_RDWR
	if d.fs.readOnly {
		flags = unix.O_RDONLY
	}
	fd, err := openRetry(d.path, flags|unix.O_CLOEXEC)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: d.path, Err: err}
	}
	return os.NewFile(uintptr(fd), d.path), nil
}

// Wait waits for the file to be unmounted, by whomever.
func (d *Device) Wait(ctx context.Context) error {
	select {
	case <-d.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close flushes and unmounts. While an application holds the file it fails
// with memferry.ErrInUse and names who, as far as that can be seen. An error
// of the flush does not keep the file mounted, as the kernel has dropped what
// it could not write; it is returned, once unmounted, by every call.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over() {
		return d.synced
	}
	d.flush()
	if err := d.unmountPatiently(); err != nil {
		return errors.Join(d.synced, err)
	}
	select {
	case <-d.ended:
		return d.synced
	case <-time.After(endTimeout):
		return errors.Join(d.synced, fmt.Errorf(
			"%s is unmounted here, and still in use in another mount namespace: %w", d.path, memferry.ErrInUse))
	}
}

// Detach flushes and takes the file off its path at once; applications that
// hold it go on using it. Wait returns when the last one has let it go.
func (d *Device) Detach() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over() {
		return d.synced
	}
	d.flush()
	if err := detach(d.target.path); err != nil && !errors.Is(err, unix.EINVAL) {
		return errors.Join(d.synced, fmt.Errorf("unmount %s: %w", d.target.path, err))
	}
	return d.synced
}

// Abort ends the mount without a flush. Applications that hold the file get
// errors. It needs root to do so at once; otherwise it detaches and gives up
// the requests in flight.
func (d *Device) Abort() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over() {
		return nil
	}
	d.fs.giveUp()
	path := d.target.path
	if d.mounted() {
		unix.Unmount(path, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW) //nolint:errcheck // EBUSY, but the connection is cut
	}
	if d.mounted() {
		if err := detach(path); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	select {
	case <-d.ended:
		return nil
	case <-time.After(endTimeout):
		return fmt.Errorf("%s is unmounted, and still held by an application: %w", d.path, memferry.ErrInUse)
	}
}

func (d *Device) over() bool {
	select {
	case <-d.ended:
		return true
	default:
		return false
	}
}

// flush writes out the kernel's cache, and syncs the backend by that.
func (d *Device) flush() {
	self := d.fs.self.Load()
	if d.fs.readOnly || self == nil {
		return
	}
	err := self.with(unix.O_RDONLY, fsync)
	if errors.Is(err, errNotMounted) {
		return // which flushes too
	}
	d.synced = nil
	if err != nil {
		d.synced = fmt.Errorf("flush %s: %w", d.path, err)
	}
}

func fsync(fd int) error {
	for {
		if err := unix.Fsync(fd); err != unix.EINTR {
			return err
		}
	}
}

func (d *Device) unmountPatiently() error {
	path := d.target.path
	for try := 0; ; try++ {
		if !d.mounted() {
			return nil // from outside
		}
		err := unmount(path, 0)
		switch {
		case err == nil || errors.Is(err, syscall.EINVAL):
			return nil
		case !errors.Is(err, unix.EBUSY):
			return fmt.Errorf("unmount %s: %w", path, err)
		case try >= busyRetries:
			return d.busyError()
		}
		time.Sleep(busyDelay)
	}
}

func (d *Device) busyError() error {
	who := "another process"
	if found := holders(d.target.path); len(found) > 0 {
		who = strings.Join(found, ", ")
	}
	return fmt.Errorf("%s is used by %s: %w; end that and try again, or unmount lazily", d.path, who, memferry.ErrInUse)
}
