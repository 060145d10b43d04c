"""The seizures of a recording, by an annotation file of a corpus or by the annotations inside an
EDF+.

Every reader takes (annotation file, header of the EDF, what the user says of texts) and returns
Labels, or None where the file says nothing about this recording. What contradicts itself is
refused, never guessed; Unlabelled says why a recording that can be read has no labels.
"""
import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eeg.columns import COLUMNS, LONG, NOTHING, SECONDS, SHORT, TIMES, another_clock, kind_of
from eeg.columns import refuse_codes, refuse_described, refuse_edges, refuse_lines, refuse_others
from eeg.columns import refuse_scale, refuse_times, said_length, title_of, with_points
from eeg.disk import named, write_file
from eeg.edf import NUMBER, DataError, number
from eeg.terms import BUTTON, CONFIRMS, DENIES, DOUBTS, EDGES, FINDER, NO, PROGRAM, SEIZURE
from eeg.terms import STRANGE, YES, Texts, marks, meaning_of, plain, speaks, unlikely
from eeg.terms import without_number

MAX_LIST_BYTES = 5_000_000              # of annotations; what is longer is a signal
SHORTEST = 0.05                         # s of a seizure; a jerk lasts twice as long, a sample less


class Unlabelled(DataError):
    """A recording that can be read and has no labels. The message says why; `texts` are those that
    were read."""

    def __init__(self, why, texts=()):
        super().__init__(why)
        self.texts = texts


class NoTable(DataError):
    """A file beside an EDF that holds no table of annotations."""


@dataclass
class Labels:
    """Seizures of one recording as (onset, end) in s; `seconds` is the recording's length by the
    annotation, if it says so, and `slack` how far that may be from the signal's; `background`
    are its rows without a seizure, if it has any; `texts` are those of a list that was read."""
    events: list = field(default_factory=list)
    seconds: float | None = None
    slack: float = 2.0
    background: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    texts: list = field(default_factory=list)


def finish(labels, seconds):
    """Labels -> sorted, disjoint events float64 (N, 2) inside a recording of `seconds`. One that
    ends beyond its end is cut there, and noted; what else contradicts it is refused."""
    if labels.seconds is not None and abs(labels.seconds - seconds) > labels.slack:
        raise DataError(f"the annotation is of {labels.seconds:g} s, the signal has {seconds:g} s: "
                        "not the same recording")
    if labels.background:
        _note_holes(labels, seconds)
    spans = []
    for onset, end in sorted(labels.events):
        what = f"event from {onset:g} s to {end:g} s"
        if onset < 0 or end <= onset:
            raise DataError(f"{what}: it begins before the recording, or does not last")
        if onset >= seconds:
            raise DataError(f"{what} lies beyond the recording's {seconds:g} s: of another, or in "
                            "samples or ms?")
        if end > seconds + 0.02:
            labels.notes.append(f"{what} cut at the recording's end, {seconds:g} s")
        end = min(end, seconds)
        if spans and onset <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([onset, end])
    for onset, end in spans:
        if end - onset < SHORTEST:
            raise DataError(f"event from {onset:g} s to {end:g} s: a moment, not a seizure")
    longest = max((end - onset for onset, end in spans), default=SHORT)
    if longest < SHORT:
        labels.notes.append(f"no seizure lasts longer than {longest:.3g} s: times in minutes?")
    if longest > LONG:
        labels.notes.append(f"a seizure lasts {longest:.4g} s: is an end left out?")
    return np.array(spans, np.float64).reshape(-1, 2)


def _note_holes(labels, seconds):
    """Note where rows, background among them, leave out a part: one on a seizure may be lost."""
    told = 0.0
    for onset, end in sorted(labels.background + labels.events):
        if onset > told + labels.slack:
            labels.notes.append(f"no row tells of {told:g} s to {onset:g} s: taken for background")
        told = max(told, end)
    if told < seconds - labels.slack:
        labels.notes.append(f"its rows end at {told:g} s of {seconds:g} s: the rest is taken for "
                            "background")


# ---- tables ----

def read_text(path):
    """Text of an annotation file without its byte order mark, each line ended by \\n."""
    with named(path):
        raw = Path(path).read_bytes()
    if not raw.strip():
        raise DataError(f"{Path(path).name} is empty")
    # a mark says UTF-16, what Windows calls Unicode; else UTF-8, and Latin-1 where it is not that
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return re.sub("\r\n|[\r\v\f\u2028\u2029]", "\n", text)


def table(text, name, delimiter, columns):
    """Rows of a delimited table as dicts; its header must hold `columns`."""
    # nobody quotes; a lone quote must not swallow rows
    rows = [[cell.strip() for cell in line.split(delimiter)] for line in _lines(text, name)]
    header = rows[0] if rows else []
    missing = [column for column in columns if header.count(column) != 1]
    if missing:
        what = "several columns" if missing[0] in header else "no column"
        raise DataError(f"{name}: {what} {', '.join(missing)} "
                        f"(it has {', '.join(header) or 'none'})")
    if delimiter == "\t":
        rows[1:] = with_points(rows[1:], [i for i, title in enumerate(header)
                                         if kind_of(title) in TIMES])
    try:
        _refuse_cut(rows, 1 + max(map(header.index, columns)), text)
        _refuse_hidden([line for line in text.split("\n")
                        if line.count(delimiter) >= len(columns) - 1])
        refuse_others(rows[1:], header, name)
        refuse_lines([line for line in text.split("\n") if line.startswith("#")], "", name)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return [dict(zip(header, row)) for row in rows[1:]]


def _refuse_cut(rows, needed, text):
    """Refuse a table, titles first, with a row of less than `needed` cells, or of more than the
    titles, two in one line; or a last line without its end: the file was cut here, more rows may
    have followed."""
    short = [row for row in rows[1:] if len(row) < needed or any(row[len(rows[0]):])]
    # a row in the line of the titles
    short += [rows[0]] * any(map(NUMBER.match, rows[0]))
    if len(rows[-1]) < len(rows[0]) and not text.endswith("\n"):
        short.append(rows[-1])
    if short:
        what = "incomplete row" if len(short[0]) <= len(rows[0]) else "more cells than titles in"
        raise DataError(f"{what} {' '.join(short[0])[:60]!r}")


def _refuse_hidden(lines):
    """Refuse a table with a row on a seizure that is commented out: who meant what is not known."""
    for line in lines:
        if line.startswith("#") and speaks(line):
            raise DataError(f"{line[:60]!r} is commented out: delete the row or its #")


def _lines(text, name):
    """Lines of a table: neither empty nor a comment. A comment that is a row by its two times is
    refused, as _refuse_hidden does."""
    for line in text.split("\n"):
        if (re.match(r"#(\s*|.*\D)\d[\d.]*[\t ]+\d[\d.]*[\t ]+[A-Za-z]", line)
                and "bckg" not in line):
            raise DataError(f"{name}: {line[:60]!r} is commented out: delete the row or its #")
    return [line for line in text.split("\n") if line.strip() and not line.startswith("#")]


def read_events_tsv(path, header, texts=None):
    text = read_text(path)
    labels = parse_events_tsv(text, path.name, texts, header.began if header else "")
    try:
        refuse_described(path, text, texts or Texts())
    except DataError as error:
        raise Unlabelled(str(error)) from None
    return labels


def parse_events_tsv(text, name="events.tsv", texts=None, began=""):
    """SzCORE / BIDS events: sz, sz_foc*, sz_gen*, sz_uo* are seizures, bckg and impd (impedance
    test) are not. A BIDS file without that column, of a task for one, is a list of texts."""
    titles = next(iter(_lines(text, name)), "")
    if "eventType" not in titles:
        try:
            return list_labels(text, name, texts, began)
        except NoTable:
            if "onset" in titles.lower():
                raise Unlabelled(f"{name} has no column eventType or trial_type") from None
    rows = table(text, name, "\t", ("onset", "duration", "eventType"))
    if not rows:
        raise DataError(f"{name} has no row: "
                        "SzCORE marks a recording without seizure by one bckg row")
    labels, tests = Labels(), []
    for row in rows:
        kind = row["eventType"]
        _note_length(labels, row.get("recordingDuration"), name)
        _check_kind(row, kind, name)
        span = _event(row, kind, name, labels.notes)
        stamp = row.get("dateTime") or ""
        if span and another_clock(stamp, began, span[0]):
            labels.notes.append(f"{name} is of a recording that begins at {stamp}, its header says "
                                f"{began}: its seconds count")
        if span and kind == "impd":
            tests.append(span)
        elif span and kind == "bckg":
            labels.background.append(span)
        elif span:
            labels.events.append(span)

    refuse_edges(list(rows[0]), [(float(row["onset"]), float(row["duration"]), list(row.values()))
                                 for row in rows if row["eventType"].startswith("sz")])
    for begin, end in tests:
        if any(onset < end and stop > begin for onset, stop in labels.events):
            raise DataError(f"{name}: a seizure inside an impedance test "
                            f"(impd, {begin:g} s to {end:g} s)")
        labels.notes.append(f"impedance test from {begin:g} s to {end:g} s counted as background")
    return labels


def _check_kind(row, kind, name):
    """Refuse a row of a kind that is not known, or that another of its cells contradicts."""
    if not re.fullmatch(r"sz|sz_(foc|gen|uo)\w*|bckg|impd", kind):
        raise DataError(f"{name}: unknown eventType {kind!r}")
    if kind.startswith("sz"):
        cells = judgements(row, row.values())
    else:
        cells = [said for title, cell in row.items() if marks(said := _of_another(title, cell))]
    if cells:
        raise DataError(f"{name}: {cells[0]!r} in a row that calls itself {kind}")


def _event(row, kind, name, notes):
    """(onset, end) of a row; None where it says nothing of seizures."""
    try:
        onset = float(number(row["onset"], f"{name}: onset of {kind}"))
        duration = float(number(row["duration"], f"{name}: duration of {kind}"))
    except DataError as error:
        if "n/a" not in (row["onset"], row["duration"]):
            raise
        if kind == "bckg":
            return None                 # of unknown length: the recording was read all the same
        raise Unlabelled(str(error)) from None
    if kind == "impd" and duration <= 0:
        notes.append(f"impedance test at {onset:g} s of {duration:g} s left out")
        return None
    if duration <= 0 or onset < 0:
        raise DataError(f"{name}: {kind} from {onset:g} s lasts {duration:g} s")
    return onset, onset + duration


def _note_length(labels, text, name):
    """Keep a row's recordingDuration; all rows must say the same."""
    if text in ("n/a", "", None):
        return
    seconds = float(number(text, f"{name}: recordingDuration"))
    if labels.seconds not in (None, seconds):
        raise DataError(f"{name}: recordingDuration is {labels.seconds:g} s and {seconds:g} s")
    labels.seconds = seconds


def write_events_tsv(path, events, seconds, confidence=None, start="n/a"):
    """SzCORE events file of a recording of `seconds`: one `sz` row per (onset, end) in s, or one
    `bckg` row over all where there is none. `start`: of the recording, YYYY-MM-DD hh:mm:ss."""
    lines = ["onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration"]
    same = f"n/a\t{start}\t{seconds:.2f}"
    for k, (onset, end) in enumerate(events):
        sure = confidence[k] if confidence else 1.0
        # of what is written: it ends where the next one begins, and not beyond the recording
        lasts = round(float(end), 2) - round(float(onset), 2)
        lines.append(f"{onset:.2f}\t{lasts:.2f}\tsz\t{sure:.2f}\t{same}")
    if len(lines) == 1:
        lines.append(f"0.00\t{seconds:.2f}\tbckg\tn/a\t{same}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, ("\n".join(lines) + "\n").encode())


def read_tuh(path, header, texts=None):
    parse = parse_tse if ".tse" in path.suffix else parse_csv
    return parse(read_text(path), path.name)


def parse_csv(text, name="csv"):
    """TUSZ .csv_bi (one TERM channel) or .csv (a row per derivation): the union of its seizures."""
    labels = Labels()
    duration = re.search(r"^#\s*duration\s*=\s*(\S+)\s*secs", text, re.M | re.I)
    if duration:
        labels.seconds = float(number(duration[1], f"{name}: duration"))
    rows = table(text, name, ",", ("channel", "start_time", "stop_time", "label"))
    _add_tuh_rows(labels, [(row["channel"], row["start_time"], row["stop_time"], row["label"],
                            row.get("confidence") or "") for row in rows], name)
    of = re.search(r"^#\s*bname\s*=\s*(\S+)", text, re.M)
    if of and not name.startswith(of[1]):
        labels.notes.append(f"{name} says that it is of {of[1]}")
    return labels


def parse_tse(text, name="tse"):
    """TUSZ until v1.5: .tse or .tse_bi, rows of start, stop, label, probability."""
    rows = [line.split() for line in _lines(text, name) if not line.startswith("version")]
    _refuse_length(rows, name)
    labels = Labels()
    _add_tuh_rows(labels, [("TERM", *(row + [""])[:4]) for row in rows], name)
    return labels


def _refuse_length(rows, name):
    """Refuse a table without titles whose rows are not of three cells or four."""
    for row in rows:
        if len(row) not in (3, 4):
            what = "incomplete row" if len(row) < 3 else "more than a row in"
            raise DataError(f"{name}: {what} {' '.join(row)[:60]!r}")


def _add_tuh_rows(labels, rows, name):
    """Seizures of (channel, start, stop, label, confidence). An empty row, 0.0000 to 0.0000, stands
    in some files of TUSZ before the good ones: left out."""
    for channel, begin, end, label, sure in rows:
        start = float(number(begin, f"{name}: start_time"))
        stop = float(number(end, f"{name}: stop_time"))
        if label not in SEIZURE and label != "bckg":
            raise DataError(f"{name}: unknown label {label!r}")
        if label in SEIZURE and judgements(["confidence"], [sure]):
            raise DataError(f"{name}: confidence {sure} of a seizure")
        if start == stop and len(rows) > 1:
            labels.notes.append(f"an empty row of {name} left out: {label} at {start:g} s")
        elif stop <= start or start < 0:
            raise DataError(f"{name}: {label} from {start:g} s to {stop:g} s")
        elif label != "bckg":
            labels.events.append((start, stop))
        elif channel == "TERM":
            labels.background.append((start, stop))
    if len(labels.notes) == len(rows):
        raise DataError(f"{name} has no row" + " but empty ones" * bool(rows))
    if labels.notes and not labels.events and any(row[3] != "bckg" for row in rows):
        raise DataError(f"{name}: its only seizure is an empty row")

    for begin, end in labels.background:
        if any(min(stop, end) - max(start, begin) > 0.02 for start, stop in labels.events):
            raise DataError(f"{name}: bckg from {begin:g} s to {end:g} s overlaps a seizure")


def read_beside(path, header, texts=None):
    """An annotation file beside an EDF of no known corpus: told by its name, and its columns."""
    if path.name.endswith("_events.tsv"):
        return read_events_tsv(path, header, texts)
    if path.suffix in (".csv_bi", ".tse", ".tse_bi"):
        return read_tuh(path, header)
    text = read_text(path)
    if path.suffix == ".csv" and "start_time" in text and "stop_time" in text:
        return parse_csv(text, path.name)
    began, seconds = (header.began, header.seconds) if header else ("", None)
    return list_labels(text, path.name, texts, began, seconds)


def is_list(path):
    """Whether a file is a table of onsets and texts, whatever these say."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            return False
        _find_titles(read_text(path), path.name)
    except (DataError, OSError, csv.Error):
        return False
    return True


# other columns that may say of a row that it does not count, or which edge of a seizure it is
JUDGES = re.compile(r"[ck]omment|comentar|remar|bemerk|befund|\bnot[ae]|review|confirm|verif|"
                    "valid|accept|certain|status|phase|state|edge|marker|confiden|probab|sicher|"
                    "opinion|assess|urteil|bewert|avis|interpret|class|categ|result|outcome|"
                    "consens|description|flag|level|value|action|bound|off|tag|moment|point|kind|"
                    r"switch|final|gold|truth|\bfp\b")


def list_labels(text, name, texts=None, began="", seconds=None):
    """Labels of annotations that were exported as a table: BIDS, EDFbrowser, MNE. Unlabelled where
    it is no such table or its texts say nothing or contradict each other; with the `seconds` of its
    recording, where its times may be in another unit."""
    found, texts = [], texts or Texts()
    why = f"no text of {name} says that the recording was read for seizures"
    try:
        found = parse_list(text, name, texts, began)
        labels = parse_annotations(found, texts)
        refuse_codes(found, texts)
        if labels and seconds:
            refuse_scale(labels.events, _find_titles(text, name)[1], seconds)
            labels.seconds, labels.slack = said_length(text)
    except NoTable:
        raise
    except (DataError, csv.Error) as error:
        labels, why = None, f"{name}: {error}"
    said = [text for *_, text in found]
    if labels is None:
        raise Unlabelled(why, said)
    labels.texts = said
    return labels


def parse_list(text, name, meanings, began=""):
    """[(onset in s, duration in s or None, text)] of a table with a column of onsets and one of
    texts, delimited by tabs, commas or semicolons."""
    above, titles, below, delimiter = _find_titles(text, name)
    columns = _columns(titles)
    timed = [place for kind in TIMES for place in columns.get(kind, ())]
    _refuse_units(titles, columns, timed)
    _refuse_hidden(below)
    refuse_lines(above, began, name)
    _refuse_above([_cells(line, delimiter) for line in above], columns)
    # MNE quotes nothing: what a last text holds of delimiters
    count = len(titles) if len(titles) - 1 in columns["text"] else None
    rows = [_cells(line, delimiter, count) for line in below if not line.startswith("#")]
    if delimiter != ",":
        rows = with_points(rows, timed)
    # a row that lacks a cell which others have may have lost any of them
    widest = max([columns["onset"][0] + 1, columns["text"][0] + 1, *map(len, rows)])
    _refuse_cut([titles, *rows], min(len(titles), widest), text)
    refuse_others(rows, titles, name)
    found, seizures = [], []
    for row in rows:
        of_row = _list_row(row, titles, columns, meanings, began)
        seizures += [(*times, row) for *times, text in of_row
                     if meanings.meaning(text)[0] == "seizure"][:1]
        found += of_row
    refuse_edges(titles, seizures)
    _refuse_heading(above, [text for *_, text in found], meanings)
    return found


def _find_titles(text, name):
    """(lines above the titles of a list, the titles, lines below them, delimiter)."""
    lines = [line for line in text.split("\n") if line.strip("# ")]
    for at, line in enumerate(lines[:10]):
        for delimiter in "\t,;":
            titles = _cells(line.lstrip("# "), delimiter)
            if {"onset", "text"} <= _columns(titles).keys():
                return lines[:at], titles, lines[at + 1:], delimiter
    raise NoTable(f"{name} is no table of onsets and texts, such as Onset,Duration,Annotation")


def _refuse_above(rows, columns):
    """Refuse a list that was sorted together with its titles: rows on a seizure stand above."""
    for row in rows:
        place = columns["onset"][0]
        if place < len(row) and NUMBER.match(row[place]) and any(map(marks, row)):
            raise DataError(f"{' '.join(row)[:60]!r} stands above the titles")


def _refuse_heading(lines, texts, meanings):
    """Refuse a list that calls itself one of seizures, or counts some, and has none by its rows."""
    known = [meanings.meaning(text)[0] for text in texts]
    for line in filter(marks, lines):
        if not {"seizure", "start"} & {*known} and ("" in known or re.search(r"\d", line)):
            raise DataError(f"{line[:60]!r} stands above rows that are on none")


def _cells(line, delimiter, count=None):
    """Cells of a line, `count` at most. A quote ends with its line: a lone one swallows no row."""
    cells = next(csv.reader([line], delimiter=delimiter))
    if count and len(cells) > count:
        cells[count - 1:] = [delimiter.join(cells[count - 1:])]
    return [cell.strip(' "') for cell in cells]


def _columns(titles):
    """{kind of column: its places}."""
    columns = {}
    for place, title in enumerate(titles):
        columns.setdefault(kind_of(title), []).append(place)
    columns.pop("", None)
    for kind, places in columns.items():    # one called onset before one called seizure start
        places.sort(key=lambda place: title_of(titles[place]) not in COLUMNS[kind])
    return columns


def _refuse_units(titles, columns, timed):
    """Refuse a list whose titles of the columns `timed` have another unit than seconds."""
    read = {places[0] for places in columns.values()}
    for place in timed:
        unit = re.search(r"[(\[,]\s*([^)\]]*)", titles[place])
        # a clock beside the seconds is not read
        known = SECONDS if place in read else SECONDS + "|h+:.*"
        if unit and not re.fullmatch(known, unit[1].strip().lower()):
            raise DataError(f"{titles[place]} is not in seconds")


def _list_row(row, titles, columns, meanings, began=""):
    """One annotation for each of its texts: a type and a comment say more together. Where they do
    not speak of a seizure, what other columns say of one is a text too; where they do, what judges
    them belongs to them."""
    onset, duration, end = (_number_of(row, columns.get(kind, ()), kind)
                            for kind in ("onset", "duration", "end"))
    if onset is None:
        raise DataError(f"no onset in the row {' '.join(row)[:60]!r}")
    refuse_times(list(map(title_of, titles)), row, onset, began)
    length = duration or (end - onset if end else 0)
    if length < 0 or duration and end and abs(onset + duration - end) > 1:
        raise DataError(f"the times of the row {' '.join(row)[:60]!r} do not agree")
    texts = [row[place] for place in columns["text"] if place < len(row) and row[place]]
    if not any(map(marks, texts)):
        # one called seizure start says so itself
        read = {place for kind, places in columns.items() for place in places
                if title_of(titles[place]) in COLUMNS[kind]}
        others = [_of_another(title, cell) for place, (title, cell) in enumerate(zip(titles, row))
                  if place not in read]
        texts += filter(None, others)
    judged = judgements(titles, row)
    # of a text that the user calls a seizure, too
    seizures = {text: text if marks(text) else "seizure" for text in texts if text not in judged
                and (marks(text) or meanings.meaning(text)[0] == "seizure")}
    if judged and seizures:
        texts = [" ".join([seizures[text], *judged]) if text in seizures else text
                 for text in texts if text not in judged]
    return [(onset, length or None, text) for text in dict.fromkeys(texts)]


def judgements(titles, row):
    """Cells of a row on a seizure that say that there is none, in whatever column, or that it is
    doubtful or found by a program, or that the row is its start or end; title=cell where the title
    says so."""
    found = []
    for title, cell in zip(map(title_of, titles), row):
        said = plain(cell)
        bare = re.sub("^(is|true) ", "", title)
        asks = CONFIRMS.search(title) or meaning_of(bare)[0] == "seizure"
        judges = title in COLUMNS["text"] or JUDGES.search(title)
        if (DENIES.fullmatch(said) or meaning_of(said)[0] not in ("", "seizure")
                or EDGES.fullmatch(said) and (judges or said not in ("on", "off"))
                or judges and DOUBTS.fullmatch(said)
                or (judges or FINDER.search(title)) and PROGRAM.fullmatch(said)
                or asks and NO.fullmatch(said)):
            found.append(cell)
        elif unlikely(title, cell) or not asks and YES.fullmatch(said) and (
                DOUBTS.fullmatch(plain(title)) or PROGRAM.fullmatch(title)):
            found.append(f"{title}={cell}")
    return found


def _number_of(row, places, what):
    """Number in the first column of a kind, None where it is empty; another must not say else."""
    cells = [row[place] for place in places if place < len(row)]
    if not cells or cells[0] in ("", "n/a"):
        return None
    value = float(number(cells[0], what))
    for cell in cells[1:]:
        if NUMBER.match(cell) and float(cell) != value:
            raise DataError(f"{what} is {cells[0]} and {cell} in one row")
    return value


def _of_another(title, cell):
    """What a cell of a column that is not read says of a seizure, by itself or by its title."""
    if speaks(cell):
        return "" if cell.lower().endswith(".edf") else cell
    titled = speaks(title.lower().replace("onset", "")) and not NOTHING.fullmatch(cell)
    return f"{title}={cell}" if titled else ""


def read_seizeit(path, header, texts=None):
    return parse_seizeit(read_text(path), path.name)


def parse_seizeit(text, name="a1.tsv"):
    """SeizeIT1 annotation: onset, end (s), type, comment. An end may be None: no labels then."""
    labels = Labels()
    rows = [line.split("\t") for line in _lines(text, name)]
    _refuse_length(rows, name)
    for row in rows:
        if row[1].strip() == "None":
            raise DataError(f"{name}: the seizure at {row[0].strip()} s has no end")
        onset = float(number(row[0], f"{name}: time"))
        end = float(number(row[1], f"{name}: time"))
        judged = judgements(("type", "comment"), row[2:])
        if judged:
            raise DataError(f"{name}: {judged[0]!r} in the row of a seizure at {onset:g} s")
        labels.events.append((onset, end))
    return labels


# ---- texts inside an EDF+ file ----
@dataclass
class Start:
    """A start that waits for its end."""
    onset: float
    text: str
    pairs: set
    number: int | None


def parse_annotations(found, texts):
    """Labels of what read_annotations gives; None where no text says that the recording was read
    for seizures.

    A seizure is a text with a duration, or lies between a start and an end; a seizure's text
    without a duration counts as a start. DataError for a start without an end, an end without a
    start, and a text that speaks of a seizure in words that are not known."""
    labels = Labels()
    begun = []                          # of Start
    labelled = False
    denied = []                         # (onset, end, text) without a seizure
    # EDF+ repeats a text for each channel that it stands at
    once = dict.fromkeys((onset, duration, text.partition("@@")[0].strip())
                         for onset, duration, text in found)
    for onset, duration, text in sorted(once, key=lambda annotation: annotation[0]):
        meaning, pairs, number = texts.meaning(text)
        labelled = labelled or bool(meaning)
        if meaning == "background" and duration:
            denied.append((onset, onset + duration, text))
            labels.background.append((onset, onset + duration))
        if meaning == "seizure" and duration:
            labels.events.append((onset, onset + duration))
        elif meaning in ("seizure", "start"):
            _refuse_unended(start for start in begun if start.pairs & pairs
                            and (number is None or start.number in (None, number)))
            begun.append(Start(onset, text, pairs, number))
        elif meaning == "end":
            start = _ended(begun, onset, text, pairs, number)
            begun.remove(start)
            labels.events.append((start.onset, onset))
        elif not meaning:
            _refuse_unknown(onset, text, begun)
            if (DOUBTS if duration else DENIES).fullmatch(plain(text)):
                denied.append((onset, onset + (duration or 0), text))
    _refuse_unended(begun)
    _refuse_denied(labels.events, denied)
    _note_buttons(labels, once)
    return labels if labelled else None


def _note_buttons(labels, found):
    """Note where a button was pressed, perhaps for a seizure, and none is labelled near."""
    alone = [onset for onset, _, text in found if BUTTON.search(plain(text)) and not any(
        begin - 60 <= onset <= end + 120 for begin, end in labels.events)]
    if alone:
        labels.notes.append(f"a button pressed at {alone[0]:g} s, where no seizure is labelled "
                            f"({len(alone)} in all): taken for background")


def _refuse_unknown(onset, text, begun):
    """Refuse a text without a meaning that may be on a seizure: by its words, or where it stands,
    a bare "end" after a start."""
    what = f"{text[:60]!r} at {onset:g} s"
    if speaks(text):
        how = "is in strange letters" if STRANGE.search(text) else "speaks of a seizure"
        raise DataError(f"{what} {how} and is not known: say what it means with "
                        "--seizure-label or --background-label of data.py import")
    if begun and EDGES.fullmatch(without_number(plain(text))[0]):
        raise DataError(f"{what} stands between {begun[0].text!r} at {begun[0].onset:g} s and its "
                        "end: another start or end?")


def _ended(begun, onset, text, pairs, number):
    """Which of the open starts an end closes: that of its pair and number, else the only one."""
    what = f"{text!r} at {onset:g} s"
    fitting = [start for start in begun if number is None or start.number in (None, number)]
    if begun and not fitting:
        raise DataError(f"{what} does not end {begun[0].text!r} at {begun[0].onset:g} s: "
                        "their numbers differ")
    own = [start for start in fitting if start.pairs & pairs] or fitting
    same = [start for start in own if start.number == number] or own
    if not same:
        raise DataError(f"{what} has no start")
    if len(same) > 1:
        raise DataError(f"{what} may end {same[0].text!r} at {same[0].onset:g} s or "
                        f"{same[1].text!r} at {same[1].onset:g} s")
    return same[0]


def _refuse_unended(starts):
    for start in starts:
        raise DataError(f"{start.text!r} at {start.onset:g} s has no end: neither a duration nor a "
                        "text that says so")


def _refuse_denied(events, denied):
    """Refuse a seizure where a text (onset, end, text) says that there is none."""
    for onset, end, text in denied:
        for event in events:
            common = min(end, event[1]) - max(onset, event[0])
            inside = DENIES.fullmatch(plain(text)) and event[0] <= onset <= event[1]
            # background may be said of a whole recording, beside its seizures
            if event == (onset, end) or inside or speaks(text) and common > 0.02:
                raise DataError(f"{text[:60]!r} from {onset:g} s to {end:g} s, and a seizure from "
                                f"{event[0]:g} s to {event[1]:g} s")
