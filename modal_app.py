"""The same training on Modal, where the machine may vanish at any second.

    modal run modal_app.py --action smoke --fresh true      a cheap GPU, some minutes, synthetic recordings
    modal run --detach modal_app.py --action train --config configs/modal/train.yaml --resume true
    modal run modal_app.py --action ls                      every run on the results Volume, and what it cost
    modal run --detach modal_app.py --action evaluate --config configs/modal/train.yaml --split eval

--detach lets a run outlive this terminal; --resume and --fresh mean what they mean to train.py. A preempted
or killed container starts again with the same arguments and resumes. Before the platform's limit of 24 h a
run saves and moves to a fresh container by itself. What an attempt must know of the earlier ones stands in
the run directory:

    launch.json          the launch that owns the run
    attempts/NNN.json    one container each: where it began, when it last saved, how it left
    done.json            written last
"""
import contextlib
import json
import os
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Literal

import modal

GPU, CPU, MEMORY = "A100-80GB", 8, 32       # cores, GiB; ["A100-80GB", "H100"] finds room sooner
SMOKE_GPU = "L4"                            # for smoke and evaluate
TIMEOUT, SMOKE_TIMEOUT = 24, 1              # hours per attempt; 24 is the platform's longest
MARGIN = 0.25                               # hours before it at which the run saves and hands over
RETRIES = 10                                # the platform's most: 11 attempts of 24 h before a hand is needed
RESULTS, DATA = "/results", "/data"         # where the Volumes are mounted
GRACE = 35                                  # seconds in which a preempted container may still commit
STUCK = 3                                   # attempts without progress end a run
COMMIT_FAILURES = 5                         # in a row; what is not committed dies with its container
DOLLARS = {"A100-80GB": 2.50, "L4": 0.80, "core": 0.047, "GiB": 0.008}      # an hour
DOLLARS_AS_OF = "October 2026"              # modal.com/pricing; a fixed region multiplies them

HERE = Path(__file__).parent
LEFT = {0: "finished", 2: "refused", 75: "handed over", 138: "cancelled",       # train.py's exit codes
        129: "preempted", 130: "preempted", 143: "preempted"}


def requirements():
    """Packages of the image. Read on the launching side: a container has no such file, and its own modal."""
    if not modal.is_local():
        return []
    lines = (HERE / "requirements.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if not line.startswith(("modal", "pytest"))]


image = (modal.Image.debian_slim(python_version="3.11")
         .uv_pip_install(*requirements())
         .env({"PYTHONUNBUFFERED": "1", "HDF5_USE_FILE_LOCKING": "FALSE"}))     # the data is read-only
for script in sorted(set(HERE.glob("*.py")) - {Path(__file__)}):                # this file comes by itself
    image = image.add_local_file(script, f"/root/{script.name}")

# Version 2 has hard links and commits while files are open; version 1 works too, with best.pt as a copy.
results = modal.Volume.from_name("holdfast-results", create_if_missing=True, version=2)
recordings = modal.Volume.from_name("holdfast-data", create_if_missing=True)
app = modal.App("holdfast", image=image)
machine = {"cpu": CPU, "memory": MEMORY * 1024, "single_use_containers": True,
           "retries": modal.Retries(max_retries=RETRIES, initial_delay=0.0),
           "volumes": {RESULTS: results, DATA: recordings.with_mount_options(read_only=True)}}


@app.function(gpu=GPU, timeout=TIMEOUT * 3600, **machine)
def train(config, launch, resume="false", fresh="false"):
    return attempt(config, launch, resume, fresh, TIMEOUT, hourly(GPU))


@app.function(gpu=SMOKE_GPU, timeout=SMOKE_TIMEOUT * 3600, **machine)
def smoke(config, launch, resume="false", fresh="false"):
    return attempt(config, launch, resume, fresh, SMOKE_TIMEOUT, hourly(SMOKE_GPU))


@app.function(gpu=SMOKE_GPU, timeout=TIMEOUT * 3600, **machine)
def evaluate(config, split="all"):
    import evaluate as scorer
    reload()
    run = run_directory(config)
    options = [] if split == "all" else ["--split", split]
    code = scorer.main(["--checkpoint", f"{run}/checkpoints/best.pt", "--data", config["data"]["path"],
                        "--out", f"{run}/evaluation", *options])
    return result("refused", "evaluate.py said why") if code else result("finished", f"{run}/evaluation")


@app.function(cpu=2, memory=4096, timeout=1800, volumes={RESULTS: results.with_mount_options(read_only=True)})
def ls():
    import checkpoint
    reload()
    code = checkpoint.main(["ls", RESULTS])
    for checkpoints in checkpoint.find_runs(RESULTS):
        print(bill(checkpoints.parent))
    return result("refused" if code else "finished")


# ---- one attempt: what one container does for one call ----

def attempt(config, launch, resume, fresh, timeout, dollars):
    """Train, and leave in the way that makes Modal do the right thing next. Returns {"status", "why"}.

    Finished, refused and stuck are results: nothing is tried again. KeyboardInterrupt: the call is scheduled
    anew and no retry used. InputCancellation: the call is over anyway. Any other exception costs one retry,
    the hand-over among them."""
    import train as trainer
    limit = config["training"]["time_limit_hours"] or timeout
    config["training"]["time_limit_hours"] = min(limit, timeout - MARGIN)
    reload()                                            # before anything on the Volume is opened
    run = run_directory(config)
    wait_for_predecessor(run)
    try:
        verdict = decided(run, config, launch, resume) or \
            work(trainer, run, config, launch, resume, fresh, dollars)
    except trainer.Refused as refusal:
        verdict = result("refused", str(refusal))
    print(f"{run.name}: {verdict['status']} {verdict['why']}")
    return verdict


def work(trainer, run, config, launch, resume, fresh, dollars):
    if get(run / "launch.json").get("launch") == launch:
        resume = "true"                                 # resume=false is part of the input and comes again
    elif fresh == "true":
        trainer.move_aside(run, print)
    elif resume == "false" and trainer.holds_checkpoints(run / "checkpoints"):
        raise trainer.Refused(f"{run} holds checkpoints: --resume true goes on, --fresh true starts over")
    record = {"launch": launch, "call": modal.current_function_call_id(), "left": "", "began": time.time(),
              "task": os.environ.get("MODAL_TASK_ID", "local"), "progress": progress(run),
              "epochs": config["training"]["epochs"], "dollars": dollars}
    publish = Publisher(run, len(attempts(run)) + 1, record)
    publish("the start")
    print(f"attempt {publish.number} in {record['task']}: from step {record['progress'][0]}")
    way = "failed"
    try:
        way = LEFT.get(trainer.run(config, resume, on_saved=publish.saved), "failed")
    except KeyboardInterrupt:
        way = "preempted"
    except trainer.Refused:
        way = "refused"
        raise
    finally:                                            # a container that just dies has not "left"
        record["left"] = way
        if way == "finished":
            put(run / "done.json", {"launch": launch, "config": config})
        publish("the end")
    return leave(way)


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
    return result(way)


def result(status, why=""):
    return {"status": status, "why": why}


# ---- what the attempts leave on the Volume ----

def run_directory(config):
    return Path(config["experiment"]["results"], config["experiment"]["name"])


def put(path, value):
    """Write JSON so that a reader, or a commit in the middle, meets the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    with open(temp, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


def get(path):
    return json.loads(path.read_text()) if path.exists() else {}


def attempts(run):
    return [get(path) for path in sorted((run / "attempts").glob("*.json"))]


def reload():
    """See what other containers committed. Modal refuses while this one has a file open there."""
    if not modal.is_local():
        results.reload()


class Publisher:
    """Commits the Volume with the record of this attempt: at its start, after each save, at its end."""

    def __init__(self, run, number, record):
        self.run, self.number, self.record, self.failures = run, number, record, 0

    def saved(self, path):
        """train.py's on_saved hook."""
        self(path.name)
        print(bill(self.run))

    def __call__(self, what):
        began = self.record["seen"] = time.time()
        put(self.run / "launch.json", {"launch": self.record["launch"], "call": self.record["call"]})
        put(self.run / "attempts" / f"{self.number:03d}.json", self.record)
        try:
            if not modal.is_local() and self.record["left"] != "preempted":     # the exit commit comes next
                results.commit()
        except Exception as error:
            if "open files" not in str(error):      # version 1, after the commit: a reload was refused
                self.failures += 1
                print(f"commit of {what} failed ({self.failures} in a row): {error}; the next tries again")
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
            print(f"{last[0]['task']} did not say that it left: up to {GRACE} s for what it may still commit")
        time.sleep(pause)
        reload()


def decided(run, config, launch, resume):
    """A result where nothing is to do or there is no sense in trying, else None."""
    done, before = get(run / "done.json"), attempts(run)
    if done and (done["launch"] == launch or resume == "true" and done["config"] == config):
        return result("finished", "it was already: raise training.epochs to go on")
    if before and before[-1]["launch"] != launch and still_running(before[-1]["call"]):
        return result("refused", f"call {before[-1]['call']} works in {run}: stop its app first")
    tried = [a["progress"] for a in before if a["launch"] == launch and a["left"] != "preempted"][-STUCK:]
    if len(tried) == STUCK and tried == [progress(run)] * STUCK:
        return result("stuck", f"no progress in {STUCK} attempts: their logs say why; a new launch may try")
    return None


def still_running(call):
    """Whether another launch's call may still write. One that failed, expired or is unknown does not."""
    if call == modal.current_function_call_id():
        return False
    try:
        modal.FunctionCall.from_id(call).get(timeout=0)
    except TimeoutError:
        return True
    except Exception as error:
        print(f"the launch before, call {call}, ended with {type(error).__name__}")
    return False


def progress(run):
    """[global step, epoch ended, recordings validated since] of the furthest checkpoint that loads."""
    import checkpoint
    for candidate in checkpoint.candidates(run / "checkpoints"):
        with contextlib.suppress(checkpoint.CorruptCheckpoint, OSError):        # the resume will name them
            state = checkpoint.load(candidate.path)
            return [state["global_step"], state.get("kind") == "epoch", len(state.get("validation") or ())]
    return [0, False, 0]


# ---- money ----

def hourly(gpu):
    """Dollars an hour for a container with this GPU, or the first of a list."""
    gpu = gpu if isinstance(gpu, str) else gpu[0]
    return DOLLARS[gpu] + CPU * DOLLARS["core"] + MEMORY * DOLLARS["GiB"]


def bill(run):
    """One line: hours and dollars so far, and of the whole run by the speed in metrics.jsonl."""
    tried = attempts(run)
    hours = [(a["seen"] - a["began"]) / 3600 for a in tried]
    dollars = sum(h * a["dollars"] for h, a in zip(hours, tried))
    line = f"{run.name}: {sum(hours):.2f} h in {len(tried)} attempts, about ${dollars:.2f} so far"
    epoch, seconds = speed(run)
    if not tried or not seconds:
        return line
    left = max(0.0, tried[-1]["epochs"] - epoch) * seconds / 3600
    return (f"{line}; {seconds / 3600:.2f} h per epoch as measured: {left:.1f} h left, "
            f"about ${dollars + left * tried[-1]['dollars']:.2f} for the whole run")


def speed(run):
    """(epochs trained, seconds per epoch with validation) by medians, which skip pauses; or zeros."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):           # the last line may be half written
            rows.append(json.loads(line))
    pairs = [(b["kind"], b["time"] - a["time"], b["step"] - a["step"]) for a, b in zip(rows, rows[1:])]
    steps = [seconds / done for kind, seconds, done in pairs if kind == "train" and done > 0]
    validations = [seconds for kind, seconds, _ in pairs if kind == "validation"] or [0.0]
    known = [row.get("batches") or row["batch"] * any(validations) for row in rows if row["kind"] == "train"]
    batches = max(known, default=0)
    if not steps or not batches:
        return 0.0, 0.0
    last = rows[-1]
    epoch = last["epoch"] if last["kind"] == "validation" else last["epoch"] - 1 + last["batch"] / batches
    return epoch, batches * statistics.median(steps) + statistics.median(validations)


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
    arguments = (settings, split) if action == "evaluate" else (settings, uuid.uuid4().hex[:12], resume, fresh)
    call = {"train": train, "evaluate": evaluate, "smoke": smoke}[action].spawn(*arguments)
    guide(call, settings["experiment"]["name"], GPU if action == "train" else SMOKE_GPU)
    try:
        close(call.get())
    except Exception as error:
        print(f"call {call.object_id} ended with {type(error).__name__}: {error}", file=sys.stderr)
        close(result("failed", "what it committed is safe; --resume true continues"))


def checked(path):
    """The config as train.py reads it, refused here, where that costs nothing, if it cannot work there."""
    import train as trainer
    try:
        config = trainer.load_config(path)
    except trainer.Refused as refusal:
        refuse(refusal)
    folder, place = config["experiment"]["results"], config["data"]["path"]
    if folder != RESULTS:
        refuse(f"config {path}: experiment.results must be {RESULTS}, the Volume, not {folder!r}")
    if not config["data"]["synth_hours"]:
        inside = os.path.relpath(place or "/", DATA)
        if inside.startswith(".."):
            refuse(f"config {path}: data.path must be a folder in {DATA}, the Volume, not {place!r}")
        try:
            found = recordings.listdir(f"/{inside}")
        except modal.exception.NotFoundError:
            found = []
        if not found:
            refuse(f"{place} is not on the Volume: modal volume put holdfast-data IMPORTED_FOLDER /{inside}")
    return config


def refuse(reason):
    print(f"modal_app.py: {reason}", file=sys.stderr)
    sys.exit(2)


def guide(call, name, gpu):
    dollars = hourly(gpu)
    print(f"call {call.object_id} in app {app.app_id} on {gpu}, {CPU} cores, {MEMORY} GiB\n"
          f"    cost:   about ${dollars:.2f} an hour, ${24 * dollars:.0f} a day (prices of {DOLLARS_AS_OF}); "
          f"the log says what the whole run will cost\n"
          f"    follow: modal app logs {app.app_id} -f\n"
          f"    stop:   modal app stop {app.app_id}\n"
          f"    list:   modal run modal_app.py --action ls\n"
          f"    fetch:  modal volume get holdfast-results {name}/checkpoints/best.pt .", flush=True)


def close(verdict):
    """The result in one line and as this command's exit code: 0 finished, 2 refused, 1 stuck or failed."""
    line = f"modal_app.py: {verdict['status']}" + f": {verdict['why']}" * bool(verdict["why"])
    if verdict["status"] != "finished":
        print(line, file=sys.stderr)
        sys.exit(2 if verdict["status"] == "refused" else 1)
    print(line)
