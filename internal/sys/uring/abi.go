package uring

// The layouts and numbers of linux/io_uring.h (6.18); io_uring_setup(2) and
// io_uring_enter(2) describe them. They are the same on amd64 and arm64.

// Op is an operation, IORING_OP_*.
type Op uint8

// The operations that this package is tested with.
const (
	OpNop         Op = 0
	OpTimeout     Op = 11
	OpAsyncCancel Op = 14
	OpRead        Op = 22
	OpWrite       Op = 23
	OpURingCmd    Op = 46
)

// SQE is a request (struct io_uring_sqe, the first 64 bytes). Where it holds an
// address, the memory must stay reachable, and off the stack, until the
// request's completion.
type SQE struct {
	Op       Op
	Flags    uint8
	Priority uint16
	FD       int32
	Off      uint64 // for OpURingCmd the command's number, in the low half
	Addr     uint64
	Len      uint32
	OpFlags  uint32
	UserData uint64 // comes back in the completion; ^0 is taken
	BufIndex uint16
	Persona  uint16
	FileSlot uint32
	Cmd      [16]byte // the command's argument; the ring's CmdTail follows it
}

// CQE is a completion (struct io_uring_cqe).
type CQE struct {
	UserData uint64
	Res      int32 // what the system call would have returned, or -errno
	Flags    uint32
}

const (
	sqeSize    = 64
	sqe128Size = 128
	cqeSize    = 16

	offSQRing = 0          // IORING_OFF_SQ_RING
	offSQEs   = 0x10000000 // IORING_OFF_SQES

	setupCQSize       = 1 << 3
	setupCoopTaskrun  = 1 << 8  // 5.19
	setupSQE128       = 1 << 10 // 5.19
	setupSingleIssuer = 1 << 12 // 6.0

	featSingleMmap = 1 << 0 // 5.4
	featNoDrop     = 1 << 1 // 5.5

	enterGetEvents = 1 << 0

	sqCQOverflow = 1 << 1 // in the submission ring's flags
)

type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
	userAddr                                                    uint64
}

type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
	userAddr                                                    uint64
}

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries, flags uint32
	sqThreadCPU, sqThreadIdle   uint32
	features, wqFD              uint32
	_                           [3]uint32
	sqOff                       sqOffsets
	cqOff                       cqOffsets
}
