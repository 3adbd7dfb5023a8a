package backend

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/memferry/memferry/internal/size"
)

// maxURL bounds the length of a URL, in bytes. A path on Linux has at most
// 4096, each of which percent-encoding triples.
const maxURL = 16 << 10

// URL names a backend: a scheme that selects the implementation, a place, and
// parameters.
type URL struct {
	Scheme string     // in lower case
	Host   string     // host or host:port, empty where there is none
	Path   string     // decoded; of a bare path, the path itself
	Query  url.Values // each parameter once
	Raw    string     // as it was given
}

// String returns the URL as it was given.
func (u *URL) String() string { return u.Raw }

// ParseURL reads a URL. What does not start with a scheme and a colon is a
// path, taken literally, for the scheme file. For a relative path with a colon
// in its first element, put "./" before it.
func ParseURL(raw string) (*URL, error) {
	switch {
	case raw == "":
		return nil, fmt.Errorf("empty URL: want a path or a URL such as mem:?size=1G")
	case len(raw) > maxURL:
		return nil, fmt.Errorf("URL %q…: longer than %d bytes", raw[:32], maxURL)
	case strings.ContainsRune(raw, 0):
		return nil, fmt.Errorf("URL %q: contains a zero byte", raw)
	}
	scheme := schemeOf(raw)
	if scheme == "" {
		return &URL{Scheme: "file", Path: raw, Query: url.Values{}, Raw: raw}, nil
	}
	p, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("URL %q: %w", raw, reason(err))
	}
	if p.Fragment != "" || strings.Contains(raw, "#") {
		return nil, fmt.Errorf("URL %q: has a fragment; write # as %%23", raw)
	}
	u := &URL{Scheme: scheme, Host: p.Host, Path: p.Path, Raw: raw}
	if p.Opaque != "" { // scheme:relative/path
		if u.Path, err = url.PathUnescape(p.Opaque); err != nil {
			return nil, fmt.Errorf("URL %q: %w", raw, err)
		}
	}
	if strings.ContainsRune(u.Path, 0) {
		return nil, fmt.Errorf("URL %q: contains a zero byte", raw)
	}
	u.Query, err = parseQuery(p.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("URL %q: %w", raw, err)
	}
	return u, nil
}

// schemeOf returns the scheme of raw in lower case, or "" for a path (RFC 3986
// section 3.1).
func schemeOf(raw string) string {
	for i := range len(raw) {
		switch c := raw[i] | 0x20; {
		case 'a' <= c && c <= 'z':
		case raw[i] == ':' && i > 0:
			return strings.ToLower(raw[:i])
		case i > 0 && ('0' <= raw[i] && raw[i] <= '9' || raw[i] == '+' || raw[i] == '-' || raw[i] == '.'):
		default:
			return ""
		}
	}
	return ""
}

// reason strips what url.Parse repeats.
func reason(err error) error {
	var e *url.Error
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

func parseQuery(raw string) (url.Values, error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return nil, err
	}
	for name, values := range q {
		if len(values) > 1 {
			return nil, fmt.Errorf("parameter %q is given %d times", name, len(values))
		}
	}
	return q, nil
}

// Bytes returns the size that the parameter name has, or 0 where it is not
// given. A size that is given must be greater than zero.
func (u *URL) Bytes(name string) (int64, error) {
	s, given := u.get(name)
	if !given {
		return 0, nil
	}
	n, err := size.Parse(s)
	if err != nil {
		return 0, fmt.Errorf("%s: parameter %s: %w", u.Raw, name, err)
	}
	if n == 0 {
		return 0, fmt.Errorf("%s: parameter %s: must be greater than zero", u.Raw, name)
	}
	return n, nil
}

// Int returns the number that the parameter name has, or def where it is not
// given.
func (u *URL) Int(name string, def, low, high int) (int, error) {
	s, given := u.get(name)
	if !given {
		return def, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < low || n > high {
		return 0, fmt.Errorf("%s: parameter %s=%q: want a number from %d to %d", u.Raw, name, s, low, high)
	}
	return n, nil
}

func (u *URL) get(name string) (string, bool) {
	if !u.Query.Has(name) {
		return "", false
	}
	return u.Query.Get(name), true
}
