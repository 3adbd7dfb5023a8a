// Package vm boots a virtual machine to run a test binary on a kernel that the
// host does not have: Debian's, with the block drivers nbd and ublk.
//
// The machine is QEMU's, emulated (TCG), so it needs neither KVM nor
// privileges. Its root is an initramfs that holds this very program as init,
// the kernel's modules, busybox, the test binary with its testdata, and the
// programs that tests call, with their libraries. Nothing of the host can be
// reached from inside.
//
// internal/vm/cmd is the command; "go test -exec" calls it.
package vm
