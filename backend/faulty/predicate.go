package faulty

import (
	"slices"
	"sync/atomic"
)

// Predicate tells whether something shall happen to an operation. A Backend
// asks one at a time; those that count may be shared by several.
type Predicate func(Op) bool

// Always holds for every operation.
func Always() Predicate { return func(Op) bool { return true } }

// Kinds holds for operations of these kinds.
func Kinds(k ...Kind) Predicate {
	return func(op Op) bool { return slices.Contains(k, op.Kind) }
}

// Range holds for operations that touch [off, off+n).
func Range(off, n int64) Predicate {
	return func(op Op) bool { return op.Off < off+n && off < op.Off+op.Len }
}

// Chance holds with probability p. The operation's one roll decides all the
// Chances of a rule together.
func Chance(p float64) Predicate { return func(op Op) bool { return op.Roll < p } }

// And holds where all of p do; the later ones are asked only then.
func And(p ...Predicate) Predicate {
	return func(op Op) bool {
		return !slices.ContainsFunc(p, func(q Predicate) bool { return !q(op) })
	}
}

// Or holds where one of p does; the later ones are asked only if none did.
func Or(p ...Predicate) Predicate {
	return func(op Op) bool {
		return slices.ContainsFunc(p, func(q Predicate) bool { return q(op) })
	}
}

// Not holds where p doesn't.
func Not(p Predicate) Predicate { return func(op Op) bool { return !p(op) } }

// First holds for the first n operations that p holds for.
func First(n int64, p Predicate) Predicate { return counted(p, func(i int64) bool { return i <= n }) }

// After holds for those that p holds for, except the first n.
func After(n int64, p Predicate) Predicate { return counted(p, func(i int64) bool { return i > n }) }

// Every holds for each nth operation that p holds for.
func Every(n int64, p Predicate) Predicate {
	return counted(p, func(i int64) bool { return i%n == 0 })
}

// counted holds where p does and its count, from 1 on, is right.
func counted(p Predicate, right func(int64) bool) Predicate {
	var count atomic.Int64
	return func(op Op) bool { return p(op) && right(count.Add(1)) }
}
