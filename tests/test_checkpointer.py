"""Policy of checkpoint.py: locks, records, copied loops, patience, the second copy, the command line's manners."""
import contextlib
import errno
import os
import random
import shutil
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
from conftest import ROOT
from crash import sound, state
from eeg import disk
from test_crash import recover, saver


# ---- temp files ----

def test_a_save_of_longer_than_an_hour_keeps_its_temp_from_another_one_of_its_process(tmp_path):
    def pieces():
        yield b"begun, "
        temp, = tmp_path.glob(".*.tmp")
        os.utime(temp, (0, 0))
        checkpoint.atomic_save({"a": 1}, tmp_path / "other.pt")
        yield b"ended"

    checkpoint.atomic_write(tmp_path / "x", pieces())
    assert (tmp_path / "x").read_bytes() == b"begun, ended"


def test_a_temp_whose_removal_was_interrupted_goes_at_the_next_save(tmp_path):
    assert interrupted(checkpoint._unlink.__code__, lambda: checkpoint.links_work(tmp_path), 1)
    assert list(tmp_path.glob(".*.tmp"))
    checkpoint.atomic_save({"a": 1}, tmp_path / "x.pt")
    assert not list(tmp_path.glob(".*.tmp"))


# ---- the lock ----

def test_a_lock_is_given_back_at_close_though_a_forked_child_lives_on(tmp_path):
    held = checkpoint.lock(tmp_path)
    child = os.fork()
    if not child:
        signal.pause()
    try:
        with pytest.raises(checkpoint.InUse, match="in use by this process: close the earlier Checkpointer first"):
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


def interrupted(code, act, line):
    """Whether Ctrl-C came at the `line`-th line that runs of `code` within act()."""
    left = [line]

    def trace(frame, event, _):
        left[0] -= frame.f_code is code and event == "line"
        if not left[0]:
            left[0] = -1
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_saver_that_is_interrupted_as_it_is_made_holds_no_directory(tmp_path):
    made, line = [], 1
    while interrupted(checkpoint.Checkpointer.__init__.__code__, lambda: made.append(checkpoint.Checkpointer(tmp_path)), line):
        checkpoint.lock(tmp_path).close()
        line += 1
    made[0].close()
    assert line > 20


def test_a_lock_whose_close_was_interrupted_is_given_back_by_the_next(tmp_path):
    held, line = checkpoint.lock(tmp_path), 1
    while interrupted(checkpoint.Lock.close.__code__, held.close, line):
        held.close()
        held, line = checkpoint.lock(tmp_path), line + 1
    assert line > 5


@pytest.mark.parametrize("take", [checkpoint.lock, disk.hold])
def test_a_lock_file_whose_disk_refuses_its_text_at_close_is_given_back_without_an_error(tmp_path, take):
    def refuse(number, name, arguments):
        return OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)) if name == "close" else None
    with crash.Watched(tmp_path, refuse):
        take(tmp_path).close()
    take(tmp_path).close()


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

@pytest.mark.slow
def test_the_loop_of_the_docstring_with_its_dropout_killed_ten_times_ends_bit_identical(tmp_path):
    crash.warm()
    assert crash.run_child(lambda: crash.run_loop(tmp_path / "whole")) == "done"
    for step in (1, 7, 19, 20, 21, 40, 55, 71, 99, 100):
        assert crash.run_child(lambda: crash.run_loop(tmp_path / "cut", dies_after=step)) == "killed"
    assert crash.run_child(lambda: crash.run_loop(tmp_path / "cut")) == "done"
    for name in ("last.pt", "best.pt"):
        mine, whole = (checkpoint.load(tmp_path / run / "checkpoints" / name) for run in ("cut", "whole"))
        for key in ("model", "optimizer", "epoch", "batch", "global_step"):
            assert crash.same(mine[key], whole[key]), key
        assert mine["holdfast"]["metric"] == whole["holdfast"]["metric"]


def test_random_states_bring_back_every_generator(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()
    np.random.randn()                       # a spare normal number is in NumPy's state now
    checkpoint.atomic_save({"random": checkpoint.random_states()}, tmp_path / "x.pt")
    expected = draw()
    checkpoint.restore_random_states(checkpoint.load(tmp_path / "x.pt")["random"])
    assert draw() == expected


def test_a_thread_is_told_that_no_signal_reaches_it(tmp_path):
    said = []

    def work():
        with checkpoint.Checkpointer(tmp_path, say=said.append) as saver, saver.signals():
            saver.save_mid(state(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said[0] == "checkpoints: no signal is heard here: they reach the main thread alone"
    assert said[1].startswith("saved mid_epoch")


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


def test_a_signal_right_after_that_of_another_process_of_the_training_is_the_same_wish(monkeypatch):
    handled = []
    monkeypatch.setattr(signal, "raise_signal", handled.append)
    with checkpoint.Signals() as signals:
        signals.take(signal.SIGTERM)        # as train.py has it from its peers, before its own comes
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM and not handled


@pytest.mark.slow
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
        with pytest.raises(ValueError, match=r"epoch 0 .* \(they count from 1\)"):
            s.save_epoch({"epoch": 0})
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
            s.resume(tmp_path / "foreign_last.pt")          # where it was set aside


def failing_reads(monkeypatch, path, times, number=errno.EIO):
    """The next `times` openings of `path` fail."""
    real, left = os.open, [times]

    def faulty(name, *arguments, **options):
        if str(name) == str(path) and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(name))
        return real(name, *arguments, **options)
    monkeypatch.setattr(os, "open", faulty)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_a_fault_at_reading_is_no_damage_it_is_raised_and_nothing_is_touched(tmp_path, monkeypatch, number):
    with saver(tmp_path, checkpoint_interval=0) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        s.save_mid(state(2, epoch=2))
    newest = tmp_path / "mid_epoch_002_000002.pt"
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    failing_reads(monkeypatch, newest, -1, number)
    with saver(tmp_path) as s:
        for look in (s.resume, lambda: checkpoint.find_resume(tmp_path)):
            with pytest.raises(OSError) as fault:
                look()
            assert fault.value.errno == number and fault.value.filename == str(newest)
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


def test_going_back_to_an_abandoned_best_twice_by_the_same_command_finds_it_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with saver(tmp_path) as s:
        for epoch, metric in enumerate((0.3, 0.9), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=metric)
    with saver(tmp_path) as s:
        s.resume(tmp_path / "checkpoint_epoch_001.pt")
    kept, = (path.name for path in tmp_path.glob("abandoned_best_*.pt"))
    for metric in (0.95, 0.1):
        with saver(tmp_path) as s:
            assert sound(s.resume(kept)) == 2 and sound(checkpoint.load("best.pt")) == 2
            assert s.save_epoch(state(3, epoch=3), metric=metric) is (metric > 0.9)


@pytest.mark.parametrize("place", ["elsewhere", "run"])
def test_a_copy_of_the_best_epoch_alone_is_the_best_of_the_line_that_goes_on_from_it(tmp_path, place):
    (tmp_path / "elsewhere").mkdir()
    with saver(tmp_path / "run") as s:
        for epoch, metric in enumerate((0.9, 0.3), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=metric)
            s.wait()
            shutil.copy(tmp_path / "run/last.pt", tmp_path / place / f"kept_{epoch}.pt")
    with saver(tmp_path / "run") as s:          # begun anew by mistake
        s.save_epoch(state(3, epoch=1), metric=0.95)
    for name in ("checkpoint_epoch_001.pt", "checkpoint_epoch_002.pt"):
        (tmp_path / "run" / name).unlink()
    with saver(tmp_path / "run") as s:
        s.resume(tmp_path / place / "kept_1.pt")
        assert sound(checkpoint.load(tmp_path / "run/best.pt")) == 1
        assert not s.save_epoch(state(4, epoch=2), metric=0.5)


def test_a_saver_that_goes_back_itself_judges_the_best_by_the_line_it_goes_on(tmp_path):
    with saver(tmp_path, checkpoint_keep=0) as s:
        for epoch, metric in enumerate((0.3, 0.2, 0.9), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=metric)
        s.resume(tmp_path / "checkpoint_epoch_002.pt")
        assert sound(checkpoint.load(tmp_path / "best.pt")) == 1, "0.3 is the best of the line that goes on"
        assert s.save_epoch(state(4, epoch=3), metric=0.4)
    assert [sound(checkpoint.load(path)) for path in tmp_path.glob("abandoned_best_*.pt")] == [3]


@pytest.mark.parametrize("fault", [None, OSError(errno.EIO, "input/output error")], ids=["slow", "failed once"])
def test_a_saver_that_resumes_again_meets_the_save_that_it_has_at_work(tmp_path, fault):
    faults = [fault]

    def slow(directory):
        time.sleep(0.3)
        if faults and faults.pop():
            raise fault

    with saver(tmp_path, before_save=slow, background=True) as s:
        s.save_epoch(state(1, epoch=1))
        assert sound(s.resume()) == 1 and s.position == (2, 0)


def test_a_best_of_the_abandoned_line_that_is_damaged_is_called_so(tmp_path, capsys):
    with saver(tmp_path, checkpoint_keep=0) as s:
        for epoch, metric in enumerate((0.3, 0.9), 1):
            s.save_epoch(state(epoch, epoch=epoch), metric=metric)
    for name in ("checkpoint_epoch_002.pt", "last.pt"):
        (tmp_path / name).unlink()
    blob = bytearray((tmp_path / "best.pt").read_bytes())
    blob[len(blob) // 3] ^= 1
    (tmp_path / "best.pt").write_bytes(blob)
    with saver(tmp_path, say=print) as s:
        s.resume(tmp_path / "checkpoint_epoch_001.pt")
    assert "best.pt is damaged" in capsys.readouterr().out and (tmp_path / "best.pt.damaged").exists()
    assert sound(checkpoint.load(tmp_path / "best.pt")) == 1


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


def test_a_run_that_ends_for_its_weights_says_so_without_a_number_of_an_error_that_no_disk_had(tmp_path):
    with pytest.raises(checkpoint.SaveFailed) as ended, checkpoint.Checkpointer(tmp_path, say=str) as s:
        for step in range(1, 9):
            s.save_mid({"model": {"w": torch.tensor([float("nan")])}, "epoch": 1, "batch": step})
            s.wait()
    assert str(ended.value) == "saves failed for 0 minutes, 3 in a row, the last one: weights are not finite (w): " \
        "not written over good files"


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


# ---- what a save says ----

def test_whatever_say_raises_ends_no_training_and_leaves_every_save(tmp_path):
    def say(line):
        raise RuntimeError("init() was not called")

    with checkpoint.Checkpointer(tmp_path, say=say) as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        s.save_mid(state(2, epoch=2))
    assert sound(saver(tmp_path).resume()) == 2


def test_what_training_waited_counts_from_where_packing_the_state_began(tmp_path):
    lines = []
    with checkpoint.Checkpointer(tmp_path, say=lines.append) as writer:
        writer.save_mid({"epoch": 1, "batch": 1}, since=time.monotonic() - 5)
        writer.wait()
        assert writer.blocked >= 5 and any("training waited 5" in line for line in lines), lines


@pytest.mark.parametrize("wrong", [{"mid_epoch_keep": -1}, {"checkpoint_keep": -1}, {"mid_epoch_keep": 1.5}, {"mode": "maximum"},
                                   {"checkpoint_interval": "1"}, {"checkpoint_interval": 0.5}, {"checkpoint_interval": -1},
                                   {"mid_epoch_minutes": float("nan")}, {"mid_epoch_minutes": -1}, {"mid_epoch_minutes": "10"},
                                   {"save_patience_minutes": float("nan")}, {"save_patience_minutes": -1},
                                   {"mode": {"loss": "minimum"}}])
def test_settings_that_a_save_would_fail_on_are_refused_at_once(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be"):
        checkpoint.Checkpointer(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"name": "x" * 101}, {"name": "two\nlines"}, {"name": 3}, {"name": "error"},
                                   {"name": "loss", "rules": "r" * 101}])
def test_a_metric_that_a_resume_would_not_know_again_is_refused_and_best_stays(tmp_path, wrong):
    with saver(tmp_path, mode={"loss": "min"}) as s:
        s.save_epoch(state(1, epoch=1), metric=0.1, name="loss")
        with pytest.raises(ValueError, match="metric"):
            s.save_epoch(state(2, epoch=2), metric=0.5, **wrong)
        s.save_epoch(state(2, epoch=2), metric=0.5, name="loss")
    assert checkpoint.peek(tmp_path / "best.pt")["epoch"] == 1 and checkpoint.peek(tmp_path / "last.pt")["epoch"] == 2


def test_a_save_after_the_end_is_refused_at_once_and_waits_for_nothing(tmp_path):
    with saver(tmp_path) as s:
        s.save_mid(state(1))
    with pytest.raises(ValueError, match="this Checkpointer is closed"):
        s.save_mid(state(2))
    s.settle()


def test_a_fork_leaves_the_saver_to_its_parent_and_is_told_so_where_it_saves(tmp_path):
    go_on = threading.Event()
    with saver(tmp_path, background=True, before_save=lambda directory: go_on.wait()) as s:
        s.save_mid(state(1))
        child = os.fork()
        if not child:
            signal.alarm(10)                # no writer is here: what waited for one, waited for ever
            with contextlib.suppress(ValueError), s:
                s.save_mid(state(2))
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        go_on.set()
    assert code == 0
    assert sound(saver(tmp_path).resume()) == 1
