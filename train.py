"""Train the V3 seizure detector and never lose work: every stop, planned or not, is a place to
resume from.

    python train.py --config configs/local/smoke.yaml --resume      two CPU minutes, synthetic EEG
    python train.py --config configs/local/train.yaml --resume      the real thing; again after any
                                                                    interruption
    torchrun --nproc_per_node=8 train.py --config configs/local/train.yaml --resume

--resume takes the latest good checkpoint, or starts fresh and says so; --resume FILE goes back to
FILE and makes it the line that later resumes follow; --fresh moves the old run aside. Exit codes: 0
finished, 1 a fault that may pass, or diverged, 2 refused, 70 stood still, 75 time limit reached and
saved, 128+N stopped by signal N and saved. Every key of a configuration stands at the end of this
help.
"""
from eeg import console

if __name__ == "__main__":
    console.begin("train.py", "training")       # the imports below take seconds

import argparse
import contextlib
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import data
from eeg import edf, splits
import evaluate
import model
from checkpoint import Signals
from eeg.disk import Refused, Stop, TemporaryFault      # noqa: F401 - for those who import train
from run.config import add, describe, load as load_config, run_directory, true_or_false
from run.listing import list_run
from run.machine import Group, data_parallel, machine_facts, piece, prepare_torch
from run.machine import rank_and_size, seconds_before
from run.messages import command_again, passing, tell_next, tell_stopped, time_left
from run.prepare import check           # noqa: F401 - for those who import train
from run.prepare import Split, as_saved, build_model, expect_data, expect_same, open_recordings
from run.prepare import start_from
from run.records import Log, RunDirectory, finds_run, tolerated
from run.records import holds_checkpoints, move_aside    # noqa: F401 - for those who import train
from run.watch import Watchdog
from scoring.report import validation_line

# the tables of the scripts that have settings, beside those of run/config.py
add("model", model.KEYS, model.settings)
add("evaluation", evaluate.KEYS, evaluate.settings)

MAX_NONFINITE = 50                      # steps in a row
TIE = "average_precision"               # decides between epochs whose best_metric is the same


# ---- the loop ----

class Diverged(Exception):
    """MAX_NONFINITE losses in a row were not finite."""


class Stopped(Exception):
    """A signal or the time limit, met where only a save can follow."""


def focal_loss(logits, target, mask, alpha, gamma):
    """Sum over real samples of alpha_t (1 - p_t)^gamma cross-entropy, in fp32 (Lin et al., ICCV
    2017). All (B, T)."""
    logits = logits.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = torch.sigmoid(torch.where(target > 0.5, -logits, logits))     # 1 - p_t
    # at 0 a power below 1 has no slope
    missed = missed.clamp_min(torch.finfo(missed.dtype).tiny)
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

    def __init__(self, config, group, split, model, home, signals, deadline, watch, say):
        self.config, self.settings = config, config["training"]
        self.group, self.split, self.home, self.say = group, split, home, say
        self.signals, self.deadline, self.watch = signals, deadline, watch
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
        self.idle = 0                   # starts in a row before this one without progress
        self.began_at = self._progress()

        self.batches = split.batches    # of this epoch
        self.compiled = False           # in this process
        self.slowest = 0.0              # seconds of the slowest step so far
        self.saved_at = None            # (step, recordings scored) of the last snapshot
        self.epoch_began = time.monotonic(), 0      # when, and at which batch, in this process
        self.validation_seconds = 0.0   # of the last whole one; 0 = none yet

    def _build(self, model):
        s, device = self.settings, self.group.device
        self.model = model
        # windows of the largest piece that a batch is cut into
        self.piece = piece(s, self.group.size)
        self.net = model
        if s["compile"]:
            # one graph for one shape: pieces of a batch that are smaller are filled up to it
            self.net = torch.compile(model, fullgraph=True, dynamic=False)
        if self.group.size > 1:
            window = len(self.split.channels), self.split.windows.length
            self.net = data_parallel(self.net, self.group, (self.piece, *window), self.config)
        self.optimizer = make_optimizer(model, s, fused=True)
        total = self.total = s["epochs"] * self.split.batches
        warmup = int(s["warmup_ratio"] * total)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, total, warmup))
        self.scaler = torch.amp.GradScaler(device.type, enabled=s["precision"] == "fp16")
        c = self.config["data"]
        self.loader = data.Loader(self.split.windows, device, self.config["experiment"]["seed"],
                                  c["augment"] and c["augmentations"], c["buffers"], c["readers"],
                                  getattr(model, "baseline", 0.0))
        self.slow = 0                   # rows in a row that waited for data
        self.advised = False
        self.ahead = iter(())           # windows of the recordings that are validated

    def fit(self):
        """Train to the end. True where a signal or the time limit came before it."""
        if self.finished():
            self.say("this run is finished: raise training.epochs or training.patience to go on")
            return False
        self.say(f"{self.split.described(self.epoch)}, {console.how_many(self.total, 'step')} in "
                 f"{console.how_many(self.settings['epochs'], 'epoch')}")
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
        self.epoch_began = time.monotonic(), self.batch
        wanted = [ids for _, pieces in plan for ids, _ in pieces]
        feed = self.loader.batches(wanted, self.epoch)
        hidden = not self.group.main
        self.bar = console.bar(self.batches, f"epoch {self.epoch}", "batch", self.batch, hidden)
        self.net.train()
        with contextlib.closing(feed), self.bar:
            for batch, pieces in plan:
                began = time.monotonic()
                loss, norm = self.train_step(batch, pieces, feed)
                if self.settings["compile"] and not self.compiled:
                    self.compiled = True
                    self.say(f"compiled: the first step took {time.monotonic() - began:.0f} s")
                self.after_step(batch, loss, norm, time.monotonic() - began)
                self.watch.progressed("step")

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
        """Gradients of one batch, and the step where they are finite. Returns the mean loss and the
        gradient norm, which are read from the device once, when all of it is queued."""
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
                with evaluate.autocast(s["precision"], self.group.device):
                    logits = self.net(self.filled(x))[:len(x)]
                part = focal_loss(logits, y, mask * weight, s["focal_alpha"], s["focal_gamma"])
                share = part / total
                # DDP averages gradients; our loss is a sum of shares
                self.scaler.scale(share * self.group.size).backward()
            loss = loss + share.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s["grad_clip"])
        result = torch.stack([loss.double(), norm.double()])
        self.group.add(result[:1])      # the sum of all shares; the norm is the same everywhere
        if self.scaler.is_enabled():    # fp16 may go on after a skipped step with another scale
            if result.isfinite().all():
                self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # fused AdamW asks this flag on the device: no step with what is not finite
            self.optimizer.found_inf = 1 - result.isfinite().all().float()
            self.optimizer.step()
        return result.tolist()

    def filled(self, x):
        """x, under training.compile with windows of zeros up to the size of a whole piece: another
        shape would be compiled anew. Their logits are cut off, so they weigh nothing."""
        if not self.settings["compile"]:
            return x
        missing = self.piece - len(x)
        return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x

    def after_step(self, batch, loss, norm, seconds):
        """Count, log, let the boundary act."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.scheduler.step()
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
        self.home.write(
            kind="train", epoch=self.epoch, batch=self.batch, batches=self.batches,
            step=self.step, loss=loss, lr=rate, grad_norm=norm, skipped=self.skipped,
            seconds=seconds, waited=waited, time=time.time())
        self.bar.set_postfix(loss=f"{loss:.4f}")
        line = (f"epoch {self.epoch}/{self.settings['epochs']} batch {self.batch}/{self.batches} "
                f"step {self.step} loss {loss:.4f} lr {rate:.2e} norm {norm:.3f} "
                f"{seconds:.2f} s/step, {time_left(self)}")
        if self.skipped:
            line += f", {console.how_many(self.skipped, 'step')} skipped"
        if share >= 0.005:
            line += f", waited {100 * share:.0f} % for data"
        self.say(line, shown=self.bar.disable)
        # not by one row: the first windows of a start are read while nothing trains
        self.slow = self.slow + 1 if share > data.SLOW_SHARE else 0
        if self.slow > 1 and not self.advised:
            self.advised = True
            self.say(self.loader.advice(share))

    # -- validation --

    def validate(self):
        """Whole recordings, one per process at a time; a resume goes on with the next. Returns the
        summary of all metrics."""
        if self._progress() != self.began_at:       # else the resumed state is this one
            self.save_mid()             # training of this epoch is safe from here on
        if self.group.main:
            self.home.saver.check()
        began, before = time.monotonic(), len(self.scores)
        self.validate_recordings()
        if not before:
            self.validation_seconds = time.monotonic() - began
        return evaluate.summarise(list(self.scores.values()), self.config["evaluation"])

    def validate_recordings(self):
        size, dev = self.group.size, self.split.dev
        todo = [r for r in dev if r.name not in self.scores]
        self.ahead = evaluate.read_ahead(todo[self.group.rank::size], self.config["evaluation"])
        bar = console.bar(len(dev), "validation", "recording", len(self.scores),
                          hidden=not self.group.main)
        plain = console.Timer(30)
        with bar, contextlib.closing(self.ahead):
            for first in range(0, len(todo), size):
                turn = todo[first:first + size]
                mine = None
                if self.group.rank < len(turn):
                    mine = self.score(turn[self.group.rank])
                while self.poll(False):     # the others' recordings may be longer
                    pass
                for recording, score in zip(turn, self.group.gather(mine)):
                    self.scores[recording.name] = score
                bar.update(len(turn))
                if bar.disable and plain.due():
                    self.say(f"validation: {len(self.scores)} of {len(dev)} recordings")
                self.watch.progressed("validated recording")
                self.boundary()

    def score(self, recording):
        c = self.config["evaluation"]
        probability = evaluate.predict(self.model, recording, self.group.device, c,
                                       self.settings["precision"], self.poll, self.ahead)
        return evaluate.score(recording, probability, c)

    def poll(self, busy=True):
        """Inside a recording: stop at once, where asked to (it is done anew). Whether a process is
        inside one: each that is not polls on with the others, so that all stop at one place, and
        none takes a long recording of another for a standstill."""
        self.watch.progressed("validated window")
        stop, busy = self.asked(busy)
        if stop and busy:
            self.save_mid(last=True)
            raise Stopped
        return busy

    def end_epoch(self, summary):
        """Metric, early stopping, checkpoints of the finished epoch; then the next one begins."""
        name = self.settings["best_metric"]
        value, tie = float(summary[name]), float(summary[TIE])
        tied = value == self.stopping["value"]  # a small set gives the same event F1 over and over
        home = self.home
        improved = self.group.from_main(lambda: home.is_best(value, tie) if home else None)
        if improved:
            self.stopping = {"metric": name, "value": value, "tie": tie, "epoch": self.epoch,
                             "waited": 0}
        else:
            self.stopping["waited"] += 1
        self.summary, self.scores = summary, {}
        if self.group.main:
            self.home.write(kind="validation", epoch=self.epoch, step=self.step, best=improved,
                            time=time.time(), **summary)
        began = time.monotonic()
        state = self.pack()
        if self.group.main:
            self.home.save_epoch(state, value, tie, began)
        self.tell_epoch(summary, value, improved, tied)
        self.epoch += 1
        self.batch = 0
        self.windows_done = 0
        self.saved_at = (self.step, 0)
        self.draw()

    def tell_epoch(self, summary, value, improved, tied):
        name = self.settings["best_metric"]
        self.say(f"validation of epoch {self.epoch}: {validation_line(summary, name)}")
        missed = evaluate.over_cap(summary, self.config["evaluation"])
        if missed:
            self.say(f"validation of epoch {self.epoch}: {missed}")
        shown = "not computable" if math.isnan(value) else console.rounded(value)
        rank = "the best so far"
        if improved and tied:
            rank += f": as good as before, with a better {TIE}"
        if not improved:
            best = self.stopping["epoch"]
            rank = f"the best is that of epoch {best}" if best else "no epoch is the best yet"
        self.say(f"epoch {self.epoch}/{self.settings['epochs']}: {name} {shown}, {rank}")

    def draw(self):
        """curves.png as it stands; the checkpoint of this epoch is on its way already."""
        if self.group.main:
            with tolerated(self.say, "curves.png", errors=Exception):
                from scoring import pictures         # here: matplotlib takes a second to import
                pictures.curves(self.home.directory)

    def _no_best(self):
        return {"metric": self.settings["best_metric"], "value": None, "tie": None, "epoch": 0,
                "waited": 0}

    def out_of_patience(self):
        patience, waited = self.settings["patience"], self.stopping["waited"]
        if not patience or waited < patience:
            return False
        self.say(f"early stop: {console.how_many(waited, 'epoch')} without improvement "
                 f"(training.patience {patience})")
        return True

    # -- saving and stopping --

    def boundary(self):
        """After a step or a validated recording: snapshot when due, stop when asked to.

        One all-reduce carries any process's signal and the main process's timer, so that all act
        at the same step."""
        stop, due = self.asked(self.group.main and self.home.saver.due())
        if stop or due:
            self.save_mid(last=stop)
        if stop:
            raise Stopped

    def asked(self, also):
        """(whether a signal or the time limit asks to stop, whether `also` holds), each in any
        process."""
        signalled, late, also = self.group.sum([self.signals.number > 0, self.late(), also])
        if signalled:
            self.signals.take(max(self.group.gather(self.signals.number)))
        return bool(signalled or late), bool(also)

    def late(self):
        """No time for another step and the save after it, by the slowest ones so far."""
        needed = 2 * self.slowest
        if self.group.main:             # the main process saves, and tells the others
            needed += self.home.saver.slowest
        return time.monotonic() > self.deadline - needed

    def save_mid(self, last=False):
        here = (self.step, len(self.scores))
        if self.saved_at == here:       # never twice for one state
            return
        began = time.monotonic()
        state, home = self.pack(), self.home
        # turned away while the end of an epoch waits in memory: a stop here must ask once more
        if self.group.from_main(lambda: home.save_mid(state, began, last) if home else None):
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
            "rng": self.group.gather(checkpoint.random_states()),
            "sampler": {"seed": seed, "epoch": self.epoch, "windows": self.windows_done},
            "running": dict(self.running), "skipped": self.skipped, "nonfinite": self.nonfinite,
            "stopping": dict(self.stopping),
            "validation": dict(self.scores), "scores": dict(self.summary),
            "idle": self.starts_without_progress(),
            "config": self.config, "data": split.fingerprint, "division": split.division,
            "machine": machine_facts(self.group, self.settings),
            "montage": split.montage, "channels": list(split.channels),
            "prepared": split.prepared}

    def unpack(self, state, position):
        """Continue exactly where `state` was taken, at `position`: (epoch, batches trained in it).
        Says what may differ from then on."""
        self.model.load_state_dict(state["model"])
        self.epoch, self.batch = position
        self.step = state["global_step"]
        self.running = dict(state["running"])
        self.skipped, self.nonfinite = state["skipped"], state["nonfinite"]
        self.stopping, self.summary = dict(state["stopping"]), dict(state["scores"])
        if self.batch:                  # else the state ends an epoch, and the next one begins
            self.windows_done = state["sampler"]["windows"]
            self.scores = dict(state["validation"])
        self._unpack_optimizer(state)
        if self.scores and not evaluate.reusable(
                self.scores.values(), state["config"]["evaluation"], self.config["evaluation"]):
            self.say(f"resume: evaluation settings changed: those validated so far "
                     f"({console.how_many(len(self.scores), 'recording')}) are scored anew")
            self.scores = {}
        if self.stopping["metric"] != self.settings["best_metric"]:
            self.say(f"resume: best_metric was {self.stopping['metric']}: "
                     f"best starts anew with {self.settings['best_metric']}")
            self.stopping = self._no_best()
        self.idle, self.began_at = state.get("idle", 0), self._progress()
        if state.get("division", self.split.division) != self.split.division:
            self.say(f"warning: resume: {splits.DIVIDED_ANEW}; restore them, or start with --fresh")
        for key, now in machine_facts(self.group, self.settings).items():
            was = state["machine"].get(key)
            if was != now:
                self.say(f"resume: {key} {was} -> {now}: same data order and state; "
                         f"rounding may differ, not bit-exact")
        if self.group.rank < len(state["rng"]):
            # last: building drew random numbers
            checkpoint.restore_random_states(state["rng"][self.group.rank])
        else:
            self.say(f"resume: no random state of process {self.group.rank} in the checkpoint: "
                     f"seeded anew", every=True)
        self.say(f"resumed: epoch {self.epoch} batch {self.batch} step {self.step}")

    def _unpack_optimizer(self, state):
        saved = state["optimizer"]      # an older one may not have been fused
        groups = [group | {"fused": True} for group in saved["param_groups"]]
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.scheduler.load_state_dict(state["scheduler"])
        self._fit_schedule(state["config"]["training"]["batch_size"])
        # settings that changed since then count from here on, not those of the checkpoint
        rate, groups = self.settings["learning_rate"], self.optimizer.param_groups
        before = groups[0]["lr"]
        now = rate * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        for group in groups:
            group["initial_lr"] = rate
            group["lr"] = now
        if not math.isclose(before, now):
            self.say(f"resume: the learning rate jumps from {before:.2e} to {now:.2e}, its place "
                     f"in the schedule of this configuration")
        groups[0]["weight_decay"] = self.settings["weight_decay"]
        self.scheduler.base_lrs = [rate] * len(groups)
        if not self.scaler.is_enabled():
            return
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        else:
            self.say("resume: the checkpoint has no gradient scale: starting from the default")

    def _fit_schedule(self, batch_size):
        """The schedule counts steps: where the checkpoint's batches were of another size, it goes
        on at the share of the run that is done, and ends with the run."""
        now = self.settings["batch_size"]
        windows = len(self.split.order(self.epoch)) - self.windows_done
        left = math.ceil(windows / now)
        left += (self.settings["epochs"] - self.epoch) * self.split.batches
        done = max(0, self.total - left)
        if batch_size != now or self.scheduler.last_epoch > done:
            self.scheduler.last_epoch = done
            self.say(f"resume: batches are of {now} windows now: the learning rate goes on at step "
                     f"{done} of {self.total} of its schedule")

    def enter(self, state, position):
        """Stand where the run goes on, and note on the disk that it does."""
        self.watch.facts = self.stands
        if state:
            self.unpack(state, position)
        if self.group.main:
            self.home.begin()

    def _progress(self):
        return self.step, len(self.scores)

    def starts_without_progress(self):
        """How many starts in a row, this one too, have come no further than where they began."""
        return 0 if self._progress() != self.began_at else self.idle + 1

    def stands(self):
        """Where the run stands, for those who find it standing still."""
        line = f"epoch {self.epoch}, batch {self.batch} of {self.batches}, step {self.step}"
        if self.group.main:
            line += f", last save: {self.home.last_save}"
        return line


# ---- one run, from the command line to the exit code ----

def run(config, resume="false", fresh=False, on_saved=None, signals=None,
        again="the same with --resume"):
    """Train `config` to its end or to the next interruption; returns the exit code. Raises Refused
    or TemporaryFault.

    resume: "true", "false" or a checkpoint's path. on_saved(path) runs in the writer thread after
    each durable save. signals: a Signals of the caller's, who then sees what came. They are watched
    from the moment that something is at stake; before it, SIGINT raises at once.
    again: the command that goes on, for the last line."""
    resume = true_or_false(resume)
    began = time.monotonic() - seconds_before()
    limit = config["training"]["time_limit_hours"]
    deadline = began + 3600 * limit if limit else math.inf
    expect_data(config)
    rank, size = rank_and_size()
    directory, say = run_directory(config), Log(rank == 0)
    who = f"process {rank} of {size}," if size > 1 else ""
    watch = Watchdog(config["training"]["hang_minutes"], directory / "hang.txt", say, who, size)
    with watch, Group(config["training"]["device"], watch) as group:
        expect_same(config, group)
        prepare_torch(config, group)
        split = Split(config, open_recordings(config, group, watch, say), say)
        net = build_model(config, split, group, say)
        going_on = resume != "false" and finds_run(config, group)
        if not going_on:                # refused while nothing is touched
            start_from(config, split, net, say)
        with signals or Signals() as signals:
            home, (state, position) = take_home(
                group, config, split.fingerprint, resume, fresh, on_saved, watch, say)
            try:
                net = as_saved(net, state, config, split, group, say)
                say.keep(directory / "log.txt")
                if going_on and not state:          # what was there is damaged
                    start_from(config, split, net, say)
                trainer = Trainer(config, group, split, net, home, signals, deadline, watch, say)
                trainer.enter(state, position)
                return fit_and_tell(trainer, again)
            finally:
                if home:
                    home.close()


def take_home(group, *arguments):
    """The RunDirectory that the main process takes (None in the others), and what it found."""
    home = None

    def enter():
        nonlocal home
        home = RunDirectory(*arguments)
        return home.state, home.position

    found = group.from_main(enter)
    return home, found


def fit_and_tell(trainer, again):
    """The exit code of the training loop, and the lines that explain it."""
    home, say = trainer.home, trainer.say
    try:
        stopped = trainer.fit()
        # a save that failed is tried again: "saved" must be true. And no process leaves before
        # it is, and is told: torchrun ends the others once one has left
        trainer.group.from_main(home.saver.settle if home else None)
        if stopped:
            code = trainer.group.from_main(lambda: tell_stopped(trainer, again))
            # nor before the second copy has it
            trainer.group.from_main(home.saver.close if home else None)
            return code
        if home:                        # its work is done: a disk that fails now costs lines
            with tolerated(say, home.newest):
                list_run(home.newest, say)
                tell_next(home, trainer.config, say)
        return 0
    except Diverged:
        good = None
        with tolerated(say, home and home.newest):
            good = home and checkpoint.find_resume(home.newest, lambda line: None)
        say(f"{MAX_NONFINITE} losses in a row were not finite; the last good checkpoint is {good}; "
            f"lower the learning rate")
    except checkpoint.SaveFailed as error:
        # no errno: no disk is at fault, the weights are not finite
        mend = "free the disk or mend it" if error.errno else "lower the learning rate"
        say(f"stopped: {error.strerror}; {mend}, then --resume")
    except edf.DataError as error:     # a recording changed or vanished under the run
        say(f"stopped: {error}; mend it, then --resume", every=True)
    except (ImportError, MemoryError, RuntimeError) as error:       # torch.OutOfMemoryError
        if not evaluate.is_out_of_memory(error):
            raise
        say(f"stopped: out of memory with training.batch_size {trainer.settings['batch_size']}, "
            f"training.accumulate {trainer.settings['accumulate']}, evaluation.batch_size "
            f"{trainer.config['evaluation']['batch_size']}: raise accumulate (the same result in "
            f"smaller pieces) or lower a batch_size, then --resume", every=True)
    return 1


def main(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, epilog=describe(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="YAML: what differs from the defaults below")
    parser.add_argument("--resume", nargs="?", const="true", default="false", type=true_or_false,
                        metavar="true|false|CHECKPOINT",
                        help="go on from the latest good checkpoint, or from that file; alone it "
                             "means true, without it false")
    parser.add_argument("--fresh", action="store_true",
                        help="move an existing run aside and start over")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value",
                        help="one key over the file's value, which is YAML; may be repeated: "
                             "--set training.batch_size=4 --set 'data.dev_patients=[chb01, chb02]'")
    parser.add_argument("--success-exit-status", type=int, nargs="+", default=[], metavar="CODE",
                        help="end with 0 instead of these codes: torchrun starts again whatever "
                             "ends with another one, so that with it 2 75 are not tried again")
    console.install()
    args = parser.parse_args(argv)
    code = attempt(args)
    if code in args.success_exit_status:
        print(f"train.py: exit code {code}, given as 0", file=sys.stderr)
        return 0
    return code


def attempt(args):
    try:
        if args.fresh and args.resume != "false":
            raise Refused("--fresh and --resume exclude each other")
        config = load_config(args.config, args.set)
        return run(config, args.resume, args.fresh, signals=Signals(ends=True),
                   again=command_again(args))
    except Stop as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return stop.code
    except RuntimeError as error:
        line = passing(error)
        if not line:
            raise
        print(f"train.py: {line}; every checkpoint is as it was: try again", file=sys.stderr)
        return 1


def leave(code):
    """End this process without Python's teardown; all that is ours is closed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        # once the GPU has failed, torch aborts a process that frees page-locked memory
        leave(1)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(code)                     # the teardown of gloo's threads has aborted a finished job
    sys.exit(code)
