// Package uffd makes a backend available as memory: a []byte that is used at
// once, whose absent pages arrive when they are touched or, better, before.
//
// The bytes are those of a memory file, mapped twice. The application's mapping
// is registered with a userfaultfd; a region writes what it pulls straight into
// the other one, and then shows it in the first. Pages of the source that are
// known to be zero take memory only when they are touched.
//
// A [Memory] is a backend itself, so the same bytes can be a file at the same
// time (frontend/fuse, with Options.Uncached), or be served to others.
//
// [OpenURL] has the faults served by a helper process, and is what to use
// wherever the source has a URL.
//
// [Source] fills the memory of other processes, which they have registered
// themselves: virtual machines that are restored from a snapshot.
//
// # Deadlocks
//
// [Open] serves the faults of its own process. A goroutine that touches absent
// memory inside the runtime (copy, append, bytes.Equal, a comparison of
// strings) can't be preempted: as many of them as there are Ps, or one and a
// garbage collection, and nobody is left to serve the fault. It never ends.
// So until [Memory.Wait] has returned, reach the memory through
// [Memory.ReadAt] and [Memory.WriteAt], which are safe anywhere, or call
// [Memory.Populate] before the bytes are used. Plain loads and stores are safe
// as well. The same holds for every source that runs in this process, however
// it is reached: a memory served by a helper from a server in this process, too.
//
// # Writes
//
// What is written is found by the kernel's asynchronous write-protection, and
// handed to the source by [Memory.Sync] and [Memory.Close]. A kernel without it
// (before 6.7) would lose all of it, so opening memory to be written to fails
// there.
//
// # Failures
//
// A page that can't be fetched within Options.IOTimeout is poisoned: an access
// gives SIGBUS, in Go a fault that runtime/debug.SetPanicOnFault makes a panic,
// in system calls EFAULT, in ReadAt an error. When the page arrives after all,
// it heals. Where the kernel can't poison (before 6.6), the access waits until
// the source is back. The same holds, at once, for what has not arrived when a
// helper dies.
//
// BUG(uffd): threads that wait for a page at the moment when their helper dies
// are freed by this process. If they are as many as there are Ps, and all of
// them inside the runtime, nobody is left to do that.
//
// # Caveats
//
// Nobody may touch the bytes once Close was called. The range must not be
// moved (mremap), and MADV_REMOVE on it loses what it removes. Writes of devices
// into pinned pages (O_DIRECT reads, io_uring's fixed buffers) are not found, and
// must not be under way when Invalidate drops the pages. A child made by
// fork shares the memory, but its faults are not served: touch the pages before.
// Memory of a process without privileges (see userfaultfd(2), USER_MODE_ONLY)
// can't be given to system calls before it has been touched: they fail with
// EFAULT.
package uffd
