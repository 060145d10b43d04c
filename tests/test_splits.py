"""eeg/splits.py, and several corpora in one run: who trains, who validates, who is left out."""
import shutil
from pathlib import Path

import numpy as np
import pytest

from eeg import corpora
import data
from eeg import edf
from eeg import splits
from eeg import synth
import train
from conftest import Held, NAMES
from helpers import assert_same_run, last, loaded

C = {"split": "patient", "folds": 0, "fold": 1, "dev_patients": [], "dev_fraction": 0.25}


def fake(patient, split="", events=((10, 40),), corpus="", number=0, samples=120 * 256, labelled=True):
    name = "/".join(part for part in (corpus, f"{patient}_{number}") if part)
    patient = "/".join(part for part in (corpus, patient) if part)
    eeg = np.broadcast_to(np.arange(samples) % 30_000, (19, samples)).astype(np.int16)
    return Held(name, name, patient, split, "referential", NAMES, 256, samples, np.full(19, 0.1, np.float32), 10.0,
                labelled, np.array(events, float).reshape(-1, 2), "x", corpus=corpus, memory=eeg)


def patients(part):
    return {splits.patient_of(r) for r in part}


def test_every_corpus_keeps_its_own_split_and_patients_of_the_others_are_drawn():
    own = [fake("a", "train", corpus="tusz"), fake("b", "dev", corpus="tusz"), fake("c", "eval", corpus="tusz"),
           fake("d", corpus="tusz")]
    drawn = [fake(p, corpus="siena") for p in "abcdefgh"]
    one, dev = splits.split(own + drawn, C, 3)
    assert "tusz/a" in patients(one) and "tusz/b" in patients(dev)
    assert len({p for p in patients(dev) if p.startswith("siena/")}) == 2
    assert not patients(one) & patients(dev)
    assert {p for p in patients(one + dev)} == {"tusz/a", "tusz/b", *(f"siena/{p}" for p in "abcdefgh")}
    alone = data.split_patients([fake(p) for p in "abcdefgh"], dev_fraction=0.25, seed=3)[1]
    assert {f"siena/{p}" for p in patients(alone)} == {p for p in patients(dev) if p.startswith("siena/")}
    named = splits.split(own + drawn, C | {"dev_patients": ["siena/e"]}, 3)[1]
    assert patients(named) == {"tusz/b", "siena/e"}
    synthetic = [fake(p, corpus="synthetic") for p in "mnop"]
    also = splits.split(drawn + synthetic, C | {"dev_patients": ["siena/e"]}, 3)[1]
    assert len(patients(also)) == 2 and "siena/e" in patients(also)
    only = splits.split(drawn + synthetic, C | {"dev_patients": ["siena/e"], "dev_fraction": 0}, 3)[1]
    assert patients(only) == {"siena/e"}
    assert len(patients(splits.split(drawn, C | {"dev_fraction": 0}, 3)[1])) == 1
    lines = splits.told(own + drawn, one, dev, {"split": "patient"})
    assert any("tusz: left out: 1 of its eval split, 1 without a split in a corpus" in line for line in lines)
    assert any(line.startswith("siena: train 6 recordings of 6 patients") for line in lines)


def test_chb21_is_chb01_in_a_folder_too():
    dev = splits.split([fake(p, corpus="chbmit") for p in ("chb01", "chb21", "chb02")],
                       C | {"dev_patients": ["chbmit/chb21"]}, 0)[1]
    assert patients(dev) == {"chbmit/chb01"} and len(dev) == 2


def test_a_lone_recording_is_refused_with_the_split_that_takes_it():
    with pytest.raises(edf.DataError, match="of different recordings; for one recording set data.split to time$"):
        splits.split([fake("a")], C | {"split": "recording"}, 1)
    assert splits.split([fake("a")], C | {"split": "time"}, 1)


def test_folds_of_a_lone_patient_are_refused_with_the_way_out():
    with pytest.raises(edf.DataError, match="1 labelled part, .*for one patient set data.split"):
        splits.split([fake("a")], C | {"folds": 2}, 1)


def test_folds_let_everyone_validate_once_and_deal_those_with_seizures_evenly():
    people = [fake(f"p{i}", events=((10, 40),) if i < 4 else ()) for i in range(10)]
    seen = []
    for fold in (1, 2, 3, 4):
        one, dev = splits.split(people, C | {"folds": 4, "fold": fold}, 1)
        assert sum(bool(len(r.events)) for r in dev) == 1 and len(one) + len(dev) == 10
        seen += patients(dev)
    assert sorted(seen) == sorted(patients(people))
    out = [patients(splits.split(people, C | {"folds": 10, "fold": k}, 1)[1]) for k in range(1, 11)]
    assert sorted(map(len, out)) == [1] * 10 and set.union(*out) == patients(people)      # leave one out
    for wrong, reason in (({"folds": 11}, "2 to 10, as 10 have labels"), ({"folds": 4, "fold": 5}, "1 to 4"), ({"fold": 2}, "data.folds is 0"),
                          ({"folds": 2, "split": "time"}, "needs data.split")):
        with pytest.raises(edf.DataError, match=reason):
            splits.split(people, C | wrong, 1)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["patient", "recording"])
def test_a_lone_patient_with_seizures_trains_however_many_validate(kind, fraction):
    quiet = [fake(name, events=()) for name in "bcdef"]
    train_, dev = splits.split([fake("a"), *quiet], C | {"split": kind, "dev_fraction": fraction}, 0)
    assert "a" in patients(train_) and dev and not patients(train_) & patients(dev)


def test_one_patient_is_divided_by_recording_or_time_with_a_warning():
    alone = [fake("a", number=i) for i in range(4)]
    with pytest.raises(edf.DataError, match="1 labelled patient, .* set data.split to recording or time"):
        splits.split(alone, C, 0)
    one, dev = splits.split(alone, C | {"split": "recording"}, 0)
    assert len(one) == 3 and len(dev) == 1
    one, dev = splits.split(alone, C | {"split": "time"}, 0)
    assert [r.samples for r in one] == [90 * 256] * 4 and [r.samples for r in dev] == [30 * 256] * 4
    for kind in ("recording", "time"):
        assert "warning" in splits.told(alone, one, dev, {"split": kind})[0]


def test_a_part_of_a_recording_is_its_samples_and_events(corpus):
    whole = corpus[0]
    cut = whole.samples // 2 // 2560 * 2560
    first, rest = splits.cut_out(whole, 0, cut), splits.cut_out(whole, cut, whole.samples)
    np.testing.assert_array_equal(first.read(0, cut), whole.read(0, cut))
    np.testing.assert_array_equal(rest.read(77, 5000), whole.read(cut + 77, 5000))
    assert not first.read(cut - 10, 100)[:, 10:].any()              # nothing of the other part
    joined = np.r_[first.labels(0, cut), rest.labels(0, rest.samples)]
    np.testing.assert_array_equal(joined, whole.labels(0, whole.samples))


def test_a_draw_without_a_seizure_says_so():
    lines = splits.told([], [fake("a")], [fake("b", events=())], {"split": "patient"})
    assert "validation patients: b (0 seizures)" in lines and any("no patient of the validation" in x for x in lines)


def test_the_proportions_are_those_of_each_corpus():
    """A corpus with little background beside one with much: pooled, the corpus would tell the label."""
    few = [fake("a", corpus="clips", events=((20, 80),), samples=100 * 256)]
    many = [fake(str(i), corpus="days", events=((20, 80),) if i == 0 else (), samples=1000 * 256) for i in range(5)]
    w = data.Windows(few + many, 10, 5)
    corpus = np.array([r.corpus for r in w.recordings])[w.recording]

    def shares(balance):
        ids = w.epoch(0, 1, balance=balance)
        np.testing.assert_array_equal(ids, w.epoch(0, 1, balance=balance))
        return {name: np.bincount(w.kind[ids[corpus[ids] == name]], minlength=3) for name in ("clips", "days")}
    own, pooled, equal = shares("own"), shares("pooled"), shares("equal")
    for counts in (own["clips"], own["days"], equal["clips"], equal["days"]):
        assert abs(counts[0] - 2.5 * counts[1]) <= 1
    assert pooled["days"][0] > 5 * pooled["clips"][0]
    assert equal["clips"][1] == equal["days"][1]


def test_repeated_windows_of_a_smaller_corpus_come_equally_often_in_the_end():
    few = [fake(str(i), corpus="few", samples=70 * 256) for i in range(4)]
    many = [fake(str(i), corpus="many", samples=70 * 256) for i in range(6)]
    w = data.Windows(few + many, 60, 10)
    counts = sum(np.bincount(w.epoch(0, epoch, 0, 0, "equal"), minlength=len(w)) for epoch in range(1, 13))
    assert set(counts[w.kind == 1]) == {12, 18}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two imported folders whose recordings have the same names."""
    root = tmp_path_factory.mktemp("two")
    for name, seed in (("one", 3), ("other", 4)):
        synth.synth(root / f"{name}_edf", hours=0.2, patients=3, seed=seed)
        corpora.import_corpus(root / f"{name}_edf", root / name, say=lambda line: None)
    return [str(root / "one"), str(root / "other")]


@pytest.mark.slow
def test_names_and_patients_carry_the_folder_and_one_person_is_one_only_when_said(two):
    recordings = data.open_corpora(two)
    assert {r.corpus for r in recordings} == {"one", "other"} and len({r.name for r in recordings}) == len(recordings)
    assert len(patients(recordings)) == 6
    joined = data.open_corpora(two, ["one/001 = other/001"])
    assert len(patients(joined)) == 5
    for wrong in ("one/001", "one/001 = nobody"):
        with pytest.raises(edf.DataError, match="write A = B"):
            data.open_corpora(two, [wrong])
    with pytest.raises(edf.DataError, match="rename one"):
        data.open_corpora([two[0], two[0]])
    assert data.fingerprint(data.open_corpora(two[0])) == data.fingerprint(data.open_corpus(two[0]))


@pytest.mark.slow
def test_a_run_on_two_corpora_says_what_is_used_and_resumes_to_the_same_end(two, tmp_path, capsys):
    changes = dict(data__path=two, data__full_per_partial=0.0, training__epochs=1)
    assert train.run(loaded("", tmp_path / "whole", **changes)) == 0
    out = capsys.readouterr().out
    assert "one: train " in out and "other: train " in out and "validation patients: " in out and "train too" not in out
    for path in two:                    # each line a command that evaluate.py takes
        words = out.split(f"--data {path} ")[1].split("\n")[0].split()
        assert words[0] == "--out" and words[1].endswith(f"t/evaluation_{Path(path).name}") and words[2:] == ["--split", "dev", "--plot"]
    original = train.Trainer.boundary

    def boundary(self):
        if self.step == 2:
            self.signals.number = 15
        original(self)
    train.Trainer.boundary = boundary
    try:
        assert train.run(loaded("", tmp_path / "cut", **changes)) == 143
    finally:
        train.Trainer.boundary = original
    assert train.run(loaded("", tmp_path / "cut", **changes), "true") == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert last(tmp_path / "cut")["config"]["data"]["path"] == two
    with pytest.raises(train.Refused, match="corpus_balance"):
        train.run(loaded("", tmp_path / "cut", **changes, data__corpus_balance="equal"), "true")


@pytest.mark.parametrize("change", [{"data__split": "time"}, pytest.param({"data__split": "recording"}, marks=pytest.mark.slow),
                                    pytest.param({"data__folds": 3, "data__fold": 2}, marks=pytest.mark.slow)])
def test_a_run_with_another_split_trains_and_says_so(two, tmp_path, capsys, change):
    changes = dict(data__full_per_partial=0.0, training__epochs=1, training__best_metric="loss")
    assert train.run(loaded(two[0], tmp_path, **changes, **change)) == 0
    assert ("scores say nothing about new patients" in capsys.readouterr().out) == ("data__split" in change)


def test_eeg_that_trains_and_validates_under_two_names_is_said(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "again")
    one, dev = splits.split(data.open_corpora([two[0], str(tmp_path / "again")]), C | {"dev_patients": ["one/001", "again/002"]}, 1)
    lines = [line for line in splits.told(one + dev, one, dev, {"split": "patient"}) if "train too, under another name" in line]
    assert len(lines) == 1 and "4 recordings" in lines[0] and ": again/sub-002/" in lines[0] and " is one/sub-002/" in lines[0]


def test_evaluate_divides_a_folder_with_the_persons_that_the_training_was_told_of(two):
    import evaluate
    for one in ("002", "003"):
        same = [f"{one} = 001", "anna = berta"]         # the latter of another corpus
        c = C | {"path": two[0], "dev_fraction": 0.5, "same_person": same}
        _, dev = splits.split(data.open_corpora(two[0], same[:1]), c, 1)
        state = {"config": {"data": c, "experiment": {"seed": 1}}}
        chosen, _ = evaluate.choose(data.open_corpus(two[0]), "dev", state, two[0])
        assert [r.name for r in chosen] == [r.name for r in dev]
        everyone, _ = evaluate.choose(data.open_corpus(two[0]), None, state, two[0])    # a score is a mean over persons too
        assert one not in patients(everyone) and "001" in patients(everyone)


def test_evaluate_takes_the_split_of_training_of_one_folder_among_several(two, tmp_path):
    import evaluate
    config = {"data": C | {"path": two, "dev_fraction": 0.4}, "experiment": {"seed": 1}}
    everyone = splits.split(data.open_corpora(two), config["data"], 1)
    for path, name in zip(two, ("one", "other")):
        for split, part in zip(("train", "dev"), everyone):
            state = {"config": config, "data": data.fingerprint(sum(everyone, []))}
            chosen, warning = evaluate.choose(data.open_corpus(path), split, state, path)
            assert [r.name for r in chosen] == [r.name for r in part if r.corpus == name] and chosen and not warning
