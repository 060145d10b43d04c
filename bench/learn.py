"""Does it learn? The small detector after a few CPU minutes, beside a line-length detector tuned on the same
set.

    python bench/learn.py            synthetic EEG; exits 1 unless event F1 on unseen patients is at least 0.9
    python bench/learn.py --real     the real clips of ../shared/eeg; reports, claims nothing
    python bench/learn.py --full     the full V3 instead of the small one, for a GPU

Synthetic: train and dev are patients of one corpus. Every figure is from a second corpus of other patients,
made with another seed and scored once, with the threshold tuned on dev. best.pt is chosen by average
precision, since event F1 soon stands at its ceiling and cannot tell later epochs apart. Line length (Esteller
et al., EMBC 2001) is the mean absolute difference over a sliding window, relative to its median in the
recording; its window and threshold are those with the best event F1 on the training set.
"""
import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import corpora                                                          # noqa: E402
import data                                                             # noqa: E402
import edf                                                              # noqa: E402
import evaluate                                                         # noqa: E402
import model as v3                                                      # noqa: E402
import synth                                                            # noqa: E402
import train                                                            # noqa: E402

SHOWN = ("event_f1", "event_sensitivity", "event_precision", "false_alarms_per_24h", "sample_f1", "auroc",
         "average_precision")
TRAINING = {"epochs": 4, "batch_size": 8, "learning_rate": 2e-3, "warmup_ratio": 0.1, "grad_clip": 1.0,
            "log_every": 20, "checkpoint_keep": 1, "mid_epoch_keep": 1, "best_metric": "average_precision"}


def synthetic(work, seed):
    """Folders of train+dev and of unseen patients."""
    for name, hours, patients, s in (("corpus", 6.0, 48, seed), ("unseen", 3.0, 12, seed + 1000)):
        synth.synth(work / f"{name}_edf", hours=hours, patients=patients, seed=s)
        corpora.import_corpus(work / f"{name}_edf", work / name)
    return work / "corpus", work / "unseen", {}


def real(work):
    clips = ROOT.parent / "shared" / "eeg" / "recordings"
    if not clips.is_dir():
        sys.exit(f"no real clips at {clips}")
    corpora.import_corpus(clips, work / "corpus", montage="bipolar")
    patients = sorted({r.patient for r in data.open_corpus(work / "corpus")})
    return work / "corpus", None, {"dev_patients": [p for p in patients if "chb02" in p]}


def configuration(work, corpus, extra, args):
    config = {"experiment": {"name": "learn", "seed": args.seed, "results": str(work / "results")},
              "data": {"path": str(corpus), "window_seconds": args.window, "stride_seconds": args.window / 4,
                       "dev_fraction": 0.25, **extra},
              "model": v3.DEFAULTS if args.full else v3.SMALL,
              "training": {**TRAINING, "epochs": args.epochs, "learning_rate": args.learning_rate},
              "evaluation": {"window_seconds": args.window}}
    path = work / "learn.yaml"
    path.write_text(yaml.safe_dump(config))
    return train.load_config(path)


def line_length(recording, seconds):
    """(samples,) in 0..1: x / (1 + x), x = line length over `seconds` divided by its median in the
    recording."""
    eeg = recording.read(0, recording.samples) * recording.scale[:, None]
    step = np.abs(np.diff(eeg, axis=1, prepend=eeg[:, :1])).mean(0)
    total = np.concatenate([[0], np.cumsum(step, dtype=np.float64)])
    half = round(seconds * edf.FS / 2)
    i = np.arange(len(step))
    low, high = np.maximum(i - half, 0), np.minimum(i + half, len(step))
    x = (total[high] - total[low]) / (high - low)
    x = x / max(np.median(x), 1e-9)
    return (x / (1 + x)).astype(np.float32)


def summary(recordings, track, c):
    return evaluate.summarise([evaluate.score(r, track(r), c) for r in recordings if r.labelled], c)


def best_line_length(training, scored):
    """Scores of the detector whose window and threshold have the best event F1 on `training`."""
    def tried(seconds):
        s = summary(training, lambda r: line_length(r, seconds), {"tune": True})
        return s["event_f1"], -s["false_alarms_per_24h"], seconds, s["threshold"]
    _, _, seconds, threshold = max(tried(s) for s in (1, 2, 4, 8, 15))
    c = {"tune": False, "threshold": threshold}
    return summary(scored, lambda r: line_length(r, seconds), c), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--full", action="store_true", help="the full V3, on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    parser.add_argument("--learning-rate", type=float, default=TRAINING["learning_rate"])
    parser.add_argument("--window", type=float, help="seconds; default 30, for the 10 s clips of --real 10")
    parser.add_argument("--work", help="keep everything in this new folder")
    args = parser.parse_args()
    args.window = args.window or (10.0 if args.real else 30.0)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        work.mkdir(exist_ok=True)
        sys.exit(compare(work, args))


def compare(work, args):
    with contextlib.redirect_stdout(sys.stderr):                        # the run's own lines are no result
        corpus, unseen, extra = real(work) if args.real else synthetic(work, args.seed)
        config, began = configuration(work, corpus, extra, args), time.monotonic()
        if code := train.run(config):
            return code
    minutes = (time.monotonic() - began) / 60
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = evaluate.load_model(work / "results/learn/checkpoints/best.pt", device)
    c, _ = evaluate.stored_settings(state)
    recordings, d = data.open_corpus(corpus), config["data"]
    training, dev = data.split_patients(recordings, d["dev_patients"], d["dev_fraction"], args.seed)
    scored = data.open_corpus(unseen) if unseen else dev
    ours = summary(scored, lambda r: evaluate.predict(model, r, device, c), c)
    theirs, seconds = best_line_length(training, scored)
    size = sum(p.numel() for p in model.parameters())
    table(scored, ours, theirs, f"V3, {size:,} parameters, {minutes:.1f} min on {device}",
          f"line length over {seconds} s", "unseen patients" if unseen else "dev patients")
    return 0 if args.real or ours["event_f1"] >= max(0.9, theirs["event_f1"]) else 1


def table(scored, ours, theirs, name, other, whose):
    print(f"\n{len({r.patient for r in scored})} {whose}, {sum(r.seconds for r in scored) / 3600:.2f} h, "
          f"{sum(len(r.events) for r in scored)} seizures; each at its own tuned threshold")
    print(f"{'':<22}{name}\n{'':<22}{'|':<12}{other}")
    for metric in SHOWN:
        print(f"{metric:<22}{ours[metric]:<12.3f}{theirs[metric]:.3f}")


if __name__ == "__main__":
    main()
