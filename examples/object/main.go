// Command object has an object behind HTTP as a []byte: what is touched is
// fetched by a range request, and the rest meanwhile.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/frontend/uffd"
)

// object is a backend: something of a fixed size behind HTTP range requests
// (RFC 9110, section 14). It is the same object for as long as its ETag is.
type object struct {
	url, tag string
	size     int64
}

func open(ctx context.Context, url string) (memferry.Backend, error) {
	rq, err := http.NewRequestWithContext(ctx, http.MethodHead, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	rs, err := http.DefaultClient.Do(rq)
	if err != nil {
		return nil, err
	}
	defer rs.Body.Close()
	tag := rs.Header.Get("ETag")
	if rs.StatusCode != http.StatusOK || rs.ContentLength < 0 || tag == "" {
		return nil, fmt.Errorf("%s: %s; need a length and an ETag", url, rs.Status)
	}
	return &object{url, tag, rs.ContentLength}, nil
}

func (o *object) ReadAt(p []byte, off int64) (int, error) {
	return o.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext lets a read be given up: see memferry.ContextReader.
func (o *object) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, eof := memferry.CheckRead(off, len(p), o.size)
	if n == 0 {
		return 0, eof
	}
	rq, err := http.NewRequestWithContext(ctx, http.MethodGet, o.url, http.NoBody)
	if err != nil {
		return 0, err
	}
	rq.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(n)-1))
	rq.Header.Set("If-Match", o.tag) // another object under the same name is an error
	rs, err := http.DefaultClient.Do(rq)
	if err != nil {
		return 0, err
	}
	defer rs.Body.Close()
	switch {
	case rs.StatusCode == http.StatusPreconditionFailed:
		return 0, fmt.Errorf("%s: %w", o.url, memferry.ErrChanged)
	case rs.StatusCode != http.StatusPartialContent:
		return 0, fmt.Errorf("%s: %s", o.url, rs.Status)
	}
	if n, err = io.ReadFull(rs.Body, p[:n]); err != nil {
		return n, fmt.Errorf("%s: %w", o.url, err)
	}
	return n, eof
}

func (o *object) WriteAt([]byte, int64) (int, error) { return 0, memferry.ErrReadOnly }
func (o *object) Size() int64                        { return o.size }
func (o *object) Sync() error                        { return nil }
func (o *object) Close() error                       { return nil }

func main() {
	if helped, err := uffd.Helper(open); helped {
		if err != nil {
			log.Fatal(err)
		}
		return
	}
	if len(os.Args) != 3 {
		log.Fatal("usage: object URL TEXT")
	}
	if err := run(context.Background(), os.Stdout, os.Args[1], os.Args[2]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, out io.Writer, url, text string) error {
	m, err := uffd.OpenURL(ctx, url, uffd.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	at := bytes.Index(m.Bytes(), []byte(text)) // stops as soon as it is found
	if err := m.Close(); err != nil {
		return err
	}
	if at < 0 {
		return errors.New("not found")
	}
	_, err = fmt.Fprintf(out, "found at %d\n", at)
	return err
}
