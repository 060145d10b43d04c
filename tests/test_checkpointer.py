"""Policy of checkpoint.py: locks, records, copied loops, patience, the second copy, the command line's manners."""
import errno
import os
import signal
import subprocess
import sys

import pytest

import checkpoint
import crash
from conftest import ROOT
from test_crash import temps


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
    holder = subprocess.Popen([sys.executable, "-c", script, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
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
