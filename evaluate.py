"""Score a seizure detector the way the field does, and write what it found as SzCORE events.

    python evaluate.py --checkpoint results/v3/checkpoints/best.pt --data OUT_OR_EDF [--plot]

OUT_OR_EDF is a folder made by `data.py import`, or one EDF or a folder of EDFs, which are prepared
the same way first. Each recording is scored once and whole. Training validates through the same
three functions:

    predict    model + recording -> one seizure probability per sample
    score      probability + labels -> a small record of counts, one per recording
    summarise  records of a set -> every metric in METRICS

Event and sample scores follow SzCORE (Dan et al., Epilepsia 2024) through the package timescoring:
events closer than 90 s are one, longer than 5 min are cut, a detection may come 30 s early and 60 s
late, counts are summed per patient and the scores averaged over patients. Sensitivity at a
false-alarm rate is by event too, pooled over the set. AUROC, average precision and calibration
error take one sample per second, its middle one: labels are no finer, and whole sets stay small
enough to rank exactly. The loss is binary cross-entropy over every sample, without class weights.

What cannot be computed is NaN in Python, null in scores.json (with the reason), and never counts as
best in training:

    without a labelled recording, or with a probability that is not finite: everything
    without a seizure: all but loss, calibration_error and false_alarms_per_24h
    without background: auroc and average_precision
    with too little background for one false alarm (24 h at 1 in 24 h), or where even a detector
    that is always on has few, as on clips around seizures: sensitivity at that rate

What a detector that is always on gets as event F1 stands beside the scores. A patient with neither
seizures nor detections has no F1, and one without detections no precision: left out of those means,
as SzCORE does. A set with seizures and nothing detected has precision 0.

Exit codes: 0 done, 1 a fault that may pass, 2 refused, 128+N stopped by signal N.
"""
from eeg import console

if __name__ == "__main__":
    console.begin("evaluate.py", "the evaluation")      # the imports below take seconds

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import model
from eeg import baseline, corpora, edf, splits
from eeg.disk import Refused, TemporaryFault, exists, fault, holds, write_json
from eeg.settings import CHANGES, Key, checked, defaults, override
from scoring import events, metrics, report
from scoring.files import STOPS, default_out, drawing, output, take_file, take_folder
from scoring.files import trade_off_picture, write, write_background, write_events
from scoring.metrics import METRICS

FS = edf.FS
DAY = (0, 86400)                        # seconds, or how often in them
WINDOW = (1 / FS, 3600)
SHARE = (0, 1)
# probability to events, in this order: smoothing, opening, closing, dropping, merging, cutting
KEYS = {
    "window_seconds": Key(60.0, "length of a window at inference; as in training", WINDOW, CHANGES),
    "overlap_seconds": Key(
        10.0, "shared by neighbouring windows, less than one; not given: a sixth of a window",
        (0, 3600), CHANGES),
    "batch_size": Key(8, "windows per call of the model", (1, 10**6), CHANGES),
    "smooth_seconds": Key(
        10.0, "moving mean of the probability, before all scores; 0 = none", DAY, CHANGES),
    "tune": Key(True, "validation picks the threshold, by event F1 on the dev set", None, CHANGES),
    "max_false_alarms_per_24h": Key(
        10.0, "among those with no more there, mean over patients", DAY, CHANGES),
    "threshold": Key(
        0.86, "an event begins at this probability, where none was tuned", SHARE, CHANGES),
    "release": Key(
        0.08, "it ends below threshold - release, at least threshold / 2", SHARE, CHANGES),
    "onset_seconds": Key(
        0.5, "the probability stays at the threshold to begin an event", DAY, CHANGES),
    "offset_seconds": Key(1.0, "and this long below the release level to end it", DAY, CHANGES),
    "opening_seconds": Key(0.043, "shorter events vanish, then", DAY, CHANGES),
    "closing_seconds": Key(0.121, "shorter gaps are filled, then", DAY, CHANGES),
    "min_duration_seconds": Key(3.0, "shorter events are dropped, then", DAY, CHANGES),
    "merge_gap_seconds": Key(2.0, "gaps up to this are closed, and last", DAY, CHANGES),
    "max_duration_seconds": Key(
        600.0, "longer events are cut into equal parts", (1 / FS, 86400), CHANGES),
}
DEFAULTS = defaults(KEYS)
# thresholds tried: even in log-odds, 0.018 to 0.999, and the default
GRID = np.unique([*1 / (1 + np.exp(-np.arange(-4, 7.01, 0.25))), DEFAULTS["threshold"]])
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def settings(config):
    """DEFAULTS overridden by `config` (the YAML section `evaluation`), or ValueError."""
    c = DEFAULTS | checked(config, KEYS, "evaluation")
    if "overlap_seconds" not in config:
        # a third of the jump in probability where windows meet, for 1.2 times the compute; more
        # overlap changes neither jump nor scores much (bench/overlap.py)
        c["overlap_seconds"] = c["window_seconds"] / 6
    if c["window_seconds"] - c["overlap_seconds"] < 1 / FS:
        raise ValueError(f"evaluation.overlap_seconds must be less than window_seconds "
                         f"{c['window_seconds']:g}, not {c['overlap_seconds']:g}")
    return c


def rules(config):
    """Short text that is equal where two metrics of one set of recordings are comparable: of the
    settings that decide them, and of the definitions in scoring/metrics.py."""
    c = settings(config)
    del c["batch_size"]
    text = json.dumps([metrics.DEFINITIONS, c], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- probability track ----

def read_ahead(recordings, config):
    """Iterator over the windows of `recordings`, one after the other as predict() takes them, read
    ahead by threads: no GPU waits for the next recording. Close it."""
    c = settings(config)
    windows = ((r, start) for r in recordings for start in _starts(r.samples, c))
    return data.read_ahead(windows, round(c["window_seconds"] * FS), 4 * c["batch_size"])


def predict(net, recording, device, config, precision="fp32", poll=None, windows=None):
    """Seizure probability of every sample: float32 (samples,) at 256 Hz, from windows read one
    batch at a time.

    The last window is moved back to end with the recording, so that each window is full of EEG as
    in training; samples it shares with its neighbour are averaged, weighted by their distance to
    the window's edge, where context ends. A recording shorter than a window is padded with zeros,
    again as in training. poll() is called before every call of the model and may raise to stop.
    windows: what read_ahead() gives, at the place of this recording, where several follow."""
    c = settings(config)
    if windows is None:
        with contextlib.closing(read_ahead([recording], c)) as windows:
            return predict(net, recording, device, c, precision, poll, windows)
    length = round(c["window_seconds"] * FS)
    samples = recording.samples
    starts = _starts(samples, c)
    ramp = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)).astype(np.float32)
    total = np.zeros(samples, np.float32)
    weight = np.zeros(samples, np.float32)
    with _evaluating(net):
        for i in range(0, len(starts), c["batch_size"]):
            if poll:
                poll()
            batch = starts[i:i + c["batch_size"]]
            eeg = np.stack([next(windows) for _ in batch])
            tracks = _probabilities(net, recording, eeg, device, precision)
            for start, track in zip(batch, tracks):
                n = min(length, samples - start)
                total[start:start + n] += ramp[:n] * track[:n]
                weight[start:start + n] += ramp[:n]
    np.minimum(np.divide(total, weight, out=total), 1, out=total)
    return events.smoothed(total, round(c["smooth_seconds"] * FS))


@contextlib.contextmanager
def _evaluating(net):
    """Every module in evaluation mode, and back in its own afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _starts(samples, c):
    """First sample of each window over a recording."""
    length = round(c["window_seconds"] * FS)
    step = length - round(c["overlap_seconds"] * FS)
    return [*range(0, samples - length, step), max(0, samples - length)]


@torch.no_grad()            # not inference_mode: a buffer cached there is of no use to training
def _probabilities(net, recording, eeg, device, precision):
    """Seizure probability float32 (B, T) of windows int16 (B, C, T) of a recording."""
    eeg = torch.from_numpy(eeg).to(device)
    scale = torch.as_tensor(recording.scale, dtype=torch.float32, device=device)
    # what the EEG is divided by is the model's own: of an older or another one its amplitude
    share = getattr(net, "baseline", 0.0)
    amplitude, gain = recording.reference(share) if share else (recording.norm, None)
    norm = torch.full((len(eeg),), float(amplitude), device=device)
    x = data.normalise(eeg, scale.expand(len(eeg), -1), norm)
    if share:
        x = baseline.equalise(x, torch.from_numpy(gain))
        # its filter rings on into the padding of a short recording, which stays 0
        x[..., recording.samples:] = 0
    with autocast(precision, torch.device(device)):
        logits = net(x)
    return torch.sigmoid(logits.float()).cpu().numpy()


def autocast(precision, device):
    """The arithmetic of a forward pass, in training too."""
    kind = PRECISIONS[precision]
    return torch.autocast(device.type, kind, enabled=kind is not None)


# ---- post-processing: probability -> events ----

def postprocess(probability, threshold, config):
    """Events of a probability track (samples,): int64 (N, 2), begin and end in samples, in order
    and apart, by the steps of KEYS. Splitting comes last, since merging would undo it."""
    return _events(probability, threshold, _in_samples(settings(config)))


def _in_samples(c):
    """The checked settings `c` with every duration in samples."""
    return {k: round(v * FS) if k.endswith("_seconds") else v for k, v in c.items()}


def _events(probability, threshold, c):
    """postprocess() with checked settings, durations in samples: scoring tries many thresholds."""
    off = max(threshold - c["release"], threshold / 2)
    found = events.hysteresis(probability, threshold, off, c["onset_seconds"], c["offset_seconds"])
    found = events.longer(found, c["opening_seconds"])
    found = events.merge(found, c["closing_seconds"] - 1)
    found = events.longer(found, c["min_duration_seconds"])
    found = events.merge(found, c["merge_gap_seconds"])
    return events.split(found, c["max_duration_seconds"])


# ---- record of one recording ----

def score(recording, probability, config):
    """The record of one recording: plain values and small tensors, about 18 kB per hour and 1 kB.
    Keys: recording, patient, seconds, labelled, finite; if labelled also seizures, what
    metrics.ground() gives, definitions, samples, loss (sum over them), thresholds (K,), counted
    (N names), counts (K, N) at each threshold, and probability float32 and label uint8 of the
    middle sample of every second."""
    c = settings(config)
    record = {
        "recording": recording.name,
        "patient": data.person(recording.patient),
        "seconds": float(recording.seconds),
        "labelled": bool(recording.labelled),
        "finite": bool(np.isfinite(probability).all()),
    }
    if not recording.labelled:
        return record
    label = recording.labels(0, recording.samples)
    truth = events.runs(label > 0) / FS
    thresholds = _thresholds(c)
    rows = _counts(truth, probability, thresholds, recording.seconds, c)
    middle = slice(FS // 2, None, FS)
    return record | {
        "seizures": len(truth),
        **metrics.ground(truth, recording.seconds),
        "definitions": metrics.DEFINITIONS,
        "samples": int(recording.samples),
        "loss": metrics.cross_entropy(probability, label),
        "thresholds": torch.from_numpy(thresholds),
        "counted": list(rows[0]),
        "counts": torch.tensor([list(row.values()) for row in rows]),
        "probability": torch.from_numpy(probability[middle].astype(np.float32)),
        "label": torch.from_numpy(label[middle].astype(np.uint8)),
    }


def _counts(truth, probability, thresholds, seconds, c):
    """metrics.count() of the events at each threshold."""
    known = {}
    lengths = _in_samples(c)
    rows = []
    for threshold in thresholds:
        found = _events(probability, threshold, lengths) / FS
        key = found.tobytes()
        if key not in known:                                # neighbouring thresholds often agree
            known[key] = metrics.count(truth, found, seconds)
        rows.append(known[key])
    return rows


def _thresholds(c):
    return np.unique([*GRID, c["threshold"]])


def _in_use(c):
    """Index of the threshold in use."""
    return int(np.searchsorted(_thresholds(c), c["threshold"]))


# ---- metrics of a set ----

def summarise(scores, config):
    """Every metric of METRICS as a float, the threshold that event and sample scores use, and their
    ground: recordings, hours, background_hours, seizures, patients, always_on_f1.

    scores: records of score(), in any order. With config["tune"] the threshold is the one with the
    best event F1 among those that keep to config["max_false_alarms_per_24h"] on these very
    recordings, so give it the dev set; where none keeps to it, the nearest (over_cap says so).
    Without, or where there is no seizure, it is config["threshold"]."""
    c = settings(config)
    records = sorted((s for s in scores if s["labelled"]), key=lambda s: s["recording"])
    thresholds = _thresholds(c)
    if any(not np.array_equal(s["thresholds"].numpy(), thresholds) for s in records):
        raise ValueError("the records were made with another evaluation.threshold: "
                         "score the recordings anew")
    result = dict.fromkeys(METRICS, math.nan)
    result["threshold"] = float(c["threshold"])
    result |= metrics.grounds(records)
    if not records or not all(s["finite"] for s in records):
        return result
    label = np.concatenate([s["label"].numpy() for s in records]) > 0
    probability = np.concatenate([s["probability"].numpy() for s in records])
    result["loss"] = sum(s["loss"] for s in records) / sum(s["samples"] for s in records)
    for name, (_, formula, _) in metrics.RANKED.items():
        result[name] = formula(probability, label)
    curves = metrics.over_patients(metrics.by_patient(records))
    index, why = _in_use(c), metrics.undefined(records)
    if c["tune"] and "event_f1" not in why:
        cap = c["max_false_alarms_per_24h"]
        index = metrics.best(curves["event_f1"], curves["false_alarms_per_24h"], cap)
        result["threshold"] = float(thresholds[index])
    result |= {name: float(values[index]) for name, values in curves.items()}
    # of the same thresholds whichever is in use: as in validation, where that was not tuned yet
    result |= metrics.at_false_alarms(records, np.isin(thresholds, GRID))
    if metrics.any_reference(records):
        for name in ("event_precision", "sample_precision"):
            if math.isnan(result[name]):                    # seizures, and nothing detected
                result[name] = 0.0
    return result | dict.fromkeys(why, math.nan)


def reusable(records, before, now):
    """Whether records that score() made under the settings `before` count under `now`."""
    thresholds = _thresholds(settings(now))
    return rules(before) == rules(now) and all(
        s.get("definitions") == metrics.DEFINITIONS
        and np.array_equal(s["thresholds"], thresholds) for s in records if s["labelled"])


def over_cap(summary, config):
    """A sentence where the tuned threshold of a summary does not keep to the cap, else ""."""
    c = settings(config)
    cap, alarms = c["max_false_alarms_per_24h"], summary["false_alarms_per_24h"]
    if not c["tune"] or not alarms > cap or math.isnan(summary["event_f1"]):
        return ""
    return (f"no threshold keeps to evaluation.max_false_alarms_per_24h {cap:g}: "
            f"the nearest, {summary['threshold']:.3f}, gives {alarms:.2f}")


# ---- command line ----

def load_model(path, device):
    """(detector on device, checkpoint dict) from any checkpoint of train.py, stripped or not."""
    try:
        state = checkpoint.load(path)
    except (FileNotFoundError, IsADirectoryError):
        raise Refused(f"checkpoint {path}: {_instead(Path(path))}") from None
    except OSError as error:
        raise fault(error, path, asked=f"checkpoint {path}") from None
    missing = [key for key in ("model", "config", "montage", "channels") if key not in state]
    if missing:
        raise Refused(f"checkpoint {path} lacks {', '.join(missing)}: give one written by train.py")
    try:
        net = model.build(len(state["channels"]), state["config"]["model"])
        net.load_state_dict(state["model"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise Refused(f"checkpoint {path} does not fit model.py: {why}") from None
    return net.to(device), state


def _instead(path):
    """Why a path is no checkpoint, and what to give instead of it, or of a run's folder."""
    for best in (path / "checkpoints" / "best.pt", path / "best.pt"):
        if best.is_file():
            return f"Is a directory; its best weights are {best}"
    if path.is_dir():
        return "Is a directory: give a checkpoint in it"
    why, folder = "No such file or directory", path.parent
    newest = checkpoint.find_resume(folder, lambda line: None) if folder.is_dir() else None
    if newest and path.name == "best.pt":
        why = "no validation has finished yet"
    return f"{why}; the newest weights are {newest}" if newest else why + console.elsewhere(path)


def stored(state, section):
    """One section of the checkpoint's config; {} where it is absent or empty."""
    value = state["config"].get(section) or {}
    if not isinstance(value, dict):
        raise Refused(f"the checkpoint's config holds no keys under {section}: {value!r}")
    return value


def stored_settings(state):
    """(evaluation settings, where the threshold is from). Never tuned on the scored set itself."""
    config = stored(state, "evaluation")
    scored = state.get("scores")
    tuned = scored.get("threshold") if isinstance(scored, dict) else None
    # a model of before the probability was smoothed has a threshold for what it was
    chosen = {"tune": False, "smooth_seconds": config.get("smooth_seconds", 0.0)}
    if tuned is not None:
        chosen["threshold"] = tuned
    try:
        c = settings(config | chosen)
    except ValueError as error:
        raise Refused(f"the checkpoint's settings: {error}") from None
    if tuned is None:
        return c, "evaluation.threshold of the config, since the checkpoint holds no tuned one"
    if not config.get("tune", DEFAULTS["tune"]):
        return c, "evaluation.threshold of the config"
    if math.isnan(scored.get("event_f1", 0)):
        return c, "evaluation.threshold of the config, since validation had no event F1 to tune by"
    source = "tuned on the dev set in training"
    if checkpoint.facts_of(state)["kind"] not in (None, "epoch") or len(scored) == 1:
        return c, f"{source} for other weights of the run: these were not validated"
    if "max_false_alarms_per_24h" not in config:            # tuned before there was a cap
        return c, source
    missed = over_cap({**dict.fromkeys(METRICS, math.nan), **scored}, config)
    if missed:
        return c, f"{source}: {missed}"
    score, cap = scored.get("event_f1", math.nan), c["max_false_alarms_per_24h"]
    return c, (f"{source}: event F1 {console.rounded(score, '.3f')} there, "
               f"at most {cap:g} false alarms per 24 h")


def overridden(c, source, args):
    """(settings, where the threshold is from, {key: value} of what the command line overrides)."""
    given = {}
    try:
        for text in args.set:
            section, name, value = override(text, "evaluation.key=value")
            if section != "evaluation":
                raise ValueError(f"--set {text}: write evaluation.key=value; "
                                 "other keys belong to training")
            if name in ("tune", "max_false_alarms_per_24h"):
                raise ValueError(f"--set {text}: acts in training, where the threshold is tuned; "
                                 "here give --threshold")
            given[name] = value
        if args.threshold is not None:
            given["threshold"] = args.threshold
        c = settings(c | given)
    except ValueError as error:
        raise Refused(str(error)) from None
    if "threshold" in given:
        source = "given on the command line"
    return c, source, {f"evaluation.{name}": c[name] for name in given}


def open_data(path, state, scratch, labels=corpora.LENIENT):
    """(recordings, corpora.Report, corpora.differs()) of an imported folder, or of EDF files
    prepared into `scratch`; of these, labels that cannot be used are none, or are not opened
    (corpora.NEVER)."""
    if not exists(os.path.realpath(path)):
        make = "" if path.suffix else f": {console.command('data.py', 'import', 'SRC', path)}"
        raise Refused(f"data {path} does not exist{console.elsewhere(path) or make}")
    if path.suffix == ".h5":
        raise Refused(f"data {path} is one recording of an import: give its folder, or its EDF")
    if path.is_file() or not holds(path, ".h5"):
        imported = _import(path, state, scratch, labels)
        recordings = data.open_corpus(scratch)
    else:
        recordings = data.open_corpus(path)
        imported = corpora.Report(refused=corpora.read_report(path))
        for line in splits.no_labels((r.name, r.unlabelled) for r in recordings if not r.labelled):
            print(line)
    for r in recordings:
        if r.montage != state["montage"] or list(r.channels) != list(state["channels"]):
            how = f"--montage {state['montage']}"
            if state["montage"] == "reduced":
                how += f" --channels {','.join(state['channels'])}"
            raise Refused(f"data {r.path}: {r.montage}, {len(r.channels)} channels "
                          f"({r.channels[0]} ...), but the checkpoint was trained on "
                          f"{state['montage']}, {len(state['channels'])} channels: "
                          f"import with {how}")
    differs = corpora.differs(recordings[0], path, state)
    if differs:
        print(f"evaluate.py: {differs}", file=sys.stderr)
    return recordings, imported, differs


def _import(path, state, scratch, labels):
    """Prepare one EDF or a folder of them into `scratch`; returns the corpora.Report."""
    if path.is_dir() and not holds(path, ".edf"):
        corpora.check_finished(path)
        raise Refused(f"data {path}: neither imported recordings (.h5) nor EDF files in it")
    # as the training's recordings were, their mains and units too
    recipe = corpora.recipe_of(state.get("prepared"), state["montage"], state["channels"])
    if recipe is None:
        reduced = state["channels"] if state["montage"] == "reduced" else ()
        recipe = edf.Recipe(state["montage"], reduced=tuple(reduced))
    report = corpora.import_corpus(
        path, scratch, montage=recipe.montage, notch=recipe.notch, blank_unit=recipe.blank_unit,
        channels=recipe.reduced, labels=labels)
    if not next(scratch.rglob("*.h5"), None):
        reasons = "; ".join(f"{file}: {why}" for file, why in report.refused[:3])
        if "--montage" in reasons:
            reasons += f"; this checkpoint reads montage {recipe.montage} alone"
        raise (TemporaryFault if report.passing else Refused)(f"no usable recording: {reasons}")
    return report


def choose(recordings, split, state, path=None):
    """(those of one split, a warning on them or ""): train and dev as the training drew them, eval
    as the corpus marks it, persons as it was told of them. path: the folder that they lie in, where
    the training may have used several."""
    config, warning = state["config"], ""
    if split in ("train", "dev"):
        try:
            seed = config["experiment"]["seed"]
            train, dev, divided = data.split_of(recordings, path, config["data"], seed)
        except (AttributeError, KeyError, TypeError):
            raise Refused("the checkpoint's config does not say how recordings were split: leave "
                          "--split away") from None
        except edf.DataError as error:
            raise Refused(f"--split {split}: {error}; or leave --split away") from None
        chosen = train
        if split == "dev":
            chosen, warning = dev, splits.WARNINGS.get(config["data"].get("split"), "")
        if any(state.get(key, value) != value for key, value in divided.items()):
            warning = splits.DIVIDED_ANEW
    else:
        data.join(recordings, stored(state, "data").get("same_person", ()), skip=True)
        chosen = [r for r in recordings if not split or r.split == split]
    if not chosen:
        raise Refused(f"no recording belongs to the split {split}: leave --split away")
    return chosen, warning


def includes_training(recordings, args, state):
    """Whether some of them trained, as far as that can be told: by their EEG or, where the folder
    of the training has moved, by the fingerprint of all of them."""
    if args.split:
        return args.split == "train"
    c, usable = stored(state, "data"), splits.usable(recordings)
    for folder in data.resolved(c.get("path", "")):
        with contextlib.suppress(edf.DataError, TemporaryFault, OSError):
            if splits.same_eeg(splits.usable(data.open_corpus(folder)), recordings):
                return True
    if c.get("split") == "time":        # the fingerprint is of the parts
        usable = sum(splits.split_time(usable, c["dev_fraction"]), [])
    return bool(usable) and data.fingerprint(usable) == state.get("data")


def evaluate(net, recordings, c, precision, out, plot, save):
    """Score recordings and write to the folder `out` their events, pictures as `plot` ("png", "pdf"
    or "") and with `save` probability tracks. Returns the records and the detections in each."""
    records, detections = [], []
    calls = sum(-(-len(_starts(r.samples, c)) // c["batch_size"]) for r in recordings)
    bar, plain = console.bar(calls, "evaluate", "batch"), console.Timer(30)
    with bar, contextlib.closing(read_ahead(recordings, c)) as windows:
        for r in recordings:
            bar.set_postfix_str(r.name[-40:], refresh=False)
            probability, found = detect(net, r, c, precision, bar.update, windows)
            records.append(score(r, probability, c))
            detections.append(len(found))
            write(r, probability, found, c, out, plot, save)
            if bar.disable and (len(records) == len(recordings) or plain.due()):
                print(f"evaluate: {len(records)} of {len(recordings)} recordings", file=sys.stderr)
    return records, detections


def detect(net, recording, c, precision, poll=None, windows=None):
    """(probability, events) of a recording, as predict() and postprocess() give them."""
    device = next(net.parameters()).device
    probability = predict(net, recording, device, c, precision, poll, windows)
    if not np.isfinite(probability).all():
        raise Refused(f"the model gives a probability that is not finite on {recording.name}")
    return probability, postprocess(probability, c["threshold"], c)


def scores(records, c, counted=()):
    """{metric: value} of some records at the threshold in use, None where not computable. counted:
    what metrics.by_patient() gives of one patient, for the values that enter the means."""
    summary = summarise(records, c)
    for row in counted:
        summary |= {name: float(values[_in_use(c)]) for name, values in row.items()}
    return {name: report.plain(summary[name]) for name in METRICS}


def tell(records, detections, c):
    """What scores.json says about the records: metrics at the top level, null with the reason where
    not computable; intervals and the trade-off over patients; each recording and each patient."""
    labelled = [s for s in records if s["labelled"]]
    ground = metrics.grounds(labelled)
    whole = scores(records, c)
    records = [s | {"detections": count} for s, count in zip(records, detections)]
    patients = metrics.of_each_patient(records)
    intervals, trade_off = {}, []
    if whole["event_f1"] is not None:
        counts = metrics.by_patient(labelled)
        trade_off = report.trade_off(counts, metrics.over_patients(counts), _thresholds(c))
        intervals = report.intervals_at(counts, metrics.COUNTED, _in_use(c))
    return {
        **whole,
        "not_computed": metrics.undefined(records),
        "intervals": intervals,
        "recordings": len(records),
        "hours": sum(s["seconds"] for s in records) / 3600,
        "patients": len(patients),
        **{f"labelled_{key}": ground[key] for key in ("recordings", "hours", "patients")},
        "background_hours": ground["background_hours"],
        "seizures": ground["seizures"] if labelled else None,       # nothing is known, not 0
        "always_on_f1": report.plain(ground["always_on_f1"]),
        "trade_off": trade_off,
        "per_patient": [_row(mine, c, recordings=len(mine)) for mine in patients],
        "per_recording": [_row([s], c, recording=s["recording"]) for s in records],
    }


def _row(records, c, **names):
    """A row of scores.json, named by `names`: of one patient's records, with their detections."""
    labelled = [s for s in records if s["labelled"]]
    return names | {
        "patient": records[0]["patient"],
        "seconds": sum(s["seconds"] for s in records),
        "seizures": sum(s["seizures"] for s in labelled) if labelled else None,
        "detections": sum(s["detections"] for s in records),
        **scores(records, c, metrics.by_patient(labelled)),
    }


def parse(argv):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, type=console.typed,
        help="best.pt, any other checkpoint, or a stripped one")
    add("--data", required=True, type=console.typed,
        help="imported folder, folder of EDFs, or one EDF; EDFs are prepared below TMPDIR, 35 MB "
             "an hour of 19 channels")
    add("--out", type=console.typed,
        help="default: `evaluation` in the run directory, or beside stripped weights")
    add("--events", type=console.typed, metavar="FILE",
        help="write the events of one EDF to this file, and nothing else without --out, --plot, "
             "--pdf or --save-probabilities; where the EDF is refused, one row of background, said "
             "on stderr")
    add("--threshold", type=float, help="instead of the one that training tuned")
    add("--set", action="append", default=[], metavar="evaluation.key=value",
        help="instead of what training stored, such as evaluation.overlap_seconds=15")
    add("--precision", choices=PRECISIONS, help="default: that of the training")
    add("--plot", action="store_const", const="png", default="",
        help="a PNG per recording, and the trade-off")
    add("--pdf", action="store_const", const="pdf", dest="plot",
        help="the same as PDF, to print: each page of EEG on a page of its own")
    add("--save-probabilities", action="store_true",
        help="NAME_probability.npy per recording: float32 (samples,) at 256 Hz")
    add("--split", choices=("train", "dev", "eval"), help="only these recordings; default all")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto, the default: a GPU where torch sees one")
    return parser.parse_args(argv)


def is_out_of_memory(error):
    """On a GPU torch's allocator has a class for it; CUDA and its libraries, and on a CPU torch,
    oneDNN and the loader of a library that is imported late, only say so."""
    said = ("DefaultCPUAllocator", "could not create a primitive", "failed to map segment",
            "CUDA error: out of memory", "ALLOC_FAILED")
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or any(text in str(error) for text in said))


def exact_fp32():
    """What is called fp32 is fp32, no TF32: scans, edges, last products and short convolutions.
    torch's default is that for products, not for the convolutions of cuDNN."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def prepare(args):
    """(net, checkpoint, settings, what scores.json says about them) as the command line asks."""
    exact_fp32()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda, but torch sees no GPU")
    gpu = args.device != "cpu" and torch.cuda.is_available()
    net, state = load_model(args.checkpoint, torch.device("cuda" if gpu else "cpu"))
    c, source, changed = overridden(*stored_settings(state), args)
    precision = stored(state, "training").get("precision", "fp32")
    if args.precision and args.precision != precision:
        precision = args.precision
        changed["precision"] = precision
    if precision not in PRECISIONS:
        raise Refused(f"the checkpoint's precision is {precision!r}: give --precision")
    return net, state, c, {
        "threshold": c["threshold"],
        "threshold_source": source,
        "overridden": changed,
        "precision": precision,
        "settings": c,
        "checkpoint": str(args.checkpoint),
        "scorer": {
            "name": "timescoring",
            "version": importlib.metadata.version("timescoring"),
            "rules": "SzCORE by event and sample, mean over patients; "
                     "sensitivity_at by event, pooled",
        },
    }


def score_folder(args):
    """Score as the command line asks and write the folder --out; returns the exit code."""
    net, state, c, about = prepare(args)
    out = args.out or default_out(args.checkpoint, state)
    with tempfile.TemporaryDirectory(prefix="prepared_", ignore_cleanup_errors=True) as scratch:
        recordings, imported, differs = open_data(args.data, state, Path(scratch))
        recordings, warning = choose(recordings, args.split, state, args.data)
        with take_folder(out, recordings, args.data):
            records, detections = evaluate(net, recordings, c, about["precision"], out, args.plot,
                                           args.save_probabilities)
            result = tell(records, detections, c) | about | {
                "data": str(args.data),
                "eeg": splits.division(recordings, []),
                "corpus_version": "; ".join(sorted({r.release for r in recordings} - {""})),
                "split": args.split or "all",
                "includes_training": includes_training(recordings, args, state),
                "split_warning": warning,
                "preparation_warning": differs,
                "refused": imported.refused,
            }
            write_json(out / "scores.json", result, indent=2)
            if args.plot and result["trade_off"]:
                with drawing() as pictures:
                    pictures.trade_off(result["trade_off"], c["threshold"],
                                       trade_off_picture(out, recordings, args.plot))
    report.show(result, list(METRICS), out)
    if args.plot:
        print(f"pictures: {output(out, recordings[0], '.' + args.plot)}"
              + (f" and {len(recordings) - 1} more" if len(recordings) > 1 else ""))
    unread = imported.passing and "not all files could be read this time: see refused; exit code 1"
    for line in filter(None, (warning, differs, unread)):
        print(f"warning: {line}")
    return int(imported.passing)


def score_one(args):
    """The events of one EDF in the one file --events. A benchmark counts a missing file as nothing
    found: an EDF that the import refuses gets one row of background."""
    net, state, c, about = prepare(args)
    take_file(args.events, args.data)
    with tempfile.TemporaryDirectory(prefix="prepared_", ignore_cleanup_errors=True) as scratch:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                # what labels say must not change a prediction, nor keep it from being made
                recordings, *_ = open_data(args.data, state, Path(scratch), corpora.NEVER)
        except (Refused, edf.DataError) as refusal:
            seconds = write_background(args.events, args.data)
            print(f"evaluate.py: {refusal}: written as {seconds:g} s of background: {args.events}",
                  file=sys.stderr)
            return
        r = recordings[0]
        probability, found = detect(net, r, c, about["precision"])
    write_events(args.events, found, probability, r)
    print(f"{console.how_many(len(found), 'detection')} in {r.seconds:.0f} s: {args.events}")


def main(argv=None):
    args = parse(argv)
    try:
        if args.events:
            score_one(args)
        if not args.events or args.out or args.plot or args.save_probabilities:
            return score_folder(args)
        return 0
    except (data.ReadFailed, TemporaryFault, OSError) as error:     # may pass: not bad data
        code, line = 1, f"stopped: {' '.join(str(error).split())}"
    except (Refused, edf.DataError, checkpoint.CorruptCheckpoint) as error:
        code, line = 2, str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, line = 1, ("stopped: out of memory: --set evaluation.batch_size=1 takes least, "
                         "--device cpu nothing of a GPU")
    print(f"evaluate.py: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    console.install()
    came = {}

    def stop(number, frame):
        # whoever presses twice does not keep the prepared EDFs from being removed
        if not came or time.monotonic() - max(came.values()) > 1:
            came[number] = time.monotonic()
            raise KeyboardInterrupt
    try:
        # any of them ends in order: killed at once, it would leave the prepared EDFs in /tmp
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, stop)
        sys.exit(main())
    except KeyboardInterrupt:           # not in main: on Modal it means preemption
        print("evaluate.py: interrupted: events written so far stay, scores.json is not written",
              file=sys.stderr)
        sys.exit(128 + [signal.SIGINT, *came][-1])
