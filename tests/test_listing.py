"""run/listing.py: what `ls` and `clean` say of real runs, and that they harm nothing."""
import os
import signal
import subprocess
import sys

import pytest
import torch

import checkpoint
import crash
import forked
from conftest import ROOT
from crash import state
from run import listing
from test_crash import saver
from test_mirror import mirrored, names


def tree(directory):
    return {str(p.relative_to(directory)): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in directory.rglob("*")}


@pytest.mark.parametrize("words, slow", [(["verify"], "health"), (["clean", "--yes"], "candidates"), (["ls"], "candidates")])
def test_ctrl_c_in_a_command_on_checkpoints_is_one_line(tmp_path, capsys, monkeypatch, words, slow):
    with saver(tmp_path / "run") as s:
        s.save_epoch(state(1))
    monkeypatch.setattr(checkpoint if slow == "health" else listing, slow, lambda *arguments: signal.raise_signal(signal.SIGINT))
    assert checkpoint.main([*words, str(tmp_path / "run")]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "checkpoint.py: interrupted: no file is half written\n"


def test_ls_reads_no_file_twice(tmp_path, capsys, monkeypatch):
    with saver(tmp_path / "run") as s:
        for step in (1, 2):
            s.save_mid(state(step))
        s.save_epoch(state(3))
    read, verify = [], checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path: read.append(path.name) or verify(path))
    assert checkpoint.main(["ls", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  ok") for line in lines) == len(set(read)) == len(read) > 1, lines


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
    (tmp_path / "results/v3/config.yaml").write_text(f"training:\n  mirror: {tmp_path}/nas\n")
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
    assert all(f"left {tmp_path}/{name}  (" in out for name in left), out


def test_what_clean_frees_is_that_of_each_folder_and_of_each_file_of_several_names_once(tmp_path, capsys):
    with saver(tmp_path / "v3") as s:
        s.save_epoch(state(1, epoch=1), metric=0.5)
        s.save_epoch(state(2, epoch=2), metric=0.6)
    last = tmp_path / "v3/last.pt"
    size = last.stat().st_size - 50
    subprocess.run(["truncate", "-s", str(size), str(last)], check=True)        # best.pt and checkpoint_epoch_002.pt too
    files = [str(path) for path in sorted((tmp_path / "v3").glob("*.pt"))]
    assert listing.clean(tmp_path / "v3", yes=False) == size
    capsys.readouterr()
    assert checkpoint.main(["ls", *files]) == checkpoint.main(["clean", *files]) == 0
    out = capsys.readouterr().out
    assert "4 names, 2 files on disk" in out and out.count("would remove") == 3 and "; --yes removes the files" in out
    (tmp_path / "kept.pt").hardlink_to(last)
    assert listing.clean(tmp_path / "v3", yes=False) == listing.clean(tmp_path / "v3", yes=True) == 0
    assert names(tmp_path / "v3") == ["checkpoint_epoch_001.pt"]
    for command in ("ls", "clean"):             # of a file beside which no run lies
        assert checkpoint.main([command, str(tmp_path / "kept.pt")]) == 1 and "no checkpoints in" in capsys.readouterr().out


def test_several_runs_are_a_line_each_and_one_that_fresh_moved_aside_is_called_so(tmp_path, capsys):
    for name, metric in (("v3", 0.7), ("v3.1", 0.5), ("other", None)):
        with saver(tmp_path / name / "checkpoints") as s:
            s.save_epoch(state(4, epoch=1), metric=metric, name="auroc")
            s.save_mid(state(5, epoch=2))
    assert checkpoint.main(["ls", str(tmp_path)]) == 0
    lines = {line.split("/checkpoints: ")[0].rsplit("/", 1)[-1]: line for line in capsys.readouterr().out.splitlines()}
    assert len(lines) == 3 and "best: auroc 0.7000; 2 files, " in lines["v3"] and "no best yet" in lines["other"]
    assert all("newest: epoch 2 batch 5 step 5" in line and "a resume takes mid_epoch_002_000005.pt" in line
               for line in lines.values())
    assert "an old run, moved aside" in lines["v3.1"] and "moved aside" not in lines["v3"]
    assert checkpoint.main(["ls", str(tmp_path), "-v"]) == 0 and capsys.readouterr().out.count("files on disk") == 3
    for lock in tmp_path.rglob(".lock"):
        lock.unlink()
    checkpoint.main(["clean", str(tmp_path)])
    assert not list(tmp_path.rglob(".lock")), "a look writes nothing"
    out = capsys.readouterr().out
    assert "a whole old run, moved aside by --fresh" in out and "to free in all: 0.0 kB" in out.splitlines()[-1]


def test_verify_takes_every_pt_below_a_path_links_once_and_nothing_found_is_an_error(tmp_path, capsys):
    with saver(tmp_path / "big/v3") as s:
        s.save_epoch(state(1, epoch=1))
    (tmp_path / "results").mkdir()
    (tmp_path / "results/v3").symlink_to(tmp_path / "big/v3")
    (tmp_path / "results/v3/round").symlink_to(tmp_path / "results")
    assert checkpoint.main(["verify", str(tmp_path / "results")]) == 0 and capsys.readouterr().out.count("last.pt: ok") == 1
    assert checkpoint.main(["ls", str(tmp_path / "results")]) == 0 and "-> last.pt" in capsys.readouterr().out
    (tmp_path / "big/v3/weights.pt").write_bytes(b"damage")
    assert checkpoint.main(["verify", str(tmp_path / "results")]) == 1 and "weights.pt: DAMAGED" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert checkpoint.main(["verify", str(tmp_path / "empty")]) == 1 and "no .pt file" in capsys.readouterr().err


def test_a_file_of_a_clock_that_is_ahead_has_no_negative_age(tmp_path, capsys):
    with saver(tmp_path / "checkpoints") as s:
        s.save_epoch(state(4, epoch=1), metric=0.99996, name="auroc")
    assert checkpoint.main(["ls", str(tmp_path)]) == 0 and " s  ok" in capsys.readouterr().out
    os.utime(tmp_path / "checkpoints" / "last.pt", (4e9, 4e9))
    assert checkpoint.main(["ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert " ahead  ok" in out and "-" not in out.split("last.pt", 1)[1].splitlines()[0] and "auroc >0.9999" in out
