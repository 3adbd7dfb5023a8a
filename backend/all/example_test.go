package all_test

import (
	"context"
	"fmt"

	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/all"
)

func Example() {
	b, err := all.Registry().Open(context.Background(), "mem:?size=1G", backend.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer b.Close()
	if _, err := b.WriteAt([]byte("hello"), 512<<20); err != nil {
		fmt.Println(err)
		return
	}
	p := make([]byte, 5)
	_, err = b.ReadAt(p, 512<<20)
	fmt.Printf("%s %v of %d bytes\n", p, err, b.Size())
	// Output: hello <nil> of 1073741824 bytes
}
