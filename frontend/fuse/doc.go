// Package fuse makes a backend a file: a FUSE file system whose only file has
// the backend's bytes and size.
//
// [Mount] opens it on a directory, in which the file then appears under its
// name, or on a file, existing or not, whose place it takes. The file can be
// read and written in any way that a file of fixed size can be: buffered, with
// O_DIRECT (which needs no alignment), mapped (shared and writable too),
// punched, asked for its holes, executed. It can't grow or shrink: a truncation
// to another size fails with EPERM or EFBIG, and so does opening it with
// O_TRUNC (use `dd conv=notrunc`); a write past the end fails with ENOSPC.
//
// # Data path
//
// Requests are up to 1 MiB. A backend that is memory ([memferry.Viewer]), or a
// region's resident part, is sent to the kernel from where it lies. Writes go
// through the kernel's write-back cache: they reach the backend on fsync, on
// close, and within the kernel's usual delay otherwise. A read-only mount
// whose bytes are all in one local file is opened with passthrough where the
// kernel has it (Linux 6.9, root): then reads and page faults never leave the
// kernel. It takes effect for the first open at a time when no earlier,
// ordinary handle is left. Writable mounts never use it, because a write that
// does not pass through the backend could not be tracked.
//
// # Deadlocks
//
// The process that serves a mount must not touch a mapping of that mount's
// file: the page fault blocks its thread outside of the Go scheduler's reach,
// and a garbage collection then waits for it while the goroutine that would
// answer waits for the collection. Map it in another process. The same goes
// for the file as standard input or output of a child between fork and exec.
// Plain system calls on [Device.File] are safe as long as the process lives,
// and so are they on any path of the mount, unless the os package waits for it
// in a poller; Device.File sees to that. But a process that is killed within
// such a call waits for itself for ever, until its connection is aborted
// (umount --force). [Device.Sync], and all that this package does itself, are
// free of that.
//
// A backend must not reach its own mount, not even through another process.
//
// # Caveats
//
// The kernel caches pages and attributes for as long as the mount lives. What
// changes in the backend without going through the mount is seen late or
// never; what changes in the page cache of the mount is seen in the backend
// after fsync. [Options.Uncached] keeps reads and writes from that cache.
//
// With the write-back cache a buffered write past the end is refused late, by
// fsync or close, with ENOSPC; until then the file looks longer than it is.
// O_DIRECT and O_APPEND writes are refused at once.
//
// Without root, on a file rather than a directory, there is no write-back
// cache: the kernel makes the root of such a mount before it can be asked for.
// Without root the kernel also reads ahead by 128 KiB only, which makes mapped
// reads slow.
//
// # Interrupts
//
// The kernel reports any signal to a process that waits for a request, also
// those that it handles and those that the Go runtime sends to itself. A read
// of a file is not expected to fail with EINTR then, and a page fault would end
// in SIGBUS. So a request is abandoned (the context of its ReadAtContext is
// cancelled) only when the process is being killed, or the mount ended. Where
// the backend can't cancel, as with Sync, the request is answered all the same
// and the call goes on by itself.
package fuse
