"""What a checkpoint of the real V3 costs a training loop: stall, slow-down of the steps beside it, time until durable.

    python bench/checkpoint.py [--rounds 5]

A loop of matrix products (about 80 ms a step) saves the state of V3 + AdamW (194.5 MB). All systems take turns in one run, and
figures are multiples of two floors measured in the same run: a preallocated memcpy of the state (copy floor), and a raw write +
fsync + rename of the same bytes (durable floor). Systems that cannot be imported are left out, saying so.
"""
import argparse
import contextlib
import logging
import os
import shutil
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
import model as v3                                          # noqa: E402


def v3_state():
    """Weights and AdamW moments of the configured V3 after one step with small gradients."""
    network = v3.V3(19)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1, "batch": 1, "global_step": 1}


class Step:
    """Matrix products of about 80 ms."""

    def __init__(self):
        self.a, self.b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        start = time.perf_counter()
        for _ in range(10):
            self.a @ self.b
        self.count = max(1, int(0.8 / (time.perf_counter() - start)))

    def __call__(self):
        start = time.perf_counter()
        for _ in range(self.count):
            torch.mm(self.a, self.b)
        return time.perf_counter() - start


class TorchSave:
    name, sync = "torch.save", False

    def __init__(self, place):
        self.path = place / "last.pt"

    def save(self, state):
        temp = self.path.with_suffix(".tmp") if self.sync else self.path
        with open(temp, "wb") as file:
            torch.save(state, file)
            if self.sync:
                file.flush()
                os.fsync(file.fileno())
        if self.sync:
            os.replace(temp, self.path)

    def wait(self):
        """Everything happened in save."""


class TorchSaveSync(TorchSave):
    name, sync = "torch.save + fsync + replace", True


class Dcp(TorchSave):
    name = "torch.distributed.checkpoint save"

    def save(self, state):
        dcp.save(state, checkpoint_id=str(self.path), no_dist=True)


class DcpAsync(Dcp):
    name = "torch.distributed.checkpoint async_save"

    def save(self, state):
        self.future = dcp.async_save(state, checkpoint_id=str(self.path))

    def wait(self):
        self.future.result()


class Lightning(TorchSave):
    name = "Lightning"

    def __init__(self, place):
        super().__init__(place)
        from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
        self.io = TorchCheckpointIO()

    def save(self, state):
        self.io.save_checkpoint(state, self.path)


class LightningAsync(Lightning):
    name = "Lightning AsyncCheckpointIO"

    def __init__(self, place):
        super().__init__(place)
        from lightning.pytorch.plugins.io import AsyncCheckpointIO
        self.io = AsyncCheckpointIO(self.io)
        self.done = threading.Event()
        inner = self.io.checkpoint_io.save_checkpoint

        def finished(*arguments, **options):
            inner(*arguments, **options)
            self.done.set()
        self.io.checkpoint_io.save_checkpoint = finished

    def save(self, state):
        self.done.clear()
        super().save(state)

    def wait(self):
        self.done.wait()


class Safetensors(TorchSave):
    name = "safetensors save_file"

    def __init__(self, place):
        super().__init__(place)
        from safetensors.torch import save_file
        self.save_file = save_file

    def save(self, state):
        flat = {f"model.{k}": v for k, v in state["model"].items()}
        for i, entry in state["optimizer"]["state"].items():
            flat |= {f"optimizer.{i}.{k}": v for k, v in entry.items()}
        self.save_file(flat, self.path)


class Ours:
    name = "holdfast"

    def __init__(self, place):
        self.saver = checkpoint.Checkpointer(place / "ours", mid_epoch_keep=2, say=lambda line: None)
        self.batch = 0

    def save(self, state):
        self.batch += 1
        self.saver.save_mid({**state, "batch": self.batch})

    def wait(self):
        self.saver.wait()


def measure(system, state, step, steps=8):
    """(stall, slow-down of the next steps, time until durable) in seconds for one save."""
    calm = statistics.median(step() for _ in range(5))
    start, durable = time.perf_counter(), []
    system.save(state)
    stall = time.perf_counter() - start
    waiter = threading.Thread(target=lambda: (system.wait(), durable.append(time.perf_counter() - start)))
    waiter.start()
    slow = sum(max(0.0, step() - calm) for _ in range(steps))
    waiter.join()
    return stall, slow, durable[0]


def floors(state, place):
    """(copy, durable, read) in seconds: preallocated memcpy; raw write, fsync, rename, fsync; read into kept memory."""
    size = sum(t.nbytes for t in state["model"].values()) * 3
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    start = time.perf_counter()
    target.copy_(source)
    copy = time.perf_counter() - start
    data = memoryview(source.numpy()).cast("B")
    start = time.perf_counter()
    checkpoint._write(place / "raw.bin", data, b"")
    durable = time.perf_counter() - start
    with open(place / "raw.bin", "rb", buffering=0) as file:
        file.readinto(memoryview(target.numpy()).cast("B"))
        file.seek(0)
        start = time.perf_counter()
        file.readinto(memoryview(target.numpy()).cast("B"))
    return copy, durable, time.perf_counter() - start


def resume_cost(state, place, read):
    """Find, verify and load from a directory of ten, in read floors (files in the page cache, as the read floor)."""
    with checkpoint.Checkpointer(place, mid_epoch_keep=0, background=False, say=lambda line: None) as saver:
        for batch in range(10):
            saver.save_mid({**state, "batch": batch})
    newest = place / "mid_epoch_001_000009.pt"
    newest.read_bytes(), checkpoint.load(newest)
    start = time.perf_counter()
    checkpoint._choose(place, checkpoint.load, lambda line: None)
    chosen = time.perf_counter() - start
    start = time.perf_counter()
    torch.load(newest, weights_only=True)
    return chosen / read, (time.perf_counter() - start) / read


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    state, step = v3_state(), Step()
    with tempfile.TemporaryDirectory(dir=".") as temp:
        temp, systems = Path(temp), []
        for kind in (TorchSave, TorchSaveSync, Dcp, DcpAsync, Lightning, LightningAsync, Safetensors, Ours):
            (temp / kind.__name__).mkdir()
            try:
                systems.append(kind(temp / kind.__name__))
            except ImportError as missing:
                print(f"left out: {kind.name} ({missing})")
        torch.distributed.init_process_group("gloo", init_method=f"file://{temp.resolve()}/group", rank=0, world_size=1)
        base, rows = [], {system.name: [] for system in systems}
        for number in range(args.rounds + 1):               # the first round warms up
            base.append(floors(state, temp))
            for system in systems:
                rows[system.name].append(measure(system, state, step))
        torch.distributed.destroy_process_group()
        copy, durable, read = (statistics.median(column) for column in zip(*base[1:]))
        print(f"copy floor {copy * 1e3:.1f} ms, durable floor {durable * 1e3:.0f} ms, read floor {read * 1e3:.0f} ms, step {step() * 1e3:.0f} ms\n")
        print("| system | stall / copy floor | stall + slow-down / copy floor | until durable / durable floor |\n|---|---|---|---|")
        for name, values in rows.items():
            stall, slow, until = (statistics.median(column) for column in zip(*values[1:]))
            print(f"| {name} | {stall / copy:.1f} | {(stall + slow) / copy:.1f} | {until / durable:.1f} |")
        ours, plain = resume_cost(state, temp / "ten", read)
        size = os.path.getsize(temp / "ten/mid_epoch_001_000009.pt")
        print(f"\nfile of V3: {size / 1e6:.1f} MB; find + verify + load of ten: {ours:.1f} read floors; torch.load of one, unverified: {plain:.1f}")
        with contextlib.suppress(AttributeError):
            systems[-1].saver.close()
        print(f"bytes written per epoch for last + best + periodic, in states: holdfast {written(state, temp / 'links'):.1f}, others 3.0")


def written(state, place):
    """Bytes on the disk after an epoch's end that is best, in files: one file with three names."""
    with checkpoint.Checkpointer(place, background=False, say=lambda line: None) as saver:
        saver.save_epoch(state, metric=1.0)
    inodes = {p.stat().st_ino: p.stat().st_size for p in place.glob("*.pt")}
    shutil.copy(place / "last.pt", place / "one")
    return sum(inodes.values()) / (place / "one").stat().st_size


if __name__ == "__main__":
    main()
