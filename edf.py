"""One EDF file, checked, to microvolts and prepared for a detector: int16 at 256 Hz with a scale per channel.

    prepared = prepare_edf("x.edf", Settings("referential"))
    prepared.eeg * prepared.scale[:, None]              # uV, (19, T)

Preparation, once per recording and never per window: microvolts; the montage; median taken off; polyphase
resampling to 256 Hz; one zero-phase FIR filter (Hamming window, 13 s support at most): 0.5 to 120 Hz and,
by default, without 49-51, 59-61, 99-101 and 119-121 Hz, the mains of both worlds, so that a recording of
unknown origin is prepared like those of the training; int16 with a scale per channel whose rounding error
stays below one step of the amplifier. Zero phase keeps annotated times true; a causal filter would delay
the onset by up to a second at 0.5 Hz. Filtering reaches 6.6 s ahead: results are those of offline reading.

The reader is our own: mne, edfio and pyedflib each misread or refuse some of what real corpora hold (gaps,
truncation, units, dates with colons). Where pyedflib opens a file too, its idea of labels, rates and ranges
must agree with ours.
"""
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
from scipy import signal as dsp

FS = 256                                # Hz, of everything after the import
PREPARATION = 1                         # version of what prepare_edf does, part of the hash
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


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what, where, what to do."""


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
        what = [PREPARATION, FS, BAND, self.montage, NOTCH[self.notch], self.blank_unit, CHANNELS[self.montage]]
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


# ---- events beside it ----

def write_events_tsv(path, events, seconds, confidence=None, start="n/a"):
    """SzCORE events file: one `sz` row per (onset, end) in s, or one `bckg` row over all where there is none."""
    confidence = confidence or [1.0] * len(events)
    rows = [(onset, end - onset, "sz", f"{sure:.2f}") for (onset, end), sure in zip(events, confidence)]
    lines = ["onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration"]
    lines += [f"{onset:.2f}\t{length:.2f}\t{kind}\t{sure}\tn/a\t{start}\t{seconds:.2f}"
              for onset, length, kind, sure in rows or [(0.0, seconds, "bckg", "n/a")]]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")
