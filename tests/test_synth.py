"""synth.py: a pure function of the seed, and no easier than its own artefacts."""
import numpy as np
import pytest

import corpora
import data
import edf
import synth
from conftest import microvolts



def test_synthetic_recordings_depend_on_the_seed_alone(synthetic, tmp_path):
    synth.synth(tmp_path / "again", hours=0.5, patients=4, seed=3)
    files = sorted(p.relative_to(synthetic[0]) for p in synthetic[0].rglob("*.*"))
    assert files and all((synthetic[0] / f).read_bytes() == (tmp_path / "again" / f).read_bytes()
                         for f in files)
    with pytest.raises(edf.DataError, match="not empty"):
        synth.synth(synthetic[0])
    with pytest.raises(edf.DataError, match="finite"):
        synth.synth(tmp_path / "endless", hours=float("inf"))


def auc(positive, negative):
    order = np.argsort(np.concatenate([positive, negative]), kind="stable")
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order))
    n = len(positive)
    return (rank[:n].sum() - n * (n - 1) / 2) / n / len(negative)


def spectra(x):
    """Log power per Hz, 1 to 30 Hz, of (19, T): mean, greatest and spread over the channels."""
    power = abs(np.fft.rfft(x * np.hanning(x.shape[1]), axis=1)) ** 2
    f = np.fft.rfftfreq(x.shape[1], 1 / 256)
    bands = np.log(np.stack([power[:, (f >= a) & (f < a + 1)].mean(1) for a in range(1, 30)]))
    return np.concatenate([bands.mean(1), bands.max(1), bands.std(1)])


def test_seizures_are_not_told_by_amplitude_or_line_length_but_by_their_rhythm_across_patients(tmp_path):
    """Pieces of 4 s of 8 patients; the rhythm is learnt by ridge regression on the spectra of 6 and tested
    on the other 2."""
    synth.synth(tmp_path / "edf", hours=1.0, patients=8, seed=11)
    corpora.import_corpus(tmp_path / "edf", tmp_path / "h5", say=lambda text: None)
    simple, features, label, patient = [], [], [], []
    for r in data.open_corpus(tmp_path / "h5"):
        x = microvolts(r) / r.norm
        for start in range(0, r.samples - 1024, 1024):
            piece, truth = x[:, start:start + 1024], r.labels(start, 1024).mean()
            if truth in (0, 1):
                simple.append([piece.std(1).max(), abs(np.diff(piece)).mean(1).max(), abs(piece).max()])
                features.append(spectra(piece))
                label.append(truth)
                patient.append(int(r.patient))
    simple, x, y, patient = map(np.array, (simple, features, label, patient))
    told = [auc(column[y == 1], column[y == 0]) for column in simple.T]
    assert max(told) < 0.8, told
    x, learnt = np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))], []
    for k in range(4):
        test = (patient - 1) // 2 == k
        a = x[~test]
        score = x[test] @ np.linalg.solve(a.T @ a + 20 * np.eye(a.shape[1]), a.T @ (y[~test] - 0.5))
        learnt.append(auc(score[y[test] == 1], score[y[test] == 0]))
    assert np.mean(learnt) > 0.84, learnt
