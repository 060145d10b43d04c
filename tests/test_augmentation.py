"""eeg/augmentation.py: each kind changes what it should, the same for every reader, process and resume."""
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
from helpers import assert_same_run, loaded, spawn, wait_for
from scipy import signal
from test_data import fake, plan, sha

LENGTH = 20 * edf.FS
EVERY = tuple(AUGMENTATIONS)


def noise(windows=24, channels=19, length=LENGTH):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(windows, channels, length)).astype("f4"))


def changed(name, x, channels=NAMES):
    """(x, draws) after one kind."""
    kinds = Augmenter([name], channels)
    drawn = [kinds.draw(1, 1, window) for window in range(len(x))]
    draws = {kind: torch.from_numpy(np.stack([d[kind] for d in drawn])) for kind in kinds.widths}
    mask = torch.ones(len(x), x.shape[-1])
    return kinds.apply(x.clone(), mask, draws), draws[name]


def test_gain_is_one_factor_for_a_whole_window():
    x = noise()
    after, draws = changed("gain", x)
    torch.testing.assert_close(after / x, draws[:, :, None].expand_as(x))
    assert 0.1 < draws.log().std() < 0.3


def test_mirror_acts_on_about_half_of_the_windows():
    x = noise()
    flip = augmentation.mirror(NAMES)
    sides, _ = changed("mirror", x)
    swapped = [torch.equal(a, b[flip]) for a, b in zip(sides, x)]
    kept = [torch.equal(a, b) for a, b in zip(sides, x)]
    assert 6 < sum(swapped) < 18 and all(a != b for a, b in zip(swapped, kept))
    assert not Augmenter(["mirror"], ("Cz", "F7-T3")).kinds


@pytest.mark.parametrize("names,mirrored", [
    (edf.CHANNELS["bipolar"], True), (("F7-T3", "Cz", "F8-T4"), True), (("C3-A2", "C4-A1"), True), (("C3-C4", "Cz"), False),
    (("T3-A1", "T4-A1"), False), (("F7-T3", "F8-T4", "FT9", "FT10"), False), (("F7-T3", "F8-T4", "left SD"), False)])
def test_a_mirrored_window_is_what_a_mirrored_head_would_give_or_itself(names, mirrored):
    sides = dict(zip("Fp1 F3 C3 P3 O1 F7 T3 T5 A1 FT9 left".split(), "Fp2 F4 C4 P4 O2 F8 T4 T6 A2 FT10 right".split()))
    sides |= {right: left for left, right in sides.items()}
    head = {name: np.random.default_rng(i).normal(size=9) for i, name in enumerate([*sides, "Fz", "Cz", "Pz"])}
    other = {name: head[sides.get(name, name)] for name in head}

    def recorded(places):
        pairs = [name.removesuffix(" SD").split("-") for name in names]
        return np.array([places[first] - sum(places[name] for name in rest) for first, *rest in pairs])
    found = recorded(head)[augmentation.mirror(names)]
    assert np.array_equal(found, recorded(other if mirrored else head))


def test_another_kind_is_one_more_row(monkeypatch):
    row = augmentation.Augmentation(
        11, lambda rng, channels: [1 - 2 * (rng.random() < 0.5)], augmentation.multiply, "upside down")
    monkeypatch.setitem(AUGMENTATIONS, "polarity", row)
    x = noise()
    signs, _ = changed("polarity", x)
    turned = [torch.equal(a, -b) for a, b in zip(signs, x)]
    assert 6 < sum(turned) < 18
    both, one = Augmenter(["gain", "polarity"], NAMES).draw(1, 1, 5), Augmenter(["gain"], NAMES).draw(1, 1, 5)
    assert np.array_equal(both["gain"], one["gain"])


def test_the_draws_of_the_kinds_are_those_of_earlier_versions():
    """A checkpoint that names mirror and gain resumes with the same windows."""
    draws = Augmenter(EVERY, NAMES).draw(3, 2, 17)
    for name, stream in (("mirror", 4), ("gain", 3)):
        rng = np.random.default_rng([3, 2, 17, stream])
        wanted = np.array(AUGMENTATIONS[name].draw(rng, NAMES), np.float32)
        assert np.array_equal(draws[name], wanted)


def test_switching_a_kind_on_leaves_the_draws_of_the_others():
    every = Augmenter(EVERY, NAMES).draw(3, 2, 17)
    assert list(every) == list(AUGMENTATIONS)
    for name in AUGMENTATIONS:
        alone = Augmenter([name], NAMES).draw(3, 2, 17)
        assert list(alone) == [name] and np.array_equal(alone[name], every[name])
    assert len({kind.stream for kind in AUGMENTATIONS.values()}) == len(AUGMENTATIONS)
    for place in ((4, 2, 17), (3, 3, 17), (3, 2, 18)):
        other = Augmenter(EVERY, NAMES).draw(*place)
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
        assert x.shape == (1, 19, 1024) and real == 700
        assert (x[..., real:] == 0).all() and (x[..., :real] != 0).any() and mask[0, :real].all()


def test_what_is_off_costs_nothing(corpus):
    w = data.Windows(corpus, 10, 3)
    for off in (False, [], ()):
        loader = data.Loader(w, augment=off)
        assert not loader.augmenter.widths
        assert sha(loader.batches(plan(w), 1)) == sha(data.Loader(w).batches(plan(w), 1))


def test_a_kind_that_is_not_known_is_refused_in_one_line(tmp_path):
    path = tmp_path / "c.yaml"
    for wrong in ("wobble", "stretch"):                 # stretch was a kind once
        path.write_text(f"data: {{augmentations: [gain, {wrong}]}}\n")
        with pytest.raises(Refused) as refusal:
            config.load(path)
        assert str(refusal.value) == f"data.augmentations may hold mirror, gain, not '{wrong}'"
    path.write_text("data: {augmentations: [gain, mirror, gain]}\n")
    assert config.load(path)["data"]["augmentations"] == ["mirror", "gain"]
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


@pytest.mark.slow
def test_a_run_with_every_kind_on_resumes_bit_identically(small_corpus, whole, tmp_path):
    loaded(small_corpus, tmp_path, data__augmentations=list(EVERY))
    with spawn(tmp_path / "config.yaml", held=("train_step", 4, "there")) as process:
        wait_for(process, "step 3")
        process.kill()
    assert train.run(loaded(small_corpus, tmp_path, data__augmentations=list(EVERY)), resume="true") == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
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
    c = evaluate.stored_settings(state)[0] | {"smooth_seconds": 0.0}

    def likeness():
        return np.corrcoef(*[evaluate.predict(net, r, torch.device("cpu"), c) for r in pair])[0, 1]
    alike = likeness()
    pair[1].reference = pair[0].reference
    assert alike > 0.8 and alike > likeness() + 0.02        # than by the baseline of the other
