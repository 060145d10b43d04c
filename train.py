"""Train the V3 seizure detector and never lose work: every stop, planned or not, is a place to
resume from.

    python train.py --config configs/local/smoke.yaml --resume      two CPU minutes, own recordings
    python train.py --config configs/local/train.yaml --resume      the real thing; again after any
                                                                    interruption
    torchrun --nproc_per_node=8 train.py --config configs/local/train.yaml --resume

--resume takes the furthest good checkpoint, or starts fresh and says so; --resume FILE goes back to
FILE and makes it the line that later resumes follow; --fresh moves the old run aside. Exit codes: 0
finished, 2 refused, 75 time limit reached and saved, 128+N stopped by signal N and saved, 1
anything else. Every key of a configuration stands at the end of this help.
"""
import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import corpora
import data
import edf
import evaluate
import model
import synth
from config import Refused, compare, describe, load as load_config

MAX_NONFINITE = 50                      # steps in a row


# ---- the loop ----

class Diverged(Exception):
    """MAX_NONFINITE losses in a row were not finite."""


class Stopped(Exception):
    """A signal or the time limit, met where only a save can follow."""


def focal_loss(logits, target, mask, alpha, gamma):
    """Sum over real samples of alpha_t (1 - p_t)^gamma cross-entropy, in fp32 (Lin et al., ICCV 2017). All (B, T)."""
    logits = logits.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = torch.sigmoid(torch.where(target > 0.5, -logits, logits))     # 1 - p_t
    weight = torch.where(target > 0.5, alpha, 1 - alpha)
    return (weight * missed.pow(gamma) * entropy * mask).sum()


def make_optimizer(model, settings, fused):
    """AdamW; matrices decay, norms and biases (and every other vector) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings["weight_decay"]},
              {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], fused=fused)


def lr_factor(step, total, warmup):
    """Linear warmup, then cosine to 0 (Loshchilov & Hutter, ICLR 2017), per optimizer step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """One process of one run: everything that a checkpoint holds, and the loop that moves it on.

    `home`, the run directory with its checkpoints and records, is None but in the main process;
    `deadline` is the time of time.monotonic() at which the run must have stopped."""

    def __init__(self, config, group, split, model, home, signals, deadline, say):
        self.config, self.settings = config, config["training"]
        self.group, self.split, self.home, self.say = group, split, home, say
        self.signals, self.deadline = signals, deadline
        self._build(model)

        # where the run stands: all of it goes into every checkpoint
        self.epoch = 1                  # in progress, from 1
        self.batch = 0                  # batches trained in it,
        self.windows_done = 0           # and windows
        self.step = 0                   # batches trained in all
        self.running = dict.fromkeys(("loss", "norm", "steps"), 0.0)        # since the last row
        self.skipped = 0                # steps whose loss was not finite, in all
        self.nonfinite = 0              # and in a row
        self.stopping = self._no_best()
        self.scores = {}                # validation in progress: recording -> its counts
        self.summary = {}               # all metrics of the last finished validation

        self.batches = split.batches    # of this epoch
        self.slowest = 0.0              # seconds of the slowest step so far
        self.saved_at = None            # (step, recordings scored) of the last snapshot

    def _build(self, model):
        s, device = self.settings, self.group.device
        self.model = model
        self.net = torch.compile(model) if s["compile"] else model
        if self.group.size > 1:
            # the random states are those of a single process once it is built
            rng = rng_state(torch.device("cpu"))
            torch.manual_seed(self.config["experiment"]["seed"])
            self.net = self._data_parallel()
            set_rng_state(rng, torch.device("cpu"))
        self.optimizer = make_optimizer(model, s, device.type == "cuda")
        total = s["epochs"] * self.split.batches
        warmup = int(s["warmup_ratio"] * total)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, total, warmup))
        self.scaler = torch.amp.GradScaler(device.type, enabled=s["precision"] == "fp16")
        c = self.config["data"]
        self.loader = data.Loader(self.split.windows, device, self.config["experiment"]["seed"],
                                  c["augment"], c["buffers"], c["readers"])
        self.waits = False              # whether the advice on slow reading was given
        self.ahead = iter(())           # windows of the recordings that are validated

    def _data_parallel(self):
        """The model over all processes, after one idle backward pass: DDP orders its buckets anew
        after its first, and the sums of three or more processes round by that order. So a resumed
        run has the whole run's order from its first step."""
        device = self.group.device
        pieces = self.settings["accumulate"] * self.group.size
        share = math.ceil(self.settings["batch_size"] / pieces)
        devices = [device] if device.type == "cuda" else None
        net = torch.nn.parallel.DistributedDataParallel(self.net, devices, broadcast_buffers=False)
        x = torch.randn(share, len(self.split.channels), self.split.windows.length, device=device)
        with autocast(self.settings["precision"], device):
            logits = net(x)
        logits.float().sum().backward()
        net.zero_grad()
        return net

    def fit(self):
        """Train to the end. True where a signal or the time limit came before it."""
        if self.finished():
            self.say("this run is finished: raise training.epochs or training.patience to go on")
            return False
        try:
            while not self.finished():
                self.train_epoch()
                summary = self.validate()
                self.end_epoch(summary)
            return False
        except Stopped:
            return True
        except edf.DataError:
            # a recording cannot be read: nothing since the last boundary has happened yet. Among
            # others a save needs them all, and they wait elsewhere: there the last one counts
            if self.group.size == 1:
                self.save_mid()
            raise

    def finished(self):
        """No epoch is left, or, at the end of one, patience is."""
        return self.epoch > self.settings["epochs"] or (self.batch == 0 and self.out_of_patience())

    # -- training --

    def train_epoch(self):
        plan = list(self.plan())
        self.batches = self.batch + len(plan)
        wanted = [ids for _, pieces in plan for ids, _ in pieces]
        feed = self.loader.batches(wanted, self.epoch)
        self.bar = self.progress(self.batches, f"epoch {self.epoch}", "batch", self.batch)
        self.net.train()
        with contextlib.closing(feed), self.bar:
            for batch, pieces in plan:
                began = time.monotonic()
                loss, norm = self.train_step(batch, pieces, feed)
                self.after_step(batch, loss, norm, time.monotonic() - began)

    def plan(self):
        """The batches still to train in this epoch: each with this process's pieces of it, as
        [(window ids, weight)].

        A process with no window left in a piece still takes part in the exchange of gradients, at
        weight 0."""
        size, group = self.settings["batch_size"], self.group
        pieces = self.settings["accumulate"] * group.size
        order = self.split.order(self.epoch)
        for start in range(self.windows_done, len(order), size):
            batch = order[start:start + size]
            shares = np.array_split(batch, pieces)[group.rank::group.size]
            if group.size == 1:
                yield batch, [(ids, 1.0) for ids in shares if len(ids)]
            else:
                yield batch, [(ids, 1.0) if len(ids) else (batch[:1], 0.0) for ids in shares]

    def train_step(self, batch, pieces, feed):
        """Gradients of one batch; returns this process's share of the mean loss, and the norm."""
        s = self.settings
        total = float(self.split.samples[batch].sum())
        loss = 0.0
        # all of the batch first: what cannot be read is known before the step begins
        windows = [next(feed) for _ in pieces]
        self.optimizer.zero_grad(set_to_none=True)
        for number, (_, weight) in enumerate(pieces, 1):
            x, y, mask = windows.pop(0)
            # gradients travel between the processes once a batch, with its last piece
            travel = number == len(pieces) or self.group.size == 1
            with contextlib.nullcontext() if travel else self.net.no_sync():
                with autocast(s["precision"], self.group.device):
                    logits = self.net(x)
                part = focal_loss(logits, y, mask * weight, s["focal_alpha"], s["focal_gamma"])
                share = part / total
                # DDP averages gradients; our loss is a sum of shares
                self.scaler.scale(share * self.group.size).backward()
            loss = loss + share.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s["grad_clip"])
        return loss.item(), norm.item()

    def after_step(self, batch, loss, norm, seconds):
        """Apply the step if loss and gradients are finite, count, log, let the boundary act."""
        loss = self.group.sum([loss])[0]
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.scaler.step(self.optimizer)
            self.scheduler.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.batch += 1
        self.step += 1
        self.windows_done += len(batch)
        self.bar.update()
        if finite:
            self.nonfinite = 0
            self.running["loss"] += loss
            self.running["norm"] += norm
            self.running["steps"] += 1
        else:
            self.skip(loss, norm)
        if self.step % self.settings["log_every"] == 0 or self.batch == self.batches:
            self.log(seconds)
        self.slowest = max(self.slowest, seconds)
        self.boundary()

    def skip(self, loss, norm):
        self.skipped += 1
        self.nonfinite += 1
        self.say(f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}: optimizer and "
                 f"schedule skipped ({self.nonfinite} in a row, {self.skipped} in all)")
        if self.nonfinite >= MAX_NONFINITE:
            raise Diverged

    def log(self, seconds):
        """One row of metrics.jsonl with the means since the last one, and its line."""
        steps = max(1.0, self.running["steps"])
        loss = self.running["loss"] / steps
        norm = self.running["norm"] / steps
        rate = self.optimizer.param_groups[0]["lr"]
        self.running = dict.fromkeys(self.running, 0.0)
        if not self.group.main:
            return
        waited = self.loader.waited
        share = self.loader.share()
        self.home.record.write(
            kind="train", epoch=self.epoch, batch=self.batch, batches=self.batches,
            step=self.step, loss=loss, lr=rate, grad_norm=norm, skipped=self.skipped,
            seconds=seconds, waited=waited, time=time.time())
        self.bar.set_postfix(loss=f"{loss:.4f}")
        if self.bar.disable:
            left = (self.batches - self.batch) * seconds / 60
            self.say(f"epoch {self.epoch}/{self.settings['epochs']} "
                     f"batch {self.batch}/{self.batches} step {self.step} loss {loss:.4f} "
                     f"lr {rate:.2e} norm {norm:.3f} skipped {self.skipped} {seconds:.2f} s/step, "
                     f"waited {100 * share:.0f} % for data, {left:.0f} min left")
        if share > data.SLOW and not self.waits:
            self.waits = True
            self.say(self.loader.advice(share))

    def progress(self, total, title, unit, done=0):
        """A bar on the main process's terminal; where there is none, lines are printed instead."""
        hidden = not (self.group.main and sys.stderr.isatty())
        return tqdm(total=total, initial=done, desc=title, unit=unit, disable=hidden)

    # -- validation --

    def validate(self):
        """Whole recordings, one per process at a time; a resume goes on with the next. Returns the
        summary of all metrics."""
        self.save_mid()                 # training of this epoch is safe from here on
        if self.group.main:
            self.home.saver.check()
        size, dev = self.group.size, self.split.dev
        todo = [r for r in dev if r.name not in self.scores]
        self.ahead = evaluate.read_ahead(todo[self.group.rank::size], self.config["evaluation"])
        bar = self.progress(len(dev), "validation", "recording", len(self.scores))
        said = time.monotonic()
        with bar, contextlib.closing(self.ahead):
            for first in range(0, len(todo), size):
                began = time.monotonic()
                turn = todo[first:first + size]
                mine = None
                if self.group.rank < len(turn):
                    mine = self.score(turn[self.group.rank])
                for recording, score in zip(turn, self.group.gather(mine)):
                    self.scores[recording.name] = score
                bar.update(len(turn))
                if bar.disable and time.monotonic() - said > 30:
                    said = time.monotonic()
                    self.say(f"validation: {len(self.scores)} of {len(dev)} recordings")
                if size > 1:            # poll cannot stop one process alone
                    self.slowest = max(self.slowest, time.monotonic() - began)
                self.boundary()
        return evaluate.summarise(list(self.scores.values()), self.config["evaluation"])

    def score(self, recording):
        c = self.config["evaluation"]
        probability = evaluate.predict(self.model, recording, self.group.device, c,
                                       self.settings["precision"], self.poll, self.ahead)
        return evaluate.score(recording, probability, c)

    def poll(self):
        """Inside a recording: alone, stop at once (the recording is done anew); among others, at
        the next boundary."""
        if self.group.size == 1 and (self.signals.number or self.late()):
            self.save_mid()
            raise Stopped

    def end_epoch(self, summary):
        """Metric, early stopping and checkpoints of the finished epoch; then the next one begins."""
        name = self.settings["best_metric"]
        value = float(summary[name])
        improved = checkpoint.better(value, self.stopping["value"], evaluate.METRICS[name])
        if improved:
            self.stopping = {"metric": name, "value": value, "epoch": self.epoch, "waited": 0}
        else:
            self.stopping["waited"] += 1
        self.summary, self.scores = summary, {}
        if self.group.main:
            self.home.record.write(kind="validation", epoch=self.epoch, step=self.step,
                                   best=improved, time=time.time(), **summary)
        state = self.pack()
        if self.group.main:
            self.home.record.flush()
            self.home.saver.save_epoch(state, value, name)
        shown = "not computable" if math.isnan(value) else f"{value:.4f}"
        rank = "the best so far"
        if not improved:
            rank = f"the best is that of epoch {self.stopping['epoch']}"
        self.say(f"epoch {self.epoch}/{self.settings['epochs']}: {name} {shown}, {rank}")
        self.epoch += 1
        self.batch = 0
        self.windows_done = 0
        self.saved_at = (self.step, 0)

    def _no_best(self):
        return {"metric": self.settings["best_metric"], "value": None, "epoch": 0, "waited": 0}

    def out_of_patience(self):
        patience, waited = self.settings["patience"], self.stopping["waited"]
        if not patience or waited < patience:
            return False
        self.say(f"early stop: {waited} epochs without improvement (training.patience {patience})")
        return True

    # -- saving and stopping --

    def boundary(self):
        """After a step or a validated recording: snapshot when due, stop when asked to.

        One all-reduce carries any process's signal and the main process's timer, so that all act
        at the same step."""
        due = self.group.main and self.home.saver.due()
        signalled = self.signals.number > 0
        signalled, late, due = self.group.sum([signalled, self.late(), due])
        if signalled:
            self.signals.number = max(self.group.gather(self.signals.number))
        if signalled or late or due:
            self.save_mid()
        if signalled or late:
            raise Stopped

    def late(self):
        return time.monotonic() > self.deadline - 2 * self.slowest

    def save_mid(self):
        here = (self.step, len(self.scores))
        if self.saved_at == here:       # never twice for one state
            return
        state = self.pack()
        if self.group.main:
            self.home.record.flush()
            self.home.saver.save_mid(state)
        self.saved_at = here

    def pack(self):
        """Everything that the next step depends on. Collective: every process calls it, the main
        one gets the dict."""
        split = self.split
        seed = self.config["experiment"]["seed"]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch, "batch": self.batch, "global_step": self.step,
            "rng": self.group.gather(rng_state(self.group.device)),
            "sampler": {"seed": seed, "epoch": self.epoch, "windows": self.windows_done},
            "running": dict(self.running), "skipped": self.skipped, "nonfinite": self.nonfinite,
            "stopping": dict(self.stopping),
            "validation": dict(self.scores), "scores": dict(self.summary),
            "config": self.config, "data": split.fingerprint, "machine": self.machine(),
            "montage": split.montage, "channels": list(split.channels)}

    def machine(self):
        return {"device": device_name(self.group.device), "processes": self.group.size,
                "torch": str(torch.__version__), "threads": torch.get_num_threads(),
                "precision": self.settings["precision"], "compile": self.settings["compile"]}

    def unpack(self, state, position):
        """Continue exactly where `state` was taken, at `position`: (epoch, batches trained in it).
        Says what may differ from then on."""
        self.model.load_state_dict(state["model"])
        self._unpack_optimizer(state)
        self.epoch, self.batch = position
        self.step = state["global_step"]
        self.running = dict(state["running"])
        self.skipped, self.nonfinite = state["skipped"], state["nonfinite"]
        self.stopping, self.summary = dict(state["stopping"]), dict(state["scores"])
        if self.batch:                  # else the state ends an epoch, and the next one begins
            self.windows_done = state["sampler"]["windows"]
            self.scores = dict(state["validation"])
        if self.scores and state["config"]["evaluation"] != self.config["evaluation"]:
            self.say(f"resume: evaluation settings changed: the {len(self.scores)} recordings "
                     f"validated so far are scored anew")
            self.scores = {}
        if self.stopping["metric"] != self.settings["best_metric"]:
            self.say(f"resume: best_metric was {self.stopping['metric']}: "
                     f"best starts anew with {self.settings['best_metric']}")
            self.stopping = self._no_best()
        for key, now in self.machine().items():
            was = state["machine"].get(key)
            if was != now:
                self.say(f"resume: {key} {was} -> {now}: same data order and state; "
                         f"rounding may differ, not bit-exact")
        if self.group.rank < len(state["rng"]):
            # last: building drew random numbers
            set_rng_state(state["rng"][self.group.rank], self.group.device)
        else:
            self.say(f"resume: no random state of process {self.group.rank} in the checkpoint: "
                     f"seeded anew", every=True)
        self.say(f"resumed: epoch {self.epoch}, {self.batch} batches trained in it, "
                 f"step {self.step}")

    def _unpack_optimizer(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # settings that changed since then count from here on, not those of the checkpoint
        rate, groups = self.settings["learning_rate"], self.optimizer.param_groups
        factor = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        for group in groups:
            group["initial_lr"] = rate
            group["lr"] = rate * factor
        groups[0]["weight_decay"] = self.settings["weight_decay"]
        self.scheduler.base_lrs = [rate] * len(groups)
        if not self.scaler.is_enabled():
            return
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        else:
            self.say("resume: the checkpoint has no gradient scale: starting from the default")

    def hold_line(self):
        """A snapshot of what a file just gave: whatever happens now, resumes follow its line."""
        self.save_mid()
        if self.group.main:
            self.home.saver.wait()


def autocast(precision, device):
    if precision == "fp32":
        return contextlib.nullcontext()
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, kind)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu"


# ---- what is trained, on what: whatever can be refused is refused here ----

def expect_data(config):
    """Refuse a configuration whose recordings are neither there nor to be made: the first thing
    that a newcomer lacks."""
    c = config["data"]
    if not c["path"]:
        raise Refused("data.path is not set: the folder that data.py import wrote")
    if not Path(c["path"]).is_dir() and not c["synth_hours"]:
        raise Refused(f"data.path {c['path']} does not exist: "
                      f"python data.py import CORPUS_FOLDER {c['path']}")
    if c["copy_to"] and os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        raise Refused("data.copy_to serves one machine, and this run has several: copy the corpus "
                      "on each, and name the copy as data.path")


def open_recordings(config, say):
    """Recordings at data.path; synthetic ones are made there first where the config asks for them,
    and only then."""
    path = Path(config["data"]["path"])
    try:
        if config["data"]["synth_hours"] and not path.is_dir():
            make_recordings(config, path, say)
        if config["data"]["copy_to"]:
            path = data.copy_corpus(path, config["data"]["copy_to"], say)
        return data.open_corpus(path)
    except edf.DataError as error:
        raise Refused(f"{path}: {error}") from None
    except OSError as error:
        raise Refused(f"{error.filename or path}: {error.strerror}") from None


def make_recordings(config, path, say):
    """Synthetic EDF files at PATH_edf and their import at PATH; what a kill left half made is made
    anew."""
    c = config["data"]
    source, temp = Path(f"{path}_edf"), Path(f"{path}_edf.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = checkpoint.lock(path.parent)             # of two first runs one makes them
    try:
        if not source.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
            synth.synth(temp, hours=c["synth_hours"], patients=c["synth_patients"],
                       seed=config["experiment"]["seed"])
            os.replace(temp, source)
        say(f"data: {c['synth_hours']} h of synthetic recordings in {source}, "
            f"importing them to {path}")
        corpora.import_corpus(source, f"{path}.part")
        os.replace(f"{path}.part", path)
    finally:
        held.close()


class Split:
    """Who trains and who validates, the windows of the former, and their order in every epoch."""

    def __init__(self, config, recordings, say):
        self.seed, self.c = config["experiment"]["seed"], config["data"]
        c = self.c
        try:
            self.train, self.dev = data.split_patients(recordings, c["dev_patients"],
                                                       c["dev_fraction"], self.seed)
            self.windows = data.Windows(self.train, c["window_seconds"], c["stride_seconds"])
            first = self.order(1)
            evaluate.check_metric(config["training"]["best_metric"], self.dev)
        except (edf.DataError, ValueError) as error:
            raise Refused(f"{c['path']}: {error}") from None
        self.fingerprint = data.fingerprint(self.train + self.dev)
        self.channels, self.montage = self.train[0].channels, self.train[0].montage
        self.batches = math.ceil(len(first) / config["training"]["batch_size"])

        # real samples of each window: those of a short recording end before the window does
        lengths = np.array([r.samples for r in self.train])[self.windows.recording]
        self.samples = np.minimum(lengths - self.windows.start, self.windows.length)

        for name, part in (("train", self.train), ("validation", self.dev)):
            patients = {r.patient for r in part}
            hours = sum(r.seconds for r in part) / 3600
            seizures = sum(len(r.events) for r in part)
            say(f"{name}: {len(part)} recordings of {len(patients)} patients, {hours:.2f} h, "
                f"{seizures} seizures")
        say(f"epoch: {len(first)} of {len(self.windows)} windows in {self.batches} batches")

    def order(self, epoch):
        """Window ids of `epoch` in the order of training: a pure function of (seed, epoch)."""
        background = self.c["background_per_partial"] if self.c["balanced"] else None
        return self.windows.epoch(self.seed, epoch, self.c["full_per_partial"], background)


def build_model(config, split, group, say):
    """The detector on this process's device, with the same weights in every process."""
    rng = rng_state(torch.device("cpu"))
    torch.manual_seed(config["experiment"]["seed"])
    try:
        net = model.build(len(split.channels), config["model"]).to(group.device)
    except ValueError as error:
        raise Refused(str(error)) from None
    set_rng_state(rng, torch.device("cpu"))
    count = sum(p.numel() for p in net.parameters())
    line = (f"model: V3, {count:,} parameters, {config['training']['precision']} "
            f"on {device_name(group.device)}")
    if group.size > 1:
        line += f", {group.size} processes"
    say(line)
    return net


# ---- the run directory: taken, a state found in it, its records cut back to that state ----

class Home:
    """results/<name> in the hands of the main process, from taking it to giving it up.

    `saver` holds its lock; `state` is what to continue from (None: start at the beginning), at
    `position`; `record` stands at that state. Raises Refused."""

    def __init__(self, config, fingerprint, resume, fresh, hook, say):
        self.config, self.fingerprint, self.hook, self.say = config, fingerprint, hook, say
        self.directory = Path(config["experiment"]["results"], config["experiment"]["name"])
        self.checkpoints = self.directory / "checkpoints"
        if resume == "false" and not fresh and holds_checkpoints(self.checkpoints):
            raise Refused(f"{self.checkpoints} already holds checkpoints: "
                          f"--resume continues that run, --fresh moves it aside")
        try:
            if resume in ("true", "false"):
                self.saver, self.state = self._take(resume, fresh)
            else:
                self.saver, self.state = self._take_with(resume)
        except (checkpoint.CorruptCheckpoint, checkpoint.InUse, ValueError) as error:
            raise Refused(str(getattr(error, "strerror", None) or error)) from None
        except OSError as error:
            raise Refused(f"{error.filename or self.directory}: {error.strerror}") from None
        self.position = self.saver.position
        try:
            self.record = self._cut_records()
        except OSError as error:
            self.saver.close()
            raise Refused(f"{self.directory}: {error.strerror}") from None
        self.saver.before_save = self.record.sync
        self.saver.on_saved = self.saved

    def _take(self, resume, fresh):
        """The directory as it stands, moved aside where it must not be overwritten."""
        if fresh:
            move_aside(self.directory, self.say)
        saver = self._open_saver()
        try:
            state = saver.resume() if resume == "true" else None
            if state:
                self._check(state, "the checkpoint")
                return saver, state
        except BaseException:
            saver.close()
            raise
        if holds_checkpoints(self.checkpoints):     # all damaged: nothing may be overwritten
            saver.close()
            move_aside(self.directory, self.say)
            saver = self._open_saver()
        return saver, None

    def _take_with(self, path):
        """The directory, continued from the checkpoint `path` instead of its own newest."""
        state = checkpoint.load(path)
        self._check(state, path)
        saver = self._open_saver()
        saver.adopt(state, path)
        self.say(f"resume: {path} as asked; later resumes follow this line")
        return saver, state

    def _open_saver(self):
        s = self.config["training"]
        return checkpoint.Checkpointer(
            self.checkpoints, s["mid_epoch_minutes"], s["mid_epoch_keep"],
            s["checkpoint_interval"], s["checkpoint_keep"], evaluate.METRICS[s["best_metric"]],
            say=self.say)

    def _check(self, state, where):
        """Refuse a state that is not one of this run: not of training, of other config or data."""
        needed = ("model", "optimizer", "rng", "sampler", "config", "data")
        missing = [key for key in needed if key not in state]
        if missing:
            raise Refused(f"{where} is no training checkpoint: it lacks {', '.join(missing)}")
        compare(state["config"], self.config, self.say)
        if state["data"] != self.fingerprint:
            raise Refused("the recordings differ from those of the checkpoint (names, lengths, "
                          "preparation or events): restore them, or start another run with --fresh")

    def _cut_records(self):
        """The effective config and the records, the latter cut back to the resumed step."""
        text = yaml.safe_dump(self.config, sort_keys=False)
        checkpoint.atomic_write(self.directory / "config.yaml", [text.encode()])
        if not self.state:
            return Record(self.directory, 0, True, self.say)
        ended = self.state.get("kind") == "epoch" or not self.state["batch"]
        record = Record(self.directory, self.state["global_step"], ended, self.say)
        record.event("resume", self.saver.resumed, self.state)
        return record

    def saved(self, path):
        """In the writer thread, once a checkpoint is durable."""
        self.record.event("save", path, checkpoint.peek(path), self.saver.blocked)
        if self.hook:
            self.hook(path)

    def close(self):
        try:
            self.saver.close()
        finally:
            self.record.close()


def holds_checkpoints(directory):
    if not directory.is_dir():
        return False
    return any(checkpoint.NAME.fullmatch(n) or n == "best.pt" for n in os.listdir(directory))


def move_aside(run_directory, say):
    number = 1
    while os.path.lexists(f"{run_directory}.{number}"):
        number += 1
    with contextlib.suppress(FileNotFoundError):
        # raises InUse where a process works there
        held = checkpoint.lock(run_directory / "checkpoints")
        try:
            os.rename(run_directory, f"{run_directory}.{number}")
        finally:
            held.close()
        say(f"moved the old run aside: {run_directory} -> {run_directory}.{number}")


@contextlib.contextmanager
def tolerated(say, what, consequence=""):
    """A disk that refuses `what` is said and survived: checkpoints come first."""
    try:
        yield
    except OSError as error:
        line = f"{what}: {error.strerror}"
        if consequence:
            line += f": {consequence}"
        say(line)


class Record:
    """metrics.jsonl, saves.jsonl and TensorBoard of one run directory. metrics.jsonl is the truth:
    a resume cuts it back to the resumed step and writes TensorBoard anew from it, so no step stands
    twice in either.

    step        the resumed one; rows beyond it go to metrics.abandoned.jsonl
    complete    the epoch ended with it, so that its validation row stays too"""

    def __init__(self, directory, step, complete, say):
        self.directory, self.path, self.say = directory, directory / "metrics.jsonl", say
        self.pending = []               # lines that a full disk refused
        checkpoint.sweep_temps(directory)
        kept, dropped = [], []
        for row in self._rows():
            before = row["step"] < step
            at = row["step"] == step and (complete or row["kind"] == "train")
            (kept if before or at else dropped).append(row)
        if dropped:                     # trained again, or of a line that --resume FILE left
            with open(directory / "metrics.abandoned.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in dropped)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        checkpoint.atomic_write(self.path, [text.encode()])
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        board = directory / "tensorboard"
        for old in board.glob("events.out.tfevents.*"):
            old.unlink()
        self.board = SummaryWriter(board)
        for row in kept:
            self._chart(row)

    def _rows(self):
        for row in checkpoint.read_json_lines(self.path, self.say):
            try:
                yield {**row, "step": int(row["step"]), "kind": str(row["kind"])}
            except (ValueError, TypeError, KeyError):
                self.say(f"metrics.jsonl: dropped a row that cannot be read: "
                         f"{json.dumps(row)[:60]!r}")

    def write(self, **row):
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None         # JSON knows no NaN
        self.pending.append(json.dumps(row) + "\n")
        self.flush()
        later = "the next start draws it anew from metrics.jsonl"
        with tolerated(self.say, "tensorboard", later):
            self._chart(row)

    def flush(self):
        """Rows to the file, whole lines or nothing: a full disk keeps them here until there is
        room."""
        size = os.fstat(self.file).st_size
        try:
            while self.pending:
                line = self.pending[0].encode()
                rest = line
                while rest:
                    rest = rest[os.write(self.file, rest):]
                size += len(line)
                del self.pending[0]
        except OSError as error:
            os.ftruncate(self.file, size)
            self.say(f"metrics.jsonl: {error.strerror}: {len(self.pending)} rows wait in memory")

    def _chart(self, row):
        axes = ("step", "epoch", "batch", "batches", "time")
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in axes:
                self.board.add_scalar(f"{row['kind']}/{key}", value, row["step"],
                                      walltime=row.get("time"))

    def event(self, kind, path, facts, seconds=0.0):
        """A line of saves.jsonl: where a save or a resume stands."""
        row = {"kind": kind, "file": Path(path).name, "epoch": facts["epoch"],
               "batch": facts["batch"], "step": facts["global_step"], "seconds": seconds,
               "time": time.time()}
        with tolerated(self.say, "saves.jsonl", f"this {kind} is not listed"):
            with open(self.directory / "saves.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def sync(self):
        """On the disk before the checkpoint that counts on it; in the writer thread, an fsync takes
        its time."""
        with tolerated(self.say, "metrics.jsonl", "its last rows may be lost"):
            os.fsync(self.file)

    def close(self):
        self.flush()
        os.close(self.file)
        with tolerated(self.say, "tensorboard"):
            self.board.close()


# ---- the machine: processes, random states, signals, the terminal ----

class Group:
    """This process among the others of a torchrun job, or alone."""

    def __init__(self, device):
        if device == "cuda" and not torch.cuda.is_available():
            raise Refused("training.device is cuda and torch sees no GPU: "
                          "check nvidia-smi and the torch build, or set cpu")
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = torch.device("cpu")
        if device != "cpu" and torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            self._meet()

    def _meet(self):
        # torchrun's static rendezvous keeps one store over its restarts: with a prefix of its own
        # no restart meets the addresses of the dead
        store, rank, size = next(dist.rendezvous("env://"))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore(f"restart {restart}", store),
                                rank=rank, world_size=size)

    def sum(self, values):
        """Element-wise sum of a short list of numbers over the processes, as floats."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """[the value of each process], in every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make):
        """What `make()` returns in the main process, in every process; its Refused too."""
        if self.size == 1:
            return make()
        box = [None, None]
        if self.main:
            try:
                box[0] = make()
            except Refused as refusal:
                box[1] = str(refusal)
        dist.broadcast_object_list(box)
        if box[1]:
            raise Refused(box[1])
        return box[0]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def prepare_torch(config, group):
    """Random states and exactness of this process, set before anything is built."""
    seed = config["experiment"]["seed"] + 1000003 * group.rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config["training"]["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if group.device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def rng_state(device):
    """Random states of this process as plain values and CPU tensors."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest],
             "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Signals:
    """First SIGINT, SIGTERM, SIGHUP or SIGUSR1 sets `number`; a second one acts as if nobody
    listened."""

    WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __enter__(self):
        self.number, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():
            for number in self.WATCHED:
                self.before[number] = signal.signal(number, self._set)
        return self

    def _set(self, number, frame):
        self.number = number
        for watched in self.WATCHED:
            signal.signal(watched, signal.SIG_DFL)
        name = signal.Signals(number).name
        line = f"\n{name}: saving at the next step; once more to exit at once\n"
        with contextlib.suppress(OSError):          # after SIGHUP the terminal may be gone
            os.write(2, line.encode())

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Console:
    """A standard stream that outlives its terminal: after tmux kill-session every write fails, and
    there is still a checkpoint to save."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            return self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Say:
    """Prints one line, above a progress bar where there is one. Only the main process speaks,
    unless every process has something to say."""

    def __init__(self, main):
        self.main, self.lines = main, threading.Lock()

    def __call__(self, line, every=False):
        if self.main or every:
            with self.lines:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()


# ---- one run, from the command line to the exit code ----

def run(config, resume="false", fresh=False, on_saved=None):
    """Train `config` to its end or to the next interruption; returns the exit code. Raises Refused.

    resume: "true", "false" or a checkpoint's path. on_saved(path) runs in the writer thread after
    each durable save."""
    began, limit = time.monotonic(), config["training"]["time_limit_hours"]
    deadline = began + 3600 * limit if limit else math.inf
    expect_data(config)
    with Group(config["training"]["device"]) as group, Signals() as signals:
        say = Say(group.main)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and resume != "true":
            say("torchrun restarted this job: resuming")
            resume, fresh = "true", False
        prepare_torch(config, group)
        recordings = group.from_main(lambda: open_recordings(config, say))
        split = Split(config, recordings, say)
        net = build_model(config, split, group, say)
        home = None

        def enter():                    # in the main process; the others hear what it found
            nonlocal home
            home = Home(config, split.fingerprint, resume, fresh, on_saved, say)
            return home.state, home.position

        try:
            state, position = group.from_main(enter)
            trainer = Trainer(config, group, split, net, home, signals, deadline, say)
            if state:
                trainer.unpack(state, position)
            if resume not in ("true", "false"):
                trainer.hold_line()
            return fit_and_tell(trainer)
        finally:
            if home:
                home.close()


def fit_and_tell(trainer):
    """The exit code of the training loop, and the lines that explain it."""
    home, say = trainer.home, trainer.say
    try:
        stopped = trainer.fit()
        if home:
            home.saver.settle()         # a save that failed is tried again: "saved" must be true
        if stopped:
            return tell_stopped(trainer.signals.number, say)
        if home:
            checkpoint.list_run(home.checkpoints, say)
            with tolerated(say, "curves.png"):
                import pictures             # here: matplotlib takes a second to import
                pictures.curves(home.directory)
        return 0
    except Diverged:
        good = None
        if home:
            good = checkpoint.find_resume(home.checkpoints, lambda line: None)
        say(f"{MAX_NONFINITE} losses in a row were not finite; the last good checkpoint is {good}; "
            f"lower the learning rate")
    except checkpoint.SaveFailed as error:
        say(f"stopped: {error.strerror}; free the disk or mend it, then --resume")
    except edf.DataError as error:     # a recording changed or vanished under the run
        say(f"stopped: {error}; mend it, then --resume", every=True)
    return 1


def tell_stopped(number, say):
    if not number:
        say("time limit reached, saved")
        return 75
    say(f"stopped by {signal.Signals(number).name}, saved")
    return 128 + number


def main(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, epilog=describe(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--resume", nargs="?", const="true", default="false",
                        metavar="true|false|CHECKPOINT")
    parser.add_argument("--fresh", action="store_true",
                        help="move an existing run aside and start over")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value",
                        help="one key over the file's value, which is YAML; may be repeated: "
                             "--set training.batch_size=4 --set 'data.dev_patients=[chb01, chb02]'")
    args = parser.parse_args(argv)
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    try:
        if args.fresh and args.resume != "false":
            raise Refused("--fresh and --resume exclude each other")
        return run(load_config(args.config, args.set), args.resume, args.fresh)
    except Refused as refusal:
        print(f"train.py: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
