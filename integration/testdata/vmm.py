"""A microVM as its page-fault handler sees one, from Firecracker's description
of the hand-over (docs/snapshotting/handling-page-faults-on-snapshot-resume.md)
and userfaultfd(2), with nothing of memferry.

    vmm.py SOCKET FILE SCENARIO

FILE is what the memory must hold. It prints "ok" when that was so."""

import ctypes, fcntl, json, mmap, os, random, signal, socket, struct, sys, threading, time

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
EVENT_REMOVE = 1 << 3
PAGE = 4096
DONTNEED = 4


def userfaultfd(features):
    nr = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
    fd = libc.syscall(nr, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, features, 0)))
    return fd


def anonymous(size):
    a = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert a not in (None, 2**64 - 1)
    return a


def connect(path):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    return s


def read(addr):
    return ctypes.string_at(addr, PAGE)


class Machine:
    """Two pieces of memory, the first holding what comes last in the file."""

    def __init__(self, path, want, key="page_size"):
        self.want = want
        half = len(want) // 2 // PAGE * PAGE
        self.fd = userfaultfd(EVENT_REMOVE)
        self.maps = []
        for size, offset in ((len(want) - half, half), (half, 0)):
            a = anonymous(size)
            fcntl.ioctl(self.fd, UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", a, size, 1, 0)))
            self.maps.append((a, size, offset))
        body = json.dumps([{"base_host_virt_addr": a, "size": n, "offset": o, key: PAGE} for a, n, o in self.maps])
        self.socket = connect(path)
        socket.send_fds(self.socket, [body.encode()], [self.fd])

    def pages(self):
        return [(a + p, o + p) for a, n, o in self.maps for p in range(0, n, PAGE)]

    def check(self, pages):
        for addr, off in pages:
            if read(addr) != self.want[off : off + PAGE]:
                raise SystemExit("wrong bytes of offset %d" % off)

    def check_all(self, threads=4):
        pages = self.pages()
        random.shuffle(pages)
        failed = []

        def part(i):
            try:
                self.check(pages[i::threads])
            except BaseException as e:
                failed.append(e)

        ts = [threading.Thread(target=part, args=(i,)) for i in range(threads)]
        for t in ts:
            t.start()
        for t in ts:
            t.join()
        if failed:
            raise failed[0]


def everything(path, want):
    Machine(path, want).check_all()


def old(path, want):
    Machine(path, want, "page_size_kib").check_all()


def remove(addr):
    if libc.madvise(addr, PAGE, DONTNEED) != 0:
        raise SystemExit("madvise: %d" % ctypes.get_errno())


def balloon(path, want):
    """What the balloon took is zero, while the handler copies all around it."""
    m = Machine(path, want)
    pages = m.pages()
    keep, taken = pages[::2], pages[1::2]
    stop = threading.Event()
    failed = []

    def touch():
        try:
            while not stop.is_set():
                m.check(random.sample(keep, min(50, len(keep))))
        except BaseException as e:
            failed.append(e)

    t = threading.Thread(target=touch)
    t.start()
    random.shuffle(taken)
    for n, (addr, off) in enumerate(taken):
        if n % 3 == 0:
            read(addr)  # so it was there
        remove(addr)
        if n % 2 == 0 and read(addr) != bytes(PAGE):
            failed.append(SystemExit("offset %d came back" % off))
            break
    stop.set()
    t.join()
    if failed:
        raise failed[0]
    m.check(keep)
    for addr, off in taken:
        if read(addr) != bytes(PAGE):
            raise SystemExit("offset %d came back in the end" % off)
    ctypes.memmove(taken[0][0], b"mine", 4)  # it can be written to
    if read(taken[0][0])[:4] != b"mine":
        raise SystemExit("a write was lost")


def hang(path, want):
    """Touches a page, says so, and waits to be killed."""
    m = Machine(path, want)
    m.check(m.pages()[:1])
    print("ready", flush=True)
    time.sleep(100)


def orphan(path, want):
    """Goes on after its handler has settled and ended."""
    m = Machine(path, want)
    m.check(m.pages()[:1])
    remove(m.pages()[1][0])
    print("ready", flush=True)
    sys.stdin.readline()
    pages = m.pages()
    m.check(pages[:1] + pages[2:])
    for addr, _ in pages[1:3]:
        remove(addr)
        if read(addr) != bytes(PAGE):
            raise SystemExit("a removed page came back")


def rubbish(path, want):
    """Things that are no hand-over: the other side closes each connection."""
    fd = userfaultfd(0)
    good = {"base_host_virt_addr": anonymous(1 << 20), "size": 1 << 20, "offset": 0, "page_size": PAGE}

    def bad(body, fds):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        s = connect(path)
        s.settimeout(20)
        try:
            if fds:
                socket.send_fds(s, [body], fds)
            else:
                s.sendall(body)
            s.shutdown(socket.SHUT_WR)
            if s.recv(1):
                raise SystemExit("an answer")
        except (ConnectionResetError, BrokenPipeError):
            pass
        s.close()

    bad(b"", [])
    bad(b"hello", [fd])
    bad({}, [fd])
    bad([good], [])
    bad([good], [0])
    bad([good], [fd, fd])
    bad([], [fd])
    bad([good, good], [fd])
    for wrong in (
        {"offset": 1},
        {"size": -4096},
        {"size": 1 << 62},
        {"offset": 1 << 50},
        {"base_host_virt_addr": 5},
        {"base_host_virt_addr": (1 << 64) - 4096},
        {"page_size": 3},
        {"size": "x"},
    ):
        bad([dict(good, **wrong)], [fd])
    bad(b"[" * 70000, [fd])


if __name__ == "__main__":
    path, name, scenario = sys.argv[1:]
    signal.alarm(110)
    sys.setswitchinterval(5e-5)  # threads that don't fault must not hold up those that do
    with open(name, "rb") as f:
        content = f.read()
    globals()[scenario](path, content)
    print("ok", flush=True)
