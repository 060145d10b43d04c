"""torchrun with gloo on this machine: the same windows as one process, elastic resume, and the death of one process."""
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from run import config
import forked
from conftest import ROOT, once
from helpers import EPOCH_STEPS, TINY, free_port, last, loaded, rest, rows, same, spawn, wait_for


@pytest.fixture(scope="session")
def corpus(small_corpus):
    return small_corpus


STILL = {**TINY, "dropout": 0.0}                       # dropout draws from each process's own random state


# torchrun whose processes come out of forks, as itself does: nothing else of it is another
AGENT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import forked
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main
forked.branch()
subprocess_handler.Popen = forked.Popen
main()
"""


def torchrun(results, processes, *arguments, restarts=0, minutes="0", held=(), script=ROOT / "train.py", real=False):
    """real: a new interpreter for every process, as in a terminal."""
    program = ROOT / "tests" / "held.py" if held else script
    start, run = (subprocess.Popen, ["-m", "torch.distributed.run"]) if real else (forked.Popen, ["-c", AGENT])
    command = [sys.executable, *run, f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
               "--master-addr=127.0.0.1", f"--master-port={free_port()}", str(program), "--config",
               str(Path(results, "config.yaml")), *arguments]
    return start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                 env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "BGB_MID_EPOCH_MINUTES": minutes,
                      "HELD": " ".join(map(str, held))})


def finish(process):
    out = rest(process)
    assert process.returncode == 0, out[-4000:]
    return out


def children(process):
    """Process ids of the workers of this torchrun."""
    text = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    found = [line.split() for line in text.splitlines()]
    return [int(number) for number, name in found if name != forked.NAME]


def first_gradient(results):
    """Gradient of the first batch, one vector in float64: a tenth of it is AdamW's first moment after one step."""
    moments = last(results, "mid_epoch_001_000001.pt")["optimizer"]["state"]
    return torch.cat([moments[number]["exp_avg"].double().flatten() for number in sorted(moments)])


def assert_rows_agree(results, reference):
    """The same steps and validations, with losses equal but for what rounding does to twelve steps."""
    for mine, one in zip(rows(results), rows(reference), strict=True):
        assert mine["step"] == one["step"] and mine["kind"] == one["kind"]
        for key in {"loss", "auroc"} & mine.keys():
            assert mine[key] == pytest.approx(one[key], rel=0.02, abs=0.02), key


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """One process, two epochs, no dropout, a snapshot after every step."""
    import train
    results = tmp_path_factory.mktemp("alone")
    settings = loaded(corpus, results, training__mid_epoch_minutes=0.0, training__mid_epoch_keep=0)
    assert train.run(settings | {"model": config.DEFAULTS["model"] | STILL}) == 0
    return results


def prepare(corpus, results, **changes):
    import yaml
    config = loaded(corpus, results, **changes)
    config["model"] |= STILL
    (results / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="session")
def together(corpus, tmp_path_factory):
    """The same by several processes that nothing stops: function of their number."""
    def run(processes):
        with once(tmp_path_factory, f"together{processes}") as (results, empty):
            if empty:
                prepare(corpus, results, training__mid_epoch_keep=0)
                finish(torchrun(results, processes, real=processes == 2))
        return results
    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_n_processes_take_the_same_windows_and_agree_with_one_to_rounding(alone, together, processes):
    results = together(processes)
    # rounding is a share of the gradient; AdamW would blow it up to the size of a step, where a gradient is near 0
    mine, one = first_gradient(results), first_gradient(alone)
    assert one.norm() > 0 and (mine - one).norm() < 1e-4 * one.norm()
    assert_rows_agree(results, alone)
    assert len(last(results)["rng"]) == processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])     # sums of two have no order to lose
def test_a_killed_process_ends_the_job_and_torchrun_resumes_by_itself_bit_identically(corpus, together, tmp_path, processes):
    whole = together(processes)
    prepare(corpus, tmp_path / "cut")
    gate = tmp_path / "gate"
    process = torchrun(tmp_path / "cut", processes, restarts=2, held=("after_step", 3, gate))
    wait_for(process, "held")
    os.kill(children(process)[-1], signal.SIGKILL)
    gate.touch()
    out = finish(process)
    assert "resuming" in out and "resumed: epoch" in out
    assert "train.py: another process of this job has ended" in out and "pair.cc" not in out
    mine, theirs = last(tmp_path / "cut"), last(whole)
    for key in ("model", "optimizer", "scheduler", "rng", "stopping", "scores"):
        assert same(mine[key], theirs[key]), key
    assert rows(tmp_path / "cut") == rows(whole)


def machines(*places, arguments=(), **options):
    """A process on each of several machines, as far as one can be several: each with its own config.yaml, in a folder."""
    job = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [spawn(place / "config.yaml", *arguments, **options, **job, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank, place in enumerate(places)]


def test_a_job_whose_processes_were_given_different_configurations_is_refused_by_all_of_them(corpus, tmp_path):
    """As on two machines, each with a file of its own; their paths may differ."""
    for rank, rate in enumerate((0.001, 0.01)):
        loaded(corpus, tmp_path / str(rank), training__learning_rate=rate)
    for process in machines(tmp_path / "0", tmp_path / "1"):
        out = rest(process)
        assert process.returncode == 2, out
        assert "train.py: training.learning_rate is 0.01 in process 1 and 0.001 in process 0" in out
    assert not list(tmp_path.glob("*/t"))


@pytest.mark.slow
def test_each_machine_reads_its_own_copy_of_the_recordings_also_where_their_times_and_folders_are_others(corpus, together, tmp_path):
    """The first machine's folder is gone once it is open, as it never was on the second."""
    a, b = tmp_path / "a", tmp_path / "b"
    gate = tmp_path / "gate"
    for place in (a, b):
        shutil.copytree(corpus, place / "h5", copy_function=shutil.copyfile)
        prepare(place / "h5", place)
    ones = machines(a, b, held=("train_step", 1, gate))
    for process in ones:
        wait_for(process, "held")
    for path in (b / "h5").rglob("*.h5"):
        path.rename(path.with_suffix(".away"))
    gate.touch()
    outs = [rest(process) for process in ones]
    assert [process.returncode for process in ones] == [1, 1] and f"stopped: {b}" in outs[1], outs
    for path in (b / "h5").rglob("*.away"):
        path.rename(path.with_suffix(".h5"))
    ones = machines(a, b, arguments=["--resume"])
    outs = [rest(process) for process in ones]
    assert [process.returncode for process in ones] == [0, 0], outs
    assert same(last(a)["model"], last(together(2))["model"])


def test_machines_whose_recordings_differ_are_refused_by_all_of_them(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "h5", ignore=lambda folder, names: [name for name in names if name == "sub-004"])
    for rank, path in enumerate((corpus, tmp_path / "h5")):
        prepare(path, tmp_path / str(rank))
    for process in machines(tmp_path / "0", tmp_path / "1"):
        out = rest(process)
        assert process.returncode == 2 and "recordings at data.path differ between process 1 and process 0" in out, out
    assert not list(tmp_path.glob("*/t"))


def test_a_resume_whose_main_process_is_on_another_machine_than_the_run_is_refused_and_begins_nothing_anew(corpus, tmp_path):
    for rank in (0, 1):
        prepare(corpus, tmp_path / str(rank))
    (tmp_path / "1/t/checkpoints").mkdir(parents=True)
    checkpoint.atomic_save({"epoch": 1, "batch": 3, "global_step": 3}, tmp_path / "1/t/checkpoints/mid_epoch_001_000003.pt")
    for process in machines(tmp_path / "0", tmp_path / "1", arguments=["--resume"]):
        out = rest(process)
        assert process.returncode == 2 and "process 1 finds checkpoints in its own, and process 0, which saves, finds none" in out, out
    assert not (tmp_path / "0/t").exists()


def test_a_signal_to_one_process_makes_all_save_at_the_same_step(corpus, tmp_path):
    prepare(corpus, tmp_path)
    gate = tmp_path / "gate"
    process = torchrun(tmp_path, 2, minutes="30", held=("after_step", 3, gate))
    begin = wait_for(process, "held")
    os.kill(children(process)[1], signal.SIGTERM)
    gate.touch()
    out = "".join(begin) + rest(process)
    assert "stopped by SIGTERM, saved" in out and "Warning" not in out, out
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert state["batch"] >= 3 and len(state["rng"]) == 2


@pytest.mark.slow
def test_a_signal_within_the_recordings_that_two_processes_validate_stops_both_there_and_the_end_is_the_same(corpus, together, tmp_path):
    """Both wait before the first call of the model; the first process has the signal."""
    prepare(corpus, tmp_path)
    gate = tmp_path / "gate"
    process = torchrun(tmp_path, 2, held=("poll", 1, gate))
    wait_for(process, "held")
    os.kill(children(process)[0], signal.SIGTERM)
    gate.touch()
    out = rest(process)
    assert "stopped by SIGTERM, saved" in out, out[-4000:]
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert state["batch"] == EPOCH_STEPS and not state["validation"]
    finish(torchrun(tmp_path, 2, "--resume"))
    assert same(last(tmp_path)["model"], last(together(2))["model"]) and rows(tmp_path) == rows(together(2))


@pytest.mark.slow
def test_a_recording_that_changes_under_one_process_only_stops_the_job_with_the_reason(corpus, tmp_path):
    import data
    shutil.copytree(corpus, tmp_path / "h5")
    prepare(tmp_path / "h5", tmp_path)
    gate = tmp_path / "gate"
    dev = data.split_patients(data.open_corpus(tmp_path / "h5"), [], 0.3, 1)[1]
    process = torchrun(tmp_path, 2, held=("after_step", 3, gate))
    lines = wait_for(process, "held")
    os.utime(dev[1].path, (1, 1))                       # the second process reads it, at the end of the first epoch
    gate.touch()
    out = "".join(lines) + rest(process)
    assert process.returncode == 1 and re.search(r"stopped: .*was changed since .*; mend it, then --resume", out), out[-4000:]
    assert checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))["global_step"] == EPOCH_STEPS


@pytest.mark.slow
def test_two_then_three_then_two_processes_see_every_window_once_and_say_that_rounding_may_differ(corpus, alone, tmp_path):
    prepare(corpus, tmp_path)
    for processes in (2, 3):
        gate = tmp_path / f"gate{processes}"
        process = torchrun(tmp_path, processes, "--resume", minutes="30", held=("after_step", 2, gate))
        lines = wait_for(process, "held")
        os.killpg(process.pid, signal.SIGTERM)
        gate.touch()
        lines += rest(process).splitlines()
    assert any("processes 2 -> 3" in line and "rounding may differ" in line for line in lines)
    finish(torchrun(tmp_path, 2, "--resume", minutes="30"))
    assert_rows_agree(tmp_path, alone)                  # no batch trained twice, none left out


def hooked(folder, hook):
    """A script that is train.py with `hook` run before its command."""
    path = folder / "hooked.py"
    path.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport checkpoint, train\n{hook}\n"
                    "sys.exit(train.main())\n")
    return path


SLOW_SAVE = """
original = checkpoint.atomic_write
def slow(path, buffers):
    if str(path).endswith(".pt"):
        print("writing", flush=True)
        time.sleep(3)
    return original(path, buffers)
checkpoint.atomic_write = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["main", pytest.param("all", marks=pytest.mark.slow), pytest.param("torchrun", marks=pytest.mark.slow)])
def test_all_processes_leave_together_after_a_save_of_three_seconds_is_durable(corpus, tmp_path, which):
    prepare(corpus, tmp_path, training__epochs=50)
    process = torchrun(tmp_path, 2, minutes="30", script=hooked(tmp_path, SLOW_SAVE))
    lines = wait_for(process, "batch 3/")
    if which == "torchrun":
        os.kill(process.pid, signal.SIGTERM)
    for child in {"main": children(process)[:1], "all": children(process), "torchrun": []}[which]:
        os.kill(child, signal.SIGTERM)
    out = "".join(lines) + rest(process)
    assert "stopped by SIGTERM, saved" in out, out[-4000:]
    state = checkpoint.load(checkpoint.find_resume(tmp_path / "t/checkpoints"))
    assert state["batch"] >= 3 and len(state["rng"]) == 2


SLOW_COPY = """
from run import mirror
original = mirror.sync
def slow(*arguments, **options):
    time.sleep(4)
    return original(*arguments, **options)
mirror.sync = slow
original_step = train.Trainer.after_step
def asked(self, *arguments):
    if self.step == 2:
        os.kill(os.getpid(), 15)
        time.sleep(1.5)                     # one that comes later is a second wish
    original_step(self, *arguments)
train.Trainer.after_step = asked
"""


@pytest.mark.slow
def test_all_processes_leave_together_after_the_second_copy_has_the_last_save(corpus, tmp_path):
    prepare(corpus, tmp_path, training__mirror=str(tmp_path / "second"))
    process = torchrun(tmp_path, 2, minutes="30", script=hooked(tmp_path, SLOW_COPY))
    out = rest(process)
    assert "stopped by SIGTERM, saved" in out, out[-4000:]
    newest = checkpoint.find_resume(tmp_path / "t/checkpoints")
    assert (tmp_path / "second/t/checkpoints" / newest.name).read_bytes() == newest.read_bytes()


HANGS = """
original = train.Trainer.train_step
def hang(self, *arguments):
    if self.step == 2:
        self.watch.limit, self.watch.slowest = 1.0, 0.0         # from here on
        if self.group.rank == 1:
            import ctypes
            ctypes.CDLL(None).sleep(600)
    return original(self, *arguments)
train.Trainer.train_step = hang
"""


def test_of_two_processes_the_one_that_hangs_is_named_with_its_stack(corpus, tmp_path):
    prepare(corpus, tmp_path, training__epochs=50, training__hang_minutes=30.0)
    process = torchrun(tmp_path, 2, script=hooked(tmp_path, HANGS))
    out = rest(process)
    assert process.returncode != 0
    text = (tmp_path / "t/hang.txt").read_text()
    mine = text[text.index("standstill: process 1 of 2,"):].split("standstill: process 0")[0]
    assert "in hang" in mine and "step 2" in mine and "exitcode  : 70" in out, out[-4000:]


DIES_LATE = """
original = train.Trainer.after_step
def after_step(self, *arguments):
    if self.step == 2:
        time.sleep(15)
        os._exit(1)
    original(self, *arguments)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    train.Trainer.after_step, train.Trainer.late = after_step, lambda self: False
"""


@pytest.mark.slow
def test_a_time_limit_is_the_jobs_and_does_not_begin_anew_where_torchrun_starts_a_process_again(corpus, tmp_path):
    prepare(corpus, tmp_path, training__epochs=1)
    limit = ["--set", f"training.time_limit_hours={15 / 3600}", "--success-exit-status", "75"]
    out = finish(torchrun(tmp_path, 2, *limit, restarts=1, script=hooked(tmp_path, DIES_LATE)))
    assert "resumed: epoch 1" in out and "time limit reached, saved" in out, out[-4000:]


ALONE = f"""
import datetime, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from run import machine
from run.watch import Watchdog
machine.LATE_SECONDS = 1
with Watchdog(0, os.devnull, print) as watch, machine.Group("cpu", watch):
    store = dist.distributed_c10d._get_default_store()
    print("waits for", store.timeout.days, "days", flush=True)
    dist.destroy_process_group = lambda: time.sleep(600)        # as NCCL's does where one process leaves alone
print("left", flush=True)
os._exit(0)
"""


def test_a_process_waits_for_days_for_what_the_first_exchange_needs_and_leaves_alone_where_the_teardown_hangs():
    job = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [forked.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for process in processes:
        assert process.communicate(timeout=300)[0].splitlines()[-2:] == ["waits for 7 days", "left"]
