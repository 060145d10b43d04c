"""Random changes to training windows, so that a detector survives another amplifier, cap or head.

A kind is a row of AUGMENTATIONS: how its numbers are drawn in a reader, from (generator, names of
the channels), and what they do on the device to x float32 (B, C, T), from (x, numbers (B, width) on
the CPU). Signals are divided by the recording's typical amplitude; an electrode that is missing is
stored as zeros, and so is one that is dropped here.
"""
import math
from collections import namedtuple

import numpy as np

from eeg.edf import FS

STRETCH = 0.05                          # most that a window is played faster or slower


def draw_order(rng, channels):
    """Each channel's place: its own or, for one window in two, that of its counterpart."""
    return mirror(channels) if rng.random() < 0.5 else np.arange(len(channels))


def draw_sign(rng, channels):
    """1, or for one window in two -1."""
    return [1 - 2 * (rng.random() < 0.5)]


def draw_stretch(rng, channels):
    """Samples of the recording per sample of the window."""
    return [rng.uniform(1 - STRETCH, 1 + STRETCH)]


def draw_reference(rng, channels):
    """Share, and the electrode of which it is taken away; -1: of the average of all."""
    electrode = rng.integers(len(channels)) if rng.random() < 0.5 else -1
    return [rng.random(), electrode]


def draw_mains(rng, channels):
    """Hz, share of the second harmonic, phase, and amplitude at each channel, of the recording's
    own."""
    hz = rng.choice([50, 60])
    amplitude = math.exp(rng.uniform(math.log(0.02), math.log(0.5)))
    return [hz, 0.3 * rng.random(), rng.uniform(0, 2 * math.pi),
            *amplitude * rng.uniform(0.2, 1, len(channels))]


def draw_band(rng, channels):
    """High-pass Hz, its order, low-pass Hz, its order; each filter for one window in two, else
    order 0."""
    high = 0.1 * 10 ** rng.random()
    low = 25 * 4 ** rng.random()
    orders = rng.integers(1, 3, 2) * (rng.random(2) < 0.5)
    return [high, orders[0], low, orders[1]]


def draw_gain(rng, channels):
    """A factor: +-20 % or so."""
    return [math.exp(rng.normal(0, 0.2))]


def draw_channels(rng, channels):
    """Which channels go, of up to three; -1: none in this place."""
    count = min(rng.integers(0, 4), (len(channels) - 1) // 2)
    gone = rng.permutation(len(channels))[:count]
    return [*gone, *[-1] * (3 - count)]


def reorder(x, draws):
    """Channels in the order drawn."""
    import torch            # here, as below: readers in child processes start without it
    windows = torch.arange(len(x))[:, None]
    return x[windows.to(x.device), draws.long().to(x.device)]


def multiply(x, draws):
    return x * on(x, draws)


def change_reference(x, draws):
    """Minus a share of the average of all electrodes, or of one."""
    import torch
    electrode = draws[:, 1].long().to(x.device)
    one = x[torch.arange(len(x), device=x.device), electrode.clamp(min=0)]
    reference = torch.where(electrode[:, None] < 0, x.mean(1), one)
    return x - on(x, draws[:, :1]) * reference[:, None]


def add_mains(x, draws):
    """A sine of 50 or 60 Hz and some of its second harmonic."""
    import torch
    # a whole number of cycles a second: exact however long the window is
    second = torch.arange(x.shape[-1], device=x.device) % FS / FS
    angle = 2 * math.pi * on(x, draws[:, :1]) * second
    hum = torch.sin(angle + on(x, draws[:, 2:3])) + on(x, draws[:, 1:2]) * torch.sin(2 * angle)
    return x + on(x, draws[:, 3:]) * hum


def change_band(x, draws):
    """Analog high-pass and low-pass of first order, or Butterworth of second, phase and all.

    Before its first sample a window is taken to be its own mirror image, which has no step."""
    import torch
    chosen = (draws[:, 1] + draws[:, 3]).nonzero()[:, 0]
    if not len(chosen):
        return x
    high, high_order, low, low_order = on(x, draws[chosen])[..., None].unbind(1)
    chosen = chosen.to(x.device)
    some = x[chosen]
    both = torch.cat([some.flip(-1), some], -1)
    f = torch.fft.rfftfreq(both.shape[-1], 1 / FS, device=x.device)
    # 1 / s of the high-pass: at 0 Hz large, not infinite, whose product with 0 is no number
    response = roll_off(high / f.clamp(min=1e-6), high_order, -1)
    response = response * roll_off(f / low, low_order, 1)
    filtered = torch.fft.irfft(torch.fft.rfft(both) * response, n=both.shape[-1])
    x[chosen] = filtered[..., -x.shape[-1]:]
    return x


def roll_off(w, order, sign):
    """Butterworth response at s = sign * jw, in cut-off frequencies: complex of w's shape (n, 1,
    F); 1 where the order is 0."""
    import torch
    s = torch.complex(torch.zeros_like(w), sign * w)
    first = 1 / (1 + s)
    second = 1 / (1 + math.sqrt(2) * s + s * s)
    return torch.where(order == 0, torch.ones_like(s), torch.where(order == 1, first, second))


def drop_channels(x, draws):
    import torch
    channels = torch.arange(x.shape[1])
    gone = (draws.long()[:, :, None] == channels).any(1).to(x.device)
    return x.masked_fill(gone[..., None], 0)


def on(x, draws):
    """Numbers (B, width) on the device of x, as (B, width, 1)."""
    return draws.to(x.device, non_blocking=True)[..., None]


# stream: of random numbers; a kind keeps its own for good. In the order in which they act: the
# head, the reference, the amplifier, the cable.
Augmentation = namedtuple("Augmentation", "stream draw change meaning")
AUGMENTATIONS = {
    "mirror": Augmentation(
        4, draw_order, reorder, "left for right, one window in two"),
    "stretch": Augmentation(
        5, draw_stretch, None, "up to 5 % faster or slower, labels too"),
    # sign flip: Rommel et al., J Neural Eng 2022. Of a change of reference, bipolar derivations
    # keep this much: which of their two ends is subtracted
    "polarity": Augmentation(
        6, draw_sign, multiply, "all channels upside down, one window in two"),
    "reference": Augmentation(
        7, draw_reference, change_reference,
        "minus a share of the average or of one electrode; referential only"),
    "mains": Augmentation(
        8, draw_mains, add_mains, "50 or 60 Hz, which an import may leave"),
    "band": Augmentation(
        9, draw_band, change_band, "high-pass 0.1 to 1 Hz, low-pass 25 to 100 Hz"),
    "gain": Augmentation(
        3, draw_gain, multiply, "factor of 0.8 to 1.2 or so"),
    # Saeed et al., ICASSP 2021
    "channels": Augmentation(
        10, draw_channels, drop_channels, "up to three channels without signal"),
}
AUGMENTED = ("mirror", "gain")          # by default; the others wait for a gain in bench/augment.py


class Augmenter:
    """The kinds named in `names`, for windows of these channels (names) and montage.

    Each kind of each window has random numbers of its own, keyed by (seed, epoch, window, kind):
    switching one on leaves the others' draws as they are, and a batch depends neither on who reads
    it nor on what it is read with. A kind that would change nothing is left out: mirror in a
    montage that is not symmetric, reference in any but the referential one, where it cancels."""

    def __init__(self, names, channels, montage):
        self.channels = tuple(channels)
        wanted = set(names)
        if (mirror(self.channels) == np.arange(len(channels))).all():
            wanted.discard("mirror")
        if montage != "referential":
            wanted.discard("reference")
        self.kinds = {name: row for name, row in AUGMENTATIONS.items() if name in wanted}
        self.widths = {name: len(numbers) for name, numbers in self.draw(0, 0, 0).items()}

    def draw(self, seed, epoch, window):
        """{kind: its numbers (width,)} for one window."""
        draws = {}
        for name, kind in self.kinds.items():
            rng = np.random.default_rng([seed, epoch, window, kind.stream])
            draws[name] = np.array(kind.draw(rng, self.channels), np.float32)
        return draws

    def reach(self, length):
        """Samples to be read for a window of `length`: some more where it may be played faster."""
        return math.ceil(length * (1 + STRETCH)) if "stretch" in self.kinds else length

    def apply(self, x, y, mask, draws, length):
        """(x, y, mask) of `length` samples from x (B, C, reach), y and mask (B, reach), and draws,
        tensors on the CPU {kind: (B, width)}. Padding stays 0; x may be written to."""
        if not self.kinds:
            return x, y, mask
        for name, kind in self.kinds.items():
            if name == "stretch":
                x, y, mask = stretched(x, y, mask, on(x, draws[name])[:, 0], length)
            else:
                x = kind.change(x, draws[name])
        return x.mul_(mask[:, None]), y, mask


def stretched(x, y, mask, speed, length):
    """The first `length` samples of a batch played at `speed` (B, 1): samples are interpolated by a
    cubic through the nearest four (Keys 1981), label and mask are those of the nearest."""
    import torch
    place = torch.arange(length, device=x.device) * speed
    at = place.floor()
    t = (place - at)[:, None]
    weights = (((2 - t) * t - 1) * t / 2, ((3 * t - 5) * t * t + 2) / 2,
               ((4 - 3 * t) * t + 1) * t / 2, (t - 1) * t * t / 2)
    at = at.long()[:, None]
    last = x.shape[-1] - 1
    out = 0
    for offset, weight in enumerate(weights, -1):
        index = (at + offset).clamp(0, last).expand(-1, x.shape[1], -1)
        out = out + weight * x.gather(2, index)
    nearest = place.round().long().clamp(max=last)
    return out, y.gather(1, nearest), mask.gather(1, nearest)


def mirror(channels):
    """Index of each channel's left-right counterpart: int64 (C,). Where one has none, as in a
    reduced montage, every channel stays in its place."""
    swap = dict(zip("Fp1 F3 C3 P3 O1 F7 T3 T5".split(), "Fp2 F4 C4 P4 O2 F8 T4 T6".split()))
    swap |= {right: left for left, right in swap.items()}
    other = ["-".join(swap.get(part, part) for part in name.split("-")) for name in channels]
    if set(other) != set(channels):
        return np.arange(len(channels))
    return np.array([list(channels).index(name) for name in other])
