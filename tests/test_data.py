"""data.py: what is read, what is refused, what the training gets. Real files and real processes; the
oracles are mne and pyedflib."""
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data

ROOT = Path(__file__).resolve().parent.parent
NAMES = data.CHANNELS["referential"]
HEAD = "onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration\n"


def edf(path, seconds=20, rate=256, labels=NAMES, eeg=None, size=30.0, tail=b"", **fields):
    """Write an EDF by hand: `fields` overrides header fields, given as text for all signals or {signal:
    text}."""
    n, count = len(labels), int(rate)
    if eeg is None:
        eeg = np.random.default_rng(1).normal(0, size * 10, (n, seconds * count))
    digits = np.rint(eeg).astype("<i2")
    spec = {"version": (8, "0"), "patient": (80, "X X X X"), "recording": (80, "Startdate X X X X"),
            "date": (8, "01.01.85"),
            "time": (8, "00.00.00"), "bytes": (8, str(256 * (n + 1))), "reserved": (44, ""),
            "records": (8, str(seconds)),
            "duration": (8, "1"), "signals": (4, str(n))}
    per = {"label": (16, labels), "transducer": (80, ""), "unit": (8, "uV"), "pmin": (8, "-3276.8"),
           "pmax": (8, "3276.7"),
           "dmin": (8, "-32768"), "dmax": (8, "32767"), "prefilter": (80, ""), "count": (8, str(count)),
           "kept": (32, "")}
    head = b"".join(fields.get(k, v).encode("latin-1").ljust(w)[:w] for k, (w, v) in spec.items())
    for k, (width, default) in per.items():
        given = fields.get(k, default)
        for i in range(n):
            if isinstance(given, dict):
                text = given.get(i, default if isinstance(default, str) else default[i])
            else:
                text = given if isinstance(given, str) else given[i]
            head += text.encode("latin-1").ljust(width)[:width]
    body = digits.reshape(n, seconds, count).transpose(1, 0, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + (body.tobytes() if "body" not in fields else fields["body"]) + tail)
    return path


def microvolts(recording):
    return recording.read(0, recording.samples) * recording.scale[:, None]


def refusal(path, montage="referential", **settings):
    with pytest.raises(data.DataError) as error:
        data.prepare(path, montage, **settings)
    text = str(error.value)
    assert str(path) in text and "\n" not in text, text
    return text


def command(*args, **kwargs):
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, args)], capture_output=True,
                          text=True, **kwargs)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """Folder of 20 min of synthetic EDF, and the folder it was imported to."""
    base = tmp_path_factory.mktemp("synthetic")
    data.synth(base / "edf", hours=0.5, patients=4, seed=3)
    report = data.import_corpus(base / "edf", base / "h5", say=lambda text: None)
    assert not report.refused and not report.repaired
    return base / "edf", base / "h5"


@pytest.fixture(scope="session")
def corpus(synthetic):
    return data.open_corpus(synthetic[1])


# ---- EDF: read rightly or refused ----

def test_microvolts_are_those_of_mne_and_pyedflib(tmp_path):
    """Before filtering ours is digital * gain + offset; after it, mne's own zero-phase filter gives the
    same samples."""
    import pyedflib
    path = edf(tmp_path / "a.edf", pmin="-1000", pmax="500", dmin="-2000", dmax="4000",
               eeg=np.random.default_rng(0).normal(0, 300, (19, 20 * 256)).clip(-2000, 4000))
    header = data.read_header(path)
    records = np.memmap(path, "<i2", "r", header.offset, (20, 19 * 256))
    with pyedflib.EdfReader(str(path)) as reader:
        for i in (0, 7, 18):
            gain, offset = data.calibration(header, records, i, "")
            ours = records[:, i * 256:(i + 1) * 256].reshape(-1) * gain + offset
            np.testing.assert_allclose(ours, reader.readSignal(i), atol=1e-6)
    mne = pytest.importorskip("mne")
    raw = mne.io.read_raw_edf(path, preload=True, verbose="error")
    x = raw.get_data() * 1e6
    x -= np.median(x, 1, keepdims=True)
    x = mne.filter.filter_data(x, 256, 0.5, 120, l_trans_bandwidth=0.5, h_trans_bandwidth=0.5,
                               filter_length=1691,
                               fir_design="firwin", phase="zero", verbose="error")
    ours = data.prepare(path, notch="0")
    middle = slice(1000, -1000)
    assert np.corrcoef(microvolts(ours)[3, middle], x[3, middle])[0, 1] > 0.998


@pytest.mark.parametrize("rate, per_record, duration",
                         [(100, 100, "1"), (160, 160, "1"), (250, 250, "1"), (400, 400, "1"),
                                                        (512, 512, "1"), (Fraction(513, 2), 513, "2"),
                                                        (200, 20, "0.1"),
                                                        (500, 500, "+1.0E0"), (1000, 1000, "1.")])
def test_any_rational_rate_keeps_times_and_amplitudes(tmp_path, rate, per_record, duration):
    """A 7 Hz sine of 100 uV comes out as the same sine at 256 Hz, in phase, to 1 %."""
    records = int(40 / float(duration))
    n = records * per_record
    wave = 1000 * np.sin(2 * np.pi * 7 * np.arange(n) / float(rate))
    path = edf(tmp_path / "a.edf", records, per_record, eeg=np.tile(wave, (19, 1)), duration=duration)
    r = data.prepare(path)
    assert r.source_fs == float(rate) and abs(r.seconds - n / float(rate)) < 1 / 256
    t = np.arange(r.samples) / 256
    inside = slice(r.samples // 4, -r.samples // 4)
    assert abs(microvolts(r)[5] - 100 * np.sin(2 * np.pi * 7 * t))[inside].max() < 1


def test_the_filter_takes_out_offset_drift_and_mains_without_delay(tmp_path):
    t = np.arange(60 * 256) / 256
    wave = np.sin(2 * np.pi * 10 * t) * 500
    noise = 20000 + 3000 * np.sin(2 * np.pi * 0.05 * t) + sum(400 * np.sin(2 * np.pi * f * t)
                                                              for f in (50, 60, 100))
    r = data.prepare(edf(tmp_path / "a.edf", 60, eeg=np.tile(wave + noise, (19, 1))))
    inside = slice(8 * 256, -8 * 256)
    assert abs(microvolts(r)[0] - wave / 10)[inside].max() < 0.6
    kept = data.prepare(tmp_path / "a.edf", notch="50")
    spectrum = abs(np.fft.rfft(microvolts(kept)[0, inside])) / (inside.stop - inside.start + r.samples) * 2
    f = np.fft.rfftfreq(r.samples - 16 * 256, 1 / 256)
    assert spectrum[np.argmin(abs(f - 60))] > 39 and spectrum[np.argmin(abs(f - 50))] < 0.5


def test_rounding_error_is_below_the_amplifiers_step(tmp_path):
    eeg = np.random.default_rng(0).normal(0, 100, (19, 30 * 256))
    eeg[2, 1000:1010] = 32767                           # an artefact over the whole range
    eeg[3] = eeg[3] / 20
    path = edf(tmp_path / "a.edf", 30, eeg=eeg)
    r = data.prepare(path)
    assert (r.scale / 2 <= 0.1).all()
    header = data.read_header(path)
    records = np.memmap(path, "<i2", "r", header.offset, (30, 19 * 256))
    for c in (2, 3):
        x = data._block(header, records, c).reshape(-1).astype(np.float32) * np.float32(0.1)
        exact = data.prepare_row(x, Fraction(256), (50, 60))
        assert abs(microvolts(r)[c] - exact).max() <= 0.1


@pytest.mark.parametrize("spelling", ["{}", "EEG {}-REF", "EEG {}-LE", "EEG {}", "{}.", "{}..",
                                      "EEG {}-Avg", " {}", "{}-AR"])
@pytest.mark.parametrize("case", [str.upper, str.lower, str.title])
def test_every_spelling_of_the_electrodes_is_known(spelling, case):
    for name in NAMES:
        assert data.channel(case(spelling.format(name)))[0] == name
    assert [data.channel(old)[0] for old in ("T7", "EEG T8-REF", "p7", "P8")] == ["T3", "T4", "T5", "T6"]


def test_auxiliary_channels_are_not_electrodes():
    for label in ("EKG1", "EEG EKG1-REF", "ECG", "EMG", "PHOTIC-REF", "IBI", "BURSTS", "SUPPR", "SPO2",
                  "HR", "MK", "A1", "EEG A2-REF",
                  "SP1", "EEG T1-REF", "EEG C3P-REF", "EEG 29-REF", "-", "--0", "", "Fc5",
                  "EDF Annotations", "F3-F3", "T7-FT9"):
        assert data.channel(label) is None, label


def test_channel_order_in_the_file_does_not_matter(tmp_path):
    eeg = np.random.default_rng(0).normal(0, 300, (19, 20 * 256))
    order = np.random.default_rng(1).permutation(19)
    a = data.prepare(edf(tmp_path / "a.edf", eeg=eeg))
    b = data.prepare(edf(tmp_path / "b.edf", eeg=eeg[order], labels=[NAMES[i] for i in order]))
    np.testing.assert_array_equal(a.memory, b.memory)


def test_bipolar_from_referential_is_the_difference(tmp_path):
    path = edf(tmp_path / "a.edf")
    one, two = data.prepare(path), data.prepare(path, "bipolar")
    x = microvolts(one)
    for row, name in zip(microvolts(two), two.channels):
        a, b = name.split("-")
        np.testing.assert_allclose(row, x[NAMES.index(a)] - x[NAMES.index(b)], atol=0.3)


def chb_labels():
    old = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
    return ["-".join(old.get(p, p) for p in name.split("-")).upper()
            for name in data.BIPOLAR] + ["P7-T7", "T7-FT9", "T8-P8"]


def test_chb_channels_with_t8_p8_twice(tmp_path):
    labels = chb_labels()
    eeg = np.random.default_rng(0).normal(0, 300, (len(labels), 20 * 256))
    eeg[-1] = eeg[labels.index("T8-P8")]
    same = data.prepare(edf(tmp_path / "a.edf", labels=labels, eeg=eeg), "bipolar")
    assert same.repaired == ""
    eeg[-1] += 50
    other = data.prepare(edf(tmp_path / "b.edf", labels=labels, eeg=eeg), "bipolar")
    assert "stands twice" in other.repaired
    np.testing.assert_array_equal(same.memory, other.memory)
    assert "--montage bipolar" in refusal(tmp_path / "a.edf")
    assert "F7-T3" in refusal(edf(tmp_path / "c.edf", labels=["X"] + labels[1:5] + ["X"] + labels[6:]),
                              "bipolar")


def test_missing_fz_and_pz_are_interpolated_like_mne_does_and_recorded(tmp_path):
    labels = [n for n in NAMES if n not in ("Fz", "Pz")]
    smooth = data.positions(labels) @ np.random.default_rng(0).normal(0, 400, (3, 20 * 256))
    path = edf(tmp_path / "a.edf", labels=labels, eeg=smooth)
    r = data.prepare(path)
    assert "Fz is missing, interpolated" in r.repaired and "Pz is missing" in r.repaired
    smooth = data.positions(NAMES) @ np.random.default_rng(0).normal(0, 400, (3, 20 * 256))
    full = data.prepare(edf(tmp_path / "b.edf", eeg=smooth))
    for name in ("Fz", "Pz"):                            # a field linear over the head comes back
        a, b = (microvolts(x)[NAMES.index(name)] for x in (r, full))
        assert np.corrcoef(a, b)[0, 1] > 0.98 and 0.8 < a.std() / b.std() < 1.25
    mne = pytest.importorskip("mne")
    from mne.channels.interpolation import _make_interpolation_matrix
    theirs = _make_interpolation_matrix(data.positions(labels), data.positions(["Fz", "Pz"]))
    np.testing.assert_allclose(data.spline(tuple(labels), ("Fz", "Pz")), theirs, atol=1e-3)
    assert "Cz" in refusal(edf(tmp_path / "c.edf", labels=["X" if n == "Cz" else n for n in NAMES]))


BROKEN = {
    "truncated": (dict(records="21"), "truncated"),
    "half": (dict(records="40"), "truncated"),
    "more records than said": (dict(records="7"), "7 records, the file holds 20"),
    "no records": (dict(records="0"), "0 records"),
    "records in words": (dict(records="many"), "not a number"),
    "records with a fraction": (dict(records="20.5"), "whole number"),
    "negative records": (dict(records="-2"), "-2 records"),
    "no signals": (dict(signals="0"), "0 signals"),
    "one signal too few": (dict(signals="18"), ""),
    "one signal too many": (dict(signals="20"), ""),
    "negative signals": (dict(signals="-3"), "-3 signals"),
    "zero duration": (dict(duration="0"), "record duration is 0"),
    "negative duration": (dict(duration="-1"), "record duration"),
    "duration in words": (dict(duration="1 s"), "not a number"),
    "version": (dict(version="1"), "not an EDF"),
    "equal physical range": (dict(pmin={3: "5"}, pmax={3: "5"}),
                             "P3: physical minimum and maximum are both 5"),
    "inverted digital range": (dict(dmin={3: "32767"}, dmax={3: "-32768"}), "sign"),
    "equal digital range": (dict(dmin={3: "0"}, dmax={3: "0"}), "P3"),
    "digital range beyond 16 bits": (dict(dmin="-8388608", dmax="8388607"), "16 bits"),
    "samples beyond the digital range": (dict(dmin="-100", dmax="100"), "its header says -100 to 100"),
    "nan as physical minimum": (dict(pmin={0: "nan"}), "not a number"),
    "infinite physical maximum": (dict(pmax={0: "inf"}), "not a number"),
    "two decimal commas": (dict(pmin={0: "-3,2,1"}), "not a number"),
    "blank physical maximum": (dict(pmax={0: ""}), "not a number"),
    "blank unit": (dict(unit=""), "--blank-unit"),
    "blank unit of one": (dict(unit={7: ""}), "T5 has no unit"),
    "unknown unit": (dict(unit="mmHg"), "mmHg"),
    "megavolts": (dict(unit="MV"), "MV"),
    "millivolts by mistake": (dict(unit="mV"), "not scalp EEG"),
    "volts by mistake": (dict(unit="V"), "not scalp EEG"),
    "nanovolts by mistake": (dict(unit="nV"), "not scalp EEG"),
    "samples per record": (dict(count={4: "0"}), "O1"),
    "wrong header length": (dict(bytes="9999", records="19"), ""),
    "mixed references": (dict(label=["EEG %s-%s" % (n, "REF" if n < "P" else "LE") for n in NAMES]),
                         "different references"),
    "a label twice": (dict(label=["Fp1", *NAMES[:18]]), ""),
    "a line break in a label": (dict(label={2: "C\n\r\x85X3"}), "C   X3"),
    "latin-1 in a label": (dict(label={2: "EEG \xdc3"}), "C3"),
    "EDF+D without onsets": (dict(reserved="EDF+D"), "discontinuous"),
    "one channel in millivolts": (dict(unit={3: "mV"}), "different units: mv, uv"),
    "a range that no amplifier has": (dict(pmax={3: "1e30"}), "P3: a range of 1e+30 uV"),
    "an exponent that fills the memory": (dict(pmax={3: "1e999999"}), "not a number"),
    "a count that fills the memory": (dict(records="9e999999"), "not a number"),
    "all flat": (dict(eeg=np.zeros((19, 20 * 256))), "19 of 19 channels are flat"),
    "constant": (dict(eeg=np.full((19, 20 * 256), 700.0)), "flat"),
    "too slow": (dict(rate=32), "32 Hz"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_headers_are_refused_with_one_line(tmp_path, kind):
    fields, reason = BROKEN[kind]
    assert reason in refusal(edf(tmp_path / "a.edf", **fields))


MENDED = {
    "unfinished": (dict(records="-1"), "record count -1 read as 20"),
    "unfinished with half a record": (dict(records="-1", tail=b"\1" * 3000),
                                      "unfinished last record left out"),
    "garbage at the end": (dict(tail=b"\1" * 1234), "1234 bytes after the last record"),
    "header length": (dict(bytes="512"), "header length 512 read as 5120"),
    "date with colons": (dict(date="01:01:85"), "pyedflib refuses"),
    "decimal comma": (dict(pmin="-3276,8", pmax="3276,7"), "decimal comma"),
    "latin-1 patient": (dict(patient="M\xfcller"), "pyedflib refuses"),
    "micro sign": (dict(unit="\xb5V"), None),
    "utf-8 micro sign": (dict(unit="\xc2\xb5V"), None),
    "millivolts": (dict(unit="mV", pmin="-3.2768", pmax="3.2767"), ""),
    "nanovolts": (dict(unit="nV", pmin="-3276800", pmax="3276700"), ""),
    "exponents": (dict(pmin="-3.277E3", pmax="+3.277e3"), None),
    "signs and blanks": (dict(pmax="+3276.7", dmax="+32767", records="+20"), None),
    "capital unit": (dict(unit="UV"), ""),
}


@pytest.mark.parametrize("kind", MENDED)
def test_odd_but_clear_headers_are_read_rightly(tmp_path, kind):
    fields, note = MENDED[kind]
    r, right = data.prepare(edf(tmp_path / "a.edf", **fields)), data.prepare(edf(tmp_path / "b.edf"))
    np.testing.assert_allclose(microvolts(r), microvolts(right), rtol=2e-4, atol=0.02)
    if note is not None:
        assert note in r.repaired if note else r.repaired == ""


def test_blank_unit_can_be_given(tmp_path):
    r = data.prepare(edf(tmp_path / "a.edf", unit=""), blank_unit="uV")
    np.testing.assert_array_equal(r.memory, data.prepare(edf(tmp_path / "b.edf")).memory)
    assert r.prepared != data.prepare(tmp_path / "b.edf").prepared


def test_negative_gain_turns_the_sign(tmp_path):
    eeg = np.random.default_rng(1).normal(0, 300, (19, 20 * 256))
    a = data.prepare(edf(tmp_path / "a.edf", eeg=eeg, pmin="3276.8", pmax="-3276.7"))
    b = data.prepare(edf(tmp_path / "b.edf", eeg=-eeg))
    assert "negative gain" in a.repaired
    np.testing.assert_allclose(microvolts(a), microvolts(b), atol=0.2)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = edf(tmp_path / "a.edf", 3).read_bytes()
    cuts = [0, 1, 8, 184, 255, 256, 300, 2000, 5119, 5120, 5121, 5120 + 9728, 5120 + 9729, len(whole) - 1]
    for cut in cuts + list(np.random.default_rng(0).integers(0, len(whole), 40)):
        (tmp_path / "cut.edf").write_bytes(whole[:cut])
        refusal(tmp_path / "cut.edf")


def test_mixed_rates_of_eeg_channels_are_refused_and_of_others_ignored(tmp_path):
    labels = [*NAMES, "IBI", "SUPPR"]
    record = np.random.default_rng(0).integers(-900, 900, (20, 19 * 256 + 2)).astype("<i2")
    dull = np.zeros((21, 20 * 256))
    good = edf(tmp_path / "a.edf", labels=labels, eeg=dull, body=record.tobytes(), count={19: "1", 20: "1"},
               unit={19: "sec", 20: "%"}, pmin={19: "0"}, pmax={19: "0"})
    r = data.prepare(good)
    eeg = record[:, :19 * 256].reshape(20, 19, 256).transpose(1, 0, 2).reshape(19, -1)
    plain = edf(tmp_path / "b.edf", eeg=eeg)
    np.testing.assert_array_equal(r.memory, data.prepare(plain).memory)
    slow = np.random.default_rng(0).integers(-900, 900, (20, 18 * 256 + 128)).astype("<i2")
    assert "different rates: 128, 256" in refusal(edf(tmp_path / "c.edf", body=slow.tobytes(),
                                                      count={4: "128"}))


def plus(path, onsets, kind="EDF+D"):
    """EDF+ with an annotation signal that gives each record its onset."""
    eeg = np.random.default_rng(0).integers(-900, 900, (len(onsets), 19 * 256)).astype("<i2")
    body = b"".join(row.tobytes() + f"+{t:g}\x14\x14\0".encode().ljust(32, b"\0")
                    for row, t in zip(eeg, onsets))
    return edf(path, len(onsets), labels=[*NAMES, "EDF Annotations"], eeg=np.zeros((20, len(onsets) * 256)),
               body=body,
               count={19: "16"}, reserved=kind, pmin={19: "-1"}, pmax={19: "1"}, unit={19: ""},
               dmin={19: "-32768"})


def test_gaps_are_refused_also_where_the_file_calls_itself_continuous(tmp_path):
    for kind in ("EDF+D", "EDF+C"):
        assert "gap of 10 s after 5 s" in refusal(plus(tmp_path / "a.edf", [*range(5), *range(15, 20)], kind))
        assert "gap of 0.5 s" in refusal(plus(tmp_path / "b.edf", [0, 1.5, 2.5, 3.5], kind))
        assert "gap" in refusal(plus(tmp_path / "c.edf", [0, 1, 1, 2, 3], kind))
    whole = data.prepare(plus(tmp_path / "d.edf", range(10)))
    assert "without a gap" in whole.repaired and whole.seconds == 10
    assert data.prepare(plus(tmp_path / "e.edf", np.arange(10) + 0.25, "EDF+C")).repaired == ""
    (tmp_path / "f.edf").write_bytes((tmp_path / "d.edf").read_bytes().replace(b"+3\x14", b"xx\x14"))
    assert "no onset" in refusal(tmp_path / "f.edf")


def test_a_gap_is_refused_where_the_header_has_lost_its_mark(tmp_path):
    for mark in ("", "edf+d"):
        assert "gap of 10 s" in refusal(plus(tmp_path / "a.edf", [*range(5), *range(15, 20)], mark))


def test_a_file_copied_as_text_is_refused(tmp_path):
    """Every line feed among the samples got a carriage return before it, which shifts all that follow."""
    whole = edf(tmp_path / "a.edf").read_bytes()
    damaged = whole.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert 0 < len(damaged) - len(whole) < 9728         # less than a record: else refused by the count
    (tmp_path / "b.edf").write_bytes(damaged)
    assert "copied as text" in refusal(tmp_path / "b.edf")


def test_the_hole_that_a_broken_copy_leaves_is_noted(tmp_path):
    """An amplifier may pause with zeros too, so it is read, but not in silence."""
    whole = edf(tmp_path / "a.edf").read_bytes()
    (tmp_path / "b.edf").write_bytes(whole[:5120 + 15 * 9728] + bytes(5 * 9728))
    assert "nothing but zeros in 5 records, the first at 15 s" in data.prepare(tmp_path / "b.edf").repaired


def test_annotations_only_and_foreign_files_are_refused(tmp_path):
    only = edf(tmp_path / "a.edf", 1, 60, labels=["EDF Annotations"], eeg=np.zeros((1, 60)), duration="0",
               reserved="EDF+C")
    assert "annotations without EEG" in refusal(only)
    for content, reason in ((b"", "empty"), (b"<html>" * 99, "not an EDF"),
                            (b"\xffBIOSEMI" + b" " * 400, "BDF"),
                            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")):
        (tmp_path / "b.edf").write_bytes(content)
        assert reason in refusal(tmp_path / "b.edf")


def test_random_damage_to_the_header_never_changes_samples_in_silence(tmp_path):
    """A byte of a field that the samples depend on, replaced: the file reads as before, is noted, or is
    refused."""
    whole = bytearray(edf(tmp_path / "a.edf", 3).read_bytes())
    right = microvolts(data.prepare(tmp_path / "a.edf"))
    rng = np.random.default_rng(0)
    places = [*range(0, 8), *range(184, 256)] + [256 + 19 * 16 + 19 * 80 + i for i in range(19 * 40)]
    wrong = []
    for place in rng.choice(places, 120, replace=False):
        copy = bytearray(whole)
        copy[place] = rng.choice(list(b" ,x-9Z\xff\0"))
        (tmp_path / "b.edf").write_bytes(copy)
        try:
            r = data.prepare(tmp_path / "b.edf")
        except data.DataError:
            continue
        x = microvolts(r)
        if x.shape != right.shape or abs(x - right).max() > 1:
            wrong.append(place)
    # a digit of a physical or digital range is beyond any reader
    ranges = 256 + 19 * (16 + 80 + 8)
    assert all(place >= ranges or 244 <= place < 252 for place in wrong), wrong


def test_the_shared_odd_files_are_read_like_the_good_one_or_refused(shared):
    folder = shared / "eeg" / "odd"
    right = microvolts(data.prepare(folder / "00_ok.edf"))
    refused = ("01", "02", "03", "06", "09", "11", "13", "15", "18", "19", "21", "37", "38")
    differs = ("20", "28", "30", "32", "33", "35")       # other channels, rates or lengths
    for path in sorted(folder.glob("*.edf")):
        if path.name[:2] in refused:
            refusal(path)
            continue
        x = microvolts(data.prepare(path))
        if path.name[:2] not in differs:
            np.testing.assert_allclose(x, right, atol=0.1, err_msg=path.name)
    assert abs(microvolts(data.prepare(folder / "35_512Hz.edf")) - right)[:, 2000:-2000].mean() < 1
    kept = [i for i, n in enumerate(NAMES) if n not in ("Fz", "Pz")]
    np.testing.assert_allclose(microvolts(data.prepare(folder / "20_missing_Fz_Pz.edf"))[kept], right[kept],
                               atol=0.1)
    assert data.prepare(folder / "37_bipolar_CHB_names_T8-P8_twice.edf", "bipolar").repaired == ""


# ---- annotations ----

def tsv(*rows):
    return HEAD + "".join("\t".join(map(str, row)) + "\n" for row in rows)


def test_szcore_events(shared):
    good = tsv((20, 2, "sz"), (5, 10, "sz_foc_ia_nm"), (8, 12, "sz_gen_m_tonicClonic"), (0, 30, "bckg"))
    for text in (good, good.replace("\n", "\r\n"), "\ufeff" + good):
        text = text.encode().decode("utf-8-sig").replace("\r\n", "\n")
        np.testing.assert_array_equal(data.finish(data.parse_events_tsv(text), 30.0), [[5, 22]])
    for row, reason in (((5, 2, "spkz"), "spkz"), ((5, -2, "sz"), "lasts -2"), ((5, 0, "sz"), "lasts 0"),
                        ((-1, 2, "sz"), "-1"),
                        (("n/a", 2, "sz"), "not a number"), (("5,5", 2, "sz"), "not a number"),
                        ((5, "nan", "sz"), "number"),
                        ((5, 2, "sz_"), "sz_"), ((5, 2, "SZ"), "SZ"), ((5,), "incomplete")):
        with pytest.raises(data.DataError, match=reason):
            data.parse_events_tsv(tsv(row))
    with pytest.raises(data.DataError, match="no row"):
        data.parse_events_tsv(HEAD)
    with pytest.raises(data.DataError, match="eventType"):
        data.parse_events_tsv("onset\tduration\n1\t2\n")
    with pytest.raises(data.DataError, match="impedance"):
        data.parse_events_tsv(tsv((0, 30, "impd"), (10, 5, "sz")))
    assert "impedance test" in data.parse_events_tsv(tsv((0, 5, "impd"), (10, 5, "sz"))).notes[0]


def test_a_lone_quote_swallows_no_event():
    text = tsv((5, 2, "sz", 1, '"Fp1'), (10, 2, "sz"))
    assert data.parse_events_tsv(text).events == [(5, 7), (10, 12)]


def test_label_files_that_were_cut_or_contradict_themselves_are_refused():
    for text in (tsv((5, 2, "sz"), (9, 2, "sz", 1))[:-1], tsv((5, 2, "sz", 1, "n/a"))[:-2]):
        with pytest.raises(data.DataError, match="incomplete row"):
            data.parse_events_tsv(text)
    with pytest.raises(data.DataError, match="incomplete row"):
        data.parse_csv(CSV.format("30") + "TERM,5,9,seiz")
    with pytest.raises(data.DataError, match="60 s and 30 s"):
        data.parse_events_tsv(tsv((5, 2, "sz", 1, "n/a", "n/a", 60), (5, 2, "sz", 1, "n/a", "n/a", 30)))
    with pytest.raises(data.DataError, match="not a number"):
        data.parse_events_tsv(tsv(("9" * 5000, 2, "sz")))


def test_events_beyond_the_end_are_cut_and_said_or_refused():
    labels = data.parse_events_tsv(tsv((25, 50, "sz")))
    np.testing.assert_array_equal(data.finish(labels, 30.0), [[25, 30]])
    assert "cut at the recording's end" in labels.notes[0]
    with pytest.raises(data.DataError, match="beyond"):
        data.finish(data.parse_events_tsv(tsv((31, 5, "sz"))), 30.0)
    with pytest.raises(data.DataError, match="not the same recording"):
        data.finish(data.parse_events_tsv(tsv((1, 5, "sz", 1, "n/a", "n/a", "600.00"))), 30.0)


CSV = "# version = csv_v1.0.0\n# duration = {} secs\n#\nchannel,start_time,stop_time,label,confidence\n"


def test_tusz_labels():
    text = CSV.format("30.0000") + "TERM,0.0,10.0,bckg,1\nTERM,10.0,15.0,seiz,1\nTERM,15.0,30.0,bckg,1\n"
    np.testing.assert_array_equal(data.finish(data.parse_csv(text), 30.0), [[10, 15]])
    union = CSV.format("30.0") + \
        "FP1-F7,5,9,fnsz,1\nF7-T3,7,12,gnsz,1\nT3-T5,0,30,bckg,1\nF3-C3,20,21,tcsz,1\n"
    np.testing.assert_array_equal(data.finish(data.parse_csv(union), 30.0), [[5, 12], [20, 21]])
    for rows, reason in (("TERM,15,10,seiz,1\n", "from 15 s to 10 s"), ("TERM,1,2,musc,1\n", "musc"),
                         ("", "no row"),
                         ("TERM,0,30,bckg,1\nTERM,5,9,seiz,1\n", "overlaps"),
                         ("TERM,a,9,seiz,1\n", "not a number")):
        with pytest.raises(data.DataError, match=reason):
            data.parse_csv(CSV.format("30") + rows)
    with pytest.raises(data.DataError, match="not the same"):
        data.finish(data.parse_csv(text), 300.0)


def test_the_shared_odd_labels(shared):
    """What each of the odd label files gives for the 30 s recording: events, or a refusal."""
    right = {"00": [[10, 15]], "01": [[25, 30]], "03": [[5, 20]], "04": [[5, 7], [20, 22]],
             "09": [[10, 15]], "20": [[10, 15]],
             "21": [[10, 15]], "24": np.empty((0, 2)), "06": None, "07": None, "08": None, "12": None,
             "23": None}
    for path in sorted((shared / "eeg" / "odd" / "labels").iterdir()):
        source = data.Source(path, "x", "", "p", "", path)
        if right[path.name[:2]] is None:
            with pytest.raises(data.DataError):
                data.read_labels(source, None)
        else:
            np.testing.assert_array_equal(data.finish(data.read_labels(source, None), 30.0),
                                          right[path.name[:2]], path.name)


def test_chb_summaries_in_both_forms(shared):
    folder = shared / "eeg" / "layouts" / "chbmit"
    five = data.parse_summary(data.read_text(folder / "chb05" / "chb05-summary.txt"))
    assert len(five) == 39 and data.summary_labels(five["chb05_06.edf"]).events == [(417.0, 532.0)]
    assert data.summary_labels(five["chb05_01.edf"]).events == []
    eight = data.parse_summary(data.read_text(folder / "chb08" / "chb08-summary.txt"))
    assert data.summary_labels(eight["chb08_02.edf"]).events == [(2670.0, 2841.0)]
    total = [data.summary_labels(blocks).events for files in (five, eight) for blocks in files.values()]
    assert sum(map(len, total)) == 10
    block = " a.edf\nNumber of Seizures in File: {}\nSeizure 1 Start Time:   3 seconds\n" \
        "Seizure 1 End Time: 9 seconds\n"
    with pytest.raises(data.DataError, match="2 seizures announced"):
        data.summary_labels([block.format(2)])
    no_clock = data.summary_labels([block.format(1).replace(" 1 ", " ")])
    assert no_clock.events == [(3.0, 9.0)] and no_clock.seconds is None


def test_siena_lists_are_read_over_midnight_and_contradictions_refused(shared):
    folder = shared / "eeg" / "layouts" / "siena"
    files = data.parse_siena(data.read_text(folder / "PN00" / "Seizures-list-PN00.txt"))
    assert sorted(files) == [f"PN00-{i}.edf" for i in range(1, 6)]
    assert data.siena_times(files["PN00-1.edf"][0], "") == (70773, 2605.0, 1143.0, 1213.0)
    with pytest.raises(data.DataError, match="a seizure from 765 s to 4425 s in a recording of 2489 s"):
        data.siena_times(files["PN00-3.edf"][0], "PN00-3")      # the list itself is wrong there
    night = data.parse_siena(data.read_text(folder / "PN16" / "Seizures-list-PN16.txt"))
    assert data.siena_times(night["PN16-1.edf"][0], "")[1:] == (8270.0, 7184.0, 7307.0)
    over = {"registration start": "23.00.00", "registration end": "01.00.00", "start": "00.10.00",
            "end": "00:11:30"}
    assert data.siena_times(over, "") == (82800, 7200.0, 4200.0, 4290.0)
    with pytest.raises(data.DataError, match="not a time"):
        data.siena_times({**over, "end": "0011"}, "")


def test_siena_recording_whose_name_the_list_misspells(tmp_path):
    edf(tmp_path / "PN06" / "PN06-1.edf", 60, time="10.00.00")
    block = "Seizure n 1\nFile name: PNO6-1.edf\nRegistration start time: 10.00.00\n" \
            "Registration end time: 10.01.00\nSeizure start time: 10.00.10\nSeizure end time: 10.00.30\n"
    (tmp_path / "PN06" / "Seizures-list-PN06.txt").write_text(block)
    report = data.import_corpus(tmp_path / "PN06", tmp_path / "out", say=lambda text: None)
    assert report.read == ["PN06-1"] and data.open_corpus(tmp_path / "out")[0].events.tolist() == [[10, 30]]
    edf(tmp_path / "PN06" / "PN06-1.edf", 60, time="10.20.00")
    assert "its header" in data.import_corpus(tmp_path / "PN06", tmp_path / "out",
                                              say=lambda text: None).refused[0][1]


def test_seizeit_annotations(shared):
    text = (shared / "eeg" / "layouts" / "seizeit" / "P_ID64" / "P_ID64_r3_a1.tsv").read_text()
    assert data.parse_seizeit(text).events == [(781.0, 807.0), (7145.0, 7175.0)]
    assert data.parse_seizeit("# Source: SeizeIt1\n \n").events == []
    with pytest.raises(data.DataError, match="no end"):
        data.parse_seizeit("8971\tNone\tFIA\tHem:L\n")


# ---- layouts ----

def test_layouts_patients_splits_and_annotations_are_recognised(shared):
    base, found = shared / "eeg", {}
    for folder in ("layouts/tuh", "layouts/chbmit", "layouts/siena", "layouts/seizeit", "recordings"):
        files, root, _ = data.find_edf(base / folder)
        found[folder] = [data.identify(path, root) for path in files]
    tuh = found["layouts/tuh"]
    assert len(tuh) == 217 and {s.layout for s in tuh} == {"tuh"}
    assert {s.annotation.suffix for s in tuh} == {".csv_bi"}
    assert {(s.patient, s.split) for s in tuh} == {(p.name, p.parent.name)
                                                   for p in (base / "layouts/tuh").glob("*/*")}
    assert tuh[0].name.startswith("dev/aaaaahln/s001_2008/02_tcp_le/aaaaahln_s001")
    assert {s.patient for s in found["layouts/chbmit"] if s.layout == "chbmit"} == {"chb05", "chb08"}
    assert {(s.layout, s.patient) for s in found["layouts/siena"]} == {("siena", "PN00"), ("siena", "PN16")}
    assert {s.patient for s in found["layouts/seizeit"] if s.layout == "seizeit"} == {"P_ID64", "P_ID83"}
    for folder, count in (("layouts/chbmit", 59), ("layouts/siena", 7), ("layouts/seizeit", 24)):
        assert len(found[folder]) == count and all(s.annotation for s in found[folder])
    bids = found["recordings"]
    assert {s.patient for s in bids} == {"chb01", "chb02", "chb03", "chbX", "mmi001"}
    assert {s.layout for s in bids} == {"bids"}
    assert {s.patient for s in bids if not s.annotation} == {"chbX"}


def test_odd_names_of_real_corpora():
    def patient(name, folder="x"):
        return data.identify(Path("/r", folder, name), Path("/r")).patient
    assert patient("chb17a_03.edf") == "chb17" and patient("chb02_16+.edf") == "chb02"
    assert patient("PN10-4.5.6.edf") == "PN10"
    assert patient("sub-07_ses-01_task-szMonitoring_run-00_eeg.edf") == "07"
    assert data.identify(Path("/r/anna_1.edf"), Path("/r")).patient == "anna"
    assert data.identify(Path("/r/p1/night/1.edf"), Path("/r")).patient == "p1"
    assert data.identify(Path("/c/edf/train/aaaaaaaa/s001_2000/01_tcp_ar/aaaaaaaa_s001_t000.edf"),
                         Path("/c/edf/train")).split == "train"


def test_the_real_layouts_are_refused_with_the_reason_where_the_signal_contradicts(shared, tmp_path):
    for folder, montage in (("siena", "referential"), ("chbmit", "bipolar"), ("seizeit", "referential")):
        report = data.import_corpus(shared / "eeg" / "layouts" / folder, tmp_path / folder, montage=montage,
                                    say=lambda text: None)
        reasons = " ".join(why for _, why in report.refused)
        assert report.refused and ("not the same recording" in reasons or "beyond" in reasons)
        assert len(report.refused) + len(report.read) == {"siena": 7, "chbmit": 59, "seizeit": 24}[folder]


# ---- import: command, files, resume ----

def test_command_line_codes_table_and_going_on(tmp_path):
    edf(tmp_path / "src" / "p1" / "good.edf")
    edf(tmp_path / "src" / "p1" / "bad.edf", unit="")
    done = command("import", tmp_path / "src", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 read, 0 repaired, 0 already there, 1 refused" in done.stdout
    assert "bad.edf: Fp1 has no unit" in done.stdout
    assert command("import", tmp_path / "src", tmp_path / "out", "--skip-bad").returncode == 0
    assert command("import", tmp_path / "nowhere", tmp_path / "out").returncode == 2
    assert command("import", tmp_path / "out", tmp_path / "out2").returncode == 2
    assert command("import", tmp_path / "src").returncode == 2
    told = command("info", tmp_path / "out")
    assert told.returncode == 0 and "refused: 1" in told.stdout and "bad.edf" in told.stdout
    one = command("import", tmp_path / "src" / "p1" / "good.edf", tmp_path / "one")
    assert one.returncode == 0 and [r.name for r in data.open_corpus(tmp_path / "one")] == ["good"]


def test_the_file_format_is_the_documented_one(synthetic, corpus):
    path = Path(corpus[0].path)
    with h5py.File(path) as f:
        assert f["eeg"].dtype == np.int16 and f["eeg"].chunks is None
        assert f["eeg"].shape == (19, corpus[0].samples)
        assert f["events"].dtype == np.float64 and f["events"].shape[1] == 2
        assert {"scale", "fs", "channels", "montage", "patient", "labelled", "source", "format", "prepared",
                "split", "norm",
                "repaired"} <= set(f.attrs) and f.attrs["scale"].dtype == np.float32
        np.testing.assert_array_equal(f["eeg"][:, 100:900], corpus[0].read(100, 800))
    source = synthetic[0] / (corpus[0].name + ".edf")
    assert source.is_file() and path == synthetic[1] / (corpus[0].name + ".h5")


def test_import_resumes_and_notices_changes(tmp_path):
    src, out, quiet = tmp_path / "src", tmp_path / "out", dict(say=lambda text: None)
    for name in "abc":
        edf(src / f"{name}_1.edf", 10)
    assert len(data.import_corpus(src, out, **quiet).read) == 3
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.h5")}
    assert data.import_corpus(src, out, **quiet).kept == 3
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*.h5")}
    edf(src / "a_1.edf", 12)                            # another source
    (src / "b_1_events.tsv").write_text(tsv((2, 3, "sz")))      # an annotation that was not there
    again = data.import_corpus(src, out, **quiet)
    assert sorted(again.read) == ["a_1", "b_1"] and again.kept == 1
    assert len(data.import_corpus(src, out, notch="50", **quiet).read) == 3
    (src / "b_1.edf").write_bytes(b"damaged")           # what an earlier state gave must not live on
    assert len(data.import_corpus(src, out, notch="50", **quiet).refused) == 1
    assert [r.name for r in data.open_corpus(out)] == ["a_1", "c_1"]


def test_a_second_corpus_never_replaces_recordings_of_the_first(tmp_path):
    for corpus in "ab":
        edf(tmp_path / corpus / "sub-01" / "sub-01_eeg.edf", 10, size=30 + (corpus == "b"))
    for corpus, refused in (("a", 0), ("b", 1), ("a", 0)):
        report = data.import_corpus(tmp_path / corpus, tmp_path / "out", say=lambda text: None)
        assert len(report.refused) == refused
    assert "a folder of its own" in data.import_corpus(tmp_path / "b", tmp_path / "out",
                                                       say=lambda text: None).refused[0][1]
    assert data.import_corpus(tmp_path / "a", tmp_path / "out", say=lambda text: None).kept == 1
    shutil.move(tmp_path / "a", tmp_path / "moved")     # the corpus itself may move, and change
    edf(tmp_path / "moved" / "sub-01" / "sub-01_eeg.edf", 12)
    assert len(data.import_corpus(tmp_path / "moved", tmp_path / "out", say=lambda text: None).read) == 1


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_full_disk_stops_the_import_with_one_line(tmp_path):
    """A limit on the size of files stands in for the disk: the write fails, nothing half written is left."""
    import resource
    edf(tmp_path / "src" / "a.edf", 60)
    done = command("import", tmp_path / "src", tmp_path / "out",
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "stopped" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_import_killed_at_any_moment_leaves_only_whole_recordings(tmp_path):
    for i in range(6):
        edf(tmp_path / "src" / f"p{i}" / "x.edf", 300)
    arguments = [sys.executable, ROOT / "data.py", "import", tmp_path / "src", tmp_path / "out",
                 "--workers", "2"]
    for wait in (2.0, 3.5):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while any(alive(pid) for pid in workers):       # they follow the import
            assert time.monotonic() < end
            time.sleep(0.05)
        for path in (tmp_path / "out").rglob("*.h5"):
            assert data.load_recording(path)["samples"] == 300 * 256
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert len(data.open_corpus(tmp_path / "out")) == 6
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_import_with_one_line(tmp_path, workers):
    for i in range(16):
        edf(tmp_path / "src" / f"{i}.edf", 120)
    arguments = [sys.executable, ROOT / "data.py", "import", tmp_path / "src", tmp_path / "out",
                 "--workers", str(workers)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any((tmp_path / "out").glob("*.h5")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "data.py: stopped: interrupted; the same command goes on from here"
    assert not list((tmp_path / "out").glob("*.part"))
    assert subprocess.run(arguments, capture_output=True).returncode == 0


def test_two_imports_at_once_are_refused(tmp_path):
    edf(tmp_path / "src" / "a.edf")
    data.import_corpus(tmp_path / "src", tmp_path / "out", say=lambda text: None)
    import fcntl
    with open(tmp_path / "out" / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = command("import", tmp_path / "src", tmp_path / "out")
    assert done.returncode == 2 and "another import" in done.stderr


def test_strange_folders(tmp_path):
    """A folder named x.edf, loops and dead links, a pipe, two files with one target, names outside ASCII,
    no permission."""
    src = tmp_path / "src"
    edf(src / "x.edf" / "inner.edf")
    edf(src / "zähler ü" / "größe.edf")
    edf(src / "twice.edf")
    shutil.copy(src / "twice.edf", src / "twice.EDF")
    (src / "x.edf" / "loop").symlink_to(src)
    (src / "gone.edf").symlink_to(src / "nothing")
    os.mkfifo(src / "pipe.edf")
    report = data.import_corpus(src, tmp_path / "out", say=lambda text: None)
    assert sorted(report.read) == ["twice", "x.edf/inner", "zähler ü/größe"]
    why = {Path(path).name: reason for path, reason in report.refused}
    assert why["gone.edf"] == "gone.edf: No such file or directory" and "regular" in why["pipe.edf"]
    assert len(why) == 3
    assert "same name as" in why["twice.edf"] + why.get("twice.EDF", "")
    named = tmp_path / "named"
    edf(named / "good.edf")
    for name in (b"not \xff utf-8.edf", b"two\nlines.edf"):
        shutil.copy(named / "good.edf", os.path.join(os.fsencode(named), name))
    edf(named / "unlabelled.edf")
    (named / "unlabelled_events.tsv").symlink_to(src / "nothing")       # labels that were not fetched
    done = command("import", named, tmp_path / "out3")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "1 read" in done.stdout
    assert done.stdout.count("its name holds a line break or is not UTF-8") == 2
    assert "unlabelled_events.tsv: No such file" in done.stdout
    assert "3 refused" in command("import", named, tmp_path / "out3").stdout
    if os.getuid():
        (src / "twice.EDF").chmod(0)
        assert "Permission" in str(data.import_corpus(src, tmp_path / "out2", say=lambda text: None).refused)


def test_parallel_and_serial_import_agree(synthetic, tmp_path, corpus):
    data.import_corpus(synthetic[0], tmp_path / "out", workers=2, say=lambda text: None)
    again = data.open_corpus(tmp_path / "out")
    assert data.fingerprint(again) == data.fingerprint(corpus)
    assert all(np.array_equal(a.view(), b.view()) for a, b in zip(again, corpus))


def test_synthetic_recordings_depend_on_the_seed_alone(synthetic, tmp_path):
    data.synth(tmp_path / "again", hours=0.5, patients=4, seed=3)
    files = sorted(p.relative_to(synthetic[0]) for p in synthetic[0].rglob("*.*"))
    assert files and all((synthetic[0] / f).read_bytes() == (tmp_path / "again" / f).read_bytes()
                         for f in files)
    with pytest.raises(data.DataError, match="not empty"):
        data.synth(synthetic[0])
    with pytest.raises(data.DataError, match="finite"):
        data.synth(tmp_path / "endless", hours=float("inf"))


def test_the_real_recordings_import_in_the_bipolar_montage(shared, tmp_path):
    report = data.import_corpus(shared / "eeg" / "recordings", tmp_path / "out", montage="bipolar",
                                say=lambda text: None)
    assert len(report.read) == 46 and report.unlabelled == 1
    recordings = data.open_corpus(tmp_path / "out")
    train, dev = data.split_patients(recordings, ["chb02"])
    assert {r.patient for r in train} == {"chb01", "chb03", "mmi001"}
    assert {r.patient for r in dev} == {"chb02"}
    assert sum(len(r.events) for r in recordings) == 17
    w = data.Windows(train)
    assert len(w.epoch(0, 1)) > 0 and set(w.kind) == {0, 1, 2}


# ---- corpus ----

def test_index_is_never_trusted_over_the_files(synthetic, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(synthetic[1], out)
    first = data.open_corpus(out)
    with h5py.File(first[0].path, "r+") as f:
        f.attrs["patient"] = "somebody else"
    os.utime(first[0].path)
    assert data.open_corpus(out)[0].patient == "somebody else"
    (out / data.INDEX).write_text("{half")
    assert len(data.open_corpus(out)) == len(first)
    Path(first[1].path).unlink()
    assert len(data.open_corpus(out)) == len(first) - 1
    with pytest.raises(data.DataError, match="changed since"):
        first[0].read(0, 10)


def test_damaged_foreign_and_mixed_files_are_named(synthetic, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(synthetic[1], out)
    victim = Path(data.open_corpus(out)[0].path)
    whole = victim.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"x" * 5000):
        victim.write_bytes(content)
        with pytest.raises(data.DataError, match=victim.name):
            data.open_corpus(out)
    victim.write_bytes(whole)
    for name, value in (("scale", np.full(19, np.nan, np.float32)), ("norm", 0.0), ("format", 99),
                        ("montage", "other")):
        with h5py.File(victim, "r+") as f:
            f.attrs[name] = value
        with pytest.raises(data.DataError):
            data.open_corpus(out)
        victim.write_bytes(whole)
    with h5py.File(victim, "w") as f:
        f["something"] = 1
    with pytest.raises(data.DataError, match="not a whole recording"):
        data.open_corpus(out)
    with pytest.raises(data.DataError, match="no such folder"):
        data.open_corpus(tmp_path / "nowhere")


def fake(patient, split="", events=((10, 40),), samples=120 * 256, labelled=True, name=None):
    eeg = np.zeros((19, samples), np.int16)
    eeg[:] = np.arange(samples) % 30_000
    return data.Recording("", name or f"{patient}{split}", patient, split, "referential", NAMES, 256, samples,
                          np.full(19, 0.1, np.float32), 10.0, labelled,
                          np.array(events, float).reshape(-1, 2), "x", memory=eeg)


def test_splits_are_disjoint_by_person():
    def patients(part):
        return {r.patient for r in part}
    people = [fake(p) for p in ("a", "b", "c", "chb01", "chb21", "chb02")]
    train, dev = data.split_patients(people, ["chb01"])
    assert patients(dev) == {"chb01", "chb21"} and not patients(train) & patients(dev)
    for seed in range(20):
        train, dev = data.split_patients(people, seed=seed)
        assert train and dev
        assert not {data.person(r.patient) for r in train} & {data.person(r.patient) for r in dev}
        assert ("chb01" in patients(dev)) == ("chb21" in patients(dev))
    own = [fake("a", "train"), fake("b", "dev"), fake("c", "eval"), fake("d", "train", labelled=False)]
    assert [patients(part) for part in data.split_patients(own)] == [{"a"}, {"b"}]
    for recordings, wanted, reason in (([*own, fake("a", "dev")], [], "both train and dev"),
                                       (people, ["nobody"], "nobody"),
                                       ([fake("a")], [], "both are needed"),
                                       ([fake("a", labelled=False)], [], "0 labelled")):
        with pytest.raises(data.DataError, match=reason):
            data.split_patients(recordings, wanted)
    mixed = [fake("a"), fake("b"), *(fake(f"h{i}", events=()) for i in range(8))]
    for seed in range(10):
        train, dev = data.split_patients(mixed, seed=seed)
        assert any(len(r.events) for r in train) and any(len(r.events) for r in dev)


# ---- windows ----

def test_a_window_wholly_inside_a_seizure_is_labelled_seizure():
    """BIOT's CHB-MIT pipeline labels a window by the onsets and ends inside it: such a window became
    background."""
    r = fake("a", events=((20, 100),))
    w = data.Windows([r], seconds=10, stride=5)
    full = np.flatnonzero((w.start >= 20 * 256) & (w.start + w.length <= 100 * 256))
    assert (w.kind[full] == 2).all() and r.labels(int(w.start[full[0]]), w.length).all()
    assert (w.kind[w.start + w.length <= 20 * 256] == 0).all() and (w.kind[(w.start == 15 * 256)] == 1).all()


@pytest.mark.parametrize("samples", [1, 100, 1792, 15359, 15360, 15361, 24320, 30720])
def test_windows_cover_every_sample(samples):
    w = data.Windows([fake("a", samples=samples, events=())], 60, 10)
    seen = np.zeros(samples, bool)
    for start in w.start:
        seen[start:start + w.length] = True
    assert seen.all() and (w.start >= 0).all() and (len(w) == 1 or (w.start + w.length <= samples).all())


def test_short_recordings_are_padded_with_a_mask():
    w = data.Windows([fake("a", samples=700, events=((0, 2.0),))], 4, 1)
    (x, y, mask), = data.Loader(w).batches([[0]], 1)
    assert x.shape == (1, 19, 1024) and mask.sum() == 700 and y.sum() == 512
    assert (x[..., 700:] == 0).all() and w.kind[0] == 1


def test_epochs_are_balanced_drawn_anew_and_show_all_background():
    w = data.Windows([fake(str(i), samples=600 * 256, events=((100, 190), (300, 330)) if i < 2 else ())
                      for i in range(6)], 20, 5)
    partial, full = (w.kind == 1).sum(), (w.kind == 2).sum()
    one, same, two = w.epoch(1, 1), data.Windows(w.recordings, 20, 5).epoch(1, 1), w.epoch(1, 2)
    np.testing.assert_array_equal(one, same)
    counts = np.bincount(w.kind[one], minlength=3)
    assert counts.tolist() == [round(2.5 * partial), partial, round(0.3 * partial)] and full > counts[2]
    assert set(one[w.kind[one] == 1]) == set(np.flatnonzero(w.kind == 1)) and not np.array_equal(one, two)
    seen = set()
    for epoch in range(1, 12):
        ids = w.epoch(1, epoch)
        seen |= set(ids[w.kind[ids] == 0])
    assert seen == set(np.flatnonzero(w.kind == 0))
    assert sorted(w.epoch(1, 1, background=None)) == list(range(len(w)))


def test_impossible_draws_are_errors_that_say_what_to_do():
    short = data.Windows([fake("a", events=((10, 14),))], 20, 5)
    with pytest.raises(data.DataError, match="full_per_partial"):
        short.epoch(0, 1)
    assert len(short.epoch(0, 1, full=0))
    with pytest.raises(data.DataError, match="balanced"):
        data.Windows([fake("a", events=())], 20, 5).epoch(0, 1)
    with pytest.raises(data.DataError, match="ratio"):
        short.epoch(0, 1, full=float("nan"))
    with pytest.raises(data.DataError, match="labelled"):
        data.Windows([fake("a", labelled=False)])


# ---- loader ----

def plan(w, size=4, count=6):
    ids = w.epoch(0, 1)
    return [ids[i * size:(i + 1) * size] for i in range(count)]


def test_batches_are_the_recordings_own_samples(corpus):
    w = data.Windows(corpus, 10, 5)
    for ids, (x, y, mask) in zip(plan(w), data.Loader(w).batches(plan(w), 1)):
        for k, window in enumerate(ids):
            r, start = w.recordings[w.recording[window]], int(w.start[window])
            right = r.read(start, w.length) * r.scale[:, None] / np.float32(r.norm)
            np.testing.assert_allclose(x[k], right, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(y[k], r.labels(start, w.length))
        assert x.dtype == y.dtype == mask.dtype == torch.float32
        eeg, scale = torch.from_numpy(r.read(start, w.length)), torch.from_numpy(r.scale)
        # evaluation computes the same
        assert torch.equal(data.normalise(eeg, scale, torch.tensor(r.norm)), x[-1])


def test_batches_stay_valid_after_the_ring_went_round(corpus):
    w = data.Windows(corpus, 10, 5)
    kept = [x.clone() for x, _, _ in data.Loader(w, buffers=2).batches(plan(w), 1)]
    late = [x for x, _, _ in data.Loader(w, buffers=2).batches(plan(w), 1)]
    assert all(torch.equal(a, b) for a, b in zip(kept, late))
    loader, views = data.Loader(w, buffers=2), []
    # a view, or what autograd keeps, counts as holding the batch
    for x, _, _ in loader.batches(plan(w), 1):
        views.append((x[:, :3].detach() * torch.ones(1, requires_grad=True)).grad_fn
                     if len(views) % 2 else x[1:, 5])
        del x
    assert all(torch.equal(v, k[1:, 5]) for v, k in zip(views[::2], kept[::2]))
    assert all(torch.equal(g._saved_self, k[:, :3]) for g, k in zip(views[1::2], kept[1::2]))
    views.clear()
    for x, _, _ in loader.batches(plan(w, count=20), 1):
        pass
    assert len(loader._outputs) <= 7


def test_order_empty_lists_and_uneven_batches(corpus):
    w = data.Windows(corpus, 10, 5)
    got = list(data.Loader(w).batches([[0, 1, 2], [], [5], []], 1))
    assert [None if b is None else len(b[0]) for b in got] == [3, None, 1, None]
    assert list(data.Loader(w).batches([], 1)) == []


def test_augmentation_depends_on_seed_epoch_and_window_alone(corpus):
    w = data.Windows(corpus, 10, 5)

    def batch(lists, seed=1, epoch=1):
        return torch.cat([b[0] for b in data.Loader(w, seed=seed, augment=True).batches(lists, epoch)])
    ids = w.epoch(0, 1)[:12]
    a, b = batch([ids]), batch([ids[:5], ids[5:7], ids[7:]])
    assert torch.equal(a, b)
    assert not torch.equal(a, batch([ids], epoch=2)) and not torch.equal(a, batch([ids], seed=2))
    plain = torch.cat([b[0] for b in data.Loader(w).batches([ids], 1)])
    flip = data.mirror(NAMES)
    assert [NAMES[i] for i in flip[:9]] == "Fp2 F4 C4 P4 O2 F8 T4 T6 Fz".split()
    gains = [min(((a[i] - g * p[order]).abs().max().item(), g) for order in (slice(None), flip)
                 for p in [plain[i]] for g in [a[i].norm().item() / p.norm().item()]) for i in range(12)]
    assert max(error for error, _ in gains) < 1e-3 and np.std([g for _, g in gains]) > 0.05
    assert len(data.mirror(data.BIPOLAR)) == 18


def test_closing_early_and_errors_leave_no_thread(corpus):
    w, before = data.Windows(corpus, 10, 5), threading.active_count()
    loader = data.Loader(w, buffers=2)
    batches = loader.batches(plan(w, count=20), 1)
    next(batches)
    batches.close()
    assert threading.active_count() == before and loader.waited > 0
    with pytest.raises(IndexError):
        list(loader.batches([[0], [10 ** 9]], 1))
    assert threading.active_count() == before
    assert len(list(loader.batches([[1, 2]], 1))) == 1   # still usable


def in_child(recordings, ids, queue):
    w = data.Windows(recordings, 10, 5)
    queue.put([float(x.sum()) for x, _, _ in data.Loader(w).batches(ids, 1)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_works_in_child_processes(corpus, method):
    w = data.Windows(corpus, 10, 5)
    right = [float(x.sum()) for x, _, _ in data.Loader(w).batches(plan(w), 1)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=in_child, args=(corpus, plan(w), queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [right, right]
    for child in children:
        child.join()


def test_more_recordings_than_files_may_be_open(synthetic):
    code = ("import resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import data\nrecordings = data.open_corpus(sys.argv[2])\n"
            "import shutil, tempfile, pathlib\n"
            "out = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[3]))\n"
            "for i in range(100): shutil.copy(recordings[0].path, out / f'{i}.h5')\n"
            "many = data.open_corpus(out)\nassert len(many) == 100\n"
            "assert len({r.read(5, 9).tobytes() for r in many + many}) == 1")
    assert subprocess.run([sys.executable, "-c", code, ROOT, synthetic[1],
                           synthetic[1].parent]).returncode == 0


# ---- synthetic recordings ----

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
    data.synth(tmp_path / "edf", hours=1.0, patients=8, seed=11)
    data.import_corpus(tmp_path / "edf", tmp_path / "h5", say=lambda text: None)
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
