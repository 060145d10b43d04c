"""Metrics of a seizure detector from the counts of its recordings. METRICS lists them.

Events are scored by timescoring under SzCORE's rules; evaluate.py says which, and what is left
undefined. A new counted metric is a row of COUNTED, and a row of count() where it counts something
new.
"""
import difflib
import math

import numpy as np
from timescoring.annotations import Annotation
from timescoring.scoring import EventScoring, SampleScoring


DEFINITIONS = 1                         # raised where a metric's value changes: see evaluate.rules
DAY = 86400                             # seconds
TINY = 1e-12                            # scores that differ by less are equal


# ---- counted metrics: formulas over counts of events or samples, arrays over the thresholds ----

def _sensitivity(n, kind):
    return _ratio(n[kind + "_tp"], n[kind + "_true"])


def _precision(n, kind):
    tp = n[kind + "_tp"]
    fp = n[kind + "_fp"]
    return _ratio(tp, tp + fp)


def _f1(n, kind):
    """2 TP / (2 TP + FP + FN); NaN only where there is neither a reference nor a detection."""
    tp = n[kind + "_tp"]
    fp = n[kind + "_fp"]
    true = n[kind + "_true"]
    return _ratio(2 * tp, tp + fp + true)


def _per_24h(n, kind):
    days = n["seconds"] / DAY
    return n[kind + "_fp"] / days


def _ratio(a, b):
    """a / b, NaN where b is 0."""
    undefined = np.full(len(a), np.nan)
    return np.divide(a, b, out=undefined, where=b > 0)


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


def check_metric(name, recordings=None):
    """Raise ValueError unless `name` is in METRICS and, where recordings are given, computable
    on them."""
    if name not in METRICS:
        near = difflib.get_close_matches(str(name).lower(), METRICS, 1, 0.0)
        raise ValueError(f"unknown metric {name!r}; the nearest is {near[0]}")
    if recordings is None:
        return
    labelled = [r for r in recordings if r.labelled]
    seizure = sum(_inside(r) for r in labelled)
    total = sum(r.seconds for r in labelled)
    why = _undefined(bool(labelled), seizure > 0, seizure < total)
    if name in why:
        raise ValueError(f"{name} cannot be computed on these recordings: {why[name]}")


def _inside(recording):
    """Seconds within seizures."""
    begin, end = recording.events.T
    return float((end - begin).sum())


# ---- counts of one recording ----

def count(truth, found, seconds):
    """{name: int}: counts of events found against the truth, both (N, 2) in seconds. A new count
    is one more row here, and a formula of it one more in COUNTED."""
    by_event, by_sample = _scorers(truth, found, seconds)
    overlap = touching(truth, found)
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


def touching(truth, found):
    """Whether they share a moment: bool (true, found) of events (N, 2)."""
    begin, end = truth.T
    first, last = found.T
    starts_before = np.less.outer(begin, last)
    ends_after = np.greater.outer(end, first)
    return starts_before & ends_after


def _scorers(truth, found, seconds):
    """timescoring's, which works at 10 Hz by event and at 1 Hz by sample."""
    tenths = max(10, round(seconds * 10))
    reference = _annotation(truth, tenths)
    hypothesis = _annotation(found, tenths)
    return EventScoring(reference, hypothesis), SampleScoring(reference, hypothesis)


def _annotation(events, tenths):
    rows = [tuple(event) for event in events.tolist()]
    return Annotation(rows, 10, tenths)


def cross_entropy(probability, label, block=1 << 20):
    """Sum over the samples, a block at a time: float64 copies of a whole day would be large."""
    total = 0.0
    for i in range(0, len(label), block):
        part = slice(i, i + block)
        p = probability[part].astype(np.float64)
        p = np.clip(p, 1e-7, 1 - 1e-7)                      # float32 saturates
        likelihood = np.where(label[part] > 0, p, 1 - p)
        total -= np.log(likelihood).sum()
    return float(total)


# ---- metrics of a set of records ----

def undefined(scores):
    """{metric: reason} of the metrics that these records cannot give."""
    records = [s for s in scores if s["labelled"]]
    if any(not s["finite"] for s in records):
        return dict.fromkeys(METRICS, "the model gave a probability that is not finite")
    background = any(not s["label"].all() for s in records)
    return _undefined(bool(records), any_reference(records), background)


def _undefined(labelled, seizure, background):
    if not labelled:
        return dict.fromkeys(METRICS, "no recording is labelled")
    why = {}
    if not background:
        why |= dict.fromkeys(RANKING, "there is no background")
    if not seizure:
        why |= {name: "there is no seizure" for name in METRICS if name not in ALWAYS}
    return why


def any_reference(records):
    """Whether the scorer sees a seizure: one below a tenth of a second may vanish at its 10 Hz."""
    return any(summed([s])["event_true"].any() for s in records)


def summed(records):
    """Counts of some records together, by name: {name: (K,)}, and their seconds."""
    total = {"seconds": sum(s["seconds"] for s in records)}
    for s in records:
        columns = s["counts"].numpy().T
        for name, values in zip(s["counted"], columns):
            total[name] = total.get(name, 0) + values
    return total


def by_patient(records):
    """COUNTED at each threshold for each patient, [{name: (K,)}]: summed over his recordings."""
    patients = {}
    for s in records:
        patients.setdefault(s["patient"], []).append(s)
    rows = []
    for patient in sorted(patients):
        n = summed(patients[patient])
        row = {}
        for name, (_, formula, kind) in COUNTED.items():
            row[name] = formula(n, kind)
        rows.append(row)
    return rows


def over_patients(patients):
    return {name: _mean([p[name] for p in patients]) for name in COUNTED}


def _mean(rows):
    """Mean over patients of those that have a value; NaN where none has."""
    rows = np.stack(rows)
    known = ~np.isnan(rows)
    return _ratio(np.nansum(rows, axis=0), known.sum(axis=0))


def best(f1, alarms, cap):
    """Index of the highest F1 with at most `cap` false alarms, or with the fewest where there is
    none; among equals the fewest false alarms; among those the middle one."""
    within = alarms <= max(cap, alarms.min())
    known = ~np.isnan(f1)
    f1 = np.where(within & known, f1, -1)
    best = f1 >= f1.max() - TINY
    fewest = alarms <= alarms[best].min() + TINY
    ties = np.flatnonzero(best & fewest)
    return int(ties[len(ties) // 2])


def at_false_alarms(records):
    """Any-overlap sensitivity of the best threshold within each false-alarm rate; 0 if none is."""
    n = summed(records)
    seizures = sum(s["seizures"] for s in records)
    rate = n["alarms"] / (n["seconds"] / DAY)
    share = n["found"] / max(1, seizures)
    best = {}
    for limit in FALSE_ALARMS:
        within = share[rate <= limit]
        best[f"sensitivity_at_{limit:g}fa"] = float(within.max(initial=0))
    return best


def ranking(probability, label):
    """AUROC (the Mann-Whitney statistic, ties half) and average precision (the sum over steps of
    recall)."""
    from scipy.stats import rankdata    # here: training starts a second earlier without it
    positive = int(label.sum())
    negative = len(label) - positive
    if not positive or not negative:
        return math.nan, math.nan
    ranks = rankdata(probability)
    rank = float(ranks[label].sum())
    lowest = positive * (positive + 1) / 2                  # where all positives come last
    auroc = (rank - lowest) / positive / negative
    order = np.argsort(-probability, kind="stable")
    changes = np.flatnonzero(np.diff(probability[order]))
    last = np.append(changes, len(order) - 1)           # ties count at once, with the last of them
    hits = np.cumsum(label[order])[last]
    precision = hits / (last + 1)
    gained = np.diff(hits, prepend=0)
    return auroc, float((gained * precision).sum() / positive)


def calibration_error(probability, label, bins=10):
    if not len(label):
        return math.nan
    which = (probability * bins).astype(int)
    which = np.minimum(which, bins - 1)
    expected = np.bincount(which, probability.astype(np.float64), bins)
    observed = np.bincount(which, label.astype(np.float64), bins)
    error = np.abs(expected - observed)
    return float(error.sum() / len(label))
