"""Harness for crash tests: every file-system call of a save can be counted, killed at, failed, or recorded and replayed.

    with Watched(directory, hook):          hook(number, name, arguments) runs before each call of Python on `directory`
    kill_sweep(directory, setup, save, check, run, every)  SIGKILL before and in the middle of each call, in a forked child
    crash_states(log, root)                 every directory that a power cut may leave behind, after Pillai et al., OSDI'14
    damages(blob, rng, flips)               bit flips, truncations, zeroed and swapped blocks of a file
    soak(directory, kills)                  random kills of a small training, resumed to its end

tracer.py does what Watched does with the system calls themselves, whoever makes them.
"""
import contextlib
import fcntl
import itertools
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import time
import traceback
from pathlib import Path

import torch

import checkpoint
import tracer

CALLS = [(os, name) for name in ("open", "write", "fsync", "replace", "rename", "link", "unlink", "close", "lseek", "fstat")]
CALLS += [(fcntl, "flock"), (fcntl, "fcntl")]
BY_PATH = ("open", "replace", "rename", "link", "unlink")


# ---- a state whose every value follows from its step ----

def state(step, epoch=1, batch=None):
    weight = torch.arange(3000, dtype=torch.float32) + step
    return {"model": {"weight": weight, "half": torch.full((5,), step, dtype=torch.bfloat16)},
            "optimizer": {"state": {0: {"exp_avg": weight * 2, "step": torch.tensor(float(step))}}, "lr": 0.1 * step},
            "epoch": epoch, "batch": step if batch is None else batch, "global_step": step, "save_counter": step}


def sound(loaded):
    """The step of a loaded state; an assertion error when any value is not that of the step."""
    step = loaded["global_step"]
    expected = state(step)
    assert torch.equal(loaded["model"]["weight"], expected["model"]["weight"])
    assert torch.equal(loaded["model"]["half"], expected["model"]["half"])
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    assert torch.equal(loaded["optimizer"]["state"][0]["step"], expected["optimizer"]["state"][0]["step"])
    assert loaded["optimizer"]["lr"] == expected["optimizer"]["lr"]
    return step


# ---- calls of Python ----

class Watched:
    """Wraps the functions that change `directory`; `log` is what a disk would see, data included."""

    def __init__(self, directory, hook=lambda number, name, arguments: None):
        self.directory, self.hook, self.count, self.log, self.files = str(directory), hook, 0, [], {}
        self.inodes = {}

    def __enter__(self):
        self.real = {(module, name): getattr(module, name) for module, name in CALLS}
        for module, name in CALLS:
            setattr(module, name, self._wrap(name, self.real[module, name]))
        return self

    def __exit__(self, *exception):
        for (module, name), function in self.real.items():
            setattr(module, name, function)

    @contextlib.contextmanager
    def paused(self):
        """Calls made inside, by the hook itself, are nobody's."""
        self.hook, hook = (lambda number, name, arguments: None), self.hook
        yield
        self.hook = hook

    def returned(self, step):
        self.log.append(("returned", step))

    def _wrap(self, name, real):
        def call(*arguments, **options):
            first = arguments[0]
            if not (str(first).startswith(self.directory) if name in BY_PATH else first in self.files):
                return real(*arguments, **options)
            self.count += 1
            order = self.hook(self.count, name, arguments)
            if order == "half":
                real(first, memoryview(arguments[1])[:len(arguments[1]) // 2 // 4096 * 4096 or 1])
                os.kill(os.getpid(), signal.SIGKILL)
            if isinstance(order, BaseException):
                if name == "close":         # Linux frees the descriptor whatever close returns
                    real(*arguments), self.files.pop(first)
                raise order
            existed = name == "open" and os.path.lexists(first)
            result = real(*arguments, **options)
            if name == "open":
                self._opened(str(first), arguments[1], result, existed)
            else:
                self._record(name, arguments, result)
            return result
        return call

    def _opened(self, path, flags, fd, existed):
        if os.path.isdir(path):
            self.files[fd] = path
            return
        number = os.stat(path).st_ino
        if not existed:                     # a number may be one of a file that is gone
            self.inodes[number] = len(self.log)
            self.log.append(("create", path, len(self.log)))
        elif flags & os.O_TRUNC:
            self.log.append(("truncate", self.inodes[number], 0))
        self.files[fd] = self.inodes.get(number, -1)

    def _record(self, name, arguments, result):
        if name == "write":
            at = self.real[os, "lseek"](arguments[0], 0, os.SEEK_CUR) - result
            self.log.append(("write", self.files[arguments[0]], at, bytes(memoryview(arguments[1])[:result])))
        elif name == "fsync":
            self.log.append(("fsync", self.files[arguments[0]]))
        elif name == "close":
            self.files.pop(arguments[0])
        elif name in BY_PATH:
            self.log.append(({"replace": "rename"}.get(name, name), *(str(path) for path in arguments[:2])))


def run_child(action, after=None):
    """`action` in a forked child, killed `after` so many seconds; returns "done", "killed" or the exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)        # OpenMP's threads do not live through a fork; waiting for them would never end
            action()
            code = 0
        except Exception:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)        # a child that has ended is not reaped yet: its number is still its own
    status = os.waitpid(pid, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else "done" if status == 0 else os.WEXITSTATUS(status)


# ---- kills ----

def wrapped(action, directory, at, half):
    """Kill `action` at its `at`-th call of Python on `directory`. Returns (outcome, whether that call may be cut in half)."""
    writing = mmap.mmap(-1, 1)              # shared with the child

    def hook(number, name, arguments):
        if number != at:
            return None
        if name == "write" and len(arguments[1]) > 1:
            writing[0] = 1
            if half:
                return "half"
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        with Watched(directory, hook):
            action()
    return run_child(child), bool(writing[0])


def traced(action, directory, at, half):
    """Kill `action` at its `at`-th system call on `directory`."""
    trace = tracer.Trace(action, [directory], at, half)
    return trace.outcome, trace.writing


def kill_sweep(directory, setup, save, check, run=wrapped, every=1):
    """SIGKILL at each call, or each `every`-th, of save(directory) until a child survives; check(directory) after each.
    Returns kill points."""
    points = 0
    start = Path(f"{directory}_start")
    shutil.rmtree(start, ignore_errors=True)
    start.mkdir(parents=True)
    setup(start)
    for at in itertools.count(1, every):
        for half in (False, True):
            shutil.rmtree(directory, ignore_errors=True)
            subprocess.run(["cp", "-a", start, directory], check=True)         # hard links stay links
            outcome, writing = run(lambda: save(directory), directory, at, half)
            if outcome == "done" and not half:
                return points
            if outcome == "killed":
                points += 1
                check(directory)
            elif outcome != "done":
                raise AssertionError(f"the save itself failed at call {at}: exit {outcome}")
            if not writing:
                break


# ---- power cuts ----

def crash_states(log, root):
    """(files, saved) for each state that a power cut may leave: relative name -> bytes, and the last save that had returned.

    Data that no fsync covered may be all there, missing, half there or zeros, for each file on its own; changes of a
    directory since its last fsync may be lost from any point on, or one of them alone."""
    seen = set()
    for cut in range(len(log) + 1):
        disk = _Disk(root)
        for operation in log[:cut]:
            disk.apply(*operation)
        for files in disk.states():
            mark = (disk.saved, tuple(sorted((name, hash(data)) for name, data in files.items())))
            if mark not in seen:
                seen.add(mark)
                yield files, disk.saved


class _Disk:
    """What of a log a disk holds for certain, and what it may hold."""

    def __init__(self, root):
        self.root, self.saved = os.path.realpath(root), None
        self.inodes, self.names, self.durable, self.pending = {}, {}, {}, []

    def apply(self, kind, first, *rest):
        if kind == "returned":
            self.saved = first
        elif kind == "write":
            (data, safe), (at, new) = self.inodes.get(first, (b"", b"")), rest
            self.inodes[first] = data[:at].ljust(at, b"\0") + new + data[at + len(new):], safe
        elif kind == "truncate":
            data, safe = self.inodes.get(first, (b"", b""))
            self.inodes[first] = data[:rest[0]].ljust(rest[0], b"\0"), safe
        elif kind == "fsync" and isinstance(first, int):
            self.inodes[first] = (self.inodes[first][0],) * 2
        elif kind == "fsync":
            for change in [c for c in self.pending if first in _parents(c)]:
                _change(self.durable, *change)
                self.pending.remove(change)
        else:
            if kind == "create":
                self.inodes[rest[0]] = b"", b""
            _change(self.names, kind, first, *rest)
            self.pending.append((kind, first, *rest))

    def states(self):
        kept = [self.pending[:k] for k in range(len(self.pending) + 1)]
        kept += [self.pending[:k] + self.pending[k + 1:] for k in range(len(self.pending) - 1)]
        for changes in kept:
            names = dict(self.durable)
            for change in changes:
                _change(names, *change)
            dirty = sorted({i for i in names.values() if i is not None and self.inodes[i][0] != self.inodes[i][1]})
            for fates in self._fates(dirty):
                yield {os.path.relpath(name, self.root): _data(*self.inodes[i], fates.get(i, "all"))
                       for name, i in names.items() if i is not None and self._reachable(name, names)}

    def _fates(self, dirty):
        kinds = ("all", "old", "half", "zeros")
        if len(dirty) > 3:                  # all alike, or one alone: enough, and not 4^n
            return [dict.fromkeys(dirty, k) for k in kinds] + [{i: k} for i in dirty for k in kinds[1:]]
        return [dict(zip(dirty, choice)) for choice in itertools.product(kinds, repeat=len(dirty))]

    def _reachable(self, name, names):
        folder = os.path.dirname(name)
        return folder == self.root or (folder.startswith(self.root + "/") and folder in names and self._reachable(folder, names))


def _parents(change):
    return {os.path.dirname(path) for path in change[1:] if isinstance(path, str)}


def _change(names, kind, first, *rest):
    if kind == "create":
        names[first] = rest[0]
    elif kind == "mkdir":
        names[first] = None
    elif kind == "unlink":
        names.pop(first, None)
    elif first in names:
        names[rest[0]] = names[first]
        if kind == "rename":
            del names[first]
            for inside in [name for name in names if name.startswith(first + "/")]:
                names[rest[0] + inside[len(first):]] = names.pop(inside)


def _data(data, safe, fate):
    return {"all": data, "old": safe, "half": data[:len(data) // 2], "zeros": bytes(len(data))}[fate]


def power_loss(log, root, directory, recover, most=None):
    """Materialise every crash state (evenly chosen `most` of them) and recover(directory) it.

    Returns (states, recoveries that raised, found nothing, or found less than a save that had returned)."""
    every = 1
    if most:
        every = max(1, -(-sum(1 for _ in crash_states(log, root)) // most))
    states = lost = 0
    for files, saved in itertools.islice(crash_states(log, root), 0, None, every):
        shutil.rmtree(directory, ignore_errors=True)
        Path(directory).mkdir(parents=True)
        for name, data in files.items():
            Path(directory, name).parent.mkdir(parents=True, exist_ok=True)
            Path(directory, name).write_bytes(data)
        states += 1
        try:
            found = recover(directory)
            lost += found is not None and found < 0 or saved is not None and (found is None or found < saved)
        except Exception as error:          # a recovery must never raise: counted, and shown
            lost += 1
            print(f"recovery raised {type(error).__name__}: {error}")
    return states, lost


# ---- damage ----

def damages(blob, rng, flips, step=1):
    """(what, bytes): random bit flips, every structural byte, truncations, zeroed and swapped blocks."""
    headers = {m.start() + i for m in re.finditer(rb"PK[\1-\7][\2-\10]", blob) for i in range(46)}
    tail = range(blob.rfind(b"PK\1\2") % len(blob), len(blob))              # no zip: its last byte
    for at in [*rng.choices(range(len(blob)), k=flips), *sorted(headers)[::step], *tail[::step]]:
        if at < len(blob):
            damaged = bytearray(blob)
            damaged[at] ^= 1 << rng.randrange(8)
            yield f"bit flip at {at}", damaged
    for length in [0, 1, 4, 22, *rng.choices(range(len(blob)), k=60 // step), len(blob) - 1]:
        yield f"truncated to {length}", blob[:length]
    for block in (512, 4096):
        for at in range(0, len(blob), block):
            if any(blob[at:at + block]):
                yield f"{block} zeros at {at}", blob[:at] + bytes(len(blob[at:at + block])) + blob[at + block:]
    for at in range(0, len(blob) - 8192, 4096):
        if blob[at:at + 4096] != blob[at + 4096:at + 8192]:
            yield f"blocks swapped at {at}", blob[:at] + blob[at + 4096:at + 8192] + blob[at:at + 4096] + blob[at + 8192:]
    yield "bytes appended", blob + b"\0" * 100


# ---- soak ----

def docstring_loop():
    """The training loop of checkpoint.py's docstring, as code."""
    code = checkpoint.__doc__.split("kill it whenever you like:")[1].split("\n\nA checkpoint is")[0]
    return "\n".join(line[4:] for line in code.splitlines())


def warm():
    """Have AdamW import what it imports at its first step here, not in every child."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()


def run_loop(directory, dies_after=None):
    """That loop in this process, quietly, in `directory`, saving after every step; killed once step `dies_after` is durable."""
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def die(step):
        if step == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
    code = docstring_loop().replace("mid_epoch_minutes=0.001", "mid_epoch_minutes=0")
    if dies_after:
        code = code.replace("saver.save_mid(pack())", "saver.save_mid(pack()), saver.wait(), die(step)")
    exec(compile(code, "docstring", "exec"), {"die": die})


def soak(directory, kills, seed=0):
    """Kill that loop at random times, resume it each time, begin anew when it ends. Returns (runs that ended, kills).

    Raises AssertionError when a kill takes away what was saved, or an end differs from that of a run never killed."""
    warm()
    start, cut = time.monotonic(), directory / "cut"
    assert run_child(lambda: run_loop(directory / "whole")) == "done"
    length, rng, killed, ended, furthest = time.monotonic() - start, random.Random(seed), 0, 0, 0
    ends = [checkpoint.load(directory / "whole/checkpoints" / name) for name in ("last.pt", "best.pt")]
    while True:
        outcome = run_child(lambda: run_loop(cut), after=rng.uniform(0, length / 4) if killed < kills else None)
        killed += outcome == "killed"
        path = checkpoint.find_resume(cut / "checkpoints", lambda line: None)
        step = checkpoint.load(path)["global_step"] if path else 0
        assert step >= furthest, f"a kill took step {furthest} away: {step} is left"
        furthest = step
        if outcome != "killed":
            assert outcome == "done", outcome
            for name, whole in zip(("last.pt", "best.pt"), ends):
                mine = checkpoint.load(cut / "checkpoints" / name)
                for key in ("global_step", "model", "optimizer"):
                    assert same(mine[key], whole[key]), f"{name} ended with another {key}"
                assert mine["holdfast"]["metric"] == whole["holdfast"]["metric"], name
            ended, furthest = ended + 1, 0
            shutil.rmtree(cut)
            if killed >= kills:
                return ended, killed


def same(a, b):
    """Equal to the bit, containers included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- savers to compare: each writes the bytes `data` as PATH ----

def _write(path, data, flags, sync):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    os.write(fd, data)
    if sync:
        os.fsync(fd)
    os.close(fd)


def in_place(path, data):
    _write(path, data, os.O_TRUNC, False)


def rename_without_fsync(path, data):
    _write(f"{path}.tmp", data, os.O_TRUNC, False)
    os.replace(f"{path}.tmp", path)


def rename_without_directory_fsync(path, data):
    _write(f"{path}.tmp", data, os.O_TRUNC, True)
    os.replace(f"{path}.tmp", path)


def rotate_first(path, data):
    for old in Path(path).parent.glob("mid_epoch_*.pt"):
        os.unlink(old)
    _write(f"{path}.tmp", data, os.O_TRUNC, True)
    os.replace(f"{path}.tmp", path)
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


NAIVE = {"write in place": in_place, "rename, no fsync": rename_without_fsync,
         "rename, fsync of the file only": rename_without_directory_fsync, "rotate first, keep 1": rotate_first}
