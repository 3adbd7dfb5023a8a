package uffd

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/backend/file"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/region"
)

// benchSize is how much memory is touched; MEMFERRY_BENCH_SIZE changes it.
func benchSize(b *testing.B) int64 {
	b.Helper()
	n := int64(256 << 20)
	if s := os.Getenv("MEMFERRY_BENCH_SIZE"); s != "" {
		var err error
		if n, err = size.Parse(s); err != nil {
			b.Fatal(err)
		}
	}
	return n
}

// BenchmarkFirstTouch loads a byte of each page, in order, of memory whose
// source is memory as well. The peer is internal/bench/peers/userfaultfdgo.
func BenchmarkFirstTouch(b *testing.B) {
	n := benchSize(b)
	content := bytes.Repeat([]byte("memferry"), int(n/8))
	fd, err := unix.MemfdCreate("bench", unix.MFD_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "bench")
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		b.Fatal(err)
	}
	path := filepath.Join("/proc", fmt.Sprint(os.Getpid()), "fd", fmt.Sprint(fd))
	b.Run("fresh", func(b *testing.B) { // what writing the same bytes costs without any of this
		b.SetBytes(n)
		for b.Loop() {
			m, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err != nil {
				b.Fatal(err)
			}
			copy(m, content)
			if err := unix.Munmap(m); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, mode := range []region.PullMode{region.PullFull, region.PullDemand} {
		for _, small := range []bool{false, true} {
			o := Options{Pull: mode, SmallPages: small}
			name := mode.String() + "/huge"
			if small {
				name = mode.String() + "/small"
			}
			b.Run("helper/"+name, func(b *testing.B) {
				touchAll(b, n, func() (*Memory, error) { return OpenURL(b.Context(), "file:"+path, o) })
			})
			b.Run("process/"+name, func(b *testing.B) {
				touchAll(b, n, func() (*Memory, error) {
					s, err := file.Open(path, file.Options{})
					if err != nil {
						return nil, err
					}
					return Open(context.Background(), s, o)
				})
			})
		}
	}
}

func touchAll(b *testing.B, n int64, open func() (*Memory, error)) {
	b.SetBytes(n)
	for b.Loop() {
		b.StopTimer()
		m, err := open()
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		p := m.Bytes()
		for i := 0; i < len(p); i += pageSize {
			if p[i] != 'm' {
				b.Fatalf("byte %d is %#x", i, p[i])
			}
		}
		b.StopTimer()
		if err := m.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
