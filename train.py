"""Train the V3 seizure detector and never lose work: every stop, planned or not, is a place to resume from.

    python train.py --config configs/local/smoke.yaml --resume              two CPU minutes on recordings it makes itself
    python train.py --config configs/local/train.yaml --resume              the real thing; again after any interruption
    torchrun --nproc_per_node=8 train.py --config configs/local/train.yaml --resume

--resume takes the furthest good checkpoint, or starts fresh and says so; --resume FILE goes back to FILE and makes it the
line that later resumes follow; --fresh moves the old run aside. Exit codes: 0 finished, 2 refused, 75 time limit reached
and saved, 128+N stopped by signal N and saved, 1 anything else. Config keys and their units: config.py.
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
from config import Refused, compare, load as load_config

MAX_NONFINITE = 50                      # steps in a row


class Diverged(Exception):
    """MAX_NONFINITE losses in a row were not finite."""


class Stopped(Exception):
    """A signal or the time limit, met where only a save can follow."""


# ---- the machine: processes, device, random states, signals ----

class Group:
    """This process among the others of a torchrun job, or alone."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda" and not torch.cuda.is_available():
            raise Refused("training.device is cuda and torch sees no GPU: check nvidia-smi and the torch build, or set cpu")
        cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1:
            # torchrun's static rendezvous keeps one store over its restarts: by the prefix nobody meets the addresses of the dead
            store, rank, size = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        self.main = self.rank == 0

    def sum(self, values):
        """Element-wise sum of a short list of numbers over the processes, as floats."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
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

    def close(self):
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def seed_all(seed):
    random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)


def rng_state(device):
    """Random states of this process as plain values and CPU tensors."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state, device):
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Signals:
    """First SIGINT, SIGTERM, SIGHUP or SIGUSR1 sets `number`; a second one acts as if nobody listened."""

    WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __enter__(self):
        self.number, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._set) for number in self.WATCHED}
        return self

    def _set(self, number, frame):
        self.number = number
        for watched in self.WATCHED:
            signal.signal(watched, signal.SIG_DFL)
        with contextlib.suppress(OSError):                                  # after SIGHUP the terminal may be gone
            os.write(2, f"\n{signal.Signals(number).name}: saving at the next step; once more to exit at once\n".encode())

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Console:
    """A standard stream that outlives its terminal: after tmux kill-session every write fails, and there is still a
    checkpoint to save."""

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


# ---- records ----

@contextlib.contextmanager
def tolerated(say, what, consequence=""):
    """A disk that refuses `what` is said and survived: checkpoints come first."""
    try:
        yield
    except OSError as error:
        say(f"{what}: {error.strerror}" + f": {consequence}" * bool(consequence))


class Record:
    """metrics.jsonl, saves.jsonl and TensorBoard of one run directory. metrics.jsonl is the truth: a resume cuts it back to
    the resumed step and writes TensorBoard anew from it, so no step stands twice in either."""

    def __init__(self, directory, step=0, complete=True, say=print):
        self.directory, self.path, self.say, self.pending = directory, directory / "metrics.jsonl", say, []
        checkpoint.sweep_temps(directory)
        kept, dropped = [], []
        for row in self._rows():
            past = row["step"] < step or (row["step"] == step and (complete or row["kind"] == "train"))
            (kept if past else dropped).append(row)
        with open(directory / "metrics.abandoned.jsonl", "a") if dropped else contextlib.nullcontext() as file:
            for row in dropped:             # done again from the resumed step on, or of a line that --resume FILE left
                file.write(json.dumps(row) + "\n")
        checkpoint.atomic_write(self.path, ["".join(json.dumps(row) + "\n" for row in kept).encode()])
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        board = directory / "tensorboard"
        for old in board.glob("events.out.tfevents.*"):
            old.unlink()
        self.board = SummaryWriter(board)
        for row in kept:
            self._chart(row)

    def _rows(self):
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
                yield {**row, "step": int(row["step"]), "kind": str(row["kind"])}
            except (ValueError, TypeError, KeyError):               # a kill or a power cut may tear the last row
                self.say(f"metrics.jsonl: dropped a row that cannot be read: {line[:60]!r}")

    def write(self, **row):
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.pending.append(json.dumps(row) + "\n")
        self.flush()
        with tolerated(self.say, "tensorboard", "the next start draws it anew from metrics.jsonl"):
            self._chart(row)

    def flush(self):
        """Rows to the file, whole lines or nothing: a full disk keeps them here until there is room."""
        size = os.fstat(self.file).st_size
        try:
            for line in self.pending[:]:
                data = line.encode()
                while data:
                    data = data[os.write(self.file, data):]
                size += len(line.encode())
                self.pending.remove(line)
        except OSError as error:
            os.ftruncate(self.file, size)
            self.say(f"metrics.jsonl: {error.strerror}: {len(self.pending)} rows wait in memory")

    def _chart(self, row):
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch", "batch", "batches", "time"):
                self.board.add_scalar(f"{row['kind']}/{key}", value, row["step"], walltime=row.get("time"))

    def event(self, kind, path, facts, seconds=0.0):
        row = {"kind": kind, "file": Path(path).name, "epoch": facts["epoch"], "batch": facts["batch"],
               "step": facts["global_step"], "seconds": seconds, "time": time.time()}
        with tolerated(self.say, "saves.jsonl", f"this {kind} is not listed"), open(self.directory / "saves.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self):
        """On the disk before the checkpoint that counts on it; in the writer thread, an fsync takes its time."""
        with tolerated(self.say, "metrics.jsonl", "its last rows may be lost"):
            os.fsync(self.file)

    def close(self):
        self.flush()
        os.close(self.file)
        with tolerated(self.say, "tensorboard"):
            self.board.close()


# ---- the run ----

def focal_loss(logits, target, mask, alpha, gamma):
    """Sum over real samples of alpha_t (1 - p_t)^gamma cross-entropy, in fp32 (Lin et al., ICCV 2017). All (B, T)."""
    logits = logits.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = torch.sigmoid(torch.where(target > 0.5, -logits, logits))     # 1 - p_t
    weight = torch.where(target > 0.5, alpha, 1 - alpha)
    return (weight * missed.pow(gamma) * entropy * mask).sum()


def make_optimizer(model, settings, fused):
    """AdamW; matrices decay, norms and biases (and every other vector) do not."""
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in named if p.ndim >= 2], "weight_decay": settings["weight_decay"]},
              {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings["learning_rate"], fused=fused)


def lr_factor(step, total, warmup):
    """Linear warmup, then cosine to 0 (Loshchilov & Hutter, ICLR 2017), per optimizer step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class Trainer:
    """One process of one run: everything that a checkpoint holds, and the loop that moves it forward."""

    def __init__(self, config, group, say):
        self.config, self.settings, self.group, self.say = config, config["training"], group, say
        seed_all(config["experiment"]["seed"] + 1000003 * group.rank)       # before anything is built
        if self.settings["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self._open_data()
        self._build()
        self.epoch, self.batch, self.step, self.windows_done = 1, 0, 0, 0
        self.running = dict.fromkeys(("loss", "norm", "steps"), 0.0)        # since the last row of metrics.jsonl
        self.skipped, self.nonfinite = 0, 0                                 # steps: in all, in a row
        self.stopping = {"metric": self.settings["best_metric"], "value": None, "epoch": 0, "waited": 0}
        self.scores, self.summary = {}, {}                                  # validation: per recording so far, last result
        self.saver = self.record = self.bar = None
        self.deadline, self.slowest, self.saved_at = math.inf, 0.0, None

    def _open_data(self):
        c = self.config["data"]
        recordings = self.group.from_main(lambda: open_recordings(self.config, self.say))
        try:
            self.train, self.dev = data.split_patients(recordings, c["dev_patients"], c["dev_fraction"],
                                                       self.config["experiment"]["seed"])
            self.windows = data.Windows(self.train, c["window_seconds"], c["stride_seconds"])
            self.order = self._epoch_order(1)
            evaluate.check_metric(self.settings["best_metric"], self.dev)
        except (edf.DataError, ValueError) as error:
            raise Refused(f"{c['path']}: {error}") from None
        self.fingerprint = data.fingerprint(self.train + self.dev)
        lengths = np.array([r.samples for r in self.train])[self.windows.recording] - self.windows.start
        self.valid = np.minimum(lengths, self.windows.length)               # real samples of each window
        self.batches = math.ceil(len(self.order) / self.settings["batch_size"])
        for name, part in (("train", self.train), ("validation", self.dev)):
            self.say(f"{name}: {len(part)} recordings of {len({r.patient for r in part})} patients, "
                     f"{sum(r.seconds for r in part) / 3600:.2f} h, {sum(len(r.events) for r in part)} seizures")
        self.say(f"epoch: {len(self.order)} of {len(self.windows)} windows in {self.batches} batches")

    def _epoch_order(self, epoch):
        """Window ids of `epoch` in the order of training: a pure function of (seed, epoch)."""
        c = self.config["data"]
        return self.windows.epoch(self.config["experiment"]["seed"], epoch, c["full_per_partial"],
                                  c["background_per_partial"] if c["balanced"] else None)

    def _build(self):
        s, device = self.settings, self.group.device
        rng = rng_state(torch.device("cpu"))
        torch.manual_seed(self.config["experiment"]["seed"])                # the same weights in every process
        try:
            self.model = model.build(len(self.train[0].channels), self.config["model"]).to(device)
        except ValueError as error:
            raise Refused(str(error)) from None
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.net = torch.compile(self.model) if s["compile"] else self.model
        if self.group.size > 1:
            self.net = self._data_parallel()
        set_rng_state(rng, torch.device("cpu"))
        self.optimizer = make_optimizer(self.model, s, device.type == "cuda")
        total = s["epochs"] * self.batches
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, total, int(s["warmup_ratio"] * total)))
        self.scaler = torch.amp.GradScaler(device.type, enabled=s["precision"] == "fp16")
        self.loader = data.Loader(self.windows, device, self.config["experiment"]["seed"],
                                  self.config["data"]["augment"], self.config["data"]["buffers"])
        self.say(f"model: {type(self.model).__name__}, {sum(p.numel() for p in self.model.parameters()):,} parameters, {s['precision']} on {device_name(device)}"
                 + f", {self.group.size} processes" * (self.group.size > 1))

    def _data_parallel(self):
        """The model over all processes, after one idle backward pass: DDP orders its buckets anew after its first, and the
        sums of three or more processes round by that order. So a resumed run has the whole run's order from its first step."""
        device, share = self.group.device, -(-self.settings["batch_size"] // (self.settings["accumulate"] * self.group.size))
        net = torch.nn.parallel.DistributedDataParallel(
            self.net, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
        with autocast(self.settings["precision"], device):
            idle = net(torch.randn(share, len(self.train[0].channels), self.windows.length, device=device))
        idle.float().sum().backward()
        net.zero_grad()
        return net

    # -- state --

    def pack(self):
        """Everything that the next step depends on. Collective: every process calls it, the main one gets the dict."""
        rng = self.group.gather(rng_state(self.group.device))
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(),
            "epoch": self.epoch, "batch": self.batch, "global_step": self.step, "rng": rng,
            "sampler": {"seed": self.config["experiment"]["seed"], "epoch": self.epoch, "windows": self.windows_done},
            "running": dict(self.running), "skipped": self.skipped, "nonfinite": self.nonfinite,
            "stopping": dict(self.stopping), "validation": dict(self.scores), "scores": dict(self.summary),
            "config": self.config, "data": self.fingerprint, "machine": self.machine(),
            "montage": self.train[0].montage, "channels": list(self.train[0].channels)}

    def machine(self):
        return {"device": device_name(self.group.device), "processes": self.group.size, "torch": str(torch.__version__),
                "threads": torch.get_num_threads(), "precision": self.settings["precision"],
                "compile": self.settings["compile"]}

    def unpack(self, state, position):
        """Continue exactly where `state` was taken; says what may differ from then on."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        rate, groups = self.settings["learning_rate"], self.optimizer.param_groups      # changed settings count from here
        for group in groups:
            group.update(initial_lr=rate, lr=rate * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch))
        groups[0]["weight_decay"], self.scheduler.base_lrs = self.settings["weight_decay"], [rate] * len(groups)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        elif self.scaler.is_enabled():
            self.say("resume: the checkpoint has no gradient scale: starting from the default")
        self.epoch, self.batch = position
        self.step, self.running = state["global_step"], dict(state["running"])
        self.skipped, self.nonfinite = state["skipped"], state["nonfinite"]
        self.stopping, self.summary = dict(state["stopping"]), dict(state["scores"])
        self.windows_done, self.scores = (state["sampler"]["windows"], dict(state["validation"])) if self.batch else (0, {})
        if self.scores and state["config"]["evaluation"] != self.config["evaluation"]:
            self.say(f"resume: evaluation settings changed: the {len(self.scores)} recordings validated so far are scored anew")
            self.scores = {}
        if self.stopping["metric"] != self.settings["best_metric"]:
            self.say(f"resume: best_metric was {self.stopping['metric']}: best starts anew with {self.settings['best_metric']}")
            self.stopping = {"metric": self.settings["best_metric"], "value": None, "epoch": 0, "waited": 0}
        for key, now in self.machine().items():
            if (was := state["machine"].get(key)) != now:
                self.say(f"resume: {key} {was} -> {now}: same data order and state; rounding may differ, not bit-exact")
        if self.group.rank < len(state["rng"]):
            set_rng_state(state["rng"][self.group.rank], self.group.device)  # last: building drew random numbers
        else:
            self.say(f"resume: no random state of process {self.group.rank} in the checkpoint: seeded anew", every=True)

    # -- saving and stopping --

    def boundary(self):
        """After a step or a validated recording: snapshot when due, stop when asked to.

        One all-reduce carries any process's signal and the main process's timer, so that all act at the same step."""
        signalled, due = self.signals.number > 0, self.group.main and self.saver.due()
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
        mark = (self.step, len(self.scores))
        if self.saved_at != mark:                                           # never twice for one state
            state = self.pack()
            if self.group.main:
                self.record.flush()
                self.saver.save_mid(state)
            self.saved_at = mark

    def on_saved(self, hook):
        def saved(path):
            self.record.event("save", path, checkpoint.peek(path), self.saver.blocked)
            if hook:
                hook(path)
        return saved

    # -- training --

    def plan(self):
        """The batches still to train in this epoch: each with this process's pieces of it, [(window ids, weight)].

        A process with no window left in a piece still takes part in the exchange of gradients, at weight 0."""
        size, cut, group = self.settings["batch_size"], self.settings["accumulate"], self.group
        for start in range(self.windows_done, len(self.order), size):
            batch = self.order[start:start + size]
            shares = np.array_split(batch, cut * group.size)[group.rank::group.size]
            yield batch, [(ids, 1.0) if len(ids) else (batch[:1], 0.0) for ids in shares if len(ids) or group.size > 1]

    def train_epoch(self):
        self.order = self._epoch_order(self.epoch)
        plan = list(self.plan())
        self.batches = self.batch + len(plan)
        feed = self.loader.batches([ids for _, pieces in plan for ids, _ in pieces], self.epoch)
        self.bar = tqdm(total=self.batches, initial=self.batch, desc=f"epoch {self.epoch}", unit="batch",
                        disable=not (self.group.main and sys.stderr.isatty()))
        self.net.train()
        with contextlib.closing(feed), self.bar:
            for batch, pieces in plan:
                began = time.monotonic()
                loss, norm = self.train_step(batch, pieces, feed)
                self.after_step(batch, loss, norm, time.monotonic() - began)

    def train_step(self, batch, pieces, feed):
        """Gradients of one batch; returns this process's share of the mean loss, and the gradient norm."""
        s, total, loss = self.settings, float(self.valid[batch].sum()), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for number, (_, weight) in enumerate(pieces, 1):
            x, y, mask = next(feed)
            last = number == len(pieces) or self.group.size == 1
            with contextlib.nullcontext() if last else self.net.no_sync():
                with autocast(s["precision"], self.group.device):
                    logits = self.net(x)
                part = focal_loss(logits, y, mask * weight, s["focal_alpha"], s["focal_gamma"]) / total
                self.scaler.scale(part * self.group.size).backward()        # DDP averages; the loss is a sum of shares
            loss = loss + part.detach()
        self.scaler.unscale_(self.optimizer)
        return loss.item(), torch.nn.utils.clip_grad_norm_(self.model.parameters(), s["grad_clip"]).item()

    def after_step(self, batch, loss, norm, seconds):
        """Apply the step if loss and gradients are finite, count, log, and let the boundary act."""
        loss = self.group.sum([loss])[0]
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update() if self.scaler.is_enabled() else None
        if finite:
            self.scheduler.step()
        self.batch, self.step, self.windows_done = self.batch + 1, self.step + 1, self.windows_done + len(batch)
        self.skipped, self.nonfinite = self.skipped + (not finite), 0 if finite else self.nonfinite + 1
        self.bar.update()
        if not finite:
            self.say(f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}: optimizer and schedule skipped "
                     f"({self.nonfinite} in a row, {self.skipped} in all)")
            if self.nonfinite >= MAX_NONFINITE:
                raise Diverged
        else:
            for key, value in (("loss", loss), ("norm", norm), ("steps", 1)):
                self.running[key] += value
        if self.step % self.settings["log_every"] == 0 or self.batch == self.batches:
            self.log(seconds)
        self.slowest = max(self.slowest, seconds)
        self.boundary()

    def log(self, seconds):
        steps = max(1.0, self.running["steps"])
        row = {"epoch": self.epoch, "batch": self.batch, "batches": self.batches, "step": self.step,
               "loss": self.running["loss"] / steps, "lr": self.optimizer.param_groups[0]["lr"],
               "grad_norm": self.running["norm"] / steps, "skipped": self.skipped}
        self.running = dict.fromkeys(self.running, 0.0)
        if not self.group.main:
            return
        self.record.write(kind="train", **row, seconds=seconds, waited=self.loader.waited, time=time.time())
        self.bar.set_postfix(loss=f"{row['loss']:.4f}")
        if self.bar.disable:
            left = (self.batches - self.batch) * seconds / 60
            self.say(f"epoch {self.epoch}/{self.settings['epochs']} batch {self.batch}/{self.batches} step {self.step} "
                     f"loss {row['loss']:.4f} lr {row['lr']:.2e} norm {row['grad_norm']:.3f} skipped {self.skipped} "
                     f"{seconds:.2f} s/step, loader waited {self.loader.waited:.2f} s, {left:.0f} min left")

    # -- validation --

    def validate(self):
        """Whole recordings, one per process at a time; a resume goes on with the next. Returns the summary of all metrics."""
        self.save_mid()                                                     # training of this epoch is safe from here on
        if self.group.main:
            self.saver.check()
        todo = [r for r in self.dev if r.name not in self.scores]
        rounds = [todo[i:i + self.group.size] for i in range(0, len(todo), self.group.size)]
        bar = tqdm(rounds, desc="validation", unit="recording", disable=not (self.group.main and sys.stderr.isatty()))
        said = time.monotonic()
        for turn in bar:
            began = time.monotonic()
            mine = self.score(turn[self.group.rank]) if self.group.rank < len(turn) else None
            for recording, score in zip(turn, self.group.gather(mine)):
                self.scores[recording.name] = score
            if bar.disable and time.monotonic() - said > 30:
                said = time.monotonic()
                self.say(f"validation: {len(self.scores)} of {len(self.dev)} recordings")
            if self.group.size > 1:                                         # poll cannot stop one process alone
                self.slowest = max(self.slowest, time.monotonic() - began)
            self.boundary()
        return evaluate.summarise(list(self.scores.values()), self.config["evaluation"])

    def score(self, recording):
        probability = evaluate.predict(self.model, recording, self.group.device, self.config["evaluation"],
                                       self.settings["precision"], self.poll)
        return evaluate.score(recording, probability, self.config["evaluation"])

    def poll(self):
        """Inside a recording: alone, stop at once (the recording is done anew); among others, at the next boundary."""
        if self.group.size == 1 and (self.signals.number or self.late()):
            self.save_mid()
            raise Stopped

    def end_epoch(self, summary):
        """Metric, early stopping, checkpoints of the finished epoch. True when training should stop early."""
        name = self.settings["best_metric"]
        value, best = float(summary[name]), self.stopping
        improved = checkpoint.better(value, best["value"], evaluate.METRICS[name])
        self.stopping = {"metric": name, "value": value, "epoch": self.epoch, "waited": 0} if improved else \
            best | {"waited": best["waited"] + 1}
        self.summary, self.scores = summary, {}
        if self.group.main:
            self.record.write(kind="validation", epoch=self.epoch, step=self.step, best=improved, time=time.time(), **summary)
        state = self.pack()
        if self.group.main:
            self.record.flush()
            self.saver.save_epoch(state, value, name)
        shown = "not computable" if math.isnan(value) else f"{value:.4f}"
        self.say(f"epoch {self.epoch}/{self.settings['epochs']}: {name} {shown}"
                 + (", the best so far" if improved else f", the best is that of epoch {self.stopping['epoch']}"))
        return self.ended_early()

    def ended_early(self):
        patience = self.settings["patience"]
        if patience and self.stopping["waited"] >= patience:
            self.say(f"early stop: {self.stopping['waited']} epochs without improvement (training.patience {patience})")
            return True
        return False

    def close(self):
        try:
            if self.saver:
                self.saver.close()
        finally:
            if self.record:
                self.record.close()

    def fit(self):
        """Train to the end. True where a signal or the time limit came before it."""
        if self.epoch > self.settings["epochs"] or (not self.batch and self.ended_early()):
            self.say("this run is finished: raise training.epochs or training.patience to go on")
            return False
        try:
            while self.epoch <= self.settings["epochs"]:
                self.train_epoch()
                early = self.end_epoch(self.validate())
                self.epoch, self.batch, self.windows_done = self.epoch + 1, 0, 0
                self.saved_at = (self.step, 0)
                if early:
                    break
            return False
        except Stopped:
            return True


def autocast(precision, device):
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def expect_data(config):
    """Refuse a configuration whose recordings are neither there nor to be made: the first thing that a newcomer lacks."""
    c = config["data"]
    if not c["path"]:
        raise Refused("data.path is not set: the folder that data.py import wrote")
    if not Path(c["path"]).is_dir() and not c["synth_hours"]:
        raise Refused(f"data.path {c['path']} does not exist: python data.py import CORPUS_FOLDER {c['path']}")


def make_recordings(config, path, say):
    """Synthetic EDF files at PATH_edf and their import at PATH; what a kill left half made is made anew."""
    c, source, temp = config["data"], Path(f"{path}_edf"), Path(f"{path}_edf.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = checkpoint.lock(path.parent)                                     # of two first runs one makes them
    try:
        if not source.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
            synth.synth(temp, hours=c["synth_hours"], patients=c["synth_patients"], seed=config["experiment"]["seed"])
            os.replace(temp, source)
        say(f"data: {c['synth_hours']} h of synthetic recordings in {source}, importing them to {path}")
        corpora.import_corpus(source, f"{path}.part")
        os.replace(f"{path}.part", path)
    finally:
        held.close()


def open_recordings(config, say):
    """Recordings at data.path; synthetic ones are made there first where the config asks for them, and only then."""
    path = Path(config["data"]["path"])
    try:
        if config["data"]["synth_hours"] and not path.is_dir():
            make_recordings(config, path, say)
        return data.open_corpus(path)
    except edf.DataError as error:
        raise Refused(f"{path}: {error}") from None
    except OSError as error:
        raise Refused(f"{error.filename or path}: {error.strerror}") from None


def holds_checkpoints(directory):
    return any(checkpoint.NAME.fullmatch(n) or n == "best.pt" for n in (os.listdir(directory) if directory.is_dir() else []))


def move_aside(run_directory, say):
    number = next(n for n in range(1, 10**6) if not os.path.lexists(f"{run_directory}.{n}"))
    with contextlib.suppress(FileNotFoundError):
        held = checkpoint.lock(run_directory / "checkpoints")               # raises InUse where a process works there
        try:
            os.rename(run_directory, f"{run_directory}.{number}")
        finally:
            held.close()
        say(f"moved the old run aside: {run_directory} -> {run_directory}.{number}")


def find_state(trainer, directory, resume, fresh, hook):
    """Main process: take the run directory and find the state to continue from (None: start at the beginning)."""
    config, s, say = trainer.config, trainer.settings, trainer.say
    checkpoints, picked = directory / "checkpoints", None
    if resume == "false" and not fresh and holds_checkpoints(checkpoints):
        raise Refused(f"{checkpoints} already holds checkpoints: --resume continues that run, --fresh moves it aside")
    try:
        if resume not in ("true", "false"):
            picked = checkpoint.load(resume)
            _check_state(picked, trainer, resume)
        if fresh:
            move_aside(directory, say)
        make = lambda: checkpoint.Checkpointer(
            checkpoints, s["mid_epoch_minutes"], s["mid_epoch_keep"], s["checkpoint_interval"], s["checkpoint_keep"],
            evaluate.METRICS[s["best_metric"]], trainer.on_saved(hook), lambda: trainer.record.sync(), say=say)
        trainer.saver = make()
        if picked:
            trainer.saver.adopt(picked, resume)
            say(f"resume: {resume} as asked; later resumes follow this line")
            return picked
        state = trainer.saver.resume() if resume == "true" else None
        if state:
            _check_state(state, trainer, "the checkpoint")
        elif holds_checkpoints(checkpoints):                                # all damaged: nothing of it may be overwritten
            trainer.saver.close()
            move_aside(directory, say)
            trainer.saver = make()
        return state
    except (checkpoint.CorruptCheckpoint, checkpoint.InUse, ValueError) as error:
        raise Refused(str(getattr(error, "strerror", None) or error)) from None
    except OSError as error:
        raise Refused(f"{error.filename or directory}: {error.strerror}") from None


def _check_state(state, trainer, where):
    missing = [k for k in ("model", "optimizer", "rng", "sampler", "config", "data") if k not in state]
    if missing:
        raise Refused(f"{where} is no training checkpoint: it lacks {', '.join(missing)}")
    compare(state["config"], trainer.config, trainer.say)
    if state["data"] != trainer.fingerprint:
        raise Refused("the recordings differ from those of the checkpoint (names, lengths, preparation or events): "
                      "restore them, or start another run with --fresh")


def run(config, resume="false", fresh=False, on_saved=None):
    """Train `config` to its end or to the next interruption; returns the exit code. Raises Refused.

    resume: "true", "false" or a checkpoint's path. on_saved(path) runs in the writer thread after each durable save."""
    began, group = time.monotonic(), None
    try:
        expect_data(config)
        group = Group(config["training"]["device"])
        lines = threading.Lock()

        def say(line, every=False):
            if group.main or every:
                with lines:
                    tqdm.write(line, file=sys.stdout)
                    sys.stdout.flush()

        with Signals() as signals:
            trainer = Trainer(config, group, say)
            trainer.signals = signals
            if config["training"]["time_limit_hours"]:
                trainer.deadline = began + 3600 * config["training"]["time_limit_hours"]
            return _run(trainer, resume, fresh, on_saved)
    finally:
        if group:
            group.close()


def _run(trainer, resume, fresh, on_saved):
    config, group, say = trainer.config, trainer.group, trainer.say
    directory = Path(config["experiment"]["results"], config["experiment"]["name"])
    try:
        begin(trainer, directory, resume, fresh, on_saved)
        stopped = trainer.fit()
        if group.main:
            trainer.saver.settle()                          # a save that failed is tried again: "saved" must be true
        if stopped:
            number = trainer.signals.number
            say(f"stopped by {signal.Signals(number).name}, saved" if number else "time limit reached, saved")
            return 128 + number if number else 75
        if group.main:
            checkpoint.list_run(directory / "checkpoints", say)
            with tolerated(say, "curves.png"):
                import pictures             # here: matplotlib takes a second to import
                pictures.curves(directory)
        return 0
    except Diverged:
        good = checkpoint.find_resume(directory / "checkpoints", lambda line: None) if group.main else None
        say(f"{MAX_NONFINITE} losses in a row were not finite; the last good checkpoint is {good}; lower the learning rate")
    except checkpoint.SaveFailed as error:
        say(f"stopped: {error.strerror}; free the disk or mend it, then --resume")
    except edf.DataError as error:                         # a recording changed or vanished under the run
        say(f"stopped: {error}; mend it, then --resume", every=True)
    finally:
        trainer.close()
    return 1


def begin(trainer, directory, resume, fresh, hook):
    """Bring every process to the point where the run goes on."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and resume != "true":
        trainer.say("torchrun restarted this job: resuming")
        resume, fresh = "true", False
    state, position = trainer.group.from_main(lambda: start(trainer, directory, resume, fresh, hook))
    if not state:
        return
    trainer.unpack(state, position)
    trainer.say(f"resumed: epoch {trainer.epoch}, {trainer.batch} batches trained in it, step {trainer.step}")
    if resume != "true":                                    # a file: from here on, whatever happens, resumes follow its line
        trainer.save_mid()
        trainer.saver.wait() if trainer.group.main else None


def start(trainer, directory, resume, fresh, hook):
    """Main process: the state to continue from and its position, with the effective config beside the run's records and
    these cut back to the resumed step."""
    state = find_state(trainer, directory, resume, fresh, hook)
    step, complete = (state["global_step"], state.get("kind") == "epoch" or not state["batch"]) if state else (0, True)
    try:
        checkpoint.atomic_write(directory / "config.yaml", [yaml.safe_dump(trainer.config, sort_keys=False).encode()])
        trainer.record = Record(directory, step, complete, trainer.say)
    except OSError as error:
        raise Refused(f"{directory}: {error.strerror}") from None
    if state:
        trainer.record.event("resume", trainer.saver.resumed, state)
    return state, trainer.saver.position


def main(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--resume", nargs="?", const="true", default="false", metavar="true|false|CHECKPOINT")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start over")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
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
