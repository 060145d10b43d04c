"""Speed of the loader against the page cache and against other ways to keep EEG windows, all in one run.

    python bench/loader.py [--hours 2] [--batch 8] [--seconds 1.0]

Windows of 19 channels x 60 s at random places of 2 h of int16 EEG, warm cache, one thread. The floor is
os.preadv of the same 19 rows of a window into the same ring. Then: opening a corpus of 6,500 recordings,
and how long a training-like loop waits.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import corpora  # noqa: E402
import data  # noqa: E402
import edf  # noqa: E402

LENGTH, CHANNELS = 60 * edf.FS, edf.CHANNELS["referential"]
TARGETS = {"ring of int16": 1.2, "float32 on the CPU": 0.5}


def corpus(folder, hours):
    """int16 recordings of 30 min; their content does not matter for the uncompressed forms."""
    rng, count = np.random.default_rng(0), max(2, round(hours * 2))
    noise = np.cumsum(rng.normal(0, 3, (19, 1800 * edf.FS)), axis=1)
    noise -= np.linspace(0, 1, noise.shape[1]) * noise[:, -1:]
    for i in range(count):
        store(folder / f"{i:03d}.h5", np.roll(noise, 997 * i, axis=1).astype(np.int16))
    return data.open_corpus(folder)


def store(path, eeg, events=((100.0, 190.0),)):
    corpora.write_recording(path, eeg, np.array(events), {
        "scale": np.full(19, 0.1, np.float32), "fs": edf.FS, "channels": list(CHANNELS),
        "montage": "referential",
        "patient": path.stem, "split": "", "labelled": True, "norm": 20.0, "source": "", "source_state": "[]",
        "source_fs": 256.0, "layout": "", "format": corpora.FORMAT, "prepared": "bench", "repaired": ""})


def rate(step, windows, seconds):
    """Windows per second of step(batch of windows), best of three passes of `seconds`, after one to warm
    up."""
    best = 0.0
    for k in range(4):
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < (seconds if k else seconds / 4):
            batch = windows[np.random.default_rng(done).integers(0, len(windows), 8 if done < 0 else BATCH)]
            step(batch)
            done += len(batch)
        best = max(best, done / (time.perf_counter() - began))
    return best


def floor(w):
    """os.preadv of the 19 rows of a window into a ring: what the page cache gives without mapping it."""
    import os
    files = {r.path: os.open(r.path, os.O_RDONLY) for r in w.recordings}
    ring, turn = [np.empty((BATCH, 19, LENGTH), np.int16) for _ in range(4)], [0]

    def step(ids):
        turn[0] += 1
        out = ring[turn[0] % 4]
        for k, i in enumerate(ids):
            r, start = w.recordings[w.recording[i]], int(w.start[i])
            for c in range(19):
                os.preadv(files[r.path], [out[k, c]], r.offset + 2 * (c * r.samples + start))
    return step


def ring(w):
    """Our fill of the ring alone, as the background thread does it: samples, labels, scale."""
    loader, turn = data.Loader(w), [0]
    slots = loader._slots(BATCH)

    def step(ids):
        turn[0] += 1
        for k, i in enumerate(ids):
            loader._fill(slots[turn[0] % 4], k, int(i), 1)
    return step


def batches(w):
    """The whole Loader, thread and scaling included."""
    loader = data.Loader(w)

    def step(ids):
        for _ in loader.batches([ids[i:i + BATCH] for i in range(0, len(ids), BATCH)], 1):
            pass
    return step


def slices(w):
    files = [h5py.File(r.path)["eeg"] for r in w.recordings]

    def step(ids):
        return [files[w.recording[i]][:, w.start[i]:w.start[i] + LENGTH] for i in ids]
    return step


class Dataset(torch.utils.data.Dataset):
    def __init__(self, w):
        self.w, self.files = w, [h5py.File(r.path)["eeg"] for r in w.recordings]

    def __len__(self):
        return len(self.w)

    def __getitem__(self, i):
        r, start = self.w.recordings[self.w.recording[i]], self.w.start[i]
        eeg = self.files[self.w.recording[i]][:, start:start + LENGTH].astype(np.float32)
        return eeg * (r.scale[:, None] / r.norm), r.labels(int(start), LENGTH).astype(np.float32)


def default_loader(w):
    dataset = Dataset(w)

    def step(ids):
        for _ in torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, [int(i) for i in ids]), BATCH):
            pass
    return step


def compressed(w, folder):
    """One npz of overlapping float32 windows, of which each access unpacks all: the form of a published
    pipeline."""
    eeg = np.stack([w.recordings[0].read(int(s), LENGTH)
                    for s in w.start[w.recording == 0]]).astype(np.float32)
    np.savez_compressed(folder / "w.npz", windows=eeg)

    def step(ids):
        return [np.load(folder / "w.npz")["windows"][int(i) % len(eeg)] for i in ids[:1]]
    return step


def opening(folder, count=6500):
    """Seconds to open a corpus of many recordings: first time, and with its index."""
    for i in range(count):
        store(folder / f"p{i // 10}" / f"{i}.h5", np.zeros((19, 64), np.int16), [(0.01, 0.2)] * 3)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        found = data.open_corpus(folder)
        data.fingerprint(found)
        times.append(time.perf_counter() - began)
    return times[0], min(times[1:])


def waiting(w, step, count=60):
    """Share of a loop's time that it waits for the loader while a step takes `step` s."""
    loader, ids = data.Loader(w), w.epoch(0, 1, background=None)
    ids = np.resize(ids, count * BATCH)
    began = first = time.perf_counter()
    for k, _ in enumerate(loader.batches([ids[i * BATCH:(i + 1) * BATCH] for i in range(count)], 1)):
        if k == 0:
            # filling the ring for the first time is not the loop
            loader.waited, first = 0.0, time.perf_counter()
        time.sleep(step)
    return loader.waited, time.perf_counter() - first, first - began


def main():
    global BATCH
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="per pass")
    args = parser.parse_args()
    BATCH = args.batch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        w = data.Windows(corpus(folder / "h5", args.hours))
        ids = np.random.default_rng(0).permutation(len(w))
        long = np.resize(ids, 64 * BATCH)
        base = rate(floor(w), ids, args.seconds)
        rows = [("pread of 19 rows (floor)", base), ("ring of int16", rate(ring(w), ids, args.seconds)),
                ("float32 on the CPU", sum_rate(batches(w), long, args.seconds)),
                ("h5py slices", rate(slices(w), ids, args.seconds)),
                ("DataLoader on h5py", rate(default_loader(w), ids, args.seconds)),
                ("npz of float32 windows", rate_one(compressed(w, folder), ids))]
        for name, value in rows:
            target = f"   target {TARGETS[name]}" if name in TARGETS else ""
            print(f"{name:26} {value:9.1f} windows/s   {value / base:8.4f} of the floor{target}", flush=True)
        copy = BATCH / dict(rows)["float32 on the CPU"]
        for step in (2 * copy, 0.1):
            waited, total, _ = waiting(w, step)
            print(f"steps of {step * 1e3:6.1f} ms (a batch takes {copy * 1e3:.1f} ms): "
                  f"waited {waited * 1e3:.1f} ms of {total:.2f} s")
        first, later = opening(folder / "many")
        print(f"6,500 recordings: opened in {first:.2f} s, with an index in {later:.2f} s   target 2 s")
        print(json.dumps({name: round(value / base, 5) for name,
                          value in rows} | {"open_s": round(later, 3)}))


def sum_rate(step, ids, seconds):
    step(ids)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < 3 * seconds:
        start = time.perf_counter()
        step(ids)
        best = max(best, len(ids) / (time.perf_counter() - start))
    return best


def rate_one(step, ids):
    began = time.perf_counter()
    for i in ids[:3]:
        step([i])
    return 3 / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
