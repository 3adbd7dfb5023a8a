// Command file has a file, or whatever else a URL of memferry names, as a
// []byte at once, while the rest of it is still on its way.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/all"
	"github.com/memferry/memferry/frontend/uffd"
)

func open(ctx context.Context, url string) (memferry.Backend, error) {
	return all.Registry().Open(ctx, url, backend.Options{})
}

func main() {
	if helped, err := uffd.Helper(open); helped {
		if err != nil {
			log.Fatal(err)
		}
		return
	}
	mark := flag.String("mark", "", "replace the first bytes with this text")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatal("usage: file [-mark TEXT] FILE|URL")
	}
	if err := run(context.Background(), os.Stdout, flag.Arg(0), *mark); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, out io.Writer, url, mark string) error {
	m, err := uffd.OpenURL(ctx, url, uffd.Options{ReadOnly: mark == ""})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d lines\n", bytes.Count(m.Bytes(), []byte{'\n'}))
	if mark != "" {
		copy(m.Bytes(), mark) // an ordinary write; the kernel tells which pages changed
	}
	return m.Close() // hands them to the file
}
