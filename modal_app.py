"""The same training on Modal, where the machine may vanish at any second.

    modal run modal_app.py --action smoke --fresh true      five minutes, "ready" or what is not
    modal run --detach modal_app.py --action train --config configs/modal/train.yaml --resume true
    modal run modal_app.py --action ls                      runs on the results Volume, their cost
    modal run --detach modal_app.py --action evaluate --config configs/modal/train.yaml --split eval

--detach lets a run outlive this terminal; --resume and --fresh mean what they mean to train.py. A
preempted or killed container starts again with the same arguments and resumes. Before the
platform's
limit of 24 h a run saves and moves to a fresh container by itself. What an attempt must know of the
earlier ones stands in the run directory:

    launch.json          the launch that owns the run
    attempts/NNN.json    one container each: where it began, when it last saved, how it left
    done.json            written last
"""
import contextlib
import copy
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Literal

import modal

GPU = "A100-80GB"                       # a list, ["A100-80GB", "H100"], finds room sooner
CPU, MEMORY = 8, 32                     # cores, GiB
EVALUATE_GPU = "L4"                     # scoring is bound by reading, not by the card
TIMEOUT, SMOKE_TIMEOUT = 24, 1          # hours per attempt; 24 is the platform's longest
MARGIN = 0.25                           # hours before it at which the run saves and hands over
RETRIES = 10                            # the platform's most: 11 attempts of 24 h, then a hand
RESULTS, DATA, MIRROR = "/results", "/data", "/mirror"      # where the Volumes are mounted
GRACE = 35                              # s in which a preempted container may still commit
STUCK = 3                               # attempts without progress end a run
SHORT = 15                              # minutes: an earlier death without a word does not count,
SHORT_DEATHS = 10                       # unless this many come one after another
COMMIT_FAILURES = 5                     # in a row; what is not committed dies with its container
DOLLARS = {                             # an hour, of modal.com/pricing; a fixed region multiplies
    "B200": 6.25, "H200": 4.54, "H100": 3.95, "A100-80GB": 2.50, "A100-40GB": 2.10, "A100": 2.10,
    "L40S": 1.95, "A10": 1.10, "L4": 0.80, "T4": 0.59, "core": 0.047, "GiB": 0.008}
DOLLARS_AS_OF = "October 2026"
DRIVER = {"13": 580, "12": 525}         # oldest NVIDIA driver for a torch of that CUDA version

HERE = Path(__file__).parent
LEFT = {                                # by train.py's exit codes
    0: "finished", 75: "handed over", 138: "cancelled",
    129: "preempted", 130: "preempted", 143: "preempted"}
EXIT = {"finished": 0, "refused": 2, "time limit": 75}      # others: 1


def requirements():
    """Packages of the image, read on the launching side: a container has no such file."""
    if not modal.is_local():
        return []
    lines = (HERE / "requirements.txt").read_text().splitlines()
    outside = ("modal", "pytest", "ruff", "mypy")
    return [line.split("#")[0].strip() for line in lines if not line.startswith(outside)]


# PyPI's torch 2.13 is built for CUDA 13, which needs driver 580 or newer: `smoke` checks both.
# gcc is for training.compile.
image = (modal.Image.debian_slim(python_version="3.11")
         .apt_install("gcc", "libc6-dev")
         .uv_pip_install(*requirements())
         # the data is read-only: HDF5 must not try to lock it
         .env({"PYTHONUNBUFFERED": "1", "HDF5_USE_FILE_LOCKING": "FALSE"}))
for folder in ("", "run", "scoring", "eeg"):
    for script in sorted(set((HERE / folder).glob("*.py")) - {Path(__file__)}):     # this file comes by itself
        image = image.add_local_file(script, f"/root/{script.relative_to(HERE)}")

# Version 1 for what must last: Modal says of version 2 that it cannot rule out lost data yet.
# Without hard links best.pt is a second copy. The mirror is of the other kind, so that one fault
# does not meet both.
results = modal.Volume.from_name("holdfast-results", create_if_missing=True, version=1)
mirror = modal.Volume.from_name("holdfast-mirror", create_if_missing=True, version=2)
recordings = modal.Volume.from_name("holdfast-data", create_if_missing=True)
app = modal.App("holdfast", image=image)
machine = {"cpu": CPU, "memory": MEMORY * 1024, "single_use_containers": True,
           "retries": modal.Retries(max_retries=RETRIES, initial_delay=0.0),
           "volumes": {RESULTS: results, MIRROR: mirror,
                       DATA: recordings.with_mount_options(read_only=True)}}


@app.function(gpu=GPU, timeout=TIMEOUT * 3600, **machine)
def train(config, launch, resume="false", fresh="false"):
    return attempt(config, launch, resume, fresh, TIMEOUT, GPU)


@app.function(gpu=GPU, timeout=SMOKE_TIMEOUT * 3600, **machine)
def smoke(config, launch, resume="false", fresh="false", planned=None):
    """The acceptance test, on the card of `train`: what it measures holds there."""
    missing = acceptance(config, planned or config)
    verdict = attempt(config, launch, resume, fresh, SMOKE_TIMEOUT, GPU)
    if missing and verdict["status"] == "finished":
        return result("not ready", "; ".join(missing))
    return result("finished", "ready") if verdict["status"] == "finished" else verdict


@app.function(gpu=EVALUATE_GPU, timeout=TIMEOUT * 3600, **machine)
def evaluate(config, split="all"):
    import evaluate as scorer
    reload()
    device = gpu_or_raise(config)
    run = run_directory(config)
    out, options = f"{run}/evaluation", []
    if split != "all":
        out, options = f"{run}/evaluation_{split}", ["--split", split]
    code = scorer.main(["--checkpoint", f"{run}/checkpoints/best.pt",
                        "--data", places(config)[0], "--out", out, "--device", device, *options])
    if code == 1:
        raise RuntimeError("evaluate.py was stopped: its last lines say by what")
    if code:
        return result("refused", "evaluate.py said why")
    if not modal.is_local():
        results.commit()            # before the answer: scores that nobody can fetch are no result
    return result("finished", out)


@app.function(cpu=2, memory=4096, timeout=1800,
              volumes={RESULTS: results.with_mount_options(read_only=True)})
def ls():
    import checkpoint
    reload()
    code = checkpoint.main(["ls", RESULTS])
    from run.listing import find_runs
    for checkpoints in find_runs(RESULTS):
        print(bill(checkpoints.parent))
    return result("refused" if code else "finished")


# ---- one attempt: what one container does for one call ----

def attempt(config, launch, resume, fresh, timeout, gpu):
    """Train, and leave in the way that makes Modal do the right thing next.

    Returns {"status", "why"}: finished, refused, stuck and the run's time limit are results, and
    nothing is tried again. KeyboardInterrupt: the call is scheduled anew and no retry used.
    InputCancellation: the call is over anyway. RuntimeError costs one retry: the hand-over, and
    every fault that another container may not have.

    Only the first attempt of a launch may refuse: what was right then is not wrong later, so that
    a later refusal is a fault that passes (a Volume not mounted, a file that could not be read)."""
    import train as trainer
    reload()                                            # before anything on the Volume is opened
    run = run_directory(config)
    wait_for_predecessor(run)
    begun = any(a["launch"] == launch for a in attempts(run))
    try:
        verdict = decided(run, config, launch, resume)
        if verdict is None:
            verdict = work(trainer, run, config, launch, resume, fresh, timeout, gpu)
    except trainer.Stop as stop:
        if begun or isinstance(stop, trainer.TemporaryFault):
            raise RuntimeError(f"a fault that may pass: {stop}") from None
        verdict = result("refused", str(stop))
    except RuntimeError:
        raise
    except Exception as error:      # one type, which tells another launch that this call has ended
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    print(f"{run.name}: {verdict['status']} {verdict['why']}")
    return verdict


def work(trainer, run, config, launch, resume, fresh, timeout, gpu):
    """Train in this container, with the attempt's record on the Volume from start to end."""
    # done.json knows the run by what was asked for
    asked, config = config, copy.deepcopy(config)
    config["training"]["device"] = gpu_or_raise(config)
    resume = take(trainer, run, launch, resume, fresh)
    last = limit_attempt(config, run, launch, timeout)
    signals = trainer.Signals()
    record = new_record(config, run, launch, gpu)
    publish = Publisher(run, len(attempts(run)) + 1, record, signals)
    publish("the start")
    print(f"attempt {publish.number} in {record['task']}: from step {record['progress'][0]}")
    way = "failed"
    try:
        code = trainer.run(config, resume, on_saved=publish.saved, signals=signals)
        way = LEFT.get(code, "failed")
        if way == "handed over" and last:
            way = "time limit"
    except KeyboardInterrupt:
        way = "preempted"
    except trainer.Refused:
        way = "refused"
        raise
    finally:                                            # a container that just dies has not "left"
        with signals_wait():
            record["left"] = way
            if way == "finished":
                put(run / "done.json", {"launch": launch, "config": asked})
            publish("the end")
    return leave(way)


def take(trainer, run, launch, resume, fresh):
    """How train.py is to begin in the run directory: "true" or "false"."""
    if get(run / "launch.json").get("launch") == launch:
        return "true"                   # resume=false is part of the input and comes again
    if fresh == "true":
        trainer.move_aside(run, print)
    elif resume == "false" and trainer.holds_checkpoints(run / "checkpoints"):
        raise trainer.Refused(
            f"{run} holds checkpoints: --resume true goes on, --fresh true starts over")
    return resume


def new_record(config, run, launch, gpu):
    """What the Volume keeps of one attempt; `left` and `seen` follow."""
    return {
        "launch": launch, "call": modal.current_function_call_id(), "left": "",
        "began": time.time(), "task": os.environ.get("MODAL_TASK_ID", "local"),
        "progress": progress(run), "epochs": config["training"]["epochs"],
        "dollars": hourly(card() or gpu)}


def limit_attempt(config, run, launch, timeout):
    """Set this attempt's time limit: what is left of the run's, at most the platform's less MARGIN.
    Whether the run itself is over when it is reached."""
    whole = config["training"]["time_limit_hours"]
    left = timeout - MARGIN
    over = False
    if whole:
        spent = sum(hours(a) for a in attempts(run) if a["launch"] == launch)
        over = whole - spent <= left
        left = min(left, max(whole - spent, 1e-6))
    config["training"]["time_limit_hours"] = left
    return over


def leave(way):
    """What the platform has to be told."""
    if way == "preempted":
        raise KeyboardInterrupt
    if way == "cancelled":
        raise modal.exception.InputCancellation
    if way == "handed over":
        raise RuntimeError("time limit of this attempt reached, saved: the next one goes on")
    if way == "failed":
        raise RuntimeError("training stopped: its last lines say why")
    if way == "time limit":
        return result(way, "training.time_limit_hours reached, saved: "
                           "--resume true goes on for as long again")
    return result(way)


@contextlib.contextmanager
def signals_wait():
    """A signal that comes meanwhile is answered afterwards: the grace outlasts a commit."""
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            os.kill(os.getpid(), number)


def card():
    """Name of the GPU that this container got, or ""."""
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def gpu_or_raise(config):
    """The device to train on; without a GPU that answers, another container is tried."""
    if config["training"]["device"] == "cpu":
        return "cpu"                                    # asked for in so many words
    if not card():
        raise RuntimeError("no GPU answers in this container: nvidia-smi and torch see none")
    return "cuda"


def result(status, why=""):
    return {"status": status, "why": why}


# ---- what the attempts leave on the Volume ----

def run_directory(config):
    return Path(config["experiment"]["results"], config["experiment"]["name"])


def put(path, value):
    """Write JSON so that a reader, or a commit in the middle, meets the old file or the new one."""
    from eeg.disk import write_json
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def get(path):
    return json.loads(path.read_text()) if path.exists() else {}


def attempts(run):
    return [get(path) for path in sorted((run / "attempts").glob("*.json"))]


def hours(record):
    """Of one attempt, from its start to the last sign of it."""
    return (record["seen"] - record["began"]) / 3600


def reload():
    """See what other containers committed. Modal refuses while this one has a file open there."""
    if not modal.is_local():
        results.reload()


class Publisher:
    """Commits the Volume with the record of this attempt: at start and end, after each save."""

    def __init__(self, run, number, record, signals):
        self.run, self.number, self.record, self.signals = run, number, record, signals
        self.failures = 0

    def saved(self, path):
        """train.py's on_saved hook."""
        self(path.name)
        print(bill(self.run))

    def __call__(self, what):
        began = self.record["seen"] = time.time()
        owner = {"launch": self.record["launch"], "call": self.record["call"]}
        put(self.run / "launch.json", owner)
        put(self.run / "attempts" / f"{self.number:03d}.json", self.record)
        # on the way out the exit commit comes by itself, and the grace is short
        if self.signals.number or self.record["left"] == "preempted":
            return
        try:
            if not modal.is_local():
                results.commit()
        except Exception as error:
            # version 1 commits, reloads, and says that it could not: metrics.jsonl is open
            if "open files" not in str(error):
                self.failures += 1
                print(f"commit of {what} failed ({self.failures} in a row): {error}; "
                      "the next tries again")
                if self.failures >= COMMIT_FAILURES:
                    raise
                return
        self.failures = 0
        print(f"committed {what} in {time.time() - began:.1f} s")


def wait_for_predecessor(run):
    """A preempted container may save and commit after this one began: wait, unless it has left."""
    for pause in (0, GRACE / 3, GRACE / 3, GRACE / 3):
        last = attempts(run)[-1:]
        if not last or last[0]["left"]:
            return
        if not pause:
            print(f"{last[0]['task']} did not say that it left: "
                  f"up to {GRACE} s for what it may still commit")
        time.sleep(pause)
        reload()


def decided(run, config, launch, resume):
    """A result where nothing is to do or there is no sense in trying, else None."""
    done, before, owner = get(run / "done.json"), attempts(run), get(run / "launch.json")
    if done and (done["launch"] == launch or resume == "true" and done["config"] == config):
        return result("finished", "it was already: raise training.epochs to go on")
    if owner and owner["launch"] != launch and still_running(owner["call"], run):
        return result("refused", f"call {owner['call']} works in {run}: stop its app first")
    mine = [a for a in before if a["launch"] == launch]
    spent, limit = sum(map(hours, mine)), config["training"]["time_limit_hours"]
    if limit and spent >= limit:
        return leave("time limit")
    return stuck(before, launch, progress(run))


def stuck(before, launch, reached):
    """A result where STUCK attempts of this launch in a row came no further than `reached`, else
    None.

    A preemption is no attempt's fault. Nor is a death without a word within SHORT minutes, before
    the first snapshot: the machine went; but SHORT_DEATHS of them one after another are something
    that kills."""
    # when an attempt died without a word, only its successor's start tells
    ends = [a["began"] for a in before[1:]] + [time.time()]
    vain = short = 0
    for record, end in zip(before, ends):
        if record["launch"] != launch or record["left"] == "preempted":
            continue
        if record["progress"] != reached:
            vain = short = 0
        elif record["left"] or end - record["began"] > 60 * SHORT:
            vain += 1
        else:
            short += 1
    if vain >= STUCK:
        return result("stuck", f"no progress in {vain} attempts: their logs say why; "
                               "a new launch may try")
    if short >= SHORT_DEATHS:
        return result("stuck", f"{short} containers died without a word, "
                               f"each within {SHORT} minutes")
    return None


# What FunctionCall.get raises of a call that has ended: ours (`attempt` raises nothing else), and
# the platform's.
ENDED = (
    RuntimeError, modal.exception.RemoteError, modal.exception.FunctionTimeoutError,
    modal.exception.OutputExpiredError, modal.exception.NotFoundError,
    modal.exception.InputCancellation)


def still_running(call, run):
    """Whether another launch's call may still write. What cannot be told is refused: two writers
    are worse."""
    import train as trainer
    if call == modal.current_function_call_id():
        return False
    try:
        modal.FunctionCall.from_id(call).get(timeout=0)
    except ENDED as error:
        print(f"the launch before, call {call}, ended with {type(error).__name__}")
    except TimeoutError:
        return True
    except Exception as error:
        raise trainer.Refused(
            f"whether call {call} still works in {run} cannot be told "
            f"({type(error).__name__}: {error}): look with `modal app list`; when it is stopped, "
            f"`modal volume rm holdfast-results /{run.name}/launch.json`") from None
    return False


def progress(run):
    """[step, epoch ended, recordings validated since] of the furthest checkpoint that loads."""
    import checkpoint
    for candidate in checkpoint.candidates(run / "checkpoints"):
        # the resume will name the damaged ones
        with contextlib.suppress(checkpoint.CorruptCheckpoint, OSError):
            state = checkpoint.load(candidate.path)
            validated = len(state.get("validation") or ())
            return [state["global_step"], state.get("kind") == "epoch", validated]
    return [0, False, 0]


# ---- money ----

def hourly(gpu):
    """Dollars an hour for a container with this GPU (of a list, the first), or None where its
    price is unknown.

    gpu: as Modal takes it ("A100-80GB", "H100:2"), or the name by which the driver calls a card."""
    gpu = gpu if isinstance(gpu, str) else gpu[0]
    name, _, count = gpu.partition(":")
    name = name.rstrip("!+")
    found = re.search(r"\b[ABHLT]\d+S?\b", name)
    if name.startswith(("NVIDIA", "Tesla")) and found:  # as the driver calls a card
        name = found[0]
        if name == "A100":
            name += "-40GB" if "40GB" in gpu else "-80GB"
    if name not in DOLLARS:
        return None
    return DOLLARS[name] * int(count or 1) + CPU * DOLLARS["core"] + MEMORY * DOLLARS["GiB"]


def money(dollars, unit=""):
    return "price unknown" if dollars is None else f"about ${dollars:.2f}{unit}"


def bill(run):
    """One line: hours and dollars so far, and of the whole run by the speed in metrics.jsonl."""
    tried = attempts(run)
    prices = [a["dollars"] for a in tried]
    known = None not in prices
    dollars = sum(hours(a) * a["dollars"] for a in tried) if known else None
    line = (f"{run.name}: {sum(map(hours, tried)):.2f} h in {len(tried)} attempts, "
            f"{money(dollars, ' so far')}")
    epoch, seconds = speed(run)
    if not tried or not seconds:
        return line
    left = max(0.0, tried[-1]["epochs"] - epoch) * seconds / 3600
    whole = dollars + left * prices[-1] if known else None
    return (f"{line}; {seconds / 3600:.2f} h per epoch as measured: {left:.1f} h left, "
            f"{money(whole, ' for the whole run')}")


def speed(run):
    """(epochs trained, seconds per epoch with validation), or zeros; medians skip pauses."""
    from eeg.disk import read_json_lines
    path = run / "metrics.jsonl"
    rows = list(read_json_lines(path)) if path.exists() else []
    steps, validations = [], []
    for before, row in zip(rows, rows[1:]):
        seconds, done = row["time"] - before["time"], row["step"] - before["step"]
        if row["kind"] == "validation":
            validations.append(seconds)
        elif done > 0:
            steps.append(seconds / done)
    batches = max((row["batches"] for row in rows if row["kind"] == "train"), default=0)
    if not steps or not batches:
        return 0.0, 0.0
    last = rows[-1]
    epoch = last["epoch"]
    if last["kind"] == "train":
        epoch += last["batch"] / batches - 1
    return epoch, batches * statistics.median(steps) + statistics.median(validations or [0.0])


# ---- acceptance: what a first real run would trip over, measured where it would run ----

def acceptance(config, planned):
    """Print what this platform gives a run, line by line, and what the run `planned` would take
    here. Returns what
    is missing, [] where it is ready."""
    device = gpu_or_raise(config)
    checks = [lambda: check_card(device), lambda: check_volume(Path(RESULTS)),
              lambda: check_commit(planned), lambda: check_speed(planned, device)]
    missing = []
    for check in checks:
        for line, fault in check():
            print(f"smoke: {line}", flush=True)
            if fault:
                missing.append(fault)
    return missing


def check_card(device):
    """The card, its driver beside what torch's CUDA needs, and its speed in bf16."""
    import subprocess
    import torch
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, card {card() or 'none'}", ""
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, text=True, capture_output=True, check=True).stdout.strip()
        needed = DRIVER.get(torch.version.cuda.split(".")[0], 0)
        fault = ""
        if int(driver.split(".")[0]) < needed:
            fault = f"driver {driver} is older than {needed}, which CUDA {torch.version.cuda} needs"
        yield f"driver {driver}, needed {needed}", fault
    teraflops = product_speed(device)
    yield f"bf16 product of {teraflops:.1f} TFLOP/s", ""


def product_speed(device):
    """bf16 TFLOP/s of a square matrix product, the best of five."""
    import torch
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])                            # reading one number waits for all of them
        best = min(best, time.perf_counter() - began)
    return 2 * size ** 3 / best / 1e12


def check_volume(folder):
    """What the results Volume can do. Nothing of it is needed: checkpoint.py has a way for each."""
    import fcntl
    one, two = (folder / f".smoke-{os.getpid()}-{i}" for i in range(2))
    fd = os.open(one, os.O_WRONLY | os.O_CREAT, 0o666)
    steps = {
        "locks": lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "fsync": lambda: os.fsync(fd),
        "hard links": lambda: os.link(one, two),
        "direct writes": lambda: os.close(os.open(one, os.O_WRONLY | os.O_DIRECT))}
    found = []
    for name, step in steps.items():
        try:
            step()
            found.append(f"{name}: yes")
        except OSError as error:
            found.append(f"{name}: no ({error.strerror})")
    os.close(fd)
    one.unlink()
    two.unlink(missing_ok=True)
    yield f"results Volume: {', '.join(found)}", ""


def check_commit(config):
    """A checkpoint of the planned size, written and committed: both must fit into the grace of a
    preemption."""
    import checkpoint
    import model
    import torch
    net = model.build(19, config["model"])
    moments = [torch.zeros_like(p) for p in net.parameters() for _ in range(2)]
    path = Path(RESULTS) / ".smoke.pt"
    began = time.perf_counter()
    checkpoint.atomic_save({"model": net.state_dict(), "moments": moments}, path)
    write = time.perf_counter() - began
    if not modal.is_local():
        results.commit()
    commit = time.perf_counter() - began - write
    size = path.stat().st_size / 1e6
    path.unlink()
    fault = ""
    if write + commit > 25:
        fault = f"save and commit take {write + commit:.0f} s, a preemption leaves 30"
    yield (f"checkpoint of {size:.0f} MB: written in {write:.1f} s, "
           f"committed in {commit:.1f} s"), fault


def check_speed(config, device):
    """Windows/s of the data Volume and of the model; the run's hours and dollars by them."""
    import data
    folders = [place for place in places(config) if Path(place).is_dir()]
    if not folders:
        missing = (f"{places(config)[0]} is not on the data Volume: "
                   "modal volume put holdfast-data IMPORTED_FOLDER")
        yield missing, missing
    read = min((data.speed(place, 10) for place in folders), default=0.0)
    trained = train_speed(config, device)
    yield f"training: {trained:.1f} windows/s at batch {config['training']['batch_size']}", ""
    if not folders:
        return
    yield f"data Volume: {read:.0f} windows/s", ""
    if read < trained:
        yield "the data Volume is slower than the card: set data.copy_to to a folder in /tmp", ""
    windows, epochs = epoch_length(config), config["training"]["epochs"]
    needed = epochs * windows / min(read, trained) / 3600
    price = hourly(card() or GPU)
    whole = money(None if price is None else needed * price)
    yield (f"{windows} windows an epoch, {epochs} epochs: {needed:.0f} h, {whole}, "
           "without validation"), ""


def train_speed(config, device):
    """Windows/s of training steps on random EEG; on a CPU of one step of one window."""
    import torch
    import model
    import train as trainer
    settings = config["training"]
    warm, steps, batch = (3, 10, settings["batch_size"]) if device == "cuda" else (0, 1, 1)
    samples = round(256 * config["data"]["window_seconds"])
    net = model.build(19, config["model"]).to(device)
    optimizer = trainer.make_optimizer(net, settings, device == "cuda")
    x = torch.randn(batch, 19, samples, device=device)
    y, mask = torch.zeros(2, batch, samples, device=device)
    for step in range(warm + steps):
        if step == warm:
            began = time.perf_counter()
        with trainer.autocast(settings["precision"], torch.device(device)):
            logits = net(x)
        loss = trainer.focal_loss(logits, y, mask + 1, settings["focal_alpha"],
                                  settings["focal_gamma"])
        optimizer.zero_grad()
        (loss / y.numel()).backward()
        optimizer.step()
        loss.item()                                     # waits for the step
    return steps * batch / (time.perf_counter() - began)


def epoch_length(config):
    """Windows that an epoch of the planned run trains."""
    import data
    import train as trainer
    recordings = data.open_corpus(config["data"]["path"])
    return len(trainer.Split(config, recordings, print).order(1))


# ---- the launching side ----

@app.local_entrypoint()
def main(action: Literal["train", "evaluate", "smoke", "ls"], config: str = "",
         resume: Literal["true", "false"] = "false", fresh: Literal["true", "false"] = "false",
         split: Literal["all", "train", "dev", "eval"] = "all"):
    if split != "all" and action != "evaluate":
        refuse(f"--split belongs to --action evaluate; what {action} takes is in its config")
    if action == "ls":
        return close(ls.remote())
    name = "smoke.yaml" if action == "smoke" else "train.yaml"
    settings = checked(config or HERE / "configs" / "modal" / name)
    if fresh == resume == "true":
        refuse("--fresh true and --resume true exclude each other")
    if action != "evaluate" and fresh == resume == "false" and stored(settings):
        refuse(f"{run_directory(settings)} holds checkpoints: "
               "--resume true goes on, --fresh true starts over")
    launch = uuid.uuid4().hex[:12]
    if action == "evaluate":
        call = evaluate.spawn(settings, split)
    elif action == "train":
        call = train.spawn(settings, launch, resume, fresh)
    else:
        call = smoke.spawn(settings, launch, resume, fresh, planned(settings))
    guide(call, settings["experiment"]["name"], EVALUATE_GPU if action == "evaluate" else GPU)
    await_result(call)


def await_result(call):
    """Wait for the call and end with its result, which is said only where it is known."""
    try:
        verdict = call.get()
    except ENDED as error:
        print(f"call {call.object_id} ended with {type(error).__name__}: {error}", file=sys.stderr)
        verdict = result("failed", "what it committed is safe; --resume true continues")
    except Exception as error:
        print(f"modal_app.py: no more news of call {call.object_id} "
              f"({type(error).__name__}: {error}). "
              f"Launched with --detach it goes on at Modal: modal app logs {app.app_id} -f",
              file=sys.stderr)
        sys.exit(1)
    close(verdict)


def checked(path):
    """The config as train.py reads it, refused here, at no cost, if it cannot work there."""
    import train as trainer
    try:
        config = trainer.load_config(path)
    except trainer.Stop as stop:
        refuse(stop)
    folder, second = config["experiment"]["results"], config["training"].get("mirror", "")
    if folder != RESULTS:
        refuse(f"config {path}: experiment.results must be {RESULTS}, the Volume, not {folder!r}")
    if second and os.path.relpath(second, MIRROR).startswith(".."):
        refuse(f"config {path}: training.mirror must be a folder in {MIRROR}, the second Volume, "
               f"not {second!r}")
    if config["training"]["device"] == "cpu":
        print(f"config {path}: training.device is cpu: the GPU is paid and stands idle")
    if not config["data"]["synth_hours"]:
        for place in places(config):
            expect_on_volume(path, place)
    return config


def places(config):
    """Folders of imported recordings that a config names."""
    path = config["data"]["path"]
    return [path] if isinstance(path, str) else path


def expect_on_volume(path, place):
    inside = os.path.relpath(place or "/", DATA)
    if inside.startswith(".."):
        refuse(f"config {path}: data.path must be a folder in {DATA}, the Volume, not {place!r}")
    if not listed(recordings, inside):
        refuse(f"{place} is not on the Volume: "
               f"modal volume put holdfast-data IMPORTED_FOLDER /{inside}")


def listed(volume, folder):
    """Names in a folder of a Volume, as committed; none where it does not exist."""
    try:
        return [Path(entry.path).name for entry in volume.listdir(f"/{folder}")]
    except modal.exception.NotFoundError:
        return []


def stored(config):
    """Checkpoints that the run of `config` has on the results Volume."""
    import checkpoint
    names = listed(results, f"{os.path.relpath(run_directory(config), RESULTS)}/checkpoints")
    return [name for name in names if checkpoint.NAME.fullmatch(name) or name == "best.pt"]


def planned(smoke_config):
    """The config whose hours and dollars `smoke` foretells: the real run's, on its device."""
    import train as trainer
    config = trainer.load_config(HERE / "configs" / "modal" / "train.yaml")
    config["training"]["device"] = smoke_config["training"]["device"]
    return config


def refuse(reason):
    print(f"modal_app.py: {reason}", file=sys.stderr)
    sys.exit(2)


def guide(call, name, gpu):
    hour = hourly(gpu)
    day = "" if hour is None else f", ${24 * hour:.0f} a day (prices of {DOLLARS_AS_OF})"
    print(f"call {call.object_id} in app {app.app_id} on {gpu}, {CPU} cores, {MEMORY} GiB\n"
          f"    cost:   {money(hour, ' an hour')}{day}; the log says what the whole run will cost\n"
          f"    follow: modal app logs {app.app_id} -f\n"
          f"    stop:   modal app stop {app.app_id}\n"
          f"    list:   modal run modal_app.py --action ls\n"
          f"    fetch:  modal volume get holdfast-results {name}/checkpoints/best.pt .", flush=True)


def close(verdict):
    """The result in one line and as this command's exit code: 0 finished, 2 refused, 75 time
    limit, 1 others."""
    line = f"modal_app.py: {verdict['status']}"
    if verdict["why"]:
        line += f": {verdict['why']}"
    if verdict["status"] == "finished":
        print(line)
        return
    print(line, file=sys.stderr)
    sys.exit(EXIT.get(verdict["status"], 1))
