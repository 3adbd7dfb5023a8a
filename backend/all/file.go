package all

import (
	"context"
	"fmt"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/file"
)

var fileOpener = backend.Opener{
	Scheme:  "file",
	Example: "file:///path",
	Usage:   "a regular file or a block device; a bare path is one as well",
	Params: []backend.Param{
		{Name: "size", Usage: "create a missing file, or grow a smaller one, to this size; never cuts off"},
	},
	Open: openFile,
}

func openFile(_ context.Context, u *backend.URL, o backend.Options) (memferry.Backend, error) {
	if err := local(u); err != nil {
		return nil, err
	}
	n, err := u.Bytes("size")
	if err != nil {
		return nil, err
	}
	b, err := file.Open(u.Path, file.Options{ReadOnly: o.ReadOnly, Size: n})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// local checks that u names a path on this machine (RFC 8089).
func local(u *backend.URL) error {
	if u.Host != "" && u.Host != "localhost" {
		return fmt.Errorf("%s: %q would be another host; write %s:///path with three slashes", u, u.Host, u.Scheme)
	}
	if u.Path == "" {
		return fmt.Errorf("%s: no path; write %s:///path", u, u.Scheme)
	}
	return nil
}
