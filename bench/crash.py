"""What a kill, a power cut and damage leave of a checkpoint: ours beside the ways people write one, through one harness.

    python bench/crash.py [--flips 2000]

Kill points: SIGKILL before and in the middle of every file-system call of a save over an existing file. Crash states: every
directory that a power cut may leave behind after three saves (Pillai et al., OSDI'14). Damages: bit flips, truncations,
zeroed and swapped blocks of one file. Lost: neither the old nor the new file loads, or a save that had returned is gone.
"""
import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch                                                # noqa: E402

import checkpoint                                           # noqa: E402
import crash                                                # noqa: E402
from test_crash import damages, sound, state                # noqa: E402


class Raw(io.RawIOBase):
    """A file object whose calls the harness sees, buffered as open() buffers."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def writable(self):
        return True

    def write(self, data):
        return os.write(self.fd, data)


@contextlib.contextmanager
def opened(path):
    raw = Raw(path)
    file = io.BufferedWriter(raw, 1 << 16)
    yield raw, file
    file.flush()
    os.close(raw.fd)


def torch_save(path, value, temp=False, sync=False):
    with opened(f"{path}.tmp" if temp else path) as (raw, file):
        torch.save(value, file)
        file.flush()
        if sync:
            os.fsync(raw.fd)
    if temp:
        os.replace(f"{path}.tmp", path)


SYSTEMS = {
    "torch.save(path)": (lambda path, value: torch_save(path, value), torch.load),
    "torch.save, rename": (lambda path, value: torch_save(path, value, temp=True), torch.load),
    "torch.save, fsync, rename": (lambda path, value: torch_save(path, value, temp=True, sync=True), torch.load),
    "holdfast atomic_save": (lambda path, value: checkpoint.atomic_save(value, path), checkpoint.load)}


def try_load(load, path):
    """The step in the file, or None where it does not load; -1 where it loads with wrong values."""
    try:
        loaded = load(path)
    except Exception:                       # the table counts any failure to load alike
        return None
    try:
        return sound(loaded)
    except (AssertionError, KeyError, RuntimeError, TypeError, AttributeError):
        return -1


def kills(save, load, directory):
    lost = [0]

    def check(place):
        lost[0] += try_load(load, Path(place, "last.pt")) not in (1, 2)
    points = crash.kill_sweep(directory, lambda d: save(Path(d, "last.pt"), state(1)),
                              lambda d: save(Path(d, "last.pt"), state(2)), check)
    return points, lost[0]


def power(save, load, directory):
    work = directory / "work"
    work.mkdir(parents=True)
    with crash.Watched(work) as disk:
        for step in (1, 2, 3):
            save(work / "last.pt", state(step))
            disk.log.append(("returned", step))
    return crash.power_loss(disk.log, directory / "after", lambda place: try_load(load, Path(place, "last.pt")))


def flips(save, load, directory, count):
    path, tried, believed = directory / "x.pt", 0, 0
    save(path, state(7))
    for _, damaged in damages(path.read_bytes(), random.Random(0), count, step=5):
        path.write_bytes(damaged)
        tried, believed = tried + 1, believed + (try_load(load, path) == -1)
    return tried, believed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flips", type=int, default=2000)
    args = parser.parse_args()
    print("| system | kill points | lost | crash states | lost | damages | believed |\n|---|---|---|---|---|---|---|")
    for name, (save, load) in SYSTEMS.items():
        with tempfile.TemporaryDirectory() as temp:
            temp = Path(temp)
            row = (*kills(save, load, temp / "kill"), *power(save, load, temp / "power"), *flips(save, load, temp, args.flips))
            print(f"| {name} | " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
