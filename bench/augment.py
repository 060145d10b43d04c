"""Which augmentation helps? One small V3, trained on synthetic EEG, goes on with each set of kinds.

    python bench/augment.py [--seeds 0,1] [--work FOLDER]       one table; --work keeps all of it
    python bench/augment.py --sets none mirror,gain,band        these sets alone

The detector is trained for two epochs with mirror and gain; from its weights each set goes on for a
short epoch of the same windows in the same order, about a CPU minute. Scored are the last weights,
on patients not trained on: synthetic ones, the same through another amplifier (1 to 30 Hz, twice
the gain, 500 Hz, 12 bits, 20 uV of mains, which the import filters out again, two electrodes
without contact), and the real clips of ../shared/eeg where they are there; all bipolar, as those
are. AUROC of seconds: of all together, and its mean over patients who have both kinds of them.
"""
import argparse
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyedflib
import torch
import yaml
from scipy import signal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eeg import augmentation                                                     # noqa: E402
from eeg import corpora                                                          # noqa: E402
import data                                                             # noqa: E402
import evaluate                                                         # noqa: E402
from scoring import metrics                                                          # noqa: E402
from eeg import synth                                                            # noqa: E402
import train                                                            # noqa: E402
from eeg.edf import FS                                                      # noqa: E402

CLIPS = ROOT.parent / "shared" / "eeg" / "recordings"
CORPORA = {"corpus": (6.0, 48, 0), "unseen": (2.0, 24, 1000)}           # hours, patients, seed
OTHER = synth.Amplifier(1.0, 500, 12, 1.0, 1.0, 30.0)                   # step 1 uV, 1 to 30 Hz
BASE = ("mirror", "gain")
# reference changes nothing in a bipolar montage
ADDED = [kind for kind in augmentation.AUGMENTATIONS if kind not in (*BASE, "reference")]
SETS = [(), *[(kind,) for kind in BASE], BASE, *[(*BASE, kind) for kind in ADDED]]
DATA = {"window_seconds": 30.0, "stride_seconds": 7.5, "dev_fraction": 0.25}
TRAINING = {
    "epochs": 2, "batch_size": 8, "learning_rate": 2e-3, "warmup_ratio": 0.1, "grad_clip": 1.0,
    "log_every": 20, "checkpoint_keep": 1, "mid_epoch_keep": 1, "best_metric": "average_precision"}
GOING_ON = {"epochs": 1, "learning_rate": 1e-3}
FEWER = {"background_per_partial": 1.0}


# ---- corpora ----

def make_corpora(work):
    """{column: folder} of what is scored; work/corpus is trained on. Keeps what is there."""
    for name, (hours, patients, seed) in CORPORA.items():
        made(work / f"{name}_edf", synth.synth, hours=hours, patients=patients, seed=seed)
    made(work / "other_edf", through_other_amplifier, source=work / "unseen_edf")
    for name in ("corpus", "unseen", "other"):
        corpora.import_corpus(work / f"{name}_edf", work / name, montage="bipolar")
    columns = ["unseen", "other"]
    if CLIPS.is_dir():
        corpora.import_corpus(CLIPS, work / "real", montage="bipolar")
        columns.append("real")
    return {name: work / name for name in columns}


def made(folder, make, **arguments):
    """Have `make` fill a folder, unless it is there; what a kill left half made is made anew."""
    if not folder.is_dir():
        shutil.rmtree(f"{folder}.part", ignore_errors=True)
        make(Path(f"{folder}.part"), **arguments)
        Path(f"{folder}.part").rename(folder)


def through_other_amplifier(target, source):
    """A copy of a folder of EDF, each as OTHER would have recorded it."""
    shutil.copytree(source, target)
    for number, path in enumerate(sorted(target.rglob("*.edf"))):
        rng = np.random.default_rng([7, number])
        with pyedflib.EdfReader(str(path)) as reader:
            rate = round(reader.getSampleFrequency(0))
            eeg = np.stack([reader.readSignal(i) for i in range(reader.signals_in_file)])
        common = np.gcd(rate, FS)
        eeg = signal.resample_poly(eeg, FS // common, rate // common, axis=1)
        hum = np.sin(2 * np.pi * rng.choice([50, 60]) * np.arange(eeg.shape[1]) / FS)
        eeg += 20 * rng.uniform(0.3, 1, (len(eeg), 1)) * hum
        band = signal.butter(2, [OTHER.high_pass, OTHER.low_pass], "band", fs=FS)
        eeg = 2 * signal.lfilter(*band, eeg)
        eeg[rng.permutation(len(eeg))[:2]] = 0
        path.unlink()
        synth.write_edf(path, eeg.astype(np.float32), OTHER, OTHER.step)


# ---- training and scoring ----

def trained(work, name, kinds, seed, data_section, training):
    """The last checkpoint of one training; that of last time where it is done."""
    config = {
        "experiment": {"name": name, "seed": seed, "results": str(work / "results")},
        "data": DATA | data_section | {"path": str(work / "corpus"), "augmentations": list(kinds)},
        "model": {"size": "small"},
        "training": TRAINING | training,
        "evaluation": {"window_seconds": 30.0}}
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    code = train.run(train.load_config(path), resume="true")
    if code:
        sys.exit(code)
    return work / "results" / name / "checkpoints" / "last.pt"


def scores(work, first, kinds, seed, scored):
    """auroc() on each corpus of what goes on from the checkpoint `first` with these kinds."""
    name = f"{'_'.join(kinds) or 'none'}_{seed}"
    path = trained(work, name, kinds, seed, FEWER, GOING_ON | {"init": str(first)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, state = evaluate.load_model(path, device)
    c, _ = evaluate.stored_settings(state)
    return [auroc(net, c, recordings) for recordings in scored.values()]


def auroc(net, c, recordings):
    """(of all seconds, mean over patients)."""
    device = next(net.parameters()).device
    seconds = {}
    for r in recordings:
        if r.labelled:
            probability = evaluate.predict(net, r, device, c)[FS // 2::FS]
            label = r.labels(0, r.samples)[FS // 2::FS] > 0
            seconds.setdefault(data.person(r.patient), []).append((probability, label))
    patients = [[np.concatenate(part) for part in zip(*rows)] for rows in seconds.values()]
    every = [np.concatenate(part) for part in zip(*patients)]
    both = [(p, label) for p, label in patients if 0 < label.sum() < len(label)]
    mean = np.mean([metrics.auroc(p, label) for p, label in both])
    return metrics.auroc(*every), mean


def cell(values):
    """Means over seeds of pairs, and the range of the first."""
    pooled, mean = np.transpose(values)
    return f"{pooled.mean():.3f} ({pooled.min():.3f} to {pooled.max():.3f}), {mean.mean():.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1", help="of what goes on: sampling, augmentation")
    parser.add_argument("--sets", nargs="+", help="kinds separated by commas, or none")
    parser.add_argument("--work", help="keep everything in this folder, and go on there")
    args = parser.parse_args()
    sets = [() if text == "none" else tuple(text.split(",")) for text in args.sets or ()] or SETS
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        work.mkdir(exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):        # their lines are no result
            scored = {name: data.open_corpus(path) for name, path in make_corpora(work).items()}
            first = trained(work, "base", BASE, 0, {}, {})
        print("AUROC of all seconds (range), mean over patients\n")
        print("| augmentation | seeds |", *[f"{name} |" for name in scored])
        print("|---|---|" + "---|" * len(scored), flush=True)
        for kinds in sets:
            with contextlib.redirect_stdout(sys.stderr):
                found = [scores(work, first, kinds, seed, scored) for seed in seeds]
            cells = " | ".join(cell(column) for column in zip(*found))
            print(f"| {', '.join(kinds) or 'none'} | {args.seeds} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
