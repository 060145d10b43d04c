"""Two faults at a time: a kill in the middle of a change of several files, a folder that is no longer what its path says, a
second copy with two holders, a disk that fills and empties. Each ends as if nothing had happened, or is refused in one line."""
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import crash
import forked
import tracer
from conftest import ROOT
from crash import sound, state
from helpers import loaded, rest, spawn_hooked
from run.listing import taken_by_resume
from run.mirror import Mirrored
from test_crash import recover, saver, temps
from test_mirror import copied, flip, mirrored, names, quiet, spoil_full, until


def metric(path):
    return (checkpoint.peek(path)["metric"] or {}).get("value") if path.exists() else None


# ---- a change of several files, interrupted ----

def went_on(directory):
    """Four epochs whose best is the third."""
    with saver(directory, checkpoint_keep=0) as s:
        for epoch, value in enumerate((0.5, 0.6, 0.9, 0.4), 1):
            s.save_epoch(state(10 * epoch, epoch=epoch), metric=value)


@pytest.mark.slow
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("again", ["the same command", "plain"])
def test_going_back_to_a_file_killed_anywhere_ends_with_the_best_of_the_line_that_goes_on(tmp_path, again, every):
    def back(directory):
        with saver(directory, checkpoint_keep=0) as s:
            s.resume(directory / "checkpoint_epoch_002.pt")

    def check(directory):
        with saver(directory, checkpoint_keep=0) as s:
            got = s.resume(directory / "checkpoint_epoch_002.pt" if again == "the same command" else True)
            if got["global_step"] == 40:    # killed before anything was changed: the old line, whole
                assert metric(directory / "best.pt") == 0.9
                return
            assert got["global_step"] == 20 and metric(directory / "best.pt") == 0.6
            assert not s.save_epoch(state(31, epoch=3), metric=0.55) and metric(directory / "best.pt") == 0.6
        assert not temps(directory)
    assert crash.kill_sweep(tmp_path / "d", went_on, back, check, every=every) > 20 / every


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", [pytest.param("old/last.pt", id="in another folder"),
                                    pytest.param("d/kept.pt", id="of a line left before", marks=pytest.mark.slow)])
def test_the_best_of_a_line_that_is_gone_back_to_comes_along_also_over_a_kill(tmp_path, source, every):
    def two_lines(directory):
        place = directory if source == "d/kept.pt" else tmp_path / "old"
        with saver(place, checkpoint_keep=1) as s:
            for epoch, value in enumerate((0.3, 0.9, 0.4), 1):
                s.save_epoch(state(10 * epoch, epoch=epoch), metric=value)
                shutil.copy(place / "last.pt", place / ("kept.pt" if epoch > 1 else "early.pt"))
        with saver(directory, checkpoint_keep=1) as s:
            if place == directory:
                s.resume(place / "early.pt")
            s.save_epoch(state(11, epoch=2), metric=0.5)

    def back(directory):
        with saver(directory, checkpoint_keep=1) as s:
            s.resume(directory.parent / source)

    def check(directory):
        with saver(directory, checkpoint_keep=1) as s:
            went_back = s.resume()["global_step"] == 30
            assert metric(directory / "best.pt") == (0.9 if went_back else 0.5)
            assert not went_back or not s.save_epoch(state(31, epoch=4), metric=0.6)
        assert not temps(directory)
    assert crash.kill_sweep(tmp_path / "d", two_lines, back, check, every=every) > 20 / every


@pytest.mark.parametrize("second", [False, True], ids=["alone", "with a second copy"])
def test_a_best_that_was_made_more_starts_ago_than_a_save_names_stays_the_best(tmp_path, monkeypatch, second):
    monkeypatch.setattr(checkpoint, "MAX_STARTS", 4)
    home, said = tmp_path / "results/v3/checkpoints", []
    place = {"mirror": tmp_path / "nas"} if second else {}
    with (Mirrored if second else saver)(home, say=said.append, **place) as s:
        s.save_epoch(state(1, epoch=1), metric=0.9)
    for step in range(2, 12):
        with (Mirrored if second else saver)(home, say=said.append, **place) as s:
            s.resume()
            assert metric(home / "best.pt") == 0.9
            s.save_mid(state(step, epoch=2))
            assert len(s.starts) <= 4
    assert not any("abandoned" in line or "another start" in line for line in said)
    with saver(home, checkpoint_keep=0) as s:           # a line that is left is still known as such
        s.resume()
        s.save_epoch(state(12, epoch=2), metric=0.95)
    with saver(home) as s:
        s.resume(home / "checkpoint_epoch_001.pt")
    assert metric(home / "best.pt") == 0.9 and list(home.glob("abandoned_best_*.pt"))


def as_copied(directory):
    """Every name a file of its own, as after `cp -r`."""
    for path in directory.glob("*.pt"):
        path.write_bytes(path.read_bytes())
        shutil.copy(path, path.with_suffix(".copy"))
        os.replace(path.with_suffix(".copy"), path)


def test_no_damaged_file_becomes_last_or_best(tmp_path):
    went_on(tmp_path)
    as_copied(tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink()
    flip(tmp_path / "checkpoint_epoch_004.pt")
    flip(tmp_path / "checkpoint_epoch_002.pt")
    said = []
    with saver(tmp_path, checkpoint_keep=0, say=said.append) as s:
        assert s.resume()["global_step"] == 30
    assert [checkpoint.peek(tmp_path / name)["epoch"] for name in ("last.pt", "best.pt")] == [3, 3]
    assert checkpoint.verify(tmp_path / "last.pt") and checkpoint.verify(tmp_path / "best.pt")
    assert any(line.startswith("resume: checkpoint_epoch_002.pt is not named best.pt") for line in said)


@pytest.mark.parametrize("linked", [False, True], ids=["copied", "linked"])
def test_a_damaged_best_is_set_aside_and_the_best_of_what_is_left_takes_its_place(tmp_path, linked):
    went_on(tmp_path)
    if not linked:
        as_copied(tmp_path)
    with open(tmp_path / "best.pt", "r+b") as file:     # all of its names
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    said = []
    with saver(tmp_path, checkpoint_keep=0, say=said.append) as s:
        assert s.resume()["global_step"] == 40
        assert metric(tmp_path / "best.pt") == (0.6 if linked else 0.9)
        assert checkpoint.verify(tmp_path / "best.pt")
        assert s.save_epoch(state(50, epoch=5), metric=0.7) is linked
    assert any("best.pt is damaged" in line and "best.pt.damaged" in line for line in said)


@pytest.mark.parametrize("there", ["damaged too", "sound", "out of reach"])
@pytest.mark.parametrize("back", [False, True], ids=["resumed", "gone back to a file"])
def test_a_damaged_best_is_set_aside_once_no_second_copy_can_mend_it(tmp_path, there, back):
    s, said = mirrored(tmp_path, checkpoint_keep=0)
    home, place = s.directory, s.place
    with s:
        for epoch, value in enumerate((0.5, 0.9, 0.4), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=value)
        until(lambda: copied(s), said)
    for path in (home / "best.pt", place / "best.pt")[:2 if there == "damaged too" else 1]:
        flip(path)                              # on the home's disk all names of it
    if there == "out of reach":
        (tmp_path / "nas").rename(tmp_path / "off")
    s, said = mirrored(tmp_path, checkpoint_keep=0)
    with s:
        s.resume(home / "last.pt" if back else True)
        found = metric(home / "best.pt")
        assert found == (0.9 if there != "damaged too" else 0.5), said
        assert (checkpoint.damage_of(home / "best.pt") == "") is (there != "out of reach")
    if there == "out of reach":
        shutil.rmtree(tmp_path / "nas")
        (tmp_path / "off").rename(tmp_path / "nas")
        s, said = mirrored(tmp_path)
        with s:
            s.resume()
            assert metric(home / "best.pt") == 0.9 and checkpoint.verify(home / "best.pt")


def test_a_second_copy_that_got_the_best_and_not_yet_the_last_goes_on_when_home_is_lost(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
        until(lambda: copied(s), said)
        mid = next(s.place.glob("mid_epoch_*.pt")).read_bytes()
        s.save_epoch(state(2, epoch=1), metric=0.9)
    for path in s.place.glob("*.pt"):           # as a kill leaves it after the first of its files
        if path.name != "best.pt":
            path.unlink()
    (s.place / "mid_epoch_001_000001.pt").write_bytes(mid)
    shutil.rmtree(tmp_path / "results")
    for step in (2, 3):
        s, said = mirrored(tmp_path)
        with s:
            assert s.resume()["global_step"] == step - 1
            s.save_mid(state(step))
            until(lambda: copied(s) or s.apart, said)
        assert not s.apart and recover(s.place) == step, said
    with mirrored(tmp_path)[0] as s:
        s.resume()
        s.save_epoch(state(4, epoch=1), metric=0.5)
    assert metric(s.place / "best.pt") == 0.5 and [metric(p) for p in s.place.glob("abandoned_best_*.pt")] == [0.9]


@pytest.mark.parametrize("lost", [True, False], ids=["home lost", "home damaged too"])
def test_a_second_copy_whose_newest_state_is_damaged_is_written_again(tmp_path, lost):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
        s.save_mid(state(2))
        until(lambda: copied(s), said)
    flip(s.place / "mid_epoch_001_000002.pt")
    if lost:
        shutil.rmtree(tmp_path / "results")
    else:
        flip(s.directory / "mid_epoch_001_000002.pt")
    for step in (3, 4):
        s, said = mirrored(tmp_path)
        with s:
            assert s.resume()["global_step"] == (1 if step == 3 else 3)
            s.save_mid(state(step))
            until(lambda: copied(s) or s.apart, said)
        assert not s.apart and recover(s.place) == step, said


def test_a_damaged_best_of_a_line_that_was_left_holds_up_no_second_copy_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "links_work", lambda directory: False)
    s, said = mirrored(tmp_path)
    with s:
        for epoch, value in enumerate((0.5, 0.9), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=value)
    flip(s.place / "best.pt")
    s, said = mirrored(tmp_path)
    with s:
        s.resume(s.directory / "checkpoint_epoch_001.pt")
        s.save_mid(state(3, epoch=2))
        until(lambda: s.trouble or s.copied_at and copied(s), said)
    assert recover(s.place) == 3 and metric(s.place / "best.pt") == 0.5, said


def test_an_epoch_that_waits_for_room_is_written_before_it_is_asked_what_is_best(small_disk):
    directory = small_disk / "run"
    with saver(directory) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        empty = spoil_full(small_disk)
        assert s.save_epoch(state(2, epoch=2), metric=0.9)
        empty()
        assert not s.save_epoch(state(3, epoch=3), metric=0.7)
    assert sound(checkpoint.load(directory / "best.pt")) == 2 and recover(directory) == 3


def test_a_best_that_a_resume_has_no_room_to_name_is_the_bar_and_stays(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "links_work", lambda directory: False)
    directory = small_disk / "run"
    with saver(directory) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        s.save_epoch(state(2, epoch=2), metric=0.9)
    for name in ("last.pt", "best.pt"):         # as killed before the second epoch got its other names
        shutil.copy(directory / "checkpoint_epoch_001.pt", directory / name)
    empty, said = spoil_full(small_disk), []
    with saver(directory, say=said.append) as s:
        s.resume()
        assert metric(directory / "best.pt") == 0.5 and metric(s.best_path) == 0.9
        assert any("best.pt could not be named anew: No space left" in line for line in said)
        empty()
        assert not s.save_epoch(state(3, epoch=3), metric=0.6)
    assert metric(directory / "best.pt") == 0.9


def test_a_best_that_was_written_and_not_named_before_it_was_given_up_stays_the_best(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "links_work", lambda directory: False)
    directory, filler = small_disk / "run", small_disk / "filler"
    with saver(directory, checkpoint_keep=1) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        room = os.statvfs(small_disk)
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize - (directory / "last.pt").stat().st_size * 3 // 2))
        assert s.save_epoch(state(2, epoch=2), metric=0.9) and metric(directory / "best.pt") == 0.5
        assert metric(directory / "checkpoint_epoch_002.pt") == 0.9
        assert not s.save_epoch(state(3, epoch=3), metric=0.6)          # nor is there room for this one
        filler.unlink()
    with saver(directory, checkpoint_keep=1) as s:
        assert s.resume()["global_step"] == 3
    assert metric(directory / "best.pt") == 0.9


def test_a_last_snapshot_waits_for_the_epoch_that_waits_for_room(small_disk):
    directory = small_disk / "run"
    with saver(directory) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        empty = spoil_full(small_disk)
        s.save_epoch(state(2, epoch=2), metric=0.9)
        assert not s.save_mid(state(3, epoch=3))
        timer = threading.Timer(2, empty)
        timer.start()
        assert s.save_mid(state(4, epoch=3), last=True)
        timer.join()
    assert sound(checkpoint.load(directory / "best.pt")) == 2 and recover(directory) == 4


def whole_run(home, nas):
    with Mirrored(home, mirror=nas, say=quiet, mid_epoch_minutes=0, background=False) as s:
        s.resume()
        for epoch, value in ((1, 0.5), (2, 0.9), (3, 0.6)):
            with open(home.parent / "metrics.jsonl", "a") as rows:
                rows.write(f'{{"step": {10 * epoch}}}\n')
            s.save_epoch(state(10 * epoch, epoch=epoch), metric=value)
        s.save_mid(state(33, epoch=4, batch=3))


@pytest.mark.parametrize("every", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_coming_home_from_the_second_copy_killed_anywhere_is_done_again(tmp_path, every):
    if not tracer.available():
        pytest.skip("system calls of a child cannot be traced here")
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    whole_run(home, nas)
    shutil.copytree(nas, tmp_path / "start", symlinks=True)

    def resume():
        s = Mirrored(home, mirror=nas, say=quiet)
        assert s.resume()["global_step"] == 33
        s._lock.close()
        os._exit(0)
    for at in range(1, 10_000, every):
        shutil.rmtree(home.parent, ignore_errors=True)
        shutil.rmtree(nas)
        subprocess.run(["cp", "-a", tmp_path / "start", nas], check=True)
        trace = tracer.Trace(resume, [str(home.parent), str(nas)], at=at)
        with Mirrored(home, mirror=nas, say=quiet) as s:
            assert s.resume()["global_step"] == 33
            assert (home.parent / "metrics.jsonl").read_text().count("\n") == 3, at
            assert not s.save_epoch(state(40, epoch=4), metric=0.7), at
        for place in (home, nas / "v3/checkpoints"):
            assert metric(place / "best.pt") == 0.9 and recover(place) == 40, at
        if trace.outcome != "killed":
            break
    assert at > 50


def test_a_home_without_room_comes_home_when_there_is_room(tmp_path, small_disk):
    nas = tmp_path / "nas"
    whole_run(tmp_path / "results/v3/checkpoints", nas)
    home = small_disk / "v3/checkpoints"
    (small_disk / "gap").write_bytes(bytes(2 * (nas / "v3/checkpoints/last.pt").stat().st_size))
    empty = spoil_full(small_disk)
    (small_disk / "gap").unlink()
    with pytest.raises(OSError) as full:
        s = Mirrored(home, mirror=nas, say=quiet)
        try:
            s.resume()
        finally:
            s.close()
    assert full.value.errno == errno.ENOSPC
    empty()
    with Mirrored(home, mirror=nas, say=quiet) as s:
        assert s.resume()["global_step"] == 33 and not s.save_epoch(state(40, epoch=4), metric=0.7)
    assert metric(home / "best.pt") == 0.9 == metric(nas / "v3/checkpoints/best.pt")
    assert (home.parent / "metrics.jsonl").read_text().count("\n") == 3


def test_a_best_that_went_to_the_second_copy_alone_is_not_overwritten_by_the_homes_older_one(tmp_path, small_disk):
    (tmp_path / "results").symlink_to(small_disk)
    home, place = small_disk / "v3/checkpoints", tmp_path / "nas/v3/checkpoints"
    s, said = mirrored(tmp_path)
    s.save_epoch(state(1, epoch=1), metric=0.5)
    until(lambda: copied(s), said)
    (small_disk / "gap").write_bytes(bytes((home / "last.pt").stat().st_size * 3 // 2))
    empty = spoil_full(small_disk)
    s.save_epoch(state(2, epoch=2), metric=0.9)
    s.wait()
    (small_disk / "gap").unlink()
    s.save_mid(state(3, epoch=3))
    s.wait()
    until(lambda: copied(s), said)
    s._lock.close()                         # as a SIGKILL does
    empty()
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 3 and metric(home / "best.pt") == 0.9
        assert not s.save_epoch(state(4, epoch=3), metric=0.7)
    assert metric(home / "best.pt") == 0.9 == metric(place / "best.pt")


# ---- a place is its identity, not its path ----

def mounted_over(directory):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    return lambda: subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.parametrize("how", ["moved away", "mounted over"])
def test_a_live_run_whose_folder_was_replaced_writes_nothing_into_the_new_one_and_says_so(tmp_path, how):
    results, clean = tmp_path / "results", contextlib.ExitStack()
    home = results / "v3/checkpoints"
    with clean:
        old = saver(home, background=False)
        old.save_mid(state(5))
        if how == "moved away":
            (results / "v3").rename(results / "v3_old")
        else:
            clean.callback(mounted_over(results))
        with saver(home) as new:
            new.save_epoch(state(1, epoch=1), metric=0.1)
            before = {p.name: p.read_bytes() for p in home.glob("*.pt")}
            with pytest.raises(checkpoint.SaveFailed, match="is not the folder that this run holds"):
                old.save_mid(state(6))
            old.close()
            assert {p.name: p.read_bytes() for p in home.glob("*.pt")} == before
        with saver(home) as again:
            assert again.resume()["global_step"] == 1


def test_a_live_run_whose_folder_was_deleted_and_made_again_goes_on_in_it_and_holds_it(tmp_path):
    home = tmp_path / "checkpoints"
    with saver(home, background=False) as run:
        run.save_mid(state(1))
        home.rename(tmp_path / "old")
        home.mkdir()                                # another inode than that of before
        shutil.rmtree(tmp_path / "old")
        run.save_mid(state(2))
        with pytest.raises(checkpoint.InUse):
            saver(home)
    assert recover(home) == 2


def test_a_live_run_whose_folder_was_moved_leaves_the_second_copy_to_the_start_that_took_its_place(tmp_path):
    results, place = tmp_path / "results", tmp_path / "nas/v3/checkpoints"
    old, _ = mirrored(tmp_path)
    old.save_mid(state(1))
    until(lambda: copied(old))
    (results / "v3").rename(results / "v3_old")
    old.save_mid(state(2))                          # gone from its path, as with a dead disk
    assert recover(place) == 2
    new, _ = mirrored(tmp_path)
    with new:
        with new.writing:                           # it has not come to its first copy yet
            assert new.resume()["global_step"] == 2
            with pytest.raises(checkpoint.Moved):
                old.save_mid(state(3) | {"who": "old"})
        old.close()
        new.save_mid(state(3) | {"who": "new"})
    assert all(checkpoint.load(path)["who"] == "new" for path in tmp_path.rglob("*_000003.pt"))


def test_a_lock_file_that_somebody_deleted_is_taken_anew(tmp_path):
    with saver(tmp_path) as s:
        s.save_mid(state(1))
        (tmp_path / ".lock").unlink()
        s.save_mid(state(2))
        with pytest.raises(checkpoint.InUse):
            checkpoint.lock(tmp_path)
    assert recover(tmp_path) == 2


def test_of_two_copies_of_a_run_with_one_second_copy_the_later_start_has_it_and_neither_loses_its_line(tmp_path):
    def begin(name):
        s = Mirrored(tmp_path / name / "v3/checkpoints", mirror=tmp_path / "nas", say=said.append, mid_epoch_minutes=0,
                     background=False)
        s.resume()
        until(lambda: copied(s), said)
        return s
    said = []
    with begin("a") as s:
        s.save_mid(state(1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = begin("a"), begin("b")
    for batch in (2, 3, 4):
        a.save_mid(state(batch) | {"who": "a"})
        until(lambda: copied(a), said)
        b.save_mid(state(batch) | {"who": "b"})
        until(lambda: copied(b), said)
    b.save_mid(state(5) | {"who": "b"})
    until(lambda: copied(b), said)
    a.close(), b.close()
    place = tmp_path / "nas/v3/checkpoints"
    assert {checkpoint.load(path)["who"] for path in place.glob("*.pt")} == {"b"}
    assert any("a later start of this run writes there: nothing is written" in line for line in said), said
    for name, step in (("a", 4), ("b", 5)):
        with begin(name) as s:
            told = taken_by_resume(s.directory, place)      # what `ls` says
            got = s.resume()
            assert (got["who"], got["global_step"], told.facts["global_step"]) == (name, step, step)


def test_a_second_copy_that_comes_back_over_one_made_meanwhile_is_written_again(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
    (tmp_path / "nas").rename(tmp_path / "off")     # not mounted at the next start
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 1
        s.save_mid(state(2))
        until(lambda: copied(s), said)
        (tmp_path / "nas").rename(tmp_path / "below")
        (tmp_path / "off").rename(tmp_path / "nas")
        s.save_mid(state(3))
        until(lambda: copied(s) or s.apart, said)
    assert recover(tmp_path / "nas/v3/checkpoints") == 3 and not s.apart, said


def test_a_home_that_comes_back_old_overwrites_nothing_newer_in_a_late_second_copy_and_goes_on_from_there(tmp_path):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "mnt/nas"
    said = []

    def begin():
        return Mirrored(home, mirror=nas, say=said.append, mid_epoch_minutes=0, background=False, save_patience_minutes=0)
    with begin() as s:
        s.save_mid(state(1))
        until(lambda: copied(s), said)
        home.parent.rename(tmp_path / "disk")           # dead: states go to the second copy alone
        for batch in (2, 3, 4, 5):
            s.save_mid(state(batch))
    (tmp_path / "disk").rename(home.parent)
    (tmp_path / "mnt").rename(tmp_path / "off")
    with begin() as s:                                  # a boot without the network disk
        assert s.resume()["global_step"] == 1
        s.save_mid(state(2))
        until(lambda: copied(s), said)                  # nobody writes there while the disk is changed
        shutil.rmtree(tmp_path / "mnt")
        (tmp_path / "off").rename(tmp_path / "mnt")
        s.save_mid(state(3))
        until(lambda: s.apart, said)
    assert recover(nas / "v3/checkpoints") == 5, "the older line has overwritten nothing"
    with begin() as s:
        assert s.resume()["global_step"] == 5


def test_a_second_copy_that_the_home_has_overtaken_from_an_older_save_is_written_again(tmp_path):
    home, nas = tmp_path / "results/v3", tmp_path / "nas"
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
        s.wait()
        shutil.copytree(home, tmp_path / "older")
        s.save_mid(state(2))
    shutil.rmtree(home)
    (tmp_path / "older").rename(home)               # put back, while the second copy is out of reach
    nas.rename(tmp_path / "off")
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 1
        s.save_mid(state(2))
        s.save_mid(state(3))
    shutil.rmtree(nas)
    (tmp_path / "off").rename(nas)
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 3
        s.save_mid(state(4))
    assert recover(nas / "v3/checkpoints") == 4, said


def test_after_going_back_to_a_file_of_the_second_copy_a_plain_resume_follows_that_line(tmp_path):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    with Mirrored(home, mirror=nas, say=quiet, mid_epoch_minutes=0, background=False) as s:
        s.save_epoch(state(10, epoch=1) | {"line": 1}, metric=0.9)
        s.save_mid(state(15, epoch=2, batch=5) | {"line": 1})
    shutil.rmtree(tmp_path / "results")
    with Mirrored(home, mirror=nas, say=quiet, mid_epoch_minutes=0, background=False) as s:
        s.resume(nas / "v3/checkpoints/best.pt")
        s.save_mid(state(12, epoch=2, batch=2) | {"line": 2})
    assert metric(home / "best.pt") == 0.9, "the best of the line came home"
    for lost in (False, True):
        if lost:
            shutil.rmtree(tmp_path / "results")
        with Mirrored(home, mirror=nas, say=quiet, background=False) as s:
            assert s.resume()["line"] == 2


@pytest.mark.parametrize("away", [False, True], ids=["second copy there", "second copy away meanwhile"])
def test_who_goes_back_too_far_and_then_to_a_later_file_keeps_the_second_copy_and_the_last_line(tmp_path, away):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    options = {"mirror": nas, "mid_epoch_minutes": 0, "checkpoint_interval": 0}

    def trained(resume, save):
        said = []
        with Mirrored(home, say=said.append, **options) as s:
            found = s.resume(resume) if resume else None
            save(s)
            until(lambda: copied(s) or s.apart or not nas.exists(), said)
            assert not s.apart, said
        return found

    def first(s):
        for epoch, value in enumerate((0.5, 0.9, 0.7), 1):
            s.save_epoch(state(10 * epoch, epoch=epoch), metric=value)
            s.wait()
            shutil.copy(home / "last.pt", tmp_path / f"kept_{epoch}.pt")
    trained(None, first)
    trained(tmp_path / "kept_1.pt", lambda s: s.save_epoch(state(21, epoch=2), metric=0.6))
    if away:
        nas.rename(tmp_path / "off")
    trained(tmp_path / "kept_3.pt", lambda s: s.save_epoch(state(41, epoch=4), metric=0.8))
    if away:
        shutil.rmtree(nas)              # made anew meanwhile
        (tmp_path / "off").rename(nas)
    assert trained(True, lambda s: s.save_mid(state(42, epoch=5, batch=1)))["global_step"] == 41
    assert checkpoint.peek(home / "last.pt")["global_step"] == 41
    shutil.rmtree(tmp_path / "results")
    assert trained(True, lambda s: s.wait())["global_step"] == 42


def test_who_went_back_twice_overwrites_no_line_that_another_copy_of_the_run_has_gone_on_with(tmp_path):
    nas, said = tmp_path / "nas", []

    def trained(resume, *batches, results="results", mirror=nas):
        with Mirrored(tmp_path / results / "v3/checkpoints", mirror=mirror, say=said.append, mid_epoch_keep=0) as s:
            s.resume(resume)
            for batch in batches:
                s.save_mid(state(batch))
                s.wait()
            until(lambda: copied(s) or s.apart, said)
    kept = tmp_path / "results/v3/checkpoints"
    trained(True, 1, 2)
    shutil.copytree(tmp_path / "results", tmp_path / "copy")
    trained(True, 4, 5, results="copy", mirror=tmp_path / "other")
    trained(True, 3)
    shutil.copy(kept / "mid_epoch_001_000003.pt", tmp_path / "three.pt")
    trained(kept / "mid_epoch_001_000001.pt", 2)
    trained(tmp_path / "three.pt", 6)
    assert not any(line.startswith("mirror:") and "nothing is written" in line for line in said), said
    nas.rename(tmp_path / "off")
    (tmp_path / "other").rename(nas)
    before = {path.name: path.read_bytes() for path in nas.glob("v3/checkpoints/*.pt")}
    trained(True, 7)
    assert {path.name: path.read_bytes() for path in nas.glob("v3/checkpoints/*.pt")} == before
    assert recover(kept) == 7 and any("it holds another line of this run" in line for line in said), said


def closed_streams(script, *arguments):
    command = " ".join(f"'{word}'" for word in (sys.executable, "-c", script, str(ROOT), *map(str, arguments)))
    return subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"], timeout=600).returncode


@pytest.mark.slow
def test_no_file_becomes_a_standard_stream_where_those_are_closed(tmp_path):
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import checkpoint, torch
real = checkpoint._write_all
def watched(fd, buffers):
    os.kill(os.getpid(), signal.SIGTERM)            # its line goes to descriptor 2
    return real(fd, buffers)
checkpoint._write_all = watched
with checkpoint.Signals() as signals:
    checkpoint.atomic_save({"epoch": 1, "batch": 1, "w": torch.zeros(1000)}, sys.argv[2])
    with checkpoint.lock(os.path.dirname(sys.argv[2])) as held:
        assert held.fd > 2
sys.exit(signals.number)
"""
    assert closed_streams(script, tmp_path / "last.pt") == signal.SIGTERM
    assert checkpoint.verify(tmp_path / "last.pt")


# ---- what passes is not what lasts, and damage is neither ----

def test_a_bad_sector_is_passed_where_the_second_copy_has_the_same_save(tmp_path, monkeypatch):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    whole_run(home, nas)
    real, bad = checkpoint.load, home / "mid_epoch_004_000003.pt"

    def load(path, *others):
        if Path(path) == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *others)
    monkeypatch.setattr(checkpoint, "load", load)
    said = []
    with Mirrored(home, mirror=nas, say=said.append) as s:
        assert s.resume()["global_step"] == 33
    assert any("the same save is elsewhere" in line for line in said)
    monkeypatch.undo()
    shutil.rmtree(nas)
    monkeypatch.setattr(checkpoint, "load", load)
    with Mirrored(home, mirror=nas, say=quiet) as s, pytest.raises(OSError):
        s.resume()


@pytest.mark.parametrize("spoil", [lambda path: os.truncate(path, 99), os.unlink], ids=["truncated", "deleted"])
def test_a_best_that_is_spoiled_under_a_live_run_comes_back_from_the_second_copy_before_a_worse_one_takes_its_place(
        tmp_path, spoil):
    s, said = mirrored(tmp_path, checkpoint_interval=0)
    with s:
        for epoch, value in enumerate((0.9, 0.4), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=value)
        until(lambda: copied(s), said)
        spoil(s.directory / "best.pt")
        assert not s.save_epoch(state(3, epoch=3), metric=0.5)
        until(lambda: copied(s), said)
        assert [metric(place / "best.pt") for place in (s.directory, s.place)] == [0.9, 0.9]
    assert sum("best.pt was taken from" in line for line in said) == 1


@pytest.mark.parametrize("where", ["home", "second copy"])
def test_a_flip_in_best_of_one_place_is_mended_from_the_other_at_the_next_start(tmp_path, where):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    whole_run(home, nas)
    place = {"home": home, "second copy": nas / "v3/checkpoints"}[where]
    flip(place / "best.pt")
    (place / "mid_epoch_009_000001.pt").symlink_to("nowhere")
    said = []
    with Mirrored(home, mirror=nas, say=said.append) as s:
        assert s.resume()["global_step"] == 33
    assert checkpoint.verify(place / "best.pt") and metric(place / "best.pt") == 0.9
    assert any(f"{place / 'best.pt'} is damaged" in line for line in said)


def unreadable(path):
    path.rename(path.with_suffix(".kept"))
    path.symlink_to("/proc/self/mem")               # EIO, from the kernel


def test_a_file_that_cannot_be_read_is_not_overwritten_by_that_of_the_second_copy(tmp_path):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    whole_run(home, nas)
    with saver(home) as s:                          # without the second copy
        s.resume()
        s.save_epoch(state(40, epoch=4), metric=0.95)
    for name in ("last.pt", "best.pt", "checkpoint_epoch_004.pt"):
        unreadable(home / name)
    with Mirrored(home, mirror=nas, say=quiet) as s, pytest.raises(OSError) as fault:
        s.resume()
    assert fault.value.errno == errno.EIO
    assert all((home / name).is_symlink() for name in ("last.pt", "best.pt", "checkpoint_epoch_004.pt"))


def test_going_back_to_a_file_overwrites_no_best_that_cannot_be_read_now(tmp_path):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    whole_run(home, nas)
    with saver(home, checkpoint_keep=0) as s:       # without the second copy
        s.resume()
        s.save_epoch(state(40, epoch=4), metric=0.95)
    unreadable(home / "best.pt")
    shutil.copy(home / "checkpoint_epoch_003.pt", tmp_path / "kept.pt")
    with Mirrored(home, mirror=nas, say=quiet) as s:
        assert s.resume(tmp_path / "kept.pt")["global_step"] == 30
    assert (home / "best.pt").is_symlink()
    (home / "best.kept").replace(home / "best.pt")
    with Mirrored(home, mirror=nas, say=quiet) as s:
        assert s.resume()["global_step"] == 30 and metric(home / "best.pt") == 0.9
    assert [metric(path) for path in home.glob("abandoned_best_*.pt")] == [0.95]


def test_a_lost_home_waits_for_a_best_of_the_second_copy_that_cannot_be_read(tmp_path):
    home, place = tmp_path / "results/v3/checkpoints", tmp_path / "nas/v3/checkpoints"
    whole_run(home, tmp_path / "nas")
    shutil.rmtree(home.parent)
    unreadable(place / "best.pt")
    with Mirrored(home, mirror=tmp_path / "nas", say=quiet) as s, pytest.raises(OSError, match="best.pt"):
        s.resume()
    (place / "best.kept").rename(place / "best.pt")
    with Mirrored(home, mirror=tmp_path / "nas", say=quiet) as s:
        assert s.resume()["global_step"] == 33 and metric(home / "best.pt") == 0.9


def test_a_file_of_the_second_copy_that_cannot_be_read_is_replaced_by_the_next_state(tmp_path):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    whole_run(home, nas)
    unreadable(nas / "v3/checkpoints/last.pt")
    with Mirrored(home, mirror=nas, say=quiet) as s:
        assert s.resume()["global_step"] == 33
        s.save_epoch(state(40, epoch=4), metric=0.5)
    assert recover(nas / "v3/checkpoints") == 40 and checkpoint.verify(nas / "v3/checkpoints/last.pt")


def test_the_end_of_an_epoch_that_cannot_be_read_is_passed_where_last_is_the_same_save(tmp_path):
    with saver(tmp_path) as s:
        s.save_epoch(state(10, epoch=1))
    unreadable(tmp_path / "checkpoint_epoch_001.pt")
    with saver(tmp_path) as s:
        assert s.resume()["global_step"] == 10


def test_a_flip_at_home_and_one_in_the_second_copy_leave_the_save_before(tmp_path):
    home, nas = tmp_path / "results/v3/checkpoints", tmp_path / "nas"
    whole_run(home, nas)
    for place in (home, nas / "v3/checkpoints"):
        flip(place / "mid_epoch_004_000003.pt")
    with Mirrored(home, mirror=nas, say=quiet) as s:
        assert s.resume()["global_step"] == 30


def test_without_a_thread_to_be_had_saves_are_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with checkpoint.Checkpointer(tmp_path, say=quiet, mid_epoch_minutes=0) as s:
        assert s.resume() is None
        s.save_mid(state(1))
    with checkpoint.Checkpointer(tmp_path, say=quiet) as s:
        assert s.resume()["global_step"] == 1


def test_a_start_without_a_thread_to_be_had_is_one_line_and_touches_nothing(tmp_path, small_corpus):
    loaded(small_corpus, tmp_path)
    done = spawn_hooked(tmp_path / "config.yaml", "import threading; threading.stack_size(1 << 46)", "--resume")
    said = rest(done)
    assert done.returncode == 1 and "train.py: no thread is to be had" in said and len(said.splitlines()) == 1, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_full_disk_at_the_end_is_an_error_once_however_often_the_saver_is_closed(small_disk):
    s = saver(small_disk / "run")
    s.save_mid(state(1))
    spoil_full(small_disk)
    s.save_mid(state(2))
    with pytest.raises(checkpoint.SaveFailed, match="No space left on device"):
        s.close()
    s.close()
    assert recover(small_disk / "run") == 1


# ---- a copied loop ----

def test_two_threads_that_save_take_turns_and_no_file_mixes_their_states(tmp_path):
    errors = []

    def save(value):
        for batch in range(1, 21):
            model = {str(i): torch.full((20_000,), float(value)) for i in range(10)}
            try:
                s.save_mid({"model": model, "epoch": 1, "batch": 100 * value + batch, "global_step": batch})
            except ValueError as error:     # the other thread is further: loud, and nothing is written
                errors.append(error)
    with checkpoint.Checkpointer(tmp_path, mid_epoch_keep=0, say=quiet) as s:
        threads = [threading.Thread(target=save, args=(value,)) for value in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for path in tmp_path.glob("*.pt"):
        assert len({float(v) for w in checkpoint.load(path)["model"].values() for v in (w[0], w[-1])}) == 1, path
    assert len(names(tmp_path)) + len(errors) == 40


WORKERS = """
import sys, time
sys.path.insert(0, sys.argv[1])
import checkpoint, torch

if __name__ == "__main__":
    with checkpoint.Checkpointer("checkpoints", mid_epoch_minutes=30) as saver, saver.signals():
        loader = torch.utils.data.DataLoader(torch.arange(1000), batch_size=1, num_workers=2)
        for batch, x in enumerate(loader, 1):
            time.sleep(0.2)
            print("step", batch, flush=True)
            if saver.stopping():
                saver.save_mid({"epoch": 1, "batch": batch, "global_step": batch})
                sys.exit(saver.stopping())
"""


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_leaves_the_workers_of_a_dataloader_alive_for_the_save(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WORKERS, str(ROOT)], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 3"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert recover_step(tmp_path / "checkpoints") >= 3
    ends = time.monotonic() + 60
    while True:                             # its workers have ended too
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < ends
        time.sleep(0.1)


def recover_step(directory):
    return checkpoint.peek(checkpoint.find_resume(directory, quiet))["global_step"]


def test_a_snapshot_before_the_place_in_progress_is_refused_aloud(tmp_path):
    with saver(tmp_path) as s:
        s.save_mid(state(5))
        with pytest.raises(ValueError, match="comes after epoch 1, batch 5"):
            s.save_mid(state(4))
        s.save_epoch(state(6, epoch=1))
        with pytest.raises(ValueError, match="comes after epoch 2, batch 0"):
            s.save_mid(state(7))
        with pytest.raises(ValueError, match="epoch 1 has ended already"):
            s.save_epoch(state(7, epoch=1))
    assert recover(tmp_path) == 6


def test_lines_that_nobody_takes_fail_no_save(tmp_path):
    def broken(line):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    with checkpoint.Checkpointer(tmp_path, say=broken, save_patience_minutes=0) as s:
        for batch in range(1, 6):
            s.save_mid(state(batch))
    assert recover(tmp_path) == 5


# ---- a real training, two faults at a time: the whole sweep is bench/soak.py --pairs ----

def test_the_sweep_takes_a_refused_start_for_different_only_where_a_state_is_lost_or_older(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    import pairs
    run, home = pairs.Run(tmp_path, None), tmp_path / "disk/t/checkpoints"
    for name in ("out", "err"):
        (tmp_path / f"1.{name}").write_text("train.py: refused\n" * (name == "err"))

    def wrong(change):
        shutil.rmtree(home, ignore_errors=True)
        with saver(home, checkpoint_keep=1) as s:
            for epoch, value in ((1, 0.5), (2, 0.4)):
                s.save_epoch(state(10 * epoch, epoch=epoch), metric=value)
                if epoch == 1:
                    shutil.copytree(home, tmp_path / "older", dirs_exist_ok=True)
            before, run.wrong = run.files(), []
            change(s)
        run.judge(2, before, 0, [tmp_path / "1.out", tmp_path / "1.err"])
        return run.wrong
    assert not wrong(lambda s: None) and not wrong(lambda s: s.save_epoch(state(30, epoch=3), metric=0.3))
    assert not wrong(lambda s: s.save_epoch(state(30, epoch=3), metric=0.9))        # a better best.pt too
    for name in ("last.pt", "best.pt", "checkpoint_epoch_001.pt"):
        lost = wrong(lambda s: (home / name).unlink(missing_ok=True))
        assert bool(lost) == (name != "checkpoint_epoch_001.pt"), (name, lost)
    assert "changed" in wrong(lambda s: shutil.copy(tmp_path / "older/last.pt", home))[0]


@pytest.mark.slow
def test_two_faults_at_a_time_leave_the_end_of_a_training_as_it_was(small_corpus, tmp_path):
    tried = [("moved", "second start"), ("mirror back", "flip")]
    code = (f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests'), str(ROOT / 'bench')]}\n"
            f"import pairs, train; from pathlib import Path\ntrain.Trainer.draw = lambda self: None\nprint(pairs.sweep(Path({str(tmp_path)!r}), Path({str(small_corpus)!r}), {tried}))")
    done = forked.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(f"{dict.fromkeys(tried, 'equal')}\n"), done.stdout + done.stderr
