"""What lies on the disk of each run, what a resume would take, and what can go.

    python checkpoint.py ls results/            a line a run
    python checkpoint.py ls results/v3          every file of one run, and of its second copy
    python checkpoint.py clean results/ [--yes]

`ls` writes nothing. `clean` names what no resume needs; only with --yes it writes, and removes,
never of a run in use.
"""
import collections
import contextlib
import os
import socket
import stat
import time
from pathlib import Path

import yaml

import checkpoint
from checkpoint import KINDS, Candidate, candidates, checkpoints, megabytes
from eeg import disk
from eeg.console import how_many, rounded
from run.mirror import latest_of, usable


def command(args):
    """`ls` or `clean` as checkpoint.py's command line asks; returns the exit code."""
    # each once, also where a shell names every file of it
    folders = list({folder.resolve(): folder for path in map(Path, args.paths)
                    for folder in find_runs(path)}.values())
    if not folders:
        print(f"no checkpoints in {' '.join(args.paths)}")
        return 1
    if args.command == "clean":
        freed = sum(clean(folder, args.yes) for folder in folders)
        print(f"{'freed' if args.yes else 'to free'} in all: {megabytes(freed)}"
              + ("" if args.yes or not freed else "; --yes removes the files"))
        return 0
    for folder in folders:
        if len(folders) == 1 or args.verbose:
            list_run(folder)
        else:
            print(summary(folder))
    return 0


def find_runs(path):
    """Folders at or below `path`, or that of a file, that hold checkpoints, links followed, each
    once; those that may not be read are named and left out."""
    if not path.is_dir():
        return [path.parent] if checkpoints(path.parent) else []
    found = checkpoint.folders_below(
        path, lambda error: print(f"{error.filename}: cannot be read: {error.strerror}"))
    return [Path(folder) for folder, _ in found if checkpoints(folder)]


def second_place(directory):
    """Where the run of `directory` has its second copy by its config.yaml, or None."""
    run = Path(directory).absolute().parent
    try:
        mirror = yaml.safe_load((run / "config.yaml").read_text())["training"]["mirror"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    place = Path(mirror, run.name, "checkpoints") if mirror else None
    return place if place != Path(directory).absolute() else None


def taken_by_resume(directory, second, say=lambda line: None):
    """The Candidate that a resume takes, or None; says why."""
    found = candidates(directory)
    if second:
        try:
            found = checkpoint.in_order(found + usable(found, candidates(second, labelled=True)))
        except OSError as error:
            say(f"second copy: cannot be read now ({error.strerror})")
    return checkpoint.choose(found, checkpoint.verify, say)[0]


def in_use_text(directory):
    """Which other live process holds the directory; "" where none does. Writes nothing."""
    holder = disk.holder(directory)
    mine = f"process {os.getpid()} on {socket.gethostname()}"
    return f"in use by {holder}" if holder not in ("", mine) else ""


def old_run(directory):
    """Whether --fresh has moved this run aside: its folder is NAME.NUMBER, beside NAME."""
    run = Path(directory).absolute().parent
    return run.suffix[1:].isdigit() and run.with_suffix("").is_dir()


def summary(directory):
    """One line of a run: newest state, best metric, size, what a resume takes."""
    newest = latest_of(candidates(directory))
    best = Candidate(directory / KINDS["best"])
    metric = best.facts and best.facts["metric"]
    files, size = disk_use(directory)
    try:
        chosen = taken_by_resume(directory, second_place(directory))
        resume = f"a resume takes {chosen.label}" if chosen else "nothing to resume"
    except OSError as error:
        resume = f"{error.filename} cannot be read now ({error.strerror})"
    parts = [
        f"newest: {newest}" if newest else "no sound checkpoint",
        f"best: {metric['name']} {rounded(metric['value'])}" if metric else "no best yet",
        f"{how_many(files, 'file')}, {megabytes(size)}", resume, in_use_text(directory),
        "an old run, moved aside" if old_run(directory) else ""]
    return f"{directory}: " + "; ".join(part for part in parts if part)


def disk_use(directory):
    """(files, bytes on the disk) of the checkpoints of a directory: a file of several names counts
    once."""
    sizes = {}
    for path in checkpoints(directory):
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            continue                        # rotated away meanwhile
        sizes[info.st_ino] = info.st_size
    return len(sizes), sum(sizes.values())


def list_run(directory, say=print):
    """One run and its second copy as tables; the file a resume takes is marked, with the reason
    below. Writes nothing."""
    directory, second = Path(directory), second_place(directory)
    notes = []
    chosen = None
    try:
        chosen = taken_by_resume(directory, second, notes.append)
        if not chosen:
            notes.append("resume: nothing usable: a fresh start")
    except OSError as error:
        notes.append(f"resume: {error.filename} cannot be read now ({error.strerror}): no resume "
                     f"goes past it")
    busy = in_use_text(directory)
    say(f"\n{directory}" + (f"  ({busy})" if busy else ""))
    _table(directory, chosen, say)
    if second:
        say(f"  second copy: {second}")
        _table(second, chosen, say)
    for note in notes:
        if not note.startswith("resume: older"):           # older and sound: the table shows them
            say(f"    {note}")


def _table(directory, chosen, say):
    """The files of a directory, newest save first, and what they take."""
    say(f"    {'file':<26} {'epoch':>5} {'batch':>7} {'step':>9}  {'metric':<22} {'size':>10} "
        f"{'age':>7}  health")
    try:
        found = [Candidate(path) for path in checkpoints(directory)]
    except OSError as error:
        say(f"    cannot be read: {error.strerror}")
        return
    sound = [c for c in found if c.facts]
    sound.sort(key=lambda c: (c.order, c.path.name), reverse=True)
    first, count = {}, 0
    for c in sound + [c for c in found if not c.facts]:
        try:
            info = os.lstat(c.path)
        except FileNotFoundError:
            continue                        # rotated away meanwhile
        twin = first.setdefault(info.st_ino, c.path.name)
        health = f"= {twin}" if twin != c.path.name else ""
        if not health:                      # what a resume takes has just been read whole
            health = "ok" if chosen and c.path == chosen.path else checkpoint.health(c.path)
        if health == "gone":
            continue
        count += 1
        facts = c.facts or dict.fromkeys(checkpoint.PROGRESS, "-") | {"metric": None}
        metric = facts["metric"]
        metric = f"{metric['name']} {rounded(metric['value'])}" if metric else "-"
        mark = "->" if chosen and c.path == chosen.path else "  "
        say(f" {mark} {c.path.name:<26} {facts['epoch']:>5} {facts['batch']:>7} "
            f"{facts['global_step']:>9}  {metric:<22} "
            f"{megabytes(info.st_size):>10} {age(time.time() - info.st_mtime):>7}  {health}")
    files, size = disk_use(directory)
    say(f"    {how_many(count, 'name')}, {how_many(files, 'file')} on disk, "
        f"{megabytes(size)} in all")


def age(seconds):
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    # of another machine's clock, or this one's before it was set
    return "ahead" if seconds <= -1 else f"{max(0, seconds):.0f} s"


def clean(directory, yes):
    """Name, or with `yes` remove, what no resume of one run needs; returns the bytes of it."""
    busy, held = "", contextlib.nullcontext()
    try:
        if yes:                         # to the end: no run may begin between look and removal
            held = checkpoint.lock(directory)
        elif use := in_use_text(directory):     # a look writes nothing
            busy = f"{directory} is {use}: stop it first"
    except checkpoint.InUse as error:
        busy = error.strerror
    if busy:
        print(f"left alone: {busy}")
        return 0
    with held:
        doomed, spared = _removable(directory)
        for path, why in spared:
            print(f"left {path}  ({why})")
        found = [(path, os.lstat(path), why) for path, why in doomed]
        for path, info, why in found:
            print(f"{'removed' if yes else 'would remove'} {path}  "
                  f"{megabytes(info.st_size)}  ({why})")
            if yes:
                os.unlink(path)
        # a name that stays, here or elsewhere, keeps its file
        names = collections.Counter(info.st_ino for _, info, _ in found)
        freed = sum({info.st_ino: info.st_size for _, info, _ in found
                     if info.st_nlink == names[info.st_ino]}.values())
        print(f"{directory}: {how_many(len(doomed), 'file')}, {megabytes(freed)}")
    if old_run(directory):
        print(f"{directory.parent}: a whole old run, moved aside by --fresh: "
              f"{megabytes(disk_use(directory)[1])}; rm -r it when nothing of it is wanted")
    return freed


def _removable(directory):
    """([(path, why)], [(path, why not)]): what no resume needs, and damage that nothing shows to be
    of this format. Raises OSError where a file cannot be read now: it may be needed."""
    doomed = [(path, "temp of a dead process")
              for path in directory.glob(".*.tmp") if checkpoint.is_dead_temp(path)]
    spared = []
    chosen = taken_by_resume(directory, None)
    for c in candidates(directory) if chosen else []:
        health = "ok" if c.path == chosen.path else checkpoint.health(c.path)
        if health.startswith("DAMAGED") and not _ours(c.path):
            spared.append((c.path, f"{health}; it may be another program's"))
        elif health.startswith("DAMAGED"):
            doomed.append((c.path, health))
        elif health.startswith(("FOREIGN", "UNREADABLE")):
            spared.append((c.path, health))
        elif health == "ok" and c.path != chosen.path and c.kind == "mid_epoch":
            doomed.append((c.path, f"older than {chosen.path.name}"))
    return doomed, spared


def _ours(path):
    """Whether a damaged file is of this format by what is left of it, or holds nothing that any
    program could load."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(checkpoint.PAGE)
            file.seek(-min(os.path.getsize(path), 1 << 16), os.SEEK_END)
            tail = file.read()
    except OSError:
        return False
    # torch.save begins with data.pkl
    begins = head.startswith(b"PK\3\4") and head[30:].startswith(b"archive/data/")
    return len(head) < 22 or not any(head) or begins or checkpoint.MAGIC in tail
