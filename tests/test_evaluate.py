"""evaluate.py: stitching, post-processing against a plain loop, scores against timescoring and exact
formulas, files."""
import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import binary_closing, binary_opening, gaussian_filter1d
from timescoring.annotations import Annotation
from timescoring.scoring import EventScoring

import checkpoint
from eeg import annotations, console, corpora
import data
from eeg import edf
import evaluate
from scoring import events
import forked
from eeg.settings import checked
from run import share
from run.config import rows as keys
from scoring import metrics
import model as v3
from scoring import report
from eeg import splits
from eeg import synth
from conftest import NAMES, Track, copy_sources, probability_of, write_edf
from evaluate import FS, METRICS

ROOT = Path(__file__).resolve().parent.parent
FIXED = {"tune": False, "threshold": 0.5}
OTHERS = splits.instead({"split": "patient"})


class Pointwise(torch.nn.Module):
    """Looks at one sample at a time, so that windows cannot change its output; keeps the sizes of its
    inputs."""

    def __init__(self):
        super().__init__()
        self.drop, self.calls = torch.nn.Dropout(0.5), []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.drop(x.mean(1))


def summary_of(pairs, **config):
    """Summary of (track, detections in seconds) pairs at the threshold 0.5, or as `config` says."""
    config = FIXED | config
    return evaluate.summarise([evaluate.score(t, probability_of(t, e), config) for t, e in pairs], config)


# ---- names and settings ----

@pytest.mark.parametrize("wrong, right", [
    ("sensitivity_at_10.0fa", "sensitivity_at_10fa"), ("event_F1", "event_f1"), ("aurocs", "auroc"),
    ("sensitivity_at_2_5fa", "sensitivity_at_2.5fa")])
def test_an_unknown_metric_is_refused_with_the_nearest_name(wrong, right):
    with pytest.raises(ValueError, match=f"nearest is {right}$"):
        checked({"best_metric": wrong}, keys("training"), "training")


def test_every_metric_is_computed_under_its_own_name():
    summary = summary_of([(Track("a", 600, [(100, 160)]), [(110, 150)])])
    for name, direction in METRICS.items():
        short = name.startswith("sensitivity_at")               # of hours of background
        assert math.isnan(summary[name]) == short and direction in ("min", "max")
    assert set(summary) == set(METRICS) | {"threshold", *metrics.grounds([])}


def test_a_metric_that_the_dev_set_cannot_give_is_refused_by_name():
    with pytest.raises(ValueError, match="event_f1 cannot be computed.*no seizure"):
        metrics.deciding("event_f1", [Track("a", 60), Track("b", 60, [(1, 9)], labelled=False)], OTHERS)
    assert metrics.deciding("loss", [Track("a", 60)], OTHERS) == ("loss", "")
    with pytest.raises(ValueError, match="auroc.*no background"):
        metrics.deciding("auroc", [Track("a", 60, [(0, 60)])], OTHERS)
    with pytest.raises(ValueError, match=r"loss cannot be computed on validation \(dev\): no recording is labelled"):
        metrics.deciding("loss", [Track("a", 60, labelled=False)], OTHERS)


@pytest.mark.parametrize("config, text", [
    ({"treshold": 1}, "evaluation.threshold"), ({"threshold": 1.5}, "between 0 and 1"),
    ({"overlap_seconds": 60.0}, "overlap_seconds"), ({"batch_size": 0}, "batch_size"),
    ({"merge_gap_seconds": -1.0}, "between 0 and 86400"),
    ({"onset_seconds": math.nan}, "onset_seconds"), ({"window_seconds": math.inf}, "window_seconds")])
def test_bad_settings_are_refused_in_one_line(config, text):
    with pytest.raises(ValueError, match=text):
        evaluate.settings(config)


def test_two_metrics_are_comparable_only_under_the_same_rules(monkeypatch):
    rules = evaluate.rules({})
    assert rules == evaluate.rules(evaluate.settings({})) == evaluate.rules({"batch_size": 3})
    others = [{"min_duration_seconds": 400.0}, {"window_seconds": 30.0}, {"tune": False}, {"threshold": 0.5}]
    assert len({rules, *map(evaluate.rules, others)}) == 5
    monkeypatch.setattr(metrics, "DEFINITIONS", metrics.DEFINITIONS + 1)
    assert evaluate.rules({}) != rules


# ---- predict ----

AS_IT_IS = {"smooth_seconds": 0.0}


@pytest.mark.parametrize("width", [2, 7, 512, 5000])
def test_smoothing_is_a_moving_mean_of_what_there_is_whatever_the_pieces(width, monkeypatch):
    monkeypatch.setattr(events, "PIECE", 700)
    track = np.random.default_rng(0).random(3000).astype(np.float32)
    got = events.smoothed(track, width)
    want = [track[max(0, i - width // 2):i + width - width // 2].astype(float).mean() for i in range(3000)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert events.smoothed(track, 1) is track and events.smoothed(track[:1], width) == track[:1]


def test_a_model_that_was_saved_before_the_probability_was_smoothed_is_scored_as_it_was():
    older = {"config": {"evaluation": {"window_seconds": 30.0}}}
    assert evaluate.stored_settings(older)[0]["smooth_seconds"] == 0
    newer = {"config": {"evaluation": evaluate.settings({})}}
    assert evaluate.stored_settings(newer)[0]["smooth_seconds"] == evaluate.DEFAULTS["smooth_seconds"] > 0


@pytest.mark.parametrize("seconds", [0.3, 9.0, 10.0, 10.01, 20.0, 47.3])
@pytest.mark.parametrize("overlap", [0.0, 2.5, 9.0])
def test_windows_are_stitched_to_the_output_of_the_whole_recording(seconds, overlap):
    track, model = Track("a", seconds), Pointwise().eval()
    config = {"window_seconds": 10.0, "overlap_seconds": overlap, "batch_size": 3, **AS_IT_IS}
    got = evaluate.predict(model, track, "cpu", config)
    want = torch.sigmoid(torch.from_numpy(track.eeg * track.scale[:, None] / track.norm).mean(0)).numpy()
    assert got.dtype == np.float32 and got.shape == (track.samples,)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert all(shape[0] <= 3 and shape[2] == 10 * FS for shape in model.calls)


def test_windows_share_a_sixth_of_their_length_unless_told_otherwise():
    for given, step in (({}, 50), ({"overlap_seconds": 0.0}, 60), ({"overlap_seconds": 30.0}, 30)):
        c = evaluate.settings({"window_seconds": 60.0, **given})
        starts = evaluate._starts(600 * FS, c)
        assert starts[1] == step * FS and starts[-1] == 540 * FS


def test_where_windows_disagree_overlap_turns_the_jump_into_a_slope():
    class Alternating(torch.nn.Module):
        def forward(self, x):
            level = torch.tensor([-2.0, 2.0]).repeat(len(x))[:len(x), None]
            return level.expand(len(x), x.shape[2])
    track, jumps = Track("a", 120), []
    for given in ({"overlap_seconds": 0.0}, {}):
        c = {"window_seconds": 30.0, "batch_size": 9, **AS_IT_IS, **given}
        p = evaluate.predict(Alternating(), track, "cpu", c)
        jumps.append(np.abs(np.diff(p)).max())
    assert jumps[0] > 0.7 and jumps[1] < 0.01


def test_overlap_weighs_the_middle_of_a_window_more_than_its_edge():
    class Position(torch.nn.Module):
        def forward(self, x):
            return torch.linspace(-4, 4, x.shape[2]).expand(len(x), -1)
    track = Track("a", 15)
    p = evaluate.predict(Position(), track, "cpu", {"window_seconds": 10.0, "overlap_seconds": 5.0, **AS_IT_IS})
    late, early = 1 / (1 + math.exp(-3.6)), 1 / (1 + math.exp(0.4))       # the two windows' answers at 9.5 s
    assert abs(p[round(9.5 * FS)] - (0.5 * late + 4.5 * early) / 5) < 0.01


def test_predict_restores_training_mode_and_leaves_the_random_state_alone():
    model, before = Pointwise().train(), torch.get_rng_state()
    model.drop.eval()
    evaluate.predict(model, Track("a", 30), "cpu", {"window_seconds": 10.0})
    assert model.training and not model.drop.training
    assert torch.equal(before, torch.get_rng_state())


def test_poll_is_asked_before_every_call_and_can_stop_the_prediction():
    model, asked = Pointwise().train(), []

    def poll():
        asked.append(len(model.calls))
        if len(asked) == 3:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate.predict(model, Track("a", 100), "cpu", {"window_seconds": 10.0, "batch_size": 2}, poll=poll)
    assert asked == [0, 1, 2] and model.training


def test_half_precision_stays_close_to_full_precision():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 5, padding=2), torch.nn.Conv1d(4, 1, 1),
                                torch.nn.Flatten(1))
    full, half = (evaluate.predict(model, Track("a", 30), "cpu", {"window_seconds": 10.0, **AS_IT_IS}, precision)
                  for precision in ("fp32", "bf16"))
    assert half.dtype == np.float32 and 0 < np.abs(full - half).max() < 0.05


# ---- post-processing ----

def slow_events(p, on, config):
    """The same rules, one sample at a time."""
    c = {k: round(v * FS) if k.endswith("_seconds") else v for k, v in evaluate.settings(config).items()}
    off, inside, high, low = max(on - c["release"], on / 2), False, 0, 0
    mask = np.zeros(len(p), bool)
    for i, x in enumerate(p):
        high, low = (high + 1 if x >= on else 0), (low + 1 if x < off else 0)
        if not inside and high >= max(1, c["onset_seconds"]):
            inside, mask[i - high + 1:i] = True, True
        if inside and low >= max(1, c["offset_seconds"]):
            inside, mask[i - low + 1:i] = False, False
        mask[i] = inside
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]))).reshape(-1, 2).tolist()
    events = [e for e in edges if e[1] - e[0] >= c["opening_seconds"]]
    events = join(events, c["closing_seconds"] - 1)
    events = join([e for e in events if e[1] - e[0] >= c["min_duration_seconds"]], c["merge_gap_seconds"])
    pieces = []
    for a, b in events:
        n = math.ceil((b - a) / c["max_duration_seconds"])
        pieces += [[a + (b - a) * i // n, a + (b - a) * (i + 1) // n] for i in range(n)]
    return pieces


def join(events, gap):
    joined = []
    for a, b in events:
        if joined and a - joined[-1][1] <= gap:
            joined[-1][1] = b
        else:
            joined.append([a, b])
    return joined


@pytest.mark.parametrize("seed", range(12))
def test_vectorised_postprocessing_equals_the_sample_by_sample_loop(seed):
    rng = np.random.default_rng(seed)
    z = gaussian_filter1d(rng.normal(size=40 * FS), rng.integers(2, 90))
    p = (1 / (1 + np.exp(-3 * z / z.std()))).astype(np.float32)
    loose = {"onset_seconds": rng.choice([0, 0.1, 0.5]), "offset_seconds": rng.choice([0, 0.1, 1.0]),
             "opening_seconds": rng.choice([0, 0.3]), "closing_seconds": rng.choice([0, 0.4]),
             "min_duration_seconds": rng.choice([0, 0.7]), "max_duration_seconds": 1.9,
             "merge_gap_seconds": rng.choice([0, 0.6])}
    found = 0
    for config in ({}, {k: float(v) for k, v in loose.items()}):
        for threshold in (0.05, 0.3, 0.5, 0.86, 1.0):
            events = evaluate.postprocess(p, threshold, config)
            assert events.tolist() == slow_events(p, threshold, config)
            found += len(events)
    assert found > 5


def test_opening_and_closing_equal_binary_morphology():
    rng = np.random.default_rng(3)
    mask = gaussian_filter1d(rng.normal(size=20 * FS), 6) > 0.02
    off = dict.fromkeys(("onset_seconds", "offset_seconds", "min_duration_seconds", "merge_gap_seconds"), 0.0)
    config = off | {"opening_seconds": 11 / FS, "closing_seconds": 31 / FS}
    got = evaluate.postprocess(mask.astype(np.float32), 0.5, config)
    padded = np.pad(binary_opening(np.pad(mask, 50), np.ones(11)), 50)
    want = binary_closing(padded, np.ones(31))[100:-100]
    assert 3 < len(got) and np.array_equal(events.runs(want), got)


def test_short_events_go_close_ones_join_and_long_ones_are_cut_last():
    track = Track("a", 2000)
    p = probability_of(track, [(10, 12.9), (100, 104), (105.9, 110), (200, 203), (205.1, 209), (500, 1900)])
    events = evaluate.postprocess(p, 0.5, {}) / FS
    assert np.allclose(events[:3], [[100, 110], [200, 203], [205.1, 209]], atol=1 / FS)
    assert len(events) == 6 and events[3, 0] == 500 and events[5, 1] == 1900
    assert (events[4:, 0] == events[3:-1, 1]).all() and (np.diff(events[3:], axis=1) <= 600).all()


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_constant_tracks_give_nothing_or_one_event(value):
    events = evaluate.postprocess(np.full(60 * FS, value, np.float32), 0.5, {})
    assert events.tolist() == ([[0, 60 * FS]] if value == 1 else [])
    assert evaluate.postprocess(np.zeros(0, np.float32), 0.5, {}).shape == (0, 2)


# ---- records ----

def noisy(track, rng, strength=6.0):
    coarse = gaussian_filter1d(rng.normal(size=track.samples // 8), 25) * 14
    label = track.labels(0, track.samples)[:8 * len(coarse):8].astype(float)
    coarse += strength * gaussian_filter1d(label, FS // 4) - 4
    z = np.interp(np.arange(track.samples), 8 * np.arange(len(coarse)), coarse)
    return (1 / (1 + np.exp(-z))).astype(np.float32)


def test_a_record_is_small_and_loads_without_running_code():
    track = Track("a/b", 3600, [(600, 660)])
    record = evaluate.score(track, noisy(track, np.random.default_rng(0)), {})
    file = io.BytesIO()
    torch.save(record, file)
    assert file.tell() < 25_000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert evaluate.summarise([loaded], {}) == evaluate.summarise([record], {})


def test_an_unlabelled_recording_is_left_out_of_every_score():
    labelled, other = Track("a", 600, [(100, 160)]), Track("b", 600, labelled=False)
    p = probability_of(labelled, [(100, 150), (400, 450)])
    scores = [evaluate.score(t, p, FIXED) for t in (labelled, other)]
    assert evaluate.summarise(scores, FIXED) == evaluate.summarise(scores[:1], FIXED)
    assert "counts" not in scores[1]
    alone = evaluate.summarise(scores[1:], FIXED)
    assert all(math.isnan(alone[m]) for m in METRICS) and alone["threshold"] == 0.5


def test_the_summary_does_not_depend_on_the_order_of_the_records():
    rng = np.random.default_rng(1)
    tracks = [Track(f"r{i}", 200, [(60 + 10 * i, 90 + 10 * i)], f"p{i % 3}") for i in range(7)]
    scores = [evaluate.score(t, noisy(t, rng), {}) for t in tracks]
    first = evaluate.summarise(scores, {})
    for _ in range(5):
        assert evaluate.summarise([scores[i] for i in rng.permutation(7)], {}) == first


def test_records_of_other_thresholds_are_refused():
    track = Track("a", 60, [(10, 30)])
    record = evaluate.score(track, probability_of(track, []), {"threshold": 0.61})
    with pytest.raises(ValueError, match="threshold"):
        evaluate.summarise([record], {"threshold": 0.62})


# ---- sample-level scores ----

def pairwise_auroc(p, y):
    return np.mean((p[y][:, None] > p[~y]) + 0.5 * (p[y][:, None] == p[~y]))


def stepwise_average_precision(p, y):
    total, before = 0.0, 0
    for value in np.unique(p)[::-1]:
        hits = (y & (p >= value)).sum()
        total, before = total + (hits - before) / y.sum() * hits / (p >= value).sum(), hits
    return total


@pytest.mark.parametrize("decimals", [1, 2, 8])
def test_ranking_scores_equal_their_definitions_with_and_without_ties(decimals):
    rng = np.random.default_rng(decimals)
    y = rng.random(400) < 0.2
    p = np.clip(rng.normal(0.4 + 0.2 * y, 0.2), 0, 1).round(decimals).astype(np.float32)
    auroc, precision = metrics.auroc(p, y), metrics.average_precision(p, y)
    assert auroc == pytest.approx(pairwise_auroc(p, y), abs=1e-12)
    assert precision == pytest.approx(stepwise_average_precision(p, y), abs=1e-12)


def test_one_sample_per_second_agrees_with_all_256_to_a_thousandth():
    rng = np.random.default_rng(5)
    tracks = [Track(f"r{i}", 1800, [(300, 400), (1000 + 50 * i, 1090 + 50 * i)]) for i in range(2)]
    tracks_p = [noisy(t, rng) for t in tracks]
    summary = evaluate.summarise([evaluate.score(t, p, {}) for t, p in zip(tracks, tracks_p)], {})
    p, y = np.concatenate(tracks_p), np.concatenate([t.labels(0, t.samples) for t in tracks]) > 0
    auroc, precision = metrics.auroc(p, y), metrics.average_precision(p, y)
    assert 0.6 < auroc < 0.999
    assert summary["auroc"] == pytest.approx(auroc, abs=1e-3)
    assert summary["average_precision"] == pytest.approx(precision, abs=1e-3)
    assert summary["calibration_error"] == pytest.approx(metrics.calibration_error(p, y), abs=1e-3)
    clipped = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    assert summary["loss"] == pytest.approx(-np.log(np.where(y, clipped, 1 - clipped)).mean(), rel=1e-9)


def test_calibration_error_of_a_known_track():
    p, y = np.array([0.2, 0.2, 0.2, 0.2, 0.9, 0.9], np.float32), np.array([0, 0, 0, 1, 1, 1], bool)
    assert metrics.calibration_error(p, y) == pytest.approx((4 * 0.05 + 2 * 0.1) / 6, abs=1e-6)


# ---- event scores ----

@pytest.mark.parametrize("detections, tp, fp", [
    ([(500, 530)], 1, 0), ([(471, 475)], 1, 0), ([(465, 469.9)], 0, 1), ([(615, 619)], 1, 0),
    ([(620.2, 630)], 0, 1), ([(500, 510), (540, 550), (639, 650)], 1, 0), ([(100, 110), (195, 205)], 0, 1),
    ([(100, 110), (200, 210)], 0, 2), ([(700, 1301)], 0, 3)])
def test_szcore_rules_for_tolerance_merging_and_cutting(detections, tp, fp):
    counts = metrics.count(np.array([[500.0, 560.0]]), np.array(detections, float), 2000.0)
    assert (counts["event_tp"], counts["event_fp"], counts["event_true"]) == (tp, fp, 1)


def test_event_scores_are_summed_over_a_patient_and_averaged_over_patients():
    rng = np.random.default_rng(8)
    pairs = []
    for i in range(6):
        truth = np.sort(rng.integers(50, 1700, 2)).reshape(1, 2).clip(max=[[1e9, 1790]])
        truth[0, 1] = truth[0, 0] + 60
        found = [(s, s + 20) for s in (rng.integers(50, 1750, 3))]
        pairs.append((Track(f"r{i}", 1800, truth, f"p{i // 2}"), sorted(found)))
    f1, alarms = [], []
    for patient in range(3):
        tp = fp = true = 0
        for track, found in pairs[2 * patient:2 * patient + 2]:
            mask = np.zeros(18000, bool)
            for begin, end in found:
                mask[begin * 10:end * 10] = True
            truth = Annotation([tuple(e) for e in track.events.tolist()], 10, 18000)
            s = EventScoring(truth, Annotation(mask, 10))
            tp, fp, true = tp + s.tp, fp + s.fp, true + s.refTrue
        f1.append(2 * tp / (tp + fp + true))
        alarms.append(fp / (3600 / 86400))
    summary = summary_of(pairs)
    assert summary["event_f1"] == pytest.approx(np.mean(f1)) and 0 < np.mean(f1) < 1
    assert summary["false_alarms_per_24h"] == pytest.approx(np.mean(alarms))


def test_sensitivity_at_a_false_alarm_rate_is_the_best_that_keeps_to_it():
    track = Track("a", 6 * 3600, [(1000, 1060), (5000, 5060), (9000, 9060)])
    p = probability_of(track, [(1000, 1060)], 0.99)
    for begin, height in ((5000, 0.8), (9000, 0.4), (12000, 0.4), (14000, 0.4), (16000, 0.4)):
        p = np.maximum(p, probability_of(track, [(begin, begin + 60)], height))
    p = np.maximum(p, probability_of(track, [(18000, 18060)], 0.8))
    summary = evaluate.summarise([evaluate.score(track, p, FIXED)], FIXED)
    assert [summary[f"sensitivity_at_{x}fa"] for x in ("10", "5")] == pytest.approx([2 / 3, 2 / 3])
    why = metrics.undefined([evaluate.score(track, p, FIXED)])
    assert why == {"sensitivity_at_2.5fa": "5.88 h of background, 9.6 h needed",
                   "sensitivity_at_1fa": "5.88 h of background, 24 h needed"}
    assert all(math.isnan(summary[name]) for name in why)


def test_sensitivity_at_a_rate_follows_szcore():
    track = Track("a", 3 * 3600, [(1000, 1060), (5000, 5060)])
    # 25 s early; and over all of the second seizure, for 25 minutes: cut, the rest are false alarms
    rate = 24 / 3
    early = probability_of(track, [(970, 975)])
    assert summary_of([(track, [(970, 975)])])["sensitivity_at_10fa"] == 0.5
    whole = np.maximum(early, probability_of(track, [(4500, 6000)], 0.5))
    counts = metrics.count(track.events, np.array([[970.0, 975.0], [4500.0, 6000.0]]), track.seconds)
    assert counts["event_tp"] == 2 and counts["event_fp"] * rate > 10
    c = {"tune": False, "threshold": 0.4}
    assert evaluate.summarise([evaluate.score(track, whole, c)], c)["sensitivity_at_10fa"] == 0.5


@pytest.mark.slow
def test_sensitivity_at_a_rate_is_the_same_whichever_threshold_is_in_use():
    track = Track("a", 3 * 3600, [(1000, 1060), (5000, 5060)])
    p = np.maximum(probability_of(track, track.events[:1]), probability_of(track, track.events[1:], 0.87))
    for begin in (7000, 8000, 9000):
        p = np.maximum(p, probability_of(track, [(begin, begin + 60)], 0.855))
    for threshold in (0.5, 0.855, 0.86, evaluate.GRID[-5]):     # at the default alone both are found without an alarm
        c = {"tune": False, "threshold": float(threshold)}
        assert evaluate.summarise([evaluate.score(track, p, c)], c)["sensitivity_at_10fa"] == 1.0
    before = [evaluate.score(track, p, {"threshold": 0.5})]
    assert evaluate.reusable(before, {"threshold": 0.5}, {"threshold": 0.5})
    before[0]["thresholds"] = before[0]["thresholds"][1:]       # of a version that tried others
    assert not evaluate.reusable(before, {"threshold": 0.5}, {"threshold": 0.5})


def test_background_is_what_lies_beyond_the_tolerance_of_every_seizure():
    ground = metrics.ground(np.array([[10.0, 20.0], [100, 130], [150, 160], [990, 995]]), 1000.0)
    # 0 to 80, 70 to 220 and 960 to 1000 lie within it; of the pieces 0, 300, 600 and 900 two touch none
    assert ground == {"reference": 2, "background": 740.0, "always_on": 2}
    assert metrics.ground(np.zeros((0, 2)), 1000.0) == {"reference": 0, "background": 1000.0, "always_on": 4}


# ---- no skill, no score ----

def silent(track, rng):
    return np.zeros(track.samples, np.float32)


def constant(track, rng):
    return np.full(track.samples, 0.5, np.float32)


def always_on(track, rng):
    return np.ones(track.samples, np.float32)


def random_noise(track, rng):
    return noisy(Track("x", track.seconds), rng, 0.0)


def sets():
    """{name: recordings} as people have them: clips around seizures, alone and beside others; hours."""
    where = {60: (20, 40), 300: (120, 180), 600: (300, 360)}
    clips = {f"clips of {s} s": [Track(f"{s} {i}", s, [where[s]], f"p{i % 4}") for i in range(24)] for s in where}
    pairs = [Track(f"pair {i}", 60, [where[60]] * (i % 2), f"p{i % 4}") for i in range(48)]
    hours = [Track(f"hour {i}", 3600, [(600 + 40 * i, 660 + 40 * i), (2400, 2460)][i % 2:], f"p{i % 3}") for i in range(6)]
    return clips | {"clips of 60 s beside as many without": pairs, "hours": hours}


SETS = sets()           # made once: scoring changes none of them
BLIND = (silent, constant, always_on, random_noise)


@pytest.mark.parametrize("tune", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("detector", BLIND)
@pytest.mark.parametrize("name", SETS)
def test_no_metric_is_above_chance_for_a_detector_that_looks_at_nothing(name, detector, tune):
    tracks, rng = SETS[name], np.random.default_rng(3)
    c = {"tune": tune, "threshold": 0.5}
    summary = evaluate.summarise([evaluate.score(t, detector(t, rng), c) for t in tracks], c)
    seizure = sum((t.events[:, 1] - t.events[:, 0]).sum() for t in tracks) / sum(t.seconds for t in tracks)
    entropy = -seizure * math.log(seizure) - (1 - seizure) * math.log(1 - seizure)
    slack = 1.25 if detector is random_noise else 1.0
    # a detector that is always on finds everything: sensitivity counts beside precision alone
    chance = {"auroc": 0.5 * slack, "average_precision": seizure * slack, "loss": entropy, "calibration_error": 0,
              "event_f1": summary["always_on_f1"] * slack, "event_sensitivity": 1, "false_alarms_per_24h": 0,
              "event_precision": summary["always_on_f1"] * slack, "sample_sensitivity": 1,
              "sample_precision": seizure * slack, "sample_f1": 2 * seizure / (1 + seizure) * slack}
    chance |= dict.fromkeys(metrics.AT_RATE, 0.1)
    assert set(chance) == set(METRICS)
    for metric, better in METRICS.items():
        value = summary[metric]
        above = value > chance[metric] + 1e-6 if better == "max" else value < chance[metric] - 1e-6
        assert not above, f"{metric} {value} on {name}, chance {chance[metric]}"
    assert math.isfinite(summary["sensitivity_at_10fa"]) == (name == "hours")
    assert math.isnan(summary["sensitivity_at_1fa"])


@pytest.mark.slow
@pytest.mark.parametrize("detector", (constant, *(pytest.param(one, marks=pytest.mark.slow) for one in (silent, always_on))))
def test_sensitivity_at_every_rate_is_nothing_for_them_on_a_day_and_more(detector):
    tracks = [Track(f"day {i}", 5000, [(600, 660)] * (i % 2), f"p{i % 3}") for i in range(20)]
    records = [evaluate.score(t, detector(t, None), {}) for t in tracks]
    summary = evaluate.summarise(records, {})
    assert [summary[name] for name in metrics.AT_RATE] == [0, 0, 0, 0] and summary["background_hours"] > 24
    assert metrics.undefined(records) == {}


def test_minutes_of_one_patient_make_no_sensitivity_of_the_clips_of_the_others():
    clips = [{"patient": "p1", "seconds": 600.0, "reference": 1, "background": 450.0, "always_on": 0}] * 200
    quiet = {"patient": "p2", "seconds": 300.0, "reference": 0, "background": 300.0, "always_on": 1}
    # always on, it finds all 200 with one false alarm in 33 hours, which are 288 a day of the second patient
    assert set(metrics.AT_RATE) == set(metrics._reasons([*clips, quiet], True))
    day = {"patient": "p2", "seconds": 200000.0, "reference": 0, "background": 200000.0, "always_on": 667}
    assert not metrics._reasons([*clips, day], True)


def test_the_f1_that_is_said_of_a_detector_that_is_always_on_is_what_one_gets():
    ill, other, healthy = Track("a", 3600, [(1000, 1060)], "p1"), Track("b", 900, [(100, 160)], "p2"), Track("c", 3600, (), "p3")
    for tracks in ([ill], [ill, healthy], [ill, other, healthy]):
        records = [evaluate.score(t, always_on(t, None), FIXED) for t in tracks]
        summary = evaluate.summarise(records, FIXED)
        assert summary["always_on_f1"] == pytest.approx(summary["event_f1"], abs=1e-12)
    assert math.isnan(metrics.always_on_f1([{"patient": "p3", "seconds": 3600.0, **metrics.ground(healthy.events, 3600.0)}]))


def test_an_event_f1_of_a_validation_stands_beside_that_of_a_detector_that_is_always_on():
    summary = {"loss": 0.5, "event_f1": 0.8571, "always_on_f1": 0.8, "auroc": 0.9, "false_alarms_per_24h": 0.0,
               "hours": 0.17, "background_hours": 0.04, "seizures": 5, "patients": 1}
    assert report.validation_line(summary, "event_f1") == (
        "loss 0.5, event_f1 0.8571 (always on: 0.8), auroc 0.9, 0 false alarms in 24 h; "
        "on 0.17 h (0.04 h of background), 5 seizures, mean over 1 patient")


def test_few_hours_are_said_beside_the_rate_of_false_alarms_and_too_few_are_never_as_many_as_needed(capsys):
    c = evaluate.settings({})
    for seconds, note in ((40, " (each counts as 2160)"), (8000, " (each counts as 11)"), (9000, "")):
        records = [evaluate.score(Track("a", seconds, labelled=True), np.zeros(seconds * FS, np.float32), {})]
        result = evaluate.tell(records, [0], c) | {"corpus_version": "", "threshold": 0.9999, "threshold_source": "x",
                                                   "overridden": {}, "includes_training": False, "refused": []}
        report.show(result, list(METRICS), "out")
        out = capsys.readouterr().out
        assert f"  false_alarms_per_24h   0.0000{note}\n" in out and "threshold >0.999: x" in out
        assert ("40 s (40 s of background)" in out) == (seconds == 40) and " 0.00 h" not in out
    ground = {"patient": "p", "seconds": 9000.0, "reference": 1, "background": 2.3996 * 3600, "always_on": 30}
    assert "sensitivity_at_10fa" not in metrics._reasons([ground], True)        # "2.40 h of background, 2.4 h needed"
    assert metrics._reasons([ground], True)["sensitivity_at_5fa"] == "2.40 h of background, 4.8 h needed"


def test_too_little_background_leaves_average_precision_to_decide_and_says_so():
    clips = SETS["clips of 60 s"]
    for name in ("sensitivity_at_10fa", "sensitivity_at_1fa"):
        metric, why = metrics.deciding(name, clips, OTHERS)
        assert metric == "average_precision"
        assert why.startswith(f"{name} cannot be computed on validation (dev): 0.00 h of background")
    metric, why = metrics.deciding("event_f1", clips, OTHERS)
    assert metric == "event_f1" and "a detector that is always on has event_f1 1.00 there" in why
    assert metrics.deciding("event_f1", SETS["hours"], OTHERS) == ("event_f1", "")
    assert metrics.deciding("sensitivity_at_10fa", SETS["hours"], OTHERS) == ("sensitivity_at_10fa", "")
    metric, why = metrics.deciding("sensitivity_at_1fa", SETS["hours"], OTHERS)
    assert metric == "average_precision" and "5.62 h of background, 24 h needed" in why
    with pytest.raises(ValueError, match=r"^sensitivity_at_10fa .*validation \(dev\): there is no seizure in it; name other patients "
                                         r"with data.dev_patients, raise data.dev_fraction, or"):
        metrics.deciding("sensitivity_at_10fa", [Track("a", 9000)], OTHERS)


@pytest.mark.slow
def test_the_start_and_the_scores_agree_on_what_cannot_be_computed():
    for tracks in SETS.values():
        records = [evaluate.score(t, silent(t, None), {}) for t in tracks]
        assert metrics.undefined(records) == metrics._before_scoring(tracks)[1]


# ---- sets that lack something ----

def test_a_set_without_a_seizure_gives_false_alarms_loss_and_calibration_only():
    for detections in ([], [(100, 200)]):
        track = Track("a", 3600)
        summary = summary_of([(track, detections)], tune=True)
        defined = {m for m in METRICS if math.isfinite(summary[m])}
        assert defined == {"loss", "calibration_error", "false_alarms_per_24h"}
        assert summary["false_alarms_per_24h"] == 24 * len(detections) and summary["threshold"] == 0.5


def test_a_set_without_background_gives_no_ranking_and_no_sensitivity_at_a_rate():
    summary = summary_of([(Track("a", 120, [(0, 120)]), [(0, 120)])])
    assert {m for m in METRICS if math.isnan(summary[m])} == {"auroc", "average_precision", *metrics.AT_RATE}
    assert summary["event_f1"] == summary["sample_f1"] == summary["always_on_f1"] == 1


def test_a_patient_without_detections_counts_with_f1_zero_and_no_precision():
    good = Track("a", 900, [(100, 160)], "p1"), [(100, 160)]
    silent = Track("b", 900, [(100, 160)], "p2"), []
    healthy = (Track("c", 900, (), "p3"), [])
    summary = summary_of([good, silent, healthy])
    assert summary["event_f1"] == summary["event_sensitivity"] == 0.5 and summary["event_precision"] == 1
    only_silent = summary_of([silent, healthy])
    assert all(math.isfinite(only_silent[m]) for m in METRICS if m not in metrics.AT_RATE)
    assert only_silent["event_f1"] == only_silent["event_precision"] == only_silent["sample_precision"] == 0


def test_a_probability_that_is_not_finite_makes_every_metric_nan():
    track = Track("a", 600, [(100, 160)])
    p = probability_of(track, [(100, 160)])
    p[77] = math.nan
    summary = evaluate.summarise([evaluate.score(track, p, {})], {})
    assert all(math.isnan(summary[m]) for m in METRICS)


def test_recordings_shorter_than_a_second_are_scored():
    for seconds in (0.02, 0.3, 0.9):
        summary = summary_of([(Track("a", seconds, [(0, seconds)]), [(0, seconds)]),
                              (Track("b", 600, [(9, 99)]), [(9, 99)])])
        assert math.isfinite(summary["event_f1"])


# ---- threshold ----

def test_the_tuned_threshold_has_the_best_f1_and_lies_in_the_middle_of_equals():
    track = Track("a", 3600, [(1000, 1060)])
    p = np.maximum(probability_of(track, [(1000, 1060)], 0.9),
                   probability_of(track, [(2000, 2060), (3000, 3060)], 0.3))
    summary = evaluate.summarise([evaluate.score(track, p, {})], {})
    assert summary["event_f1"] == 1 and 0.5 < summary["threshold"] < 0.8
    c = {"threshold": 0.1, "tune": False}
    fixed = evaluate.summarise([evaluate.score(track, p, c)], c)
    assert fixed["threshold"] == 0.1 and fixed["event_f1"] == 0.5


def test_a_model_that_finds_nothing_gets_the_threshold_with_the_fewest_alarms():
    track = Track("a", 3600, [(1000, 1060)])
    summary = evaluate.summarise([evaluate.score(track, probability_of(track, [(2000, 2060)], 0.6), {})], {})
    assert summary["event_f1"] == 0 and summary["threshold"] > 0.6 and summary["false_alarms_per_24h"] == 0


@pytest.mark.parametrize("cap, threshold, f1", [
    (60.0, (0.1, 0.3), 0.8), (8.0, (0.1, 0.3), 0.8), (7.9, (0.6, 0.9), 0.4), (0.0, (0.6, 0.9), 0.4)])
def test_the_tuned_threshold_has_the_best_f1_among_those_within_the_cap(cap, threshold, f1):
    track = Track("a", 6 * 3600, [(1000 * i, 1000 * i + 60) for i in (1, 3, 5, 7)])
    p = probability_of(track, [(1000, 1060)], 0.9)
    for height, places in ((0.6, (9,)), (0.3, (3, 5, 7, 11))):
        for i in places:
            p = np.maximum(p, probability_of(track, [(1000 * i, 1000 * i + 60)], height))
    p = np.maximum(p, probability_of(track, [(13000 + 400 * i, 13060 + 400 * i) for i in range(20)], 0.08))
    c = {"max_false_alarms_per_24h": cap}
    summary = evaluate.summarise([evaluate.score(track, p, c)], c)
    assert threshold[0] < summary["threshold"] < threshold[1]
    assert summary["event_f1"] == pytest.approx(f1, abs=0.05)
    assert summary["false_alarms_per_24h"] <= cap and evaluate.over_cap(summary, c) == ""


def test_where_no_threshold_keeps_to_the_cap_the_nearest_is_taken_and_said():
    track = Track("a", 3600, [(1000, 1060)])
    p = probability_of(track, [(2000, 2060)], 1.0)
    p = np.maximum(p, probability_of(track, [(1000, 1060), (3000, 3060)], 0.5))
    summary = evaluate.summarise([evaluate.score(track, p, {})], {})
    assert summary["false_alarms_per_24h"] == 24 and summary["threshold"] > 0.5
    text = evaluate.over_cap(summary, {})
    assert "max_false_alarms_per_24h 10" in text and "24.0" in text
    assert evaluate.over_cap(summary, {"max_false_alarms_per_24h": 24.0}) == ""


# ---- intervals ----

def test_intervals_are_those_of_a_bootstrap_over_patients():
    rng = np.random.default_rng(4)
    values = rng.random((12, 3))
    values[2, 0] = math.nan                                 # left out of each mean
    values[:, 2] = math.nan
    low_high = report.intervals([{"event_f1": row} for row in values], "event_f1")
    draws = rng.integers(0, 12, (20000, 12))
    naive = np.percentile(np.nanmean(values[draws][:, :, :2], axis=1), (2.5, 97.5), axis=0)
    np.testing.assert_allclose(low_high[:, :2], naive, atol=0.02)
    assert np.isnan(low_high[:, 2]).all()
    assert np.isnan(report.intervals([{"event_f1": values[0]}], "event_f1")).all()


def test_the_table_of_the_trade_off_holds_the_row_in_use_and_the_best_within_each_rate():
    rows = [{"threshold": 0.1 * i, "false_alarms_per_24h": [alarms, None, None],
             "event_sensitivity": [found, None, None]}
            for i, (alarms, found) in enumerate([(300, 1.0), (40, 0.9), (12, 0.8), (0.5, 0.1)])]
    chosen = [row["false_alarms_per_24h"][0] for row in report.rows_to_print(rows, 0.0)]
    assert chosen == [300, 40, 12, 0.5]
    assert len(report.rows_to_print(rows[3:], 0.3)) == 1
    rows[1]["event_sensitivity"] = [0.8, None, None]        # 28 false alarms more, and nothing found for them
    assert [row["false_alarms_per_24h"][0] for row in report.rows_to_print(rows, 0.0)] == [300, 12, 0.5]


# ---- events files ----

HEADER = ["onset", "duration", "eventType", "confidence", "channels", "dateTime", "recordingDuration"]


def read_tsv(path):
    header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    assert header == HEADER and all(len(row) == len(HEADER) for row in rows)
    return [dict(zip(header, row)) for row in rows]


def test_events_files_hold_one_row_per_event_or_one_of_background(tmp_path):
    track = Track("a", 600)
    p = probability_of(track, [(100, 150), (300, 330.5)])
    evaluate.write_events(tmp_path / "new" / "a_events.tsv", evaluate.postprocess(p, 0.5, {}), p,
                          track)
    rows = read_tsv(tmp_path / "new" / "a_events.tsv")
    assert [(r["onset"], r["duration"], r["eventType"], r["confidence"]) for r in rows] == [
        ("100.00", "50.00", "sz", "0.99"), ("300.00", "30.50", "sz", "0.99")]
    evaluate.write_events(tmp_path / "b_events.tsv", np.zeros((0, 2), np.int64), p, track)
    assert [list(r.values()) for r in read_tsv(tmp_path / "b_events.tsv")] == [
        ["0.00", "600.00", "bckg", "n/a", "n/a", "n/a", "600.00"]]


def test_events_carry_the_time_at_which_their_recording_began(tmp_path):
    track = Track("a", 600)
    track.began = "2021-03-04 22:14:07"
    p = probability_of(track, [(100, 150)])
    evaluate.write_events(tmp_path / "a_events.tsv", evaluate.postprocess(p, 0.5, {}), p, track)
    assert read_tsv(tmp_path / "a_events.tsv")[0]["dateTime"] == "2021-03-04 22:14:07"


def test_no_event_that_is_written_overlaps_the_next_one_or_ends_beyond_its_recording(tmp_path):
    rng = np.random.default_rng(0)
    for samples in rng.integers(5000, 500_000, 200):
        cuts = np.sort(rng.choice(np.arange(0, samples, 256), 3, replace=False)) + rng.integers(0, 200)
        events = np.array([[0, *cuts], [*cuts, samples]]).T / FS        # each begins where the one before ends
        annotations.write_events_tsv(tmp_path / "a_events.tsv", events, samples / FS)
        rows = [[float(row[key]) for key in ("onset", "duration", "recordingDuration")] for row in read_tsv(tmp_path / "a_events.tsv")]
        ends = [round(onset + lasts, 2) for onset, lasts, _ in rows]
        assert ends == [onset for onset, *_ in rows[1:]] + [rows[0][2]]


def test_the_szcore_tools_read_the_events_files(tmp_path):
    annotations = pytest.importorskip("epilepsy2bids.annotations", reason="epilepsy2bids is not installed")
    track = Track("a", 600)
    p = probability_of(track, [(100, 150)])
    evaluate.write_events(tmp_path / "a_events.tsv", evaluate.postprocess(p, 0.5, {}), p, track)
    read = annotations.Annotations.loadTsv(tmp_path / "a_events.tsv")
    assert read.getEvents() == [(100.0, 150.0)] and read.getMask(1).sum() == 50
    evaluate.write_events(tmp_path / "b_events.tsv", np.zeros((0, 2), np.int64), p, track)
    assert annotations.Annotations.loadTsv(tmp_path / "b_events.tsv").getMask(1).tolist() == [0] * 600


# ---- command line ----

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """EDF files, the same imported, and a checkpoint of an untrained model whose threshold training tuned to
    0.07."""
    folder = tmp_path_factory.mktemp("corpus")
    synth.synth(folder / "edf", hours=0.1, patients=2, seed=1)
    corpora.import_corpus(folder / "edf", folder / "imported")
    torch.manual_seed(0)
    config = {"model": v3.SMALL, "experiment": {"seed": 0},
              "data": {"dev_patients": [], "dev_fraction": 0.5, "path": ""},
              "evaluation": {**evaluate.DEFAULTS, "window_seconds": 20.0}}
    state = {"model": v3.V3(19, **v3.SMALL).state_dict(), "config": config, "montage": "referential",
             "channels": list(edf.CHANNELS["referential"]), "optimizer": {}, "scores": {"threshold": 0.07}}
    checkpoint.atomic_save(state, folder / "best.pt")
    return folder


def here(*arguments):
    """(exit code, lines on stderr) of the command line in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as text:
        code = evaluate.main([str(a) for a in arguments])
    return code, [line for line in text.getvalue().splitlines() if line.strip()]


def run(*arguments):
    command = [sys.executable, ROOT / "evaluate.py", *map(str, arguments)]
    return forked.run(command, capture_output=True, text=True, timeout=900)


def test_an_imported_folder_is_scored_with_the_threshold_that_training_stored(corpus, tmp_path):
    done = run("--checkpoint", corpus / "best.pt", "--data", corpus / "imported", "--out", tmp_path, "--plot")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    recordings = data.open_corpus(corpus / "imported")
    assert scores["threshold"] == 0.07 and scores["threshold_source"].startswith("tuned on the dev set")
    assert scores["scorer"]["name"] == "timescoring" and scores["scorer"]["version"] == "0.0.7"
    assert scores["recordings"] == len(recordings)
    assert scores["seizures"] == sum(len(r.events) for r in recordings)
    assert scores["hours"] == pytest.approx(sum(r.seconds for r in recordings) / 3600)
    at_rates = {m for m in METRICS if m.startswith("sensitivity_at_")}         # six minutes hold no false alarm a day
    assert all(isinstance(scores[m], float) for m in METRICS if m not in at_rates)
    assert all(scores[m] is None for m in at_rates) and "h of background" in done.stdout
    assert len(list(tmp_path.rglob("*_events.tsv"))) == len(list(tmp_path.rglob("*/eeg/*.png"))) == len(recordings)
    for path in tmp_path.rglob("*_events.tsv"):
        assert read_tsv(path)
    assert "evaluate" in done.stderr and "event_f1" in done.stdout
    assert not list(tmp_path.glob(".prepared*"))


def test_raw_edf_files_give_the_scores_of_their_import(corpus, tmp_path):
    for d in ("imported", "edf"):
        assert here("--checkpoint", corpus / "best.pt", "--data", corpus / d, "--out", tmp_path / d)[0] == 0
    a, b = (json.loads((tmp_path / d / "scores.json").read_text()) for d in ("imported", "edf"))
    assert {m: a[m] for m in METRICS} == {m: b[m] for m in METRICS}
    assert {p.relative_to(tmp_path / "edf") for p in (tmp_path / "edf").rglob("*_events.tsv")} == \
        {p.relative_to(tmp_path / "imported") for p in (tmp_path / "imported").rglob("*_events.tsv")}


def test_a_corpus_of_links_to_folders_is_found_imported_or_raw(corpus, tmp_path):
    for kind in ("imported", "edf"):
        (tmp_path / kind).mkdir()
        for place in (corpus / kind).glob("sub-*"):
            (tmp_path / kind / place.name).symlink_to(place)
        assert here("--checkpoint", corpus / "best.pt", "--data", tmp_path / kind, "--out", tmp_path / "out" / kind)[0] == 0
    files = [sorted(path.relative_to(place) for path in place.rglob("*_events.tsv")) for place in (tmp_path / "out").iterdir()]
    assert len(files[0]) == 2 and files[0] == files[1]


def test_raw_edf_files_are_prepared_as_the_training_was_and_another_preparation_is_said(corpus, tmp_path, capsys):
    state = checkpoint.load(corpus / "best.pt")
    recipe = edf.Recipe("referential", "50", "mV")
    for prepared, wanted in ((recipe.hash, recipe.hash), ("of another version", edf.Recipe().hash)):
        scratch = tmp_path / prepared
        scratch.mkdir()
        recordings, *_ = evaluate.open_data(corpus / "edf", state | {"prepared": prepared}, scratch)
        assert {r.prepared for r in recordings} == {wanted}
    evaluate.open_data(corpus / "imported", state | {"prepared": recipe.hash}, tmp_path)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is of montage referential, notch both, the checkpoint was trained on" in line
    assert line.endswith("montage referential, notch 50, blank unit mV")
    checkpoint.atomic_save(state | {"prepared": recipe.hash}, tmp_path / "other.pt")
    assert here("--checkpoint", tmp_path / "other.pt", "--data", corpus / "imported", "--out", tmp_path / "out")[0] == 0
    told = json.loads((tmp_path / "out" / "scores.json").read_text())["preparation_warning"]
    assert line == f"evaluate.py: {told}" and f"warning: {told}" in capsys.readouterr().out.splitlines()[-1]


def test_a_file_that_cannot_be_read_is_named_beside_the_scores_of_the_others(corpus, tmp_path):
    source = next((corpus / "edf").rglob("*.edf"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.edf").write_bytes(source.read_bytes())
    (tmp_path / "in" / "torn.edf").write_bytes(source.read_bytes()[:200])
    code, _ = here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [r["recording"] for r in scores["per_recording"]] == ["good"]
    assert len(scores["refused"]) == 1 and "torn.edf" in scores["refused"][0][0]


def test_files_that_the_import_refused_stand_beside_the_scores_of_its_folder(corpus, tmp_path, capsys):
    shutil.copytree(corpus / "imported", tmp_path / "data")
    refused = [[f"{number}.edf", "its header is cut"] for number in range(25)]
    (tmp_path / "data" / "import.json").write_text(json.dumps({"refused": refused, "unfinished": []}))
    assert here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "data", "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["refused"] == refused
    out = capsys.readouterr().out
    assert "not scored: 19.edf: its header is cut\nnot scored: 5 more: refused in scores.json" in out


def test_a_stripped_checkpoint_and_a_lone_edf_without_labels_give_events_only(corpus, tmp_path):
    share.strip(corpus / "best.pt", tmp_path / "weights.pt")
    source = next((corpus / "edf").rglob("*.edf"))
    (tmp_path / "alone.edf").write_bytes(source.read_bytes())
    assert here("--checkpoint", tmp_path / "weights.pt", "--data", tmp_path / "alone.edf", "--plot")[0] == 0
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert all(scores[m] is None for m in METRICS) and scores["labelled_recordings"] == 0
    assert scores["not_computed"]["event_f1"] == "no recording is labelled" and scores["threshold"] == 0.07
    assert read_tsv(tmp_path / "evaluation" / "alone_events.tsv")
    assert (tmp_path / "evaluation" / "alone.png").read_bytes().startswith(b"\x89PNG")


def test_the_config_threshold_is_used_and_named_where_none_was_tuned(corpus, tmp_path):
    state = checkpoint.load(corpus / "best.pt")
    checkpoint.atomic_save({k: v for k, v in state.items() if k != "scores"}, tmp_path / "untuned.pt")
    assert here("--checkpoint", tmp_path / "untuned.pt", "--data", corpus / "imported")[0] == 0
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert scores["threshold"] == 0.86 and "config" in scores["threshold_source"]


def test_the_dev_split_is_the_one_training_validated_on(corpus, tmp_path):
    assert here("--checkpoint", corpus / "best.pt", "--data", corpus / "imported", "--split", "dev",
                "--out", tmp_path)[0] == 0
    dev = data.split_patients(data.open_corpus(corpus / "imported"), [], 0.5, 0)[1]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [row["recording"] for row in scores["per_recording"]] == [r.name for r in dev]
    assert not scores["includes_training"]


def test_a_split_that_is_not_there_is_refused_with_what_to_leave_away(corpus, tmp_path):
    alone = next(path for path in (corpus / "imported").iterdir() if path.is_dir())
    for split, source in (("eval", corpus / "imported"), ("dev", alone)):
        code, lines = here("--checkpoint", corpus / "best.pt", "--data", source, "--split", split, "--out", tmp_path)
        assert code == 2 and len(lines) == 1 and lines[0].endswith("leave --split away"), lines


def test_a_corpus_that_has_grown_or_shrunk_since_the_training_is_divided_anew_and_that_is_said(corpus, tmp_path, capsys):
    state, recordings = checkpoint.load(corpus / "best.pt"), data.open_corpus(corpus / "imported")
    state["data"] = data.fingerprint(recordings)
    checkpoint.atomic_save(state, tmp_path / "same.pt")
    checkpoint.main(["strip", str(tmp_path / "same.pt")])
    checkpoint.atomic_save(state | {"data": data.fingerprint(recordings[1:])}, tmp_path / "fewer.pt")
    parts = data.split_patients(recordings, [], 0.5, 0)
    for name, division in (("as_then", splits.division(*parts)), ("other_patients", splits.division(*parts[::-1]))):
        checkpoint.atomic_save(state | {"division": division}, tmp_path / f"{name}.pt")
    for name, said in (("same", False), ("same_weights", False), ("fewer", True), ("as_then", False), ("other_patients", True)):
        capsys.readouterr()
        assert here("--checkpoint", tmp_path / f"{name}.pt", "--data", corpus / "imported", "--split", "dev",
                    "--out", tmp_path / name)[0] == 0
        scores = json.loads((tmp_path / name / "scores.json").read_text())
        assert ("patients who trained" in capsys.readouterr().out) == ("drawn anew" in scores["split_warning"]) == said


def test_scores_that_include_the_training_recordings_say_so(corpus, tmp_path, capsys):
    state = checkpoint.load(corpus / "best.pt")
    state["config"]["data"]["path"] = str(corpus / "imported")
    checkpoint.atomic_save(state, tmp_path / "best.pt")
    assert here("--checkpoint", tmp_path / "best.pt", "--data", corpus / "imported")[0] == 0
    assert json.loads((tmp_path / "evaluation" / "scores.json").read_text())["includes_training"]
    assert "--split dev" in capsys.readouterr().out


def test_recordings_that_trained_are_known_in_part_and_after_a_move_and_as_the_edf_they_were(corpus, tmp_path):
    state = checkpoint.load(corpus / "best.pt")
    state["config"]["data"]["path"] = str(tmp_path / "then")
    state["data"] = data.fingerprint(data.open_corpus(corpus / "imported"))
    shutil.copytree(corpus / "imported", tmp_path / "then")
    corpora.import_corpus(next((corpus / "edf").rglob("*.edf")), tmp_path / "other", say=lambda line: None)
    other = next((tmp_path / "other").rglob("*.h5"))
    other.rename(other.with_name("renamed.h5"))
    part = next(path for path in sorted((tmp_path / "then").iterdir()) if path.is_dir())
    parts = splits.split_time(data.open_corpus(corpus / "imported"), 0.5)
    by_time = state | {"data": data.fingerprint(sum(parts, [])), "config": copy.deepcopy(state["config"])}
    by_time["config"]["data"]["split"] = "time"
    write_edf(tmp_path / "never.edf", seconds=30)
    lone = next((corpus / "edf").rglob("*.edf"))            # no label file lies beside it in its new place
    (tmp_path / "lone.edf").write_bytes(lone.read_bytes())
    there = ((part, True), (corpus / "imported", True), (corpus / "edf", True), (tmp_path / "other", True),
             (tmp_path / "lone.edf", True), (tmp_path / "never.edf", False))
    for (path, known), trained in itertools.product(there, (state, by_time)):
        args = evaluate.parse(["--checkpoint", "best.pt", "--data", str(path)])
        with tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
            recordings, *_ = evaluate.open_data(path, trained, Path(scratch))
            assert evaluate.includes_training(recordings, args, trained) is known, path


def test_a_result_that_cannot_be_written_is_one_line_and_exit_code_1(corpus, tmp_path):
    source = next((corpus / "edf").rglob("*.edf"))
    (tmp_path / "alone.edf").write_bytes(source.read_bytes())
    for name in ("scores.json", "alone_events.tsv"):
        out = tmp_path / f"out of {name}"
        (out / name).mkdir(parents=True)                    # a folder stands where the file should go
        code, lines = here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "alone.edf", "--out", out)
        assert code == 1 and lines[-1].startswith("evaluate.py: stopped:") and name in lines[-1]


def test_bad_input_is_one_line_and_exit_code_2(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.pt").write_bytes((corpus / "best.pt").read_bytes()[:-5000])
    (tmp_path / "bad.edf").write_bytes(b"0       nothing")
    write_edf(tmp_path / "banana.edf", labels=edf.CHANNELS["bipolar"])
    checkpoint.atomic_save({"epoch": 1}, tmp_path / "other.pt")
    state = checkpoint.load(corpus / "best.pt")
    state["config"]["model"] = {**state["config"]["model"], "node_width": 32}
    checkpoint.atomic_save(state, tmp_path / "misfit.pt")
    bipolar = checkpoint.load(corpus / "best.pt") | {"montage": "bipolar"}
    bipolar["channels"] = list(edf.CHANNELS["bipolar"])
    bipolar["model"] = v3.V3(18, **v3.SMALL).state_dict()
    checkpoint.atomic_save(bipolar, tmp_path / "bipolar.pt")
    reduced = checkpoint.load(corpus / "best.pt") | {"montage": "reduced", "channels": list(edf.CHANNELS["referential"])}
    checkpoint.atomic_save(reduced, tmp_path / "reduced.pt")
    reduced["config"]["training"] = {"precision": "fp8"}
    checkpoint.atomic_save(reduced, tmp_path / "fp8.pt")
    good, imported = corpus / "best.pt", corpus / "imported"
    for weights, source, text in (
            (tmp_path / "no.pt", imported, "no.pt"), (corpus, imported, f"its best weights are {good}"),
            (tmp_path / "empty", imported, "give a checkpoint in it"),
            (good, next(imported.rglob("*.h5")), "give its folder, or its EDF"), (tmp_path / "damaged.pt", imported, "damaged.pt"),
            (tmp_path / "other.pt", imported, "lacks model"), (tmp_path / "misfit.pt", imported, "model.py"),
            (tmp_path / "bipolar.pt", imported, "import with --montage bipolar"),
            (tmp_path / "reduced.pt", imported, "import with --montage reduced --channels Fp1,F3"),
            (tmp_path / "fp8.pt", imported, "give --precision"),
            (good, tmp_path / "nowhere", "nowhere"), (good, tmp_path / "empty", "neither"),
            (good, tmp_path / "bad.edf", "bad.edf"),
            (good, tmp_path / "banana.edf", "this checkpoint reads montage referential alone")):
        code, lines = here("--checkpoint", weights, "--data", source, "--out", tmp_path / "out")
        assert code == 2 and len(lines) == 1 and text in lines[0], lines
    for option, place in (("--out", tmp_path / "bad.edf" / "x"), ("--out", tmp_path / "bad.edf"),
                          ("--events", tmp_path / "bad.edf" / "x.tsv")):
        code, lines = here("--checkpoint", good, "--data", next((corpus / "edf").rglob("*.edf")), option, place)
        assert code == 2 and len(lines) == 1 and option in lines[0], lines
    (tmp_path / "nowhere.tsv").symlink_to(tmp_path / "not/there.tsv")
    (tmp_path / "loop.tsv").symlink_to("loop.tsv")
    for option, place in (("--events", "nowhere.tsv"), ("--events", "loop.tsv"), ("--data", "x" * 300)):
        code, lines = here("--checkpoint", good, "--data", tmp_path / "banana.edf", option, tmp_path / place)
        assert code == 2 and place in lines[-1], lines
    done = run("--checkpoint", tmp_path / "no.pt", "--data", imported)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.pt" in done.stderr


def test_a_path_that_is_not_there_is_refused_with_what_to_do(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, lines = here("--checkpoint", corpus / "best.pt", "--data", "data/own")
    assert code == 2 and lines[0].endswith(f"does not exist: python {ROOT / 'data.py'} import SRC data/own"), lines
    for option, typed in (("--data", "deploy"), ("--data", "README.md"), ("--checkpoint", "model.py")):      # as if printed so on a page
        words = {"--checkpoint": corpus / "best.pt", "--data": corpus / "imported"} | {option: typed}
        code, lines = here(*[word for pair in words.items() for word in pair])
        assert code == 2 and lines[0].endswith(f"; it lies at {ROOT / typed}"), lines


def test_an_option_that_is_the_imports_is_named_with_the_import(corpus, tmp_path, capsys):
    folder = tmp_path / "own"
    folder.mkdir()
    write_edf(folder / "anna_1.edf")
    (folder / "anna_1.csv").write_text("Onset,Duration,Annotation\n3,2,Ictal event\n")
    write_edf(folder / "ben_1.edf", unit="")
    write_edf(folder / "eva_1.edf", labels=["A1", "B2", *NAMES[2:]])
    write_edf(folder / "dan_1.edf", labels=NAMES[:4])
    write_edf(folder / "cap_1.edf", labels=[f"EEG {number:03d}" for number in range(1, 20)])
    (folder / "ole_1.edf").write_bytes((folder / "anna_1.edf").read_bytes())
    (folder / "ole_1_events.tsv").write_text("onset\tduration\teventType\n3\t2\tspkz\n")
    assert here("--checkpoint", corpus / "best.pt", "--data", folder, "--out", tmp_path / "out")[0] == 0
    said = capsys.readouterr().out
    assert "labels that cannot be used: ole_1_events.tsv: unknown eventType 'spkz'" in said
    named = [line for line in said.splitlines() if " --" in line]
    assert len(named) >= 5 and all("data.py import" in line for line in named), named
    assert all(option in said for option in ("--seizure-label", "--rename", "--blank-unit", "--montage reduced --channels"))


@pytest.mark.slow
def test_what_the_command_line_overrides_is_used_and_said(corpus, tmp_path):
    given = ("--checkpoint", corpus / "best.pt", "--data", corpus / "imported", "--out", tmp_path)
    assert here(*given, "--threshold", "0.3", "--set", "evaluation.overlap_seconds=5",
                "--set", "evaluation.release=1e-2", "--precision", "bf16")[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["overridden"] == {"evaluation.overlap_seconds": 5, "evaluation.release": 0.01,
                                    "evaluation.threshold": 0.3, "precision": "bf16"}
    assert scores["threshold"] == scores["settings"]["threshold"] == 0.3
    assert scores["settings"]["overlap_seconds"] == 5 and scores["precision"] == "bf16"
    assert "command line" in scores["threshold_source"]
    assert here(*given)[0] == 0
    assert json.loads((tmp_path / "scores.json").read_text())["overridden"] == {}


@pytest.mark.parametrize("arguments, text", [
    (("--set", "evaluation.treshold=1"), "nearest is evaluation.threshold"),
    (("--set", "evaluation.threshold=high"), "evaluation.threshold must be float, like 0.86"),
    (("--set", "training.epochs=1"), "write evaluation.key=value"),
    (("--set", "evaluation.overlap_seconds"), "write evaluation.key=value"),
    (("--set", "evaluation.tune=true"), "give --threshold"),
    (("--set", "evaluation.max_false_alarms_per_24h=1"), "give --threshold"),
    (("--threshold", "1.5"), "between 0 and 1"), (("--threshold", "nan"), "between 0 and 1")])
def test_an_override_that_cannot_be_is_refused_in_one_line(corpus, tmp_path, arguments, text):
    code, lines = here("--checkpoint", corpus / "best.pt", "--data", corpus / "imported",
                       "--out", tmp_path / "out", *arguments)
    assert code == 2 and len(lines) == 1 and text in lines[0], lines
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_scores_are_in_the_precision_of_the_training(corpus, tmp_path):
    state = checkpoint.load(corpus / "best.pt")
    state["config"]["training"] = {"precision": "bf16"}
    checkpoint.atomic_save(state, tmp_path / "best.pt")
    for out, given in (("own", ()), ("asked", ("--precision", "fp32"))):
        assert here("--checkpoint", tmp_path / "best.pt", "--data", corpus / "imported",
                    "--out", tmp_path / out, "--save-probabilities", *given)[0] == 0
    net, state = evaluate.load_model(tmp_path / "best.pt", "cpu")
    r = data.open_corpus(corpus / "imported")[0]
    c, _ = evaluate.stored_settings(state)
    for out, precision in (("own", "bf16"), ("asked", "fp32")):
        assert json.loads((tmp_path / out / "scores.json").read_text())["precision"] == precision
        track = np.load(evaluate.output(tmp_path / out, r, "_probability.npy"))
        assert track.dtype == np.float32 and track.shape == (r.samples,)
        np.testing.assert_array_equal(track, evaluate.predict(net, r, "cpu", c, precision))


def test_the_version_of_a_corpus_and_the_clock_of_its_files_come_through_the_import(corpus, tmp_path):
    source = tmp_path / "tusz"
    source.mkdir()
    (source / "README.txt").write_text("TUH EEG Seizure Corpus, version 2.0.3\n")
    write_edf(source / "a.edf", date="04.03.21", time="22.14.07")
    corpora.import_corpus(source, tmp_path / "imported", say=lambda line: None)
    assert here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "imported",
                "--out", tmp_path / "out")[0] == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert "2.0.3" in scores["corpus_version"]
    assert read_tsv(tmp_path / "out" / "a_events.tsv")[0]["dateTime"] == "2021-03-04 22:14:07"


def test_every_recording_and_every_patient_has_all_scores(corpus, tmp_path):
    assert here("--checkpoint", corpus / "best.pt", "--data", corpus / "imported",
                "--out", tmp_path)[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    recordings = data.open_corpus(corpus / "imported")
    assert [row["recording"] for row in scores["per_recording"]] == [r.name for r in recordings]
    patients = [row["patient"] for row in scores["per_patient"]]
    assert patients == sorted({r.patient for r in recordings})
    for row in scores["per_recording"] + scores["per_patient"]:
        assert set(METRICS) < set(row)
    for name in ("event_f1", "event_sensitivity", "false_alarms_per_24h"):
        values = [row[name] for row in scores["per_patient"] if row[name] is not None]
        assert scores[name] == pytest.approx(np.mean(values))
    at = [row for row in scores["trade_off"] if row["threshold"] == scores["threshold"]]
    assert at[0]["event_f1"][0] == pytest.approx(scores["event_f1"])
    assert len(scores["trade_off"]) == len(evaluate.GRID) + 1


def test_the_rows_of_the_patients_have_the_mean_that_is_told_of_all():
    def track(name, truth, found):
        t = Track(name, 3600, truth, name)
        return evaluate.score(t, probability_of(t, found), FIXED)
    records = [track("p1", [(100, 160)], [(100, 160), (900, 960)]),
               track("p2", [], [(100, 160)]),               # alarms alone: F1 and precision 0
               track("p3", [(100, 160)], []), track("p4", [], [])]      # nothing detected: no precision
    told = evaluate.tell(records, [2, 1, 0, 0], evaluate.settings(FIXED))
    for rows in (told["per_patient"], told["per_recording"]):
        for name in metrics.COUNTED:
            values = [row[name] for row in rows if row[name] is not None]
            assert told[name] == pytest.approx(np.mean(values)), name
        assert [row["event_f1"] for row in rows] == [pytest.approx(2 / 3), 0, 0, None]
        assert [row["event_precision"] for row in rows] == [0.5, 0, None, None]


def test_one_patient_has_scores_without_intervals(corpus, tmp_path, capsys):
    ill = next(r for r in data.open_corpus(corpus / "imported") if len(r.events))
    (tmp_path / "one").mkdir()
    shutil.copy(ill.path, tmp_path / "one")
    assert here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "one",
                "--out", tmp_path / "out", "--plot")[0] == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["patients"] == 1 and scores["intervals"] == {} and scores["event_f1"] is not None
    assert "no intervals: they need two patients" in capsys.readouterr().out
    assert (tmp_path / "out" / "trade_off.png").is_file()


def test_events_of_other_recordings_are_never_left_beside_new_scores(corpus, tmp_path):
    edfs = sorted((corpus / "edf").rglob("*.edf"))[:2]
    for name, source in zip("ab", edfs):
        (tmp_path / f"{name}.edf").write_bytes(source.read_bytes())
    good = corpus / "best.pt"
    out = tmp_path / "out"
    assert here("--checkpoint", good, "--data", tmp_path / "a.edf", "--out", out, "--plot")[0] == 0
    assert (out / "a.png").is_file()
    before = (out / "scores.json").read_bytes()
    code, lines = here("--checkpoint", good, "--data", tmp_path / "b.edf", "--out", out)
    assert code == 2 and "a_events.tsv" in lines[-1] and f"--out {out}_b" in lines[-1]
    assert (out / "scores.json").read_bytes() == before and not (out / "b_events.tsv").exists()
    assert here("--checkpoint", good, "--data", tmp_path / "a.edf", "--out", out)[0] == 0
    assert (out / "a.png").is_file()                        # a run without --plot deletes no picture
    another = write_edf(tmp_path / "other/a.edf", 20)       # another set may have a recording of the same name
    before = (out / "scores.json").read_bytes()
    code, lines = here("--checkpoint", good, "--data", another, "--out", out)
    assert code == 2 and "events of other recordings (a_events.tsv; 1 in all)" in lines[-1]
    another.write_bytes(edfs[0].read_bytes()[:176] + b"11.22.33" + edfs[0].read_bytes()[184:])     # of the same length, of another start
    code, lines = here("--checkpoint", good, "--data", another, "--out", out)
    assert code == 2 and "events of other recordings (a_events.tsv; 1 in all)" in lines[-1]
    assert (out / "scores.json").read_bytes() == before


def test_another_data_set_with_recordings_of_equal_names_lengths_and_starts_is_refused_in_the_folder_of_the_first(corpus, tmp_path):
    for number, place in enumerate(("ward/a.edf", "clinic/a.edf", "moved/a.edf")):
        write_edf(tmp_path / place, size=20.0 + 10 * (number == 1))
    given = ("--checkpoint", corpus / "best.pt", "--out", tmp_path / "out", "--data")
    assert here(*given, tmp_path / "ward")[0] == 0
    before = (tmp_path / "out/scores.json").read_bytes(), (tmp_path / "out/a_events.tsv").read_bytes()
    code, lines = here(*given, tmp_path / "clinic")
    assert code == 2 and "events of other recordings (a_events.tsv; 1 in all)" in lines[-1] and f"--out {tmp_path / 'out'}_clinic" in lines[-1]
    assert before == ((tmp_path / "out/scores.json").read_bytes(), (tmp_path / "out/a_events.tsv").read_bytes())
    assert here(*given, tmp_path / "moved")[0] == 0         # the same EEG elsewhere
    write_edf(tmp_path / "moved/a.edf", size=50.0)
    assert here(*given, tmp_path / "moved")[0] == 0         # other EEG in the same place


@pytest.mark.parametrize("name, text", [
    ("a_events.tsv", "onset\tduration\teventType\n3\t2\tsz\n"), ("a_events.tsv", "what I saw in a"),
    ("scores.json", '{"mine": 1}'), ("scores.json", "[1]"), ("scores.json", "none")])
def test_what_another_hand_or_program_wrote_under_the_names_of_an_evaluation_stays(corpus, tmp_path, name, text):
    source = write_edf(tmp_path / "in/a.edf", seconds=7)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    code, lines = here("--checkpoint", corpus / "best.pt", "--data", source, "--out", tmp_path / "out")
    assert code == 2 and name in lines[-1] and "give another folder" in lines[-1], lines
    assert (tmp_path / "out" / name).read_text() == text


@pytest.mark.slow
def test_the_picture_of_the_trade_off_takes_the_place_of_no_recordings(corpus, tmp_path):
    labelled = next(path for path in sorted((corpus / "edf").rglob("*_eeg.edf")) if "\tsz" in path.with_name(path.name.replace("_eeg.edf", "_events.tsv")).read_text())
    for name in ("trade_off", "trade_off_of_all"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.edf").write_bytes(labelled.read_bytes())
        (tmp_path / "in" / f"{name}_events.tsv").write_bytes(labelled.with_name(labelled.name.replace("_eeg.edf", "_events.tsv")).read_bytes())
    assert here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "in", "--out", tmp_path / "out", "--plot")[0] == 0
    sizes = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert set(sizes) == {"trade_off", "trade_off_of_all", "trade_off_of_all_of_all"} and len(set(sizes.values())) == 3


def test_the_annotations_of_a_corpus_are_never_written_over(corpus, tmp_path):
    source = next((corpus / "edf").rglob("*_eeg.edf"))
    labels = source.with_name(source.name.replace("_eeg.edf", "_events.tsv"))
    for path in (source, labels):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for chosen in (tmp_path, tmp_path / source.name):
        code, lines = here("--checkpoint", corpus / "best.pt", "--data", chosen, "--out", tmp_path)
        assert code == 2 and labels.name in lines[-1]
        assert (tmp_path / labels.name).read_bytes() == labels.read_bytes()
    (tmp_path / labels.name).unlink()                       # nor made, where the next import would read them
    assert here("--checkpoint", corpus / "best.pt", "--data", tmp_path, "--out", tmp_path)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("name, source, place", [
    ("a", "farm", "farm"),                                  # a corpus put together of links to folders
    ("b", "other", "one"),                             # b_events.tsv is read as the labels of b_eeg.edf
    ("a", "real/sub/a_eeg.edf", "links/a_events.tsv")])     # labels that are links, as DataLad has them
def test_labels_that_a_link_or_another_name_leads_to_are_not_written_over(corpus, tmp_path, name, source, place):
    for path in ("real/sub/a_eeg.edf", "one/b_eeg.edf", "links/a_eeg.edf", "other/b.edf"):
        write_edf(tmp_path / path, seconds=7)
    for labels in ("real/sub/a_events.tsv", "one/b_events.tsv"):
        (tmp_path / labels).write_text("onset\tduration\teventType\n3\t2\tsz\n")
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm/sub").symlink_to(tmp_path / "real/sub")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/labels").write_text("onset\tduration\teventType\n3\t2\tsz\n")
    (tmp_path / "links/a_events.tsv").symlink_to(tmp_path / "kept/labels")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    option = "--events" if place.endswith(".tsv") else "--out"
    code, lines = here("--checkpoint", corpus / "best.pt", "--data", tmp_path / source, option, tmp_path / place)
    assert code == 2 and f"{name}_e" in lines[-1] and "be read as its labels: give another folder" in lines[-1], lines
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_events_in_one_file_never_become_the_labels_of_an_edf_beside_it(corpus, tmp_path):
    for name in ("a", "b_eeg"):
        write_edf(tmp_path / f"{name}.edf", seconds=7)
    labels = tmp_path / "b_events.tsv"
    labels.write_text("onset\tduration\teventType\n3\t2\tsz\n")
    for name in ("a_events.tsv", "a.csv_bi", "b_events.tsv"):
        before = sorted(tmp_path.iterdir()), labels.read_text()
        code, lines = here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "a.edf", "--events", tmp_path / name)
        assert code == 2 and len(lines) == 1 and f"beside {name[0]}" in lines[0], lines
        assert before == (sorted(tmp_path.iterdir()), labels.read_text())


def test_a_full_disk_is_named_with_the_file_and_leaves_no_piece_of_it(corpus, tmp_path, small_disk, monkeypatch):
    source = next((corpus / "edf").rglob("*.edf"))
    earlier = small_disk / "x.tsv"
    given = ("--checkpoint", corpus / "best.pt", "--data", source)
    assert here(*given, "--events", earlier)[0] == 0
    before = earlier.read_text()
    (small_disk / "out").mkdir()
    (small_disk / "out" / ".lock").write_bytes(b"process")
    with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for option, place, name in (("--events", earlier, earlier), ("--out", small_disk / "out", f"{source.stem.removesuffix('_eeg')}_events.tsv")):
        code, lines = here(*given, option, place)
        assert code == 1 and "No space left on device" in lines[-1] and str(name) in lines[-1], lines
    assert earlier.read_text() == before and not list(small_disk.rglob("*.part")) and not list(small_disk.glob("out/*.tsv"))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    for free in (0, 400_000):                               # no room for a lock file, and for a lock file alone
        os.truncate(small_disk / "filler", os.path.getsize(small_disk / "filler") - free)
        for option, place in (("--out", tmp_path / "out"), ("--events", tmp_path / "never.tsv")):
            code, lines = here(*given, option, place)
            assert code == 1 and re.search(r"stopped: \[Errno 28\] No space left on device: '\S+'$", lines[-1]), lines
    assert not (tmp_path / "never.tsv").exists()


def test_a_place_that_may_not_be_written_is_refused_before_anything_is_predicted(corpus, small_disk, monkeypatch):
    monkeypatch.setattr(evaluate, "predict", None)
    source = next((corpus / "edf").rglob("*.edf"))
    (small_disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for option, place in (("--events", small_disk / "x.tsv"), ("--out", small_disk / "out"), ("--out", small_disk / "new")):
        code, lines = here("--checkpoint", corpus / "best.pt", "--data", source, option, place)
        assert code == 2 and len(lines) == 1 and f"{option} {place}" in lines[0], lines


@pytest.mark.slow
@pytest.mark.parametrize("way", ["| cat", pytest.param("> file && cat file", marks=pytest.mark.slow)])
def test_events_go_down_a_pipe_and_through_a_link_which_stays(corpus, tmp_path, way):
    (tmp_path / "link.tsv").symlink_to(tmp_path / "there.tsv")
    source = next((corpus / "edf").rglob("*.edf"))
    line = f'"$0" "$1" --checkpoint "$2/best.pt" --data "$3" --events /dev/stdout {way}'
    done = subprocess.run(["bash", "-c", line, sys.executable, ROOT / "evaluate.py", corpus, source], cwd=tmp_path, capture_output=True, text=True)
    assert "recordingDuration" in done.stdout and Path("/dev/stdout").is_symlink(), done.stderr
    assert here("--checkpoint", corpus / "best.pt", "--data", source, "--events", tmp_path / "link.tsv")[0] == 0
    assert (tmp_path / "link.tsv").is_symlink() and read_tsv(tmp_path / "there.tsv")


def test_two_evaluations_never_write_into_one_folder(corpus, tmp_path):
    given = ("--checkpoint", corpus / "best.pt", "--data", corpus / "imported", "--out", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with checkpoint.lock(tmp_path / "out"):
        code, lines = here(*given)
    assert code == 2 and "is in use by" in lines[-1] and not list((tmp_path / "out").rglob("*.tsv"))
    assert here(*given)[0] == 0


def test_an_evaluation_that_is_stopped_leaves_no_scores_of_an_earlier_one_beside_its_events(corpus, tmp_path, monkeypatch):
    given = ("--checkpoint", corpus / "best.pt", "--data", corpus / "imported", "--out", tmp_path)
    assert here(*given)[0] == 0 and (tmp_path / "scores.json").exists()
    monkeypatch.setattr(evaluate, "score", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):                  # before anything was written over
        here(*given, "--threshold", "0.01")
    assert (tmp_path / "scores.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "tell", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        here(*given, "--threshold", "0.01")
    assert not (tmp_path / "scores.json").exists() and list(tmp_path.rglob("*_events.tsv"))


TWICE = f"""
import os, runpy, shutil, sys
remove, sys.argv, sys.path[0] = shutil.rmtree, sys.argv[1:], {str(ROOT)!r}

def removed(*arguments, **options):
    os.kill(os.getpid(), 2)
    remove(*arguments, **options)

shutil.rmtree = removed
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number, start", [
    (signal.SIGINT, ["-c", TWICE]),                         # once more where the prepared EDFs are removed
    (signal.SIGTERM, []), pytest.param(signal.SIGINT, [], marks=pytest.mark.slow), pytest.param(signal.SIGHUP, [], marks=pytest.mark.slow)])
def test_a_signal_ends_an_evaluation_with_its_code_and_leaves_no_prepared_edf(corpus, tmp_path, number, start):
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, *start, ROOT / "evaluate.py", "--checkpoint", corpus / "best.pt", "--data", corpus / "edf",
               "--out", tmp_path / "out", "--set", "evaluation.overlap_seconds=19.9"]
    process = forked.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / ".lock").exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert list((tmp_path / "tmp").iterdir())
    process.send_signal(number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number and "interrupted" in said.splitlines()[-1], said
    assert not list((tmp_path / "tmp").iterdir())


def test_stripped_weights_write_beside_themselves_and_a_run_in_its_folder(corpus, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "best.pt").write_bytes((corpus / "best.pt").read_bytes())
    share.strip(corpus / "best.pt", folder / "weights.pt")
    for name in ("best.pt", "weights.pt"):
        assert here("--checkpoint", folder / name, "--data", corpus / "imported")[0] == 0
    for out in (tmp_path, folder):
        assert (out / "evaluation" / "scores.json").is_file()


def test_no_bar_is_drawn_where_nobody_watches(corpus, tmp_path):
    done = run("--checkpoint", corpus / "best.pt", "--data", corpus / "imported", "--out", tmp_path)
    assert done.returncode == 0
    assert done.stderr == "evaluate: 2 of 2 recordings\n"


@pytest.mark.slow
def test_closed_streams_end_no_evaluation(corpus, tmp_path):
    line = '"$0" "$1" --checkpoint "$2/best.pt" --data "$2/imported" --out "$3" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", line, sys.executable, ROOT / "evaluate.py", corpus, tmp_path]).returncode == 0
    assert (tmp_path / "scores.json").exists()


def test_an_interrupt_waits_for_the_end_of_a_picture():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with console.signals_wait(signal.SIGINT):
            os.kill(os.getpid(), signal.SIGINT)
            done.append("drawn")
    assert done == ["drawn"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- odd input ----

@pytest.mark.parametrize("odd", [{"scores": None}, {"scores": {}}, {"scores": 5}, {"evaluation": None},
                                 {"evaluation": {}}, {"scores": {"threshold": 0.4}}])
def test_a_checkpoint_that_lacks_scores_or_settings_is_scored_with_the_defaults(corpus, tmp_path, odd):
    state = checkpoint.load(corpus / "best.pt")
    if "evaluation" in odd:
        state["config"]["evaluation"] = odd["evaluation"]
    else:
        state["scores"] = odd["scores"]
    c, source = evaluate.stored_settings(state)
    assert c["threshold"] == (state["scores"].get("threshold") or 0.86 if isinstance(state["scores"], dict) else 0.86)
    assert ("tuned" in source) and c["tune"] is False


def test_a_best_that_is_missing_names_the_newest_weights(tmp_path, corpus):
    state = checkpoint.load(corpus / "best.pt") | {"epoch": 1, "batch": 3, "global_step": 3, "save_counter": 1}
    newest = tmp_path / "checkpoints" / "mid_epoch_001_000003.pt"
    newest.parent.mkdir()
    checkpoint.atomic_save(state, newest)
    code, lines = here("--checkpoint", newest.with_name("best.pt"), "--data", corpus / "imported")
    assert code == 2 and len(lines) == 1
    assert f"best.pt: no validation has finished yet; the newest weights are {newest}" in lines[0]
    code, lines = here("--checkpoint", tmp_path / "best.pt", "--data", corpus / "imported")
    assert code == 2 and lines == [f"evaluate.py: checkpoint {tmp_path / 'best.pt'}: No such file or directory"]


@pytest.mark.parametrize("section, text", [("evaluation", "no keys"), ("model", "does not fit"), ("data", "leave --split away"),
                                           ("experiment", "leave --split away")])
def test_a_checkpoint_whose_config_is_no_table_is_refused(corpus, tmp_path, section, text):
    state = checkpoint.load(corpus / "best.pt")
    state["config"][section] = ["what"]
    checkpoint.atomic_save(state, tmp_path / "odd.pt")
    code, lines = here("--checkpoint", tmp_path / "odd.pt", "--data", corpus / "imported",
                       "--out", tmp_path / "out", "--split", "dev")
    assert code == 2 and len(lines) == 1 and text in lines[0], lines


def test_weights_that_give_nan_are_refused_by_name_and_score_nothing(corpus, tmp_path):
    state = checkpoint.load(corpus / "best.pt")
    for value in state["model"].values():
        if value.is_floating_point():
            value.fill_(math.nan)
    checkpoint.atomic_save(state, tmp_path / "nan.pt")
    code, lines = here("--checkpoint", tmp_path / "nan.pt", "--data", corpus / "imported",
                       "--out", tmp_path / "out")
    assert code == 2 and "not finite" in lines[-1] and not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.parametrize("samples", [1, 2, 25])
def test_a_recording_of_a_few_samples_is_predicted_and_scored(samples):
    track = Track("a", samples / FS, [(0, 1)])
    p = evaluate.predict(Pointwise(), track, "cpu", {"window_seconds": 10.0, "overlap_seconds": 5.0})
    assert p.shape == (samples,) and np.isfinite(p).all()
    records = [evaluate.score(track, p, FIXED)]
    told = evaluate.tell(records, [0], evaluate.settings(FIXED))
    json.dumps(told, allow_nan=False)
    assert told["recordings"] == 1


# ---- one EDF to one file: the contract of the SzCORE benchmark ----

def container(corpus, edf_path, out):
    """Run what deploy/szcore/Dockerfile runs, as an ordinary user without a home. Root becomes one
    where others may run this Python."""
    dockerfile = (ROOT / "deploy" / "szcore" / "Dockerfile").read_text()
    script = re.search(r"^CMD (python3 .*)$", dockerfile, re.M)[1]
    script = script.replace("python3", sys.executable).replace("/app/", f"{out.parent}/app/")
    script = script.replace('"/data/', f'"{edf_path.parent}/').replace('"/output/', f'"{out.parent}/')
    app = out.parent / "app"
    app.mkdir(exist_ok=True)
    copy_sources(app)
    shutil.copy(corpus / "best.pt", app / "model.pt")
    whole = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "OMP_NUM_THREADS": "1",
             "INPUT": edf_path.name, "OUTPUT": out.name}
    user = {}
    python = Path(sys.executable).resolve()
    open_to_others = all(folder.stat().st_mode & 1 for folder in [python, *python.parents])
    if os.getuid() == 0 and open_to_others:
        for path in [*out.parent.rglob("*"), out.parent, edf_path]:
            os.chown(path, 10001, 10001)
        user = {"user": 10001, "group": 10001, "extra_groups": []}
    return subprocess.run(["sh", "-c", script], env=whole, cwd="/", capture_output=True, text=True,
                          timeout=900, **user)


def test_the_entry_keeps_to_the_schema_of_the_benchmark():
    """Its keys and patterns, as of config/schema.json in github.com/esl-epfl/szcore."""
    entry = yaml.safe_load((ROOT / "deploy" / "szcore" / "holdfast.yaml").read_text())
    required = {"title", "short_title", "image", "authors", "license"}
    optional = {"abstract", "datasets", "date_released", "repository", "version"}
    assert required <= set(entry) <= required | optional
    assert len(entry["short_title"]) <= 20 and re.fullmatch(r".+/.+:.+", entry["image"])
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", entry["date_released"])
    assert re.match(r"(https|http|ftp|sftp)://.+", entry["repository"])
    for author in entry["authors"]:
        assert set(author) <= {"given_names", "family_names", "affiliation", "email"}
    texts = [entry["title"], entry["abstract"], entry["license"], *entry["datasets"]]
    assert all(isinstance(text, str) and text for text in texts)


HUNGRY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import evaluate
healthy = evaluate.predict

def hungry(*arguments):                 # from the first recording on, the memory that it has and 100 MB
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100 * 2**20, resource.RLIM_INFINITY))
    return healthy(*arguments)

evaluate.predict = hungry
sys.exit(evaluate.main(sys.argv[2:]))
"""


def test_out_of_memory_is_one_line_that_names_the_batch_size_and_exit_1(corpus, tmp_path):
    done = forked.run([sys.executable, "-c", HUNGRY, ROOT, "--checkpoint", corpus / "best.pt", "--data", corpus / "imported",
                       "--out", tmp_path / "out", "--set", "evaluation.batch_size=64", "--set", "evaluation.window_seconds=120",
                       "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "evaluate.py: stopped: out of memory: --set evaluation.batch_size=1 takes least" in done.stderr


@pytest.fixture
def open_folder():
    """A folder that other users can enter: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.slow
def test_the_container_writes_the_events_of_two_seconds_at_the_exact_path(corpus, open_folder):
    write_edf(open_folder / "unipolar.edf", seconds=2, labels=[f"{n}-Avg" for n in NAMES])
    done = container(corpus, open_folder / "unipolar.edf", open_folder / "predictions.tsv")
    assert done.returncode == 0, done.stderr
    rows = read_tsv(open_folder / "predictions.tsv")
    assert {row["recordingDuration"] for row in rows} == {"2.00"}
    assert {p.name for p in open_folder.iterdir()} == {"unipolar.edf", "predictions.tsv", "app"}


@pytest.mark.slow
def test_the_container_writes_background_for_an_edf_that_is_refused_and_says_so(corpus, open_folder):
    path = write_edf(open_folder / "a.edf", seconds=7, labels=["Fp1", "Fp2"])
    done = container(corpus, path, open_folder / "found.tsv")
    assert done.returncode == 0 and "background" in done.stderr and "a.edf" in done.stderr
    assert [list(row.values()) for row in read_tsv(open_folder / "found.tsv")] == [
        ["0.00", "7.00", "bckg", "n/a", "n/a", "1985-01-01 00:00:00", "7.00"]]
    path.write_bytes(b"no EDF at all")
    code, lines = here("--checkpoint", corpus / "best.pt", "--data", path, "--events", open_folder / "b.tsv")
    assert code == 0 and "background" in lines[-1]
    assert read_tsv(open_folder / "b.tsv")[0]["eventType"] == "bckg"


def test_an_edf_that_cannot_be_read_this_time_is_a_fault_and_no_background(corpus, tmp_path):
    (tmp_path / "a.edf").symlink_to("/proc/self/mem")           # the kernel answers with EIO
    for option in ("--events", "--out"):
        code, lines = here("--checkpoint", corpus / "best.pt", "--data", tmp_path / "a.edf", option, tmp_path / "b" / "b.tsv")
        assert code == 1 and "a.edf: Input/output error" in lines[-1] and not (tmp_path / "b" / "b.tsv").exists()
    # among others: these have their scores, and a script that runs every night is told
    (tmp_path / "good.edf").symlink_to(next((corpus / "edf").rglob("*.edf")))
    code, _ = here("--checkpoint", corpus / "best.pt", "--data", tmp_path, "--out", tmp_path / "c")
    scores = json.loads((tmp_path / "c" / "scores.json").read_text())
    assert code == 1 and [r["recording"] for r in scores["per_recording"]] == ["good"]
    assert len(scores["refused"]) == 1 and "a.edf: Input/output error" in scores["refused"][0][0] + ": " + scores["refused"][0][1]


@pytest.mark.slow
def test_the_container_writes_the_events_of_an_hour(corpus, open_folder):
    write_edf(open_folder / "hour.edf", seconds=3600)
    done = container(corpus, open_folder / "hour.edf", open_folder / "found.tsv")
    assert done.returncode == 0, done.stderr
    assert {row["recordingDuration"] for row in read_tsv(open_folder / "found.tsv")} == {"3600.00"}


def test_events_go_to_one_file_and_nothing_else(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = next((corpus / "edf").rglob("*.edf"))
    assert here("--checkpoint", corpus / "best.pt", "--data", source,
                "--events", tmp_path / "deep" / "x.tsv")[0] == 0
    assert read_tsv(tmp_path / "deep" / "x.tsv")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x.tsv"]
    code, lines = here("--checkpoint", corpus / "best.pt", "--data", corpus / "imported",
                       "--events", tmp_path / "y.tsv")
    assert code == 2 and "one EDF" in lines[0] and not (tmp_path / "y.tsv").exists()
    shutil.copy(corpus / "best.pt", "weights.pt")
    for kept, why in ((source, "over the EDF itself"), (corpora.identify(source, corpus).annotation, "be read as its labels"),
                      (Path("weights.pt"), "holds something else"), (source.parent, "Is a directory")):
        before = kept.is_file() and kept.read_bytes()
        code, lines = here("--checkpoint", corpus / "best.pt", "--data", source, "--events", kept)
        assert code == 2 and why in lines[0] and before == (kept.is_file() and kept.read_bytes())
    assert here("--checkpoint", corpus / "best.pt", "--data", source, "--events", "z.tsv", "--out", "out", "--plot")[0] == 0
    beside, = tmp_path.glob("out/**/*_events.tsv")
    assert beside.read_text() == (tmp_path / "z.tsv").read_text() == (tmp_path / "deep" / "x.tsv").read_text()
    assert list(tmp_path.glob("out/**/*.png")) and (tmp_path / "out" / "scores.json").exists()
