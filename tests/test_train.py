"""The trainer: configuration, exit codes, and runs that end bit-identical wherever they were cut."""
import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import h5py
import pytest
import torch
import torch.nn.functional as F
import yaml

import checkpoint
from run import config
import crash
import data
import evaluate
import forked
import tracer
import train
from conftest import ROOT, dies, ext4_image, imported, write_edf
from helpers import EPOCH_STEPS, TINY, LIMIT, PYTHON, assert_same_run, free_port, last, loaded, rest, rows, same, spawn, spawn_hooked, wait_for
import model
from model import SMALL
from eeg import corpora, splits
from eeg.disk import read_json_lines
from run.records import MetricsFile


@pytest.fixture(scope="session")
def corpus(small_corpus):
    return small_corpus


@pytest.fixture(scope="session")
def reference(corpus, tmp_path_factory):
    """The uninterrupted run that every cut run must equal."""
    results = tmp_path_factory.mktemp("reference")
    assert train.run(loaded(corpus, results)) == 0
    return results


@contextlib.contextmanager
def cut_at(boundary, number=signal.SIGTERM):
    """A real signal to this process just before the given step or recording boundary of the run."""
    original, seen = train.Trainer.boundary, [0]

    def counted(self):
        seen[0] += 1
        if seen[0] == boundary:
            os.kill(os.getpid(), number)
        original(self)
    train.Trainer.boundary = counted
    try:
        yield seen
    finally:
        train.Trainer.boundary = original


def loaded_path(corpus, results, **changes):
    loaded(corpus, results, **changes)
    return results / "config.yaml"


def boundaries(reference):
    state = last(reference)
    return state["global_step"] + state["epoch"] * len(last_validation(reference))


def last_validation(reference):
    config = yaml.safe_load(Path(reference, "t", "config.yaml").read_text())
    recordings = data.open_corpus(config["data"]["path"])
    return data.split_patients(recordings, [], config["data"]["dev_fraction"], config["experiment"]["seed"])[1]


# ---- the same run, wherever it was cut ----

@pytest.mark.slow
def test_a_run_cut_at_any_step_or_recording_of_an_epoch_ends_as_the_uninterrupted_one(corpus, reference, tmp_path, capsys):
    per_epoch = boundaries(reference) // 2
    for boundary in range(1, per_epoch + 1):
        results = tmp_path / str(boundary)
        with cut_at(boundary):
            assert train.run(loaded(corpus, results)) == 128 + signal.SIGTERM
        assert train.run(loaded(corpus, results), resume="true") == 0
        assert_same_run(results, reference)


@pytest.mark.slow
def test_five_cuts_in_one_run_by_different_signals_leave_no_trace(corpus, reference, tmp_path):
    config, resume = loaded(corpus, tmp_path), "false"
    for boundary, number in zip((2, 1, 3, 4, 2), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)):
        with cut_at(boundary, number):
            assert train.run(config, resume) == 128 + number
        resume = "true"
    assert train.run(config, "true") == 0
    assert_same_run(tmp_path, reference)


def test_sigkill_in_mid_epoch_and_in_validation_resumes_at_the_next_batch_and_ends_the_same(corpus, reference, tmp_path):
    loaded(corpus, tmp_path)
    for place in (("after_step", 2), ("score", 2), ("after_step", 2)):
        process = spawn(tmp_path / "config.yaml", "--resume", held=(*place, tmp_path / "never"))
        wait_for(process, "held")
        process.kill()
        process.wait()
    process = spawn(tmp_path / "config.yaml", "--resume")
    lines = wait_for(process, "resumed: epoch")
    assert rest(process) is not None and process.returncode == 0
    assert any("resume: chose" in line for line in lines)
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
def test_a_resume_between_training_and_validation_saves_nothing_twice(corpus, reference, tmp_path):
    with cut_at(EPOCH_STEPS):
        assert train.run(loaded(corpus, tmp_path)) == 128 + signal.SIGTERM
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    listed = [row["file"] for row in read_json_lines(tmp_path / "t/saves.jsonl") if row["kind"] == "save"]
    assert listed.count(f"mid_epoch_001_{EPOCH_STEPS:06d}.pt") == 1 and len(listed) == len(set(listed))
    assert_same_run(tmp_path, reference)


def test_a_run_resumed_from_a_damaged_newest_file_falls_back_names_it_and_ends_the_same(corpus, reference, tmp_path, capsys):
    config = loaded(corpus, tmp_path, training__mid_epoch_minutes=0.0)
    with cut_at(4):
        train.run(config)
    newest = checkpoint.find_resume(tmp_path / "t/checkpoints")
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 4
    newest.write_bytes(blob)
    capsys.readouterr()
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert f"skipped {newest.name}" in capsys.readouterr().out
    assert_same_run(tmp_path, reference)


def test_when_every_file_is_damaged_the_run_starts_afresh_and_keeps_the_old_files(corpus, tmp_path, capsys):
    config = loaded(corpus, tmp_path, training__epochs=1)
    with cut_at(2):
        train.run(config)
    for path in (tmp_path / "t/checkpoints").glob("*.pt"):
        path.write_bytes(b"nothing")
    assert train.run(config, "true") == 0
    assert list((tmp_path / "t.1/checkpoints").glob("*.pt")) and "moved the old run aside" in capsys.readouterr().out


# ---- stopping ----

HELD = "train.Trainer.save_mid = lambda self, last=False: (print('holding', flush=True), time.sleep(600))"


def test_a_second_signal_exits_at_once_when_it_comes_a_second_after_the_first(corpus, tmp_path):
    loaded(corpus, tmp_path, training__epochs=500)
    process = spawn_hooked(tmp_path / "config.yaml", HELD, minutes="30")
    wait_for(process, "batch 1/")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "holding")
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    rest(process)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("first, second", [(signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP)])
def test_two_signals_within_milliseconds_are_one_wish_and_the_save_is_made(corpus, tmp_path, first, second):
    """The process sends them to itself: between two of another process, a busy machine may take its second."""
    signals = f"""
original = train.Trainer.after_step
def after_step(self, *arguments):
    original(self, *arguments)
    if self.step == 2:
        os.kill(os.getpid(), {first:d})
        os.kill(os.getpid(), {second:d})
train.Trainer.after_step = after_step
"""
    loaded(corpus, tmp_path, training__epochs=500)
    process = spawn_hooked(tmp_path / "config.yaml", signals, minutes="30")
    out = rest(process)
    assert process.returncode == 128 + first and f"stopped by {first.name}, saved" in out, out
    assert checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))["global_step"] >= 1


@pytest.mark.slow
def test_a_signal_inherited_as_ignored_stays_ignored(corpus, tmp_path):
    """As by nohup; through nohup itself: test_checkpointer.py."""
    loaded(corpus, tmp_path, training__epochs=500)
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = spawn_hooked(tmp_path / "config.yaml", ignored, minutes="30")
    wait_for(process, "batch 1/")
    process.send_signal(signal.SIGHUP)
    wait_for(process, "epoch 2/")
    process.send_signal(signal.SIGTERM)
    out = rest(process)
    assert process.returncode == 128 + signal.SIGTERM and "SIGHUP" not in out


def test_the_last_line_of_a_stopped_run_is_the_command_that_continues_it(corpus, tmp_path):
    loaded(corpus, tmp_path, training__epochs=500)
    process = spawn(tmp_path / "config.yaml", "--set", "training.epochs=9")
    wait_for(process, "batch 1/")
    process.send_signal(signal.SIGINT)
    out = rest(process)
    config_path = tmp_path / "config.yaml"
    again = f"python {ROOT}/train.py --config {config_path} --resume --set training.epochs=9"
    assert re.search(rf"SIGINT, saved \(mid_epoch_\S+.pt at \S+\); to go on: BGB_MID_EPOCH_MINUTES=0 {again}\n$", out), out
    named = re.search("no epoch has been validated yet, so there is no best.pt; the newest weights: (.*)", out)[1]
    assert tmp_path / named == checkpoint.find_resume(tmp_path / "t/checkpoints", lambda line: None)


def test_a_time_limit_gives_weights_that_evaluate_before_the_first_validation(corpus, tmp_path, capsys):
    assert train.run(loaded(corpus, tmp_path, training__time_limit_hours=1e-6)) == 75
    named = re.search("the newest weights: (.*)", capsys.readouterr().out)[1]
    assert evaluate.main(["--checkpoint", named, "--data", str(corpus), "--split", "dev", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/scores.json").exists()


@pytest.mark.slow
def test_three_starts_in_a_row_that_end_where_they_began_are_stuck_and_a_longer_limit_goes_on(
        corpus, reference, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Trainer, "late", lambda self: self.batch == EPOCH_STEPS)      # inside the first recording
    config, codes = loaded(corpus, tmp_path), []
    for _ in range(5):
        codes.append(train.run(config, "true"))
    assert codes == [75, 75, 75, 2, 2]                      # the first one has trained an epoch
    out = capsys.readouterr().out
    assert out.count("stuck: 3 starts in a row ended where they began") == 1 and "raise training.time_limit_hours" in out
    monkeypatch.undo()
    monkeypatch.setattr(train.Trainer, "draw", lambda self: None)
    assert train.run(config, "true") == 0
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_of_another_size_leave_the_learning_rate_at_its_share_of_the_run(corpus, tmp_path, capsys, size):
    with cut_at(16):                                        # of 18 steps and 6 recordings
        assert train.run(loaded(corpus, tmp_path, training__epochs=3)) == 143
    before = last(tmp_path, checkpoint.find_resume(tmp_path / "t/checkpoints").name)
    assert train.run(loaded(corpus, tmp_path, training__epochs=3, training__batch_size=size), "true") == 0
    state, train_rows = last(tmp_path), [row for row in rows(tmp_path) if row["kind"] == "train"]
    steps = state["global_step"] - before["global_step"]
    total = 3 * math.ceil(before["sampler"]["windows"] / before["batch"] * EPOCH_STEPS / size)
    assert state["scheduler"]["last_epoch"] == pytest.approx(total, abs=3)
    rates = [row["lr"] for row in train_rows][-steps - 1:]
    assert rates == sorted(rates, reverse=True) and all(rates[:-1]) and rates[-1] == 0
    assert rates[0] / 1e-3 == pytest.approx(train.lr_factor(before["global_step"], 18, 0), abs=0.02)
    assert rates[1] / 1e-3 == pytest.approx(rates[0] / 1e-3, abs=0.25)
    assert f"batches are of {size} windows now: the learning rate goes on at step" in capsys.readouterr().out


JOB = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "8"}, {"RANK": "3"}, {"WORLD_SIZE": "two"}, {"RANK": "1", "WORLD_SIZE": "2"},
                                  JOB | {"WORLD_SIZE": "\xb2"}, JOB | {"MASTER_PORT": "none"}, JOB | {"MASTER_PORT": "99999"}, JOB | {"LOCAL_RANK": "-1"}])
def test_what_another_job_left_in_the_environment_is_refused_in_one_line(corpus, tmp_path, capsys, monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--config", str(loaded_path(corpus, tmp_path)), "--resume"]) == 2
    error = capsys.readouterr().err
    name, value = list(left.items())[-1]
    assert f"{name}={value}" in error and "in the environment, left over" in error and "MASTER_ADDR" in error and error.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_a_job_that_was_left_whole_in_the_environment_says_for_whom_it_waits(corpus, tmp_path):
    soon = "import run.machine; run.machine.LATE_SECONDS = 1"
    process = spawn_hooked(loaded_path(corpus, tmp_path), soon, "--resume", **JOB | {"MASTER_PORT": str(free_port())})
    try:
        assert "process 0 of 2 waits for the others at 127.0.0.1:" in process.stdout.readline()
    finally:
        process.kill()
        process.communicate()
    with socket.create_server(("127.0.0.1", 0)) as other:       # their meeting place is another's
        process = spawn(loaded_path(corpus, tmp_path), "--resume", **JOB | {"MASTER_PORT": str(other.getsockname()[1])})
        out = rest(process)
    assert process.returncode == 1 and out.startswith("train.py: process 0 of 2 cannot meet the others at 127.0.0.1:")
    assert "Traceback" not in out


def test_resume_takes_its_word_in_any_case(corpus, tmp_path, capsys):
    path = str(loaded_path(corpus, tmp_path, training__epochs=1))
    assert train.main(["--config", path, "--resume", "False"]) == 0
    assert train.main(["--config", path, "--resume", "FALSE"]) == 2
    assert train.main(["--config", path, "--resume", "True"]) == 0
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["", ".", "latest", "config.yaml/last.pt"])
def test_a_resume_of_what_is_no_file_is_refused_with_the_word_that_was_given(corpus, tmp_path, capsys, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(loaded_path(corpus, tmp_path)), "--resume", word]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: --resume {shlex.quote(word)}: ") and line.endswith("or none for the latest one")
    assert not (tmp_path / "t").exists()


def test_ctrl_c_while_the_imports_run_is_one_line(tmp_path):
    """The first module that train.py imports after the standard library says that it is imported."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    process = spawn(tmp_path / "config.yaml", start=subprocess.Popen, PYTHONPATH=str(tmp_path))
    wait_for(process, "importing")
    process.send_signal(signal.SIGINT)
    out = rest(process)
    assert process.returncode == 130 and out.strip() == "train.py: stopped by SIGINT before training began"


STUCK = """
import ctypes
original = train.Trainer.train_step
def stuck(self, *arguments):
    if self.step == 3:
        self.watch.limit, self.watch.slowest = 1.0, 0.0         # from here on
        ctypes.CDLL(None).sleep(600)
    return original(self, *arguments)
train.Trainer.train_step = stuck
"""


def test_a_step_that_hangs_in_c_ends_the_run_with_70_and_says_where_it_stood_and_a_resume_ends_the_same(
        corpus, reference, tmp_path):
    loaded(corpus, tmp_path, training__hang_minutes=30.0)
    process = spawn_hooked(tmp_path / "config.yaml", STUCK)
    out = rest(process)
    assert process.returncode == 70, out
    for text in (out, (tmp_path / "t/hang.txt").read_text(), (tmp_path / "t/log.txt").read_text()):
        assert "last done: " in text and f"epoch 1, batch 3 of {EPOCH_STEPS}, step 3, last save: mid_epoch_001_00000" in text
        assert "(most recent call first)" in text and "in stuck" in text
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert_same_run(tmp_path, reference)


def test_the_time_limit_leaves_room_for_the_slowest_save_seen(corpus, tmp_path):
    """Two hours are left when the first save turns out to take an hour and a half, the next step two minutes."""
    slow = """
original = train.Trainer.late
def late(self):
    if self.step == 2:
        self.home.saver._slowest = 5400.0
        self.slowest = 2000.0
    return original(self)
train.Trainer.late = late
"""
    loaded(corpus, tmp_path, training__time_limit_hours=2.0)
    process = spawn_hooked(tmp_path / "config.yaml", slow)
    out = rest(process)
    assert process.returncode == 75 and "batch 2/" in out and "batch 3/" not in out, out


def test_the_time_limit_saves_exits_75_and_the_resumed_run_ends_the_same(corpus, reference, tmp_path, capsys):
    limited = loaded(corpus, tmp_path, training__time_limit_hours=0.2 / 3600)
    codes = [train.run(limited, "true" if attempt else "false") for attempt in range(2)]
    assert 75 in codes
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
def test_the_time_limit_inside_a_validated_recording_keeps_the_recordings_before_it(corpus, reference, tmp_path, monkeypatch):
    original = train.Trainer.score

    def score(self, recording):
        if self.scores:
            self.deadline = 0.0
        return original(self, recording)
    monkeypatch.setattr(train.Trainer, "score", score)
    assert train.run(loaded(corpus, tmp_path)) == 75
    monkeypatch.undo()
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert state["batch"] == state["global_step"] and len(state["validation"]) == 1
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
def test_fifty_losses_in_a_row_that_are_not_finite_stop_the_run_and_name_the_last_good_checkpoint(corpus, tmp_path, capsys,
                                                                                                 monkeypatch):
    config = loaded(corpus, tmp_path, data__stride_seconds=2.0, training__batch_size=2, training__mid_epoch_minutes=0.002)
    healthy, calls = train.focal_loss, [0]

    def failing(*arguments):
        calls[0] += 1
        return healthy(*arguments) * (math.nan if calls[0] > 3 else 1.0)
    monkeypatch.setattr(train, "focal_loss", failing)
    assert train.run(config) == 1
    out = capsys.readouterr().out
    assert "50 losses in a row were not finite; the last good checkpoint is" in out and "mid_epoch_" in out


@pytest.mark.slow
def test_weights_that_became_not_finite_end_the_run_with_no_word_of_a_disk_and_the_next_start_goes_on(
        corpus, reference, tmp_path, capsys, monkeypatch):
    real = train.Trainer.boundary

    def boundary(self):
        if self.step == 3:
            next(self.model.parameters()).data.fill_(math.nan)
        real(self)
    monkeypatch.setattr(train.Trainer, "boundary", boundary)
    assert train.run(loaded(corpus, tmp_path, training__mid_epoch_minutes=0.0)) == 1
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped: "))
    assert "weights are not finite" in said and said.endswith("; lower the learning rate, then --resume")
    monkeypatch.undo()
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
def test_a_metric_that_is_never_computable_makes_no_epoch_the_best(corpus, tmp_path, capsys, monkeypatch):
    with validations(monkeypatch, auroc=[math.nan, math.nan]):
        assert train.run(loaded(corpus, tmp_path)) == 0
    assert "epoch 2/2: auroc not computable, no epoch is the best yet" in capsys.readouterr().out
    assert not (tmp_path / "t/checkpoints/best.pt").exists()


def test_one_loss_that_is_not_finite_skips_optimizer_and_schedule_together_and_is_counted(corpus, tmp_path, monkeypatch):
    healthy, calls = train.focal_loss, [0]

    def failing(*arguments):
        calls[0] += 1
        return healthy(*arguments) * (math.inf if calls[0] == 2 else 1.0)
    monkeypatch.setattr(train, "focal_loss", failing)
    assert train.run(loaded(corpus, tmp_path, training__epochs=1)) == 0
    state = last(tmp_path)
    assert state["skipped"] == 1 and state["scheduler"]["last_epoch"] == state["global_step"] - 1
    assert float(state["optimizer"]["state"][0]["step"]) == state["global_step"] - 1
    assert [r["skipped"] for r in rows(tmp_path) if r["kind"] == "train"][1] == 1


def command_after(first, config_path):
    """The command for a fork, whose process does the lines `first` before anything of train.py's."""
    code = (f"import fcntl, os, runpy, sys, termios\n{first}\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"runpy.run_path({PYTHON[1]!r}, run_name='__main__')")
    return [sys.executable, "-c", code, "--config", str(config_path)]


def on_terminal(config_path, hook=""):
    """(process, the other end of the terminal): a run that leads the session of a terminal of 24 lines."""
    master, terminal = os.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = forked.Popen(command_after(f"fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{hook}", config_path), start_new_session=True, **streams)
    os.close(terminal)
    return process, master


def test_a_terminal_that_dies_like_a_killed_tmux_session_loses_at_most_the_step_in_progress(corpus, tmp_path):
    loaded(corpus, tmp_path, training__epochs=500)
    process, master = on_terminal(tmp_path / "config.yaml")
    seen, end = b"", time.monotonic() + LIMIT
    while b"loss=" not in seen:                                             # the progress bar after a first step
        seen += os.read(master, 4096)
        assert time.monotonic() < end, seen[-2000:]
    os.close(master)                                                        # SIGHUP, and every write fails from here on
    assert process.wait() == 128 + signal.SIGHUP
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert state["global_step"] >= 1 and checkpoint.facts_of(state)["kind"] == "mid_epoch"
    # the bar shows the losses, the log has them
    losses = [line for line in log_lines(tmp_path) if re.search(r"epoch \d+/500 batch \d/", line)]
    assert b"/500 batch" not in seen and len(losses) == state["global_step"]


# ---- decoration: what a person sees, which nobody may be there to see ----

def test_a_terminal_that_nobody_reads_holds_up_neither_training_nor_saves_and_the_log_has_every_row(corpus, tmp_path):
    """Its output is stopped, as by Ctrl-S; the watchdog would end a training that stands still."""
    loaded(corpus, tmp_path, training__hang_minutes=0.2, training__epochs=1)
    process, master = on_terminal(tmp_path / "config.yaml", "termios.tcflow(1, termios.TCOOFF)")
    assert process.wait() == 0
    os.close(master)
    text = "\n".join(log_lines(tmp_path))
    assert len(re.findall(r" epoch 1/1 batch \d/6 step \d+ loss ", text)) == EPOCH_STEPS, text
    assert last(tmp_path)["epoch"] == 1


# a reader that is gone: also in test_console.py
CLOSED = "[os.close(number) for number in range(3)]; sys.stdin = sys.stdout = sys.stderr = None"     # as at a start without them


@pytest.mark.slow
@pytest.mark.parametrize("streams", [CLOSED, pytest.param("<&- >&- 2>&-", marks=pytest.mark.slow),
                                     pytest.param("| head -n 1", marks=pytest.mark.slow)], ids=["closed", "closed by bash", "head"])
def test_streams_that_are_closed_broken_or_full_change_nothing(corpus, tmp_path, streams):
    path = loaded_path(corpus, tmp_path, training__epochs=1)
    if streams == CLOSED:
        words, run = command_after(CLOSED, path), forked.run
    else:
        words, run = ["bash", "-c", f"set -o pipefail; {' '.join(PYTHON)} --config {path} {streams}"], subprocess.run
    done = run(words, capture_output=True, text=True, env={**os.environ, "BGB_MID_EPOCH_MINUTES": "0"})
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert [checkpoint.verify(p) for p in (tmp_path / "t/checkpoints").glob("*.pt")]
    assert log_lines(tmp_path)[-1] and last(tmp_path)["global_step"] == EPOCH_STEPS


@pytest.mark.slow
def test_neither_an_ascii_console_nor_the_backend_of_a_notebook_nor_a_broken_matplotlibrc_ends_a_run(corpus, tmp_path):
    results = tmp_path / "lauf für anna"
    path = loaded_path(corpus, results, training__epochs=1)
    (results / "matplotlibrc").write_text("\xff\xfe: \0\n", encoding="latin-1")            # a run's folder here
    process = spawn(path, start=subprocess.Popen, PYTHONIOENCODING="ascii", MPLBACKEND="module://matplotlib_inline.backend_inline")
    out = rest(process)
    assert process.returncode == 0 and last(results)["epoch"] == 1, out
    assert r"lauf f\xfcr anna" in out and "lauf für anna" in (results / "t/log.txt").read_text()     # escaped there alone
    assert (results / "t/curves.png").exists() or out.count("curves.png: ") == 1, out


@pytest.mark.slow
@pytest.mark.parametrize("harm, word", [
    ("pathlib.Path(pictures).write_text('def')", "curves.png: SyntaxError"),
    pytest.param("torch.utils.tensorboard.SummaryWriter.add_scalar = lambda *a, **k: 1 / 0", "tensorboard: ZeroDivisionError", marks=pytest.mark.slow),
    pytest.param("sys.modules['torch.utils.tensorboard'] = None", "tensorboard: ModuleNotFoundError", marks=pytest.mark.slow)])
def test_pictures_and_charts_that_fail_are_said_and_the_run_ends_as_ever(corpus, reference, tmp_path, harm, word):
    from conftest import copy_sources
    copy_sources(tmp_path / "checkout")
    hook = f"import pathlib, torch.utils.tensorboard\npictures = {str(tmp_path / 'checkout/scoring/pictures.py')!r}\n{harm}\n"
    code = f"import sys\nsys.path.insert(0, {str(tmp_path / 'checkout')!r})\nimport train\n{hook}sys.exit(train.main(sys.argv[1:]))"
    process = spawn(loaded_path(corpus, tmp_path), command=[sys.executable, "-c", code])
    out = rest(process)
    assert process.returncode == 0 and word in out and "Traceback" not in out, out
    assert same(last(tmp_path)["model"], last(reference)["model"]) and rows(tmp_path) == rows(reference)


@pytest.mark.slow
def test_a_resume_says_that_others_validate_though_the_names_are_the_same(small_corpus, tmp_path, capsys):
    shutil.copytree(small_corpus, tmp_path / "h5")
    assert train.run(loaded(tmp_path / "h5", tmp_path, training__epochs=1)) == 0
    assert train.run(loaded(tmp_path / "h5", tmp_path, training__epochs=2), "true") == 0
    assert "not those of the training" not in capsys.readouterr().out
    ends = [part[0] for part in data.split_patients(data.open_corpus(tmp_path / "h5"), (), 0.3, 1)]
    for r, other in zip(ends, ends[::-1]):      # as an import does that reads the patients' names otherwise
        with h5py.File(r.path, "r+") as file:
            file.attrs["patient"] = other.patient
    assert train.run(loaded(tmp_path / "h5", tmp_path, training__epochs=3), "true") == 0
    assert f"warning: resume: {splits.DIVIDED_ANEW}; restore them" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 24 MB: room for about ten checkpoints of the small model."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_whose_results_folder_is_lost_goes_on_from_the_mirror_and_ends_as_if_nothing_had_been(corpus, reference, tmp_path):
    mirrored = loaded(corpus, tmp_path / "results", training__mirror=str(tmp_path / "nas"))
    with cut_at(13):
        assert train.run(mirrored) == 128 + signal.SIGTERM
    shutil.rmtree(tmp_path / "results")
    with pytest.raises(train.Refused, match="holds another run of this name"):      # one that begins must not replace it
        train.run(mirrored)
    assert train.run(mirrored, "true") == 0
    assert_same_run(tmp_path / "results", reference)
    with cut_at(3):
        train.run(mirrored, fresh=True)
    assert (tmp_path / "nas/t.1/checkpoints/last.pt").exists() and (tmp_path / "nas/t/metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")      # of TensorBoard's
@pytest.mark.parametrize("moment, method", [pytest.param(None, "saved", marks=pytest.mark.slow), (13, "save_mid")])
def test_a_run_whose_results_disk_dies_trains_on_into_the_mirror_and_goes_on_from_there(corpus, reference, ext4_disk, tmp_path,
                                                                                       capsys, monkeypatch, moment, method):
    """It dies between the second save and its line in saves.jsonl, or after both."""
    original, calls = getattr(train.RunDirectory, method), []

    def dying(self, *arguments):
        calls.append(arguments)
        if method == "save_mid":
            original(self, *arguments)
            self.saver.wait()
        if len(calls) == 2:
            dies(ext4_disk)
        if method == "saved":
            original(self, *arguments)
    monkeypatch.setattr(train.RunDirectory, method, dying)
    config = loaded(corpus, ext4_disk, training__mirror=str(tmp_path / "nas"), training__mid_epoch_minutes=0.0,
                    training__save_patience_minutes=0.0)
    with cut_at(moment) if moment else contextlib.nullcontext():
        assert train.run(config) == (128 + signal.SIGTERM if moment else 0)
    out = capsys.readouterr().out
    assert "save failed: Input/output error; the second copy has the state" in out and "Traceback" not in out
    if not moment:                          # the home's own best.pt is of an earlier epoch, or absent
        assert f"\n{tmp_path}/nas/t/checkpoints\n" in out and "a fresh start" not in out
        assert f"{tmp_path}/nas/t/checkpoints alone" in out and f"--checkpoint {tmp_path}/nas/t/checkpoints/best.pt" in out
    assert train.run(loaded(corpus, tmp_path / "other", training__mirror=str(tmp_path / "nas")), "true") == 0
    assert_same_run(tmp_path / "other", reference)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["results", "mirror"])
def test_a_disk_may_die_at_any_system_call_of_a_run(corpus, reference, tmp_path, which):
    """Tried at every 97th call from the first step on; at a start it is one line, as above."""
    if not tracer.available():
        pytest.skip("system calls of a child cannot be traced here")
    crash.warm()

    def training(results, nas, *resume):
        def quietly():
            log = os.open(tmp_path / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            torch.set_num_threads(1)                        # OpenMP's threads do not live through a fork
            config = loaded(corpus, results, training__mirror=str(nas), training__mid_epoch_minutes=0.0,
                            training__save_patience_minutes=0.0)
            assert train.run(config, *resume) == 0
            sys.stdout.flush()
        return quietly
    struck = 0
    for at in range(120, 10_000, 97):
        places = {"results": tmp_path / f"results{at}", "mirror": tmp_path / f"mirror{at}"}
        with ext4_image(places[which]) as disk:
            trace = tracer.Trace(training(*places.values()), [disk], at, strike=lambda: dies(disk))
        said = (tmp_path / "log.txt").read_text()
        assert trace.outcome == "done" and "\nTraceback" not in said.replace("Thread-1:\nTraceback", ""), (at, said)
        if trace.points < at:                               # it ended before
            break
        struck += 1
        if which == "results":
            places["results"] = tmp_path / f"other{at}"
            assert crash.run_child(training(*places.values(), "true")) == "done", (at, (tmp_path / "log.txt").read_text())
        assert_same_run(places["results"], reference)
    assert struck > 10


def fill(place):
    with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def test_a_full_disk_costs_two_saves_and_nothing_else_when_room_is_made(corpus, reference, small_disk, capsys, monkeypatch):
    original, failed = checkpoint.Checkpointer.check, []

    def check(self):                        # the disk fills after the second step and is emptied after two failed saves
        before = self._failures
        original(self)
        failed.append(self._failures)
        if self.counter == 2 and not failed[-1]:
            fill(small_disk)
        if self._failures == 2 > before:
            (small_disk / "filler").unlink()
        if self._failures:
            self._due_at = 0
    monkeypatch.setattr(checkpoint.Checkpointer, "check", check)
    assert train.run(loaded(corpus, small_disk, training__mid_epoch_minutes=0.0, training__mid_epoch_keep=2)) == 0
    assert max(failed) == 2 and "save failed (2 in a row): No space left on device" in capsys.readouterr().out
    monkeypatch.undo()
    assert_same_run(small_disk, reference)


def test_a_disk_that_stays_full_stops_the_run_after_three_saves_with_every_earlier_file_good(corpus, small_disk, capsys, monkeypatch):
    original = checkpoint.Checkpointer.check

    def check(self):
        if self.counter == 2:
            fill(small_disk)
        original(self)
        if self._failures:
            self._due_at = 0
    monkeypatch.setattr(checkpoint.Checkpointer, "check", check)
    assert train.run(loaded(corpus, small_disk, training__mid_epoch_minutes=0.0, training__mid_epoch_keep=2,
                            training__save_patience_minutes=0.0)) == 1
    assert "then --resume" in capsys.readouterr().out
    for path in (small_disk / "t/checkpoints").glob("*.pt"):
        assert checkpoint.verify(path)
    assert not list((small_disk / "t/checkpoints").glob(".*.pt.*"))


@pytest.mark.parametrize("ending", ["a signal", pytest.param("the last epoch", marks=pytest.mark.slow)])
def test_a_run_whose_last_save_found_a_full_disk_never_says_saved_or_finished(corpus, small_disk, capsys, monkeypatch, ending):
    original = checkpoint.Checkpointer._save

    def save(self, state, kind, *others):
        if state["epoch"] == 2 and (ending == "a signal" or kind == "epoch"):
            self.wait()
            fill(small_disk)
        original(self, state, kind, *others)
    monkeypatch.setattr(checkpoint.Checkpointer, "_save", save)
    with cut_at(12) if ending == "a signal" else contextlib.nullcontext():
        assert train.run(loaded(corpus, small_disk, training__save_patience_minutes=0.0)) == 1
    out = capsys.readouterr().out
    assert "save failed (3 in a row)" in out and "free the disk or mend it, then --resume" in out
    assert "stopped by" not in out and "names," not in out
    assert last(small_disk)["epoch"] == 1


@pytest.mark.slow
def test_a_stop_in_a_validation_before_which_the_snapshot_was_turned_away_keeps_that_epoch(corpus, reference, small_disk, monkeypatch):
    """The disk is full from the end of the first epoch until the signal, in the next validation's first recording."""
    ended, polled = train.Trainer.end_epoch, train.Trainer.poll

    def end_epoch(self, summary):
        self.home.saver.wait()
        fill(small_disk)
        ended(self, summary)

    def poll(self, busy=True):
        if (small_disk / "filler").exists():
            (small_disk / "filler").unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        return polled(self, busy)
    monkeypatch.setattr(train.Trainer, "end_epoch", end_epoch)
    monkeypatch.setattr(train.Trainer, "poll", poll)
    assert train.run(loaded(corpus, small_disk, training__mid_epoch_keep=1)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    newest = checkpoint.peek(checkpoint.find_resume(small_disk / "t/checkpoints"))
    assert (newest["epoch"], newest["batch"]) == (2, EPOCH_STEPS)
    assert train.run(loaded(corpus, small_disk, training__mid_epoch_keep=1), "true") == 0
    assert_same_run(small_disk, reference)


@pytest.mark.parametrize("diverged", [False, True])
def test_a_disk_that_fails_once_the_last_state_is_durable_costs_a_run_lines_and_not_its_exit_code(corpus, ext4_disk, capsys, monkeypatch,
                                                                                                  diverged):
    def fails(*arguments):                  # a dead ext4 still gives what the kernel has in memory
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fit(self):
        self.save_mid()
        self.home.saver.wait()
        dies(ext4_disk)
        monkeypatch.setattr("run.listing.in_use_text", fails)
        if diverged:
            raise train.Diverged
        return False
    monkeypatch.setattr(train.Trainer, "fit", fit)
    assert train.run(loaded(corpus, ext4_disk)) == diverged
    out = capsys.readouterr().out
    assert f"{ext4_disk}/t/checkpoints: Input/output error" in out
    assert ("50 losses in a row were not finite" in out) == diverged


@pytest.mark.parametrize("name", ["t", "unseen"])
def test_a_start_on_a_dead_disk_is_one_line_and_may_be_tried_again(corpus, ext4_disk, name):
    with cut_at(3):
        train.run(loaded(corpus, ext4_disk))
    config = loaded(corpus, ext4_disk, experiment__name=name)
    (ext4_disk / "config.yaml").write_text("training: {epochs: 2}\n")
    dies(ext4_disk)
    message = "Input/output error; nothing was touched: try again"
    with pytest.raises(train.TemporaryFault, match=message):
        train.run(config, "true")
    with pytest.raises(train.TemporaryFault, match=f"config .*config.yaml: {message}"):
        train.load_config(ext4_disk / "config.yaml")


@pytest.mark.slow
def test_a_start_on_a_full_disk_is_refused_in_one_line_and_the_run_is_as_it_was(corpus, reference, small_disk, capsys):
    config = loaded(corpus, small_disk)
    with cut_at(3):
        train.run(config)
    files = [p for p in (small_disk / "t").rglob("*") if p.is_file() and p.name != ".lock"]
    before = {p: p.read_bytes() for p in files}
    fill(small_disk)
    with pytest.raises(train.TemporaryFault, match="t: No space left on device"):
        train.run(config, "true")
    assert {p: p.read_bytes() for p in files} == before
    with pytest.raises(train.TemporaryFault, match="No space left on device; the old run was moved aside, whole"):
        train.run(config, fresh=True)
    shutil.rmtree(small_disk / "t")
    (small_disk / "t.1").rename(small_disk / "t")
    assert {p: p.read_bytes() for p in files} == before
    (small_disk / "filler").unlink()
    assert train.run(config, "true") == 0
    assert_same_run(small_disk, reference)


def test_every_fsync_of_the_training_loop_is_done_by_the_writer_thread(corpus, tmp_path, monkeypatch):
    callers, fsync, fit = [], os.fsync, train.Trainer.fit

    def watched(trainer):
        monkeypatch.setattr(os, "fsync", lambda fd: (callers.append(threading.current_thread()), fsync(fd))[1])
        return fit(trainer)
    monkeypatch.setattr(train.Trainer, "fit", watched)
    assert train.run(loaded(corpus, tmp_path, training__epochs=1)) == 0
    assert len(callers) > 3 and threading.main_thread() not in callers


def touched(folder, monkeypatch):
    for path in folder.rglob("*.h5"):
        os.utime(path, (1, 1))


def truncated(folder, monkeypatch):
    for path in folder.rglob("*.h5"):
        os.truncate(path, 20_000)


def vanished(folder, monkeypatch):
    for path in folder.rglob("*.h5"):
        path.unlink()


def failing(folder, monkeypatch):
    def preadv(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "preadv", preadv)


IN_EPOCH, IN_VALIDATION = 2, 5                          # step after which a recording fails
CHANGED = "was changed since the corpus was opened"


@pytest.mark.slow
@pytest.mark.parametrize("moment, harm, reason", [
    (IN_EPOCH, failing, "Input/output error"), (IN_VALIDATION, truncated, CHANGED),
    pytest.param(IN_EPOCH, touched, CHANGED, marks=pytest.mark.slow),
    pytest.param(IN_VALIDATION, vanished, "No such file or directory", marks=pytest.mark.slow),
    pytest.param(IN_EPOCH, truncated, CHANGED, marks=pytest.mark.slow),
    pytest.param(IN_EPOCH, vanished, "No such file or directory", marks=pytest.mark.slow),
    pytest.param(IN_VALIDATION, touched, CHANGED, marks=pytest.mark.slow),
    pytest.param(IN_VALIDATION, failing, "Input/output error", marks=pytest.mark.slow)])
def test_a_recording_that_fails_under_the_run_stops_it_saved_in_one_line_and_put_back_it_goes_on(
        corpus, reference, tmp_path, capsys, monkeypatch, harm, reason, moment):
    shutil.copytree(corpus, tmp_path / "h5")
    original = train.Trainer.boundary

    def boundary(self):
        original(self)
        if self.step == moment:
            harm(tmp_path / "h5", monkeypatch)
    monkeypatch.setattr(train.Trainer, "boundary", boundary)
    config = loaded(tmp_path / "h5", tmp_path)
    assert train.run(config) == 1
    out = capsys.readouterr().out
    assert len(re.findall(f"^stopped: {tmp_path}/.* ?{reason}; mend it, then --resume$", out, re.M)) == 1
    assert "Traceback" not in out
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
    monkeypatch.undo()
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert state["global_step"] >= moment               # what was read ahead is trained and saved too
    shutil.rmtree(tmp_path / "h5")
    shutil.copytree(corpus, tmp_path / "h5")
    assert train.run(config, "true") == 0
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
def test_a_run_on_a_copy_of_the_corpus_is_the_same_run(corpus, reference, tmp_path):
    config = loaded(corpus, tmp_path, data__copy_to=str(tmp_path / "disk"), data__readers=3)
    assert train.run(config) == 0
    assert len(list((tmp_path / "disk").rglob("*.h5"))) == len(list(corpus.rglob("*.h5")))
    assert_same_run(tmp_path, reference)


def test_files_that_the_import_refused_are_said_at_the_start_of_a_training(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "h5")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.edf").write_bytes(b"no EDF")
    corpora.import_corpus(tmp_path / "src", tmp_path / "h5")
    capsys.readouterr()
    assert train.run(loaded(tmp_path / "h5", tmp_path, training__epochs=1)) == 0
    assert f"h5: the import refused 1 file: python data.py info {tmp_path}/h5 lists them" in capsys.readouterr().out


def test_waiting_for_data_is_said_once_with_what_to_do(corpus, tmp_path, capsys, monkeypatch):
    shares = [0.9, 0.0] + [0.4] * EPOCH_STEPS           # the first row waits for the first windows of a start
    monkeypatch.setattr(train.data.Loader, "share", lambda self: shares.pop(0))
    assert train.run(loaded(corpus, tmp_path, training__epochs=1)) == 0
    out = capsys.readouterr().out
    assert out.count("waited 40 % for data") == EPOCH_STEPS - 2
    assert out.count("training waited for data 40 % of the time") == 1 and "raise data.readers" in out


@pytest.mark.slow
def test_rows_that_a_power_cut_tore_are_named_and_the_rest_is_kept(corpus, reference, tmp_path, capsys):
    with cut_at(3):
        train.run(loaded(corpus, tmp_path))
    whole = (tmp_path / "t/metrics.jsonl").read_bytes()
    torn = b'{"kind": "tr\n17\n["step"]\n\xff\x00\x00\n{"kind": "train"}\n{"kind": "train", "step": null}\n{"step": 1e999}\n'
    (tmp_path / "t/metrics.jsonl").write_bytes(torn + whole + b'{"kind": "train", "epo')
    with open(tmp_path / "t/saves.jsonl", "a") as file:
        file.write('{"kind": "sa')
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert capsys.readouterr().out.count("metrics.jsonl: dropped a row that cannot be read") == 8
    assert_same_run(tmp_path, reference)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")      # of TensorBoard's
def test_a_results_disk_that_dies_in_mid_run_leaves_the_rows_in_memory_and_ends_nothing(ext4_disk):
    said = []
    record = MetricsFile(ext4_disk, 0, True, lambda: True, said.append)
    record.write(kind="train", epoch=1, step=1, loss=0.5)
    dies(ext4_disk)
    for step in (2, 3):
        record.write(kind="train", epoch=1, step=step, loss=0.5)
    assert len(record.pending) == 2 and "metrics.jsonl: Input/output error: 2 rows kept in memory" in said
    record.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")      # of TensorBoard's
def test_rows_that_found_no_room_are_written_whole_once_there_is_some(small_disk):
    record = MetricsFile(small_disk, 0, True, lambda: True, lambda line: None)
    record.write(kind="train", epoch=1, step=1, loss=0.5)
    with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 64)
    for step in range(2, 200):
        record.write(kind="train", epoch=1, step=step, loss=0.5)
    assert record.pending
    (small_disk / "filler").unlink()
    record.close()
    found = read_json_lines(small_disk / "metrics.jsonl", say=pytest.fail)
    assert [row["step"] for row in found] == list(range(1, 200))


# ---- starting ----

@pytest.mark.slow
def test_a_kill_while_the_synthetic_recordings_are_made_or_imported_costs_only_those_half_made(tmp_path):
    loaded(tmp_path / "made/h5", tmp_path, data__synth_hours=0.35, data__synth_patients=4, training__epochs=1)
    for half_made in ("h5_edf.part", "h5.part"):
        process = spawn(tmp_path / "config.yaml", "--resume")
        while process.poll() is None and not list((tmp_path / "made").glob(f"{half_made}/*/*")):
            time.sleep(0.01)
        process.kill()
        process.communicate()
    process = spawn(tmp_path / "config.yaml", "--resume")
    out = rest(process)
    assert process.returncode == 0 and "names," in out, out
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [".lock", "h5", "h5_edf"]


def test_of_two_first_runs_one_makes_the_synthetic_recordings_and_the_other_is_refused(tmp_path):
    (tmp_path / "made").mkdir()
    held = checkpoint.lock(tmp_path / "made")
    with pytest.raises(train.TemporaryFault, match="in use by process"):
        train.run(loaded(tmp_path / "made/h5", tmp_path, data__synth_hours=0.35, data__synth_patients=4))
    held.close()


def test_without_resume_a_directory_with_checkpoints_is_refused_and_fresh_moves_it_aside(corpus, tmp_path, capsys):
    config = loaded(corpus, tmp_path, training__epochs=1)
    assert train.run(config) == 0
    before = (tmp_path / "t/checkpoints/last.pt").read_bytes()
    with pytest.raises(train.Refused, match="--resume continues that run, --fresh moves it aside"):
        train.run(config)
    assert train.run(config, fresh=True) == 0
    assert (tmp_path / "t.1/checkpoints/last.pt").read_bytes() == before and (tmp_path / "t/checkpoints/last.pt").exists()


def test_a_bad_environment_is_refused_before_fresh_moves_anything(corpus, tmp_path, capsys, monkeypatch):
    config = loaded(corpus, tmp_path, training__epochs=1)
    assert train.run(config) == 0
    monkeypatch.setenv("BGB_MID_EPOCH_KEEP", "some")
    with pytest.raises(train.Refused, match="BGB_MID_EPOCH_KEEP='some' must be a whole number"):
        train.run(config, fresh=True)
    assert (tmp_path / "t/checkpoints/last.pt").exists() and not (tmp_path / "t.1").exists()


@pytest.mark.parametrize("resume, message", [("false", "already holds checkpoints"), ("TYPO.pt", "TYPO.pt: No such file")])
def test_what_was_refused_is_refused_again_when_torchrun_restarts_it(corpus, tmp_path, monkeypatch, resume, message):
    config = loaded(corpus, tmp_path, training__epochs=1)
    assert train.run(config) == 0
    (tmp_path / "t/started.json").write_text('"another launch"')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    before = (tmp_path / "t/metrics.jsonl").read_bytes()
    with pytest.raises(train.Refused, match=message):
        train.run(config, resume)
    assert (tmp_path / "t/metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_started_from_weights_alone_has_a_new_optimizer_and_names_their_hash(corpus, tmp_path, capsys):
    assert train.run(loaded(corpus, tmp_path / "first", training__epochs=1)) == 0
    source = tmp_path / "first/t/checkpoints/best.pt"
    tuned = loaded(corpus, tmp_path / "tuned", training__epochs=1, training__init=str(source), training__learning_rate=0.0)
    assert train.run(tuned) == 0
    state = last(tmp_path / "tuned")
    assert same(state["model"], checkpoint.load(source)["model"]) and state["global_step"] == EPOCH_STEPS
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert state["config"]["training"]["init_sha256"] == digest
    assert yaml.safe_load((tmp_path / "tuned/t/config.yaml").read_text())["training"]["init_sha256"] == digest
    source.unlink()                         # a resume needs it no more
    more = loaded(corpus, tmp_path / "tuned", training__epochs=2, training__init=str(source), training__learning_rate=0.0)
    assert train.run(more, "true") == 0
    assert last(tmp_path / "tuned")["config"]["training"]["init_sha256"] == digest
    capsys.readouterr()


@pytest.mark.parametrize("change, message", [
    ({"node_width": 16, "node_headdim": 16}, "is (.*) in it and (.*) in the model of this configuration"), (None, "holds no weights")])
def test_weights_that_do_not_fit_are_refused_in_one_line_and_nothing_is_begun(corpus, tmp_path, change, message):
    path = tmp_path / "weights.pt"
    net = model.build(19, SMALL | (change or {}))
    checkpoint.atomic_save({"model": net.state_dict()} if change else {"x": 1}, path)
    with pytest.raises(train.Refused, match=message):
        train.run(loaded(corpus, tmp_path, training__init=str(path)))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("spoil, message", [
    (lambda value: value * math.nan, "its weights are not finite"),
    (lambda value: value.to(torch.int64), "holds no weights"),
    (lambda value: value.to(torch.complex64), "holds no weights"),
    (lambda value: value.to_sparse(), "holds no weights"),
    (lambda value: value.to("meta"), "holds no weights"),
    (lambda value: 1.0, "holds no weights")])
def test_weights_that_are_no_plain_finite_numbers_are_refused_in_one_line(corpus, tmp_path, reference, spoil, message):
    weights = last(reference, "best.pt")["model"]
    torch.save({"model": {name: spoil(value) for name, value in weights.items()}}, tmp_path / "init.pt")
    with pytest.raises(train.Refused, match=message):
        train.run(loaded(corpus, tmp_path, training__init=str(tmp_path / "init.pt")))
    assert not (tmp_path / "t").exists()


def test_weights_of_another_size_are_refused_with_its_name(corpus, tmp_path):
    path = tmp_path / "weights.pt"
    checkpoint.atomic_save({"model": model.build(19, model.settings({"size": "small"})).state_dict()}, path)
    with pytest.raises(train.Refused, match="the weights are of model.size small"):
        train.run(loaded(corpus, tmp_path, training__init=str(path)) | {"model": model.settings(SMALL | {"node_state": 4})})


def test_weights_of_other_channels_are_refused_with_both(corpus, tmp_path):
    path = tmp_path / "weights.pt"
    checkpoint.atomic_save({"model": model.build(18, SMALL).state_dict(), "channels": ["F7-T3"] * 18}, path)
    with pytest.raises(train.Refused, match=r"its 18 channels \(F7-T3 ...\) are not the 19 of"):
        train.run(loaded(corpus, tmp_path, training__init=str(path)))


@contextlib.contextmanager
def validations(monkeypatch, **series):
    """Real validations whose named metrics are replaced, epoch by epoch."""
    original, left = train.evaluate.summarise, {name: list(values) for name, values in series.items()}

    def summarise(*arguments):
        return original(*arguments) | {name: values.pop(0) for name, values in left.items()}
    monkeypatch.setattr(train.evaluate, "summarise", summarise)
    yield
    monkeypatch.undo()


def best(results):
    return checkpoint.peek(results / "t/checkpoints/best.pt")


@pytest.mark.slow
def test_a_rate_that_validation_is_too_short_for_leaves_best_pt_to_average_precision_said_kept_and_resumed(
        corpus, tmp_path, capsys):
    config = loaded(corpus, tmp_path, training__epochs=1, training__best_metric="sensitivity_at_1fa")
    assert train.run(config) == 0
    out = capsys.readouterr().out
    assert re.search(r"warning: sensitivity_at_1fa cannot be computed on validation \(dev\): [\d.]+ [hs] of background", out), out
    home = tmp_path / "t"
    assert yaml.safe_load((home / "config.yaml").read_text())["training"]["best_metric"] == "average_precision"
    first = checkpoint.peek(home / "checkpoints/best.pt")["metric"]
    assert first["name"] == "average_precision"
    config = loaded(corpus, tmp_path, training__epochs=2, training__best_metric="sensitivity_at_1fa")
    assert train.run(config, resume="true") == 0
    assert checkpoint.peek(home / "checkpoints/best.pt")["metric"]["value"] >= first["value"]
    assert "other rules" not in capsys.readouterr().out


@pytest.mark.slow
def test_of_epochs_with_the_same_metric_the_one_of_better_average_precision_is_the_best_and_that_is_said(
        corpus, tmp_path, capsys, monkeypatch):
    config = loaded(corpus, tmp_path, training__epochs=4, training__best_metric="event_f1")
    with validations(monkeypatch, event_f1=[1.0, 1.0, 1.0, 0.5], average_precision=[0.74, 0.85, 0.8, 0.9]):
        assert train.run(config) == 0
    assert best(tmp_path)["epoch"] == 2 and last(tmp_path)["stopping"]["epoch"] == 2
    out = capsys.readouterr().out
    assert "epoch 2/4: event_f1 1.0000, the best so far: as good as before, with a better average_precision" in out
    assert "epoch 3/4: event_f1 1.0000, the best is that of epoch 2" in out


@pytest.mark.slow
def test_after_a_resume_from_a_file_the_log_and_best_pt_agree_on_what_is_best(corpus, tmp_path, capsys, monkeypatch):
    config = loaded(corpus, tmp_path, training__epochs=2)
    with validations(monkeypatch, auroc=[0.5, 0.9]):
        assert train.run(config) == 0
    with validations(monkeypatch, auroc=[0.7]):
        assert train.run(config, str(tmp_path / "t/checkpoints/checkpoint_epoch_001.pt")) == 0
    assert "epoch 2/2: auroc 0.7000, the best so far" in capsys.readouterr().out
    assert best(tmp_path)["metric"]["value"] == 0.7
    aside = list((tmp_path / "t/checkpoints").glob("abandoned_best_*.pt"))
    assert [checkpoint.peek(path)["metric"]["value"] for path in aside] == [0.9]


@pytest.mark.slow
def test_a_resume_by_a_metric_that_is_better_the_other_way_round_keeps_the_best_until_an_epoch_is_measured_by_it(
        corpus, tmp_path, capsys, monkeypatch):
    config = loaded(corpus, tmp_path, training__epochs=3)
    with validations(monkeypatch, auroc=[0.9, 0.7, 0.5]):
        assert train.run(config) == 0
    config = loaded(corpus, tmp_path, training__epochs=3, training__best_metric="loss")
    assert train.run(config, resume="true") == 0
    assert best(tmp_path)["metric"]["value"] == 0.9         # the smallest AUROC was taken for the best
    assert "best.pt is" not in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"config": 5}, {"config": {"lr": 1}}, {"optimizer": [1]}, {"model": None}])
def test_a_checkpoint_of_another_form_is_refused_in_one_line_and_nothing_is_begun(corpus, tmp_path, capsys, other):
    state = {"epoch": 1, "batch": 2, "model": {}, "optimizer": {}, "sampler": {}, "rng": [], "data": "", "config": {"training": {}}}
    checkpoint.atomic_save(state | other, tmp_path / "theirs.pt")
    assert train.main(["--config", str(loaded_path(corpus, tmp_path)), "--resume", str(tmp_path / "theirs.pt")]) == 2
    error = capsys.readouterr().err
    assert "theirs.pt is no training checkpoint of this program" in error and error.count("\n") == 1
    assert not (tmp_path / "t").exists()


def log_lines(results):
    return (results / "t/log.txt").read_text().splitlines()


def test_the_log_file_holds_every_printed_line_over_resumes_with_date_and_time(corpus, tmp_path, capsys):
    with cut_at(3):
        train.run(loaded(corpus, tmp_path))
    train.run(loaded(corpus, tmp_path), "true")
    out = capsys.readouterr().out
    lines = [re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)", line).groups() for line in log_lines(tmp_path)]
    assert [line for _, line in lines] == out.splitlines()
    assert [stamp for stamp, _ in lines] == sorted(stamp for stamp, _ in lines)
    assert re.search(r"^validation of epoch 1: loss [\d.]+, auroc [\d.]+, [\d.]+ false alarms in 24 h; on "
                     r"[\d.]+ h \([\d.]+ [hs] of background\), \d+ seizures, mean over \d patients?$", out, re.M)
    assert re.search(r"^epoch 1: \d+ windows \(\d+ with a seizure's start or end, \d+ inside a seizure, \d+ without\), 6 batches, \d+ steps in \d+ epochs?$", out, re.M)
    assert "of the epoch, " in out and "of the run" in out and "steps skipped" not in out and "waited 0 %" not in out
    assert re.search("^picture: .*t/curves.png\nnext: python evaluate.py --checkpoint .*t/checkpoints/best.pt --data .* --split dev --plot$",
                     out, re.M)


@pytest.mark.slow
def test_curves_are_drawn_after_each_validation(corpus, curves, tmp_path, capsys):
    with cut_at(9):                         # in the second epoch
        train.run(loaded(corpus, tmp_path))
    assert last(tmp_path)["epoch"] == 1 and (tmp_path / "t/curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_raised_epochs_say_to_which_learning_rate_a_finished_run_jumps(corpus, tmp_path, capsys):
    assert train.run(loaded(corpus, tmp_path, training__epochs=1)) == 0
    assert train.run(loaded(corpus, tmp_path, training__epochs=2), "true") == 0
    assert re.search("the learning rate jumps from 0.00e[+]00 to 5.*e-04", capsys.readouterr().out)


def test_resume_from_a_file_becomes_the_line_that_later_resumes_follow(corpus, tmp_path, capsys):
    config = loaded(corpus, tmp_path, training__epochs=3)
    assert train.run(config) == 0
    with cut_at(2):
        train.run(config, str(tmp_path / "t/checkpoints/checkpoint_epoch_001.pt"))
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert (state["epoch"], state["batch"]) == (2, 2)
    assert max(r["step"] for r in rows(tmp_path)) == state["global_step"]


@pytest.mark.slow
def test_a_line_chosen_by_file_holds_before_its_first_step_and_torchrun_goes_on_with_it(corpus, tmp_path, capsys, monkeypatch):
    config, chosen = loaded(corpus, tmp_path, training__epochs=3), str(tmp_path / "t/checkpoints/checkpoint_epoch_001.pt")
    assert train.run(config) == 0
    monkeypatch.setattr(train.Trainer, "train_epoch", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    if not (child := os.fork()):
        torch.set_num_threads(1)            # the threads of the parent's pool are not here
        train.run(config, chosen)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.undo()
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert (state["epoch"], state["batch"]) == (2, 0)
    with cut_at(2):
        train.run(config, "true")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert train.run(config, chosen) == 0
    assert "resumed: epoch 2 batch 2 step " in capsys.readouterr().out


@pytest.mark.slow
def test_a_line_chosen_by_file_that_the_second_copy_alone_has_is_followed_with_each_step_once_in_the_rows(
        corpus, reference, small_disk, tmp_path):
    """The disk of home has room for records, not for a checkpoint, and some again at the next start."""
    config = loaded(corpus, small_disk, training__mirror=str(tmp_path / "nas"), training__mid_epoch_minutes=0.0)
    with cut_at(EPOCH_STEPS + 6):
        train.run(config)
    (small_disk / "gap").write_bytes(bytes(1 << 20))
    fill(small_disk)
    (small_disk / "gap").unlink()
    with cut_at(2):
        train.run(config, str(small_disk / "t/checkpoints/checkpoint_epoch_001.pt"))
    (small_disk / "filler").unlink()
    with cut_at(1):
        train.run(config, "true")
    newest = checkpoint.peek(checkpoint.find_resume(small_disk / "t/checkpoints"))
    assert (newest["epoch"], newest["batch"]) == (2, 3)
    assert train.run(config, "true") == 0
    assert rows(small_disk) == rows(reference) and same(last(small_disk)["model"], last(reference)["model"])


@pytest.mark.slow
def test_a_file_chosen_where_nothing_is_left_to_train_still_is_the_line_that_resumes_follow(corpus, reference, tmp_path, capsys):
    assert train.run(loaded(corpus, tmp_path)) == 0
    first = str(tmp_path / "t/checkpoints/checkpoint_epoch_001.pt")
    assert train.run(loaded(corpus, tmp_path, training__epochs=1), first) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert "resumed: epoch 2 batch 0 step " in capsys.readouterr().out
    assert rows(tmp_path) == rows(reference) and same(last(tmp_path)["model"], last(reference)["model"])


def test_a_finished_run_says_so_and_trains_nothing(corpus, reference, capsys):
    before = rows(reference)
    assert train.run(loaded(corpus, reference), "true") == 0
    assert "this run is finished" in capsys.readouterr().out and rows(reference) == before


@pytest.mark.slow
def test_patience_is_counted_across_a_cut_and_raised_patience_goes_on(corpus, tmp_path, capsys):
    still = {"training__epochs": 6, "training__learning_rate": 0.0}         # never better than epoch 1
    with cut_at(18):
        assert train.run(loaded(corpus, tmp_path, training__patience=2, **still)) == 143
    assert last(tmp_path)["stopping"]["waited"] == 1
    assert train.run(loaded(corpus, tmp_path, training__patience=2, **still), "true") == 0
    assert "early stop: 2 epochs without improvement (training.patience 2)" in capsys.readouterr().out
    assert (last(tmp_path)["epoch"], last(tmp_path, "best.pt")["epoch"]) == (3, 1)
    assert train.run(loaded(corpus, tmp_path, training__patience=2, **still), "true") == 0
    assert "this run is finished" in capsys.readouterr().out
    assert train.run(loaded(corpus, tmp_path, training__patience=3, **still), "true") == 0
    assert last(tmp_path)["epoch"] == 4


@pytest.mark.slow
def test_what_makes_another_run_is_refused_and_what_may_change_is_said(corpus, tmp_path, capsys):
    assert train.run(loaded(corpus, tmp_path, training__epochs=1)) == 0
    with pytest.raises(train.Refused, match="experiment.seed is 2 and was 1"):
        train.run(loaded(corpus, tmp_path, experiment__seed=2), "true")
    assert train.run(loaded(corpus, tmp_path, training__epochs=2, training__learning_rate=5e-4), "true") == 0
    out = capsys.readouterr().out
    assert "training.learning_rate 0.001 -> 0.0005" in out and "training.epochs 1 -> 2" in out


def test_two_processes_cannot_hold_one_run_directory(corpus, tmp_path):
    config = loaded(corpus, tmp_path)
    (tmp_path / "t/checkpoints").mkdir(parents=True)
    held = checkpoint.lock(tmp_path / "t/checkpoints")
    with pytest.raises(train.Refused, match="in use by this process"):
        train.run(config)
    held.close()


@pytest.mark.parametrize("change, message", [
    ("training.epoch=3", "unknown key training.epoch; the nearest is training.epochs"),
    ("training.epochs=many", "must be int"),
    ("training.best_metric=sensitivity_at_10.0fa", "sensitivity_at_10fa"),
    ("training.best_metric=AUROC", "the nearest is auroc"),
    ("Training.Epochs=3", "unknown key Training; the nearest is training"),
    ("training.BATCH=3", "unknown key training.BATCH; the nearest is training.batch_size"),
    ("training.precision=fp8", "must be one of fp32, bf16, fp16"),
    ("training.mid_epoch_minutes=-1", "between 0 and 1000000"),
    ("data.path=/nowhere/at/all", "does not exist: python data.py import"),
    ("data.path=/etc/passwd", "is no folder: python data.py import"),
    ("data.path=/" + 300 * "a", "File name too long"),
    ("data.path=[/nowhere/a, /nowhere/b]", "import CORPUS_FOLDER /nowhere/a, each with the same --montage"),
    ("training.init=/nowhere.pt", "training.init /nowhere.pt: No such file"),
    ("training.init_sha256=ab", "training.init is not"),
    ("experiment.name=a/b", "plain folder name"),
    ("data.dev_patients=[nobody]", "nobody"),
    ("training.device=cuda", "sees no GPU"),
    ("model.hop=63", "multiple of 16"),
    ("model.tcn_blocks=0", "tcn_blocks must be at least 1"),
    ("model.node_headdim=7", "headdim 7 must divide"),
    ("model.dropout=1.5", "between 0 and 1"),
    ("evaluation.window_seconds=.inf", "between 0.00390625 and 3600"),
])
def test_bad_configuration_gets_one_line_and_exit_2(corpus, tmp_path, change, message, capsys):
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    loaded(corpus, tmp_path)
    assert train.main(["--config", str(tmp_path / "config.yaml"), "--set", change]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("change, what", [
    ("data.split=patient", "name other patients with data.dev_patients, raise data.dev_fraction"),
    ("data.split=time", "raise data.dev_fraction"), ("data.split=recording", "raise data.dev_fraction"),
    ("data.folds=2", "set another data.fold or fewer data.folds")])
def test_a_validation_without_a_seizure_is_refused_with_what_its_split_obeys(tmp_path, capsys, change, what):
    for name in "abcd":
        write_edf(tmp_path / "edf" / f"{name}_1.edf", seconds=40)
        (tmp_path / "edf" / f"{name}_1_events.tsv").write_text("onset\tduration\teventType\n0\t40\tbckg\n")
    imported(tmp_path / "edf", tmp_path / "h5")
    loaded(tmp_path / "h5", tmp_path, data__balanced=False)
    assert train.main(["--config", str(tmp_path / "config.yaml"), "--set", change]) == 2
    line = capsys.readouterr().err
    assert f"there is no seizure in it; {what}, or set training.best_metric: loss" in line, line


def test_a_run_named_like_the_folder_of_its_data_is_refused_before_fresh_moves_it_aside(corpus, tmp_path, capsys):
    loaded(corpus, tmp_path)
    own = [f"experiment.results={Path(corpus).parent}", f"experiment.name={Path(corpus).name}"]
    code = train.main(["--config", str(tmp_path / "config.yaml"), "--fresh", "--set", own[0], "--set", own[1]])
    assert code == 2 and "lies in the run directory" in capsys.readouterr().err and Path(corpus, "index.json").exists()


def test_a_refusal_of_the_real_command_is_one_line_without_a_traceback(tmp_path):
    done = subprocess.run([*PYTHON, "--config", str(tmp_path / "no.yaml"), "--resume"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == f"train.py: config {tmp_path / 'no.yaml'}: No such file or directory"


@pytest.mark.parametrize("typed, meant", [
    ("configs/local/own.yaml", "it lies at {root}/configs/local/own.yaml"),     # as the pages print it, elsewhere
    ("own", "the nearest is {root}/configs/local/own.yaml"), ("onw.yaml", "the nearest is {root}/configs/local/own.yaml"),
    ("mine/run_2.yml", "the nearest is {here}/mine/run2.yaml")])
def test_a_configuration_that_is_not_there_is_refused_with_the_file_that_was_meant(tmp_path, monkeypatch, capsys, typed, meant):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run2.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", typed, "--resume"]) == 2
    meant = meant.format(root=ROOT, here=tmp_path).replace(f"{tmp_path}/", "")
    assert capsys.readouterr().err == f"train.py: config {typed}: No such file or directory; {meant}\n"


def test_recordings_in_the_current_folder_are_told_from_those_beside_the_script(corpus, tmp_path, monkeypatch, capsys):
    loaded(corpus, tmp_path)
    (tmp_path / "my data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", "config.yaml", "--set", "data.path=my data"]) == 2
    error = capsys.readouterr().err
    assert f"begins at {ROOT}; for the one here write {tmp_path / 'my data'})" in error and error.count("\n") == 1, error


def test_a_refused_corpus_is_named_once_and_a_list_of_them_as_paths(corpus, tmp_path, capsys):
    loaded(corpus, tmp_path)
    raw, other = tmp_path / "raw", tmp_path / "other"
    raw.mkdir()
    (raw / "a.edf").touch()
    shutil.copytree(corpus, other)
    for file in other.rglob("*.h5"):
        with h5py.File(file, "a") as h5:
            h5.attrs["prepared"] = "0" * 16
    (other / "index.json").unlink()
    for path, text in ((raw, f"train.py: {raw} holds EDF files"),
                       (f"[{corpus}, {other}]", "train.py: data.path: prepared differs between")):
        assert train.main(["--config", str(tmp_path / "config.yaml"), "--set", f"data.path={path}"]) == 2
        last_line = capsys.readouterr().err.splitlines()[-1]
        assert last_line.startswith(text) and "delete" not in last_line, last_line


def test_the_real_configuration_without_its_data_says_how_to_import_it(tmp_path):
    done = forked.run([*PYTHON, "--config", str(ROOT / "configs/local/train.yaml"), "--resume"], cwd=tmp_path, text=True,
                      capture_output=True)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert "data.py import CORPUS_FOLDER" in done.stderr and not list(tmp_path.iterdir())


def test_environment_sets_the_timer_on_a_fresh_run_and_the_log_says_so(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BGB_MID_EPOCH_MINUTES", "0")
    monkeypatch.setenv("BGB_MID_EPOCH_KEEP", "2")
    assert train.run(loaded(corpus, tmp_path, training__epochs=1)) == 0
    assert "BGB_MID_EPOCH_MINUTES=0 overrides 30.0" in capsys.readouterr().out
    assert len(list((tmp_path / "t/checkpoints").glob("mid_epoch_*.pt"))) == 2


# ---- the loop itself ----

@pytest.mark.slow
def test_pieces_of_an_accumulated_batch_give_the_same_weights_to_rounding(corpus, tmp_path):
    still = {**TINY, "dropout": 0.0}
    for name, pieces in (("one", 1), ("three", 3)):
        train.run(loaded(corpus, tmp_path / name, training__epochs=1, training__accumulate=pieces, experiment__seed=1) |
                  {"model": config.DEFAULTS["model"] | still})
    one, three = last(tmp_path / "one")["model"], last(tmp_path / "three")["model"]
    assert all(torch.allclose(one[k], three[k], atol=2e-4) for k in one)


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = train.make_optimizer(model, {"weight_decay": 0.1, "learning_rate": 1.0}, False)
    assert [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, 1), (0.0, 3)]


def test_focal_loss_without_focus_is_half_the_cross_entropy_and_ignores_padding():
    logits, target = torch.randn(2, 50), (torch.rand(2, 50) > 0.5).float()
    mask = torch.ones(2, 50)
    mask[:, 40:] = 0
    loss = train.focal_loss(logits, target, mask, 0.5, 0.0)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, :40], target[:, :40], reduction="sum")
    assert torch.allclose(loss, 0.5 * plain)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_focal_loss_has_the_gradient_of_its_formula_however_sure_the_model_is(gamma):
    logits = torch.linspace(-120, 120, 2401).repeat(2, 1).requires_grad_()
    target = torch.tensor([[0.0], [1.0]]).expand(2, 2401)
    found, = torch.autograd.grad(train.focal_loss(logits, target, torch.ones(2, 2401), 0.3, gamma), logits)
    exact = logits.detach().double().requires_grad_()
    right = F.logsigmoid(exact * (2 * target - 1))
    share = torch.tensor([[0.7], [0.3]]) * F.logsigmoid(exact * (1 - 2 * target)).exp() ** gamma
    wanted, = torch.autograd.grad(-(share * right).sum(), exact)
    assert torch.allclose(found.double(), wanted, atol=1e-6)


def test_learning_rate_warms_up_then_falls_to_zero():
    factors = [train.lr_factor(step, 100, 10) for step in range(101)]
    assert factors[0] < factors[5] < factors[10] == 1.0 and factors[100] == pytest.approx(0) and factors[55] == pytest.approx(0.5)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision_trains_resumes_and_may_be_changed(corpus, tmp_path, precision, capsys):
    config = loaded(corpus, tmp_path, training__precision=precision, training__epochs=1)
    with cut_at(2):
        assert train.run(config) == 143
    assert bool(checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))["scaler"]) == (precision == "fp16")
    assert train.run(loaded(corpus, tmp_path, training__epochs=1), "true") == 0
    assert f"precision {precision} -> fp32" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_a_cut_run_ends_bit_identical_with_deterministic_algorithms(corpus, tmp_path):
    on_gpu = {"training__device": "cuda", "training__deterministic": True}
    assert train.run(loaded(corpus, tmp_path / "whole", **on_gpu)) == 0
    with cut_at(3):
        train.run(loaded(corpus, tmp_path / "cut", **on_gpu))
    assert train.run(loaded(corpus, tmp_path / "cut", **on_gpu), "true") == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_processes_than_gpus_are_refused(corpus, tmp_path, monkeypatch, capsys):
    for name, value in {**JOB, "LOCAL_RANK": str(torch.cuda.device_count())}.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--config", str(loaded_path(corpus, tmp_path, training__device="cuda"))]) == 2
    assert "finds no GPU of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_run_resumes_uncompiled_and_says_so(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))       # a killed compiler leaves a torn cache
    with cut_at(2):
        assert train.run(loaded(corpus, tmp_path, training__compile=True, training__epochs=1)) == 143
    assert train.run(loaded(corpus, tmp_path, training__epochs=1), "true") == 0
    assert "compile True -> False: same data order and state" in capsys.readouterr().out


def test_windows_longer_than_every_recording_and_batches_larger_than_an_epoch_are_said_with_numbers(corpus, tmp_path):
    recordings, said = data.open_corpus(corpus), []
    train.Split(loaded(corpus, tmp_path), recordings, said.append)
    assert not [line for line in said if line.startswith("warning")]
    odd = loaded(corpus, tmp_path, training__batch_size=500, data__window_seconds=3600.0, data__balanced=False)
    split = train.Split(odd, recordings, said.append)
    longest = max(r.seconds for r in split.train)
    assert f"window_seconds 3600 is longer than every recording (the longest has {longest:g} s)" in said[-2]
    assert f"batch_size 500 is larger than an epoch ({len(split.order(1))} windows)" in said[-1]


HUNGRY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import train
config = train.load_config(sys.argv[2])
healthy = train.Trainer.train_epoch

def hungry(trainer):                    # from the first step on, the memory that it has and 100 MB
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100 * 2**20, resource.RLIM_INFINITY))
    healthy(trainer)

train.Trainer.train_epoch = hungry
sys.exit(train.run(config))
"""


def test_out_of_memory_on_the_cpu_is_one_line_that_names_batch_size_and_accumulate(corpus, tmp_path):
    loaded(corpus, tmp_path, training__batch_size=64, data__window_seconds=60.0)
    done = forked.run([sys.executable, "-c", HUNGRY, ROOT, tmp_path / "config.yaml"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "stopped: out of memory with training.batch_size 64, training.accumulate 1" in done.stdout, done.stdout


@pytest.mark.parametrize("text", [
    "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_what_cuda_and_its_libraries_say_of_full_memory_is_heard(text):
    from evaluate import is_out_of_memory
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(RuntimeError("CUDA error: invalid argument"))


@pytest.mark.slow
def test_a_run_and_an_evaluation_take_no_tf32_for_fp32(corpus, tmp_path, monkeypatch):
    assert train.run(loaded(corpus, tmp_path, training__epochs=1)) == 0
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)       # torch's default
    assert evaluate.main(["--checkpoint", str(tmp_path / "t/checkpoints/last.pt"), "--data", str(corpus)]) == 0
    assert not torch.backends.cudnn.allow_tf32


LOST = """
import os, runpy, sys
sys.path.insert(0, sys.argv[1])
import data

class PageLocked:                       # torch ends a process that frees such memory once its GPU has failed
    def __del__(self):
        os.abort()

def batches(loader, lists, epoch):
    room = PageLocked()
    raise RuntimeError("CUDA error: unspecified launch failure")

data.Loader.batches = batches
sys.argv = ["train.py", "--config", sys.argv[2]]
runpy.run_path(os.path.join(sys.path[0], "train.py"), run_name="__main__")
"""


def test_a_gpu_that_fails_ends_the_run_with_a_traceback_and_exit_1_not_by_sigabrt(corpus, tmp_path):
    loaded(corpus, tmp_path)
    done = forked.run([sys.executable, "-c", LOST, ROOT, tmp_path / "config.yaml"], capture_output=True, text=True)
    assert "Traceback" in done.stderr and "unspecified launch failure" in done.stderr
    assert done.returncode == 1, done.stderr


def test_rows_that_a_dead_disk_refuses_wait_in_memory_and_come_whole_when_it_is_back(tmp_path):
    from run import records
    said = []
    record = records.MetricsFile(tmp_path, 0, True, lambda: True, said.append)
    record.pending = ['{"step": 1, "kind": "train"}\n']
    whole, record.path = record.path, Path("/dev/full")                     # takes no byte
    alive, record.file = record.file, os.open(record.path, os.O_WRONLY)
    record.flush()
    assert len(record.pending) == 1 and "1 row kept in memory" in said[-1]
    os.close(record.file)
    record.file, record.path = alive, whole
    os.write(alive, b'{"step": 1, "ki')                 # half a line, where the room ended
    record.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "kind": "train"}\n'
