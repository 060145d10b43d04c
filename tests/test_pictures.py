"""scoring/pictures.py: recordings with their events as a clinician reads them, and the curves of a run."""
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from eeg import edf
import evaluate
from scoring import metrics
from scoring import pictures
from conftest import Track, probability_of
from eeg.edf import FS


def banana(name, seconds, events=(), montage="referential", **given):
    track = Track(name, seconds, events, channels=len(edf.CHANNELS[montage]), **given)
    track.montage = montage
    track.channels = edf.CHANNELS[montage]
    return track


def sheet_of(track, detections, most=4):
    """The figure that draw() would save."""
    p = probability_of(track, detections)
    truth = track.events
    found = evaluate.postprocess(p, 0.5, {}) / FS
    places = pictures._places(track, p, truth, found)
    pages = [page for place in places[:most] for page in pictures._pages(place, track.seconds, found)]
    scale = pictures._sensitivity([pictures._displayed(track, b, min(b + 10, track.seconds))[0] for _, b in pages])
    sheet = pictures.Sheet(track, p, truth, found, 0.5, len(pages), scale)
    sheet.overview(pictures._title(track, places, most), pages)
    for caption, begin in pages:
        sheet.page(caption, begin)
    return sheet


def captions(sheet):
    return [axis.get_title(loc="left") for axis in sheet.figure.axes if axis.get_title(loc="left")]


@pytest.mark.parametrize("montage", ["referential", pytest.param("bipolar", marks=pytest.mark.slow)])
@pytest.mark.parametrize("truth, detections", [
    ((), []), ([(30, 50)], [(35, 55)]), ([(5, 9), (200, 290)], [(100, 120), (295, 300)])])
def test_a_picture_is_drawn_for_any_mix_of_events(tmp_path, montage, truth, detections):
    track = banana("sub/a", 300, truth, montage, labelled=bool(truth))
    p = probability_of(track, detections)
    events = evaluate.postprocess(p, 0.5, {})
    pictures.draw(track, p, events, 0.5, tmp_path / "sub" / "a.png", most=1)
    with Image.open(tmp_path / "sub" / "a.png") as picture:
        assert picture.size[0] == 1500 and picture.size[1] > 800


def test_both_montages_draw_the_same_double_banana():
    track = banana("a", 20)
    eeg, names = pictures._derivations(track, 3.0, 5.0)
    row = dict(zip(track.channels, track.eeg[:, 3 * FS:5 * FS] * 0.5))
    assert eeg.shape == (18, 2 * FS) and sorted(names) == sorted(edf.CHANNELS["bipolar"])
    for name, trace in zip(names, eeg):
        a, b = name.split("-")
        np.testing.assert_allclose(trace, row[a] - row[b], atol=1e-4)


def test_a_montage_of_a_few_channels_is_drawn_as_it_is(tmp_path):
    track = Track("a", 30, [(9, 20)], channels=2)
    track.montage = "reduced"
    track.channels = ("F7-T3", "T4-F8")
    assert pictures._derivations(track, 0, 1)[1] == ["F7-T3", "T4-F8"], "all that the model sees"
    track.channels = ("Cz", "Fz")
    assert pictures._derivations(track, 0, 1)[1] == ["Fz-Cz"]
    track.channels = ("BTE left", "BTE right")
    assert pictures._derivations(track, 0, 1)[1] == ["BTE left", "BTE right"]
    p = probability_of(track, [])
    pictures.draw(track, p, np.zeros((0, 2), np.int64), 0.5, tmp_path / "a.png")


def test_missed_seizures_come_first_then_false_alarms_then_those_found():
    track = banana("a", 400, [(30, 36), (350, 356)])
    shown = captions(sheet_of(track, [(31, 40), (200, 206)]))
    kinds = [line.split("   ")[1].split(",")[0] for line in shown[1:]]
    assert list(dict.fromkeys(kinds)) == ["missed seizure", "false alarm", "found seizure"]
    assert "1 found, 1 missed,  1 false alarm" in shown[0]


def test_a_missed_seizure_is_drawn_however_many_false_alarms_come_before_it():
    track = banana("a", 900, [(800, 806)])
    alarms = [(100 * i, 100 * i + 5) for i in range(1, 7)]
    shown = captions(sheet_of(track, alarms, most=1))
    assert "missed seizure" in shown[1] and "1 of 7 places shown" in shown[0]


def test_a_long_event_is_drawn_with_its_beginning_and_its_end():
    pages = pictures._pages(("found seizure", 100.0, 200.0), 600.0)
    assert len(pages) == 3
    assert pages[0][1] <= 100 and pages[1][1] == pages[0][1] + 10
    assert pages[2][1] < 200 < pages[2][1] + 10 and "page 11 of 11" in pages[2][0]


@pytest.mark.parametrize("begin, end, seconds", [
    (0, 600, 600), (0, 3, 600), (597, 600, 600), (20, 33, 600), (0, 0.004, 0.004), (0, 9, 9.5),
    (50, 50, 51)])
def test_the_pages_of_an_event_cover_its_edges_and_lie_in_the_recording(begin, end, seconds):
    pages = pictures._pages(("event", begin, end), seconds)
    starts = [start for _, start in pages]
    assert starts == sorted(set(starts)) and len(starts) <= 3 and starts[0] <= begin
    assert starts[-1] + 10 >= end - 1e-9
    assert all(0 <= start and (start + 10 <= seconds or start == 0) for start in starts)


def test_a_page_has_the_proportions_of_paper_and_says_how_it_is_drawn():
    sheet = sheet_of(banana("a", 60, [(20, 30)]), [])
    width, height = sheet.figure.get_size_inches()
    eeg = sheet.figure.axes[1]
    box = eeg.get_position()
    begin, end = eeg.get_xlim()
    assert box.width * width * 25.4 / (end - begin) == pytest.approx(30)        # mm per second
    low, high = eeg.get_ylim()
    assert box.height * height * 25.4 / (high - low) == pytest.approx(1, rel=0.1)
    text = " ".join(t.get_text() for t in eeg.texts)
    assert "negative up" in text and "1 to 70 Hz" in text and "30 mm/s" in text and "mm\n" in text


def test_a_negative_wave_is_drawn_upwards_and_a_cut_one_is_marked():
    track = banana("a", 60, [(20, 30)])
    track.eeg = np.zeros_like(track.eeg)
    wave = -2000 * np.exp(-(np.arange(track.samples) / FS - 24) ** 2 / 0.02)
    track.eeg[track.channels.index("Fp1")] = wave
    track.eeg += np.random.default_rng(0).integers(-9, 9, track.eeg.shape, np.int16)
    eeg = sheet_of(track, []).figure.axes[1]
    dark, red = [[line for line in eeg.lines if line.get_color() == colour]
                 for colour in (pictures.INK, pictures.STOP)]
    peak = np.argmin(np.abs(dark[0].get_xdata() - 24))      # of Fp1-F7 and Fp1-F3, the only traces
    assert dark[0].get_ydata()[peak] == pytest.approx(20)
    assert len(red) == 2 and red[0].get_ydata()[peak] == pytest.approx(20)


def test_the_filter_is_for_the_eye_alone_and_leaves_no_transient_at_the_edge():
    track = banana("a", 60)
    track.eeg[:] = 0
    seconds = np.arange(track.samples) / FS
    track.eeg[track.channels.index("Fp1")] = 8000 + 300 * np.sin(2 * np.pi * 10 * seconds)
    page, names = pictures._displayed(track, 20.0, 30.0)
    raw, _ = pictures._derivations(track, 20.0, 30.0)
    assert page.shape == raw.shape == (18, 10 * FS)
    assert raw[0].mean() == pytest.approx(4000, rel=0.01)
    assert abs(page[0].mean()) < 1 and np.abs(page[0]).max() == pytest.approx(150, rel=0.03)


def test_an_unlabelled_recording_has_no_labelled_seizure_in_its_legend():
    for labelled in (True, False):
        sheet = sheet_of(banana("a", 60, labelled=labelled), [(20, 30)])
        legend = [text.get_text() for text in sheet.figure.axes[0].get_legend().get_texts()]
        assert ("labelled seizure" in legend) == labelled
        assert ("unlabelled" in captions(sheet)[0]) != labelled
        assert ("false alarm" in captions(sheet)[1]) == labelled


def test_pages_carry_the_time_of_day_where_the_recording_says_when_it_began():
    track = banana("a", 60, [(20, 30)])
    track.began = "2021-03-04 23:59:50"
    assert captions(sheet_of(track, []))[1].startswith("00:00:06")
    track.began = ""
    assert captions(sheet_of(track, []))[1].startswith("0:00:16")


@pytest.mark.parametrize("samples", [1, 30, *(pytest.param(samples, marks=pytest.mark.slow) for samples in (2, 700))])
def test_recordings_of_a_few_samples_and_tracks_of_nan_are_drawn(tmp_path, samples):
    track = banana("a", samples / FS)
    p = np.full(samples, np.nan if samples == 30 else 0.5, np.float32)
    pictures.draw(track, p, np.zeros((0, 2), np.int64), 0.5, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert captions(sheet_of(track, []))[1].endswith("highest probability, page 1 of 1"), "a moment has no length"


def test_the_trade_off_is_drawn_with_and_without_intervals(tmp_path):
    rows = [{"threshold": threshold, "false_alarms_per_24h": [alarms, alarms / 2, alarms * 2],
             "event_f1": [0.5, None, None], "event_sensitivity": [0.5, 0.4, 0.6]}
            for threshold, alarms in ((0.2, 40.0), (0.8, 0.0))]
    rows.append({"threshold": 0.9, "false_alarms_per_24h": [0.0, 0.0, 0.0],
                 "event_f1": [None, None, None], "event_sensitivity": [0.0, 0.0, 0.0]})
    pictures.trade_off(rows, 0.8, tmp_path / "trade_off.png")
    assert all(has_colour(tmp_path / "trade_off.png", colour) for colour in (pictures.TRUE, pictures.FOUND, pictures.INK))
    pictures.trade_off(rows, 0.8, tmp_path / "trade_off.pdf")
    assert (tmp_path / "trade_off.pdf").read_bytes().startswith(b"%PDF")


def test_the_page_of_the_first_detection_is_drawn_and_pages_left_out_are_said():
    found = np.array([[155.0, 160.0], [180.0, 185.0]])
    pages = pictures._pages(("found seizure", 100.0, 200.0), 600.0, found)
    assert len(pages) == 3 and pages[1][1] <= 155 < pages[1][1] + 10
    assert "page 6 of 11 (before it 4 left out)" in pages[1][0] and "(before it 4 left out)" in pages[2][0]
    assert "left out" not in pages[0][0]


def test_all_pages_of_a_recording_have_one_gain_and_the_overview_names_its_bars():
    track = banana("a", 400, [(30, 36), (350, 356)])
    track.eeg[:, :200 * FS] //= 20                          # a quiet half, a loud half
    sheet = sheet_of(track, [(31, 40), (200, 206)])
    gains = {text.get_text().split("\n")[0] for axis in sheet.figure.axes for text in axis.texts}
    assert len(gains) == 1 and "V/mm" in gains.pop()
    legend = [text.get_text() for text in sheet.figure.axes[0].get_legend().get_texts()]
    assert legend.count("shown below") == 1


@pytest.mark.filterwarnings("error")
def test_a_name_is_drawn_as_it_is_or_escaped(tmp_path):
    for name, shown in (("a$\\frac{$b", "a$\\frac{$b"), ("\u60a3_\u00fc", "\\u60a3_\u00fc")):
        track = banana(name, 30, labelled=False)
        assert pictures._title(track, [], 4).startswith(f"{shown}    ")
        pictures.draw(track, probability_of(track, []), [], 0.5, tmp_path / "a.png")


def test_what_the_scores_count_as_found_is_found_in_the_picture():
    track = banana("a", 900, [(300, 330)])
    for detection, found in (((272, 280), True), ((380, 385), True), ((255, 269), False), ((391, 399), False)):
        detection = np.array([detection], float)
        counts = metrics.count(track.events, detection, track.seconds)
        kinds = [kind for kind, _, _ in pictures._places(track, probability_of(track, []), track.events, detection)]
        assert counts["event_tp"] == found and counts["event_fp"] == (not found)
        assert kinds == (["found seizure"] if found else ["missed seizure", "false alarm"])


@pytest.mark.slow
def test_a_title_ends_within_its_picture():
    track = banana("sub-001/ses-01/eeg/sub-001_ses-01_task-szMonitoring_acq-longterm_run-00", 36000,
                   [(1000 * i, 1000 * i + 320) for i in range(1, 31)])
    figure = sheet_of(track, [(700 * i, 700 * i + 20) for i in range(1, 51)], most=1).figure
    FigureCanvasAgg(figure).draw()
    title = next(text for text in figure.axes[0].findobj(Text) if "places shown" in text.get_text())
    assert title.get_window_extent().x1 < figure.bbox.x1


@pytest.mark.filterwarnings("error")
def test_names_of_traces_end_within_the_picture_and_keep_both_their_ends():
    track = Track("a", 20, channels=3)
    track.montage, track.channels = "reduced", ("BTEleft SD-CROSStop SD", "EKG FT10-REF", "\u60a3\u60a3\u60a3")
    figure = sheet_of(track, []).figure
    FigureCanvasAgg(figure).draw()
    names = figure.axes[1].get_yticklabels()
    assert [name.get_text() for name in names][:2] == ["BTEle..op SD", "EKG FT10-REF"]
    assert min(name.get_window_extent().x0 for name in names) > 0


@pytest.mark.parametrize("seconds", [0.5, 3, 20, 70, 600, 5000, 86400, 10**6])
@pytest.mark.parametrize("began", ["", "2021-03-04T17:58:50"])
def test_the_clock_of_an_overview_says_no_time_twice_and_whole_ones(seconds, began):
    track = Track("a", 20, channels=2)
    track.seconds, track.began, track.channels = seconds, began, ("a", "b")
    sheet = pictures.Sheet(track, np.zeros(round(seconds) + 1), track.events, track.events, 0.999, 1, 1)
    sheet.overview("", [])
    axis = sheet.figure.axes[0]
    ticks = [tick for tick in axis.get_xticks() if 0 <= tick <= seconds]
    said = [f"{tick // 86400:.0f} {sheet.clock(tick)}" for tick in ticks]
    assert len(set(said)) == len(said) <= 11 and (len(said) > 1 or seconds < 1)
    assert seconds < 600 or seconds > 86400 or all(text.endswith(":00") for text in said)
    assert "threshold 0.999" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_curves_show_one_point_and_what_cannot_be_computed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figures, path: drawn.extend(figures))
    rows = [{"kind": "train", "step": 1, "loss": 1.0, "lr": 1e-3},
            {"kind": "validation", "step": 1, "loss": 0.5, "event_f1": None, "best": False}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures.curves(tmp_path)
    loss, *_, best = drawn[0].axes
    assert loss.lines[0].get_marker() == "o" and "no validation" in best.texts[0].get_text()
    FigureCanvasAgg(drawn[0]).draw()
    assert best.get_legend().get_window_extent().x0 >= best.bbox.x1, "beside the points, not over them"


def test_a_picture_counts_events_as_the_scores_do():
    rng = np.random.default_rng(0)
    names = ("missed seizure", "found seizure", "false alarm")
    for _ in range(60):
        # merged below 90 s, cut at 5 minutes, and within the tolerance of more than one seizure
        truth, found = (np.sort(rng.uniform(0, 1500, 2 * n)).round(1).reshape(-1, 2) for n in rng.integers(0, 7, 2))
        track = Track("a", 1500, truth)
        kinds = [kind for kind, _, _ in pictures._places(track, probability_of(track, []), truth, found)]
        n = metrics.count(truth, found, 1500.0)
        counted = (n["event_true"] - n["event_tp"], n["event_tp"], n["event_fp"])
        assert tuple(kinds.count(name) for name in names) == counted


def test_a_place_is_the_seizure_with_the_detections_in_it_or_else_with_those_beside_it():
    track = banana("a", 900, [(300, 330)])
    for detections, place in (([(275, 280), (310, 340), (350, 360)], (300, 340)), ([(275, 280)], (275, 330))):
        found = np.array(detections, float)
        assert pictures._places(track, probability_of(track, []), track.events, found) == [("found seizure", *place)]


@pytest.mark.slow
def test_hundreds_of_events_are_drawn_where_they_are_seen_and_in_few_pieces():
    track = banana("a", 3600, [(i * 50 + 10, i * 50 + 20) for i in range(70)])
    sheet = sheet_of(track, [(i * 25 + 1, i * 25 + 9) for i in range(140)])
    overview, *pages = sheet.figure.axes
    assert len(overview.patches) == 70 and len(overview.lines) + len(overview.collections) < 30
    assert len(pages) > 4 and all(len(axis.patches) <= 1 for axis in pages)
    assert [len(c.get_paths()) for c in overview.collections].count(280) == 1         # both edges of each detection


@pytest.mark.slow
def test_a_pdf_has_a_page_for_each_page_of_eeg(tmp_path):
    track = banana("a", 300, [(30, 50), (200, 206)])
    p = probability_of(track, [(35, 55)])
    pictures.draw(track, p, evaluate.postprocess(p, 0.5, {}), 0.5, tmp_path / "a.pdf")
    text = (tmp_path / "a.pdf").read_bytes()
    places = pictures._places(track, p, track.events, np.array([[35.0, 55.0]]))
    pages = [page for place in places for page in pictures._pages(place, 300.0, np.array([[35.0, 55.0]]))]
    assert text.count(b"/Type /Page\n") + text.count(b"/Type /Page ") == len(pages) > 2


# ---- curves ----

def test_curves_are_drawn_from_what_is_there(tmp_path):
    rows = [{"kind": "train", "epoch": 1, "step": s, "loss": 1 / s, "lr": 1e-3}
            for s in range(1, 9)]
    rows += [{"kind": "validation", "epoch": e, "step": 4 * e, "loss": 0.5, "event_f1": f,
              "auroc": 0.6, "best": bool(f)} for e, f in ((1, None), (2, 0.5))]
    for text in ("", "".join(json.dumps(r) + "\n" for r in rows)):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert pictures.curves(tmp_path) == tmp_path / "curves.png"
        assert Image.open(tmp_path / "curves.png").size == (1210, 880)
    saves = [{"kind": kind, "file": "last.pt", "epoch": 1, "batch": 0, "step": step}
             for kind, step in (("save", 4), ("resume", 6))]
    assert not has_colour(tmp_path / "curves.png", pictures.STOP)
    (tmp_path / "saves.jsonl").write_text("".join(json.dumps(r) + "\n" for r in saves))
    (tmp_path / "config.yaml").write_text("training:\n  best_metric: auroc\n")
    pictures.curves(tmp_path)
    assert has_colour(tmp_path / "curves.png", pictures.STOP)


def has_colour(path, colour):
    """Whether a line of this colour is in the picture."""
    pixels = np.asarray(Image.open(path).convert("RGB"), int)
    wanted = np.rint(255 * np.array(to_rgb(colour)))
    return bool((np.abs(pixels - wanted).max(-1) < 30).any())


def test_a_torn_row_of_a_record_is_left_out_of_the_curves_which_does_not_call_it_dropped(tmp_path, capsys):
    whole = '{"kind": "train", "step": 1, "loss": 1.0, "lr": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"kin')
    assert pictures.curves(tmp_path).is_file() and not capsys.readouterr().out


def test_a_run_whose_folder_is_gone_gets_no_new_one_from_a_picture(tmp_path):
    with pytest.raises(FileNotFoundError):
        pictures.curves(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
