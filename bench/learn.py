"""Does it learn, does it carry over to real EEG, and how does it compare?

    python bench/learn.py               small V3 on synthetic EEG, beside classical features and
                                        line length; exits 1 unless its AUROC and sample F1 on
                                        unseen patients are above line length's, and says where they
                                        stand beside the features' (event F1 is left out: of few
                                        seizures it is a matter of two or three);
                                        --full: the full V3, for a GPU
    python bench/learn.py --transfer    trained on synthetic EEG alone, scored on the real clips of
                                        ../shared/eeg, beside the same: those of CHB-MIT and of a
                                        healthy subject, and those whose patterns experts voted on
    python bench/learn.py --on FOLDER   trained on synthetic EEG in the channels of an imported
                                        folder, scored on its recordings (bench/siena.py)
    python bench/learn.py --race        V3 small and full beside SeizureTransformer at equal hours
                                        of EEG and at equal CPU minutes; cost at inference
    python bench/learn.py --also-real   trained on synthetic EEG and the real clips of all patients
                                        but the one that is scored

Train and dev are patients of one synthetic corpus; the threshold of every detector is tuned on dev
by event F1, and the scored set is scored once. Unseen patients are a second corpus of another seed.
best.pt is chosen by average precision, since event F1 soon stands at its ceiling. --work FOLDER
keeps corpora, runs and results, and what lies there is not made again. The detectors:
bench/detectors.py and bench/networks.py.
"""
import argparse
import contextlib
import functools
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data                                                             # noqa: E402
import detectors                                                        # noqa: E402
from run import share                                                    # noqa: E402
from eeg import edf                                                              # noqa: E402
import evaluate                                                         # noqa: E402
import judge                                                            # noqa: E402
import race                                                             # noqa: E402
import real as folds                                                    # noqa: E402
import train                                                            # noqa: E402
from judge import (OF_PATIENT, auroc, best_line_length, counted,        # noqa: E402
                   fewest_of_patient, print_table, real, summary, synthetic, tuned, with_healthy)

SHOWN = ("event_f1", "event_sensitivity", "event_precision", "false_alarms_per_24h", "sample_f1",
         "auroc", "average_precision")
PATIENTS = 36                           # in them
DECISIVE = "auroc", "sample_f1"
DEV = 0.25                              # of the patients
TRAINING = {"epochs": 4, "batch_size": 8, "learning_rate": 2e-3, "warmup_ratio": 0.1,
            "grad_clip": 1.0, "log_every": 50, "checkpoint_keep": 3, "mid_epoch_keep": 1,
            "best_metric": "average_precision"}
CPU = torch.device("cpu")


# ---- training through train.py ----

def trained(work, name, folders, seed, args, **extra):
    """Folder of the checkpoints of a finished run on imported folders; an earlier one stands."""
    config = {
        "experiment": {"name": name, "seed": seed, "results": str(work / "results")},
        "data": {"path": folders, "window_seconds": 30.0, "stride_seconds": 7.5,
                 "dev_fraction": DEV, **extra},
        "model": {"size": "full" if args.full else "small"},
        "training": {**TRAINING, "epochs": args.epochs},
        "evaluation": {"window_seconds": 30.0}}
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    code = train.run(train.load_config(path, args.set), resume="true")
    if code:
        sys.exit(code)
    return work / "results" / name / "checkpoints"


def track_of(path, device=CPU):
    """(recording -> its track, parameters) of a checkpoint."""
    net, state = evaluate.load_model(path, device)
    c, _ = evaluate.stored_settings(state)
    size = sum(p.numel() for p in net.parameters())
    return lambda r: evaluate.predict(net, r, device, c), size


# ---- does it learn? ----

def learn(work, args):
    with contextlib.redirect_stdout(sys.stderr):                # the run's own lines are no result
        recordings = synthetic(work, "corpus", args.hours, PATIENTS, args.seed)
        unseen = synthetic(work, "unseen", args.hours / 2, 12, args.seed + 1000)
        began = time.monotonic()
        folder = trained(work, "learn", str(work / "corpus_referential"), args.seed, args)
    minutes = (time.monotonic() - began) / 60
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, dev = data.split_patients(recordings, (), DEV, args.seed)
    ours, size = track_of(folder / "best.pt", device)
    rows = {f"V3 small, {size:,} parameters, {minutes:.1f} min on {device}": ours}
    rows |= plain(training, args)
    title(unseen, "unseen synthetic patients", "each at the threshold tuned on dev patients")
    scores = {name: tuned(track, dev, unseen) for name, track in rows.items()}
    lines = [[name, *(f"{row[metric]:.3f}" for metric in SHOWN)] for name, row in scores.items()]
    print_table(["", *SHOWN], lines)
    ours = next(iter(scores.values()))
    better = {kind: all(ours[metric] > row[metric] for metric in DECISIVE
                        for name, row in scores.items() if name.startswith(kind))
              for kind in ("line length", "classical")}
    print()
    for kind, is_better in better.items():
        print(f"V3's {' and '.join(DECISIVE)}: {'above' if is_better else 'NOT above'} {kind}'s")
    return 0 if better["line length"] else 1


def plain(training, args):
    """Tracks of what was there before networks."""
    rows = {}
    for name, estimator in (("logistic", detectors.logistic), ("boosting", detectors.boosting)):
        rows[f"classical, {name}"] = detectors.Classical(training, estimator(args.seed)).track
    for name, relative in (("relative", True), ("absolute", False)):
        track, seconds = best_line_length(training, relative)
        rows[f"line length, {name}, {seconds} s"] = track
    return rows


def title(recordings, whose, how):
    print(f"\n{len({r.patient for r in recordings})} {whose}, "
          f"{sum(r.seconds for r in recordings) / 3600:.2f} h, "
          f"{sum(len(r.events) for r in recordings)} seizures; {how}")


# ---- does it carry over? ----

def transfer(work, args):
    with contextlib.redirect_stdout(sys.stderr):
        recordings = synthetic(work, "corpus", args.hours, PATIENTS, args.seed, "bipolar")
        clips, voted = real(work), real(work, "clips_iiic")
        training, dev = data.split_patients(recordings, (), DEV, args.seed)
        rows = of_seeds(work, args, "transfer", work / "corpus_bipolar")
        rows |= plain(training, args)
        # a clip begins before its seizure: what knows no more than that
        rows["seconds since its beginning"] = lambda r: np.linspace(0, 1, r.samples, dtype="f4")
    title(clips, "patients, real clips", "trained and tuned on synthetic EEG alone")
    thresholds = {name: summary(track, dev, {"tune": True})["threshold"]
                  for name, track in rows.items()}
    carry_over(rows, thresholds, clips)
    title(voted, "real clips of 10 and 50 s with expert votes", "the same detectors and thresholds")
    alarms_by_pattern(rows, thresholds, voted)
    return 0


def elsewhere(work, args):
    """As transfer, of the labelled recordings of the folder that --on names."""
    scored = [r for r in data.open_corpus(args.on) if r.labelled]
    montage = scored[0].montage
    channels = scored[0].channels if montage == "reduced" else ()
    with contextlib.redirect_stdout(sys.stderr):
        recordings = synthetic(work, "on", args.hours, PATIENTS, args.seed, montage, channels)
        training, dev = data.split_patients(recordings, (), DEV, args.seed)
        rows = of_seeds(work, args, "on", work / f"on_{montage}") | plain(training, args)
    for name, relative in (("relative", True), ("absolute", False)):
        track = best_within(scored, relative)
        rows[f"line length, {name}, {track.keywords['seconds']} s, the best here"] = track
    title(scored, "patients", "trained and tuned on synthetic EEG alone")
    lines = []
    for name, track in rows.items():
        threshold = summary(track, dev, {"tune": True})["threshold"]
        tracks = {r.name: track(r) for r in scored}
        groups = [[r for r in scored if r.patient == p] for p in sorted({r.patient for r in scored})]
        found, alarms = counted(scored, tracks, threshold)
        lines.append([name, f"{auroc(scored, tracks):.3f}",
                      folds.interval(folds.drawn_means([auroc(g, tracks) for g in groups])),
                      folds.interval(folds.drawn_means([within(g, tracks) for g in groups])),
                      f"{within(scored, tracks):.3f}", str(found), str(alarms)])
    print_table(["AUROC per second", "pooled", "mean of patients", "within, mean of patients",
                 "within, mean of recordings", "found", "alarms"], lines)
    return 0


def best_within(recordings, relative):
    """Line length over the window that is the best within these very recordings."""
    tracks = [functools.partial(detectors.line_length, seconds=seconds, relative=relative)
              for seconds in (1, 2, 4, 8, 15, 30)]
    return max(tracks, key=lambda track: within(recordings, {r.name: track(r) for r in recordings}))


def of_seeds(work, args, run, corpus):
    """Tracks of the small V3 of each seed, and of what may make more of the same runs."""
    rows = {}
    for seed in range(args.seed, args.seed + args.seeds):
        folder = trained(work, f"{run}_{seed}", str(corpus), seed, args)
        rows[f"V3, seed {seed}"], _ = track_of(folder / "last.pt")
        rows[f"  its best epoch on dev, seed {seed}"], _ = track_of(folder / "best.pt")
        mean = folder / "mean_of_epochs.pt"
        if not mean.exists():
            share.average(sorted(folder.glob("checkpoint_epoch_*.pt")), mean)
        kept = TRAINING["checkpoint_keep"]
        rows[f"  mean of its last {kept} epochs, seed {seed}"], _ = track_of(mean)
    alone = [track for name, track in rows.items() if name.startswith("V3")]
    rows["V3, mean of the seeds' tracks"] = lambda r: np.mean([t(r) for t in alone], 0)
    return rows


def alarms_by_pattern(rows, thresholds, clips):
    """Table: AUROC per second of all clips and within those that hold both classes; seizures found,
    and clips without a seizure that have an alarm, by the pattern that their name says."""
    kinds = sorted({pattern_of(r) for r in clips if not len(r.events)})
    lines = []
    for name, track in rows.items():
        tracks = {r.name: track(r) for r in clips}
        found = counted(clips, tracks, thresholds[name])[0]
        alarmed = {kind: [] for kind in kinds}
        for r in clips:
            if not len(r.events):
                alarms = counted([r], tracks, thresholds[name])[1]
                alarmed[pattern_of(r)].append(alarms > 0)
        lines.append([name, f"{auroc(clips, tracks):.3f}", f"{within(clips, tracks):.3f}",
                      str(found),
                      *(f"{sum(said)} of {len(said)}" for said in alarmed.values())])
    print_table(["AUROC per second", "all", "within", "found",
                 *(f"alarms on {kind}" for kind in kinds)], lines)


def within(clips, tracks):
    """Mean AUROC per second of the clips that hold both classes."""
    return np.mean([auroc([r], tracks) for r in clips if 0 < r.labels(0, r.samples).mean() < 1])


def pattern_of(recording):
    """GPD, GRDA, LPD, LRDA or OTH of a clip of SPaRCNet; those of the inter-rater study name
    none."""
    named = re.search("spc([A-Z]+)", recording.name)
    return named[1] if named else "not named"


def carry_over(rows, thresholds, clips):
    """Table: AUROC per second of each patient with seizures, their mean, within the clips that hold
    both classes, and all clips at once; seizures found and false alarms at the threshold tuned on
    `dev`; how many seizures are found with no more false alarms than line length has when it finds
    the most; and false alarms when all are found."""
    tracks = {name: {r.name: track(r) for r in clips} for name, track in rows.items()}
    curves = {name: curve(clips, tracks[name]) for name in rows}
    limit = min(fewest_alarms(c) for name, c in curves.items() if name.startswith("line length"))
    ill = sorted({r.patient for r in clips if len(r.events)})
    seizures = sum(len(r.events) for r in clips)
    healthy = [r for r in clips if r.patient not in ill]
    lines = []
    for name, track in rows.items():
        groups = [[r for r in clips if r.patient == p] for p in ill]
        of_patient = [auroc(group, tracks[name]) for group in groups]
        values = [*of_patient, np.mean(of_patient), within(clips, tracks[name]),
                  auroc(clips, tracks[name])]
        most = max(n for n, a in curves[name] if a <= limit)
        all_found = min((a for n, a in curves[name] if n == seizures), default="never")
        every = [with_healthy([fewest_of_patient(group, healthy, tracks[name])])
                 for group in groups]
        lines.append([name, *(f"{v:.3f}" for v in values),
                      *map(str, counted(clips, tracks[name], thresholds[name])), str(most),
                      str(all_found), *every])
    print_table(["AUROC per second", *ill, "mean", "within", "all", "found", "alarms",
                 f"found at {limit} alarms", f"alarms at {seizures} found",
                 *(f"all of {p}" for p in ill)], lines)
    print(f"\nfound, alarms: at the threshold tuned on synthetic dev patients. {OF_PATIENT}")


def curve(recordings, tracks):
    """counted() at 200 thresholds, even in rank, so that a detector's own scale plays no part."""
    values = np.concatenate([tracks[r.name][::edf.FS] for r in recordings])
    thresholds = np.unique(np.quantile(values, np.linspace(0, 1, 200)))
    return [counted(recordings, tracks, float(t)) for t in thresholds]


def fewest_alarms(points):
    """Where the most seizures are found."""
    most = max(n for n, _ in points)
    return min(a for n, a in points if n == most)


# ---- command line ----

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=learn)
    for name, command in (("--transfer", transfer), ("--race", race.race),
                          ("--also-real", race.also_real)):
        parser.add_argument(name, dest="command", action="store_const", const=command)
    parser.add_argument("--on", metavar="FOLDER", help="imported recordings with labels")
    parser.add_argument("--full", action="store_true", help="the full V3, on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each detector")
    parser.add_argument("--hours", type=float, default=6.0, help="of synthetic EEG to train on")
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    parser.add_argument("--work", help="keep everything in this folder, and go on there")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="of the configuration of V3's trainings")
    parser.add_argument("--jobs", type=int, default=1, help="of --race, trained at a time")
    parser.add_argument("--seizuretransformer", metavar="FOLDER",
                        default=os.environ.get("SEIZURETRANSFORMER", ""),
                        help="its published time_step_level, see bench/model.py")
    args = parser.parse_args()
    if args.command == race.race and not args.seizuretransformer:
        parser.error("--race needs --seizuretransformer FOLDER with its published model.py")
    if args.on:
        args.command = elsewhere
    if args.command in (transfer, race.also_real) and not judge.CLIPS.is_dir():
        print(f"no real EEG: {judge.CLIPS} is absent, so transfer is not measured")
        sys.exit(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch).resolve()
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(args.command(work, args))


if __name__ == "__main__":
    main()
