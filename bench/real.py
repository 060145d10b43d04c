"""Detectors on real seizures: cross-validation over the patients of one imported folder.

    tar -xJf ../shared/eeg/seizeit2/developers.tar.xz -C /tmp
    python data.py import /tmp/developers /tmp/seizeit2 --montage reduced --channels "BTE SD,CROSS SD"
    python bench/real.py /tmp/seizeit2 --out real.json                      all but V3
    python bench/real.py /tmp/seizeit2 --out real.json --systems "V3 small" --seeds 0,1,2
    python bench/real.py --table real.json [--folds 1,3]

Patients are dealt into five folds, the same for all. Of the patients who are not in the fold that
is scored, those of DEV choose the threshold and the others train the detector (line length: choose
its window): no patient of the fold is seen before the scores. V3 has the mean of the weights of its
last MEAN epochs, where there are more, else those of its last one: with an epoch that the few
patients of DEV choose, each fold has its own scale of probability. What is done is added to --out,
job by job, and not done again: large tables are made in parts. --set and --label make an ablation:
a V3 with some keys of its configuration changed, under its own name.

AUROC is per second. pooled: all seconds of all folds at once; patients: mean of the patients'; within:
mean of the recordings that hold both classes. Intervals: 95 % of 1,000 draws of patients. found: of
all seizures, at the threshold with so many false alarms per hour over all folds; alarms are formed
by the rules of evaluate.py in whole seconds, and any overlap finds a seizure. An alarm counts once
a minute: cut after 300 s as by SzCORE, one that is always on has 7 false alarms an hour where a
tenth of the time is seizure, and finds them all. at the threshold: seizures found and false alarms
per hour at the threshold that the patients of DEV chose.
"""
import argparse
import atexit
import contextlib
import dataclasses
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import networks                                                         # noqa: E402
import detectors                                                        # noqa: E402
import judge                                                            # noqa: E402
from networks import FS, Fitted, Place, data, evaluate, spent, train       # noqa: E402
from eeg import splits                                                  # noqa: E402
from eeg.disk import write_json                                         # noqa: E402
from run import share                                                   # noqa: E402
from scoring import events, metrics                                     # noqa: E402

FOLDS = 5
DEV = 0.15                              # of the patients outside a fold
ALARMS = 1, 2, 5, 10                    # false alarms per hour
LONGEST = 60                            # s: a longer alarm counts as several, see found
TUNED = 5                               # per hour, where the patients of DEV choose a threshold
DRAWS = 1000
SYNTHETIC = 6.0, 36, 0                  # hours, patients, seed
MEAN = 3                                # last epochs of V3 whose weights are averaged
OWN = judge.ROOT / "configs" / "local" / "own.yaml"         # the recipe of the small V3


# ---- systems: (place, seed, overrides) -> Fitted ----

def fit_v3(place, seed, overrides):
    """train.py with the configuration for own recordings and `overrides`."""
    began = time_now()
    config = yaml.safe_load(OWN.read_text())
    config["experiment"] = {"name": "v3", "seed": seed, "results": str(place.folder)}
    config["data"] |= {"path": place.corpus, "dev_patients": sorted({r.patient for r in place.dev})}
    config["training"] |= {"checkpoint_keep": MEAN, "mid_epoch_keep": 1, "mid_epoch_minutes": 600}
    path = place.folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with contextlib.redirect_stdout(sys.stderr):
        if code := train.run(train.load_config(path, overrides), fresh=True):
            raise SystemExit(code)
        saved = sorted(place.folder.glob("v3/checkpoints/checkpoint_epoch_*.pt"))
        weights = saved[-1]
        if saved[0].name != "checkpoint_epoch_001.pt":      # rotated away: there were more
            weights = weights.with_name("mean.pt")
            share.average(saved, weights)
    minutes = spent(began)
    return Fitted("", *networks.v3_track(weights), 0.0, minutes)


def fit_transformer(folder, place, seed, overrides):
    """SeizureTransformer for 4 CPU minutes, three times V3's; smoothed as all others are."""
    place.published = folder
    fitted = next(networks.fit_seizure_transformer(place, seed, [("4 min", "minutes", 4)]))
    track = fitted.track
    fitted.track = lambda recording: detectors.smoothed(track(recording), detectors.SMOOTH_SECONDS)
    return fitted


def fit_classical(kind, place, seed, overrides, **how):
    began = time_now()
    fitted = detectors.Classical(place.train, kind(seed), **how)
    columns = fitted.columns(place.train[0]).shape[1]
    return Fitted("", fitted.track, columns, 0.0, spent(began))


def fit_line_length(relative, place, seed, overrides):
    """The window with the best AUROC on the training patients."""
    began = time_now()
    reached = {}
    for window in (2, 4, 8, 15):
        tracks = [seconds_of(detectors.line_length(r, window, relative)) for r in place.train]
        labels = [r.labels(0, r.samples)[FS // 2::FS] for r in place.train]
        reached[metrics.auroc(np.concatenate(tracks), np.concatenate(labels) > 0)] = window
    window = reached[max(reached)]
    return Fitted("", lambda r: detectors.line_length(r, window, relative), 1, 0.0, spent(began),
                  f"{window} s")


@functools.cache
def synthetic_place():
    """The place of a training on synthetic EEG: two derivations near those of SeizeIT2."""
    work = Path(tempfile.mkdtemp(prefix="synthetic_"))
    atexit.register(shutil.rmtree, work)
    recordings = judge.synthetic(work, "eeg", *SYNTHETIC, "reduced", ("T4-T6", "T5-T6"))
    training, dev = data.split_patients(recordings, (), DEV, 0)
    return Place(str(work / "eeg_reduced"), training, dev, work, "")


@functools.cache
def fit_synthetic(fit, seed):
    """`fit` on synthetic EEG alone: one training for all folds, of whose cost each has a share."""
    fitted = fit(synthetic_place(), seed, [])
    return dataclasses.replace(fitted, minutes=fitted.minutes / FOLDS)


def on_synthetic(fit):
    return lambda place, seed, overrides: fit_synthetic(fit, seed)


def time_now():
    return networks.time.process_time()


SYSTEMS = {
    "boosting": functools.partial(fit_classical, detectors.boosting),
    "boosting, log-odds smoothed": functools.partial(
        fit_classical, detectors.boosting, log_odds=True),
    "boosting, never relative": functools.partial(fit_classical, detectors.boosting, relative=False),
    "logistic": functools.partial(fit_classical, detectors.logistic),
    "line length, relative": functools.partial(fit_line_length, True),
    "line length, uV": functools.partial(fit_line_length, False),
    "V3 small": fit_v3,
    "boosting, synthetic EEG alone": on_synthetic(
        functools.partial(fit_classical, detectors.boosting)),
    "V3 small, synthetic EEG alone": on_synthetic(fit_v3),
}


# ---- one job: a system, a seed, a fold ----

def parts(recordings, fold):
    """(train, dev, test) of a fold, no patient in two of them."""
    c = {"split": "patient", "folds": FOLDS, "fold": fold}
    training, test = splits.split(recordings, c, 0)
    train_on, dev = data.split_patients(training, (), DEV, fold)
    return train_on, dev, test


def linked(recordings, root, folder):
    """An imported folder of some recordings of the imported folder `root`."""
    for r in recordings:
        link = Path(folder, r.name + ".h5")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(r.path).resolve())
    return str(folder)


def run_job(system, seed, fold, args):
    """The row of one job: what it cost and, for every recording of the fold, one probability a
    second."""
    train_on, dev, test = parts(data.open_corpus(args.folder), fold)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = linked(train_on + dev, args.folder, Path(scratch, "corpus"))
        place = Place(corpus, train_on, dev, Path(scratch), "")
        fitted = SYSTEMS[system](place, seed, args.set)
        chosen_on = [{"tracks": {r.name: seconds_of(fitted.track(r)) for r in dev}}]
        threshold = tuned(chosen_on, facts(dev))
        tracks = {r.name: seconds_of(fitted.track(r)) for r in test}
    return {"system": args.label or system, "seed": seed, "fold": fold, "set": args.set,
            "minutes": fitted.minutes, "parameters": fitted.parameters, "chosen": fitted.chosen,
            "threshold": threshold, "tracks": tracks}


def seconds_of(track):
    """The middle sample of every second, as the AUROC of evaluate.py takes it."""
    return [float(f"{value:.5g}") for value in track[FS // 2::FS]]


def facts(recordings):
    return {r.name: {"patient": r.patient, "events": r.events.tolist(), "seconds": r.seconds,
                     "label": r.labels(0, r.samples)[FS // 2::FS].tolist()} for r in recordings}


def run_jobs(args):
    """All jobs that --out does not hold yet, each added to it when it is done."""
    out = Path(args.out)
    held = json.loads(out.read_text()) if out.exists() else {"rows": []}
    held["recordings"] = facts(data.open_corpus(args.folder))
    done = {(row["system"], row["seed"], row["fold"]) for row in held["rows"]}
    for system in args.systems:
        for seed in args.seeds:
            for fold in args.folds:
                if (args.label or system, seed, fold) in done:
                    continue
                row = run_job(system, seed, fold, args)
                held["rows"].append(row)
                write_json(out, held)
                said = metrics.auroc(*pooled([row], held["recordings"])[:2])
                print(f"{row['system']}, seed {seed}, fold {fold}: AUROC {said:.3f}, "
                      f"{row['minutes']:.1f} CPU min, {row['chosen']}", flush=True)
    return held


# ---- the table ----

def pooled(rows, recordings):
    """(probability, label, patient) of every second of the rows' recordings."""
    tracks = {name: track for row in rows for name, track in row["tracks"].items()}
    names = sorted(tracks)
    patient = [np.full(len(tracks[n]), int(recordings[n]["patient"])) for n in names]
    return (np.concatenate([tracks[n] for n in names]),
            np.concatenate([recordings[n]["label"] for n in names]) > 0, np.concatenate(patient))


def of_groups(probability, label, group):
    """{group: AUROC} of those that hold both classes."""
    found = {}
    for name in np.unique(group):
        mine = group == name
        if 0 < label[mine].mean() < 1:
            found[name] = metrics.auroc(probability[mine], label[mine])
    return found


def resampled(probability, label, patient):
    """Pooled AUROC of DRAWS draws of patients with replacement."""
    order = np.argsort(probability, kind="stable")
    _, first = np.unique(probability[order], return_index=True)
    names, place = np.unique(patient[order], return_inverse=True)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        weight = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[place]
        ill = np.add.reduceat(weight * label[order], first)
        well = np.add.reduceat(weight * ~label[order], first)
        below = np.cumsum(well) - well / 2              # ties count half
        found.append((ill * below).sum() / max(1, ill.sum() * well.sum()))
    return np.array(found)


def drawn_means(values):
    rng = np.random.default_rng(0)
    values = np.array(values)
    return values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)


def counted(rows, recordings, threshold):
    """(seizures found, false alarms) over the rows' recordings."""
    found = alarms = 0
    for row in rows:
        for name, track in row["tracks"].items():
            known = recordings[name]
            detected = alarms_of(np.array(track, np.float32), threshold)
            overlap = metrics.touching(np.array(known["events"]).reshape(-1, 2), detected)
            found += int(overlap.any(1).sum())
            alarms += int((~overlap.any(0)).sum())
    return found, alarms


def alarms_of(track, threshold):
    """Events (N, 2) in s of a track of one probability a second, by the rules of evaluate.py."""
    c = evaluate.DEFAULTS
    low = max(threshold - c["release"], threshold / 2)
    found = events.hysteresis(track, threshold, low, 1, round(c["offset_seconds"]))
    found = events.longer(found, round(c["min_duration_seconds"]))
    found = events.merge(found, round(c["merge_gap_seconds"]))
    return events.split(found, LONGEST).astype(float)


def sweep(rows, recordings):
    """(threshold, seizures found, false alarms per hour) from the highest threshold on. Far below,
    alarms melt into one that is nearly always on: a rate is kept to where every higher threshold
    keeps to it as well."""
    probability, _, _ = pooled(rows, recordings)
    shares = np.concatenate([1 - np.geomspace(3e-4, 0.1, 50), np.linspace(0.88, 0.3, 20)])
    most = 0.0
    for threshold in np.quantile(probability, shares).tolist():
        found, alarms = counted(rows, recordings, threshold)
        most = max(most, alarms * 3600 / len(probability))
        yield threshold, found, most


def found_at(rows, recordings):
    """Most seizures found with no more than each of ALARMS false alarms per hour."""
    points = list(sweep(rows, recordings))
    return [max((found for _, found, alarms in points if alarms <= rate), default=0)
            for rate in ALARMS]


def tuned(rows, recordings):
    """The threshold that finds the most with no more than TUNED false alarms per hour."""
    points = list(sweep(rows, recordings))
    kept = [(found, threshold) for threshold, found, alarms in points if alarms <= TUNED]
    return max(kept, default=(0, points[0][0]))[1]


def interval(draws):
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{np.mean(draws):.3f} ({low:.3f}-{high:.3f})"


def line_of(name, rows, recordings):
    """The table's line of one system, each figure the mean over its seeds."""
    seeds = sorted({row["seed"] for row in rows})
    whole, patients, within, found, at = [], [], [], [], []
    for seed in seeds:
        mine = [row for row in rows if row["seed"] == seed]
        probability, label, patient = pooled(mine, recordings)
        whole.append(resampled(probability, label, patient))
        patients.append(drawn_means(list(of_groups(probability, label, patient).values())))
        within.append(np.mean([metrics.auroc(np.array(track), np.array(recordings[n]["label"]) > 0)
                               for row in mine for n, track in row["tracks"].items()
                               if 0 < np.mean(recordings[n]["label"]) < 1]))
        found.append(found_at(mine, recordings))
        hits = [counted([row], recordings, row["threshold"]) for row in mine if "threshold" in row]
        at.append((sum(h[0] for h in hits), sum(h[1] for h in hits) * 3600 / len(probability)))
    folds = sorted({row["fold"] for row in rows})
    return [name, ",".join(map(str, folds)), str(len(seeds)),
            interval(np.mean(whole, 0)), interval(np.mean(patients, 0)), f"{np.mean(within):.3f}",
            *(f"{value:.0f}" for value in np.mean(found, 0)),
            f"{np.mean([a[0] for a in at]):.0f} with {np.mean([a[1] for a in at]):.1f}" if hits else "-",
            f"{sum(row['minutes'] for row in rows) / len(seeds):.1f}"]


def table(path, folds):
    """Print the table of the file `path`, of the jobs of some folds."""
    held = json.loads(Path(path).read_text())
    recordings = held["recordings"]
    print(f"{len({r['patient'] for r in recordings.values()})} patients, "
          f"{sum(len(r['events']) for r in recordings.values())} seizures, "
          f"{sum(r['seconds'] for r in recordings.values()) / 3600:.1f} h\n")
    systems = {}
    for row in held["rows"]:
        if row["fold"] in folds:
            systems.setdefault(row["system"], []).append(row)
    lines = [line_of(name, rows, recordings) for name, rows in systems.items()]
    judge.print_table(["", "folds", "seeds", "pooled", "patients", "within",
                       *(f"found at {rate}/h" for rate in ALARMS), "at the threshold (per h)",
                       "CPU min"], lines)
    print("\nAUROC of each fold")
    judge.print_table(["", *map(str, folds)], [[name, *of_folds(rows, recordings, folds)]
                                               for name, rows in systems.items()])


def of_folds(rows, recordings, folds):
    """AUROC of all seconds of each fold, mean over the seeds; "-" where a fold is not done."""
    for fold in folds:
        mine = [row for row in rows if row["fold"] == fold]
        found = [metrics.auroc(*pooled([row], recordings)[:2]) for row in mine]
        yield f"{np.mean(found):.3f}" if found else "-"


# ---- command line ----

def numbers(text):
    return [int(part) for part in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", help="imported recordings with labels")
    add("--out", default="real.json", help="file that results are added to")
    add("--systems", default=",".join(name.replace(",", ";") for name in SYSTEMS),
        help="comma-separated; a comma inside a name is written as ;")
    add("--folds", type=numbers, default=list(range(1, FOLDS + 1)))
    add("--seeds", type=numbers, default=[0])
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of V3's training")
    add("--label", default="", help="name of the row, of an ablation")
    add("--seizuretransformer", metavar="FOLDER", default="",
        help="its published time_step_level, see bench/model.py")
    add("--table", metavar="FILE", help="print the table of FILE")
    args = parser.parse_args()
    args.systems = [name.replace(";", ",") for name in args.systems.split(",")]
    if args.seizuretransformer:
        SYSTEMS["SeizureTransformer"] = functools.partial(fit_transformer, args.seizuretransformer)
    unknown = [name for name in args.systems if name not in SYSTEMS]
    if unknown or not (args.table or args.folder):
        parser.error(f"unknown system {unknown[0]}: {'; '.join(SYSTEMS)}" if unknown
                     else "give a FOLDER of imported recordings, or --table FILE")
    return args


def main():
    args = arguments()
    torch.set_num_threads(1)
    if args.table:
        table(args.table, args.folds)
    else:
        run_jobs(args)


if __name__ == "__main__":
    main()
