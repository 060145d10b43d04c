"""EEG recordings for seizure detection: EDF in, one HDF5 file per recording out, training windows at the
speed of memory.

    python data.py import SRC OUT [--layout auto|tuh|chbmit|siena|bids|seizeit]
                                   [--montage referential|bipolar] [--notch both|50|60|0] [--skip-bad]
    python data.py synth OUT [--hours H] [--patients N] [--seed S]
    python data.py info OUT

SRC is a corpus, any folder of EDF files, or one EDF; without annotations a recording is imported as
unlabelled. The import is resumable: a finished recording is kept while its source files and the settings of
the preparation are the same. What cannot be read rightly is refused with one line and the rest goes on:
exit 1 when anything was refused (--skip-bad: 0), 2 for bad usage. Preparation: edf.py; layouts: corpora.py.
"""
import argparse
import functools
import hashlib
import json
import os
import queue
import resource
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import corpora
from edf import CHANNELS, FS, NOTCH, DataError, Settings
import synth

SAME_PERSON = {"chb21": "chb01"}        # CHB-MIT recorded one patient twice, 1.5 years apart


# ---- recordings ----

@dataclass
class Recording:
    """One imported recording. Holds no open file: the samples are mapped when they are first read, in each
    process."""
    path: str
    name: str                           # below the corpus folder, without .h5
    patient: str
    split: str                          # train, dev, eval or ""
    montage: str
    channels: tuple
    fs: int
    samples: int
    scale: np.ndarray                   # float32 (C,), uV per unit
    norm: float                         # uV, typical amplitude of the whole recording
    labelled: bool
    events: np.ndarray                  # float64 (N, 2), s
    prepared: str
    repaired: str = ""
    source_fs: float = 0.0
    offset: int = 0                     # of the samples in the file, bytes
    state: tuple = ()                   # size and mtime_ns of the file when the corpus was opened
    # the samples themselves, of a recording without a file
    memory: np.ndarray | None = field(default=None, repr=False)

    @property
    def seconds(self):
        return self.samples / self.fs

    @functools.cached_property
    def spans(self):
        """Events in samples: int64 (N, 2)."""
        return np.clip(np.rint(self.events * self.fs), 0, self.samples).astype(np.int64)

    def view(self):
        """All samples, int16 (C, T), read-only, without copying."""
        if self.memory is not None:
            return self.memory
        return mapped(self.path, self.offset, (len(self.channels), self.samples), self.state)

    def read_into(self, start, out):
        """Samples from `start` into `out` int16 (C, n), zeros beyond the end; returns how many are real."""
        if start < 0:
            raise ValueError(f"{self.name}: start {start} is before the recording")
        real = max(0, min(out.shape[1], self.samples - start))
        out[:, :real] = self.view()[:, start:start + real]
        out[:, real:] = 0
        return real

    def read(self, start, n):
        """int16 (C, n), zeros beyond the end; times scale it is uV."""
        out = np.empty((len(self.channels), n), np.int16)
        self.read_into(start, out)
        return out

    def labels(self, start, n):
        """uint8 (n,): 1 inside a seizure."""
        out = np.zeros(n, np.uint8)
        for begin, end in (self.spans - start).tolist():
            out[max(0, begin):max(0, end)] = 1
        return out


# Every map holds a file descriptor: all recordings stay mapped where `ulimit -n` allows, else the last used
# half of it.
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@functools.lru_cache(32_000 if OPEN_FILES < 0 else min(32_000, OPEN_FILES // 2))
def mapped(path, offset, shape, state):
    """Read-only view of a recording's samples in the page cache."""
    try:
        now = os.stat(path)
        if state and (now.st_size, now.st_mtime_ns) != tuple(state):
            raise DataError(f"{path} was changed since the corpus was opened")
        return np.asarray(np.memmap(path, "<i2", "r", offset, shape))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def open_corpus(path):
    """All recordings below an imported folder, sorted by name. What was read of unchanged files (size and
    mtime) comes from an index beside them. DataError for damaged or foreign files, or recordings that were
    prepared differently."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{path}: no such folder; python data.py import SRC {path}")
    entries = corpora.entries(root).items()
    recordings = [_recording(f"{root}/{name}.h5", name, *entry) for name, entry in entries]
    if not recordings:
        raise DataError(f"{path} holds no recording"
                        + "".join(f"; {f}: {why}" for f, why in corpora.read_report(root)[:3]))
    for kind in ("montage", "channels", "prepared"):
        found = {getattr(r, kind): r.name for r in recordings}
        if len(found) > 1:
            names = " and ".join(list(found.values())[:2])
            raise DataError(f"{path}: {kind} differs between {names}: import all of it again, and delete what "
                            "has no EDF any more")
    return recordings


def _recording(path, name, state, entry):
    e = dict(entry)
    e["channels"], e["scale"] = tuple(e["channels"]), np.array(e["scale"], np.float32)
    e["events"] = np.array(e["events"], np.float64).reshape(-1, 2)
    return Recording(path=path, name=name, state=tuple(state), **e)


def prepare(path, montage="referential", **settings):
    """One EDF as an unlabelled Recording in memory, prepared exactly as an import would. DataError names
    file and reason."""
    source = corpora.Source(Path(path), Path(path).stem, "", Path(path).stem.split("_")[0], "", None)
    settings = Settings(montage, **settings)
    try:
        p, _, events = corpora.prepare_source(source, settings)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return Recording(str(path), source.name, source.patient, "", montage, CHANNELS[montage], FS,
                     p.eeg.shape[1], p.scale,
                     p.norm, False, events, settings.hash, "; ".join(p.header.notes), p.rate, memory=p.eeg)


def fingerprint(recordings):
    """Hash over what must not change within a run: names, lengths, preparation, events, montage."""
    digest = hashlib.sha256()
    for r in sorted(recordings, key=lambda r: r.name):
        digest.update(json.dumps([r.name, r.samples, r.prepared, r.montage, r.labelled,
                                  r.events.tolist()]).encode())
    return digest.hexdigest()


def person(patient):
    return SAME_PERSON.get(patient, patient)


def split_patients(recordings, dev_patients=(), dev_fraction=0.2, seed=0):
    """(train, dev), no person in both, unlabelled recordings and a corpus's own eval split in neither.

    dev is `dev_patients` where given, else the corpus's own train and dev, else a draw of `dev_fraction` of
    the patients, with seizures on both sides where two patients have any. chb21 is chb01."""
    usable = [r for r in recordings if r.labelled and r.split != "eval"]
    people = sorted({person(r.patient) for r in usable})
    wanted = {person(p) for p in dev_patients}
    if wanted - set(people):
        raise DataError(f"dev patients {', '.join(sorted(wanted - set(people)))} are not among the labelled "
                        f"patients: {', '.join(people[:20])}")
    if wanted:
        dev = wanted
    elif {"train", "dev"} <= {r.split for r in usable}:
        usable = [r for r in usable if r.split]
        dev = {person(r.patient) for r in usable if r.split == "dev"}
        both = dev & {person(r.patient) for r in usable if r.split == "train"}
        if both:
            raise DataError(f"patients in both train and dev: {', '.join(sorted(both))}")
    else:
        dev = _draw(usable, people, dev_fraction, seed)
    train = [r for r in usable if person(r.patient) not in dev]
    dev = [r for r in usable if person(r.patient) in dev]
    if not train or not dev:
        raise DataError(f"{len(people)} labelled patients, {len(train)} recordings for training, "
                        f"{len(dev)} for validation: both are needed, of different patients")
    return train, dev


def _draw(usable, people, fraction, seed):
    """A share of the patients with seizures and of those without, at least one with."""
    ill = {person(r.patient) for r in usable if len(r.events)}
    rng, dev = np.random.default_rng([seed, 20]), set()
    for group in ([p for p in people if p in ill], [p for p in people if p not in ill]):
        count = round(fraction * len(group))
        if len(group) > 1 and not dev:
            count = min(max(1, count), len(group) - 1)
        dev |= {group[i] for i in rng.permutation(len(group))[:count]}
    if not dev:                         # a lone patient with seizures is for training
        rest = [p for p in people if p not in ill] or people
        dev = {rest[rng.integers(len(rest))]} if len(people) > 1 else set()
    return dev


# ---- windows ----

class Windows:
    """(recording, start) pairs over `recordings`, never stored: arrays recording int32, start int64
    (samples) and kind uint8 (0 background, 1 partly seizure, 2 wholly seizure). A recording shorter than a
    window gives one, padded; a last window covers the tail."""

    def __init__(self, recordings, seconds=60.0, stride=10.0):
        unlabelled = [r.name for r in recordings if not r.labelled]
        if unlabelled or not recordings:
            what = f"{unlabelled[0]} is not" if unlabelled else "there are none"
            raise DataError(f"windows need labelled recordings: {what}")
        self.recordings = list(recordings)
        self.length, step = round(seconds * FS), round(stride * FS)
        if self.length < 1 or step < 1:
            raise DataError(f"windows of {seconds} s every {stride} s: both must be at least {1 / FS:.4f} s")
        starts = [self._starts(r.samples, step) for r in self.recordings]
        self.recording = np.repeat(np.arange(len(starts), dtype=np.int32), [len(s) for s in starts])
        self.start = np.concatenate(starts)
        self.kind = np.concatenate([self._kinds(r, s) for r, s in zip(self.recordings, starts)])
        self._walks = {}

    def __len__(self):
        return len(self.start)

    def _starts(self, samples, step):
        last = max(0, samples - self.length)
        starts = np.arange(0, last + 1, step, dtype=np.int64)
        return starts if starts[-1] == last else np.append(starts, last)

    def _kinds(self, recording, starts):
        ends, inside = np.minimum(starts + self.length, recording.samples), np.zeros(len(starts), np.int64)
        for begin, end in recording.spans:
            inside += np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None)
        return (inside > 0).astype(np.uint8) + (inside == ends - starts)

    def epoch(self, seed, epoch, full=0.3, background=2.5):
        """Window ids (int64) of one epoch in training order: a pure function of (seed, epoch).

        All partial windows, and per partial window `full` wholly seizure and `background` windows (the
        proportions of SeizureTransformer, Wu et al. 2025). Those two are walked through in a fixed random
        order that goes on from epoch to epoch, so that each of them comes up in time. background=None:
        every window once."""
        if background is None:
            ids = np.arange(len(self))
        else:
            partial = np.flatnonzero(self.kind == 1)
            if not len(partial):
                raise DataError(f"none of {len(self)} windows contains a seizure's onset or end: balanced "
                                "sampling needs some; train on such recordings, or set data.balanced: false")
            full = self._walk(2, "full_per_partial", full, len(partial), seed, epoch)
            background = self._walk(0, "background_per_partial", background, len(partial), seed, epoch)
            ids = np.concatenate([partial, full, background])
        return np.random.default_rng([seed, epoch, 1]).permutation(ids)

    def _walk(self, kind, key, ratio, partial, seed, epoch):
        """The next round(ratio * partial) windows of a kind."""
        if not (np.isfinite(ratio) and ratio >= 0):
            raise DataError(f"data.{key} is {ratio}: a ratio of 0 or more is needed")
        count = round(ratio * partial)
        if (seed, kind) not in self._walks:
            ids = np.flatnonzero(self.kind == kind)
            self._walks[seed, kind] = np.random.default_rng([seed, kind, 2]).permutation(ids)
        order = self._walks[seed, kind]
        if count and not len(order):
            what = ("lies wholly inside a seizure", "contains no seizure")[kind == 0]
            raise DataError(f"no window {what}, {count} are asked for: "
                            f"set data.{key}: 0, or other data.window_seconds")
        return order[(epoch * count + np.arange(count)) % max(1, len(order))]


def normalise(eeg, scale, norm, out=None):
    """int16 tensor (..., C, T), uV per unit (..., C), typical amplitude in uV (...) -> float32 (..., C, T),
    about 1 in size."""
    factor = (scale / norm.unsqueeze(-1)).unsqueeze(-1)
    return eeg * factor if out is None else out.copy_(eeg).mul_(factor)


class Loader:
    """Batches of a Windows object, copied by a background thread into a ring of int16 buffers (pinned for
    CUDA) and scaled on the device. `waited`: seconds that the consumer has waited for them. Needs no worker
    processes: they would copy every batch once more."""

    def __init__(self, windows, device="cpu", seed=0, augment=False, buffers=4):
        # in this class alone: import workers and commands start in a third of the time
        import torch
        self.device = torch.device(device)
        self.windows, self.seed, self.augment, self.buffers = windows, seed, augment, buffers
        self.waited = 0.0
        self.scale = np.stack([r.scale for r in windows.recordings])
        self.norm = np.array([r.norm for r in windows.recordings], np.float32)
        self.mirror = mirror(windows.recordings[0].channels)
        self._ring, self._emptied, self._outputs, self._idle = [], None, [], [np.empty(0)]

    def batches(self, lists_of_ids, epoch):
        """Yield (x float32 (B, C, T), y float32 (B, T), mask float32 (B, T)) on the device for each list of
        window ids, in order; None for an empty list. mask is 0 on padding. Closing the iterator early ends
        its thread."""
        lists = [np.asarray(ids, np.int64) for ids in lists_of_ids]
        slots = self._slots(max(map(len, lists), default=0))
        free, full, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        for slot in slots:
            free.put((slot, self._emptied))
        thread = threading.Thread(target=self._fill, args=(lists, epoch, free, full, stop), daemon=True)
        thread.start()
        try:
            for ids in lists:
                began = time.perf_counter()
                slot = full.get()
                self.waited += time.perf_counter() - began
                if isinstance(slot, BaseException):
                    raise slot
                batch = [self._to_device(slot, len(ids)) if len(ids) else None]
                free.put((slot, self._copied()))
                # keeps no reference: its memory is used again once the consumer lets go of it
                yield batch.pop()
        finally:
            stop.set()
            free.put((None, None))
            thread.join()
            # the next call fills this ring, but not before the GPU has copied the last batches out of it
            self._ring, self._emptied = slots, self._copied()

    def _slots(self, size):
        """The ring: `buffers` sets of arrays for `size` windows, taken from the last call where they fit."""
        ring, self._ring = self._ring, []
        if ring and len(ring[0]["eeg"]) >= size:
            return ring
        import torch
        pin = self.device.type == "cuda"
        channels, length = self.scale.shape[1], self.windows.length
        shapes = {"eeg": ((size, channels, length), torch.int16), "y": ((size, length), torch.uint8),
                  "real": ((size,), torch.int64), "scale": ((size, channels), torch.float32),
                  "norm": ((size,), torch.float32)}
        return [{key: torch.zeros(shape, dtype=kind, pin_memory=pin) for key, (shape, kind) in shapes.items()}
                for _ in range(self.buffers)]

    def _fill(self, lists, epoch, free, full, stop):
        """The background thread: waits for a free slot and, on CUDA, for the end of the copy out of it."""
        try:
            for ids in lists:
                slot, copied = free.get()
                if stop.is_set():
                    return
                if copied is not None:
                    copied.synchronize()
                host = {key: tensor.numpy() for key, tensor in slot.items()}
                for i, window in enumerate(ids):
                    self._fill_window(host, i, int(window), epoch)
                    if stop.is_set():
                        return
                full.put(slot)
        except BaseException as error:  # raised again where the batches are consumed
            full.put(error)

    def _fill_window(self, host, i, window, epoch):
        which, start = self.windows.recording[window], int(self.windows.start[window])
        recording = self.windows.recordings[which]
        host["real"][i] = recording.read_into(start, host["eeg"][i])
        host["y"][i] = recording.labels(start, self.windows.length)
        host["scale"][i], host["norm"][i] = self.scale[which], self.norm[which]
        if self.augment:                # a gain of about +-20 % and, for one in two, left and right changed
            rng = np.random.default_rng([self.seed, epoch, window, 3])
            host["scale"][i] *= np.float32(np.exp(rng.normal(0, 0.2)))
            if rng.random() < 0.5:
                host["eeg"][i], host["scale"][i] = host["eeg"][i][self.mirror], host["scale"][i][self.mirror]

    def _to_device(self, slot, count):
        import torch
        t = {key: value[:count].to(self.device, non_blocking=True) for key, value in slot.items()}
        x, y, mask = self._output(count)
        normalise(t["eeg"], t["scale"], t["norm"], x)
        place = torch.arange(self.windows.length, device=self.device)
        return x, y.copy_(t["y"]), torch.lt(place, t["real"][:, None], out=mask)

    def _output(self, count):
        """Memory for x, y and mask. On the CPU that of a batch which nobody holds any more: mapping 10 MB
        anew costs ten times the scaling. A NumPy array counts every tensor and view made of it, those that
        autograd keeps too."""
        import torch
        channels, length = self.scale.shape[1], self.windows.length
        size = count * (channels + 2) * length
        if self.device.type != "cpu":
            flat = torch.empty(size, device=self.device)
        else:
            unused = sys.getrefcount(self._idle[0])
            k = next((k for k in range(len(self._outputs)) if self._outputs[k].size >= size
                      and sys.getrefcount(self._outputs[k]) == unused), None)
            if k is None:
                k = len(self._outputs)
                self._outputs.append(np.empty(size, np.float32))
            flat = torch.from_numpy(self._outputs[k])[:size]
        x, y, mask = flat.split([count * channels * length, count * length, count * length])
        return x.view(count, channels, length), y.view(count, length), mask.view(count, length)

    def _copied(self):
        """A CUDA event after the copies that are under way; None on the CPU, where they are done."""
        if self.device.type != "cuda":
            return None
        import torch
        event = torch.cuda.Event()
        event.record()
        return event


def mirror(channels):
    """Index of each channel's left-right counterpart: int64 (C,)."""
    swap = dict(zip("Fp1 F3 C3 P3 O1 F7 T3 T5".split(), "Fp2 F4 C4 P4 O2 F8 T4 T6".split()))
    swap |= {right: left for left, right in swap.items()}
    other = ["-".join(swap.get(part, part) for part in name.split("-")) for name in channels]
    return np.array([list(channels).index(name) for name in other])


# ---- command line ----

def info(path, say=print):
    """What an imported folder holds."""
    recordings = open_corpus(path)
    labelled = [r for r in recordings if r.labelled]
    say(f"{path}: {len(recordings)} recordings of {len({person(r.patient) for r in recordings})} patients, "
        f"{sum(r.seconds for r in recordings) / 3600:.2f} h, montage {recordings[0].montage}, {FS} Hz, "
        f"prepared {recordings[0].prepared}")
    for split in sorted({r.split for r in recordings}):
        part = [r for r in recordings if r.split == split]
        say(f"  {split or 'no split':8} {len(part)} recordings, "
            f"{len({person(r.patient) for r in part})} patients, "
            f"{sum(r.seconds for r in part) / 3600:.2f} h, {sum(len(r.events) for r in part)} seizures, "
            f"{sum(float((r.events[:, 1] - r.events[:, 0]).sum()) for r in part) / 3600:.3f} h of them")
    rates = [f"{r.source_fs:g}" for r in recordings]
    say("  source rates: " + ", ".join(f"{rate} Hz x {rates.count(rate)}"
                                       for rate in sorted(set(rates), key=float)))
    say(f"  shorter than 60 s: {sum(r.seconds < 60 for r in recordings)}, without annotations: "
        f"{len(recordings) - len(labelled)}, repaired: {sum(bool(r.repaired) for r in recordings)}")
    if labelled:
        w = Windows(labelled)
        counts = np.bincount(w.kind, minlength=3)
        say(f"  windows of 60 s every 10 s: {counts[0]} background, {counts[1]} partial, {counts[2]} full "
            f"({100 * (counts[1] + counts[2]) / len(w):.1f} % with seizure)")
    refused = corpora.read_report(path)
    say(f"  refused: {len(refused)}")
    for file, why in refused:
        say(f"    {file}: {why}")


def arguments():
    parser = argparse.ArgumentParser(description="EDF to HDF5, synthetic EDF, what a folder holds.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("import", help="EDF files and their annotations to one HDF5 file per recording")
    p.add_argument("src", help="corpus folder, any folder of EDF files, or one EDF")
    p.add_argument("out")
    p.add_argument("--layout", choices=corpora.LAYOUTS, default="auto")
    p.add_argument("--montage", choices=sorted(CHANNELS, reverse=True), default="referential")
    p.add_argument("--notch", choices=sorted(NOTCH, reverse=True), default="both",
                   help="mains to take out, Hz")
    p.add_argument("--blank-unit", choices=("uV", "mV", "V", "nV"), default="",
                   help="unit where the EDF names none")
    p.add_argument("--workers", type=int, default=0, help="processes (0: one per core)")
    p.add_argument("--skip-bad", action="store_true", help="exit 0 although files were refused")
    p = commands.add_parser("synth", help="synthetic EDF recordings in BIDS / SzCORE layout")
    p.add_argument("out")
    p.add_argument("--hours", type=float, default=1.0, help="in all")
    p.add_argument("--patients", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    commands.add_parser("info", help="hours, patients, seizures, balance, refusals").add_argument("out")
    return parser.parse_args()


def main():
    args = arguments()
    try:
        if args.command == "synth":
            synth.synth(args.out, args.hours, args.patients, args.seed)
        elif args.command == "info":
            info(args.out)
        else:
            report = corpora.import_corpus(args.src, args.out, args.layout, args.montage, args.notch,
                                   args.blank_unit, args.workers)
            return int(bool(report.refused) and not args.skip_bad)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except (OSError, BrokenProcessPool, KeyboardInterrupt) as error:    # disk full, a worker out of memory
        what = " ".join(str(error).split()) or "interrupted"
        goes_on = "; the same command goes on from here" * (args.command == "import")
        print(f"data.py: stopped: {what}{goes_on}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
