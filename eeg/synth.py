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
PLACE = dict(zip(NAMES, PLACES))
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

    A pure function of the seed, to the last digit where the threads and the processor are the same.
    progress(what) is called after each recording. Raises DataError for a folder that is not
    empty."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty: synthetic recordings need a new folder")
    if not (0 < hours < math.inf and patients > 0):
        raise DataError(f"{hours} h of {patients} patients: both must be positive and finite")
    if seed < 0:
        raise DataError(f"seed {seed}: must be 0 or more")
    seconds = hours * 3600 / patients
    for number in range(patients):
        rng = np.random.default_rng([seed, number])
        patient = draw_patient(rng)
        name = f"sub-{number + 1:03d}"
        folder = out / name / "ses-01" / "eeg"
        for run, plan in enumerate(plan_recordings(rng, seconds, number)):
            stem = folder / f"{name}_ses-01_task-szMonitoring_run-{run:02d}"
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

    fewest = 1 if total < QUIET else 2
    count = int(np.clip(round(total / 600), fewest, 12))
    share = rng.uniform(0.5, 1.5, count)
    lengths = [max(10, round(s)) for s in total * share / share.sum()]
    lengths.sort(reverse=True)
    kinds = ["long"] + ["some"] * (count - 1)
    if total < QUIET and number % 2 == 1:
        kinds = ["none"] * count
    return [*map(Plan, lengths, kinds), *clips]


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
    tilt = rng.uniform(0, 1.5)
    along = 1 + tilt * (PLACES @ draw_direction(rng))
    across = np.exp(near * (PLACES @ place - 1))
    seen = across * along
    return (seen / np.abs(seen).max()).astype(np.float32)


def pink(rng, shape, slope):
    """Noise with an amplitude spectrum of f**-slope above 0.5 Hz, unit deviation, float32.

    Made in pieces of 64 s and cross-faded, which costs no more for a long recording."""
    from scipy import fft               # here: training starts earlier without it
    *rows, n = shape
    piece = 1 << 14
    fade = piece // 4
    ramp = np.sqrt(np.linspace(0, 1, fade, dtype=np.float32))
    f = np.fft.rfftfreq(piece, 1 / FS)
    gain = np.maximum(f, 0.5) ** -slope * (f > 0)
    gain /= np.sqrt((gain ** 2).mean())
    gain = gain.astype(np.float32)
    out = np.zeros((*rows, n + 2 * piece), np.float32)
    for at in range(0, n + fade, piece - fade):
        white = rng.standard_normal((*rows, piece), np.float32)
        x = fft.irfft(fft.rfft(white) * gain)
        x[..., :fade] *= ramp
        x[..., -fade:] *= ramp[::-1]
        out[..., at:at + piece] += x
    return out[..., fade:fade + n]


def rhythm(rng, n, frequency, width):
    """Narrow-band noise around `frequency`: unit deviation, float32 (n,)."""
    from scipy import signal as dsp     # here: training starts a second earlier without it
    pole = np.exp(-2 * np.pi * width / FS + 2j * np.pi * frequency / FS)
    gain = np.sqrt(1 - abs(pole) ** 2)
    drive = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    wave = dsp.lfilter([gain], [1, -pole], drive)
    return wave.real.astype(np.float32)


def cycle(phase, wave, sharp):
    """Value at each phase (radians) of a wave, about 1 in size.

    rhythm, sharp: a sine with harmonics; spike: a sharp peak and a shallow trough; spike_wave: a
    spike and a slow wave of the other sign."""
    if wave == "spike":
        return peak(phase, 0, 8) - 0.3 * peak(phase, 1.2, 1.5)
    if wave == "spike_wave":
        return 0.9 * peak(phase, 0, 12) - 0.8 * peak(phase, 2.4, 1.2) + 0.25
    total = 0
    for k in range(3):
        total += sharp ** k * np.sin((k + 1) * phase + 0.6 * k)
    return total / (1 + sharp)


def peak(phase, at, narrow):
    """A peak of height 1 at the phase `at` (radians) of each cycle."""
    return np.exp(narrow * (np.cos(phase - at) - 1))


def bump(t, at, width):
    """A single peak of height 1 at the time `at`."""
    return np.exp(-((t - at) / width) ** 2)


def wander(rng, n):
    """A random walk: (n,)."""
    return np.cumsum(rng.standard_normal(n))


def muscle(rng, n):
    """Noise that grows with frequency, as of muscle: (n,)."""
    return np.diff(rng.standard_normal(n + 1))


def draw_switches(rng, n, mean):
    """A state that goes between 0 and 1 every `mean` s or so, over half a second: float32 (n,)."""
    count = int(n / FS / mean) + 8
    times = np.cumsum(rng.exponential(mean, count) + 1)
    first = rng.integers(2)
    values = (np.arange(count) + first) % 2
    before = np.r_[values[0], values[:-1]]
    begin_end = np.stack([times, times + 0.5], axis=1)
    levels = np.stack([before, values], axis=1)
    state = np.interp(np.arange(n) / FS, begin_end.ravel(), levels.ravel())
    return state.astype(np.float32)


def waxing(rng, length):
    """An envelope from 0 to 1 that rises, fluctuates without a trend, and falls: (length,)."""
    count = max(2, length // FS // 2)
    knots = np.r_[0, rng.uniform(0.5, 1, count), 0]
    at = np.linspace(0, 1, len(knots))
    return np.interp(np.linspace(0, 1, length), at, knots)


def times_of(rng, n, per_minute):
    """A range over as many as there are within n samples."""
    return range(rng.poisson(per_minute * n / FS / 60))


def draw_place(rng, n, seconds):
    """(start, length) in samples of something of such a duration inside n samples."""
    length = min(n, max(2, round(FS * spread(rng, seconds))))
    start = int(rng.integers(0, n - length + 1))
    return start, length


def add(eeg, where, at, wave):
    """Add a wave (n,), seen by each electrode as `where` (19,) says, from sample `at`."""
    where = where.astype(np.float32)
    eeg[:, at:at + len(wave)] += where[:, None] * wave.astype(np.float32)


# ---- background ----

def background(rng, patient, n):
    """1/f noise that neighbours share and that waxes and wanes, and the rhythms of the state."""
    mixing = np.exp(patient["near"] * (PLACES @ PLACES.T - 1))
    mixing *= patient["size"] / np.linalg.norm(mixing, axis=1, keepdims=True)
    noise = pink(rng, (19, n), patient["slope"])
    eeg = mixing.astype(np.float32) @ noise
    knots = np.exp(rng.normal(0, patient["bursts"], n // FS + 2))
    at = np.linspace(0, len(knots) - 1, n)
    level = np.interp(at, np.arange(len(knots)), knots)
    eeg *= level.astype(np.float32)

    asleep = draw_switches(rng, n, 90.0) if patient["sleeps"] else np.zeros(n, np.float32)
    add_alpha(rng, patient, eeg, asleep)
    slow = patient["slowing"] + asleep
    for limits in ((0.8, 2), (2.5, 6)):     # delta and theta of drowsiness, sleep and illness
        place = draw_direction(rng)
        where = field(rng, place, rng.uniform(0.5, 3))
        hz = rng.uniform(*limits)
        wave = rhythm(rng, n, hz, 0.7) * slow
        wave = wave * patient["size"] * rng.uniform(0.3, 1)
        add(eeg, where, 0, wave)
    add_spindles(rng, eeg, patient["size"], asleep)
    return eeg


def add_alpha(rng, patient, eeg, asleep):
    """The posterior rhythm of closed eyes: each side waxes and wanes by itself."""
    n = eeg.shape[1]
    closed = draw_switches(rng, n, 8.0) * (1 - asleep)
    back = np.clip(-PLACES[:, 1], 0, None) ** 1.5
    for side in (-1, 1):
        width = rng.uniform(0.3, 1.2)
        wave = rhythm(rng, n, patient["alpha_hz"], width) * closed
        where = back * (0.6 + 0.4 * side * np.sign(PLACES[:, 0]))
        add(eeg, where, 0, wave * patient["alpha"] * patient["size"])


def add_spindles(rng, eeg, size, asleep):
    """Sleep spindles of 11 to 16 Hz and 0.5 to 2 s, some after a K-complex (AASM manual 2007)."""
    n = eeg.shape[1]
    for _ in times_of(rng, n, 4):
        at, length = draw_place(rng, n, (0.6, 2))
        if asleep[at] < 0.5:
            continue
        t = np.arange(length) / FS
        hz = rng.uniform(11, 16)
        wave = np.hanning(length) * np.sin(2 * np.pi * hz * t)
        if rng.random() < 0.4:
            wave -= 2 * bump(t, 0.3, 0.12) - bump(t, 0.65, 0.2)
        where = field(rng, PLACE["Cz"], 2.5)
        add(eeg, where, at, wave * size * rng.uniform(0.6, 2))


def add_rhythms(rng, patient, eeg, size):
    """The patient's RHYTHMS."""
    n = eeg.shape[1]
    for row in patient["rhythms"]:
        for _ in times_of(rng, n, row.rate):
            at, length = draw_place(rng, n, row.seconds)
            jitter = wander(rng, length) * rng.uniform(0.01, 0.06)
            phase = 2 * np.pi * spread(rng, row.hz) * np.arange(length) / FS + jitter
            limits = (0.3, 0.6) if row.wave == "sharp" else (0, 0.35)
            sharp = rng.uniform(*limits)
            wave = cycle(phase, row.wave, sharp) * waxing(rng, length)
            place = PLACE[rng.choice(row.places)]
            where = field(rng, place, rng.uniform(2, 6))
            add(eeg, where, at, wave * size * spread(rng, row.size))


def add_spikes(rng, patient, eeg, size):
    """Spikes with a slow wave between seizures, near the focus, alone or a few together."""
    n = eeg.shape[1]
    t = np.arange(FS // 2) / FS
    for _ in times_of(rng, n, patient["spike_rate"]):
        spike = bump(t, 0.1, rng.uniform(0.02, 0.045))
        spike -= rng.uniform(0.2, 0.7) * bump(t, 0.27, 0.09)
        where = field(rng, patient["focus"], rng.uniform(2, 7))
        where = where * rng.uniform(1.5, 6) * size
        at = int(rng.integers(0, n))
        together = rng.choice([1, 1, 1, 2, 3])
        for _ in range(together):
            add(eeg, where, at, spike[:max(0, n - at)])
            at += round(FS * rng.uniform(0.25, 0.6))


# ---- artefacts ----

def add_artefacts(rng, eeg, size):
    """ARTEFACTS: like seizures in size, in line length or in rhythm, but they do not evolve."""
    n = eeg.shape[1]
    for row in ARTEFACTS:
        for _ in times_of(rng, n, row.rate):
            at, length = draw_place(rng, n, row.seconds)
            where, wave = artefact(rng, row.name, length)
            add(eeg, where, at, wave * size * spread(rng, row.size))


def artefact(rng, name, length):
    """(share of each electrode (19,), wave (length,)) of one artefact of unit size."""
    t = np.arange(length) / FS
    hill = np.hanning(length)
    plateau = hill ** 0.3
    edge = PLACE[rng.choice("T3 T4 F7 F8 Fp1 Fp2 C3 O1 O2".split())]
    alone = np.eye(19)[rng.integers(19)]
    front = np.clip(PLACES[:, 1], 0, None)
    if name == "blink":
        return front ** 4, hill
    if name == "gaze":                  # the eyes are dipoles: left and right change sign
        turn = np.sin(2 * np.pi * rng.uniform(0.3, 3) * t)
        return PLACES[:, 0] * front ** 2, plateau * np.sign(turn)
    if name == "muscle":                # broad, above 20 Hz (Goncharova et al. 2003)
        return field(rng, edge, 3), plateau * muscle(rng, length)
    if name == "chewing":
        beat = np.sin(2 * np.pi * rng.uniform(1, 2.5) * t)
        loud = plateau * np.clip(beat, 0, None)
        return field(rng, edge, 2), loud * muscle(rng, length)
    if name == "pop":
        sign = rng.choice([-1, 1])
        return alone, sign * np.exp(-t / rng.uniform(0.1, 0.6))
    if name == "sway":
        phase = 2 * np.pi * rng.uniform(0.2, 1) * t + rng.uniform(0, 6)
        return field(rng, edge, 1), hill * np.sin(phase)
    if name == "moving":
        slow = rhythm(rng, length, rng.uniform(0.5, 2), 1)
        tense = muscle(rng, length) * rng.uniform(0.1, 0.8)
        return field(rng, edge, 1) * rng.uniform(0.3, 1, 19), plateau * (slow + tense)
    if name == "patting":
        phase = 2 * np.pi * rng.uniform(1.5, 5) * t + wander(rng, length) * 0.02
        where = field(rng, edge, 1.5)
        wave = rng.choice(["rhythm", "spike"])
        return where, plateau * cycle(phase, wave, 0.4)
    if name == "sweat":
        return alone + 0.3, hill * rhythm(rng, length, 0.3, 0.15)
    slope = rng.uniform(0.2, 1)
    return alone, plateau * pink(rng, (length,), slope)         # loose


def add_pickup(rng, patient, eeg, size):
    """What is always there: mains, heart, muscle that never rests."""
    n = eeg.shape[1]
    t = np.arange(n, dtype=np.float32) / FS
    mains = np.float32(2 * np.pi * patient["mains_hz"])
    hum = np.sin(mains * (t % 10))
    add(eeg, rng.uniform(0.3, 1, 19) * patient["mains"], 0, hum)

    tense = np.exp(rng.normal(0, 0.5, (19, 1)))
    tense = patient["tension"] * size * tense
    eeg += tense.astype(np.float32) * rng.standard_normal((19, n), np.float32)

    if patient["heart"]:
        beat = 2 * np.pi * patient["heart_hz"] * t + wander(rng, n) * 0.01
        wave = peak(beat, 0, 60) + 0.2 * peak(beat, 1.5, 5)
        add(eeg, 0.5 + 0.5 * PLACES[:, 0], 0, wave * patient["heart"] * size)
        pulse = peak(beat, 1.2, 2)                          # of an artery below one electrode
        alone = np.eye(19)[rng.integers(19)]
        add(eeg, alone, 0, pulse * patient["heart"] * size)


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
        noise = pink(rng, (n,), 0.3)
        eeg[c] += noise * np.float32(size * rng.uniform(1, 4))
    if fault == "saturated":
        at, length = draw_place(rng, n, (2, 30))
        eeg[c, at:at + length] = rng.choice([-1, 1]) * 3000


# ---- seizures ----

def draw_events(rng, patient, plan):
    """Seizures of a recording: [(onset, end, kind)] in s, in order.

    At least 20 s apart, none longer than 0.7 of the recording; of an ictal clip, all of it or from
    somewhere in its first half."""
    seconds = plan.seconds
    if plan.kind == "none":
        return []
    if plan.kind == "ictal":
        onset = rng.uniform(0, seconds / 2) if rng.random() < 0.5 else 0.0
        return [(round(onset, 2), float(seconds), draw_kind(rng, patient))]
    wanted = []
    if plan.kind == "long":
        duration = rng.uniform(75, 110)
        wanted.append((min(duration, seconds * 0.7), patient["seizures"][0]))
    for _ in range(rng.poisson(seconds * EVENTS_PER_HOUR / 3600)):
        kind = draw_kind(rng, patient)
        wanted.append((spread(rng, kind.seconds), kind))
    events = []
    for duration, kind in wanted:
        latest = max(1e-6, seconds - duration)
        for _ in range(20):
            onset = rng.uniform(0, latest)
            end = onset + duration
            apart = all(onset > last + 20 or end < first - 20 for first, last, _ in events)
            if duration <= 0.7 * seconds and apart:
                events.append((round(onset, 2), round(end, 2), kind))
                break
    return sorted(events, key=lambda event: event[0])


def draw_kind(rng, patient):
    kinds = patient["seizures"]
    return kinds[rng.integers(len(kinds))]


def add_seizure(rng, patient, kind, eeg, size, begin, end):
    """One seizure: what it does to the background, its rhythm in each place that it reaches, its
    muscle, what it leaves behind."""
    course = np.linspace(0, 1, end - begin)
    quieten(rng, kind, eeg, begin, end)
    phase = evolve(rng, kind, course)
    envelope = growth(rng, kind, course) * spread(rng, kind.size) * size
    sharp = rng.uniform(0, 0.6)
    # one generator is seen alike by neighbours; several that drift apart are not
    limits = (1, 6) if kind.focal else (3, 9)
    for number in range(rng.integers(*limits)):
        place = patient["focus"]
        if number or not kind.focal:
            place = draw_direction(rng)
        joins = np.ones_like(course)
        if number and kind.focal:
            late = course - rng.uniform(0, 0.7)
            joins = np.clip(late / 0.15, 0, 1) * rng.uniform(0.4, 1)
        drift = wander(rng, len(course)) * rng.uniform(0.002, 0.03)
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
        seen = (share * wave).astype(np.float32)
        late = begin + round(lags[c])
        n = min(len(wave), eeg.shape[1] - late)
        eeg[c, late:late + n] += seen[:n]


def evolve(rng, kind, course):
    """Phase (radians) over a seizure's course: from start_hz to end_hz, with a wobble."""
    first, last = spread(rng, kind.start_hz), spread(rng, kind.end_hz)
    progress = course ** rng.uniform(0.5, 1.5)
    hz = first * (last / first) ** progress
    wobble = wander(rng, len(course)) * rng.uniform(0.01, 0.06)
    return 2 * np.pi * np.cumsum(hz) / FS + wobble


def growth(rng, kind, course):
    """Envelope over a seizure's course: it grows, fluctuates, and ends abruptly or fades."""
    rise, floor = rng.uniform(0.05, 0.4), rng.uniform(0.2, 0.6)
    if not kind.focal:
        rise, floor = rng.uniform(0.02, 0.1), rng.uniform(0.3, 0.8)
    fall = rng.uniform(0, 0.6)
    levels = [floor, 1, 1 - 0.5 * fall, 1 - fall]
    trend = np.interp(course, [0, rise, 0.9, 1], levels)
    knots = rng.uniform(0.6, 1.2, 12)
    return trend * np.interp(course, np.linspace(0, 1, 12), knots)


def quieten(rng, kind, eeg, begin, end):
    """The background gives way or joins in; at the onset it may flatten for some seconds."""
    level = np.full(end - begin, spread(rng, (0.5, 3)))
    if kind.name == "decrement":
        level[:] = rng.uniform(0.1, 0.4)
    if kind.name in ("recruiting", "convulsion") or rng.random() < 0.15:
        flat = round(FS * rng.uniform(1, 5))
        level[:flat] *= rng.uniform(0.15, 0.6)
    ramp = min(len(level), FS // 2)
    level[:ramp] = np.linspace(1, level[ramp - 1], ramp)
    eeg[:, begin:end] *= level.astype(np.float32)


def add_tension(rng, kind, eeg, size, begin, end, phase):
    """Muscle over a seizure: tonic, then in time with its rhythm."""
    late = round(len(phase) * rng.uniform(0, 0.3))
    begin += late
    n = end - begin
    noise = np.diff(rng.standard_normal((19, n + 1), np.float32), axis=1)
    limits = (0.2, 4)
    tonic = waxing(rng, n)
    if kind.name == "convulsion":
        limits = (0.5, 6)
        tonic = np.clip(1 - 2 * np.linspace(0, 1, n), 0, 1)
    beat = np.clip(np.cos(phase[late:]), 0, None) ** 2
    where = 0.3 + np.abs(field(rng, draw_direction(rng), 1))
    loud = tonic + (1 - tonic) * beat
    loud = loud * size * spread(rng, limits)
    eeg[:, begin:end] += where[:, None] * loud.astype(np.float32) * noise


def add_motion(rng, eeg, size, begin, end):
    """Head and body move: slow waves of no rhythm, seen widely, that come and go."""
    n = end - begin
    hz = rng.uniform(0.5, 2)
    wave = rhythm(rng, n, hz, rng.uniform(0.5, 1.5))
    wave *= waxing(rng, n) * size * spread(rng, (0.6, 4))
    place = draw_direction(rng)
    where = field(rng, place, rng.uniform(0.5, 2))
    add(eeg, where * rng.uniform(0.3, 1, 19), begin, wave)     # each electrode's lead by itself


def add_aftermath(rng, kind, eeg, size, end):
    """Suppression and slowing after a seizure (Lhatoo et al., Ann Neurol 2010)."""
    n = round(FS * spread(rng, (5, 90)))
    n = min(n, eeg.shape[1] - end)
    if n < FS or rng.random() < 0.4:
        return
    course = np.linspace(0, 1, n)
    limits = (0.1, 0.5) if kind.name == "convulsion" else (0.5, 1)
    deep = rng.uniform(*limits)
    level = deep + (1 - deep) * course
    eeg[:, end:end + n] *= level.astype(np.float32)
    wave = rhythm(rng, n, rng.uniform(0.7, 2.5), 0.6) * (1 - course)
    wave = wave * rng.uniform(0.2, 1) * size
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
    band = [patient["high_pass"], patient["low_pass"]]
    b, a = dsp.butter(1, band, "band", fs=FS)
    return dsp.lfilter(b.astype(np.float32), a.astype(np.float32), eeg)


def write_edf(path, eeg, amplifier, step):
    """uV (19, T) of whole seconds at FS -> EDF at the amplifier's rate, in steps of `step` uV."""
    import pyedflib                     # here: training needs no EDF writer
    from scipy import signal as dsp     # here: as above
    rate = amplifier.rate
    top = 2 ** (amplifier.bits - 1) - 1
    if rate != FS:
        common = math.gcd(rate, FS)
        eeg = dsp.resample_poly(eeg, rate // common, FS // common, axis=1)
    limit = float(f"{top * step:.6g}")      # EDF has 8 characters for it
    digital = np.rint(eeg * np.float32(top / limit))
    digital = np.clip(digital, -top, top).astype(np.int16)
    seconds = digital.shape[1] // rate
    blocks = digital.reshape(len(NAMES), seconds, rate).swapaxes(0, 1)
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
            writer.blockWriteDigitalShortSamples(block.ravel())
    # pyedflib asks no write what became of it
    expected = 256 * (1 + len(NAMES)) + digital.nbytes
    if Path(path).stat().st_size != expected:
        raise OSError(errno.EIO, "not all of it could be written: is the disk full?", str(path))
