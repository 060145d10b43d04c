"""Where recordings lie: the kind of disk, what was read from it, and a copy on a faster one.

    place = copy_corpus("/mnt/nas/tusz", "/scratch")        # /scratch/tusz, with its index
"""
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eeg import corpora
from eeg.edf import DataError

COPIERS = 16                            # files copied at once


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


def copy_corpus(path, folder, say=print, copied=lambda: None):
    """Copy an imported folder below `folder`, on a faster disk, and return the copy's path. What an
    earlier call has copied stays; DataError without room, or where other recordings lie in the way.
    copied() is called after each file."""
    import checkpoint                   # here: torch takes a command a second
    source = Path(path).resolve()
    target = Path(folder).resolve() / source.name
    if target == source:
        raise DataError(f"data.copy_to {folder} is where {path} lies already")
    sizes = {f"{name}.h5": state for name, (state, _) in corpora.entries(source).items()}
    target.mkdir(parents=True, exist_ok=True)
    try:
        held = checkpoint.lock(target)
    except checkpoint.InUse as error:
        raise DataError(f"{target}: another process copies there: {error}") from None
    try:
        strange = [str(p) for p in target.rglob("*.h5") if str(p.relative_to(target)) not in sizes]
        if strange:
            raise DataError(f"{strange[0]} is not in {path}: give data.copy_to a folder of its own")
        missing = {name: size for name, (size, mtime) in sizes.items()
                   if not _is_copied(target / name, (size, mtime))}
        room = shutil.disk_usage(target).free
        needed = sum(missing.values())
        if needed > 0.98 * room:
            raise DataError(f"data.copy_to {folder}: {needed / 1e9:.1f} GB to copy, "
                            f"{room / 1e9:.1f} GB free")
        _copy_files(source, target, missing, say, copied)
        for name in (corpora.INDEX, corpora.REPORT):
            if (source / name).exists():
                shutil.copy2(source / name, target / name)
    finally:
        held.close()
    return str(target)


def _is_copied(path, state):
    return path.exists() and corpora.file_state(path.stat()) == state


def _copy_files(source, target, sizes, say, copied):
    """Each file under its name only when it is whole, and with its time, which the index knows."""
    from checkpoint import durable_replace
    total, done = sum(sizes.values()), 0
    if sizes:
        say(f"copying {len(sizes)} recordings, {total / 1e9:.2f} GB, to {target}")
    said = time.monotonic()

    def copy(name):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        temp = place.with_name(place.name + ".copying")
        shutil.copy2(source / name, temp)
        durable_replace(temp, place)
        return sizes[name]

    pool = ThreadPoolExecutor(COPIERS, "copy")
    try:
        for size in pool.map(copy, sizes):
            done += size
            copied()
            if time.monotonic() - said > 10:
                said = time.monotonic()
                say(f"copying to {target}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")
    finally:
        pool.shutdown(cancel_futures=True)


def disk_bytes():
    """Bytes that this process has read from block devices so far."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))
