"""Synthetic EEG with seizures, as EDF and events.tsv in BIDS / SzCORE layout."""
import datetime
import math
from pathlib import Path

import numpy as np
from scipy import fft
from scipy import signal as dsp

from edf import CHANNELS, FS, DataError, positions, write_events_tsv


def synth(out, hours=1.0, patients=8, seed=0, progress=lambda what: None):
    """Write `hours` of synthetic EEG of `patients` as EDF and events.tsv in BIDS / SzCORE layout, 19
    channels, 256 Hz, uV.

    Background of 1/f noise, alpha with closed eyes, blinks, muscle, electrode pops, slow rhythms and mains;
    seizures that evolve in frequency, amplitude and spread, no larger than the recording's own artefacts. A
    pure function of the seed. progress(what) is called after each recording."""
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
            progress("synthetic recording")


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
