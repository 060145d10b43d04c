"""EEG recordings for seizure detection: EDF in, one HDF5 file per recording out, training windows
at the speed of memory or of the disk.

    python data.py import SRC OUT [--layout auto|tuh|chbmit|siena|bids|seizeit]
                                   [--montage referential|bipolar|reduced] [--channels F7-T3,...]
                                   [--notch both|50|60|0] [--seizure-label TEXT]
                                   [--skip-bad] [--replace]
    python data.py synth OUT [--hours H] [--patients N] [--seed S]
    python data.py info OUT [--speed]

SRC is a corpus, any folder of EDF files, or one EDF; without annotations a recording is imported as
unlabelled. The import is resumable: a finished recording is kept while its source files and the
settings of the preparation are the same. What cannot be read rightly is refused with one line and
the rest goes on: exit 1 when anything was refused (--skip-bad: 0), 2 for bad usage. Preparation:
edf.py; layouts: corpora.py; who trains and who validates: splits.py.

A window is one read: ten seconds of all channels lie together in the file, the chunks one after the
other (corpora.write_recording). Threads read ahead of the training, so that a corpus may be larger
than memory and lie on a network; which thread reads what changes nothing in the batches.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import corpora
import splits
import synth
from corpora import CHUNK
from disk import copy_corpus, disk_bytes, file_system  # noqa: F401  (part of what data.py offers)
from edf import BLANK_UNITS, FS, MONTAGES, NOTCH, DataError, channel_names
from splits import person, split_patients  # noqa: F401  (part of what data.py offers)

READERS = 16                            # threads; a sweep: bench/loader.py --sweep
SLOW = 0.05                             # share of the time; more of waiting is worth a word
USUAL = 25.0                            # uV: scalp EEG, referential or bipolar, between seizures
USUAL_SECONDS = 120.0                   # of EEG after which a recording's own amplitude counts more
STRETCH = 0.05                          # most that a window is played faster or slower


class ReadFailed(DataError):
    """A recording that could be opened before and cannot be read now: a disk, a network or a hand
    at work."""


# ---- recordings ----

@dataclass
class Recording:
    """One imported recording. Holds no open file: each read opens it anew, so that neither 6,500
    recordings nor a run of weeks holds more descriptors than there are readers, and a file that was
    changed under the run is noticed at its next window."""
    path: str
    name: str                           # below the corpus folder, without .h5
    patient: str
    split: str                          # train, dev, eval or ""
    montage: str
    channels: tuple
    fs: int
    samples: int
    scale: np.ndarray                   # float32 (C,), uV per unit
    norm: float                         # uV, what the EEG is divided by, see reference_amplitude
    labelled: bool
    events: np.ndarray                  # float64 (N, 2), s
    prepared: str
    repaired: str = ""
    source_fs: float = 0.0
    offset: int = 0                     # of the samples in the file, bytes
    state: tuple = ()                   # size and mtime_ns of the file when the corpus was opened
    began: str = ""                     # YYYY-MM-DD hh:mm:ss by the EDF's header, or ""
    release: str = ""                   # what the corpus said of its version at import
    skipped: int = 0                    # chunks of the file before the first sample, of a part
    corpus: str = ""                    # folder's name, in a run on several
    digest: str = ""                    # what header must still prove that the file is the index's

    @property
    def seconds(self):
        return self.samples / self.fs

    @functools.cached_property
    def spans(self):
        """Events in samples: int64 (N, 2)."""
        return np.clip(np.rint(self.events * self.fs), 0, self.samples).astype(np.int64)

    def read_chunks(self, start, n, out):
        """The chunks that hold `n` samples from `start` on, into the first of out int16 (K, C,
        CHUNK); zeros beyond the end. ReadFailed or DataError where the file is not what it was."""
        if start < 0:
            raise ValueError(f"{self.name}: start {start} is before the recording")
        first = start // CHUNK
        wanted = whole_chunks(start % CHUNK + n)
        count = max(0, min(wanted, whole_chunks(self.samples) - first))
        if count:
            self._read_bytes(self.offset + (self.skipped + first) * out[0].nbytes, out[:count])
        out[count:wanted] = 0

    def _read_bytes(self, position, out):
        """Fill the array `out` from `position` in the file on."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                self._check_unchanged(handle)
                # without it the kernel reads on beyond each window, for nothing
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
                rest = memoryview(out).cast("B")
                while rest:
                    count = os.preadv(handle, [rest], position)
                    if not count:
                        raise ReadFailed(f"{self.path} ends {len(rest)} bytes early: "
                                         "it is being written or was cut")
                    rest = rest[count:]
                    position += count
            finally:
                os.close(handle)
        except OSError as error:
            raise ReadFailed(f"{self.path}: {error.strerror}") from None

    def _check_unchanged(self, handle):
        now = corpora.file_state(os.fstat(handle))
        if self.state and now != tuple(self.state):
            raise DataError(f"{self.path} was changed since the corpus was opened")
        if self.digest:
            if corpora.digest(os.pread(handle, self.offset, 0)) != self.digest:
                raise DataError(f"{self.path} is not the recording that the index describes: "
                                "import it again")
            self.digest = ""            # once is enough: from now on its time would tell

    def read(self, start, n):
        """int16 (C, n), zeros beyond the end; times scale it is uV."""
        skipped = start % CHUNK
        chunks = np.empty((whole_chunks(skipped + n), len(self.channels), CHUNK), np.int16)
        self.read_chunks(start, n, chunks)
        return chunks.transpose(1, 0, 2).reshape(len(self.channels), -1)[:, skipped:skipped + n]

    def labels(self, start, n):
        """uint8 (n,): 1 inside a seizure."""
        out = np.zeros(n, np.uint8)
        for begin, end in (self.spans - start).tolist():
            out[max(0, begin):max(0, end)] = 1
        return out


def whole_chunks(samples):
    """How many chunks hold so many samples."""
    return -(-samples // CHUNK)


def open_corpus(path):
    """All recordings below an imported folder, sorted by name, from its index and the sizes of the
    files. DataError for damaged or foreign files, or recordings that were prepared differently."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{path}: no such folder; python data.py import SRC {path}")
    entries = corpora.entries(root).items()
    recordings = [_recording(f"{root}/{name}.h5", name, *entry) for name, entry in entries]
    if not recordings:
        raw = next((file for file in root.rglob("*") if file.suffix.lower() == ".edf"), None)
        if raw:
            raise DataError(f"{path} holds EDF files that were not imported: run "
                            f"python data.py import {path} OUT, and open OUT")
        refused = [f"; {file}: {why}" for file, why in corpora.read_report(root)[:3]]
        raise DataError(f"{path} holds no recording" + "".join(refused))
    _check_alike(path, recordings)
    return recordings


def open_corpora(paths, same_person=()):
    """The recordings of one imported folder, or of a list of them.

    Of a list, names and patients carry the folder's name, so that sub-01 of one corpus is not
    sub-01 of another. same_person: ["siena/PN00 = own/anna", ...], who is one all the same."""
    if isinstance(paths, (str, Path)):
        recordings = open_corpus(paths)
    else:
        names = [path.name for path in resolved(paths)]
        if len(set(names)) < len(names):
            raise DataError(f"data.path: two folders have one name among {', '.join(names)}: "
                            "rename one")
        recordings = []
        for path, name in zip(paths, names):
            recordings += _named(open_corpus(path), name)
        _check_alike("data.path", recordings)
    for line in same_person:
        _join(recordings, line)
    return recordings


def resolved(paths):
    """The folders of data.path, absolute."""
    if not isinstance(paths, list):
        paths = [paths]
    return [Path(path).resolve() for path in paths if path]


def split_of(recordings, path, c, seed):
    """(train, dev) of the recordings in the folder `path`, as a run with the section `data` c
    divided them: one of several folders is divided together with the others."""
    place = Path(path).resolve() if path else None
    if not isinstance(c.get("path"), list) or place not in resolved(c["path"]):
        return splits.split(recordings, c, seed)
    parts = splits.split(open_corpora(c["path"], c.get("same_person", ())), c, seed)
    return tuple([r for r in part if r.corpus == place.name] for part in parts)


def _named(recordings, folder):
    for r in recordings:
        r.corpus = folder
        r.name = f"{folder}/{r.name}"
        r.patient = f"{folder}/{r.patient}"
    return recordings


def _join(recordings, line):
    """The patient before the = goes under the name behind it."""
    names = [name.strip() for name in line.split("=")]
    known = sorted({r.patient for r in recordings})
    unknown = [name for name in names if name not in known]
    if len(names) != 2 or unknown:
        raise DataError(f"data.same_person {line!r}: write A = B with two patients of "
                        f"{', '.join(known[:20])}")
    for r in recordings:
        if r.patient == names[0]:
            r.patient = names[1]


def _check_alike(path, recordings):
    for kind in ("montage", "channels", "prepared"):
        found = {getattr(r, kind): r.name for r in recordings}
        if len(found) > 1:
            names = " and ".join(list(found.values())[:2])
            raise DataError(f"{path}: {kind} differs between {names}: import all of it again, "
                            "and delete what has no EDF any more")


def _recording(path, name, state, entry):
    fields = dict(entry)
    size = fields.pop("size")
    mtime = fields.pop("mtime")
    # the same size and time as the index says: nothing is left to prove
    if tuple(state) == (size, mtime):
        fields["digest"] = ""
    fields["channels"] = tuple(fields["channels"])
    fields["scale"] = np.array(fields["scale"], np.float32)
    fields["events"] = np.array(fields["events"], np.float64).reshape(-1, 2)
    fields["norm"] = reference_amplitude(fields["norm"], fields["samples"] / fields["fs"])
    return Recording(path=path, name=name, state=tuple(state), **fields)


def reference_amplitude(typical, seconds):
    """uV that a recording is divided by: its own typical amplitude, drawn in its logarithm towards
    USUAL as a prior that weighs as much as USUAL_SECONDS of EEG (shrinkage, James and Stein 1961).

    A clip of 10 s out of a seizure has no background to be measured by: divided by its own
    amplitude it would look as small as a quiet one."""
    own = seconds / (seconds + USUAL_SECONDS)
    return float(np.exp(own * np.log(typical) + (1 - own) * np.log(USUAL)))


def fingerprint(recordings):
    """Hash over what must not change within a run: names, lengths, preparation, events, montage."""
    digest = hashlib.sha256()
    for r in sorted(recordings, key=lambda r: r.name):
        events = r.events.tolist()
        facts = [r.name, r.samples, r.prepared, r.montage, r.labelled, events]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


# ---- windows ----

class Windows:
    """(recording, start) pairs over `recordings`, never stored: arrays recording int32, start int64
    (samples) and kind uint8 (0 background, 1 partly seizure, 2 wholly seizure). A recording shorter
    than a window gives one, padded; a last window covers the tail."""

    def __init__(self, recordings, seconds=60.0, stride=10.0):
        unlabelled = [r.name for r in recordings if not r.labelled]
        if unlabelled or not recordings:
            what = f"{unlabelled[0]} is not" if unlabelled else "there are none"
            raise DataError(f"windows need labelled recordings: {what}")
        self.recordings = list(recordings)
        self.length = round(seconds * FS)
        step = round(stride * FS)
        if self.length < 1 or step < 1:
            raise DataError(f"windows of {seconds} s every {stride} s: "
                            f"both must be at least {1 / FS:.4f} s")
        starts = [self._starts(r.samples, step) for r in self.recordings]
        counts = [len(s) for s in starts]
        self.recording = np.repeat(np.arange(len(starts), dtype=np.int32), counts)
        self.start = np.concatenate(starts)
        kinds = [self._kinds(r, s) for r, s in zip(self.recordings, starts)]
        self.kind = np.concatenate(kinds)
        self._orders = {}

    def __len__(self):
        return len(self.start)

    def chunks(self, samples):
        """The most chunks of a file that so many samples from a window's start touch."""
        return int(whole_chunks(self.start % CHUNK + samples).max())

    def _starts(self, samples, step):
        last = max(0, samples - self.length)
        starts = np.arange(0, last + 1, step, dtype=np.int64)
        return starts if starts[-1] == last else np.append(starts, last)

    def _kinds(self, recording, starts):
        ends = np.minimum(starts + self.length, recording.samples)
        inside = np.zeros(len(starts), np.int64)
        for begin, end in recording.spans:
            shared = np.minimum(ends, end) - np.maximum(starts, begin)
            inside += np.clip(shared, 0, None)
        return (inside > 0).astype(np.uint8) + (inside == ends - starts)

    def epoch(self, seed, epoch, full=0.3, background=2.5, balance="own"):
        """Window ids (int64) of one epoch in training order: a pure function of (seed, epoch).

        All partial windows, and per partial window `full` wholly seizure and `background` windows
        (the proportions of SeizureTransformer, Wu et al. 2025). Those two are gone through in a
        fixed random order that goes on from epoch to epoch, so that each of them comes up in time.
        background=None: every window once.

        balance: of several corpora, "own" keeps the proportions inside each, so that the corpus
        tells nothing about the label; "equal" does, and repeats the partial windows of the smaller
        ones until each has as many as the largest; "pooled" draws from all as from one."""
        rng = np.random.default_rng([seed, epoch, 1])
        if background is None:
            return rng.permutation(np.arange(len(self)))
        partial = [np.flatnonzero(mine & (self.kind == 1)) for mine in self._groups(balance)]
        most = max(map(len, partial))
        if not most:
            raise DataError(f"none of {len(self)} windows contains a seizure's onset or end: "
                            "balanced sampling needs some; train on such recordings, or set "
                            "data.balanced: false")
        drawn = []
        for group, ids in enumerate(partial):
            if balance == "equal" and len(ids):
                ids = np.resize(ids, most)
            place = seed, epoch, balance, group
            drawn.append(ids)
            drawn.append(self._next(2, "full_per_partial", full, len(ids), *place))
            drawn.append(self._next(0, "background_per_partial", background, len(ids), *place))
        return rng.permutation(np.concatenate(drawn))

    def _groups(self, balance):
        """Masks (N,) of the windows among which proportions are kept."""
        corpus = np.array([r.corpus for r in self.recordings])[self.recording]
        if balance == "pooled":
            return [np.ones(len(self), bool)]
        return [corpus == name for name in np.unique(corpus)]

    def _next(self, kind, key, ratio, partial, seed, epoch, balance, group):
        """The next round(ratio * partial) windows of a kind."""
        if not (np.isfinite(ratio) and ratio >= 0):
            raise DataError(f"data.{key} is {ratio}: a ratio of 0 or more is needed")
        count = round(ratio * partial)
        if (seed, kind, balance, group) not in self._orders:
            ids = np.flatnonzero(self._groups(balance)[group] & (self.kind == kind))
            # a lone corpus draws as it did before there were several
            keys = [seed, kind, 2, group] if group else [seed, kind, 2]
            self._orders[seed, kind, balance, group] = np.random.default_rng(keys).permutation(ids)
        order = self._orders[seed, kind, balance, group]
        if count and not (self.kind == kind).any():
            what = "contains no seizure" if kind == 0 else "lies wholly inside a seizure"
            raise DataError(f"no window {what}, {count} are asked for: "
                            f"set data.{key}: 0, or other data.window_seconds")
        # where one corpus of several has none of a kind, it gives none
        count = count if len(order) else 0
        return order[(epoch * count + np.arange(count)) % max(1, len(order))]


# ---- augmentation ----

# Random changes to training windows, so that a detector survives another amplifier, cap or head.
# A kind is a row of AUGMENTATIONS: how its numbers are drawn in a reader, from (generator, names of
# the channels), and what they do on the device to x float32 (B, C, T), from (x, numbers (B, width)
# on the CPU). Signals are divided by the recording's typical amplitude; an electrode that is
# missing is stored as zeros, and so is one that is dropped here.


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
    import torch            # here, as below: see Loader
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
AUGMENTED = ("mirror", "gain")          # by default: what bench/augment.py shows a gain for


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


# ---- loader ----

def factor(scale, norm):
    """uV per unit (..., C), typical amplitude in uV (...) -> what int16 (..., C, T) is multiplied
    with to be about 1 in size: (..., C, 1)."""
    return (scale / norm.unsqueeze(-1)).unsqueeze(-1)


def normalise(eeg, scale, norm):
    """int16 tensor (..., C, T) -> float32 (..., C, T), about 1 in size; scale and norm as of
    factor()."""
    return eeg * factor(scale, norm)


@dataclass
class Slot:
    """Room for one batch in the ring."""
    tensors: dict                       # see Loader._slots
    copied: object = None               # CUDA event after which the room may be written again

    def __post_init__(self):
        self.arrays = {key: tensor.numpy() for key, tensor in self.tensors.items()}


class Loader:
    """Batches of a Windows object. `readers` threads copy whole windows, in the order of the plan
    and ahead by `buffers` batches, into a ring of int16 buffers (pinned for CUDA); they are put in
    order of channels and scaled on the device. Needs no worker processes: they would copy every
    batch once more.

    waited, lasted: seconds that the consumer has waited for batches, of so many; reading, read:
    seconds that the readers took, for so many windows."""

    def __init__(self, windows, device="cpu", seed=0, augment=False, buffers=4, readers=READERS):
        # in this class alone: import workers and commands start in a third of the time
        import torch
        self.device = torch.device(device)
        self.windows = windows
        self.seed = seed
        self.buffers = buffers
        self.readers = readers
        self.waited = 0.0
        self.lasted = 0.0
        self.reading = 0.0
        self.read = 0
        self.said = 0.0, 0.0            # waited and lasted at the last share()
        self.scale = np.stack([r.scale for r in windows.recordings])
        self.norm = np.array([r.norm for r in windows.recordings], np.float32)
        first = windows.recordings[0]
        names = AUGMENTED if augment is True else augment or ()
        self.augmenter = Augmenter(names, first.channels, first.montage)
        # samples read of each window
        self.reach = self.augmenter.reach(windows.length)
        self._ring = []

    def batches(self, lists_of_ids, epoch):
        """Yield (x float32 (B, C, T), y float32 (B, T), mask float32 (B, T)) on the device for each
        list of window ids, in order; None for an empty list. mask is 0 on padding. Closing the
        iterator early ends its threads."""
        lists = [np.asarray(ids, np.int64) for ids in lists_of_ids]
        ring = self._slots(max(map(len, lists), default=0))
        pool = ThreadPoolExecutor(self.readers, "reader")
        begun = collections.deque()

        def begin(number):
            slot = ring[number % len(ring)]
            fills = [pool.submit(self._fill, slot, place, window, epoch)
                     for place, window in enumerate(lists[number].tolist())]
            begun.append((slot, fills))

        try:
            clock = time.perf_counter()
            for number in range(min(len(ring), len(lists))):
                begin(number)
            for number, ids in enumerate(lists):
                slot, fills = begun.popleft()
                clock = self._wait(fills, clock)
                batch = [self._to_device(slot, len(ids)) if len(ids) else None]
                slot.copied = self._copied()
                if number + len(ring) < len(lists):
                    begin(number + len(ring))
                # keeps no reference: the consumer alone decides how long a batch lives
                yield batch.pop()
        finally:
            pool.shutdown(cancel_futures=True)
            # the next call fills this ring
            self._ring = ring

    def _slots(self, size):
        """The ring: `buffers` slots for `size` windows, those of the last call where they fit."""
        ring, self._ring = self._ring, []
        if ring and len(ring[0].arrays["eeg"]) >= size:
            return ring
        import torch
        channels, chunks = self.scale.shape[1], self.windows.chunks(self.reach)
        shapes = {
            "eeg": ((size, chunks, channels, CHUNK), torch.int16),
            "y": ((size, self.reach), torch.uint8),
            "real": ((size,), torch.int64),
            "scale": ((size, channels), torch.float32),
            "norm": ((size,), torch.float32),
            "start": ((size,), torch.int64),
        }
        for kind, width in self.augmenter.widths.items():
            shapes[kind] = (size, width), torch.float32
        pin = self.device.type == "cuda"

        def tensors():
            return {key: torch.zeros(shape, dtype=kind, pin_memory=pin)
                    for key, (shape, kind) in shapes.items()}
        return [Slot(tensors()) for _ in range(self.buffers)]

    def _fill(self, slot, place, window, epoch):
        """In a reader: one window into its place; seconds that it took to read."""
        which = self.windows.recording[window]
        start = int(self.windows.start[window])
        recording = self.windows.recordings[which]
        host = slot.arrays
        # the GPU may still be copying the batch before out of this slot
        if slot.copied is not None:
            slot.copied.synchronize()
        began = time.perf_counter()
        recording.read_chunks(start, self.reach, host["eeg"][place])
        took = time.perf_counter() - began
        host["start"][place] = start % CHUNK
        host["real"][place] = min(self.reach, recording.samples - start)
        host["y"][place] = recording.labels(start, self.reach)
        host["scale"][place] = self.scale[which]
        host["norm"][place] = self.norm[which]
        draws = self.augmenter.draw(self.seed, epoch, window)
        for kind, numbers in draws.items():
            host[kind][place] = numbers
        return took

    def _wait(self, fills, last):
        """Until a batch is read; raises what its reading raised. Returns the time, to be given as
        `last`."""
        began = time.perf_counter()
        for fill in fills:
            self.reading += fill.result()
        now = time.perf_counter()
        self.waited += now - began
        self.lasted += now - last
        self.read += len(fills)
        return now

    def share(self):
        """Share of the time since the last call that the consumer waited for batches."""
        waited = self.waited - self.said[0]
        lasted = self.lasted - self.said[1]
        self.said = self.waited, self.lasted
        return waited / lasted if lasted else 0.0

    def advice(self, share):
        """What to do where training waits for data for `share` of the time: one line."""
        folder = os.path.dirname(self.windows.recordings[0].path)
        cost = 1e3 * self.reading / max(1, self.read)
        return (f"training waited for data {100 * share:.0f} % of the time: a window takes "
                f"{cost:.1f} ms to read from {folder} ({file_system(folder)}), {self.readers} at a "
                "time; raise data.readers, or set data.copy_to to a folder on a local disk")

    def _to_device(self, slot, count):
        """(x, y, mask) of the first `count` windows of a slot."""
        import torch
        draws = {kind: slot.tensors[kind][:count] for kind in self.augmenter.widths}
        t = {key: tensor[:count].to(self.device, non_blocking=True)
             for key, tensor in slot.tensors.items() if key not in draws}
        channels, length = self.scale.shape[1], self.reach
        x = torch.empty((count, channels, length), device=self.device)
        starts = slot.arrays["start"][:count]
        if length % CHUNK == 0 and not starts.any():
            # every window begins a chunk: one pass brings (K, C, CHUNK) of the file to (C, T)
            chunks = t["eeg"][:, :length // CHUNK].transpose(1, 2)
            x.view(count, channels, -1, CHUNK).copy_(chunks)
        else:
            for i, first in enumerate(starts.tolist()):
                x[i] = t["eeg"][i].transpose(0, 1).flatten(1)[:, first:first + length]
        x *= factor(t["scale"], t["norm"])
        mask = torch.arange(length, device=self.device) < t["real"][:, None]
        return self.augmenter.apply(
            x, t["y"].float(), mask.float(), draws, self.windows.length)

    def _copied(self):
        """A CUDA event after the copies that are under way; None on the CPU, where they are
        done."""
        if self.device.type != "cuda":
            return None
        import torch
        event = torch.cuda.Event()
        event.record()
        return event


def read_ahead(windows, n, depth=32, readers=READERS):
    """Yield int16 (C, n) of each (recording, start) of `windows` in turn, up to `depth` of them
    read ahead by threads. For inference, where windows come in the order of time."""
    pool = ThreadPoolExecutor(readers, "reader")
    begun = collections.deque()
    try:
        for recording, start in windows:
            begun.append(pool.submit(recording.read, start, n))
            if len(begun) > depth:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- command line ----

def speed(path, seconds=10.0, say=print):
    """Measure how fast windows of 60 s are read from an imported folder in random order: from the
    disk, each once, and again from memory."""
    recordings = open_corpus(path)
    length = 60 * FS
    places = [(r, start) for r in recordings
              for start in range(0, max(1, r.samples - length), length)]
    places = [places[i] for i in np.random.default_rng().permutation(len(places))]
    for r in recordings:
        with open(r.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    say(f"{path} on {file_system(path)}, {READERS} readers, windows of 60 s in random order")
    count, rate, ratio = _rate(places, length, 0.6 * seconds)
    from_disk = "this disk's reads are not counted"
    if ratio:
        from_disk = f"{ratio:.2f} bytes from the disk per byte used"
    say(f"  cold: {rate:,.0f} windows/s ({count} windows), {from_disk}")
    count, rate, _ = _rate(itertools.cycle(places[:min(count, 1000)]), length, 0.3 * seconds)
    say(f"  warm: {rate:,.0f} windows/s")


def _rate(windows, length, seconds):
    """(windows read, windows/s, bytes read from the disk per byte of windows)."""
    before = disk_bytes()
    began = time.monotonic()
    count = used = 0
    with contextlib.closing(read_ahead(windows, length)) as ahead:
        for eeg in ahead:
            count += 1
            used += eeg.nbytes
            lasted = time.monotonic() - began
            if lasted > seconds:
                break
    return count, count / lasted, (disk_bytes() - before) / used


def info(path, say=print):
    """What an imported folder holds."""
    recordings = open_corpus(path)
    labelled = [r for r in recordings if r.labelled]
    people = sorted({person(r.patient) for r in recordings})
    say(f"{path}: {len(recordings)} recordings of {len(people)} patients, {_hours(recordings)}, "
        f"montage {recordings[0].montage}, {FS} Hz, prepared {recordings[0].prepared}")
    for release in sorted({r.release for r in recordings if r.release}):
        say(f"  {release}: {sum(r.release == release for r in recordings)} recordings")
    for split in sorted({r.split for r in recordings}):
        part = [r for r in recordings if r.split == split]
        say(f"  {split or 'no split':8} {len(part)} recordings, "
            f"{len({person(r.patient) for r in part})} patients, {_hours(part)}, "
            f"{_seizures(part)}, "
            f"{sum(float(np.diff(r.events).sum()) for r in part) / 3600:.3f} h of them")
    for name in people:
        mine = [r for r in recordings if person(r.patient) == name]
        say(f"    {name}: {_hours(mine)}, {_seizures(mine)}")
    rates = [f"{r.source_fs:g}" for r in recordings]
    counted = [f"{rate} Hz x {rates.count(rate)}" for rate in sorted(set(rates), key=float)]
    say("  source rates: " + ", ".join(counted))
    say(f"  shorter than 60 s: {sum(r.seconds < 60 for r in recordings)}, without annotations: "
        f"{len(recordings) - len(labelled)}, repaired: {sum(bool(r.repaired) for r in recordings)}")
    if labelled:
        w = Windows(labelled)
        counts = np.bincount(w.kind, minlength=3)
        say(f"  windows of 60 s every 10 s: {counts[0]} background, {counts[1]} partial, "
            f"{counts[2]} full ({100 * (counts[1] + counts[2]) / len(w):.1f} % with seizure)")
    refused = corpora.read_report(path)
    say(f"  refused: {len(refused)}")
    for file, why in refused:
        say(f"    {file}: {why}")


def _hours(recordings):
    return f"{sum(r.seconds for r in recordings) / 3600:.2f} h"


def _seizures(recordings):
    return f"{sum(len(r.events) for r in recordings)} seizures"


def arguments():
    parser = argparse.ArgumentParser(description="EDF to HDF5, synthetic EDF, what a folder holds.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("import", help="EDF files to one HDF5 file per recording")
    p.add_argument("src", help="corpus folder, any folder of EDF files, or one EDF")
    p.add_argument("out")
    p.add_argument("--layout", choices=("auto", *corpora.LAYOUTS), default="auto")
    p.add_argument("--montage", choices=MONTAGES, default="referential",
                   help="19 electrodes, 18 double-banana derivations, or what --channels names")
    p.add_argument("--channels", type=channel_names, default=(), metavar="F7-T3,...",
                   help="of --montage reduced: electrodes, pairs of them, or labels of the EDF")
    p.add_argument("--notch", choices=sorted(NOTCH, reverse=True), default="both",
                   help="mains to take out, Hz")
    p.add_argument("--blank-unit", choices=BLANK_UNITS, default="",
                   help="unit where the EDF names none")
    p.add_argument("--seizure-label", action="append", default=[], metavar="TEXT",
                   help="EDF+ annotation of a seizure; START..END for a pair; may be repeated")
    p.add_argument("--background-label", action="append", default=[], metavar="TEXT",
                   help="EDF+ annotation of a recording that was read and holds no other seizure")
    p.add_argument("--replace", action="store_true",
                   help="make recordings of another preparation anew")
    p.add_argument("--workers", type=int, default=0, help="processes (0: one per core)")
    p.add_argument("--skip-bad", action="store_true", help="exit 0 although files were refused")
    p = commands.add_parser("synth", help="synthetic EDF recordings in BIDS / SzCORE layout")
    p.add_argument("out")
    p.add_argument("--hours", type=float, default=1.0, help="in all")
    p.add_argument("--patients", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("info", help="hours, patients, seizures, balance, refusals")
    p.add_argument("out")
    p.add_argument("--speed", action="store_true",
                   help="measure for 10 s how fast windows are read")
    return parser.parse_args()


def main():
    args = arguments()
    try:
        if args.command == "synth":
            synth.synth(args.out, args.hours, args.patients, args.seed)
        elif args.command == "info":
            info(args.out)
            if args.speed:
                speed(args.out)
        else:
            report = corpora.import_corpus(
                args.src, args.out, layout=args.layout, montage=args.montage, notch=args.notch,
                blank_unit=args.blank_unit, workers=args.workers, channels=args.channels,
                seizure_labels=args.seizure_label, background_labels=args.background_label,
                replace=args.replace)
            return int(bool(report.refused) and not args.skip_bad)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    # disk full, a worker out of memory
    except (OSError, BrokenProcessPool, KeyboardInterrupt) as error:
        line = f"data.py: stopped: {' '.join(str(error).split()) or 'interrupted'}"
        if args.command == "import":
            line += "; the same command goes on from here"
        print(line, file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
