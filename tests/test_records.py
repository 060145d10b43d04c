"""run/records.py: a run's folder and its rows, on real files that other programs touch."""
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

import checkpoint
import forked
import train
from conftest import ROOT
from eeg.disk import Refused, TemporaryFault, read_json_lines
from helpers import EPOCH_STEPS, assert_same_run, last, loaded, rows
from run.watch import Watchdog
from run.records import Log, MetricsFile, RunDirectory, move_aside, refused_lock
from test_mirror import flip
from test_train import cut_at, validations


@pytest.fixture(scope="session")
def corpus(small_corpus):
    return small_corpus


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def metrics(folder, said, own=lambda: True, step=0):
    return MetricsFile(folder, step, True, own, said.append)


def replaced(path):
    subprocess.run(["sed", "-i", "s/train/train/", str(path)], check=True)


def emptied(path):
    path.write_bytes(b"")


def deleted(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size - 9)


@pytest.mark.parametrize("touch", [replaced, emptied, deleted, cut])
def test_rows_go_on_and_stay_whole_though_another_program_touches_the_file(tmp_path, touch):
    said = []
    file = metrics(tmp_path, said)
    for step in range(1, 9):
        file.write(kind="train", step=step, loss=1.0)
        if step == 4:
            touch(tmp_path / "metrics.jsonl")
    file.close()
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 9))
    assert any("by another program" in line for line in said)


def test_rows_of_a_folder_that_is_gone_wait_and_no_other_program_is_blamed(tmp_path):
    said = []
    (tmp_path / "v3").mkdir()
    file = metrics(tmp_path / "v3", said)
    (tmp_path / "v3").rename(tmp_path / "away")
    file.write(kind="train", step=1, loss=1.0)
    assert said[-1] == "metrics.jsonl: No such file or directory: 1 row kept in memory"
    (tmp_path / "away").rename(tmp_path / "v3")
    file.write(kind="train", step=2, loss=1.0)
    file.close()
    assert steps(tmp_path / "v3/metrics.jsonl") == [1, 2] and not any("another program" in line for line in said)


GONE = """
import shutil, sys, threading
from pathlib import Path
from run.records import MetricsFile
folder = Path(sys.argv[1])
file = MetricsFile(folder, 0, True, lambda: True, print)
writer = file.charts.writer
shutil.rmtree(folder)
for step in (1, 2, 3):
    file.write(kind="train", step=step, loss=1.0)
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(5)
"""


def test_the_thread_of_tensorboard_shows_no_traceback_of_a_folder_that_is_gone(tmp_path):
    (tmp_path / "v3").mkdir()
    done = forked.run([sys.executable, "-c", GONE, str(tmp_path / "v3")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "tensorboard: No such file" in done.stdout and not done.stderr, done.stderr


def test_a_run_that_has_given_its_folder_up_writes_no_row_into_that_of_the_next(tmp_path, corpus):
    config = loaded(corpus, tmp_path)
    with cut_at(EPOCH_STEPS - 1):
        train.run(config, "true")
    fingerprint = last(tmp_path, "mid_epoch_001_000005.pt")["data"]
    home = RunDirectory(config, fingerprint, "true", False, None, Watchdog(0, tmp_path / "hang.txt", print), print)
    (tmp_path / "t").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "t")
    home.metrics.write(kind="train", step=6, loss=1.0)
    home.close()
    assert steps(tmp_path / "t/metrics.jsonl")[-1] == 5


def test_each_try_of_a_save_is_progress_though_the_folder_and_its_second_copy_are_gone(tmp_path, corpus):
    """Else the run would stand still, to its watchdog, before its patience with the disk is at an end."""
    config = loaded(corpus, tmp_path, training__mirror=str(tmp_path / "nas"))
    with cut_at(EPOCH_STEPS - 1):
        train.run(config)
    watch = Watchdog(0, tmp_path / "hang.txt", print)
    home = RunDirectory(config, last(tmp_path, "mid_epoch_001_000005.pt")["data"], "true", False, None, watch, print)
    for name in ("t", "nas"):
        (tmp_path / name).rename(tmp_path / f"{name}_away")
    assert watch.last == "nothing yet"
    home.save_mid(home.state, None)
    home.saver.wait()
    assert watch.last == "save"
    for name in ("t", "nas"):
        (tmp_path / f"{name}_away").rename(tmp_path / name)
    home.close()


def test_a_log_file_that_takes_no_line_is_said_once_and_has_every_line_once_it_takes_some(tmp_path, capsys):
    log, path = Log(True), tmp_path / "log.txt"
    path.mkdir()
    log("first")
    log.keep(path)
    log("second")
    assert capsys.readouterr().out == f"first\n{path}: Is a directory: its lines wait in memory\nsecond\n"
    path.rmdir()
    log("third")
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["first", "second", "third"]


def test_rows_that_somebody_appends_stay(tmp_path):
    file = metrics(tmp_path, [])
    file.write(kind="train", step=1, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as other:
        other.write('{"kind": "note", "step": 1}\n')
    file.write(kind="train", step=2, loss=1.0)
    file.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 1, 2]


def test_a_copy_elsewhere_gets_the_rows_of_earlier_processes_too(tmp_path):
    """As where a second copy comes back that had missed them, and the home takes no checkpoint."""
    metrics(tmp_path, []).write(kind="train", step=1, loss=1.0)
    file = metrics(tmp_path, [], step=1)
    file.write(kind="train", step=2, loss=1.0)
    file.complete(tmp_path / "copy.jsonl")
    file.close()
    assert steps(tmp_path / "copy.jsonl") == [1, 2]


def test_rows_follow_a_folder_that_was_moved_away_and_leave_the_new_one_alone(tmp_path):
    folder, moved = tmp_path / "p", tmp_path / "p_old"
    folder.mkdir()
    file = metrics(folder, [], own=folder.exists)
    file.write(kind="train", step=1, loss=1.0)
    file.own = lambda: False
    file.charts.close()                     # its thread writes by name
    file.charts.writer = None
    folder.rename(moved)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 77}\n')
    file.write(kind="train", step=2, loss=1.0)
    file.event("save", folder / "checkpoints/last.pt")
    file.close()
    assert steps(moved / "metrics.jsonl") == [1, 2] and steps(folder / "metrics.jsonl") == [77]
    assert not (folder / "saves.jsonl").exists()


def test_a_run_and_its_second_copy_are_moved_aside_both_or_neither(tmp_path):
    home, second = tmp_path / "results/v3", tmp_path / "nas/v3"
    for folder in (home, second):
        (folder / "checkpoints").mkdir(parents=True)
    held = checkpoint.lock(second / "checkpoints")
    with pytest.raises(checkpoint.InUse):
        move_aside(home, print, second)
    held.close()
    assert home.is_dir() and second.is_dir()
    (tmp_path / "nas/v3.1").mkdir()
    move_aside(home, print, second)
    assert (tmp_path / "results/v3.2").is_dir() and (tmp_path / "nas/v3.2").is_dir()
    assert not home.exists() and not second.exists()


def test_a_run_that_is_a_mount_point_cannot_be_moved_aside_and_that_is_a_refusal(tmp_path, small_disk):
    second = tmp_path / "nas/disk"
    for folder in (small_disk, second):
        (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(Refused, match="cannot be moved aside"):
        move_aside(small_disk, print, second)
    assert second.is_dir() and (small_disk / "checkpoints").is_dir()


def test_of_a_linked_run_the_folder_is_moved_aside_and_the_link_leads_the_new_run_to_the_same_disk(tmp_path):
    big = tmp_path / "big"
    (big / "run" / "checkpoints").mkdir(parents=True)
    (big / "run" / "checkpoints" / "last.pt").write_bytes(b"old")
    home = tmp_path / "t"
    home.symlink_to(big / "run")
    for number in (1, 2):
        move_aside(home, print)
        assert home.is_symlink() and home.resolve() == big / "run" and not list(home.iterdir())
        assert (tmp_path / f"t.{number}").resolve() == big / f"run.{number}"
    assert (tmp_path / "t.1" / "checkpoints" / "last.pt").read_bytes() == b"old"


def test_of_linked_checkpoints_the_folder_is_moved_aside_and_a_link_leads_those_of_the_new_run_to_the_same_disk(tmp_path):
    big, home = tmp_path / "big/t", tmp_path / "results/t"
    big.mkdir(parents=True)
    home.mkdir(parents=True)
    (home / "checkpoints").symlink_to("../../big/t")
    for number in (1, 2):
        (big / "last.pt").write_bytes(b"run %d" % number)
        move_aside(home, print)
        assert (home / "checkpoints").resolve() == big and not list(big.iterdir())
        assert (tmp_path / f"results/t.{number}/checkpoints").resolve() == tmp_path / f"big/t.{number}"
        assert (tmp_path / f"results/t.{number}/checkpoints/last.pt").read_bytes() == b"run %d" % number


def test_linked_checkpoints_that_cannot_be_renamed_are_a_refusal_and_nothing_is_moved(tmp_path, small_disk):
    home = tmp_path / "results/t"
    home.mkdir(parents=True)
    (home / "checkpoints").symlink_to(small_disk)
    with pytest.raises(Refused, match="cannot be moved aside"):
        move_aside(home, print)
    assert (home / "checkpoints").resolve() == small_disk and os.listdir(tmp_path / "results") == ["t"]


@pytest.mark.slow
def test_a_run_whose_disk_of_checkpoints_is_not_mounted_begins_nothing_in_the_bare_mount_point(tmp_path, corpus):
    with cut_at(3):
        train.run(loaded(corpus, tmp_path), "true")
    before, place = rows(tmp_path), tmp_path / "t/checkpoints"
    place.rename(tmp_path / "disk")
    place.mkdir()
    for resume in ("true", "false"):
        with pytest.raises(TemporaryFault, match="is empty, and .* lists saves: mount its disk"):
            train.run(loaded(corpus, tmp_path), resume)
        assert not os.listdir(place) and rows(tmp_path) == before
    place.rmdir()
    (tmp_path / "disk").rename(place)
    assert train.run(loaded(corpus, tmp_path), "true") == 0


@pytest.mark.parametrize("holder, kind", [((os.getpid(), "another-host"), TemporaryFault), (None, TemporaryFault),
                                          ((999_999, os.uname().nodename), TemporaryFault),
                                          ((os.getppid(), os.uname().nodename), Refused)])
def test_a_lock_of_a_dead_or_distant_process_may_pass_and_one_of_a_living_one_is_refused(tmp_path, holder, kind):
    assert type(refused_lock(checkpoint.InUse(tmp_path, holder))) is kind


def test_a_file_in_the_way_of_a_folder_is_refused(corpus, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/checkpoints").write_text("in the way")
    with pytest.raises(train.Refused, match="File exists|Not a directory"):
        train.run(loaded(corpus, tmp_path))


@pytest.mark.slow
def test_where_every_file_of_both_places_is_damaged_the_run_begins_anew_and_both_are_kept(corpus, tmp_path):
    config = loaded(corpus, tmp_path, training__epochs=1, training__mirror=str(tmp_path / "nas"))
    assert train.run(config) == 0
    for place in (tmp_path / "t/checkpoints", tmp_path / "nas/t/checkpoints"):
        for path in {path.stat().st_ino: path for path in place.glob("*.pt")}.values():
            flip(path)
    assert train.run(loaded(corpus, tmp_path, training__epochs=1, training__mirror=str(tmp_path / "nas")), "true") == 0
    assert (tmp_path / "t.1").is_dir() and (tmp_path / "nas/t.1").is_dir()
    assert last(tmp_path)["global_step"] == EPOCH_STEPS


class Killed(Exception):
    pass


def killed(*arguments):
    raise Killed


@pytest.mark.slow
def test_going_back_to_a_file_interrupted_before_its_records_are_cut_loses_no_row(corpus, tmp_path, monkeypatch):
    config = loaded(corpus, tmp_path, training__epochs=3, training__checkpoint_keep=0)
    assert train.run(config) == 0
    before = rows(tmp_path)
    path = tmp_path / "t/checkpoints/checkpoint_epoch_001.pt"

    monkeypatch.setattr(checkpoint.Checkpointer, "save_mid", killed)     # the first save of the new line
    with pytest.raises(Killed):
        train.run(loaded(corpus, tmp_path, training__epochs=3, training__checkpoint_keep=0), str(path))
    monkeypatch.undo()
    assert rows(tmp_path) == before and not (tmp_path / "t/metrics.abandoned.jsonl").exists()
    with cut_at(EPOCH_STEPS + 2):
        train.run(loaded(corpus, tmp_path, training__epochs=3, training__checkpoint_keep=0), str(path))
    assert checkpoint.peek(tmp_path / "t/checkpoints/best.pt")["epoch"] == 1
    assert train.run(loaded(corpus, tmp_path, training__epochs=3, training__checkpoint_keep=0), "true") == 0
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in before]


def test_the_copied_file_says_nothing_of_eeg(tmp_path):
    text = (ROOT / "checkpoint.py").read_text().lower()
    for word in ("eeg", "montage", "bgb", "modal", "seizure", "patient", "epilep"):
        assert word not in text, word


@pytest.mark.slow
@pytest.mark.parametrize("second", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["with a second copy", "alone"])
def test_rows_that_were_lost_before_a_resume_come_from_the_second_copy_or_are_said(tmp_path, corpus, capsys, second):
    options = {"training__mirror": str(tmp_path / "nas")} if second else {}
    with cut_at(EPOCH_STEPS + 6):
        train.run(loaded(corpus, tmp_path, **options), "true")
    before, path = rows(tmp_path), tmp_path / "t/metrics.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    capsys.readouterr()
    assert train.run(loaded(corpus, tmp_path, **options), "true") == 0
    told, found = capsys.readouterr().out, rows(tmp_path)
    at = found.index(before[-1]) + 1 if second else 2
    assert found[:at] == (before if second else before[:2])
    if second:
        assert f"metrics.jsonl lacked {len(before) - 2} rows: taken from" in told and "has no rows" not in told
        assert rows(tmp_path / "nas") == found
    else:
        assert f"metrics.jsonl has no rows of steps 3 to {before[-1]['step']}" in told
    assert train.run(loaded(corpus, tmp_path, **options), "true") == 0
    assert "metrics.jsonl" not in capsys.readouterr().out       # said once


@pytest.mark.parametrize("name, torn", [
    ("saves.jsonl", b'{"kind": "sa'), pytest.param("metrics.abandoned.jsonl", b"\0" * 5000, marks=pytest.mark.slow)])
def test_half_a_line_that_a_full_disk_left_spoils_no_later_one(tmp_path, corpus, name, torn):
    path = tmp_path / "t" / name
    config = loaded(corpus, tmp_path)
    with cut_at(3):
        train.run(config, "true")
    path.write_bytes((path.read_bytes() if path.exists() else b'{"step": 0}\n') + torn)
    kept = len([line for line in path.read_bytes().splitlines() if line.endswith(b"}")])
    with open(tmp_path / "t/metrics.jsonl", "a") as file:       # a row that the resume cuts off
        file.write('{"kind": "train", "step": 99}\n')
    with cut_at(2):
        train.run(config, "true")
    assert len([json.loads(line) for line in path.read_text().splitlines()]) > kept


@pytest.mark.slow
def test_going_back_to_a_file_of_another_run_brings_its_rows_and_sets_those_of_this_one_aside(tmp_path, corpus):
    with cut_at(EPOCH_STEPS + 5):
        train.run(loaded(corpus, tmp_path), "true")
    with cut_at(4):                             # begun anew by mistake
        train.run(loaded(corpus, tmp_path, training__learning_rate=0.01), fresh=True)
    wrong = rows(tmp_path)
    newest = checkpoint.find_resume(tmp_path / "t.1/checkpoints")
    assert train.run(loaded(corpus, tmp_path), str(newest)) == 0
    found, old = rows(tmp_path), [json.loads(line) for line in (tmp_path / "t.1/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if row["kind"] == "train"] == list(range(1, 2 * EPOCH_STEPS + 1))
    assert [row.get("loss") for row in found[:len(old)]] == [row.get("loss") for row in old]
    aside = [json.loads(line) for line in (tmp_path / "t/metrics.abandoned.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in aside] == [row["loss"] for row in wrong]


@pytest.mark.slow
def test_going_back_to_a_line_that_was_left_brings_its_rows_and_sets_those_of_the_other_aside(tmp_path, corpus):
    assert train.run(loaded(corpus, tmp_path)) == 0
    checkpoints, ours = tmp_path / "t/checkpoints", rows(tmp_path)
    shutil.copy(checkpoints / "last.pt", checkpoints / "checkpoint_epoch_900.pt")
    changed = loaded(corpus, tmp_path, training__learning_rate=3e-3)
    assert train.run(changed, resume=str(checkpoints / "checkpoint_epoch_001.pt")) == 0
    theirs = rows(tmp_path)
    assert [row["step"] for row in theirs] == [row["step"] for row in ours] and theirs != ours
    for back, expected in (("checkpoint_epoch_900.pt", ours), ("checkpoint_epoch_002.pt", theirs)):
        assert train.run(changed, resume=str(checkpoints / back)) == 0
        assert rows(tmp_path) == expected
    with open(tmp_path / "t/metrics.jsonl", "a") as file:
        file.write("".join(json.dumps({"kind": "train", "step": 3, "save": save}) + "\n" for save in (7, [[], 1], ["a"], {})))
    assert train.run(changed, resume="true") == 0 and rows(tmp_path) == theirs


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_going_back_to_a_file_killed_before_the_rows_are_cut_ends_as_if_it_had_not_been(tmp_path, corpus, monkeypatch, batch_size):
    now = {"training__batch_size": batch_size}
    for results in (tmp_path / "killed", tmp_path / "whole"):
        with cut_at(EPOCH_STEPS + 5):
            train.run(loaded(corpus, results), "true")
        with cut_at(4):                         # begun anew by mistake
            train.run(loaded(corpus, results, training__learning_rate=0.01), fresh=True)
        old = str(results / "t.1/checkpoints/checkpoint_epoch_001.pt")
        if results.name == "killed":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(RunDirectory, "_cut_records", killed)
                train.run(loaded(corpus, results, **now), old)
            old = "true"
        assert train.run(loaded(corpus, results, **now), old) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_best_that_is_in_no_place_any_more_is_said(tmp_path, corpus, capsys):
    with cut_at(2 * EPOCH_STEPS):
        train.run(loaded(corpus, tmp_path), "true")
    for name in ("best.pt", "last.pt", "checkpoint_epoch_001.pt"):
        (tmp_path / "t/checkpoints" / name).unlink()
    capsys.readouterr()
    assert train.run(loaded(corpus, tmp_path), "true") == 0
    assert "best.pt, of epoch 1, is in no place any more: the best starts anew" in capsys.readouterr().out
    assert last(tmp_path, "best.pt")["epoch"] == 2


@pytest.mark.slow
def test_a_best_that_cannot_be_read_once_is_not_taken_for_lost(tmp_path, corpus, monkeypatch):
    with cut_at(2 * EPOCH_STEPS):
        train.run(loaded(corpus, tmp_path), "true")
    real = checkpoint.peek

    def peek(path):
        if path.name == "best.pt" and sys._getframe(1).f_code.co_name == "_compared_with_best":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)
    with monkeypatch.context() as patched, pytest.raises(TemporaryFault, match="best.pt: Input/output error; no checkpoint was lost"):
        patched.setattr(checkpoint, "peek", peek)
        train.run(loaded(corpus, tmp_path), "true")
    best = last(tmp_path, "best.pt")["epoch"]
    with cut_at(2):
        train.run(loaded(corpus, tmp_path), "true")
    assert checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))["stopping"]["epoch"] == best == 1


@pytest.mark.slow
def test_a_best_that_is_lost_with_its_epoch_is_said_beside_the_one_that_takes_its_place(tmp_path, corpus, capsys, monkeypatch):
    with validations(monkeypatch, auroc=[0.9, 0.6, 0.7, 0.5]):
        for epochs in (3, 4):
            assert train.run(loaded(corpus, tmp_path, training__epochs=epochs, training__checkpoint_keep=2), "true") == 0
            told = capsys.readouterr().out
            (tmp_path / "t/checkpoints/best.pt").unlink(missing_ok=epochs == 4)
    assert "best.pt, of epoch 1, is in no place any more: the best is now that of epoch 3" in told
    assert last(tmp_path)["stopping"]["epoch"] == 3


@pytest.mark.slow
def test_a_best_under_other_rules_is_no_bar_and_patience_starts_over(tmp_path, corpus, capsys, monkeypatch):
    def trained(**changes):
        config = loaded(corpus, tmp_path, training__best_metric="event_f1", **changes)
        config["evaluation"]["min_duration_seconds"] = minimum
        assert train.run(config, "true") == 0
        return last(tmp_path)["stopping"]
    minimum = 3.0
    with validations(monkeypatch, event_f1=[1.0, 0.9, 0.8]):
        before = trained(training__epochs=3)
    assert before["value"] == 1.0 and before["waited"] > 0      # and a patience of 1 is over
    minimum = 400.0                                             # no event is as long
    after = trained(training__epochs=4, training__patience=1)
    assert (after["epoch"], after["value"], after["waited"]) == (4, 0.0, 0)
    assert checkpoint.peek(tmp_path / "t/checkpoints/best.pt")["epoch"] == 4
    assert "measured by other rules, so the best starts anew" in capsys.readouterr().out


def test_a_disk_that_cannot_be_asked_for_a_moment_whose_folder_it_is_costs_no_line_of_saves(small_corpus, tmp_path, monkeypatch):
    saved = train.RunDirectory.saved

    def asked_in_vain(self, path):
        def fails():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with monkeypatch.context() as faulty:
            faulty.setattr(self.saver, "is_own_directory", fails)
            saved(self, path)
    monkeypatch.setattr(train.RunDirectory, "saved", asked_in_vain)
    monkeypatch.setattr(train.Trainer, "draw", lambda self: None)
    assert train.run(loaded(small_corpus, tmp_path, training__epochs=1)) == 0
    listed = [row["file"] for row in read_json_lines(tmp_path / "t/saves.jsonl") if row["kind"] == "save"]
    assert listed == [f"mid_epoch_001_{EPOCH_STEPS:06d}.pt", "checkpoint_epoch_001.pt"]
