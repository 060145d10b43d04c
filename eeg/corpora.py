"""Import of corpora of EDF files: the resumable conversion to one HDF5 file per recording."""
import json
import multiprocessing
import os
import re
import shlex
import signal
import stat
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eeg import annotations, console, terms
from eeg.disk import INDEX, LASTING, REPORT, InUse, TemporaryFault, hold, holder, named, walk
from eeg.disk import write_json
from eeg.edf import BLANK_UNITS, FS, NOTCH, PREFIX, DataError, Recipe, channel, electrode
from eeg.edf import prepare_edf, read_header, split_label
from eeg.layouts import FOREIGN, LAYOUTS, LENIENT, NEVER, STRICT, Source, channel_notes
from eeg.layouts import find_events, identify
from eeg.release import release
from eeg.splits import contradictions, no_labels, person_code, twins
from eeg.store import FORMAT, attributes, entries, read_index, write_recording

BYTES_PER_WORKER = 200_000_000          # of EDF that make a further process worth its start
MAX_LINES_PER_REASON = 3                # of refused files; more share a line
MAX_LISTED_TEXTS = 20                   # in the table
MAX_DRIFT_SECONDS = 1.0                 # of a clock, beyond which a label file may be off


class Stays(DataError):
    """A recording is refused, and what lies in its place stays, such as one of another corpus."""


class Unread(Stays):
    """An EDF, or what lies beside it, could not be read this time: what it gave before stays."""


# ---- import: one recording ----

@dataclass(frozen=True)
class Task:
    """What an import does with every file."""
    out: Path
    recipe: Recipe
    texts: terms.Texts = terms.Texts()
    release: str = ""
    renames: dict = field(default_factory=dict)         # label in the file -> electrode
    labels: str = STRICT

    @property
    def meanings(self):
        return json.dumps(vars(self.texts))


@dataclass
class Outcome:
    """What became of one source."""
    source: Source
    kind: str                           # kept, read or refused
    reason: str = ""                    # of a refusal
    passing: bool = False               # the reason may pass
    notes: str = ""                     # what was read otherwise than it is written
    seconds: float = 0.0                # of EEG, newly imported
    labelled: bool = False
    unlabelled: str = ""                # why it has no labels
    patient_code: str = ""              # see splits.person_code
    texts: dict = field(default_factory=dict)           # of annotations -> how often


def shown(path):
    """A path as text that can be printed on one line."""
    return os.fsencode(path).decode(errors="replace").replace("\n", "\N{REPLACEMENT CHARACTER}")


def one_line(error):
    """Its message without what would break a line or a terminal: files may hold anything."""
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029]", "?", str(error))


def origin(source, task):
    """Attributes that say what a recording is made of; while they are the same, it is kept."""
    files = [file for file in (source.path, source.annotation) if file]
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {
        "format": FORMAT,
        "prepared": task.recipe.hash,
        "patient": source.patient,
        "split": source.split,
        "source_state": json.dumps(stamps),
        "renames": json.dumps(sorted(task.renames.items())) if task.renames else ""}


def finished(target, source, task):
    """Outcome of an earlier import that made `target` from these very files in this way, else None.
    Stays where it holds another recording, as sub-01 of a second corpus would be."""
    try:
        if made := attributes(target):
            before = Path(made["source"])
            same = all(made.get(key, "") == value for key, value in origin(source, task).items())
            # what texts mean matters where they gave the labels, or might give some
            meanings = made.get("meanings", "")
            if same and meanings in ([task.meanings, ""] if made["labelled"] else [task.meanings]):
                return Outcome(
                    source, "kept", notes=made.get("notes", made.get("repaired", "")),
                    labelled=bool(made["labelled"]), unlabelled=made.get("unlabelled", ""),
                    patient_code=made.get("patient_code", ""),
                    texts=json.loads(made["annotations"]))
    except (KeyError, ValueError):
        return None
    if made and before.exists() and not before.samefile(source.path):
        raise Stays(f"its place holds {before}: give each corpus a folder of its own")
    return None


def import_one(source, task):
    """Import one recording; its Outcome."""
    target = task.out / f"{source.name}.h5"
    try:
        return finished(target, source, task) or _convert(source, task, target)
    except Stays as refusal:
        return Outcome(source, "refused", one_line(refusal), passing=isinstance(refusal, Unread))
    except DataError as refusal:
        target.unlink(missing_ok=True)                  # what an earlier state of the source gave
        return Outcome(source, "refused", one_line(refusal))


def _off(header):
    """How the clock of an EDF's records differs from its samples, by which a label file may go."""
    if abs(header.begins) > MAX_DRIFT_SECONDS:
        return f"its first record is at {header.begins:.4g} s by its own clock"
    if abs(header.drift) > MAX_DRIFT_SECONDS:
        return f"the clock of its records is {header.drift:.3g} s off at the end"
    return ""


def _convert(source, task, target):
    try:
        if shown(source.path) != str(source.path):
            raise DataError("its name holds a line break or is not UTF-8: rename it")
        # before the files are read: one that changes meanwhile is imported again
        made_of = origin(source, task)
        if not stat.S_ISREG(source.path.stat().st_mode):
            raise DataError("not a regular file")
        header = read_header(source.path)
        rename(header, task.renames)
        events, texts, why = find_events(source, header, task)
        signal = prepare_edf(header, task.recipe)
        if events is not None and source.annotation and (off := _off(header)):
            why = f"{off}, and which clock {source.annotation.name} goes by is not known"
            if task.labels == STRICT and len(events):
                raise DataError(why)
            events = None
        header.notes += channel_notes(source.path)
    except OSError as error:
        what = Path(error.filename).name + ": " if error.filename else ""
        kind = DataError if error.errno in LASTING else Unread
        raise kind(what + (error.strerror or str(error))) from None

    attributes = made_of | {
        "scale": signal.scale, "fs": FS,
        "channels": list(task.recipe.channels), "montage": task.recipe.montage,
        "labelled": events is not None,
        "unlabelled": one_line(why) if events is None else "",
        "norm": signal.amplitude,
        "source": str(source.path.absolute()), "source_fs": signal.rate,
        "layout": source.layout,
        "began": header.began,
        "release": task.release,
        "annotations": json.dumps(texts),
        "meanings": "" if events is not None and not texts else task.meanings,
        "patient_code": person_code(header),
        "notes": one_line("; ".join(dict.fromkeys(header.notes)))}
    write_recording(target, signal.eeg, np.empty((0, 2)) if events is None else events, attributes)
    said = {key: attributes[key] for key in ("notes", "labelled", "unlabelled", "patient_code")}
    return Outcome(source, "read", seconds=header.seconds, texts=texts, **said)


def rename(header, renames):
    """Give signals other labels, in any case: an electrode with the reference that the file names
    behind a hyphen, unless the table has one. What the file itself calls so gives way, whatever
    its reference: the user knows better."""
    lower = {label.lower(): name for label, name in renames.items()}
    labels = header.signals["label"]
    named = {i: _with_reference(lower[label.lower()], label)
             for i, label in enumerate(labels) if label.lower() in lower}
    given = {_place(name) for name in named.values()}
    for i, label in enumerate(labels):
        if i in named:
            labels[i] = named[i]
            header.notes.append(f"{label} renamed {named[i]}")
        elif _place(label) in given:
            labels[i] = f"unused {label}"


def _with_reference(name, label):
    head, _, tail = label.upper().rpartition("-")
    known = channel(f"{name}-{tail}") if head and not PREFIX.fullmatch(head.strip()) else None
    return f"{name}-{known[1]}" if known and "-" not in name else name


def _place(label):
    """(electrode, electrode) of a derivation, (electrode,) of a label with any reference."""
    return tuple(filter(electrode, map(str.upper, split_label(label) or ())))


def channel_names(text):
    """"f7-t7, Cz, c3-a2, BTEleft SD|BTEright SD" -> ("F7-T3", "Cz", "C3-A2", "BTEleft SD|BTEright
    SD"): known electrodes in one spelling; | stands between alternatives, the best first."""
    parts = [part.split("|") for part in text.split(",") if part.strip()]
    return tuple("|".join(one_spelling(choice.strip()) for choice in part) for part in parts)


def one_spelling(text):
    """"f7-t7" -> "F7-T3", "EEG Cz-REF" -> "Cz". What is no electrode stays as it is, and so does
    the one ear or mastoid that is the reference: a file may hold C3-A1 beside C3-A2."""
    name, end = channel(text) or (text, "")
    kept = electrode(end.upper()) or re.fullmatch("[AM][12]", end)
    return f"{name}-{end}" if kept else name


def read_renames(path):
    """{label in the file: electrode or derivation} of a --rename FILE: two columns, delimited by a
    tab, a comma or a semicolon, or else by the last blank."""
    try:
        lines = annotations.read_text(path).split("\n")
    except OSError as error:
        raise DataError(f"--rename {path}: {error.strerror}") from None
    renames, named = {}, {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        delimiter = next((mark for mark in "\t,;" if mark in line), None)
        cells = line.split(delimiter) if delimiter else line.strip().rsplit(None, 1)
        label, name = ([cell.strip(' "') for cell in cells] + [""])[:2]
        key = channel(name)
        titles = not renames and "electrode" in name.lower()
        if len(cells) != 2 or not label or key is None and not titles:
            raise DataError(f"--rename {path}: {line.strip()!r}: two columns are needed, the label "
                            "in the file and an electrode such as Fp1, or a pair such as Fp1-F7")
        if key is None:
            continue                    # titles of the columns
        name = "-".join(filter(None, key))
        first = named.setdefault(label.lower(), name)       # in any case, as rename takes it
        if first != name:
            raise DataError(f"--rename {path}: {label} is named {first} and {name}")
        renames[label] = name
    if not renames:
        raise DataError(f"--rename {path} names no electrode")
    return renames


# ---- import: a corpus ----

@dataclass
class Report:
    """What an import did: names of recordings, with the reason where there is one."""
    read: list = field(default_factory=list)
    notes: list = field(default_factory=list)           # (name, what is read otherwise)
    refused: list = field(default_factory=list)         # (file, why)
    passing: bool = False                               # one of them may be read another time
    kept: int = 0                                       # finished by an earlier import
    unlabelled: list = field(default_factory=list)      # (name, why)
    seconds: float = 0.0                                # of EEG imported
    texts: Counter = field(default_factory=Counter)     # of the annotations that were read
    people: list = field(default_factory=list)          # (patient, code by the header, name)
    twins: list = field(default_factory=list)           # lines on EEG under two names
    alone: list = field(default_factory=list)           # annotation files of no EDF
    hints: list = field(default_factory=list)           # what the user may have meant

    def add(self, outcome):
        name = outcome.source.name
        if outcome.kind == "refused":
            self.refused.append((shown(outcome.source.path), outcome.reason))
            self.passing |= outcome.passing
            return
        if outcome.kind == "read":
            self.read.append(name)
        else:
            self.kept += 1
        if outcome.notes:
            self.notes.append((name, outcome.notes))
        if not outcome.labelled:
            self.unlabelled.append((name, outcome.unlabelled))
        self.seconds += outcome.seconds
        self.texts.update(outcome.texts)
        self.people.append((outcome.source.patient, outcome.patient_code, name))


def import_corpus(src, out, layout="auto", montage="referential", notch="both", blank_unit="",
                  workers=0, say=print, channels=(), seizure_labels=(), background_labels=(),
                  replace=False, renames=None, labels=STRICT, progress=lambda what: None):
    """Import every EDF of `src` into `out`, in parallel, keeping what an earlier import finished.
    Returns the Report. Until it has finished, `out` is marked as not whole (check_finished).
    `channels`: of the montage reduced; `renames`: a file, see read_renames; `labels`: STRICT
    refuses a recording whose labels cannot be used, LENIENT takes them as none, NEVER opens any.
    DataError for bad usage, a missing folder, one that another import is writing, or one of another
    preparation (`replace` makes it anew); refused files are in the report, not raised."""
    recipe = Recipe(montage, str(notch), blank_unit, tuple(channels))
    texts = terms.user_texts(seizure_labels, background_labels)
    _check_usage(layout, workers)
    names = read_renames(renames) if renames else {}
    files, root, closed, others = find_edf(src)
    out = Path(out)
    again = _command(src, out, {
        "layout": layout, "montage": montage, "notch": notch, "blank-unit": blank_unit,
        "channels": ",".join(channels), "seizure-label": seizure_labels,
        "background-label": background_labels, "rename": renames, "replace": replace})
    with _lock(out):
        if not replace:
            refuse_mixture(out, recipe)
        report = Report(refused=closed)
        sources = identify_all(files, root, layout, labels, report)
        refuse_twice(out, sources, root, report)
        stopped = _stopped(out, Path(src).resolve())
        write_json(out / REPORT, _read_marks(out) | {"unfinished": [*stopped, again]})
        _sweep(out)
        heads = [source.annotation for source in sources if source.layout == "tuh"]
        # of a single EDF the folder around it may be anything
        said = release(root, heads) if root == Path(src) else ""
        if said:
            say(f"{src}: {said}")
        task = Task(out, recipe, texts, said, names, labels)
        _import_all(report, sources, task, workers, say, progress)
        report.alone = [] if labels == NEVER else _labels_alone(sources, others)
        _close(out, src, files, others, report, stopped)
    report.hints = hints(sources, layout, task, report, others)
    _table(report, task, say)
    return report


def _check_usage(layout, workers):
    if layout not in ("auto", *LAYOUTS):
        raise DataError(f"layout {layout} is unknown: auto, {', '.join(LAYOUTS)}")
    if workers < 0:
        raise DataError(f"{workers} workers")


def _sweep(out):
    """Remove what a killed import has left."""
    for form in (".*.h5.part", "*.h5.*.part", ".*.json.*.part"):
        for stale in out.rglob(form):
            stale.unlink()


def _command(src, out, options):
    """The command line of this import, to be said where it was not finished."""
    words = ["python", "data.py", "import", str(Path(src).absolute()), str(out.absolute())]
    usual = {"layout": "auto", "montage": "referential", "notch": "both"}
    for name, value in options.items():
        if value in ((), [], "", None, False) or usual.get(name) == value:
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return shlex.join(words)


def check_finished(out):
    """TemporaryFault where an import into a folder runs or was stopped: not all is there yet."""
    here = console.command("data.py") + " "
    unfinished = " && ".join(_read_marks(out)["unfinished"]).replace("python data.py ", here)
    if not unfinished:
        return
    owner = holder(out)
    if owner:
        raise TemporaryFault(f"{out} is being imported by {owner}: wait until that has finished")
    raise TemporaryFault(f"{out} is not whole: its import was stopped. Finish it: {unfinished}")


def _stopped(out, src):
    """Commands of stopped imports into a folder, of other sources that are still there."""
    places = {command: Path(shlex.split(command)[3]).resolve()
              for command in _read_marks(out)["unfinished"]}
    return [command for command, place in places.items()
            if place.exists() and not place.is_relative_to(src)]


def _lock(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        for _ in range(5):              # check_finished looks at a lock for a moment
            try:
                return hold(out)
            except InUse:
                time.sleep(0.1)
        return hold(out)
    except InUse:
        raise DataError(f"{out}: another import is writing here") from None
    except OSError as error:
        if error.errno not in LASTING:
            error.filename = error.filename or str(out)
            raise
        raise DataError(f"{out}: {error.strerror}") from None


def find_edf(src):
    """(EDF files below src, root, [(folder, why it cannot be listed)], the other files there, of a
    single EDF those of its folder but recordings of other kinds); links are followed, each folder
    once, but for those of other programs."""
    src = Path(src)
    if src.is_file() or src.is_symlink() and not src.is_dir():
        try:
            beside = [path for path in sorted(src.parent.iterdir()) if path != src]
        except OSError:                 # a folder that may not be listed: it matters for hints only
            beside = []
        return [src], src.parent, [], [path for path in beside if not _foreign([path])]
    if not src.is_dir():
        raise DataError(f"{src}: no such file or folder")
    paths, closed = [], []

    def note(error):
        closed.append((str(error.filename), error.strerror))
    for folder, files in walk(src, note):
        paths += [Path(folder, name) for name in files]
    # ._x.edf is what macOS writes beside x.edf on a foreign disk: no recording
    paths = [path for path in paths if not path.name.startswith("._")]
    found = [path for path in paths if path.suffix.lower() == ".edf"]
    if not found and not closed:
        foreign = _foreign(paths)
        what = f" ({foreign})" if foreign else ""
        raise DataError(f"{src}: no EDF file in it{what}")
    return sorted(found), src, closed, sorted(set(paths) - set(found))


def _foreign(paths):
    """Recordings of other kinds among files, in words."""
    kinds = Counter(kind for path in paths for kind in FOREIGN if path.name.lower().endswith(kind))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{counts}: convert or unpack them to .edf" if counts else ""


def identify_all(files, root, layout, labels, report):
    """Sources of all files; of two that would have one name, the later is refused. Labels that are
    not to be opened are taken from them, and, but for STRICT, links to nothing."""
    sources = {}
    for path in files:
        source = identify(path, root, layout)
        there = source.annotation and source.annotation.exists()
        if labels == NEVER or labels == LENIENT and not there:
            source.annotation = None
        # x.edf and x_eeg.edf share their labels and the events that an evaluation writes
        other = sources.setdefault(source.name.removesuffix("_eeg"), source)
        if other is not source:
            report.refused.append((shown(path), f"same name as {other.path.name}"))
    return list(sources.values())


def refuse_mixture(out, recipe):
    """DataError where `out` holds recordings that were prepared otherwise."""
    index = read_index(out / INDEX)
    there = index.values() or filter(None, map(_prepared, out.rglob("*.h5")))
    for entry in there:
        if entry["prepared"] != recipe.hash:
            raise DataError(f"{out} holds recordings of {describe(entry)}, this import is of "
                            f"{recipe}: import into another folder, or make them anew with "
                            "--replace")


def refuse_twice(out, sources, root, report):
    """DataError where `out` holds one of the sources under another name, and perhaps patient, from
    an import of one file or of a part of the corpus: it would count twice, train and validate.
    What `out` holds of an EDF that is refused by now, as x_eeg.edf beside x.edf, goes; of one that
    has left `root`, it is noted: it may have been renamed, or withdrawn."""
    for path, _ in report.refused:
        target = out / f"{os.path.relpath(path, root).rpartition('.')[0]}.h5"
        made = _prepared(target)
        if made and made["source"] == os.path.abspath(path):
            target.unlink()
    names = {source.name for source in sources}
    paths = {os.path.realpath(source.path) for source in sources}
    for path in sorted(out.rglob("*.h5")):
        name = path.relative_to(out).with_suffix("").as_posix()
        made = None if name in names else _prepared(path)
        if not made:
            continue
        source = Path(made["source"])
        if os.path.realpath(source) in paths:
            raise DataError(f"{path} is {source} under another name: delete it, or import into "
                            "another folder")
        if source.is_relative_to(root.absolute()) and not source.exists():
            report.notes.append((name, f"stays in {out} though its EDF is no longer there"))


def _prepared(path):
    """What a recording says of its preparation; None where it says nothing."""
    made = attributes(path)
    return made if {"prepared", "montage", "channels", "source"} <= made.keys() else None


def recipe_of(prepared, montage, channels):
    """The Recipe of recordings, found by its hash; None: another version of edf.py made them."""
    reduced = tuple(map(str, channels)) if montage == "reduced" else ()
    for notch in NOTCH:
        for unit in ("", *BLANK_UNITS):
            recipe = Recipe(str(montage), notch, unit, reduced)
            if recipe.hash == prepared:
                return recipe
    return None


def describe(entry):
    """What recordings were prepared as, in words."""
    recipe = recipe_of(entry["prepared"], entry["montage"], entry["channels"])
    return str(recipe or f"montage {entry['montage']}, prepared by another version of edf.py")


def differs(recording, path, state):
    """A line where a recording of `path` was prepared otherwise than those of a checkpoint's
    training, else ""."""
    if state.get("prepared", recording.prepared) == recording.prepared:
        return ""
    return (f"{path} is of {describe(vars(recording))}, the checkpoint was trained on "
            f"{describe(state)}")


def _import_all(report, sources, task, workers, say, progress):
    size = sum(_size(source.path) for source in sources)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not workers:
        workers = max(1, min(cores, len(sources), size // BYTES_PER_WORKER))
    began, done, plain = time.monotonic(), 0, console.Timer(10)
    with console.bar(size, "import", "B", unit_scale=True) as bar:
        for number, outcome in enumerate(_outcomes(sources, task, workers), 1):
            report.add(outcome)
            progress("imported recording")
            read = _size(outcome.source.path)
            done += read
            bar.set_postfix_str(outcome.source.name[-40:], refresh=False)
            bar.update(read)
            if bar.disable and plain.due():
                left = (time.monotonic() - began) * (size - done) / max(1, done) / 60
                say(f"import: {number} of {len(sources)} files, {left:.1f} min left")


def _size(path):
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _outcomes(sources, task, workers):
    """Outcomes of import_one as they come; in this process, or in `workers` fresh ones."""
    if workers == 1:
        yield from (import_one(source, task) for source in sources)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_die_with_parent) as pool:
        try:
            # workers inherit the mask: a terminal sends Ctrl-C to all, this process answers it
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                jobs = [pool.submit(import_one, source, task) for source in sources]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield from (job.result() for job in as_completed(jobs))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent():
    """A worker ends when the import is killed, whatever it was waiting for."""
    parent = multiprocessing.parent_process()

    def follow():
        parent.join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


# ---- import: what is said of it ----

def hints(sources, layout, task, report, others):
    """Lines on what the user may have meant otherwise; `others`: files that are no such EDF."""
    found = []
    row = LAYOUTS.get(layout)
    if row and not any(row.name.match(source.path.stem) for source in sources):
        found.append(f"no file is named as in {layout} ({row.example}): leave --layout away")
    there = set(map(terms.plain, report.texts))
    absent = [text for text in task.texts.given() if text not in there]
    if absent:
        found.append(f"no annotation is {', '.join(map(repr, absent))}; "
                     "a label file beside an EDF counts alone")
    notes = "; ".join(what for _, what in report.notes).lower()
    never = [label for label in task.renames if f"{label} renamed".lower() not in notes]
    if never:
        found.append(f"no imported file has a channel {', '.join(never[:5])} of --rename")
    found += told_alone(report.alone)
    foreign = _foreign(others)
    if foreign:
        found.append(f"not read: {foreign}")
    return found


def told_alone(paths):
    """A line on annotation files that belong to no EDF, if there are any."""
    if paths:
        number, one = console.how_many(len(paths), "annotation file"), Path(paths[0]).name
        yield (f"{number} without an EDF, as {one}: "
               "labels are read where they lie beside the EDF and are named as it is")


ANNOTATION = re.compile(
    r"(.*?)(_events\.tsv|\.csv_bi|\.tse|\.tse_bi|_a1\.tsv|_annotations\.(csv|tsv|txt))$")
PATIENT_LIST = re.compile(r"chb\d+-summary\.txt|Seizures-list.*\.txt")


def _labels_alone(sources, others):
    """Annotation files that lie beside no EDF of their name, and lists where no EDF has labels."""
    recorded = (".edf", *FOREIGN)
    stems = {(path.parent, path.name[:-len(kind)].removesuffix("_eeg"))
             for path in (*(source.path for source in sources), *others)
             for kind in recorded if path.name.lower().endswith(kind)}
    names = {stem for _, stem in stems}
    listed = {source.annotation.parent for source in sources if source.annotation}
    alone = []
    for path in others:
        named = ANNOTATION.match(path.name)
        stem = named[1].removesuffix("_eeg") if named else path.stem
        if PATIENT_LIST.fullmatch(path.name):
            lost = path.parent not in listed
        else:
            lost = (path.parent, stem) not in stems and (
                named or path.suffix in (".csv", ".tsv", ".txt")
                and (stem in names or annotations.is_list(path)))
        if lost:
            alone.append(path)
    return alone


def _table(report, task, say):
    for line in grouped(report.notes):
        say(f"note {line}")
    if report.refused:
        say(f"{len(report.refused)} refused:")
        for line in grouped(report.refused):
            say(f"  {line}")
    unused = task.texts.unused(dict(report.texts.most_common()))
    if unused:
        say("annotations that label nothing:")
        for text in list(unused)[:MAX_LISTED_TEXTS]:
            say(f"  {unused[text]} x {text[:60]!r}")
        if len(unused) > MAX_LISTED_TEXTS:
            say(f"  and {len(unused) - MAX_LISTED_TEXTS} other texts")
        say("  one that marks seizures: data.py import --seizure-label TEXT, or START..END for a "
            "pair; one that says a recording was read: --background-label TEXT")
    if task.labels != NEVER:
        for line in no_labels(report.unlabelled):
            say(line)
    for line in (*contradictions(report.people), *report.twins,
                 *(f"hint: {hint}" for hint in report.hints)):
        say(line)
    say(f"{len(report.read)} read, {report.kept} already there, {len(report.refused)} refused, "
        f"{len(report.unlabelled)} without labels; {console.hours(report.seconds)} of EEG imported")


def grouped(refused):
    """Lines on files and the reason of each; more than MAX_LINES_PER_REASON for one reason share a
    line."""
    reasons = {}
    for path, why in refused:
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        if len(paths) > MAX_LINES_PER_REASON:
            yield f"{len(paths)} files: {why}: {paths[0]}, ..., {paths[-1]}"
        else:
            yield from (f"{path}: {why}" for path in paths)


def _close(out, src, files, others, report, stopped):
    """Write the index, what was refused and label files of no EDF, for `info`; of other files, what
    an earlier import said. From here on the folder is whole, but for what `stopped` commands were
    to bring."""
    made = entries(out, made=True)
    report.twins += twins((name, entry["samples"], entry["norm"], entry["scale"])
                          for name, (_, entry) in made.items())
    seen = {shown(path) for path in files}
    before = [[file, why] for file, why in read_report(out) if file not in seen
              and not (Path(file).is_relative_to(src) and os.path.isdir(file))]
    met = {shown(path.absolute()) for path in others}
    alone = [file for file in labels_alone(out) if file not in met]
    write_json(out / REPORT, {
        "refused": before + report.refused,
        "alone": alone + [shown(path.absolute()) for path in report.alone],
        "unfinished": stopped})


def read_report(out):
    """[[file, reason], ...] of the files that imports into `out` refused."""
    return _read_marks(out)["refused"]


def labels_alone(out):
    """Annotation files that belonged to no EDF when imports into `out` met them, and are there."""
    return [file for file in _read_marks(out)["alone"] if Path(file).exists()]


def _read_marks(out):
    """What imports keep beside their recordings: files that they refused, annotation files of no
    EDF, commands that run or were stopped; nothing where another program wrote it."""
    try:
        with named(Path(out, REPORT)):
            marks = json.loads(Path(out, REPORT).read_text())
        commands = marks.get("unfinished", [])
        # an earlier version kept one alone
        commands = [commands] if isinstance(commands, str) else list(map(str, commands))
        if any(len(shlex.split(command)) < 4 for command in commands):
            raise ValueError("no commands of an import")
        return {"refused": [[str(file), str(why)] for file, why in marks.get("refused", [])],
                "alone": list(map(str, marks.get("alone", []))),
                "unfinished": commands}
    # out of reach is another error: it may say that not all is there
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {"refused": [], "alone": [], "unfinished": []}
