"""Kill a real training run with SIGKILL at random times, resume it every time, and compare its end with a run never stopped.

    python bench/soak.py                100 kills
    python bench/soak.py --kills 1000   the long form

Each process is killed between its start and some seconds into training; runs that reach their end before all kills are spent
are compared and begun again in a new directory. Prints kills, runs compared, steps lost per kill, and whether weights,
optimizer and metrics were equal.
"""
import argparse
import json
import os
import random
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


def launch(results):
    log = open(results / "log.txt", "a")
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--config", str(results / "config.yaml"), "--resume"],
                            stdout=log, stderr=log, env={**os.environ, "BGB_MID_EPOCH_MINUTES": "0", "OMP_NUM_THREADS": "1"})


def prepare(corpus, results, epochs):
    results.mkdir()
    config = settings(corpus, results, training__epochs=epochs, training__checkpoint_keep=2)
    (results / "config.yaml").write_text(yaml.safe_dump(config))
    return results


def seen_step(results):
    """The furthest step that the run's own log had reported when it died."""
    path = results / "t" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def saved_step(results):
    found = [c for c in checkpoint.candidates(results / "t" / "checkpoints") if c.facts]
    return found[0].facts["global_step"] if found else 0


def equal(results, reference):
    mine, theirs = (checkpoint.load(r / "t/checkpoints/last.pt") for r in (results, reference))
    keys = ("model", "optimizer", "scheduler", "rng", "sampler", "stopping", "scores", "global_step")
    return all(same(mine[k], theirs[k]) for k in keys) and rows(results) == rows(reference)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
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
        kills = runs = lost = differing = 0
        while kills < args.kills:
            results = prepare(temp / "h5", temp / f"run{runs}", args.epochs)
            code = None
            while code != 0:
                process = launch(results)
                try:
                    code = process.wait(rng.uniform(0, length / 2) if kills < args.kills else None)
                    assert code == 0, (results / "log.txt").read_text()[-3000:]
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    lost = max(lost, seen_step(results) - saved_step(results))
            runs += 1
            differing += not equal(results, reference)
    print(f"{kills} SIGKILLs over {runs} runs of {args.epochs} epochs: {differing} runs ended different from the one never stopped; "
          f"at most {lost} steps done again after a kill; {time.monotonic() - began:.0f} s")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
