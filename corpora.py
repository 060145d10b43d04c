"""Corpora of EDF files: layouts, annotations, and the resumable conversion to one HDF5 file per recording."""
import hashlib
import json
import multiprocessing
import os
import re
import signal
import stat
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from edf import CHANNELS, FS, NOTCH, DataError, Settings, number, prepare_edf, read_header

# TUSZ annotation codes
SEIZURE = set("seiz fnsz gnsz spsz cpsz absz tnsz cnsz tcsz atsz mysz nesz".split())
FORMAT = 2                              # version of the HDF5 layout
CHUNK = 10 * FS                         # samples of a chunk there: windows that begin every 10 s begin a chunk
INDEX, REPORT = "index.json", "import.json"


class Occupied(DataError):
    """The place of a recording holds one of another corpus, which stays."""


# ---- annotations ----

@dataclass
class Labels:
    """Seizures of one recording as (onset, end) in s; `seconds` is the recording's length by the
    annotation, if it says so, and `slack` how far that may be from the signal's."""
    events: list = field(default_factory=list)
    seconds: float | None = None
    slack: float = 2.0
    notes: list = field(default_factory=list)


def finish(labels, seconds):
    """Labels -> sorted, disjoint events float64 (N, 2) inside a recording of `seconds`; refuses what
    contradicts it.

    An event that begins inside and ends beyond the end is cut there, and noted; one wholly beyond is
    refused."""
    if labels.seconds is not None and abs(labels.seconds - seconds) > labels.slack:
        raise DataError(f"the annotation is of {labels.seconds:g} s, the signal has {seconds:g} s: "
                        "not the same recording")
    spans = []
    for onset, end in sorted(labels.events):
        if onset < 0 or end <= onset:
            raise DataError(f"event from {onset:g} s to {end:g} s")
        if onset >= seconds:
            raise DataError(f"event from {onset:g} s to {end:g} s lies beyond the recording's {seconds:g} s")
        if end > seconds + 0.02:
            labels.notes.append(f"event from {onset:g} s to {end:g} s "
                                f"cut at the recording's end, {seconds:g} s")
        if spans and onset <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], min(end, seconds))
        else:
            spans.append([onset, min(end, seconds)])
    return np.array(spans, np.float64).reshape(-1, 2)


def read_text(path):
    """Text of an annotation file, CRLF and byte order mark taken off."""
    raw = Path(path).read_bytes()
    if not raw.strip():
        raise DataError(f"{Path(path).name} is empty")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return raw.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")


def table(text, name, delimiter, columns):
    """Rows of a delimited table as dicts; comment lines (#) are skipped, the header must hold `columns`."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    rows = [line.split(delimiter) for line in lines]    # nobody quotes; a lone quote must not swallow rows
    header = [cell.strip() for cell in rows[0]] if rows else []
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(f"{name}: no column {', '.join(missing)} (it has {', '.join(header) or 'none'})")
    short = [row for row in rows[1:] if len(row) < 1 + max(header.index(column) for column in columns)]
    if len(rows[-1]) < len(header) and not text.endswith("\n"):
        short.append(rows[-1])                          # the file was cut here: more rows may have followed
    if short:
        raise DataError(f"{name}: incomplete row {delimiter.join(short[0])[:60]!r}")
    return [dict(zip(header, (cell.strip() for cell in row))) for row in rows[1:]]


def parse_events_tsv(text, name="events.tsv"):
    """SzCORE / BIDS events: sz, sz_foc*, sz_gen*, sz_uo* are seizures, bckg and impd (impedance test) are
    not."""
    labels, tests = Labels(), []
    rows = table(text, name, "\t", ("onset", "duration", "eventType"))
    if not rows:
        raise DataError(f"{name} has no row: SzCORE marks a recording without seizure by one bckg row")
    for row in rows:
        kind = row["eventType"]
        length = row.get("recordingDuration", "n/a")
        if length not in ("n/a", "", None):
            seconds = float(number(length, f"{name}: recordingDuration"))
            if labels.seconds not in (None, seconds):
                raise DataError(f"{name}: recordingDuration is {labels.seconds:g} s and {seconds:g} s")
            labels.seconds = seconds
        if not re.fullmatch(r"sz|sz_(foc|gen|uo)\w*|bckg|impd", kind):
            raise DataError(f"{name}: unknown eventType {kind!r}")
        onset = float(number(row["onset"], f"{name}: onset of {kind}"))
        duration = float(number(row["duration"], f"{name}: duration of {kind}"))
        if duration <= 0 or onset < 0:
            raise DataError(f"{name}: {kind} from {onset:g} s lasts {duration:g} s")
        if kind == "impd":
            tests.append((onset, onset + duration))
        elif kind != "bckg":
            labels.events.append((onset, onset + duration))
    for begin, end in tests:
        if any(onset < end and stop > begin for onset, stop in labels.events):
            raise DataError(f"{name}: a seizure inside an impedance test (impd, {begin:g} s to {end:g} s)")
        labels.notes.append(f"impedance test from {begin:g} s to {end:g} s counted as background")
    return labels


def parse_csv(text, name="csv"):
    """TUSZ .csv_bi (one TERM channel) or .csv (a row per derivation): the union of all seizure rows."""
    labels = Labels()
    duration = re.search(r"^#\s*duration\s*=\s*(\S+)\s*secs", text, re.M)
    if duration:
        labels.seconds = float(number(duration[1], f"{name}: duration"))
    rows = table(text, name, ",", ("channel", "start_time", "stop_time", "label"))
    if not rows:
        raise DataError(f"{name} has no row")
    background = []
    for row in rows:
        start = float(number(row["start_time"], f"{name}: start_time"))
        stop = float(number(row["stop_time"], f"{name}: stop_time"))
        if stop <= start or start < 0:
            raise DataError(f"{name}: {row['label']} from {start:g} s to {stop:g} s")
        if row["label"] not in SEIZURE | {"bckg"}:
            raise DataError(f"{name}: unknown label {row['label']!r}")
        if row["label"] != "bckg":
            labels.events.append((start, stop))
        elif row["channel"] == "TERM":
            background.append((start, stop))
    for begin, end in background:
        if any(min(stop, end) - max(start, begin) > 0.02 for start, stop in labels.events):
            raise DataError(f"{name}: bckg from {begin:g} s to {end:g} s overlaps a seizure")
    return labels


def clock(text, what):
    """hh.mm.ss or hh:mm:ss, hours beyond 23 allowed, in s."""
    found = re.fullmatch(r"(\d{1,2})[.:](\d{1,2})[.:](\d{1,2})", text.strip(), re.A)
    if not found or int(found[2]) > 59 or int(found[3]) > 59:
        raise DataError(f"{what} is {text.strip()!r}, not a time")
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])


def parse_summary(text):
    """CHB-MIT chbNN-summary.txt: {file name: its block of lines}."""
    files = {}
    for block in re.split(r"^File Name:", text, flags=re.M)[1:]:
        files.setdefault(block.split("\n")[0].strip(), []).append(block)
    return files


def summary_labels(blocks, name="summary"):
    """Labels from the block of one file, both forms ("Seizure Start Time" and "Seizure 1 Start Time")."""
    block = blocks[0]
    what = f"{name}, {block.split(chr(10))[0].strip()}"
    if len(blocks) > 1:
        raise DataError(f"{what}: named {len(blocks)} times")
    count = re.search(r"^Number of Seizures in File:\s*(\d+)", block, re.M)
    starts, ends = ([float(number(t, what)) for t in
                     re.findall(rf"^Seizure(?: *\d+)? {side} Time:\s*(\S+) sec", block, re.M)]
                    for side in ("Start", "End"))
    if not count or not int(count[1]) == len(starts) == len(ends):
        raise DataError(f"{what}: {count[1] if count else 'no'} seizures announced, "
                        f"{len(starts)} begin, {len(ends)} end")
    labels = Labels(list(zip(starts, ends)))
    span = [re.search(rf"^File {side} Time:\s*(\S+)", block, re.M) for side in ("Start", "End")]
    if all(span):                       # clock times, off by 10 s and more: only a gross difference counts
        begin, end = (clock(s[1], what) for s in span)
        labels.seconds = float((end - begin) % 86400)
        labels.slack = max(60.0, labels.seconds / 2)
    return labels


SIENA = re.compile(r"\s*(File name|Registration start time|Registration end time|(?:Seizure )?start time|"
                   r"(?:Seizure )?end time)\s*:\s*(.*?)\s*$", re.I)


def parse_siena(text, name="Seizures-list"):
    """Siena Seizures-list-PNxx.txt: {file name: [{"registration start", "registration end", "start", "end":
    text}]}."""
    files, state = {}, {}
    for found in filter(None, map(SIENA.match, text.split("\n"))):
        key = found[1].lower().removeprefix("seizure ").removesuffix(" time")
        if key == "file name":
            state = {"file": found[2]}
            files.setdefault(found[2], [])
        elif not state:
            raise DataError(f"{name}: {found[1]} stands before any file name")
        else:
            state[key] = found[2]
        if key == "end":
            files[state["file"]].append(state)
            state = {k: v for k, v in state.items() if k not in ("start", "end")}
    return files


def siena_times(entry, what):
    """(registration start in s of the day, its length, seizure onset and end in s after it) of one entry."""
    missing = [k for k in ("registration start", "registration end", "start", "end") if k not in entry]
    if missing:
        raise DataError(f"{what}: no {missing[0]} time")
    begin, stop, onset, end = (clock(entry[k], f"{what}: {k} time")
                               for k in ("registration start", "registration end", "start", "end"))
    length, onset, end = ((t - begin) % 86400 for t in (stop, onset, end))
    if not onset < end <= length:
        raise DataError(f"{what}: a seizure from {onset} s to {end} s in a recording of {length} s")
    return begin, float(length), float(onset), float(end)


def parse_seizeit(text, name="a1.tsv"):
    """SeizeIT1 annotation: onset, end (s), type, comment. A seizure whose end is None cannot be labelled."""
    labels = Labels()
    for line in text.split("\n"):
        row = line.split("\t")
        if not line.strip() or line.startswith("#"):
            continue
        if len(row) < 3:
            raise DataError(f"{name}: incomplete row {' '.join(row)!r}")
        if row[1].strip() == "None":
            raise DataError(f"{name}: the seizure at {row[0].strip()} s has no end")
        labels.events.append(tuple(float(number(cell, f"{name}: time")) for cell in row[:2]))
    return labels


# ---- layouts ----

@dataclass
class Source:
    """One EDF of a corpus, what its place says about it, and its annotation file (None: unlabelled)."""
    path: Path
    name: str                           # of the recording: path below SRC without .edf
    layout: str
    patient: str
    split: str
    annotation: Path | None


NAMES = {                               # stem of the EDF -> patient
    "tuh": re.compile(r"([a-z]{8})_s\d{3}_t\d{3}$"),
    "chbmit": re.compile(r"(chb\d{2})[a-z]?_\d{2}\+?$", re.I),
    "siena": re.compile(r"(PN\d{2})(-[\d.]*)?$", re.I),
    "bids": re.compile(r"sub-([A-Za-z0-9]+)(?:_[a-zA-Z]+-[A-Za-z0-9]+)*_eeg$"),
    "seizeit": re.compile(r"(P_ID\d+)_r\d+$", re.I)}
LAYOUTS = ("auto", *NAMES)


def identify(path, root, layout="auto"):
    """Source of an EDF below `root`. auto: the layout is told by the file's name; other names are taken as
    they come, with the annotation beside them (x_events.tsv, x.csv_bi, x.csv) and the patient named by the
    folder in `root` or, directly there, by what stands before the first underscore."""
    relative = path.relative_to(root)
    kind = layout if layout != "auto" else next((k for k, form in NAMES.items() if form.match(path.stem)), "")
    found = NAMES[kind].match(path.stem) if kind else None
    if found:
        patient = found[1].lower() if kind in ("tuh", "chbmit") else found[1]
    else:
        patient = path.stem.split("_")[0] if len(relative.parts) == 1 else relative.parts[0]
    parts = (*relative.parts[:-1], root.name, root.parent.name) if kind == "tuh" else ()
    split = next((part for part in parts if part in ("train", "dev", "eval")), "")
    return Source(path, relative.with_suffix("").as_posix(), kind, patient, split, annotation(path, kind))


def annotation(path, layout):
    """The annotation file that belongs to an EDF, or None."""
    stem = path.stem.removesuffix("_eeg")
    beside = [path.with_name(stem + "_events.tsv"), path.with_suffix(".csv_bi"),
              path.with_name(stem + ".csv_bi"),
              path.with_suffix(".csv")]
    names = {"tuh": beside[1:], "bids": beside[:1], "": beside,
             "chbmit": [path.with_name(f"{re.split('[a-z]?_', path.stem)[0]}-summary.txt"),
                        *sorted(path.parent.glob("*-summary.txt"))],
             "siena": sorted(path.parent.glob("Seizures-list*.txt")),
             "seizeit": [path.with_name(path.stem + "_a1.tsv")]}
    # a dead link counts: labels that cannot be read are no reason to call a recording unlabelled
    return next((p for p in names[layout] if os.path.lexists(p)), None)


def read_labels(source, header):
    """Labels of a source, or None where its annotation does not name it (then it is unlabelled)."""
    if source.annotation is None:
        return None
    text, name = read_text(source.annotation), source.annotation.name
    if name.endswith("_events.tsv"):
        return parse_events_tsv(text, name)
    if source.layout == "seizeit":
        return parse_seizeit(text, name)
    if source.layout == "chbmit":
        blocks = parse_summary(text).get(source.path.name)
        return summary_labels(blocks, name) if blocks else None
    if source.layout == "siena":
        return siena_labels(parse_siena(text, name), source, header)
    return parse_csv(text, name)


def siena_labels(files, source, header):
    """Seizures of one Siena recording, from the wall clock. The list spells some names wrongly (O for 0, no
    number): a lone name left over is taken for the lone recording left over, and noted."""
    def plain(name):
        return name.upper().replace("O", "0").removesuffix(".EDF").rstrip("-")
    listed = {plain(name): times for name, times in files.items()}
    labels, key = Labels(slack=60.0), plain(source.path.name)
    if key not in listed:
        others = {plain(p.name) for p in source.path.parent.iterdir() if p.suffix.lower() == ".edf"}
        left = [name for name in listed if name not in others]
        if len(left) != 1 or len(others - set(listed)) != 1:
            return None
        key = left[0]
        labels.notes.append(f"taken for {key} of {source.annotation.name}")
    for entry in listed[key]:
        begin, length, onset, end = siena_times(entry, f"{source.annotation.name}, {entry['file']}")
        start = clock(header.start, "start time of the EDF")
        if start and start != begin % 86400:            # 0: taken out by anonymisation
            raise DataError(f"{source.annotation.name} says it begins at {entry['registration start']}, "
                            f"its header {header.start}")
        labels.seconds = length
        labels.events.append((onset, end))
    return labels


# ---- import ----

@dataclass
class Report:
    """What an import did: names of recordings, with the reason where there is one."""
    read: list = field(default_factory=list)
    repaired: list = field(default_factory=list)        # (name, what)
    refused: list = field(default_factory=list)         # (file, why)
    kept: int = 0                                       # finished by an earlier import
    unlabelled: int = 0
    seconds: float = 0.0                                # of EEG imported

    def add(self, source, outcome, reason, seconds, labelled):
        """Count what import_one returned."""
        if outcome == "refused":
            self.refused.append((shown(source.path), reason))
        elif outcome == "repaired":
            self.repaired.append((source.name, reason))
        elif outcome == "read":
            self.read.append(source.name)
        else:
            self.kept += 1
        self.unlabelled += outcome != "refused" and not labelled
        self.seconds += seconds


def find_edf(src):
    """(EDF files below src, root, [(folder, why it cannot be listed)]); links are followed, each folder
    once."""
    src = Path(src)
    if src.is_file() or src.is_symlink() and not src.is_dir():
        return [src], src.parent, []
    if not src.is_dir():
        raise DataError(f"{src}: no such file or folder")
    found, seen, closed = [], set(), []
    for folder, folders, files in os.walk(src, followlinks=True,
                                          onerror=lambda e: closed.append((str(e.filename), e.strerror))):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        found += [Path(folder, name) for name in files if name.lower().endswith(".edf")]
    if not found and not closed:
        raise DataError(f"{src}: no EDF file in it")
    return sorted(found), src, closed


def shown(path):
    """A path as text that can be printed on one line."""
    return os.fsencode(path).decode(errors="replace").replace("\n", "\N{REPLACEMENT CHARACTER}")


def state_of(source):
    """Sizes and times of the files a recording is made of: [[name, size, mtime_ns], ...]."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in (source.path, source.annotation) if p]


def finished(target, source, settings):
    """Whether `target` was made from these very files with these settings: (labelled, repaired), else None.
    DataError where it holds another recording, as sub-01 of a second corpus would be."""
    try:
        with h5py.File(target, "r") as f:
            a = f.attrs
            made = [int(a["format"]), a["prepared"], a["patient"], a["split"], json.loads(a["source_state"])]
            if made == [FORMAT, settings.hash, source.patient, source.split, state_of(source)]:
                return bool(a["labelled"]), a["repaired"]
            before = Path(a["source"])
    except (OSError, KeyError, ValueError):
        return None
    if before.exists() and not before.samefile(source.path):
        raise Occupied(f"its place holds {before}: give each corpus a folder of its own")
    return None


def prepare_source(source, settings):
    """(Prepared, Labels or None, events) of one source; DataError with the reason when it is refused."""
    try:
        if shown(source.path) != str(source.path):
            raise DataError("its name holds a line break or is not UTF-8: rename it")
        if not stat.S_ISREG(source.path.stat().st_mode):
            raise DataError("not a regular file")
        header = read_header(source.path)
        labels = read_labels(source, header)
        events = finish(labels, header.seconds) if labels else np.empty((0, 2))
        return prepare_edf(source.path, settings), labels, events
    except OSError as error:
        what = Path(error.filename).name + ": " if error.filename else ""
        raise DataError(what + (error.strerror or str(error))) from None


def import_one(source, out, settings):
    """Import one recording: (source, outcome, reason, seconds, labelled) with outcome kept, read, repaired or
    refused."""
    target = Path(out, source.name + ".h5")
    try:
        done = finished(target, source, settings)
        if done:
            return source, "kept", done[1], 0.0, done[0]
        prepared, labels, events = prepare_source(source, settings)
        state = state_of(source)
    except (DataError, OSError) as error:
        if not isinstance(error, Occupied):
            target.unlink(missing_ok=True)              # what an earlier state of the source gave
        return source, "refused", str(error), 0.0, False
    notes = prepared.header.notes + (labels.notes if labels else [])
    if source.annotation and not labels:
        notes.append(f"unlabelled: {source.annotation.name} does not name it")
    attributes = {
        "scale": prepared.scale, "fs": FS, "channels": list(CHANNELS[settings.montage]),
        "montage": settings.montage,
        "patient": source.patient, "split": source.split, "labelled": labels is not None,
        "norm": prepared.norm,
        "source": str(source.path), "source_state": json.dumps(state), "source_fs": prepared.rate,
        "layout": source.layout, "format": FORMAT, "prepared": settings.hash,
        "repaired": "; ".join(dict.fromkeys(notes))}
    write_recording(target, prepared.eeg, events, attributes)
    outcome = "repaired" if notes else "read"
    return source, outcome, attributes["repaired"], prepared.header.seconds, labels is not None


def write_recording(target, eeg, events, attributes):
    """One recording, eeg int16 (C, T), under its final name, complete and durable, or not at all.

    Format 2: `eeg` lies in chunks of (C, CHUNK), uncompressed, one after the other behind all else, so that a
    window of training is one read. Where HDF5 puts them elsewhere, DataError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with h5py.File(temp, "w", libver="latest") as f:
            f.attrs.update(attributes)
            f.create_dataset("events", data=events)
            _write_chunks(f, eeg)
            _first_chunk(target, f["eeg"])
        import checkpoint               # here: torch takes a worker a second
        checkpoint.durable_replace(temp, target)
    except RuntimeError as error:       # what h5py makes of a full disk while it closes the file
        raise OSError(f"{target}: {error}") from None
    finally:
        temp.unlink(missing_ok=True)


def _write_chunks(file, eeg):
    """The dataset `eeg`; its last chunk is padded with zeros."""
    channels, samples = eeg.shape
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((channels, CHUNK))
    # all room is taken at once: that puts the chunks in a row
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # the shape may not be smaller than a chunk, but what it may grow to counts
    shape = h5py.h5s.create_simple((channels, samples), (channels, max(samples, CHUNK)))
    dataset = h5py.h5d.create(file.id, b"eeg", h5py.h5t.STD_I16LE, shape, layout)
    for start in range(0, samples, CHUNK):
        chunk = np.zeros((channels, CHUNK), "<i2")
        part = eeg[:, start:start + CHUNK]
        chunk[:, :part.shape[1]] = part
        dataset.write_direct_chunk((0, start), chunk.tobytes())


def _first_chunk(path, eeg):
    """Where in the file the samples of the dataset `eeg` begin, bytes. DataError where they are not whole
    chunks in a row, as write_recording lays them."""
    size = 2 * eeg.shape[0] * CHUNK
    wanted = eeg.dtype == np.dtype("<i2") and eeg.chunks == (eeg.shape[0], CHUNK) and eeg.compression is None
    found = []
    if wanted:
        eeg.id.chunk_iter(lambda chunk: found.append((chunk.chunk_offset[1], chunk.byte_offset)))
    found.sort()
    offset = found[0][1] if found else 0
    count = -(-eeg.shape[1] // CHUNK)
    if not offset or found != [(k * CHUNK, offset + k * size) for k in range(count)]:
        raise DataError(f"{path}: its samples are not whole chunks of int16, one after the other: import it again")
    return offset


def import_corpus(src, out, layout="auto", montage="referential", notch="both", blank_unit="", workers=0,
                  say=print, progress=lambda what: None):
    """Import every EDF of `src` into `out`, in parallel, keeping what an earlier import finished. Returns
    the Report.

    DataError for a missing folder or one that another import is writing; refused files are in the report,
    not raised."""
    settings = Settings(montage, str(notch), blank_unit)
    if montage not in CHANNELS or settings.notch not in NOTCH or layout not in LAYOUTS:
        raise DataError(f"montage {montage}, notch {notch} or layout {layout} is unknown")
    if workers < 0:
        raise DataError(f"{workers} workers")
    files, root, closed = find_edf(src)
    out = Path(out)
    import checkpoint                   # here: torch takes a command a second
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = checkpoint.lock(out)
    except checkpoint.InUse:
        raise DataError(f"{out}: another import is writing here") from None
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}") from None
    try:
        for stale in out.rglob("*.h5.*.part"):          # left by a killed import
            stale.unlink()
        report = _import_all(files, root, out, layout, settings, workers, say, progress)
        report.refused += closed
        seen = {shown(path) for path in files}
        before = [refusal for refusal in read_report(out) if refusal[0] not in seen]
        checkpoint.write_json(out / REPORT, {"refused": before + report.refused})
        entries(out)                                    # writes the index
    finally:
        lock.close()
    _table(report, say)
    return report


def _import_all(files, root, out, layout, settings, workers, say, progress):
    report, sources, taken = Report(), [], {}
    for path in files:
        source = identify(path, root, layout)
        if source.name in taken:
            report.refused.append((shown(path), f"same name as {taken[source.name]}"))
            continue
        taken[source.name] = path.name
        sources.append(source)
    size = sum(_size(source.path) for source in sources)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # a worker takes a second to start
    workers = workers or max(1, min(cores, len(sources), size // 200_000_000))
    began = said = time.monotonic()
    done, number = 0, 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="import", disable=not sys.stderr.isatty()) as bar:
        for source, *result in _outcomes(sources, out, settings, workers):
            report.add(source, *result)
            progress("imported recording")
            read = _size(source.path)
            done, number = done + read, number + 1
            bar.set_postfix_str(source.name[-40:], refresh=False)
            bar.update(read)
            if bar.disable and time.monotonic() - said > 10:
                said = time.monotonic()
                left = (said - began) * (size - done) / max(1, done) / 60
                say(f"import: {number} of {len(sources)} files, {left:.1f} min left")
    return report


def _size(path):
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _outcomes(sources, out, settings, workers):
    """Results of import_one in the order they come; in this process, or in `workers` fresh ones."""
    if workers == 1:
        yield from (import_one(source, out, settings) for source in sources)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_die_with_parent) as pool:
        try:
            # workers inherit the mask: Ctrl-C, which a terminal sends to all, is this process's to answer
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                jobs = [pool.submit(import_one, source, out, settings) for source in sources]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield from (job.result() for job in as_completed(jobs))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent():
    """A worker ends when the import is killed, whatever it was waiting for."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _table(report, say):
    for name, what in report.repaired:
        say(f"repaired {name}: {what}")
    if report.refused:
        say(f"{len(report.refused)} refused:")
        for path, why in report.refused:
            say(f"  {path}: {why}")
    say(f"{len(report.read)} read, {len(report.repaired)} repaired, {report.kept} already there, "
        f"{len(report.refused)} refused, {report.unlabelled} without annotations; "
        f"{report.seconds / 3600:.2f} h of EEG imported")


def read_report(out):
    """[[file, reason], ...] of the files that imports into `out` refused."""
    try:
        return json.loads(Path(out, REPORT).read_text())["refused"]
    except (OSError, ValueError, KeyError):
        return []


# ---- what an import wrote ----

ENTRY = set("patient split montage prepared repaired channels fs labelled scale norm source_fs samples offset "
            "events size mtime digest".split())
OLDER = {1: "a window lay in 19 places of a format 1 file, and reading it from a disk or a network took up to "
            "100 times as long"}


def load_recording(path):
    """What stands about a recording in its HDF5 file, checked, as plain values for the index."""
    try:
        with h5py.File(path, "r") as f:
            entry = _entry(path, f)
        with open(path, "rb") as raw:
            now = os.fstat(raw.fileno())
            entry |= {"size": now.st_size, "mtime": now.st_mtime_ns, "digest": digest(raw.read(entry["offset"]))}
    except DataError:
        raise
    except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{path} is not a whole recording of data.py import ({error})") from None
    chunks = -(-entry["samples"] // CHUNK)
    if entry["size"] < entry["offset"] + 2 * len(entry["channels"]) * CHUNK * chunks:
        raise DataError(f"{path}: its samples are not whole: import it again")
    values = np.array([*entry["scale"], entry["norm"]])
    if not (np.isfinite(values) & (values > 0)).all():
        raise DataError(f"{path}: scale or norm is not a positive number: import it again")
    return entry


def _entry(path, file):
    """The index's values of one open HDF5 file."""
    a, eeg = dict(file.attrs), file["eeg"]
    form = int(a["format"])
    if form != FORMAT:
        why = f" ({OLDER[form]})" if form in OLDER else ""
        raise DataError(f"{path} has format {form}, not {FORMAT}: import it again{why}")
    entry = {key: str(a[key]) for key in ("patient", "split", "montage", "prepared", "repaired")}
    entry |= {
        "channels": [str(name) for name in a["channels"]],
        "fs": int(a["fs"]),
        "labelled": bool(a["labelled"]),
        "scale": [float(value) for value in a["scale"]],
        "norm": float(a["norm"]),
        "source_fs": float(a["source_fs"]),
        "samples": eeg.shape[1],
        "offset": _first_chunk(path, eeg),
        "events": file["events"][()].astype(float).tolist(),
    }
    if not eeg.shape[0] == len(entry["channels"]) == len(entry["scale"]):
        raise DataError(f"{path}: {eeg.shape[0]} rows of samples for {len(entry['channels'])} channels")
    return entry


def digest(header):
    """Of the bytes before the samples: all that stands about a recording lies there."""
    return hashlib.sha256(header).hexdigest()


FEW = 32                                # files whose time changed: looked at one by one, not taken for a copy


def entries(root):
    """{name: ((size, mtime_ns) of the file now, what load_recording says)} of every recording below an
    imported folder, sorted by name.

    The latter comes from the index that the import wrote beside the files and that travels with them: opening 6,500
    recordings is one read. A file that is not in it, or of another size, is read again. So are a few of
    another time; a copy changes the time of every file, and then each is compared with the index's digest
    when its samples are first read."""
    index, fresh = _read_index(root / INDEX), {}
    files = dict(sorted(_walk(root)))
    states = {name: file_state(os.stat(file)) for name, file in files.items()}
    moved = {name for name in files if name in index and index[name]["mtime"] != states[name][1]}
    for name, file in files.items():
        known = index.get(name)
        if not known or known["size"] != states[name][0]:
            fresh[name] = load_recording(file)
        elif name in moved and len(moved) <= FEW:
            fresh[name] = _looked_at(file, known)
        else:
            fresh[name] = known
    if fresh != index:
        _write_index(root, fresh)
    return {name: (states[name], entry) for name, entry in fresh.items()}


def file_state(status):
    """What tells one content of a file from another without reading it: (size, mtime_ns) of an os.stat."""
    return status.st_size, status.st_mtime_ns


def _looked_at(file, known):
    """The index's entry where the file's header is the one that it describes, else that of the file."""
    with open(file, "rb") as raw:
        if digest(raw.read(known["offset"])) == known["digest"]:
            return known | {"mtime": os.fstat(raw.fileno()).st_mtime_ns}
    return load_recording(file)


def _write_index(root, recordings):
    import checkpoint                   # here: torch takes a command a second
    try:
        checkpoint.write_json(root / INDEX, {"format": FORMAT, "recordings": recordings})
    except OSError:
        pass                            # a read-only folder: opening it just takes longer


def _walk(root):
    """(name, path) of every .h5 file, links followed."""
    base = len(str(root)) + 1
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            if file.endswith(".h5"):
                full = f"{folder}/{file}"
                yield full[base:-3].replace(os.sep, "/"), full


def _read_index(path):
    try:
        content = json.loads(path.read_text())
        recordings = content["recordings"] if content["format"] == FORMAT else {}
        whole = all(ENTRY <= entry.keys() for entry in recordings.values())
        return recordings if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
