// Package all has the registry of every backend that memferry brings.
package all

import "github.com/memferry/memferry/backend"

// Registry returns a registry of all backends.
func Registry() *backend.Registry {
	return backend.NewRegistry(
		memOpener,
		fileOpener,
		dirOpener,
		nbdOpener,
		nbdUnixOpener,
	)
}
