"""What is told about scores: intervals over patients, sensitivity against false alarms, lines.

    rows = report.trade_off(patients, curves, thresholds)   patients: one {metric: (K,)} each
    report.show(result, names, folder)                      result: the content of scores.json

Patients differ far more than the recordings of one, so that intervals are drawn over patients: the
percentile bootstrap (Efron & Tibshirani 1993), the same draw for every metric and threshold.
"""
import math

import numpy as np

from eeg.console import hours, how_many, rounded

DRAWS = 2000                            # resamples of the patients
LEVEL = 95                              # per cent of them within an interval
MAX_NAMED = 20                          # files without scores that are printed
SHOWN = ("event_sensitivity", "event_precision", "event_f1", "false_alarms_per_24h")
FEW_HOURS = 2.4                         # in which one false alarm is more than 10 in 24 h
RATES = (100, 50, 20, 10, 5, 2.5, 1, 0)                 # false alarms per 24 h of the printed table


def intervals(patients, name):
    """(low, high), each (K,), of the mean over patients of one metric; NaN where nothing can be
    drawn.

    A patient without a value (no F1 where there is neither seizure nor detection) is left out of
    each mean, as in the score itself. One patient has no interval."""
    values = np.stack([p[name] for p in patients])          # (patients, K)
    if len(patients) < 2:
        return np.full((2, values.shape[1]), np.nan)
    rng = np.random.default_rng(0)
    even = np.full(len(patients), 1 / len(patients))
    times = rng.multinomial(len(patients), even, DRAWS)     # how often each patient is drawn
    known = ~np.isnan(values)
    count = times @ known.astype(float)
    total = times @ np.nan_to_num(values)
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    tails = (50 - LEVEL / 2, 50 + LEVEL / 2)
    low_high = np.full((2, values.shape[1]), np.nan)
    drawn = ~np.isnan(means).all(0)
    low_high[:, drawn] = np.nanpercentile(means[:, drawn], tails, axis=0)
    return low_high


def intervals_at(patients, names, index):
    """{metric: [low, high]} at one threshold, without those that have none."""
    at = {}
    for name in names:
        low_high = intervals(patients, name)[:, index]
        if np.isfinite(low_high).all():
            at[name] = low_high.tolist()
    return at


def trade_off(patients, curves, thresholds):
    """One row per threshold: each metric of SHOWN as [value, low, high], None where there is
    none."""
    bounds = {name: intervals(patients, name) for name in SHOWN}
    rows = []
    for i, threshold in enumerate(thresholds):
        row = {"threshold": float(threshold)}
        for name in SHOWN:
            low, high = bounds[name]
            row[name] = [plain(x) for x in (curves[name][i], low[i], high[i])]
        rows.append(row)
    return rows


def plain(value):
    """A number as JSON has it: None for NaN."""
    return None if np.isnan(value) else float(value)


def rows_to_print(rows, threshold):
    """Of a trade-off the row in use, and for each of RATES the best sensitivity within it, with the
    fewest false alarms that give it."""
    chosen = [row for row in rows if row["threshold"] == threshold]
    for rate in RATES:
        within = [row for row in rows if row["false_alarms_per_24h"][0] <= rate]
        if within:
            chosen.append(max(within, key=lambda row: (row["event_sensitivity"][0] or 0.0,
                                                       -row["false_alarms_per_24h"][0])))
    unique = {row["threshold"]: row for row in chosen}
    return [unique[key] for key in sorted(unique)]


# ---- lines ----

def validation_line(summary, name):
    """The numbers of a validation that matter, with their ground: loss, `name` (which decides
    best.pt), AUROC and false alarms."""
    parts = []
    for key in dict.fromkeys(("loss", name, "auroc")):
        parts.append(f"{key} {_shown(summary[key])}")
        if key == "event_f1":           # says nothing without what looking at nothing gives
            parts[-1] += f" (always on: {_shown(summary['always_on_f1'])})"
    alarms = how_many(_shown(summary["false_alarms_per_24h"]), "false alarm")
    parts.append(f"{alarms} in 24 h")
    return f"{', '.join(parts)}; {_ground(summary, mean='mean over ')}"


def _shown(value):
    return "-" if math.isnan(value) else rounded(value, ".4g")


def _single(of_hours):
    """What one false alarm counts for, where that is much."""
    return f" (each counts as {24 / of_hours:.0f})" if 0 < of_hours < FEW_HOURS else ""


def _ground(scores, of="", mean=""):
    """What scores rest on. of: "labelled_" for scores.json, whose hours and patients are all."""
    background = hours(3600 * scores["background_hours"])
    return (f"on {hours(3600 * scores[of + 'hours'])} ({background} of background), "
            f"{how_many(scores['seizures'], 'seizure')}, "
            f"{mean}{how_many(scores[of + 'patients'], 'patient')}")


def show(result, names, out):
    """Print what scores.json holds, shortly; names: the metrics in their order."""
    detections = sum(row["detections"] for row in result["per_recording"])
    seizures = "no labels"
    if result["labelled_recordings"]:
        seizures = how_many(result["seizures"], "labelled seizure")
    print(f"{how_many(result['recordings'], 'recording')}, {hours(3600 * result['hours'])}, "
          f"{how_many(result['patients'], 'patient')}, {seizures}, "
          f"{how_many(detections, 'detection')}")
    if result["corpus_version"]:
        print(f"corpus: {result['corpus_version']}")
    print(f"threshold {rounded(result['threshold'], '.3f')}: {result['threshold_source']}")
    for key, value in result["overridden"].items():
        print(f"overridden: {key} = {value}")
    if result["labelled_recordings"]:
        _show_metrics(result, names)
    if result["trade_off"]:
        _show_trade_off(result)
    if result["includes_training"]:
        print("these recordings include those of the training: "
              "--split dev or --split eval leaves them out")
    for file, why in result["refused"][:MAX_NAMED]:
        print(f"not scored: {file}: {why}")
    if len(result["refused"]) > MAX_NAMED:
        print(f"not scored: {len(result['refused']) - MAX_NAMED} more: refused in scores.json")
    print(f"events and scores.json in {out}")


def _show_metrics(result, names):
    print(f"scores {_ground(result, 'labelled_')}; by event and by sample: mean over patients")
    if result["always_on_f1"] is not None:
        print(f"  a detector that is always on has event_f1 {rounded(result['always_on_f1'])} here")
    for name in names:
        value = result[name]
        interval = result["intervals"].get(name)
        if value is None:
            print(f"  {name:<22} -  ({result['not_computed'].get(name, 'no patient has a value')})")
            continue
        text = f"{rounded(value):<9} [{_range(interval)}]" if interval else rounded(value)
        if name == "false_alarms_per_24h":
            text += _single(result["labelled_hours"])
        print(f"  {name:<22} {text}")


def _show_trade_off(result):
    print(f"sensitivity against false alarms {_ground(result, 'labelled_')}; * the threshold in "
          f"use; [{LEVEL} % over patients]")
    print("    threshold  false alarms/24 h        sensitivity          event F1")
    for row in rows_to_print(result["trade_off"], result["threshold"]):
        mark = "*" if row["threshold"] == result["threshold"] else " "
        alarms = _cell(row["false_alarms_per_24h"])
        found = _cell(row["event_sensitivity"])
        f1 = _cell(row["event_f1"])
        print(f"  {mark} {rounded(row['threshold'], '.3f'):<9}  {alarms:<24} {found:<20} {f1}")
    if not result["intervals"]:
        print("  no intervals: they need two patients")


def _cell(values):
    value, low, high = values
    if value is None:
        return "-"
    text = rounded(value, ".2f")
    if low is not None:
        text += f" [{_range((low, high))}]"
    return text


def _range(bounds):
    low, high = bounds
    return f"{rounded(low, '.2f')}..{rounded(high, '.2f')}"
