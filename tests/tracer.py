"""The system calls of a forked child, seen through ptrace(2): recorded, killed at, cut in half. Linux on x86-64.

    Trace(action, [directory])                      .outcome, .points: calls that touch the directory, .log: what they did
    Trace(action, [directory], at=7)                the child is killed before its 7th such call
    Trace(action, [directory], at=7, half=True)     ... or after half of it, where it writes
    Trace(action, [directory], at=7, strike=f)      f() is called before it instead, and the child goes on

Unlike wrapped functions of `os`, this sees whatever the child uses: C++ streams, Rust, sendfile, threads. The log has the form
that crash.crash_states reads; a child tells that a save returned with os.access("/returned/STEP").
"""
import ctypes
import os
import platform
import signal

ABOUT = {1: ("write", "f"), 18: ("pwrite", "f"), 20: ("write", "f"), 40: ("write", "f"), 326: ("write", "--f"), 296: ("pwrite", "f"),
         2: ("open", "p"), 85: ("open", "p"), 257: ("open", "dp"), 3: ("close", "f"), 74: ("fsync", "f"), 75: ("fsync", "f"),
         76: ("truncate", "p"), 77: ("ftruncate", "f"), 82: ("rename", "pp"), 264: ("rename", "dpdp"), 316: ("rename", "dpdp"),
         83: ("mkdir", "p"), 258: ("mkdir", "dp"), 84: ("unlink", "p"), 87: ("unlink", "p"), 263: ("unlink", "dp"),
         86: ("link", "pp"), 265: ("link", "dpdp"), 72: ("fcntl", "f"), 73: ("flock", "f"), 8: ("lseek", "f"), 21: ("access", "p"),
         90: ("chmod", "p"), 91: ("chmod", "f"), 268: ("chmod", "dp"), 285: ("fallocate", "f")}
TRACEME, GETREGS, SETREGS, SYSCALL, SETOPTIONS = 0, 12, 13, 24, 0x4200
OPTIONS = 0x100000 | 8 | 1                          # die with the tracer, follow threads, mark stops at system calls
ALL_THREADS = 0x40000000
NAMES = ("r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs "
         "gs").split()


class Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulong) for name in NAMES]

    @property
    def arguments(self):
        return self.rdi, self.rsi, self.rdx, self.r10, self.r8


libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request, tid, address=0, data=0):
    if libc.ptrace(request, tid, address, ctypes.cast(data, ctypes.c_void_p) if data else None) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def available():
    """Whether a child can be traced here; some sandboxes forbid it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        return Trace(lambda: os.access("/returned/1", os.F_OK), ["/nowhere"]).log == [("returned", 1)]
    except OSError:
        return False


class Trace:
    """One traced run of `action` in a forked child: outcome ("done", "killed" or the exit code), points, log."""

    def __init__(self, action, roots, at=None, half=False, strike=None):
        self.roots, self.at, self.half, self.strike = [os.path.realpath(root) for root in roots], at, half, strike
        self.points, self.log, self.inodes, self.pending = 0, [], {}, {}
        self.halved = self.dead = self.writing = False
        pid = os.fork()
        if pid == 0:
            self._child(action)
        try:
            self._follow(pid)
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            raise

    def _child(self, action):
        code = 1
        try:
            os.setpgid(0, 0)
            _ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
            code = 0
        except Exception as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)

    def _follow(self, pid):
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            raise OSError(f"the child cannot be traced: exit code {os.WEXITSTATUS(status)}")
        _ptrace(SETOPTIONS, pid, 0, OPTIONS)
        tid, forward = pid, 0
        while True:
            try:
                _ptrace(SYSCALL, tid, 0, forward)
            except ProcessLookupError:      # killed meanwhile
                pass
            tid, status = os.waitpid(-pid, ALL_THREADS)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                if tid == pid:
                    self.outcome = "killed" if os.WIFSIGNALED(status) else "done" if status == 0 else os.WEXITSTATUS(status)
                    return
                continue
            stopped = os.WSTOPSIG(status)
            if stopped == signal.SIGTRAP | 0x80:
                self._stop(pid, tid)
            forward = stopped if stopped not in (signal.SIGTRAP | 0x80, signal.SIGTRAP, signal.SIGSTOP) else 0

    def _stop(self, pid, tid):
        if self.dead:                       # other threads may stop once more on their way out
            return
        registers = Registers()
        try:
            _ptrace(GETREGS, tid, 0, ctypes.addressof(registers))
        except ProcessLookupError:
            return
        if tid in self.pending:             # every other stop is the end of the call
            call = self.pending.pop(tid)
            if call:
                self._after(pid, tid, call, registers)
            return
        self.pending[tid] = call = self._call(tid, registers)
        if call and call[0] != "access":
            self.points += 1
            if self.points == self.at:
                self._strike(pid, tid, call, registers)

    def _call(self, tid, registers):
        """(kind, paths, arguments, existed) of a call that touches one of the directories, else None."""
        if registers.orig_rax not in ABOUT:
            return None
        kind, form = ABOUT[registers.orig_rax]
        try:
            paths = list(self._paths(tid, form, registers.arguments))
        except OSError:                     # a file that is not open, a path that is none
            return None
        if kind == "access":
            return (kind, paths, registers.arguments, True) if paths[0].startswith("/returned/") else None
        if not any(path == root or path.startswith(root + "/") for path in paths for root in self.roots):
            return None
        return kind, paths, registers.arguments, os.path.lexists(paths[0])

    def _paths(self, tid, form, arguments):
        base = f"/proc/{tid}/cwd"
        for letter, value in zip(form, arguments):
            value = ctypes.c_int(value).value if letter in "fd" else value
            if letter == "f":
                yield os.readlink(f"/proc/{tid}/fd/{value}").removesuffix(" (deleted)")
            elif letter == "d":
                base = f"/proc/{tid}/cwd" if value == -100 else f"/proc/{tid}/fd/{value}"
            elif letter == "p":
                with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
                    memory.seek(value)
                    text = memory.read(4096).split(b"\0")[0].decode()
                folder, name = os.path.split(os.path.join(os.readlink(base), text))
                yield os.path.join(os.path.realpath(folder), name)

    def _strike(self, pid, tid, call, registers):
        if self.strike:
            return self.strike()
        size = {40: "r10", 326: "r8"}.get(registers.orig_rax, "rdx")
        self.writing = call[0] in ("write", "pwrite") and getattr(registers, size) > 1
        if self.half:
            half = getattr(registers, size) // 2
            setattr(registers, size, half // 4096 * 4096 or half)           # direct writes go by the block
            _ptrace(SETREGS, tid, 0, ctypes.addressof(registers))
            self.halved = True
        else:
            self._kill(pid)

    def _kill(self, pid):
        self.dead = True
        os.kill(pid, signal.SIGKILL)

    def _after(self, pid, tid, call, registers):
        if self.halved:
            return self._kill(pid)
        result = ctypes.c_long(registers.rax).value
        if result >= 0 or call[0] == "access":
            self._record(tid, *call, registers.orig_rax, result)

    def _record(self, tid, kind, paths, arguments, existed, number, result):
        if kind == "access":
            self.log.append(("returned", int(os.path.basename(paths[0]))))
        elif kind == "open":
            flags = arguments[{2: 1, 257: 2}.get(number, 1)] if number != 85 else os.O_CREAT | os.O_TRUNC
            if not existed and flags & os.O_CREAT:
                self.inodes[self._number(tid, result)] = len(self.log)      # inode numbers are used again
                self.log.append(("create", paths[0], len(self.log)))
            elif flags & os.O_TRUNC:
                self.log.append(("truncate", self._inode(tid, result), 0))
        elif kind in ("write", "pwrite"):
            fd = arguments[2] if number == 326 else arguments[0]
            self._written(tid, fd, result, arguments[3] if kind == "pwrite" else None)
        elif kind == "ftruncate":
            self.log.append(("truncate", self._inode(tid, arguments[0]), arguments[1]))
        elif kind == "fsync":
            self.log.append(("fsync", paths[0] if os.path.isdir(paths[0]) else self._inode(tid, arguments[0])))
        elif kind in ("rename", "link", "unlink", "mkdir"):
            self.log.append((kind, *paths))

    def _written(self, tid, fd, size, at):
        if at is None:
            with open(f"/proc/{tid}/fdinfo/{fd}") as info:
                at = int(info.readline().split()[1]) - size
        with open(f"/proc/{tid}/fd/{fd}", "rb", buffering=0) as file:
            self.log.append(("write", self._inode(tid, fd), at, os.pread(file.fileno(), size, at)))

    def _number(self, tid, fd):
        stat = os.stat(f"/proc/{tid}/fd/{fd}")
        return stat.st_dev, stat.st_ino

    def _inode(self, tid, fd):
        return self.inodes.get(self._number(tid, fd), -1)                   # -1: it was there before
