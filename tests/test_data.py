"""data.py: what the training gets. Real files and real processes."""
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import corpora
import data
import edf
from conftest import NAMES, ROOT, Held



# ---- corpus ----

def test_index_is_never_trusted_over_the_files(synthetic, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(synthetic[1], out)
    first = data.open_corpus(out)
    with h5py.File(first[0].path, "r+") as f:
        f.attrs["patient"] = "somebody else"
    os.utime(first[0].path)
    assert data.open_corpus(out)[0].patient == "somebody else"
    (out / corpora.INDEX).write_text("{half")
    assert len(data.open_corpus(out)) == len(first)
    Path(first[1].path).unlink()
    assert len(data.open_corpus(out)) == len(first) - 1
    with pytest.raises(edf.DataError, match="changed since"):
        first[0].read(0, 10)


def test_damaged_foreign_and_mixed_files_are_named(synthetic, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(synthetic[1], out)
    victim = Path(data.open_corpus(out)[0].path)
    whole = victim.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"x" * 5000):
        victim.write_bytes(content)
        with pytest.raises(edf.DataError, match=victim.name):
            data.open_corpus(out)
    victim.write_bytes(whole)
    for name, value in (("scale", np.full(19, np.nan, np.float32)), ("norm", 0.0), ("format", 99),
                        ("montage", "other")):
        with h5py.File(victim, "r+") as f:
            f.attrs[name] = value
        with pytest.raises(edf.DataError):
            data.open_corpus(out)
        victim.write_bytes(whole)
    with h5py.File(victim, "w") as f:
        f["something"] = 1
    with pytest.raises(edf.DataError, match="not a whole recording"):
        data.open_corpus(out)
    with pytest.raises(edf.DataError, match="no such folder"):
        data.open_corpus(tmp_path / "nowhere")


def fake(patient, split="", events=((10, 40),), samples=120 * 256, labelled=True, name=None):
    eeg = np.zeros((19, samples), np.int16)
    eeg[:] = np.arange(samples) % 30_000
    return Held("", name or f"{patient}{split}", patient, split, "referential", NAMES, 256, samples,
                          np.full(19, 0.1, np.float32), 10.0, labelled,
                          np.array(events, float).reshape(-1, 2), "x", memory=eeg)


def test_splits_are_disjoint_by_person():
    def patients(part):
        return {r.patient for r in part}
    people = [fake(p) for p in ("a", "b", "c", "chb01", "chb21", "chb02")]
    train, dev = data.split_patients(people, ["chb01"])
    assert patients(dev) == {"chb01", "chb21"} and not patients(train) & patients(dev)
    for seed in range(20):
        train, dev = data.split_patients(people, seed=seed)
        assert train and dev
        assert not {data.person(r.patient) for r in train} & {data.person(r.patient) for r in dev}
        assert ("chb01" in patients(dev)) == ("chb21" in patients(dev))
    own = [fake("a", "train"), fake("b", "dev"), fake("c", "eval"), fake("d", "train", labelled=False)]
    assert [patients(part) for part in data.split_patients(own)] == [{"a"}, {"b"}]
    for recordings, wanted, reason in (([*own, fake("a", "dev")], [], "both train and dev"),
                                       (people, ["nobody"], "nobody"),
                                       ([fake("a")], [], "both are needed"),
                                       ([fake("a", labelled=False)], [], "0 labelled")):
        with pytest.raises(edf.DataError, match=reason):
            data.split_patients(recordings, wanted)
    mixed = [fake("a"), fake("b"), *(fake(f"h{i}", events=()) for i in range(8))]
    for seed in range(10):
        train, dev = data.split_patients(mixed, seed=seed)
        assert any(len(r.events) for r in train) and any(len(r.events) for r in dev)


# ---- windows ----

def test_a_window_wholly_inside_a_seizure_is_labelled_seizure():
    """BIOT's CHB-MIT pipeline labels a window by the onsets and ends inside it: such a window became
    background."""
    r = fake("a", events=((20, 100),))
    w = data.Windows([r], seconds=10, stride=5)
    full = np.flatnonzero((w.start >= 20 * 256) & (w.start + w.length <= 100 * 256))
    assert (w.kind[full] == 2).all() and r.labels(int(w.start[full[0]]), w.length).all()
    assert (w.kind[w.start + w.length <= 20 * 256] == 0).all() and (w.kind[(w.start == 15 * 256)] == 1).all()


@pytest.mark.parametrize("samples", [1, 100, 1792, 15359, 15360, 15361, 24320, 30720])
def test_windows_cover_every_sample(samples):
    w = data.Windows([fake("a", samples=samples, events=())], 60, 10)
    seen = np.zeros(samples, bool)
    for start in w.start:
        seen[start:start + w.length] = True
    assert seen.all() and (w.start >= 0).all() and (len(w) == 1 or (w.start + w.length <= samples).all())


def test_short_recordings_are_padded_with_a_mask():
    w = data.Windows([fake("a", samples=700, events=((0, 2.0),))], 4, 1)
    (x, y, mask), = data.Loader(w).batches([[0]], 1)
    assert x.shape == (1, 19, 1024) and mask.sum() == 700 and y.sum() == 512
    assert (x[..., 700:] == 0).all() and w.kind[0] == 1


def test_epochs_are_balanced_drawn_anew_and_show_all_background():
    w = data.Windows([fake(str(i), samples=600 * 256, events=((100, 190), (300, 330)) if i < 2 else ())
                      for i in range(6)], 20, 5)
    partial, full = (w.kind == 1).sum(), (w.kind == 2).sum()
    one, same, two = w.epoch(1, 1), data.Windows(w.recordings, 20, 5).epoch(1, 1), w.epoch(1, 2)
    np.testing.assert_array_equal(one, same)
    counts = np.bincount(w.kind[one], minlength=3)
    assert counts.tolist() == [round(2.5 * partial), partial, round(0.3 * partial)] and full > counts[2]
    assert set(one[w.kind[one] == 1]) == set(np.flatnonzero(w.kind == 1)) and not np.array_equal(one, two)
    seen = set()
    for epoch in range(1, 12):
        ids = w.epoch(1, epoch)
        seen |= set(ids[w.kind[ids] == 0])
    assert seen == set(np.flatnonzero(w.kind == 0))
    assert sorted(w.epoch(1, 1, background=None)) == list(range(len(w)))


def test_impossible_draws_are_errors_that_say_what_to_do():
    short = data.Windows([fake("a", events=((10, 14),))], 20, 5)
    with pytest.raises(edf.DataError, match="full_per_partial"):
        short.epoch(0, 1)
    assert len(short.epoch(0, 1, full=0))
    with pytest.raises(edf.DataError, match="balanced"):
        data.Windows([fake("a", events=())], 20, 5).epoch(0, 1)
    with pytest.raises(edf.DataError, match="ratio"):
        short.epoch(0, 1, full=float("nan"))
    with pytest.raises(edf.DataError, match="labelled"):
        data.Windows([fake("a", labelled=False)])


# ---- loader ----

def plan(w, size=4, count=6):
    ids = w.epoch(0, 1)
    return [ids[i * size:(i + 1) * size] for i in range(count)]


def test_batches_are_the_recordings_own_samples(corpus):
    w = data.Windows(corpus, 10, 5)
    for ids, (x, y, mask) in zip(plan(w), data.Loader(w).batches(plan(w), 1)):
        for k, window in enumerate(ids):
            r, start = w.recordings[w.recording[window]], int(w.start[window])
            right = r.read(start, w.length) * r.scale[:, None] / np.float32(r.norm)
            np.testing.assert_allclose(x[k], right, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(y[k], r.labels(start, w.length))
        assert x.dtype == y.dtype == mask.dtype == torch.float32
        eeg, scale = torch.from_numpy(r.read(start, w.length)), torch.from_numpy(r.scale)
        # evaluation computes the same
        assert torch.equal(data.normalise(eeg, scale, torch.tensor(r.norm)), x[-1])


def test_batches_stay_valid_after_the_ring_went_round(corpus):
    w = data.Windows(corpus, 10, 5)
    kept = [x.clone() for x, _, _ in data.Loader(w, buffers=2).batches(plan(w), 1)]
    late = [x for x, _, _ in data.Loader(w, buffers=2).batches(plan(w), 1)]
    assert all(torch.equal(a, b) for a, b in zip(kept, late))


def test_order_empty_lists_and_uneven_batches(corpus):
    w = data.Windows(corpus, 10, 5)
    got = list(data.Loader(w).batches([[0, 1, 2], [], [5], []], 1))
    assert [None if b is None else len(b[0]) for b in got] == [3, None, 1, None]
    assert list(data.Loader(w).batches([], 1)) == []


def test_augmentation_depends_on_seed_epoch_and_window_alone(corpus):
    w = data.Windows(corpus, 10, 5)

    def batch(lists, seed=1, epoch=1):
        return torch.cat([b[0] for b in data.Loader(w, seed=seed, augment=True).batches(lists, epoch)])
    ids = w.epoch(0, 1)[:12]
    a, b = batch([ids]), batch([ids[:5], ids[5:7], ids[7:]])
    assert torch.equal(a, b)
    assert not torch.equal(a, batch([ids], epoch=2)) and not torch.equal(a, batch([ids], seed=2))
    plain = torch.cat([b[0] for b in data.Loader(w).batches([ids], 1)])
    flip = data.mirror(NAMES)
    assert [NAMES[i] for i in flip[:9]] == "Fp2 F4 C4 P4 O2 F8 T4 T6 Fz".split()
    gains = [min(((a[i] - g * p[order]).abs().max().item(), g) for order in (slice(None), flip)
                 for p in [plain[i]] for g in [a[i].norm().item() / p.norm().item()]) for i in range(12)]
    assert max(error for error, _ in gains) < 1e-3 and np.std([g for _, g in gains]) > 0.05
    assert len(data.mirror(edf.BIPOLAR)) == 18


def test_closing_early_and_errors_leave_no_thread(corpus):
    w, before = data.Windows(corpus, 10, 5), threading.active_count()
    loader = data.Loader(w, buffers=2)
    batches = loader.batches(plan(w, count=20), 1)
    next(batches)
    batches.close()
    assert threading.active_count() == before and loader.waited > 0
    with pytest.raises(IndexError):
        list(loader.batches([[0], [10 ** 9]], 1))
    assert threading.active_count() == before
    assert len(list(loader.batches([[1, 2]], 1))) == 1   # still usable


def in_child(recordings, ids, queue):
    w = data.Windows(recordings, 10, 5)
    queue.put([float(x.sum()) for x, _, _ in data.Loader(w).batches(ids, 1)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_works_in_child_processes(corpus, method):
    w = data.Windows(corpus, 10, 5)
    right = [float(x.sum()) for x, _, _ in data.Loader(w).batches(plan(w), 1)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=in_child, args=(corpus, plan(w), queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [right, right]
    for child in children:
        child.join()


def test_more_recordings_than_files_may_be_open(synthetic):
    code = ("import resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import data\nrecordings = data.open_corpus(sys.argv[2])\n"
            "import shutil, tempfile, pathlib\n"
            "out = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[3]))\n"
            "for i in range(100): shutil.copy(recordings[0].path, out / f'{i}.h5')\n"
            "many = data.open_corpus(out)\nassert len(many) == 100\n"
            "assert len({r.read(5, 9).tobytes() for r in many + many}) == 1")
    assert subprocess.run([sys.executable, "-c", code, ROOT, synthetic[1],
                           synthetic[1].parent]).returncode == 0
