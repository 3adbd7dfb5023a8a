package cache

import (
	"errors"
	"fmt"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

// replay applies journals to a state.
type replay struct {
	meta   *meta
	pages  *pageMap
	boot   string // of the machine, now
	open   bool   // meta.Boot's session was not closed
	sealed bool   // the last record was a seal
}

// journal applies the journal with content p, up to an incomplete end, and
// returns it without its file.
func (r *replay) journal(p []byte, id journalID) (*journal, error) {
	if err := id.checkHeader(p); err != nil {
		return nil, err
	}
	j := &journal{id: id, seed: id.seed(), off: journalHeader, durable: journalHeader}
	r.sealed = false
	for j.off < int64(len(p)) {
		rec, n, err := decodeRecord(p[j.off:], j.seed)
		if err == nil && (rec.seq != j.seq+1 || r.sealed) {
			err = errDamaged
		}
		if err != nil {
			return j, r.end(p[j.off:], j, err)
		}
		if err := r.apply(rec); err != nil {
			return nil, fmt.Errorf("record at %d: %w", j.off, err)
		}
		j.off += n
		j.seq = rec.seq
	}
	return j, nil
}

// end decides whether the unreadable end of a journal is what a crash leaves,
// or damage. The end of a process leaves a last record that is cut short, and
// nothing else, as records are appended in order. The end of the machine may
// leave anything after what was known to be durable.
func (r *replay) end(p []byte, j *journal, err error) error {
	at := func(err error) error { return fmt.Errorf("record at %d: %w", j.off, err) }
	if errors.Is(err, errShort) {
		return nil
	}
	if r.open && r.meta.Boot == r.boot {
		return at(err)
	}
	if durableAfter(p, j.seed) > j.off {
		return at(err)
	}
	return nil
}

func (r *replay) apply(rec record) error {
	switch rec.kind {
	case kindSession:
		r.session(string(rec.payload))
	case kindIntent:
		page, n, err := decodeIntent(rec.payload)
		if err != nil {
			return err
		}
		if err := checkPages(page, n, r.pages.pages); err != nil {
			return err
		}
		r.pages.intend(page, n)
	case kindCommit:
		changes, err := decodeCommit(rec.payload)
		if err != nil {
			return err
		}
		if err := checkChanges(changes, r.pages.pages); err != nil {
			return err
		}
		applyChanges(r.pages, changes)
	case kindGeneration:
		gen, pushing, err := decodeGeneration(rec.payload)
		if err != nil {
			return err
		}
		r.meta.Generation, r.meta.Pushing = gen, pushing
	case kindRemoteSession:
		if len(rec.payload) > memferry.MaxSession {
			return fmt.Errorf("session name of %d bytes", len(rec.payload))
		}
		r.meta.RemoteSession = string(rec.payload)
	case kindSeal:
		r.sealed = true
	default:
		return fmt.Errorf("record of unknown kind %d", rec.kind)
	}
	return nil
}

// session begins one. If the one before ended with the machine, then pages
// that it recorded as clean may hold writes whose intents never reached the
// disk: they can't be told from the remote's bytes any more, and are dropped.
func (r *replay) session(boot string) {
	if r.open && r.meta.Boot != boot {
		r.pages.dropClean()
	}
	r.meta.Boot, r.open = boot, true
	r.meta.Clean = false
}

func checkPages(page, n, pages int64) error {
	if page < 0 || n <= 0 || page > pages || n > pages-page {
		return fmt.Errorf("%d pages at %d of %d: %w", n, page, pages, memferry.ErrOutOfRange)
	}
	return nil
}

func checkChanges(changes []chunk.Change, pages int64) error {
	for _, c := range changes {
		if err := checkPages(c.Page, c.N, pages); err != nil {
			return err
		}
		if c.State > chunk.Dirty {
			return fmt.Errorf("page state %d: unknown", c.State)
		}
	}
	return nil
}

func applyChanges(m *pageMap, changes []chunk.Change) {
	for _, c := range changes {
		m.set(c.Page, c.N, [...]status{chunk.Absent: absent, chunk.Present: clean, chunk.Dirty: dirty}[c.State])
	}
}
