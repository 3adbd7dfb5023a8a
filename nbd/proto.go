// Package nbd speaks the NBD protocol: a server that exports backends, and a
// client that is one. Both are written from the protocol's specification,
// doc/proto.md of the NetworkBlockDevice project; comments name its sections.
package nbd

import (
	"fmt"

	"github.com/memferry/memferry"
)

// Magic numbers.
const (
	magicInit            uint64 = 0x4e42444d41474943 // "NBDMAGIC", opens both styles of handshake
	magicOption          uint64 = 0x49484156454f5054 // "IHAVEOPT", newstyle, and before each option
	magicOldstyle        uint64 = 0x00420281861253   // after magicInit: an oldstyle server
	magicOptionReply     uint64 = 0x0003e889045565a9
	magicRequest         uint32 = 0x25609513
	magicSimpleReply     uint32 = 0x67446698
	magicStructuredReply uint32 = 0x668e33ef
)

// DefaultPort is the TCP port that IANA assigned to NBD.
const DefaultPort = 10809

// Handshake flags, sent by the server, and the client's answers to them.
const (
	flagFixedNewstyle uint16 = 1 << 0
	flagNoZeroes      uint16 = 1 << 1

	flagClientFixedNewstyle uint32 = 1 << 0
	flagClientNoZeroes      uint32 = 1 << 1
)

// TransmissionFlags tell a client what an export can do.
type TransmissionFlags uint16

// Transmission flags ("Transmission flags").
const (
	FlagHasFlags        TransmissionFlags = 1 << 0
	FlagReadOnly        TransmissionFlags = 1 << 1
	FlagSendFlush       TransmissionFlags = 1 << 2
	FlagSendFUA         TransmissionFlags = 1 << 3
	FlagRotational      TransmissionFlags = 1 << 4
	FlagSendTrim        TransmissionFlags = 1 << 5
	FlagSendWriteZeroes TransmissionFlags = 1 << 6
	FlagSendDF          TransmissionFlags = 1 << 7
	FlagCanMultiConn    TransmissionFlags = 1 << 8
	FlagSendResize      TransmissionFlags = 1 << 9
	FlagSendCache       TransmissionFlags = 1 << 10
	FlagSendFastZero    TransmissionFlags = 1 << 11
)

// Has reports whether all of g are set.
func (f TransmissionFlags) Has(g TransmissionFlags) bool { return f&g == g }

// Options of the handshake ("Option types").
const (
	optExportName      uint32 = 1
	optAbort           uint32 = 2
	optList            uint32 = 3
	optStartTLS        uint32 = 5
	optInfo            uint32 = 6
	optGo              uint32 = 7
	optStructuredReply uint32 = 8
	optListMetaContext uint32 = 9
	optSetMetaContext  uint32 = 10
	optExtendedHeaders uint32 = 11
)

// Option reply types ("Option reply types"); errors have the top bit set.
const (
	repAck         uint32 = 1
	repServer      uint32 = 2
	repInfo        uint32 = 3
	repMetaContext uint32 = 4

	repErrBit           uint32 = 1 << 31
	repErrUnsup         uint32 = repErrBit + 1
	repErrPolicy        uint32 = repErrBit + 2
	repErrInvalid       uint32 = repErrBit + 3
	repErrPlatform      uint32 = repErrBit + 4
	repErrTLSReqd       uint32 = repErrBit + 5
	repErrUnknown       uint32 = repErrBit + 6
	repErrShutdown      uint32 = repErrBit + 7
	repErrBlockSizeReqd uint32 = repErrBit + 8
	repErrTooBig        uint32 = repErrBit + 9
	repErrExtHeaderReqd uint32 = repErrBit + 10
)

// Information types of INFO and GO.
const (
	infoTypeExport      uint16 = 0
	infoTypeName        uint16 = 1
	infoTypeDescription uint16 = 2
	infoTypeBlockSize   uint16 = 3
)

// Commands ("Request types").
const (
	cmdRead        uint16 = 0
	cmdWrite       uint16 = 1
	cmdDisc        uint16 = 2
	cmdFlush       uint16 = 3
	cmdTrim        uint16 = 4
	cmdCache       uint16 = 5
	cmdWriteZeroes uint16 = 6
	cmdBlockStatus uint16 = 7
)

// Command flags ("Command flags").
const (
	cmdFlagFUA      uint16 = 1 << 0
	cmdFlagNoHole   uint16 = 1 << 1
	cmdFlagDF       uint16 = 1 << 2
	cmdFlagReqOne   uint16 = 1 << 3
	cmdFlagFastZero uint16 = 1 << 4
)

// Structured reply flags and chunk types; errors have bit 15 set.
const (
	replyFlagDone uint16 = 1 << 0

	chunkNone        uint16 = 0
	chunkOffsetData  uint16 = 1
	chunkOffsetHole  uint16 = 2
	chunkBlockStatus uint16 = 5

	chunkErrorBit    uint16 = 1 << 15
	chunkError       uint16 = chunkErrorBit + 1
	chunkErrorOffset uint16 = chunkErrorBit + 2
)

// States of an extent in base:allocation.
const (
	stateHole uint32 = 1 << 0
	stateZero uint32 = 1 << 1
)

// Metadata contexts.
const (
	namespaceBase  = "base:"
	contextBase    = "base:allocation"
	namespaceExper = "x-memferry:"

	// contextGeneration is followed by the tag of the backend's generation. As
	// a query it stands for itself with whatever tag is current, so that a
	// client learns the tag from the name of the context that it selects. A
	// block status in this context has one extent of status 0.
	contextGeneration = "x-memferry:generation/"

	// contextSession is followed by an id, which the connection bears once it
	// has selected the context. Its block status is that of a generation.
	contextSession = "x-memferry:session/"
	// contextFence is followed by the beginning of ids. A query for it ends the
	// connections that bear them; the answer, the same name, comes once their
	// requests can't change the export any more. It can't be selected.
	contextFence = "x-memferry:fence/"
	// contextInstance is followed by what names the export as this process
	// serves it. As a query it stands for itself with that name. As long as it
	// stays the same, FLUSH covers writes acknowledged on connections that have
	// ended meanwhile. See docs/adr/0005-export-instance.md.
	contextInstance = "x-memferry:instance/"
)

// Limits that the protocol itself sets.
const (
	// maxString bounds names, queries, descriptions and messages
	// ("Conventions": MUST be no longer than 4096 bytes).
	maxString = 4096
	// maxMinBlock bounds the minimum block size ("Size constraints").
	maxMinBlock = 1 << 16
	// defaultMaxPayload is the longest read or write every peer should accept
	// where no constraints were exchanged ("Size constraints").
	defaultMaxPayload = 32 << 20
	// maxUnfragmented is the length a server must serve with the DF flag.
	maxUnfragmented = 64 << 10
	// maxStatusExtents bounds the descriptors of one block status chunk.
	maxStatusExtents = 1 << 20
)

// Errno is an error value of the protocol ("Error values").
type Errno uint32 //nolint:errname // what the protocol and the system call it

// Error values.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

var errnoText = map[Errno]string{
	EPERM:     "operation not permitted",
	EIO:       "input/output error",
	ENOMEM:    "cannot allocate memory",
	EINVAL:    "invalid argument",
	ENOSPC:    "no space left on device",
	EOVERFLOW: "value too large",
	ENOTSUP:   "operation not supported",
	ESHUTDOWN: "server is shutting down",
}

func (e Errno) Error() string {
	if s, ok := errnoText[e]; ok {
		return s
	}
	return fmt.Sprintf("NBD error %d", uint32(e))
}

// Is matches the error of package memferry that e stands for.
func (e Errno) Is(target error) bool {
	switch e {
	case EPERM:
		return target == memferry.ErrReadOnly
	case ENOSPC:
		return target == memferry.ErrNoSpace
	case ENOTSUP:
		return target == memferry.ErrNotSupported
	}
	return false
}

var optionNames = map[uint32]string{
	optExportName:      "EXPORT_NAME",
	optAbort:           "ABORT",
	optList:            "LIST",
	optStartTLS:        "STARTTLS",
	optInfo:            "INFO",
	optGo:              "GO",
	optStructuredReply: "STRUCTURED_REPLY",
	optListMetaContext: "LIST_META_CONTEXT",
	optSetMetaContext:  "SET_META_CONTEXT",
	optExtendedHeaders: "EXTENDED_HEADERS",
}

func optionName(o uint32) string {
	if s, ok := optionNames[o]; ok {
		return s
	}
	return fmt.Sprintf("option %d", o)
}

var commandNames = [...]string{
	cmdRead:        "READ",
	cmdWrite:       "WRITE",
	cmdDisc:        "DISC",
	cmdFlush:       "FLUSH",
	cmdTrim:        "TRIM",
	cmdCache:       "CACHE",
	cmdWriteZeroes: "WRITE_ZEROES",
	cmdBlockStatus: "BLOCK_STATUS",
}

func commandName(c uint16) string {
	if int(c) < len(commandNames) {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", c)
}
