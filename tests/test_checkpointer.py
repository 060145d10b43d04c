"""Policy of checkpoint.py: locks, records, copied loops, patience, the second copy, the command line's manners."""
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import checkpoint
import crash
import forked
from conftest import ROOT, dies
from crash import sound, state
from test_crash import recover, saver, temps


# ---- small files ----

def test_json_is_written_whole_or_not_at_all_and_torn_lines_are_named_and_left_out(tmp_path, capsys):
    checkpoint.write_json(tmp_path / "a.json", {"b": [1, "ä"]})
    with pytest.raises(ValueError):
        checkpoint.write_json(tmp_path / "a.json", {"b": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{"b": [1, "\\u00e4"]}\n' and not temps(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n7\n' + b"[" * 100_000 + b'\n{"a": 2}\n{"a": \xff')
    assert list(checkpoint.read_json_lines(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    assert capsys.readouterr().out.count("rows.jsonl: dropped a row") == 3
    assert list(checkpoint.read_json_lines(tmp_path / "absent.jsonl")) == []


def test_a_file_written_by_other_hands_takes_its_place_durably(tmp_path):
    (tmp_path / "x.part").write_bytes(b"new")
    (tmp_path / "x").write_bytes(b"old")
    checkpoint.durable_replace(tmp_path / "x.part", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"new" and not (tmp_path / "x.part").exists()


# ---- the lock ----

def test_a_lock_is_given_back_at_close_though_a_forked_child_lives_on(tmp_path):
    held = checkpoint.lock(tmp_path)
    child = os.fork()
    if not child:
        signal.pause()
    try:
        with pytest.raises(checkpoint.InUse, match=f"in use by process {os.getpid()} "):
            checkpoint.lock(tmp_path)
        held.close()
        held.close()
        checkpoint.lock(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_death_of_a_process_frees_its_lock_though_its_forked_worker_lives_on(tmp_path):
    script = "import os, sys, time; sys.path.insert(0, sys.argv[1]); import checkpoint; " \
             "held = checkpoint.lock(sys.argv[2]); child = os.fork(); " \
             "print(child, flush=True) if child else None; time.sleep(600)"
    holder = forked.Popen([sys.executable, "-c", script, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        checkpoint.lock(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_follows_no_symbolic_link_and_waits_for_no_fifo(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError) as refusal:
        checkpoint.lock(tmp_path)
    assert refusal.value.errno == errno.ELOOP and (tmp_path / "precious").read_text() == "mine"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(OSError, match="not a regular file"):
        checkpoint.lock(tmp_path)


# ---- copied loops ----

def test_the_loop_of_the_docstring_with_its_dropout_killed_ten_times_ends_bit_identical(tmp_path):
    crash.warm()
    assert crash.run_child(lambda: crash.run_loop(tmp_path / "whole")) == "done"
    for step in (1, 7, 19, 20, 21, 40, 55, 71, 99, 100):
        assert crash.run_child(lambda: crash.run_loop(tmp_path / "cut", dies_after=step)) == "killed"
    assert crash.run_child(lambda: crash.run_loop(tmp_path / "cut")) == "done"
    for name in ("last.pt", "best.pt"):
        mine, whole = (checkpoint.load(tmp_path / run / "checkpoints" / name) for run in ("cut", "whole"))
        for key in ("model", "optimizer", "epoch", "batch", "global_step", "metric"):
            assert crash.same(mine[key], whole[key]), key


def test_random_states_bring_back_every_generator(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()
    np.random.randn()                       # a spare normal number is in NumPy's state now
    checkpoint.atomic_save({"random": checkpoint.random_states()}, tmp_path / "x.pt")
    expected = draw()
    checkpoint.restore_random_states(checkpoint.load(tmp_path / "x.pt")["random"])
    assert draw() == expected


LOOP = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import torch, checkpoint
with checkpoint.Checkpointer(sys.argv[2], on_saved=lambda path: print("durable", flush=True)) as saver, saver.signals():
    print("loop", flush=True)
    while not saver.stopping():
        time.sleep(0.01)
    saver.save_mid({"w": torch.ones(10), "epoch": 1, "batch": 3})
    sys.exit(saver.stopping())
"""


def loop(directory, *command, **options):
    start = subprocess.Popen if command else forked.Popen
    process = start([*command, sys.executable, "-c", LOOP, str(ROOT), str(directory)],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert process.stdout.readline() == "loop\n"
    return process


@pytest.mark.parametrize("pair", [(signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGHUP), (signal.SIGUSR2,)])
def test_signals_within_milliseconds_are_one_wish_and_the_copied_loop_saves_and_leaves(tmp_path, pair):
    process = loop(tmp_path)
    process.send_signal(signal.SIGSTOP)     # they arrive together, however slow this machine is
    for number in pair:
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    out = process.communicate()[0]
    assert process.returncode in {128 + number for number in pair} and "durable" in out, out
    assert checkpoint.load(tmp_path / "mid_epoch_001_000003.pt")["batch"] == 3


def test_a_second_signal_a_second_later_exits_at_once(tmp_path, monkeypatch):
    handled = []
    monkeypatch.setattr(signal, "raise_signal", handled.append)
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM and not handled
        signals.since -= 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_was_inherited_as_ignored_stays_ignored(tmp_path):
    process = loop(tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 128 + signal.SIGINT


# ---- what a state may hold ----

def test_keys_of_the_users_own_that_are_called_as_ours_come_back_and_harm_no_save(tmp_path):
    own = {"run": "my run", "kind": 7, "metric": [0.123456789] * 3400, "epoch": 1, "batch": 2, "global_step": 2}
    with saver(tmp_path) as s:
        s.save_mid(own)
        s.save_epoch({**own, "global_step": 3}, metric=0.5, name="f1")
        run = s.run
    got = checkpoint.load(tmp_path / "last.pt")
    assert (got["run"], got["kind"], got["metric"]) == (own["run"], own["kind"], own["metric"])
    facts = checkpoint.peek(tmp_path / "last.pt")
    assert (facts["run"], facts["kind"], facts["metric"]) == (run, "epoch", {"name": "f1", "value": 0.5})
    with saver(tmp_path) as s:
        assert s.resume()["global_step"] == 3 and s.position == (2, 0) and s.run == run


def test_a_state_without_its_place_is_refused_in_a_line_and_so_is_one_before_the_beginning(tmp_path):
    with saver(tmp_path) as s:
        for wrong, message in (({"epoch": 1}, "no 'batch'"), ({"batch": 1}, "no 'epoch'"),
                               ({"epoch": -1, "batch": 0}, "must be a whole number, 0 or more, not -1")):
            with pytest.raises(TypeError, match=message):
                s.save_mid(wrong)
    assert not list(tmp_path.glob("*.pt"))


def test_a_run_directory_named_relatively_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with saver("run") as s:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        s.save_mid(state(1))
    assert recover(tmp_path / "run") == 1


# ---- resuming ----

def test_best_is_the_last_resort_of_a_resume_and_said_to_be(tmp_path, capsys):
    with saver(tmp_path, checkpoint_interval=0) as s:
        s.save_epoch(state(1, epoch=1), metric=0.9)
        s.save_epoch(state(2, epoch=2), metric=0.1)
    blob = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(blob[:-7])
    with saver(tmp_path, say=print) as s:
        assert s.resume()["global_step"] == 1 and s.position == (2, 0)
    assert "chose best.pt: epoch 1" in capsys.readouterr().out
    assert checkpoint.find_resume(tmp_path).name == "last.pt", "a resume names its file last.pt again"


@pytest.mark.parametrize("content", [{"epoch": 3, "w": 1}, {"batch": 3}, {"w": 1}])
def test_what_find_resume_takes_a_resume_takes_too(tmp_path, content):
    torch.save(content, tmp_path / "last.pt")
    assert checkpoint.find_resume(tmp_path) is None
    with saver(tmp_path) as s:
        assert s.resume() is None
        with pytest.raises(checkpoint.CorruptCheckpoint, match="no epoch and batch"):
            s.resume(tmp_path / "last.pt")


def failing_reads(monkeypatch, path, times, number=errno.EIO):
    """The next `times` openings of `path` fail."""
    real, left = os.open, [times]

    def faulty(name, *arguments, **options):
        if str(name) == str(path) and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(name))
        return real(name, *arguments, **options)
    monkeypatch.setattr(os, "open", faulty)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_fault_at_reading_is_no_damage_the_resume_waits_and_then_goes_on(tmp_path, monkeypatch, capsys, number):
    with saver(tmp_path) as s:
        s.save_mid(state(1))
        s.save_mid(state(2, batch=9))
    failing_reads(monkeypatch, tmp_path / "mid_epoch_001_000009.pt", 2, number)
    with saver(tmp_path, say=print) as s:
        assert s.resume()["global_step"] == 2
    assert "no damage, trying again" in capsys.readouterr().out


def test_a_fault_at_reading_that_lasts_is_raised_and_nothing_is_touched(tmp_path, monkeypatch):
    with saver(tmp_path) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    failing_reads(monkeypatch, tmp_path / "last.pt", -1)
    monkeypatch.setattr(checkpoint, "READ_PATIENCE", 0.1)
    with saver(tmp_path) as s:
        for look in (s.resume, lambda: checkpoint.find_resume(tmp_path)):
            with pytest.raises(OSError) as fault:
                look()
            assert fault.value.errno == errno.EIO and fault.value.filename == str(tmp_path / "last.pt")
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")} == before


def test_a_best_that_cannot_be_read_now_is_measured_by_what_it_held_last(tmp_path, monkeypatch, capsys):
    with saver(tmp_path, say=print) as s:
        s.save_epoch(state(1, epoch=1), metric=0.9)
        failing_reads(monkeypatch, tmp_path / "best.pt", -1)
        assert not s.save_epoch(state(2, epoch=2), metric=0.85)
        assert s.save_epoch(state(3, epoch=3), metric=0.95) and not s.save_epoch(state(4, epoch=4), metric=0.93)
    monkeypatch.undo()
    assert sound(checkpoint.load(tmp_path / "best.pt")) == 3
    assert "best.pt cannot be read now (Input/output error)" in capsys.readouterr().out


def test_a_best_that_was_never_read_is_not_replaced(tmp_path, monkeypatch, capsys):
    with saver(tmp_path) as s:
        s.save_epoch(state(1, epoch=1), metric=0.9)
    failing_reads(monkeypatch, tmp_path / "best.pt", -1)
    with saver(tmp_path, say=print) as s:
        assert not s.save_epoch(state(2, epoch=2), metric=0.95)
    monkeypatch.undo()
    assert sound(checkpoint.load(tmp_path / "best.pt")) == 1
    assert "best.pt stays: what it holds was never read" in capsys.readouterr().out


def test_after_going_back_to_a_file_the_best_is_of_its_line_and_the_abandoned_one_is_kept(tmp_path, capsys):
    with saver(tmp_path, checkpoint_keep=0) as s:
        for epoch, metric in enumerate((0.3, 0.2, 0.9), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=metric)
    with saver(tmp_path, say=print) as s:
        s.resume(tmp_path / "checkpoint_epoch_002.pt")
        assert sound(checkpoint.load(tmp_path / "best.pt")) == 1, "0.3 is the best of the line that goes on"
        assert not s.save_epoch(state(4, epoch=3), metric=0.25) and s.save_epoch(state(5, epoch=4), metric=0.4)
    kept, = tmp_path.glob("abandoned_best_*.pt")
    assert sound(checkpoint.load(kept)) == 3 and kept.name in capsys.readouterr().out
    with saver(tmp_path) as s:              # a file of the line that best.pt belongs to leaves it alone
        s.resume(tmp_path / "last.pt")
    assert sound(checkpoint.load(tmp_path / "best.pt")) == 5 and len(list(tmp_path.glob("abandoned_best_*.pt"))) == 1


def test_rotation_that_keeps_all_looks_at_no_file(tmp_path):
    os.mkdir(tmp_path / "mid_epoch_001_000001.pt")

    def look(number, name, arguments):
        raise AssertionError(f"{name} {arguments}")
    with crash.Watched(tmp_path, look):
        assert checkpoint.rotate(tmp_path, "mid_epoch_*.pt", 0) == []


# ---- patience ----

def test_saves_that_fail_for_less_than_the_patience_stop_nothing_and_lose_nothing(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    home = tmp_path / "run"
    with saver(home, say=print, save_patience_minutes=60) as s:
        s.save_epoch(state(1, epoch=1), metric=0.1)
        os.rename(home, tmp_path / "gone")
        s.save_epoch(state(2, epoch=2), metric=0.9)
        tries = 0
        for step in range(3, 3000):         # a step a second, 50 minutes: each minute it is tried again
            clock[0] += 1
            if s.due():
                tries += 1
                s.save_mid(state(step, epoch=3))
        assert 45 <= tries <= 55, "said and tried about once a minute"
        os.rename(tmp_path / "gone", home)
        clock[0] += 60
        s.save_mid(state(3000, epoch=3))
    assert sound(checkpoint.load(home / "best.pt")) == 2, "the best epoch waited in memory"
    assert recover(home) == 3000 and capsys.readouterr().out.count("save failed") == tries + 1


def test_saves_that_fail_beyond_the_patience_stop_the_run_and_settle_waits_as_long(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    home = tmp_path / "run"
    s = saver(home, save_patience_minutes=10)
    os.rename(home, tmp_path / "gone")
    s.save_mid(state(1))
    with pytest.raises(checkpoint.SaveFailed, match="saves failed for 10 minutes"):
        s.settle()
    assert 600 <= clock[0] < 700
    s.close()


# ---- the second copy ----

def mirrored(tmp_path, mirror=None, **changes):
    """A saver of tmp_path/results/v3 with its second copy in tmp_path/nas, and what it said."""
    said = []
    run = tmp_path / "results/v3"
    s = saver(run / "checkpoints", mirror=mirror or tmp_path / "nas", say=said.append, **changes)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return s, said


def until(condition, said=()):
    """Wait for it, minutes if need be; a failing wait shows what was said."""
    ends = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < ends, "\n".join(said)
        time.sleep(0.01)


def copied(s):
    with s.mirror.changed:
        return not s.mirror.busy and not s.mirror.waiting


def reading(monkeypatch, pieces):
    """The second copy takes what pieces(generator of the image's bytes) yields for the saves in memory."""
    real = checkpoint._Image.reader

    def reader(self):
        made = real(self)
        return lambda: pieces(made())
    monkeypatch.setattr(checkpoint._Image, "reader", reader)


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


def names(directory):
    return sorted(p.name for p in directory.glob("*.pt"))


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
    assert all(checkpoint.verify(path) for path in place.glob("*.pt")) and not [l for l in said if "mirror:" in l]


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
    with saver(tmp_path / "results/v3/checkpoints") as s:           # as if killed before the copy
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
        with pytest.raises(checkpoint.OtherRun, match="holds another run of this name"):
            s.resume(resume)
        with pytest.raises(checkpoint.OtherRun):
            s.save_mid(state(2))
    assert {p.name: p.read_bytes() for p in place.parent.rglob("*.pt")} == before


def test_a_second_copy_that_turns_out_to_be_of_another_run_is_never_written_over(tmp_path):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
        until(lambda: copied(s), said)
        with saver(tmp_path / "other/v3/checkpoints") as other:
            other.save_mid(state(7))
        (tmp_path / "nas/v3").rename(tmp_path / "mine")
        (tmp_path / "other/v3").rename(tmp_path / "nas/v3")
        s.save_mid(state(2))
        until(lambda: s.mirror.trouble, said)
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
    s, said = mirrored(tmp_path, mirror=nas)
    with s:
        s.save_mid(state(1))
        until(lambda: copied(s), said)
        mend = spoil(nas)
        for batch in (2, 3, 4):
            s.save_mid(state(batch))
            until(lambda: s.mirror.trouble and not s.mirror.busy, said)
        assert recover(tmp_path / "results/v3/checkpoints") == 4
        mend()
        s.save_mid(state(5))
        until(lambda: not s.mirror.trouble, said)
    lines = [line for line in said if line.startswith("mirror:")]
    assert len(lines) == 2 and "training goes on" in lines[0] and "holds the newest state again" in lines[1], lines
    assert any("saved mid_epoch_001_000004.pt" in line and "the newest second copy is" in line for line in said)
    assert recover(nas / "v3/checkpoints") == 5


def test_a_slow_second_copy_skips_states_delays_no_save_and_the_end_waits_for_it_a_while_only(tmp_path, monkeypatch):
    gate = threading.Event()

    def slow(pieces):
        gate.wait()
        yield from pieces
    reading(monkeypatch, slow)
    monkeypatch.setattr(checkpoint, "MIRROR_WAIT", 0.2)
    s, said = mirrored(tmp_path)
    for batch in range(1, 5):
        s.save_mid(state(batch))
        until(lambda: s.mirror.busy, said)
    assert recover(tmp_path / "results/v3/checkpoints") == 4
    assert sum("slower than the saves" in line for line in said if line.startswith("mirror:")) == 1
    s.close()
    assert any("waiting at most" in line for line in said) and any("lacks the newest state" in line for line in said)
    gate.set()
    s.mirror.thread.join()
    assert recover(tmp_path / "nas/v3/checkpoints") == 4, "the newest waiting state, not each of them"


def test_the_end_of_a_run_waits_for_the_second_copy_of_its_last_state(tmp_path, monkeypatch):
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
    assert recover(tmp_path / "nas/v3/checkpoints") == 1 and s.slowest > 0


@pytest.mark.parametrize("make", [lambda nas: nas.write_text("a file"), lambda nas: nas.symlink_to(nas)])
def test_a_place_that_is_no_folder_is_said_and_the_run_goes_on_and_resumes(tmp_path, make):
    with saver(tmp_path / "results/v3/checkpoints") as s:
        s.save_mid(state(1))
    make(tmp_path / "nas")
    s, said = mirrored(tmp_path)
    with s:
        assert s.resume()["global_step"] == 1
        s.save_mid(state(2))
    assert recover(tmp_path / "results/v3/checkpoints") == 2
    assert any(line.startswith("mirror:") and "training goes on" in line for line in said)


def test_a_home_that_is_empty_beside_a_second_copy_that_cannot_be_read_begins_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "READ_PATIENCE", 0.1)
    (tmp_path / "nas").symlink_to(tmp_path / "nas")
    s, said = mirrored(tmp_path)
    with s, pytest.raises(OSError) as fault:
        s.resume()
    assert fault.value.errno == errno.ELOOP


def test_a_run_is_no_second_copy_of_itself(tmp_path):
    with pytest.raises(ValueError, match="run's own folder"):
        saver(tmp_path / "results/v3/checkpoints", mirror=tmp_path / "results")


@pytest.mark.parametrize("piece", [checkpoint.PAGE, checkpoint.PIECE])
def test_a_copy_is_checked_as_it_passes_and_what_the_disk_has_garbled_replaces_nothing(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    monkeypatch.setattr(checkpoint, "PAUSE", 0)
    source, target = tmp_path / "last.pt", tmp_path / "nas.pt"
    tensors = {"a": torch.arange(5000.0), "none": torch.empty(0), "b": torch.ones(3, dtype=torch.uint8)}
    checkpoint.atomic_save({**state(1), **tensors, "text": "plain " * 2000}, source)
    good = source.read_bytes()
    checkpoint.copy_file(source, target)
    assert target.read_bytes() == good
    damaged = [bytes([*good[:at], good[at] ^ 1, *good[at + 1:]]) for at in range(0, len(good), len(good) // 150)]
    tail = [bytes([*good[:at], good[at] ^ 1, *good[at + 1:]]) for at in range(len(good) - 40, len(good))]
    for blob in [*damaged, *tail, good[:-1], good[:9000], good + b"x", b""]:
        source.write_bytes(blob)
        with pytest.raises(checkpoint.CorruptCheckpoint, match="last.pt: "):
            checkpoint.copy_file(source, target)
        assert target.read_bytes() == good and not temps(tmp_path)


def test_a_copy_of_a_plain_torch_save_is_checked_by_its_zip_checksums(tmp_path):
    source, target = tmp_path / "last.pt", tmp_path / "nas.pt"
    torch.save({"epoch": 1, "batch": 1, "x": torch.arange(5000.0)}, source)
    checkpoint.copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    flip(source)
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.copy_file(source, target)
    assert torch.load(target)["epoch"] == 1 and not temps(tmp_path)


def test_the_second_copy_comes_out_of_memory_loads_no_state_and_passes_over_what_the_home_disk_garbles(tmp_path, monkeypatch):
    home, place, loads = tmp_path / "results/v3/checkpoints", tmp_path / "nas/v3/checkpoints", []

    def garbled(pieces):
        flip(home / "last.pt")
        yield from pieces
    reading(monkeypatch, garbled)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: loads.append(arguments))
    s, said = mirrored(tmp_path)
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
    assert not loads
    monkeypatch.undo()
    assert sound(checkpoint.load(place / "last.pt")) == sound(checkpoint.load(place / "best.pt")) == 1
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.load(home / "last.pt")
    with mirrored(tmp_path)[0] as s:
        assert s.resume()["global_step"] == 1


def test_a_save_that_is_no_longer_in_memory_is_copied_from_the_file_and_damage_there_is_said_and_copied_nowhere(tmp_path,
                                                                                                              monkeypatch):
    loads, real = [], checkpoint.copy_file
    place = tmp_path / "nas/v3/checkpoints"

    def overtaken(pieces):
        yield next(pieces)
        raise checkpoint.Overtaken

    def garbled(source, target, *others):
        if target.exists():                 # the second save
            flip(source)
        real(source, target, *others)
    reading(monkeypatch, overtaken)
    monkeypatch.setattr(checkpoint, "copy_file", garbled)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: loads.append(arguments))
    s, said = mirrored(tmp_path)
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        s.wait()
        until(lambda: copied(s), said)
        good = (place / "last.pt").read_bytes()
        s.save_epoch(state(2, epoch=2), metric=0.4)
        until(lambda: s.mirror.trouble and not s.mirror.busy, said)
        assert (place / "last.pt").read_bytes() == good and not temps(place)
    assert not loads and any(line.startswith("mirror:") and "not match" in line for line in said), said


def test_the_next_save_does_not_wait_for_a_copy_out_of_memory_and_no_copy_mixes_two_states(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(pieces):
        yield next(pieces)
        begun.set()
        go_on.wait()
        yield from pieces
    reading(monkeypatch, slow)
    s, said = mirrored(tmp_path)
    with s:
        s.save_mid(state(1))
        begun.wait()
        s.save_mid(state(2))
        s.wait()                            # durable, while the first one is being copied
        go_on.set()
        until(lambda: copied(s), said)
    place = tmp_path / "nas/v3/checkpoints"
    assert [sound(checkpoint.load(place / f"mid_epoch_001_{batch:06d}.pt")) for batch in (1, 2)] == [1, 2] and not temps(place)


def test_a_home_that_vanishes_while_it_is_copied_leaves_no_state_ahead_of_its_records(tmp_path, monkeypatch):
    s, said = mirrored(tmp_path)
    home, place, real = tmp_path / "results/v3/checkpoints", tmp_path / "nas/v3/checkpoints", checkpoint.candidates

    def vanishing(directory, *others):      # after the look, before the records
        found = list(real(directory, *others))
        if threading.current_thread() is s.mirror.thread and directory == home and s.counter == 2:
            home.parent.rename(tmp_path / "lost")
        return found
    with s:
        s.save_mid(state(1))
        s.wait()
        until(lambda: copied(s), said)
        with open(home.parent / "metrics.jsonl", "a") as file:
            file.write('{"step": 2}\n')
        monkeypatch.setattr(checkpoint, "candidates", vanishing)
        s.save_mid(state(2))
        until(lambda: (tmp_path / "lost").exists() and copied(s), said)
    assert recover(place) == 1 and (tmp_path / "nas/v3/metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_place_without_links_or_durable_files_gets_its_copy_and_it_is_said(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    monkeypatch.setattr(checkpoint, "durable_link", refuse)
    real = checkpoint.atomic_write
    monkeypatch.setattr(checkpoint, "atomic_write", lambda path, pieces:
                        refuse() if "nas" in str(path) and path.suffix == ".pt" else real(path, pieces))
    s, said = mirrored(tmp_path)
    s.links = False
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
    assert names(tmp_path / "nas/v3/checkpoints") == ["best.pt", "last.pt"] and recover(tmp_path / "nas/v3/checkpoints") == 1
    assert any("is written in place" in line for line in said)


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


# ---- the command line's manners ----

def tree(directory):
    return {str(p.relative_to(directory)): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in directory.rglob("*")}


def test_ls_and_verify_write_nothing_and_follow_no_lock_that_is_a_link(tmp_path, capsys):
    run = tmp_path / "run"
    with saver(run) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
    (tmp_path / "precious").write_text("mine")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "precious")
    before = tree(tmp_path), run.stat().st_mtime_ns
    assert checkpoint.main(["ls", str(run)]) == checkpoint.main(["verify", str(run)]) == 0
    assert (tree(tmp_path), run.stat().st_mtime_ns) == before and (tmp_path / "precious").read_text() == "mine"
    assert "-> last.pt" in capsys.readouterr().out


def test_ls_names_the_process_that_holds_a_run_without_taking_its_lock(tmp_path, capsys):
    script = "import sys, time; sys.path.insert(0, sys.argv[1]); import checkpoint; held = checkpoint.lock(sys.argv[2]); " \
             "print('held', flush=True); time.sleep(600)"
    with saver(tmp_path) as s:
        s.save_mid(state(1))
    holder = forked.Popen([sys.executable, "-c", script, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert checkpoint.main(["ls", str(tmp_path)]) == 0
    assert f"in use by process {holder.pid}" in capsys.readouterr().out
    holder.kill()
    holder.wait()


def test_ls_and_verify_of_a_run_whose_files_rotate_meanwhile_leave_out_what_is_gone(tmp_path, capsys):
    with saver(tmp_path) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        s.save_mid(state(2, epoch=2))

    def rotated(number, name, arguments):       # whenever a snapshot is looked at, it has just been rotated away
        with watched.paused():
            old, = tmp_path.glob("mid_epoch_*.pt")
            if str(old) in str(arguments):
                old.rename(tmp_path / f"mid_epoch_002_{900 + number:06d}.pt")
    for command in ("ls", "verify"):
        watched = crash.Watched(tmp_path, rotated)
        with watched:
            assert checkpoint.main([command, str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "last.pt" in out and "No such file" not in out


def test_ls_shows_both_places_and_marks_what_a_resume_takes(tmp_path, capsys):
    s, said = mirrored(tmp_path)
    with s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        s.save_mid(state(2, epoch=2))
    newest = tmp_path / "results/v3/checkpoints/mid_epoch_002_000002.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    assert checkpoint.main(["ls", str(tmp_path / "results")]) == 0
    home, second = capsys.readouterr().out.split(f"second copy: {tmp_path}/nas/v3/checkpoints")
    assert "->" not in home and "-> mid_epoch_002_000002.pt" in second and "DAMAGED" in home
    assert checkpoint.main(["verify", str(tmp_path / "nas")]) == 0
    assert checkpoint.main(["clean", str(tmp_path / "nas"), "--yes"]) == 0


def test_clean_removes_damage_of_this_format_only(tmp_path, capsys):
    with saver(tmp_path) as s:
        s.save_epoch(state(5, epoch=1), metric=0.5)
    torch.save({"epoch": 1, "batch": 1}, tmp_path / "mid_epoch_001_000001.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 1, "batch": 1, "path": ROOT}, tmp_path / "mid_epoch_001_000002.pt")
    (tmp_path / "mid_epoch_001_000003.pt").write_bytes((tmp_path / "mid_epoch_001_000002.pt").read_bytes()[:-50])
    whole = (tmp_path / "last.pt").read_bytes()
    for number, blob in enumerate((whole[:-50], whole[:9000], whole[:200] + b"\1" + whole[201:], b"", bytes(len(whole))), 4):
        (tmp_path / f"mid_epoch_001_{number:06d}.pt").write_bytes(blob)
    assert checkpoint.main(["clean", str(tmp_path), "--yes"]) == 0
    left = [f"mid_epoch_001_{number:06d}.pt" for number in (1, 2, 3)]
    assert names(tmp_path) == sorted(["best.pt", "checkpoint_epoch_001.pt", "last.pt", *left])
    out = capsys.readouterr().out
    assert all(f"left {tmp_path}/{name}  (DAMAGED" in out for name in left)


def test_strip_replaces_nothing_takes_no_third_path_and_writes_a_model_card(tmp_path, capsys):
    for name in ("a", "b", "c"):
        with saver(tmp_path / name) as s:
            s.save_epoch({**state(1, epoch=4), "config": {"data": {"path": "tusz"}, "evaluation": {"threshold": 0.86}},
                          "scores": {"event_f1": 0.71, "threshold": 0.9}}, metric=0.71, name="event_f1")
    files = [str(tmp_path / name / "best.pt") for name in ("a", "b", "c")]
    before = tree(tmp_path)
    assert checkpoint.main(["strip", *files]) == checkpoint.main(["strip", *files[:2]]) == 2
    assert tree(tmp_path) == before
    assert checkpoint.main(["strip", files[0]]) == 0 and checkpoint.main(["strip", files[0]]) == 2
    card = (tmp_path / "a/best_weights.md").read_text()
    for text in ("data: tusz", "threshold: 0.9\n", "| event_f1 | 0.71 |", "Not a medical device", "chosen by: event_f1\n- at: 0.71"):
        assert text in card, card
    assert "optimizer" not in checkpoint.load(tmp_path / "a/best_weights.pt")


def test_an_average_is_the_mean_of_weights_with_the_newest_buffers_and_refuses_other_runs_shapes_and_twins(tmp_path, capsys):
    def put(s, step, **more):
        model = {"w": torch.full((3,), float(step), dtype=torch.bfloat16), "n.running_mean": torch.full((2,), float(step)),
                 "n.num_batches_tracked": torch.tensor(step), **more}
        s.save_mid({"model": model, "epoch": 1, "batch": step, "global_step": step, "scores": {"threshold": 0.5, "event_f1": 1.0}})
        s.wait()
    with saver(tmp_path / "run", mid_epoch_keep=0) as s:
        for step in (1, 2, 6):
            put(s, step)
        put(s, 7, extra=torch.ones(1))
    with saver(tmp_path / "other") as s:
        put(s, 1)
    files = [str(tmp_path / f"run/mid_epoch_001_{step:06d}.pt") for step in (6, 1, 2)]
    out = str(tmp_path / "mean.pt")
    assert checkpoint.main(["average", *files, "--out", out]) == 0
    got = checkpoint.load(out)
    assert got["model"]["w"].tolist() == [3.0] * 3 and got["model"]["w"].dtype == torch.bfloat16
    assert got["model"]["n.running_mean"].tolist() == [6.0] * 2 and got["model"]["n.num_batches_tracked"] == 6
    assert got["scores"] == {"threshold": 0.5} and got["averaged"][0] == "mid_epoch_001_000006.pt"
    wrong = {"not all of one run": [files[0], str(tmp_path / "other/mid_epoch_001_000001.pt")],
             "the same save": [files[0], files[0]], "two checkpoints or more": files[:1],
             "extra has another shape": [files[0], str(tmp_path / "run/mid_epoch_001_000007.pt")]}
    for message, paths in wrong.items():
        assert checkpoint.main(["average", *paths, "--out", str(tmp_path / "x.pt")]) == 2
        assert message in capsys.readouterr().err
    assert checkpoint.main(["average", *files, "--out", out]) == 2 and "exists" in capsys.readouterr().err


def test_what_training_waited_counts_from_where_packing_the_state_began(tmp_path):
    lines = []
    with checkpoint.Checkpointer(tmp_path, say=lines.append) as writer:
        writer.save_mid({"epoch": 1, "batch": 1}, since=time.monotonic() - 5)
        writer.wait()
        assert writer.blocked >= 5 and any("training waited 5" in line for line in lines), lines
