package uffd

// The layouts and numbers of linux/userfaultfd.h (6.18). They are the same on
// amd64 and arm64; the kernel's structs are packed or naturally aligned, and
// all fields are 64 bits wide except in messages, which message.go decodes.

const (
	apiVersion = 0xAA // UFFD_API

	userModeOnly = 1 // UFFD_USER_MODE_ONLY, a flag of userfaultfd(2)
)

// Feature is a bit of uffdio_api.features.
type Feature uint64

// The features, UFFD_FEATURE_*.
const (
	FeaturePagefaultWP      Feature = 1 << 0
	FeatureEventFork        Feature = 1 << 1
	FeatureEventRemap       Feature = 1 << 2
	FeatureEventRemove      Feature = 1 << 3
	FeatureMissingHugetlbfs Feature = 1 << 4
	FeatureMissingShmem     Feature = 1 << 5
	FeatureEventUnmap       Feature = 1 << 6
	FeatureSigbus           Feature = 1 << 7
	FeatureThreadID         Feature = 1 << 8
	FeatureMinorHugetlbfs   Feature = 1 << 9
	FeatureMinorShmem       Feature = 1 << 10
	FeatureExactAddress     Feature = 1 << 11
	FeatureWPShmem          Feature = 1 << 12 // UFFD_FEATURE_WP_HUGETLBFS_SHMEM
	FeatureWPUnpopulated    Feature = 1 << 13
	FeaturePoison           Feature = 1 << 14
	FeatureWPAsync          Feature = 1 << 15
	FeatureMove             Feature = 1 << 16
)

// Mode says which faults of a registered range are reported.
type Mode uint64

// The modes, UFFDIO_REGISTER_MODE_*.
const (
	ModeMissing Mode = 1 << 0 // pages that don't exist
	ModeWP      Mode = 1 << 1 // writes to pages that are write-protected
	ModeMinor   Mode = 1 << 2 // pages in the page cache that aren't mapped
)

// Ioctls is the set of operations that a registered range has, a bit for each
// ioctl number.
type Ioctls uint64

// The operations of a range, 1 << _UFFDIO_*.
const (
	CanWake         Ioctls = 1 << 0x02
	CanCopy         Ioctls = 1 << 0x03
	CanZeroPage     Ioctls = 1 << 0x04
	CanMove         Ioctls = 1 << 0x05
	CanWriteProtect Ioctls = 1 << 0x06
	CanContinue     Ioctls = 1 << 0x07
	CanPoison       Ioctls = 1 << 0x08
)

// Flags qualify an operation that resolves faults.
type Flags uint8

// Flags are translated to the bits of each operation, which differ.
const (
	// NoWake leaves the threads that wait for the range asleep.
	NoWake Flags = 1 << iota
	// Protect maps the pages write-protected, so that they don't count as
	// written. For [FD.Copy] and [FD.Continue].
	Protect
	// AllowHoles lets [FD.Move] pass over holes in the source.
	AllowHoles
)

type apiArg struct{ api, features, ioctls uint64 }

type rangeArg struct{ start, len uint64 }

type registerArg struct {
	rangeArg
	mode   uint64
	ioctls uint64 // out
}

// copyArg is uffdio_copy and uffdio_move.
type copyArg struct {
	dst, src, len uint64
	mode          uint64
	done          int64 // out
}

// resolveArg is uffdio_zeropage, uffdio_continue and uffdio_poison.
type resolveArg struct {
	rangeArg
	mode uint64
	done int64 // out
}

type protectArg struct {
	rangeArg
	mode uint64
}

// The ioctl numbers: _IOC(dir, 0xAA, nr, size) of asm-generic/ioctl.h.
const (
	iocNew          = 0x0000AA00 // USERFAULTFD_IOC_NEW, on /dev/userfaultfd
	iocAPI          = 0xC018AA3F
	iocRegister     = 0xC020AA00
	iocUnregister   = 0x8010AA01
	iocWake         = 0x8010AA02
	iocCopy         = 0xC028AA03
	iocZeroPage     = 0xC020AA04
	iocMove         = 0xC028AA05
	iocWriteProtect = 0xC018AA06
	iocContinue     = 0xC020AA07
	iocPoison       = 0xC020AA08
	iocPagemapScan  = 0xC0606610 // PAGEMAP_SCAN of linux/fs.h
)
