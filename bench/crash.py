"""What a kill, a power cut and damage leave of a checkpoint: ours beside the ways others write one, through one harness.

    python bench/crash.py               about three minutes
    python bench/crash.py --long        more of everything, and 1000 random kills of a training
    python bench/crash.py --only ours   systems whose name contains this

Kills: SIGKILL before and in the middle of every system call of a save that follows an earlier save (ptrace). Power cuts:
every directory that may be left behind during and after three saves (Pillai et al., OSDI'14). Damages: bit flips, truncations,
zeroed and swapped blocks of each file. Each state goes through the system's own way back. Lost: no state comes back, or one
older than a save that had returned. Believed: wrong values are loaded without an error. Peers that are not installed are left
out: pip install lightning accelerate.
"""
import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch                                                # noqa: E402

import checkpoint                                           # noqa: E402
import crash                                                # noqa: E402
import tracer                                               # noqa: E402
from crash import sound, state                              # noqa: E402


def quiet(line):
    pass


class AtomicSave:
    """One file, last.pt."""

    name, elsewhere = "holdfast atomic_save", None

    def save(self, place, step):
        checkpoint.atomic_save(state(step), Path(place, "last.pt"))

    def recover(self, place):
        return sound(checkpoint.load(Path(place, "last.pt")))


class Run(AtomicSave):
    """Epoch ends of a run: links, best.pt, rotation to two, the background writer."""

    name = "holdfast Checkpointer"

    def save(self, place, step):
        with checkpoint.Checkpointer(place, checkpoint_keep=2, say=quiet) as saver:
            saver.resume()
            saver.save_epoch(state(step, epoch=step), metric=1 / step)

    def recover(self, place):
        path = checkpoint.find_resume(place, quiet)
        return sound(checkpoint.load(path)) if path else None


class TorchSave(AtomicSave):
    name = "torch.save(path)"

    def save(self, place, step):
        torch.save(state(step), Path(place, "last.pt"))

    def recover(self, place):
        return sound(torch.load(Path(place, "last.pt"), weights_only=True))


class TorchRename(TorchSave):
    name = "torch.save, rename"

    def save(self, place, step):
        torch.save(state(step), Path(place, "last.pt.tmp"))
        os.replace(Path(place, "last.pt.tmp"), Path(place, "last.pt"))


class TorchSync(TorchSave):
    name = "torch.save, fsync, rename"

    def save(self, place, step):
        with open(Path(place, "last.pt.tmp"), "wb") as file:
            torch.save(state(step), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(Path(place, "last.pt.tmp"), Path(place, "last.pt"))


class Lightning(AtomicSave):
    """What Trainer.save_checkpoint and ModelCheckpoint write through."""

    name = "Lightning"

    def __init__(self):
        import lightning
        from lightning.fabric.plugins.io import TorchCheckpointIO
        self.io = TorchCheckpointIO()
        self.name = f"{self.name} {lightning.__version__}"
        if self.elsewhere:
            self.name += ", TMPDIR on another disk"

    def save(self, place, step):            # it writes to TMPDIR, then moves
        tempfile.tempdir = self.elsewhere or str(Path(place, "tmp"))
        Path(tempfile.tempdir).mkdir(exist_ok=True)
        self.io.save_checkpoint(state(step), str(Path(place, "last.ckpt")))

    def recover(self, place):
        return sound(self.io.load_checkpoint(str(Path(place, "last.ckpt")), weights_only=True))


class LightningElsewhere(Lightning):
    def __init__(self):
        self.elsewhere = f"/dev/shm/crash{os.getpid()}"
        super().__init__()


class Accelerate(AtomicSave):
    """save_state with numbered folders, two of them kept; load_state takes the newest."""

    name = "Accelerate"

    def __init__(self):
        import accelerate
        from accelerate.utils import ProjectConfiguration
        self.name = f"Accelerate {accelerate.__version__}"
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        settings = ProjectConfiguration(automatic_checkpoint_naming=True, total_limit=2)
        self.accelerator = accelerate.Accelerator(cpu=True, project_config=settings)
        self.model = self.accelerator.prepare(torch.nn.Linear(3000, 1, bias=False))
        self.optimizer = self.accelerator.prepare(torch.optim.SGD(self.model.parameters(), lr=0.1))

    def save(self, place, step):
        with torch.no_grad():
            self.model.weight.copy_(torch.arange(3000.0) + step)
        self.optimizer.param_groups[0]["lr"] = 0.1 * step
        self.accelerator.project_configuration.set_directories(str(place))
        self.accelerator.project_configuration.iteration = step - 1
        self.accelerator.save_state(None)

    def recover(self, place):
        with torch.no_grad():
            self.model.weight.zero_()
        self.accelerator.project_configuration.set_directories(str(place))
        self.accelerator.load_state(None)
        step = round(self.optimizer.param_groups[0]["lr"] / 0.1)
        assert torch.equal(self.model.weight[0], torch.arange(3000.0) + step)
        return step


SYSTEMS = (AtomicSave, Run, TorchSave, TorchRename, TorchSync, Lightning, LightningElsewhere, Accelerate)


def way_back(system, place):
    """The step that comes back, None where nothing does, -1 where values are wrong."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return system.recover(place)
        except Exception as error:          # whatever a peer raises, nothing came back; what our look raises, it was wrong
            return None if raised_inside(error) else -1


def raised_inside(error):
    """Whether `error` comes from the loader, not from our look at the values it returned."""
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return "sound" not in frames and not isinstance(error, AssertionError)


def kills(system, place):
    """(kill points, states lost)"""
    lost = []
    roots = [place]
    if system.elsewhere:
        roots.append(system.elsewhere)

    def run(action, directory, at, half):
        trace = tracer.Trace(action, roots, at, half)
        return trace.outcome, trace.writing
    points = crash.kill_sweep(place, lambda d: system.save(d, 1), lambda d: system.save(d, 2),
                              lambda d: lost.append(way_back(system, d) not in (1, 2)), run)
    return points, sum(lost)


def power(system, place, most):
    """(crash states, states lost)"""
    work = place / "work"
    work.mkdir(parents=True)

    def saves():
        for step in (1, 2, 3):
            system.save(work, step)
            os.access(f"/returned/{step}", os.F_OK)
    trace = tracer.Trace(saves, [work])
    assert trace.outcome == "done", trace.outcome
    return crash.power_loss(trace.log, work, place / "after", lambda directory: way_back(system, directory), most)


def flips(system, place, count, step):
    """(damages of each file of one save, wrong values believed)"""
    place.mkdir()
    system.save(place, 1)
    assert way_back(system, place) == 1, "not even an undisturbed save comes back"
    tried = believed = 0
    files = [path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for path in sorted({path.stat().st_ino: path for path in files}.values()):                  # links once
        blob = path.read_bytes()
        for _, damaged in crash.damages(blob, random.Random(0), count, step):
            path.write_bytes(damaged)
            tried += 1
            believed += way_back(system, place) == -1
        path.write_bytes(blob)
    return tried, believed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--long", action="store_true", help="every crash state, ten times the damages, 1000 kills in the soak")
    parser.add_argument("--only", default="", help="part of a system's name")
    args = parser.parse_args()
    if not tracer.available():
        sys.exit("bench/crash.py: the system calls of a child cannot be traced here (Linux on x86-64 with ptrace is needed)")
    print("| system | kills | lost | power cuts | lost | damages | believed | s |\n|---|---|---|---|---|---|---|---|")
    for kind in SYSTEMS:
        try:
            system = kind()
        except ImportError as missing:
            print(f"left out: {missing}", file=sys.stderr)
            continue
        if args.only.lower() not in system.name.lower():
            continue
        start, tempfile.tempdir = time.monotonic(), None
        with tempfile.TemporaryDirectory() as temp:
            temp = Path(temp)
            row = (*kills(system, temp / "kill"), *power(system, temp / "power", None if args.long else 1500),
                   *flips(system, temp / "flip", 4000 if args.long else 400, 1 if args.long else 5))
        if system.elsewhere:
            shutil.rmtree(system.elsewhere)
        print(f"| {system.name} | " + " | ".join(map(str, row)) + f" | {time.monotonic() - start:.0f} |", flush=True)
    tempfile.tempdir = None
    with tempfile.TemporaryDirectory() as temp:
        ended, killed = crash.soak(Path(temp), 1000 if args.long else 100)
    print(f"\nsoak: {killed} random kills of a training with Checkpointer, {ended} runs ended, each bit-identical to one "
          "never killed")


if __name__ == "__main__":
    main()
