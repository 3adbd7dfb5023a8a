// Package cache is the persistent local side of a region: its bytes, and what
// is known of them, in a directory.
//
//	data         the bytes, a sparse file of the region's size
//	state        whose cache it is, and the status of every page
//	journal-N    what has changed since
//	lock         held by the one process that uses the cache, names its pid
//
// What is promised, and how it is kept through the end of the process at any
// instant, or of the machine, is in docs/adr/0002-cache-journal.md.
package cache

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
	"github.com/memferry/memferry/internal/size"
)

const (
	dataName = "data"
	lockName = "lock"

	// MaxSize bounds the region of a cache, in bytes: 1 PiB, for which the
	// directory of pages takes 64 MiB of memory.
	MaxSize = 1 << 50

	bootIDFile = "/proc/sys/kernel/random/boot_id" // random(4)
)

// Identity says which remote a cache is of.
type Identity struct {
	// URL names the remote. Credentials in it are not stored.
	URL string
	// Size is the remote's, in bytes.
	Size int64
}

// Options adjust a cache. The zero value works.
type Options struct {
	// JournalLimit is the length from which on the journal is replaced, in
	// bytes; 0 means DefaultJournalLimit.
	JournalLimit int64
	// BootID identifies the boot of the machine; "" asks the kernel.
	BootID string
	// Logger receives what is not worth an error; nil discards.
	Logger *slog.Logger
}

func (o Options) withDefaults() (Options, error) {
	if o.JournalLimit < 0 || o.JournalLimit > maxJournal/hardFactor/2 {
		return o, fmt.Errorf("journal limit %d: want 0 to %d", o.JournalLimit, maxJournal/hardFactor/2)
	}
	if o.JournalLimit == 0 {
		o.JournalLimit = DefaultJournalLimit
	}
	if o.BootID == "" {
		p, err := os.ReadFile(bootIDFile)
		if err != nil {
			return o, fmt.Errorf("boot id: %w", err)
		}
		o.BootID = strings.TrimSpace(string(p))
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Cache is an open cache. It has the methods of a region's Store; see there
// for their contract.
type Cache struct {
	dir   string
	lock  *os.File
	data  *os.File // for syncing it; Local has its own
	store *store
	local memferry.Backend
}

// Open opens the cache in dir, or makes one where dir is missing or empty. It
// fails with ErrInUse, ErrChanged (also where it belongs to another remote) or
// ErrCorrupt rather than use what it should not.
func Open(dir string, id Identity, o Options) (*Cache, error) {
	c, err := open(dir, id, o)
	if err != nil {
		return nil, fmt.Errorf("cache %s: %w", dir, noSpace(err))
	}
	return c, nil
}

func open(dir string, id Identity, o Options) (_ *Cache, err error) {
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	if id.Size <= 0 || id.Size > MaxSize {
		return nil, fmt.Errorf("size %d: a cache holds from 1 byte to %s", id.Size, size.Format(MaxSize))
	}
	id.URL = stripCredentials(id.URL)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := checkForeign(dir); err != nil {
		return nil, err
	}
	c := &Cache{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.release())
		}
	}()
	if c.lock, err = lock(filepath.Join(dir, lockName)); err != nil {
		return nil, err
	}
	if err := c.createIfNew(id); err != nil {
		return nil, err
	}
	if err := c.load(id, o); err != nil {
		return nil, err
	}
	return c, nil
}

// stripCredentials removes what is between scheme and host.
func stripCredentials(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.User == nil {
		return s
	}
	u.User = nil
	return u.String()
}

// isOurs tells whether a cache may have made a file of this name, or a file
// system, in its root.
func isOurs(name string) bool {
	_, ok := journalNumber(name)
	return ok || slices.Contains([]string{
		stateName, stateTemp, journalTemp, dataName, lockName, "lost+found",
	}, name)
}

// checkForeign refuses a directory that is something else's.
func checkForeign(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, stateName)); err == nil {
		return nil
	}
	names, err := osDir(dir).list()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !isOurs(name) {
			return fmt.Errorf("the directory is not a cache, and has other files in it (%s): choose an empty or a new one", name)
		}
	}
	return nil
}

// lock takes the file, or tells who has it.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		pid, rerr := os.ReadFile(path)
		holder := strings.TrimSpace(string(pid))
		if rerr != nil || holder == "" {
			holder = "?"
		}
		err = fmt.Errorf("used by process %s: %w; unmount it first, or choose another directory", holder, memferry.ErrInUse)
	}
	if err == nil {
		err = errors.Join(f.Truncate(0), writePID(f))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// writePID is for the reader of an error message. A full disk does not matter.
func writePID(f *os.File) error {
	_, err := fmt.Fprintln(f, os.Getpid())
	if errors.Is(noSpace(err), memferry.ErrNoSpace) {
		return nil
	}
	return err
}

// createIfNew makes the files of a new cache. Where the state is missing, but
// something was stored, they are left alone.
func (c *Cache) createIfNew(id Identity) error {
	if _, err := os.Stat(c.path(stateName)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := c.checkUnused(); err != nil {
		return err
	}
	f, err := os.OpenFile(c.path(dataName), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(id.Size), f.Sync(), f.Close())
	if errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("a file of %s: %w: use a file system that has larger files (XFS)", size.Format(id.Size), err)
	}
	if err != nil {
		return err
	}
	var random [8]byte
	rand.Read(random[:]) //nolint:errcheck // never fails: crypto/rand
	return createStore(osDir(c.dir), meta{
		URL: id.URL, Size: id.Size, PageSize: memferry.PageSize,
		Cache: binary.LittleEndian.Uint64(random[:]), Journal: 1, Clean: true,
	})
}

// checkUnused makes sure that a directory without a state never was more than
// the beginning of a cache.
func (c *Cache) checkUnused() error {
	names, err := osDir(c.dir).list()
	if err != nil {
		return err
	}
	for _, name := range names {
		st, err := os.Stat(c.path(name))
		if err != nil {
			return err
		}
		_, isJournal := journalNumber(name)
		used := isJournal && st.Size() > journalHeader
		if name == dataName {
			if used, err = hasData(c.path(name)); err != nil {
				return err
			}
		}
		if used {
			return c.damaged(fmt.Errorf("%s is missing, but %s has content: %w", stateName, name, memferry.ErrCorrupt))
		}
		if isJournal {
			if err := os.Remove(c.path(name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// hasData tells whether a file is more than a hole, as far as the file system
// knows holes: lseek(2). One that does not says that there is data.
func hasData(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	_, err = unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return false, f.Close()
	}
	return true, errors.Join(err, f.Close())
}

// damaged adds the remedy.
func (c *Cache) damaged(err error) error {
	if errors.Is(err, fs.ErrNotExist) && !errors.Is(err, memferry.ErrCorrupt) {
		err = fmt.Errorf("%w: %w", err, memferry.ErrCorrupt)
	}
	if !errors.Is(err, memferry.ErrCorrupt) {
		return err
	}
	return fmt.Errorf("%w; restore the directory from a backup, or delete it to start afresh (writes in it that were not pushed are lost)", err)
}

func (c *Cache) path(name string) string { return filepath.Join(c.dir, name) }

// load reads the cache, checks that it is that of the remote, and begins a
// session.
func (c *Cache) load(id Identity, o Options) error {
	s, err := loadStore(osDir(c.dir), o.BootID)
	if err != nil {
		return c.damaged(err)
	}
	c.store = s
	s.limit, s.logger = o.JournalLimit, o.Logger
	if err := c.checkIdentity(id); err != nil {
		return err
	}
	if err := c.openData(id.Size); err != nil {
		return c.damaged(err)
	}
	return s.beginSession(o.BootID)
}

// checkIdentity compares the remote with the one that the cache was made for.
// Its generation is left to the region: it counts only once no earlier request
// can change it.
func (c *Cache) checkIdentity(id Identity) error {
	m := &c.store.meta
	if m.URL != id.URL || m.Size != id.Size {
		return fmt.Errorf("it belongs to %s (%s), not to %s (%s): %w; choose another directory, or delete this one%s",
			m.URL, size.Format(m.Size), id.URL, size.Format(id.Size), memferry.ErrChanged, c.unpushed())
	}
	return nil
}

// unpushed says what a deletion of the cache would lose.
func (c *Cache) unpushed() string {
	n := c.store.pages.count()
	if n[dirty]+n[intended] == 0 {
		return ""
	}
	return fmt.Sprintf(" (it has up to %s that were not pushed)", size.Format((n[dirty]+n[intended])*memferry.PageSize))
}

func (c *Cache) openData(want int64) error {
	f, err := os.OpenFile(c.path(dataName), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	c.data = f
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != want {
		return fmt.Errorf("%s has %d bytes, not %d: %w", dataName, st.Size(), want, memferry.ErrCorrupt)
	}
	f, err = os.OpenFile(c.path(dataName), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	c.local, err = newLocal(f)
	return err
}

// Local returns the bytes of the cache: a sparse file. It is closed by Close,
// and may be before.
func (c *Cache) Local() memferry.Backend { return c.local }

// Load is that of region.Store.
func (c *Cache) Load(fn func(page, n int64, dirty bool) error) error { return c.store.load(fn) }

// Intend is that of region.Store.
func (c *Cache) Intend(page, n int64) error { return c.store.intend(page, n) }

// Commit is that of region.Store.
func (c *Cache) Commit(changes []chunk.Change) error { return c.store.commit(changes) }

// Generation is that of region.Store.
func (c *Cache) Generation() (tag string, pushing bool) { return c.store.generation() }

// SetGeneration is that of region.Store.
func (c *Cache) SetGeneration(gen string, pushing bool) error {
	return c.store.setGeneration(gen, pushing)
}

// RemoteSession is that of region.Store.
func (c *Cache) RemoteSession() string { return c.store.remoteSession() }

// SetRemoteSession is that of region.Store.
func (c *Cache) SetRemoteSession(session string) error { return c.store.setRemoteSession(session) }

// Close makes everything durable, marks the cache as closed in order, and
// releases it. It is idempotent.
func (c *Cache) Close() error {
	err := c.store.close(func() error { return noSpace(unix.Fdatasync(int(c.data.Fd()))) })
	if err != nil {
		err = fmt.Errorf("cache %s: %w", c.dir, err)
	}
	return errors.Join(err, c.release())
}

// release closes the files.
func (c *Cache) release() error {
	var errs []error
	if c.local != nil {
		errs = append(errs, c.local.Close())
	}
	if c.store != nil {
		errs = append(errs, c.store.abandon())
	}
	for _, f := range []*os.File{c.data, c.lock} {
		if f != nil {
			if err := f.Close(); !errors.Is(err, fs.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
