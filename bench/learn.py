"""Does it learn, does it carry over to real EEG, and how does it compare?

    python bench/learn.py               small V3 on synthetic EEG, beside line length; exits 1 unless
                                        its event F1 on unseen patients is at least 0.9 and line
                                        length's; --full: the full V3, for a GPU
    python bench/learn.py --transfer    trained on synthetic EEG alone, scored on the real clips of
                                        ../shared/eeg, beside classical features and line length

Train and dev are patients of one synthetic corpus; the threshold of every detector is tuned on dev
by event F1, and the scored set is scored once. Unseen patients are a second corpus of another seed.
best.pt is chosen by average precision, since event F1 soon stands at its ceiling. --work FOLDER
keeps corpora, runs and results, and what lies there is not made again. The detectors:
bench/detectors.py.
"""
import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint                                                       # noqa: E402
import corpora                                                          # noqa: E402
import data                                                             # noqa: E402
import detectors                                                        # noqa: E402
import edf                                                              # noqa: E402
import evaluate                                                         # noqa: E402
import metrics                                                          # noqa: E402
import synth                                                            # noqa: E402
import train                                                            # noqa: E402

CLIPS = ROOT.parent / "shared" / "eeg" / "recordings"
SHOWN = ("event_f1", "event_sensitivity", "event_precision", "false_alarms_per_24h", "sample_f1",
         "auroc", "average_precision")
DEV = 0.25                              # of the patients
TRAINING = {"epochs": 4, "batch_size": 8, "learning_rate": 2e-3, "warmup_ratio": 0.1,
            "grad_clip": 1.0, "log_every": 50, "checkpoint_keep": 3, "mid_epoch_keep": 1,
            "best_metric": "average_precision"}
CPU = torch.device("cpu")


# ---- corpora ----

def synthetic(work, name, hours, patients, seed, montage="referential"):
    """Recordings of a synthetic corpus below `work`, made where they are not there yet."""
    folder = work / f"{name}_{montage}"
    if not folder.is_dir():
        source = work / f"{name}_edf"
        if not source.is_dir():
            synth.synth(work / f"{name}_edf.part", hours=hours, patients=patients, seed=seed)
            os.replace(work / f"{name}_edf.part", source)
        imported(source, folder, montage)
    return data.open_corpus(folder)


def imported(source, folder, montage):
    corpora.import_corpus(source, f"{folder}.part", montage=montage)
    os.replace(f"{folder}.part", folder)


def real(work):
    """The labelled clips, as CHB-MIT has them: bipolar."""
    if not CLIPS.is_dir():
        sys.exit(f"learn.py: no real clips at {CLIPS}")
    if not (work / "real").is_dir():
        imported(CLIPS, work / "real", "bipolar")
    return [r for r in data.open_corpus(work / "real") if r.labelled]


# ---- training through train.py ----

def trained(work, name, folders, seed, args, **extra):
    """Folder of the checkpoints of a finished run on imported folders; an earlier one stands."""
    config = {
        "experiment": {"name": name, "seed": seed, "results": str(work / "results")},
        "data": {"path": folders, "window_seconds": 30.0, "stride_seconds": 7.5,
                 "dev_fraction": DEV, **extra},
        "model": detectors.DEFAULTS if args.full else detectors.SMALL,
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


# ---- scores ----

def tuned(track, dev, scored):
    """Summary of `scored` at the threshold that has the best event F1 on `dev`."""
    on_dev = summary(track, dev, {"tune": True})
    return summary(track, scored, {"tune": False, "threshold": on_dev["threshold"]})


def summary(track, recordings, c):
    return evaluate.summarise([evaluate.score(r, track(r), c) for r in recordings], c)


def best_line_length(training, relative):
    """(track, seconds) with the window that has the best event F1 on `training`."""
    def f1(seconds):
        s = summary(lambda r: detectors.line_length(r, seconds, relative), training, {"tune": True})
        return s["event_f1"], -s["false_alarms_per_24h"], seconds
    seconds = max(map(f1, (1, 2, 4, 8, 15)))[-1]
    return lambda r: detectors.line_length(r, seconds, relative), seconds


# ---- does it learn? ----

def learn(work, args):
    with contextlib.redirect_stdout(sys.stderr):                # the run's own lines are no result
        recordings = synthetic(work, "corpus", args.hours, 48, args.seed)
        unseen = synthetic(work, "unseen", args.hours / 2, 12, args.seed + 1000)
        began = time.monotonic()
        folder = trained(work, "learn", str(work / "corpus_referential"), args.seed, args)
    minutes = (time.monotonic() - began) / 60
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, dev = data.split_patients(recordings, (), DEV, args.seed)
    ours, size = track_of(folder / "best.pt", device)
    theirs, seconds = best_line_length(training, True)
    rows = {f"V3, {size:,} parameters, {minutes:.1f} min on {device}": tuned(ours, dev, unseen),
            f"line length over {seconds} s": tuned(theirs, dev, unseen)}
    title(unseen, "unseen synthetic patients", "each at the threshold tuned on dev patients")
    ours, theirs = rows.values()
    print("".join(f"{'':<22}{'|' + ' ' * 11 if i else ''}{name}\n" for i, name in enumerate(rows)), end="")
    for metric in SHOWN:
        print(f"{metric:<22}{ours[metric]:<12.3f}{theirs[metric]:.3f}")
    return 0 if ours["event_f1"] >= max(0.9, theirs["event_f1"]) else 1


def title(recordings, whose, how):
    print(f"\n{len({r.patient for r in recordings})} {whose}, "
          f"{sum(r.seconds for r in recordings) / 3600:.2f} h, "
          f"{sum(len(r.events) for r in recordings)} seizures; {how}")


# ---- does it carry over? ----

def transfer(work, args):
    with contextlib.redirect_stdout(sys.stderr):
        recordings = synthetic(work, "corpus", args.hours, 48, args.seed, "bipolar")
        clips = real(work)
        training, dev = data.split_patients(recordings, (), DEV, args.seed)
        rows = networks(work, args)
        for name, estimator in (("logistic", detectors.logistic), ("boosting", detectors.boosting)):
            rows[f"classical, {name}"] = detectors.Classical(training, estimator(args.seed)).track
        for name, relative in (("relative", True), ("absolute", False)):
            track, seconds = best_line_length(training, relative)
            rows[f"line length, {name}, {seconds} s"] = track
    title(clips, "patients, real clips", "trained and tuned on synthetic EEG alone")
    carry_over(rows, dev, clips)
    return 0


def networks(work, args):
    """Tracks of the small V3 of each seed, and of what may make more of the same runs."""
    rows = {}
    for seed in range(args.seed, args.seed + args.seeds):
        folder = trained(work, f"transfer_{seed}", str(work / "corpus_bipolar"), seed, args)
        rows[f"V3, seed {seed}"], _ = track_of(folder / "last.pt")
        mean = folder / "mean_of_epochs.pt"
        if not mean.exists():
            checkpoint.average(sorted(folder.glob("checkpoint_epoch_*.pt")), mean)
        rows[f"  mean of its last {TRAINING['checkpoint_keep']} epochs"], _ = track_of(mean)
    alone = [track for name, track in rows.items() if name.startswith("V3")]
    rows["V3, mean of the seeds' tracks"] = lambda r: np.mean([t(r) for t in alone], 0)
    rows["  that over 5 s"] = lambda r: detectors.smoothed(np.mean([t(r) for t in alone], 0), 5)
    return rows


def carry_over(rows, dev, clips):
    """Table: AUROC per second of each patient with seizures, their mean, and all clips at once;
    seizures found and false alarms at the threshold tuned on `dev`; how many seizures are found
    with no more false alarms than line length has when it finds the most; and false alarms when all
    are found."""
    tracks = {name: {r.name: track(r) for r in clips} for name, track in rows.items()}
    curves = {name: curve(clips, tracks[name]) for name in rows}
    limit = min(fewest_alarms(c) for name, c in curves.items() if name.startswith("line length"))
    ill = sorted({r.patient for r in clips if len(r.events)})
    seizures = sum(len(r.events) for r in clips)
    print(f"{'':<36}AUROC per second{'':<{8 * len(ill) - 2}}at the tuned threshold\n{'':<36}"
          + "".join(f"{name:<8}" for name in [*ill, "mean", "all"])
          + f"{'found':<8}{'alarms':<8}{f'found at {limit} alarms':<20}alarms at {seizures} found")
    for name, track in rows.items():
        of_patient = [auroc([r for r in clips if r.patient == p], tracks[name]) for p in ill]
        values = [*of_patient, np.mean(of_patient), auroc(clips, tracks[name])]
        threshold = summary(track, dev, {"tune": True})["threshold"]
        found, alarms = counted(clips, tracks[name], threshold)
        most = max(n for n, a in curves[name] if a <= limit)
        all_found = min((a for n, a in curves[name] if n == seizures), default="never")
        print(f"{name:<36}" + "".join(f"{v:<8.3f}" for v in values)
              + f"{found:<8}{alarms:<8}{most:<20}{all_found}", flush=True)


def auroc(recordings, tracks):
    middle = slice(edf.FS // 2, None, edf.FS)
    probability = np.concatenate([tracks[r.name][middle] for r in recordings])
    label = np.concatenate([r.labels(0, r.samples)[middle] for r in recordings]) > 0
    return metrics.ranking(probability, label)[0]


def counted(recordings, tracks, threshold):
    """(seizures that a detection touches, detections that touch none)."""
    found = alarms = 0
    for r in recordings:
        events = evaluate.postprocess(tracks[r.name], threshold, {}) / edf.FS
        overlap = metrics.touching(r.events, events)
        found += int(overlap.any(1).sum())
        alarms += int((~overlap.any(0)).sum())
    return found, alarms


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
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--full", action="store_true", help="the full V3, on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each detector")
    parser.add_argument("--hours", type=float, default=6.0, help="of synthetic EEG to train on")
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    parser.add_argument("--work", help="keep everything in this folder, and go on there")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="of the configuration of V3's trainings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch).resolve()
        work.mkdir(parents=True, exist_ok=True)
        command = transfer if args.transfer else learn
        sys.exit(command(work, args))


if __name__ == "__main__":
    main()
