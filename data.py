"""EEG recordings for seizure detection: EDF in, one HDF5 file per recording out, training windows
at the speed of memory or of the disk.

    python data.py import SRC OUT [--montage referential|bipolar|reduced] ...       all: --help
    python data.py synth OUT [--hours H] [--patients N] [--seed S]
    python data.py info OUT [--speed]

SRC is a corpus, any folder of EDF files, or one EDF; without annotations a recording is imported as
unlabelled. The import is resumable: a finished recording is kept while its source files and the
settings of the preparation are the same. What cannot be read rightly is refused with one line and
the rest goes on: exit 1 when anything was refused (--skip-bad: 0), 2 for bad usage. Preparation:
eeg/edf.py; layouts: eeg/layouts.py; who trains and who validates: eeg/splits.py.

A window is one read (eeg/store.py). Threads read ahead of the training, so that a corpus may be
larger than memory and lie on a network; which thread reads what changes nothing in the batches.
"""
from eeg import console

if __name__ == "__main__":
    console.begin("data.py", "the command")     # the imports below take a second

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eeg import baseline, corpora, splits, store, synth
from eeg.augmentation import AUGMENTED, Augmenter
from eeg.disk import CHUNK, TemporaryFault, copy_folder, disk_bytes, file_state, file_system
from eeg.disk import holds
from eeg.edf import BLANK_UNITS, FS, MONTAGES, NOTCH, DataError
from eeg.splits import person, split_patients  # noqa: F401  (part of what data.py offers)
from eeg.store import whole_chunks

READERS = 16                            # threads; a sweep: bench/loader.py --sweep
SLOW_SHARE = 0.05                       # of the time; more of waiting for data is worth a word
TYPICAL_UV = 25.0                       # scalp EEG, referential or bipolar, between seizures
TYPICAL_SECONDS = 120.0                 # of EEG after which a recording's own amplitude counts more

Paths = str | os.PathLike | list        # data.path: a folder, or a list of them
Say = Callable[[str], object]           # print, or what a log does with a line


class ReadFailed(DataError):
    """A recording that could be opened before cannot be read now: a disk, a network or a hand."""


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
    notes: str = ""                     # what the import read otherwise than it is written
    unlabelled: str = ""                # why it has no labels
    patient_code: str = ""              # hash of what the EDF calls the patient, or ""
    source_fs: float = 0.0
    offset: int = 0                     # of the samples in the file, bytes
    state: tuple = ()                   # size and mtime_ns of the file when the corpus was opened
    began: str = ""                     # YYYY-MM-DD hh:mm:ss by the EDF's header, or ""
    release: str = ""                   # what the corpus said of its version at import
    skipped: int = 0                    # chunks of the file before the first sample, of a part
    corpus: str = ""                    # folder's name, in a run on several
    digest: str = ""                    # what header must still prove that the file is the index's
    gain: np.ndarray | None = field(default=None, init=False)       # log_gain, once it was asked

    @property
    def seconds(self) -> float:
        return self.samples / self.fs

    @functools.cached_property
    def spans(self) -> np.ndarray:
        """Events in samples: int64 (N, 2)."""
        return np.clip(np.rint(self.events * self.fs), 0, self.samples).astype(np.int64)

    @property
    def log_gain(self) -> np.ndarray:
        """What brings its baseline to the usual one: float32 (C, BANDS). Reads 10 min, once."""
        # a cached_property would have one lock, in which readers wait for all other recordings
        if self.gain is None:
            own = baseline.log_baseline(
                lambda start, n: self.read(start, n) * self.scale[:, None], self.samples)
            none = np.zeros((len(self.channels), len(baseline.MIDDLES)), np.float32)
            self.gain = none if own is None else baseline.log_gain(own, self.seconds)
        return self.gain

    def reference(self, share: float) -> tuple[float, np.ndarray]:
        """(uV that the EEG is divided by, log gain (C, BANDS) on its bands) for a detector that
        sees it relative to `share` of its own baseline, and else to its amplitude."""
        norm = self.norm ** (1 - share) * TYPICAL_UV ** share
        return norm, np.float32(share) * self.log_gain

    def read_chunks(self, start: int, n: int, out: np.ndarray) -> None:
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
            handle = os.open(self.path, os.O_RDONLY)    # open() doubles the time of a short read
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
        now = file_state(os.fstat(handle))
        if self.state and now != tuple(self.state):
            raise DataError(f"{self.path} was changed since the corpus was opened")
        expected = self.digest          # another reader may empty it meanwhile
        if expected:
            if store.digest(os.pread(handle, self.offset, 0)) != expected:
                raise DataError(f"{self.path} is not the recording that the index describes: "
                                "import it again")
            self.digest = ""            # once is enough: from now on its time would tell

    def read(self, start: int, n: int) -> np.ndarray:
        """int16 (C, n), zeros beyond the end; times scale it is uV."""
        skipped = start % CHUNK
        chunks = np.empty((whole_chunks(skipped + n), len(self.channels), CHUNK), np.int16)
        self.read_chunks(start, n, chunks)
        return chunks.transpose(1, 0, 2).reshape(len(self.channels), -1)[:, skipped:skipped + n]

    def labels(self, start: int, n: int) -> np.ndarray:
        """uint8 (n,): 1 inside a seizure."""
        out = np.zeros(n, np.uint8)
        for begin, end in (self.spans - start).tolist():
            out[max(0, begin):max(0, end)] = 1
        return out


def open_corpus(path: str | os.PathLike, whole: bool = True) -> list[Recording]:
    """All recordings below an imported folder, sorted by name, from its index and the sizes of the
    files. DataError for damaged or foreign files, or recordings that were prepared differently;
    TemporaryFault where the import into it has not finished (`whole` False: what there is)."""
    root = Path(path)
    if not root.is_dir():
        make = f"; {console.command('data.py', 'import', 'SRC', path)}"
        raise DataError(f"{path}: no such folder{console.elsewhere(path) or make}")
    if whole:
        corpora.check_finished(root)
    entries = store.entries(root).items()
    recordings = [_recording(f"{root}/{name}.h5", name, *entry) for name, entry in entries]
    if not recordings:
        corpora.check_finished(root)
        if holds(root, ".edf"):
            raise DataError(f"{path} holds EDF files that were not imported: run "
                            f"{console.command('data.py', 'import', path, 'OUT')}, and open OUT")
        refused = [f"; {file}: {why}" for file, why in corpora.read_report(root)[:3]]
        raise DataError(f"{path} holds no recording" + "".join(refused))
    _check_alike(path, recordings)
    return recordings


def open_corpora(paths: Paths, same_person: Sequence[str] = ()) -> list[Recording]:
    """The recordings of one imported folder, or of a list of them.

    Of a list, names and patients carry the folder's name, so that sub-01 of one corpus is not
    sub-01 of another. same_person: ["siena/PN00 = own/anna", ...], who is one all the same."""
    if not isinstance(paths, (list, tuple)):
        recordings = open_corpus(paths)
    else:
        names = [path.name for path in resolved(paths)]
        if len(set(names)) < len(names):
            raise DataError(f"data.path: two folders have one name among {', '.join(names)}: "
                            "rename one")
        recordings = []
        for path, name in zip(paths, names):
            for r in open_corpus(path):
                r.corpus = name
                r.name = f"{name}/{r.name}"
                r.patient = f"{name}/{r.patient}"
                recordings.append(r)
        _check_alike("data.path", recordings, "import each folder with the same options")
    join(recordings, same_person)
    return recordings


def copy_corpus(path: str | os.PathLike, folder: str | os.PathLike, say: Say = print,
                copied: Callable[[], object] = lambda: None) -> str:
    """Copy an imported folder below `folder`, on a faster disk; returns the copy's path."""
    root = Path(path).resolve()
    corpora.check_finished(root)
    states = {f"{name}.h5": state for name, (state, _) in store.entries(root).items()}
    return copy_folder(path, folder, states, say, copied)


def resolved(paths: Paths) -> list[Path]:
    """The folders of data.path, absolute."""
    folders = paths if isinstance(paths, list) else [paths]
    return [Path(path).resolve() for path in folders if path]


def split_of(recordings: list[Recording], path: str | os.PathLike | None, c: dict,
             seed: int) -> tuple:
    """(train, dev, what a state says of all that was divided) of the recordings in the folder
    `path`, as a run with the section `data` c divided them: one of several folders with the
    others."""
    place, same_person = Path(path).resolve() if path else Path(), c.get("same_person", ())
    several = isinstance(c.get("path"), list) and place in resolved(c["path"])
    if several:
        recordings = open_corpora(c["path"], same_person)
    else:
        join(recordings, same_person, skip=True)
    parts = splits.split(recordings, c, seed)
    mine = [[r for r in part if not several or r.corpus == place.name] for part in parts]
    return *mine, {"data": fingerprint(sum(parts, [])), "division": splits.division(*parts)}


def join(recordings: list[Recording], same_person: Sequence[str], skip: bool = False) -> None:
    """The patient before the = of a line, under each of its names, goes under the name behind it.
    skip: a line with a patient of another folder says nothing."""
    for line in same_person:
        names = [name.strip() for name in line.split("=")]
        known = sorted({r.patient for r in recordings})
        unknown = [name for name in names if name not in known]
        if unknown and skip:
            continue
        if len(names) != 2 or unknown:
            raise DataError(f"data.same_person {line!r}: write A = B with two patients of "
                            f"{', '.join(known[:20])}")
        for r in recordings:
            if person(r.patient) == person(names[0]):
                r.patient = names[1]


def _check_alike(path, recordings,
                 mend="import all of it again, and delete what has no EDF any more"):
    for kind in ("montage", "channels", "prepared"):
        found = {getattr(r, kind): r.name for r in recordings}
        if len(found) > 1:
            names = " and ".join(list(found.values())[:2])
            raise DataError(f"{path}: {kind} differs between {names}: {mend}")


def _recording(path, name, state, entry):
    fields = dict(entry)
    # the same size and time as the index says: nothing is left to prove
    if tuple(state) == (fields.pop("size"), fields.pop("mtime")):
        fields["digest"] = ""
    fields["channels"] = tuple(fields["channels"])
    fields["scale"] = np.array(fields["scale"], np.float32)
    fields["events"] = np.array(fields["events"], np.float64).reshape(-1, 2)
    fields["norm"] = reference_amplitude(fields["norm"], fields["samples"] / fields["fs"])
    return Recording(path=path, name=name, state=tuple(state), **fields)


def reference_amplitude(typical: float, seconds: float) -> float:
    """uV that a recording is divided by: its own typical amplitude, drawn in its logarithm towards
    TYPICAL_UV as a prior that weighs as much as TYPICAL_SECONDS of EEG (shrinkage, James and Stein
    1961).

    A clip of 10 s out of a seizure has no background to be measured by: divided by its own
    amplitude it would look as small as a quiet one."""
    own = seconds / (seconds + TYPICAL_SECONDS)
    return float(np.exp(own * np.log(typical) + (1 - own) * np.log(TYPICAL_UV)))


def fingerprint(recordings: list[Recording]) -> str:
    """Hash over what must not change within a run: names, lengths, preparation, events, montage."""
    digest = hashlib.sha256()
    for r in sorted(recordings, key=lambda r: r.name):
        facts = [r.name, r.samples, r.prepared, r.montage, r.labelled, r.events.tolist()]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


# ---- windows ----

class Windows:
    """(recording, start) pairs over `recordings`, never stored: arrays recording int32, start int64
    (samples) and kind uint8 (0 background, 1 partly seizure, 2 wholly seizure). A recording shorter
    than a window gives one, padded; a last window covers the tail."""

    def __init__(self, recordings: list[Recording], seconds: float = 60.0,
                 stride: float = 10.0) -> None:
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
        numbers = np.arange(len(starts), dtype=np.int32)
        self.recording = np.repeat(numbers, list(map(len, starts)))
        self.start = np.concatenate(starts)
        self.kind = np.concatenate([self._kinds(r, s) for r, s in zip(self.recordings, starts)])
        self._orders: dict[tuple, np.ndarray] = {}

    def __len__(self):
        return len(self.start)

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

    def epoch(self, seed: int, epoch: int, full: float = 0.3, background: float | None = 2.5,
              balance: str = "own") -> np.ndarray:
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
            if balance == "equal":
                # those that come once more than others are other ones in the next epoch
                ids = _turn(ids, epoch, most)
            drawn.append(ids)
            for kind, key, ratio in ((2, "full", full), (0, "background", background)):
                count = self._count(kind, f"{key}_per_partial", ratio, len(ids))
                drawn.append(_turn(self._order(seed, kind, balance, group), epoch, count))
        return rng.permutation(np.concatenate(drawn))

    def _groups(self, balance):
        """Masks (N,) of the windows among which proportions are kept."""
        corpus = np.array([r.corpus for r in self.recordings])[self.recording]
        if balance == "pooled":
            return [np.ones(len(self), bool)]
        return [corpus == name for name in np.unique(corpus)]

    def _count(self, kind, key, ratio, partial):
        """How many windows of a kind go with so many partial ones."""
        if not (np.isfinite(ratio) and ratio >= 0):
            raise DataError(f"data.{key} is {ratio}: a ratio of 0 or more is needed")
        count = round(ratio * partial)
        if count and not (self.kind == kind).any():
            what = "contains no seizure" if kind == 0 else "lies wholly inside a seizure"
            raise DataError(f"no window {what}, {count} are asked for: "
                            f"set data.{key}: 0, or other data.window_seconds")
        return count

    def _order(self, *key):
        """The windows of a kind in a group of `balance`, in the random order of a seed."""
        if key not in self._orders:
            seed, kind, balance, group = key
            ids = np.flatnonzero(self._groups(balance)[group] & (self.kind == kind))
            # a lone corpus draws as it did before there were several
            keys = [seed, kind, 2, group] if group else [seed, kind, 2]
            self._orders[key] = np.random.default_rng(keys).permutation(ids)
        return self._orders[key]


def _turn(order, epoch, count):
    """The next `count` windows of an order that is gone through from epoch to epoch; none of an
    empty one: a corpus of several may lack a kind."""
    return order[(epoch * count + np.arange(count)) % len(order)] if len(order) else order


# ---- loader ----

def factor(scale: Any, norm: Any) -> Any:
    """uV per unit (..., C), typical uV (...) -> (..., C, 1) that makes int16 about 1 in size."""
    return (scale / norm.unsqueeze(-1)).unsqueeze(-1)


def normalise(eeg: Any, scale: Any, norm: Any) -> Any:
    """int16 tensor (..., C, T) -> float32, about 1 in size; scale and norm as of factor()."""
    return eeg * factor(scale, norm)


@dataclass
class Slot:
    """Room for one batch in the ring."""
    tensors: dict                       # see Loader._slots
    copied: Any = None                  # CUDA event after which the room may be written again

    def __post_init__(self):
        self.arrays = {key: tensor.numpy() for key, tensor in self.tensors.items()}


class Loader:
    """Batches of a Windows object. `readers` threads copy whole windows, in the order of the plan
    and ahead by `buffers` batches, into a ring of int16 buffers (pinned for CUDA); they are put in
    order of channels and scaled on the device. Needs no worker processes: they would copy every
    batch once more. baseline: share of each recording's own that its EEG is divided by, see
    Recording.reference().

    waited, lasted: seconds that the consumer has waited for batches, of so many; reading, read:
    seconds that the readers took, for so many windows."""

    def __init__(self, windows: Windows, device: Any = "cpu", seed: int = 0,
                 augment: bool | Sequence[str] = False, buffers: int = 4,
                 readers: int = READERS, baseline: float = 0.0) -> None:
        # in this class alone: import workers and commands start in a third of the time
        import torch
        self.device = torch.device(device)
        self.windows = windows
        self.seed = seed
        self.buffers = buffers
        self.readers = readers
        self.baseline = baseline
        self.waited = 0.0
        self.lasted = 0.0
        self.reading = 0.0
        self.read = 0
        self.said = 0.0, 0.0            # waited and lasted at the last share()
        names = AUGMENTED if augment is True else augment or ()
        self.augmenter = Augmenter(names, windows.recordings[0].channels)
        self._ring: list[Slot] = []

    def batches(self, lists_of_ids: Iterable, epoch: int) -> Iterator:
        """Yield (x (B, C, T), y (B, T), mask (B, T)), float32 on the device, for each list of
        window ids, in order; None for an empty one. mask is 0 on padding. Close it: threads end."""
        lists = [np.asarray(ids, np.int64) for ids in lists_of_ids]
        ring = self._slots(max(map(len, lists), default=0))
        pool = ThreadPoolExecutor(self.readers, "reader")
        begun: collections.deque = collections.deque()

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
        channels = len(self.windows.recordings[0].channels)
        # of a file, the most that a window touches
        chunks = int(whole_chunks(self.windows.start % CHUNK + self.windows.length).max())
        shapes = {
            "eeg": ((size, chunks, channels, CHUNK), torch.int16),
            "y": ((size, self.windows.length), torch.uint8),
            "real": ((size,), torch.int64),
            "scale": ((size, channels), torch.float32),
            "norm": ((size,), torch.float32),
            "start": ((size,), torch.int64),
        }
        if self.baseline:
            shapes["log_gain"] = (size, channels, len(baseline.MIDDLES)), torch.float32
        for kind, width in self.augmenter.widths.items():
            shapes[kind] = (size, width), torch.float32
        pin = self.device.type == "cuda"
        return [Slot({key: torch.zeros(shape, dtype=kind, pin_memory=pin)
                      for key, (shape, kind) in shapes.items()}) for _ in range(self.buffers)]

    def _fill(self, slot, place, window, epoch):
        """In a reader: one window into its place; seconds that it took to read."""
        recording = self.windows.recordings[self.windows.recording[window]]
        start = int(self.windows.start[window])
        host = slot.arrays
        # the GPU may still be copying the batch before out of this slot
        if slot.copied is not None:
            import torch
            # a thread begins on the first GPU: from there the wait alone would take memory of it
            with torch.cuda.device(slot.copied.device):
                slot.copied.synchronize()
        began = time.perf_counter()
        recording.read_chunks(start, self.windows.length, host["eeg"][place])
        took = time.perf_counter() - began
        host["start"][place] = start % CHUNK
        host["real"][place] = min(self.windows.length, recording.samples - start)
        host["y"][place] = recording.labels(start, self.windows.length)
        host["scale"][place] = recording.scale
        host["norm"][place] = recording.norm
        if self.baseline:
            host["norm"][place], host["log_gain"][place] = recording.reference(self.baseline)
        for kind, numbers in self.augmenter.draw(self.seed, epoch, window).items():
            host[kind][place] = numbers
        return took

    def _wait(self, fills, last):
        """Until a batch is read; raises what its reading raised. Returns the time: next `last`."""
        began = time.perf_counter()
        for fill in fills:
            self.reading += fill.result()
        now = time.perf_counter()
        self.waited += now - began
        self.lasted += now - last
        self.read += len(fills)
        return now

    def share(self) -> float:
        """Share of the time since the last call that the consumer waited for batches."""
        waited = self.waited - self.said[0]
        lasted = self.lasted - self.said[1]
        self.said = self.waited, self.lasted
        return waited / lasted if lasted else 0.0

    def advice(self, share: float) -> str:
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
        length = self.windows.length
        channels = t["eeg"].shape[2]
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
        if self.baseline:
            # a filter rings on into the padding, which stays 0
            x = baseline.equalise(x, t["log_gain"]).mul_(mask[:, None])
        return self.augmenter.apply(x, mask.float(), draws), t["y"].float(), mask.float()

    def _copied(self):
        """A CUDA event after the copies under way; None on the CPU, where they are done."""
        if self.device.type != "cuda":
            return None
        import torch
        return torch.cuda.current_stream(self.device).record_event()


def read_ahead(windows: Iterable[tuple[Recording, int]], n: int, depth: int = 32,
               readers: int = READERS) -> Iterator[np.ndarray]:
    """Yield int16 (C, n) of each (recording, start) of `windows` in turn, up to `depth` of them
    read ahead by threads. For inference, where windows come in the order of time."""
    pool = ThreadPoolExecutor(readers, "reader")
    begun: collections.deque = collections.deque()
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

def speed(path: str | os.PathLike, seconds: float = 10.0, say: Say = print) -> float:
    """Measure how fast windows of 60 s are read from an imported folder in random order: from the
    disk, each once, and again from memory. Returns windows/s from the disk."""
    recordings = open_corpus(path, whole=False)
    length = 60 * FS
    places = [(r, start) for r in recordings
              for start in range(0, max(1, r.samples - length), length)]
    random.shuffle(places)
    for r in recordings:
        with open(r.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    say(f"{path} on {file_system(path)}, {READERS} readers, windows of 60 s in random order")
    count, cold, ratio = _rate(places, length, 0.6 * seconds)
    from_disk = (f"{ratio:.2f} bytes from the disk per byte used" if ratio
                 else "this disk's reads are not counted")
    say(f"  cold: {cold:,.0f} windows/s ({count} windows), {from_disk}")
    count, rate, _ = _rate(itertools.cycle(places[:min(count, 1000)]), length, 0.3 * seconds)
    say(f"  warm: {rate:,.0f} windows/s")
    return cold


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


def info(path: str | os.PathLike, say: Say = print) -> None:
    """What an imported folder holds."""
    recordings = open_corpus(path, whole=False)
    labelled = [r for r in recordings if r.labelled]
    say(f"{path}: {splits.size(recordings)}, montage {recordings[0].montage}, {FS} Hz, "
        f"prepared {recordings[0].prepared}")
    try:
        corpora.check_finished(Path(path))
    except TemporaryFault as fault:
        say(f"  NOT WHOLE: {fault}")
    for release in sorted({r.release for r in recordings if r.release}):
        of_it = sum(r.release == release for r in recordings)
        say(f"  {release}: {console.how_many(of_it, 'recording')}")
    for split in sorted({r.split for r in recordings}):
        part = [r for r in recordings if r.split == split]
        inside = sum(float(np.diff(r.events).sum()) for r in part)
        known = f", {console.hours(inside)} of them" if any(r.labelled for r in part) else ""
        say(f"  {split or 'no split':8} {splits.size(part, ', ')}, {splits.seizures(part)}{known}")
    for name in splits.patients(recordings):
        mine = [r for r in recordings if person(r.patient) == name]
        say(f"    {name}: {splits.hours(mine)}, {splits.seizures(mine)}")
    rates = [f"{r.source_fs:g}" for r in recordings]
    counted = [f"{rate} Hz x {rates.count(rate)}" for rate in sorted(set(rates), key=float)]
    say("  source rates: " + ", ".join(counted))
    say(f"  shorter than 60 s: {sum(r.seconds < 60 for r in recordings)}, without labels: "
        f"{len(recordings) - len(labelled)}, with notes: {sum(bool(r.notes) for r in recordings)}")
    if labelled:
        none, partial, full = counts = np.bincount(Windows(labelled).kind, minlength=3)
        say(f"  windows of 60 s every 10 s, the defaults: {none} background, {partial} partial, "
            f"{full} full ({console.rounded(100 * (partial + full) / counts.sum(), '.1f')} % "
            "with seizure)")
    noted = corpora.grouped((r.name, r.notes) for r in recordings if r.notes)
    refused = corpora.read_report(path)
    for line in (*(f"note {line}" for line in noted),
                 *splits.no_labels((r.name, r.unlabelled) for r in recordings if not r.labelled),
                 *splits.contradictions((r.patient, r.patient_code, r.name) for r in recordings),
                 *splits.twins((r.name, r.samples, r.norm, r.scale) for r in recordings),
                 *(f"hint: {hint}" for hint in corpora.told_alone(corpora.labels_alone(path))),
                 f"refused: {len(refused)}", *(f"  {file}: {why}" for file, why in refused)):
        say(f"  {line}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="EDF to HDF5, synthetic EDF, what a folder holds.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("import", help="EDF files to one HDF5 file per recording")
    add = p.add_argument
    add("src", type=console.typed, help="corpus folder, any folder of EDF files, or one EDF")
    add("out", type=console.typed, help="folder of the recordings, new or of the same preparation")
    add("--layout", choices=("auto", *corpora.LAYOUTS), default="auto",
        help="corpus; auto tells it by the names of the files")
    add("--montage", choices=MONTAGES, default="referential",
        help="19 electrodes (default), 18 double-banana derivations, or what --channels names")
    add("--channels", type=corpora.channel_names, default=(), metavar="F7-T3,...",
        help="of --montage reduced: electrodes, pairs of them, or labels of the EDF; "
             "| between alternatives, the best first")
    add("--notch", choices=sorted(NOTCH, reverse=True), default="both",
        help="mains to take out, Hz; default both")
    add("--blank-unit", choices=BLANK_UNITS, default="", help="unit where the EDF names none")
    add("--seizure-label", action="append", default=[], metavar="TEXT",
        help="annotation of a seizure; START..END for a pair; may be repeated")
    add("--background-label", action="append", default=[], metavar="TEXT",
        help="annotation of a recording that was read and holds no other seizure")
    add("--rename", metavar="FILE",
        help="two columns: label in the EDF, electrode; for channels of other names")
    add("--replace", action="store_true", help="make recordings of another preparation anew")
    add("--workers", type=int, default=0, help="processes (0: one per core)")
    add("--skip-bad", action="store_true", help="exit 0 although files were refused")
    p = commands.add_parser("synth", help="synthetic EDF recordings in BIDS / SzCORE layout")
    p.add_argument("out", type=console.typed, help="a new folder")
    p.add_argument("--hours", type=float, default=1.0, help="in all; default 1")
    p.add_argument("--patients", type=int, default=8, help="default 8")
    p.add_argument("--seed", type=int, default=0, help="default 0")
    p = commands.add_parser("info", help="hours, patients, seizures, balance, refusals")
    p.add_argument("out", type=console.typed, help="folder that an import wrote")
    p.add_argument("--speed", action="store_true",
                   help="measure for 10 s how fast windows are read")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    console.take_descriptors()
    if args.command != "info":          # what it says is all that it does
        console.install()
    try:
        return _run(args)
    except (DataError, TemporaryFault) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, DataError) else error.code
    # disk full, a worker out of memory
    except (OSError, BrokenProcessPool, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and args.command == "info":
            # nobody reads on, as in `info | head`: nor does the interpreter's last flush complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        line = f"data.py: stopped: {' '.join(str(error).split()) or 'interrupted'}"
        if args.command == "import":
            line += "; the same command goes on from here"
        print(line, file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


def _run(args):
    """The exit code of a command."""
    if args.command == "synth":
        synth.synth(args.out, args.hours, args.patients, args.seed)
        print(f"{console.how_many(args.patients, 'patient')}, {args.hours:g} h, in {args.out}; "
              f"next: {console.command('data.py', 'import', args.out, 'OUT')}")
    elif args.command == "info":
        info(args.out)
        if args.speed:
            speed(args.out)
        print(end="", flush=True)
    else:
        report = corpora.import_corpus(
            args.src, args.out, layout=args.layout, montage=args.montage, notch=args.notch,
            blank_unit=args.blank_unit, workers=args.workers, channels=args.channels,
            seizure_labels=args.seizure_label, background_labels=args.background_label,
            replace=args.replace, renames=args.rename)
        return int(bool(report.refused) and not args.skip_bad)
    return 0


if __name__ == "__main__":
    console.begun()
    sys.exit(main())
