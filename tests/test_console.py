"""eeg/console.py: the terminal of a command: closed, paused, in ASCII, or read by nobody."""
import contextlib
import os
import shlex
import subprocess
import sys
import time

import pytest

import forked
from conftest import ROOT
from eeg import console

START = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom eeg import console\n"


def run(code, line='"$0" -c "$1"', **options):
    return subprocess.run(["bash", "-c", line, sys.executable, START + code], text=True, **options)


def test_closed_descriptors_are_taken_before_a_file_can_get_one_of_their_numbers(tmp_path):
    code = f"console.begin('x', 'work'); console.install()\nfile = os.open({str(tmp_path / 'file')!r}, 66)\nprint('into the file?')\n"
    done = run(code + "sys.exit(file)", '"$0" -c "$1" <&- >&- 2>&-')
    assert done.returncode > 2 and (tmp_path / "file").read_bytes() == b""


def test_what_nobody_reads_is_dropped_and_the_newest_comes_when_somebody_does():
    ends, begins = os.pipe()
    code = "console.install()\nfor n in range(20000): print(n)\nos.write(2, b'done')\nwhile console.sys.stdout.texts: console.time.sleep(0.05)"
    process = subprocess.Popen([sys.executable, "-c", START + code], stdout=begins, stderr=subprocess.PIPE)
    os.close(begins)
    assert process.stderr.read(4) == b"done"                    # with a pipe of 64 KB that is full
    with open(ends) as pipe:
        lines = pipe.read().splitlines()
    assert process.wait() == 0
    assert lines[0] == "0" and lines[-2] == "19999" and "texts that nobody read are left out" in lines[-1]


def test_a_reader_that_is_gone_a_full_disk_and_an_ascii_console_raise_nothing():
    code = "console.install()\nfor n in range(3):\n    print('für', n)\n    print('für', n, file=sys.stderr)"
    for line in ('"$0" -c "$1" 2>&1 | true; exit ${PIPESTATUS[0]}', '"$0" -c "$1" >/dev/full 2>&1'):
        done = run(code, line, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run(code, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.splitlines()[0] == r"f\xfcr 0" and done.stderr.count(r"\xfc") == 3


def test_without_a_thread_to_be_had_lines_come_all_the_same():
    code = "import threading\nthreading.stack_size(1 << 46)\nconsole.install()\nprint('out')\nprint('err', file=sys.stderr)"
    done = run(code, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_streams_of_a_notebook_or_a_test_stay_what_they_are(capsys):
    before = sys.stdout
    console.install()
    assert sys.stdout is before


def test_a_timer_is_due_now_and_then():
    timer = console.Timer(0.2)
    assert not timer.due()
    time.sleep(0.25)
    assert timer.due() and not timer.due()


@pytest.mark.parametrize("command", ["data.py info", *(pytest.param(command, marks=pytest.mark.slow) for command in (
    "train.py --config", "evaluate.py --data . --checkpoint"))])
def test_what_the_environment_says_to_tqdm_ends_no_program(tmp_path, command):
    odd = {"TQDM_MININTERVAL": "abc", "TQDM_FILE": "x", "TQDM_NCOLS": "wide"}
    done = subprocess.run([sys.executable, *command.split(), tmp_path / "absent"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **odd})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "absent" in done.stderr, done.stderr


def test_a_bar_is_drawn_on_a_terminal_whatever_the_environment_says_to_tqdm():
    ours, theirs = os.openpty()
    code = "with console.bar(3, 'import', 'file') as bar:\n    bar.update(3)\n    print(bar.disable)"
    done = run(code, 'stty rows 24 cols 80 <&2; "$0" -c "$1"', stdout=subprocess.PIPE, stderr=theirs,
               env={**os.environ, "TQDM_BAR_FORMAT": "{x"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):                          # the end of a terminal
        while True:
            shown += os.read(ours, 4096)
    assert (done.returncode, done.stdout) == (0, "False\n") and b"import: 100%" in shown


@pytest.mark.parametrize("value, form, text", [
    (0.00004, ".4f", "<0.0001"), (0.99996, ".4f", ">0.9999"), (0.0, ".4f", "0.0000"), (1, ".4f", "1.0000"),
    (1.00001, ".4f", "1.0000"), (0.99996, ".4g", ">0.9999"), (0.00004, ".4g", "4e-05"), (0.999, ".2f", ">0.99"),
    (0.004, ".2f", "<0.01"), (0.99951, ".3f", ">0.999"), (0.04, ".1f", "<0.1"), (2160, ".4f", "2160.0000"), (float("nan"), ".2f", "nan")])
def test_rounding_alone_makes_nothing_of_something_and_all_of_nearly_all(value, form, text):
    assert console.rounded(value, form) == text


def test_seconds_are_not_said_as_no_hours_and_one_is_not_said_as_several():
    said = [console.hours(seconds) for seconds in (0, 0.25, 40, 89, 90, 3600, 86400)]
    assert said == ["0.00 h", "0.25 s", "40 s", "89 s", "0.03 h", "1.00 h", "24.00 h"]
    assert [console.how_many(n, noun) for n, noun in ((1, "batch"), (2, "batch"), ("1", "step"), (0, "epoch"))] == \
        ["1 batch", "2 batches", "1 step", "0 epochs"]


def test_a_command_that_is_told_runs_from_the_folder_where_it_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "my 'EEG' \u00fcbung"
    folder.mkdir()
    for place, script in ((ROOT, "data.py"), (folder, f"{ROOT}/data.py"), (ROOT.parent, f"{ROOT.name}/data.py")):
        monkeypatch.chdir(place)
        line = console.command("data.py", "info", folder)
        assert shlex.split(line) == ["python", script, "info", str(folder)]
    done = subprocess.run(line, shell=True, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "holds no recording" in done.stderr


@pytest.mark.parametrize("command", [
    ["data.py", "import", "", "OUT"], ["data.py", "import", "SRC", ""], ["data.py", "synth", ""], ["data.py", "info", ""],
    ["evaluate.py", "--checkpoint", "best.pt", "--data", ""], ["evaluate.py", "--checkpoint", "", "--data", "SRC"]])
def test_an_unset_variable_of_a_shell_is_refused_and_not_the_current_folder(tmp_path, command):
    script, *arguments = command
    done = forked.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(": the path is empty: is a variable of the shell unset?"), done
    assert not list(tmp_path.iterdir())
