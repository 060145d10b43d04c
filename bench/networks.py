"""The detectors of bench/race.py, each behind the same function: fit(place, seed, budgets).

fit is a generator. It yields a Fitted whenever a budget is spent: the detector as it stands then,
the hours of EEG it has seen and the CPU minutes it has cost. Fitted.track(recording) is float32
(samples,) in 0..1. A budget is (name, unit, how many); its unit is "hours" of EEG, "epochs" or CPU
"minutes". A detector that trains in one go has one budget, of which only the name counts. No
detector tunes its own threshold: bench/judge.py tunes all of them alike.
"""
import contextlib
import copy
import functools
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import detectors                                                        # noqa: E402
import data                                                             # noqa: E402
import evaluate                                                         # noqa: E402
import judge                                                            # noqa: E402
from run import share                                                    # noqa: E402
from scoring import metrics                                                          # noqa: E402
import train                                                            # noqa: E402
from eeg.edf import FS                                                      # noqa: E402

CPU = torch.device("cpu")


@dataclass
class Place:
    """Where and on whom a detector is trained."""
    corpus: str                         # imported folder, or a list of them
    train: list
    dev: list
    folder: Path                        # for what a training writes
    published: str                      # folder of SeizureTransformer's code, or ""


@dataclass
class Fitted:
    """A detector after a budget."""
    budget: str
    track: object                       # recording -> float32 (samples,)
    parameters: int
    hours: float                        # of EEG trained on, repetitions counted
    minutes: float                      # of CPU time
    chosen: str = ""                    # what was picked on the training or dev set


def spent(began):
    """CPU minutes of this process since time.process_time() was `began`."""
    return (time.process_time() - began) / 60


# ---- V3, by the training that this repository is about ----

SMALL = {"model": {"size": "small"}, "window": 30.0, "rate": 2e-3}
FULL = {"model": {"size": "full"}, "window": 60.0, "rate": 1e-3}


def fit_v3(kind, place, seed, budgets):
    """One run of train.py on the place, its learning rate at 0 when the budget is spent: best.pt,
    and of several epochs also last.pt and the mean of the weights of the later half, two at
    least."""
    began = time.process_time()
    (name, what, limit), = budgets
    epochs = 1 if what == "hours" else limit
    config = v3_config(kind, place, seed, epochs)
    place.folder.mkdir(parents=True, exist_ok=True)
    path = place.folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    drawn = round(limit * 3600 / kind["window"]) if what == "hours" else None
    with contextlib.redirect_stdout(sys.stderr), first_windows(drawn):
        if code := train.run(train.load_config(path), fresh=True):
            raise SystemExit(code)
    minutes = spent(began)
    hours = limit if what == "hours" else epochs * hours_of_epoch(place.train)
    saved = place.folder / "v3/checkpoints"
    _, state = evaluate.load_model(saved / "best.pt", CPU)
    chosen = f"epoch {state['epoch']} of {epochs}"
    yield Fitted(name, *v3_track(saved / "best.pt"), hours, minutes, chosen)
    if epochs > 1:
        yield Fitted(f"{name}, last.pt", *v3_track(saved / "last.pt"), hours, minutes)
        later = sorted(saved.glob("checkpoint_epoch_*.pt"))[-max(2, epochs // 2):]
        share.average(later, saved / "mean.pt")
        yield Fitted(f"{name}, mean of {len(later)}", *v3_track(saved / "mean.pt"), hours, minutes)


@contextlib.contextmanager
def first_windows(count):
    """An epoch within it has the first `count` windows of the balanced draw (all of them for None):
    for the full V3 the very windows that SeizureTransformer begins with."""
    whole = data.Windows.epoch

    def epoch(self, *args, **kwargs):
        return whole(self, *args, **kwargs)[:count]
    data.Windows.epoch = epoch
    try:
        yield
    finally:
        data.Windows.epoch = whole


def v3_config(kind, place, seed, epochs):
    dev = sorted({r.patient for r in place.dev})
    training = {
        "epochs": epochs, "batch_size": 8, "learning_rate": kind["rate"], "warmup_ratio": 0.1,
        "grad_clip": 1.0, "log_every": 50, "checkpoint_keep": epochs, "mid_epoch_keep": 1,
        "best_metric": "average_precision"}
    return {
        "experiment": {"name": "v3", "seed": seed, "results": str(place.folder)},
        "data": {"path": place.corpus, "window_seconds": kind["window"],
                 "stride_seconds": kind["window"] / 4, "dev_patients": dev},
        "model": kind["model"],
        "training": training,
        "evaluation": {"window_seconds": kind["window"]},
    }


def v3_track(path):
    """(track, parameters) of a checkpoint."""
    net, state = evaluate.load_model(path, CPU)
    c, _ = evaluate.stored_settings(state)
    return lambda recording: evaluate.predict(net, recording, CPU, c), size(net)


def hours_of_epoch(recordings):
    """Of EEG in an epoch of the small V3."""
    window = SMALL["window"]
    return len(data.Windows(recordings, window, window / 4).epoch(0, 1)) * window / 3600


def size(net):
    return sum(p.numel() for p in net.parameters())


# ---- SeizureTransformer (Wu et al. 2025), its published code and recipe ----

WINDOW = 60 * FS
BATCH = 4                               # published: 86 and more, two steps of so few windows


def published_model(folder, channels):
    """SeizureTransformer of the published model.py in `folder`."""
    spec = importlib.util.spec_from_file_location("seizuretransformer", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SeizureTransformer(in_channels=channels)


def z_scored(recording):
    """(C, samples): each channel by its own mean and deviation over the recording."""
    eeg = recording.read(0, recording.samples) * recording.scale[:, None]
    return (eeg - eeg.mean(1, keepdims=True)) / (eeg.std(1, keepdims=True) + 1e-6)


def filtered(eeg):
    """(C, T): 0.5-120 Hz by a causal Butterworth filter, notches at 1 and 60 Hz, per window."""
    from scipy.signal import butter, iirnotch, lfilter
    eeg = lfilter(*butter(3, [0.5, 120], "band", fs=FS), eeg)
    for frequency in (1, 60):
        eeg = lfilter(*iirnotch(frequency, 30, fs=FS), eeg)
    return eeg.astype(np.float32)


def filled(eeg, samples):
    """(C, samples): eeg with zeros behind it."""
    return np.pad(eeg, ((0, 0), (0, samples - eeg.shape[1])))


def fit_seizure_transformer(place, seed, budgets):
    """Windows of 60 s every 15 s in its published proportions, RAdam, binary cross-entropy, the
    constant learning rate of the paper (its code has 1e-4, at which a budget as small as ours does
    not move it): a smaller budget is a snapshot on the way to a larger one."""
    torch.manual_seed(seed)
    began = time.process_time()
    net = published_model(place.published, len(place.train[0].channels))
    optimizer = torch.optim.RAdam(net.parameters(), lr=1e-3, weight_decay=2e-5)
    windows = data.Windows(place.train, 60.0, 15.0)
    whole = {r.name: z_scored(r).astype(np.float32) for r in place.train}
    left, hours, epoch = list(budgets), 0.0, 0
    order = np.zeros(0, np.int64)
    while left:
        if len(order) < BATCH:
            epoch += 1
            order = windows.epoch(seed, epoch)
        ids, order = order[:BATCH], order[BATCH:]
        published_step(net, optimizer, windows, whole, ids)
        hours += len(ids) * 60 / 3600
        now = {"hours": hours, "minutes": spent(began)}
        for budget in [b for b in left if now[b[1]] >= b[2]]:
            left.remove(budget)
            # what the caller does with a snapshot is no training
            paused = time.process_time()
            track = published_track(copy.deepcopy(net).eval())
            yield Fitted(budget[0], track, size(net), hours, now["minutes"])
            began += time.process_time() - paused


def published_step(net, optimizer, windows, whole, ids):
    eeg, labels = [], []
    for i in ids.tolist():
        r, start = windows.recordings[windows.recording[i]], int(windows.start[i])
        eeg.append(filled(filtered(whole[r.name][:, start:start + WINDOW]), WINDOW))
        labels.append(r.labels(start, WINDOW))
    net.train()
    x, y = torch.from_numpy(np.stack(eeg)), torch.from_numpy(np.stack(labels)).float()
    loss = torch.nn.functional.binary_cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def published_track(net):
    """Windows one after the other, as published; the last is padded with zeros."""
    @torch.no_grad()
    def track(recording):
        eeg = z_scored(recording)
        found = []
        for start in range(0, recording.samples, WINDOW):
            x = filled(filtered(eeg[:, start:start + WINDOW]), WINDOW)
            found.append(net(torch.from_numpy(x)[None])[0].numpy())
        return np.concatenate(found)[:recording.samples]
    return track


# ---- what was there before networks: detectors.py ----

def fit_classical(place, seed, budgets):
    """Logistic regression or gradient boosting, whichever has the higher average precision on the
    dev set."""
    began = time.process_time()
    reached = {}
    for kind in (detectors.logistic, detectors.boosting):
        fitted = detectors.Classical(place.train, kind(seed))
        reached[average_precision(place.dev, fitted.track)] = kind.__name__, fitted
    name, best = reached[max(reached)]
    columns = best.columns(place.train[0]).shape[1]
    yield Fitted(budgets[0][0], best.track, columns, hours_of(place.train), spent(began), name)


def average_precision(recordings, track):
    """Of one sample a second."""
    middle = slice(FS // 2, None, FS)
    probability = np.concatenate([track(r)[middle] for r in recordings])
    label = np.concatenate([r.labels(0, r.samples)[middle] for r in recordings])
    return metrics.average_precision(probability, label > 0)


def hours_of(recordings):
    return sum(r.seconds for r in recordings) / 3600


def fit_line_length(relative, place, seed, budgets):
    """The window with the best event F1 on the training set."""
    began = time.process_time()
    track, seconds = judge.best_line_length(place.train, relative)
    yield Fitted(budgets[0][0], track, 2, hours_of(place.train), spent(began), f"{seconds} s")


FITS = {
    "V3 small": functools.partial(fit_v3, SMALL),
    "V3 full": functools.partial(fit_v3, FULL),
    "SeizureTransformer": fit_seizure_transformer,
    "classical": fit_classical,
    "line length": functools.partial(fit_line_length, True),
    "line length, uV": functools.partial(fit_line_length, False),
}
