"""How each corpus names its recordings and where its labels lie, and the labels of one recording,
from the files beside its EDF or from the texts inside.

A corpus layout is a row of LAYOUTS and, where its labels are of a new kind, a reader in
annotations.py or lists.py.
"""
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

from eeg import annotations, columns, lists, terms
from eeg.disk import exists
from eeg.edf import DataError, read_annotations

NEAR_SECONDS = 10                       # of a seizure: a text so near may be on it
MAX_KEPT_TEXTS = 100                    # of a recording's annotations
# what becomes of labels that cannot be read: the recording is refused, or it is unlabelled, or no
# label is opened at all
STRICT, LENIENT, NEVER = "strict", "lenient", "never"
# recordings that are not read
FOREIGN = (".edf.gz", ".edf.zip", ".bdf", ".rec", ".vhdr", ".set", ".fif", ".cnt", ".nwb", ".e")
SPLITS = ("train", "dev", "eval")


# ---- names and places ----

def beside(*endings):
    """Finder of annotation files named like the EDF, with or without its _eeg."""
    def find(path):
        stems = dict.fromkeys((path.stem.removesuffix("_eeg"), path.stem))
        return [path.with_name(stem + ending) for ending in endings for stem in stems]
    return find


def summary_beside(path):
    patient = re.split("[a-z]?_", path.stem)[0]
    return [path.with_name(f"{patient}-summary.txt"), *sorted(path.parent.glob("*-summary.txt"))]


def seizure_list(path):
    found = sorted(path.parent.glob("Seizures-list*.txt"))
    return sorted(found, key=lambda place: path.stem[:4].upper() not in place.name.upper())


class Layout(NamedTuple):
    """How a corpus names a recording, where its labels lie, who reads them."""
    name: re.Pattern                    # stem of the EDF; its first group is the patient
    example: str
    find: Callable                      # EDF path -> where its annotation may lie, the best first
    read: Callable                      # (its path, Header, Texts) -> Labels, None: not named there
    lower: bool = False                 # patients are written in small letters
    split: bool = False                 # folders train, dev and eval are the corpus's own split


LAYOUTS = {
    "tuh": Layout(re.compile(r"([a-z]{8}|\d{8})_s\d{3}_t\d{3}$"), "aaaaaaaa_s001_t000.edf",
                  beside(".csv_bi", ".csv", ".tse_bi", ".tse"), annotations.read_tuh,
                  lower=True, split=True),
    "chbmit": Layout(re.compile(r"(chb\d{2})[a-z]?_\d{2}\+?$", re.I), "chb01_03.edf",
                     summary_beside, lists.read_summary, lower=True),
    "siena": Layout(re.compile(r"(PN\d{2})(-[\d.]*)?$", re.I), "PN00-1.edf",
                    seizure_list, lists.read_siena),
    "bids": Layout(re.compile(r"sub-([A-Za-z0-9]+)(?:_[a-zA-Z]+-[A-Za-z0-9]+)*_eeg$"),
                   "sub-01_run-00_eeg.edf", beside("_events.tsv"), annotations.read_events_tsv),
    "seizeit": Layout(re.compile(r"(P_ID\d+)_r\d+$", re.I), "P_ID01_r1.edf",
                      beside("_a1.tsv"), annotations.read_seizeit)}
# an EDF of no known corpus
OTHER = Layout(re.compile("(?!)"), "", beside(
    "_events.tsv", ".csv_bi", ".csv", ".tse_bi", ".tse", "_annotations.csv", "_annotations.tsv",
    "_annotations.txt", ".tsv", ".txt"), annotations.read_beside)
# words before the first underscore that name no patient
GENERIC = set("eeg edf rec recording patient pat pt subject subj sub proband file export".split())
# folders that name none either: kinds of files, parts of a split, classes
KINDS = GENERIC | set(
    "edfs eegs recordings patients subjects files data raw rawdata sourcedata derivatives train "
    "training dev val validation eval test normal abnormal background bckg healthy control "
    "controls awake wake asleep sleep day night pre post baseline followup".split()) | {
        prefix + mark + what for mark in ("", " ", "-", "_") for what in (
            "ictal seizure seizures seiz sz anfall crise crisis epilepsy epileptic").split()
        for prefix in "pre post peri inter no non with without kein".split() + [""] * (not mark)}
# P01: who is meant, where a class or a part of a split stands before it
CODE = re.compile(r"[^\W\d]+[-. ]?\d+")


@dataclass
class Source:
    """One EDF of a corpus, what its place says about it, and its annotation file (None: none)."""
    path: Path
    name: str                           # of the recording: path below SRC without .edf
    layout: str
    patient: str
    split: str
    annotation: Path | None


def identify(path, root, layout="auto"):
    """Source of an EDF below `root`. auto: the layout is told by the file's name; other names are
    taken as they come, with the annotation beside them (x_events.tsv, x.csv_bi, x.csv, ...) and the
    patient named by the folder below `root` or, without one, by what stands before the first
    underscore, words like EEG or train apart."""
    relative = path.relative_to(root)
    if layout == "auto":
        layout = next((name for name, row in LAYOUTS.items() if row.name.match(path.stem)), "")
    row = LAYOUTS.get(layout, OTHER)
    named = row.name.match(path.stem)
    if named:
        patient = named[1].lower() if row.lower else named[1]
    else:
        words = path.stem.split("_")
        folders = [part for part in relative.parts[:-1] if part.lower() not in KINDS]
        telling = [word for word in words if word and word.lower() not in GENERIC]
        # seizure_1 is no patient 1
        codes = [word for word in telling if word.lower() not in KINDS]
        coded = codes and CODE.fullmatch(codes[0])
        named = folders or (codes if coded else telling) or words
        # a folder of BIDS may hold files whose names are not quite of BIDS
        patient = re.sub("^sub-(?=.)", "", named[0])

    split = ""
    if row.split:
        place = Path(os.path.abspath(root))             # of ".", too, as inside dev
        above = (*relative.parts[:-1], place.name, place.parent.name)
        split = next((part for part in above if part in SPLITS), "")
    # a dead link counts: labels that cannot be read are no reason to call a recording unlabelled
    annotation = next((place for place in row.find(path) if exists(place)), None)
    return Source(path, relative.with_suffix("").as_posix(), layout, patient, split, annotation)


def labelled_by(path):
    """The EDF whose labels a file at the absolute `path` would be taken for, or None."""
    if not path.parent.is_dir():
        return None
    for edf in sorted(path.parent.iterdir()):
        if edf.suffix.lower() == ".edf":
            layout = identify(edf, edf.parent).layout
            if path in LAYOUTS.get(layout, OTHER).find(edf):
                return edf
    return None


# ---- labels of one recording ----

def find_events(source, header, task):
    """(events float64 (N, 2) in s, or None for an unlabelled recording; {text of its annotations,
    where labels go by texts: how often}; why it is unlabelled). An annotation file counts alone;
    where there is none that is a table, what an EDF+ says inside."""
    if task.labels == NEVER:
        return None, {}, "labels were not opened"
    unread = ""
    if source.annotation:
        try:
            return _events_beside(source, header, task)
        except annotations.NoTable as error:
            unread = f"; {error}"
        except annotations.Unlabelled as error:
            return None, _kept(error.texts), str(error)
        except (DataError, OSError) as error:
            if task.labels == STRICT:
                raise
            return None, {}, f"labels that cannot be used: {error}"
    events, texts, why = _events_inside(header, task)
    others = _unread_beside(source.path, of_folder=True)
    if events is not None and others:
        header.notes.append(f"what its EDF+ says counts alone, not {', '.join(others)}")
    others = [name for name in others if name not in unread]
    if others:
        unread += f"; not read as labels: {', '.join(others)}"
    return events, texts, why + unread


def _events_beside(source, header, task):
    labels = LAYOUTS.get(source.layout, OTHER).read(source.annotation, header, task.texts)
    if not labels:
        return None, {}, f"{source.annotation.name} does not name it"
    try:
        events = annotations.finish(labels, header.seconds)
    except DataError as error:
        raise DataError(f"{source.annotation.name}: {error}") from None
    header.notes += labels.notes + _passed_over(source, header, task, events)
    whole = source.annotation.read_bytes().rstrip(b"\0 \t").endswith((b"\n", b"\r"))
    # a summary of CHB-MIT says how many seizures it has
    if not whole and source.layout != "chbmit":
        header.notes.append("the last line of its label file has no end: it may have been cut")
    return events, _kept(labels.texts), ""


def _passed_over(source, header, task, events):
    """Notes on what the annotation file that counts alone keeps from being read: other files, of a
    known corpus only those that have another seizure, and a text inside the EDF+ that has one."""
    row = LAYOUTS.get(source.layout, OTHER)
    readers = {source.path.with_name(name): OTHER.read for name in _unread_beside(source.path)}
    readers |= {path: row.read for path in row.find(source.path) if path.exists()}
    readers.pop(source.annotation)
    others = [path.name for path, read in readers.items()
              if row is OTHER or _has_more(path, read, header, task, events)]
    try:
        others += [f"the {text[:60]!r} inside the EDF+"
                   for onset, _, text in read_annotations(header) if terms.marks(text)
                   and not _overlaps(events, onset - NEAR_SECONDS, onset + NEAR_SECONDS)][:1]
    except DataError:
        pass                            # of texts that do not count: what counts was read
    return [f"{source.annotation.name} counts alone, not {what}" for what in others]


def _overlaps(events, onset, end):
    return bool(((events[:, 0] < end) & (events[:, 1] > onset)).any())


def _has_more(path, read, header, task, events):
    """Whether a file has a seizure that `events` have not, or cannot be read where these are none.
    TUSZ has an .lbl beside each .tse, with the same labels."""
    try:
        labels = read(path, header, task.texts)
        found = annotations.finish(labels, header.seconds) if labels else []
    except (DataError, OSError):
        return not len(events) and ".lbl" not in path.suffix
    return not all(_overlaps(events, *event) for event in found)


def _events_inside(header, task):
    events, found, why = None, [], "no annotations"
    try:
        found = read_annotations(header)
        labels = annotations.parse_annotations(found, task.texts)
        if found:
            why = "no EDF+ annotation says that it was read for seizures"
        if labels:
            # of an amplifier's marks none lasts
            columns.refuse_codes([mark for mark in found if mark[1]], task.texts)
            said = list(dict.fromkeys(text for *_, text in columns.codes(found, task.texts)))
            if said:
                header.notes.append("codes inside its EDF+, taken for no labels: "
                                    + ", ".join(said[:5]))
            events = annotations.finish(labels, header.seconds)
            header.notes += labels.notes
    except DataError as damage:
        why = f"its EDF+ annotations: {damage}"
    return events, _kept(text for *_, text in found), why


def _kept(texts):
    """{text: how often} of a recording, those that speak of a seizure first."""
    counts = Counter(text.partition("@@")[0].strip()[:200] for text in texts)
    first = sorted(counts, key=lambda text: (not terms.speaks(text), -counts[text]))
    return {text: counts[text] for text in first[:MAX_KEPT_TEXTS]}


# a file's name, or its end, that tells of labels
LABELS = (r"(annot|label|marker|event|seiz|sz|scor|anfa|cris|ictal|rater|review|summar|a\d\b)"
          r"[\w -]*(\.\w+)+")
# the .json of BIDS describe the EDF and the columns of its events
NOT_LABELS = (".edf", "_eeg.json", "_events.json", ".h5", ".md", ".pdf", ".png", ".jpg", ".md5",
              ".sha256", *FOREIGN)


def _unread_beside(path, of_folder=False):
    """Names of files beside an EDF that may hold its labels and are of no kind that is read; with
    `of_folder` those of no EDF, too, which may be of the whole folder: labels.csv."""
    stem = path.stem.removesuffix("_eeg")
    names = os.listdir(path.parent)
    edfs = tuple(name[:-4].removesuffix("_eeg") for name in names if name.lower().endswith(".edf"))
    # night_2_events.tsv is of night_2, not of night
    longer = tuple(other for other in edfs if len(other) > len(stem) and other.startswith(stem))
    own = re.compile(rf"{re.escape(stem)}(_eeg)?(\.edf)?([-_. ](.*[-_. ])?{LABELS}|(\.\w+)+)", re.I)
    found = []
    for name in sorted(names):
        of_edf = own.fullmatch(name) and not name.startswith(longer)
        of_all = of_folder and re.fullmatch(LABELS, name, re.I) and not name.startswith(edfs)
        if (of_edf or of_all) and not name.lower().endswith(NOT_LABELS):
            found.append(name)
    return found


def channel_notes(path):
    """What the BIDS channels.tsv beside an EDF says that the import does not act on, as notes."""
    place = path.with_name(path.stem.removesuffix("_eeg") + "_channels.tsv")
    if not exists(place):               # nor may be: an EDF may have the longest of names
        return []
    try:
        text = annotations.read_text(place)
        rows = annotations.table(text, place.name, "\t", ("name",))
    except (DataError, OSError) as error:
        return [f"{place.name} is not read: {error}"]
    bad = [row["name"] for row in rows if row.get("status", "").lower() == "bad"]
    notes = [f"{place.name} calls {', '.join(bad)} bad: taken all the same"] if bad else []
    units = sorted({row["units"] for row in rows
                    if row.get("type", "EEG").upper() == "EEG" and row.get("units")})
    if units:
        notes.append(f"{place.name} gives units {', '.join(units)}: those of the EDF count")
    return notes
