"""The same training on Modal, where the machine may vanish at any second.

    modal run modal_app.py --action smoke --fresh           "ready", or what is not
    modal run --detach modal_app.py --action train --config configs/modal/train.yaml --resume
    modal run modal_app.py --action ls                      runs, their state, cost and how to stop
    modal run --detach modal_app.py --action evaluate --config configs/modal/train.yaml --split eval
    modal run --detach modal_app.py --action import --source s3://bucket/folder

--detach lets a run outlive this terminal; --resume, --fresh and --set mean what they mean to
train.py. A preempted or killed container starts again with the same arguments and resumes. Before
the platform's limit of 24 h a run saves and moves to a fresh container by itself. What an attempt
must know of the earlier ones stands in the run directory: run/attempts.py.
"""
import argparse
import contextlib
import copy
import functools
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import modal
from grpclib.exceptions import StreamTerminatedError

from eeg import console
from eeg.disk import Refused, Stop, TemporaryFault, fault
from run.attempts import DATA, FETCHED, MIRROR, RESULTS, TIME_IS_UP, attempts
from run.attempts import bill, billed, card_and_count, get, hourly, hours_of_attempt
from run.attempts import money, next_number, of_launch, progress, put, spent, why_over
from run.config import run_directory, run_folders, true_or_false
from run.watch import answered

GPU = "A100-80GB"                       # "A100-80GB,H100": what is free first; "A100-80GB:8": eight
CPU, MEMORY = 8, 32                     # cores, GiB
EVALUATE_GPU = "L4"                     # scoring is bound by reading, not by the card
TIMEOUT, SMOKE_TIMEOUT = 24, 0.25       # hours per attempt; 24 is the platform's longest
MARGIN = 0.25                           # hours before it at which the run saves and hands over
RETRIES = 10                            # the platform's most: 11 attempts of 24 h, then a hand
RETRY_DELAY = 60.0                      # seconds before each; the platform's longest
SOURCE = "/source"                      # where the bucket of --source is mounted
GRACE = 35                              # s in which a preempted container may still commit
SETTLE = 10                             # s in which another launch's claim would become visible
PATIENCE = 300                          # s for which a Volume that refuses is asked again
UNPUBLISHED = 7200                      # s of failing commits after which a container is given up
SILENCE = 1800                          # s that a Volume may take: its client waits without end
GPU_TRIES = 10                          # times that a container asks its GPU, 2 s apart
COMMIT_EVERY = 60                       # s between the commits of an import

HERE = Path(__file__).parent
BEGAN = time.monotonic()                # of this container: the platform counts from here
OUTCOME = {                             # by train.py's exit codes
    0: "finished", 2: "refused", 75: "handed over", 138: "cancelled",
    129: "preempted", 130: "preempted", 143: "preempted"}
EXIT = {"finished": 0, "refused": 2, "time limit": 75}      # others: 1


# ---- the command line ----

def refuse(reason):
    print(f"modal_app.py: {reason}", file=sys.stderr)
    sys.exit(getattr(reason, "code", 2))                # 1 for a fault that may pass


def options(words):
    """What `modal run modal_app.py` is asked for. Exits with 2 for words that are none."""
    from eeg.layouts import LAYOUTS     # here: a container that trains needs neither
    from eeg.edf import CHANNELS
    parser = argparse.ArgumentParser(prog="modal run modal_app.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--action", required=True, choices=["train", "evaluate", "smoke", "ls", "import"])
    add("--config", default="", metavar="FILE", help="of configs/modal by default")
    add("--resume", nargs="?", const="true", default="false", metavar="true|false|CHECKPOINT",
        type=true_or_false,
        help="a CHECKPOINT is a path on the Volume: /results/NAME/checkpoints/FILE")
    add("--fresh", nargs="?", const="true", default="false", choices=["true", "false"],
        help="move an existing run aside and start over")
    add("--set", action="append", default=[], metavar="section.key=value",
        help="one key over the file's value; may be repeated")
    add("--gpu", default="", metavar="GPU", help=f"as Modal writes it: {GPU}, H100, A100-80GB:8")
    add("--split", default="all", choices=["all", "train", "dev", "eval"],
        help="of --action evaluate")
    add("--source", default="", metavar="FROM", help="of --action import: s3://..., gs://..., "
        f"https://... with SHA256SUMS.txt, or a folder in {DATA} that holds raw EDF")
    add("--secret", default="", metavar="NAME", help="Modal secret with the keys of that bucket")
    add("--layout", default="auto", choices=["auto", *LAYOUTS], help="as data.py import takes it")
    add("--montage", default="referential", choices=[*CHANNELS], help="as data.py import takes it")
    return parser.parse_args(words)


def command_line():
    """(what is asked for, whether the launch is detached), where `modal run` imports this file on
    the launching side; (None, False) elsewhere.

    It is read here, before Modal builds anything: the functions below depend on it, and Modal's own
    options know neither a bare --resume beside --resume FILE nor a list."""
    names = [word.partition("::")[0].rpartition("/")[2] for word in sys.argv]
    if modal.is_local() and {"-m", "run", Path(__file__).stem} <= set(names):
        refuse("start it by its file, modal run modal_app.py: GPU and bucket depend on the words")
    if not modal.is_local() or Path(__file__).name not in names[1:] or "run" not in names:
        return None, False
    here = names.index(Path(__file__).name, 1)
    return options(sys.argv[here + 1:]), bool({"-d", "--detach"} & set(sys.argv[:here]))


ASKED, DETACHED = command_line()


def gpu_of(default):
    """The GPU of --gpu, or the default: a string as Modal takes it, or a list of them."""
    text = ASKED.gpu if ASKED and ASKED.gpu else default
    several = [word.strip() for word in text.split(",")]
    try:
        counts = {card_and_count(word)[1] for word in several}
    except ValueError as error:
        refuse(error)
    if len(counts) > 1:                 # as many processes as the first asks for would be started
        refuse(f"GPU {text!r}: of a list, each with the same number of cards")
    return several[0] if len(several) == 1 else several


# ---- the app ----

def requirements():
    """Packages of the image, read on the launching side: a container has no such file."""
    if not modal.is_local():
        return []
    lines = (HERE / "requirements.txt").read_text().splitlines()
    outside = ("modal", "pytest", "ruff", "mypy")
    return [line.split("#")[0].strip() for line in lines if not line.startswith(outside)]


def bucket():
    """The Volumes' companion for an import: {SOURCE: the bucket of --source}, or {}.

    A container has to define what its launch did, and learns it from its environment."""
    try:
        url = urlsplit(os.environ.get("HOLDFAST_SOURCE", ASKED.source if ASKED else ""))
    except ValueError as error:
        refuse(f"--source {ASKED.source}: {error}")
    if url.scheme not in ("s3", "gs"):
        return {}
    secret = os.environ.get("HOLDFAST_SECRET", ASKED.secret if ASKED else "")
    folder = url.path.strip("/")
    return {SOURCE: modal.CloudBucketMount(
        url.netloc, read_only=True,
        bucket_endpoint_url="https://storage.googleapis.com" if url.scheme == "gs" else None,
        key_prefix=f"{folder}/" if folder else None,
        secret=modal.Secret.from_name(secret) if secret else None)}


# PyPI's torch 2.13 is built for CUDA 13, which needs driver 580 or newer: `smoke` checks both.
# gcc is for training.compile.
image = (modal.Image.debian_slim(python_version="3.11")
         .apt_install("gcc", "libc6-dev")
         .uv_pip_install(*requirements())
         # the data is read-only: HDF5 must not try to lock it
         .env({"PYTHONUNBUFFERED": "1", "HDF5_USE_FILE_LOCKING": "FALSE"}))
if ASKED and ASKED.source:
    image = image.env({"HOLDFAST_SOURCE": ASKED.source, "HOLDFAST_SECRET": ASKED.secret})
for room in ("", "run", "scoring", "eeg"):
    for script in sorted(set((HERE / room).glob("*.py")) - {Path(__file__)}):
        image = image.add_local_file(script, f"/root/{script.relative_to(HERE)}")

# Version 1 for what must last: Modal says of version 2 that it cannot rule out lost data yet.
# Without hard links best.pt is a second copy. The mirror is of the other kind, so that one fault
# does not meet both.
results = modal.Volume.from_name("holdfast-results", create_if_missing=True, version=1)
mirror = modal.Volume.from_name("holdfast-mirror", create_if_missing=True, version=2)
recordings = modal.Volume.from_name("holdfast-data", create_if_missing=True)
app = modal.App("holdfast", image=image)
TRAIN_GPU, SCORE_GPU = gpu_of(GPU), gpu_of(EVALUATE_GPU)
again = functools.partial(modal.Retries, initial_delay=RETRY_DELAY, backoff_coefficient=1.0)
retried = {"single_use_containers": True, "retries": again(max_retries=RETRIES)}
machine = {"cpu": CPU, "memory": MEMORY * 1024, **retried,
           "volumes": {RESULTS: results, MIRROR: mirror,
                       DATA: recordings.with_mount_options(read_only=True)}}


@app.function(gpu=TRAIN_GPU, timeout=TIMEOUT * 3600, **machine)
def train(config, launch, resume="false", fresh="false", gpu=GPU):
    return attempt(config, launch, resume, fresh, TIMEOUT - MARGIN, gpu)


@app.function(gpu=TRAIN_GPU, timeout=int(SMOKE_TIMEOUT * 3600), **machine | {"retries": 0})
def smoke(config, launch, resume="false", fresh="false", planned=None, gpu=GPU):
    """The acceptance test, on the card of `train`: what it measures holds there. Nothing is tried
    again: whatever fails is what is not ready."""
    faults, verdict = [], result("finished", "ready")
    try:
        faults += acceptance(config, planned or config, gpu)
        verdict = attempt(config, launch, resume, fresh, 0.8 * SMOKE_TIMEOUT, gpu)
    except Exception as error:
        faults.append(f"training on synthetic recordings: {error}")
    run = run_directory(config)
    if verdict["status"] != "finished":
        faults.append(f"{verdict['status']}: {verdict['why']}")
    elif any(a["progress"] == progress(run) for a in of_launch(run, launch)[:1]):
        faults.append(f"{run} was finished before and trained nothing: --fresh true")
    if faults:
        return result("refused" if verdict["status"] == "refused" else "not ready",
                      "; ".join(faults))
    return result("finished", "ready")


# scored from the beginning each time: what always fails is paid three times, not eleven
@app.function(gpu=SCORE_GPU, timeout=TIMEOUT * 3600, **machine | {"retries": again(max_retries=2)})
def evaluate(config, split="all"):
    import evaluate as scorer
    from run.prepare import folders
    reload()
    device = gpu_or_raise(config)
    run = run_directory(config)
    out = Path(run, "evaluation" if split == "all" else f"evaluation_{split}")
    chosen = [] if split == "all" else ["--split", split]
    for folder in folders(config):
        place = out / Path(folder).name if len(folders(config)) > 1 else out
        code = scorer.main(["--checkpoint", f"{run}/checkpoints/best.pt", "--data", folder,
                            "--out", str(place), "--device", device, *chosen])
        if code == 1:
            raise RuntimeError("evaluate.py was stopped: its last lines say by what")
        if code:
            return result("refused", "evaluate.py said why")
    # before the answer: scores that nobody can fetch are no result
    persist("commit of the scores", lambda: commit(results))
    return result("finished", str(out))


@app.function(cpu=CPU, memory=MEMORY * 1024, timeout=TIMEOUT * 3600,
              volumes={DATA: recordings, **bucket()}, **retried)
def import_corpus(source, out, layout="auto", montage="referential"):
    """`data.py import` from `source` to `out` on the data Volume, committed every minute: what was
    imported stays, and a container that takes over goes on from there."""
    from run.fetch import import_from
    reload(recordings)
    timer = console.Timer(COMMIT_EVERY)

    def save(what):
        if timer.due():
            # what a container cannot publish it would import in vain
            persist(f"commit after {what}", lambda: commit(recordings))
            print(f"committed after {what}", flush=True)

    try:
        refused = import_from(source, out, str(Path(FETCHED, os.path.relpath(out, DATA))), save,
                              layout=layout, montage=montage, workers=CPU)
    except TemporaryFault as error:
        raise RuntimeError(f"a fault that may pass: {error}") from None
    except Stop as stop:                                # not KeyboardInterrupt: that is no result
        return result("refused", str(stop))
    persist("commit of the recordings", lambda: commit(recordings))
    if refused:
        return result("incomplete", f"{refused} files were refused, see above; the others are in "
                                    f"{out}")
    return result("finished", out)


@app.function(cpu=2, memory=4096, timeout=1800,
              volumes={RESULTS: results.with_mount_options(read_only=True)})
def ls():
    import checkpoint
    reload()
    code = checkpoint.main(["ls", RESULTS])
    for folder in sorted(Path(RESULTS).glob("*/attempts")):
        with tolerated(f"bill of {folder.parent.name}"):        # the others are listed
            print(bill(folder.parent))
            print(f"    {standing(folder.parent)}")
    return result("refused" if code == 2 else "finished")       # 1: no checkpoints yet


def standing(run):
    """Call, app and state of a run, its dollars, and the command that stops it."""
    tried = attempts(run)
    for owner in (get(run / "launch.json"), *tried[-1:]):   # who only claimed it left no record
        state = state_of(owner, run)
        if state != "ended":
            break
    if state == "ended" and tried:
        copied = owner.get("run", run.name) != run.name
        silent = f"copied from {owner['run']}" if copied else "died without a word"
        left = owner["left"] or silent
        state = left if left == "finished" else f"ended ({left})"
    line = f"call {owner.get('call')}, app {owner.get('app', '?')}: {state}, {money(spent(tried))}"
    return f"{line}; stop: modal app stop {owner.get('app')}" if state == "working" else line


# ---- one attempt: what one container does for one call ----

def attempt(config, launch, resume, fresh, longest, gpu):
    """Train for at most `longest` hours, and leave in the way that makes Modal do the right thing
    next.

    Returns {"status", "why"}: finished, refused, stuck and the run's time limit are results, and
    nothing is tried again. KeyboardInterrupt: the call is scheduled anew and no retry used.
    InputCancellation: the call is over anyway. RuntimeError costs one retry: the hand-over, and
    every fault that another container may not have. Nothing else is raised.

    Only the first attempt of a launch may refuse: what was right then is not wrong later, so that
    a later refusal is a fault that passes (a Volume not mounted, a file that could not be read)."""
    run, begun = run_directory(config), False
    try:
        reload()                                        # before anything on the Volume is opened
        wait_for_predecessor(run)
        begun = bool(of_launch(run, launch))
        over = why_over(run, launch, config["training"]["time_limit_hours"])
        verdict = result(*over) if over else work(run, config, launch, resume, fresh, longest, gpu)
    except Stop as stop:
        if begun or isinstance(stop, TemporaryFault):
            raise RuntimeError(f"a fault that may pass: {stop}") from None
        verdict = result("refused", str(stop))
    except RuntimeError:
        raise
    except OSError as error:        # one type, which tells another launch that this call has ended
        raise RuntimeError(str(fault(error, run, "what was committed stays"))) from error
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    print(f"{run.name}: {verdict['status']} {verdict['why']}")
    return verdict


def work(run, config, launch, resume, fresh, longest, gpu):
    """Train in this container, with the attempt's record on the Volume from start to end."""
    import train as trainer
    config = copy.deepcopy(config)
    config["training"]["device"] = gpu_or_raise(config, gpu)
    before = of_launch(run, launch)
    if fresh == "true" and not before:
        trainer.check(config, print)    # refused while the old run stands
    # all that takes long is done: the record follows before another launch looks again
    claim(run, launch)
    resume = take(trainer, config, before, resume, fresh)
    longest -= (time.monotonic() - BEGAN) // 60 / 60    # a Volume may have kept it waiting
    limit, last = hours_of_attempt(run, launch, config["training"]["time_limit_hours"], longest)
    config["training"]["time_limit_hours"] = limit
    signals = trainer.Signals()
    record = new_record(config, run, launch, gpu)
    publish = Publisher(run, next_number(run), record, signals, config)
    publish.begin()
    print(f"attempt {publish.number} in {record['task']}: from step {record['progress'][0]}")
    way = "failed"
    try:
        code = trained(trainer, config, gpu, resume, publish, signals)
        way = OUTCOME.get(code, "failed")
        if way == "handed over" and last:
            way = "time limit"
    except KeyboardInterrupt:
        way = "preempted"
    except modal.exception.InputCancellation:
        way = "cancelled"
    except Refused:
        way = "refused"
        raise
    finally:                                            # a container that just dies has not "left"
        # the grace outlasts a commit
        with console.signals_wait(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            record["left"] = way
            publish.end(way)
    return end_call(way)


def trained(trainer, config, gpu, resume, publish, signals):
    """The exit code of train.py, on one card or on all that were asked for."""
    count = card_and_count(billed(gpu))[1]
    if count == 1:
        return trainer.run(config, resume, on_saved=publish.saved, signals=signals)
    from run.elastic import train_on
    return train_on(count, config, resume, publish.saved, signals)


def claim(run, launch):
    """Make this launch the owner of the run. Raises Refused where another one's call works there.

    A Volume knows no lock. Of two launches that begin at once both write their claim, wait until
    the other's would be visible, and look again: the last one stands, and whoever was slower than
    that meets the record of an attempt."""
    owner, before = run / "launch.json", attempts(run)
    if get(owner).get("launch") == launch:
        return
    if owner.exists():                  # else a person has removed it, who knows
        expect_alone(run, launch, [get(owner), *before[-1:]])
    put(owner, claimed(run, launch) | {"first": next_number(run)})
    persist("commit of the claim", lambda: commit(results))
    time.sleep(SETTLE)
    reload()
    expect_alone(run, launch, [get(owner), *(a for a in attempts(run) if a not in before)])


def claimed(run, launch):
    return {"run": run.name, "launch": launch, "call": modal.current_function_call_id(),
            "app": app.app_id}


def expect_alone(run, launch, others):
    """Refuse while the call of another launch, which left one of these records, may still write
    here. What cannot be told is refused too: two writers are worse."""
    for record in others:
        call = record.get("call")
        if call == modal.current_function_call_id() or record.get("launch") == launch:
            continue
        state = state_of(record, run)
        if state == "working":
            raise Refused(f"call {call} works in {run}: stop its app first "
                          f"(modal app stop {record.get('app', 'APP')})")
        if state != "ended":
            raise Refused(
                f"whether call {call} still works in {run} {state}: look with `modal app list`; "
                f"when it is stopped, `modal volume rm holdfast-results /{run.name}/launch.json`")


def take(trainer, config, before, resume, fresh):
    """How train.py is to begin in the run directory: what its --resume takes. before: the attempts
    of this launch.

    The arguments are part of the input and come again with every attempt: a fresh start happens
    once, and a file is gone back to until this launch has saved."""
    if any(a.get("saved") for a in before) or before and resume in ("true", "false"):
        return "true"
    folders = run_folders(config)
    if resume == fresh == "false":      # nothing is started over checkpoints, in either place
        for folder in folders:
            if trainer.holds_checkpoints(folder / "checkpoints"):
                raise Refused(f"{folder} holds checkpoints: "
                              "--resume true goes on, --fresh true starts over")
    elif fresh == "true":
        # a claim alone is no run that would have to be kept
        held = [f for f in folders if f.is_dir() and set(os.listdir(f)) - {"launch.json"}]
        if held:
            trainer.move_aside(held[0], print, *held[1:])
        if folders[1:]:
            # first: an old second copy beside a new run would be resumed
            persist("commit of the mirror", lambda: commit(mirror))
    return resume


def new_record(config, run, launch, gpu):
    """What the Volume keeps of one attempt; `left`, `saved` and `seen` follow."""
    name, dollars = paid(gpu)
    # moved aside, the run has neither attempts nor a claim: this one is the first
    first = get(run / "launch.json").get("first", 1)
    return claimed(run, launch) | {
        "first": first, "left": "", "saved": "", "gpu": name or "unknown",
        # of the container, which is paid from there on, with what it waited for
        "began": time.time() - (time.monotonic() - BEGAN),
        "task": os.environ.get("MODAL_TASK_ID", "local"),
        "progress": progress(run), "epochs": config["training"]["epochs"], "dollars": dollars}


def paid(gpu):
    """(which of the GPUs that were asked for came, dollars an hour); ("", None): not known."""
    name = billed(gpu, card())
    return name, hourly(name, CPU, MEMORY) if name else None


def end_call(way):
    """What the platform has to be told."""
    raised = {
        "preempted": KeyboardInterrupt(), "cancelled": modal.exception.InputCancellation(),
        "refused": Refused("train.py said why"),
        "handed over": RuntimeError("time limit of this attempt reached, saved: the next one goes "
                                    "on"),
        "failed": RuntimeError("training stopped: its last lines say why")}
    if way in raised:
        raise raised[way]
    return result(way, TIME_IS_UP if way == "time limit" else "")


def card():
    """Name of the GPU that this container got, or ""."""
    import torch
    # asks the driver each time; is_available keeps the first answer of a process
    return torch.cuda.get_device_name() if torch.cuda.device_count() else ""


def gpu_or_raise(config, gpu=""):
    """The device to train on; without the GPUs that were asked for another container is tried.

    A card may refuse the first calls: it is asked several times before a container is given up."""
    if config["training"]["device"] == "cpu":
        return "cpu"                                    # asked for in so many words
    wanted = card_and_count(billed(gpu))[1] if gpu else 1
    for _ in range(GPU_TRIES):
        with contextlib.suppress(RuntimeError):
            if card():
                break
        time.sleep(2)
    else:
        raise RuntimeError("no GPU answers in this container: nvidia-smi and torch see none")
    if wanted > 1:
        import torch
        found = torch.cuda.device_count()
        if found < wanted:
            raise RuntimeError(f"{found} GPUs answer in this container, {wanted} are paid")
    return "cuda"


def result(status, why=""):
    return {"status": status, "why": why}


def acceptance(config, planned, gpu):
    """Faults of this machine and of the run `planned`, measured and printed line by line."""
    import train as trainer
    from run.acceptance import checks, report
    from run.machine import prepare_torch
    device, count = gpu_or_raise(config, gpu), card_and_count(billed(gpu))[1]
    for settings in (config, planned):  # training.deterministic takes hold before the first product
        prepare_torch(settings, argparse.Namespace(rank=0))
    found = checks(planned, device, count, paid(gpu)[1], Path(RESULTS), lambda: commit(results),
                   trainer)
    return report(found, lambda line: print(f"smoke: {line}", flush=True))


# ---- the Volumes ----

def reload(volume=None):
    """See what other containers committed. Modal refuses while this one has a file open there."""
    if not modal.is_local():
        persist("reload of the Volume", lambda: answered(SILENCE, (volume or results).reload))


def commit(volume):
    """Publish what this container wrote. Raises what Modal raises."""
    if modal.is_local():
        return
    try:
        answered(SILENCE, volume.commit)
    except Exception as error:
        # version 1 commits, reloads, and says that it could not: metrics.jsonl is open
        if "open files" not in str(error):
            raise


def persist(what, do):
    """do(), asked again for PATIENCE seconds. Raises RuntimeError where that is not enough."""
    deadline, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return do()
        except Exception as error:
            print(f"{what} failed: {type(error).__name__}: {error}", flush=True)
            if time.monotonic() + pause > deadline:
                raise RuntimeError(f"{what} failed for {PATIENCE} s: {error}") from None
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


@contextlib.contextmanager
def tolerated(what):
    """A failure is said and survived: the next save tries again."""
    try:
        yield
    except Exception as error:
        print(f"{what} failed: {type(error).__name__}: {error}", flush=True)


class Publisher:
    """Commits the Volumes with the record of this attempt: at start and end, after each save. A
    commit that fails ends nothing before UNPUBLISHED, nor does a record that a full Volume does not
    take."""

    def __init__(self, run, number, record, signals, config):
        self.run, self.number, self.record, self.signals = run, number, record, signals
        self.mirrored = bool(config["training"].get("mirror"))
        self.failures, self.good = 0, time.monotonic()

    def saved(self, path):
        """train.py's on_saved hook. Raises RuntimeError where a day would be paid that may be
        lost with this container: the mount of another one may be well."""
        self.record["saved"] = path.name
        self(path.name)
        with tolerated("bill"):
            print(bill(self.run))
        silent = time.monotonic() - self.good
        if self.failures >= 3 and silent > UNPUBLISHED and not self.signals.number:
            raise RuntimeError(f"commits failed for {silent / 60:.0f} minutes: the next container "
                               "goes on from the last good one")

    def write(self):
        self.record["seen"] = time.time()
        owner = {key: self.record[key] for key in ("run", "launch", "call", "app", "first")}
        put(self.run / "launch.json", owner)
        put(self.run / "attempts" / f"{self.number:03d}.json", self.record)

    def begin(self):
        """The first word of this attempt, without which a replay would begin anew, and another
        launch train beside this one. Raises where it cannot be published."""
        self.write()
        self("the start")
        if self.failures:
            persist("commit of the start", lambda: commit(results))

    def __call__(self, what):
        with tolerated(f"record of {what}"):
            self.write()
        # on the way out the exit commit comes by itself, and the grace is short
        if self.signals.number:
            return
        began = time.monotonic()
        try:
            commit(results)
        except Exception as error:
            self.failures += 1
            print(f"commit of {what} failed ({self.failures} in a row): {error}; the last good one "
                  f"is {time.monotonic() - self.good:.0f} s old; the next save tries again")
        else:
            self.failures, self.good = 0, time.monotonic()
            print(f"committed {what} in {self.good - began:.1f} s")
        if self.mirrored:
            with tolerated(f"commit of the mirror after {what}"):
                commit(mirror)

    def end(self, way):
        """The last word of this attempt. Raises RuntimeError where what a result or the next
        attempt relies on cannot be published."""
        if way in ("preempted", "cancelled"):           # the exit commit comes by itself
            with tolerated("record of the end"):
                self.write()
            return
        self("the end")
        unpublished = self.failures or self.signals.number
        if unpublished and way in ("finished", "time limit", "handed over"):
            persist("commit of the end", lambda: commit(results))


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


# What FunctionCall.get raises where no answer came: whether the call goes on is not known. All
# else is the end of the call: what `attempt` raises, and the platform's own failures.
NO_ANSWER = (
    OSError, modal.exception.ConnectionError, modal.exception.AuthError,
    modal.exception.ClientClosed, modal.exception.PermissionDeniedError,
    modal.exception.ServiceError, modal.exception.InternalError,
    modal.exception.ResourceExhaustedError, modal.exception.UnimplementedError,
    modal.exception.ConflictError, modal.exception.DataLossError, StreamTerminatedError)


def state_of(record, run):
    """call_state() of the call that left a record there. In a copy of a run's folder it has ended:
    its call is the original's, and stopping it would stop that."""
    return call_state(record.get("call")) if record.get("run", run.name) == run.name else "ended"


def call_state(call):
    """"working", "ended", or why that cannot be told."""
    if not call:
        return "ended"
    try:
        modal.FunctionCall.from_id(call).get(timeout=0)
    except TimeoutError:
        return "working"
    except NO_ANSWER as error:
        return f"cannot be told ({type(error).__name__}: {error})"
    except (Exception, modal.exception.InputCancellation) as error:
        print(f"call {call} ended with {type(error).__name__}: {error}")
    return "ended"


# ---- the launching side ----

@app.local_entrypoint()
def main(*words):
    """See --help: the words are those that `command_line` has read."""
    asked = options(words)
    try:
        if asked.action == "ls":
            close(ls.remote())
        else:
            await_result(launched(asked))
    except Stop as stop:
        refuse(stop)
    except (RuntimeError, OSError, modal.exception.Error) as error:
        print(f"modal_app.py: {type(error).__name__}: {error}; whether a call began: "
              "modal app list", file=sys.stderr)
        sys.exit(1)


def launched(asked):
    """The call that was asked for, with what it costs and how to follow and stop it said."""
    from run.launch import guide
    settings = checked(asked)
    plan = planned(settings, asked.set) if asked.action == "smoke" else None
    launch = uuid.uuid4().hex[:12]
    tell(asked)
    if asked.action == "import":
        from run.prepare import folders
        source = SOURCE if urlsplit(asked.source).scheme in ("s3", "gs") else asked.source
        call = import_corpus.spawn(source, folders(settings)[0], asked.layout, asked.montage)
    elif asked.action == "evaluate":
        call = evaluate.spawn(settings, asked.split)
    elif asked.action == "train":
        call = train.spawn(settings, launch, asked.resume, asked.fresh, TRAIN_GPU)
    else:
        call = smoke.spawn(settings, launch, asked.resume, asked.fresh, plan, TRAIN_GPU)
    guide(call.object_id, app.app_id, settings["experiment"]["name"])
    return call


def await_result(call):
    """Wait for the call and end with its result, which is said only where it is known."""
    try:
        verdict = call.get()
    except NO_ANSWER as error:
        print(f"modal_app.py: no more news of call {call.object_id} "
              f"({type(error).__name__}: {error}). "
              f"Launched with --detach it goes on at Modal: modal app logs {app.app_id} -f",
              file=sys.stderr)
        sys.exit(1)
    except (Exception, modal.exception.InputCancellation) as error:
        print(f"call {call.object_id} ended with {type(error).__name__}: {error}", file=sys.stderr)
        verdict = result("failed", "what it committed is safe; the same command goes on, that of a "
                                   "training with --resume")
    close(verdict)


def checked(asked):
    """The config as train.py reads it, refused here, at no cost, if it cannot work there."""
    import train as trainer
    from run.launch import checked as checked_for
    name = "smoke.yaml" if asked.action == "smoke" else "train.yaml"
    path = asked.config or HERE / "configs" / "modal" / name
    config = checked_for(trainer.load_config(path, asked.set), path, asked, listing, text)
    if config["training"]["device"] == "cpu":
        print(f"config {path}: training.device is cpu: the GPU is paid and stands idle")
    return config


def listing(path, recursive=False):
    """Names in a folder of a Volume, as committed, those of folders with a slash at their end; none
    where it does not exist."""
    ends = {modal.volume.FileEntryType.DIRECTORY: "/"}
    for volume, place in placed(path):
        with contextlib.suppress(modal.exception.NotFoundError):
            return [Path(entry.path).name + ends.get(entry.type, "")
                    for entry in volume.listdir(place, recursive=recursive)]
    return []


def text(path):
    """A file of a Volume, as committed; "" where it cannot be read now: a container will."""
    for volume, place in placed(path):
        with contextlib.suppress(modal.exception.Error, OSError):
            return b"".join(volume.read_file(place)).decode(errors="replace")
    return ""


def placed(path):
    """The Volume on which a path lies, with its place there."""
    for mount, volume in {RESULTS: results, DATA: recordings, MIRROR: mirror}.items():
        inside = os.path.relpath(path, mount)
        if not inside.startswith(".."):
            yield volume, str(Path("/", inside))        # of the root "/", as Modal writes it


def planned(smoke_config, overrides=()):
    """The config whose hours and dollars `smoke` foretells: the real run's, on its device, with
    what was --set."""
    import train as trainer
    config = trainer.load_config(HERE / "configs" / "modal" / "train.yaml", overrides)
    config["training"]["device"] = smoke_config["training"]["device"]
    return config


def tell(asked):
    """What the call will cost and what ends it, before it starts."""
    from run.launch import foretell
    gpu = {"import": "", "evaluate": SCORE_GPU}.get(asked.action, TRAIN_GPU)
    foretell(gpu, CPU, MEMORY, SMOKE_TIMEOUT if asked.action == "smoke" else 0, DETACHED)


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


if __name__ == "__main__":
    print("modal_app.py: Modal starts it: modal run modal_app.py --help", file=sys.stderr)
    sys.exit(2)
