"""A recording's own baseline: its usual power in every channel and band, against which a seizure is
a change.

    gain = log_gain(log_baseline(read, samples), seconds)     float32 (C, BANDS), natural log
    x = equalise(x, gain)                                       (B, C, T), on the device

Divided by it, band by band, every patient, electrode and amplifier has the same quiet EEG, and what
a detector sees is the change that line length relative to its median, and a reader, judge by. The
baseline is the median over pieces of 4 s, which seizures of less than half of the recording do
not move; pieces in which a channel is flat, as without contact, say nothing of it. Of a short
recording it is drawn towards the usual EEG, as the amplitude is (data.py), so that the first
minutes of a live one can be judged as well.
"""
import numpy as np

from eeg.disk import CHUNK
from eeg.edf import FS

EDGES = np.geomspace(0.5, 64, 15)       # Hz, of the bands
MIDDLES = np.sqrt(EDGES[1:] * EDGES[:-1])
PIECE = 4 * FS
PIECES = 64                             # chunks of 10 s that are read of a recording, at most
USUAL_SECONDS = 120.0                   # of EEG after which its own baseline counts more
MOST = 3.0                              # largest log gain: a channel without contact stays small
FLOOR = 1e-6                            # uV^2 / Hz: log power of a channel that is flat


def usual_log_power(hz):
    """Log power of scalp EEG, uV^2 / Hz at hz: flat to 1 Hz, then falling with f^-1.4 (Donoghue et
    al., Nat Neurosci 2020, find f^-1 to f^-2.4)."""
    return 5.2 - 1.4 * np.log(np.maximum(hz, 1))


def log_power(x):
    """Log power (pieces, C, BANDS) of x (C, T) in uV; none of less than PIECE samples."""
    count = x.shape[1] // PIECE
    pieces = x[:, :count * PIECE].reshape(len(x), count, PIECE)
    pieces = pieces - pieces.mean(-1, keepdims=True)
    taper = np.hanning(PIECE).astype(np.float32)
    power = np.abs(np.fft.rfft(pieces * taper)) ** 2
    power = power * 2 / (FS * np.sum(taper ** 2))
    hz = np.fft.rfftfreq(PIECE, 1 / FS)
    bands = [power[..., (hz >= low) & (hz < high)].mean(-1)
             for low, high in zip(EDGES, EDGES[1:])]
    return np.log(np.stack(bands, -1) + FLOOR).transpose(1, 0, 2)


def log_baseline(read, samples):
    """Median log power (C, BANDS) of a recording; read(start, n) gives uV (C, n). None where it is
    shorter than a piece."""
    if samples < PIECE:
        return None
    count = samples // CHUNK
    if not count:
        return _median(log_power(read(0, samples)))
    chosen = np.unique(np.linspace(0, count - 1, PIECES).round().astype(int))
    powers = [log_power(read(i * CHUNK, CHUNK)) for i in chosen.tolist()]
    return _median(np.concatenate(powers))


def _median(powers):
    """Over the pieces (pieces, C, BANDS) that are not flat, of each channel that has any."""
    flat = powers.max(-1, keepdims=True) < np.log(2 * FLOOR)
    if not flat.any():
        return np.median(powers, 0)
    alive = np.ma.array(powers, mask=np.broadcast_to(flat & ~flat.all(0), powers.shape))
    return np.ma.median(alive, 0).data


def log_gain(baseline, seconds):
    """What brings a recording's baseline (C, BANDS) to the usual one: log of a factor for the
    amplitude of each channel and band. The shorter the recording, the nearer to 0."""
    own = seconds / (seconds + USUAL_SECONDS)
    gain = own * (usual_log_power(MIDDLES) - baseline) / 2
    return np.clip(gain, -MOST, MOST).astype(np.float32)


def equalise(x, gain):
    """x float32 (B, C, T) with the log gain (B or 1, C, BANDS) on each band: a filter without
    phase, interpolated between the bands. Beyond its ends a window is taken to stay at its last
    value for a second, so that its first sample does not meet its last."""
    import torch                        # here: import workers start without it
    samples = x.shape[-1]
    x = torch.nn.functional.pad(x, (FS, FS), mode="replicate")
    hz = np.fft.rfftfreq(x.shape[-1], 1 / FS)
    place = np.interp(np.log(np.maximum(hz, EDGES[0])), np.log(MIDDLES), np.arange(len(MIDDLES)))
    weights = np.maximum(0, 1 - np.abs(place - np.arange(len(MIDDLES))[:, None]))
    weights = torch.from_numpy(weights.astype(np.float32)).to(x.device)
    response = torch.exp(gain.to(x.device) @ weights)
    return torch.fft.irfft(torch.fft.rfft(x) * response, n=x.shape[-1])[..., FS:FS + samples]
