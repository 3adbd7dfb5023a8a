package all

import (
	"context"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/dir"
)

var dirOpener = backend.Opener{
	Scheme:  "dir",
	Example: "dir:///path?size=1G&chunk=1M",
	Usage:   "a directory of chunks, each replaced atomically",
	Params: []backend.Param{
		{Name: "size", Usage: "size of a new directory; of one that exists, must agree"},
		{Name: "chunk", Usage: "chunk size, a power of two; the same rules (default 256K)"},
	},
	Open: openDir,
}

func openDir(_ context.Context, u *backend.URL, o backend.Options) (memferry.Backend, error) {
	if err := local(u); err != nil {
		return nil, err
	}
	n, err := u.Bytes("size")
	if err != nil {
		return nil, err
	}
	chunk, err := u.Bytes("chunk")
	if err != nil {
		return nil, err
	}
	b, err := dir.Open(u.Path, dir.Options{Size: n, ChunkSize: chunk, ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, err
	}
	return b, nil
}
