"""One EDF file, checked, to microvolts and prepared for a detector: int16 at 256 Hz with a scale
per channel.

    header = read_header("x.edf")
    signal = prepare_edf(header, Recipe("referential"))
    signal.eeg * signal.scale[:, None]  # uV, (19, T)
    read_annotations(header)            # [(onset in s, duration in s or None, text)]

Preparation, once per recording and never per window: microvolts; the montage; median taken off;
polyphase resampling to 256 Hz; one zero-phase FIR filter (Hamming window, 13 s support at most):
0.5 to 120 Hz and, by default, without 49-51, 59-61, 99-101 and 119-121 Hz, the mains of both
worlds, so that a recording of unknown origin is prepared like those of the training; int16 with a
scale per channel whose rounding error stays below one step of the amplifier. Zero phase keeps
annotated times true; a causal filter would delay the onset by up to a second at 0.5 Hz. Filtering
reaches 6.6 s ahead: results are those of offline reading.

The reader is our own: mne, edfio and pyedflib each misread or refuse some of what real corpora hold
(gaps, truncation, units, dates with colons).
"""
import datetime
import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

FS = 256                                # Hz, of everything after the import
PREPARATION = 1                         # version of what prepare_edf does, part of the hash
BIPOLAR = tuple("Fp1-F3 F3-C3 C3-P3 P3-O1 Fp1-F7 F7-T3 T3-T5 T5-O1 Fz-Cz Cz-Pz "
                "Fp2-F4 F4-C4 C4-P4 P4-O2 Fp2-F8 F8-T4 T4-T6 T6-O2".split())
CHANNELS = {                            # in SzCORE's order (Dan et al. 2024, doi:10.1111/epi.18113)
    "referential": tuple("Fp1 F3 C3 P3 O1 F7 T3 T5 Fz Cz Pz Fp2 F4 C4 P4 O2 F8 T4 T6".split()),
    "bipolar": BIPOLAR}
MONTAGES = (*CHANNELS, "reduced")       # reduced: the channels that the user names
BAND = (0.5, 120.0)                     # Hz
NOTCH = {                               # --notch -> mains taken out, Hz
    "both": (50, 60),
    "50": (50,),
    "60": (60,),
    "0": ()}
BLANK_UNITS = ("uV", "mV", "V", "nV")    # what --blank-unit takes
MICROVOLTS = {"uv": 1.0, "mv": 1e3, "v": 1e6, "nv": 1e-3}
# uV, typical amplitude of scalp EEG; outside it the unit in the header is wrong
PLAUSIBLE = (0.1, 1000.0)
WIDEST = 10 ** 7                        # uV from lowest to highest; amplifiers have less than 2 V
MIN_RATE = 64                           # Hz; below it the rhythms of a seizure are not in the file
LATE = 0.01                             # s that a record may be off its place: two samples


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what, where, what to do."""


# ---- EDF: header ----

@dataclass
class Header:
    """What an EDF header says, checked against the file's size. `signals` maps each field to one
    value per signal."""
    path: Path
    signals: dict
    records: int
    duration: Fraction                  # of one record, s
    start: str                          # hh.mm.ss, as written
    began: str                          # YYYY-MM-DD hh:mm:ss, "" where the header has no valid date
    offset: int                         # bytes before the first record
    plus: str                           # "", "EDF+C" or "EDF+D"
    notes: list                         # what was read otherwise than it is written

    @property
    def seconds(self):
        return float(self.records * self.duration)

    def rate(self, i):
        """Of signal i, a Fraction, Hz."""
        return self.signals["count"][i] / self.duration

    def body(self):
        """All samples as they lie in the file, mapped: int16 (records, samples of all signals)."""
        shape = (self.records, sum(self.signals["count"]))
        try:
            return np.memmap(self.path, "<i2", "r", self.offset, shape)
        except ValueError:
            raise DataError("it was cut while it was read") from None

    def block(self, body, i):
        """Samples of signal i as they lie in the file: int16 (records, samples per record)."""
        edge = sum(self.signals["count"][:i])
        return body[:, edge:edge + self.signals["count"][i]]


FIELDS = {                              # of each signal, and their width in bytes
    "label": 16,
    "transducer": 80,
    "unit": 8,
    "pmin": 8,                          # physical and digital range
    "pmax": 8,
    "dmin": 8,
    "dmax": 8,
    "prefilter": 80,
    "count": 8,                         # samples in a record
    "reserved": 32}
# bounded: the exact value of 1e999999 takes a megabyte, that of more digits is refused by Python
NUMBER = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,2})?$", re.A)


def number(text, what, notes=None):
    """The Fraction in a text field; a decimal comma is read as a point, and noted, where `notes` is
    given."""
    plain = text.strip()
    if notes is not None and plain.count(",") == 1 and "." not in plain:
        notes.append(f"decimal comma in {what}: {plain}")
        plain = plain.replace(",", ".")
    if not NUMBER.match(plain):
        raise DataError(f"{what} is {text.strip()[:40]!r}, not a number")
    return Fraction(plain)


def whole(text, what):
    value = number(text, what)
    if value.denominator != 1:
        raise DataError(f"{what} is {text.strip()!r}, not a whole number")
    return int(value)


def read_header(path):
    """Header of an EDF or EDF+ file (Kemp & Olivan 2003). DataError where it contradicts itself or
    the file's size; OSError."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        first = f.read(256)
        _refuse_foreign(first, size)
        fixed = first.decode("latin-1")
        count = whole(fixed[252:256], "number of signals")
        if count < 1:
            raise DataError(f"the header says {count} signals")
        raw = f.read(256 * count)
    if len(raw) < 256 * count:
        raise DataError(f"the header of {count} signals needs {256 * (count + 1)} bytes, "
                        f"the file has {size}")

    notes = []
    duration = number(fixed[244:252], "record duration", notes)
    plus = fixed[192:197].upper()
    if plus not in ("EDF+C", "EDF+D"):
        plus = ""
    if duration <= 0:
        why = f"record duration is {fixed[244:252].strip()} s"
        if plus:
            why += ": annotations without EEG"
        raise DataError(why)

    header = Header(
        path=Path(path),
        signals=_signals(raw.decode("latin-1"), count),
        records=whole(fixed[236:244], "number of records"),
        duration=duration,
        start=fixed[176:184].strip(),
        began=_began(fixed),
        offset=256 * (count + 1),
        plus=plus,
        notes=notes)
    _check_size(header, whole(fixed[184:192], "number of header bytes"), size)
    return header


def _signals(text, count):
    """{field: [value of each signal]} of the signals' part of a header."""
    # control characters become blanks: names go into messages of one line
    text = re.sub(r"[\0-\x1f\x7f-\x9f]", " ", text)
    signals, at = {}, 0
    for name, width in FIELDS.items():
        places = range(at, at + count * width, width)
        signals[name] = [text[place:place + width].strip() for place in places]
        at += count * width
    for i, label in enumerate(signals["label"]):
        signals["count"][i] = whole(signals["count"][i], f"samples per record of {label}")
    if min(signals["count"]) < 1:
        raise DataError(f"signal {signals['label'][np.argmin(signals['count'])]!r} has no samples")
    return signals


def _began(fixed):
    """Start of the recording as YYYY-MM-DD hh:mm:ss, "" where the header has no valid date and
    time."""
    date = re.fullmatch(r"(\d\d)[.:](\d\d)[.:](\d\d)", fixed[168:176].strip(), re.A)
    time = re.fullmatch(r"(\d\d)[.:](\d\d)[.:](\d\d)", fixed[176:184].strip(), re.A)
    if not date or not time:
        return ""
    day, month, year = (int(part) for part in date.groups())
    hour, minute, second = (int(part) for part in time.groups())
    # two digits of the year: EDF began in 1985
    year += 1900 if year >= 85 else 2000
    try:
        return str(datetime.datetime(year, month, day, hour, minute, second))
    except ValueError:
        return ""


def _refuse_foreign(first, size):
    """Refuse what is not EDF at all, saying what it is."""
    if size == 0:
        raise DataError("empty file (0 bytes)")
    if first.startswith(b"version https://git-lfs"):
        raise DataError("a Git LFS pointer, not the recording: run git lfs pull")
    if first.startswith(b"\xffBIOSEMI"):
        raise DataError("BDF (24 bit) is not read: convert it to EDF")
    if size < 256:
        raise DataError(f"{size} bytes are too few for an EDF header")
    if first[:8].strip() != b"0":
        raise DataError(f"not an EDF file: it begins with {first[:8]!r}")


def _check_size(header, said, size):
    """The header's counts against the bytes that are there; fills in a record count of -1
    (recording was not closed). `said`: header bytes by the header."""
    record = 2 * sum(header.signals["count"])
    body = size - header.offset
    if said != header.offset:
        if body != header.records * record:
            raise DataError(f"the header says it has {said} bytes, {header.offset} are "
                            "right for its signals, and neither fits the file's size")
        header.notes.append(f"header length {said} read as {header.offset}")

    if header.records == -1 and body >= record:
        header.records = body // record
        note = f"record count -1 read as {header.records} from the file's size"
        if body % record:
            note += ", the unfinished last record left out"
        header.notes.append(note)
    if header.records < 1:
        raise DataError(f"no data: the header says {header.records} records")

    if body < header.records * record:
        raise DataError(f"truncated: the header says {header.records} records, "
                        f"the file holds {body / record:.1f}")
    if body >= (header.records + 1) * record:
        raise DataError(f"the header says {header.records} records, "
                        f"the file holds {body // record}")
    extra = body - header.records * record
    if extra:
        _check_line_ends(header.path, extra)
        header.notes.append(f"{extra} bytes after the last record left out")


def _check_line_ends(path, extra):
    """Refuse a file that was copied as text: every \\n became \\r\\n, also those that are
    samples."""
    content = path.read_bytes()
    if content.count(b"\n") == content.count(b"\r\n") == extra:
        raise DataError(f"copied as text: a byte was put before each of {extra} line feeds")


# ---- EDF+: annotations ----

# time-stamped annotation list: onset, duration, texts, each closed by a byte of its own
TAL = re.compile(rb"([+-]\d+(?:\.\d*)?)(?:\x15(\d+(?:\.\d*)?))?\x14((?:[^\x14]*\x14)*)")


def _annotation_signals(header):
    labels = [label.lower() for label in header.signals["label"]]
    return [i for i, label in enumerate(labels) if label == "edf annotations"]


def record_onsets(header, body):
    """Onset in s of each record by the annotation signal; None where the file has none."""
    places = _annotation_signals(header)
    if not places:
        return None
    onsets = []
    for i, row in enumerate(np.ascontiguousarray(header.block(body, places[0]))):
        found = re.match(rb"([+-]\d+(?:\.\d*)?)(?:\x15[\d.]*)?\x14", row.tobytes())
        if not found:
            raise DataError(f"record {i + 1} has no onset among its annotations: "
                            "gaps cannot be ruled out")
        onsets.append(float(found[1]))
    return np.array(onsets)


def read_annotations(header):
    """[(onset in s after the first sample, duration in s or None, text)] of an EDF+ file, in its
    order; [] of a plain EDF. DataError where they cannot be read."""
    body = header.body()
    onsets = record_onsets(header, body)
    found = []
    for place in _annotation_signals(header):
        for i, row in enumerate(np.ascontiguousarray(header.block(body, place))):
            for piece in row.tobytes().split(b"\0"):
                if not piece.strip():
                    continue
                tal = TAL.fullmatch(piece.strip(b" "))
                if not tal:
                    raise DataError(f"annotations of record {i + 1} cannot be read: {piece[:40]!r}")
                # onsets count from the header's start time, the first sample may lie later
                onset = float(tal[1]) - float(onsets[0])
                duration = float(tal[2]) if tal[2] else None
                found += [(onset, duration, text) for text in _texts(tal[3])]
    return found


def _texts(raw):
    """Texts of one annotation list; the empty one only keeps the time."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return [" ".join(part.split()) for part in text.split("\x14") if part.strip()]


def check_gaps(header, body):
    """Refuse a file whose records are not contiguous in time: EDF+ keeps each record's onset in its
    annotation signal."""
    onsets = record_onsets(header, body)
    if onsets is None:
        if header.plus == "EDF+D":
            raise DataError("discontinuous (EDF+D) without the annotation signal that says where")
        return
    due = onsets[0] + np.arange(len(onsets)) * float(header.duration)
    late = onsets - due
    gaps = np.flatnonzero(abs(late) > LATE)
    if len(gaps):
        at = gaps[0] * float(header.duration)
        raise DataError(f"gap of {late[gaps[0]]:.4g} s after {at:g} s: "
                        "cut it into continuous files")
    if header.plus == "EDF+D":
        header.notes.append("marked discontinuous (EDF+D) but without a gap")


# ---- calibration ----

def note_zeros(header, body):
    """Note records that hold nothing but zeros in every signal: an amplifier's pause, or the hole
    that a broken copy left."""
    empty = np.flatnonzero(~body.any(1))
    if len(empty):
        header.notes.append(f"nothing but zeros in {len(empty)} records, the first at "
                            f"{float(empty[0] * header.duration):g} s")


def calibration(header, body, i, blank_unit):
    """(gain in uV per digital unit, offset in uV) of signal i; refuses samples outside its digital
    range."""
    field = {key: values[i] for key, values in header.signals.items()}
    name = field["label"]
    pmin = number(field["pmin"], f"pmin of {name}", header.notes)
    pmax = number(field["pmax"], f"pmax of {name}", header.notes)
    dmin = whole(field["dmin"], f"dmin of {name}")
    dmax = whole(field["dmax"], f"dmax of {name}")
    if dmin >= dmax:
        raise DataError(f"{name}: digital minimum {dmin} is not below maximum {dmax}: "
                        "the sign is unknown")
    if dmin < -32768 or dmax > 32767:
        raise DataError(f"{name}: digital range {dmin} to {dmax} does not fit 16 bits")
    if pmin == pmax:
        raise DataError(f"{name}: physical minimum and maximum are both {field['pmin']}")
    if pmin > pmax:
        header.notes.append(f"{name} has a negative gain")

    unit = field["unit"] or blank_unit
    if not unit:
        raise DataError(f"{name} has no unit: say which with --blank-unit uV")
    # MV would be a million volts; no one means them, and no one knows what was meant
    if unit[:2] in ("MV", "Mv") or _unit(unit) not in MICROVOLTS:
        raise DataError(f"{name} is in {unit!r}, not in uV, mV, nV or V")
    factor = MICROVOLTS[_unit(unit)]
    span = abs(pmax - pmin) * Fraction(factor)
    if span > WIDEST:
        raise DataError(f"{name}: a range of {float(span):.3g} uV is not scalp EEG: "
                        "the unit or range is wrong")

    _check_range(name, header.block(body, i), dmin, dmax)
    gain = float((pmax - pmin) / (dmax - dmin)) * factor
    return gain, float(pmin) * factor - dmin * gain


def _check_range(name, block, dmin, dmax):
    """Refuse samples beyond the header's digital range: then the gain may be wrong too."""
    if dmin <= -32767 and dmax >= 32766:
        return                          # nothing can be outside
    if block.min() < dmin - 1 or block.max() > dmax + 1:
        raise DataError(f"{name} holds {block.min()} to {block.max()}, "
                        f"its header says {dmin} to {dmax}")


def _unit(text):
    """uv, mv, v or nv; the micro sign comes as u, mu in Latin-1, CP437 or UTF-8, or a word."""
    text = re.sub("^([\xc2\xe2]?\xb5|[\xce\xee]?\xbc|\u03bc|\xe6|micro)", "u", text.strip().lower())
    return re.sub("volts?$", "v", text)


# ---- montage ----

ALIAS = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
SPELLED = {name.upper(): name for name in CHANNELS["referential"]}
# common, or an ear or mastoid, or both of these linked
REFERENCE = re.compile(r"-(REF|LE|AR|AVG|AVERAGE|CAR|[AM][12]|A1\+?A2|M1\+?M2)$")


def electrode(text):
    """One of the 19 names for any spelling of it (T7 is T3), else None."""
    return SPELLED.get(ALIAS.get(text, text))


def channel(label):
    """An EDF label as (electrode, reference), (electrode, electrode) for a derivation, or None for
    anything else."""
    text = re.sub(r"^EEG[ _]*", "", label.upper().strip())
    text = re.sub(r"\s+", "", text).rstrip(".")
    reference = REFERENCE.search(text)
    if reference:
        name = electrode(text[:reference.start()])
        if name:
            return name, reference[1]
    elif electrode(text):
        return electrode(text), ""
    pair = tuple(electrode(part) for part in text.split("-"))
    if len(pair) == 2 and all(pair) and pair[0] != pair[1]:
        return pair
    return None


@dataclass(frozen=True)
class Recipe:
    """What the prepared samples depend on besides the file; `hash` stands in every recording as
    `prepared`. DataError for what is unknown."""
    montage: str = "referential"
    notch: str = "both"                 # Hz: 50, 60, both or 0
    blank_unit: str = ""                # unit to assume where the header has none
    reduced: tuple = ()                 # channels of that montage: electrodes, pairs, EDF labels

    def __post_init__(self):
        if self.montage not in MONTAGES:
            raise DataError(f"montage {self.montage} is unknown: {', '.join(MONTAGES)}")
        if self.notch not in NOTCH:
            raise DataError(f"notch {self.notch} is unknown: {', '.join(NOTCH)}")
        if bool(self.reduced) != (self.montage == "reduced"):
            raise DataError("--montage reduced and --channels F7-T3,T4-T6,... belong together")
        if len(set(self.reduced)) < len(self.reduced):
            raise DataError(f"--channels: {', '.join(self.reduced)} names a channel twice")

    def __str__(self):
        channels = f" of {', '.join(self.reduced)}" if self.reduced else ""
        unit = f", blank unit {self.blank_unit}" if self.blank_unit else ""
        return f"montage {self.montage}{channels}, notch {self.notch}{unit}"

    @property
    def channels(self):
        return self.reduced or CHANNELS[self.montage]

    @property
    def hash(self):
        mains = NOTCH[self.notch]
        what = [PREPARATION, FS, BAND, self.montage, mains, self.blank_unit, self.channels]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def channel_names(text):
    """"f7-t7, Cz, BTEleft SD" -> ("F7-T3", "Cz", "BTEleft SD"): known electrodes in one
    spelling."""
    names = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        key = channel(part)
        if key is None:
            names.append(part)
        elif key[1] in SPELLED.values():
            names.append("-".join(key))
        else:
            names.append(key[0])
    return tuple(names)


@dataclass
class Places:
    """Where a file holds what: {electrode: {signal: weight}}, {(electrode, electrode): signal},
    labels that stand twice as (key, first signal, other signal)."""
    electrodes: dict
    pairs: dict
    twins: list


def find_channels(header):
    """Places of a file's EEG channels."""
    places, twins = {}, []
    for i, label in enumerate(header.signals["label"]):
        key = channel(label)
        if key is None:
            continue
        if key[1] not in CHANNELS["referential"]:
            key = key[:1]
        if key in places:
            twins.append((key, places[key], i))
        else:
            places[key] = i
    found = Places({}, {}, twins)
    for key, i in places.items():
        if len(key) == 1:
            found.electrodes[key[0]] = {i: 1}
        else:
            found.pairs[key] = i
    return found


def derivations(header, recipe, places):
    """Rows of the montage, each as {signal: weight}, all of them linear in the file's signals.

    Fz and Pz, and only these (3.4 % of TUSZ has neither), are interpolated from the others by a
    spherical spline."""
    if recipe.montage == "reduced":
        return [_reduced(header, name, places) for name in recipe.channels]
    single = places.electrodes
    if recipe.montage == "bipolar" and len(places.pairs) >= len(BIPOLAR):
        wanted = [tuple(name.split("-")) for name in BIPOLAR]
        if all(pair in places.pairs for pair in wanted):
            return [{places.pairs[pair]: 1} for pair in wanted]

    missing = [name for name in CHANNELS["referential"] if name not in single]
    if set(missing) - {"Fz", "Pz"}:
        raise DataError(_missing(header, recipe.montage, missing, places))
    # within a pair a reference cancels: each pair may have its own, left and right ear for one
    if recipe.montage == "bipolar" and not missing:
        return [_pair(header, name.split("-"), single) for name in BIPOLAR]
    _check_references(header, single.values())
    weights = spline(tuple(single), tuple(missing))
    known = list(single)
    for name, line in zip(missing, weights):
        header.notes.append(f"{name} is missing, interpolated from the other electrodes")
        single[name] = {i: weight for other, weight in zip(known, line) for i in single[other]}

    if recipe.montage == "referential":
        return [single[name] for name in CHANNELS["referential"]]
    return [_difference(*(single[end] for end in name.split("-"))) for name in BIPOLAR]


def _pair(header, ends, electrodes):
    rows = [electrodes[end] for end in ends]
    _check_references(header, rows)
    return _difference(*rows)


def _reduced(header, name, places):
    """Row of one channel that the user named: a derivation of the file, an electrode, the
    difference of two, or the very label of a signal."""
    ends = tuple(name.split("-"))
    if ends in places.pairs:
        return {places.pairs[ends]: 1}
    if name in places.electrodes:
        return places.electrodes[name]
    if len(ends) == 2 and all(end in places.electrodes for end in ends):
        return _pair(header, ends, places.electrodes)
    labels = [label.lower() for label in header.signals["label"]]
    if labels.count(name.lower()) == 1:
        return {labels.index(name.lower()): 1}
    raise DataError(f"channel missing: {name} ({_labels(header)})")


def _check_references(header, rows):
    references = {channel(header.signals["label"][i])[1] for row in rows for i in row}
    if len(references) > 1:
        names = ", ".join(sorted(reference or "none" for reference in references))
        raise DataError(f"electrodes with different references: {names}")


def _labels(header):
    some = ", ".join(header.signals["label"][:8])
    if len(header.signals["label"]) > 8:
        some += ", ..."
    return f"the file has {len(header.signals['label'])}: {some}"


def _missing(header, montage, missing, places):
    """Why a file does not hold the montage, and what to do."""
    if montage == "referential" and len(places.pairs) >= 8 and not places.electrodes:
        return "bipolar channels only: import it with --montage bipolar"
    if len(places.pairs) >= 8:
        missing = [name for name in BIPOLAR if tuple(name.split("-")) not in places.pairs]
    why = f"channels missing: {', '.join(missing)} ({_labels(header)})"
    if len(places.electrodes) + len(places.pairs) in range(1, 15):
        there = ["-".join(pair) for pair in places.pairs] or list(places.electrodes)
        why += f": a corpus of what there is: --montage reduced --channels {','.join(there)}"
    return why


def _difference(a, b):
    return {i: a.get(i, 0) - b.get(i, 0) for i in a | b}


ANGLES = {                              # degrees from the vertex, and around it
    "Fp1": (-92, -72),
    "F3": (-60, -51),
    "C3": (-46, 0),
    "P3": (-60, 51),
    "O1": (-92, 72),
    "F7": (-92, -36),
    "T3": (-92, 0),
    "T5": (-92, 36),
    "Fz": (46, 90),
    "Cz": (0, 0),
    "Pz": (46, -90),
    "Fp2": (92, 72),
    "F4": (60, 51),
    "C4": (46, 0),
    "P4": (60, -51),
    "O2": (92, -72),
    "F8": (92, 36),
    "T4": (92, 0),
    "T6": (92, -36)}


def positions(names):
    """Ideal 10-20 places on the unit sphere, x to the right, y to the nose: (N, 3)."""
    tilt, turn = np.radians([ANGLES[name] for name in names]).T
    x = np.sin(tilt) * np.cos(turn)
    y = np.sin(tilt) * np.sin(turn)
    return np.stack([x, y, np.cos(tilt)], 1)


@functools.lru_cache(64)
def spline(known, wanted):
    """Weights (wanted, known) of the spherical spline of Perrin et al. 1989 (order 4, 50 terms,
    smoothing 1e-5)."""
    if not wanted:
        return np.zeros((0, len(known)))
    n = np.arange(1, 51)
    terms = (2 * n + 1) / (n * (n + 1)) ** 4
    series = np.concatenate([[0], terms]) / (4 * np.pi)
    a = positions(known)
    b = positions(wanted)
    system = np.ones((len(known) + 1, len(known) + 1))
    system[:-1, :-1] = np.polynomial.legendre.legval(a @ a.T, series)
    system[:-1, :-1] += 1e-5 * np.eye(len(known))
    system[-1, -1] = 0
    right = np.polynomial.legendre.legval(b @ a.T, series)
    right = np.concatenate([right, np.ones((len(wanted), 1))], 1)
    return (right @ np.linalg.pinv(system))[:, :-1]


# ---- signal ----

@functools.lru_cache(8)
def fir(mains):
    """Taps of the whole filter at 256 Hz: band-pass, 6.6 s, and each mains with its first harmonic,
    6.6 s."""
    from scipy import signal as dsp     # here: training starts a second earlier without it
    taps = dsp.firwin(1691, BAND, pass_zero=False, fs=FS)
    for f in (harmonic for base in mains for harmonic in (base, 2 * base)):
        stop = dsp.firwin(1691, (f - 1, f + 1), fs=FS)
        taps = np.convolve(taps, stop)[845:-845]
    return taps.astype(np.float32)


def prepare_row(row, rate, mains):
    """One channel in uV at `rate` (a Fraction, Hz) -> float32 at 256 Hz, filtered, ceil(n * 256 /
    rate) samples."""
    from scipy import signal as dsp     # here, too
    row -= np.float32(np.median(sparse(row)))
    ratio = resampling(rate)
    if abs(ratio / (FS / rate) - 1) * len(row) > 1:
        raise DataError(f"sampling rate {float(rate)} Hz cannot be resampled to {FS} Hz "
                        "without drift")
    if ratio != 1:
        row = dsp.resample_poly(row, ratio.numerator, ratio.denominator, padtype="line")

    taps = fir(mains)
    edge = min(len(taps) // 2, len(row) - 1)
    padded = row
    if edge:
        padded = np.pad(row, edge, mode="reflect", reflect_type="odd")
    filtered = dsp.oaconvolve(padded, taps, mode="same")[edge:edge + len(row)]
    return filtered.astype(np.float32, copy=False)


def resampling(rate):
    """Ratio of 256 Hz to `rate`, in numbers that a polyphase filter can be made for."""
    return (FS / rate).limit_denominator(20_000)


def sparse(row):
    """About 30,000 samples spread over the row: enough for a median."""
    return row[::len(row) // 30_000 | 1]


def quantise(row, step):
    """float32 uV -> (int16, uV per unit); half a unit never exceeds the amplifier's `step`, at the
    cost of clipping spikes that the filter made taller than the amplifier's own range."""
    tallest = max(float(abs(row).max()), step)
    scale = np.float32(min(tallest / 32767, 2 * step))
    return np.clip(np.rint(row / scale), -32767, 32767).astype(np.int16), scale


@dataclass
class Signal:
    """Prepared EEG before it is stored: eeg int16 (C, T), scale float32 (C,) uV per unit."""
    eeg: np.ndarray
    scale: np.ndarray
    amplitude: float                    # uV, typical of the whole recording
    rate: float                         # Hz, before resampling


def prepare_edf(header, recipe):
    """The Signal of one EDF file, prepared as the module says; what was repaired is added to the
    header's notes. DataError: why it cannot be read rightly."""
    places = find_channels(header)
    rows = derivations(header, recipe, places)
    used = sorted({i for row in rows for i in row})
    rate = _common_rate(header, used)
    body = header.body()
    check_gaps(header, body)
    gains = _calibrations(header, body, used, recipe.blank_unit)
    note_zeros(header, body)
    _check_twins(header, body, places.twins)

    before = header.records * header.signals["count"][used[0]]
    samples = math.ceil(before * resampling(rate))
    eeg = np.empty((len(rows), samples), np.int16)
    scale = np.empty(len(rows), np.float32)
    amplitudes = []
    for c, row in enumerate(rows):
        x = prepare_row(_microvolts(header, body, row, gains), rate, NOTCH[recipe.notch])
        step = max(abs(weight * gains[i][0]) for i, weight in row.items() if weight)
        eeg[c], scale[c] = quantise(x, step)
        amplitudes.append(1.4826 * float(np.median(abs(sparse(x)))))
    return Signal(eeg, scale, _typical(header, amplitudes, recipe.channels), float(rate))


def _common_rate(header, used):
    rates = {header.rate(i) for i in used}
    if len(rates) > 1:
        found = ", ".join(f"{float(rate):g}" for rate in sorted(rates))
        raise DataError(f"EEG channels at different rates: {found} Hz")
    rate = rates.pop()
    if rate < MIN_RATE:
        raise DataError(f"EEG at {float(rate):g} Hz: at least {MIN_RATE} Hz is needed")
    return rate


def _calibrations(header, body, used, blank_unit):
    """{signal: (gain, offset)}."""
    units = {_unit(header.signals["unit"][i] or blank_unit) for i in used}
    # one that is off by 1000 hides among the others
    if len(units) > 1 and units <= set(MICROVOLTS):
        raise DataError(f"EEG channels in different units: {', '.join(sorted(units))}")
    return {i: calibration(header, body, i, blank_unit) for i in used}


def _microvolts(header, body, row, gains):
    """Weighted sum of signals: float32 (T,) in uV."""
    x = np.float32(sum(weight * gains[i][1] for i, weight in row.items()))
    for i, weight in row.items():
        digital = header.block(body, i).astype(np.float32)
        x = x + np.float32(weight * gains[i][0]) * digital
    return x.reshape(-1)


def _check_twins(header, body, twins):
    """A label that stands twice: identical signals are harmless, CHB-MIT's second T8-P8 is known,
    others are refused."""
    for key, first, other in twins:
        name = header.signals["label"][other]
        if np.array_equal(header.block(body, first), header.block(body, other)):
            continue
        if key != ("T4", "T6"):
            raise DataError(f"{name} stands twice with different signals")
        header.notes.append(f"{name} stands twice with different signals, the first is taken")


def _typical(header, amplitudes, names):
    """The recording's typical amplitude in uV: the median over channels, flat ones apart."""
    flat = [name for name, value in zip(names, amplitudes) if value == 0]
    if len(flat) > len(names) // 2:
        raise DataError(f"{len(flat)} of {len(names)} channels are flat")
    if flat:
        header.notes.append(f"flat: {', '.join(flat)}")
    typical = float(np.median([value for value in amplitudes if value > 0]))
    if not PLAUSIBLE[0] <= typical <= PLAUSIBLE[1]:
        raise DataError(f"typical amplitude {typical:.3g} uV is not scalp EEG: "
                        "the unit or range is wrong")
    return typical


# ---- events beside it ----

def write_events_tsv(path, events, seconds, confidence=None, start="n/a"):
    """SzCORE events file of a recording of `seconds`: one `sz` row per (onset, end) in s, or one
    `bckg` row over all where there is none. `start`: of the recording, YYYY-MM-DD hh:mm:ss."""
    lines = ["onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration"]
    same = f"n/a\t{start}\t{seconds:.2f}"
    for k, (onset, end) in enumerate(events):
        sure = confidence[k] if confidence else 1.0
        lines.append(f"{onset:.2f}\t{end - onset:.2f}\tsz\t{sure:.2f}\t{same}")
    if len(lines) == 1:
        lines.append(f"0.00\t{seconds:.2f}\tbckg\tn/a\t{same}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")
