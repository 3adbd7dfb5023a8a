// Package integration tests the memferry command from outside, against
// programs that nobody here wrote: libnbd's tools, qemu, nbdkit, fio, SQLite,
// ffmpeg and the kernel.
//
// TestMain builds the command once. Tests run it as child processes, as a
// person would; links with delays and faults are internal/netsim, in the test
// process between the two commands.
package integration
