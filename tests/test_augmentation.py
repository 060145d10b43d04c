"""Augmentation in data.py: each kind changes what it should, the same for every reader, process and resume."""
import numpy as np
import pytest
import torch

from eeg import augmentation
from run import config
import data
from eeg import edf
import evaluate
import train
from eeg.augmentation import AUGMENTATIONS, Augmenter
from eeg.disk import Refused
from conftest import NAMES, imported, write_edf
from helpers import assert_same_run, loaded, rest, spawn, wait_for
from scipy import signal
from test_data import fake, plan, sha

LENGTH = 20 * edf.FS
EVERY = tuple(AUGMENTATIONS)


def noise(windows=24, channels=19, length=LENGTH):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(windows, channels, length)).astype("f4"))


def changed(name, x, montage="referential", channels=NAMES):
    """(x, draws) after one kind; labels and mask must be as before."""
    kinds = Augmenter([name], channels, montage)
    drawn = [kinds.draw(1, 1, window) for window in range(len(x))]
    draws = {kind: torch.from_numpy(np.stack([d[kind] for d in drawn])) for kind in kinds.widths}
    y = (torch.arange(x.shape[-1]) > 999).float().expand(len(x), -1)
    mask = torch.ones_like(y)
    after, label, real = kinds.apply(x.clone(), y, mask, draws, x.shape[-1])
    assert torch.equal(label, y) and torch.equal(real, mask)
    return after, draws[name]


def test_gain_is_one_factor_for_a_whole_window():
    x = noise()
    after, draws = changed("gain", x)
    torch.testing.assert_close(after / x, draws[:, :, None].expand_as(x))
    assert 0.1 < draws.log().std() < 0.3


def test_mirror_and_polarity_act_on_about_half_of_the_windows():
    x = noise()
    flip = augmentation.mirror(NAMES)
    sides, _ = changed("mirror", x)
    swapped = [torch.equal(a, b[flip]) for a, b in zip(sides, x)]
    kept = [torch.equal(a, b) for a, b in zip(sides, x)]
    assert 6 < sum(swapped) < 18 and all(a != b for a, b in zip(swapped, kept))
    signs, _ = changed("polarity", x)
    turned = [torch.equal(a, -b) for a, b in zip(signs, x)]
    kept = [torch.equal(a, b) for a, b in zip(signs, x)]
    assert 6 < sum(turned) < 18 and all(a != b for a, b in zip(turned, kept))
    assert turned != swapped


def test_a_change_of_reference_leaves_every_bipolar_derivation_as_it_was():
    x = noise()
    after, draws = changed("reference", x)
    torch.testing.assert_close(after[:, 1:] - after[:, :-1], x[:, 1:] - x[:, :-1], rtol=0, atol=1e-5)
    shares = draws[:, 0]
    for i, electrode in enumerate(draws[:, 1].int().tolist()):
        reference = x[i].mean(0) if electrode < 0 else x[i, electrode]
        torch.testing.assert_close(after[i], x[i] - shares[i] * reference)
    assert 6 < (draws[:, 1] < 0).sum() < 18
    assert not Augmenter(["reference"], edf.BIPOLAR, "bipolar").kinds


def test_mains_adds_50_or_60_hz_and_its_harmonic_and_nothing_else():
    x = noise()
    after, draws = changed("mains", x)
    spectrum = torch.fft.rfft((after - x).double()).abs() / (LENGTH / 2)
    hz = draws[:, 0].int().tolist()
    assert set(hz) == {50, 60}
    for i, mains in enumerate(hz):
        lines = [20 * mains, 40 * mains]                # windows of 20 s
        torch.testing.assert_close(spectrum[i, :, lines[0]].float(), draws[i, 3:], rtol=1e-3, atol=1e-4)
        spectrum[i, :, lines] = 0
    assert spectrum.max() < 1e-5 and 0.004 < draws[:, 3:].min() and draws[:, 3:].max() < 0.5


def test_band_is_the_filter_of_an_amplifier_alike_on_all_channels():
    """Against SciPy's of the same edges, in steady state; what got no filter is untouched."""
    x = noise(windows=80, channels=2, length=5 * edf.FS)
    after, draws = changed("band", x, channels=("Cz", "Pz"))
    orders = set()
    for i, (high, high_order, low, low_order) in enumerate(draws.tolist()):
        orders.add((high_order, low_order))
        right = x[i].double().numpy()
        right = np.concatenate([right[:, ::-1], right], 1)
        f = np.fft.rfftfreq(right.shape[1], 1 / edf.FS)[1:]
        response = np.ones(len(f), complex)
        if high_order:
            response *= signal.freqs(*signal.butter(high_order, high, "high", analog=True), worN=f)[1]
        if low_order:
            response *= signal.freqs(*signal.butter(low_order, low, "low", analog=True), worN=f)[1]
        first = 0 if high_order else 1
        right = np.fft.irfft(np.fft.rfft(right) * np.r_[first, response], right.shape[1])[:, -x.shape[-1]:]
        np.testing.assert_allclose(after[i].numpy(), right, atol=2e-3)
        if not high_order and not low_order:
            assert torch.equal(after[i], x[i])
    assert len(orders) == 9 and (draws[:, 0] >= 0.0999).all() and (draws[:, 2] <= 100).all()


def test_dropped_channels_are_zero_as_a_missing_electrode_is_and_the_others_untouched():
    x = noise(windows=60)
    after, _ = changed("channels", x)
    gone = (after == 0).all(-1)
    assert torch.equal(after[~gone], x[~gone])
    assert set(gone.sum(1).tolist()) == {0, 1, 2, 3} and (gone.sum(0) > 0).all()
    few, _ = changed("channels", noise(60, 2), channels=("F7-T3", "F8-T4"), montage="reduced")
    assert (few != 0).all()                             # of two none can be spared


def test_stretch_moves_rhythm_labels_and_padding_together():
    kinds = Augmenter(["stretch"], NAMES, "referential")
    reach = kinds.reach(LENGTH)
    speeds = torch.tensor([[0.95], [1.0], [1.05]])
    t = torch.arange(reach) / edf.FS
    x = torch.sin(2 * torch.pi * 10 * t).expand(3, 19, -1).clone()
    onset, real = 5 * edf.FS, 18 * edf.FS
    y = (torch.arange(reach) >= onset).float().expand(3, -1)
    mask = (torch.arange(reach) < real).float().expand(3, -1)
    after, label, kept = kinds.apply(x * mask[:, None], y, mask, {"stretch": speeds}, LENGTH)
    assert after.shape == (3, 19, LENGTH) and label.shape == kept.shape == (3, LENGTH)
    # at a speed of 1 every sample is itself
    assert torch.equal(after[1], x[1, :, :LENGTH] * mask[1, :LENGTH])
    for i, speed in enumerate(speeds[:, 0].tolist()):
        assert abs(label[i].argmax() - onset / speed) <= 1
        assert abs(kept[i].sum() - min(LENGTH, real / speed)) <= 1
        inside = torch.arange(2, real / 1.05 - 2).long()
        right = torch.sin(2 * torch.pi * 10 * speed * t[inside])
        torch.testing.assert_close(after[i, 3, inside], right, rtol=0, atol=2e-3)
        assert (after[i] * (1 - kept[i]) == 0).all()
    assert set(label.unique().tolist()) == {0, 1}


def test_a_faster_window_is_filled_with_the_eeg_that_follows(corpus):
    w = data.Windows(corpus, 10, 5)
    inside = [i for i in range(len(w)) if w.start[i] + 1.06 * w.length < corpus[w.recording[i]].samples]
    loader = data.Loader(w, augment=["stretch"])
    (x, y, mask), = loader.batches([inside[:40]], 1)
    speeds = [loader.augmenter.draw(0, 1, window)["stretch"][0] for window in inside[:40]]
    assert mask.all() and min(speeds) < 0.97 and max(speeds) > 1.03
    for i, window in enumerate(inside[:40]):
        recording, start = corpus[w.recording[window]], int(w.start[window])
        place = np.float32(speeds[i]) * np.arange(w.length, dtype=np.float32)
        labels = recording.labels(start, loader.reach)
        np.testing.assert_array_equal(y[i], labels[np.rint(place).astype(int)])
        last = recording.read(start, loader.reach)[:, np.rint(place[-1]).astype(int) - 1:][:, :3]
        last = last * recording.scale[:, None] / recording.norm
        assert (x[i, :, -1] <= torch.from_numpy(last.max(1)) + 0.5).all()
        assert (x[i, :, -1] >= torch.from_numpy(last.min(1)) - 0.5).all()


def test_switching_a_kind_on_leaves_the_draws_of_the_others():
    every = Augmenter(EVERY, NAMES, "referential").draw(3, 2, 17)
    assert list(every) == list(AUGMENTATIONS)
    for name in AUGMENTATIONS:
        alone = Augmenter([name], NAMES, "referential").draw(3, 2, 17)
        assert list(alone) == [name] and np.array_equal(alone[name], every[name])
    assert len({kind.stream for kind in AUGMENTATIONS.values()}) == len(AUGMENTATIONS)
    for place in ((4, 2, 17), (3, 3, 17), (3, 2, 18)):
        other = Augmenter(EVERY, NAMES, "referential").draw(*place)
        assert not np.array_equal(other["gain"], every["gain"])


def test_with_every_kind_on_a_batch_depends_on_its_windows_alone(corpus):
    w = data.Windows(corpus, 10, 3)
    lists = plan(w, 5, 8)
    kept = list(data.Loader(w, augment=EVERY).batches(lists, 1))
    assert all(x.isfinite().all() for x, _, _ in kept)
    for readers in (1, 4, 16):
        assert sha(data.Loader(w, augment=EVERY, readers=readers, buffers=3).batches(lists, 1)) == sha(kept)
    assert sha(data.Loader(w, augment=EVERY).batches(lists[3:], 1)) == sha(kept[3:])
    parts = [piece for ids in lists for piece in (ids[:1], ids[1:3], ids[3:])]      # as of three processes
    cut = list(data.Loader(w, augment=EVERY).batches(parts, 1))
    for i, (x, y, mask) in enumerate(kept):
        assert torch.equal(x, torch.cat([piece[0] for piece in cut[3 * i:3 * i + 3]]))
        assert torch.equal(y, torch.cat([piece[1] for piece in cut[3 * i:3 * i + 3]]))
        assert torch.equal(mask, torch.cat([piece[2] for piece in cut[3 * i:3 * i + 3]]))


def test_padding_stays_zero_under_every_kind():
    w = data.Windows([fake("a", samples=700, events=((0, 2.0),))], 4, 1)
    for epoch in range(8):
        (x, y, mask), = data.Loader(w, augment=EVERY).batches([[0]], epoch)
        real = int(mask.sum())
        assert x.shape == (1, 19, 1024) and 700 / 1.05 - 1 <= real <= 700 / 0.95 + 1
        assert (x[..., real:] == 0).all() and (x[..., :real] != 0).any() and mask[0, :real].all()


def test_what_is_off_costs_nothing(corpus):
    w = data.Windows(corpus, 10, 3)
    for off in (False, [], ()):
        loader = data.Loader(w, augment=off)
        assert not loader.augmenter.widths and loader.reach == w.length
        assert sha(loader.batches(plan(w), 1)) == sha(data.Loader(w).batches(plan(w), 1))
    assert data.Loader(w, augment=["gain", "band"]).reach == w.length


def test_a_kind_that_is_not_known_is_refused_in_one_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {augmentations: [gain, wobble]}\n")
    with pytest.raises(Refused) as refusal:
        config.load(path)
    assert str(refusal.value) == ("data.augmentations may hold mirror, stretch, polarity, reference, mains, "
                                  "band, gain, channels, not 'wobble'")
    path.write_text("data: {augmentations: [gain, band, mirror, gain]}\n")
    assert config.load(path)["data"]["augmentations"] == ["mirror", "band", "gain"]
    path.write_text("data: {augmentations: []}\n")
    assert config.load(path)["data"]["augmentations"] == []
    with pytest.raises(Refused, match="data.augmentations must be list"):
        config.load(path, ["data.augmentations=gain"])
    assert config.DEFAULTS["data"]["augmentations"] == list(augmentation.AUGMENTED)


@pytest.fixture(scope="module")
def whole(small_corpus, tmp_path_factory):
    """Results of a run with every kind on that was never stopped."""
    results = tmp_path_factory.mktemp("whole")
    assert train.run(loaded(small_corpus, results, data__augmentations=list(EVERY))) == 0
    return results


def test_a_run_with_every_kind_on_resumes_bit_identically(small_corpus, whole, tmp_path):
    loaded(small_corpus, tmp_path, data__augmentations=list(EVERY))
    with spawn(tmp_path / "config.yaml", held=("train_step", 4, "there")) as process:
        wait_for(process, "step 3")
        process.kill()
    assert train.run(loaded(small_corpus, tmp_path, data__augmentations=list(EVERY)), resume="true") == 0
    assert_same_run(tmp_path, whole)


def test_the_same_eeg_through_another_amplifier_gives_nearly_the_same_output(small_corpus, whole, tmp_path):
    """Three times as large, another high-pass, steps of 12 bits: what is divided out or filtered is
    not seen."""
    first = max(data.open_corpus(small_corpus), key=lambda r: r.samples)
    eeg = first.read(0, first.samples // 256 * 256) * first.scale[:, None]
    b, a = signal.butter(1, 0.5, "high", fs=edf.FS)
    other = 3 * signal.lfilter(b, a, eeg)
    step = 2                                            # uV: 12 bits of +-4 mV
    other = np.clip(np.rint(other / step), -2047, 2047) * step
    pair = []
    for name, signals in (("one", eeg), ("other", other)):
        write_edf(tmp_path / name / "a.edf", eeg.shape[1] // 256, eeg=10 * np.clip(signals, -3276, 3276))
        imported(tmp_path / name, tmp_path / f"{name}_h5")
        pair += data.open_corpus(tmp_path / f"{name}_h5")
    net, state = evaluate.load_model(whole / "t/checkpoints/last.pt", torch.device("cpu"))
    c, _ = evaluate.stored_settings(state)

    def likeness():
        return np.corrcoef(*[evaluate.predict(net, r, torch.device("cpu"), c) for r in pair])[0, 1]
    alike = likeness()
    pair[1].norm = pair[0].norm
    assert alike > 0.8 and alike > likeness() + 0.02        # than without its own amplitude divided out
