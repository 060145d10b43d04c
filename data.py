"""EEG recordings for seizure detection: EDF in, one HDF5 file per recording out, training windows at the
speed of memory.

    python data.py import SRC OUT [--layout auto|tuh|chbmit|siena|bids|seizeit]
                                   [--montage referential|bipolar] [--notch both|50|60|0] [--skip-bad]
    python data.py synth OUT [--hours H] [--patients N] [--seed S]
    python data.py info OUT

SRC is a corpus, any folder of EDF files, or one EDF; without annotations a recording is imported as
unlabelled. The import is resumable: a finished recording is kept while its source files and the settings of
the preparation are the same. What cannot be read rightly is refused with one line and the rest goes on:
exit 1 when anything was refused (--skip-bad: 0), 2 for bad usage.

Preparation, once per recording and never per window: microvolts; the montage; median taken off; polyphase
resampling to 256 Hz; one zero-phase FIR filter (Hamming window, 13 s support at most): 0.5 to 120 Hz and,
by default, without 49-51, 59-61, 99-101 and 119-121 Hz, the mains of both worlds, so that a recording of
unknown origin is prepared like those of the training; int16 with a scale per channel whose rounding error
stays below one step of the amplifier. Zero phase keeps annotated times true; a causal filter would delay
the onset by up to a second at 0.5 Hz. Filtering reaches 6.6 s ahead: results are those of offline reading.

The EDF reader is our own: mne, edfio and pyedflib each misread or refuse some of what real corpora hold
(gaps, truncation, units, dates with colons). Where pyedflib opens a file too, its idea of labels, rates and
ranges must agree with ours.
"""
import argparse
import datetime
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import queue
import re
import resource
import signal
import stat
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
from scipy import fft
from scipy import signal as dsp
from tqdm import tqdm

FS = 256                                # Hz, of everything after the import
FORMAT = 1                              # version of the HDF5 layout
BIPOLAR = ("Fp1-F3 F3-C3 C3-P3 P3-O1 Fp1-F7 F7-T3 T3-T5 T5-O1 Fz-Cz Cz-Pz "
           "Fp2-F4 F4-C4 C4-P4 P4-O2 Fp2-F8 F8-T4 T4-T6 T6-O2").split()
CHANNELS = {                            # in SzCORE's order (Dan et al. 2024, doi:10.1111/epi.18113)
    "referential": tuple("Fp1 F3 C3 P3 O1 F7 T3 T5 Fz Cz Pz Fp2 F4 C4 P4 O2 F8 T4 T6".split()),
    "bipolar": tuple(BIPOLAR)}
BAND = (0.5, 120.0)                     # Hz
NOTCH = {"both": (50, 60), "50": (50,), "60": (60,), "0": ()}
MICROVOLTS = {"uv": 1.0, "mv": 1e3, "v": 1e6, "nv": 1e-3}
# uV, typical amplitude of scalp EEG; outside it the unit in the header is wrong
PLAUSIBLE = (0.1, 1000.0)
WIDEST = 10 ** 7                        # uV, from the lowest to the highest value; amplifiers have less than 2 V
MIN_RATE = 64                           # Hz; below it the rhythms of a seizure are not in the file
# TUSZ annotation codes
SEIZURE = set("seiz fnsz gnsz spsz cpsz absz tnsz cnsz tcsz atsz mysz nesz".split())
SAME_PERSON = {"chb21": "chb01"}        # CHB-MIT recorded one patient twice, 1.5 years apart
INDEX, REPORT = "index.json", "import.json"


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what, where, what to do."""


class Occupied(DataError):
    """The place of a recording holds one of another corpus, which stays."""


# ---- EDF: header ----

@dataclass
class Header:
    """What an EDF header says, checked against the file's size. `signals` maps each field to one value per
    signal."""
    signals: dict
    records: int
    duration: Fraction                  # of one record, s
    start: str                          # hh.mm.ss, as written
    offset: int                         # bytes before the first record
    plus: str                           # "", "EDF+C" or "EDF+D"
    notes: list

    @property
    def seconds(self):
        return float(self.records * self.duration)

    def rate(self, i):
        return self.signals["count"][i] / self.duration


FIELDS = (("label", 16), ("transducer", 80), ("unit", 8), ("pmin", 8), ("pmax", 8), ("dmin", 8), ("dmax", 8),
          ("prefilter", 80), ("count", 8), ("reserved", 32))
# bounded: the exact value of 1e999999 takes a megabyte, that of more digits is refused by Python
NUMBER = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,2})?$", re.A)


def number(text, what, notes=None):
    """The number in a text field; a decimal comma is read as a point, and noted, where `notes` is given."""
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
    """Header of an EDF or EDF+ file (Kemp & Olivan 2003). DataError where it contradicts itself or the
    file's size."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        fixed = f.read(256)
        _foreign(fixed, size)
        count = whole(fixed[252:256].decode("latin-1"), "number of signals")
        if count < 1:
            raise DataError(f"the header says {count} signals")
        raw = f.read(256 * count)
    if len(raw) < 256 * count:
        raise DataError(f"the header of {count} signals needs {256 * (count + 1)} bytes, the file has {size}")
    # control characters become blanks: names go into messages of one line
    text, notes, signals, at = re.sub(r"[\0-\x1f\x7f-\x9f]", " ", raw.decode("latin-1")), [], {}, 0
    for name, width in FIELDS:
        signals[name] = [text[at + i * width:at + (i + 1) * width].strip() for i in range(count)]
        at += width * count
    signals["count"] = [whole(n, f"samples per record of {name}")
                        for n, name in zip(signals["count"], signals["label"])]
    if min(signals["count"]) < 1:
        raise DataError(f"signal {signals['label'][np.argmin(signals['count'])]!r} has no samples")
    fixed = fixed.decode("latin-1")
    duration = number(fixed[244:252], "record duration", notes)
    plus = fixed[192:197].upper() if fixed[192:197].upper() in ("EDF+C", "EDF+D") else ""
    if duration <= 0:
        raise DataError(f"record duration is {fixed[244:252].strip()} s"
                        + ": annotations without EEG" * bool(plus))
    header = Header(signals, whole(fixed[236:244], "number of records"), duration, fixed[176:184].strip(),
                    256 * (count + 1), plus, notes)
    _check_size(path, header, fixed, size)
    return header


def _foreign(fixed, size):
    """Refuse what is not EDF at all, saying what it is."""
    if size == 0:
        raise DataError("empty file (0 bytes)")
    if fixed.startswith(b"version https://git-lfs"):
        raise DataError("a Git LFS pointer, not the recording: run git lfs pull")
    if fixed.startswith(b"\xffBIOSEMI"):
        raise DataError("BDF (24 bit) is not read: convert it to EDF")
    if size < 256:
        raise DataError(f"{size} bytes are too few for an EDF header")
    if fixed[:8].strip() != b"0":
        raise DataError(f"not an EDF file: it begins with {fixed[:8]!r}")


def _check_line_ends(path, extra):
    """Refuse a file that was copied as text: every \\n became \\r\\n, also those that are samples."""
    content = Path(path).read_bytes()
    if content.count(b"\n") == content.count(b"\r\n") == extra:
        raise DataError(f"copied as text: a byte was put before each of {extra} line feeds")


def _check_size(path, header, fixed, size):
    """The header's counts against the bytes that are there; fills in a record count of -1 (recording was
    not closed)."""
    record = 2 * sum(header.signals["count"])
    body = size - header.offset
    if whole(fixed[184:192], "number of header bytes") != header.offset:
        if body != header.records * record:
            raise DataError(f"the header says it has {fixed[184:192].strip()} bytes, {header.offset} are "
                            "right for its signals, and neither fits the file's size")
        header.notes.append(f"header length {fixed[184:192].strip()} read as {header.offset}")
    if header.records == -1 and body >= record:
        header.records = body // record
        header.notes.append(f"record count -1 read as {header.records} from the file's size"
                            + ", the unfinished last record left out" * bool(body % record))
    if header.records < 1:
        raise DataError(f"no data: the header says {header.records} records")
    if body < header.records * record:
        raise DataError(f"truncated: the header says {header.records} records, "
                        f"the file holds {body / record:.1f}")
    if body >= (header.records + 1) * record:
        raise DataError(f"the header says {header.records} records, the file holds {body // record}")
    if body > header.records * record:
        _check_line_ends(path, body - header.records * record)
        header.notes.append(f"{body - header.records * record} bytes after the last record left out")


def check_gaps(path, header, records):
    """Refuse a file whose records are not contiguous in time: EDF+ keeps each record's onset in its
    annotation signal."""
    places = [i for i, label in enumerate(header.signals["label"]) if label == "EDF Annotations"]
    if not places:
        if header.plus == "EDF+D":
            raise DataError("discontinuous (EDF+D) without the annotation signal that says where")
        return
    onsets = []
    for i, row in enumerate(np.ascontiguousarray(_block(header, records, places[0]))):
        found = re.match(rb"([+-]\d+(?:\.\d*)?)(?:\x15[\d.]*)?\x14", row.tobytes())
        if not found:
            raise DataError(f"record {i + 1} has no onset among its annotations: gaps cannot be ruled out")
        onsets.append(float(found[1]))
    late = np.array(onsets) - onsets[0] - np.arange(len(onsets)) * float(header.duration)
    gaps = np.flatnonzero(abs(late) > 0.01)                                 # s: two samples at 256 Hz
    if len(gaps):
        at = gaps[0] * float(header.duration)
        raise DataError(f"gap of {late[gaps[0]]:.4g} s after {at:g} s: cut it into continuous files")
    if header.plus == "EDF+D":
        header.notes.append("marked discontinuous (EDF+D) but without a gap")


def note_zeros(header, records):
    """Note records that hold nothing but zeros in every signal: an amplifier's pause, or the hole that a broken
    copy left."""
    empty = np.flatnonzero(~records.any(1))
    if len(empty):
        header.notes.append(f"nothing but zeros in {len(empty)} records, the first at "
                            f"{float(empty[0] * header.duration):g} s")


def second_opinion(path, header, used):
    """pyedflib opens most files too; where it does, its numbers must be ours."""
    import pyedflib                     # here: the loader needs no EDF reader
    try:
        reader = pyedflib.EdfReader(str(path), pyedflib.DO_NOT_READ_ANNOTATIONS)
    except OSError as error:
        reason = " ".join(str(error).replace(str(path), "").split()).strip(": ")
        reason = reason.replace("the file is not EDF(+) or BDF(+) compliant", "").strip(" ,()")
        header.notes.append(f"pyedflib refuses it: {reason.split(', it might')[0] or 'not compliant'}")
        return
    with reader:
        kept = [i for i, label in enumerate(header.signals["label"]) if label != "EDF Annotations"]
        for i in used:
            k = kept.index(i) if header.plus else i
            ours = (header.signals["label"][i], header.records * header.signals["count"][i])
            theirs = (reader.getLabel(k).strip(), int(reader.getNSamples()[k]))
            if ours != theirs:
                raise DataError(f"signal {i + 1}: two readers disagree, {ours} and {theirs}")


def calibration(header, records, i, blank_unit):
    """(gain in uV per digital unit, offset in uV) of signal i; refuses samples outside its digital range."""
    s, name = header.signals, header.signals["label"][i]
    pmin, pmax = (number(s[k][i], f"{k} of {name}", header.notes) for k in ("pmin", "pmax"))
    dmin, dmax = (whole(s[k][i], f"{k} of {name}") for k in ("dmin", "dmax"))
    if dmin >= dmax:
        raise DataError(f"{name}: digital minimum {dmin} is not below maximum {dmax}: the sign is unknown")
    if dmin < -32768 or dmax > 32767:
        raise DataError(f"{name}: digital range {dmin} to {dmax} does not fit 16 bits")
    if pmin == pmax:
        raise DataError(f"{name}: physical minimum and maximum are both {s['pmin'][i]}")
    if pmin > pmax:
        header.notes.append(f"{name} has a negative gain")
    unit = s["unit"][i] or blank_unit
    if not unit:
        raise DataError(f"{name} has no unit: say which with --blank-unit uV")
    if unit[:2] in ("MV", "Mv") or _unit(unit) not in MICROVOLTS:
        raise DataError(f"{name} is in {unit!r}, not in uV, mV, nV or V")
    span = abs(pmax - pmin) * Fraction(MICROVOLTS[_unit(unit)])
    if span > WIDEST:
        raise DataError(f"{name}: a range of {float(span):.3g} uV is not scalp EEG: the unit or range is wrong")
    block = _block(header, records, i)
    narrow = dmin > -32767 or dmax < 32766              # else nothing can be outside
    if narrow and (block.min() < dmin - 1 or block.max() > dmax + 1):       # then the gain may be wrong too
        raise DataError(f"{name} holds {block.min()} to {block.max()}, its header says {dmin} to {dmax}")
    gain = float((pmax - pmin) / (dmax - dmin)) * MICROVOLTS[_unit(unit)]
    return gain, float(pmin) * MICROVOLTS[_unit(unit)] - dmin * gain


def _unit(text):
    """uv, mv, v or nv; the micro sign comes as u, mu in Latin-1, CP437 or UTF-8, or a word."""
    text = re.sub("^([\xc2\xe2]?\xb5|[\xce\xee]?\xbc|\u03bc|\xe6|micro)", "u", text.strip().lower())
    return re.sub("volts?$", "v", text)


# ---- montage ----

ALIAS = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
SPELLED = {name.upper(): name for name in CHANNELS["referential"]}
REFERENCE = re.compile(r"-(REF|LE|AR|AVG|AVERAGE|CAR)$")


def electrode(text):
    """One of the 19 names for any spelling of it (T7 is T3), else None."""
    return SPELLED.get(ALIAS.get(text, text))


def channel(label):
    """An EDF label as (electrode, reference), (electrode, electrode) for a derivation, or None for anything
    else."""
    text = re.sub(r"\s+", "", re.sub(r"^EEG[ _]*", "", label.upper().strip())).rstrip(".")
    found = REFERENCE.search(text)
    name = electrode(text[:found.start()] if found else text)
    if name:
        return name, found[1] if found else ""
    pair = tuple(electrode(part) for part in text.split("-"))
    return pair if len(pair) == 2 and all(pair) and pair[0] != pair[1] else None


def derivations(header, montage):
    """Rows of the montage, each as {signal: weight}, all of them linear in the file's signals; and
    candidate twins.

    Fz and Pz, and only these (3.4 % of TUSZ has neither), are interpolated from the others by a spherical
    spline."""
    places, twins = {}, []
    for i, label in enumerate(header.signals["label"]):
        key = channel(label)
        if key and key[1] not in CHANNELS["referential"]:
            key = key[:1]
        if key and key in places:
            twins.append((key, places[key], i))
        elif key:
            places[key] = i
    single = {key[0]: {i: 1} for key, i in places.items() if len(key) == 1}
    if montage == "bipolar" and len(places) - len(single) >= len(BIPOLAR):
        pairs = [tuple(name.split("-")) for name in BIPOLAR]
        if all(pair in places for pair in pairs):
            return [{places[pair]: 1} for pair in pairs], twins
    missing = [name for name in CHANNELS["referential"] if name not in single]
    if set(missing) - {"Fz", "Pz"}:
        raise DataError(_missing(header, montage, missing, places, single))
    references = {channel(header.signals["label"][i])[1] for row in single.values() for i in row}
    if len(references) > 1:
        names = ", ".join(sorted(r or "none" for r in references))
        raise DataError(f"electrodes with different references: {names}")
    for name in missing:
        header.notes.append(f"{name} is missing, interpolated from the other electrodes")
    weights = spline(tuple(single), tuple(missing))
    for name, line in zip(missing, weights):
        single[name] = {i: w for other, w in zip(list(single)[:len(line)], line) for i in single[other]}
    if montage == "referential":
        return [single[name] for name in CHANNELS["referential"]], twins
    return [_difference(*(single[e] for e in name.split("-"))) for name in BIPOLAR], twins


def _missing(header, montage, missing, places, single):
    if montage == "referential" and len(places) - len(single) >= 8 and not single:
        return "bipolar channels only: import it with --montage bipolar"
    if len(places) - len(single) >= 8:
        missing = [name for name in BIPOLAR if tuple(name.split("-")) not in places]
    some = ", ".join(header.signals["label"][:8])
    count = len(header.signals["label"])
    return f"channels missing: {', '.join(missing)} (the file has {count}: {some}, ...)"


def _difference(a, b):
    return {i: a.get(i, 0) - b.get(i, 0) for i in a | b}


ANGLES = {                              # degrees from the vertex, and around it
    "Fp1": (-92, -72), "F3": (-60, -51), "C3": (-46, 0), "P3": (-60, 51), "O1": (-92, 72), "F7": (-92, -36),
    "T3": (-92, 0), "T5": (-92, 36), "Fz": (46, 90), "Cz": (0, 0), "Pz": (46, -90), "Fp2": (92, 72),
    "F4": (60, 51), "C4": (46, 0), "P4": (60, -51), "O2": (92, -72), "F8": (92, 36), "T4": (92, 0),
    "T6": (92, -36)}


def positions(names):
    """Ideal 10-20 places on the unit sphere, x to the right, y to the nose: (N, 3)."""
    tilt, turn = np.radians([ANGLES[name] for name in names]).T
    return np.stack([np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn), np.cos(tilt)], 1)


@functools.lru_cache(64)
def spline(known, wanted):
    """Weights (wanted, known) of the spherical spline of Perrin et al. 1989 (order 4, 50 terms, smoothing
    1e-5)."""
    if not wanted:
        return np.zeros((0, len(known)))
    n = np.arange(1, 51)
    series = np.concatenate([[0], (2 * n + 1) / (n * (n + 1)) ** 4]) / (4 * np.pi)
    a, b = positions(known), positions(wanted)
    system = np.ones((len(known) + 1,) * 2)
    system[:-1, :-1] = np.polynomial.legendre.legval(a @ a.T, series) + 1e-5 * np.eye(len(known))
    system[-1, -1] = 0
    right = np.concatenate([np.polynomial.legendre.legval(b @ a.T, series), np.ones((len(wanted), 1))], 1)
    return (right @ np.linalg.pinv(system))[:, :-1]


# ---- signal ----

@dataclass(frozen=True)
class Settings:
    """What the prepared samples depend on besides the file; `hash` stands in every recording as
    `prepared`."""
    montage: str = "referential"
    notch: str = "both"                 # Hz: 50, 60, both or 0
    blank_unit: str = ""                # unit to assume where the header has none

    @property
    def hash(self):
        what = [FORMAT, FS, BAND, self.montage, NOTCH[self.notch], self.blank_unit, CHANNELS[self.montage]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@functools.lru_cache(8)
def fir(notch):
    """Taps of the whole filter at 256 Hz: band-pass, 6.6 s, and mains with its first harmonic, 6.6 s."""
    taps = dsp.firwin(1691, BAND, pass_zero=False, fs=FS)
    for edges in ((f - 1, f + 1) for mains in notch for f in (mains, 2 * mains)):
        taps = np.convolve(taps, dsp.firwin(1691, edges, fs=FS))[845:-845]
    return taps.astype(np.float32)


def prepare_row(row, rate, notch):
    """One channel in uV at `rate` (a Fraction, Hz) -> float32 at 256 Hz, filtered, ceil(n * 256 / rate)
    samples."""
    row -= np.float32(np.median(sparse(row)))
    ratio = (FS / rate).limit_denominator(20_000)
    if abs(ratio / (FS / rate) - 1) * len(row) > 1:
        raise DataError(f"sampling rate {float(rate)} Hz cannot be resampled to {FS} Hz without drift")
    if ratio != 1:
        row = dsp.resample_poly(row, ratio.numerator, ratio.denominator, padtype="line")
    taps = fir(notch)
    edge = min(len(taps) // 2, len(row) - 1)
    padded = np.pad(row, edge, mode="reflect", reflect_type="odd") if edge else row
    return dsp.oaconvolve(padded, taps, mode="same")[edge:edge + len(row)].astype(np.float32, copy=False)


def sparse(row):
    """About 30,000 samples spread over the row: enough for a median."""
    return row[::len(row) // 30_000 | 1]


def quantise(row, step):
    """float32 uV -> (int16, uV per unit); half a unit never exceeds the amplifier's `step`, at the cost of
    clipping spikes that the filter made taller than the amplifier's own range."""
    scale = np.float32(min(max(float(abs(row).max()), step) / 32767, 2 * step))
    return np.clip(np.rint(row / scale), -32767, 32767).astype(np.int16), scale


@dataclass
class Prepared:
    """A recording before it is stored: eeg int16 (C, T), scale float32 (C,) uV per unit, norm uV."""
    eeg: np.ndarray
    scale: np.ndarray
    norm: float
    header: Header
    rate: float


def prepare_edf(path, settings):
    """Read one EDF file and prepare it as the module says. DataError: why it cannot be read rightly."""
    header = read_header(path)
    rows, twins = derivations(header, settings.montage)
    used = sorted({i for row in rows for i in row})
    rates = {header.rate(i) for i in used}
    if len(rates) > 1:
        found = ", ".join(f"{float(r):g}" for r in sorted(rates))
        raise DataError(f"EEG channels at different rates: {found} Hz")
    rate = rates.pop()
    if rate < MIN_RATE:
        raise DataError(f"EEG at {float(rate):g} Hz: at least {MIN_RATE} Hz is needed")
    records = np.memmap(path, "<i2", "r", header.offset, (header.records, sum(header.signals["count"])))
    check_gaps(path, header, records)
    second_opinion(path, header, used)
    units = {_unit(header.signals["unit"][i] or settings.blank_unit) for i in used}
    if len(units) > 1 and units <= set(MICROVOLTS):     # one that is off by 1000 hides among the others
        raise DataError(f"EEG channels in different units: {', '.join(sorted(units))}")
    gains = {i: calibration(header, records, i, settings.blank_unit) for i in used}
    note_zeros(header, records)
    _check_twins(header, records, twins)
    samples = math.ceil(header.records * header.signals["count"][used[0]]
                        * (FS / rate).limit_denominator(20_000))
    eeg, scale, spread = np.empty((len(rows), samples), np.int16), np.empty(len(rows), np.float32), []
    for c, row in enumerate(rows):
        x = np.float32(sum(w * gains[i][1] for i, w in row.items()))
        for i, w in row.items():
            x = x + np.float32(w * gains[i][0]) * _block(header, records, i).astype(np.float32)
        x = prepare_row(x.reshape(-1), rate, NOTCH[settings.notch])
        step = max(abs(w * gains[i][0]) for i, w in row.items() if w)
        eeg[c], scale[c] = quantise(x, step)
        spread.append(1.4826 * float(np.median(abs(sparse(x)))))
    return Prepared(eeg, scale, _norm(header, spread, CHANNELS[settings.montage]), header, float(rate))


def _block(header, records, i):
    """Samples of signal i as they lie in the file: (records, samples per record)."""
    edge = sum(header.signals["count"][:i])
    return records[:, edge:edge + header.signals["count"][i]]


def _check_twins(header, records, twins):
    """A label that stands twice: identical signals are harmless, CHB-MIT's second T8-P8 is known, others
    are refused."""
    for key, first, second in twins:
        name = header.signals["label"][second]
        if np.array_equal(_block(header, records, first), _block(header, records, second)):
            continue
        if key != ("T4", "T6"):
            raise DataError(f"{name} stands twice with different signals")
        header.notes.append(f"{name} stands twice with different signals, the first is taken")


def _norm(header, spread, names):
    """The recording's typical amplitude in uV: the median over channels, flat ones apart, of 1.4826 median
    |x|."""
    flat = [name for name, value in zip(names, spread) if value == 0]
    if len(flat) > len(names) // 2:
        raise DataError(f"{len(flat)} of {len(names)} channels are flat")
    if flat:
        header.notes.append(f"flat: {', '.join(flat)}")
    norm = float(np.median([value for value in spread if value > 0]))
    if not PLAUSIBLE[0] <= norm <= PLAUSIBLE[1]:
        raise DataError(f"typical amplitude {norm:.3g} uV is not scalp EEG: the unit or range is wrong")
    return norm


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
            made = [a["prepared"], a["patient"], a["split"], json.loads(a["source_state"])]
            if made == [settings.hash, source.patient, source.split, state_of(source)]:
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
    """One recording under its final name, complete and durable, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with h5py.File(temp, "w") as f:
            f.create_dataset("eeg", data=eeg)           # contiguous: the loader maps it
            f.create_dataset("events", data=events)
            f.attrs.update(attributes)
        durable_replace(temp, target)
    except RuntimeError as error:       # what h5py makes of a full disk while it closes the file
        raise OSError(f"{target}: {error}") from None
    finally:
        temp.unlink(missing_ok=True)


def durable_replace(temp, target):
    """Move a finished file to its final name so that a power cut leaves the old one or the new one."""
    for path, before in ((temp, True), (target.parent, False)):
        if not before:
            os.replace(temp, target)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def import_corpus(src, out, layout="auto", montage="referential", notch="both", blank_unit="", workers=0,
                  say=print):
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
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for stale in out.rglob("*.h5.*.part"):          # left by a killed import
            stale.unlink()
        report = _import_all(files, root, out, layout, settings, workers, say)
        report.refused += closed
    except BlockingIOError:
        raise DataError(f"{out}: another import is writing here") from None
    finally:
        os.close(lock)
    seen = {shown(path) for path in files}
    write_json(out / REPORT, {"refused": [r for r in read_report(out) if r[0] not in seen] + report.refused})
    _table(report, say)
    if any(out.rglob("*.h5")):
        open_corpus(out)                                # writes the index
    return report


def _import_all(files, root, out, layout, settings, workers, say):
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


def write_json(path, content):
    temp = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temp.write_text(json.dumps(content))
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


# ---- recordings ----

@dataclass
class Recording:
    """One imported recording. Holds no open file: the samples are mapped when they are first read, in each
    process."""
    path: str
    name: str                           # below the corpus folder, without .h5
    patient: str
    split: str                          # train, dev, eval or ""
    montage: str
    channels: tuple
    fs: int
    samples: int
    scale: np.ndarray                   # float32 (C,), uV per unit
    norm: float                         # uV, typical amplitude of the whole recording
    labelled: bool
    events: np.ndarray                  # float64 (N, 2), s
    prepared: str
    repaired: str = ""
    source_fs: float = 0.0
    offset: int = 0                     # of the samples in the file, bytes
    state: tuple = ()                   # size and mtime_ns of the file when the corpus was opened
    # the samples themselves, of a recording without a file
    memory: np.ndarray | None = field(default=None, repr=False)

    @property
    def seconds(self):
        return self.samples / self.fs

    @functools.cached_property
    def spans(self):
        """Events in samples: int64 (N, 2)."""
        return np.clip(np.rint(self.events * self.fs), 0, self.samples).astype(np.int64)

    def view(self):
        """All samples, int16 (C, T), read-only, without copying."""
        if self.memory is not None:
            return self.memory
        return mapped(self.path, self.offset, (len(self.channels), self.samples), self.state)

    def read_into(self, start, out):
        """Samples from `start` into `out` int16 (C, n), zeros beyond the end; returns how many are real."""
        if start < 0:
            raise ValueError(f"{self.name}: start {start} is before the recording")
        real = max(0, min(out.shape[1], self.samples - start))
        out[:, :real] = self.view()[:, start:start + real]
        out[:, real:] = 0
        return real

    def read(self, start, n):
        """int16 (C, n), zeros beyond the end; times scale it is uV."""
        out = np.empty((len(self.channels), n), np.int16)
        self.read_into(start, out)
        return out

    def labels(self, start, n):
        """uint8 (n,): 1 inside a seizure."""
        out = np.zeros(n, np.uint8)
        for begin, end in (self.spans - start).tolist():
            out[max(0, begin):max(0, end)] = 1
        return out


# Every map holds a file descriptor: all recordings stay mapped where `ulimit -n` allows, else the last used
# half of it.
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@functools.lru_cache(32_000 if OPEN_FILES < 0 else min(32_000, OPEN_FILES // 2))
def mapped(path, offset, shape, state):
    """Read-only view of a recording's samples in the page cache."""
    try:
        now = os.stat(path)
        if state and (now.st_size, now.st_mtime_ns) != tuple(state):
            raise DataError(f"{path} was changed since the corpus was opened")
        return np.asarray(np.memmap(path, "<i2", "r", offset, shape))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def load_recording(path):
    """What stands about a recording in its HDF5 file, checked, as plain values for the index."""
    try:
        with h5py.File(path, "r") as f:
            a, eeg = dict(f.attrs), f["eeg"]
            if int(a["format"]) != FORMAT:
                raise DataError(f"{path} has format {a['format']}, not {FORMAT}: import it again")
            entry = {key: str(a[key]) for key in ("patient", "split", "montage", "prepared", "repaired")}
            entry |= {"channels": [str(c) for c in a["channels"]], "fs": int(a["fs"]),
                      "labelled": bool(a["labelled"]),
                      "scale": [float(s) for s in a["scale"]], "norm": float(a["norm"]),
                      "source_fs": float(a["source_fs"]), "samples": eeg.shape[1],
                      "offset": eeg.id.get_offset(),
                      "events": f["events"][()].astype(float).tolist()}
            good = eeg.dtype == np.int16 and eeg.shape[0] == len(entry["channels"]) == len(entry["scale"])
            good = good and entry["offset"] and os.path.getsize(path) >= entry["offset"] + eeg.nbytes
    except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a whole recording of data.py import ({error})") from None
    if not good:
        raise DataError(f"{path}: its samples are not whole, contiguous int16: import it again")
    values = np.array([*entry["scale"], entry["norm"]])
    if not (np.isfinite(values) & (values > 0)).all():
        raise DataError(f"{path}: scale or norm is not a positive number: import it again")
    return entry


def open_corpus(path):
    """All recordings below an imported folder, sorted by name. What was read of unchanged files (size and
    mtime) comes from an index beside them. DataError for damaged or foreign files, or recordings that were
    prepared differently."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{path}: no such folder; python data.py import SRC {path}")
    index, fresh, recordings = _read_index(root / INDEX), {}, []
    for name, file in sorted(_walk(root)):
        state = os.stat(file)
        state = [state.st_size, state.st_mtime_ns]
        known = index.get(name)
        fresh[name] = known if known and known[0] == state else [state, load_recording(file)]
        recordings.append(_recording(file, name, *fresh[name]))
    if not recordings:
        raise DataError(f"{path} holds no recording"
                        + "".join(f"; {f}: {why}" for f, why in read_report(root)[:3]))
    for kind in ("montage", "channels", "prepared"):
        found = {getattr(r, kind): r.name for r in recordings}
        if len(found) > 1:
            names = " and ".join(list(found.values())[:2])
            raise DataError(f"{path}: {kind} differs between {names}: import all of it again, and delete what "
                            "has no EDF any more")
    if fresh != index:
        try:
            write_json(root / INDEX, {"format": FORMAT, "recordings": fresh})
        except OSError:
            pass                        # a read-only folder: opening it just takes longer
    return recordings


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
        return content["recordings"] if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _recording(path, name, state, entry):
    e = dict(entry)
    e["channels"], e["scale"] = tuple(e["channels"]), np.array(e["scale"], np.float32)
    e["events"] = np.array(e["events"], np.float64).reshape(-1, 2)
    return Recording(path=path, name=name, state=tuple(state), **e)


def prepare(path, montage="referential", **settings):
    """One EDF as an unlabelled Recording in memory, prepared exactly as an import would. DataError names
    file and reason."""
    source = Source(Path(path), Path(path).stem, "", Path(path).stem.split("_")[0], "", None)
    settings = Settings(montage, **settings)
    try:
        p, _, events = prepare_source(source, settings)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return Recording(str(path), source.name, source.patient, "", montage, CHANNELS[montage], FS,
                     p.eeg.shape[1], p.scale,
                     p.norm, False, events, settings.hash, "; ".join(p.header.notes), p.rate, memory=p.eeg)


def fingerprint(recordings):
    """Hash over what must not change within a run: names, lengths, preparation, events, montage."""
    digest = hashlib.sha256()
    for r in sorted(recordings, key=lambda r: r.name):
        digest.update(json.dumps([r.name, r.samples, r.prepared, r.montage, r.labelled,
                                  r.events.tolist()]).encode())
    return digest.hexdigest()


def person(patient):
    return SAME_PERSON.get(patient, patient)


def split_patients(recordings, dev_patients=(), dev_fraction=0.2, seed=0):
    """(train, dev), no person in both, unlabelled recordings and a corpus's own eval split in neither.

    dev is `dev_patients` where given, else the corpus's own train and dev, else a draw of `dev_fraction` of
    the patients, with seizures on both sides where two patients have any. chb21 is chb01."""
    usable = [r for r in recordings if r.labelled and r.split != "eval"]
    people = sorted({person(r.patient) for r in usable})
    wanted = {person(p) for p in dev_patients}
    if wanted - set(people):
        raise DataError(f"dev patients {', '.join(sorted(wanted - set(people)))} are not among the labelled "
                        f"patients: {', '.join(people[:20])}")
    if wanted:
        dev = wanted
    elif {"train", "dev"} <= {r.split for r in usable}:
        usable = [r for r in usable if r.split]
        dev = {person(r.patient) for r in usable if r.split == "dev"}
        both = dev & {person(r.patient) for r in usable if r.split == "train"}
        if both:
            raise DataError(f"patients in both train and dev: {', '.join(sorted(both))}")
    else:
        dev = _draw(usable, people, dev_fraction, seed)
    train = [r for r in usable if person(r.patient) not in dev]
    dev = [r for r in usable if person(r.patient) in dev]
    if not train or not dev:
        raise DataError(f"{len(people)} labelled patients, {len(train)} recordings for training, "
                        f"{len(dev)} for validation: both are needed, of different patients")
    return train, dev


def _draw(usable, people, fraction, seed):
    """A share of the patients with seizures and of those without, at least one with."""
    ill = {person(r.patient) for r in usable if len(r.events)}
    rng, dev = np.random.default_rng([seed, 20]), set()
    for group in ([p for p in people if p in ill], [p for p in people if p not in ill]):
        count = round(fraction * len(group))
        if len(group) > 1 and not dev:
            count = min(max(1, count), len(group) - 1)
        dev |= {group[i] for i in rng.permutation(len(group))[:count]}
    if not dev:                         # a lone patient with seizures is for training
        rest = [p for p in people if p not in ill] or people
        dev = {rest[rng.integers(len(rest))]} if len(people) > 1 else set()
    return dev


# ---- windows ----

class Windows:
    """(recording, start) pairs over `recordings`, never stored: arrays recording int32, start int64
    (samples) and kind uint8 (0 background, 1 partly seizure, 2 wholly seizure). A recording shorter than a
    window gives one, padded; a last window covers the tail."""

    def __init__(self, recordings, seconds=60.0, stride=10.0):
        unlabelled = [r.name for r in recordings if not r.labelled]
        if unlabelled or not recordings:
            what = f"{unlabelled[0]} is not" if unlabelled else "there are none"
            raise DataError(f"windows need labelled recordings: {what}")
        self.recordings = list(recordings)
        self.length, step = round(seconds * FS), round(stride * FS)
        if self.length < 1 or step < 1:
            raise DataError(f"windows of {seconds} s every {stride} s: both must be at least {1 / FS:.4f} s")
        starts = [self._starts(r.samples, step) for r in self.recordings]
        self.recording = np.repeat(np.arange(len(starts), dtype=np.int32), [len(s) for s in starts])
        self.start = np.concatenate(starts)
        self.kind = np.concatenate([self._kinds(r, s) for r, s in zip(self.recordings, starts)])
        self._walks = {}

    def __len__(self):
        return len(self.start)

    def _starts(self, samples, step):
        last = max(0, samples - self.length)
        starts = np.arange(0, last + 1, step, dtype=np.int64)
        return starts if starts[-1] == last else np.append(starts, last)

    def _kinds(self, recording, starts):
        ends, inside = np.minimum(starts + self.length, recording.samples), np.zeros(len(starts), np.int64)
        for begin, end in recording.spans:
            inside += np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None)
        return (inside > 0).astype(np.uint8) + (inside == ends - starts)

    def epoch(self, seed, epoch, full=0.3, background=2.5):
        """Window ids (int64) of one epoch in training order: a pure function of (seed, epoch).

        All partial windows, and per partial window `full` wholly seizure and `background` windows (the
        proportions of SeizureTransformer, Wu et al. 2025). Those two are walked through in a fixed random
        order that goes on from epoch to epoch, so that each of them comes up in time. background=None:
        every window once."""
        if background is None:
            ids = np.arange(len(self))
        else:
            partial = np.flatnonzero(self.kind == 1)
            if not len(partial):
                raise DataError(f"none of {len(self)} windows contains a seizure's onset or end: balanced "
                                "sampling needs some; train on such recordings, or set data.balanced: false")
            full = self._walk(2, "full_per_partial", full, len(partial), seed, epoch)
            background = self._walk(0, "background_per_partial", background, len(partial), seed, epoch)
            ids = np.concatenate([partial, full, background])
        return np.random.default_rng([seed, epoch, 1]).permutation(ids)

    def _walk(self, kind, key, ratio, partial, seed, epoch):
        """The next round(ratio * partial) windows of a kind."""
        if not (np.isfinite(ratio) and ratio >= 0):
            raise DataError(f"data.{key} is {ratio}: a ratio of 0 or more is needed")
        count = round(ratio * partial)
        if (seed, kind) not in self._walks:
            ids = np.flatnonzero(self.kind == kind)
            self._walks[seed, kind] = np.random.default_rng([seed, kind, 2]).permutation(ids)
        order = self._walks[seed, kind]
        if count and not len(order):
            what = ("lies wholly inside a seizure", "contains no seizure")[kind == 0]
            raise DataError(f"no window {what}, {count} are asked for: "
                            f"set data.{key}: 0, or other data.window_seconds")
        return order[(epoch * count + np.arange(count)) % max(1, len(order))]


def normalise(eeg, scale, norm, out=None):
    """int16 tensor (..., C, T), uV per unit (..., C), typical amplitude in uV (...) -> float32 (..., C, T),
    about 1 in size."""
    factor = (scale / norm.unsqueeze(-1)).unsqueeze(-1)
    return eeg * factor if out is None else out.copy_(eeg).mul_(factor)


class Loader:
    """Batches of a Windows object, copied by a background thread into a ring of int16 buffers (pinned for
    CUDA) and scaled on the device. `waited`: seconds that the consumer has waited for them. Needs no worker
    processes: they would copy every batch once more."""

    def __init__(self, windows, device="cpu", seed=0, augment=False, buffers=4):
        # in this class alone: import workers and commands start in a third of the time
        import torch
        self.device = torch.device(device)
        self.windows, self.seed, self.augment, self.buffers = windows, seed, augment, buffers
        self.waited = 0.0
        self.scale = np.stack([r.scale for r in windows.recordings])
        self.norm = np.array([r.norm for r in windows.recordings], np.float32)
        self.mirror = mirror(windows.recordings[0].channels)
        self._ring, self._emptied, self._outputs, self._idle = [], None, [], [np.empty(0)]

    def batches(self, lists_of_ids, epoch):
        """Yield (x float32 (B, C, T), y float32 (B, T), mask float32 (B, T)) on the device for each list of
        window ids, in order; None for an empty list. mask is 0 on padding. Closing the iterator early ends
        its thread."""
        lists = [np.asarray(ids, np.int64) for ids in lists_of_ids]
        slots = self._slots(max(map(len, lists), default=0))
        free, full, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        for slot in slots:
            free.put((slot, self._emptied))
        thread = threading.Thread(target=self._fill, args=(lists, epoch, free, full, stop), daemon=True)
        thread.start()
        try:
            for ids in lists:
                began = time.perf_counter()
                slot = full.get()
                self.waited += time.perf_counter() - began
                if isinstance(slot, BaseException):
                    raise slot
                batch = [self._to_device(slot, len(ids)) if len(ids) else None]
                free.put((slot, self._copied()))
                # keeps no reference: its memory is used again once the consumer lets go of it
                yield batch.pop()
        finally:
            stop.set()
            free.put((None, None))
            thread.join()
            # the next call fills this ring, but not before the GPU has copied the last batches out of it
            self._ring, self._emptied = slots, self._copied()

    def _slots(self, size):
        """The ring: `buffers` sets of arrays for `size` windows, taken from the last call where they fit."""
        ring, self._ring = self._ring, []
        if ring and len(ring[0]["eeg"]) >= size:
            return ring
        import torch
        pin = self.device.type == "cuda"
        channels, length = self.scale.shape[1], self.windows.length
        shapes = {"eeg": ((size, channels, length), torch.int16), "y": ((size, length), torch.uint8),
                  "real": ((size,), torch.int64), "scale": ((size, channels), torch.float32),
                  "norm": ((size,), torch.float32)}
        return [{key: torch.zeros(shape, dtype=kind, pin_memory=pin) for key, (shape, kind) in shapes.items()}
                for _ in range(self.buffers)]

    def _fill(self, lists, epoch, free, full, stop):
        """The background thread: waits for a free slot and, on CUDA, for the end of the copy out of it."""
        try:
            for ids in lists:
                slot, copied = free.get()
                if stop.is_set():
                    return
                if copied is not None:
                    copied.synchronize()
                host = {key: tensor.numpy() for key, tensor in slot.items()}
                for i, window in enumerate(ids):
                    self._fill_window(host, i, int(window), epoch)
                    if stop.is_set():
                        return
                full.put(slot)
        except BaseException as error:  # raised again where the batches are consumed
            full.put(error)

    def _fill_window(self, host, i, window, epoch):
        which, start = self.windows.recording[window], int(self.windows.start[window])
        recording = self.windows.recordings[which]
        host["real"][i] = recording.read_into(start, host["eeg"][i])
        host["y"][i] = recording.labels(start, self.windows.length)
        host["scale"][i], host["norm"][i] = self.scale[which], self.norm[which]
        if self.augment:                # a gain of about +-20 % and, for one in two, left and right changed
            rng = np.random.default_rng([self.seed, epoch, window, 3])
            host["scale"][i] *= np.float32(np.exp(rng.normal(0, 0.2)))
            if rng.random() < 0.5:
                host["eeg"][i], host["scale"][i] = host["eeg"][i][self.mirror], host["scale"][i][self.mirror]

    def _to_device(self, slot, count):
        import torch
        t = {key: value[:count].to(self.device, non_blocking=True) for key, value in slot.items()}
        x, y, mask = self._output(count)
        normalise(t["eeg"], t["scale"], t["norm"], x)
        place = torch.arange(self.windows.length, device=self.device)
        return x, y.copy_(t["y"]), torch.lt(place, t["real"][:, None], out=mask)

    def _output(self, count):
        """Memory for x, y and mask. On the CPU that of a batch which nobody holds any more: mapping 10 MB
        anew costs ten times the scaling. A NumPy array counts every tensor and view made of it, those that
        autograd keeps too."""
        import torch
        channels, length = self.scale.shape[1], self.windows.length
        size = count * (channels + 2) * length
        if self.device.type != "cpu":
            flat = torch.empty(size, device=self.device)
        else:
            unused = sys.getrefcount(self._idle[0])
            k = next((k for k in range(len(self._outputs)) if self._outputs[k].size >= size
                      and sys.getrefcount(self._outputs[k]) == unused), None)
            if k is None:
                k = len(self._outputs)
                self._outputs.append(np.empty(size, np.float32))
            flat = torch.from_numpy(self._outputs[k])[:size]
        x, y, mask = flat.split([count * channels * length, count * length, count * length])
        return x.view(count, channels, length), y.view(count, length), mask.view(count, length)

    def _copied(self):
        """A CUDA event after the copies that are under way; None on the CPU, where they are done."""
        if self.device.type != "cuda":
            return None
        import torch
        event = torch.cuda.Event()
        event.record()
        return event


def mirror(channels):
    """Index of each channel's left-right counterpart: int64 (C,)."""
    swap = dict(zip("Fp1 F3 C3 P3 O1 F7 T3 T5".split(), "Fp2 F4 C4 P4 O2 F8 T4 T6".split()))
    swap |= {right: left for left, right in swap.items()}
    other = ["-".join(swap.get(part, part) for part in name.split("-")) for name in channels]
    return np.array([list(channels).index(name) for name in other])


# ---- synthetic recordings ----

def synth(out, hours=1.0, patients=8, seed=0):
    """Write `hours` of synthetic EEG of `patients` as EDF and events.tsv in BIDS / SzCORE layout, 19
    channels, 256 Hz, uV.

    Background of 1/f noise, alpha with closed eyes, blinks, muscle, electrode pops, slow rhythms and mains;
    seizures that evolve in frequency, amplitude and spread, no larger than the recording's own artefacts. A
    pure function of the seed."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty: synthetic recordings need a new folder")
    if not (0 < hours < math.inf and patients > 0):
        raise DataError(f"{hours} h of {patients} patients: both must be positive and finite")
    if seed < 0:
        raise DataError(f"seed {seed}: must be 0 or more")
    for p in range(patients):
        rng = np.random.default_rng([seed, p])
        traits = _traits(rng)
        for run, seconds in enumerate(_lengths(rng, hours * 3600 / patients)):
            wanted = _wanted(run == 0, hours * 3600 / patients, p)
            eeg, events = synth_recording(np.random.default_rng([seed, p, run]), traits, seconds, *wanted)
            stem = Path(out, f"sub-{p + 1:03d}", "ses-01", "eeg",
                        f"sub-{p + 1:03d}_ses-01_task-szMonitoring_run-{run:02d}")
            write_edf(f"{stem}_eeg.edf", eeg)
            write_events_tsv(f"{stem}_events.tsv", events, seconds, start="2000-01-01 00:00:00")


def _wanted(first, total, patient):
    """(whether a recording gets a long seizure, how many others per hour). Each patient's longest one does,
    so that small sets hold windows of every kind; where a patient has less than 4 min, every second one has
    no seizure."""
    quiet = total < 240 and patient % 2 == 1
    return first and not quiet, 0 if quiet else 9


def _lengths(rng, total):
    """Whole seconds of a patient's recordings, unequal, the longest first, about one per 10 min."""
    count = int(np.clip(round(total / 600), 1 + (total >= 240), 12))
    share = rng.uniform(0.5, 1.5, count)
    return sorted((max(10, round(s)) for s in total * share / share.sum()), reverse=True)


def _traits(rng):
    """What stays the same within a patient."""
    return {"alpha": rng.uniform(8.5, 11.5), "alpha_size": rng.uniform(8, 25), "slope": rng.uniform(0.8, 1.2),
            "size": rng.uniform(12, 28), "mains": rng.choice([50.0, 60.0]), "mains_size": rng.uniform(0.5, 4),
            "generalised": rng.random() < 0.4,
            "focus": rng.choice(["F7", "F8", "T3", "T4", "T5", "T6", "F3", "F4", "C3", "C4"]),
            "fast": rng.uniform(6, 9), "slow": rng.uniform(2.2, 3.5), "sharp": rng.uniform(0.3, 0.7)}


def write_edf(path, eeg):
    """float (C, T) uV of whole seconds at 256 Hz -> EDF, referential channels, +-3276.7 uV in steps of
    0.1."""
    import pyedflib
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    channels = CHANNELS["referential"]
    with pyedflib.EdfWriter(str(path), len(channels), pyedflib.FILETYPE_EDF) as writer:
        for i, name in enumerate(channels):
            writer.setSignalHeader(i, {"label": name, "dimension": "uV", "sample_frequency": FS,
                                       "physical_min": -3276.7,
                                       "physical_max": 3276.7, "digital_min": -32767, "digital_max": 32767,
                                       "transducer": "", "prefilter": ""})
        writer.setStartdatetime(datetime.datetime(2000, 1, 1))
        writer.writeSamples(list(np.clip(np.rint(eeg * 10), -32767, 32767).astype(np.int32)), digital=True)


def write_events_tsv(path, events, seconds, confidence=None, start="n/a"):
    """SzCORE events file: one `sz` row per (onset, end) in s, or one `bckg` row over all where there is none."""
    confidence = confidence or [1.0] * len(events)
    rows = [(onset, end - onset, "sz", f"{sure:.2f}") for (onset, end), sure in zip(events, confidence)]
    lines = ["onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration"]
    lines += [f"{onset:.2f}\t{length:.2f}\t{kind}\t{sure}\tn/a\t{start}\t{seconds:.2f}"
              for onset, length, kind, sure in rows or [(0.0, seconds, "bckg", "n/a")]]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


def synth_recording(rng, traits, seconds, long=True, rate=9):
    """(float32 (19, T) uV, events float64 (N, 2)) of one synthetic recording; `rate` in seizures per hour."""
    eeg = _background(rng, traits, seconds * FS)
    size = float(np.median(abs(eeg))) * 1.4826
    _artefacts(rng, traits, eeg, size)
    events = _event_times(rng, seconds, long, rate)
    for onset, end in events:
        _seizure(rng, traits, eeg, size, round(onset * FS), round(end * FS))
    return eeg, events


def _background(rng, traits, n):
    """1/f noise that neighbours share, alpha while the eyes are closed, mains."""
    places = positions(CHANNELS["referential"])
    noise = pink(rng, (19, n), traits["slope"])
    nearby = np.exp(4 * (places @ places.T - 1))
    nearby *= traits["size"] / np.linalg.norm(nearby, axis=1, keepdims=True)
    eeg = nearby.astype(np.float32) @ noise
    back = np.clip(-places[:, 1], 0, None) ** 1.5
    eyes = np.interp(np.arange(n) / FS, *_switches(rng, n / FS, 8.0)).astype(np.float32)
    alpha = rhythm(rng, n, traits["alpha"], 0.6) * eyes * np.float32(traits["alpha_size"])
    t = np.arange(n, dtype=np.float32) % (FS * 10) / FS
    hum = (traits["mains_size"] * np.sin(2 * np.pi * traits["mains"] * t)).astype(np.float32)
    for c in range(19):
        eeg[c] += np.float32(back[c]) * alpha + np.float32(rng.uniform(0.3, 1)) * hum
    return eeg


def pink(rng, shape, slope):
    """Noise with an amplitude spectrum of f**-slope above 0.5 Hz, unit deviation, float32; made in pieces
    of 64 s and cross-faded, which costs no more for a long recording."""
    piece, n = 1 << 14, shape[-1]
    ramp = np.sqrt(np.linspace(0, 1, piece // 4, dtype=np.float32))
    f = np.fft.rfftfreq(piece, 1 / FS)
    gain = np.maximum(f, 0.5) ** -slope * (f > 0)
    gain = (gain / np.sqrt((gain ** 2).mean())).astype(np.float32)
    out = np.zeros((*shape[:-1], n + 2 * piece), np.float32)
    for at in range(0, n + piece // 4, piece - piece // 4):
        x = fft.irfft(fft.rfft(rng.standard_normal((*shape[:-1], piece), np.float32)) * gain)
        x[..., :piece // 4] *= ramp
        x[..., -(piece // 4):] *= ramp[::-1]
        out[..., at:at + piece] += x
    return out[..., piece // 4:piece // 4 + n]


def rhythm(rng, n, frequency, width):
    """Narrow-band noise: unit deviation, float32."""
    pole = np.exp(-2 * np.pi * width / FS + 2j * np.pi * frequency / FS)
    drive = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    return (dsp.lfilter([np.sqrt(1 - abs(pole) ** 2)], [1, -pole], drive).real).astype(np.float32)


def _switches(rng, seconds, mean):
    """Times and values of a state that goes between 0.1 and 1 every `mean` s or so, over half a second."""
    times = np.cumsum(rng.exponential(mean, int(seconds / mean) + 8) + 1)
    values = np.tile([0.1, 1.0], len(times))[rng.integers(2):][:len(times)]
    before = np.r_[values[0], values[:-1]]
    return np.repeat(times, 2) + np.tile([0, 0.5], len(times)), np.stack([before, values], 1).ravel()


ARTEFACTS = (                            # kind, per minute, shortest and longest in s
    ("blink", 6, 0.2, 0.5), ("muscle", 0.5, 5, 40), ("chewing", 0.25, 5, 40), ("pop", 0.4, 1, 6),
    ("slow", 0.35, 5, 40), ("sway", 0.25, 5, 40))


def _artefacts(rng, traits, eeg, size):
    """What imitates a seizure in amplitude, in line length or in rhythm, but does not evolve."""
    n, places, names = eeg.shape[1], positions(CHANNELS["referential"]), CHANNELS["referential"]
    front = np.clip(places[:, 1], 0, None) ** 4
    for kind, rate, shortest, longest in ARTEFACTS:
        for _ in range(rng.poisson(rate * n / FS / 60)):
            length = round(FS * rng.uniform(shortest, longest))
            at = int(rng.integers(0, max(1, n - length)))
            length = min(length, n - at)
            t, bump = np.arange(length) / FS, np.hanning(length)
            centre = places[names.index(rng.choice(["T3", "T4", "F7", "F8", "Fp1", "Fp2"]))]
            where = np.exp(3 * (places @ centre - 1))
            if kind == "blink":
                where, wave = front, bump * rng.uniform(3, 8)
            elif kind == "muscle":
                wave = bump ** 0.3 * rng.uniform(0.6, 2) * np.diff(rng.standard_normal(length + 1))
            elif kind == "chewing":
                wave = bump ** 0.3 * rng.uniform(0.8, 2.5) * np.diff(rng.standard_normal(length + 1)) \
                    * np.clip(np.sin(2 * np.pi * rng.uniform(1, 2.2) * t), 0, None)
            elif kind == "pop":
                where = np.eye(19)[rng.integers(19)]
                wave = rng.choice([-1, 1]) * rng.uniform(5, 20) * np.exp(-t / 0.4)
            elif kind == "slow":                        # drowsiness: rhythmic, but steady in frequency
                where = np.exp(rng.uniform(0.5, 2) * (places @ places[rng.integers(19)] - 1))
                wave = bump ** 0.3 * rng.uniform(1, 2.5) * rhythm(rng, length, rng.uniform(1.5, 7), 0.5)
            else:                                       # movement
                turn = 2 * np.pi * rng.uniform(0.3, 1) * t + rng.uniform(0, 6)
                wave = bump * rng.uniform(2, 6) * np.sin(turn)
            eeg[:, at:at + length] += (where[:, None] * wave * size).astype(np.float32)


def _event_times(rng, seconds, long, rate):
    """Seizures of 15 to 90 s, `rate` per hour, and a `long` one of 75 to 110 s, none overlapping, none
    longer than 0.7 of the recording."""
    wanted = [min(rng.uniform(75, 110), seconds * 0.7)] if long else []
    wanted += [float(d) for d in rng.uniform(15, 90, rng.poisson(seconds * rate / 3600))]
    events = []
    for duration in wanted:
        for _ in range(20):
            onset = rng.uniform(0, max(1e-6, seconds - duration))
            apart = all(onset > end + 20 or onset + duration < begin - 20 for begin, end in events)
            if duration <= 0.7 * seconds and apart:
                events.append((round(onset, 2), round(onset + duration, 2)))
                break
    return np.array(sorted(events), np.float64).reshape(-1, 2)


def _seizure(rng, traits, eeg, size, begin, end):
    """One rhythmic discharge: its frequency falls, it grows and wanes, it spreads from its focus, it keeps
    its harmonics."""
    n, places = end - begin, positions(CHANNELS["referential"])
    u = np.linspace(0, 1, n)
    fast, slow = traits["fast"] * rng.uniform(0.9, 1.1), traits["slow"] * rng.uniform(0.9, 1.1)
    if traits["generalised"]:
        fast = slow * 1.4
    wobble = np.cumsum(rng.standard_normal(n)) / np.sqrt(FS) * 0.25
    phase = 2 * np.pi * np.cumsum(slow + (fast - slow) * (1 - u) ** 1.5) / FS + wobble
    sharp = traits["sharp"]
    wave = sum(sharp ** (k - 1) * np.sin(k * phase + 0.6 * (k - 1)) for k in (1, 2, 3, 4))
    grow = np.interp(u, [0, 0.15, 0.7, 0.95, 1], [0.35, 0.8, 1.0, 0.8, 0.3]) * rng.uniform(1.0, 2.0) * size
    focus = places[CHANNELS["referential"].index(traits["focus"])]
    near = places @ focus - 1                           # 0 at the focus, -2 opposite
    for c in range(19):
        if traits["generalised"]:
            share = 0.6 + 0.4 * max(0, float(places[c, 1]))
        else:
            share = np.exp(near[c] * np.interp(u, [0, 0.6, 1], [5, 1.2, 1.0]))
        lag = int(abs(near[c]) * 3)                     # samples: the far side follows 10 to 25 ms later
        eeg[c, begin:end] += (share * grow * np.roll(wave, lag)).astype(np.float32)


# ---- command line ----

def info(path, say=print):
    """What an imported folder holds."""
    recordings = open_corpus(path)
    labelled = [r for r in recordings if r.labelled]
    say(f"{path}: {len(recordings)} recordings of {len({person(r.patient) for r in recordings})} patients, "
        f"{sum(r.seconds for r in recordings) / 3600:.2f} h, montage {recordings[0].montage}, {FS} Hz, "
        f"prepared {recordings[0].prepared}")
    for split in sorted({r.split for r in recordings}):
        part = [r for r in recordings if r.split == split]
        say(f"  {split or 'no split':8} {len(part)} recordings, "
            f"{len({person(r.patient) for r in part})} patients, "
            f"{sum(r.seconds for r in part) / 3600:.2f} h, {sum(len(r.events) for r in part)} seizures, "
            f"{sum(float((r.events[:, 1] - r.events[:, 0]).sum()) for r in part) / 3600:.3f} h of them")
    rates = [f"{r.source_fs:g}" for r in recordings]
    say("  source rates: " + ", ".join(f"{rate} Hz x {rates.count(rate)}"
                                       for rate in sorted(set(rates), key=float)))
    say(f"  shorter than 60 s: {sum(r.seconds < 60 for r in recordings)}, without annotations: "
        f"{len(recordings) - len(labelled)}, repaired: {sum(bool(r.repaired) for r in recordings)}")
    if labelled:
        w = Windows(labelled)
        counts = np.bincount(w.kind, minlength=3)
        say(f"  windows of 60 s every 10 s: {counts[0]} background, {counts[1]} partial, {counts[2]} full "
            f"({100 * (counts[1] + counts[2]) / len(w):.1f} % with seizure)")
    refused = read_report(path)
    say(f"  refused: {len(refused)}")
    for file, why in refused:
        say(f"    {file}: {why}")


def arguments():
    parser = argparse.ArgumentParser(description="EDF to HDF5, synthetic EDF, what a folder holds.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("import", help="EDF files and their annotations to one HDF5 file per recording")
    p.add_argument("src", help="corpus folder, any folder of EDF files, or one EDF")
    p.add_argument("out")
    p.add_argument("--layout", choices=LAYOUTS, default="auto")
    p.add_argument("--montage", choices=sorted(CHANNELS, reverse=True), default="referential")
    p.add_argument("--notch", choices=sorted(NOTCH, reverse=True), default="both",
                   help="mains to take out, Hz")
    p.add_argument("--blank-unit", choices=("uV", "mV", "V", "nV"), default="",
                   help="unit where the EDF names none")
    p.add_argument("--workers", type=int, default=0, help="processes (0: one per core)")
    p.add_argument("--skip-bad", action="store_true", help="exit 0 although files were refused")
    p = commands.add_parser("synth", help="synthetic EDF recordings in BIDS / SzCORE layout")
    p.add_argument("out")
    p.add_argument("--hours", type=float, default=1.0, help="in all")
    p.add_argument("--patients", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    commands.add_parser("info", help="hours, patients, seizures, balance, refusals").add_argument("out")
    return parser.parse_args()


def main():
    args = arguments()
    try:
        if args.command == "synth":
            synth(args.out, args.hours, args.patients, args.seed)
        elif args.command == "info":
            info(args.out)
        else:
            report = import_corpus(args.src, args.out, args.layout, args.montage, args.notch,
                                   args.blank_unit, args.workers)
            return int(bool(report.refused) and not args.skip_bad)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except (OSError, BrokenProcessPool, KeyboardInterrupt) as error:    # disk full, a worker out of memory
        what = " ".join(str(error).split()) or "interrupted"
        goes_on = "; the same command goes on from here" * (args.command == "import")
        print(f"data.py: stopped: {what}{goes_on}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
