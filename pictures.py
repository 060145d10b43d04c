"""Pictures: a recording with its true and detected seizures, and the curves of a training run.

    pictures.draw(recording, probability, events, threshold, "chb01_03.png")
    pictures.curves("results/v3")                           writes results/v3/curves.png

evaluate.py --plot draws every recording; train.py draws the curves. Nothing here opens a window.
"""
import math
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

import checkpoint
import edf

FS = edf.FS
TRUE = "#e08e0b"                        # labelled seizures, best.pt
FOUND = "#1f6fb2"                       # detected seizures
INK = "#22262b"                         # traces, text
STOP = "#b3261e"                        # resumes
CHAINS = ("Fp1 F7 T3 T5 O1", "Fp1 F3 C3 P3 O1", "Fz Cz Pz", "Fp2 F4 C4 P4 O2", "Fp2 F8 T4 T6 O2")
PAIRS = [pair for chain in CHAINS for pair in zip(chain.split(), chain.split()[1:])]
SENSITIVITIES = (20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)     # uV between neighbouring traces


# ---- a recording ----

def draw(recording, probability, events, threshold, path, most=4):
    """PNG of one recording: the whole probability track, then up to `most` labelled or detected events
    as EEG in the longitudinal bipolar montage (double banana, left to right) above their probability.
    events: (N, 2) in samples."""
    truth = np.asarray(recording.events).reshape(-1, 2)
    found = np.asarray(events).reshape(-1, 2) / FS
    spans = _spans(recording, probability, truth, found)
    shown = spans[:most]
    figure = Figure(figsize=(15, 1.9 + 6.6 * len(shown)), dpi=100, layout="constrained")
    rows = figure.subplots(1 + 2 * len(shown), 1, height_ratios=[1.5] + [5.4, 1.2] * len(shown))
    title = _title(recording, found, len(spans), most)
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


def _title(recording, found, places, most):
    labels = f"{len(recording.events)} labelled" if recording.labelled else "unlabelled"
    title = f"{recording.name}    {_clock(recording.seconds)},  {labels},  {len(found)} detected"
    if places > most:
        title += f",  {most} of {places} places shown"
    return title


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
            first, last = spans[-1]
            spans[-1] = (first, min(recording.seconds, max(last, end), first + longest))
    return spans


def _mark(axis, truth, found):
    for begin, end in truth:
        axis.axvspan(begin, end, color=TRUE, alpha=0.18, lw=0)
    top = axis.get_xaxis_transform()
    for begin, end in found:
        axis.plot([begin, end], [1, 1], color=FOUND, lw=9, solid_capstyle="butt", transform=top)
        axis.axvline(begin, color=FOUND, lw=1.1, ls=(0, (4, 3)))
        axis.axvline(end, color=FOUND, lw=1.1, ls=(0, (4, 3)))


def _track(axis, probability, begin, end, truth, found, threshold):
    first = int(begin * FS)
    last = int(math.ceil(end * FS))
    piece = np.clip(probability[first:last], 0, 1)
    # thinned to what a picture can show, but never by a peak
    step = max(1, len(piece) // 3000)
    piece = np.maximum.reduceat(piece, np.arange(0, len(piece), step))
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
    first = int(begin * FS)
    last = int(end * FS)
    scale = np.asarray(recording.scale, np.float32)
    eeg = recording.read(first, last - first) * scale[:, None]
    row = dict(zip(recording.channels, eeg))
    names = [f"{a}-{b}" for a, b in PAIRS]
    if recording.montage == "bipolar":
        return np.stack([row[name] for name in names]), names
    return np.stack([row[a] - row[b] for a, b in PAIRS]), names


def _traces(axis, recording, begin, end, truth, found):
    eeg, names = _derivations(recording, begin, end)
    eeg = eeg - np.median(eeg, 1, keepdims=True)
    swing = np.median(np.percentile(np.abs(eeg), 98, axis=1))
    spacing = next((s for s in SENSITIVITIES if s >= 1.5 * swing), SENSITIVITIES[-1])
    gaps = np.repeat(np.arange(len(CHAINS)), [len(chain.split()) - 1 for chain in CHAINS])
    height = -(np.arange(len(names)) + 0.6 * gaps)          # room between the chains
    seconds = begin + np.arange(eeg.shape[1]) / FS
    _mark(axis, truth, found)
    for y, trace in zip(height, eeg):
        axis.plot(seconds, y + np.clip(trace / spacing, -2.5, 2.5), color=INK, lw=0.55)
    axis.set(xlim=(begin, end), ylim=(height[-1] - 1.6, 1.6), yticks=height, yticklabels=names)
    axis.set_xticks(np.arange(math.ceil(begin), end), minor=True)
    axis.grid(axis="x", which="both", color=INK, alpha=0.10, lw=0.5)
    axis.tick_params(which="both", bottom=False, labelbottom=False, length=0)
    edge = end + 0.006 * (end - begin)
    foot = height[-1]
    axis.plot([edge, edge], [foot, foot + 1], color=INK, lw=2, clip_on=False)
    axis.text(edge, foot + 0.5, f"  {spacing} \u00b5V", va="center", fontsize=9, color=INK)
    _tidy(axis)
    axis.spines[["left", "bottom"]].set_visible(False)


# ---- a training run ----

def curves(run_directory):
    """Draw <run_directory>/curves.png from metrics.jsonl and, where there is one, saves.jsonl: loss,
    learning rate and the metric that decides best.pt over the steps, with saves and resumes marked.
    Returns its path."""
    directory = Path(run_directory)
    rows = _rows(directory / "metrics.jsonl")
    files = _rows(directory / "saves.jsonl")
    train = [r for r in rows if r["kind"] == "train"]
    checks = [r for r in rows if r["kind"] == "validation"]
    metric = _best_metric(directory / "config.yaml")
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    loss, rate, best = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 3))
    figure.suptitle(directory.resolve().name, x=0.01, ha="left", fontsize=13, color=INK)
    _curve(loss, train, "loss", INK, "training loss")
    validation = loss.twinx() if train else loss
    _curve(validation, checks, "loss", TRUE, "validation: cross-entropy", "o-")
    _curve(rate, train, "lr", INK, "learning rate")
    _curve(best, checks, metric, FOUND, f"{metric} (dev)", "o-")
    chosen = [r for r in checks if r.get("best") and r.get(metric) is not None]
    best.plot([r["step"] for r in chosen], [r[metric] for r in chosen], "*", color=TRUE, ms=13,
              label="best.pt")
    saves = sorted({r["step"] for r in files if r["kind"] == "save"})
    resumes = sorted({r["step"] for r in files if r["kind"] == "resume"})
    foot = best.get_xaxis_transform()
    best.plot(saves, [0.02] * len(saves), "|", color=INK, ms=9, label="save", transform=foot)
    for axis in (loss, rate, best):
        lines = [axis.axvline(step, color=STOP, lw=1, ls="--") for step in resumes]
    if lines:
        lines[0].set_label("resume")
    best.set_xlabel("step", color=INK)
    best.legend(frameon=False, fontsize=9)
    path = directory / "curves.png"
    figure.savefig(path)
    return path


def _rows(path):
    return list(checkpoint.read_json_lines(path)) if path.is_file() else []


def _best_metric(config):
    """The metric that decides best.pt, from a run's config.yaml where there is one."""
    if not config.is_file():
        return "event_f1"
    return yaml.safe_load(config.read_text())["training"]["best_metric"]


def _curve(axis, rows, key, colour, label, style="-"):
    rows = [r for r in rows if r.get(key) is not None]
    axis.plot([r["step"] for r in rows], [r[key] for r in rows], style, color=colour, lw=1.4, ms=4)
    axis.set_ylabel(label, color=colour, fontsize=9)
    axis.tick_params(labelsize=8, colors=INK)
    axis.spines["top"].set_visible(False)
