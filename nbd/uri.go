package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"sort"
	"strconv"
	"strings"
	"unicode"

	"github.com/memferry/memferry"
)

const (
	// MaxConnections bounds the connections of one client: past a handful they
	// cost memory at both ends and win nothing.
	MaxConnections = 16

	// maxURILength bounds what ParseURI looks at: the longest export name, all
	// of it escaped, and the longest socket path, with room to spare.
	maxURILength = 3*maxString + 4096

	// maxSocketPath is what fits in sockaddr_un (unix(7)), less the final NUL.
	maxSocketPath = 107
)

// Schemes of the NBD URI standard.
const (
	schemeTCP     = "nbd"
	schemeUnix    = "nbd+unix"
	schemeTCPTLS  = "nbds"
	schemeUnixTLS = "nbds+unix"
)

// uriParams are the query parameters that ParseURI knows, with what they mean.
var uriParams = map[string]string{
	"socket":      "path of the UNIX socket (nbd+unix only)",
	"connections": "number of connections that a client opens",
}

// URI names an export of an NBD server, as the NBD URI standard has it
// (doc/uri.md of the NetworkBlockDevice project):
//
//	nbd://HOST[:PORT]/EXPORT
//	nbd+unix:///EXPORT?socket=PATH
//
// The export name is the path without its first slash, percent-decoded; it may
// be empty and may contain slashes. Beyond the standard there is the query
// parameter "connections". A value from [ParseURI] is valid; one made by hand
// needs Host or Socket.
type URI struct {
	Host   string // host name or address, without brackets; empty with Socket
	Port   int    // TCP port; ParseURI fills in the default
	Socket string // path of a UNIX socket; a leading NUL means the abstract namespace
	Export string // export name, decoded

	Connections int // connections a client opens; 0 means its default
}

// ParseURI parses an NBD URI. TLS schemes are recognised and refused with an
// error that is [memferry.ErrNotSupported].
func ParseURI(s string) (URI, error) {
	if len(s) > maxURILength {
		return URI{}, fmt.Errorf("nbd: URI of %d bytes is too long", len(s))
	}
	fail := func(err error) (URI, error) { return URI{}, fmt.Errorf("nbd: URI %q: %w", s, err) }
	u, err := url.Parse(s)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return fail(err)
	}
	if err := checkShape(u); err != nil {
		return fail(err)
	}
	params, err := parseQuery(u.RawQuery)
	if err != nil {
		return fail(err)
	}
	out := URI{Export: strings.TrimPrefix(u.Path, "/")}
	if err := checkString("export name", out.Export); err != nil {
		return fail(err)
	}
	if v, ok := params["connections"]; ok {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > MaxConnections {
			return fail(fmt.Errorf("connections=%s: want a number from 1 to %d", v, MaxConnections))
		}
		out.Connections = n
	}
	if strings.EqualFold(u.Scheme, schemeUnix) {
		err = out.setSocket(u, params)
	} else {
		err = out.setHost(u, params)
	}
	if err != nil {
		return fail(err)
	}
	return out, nil
}

// checkShape refuses what is not an NBD URI, or one this package can't serve.
func checkShape(u *url.URL) error {
	switch strings.ToLower(u.Scheme) {
	case schemeTCP, schemeUnix:
	case schemeTCPTLS, schemeUnixTLS:
		return fmt.Errorf("TLS is %w yet; use %s: or %s: over a trusted network or an SSH tunnel",
			memferry.ErrNotSupported, schemeTCP, schemeUnix)
	default:
		return fmt.Errorf("scheme %q is not one of %s, %s", u.Scheme, schemeTCP, schemeUnix)
	}
	switch {
	case u.Opaque != "":
		return fmt.Errorf("write it as %s://HOST/EXPORT", u.Scheme)
	case u.User != nil:
		return fmt.Errorf("a user name needs TLS, which is %w yet", memferry.ErrNotSupported)
	case u.Fragment != "":
		return errors.New("has a fragment; write # as %23")
	}
	return nil
}

// parseQuery splits a query and refuses parameters that are unknown or given
// twice. Unlike url.ParseQuery it leaves a plus sign alone: that is a form
// convention, and no part of RFC 3986.
func parseQuery(raw string) (map[string]string, error) {
	out := map[string]string{}
	for part := range strings.SplitSeq(raw, "&") {
		if part == "" {
			continue
		}
		k, v, _ := strings.Cut(part, "=")
		k, err := url.PathUnescape(k)
		if err != nil {
			return nil, err
		}
		if v, err = url.PathUnescape(v); err != nil {
			return nil, err
		}
		if _, ok := uriParams[k]; !ok {
			if strings.HasPrefix(k, "tls-") {
				return nil, fmt.Errorf("parameter %s: TLS is %w yet", k, memferry.ErrNotSupported)
			}
			return nil, fmt.Errorf("unknown parameter %q; known are %s", k, knownParams())
		}
		if _, ok := out[k]; ok {
			return nil, fmt.Errorf("parameter %s is given twice", k)
		}
		out[k] = v
	}
	return out, nil
}

func knownParams() string {
	names := make([]string, 0, len(uriParams))
	for k := range uriParams {
		names = append(names, k)
	}
	sort.Strings(names)
	return strings.Join(names, ", ")
}

func (u *URI) setSocket(p *url.URL, params map[string]string) error {
	if p.Host != "" {
		return fmt.Errorf("host %q makes no sense with a UNIX socket; write %s:///EXPORT?socket=PATH", p.Host, schemeUnix)
	}
	u.Socket = params["socket"]
	switch {
	case u.Socket == "" || u.Socket == "\x00":
		return fmt.Errorf("the socket is missing; write %s:///EXPORT?socket=PATH", schemeUnix)
	case len(u.Socket) > maxSocketPath:
		return fmt.Errorf("socket path of %d bytes is longer than %d; use a shorter or relative one", len(u.Socket), maxSocketPath)
	case strings.IndexByte(u.Socket[1:], 0) >= 0 && u.Socket[0] != 0:
		return errors.New("socket path contains NUL")
	}
	return nil
}

func (u *URI) setHost(p *url.URL, params map[string]string) error {
	if _, ok := params["socket"]; ok {
		return fmt.Errorf("parameter socket needs the scheme %s", schemeUnix)
	}
	// The standard leaves a missing authority to the client (doc/uri.md, "NBD
	// URI authority"): it means this host.
	u.Host, u.Port = p.Hostname(), DefaultPort
	if strings.Contains(u.Host, "%") && !strings.Contains(u.Host, ":") {
		return fmt.Errorf("host %q: a percent sign belongs only before the zone of an IPv6 address", u.Host)
	}
	if strings.ContainsFunc(u.Host, notInHost) || strings.Contains(u.Host, ":") && !isIPv6(u.Host) {
		return fmt.Errorf("host %q: not a host name, an address, or an address with a zone", u.Host)
	}
	if u.Host == "" {
		u.Host = "localhost"
	}
	if s := p.Port(); s != "" {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			return fmt.Errorf("port %s is not a number from 0 to 65535", s)
		}
		u.Port = int(n)
	}
	return nil
}

// Network returns "tcp" or "unix", as net.Dial and net.Listen take it.
func (u URI) Network() string {
	if u.Socket != "" {
		return "unix"
	}
	return "tcp"
}

// Address returns host:port or the path of the socket.
func (u URI) Address() string {
	if u.Socket == "" {
		return net.JoinHostPort(u.Host, strconv.Itoa(u.Port))
	}
	// Package net takes a leading @ for the abstract namespace; here it is part
	// of a file's name.
	if u.Socket[0] == '@' {
		return "./" + u.Socket
	}
	return u.Socket
}

// String returns the URI, escaped, without the port where it is the default.
func (u URI) String() string {
	var b strings.Builder
	var query []string
	if u.Socket != "" {
		b.WriteString(schemeUnix + "://")
		query = append(query, "socket="+escape(u.Socket))
	} else {
		b.WriteString(schemeTCP + "://")
		b.WriteString(hostPort(u.Host, u.Port))
	}
	if u.Export != "" || u.Socket != "" {
		b.WriteByte('/')
		b.WriteString(escape(u.Export))
	}
	if u.Connections > 0 {
		query = append(query, "connections="+strconv.Itoa(u.Connections))
	}
	if len(query) > 0 {
		b.WriteByte('?')
		b.WriteString(strings.Join(query, "&"))
	}
	return b.String()
}

// isIPv6 reports whether s is an IPv6 address, with or without a zone.
func isIPv6(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && a.Is6() && !strings.Contains(a.Zone(), "%")
}

// notInHost reports whether r can't be part of a host name, of an address, or
// of a zone, which is the name of a network interface.
func notInHost(r rune) bool {
	return r > unicode.MaxASCII || !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-._~:%@", r)
}

func hostPort(host string, port int) string {
	if strings.ContainsRune(host, ':') {
		host = "[" + strings.ReplaceAll(host, "%", "%25") + "]" // RFC 6874 for the zone
	}
	if port == DefaultPort {
		return host
	}
	return host + ":" + strconv.Itoa(port)
}

// escape percent-encodes all but the unreserved characters of RFC 3986 and the
// slash, which is plain in a path and in a query.
func escape(s string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9',
			c == '-', c == '.', c == '_', c == '~', c == '/':
			b.WriteByte(c)
		default:
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
	return b.String()
}
