"""Two faults at a time on a real training run, in both orders: `python bench/soak.py --pairs`;
three at a time, drawn at random: `--triples COUNT`.

A run with a second copy on another disk, a snapshot after every step, validates its first epoch,
the best one. A process trains it on by plain --resume; while it waits between two steps the first
fault strikes, after some steps more the second. What both leave meets one more start while they
stand; then what can be mended is mended (room is made, the mirror mounted again), and plain
--resume goes on to the end. A kill is SIGKILL before a random system call of a start on either
disk; an older home meets no live process, so that one is killed first.

The end is right where weights, best.pt and rows are bit-identical to the run never stopped, in both
places. A start may refuse instead: exit 1 or 2 with one line on stderr, every checkpoint as it was,
or the state of its place further: a start may bring the newest one home before it meets what it
refuses. The next start tries again with the faults mended. Anything else counts as different.

A start may begin anew, and must say so, only where no state of the run can be found: neither home
nor mirror holds a checkpoint file. Here that is a home that was lost or moved away while the mirror
is out of reach. The run then ends as ever at home; the mirror that comes back holds the run of
before and is refused until it is moved away, as the line says.

An older home that is put back while the mirror is out of reach goes on in a line of its own, like a
copy of the run: where the mirror then comes back with the states of another line, nothing newer may
be overwritten there, which each start says. The end is compared at home (`apart` in the table).

A best epoch that ends while home is lost and the mirror out of reach is saved below its mount point
alone, or nowhere. Where the mirror comes back over it, the next start says that this best.pt is in
no place any more; the weights at the end are compared (`lost`).

The file of a bad sector is unreadable under all of its names (a link to /proc/self/mem: EIO from
the kernel, whoever reads). It stays so to the end, unless the run is refused for it. No flip
strikes the last copy of best.pt.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path

import checkpoint
import tracer
import train
from soak import differences, exit_code, fork, prepare, train_on
from crash import warm
from eeg import corpora, synth
from scoring import pictures                # noqa: F401 - or every fork imports it

EPOCHS, AT_REST = 3, 8                      # of the whole run; boundaries before the first fault
FILE = 2_010_000                            # bytes of a checkpoint, about
CALLS = 8000                                # system calls of a start among which it is killed
SIZES = {"data__stride_seconds": 10.0, "training__save_patience_minutes": 0.03}
NO_THREAD = 1 << 46                         # bytes of stack, more than a process can map


class Process:
    """A start of `run` by plain --resume that waits at each boundary: after a step, or a validated
    recording. Its streams go to files; `before` is what lay there when it began."""

    def __init__(self, run):
        self.run, self.before, self.streams = run, run.files(), run.new_streams()
        self.steps, self.waits = 0, False
        heard, told = os.pipe(), os.pipe()
        self.pid = fork(run.results, lambda: hold(run.threads, heard[1], *told), *self.streams)
        os.close(heard[1])
        os.close(told[0])
        self.heard, self.told = heard[0], told[1]

    def step(self):
        """Up to the next boundary. False where it ended instead."""
        if self.waits:
            os.write(self.told, b"." if self.run.threads else b"n")
        self.waits = os.read(self.heard, 1) == b"."
        if self.waits and not self.steps:
            self.folder = self.run.home.stat().st_ino
        self.steps += self.waits
        return self.waits

    def reap(self):
        os.close(self.heard)
        os.close(self.told)
        code = exit_code(self.pid)
        self.run.judge(code, self.before, self.steps, self.streams)
        return code


def hold(threads, told, heard, unused):
    """In the child: wait at each boundary for a byte; "n" means no more threads."""
    os.close(unused)                        # else it would not learn of the end of the bench
    real = train.Trainer.boundary

    def boundary(trainer):
        os.write(told, b".")
        order = os.read(heard, 1)
        if order == b"n":
            no_threads()
        if not order:
            os._exit(1)
        return real(trainer)
    train.Trainer.boundary = boundary
    return no_threads() if not threads else []


def no_threads():
    threading.stack_size(NO_THREAD)
    return []


class Run:
    """The run of one pair: `results`, a small disk of its own with the run's folder `home`, and
    `nas`, another one, with its `copy`."""

    def __init__(self, temp, rng, pair=()):
        self.temp, self.rng = temp, rng
        self.loses_home = {"disk gone", "moved", "older home"} & set(pair)
        self.may_lose_best = self.loses_home or len(pair) > 2
        self.results, self.nas = temp / "disk", temp / "nas"
        self.home, self.copy = self.results / "t", self.nas / "t"
        self.child = None                   # the Process that lives
        self.starts = 0
        self.threads = True                 # whether a process gets any
        self.damaged = set()                # saves that a fault has damaged
        self.kept = {}                      # unreadable file: where its bytes are
        self.refused, self.wrong = [], []   # lines
        self.anew = self.apart = self.lost = False

    def files(self):
        """{path: (its save and step, its bytes, hashed), None where it is unreadable} of every
        checkpoint, but for those that are damaged: their save may come from the other place at any
        start."""
        return {path: None if path.is_symlink() else (reached(path), hash(path.read_bytes()))
                for place in (self.home, self.copy)
                for path in checkpoint.checkpoints(place / "checkpoints")
                if not checkpoint.damage_of(path)}

    def new_streams(self):
        self.starts += 1
        return [self.temp / f"{self.starts}.{name}" for name in ("out", "err")]

    def train(self, steps):
        """Have a process train on, a new one where none lives. Its exit code, None where it waits
        for more."""
        self.child = self.child or Process(self)
        for _ in range(steps):
            if not self.child.step():
                ended, self.child = self.child, None
                return ended.reap()
        return None

    def end(self):
        """SIGKILL, where a process lives."""
        if self.child:
            os.kill(self.child.pid, signal.SIGKILL)
            self.child.reap()
            self.child = None

    def judge(self, code, before, steps, streams):
        """Note what no start may do: how it ended, and what is left of the files of `before`."""
        out, err = (path.read_text(errors="replace") for path in streams)
        if code not in (0, 1, 2, -signal.SIGKILL) or "Traceback" in out + err:
            self.wrong.append(f"exit code {code}: {(out + err)[-3000:]}")
        if code in (1, 2) and not steps:
            self.refused += err.splitlines()
            if len(err.splitlines()) != 1 or not err.startswith("train.py: "):
                self.wrong.append(f"exit code {code}, not in one line: {out[-1500:]}{err}")
            after = self.files()
            changed = [str(path) for path, was in before.items() if not held(path, was, after)]
            if changed:
                self.wrong.append(f"{err.strip()}: and changed {', '.join(changed)}")
        self.lost |= "is in no place any more" in out
        self.apart = "nothing is written there" in out
        if "starting fresh" in out:
            self.anew = True
            if before:
                self.wrong.append(f"began anew beside {', '.join(map(str, before))}")


def reached(path):
    facts = checkpoint.peek(path)
    return facts["save_counter"], facts["global_step"]


def held(path, was, after):
    """Whether the files `after` hold what the checkpoint at `path` `was`, or its place a state that
    is further; best.pt itself, which no other file stands for."""
    if after.get(path, 0) == was:
        return True
    here = [now for other, now in after.items()
            if now and (other == path or path.name != "best.pt" and other.parent == path.parent)]
    return was is not None and any(now[0] > was[0] for now in here)


# ---- the faults ----

def kill_at_call(run):
    run.end()
    before, streams = run.files(), run.new_streams()
    hook = list if run.threads else no_threads
    traced = tracer.Trace(lambda: os._exit(train_on(run.results, hook, *streams)),
                          [str(run.home), str(run.copy)], at=run.rng.randrange(1, CALLS))
    code = {"killed": -signal.SIGKILL, "done": 0}.get(traced.outcome, traced.outcome)
    run.judge(code, before, 0, streams)


def fill(run):
    """The home's disk is full, with room for no file, or for one."""
    gap, filler = run.results / "gap", run.results / "filler"
    empty(run)
    gap.write_bytes(bytes(run.rng.choice([0, FILE * 3 // 2])))
    with open(filler, "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    gap.unlink()


def empty(run):
    (run.results / "filler").unlink(missing_ok=True)


def lose_home(run):
    if run.home.exists():
        os.rename(run.home, run.results / "lost")
        shutil.rmtree(run.results / "lost")


def unmount_mirror(run):
    if not run.nas.with_name("away").exists():
        run.nas.rename(run.nas.with_name("away"))


def mount_mirror(run):
    """What was written below the mount point meanwhile is out of sight."""
    away, below = run.nas.with_name("away"), run.nas.with_name("below")
    if away.exists():
        if run.nas.exists():
            run.nas.rename(below)           # at once: a run may be writing there
        away.rename(run.nas)
        shutil.rmtree(below, ignore_errors=True)


def put_older_home_back(run):
    run.end()
    copied = ["cp", "-a", run.temp / "older", run.home]
    shutil.rmtree(run.home, ignore_errors=True)
    if subprocess.run(copied, stderr=subprocess.DEVNULL).returncode:    # another fault fills the disk
        empty(run)
        shutil.rmtree(run.home, ignore_errors=True)
        subprocess.run(copied, check=True)


def names_of_one(run, destroyed=False):
    """All paths of one file, the newest state or best.pt, of home or mirror; not of best.pt where
    it is to be destroyed and the other place may lose its own."""
    places = [place for place in (run.home, run.copy) if (place / "checkpoints").exists()]
    run.rng.shuffle(places)
    for place in places:
        found = [c for c in checkpoint.candidates(place / "checkpoints")
                 if c.facts and c.save not in run.damaged]
        best = [c.save for c in found if c.kind == "best" and destroyed and run.may_lose_best]
        found = [c for c in found if c.save not in best]
        if found:
            one = run.rng.choice([found[0], found[-1]])
            try:
                names = [c.path for c in found if os.path.samefile(c.path, one.path)]
            except FileNotFoundError:       # rotated away meanwhile
                return names_of_one(run, destroyed)
            run.damaged.add(one.save)
            return names
    return []


def make_unreadable(run):
    for path in names_of_one(run):
        run.kept[path] = run.temp / f"kept_{len(run.kept)}"
        shutil.move(path, run.kept[path])
        path.symlink_to("/proc/self/mem")


def make_readable(run):
    for path, kept in run.kept.items():
        if path.is_symlink():
            path.unlink()
            shutil.move(kept, path)


def flip(run):
    for path in names_of_one(run, destroyed=True)[:1]:
        with open(path, "r+b") as file:
            at = run.rng.randrange(path.stat().st_size)
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << run.rng.randrange(8)]), at)


def refuse_threads(run):
    run.threads = False


def allow_threads(run):
    run.threads = True


def move_home(run):
    if run.home.exists() and not (run.results / "moved").exists():
        os.rename(run.home, run.results / "moved")


def move_home_back(run):
    if (run.results / "moved").exists() and not run.home.exists():
        os.rename(run.results / "moved", run.home)


def start_second(run):
    """While the first lives, paused. It trains on where that one's folder is gone from its path."""
    run.train(1)
    first, run.child = run.child, None
    if first:
        os.kill(first.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, first.pid, os.WSTOPPED)
    there = first and run.home.exists() and first.folder == run.home.stat().st_ino
    code = run.train(3)
    run.end()
    if there and code not in (1, 2):
        run.wrong.append("two processes trained in one folder")
    if first:
        os.kill(first.pid, signal.SIGCONT)
    run.child = first


Fault = namedtuple("Fault", "strike mend before", defaults=(lambda run: None, lambda run: None))
FAULTS = {
    "kill": Fault(kill_at_call),
    "disk full": Fault(fill, empty),
    "disk gone": Fault(lose_home),
    "mirror gone": Fault(unmount_mirror, mount_mirror),
    "mirror back": Fault(mount_mirror, mount_mirror, before=unmount_mirror),
    "older home": Fault(put_older_home_back),
    "EIO": Fault(make_unreadable),
    "flip": Fault(flip),
    "no threads": Fault(refuse_threads, allow_threads),
    "moved": Fault(move_home, move_home_back),
    "second start": Fault(start_second),
}


# ---- the sweep ----

def meet(run, pair):
    """Have `run` meet both faults, and train it to its end."""
    for fault in pair:
        fault.before(run)
    for fault in pair:
        run.train(run.rng.randrange(1, 4))
        fault.strike(run)
    run.train(run.rng.randrange(1, 4))
    run.end()
    run.train(3)                            # a start while both stand
    run.end()
    for fault in pair:
        fault.mend(run)
    for _ in range(4):
        refused = len(run.refused)
        code = run.train(1000)
        if code == 0:
            return
        if run.refused[refused:] and run.kept:
            make_readable(run)
        if run.anew and run.copy.exists():  # as its line says
            run.copy.rename(run.copy.with_name("other"))
    run.wrong.append(f"no end, exit code {code}: {run.refused[-1:]}")


def lay_out(temp, corpus):
    """The run never stopped, in temp/reference, and the run at rest: home and mirror in temp/rest,
    home as it was before in temp/older. Its disk is a tmpfs of 64 MB; False where none can be
    mounted."""
    warm()
    reference = prepare(corpus, temp / "reference", EPOCHS, **SIZES)
    if exit_code(fork(reference)):
        sys.exit((reference / "log.txt").read_text()[-4000:])
    prepare(corpus, temp / "disk", EPOCHS, training__mirror=str(temp / "nas"), **SIZES)
    (temp / "rest").mkdir()
    (temp / "disk/config.yaml").rename(temp / "rest/config.yaml")
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs",
                                  temp / "disk"], capture_output=True).returncode
    reset(temp)
    run = Run(temp, random.Random(0))
    run.train(AT_REST // 2)
    shutil.copytree(run.home, temp / "older")
    run.train(AT_REST // 2)
    run.end()
    for place in (run.home, run.nas):
        subprocess.run(["cp", "-a", place, temp / "rest"], check=True)
    return mounted


def reset(temp):
    """Everything as it was at rest."""
    for path in [*(temp / "disk").iterdir(), *temp.glob("*.out"), *temp.glob("*.err"),
                 *temp.glob("kept_*"), temp / "nas", temp / "away"]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (temp / "nas").mkdir()
    for name, target in (("config.yaml", "disk"), ("t", "disk"), ("nas", ".")):
        if (temp / "rest" / name).exists():
            subprocess.run(["cp", "-a", temp / "rest" / name, temp / target], check=True)
    (temp / "disk/mirror").symlink_to(temp / "nas")


def tried(temp, pair, rng):
    """What became of a pair, "equal", "refused" (and equal at last), "anew" or "different"; and the
    lines that say why."""
    reset(temp)
    run = Run(temp, rng, pair)
    meet(run, [FAULTS[name] for name in pair])
    run.end()
    found = differences(run.results, temp / "reference")
    apart = run.apart and "older home" in pair
    if run.anew or apart:                   # the mirror holds another run or line, as it should
        found = [line for line in found if not line.startswith("mirror")]
    lost = run.lost and run.loses_home and {"mirror gone", "mirror back"} & set(pair)
    if lost:
        found = [line for line in found if line.startswith(("t/last.pt: model", "t/last.pt: opt"))]
    if run.wrong or found:
        return "different", run.wrong + found
    kinds = {"anew": run.anew, "apart": apart, "lost": lost, "refused": run.refused, "equal": True}
    return next(kind for kind, true in kinds.items() if true), run.refused


def sweep(temp, corpus, pairs, seed=0):
    """{pair: what became of it}."""
    results = {}
    try:
        mounted = lay_out(temp, corpus)
        for pair in pairs:
            if "disk full" in pair and not mounted or "kill" in pair and not tracer.available():
                continue
            began = time.monotonic()
            results[pair], why = tried(temp, pair, random.Random(f"{seed} {pair}"))
            print(f"{', '.join(pair)}: {results[pair]}, {time.monotonic() - began:.0f} s", *why,
                  sep="\n    ", file=sys.stderr, flush=True)
    finally:
        subprocess.run(["umount", "-l", temp / "disk"], capture_output=True)
    return results


def print_table(results):
    """A row for each first fault: what became of it with each second one, and how often."""
    counted = ("equal", "refused", "anew", "apart", "lost", "different")
    print(f"| first | {' | '.join(FAULTS)} | tried | {' | '.join(counted)} |")
    print("|---" * (len(FAULTS) + 2 + len(counted)) + "|")
    for first in FAULTS:
        row = {second: results[first, second] for second in FAULTS if (first, second) in results}
        numbers = [len(row), *(list(row.values()).count(kind) for kind in counted)]
        cells = [first, *(row.get(second, "") for second in FAULTS), *map(str, numbers)]
        print(f"| {' | '.join(cells)} |")


def main(pairs, seed, triples=0):
    """The table of `pairs`, of every one where there are none; or what became of so many `triples`.
    """
    if triples:
        rng = random.Random(seed)
        pairs = [tuple(rng.choices(list(FAULTS), k=3)) for _ in range(triples)]
    pairs = pairs or [(first, second) for first in FAULTS for second in FAULTS]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        temp = Path(folder)
        synth.synth(temp / "edf", hours=0.35, patients=4, seed=3)
        corpora.import_corpus(temp / "edf", temp / "h5", say=lambda line: None)
        results = sweep(temp, temp / "h5", pairs, seed)
    if not triples:
        print_table(results)
    counts = Counter(results.values())
    print(f"\n{len(results)} {'triples' if triples else 'pairs'} tried: {counts['different']} ended different, "
          f"{counts['refused']} refused in one line until it was mended and ended equal, "
          f"{counts['anew']} began anew and said so, {counts['apart']} left a mirror of another line "
          f"as it was, {counts['lost']} lost a best epoch that neither place had and said so; {time.monotonic() - began:.0f} s")
    return 1 if counts["different"] else 0
