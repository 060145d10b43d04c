"""Kill a real training run with SIGKILL at random times, take its whole results folder away, or let it hang; resume it every
time, and compare its end with a run never stopped.

    python bench/soak.py                                        100 kills
    python bench/soak.py --kills 100 --losses 50 --hangs 50     with a second copy in training.mirror

Each process is killed between its start and some seconds into training. A loss is a kill after which the results folder is
removed, so that only the mirror is left; a hang is a step that sleeps in C until the watchdog ends the process with 70. Runs
that reach their end before all is spent are compared and begun again in a new directory. Prints what was done, runs compared,
the most steps done again, and whether weights, optimizer and metrics were equal.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import checkpoint                                           # noqa: E402
import corpora                                              # noqa: E402
import synth                                                # noqa: E402
from helpers import rows, same, settings                 # noqa: E402


HANG = """
import ctypes, sys
sys.path.insert(0, sys.argv.pop(1))
import train
original, steps = train.Trainer.train_step, [int(sys.argv.pop(1))]

def train_step(self, *arguments):
    steps[0] -= 1
    if steps[0] < 0:
        ctypes.CDLL(None).sleep(3600)
    return original(self, *arguments)

train.Trainer.train_step = train_step
sys.exit(train.main(sys.argv[1:]))
"""


def launch(results, hang_after=None):
    """A process that trains on; `hang_after`: it hangs after so many steps, for the watchdog to end it."""
    command = [sys.executable, str(ROOT / "train.py")]
    if hang_after is not None:
        command = [sys.executable, "-c", HANG, str(ROOT), str(hang_after)]
    command += ["--config", str(results / "config.yaml"), "--resume"]
    if hang_after is not None:
        command += ["--set", "training.hang_minutes=0.1"]
    log = open(results / "log.txt", "a")
    return subprocess.Popen(command, stdout=log, stderr=log,
                            env={**os.environ, "BGB_MID_EPOCH_MINUTES": "0", "OMP_NUM_THREADS": "1"})


def prepare(corpus, results, epochs):
    results.mkdir()
    config = settings(corpus, results, training__epochs=epochs, training__checkpoint_keep=2,
                      training__mirror=str(results / "mirror"))
    (results / "config.yaml").write_text(yaml.safe_dump(config))
    return results


def seen_step(results):
    """The furthest step that the run's own log had reported when it died."""
    path = results / "t" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def saved_step(results):
    """The furthest step that the run's folder or its mirror holds."""
    places = [results / "t" / "checkpoints", results / "mirror" / "t" / "checkpoints"]
    found = [c.facts["global_step"] for place in places for c in checkpoint.candidates(place) if c.facts]
    return max(found, default=0)


def kill(process, seconds):
    """Whether SIGKILL met the process alive, `seconds` after now."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def equal(results, reference):
    mine, theirs = (checkpoint.load(r / "t/checkpoints/last.pt") for r in (results, reference))
    keys = ("model", "optimizer", "scheduler", "rng", "sampler", "stopping", "scores", "global_step")
    return all(same(mine[k], theirs[k]) for k in keys) and rows(results) == rows(reference)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--losses", type=int, default=0)
    parser.add_argument("--hangs", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temp:
        temp = Path(temp)
        synth.synth(temp / "edf", hours=0.35, patients=4, seed=3)
        corpora.import_corpus(temp / "edf", temp / "h5", say=lambda line: None)
        reference = prepare(temp / "h5", temp / "reference", args.epochs)
        start = time.monotonic()
        assert launch(reference).wait() == 0, (reference / "log.txt").read_text()
        length = time.monotonic() - start
        todo = ["kill"] * args.kills + ["loss"] * args.losses + ["hang"] * args.hangs
        rng.shuffle(todo)
        runs = differing = 0
        again = {"kill": 0, "loss": 0, "hang": 0}
        while todo:
            results = prepare(temp / "h5", temp / f"run{runs}", args.epochs)
            done = False
            while not done:
                kind = todo[-1] if todo else "none"
                process = launch(results, rng.randrange(12) if kind == "hang" else None)
                if kind in ("kill", "loss") and kill(process, rng.uniform(0, length / 2)):
                    todo.pop()
                    step = seen_step(results)
                    if kind == "loss":
                        shutil.rmtree(results / "t", ignore_errors=True)
                    again[kind] = max(again[kind], step - saved_step(results))
                    continue
                code = process.wait()
                if code == 70:
                    todo.pop()
                    again[kind] = max(again[kind], seen_step(results) - saved_step(results))
                    continue
                assert code == 0, (results / "log.txt").read_text()[-3000:]
                done = True
            runs += 1
            differing += not equal(results, reference)
    print(f"{args.kills} SIGKILLs, {args.losses} losses of the whole results folder and {args.hangs} hangs over {runs} runs of "
          f"{args.epochs} epochs: {differing} runs ended different from the one never stopped; at most {again['kill']} steps done "
          f"again after a kill, {again['loss']} after a loss, {again['hang']} after a hang; {time.monotonic() - began:.0f} s")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
