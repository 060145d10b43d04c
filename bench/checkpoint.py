"""What a checkpoint of the real V3 costs a training loop, beside the ways people save one today.

    pip install -r bench/requirements.txt && python bench/checkpoint.py

A loop of matrix products (about 80 ms a step) saves the state of V3 + AdamW (194.5 MB). All systems take turns in one run;
figures are medians over the rounds, as multiples of floors measured in the same rounds: a memcpy of the state into kept
memory (copy floor), a raw write + fsync + rename of the same bytes, direct or through the page cache, whichever is faster
(durable floor), and a read of them from the page cache into kept memory (read floor). Systems that never fsync get one from
the bench once they say that they are done, or "until durable" would never come. Peers that are not installed are left out.
"""
import argparse
import contextlib
import ctypes
import gc
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch                                                # noqa: E402
import torch.distributed.checkpoint as dcp                  # noqa: E402

import checkpoint                                           # noqa: E402
from run.mirror import Mirrored                               # noqa: E402
import model as v3                                          # noqa: E402

TARGET = ("target for holdfast", "1.2", "7, then 4", "1.6, then 1.2", "yes", "1.0", "", "6")


class Training:
    """V3 and AdamW after one step with small gradients, and a step that stands for the rest of training."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = v3.V3(19)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        for parameter in self.network.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.a, self.b, self.c = (torch.randn(1024, 1024) for _ in range(3))
        self.products = 1
        alone = statistics.median(self.step() for _ in range(20))
        self.products = max(1, round(0.08 / alone))

    def state(self, batch=1):
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "epoch": 1, "batch": batch, "global_step": batch}

    def tensors(self):
        moments = [t for entry in self.optimizer.state_dict()["state"].values() for t in entry.values()]
        return [*self.network.state_dict().values(), *moments]

    def step(self):
        """Matrix products of about 80 ms; returns its seconds."""
        began = time.perf_counter()
        for _ in range(self.products):
            torch.mm(self.a, self.b, out=self.c)
        return time.perf_counter() - began


# ---- systems: save(state, name) blocks as long as it blocks the loop, wait() until it says that it is done ----

class TorchSave:
    name, durable = "torch.save", False

    def __init__(self, place, training):
        self.place, self.training = place, training

    def save(self, state, name="last.pt"):
        torch.save(state, self.place / name)

    def wait(self):
        """Everything happened in save."""

    def load(self, name="last.pt"):
        return torch.load(self.place / name, weights_only=True)

    def sync(self):
        for path in [p for p in self.place.rglob("*")] + [self.place]:
            with contextlib.suppress(FileNotFoundError):            # a temp that became a checkpoint since it was listed
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)

    def end_of_epoch(self, state):
        for name in ("checkpoint_epoch_001.pt", "last.pt", "best.pt"):
            self.save(state, name)
            self.wait()

    def close(self):
        """Nothing is held."""


class NoSave(TorchSave):
    name, durable = "no save at all", True

    def save(self, state, name=None):
        """What the loop loses without any save is the noise of this machine."""


class TorchSaveSync(TorchSave):
    name, durable = "torch.save + fsync + replace", True

    def save(self, state, name="last.pt"):
        temp = self.place / f"{name}.tmp"
        with open(temp, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, self.place / name)


class Dcp(TorchSave):
    name, durable = "torch.distributed.checkpoint save", True       # of its files; not of the directory

    def save(self, state, name="last.pt"):
        dcp.save(state, checkpoint_id=str(self.place / name))

    def load(self, name="last.pt"):
        state = self.training.state()                               # read into the tensors of the live model
        dcp.load(state, checkpoint_id=str(self.place / name))


class DcpAsync(Dcp):
    name = "torch.distributed.checkpoint async_save"

    def save(self, state, name="last.pt"):
        self.future = dcp.async_save(state, checkpoint_id=str(self.place / name))

    def wait(self):
        self.future.result()


class Lightning(TorchSave):
    name = "Lightning"

    def __init__(self, place, training):
        super().__init__(place, training)
        from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
        self.io = TorchCheckpointIO()

    def save(self, state, name="last.pt"):
        self.io.save_checkpoint(state, self.place / name)

    def load(self, name="last.pt"):
        return self.io.load_checkpoint(self.place / name, map_location="cpu", weights_only=True)


class LightningAsync(Lightning):
    name = "Lightning AsyncCheckpointIO"

    def __init__(self, place, training):
        super().__init__(place, training)
        from lightning.pytorch.plugins.io import AsyncCheckpointIO
        inner, self.done = self.io.save_checkpoint, threading.Event()

        def save_checkpoint(*args, **kwargs):
            inner(*args, **kwargs)
            self.done.set()
        self.io.save_checkpoint = save_checkpoint                   # AsyncCheckpointIO does not say when it is done
        self.io = AsyncCheckpointIO(self.io)

    def save(self, state, name="last.pt"):
        self.done.clear()
        super().save(state, name)

    def wait(self):
        self.done.wait()

    def close(self):
        self.io.teardown()


class Accelerate(TorchSave):
    name = "Accelerate save_state"

    def __init__(self, place, training):
        super().__init__(place, training)
        from accelerate import Accelerator
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(training.network, training.optimizer)

    def save(self, state, name="last"):
        self.accelerator.save_state(str(self.place / name))

    def load(self, name="last"):
        self.accelerator.load_state(str(self.place / name))


class Safetensors(TorchSave):
    name = "safetensors save_file"

    def __init__(self, place, training):
        super().__init__(place, training)
        import safetensors.torch
        self.io = safetensors.torch

    def save(self, state, name="last.pt"):
        flat = {f"model.{k}": v for k, v in state["model"].items()}
        for i, entry in state["optimizer"]["state"].items():
            flat |= {f"optimizer.{i}.{k}": v for k, v in entry.items()}
        self.io.save_file(flat, self.place / name)

    def load(self, name="last.pt"):
        return {k: v.clone() for k, v in self.io.load_file(self.place / name).items()}      # it maps the file: now it is read


class Ours(TorchSave):
    name, durable = "holdfast", True

    def __init__(self, place, training, keep=2, mirror=None):
        super().__init__(place, training)
        self.done = threading.Event()                               # on_saved: durable; what follows is rotation
        kind, options = (Mirrored, {"mirror": mirror}) if mirror else (checkpoint.Checkpointer, {})
        self.saver = kind(place, mid_epoch_keep=keep, on_saved=lambda path: self.done.set(), say=lambda line: None, **options)

    def save(self, state):
        self.done.clear()
        self.saver.save_mid(state)

    def wait(self):
        assert self.done.wait(60)

    def end_of_epoch(self, state):
        self.saver.save_epoch(state, metric=1.0)
        self.saver.wait()

    def close(self):
        self.saver.close()


class OursMirrored(Ours):
    """The second copy lies on the same disk, the worst place for it; its work counts until it is durable too."""

    name = "holdfast with a mirror"

    def __init__(self, place, training):
        super().__init__(place, training, mirror=place / "second")

    def wait(self):
        super().wait()
        assert self.saver.wait_for_copy(60)


class OursResume(Ours):
    """A directory of ten snapshots, for the time to choose, verify and load."""

    def __init__(self, place, training):
        super().__init__(place, training, keep=0)
        for batch in range(1, 11):
            self.save(training.state(batch))
        self.saver.wait()

    def load(self):
        state = self.saver.resume()
        assert state["batch"] == 10


SYSTEMS = (TorchSave, TorchSaveSync, Dcp, DcpAsync, Lightning, LightningAsync, Accelerate, Safetensors, Ours, OursMirrored)


# ---- measurements ----

class Floors:
    """Copy, durable and read floor of `size` bytes, in seconds; its memory is kept and page-aligned."""

    def __init__(self, size, place):
        self.path, self.rows = place / "raw.bin", {"copy": [], "direct": [], "cached": [], "read": []}
        size += -size % checkpoint.PAGE
        self.source, self.target, kept = (self._aligned(size) for _ in range(3))
        self.bytes, self.kept = (memoryview(t.numpy()) for t in (self.source, kept))

    @staticmethod
    def _aligned(size):
        room = torch.ones(size + checkpoint.PAGE, dtype=torch.uint8)
        return room[-room.data_ptr() % checkpoint.PAGE:][:size]

    def timed(self, key, action, *args):
        began = time.perf_counter()
        action(*args)
        self.rows[key].append(time.perf_counter() - began)

    def copy(self):
        """From memory in use, as the state is, to memory that lay unused for a round, as a system's does: on a virtual
        machine whose host takes idle memory away, that alone made the same copy 4 times as slow after 40 s."""
        self.source.max()
        self.timed("copy", self.target.copy_, self.source)

    def disk(self):
        self.timed("cached", self._write, 0)
        self._read()
        self.timed("read", self._read)
        if hasattr(os, "O_DIRECT"):
            try:
                self.timed("direct", self._write, os.O_DIRECT)
            except OSError:
                return                              # tmpfs and some network file systems: the page cache is all there is

    def _write(self, flags):
        temp = self.path.with_suffix(".tmp")
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)
        left = self.bytes
        while left:
            left = left[os.write(fd, left):]
        os.fsync(fd)
        os.close(fd)
        os.replace(temp, self.path)

    def _read(self):
        with open(self.path, "rb", buffering=0) as file:
            left = self.kept
            while left:
                left = left[file.readinto(left):]

    def __getitem__(self, key):
        if key == "durable":
            return min(self[k] for k in ("direct", "cached") if self.rows[k])
        return statistics.median(self.rows[key])


def memory(field):
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def first_save(system, training):
    """Bytes of memory that the first save takes beyond the live state, at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)                # what earlier systems freed must not hide what this one takes
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")   # the peak starts anew
    system.save(training.state())
    system.wait()
    system.sync()
    return memory("VmHWM") - before


def one_save(system, training, batch, steps=8):
    """(stall, stall + slow-down of the steps until it is durable, time until durable), in seconds."""
    calm = statistics.median(training.step() for _ in range(steps))
    state, durable = training.state(batch), []

    def finish():
        system.wait()
        if not system.durable:
            system.sync()
        durable.append(time.perf_counter() - began)
    waiter = threading.Thread(target=finish)
    began = time.perf_counter()
    system.save(state)
    stall, lost, done = time.perf_counter() - began, 0.0, 0
    waiter.start()
    while done < steps or waiter.is_alive():
        lost += training.step() - calm
        done += 1
    waiter.join()
    return stall, stall + lost, durable[0]


def written(system, training):
    """Bytes that this process sends to the disk for last + best + periodic at the end of an epoch."""
    def count():
        return int(next(x for x in Path("/proc/self/io").read_text().split("\n") if x.startswith("write_bytes")).split()[1])
    system.sync()
    before = count()
    system.end_of_epoch(training.state())
    system.sync()
    return count() - before


def load_seconds(system, rounds=5):
    times = []
    for _ in range(rounds + 1):                     # the first one fills the page cache
        ctypes.CDLL(None).malloc_trim(0)            # a process that resumes has no memory to use again
        began = time.perf_counter()
        system.load()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def systems_in(place, training, only):
    for kind in SYSTEMS:
        if only not in kind.name:
            continue
        (place / kind.__name__).mkdir()
        try:
            yield kind(place / kind.__name__, training)
        except ImportError as missing:
            print(f"left out: {kind.name}: {missing}")


def table(rows):
    print("| system | stall / copy floor | stall + slow-down / copy floor | until durable / durable floor | fsync by itself "
          "| bytes per epoch / state | extra memory / state | find + load / read floor |")
    print("|" + "---|" * 8)
    for row in rows:
        print("| " + " | ".join(x if isinstance(x, str) else f"{x:.1f}" for x in row) + " |")


def measure(place, training, rounds, deadline, only=""):
    """Rows of the table, and the floors."""
    size = sum(t.nbytes for t in training.tensors())
    floors, systems = Floors(size, place), list(systems_in(place, training, only))
    torch.distributed.init_process_group("gloo", init_method=f"file://{place.resolve()}/group", rank=0, world_size=1)
    extra = {s: first_save(s, training) for s in systems}
    nothing, number = NoSave(place, training), 0
    saves = {s: [] for s in (*systems, nothing)}
    while number < rounds and time.monotonic() < deadline:
        floors.disk()
        turn = number % len(systems)
        for system in systems[turn:] + systems[:turn] + [nothing]:  # each round begins with another system
            training.step()
            if isinstance(system, Ours):
                floors.copy()
            saves[system].append(one_save(system, training, number + 2))
        number += 1
    rows = []
    for s in systems:
        stall, lost, durable = (statistics.median(column) for column in zip(*saves[s]))
        bytes_, memory_ = written(s, training), extra[s]
        if isinstance(s, Ours):
            name = s.name
            s.close()
            ten = place / f"ten of {name}"
            ten.mkdir()
            s = OursResume(ten, training)
            s.name = name
        rows.append((s.name, stall / floors["copy"], lost / floors["copy"], durable / floors["durable"],
                     "yes" if s.durable else "no", bytes_ / size, memory_ / size, load_seconds(s) / floors["read"]))
        s.close()
    torch.distributed.destroy_process_group()
    noise = statistics.median(lost for _, lost, _ in saves[nothing])
    print(f"{number} rounds; copy floor {floors['copy'] * 1e3:.0f} ms, durable floor {floors['durable'] * 1e3:.0f} ms, "
          f"read floor {floors['read'] * 1e3:.0f} ms, step {training.step() * 1e3:.0f} ms, {size / 1e6:.1f} MB of state; "
          f"without any save the same loop loses {noise / floors['copy']:.1f} copy floors")
    print(mirror_ratio({s.name: rows for s, rows in saves.items()}) + "\n")
    return rows


def mirror_ratio(saves):
    """Stall, and stall + slow-down, with a mirror in multiples of those without (target 1.15)."""
    pair = [saves.get(kind.name) for kind in (OursMirrored, Ours)]
    if None in pair:
        return ""
    with_, without = [[statistics.median(column) for column in zip(*rows)] for rows in pair]
    return f"with a mirror on the same disk: stall x {with_[0] / without[0]:.2f}, stall + slow-down x {with_[1] / without[1]:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=6.0, help="no new round after these")
    parser.add_argument("--only", default="", metavar="TEXT", help="systems whose name holds it")
    parser.add_argument("--dir", type=Path, default=ROOT / "bench/results", help="on the disk to measure")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        table([*measure(Path(place), Training(), args.rounds, deadline, args.only), TARGET])


if __name__ == "__main__":
    main()
