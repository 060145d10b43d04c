"""Metrics of a seizure detector from the counts of its recordings. METRICS lists them.

Events are scored by timescoring under SzCORE's rules; evaluate.py says which, and what is left
undefined. A new metric is a formula and its row: of counts in COUNTED (and a row of count() where
it counts something new), of probabilities in RANKED.
"""
import math

import numpy as np
from timescoring.annotations import Annotation
from timescoring.scoring import EventScoring, SampleScoring

from eeg.console import hours, how_many
from eeg.splits import person

DEFINITIONS = 2                         # raised where a metric's value changes: see evaluate.rules
DAY = 86400                             # seconds
TINY = 1e-12                            # scores that differ by less are equal
TOLERANCE = EventScoring.Parameters()   # SzCORE's, in seconds


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


# ---- metrics of probabilities: of the middle sample of every second, with its label ----

def auroc(probability, label):
    """The Mann-Whitney statistic, ties half."""
    from scipy.stats import rankdata    # here: training starts a second earlier without it
    positive = int(label.sum())
    negative = len(label) - positive
    if not positive or not negative:
        return math.nan
    rank = float(rankdata(probability)[label].sum())
    lowest = positive * (positive + 1) / 2                  # where all positives come last
    return (rank - lowest) / positive / negative


def average_precision(probability, label):
    """The sum of precision over the steps of recall."""
    positive = int(label.sum())
    if not positive or positive == len(label):
        return math.nan
    order = np.argsort(-probability, kind="stable")
    changes = np.flatnonzero(np.diff(probability[order]))
    last = np.append(changes, len(order) - 1)           # ties count at once, with the last of them
    hits = np.cumsum(label[order])[last]
    precision = hits / (last + 1)
    gained = np.diff(hits, prepend=0)
    return float((gained * precision).sum() / positive)


def calibration_error(probability, label, bins=10):
    """Expected error over equal bins (Guo et al., ICML 2017)."""
    if not len(label):
        return math.nan
    which = (probability * bins).astype(int)
    which = np.minimum(which, bins - 1)
    expected = np.bincount(which, probability.astype(np.float64), bins)
    observed = np.bincount(which, label.astype(np.float64), bins)
    error = np.abs(expected - observed)
    return float(error.sum() / len(label))


# name -> what is better, formula, whether it needs a seizure and background
RANKED = {
    "auroc": ("max", auroc, True),
    "average_precision": ("max", average_precision, True),
    "calibration_error": ("min", calibration_error, False),
}

# ---- every metric ----

FALSE_ALARMS = (10, 5, 2.5, 1)          # per 24 h, at which the share of seizures found is given
AT_RATE = {f"sensitivity_at_{rate:g}fa": rate for rate in FALSE_ALARMS}
METRICS = {                             # name -> what is better
    "loss": "min",
    **{name: better for name, (better, _, _) in RANKED.items()},
    **{name: better for name, (better, _, _) in COUNTED.items()},
    **dict.fromkeys(AT_RATE, "max"),
}
BY_EVENT = [name for name, (_, _, kind) in COUNTED.items() if kind == "event"]
# computable without a seizure, and those that need background beside it
ALWAYS = ["loss", "false_alarms_per_24h"] + [name for name, row in RANKED.items() if not row[2]]
RANKING = [name for name, row in RANKED.items() if row[2]]
FALLBACK = "average_precision"          # decides where there is too little background for the other


def deciding(name, dev, instead):
    """(the metric that decides best.pt, a warning or ""), by the recordings `dev` that validate.
    Too little background leaves FALLBACK instead of `name`, since no epoch would ever be the best
    otherwise; of an event score it is said how little it tells. Raises ValueError where FALLBACK
    cannot be computed either; instead: what lets others validate."""
    grounds, why = _before_scoring(dev)
    refusal = f"{name} cannot be computed on validation (dev): {why.get(name)}"
    if name in why and FALLBACK in why:
        raise ValueError(f"{refusal}; {instead}, or set training.best_metric: loss")
    if name in why:
        return FALLBACK, f"{refusal}; {FALLBACK} decides best.pt instead of training.best_metric"
    if name in BY_EVENT and name not in ALWAYS and _always_on(grounds) <= max(FALSE_ALARMS):
        return name, (f"validation (dev) has {hours(3600 * _background(grounds))} of background: a "
                      f"detector that is always on has event_f1 {always_on_f1(grounds):.2f} there; "
                      f"training.best_metric {FALLBACK} would tell more")
    return name, ""


def _before_scoring(recordings):
    """(their ground, undefined()) of recordings that are not scored yet."""
    labelled = [r for r in recordings if r.labelled]
    grounds = [{"patient": person(r.patient), "seconds": r.seconds, **ground(r.events, r.seconds)}
               for r in labelled]
    inside = sum(np.diff(r.events).sum() for r in labelled)
    return grounds, _reasons(grounds, inside < sum(r.seconds for r in labelled))


# ---- counts of one recording ----

def count(truth, found, seconds):
    """{name: int}: counts of events found against the truth, both (N, 2) in seconds. A new count
    is one more row here, and a formula of it one more in COUNTED."""
    by_event, by_sample = _scorers(truth, found, seconds)
    counts = {
        "event_tp": by_event.tp,
        "event_fp": by_event.fp,
        "event_true": by_event.refTrue,         # after the scorer's own merging and cutting
        "sample_tp": by_sample.tp,
        "sample_fp": by_sample.fp,
        "sample_true": by_sample.refTrue,
    }
    return {name: int(value) for name, value in counts.items()}


def ground(truth, seconds):
    """What scores of a recording rest on: seizures as the scorer counts them; seconds of
    background, further than SzCORE's tolerance from every one of them; and the false alarms of a
    detector that is always on there, which is cut every 5 minutes."""
    always = count(truth, np.array([[0.0, seconds]]), seconds)
    near = reached = 0.0
    for begin, end in truth:
        begin = max(reached, begin - TOLERANCE.toleranceStart)
        reached = max(reached, min(seconds, end + TOLERANCE.toleranceEnd))
        near += max(0.0, reached - begin)
    return {"reference": always["event_true"], "background": float(seconds - near),
            "always_on": always["event_fp"]}


def apart(truth, found, seconds):
    """(missed, hit, false), each (N, 2) in seconds: the events that count() counts, after the
    scorer's merging and cutting."""
    by_event, _ = _scorers(truth, found, seconds)
    early, late = TOLERANCE.toleranceStart, TOLERANCE.toleranceEnd

    def any_of(mask, begin, end):
        return mask[max(0, round(begin * by_event.fs)):round(end * by_event.fs)].any()
    hit = [bool(any_of(by_event.hyp.mask, a - early, b + late)) for a, b in by_event.ref.events]
    false = [not any_of(by_event.tpMask, a, b) for a, b in by_event.hyp.events]
    reference, hypothesis = (np.reshape(by.events, (-1, 2)) for by in (by_event.ref, by_event.hyp))
    hit, false = np.array(hit, bool), np.array(false, bool)
    return reference[~hit], reference[hit], hypothesis[false]


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
    return _reasons(records, any(not s["label"].all() for s in records))


def _reasons(grounds, background):
    """{metric: reason}, from ground() with patient and seconds of each labelled recording, and
    whether any moment lies outside seizures.

    A detector that is always on finds every seizure without looking. Sensitivity at a rate says
    something where there are hours enough for one false alarm, and where being always on costs ten
    times the rate: what is found by chance stays below a tenth."""
    if not grounds:
        return dict.fromkeys(METRICS, "no recording is labelled")
    why = {}
    if not background:
        why |= dict.fromkeys(RANKING, "there is no background")
    if not any_reference(grounds):
        return why | {name: "there is no seizure in it" for name in METRICS if name not in ALWAYS}
    # as they are printed: "2.40 h of background, 2.4 h needed" would be no reason
    background, on = _background(grounds), round(_always_on(grounds))
    for name, rate in AT_RATE.items():
        if round(background, 2) < 24 / rate:
            why[name] = f"{hours(3600 * background)} of background, {24 / rate:g} h needed"
        elif on < 10 * rate:
            why[name] = (f"a detector that is always on has {how_many(on, 'false alarm')} in 24 h, "
                         f"{10 * rate:g} needed")
    return why


def _always_on(grounds):
    """False alarms per 24 h of a detector that is always on: pooled or as the mean over patients,
    whichever is less. A minute of background of one patient moves the mean, a day of one the sum,
    while the clips of all others cost such a detector nothing."""
    of_each = [g["always_on"] * DAY / g["seconds"] for g in _patients(grounds)]
    pooled = sum(g["always_on"] for g in grounds) * DAY / sum(g["seconds"] for g in grounds)
    return float(min(pooled, np.mean(of_each)))


def always_on_f1(grounds):
    """Event F1 of a detector that is always on, mean over patients, 0 of one without a seizure:
    what looking at nothing gives. NaN without any seizure."""
    if not any_reference(grounds):
        return math.nan
    f1 = [2 * g["reference"] / (2 * g["reference"] + g["always_on"]) for g in _patients(grounds)
          if g["reference"] or g["always_on"]]
    return float(np.mean(f1))


def _background(grounds):
    """Hours further than the tolerance from every seizure."""
    return sum(g["background"] for g in grounds) / 3600


def _patients(grounds):
    """ground() and seconds of each patient, summed over his recordings."""
    return [{name: sum(g[name] for g in mine) for name in ("seconds", "reference", "always_on")}
            for mine in of_each_patient(grounds)]


def of_each_patient(records):
    """Those of one patient after those of the other, [[record]], in the order of their names."""
    patients = {}
    for s in records:
        patients.setdefault(s["patient"], []).append(s)
    return [patients[name] for name in sorted(patients)]


def any_reference(records):
    """Whether the scorer sees a seizure: one below a tenth of a second may vanish at its 10 Hz."""
    return any(s["reference"] for s in records)


def grounds(records):
    """What the scores of these records rest on, as plain numbers."""
    return {
        "recordings": len(records),
        "hours": sum(s["seconds"] for s in records) / 3600,
        "background_hours": _background(records),
        "seizures": sum(s["seizures"] for s in records),
        "patients": len({s["patient"] for s in records}),
        "always_on_f1": always_on_f1(records),
    }


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
    rows = []
    for mine in of_each_patient(records):
        n = summed(mine)
        rows.append({name: formula(n, kind) for name, (_, formula, kind) in COUNTED.items()})
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


def at_false_alarms(records, tried):
    """{metric: sensitivity by event of the best threshold within each false-alarm rate, 0 if none
    is}; SzCORE's counts, pooled over the set. tried: bool (K,), the thresholds that count."""
    n = summed(records)
    alarms = n["event_fp"][tried] / (n["seconds"] / DAY)
    found = n["event_tp"][tried] / np.maximum(1, n["event_true"][tried])
    return {name: float(found[alarms <= rate].max(initial=0)) for name, rate in AT_RATE.items()}
