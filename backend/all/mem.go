package all

import (
	"context"
	"fmt"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/mem"
)

var memOpener = backend.Opener{
	Scheme:  "mem",
	Example: "mem:?size=1G",
	Usage:   "memory of this process: sparse, gone when it ends",
	Params:  []backend.Param{{Name: "size", Usage: "size (required)"}},
	Open:    openMem,
}

func openMem(_ context.Context, u *backend.URL, _ backend.Options) (memferry.Backend, error) {
	if u.Host != "" || u.Path != "" {
		return nil, fmt.Errorf("%s: memory has no name; write mem:?size=1G", u)
	}
	n, err := u.Bytes("size")
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, fmt.Errorf("%s: no size; write mem:?size=1G", u)
	}
	b, err := mem.New(n)
	if err != nil {
		return nil, err
	}
	return b, nil
}
