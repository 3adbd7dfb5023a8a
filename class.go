package memferry

import "context"

// Class ranks a transfer. A lower value goes first.
type Class uint8

const (
	// ClassDemand is a transfer that an application waits for. It never queues
	// behind the other classes, in memory or on the wire.
	ClassDemand Class = iota
	// ClassReadAhead is a pull of what an application will probably ask next.
	ClassReadAhead
	// ClassBackground is the pull of the rest, and the push of writes.
	ClassBackground
)

func (c Class) String() string {
	switch c {
	case ClassDemand:
		return "demand"
	case ClassReadAhead:
		return "read-ahead"
	case ClassBackground:
		return "background"
	}
	return "unknown"
}

type classKey struct{}

// WithClass returns a context that carries c, for backends that keep classes
// apart on the wire.
func WithClass(ctx context.Context, c Class) context.Context {
	return context.WithValue(ctx, classKey{}, c)
}

// ClassOf returns the class that ctx carries; [ClassDemand] where it has none.
func ClassOf(ctx context.Context) Class {
	c, _ := ctx.Value(classKey{}).(Class)
	return c
}
