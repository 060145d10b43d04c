"""Synthetic scalp EEG with seizures, as EDF and events.tsv in BIDS / SzCORE layout.

    python data.py synth OUT [--hours H] [--patients N] [--seed S]

A recording is made in the order in which a real one comes about: sources behind the skull (noise,
rhythms of the state, rhythms and spikes that are no seizures, seizures), then what is picked up on
the way (muscle, eyes, heart, movement, bad electrodes), then the amplifier (reference, filters,
rate, step). A seizure is a rhythm that begins, changes in frequency and shape, spreads, and ends;
most are larger than the background, some smaller, and the largest waves of all are artefacts.

Every number stands in the tables below, beside its source. Units: uV, Hz, s; sizes are multiples of
the recording's own background. EEG is float32 (19, T) at FS.
"""
import datetime
import errno
import math
from collections import namedtuple
from pathlib import Path

import numpy as np

from eeg.annotations import write_events_tsv
from eeg.edf import CHANNELS, FS, DataError, positions

NAMES = CHANNELS["referential"]
PLACES = positions(NAMES)               # unit vectors (19, 3), x to the right, y to the nose
START = "2000-01-01 00:00:00"           # of every recording
EVENTS_PER_HOUR = 9
QUIET = 240                             # s: of patients with less, every second has no seizure
CLIPPED = 500                           # s: of patients with more, a tenth comes in short clips

# hz: at the start and at the end; wave: shape of a cycle, see cycle(); share: of all seizures
Seizure = namedtuple("Seizure", "name share focal seconds start_hz end_hz size wave")
SEIZURES = (
    # temporal lobe: rhythmic theta that slows (Ebersole and Pacia, Epilepsia 1996)
    Seizure("theta", 0.24, True, (20, 110), (5, 9), (2, 4.5), (1.5, 8), "rhythm"),
    # rhythmic delta (Foldvary et al., Neurology 2001)
    Seizure("delta", 0.14, True, (20, 90), (2, 4.5), (1.2, 3), (2, 9), "rhythm"),
    # low-voltage fast onset that recruits and slows (Perucca, Dubeau and Gotman, Brain 2014)
    Seizure("recruiting", 0.16, True, (15, 90), (10, 25), (3, 7), (1.2, 6), "rhythm"),
    # repetitive spikes (Foldvary et al., Neurology 2001)
    Seizure("spikes", 0.14, True, (15, 100), (3, 7), (1.2, 3), (2.5, 10), "spike"),
    # small theta runs, which detectors miss (Gotman, EEG Clin Neurophysiol 1982)
    Seizure("tiny", 0.05, True, (15, 70), (4, 8), (3, 6), (0.6, 1.2), "rhythm"),
    # electrodecrement of spasms and tonic seizures (Fusco and Vigevano, Epilepsia 1993)
    Seizure("decrement", 0.03, False, (6, 25), (16, 25), (10, 16), (0.3, 0.8), "rhythm"),
    # absence: 3 Hz spike-wave, 9 s in the mean (Sadleir et al., Neurology 2006)
    Seizure("absence", 0.08, False, (6, 25), (3, 4.2), (2.5, 3.2), (2.5, 9), "spike_wave"),
    # slow spike-wave of atypical absence (Gastaut et al., Epilepsia 1966)
    Seizure("atypical", 0.06, False, (10, 60), (1.6, 2.8), (1.4, 2.5), (2.5, 9), "spike_wave"),
    # tonic, then clonic bursts that slow; 62 s in the mean (Theodore et al., Neurology 1994)
    Seizure("convulsion", 0.10, False, (40, 100), (9, 14), (0.9, 2), (3, 12), "spike"),
)

# Share of seizures in which muscle and movement show. In those of SeizeIT2 (Bhagubai et al.,
# Scientific Data 2025) power rises most below 2 Hz and above 30 Hz: by 1.9 and 2.1 (natural log,
# median), between 4 and 13 Hz by 1.1
MOTOR = 0.75

# Rhythms that are no seizures: steady in frequency and place. share: of patients who have it;
# rate: per minute of them.
Rhythm = namedtuple("Rhythm", "name share rate seconds hz size places wave")
RHYTHMS = (
    # normal variants (Westmoreland and Klass, J Clin Neurophysiol 1990)
    Rhythm("psychomotor", 0.08, 0.2, (4, 20), (5, 7), (0.6, 1.5), ("T3", "T4"), "sharp"),
    Rhythm("wicket", 0.10, 0.3, (1, 3), (6, 11), (0.8, 2), ("T3", "T4", "F7", "F8"), "sharp"),
    Rhythm("hypnagogic", 0.15, 0.2, (2, 8), (3, 5), (1, 3), ("Fz", "Cz"), "rhythm"),
    Rhythm("mu", 0.30, 0.6, (2, 15), (8, 12), (0.6, 2), ("C3", "C4"), "sharp"),
    # rhythmic and periodic patterns (Hirsch et al., J Clin Neurophysiol 2021)
    Rhythm("delta", 0.20, 0.25, (4, 25), (1, 3), (1, 3), ("Fz", "F7", "F8", "T3"), "rhythm"),
    Rhythm("periodic", 0.05, 0.25, (20, 60), (0.5, 1.2), (1, 3), ("T3", "T4", "C3"), "spike"),
    # alpha and beta bursts, photic driving (Niedermeyer's Electroencephalography, 7th ed.)
    Rhythm("alpha", 0.50, 0.6, (3, 40), (8, 12), (1, 4), ("O1", "O2", "P3", "P4"), "rhythm"),
    Rhythm("beta", 0.30, 0.4, (5, 60), (15, 25), (0.4, 1.2), ("F3", "F4", "Fz"), "rhythm"),
    Rhythm("photic", 0.15, 0.3, (5, 12), (3, 20), (0.6, 2), ("O1", "O2"), "sharp"),
)

# What is not of the brain (Tatum et al., J Clin Neurophysiol 2011). rate: per minute.
Artefact = namedtuple("Artefact", "name rate seconds size")
ARTEFACTS = (
    Artefact("blink", 5, (0.2, 0.5), (2, 8)),
    Artefact("gaze", 1, (0.5, 2), (1, 4)),
    Artefact("muscle", 0.6, (3, 50), (0.4, 3)),
    Artefact("chewing", 0.15, (5, 40), (0.8, 4)),
    Artefact("pop", 0.4, (1, 6), (4, 20)),
    Artefact("sway", 0.3, (4, 40), (1.5, 6)),           # movement, breathing
    Artefact("moving", 0.25, (2, 40), (1.5, 8)),        # head and body: slow waves and muscle
    Artefact("patting", 0.06, (4, 25), (1, 4)),         # rhythmic, by hand
    Artefact("sweat", 0.05, (60, 200), (1.5, 5)),
    Artefact("loose", 0.08, (5, 60), (3, 15)),          # one electrode without contact
)

# What one electrode does all the time (Nolan et al., J Neurosci Methods 2010). share: of recordings
Fault = namedtuple("Fault", "name share")
FAULTS = (
    Fault("none", 0.80),
    Fault("bridged", 0.05),             # to its neighbour, by gel
    Fault("flat", 0.04),
    Fault("noisy", 0.07),
    Fault("saturated", 0.04),
)

# step: uV; high_pass, low_pass: Hz, of the hardware; share: of patients
Amplifier = namedtuple("Amplifier", "share rate bits step high_pass low_pass")
AMPLIFIERS = (
    Amplifier(0.50, 256, 16, (0.1, 0.4), (0.1, 0.5), (70, 110)),    # CHB-MIT (Shoeb 2009)
    Amplifier(0.20, 250, 16, (0.05, 0.3), (0.1, 0.3), (70, 110)),   # TUSZ (Shah et al. 2018)
    Amplifier(0.06, 400, 16, (0.1, 0.2), (0.1, 0.5), (70, 110)),    # TUSZ, other sites
    Amplifier(0.06, 512, 16, (0.1, 0.3), (0.3, 1.0), (70, 100)),    # Siena (Detti et al. 2020)
    Amplifier(0.06, 200, 12, (0.2, 0.6), (0.3, 1.0), (35, 70)),     # older digital systems
    Amplifier(0.06, 160, 12, (0.5, 1.0), (0.1, 0.5), (60, 75)),     # eegmmidb (Schalk et al. 2004)
    Amplifier(0.06, 100, 8, (2.0, 4.0), (0.5, 1.0), (30, 45)),      # first digital EEG, 8 bits
)


# ---- corpus ----

def synth(out, hours=1.0, patients=8, seed=0, progress=lambda what: None):
    """Write `hours` of synthetic EEG of `patients`, 19 channels in uV at the rate of each patient's
    amplifier, to `out`.

    A pure function of the seed. progress(what) is called after each recording. Raises DataError for
    a folder that is not empty."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty: synthetic recordings need a new folder")
    if not (0 < hours < math.inf and patients > 0):
        raise DataError(f"{hours} h of {patients} patients: both must be positive and finite")
    if seed < 0:
        raise DataError(f"seed {seed}: must be 0 or more")
    for number in range(patients):
        rng = np.random.default_rng([seed, number])
        patient = draw_patient(rng)
        for run, plan in enumerate(plan_recordings(rng, hours * 3600 / patients, number)):
            name = f"sub-{number + 1:03d}"
            stem = f"{name}_ses-01_task-szMonitoring_run-{run:02d}"
            stem = Path(out, name, "ses-01", "eeg", stem)
            recording = np.random.default_rng([seed, number, run])
            eeg, events = synth_recording(recording, patient, plan)
            write_edf(f"{stem}_eeg.edf", eeg, patient["amplifier"], patient["step"])
            write_events_tsv(f"{stem}_events.tsv", events, plan.seconds, start=START)
            progress("synthetic recording")


Plan = namedtuple("Plan", "seconds kind")       # kind: long, some, none, or ictal: nearly all of it


def plan_recordings(rng, total, number):
    """Recordings of one patient, whole seconds, the longest first, about one per 10 min; of a
    patient with more than CLIPPED a tenth comes in clips of 10 to 60 s, half of them of seizures.

    Each patient's longest recording gets a long seizure, so that small sets hold windows of every
    kind."""
    clips = []
    left = total / 10 if total > CLIPPED else 0
    while left >= 10:
        seconds = min(int(rng.choice([10, 20, 30, 60])), int(left))
        clips.append(Plan(seconds, rng.choice(["ictal", "none"])))
        left -= seconds
    total -= sum(clip.seconds for clip in clips)

    count = int(np.clip(round(total / 600), 1 + (total >= QUIET), 12))
    share = rng.uniform(0.5, 1.5, count)
    lengths = [max(10, round(s)) for s in total * share / share.sum()]
    quiet = total < QUIET and number % 2 == 1
    kinds = ["none"] * count if quiet else ["long"] + ["some"] * (count - 1)
    return [*map(Plan, sorted(lengths, reverse=True), kinds), *clips]


def draw_row(rng, rows):
    """One row of a table, by its share."""
    shares = np.array([row.share for row in rows])
    return rows[rng.choice(len(rows), p=shares / shares.sum())]


def spread(rng, limits):
    """A number between limits, even in its logarithm."""
    low, high = limits
    return float(low * (high / low) ** rng.random())


def some(rng, chance, limits):
    """spread(), or 0 where `chance` says that there is none."""
    size = spread(rng, limits)
    return size if rng.random() < chance else 0.0


def draw_patient(rng):
    """What stays the same within a patient: age, background, seizures, variants, amplifier."""
    age = spread(rng, (0.5, 80))
    seizures = [draw_row(rng, SEIZURES)]
    if rng.random() < 0.3:
        seizures.append(draw_row(rng, SEIZURES))
    amplifier = draw_row(rng, AMPLIFIERS)
    # posterior rhythm: 4 Hz in infants, 8 at 3 years, 10 in adults (Petersen and Eeg-Olofsson 1971)
    posterior = np.clip(4 + 2.7 * np.log2(1 + age / 1.3), 4, 10.5)
    return {
        "alpha_hz": float(posterior + rng.uniform(-1, 1.2)),
        "alpha": some(rng, 0.85, (0.3, 3)),
        # power falls with f**-1 to f**-2.4 (Donoghue et al., Nat Neurosci 2020), amplitude by half
        "slope": rng.uniform(0.5, 1.1),
        "size": spread(rng, (18, 90)),                  # uV
        "near": rng.uniform(1, 5),                      # how fast correlation falls with distance
        "bursts": rng.uniform(0.2, 0.8),                # how much the background waxes and wanes
        "slowing": some(rng, 0.4, (0.1, 1)),
        "sleeps": rng.random() < 0.5,
        "seizures": seizures,
        "focus": draw_direction(rng),
        "spike_rate": some(rng, 0.35, (0.3, 12)),       # per minute, between seizures
        "rhythms": [row for row in RHYTHMS if rng.random() < row.share],
        "mains_hz": rng.choice([50.0, 60.0]),
        "mains": spread(rng, (0.1, 4)),                 # uV
        "heart_hz": rng.uniform(0.9, 2.0),
        "heart": some(rng, 0.3, (0.1, 0.8)),
        "tension": spread(rng, (0.02, 0.25)),           # muscle that never rests
        "reference": rng.choice(["average", "ears", "far"]),
        "amplifier": amplifier,
        "step": round(spread(rng, amplifier.step), 3),
        "high_pass": spread(rng, amplifier.high_pass),
        "low_pass": spread(rng, amplifier.low_pass),
    }


def draw_direction(rng):
    """A place on the upper head: unit vector."""
    place = rng.standard_normal(3)
    place[2] = abs(place[2]) * 0.8
    return place / np.linalg.norm(place)


def synth_recording(rng, patient, plan):
    """(float32 (19, T) uV, events float64 (N, 2) in s) of one recording."""
    eeg = background(rng, patient, plan.seconds * FS)
    size = typical(eeg)
    add_rhythms(rng, patient, eeg, size)
    add_spikes(rng, patient, eeg, size)
    events = draw_events(rng, patient, plan)
    for onset, end, kind in events:
        add_seizure(rng, patient, kind, eeg, size, round(onset * FS), round(end * FS))
    add_artefacts(rng, eeg, size)
    add_pickup(rng, patient, eeg, size)
    add_faults(rng, eeg, size)
    times = [event[:2] for event in events]
    return amplify(patient, eeg), np.array(times, np.float64).reshape(-1, 2)


def typical(eeg):
    """Deviation of most of it, uV: 1.4826 times the median absolute value."""
    return 1.4826 * float(np.median(np.abs(eeg[:, ::7])))


# ---- sources ----

def field(rng, place, near):
    """How strongly each electrode sees a source at `place`, at most 1 in size: float32 (19,).

    A source that points to the scalp and one along it, which is positive on one side and negative
    on the other, mixed."""
    along = 1 + rng.uniform(0, 1.5) * (PLACES @ draw_direction(rng))
    seen = np.exp(near * (PLACES @ place - 1)) * along
    return (seen / np.abs(seen).max()).astype(np.float32)


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


def cycle(phase, wave, sharp):
    """Value at each phase (radians) of a wave, about 1 in size.

    rhythm, sharp: a sine with harmonics; spike: a sharp peak and a shallow trough; spike_wave: a
    spike and a slow wave of the other sign."""
    if wave == "spike":
        peak = np.exp(8 * (np.cos(phase) - 1))
        return peak - 0.3 * np.exp(1.5 * (np.cos(phase - 1.2) - 1))
    if wave == "spike_wave":
        peak = 0.9 * np.exp(12 * (np.cos(phase) - 1))
        return peak - 0.8 * np.exp(1.2 * (np.cos(phase - 2.4) - 1)) + 0.25
    harmonics = [sharp ** (k - 1) * np.sin(k * phase + 0.6 * (k - 1)) for k in (1, 2, 3)]
    return sum(harmonics) / (1 + sharp)


def draw_switches(rng, n, mean):
    """A state that goes between 0 and 1 every `mean` s or so, over half a second: float32 (n,)."""
    times = np.cumsum(rng.exponential(mean, int(n / FS / mean) + 8) + 1)
    values = np.tile([0.0, 1.0], len(times))[rng.integers(2):][:len(times)]
    before = np.r_[values[0], values[:-1]]
    turns = np.repeat(times, 2) + np.tile([0, 0.5], len(times))
    levels = np.stack([before, values], 1).ravel()
    return np.interp(np.arange(n) / FS, turns, levels).astype(np.float32)


def waxing(rng, length):
    """An envelope from 0 to 1 that rises, fluctuates without a trend, and falls: (length,)."""
    knots = np.r_[0, rng.uniform(0.5, 1, max(2, length // FS // 2)), 0]
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(knots)), knots)


def draw_place(rng, n, seconds):
    """(start, length) in samples of something of such a duration inside n samples."""
    length = min(n, max(2, round(FS * spread(rng, seconds))))
    return int(rng.integers(0, n - length + 1)), length


def add(eeg, where, at, wave):
    """Add a wave (n,), seen by each electrode as `where` (19,) says, from sample `at`."""
    eeg[:, at:at + len(wave)] += where.astype(np.float32)[:, None] * wave.astype(np.float32)


# ---- background ----

def background(rng, patient, n):
    """1/f noise that neighbours share and that waxes and wanes, and the rhythms of the state."""
    mixing = np.exp(patient["near"] * (PLACES @ PLACES.T - 1))
    mixing *= patient["size"] / np.linalg.norm(mixing, axis=1, keepdims=True)
    noise = pink(rng, (19, n), patient["slope"])
    eeg = mixing.astype(np.float32) @ noise
    knots = np.exp(rng.normal(0, patient["bursts"], n // FS + 2))
    at = np.linspace(0, len(knots) - 1, n)
    eeg *= np.interp(at, np.arange(len(knots)), knots).astype(np.float32)

    asleep = draw_switches(rng, n, 90.0) if patient["sleeps"] else np.zeros(n, np.float32)
    closed = draw_switches(rng, n, 8.0) * (1 - asleep)
    back = np.clip(-PLACES[:, 1], 0, None) ** 1.5
    for side in (-1, 1):                # each side waxes and wanes by itself
        wave = rhythm(rng, n, patient["alpha_hz"], rng.uniform(0.3, 1.2)) * closed
        where = back * (0.6 + 0.4 * side * np.sign(PLACES[:, 0]))
        add(eeg, where, 0, wave * patient["alpha"] * patient["size"])

    slow = patient["slowing"] + asleep
    for limits in ((0.8, 2), (2.5, 6)):     # delta and theta of drowsiness, sleep and illness
        where = field(rng, draw_direction(rng), rng.uniform(0.5, 3))
        wave = rhythm(rng, n, rng.uniform(*limits), 0.7) * slow
        add(eeg, where, 0, wave * patient["size"] * rng.uniform(0.3, 1))
    add_spindles(rng, eeg, patient["size"], asleep)
    return eeg


def add_spindles(rng, eeg, size, asleep):
    """Sleep spindles of 11 to 16 Hz and 0.5 to 2 s, some after a K-complex (AASM manual 2007)."""
    n = eeg.shape[1]
    for _ in range(rng.poisson(4 * n / FS / 60)):
        at, length = draw_place(rng, n, (0.6, 2))
        if asleep[at] < 0.5:
            continue
        t = np.arange(length) / FS
        wave = np.hanning(length) * np.sin(2 * np.pi * rng.uniform(11, 16) * t)
        if rng.random() < 0.4:
            wave -= 2 * np.exp(-((t - 0.3) / 0.12) ** 2) - np.exp(-((t - 0.65) / 0.2) ** 2)
        where = field(rng, PLACES[NAMES.index("Cz")], 2.5)
        add(eeg, where, at, wave * size * rng.uniform(0.6, 2))


def add_rhythms(rng, patient, eeg, size):
    """The patient's RHYTHMS."""
    n = eeg.shape[1]
    for row in patient["rhythms"]:
        for _ in range(rng.poisson(row.rate * n / FS / 60)):
            at, length = draw_place(rng, n, row.seconds)
            jitter = np.cumsum(rng.standard_normal(length)) * rng.uniform(0.01, 0.06)
            phase = 2 * np.pi * spread(rng, row.hz) * np.arange(length) / FS + jitter
            sharp = rng.uniform(0.3, 0.6) if row.wave == "sharp" else rng.uniform(0, 0.35)
            wave = cycle(phase, row.wave, sharp) * waxing(rng, length)
            where = field(rng, PLACES[NAMES.index(rng.choice(row.places))], rng.uniform(2, 6))
            add(eeg, where, at, wave * size * spread(rng, row.size))


def add_spikes(rng, patient, eeg, size):
    """Spikes with a slow wave between seizures, near the focus, alone or a few together."""
    n, width = eeg.shape[1], FS // 2
    t = np.arange(width) / FS
    for _ in range(rng.poisson(patient["spike_rate"] * n / FS / 60)):
        spike = np.exp(-((t - 0.1) / rng.uniform(0.02, 0.045)) ** 2)
        spike -= rng.uniform(0.2, 0.7) * np.exp(-((t - 0.27) / 0.09) ** 2)
        where = field(rng, patient["focus"], rng.uniform(2, 7)) * rng.uniform(1.5, 6) * size
        at = int(rng.integers(0, n))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            add(eeg, where, at, spike[:max(0, n - at)])
            at += round(FS * rng.uniform(0.25, 0.6))


# ---- artefacts ----

def add_artefacts(rng, eeg, size):
    """ARTEFACTS: like seizures in size, in line length or in rhythm, but they do not evolve."""
    n = eeg.shape[1]
    for row in ARTEFACTS:
        for _ in range(rng.poisson(row.rate * n / FS / 60)):
            at, length = draw_place(rng, n, row.seconds)
            where, wave = artefact(rng, row.name, length)
            add(eeg, where, at, wave * size * spread(rng, row.size))


def artefact(rng, name, length):
    """(share of each electrode (19,), wave (length,)) of one artefact of unit size."""
    t, bump = np.arange(length) / FS, np.hanning(length)
    plateau = bump ** 0.3
    edge = PLACES[NAMES.index(rng.choice("T3 T4 F7 F8 Fp1 Fp2 C3 O1 O2".split()))]
    alone = np.eye(19)[rng.integers(19)]
    front = np.clip(PLACES[:, 1], 0, None)
    if name == "blink":
        return front ** 4, bump
    if name == "gaze":                  # the eyes are dipoles: left and right change sign
        turn = np.sign(np.sin(2 * np.pi * rng.uniform(0.3, 3) * t))
        return PLACES[:, 0] * front ** 2, plateau * turn
    if name == "muscle":                # broad, above 20 Hz (Goncharova et al. 2003)
        return field(rng, edge, 3), plateau * np.diff(rng.standard_normal(length + 1))
    if name == "chewing":
        beat = np.clip(np.sin(2 * np.pi * rng.uniform(1, 2.5) * t), 0, None)
        return field(rng, edge, 2), plateau * beat * np.diff(rng.standard_normal(length + 1))
    if name == "pop":
        return alone, rng.choice([-1, 1]) * np.exp(-t / rng.uniform(0.1, 0.6))
    if name == "sway":
        turn = 2 * np.pi * rng.uniform(0.2, 1) * t + rng.uniform(0, 6)
        return field(rng, edge, 1), bump * np.sin(turn)
    if name == "moving":
        slow = rhythm(rng, length, rng.uniform(0.5, 2), 1)
        muscle = np.diff(rng.standard_normal(length + 1)) * rng.uniform(0.1, 0.8)
        return field(rng, edge, 1) * rng.uniform(0.3, 1, 19), plateau * (slow + muscle)
    if name == "patting":
        phase = 2 * np.pi * rng.uniform(1.5, 5) * t + np.cumsum(rng.standard_normal(length)) * 0.02
        return field(rng, edge, 1.5), plateau * cycle(phase, rng.choice(["rhythm", "spike"]), 0.4)
    if name == "sweat":
        return alone + 0.3, bump * rhythm(rng, length, 0.3, 0.15)
    return alone, plateau * pink(rng, (length,), rng.uniform(0.2, 1))      # loose


def add_pickup(rng, patient, eeg, size):
    """What is always there: mains, heart, muscle that never rests."""
    n = eeg.shape[1]
    t = np.arange(n, dtype=np.float32) / FS
    hum = np.sin(np.float32(2 * np.pi * patient["mains_hz"]) * (t % 10))
    add(eeg, rng.uniform(0.3, 1, 19) * patient["mains"], 0, hum)

    tense = patient["tension"] * size * np.exp(rng.normal(0, 0.5, (19, 1)))
    eeg += tense.astype(np.float32) * rng.standard_normal((19, n), np.float32)

    if patient["heart"]:
        beat = 2 * np.pi * patient["heart_hz"] * t + np.cumsum(rng.standard_normal(n)) * 0.01
        wave = np.exp(60 * (np.cos(beat) - 1)) + 0.2 * np.exp(5 * (np.cos(beat - 1.5) - 1))
        add(eeg, 0.5 + 0.5 * PLACES[:, 0], 0, wave * patient["heart"] * size)
        pulse = np.exp(2 * (np.cos(beat - 1.2) - 1))        # of an artery below one electrode
        add(eeg, np.eye(19)[rng.integers(19)], 0, pulse * patient["heart"] * size)


def add_faults(rng, eeg, size):
    """An electrode that is bridged to its neighbour, flat, noisy, or saturated for a while."""
    n, c = eeg.shape[1], rng.integers(19)
    fault = draw_row(rng, FAULTS).name
    if fault == "bridged":
        near = np.argsort(-PLACES @ PLACES[c])[1]
        eeg[c] = eeg[near]
    if fault == "flat":
        eeg[c] = 0
    if fault == "noisy":
        eeg[c] += pink(rng, (n,), 0.3) * np.float32(size * rng.uniform(1, 4))
    if fault == "saturated":
        at, length = draw_place(rng, n, (2, 30))
        eeg[c, at:at + length] = rng.choice([-1, 1]) * 3000


# ---- seizures ----

def draw_events(rng, patient, plan):
    """Seizures of a recording: [(onset, end, kind)] in s, in order.

    At least 20 s apart, none longer than 0.7 of the recording; of an ictal clip, all of it or from
    somewhere in its first half."""
    kinds, seconds = patient["seizures"], plan.seconds
    if plan.kind == "none":
        return []
    if plan.kind == "ictal":
        onset = round(rng.uniform(0, seconds / 2), 2) if rng.random() < 0.5 else 0.0
        return [(onset, float(seconds), kinds[rng.integers(len(kinds))])]
    wanted = []
    if plan.kind == "long":
        wanted.append((min(rng.uniform(75, 110), seconds * 0.7), kinds[0]))
    for _ in range(rng.poisson(seconds * EVENTS_PER_HOUR / 3600)):
        kind = kinds[rng.integers(len(kinds))]
        wanted.append((spread(rng, kind.seconds), kind))
    events = []
    for duration, kind in wanted:
        for _ in range(20):
            onset = rng.uniform(0, max(1e-6, seconds - duration))
            end = onset + duration
            apart = all(onset > e[1] + 20 or end < e[0] - 20 for e in events)
            if duration <= 0.7 * seconds and apart:
                events.append((round(onset, 2), round(end, 2), kind))
                break
    return sorted(events, key=lambda event: event[0])


def add_seizure(rng, patient, kind, eeg, size, begin, end):
    """One seizure: what it does to the background, its rhythm in each place that it reaches, its
    muscle, what it leaves behind."""
    course = np.linspace(0, 1, end - begin)
    quieten(rng, kind, eeg, begin, end)
    phase = evolve(rng, kind, course)
    envelope = growth(rng, kind, course) * spread(rng, kind.size) * size
    sharp = rng.uniform(0, 0.6)
    # one generator is seen alike by neighbours; several that drift apart are not
    count = rng.integers(1, 6) if kind.focal else rng.integers(3, 9)
    for number in range(count):
        first = number == 0
        place = patient["focus"] if first and kind.focal else draw_direction(rng)
        joins = np.ones_like(course)
        if kind.focal and not first:
            joins = np.clip((course - rng.uniform(0, 0.7)) / 0.15, 0, 1) * rng.uniform(0.4, 1)
        drift = np.cumsum(rng.standard_normal(len(course))) * rng.uniform(0.002, 0.03)
        apart = phase + drift + rng.uniform(-1, 1)
        spread_over(rng, kind, place, eeg, begin, course, apart, envelope * joins, sharp)
    if kind.name == "convulsion" or rng.random() < MOTOR:
        add_tension(rng, kind, eeg, size, begin, end, phase)
        add_motion(rng, eeg, size, begin, end)
    add_aftermath(rng, kind, eeg, size, end)


def spread_over(rng, kind, place, eeg, begin, course, phase, envelope, sharp):
    """Add a seizure's wave around `place`, narrow at first and wide at the end; the far side
    follows some ms later."""
    first = field(rng, place, rng.uniform(2.5, 6))
    last = field(rng, place, rng.uniform(0.7, 3))
    reach = np.clip(course * rng.uniform(0.8, 3), 0, 1)
    lags = np.abs(PLACES @ place - 1) * rng.uniform(0, 0.02) * FS
    wave = envelope * cycle(phase, kind.wave, sharp)
    for c in range(19):
        share = (1 - reach) * first[c] + reach * last[c]
        late = begin + round(lags[c])
        n = min(len(wave), eeg.shape[1] - late)
        eeg[c, late:late + n] += (share * wave)[:n].astype(np.float32)


def evolve(rng, kind, course):
    """Phase (radians) over a seizure's course: from start_hz to end_hz, with a wobble."""
    first, last = spread(rng, kind.start_hz), spread(rng, kind.end_hz)
    hz = first * (last / first) ** (course ** rng.uniform(0.5, 1.5))
    wobble = np.cumsum(rng.standard_normal(len(course))) * rng.uniform(0.01, 0.06)
    return 2 * np.pi * np.cumsum(hz) / FS + wobble


def growth(rng, kind, course):
    """Envelope over a seizure's course: it grows, fluctuates, and ends abruptly or fades."""
    rise, floor = rng.uniform(0.05, 0.4), rng.uniform(0.2, 0.6)
    if not kind.focal:
        rise, floor = rng.uniform(0.02, 0.1), rng.uniform(0.3, 0.8)
    fall = rng.uniform(0, 0.6)
    trend = np.interp(course, [0, rise, 0.9, 1], [floor, 1, 1 - 0.5 * fall, 1 - fall])
    return trend * np.interp(course, np.linspace(0, 1, 12), rng.uniform(0.6, 1.2, 12))


def quieten(rng, kind, eeg, begin, end):
    """The background gives way or joins in; at the onset it may flatten for some seconds."""
    level = np.full(end - begin, spread(rng, (0.5, 3)))
    if kind.name == "decrement":
        level[:] = rng.uniform(0.1, 0.4)
    if kind.name in ("recruiting", "convulsion") or rng.random() < 0.15:
        level[:round(FS * rng.uniform(1, 5))] *= rng.uniform(0.15, 0.6)
    ramp = min(len(level), FS // 2)
    level[:ramp] = np.linspace(1, level[ramp - 1], ramp)
    eeg[:, begin:end] *= level.astype(np.float32)


def add_tension(rng, kind, eeg, size, begin, end, phase):
    """Muscle over a seizure: tonic, then in time with its rhythm."""
    limits = (0.5, 6) if kind.name == "convulsion" else (0.2, 4)
    late = round(len(phase) * rng.uniform(0, 0.3))
    begin, phase = begin + late, phase[late:]
    noise = np.diff(rng.standard_normal((19, end - begin + 1), np.float32), axis=1)
    tonic = waxing(rng, end - begin)
    if kind.name == "convulsion":
        tonic = np.clip(1 - 2 * np.linspace(0, 1, end - begin), 0, 1)
    beat = np.clip(np.cos(phase), 0, None) ** 2
    where = 0.3 + np.abs(field(rng, draw_direction(rng), 1))
    loud = (tonic + (1 - tonic) * beat) * size * spread(rng, limits)
    eeg[:, begin:end] += where[:, None] * loud.astype(np.float32) * noise


def add_motion(rng, eeg, size, begin, end):
    """Head and body move: slow waves of no rhythm, seen widely, that come and go."""
    wave = rhythm(rng, end - begin, rng.uniform(0.5, 2), rng.uniform(0.5, 1.5))
    wave *= waxing(rng, end - begin) * size * spread(rng, (0.6, 4))
    where = field(rng, draw_direction(rng), rng.uniform(0.5, 2))
    add(eeg, where * rng.uniform(0.3, 1, 19), begin, wave)     # each electrode's lead by itself


def add_aftermath(rng, kind, eeg, size, end):
    """Suppression and slowing after a seizure (Lhatoo et al., Ann Neurol 2010)."""
    n = min(eeg.shape[1] - end, round(FS * spread(rng, (5, 90))))
    if n < FS or rng.random() < 0.4:
        return
    course = np.linspace(0, 1, n)
    deep = rng.uniform(0.1, 0.5) if kind.name == "convulsion" else rng.uniform(0.5, 1)
    eeg[:, end:end + n] *= (deep + (1 - deep) * course).astype(np.float32)
    wave = rhythm(rng, n, rng.uniform(0.7, 2.5), 0.6) * (1 - course) * rng.uniform(0.2, 1) * size
    add(eeg, field(rng, draw_direction(rng), 1.5), end, wave)


# ---- amplifier ----

def amplify(patient, eeg):
    """What the amplifier makes of uV (19, T): its reference and its filters, still at FS."""
    from scipy import signal as dsp     # here: as above
    if patient["reference"] == "average":
        eeg -= eeg.mean(0)
    if patient["reference"] == "ears":  # which pick up what the temporal lobes make
        ears = [NAMES.index(name) for name in ("T3", "T4", "T5", "T6")]
        eeg -= np.float32(0.6) * eeg[ears].mean(0)
    b, a = dsp.butter(1, [patient["high_pass"], patient["low_pass"]], "band", fs=FS)
    return dsp.lfilter(b.astype(np.float32), a.astype(np.float32), eeg)


def write_edf(path, eeg, amplifier, step):
    """uV (19, T) of whole seconds at FS -> EDF at the amplifier's rate, in steps of `step` uV."""
    import pyedflib                     # here: training needs no EDF writer
    from scipy import signal as dsp     # here: as above
    rate, top = amplifier.rate, 2 ** (amplifier.bits - 1) - 1
    if rate != FS:
        common = math.gcd(rate, FS)
        eeg = dsp.resample_poly(eeg, rate // common, FS // common, axis=1)
    limit = float(f"{top * step:.6g}")      # EDF has 8 characters for it
    digital = np.clip(np.rint(eeg * np.float32(top / limit)), -top, top).astype(np.int16)
    seconds = digital.shape[1] // rate
    blocks = digital.reshape(len(NAMES), seconds, rate).swapaxes(0, 1).reshape(seconds, -1)
    header = {
        "dimension": "uV", "sample_frequency": rate, "transducer": "", "prefilter": "",
        "physical_min": -limit, "physical_max": limit,
        "digital_min": -top, "digital_max": top}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with pyedflib.EdfWriter(str(path), len(NAMES), pyedflib.FILETYPE_EDF) as writer:
        # at once: each call writes the headers of all
        writer.setSignalHeaders([header | {"label": name} for name in NAMES])
        writer.setStartdatetime(datetime.datetime.fromisoformat(START))
        for block in blocks:
            writer.blockWriteDigitalShortSamples(block)
    # pyedflib asks no write what became of it
    if Path(path).stat().st_size != 256 * (1 + len(NAMES)) + digital.nbytes:
        raise OSError(errno.EIO, "not all of it could be written: is the disk full?", str(path))
