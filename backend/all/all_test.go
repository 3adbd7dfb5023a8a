package all

import (
	"errors"
	"io/fs"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// What a URL opens keeps the contract. (Package dir's own test has the memory
// file system that its many fsyncs want.)
func TestContract(t *testing.T) {
	for scheme, raw := range map[string]func(t testing.TB) string{
		"mem":  func(testing.TB) string { return "mem:?size=1M" },
		"file": func(t testing.TB) string { return "file:" + t.TempDir() + "/f?size=1M" },
	} {
		t.Run(scheme, func(t *testing.T) {
			backendtest.Run(t, func(t testing.TB) memferry.Backend {
				b, err := Registry().Open(t.Context(), raw(t), backend.Options{})
				if err != nil {
					t.Fatal(err)
				}
				return b
			}, backendtest.Options{Steps: 2})
		})
	}
}

func TestReadOnly(t *testing.T) {
	for _, raw := range []string{"mem:?size=1M", "file:" + t.TempDir() + "/f", "dir:" + t.TempDir() + "/d"} {
		r := Registry()
		if !strings.HasPrefix(raw, "mem") {
			b, err := r.Open(t.Context(), raw+"?size=1M", backend.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		}
		b, err := r.Open(t.Context(), raw, backend.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.WriteAt([]byte{1}, 0); !errors.Is(err, memferry.ErrReadOnly) || !memferry.CapabilitiesOf(b).ReadOnly {
			t.Errorf("%s: %v", raw, err)
		}
		_ = b.Close()
	}
}

// A name with anything in it can be opened, bare or escaped.
func TestNames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b%20?c#d;é&size=1")
	escaped := (&url.URL{Scheme: "file", Path: path}).String()
	for _, raw := range []string{escaped + "?size=64K", escaped, path, "file://localhost" + escaped[len("file://"):]} {
		b, err := Registry().Open(t.Context(), raw, backend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if b.Size() != 64<<10 {
			t.Errorf("%s: size %d", raw, b.Size())
		}
		_ = b.Close()
	}
}

func TestErrors(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	for _, tc := range []struct {
		raw, mentions string
		is            error
	}{
		{"mem:", "mem:?size=1G", nil},
		{"mem:?size=0", "greater than zero", nil},
		{"mem:?size=lots", "512K", nil},
		{"mem:?size=7E", "address space", nil},
		{"mem:name?size=1", "no name", nil},
		{"mem:?chunk=1M", "takes size", nil},
		{"men:?size=1G", "dir:, file:, mem:", nil},
		{missing, "give its size", fs.ErrNotExist},
		{"file://host/path", "three slashes", nil},
		{"file:", "no path", nil},
		{"file://" + missing + "?size=-1", "size", nil},
		{"dir:" + missing, "give its size", fs.ErrNotExist},
		{"dir:" + missing + "?size=1G&chunk=3K", "power of two", nil},
		{"dir:?size=1G", "no path", nil},
	} {
		b, err := Registry().Open(t.Context(), tc.raw, backend.Options{})
		if err == nil {
			_ = b.Close()
			t.Errorf("%s: no error", tc.raw)
			continue
		}
		if !strings.Contains(err.Error(), tc.mentions) || strings.Contains(err.Error(), "\n") || (tc.is != nil && !errors.Is(err, tc.is)) {
			t.Errorf("%s: %v; want %v and a mention of %q", tc.raw, err, tc.is, tc.mentions)
		}
	}
}

// The examples that help texts show can be parsed.
func TestExamples(t *testing.T) {
	for _, o := range Registry().Openers() {
		u, found, err := Registry().Lookup(o.Example)
		if err != nil || found.Scheme != o.Scheme || u.Scheme != o.Scheme || o.Usage == "" {
			t.Errorf("%s: %v", o.Example, err)
		}
	}
}
