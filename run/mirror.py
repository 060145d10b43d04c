"""A second copy of a run: the newest states, best.pt and the records once more, on another disk.

    saver = Mirrored("results/v3/checkpoints", mirror="/mnt/nas")   # the surface of Checkpointer
    state = saver.resume()              # the best of both places; what is newer comes home first

The copy lies in MIRROR/<run>/checkpoints, its records beside it. One function moves files, in both
directions: `sync`. Single files and records come before the newest state, so that a kill in the
middle is done again at the next start, and nothing newer is overwritten by anything older.

Who may write there: each start of a process claims the copy with a file of its own. A process that
finds there the claim of a later start, or a state that its own line has not made, writes nothing
more and says so; training goes on at home.
"""
import contextlib
import errno
import json
import math
import os
import threading
import time
from pathlib import Path

import checkpoint
from checkpoint import GLOBS, NAME, Candidate, Checkpointer, abandoned_name, candidates, in_line

COPIED = {"best": 1, "last": 1, "mid_epoch": 2}     # kind -> newest files of it in the second copy
RECORDS = ("config.yaml", "metrics.jsonl")          # of the run's folder, that go along
CLAIM = ".claim.json"                   # in the second copy: the start that writes there
END_SECONDS = 20.0                      # that a run waits for its second copy, at most
RETRY_SECONDS = 60.0                    # between two tries of a copy that failed


class OtherRun(ValueError):
    """The place of the second copy belongs to another run."""


class OtherLine(OSError):
    """Another start of the same run has written to the second copy."""


def newest_of(found):
    """The Candidate of the latest save, best.pt apart, or None."""
    return next((c for c in found if c.facts and not c.damage and c.kind != "best"), None)


def latest_of(found):
    """The Candidate of the latest save, best.pt too, or None."""
    return max((c for c in found if c.facts), key=lambda c: c.order, default=None)


def runs_of(found):
    return {c.facts["run"] for c in found if c.facts}


def abandoned(facts, line) -> bool:
    """Whether `line` left the one of `facts` because a person asked for it: it went back to a save
    of the start that made `facts`, or of one that they had gone on from at that save or later."""
    history = {start: counter for start, counter, _ in facts["starts"]} | {facts["start"]: math.inf}
    after = [*(start for start, *_ in line["starts"][1:]), line["start"]]
    return facts["run"] == line["run"] and any(
        asked and start in history and history[start] >= counter and following not in history
        for (start, counter, asked), following in zip(line["starts"], after))


def line_that_goes_on(here, there):
    """Of the facts of the newest saves in both places, those that a resume goes on from; None where
    they are of two lines that no order tells apart."""
    for line, other in ((here, there), (there, here)):
        if in_line(other, line) or abandoned(other, line):
            return line
    if any(start == there["start"] for start, _, _ in here["starts"]):
        # the home went on from an older save while this copy was out of reach
        return max(here, there, key=lambda facts: facts["save_counter"])
    return None


def line_of_both(home, there):
    """(line_that_goes_on() by the candidates of both places, or None; the Candidate of `home` that
    counts for it, or None). One of them holds a save."""
    newest = newest_of(there)
    while here := newest_of(home):
        line = line_that_goes_on(here.facts, newest.facts) if newest else here.facts
        if line:
            return line, here
        # the other line may have begun because this save is damaged: then an older one counts
        here.damage = checkpoint.damage_of(here.path)
        if not here.damage:
            return None, here
    return (newest or latest_of(there)).facts, None


def usable(home, there):
    """Those of `there`, the second copy's, that a resume may take beside the candidates `home`."""
    if not newest_of(home):
        return [c for c in there if c.facts]
    line, _ = line_of_both(home, there)
    return [c for c in there if c.facts and line and in_line(c.facts, line)]


def sync(source, target, line, records=(), say=print, full=False, home=False):
    """Copy to the checkpoints folder `target` what it lacks of `source`: the files `records`,
    {path: path of its copy}, then of each kind in COPIED the newest files that `line` has made,
    best.pt first and the newest state last. Each copy is verified before it takes its name; a file
    of `target` that is newer, by its save, stays. full: every byte of best.pt and last.pt there is
    read, and a damaged one replaced. home: a file there that cannot be read now stays, it may be
    newer; so do its records, with the rows of the others. Raises OSError; CorruptCheckpoint where a
    file of `source` is damaged, with the rest copied."""
    there = {c.path.name: c for c in candidates(target)}
    if full:
        _check_all(there, say)
    here = [c for c in candidates(source) if c.facts and not c.damage and in_line(c.facts, line)]
    wanted = []
    for kind, count in COPIED.items():
        files = [c for c in here if c.kind == kind]
        wanted += [c for c in files[:count] if _lacks(there, c, line, home)]
    for record, copy in dict(records).items():
        with contextlib.suppress(FileNotFoundError):
            _copy_record(record, copy, home)
    damage, links = None, bool(wanted) and checkpoint.links_work(target)
    for candidate in sorted(wanted, key=lambda c: (c.kind != "best", c.order)):
        try:
            _copy(candidate, there, target, line, links)
        except checkpoint.CorruptCheckpoint as error:       # it must not keep the others back
            say(f"mirror: left {candidate.path}: {checkpoint.reason_of(error)}")
            damage = error
    if damage:
        raise damage


def _copy_record(record, copy, home):
    """Copy a record. One that a home has stays, and gets the rows that it lacks: the second copy
    may lack others."""
    content = record.read_bytes()
    before = copy.read_bytes() if copy.exists() else None
    if before is None or not home and before != content:
        copy.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.atomic_write(copy, [content])
    elif before != content and copy.suffix == ".jsonl":
        add_rows(copy, whole_lines(record))


def whole_lines(path):
    """Lines of the file at `path`, but for what a power cut has left of one; none without a file.
    """
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line for line in text.splitlines(True) if line.endswith("\n") and "\0" not in line]


def add_rows(path, rows):
    """Add the lines `rows` to the file at `path` where it lacks them, durably; returns its size."""
    lines = dict.fromkeys([*whole_lines(path), *rows])
    return checkpoint.atomic_write(path, ["".join(lines).encode()])


def _check_all(there, say):
    """Note the damage of best.pt and last.pt, and of other names of the same file."""
    sound = [c for c in there.values() if c.facts]
    for candidate in sound:
        if candidate.kind in ("best", "last") and not candidate.damage:
            damage = checkpoint.damage_of(candidate.path)
            for other in sound if damage else ():
                if os.path.samefile(other.path, candidate.path):
                    other.damage = damage
            if damage:
                say(f"mirror: {candidate.path} is damaged: {damage}")


def _lacks(there, candidate, line, home):
    """Whether the folder with the files `there` has nothing as new under the candidate's name."""
    other = there.get(candidate.path.name)
    if home and other and other.fault:
        return candidate.stands_for(other)
    if not other or not other.facts or other.damage:
        return True
    if other.save == candidate.save:
        return False
    return candidate.order > other.order or not in_line(other.facts, line)


def _copy(candidate, there, target, line, links):
    """Copy one file, or name it where `there` has the same save. A best.pt of a line that was left
    is set aside."""
    path = target / candidate.path.name
    before = there.get(path.name)
    if candidate.kind == "best" and before and before.facts and not in_line(before.facts, line):
        with contextlib.suppress(checkpoint.CorruptCheckpoint):     # nothing would be kept
            checkpoint.link_or_copy(path, abandoned_name(before), links)
    twins = [c.path for c in there.values() if c.save == candidate.save and not c.damage]
    try:
        if twins and links:
            checkpoint.link_or_copy(twins[0], path)
        else:
            checkpoint.copy_checked(candidate.path, path)
        there[path.name] = Candidate(path)
    except FileNotFoundError:
        if candidate.path.exists():
            raise                           # else it was rotated away: a newer state comes


class Mirrored(Checkpointer):
    """A Checkpointer with a second copy in the folder `mirror`, best on another disk.

    A thread of its own copies what is newer at home once a save is durable; training never waits
    for it, and a slow place skips states. A state that the home does not take is written to the
    second copy by the writer thread, and comes home with the first save that the home takes again.

    Attributes of the copying thread are guarded by `changed`; whoever writes to the second copy
    holds `writing` and the lock of its folder."""

    def __init__(self, directory, *arguments, mirror, **options):
        home = Path(directory).absolute()
        run = home.parent if home.name == "checkpoints" else home
        self.folder = Path(mirror).absolute()
        self.place = self.folder / run.name / "checkpoints"
        if os.path.realpath(self.place) == os.path.realpath(home):
            raise ValueError(f"mirror {mirror} is the run's own folder: name another disk's")
        self.records = {run / name: self.place.parent / name for name in RECORDS}
        self.apart = ""                     # why nothing is written there any more
        self.claimed = False                # whether this start has ever had the second copy,
        self.checked = False                # and has read its best.pt and last.pt
        self.passed = None                  # line there that this run goes on without
        self.known = set()                  # runs that the home holds
        self.leaves = []                    # facts of the saves that a --resume FILE leaves
        self.unreachable = None             # OSError of the look at the second copy at a resume
        self.away = False                   # the newest saves are in the second copy alone
        self.trouble = ""                   # why there is no newest copy
        self.copied_at = None               # when the state of the newest copy was saved
        self.slowest_copy = 0.0             # seconds
        self.waiting_since = 0.0            # when the newest state not yet being copied was saved
        self.busy = False
        self.ending = False
        self.changed = threading.Condition()
        self.writing = threading.Lock()
        self.thread = threading.Thread(target=self._work, name="checkpoint mirror", daemon=True)
        super().__init__(directory, *arguments, **options)
        with contextlib.suppress(OSError):  # its thread will say so
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.stat(self.folder).st_dev == os.stat(self.directory).st_dev:
                self.say(f"checkpoints: the mirror {self.folder} is on the disk of the run, and "
                         f"would be lost with it: is the other disk mounted?")

    @property
    def places(self):
        if self.away:
            return [self.place, self.directory]
        return [self.directory] if self.apart else [self.directory, self.place]

    # -- going on --

    def resume(self, resume=True):
        """As Checkpointer.resume, of both places. Raises OtherRun where the second copy is of a run
        that is not this one."""
        if resume is not True:
            if resume is False:
                self._expect_own(self._look_there(), runs_of(candidates(self.directory)))
            return super().resume(resume)
        self.settle()
        there = self._look_there()
        self._bring_home(there)
        found = candidates(self.directory)
        if not self.apart:
            found = checkpoint.in_order(found + usable(found, there))
        chosen, state = checkpoint.choose(found, checkpoint.load, self.say)
        if not chosen and self.unreachable:
            raise self.unreachable          # all damaged here; what lies there may be sound
        if chosen and chosen.path.parent == self.place:     # the home's own file is damaged
            checkpoint.copy_checked(chosen.path, self.directory / chosen.path.name)
            chosen.path = self.directory / chosen.path.name
        state = self._go_on(chosen, state)
        if state:
            ahead = latest_of(there)
            # damaged, or a best.pt that was copied before the state that follows
            if ahead and not self.apart and not in_line(ahead.facts, self.line):
                self.passed = {name: ahead.facts[name] for name in self.line}
            self._offer()                   # it may lack what was saved just before a kill
        return state

    def adopt(self, state, path=None):
        there, home = self._look_there(), candidates(self.directory)
        line = checkpoint.facts_of(state)
        self._expect_own(there, {line["run"], *runs_of(home)})
        self.leaves = [c.facts for c in home + usable(home, there) if c.facts]
        # a home that was lost gets the files and rows of the line that the file belongs to
        back = {copy: record for record, copy in self.records.items() if not record.exists()}
        with contextlib.suppress(checkpoint.CorruptCheckpoint):
            self._fetch(line, back, full=True)
        super().adopt(state, path)

    def _follow(self, state, path, asked=False):
        """A person also leaves the starts that went on from an earlier save of this line than the
        one gone back to: each stands in `starts` with the save -1, of which nothing is in line."""
        super()._follow(state, path, asked)
        ours = {start for start, _, _ in self.starts}
        for facts in self.leaves if asked else ():
            if facts["run"] == self.run and not abandoned(facts, self.line):
                others = {start for start, _, _ in facts["starts"]} | {facts["start"]}
                self.starts += [[start, -1, True] for start in sorted(others - ours)]
                ours |= others

    def _look_there(self):
        """Candidates of the second copy, which saves from here on outrank; none where it cannot be
        read, which its thread will say, unless nothing at home could be gone on from instead."""
        try:
            there = candidates(self.place, labelled=True)
        except OSError as error:
            if not newest_of(candidates(self.directory)):
                raise
            self.unreachable = error
            return []
        self.counter = max([self.counter, *(c.facts["save_counter"] for c in there if c.facts)])
        return there

    def _bring_home(self, there):
        """What the second copy alone has comes home, before anything is written; done again at the
        next start where a kill or a full disk interrupts it."""
        home = candidates(self.directory)
        if not any(c.facts for c in there):
            return
        if runs_of(home):
            self._expect_own(there, runs_of(home))
        line, here = line_of_both(home, there)
        if line is None:
            self._keep_apart("it holds another line of this run, from an earlier save on")
            return
        kinds = {c.kind for c in home if c.facts}
        for c in there:
            if c.fault and c.kind not in kinds:     # it may be the best, or the latest
                raise OSError(c.fault.errno, c.fault.strerror, str(c.path))
        back = {copy: record for record, copy in self.records.items()}
        newest = newest_of(there)
        newer = newest and (here is None or newest.order > here.order)
        before = {c.save for c in home if c.facts}
        with contextlib.suppress(checkpoint.CorruptCheckpoint):     # said; the others are tried
            self._fetch(line, back if newer else (), full=True)
        if any(c.facts and c.save not in before for c in candidates(self.directory)):
            self.say(f"resume: brought home from the second copy in {self.place}")

    def _fetch(self, line, records=(), full=False):
        sync(self.place, self.directory, line, records, self.say, full, home=True)

    def _expect_own(self, there, runs=()):
        """Raise OtherRun where the second copy is of another run, by its latest save: of none of
        `runs`, the home's. Older ones may be of the run before a --resume FILE of another one."""
        self.known |= {self.run, *runs}
        latest = latest_of(there)
        if latest and latest.facts["run"] not in self.known:
            raise OtherRun(f"{self.place} holds another run of this name ({latest.facts['run']}): "
                           f"move it away, or name another mirror")

    def _keep_apart(self, why):
        if not self.apart:
            self.apart = why
            self.say(f"mirror: {self.place}: {why}: nothing is written there; training goes on "
                     f"without a second copy; name another mirror")

    # -- copying --

    def _offer(self):
        """A state is durable at home. Returns at once."""
        if self.apart:
            return
        with self.changed:
            if self.thread.ident is None:
                try:
                    self.thread.start()
                except RuntimeError as error:       # none is to be had now
                    self._begin(str(error))
            if self.busy and self.waiting_since:
                self._begin("slower than the saves, states are skipped")
            self.waiting_since = time.monotonic()
            self.changed.notify_all()

    def _work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting_since or self.ending)
                if not self.waiting_since:
                    return
                saved, self.waiting_since, self.busy = self.waiting_since, 0.0, True
            began = time.monotonic()
            trouble = ""
            try:
                with self._held():
                    sync(self.directory, self.place, self.line, self.records, self.say,
                         full=not self.checked)
                    self.checked = True
            except OtherLine as error:
                self._keep_apart(str(error))
            except Exception as error:      # no failed copy may end this thread
                trouble = checkpoint.reason_of(error) or type(error).__name__
            with self.changed:
                self.busy = False
                self.changed.notify_all()
                if trouble:
                    self._begin(trouble)
                    self.waiting_since = self.waiting_since or saved
                    if self.ending:
                        return
                    self.changed.wait(RETRY_SECONDS)        # or until the next save
                elif self.apart:
                    self.waiting_since = 0.0
                else:
                    self.copied_at = saved
                    self.slowest_copy = max(self.slowest_copy, time.monotonic() - began)
                    if not self.waiting_since:
                        self._end_trouble()

    def _begin(self, trouble):
        if not self.trouble:
            self.say(f"mirror: {self.place}: {trouble}: training goes on without a newest second "
                     f"copy")
        self.trouble = trouble

    def _end_trouble(self):
        if self.trouble:
            self.trouble = ""
            self.say(f"mirror: {self.place} holds the newest state again")

    @contextlib.contextmanager
    def _held(self):
        """The second copy in the hands of one thread of this process, rotated at the end. Raises
        OtherRun, OtherLine, OSError."""
        # a disk that hangs keeps one thread in here: the other must not wait with it for good
        if not self.writing.acquire(timeout=END_SECONDS):
            raise OSError(errno.ETIMEDOUT, f"a copy hangs there for {END_SECONDS:.0f} s or more")
        try:
            # gone: making it anew would fill the disk below the mount point
            os.stat(self.folder)
            self.place.mkdir(parents=True, exist_ok=True)
            with checkpoint.lock(self.place, say=lambda line: None):
                checkpoint.sweep_temps(self.place)
                self._claim()
                try:
                    yield
                finally:                    # also where a file could not be copied
                    for kind, count in COPIED.items():
                        checkpoint.rotate(self.place, GLOBS[kind], count)
        finally:
            self.writing.release()

    def _claim(self):
        """Mark the second copy as this start's, or raise where a later one has it."""
        there = candidates(self.place)
        self._expect_own(there)
        path, claim = self.place / CLAIM, {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            claim = dict(json.loads(path.read_text()))
        if claim.get("start") in {self.start, *(start for start, _, _ in self.starts)}:
            # this start's, or one's before it: in a copy that comes back, or with leftovers there
            self.passed = self.passed or claim.get("passed")
        elif claim and self.claimed:
            raise OtherLine("a later start of this run writes there")
        for c in there:
            if c.facts and c.facts["run"] == self.run and not self._may_replace(c.facts):
                raise OtherLine(f"{c.path.name} there is of another start of this run, and newer")
        mine = {"run": self.run, "start": self.start, "passed": self.passed}
        if claim != mine:
            checkpoint.atomic_write(path, [json.dumps(mine).encode()])
        self.claimed = True

    def _may_replace(self, facts):
        """Whether this line comes after that save: goes on from it, was led away from it by a
        person, or found it there and had to go on without it."""
        return (in_line(facts, self.line) or abandoned(facts, self.line)
                or self.passed and in_line(facts, self.passed))

    # -- a home that takes nothing --

    def _write(self, names, blocked):
        try:
            super()._write(names, blocked)
        except checkpoint.Moved:            # another start may have both places: this one ends
            raise
        except OSError as fault:
            self._write_away(names, blocked, fault)
            return
        if self.away:
            self._come_back()
        self._offer()

    def _write_away(self, names, blocked, fault):
        """The state that the home does not take goes to the second copy alone."""
        began = time.monotonic()
        names = [n for n in names if NAME.fullmatch(n).lastgroup in COPIED]
        path = self.place / names[0]
        try:
            if self.apart:
                raise OtherLine(self.apart)
            with self._held():
                if self.before_save:
                    self.before_save(self.place)
                checkpoint.atomic_write(path, self._image.file())
                for name in names[1:]:
                    checkpoint.link_or_copy(path, self.place / name,
                                            checkpoint.links_work(self.place))
        except (OSError, OtherRun) as error:
            with self.changed:
                self._begin(checkpoint.reason_of(error))
            raise fault from None
        self.away = True
        self._slowest = max(self._slowest, blocked + time.monotonic() - began)
        with self.changed:
            self.copied_at, self.waiting_since = time.monotonic(), 0.0
            self._end_trouble()
        self.say(f"save failed: {checkpoint.reason_of(fault)}; the second copy has the state, as "
                 f"{path}")
        self._call_hook(path)

    def _come_back(self):
        """The home takes saves again: what the second copy alone has comes home."""
        try:
            with self._held():
                self._fetch(self.line)
            self.away = False
        except (OSError, OtherRun, checkpoint.CorruptCheckpoint) as error:
            self.say(f"mirror: {self.place}: {checkpoint.reason_of(error)}: what it alone has "
                     f"could not be brought home, it is tried again at the next save")

    @property
    def best_may_return(self):
        """Not where the second copy has one: had it been sound, a resume would have taken it."""
        return not os.path.lexists(self.place / "best.pt")

    def _metric_of_best(self):
        """As ever; a best.pt that was spoiled under this run comes back from the second copy."""
        if self.away:
            return None
        here, there = self.directory / "best.pt", self.place / "best.pt"
        now = self._best and Candidate(here)
        spoiled = now and not now.facts and not now.fault
        with contextlib.suppress(OSError, checkpoint.CorruptCheckpoint):
            if spoiled and self.is_own_directory() and in_line(checkpoint.peek(there), self.line):
                checkpoint.copy_checked(there, here)
                self.say(f"checkpoints: best.pt was taken from {there}")
        return super()._metric_of_best()

    def wait_for_copy(self, seconds=None) -> bool:
        """Until the newest state is copied; False after so many seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.busy and not self.waiting_since, seconds)

    @property
    def slowest(self):
        return self._slowest + min(self.slowest_copy, END_SECONDS)

    def _remark(self):
        """How old the second copy is, where it is not the newest."""
        why = self.trouble or self.apart
        if not why:
            return ""
        if self.copied_at is None:
            return f"; no second copy since the start ({why})"
        minutes = (time.monotonic() - self.copied_at) / 60
        return f"; the newest second copy is {minutes:.0f} min old ({why})"

    def _end(self):
        """Wait for the copy of the newest state, END_SECONDS at most; then give the home up."""
        self._writer.shutdown()
        try:
            with self.changed:
                self.ending = True
                self.changed.notify_all()
                begun = self.thread.ident is not None
                if begun and (self.busy or self.waiting_since):
                    self.say(f"mirror: waiting at most {END_SECONDS:.0f} s for the copy in "
                             f"{self.place}")
            if begun:
                self.thread.join(END_SECONDS)
            if self.busy or self.waiting_since:
                self.say(f"mirror: {self.place} lacks the newest state{self._remark()}")
        finally:
            super()._end()
