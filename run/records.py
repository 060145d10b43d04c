"""The run directory: who holds it, the state found in it, its records cut back to that state."""
import collections
import contextlib
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import yaml
from tqdm import tqdm

import checkpoint
import evaluate
import model
from eeg.disk import Refused, TemporaryFault, fault
from run.config import compare


def in_use(line):
    """Refused, or TemporaryFault where the process that holds the directory is on its way out."""
    holder = re.search(r"in use by process (\d+) on (\S+?):", line)
    if holder and holder[2] == socket.gethostname() and leaving(int(holder[1])):
        return TemporaryFault(f"{line}; it is ending: try again")
    return Refused(line)


def leaving(pid):
    """Gone, dead, or killed and still busy in the kernel, with a GPU or a disk that hangs."""
    try:
        facts = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return Path("/proc").is_dir()
    facts = dict(re.findall(r"(State|SigPnd|ShdPnd):\s+(\S+)", facts))
    pending = int(facts["SigPnd"], 16) | int(facts["ShdPnd"], 16)
    return facts["State"] in "ZX" or bool(pending & 1 << (signal.SIGKILL - 1))


class Log:
    """Prints lines, above a progress bar where there is one, and appends them with date and time to
    a file once the run directory is held. A console that takes no line holds up nothing: the file
    has it. Only the main process speaks, unless every process has something to say."""

    def __init__(self, main):
        self.main, self.path = main, None
        self.waiting = []               # lines that are not in the file yet
        self.lock = threading.Lock()    # the writer thread speaks too

    def __call__(self, line, every=False, shown=True):
        """shown=False: for the file alone, where a progress bar shows the same."""
        if not (self.main or every):
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.lock:
            if shown:
                # ValueError: a closed stream, or one whose encoding lacks a letter
                with contextlib.suppress(OSError, ValueError):
                    tqdm.write(line, file=sys.stdout)
                    sys.stdout.flush()
            self.waiting += [f"{now} {part}\n" for part in line.splitlines() or [""]]
            self._append()

    def keep(self, path):
        """From now on, and with the lines so far, the log is also in the file `path`."""
        with self.lock:
            self.path = path
            self._append()

    def _append(self):
        if self.path is None or not self.waiting:
            return
        # a disk that is full now may have room for these lines later
        with contextlib.suppress(OSError), open(self.path, "ab") as file:
            file.write("".join(self.waiting).encode(errors="backslashreplace"))
            self.waiting = []


def launch():
    """Who started this process, as text: the same over the restarts of one torchrun, another one
    for any other start."""
    parent, born = os.getppid(), ""
    with contextlib.suppress(OSError):  # where there is /proc: process ids come again
        stat = Path(f"/proc/{parent}/stat").read_text()
        born = stat.rsplit(")", 1)[1].split()[19]
    return f"{socket.gethostname()} {parent} {born}"


class Home:
    """results/<name> in the hands of the main process, from taking it to giving it up.

    `saver` holds its lock; `state` is what to continue from (None: start at the beginning), at
    `position`; `chosen` is true where that is a file that --resume named; `record` stands at that
    state. Raises Refused; TemporaryFault for what may pass."""

    def __init__(self, config, fingerprint, resume, fresh, hook, watch, say):
        self.config, self.fingerprint, self.hook = config, fingerprint, hook
        self.watch, self.say = watch, say
        self.directory = run_directory(config)
        self.checkpoints = self.directory / "checkpoints"
        self.last_save = "none in this process"
        if self._restarted() and resume != "true":
            say("torchrun restarted this job: resuming")
            resume, fresh = "true", False
        if resume == "false" and not fresh and holds_checkpoints(self.checkpoints):
            raise Refused(f"{self.checkpoints} already holds checkpoints: "
                          f"--resume continues that run, --fresh moves it aside")
        self.chosen = resume not in ("true", "false")
        try:
            self._expect_environment()
            if self.chosen:
                self.saver, self.state = self._take_with(resume)
            else:
                self.saver, self.state = self._take(resume, fresh)
        except checkpoint.InUse as error:
            raise in_use(error.strerror) from None
        except (checkpoint.CorruptCheckpoint, ValueError) as error:
            raise Refused(str(getattr(error, "strerror", None) or error)) from None
        except OSError as error:
            raise fault(error, self.directory) from None
        self.position = self.saver.position
        try:
            self.record = self._cut_records()
        except OSError as error:
            self.saver.close()
            raise fault(error, self.directory) from None
        self.saver.before_save = self.secure_records
        self.saver.on_saved = self.saved

    def _restarted(self):
        """torchrun started this process again, and what it did before had begun here. Arguments
        that were refused are refused again; --resume FILE and --fresh are not done twice."""
        if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            return False
        try:
            return json.loads((self.directory / "started.json").read_text()) == launch()
        except (OSError, ValueError):
            return False

    def begin(self):
        """Note on the disk that this launch goes on here, for its restarts."""
        with tolerated(self.say, "started.json", "a restart by torchrun will not resume by itself"):
            checkpoint.write_json(self.directory / "started.json", launch())

    def _expect_environment(self):
        """Refuse what the saver would refuse, before anything is moved aside."""
        s = self.config["training"]
        checkpoint.environment(s["mid_epoch_minutes"], s["mid_epoch_keep"], lambda line: None)

    def _take(self, resume, fresh):
        """The directory as it stands, moved aside where it must not be overwritten."""
        if fresh:
            move_aside(self.directory, self.say)
            second = Path(self.config["training"]["mirror"] or os.devnull, self.directory.name)
            if second.is_dir():
                move_aside(second, self.say)
        saver = self._open_saver()
        try:
            state = saver.resume(resume == "true")
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
        state["stopping"] = self._best_left(state["stopping"])
        self.say(f"resume: {path} as asked; later resumes follow this line")
        return saver, state

    def _best_left(self, stopping):
        """Early stopping compares with the best.pt that the chosen line has, as the saver does."""
        best = {"value": None, "epoch": 0, "tie": None}
        with contextlib.suppress(OSError, checkpoint.CorruptCheckpoint):
            facts = checkpoint.peek(self.checkpoints / "best.pt")
            if facts["metric"] and facts["metric"]["name"] == stopping["metric"]:
                best |= facts["metric"] | {"epoch": facts["epoch"]}
                del best["name"]
        return stopping | best

    def _open_saver(self):
        s = self.config["training"]
        return checkpoint.Checkpointer(
            self.checkpoints, s["mid_epoch_minutes"], s["mid_epoch_keep"],
            s["checkpoint_interval"], s["checkpoint_keep"], evaluate.METRICS[s["best_metric"]],
            say=self._saver_says, save_patience_minutes=s["save_patience_minutes"],
            mirror=s["mirror"] or None)

    def _saver_says(self, line):
        # it has ended too; other lines may come from the second copy, which is no progress
        if line.startswith("save failed"):
            self.watch.did("save")
        self.say(line)

    def _check(self, state, where):
        """Refuse a state that is not one of this run: not of training, of other config or data."""
        needed = ("model", "optimizer", "rng", "sampler", "config", "data")
        missing = [key for key in needed if key not in state]
        if missing:
            raise Refused(f"{where} is no training checkpoint: it lacks {', '.join(missing)}")
        self._keep_origin(state["config"]["training"])
        older = self._keep_model(state["config"].get("model") or {})
        saved = state["config"] | {"model": state["config"].get("model", {}) | older}
        compare(saved, self.config, self.say)
        if state["data"] != self.fingerprint:
            raise Refused("the recordings differ from those of the checkpoint (names, lengths, "
                          "preparation or events): restore them, or start another run with --fresh")

    def _keep_origin(self, before):
        """The weights that a run began with stay those; training.init is for a fresh start."""
        now = self.config["training"]
        origin = before.get("init", "")
        if now["init"] not in ("", origin):
            self.say(f"resume: training.init {now['init']} is for a fresh start: not read")
        now["init"], now["init_sha256"] = origin, before.get("init_sha256", "")

    def _keep_model(self, before):
        """A model that was begun before there was a setting goes on without it: {setting: what it
        was}."""
        now, older = self.config["model"], model.older(before)
        for name, value in older.items():
            if now[name] != value:
                self.say(f"resume: this run is older than model.{name} and goes on without it: "
                         f"{value:g}; a new run has {now[name]:g}")
        now |= older
        return older

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

    def save_mid(self, state, since):
        self.record.flush()
        self.saver.save_mid(state, since)

    def save_epoch(self, state, value, name, tie, since):
        self.record.flush()
        self.saver.save_epoch(state, value, name, tie, since)

    def secure_records(self, directory):
        """In the writer thread, before a checkpoint goes to `directory`: at home, or in the second
        copy alone."""
        if directory == self.checkpoints:
            self.record.sync()
        else:
            self.record.complete(directory.parent / self.record.path.name)

    def saved(self, path):
        """In the writer thread, once a checkpoint is durable."""
        self.watch.did("save")
        self.last_save = f"{path.name} at {time.strftime('%H:%M:%S')}"
        self.record.event("save", path, seconds=self.saver.blocked)
        if self.hook:
            self.hook(path)

    def close(self):
        try:
            self.saver.close()
        finally:
            self.record.close()


def run_directory(config):
    """Its whole path: relative ones depend on where a command was started."""
    return Path(config["experiment"]["results"], config["experiment"]["name"]).absolute()


def holds_checkpoints(directory):
    if not directory.is_dir():
        return False
    return any(checkpoint.NAME.fullmatch(n) or n == "best.pt" for n in os.listdir(directory))


def has_run(config):
    """Whether the run directory, or its mirror, holds checkpoints."""
    directory, mirror = run_directory(config), config["training"]["mirror"]
    places = [directory, Path(mirror, directory.name)] if mirror else [directory]
    try:
        return any(holds_checkpoints(place / "checkpoints") for place in places)
    except OSError as error:
        raise fault(error, directory) from None


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
def tolerated(say, what, consequence="", errors=OSError):
    """What fails in `what` is said and survived: checkpoints come first.

    errors: Exception for decoration (pictures, TensorBoard), which no run may die of; a fault of a
    disk for the rest."""
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        line = f"{what}: {' '.join(str(reason).split())}"
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
        self.pending = []               # lines that a full or dead disk refused
        # lines of this process, for a second copy that lags behind a disk that dies
        self.newest = collections.deque(maxlen=10_000)
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
        self.size = checkpoint.atomic_write(self.path, [text.encode()])     # of the whole lines
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.charts = Charts(directory / "tensorboard", kept, say)

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
        line = json.dumps(row) + "\n"
        self.pending.append(line)
        self.newest.append(line)
        self.flush()
        self.charts.add(row)

    def flush(self):
        """Rows to the file: a disk that is full or dead keeps them here until it takes them."""
        try:
            while self.pending:
                os.ftruncate(self.file, self.size)      # half a line, where there was no room
                line = self.pending[0].encode()
                rest = line
                while rest:
                    rest = rest[os.write(self.file, rest):]
                self.size += len(line)
                del self.pending[0]
        except OSError as error:
            self.say(f"metrics.jsonl: {error.strerror}: {len(self.pending)} rows wait in memory")

    def complete(self, path):
        """Add what it lacks of the newest rows to `path`, a copy of metrics.jsonl elsewhere."""
        with tolerated(self.say, path, "the second copy lacks the newest rows"):
            text = path.read_text() if path.exists() else ""
            rows = dict.fromkeys(line for line in text.splitlines(True) if line.endswith("\n"))
            rows.update(dict.fromkeys(self.newest))
            checkpoint.atomic_write(path, ["".join(rows).encode()])

    def event(self, kind, path, facts=None, seconds=0.0):
        """A line of saves.jsonl: where a save or a resume stands, by `facts` or by the file."""
        with tolerated(self.say, "saves.jsonl", f"this {kind} is not listed"):
            facts = facts or checkpoint.peek(path)
            row = {"kind": kind, "file": Path(path).name, "epoch": facts["epoch"],
                   "batch": facts["batch"], "step": facts["global_step"], "seconds": seconds,
                   "time": time.time()}
            with open(self.directory / "saves.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def sync(self):
        """On the disk before the checkpoint that counts on it; in the writer thread, an fsync takes
        its time."""
        with tolerated(self.say, "metrics.jsonl", "its last rows may be lost"):
            os.fsync(self.file)

    def close(self):
        self.flush()
        with tolerated(self.say, "metrics.jsonl", "its last rows may be lost"):
            os.close(self.file)         # a network disk may say only now what it refused
        self.charts.close()


class Charts:
    """TensorBoard's view of metrics.jsonl, drawn anew at each start. Where it fails it is left out
    until the next start."""

    def __init__(self, folder, rows, say):
        self.folder, self.say = folder, say
        self.writer = self._attempt(self._open)
        for row in rows:
            self.add(row)

    def _open(self):
        from torch.utils.tensorboard import SummaryWriter       # here: it may be absent or broken
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        return SummaryWriter(self.folder)

    def _attempt(self, work, *arguments):
        later = "no more charts in this process; the next start draws them from metrics.jsonl"
        with tolerated(self.say, "tensorboard", later, errors=Exception):
            return work(*arguments)
        self.writer = None

    def add(self, row):
        if self.writer:
            self._attempt(self._add, row)

    def _add(self, row):
        axes = ("step", "epoch", "batch", "batches", "time")
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in axes:
                self.writer.add_scalar(f"{row['kind']}/{key}", value, row["step"],
                                       walltime=row.get("time"))

    def close(self):
        if self.writer:
            self._attempt(self.writer.close)
