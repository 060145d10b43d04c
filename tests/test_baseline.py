"""eeg/baseline.py: EEG relative to the recording's own baseline, the same in training and evaluation."""
import types

import numpy as np
import pytest
import torch
from scipy import signal as dsp

import checkpoint
import data
import evaluate
import model
from eeg import augmentation, baseline, splits
from helpers import last, loaded
import train

FS = 256


def noise(seconds, seed=0, channels=3):
    """EEG-like noise, uV: power falls with f^-1.4."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal((channels, seconds * FS)))
    hz = np.fft.rfftfreq(seconds * FS, 1 / FS)
    return (np.fft.irfft(spectrum * np.maximum(hz, 1) ** -0.7) * 60).astype(np.float32)


def gain_of(x):
    own = baseline.log_baseline(lambda start, n: x[:, start:start + n], x.shape[1])
    return baseline.log_gain(own, x.shape[1] / FS)


def equalised(x, gain):
    return baseline.equalise(torch.from_numpy(x)[None], torch.from_numpy(gain))[0].numpy()


def test_the_same_eeg_through_other_amplifiers_and_electrodes_looks_the_same():
    x = noise(1800)
    # each electrode with a gain of its own, behind a filter that halves what is above 10 Hz
    other = np.array([[0.4], [1.0], [3.0]]) * (x + dsp.lfilter(*dsp.butter(1, 10, fs=FS), x)) / 2
    other = other.astype(np.float32)
    piece = slice(600 * FS, 630 * FS)
    mine, theirs = (equalised(eeg[:, piece], gain_of(eeg)) for eeg in (x, other))
    for a, b, before, after in zip(mine, theirs, x, other):
        plain = np.abs(np.log(after[piece].std() / before[piece].std()))
        f, power = dsp.welch(np.stack([a, b]), FS, nperseg=512)
        # most of a factor of 15 in amplitude, and of the filter, is gone
        assert np.abs(np.log(power[1] / power[0])[(f > 1) & (f < 60)]).mean() / 2 < 0.15, plain


def test_a_seizure_is_no_part_of_the_baseline_that_it_stands_out_from():
    x = noise(600)
    ictal = x.copy()
    ictal[:, 100 * FS:250 * FS] *= 5
    assert np.abs(gain_of(ictal) - gain_of(x)).max() < 0.35
    inside = equalised(ictal[:, 150 * FS:180 * FS], gain_of(ictal))
    assert inside.std() > 3 * equalised(x[:, 150 * FS:180 * FS], gain_of(x)).std()


def test_where_most_of_a_recording_is_flat_the_rest_is_its_baseline():
    x = noise(1800)
    paused = x.copy()
    paused[0, 300 * FS:] = 0            # an electrode that fell off
    assert np.abs(gain_of(paused) - gain_of(x)).max() < 0.3
    paused[:, 300 * FS:] = 0            # and the amplifier's plug
    assert np.abs(gain_of(paused) - gain_of(x)).max() < 0.3
    paused[1] = 0
    assert (gain_of(paused)[1] == baseline.MOST).all()


def test_a_clip_of_ten_seconds_keeps_its_own_size_and_a_shorter_one_all_of_it():
    loud = 5 * noise(10)
    assert np.abs(gain_of(loud)).max() < 0.25 < np.abs(gain_of(5 * noise(1200))).max()
    recording = types.SimpleNamespace(channels=("a", "b"), samples=3 * FS, gain=None)
    assert not data.Recording.log_gain.fget(recording).any()


def test_a_channel_without_contact_and_a_window_of_one_sample_are_finite():
    x = noise(60)
    x[1] = 0
    gain = gain_of(x)
    assert np.isfinite(gain).all() and np.abs(gain).max() <= baseline.MOST
    for samples in (1, 7, 300):
        out = equalised(x[:, :samples], gain)
        assert out.shape == (3, samples) and np.isfinite(out).all() and not out[1].any()


class Watching(torch.nn.Module):
    """A detector that keeps what it was given."""
    def __init__(self, share):
        super().__init__()
        self.baseline, self.seen = share, []

    def forward(self, x):
        self.seen.append(x)
        return x.mean(1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_evaluation_gives_a_detector_the_very_windows_of_its_training(small_corpus, share):
    recording = next(r for r in data.open_corpus(small_corpus) if r.seconds > 120)
    windows = data.Windows([recording], 10.0, 10.0)
    x, _, _ = next(data.Loader(windows, baseline=share).batches([[0, 1, 2]], 1))
    net = Watching(share)
    c = {"window_seconds": 10.0, "overlap_seconds": 0.0, "batch_size": 3}
    evaluate.predict(net, recording, torch.device("cpu"), c)
    assert torch.allclose(net.seen[0], x, atol=1e-6)


@pytest.mark.parametrize("augment", [False, ["gain"]])
def test_the_padding_of_a_clip_is_zero_in_training_and_evaluation_though_the_filter_rings_on(small_corpus, augment, monkeypatch):
    monkeypatch.setattr(augmentation, "AUGMENTATIONS", {"gain": augmentation.AUGMENTATIONS["gain"]._replace(draw=lambda *_: [1.0])})
    clip = splits.cut_out(next(r for r in data.open_corpus(small_corpus) if r.seconds > 120), 0, 20 * FS)
    loader = data.Loader(data.Windows([clip], 30.0), augment=augment, baseline=1.0)
    x, _, mask = next(loader.batches([[0]], 1))
    net = Watching(1.0)
    evaluate.predict(net, clip, torch.device("cpu"), {"window_seconds": 30.0})
    assert torch.equal(net.seen[0], x)
    assert not x[..., 20 * FS:].any() and x[..., :20 * FS].any() and mask.sum() == 20 * FS


# ---- models that are older than the settings ----

def test_a_model_saved_before_the_baseline_is_built_as_it_was():
    new = model.settings({"size": "small"})
    assert new["baseline"] == 1
    before = {name: value for name, value in new.items() if name not in model.OLDER}
    old = model.build(4, before)
    assert old.baseline == 0
    assert model.build(4, model.SMALL).baseline == 1, "a few settings are no saved model"


@pytest.mark.slow
def test_a_run_that_is_older_than_the_baseline_resumes_as_it_was_and_says_so(small_corpus, tmp_path, capfd):
    config = loaded(small_corpus, tmp_path, training__epochs=1)
    config["model"] |= dict.fromkeys(model.OLDER, 0.0)
    assert train.run(config) == 0
    # as an earlier version wrote it
    for path in (tmp_path / "t/checkpoints").glob("*.pt"):
        state = checkpoint.load(path)
        for name in model.OLDER:
            del state["config"]["model"][name]
        checkpoint.atomic_save(state, path)
    config = loaded(small_corpus, tmp_path, training__epochs=2)
    assert config["model"]["baseline"] == 1
    assert train.run(config, resume="true") == 0
    assert "this run is older than model.baseline and goes on without it" in capfd.readouterr().out
    assert last(tmp_path)["epoch"] == 2 and last(tmp_path)["config"]["model"]["baseline"] == 0
