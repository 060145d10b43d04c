"""The detectors that bench/learn.py compares, and what each makes of a recording: a track, float32
(samples,) in 0..1, that is larger where a seizure is likelier.

Line length (Esteller et al., EMBC 2001): mean absolute difference over a sliding window. Classical:
what the field computed before networks, for every channel of pieces of 4 s, summarised over the
channels, under scikit-learn's gradient boosting or logistic regression.
"""
import numpy as np
from scipy.ndimage import uniform_filter1d

from eeg import edf
from evaluate import DEFAULTS

FS = edf.FS


def microvolts(recording):
    """float32 (C, samples)."""
    return recording.read(0, recording.samples) * recording.scale[:, None]


def smoothed(track, seconds):
    """The track's moving mean."""
    return uniform_filter1d(track, round(seconds * FS), mode="nearest")


# ---- line length ----

def line_length(recording, seconds, relative):
    """x / (1 + x), x = line length over `seconds` in multiples of its median in the recording, or
    of 10 uV."""
    eeg = microvolts(recording)
    step = np.abs(np.diff(eeg, axis=1, prepend=eeg[:, :1])).mean(0)
    x = smoothed(step, seconds)
    x = x / (max(np.median(x), 1e-9) if relative else 10.0)
    return (x / (1 + x)).astype(np.float32)


# ---- classical features ----

PIECE = 4 * FS
BANDS = (0.5, 2, 4, 6, 8, 10, 13, 18, 30, 45)       # Hz, edges
HABIT_SECONDS = 120                                 # after so long a recording speaks for itself
SMOOTH_SECONDS = DEFAULTS["smooth_seconds"]         # of the probability


def piece_features(x):
    """(pieces, C, features) of x (pieces, C, PIECE) in uV; all that scale with amplitude in log."""
    tiny = 1e-3
    x = x - x.mean(-1, keepdims=True)
    power = np.abs(np.fft.rfft(x * np.hanning(PIECE).astype(np.float32)))[..., :45 * 4 + 1] ** 2
    power = power / PIECE / 100
    hz = np.arange(power.shape[-1]) * FS / PIECE
    bands = [power[..., (hz >= low) & (hz < high)].mean(-1)
             for low, high in zip(BANDS, BANDS[1:])]
    total = power[..., hz >= 0.5].sum(-1) + tiny
    reached = np.cumsum(power, -1) >= 0.9 * power.sum(-1, keepdims=True)
    rhythm = power[..., (hz >= 1) & (hz < 30)]
    # by Wiener and Khinchin: how well the piece repeats itself after its first half wave
    again = np.fft.irfft(power, 4 * power.shape[-1])[..., :power.shape[-1] * 2 // 3]
    later = np.arange(again.shape[-1]) > again.argmin(-1)[..., None]
    again = np.where(later, again, 0).max(-1) / (again[..., 0] + tiny)
    slope = np.diff(x)
    bend = np.diff(slope)
    activity, mobility, bending = (v.var(-1) + tiny for v in (x, slope, bend))
    columns = [np.log(b + tiny) for b in bands] + [
        np.log(np.abs(slope).mean(-1) + tiny),                              # line length
        np.log(activity), np.log(mobility / activity), np.log(bending / mobility),      # Hjorth
        (np.diff(np.signbit(x)) != 0).mean(-1),                             # zero crossings
        hz[reached.argmax(-1)],                                             # spectral edge
        hz[hz >= 1][rhythm.argmax(-1)],                                     # dominant frequency
        np.log((rhythm.max(-1) + tiny) / (rhythm.mean(-1) + tiny)),
        again,
        np.log((x ** 4).mean(-1) / activity ** 2 + tiny),                   # kurtosis
        np.log(total / np.median(total, -1, keepdims=True)),                # of the other channels
    ]
    return np.stack(columns, -1)


def features(recording, block=64):
    """float32 (seconds, features): of the piece around every second, summarised over the channels:
    mean, deviation, third largest; and how alike the channels are."""
    eeg = microvolts(recording)
    short = max(0, PIECE - eeg.shape[1])
    eeg = np.pad(eeg, ((0, 0), (0, short)))
    pieces = np.lib.stride_tricks.sliding_window_view(eeg, PIECE, 1)[:, ::FS].transpose(1, 0, 2)
    rows = []
    for first in range(0, len(pieces), block):
        x = pieces[first:first + block]
        f = np.sort(piece_features(x), 1)
        z = x - x.mean(-1, keepdims=True)
        z = z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-3)
        alike = np.linalg.eigvalsh(z @ z.transpose(0, 2, 1))[:, -1:] / z.shape[1]
        rows.append(np.concatenate([f.mean(1), f.std(1), f[:, max(-3, -f.shape[1])], alike], 1))
    return np.concatenate(rows).astype(np.float32)


class Classical:
    """Features as they are and, unless `relative` is False, beside the habit of the recording,
    which a short one shares with all that it was trained on. log_odds: these are smoothed, not the
    probability."""

    def __init__(self, recordings, estimator, relative=True, log_odds=False):
        self.relative, self.log_odds = relative, log_odds
        found = [(r, features(r)) for r in recordings]
        self.usual = np.median(np.concatenate([f for _, f in found]), 0)
        self.kept = {r.path: f for r, f in found}
        x = np.concatenate([self.columns(r) for r, _ in found])
        y = np.concatenate([labels_of_pieces(r, len(f)) for r, f in found])
        clear = (y == 0) | (y == 1)
        self.estimator = estimator.fit(x[clear], y[clear] > 0)

    def columns(self, recording):
        f = self.kept.get(recording.path)
        f = features(recording) if f is None else f
        if not self.relative:
            return f
        own = recording.seconds / (recording.seconds + HABIT_SECONDS)
        habit = own * np.median(f, 0) + (1 - own) * self.usual
        return np.concatenate([f, f - habit], 1)

    def track(self, recording):
        p = self.estimator.predict_proba(self.columns(recording))[:, 1]
        middles = np.arange(len(p)) + PIECE / FS / 2
        at = np.arange(recording.samples) / FS
        if self.log_odds:
            track = smoothed(np.interp(at, middles, np.log(p / (1 - p))), SMOOTH_SECONDS)
            return (1 / (1 + np.exp(-track))).astype(np.float32)
        return smoothed(np.interp(at, middles, p).astype(np.float32), SMOOTH_SECONDS)


def labels_of_pieces(recording, count):
    """Share of seizure in each piece."""
    label = recording.labels(0, max(recording.samples, PIECE)).astype(np.float64)
    inside = np.concatenate([[0], np.cumsum(label)])
    first = np.arange(count) * FS
    return (inside[first + PIECE] - inside[first]) / PIECE


def boosting(seed):
    from sklearn.ensemble import HistGradientBoostingClassifier     # here: few commands need it
    return HistGradientBoostingClassifier(max_iter=200, learning_rate=0.05, max_leaf_nodes=8,
                                          l2_regularization=10, random_state=seed)


def logistic(seed):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
