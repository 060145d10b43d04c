"""Synthetic EEG with seizures, as EDF and events.tsv in BIDS / SzCORE layout.

    python data.py synth OUT [--hours H] [--patients N] [--seed S]

Background of 1/f noise, alpha while the eyes are closed, mains; artefacts that imitate a seizure in
amplitude, in line length or in rhythm; seizures that evolve in frequency, amplitude and spread, no
larger than the recording's own artefacts. Units: uV, Hz, s; EEG is float32 (19, T) at FS.
"""
import datetime
import math
from collections import namedtuple
from pathlib import Path

import numpy as np

from edf import CHANNELS, FS, DataError, positions, write_events_tsv

NAMES = CHANNELS["referential"]
PLACES = positions(NAMES)               # unit vectors (19, 3), x to the right, y to the nose
EVENTS_PER_HOUR = 9
QUIET = 240                             # s: of patients with less, every second has no seizure
FOCI = "F7 F8 T3 T4 T5 T6 F3 F4 C3 C4".split()

Artefact = namedtuple("Artefact", "kind per_minute shortest longest")
ARTEFACTS = (                           # s
    Artefact("blink", 6, 0.2, 0.5),
    Artefact("muscle", 0.5, 5, 40),
    Artefact("chewing", 0.25, 5, 40),
    Artefact("pop", 0.4, 1, 6),
    Artefact("slow", 0.35, 5, 40),      # drowsiness: rhythmic, but steady in frequency
    Artefact("sway", 0.25, 5, 40),
)


# ---- corpus ----

def synth(out, hours=1.0, patients=8, seed=0, progress=lambda what: None):
    """Write `hours` of synthetic EEG of `patients`, 19 channels at 256 Hz in uV, to `out`.

    A pure function of the seed. progress(what) is called after each recording. Raises DataError for
    a folder that is not empty."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty: synthetic recordings need a new folder")
    if not (0 < hours < math.inf and patients > 0):
        raise DataError(f"{hours} h of {patients} patients: both must be positive and finite")
    if seed < 0:
        raise DataError(f"seed {seed}: must be 0 or more")
    total = hours * 3600 / patients
    for number in range(patients):
        rng = np.random.default_rng([seed, number])
        traits = draw_traits(rng)
        quiet = total < QUIET and number % 2 == 1
        for run, seconds in enumerate(draw_lengths(rng, total)):
            # each patient's longest recording gets a long seizure, so that small sets hold windows
            # of every kind
            recording = np.random.default_rng([seed, number, run])
            rate = 0 if quiet else EVENTS_PER_HOUR
            eeg, events = synth_recording(recording, traits, seconds, run == 0 and not quiet, rate)
            name = f"sub-{number + 1:03d}"
            stem = f"{name}_ses-01_task-szMonitoring_run-{run:02d}"
            stem = Path(out, name, "ses-01", "eeg", stem)
            write_edf(f"{stem}_eeg.edf", eeg)
            write_events_tsv(f"{stem}_events.tsv", events, seconds, start="2000-01-01 00:00:00")
            progress("synthetic recording")


def draw_lengths(rng, total):
    """Whole seconds of a patient's recordings, unequal, the longest first, about one per 10 min."""
    count = int(np.clip(round(total / 600), 1 + (total >= QUIET), 12))
    share = rng.uniform(0.5, 1.5, count)
    lengths = [max(10, round(s)) for s in total * share / share.sum()]
    return sorted(lengths, reverse=True)


def draw_traits(rng):
    """What stays the same within a patient."""
    return {
        "alpha": rng.uniform(8.5, 11.5),            # Hz
        "alpha_size": rng.uniform(8, 25),           # uV
        "slope": rng.uniform(0.8, 1.2),             # of the amplitude spectrum
        "size": rng.uniform(12, 28),                # uV
        "mains": rng.choice([50.0, 60.0]),          # Hz
        "mains_size": rng.uniform(0.5, 4),          # uV
        "generalised": rng.random() < 0.4,
        "focus": rng.choice(FOCI),
        "fast": rng.uniform(6, 9),                  # Hz at a seizure's start
        "slow": rng.uniform(2.2, 3.5),              # Hz at its end
        "sharp": rng.uniform(0.3, 0.7),             # share of each further harmonic
    }


def write_edf(path, eeg):
    """uV (19, T) of whole seconds at 256 Hz -> EDF, +-3276.7 uV in steps of 0.1."""
    import pyedflib                     # here: training needs no EDF writer
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    digital = np.clip(np.rint(eeg * 10), -32767, 32767).astype(np.int32)
    header = {
        "dimension": "uV", "sample_frequency": FS, "transducer": "", "prefilter": "",
        "physical_min": -3276.7, "physical_max": 3276.7,
        "digital_min": -32767, "digital_max": 32767}
    with pyedflib.EdfWriter(str(path), len(NAMES), pyedflib.FILETYPE_EDF) as writer:
        for i, name in enumerate(NAMES):
            writer.setSignalHeader(i, header | {"label": name})
        writer.setStartdatetime(datetime.datetime(2000, 1, 1))
        writer.writeSamples(list(digital), digital=True)


def synth_recording(rng, traits, seconds, long=True, rate=EVENTS_PER_HOUR):
    """(float32 (19, T) uV, events float64 (N, 2) in s) of one recording; `rate` in seizures per
    hour."""
    eeg = background(rng, traits, seconds * FS)
    size = 1.4826 * float(np.median(abs(eeg)))
    add_artefacts(rng, eeg, size)
    events = draw_events(rng, seconds, long, rate)
    for onset, end in events:
        add_seizure(rng, traits, eeg, size, round(onset * FS), round(end * FS))
    return eeg, events


# ---- background ----

def background(rng, traits, n):
    """1/f noise that neighbours share, alpha while the eyes are closed, mains."""
    noise = pink(rng, (19, n), traits["slope"])
    mixing = np.exp(4 * (PLACES @ PLACES.T - 1))
    mixing *= traits["size"] / np.linalg.norm(mixing, axis=1, keepdims=True)
    eeg = mixing.astype(np.float32) @ noise

    back = np.clip(-PLACES[:, 1], 0, None) ** 1.5
    times, levels = draw_switches(rng, n / FS, 8.0)
    closed = np.interp(np.arange(n) / FS, times, levels).astype(np.float32)
    alpha = rhythm(rng, n, traits["alpha"], 0.6) * closed * np.float32(traits["alpha_size"])

    t = np.arange(n, dtype=np.float32) % (FS * 10) / FS
    hum = traits["mains_size"] * np.sin(2 * np.pi * traits["mains"] * t)
    hum = hum.astype(np.float32)
    for c in range(19):
        eeg[c] += np.float32(back[c]) * alpha + np.float32(rng.uniform(0.3, 1)) * hum
    return eeg


def pink(rng, shape, slope):
    """Noise with an amplitude spectrum of f**-slope above 0.5 Hz, unit deviation, float32.

    Made in pieces of 64 s and cross-faded, which costs no more for a long recording."""
    from scipy import fft               # here: training starts earlier without it
    piece, n = 1 << 14, shape[-1]
    fade = piece // 4
    ramp = np.sqrt(np.linspace(0, 1, fade, dtype=np.float32))
    f = np.fft.rfftfreq(piece, 1 / FS)
    gain = np.maximum(f, 0.5) ** -slope * (f > 0)
    gain = (gain / np.sqrt((gain ** 2).mean())).astype(np.float32)
    out = np.zeros((*shape[:-1], n + 2 * piece), np.float32)
    for at in range(0, n + fade, piece - fade):
        white = rng.standard_normal((*shape[:-1], piece), np.float32)
        x = fft.irfft(fft.rfft(white) * gain)
        x[..., :fade] *= ramp
        x[..., -fade:] *= ramp[::-1]
        out[..., at:at + piece] += x
    return out[..., fade:fade + n]


def rhythm(rng, n, frequency, width):
    """Narrow-band noise around `frequency`: unit deviation, float32 (n,)."""
    from scipy import signal as dsp     # here: training starts a second earlier without it
    pole = np.exp(-2 * np.pi * width / FS + 2j * np.pi * frequency / FS)
    drive = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    wave = dsp.lfilter([np.sqrt(1 - abs(pole) ** 2)], [1, -pole], drive)
    return wave.real.astype(np.float32)


def draw_switches(rng, seconds, mean):
    """Times and levels of a state that goes between 0.1 and 1 every `mean` s or so, over half a
    second."""
    times = np.cumsum(rng.exponential(mean, int(seconds / mean) + 8) + 1)
    levels = np.tile([0.1, 1.0], len(times))[rng.integers(2):][:len(times)]
    before = np.r_[levels[0], levels[:-1]]
    turns = np.repeat(times, 2) + np.tile([0, 0.5], len(times))
    return turns, np.stack([before, levels], 1).ravel()


# ---- artefacts ----

def add_artefacts(rng, eeg, size):
    """What imitates a seizure in amplitude, in line length or in rhythm, but does not evolve."""
    n = eeg.shape[1]
    for row in ARTEFACTS:
        for _ in range(rng.poisson(row.per_minute * n / FS / 60)):
            length = round(FS * rng.uniform(row.shortest, row.longest))
            at = int(rng.integers(0, max(1, n - length)))
            length = min(length, n - at)
            where, wave = artefact(rng, row.kind, length)
            eeg[:, at:at + length] += (where[:, None] * wave * size).astype(np.float32)


def artefact(rng, kind, length):
    """(share of each electrode (19,), wave (length,)) of one artefact, in multiples of the
    background."""
    t, bump = np.arange(length) / FS, np.hanning(length)
    centre = NAMES.index(rng.choice(["T3", "T4", "F7", "F8", "Fp1", "Fp2"]))
    where = np.exp(3 * (PLACES @ PLACES[centre] - 1))
    plateau = bump ** 0.3
    if kind == "blink":
        front = np.clip(PLACES[:, 1], 0, None) ** 4
        return front, bump * rng.uniform(3, 8)
    if kind == "muscle":
        return where, plateau * rng.uniform(0.6, 2) * np.diff(rng.standard_normal(length + 1))
    if kind == "chewing":
        noise = plateau * rng.uniform(0.8, 2.5) * np.diff(rng.standard_normal(length + 1))
        return where, noise * np.clip(np.sin(2 * np.pi * rng.uniform(1, 2.2) * t), 0, None)
    if kind == "pop":                   # one electrode
        alone = np.eye(19)[rng.integers(19)]
        return alone, rng.choice([-1, 1]) * rng.uniform(5, 20) * np.exp(-t / 0.4)
    if kind == "slow":
        near = rng.uniform(0.5, 2)
        where = np.exp(near * (PLACES @ PLACES[rng.integers(19)] - 1))
        return where, plateau * rng.uniform(1, 2.5) * rhythm(rng, length, rng.uniform(1.5, 7), 0.5)
    turn = 2 * np.pi * rng.uniform(0.3, 1) * t + rng.uniform(0, 6)
    return where, bump * rng.uniform(2, 6) * np.sin(turn)


# ---- seizures ----

def draw_events(rng, seconds, long, rate):
    """Seizures of 15 to 90 s, `rate` per hour, and a `long` one of 75 to 110 s: float64 (N, 2) s.

    At least 20 s apart, none longer than 0.7 of the recording."""
    wanted = []
    if long:
        wanted.append(min(rng.uniform(75, 110), seconds * 0.7))
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


def add_seizure(rng, traits, eeg, size, begin, end):
    """One rhythmic discharge: its frequency falls, it grows and wanes, it spreads from its focus,
    it keeps its harmonics."""
    n = end - begin
    course = np.linspace(0, 1, n)
    wave = discharge(rng, traits, course)
    growth = np.interp(course, [0, 0.15, 0.7, 0.95, 1], [0.35, 0.8, 1.0, 0.8, 0.3])
    growth = growth * rng.uniform(1.0, 2.0) * size
    focus = PLACES[NAMES.index(traits["focus"])]
    closeness = PLACES @ focus - 1      # 0 at the focus, -2 opposite
    for c in range(19):
        if traits["generalised"]:
            share = 0.6 + 0.4 * max(0, float(PLACES[c, 1]))
        else:
            share = np.exp(closeness[c] * np.interp(course, [0, 0.6, 1], [5, 1.2, 1.0]))
        # samples: the far side follows 10 to 25 ms later
        lag = int(abs(closeness[c]) * 3)
        eeg[c, begin:end] += (share * growth * np.roll(wave, lag)).astype(np.float32)


def discharge(rng, traits, course):
    """The wave of one seizure over its course from 0 to 1: (n,)."""
    fast = traits["fast"] * rng.uniform(0.9, 1.1)
    slow = traits["slow"] * rng.uniform(0.9, 1.1)
    if traits["generalised"]:
        fast = slow * 1.4
    wobble = np.cumsum(rng.standard_normal(len(course))) / np.sqrt(FS) * 0.25
    hz = slow + (fast - slow) * (1 - course) ** 1.5
    phase = 2 * np.pi * np.cumsum(hz) / FS + wobble
    sharp = traits["sharp"]
    return sum(sharp ** (k - 1) * np.sin(k * phase + 0.6 * (k - 1)) for k in (1, 2, 3, 4))
