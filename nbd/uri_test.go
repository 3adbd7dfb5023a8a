package nbd

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memferry/memferry"
	"pgregory.net/rapid"
)

func TestParseURI(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want URI
		addr string
	}{
		// The examples of doc/uri.md.
		{"nbd://example.com/disk", URI{Host: "example.com", Port: 10809, Export: "disk"}, "example.com:10809"},
		{"nbd+unix:///disk?socket=sock", URI{Socket: "sock", Export: "disk"}, "sock"},
		{"nbd://example.com/", URI{Host: "example.com", Port: 10809}, "example.com:10809"},
		{"nbd://example.com", URI{Host: "example.com", Port: 10809}, "example.com:10809"},
		{"nbd://example.com//disk", URI{Host: "example.com", Port: 10809, Export: "/disk"}, "example.com:10809"},
		{"nbd://example.com/hello%20world", URI{Host: "example.com", Port: 10809, Export: "hello world"}, "example.com:10809"},
		{"nbd+unix:///?socket=%00/abstract", URI{Socket: "\x00/abstract"}, "\x00/abstract"},
		{"nbd://example.com:10810/export", URI{Host: "example.com", Port: 10810, Export: "export"}, "example.com:10810"},

		{"nbd://[::1]/x", URI{Host: "::1", Port: 10809, Export: "x"}, "[::1]:10809"},
		{"nbd://[fe80::1%25eth0]:99/", URI{Host: "fe80::1%eth0", Port: 99}, "[fe80::1%eth0]:99"},
		{"NBD://h/x", URI{Host: "h", Port: 10809, Export: "x"}, "h:10809"},
		{"nbd:///x", URI{Host: "localhost", Port: 10809, Export: "x"}, "localhost:10809"},
		{"nbd://127.0.0.1:0", URI{Host: "127.0.0.1"}, "127.0.0.1:0"},
		{"nbd://h/a%2Fb%3Fc%23d%25", URI{Host: "h", Port: 10809, Export: "a/b?c#d%"}, "h:10809"},
		{"nbd://h/x?connections=8", URI{Host: "h", Port: 10809, Export: "x", Connections: 8}, "h:10809"},
		{"nbd+unix:///x?socket=/tmp/a+b%20c&connections=2", URI{Socket: "/tmp/a+b c", Export: "x", Connections: 2}, "/tmp/a+b c"},
		{"nbd+unix://?socket=@plain", URI{Socket: "@plain"}, "./@plain"},
	} {
		got, err := ParseURI(tc.in)
		if err != nil {
			t.Errorf("ParseURI(%q): %v", tc.in, err)
			continue
		}
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("ParseURI(%q): -want +got\n%s", tc.in, d)
		}
		if got.Address() != tc.addr {
			t.Errorf("ParseURI(%q).Address() = %q, want %q", tc.in, got.Address(), tc.addr)
		}
		back, err := ParseURI(got.String())
		if err != nil || back != got {
			t.Errorf("ParseURI(%q) -> %q -> %+v, %v", tc.in, got, back, err)
		}
	}
}

func TestParseURIErrors(t *testing.T) {
	for in, want := range map[string]string{
		"":                                "scheme",
		"http://h/x":                      `scheme "http"`,
		"nbd:h":                           "nbd://HOST",
		"nbds://h/x":                      "TLS",
		"nbds+unix:///x?socket=s":         "TLS",
		"nbd://h/x?tls-type=psk":          "TLS",
		"nbd://user@h/x":                  "user name",
		"nbd://h/x#y":                     "%23",
		"nbd://h:99999/x":                 "port",
		"nbd://h:http/x":                  "port",
		"nbd://h/x?sokcet=1":              "known are connections, socket",
		"nbd://h/x?socket=/s":             "nbd+unix",
		"nbd+unix:///x":                   "socket is missing",
		"nbd+unix:///x?socket=":           "socket is missing",
		"nbd+unix://h/x?socket=s":         `host "h"`,
		"nbd+unix:///x?socket=a%00b":      "NUL",
		"nbd+unix:///x?socket=a&socket=b": "twice",
		"nbd+unix:///x?socket=" + strings.Repeat("s", 108): "longer than 107",
		"nbd://h/a%00b":                          "NUL",
		"nbd://h/a%zz":                           "escape",
		"nbd://h/x?connections=0":                "1 to 16",
		"nbd://h/x?connections=1e1":              "1 to 16",
		"nbd://h/" + strings.Repeat("x", 4097):   "longest allowed is 4096",
		"nbd://h/" + strings.Repeat("x", 100000): "too long",
	} {
		got, err := ParseURI(in)
		if err == nil {
			t.Errorf("ParseURI(%.60q) = %+v, want an error with %q", in, got, want)
		} else if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("ParseURI(%.60q): %v, want one line with %q", in, err, want)
		}
	}
	if _, err := ParseURI("nbds://h"); !errors.Is(err, memferry.ErrNotSupported) {
		t.Errorf("nbds: %v is not ErrNotSupported", err)
	}
}

func TestURIRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		u := URI{
			Export:      strings.ReplaceAll(rapid.String().Draw(t, "export"), "\x00", ""),
			Connections: rapid.IntRange(0, MaxConnections).Draw(t, "connections"),
		}
		if rapid.Bool().Draw(t, "unix") {
			u.Socket = rapid.StringMatching(`[/a-z@+ %&=?#]{1,60}`).Draw(t, "socket")
		} else {
			u.Host = rapid.SampledFrom([]string{"h", "example.com", "10.0.0.1", "::1", "fe80::1%eth0"}).Draw(t, "host")
			u.Port = rapid.IntRange(0, 65535).Draw(t, "port")
		}
		if len(u.String()) > maxURILength {
			t.Skip("too long")
		}
		got, err := ParseURI(u.String())
		if err != nil || got != u {
			t.Fatalf("%+v -> %q -> %+v, %v", u, u, got, err)
		}
	})
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"nbd://h:1/x?connections=2", "nbd+unix:///a%20b?socket=/s", "nbd://[::1%25lo]/", "nbds://h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		back, err := ParseURI(u.String())
		if err != nil || back != u {
			t.Fatalf("%q -> %+v -> %q -> %+v, %v", s, u, u, back, err)
		}
	})
}
