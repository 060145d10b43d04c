"""Real processes that need not import torch anew: each is forked from one that did, and runs a Python command from its
first line on.

    process = forked.Popen([sys.executable, "train.py", ...], cwd=..., env=..., stdout=...)

is subprocess.Popen, to the caller: same arguments, same object, a child of this process with its own number, signals and
exit code. Only its interpreter and the libraries come out of a fork; scripts and modules of the project are imported by the
child, from its own sys.path: where a file's bytes are those of the checkout, only their translation to bytecode, most of the
time of such an import, is the server's. One server for each process of the suite, started by the first use; it has imported and never
computed, so no thread and no random number is handed down.

What the fork hides: the environment is read too late for the interpreter (PYTHONPATH, PYTHONHASHSEED, PYTHONWARNINGS; only
PYTHONUNBUFFERED and PYTHONIOENCODING are heard) and for the libraries (OMP_NUM_THREADS). Who needs those takes subprocess.
"""
import _imp
import array
import atexit
import ctypes
import gc
import importlib.machinery
import io
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import types
import weakref
from pathlib import Path

NAME = "forks"                              # of the process that forks, in ps
SUBREAPER = 36                              # of linux/prctl.h
ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "numpy", "h5py", "scipy.signal",
             "yaml", "tqdm", "modal", "torch.distributed.run", "matplotlib.pyplot", "matplotlib.backends.backend_agg",
             "timescoring.scoring", "concurrent.futures.process", "multiprocessing.queues")


# ---- the process of a test ----

class Popen(subprocess.Popen):
    """subprocess.Popen of [sys.executable, script | -c code | -m module, arguments ...] by a fork."""

    def __init__(self, args, *, start_new_session=False, **options):
        self.session = start_new_session
        super().__init__(args, **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                       p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *others):
        words = [os.fspath(word) for word in args]
        if words[0] != sys.executable or shell or executable or pass_fds or preexec_fn:
            raise ValueError(f"not a Python command that can be forked: {args}")
        plain = [0 if p2cread == -1 else p2cread, 1 if c2pwrite == -1 else c2pwrite, 2 if errwrite == -1 else errwrite]
        request = {"words": words, "cwd": os.fspath(cwd or os.getcwd()), "env": dict(os.environ if env is None else env),
                   "session": self.session}
        try:
            self.pid = ask(request, plain)
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(args, *, capture_output=False, timeout=None, check=False, input=None, **options):
    """subprocess.run by a fork."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def ask(request, descriptors):
    """Process id of the child that the server forked. It becomes a child of this process: its parent ends at once, and for
    that moment this process takes in orphans."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(server())
        adopt(True)
        try:
            body = json.dumps(request).encode()
            fds = array.array("i", descriptors)
            line.sendmsg([len(body).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            line.sendall(body)
            answer = line.recv(64)
        finally:
            adopt(False)
    if not answer:
        raise RuntimeError("the process that forks is gone")
    return int(answer)


def adopt(wanted):
    if ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def server():
    """Address of the process that forks, once it has imported all. It ends with this one: its input ends."""
    if not SERVERS:
        address = new_address()
        process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the process that forks did not start")
        SERVERS.append((address, process))
    return SERVERS[-1][0]


SERVERS = []                                # (address, what keeps it alive) of this process


def new_address():
    return os.path.join(tempfile.mkdtemp(prefix="forked"), "socket")


def branch():
    """Have this process, a forked one itself, fork for its own children: they must be its own."""
    address = new_address()
    ends, alive = os.pipe()
    heard, ready = os.pipe()
    if os.fork():
        os.close(ends)
        os.close(ready)
        os.read(heard, 1)
        os.close(heard)
        SERVERS.append((address, alive))
        return
    os.setsid()                             # no signal to the session or its terminal is meant for it
    os.close(alive)
    os.close(heard)
    asked = serve(address, ends, ready)
    if not asked:
        os._exit(0)
    become(*asked)
    sys.exit(code_of(asked[0]["words"]))


if not sys.platform.startswith("linux"):    # elsewhere no process can take in another's child
    Popen = subprocess.Popen                # noqa: F811
    run = subprocess.run                    # noqa: F811


# ---- the server ----

def serve(address, ends, ready):
    """Fork a child for each request; return its request in the child, nothing once the descriptor `ends` has ended."""
    for name in LIBRARIES:
        __import__(name)
    translate()
    for finalizer in weakref.finalize._registry:        # those of torch take its operators apart, page by page
        finalizer.atexit = False
    Path("/proc/self/comm").write_text(NAME)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    gc.freeze()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("threads do not live through a fork")
    os.write(ready, b"ready\n")
    if ready != 1:
        os.close(ready)
    while True:
        waiting = select.select([listener, ends], [], [])[0]
        if ends in waiting:
            os.unlink(address)
            os.rmdir(os.path.dirname(address))
            return None
        line = listener.accept()[0]
        try:
            request, descriptors = received(line)
        except (OSError, ValueError):                # who asked is gone
            line.close()
            continue
        between = os.fork()
        if not between:
            # the child's parent is whoever asked, once the process between them has ended
            mine = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == mine:
                os.sched_yield()
            if request["session"]:
                os.setsid()                 # first: whoever asked may signal the group at once
            line.sendall(str(os.getpid()).encode())
            line.close()
            listener.close()
            if ends:
                os.close(ends)
            Path("/proc/self/comm").write_text("python")
            return request, descriptors
        os.waitpid(between, 0)
        line.close()
        for descriptor in descriptors:
            os.close(descriptor)


TRANSLATED = {}                             # {bytes of a file of the checkout: code}


def translate():
    """Have the checkout's files as code, for whoever imports the same bytes, from there or from a copy."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if not path.name.startswith("test_"):
            content = path.read_bytes()
            TRANSLATED[content] = compile(content, str(path), "exec", dont_inherit=True)
    importlib.machinery.SourceFileLoader.source_to_code = lambda self, content, path, **options: code_from(content, path)


def code_from(content, path):
    code = TRANSLATED.pop(bytes(content), None)         # it bears one name, and so is given once
    if not code:
        return compile(content, path, "exec", dont_inherit=True)
    _imp._fix_co_filename(code, os.fspath(path))
    return code


def received(line):
    fds = array.array("i")
    head, ancillary, _, _ = line.recvmsg(8, socket.CMSG_SPACE(3 * fds.itemsize))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[:len(content) - len(content) % fds.itemsize])
    left, body = int.from_bytes(head, "big"), b""
    while len(body) < left:
        piece = line.recv(min(1 << 16, left - len(body)))
        if not piece:
            raise ValueError
        body += piece
    return json.loads(body), list(fds)


def become(request, descriptors):
    """Take the environment, the folder, the descriptors and the signals of the request."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None                 # it is TMPDIR's by now
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        if descriptor > 2:
            os.close(descriptor)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    words = {"encoding": encoding or None, "errors": errors or ("strict" if encoding else None), "closefd": False}
    sys.stdin = open(0, **words)
    sys.stdout = open(1, "w", **words)
    sys.stderr = open(2, "w", buffering=1, **words | {"errors": "backslashreplace"})
    if os.environ.get("PYTHONUNBUFFERED"):
        unbuffer()


def unbuffer():
    words = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), write_through=True, **words)


def execute(words):
    """What `python words ...` does after its own start."""
    options = words[1:]
    while options[0] == "-u":
        unbuffer()
        options = options[1:]
    place = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != place]
    if options[0] == "-c":
        sys.argv = ["-c", *options[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(options[1], "<string>", "exec"), vars(main))
    elif options[0] == "-m":
        sys.argv = options[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(options[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = options
        sys.path.insert(0, os.path.dirname(os.path.abspath(options[0])))
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = options[0]
        exec(code_from(Path(options[0]).read_bytes(), options[0]), vars(main))


def leave(codes):
    """The last of what runs at exit, when threads are joined: the rest would take apart, object by object, what the server
    imported."""
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    if codes:
        os._exit(codes[0])


def code_of(words):
    """Exit code of the command. Ctrl-C that it does not catch ends the interpreter as always."""
    try:
        execute(words)
        return 0
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
    except Exception:
        sys.excepthook(*sys.exc_info())
    return 1


if __name__ == "__main__":
    codes = []
    atexit.register(leave, codes)           # before any import registers what should run before it
    asked = serve(sys.argv[1], 0, 1)
    if asked:
        become(*asked)
        codes.append(code_of(asked[0]["words"]))
        sys.exit(codes[0])
