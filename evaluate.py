"""Score a seizure detector the way the field does, write what it found as SzCORE events, and draw it.

    python evaluate.py --checkpoint results/v3/checkpoints/best.pt --data OUT_OR_EDF [--out DIR] [--plot]

OUT_OR_EDF is a folder made by `data.py import`, or one EDF or a folder of EDFs, which are prepared the same
way first. Each recording is scored once and whole. Training validates through the same three functions:

    predict    model + recording -> one seizure probability per sample
    score      probability + labels -> a small record of counts, one per recording
    summarise  records of a set -> every metric in METRICS

Event and sample scores follow SzCORE (Dan et al., Epilepsia 2024) through the package timescoring: events
closer than 90 s are one, longer than 5 min are cut, a detection may come 30 s early and 60 s late, counts are
summed per patient and the scores averaged over patients. Sensitivity at a false-alarm rate uses the plain
any-overlap rule, pooled over the set. AUROC, average precision and calibration error take one sample per
second, its middle one: labels are no finer, and whole sets stay small enough to rank exactly. The loss is
binary cross-entropy over every sample, without class weights.

What cannot be computed is NaN in Python, null in scores.json (with the reason), and never counts as best in
training: without a labelled recording, everything; without a seizure, all but loss, calibration_error and
false_alarms_per_24h; without background, auroc and average_precision; with a probability that is not finite,
everything. A patient with neither seizures nor detections has no F1, and one without detections no precision:
left out of those means, as SzCORE does. A set with seizures and nothing detected has precision 0.
"""
import argparse
import contextlib
import difflib
import importlib.metadata
import json
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

FS = edf.FS
METRICS = {                             # name -> what is better
    "loss": "min",
    "auroc": "max",
    "average_precision": "max",
    "calibration_error": "min",         # expected error over 10 equal bins (Guo et al., ICML 2017)
    "event_f1": "max",
    "event_sensitivity": "max",
    "event_precision": "max",
    "false_alarms_per_24h": "min",
    "sample_f1": "max",
    "sample_sensitivity": "max",
    "sample_precision": "max",
    "sensitivity_at_10fa": "max",       # share of seizures found with at most 10 false alarms per 24 h
    "sensitivity_at_5fa": "max",
    "sensitivity_at_2.5fa": "max",
    "sensitivity_at_1fa": "max",
}
DEFAULTS = {
    "window_seconds": 60.0,             # length of a window at inference; as in training
    "overlap_seconds": 0.0,             # shared by neighbouring windows; more than 0 = weighted overlap-add
    "batch_size": 8,                    # windows per call of the model
    "tune": True,                       # validation picks the threshold with the best event F1 on the dev set
    "threshold": 0.86,                  # an event begins at this probability, where none was tuned
    "release": 0.08,                    # it ends below threshold - release, at most half the threshold lower
    "onset_seconds": 0.5,               # the probability stays this long at the threshold to begin an event
    "offset_seconds": 1.0,              # and this long below the release level to end it
    "opening_seconds": 0.043,           # shorter events vanish, then
    "closing_seconds": 0.121,           # shorter gaps are filled, then
    "min_duration_seconds": 3.0,        # shorter events are dropped, then
    "merge_gap_seconds": 2.0,           # gaps up to this are closed, and last
    "max_duration_seconds": 600.0,      # longer events are cut into equal parts
}
GRID = 1 / (1 + np.exp(-np.arange(-4, 7.01, 0.25)))     # thresholds tried: even in log-odds, 0.018 to 0.999
FALSE_ALARMS = (10, 5, 2.5, 1)                          # per 24 h
COUNTS = ("event_tp", "event_fp", "sample_tp", "sample_fp", "found", "alarms")     # of a record
UNDEFINED_WITHOUT = {
    "seizure": [m for m in METRICS if m not in ("loss", "calibration_error", "false_alarms_per_24h")],
    "background": ["auroc", "average_precision"],
}


def check_metric(name, recordings=None):
    """Raise ValueError unless `name` is in METRICS and, where recordings are given, computable on them."""
    if name not in METRICS:
        near = difflib.get_close_matches(str(name).lower(), METRICS, 1, 0.0)[0]
        raise ValueError(f"unknown metric {name!r}; the nearest is {near}")
    if recordings is not None:
        labelled = [r for r in recordings if r.labelled]
        seizure = sum(float((r.events[:, 1] - r.events[:, 0]).sum()) for r in labelled)
        total = sum(r.seconds for r in labelled)
        why = _undefined(bool(labelled), seizure > 0, seizure < total).get(name)
        if why:
            raise ValueError(f"{name} cannot be computed on these recordings: {why}")


def settings(config):
    """DEFAULTS overridden by `config` (the YAML section `evaluation`), checked. Raises ValueError."""
    unknown = sorted(set(config) - set(DEFAULTS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], DEFAULTS, 1, 0.0)[0]
        raise ValueError(f"unknown key evaluation.{unknown[0]}; the nearest is evaluation.{near}")
    c = {**DEFAULTS, **config}
    limits = {name: (0, 86400) for name in DEFAULTS if name.endswith("_seconds")}
    limits |= {"threshold": (0, 1), "release": (0, 1), "batch_size": (1, math.inf),
               "window_seconds": (1 / FS, 3600), "max_duration_seconds": (1 / FS, 86400),
               "overlap_seconds": (0, c["window_seconds"] - 1 / FS)}
    for name, (low, high) in limits.items():
        if not low <= c[name] <= high:
            raise ValueError(f"evaluation.{name} must lie between {low:g} and {high:g}, not {c[name]}")
    return c


# ---- probability track ----

def predict(model, recording, device, config, precision="fp32", poll=None):
    """Seizure probability of every sample: float32 (samples,) at 256 Hz, from windows read one batch at a
    time.

    The last window is moved back to end with the recording, so that each window is full of EEG as in
    training; samples it shares with its neighbour are averaged, weighted by their distance to the window's
    edge, where context ends. A recording shorter than a window is padded with zeros, again as in training.
    poll() is called before every call of the model and may raise to stop."""
    c = settings(config)
    length, samples = round(c["window_seconds"] * FS), recording.samples
    starts = _starts(samples, c)
    ramp = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)).astype(np.float32)
    total, weight = np.zeros(samples, np.float32), np.zeros(samples, np.float32)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for i in range(0, len(starts), c["batch_size"]):
            if poll:
                poll()
            batch = starts[i:i + c["batch_size"]]
            tracks = _probabilities(model, recording, batch, length, device, precision)
            for start, track in zip(batch, tracks):
                n = min(length, samples - start)
                total[start:start + n] += ramp[:n] * track[:n]
                weight[start:start + n] += ramp[:n]
    finally:
        for module, mode in modes:
            module.training = mode
    return np.minimum(np.divide(total, weight, out=total), 1)


def _starts(samples, c):
    length = round(c["window_seconds"] * FS)
    step = length - round(c["overlap_seconds"] * FS)
    return list(range(0, samples - length, step)) + [max(0, samples - length)]


@torch.no_grad()                        # not inference_mode: a buffer cached there is of no use to training
def _probabilities(model, recording, starts, length, device, precision):
    eeg = torch.from_numpy(np.stack([recording.read(start, length) for start in starts])).to(device)
    scale = torch.as_tensor(recording.scale, dtype=torch.float32, device=device).expand(len(starts), -1)
    norm = torch.full((len(starts),), float(recording.norm), device=device)
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast(torch.device(device).type, kind, enabled=kind is not None):
        logits = model(data.normalise(eeg, scale, norm))
    return torch.sigmoid(logits.float()).cpu().numpy()


# ---- post-processing: probability -> events ----

def _runs(mask):
    """Begin and end (exclusive) of each run of True: int64 (N, 2)."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    edges = np.concatenate([[0] * bool(mask[:1].any()), edges, [len(mask)] * bool(mask[-1:].any())])
    return edges.astype(np.int64).reshape(-1, 2)


def _hysteresis(probability, on, off, onset, offset):
    """Runs that begin with `onset` samples >= on and end where `offset` samples < off begin: int64 (N, 2)."""
    begin, end = _runs(probability >= on), _runs(~(probability >= off))  # NaN ends an event
    begin = begin[begin[:, 1] - begin[:, 0] >= max(1, onset), 0]
    end = end[end[:, 1] - end[:, 0] >= max(1, offset), 0]
    marks = np.concatenate([begin, end])
    kind = np.repeat([1, 0], [len(begin), len(end)])[np.argsort(marks)]
    marks, before = np.sort(marks), np.concatenate([[0], kind[:-1]])[:len(kind)]
    first, last = marks[(kind == 1) & (before == 0)], marks[(kind == 0) & (before == 1)]
    last = np.append(last, [len(probability)] * (len(first) - len(last)))
    return np.stack([first, last], 1).astype(np.int64)


def _merge(events, gap):
    """Join neighbours whose gap is at most `gap` samples."""
    if len(events) < 2:
        return events
    apart = events[1:, 0] - events[:-1, 1] > gap
    return np.stack([events[np.append(True, apart), 0], events[np.append(apart, True), 1]], 1)


def _split(events, longest):
    """Cut events into the fewest equal parts that are no longer than `longest` samples."""
    parts = -(-(events[:, 1] - events[:, 0]) // longest)
    which = np.repeat(np.arange(len(events)), parts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    begin, span = events[which, 0], (events[:, 1] - events[:, 0])[which]
    return np.stack([begin + span * number // parts[which], begin + span * (number + 1) // parts[which]], 1)


def postprocess(probability, threshold, config):
    """Events of a probability track (samples,): int64 (N, 2), begin and end in samples, in order and apart.

    Opening and closing of a binary track drop its runs and fill its gaps that are shorter than the element.
    Splitting comes last, since merging would undo it."""
    c = {k: round(v * FS) if k.endswith("_seconds") else v for k, v in settings(config).items()}
    off = max(threshold - c["release"], threshold / 2)
    events = _hysteresis(probability, threshold, off, c["onset_seconds"], c["offset_seconds"])
    events = events[events[:, 1] - events[:, 0] >= c["opening_seconds"]]
    events = _merge(events, c["closing_seconds"] - 1)
    events = events[events[:, 1] - events[:, 0] >= c["min_duration_seconds"]]
    return _split(_merge(events, c["merge_gap_seconds"]), c["max_duration_seconds"])


# ---- record of one recording ----

def score(recording, probability, config):
    """The record of one recording: plain numbers and small tensors, about 18 kB per hour and 1 kB.

    Keys: recording, patient, seconds, labelled, finite; if labelled also seizures, samples, loss (sum over
    them), thresholds (K,), counts (K, len(COUNTS)) at each threshold, event_references and sample_references
    (what the scorer counts as true), and probability float32 and label uint8 of the middle sample of every
    second."""
    c = settings(config)
    record = {"recording": recording.name, "patient": data.person(recording.patient),
              "seconds": float(recording.seconds), "labelled": bool(recording.labelled),
              "finite": bool(np.isfinite(probability).all())}
    if not recording.labelled:
        return record
    label = recording.labels(0, recording.samples)
    truth = _merge(_runs(label.astype(bool)), 0) / FS
    thresholds = _thresholds(c)
    counts, seen = np.zeros((len(thresholds), len(COUNTS)), np.int64), {}
    for i, threshold in enumerate(thresholds):
        events = postprocess(probability, threshold, c) / FS
        key = events.tobytes()
        if key not in seen:                                         # neighbouring thresholds often agree
            seen[key] = _count(truth, events, recording.seconds)
        counts[i], references = seen[key]
    middle = slice(FS // 2, None, FS)
    return record | {
        "seizures": len(truth), "samples": int(recording.samples),
        "loss": _cross_entropy(probability, label),
        "thresholds": torch.from_numpy(thresholds), "counts": torch.from_numpy(counts),
        "event_references": references[0], "sample_references": references[1],
        "probability": torch.from_numpy(probability[middle].astype(np.float32)),
        "label": torch.from_numpy(label[middle].astype(np.uint8))}


def _thresholds(c):
    return np.unique(np.append(GRID, c["threshold"]))


def _count(truth, events, seconds):
    """COUNTS of events against the truth, both (N, 2) in seconds; and what the scorer counts as true."""
    tenths = max(10, round(seconds * 10))                   # timescoring works at 10 Hz, by sample at 1 Hz
    reference, found = (Annotation([tuple(e) for e in x.tolist()], 10, tenths) for x in (truth, events))
    by_event, by_sample = EventScoring(reference, found), SampleScoring(reference, found)
    overlap = (truth[:, None, 0] < events[None, :, 1]) & (events[None, :, 0] < truth[:, None, 1])
    counts = (by_event.tp, by_event.fp, by_sample.tp, by_sample.fp,
              overlap.any(1).sum(), (~overlap.any(0)).sum())
    return [int(n) for n in counts], (int(by_event.refTrue), int(by_sample.refTrue))


def _cross_entropy(probability, label, block=1 << 20):
    total = 0.0
    for i in range(0, len(label), block):
        p = np.clip(probability[i:i + block].astype(np.float64), 1e-7, 1 - 1e-7)    # float32 saturates
        total -= float(np.log(np.where(label[i:i + block] > 0, p, 1 - p)).sum())
    return total


# ---- metrics of a set ----

def summarise(scores, config):
    """Every metric of METRICS as a float, and the threshold that event and sample scores use.

    scores: records of score(), in any order. With config["tune"] the threshold is the one with the best event
    F1 on these very recordings, so give it the dev set; without, or where there is no seizure, it is
    config["threshold"]."""
    c = settings(config)
    records = sorted((s for s in scores if s["labelled"]), key=lambda s: s["recording"])
    thresholds = _thresholds(c)
    if any(not np.array_equal(s["thresholds"].numpy(), thresholds) for s in records):
        raise ValueError("the records were made with another evaluation.threshold: score the recordings anew")
    result = dict.fromkeys(METRICS, math.nan) | {"threshold": float(c["threshold"])}
    if not records or not all(s["finite"] for s in records):
        return result
    label = np.concatenate([s["label"].numpy() for s in records]) > 0
    probability = np.concatenate([s["probability"].numpy() for s in records])
    result["loss"] = sum(s["loss"] for s in records) / sum(s["samples"] for s in records)
    result["auroc"], result["average_precision"] = _ranking(probability, label)
    result["calibration_error"] = _calibration_error(probability, label)
    curves = _szcore(records)
    index = int(np.searchsorted(thresholds, c["threshold"]))
    if c["tune"] and any(s["seizures"] for s in records):
        index = _best(curves["event_f1"], curves["false_alarms_per_24h"])
        result["threshold"] = float(thresholds[index])
    result |= {name: float(values[index]) for name, values in curves.items()} | _at_false_alarms(records)
    if any(s["event_references"] for s in records):
        result |= {m: 0.0 for m in ("event_precision", "sample_precision") if math.isnan(result[m])}
    why = undefined(records)
    return {name: math.nan if name in why else value for name, value in result.items()}


def undefined(scores):
    """{metric: reason} of the metrics that these records cannot give."""
    records = [s for s in scores if s["labelled"]]
    if any(not s["finite"] for s in records):
        return dict.fromkeys(METRICS, "the model gave a probability that is not finite")
    return _undefined(bool(records), any(s["event_references"] for s in records),
                      any((s["label"] == 0).any() for s in records))


def _undefined(labelled, seizure, background):
    if not labelled:
        return dict.fromkeys(METRICS, "no recording is labelled")
    why = {} if background else dict.fromkeys(UNDEFINED_WITHOUT["background"], "there is no background")
    return why if seizure else why | dict.fromkeys(UNDEFINED_WITHOUT["seizure"], "there is no seizure")


def _szcore(records):
    """SzCORE scores at each threshold, (K,): summed over each patient's recordings, then averaged."""
    curves = []
    for patient in sorted({s["patient"] for s in records}):
        mine = [s for s in records if s["patient"] == patient]
        counts = dict(zip(COUNTS, sum(s["counts"] for s in mine).numpy().T))
        row = {}
        for kind in ("event", "sample"):
            tp, fp = counts[f"{kind}_tp"], counts[f"{kind}_fp"]
            true = sum(s[f"{kind}_references"] for s in mine)
            row[f"{kind}_sensitivity"] = _ratio(tp, true + 0 * tp)
            row[f"{kind}_precision"] = _ratio(tp, tp + fp)
            row[f"{kind}_f1"] = np.where(true + fp > 0, _ratio(2 * tp, tp + fp + true), np.nan)
        row["false_alarms_per_24h"] = counts["event_fp"] / (sum(s["seconds"] for s in mine) / 86400)
        curves.append(row)
    return {name: _mean([row[name] for row in curves]) for name in curves[0]}


def _ratio(a, b):
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


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
    counts = dict(zip(COUNTS, sum(s["counts"] for s in records).numpy().T))
    rate = counts["alarms"] / (sum(s["seconds"] for s in records) / 86400)
    share = counts["found"] / max(1, sum(s["seizures"] for s in records))
    return {f"sensitivity_at_{limit:g}fa": float(share[rate <= limit].max(initial=0))
            for limit in FALSE_ALARMS}


def _ranking(probability, label):
    """AUROC (the Mann-Whitney statistic, ties half) and average precision (the sum over steps of recall)."""
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return math.nan, math.nan
    rank = rankdata(probability)[label].sum()
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)       # ties count at once
    hits = np.cumsum(label[order])[last]
    precision = hits / (last + 1)
    return (float(rank - positive * (positive + 1) / 2) / positive / negative,
            float((np.diff(hits, prepend=0) * precision).sum() / positive))


def _calibration_error(probability, label, bins=10):
    if not len(label):
        return math.nan
    which = np.minimum((probability * bins).astype(int), bins - 1)
    sums = [np.bincount(which, x, bins) for x in (probability.astype(np.float64), label.astype(np.float64))]
    return float(np.abs(sums[0] - sums[1]).sum() / len(label))


# ---- pictures ----

TRUE, FOUND, INK, STOP = "#e08e0b", "#1f6fb2", "#22262b", "#b3261e"     # labelled, detected, traces, resumes
CHAINS = ("Fp1 F7 T3 T5 O1", "Fp1 F3 C3 P3 O1", "Fz Cz Pz", "Fp2 F4 C4 P4 O2", "Fp2 F8 T4 T6 O2")
PAIRS = [tuple(pair) for chain in CHAINS for pair in zip(chain.split(), chain.split()[1:])]
SENSITIVITIES = (20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)     # uV between neighbouring traces


def draw(recording, probability, events, threshold, path, most=4):
    """PNG of one recording: the whole probability track, then up to `most` labelled or detected events as EEG
    in the longitudinal bipolar montage (double banana, left to right) above their probability. events: (N, 2)
    in samples."""
    from matplotlib.figure import Figure                    # here: training does not draw
    truth = np.asarray(recording.events).reshape(-1, 2)
    found = np.asarray(events).reshape(-1, 2) / FS
    spans = _spans(recording, probability, truth, found)
    shown = spans[:most]
    figure = Figure(figsize=(15, 1.9 + 6.6 * len(shown)), dpi=100, layout="constrained")
    rows = figure.subplots(1 + 2 * len(shown), 1, height_ratios=[1.5] + [5.4, 1.2] * len(shown))
    labels = f"{len(truth)} labelled" if recording.labelled else "unlabelled"
    more = f",  {most} of {len(spans)} places shown" if len(spans) > most else ""
    title = f"{recording.name}    {_clock(recording.seconds)},  {labels},  {len(found)} detected{more}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
    _track(rows[0], probability, 0, recording.seconds, truth, found, threshold)
    for span in shown:
        rows[0].plot(span, [0, 0], color=INK, lw=6, solid_capstyle="butt")
    rows[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False, fontsize=9)
    for i, (begin, end) in enumerate(shown):
        _traces(rows[1 + 2 * i], recording, begin, end, truth, found)
        _track(rows[2 + 2 * i], probability, begin, end, truth, found, threshold)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _spans(recording, probability, truth, found, before=10, longest=60):
    """Stretches worth a look, in seconds: around each event, or around the peak where there is none."""
    events = np.concatenate([truth, found])
    if not len(events):
        peak = float(np.argmax(probability)) / FS
        events = np.array([[peak - 5, peak + 10]])
    spans = []
    for begin, end in sorted(events.tolist()):
        begin = max(0, begin - before)
        end = min(recording.seconds, max(end + before, begin + 30), begin + longest)
        if not spans or begin > spans[-1][1] - before:
            spans.append((begin, end))
        else:
            spans[-1] = (spans[-1][0], min(recording.seconds, max(spans[-1][1], end), spans[-1][0] + longest))
    return spans


def _mark(axis, truth, found):
    for begin, end in truth:
        axis.axvspan(begin, end, color=TRUE, alpha=0.18, lw=0)
    for begin, end in found:
        axis.plot([begin, end], [1, 1], color=FOUND, lw=9, solid_capstyle="butt",
                  transform=axis.get_xaxis_transform())
        for edge in (begin, end):
            axis.axvline(edge, color=FOUND, lw=1.1, ls=(0, (4, 3)))


def _track(axis, probability, begin, end, truth, found, threshold):
    first, last = int(begin * FS), int(math.ceil(end * FS))
    piece = np.clip(probability[first:last], 0, 1)
    step = max(1, len(piece) // 3000)
    piece = np.maximum.reduceat(piece, np.arange(0, len(piece), step))      # thinned, but never by a peak
    seconds = (first + step * (np.arange(len(piece)) + 0.5)) / FS
    _mark(axis, truth, found)
    axis.fill_between(seconds, piece, color=INK, alpha=0.15, lw=0)
    axis.plot(seconds, piece, color=INK, lw=0.9, label="probability")
    axis.axhline(threshold, color=FOUND, lw=0.8, ls=":", label=f"threshold {threshold:.2f}")
    axis.fill_between([], [], color=TRUE, alpha=0.3, lw=0, label="labelled seizure")
    axis.fill_between([], [], color=FOUND, lw=0, label="detected seizure")
    axis.set(xlim=(begin, end), ylim=(0, 1.04), yticks=(0, 1))
    axis.set_ylabel("probability", fontsize=9, color=INK)
    axis.xaxis.set_major_formatter(lambda x, _: _clock(x))
    _tidy(axis)


def _tidy(axis):
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)


def _derivations(recording, begin, end):
    """uV of the PAIRS, float32 (18, n), from either montage, and how they are named."""
    first, last = int(begin * FS), int(end * FS)
    eeg = recording.read(first, last - first) * np.asarray(recording.scale, np.float32)[:, None]
    row = {name: i for i, name in enumerate(recording.channels)}
    names = [f"{a}-{b}" for a, b in PAIRS]
    if recording.montage == "bipolar":
        return eeg[[row[name] for name in names]], names
    return np.stack([eeg[row[a]] - eeg[row[b]] for a, b in PAIRS]), names


def _traces(axis, recording, begin, end, truth, found):
    eeg, names = _derivations(recording, begin, end)
    swing = np.median(np.percentile(np.abs(eeg - np.median(eeg, 1, keepdims=True)), 98, axis=1))
    spacing = next((s for s in SENSITIVITIES if s >= 1.5 * swing), SENSITIVITIES[-1])
    gaps = np.repeat(np.arange(len(CHAINS)), [len(chain.split()) - 1 for chain in CHAINS])
    height = -(np.arange(len(names)) + 0.6 * gaps)                          # room between the chains
    seconds = begin + np.arange(eeg.shape[1]) / FS
    _mark(axis, truth, found)
    for y, trace in zip(height, eeg):
        axis.plot(seconds, y + np.clip((trace - np.median(trace)) / spacing, -2.5, 2.5), color=INK, lw=0.55)
    axis.set(xlim=(begin, end), ylim=(height[-1] - 1.6, 1.6), yticks=height, yticklabels=names)
    axis.set_xticks(np.arange(math.ceil(begin), end), minor=True)
    axis.grid(axis="x", which="both", color=INK, alpha=0.10, lw=0.5)
    axis.tick_params(which="both", bottom=False, labelbottom=False, length=0)
    edge, foot = end + 0.006 * (end - begin), height[-1]
    axis.plot([edge, edge], [foot, foot + 1], color=INK, lw=2, clip_on=False)
    axis.text(edge, foot + 0.5, f"  {spacing} \u00b5V", va="center", fontsize=9, color=INK)
    _tidy(axis)
    axis.spines[["left", "bottom"]].set_visible(False)


def _rows(path):
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):     # a kill or a full disk may tear a row
            rows.append(json.loads(line))
    return rows


def curves(run_directory):
    """Draw <run_directory>/curves.png from metrics.jsonl and, where there is one, saves.jsonl: loss, learning
    rate and the metric that decides best.pt over the steps, with saves and resumes marked. Returns its
    path."""
    import yaml
    from matplotlib.figure import Figure
    directory = Path(run_directory)
    rows, files = _rows(directory / "metrics.jsonl"), _rows(directory / "saves.jsonl")
    train, checks = ([r for r in rows if r["kind"] == kind] for kind in ("train", "validation"))
    config = directory / "config.yaml"
    metric = yaml.safe_load(config.read_text())["training"]["best_metric"] if config.is_file() else "event_f1"
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    loss, rate, best = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 3))
    figure.suptitle(directory.resolve().name, x=0.01, ha="left", fontsize=13, color=INK)
    _curve(loss, train, "loss", INK, "training loss")
    _curve(loss.twinx() if train else loss, checks, "loss", TRUE, "validation: cross-entropy", "o-")
    _curve(rate, train, "lr", INK, "learning rate")
    _curve(best, checks, metric, FOUND, f"{metric} (dev)", "o-")
    chosen = [r for r in checks if r.get("best") and r.get(metric) is not None]
    best.plot([r["step"] for r in chosen], [r[metric] for r in chosen], "*", color=TRUE, ms=13,
              label="best.pt")
    saves, resumes = (sorted({r["step"] for r in files if r["kind"] == kind}) for kind in ("save", "resume"))
    best.plot(saves, [0.02] * len(saves), "|", color=INK, ms=9, label="save",
              transform=best.get_xaxis_transform())
    for axis in (loss, rate, best):
        lines = [axis.axvline(step, color=STOP, lw=1, ls="--") for step in resumes]
    if lines:
        lines[0].set_label("resume")
    best.set_xlabel("step", color=INK)
    best.legend(frameon=False, fontsize=9)
    path = directory / "curves.png"
    figure.savefig(path)
    return path


def _curve(axis, rows, key, colour, label, style="-"):
    rows = [r for r in rows if r.get(key) is not None]
    axis.plot([r["step"] for r in rows], [r[key] for r in rows], style, color=colour, lw=1.4, ms=4)
    axis.set_ylabel(label, color=colour, fontsize=9)
    axis.tick_params(labelsize=8, colors=INK)
    axis.spines["top"].set_visible(False)


# ---- command line ----

class Refused(Exception):
    """Bad usage, checkpoint or data. One line; exit code 2."""


def load_model(path, device):
    """(model on device, checkpoint dict) from any checkpoint of train.py, stripped or not."""
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
    """(evaluation settings, where the threshold is from). Never tuned here, on the scored set itself."""
    config = state["config"].get("evaluation", {})
    tuned = state.get("scores", {}).get("threshold")
    try:
        c = settings({**config, "tune": False} | ({} if tuned is None else {"threshold": tuned}))
    except ValueError as error:
        raise Refused(f"the checkpoint's settings: {error}") from None
    if tuned is None:
        return c, "evaluation.threshold of the config, since the checkpoint holds no tuned one"
    if not config.get("tune", DEFAULTS["tune"]):
        return c, "evaluation.threshold of the config"
    return c, "tuned on the dev set in training"


def open_data(path, state, scratch):
    """(recordings, [(file, why)] refused) of an imported folder, or of EDF files prepared into `scratch`."""
    path, refused = Path(path), []
    if not path.exists():
        raise Refused(f"data {path} does not exist")
    if path.is_file() or not next(path.rglob("*.h5"), None):
        if path.is_dir() and not any(p.suffix.lower() == ".edf" for p in path.rglob("*")):
            raise Refused(f"data {path}: neither imported recordings (.h5) nor EDF files in it")
        refused = corpora.import_corpus(path, scratch, montage=state["montage"]).refused
        if not next(scratch.rglob("*.h5"), None):
            raise Refused("no usable recording: " + "; ".join(f"{file}: {why}" for file, why in refused[:3]))
        path = scratch
    recordings = data.open_corpus(path)
    for r in recordings:
        if r.montage != state["montage"] or list(r.channels) != list(state["channels"]):
            raise Refused(f"data {r.path}: {r.montage}, {len(r.channels)} channels, but the checkpoint was "
                          f"trained on {state['montage']}, {len(state['channels'])} channels: "
                          f"import with --montage {state['montage']}")
    return recordings, refused


def choose(recordings, split, config):
    """Those of one split: train and dev as the training drew them, eval as the corpus marks it."""
    if split in ("train", "dev"):
        c, seed = config["data"], config["experiment"]["seed"]
        return data.split_patients(recordings, c["dev_patients"], c["dev_fraction"], seed)[split == "dev"]
    chosen = [r for r in recordings if not split or r.split == split]
    if not chosen:
        raise Refused(f"no recording belongs to the split {split}")
    return chosen


def write_events(path, events, probability, seconds):
    """SzCORE events file of events (N, 2) in samples; confidence is the mean probability inside."""
    sure = [probability[a:b].mean() for a, b in events]
    edf.write_events_tsv(path, events / FS, seconds, sure)


def evaluate(model, recordings, out, device, c, plot=False):
    """Score recordings, write events and pictures under `out`; returns records and a table."""
    records, table = [], []
    calls = sum(-(-len(_starts(r.samples, c)) // c["batch_size"]) for r in recordings)
    with tqdm(total=calls, unit="batch", desc="evaluate") as bar:
        for r in recordings:
            bar.set_postfix_str(r.name[-40:], refresh=False)
            probability = predict(model, r, device, c, poll=bar.update)
            if not np.isfinite(probability).all():
                raise Refused(f"the model gives a probability that is not finite on {r.name}")
            records.append(score(r, probability, c))
            events = postprocess(probability, c["threshold"], c)
            target = out / (r.name[:-4] if r.name.endswith("_eeg") else r.name)
            write_events(target.with_name(target.name + "_events.tsv"), events, probability, r.seconds)
            if plot:
                draw(r, probability, events, c["threshold"], target.with_name(target.name + ".png"))
            table.append({"recording": r.name, "patient": r.patient, "seconds": r.seconds,
                          "seizures": len(r.events) if r.labelled else None, "detections": len(events)})
    return records, table


def report(records, table, c, source, args, trained_on=""):
    """Content of scores.json: metrics at the top level, null with the reason if not computable."""
    summary, labelled = summarise(records, c), [s for s in records if s["labelled"]]
    metrics = {name: None if math.isnan(summary[name]) else summary[name] for name in METRICS}
    same = bool(trained_on) and Path(args.data).resolve() == Path(trained_on).resolve()
    return metrics | {
        "not_computed": undefined(records), "threshold": c["threshold"], "threshold_source": source,
        "scorer": {"name": "timescoring", "version": importlib.metadata.version("timescoring"),
                   "rules": "SzCORE by event and sample, mean over patients; any overlap for sensitivity_at"},
        "recordings": len(records), "hours": sum(s["seconds"] for s in records) / 3600,
        "labelled_recordings": len(labelled), "labelled_hours": sum(s["seconds"] for s in labelled) / 3600,
        "patients": len({s["patient"] for s in records}), "seizures": sum(s["seizures"] for s in labelled),
        "checkpoint": str(args.checkpoint), "data": str(args.data), "split": args.split or "all",
        "includes_training": args.split == "train" or not args.split and same,
        "settings": c, "per_recording": table}


def show(result, out):
    detections = sum(row["detections"] for row in result["per_recording"])
    print(f"{result['recordings']} recordings, {result['hours']:.2f} h, {result['patients']} patients, "
          f"{result['seizures']} labelled seizures, {detections} detections\n"
          f"threshold {result['threshold']:.3f}: {result['threshold_source']}")
    for name in METRICS if result["labelled_recordings"] else ():
        value, why = result[name], result["not_computed"].get(name)
        print(f"  {name:<22} " + (f"-  ({why})" if value is None else f"{value:.4f}"))
    if result["includes_training"]:
        print("these recordings include those of the training: --split dev or --split eval leaves them out")
    for file, why in result["refused"]:
        print(f"not scored: {file}: {why}")
    print(f"events and scores.json in {out}")


def parse(argv):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="best.pt, any other checkpoint, or a stripped one")
    add("--data", required=True, type=Path, help="imported folder, folder of EDFs, or one EDF")
    add("--out", type=Path, help="default: `evaluation` in the run directory of the checkpoint")
    add("--plot", action="store_true", help="a PNG per recording")
    add("--split", choices=("train", "dev", "eval"), help="only these recordings; default all")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.out is None:
        folder = args.checkpoint.absolute().parent
        args.out = (folder.parent if folder.name == "checkpoints" else folder) / "evaluation"
    return args


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {path}: {error.strerror}") from None


def main(argv=None):
    args = parse(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise Refused("--device cuda, but torch sees no GPU")
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        model, state = load_model(args.checkpoint, device)
        c, source = stored_settings(state)
        make_folder(args.out)
        with tempfile.TemporaryDirectory(prefix=".prepared_", dir=args.out) as scratch:
            recordings, refused = open_data(args.data, state, Path(scratch))
            recordings = choose(recordings, args.split, state["config"])
            records, table = evaluate(model, recordings, args.out, device, c, args.plot)
        trained_on = state["config"].get("data", {}).get("path", "")
        result = report(records, table, c, source, args, trained_on) | {"refused": refused}
        (args.out / "scores.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    except (Refused, edf.DataError, checkpoint.CorruptCheckpoint) as refusal:
        print(f"evaluate.py: {refusal}", file=sys.stderr)
        return 2
    except OSError as error:                                # disk full, no permission
        print(f"evaluate.py: stopped: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    show(result, args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:                               # not in main: on Modal it means preemption
        print("evaluate.py: interrupted: events written so far stay, scores.json is not written", file=sys.stderr)
        sys.exit(130)
