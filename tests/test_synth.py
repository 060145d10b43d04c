"""eeg/synth.py: a pure function of the seed, and no easier than its own artefacts."""
import resource

import numpy as np
import pytest
from scipy import signal as dsp

from eeg import corpora
import data
from eeg import edf
from eeg import synth
from conftest import command, microvolts, once



def test_synthetic_recordings_depend_on_the_seed_alone(synthetic, tmp_path):
    synth.synth(tmp_path / "again", hours=0.5, patients=4, seed=3)
    files = sorted(p.relative_to(synthetic[0]) for p in synthetic[0].rglob("*.*"))
    assert files and all((synthetic[0] / f).read_bytes() == (tmp_path / "again" / f).read_bytes()
                         for f in files)
    with pytest.raises(edf.DataError, match="not empty"):
        synth.synth(synthetic[0])
    with pytest.raises(edf.DataError, match="finite"):
        synth.synth(tmp_path / "endless", hours=float("inf"))


def test_an_edf_that_a_full_disk_has_cut_is_a_fault(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="not all of it could be written"):
            synth.synth(tmp_path / "cut", hours=0.01, patients=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_command_says_what_it_made_and_what_to_type_next(tmp_path):
    done = command("synth", tmp_path / "a b", "--hours", "0.01", "--patients", "1")
    assert done.stdout == f"1 patient, 0.01 h, in {tmp_path}/a b; next: python data.py import '{tmp_path}/a b' OUT\n", done


def auc(positive, negative):
    order = np.argsort(np.concatenate([positive, negative]), kind="stable")
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order))
    n = len(positive)
    return (rank[:n].sum() - n * (n - 1) / 2) / n / len(negative)


def spectra(x):
    """Log power of bands from 0.5 to 90 Hz of (19, T): mean, greatest and spread over the channels."""
    power = abs(np.fft.rfft(x * np.hanning(x.shape[1]), axis=1)) ** 2
    f = np.fft.rfftfreq(x.shape[1], 1 / 256)
    edges = 0.5, *range(1, 31), 40, 50, 70, 90
    bands = np.log(np.stack([power[:, (f >= a) & (f < b)].mean(1) for a, b in zip(edges, edges[1:])]) + 1e-6)
    return np.concatenate([bands.mean(1), bands.max(1), bands.std(1)])


@pytest.fixture(scope="session")
def sixteen(tmp_path_factory):
    """Folder of EDFs of 16 patients."""
    with once(tmp_path_factory, "sixteen") as (folder, empty):
        if empty:
            synth.synth(folder, hours=1.6, patients=16, seed=11)
    return folder


@pytest.fixture(scope="module")
def pieces(sixteen, tmp_path_factory):
    """Of pieces of 4 s, wholly in a seizure or wholly out of it, of 16 patients: size, line length and peak; spectra;
    label; patient; recording."""
    folder = tmp_path_factory.mktemp("pieces")
    corpora.import_corpus(sixteen, folder, say=lambda text: None)
    found = []
    for r in data.open_corpus(folder):
        x = microvolts(r) / r.norm
        for start in range(0, r.samples - 1024, 1024):
            piece, truth = x[:, start:start + 1024], r.labels(start, 1024).mean()
            if truth in (0, 1):
                simple = [piece.std(1).max(), abs(np.diff(piece)).mean(1).max(), abs(piece).max()]
                found.append((simple, spectra(piece), truth, int(r.patient), r.name))
    return [np.array(column) for column in zip(*found)]


def against_own_median(x, recording):
    relative = x.copy()
    for name in np.unique(recording):
        relative[recording == name] -= np.median(relative[recording == name], 0)
    return relative


def learnt_by_others(x, y, patient):
    """What ridge regression on 12 of the 16 patients says of the pieces of the other 4."""
    x = np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))]
    score = np.empty(len(x))
    for k in range(4):
        test = (patient - 1) // 4 == k
        a = x[~test]
        score[test] = x[test] @ np.linalg.solve(a.T @ a + 20 * np.eye(a.shape[1]), a.T @ (y[~test] - 0.5))
    return score


@pytest.mark.slow
def test_seizures_are_told_by_their_spectra_across_patients_better_than_by_size_or_line_length(pieces):
    """What every seizure shares with artefacts, its size, tells it worse."""
    simple, x, y, patient, recording = pieces
    told = [auc(column[y == 1], column[y == 0]) for column in simple.T]
    score = learnt_by_others(against_own_median(x, recording), y, patient)
    learnt = []
    for k in range(4):
        test = (patient - 1) // 4 == k
        learnt.append(auc(score[test & (y == 1)], score[test & (y == 0)]))
    print("size, line length, peak", told, "spectra", learnt)
    assert max(told) < 0.88, told
    assert np.mean(learnt) > max(0.8, max(told)), learnt


@pytest.mark.slow
def test_within_a_recording_line_length_and_spectra_reach_about_what_they_reach_within_real_ones(pieces):
    """Within the recordings of SeizeIT2 line length reaches 0.79 and features against the recording's own median 0.86
    (bench/real.py), within the clips of CHB-MIT and of expert votes line length reaches 0.99 (bench/learn.py)."""
    simple, x, y, patient, recording = pieces
    mixed = [name for name in np.unique(recording) if 0 < y[recording == name].mean() < 1]
    score = learnt_by_others(against_own_median(x, recording), y, patient)
    reached = []
    for track in (simple[:, 1], score):
        within = [auc(track[(recording == n) & (y == 1)], track[(recording == n) & (y == 0)]) for n in mixed]
        reached.append(np.mean(within))
    print(len(mixed), "recordings: line length", reached[0], "spectra", reached[1])
    assert 0.70 < reached[0] < 0.88 and reached[0] < reached[1] < 0.95, reached


BANDS = {"delta": (0.5, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 100)}


def marginals(folder, at_most):
    """{statistic: values} over pieces of 10 s without a seizure, at most so many of each patient: share of the
    power in each band, amplitude and line length in uV, correlation between channels, and kurtosis."""
    found, counts = [], {}
    for r in data.open_corpus(folder):
        x = microvolts(r).astype(float)
        for start in range(0, r.samples - 2559, 2560) if r.labelled else ():
            counts[r.patient] = counts.get(r.patient, 0) + 1
            if r.labels(start, 2560).any() or counts[r.patient] > at_most:
                continue
            piece = x[:, start:start + 2560] + 1e-6 * np.random.default_rng(start).standard_normal((len(x), 2560))
            f, power = dsp.welch(piece, 256, nperseg=512)
            total = power[:, (f >= 0.5) & (f < 100)].sum(1)
            share = [np.median(power[:, (f >= low) & (f < high)].sum(1) / total) for low, high in BANDS.values()]
            between = np.corrcoef(piece)[np.triu_indices(len(piece), 1)]
            spread = piece - piece.mean(1, keepdims=True)
            found.append([*share, np.median(abs(piece)), np.median(abs(np.diff(piece))), np.median(abs(between)),
                          np.median((spread ** 4).mean(1) / spread.var(1) ** 2)])
    names = [*BANDS, "amplitude", "line length", "correlation", "kurtosis"]
    return dict(zip(names, np.array(found).T))


@pytest.mark.slow
def test_the_background_has_the_spectrum_size_correlation_and_line_length_of_real_recordings(shared, sixteen, tmp_path):
    """The median of each lies between the 5th and the 95th percentile of the other, both ways."""
    corpora.import_corpus(shared / "eeg/recordings", tmp_path / "real", montage="bipolar", say=lambda text: None)
    corpora.import_corpus(sixteen, tmp_path / "h5", montage="bipolar", say=lambda text: None)
    real, made = marginals(tmp_path / "real", 20), marginals(tmp_path / "h5", 12)
    for name in real:
        low, median, high = np.percentile(real[name], [5, 50, 95])
        below, middle, above = np.percentile(made[name], [5, 50, 95])
        print(f"{name:12} real {low:.3g} {median:.3g} {high:.3g}, synthetic {below:.3g} {middle:.3g} {above:.3g}")
        assert low <= middle <= high and below <= median <= above, name
