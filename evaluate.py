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
false-alarm rate uses the plain any-overlap rule, pooled over the set. AUROC, average precision and
calibration error take one sample per second, its middle one: labels are no finer, and whole sets
stay small enough to rank exactly. The loss is binary cross-entropy over every sample, without class
weights.

What cannot be computed is NaN in Python, null in scores.json (with the reason), and never counts as
best in training: without a labelled recording, everything; without a seizure, all but loss,
calibration_error and false_alarms_per_24h; without background, auroc and average_precision; with a
probability that is not finite, everything. A patient with neither seizures nor detections has no
F1, and one without detections no precision: left out of those means, as SzCORE does. A set with
seizures and nothing detected has precision 0.
"""
import argparse
import contextlib
import difflib
import importlib.metadata
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from timescoring.annotations import Annotation
from timescoring.scoring import EventScoring, SampleScoring
from tqdm import tqdm

import checkpoint
import corpora
import data
import edf
import model
import splits

FS = edf.FS


# ---- counted metrics: formulas over counts of events or samples, arrays over the thresholds ----

def _sensitivity(n, kind):
    return _ratio(n[f"{kind}_tp"], n[f"{kind}_true"])


def _precision(n, kind):
    return _ratio(n[f"{kind}_tp"], n[f"{kind}_tp"] + n[f"{kind}_fp"])


def _f1(n, kind):
    """2 TP / (2 TP + FP + FN); NaN only where there is neither a reference nor a detection."""
    return _ratio(2 * n[f"{kind}_tp"], n[f"{kind}_tp"] + n[f"{kind}_fp"] + n[f"{kind}_true"])


def _per_24h(n, kind):
    return n[f"{kind}_fp"] / (n["seconds"] / 86400)


def _ratio(a, b):
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


# name -> what is better, formula, of which counts of a patient
COUNTED = {
    "event_f1": ("max", _f1, "event"),
    "event_sensitivity": ("max", _sensitivity, "event"),
    "event_precision": ("max", _precision, "event"),
    "false_alarms_per_24h": ("min", _per_24h, "event"),
    "sample_f1": ("max", _f1, "sample"),
    "sample_sensitivity": ("max", _sensitivity, "sample"),
    "sample_precision": ("max", _precision, "sample"),
}
FALSE_ALARMS = (10, 5, 2.5, 1)          # per 24 h, at which the share of seizures found is given
METRICS = {                             # name -> what is better
    "loss": "min",
    "auroc": "max",
    "average_precision": "max",
    "calibration_error": "min",   # expected error over 10 equal bins (Guo et al., ICML 2017)
    **{name: better for name, (better, _, _) in COUNTED.items()},
    **{f"sensitivity_at_{limit:g}fa": "max" for limit in FALSE_ALARMS},
}
ALWAYS = ("loss", "calibration_error", "false_alarms_per_24h")      # computable without a seizure
RANKING = ("auroc", "average_precision")                            # need background too
DEFAULTS = {
    "window_seconds": 60.0,       # length of a window at inference; as in training
    "overlap_seconds": 0.0,       # shared by neighbouring windows, which are weighted and added
    "batch_size": 8,              # windows per call of the model
    "tune": True,                 # validation picks the threshold, on the dev set
    "threshold": 0.86,            # an event begins at this probability, where none was tuned
    "release": 0.08,              # it ends below threshold - release, at least threshold / 2
    "onset_seconds": 0.5,         # the probability stays at the threshold to begin an event
    "offset_seconds": 1.0,        # and this long below the release level to end it
    "opening_seconds": 0.043,     # shorter events vanish, then
    "closing_seconds": 0.121,     # shorter gaps are filled, then
    "min_duration_seconds": 3.0,  # shorter events are dropped, then
    "merge_gap_seconds": 2.0,     # gaps up to this are closed, and last
    "max_duration_seconds": 600.0, # longer events are cut into equal parts
}
# thresholds tried: even in log-odds, 0.018 to 0.999
GRID = 1 / (1 + np.exp(-np.arange(-4, 7.01, 0.25)))
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_metric(name, recordings=None):
    """Raise ValueError unless `name` is in METRICS and, where recordings are given, computable
    on them."""
    if name not in METRICS:
        near = difflib.get_close_matches(str(name).lower(), METRICS, 1, 0.0)[0]
        raise ValueError(f"unknown metric {name!r}; the nearest is {near}")
    if recordings is None:
        return
    labelled = [r for r in recordings if r.labelled]
    seizure = sum(float((r.events[:, 1] - r.events[:, 0]).sum()) for r in labelled)
    total = sum(r.seconds for r in labelled)
    why = _undefined(bool(labelled), seizure > 0, seizure < total).get(name)
    if why:
        raise ValueError(f"{name} cannot be computed on these recordings: {why}")


def settings(config):
    """DEFAULTS overridden by `config` (the YAML section `evaluation`), checked. Raises
    ValueError."""
    unknown = sorted(set(config) - set(DEFAULTS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], DEFAULTS, 1, 0.0)[0]
        raise ValueError(f"unknown key evaluation.{unknown[0]}; the nearest is evaluation.{near}")
    c = {**DEFAULTS, **config}
    limits = {name: (0, 86400) for name in DEFAULTS if name.endswith("_seconds")}
    limits |= {
        "threshold": (0, 1),
        "release": (0, 1),
        "batch_size": (1, math.inf),
        "window_seconds": (1 / FS, 3600),
        "overlap_seconds": (0, c["window_seconds"] - 1 / FS),
        "max_duration_seconds": (1 / FS, 86400),
    }
    for name, (low, high) in limits.items():
        if not low <= c[name] <= high:
            raise ValueError(f"evaluation.{name} must lie between {low:g} and {high:g}, "
                             f"not {c[name]}")
    return c


def _in_samples(config):
    """The checked settings with every duration in samples."""
    c = settings(config)
    return {k: round(v * FS) if k.endswith("_seconds") else v for k, v in c.items()}


# ---- probability track ----

def read_ahead(recordings, config):
    """Iterator over the windows of `recordings`, one after the other as predict() takes them, read ahead
    by threads: no GPU waits for the next recording. Close it."""
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
    return np.minimum(np.divide(total, weight, out=total), 1)


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
    norm = torch.full((len(eeg),), float(recording.norm), device=device)
    x = data.normalise(eeg, scale.expand(len(eeg), -1), norm)
    kind = PRECISIONS[precision]
    with torch.autocast(torch.device(device).type, kind, enabled=kind is not None):
        logits = net(x)
    return torch.sigmoid(logits.float()).cpu().numpy()


# ---- post-processing: probability -> events ----

def _runs(mask):
    """Begin and end (exclusive) of each run of True: int64 (N, 2)."""
    padded = np.concatenate([[False], mask, [False]])
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)


def _hysteresis(probability, on, off, onset, offset):
    """Runs that begin with `onset` samples >= on and end where `offset` samples < off begin:
    int64 (N, 2)."""
    high = _runs(probability >= on)
    low = _runs(~(probability >= off))                      # NaN ends an event
    begin = high[high[:, 1] - high[:, 0] >= max(1, onset), 0]
    end = low[low[:, 1] - low[:, 0] >= max(1, offset), 0]
    # all marks in order of time; only the first of several begins, or of several ends, counts
    marks = np.concatenate([begin, end])
    order = np.argsort(marks)
    marks = marks[order]
    begins = order < len(begin)
    inside = np.append(False, begins)[:-1]                  # the mark before it was a begin
    first = marks[begins & ~inside]
    last = marks[~begins & inside]
    if len(last) < len(first):                              # the recording ends within an event
        last = np.append(last, len(probability))
    return np.stack([first, last], 1).astype(np.int64)


def _merge(events, gap):
    """Join neighbours whose gap is at most `gap` samples."""
    if len(events) < 2:
        return events
    apart = events[1:, 0] - events[:-1, 1] > gap
    begin = events[np.append(True, apart), 0]
    end = events[np.append(apart, True), 1]
    return np.stack([begin, end], 1)


def _longer(events, shortest):
    return events[events[:, 1] - events[:, 0] >= shortest]


def _split(events, longest):
    """Cut events into the fewest equal parts that are no longer than `longest` samples."""
    length = events[:, 1] - events[:, 0]
    parts = -(-length // longest)
    which = np.repeat(np.arange(len(events)), parts)        # the event of each part
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)     # within it
    begin = events[which, 0] + length[which] * number // parts[which]
    end = events[which, 0] + length[which] * (number + 1) // parts[which]
    return np.stack([begin, end], 1)


def postprocess(probability, threshold, config):
    """Events of a probability track (samples,): int64 (N, 2), begin and end in samples, in order
    and apart.

    Opening and closing of a binary track drop its runs and fill its gaps that are shorter than the
    element. Splitting comes last, since merging would undo it."""
    c = _in_samples(config)
    off = max(threshold - c["release"], threshold / 2)
    events = _hysteresis(probability, threshold, off, c["onset_seconds"], c["offset_seconds"])
    events = _longer(events, c["opening_seconds"])
    events = _merge(events, c["closing_seconds"] - 1)
    events = _longer(events, c["min_duration_seconds"])
    events = _merge(events, c["merge_gap_seconds"])
    return _split(events, c["max_duration_seconds"])


# ---- record of one recording ----

def score(recording, probability, config):
    """The record of one recording: plain values and small tensors, about 18 kB per hour and 1 kB.

    Keys: recording, patient, seconds, labelled, finite; if labelled also seizures, samples, loss
    (sum over them), thresholds (K,), counted (N names), counts (K, N) at each threshold, and
    probability float32 and label uint8 of the middle sample of every second."""
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
    truth = _runs(label > 0) / FS
    thresholds = _thresholds(c)
    rows = []
    known = {}
    for threshold in thresholds:
        events = postprocess(probability, threshold, c) / FS
        key = events.tobytes()
        if key not in known:                                # neighbouring thresholds often agree
            known[key] = _count(truth, events, recording.seconds)
        rows.append(known[key])
    counted = list(rows[0])
    counts = [[row[name] for name in counted] for row in rows]
    middle = slice(FS // 2, None, FS)
    return record | {
        "seizures": len(truth),
        "samples": int(recording.samples),
        "loss": _cross_entropy(probability, label),
        "thresholds": torch.from_numpy(thresholds),
        "counted": counted,
        "counts": torch.tensor(counts),
        "probability": torch.from_numpy(probability[middle].astype(np.float32)),
        "label": torch.from_numpy(label[middle].astype(np.uint8)),
    }


def _thresholds(c):
    return np.unique(np.append(GRID, c["threshold"]))


def _count(truth, events, seconds):
    """{name: int}: counts of events against the truth, both (N, 2) in seconds. A new count is one
    more row here, and a formula of it one more in COUNTED."""
    tenths = max(10, round(seconds * 10))       # timescoring works at 10 Hz, by sample at 1 Hz
    reference = Annotation([tuple(event) for event in truth.tolist()], 10, tenths)
    found = Annotation([tuple(event) for event in events.tolist()], 10, tenths)
    by_event = EventScoring(reference, found)
    by_sample = SampleScoring(reference, found)
    before = truth[:, None, 0] < events[None, :, 1]
    after = events[None, :, 0] < truth[:, None, 1]
    overlap = before & after                                # (true, detected)
    counts = {
        "event_tp": by_event.tp,
        "event_fp": by_event.fp,
        "event_true": by_event.refTrue,         # after the scorer's own merging and cutting
        "sample_tp": by_sample.tp,
        "sample_fp": by_sample.fp,
        "sample_true": by_sample.refTrue,
        "found": overlap.any(1).sum(),          # seizures that any detection touches
        "alarms": (~overlap.any(0)).sum(),      # detections that touch none
    }
    return {name: int(value) for name, value in counts.items()}


def _cross_entropy(probability, label, block=1 << 20):
    """Sum over the samples, a block at a time: float64 copies of a whole day would be large."""
    total = 0.0
    for i in range(0, len(label), block):
        p = probability[i:i + block].astype(np.float64)
        p = np.clip(p, 1e-7, 1 - 1e-7)                      # float32 saturates
        total -= float(np.log(np.where(label[i:i + block] > 0, p, 1 - p)).sum())
    return total


# ---- metrics of a set ----

def summarise(scores, config):
    """Every metric of METRICS as a float, and the threshold that event and sample scores use.

    scores: records of score(), in any order. With config["tune"] the threshold is the one with the
    best event F1 on these very recordings, so give it the dev set; without, or where there is no
    seizure, it is config["threshold"]."""
    c = settings(config)
    records = sorted((s for s in scores if s["labelled"]), key=lambda s: s["recording"])
    thresholds = _thresholds(c)
    if any(not np.array_equal(s["thresholds"].numpy(), thresholds) for s in records):
        raise ValueError("the records were made with another evaluation.threshold: "
                         "score the recordings anew")
    result = dict.fromkeys(METRICS, math.nan)
    result["threshold"] = float(c["threshold"])
    if not records or not all(s["finite"] for s in records):
        return result
    label = np.concatenate([s["label"].numpy() for s in records]) > 0
    probability = np.concatenate([s["probability"].numpy() for s in records])
    result["loss"] = sum(s["loss"] for s in records) / sum(s["samples"] for s in records)
    result["auroc"], result["average_precision"] = _ranking(probability, label)
    result["calibration_error"] = _calibration_error(probability, label)
    curves = _over_patients(records)
    index = int(np.searchsorted(thresholds, c["threshold"]))
    if c["tune"] and any(s["seizures"] for s in records):
        index = _best(curves["event_f1"], curves["false_alarms_per_24h"])
        result["threshold"] = float(thresholds[index])
    result |= {name: float(values[index]) for name, values in curves.items()}
    result |= _at_false_alarms(records)
    if _any_reference(records):
        for name in ("event_precision", "sample_precision"):
            if math.isnan(result[name]):                    # seizures, and nothing detected
                result[name] = 0.0
    return result | dict.fromkeys(undefined(records), math.nan)


def undefined(scores):
    """{metric: reason} of the metrics that these records cannot give."""
    records = [s for s in scores if s["labelled"]]
    if any(not s["finite"] for s in records):
        return dict.fromkeys(METRICS, "the model gave a probability that is not finite")
    background = any((s["label"] == 0).any() for s in records)
    return _undefined(bool(records), _any_reference(records), background)


def _undefined(labelled, seizure, background):
    if not labelled:
        return dict.fromkeys(METRICS, "no recording is labelled")
    why = {}
    if not background:
        why |= dict.fromkeys(RANKING, "there is no background")
    if not seizure:
        why |= {name: "there is no seizure" for name in METRICS if name not in ALWAYS}
    return why


def _any_reference(records):
    """Whether the scorer sees a seizure: one below a tenth of a second may vanish at its 10 Hz."""
    return any(_summed([s])["event_true"].any() for s in records)


def _summed(records):
    """Counts of some records together, by name: {name: (K,)}, and their seconds."""
    total = {"seconds": sum(s["seconds"] for s in records)}
    for s in records:
        for name, values in zip(s["counted"], s["counts"].numpy().T):
            total[name] = total.get(name, 0) + values
    return total


def _over_patients(records):
    """COUNTED at each threshold, {name: (K,)}: summed over each patient's recordings, then
    averaged."""
    patients = {}
    for s in records:
        patients.setdefault(s["patient"], []).append(s)
    counts = [_summed(patients[patient]) for patient in sorted(patients)]
    return {name: _mean([formula(n, kind) for n in counts])
            for name, (_, formula, kind) in COUNTED.items()}


def _mean(rows):
    """Mean over patients of those that have a value; NaN where none has."""
    rows = np.stack(rows)
    return _ratio(np.nansum(rows, 0), (~np.isnan(rows)).sum(0))


def _best(f1, alarms):
    """Index of the highest F1; among equals the fewest false alarms; among those the middle one."""
    ties = np.flatnonzero(f1 >= np.nanmax(f1) - 1e-12)
    ties = ties[alarms[ties] <= alarms[ties].min() + 1e-12]
    return int(ties[len(ties) // 2])


def _at_false_alarms(records):
    """Any-overlap sensitivity of the best threshold within each false-alarm rate; 0 if none is."""
    n = _summed(records)
    rate = n["alarms"] / (n["seconds"] / 86400)
    share = n["found"] / max(1, sum(s["seizures"] for s in records))
    return {f"sensitivity_at_{limit:g}fa": float(share[rate <= limit].max(initial=0))
            for limit in FALSE_ALARMS}


def _ranking(probability, label):
    """AUROC (the Mann-Whitney statistic, ties half) and average precision (the sum over steps of
    recall)."""
    positive = int(label.sum())
    negative = len(label) - positive
    if not positive or not negative:
        return math.nan, math.nan
    rank = float(rankdata(probability)[label].sum())
    auroc = (rank - positive * (positive + 1) / 2) / positive / negative
    order = np.argsort(-probability, kind="stable")
    changes = np.flatnonzero(np.diff(probability[order]))
    last = np.append(changes, len(order) - 1)           # ties count at once, with the last of them
    hits = np.cumsum(label[order])[last]
    precision = hits / (last + 1)
    gained = np.diff(hits, prepend=0)
    return auroc, float((gained * precision).sum() / positive)


def _calibration_error(probability, label, bins=10):
    if not len(label):
        return math.nan
    which = np.minimum((probability * bins).astype(int), bins - 1)
    expected = np.bincount(which, probability.astype(np.float64), bins)
    observed = np.bincount(which, label.astype(np.float64), bins)
    return float(np.abs(expected - observed).sum() / len(label))


# ---- command line ----

class Refused(Exception):
    """Bad usage, checkpoint or data. One line; exit code 2."""


def load_model(path, device):
    """(detector on device, checkpoint dict) from any checkpoint of train.py, stripped or not."""
    try:
        state = checkpoint.load(path)
    except OSError as error:
        raise Refused(f"checkpoint {path}: {error.strerror}") from None
    missing = [key for key in ("model", "config", "montage", "channels") if key not in state]
    if missing:
        raise Refused(f"checkpoint {path} lacks {', '.join(missing)}: give one written by train.py")
    try:
        net = model.build(len(state["channels"]), state["config"]["model"])
        net.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise Refused(f"checkpoint {path} does not fit model.py: {why}") from None
    return net.to(device), state


def stored_settings(state):
    """(evaluation settings, where the threshold is from). Never tuned on the scored set itself."""
    config = state["config"].get("evaluation", {})
    tuned = state.get("scores", {}).get("threshold")
    chosen = {"tune": False}
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
    return c, "tuned on the dev set in training"


def open_data(path, state, scratch):
    """(recordings, [(file, why)] refused) of an imported folder, or of EDF files prepared into
    `scratch`."""
    path = Path(path)
    refused = []
    if not path.exists():
        raise Refused(f"data {path} does not exist")
    if path.is_file() or not next(path.rglob("*.h5"), None):
        refused = _import(path, state["montage"], scratch)
        path = scratch
    recordings = data.open_corpus(path)
    for r in recordings:
        if r.montage != state["montage"] or list(r.channels) != list(state["channels"]):
            raise Refused(f"data {r.path}: {r.montage}, {len(r.channels)} channels, but the "
                          f"checkpoint was trained on {state['montage']}, "
                          f"{len(state['channels'])} channels: "
                          f"import with --montage {state['montage']}")
    return recordings, refused


def _import(path, montage, scratch):
    """Prepare one EDF or a folder of them into `scratch`; returns [(file, why)] refused."""
    if path.is_dir() and not any(p.suffix.lower() == ".edf" for p in path.rglob("*")):
        raise Refused(f"data {path}: neither imported recordings (.h5) nor EDF files in it")
    refused = corpora.import_corpus(path, scratch, montage=montage).refused
    if not next(scratch.rglob("*.h5"), None):
        reasons = "; ".join(f"{file}: {why}" for file, why in refused[:3])
        raise Refused(f"no usable recording: {reasons}")
    return refused


def choose(recordings, split, config, path=None):
    """Those of one split: train and dev as the training drew them, eval as the corpus marks it.
    path: the folder that they are of, which may be one of several that were trained on."""
    if split in ("train", "dev"):
        c = config["data"]
        folder = _among_several(path, c.get("path"))
        if folder:
            recordings = data.open_corpora(c["path"], c.get("same_person", ()))
        train, dev = splits.split(recordings, c, config["experiment"]["seed"])
        part = train if split == "train" else dev
        return [r for r in part if not folder or r.corpus == folder]
    chosen = [r for r in recordings if not split or r.split == split]
    if not chosen:
        raise Refused(f"no recording belongs to the split {split}")
    return chosen


def _among_several(path, trained_on):
    """Name of the folder `path` where a list of folders that were trained on holds it, else ""."""
    if path is None or not isinstance(trained_on, list):
        return ""
    place = Path(path).resolve()
    return place.name if place in [Path(folder).resolve() for folder in trained_on] else ""


def write_events(path, events, probability, seconds):
    """SzCORE events file of events (N, 2) in samples; confidence is the mean probability inside."""
    confidence = [probability[begin:end].mean() for begin, end in events]
    edf.write_events_tsv(path, events / FS, seconds, confidence)


def evaluate(net, recordings, out, device, c, plot=False):
    """Score recordings, write events and pictures under `out`; returns records and a table."""
    records = []
    table = []
    calls = sum(-(-len(_starts(r.samples, c)) // c["batch_size"]) for r in recordings)
    ahead = contextlib.closing(read_ahead(recordings, c))
    with tqdm(total=calls, unit="batch", desc="evaluate") as bar, ahead as windows:
        for r in recordings:
            bar.set_postfix_str(r.name[-40:], refresh=False)
            probability = predict(net, r, device, c, poll=bar.update, windows=windows)
            if not np.isfinite(probability).all():
                raise Refused(f"the model gives a probability that is not finite on {r.name}")
            records.append(score(r, probability, c))
            events = postprocess(probability, c["threshold"], c)
            stem = out / r.name.removesuffix("_eeg")
            write_events(stem.with_name(stem.name + "_events.tsv"), events, probability, r.seconds)
            if plot:
                import pictures             # here: matplotlib takes a second to import
                picture = stem.with_name(stem.name + ".png")
                pictures.draw(r, probability, events, c["threshold"], picture)
            table.append({
                "recording": r.name,
                "patient": r.patient,
                "seconds": r.seconds,
                "seizures": len(r.events) if r.labelled else None,
                "detections": len(events),
            })
    return records, table


def report(records, table, c, source, args, trained_on=""):
    """Content of scores.json: metrics at the top level, null with the reason if not computable."""
    summary = summarise(records, c)
    labelled = [s for s in records if s["labelled"]]
    folders = trained_on if isinstance(trained_on, list) else [trained_on]
    places = [Path(folder).resolve() for folder in folders if folder]
    same = Path(args.data).resolve() in places
    return {
        **{name: None if math.isnan(summary[name]) else summary[name] for name in METRICS},
        "not_computed": undefined(records),
        "threshold": c["threshold"],
        "threshold_source": source,
        "scorer": {
            "name": "timescoring",
            "version": importlib.metadata.version("timescoring"),
            "rules": "SzCORE by event and sample, mean over patients; "
                     "any overlap for sensitivity_at",
        },
        "recordings": len(records),
        "hours": sum(s["seconds"] for s in records) / 3600,
        "labelled_recordings": len(labelled),
        "labelled_hours": sum(s["seconds"] for s in labelled) / 3600,
        "patients": len({s["patient"] for s in records}),
        "seizures": sum(s["seizures"] for s in labelled),
        "checkpoint": str(args.checkpoint),
        "data": str(args.data),
        "split": args.split or "all",
        "includes_training": args.split == "train" or not args.split and same,
        "settings": c,
        "per_recording": table,
    }


def show(result, out):
    detections = sum(row["detections"] for row in result["per_recording"])
    print(f"{result['recordings']} recordings, {result['hours']:.2f} h, "
          f"{result['patients']} patients, {result['seizures']} labelled seizures, "
          f"{detections} detections")
    print(f"threshold {result['threshold']:.3f}: {result['threshold_source']}")
    if result["labelled_recordings"]:
        for name in METRICS:
            if result[name] is None:
                print(f"  {name:<22} -  ({result['not_computed'][name]})")
            else:
                print(f"  {name:<22} {result[name]:.4f}")
    if result["includes_training"]:
        print("these recordings include those of the training: "
              "--split dev or --split eval leaves them out")
    for file, why in result["refused"]:
        print(f"not scored: {file}: {why}")
    print(f"events and scores.json in {out}")


def parse(argv):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path,
        help="best.pt, any other checkpoint, or a stripped one")
    add("--data", required=True, type=Path, help="imported folder, folder of EDFs, or one EDF")
    add("--out", type=Path, help="default: `evaluation` in the run directory of the checkpoint")
    add("--plot", action="store_true", help="a PNG per recording")
    add("--split", choices=("train", "dev", "eval"), help="only these recordings; default all")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.out is None:
        folder = args.checkpoint.absolute().parent
        run = folder.parent if folder.name == "checkpoints" else folder
        args.out = run / "evaluation"
    return args


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {path}: {error.strerror}") from None


def run(args):
    """Score as the command line asks; returns the content of scores.json. Raises Refused."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda, but torch sees no GPU")
    gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    net, state = load_model(args.checkpoint, device)
    c, source = stored_settings(state)
    make_folder(args.out)
    with tempfile.TemporaryDirectory(prefix=".prepared_", dir=args.out) as scratch:
        recordings, refused = open_data(args.data, state, Path(scratch))
        recordings = choose(recordings, args.split, state["config"], args.data)
        records, table = evaluate(net, recordings, args.out, device, c, args.plot)
    trained_on = state["config"].get("data", {}).get("path", "")
    result = report(records, table, c, source, args, trained_on) | {"refused": refused}
    checkpoint.write_json(args.out / "scores.json", result, indent=2)
    return result


def main(argv=None):
    args = parse(argv)
    try:
        show(run(args), args.out)
    except data.ReadFailed as failure:                      # a passing fault, not bad data
        print(f"evaluate.py: stopped: {failure}", file=sys.stderr)
        return 1
    except (Refused, edf.DataError, checkpoint.CorruptCheckpoint) as refusal:
        print(f"evaluate.py: {refusal}", file=sys.stderr)
        return 2
    except OSError as error:                                # disk full, no permission
        print(f"evaluate.py: stopped: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:           # not in main: on Modal it means preemption
        print("evaluate.py: interrupted: events written so far stay, scores.json is not written",
              file=sys.stderr)
        sys.exit(130)
