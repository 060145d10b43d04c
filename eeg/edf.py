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
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

FS = 256                                # Hz, of everything after the import
PREPARATION = 1                         # version of what prepare_edf does, part of the hash
# in SzCORE's order (Dan et al. 2024, doi:10.1111/epi.18113)
REFERENTIAL = tuple("Fp1 F3 C3 P3 O1 F7 T3 T5 Fz Cz Pz Fp2 F4 C4 P4 O2 F8 T4 T6".split())
BIPOLAR = tuple("Fp1-F3 F3-C3 C3-P3 P3-O1 Fp1-F7 F7-T3 T3-T5 T5-O1 Fz-Cz Cz-Pz "
                "Fp2-F4 F4-C4 C4-P4 P4-O2 Fp2-F8 F8-T4 T4-T6 T6-O2".split())
CHANNELS = {"referential": REFERENTIAL, "bipolar": BIPOLAR}
MONTAGES = (*CHANNELS, "reduced")       # reduced: the channels that the user names
BAND = (0.5, 120.0)                     # Hz
# --notch -> mains taken out, Hz
NOTCH: dict[str, tuple] = {"both": (50, 60), "50": (50,), "60": (60,), "0": ()}
BLANK_UNITS = ("uV", "mV", "V", "nV")   # what --blank-unit takes
MICROVOLTS = {"uv": 1.0, "mv": 1e3, "v": 1e6, "nv": 1e-3}
# uV, typical amplitude of scalp EEG; outside it the unit in the header is wrong
PLAUSIBLE = (0.1, 1000.0)
WIDEST_UV = 10 ** 7                     # from lowest to highest; amplifiers have less than 2 V
MIN_RATE = 64                           # Hz; below it the rhythms of a seizure are not in the file
# Hz, that amplifiers have: by these the length of a record is exact where its field is too narrow
USUAL_RATES = (100, 125, 128, 160, 200, 250, 256, 300, 400, 500, 512, 1000, 1024, 2000, 2048)
MAX_LATE_SECONDS = 0.01                 # of a record after the one before it: two samples
MAX_DRIFT = 0.1                         # s, of resampling at the end: 1/3 s is .333333 in a header


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what, where, what to do."""


# ---- EDF: header ----

@dataclass
class Header:
    """What an EDF header says, checked against the file's size."""
    path: Path
    signals: dict                       # field -> its value for each signal
    records: int
    duration: Fraction                  # of one record, s
    start: str                          # hh.mm.ss, as written
    began: str                          # YYYY-MM-DD hh:mm:ss, "" where the header has no valid date
    offset: int                         # bytes before the first record
    plus: str                           # "", "EDF+C" or "EDF+D"
    notes: list                         # what was read otherwise than it is written
    patient: str = ""                   # field of the patient, as written: never to be printed
    begins: float = 0.0                 # s after its start, of the first record by its own clock
    drift: float = 0.0                  # s that the clock of its records is late at its end

    @property
    def seconds(self) -> float:
        return float(self.records * self.duration)

    def rate(self, i: int) -> Fraction:
        """Of signal i, Hz."""
        return self.signals["count"][i] / self.duration

    def body(self) -> np.ndarray:
        """All samples as they lie in the file, mapped: int16 (records, samples of all signals)."""
        shape = (self.records, sum(self.signals["count"]))
        try:
            return np.memmap(self.path, "<i2", "r", self.offset, shape)
        except ValueError:
            raise DataError("it was cut while it was read") from None

    def block(self, body: np.ndarray, i: int) -> np.ndarray:
        """Samples of signal i as they lie in the file: int16 (records, samples per record)."""
        edge = sum(self.signals["count"][:i])
        return body[:, edge:edge + self.signals["count"][i]]


# of each signal, and their width in bytes; pmin to dmax: physical and digital range; count: samples
# in a record
FIELDS = {"label": 16, "transducer": 80, "unit": 8, "pmin": 8, "pmax": 8, "dmin": 8, "dmax": 8,
          "prefilter": 80, "count": 8, "reserved": 32}
# bounded: the exact value of 1e999999 takes a megabyte, that of more digits is refused by Python
NUMBER = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,2})?$", re.A)


def number(text: str, what: str, notes: list | None = None) -> Fraction:
    """The Fraction in a text field. With `notes` a decimal comma is a point, and noted."""
    plain = text.strip()
    if notes is not None and plain.count(",") == 1 and "." not in plain:
        notes.append(f"decimal comma in {what}: {plain}")
        plain = plain.replace(",", ".")
    if not NUMBER.match(plain):
        raise DataError(f"{what} is {text.strip()[:40]!r}, not a number")
    return Fraction(plain)


def whole(text: str, what: str) -> int:
    value = number(text, what)
    if value.denominator != 1:
        raise DataError(f"{what} is {text.strip()!r}, not a whole number")
    return int(value)


def read_header(path: str | os.PathLike) -> Header:
    """Of an EDF or EDF+ file (Kemp & Olivan 2003). OSError; DataError: it contradicts itself."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        first = f.read(256)
        _refuse_foreign(first, size)
        fixed = _text(first)
        count = whole(fixed[252:256], "number of signals")
        if count < 1:
            raise DataError(f"the header says {count} signals")
        raw = f.read(min(256 * count, size))            # not as many as a wrong count asks for
    if len(raw) < 256 * count:
        raise DataError(f"the header of {count} signals needs {256 * (count + 1)} bytes, "
                        f"the file has {size}")

    notes: list[str] = []
    duration = number(fixed[244:252], "record duration", notes)
    plus = fixed[192:197].upper()
    if plus not in ("EDF+C", "EDF+D"):
        plus = ""
    if duration <= 0:
        why = ": annotations without EEG" if plus else ""
        raise DataError(f"record duration is {fixed[244:252].strip()} s{why}")

    signals = _signals(_text(raw), count)
    header = Header(
        path=Path(path),
        signals=signals,
        records=whole(fixed[236:244], "number of records"),
        duration=_exact(fixed[244:252], duration, signals["count"], notes),
        start=fixed[176:184].strip(),
        began=_began(fixed),
        offset=256 * (count + 1),
        plus=plus,
        notes=notes,
        patient=first[8:88].decode("latin-1").strip())
    _check_size(header, whole(fixed[184:192], "number of header bytes"), size)
    return header


def _text(raw):
    """Bytes of a header as text of one line: some makers fill fields with NUL. What is no character
    becomes a mark, no blank: a long dash before a number may be meant as its sign."""
    return re.sub(r"[\x7f-\x9f]", "?", re.sub(r"[\0-\x1f]", " ", raw.decode("latin-1")))


def _signals(text, count):
    """{field: [value of each signal]} of the signals' part of a header."""
    signals, at = {}, 0
    for name, width in FIELDS.items():
        places = range(at, at + count * width, width)
        signals[name] = [text[place:place + width].strip() for place in places]
        at += count * width
    for i, label in enumerate(signals["label"]):
        signals["count"][i] = whole(signals["count"][i], f"samples per record of {label}")
        if signals["count"][i] < 1:
            raise DataError(f"signal {label!r} has no samples")
    return signals


def _exact(text, duration, counts, notes):
    """The duration of a record, of which its field holds as many digits as fit: that of one sample
    at 1024 Hz stands there as 0.000977, and by it a day is 39 s longer."""
    decimals = len(text.strip().replace(",", ".").partition(".")[2])
    for rate in USUAL_RATES if decimals > 4 else ():
        exact = Fraction(max(counts), rate)
        if 0 < abs(exact - duration) < Fraction(1, 10 ** decimals):
            notes.append(f"record duration {text.strip()} read as {exact} s, of {rate} Hz")
            return exact
    return duration


def _began(fixed):
    """Start of the recording, YYYY-MM-DD hh:mm:ss, "" where its date or time is not valid."""
    try:
        text = re.sub("[.:]", " ", fixed[168:184])
        began = datetime.datetime.strptime(text, "%d %m %y%H %M %S")
    except ValueError:
        return ""
    # two digits of the year: EDF began in 1985
    return str(began if began.year >= 1985 else began.replace(year=began.year + 100))


def _refuse_foreign(first, size):
    """Refuse what is not EDF at all, saying what it is."""
    if size == 0:
        raise DataError("empty file (0 bytes): copy it again")
    if first.startswith(b"version https://git-lfs"):
        raise DataError("a Git LFS pointer, not the recording: run git lfs pull")
    if first.startswith(b"\xffBIOSEMI"):
        raise DataError("BDF (24 bit) is not read: convert it to EDF")
    if size < 256:
        raise DataError(f"{size} bytes are too few for an EDF header")
    if first[:8].strip(b" \0") != b"0":
        raise DataError(f"not an EDF file: it begins with {first[:8]!r}")


def _check_size(header, said, size):
    """The header's counts against the bytes that are there; `said`: its own length by the header.
    A record count of -1, of a recording that was not closed, is filled in."""
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
                        f"the file holds {body / record:.1f}: copy it again")
    if body >= (header.records + 1) * record:
        raise DataError(f"the header says {header.records} records, "
                        f"the file holds {body // record}")
    extra = body - header.records * record
    if extra:
        # one byte more for each \n, samples too: it became \r\n
        content = header.path.read_bytes()
        if content.count(b"\n") == content.count(b"\r\n") == extra:
            raise DataError(f"copied as text: a byte was put before each of {extra} line feeds")
        header.notes.append(f"{extra} bytes after the last record left out")


# ---- EDF+: annotations ----

# time-stamped annotation list: onset, duration, texts, each closed by a byte of its own
TAL = re.compile(rb"([+-]\d+(?:\.\d*)?)(?:\x15(\d+(?:\.\d*)?))?\x14((?:[^\x14]*\x14)*)")
# one with an empty text gives the onset of its record, the others are of events
ONSET = re.compile(rb"(?:^|\0)([+-]\d+(?:\.\d*)?)(?:\x15[\d.]*)?\x14\x14")
# as makers write it: "EDF Annotations" is the standard's
ANNOTATIONS = re.compile(r"[be]df\+? ?annotations? ?\d*")


def _annotation_signals(header, body):
    """Those that are called so, and those that begin with an onset, whatever they are called."""
    return [i for i, label in enumerate(header.signals["label"])
            if ANNOTATIONS.fullmatch(label.lower())
            or ONSET.match(header.block(body, i)[0].tobytes())]


def record_onsets(header: Header, body: np.ndarray) -> np.ndarray | None:
    """Onset in s of each record by the annotation signal; None where the file has none, or one that
    holds nothing but zeros in a file that does not call itself discontinuous."""
    places = _annotation_signals(header, body)
    if not places:
        return None
    block = np.ascontiguousarray(header.block(body, places[0]))
    if header.plus != "EDF+D" and not block.any():
        header.notes.append("its annotation signal is empty: taken to be without gaps")
        return None
    onsets = []
    for i, row in enumerate(block):
        found = ONSET.search(row.tobytes())
        if not found and len(block) > 1:        # that of an event there: the next records tell
            found = TAL.match(row.tobytes())
        if not found:
            raise DataError(f"record {i + 1} has no onset among its annotations: "
                            "gaps cannot be ruled out")
        onsets.append(float(found[1]))
    return np.array(onsets)


Annotation = tuple[float, float | None, str]


def read_annotations(header: Header) -> list[Annotation]:
    """[(onset in s after the first sample, duration in s or None, text)] of an EDF+ file, in its
    order; [] of a plain EDF. DataError where they cannot be read.

    Onsets are given by the clock of the records; where that drifts, each is moved to the sample
    that was recorded then."""
    body = header.body()
    onsets = record_onsets(header, body)
    if onsets is None:
        return []
    found: list[Annotation] = []
    for place in _annotation_signals(header, body):
        for i, row in enumerate(np.ascontiguousarray(header.block(body, place))):
            for piece in row.tobytes().split(b"\0"):
                if not piece.strip():
                    continue
                tal = TAL.fullmatch(piece.strip(b" "))
                if not tal:
                    raise DataError(f"annotations of record {i + 1} cannot be read: {piece[:40]!r}")
                onset = _sample_time(header, onsets, float(tal[1]))
                duration = float(tal[2]) if tal[2] else None
                found += [(onset, duration, text) for text in _texts(tal[3])]
    return found


def _sample_time(header, onsets, time):
    """s after the first sample of a time by the clock of the records."""
    if abs(_drift(header, onsets)) <= MAX_LATE_SECONDS:
        # onsets count from the header's start time, the first sample may lie later
        return time - float(onsets[0])
    record = max(np.searchsorted(onsets, time, "right") - 1, 0)
    return float(record * float(header.duration) + time - onsets[record])


def _drift(header, onsets):
    return float(onsets[-1] - onsets[0] - (len(onsets) - 1) * header.duration)


def _texts(raw):
    """Texts of one annotation list; the empty one only keeps the time."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return [" ".join(part.split()) for part in text.split("\x14") if part.strip()]


def check_gaps(header: Header, body: np.ndarray) -> None:
    """Refuse a file whose records are not contiguous in time. A clock that runs a little slow or
    fast is no gap: each record is compared with the one before it, and the sum is noted and kept as
    header.drift."""
    onsets = record_onsets(header, body)
    if onsets is None:
        if header.plus == "EDF+D":
            raise DataError("discontinuous (EDF+D) without the annotation signal that says where")
        return
    length = float(header.duration)
    late = np.diff(onsets) - length
    gaps = np.flatnonzero(abs(late) > min(MAX_LATE_SECONDS, length / 2))
    if len(gaps):
        at = (gaps[0] + 1) * length
        raise DataError(f"gap of {late[gaps[0]]:.4g} s after {at:g} s: "
                        "cut it into continuous files")
    header.begins = float(onsets[0])
    header.drift = _drift(header, onsets)
    if abs(header.drift) > MAX_LATE_SECONDS:
        header.notes.append(f"the clock of its records is {header.drift:+.3g} s off at the end")
    if header.plus == "EDF+D":
        header.notes.append("marked discontinuous (EDF+D) but without a gap")


# ---- calibration ----

def note_zeros(header: Header, body: np.ndarray) -> None:
    """Note records of nothing but zeros: an amplifier's pause, or the hole of a broken copy."""
    empty = np.flatnonzero(~body.any(1))
    if len(empty):
        header.notes.append(f"nothing but zeros in {len(empty)} records, the first at "
                            f"{float(empty[0] * header.duration):g} s")


def constant(header: Header, body: np.ndarray, i: int) -> bool:
    """Whether signal i is a reference that some makers store: one value, and a range of 0."""
    pmin, pmax, dmin, dmax = (header.signals[key][i] for key in ("pmin", "pmax", "dmin", "dmax"))
    return (pmin == pmax or dmin == dmax) and _one_value(header.block(body, i))


def _one_value(block):
    return bool((block == block[0, 0]).all())


def calibration(header: Header, body: np.ndarray, i: int, blank_unit: str) -> tuple[float, float]:
    """(gain in uV per digital unit, offset in uV) of signal i. DataError: its range is wrong."""
    field = {key: values[i] for key, values in header.signals.items()}
    name = field["label"]
    pmin = number(field["pmin"], f"pmin of {name}", header.notes)
    pmax = number(field["pmax"], f"pmax of {name}", header.notes)
    dmin = whole(field["dmin"], f"dmin of {name}")
    dmax = whole(field["dmax"], f"dmax of {name}")
    if dmin >= dmax:
        raise DataError(f"{name}: digital minimum {dmin} is not below maximum {dmax}: "
                        "the sign is unknown")
    if dmin < -32768 or dmax > 32768:
        raise DataError(f"{name}: digital range {dmin} to {dmax} does not fit 16 bits")
    if dmax == 32768:
        header.notes.append(f"{name}: digital maximum 32768, one more than 16 bits hold")
    if pmin == pmax:
        raise DataError(f"{name}: physical minimum and maximum are both {field['pmin']}")
    if pmin > pmax:
        header.notes.append(f"{name} has a negative gain")

    unit = field["unit"] or blank_unit
    if not unit:
        raise DataError(f"{name} has no unit: say which with data.py import --blank-unit uV")
    # MV would be a million volts; no one means them, and no one knows what was meant
    if unit[:2] in ("MV", "Mv") or _unit(unit) not in MICROVOLTS:
        raise DataError(f"{name} is in {unit!r}, not in uV, mV, nV or V")
    factor = MICROVOLTS[_unit(unit)]
    span = abs(pmax - pmin) * Fraction(factor)
    if span > WIDEST_UV:
        raise DataError(f"{name}: a range of {float(span):.3g} uV is not scalp EEG: "
                        "the unit or range is wrong")

    # beyond the digital range the gain may be wrong too
    block = header.block(body, i)
    if block.min() < dmin - 1 or block.max() > dmax + 1:
        raise DataError(f"{name} holds {block.min()} to {block.max()}, "
                        f"its header says {dmin} to {dmax}")
    gain = float((pmax - pmin) / (dmax - dmin)) * factor
    return gain, float(pmin) * factor - dmin * gain


def _unit(text):
    """uv, mv, v or nv; the micro sign comes as u, mu in Latin-1, CP437 or UTF-8, or a word."""
    text = re.sub("^([\xc2\xe2]?\xb5|[\xce\xee]?\xbc|\u03bc|\xe6|micro)", "u", text.strip().lower())
    return re.sub("volts?$", "v", text)


# ---- montage ----

# 01 and 02, with a zero: chb12_28.edf
ALIAS = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6", "01": "O1", "02": "O2"}
SPELLED = {name.upper(): name for name in REFERENTIAL}
PREFIX = re.compile(r"(S?EEG|POL|CH|CHAN|CHANNEL|E)\d*|\d+")
# none named, a common one, an ear or mastoid, both of these linked, or an amplifier's own
REFERENCE = re.compile(r"(|V?REF|LER?|CLE|AR|AA|AVG?|AVE|AVR|AVERAGE|CAR|[AM][12]|A1A2|M1M2|ORG|"
                       r"COM|GND|G[12]|CS2|CPZ|FCZ|AFZ|FPZ|NOSE)")
GLUED = re.compile(rf"(?:EEG|POL)?({'|'.join([*SPELLED, *ALIAS])})"
                   r"(V?REF|LE|AVG?|AVE|AA|A1A2|M1M2|[AM][12])?")
COMMON = 8                              # electrodes that share a suffix, which is their reference
SEEG = re.compile(r"\b(s|i|stereo.?)eeg\b|\becog\b", re.I)
# no place of 10-10, nor of the caps of 128 that go on to F12 and O12
CONTACT = re.compile(r"C([7-9]|1\d)|[FPT]1[3-9]|O([3-8]|1[3-9])")
CAP = re.compile(r"[A-H](1[1-9]|2\d|3[0-2])")       # a place on a BioSemi cap, beyond all of 10-20


def electrode(text: str) -> str | None:
    """One of the 19 names for any spelling of it (T7 is T3), else None."""
    return SPELLED.get(ALIAS.get(text, text))


def _words(label):
    """A label's words in capitals, one at least, without what stands before its name: C3' is one,
    no C3."""
    words = [word for word in re.split(r"[^\w'`\xb4]|_", label.upper()) if word]
    # before an electrode 01 is the number of a channel, else it is O1
    while len(words) > 1 and PREFIX.fullmatch(words[0]) and (
            words[0] not in ALIAS or words[1] in SPELLED):
        words = words[1:]
    return words or [""]


def split_label(label: str) -> tuple[str, str] | None:
    """(electrode, what stands behind it) of a label; None where it does not begin with one."""
    words = _words(label)
    glued = GLUED.fullmatch(words[0])
    if not glued:
        return None
    name = electrode(glued[1]) or ""
    rest = [glued[2], *words[1:]] if glued[2] else words[1:]
    # T7(T3): its new and its old name
    if rest and electrode(rest[0]) == name and rest[0] != glued[1]:
        rest = rest[1:]
    # T8-P8-0: one of several alike, numbered by MNE; (A1+A2)/2
    if rest and re.fullmatch(r"\d", rest[-1]):
        rest = rest[:-1]
    if len(rest) == 1:
        rest = [electrode(rest[0]) or rest[0]]
    return name, "".join(rest)


def channel(label: str) -> tuple[str, str] | None:
    """An EDF label as (electrode, reference), (electrode, electrode) for a derivation, or None.
    find_channels, which has the whole file, knows better what is a reference."""
    parts = split_label(label)
    if parts is None or parts[0] == parts[1]:
        return None
    return parts if parts[1] in REFERENTIAL or REFERENCE.fullmatch(parts[1]) else None


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

    def __str__(self) -> str:
        channels = f" of {', '.join(self.reduced)}" if self.reduced else ""
        unit = f", blank unit {self.blank_unit}" if self.blank_unit else ""
        return f"montage {self.montage}{channels}, notch {self.notch}{unit}"

    @property
    def channels(self) -> tuple:
        return self.reduced or CHANNELS[self.montage]

    @property
    def hash(self) -> str:
        mains = NOTCH[self.notch]
        what = [PREPARATION, FS, BAND, self.montage, mains, self.blank_unit, self.channels]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@dataclass
class Places:
    """Where a file holds what."""
    electrodes: dict = field(default_factory=dict)      # name -> {signal: weight}
    pairs: dict = field(default_factory=dict)           # F7-T3 -> signal
    references: dict = field(default_factory=dict)      # signal -> what stands behind its name
    twins: dict = field(default_factory=dict)           # signal -> the first that is called so


def find_channels(header: Header) -> Places:
    """Places of a file's EEG channels. A suffix that all electrodes share, or COMMON of them, is
    their reference, whatever it is called; where it is itself an electrode, that one is at 0."""
    places = Places()
    groups: dict[str, dict[str, int]] = {}
    labels = header.signals["label"]
    if _of_cap(labels):
        return places
    found = {i: parts for i, label in enumerate(labels) if (parts := split_label(label))}
    if within := _within(labels, found):
        header.notes.append(f"contacts, no scalp electrodes: {', '.join(within.values())}")
        found = {i: parts for i, parts in found.items() if i not in within}
    shared = Counter(suffix for _, suffix in set(found.values()))
    enough = max(2, min(COMMON, len({name for name, _ in found.values()})))
    for i, (name, suffix) in found.items():
        if name == suffix:
            continue
        places.references[i] = suffix
        if suffix in REFERENTIAL:
            _place(places, places.pairs, f"{name}-{suffix}", i)
        if shared[suffix] >= enough or REFERENCE.fullmatch(suffix):
            _place(places, groups.setdefault(suffix, {}), name, i)
    _choose_reference(header, places, groups)
    return places


def _place(places, where, key, i):
    first = where.setdefault(key, i)
    if first != i:
        places.twins[i] = first


def _of_cap(labels):
    """Whether a file names the places of a cap, A1 to H32: its C3 is no C3."""
    names = [_words(label)[0] for label in labels]
    if sum(CAP.fullmatch(name) is not None for name in names) < 4:
        return False
    return not any(electrode(name) and not re.fullmatch(r"[A-H]\d", name) for name in names)


def _within(labels, found):
    """{signal: label} of contacts inside the skull that are called like electrodes: SEEG beside
    others, and all of a shaft C where its C7 and C8 are there, which no scalp has."""
    words = [_words(label) for label in labels]
    # by its letter and the reference, which may tell scalp from shaft
    shafts = [(first[:1], *rest) for first, *rest in words]
    deep = Counter(shaft for shaft, word in zip(shafts, words) if CONTACT.fullmatch(word[0]))
    # a cap has A32, and electrodes where they were renamed
    cap = any(first == "A32" for first, *_ in words)
    within = {i for i in found
              if deep[shafts[i]] > 1 and not cap and re.fullmatch(r"\D\d+", words[i][0])}
    seeg = {i for i in found if SEEG.search(labels[i])}
    if len(seeg) < len(found):
        within |= seeg
    return {i: labels[i] for i in sorted(within)}


def _choose_reference(header, places, groups):
    """Electrodes by the reference that most of them have, a known one before another word, such as
    Imp; those of no more than another one by that. Derivations with an ear beside them are left
    out."""
    beside = []

    def rank(suffix):
        return -len(groups[suffix]), not REFERENCE.fullmatch(suffix)
    for suffix in sorted(groups, key=rank):
        if suffix in REFERENTIAL and not places.electrodes:
            places.electrodes[suffix] = {}
            header.notes.append(f"{suffix} is the reference of all: 0")
        for name, i in groups[suffix].items():
            if name in places.electrodes:
                beside.append(header.signals["label"][i])
            else:
                places.electrodes[name] = {i: 1}
    if beside:
        header.notes.append(f"beside the electrodes, left out: {', '.join(beside)}")


def derivations(header: Header, recipe: Recipe, places: Places) -> list[dict]:
    """Rows of the montage as {signal: weight}. Fz and Pz, and only these (3.4 % of TUSZ has
    neither), are interpolated from the others by a spherical spline."""
    if recipe.montage == "reduced":
        return _all_reduced(header, recipe.channels, places)
    single = places.electrodes
    if recipe.montage == "bipolar" and not _missing_pairs(places):
        return [{places.pairs[name]: 1} for name in BIPOLAR]

    missing = [name for name in REFERENTIAL if name not in single]
    if set(missing) - {"Fz", "Pz"}:
        raise DataError(_missing(header, recipe.montage, missing, places))
    # within a pair a reference cancels: each pair may have its own, left and right ear for one
    if missing or recipe.montage == "referential":
        _check_references(places, single.values())
    known = list(single)
    for name, line in zip(missing, spline(tuple(known), tuple(missing))):
        header.notes.append(f"{name} is missing, interpolated from the other electrodes")
        single[name] = {i: weight for other, weight in zip(known, line) for i in single[other]}

    if recipe.montage == "referential":
        return [single[name] for name in REFERENTIAL]
    return [_pair(places, *name.split("-")) for name in BIPOLAR]


def _missing_pairs(places):
    return [name for name in BIPOLAR if name not in places.pairs]


def _pair(places, first, other):
    a, b = places.electrodes[first], places.electrodes[other]
    _check_references(places, (a, b))
    return {i: a.get(i, 0) - b.get(i, 0) for i in a | b}


def _all_reduced(header, channels, places):
    """A row for each channel that the user named: of its alternatives the first that is there."""
    rows, alone = [], []
    for name in channels:
        choices = name.split("|")
        found = [(choice, row) for choice in choices if (row := _reduced(header, choice, places))]
        if not found:
            raise DataError(f"channel missing: {' or '.join(choices)} ({_labels(header)})")
        choice, row = found[0]
        if row in rows:
            raise DataError(f"{choice} would be two channels, {channels[rows.index(row)]} and "
                            f"{name} ({_labels(header)})")
        if choice != choices[0]:
            header.notes.append(f"{choice} in the place of {choices[0]}")
        rows.append(row)
        alone += [row] if choice in places.electrodes else []
    try:
        _check_references(places, alone)
    except DataError as several:        # no reason to refuse: a wearable's may be that way
        header.notes.append(str(several))
    return rows


def _reduced(header, name, places):
    """Row of one channel: a derivation of the file, an electrode, the difference of two, an
    electrode by the very reference that is named, or the very label of a signal. None: the file has
    none of these."""
    if name in places.pairs:
        return {places.pairs[name]: 1}
    if name in places.electrodes:
        return places.electrodes[name]
    ends = tuple(name.split("-"))
    if len(ends) == 2 and places.electrodes.keys() >= {*ends}:
        return _pair(places, *ends)
    named = [i for i, label in enumerate(header.signals["label"])
             if label.lower() == name.lower() or len(ends) == 2 and split_label(label) == ends]
    return {named[0]: 1} if len(named) == 1 else None


def _check_references(places, rows):
    references = sorted({places.references[i] or "none" for row in rows for i in row})
    if len(references) > 1:
        raise DataError(f"electrodes with different references: {', '.join(references)}")


def _labels(header):
    labels = header.signals["label"]
    some = labels if len(labels) <= 8 else [*labels[:8], "..."]
    return f"the file has {len(labels)}: {', '.join(some)}"


def _missing(header, montage, missing, places):
    """Why a file does not hold the montage, and what to do."""
    if montage == "referential" and not _missing_pairs(places):
        return "bipolar channels only: import it with --montage bipolar"
    if len(places.pairs) >= 8 and not places.electrodes:
        missing = _missing_pairs(places)
    why = f"channels missing: {', '.join(missing)} ({_labels(header)})"
    rename = "data.py import --rename FILE, two columns: label in the file, electrode"
    if _of_cap(header.signals["label"]):
        return f"{why}: places of a cap, no names of the 10-20 system: {rename}"
    if len(places.electrodes) + len(places.pairs) in range(1, 15):
        why += (": a corpus of what there is: data.py import --montage reduced --channels "
                f"{','.join(places.pairs or places.electrodes)}")
    return f"{why}; for channels of other names: {rename}"


# degrees from the vertex, and around it
ANGLES = {
    "Fp1": (-92, -72), "F3": (-60, -51), "C3": (-46, 0), "P3": (-60, 51), "O1": (-92, 72),
    "F7": (-92, -36), "T3": (-92, 0), "T5": (-92, 36), "Fz": (46, 90), "Cz": (0, 0),
    "Pz": (46, -90),
    "Fp2": (92, 72), "F4": (60, 51), "C4": (46, 0), "P4": (60, -51), "O2": (92, -72),
    "F8": (92, 36), "T4": (92, 0), "T6": (92, -36)}


def positions(names: Iterable[str]) -> np.ndarray:
    """Ideal 10-20 places on the unit sphere, x to the right, y to the nose: (N, 3)."""
    tilt, turn = np.radians([ANGLES[name] for name in names]).T
    x = np.sin(tilt) * np.cos(turn)
    y = np.sin(tilt) * np.sin(turn)
    return np.stack([x, y, np.cos(tilt)], 1)


@functools.lru_cache(64)
def spline(known: tuple, wanted: tuple) -> np.ndarray:
    """Weights (wanted, known) of the spherical spline of Perrin et al. 1989, order 4, 50 terms."""
    if not wanted:
        return np.zeros((0, len(known)))
    n = np.arange(1, 51)
    series = np.array([0, *(2 * n + 1) / (n * (n + 1)) ** 4]) / (4 * np.pi)
    a, b = positions(known), positions(wanted)
    near = np.polynomial.legendre.legval(a @ a.T, series) + 1e-5 * np.eye(len(known))   # smoothing
    system = np.pad(near, (0, 1), constant_values=1)
    system[-1, -1] = 0
    right = np.polynomial.legendre.legval(b @ a.T, series)
    right = np.pad(right, ((0, 0), (0, 1)), constant_values=1)
    return (right @ np.linalg.pinv(system))[:, :-1]


# ---- signal ----

@functools.lru_cache(8)
def fir(mains: tuple) -> np.ndarray:
    """Taps at 256 Hz: band-pass, 6.6 s, and each mains with its first harmonic, 6.6 s."""
    from scipy import signal as dsp     # here: training starts a second earlier without it
    taps = dsp.firwin(1691, BAND, pass_zero=False, fs=FS)
    for f in (harmonic for base in mains for harmonic in (base, 2 * base)):
        stop = dsp.firwin(1691, (f - 1, f + 1), fs=FS)
        taps = np.convolve(taps, stop)[845:-845]
    return taps.astype(np.float32)


def prepare_row(row: np.ndarray, rate: Fraction, mains: tuple) -> np.ndarray:
    """One channel in uV at `rate`, Hz -> float32 (ceil(n * 256 / rate),) at 256 Hz, filtered."""
    from scipy import signal as dsp     # here, too
    row -= np.float32(np.median(sparse(row)))
    ratio = resampling(rate)
    if not ratio or abs(ratio / (FS / rate) - 1) * len(row) / rate > MAX_DRIFT:
        raise DataError(f"sampling rate {float(rate)} Hz cannot be resampled to {FS} Hz "
                        "without drift")
    if ratio != 1:
        row = dsp.resample_poly(row, ratio.numerator, ratio.denominator, padtype="line")

    taps = fir(mains)
    edge = min(len(taps) // 2, len(row) - 1)
    padded = np.pad(row, edge, mode="reflect", reflect_type="odd")
    filtered = dsp.oaconvolve(padded, taps, mode="same")[edge:edge + len(row)]
    return filtered.astype(np.float32, copy=False)


def resampling(rate: Fraction) -> Fraction:
    """Ratio of 256 Hz to `rate`, in numbers that a polyphase filter can be made for."""
    return (FS / rate).limit_denominator(20_000)


def sparse(row: np.ndarray) -> np.ndarray:
    """About 30,000 samples spread over the row: enough for a median."""
    return row[::len(row) // 30_000 | 1]


def live(row: np.ndarray, step: float) -> np.ndarray:
    """The seconds of a row, uV at 256 Hz, that are not flat: a pause of the amplifier says nothing
    of its EEG. The whole row where all of it is flat."""
    seconds = row[:len(row) // FS * FS].reshape(-1, FS)
    lives = abs(seconds).max(1) > step / 2
    return row if lives.all() or not lives.any() else seconds[lives].reshape(-1)


def quantise(row: np.ndarray, step: float) -> tuple[np.ndarray, np.float32]:
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


def prepare_edf(header: Header, recipe: Recipe) -> Signal:
    """The Signal of one EDF file, prepared as the module says; what was read otherwise than it is
    written is added to the header's notes. DataError: why it cannot be read rightly."""
    places = find_channels(header)
    body = header.body()
    rows = _without_constants(header, body, derivations(header, recipe, places))
    used = sorted({i for row in rows for i in row})
    rate = _common_rate(header, used)
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
        microvolts = _microvolts(header, body, row, gains, before)
        x = prepare_row(microvolts, rate, NOTCH[recipe.notch])
        step = max((abs(weight * gains[i][0]) for i, weight in row.items() if weight), default=1.0)
        eeg[c], scale[c] = quantise(x, step)
        amplitudes.append(1.4826 * float(np.median(abs(sparse(live(x, step))))))
    return Signal(eeg, scale, _typical(header, amplitudes, recipe.channels), float(rate))


def _without_constants(header, body, rows):
    """Rows without the signals that hold one value and have no range."""
    flat = {i for row in rows for i in row if constant(header, body, i)}
    labels = header.signals["label"]
    header.notes += [f"{labels[i]} is constant, its range 0: flat" for i in sorted(flat)]
    paired = {i for row in rows if len(row) > 1 for i in row} - flat
    # the difference of it and another is not flat, and would not be said
    dead = [labels[i] for i in sorted(paired) if _one_value(header.block(body, i))]
    if dead:
        header.notes.append(f"constant, and in derivations with others: {', '.join(dead)}")
    kept = [{i: weight for i, weight in row.items() if i not in flat} for row in rows]
    if not any(kept):
        raise DataError(f"all {len(rows)} channels are flat")
    return kept


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


def _microvolts(header, body, row, gains, samples):
    """Weighted sum of signals: float32 (samples,) in uV."""
    x = np.full(samples, sum(weight * gains[i][1] for i, weight in row.items()), np.float32)
    for i, weight in row.items():
        digital = header.block(body, i).astype(np.float32)
        x += (np.float32(weight * gains[i][0]) * digital).reshape(-1)
    return x


def _check_twins(header, body, twins):
    """Refuse a label that stands twice with different signals, CHB-MIT's second T8-P8 apart."""
    for other, first in twins.items():
        name = header.signals["label"][other]
        if np.array_equal(header.block(body, first), header.block(body, other)):
            continue
        if split_label(name) != ("T4", "T6"):
            raise DataError(f"{name} stands twice with different signals")
        header.notes.append(f"{name} stands twice with different signals, the first is taken")


def _typical(header, amplitudes, names):
    """The recording's typical amplitude in uV: the median over channels, flat ones apart."""
    flat = [name for name, value in zip(names, amplitudes) if value == 0]
    if len(flat) > len(names) // 2:
        raise DataError(f"{len(flat)} of {len(names)} channels are flat")
    if flat:
        header.notes.append(f"flat: {', '.join(flat)}")
    low, high = PLAUSIBLE
    typical = float(np.median([value for value in amplitudes if value > 0]))
    if not low <= typical <= high:
        raise DataError(f"typical amplitude {typical:.3g} uV is not scalp EEG: "
                        "the unit or range is wrong")
    # of one channel it may be the contact as well as the range
    odd = [f"{name} ({value:.3g} uV)" for name, value in zip(names, amplitudes)
           if 0 < value < low or value > high]
    if odd:
        header.notes.append(f"amplitude that is not scalp EEG: {', '.join(odd)}")
    return typical
