package backend

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/memferry/memferry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseURL(t *testing.T) {
	for _, tc := range []struct {
		raw  string
		want URL
	}{
		{"/dev/sda", URL{Scheme: "file", Path: "/dev/sda"}},
		{"disk.img", URL{Scheme: "file", Path: "disk.img"}},
		{"./a:b", URL{Scheme: "file", Path: "./a:b"}},
		{"/a b%20c?x=1#y", URL{Scheme: "file", Path: "/a b%20c?x=1#y"}},
		{"2024:backup", URL{Scheme: "file", Path: "2024:backup"}},
		{"mem:?size=1G", URL{Scheme: "mem", Query: url.Values{"size": {"1G"}}}},
		{"MEM:?size=1G", URL{Scheme: "mem", Query: url.Values{"size": {"1G"}}}},
		{"mem://?size=1G", URL{Scheme: "mem", Query: url.Values{"size": {"1G"}}}},
		{"file:///a%20b%3Fc?size=5", URL{Scheme: "file", Path: "/a b?c", Query: url.Values{"size": {"5"}}}},
		{"file:a/b%25", URL{Scheme: "file", Path: "a/b%"}},
		{"file:/a/b", URL{Scheme: "file", Path: "/a/b"}},
		{"nbd://[::1]:10809/ex%2Fport", URL{Scheme: "nbd", Host: "[::1]:10809", Path: "/ex/port"}},
		{"nbd+unix:///e?socket=/run/a%20b", URL{Scheme: "nbd+unix", Path: "/e", Query: url.Values{"socket": {"/run/a b"}}}},
	} {
		tc.want.Raw = tc.raw
		if tc.want.Query == nil {
			tc.want.Query = url.Values{}
		}
		got, err := ParseURL(tc.raw)
		if err != nil {
			t.Errorf("ParseURL(%q): %v", tc.raw, err)
			continue
		}
		if d := cmp.Diff(tc.want, *got); d != "" {
			t.Errorf("ParseURL(%q): (-want +got)\n%s", tc.raw, d)
		}
	}
}

func TestParseURLErrors(t *testing.T) {
	for _, raw := range []string{
		"", "mem:?size=1&size=2", "file:///a#b", "file:///a#", "file:///%zz", "file:///a%00b", "a\x00b",
		"nbd://host:port/", "mem:?a;b", "/" + strings.Repeat("x", maxURL),
	} {
		u, err := ParseURL(raw)
		if err == nil {
			t.Errorf("ParseURL(%q) = %+v, want an error", raw, u)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("ParseURL(%q): error of several lines: %v", raw, err)
		}
	}
}

func TestURLValues(t *testing.T) {
	u, err := ParseURL("x:?size=64K&n=3&zero=0&bad=many")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := u.Bytes("size"); n != 64<<10 || err != nil {
		t.Errorf("Bytes(size) = %d, %v", n, err)
	}
	if n, err := u.Bytes("none"); n != 0 || err != nil {
		t.Errorf("Bytes(none) = %d, %v", n, err)
	}
	for _, name := range []string{"zero", "bad"} {
		if n, err := u.Bytes(name); err == nil {
			t.Errorf("Bytes(%s) = %d, want an error", name, n)
		}
	}
	if n, err := u.Int("n", 1, 1, 8); n != 3 || err != nil {
		t.Errorf("Int(n) = %d, %v", n, err)
	}
	if n, err := u.Int("none", 7, 1, 8); n != 7 || err != nil {
		t.Errorf("Int(none) = %d, %v", n, err)
	}
	for _, name := range []string{"zero", "bad"} {
		if n, err := u.Int(name, 1, 1, 8); err == nil {
			t.Errorf("Int(%s) = %d, want an error", name, n)
		}
	}
}

// static is a backend of fixed bytes.
type static struct{ *bytes.Reader }

func (static) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (static) Sync() error                            { return nil }
func (static) Close() error                           { return nil }
func (static) Trim(int64, int64) error                { return nil }

func testRegistry() *Registry {
	open := func(_ context.Context, u *URL, _ Options) (memferry.Backend, error) {
		return static{bytes.NewReader([]byte(u.Path))}, nil
	}
	return NewRegistry(
		Opener{Scheme: "words", Open: open, Params: []Param{{Name: "size"}, {Name: "mode"}}},
		Opener{Scheme: "file", Open: open},
	)
}

func TestRegistry(t *testing.T) {
	r := testRegistry()
	b, err := r.Open(t.Context(), "words:hello?size=1", Options{})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := b.ReadAt(got, 0); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
	for raw, mentions := range map[string]string{
		"word:hello":        "file:, words:",
		"words:hello?sise=": "size, mode",
		"file:x?size=1":     "takes none",
	} {
		if _, err := r.Open(t.Context(), raw, Options{}); err == nil || !strings.Contains(err.Error(), mentions) {
			t.Errorf("Open(%q): %v; want a mention of %q", raw, err, mentions)
		}
	}
	for _, o := range []Options{{IOTimeout: -1}, {Connections: -1}} {
		if _, err := r.Open(t.Context(), "x", o); err == nil {
			t.Errorf("Open with %+v: no error", o)
		}
	}
	if o := r.Openers(); len(o) != 2 || o[0].Scheme != "file" {
		t.Errorf("Openers() = %v", o)
	}
}

func TestRegistryReadOnly(t *testing.T) {
	b, err := testRegistry().Open(t.Context(), "words:hello", Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.WriteAt([]byte("J"), 0); !errors.Is(err, memferry.ErrReadOnly) {
		t.Errorf("WriteAt: %v, want ErrReadOnly", err)
	}
	if _, err := b.WriteAt([]byte("J"), 5); !errors.Is(err, memferry.ErrOutOfRange) {
		t.Errorf("WriteAt past the end: %v, want ErrOutOfRange", err)
	}
	if _, err := b.ReadAt(make([]byte, 6), 0); !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt past the end: %v, want io.EOF", err)
	}
	c := memferry.CapabilitiesOf(b)
	if !c.ReadOnly || c.Trimmer != nil {
		t.Errorf("capabilities %+v", c)
	}
}

func FuzzParseURL(f *testing.F) {
	for _, s := range []string{"/dev/sda", "mem:?size=1G", "file:///a%20b?size=5", "nbd://[::1]:1/x", "a:b", "x:?a=1&a=2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := ParseURL(raw)
		if err != nil {
			return
		}
		if u.Raw != raw || u.Scheme == "" || u.Scheme != strings.ToLower(u.Scheme) || strings.ContainsRune(u.Path, 0) {
			t.Fatalf("ParseURL(%q) = %+v", raw, u)
		}
	})
}
