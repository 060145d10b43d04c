"""What a corpus says beside its signals: the seizures of a recording, by an annotation file or by
the annotations inside an EDF+, and its own version.

Every reader takes (annotation file, header of the EDF) and returns Labels, or None where the file
says nothing about this recording. What contradicts itself is refused, never guessed.
"""
import datetime
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eeg.edf import DataError, number

# TUSZ annotation codes
SEIZURE = set("seiz fnsz gnsz spsz cpsz absz tnsz cnsz tcsz atsz mysz nesz".split())


@dataclass
class Labels:
    """Seizures of one recording as (onset, end) in s; `seconds` is the recording's length by the
    annotation, if it says so, and `slack` how far that may be from the signal's."""
    events: list = field(default_factory=list)
    seconds: float | None = None
    slack: float = 2.0
    notes: list = field(default_factory=list)


def finish(labels, seconds):
    """Labels -> sorted, disjoint events float64 (N, 2) inside a recording of `seconds`; refuses
    what contradicts it.

    An event that begins inside and ends beyond the end is cut there, and noted; one wholly beyond
    is refused."""
    if labels.seconds is not None and abs(labels.seconds - seconds) > labels.slack:
        raise DataError(f"the annotation is of {labels.seconds:g} s, the signal has {seconds:g} s: "
                        "not the same recording")
    spans = []
    for onset, end in sorted(labels.events):
        what = f"event from {onset:g} s to {end:g} s"
        if onset < 0 or end <= onset:
            raise DataError(what)
        if onset >= seconds:
            raise DataError(f"{what} lies beyond the recording's {seconds:g} s")
        if end > seconds + 0.02:
            labels.notes.append(f"{what} cut at the recording's end, {seconds:g} s")
        end = min(end, seconds)
        if spans and onset <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([onset, end])
    return np.array(spans, np.float64).reshape(-1, 2)


# ---- tables ----

def read_text(path):
    """Text of an annotation file, CRLF and byte order mark taken off."""
    raw = Path(path).read_bytes()
    if not raw.strip():
        raise DataError(f"{Path(path).name} is empty")
    # a mark says UTF-16, what Windows calls Unicode; else UTF-8, and Latin-1 where it is not that
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def table(text, name, delimiter, columns):
    """Rows of a delimited table as dicts; comment lines (#) are skipped, the header must hold
    `columns`."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    # nobody quotes; a lone quote must not swallow rows
    rows = [line.split(delimiter) for line in lines]
    header = []
    if rows:
        header = [cell.strip() for cell in rows[0]]
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(f"{name}: no column {', '.join(missing)} "
                        f"(it has {', '.join(header) or 'none'})")
    needed = 1 + max(header.index(column) for column in columns)
    short = [row for row in rows[1:] if len(row) < needed]
    # a last line without its end: the file was cut here, more rows may have followed
    if len(rows[-1]) < len(header) and not text.endswith("\n"):
        short.append(rows[-1])
    if short:
        raise DataError(f"{name}: incomplete row {delimiter.join(short[0])[:60]!r}")
    found = []
    for row in rows[1:]:
        cells = [cell.strip() for cell in row]
        found.append(dict(zip(header, cells)))
    return found


def read_events_tsv(path, header):
    return parse_events_tsv(read_text(path), path.name)


def parse_events_tsv(text, name="events.tsv"):
    """SzCORE / BIDS events: sz, sz_foc*, sz_gen*, sz_uo* are seizures, bckg and impd (impedance
    test) are not."""
    labels, tests = Labels(), []
    rows = table(text, name, "\t", ("onset", "duration", "eventType"))
    if not rows:
        raise DataError(f"{name} has no row: "
                        "SzCORE marks a recording without seizure by one bckg row")
    for row in rows:
        kind = row["eventType"]
        _note_length(labels, row.get("recordingDuration"), name)
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
            raise DataError(f"{name}: a seizure inside an impedance test "
                            f"(impd, {begin:g} s to {end:g} s)")
        labels.notes.append(f"impedance test from {begin:g} s to {end:g} s counted as background")
    return labels


def _note_length(labels, text, name):
    """Keep a row's recordingDuration; all rows must say the same."""
    if text in ("n/a", "", None):
        return
    seconds = float(number(text, f"{name}: recordingDuration"))
    if labels.seconds not in (None, seconds):
        raise DataError(f"{name}: recordingDuration is {labels.seconds:g} s and {seconds:g} s")
    labels.seconds = seconds


def read_csv(path, header):
    return parse_csv(read_text(path), path.name)


def parse_csv(text, name="csv"):
    """TUSZ .csv_bi (one TERM channel) or .csv (a row per derivation): the union of all seizure
    rows."""
    labels, background = Labels(), []
    duration = re.search(r"^#\s*duration\s*=\s*(\S+)\s*secs", text, re.M)
    if duration:
        labels.seconds = float(number(duration[1], f"{name}: duration"))
    rows = table(text, name, ",", ("channel", "start_time", "stop_time", "label"))
    if not rows:
        raise DataError(f"{name} has no row")
    for row in rows:
        start = float(number(row["start_time"], f"{name}: start_time"))
        stop = float(number(row["stop_time"], f"{name}: stop_time"))
        if stop <= start or start < 0:
            raise DataError(f"{name}: {row['label']} from {start:g} s to {stop:g} s")
        if row["label"] in SEIZURE:
            labels.events.append((start, stop))
        elif row["label"] != "bckg":
            raise DataError(f"{name}: unknown label {row['label']!r}")
        elif row["channel"] == "TERM":
            background.append((start, stop))

    for begin, end in background:
        if any(min(stop, end) - max(start, begin) > 0.02 for start, stop in labels.events):
            raise DataError(f"{name}: bckg from {begin:g} s to {end:g} s overlaps a seizure")
    return labels


def read_beside(path, header):
    """An annotation file that lies beside an EDF of no known corpus: told by its name."""
    if path.name.endswith("_events.tsv"):
        return read_events_tsv(path, header)
    return read_csv(path, header)


def read_seizeit(path, header):
    return parse_seizeit(read_text(path), path.name)


def parse_seizeit(text, name="a1.tsv"):
    """SeizeIT1 annotation: onset, end (s), type, comment. A seizure whose end is None cannot be
    labelled."""
    labels = Labels()
    for line in text.split("\n"):
        row = line.split("\t")
        if not line.strip() or line.startswith("#"):
            continue
        if len(row) < 3:
            raise DataError(f"{name}: incomplete row {' '.join(row)!r}")
        if row[1].strip() == "None":
            raise DataError(f"{name}: the seizure at {row[0].strip()} s has no end")
        onset = float(number(row[0], f"{name}: time"))
        end = float(number(row[1], f"{name}: time"))
        labels.events.append((onset, end))
    return labels


# ---- lists of a patient's seizures ----

def clock(text, what):
    """hh.mm.ss or hh:mm:ss, hours beyond 23 allowed, in s."""
    found = re.fullmatch(r"(\d{1,2})[.:](\d{1,2})[.:](\d{1,2})", text.strip(), re.A)
    if not found or int(found[2]) > 59 or int(found[3]) > 59:
        raise DataError(f"{what} is {text.strip()!r}, not a time")
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])


def read_summary(path, header):
    blocks = parse_summary(read_text(path)).get(header.path.name)
    return summary_labels(blocks, path.name) if blocks else None


def parse_summary(text):
    """CHB-MIT chbNN-summary.txt: {file name: [its blocks of lines]}."""
    files = {}
    for block in re.split(r"^File Name:", text, flags=re.M)[1:]:
        files.setdefault(block.split("\n")[0].strip(), []).append(block)
    return files


def summary_labels(blocks, name="summary"):
    """Labels from the block of one file, both forms ("Seizure Start Time" and "Seizure 1 Start
    Time")."""
    block = blocks[0]
    file = block.split("\n")[0].strip()
    what = f"{name}, {file}"
    if len(blocks) > 1:
        raise DataError(f"{what}: named {len(blocks)} times")
    count = re.search(r"^Number of Seizures in File:\s*(\d+)", block, re.M)
    starts = re.findall(r"^Seizure(?: *\d+)? Start Time:\s*(\S+) sec", block, re.M)
    ends = re.findall(r"^Seizure(?: *\d+)? End Time:\s*(\S+) sec", block, re.M)
    if not count or not int(count[1]) == len(starts) == len(ends):
        raise DataError(f"{what}: {count[1] if count else 'no'} seizures announced, "
                        f"{len(starts)} begin, {len(ends)} end")
    labels = Labels()
    for start, end in zip(starts, ends):
        labels.events.append((float(number(start, what)), float(number(end, what))))

    # clock times of the file are off by 10 s and more: only a gross difference counts
    begin = re.search(r"^File Start Time:\s*(\S+)", block, re.M)
    end = re.search(r"^File End Time:\s*(\S+)", block, re.M)
    if begin and end:
        labels.seconds = float((clock(end[1], what) - clock(begin[1], what)) % 86400)
        labels.slack = max(60.0, labels.seconds / 2)
    return labels


SIENA = re.compile(r"\s*(File name|Registration start time|Registration end time|"
                   r"(?:Seizure )?start time|(?:Seizure )?end time)\s*:\s*(.*?)\s*$", re.I)


def parse_siena(text, name="Seizures-list"):
    """Siena Seizures-list-PNxx.txt: {file name: [{"registration start", "registration end",
    "start", "end": text}]}."""
    files, entry = {}, {}
    for found in filter(None, map(SIENA.match, text.split("\n"))):
        key = found[1].lower().removeprefix("seizure ").removesuffix(" time")
        if key == "file name":
            entry = {"file": found[2]}
            files.setdefault(found[2], [])
            continue
        if not entry:
            raise DataError(f"{name}: {found[1]} stands before any file name")
        entry[key] = found[2]
        if key == "end":
            files[entry["file"]].append(entry)
            # the next seizure of this file has its own times
            entry = {k: v for k, v in entry.items() if k not in ("start", "end")}
    return files


def siena_times(entry, what):
    """(registration start in s of the day, its length, seizure onset and end in s after it) of one
    entry."""
    for key in ("registration start", "registration end", "start", "end"):
        if key not in entry:
            raise DataError(f"{what}: no {key} time")
    begin = clock(entry["registration start"], f"{what}: registration start time")
    length = (clock(entry["registration end"], f"{what}: registration end time") - begin) % 86400
    onset = (clock(entry["start"], f"{what}: start time") - begin) % 86400
    end = (clock(entry["end"], f"{what}: end time") - begin) % 86400
    if not onset < end <= length:
        raise DataError(f"{what}: a seizure from {onset} s to {end} s in a recording of {length} s")
    return begin, float(length), float(onset), float(end)


def read_siena(path, header):
    """Seizures of one Siena recording, from the wall clock. The list spells some names wrongly (O
    for 0, no number): a lone name left over is taken for the lone recording left over, and
    noted."""
    files = parse_siena(read_text(path), path.name)
    listed = {_siena_name(name): entries for name, entries in files.items()}
    labels, key = Labels(slack=60.0), _siena_name(header.path.name)
    if key not in listed:
        edfs = [other for other in header.path.parent.iterdir() if other.suffix.lower() == ".edf"]
        others = {_siena_name(other.name) for other in edfs}
        left = [name for name in listed if name not in others]
        if len(left) != 1 or len(others - set(listed)) != 1:
            return None
        key = left[0]
        labels.notes.append(f"taken for {key} of {path.name}")

    for entry in listed[key]:
        begin, length, onset, end = siena_times(entry, f"{path.name}, {entry['file']}")
        start = clock(header.start, "start time of the EDF")
        # midnight: taken out by anonymisation
        if start and start != begin % 86400:
            raise DataError(f"{path.name} says it begins at {entry['registration start']}, "
                            f"its header {header.start}")
        labels.seconds = length
        labels.events.append((onset, end))
    return labels


def _siena_name(name):
    return name.upper().replace("O", "0").removesuffix(".EDF").rstrip("-")


# ---- texts inside an EDF+ file ----

_SEIZURE = r"(seizure|seiz|sz|anfall|crise|crisis)( ?#?\d+)?"
_START = r"(start|begin|beginning|onset|on|beginn)"
_END = r"(end|stop|offset|off|ende)"
DEFAULT_TEXTS = {                       # what a text means, whole, in any case; - and _ are blanks
    "start": re.compile(rf"{_SEIZURE} ?{_START}|{_START}( of)? {_SEIZURE}"),
    "end": re.compile(rf"{_SEIZURE} ?{_END}|{_END}( of)? {_SEIZURE}"),
    "seizure": re.compile(rf"{_SEIZURE}|sz (foc|gen|uo)[a-z0-9 ]*|{'|'.join(sorted(SEIZURE))}"),
    "background": re.compile(r"bckg|background|no seizures?|seizure free")}


@dataclass(frozen=True)
class Texts:
    """What the user says of annotation texts, beside DEFAULT_TEXTS: those that mark a seizure,
    (start, end) pairs that enclose one, and those of a recording that was read and has no other
    seizure."""
    seizure: tuple = ()
    pairs: tuple = ()
    background: tuple = ()

    def given(self):
        return [*self.seizure, *(text for pair in self.pairs for text in pair), *self.background]

    def meaning(self, text):
        """("seizure" | "start" | "end" | "background" | "", which pair)."""
        said = plain(text)
        for k, (start, end) in enumerate(self.pairs):
            if said == start:
                return "start", k
            if said == end:
                return "end", k
        if said in self.seizure:
            return "seizure", None
        if said in self.background:
            return "background", None
        for meaning, form in DEFAULT_TEXTS.items():
            if form.fullmatch(said):
                return meaning, None
        return "", None


def plain(text):
    """A text as it is compared: small letters, - and _ as blanks."""
    return " ".join(re.sub(r"[-_]", " ", text.lower()).split())


def user_texts(seizure=(), background=()):
    """Texts of the command line's --seizure-label (TEXT or START..END) and --background-label."""
    single, pairs = [], []
    for text in seizure:
        parts = [plain(part) for part in text.split("..")]
        if len(parts) == 1:
            single += parts
        elif len(parts) == 2 and all(parts) and parts[0] != parts[1]:
            pairs.append(tuple(parts))
        else:
            raise DataError(f"--seizure-label {text}: START..END takes two different texts")
    background = [plain(text) for text in background]
    if not all([*single, *background]):
        raise DataError("--seizure-label and --background-label take a text")
    both = {*single, *(text for pair in pairs for text in pair)} & {*background}
    if both:
        raise DataError(f"{both.pop()!r} is a --seizure-label and a --background-label")
    return Texts(tuple(single), tuple(pairs), tuple(background))


def parse_annotations(found, texts):
    """Labels of what read_annotations gives; None where no text says that the recording was read
    for seizures.

    A seizure is a text with a duration, or lies between a start and an end; a seizure's text
    without a duration counts as a start. DataError for a start without an end and an end without a
    start."""
    labels = Labels()
    begun = {}                          # pair -> (onset, text) of a start that waits for its end
    labelled = False
    for onset, duration, text in sorted(found, key=lambda annotation: annotation[0]):
        meaning, pair = texts.meaning(text)
        if meaning:
            labelled = True
        if meaning == "seizure" and duration:
            labels.events.append((onset, onset + duration))
        elif meaning in ("seizure", "start"):
            if pair in begun:
                raise DataError(_no_end(*begun[pair]))
            begun[pair] = onset, text
        elif meaning == "end":
            if pair not in begun:
                raise DataError(f"{text!r} at {onset:g} s has no start")
            labels.events.append((begun.pop(pair)[0], onset))
    for onset, text in begun.values():
        raise DataError(_no_end(onset, text))
    return labels if labelled else None


def _no_end(onset, text):
    return f"{text!r} at {onset:g} s has no end: neither a duration nor a text that says so"


# ---- the corpus's own version ----

# tuh_eeg_seizure/v2.0.3, siena-scalp-eeg-database-1.0.0
NAMED = re.compile(r"(?:^|[-_])v?(\d+\.\d+\.\d+)$")
DATE = re.compile(r"\b(20\d\d)[-/]?([01]\d)[-/]?([0-3]\d)\b")


def release(root, labels):
    """What a corpus says of its own version and of its annotations' date, as one line, "" where it
    says nothing: README (TUSZ: AAREADME.txt), dataset_description.json (BIDS), a folder named
    v2.0.3, the head of a .csv_bi."""
    root = Path(root).resolve()
    said = _of_files(root)
    for place in (root, *root.parents[:2]):
        named = NAMED.search(place.name)
        if named and not said:
            said = f"version {named[1]}"
    # TUSZ's label files say their own
    head = _head(labels[0]) if labels and labels[0] else ""
    found = re.search(r"^#\s*version\s*=\s*(\S+)", head, re.M)
    parts = [said, f"labels {found[1]}"] if found else [said]
    return " ".join(", ".join(filter(None, parts)).split())[:200]


def _of_files(root):
    """Of the files that describe a corpus; what cannot be read says nothing."""
    for path in sorted(root.glob("*")):
        if path.name.lower().startswith("readme"):
            return _of_readme(_head(path))
    for place in (root, *root.parents[:2]):
        for path in sorted(place.glob("AAREADME*")):
            return _of_readme(_head(path))
    try:
        described = json.loads(_head(root / "dataset_description.json"))
        parts = [str(described[key]) for key in ("Name", "DatasetVersion") if key in described]
        return " ".join(parts)
    except (ValueError, TypeError):
        return ""


def _head(path):
    try:
        with open(path, errors="replace") as f:
            return f.read(1_000_000)
    except OSError:
        return ""


def _of_readme(text):
    """Version and newest date; "" where it names no version, as the README of something else."""
    version = re.search(r"\bversion\s*[:=]?\s*v?(\d+(?:\.\d+)+)|\bv(\d+\.\d+\.\d+)", text, re.I)
    if not version:
        return ""
    said = f"version {version[1] or version[2]}"
    dates = []
    for found in DATE.finditer(text):
        try:
            dates.append(datetime.date(*(int(part) for part in found.groups())))
        except ValueError:
            continue                    # a number that only looks like one
    if dates:
        said += f", newest date in its README {max(dates)}"
    return said
