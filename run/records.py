"""The run directory: who holds it, the state found in it, its records cut back to that state."""
import collections
import contextlib
import errno
import json
import math
import os
import re
import shlex
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
from eeg.console import how_many
from eeg.disk import Refused, TemporaryFault, fault, read_json_lines, write_json
from run.config import compare, effective, run_directory, run_folders
from run.machine import born_at, restarted
from run.mirror import Mirrored, add_rows, runs_of, whole_lines


ABANDONED = "metrics.abandoned.jsonl"   # rows that a resume has cut off


class Log:
    """Prints lines, above a progress bar where there is one, and appends them with date and time to
    a file once the run directory is held. A console that takes no line holds up nothing: the file
    has it. Only the main process speaks, unless every process has something to say."""

    def __init__(self, main):
        self.main, self.path = main, None
        self.waiting = []               # lines that are not in the file yet
        self.refused = ""               # why, where the file did not take them
        self.lock = threading.Lock()    # the writer thread speaks too

    def __call__(self, line, every=False, shown=True):
        """shown=False: for the file alone, where a progress bar shows the same."""
        if not (self.main or every):
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.lock:
            if shown:
                self._show(line)
            self.waiting += [f"{now} {part}\n" for part in line.splitlines() or [""]]
            self._append()

    def _show(self, line):
        # ValueError: a closed stream, or one whose encoding lacks a letter
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def keep(self, path):
        """From now on, and with the lines so far, the log is also in the file `path`."""
        with self.lock:
            self.path = path
            self._append()

    def _append(self):
        if self.path is None or not self.waiting:
            return
        try:
            with open(self.path, "ab") as file:
                file.write("".join(self.waiting).encode(errors="backslashreplace"))
            self.waiting, self.refused = [], ""
        except OSError as error:        # a disk that is full now may have room for them later
            if error.strerror != self.refused:
                self.refused = error.strerror
                self._show(f"{self.path}: {error.strerror}: its lines wait in memory")


def refused_lock(busy):
    """The checkpoint.InUse `busy` as Refused, or as TemporaryFault where it passes by itself: its
    holder is dead, dying or on another machine, whose lock ends with its lease."""
    line = busy.strerror
    if busy.pid is None or busy.host != socket.gethostname():
        return TemporaryFault(f"{line}; where that process is gone its lock passes: try again")
    if is_ending(busy.pid):
        return TemporaryFault(f"{line}; it is ending: try again")
    return Refused(line)


def is_ending(pid):
    """Gone, dead, or killed and still busy in the kernel, with a GPU or a disk that hangs."""
    try:
        facts = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return Path("/proc").is_dir()
    facts = dict(re.findall(r"(State|SigPnd|ShdPnd):\s+(\S+)", facts))
    pending = int(facts["SigPnd"], 16) | int(facts["ShdPnd"], 16)
    return facts["State"] in "ZX" or bool(pending & 1 << (signal.SIGKILL - 1))


def launch():
    """Who started this process, as text: the same over the restarts of one torchrun, another one
    for any other start."""
    parent = os.getppid()
    return f"{socket.gethostname()} {parent} {born_at(parent)}"     # process ids come again


class RunDirectory:
    """results/<name>, held by the main process from its opening to `close`.

    `saver` holds its lock; `state` is what to continue from (None: start at the beginning), at
    `position`; `metrics` is cut back to that state. Raises Refused; TemporaryFault for what may
    pass."""

    def __init__(self, config, fingerprint, resume, fresh, hook, watch, say):
        self.config, self.fingerprint, self.hook = config, fingerprint, hook
        self.watch, self.say = watch, say
        self.directory = run_directory(config)
        self.checkpoints = self.directory / "checkpoints"
        self.rules = evaluate.rules(config["evaluation"])
        self.last_save = "none in this process"
        self.kept = "nothing was touched"
        if self._restarted() and resume != "true":
            say("torchrun restarted this job: resuming")
            resume, fresh = "true", False
        if resume == "false" and not fresh and holds_checkpoints(self.checkpoints):
            raise Refused(f"{self.checkpoints} already holds checkpoints: "
                          f"--resume continues that run, --fresh moves it aside")
        self.minutes = effective(config, "training.mid_epoch_minutes", say)
        self.mid_keep = effective(config, "training.mid_epoch_keep", say)
        self.saver = None
        try:
            if resume in ("true", "false"):
                self.state = self._go_on(resume == "true", fresh)
            else:
                self.state = self._go_back(resume)
            self.position = self.saver.position
            if self.state:
                self.state["stopping"] = self._compared_with_best(self.state["stopping"])
            self.metrics = self._cut_records()
        except BaseException as error:
            if self.saver:
                self.saver.close()
            raise self._explained(error) from None
        self.saver.before_save = self.secure_records
        self.saver.on_saved = self.saved

    def _explained(self, error):
        if isinstance(error, checkpoint.InUse):
            return refused_lock(error)
        if isinstance(error, (checkpoint.CorruptCheckpoint, ValueError)):
            return Refused(str(error))
        if isinstance(error, OSError):
            return fault(error, self.directory, self.kept)
        if isinstance(error, MemoryError):
            return TemporaryFault(f"{self.directory}: out of memory; {self.kept}: try again")
        return error

    def _restarted(self):
        """torchrun started this process again, and what it did before had begun here. Arguments
        that were refused are refused again; --resume FILE and --fresh are not done twice."""
        if not restarted():
            return False
        try:
            return json.loads((self.directory / "started.json").read_text()) == launch()
        except (OSError, ValueError):
            return False

    def begin(self):
        """Note on the disk that this launch goes on here, for its restarts."""
        with tolerated(self.say, "started.json", "a restart by torchrun will not resume by itself"):
            write_json(self.directory / "started.json", launch())

    def _go_on(self, resume, fresh):
        """The state of the directory as it stands, which is moved aside where it must not be
        overwritten."""
        if fresh:
            self._move_aside()
        else:
            self._expect_disk()
        self.saver = self._open_saver()
        if not fresh:
            self.kept = "no checkpoint was lost"    # names of them may be made anew
        state = self.saver.resume(resume)
        if state:
            self._check(state, "the checkpoint")
            return state
        if holds_checkpoints(self.checkpoints):     # all damaged: nothing may be overwritten
            self.saver.close()
            self._move_aside()
            self.saver = self._open_saver()
        return None

    def _expect_disk(self):
        """Raise TemporaryFault where the folder of checkpoints is the bare mount point of a disk
        that is away: not even the lock file of the saves before is there."""
        if has_run(self.config) or not self.checkpoints.is_dir() or os.listdir(self.checkpoints):
            return
        path = self.directory / "saves.jsonl"
        if any(row.get("kind") == "save" for row in read_json_lines(path, self.say)):
            raise TemporaryFault(f"{self.checkpoints} is empty, and {path} lists saves: mount its "
                                 f"disk and try again; --fresh begins anew")

    def _move_aside(self):
        move_aside(self.directory, self.say, *run_folders(self.config)[1:])
        self.kept = "the old run was moved aside, whole"

    def _go_back(self, path):
        """The state of the checkpoint `path` instead of the newest; nothing is changed before it is
        found fit."""
        try:
            state = checkpoint.load(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise Refused(f"--resume {shlex.quote(str(path))}: {error.strerror}: name a "
                          f"checkpoint, or none for the latest one") from None
        self._check(state, path)
        self.saver = self._open_saver()
        self.kept = "no checkpoint was lost"
        # saved with it: a kill may come before the rows are cut. Its config is the one that it was
        # trained by, which tells the next start what has changed
        state["rows"] = self._rows_of(state, Path(path).absolute())
        self.saver.adopt(state, path)
        self.say(f"resume: {path} as asked; later resumes follow this line")
        return state

    def _rows_of(self, state, path):
        """The file with the rows that led to the checkpoint `path`; "" for those of this run."""
        there = path.parent.parent / "metrics.jsonl"
        own = {place.resolve() for place in self.saver.places}
        if there.exists() and path.parent.resolve() not in own:
            return str(there)
        runs = runs_of(checkpoint.candidates(self.checkpoints))
        return os.devnull if runs and checkpoint.facts_of(state)["run"] not in runs else ""

    def _open_saver(self):
        s = self.config["training"]
        options = {
            "mid_epoch_minutes": self.minutes, "mid_epoch_keep": self.mid_keep,
            "checkpoint_interval": s["checkpoint_interval"],
            "checkpoint_keep": s["checkpoint_keep"],
            "mode": evaluate.METRICS,   # a resume may find saves of another best_metric
            "save_patience_minutes": s["save_patience_minutes"], "say": self.say}
        if s["mirror"]:
            return Mirrored(self.checkpoints, mirror=s["mirror"], **options)
        return checkpoint.Checkpointer(self.checkpoints, **options)

    def _check(self, state, where):
        """Refuse a state that is not one of this run: not of training, of other config or data."""
        needed = ("model", "optimizer", "rng", "sampler", "config", "data")
        missing = [key for key in needed if key not in state]
        if missing:
            raise Refused(f"{where} is no training checkpoint: it lacks {', '.join(missing)}")
        config = state["config"]
        tables = [state["model"], state["optimizer"], state["sampler"], config]
        tables.append(config.get("training") if isinstance(config, dict) else None)
        if not all(isinstance(table, dict) for table in tables):
            raise Refused(f"{where} is no training checkpoint of this program: its config, model, "
                          "optimizer or sampler is of another form")
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

    def _compared_with_best(self, stopping):
        """Early stopping compares with the best.pt of the line that goes on, as the saver does."""
        if stopping["metric"] != self.config["training"]["best_metric"]:
            return stopping             # the best starts anew
        anew = {"value": None, "tie": None, "epoch": 0, "waited": 0}
        try:
            facts = checkpoint.peek(self.saver.best_path)
        except (FileNotFoundError, checkpoint.CorruptCheckpoint):
            self._tell_lost_best(stopping, None, "starts anew")
            return stopping | anew
        metric = facts["metric"] or {}
        if metric.get("rules", self.rules) != self.rules:
            self.say("resume: evaluation settings changed: best.pt was measured by other rules, so "
                     "the best starts anew")
            return stopping | anew
        if metric.get("name") != stopping["metric"]:
            return stopping | anew
        value, epoch = metric["value"], facts["epoch"]
        self._tell_lost_best(stopping, value, f"is now that of epoch {epoch}")
        return stopping | {"value": value, "tie": metric.get("tie"), "epoch": epoch}

    def _tell_lost_best(self, stopping, value, now):
        """Say so where the run has had a better best than that of `value`, the one that is left."""
        way = evaluate.METRICS[stopping["metric"]]
        if stopping["value"] is not None and checkpoint.better(stopping["value"], value, way):
            self.say(f"resume: best.pt, of epoch {stopping['epoch']}, is in no place any more: the "
                     f"best {now}")

    def _cut_records(self):
        """The effective config, and the metrics cut back to the resumed step."""
        text = yaml.safe_dump(self.config, sort_keys=False)
        checkpoint.sweep_temps(self.directory)
        checkpoint.atomic_write(self.directory / "config.yaml", [text.encode()])
        if not self.state:
            return MetricsFile(self.directory, 0, True, self.own, self.say)
        facts = checkpoint.facts_of(self.state)
        ended = facts["kind"] == "epoch" or not self.state["batch"]
        copies = [place.parent / "metrics.jsonl" for place in self.saver.places[1:]]
        rows = self.state.get("rows")
        others = bool(rows and os.path.exists(rows))    # those here are of another run
        if others:
            copies = [Path(rows)]
        # a line that was left, and is gone back to, has its rows there
        path = Path(rows) if others else self.directory / "metrics.jsonl"
        copies.append(path.with_name(ABANDONED))
        step = facts["global_step"]
        metrics = MetricsFile(self.directory, step, ended, self.own, self.say, copies, others,
                              facts)
        if step - metrics.ends >= self.state["config"]["training"].get("log_every", math.inf):
            self.say(f"metrics.jsonl has no rows of steps {metrics.ends + 1} to {step}")
        metrics.event("resume", self.saver.resumed, facts)
        return metrics

    def own(self):
        """Whether the run's path still leads to the folder that this process holds."""
        try:
            return self.saver.is_own_directory()
        except OSError as error:
            # no longer held: another start may be there already. Else writing fails by itself
            return error.errno != errno.EBADF

    @property
    def newest(self):
        """The folder of the newest states: the second copy's as long as the home takes none."""
        return self.saver.places[0]

    def is_best(self, value, tie):
        """(whether such a validation is the best so far, its measurement)."""
        name = self.config["training"]["best_metric"]
        measured = checkpoint.measurement(value, name, tie, self.rules)
        return self.saver.is_best(measured)

    def write(self, **row):
        """A row of metrics.jsonl, with the first save that it leads to: in_line knows it again."""
        self.metrics.write(**row, save=[self.saver.start, self.saver.counter + 1])

    def save_mid(self, state, since, last=False):
        self.metrics.flush()
        return self.saver.save_mid(state, since, last)

    def save_epoch(self, state, value, tie, since):
        self.metrics.flush()
        name = self.config["training"]["best_metric"]
        self.saver.save_epoch(state, value, name, tie, self.rules, since)

    def secure_records(self, directory):
        """In the writer thread, before a checkpoint goes to `directory`: at home, or in the second
        copy alone. Each try of a save that fails again and again is progress too."""
        self.watch.progressed("save")
        if directory == self.checkpoints:
            self.metrics.sync()
        else:
            self.metrics.complete(directory.parent / self.metrics.path.name)

    def saved(self, path):
        """In the writer thread, once a checkpoint is durable."""
        self.watch.progressed("save")
        self.last_save = f"{path.name} at {time.strftime('%H:%M:%S')}"
        self.metrics.event("save", path, seconds=self.saver.blocked)
        if self.hook:
            self.hook(path)

    def close(self):
        try:
            self.saver.close()
        except checkpoint.SaveFailed as error:
            self.say(f"stopped: {error.strerror}")
        finally:
            self.metrics.close()


def holds_checkpoints(directory):
    return bool(checkpoint.checkpoints(directory))


def has_run(config):
    """Whether the run directory, or its mirror, holds checkpoints."""
    try:
        return any(holds_checkpoints(run / "checkpoints") for run in run_folders(config))
    except OSError as error:
        raise fault(error, run_directory(config)) from None


def finds_run(config, group):
    """Whether the main process has a run to go on from. Raises Refused where another one has it
    alone: on another machine, where the main process was before."""
    found = group.gather(group.together(lambda: has_run(config)))
    if True in found and not found[0]:
        raise Refused(f"{run_directory(config)}: process {found.index(True)} finds checkpoints in "
                      f"its own, and process 0, which saves, finds none: share one results folder "
                      f"between the machines, or have process 0 on the one that has it")
    return found[0]


def move_aside(directory, say, second=None):
    """Rename a run's folder, and its second copy, to NAME.1, or the next number that is free in
    both places; both or none. Of a link, that of the checkpoints too, the folder that it leads to
    is renamed, and the new run goes there, to the same disk. Raises InUse where a process works
    there, Refused where a folder cannot be renamed."""
    # the second copy first: an empty home beside it would resume the old run from it
    folders = [Path(folder) for folder in (second, directory) if folder and Path(folder).is_dir()]
    places = [folder.resolve() if folder.is_symlink() else folder for folder in folders]
    linked = {place: (place / "checkpoints").resolve() for place in places
              if (place / "checkpoints").is_symlink()}
    number = 1
    while any(os.path.lexists(f"{folder}.{number}")
              for folder in (*folders, *places, *linked.values())):
        number += 1
    with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                held.enter_context(checkpoint.lock(folder / "checkpoints", say))
        try:
            for place in linked.values():
                os.rename(place, f"{place}.{number}")
                undo.callback(os.rename, f"{place}.{number}", place)
            for folder, place in zip(folders, places):
                os.rename(place, f"{place}.{number}")
                undo.callback(os.rename, f"{place}.{number}", place)
                if place != folder:
                    os.symlink(f"{place}.{number}", f"{folder}.{number}")
                    undo.callback(os.unlink, f"{folder}.{number}")
        except OSError as error:
            raise Refused(f"{folder} cannot be moved aside ({error.strerror}): where it is a mount "
                          f"point, choose another experiment.name") from None
        undo.pop_all()
    for folder, place in zip(folders, places):
        if place != folder:
            place.mkdir()
        if place in linked:
            relink(place, number, linked[place])
        say(f"moved the old run aside: {folder} -> {folder}.{number}")


def relink(place, number, target):
    """The checkpoints of the run at `place` lay in `target`, by a link: those of the run that was
    moved aside are `target`.number now, and those of the new one go to a new `target`."""
    old = Path(f"{place}.{number}", "checkpoints")
    old.unlink()
    old.symlink_to(f"{target}.{number}")
    target.mkdir()
    place.mkdir(exist_ok=True)
    (place / "checkpoints").symlink_to(target)


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


class MetricsFile:
    """metrics.jsonl, saves.jsonl and TensorBoard of one run directory. metrics.jsonl is the truth:
    a resume cuts it back to the resumed step and writes TensorBoard anew from it, so no step stands
    twice in either.

    step        the resumed one; rows beyond it go to metrics.abandoned.jsonl
    ended       the epoch ended with it, so that its validation row stays too
    own()       whether the directory's path still leads to the folder of this run
    copies      other files like metrics.jsonl; their rows replace those that are lost
    others      the rows here are of another run: none of them stays
    line        facts of the resumed state: rows of a line that it does not come from go too
    ends        the step of the last row that a resume found, 0 for none"""

    def __init__(self, directory, step, ended, own, say, copies=(), others=False, line=None):
        self.directory, self.path, self.say = directory, directory / "metrics.jsonl", say
        self.own, self.line = own, line
        self.pending = []               # lines that a full or dead disk refused
        # lines of this process, for a copy that lags behind a disk that dies
        self.newest = collections.deque(maxlen=10_000)
        kept, dropped = self._parted(self.path, -1 if others else step, ended)
        if dropped:                     # trained again, or of a line that --resume FILE left
            append_rows(directory / ABANDONED, dropped)
        for copy in copies:
            kept = self._completed(kept, copy, step, ended)
        kept.sort(key=lambda row: (row["step"], row["kind"]))
        self.ends = max((row["step"] for row in kept), default=0)
        # of the file when it was last written
        self.size = checkpoint.atomic_write(self.path, [as_lines(kept)])
        self.file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self.charts = Charts(directory / "tensorboard", kept, say)

    def _parted(self, path, step, ended):
        """Rows of the file at `path` that a resume at `step` keeps, and the others. Where it has
        two of one step, as of a second copy that a line which was left had reached, the later."""
        kept, dropped = {}, []
        for row in self._rows(path):
            place = row["kind"], row["step"]
            before = row["step"] < step
            at = row["step"] == step and (ended or row["kind"] == "train")
            if not (before or at) or not self._leads_here(row, path):
                dropped.append(row)
                continue
            if place in kept:
                dropped.append(kept.pop(place))
            kept[place] = row
        return list(kept.values()), dropped

    def _leads_here(self, row, path):
        """Whether the resumed state comes from that row; one of an older version names no save, and
        counts unless it was set aside."""
        if self.line is None or "save" not in row:
            return path.name != ABANDONED
        start, number = row["save"]
        return checkpoint.in_line(self.line | {"start": start, "save_counter": number}, self.line)

    def _completed(self, kept, second, *place):
        """`kept`, with rows of the second copy for those that it lacks."""
        there = {(row["kind"], row["step"]) for row in kept}
        lost = []
        with contextlib.suppress(OSError):      # out of reach, as the copying thread says
            lost = [row for row in self._parted(second, *place)[0]
                    if (row["kind"], row["step"]) not in there]
        if not lost:
            return kept
        self.say(f"metrics.jsonl lacked {how_many(len(lost), 'row')}: taken from {second}")
        return kept + lost

    def _rows(self, path):
        for row in read_json_lines(path, self.say):
            try:
                row |= {"step": int(row["step"]), "kind": str(row["kind"])}
                if "save" in row:
                    row["save"] = [str(row["save"][0]), int(row["save"][1])]
                yield row
            except (ValueError, TypeError, LookupError, OverflowError):
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
            self._follow_file()
            while self.pending:
                self.size = append(self.file, self.pending[0].encode())
                del self.pending[0]
        except OSError as error:
            waiting = how_many(len(self.pending), "row")
            self.say(f"metrics.jsonl: {error.strerror}: {waiting} kept in memory")

    def _follow_file(self):
        """Another program may have put a new file in the place of this one, as an editor does, or
        emptied it. The rows go to what lies there, completed with those of this process."""
        os.stat(self.directory)             # gone: said as that, and the rows wait
        there = self.path.stat() if self.path.exists() else None
        mine = os.fstat(self.file)
        replaced = there is None or not os.path.samestat(there, mine)
        if replaced and not self.own():
            return                      # the whole folder was moved away: its file goes with it
        if replaced or mine.st_size < self.size:
            what = "replaced" if replaced else "cut"
            self.say(f"metrics.jsonl was {what} by another program: rows that it lacks of this "
                     f"process are written to it again")
            rows = [line for line in self.newest if line not in self.pending]
            self.size = add_rows(self.path, rows)
            os.close(self.file)
            self.file = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def complete(self, path):
        """Add what it lacks to `path`, a copy of metrics.jsonl elsewhere: of the file where it can
        be read, and of the newest rows."""
        rows = []
        with contextlib.suppress(OSError):      # the disk may be dead
            rows += whole_lines(self.path) if self.own() else []
        with tolerated(self.say, path, "the second copy lacks the newest rows"):
            add_rows(path, [*rows, *self.newest])

    def event(self, kind, path, facts=None, seconds=0.0):
        """A line of saves.jsonl: where a save or a resume stands, by `facts` or by the file."""
        if not self.own():
            return
        with tolerated(self.say, "saves.jsonl", f"this {kind} is not listed"):
            facts = facts or checkpoint.peek(path)
            row = {"kind": kind, "file": Path(path).name, "epoch": facts["epoch"],
                   "batch": facts["batch"], "step": facts["global_step"], "seconds": seconds,
                   "time": time.time()}
            append_rows(self.directory / "saves.jsonl", [row])

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


def without_tensorboard(facts, shown=threading.excepthook):
    """threading.excepthook; the error of TensorBoard's thread is said once, at the next row."""
    if type(facts.thread).__name__ != "_AsyncWriterThread":
        shown(facts)


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
        threading.excepthook = without_tensorboard
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


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def append_rows(path, rows):
    """Add the dicts `rows` to the file at `path`."""
    with open(path, "a+b") as file:
        append(file.fileno(), as_lines(rows))


def append(file, lines):
    """Add whole lines, as bytes, to the open file; returns its size. Half a line that a full disk
    or a power cut has left at its end goes."""
    size = os.lseek(file, 0, os.SEEK_END)
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.ftruncate(file, os.pread(file, size, 0).rfind(b"\n") + 1)
    while lines:
        lines = lines[os.write(file, lines):]
    return os.lseek(file, 0, os.SEEK_END)
