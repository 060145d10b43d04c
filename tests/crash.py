"""Harness for crash tests: every file-system call of a save can be counted, killed at, failed, or recorded and replayed.

    with Watched(directory, hook):          hook(number, name, arguments) runs before each call that touches `directory`
    kill_sweep(setup, save, check)          SIGKILL before and in the middle of each call, in a forked child
    crash_states(log)                       every directory that a power cut may leave behind, after Pillai et al., OSDI'14
"""
import contextlib
import itertools
import os
import shutil
import signal
from pathlib import Path

CALLS = ("open", "write", "fsync", "replace", "rename", "link", "unlink", "close")


class Watched:
    """Wraps the functions of `os` that change `directory`; `log` is what a disk would see, data included."""

    def __init__(self, directory, hook=lambda number, name, arguments: None):
        self.directory, self.hook, self.count, self.log, self.files = str(directory), hook, 0, [], {}
        self.inodes = itertools.count()

    def __enter__(self):
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self._wrap(name))
        return self

    def __exit__(self, *exception):
        for name, function in self.real.items():
            setattr(os, name, function)

    def _ours(self, name, arguments):
        if name in ("write", "fsync", "close"):
            return arguments[0] in self.files
        return str(arguments[0]).startswith(self.directory)

    def _wrap(self, name):
        real = self.real[name]

        def call(*arguments, **options):
            if not self._ours(name, arguments):
                return real(*arguments, **options)
            self.count += 1
            half = self.hook(self.count, name, arguments)
            if half == "half":
                real(arguments[0], memoryview(arguments[1])[:len(arguments[1]) // 2 // 4096 * 4096 or 1])
                os.kill(os.getpid(), signal.SIGKILL)
            if isinstance(half, BaseException):
                if name == "close":
                    real(*arguments)
                raise half
            result = real(*arguments, **options)
            self._record(name, arguments, result)
            return result
        return call

    def _record(self, name, arguments, result):
        if name == "open":
            directory = os.path.isdir(arguments[0])
            self.files[result] = "directory" if directory else next(self.inodes)
            if not directory and arguments[1] & os.O_CREAT:
                self.log.append(("create", os.path.basename(arguments[0]), self.files[result], bool(arguments[1] & os.O_TRUNC)))
        elif name == "write":
            self.log.append(("write", self.files[arguments[0]], bytes(memoryview(arguments[1])[:result])))
        elif name == "fsync":
            self.log.append(("fsync", self.files[arguments[0]]))
        elif name == "close":
            self.files.pop(arguments[0])
        else:
            self.log.append((name, *(os.path.basename(a) for a in arguments[:2])))


def run_child(action):
    """`action` in a forked child; returns "done", "killed" or the exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            action()
            code = 0
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else "done" if status == 0 else os.WEXITSTATUS(status)


def kill_sweep(directory, setup, save, check):
    """SIGKILL at call 1, 2, ... of save(directory) until a child survives; check(directory) after each. Returns kill points."""
    points = 0
    for at in itertools.count(1):
        for mode in ("before", "half"):
            shutil.rmtree(directory, ignore_errors=True)
            Path(directory).mkdir(parents=True)
            setup(directory)

            def hook(number, name, arguments):
                if number == at and mode == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                return "half" if number == at and name == "write" and len(arguments[1]) > 1 else None

            def child():
                with Watched(directory, hook):
                    save(directory)
            outcome = run_child(child)
            if outcome == "done" and mode == "before":
                return points
            if outcome == "killed":
                points += 1
                check(directory)
            elif outcome != "done":
                raise AssertionError(f"the save itself failed at call {at} ({mode}): exit {outcome}")


def crash_states(log):
    """(files, saved) for each state that a power cut may leave: name -> bytes, and the last save that had returned.

    Data that no fsync covered may be all there, missing, half there or zeros; directory changes since the last fsync of the
    directory may be lost from any point on, or one of them alone."""
    seen = set()
    for cut in range(len(log) + 1):
        now, saved = _replay(log[:cut])
        inodes, durable, pending = now
        dirty = [i for i, (data, safe) in inodes.items() if data != safe]
        choices = [pending[:k] for k in range(len(pending) + 1)] + [pending[:k] + pending[k + 1:] for k in range(len(pending))]
        for changes in choices:
            names = dict(durable)
            for change in changes:
                _apply(names, change)
            for damage in ("all", "old", "half", "zeros") if dirty else ("all",):
                files = {name: _data(*inodes[i], damage) for name, i in names.items()}
                mark = (saved, tuple(sorted((n, hash(d)) for n, d in files.items())))
                if mark not in seen:
                    seen.add(mark)
                    yield files, saved


def _data(data, safe, damage):
    if data == safe or damage == "all":
        return data
    return {"old": safe or b"", "half": data[:len(data) // 2], "zeros": bytes(len(data))}[damage]


def _replay(log):
    inodes, names, durable, pending, saved = {}, {}, {}, [], None
    for kind, *rest in log:
        if kind == "returned":
            saved = rest[0]
        elif kind == "write":
            data, safe = inodes[rest[0]]
            inodes[rest[0]] = data + rest[1], safe
        elif kind == "fsync" and rest[0] != "directory":
            inodes[rest[0]] = inodes[rest[0]][0], inodes[rest[0]][0]
        elif kind == "fsync":
            durable, pending = dict(names), []
        else:
            if kind == "create":
                inodes[rest[1]] = b"", None
            change = (kind, *rest)
            _apply(names, change)
            pending.append(change)
    return (inodes, durable, pending), saved


def _apply(names, change):
    kind, first, *rest = change
    if kind == "create":
        names[first] = rest[0]
    elif kind == "unlink":
        names.pop(first, None)
    elif first in names:
        names[rest[0]] = names[first] if kind == "link" else names.pop(first)


def power_loss(log, directory, recover):
    """Materialise every crash state and recover(directory) it. Returns (states, recoveries that raised or lost a save)."""
    states = lost = 0
    for files, saved in crash_states(log):
        shutil.rmtree(directory, ignore_errors=True)
        Path(directory).mkdir(parents=True)
        for name, data in files.items():
            Path(directory, name).write_bytes(data)
        states += 1
        try:
            found = recover(directory)
            lost += saved is not None and (found is None or found < saved)
        except Exception as error:          # counted, and shown by the caller: a recovery must never raise
            lost += 1
            print(f"recovery raised {type(error).__name__}: {error}")
    return states, lost


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
