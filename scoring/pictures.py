"""Pictures: a recording with its true and detected seizures, sensitivity against false alarms, and
the curves of a training run.

    pictures.draw(recording, probability, events, threshold, "chb01_03.png")
    pictures.curves("results/v3")                           writes results/v3/curves.png

EEG is drawn as it is read on paper: longitudinal bipolar montage (double banana, left to right),
negative up, 1 to 70 Hz, 10 s a page at 30 mm/s and a standard sensitivity in uV/mm. evaluate.py
--plot draws every recording; train.py draws the curves. Nothing here opens a window.
"""
import datetime
import math
import os
from pathlib import Path

import numpy as np
import yaml

os.environ["MPLBACKEND"] = "agg"        # one that a notebook left there may not exist here
import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from PIL import Image
from scipy.signal import butter, sosfiltfilt

from eeg import edf
from eeg.console import how_many, rounded
from eeg.disk import read_json_lines
from scoring import metrics

matplotlib.rcParams["text.parse_math"] = False          # names may hold $
FONT = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
FS = edf.FS
TRUE = "#e08e0b"                        # labelled seizures, best.pt
FOUND = "#1f6fb2"                       # detected seizures
INK = "#22262b"                         # traces, text
STOP = "#b3261e"                        # resumes, cut traces
BLUNT = {"solid_capstyle": "butt"}
DASHED = {"lw": 1.1, "ls": (0, (4, 3))}
SMALL = {"fontsize": 9, "color": INK}

CHAINS = (
    "Fp1 F7 T3 T5 O1",
    "Fp1 F3 C3 P3 O1",
    "Fz Cz Pz",
    "Fp2 F4 C4 P4 O2",
    "Fp2 F8 T4 T6 O2",
)
PAIRS = {                               # derivation -> (its electrodes, number of its chain)
    f"{a}-{b}": (a, b, number)
    for number, chain in enumerate(CHAINS)
    for a, b in zip(chain.split(), chain.split()[1:])
}

# between ticks, seconds: as clocks are read
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
PAGE = 10                               # seconds
SPEED = 30                              # mm per second
SENSITIVITIES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)        # uV per mm
ALONE = ("", "", 0)                     # as in PAIRS: of a channel that is none of them
SPACING = 8                             # mm between neighbouring traces
GAP = 5                                 # mm more between chains
CUT = 2.5                               # traces are cut this many spacings from their line
BAND = (1, 70)                          # Hz, for display alone
TOLERATED = (-metrics.TOLERANCE.toleranceStart, metrics.TOLERANCE.toleranceEnd)         # seconds
MARGIN = 2                              # seconds of it before and after, for its transients
LEAD = 4                                # seconds shown before an event begins and after it ends
LONGEST = 40                            # characters of a name: its end says more than its folders
NAMED = 12                              # characters of a trace's name: what fits left of it
PAGES = 3                               # of one event at most

INCH = 25.4                             # mm
WIDTH = 15                              # inches of the whole picture
LEFT = 0.9                              # inches left of every axis
TITLE = 0.6                             # inches
STRIP = 0.9                             # inches of a probability track
ROOM = 0.7                              # inches above a page for its caption
CLOSE = 0.1                             # inches between the EEG and its probability


# ---- a recording ----

def draw(recording, probability, events, threshold, path, most=4):
    """PNG or PDF of one recording: the whole probability track, then up to `most` places as pages
    of EEG above their probability: missed seizures first, then false alarms, then seizures that
    were found; the peak of the probability where there is nothing. One gain for all pages. events:
    (N, 2) in samples. A PDF has the overview and each page of EEG on a page of its own."""
    truth = np.asarray(recording.events).reshape(-1, 2)
    found = np.asarray(events).reshape(-1, 2) / FS
    places = _places(recording, probability, truth, found)
    pages = []
    for place in places[:most]:
        pages += _pages(place, recording.seconds, found)
    scale = _sensitivity([_displayed(recording, begin, min(begin + PAGE, recording.seconds))[0]
                          for _, begin in pages])
    title = _title(recording, places, most)
    several = [[page] for page in pages] if Path(path).suffix == ".pdf" else [pages]
    figures = []
    for number, shown in enumerate(several):
        sheet = Sheet(recording, probability, truth, found, threshold, len(shown), scale)
        sheet.overview(title, pages if number == 0 else shown)
        for caption, begin in shown:
            sheet.page(caption, begin)
        figures.append(sheet.figure)
    _save(figures, path)


def _save(figures, path):
    """Write a PDF with a page a figure, or the one figure as a PNG of 256 colours, a third of the
    size. An octree keeps a colour that only one thin line has, where a median cut drops it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pdf":
        with PdfPages(path) as pdf:
            for figure in figures:
                pdf.savefig(figure)
        return
    figure, = figures
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    palette = pixels.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    try:
        palette.save(path)
    except OSError as error:
        error.filename = str(path)      # not named where the disk is full
        raise


def _places(recording, probability, truth, found):
    """[(kind, begin, end)] in seconds, those first that a reader looks for: the events of the
    scores, by SzCORE's merging, cutting and tolerance; without labels each detection."""
    if recording.labelled:
        missed, hit, false = metrics.apart(truth, found, recording.seconds)
        places = _named("missed seizure", missed) + _named("false alarm", false)
        for event in hit:
            # the pages are of the seizure: what is beside it counts where nothing is in it
            inside = metrics.touching(event[None], found)[0]
            near = metrics.touching(event[None] + TOLERATED, found)[0]
            begin, end = np.concatenate([[event], found[inside if inside.any() else near]]).T
            places += _named("found seizure", np.array([[begin.min(), end.max()]]))
    else:
        places = _named("detection", found)
    if places:
        return places
    peak = float(np.argmax(probability)) / FS
    return [("nothing detected; highest probability", peak, peak)]


def _named(kind, events):
    return [(kind, begin, end) for begin, end in events.tolist()]


def _pages(place, seconds, found=()):
    """[(caption, first second)] of one place: pages that follow each other; the caption says which
    of a long event are left out."""
    kind, begin, end = place
    last = max(0.0, min(end + LEAD, seconds) - PAGE)        # the page on which the event ends
    first = max(0.0, min(begin - LEAD, last))
    starts = np.arange(first, last, PAGE).tolist() or [first]
    if starts[-1] + PAGE < min(end, seconds):
        starts.append(last)
    if end > begin:
        kind += f", {rounded(end - begin, '.1f')} s"
    onsets = [onset for onset, _ in found if begin <= onset < end]
    pages = []
    before = -1
    for number in _shown(starts, onsets):
        caption = f"{kind}, page {number + 1} of {len(starts)}"
        if number > before + 1:
            caption += f" (before it {number - before - 1} left out)"
        pages.append((caption, starts[number]))
        before = number
    return pages


def _shown(starts, onsets):
    """Which of the pages of an event: of many its beginning, the page on which its first detection
    begins, or else the second, and its end."""
    if len(starts) <= PAGES:
        return range(len(starts))
    detected = [int((onset - starts[0]) // PAGE) for onset in onsets[:1]]
    return sorted({0, max([1, *detected]), len(starts) - 1})


def _title(recording, places, most):
    kinds = [kind for kind, begin, end in places if end > begin]
    missed = kinds.count("missed seizure")
    hits = kinds.count("found seizure")
    title = f"{_named_shortly(recording.name)}    {_elapsed(recording.seconds)}"
    if recording.labelled:
        seizures = how_many(len(recording.events), "labelled seizure")
        title += f",  {seizures}; by SzCORE {hits} found, {missed} missed"
        title += f",  {how_many(kinds.count('false alarm'), 'false alarm')}"
    else:
        title += f",  unlabelled,  {how_many(kinds.count('detection'), 'detection')}"
    if len(places) > most:
        title += f",  {most} of {len(places)} places shown"
    return title


def _drawable(text):
    """What the font lacks is escaped, as a terminal in ASCII shows it."""
    return "".join(c if FONT.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)


def _named_shortly(name):
    name = _drawable(name)
    return name if len(name) <= LONGEST else "..." + name[-LONGEST:]


def _trace_name(name):
    """Of a long one both ends: either may tell it from the others."""
    name, half = _drawable(name), NAMED // 2 - 1
    return name if len(name) <= NAMED else f"{name[:half]}..{name[-half:]}"


def _elapsed(seconds):
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _began(recording):
    """When a recording began, None where that is not known."""
    try:
        return datetime.datetime.fromisoformat(recording.began)
    except ValueError:
        return None


class Sheet:
    """One picture, filled from its top in inches, so that a second is 30 mm wide everywhere."""

    def __init__(self, recording, probability, truth, found, threshold, pages, scale):
        self.recording = recording
        self.scale = scale              # uV per mm, of all its pages
        self.probability = probability
        self.truth = truth
        self.found = found
        self.threshold = threshold
        self.began = _began(recording)
        self.eeg_height = _eeg_height(recording)
        page = self.eeg_height + STRIP + ROOM + CLOSE
        self.height = TITLE + STRIP + pages * page + CLOSE + ROOM / 2
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=100)
        self.top = self.height          # of what is still empty

    def axis(self, height, above):
        """The next axis downwards, `above` inches below the last one."""
        self.top -= above + height
        width = PAGE * SPEED / INCH
        axis = self.figure.add_axes((
            LEFT / WIDTH,
            self.top / self.height,
            width / WIDTH,
            height / self.height,
        ))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
        return axis

    def clock(self, seconds, _=None):
        """Time of day where the recording says when it began, else time since then."""
        if self.began is None:
            return _elapsed(seconds)
        return f"{self.began + datetime.timedelta(seconds=float(seconds)):%H:%M:%S}"

    def overview(self, title, pages):
        axis = self.axis(STRIP, TITLE)
        self.track(axis, 0, self.recording.seconds)
        label = "shown below"
        for _, begin in pages:
            axis.plot((begin, begin + PAGE), (0, 0), color=INK, lw=6, **BLUNT, label=label)
            label = None                # once in the legend
        axis.set_xlim(0, self.recording.seconds)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.1), frameon=False, fontsize=9)
        where = "time of day" if self.began else "time since the start"
        axis.set_title(title, loc="left", fontsize=13, color=INK)
        axis.set_xlabel(where, fontsize=8, color=INK, loc="right", labelpad=1)

    def page(self, caption, begin):
        end = begin + PAGE
        eeg = self.axis(self.eeg_height, ROOM)
        eeg.set_title(f"{self.clock(begin)}   {caption}", loc="left", fontsize=11, color=INK)
        self.traces(eeg, begin, min(end, self.recording.seconds))
        track = self.axis(STRIP, CLOSE)
        self.track(track, begin, min(end, self.recording.seconds))
        for axis in (eeg, track):
            axis.set_xlim(begin, end)

    def mark(self, axis, begin, end):
        """The events of an axis, as few artists: hundreds of each would take minutes to draw."""
        shown = np.array([[begin, end]])
        for first, last in self.truth[metrics.touching(self.truth, shown)[:, 0]]:
            axis.axvspan(first, last, color=TRUE, alpha=0.18, lw=0)
        found = self.found[metrics.touching(self.found, shown)[:, 0]]
        top = axis.get_xaxis_transform()
        axis.hlines(np.ones(len(found)), *found.T, FOUND, lw=9, capstyle="butt", transform=top)
        axis.vlines(found.ravel(), 0, 1, FOUND, **DASHED, transform=top)

    def track(self, axis, begin, end):
        first = int(begin * FS)
        last = math.ceil(end * FS)
        piece = np.clip(self.probability[first:last], 0, 1)
        # thinned to what a picture can show, but never by a peak
        step = max(1, len(piece) // 3000)
        piece = np.maximum.reduceat(piece, np.arange(0, len(piece), step))
        seconds = (first + step * (np.arange(len(piece)) + 0.5)) / FS
        self.mark(axis, begin, end)
        axis.fill_between(seconds, piece, color=INK, alpha=0.15, lw=0)
        axis.plot(seconds, piece, color=INK, lw=0.9, label="probability")
        label = f"threshold {rounded(self.threshold, '.3f')}"
        axis.axhline(self.threshold, color=FOUND, lw=0.8, ls=":", label=label)
        if self.recording.labelled:
            axis.fill_between([], [], color=TRUE, alpha=0.3, lw=0, label="labelled seizure")
        axis.fill_between([], [], color=FOUND, lw=0, label="detected seizure")
        axis.set_ylim(0, 1.04)
        axis.set_yticks((0, 1))
        axis.set_ylabel("probability", **SMALL)
        axis.xaxis.set_major_formatter(self.clock)
        step = next((s for s in STEPS if 10 * s >= end - begin), math.ceil((end - begin) / 10))
        # at whole minutes and hours of the clock that is shown
        hour, minute, second = self.began.timetuple()[3:6] if self.began else (0, 0, 0)
        axis.xaxis.set_major_locator(MultipleLocator(step, -(3600 * hour + 60 * minute + second)))

    def traces(self, axis, begin, end):
        eeg, names = _displayed(self.recording, begin, end)
        below = _below(names)
        seconds = begin + np.arange(eeg.shape[1]) / FS
        self.mark(axis, begin, end)
        for y, trace in zip(-below, eeg):
            # negative up, as EEG is read
            line = -trace / self.scale
            shown = np.clip(line, -CUT * SPACING, CUT * SPACING)
            axis.plot(seconds, y + shown, color=INK, lw=0.55)
            if (shown != line).any():
                cut = np.where(shown == line, np.nan, y + shown)
                axis.plot(seconds, cut, color=STOP, lw=1.6)
        axis.set_ylim(-below[-1] - 1.5 * SPACING, 1.5 * SPACING)
        axis.set_yticks(-below, map(_trace_name, names))
        axis.set_xticks(np.arange(math.ceil(begin), begin + PAGE), minor=True)
        axis.grid(axis="x", which="both", color=INK, alpha=0.12, lw=0.5)
        axis.tick_params(which="both", bottom=False, labelbottom=False, length=0)
        axis.spines[["left", "bottom"]].set_visible(False)
        self.legend(axis, below[-1])

    def legend(self, axis, foot):
        scale = self.scale
        edge = 1.012                    # right of the axis, in its own widths
        side = axis.get_yaxis_transform()
        bar = (-foot, SPACING - foot)
        axis.plot((edge, edge), bar, color=INK, lw=2, clip_on=False, transform=side)
        text = (f"{scale} \u00b5V/mm\nbar {SPACING * scale} \u00b5V\nnegative up\n"
                f"{BAND[0]} to {BAND[1]} Hz\n{SPEED} mm/s\n"
                f"red: cut at \u00b1{CUT * SPACING * scale:.0f} \u00b5V")
        axis.text(edge + 0.01, -foot, text, va="bottom", **SMALL, transform=side)


def _derivations(recording, begin, end):
    """uV of the double banana, float32 (K, n), as far as a montage has its electrodes, and the
    names; the channels as they are where it has none."""
    first = int(begin * FS)
    last = min(recording.samples, math.ceil(end * FS))
    scale = np.asarray(recording.scale, np.float32)
    eeg = recording.read(first, last - first) * scale[:, None]
    row = dict(zip(recording.channels, eeg))
    names = _drawn(recording)
    for name in names:
        if name not in row:
            a, b, _ = PAIRS[name]
            row[name] = row[a] - row[b]
    return np.stack([row[name] for name in names]), names


def _drawn(recording):
    """Names of the traces, from top to bottom: last the channels that are in none of the pairs."""
    there = set(recording.channels)
    pairs = {name: {name, a, b} for name, (a, b, _) in PAIRS.items()
             if name in there or {a, b} <= there}
    seen = set().union(*pairs.values())
    return [*pairs, *(name for name in recording.channels if name not in seen)]


def _below(names):
    """mm of each trace below the first: chains stand apart."""
    heights = []
    height = 0
    for name, before in zip(names, [names[0], *names]):
        height += SPACING
        if PAIRS.get(name, ALONE)[2] != PAIRS.get(before, ALONE)[2]:
            height += GAP
        heights.append(height)
    return np.array(heights) - SPACING


def _eeg_height(recording):
    return (_below(_drawn(recording))[-1] + 3 * SPACING) / INCH


def _displayed(recording, begin, end):
    """The derivations within BAND, for the eye alone: zero phase (Butterworth, second order,
    forward and back), with the filter's transients in a margin that is not shown."""
    early = max(0, begin - MARGIN)
    traces, names = _derivations(recording, early, end + MARGIN)
    sos = butter(2, BAND, "bandpass", fs=FS, output="sos")
    centred = traces - traces.mean(1, keepdims=True)
    padding = min(FS, traces.shape[1] - 1)
    filtered = sosfiltfilt(sos, centred, axis=1, padlen=padding)
    first = int(begin * FS)
    last = math.ceil(end * FS)
    skipped = int(early * FS)
    return filtered[:, first - skipped:last - skipped], names


def _sensitivity(pages):
    """The finest of SENSITIVITIES at which most of most traces of the pages keeps to its room."""
    swing = np.median([np.percentile(np.abs(eeg), 98, axis=1) for eeg in pages])
    fitting = [s for s in SENSITIVITIES if s * SPACING >= 1.5 * swing]
    return fitting[0] if fitting else SENSITIVITIES[-1]


# ---- a scored set ----

def trade_off(rows, threshold, path):
    """Picture of sensitivity and event F1 against false alarms per 24 h; rows: report.trade_off."""
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    found, f1 = figure.subplots(1, 2, sharex=True)
    _against_alarms(found, rows, threshold, "event_sensitivity", "event sensitivity", TRUE)
    _against_alarms(f1, rows, threshold, "event_f1", "event F1", FOUND)
    found.legend(frameon=False, fontsize=9)
    _save([figure], path)


def _against_alarms(axis, rows, threshold, name, label, colour):
    points = []
    bands = []
    for row in rows:
        alarms = row["false_alarms_per_24h"][0]
        value, low, high = row[name]
        if value is None:
            continue
        points.append((alarms, value))
        if low is not None:
            bands.append((alarms, low, high))
        if row["threshold"] == threshold:
            used = f"threshold in use, {rounded(threshold, '.3f')}"
            axis.plot(alarms, value, "*", color=INK, ms=14, label=used, clip_on=False)
    axis.plot(*zip(*points), "o-", color=colour, ms=3, lw=1.4)
    if bands:
        drawn = "95 % interval over patients"
        axis.fill_between(*zip(*bands), color=colour, alpha=0.18, lw=0, label=drawn)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, max(1, axis.get_xlim()[1]))
    axis.set_ylim(0, 1.04)
    axis.set_xlabel("false alarms per 24 h", color=INK)
    axis.set_ylabel(label, color=colour)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)


# ---- a training run ----

def curves(run_directory):
    """Draw <run_directory>/curves.png from metrics.jsonl and, where there is one, saves.jsonl:
    loss, learning rate and the metric that decides best.pt over the steps, with saves and resumes
    marked. Returns its path."""
    directory = Path(run_directory)
    directory.stat()                    # gone: no picture may make it anew
    # half a row is one that waits in memory for a full disk, or that a resume names
    rows = list(read_json_lines(directory / "metrics.jsonl"))
    files = list(read_json_lines(directory / "saves.jsonl"))
    train = [r for r in rows if r["kind"] == "train"]
    checks = [r for r in rows if r["kind"] == "validation"]
    metric = _best_metric(directory / "config.yaml")
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    heights = (2.4, 1.2, 2, 3)
    loss, rate, entropy, best = figure.subplots(4, 1, sharex=True, height_ratios=heights)
    name = _named_shortly(directory.resolve().name)
    figure.suptitle(name, x=0.01, ha="left", fontsize=13, color=INK)
    _curve(loss, train, "loss", INK, "training: focal loss")
    _curve(rate, train, "lr", INK, "learning rate")
    _curve(entropy, checks, "loss", TRUE, "validation:\ncross-entropy", "o-")
    _curve(best, checks, metric, FOUND, f"{metric} (dev)", "o-")
    if metrics.METRICS.get(metric) == "max":
        best.set_ylim(-0.02, 1.02)      # a share: every run on the same axis
    best_ones = _points([r for r in checks if r.get("best")], metric)
    best.plot(*best_ones, "*", color=TRUE, ms=13, label="best.pt")
    _saves(best, files)
    for axis in (loss, rate, entropy, best):
        _resumes(axis, files)
    best.set_xlabel("step", color=INK)
    if checks and not _points(checks, metric)[0]:
        best.text(0.5, 0.5, "computable in no validation so far", ha="center", **SMALL,
                  transform=best.transAxes)
    # beside the axis: inside it would lie on the best ones, which are at its top
    best.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.05))
    path = directory / "curves.png"
    _save([figure], path)
    return path


def _points(rows, key):
    """Steps and values of the rows that have one."""
    known = [r for r in rows if r.get(key) is not None]
    steps = [r["step"] for r in known]
    values = [r[key] for r in known]
    return steps, values


def _saves(axis, files):
    steps = _steps(files, "save")
    foot = axis.get_xaxis_transform()
    heights = np.full(len(steps), 0.02)
    axis.plot(steps, heights, "|", color=INK, ms=9, label="save", transform=foot)


def _resumes(axis, files):
    label = "resume"
    for step in _steps(files, "resume"):
        axis.axvline(step, color=STOP, lw=1.4, ls="--", label=label)
        label = None                    # once in the legend


def _steps(files, kind):
    return sorted({r["step"] for r in files if r["kind"] == kind})


def _best_metric(config):
    """The metric that decides best.pt, from a run's config.yaml where there is one."""
    if not config.is_file():
        return "event_f1"
    return yaml.safe_load(config.read_text())["training"]["best_metric"]


def _curve(axis, rows, key, colour, label, style="-"):
    steps, values = _points(rows, key)
    # a line needs two points
    axis.plot(steps, values, style if len(steps) > 1 else "o", color=colour, lw=1.4, ms=4)
    axis.set_ylabel(label, color=colour, fontsize=9)
    axis.tick_params(labelsize=8, colors=INK)
    axis.spines["top"].set_visible(False)
