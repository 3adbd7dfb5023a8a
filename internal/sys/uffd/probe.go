package uffd

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// known describes the features, in the order of their bits.
var known = []struct {
	bit   Feature
	name  string
	since string // the first kernel, on amd64
}{
	{FeaturePagefaultWP, "userfaultfd write-protection", "5.7"},
	{FeatureEventFork, "userfaultfd fork events", "4.11"},
	{FeatureEventRemap, "userfaultfd remap events", "4.11"},
	{FeatureEventRemove, "userfaultfd remove events", "4.11"},
	{FeatureMissingHugetlbfs, "userfaultfd on hugetlbfs", "4.11"},
	{FeatureMissingShmem, "userfaultfd on shared memory", "4.11"},
	{FeatureEventUnmap, "userfaultfd unmap events", "4.11"},
	{FeatureSigbus, "userfaultfd SIGBUS mode", "4.14"},
	{FeatureThreadID, "userfaultfd thread ids", "4.14"},
	{FeatureMinorHugetlbfs, "userfaultfd minor faults on hugetlbfs", "5.13"},
	{FeatureMinorShmem, "userfaultfd minor faults on shared memory", "5.14"},
	{FeatureExactAddress, "userfaultfd exact addresses", "5.18"},
	{FeatureWPShmem, "userfaultfd write-protection of shared memory", "5.19"},
	{FeatureWPUnpopulated, "userfaultfd write-protection of absent pages", "6.4"},
	{FeaturePoison, "userfaultfd poison", "6.6"},
	{FeatureWPAsync, "userfaultfd asynchronous write-protection", "6.7"},
	{FeatureMove, "userfaultfd move", "6.8"},
}

// available asks the kernel for its features, once: with none asked for,
// UFFDIO_API answers with all.
var available = sync.OnceValues(func() (Feature, error) {
	fd, _, err := open()
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was done with it
	a := apiArg{api: apiVersion}
	if err := ioctl(fd, iocAPI, unsafe.Pointer(&a)); err != nil {
		return 0, fmt.Errorf("userfaultfd: ask for features: %w", err)
	}
	return Feature(a.features), nil
})

// Available returns the features of this kernel. The answer is remembered.
func Available() (Feature, error) { return available() }

// Have returns nil if this kernel has all the features, and otherwise an error
// that is memferry.ErrNotSupported and names the first that is missing, the
// kernel that has it, and what to do.
func Have(want Feature) error {
	have, err := available()
	if err != nil {
		return err
	}
	for _, k := range known {
		if want&^have&k.bit != 0 {
			return absent(k.name, k.since, "update the kernel, or check its configuration and architecture", nil)
		}
	}
	if rest := want &^ have; rest != 0 {
		return absent(fmt.Sprintf("userfaultfd feature %#x", uint64(rest)), "of a later version", "update the kernel", nil)
	}
	return nil
}

// haveScan asks once for PAGEMAP_SCAN, by a scan of nothing.
var haveScan = sync.OnceValue(func() error {
	s, err := OpenScanner(os.Getpid())
	if err != nil {
		return err
	}
	defer s.Close()
	_, _, err = s.scan(scanArg{start: 0, end: 0, maskCategories: uint64(PagePresent), returnCategories: uint64(PagePresent)}, nil)
	if errors.Is(err, unix.ENOTTY) {
		return absent("PAGEMAP_SCAN", "6.7", "update the kernel", err)
	}
	return err
})

// HaveScan returns nil if this kernel can scan page tables, or an error like
// that of [Have].
func HaveScan() error { return haveScan() }
