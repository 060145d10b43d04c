"""The folder under everything: who holds it, what reaches it durably or not at all, what its errors
mean, and a copy of it on a faster disk.

    with hold("data/tusz"):                                 # InUse where another process does
        write_json("data/tusz/index.json", {"format": 2})   # durable, all or nothing
    place = copy_folder("/mnt/nas/tusz", "/scratch", states)        # /scratch/tusz, with its index

Without torch: importing that takes a second. checkpoint.py, which is copied alone, has its own.
"""
import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eeg.console import Timer, how_many
from eeg.edf import FS, DataError

INDEX, REPORT = "index.json", "import.json"     # beside the recordings of an imported folder
CHUNK = 10 * FS                         # samples of a recording's chunk: windows begin every 10 s
COPIERS = 16                            # files copied at once
# folders where a program keeps what the user sees elsewhere or threw away: .git/annex of DataLad
NOT_THE_USERS = re.compile(r"\.|@eaDir$|#recycle$|\$RECYCLE\.BIN$|lost\+found$", re.I)
# what an OSError says of the path itself, until somebody mends it; every other one may pass
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM,
           errno.ENXIO, errno.EROFS, errno.ENAMETOOLONG, errno.EEXIST}


class Stop(Exception):
    """A program ends with one line, before it has touched anything; `code` is its exit code."""

    code = 1


class Refused(Stop):
    """Bad usage, configuration or data: the same start fails again until somebody mends it."""

    code = 2


class TemporaryFault(Stop):
    """A fault that passes: the same start may succeed later."""


def fault(error, where, kept="nothing was touched", asked=""):
    """The OSError `error` as Refused or TemporaryFault, in one line that begins with the file, or
    with what was `asked` for: an option or a key, and its value."""
    line = f"{asked or error.filename or where}: {error.strerror or error}"
    if error.errno == errno.EEXIST:     # a file, or a link to what is not there now
        line += ", and is no folder"
    if error.errno is None or error.errno in LASTING:
        return Refused(line)
    return TemporaryFault(f"{line}; {kept}: try again")


@contextlib.contextmanager
def named(path):
    """An OSError within names `path`: that of a read names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def exists(path):
    """os.path.lexists, but any other fault, which says nothing of the file, is raised."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        return False
    return True


def walk(root, onerror):
    """(folder, its files) of `root` and of all folders below that are the user's; links are
    followed, each folder once. onerror(OSError): a folder that cannot be listed or looked at."""
    seen = set()
    for folder, folders, files in os.walk(root, onerror=onerror, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not NOT_THE_USERS.match(name))
        yield folder, files


def holds(root, ending):
    """Whether a file of such an ending, in any case, lies below the folder `root`."""
    return any(name.lower().endswith(ending) for _, files in walk(root, lambda error: None)
               for name in files)


# ---- held by one process, written durably ----

class InUse(OSError):
    """Another live process holds the folder."""


class Hold:
    """A folder held by this process until `close` or its death; nothing forked from it holds on."""

    taken: set[int] = set()                         # descriptors of this process's holds

    def __init__(self, fd):
        self.fd = fd
        self.taken.add(fd)

    def close(self):
        if self.fd in self.taken:
            self.taken.discard(self.fd)
            # closing alone would leave it to a child that has the descriptor
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):      # a network disk may refuse its text only now
                os.close(self.fd)

    @classmethod
    def leave_to_parent(cls):
        """In a forked child: close without unlocking, which would unlock it for the parent too."""
        for fd in cls.taken:
            os.close(fd)
        cls.taken.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


os.register_at_fork(after_in_child=Hold.leave_to_parent)


def hold(folder):
    """Hold `folder` for this process; returns a Hold. Raises InUse where another process does,
    OSError where the folder cannot be locked."""
    how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(Path(folder, ".lock"), how, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        owner = os.pread(fd, 200, 0).decode(errors="replace").strip()
        os.close(fd)
        raise InUse(errno.EBUSY, f"in use by {owner or 'another process'}", str(folder)) from None
    except BaseException:
        os.close(fd)
        raise
    return Hold(fd)


def holder(folder):
    """The process that holds `folder`, in words; "" where none on this machine does."""
    try:
        fd = os.open(Path(folder, ".lock"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
    except OSError:
        pass                            # no locks on this file system: nobody holds it
    finally:
        os.close(fd)
    return ""


def replace_durably(temp, target):
    """`temp`, whole and closed, becomes `target` of the same folder, and survives a power cut once
    this returns (Pillai et al., OSDI'14). Raises OSError."""
    fd = os.open(temp, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.replace(temp, target)
    finally:
        os.close(fd)
    fd = os.open(Path(target).parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # "cannot" is not "failed"
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
    finally:
        os.close(fd)


def write_file(path, content):
    """Write bytes to `path`, durably, all or nothing; to a pipe or a device as they come. Raises
    OSError, which names `path`."""
    path = Path(path)
    if path.exists() and not path.is_file():                # such as /dev/stdout
        path.write_bytes(content)
        return
    path = path.resolve()               # a link stays one
    temp = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temp.write_bytes(content)
        replace_durably(temp, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temp.unlink(missing_ok=True)


def write_json(path, value, indent=None):
    """write_file() of `value` as JSON. ValueError for NaN, which JSON has not."""
    write_file(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json_lines(path, say=lambda line: None):
    """Yield the dicts of a file with one JSON object a line; none where it is absent.

    A kill or a power cut may tear the last row: what cannot be read is named through `say` and left
    out."""
    try:
        file = open(path, errors="replace")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                say(f"{Path(path).name}: dropped a row that cannot be read: {line[:60].strip()!r}")
                continue
            yield row


# ---- where recordings lie ----

def file_system(path):
    """Type of the file system that holds `path`, as the kernel names it."""
    place = os.path.realpath(path)
    found = "unknown file system"
    longest = 0
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            mount, kind = line.split()[1:3]
            inside = place == mount or place.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= longest:
                found, longest = kind, len(mount)
    return found


def file_state(status):
    """(bytes, time of the last change in ns): whether a file is still the one that was indexed."""
    return status.st_size, status.st_mtime_ns


def copy_folder(path, folder, states, say=print, copied=lambda: None):
    """Copy the recordings `states`, {name in `path`: file_state}, with their index below `folder`,
    on a faster disk; returns the copy's path. What an earlier call has copied stays; DataError
    without room, or where other recordings lie in the way. copied() is called after each file."""
    source = Path(path).resolve()
    target = Path(folder).resolve() / source.name
    if source in (target, *target.parents):
        raise DataError(f"data.copy_to {folder} lies within {path}, or is where it lies already")
    target.mkdir(parents=True, exist_ok=True)
    try:
        held = hold(target)
    except InUse as error:
        raise DataError(f"{target}: another process copies there: {error}") from None
    try:
        for part in target.rglob("*.h5.copying"):          # a killed copy's, which fill the disk
            part.unlink()
        strange = [str(p) for p in target.rglob("*.h5") if str(p.relative_to(target)) not in states]
        if strange:
            raise DataError(f"{strange[0]} is not in {path}: give data.copy_to a folder of its own")
        missing = {name: state[0] for name, state in states.items()
                   if not _is_copied(target / name, state)}
        room = shutil.disk_usage(target).free
        needed = sum(missing.values())
        if needed > 0.98 * room:
            raise DataError(f"data.copy_to {folder}: {needed / 1e9:.1f} GB to copy, "
                            f"{room / 1e9:.1f} GB free")
        _copy_files(source, target, missing, say, copied)
        for name in (INDEX, REPORT):
            if (source / name).exists():
                shutil.copy2(source / name, target / name)
    finally:
        held.close()
    return str(target)


def _is_copied(path, state):
    return path.exists() and file_state(path.stat()) == state


def _copy_files(source, target, sizes, say, copied):
    """Each file under its name only when it is whole, and with its time, which the index knows."""
    total, done = sum(sizes.values()), 0
    if sizes:
        say(f"copying {how_many(len(sizes), 'recording')}, {total / 1e9:.2f} GB, to {target}")
    plain = Timer(10)

    def copy(name):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        temp = place.with_name(place.name + ".copying")
        try:
            shutil.copy2(source / name, temp)
            replace_durably(temp, place)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename = str(place)             # not the source
            raise
        finally:
            temp.unlink(missing_ok=True)
        return sizes[name]

    pool = ThreadPoolExecutor(COPIERS, "copy")
    try:
        for size in pool.map(copy, sizes):
            done += size
            copied()
            if plain.due():
                say(f"copying to {target}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")
    finally:
        pool.shutdown(cancel_futures=True)


def disk_bytes():
    """Bytes that this process has read from block devices so far."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))
