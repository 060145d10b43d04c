"""The watchdog: what stands still ends with exit code 70 and its stacks; what is slow or was stopped does not."""
import os
import signal
import subprocess
import sys
import time

import pytest

import forked
from conftest import ROOT
from helpers import rest
from test_mirror import spoil_full

START = """
import ctypes, sys, time
sys.path.insert(0, sys.argv[1])
from run.watch import Watchdog
minutes, path = float(sys.argv[2]) / 60, sys.argv[3]
say = lambda line, every=False: print(line, flush=True)
"""
STUCK = START + """
with Watchdog(minutes, path, say) as watch:
    watch.facts = lambda: "step 7"
    watch.progressed("step")
    def waiting_in_c():
        ctypes.CDLL(None).sleep(600)
    waiting_in_c()
"""
BUSY = START + """
with Watchdog(minutes, path, say) as watch:
    for step in range(int(sys.argv[4])):
        print("step", step, flush=True)
        time.sleep(0.05)
        watch.progressed("step")
"""
SLOW = START + """
with Watchdog(minutes, path, say) as watch:
    for seconds in (1.0, 4.0):                  # far from the limit of 3 and from ten times the first
        time.sleep(seconds)
        watch.progressed("step")
"""
UNWRITABLE = START + """
import os, threading
from run import watch as module
module.REPORT_SECONDS = 1.0
lock = threading.Lock()
def held(line, every=False):
    with lock:
        print(line, flush=True)
with Watchdog(minutes, path, held) as watch:
    os.mkfifo(path)                             # nobody reads it: its opening never ends
    if sys.argv[4] == "log":
        lock.acquire()
    ctypes.CDLL(None).sleep(600)
"""
OTHERS = START + """
with Watchdog(minutes, path, say) as watch:
    with watch.waiting_for_others():
        time.sleep(3)
"""


def start(code, tmp_path, *arguments):
    command = [sys.executable, "-c", code, str(ROOT), *map(str, arguments)]
    return forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


JOB = START + """
rank = int(sys.argv[4])
print("ready", flush=True)
with Watchdog(minutes, path, say, f"process {rank} of 2,", 2) as watch:
    if rank:                                        # the one that hangs is patient: a step of it was slow
        time.sleep(1)
        watch.progressed("step")
    ctypes.CDLL(None).sleep(600)
"""


def test_a_main_thread_stuck_in_c_ends_with_70_and_every_stack_in_the_log_and_the_file(tmp_path):
    process = start(STUCK, tmp_path, 1.0, tmp_path / "hang.txt")
    out = rest(process)
    assert process.returncode == 70, out
    for text in (out, (tmp_path / "hang.txt").read_text()):
        assert "last done: step; step 7" in text
        assert "waiting_in_c" in text and text.count("(most recent call first)") >= 2 and f"process id {process.pid}" in text


@pytest.mark.parametrize("why", ["No such file or directory", "No space left on device"])
def test_a_report_that_cannot_be_written_does_not_keep_the_process_alive_and_is_said(small_disk, why):
    folder = small_disk / "gone"
    if "space" in why:
        folder.mkdir()
        spoil_full(folder)
    process = start(STUCK, small_disk, 1.0, folder / "hang.txt")
    out = rest(process)
    assert process.returncode == 70 and "last done: step; step 7" in out
    assert f"hang.txt could not be written ({why})" in out and "written to" not in out


@pytest.mark.parametrize("what", [pytest.param("file", marks=pytest.mark.slow), "file and log"])
def test_a_disk_that_does_not_answer_holds_up_neither_the_stacks_nor_the_end(tmp_path, what):
    process = start(UNWRITABLE, tmp_path, 1.0, tmp_path / "hang.txt", what.split()[-1])
    out = rest(process)
    assert process.returncode == 70, out
    assert out.count("nothing has ended for") == 1 and "(most recent call first)" in out
    assert "hang.txt could not be written" in out


def test_a_process_that_was_stopped_for_longer_than_the_limit_goes_on(tmp_path):
    process = start(BUSY, tmp_path, 3.0, tmp_path / "hang.txt", 40)
    while "step 3" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)                           # the limit is three
    os.kill(process.pid, signal.SIGCONT)
    out = rest(process)
    assert process.returncode == 0 and "step 39" in out and not (tmp_path / "hang.txt").exists()


def test_the_limit_grows_to_ten_times_the_slowest_step(tmp_path):
    process = start(SLOW, tmp_path, 3.0, tmp_path / "hang.txt")
    out = rest(process)
    assert process.returncode == 0, out


@pytest.mark.parametrize("code", [STUCK, OTHERS], ids=["off", "another process is waited for"])
def test_nothing_ends_a_process_that_is_not_watched(tmp_path, code):
    limit = 0.0 if code is STUCK else 1.0
    process = start(code.replace("sleep(600)", "sleep(1)"), tmp_path, limit, tmp_path / "hang.txt")
    out = rest(process)
    assert process.returncode == 0, out


def test_processes_of_a_job_wait_for_the_words_of_the_one_whose_clock_runs_out_last(tmp_path):
    """The second is allowed ten times its step of one second, the first two seconds; what an earlier
    standstill left in the file counts for nothing."""
    (tmp_path / "hang.txt").write_text("standstill: process 0 of 2\nstandstill: process 1 of 2\n")
    processes = [start(JOB, tmp_path, 2.0, tmp_path / "hang.txt", rank) for rank in range(2)]
    first = rest(processes[0])
    text = (tmp_path / "hang.txt").read_text()
    second = rest(processes[1])
    assert [process.returncode for process in processes] == [70, 70], first + second
    assert text.count("standstill: process 0 of 2") == text.count("standstill: process 1 of 2") == 2, text
