"""A save that returned is never lost, a damaged file is never believed: kills, errors, power cuts, bit flips."""
import errno
import io
import itertools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import crash

KINDS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR)


def state(step, epoch=1, batch=None):
    """A tiny training state whose every value follows from `step`."""
    weight = torch.arange(3000, dtype=torch.float32) + step
    return {"model": {"weight": weight, "half": torch.full((5,), step, dtype=torch.bfloat16)},
            "optimizer": {"state": {0: {"exp_avg": weight * 2, "step": torch.tensor(float(step))}}, "lr": 0.1 * step},
            "epoch": epoch, "batch": step if batch is None else batch, "global_step": step, "save_counter": step}


def sound(loaded):
    """The step of a loaded state; an assertion error when any value is not that of the step."""
    step = loaded["global_step"]
    expected = state(step)
    assert torch.equal(loaded["model"]["weight"], expected["model"]["weight"])
    assert torch.equal(loaded["model"]["half"], expected["model"]["half"])
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    assert loaded["optimizer"]["lr"] == expected["optimizer"]["lr"]
    return step


def recover(directory):
    """What a resume would do: the step of the chosen file, checked value by value, or None."""
    path = checkpoint.find_resume(directory, lambda line: None)
    return sound(checkpoint.load(path)) if path else None


def saver(directory, **changes):
    options = {"mid_epoch_keep": 2, "checkpoint_keep": 2, "background": False, "say": lambda line: None, **changes}
    return checkpoint.Checkpointer(directory, **options)


def temps(directory):
    return [p.name for p in Path(directory).iterdir() if p.name.endswith(".tmp")]


def test_a_kill_at_every_call_of_a_save_leaves_the_old_file_or_the_new_one(tmp_path):
    found = set()

    def check(directory):
        found.add(sound(checkpoint.load(Path(directory, "last.pt"))))
        checkpoint.atomic_save(state(3), Path(directory, "other.pt"))
        assert not temps(directory), "the temp of the killed process must go at the next save"
    points = crash.kill_sweep(tmp_path / "d", lambda d: checkpoint.atomic_save(state(1), Path(d, "last.pt")),
                              lambda d: checkpoint.atomic_save(state(2), Path(d, "last.pt")), check)
    assert found == {1, 2} and points >= 8
    print(f"kill points: {points}")


def test_a_kill_at_every_call_of_an_epoch_end_with_links_and_rotation_loses_no_returned_save(tmp_path):
    def setup(directory):
        with saver(directory) as s:
            for step in (1, 2, 3):
                s.save_mid(state(step))
            s.save_epoch(state(4, epoch=1), metric=0.5)
            s.save_epoch(state(5, epoch=2), metric=0.4)

    def save(directory):
        with saver(directory) as s:
            s.adopt(checkpoint.load(Path(directory, "last.pt")))
            s.save_epoch(state(6, epoch=3), metric=0.9)

    def check(directory):
        assert recover(directory) in (5, 6)
        for name in ("last.pt", "best.pt"):
            sound(checkpoint.load(Path(directory, name)))
        with saver(directory) as s:
            s.resume()
            s.save_mid(state(7))
        assert recover(directory) == 7 and not temps(directory)
    assert crash.kill_sweep(tmp_path / "d", setup, save, check) >= 20


@pytest.mark.parametrize("error", [*KINDS, MemoryError(), KeyboardInterrupt()], ids=repr)
def test_an_error_at_any_call_leaves_every_earlier_file_and_no_temp_and_no_fsync_is_tried_twice(tmp_path, error):
    path, other = tmp_path / "last.pt", tmp_path / "best.pt"
    for at in itertools.count(1):
        shutil.rmtree(tmp_path), tmp_path.mkdir()
        checkpoint.atomic_save(state(1), path)
        os.link(path, other)
        failed_at, syncs = [], []

        def hook(number, name, arguments):
            syncs.extend([name] * (name == "fsync" and bool(failed_at)))
            if number == at:
                failed_at.append(name)
                return OSError(error, os.strerror(error)) if isinstance(error, int) else error
        with crash.Watched(tmp_path, hook):
            try:
                checkpoint.atomic_save(state(2), path)
                raised = None
            except BaseException as caught:
                raised = caught
        if not failed_at:
            break
        if raised is None:                  # only what cannot harm may be survived: fsync of a directory that has none
            assert failed_at == ["unlink"], f"{failed_at} was swallowed"
        else:
            assert raised.errno == error if isinstance(error, int) else raised is error
        assert sound(checkpoint.load(other)) == 1
        assert sound(checkpoint.load(path)) in (1, 2)
        assert failed_at != ["fsync"] or not syncs, "a failed fsync was tried again"
        assert failed_at == ["unlink"] or not temps(tmp_path)
    assert at > 6


def test_no_power_cut_loses_a_save_that_returned(tmp_path):
    work = tmp_path / "work"
    with crash.Watched(work) as disk, saver(work) as s:
        for step in (1, 2, 3):
            s.save_mid(state(step))
            disk.log.append(("returned", step))
        s.save_epoch(state(4, epoch=1), metric=0.5)
        disk.log.append(("returned", 4))
        s.save_mid(state(5, epoch=2, batch=1))
        disk.log.append(("returned", 5))
        s.save_epoch(state(6, epoch=2), metric=0.7)
        disk.log.append(("returned", 6))
    states, lost = crash.power_loss(disk.log, tmp_path / "after", recover)
    print(f"crash states: {states}, lost: {lost}")
    assert states > 60 and lost == 0


@pytest.mark.parametrize("name", crash.NAIVE)
def test_the_same_power_cuts_do_lose_saves_of_careless_writers(tmp_path, name):
    work = tmp_path / "work"
    work.mkdir()
    blob = {}
    for step in (1, 2, 3):
        checkpoint.atomic_save(state(step), tmp_path / "blob.pt")
        blob[step] = (tmp_path / "blob.pt").read_bytes()
    with crash.Watched(work) as disk:
        for step in (1, 2, 3):
            target = work / ("last.pt" if "keep 1" not in name else f"mid_epoch_001_{step:06d}.pt")
            crash.NAIVE[name](str(target), blob[step])
            disk.log.append(("returned", step))
    states, lost = crash.power_loss(disk.log, tmp_path / "after", recover)
    assert lost > 0, f"{name} lost nothing in {states} states: the harness does not bite"


def damages(blob, rng, flips, step=1):
    """(what, bytes): random bit flips, every structural byte, truncations, zeroed and swapped blocks."""
    headers = [m.start() + i for m in re.finditer(rb"PK[\1-\7][\2-\10]", blob) for i in range(0, 46)]
    tail = range(blob.rfind(b"archive/data.pkl"), len(blob))
    for at in [*rng.choices(range(len(blob)), k=flips), *headers[::step], *tail[::step]]:
        if at < len(blob):
            damaged = bytearray(blob)
            damaged[at] ^= 1 << rng.randrange(8)
            yield f"bit flip at {at}", damaged
    for length in [0, 1, 4, 22, *rng.choices(range(len(blob)), k=60), len(blob) - 1]:
        yield f"truncated to {length}", blob[:length]
    for at in range(0, len(blob), 512):
        if any(blob[at:at + 512]):
            yield f"512 zeros at {at}", blob[:at] + bytes(len(blob[at:at + 512])) + blob[at + 512:]
    for at in range(0, len(blob) - 8192, 4096):
        if blob[at:at + 4096] != blob[at + 4096:at + 8192]:
            yield f"blocks swapped at {at}", blob[:at] + blob[at + 4096:at + 8192] + blob[at:at + 4096] + blob[at + 8192:]
    yield "bytes appended", blob + b"\0" * 100


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


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    Trap.place = tmp_path / "it_ran"
    torch.save({"epoch": 1, "trap": Trap()}, tmp_path / "last.pt")
    for read in (checkpoint.load, checkpoint.verify):
        with pytest.raises(checkpoint.CorruptCheckpoint, match="refuses it"):
            read(tmp_path / "last.pt")
    assert checkpoint.find_resume(tmp_path) is None and not Trap.place.exists()


def docstring_loop():
    code = checkpoint.__doc__.split("kill it whenever you like:")[1].split("\n\nA checkpoint is")[0]
    return "\n".join(line[4:] for line in code.splitlines())


def run_loop(directory, epochs=6):
    """The docstring's loop in this process, quietly, in `directory`."""
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    exec(compile(docstring_loop().replace("range(epoch, 6)", f"range(epoch, {epochs})"), "docstring", "exec"), {})


@pytest.mark.parametrize("kills", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_bit_identical(tmp_path, kills):
    start = time.monotonic()
    assert crash.run_child(lambda: run_loop(tmp_path / "whole")) == "done"
    length, rng, killed = time.monotonic() - start, random.Random(0), 0
    while True:
        pid = os.fork()
        if pid == 0:
            run_loop(tmp_path / "cut")
            os._exit(0)
        if killed < kills:
            time.sleep(rng.uniform(0, length / 4))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            assert status == 0
            if killed >= kills:
                break
            shutil.rmtree(tmp_path / "cut")
    mine, whole = (checkpoint.load(tmp_path / name / "checkpoints/last.pt") for name in ("cut", "whole"))
    assert mine["global_step"] == whole["global_step"]
    for key in whole["model"]:
        assert torch.equal(mine["model"][key], whole["model"][key])
    for key, value in whole["optimizer"]["state"][0].items():
        assert torch.equal(mine["optimizer"]["state"][0][key], value)


def test_bytes_of_a_save_are_the_same_whenever_and_wherever_it_is_written(tmp_path):
    checkpoint.atomic_save(state(1), tmp_path / "a.pt")
    checkpoint.atomic_save(state(1), tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert isinstance(torch.load(io.BytesIO((tmp_path / "a.pt").read_bytes()), weights_only=True), dict)
