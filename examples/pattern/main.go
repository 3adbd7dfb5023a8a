// Command pattern has a []byte of 1 TiB that is stored nowhere: the page that
// is touched is computed. Any backend becomes memory this way.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/frontend/uffd"
	"github.com/memferry/memferry/region"
)

const size = 1 << 40

// squares is a backend: the 64-bit word i, of 2^37, is i*i.
type squares struct{}

func (squares) ReadAt(p []byte, off int64) (int, error) {
	n, eof := memferry.CheckRead(off, len(p), size)
	var word [8]byte
	for done := 0; done < n; {
		at := off + int64(done)
		binary.LittleEndian.PutUint64(word[:], uint64(at/8)*uint64(at/8))
		done += copy(p[done:n], word[at%8:])
	}
	return n, eof
}

func (squares) WriteAt([]byte, int64) (int, error) { return 0, memferry.ErrReadOnly }
func (squares) Size() int64                        { return size }
func (squares) Sync() error                        { return nil }
func (squares) Close() error                       { return nil }

func open(context.Context, string) (memferry.Backend, error) { return squares{}, nil }

func main() {
	if helped, err := uffd.Helper(open); helped {
		if err != nil {
			log.Fatal(err)
		}
		return
	}
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, out io.Writer) error {
	m, err := uffd.OpenURL(ctx, "squares:", uffd.Options{ReadOnly: true, Pull: region.PullNone})
	if err != nil {
		return err
	}
	p := m.Bytes()
	for _, i := range []int{3, 1_000_000, len(p)/8 - 1} {
		fmt.Fprintf(out, "%d squared is %d\n", i, binary.LittleEndian.Uint64(p[8*i:]))
	}
	s, err := m.Stats()
	if err != nil {
		m.Close()
		return err
	}
	fmt.Fprintf(out, "%d bytes of %d were computed\n", s.PulledBytes, s.Size)
	return m.Close()
}
