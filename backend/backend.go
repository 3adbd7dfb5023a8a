// Package backend opens backends by URL.
//
// Each implementation stands in a package of its own below this one and knows
// nothing of URLs. A [Registry] maps schemes to them; package backend/all has
// the one with everything that memferry brings. A program with its own backend
// makes a registry with its own [Opener] beside those.
package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/memferry/memferry"
)

// Options are what the caller decides, whatever the scheme. The zero value
// works.
type Options struct {
	// ReadOnly makes every write fail with memferry.ErrReadOnly, and needs no
	// permission to write.
	ReadOnly bool
	// IOTimeout is how long a request to a remote waits through outages. Zero
	// is the backend's default.
	IOTimeout time.Duration
	// Connections is how many connections a remote backend opens. Zero is the
	// backend's default. A parameter in the URL has precedence.
	Connections int
	// Logger takes what is not an error of a call. Nil discards it.
	Logger *slog.Logger
}

func (o Options) withDefaults() (Options, error) {
	if o.IOTimeout < 0 {
		return o, fmt.Errorf("I/O timeout %v: must not be negative", o.IOTimeout)
	}
	if o.Connections < 0 {
		return o, fmt.Errorf("%d connections: must not be negative", o.Connections)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Param is a parameter that a scheme takes.
type Param struct {
	Name  string
	Usage string // one line
}

// Opener is an implementation that a registry can open.
type Opener struct {
	Scheme  string // in lower case
	Example string // a URL
	Usage   string // one line
	Params  []Param
	// Open opens the backend. The registry has checked the scheme and the
	// names of the parameters; Options has its defaults. ctx bounds the
	// opening alone.
	Open func(ctx context.Context, u *URL, o Options) (memferry.Backend, error)
}

// Registry opens backends by the scheme of their URL. It does not change once
// made, so it is safe for concurrent use.
type Registry struct {
	openers []Opener // sorted by scheme
}

// NewRegistry returns a registry of openers. It panics where two have the same
// scheme or one lacks a part: that is a mistake in the program.
func NewRegistry(openers ...Opener) *Registry {
	r := &Registry{openers: slices.Clone(openers)}
	slices.SortFunc(r.openers, func(a, b Opener) int { return strings.Compare(a.Scheme, b.Scheme) })
	for i, o := range r.openers {
		if o.Open == nil || o.Scheme == "" || o.Scheme != schemeOf(o.Scheme+":") {
			panic(fmt.Sprintf("backend: opener %q is incomplete", o.Scheme))
		}
		if i > 0 && r.openers[i-1].Scheme == o.Scheme {
			panic(fmt.Sprintf("backend: scheme %q is there twice", o.Scheme))
		}
	}
	return r
}

// Openers returns what the registry can open, sorted by scheme.
func (r *Registry) Openers() []Opener { return slices.Clone(r.openers) }

// Open opens the backend that rawURL names. The errors are for people: one
// line that names the thing and, where there is one, the remedy.
func (r *Registry) Open(ctx context.Context, rawURL string, o Options) (memferry.Backend, error) {
	u, opener, err := r.Lookup(rawURL)
	if err != nil {
		return nil, err
	}
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	b, err := opener.Open(ctx, u, o)
	if err != nil {
		return nil, err
	}
	if o.ReadOnly && !memferry.CapabilitiesOf(b).ReadOnly {
		return ReadOnly(b), nil
	}
	return b, nil
}

// Lookup parses rawURL and checks its scheme and the names of its parameters,
// without opening anything.
func (r *Registry) Lookup(rawURL string) (*URL, Opener, error) {
	u, err := ParseURL(rawURL)
	if err != nil {
		return nil, Opener{}, err
	}
	i, found := slices.BinarySearchFunc(r.openers, u.Scheme, func(o Opener, s string) int { return strings.Compare(o.Scheme, s) })
	if !found {
		return nil, Opener{}, r.unknownScheme(u)
	}
	opener := r.openers[i]
	for name := range u.Query {
		if !slices.ContainsFunc(opener.Params, func(p Param) bool { return p.Name == name }) {
			return nil, Opener{}, unknownParam(u, name, opener)
		}
	}
	return u, opener, nil
}

func (r *Registry) unknownScheme(u *URL) error {
	schemes := make([]string, len(r.openers))
	for i, o := range r.openers {
		schemes[i] = o.Scheme + ":"
	}
	list := strings.Join(schemes, ", ")
	if list == "" {
		return errors.New("no backend is registered")
	}
	return fmt.Errorf("%s: unknown scheme %q; there are %s (for a file of that name, write ./%s)", u.Raw, u.Scheme, list, u.Raw)
}

func unknownParam(u *URL, name string, o Opener) error {
	if len(o.Params) == 0 {
		return fmt.Errorf("%s: unknown parameter %q; %s: takes none", u.Raw, name, o.Scheme)
	}
	names := make([]string, len(o.Params))
	for i, p := range o.Params {
		names[i] = p.Name
	}
	return fmt.Errorf("%s: unknown parameter %q; %s: takes %s", u.Raw, name, o.Scheme, strings.Join(names, ", "))
}
