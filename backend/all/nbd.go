package all

import (
	"context"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/nbd"
)

var connectionsParam = backend.Param{Name: "connections", Usage: "connections to open where the server allows several (default 4)"}

var nbdOpener = backend.Opener{
	Scheme:  "nbd",
	Example: "nbd://host:10809/export",
	Usage:   "an export of an NBD server",
	Params:  []backend.Param{connectionsParam},
	Open:    openNBD,
}

var nbdUnixOpener = backend.Opener{
	Scheme:  "nbd+unix",
	Example: "nbd+unix:///export?socket=/path",
	Usage:   "an export of an NBD server on a UNIX socket",
	Params: []backend.Param{
		{Name: "socket", Usage: "path of the socket"},
		connectionsParam,
	},
	Open: openNBD,
}

func openNBD(ctx context.Context, u *backend.URL, o backend.Options) (memferry.Backend, error) {
	uri, err := nbd.ParseURI(u.Raw)
	if err != nil {
		return nil, err
	}
	c, err := nbd.Dial(ctx, uri, nbd.ClientOptions{
		Connections: o.Connections, IOTimeout: o.IOTimeout, ReadOnly: o.ReadOnly, Logger: o.Logger,
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}
