"""A save that returned is never lost, a damaged file is never believed: kills, errors, power cuts, bit flips."""
import contextlib
import errno
import io
import itertools
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import crash
import tracer
from crash import damages, sound, state

KINDS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR)


def recover(directory):
    """What a resume would do: the step of the chosen file, checked value by value, or None."""
    path = checkpoint.find_resume(directory, lambda line: None)
    return sound(checkpoint.load(path)) if path else None


def saver(directory, **changes):
    options = {"mid_epoch_keep": 2, "checkpoint_keep": 2, "background": False, "say": lambda line: None, **changes}
    return checkpoint.Checkpointer(directory, **options)


def temps(directory):
    return [p.name for p in Path(directory).iterdir() if p.name.endswith(".tmp")]


def has_links(directory):
    """A run of five saves: two snapshots, two epochs whose names are links, and best.pt of the first."""
    with saver(directory) as s:
        for step in (1, 2, 3):
            s.save_mid(state(step))
        s.save_epoch(state(4, epoch=1), metric=0.5)
        s.save_epoch(state(5, epoch=2), metric=0.4)


@pytest.fixture(params=[crash.wrapped, crash.traced], ids=["calls of Python", "system calls"])
def run(request):
    if request.param is crash.traced and not tracer.available():
        pytest.skip("system calls of a child cannot be traced here")
    return request.param


def test_a_kill_at_every_call_of_a_save_leaves_the_old_file_or_the_new_one(tmp_path, run):
    found = []

    def check(directory):
        found.append(sound(checkpoint.load(Path(directory, "last.pt"))))
        checkpoint.atomic_save(state(3), Path(directory, "other.pt"))
        assert not temps(directory), "the temp of the killed process must go at the next save"
    points = crash.kill_sweep(tmp_path / "d", lambda d: checkpoint.atomic_save(state(1), Path(d, "last.pt")),
                              lambda d: checkpoint.atomic_save(state(2), Path(d, "last.pt")), check, run)
    assert found == sorted(found) and set(found) == {1, 2} and points >= 12
    print(f"kill points: {points}")


@pytest.mark.slow
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_every_call_of_an_epoch_end_with_links_and_rotation_loses_no_returned_save(tmp_path, run, every):
    def save(directory):
        with saver(directory) as s:
            s.adopt(checkpoint.load(Path(directory, "last.pt")))
            s.save_epoch(state(6, epoch=3), metric=0.9)

    def check(directory):
        assert recover(directory) in (5, 6)
        for name in ("last.pt", "best.pt"):
            sound(checkpoint.load(Path(directory, name)))
        with saver(directory) as s:
            if s.resume()["global_step"] == 6:          # the names that the kill kept from it are given now
                assert {sound(checkpoint.load(Path(directory, name))) for name in ("last.pt", "best.pt")} == {6}
            s.save_mid(state(7, epoch=4))
        assert recover(directory) == 7 and not temps(directory)
    points = crash.kill_sweep(tmp_path / "d", has_links, save, check, run, every)
    assert points >= 30 / every
    print(f"kill points: {points}")


def failing(error, at, lasting, seen):
    """A hook that fails call `at`, and with `lasting` all later ones but those that remove and let go."""
    def hook(number, name, arguments):
        seen.append((name, arguments[0]))
        if number == at or lasting and number > at and name not in ("unlink", "close"):
            return OSError(error, os.strerror(error)) if isinstance(error, int) else error
    return hook


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("error", [*KINDS, MemoryError(), KeyboardInterrupt()], ids=repr)
def test_an_error_at_any_call_leaves_every_earlier_file_and_no_temp_and_no_fsync_is_tried_twice(tmp_path, error, lasting):
    path, other = tmp_path / "last.pt", tmp_path / "best.pt"
    for at in itertools.count(1):
        shutil.rmtree(tmp_path), tmp_path.mkdir()
        checkpoint.atomic_save(state(1), path)
        os.link(path, other)
        raised, seen = None, []
        with crash.Watched(tmp_path, failing(error, at, lasting, seen)):
            try:
                checkpoint.atomic_save(state(2), path)
            except BaseException as caught:
                raised = caught
        if len(seen) < at:
            break
        failed, step = seen[at - 1][0], sound(checkpoint.load(path))
        if raised is None:                  # without a lock or direct writes a save is as durable
            assert failed in ("flock", "fstat", "fcntl") and step == 2
        else:
            assert raised.errno == error if isinstance(error, int) else raised is error
        replaced = ("replace" in [name for name, _ in seen[:at - 1]])
        assert sound(checkpoint.load(other)) == 1 and (step == 1 or replaced or raised is None)
        assert not temps(tmp_path), f"a failed {failed} left its temp"
        synced = [fd for name, fd in seen[at - 1:] if name == "fsync"]
        assert failed != "fsync" or synced.count(seen[at - 1][1]) == 1, "a failed fsync was tried again"
    assert at > 10


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [[errno.ENOSPC, MemoryError(), errno.EIO, KeyboardInterrupt()],
                                   *(pytest.param([kind], marks=pytest.mark.slow) for kind in KINDS)], ids=repr)
def test_an_error_at_any_call_of_an_epoch_end_costs_that_save_alone(tmp_path, kinds):
    for at in itertools.count(1):
        shutil.rmtree(tmp_path), tmp_path.mkdir()
        has_links(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
        seen, s = [], saver(tmp_path)
        s.resume()
        with crash.Watched(tmp_path, failing(kinds[at % len(kinds)], at, False, seen)):
            try:
                s.save_epoch(state(6, epoch=3), metric=0.9)
            except BaseException as error:
                assert error is kinds[at % len(kinds)], "a full disk must not stop the training"
        if len(seen) < at:
            break
        for path in tmp_path.glob("*.pt"):
            assert path.read_bytes() == before.get(path.name) or sound(checkpoint.load(path)) == 6
        assert {"last.pt", "best.pt"} <= {path.name for path in tmp_path.iterdir()} and recover(tmp_path) in (5, 6)
        assert not temps(tmp_path) or seen[at - 1][0] == "unlink"
        s.save_mid(state(7, epoch=4))
        s.close()
        assert recover(tmp_path) == 7 and not temps(tmp_path)
    assert at > 25


def scenario(directory, returned):
    """Saves of every kind, each told to `returned` once it is durable."""
    with saver(directory) as s:
        for step in (1, 2, 3):
            s.save_mid(state(step))
            returned(step)
        s.save_epoch(state(4, epoch=1), metric=0.5)
        returned(4)
        s.save_mid(state(5, epoch=2, batch=1))
        returned(5)
    with saver(directory) as s:
        s.resume()
        s.save_epoch(state(6, epoch=2), metric=0.7)
        returned(6)


def recover_all(directory):
    """As `recover`, and no file of the directory may load with wrong values."""
    for path in Path(directory).glob("*.pt"):
        with contextlib.suppress(checkpoint.CorruptCheckpoint):
            sound(checkpoint.load(path))
    return recover(directory)


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_no_power_cut_loses_a_save_that_returned(tmp_path, links, monkeypatch):
    if not links:
        def refuse(*arguments, **options):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(os, "link", refuse)
    work = tmp_path / "work"
    with crash.Watched(work) as disk:
        scenario(work, disk.returned)
    states, lost = crash.power_loss(disk.log, work, tmp_path / "after", recover_all)
    print(f"crash states: {states}, lost: {lost}")
    assert states > 100 and lost == 0


@pytest.mark.slow
def test_no_power_cut_loses_a_save_by_the_system_calls_either_and_they_lose_those_of_torch_save(tmp_path):
    if not tracer.available():
        pytest.skip("system calls of a child cannot be traced here")

    def returned(step):
        os.access(f"/returned/{step}", os.F_OK)

    def careless(work):
        for step in (1, 2):
            torch.save(state(step), work / "last.pt")
            returned(step)
    found = {}
    for name, save in (("ours", lambda work: scenario(work, returned)), ("torch", careless)):
        work = tmp_path / name
        work.mkdir()
        trace = tracer.Trace(lambda: save(work), [work])
        states, found[name] = crash.power_loss(trace.log, work, tmp_path / "after", recover_all)
        print(f"{name}: crash states: {states}, lost: {found[name]}")
        assert trace.outcome == "done" and states > 10
    assert found["ours"] == 0 and found["torch"] > 0


@pytest.mark.parametrize("missing", ["fsync of the file", "fsync of the directory"])
def test_without_either_fsync_our_own_saves_would_be_lost(tmp_path, missing):
    work = tmp_path / "work"
    with crash.Watched(work) as disk:
        with saver(work) as s:
            for step in (1, 2):
                s.save_mid(state(step))
                disk.returned(step)
    kept = str if missing == "fsync of the file" else int                   # a directory stands by its path, a file by a number
    log = [entry for entry in disk.log if entry[0] != "fsync" or isinstance(entry[1], kept)]
    assert crash.power_loss(log, work, tmp_path / "after", recover)[1] > 0


@pytest.mark.parametrize("name", crash.NAIVE)
def test_the_same_power_cuts_do_lose_saves_of_careless_writers(tmp_path, name):
    work, blob = tmp_path / "work", {}
    work.mkdir()
    for step in (1, 2, 3):
        checkpoint.atomic_save(state(step), tmp_path / "blob.pt")
        blob[step] = (tmp_path / "blob.pt").read_bytes()
    with crash.Watched(work) as disk:
        for step in (1, 2, 3):
            target = work / ("last.pt" if "keep 1" not in name else f"mid_epoch_001_{step:06d}.pt")
            crash.NAIVE[name](str(target), blob[step])
            disk.returned(step)
    states, lost = crash.power_loss(disk.log, work, tmp_path / "after", recover)
    print(f"{name}: crash states: {states}, lost: {lost}")
    assert lost > 0, f"{name} lost nothing in {states} states: the harness does not bite"


def test_no_damage_anywhere_in_the_file_is_believed(tmp_path):
    path, tried = tmp_path / "last.pt", 0
    checkpoint.atomic_save(state(7), path)
    for what, damaged in damages(path.read_bytes(), random.Random(0), 400):
        path.write_bytes(damaged)
        for read in (checkpoint.load, checkpoint.verify):
            with pytest.raises(checkpoint.CorruptCheckpoint):
                read(path)
                pytest.fail(f"{read.__name__} believed a file with {what}")
        tried += 1
    print(f"damages: {tried}, believed: 0")
    assert tried > 1000


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_single_bit_and_every_length_of_a_small_file_is_checked(tmp_path, bits):
    """bits: of each byte, in turn where not all of them."""
    path = tmp_path / "last.pt"
    checkpoint.atomic_save({"epoch": 1, "m": torch.arange(3.0), "l": [1, 2.5, "x", None]}, path)
    blob = path.read_bytes()
    flipped = (blob[:at] + bytes([blob[at] ^ 1 << (at + bit) % 8]) + blob[at + 1:] for at in range(len(blob)) for bit in range(bits))
    for tried, damaged in enumerate(itertools.chain(flipped, (blob[:length] for length in range(len(blob)))), 1):
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CorruptCheckpoint):
            checkpoint.load(path)
    print(f"bits and lengths: {tried}, believed: 0")
    assert tried == (bits + 1) * len(blob)


def test_a_damaged_file_of_plain_torch_save_never_loads_wrong_and_a_sound_one_loads(tmp_path):
    path, rng, wrong = tmp_path / "last.pt", random.Random(1), 0
    torch.save(state(7), path)
    assert sound(checkpoint.load(path)) == 7 and checkpoint.verify(path)
    for _, damaged in damages(path.read_bytes(), rng, 200, step=9):
        path.write_bytes(damaged)
        try:
            wrong += sound(checkpoint.load(path)) != 7
        except checkpoint.CorruptCheckpoint:
            pass
        except AssertionError:
            wrong += 1
    assert wrong == 0


class Trap:
    def __reduce__(self):
        return os.mkdir, (str(Trap.place),)


def test_a_flipped_bit_in_a_tensor_of_plain_torch_save_is_refused_though_torch_load_believes_it(tmp_path):
    path, believed = tmp_path / "last.pt", 0
    torch.save(state(7), path)
    blob = path.read_bytes()
    start = blob.find(state(7)["model"]["weight"].numpy().tobytes())
    for at in range(start, start + 12_000, 300):
        damaged = bytearray(blob)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        believed += not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], state(7)["model"]["weight"])
        for read in (checkpoint.load, checkpoint.verify, checkpoint.peek):
            with pytest.raises(checkpoint.CorruptCheckpoint, match="CRC-32"):
                read(path)
    assert start > 0 and believed == 40


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    Trap.place = tmp_path / "it_ran"
    torch.save({"epoch": 1, "trap": Trap()}, tmp_path / "last.pt")
    image = checkpoint._Image().fill({"epoch": 1})
    # with every checksum right: the bytes are those that were written
    image.pickled = pickle.dumps({"epoch": 1, "trap": Trap()}, protocol=2)
    checkpoint.atomic_write(tmp_path / "checkpoint_epoch_001.pt", image.file())
    for path in tmp_path.glob("*.pt"):
        for read in (checkpoint.load, checkpoint.verify):
            with pytest.raises(checkpoint.CorruptCheckpoint, match="refuses it"):
                read(path)
    assert checkpoint.find_resume(tmp_path) is None and not Trap.place.exists()


def test_the_loop_of_the_docstring_cut_at_the_last_batch_of_an_epoch_or_beside_it_ends_bit_identical(tmp_path):
    crash.warm()
    assert crash.run_child(lambda: crash.run_loop(tmp_path / "whole")) == "done"
    for step in (1, 19, 20, 21, 40, 60, 99, 100):                          # epochs of 20 batches
        assert crash.run_child(lambda: crash.run_loop(tmp_path / "cut", dies_after=step)) == "killed"
    assert crash.run_child(lambda: crash.run_loop(tmp_path / "cut")) == "done"
    for name in ("last.pt", "best.pt"):
        mine, whole = (checkpoint.load(tmp_path / run / "checkpoints" / name) for run in ("cut", "whole"))
        assert all(crash.same(mine[key], whole[key]) for key in ("model", "optimizer", "epoch", "batch", "global_step"))
        assert mine["holdfast"]["metric"] == whole["holdfast"]["metric"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [15, pytest.param(400, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_bit_identical(tmp_path, kills):
    ended, killed = crash.soak(tmp_path, kills)
    print(f"kills: {killed}, runs that ended equal: {ended}")
    assert killed >= kills


def test_bytes_of_a_save_are_the_same_whenever_and_wherever_it_is_written(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "a.pt")
    checkpoint.atomic_save(state(1), tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert isinstance(torch.load(io.BytesIO((tmp_path / "a.pt").read_bytes()), weights_only=True), dict)
