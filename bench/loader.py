"""Speed of the loader against the disk, the page cache, a slow network, and other ways to keep EEG windows.

    python bench/loader.py [--hours 12] [--batch 8] [--seconds 1.0] [--folder DIR] [--sweep] [--only cold,...]

Windows of 19 channels x 60 s in random order. The parts, three rounds each, ours and the floor in turn:

    cold     from the disk, cache dropped: beside 8 threads that read the same bytes in one piece each
    delay    every read of the process takes 10 ms longer, as on a network
    warm     from the page cache: beside os.preadv of the 19 rows of a window that lies in 19 places (format 1)
    memory   resident memory over 10,000 windows of 40 GB (sparse files)
    opening  6,500 recordings with their index, after every file's time changed
    peers    other ways to keep windows, warm
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eeg import store  # noqa: E402
import data  # noqa: E402
from eeg.edf import CHANNELS as MONTAGES, FS  # noqa: E402

LENGTH, CHANNELS = 60 * FS, MONTAGES["referential"]
WINDOW = 2 * len(CHANNELS) * LENGTH     # bytes
ROUNDS = 3
DELAY = 0.010                           # s


def attributes(name):
    return {
        "scale": np.full(19, 0.1, np.float32), "fs": FS, "channels": list(CHANNELS), "montage": "referential",
        "patient": name, "split": "", "labelled": True, "norm": 20.0, "source": "", "source_state": "[]",
        "source_fs": 256.0, "layout": "", "format": store.FORMAT, "prepared": "bench", "notes": ""}


def corpus(folder, hours):
    """int16 recordings of an hour; beside each, its samples as the 19 rows of format 1."""
    rng = np.random.default_rng(0)
    noise = np.cumsum(rng.normal(0, 3, (19, 3600 * FS)), axis=1)
    noise -= np.linspace(0, 1, noise.shape[1]) * noise[:, -1:]
    noise = noise.astype(np.int16)
    for i in range(max(2, round(hours))):
        eeg = np.roll(noise, 997 * i, axis=1)
        path = folder / f"{i:03d}.h5"
        store.write_recording(path, eeg, np.array([(100.0, 190.0)]), attributes(path.stem))
        eeg.tofile(path.with_suffix(".rows"))
    os.sync()
    return data.open_corpus(folder)


def once(recordings):
    """Windows that touch every byte once, in random order: nothing is cold twice."""
    w = data.Windows(recordings, 60, 60)
    return w, np.random.default_rng(1).permutation(len(w))


def drop(paths):
    """Empty the page cache; returns how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "all caches dropped (root)"
    except OSError:
        for path in paths:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "cache of these files dropped (posix_fadvise)"


def timed(step):
    """(seconds, bytes read from the disk) of step()."""
    before, began = data.disk_bytes(), time.perf_counter()
    step()
    return time.perf_counter() - began, data.disk_bytes() - before


def batches(ids, size):
    return [ids[i:i + size] for i in range(0, len(ids), size)]


def load(w, ids, batch, readers=data.READERS):
    for _ in data.Loader(w, readers=readers).batches(batches(ids, batch), 1):
        pass


# ---- cold ----

def pieces(w, ids, threads=8):
    """The same bytes, read in one piece per window by threads that do nothing else."""
    handles = [os.open(r.path, os.O_RDONLY) for r in w.recordings]
    room = [np.empty(WINDOW, np.uint8) for _ in range(threads)]

    def work(k):
        for i in ids[k::threads]:
            which = w.recording[i]
            os.preadv(handles[which], [room[k]], w.recordings[which].offset + 38 * int(w.start[i]))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    for handle in handles:
        os.close(handle)


def cold(recordings, args):
    w, ids = once(recordings)
    paths = [r.path for r in recordings]
    rows = []
    for _ in range(ROUNDS):
        how = drop(paths)
        floor, _ = timed(lambda: pieces(w, ids))
        drop(paths)
        ours, read = timed(lambda: load(w, ids, args.batch))
        rows.append((len(ids) / floor, len(ids) / ours, floor / ours, read / (len(ids) * WINDOW)))
        print("cold      8 threads {:6.0f}   Loader {:6.0f} windows/s   x{:.2f} (goal 0.9)   "
              "{:.2f} bytes from the disk per byte (goal 1.1)".format(*rows[-1]), flush=True)
    print(f"          {how}; {data.file_system(paths[0])}; {len(ids)} windows")
    middle = np.median(rows, axis=0)
    return {"cold_ratio": middle[2], "cold_bytes": middle[3]}


# ---- delay ----

def delay(recordings, args):
    w, ids = once(recordings)
    plain = os.preadv

    def slow(*arguments):
        time.sleep(DELAY)
        return plain(*arguments)

    rates = []
    os.preadv = slow
    try:
        for _ in range(ROUNDS):
            seconds, _ = timed(lambda: load(w, ids, args.batch))
            rates.append(len(ids) / seconds)
            print(f"delay     {rates[-1]:6.0f} windows/s with {1e3 * DELAY:.0f} ms more per read (goal 500)", flush=True)
    finally:
        os.preadv = plain
    return {"delay_rate": float(np.median(rates))}


def sweep(recordings, args):
    w, ids = once(recordings)
    paths = [r.path for r in recordings]
    plain = os.preadv
    for readers in (1, 2, 4, 8, 16, 32):
        found = []
        for _ in range(ROUNDS):
            drop(paths)
            first, _ = timed(lambda: load(w, ids, args.batch, readers))
            warm, _ = timed(lambda: load(w, ids, args.batch, readers))
            os.preadv = lambda *a: (time.sleep(DELAY), plain(*a))[1]
            late, _ = timed(lambda: load(w, ids[:200], args.batch, readers))
            os.preadv = plain
            found.append((len(ids) / first, len(ids) / warm, 200 / late))
        print(f"readers {readers:3}: cold {np.median(found, 0)[0]:6.0f}   warm {np.median(found, 0)[1]:6.0f}   "
              f"10 ms later {np.median(found, 0)[2]:6.0f} windows/s", flush=True)


# ---- warm ----

def rate(step, ids, batch, seconds):
    """Windows per second of step(batch of windows) over about `seconds`."""
    rng, done = np.random.default_rng(0), 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        step(ids[rng.integers(0, len(ids), batch)])
        done += batch
    return done / (time.perf_counter() - began)


def rows19(w, batch):
    """os.preadv of the 19 rows of a window into a ring."""
    handles = [os.open(Path(r.path).with_suffix(".rows"), os.O_RDONLY) for r in w.recordings]
    ring = [np.empty((batch, 19, LENGTH), np.int16) for _ in range(4)]
    turn = [0]

    def step(ids):
        turn[0] += 1
        out = ring[turn[0] % 4]
        for k, i in enumerate(ids):
            which, start = w.recording[i], int(w.start[i])
            for c in range(19):
                os.preadv(handles[which], [out[k, c]], 2 * (c * w.recordings[which].samples + start))
    return step


def fill(w, batch, threads):
    """Our fill of the ring alone, as the readers do it: samples, labels, scale."""
    loader, turn = data.Loader(w), [0]
    slots = loader._slots(batch)
    pool = ThreadPoolExecutor(threads)

    def step(ids):
        turn[0] += 1
        slot = slots[turn[0] % len(slots)]
        jobs = [pool.submit(loader._fill, slot, k, int(i), 1) for k, i in enumerate(ids)]
        for job in jobs:
            job.result()
    return step


def whole(w, batch):
    """The whole Loader, its threads and the scaling to float32 on the CPU included."""
    return lambda ids: load(w, np.resize(ids, 32 * batch), batch)


def warm(recordings, args):
    w = data.Windows(recordings[:2])
    ids = np.arange(len(w))
    cores = len(os.sched_getaffinity(0))
    steps = {
        "preadv of 19 rows (floor)": rows19(w, args.batch),
        "ring of int16, 1 reader": fill(w, args.batch, 1),
        f"ring of int16, {cores} readers": fill(w, args.batch, cores),
        "Loader, float32 on the CPU": whole(w, args.batch),
    }
    best = dict.fromkeys(steps, 0.0)
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            factor = 32 if step is steps["Loader, float32 on the CPU"] else 1
            best[name] = max(best[name], factor * rate(step, ids, args.batch, args.seconds))
    floor = best["preadv of 19 rows (floor)"]
    for name, value in best.items():
        print(f"warm      {name:28} {value:8.0f} windows/s   x{value / floor:.2f} of the floor")
    print("          goal of the ring: x1.6")
    return {"ring_one": best["ring of int16, 1 reader"] / floor,
            "ring": best[f"ring of int16, {cores} readers"] / floor,
            "float32": best["Loader, float32 on the CPU"] / floor}


# ---- memory and opening ----

def sparse(path, hours):
    """A recording of zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", libver="latest") as f:
        f.attrs.update(attributes(path.stem))
        f.create_dataset("events", data=np.array([(10.0, 50.0)]))
        f.flush()
        store.make_dataset(f, 19, round(hours * 3600 * FS))


def memory(folder, args):
    for i in range(48):
        sparse(folder / f"{i}.h5", 24)
    recordings = data.open_corpus(folder)
    total = sum(19 * 2 * r.samples for r in recordings)
    w = data.Windows(recordings)
    loader = data.Loader(w)
    ids = np.random.default_rng(0).permutation(len(w))[:10_000]
    sizes = []
    for number, _ in enumerate(loader.batches(batches(ids, args.batch), 1)):
        if number % 250 == 2:
            sizes.append(resident())
    ring = sum(tensor.nbytes for slot in loader._ring for tensor in slot.tensors.values())
    grown = max(sizes) - sizes[0]
    print(f"memory    {len(ids)} windows of {total / 1e9:.0f} GB: resident {sizes[0] / 1e6:.0f} MB, with the ring of "
          f"{ring / 1e6:.0f} MB, grew by {grown / 1e6:.1f} MB (goal: 50)")
    return {"grown_mb": grown / 1e6}


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def opening(folder, count=6500):
    sparse(folder / "one.h5", 60 / 3600)
    head = (folder / "one.h5").read_bytes()
    head, size = head[:data.open_corpus(folder)[0].offset], len(head)
    for i in range(1, count):
        path = folder / f"p{i // 10}" / f"{i}.h5"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(head)
        os.truncate(path, size)
    first, _ = timed(lambda: data.open_corpus(folder))
    for path in folder.rglob("*.h5"):
        os.utime(path, (1, 1))
    times = []
    for _ in range(ROUNDS):
        seconds, _ = timed(lambda: data.fingerprint(data.open_corpus(folder)))
        times.append(seconds)
    print(f"opening   {count} recordings: {min(times):.2f} to {max(times):.2f} s after every time changed (goal 0.5); "
          f"{first:.1f} s without an index")
    return {"open_s": float(np.median(times))}


# ---- peers ----

class Dataset(torch.utils.data.Dataset):
    def __init__(self, w):
        self.w, self.files = w, [h5py.File(r.path)["eeg"] for r in w.recordings]

    def __len__(self):
        return len(self.w)

    def __getitem__(self, i):
        r, start = self.w.recordings[self.w.recording[i]], self.w.start[i]
        eeg = self.files[self.w.recording[i]][:, start:start + LENGTH].astype(np.float32)
        return eeg * (r.scale[:, None] / r.norm), r.labels(int(start), LENGTH).astype(np.float32)


def peers(recordings, folder, args):
    w = data.Windows(recordings[:2])
    ids = np.arange(len(w))
    dataset = Dataset(w)
    floor = rate(rows19(w, args.batch), ids, args.batch, args.seconds)

    def slices(ids):
        for i in ids:
            dataset.files[w.recording[i]][:, w.start[i]:w.start[i] + LENGTH]

    def torch_loader(ids):
        for _ in torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, ids.tolist()), args.batch):
            pass

    # one npz of overlapping float32 windows, of which each access unpacks all: a published pipeline
    eeg = np.stack([w.recordings[0].read(int(s), LENGTH) for s in w.start[:180]]).astype(np.float32)
    np.savez_compressed(folder / "w.npz", windows=eeg)

    def unpack(ids):
        np.load(folder / "w.npz")["windows"][int(ids[0]) % len(eeg)]

    found = {"h5py slices": rate(slices, ids, args.batch, args.seconds),
             "DataLoader on h5py": rate(torch_loader, ids, args.batch, args.seconds),
             "npz of float32 windows": rate(unpack, ids, 1, args.seconds)}
    for name, value in found.items():
        print(f"peers     {name:28} {value:8.1f} windows/s   x{value / floor:.4f} of preadv of 19 rows")
    return {name: value / floor for name, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=12.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="per pass")
    parser.add_argument("--folder", help="where the recordings are made; default: the temporary folder")
    parser.add_argument("--sweep", action="store_true", help="numbers of readers instead")
    parser.add_argument("--only", default="cold,delay,warm,memory,opening,peers", help="parts, by comma")
    args = parser.parse_args()
    wanted = args.only.split(",")
    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        recordings = corpus(folder / "h5", args.hours)
        if args.sweep:
            return sweep(recordings, args)
        for name, part in (("cold", cold), ("delay", delay), ("warm", warm)):
            if name in wanted:
                result |= part(recordings, args)
        if "peers" in wanted:
            result |= peers(recordings, folder, args)
        if "memory" in wanted:
            result |= memory(folder / "sparse", args)
        if "opening" in wanted:
            (folder / "many").mkdir()
            result |= opening(folder / "many")
    print(json.dumps({name: round(float(value), 5) for name, value in result.items()}))


if __name__ == "__main__":
    main()
