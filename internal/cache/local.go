package cache

import (
	"os"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/file"
)

// newLocal makes a backend of the data file, and takes it over.
func newLocal(f *os.File) (memferry.Backend, error) { return file.New(f, file.Options{}) }
