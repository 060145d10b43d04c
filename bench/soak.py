"""Kill a real training run at random times, take its whole results folder away, or let it hang;
resume it every time, and compare its end with a run never stopped.

    python bench/soak.py                            a quarter of an hour on two idle cores
    python bench/soak.py --losses 0 --hangs 0       100 kills alone
    python bench/soak.py --pairs                    two faults at a time instead: bench/pairs.py
    python bench/soak.py --triples 100              three at a time, drawn at random

Every process is forked with train.py imported, so that a kill meets training, not the import of
torch; it runs the command line of train.py with --resume and a second copy in training.mirror, and
saves a snapshot after every step. A kill is SIGKILL at a random time. A loss leaves only the
mirror: the results folder is removed, every other time under a process that trains on into the
mirror until it is killed. A hang is a random call of a step, of the validation of a recording, or
of a write in the save thread that sleeps in C until the watchdog ends the process with 70. A run
that reaches its end is compared and another one begun.
"""
import argparse
import ctypes
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import torch                                                # noqa: E402
import yaml                                                 # noqa: E402
from tqdm import tqdm                                       # noqa: E402

import checkpoint                                           # noqa: E402
from eeg.disk import read_json_lines                      # noqa: E402
from eeg import corpora                                              # noqa: E402
from scoring import pictures                                             # noqa: E402, F401 - or every fork does
from eeg import synth                                                # noqa: E402
import train                                                # noqa: E402
from crash import warm                                      # noqa: E402
from helpers import rows, same, settings                    # noqa: E402

# where a process may stand still: whose method, and about how often a run calls it
HANGS = ((train.Trainer, "train_step", 20), (train.Trainer, "score", 2),
         (checkpoint.Checkpointer, "_write", 20))
HANG_MINUTES = 0.1
COMPARED = ("model", "optimizer", "scheduler", "rng", "sampler", "running", "stopping", "scores",
            "epoch", "batch", "global_step")


# ---- one process ----

def hang(owner, name, calls):
    """Have the method `name` sleep in C for good after so many calls of it. Returns the arguments
    that make the watchdog wait less; the others keep the default: a busy machine is no hang."""
    original, left = getattr(owner, name), itertools.count(calls, -1)

    def wrapped(*arguments):
        if next(left) <= 0:
            ctypes.CDLL(None).sleep(100_000)
        return original(*arguments)
    setattr(owner, name, wrapped)
    return ["--set", f"training.hang_minutes={HANG_MINUTES}"]


def fork(results, before=list, out="log.txt", err="log.txt"):
    """Process id of a run that trains on in `results`. See `train_on`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = train_on(results, before, out, err)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def train_on(results, before=list, out="log.txt", err="log.txt"):
    """Exit code of `train.py --resume` of the run in `results`; in a process that was forked.
    before() returns further arguments; out, err: files that its lines are added to."""
    # threads do not live through a fork; waiting for them would never end
    torch.set_num_threads(1)
    # that of the parent is one of all forks: who is killed holding it stops the next
    tqdm.set_lock(threading.RLock())
    for stream, name in ((1, out), (2, err)):
        os.dup2(os.open(results / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    return train.main(["--config", str(results / "config.yaml"), "--resume", *before()])


def exit_code(pid):
    """That of the process once it ended, -9 after SIGKILL."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- one run ----

def prepare(corpus, results, epochs, **changes):
    results.mkdir()
    changes = {"data__stride_seconds": 2.5, "training__mid_epoch_minutes": 0.0,
               "training__mirror": str(results / "mirror"), **changes}
    config = settings(corpus, results, training__epochs=epochs, training__checkpoint_keep=2,
                      **changes)
    (results / "config.yaml").write_text(yaml.safe_dump(config))
    return results


def trained(results, name="t"):
    """Steps in the records, which are written after every step."""
    path = results / name / "metrics.jsonl"
    found = read_json_lines(path)
    return max((row["step"] for row in found), default=0)


def saved(results):
    """The step from which a resume goes on."""
    home, second = results / "t/checkpoints", results / "mirror/t/checkpoints"
    for candidate in checkpoint.in_order(checkpoint.candidates(home) + checkpoint.candidates(second)):
        if candidate.facts and not candidate.damage and checkpoint.verify(candidate.path):
            return candidate.facts["global_step"]
    return 0


def interrupted(results, kind, rng, length):
    """Let a process of the run meet `kind`. Returns (what became of it: its kind, or "end" where
    the run was finished before; steps that it trained; steps to be done again)."""
    before = saved(results)
    # rows may be ahead of the state, and come home with it
    told = max(trained(results), trained(results, "mirror/t"))
    hanging = chosen(rng) if kind == "hang" else None
    pid = fork(results, lambda: hang(*hanging)) if hanging else fork(results)
    under_way = kind == "loss" and rng.random() < 0.5 and take_away(results, pid, told)
    if kind in ("kill", "loss"):
        time.sleep(rng.uniform(0, length))
        # it may have ended, but is not reaped yet: its number is still its own
        os.kill(pid, signal.SIGKILL)
    code = exit_code(pid)
    expected = {"kill": -signal.SIGKILL, "loss": -signal.SIGKILL, "hang": 70, "none": 0}[kind]
    if code not in (0, expected):
        sys.exit((results / "log.txt").read_text()[-4000:] + f"\n{kind}: exit code {code}")
    reached = trained(results, "lost" if under_way else "t")
    if code == 0 and not under_way:
        return "end", reached - before, 0
    if kind == "loss":
        shutil.rmtree(results / "lost" if under_way else results / "t", ignore_errors=True)
    return kind, max(0, reached - before), max(0, reached - saved(results))


def take_away(results, pid, told):
    """Move the results folder away once the process has trained a step that no row tells of; False
    where it ended before."""
    while trained(results) <= told:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.01)
    os.rename(results / "t", results / "lost")
    return True


def chosen(rng):
    """One of HANGS, and after how many calls."""
    owner, name, most = rng.choice(HANGS)
    return owner, name, rng.randrange(most)


def differences(results, reference):
    """What is not as in the run never stopped, the second copy included."""
    found = []
    for place in ("t", "mirror/t"):
        for name in ("last.pt", "best.pt"):
            mine, whole = (compared(r / place / "checkpoints" / name) for r in (results, reference))
            found += [f"{place}/{name}: {key}" for key in whole if not same(mine.get(key), whole[key])]
        if rows(results / place / "..") != rows(reference):
            found.append(f"{place}/metrics.jsonl")
    return found


def compared(path):
    """What two checkpoints of equal runs share; its damage instead where it is damaged."""
    try:
        state = checkpoint.load(path)
    except (OSError, checkpoint.CorruptCheckpoint) as error:
        return {"damage": str(error)}
    return {key: state[key] for key in COMPARED} | {"metric": state["holdfast"].get("metric")}


def soak(temp, todo, epochs, rng):
    """Meet everything in `todo`, in its order. Returns counts, and the most steps done again."""
    synth.synth(temp / "edf", hours=0.35, patients=4, seed=3)
    corpora.import_corpus(temp / "edf", temp / "h5", say=lambda line: None)
    warm()
    reference = prepare(temp / "h5", temp / "reference", epochs)
    began = time.monotonic()
    interrupted(reference, "none", rng, 0)
    length = (time.monotonic() - began) / 4
    counts, again = Counter(), Counter()
    steps = trained(reference)
    while todo:
        results = prepare(temp / "h5", temp / f"run{counts['end']}", epochs)
        outcome = ""
        while outcome != "end":
            kind = todo[-1] if todo else "none"
            outcome, done, lost = interrupted(results, kind, rng, length)
            counts[outcome] += 1
            counts[f"{outcome} in training"] += done > 0
            again[outcome] = max(again[outcome], lost)
            if outcome == kind:
                todo.pop()
            print(f"{results.name}: {outcome}, {done} steps, {lost} again; {len(todo)} to go",
                  file=sys.stderr, flush=True)
        found = differences(results, reference)
        counts["different"] += bool(found)
        if found:
            print(f"{results.name} differs: {', '.join(found)}", file=sys.stderr, flush=True)
        shutil.rmtree(results)
    return counts, again, steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--losses", type=int, default=50)
    parser.add_argument("--hangs", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", nargs="*", metavar="FIRST,SECOND",
                        help="two faults at a time instead: these pairs, or each")
    parser.add_argument("--triples", type=int, default=0, metavar="COUNT",
                        help="so many random triples of faults instead")
    args = parser.parse_args()
    if args.pairs is not None or args.triples:
        import pairs
        chosen = [tuple(pair.split(",")) for pair in args.pairs or ()]
        return pairs.main(chosen, args.seed, args.triples)
    rng, began = random.Random(args.seed), time.monotonic()
    todo = ["kill"] * args.kills + ["loss"] * args.losses + ["hang"] * args.hangs
    rng.shuffle(todo)
    with tempfile.TemporaryDirectory() as temp:
        counts, again, steps = soak(Path(temp), todo, args.epochs, rng)
    print(f"{counts['kill']} SIGKILLs, {counts['loss']} losses of the whole results folder and "
          f"{counts['hang']} hangs ({counts['kill in training']}, {counts['loss in training']} and "
          f"{counts['hang in training']} of them after steps of their own) over {counts['end']} runs "
          f"of {steps} steps: {counts['different']} runs ended different from the one never "
          f"stopped; with a snapshot after every step at most {again['kill']} steps done again "
          f"after a kill, {again['loss']} after a loss, {again['hang']} after a hang; "
          f"{time.monotonic() - began:.0f} s")
    return 1 if counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
