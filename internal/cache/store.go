package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

const (
	stateName     = "state"
	stateTemp     = "state.new"
	journalPrefix = "journal-"
	journalTemp   = "journal.new"

	// DefaultJournalLimit is the length from which on a commit replaces state
	// and journal, in bytes: some 80 000 intents, replayed in milliseconds.
	DefaultJournalLimit = 4 << 20
	// hardFactor times the limit, an intent does so itself.
	hardFactor = 4
	// maxJournal bounds a journal that can't be replaced, since the disk is
	// full, say. Past it nothing can be recorded.
	maxJournal = 256 << 20
	// maxState bounds the state file: both planes of a MaxSize region.
	maxState = MaxSize / memferry.PageSize / 4 * 9 / 8
)

// store is the persistent part of a cache: state, journals, and their image in
// memory. See docs/adr/0002-cache-journal.md.
//
// The state file names the journal that continues it; a journal that ends with
// a seal is continued by the next. What is in memory is always what a replay
// of the files would give, except that files may know of commits whose fsync
// has failed.
type store struct {
	fs     fsys
	pages  *pageMap // changed under mu
	limit  int64    // of the journal's length
	logger *slog.Logger

	// commitMu serialises what makes promises: commits, checkpoints, Close. It
	// is held across I/O, and taken before mu. Reads and intents do without.
	commitMu sync.Mutex
	// behind says that a journal before the active one may be incomplete on
	// the medium, so that nothing is durable before the next checkpoint.
	behind bool // guarded by commitMu

	// mu is held across the append of a record, a write(2) to the page cache,
	// so that the order in the file is that in memory.
	mu     sync.Mutex // guards what follows
	meta   meta
	j      *journal
	buf    []byte // for encoding records
	closed bool
}

// journal is the file that records are appended to.
type journal struct {
	f       handle
	id      journalID
	seed    uint32
	seq     uint64 // of the last record
	off     int64  // where the next record goes
	durable int64  // length that is known to be on the medium
	// failed says that the end of the file is unknown, or that an fsync has
	// failed, after which the kernel may have dropped what it could not write
	// (fsync(2)). Such a journal is replaced before it is used again.
	failed bool
}

func journalName(number uint64) string { return fmt.Sprintf("%s%016x", journalPrefix, number) }

// journalNumber is the inverse of journalName.
func journalNumber(name string) (uint64, bool) {
	s, ok := strings.CutPrefix(name, journalPrefix)
	if !ok || len(s) != 16 {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 16, 64)
	return n, err == nil && journalName(n) == name
}

// createStore writes the files of a new cache. The state comes last: a
// directory without one has promised nothing.
func createStore(d fsys, m meta) error {
	j, err := createJournal(d, journalID{m.Cache, m.Journal})
	if err != nil {
		return err
	}
	if err := j.f.Close(); err != nil {
		return err
	}
	return writeState(d, &m, newPageMap(m.pages()))
}

// createJournal makes an empty journal, durably.
func createJournal(d fsys, id journalID) (*journal, error) {
	f, err := d.create(journalTemp)
	if err != nil {
		return nil, fmt.Errorf("create journal: %w", err)
	}
	_, err = f.WriteAt(id.encodeHeader(), 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = d.rename(journalTemp, journalName(id.number))
	}
	if err == nil {
		err = d.syncDir()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create journal: %w", err), f.Close())
	}
	return &journal{f: f, id: id, seed: id.seed(), off: journalHeader, durable: journalHeader}, nil
}

// writeState replaces the state file, durably or not at all.
func writeState(d fsys, m *meta, pages *pageMap) error {
	p, err := encodeState(m, pages)
	if err != nil {
		return err
	}
	f, err := d.create(stateTemp)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	_, err = f.WriteAt(p, 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write state: %w", err), d.remove(stateTemp))
	}
	if err := d.rename(stateTemp, stateName); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := d.syncDir(); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// loadStore reads the files, and repairs what a crash may have left.
func loadStore(d fsys, boot string) (*store, error) {
	p, err := d.read(stateName, maxState)
	if err != nil {
		return nil, err
	}
	m, pages, err := decodeState(p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", stateName, err, memferry.ErrCorrupt)
	}
	// A checkpoint that was cut off may have renamed without fsync: before
	// anything is promised on top of what is seen here, make it last.
	if err := d.syncDir(); err != nil {
		return nil, err
	}
	numbers, err := journals(d, m.Journal)
	if err != nil {
		return nil, err
	}
	s := &store{fs: d, meta: *m, pages: pages}
	// behind: what an earlier session could not fsync may still be missing.
	s.behind = len(numbers) > 1
	// Nor may new records follow a state that says that there are none.
	s.behind = s.behind || m.version < stateVersion
	r := replay{meta: &s.meta, pages: pages, boot: boot, open: !m.Clean}
	for _, n := range numbers {
		id := journalID{m.Cache, n}
		if err := s.replay(&r, id, n == numbers[len(numbers)-1]); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// journals lists those from the first on, and removes what a checkpoint that
// was cut off has left.
func journals(d fsys, first uint64) ([]uint64, error) {
	names, err := d.list()
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, name := range names {
		n, ok := journalNumber(name)
		if ok && n >= first {
			numbers = append(numbers, n)
			continue
		}
		if ok || name == stateTemp || name == journalTemp {
			if err := d.remove(name); err != nil {
				return nil, err
			}
		}
	}
	slices.Sort(numbers)
	for i, n := range numbers {
		if n != first+uint64(i) {
			return nil, fmt.Errorf("%s is missing: %w", journalName(first+uint64(i)), memferry.ErrCorrupt)
		}
	}
	if len(numbers) == 0 {
		return nil, fmt.Errorf("%s is missing: %w", journalName(first), memferry.ErrCorrupt)
	}
	return numbers, nil
}

// replay reads one journal. The last one is opened and becomes the active one.
func (s *store) replay(r *replay, id journalID, last bool) error {
	name := journalName(id.number)
	p, err := s.fs.read(name, maxJournal)
	if err != nil {
		return err
	}
	j, err := r.journal(p, id)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w: %w", name, err, memferry.ErrCorrupt)
	case !last:
		return nil
	case r.sealed:
		return fmt.Errorf("%s is missing: %w", journalName(id.number+1), memferry.ErrCorrupt)
	}
	if j.f, err = s.fs.open(name); err != nil {
		return err
	}
	if int64(len(p)) > j.off {
		if err := j.f.Truncate(j.off); err != nil {
			return errors.Join(fmt.Errorf("%s: cut the incomplete end: %w", name, err), j.f.Close())
		}
	}
	s.j = j
	return nil
}

// beginSession records, durably, that from now on the files are in use: before
// the first intent, which may be lost with the machine.
func (s *store) beginSession(boot string) error {
	r := replay{meta: &s.meta, pages: s.pages, open: !s.meta.Clean}
	r.session(boot)
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	return s.record(kindSession, []byte(boot), func() {})
}

// append adds a record to the active journal, or leaves it as it was.
func (s *store) appendLocked(k kind, payload []byte) error {
	j := s.j
	if j.failed {
		return errors.New("journal: an earlier write failed")
	}
	s.buf = appendRecord(s.buf[:0], j.seed, record{kind: k, seq: j.seq + 1, durable: j.durable, payload: payload})
	if j.off+int64(len(s.buf)) > maxJournal {
		return fmt.Errorf("journal: %d bytes, limit %d: %w", j.off, maxJournal, memferry.ErrNoSpace)
	}
	if _, err := j.f.WriteAt(s.buf, j.off); err != nil {
		if terr := j.f.Truncate(j.off); terr != nil {
			j.failed = true
			err = errors.Join(err, terr)
		}
		return fmt.Errorf("journal: %w", noSpace(err))
	}
	j.seq++
	j.off += int64(len(s.buf))
	return nil
}

// record appends a record and makes it durable; applied is called, under mu,
// once it is in the file. commitMu is held. A journal that can't be used is
// replaced by a checkpoint instead.
func (s *store) record(k kind, payload []byte, applied func()) error {
	s.mu.Lock()
	if s.j.failed || s.behind {
		applied()
		s.mu.Unlock()
		return s.checkpoint(false)
	}
	if err := s.appendLocked(k, payload); err != nil {
		s.mu.Unlock()
		return err
	}
	applied()
	j, end := s.j, s.j.off
	s.mu.Unlock()

	err := j.f.Sync()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		j.failed = true
		return fmt.Errorf("journal: %w", noSpace(err))
	}
	j.durable = end
	return nil
}

// intend is region.Store's Intend.
func (s *store) intend(page, n int64) error {
	if err := checkPages(page, n, s.pages.pages); err != nil {
		return err
	}
	if !s.pages.needsIntent(page, n) {
		return nil
	}
	full, err := s.tryIntend(page, n)
	if !full {
		return err
	}
	// Rare: the journal is far too long, or broken.
	if cerr := s.relieve(); cerr != nil && err != nil {
		return errors.Join(err, cerr)
	}
	if err != nil {
		_, err = s.tryIntend(page, n)
	}
	return err
}

// tryIntend appends an intent, and tells whether a checkpoint is due now.
func (s *store) tryIntend(page, n int64) (full bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false, fmt.Errorf("cache: %w", memferry.ErrClosed)
	}
	if !s.pages.needsIntent(page, n) {
		return false, nil
	}
	var p [16]byte
	if err := s.appendLocked(kindIntent, encodeIntent(p[:0], page, n)); err != nil {
		return s.j.failed, err
	}
	s.pages.intend(page, n)
	return s.j.off > hardFactor*s.limit, nil
}

// relieve makes the checkpoint that an intent found due, unless another one
// did meanwhile.
func (s *store) relieve() error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	s.mu.Lock()
	due := !s.closed && (s.j.failed || s.j.off > hardFactor*s.limit)
	s.mu.Unlock()
	if !due {
		return nil
	}
	return s.checkpoint(false)
}

// commit is region.Store's Commit.
func (s *store) commit(changes []chunk.Change) error {
	if err := checkChanges(changes, s.pages.pages); err != nil {
		return err
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if err := s.checkOpen(); err != nil || len(changes) == 0 {
		return err
	}
	payload := encodeCommit(nil, changes)
	apply := func() { applyChanges(s.pages, changes) }
	if len(payload) > maxPayload {
		s.mu.Lock()
		apply()
		s.mu.Unlock()
		return s.checkpoint(false)
	}
	if err := s.record(kindCommit, payload, apply); err != nil {
		return err
	}
	s.mu.Lock()
	due := s.j.off > s.limit
	s.mu.Unlock()
	if due {
		if err := s.checkpoint(false); err != nil {
			// The commit itself is durable. The next one tries again.
			s.logger.Warn("cache: the journal could not be replaced", "error", err)
		}
	}
	return nil
}

func (s *store) setGeneration(gen string, pushing bool) error {
	if len(gen) > maxGeneration {
		return fmt.Errorf("generation of %d bytes, limit %d", len(gen), maxGeneration)
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if err := s.checkOpen(); err != nil {
		return err
	}
	s.mu.Lock()
	same := s.meta.Generation == gen && s.meta.Pushing == pushing && !s.j.failed
	s.mu.Unlock()
	if same && !s.behind {
		return nil
	}
	return s.record(kindGeneration, encodeGeneration(nil, gen, pushing), func() {
		s.meta.Generation, s.meta.Pushing = gen, pushing
	})
}

func (s *store) generation() (gen string, pushing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.meta.Generation, s.meta.Pushing
}

func (s *store) setRemoteSession(session string) error {
	if len(session) > memferry.MaxSession {
		return fmt.Errorf("session name of %d bytes, limit %d", len(session), memferry.MaxSession)
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if err := s.checkOpen(); err != nil {
		return err
	}
	return s.record(kindRemoteSession, []byte(session), func() { s.meta.RemoteSession = session })
}

func (s *store) remoteSession() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.meta.RemoteSession
}

func (s *store) checkOpen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("cache: %w", memferry.ErrClosed)
	}
	return nil
}

// load is region.Store's Load.
func (s *store) load(fn func(page, n int64, dirty bool) error) error {
	s.mu.Lock()
	pages := s.pages.snapshot()
	s.mu.Unlock()
	var start, count int64
	var isDirty bool
	flush := func() error {
		if count == 0 {
			return nil
		}
		return fn(start, count, isDirty)
	}
	err := pages.runs(func(page, n int64, st status) error {
		d := st&2 != 0
		if st != absent && count > 0 && start+count == page && d == isDirty {
			count += n // dirty beside intended
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		start, count, isDirty = page, n, d
		if st == absent {
			count = 0
		}
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// checkpoint replaces state and journal. commitMu is held; intents go on
// meanwhile, in the new journal.
//
//  1. The next journal is made, durably.
//  2. The active one is sealed and the next one takes over; with it, under the
//     same lock, a snapshot of the pages is taken.
//  3. The snapshot becomes the state, and the journals before it are removed.
//
// A crash before 3 leaves the old state with both journals to replay.
func (s *store) checkpoint(isClean bool) error {
	next, err := createJournal(s.fs, journalID{s.meta.Cache, s.j.id.number + 1})
	if err != nil {
		return noSpace(err)
	}
	s.mu.Lock()
	// Without a seal nothing is lost, only the loss of the next journal would
	// go unnoticed.
	sealed := s.appendLocked(kindSeal, nil)
	old := s.j
	s.j = next
	m := s.meta
	m.Journal, m.Clean = next.id.number, isClean
	pages := s.pages.snapshot()
	s.mu.Unlock()

	s.behind = s.behind || old.failed
	cerr := old.f.Close()
	if err := writeState(s.fs, &m, pages); err != nil {
		// What the old journal holds but has not fsynced would be lost with
		// the machine, whatever the new one holds.
		s.behind = true
		return noSpace(errors.Join(err, sealed, cerr))
	}
	s.behind = false
	s.mu.Lock()
	s.pages.adopt(pages)
	s.mu.Unlock()
	s.removeJournals(s.meta.Journal, m.Journal)
	s.mu.Lock()
	s.meta.Journal, s.meta.Clean = m.Journal, isClean
	s.mu.Unlock()
	return nil
}

// removeJournals removes those that the state has made superfluous. What is
// left is removed when the cache is next opened.
func (s *store) removeJournals(from, to uint64) {
	for n := from; n < to && n < math.MaxUint64; n++ {
		if err := s.fs.remove(journalName(n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.logger.Warn("cache: an old journal could not be removed", "journal", journalName(n), "error", err)
		}
	}
}

// close ends the session: in order, if syncData can make all of the data
// durable.
func (s *store) close(syncData func() error) error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	s.mu.Lock()
	already := s.closed
	s.closed = true
	s.mu.Unlock()
	if already {
		return nil
	}
	err := syncData()
	if err == nil {
		err = s.checkpoint(true)
	}
	return err
}

// abandon closes the journal, and leaves the files as they are.
func (s *store) abandon() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if err := s.j.f.Close(); !errors.Is(err, fs.ErrClosed) {
		return err
	}
	return nil
}
