"""What tests and benches of training share: a small configuration, real processes, and what makes two runs the same."""
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import torch
import yaml

import checkpoint
import forked
import train
from conftest import ROOT
from model import SMALL

# four times fewer steps of its streams than the small model, for tests that are not about what it learns
TINY = SMALL | {"hop": 256, "graph_steps": 1}
PYTHON = [sys.executable, str(ROOT / "train.py")]
LIMIT = 900                         # seconds: five times what a busy machine takes
TIMES = {"seconds", "waited", "time", "save"}       # which differ between runs that are the same
EPOCH_STEPS = 6                     # of the runs that the tests train on small_corpus


def settings(corpus, results, **changes):
    config = {
        "experiment": {"name": "t", "seed": 1, "results": str(results)},
        "data": {"path": str(corpus), "window_seconds": 10.0, "stride_seconds": 10.0, "dev_fraction": 0.3,
                 "background_per_partial": 1.0, "buffers": 2},
        "model": TINY,
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "best_metric": "auroc", "log_every": 1,
                     "device": "cpu"},
        "evaluation": {"window_seconds": 60.0}}
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def loaded(corpus, results, **changes):
    path = Path(results, "config.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings(corpus, results, **changes)))
    return train.load_config(path)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def last(results, name="last.pt"):
    return checkpoint.load(Path(results, "t", "checkpoints", name))


def rows(results):
    text = Path(results, "t", "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def curves(results):
    """Every TensorBoard point of every event file, duplicates and all."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    points = []
    for path in sorted(Path(results, "t", "tensorboard").glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.split("/")[-1] not in TIMES:
                    points.append((event.step, value.tag, value.tensor.float_val[0]))
    return sorted(points)


def assert_same_run(results, reference):
    mine, theirs = last(results), last(reference)
    for key in ("model", "optimizer", "scheduler", "scaler", "epoch", "batch", "global_step", "rng", "sampler", "running",
                "skipped", "stopping", "scores"):
        assert same(mine[key], theirs[key]), f"{key} differs from the uninterrupted run"
    assert same(mine["holdfast"]["metric"], theirs["holdfast"]["metric"])
    assert same(last(results, "best.pt")["model"], last(reference, "best.pt")["model"])
    assert rows(results) == rows(reference)
    assert curves(results) == curves(reference)


def spawn(config_path, *arguments, minutes="0", held=(), command=PYTHON, start=forked.Popen, **environment):
    """A real training process; with start=subprocess.Popen its interpreter is a new one too. held: (method of Trainer, which
    call of it, file), as in held.py."""
    if held:
        command = [sys.executable, str(ROOT / "tests" / "held.py")]
        environment |= {"HELD": " ".join(map(str, held))}
    return start([*command, "--config", str(config_path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                 cwd=config_path.parent, text=True,
                 env={**os.environ, "BGB_MID_EPOCH_MINUTES": minutes, "PYTHONUNBUFFERED": "1", **environment})


def wait_for(process, text, limit=LIMIT):
    """Output lines up to the first that contains `text`."""
    lines = []
    watch = threading.Timer(limit, end, [process])
    watch.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if text in line:
                return lines
    finally:
        watch.cancel()
    raise AssertionError(f"{text!r} never came, in {limit} s at most:\n" + "".join(lines))


def rest(process, limit=LIMIT):
    """What a process still says until it ends."""
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"not ended within {limit} s:\n" + process.communicate()[0]) from None


def end(process):
    """Kill a process, and its children where it leads a session: they hold its output open."""
    if os.getpgid(process.pid) == process.pid:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def free_port():
    """A port for a torchrun job. Each process of pytest-xdist tries a range of its own, so that two do not find the same."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 15000 + 100 * (worker % 100) + port))
            return probe.getsockname()[1]
    raise AssertionError("no free port")


PORTS = itertools.count()           # none is used twice by one process


def spawn_hooked(config_path, hook, *arguments, **options):
    """`spawn`, with the lines `hook` run between the import of train.py and its command."""
    code = f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\nimport train, checkpoint\n{hook}\nsys.exit(train.main(sys.argv[1:]))"
    return spawn(config_path, *arguments, command=[sys.executable, "-c", code], **options)
