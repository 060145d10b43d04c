"""What a resume in the middle of an epoch gives back: ours beside the trainers people use.

    pip install -r bench/requirements.txt && python bench/resume.py          about six minutes

Every trainer trains the same small V3 (with dropout) on the same windows for two epochs, saves in mid-epoch (the peers every
5 steps, holdfast by its timer, set to every step), is killed with SIGKILL in the middle of the second epoch, and resumed the
way its documentation says. Repeated and never seen count windows of the second epoch along the line that led to the final
weights: steps up to the checkpoint, then all steps after the resume. The final weights are compared with those of the same
trainer never stopped, bit by bit. CPU, one thread. Trainers that are not installed are left out.

Whole disk lost: after the same kill the folder that the trainer was given is removed, with every
checkpoint in it; then it is started again in the same way. A trainer may have a second place where
it has means of its own for one: ours training.mirror; Lightning a second ModelCheckpoint with
another dirpath (a row of its own: its documentation has several callbacks for several rhythms, two
of the same settings are refused, and ckpt_path is pointed at the second file by hand). Accelerate
writes to the folder of the call, transformers to output_dir and, with a network, to its Hub; that a
loop could call a save twice is no means of the trainer.

Standstill: one step sleeps in C for good, and is watched for STAND seconds. Ours has
training.hang_minutes. Lightning gets max_time, which it looks at between batches; Accelerate and
transformers have time limits only for what waits for other processes (InitProcessGroupKwargs,
ddp_timeout), and there are none here.
"""
import argparse
import contextlib
import ctypes
import importlib.metadata
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import torch                                                # noqa: E402
import torch.nn.functional as F                             # noqa: E402
import yaml                                                 # noqa: E402

import checkpoint                                           # noqa: E402
from eeg import corpora                                              # noqa: E402
import data                                                 # noqa: E402
import model as v3                                          # noqa: E402
from eeg import synth                                                # noqa: E402
import train                                                # noqa: E402

BATCH, EPOCHS, SAVE_EVERY = 4, 2, 5             # windows, epochs, steps between the peers' checkpoints
SEED, RATE, SECONDS = 1, 1e-3, 10.0             # of everything, of AdamW, of a window
STAND_AT, STAND = 8, 90.0                       # the step that sleeps, seconds for which it is watched


class Log:
    """Windows of every step, one JSON line each, in the file before the kill comes."""

    def __init__(self, outside, kill_at, stands):
        self.path = outside / f"seen{len(list(outside.glob('seen*')))}.jsonl"
        self.kill_at, self.stands = kill_at, stands

    def step(self, step, epoch, ids):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, "ids": [int(i) for i in ids]}) + "\n")
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


# ---- the common task ----

def windows(corpus):
    recordings = data.open_corpus(corpus)
    return data.Windows(data.split_patients(recordings, dev_fraction=0.3, seed=SEED)[0], SECONDS, SECONDS)


class Eeg(torch.utils.data.Dataset):
    """Every training window of `corpus`, read once."""

    def __init__(self, corpus):
        part = windows(corpus)
        feed = data.Loader(part).batches([[i] for i in range(len(part))], 1)
        self.items = [{"x": x[0], "y": y[0], "mask": mask[0], "id": i} for i, (x, y, mask) in enumerate(feed)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Detector(torch.nn.Module):
    """The small V3 and its loss; remembers which windows it was given."""

    def __init__(self):
        super().__init__()
        self.net, self.ids = v3.V3(19, **v3.SMALL), []

    def forward(self, x, y, mask, id):
        self.ids = id.tolist()
        loss = F.binary_cross_entropy_with_logits(self.net(x), y, reduction="none")
        return {"loss": (loss * mask).sum() / mask.sum()}


def prepared(corpus):
    """(detector, optimizer, shuffling loader) as any of them would build it."""
    torch.manual_seed(SEED)
    detector = Detector()
    loader = torch.utils.data.DataLoader(Eeg(corpus), BATCH, shuffle=True)
    return detector, torch.optim.AdamW(detector.parameters(), lr=RATE), loader


def stand_still(outside):
    """Have the forward pass of training step STAND_AT sleep in C for good; says so in a file."""
    forward, steps = v3.V3.forward, []

    def standing(self, x):
        steps.extend([1] if self.training else [])
        if len(steps) == STAND_AT:
            (outside / "standing").touch()
            ctypes.CDLL(None).sleep(100_000)
        return forward(self, x)
    v3.V3.forward = standing


def finish(place, net):
    torch.save(net.state_dict(), place.parent / "final.pt")


# ---- trainers: train in `place`, or continue what stands there; `place.parent / "second"` is
# another disk, for those that have a use for it ----

def ours(corpus, place, log):
    """holdfast"""
    second = place.parent / "second"
    config = {"experiment": {"name": "t", "seed": SEED, "results": str(place)},
              "data": {"path": str(corpus), "window_seconds": SECONDS, "stride_seconds": SECONDS, "dev_fraction": 0.3,
                       "balanced": False, "buffers": 2}, "model": v3.SMALL,
              "training": {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": RATE, "best_metric": "auroc", "device": "cpu",
                           "mid_epoch_minutes": 0.0, "mirror": str(second), "hang_minutes": 0.25},
              "evaluation": {"window_seconds": 60.0}}
    path = place.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    after_step = train.Trainer.after_step

    def logged(self, batch, *results):
        log.step(self.step + 1, self.epoch - 1, batch)
        after_step(self, batch, *results)
    train.Trainer.after_step = logged
    if train.run(train.load_config(path), resume="true"):
        sys.exit("holdfast did not finish")
    torch.save(checkpoint.load(place / "t/checkpoints/last.pt")["model"], place.parent / "final.pt")


def loop(corpus, place, log, skip=False):
    """torch loop, last.pt with the epoch"""
    detector, optimizer, loader = prepared(corpus)
    step, start, done, last = 0, 0, 0, place / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        detector.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        step, start, done = state["step"], state["epoch"], state["batch"]
    for epoch in range(start, EPOCHS):
        for number, batch in enumerate(loader, 1):
            if skip and epoch == start and number <= done:
                continue
            optimizer.zero_grad()
            detector(**batch)["loss"].backward()
            optimizer.step()
            step += 1
            if step % SAVE_EVERY == 0:
                torch.save({"model": detector.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                            "epoch": epoch, "batch": number}, last)
            log.step(step, epoch, detector.ids)
    finish(place, detector)


def loop_skipping(corpus, place, log):
    """torch loop, last.pt with epoch and batch, trained batches skipped"""
    loop(corpus, place, log, skip=True)


def lightning(corpus, place, log, kind=torch.utils.data.DataLoader, second=None):
    """Lightning {lightning}"""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.detector = Detector()

        def training_step(self, batch, number):
            return self.detector(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=RATE)

        def on_train_batch_end(self, *arguments):
            log.step(self.global_step, self.current_epoch, self.detector.ids)

    lightning.seed_everything(SEED, verbose=False)
    module, loader = Module(), kind(Eeg(corpus), BATCH, shuffle=True)
    saves = [ModelCheckpoint(place, every_n_train_steps=SAVE_EVERY, save_last=True)]
    if second:                  # without a monitor `mode` means nothing, but callbacks must differ
        saves.append(ModelCheckpoint(second, every_n_train_steps=SAVE_EVERY, save_last=True, mode="max"))
    limit = {"seconds": STAND / 2} if log.stands else None
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=saves, logger=False, max_time=limit,
                                enable_progress_bar=False, enable_model_summary=False)
    found = [p / "last.ckpt" for p in (place, second) if p and (p / "last.ckpt").exists()]
    trainer.fit(module, loader, ckpt_path=found[0] if found else None)
    finish(place, module)


def lightning_stateful(corpus, place, log):
    """Lightning {lightning}, StatefulDataLoader of torchdata {torchdata}"""
    from torchdata.stateful_dataloader import StatefulDataLoader
    lightning(corpus, place, log, StatefulDataLoader)


def lightning_second(corpus, place, log):
    """Lightning {lightning}, StatefulDataLoader of torchdata {torchdata}, second ModelCheckpoint"""
    from torchdata.stateful_dataloader import StatefulDataLoader
    lightning(corpus, place, log, StatefulDataLoader, place.parent / "second")


def accelerate(corpus, place, log, **options):
    """Accelerate {accelerate}, skip_first_batches"""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import set_seed
    set_seed(SEED)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    detector, optimizer, loader = accelerator.prepare(*prepared(corpus))
    saved = sorted(int(p.name.removeprefix("step_")) for p in place.glob("step_*"))
    step = saved[-1] if saved else 0
    start, done = divmod(step, len(loader))
    if saved:
        accelerator.load_state(str(place / f"step_{step}"))
    for epoch in range(start, EPOCHS):
        loader.set_epoch(epoch)
        skipping = saved and epoch == start and not options.get("use_stateful_dataloader")
        for batch in accelerator.skip_first_batches(loader, done) if skipping else loader:
            optimizer.zero_grad()
            accelerator.backward(detector(**batch)["loss"])
            optimizer.step()
            step += 1
            if step % SAVE_EVERY == 0:
                accelerator.save_state(str(place / f"step_{step}"))
            log.step(step, epoch, detector.ids)
    finish(place, detector)


def accelerate_seedable(corpus, place, log):
    """Accelerate {accelerate}, seedable sampler, skip_first_batches"""
    accelerate(corpus, place, log, use_seedable_sampler=True)


def accelerate_stateful(corpus, place, log):
    """Accelerate {accelerate}, StatefulDataLoader of torchdata {torchdata}"""
    accelerate(corpus, place, log, use_stateful_dataloader=True)


def transformers(corpus, place, log):
    """transformers {transformers} Trainer"""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    torch.manual_seed(SEED)
    detector = Detector()

    class Rows(TrainerCallback):
        def on_step_end(self, arguments, state, control, **rest):
            log.step(state.global_step, (state.global_step - 1) // (state.max_steps // EPOCHS), detector.ids)

    arguments = TrainingArguments(str(place), use_cpu=True, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH,
                                  learning_rate=RATE, save_strategy="steps", save_steps=SAVE_EVERY, seed=SEED, report_to=[],
                                  remove_unused_columns=False, disable_tqdm=True, logging_strategy="no")
    trainer = Trainer(detector, arguments, train_dataset=Eeg(corpus), callbacks=[Rows()])
    trainer.train(resume_from_checkpoint=any(place.glob("checkpoint-*")))
    finish(place, detector)


TRAINERS = {f.__name__: f for f in (ours, lightning, lightning_stateful, lightning_second, accelerate, accelerate_seedable,
                                    accelerate_stateful, transformers, loop, loop_skipping)}


# ---- cut, resume, compare: everything of one training lies in `outside`, its disk is a folder in there ----

def launch(name, corpus, outside, *flags):
    """A process that trains; flags: --kill N, the step in which it kills itself, or --stand."""
    (outside / "disk").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--trainer", name, "--corpus", str(corpus), "--place", str(outside / "disk")]
    with open(outside / "log.txt", "a") as log:
        return subprocess.Popen([*command, *flags], stdout=log, stderr=log)


def ended(process, expected, outside, seconds):
    """Wait for `process` to end with the code `expected`; stop the bench with its last words where it does not."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        code = f"none within {seconds} s"
    if code != expected:
        sys.exit((outside / "log.txt").read_text()[-2000:] + f"\n{outside.name}: exit code {code}, not {expected}")


def seen(outside, number):
    return [json.loads(line) for line in (outside / f"seen{number}.jsonl").read_text().splitlines()]


def difference(a, b):
    """Largest difference between two state dicts of weights; 0.0 only where every bit is the same."""
    assert a.keys() == b.keys()
    if all(torch.equal(a[k], b[k]) for k in a):
        return 0.0
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def apart(outside, whole):
    """The final weights beside those of the run never stopped, in words."""
    a, b = (torch.load(place / "final.pt", weights_only=True) for place in (whole, outside))
    most = difference(a, b)
    return "equal" if most == 0 else f"differ by up to {most:.1e}"


def resumed_from(outside, number):
    return seen(outside, number)[0]["step"] - 1


def compare(name, corpus, temp, count, seconds):
    """One row but for its last column: step of the kill, step resumed from, repeated, never seen, weights, disk lost."""
    whole, cut, kept = (temp / f"{name}_{what}" for what in ("whole", "cut", "kept"))
    per_epoch = -(-count // BATCH)
    kill_at = next(n for n in range(per_epoch + per_epoch // 2, 2 * per_epoch) if n % SAVE_EVERY == SAVE_EVERY - 2)
    reference = launch(name, corpus, whole)                 # beside the others: two cores
    try:
        ended(launch(name, corpus, cut, "--kill", str(kill_at)), -signal.SIGKILL, cut, seconds)
        shutil.copytree(cut, kept, symlinks=True)
        ended(launch(name, corpus, cut), 0, cut, seconds)
        ended(reference, 0, whole, seconds)
        row = [kill_at, *windows_again(cut, count), apart(cut, whole)]
        # the same kill once more, at the same paths, and now the disk is gone
        shutil.rmtree(cut)
        kept.rename(cut)
        shutil.rmtree(cut / "disk")
        ended(launch(name, corpus, cut), 0, cut, seconds)
    finally:
        reference.kill()
    step = resumed_from(cut, 1)
    found = f"goes on from step {step}" if step else "starts again at step 0"
    return [*row, f"{found}, end {apart(cut, whole)}"]


def windows_again(cut, count):
    """Step resumed from, windows of the second epoch repeated, and never seen."""
    before, after = seen(cut, 0), seen(cut, 1)
    resumed = resumed_from(cut, 1)
    line = [row for row in before if row["step"] <= resumed] + after
    times = Counter(i for row in line if row["epoch"] == EPOCHS - 1 for i in row["ids"])
    return resumed, sum(n > 1 for n in times.values()), count - len(times)


class Standing:
    """A training whose step STAND_AT sleeps, beside the others: it needs no core."""

    def __init__(self, name, corpus, temp, seconds):
        self.name, self.corpus, self.seconds = name, corpus, seconds
        self.whole, self.outside = temp / f"{name}_whole", temp / f"{name}_stands"
        self.process = launch(name, corpus, self.outside, "--stand")
        limit, mark = time.monotonic() + seconds, self.outside / "standing"
        while not mark.exists() and self.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        if not mark.exists():
            self.process.kill()
            sys.exit((self.outside / "log.txt").read_text()[-2000:] + f"\n{name} never came to step {STAND_AT}")
        self.since = time.monotonic()

    def outcome(self):
        """What became of it, in words, STAND seconds after it began at the latest."""
        try:
            code = self.process.wait(max(0.0, self.since + STAND - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"stands after {STAND:.0f} s"
        stacks = self.outside / "disk/t/hang.txt"
        text = f"ended with exit code {code}"
        if stacks.exists() and "in standing" in stacks.read_text():
            began = (self.outside / "standing").stat().st_mtime
            text += f" after {stacks.stat().st_mtime - began:.0f} s, stacks written"
        ended(launch(self.name, self.corpus, self.outside), 0, self.outside, self.seconds)
        return f"{text}, goes on from step {resumed_from(self.outside, 1)}, end {apart(self.outside, self.whole)}"


def installed(title):
    """`title` with the version of the package it names, or None where that is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return title.format(**{n: importlib.metadata.version(n) for n in re.findall(r"{(\w+)}", title)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="trainers whose name contains this")
    parser.add_argument("--seconds", type=int, default=120, help="most that one training may take")
    for flag in ("--trainer", "--corpus", "--place"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--kill", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--stand", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        place = Path(args.place)
        if args.stand:
            stand_still(place.parent)
        return TRAINERS[args.trainer](Path(args.corpus), place, Log(place.parent, args.kill, args.stand))
    chosen = {name: installed(trainer.__doc__) for name, trainer in TRAINERS.items() if args.only in name}
    with tempfile.TemporaryDirectory() as temp:
        rows = measured([name for name, title in chosen.items() if title], Path(temp), args.seconds)
    for name, row in rows.items():
        print(f"| {chosen[name]} |", " | ".join(map(str, row)), "|")
    missing = [name for name, title in chosen.items() if not title]
    if missing:
        print(f"\nleft out, not installed: {', '.join(missing)}")


def measured(names, temp, seconds):
    """{name: its row}, after the head of the table is printed."""
    with contextlib.redirect_stdout(io.StringIO()):
        synth.synth(temp / "edf", hours=0.35, patients=4, seed=3)
        corpora.import_corpus(temp / "edf", temp / "h5", say=lambda line: None)
    corpus, count = temp / "h5", len(windows(temp / "h5"))
    print(f"{count} windows an epoch, {-(-count // BATCH)} steps\n\n| trainer | killed at step | resumed from step | "
          "windows repeated | windows never seen | weights beside the run never stopped | whole disk lost | standstill |\n"
          + "|---" * 8 + "|", flush=True)
    rows, standing = {}, []
    try:
        for name in names:
            standing.append(Standing(name, corpus, temp, seconds))
            rows[name] = compare(name, corpus, temp, count, seconds)
            print(name, *rows[name], file=sys.stderr, sep=", ", flush=True)
        for stander in standing:
            rows[stander.name].append(stander.outcome())
    finally:
        for stander in standing:
            stander.process.kill()
    return rows


if __name__ == "__main__":
    main()
