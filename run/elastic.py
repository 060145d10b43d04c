"""Training on several GPUs of one machine from within a Python process: torchrun's elastic agent,
one process a GPU, and the exit code that train.py alone would give.

    code = train_on(8, config, "true", saved=print, signals=signals)
"""
import contextlib
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import yaml
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eeg.disk import read_json_lines
from run.config import run_directory
from run.machine import cores

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = 29                              # s in which the processes save after a signal


def train_on(count, config, resume, saved, signals):
    """Train `config` in `count` processes of this machine, to the end or to the next interruption;
    returns the exit code of train.py.

    resume: what its --resume takes. saved(path) is called here after each save that they make.
    signals: its `number` becomes the signal that came. In the main thread only: each process gets
    the signal, saves, and is waited for."""
    saves = run_directory(config) / "saves.jsonl"
    with tempfile.TemporaryDirectory(prefix="holdfast_") as scratch:
        path = Path(scratch, "config.yaml")
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        words = ["-u", str(TRAIN), "--config", str(path), "--resume", resume]
        # the last save is followed without the agent's handlers: a preemption stays one there
        with threads_shared(count), following(saves, saved), signals_restored():
            return launched(count, words, signals)


def launched(count, words, signals):
    agent = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id="holdfast", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="127.0.0.1",
        signals_to_handle=",".join(number.name for number in SIGNALS), shutdown_timeout=GRACE)
    try:
        elastic_launch(agent, sys.executable)(*words)
    except SignalException as caught:
        signals.number = int(caught.sigval)
        return 128 + signals.number
    except ChildFailedError as failed:
        # the first that left says why; the others were ended by the agent
        return failed.get_first_failure()[1].exitcode
    return 0


@contextlib.contextmanager
def threads_shared(count):
    """The processes share the cores: torch's threads would wait for each other in turns."""
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = given or str(max(1, cores() // count))
    try:
        yield
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


@contextlib.contextmanager
def signals_restored():
    """The agent leaves its own handlers behind."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def following(path, saved):
    """Call saved(path of the checkpoint) for each save that the main process of the training lists
    in `path`, in a thread. What it raises, but for OSError, ends the training and is raised."""
    ended, known, failed = threading.Event(), listed_saves(path)[-1:], None

    def follow():
        nonlocal known, failed
        over = False
        while not over:                 # once more at the end: for the save on the way out
            over = ended.wait(0.5)
            try:
                newest = listed_saves(path)[-1:]
                if newest not in ([], known):           # a run that was moved aside lists no more
                    known = newest
                    saved(path.parent / "checkpoints" / newest[0]["file"])
            except OSError:                             # out of reach: looked at again
                pass
            except Exception as error:
                failed = error
                if not ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)        # the agent lets the processes save
                return

    thread = threading.Thread(target=follow, name="saves", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed


def listed_saves(path):
    """Rows of saves.jsonl that tell of a save; one that is being written is left out."""
    return [row for row in read_json_lines(path) if row.get("kind") == "save"]
