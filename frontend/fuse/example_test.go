package fuse_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/frontend/fuse"
)

func Example() {
	if f := fuse.Probe(); f.Direct != nil {
		fmt.Println("hello") // needs root and /dev/fuse
		return
	}
	backend, err := mem.New(1 << 20)
	if err != nil {
		panic(err)
	}
	defer backend.Close()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)

	device, err := fuse.Mount(context.Background(), backend, filepath.Join(dir, "disk"), fuse.Options{})
	if err != nil {
		panic(err)
	}
	f, err := device.File() // or any program, at device.Path()
	if err != nil {
		panic(err)
	}
	if _, err := f.WriteAt([]byte("hello"), 4096); err != nil {
		panic(err)
	}
	f.Close()
	if err := device.Close(); err != nil { // flushes
		panic(err)
	}
	p := make([]byte, 5)
	if _, err := backend.ReadAt(p, 4096); err != nil {
		panic(err)
	}
	fmt.Println(string(p))
	// Output: hello
}
