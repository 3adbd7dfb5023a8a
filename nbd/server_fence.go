package nbd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/memferry/memferry"
)

// A connection may bear an id, and who knows the beginning of it may end the
// connection: see docs/adr/0004-write-fence.md.

const (
	// minFence is the shortest prefix that can be fenced: nobody guesses one.
	minFence = 32
	// maxConnID bounds the id of a connection.
	maxConnID = memferry.MaxSession + 16
)

// errFenced ends a connection whose session was fenced.
var errFenced = errors.New("a later session has ended this one")

// connID takes the id out of a query for a context of one kind.
func connID(query, context string) (id string, ok bool) {
	id, ok = strings.CutPrefix(query, context)
	if !ok || len(id) < minFence || len(id) > maxConnID {
		return "", false
	}
	for _, b := range []byte(id) {
		if b <= ' ' || b > '~' {
			return "", false
		}
	}
	return id, true
}

// named returns the contexts that exist only for those who know their names: a
// session or the instance to be selected, or a fence, which is up when named
// returns.
func (h *handshake) named(x *export, queries []string, set bool) ([]metaContext, error) {
	var all []metaContext
	for _, q := range queries {
		if q == contextInstance && set {
			all = append(all, metaContext{q + x.instance, metaInstance})
		}
		if _, ok := connID(q, contextSession); ok && set {
			all = append(all, metaContext{q, metaSession})
		}
		if prefix, ok := connID(q, contextFence); ok && !set {
			if err := h.c.srv.fence(h.ctx, x, prefix); err != nil {
				return nil, err
			}
			all = append(all, metaContext{q, metaFence})
		}
	}
	return all, nil
}

// sessionOf returns the id that a connection gets with its contexts.
func sessionOf(contexts []metaContext) string {
	for _, m := range contexts {
		if m.kind == metaSession {
			return strings.TrimPrefix(m.name, contextSession)
		}
	}
	return ""
}

// fence ends the connections to x whose id begins with prefix. It returns nil
// once none of their requests can reach the backend any more.
//
// A connection that is still in its handshake is left alone: its client has
// not been told that it may send requests.
func (s *Server) fence(ctx context.Context, x *export, prefix string) error {
	var ending []*serverConn
	s.mu.Lock()
	for c := range s.conns {
		if e := c.currentExport(); e != nil && e.Name == x.Name && strings.HasPrefix(c.session, prefix) {
			ending = append(ending, c)
		}
	}
	s.mu.Unlock()
	for _, c := range ending {
		c.fence()
	}
	timeout := time.NewTimer(s.opt.FenceTimeout)
	defer timeout.Stop()
	for _, c := range ending {
		select {
		case <-c.over:
			continue
		case <-timeout.C:
		case <-ctx.Done():
		}
		return fmt.Errorf("requests of the session are still under way after %v", s.opt.FenceTimeout)
	}
	return nil
}

// fence makes the connection end without serving another request.
func (c *serverConn) fence() {
	c.fenced.Store(true)
	c.cancel() // of waiting for memory or a slot
	_ = c.nc.Close()
}
