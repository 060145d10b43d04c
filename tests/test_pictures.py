"""pictures.py: recordings with their events, and the curves of a run."""
import json

import numpy as np
import pytest

import edf
import evaluate
import pictures
from conftest import Track, probability_of
from edf import FS


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


@pytest.mark.parametrize("montage", ["referential", "bipolar"])
@pytest.mark.parametrize("truth, detections", [((), []), ([(30, 50)], [(35, 55)]),
                                               ([(5, 9), (200, 290)], [(100, 120), (295, 300)])])
def test_a_picture_is_drawn_for_any_mix_of_events(tmp_path, montage, truth, detections):
    track = Track("sub/a", 300, truth, labelled=bool(truth), channels=len(edf.CHANNELS[montage]))
    track.montage, track.channels = montage, edf.CHANNELS[montage]
    p = probability_of(track, detections)
    pictures.draw(track, p, evaluate.postprocess(p, 0.5, {}), 0.5, tmp_path / "sub" / "a.png")
    width, height = png_size(tmp_path / "sub" / "a.png")
    assert width == 1500 and height > 800


def test_both_montages_draw_the_same_double_banana():
    track = Track("a", 20, channels=19)
    track.montage, track.channels = "referential", edf.CHANNELS["referential"]
    eeg, names = pictures._derivations(track, 3.0, 5.0)
    row = dict(zip(track.channels, track.eeg[:, 3 * FS:5 * FS] * 0.5))
    assert eeg.shape == (18, 2 * FS) and sorted(names) == sorted(edf.CHANNELS["bipolar"])
    for name, trace in zip(names, eeg):
        a, b = name.split("-")
        np.testing.assert_allclose(trace, row[a] - row[b], atol=1e-4)


def test_curves_are_drawn_from_what_is_there(tmp_path):
    rows = [{"kind": "train", "epoch": 1, "step": s, "loss": 1 / s, "lr": 1e-3} for s in range(1, 9)]
    rows += [{"kind": "validation", "epoch": e, "step": 4 * e, "loss": 0.5, "event_f1": f, "auroc": 0.6,
              "best": bool(f)} for e, f in ((1, None), (2, 0.5))]
    for text in ("", "".join(json.dumps(r) + "\n" for r in rows)):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert pictures.curves(tmp_path) == tmp_path / "curves.png"
        assert png_size(tmp_path / "curves.png") == (1210, 880)
    plain = (tmp_path / "curves.png").read_bytes()
    saves = [{"kind": kind, "file": "last.pt", "epoch": 1, "batch": 0, "step": step}
             for kind, step in (("save", 4), ("resume", 6))]
    (tmp_path / "saves.jsonl").write_text("".join(json.dumps(r) + "\n" for r in saves))
    (tmp_path / "config.yaml").write_text("training:\n  best_metric: auroc\n")
    pictures.curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() != plain
