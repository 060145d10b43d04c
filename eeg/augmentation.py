"""Random changes to training windows, so that a detector survives another amplifier, cap or head.

A kind is a row of AUGMENTATIONS: how its numbers are drawn in a reader, from (generator, names of
the channels), and what they do on the device to x float32 (B, C, T), from (x, numbers (B, width) on
the CPU). Signals are divided by the recording's typical amplitude; an electrode that is missing is
stored as zeros. The table holds the kinds that bench/augment.py has not found useless; another one
is one more row.
"""
import math
from collections import namedtuple

import numpy as np


def draw_order(rng, channels):
    """Each channel's place: its own or, for one window in two, that of its counterpart."""
    return mirror(channels) if rng.random() < 0.5 else np.arange(len(channels))


def draw_gain(rng, channels):
    """A factor: +-20 % or so."""
    return [math.exp(rng.normal(0, 0.2))]


def reorder(x, draws):
    """Channels in the order drawn."""
    windows = draws.new_tensor(np.arange(len(x))).long()[:, None]
    return x[windows.to(x.device), draws.long().to(x.device)]


def multiply(x, draws):
    return x * on_device(x, draws)


def on_device(x, draws):
    """Numbers (B, width) on the device of x, as (B, width, 1)."""
    return draws.to(x.device, non_blocking=True)[..., None]


# stream: of random numbers; a kind keeps its own for good: 5 to 10 were others'. In the order in
# which they act: the head, the amplifier.
Augmentation = namedtuple("Augmentation", "stream draw change meaning")
AUGMENTATIONS = {
    "mirror": Augmentation(4, draw_order, reorder, "left for right, one window in two"),
    "gain": Augmentation(3, draw_gain, multiply, "factor of 0.8 to 1.2 or so"),
}
AUGMENTED = ("mirror", "gain")          # by default; another waits for a gain in bench/augment.py


class Augmenter:
    """The kinds named in `names`, for windows of these channels (names).

    Each kind of each window has random numbers of its own, keyed by (seed, epoch, window, kind):
    switching one on leaves the others' draws as they are, and a batch depends neither on who reads
    it nor on what it is read with. Mirror is left out in a montage that is not symmetric."""

    def __init__(self, names, channels):
        self.channels = tuple(channels)
        wanted = set(names)
        if (mirror(self.channels) == np.arange(len(channels))).all():
            wanted.discard("mirror")
        self.kinds = {name: row for name, row in AUGMENTATIONS.items() if name in wanted}
        self.widths = {name: len(numbers) for name, numbers in self.draw(0, 0, 0).items()}

    def draw(self, seed, epoch, window):
        """{kind: its numbers (width,)} for one window."""
        draws = {}
        for name, kind in self.kinds.items():
            rng = np.random.default_rng([seed, epoch, window, kind.stream])
            draws[name] = np.array(kind.draw(rng, self.channels), np.float32)
        return draws

    def apply(self, x, mask, draws):
        """x (B, C, T) changed by draws, tensors on the CPU {kind: (B, width)}; padding, where mask
        (B, T) is 0, stays 0. x may be written to."""
        if not self.kinds:
            return x
        for name, kind in self.kinds.items():
            x = kind.change(x, draws[name])
        return x.mul_(mask[:, None])


def mirror(channels):
    """Index of each channel's left-right counterpart: int64 (C,). Where one has none, as in a
    reduced montage, or a name does not tell its side, every channel stays in its place."""
    left = "Fp1 F3 C3 P3 O1 F7 T3 T5 A1 M1 Fz Cz Pz".split()
    right = "Fp2 F4 C4 P4 O2 F8 T4 T6 A2 M2 Fz Cz Pz".split()
    swap = dict(zip(left + right, right + left))
    other = ["-".join(swap.get(part, "?") for part in name.split("-")) for name in channels]
    if set(other) != set(channels):
        return np.arange(len(channels))
    return np.array([list(channels).index(name) for name in other])
