"""How bench/learn.py and bench/race.py judge a detector: recordings, scores, printed tables.

`on` maps each part (train, dev, unseen, real) to its recordings. `tracks` maps each part to {name of
a recording: float32 (samples,)}. A row holds the scores of one detector, one seed and one budget.
"""
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eeg import corpora                                                          # noqa: E402
import data                                                             # noqa: E402
import detectors                                                        # noqa: E402
import evaluate                                                         # noqa: E402
from scoring import metrics                                                          # noqa: E402
from eeg import synth                                                            # noqa: E402
from eeg.edf import FS                                                      # noqa: E402

SHARED = ROOT.parent / "shared" / "eeg"
CLIPS = SHARED / "recordings"
CHB = "chb01", "chb02", "chb03"
SHOWN = ("auroc", "average_precision", "sample_f1", "event_f1", "event_sensitivity",
         "false_alarms_per_24h")


# ---- corpora ----

def synthetic(work, name, hours, patients, seed, montage="referential", channels=()):
    """Recordings of a synthetic corpus below `work`, made where they are not there yet."""
    folder = work / f"{name}_{montage}"
    if not folder.is_dir():
        source = work / f"{name}_edf"
        if not source.is_dir():
            synth.synth(work / f"{name}_edf.part", hours=hours, patients=patients, seed=seed)
            os.replace(work / f"{name}_edf.part", source)
        imported(source, folder, montage, channels)
    return data.open_corpus(folder)


def imported(source, folder, montage, channels=()):
    corpora.import_corpus(source, f"{folder}.part", montage=montage, channels=channels,
                          say=lambda line: print(line, file=sys.stderr))   # no result of the bench
    os.replace(f"{folder}.part", folder)


def real(work, folder="recordings"):
    """The labelled clips, as CHB-MIT has them: bipolar."""
    if not (work / folder).is_dir():
        imported(SHARED / folder, work / folder, "bipolar")
    return [r for r in data.open_corpus(work / folder) if r.labelled]


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


def judged(on, tracks):
    """{unseen: metrics, real: what judged_on_clips() says} at the threshold tuned on dev."""
    dev = [evaluate.score(r, tracks["dev"][r.name], {}) for r in on["dev"]]
    c = {"tune": False, "threshold": evaluate.summarise(dev, {})["threshold"]}
    unseen = [evaluate.score(r, tracks["unseen"][r.name], c) for r in on["unseen"]]
    summary = evaluate.summarise(unseen, c)
    found = {"threshold": c["threshold"], "unseen": {name: summary[name] for name in SHOWN}}
    if "real" in tracks:
        found["real"] = judged_on_clips(on["real"], tracks["real"], c)
    return found


# ---- the real clips ----

def judged_on_clips(recordings, tracks, c):
    """AUROC per second of all, of the CHB-MIT patients and of each; seizures found and false alarms
    (any overlap, pooled) at the threshold of c; and fewest_of_patient() of each."""
    healthy = [r for r in recordings if not r.patient.endswith(CHB)]
    groups = {"all": recordings, "CHB-MIT": [r for r in recordings if r.patient.endswith(CHB)]}
    groups |= {name: [r for r in recordings if r.patient.endswith(name)] for name in CHB}
    found, alarms = counted(recordings, tracks, c["threshold"])
    areas = {name: auroc(group, tracks) for name, group in groups.items()}
    # the healthy subject's seconds outweigh all others in the pool
    areas["mean"] = float(np.mean([areas[name] for name in CHB]))
    return {
        "auroc": areas,
        "found": found,
        "alarms": alarms,
        "seizures": sum(len(r.events) for r in recordings),
        "every": {name: fewest_of_patient(groups[name], healthy, tracks) for name in CHB},
    }


def fewest_of_patient(recordings, healthy, tracks):
    """(false alarms in the recordings of a patient, in those of the healthy) at the threshold that
    finds every seizure of the patient with the fewest; None where none does."""
    values = np.concatenate([tracks[r.name][::FS] for r in recordings])
    # even in rank, so that a detector's own scale plays no part
    thresholds = np.unique(np.quantile(values, np.linspace(0, 1, 200)))
    seizures = sum(len(r.events) for r in recordings)
    complete = []
    for threshold in map(float, thresholds):
        found, alarms = counted(recordings, tracks, threshold)
        if found == seizures:
            complete.append((alarms, -threshold))
    if not complete:
        return None
    alarms, threshold = min(complete)
    return alarms, counted(healthy, tracks, -threshold)[1]


def auroc(recordings, tracks):
    middle = slice(FS // 2, None, FS)
    probability = np.concatenate([tracks[r.name][middle] for r in recordings])
    label = np.concatenate([r.labels(0, r.samples)[middle] for r in recordings]) > 0
    return metrics.auroc(probability, label)


def counted(recordings, tracks, threshold):
    """(seizures that a detection touches, detections that touch none)."""
    found = alarms = 0
    for r in recordings:
        detected = evaluate.postprocess(tracks[r.name], threshold, {}) / FS
        overlap = metrics.touching(r.events, detected)
        found += int(overlap.any(1).sum())
        alarms += int((~overlap.any(0)).sum())
    return found, alarms


# ---- tables ----

OF_PATIENT = ("all of chbNN: the fewest\nfalse alarms at which a threshold finds every seizure of "
              "the patient, in its own clips + in the\nhealthy subject's.")


def name_of(row):
    return f"{row['system']}, {row['budget']}" if row["budget"] != "all" else row["system"]


def grouped(rows):
    """{label: rows of all seeds}, in the order in which they came."""
    found = {}
    for row in rows:
        found.setdefault(name_of(row), []).append(row)
    return found


def spread(values, digits=3):
    """mean (lowest-highest) of several, a lone one by itself, - where all are undefined."""
    values = [value for value in values if value is not None and value == value]
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
    return text


def print_table(titles, lines):
    widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
    for line in [titles, *lines]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def told(recordings):
    hours = sum(r.seconds for r in recordings) / 3600
    return (f"{hours:.1f} h of {len({r.patient for r in recordings})} patients, "
            f"{sum(len(r.events) for r in recordings)} seizures")


def table_unseen(on, rows):
    print(f"\nSynthetic EEG: trained on {told(on['train'])}; thresholds on {told(on['dev'])};\n"
          f"scored on {told(on['unseen'])}. Mean over seeds (range).\n")
    lines = []
    for name, group in grouped(rows).items():
        lines.append([
            name, str(len(group)), f"{group[0]['parameters']:,}",
            f"{np.mean([row['hours'] for row in group]):.1f}",
            f"{np.mean([row['minutes'] for row in group]):.1f}",
            *(spread([row["unseen"][key] for row in group], 1 if "alarms" in key else 3)
              for key in SHOWN),
            group[0]["chosen"] if len(group) == 1 else ""])
    print_table(["", "seeds", "parameters", "h seen", "CPU min", "AUROC", "average precision",
                 "sample F1", "event F1", "sensitivity", "false alarms/24 h", "picked"], lines)


def table_real(on, rows):
    print(f"\nReal EEG, scored on {told(on['real'])}; AUROC per second, pooled. Mean over seeds "
          "(range).\n")
    lines = []
    for name, group in grouped(rows).items():
        real = [row["real"] for row in group]
        lines.append([
            name, str(len(group)),
            *(spread([r["auroc"][key] for r in real]) for key in (*CHB, "mean", "CHB-MIT", "all")),
            spread([r["found"] for r in real], 0) + f" of {real[0]['seizures']}",
            spread([r["alarms"] for r in real], 0),
            *(with_healthy([r["every"][patient] for r in real]) for patient in CHB)])
    print_table(["", "seeds", *CHB, "mean", "CHB-MIT", "all", "found", "false alarms",
                 *(f"all of {patient}" for patient in CHB)], lines)
    print("\nfound, false alarms: at the threshold tuned on synthetic dev patients. " + OF_PATIENT)


def with_healthy(pairs):
    """What fewest_of_patient() says, of one seed or more."""
    return " ".join("never" if pair is None else f"{pair[0]}+{pair[1]}" for pair in pairs)
