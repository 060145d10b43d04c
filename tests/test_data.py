"""data.py: what the training gets. Real files and real processes."""
import errno
import hashlib
import multiprocessing
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from eeg import augmentation
from eeg import corpora, disk, store
import data
from eeg import edf
import forked
from conftest import NAMES, ROOT, Held, command, imported, prepare, write_edf



# ---- corpus ----

def test_index_is_never_trusted_over_the_files(synthetic, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(synthetic[1], out)
    first = data.open_corpus(out)
    with h5py.File(first[0].path, "r+") as f:
        f.attrs["patient"] = "somebody else"
    os.utime(first[0].path)
    assert data.open_corpus(out)[0].patient == "somebody else"
    (out / disk.INDEX).write_text("{half")
    assert len(data.open_corpus(out)) == len(first)
    Path(first[1].path).unlink()
    assert len(data.open_corpus(out)) == len(first) - 1
    with pytest.raises(edf.DataError, match="changed since"):
        first[0].read(0, 10)


def many(synthetic, out, count=40):
    """A corpus of `count` recordings with its index."""
    source = data.open_corpus(synthetic[1])[0].path
    out.mkdir()
    for i in range(count):
        shutil.copy(source, out / f"{i:02}.h5")
    return data.open_corpus(out)


def test_after_a_copy_the_index_alone_opens_the_corpus(synthetic, tmp_path, monkeypatch):
    before = data.fingerprint(many(synthetic, tmp_path / "out"))
    index = (tmp_path / "out" / disk.INDEX).read_bytes()
    for path in (tmp_path / "out").glob("*.h5"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(h5py, "File", None)
    recordings = data.open_corpus(tmp_path / "out")
    assert data.fingerprint(recordings) == before and recordings[3].digest
    assert recordings[3].read(0, 9).any() and not recordings[3].digest     # proven by what was read
    assert (tmp_path / "out" / disk.INDEX).read_bytes() == index
    os.utime(recordings[3].path)
    with pytest.raises(edf.DataError, match="changed since"):
        recordings[3].read(0, 9)


def test_a_file_that_is_not_the_one_of_the_index_is_refused_when_it_is_read(synthetic, tmp_path):
    first = many(synthetic, tmp_path / "out")[0]
    content = bytearray(Path(first.path).read_bytes())
    content[first.offset // 2] ^= 1
    Path(first.path).write_bytes(content)
    for path in (tmp_path / "out").glob("*.h5"):
        os.utime(path, (1, 1))
    recordings = data.open_corpus(tmp_path / "out")
    assert recordings[1].read(0, 9).any()
    with pytest.raises(edf.DataError, match="00.h5 is not the recording that the index describes: import it again"):
        recordings[0].read(0, 9)


def test_readers_that_are_the_first_at_a_copied_recording_at_once_all_believe_it(synthetic, tmp_path):
    many(synthetic, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.h5"):
        os.utime(path, (1, 1))
    together = threading.Barrier(16)

    def read(recording):
        together.wait()
        recording.read(0, 9)
    with ThreadPoolExecutor(16) as pool:
        for recording in data.open_corpus(tmp_path / "out"):
            list(pool.map(read, [recording] * 16))          # raises what one of them raised
            assert not recording.digest


def test_a_folder_that_cannot_be_written_opens_all_the_same(synthetic, tmp_path, monkeypatch):
    shutil.copytree(synthetic[1], tmp_path / "out")
    (tmp_path / "out" / disk.INDEX).unlink()

    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(store, "write_json", refuse)
    assert data.fingerprint(data.open_corpus(tmp_path / "out")) == data.fingerprint(data.open_corpus(synthetic[1]))


def test_a_copy_that_lacks_recordings_of_its_index_is_said_once_and_is_whole_when_they_have_come(synthetic, tmp_path):
    shutil.copytree(synthetic[1], tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out").rglob("*.h5"))
    first.rename(tmp_path / "a")
    second.rename(tmp_path / "b")
    name = first.relative_to(tmp_path / "out").with_suffix("")
    said = command("info", tmp_path / "out")
    assert said.returncode == 0 and said.stderr == (
        f"{tmp_path / 'out'}: 2 recordings missing that its index names, as {name}: deleted, or not copied yet\n")
    assert not command("info", tmp_path / "out").stderr
    (tmp_path / "a").rename(first)
    (tmp_path / "b").rename(second)
    assert data.fingerprint(data.open_corpus(tmp_path / "out")) == data.fingerprint(data.open_corpus(synthetic[1]))


def test_a_flipped_digit_in_the_index_is_found_and_an_index_without_its_hash_is_read(synthetic, tmp_path):
    shutil.copytree(synthetic[1], tmp_path / "out")
    index = tmp_path / "out" / disk.INDEX
    whole, right = index.read_text(), data.open_corpus(synthetic[1])
    content = json.loads(whole)
    digit = str(next(iter(content["recordings"].values()))["norm"])
    index.write_text(whole.replace(digit, "9" + digit[1:] if digit[0] != "9" else "1" + digit[1:], 1))
    assert [r.norm for r in data.open_corpus(tmp_path / "out")] == [r.norm for r in right] and index.read_text() == whole
    del content["sha256"]
    index.write_text(json.dumps(content))
    assert store.read_index(index) == content["recordings"]
    index.write_text("[" * 10**5)               # of another program, or by a disk's fault
    assert [r.norm for r in data.open_corpus(tmp_path / "out")] == [r.norm for r in right] and index.read_text() == whole


def test_the_older_format_is_refused_with_the_reason(synthetic, tmp_path):
    recording = data.open_corpus(synthetic[1])[0]
    with h5py.File(recording.path) as new, h5py.File(tmp_path / "old.h5", "w") as old:
        old["eeg"], old["events"] = new["eeg"][()], new["events"][()]
        old.attrs.update(dict(new.attrs) | {"format": 1})
    with pytest.raises(edf.DataError, match="has format 1, not 2: import it again .*a window lay in 19 places"):
        data.open_corpus(tmp_path)
    with h5py.File(tmp_path / "old.h5", "r+") as old:
        old.attrs["format"] = 2
    with pytest.raises(edf.DataError, match="not whole chunks .* import it again"):
        data.open_corpus(tmp_path)


@pytest.mark.parametrize("key, value", [("fs", 512), ("fs", 0), ("source_fs", np.nan), ("norm", -1.0), ("events", [[5.0, 3.0]]),
                                        ("events", [[-5.0, 3.0]]), ("events", [[1e6, 2e6]]), ("events", [[np.nan, 3.0]]),
                                        ("events", [1.0, 2.0, 3.0])])
def test_values_that_no_import_writes_are_refused_where_they_are_read(synthetic, tmp_path, key, value):
    shutil.copy(data.open_corpus(synthetic[1])[0].path, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        if key == "events":
            del file["events"]
            file["events"] = value
        else:
            file.attrs[key] = value
    with pytest.raises(edf.DataError, match="a.h5"):
        data.open_corpus(tmp_path)


def test_plain_h5py_opens_a_recording_that_equals_its_edf(tmp_path):
    """Other tools see (C, T), in uV what the EDF holds, filtered."""
    t = np.arange(60 * 256) / 256
    path = write_edf(tmp_path / "src" / "a.edf", 60, eeg=np.tile(1000 * np.sin(2 * np.pi * 7 * t), (19, 1)))
    corpora.import_corpus(tmp_path / "src", tmp_path / "out", say=lambda text: None)
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        eeg, scale = file["eeg"], file.attrs["scale"]
        np.testing.assert_array_equal(eeg[:, 4000:9000], prepare(path).memory[:, 4000:9000])
        ours = eeg[3, 4000:9000] * scale[3]
    assert abs(ours - 100 * np.sin(2 * np.pi * 7 * t[4000:9000])).max() < 1
    content = (tmp_path / "out" / "a.h5").read_bytes()
    recording, = data.open_corpus(tmp_path / "out")
    assert len(content) == recording.offset + 6 * 19 * 2560 * 2       # nothing stands behind the samples


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
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(edf.DataError, match=f"{victim.name} is no file"):
        data.open_corpus(out)
    with pytest.raises(edf.DataError, match="no such folder; python .*data.py import SRC"):
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
                                       ([fake("a", labelled=False)], [], "0 labelled patients: no recording has labels")):
        with pytest.raises(edf.DataError, match=reason):
            data.split_patients(recordings, wanted)
    mixed = [fake("a"), fake("b"), *(fake(f"h{i}", events=()) for i in range(8))]
    for seed in range(10):
        train, dev = data.split_patients(mixed, seed=seed)
        assert any(len(r.events) for r in train) and any(len(r.events) for r in dev)


@pytest.mark.parametrize("line", ["chb01 = anna", "chb21 = anna"])
def test_who_is_joined_under_one_name_is_joined_under_all(tmp_path, line):
    """CHB-MIT's chb21 is chb01 on either side of an = too, or the one would train and the other validate."""
    for name in ("chb01_01", "chb21_01", "anna_1"):
        write_edf(tmp_path / "src" / f"{name}.edf", 5)
    imported(tmp_path / "src", tmp_path / "out")
    assert {r.patient for r in data.open_corpora(tmp_path / "out", [line])} == {"anna"}


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


def test_a_clip_out_of_a_seizure_is_measured_by_a_usual_amplitude_and_an_hour_by_its_own():
    assert data.reference_amplitude(100, 10) == pytest.approx(data.TYPICAL_UV, rel=0.15)
    assert data.reference_amplitude(100, 3600) == pytest.approx(100, rel=0.05)
    assert data.reference_amplitude(data.TYPICAL_UV, 60) == pytest.approx(data.TYPICAL_UV)


def test_batches_stay_valid_after_the_ring_went_round(corpus):
    w = data.Windows(corpus, 10, 5)
    kept = [x.clone() for x, _, _ in data.Loader(w, buffers=2).batches(plan(w), 1)]
    late = [x for x, _, _ in data.Loader(w, buffers=2).batches(plan(w), 1)]
    assert all(torch.equal(a, b) for a, b in zip(kept, late))


ON_A_GPU = f"""
import sys
import torch
sys.path.insert(0, {str(ROOT)!r})
import data
device, windows = sys.argv[2], data.Windows(data.open_corpus(sys.argv[1]), 10, 5)
torch.zeros(1, device=device)           # as a model's weights
lists = [list(range(k, k + 8)) for k in range(0, len(windows) - 8, 3)]
ours = zip(data.Loader(windows, augment=True).batches(lists, 1), data.Loader(windows, device, augment=True, buffers=1).batches(lists, 1))
for cpu, gpu in ours:
    assert all(torch.allclose(one, other.cpu(), rtol=1e-6) for one, other in zip(cpu, gpu))
assert len(lists) > 3 and (device == "cuda:0" or not torch._C._cuda_hasPrimaryContext(0))
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_each_gpu_batches_are_those_of_the_cpu_though_one_slot_serves_all_and_no_other_gpu_is_used(synthetic):
    for number in range(torch.cuda.device_count()):
        subprocess.run([sys.executable, "-c", ON_A_GPU, str(synthetic[1]), f"cuda:{number}"], check=True)


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
    flip = augmentation.mirror(NAMES)
    assert [NAMES[i] for i in flip[:9]] == "Fp2 F4 C4 P4 O2 F8 T4 T6 Fz".split()
    gains = [min(((a[i] - g * p[order]).abs().max().item(), g) for order in (slice(None), flip)
                 for p in [plain[i]] for g in [a[i].norm().item() / p.norm().item()]) for i in range(12)]
    assert max(error for error, _ in gains) < 1e-3 and np.std([g for _, g in gains]) > 0.05
    assert len(augmentation.mirror(edf.BIPOLAR)) == 18


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_works_in_child_processes(corpus, method):
    w = data.Windows(corpus, 10, 5)
    right = [float(x.sum()) for x, _, _ in data.Loader(w).batches(plan(w), 1)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    count = 2 if method == "fork" else 1            # a spawned one imports torch anew
    children = [context.Process(target=in_child, args=(corpus, plan(w), queue)) for _ in range(count)]
    for child in children:
        child.start()
    assert [queue.get(timeout=900) for _ in children] == [right] * count
    for child in children:
        child.join()


def test_more_recordings_than_files_may_be_open(synthetic, tmp_path):
    code = ("import pathlib, resource, shutil, sys\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import data\n"
            "source, out = data.open_corpus(sys.argv[2])[0].path, pathlib.Path(sys.argv[3])\n"
            "for i in range(100): shutil.copy(source, out / f'{i}.h5')\n"
            "many = data.open_corpus(out)\n"
            "assert len(many) == 100\n"
            "w = data.Windows(many, 10, 60)\n"
            "assert len(list(data.Loader(w).batches([[i] for i in range(len(w))], 1))) == len(w)\n"
            "assert len({r.read(5, 9).tobytes() for r in many + many}) == 1")
    forked.run([sys.executable, "-c", code, ROOT, synthetic[1], tmp_path], check=True)


# ---- reading ----

def sha(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_the_same_for_any_number_of_readers_and_from_any_place_on(corpus, augment):
    w = data.Windows(corpus, 10, 3)
    lists = plan(w, 5, 8)
    kept = list(data.Loader(w, augment=augment).batches(lists, 1))
    for readers in (1, 4, 16):
        assert sha(data.Loader(w, augment=augment, readers=readers, buffers=3).batches(lists, 1)) == sha(kept)
    resumed = data.Loader(w, augment=augment, readers=2).batches(lists[3:], 1)
    assert sha(resumed) == sha(kept[3:])


def test_windows_at_every_offset_are_those_of_h5py(tmp_path):
    """Also of a recording shorter than a chunk, one that ends with a chunk, and one that goes a sample beyond."""
    rng = np.random.default_rng(0)
    for samples in (700, 2560, 2561, 7000):
        eeg = rng.integers(-30_000, 30_000, (19, samples), np.int16)
        held = fake("a", samples=samples)
        path = tmp_path / f"{samples}" / "a.h5"
        store.write_recording(path, eeg, held.events[:0], {
            "scale": held.scale, "fs": 256, "channels": list(NAMES), "montage": "referential", "patient": "a",
            "split": "", "labelled": True, "norm": 10.0, "source": "", "source_state": "[]", "source_fs": 256.0,
            "format": store.FORMAT, "prepared": "x", "notes": ""})
        recording, = data.open_corpus(path.parent)
        with h5py.File(path) as file:
            assert file["eeg"].chunks == (19, 2560) and file["eeg"].shape == (19, samples)
            np.testing.assert_array_equal(file["eeg"][()], eeg)
            for n in (1, 300, 2560, 3000):
                for start in {*range(0, samples, 37), samples - 1, 2559, 2560} & set(range(samples)):
                    piece = recording.read(start, n)
                    right = file["eeg"][:, start:start + n]
                    assert piece.shape == (19, n) and np.array_equal(piece[:, :right.shape[1]], right)
                    assert not piece[:, right.shape[1]:].any()
        w = data.Windows([recording], 5, 1.3)
        for ids, (x, _, mask) in zip(plan_all(w), data.Loader(w).batches(plan_all(w), 1)):
            for k, window in enumerate(ids):
                right = eeg[:, w.start[window]:w.start[window] + w.length]
                assert mask[k].sum() == right.shape[1]
                microvolts = x[k, :, :right.shape[1]].numpy() * recording.norm
                np.testing.assert_array_equal(np.rint(microvolts / held.scale[0]), right)


def plan_all(w):
    return [[i] for i in range(len(w))]


def test_readers_wait_for_the_disk_together(corpus, monkeypatch):
    """Eight reads are under way at once, or the barrier breaks."""
    plain, meeting = os.preadv, threading.Barrier(8)

    def preadv(*arguments):
        meeting.wait(120)
        return plain(*arguments)
    monkeypatch.setattr(os, "preadv", preadv)
    w = data.Windows(corpus, 10, 5)
    assert len(list(data.Loader(w, readers=8).batches(plan(w, 4, 6), 1))) == 6
    ahead = data.read_ahead([(corpus[0], 2560 * i) for i in range(16)], 2560, readers=8)
    assert len(list(ahead)) == 16


def test_readers_take_the_baselines_of_several_recordings_at_once(synthetic, monkeypatch):
    """Four are being read at once, or the barrier breaks."""
    recordings, plain, meeting = data.open_corpus(synthetic[1])[:4], data.Recording.read, threading.Barrier(4)
    alone = [r.log_gain for r in data.open_corpus(synthetic[1])[:4]]

    def read(recording, start, n):
        if not start:
            meeting.wait(60)
        return plain(recording, start, n)
    monkeypatch.setattr(data.Recording, "read", read)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda r: r.log_gain, recordings))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))


def test_a_window_is_one_read(corpus, monkeypatch):
    sizes, plain = [], os.preadv

    def preadv(handle, buffers, position):
        sizes.append(sum(len(b) for b in buffers))
        return plain(handle, buffers, position)
    monkeypatch.setattr(os, "preadv", preadv)
    w = data.Windows(corpus, 20, 10)
    aligned = np.flatnonzero(w.start % 2560 == 0)[:6]
    list(data.Loader(w).batches([aligned[:3], aligned[3:]], 1))
    assert sizes == [2 * 19 * 20 * 256] * 6


@pytest.mark.parametrize("harm", ["truncated", "replaced", "vanished", "failing"])
def test_a_recording_that_cannot_be_read_is_one_line_and_leaves_no_thread(synthetic, tmp_path, monkeypatch, harm):
    shutil.copytree(synthetic[1], tmp_path / "h5")
    recordings = data.open_corpus(tmp_path / "h5")
    w, before = data.Windows(recordings, 10, 5), threading.active_count()
    loader = data.Loader(w, buffers=2)
    batches = loader.batches(plan(w, 4, 30), 1)
    next(batches)
    for recording in recordings:
        hurt(Path(recording.path), harm, monkeypatch)
    reason = {"truncated": "was changed|ends .* early", "replaced": "was changed", "vanished": "No such file",
              "failing": "Input/output error"}[harm]
    with pytest.raises(edf.DataError, match=reason) as error:
        list(batches)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert threading.active_count() == before


def hurt(path, harm, monkeypatch):
    if harm == "truncated":
        os.truncate(path, path.stat().st_size // 3)
    elif harm == "replaced":
        shutil.copy(path, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    elif harm == "vanished":
        path.unlink()
    else:
        def preadv(*arguments):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.slow
def test_a_hundred_thousand_windows_leave_no_descriptor_open(corpus):
    w = data.Windows(corpus, 1, 0.1)
    ids = np.resize(w.epoch(0, 1, background=None), 100_000)
    open_now = len(os.listdir("/proc/self/fd"))
    most = 0
    for number, _ in enumerate(data.Loader(w).batches(ids.reshape(-1, 50), 1)):
        if number % 50 == 0:
            most = max(most, len(os.listdir("/proc/self/fd")))
    assert most <= open_now + data.READERS + 1 and len(os.listdir("/proc/self/fd")) == open_now


def test_the_share_of_waiting_and_what_to_do_about_it(corpus):
    loader = data.Loader(data.Windows(corpus, 10, 5), readers=3)
    list(loader.batches(plan(loader.windows), 1))
    assert 0 < loader.share() <= 1 and loader.share() == 0
    line = loader.advice(0.5)
    assert "50 %" in line and "data.readers" in line and "data.copy_to" in line and "3 at a time" in line
    assert os.path.dirname(corpus[0].path) in line and data.file_system("/proc") == "proc"


def test_speed_is_measured(synthetic, capsys):
    data.speed(synthetic[1], 0.5)
    out = capsys.readouterr().out
    assert re.search(r"cold: [\d,]+ windows/s \(\d+ windows\)", out) and re.search(r"warm: [\d,]+ windows/s", out)


# ---- the corpus on another disk ----

def test_a_copy_goes_on_where_it_stopped_and_says_what_stands_in_its_way(synthetic, tmp_path):
    lines = []
    place = data.copy_corpus(synthetic[1], tmp_path, lines.append)
    assert place == str(tmp_path / "h5") and "copying" in lines[0]
    ours, theirs = data.open_corpus(place), data.open_corpus(synthetic[1])
    assert data.fingerprint(ours) == data.fingerprint(theirs)
    assert all(np.array_equal(a.read(0, a.samples), b.read(0, b.samples)) for a, b in zip(ours, theirs))
    lines.clear()
    kept = Path(ours[1].path).stat().st_ino
    os.truncate(ours[0].path, 5000)
    (tmp_path / "h5" / "x.h5.copying").write_bytes(b"half")
    data.copy_corpus(synthetic[1], tmp_path, lines.append)
    assert "copying 1 recording, " in lines[0] and Path(ours[1].path).stat().st_ino == kept
    assert data.fingerprint(data.open_corpus(place)) == data.fingerprint(theirs)
    shutil.copy(ours[0].path, tmp_path / "h5" / "mine.h5")
    with pytest.raises(edf.DataError, match="mine.h5 is not in .*a folder of its own"):
        data.copy_corpus(synthetic[1], tmp_path)
    with pytest.raises(edf.DataError, match="lies already"):
        data.copy_corpus(synthetic[1], synthetic[1].parent)
    with pytest.raises(edf.DataError, match="lies within"):     # the next start would train on both
        data.copy_corpus(synthetic[1], synthetic[1] / "fast")
    assert not (synthetic[1] / "fast").exists()


def test_a_copy_without_room_is_refused_before_it_begins(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(edf.DataError, match="GB to copy, 0.0 GB free"):
        data.copy_corpus(synthetic[1], tmp_path)
    assert not list(tmp_path.rglob("*.h5"))


def test_what_a_killed_copy_left_takes_no_room_from_the_next_one_and_a_full_disk_is_named_not_the_source(tmp_path, small_disk):
    source = tmp_path / "corpus"
    source.mkdir()
    for name in ("a.h5", "b.h5"):
        (source / name).write_bytes(bytes(400_000))
    states = {path.name: disk.file_state(path.stat()) for path in source.iterdir()}
    (small_disk / "corpus").mkdir()
    (small_disk / "corpus/a.h5.copying").write_bytes(bytes(300_000))

    def fill(line):
        (small_disk / "other").write_bytes(bytes(300_000))      # another program's, just before the copy
    with pytest.raises(OSError) as full:
        disk.copy_folder(source, small_disk, states, fill)
    assert full.value.errno == errno.ENOSPC and full.value.filename.startswith(str(small_disk / "corpus"))
    assert not list(small_disk.rglob("*.copying"))
    (small_disk / "other").unlink()
    disk.copy_folder(source, small_disk, states, lambda line: None)
    assert all((small_disk / "corpus" / name).stat().st_size == 400_000 for name in states)
