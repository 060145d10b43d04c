"""Does the probability jump where inference windows meet, and what does overlap cost?

    python bench/overlap.py CHECKPOINT DATA     such as bench/learn.py --work DIR leaves

Windows start at multiples of the step, so that each overlap has its own edges: places where the set
of windows that a sample is averaged from changes. Printed for each overlap: the mean jump of the
probability between neighbouring samples at those edges, beside the mean change between neighbouring
samples elsewhere; compute relative to none; and the scores at the stored threshold. Jumps
are in log-odds too, since most of a recording is near 0.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data                                                             # noqa: E402
import evaluate                                                         # noqa: E402

SHARES = (0, 1 / 12, 1 / 6, 1 / 4, 1 / 2)               # of a window
SHOWN = ("event_f1", "event_sensitivity", "event_precision", "false_alarms_per_24h", "sample_f1",
         "auroc", "average_precision")


def edges(samples, c):
    """First sample after each change of the windows that cover it."""
    length = round(c["window_seconds"] * evaluate.FS)
    starts = np.array(evaluate._starts(samples, c))
    marks = np.unique(np.concatenate([starts, starts + length]))
    return marks[(marks > 0) & (marks < samples)]


def steps(track, marks):
    """Changes between neighbouring samples: at the marks, and everywhere else."""
    change = np.abs(np.diff(track.astype(np.float64)))
    at = np.zeros(len(change), bool)
    at[marks - 1] = True
    return change[at], change[~at]


def log_odds(track):
    p = np.clip(track.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def tried(net, recordings, c):
    """Jumps at edges and elsewhere, seconds of compute, and the summary of one setting."""
    at, elsewhere, odds, records = [], [], [], []
    seconds = 0.0
    for r in recordings:
        began = time.process_time()
        track = evaluate.predict(net, r, "cpu", c)
        seconds += time.process_time() - began
        marks = edges(r.samples, c)
        jumps, changes = steps(track, marks)
        at.append(jumps)
        elsewhere.append(changes)
        odds.append(steps(log_odds(track), marks)[0])
        records.append(evaluate.score(r, track, c))
    means = [float(np.concatenate(x).mean()) for x in (at, elsewhere, odds)]
    return means, seconds, evaluate.summarise(records, c)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    net, state = evaluate.load_model(args.checkpoint, "cpu")
    stored, _ = evaluate.stored_settings(state)
    recordings = data.open_corpus(args.data)
    window = stored["window_seconds"]
    first = None
    print(f"{'overlap s':>9} {'jump':>8} {'elsewhere':>9} {'log-odds':>8} {'compute':>7}  "
          + "  ".join(SHOWN))
    for share in SHARES:
        c = {**stored, "overlap_seconds": window * share}
        (at, elsewhere, odds), seconds, summary = tried(net, recordings, c)
        first = first or seconds
        scores = "  ".join(f"{summary[name]:{len(name)}.4f}" for name in SHOWN)
        print(f"{c['overlap_seconds']:9.2f} {at:8.5f} {elsewhere:9.6f} {odds:8.4f} "
              f"x{seconds / first:6.2f}  {scores}", flush=True)


if __name__ == "__main__":
    main()
