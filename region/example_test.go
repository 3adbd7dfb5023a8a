package region_test

import (
	"context"
	"fmt"

	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/nbd"
	"github.com/memferry/memferry/region"
)

// readEarly is the example of README.md; a lint test keeps them the same.
func readEarly() error {
	ctx := context.Background()
	uri, err := nbd.ParseURI("nbd://server:10809/disk")
	if err != nil {
		return err
	}
	remote, err := nbd.Dial(ctx, uri, nbd.ClientOptions{})
	if err != nil {
		return err
	}
	local, err := mem.New(remote.Size())
	if err != nil {
		return err
	}
	r, err := region.Open(ctx, remote, local, region.Options{}) // pulls in the background from here on
	if err != nil {
		return err
	}
	defer r.Close() // pushes what is dirty

	p := make([]byte, 4096)
	_, err = r.ReadAt(p, 1<<30) // first in line
	return err
}

// A region makes a remote backend usable at once: a read of what is not here
// yet goes first, and the rest is pulled behind it.
func Example() {
	if err := readEarly(); err != nil {
		fmt.Println(err)
	}
}
