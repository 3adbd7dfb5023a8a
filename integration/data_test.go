package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
)

// pattern returns n bytes that look random and are the same for the same seed.
func pattern(seed uint64, n int64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(p) // never fails
	return p
}

// file writes a file of its own for the test and returns its path.
func file(t testing.TB, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// sparse makes a file of the given size with data in some places.
func sparse(t testing.TB, size int64, data map[int64][]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sparse")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for off, p := range data {
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// same fails the test unless the files hold the same bytes.
func same(t testing.TB, got, want string) {
	t.Helper()
	if err := compare(got, want); err != nil {
		t.Error(err)
	}
}

// compare reads two files to their ends and reports the first difference.
func compare(got, want string) error {
	g, err := os.Open(got)
	if err != nil {
		return err
	}
	defer g.Close()
	w, err := os.Open(want)
	if err != nil {
		return err
	}
	defer w.Close()
	return compareReaders(got, g, want, w)
}

// holds fails the test unless the file holds just these bytes.
func holds(t testing.TB, path string, want []byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := compareReaders(path, f, "the expected bytes", bytes.NewReader(want)); err != nil {
		t.Error(err)
	}
}

func compareReaders(gotName string, got io.Reader, wantName string, want io.Reader) error {
	g, w := make([]byte, mib), make([]byte, mib)
	for off := int64(0); ; {
		n, gerr := io.ReadFull(got, g)
		m, werr := io.ReadFull(want, w)
		if i := firstDifference(g[:n], w[:m]); i >= 0 {
			return fmt.Errorf("%s and %s differ at byte %d (page %d)", gotName, wantName, off+int64(i), (off+int64(i))/4096)
		}
		off += int64(n)
		switch {
		case n != m:
			return fmt.Errorf("%s and %s differ in length: %d bytes (%w) and %d (%w)", gotName, wantName, off, gerr, off-int64(n)+int64(m), werr)
		case gerr == io.EOF || gerr == io.ErrUnexpectedEOF: //nolint:errorlint // io.ReadFull returns them as they are
			return nil
		case gerr != nil:
			return gerr
		case werr != nil:
			return werr
		}
	}
}

// firstDifference returns the index of the first byte that differs within the
// shorter one's length, or -1.
func firstDifference(a, b []byte) int {
	n := min(len(a), len(b))
	if bytes.Equal(a[:n], b[:n]) {
		return -1
	}
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}
