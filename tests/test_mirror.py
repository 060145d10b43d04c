"""run/mirror.py: a second copy of a run, on real folders, full disks and disks that die."""
import errno
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

import checkpoint
from conftest import dies
from crash import sound, state
from run import mirror
from run.mirror import Mirrored, OtherRun
from test_crash import recover, temps


def quiet(line):
    pass


def saver(directory, **changes):
    options = {"mid_epoch_keep": 2, "checkpoint_keep": 2, "background": False, "say": quiet, **changes}
    return Mirrored(directory, **options)


def mirrored(tmp_path, nas=None, **changes):
    """A saver of tmp_path/results/v3 with its second copy in tmp_path/nas, and what it said."""
    said = []
    run = tmp_path / "results/v3"
    s = saver(run / "checkpoints", mirror=nas or tmp_path / "nas", say=said.append, **changes)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return s, said


def until(condition, said=()):
    """Wait for it, minutes if need be; a failing wait shows what was said."""
    ends = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < ends, "\n".join(said)
        time.sleep(0.01)


def copied(s):
    return s.wait_for_copy(0)


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


def names(directory):
    return sorted(p.name for p in directory.glob("*.pt"))


def test_a_second_copy_on_the_disk_of_the_run_is_called_so_and_one_on_another_disk_is_not(tmp_path):
    """As below the mount point of a disk that is not mounted."""
    s, said = mirrored(tmp_path)
    s.close()
    assert sum("is the other disk mounted?" in line for line in said) == 1
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        s, said = mirrored(tmp_path, Path(elsewhere, "nas"))
        s.close()
    assert not any("mounted" in line for line in said)


def test_rows_that_the_home_alone_has_stay_where_newer_states_come_home(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1, epoch=1))
        s.save_mid(state(2, epoch=1))
    home, there = tmp_path / "results/v3", tmp_path / "nas/v3"
    (home / "checkpoints/mid_epoch_001_000002.pt").unlink()
    (home / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (there / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    with saver(home / "checkpoints", mirror=tmp_path / "nas") as s:
        assert s.resume()["global_step"] == 2
    assert (home / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_second_copy_is_rotated_also_while_a_damaged_best_cannot_be_copied(tmp_path):
    s, said = mirrored(tmp_path)
    there = tmp_path / "nas/v3/checkpoints"
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.9)
        until(lambda: copied(s), said)
        flip(tmp_path / "results/v3/checkpoints/best.pt")
        for name in ("best.pt", "last.pt"):
            (there / name).unlink()
        for step in range(2, 7):
            s.save_mid(state(step, epoch=2))
            until(lambda: (there / f"mid_epoch_002_{step:06d}.pt").exists(), said)
    assert names(there) == ["mid_epoch_002_000005.pt", "mid_epoch_002_000006.pt"]
    assert any("best.pt: entry" in line for line in said) and not any(".tmp" in line for line in said)


def test_the_second_copy_holds_the_newest_states_best_and_the_records_and_one_state_is_one_file(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        until(lambda: copied(s), said)
        for batch in range(2, 6):
            s.save_mid(state(batch, epoch=2))
            until(lambda: copied(s), said)
    place = tmp_path / "nas/v3/checkpoints"
    assert names(place) == ["best.pt", "last.pt", "mid_epoch_002_000004.pt", "mid_epoch_002_000005.pt"]
    assert os.path.samefile(place / "best.pt", place / "last.pt") and recover(place) == 5
    assert (place.parent / "metrics.jsonl").read_text() == '{"step": 1}\n' and not temps(place)
    assert all(checkpoint.verify(path) for path in place.glob("*.pt")) and not [line for line in said if "mirror:" in line]


def test_a_run_whose_whole_folder_is_lost_goes_on_from_its_second_copy_with_best_and_records(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.9)
        s.save_epoch(state(2, epoch=2), metric=0.5)
        s.save_mid(state(3, epoch=3))
        run = s.run
    (tmp_path / "results").rename(tmp_path / "lost")
    s, said = mirrored(tmp_path)
    (tmp_path / "results/v3/metrics.jsonl").unlink()
    with s:
        assert s.resume()["global_step"] == 3 and s.position == (3, 3) and s.run == run
        assert (tmp_path / "results/v3/metrics.jsonl").exists()
        assert not s.save_epoch(state(4, epoch=3), metric=0.8), "the best came home too"
    home = tmp_path / "results/v3/checkpoints"
    assert sound(checkpoint.load(home / "best.pt")) == 1 and recover(home) == 4
    assert any("brought home from the second copy" in line for line in said)
    assert recover(tmp_path / "nas/v3/checkpoints") == 4


def test_a_resume_of_a_run_killed_between_its_last_save_and_the_copy_completes_the_second_copy(tmp_path):
    s, _ = mirrored(tmp_path)
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
    with checkpoint.Checkpointer(tmp_path / "results/v3/checkpoints", say=quiet) as s:     # as if killed before the copy
        assert s.resume()
        s.save_epoch(state(2, epoch=2), metric=0.9)
    assert recover(tmp_path / "nas/v3/checkpoints") == 1
    s, _ = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 2                       # finished: there is nothing to save
    place = tmp_path / "nas/v3/checkpoints"
    assert recover(place) == 2 and sound(checkpoint.load(place / "best.pt")) == 2


def test_a_resume_takes_the_better_of_both_places(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.9)
        s.save_mid(state(2, epoch=2))
    home = tmp_path / "results/v3/checkpoints"
    newest = home / "mid_epoch_002_000002.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 2, "at home it is damaged"
    assert checkpoint.verify(newest)
    for path in (tmp_path / "nas/v3/checkpoints").glob("mid*"):
        path.write_bytes(b"damage")
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 2 and s.resumed.parent == home


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_copy_of_another_run_is_refused_before_anything_is_written_there(tmp_path, resume):
    for name in ("a", "b"):
        with saver(tmp_path / name / "results/v3/checkpoints", mirror=tmp_path / name / "nas") as s:
            s.save_mid(state(1))
    place = tmp_path / "b/nas/v3/checkpoints"
    before = {p.name: p.read_bytes() for p in place.parent.rglob("*.pt")}
    home = tmp_path / "a" if resume else tmp_path / "new"
    with saver(home / "results/v3/checkpoints", mirror=tmp_path / "b/nas") as s:
        with pytest.raises(OtherRun, match="holds another run of this name"):
            s.resume(resume)
    assert {p.name: p.read_bytes() for p in place.parent.rglob("*.pt")} == before


def test_a_second_copy_that_turns_out_to_be_of_another_run_is_never_written_over(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
        until(lambda: copied(s), said)
        with checkpoint.Checkpointer(tmp_path / "other/v3/checkpoints", say=quiet) as other:
            other.save_mid(state(7))
        (tmp_path / "nas/v3").rename(tmp_path / "mine")
        (tmp_path / "other/v3").rename(tmp_path / "nas/v3")
        s.save_mid(state(2))
        until(lambda: s.trouble, said)
    assert names(tmp_path / "nas/v3/checkpoints") == ["mid_epoch_001_000007.pt"]
    assert any("holds another run" in line for line in said)


def spoil_gone(nas):
    nas.rename(nas.with_name("away"))
    return lambda: nas.with_name("away").rename(nas)


def spoil_file(nas):
    (nas / "v3").rename(nas / "aside")
    (nas / "v3").write_text("in the way")

    def mend():
        (nas / "v3").unlink()
        (nas / "aside").rename(nas / "v3")
    return mend


def spoil_full(nas):
    with open(nas / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)
    return (nas / "filler").unlink


def spoil_read_only(nas):
    subprocess.run(["mount", "-o", "remount,ro", str(nas)], check=True)
    return lambda: subprocess.run(["mount", "-o", "remount,rw", str(nas)], check=True)


@pytest.mark.parametrize("spoil", [spoil_gone, spoil_file, spoil_full, spoil_read_only, dies])
def test_a_second_copy_that_fails_is_said_when_it_begins_and_when_it_ends_and_stops_nothing(tmp_path, request, spoil):
    nas = tmp_path / "nas"
    if spoil in (spoil_full, spoil_read_only):
        nas = request.getfixturevalue("small_disk")
    if spoil is dies:
        nas = request.getfixturevalue("ext4_disk")
    s, said = mirrored(tmp_path, nas)
    with s:
        s.save_mid(state(1))
        until(lambda: copied(s), said)
        mend = spoil(nas)
        for batch in (2, 3, 4):
            s.save_mid(state(batch))
            until(lambda: s.trouble and not s.busy, said)
        assert recover(tmp_path / "results/v3/checkpoints") == 4
        mend()
        s.save_mid(state(5))
        until(lambda: not s.trouble and copied(s), said)
    lines = [line for line in said if line.startswith("mirror:")]
    assert len(lines) == 2 and "training goes on" in lines[0] and "holds the newest state again" in lines[1], lines
    assert any("saved mid_epoch_001_000004.pt" in line and "the newest second copy is" in line for line in said)
    assert recover(nas / "v3/checkpoints") == 5


def test_a_slow_second_copy_skips_states_delays_no_save_and_the_end_waits_for_it_a_while_only(tmp_path, monkeypatch):
    gate, real = threading.Event(), mirror.sync

    def slow(*arguments, **options):
        gate.wait()
        real(*arguments, **options)
    monkeypatch.setattr(mirror, "sync", slow)
    monkeypatch.setattr(mirror, "END_SECONDS", 0.2)
    s, said = mirrored(tmp_path)
    for batch in range(1, 5):
        s.save_mid(state(batch))
        until(lambda: s.busy, said)
    assert recover(tmp_path / "results/v3/checkpoints") == 4
    assert sum("slower than the saves" in line for line in said if line.startswith("mirror:")) == 1
    s.close()
    assert any("waiting at most" in line for line in said) and any("lacks the newest state" in line for line in said)
    gate.set()
    s.thread.join()
    assert recover(tmp_path / "nas/v3/checkpoints") == 4, "the newest waiting state, not each of them"


def test_a_second_copy_that_hangs_holds_up_no_home_that_fails_and_then_takes_saves_again(tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(mirror, "sync", lambda *arguments, **options: gate.wait())
    monkeypatch.setattr(mirror, "END_SECONDS", 0.2)
    s, said = mirrored(tmp_path)
    s.save_mid(state(1))
    until(lambda: s.busy and s.writing.locked(), said)
    mend = spoil_gone(tmp_path / "results")
    watch = threading.Timer(60, gate.set)       # a test that fails ends too
    watch.start()
    s.save_mid(state(2))
    assert not gate.is_set() and any(line.startswith("save failed (1 in a row): No such file") for line in said), said
    mend()
    s.save_mid(state(3))
    s.close()
    assert recover(tmp_path / "results/v3/checkpoints") == 3 and not gate.is_set()
    watch.cancel()
    gate.set()
    s.thread.join()


def test_without_a_thread_to_be_had_the_missing_second_copy_is_said_and_it_is_written_once_there_is_one(tmp_path, monkeypatch):
    def refuse():
        raise RuntimeError("can't start new thread")
    s, said = mirrored(tmp_path)
    with s:
        with monkeypatch.context() as limited:
            limited.setattr(s.thread, "start", refuse)
            s.save_mid(state(1))
        assert sum("can't start new thread: training goes on without" in line for line in said) == 1, said
        s.save_mid(state(2))
        until(lambda: copied(s), said)
    assert recover(tmp_path / "nas/v3/checkpoints") == 2 and any("holds the newest state again" in line for line in said), said


def test_the_end_of_a_run_waits_for_the_second_copy_of_its_last_state(tmp_path, monkeypatch):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
    assert recover(tmp_path / "nas/v3/checkpoints") == 1 and s.slowest > 0


@pytest.mark.parametrize("make", [lambda nas: nas.write_text("a file"), lambda nas: nas.symlink_to(nas)])
def test_a_place_that_is_no_folder_is_said_and_the_run_goes_on_and_resumes(tmp_path, make):
    with checkpoint.Checkpointer(tmp_path / "results/v3/checkpoints", say=quiet) as s:
        s.save_mid(state(1))
    make(tmp_path / "nas")
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 1
        s.save_mid(state(2))
    assert recover(tmp_path / "results/v3/checkpoints") == 2
    assert any(line.startswith("mirror:") and "training goes on" in line for line in said)


def test_a_home_that_is_empty_beside_a_second_copy_that_cannot_be_read_begins_nothing(tmp_path):
    (tmp_path / "nas").symlink_to(tmp_path / "nas")
    s, said = mirrored(tmp_path)
    with s, pytest.raises(OSError) as fault:
        s.resume()
    assert fault.value.errno == errno.ELOOP


def test_a_run_is_no_second_copy_of_itself(tmp_path):
    with pytest.raises(ValueError, match="run's own folder"):
        saver(tmp_path / "results/v3/checkpoints", mirror=tmp_path / "results")


def test_a_copy_is_verified_and_what_the_disk_has_garbled_replaces_nothing(tmp_path):
    s, said = mirrored(tmp_path)
    home, place = tmp_path / "results/v3/checkpoints", tmp_path / "nas/v3/checkpoints"
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        until(lambda: copied(s), said)
        good = (place / "last.pt").read_bytes()
        with s.writing:                     # the copying thread waits
            s.save_epoch(state(2, epoch=2), metric=0.4)
            s.wait()
            flip(home / "last.pt")
        until(lambda: s.trouble and not s.busy, said)
        assert (place / "last.pt").read_bytes() == good and not temps(place)
    assert any(line.startswith("mirror: left") and "not match" in line for line in said), said


def test_a_home_that_vanishes_while_it_is_copied_leaves_no_state_ahead_of_its_records(tmp_path, monkeypatch):
    s, said = mirrored(tmp_path)
    home, place, real = tmp_path / "results/v3/checkpoints", tmp_path / "nas/v3/checkpoints", mirror.candidates

    def vanishing(directory, *others):      # after the look, before the records
        found = list(real(directory, *others))
        if threading.current_thread() is s.thread and directory == home and s.counter == 2:
            home.parent.rename(tmp_path / "lost")
        return found
    with s:
        s.save_mid(state(1))
        s.wait()
        until(lambda: copied(s), said)
        with open(home.parent / "metrics.jsonl", "a") as file:
            file.write('{"step": 2}\n')
        monkeypatch.setattr(mirror, "candidates", vanishing)
        s.save_mid(state(2))
        until(lambda: (tmp_path / "lost").exists() and copied(s), said)
    assert recover(place) == 1 and (tmp_path / "nas/v3/metrics.jsonl").read_text() == '{"step": 1}\n'


# ---- the second copy instead of a home that takes nothing ----

@pytest.mark.parametrize("spoil", [spoil_gone, spoil_full, dies])
def test_what_the_home_does_not_take_goes_to_the_second_copy_and_comes_home_when_it_does(tmp_path, request, spoil):
    results = tmp_path / "results"
    if spoil is not spoil_gone:
        results.symlink_to(request.getfixturevalue("ext4_disk" if spoil is dies else "small_disk"))
    s, said = mirrored(tmp_path, save_patience_minutes=0)
    home, place = results / "v3/checkpoints", tmp_path / "nas/v3/checkpoints"
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        until(lambda: copied(s), said)
        mend = spoil(results.resolve())
        assert s.save_epoch(state(2, epoch=2), metric=0.9)
        assert not s.save_epoch(state(3, epoch=3), metric=0.7), "it is compared with what best.pt was"
        for batch in range(4, 9):           # five failures in a row, and no patience
            s.save_mid(state(batch, epoch=4))
            s.wait()
        s.settle()
        assert sound(checkpoint.load(place / "best.pt")) == 2 and sound(checkpoint.load(place / "last.pt")) == 3
        assert names(place) == ["best.pt", "last.pt", "mid_epoch_004_000007.pt", "mid_epoch_004_000008.pt"]
        assert recover(place) == 8 and sum("the second copy has the state" in line for line in said) == 7, said
        if spoil is dies:
            return
        mend()
        assert not s.save_epoch(state(9, epoch=4), metric=0.8), "the home's own best.pt is older"
        until(lambda: copied(s), said)
    for directory in (home, place):
        assert sound(checkpoint.load(directory / "best.pt")) == 2 and recover(directory) == 9, said
        assert not temps(directory)


def test_a_home_with_room_for_one_file_alone_gets_the_rest_later_and_nothing_older_goes_to_the_second_copy(tmp_path, small_disk):
    (tmp_path / "results").symlink_to(small_disk)
    s, said = mirrored(tmp_path)
    home, place = tmp_path / "results/v3/checkpoints", tmp_path / "nas/v3/checkpoints"
    with s:
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
        assert recover(home) == 3 and sound(checkpoint.load(home / "best.pt")) == 1, said
        assert any("could not be brought home" in line for line in said), said
        assert recover(place) == 3 and sound(checkpoint.load(place / "best.pt")) == 2
        empty()
        assert not s.save_epoch(state(4, epoch=3), metric=0.8)
    for directory in (home, place):
        assert recover(directory) == 4 and sound(checkpoint.load(directory / "best.pt")) == 2, said


def test_what_went_to_the_second_copy_from_before_a_damaged_save_at_home_is_gone_on_from(tmp_path):
    """The damaged one keeps its name at home, and looks later than where the second copy's line began."""
    home, place = tmp_path / "results/v3/checkpoints", tmp_path / "nas/v3/checkpoints"
    with mirrored(tmp_path)[0] as s:
        s.save_mid(state(1))
        s.save_mid(state(2))
    for folder in (home, place):
        flip(folder / "mid_epoch_001_000002.pt")
    s, said = mirrored(tmp_path)
    assert s.resume()["global_step"] == 1
    until(lambda: copied(s), said)
    mend = spoil_gone(tmp_path / "results")
    s.save_mid(state(3))
    mend()
    s.close()                                   # as a kill leaves it: nothing has come home
    assert recover(home) == 1 and recover(place) == 3
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 3, said
        s.save_mid(state(4))
    assert recover(home) == recover(place) == 4 and not any("another line" in line for line in said), said


def test_a_run_that_goes_back_to_a_save_of_an_earlier_start_keeps_its_second_copy(tmp_path):
    """The second copy's newest save is of a start that the line now followed has never heard of."""
    for epoch in (1, 2):                                # a start each
        with mirrored(tmp_path)[0] as s:
            s.resume()
            s.save_epoch(state(10 * epoch, epoch=epoch), metric=0.5)
    s, said = mirrored(tmp_path)
    with s:
        s.resume(s.directory / "checkpoint_epoch_001.pt")
        s.save_mid(state(11, epoch=2))
    assert not any("another start" in line for line in said), said
    assert recover(tmp_path / "nas/v3/checkpoints") == 11


def test_a_home_that_is_lost_after_it_went_on_from_another_runs_file_keeps_its_second_copy(tmp_path):
    """The second copy still has snapshots of the run before."""
    with saver(tmp_path / "other/checkpoints", mirror=tmp_path / "elsewhere") as s:
        s.save_mid(state(1))
    with mirrored(tmp_path)[0] as s:
        for batch in (1, 2, 3):
            s.save_mid(state(batch))
    with mirrored(tmp_path)[0] as s:
        s.resume(tmp_path / "other/checkpoints/mid_epoch_001_000001.pt")
        s.save_mid(state(4))
    shutil.rmtree(tmp_path / "results")
    for batch in (5, 6):
        s, said = mirrored(tmp_path)
        with s:
            assert s.resume()["global_step"] == batch - 1, said
            s.save_mid(state(batch))
        assert recover(tmp_path / "nas/v3/checkpoints") == batch, said


def test_saves_that_neither_place_takes_end_the_run_after_the_patience_and_both_are_named(tmp_path):
    s, said = mirrored(tmp_path, save_patience_minutes=0)
    s.save_mid(state(1))
    s.wait()
    spoil_gone(tmp_path / "results")
    s.save_mid(state(2))
    s.wait()
    (tmp_path / "nas").rename(tmp_path / "lost")
    with pytest.raises(checkpoint.SaveFailed):
        for batch in range(3, 9):
            s.save_mid(state(batch))
            s.wait()
    assert batch == 5 and any(line.startswith("mirror:") and "No such file" in line for line in said), said
    s.close()
    with saver(tmp_path / "other/v3/checkpoints", mirror=tmp_path / "lost") as s:
        assert s.resume()["global_step"] == 2


def test_weights_that_are_not_finite_go_to_no_place_at_all(tmp_path):
    s, said = mirrored(tmp_path, save_patience_minutes=0)
    bad = state(1)
    next(iter(bad["model"].values())).fill_(float("nan"))
    with pytest.raises(checkpoint.SaveFailed):
        for _ in range(3):
            s.save_mid(bad)
            s.wait()
    s.close()
    assert not list(tmp_path.rglob("*.pt"))
