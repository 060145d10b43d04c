"""eeg/edf.py: what is read, what is refused. Real files; the oracles are mne and pyedflib."""

import re
from fractions import Fraction

import numpy as np
import pytest

from eeg import corpora, edf
from conftest import NAMES, mark, microvolts, plus, prepare, write_edf


def refusal(path, montage="referential", **settings):
    with pytest.raises(edf.DataError) as error:
        prepare(path, montage, **settings)
    text = str(error.value)
    assert str(path) in text and "\n" not in text, text
    return text


def test_microvolts_are_those_of_mne_and_pyedflib(tmp_path):
    """Before filtering ours is digital * gain + offset; after it, mne's own zero-phase filter gives
    the same samples."""
    import pyedflib

    path = write_edf(
        tmp_path / "a.edf",
        pmin="-1000",
        pmax="500",
        dmin="-2000",
        dmax="4000",
        eeg=np.random.default_rng(0).normal(0, 300, (19, 20 * 256)).clip(-2000, 4000),
    )
    header = edf.read_header(path)
    records = np.memmap(path, "<i2", "r", header.offset, (20, 19 * 256))
    with pyedflib.EdfReader(str(path)) as reader:
        for i in (0, 7, 18):
            gain, offset = edf.calibration(header, records, i, "")
            ours = records[:, i * 256 : (i + 1) * 256].reshape(-1) * gain + offset
            np.testing.assert_allclose(ours, reader.readSignal(i), atol=1e-6)
    mne = pytest.importorskip("mne")
    raw = mne.io.read_raw_edf(path, preload=True, verbose="error")
    x = raw.get_data() * 1e6
    x -= np.median(x, 1, keepdims=True)
    x = mne.filter.filter_data(
        x,
        256,
        0.5,
        120,
        l_trans_bandwidth=0.5,
        h_trans_bandwidth=0.5,
        filter_length=1691,
        fir_design="firwin",
        phase="zero",
        verbose="error",
    )
    ours = prepare(path, notch="0")
    middle = slice(1000, -1000)
    assert np.corrcoef(microvolts(ours)[3, middle], x[3, middle])[0, 1] > 0.998


@pytest.mark.parametrize(
    "rate, per_record, duration",
    [
        (100, 100, "1"),
        (160, 160, "1"),
        (250, 250, "1"),
        (400, 400, "1"),
        (512, 512, "1"),
        (Fraction(513, 2), 513, "2"),
        (200, 20, "0.1"),
        (500, 500, "+1.0E0"),
        (1000, 1000, "1."),
    ],
)
def test_any_rational_rate_keeps_times_and_amplitudes(tmp_path, rate, per_record, duration):
    """A 7 Hz sine of 100 uV comes out as the same sine at 256 Hz, in phase, to 1 %."""
    records = int(40 / float(duration))
    n = records * per_record
    wave = 1000 * np.sin(2 * np.pi * 7 * np.arange(n) / float(rate))
    path = write_edf(
        tmp_path / "a.edf", records, per_record, eeg=np.tile(wave, (19, 1)), duration=duration
    )
    r = prepare(path)
    assert r.source_fs == float(rate) and abs(r.seconds - n / float(rate)) < 1 / 256
    t = np.arange(r.samples) / 256
    inside = slice(r.samples // 4, -r.samples // 4)
    assert abs(microvolts(r)[5] - 100 * np.sin(2 * np.pi * 7 * t))[inside].max() < 1


def test_the_filter_takes_out_offset_drift_and_mains_without_delay(tmp_path):
    t = np.arange(60 * 256) / 256
    wave = np.sin(2 * np.pi * 10 * t) * 500
    noise = (
        20000
        + 3000 * np.sin(2 * np.pi * 0.05 * t)
        + sum(400 * np.sin(2 * np.pi * f * t) for f in (50, 60, 100))
    )
    r = prepare(write_edf(tmp_path / "a.edf", 60, eeg=np.tile(wave + noise, (19, 1))))
    inside = slice(8 * 256, -8 * 256)
    assert abs(microvolts(r)[0] - wave / 10)[inside].max() < 0.6
    kept = prepare(tmp_path / "a.edf", notch="50")
    spectrum = (
        abs(np.fft.rfft(microvolts(kept)[0, inside])) / (inside.stop - inside.start + r.samples) * 2
    )
    f = np.fft.rfftfreq(r.samples - 16 * 256, 1 / 256)
    assert spectrum[np.argmin(abs(f - 60))] > 39 and spectrum[np.argmin(abs(f - 50))] < 0.5


def test_rounding_error_is_below_the_amplifiers_step(tmp_path):
    eeg = np.random.default_rng(0).normal(0, 100, (19, 30 * 256))
    eeg[2, 1000:1010] = 32767  # an artefact over the whole range
    eeg[3] = eeg[3] / 20
    path = write_edf(tmp_path / "a.edf", 30, eeg=eeg)
    r = prepare(path)
    assert (r.scale / 2 <= 0.1).all()
    header = edf.read_header(path)
    records = np.memmap(path, "<i2", "r", header.offset, (30, 19 * 256))
    for c in (2, 3):
        x = header.block(records, c).reshape(-1).astype(np.float32) * np.float32(0.1)
        exact = edf.prepare_row(x, Fraction(256), (50, 60))
        assert abs(microvolts(r)[c] - exact).max() <= 0.1


@pytest.mark.parametrize(
    "spelling",
    ["{}", "EEG {}-REF", "EEG {}-LE", "EEG {}", "{}.", "{}..", "EEG {}-Avg", " {}", "{}-AR"],
)
@pytest.mark.parametrize("case", [str.upper, str.lower, str.title])
def test_every_spelling_of_the_electrodes_is_known(spelling, case):
    for name in NAMES:
        assert edf.channel(case(spelling.format(name)))[0] == name
    assert [edf.channel(old)[0] for old in ("T7", "EEG T8-REF", "p7", "P8")] == [
        "T3",
        "T4",
        "T5",
        "T6",
    ]


def test_auxiliary_channels_are_not_electrodes():
    for label in (
        "EKG1",
        "EEG EKG1-REF",
        "ECG",
        "EMG",
        "PHOTIC-REF",
        "IBI",
        "BURSTS",
        "SUPPR",
        "SPO2",
        "HR",
        "MK",
        "A1",
        "EEG A2-REF",
        "SP1",
        "EEG T1-REF",
        "EEG C3P-REF",
        "EEG 29-REF",
        "-",
        "--0",
        "",
        "Fc5",
        "EDF Annotations",
        "F3-F3",
        "T7-FT9",
    ):
        assert edf.channel(label) is None, label


def test_channel_order_in_the_file_does_not_matter(tmp_path):
    eeg = np.random.default_rng(0).normal(0, 300, (19, 20 * 256))
    order = np.random.default_rng(1).permutation(19)
    a = prepare(write_edf(tmp_path / "a.edf", eeg=eeg))
    b = prepare(write_edf(tmp_path / "b.edf", eeg=eeg[order], labels=[NAMES[i] for i in order]))
    np.testing.assert_array_equal(a.memory, b.memory)


def test_bipolar_from_referential_is_the_difference(tmp_path):
    path = write_edf(tmp_path / "a.edf")
    one, two = prepare(path), prepare(path, "bipolar")
    x = microvolts(one)
    for row, name in zip(microvolts(two), two.channels):
        a, b = name.split("-")
        np.testing.assert_allclose(row, x[NAMES.index(a)] - x[NAMES.index(b)], atol=0.3)


def chb_labels():
    old = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
    return ["-".join(old.get(p, p) for p in name.split("-")).upper() for name in edf.BIPOLAR] + [
        "P7-T7",
        "T7-FT9",
        "T8-P8",
    ]


def test_chb_channels_with_t8_p8_twice(tmp_path):
    labels = chb_labels()
    eeg = np.random.default_rng(0).normal(0, 300, (len(labels), 20 * 256))
    eeg[-1] = eeg[labels.index("T8-P8")]
    same = prepare(write_edf(tmp_path / "a.edf", labels=labels, eeg=eeg), "bipolar")
    assert same.notes == ""
    eeg[-1] += 50
    other = prepare(write_edf(tmp_path / "b.edf", labels=labels, eeg=eeg), "bipolar")
    assert "stands twice" in other.notes
    np.testing.assert_array_equal(same.memory, other.memory)
    assert "--montage bipolar" in refusal(tmp_path / "a.edf")
    assert "F7-T3" in refusal(
        write_edf(tmp_path / "c.edf", labels=["X"] + labels[1:5] + ["X"] + labels[6:]), "bipolar"
    )


def test_missing_fz_and_pz_are_interpolated_like_mne_does_and_recorded(tmp_path):
    labels = [n for n in NAMES if n not in ("Fz", "Pz")]
    smooth = edf.positions(labels) @ np.random.default_rng(0).normal(0, 400, (3, 20 * 256))
    path = write_edf(tmp_path / "a.edf", labels=labels, eeg=smooth)
    r = prepare(path)
    assert "Fz is missing, interpolated" in r.notes and "Pz is missing" in r.notes
    smooth = edf.positions(NAMES) @ np.random.default_rng(0).normal(0, 400, (3, 20 * 256))
    full = prepare(write_edf(tmp_path / "b.edf", eeg=smooth))
    for name in ("Fz", "Pz"):  # a field linear over the head comes back
        a, b = (microvolts(x)[NAMES.index(name)] for x in (r, full))
        assert np.corrcoef(a, b)[0, 1] > 0.98 and 0.8 < a.std() / b.std() < 1.25
    pytest.importorskip("mne")
    from mne.channels.interpolation import _make_interpolation_matrix

    theirs = _make_interpolation_matrix(edf.positions(labels), edf.positions(["Fz", "Pz"]))
    np.testing.assert_allclose(edf.spline(tuple(labels), ("Fz", "Pz")), theirs, atol=1e-3)
    assert "Cz" in refusal(
        write_edf(tmp_path / "c.edf", labels=["X" if n == "Cz" else n for n in NAMES])
    )


def opinion(path):
    """[(label, samples, physical and digital minimum and maximum)] of the EEG signals by pyedflib;
    None where it refuses the file."""
    import pyedflib

    try:
        reader = pyedflib.EdfReader(str(path), pyedflib.DO_NOT_READ_ANNOTATIONS)
    except OSError:
        return None
    with reader:
        ranges = (
            reader.getPhysicalMinimum,
            reader.getPhysicalMaximum,
            reader.getDigitalMinimum,
            reader.getDigitalMaximum,
        )
        return [
            (reader.getLabel(i).strip(), int(reader.getNSamples()[i]), *(get(i) for get in ranges))
            for i in range(reader.signals_in_file)
        ]


def ours(path):
    header = edf.read_header(path)
    fields = header.signals
    return [
        (
            fields["label"][i],
            header.records * fields["count"][i],
            *(
                float(edf.number(fields[key][i], key, []))
                for key in ("pmin", "pmax", "dmin", "dmax")
            ),
        )
        for i in range(len(fields["label"]))
        if fields["label"][i] != "EDF Annotations"
    ]


def test_where_pyedflib_opens_a_file_too_it_sees_the_same_signals(tmp_path, shared):
    """Labels, lengths and ranges of every real, odd or hand-made file that both readers take."""
    paths = sorted((shared / "eeg").rglob("*.edf"))[::3]
    paths += [write_edf(tmp_path / f"{kind}.edf", **fields) for kind, (fields, _) in MENDED.items()]
    compared = 0
    for path in paths:
        try:
            mine = ours(path)
        except edf.DataError:
            continue
        theirs = opinion(path)
        if theirs is not None:
            compared += 1
            assert [row[:2] for row in mine] == [row[:2] for row in theirs], path
            np.testing.assert_allclose(
                [row[2:] for row in mine], [row[2:] for row in theirs], err_msg=str(path)
            )
    assert compared > 100


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
    "equal physical range": (
        dict(pmin={3: "5"}, pmax={3: "5"}),
        "P3: physical minimum and maximum are both 5",
    ),
    "inverted digital range": (dict(dmin={3: "32767"}, dmax={3: "-32768"}), "sign"),
    "equal digital range": (dict(dmin={3: "0"}, dmax={3: "0"}), "P3"),
    "digital range beyond 16 bits": (dict(dmin="-8388608", dmax="8388607"), "16 bits"),
    "samples beyond the digital range": (
        dict(dmin="-100", dmax="100"),
        "its header says -100 to 100",
    ),
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
    "mixed references": (
        dict(label=["EEG %s-%s" % (n, "REF" if n < "P" else "LE") for n in NAMES]),
        "different references",
    ),
    "a label twice": (dict(label=["Fp1", *NAMES[:18]]), ""),
    "a line break in a label": (dict(label={2: "C\n\r\x85X3"}), "C  ?X3"),
    "a long dash for a minus": (dict(pmin="\x96200", pmax="800"), "not a number"),
    "latin-1 in a label": (dict(label={2: "EEG \xdc3"}), "C3"),
    "EDF+D without onsets": (dict(reserved="EDF+D"), "discontinuous"),
    "one channel in millivolts": (dict(unit={3: "mV"}), "different units: mv, uv"),
    "a range that no amplifier has": (dict(pmax={3: "1e30"}), "P3: a range of 1e+30 uV"),
    "an exponent that fills the memory": (dict(pmax={3: "1e999999"}), "not a number"),
    "a count that fills the memory": (dict(records="9e999999"), "not a number"),
    "signals that fill the memory": (dict(signals="1e9"), "the header of 1000000000 signals needs"),
    "more signals than a number holds": (dict(signals="9e99"), "signals needs"),
    "all flat": (dict(eeg=np.zeros((19, 20 * 256))), "19 of 19 channels are flat"),
    "constant": (dict(eeg=np.full((19, 20 * 256), 700.0)), "flat"),
    "too slow": (dict(rate=32), "32 Hz"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_headers_are_refused_with_one_line(tmp_path, kind):
    fields, reason = BROKEN[kind]
    assert reason in refusal(write_edf(tmp_path / "a.edf", **fields))


MENDED = {
    "unfinished": (dict(records="-1"), "record count -1 read as 20"),
    "unfinished with half a record": (
        dict(records="-1", tail=b"\1" * 3000),
        "unfinished last record left out",
    ),
    "garbage at the end": (dict(tail=b"\1" * 1234), "1234 bytes after the last record"),
    "header length": (dict(bytes="512"), "header length 512 read as 5120"),
    "date with colons": (dict(date="01:01:85"), ""),
    "decimal comma": (dict(pmin="-3276,8", pmax="3276,7"), "decimal comma"),
    "latin-1 patient": (dict(patient="M\xfcller"), ""),
    "micro sign": (dict(unit="\xb5V"), None),
    "utf-8 micro sign": (dict(unit="\xc2\xb5V"), None),
    "millivolts": (dict(unit="mV", pmin="-3.2768", pmax="3.2767"), ""),
    "nanovolts": (dict(unit="nV", pmin="-3276800", pmax="3276700"), ""),
    "exponents": (dict(pmin="-3.277E3", pmax="+3.277e3"), None),
    "signs and blanks": (dict(pmax="+3276.7", dmax="+32767", records="+20"), None),
    "capital unit": (dict(unit="UV"), ""),
    "fields filled with NUL": (
        {key: value.ljust(8, "\0") for key, value in
         dict(version="0", records="20", duration="1", bytes="5120", count="256").items()},
        "",
    ),
}


@pytest.mark.parametrize("kind", MENDED)
def test_odd_but_clear_headers_are_read_rightly(tmp_path, kind):
    fields, note = MENDED[kind]
    r, right = prepare(write_edf(tmp_path / "a.edf", **fields)), prepare(
        write_edf(tmp_path / "b.edf")
    )
    np.testing.assert_allclose(microvolts(r), microvolts(right), rtol=2e-4, atol=0.02)
    if note is not None:
        assert note in r.notes if note else r.notes == ""


def test_blank_unit_can_be_given(tmp_path):
    r = prepare(write_edf(tmp_path / "a.edf", unit=""), blank_unit="uV")
    np.testing.assert_array_equal(r.memory, prepare(write_edf(tmp_path / "b.edf")).memory)
    assert r.prepared != prepare(tmp_path / "b.edf").prepared


def test_negative_gain_turns_the_sign(tmp_path):
    eeg = np.random.default_rng(1).normal(0, 300, (19, 20 * 256))
    a = prepare(write_edf(tmp_path / "a.edf", eeg=eeg, pmin="3276.8", pmax="-3276.7"))
    b = prepare(write_edf(tmp_path / "b.edf", eeg=-eeg))
    assert "negative gain" in a.notes
    np.testing.assert_allclose(microvolts(a), microvolts(b), atol=0.2)


def test_an_electrode_without_signal_is_noted_in_either_montage(tmp_path):
    eeg = np.random.default_rng(1).normal(0, 300, (19, 20 * 256))
    eeg[1] = 7
    path = write_edf(tmp_path / "a.edf", eeg=eeg)
    assert prepare(path).notes == "flat: F3"
    assert prepare(path, "bipolar").notes == "constant, and in derivations with others: F3"


def test_one_channel_whose_range_is_wrong_is_noted(tmp_path):
    fields = dict(pmin={4: "-3276800", 6: "-3.2768"}, pmax={4: "3276700", 6: "3.2767"})
    notes = prepare(write_edf(tmp_path / "a.edf", **fields)).notes
    wanted = r"amplitude that is not scalp EEG: O1 \(2.\d*e\+04 uV\), T3 \(0.02\d* uV\)"
    assert re.fullmatch(wanted, notes)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write_edf(tmp_path / "a.edf", 3).read_bytes()
    cuts = [
        0,
        1,
        8,
        184,
        255,
        256,
        300,
        2000,
        5119,
        5120,
        5121,
        5120 + 9728,
        5120 + 9729,
        len(whole) - 1,
    ]
    for cut in cuts + list(np.random.default_rng(0).integers(0, len(whole), 40)):
        (tmp_path / "cut.edf").write_bytes(whole[:cut])
        refusal(tmp_path / "cut.edf")


def test_mixed_rates_of_eeg_channels_are_refused_and_of_others_ignored(tmp_path):
    labels = [*NAMES, "IBI", "SUPPR"]
    record = np.random.default_rng(0).integers(-900, 900, (20, 19 * 256 + 2)).astype("<i2")
    dull = np.zeros((21, 20 * 256))
    good = write_edf(
        tmp_path / "a.edf",
        labels=labels,
        eeg=dull,
        body=record.tobytes(),
        count={19: "1", 20: "1"},
        unit={19: "sec", 20: "%"},
        pmin={19: "0"},
        pmax={19: "0"},
    )
    r = prepare(good)
    eeg = record[:, : 19 * 256].reshape(20, 19, 256).transpose(1, 0, 2).reshape(19, -1)
    plain = write_edf(tmp_path / "b.edf", eeg=eeg)
    np.testing.assert_array_equal(r.memory, prepare(plain).memory)
    slow = np.random.default_rng(0).integers(-900, 900, (20, 18 * 256 + 128)).astype("<i2")
    assert "different rates: 128, 256" in refusal(
        write_edf(tmp_path / "c.edf", body=slow.tobytes(), count={4: "128"})
    )


def test_gaps_are_refused_also_where_the_file_calls_itself_continuous(tmp_path):
    for kind in ("EDF+D", "EDF+C"):
        assert "gap of 10 s after 5 s" in refusal(
            plus(tmp_path / "a.edf", [*range(5), *range(15, 20)], kind)
        )
        assert "gap of 0.5 s" in refusal(plus(tmp_path / "b.edf", [0, 1.5, 2.5, 3.5], kind))
        assert "gap" in refusal(plus(tmp_path / "c.edf", [0, 1, 1, 2, 3], kind))
    whole = prepare(plus(tmp_path / "d.edf", range(10)))
    assert "without a gap" in whole.notes and whole.seconds == 10
    assert prepare(plus(tmp_path / "e.edf", np.arange(10) + 0.25, "EDF+C")).notes == ""
    (tmp_path / "f.edf").write_bytes(
        (tmp_path / "d.edf").read_bytes().replace(b"+3\x14", b"xx\x14")
    )
    assert "no onset" in refusal(tmp_path / "f.edf")


def test_annotations_are_those_of_mne_and_pyedflib(tmp_path):
    """Written by pyedflib: texts beyond ASCII, without and with a duration, between two samples."""
    import pyedflib

    path = tmp_path / "a.edf"
    wanted = [
        (0.0, None, "Recording starts"),
        (2.5, 1.25, "Anfall \xe4\xf6"),
        (2.5, None, "eyes \u0394"),
        (7.125, 12.5, "sz"),
    ]
    with pyedflib.EdfWriter(str(path), 1, pyedflib.FILETYPE_EDFPLUS) as writer:
        writer.setSignalHeader(
            0,
            {
                "label": "F7",
                "dimension": "uV",
                "sample_frequency": 256,
                "physical_min": -3000,
                "physical_max": 3000,
                "digital_min": -32768,
                "digital_max": 32767,
                "transducer": "",
                "prefilter": "",
            },
        )
        writer.writeSamples([np.zeros(20 * 256)])
        for onset, duration, text in wanted:
            writer.writeAnnotation(onset, -1 if duration is None else duration, text)
    found = edf.read_annotations(edf.read_header(path))
    assert sorted(found, key=str) == sorted(wanted, key=str)
    with pyedflib.EdfReader(str(path)) as reader:
        onsets, durations, texts = reader.readAnnotations()
    assert sorted(zip(onsets, texts)) == sorted((onset, text) for onset, _, text in found)
    mne = pytest.importorskip("mne")
    theirs = mne.read_annotations(path)
    assert sorted(theirs.description) == sorted(text for _, _, text in found)
    assert sorted(theirs.onset) == sorted(onset for onset, _, _ in found)


@pytest.mark.parametrize(
    "raw, wanted",
    [
        (b"+1\x14a\x14b\x14\0", [(1, None, "a"), (1, None, "b")]),  # two texts of one onset
        (b"+1.50\x152.5\x14a\x14\0+2\x14c\x14\0", [(1.5, 2.5, "a"), (2, None, "c")]),
        (b"-0.5\x14before\x14\0", [(-0.5, None, "before")]),
        (b"+1\x14\x14\0", []),  # another time mark
        (b"+1\x14 two\n lines \x14\0", [(1, None, "two lines")]),
        (b"+1\x14f\xfcnf\x14\0", [(1, None, "f\xfcnf")]),  # Latin-1, against the standard
        (b"+1\x14text\0", "annotations of record 1 cannot be read"),  # not closed
        (b"1\x14text\x14\0", "annotations of record 1 cannot be read"),
        (b"+1,5\x14text\x14\0", "annotations of record 1 cannot be read"),
        (b"+1\x15x\x14text\x14\0", "annotations of record 1 cannot be read"),
        (b"+1\x14" + b"a" * 80, "annotations of record 1 cannot be read"),
    ],
)  # runs into the next record
def test_annotation_lists_are_read_to_the_letter_or_refused(tmp_path, raw, wanted):
    path = plus(tmp_path / "a.edf", range(5), "EDF+C", {0: raw})
    if isinstance(wanted, str):
        with pytest.raises(edf.DataError, match=wanted):
            edf.read_annotations(edf.read_header(path))
    else:
        assert edf.read_annotations(edf.read_header(path)) == wanted


def test_annotations_count_from_the_first_sample_and_may_lie_in_several_signals(tmp_path):
    """The first record begins 0.25 s after the header's start time: so do all onsets. A plain EDF
    has none."""
    path = plus(tmp_path / "a.edf", np.arange(5) + 0.25, "EDF+C", {2: b"+3.25\x151\x14sz\x14\0"})
    assert edf.read_annotations(edf.read_header(path)) == [(3, 1, "sz")]
    assert edf.read_annotations(edf.read_header(write_edf(tmp_path / "b.edf"))) == []
    eeg = np.zeros((5, 19 * 256), "<i2")
    rows = [
        f"+{i}\x14\x14".encode().ljust(32, b"\0") + f"+{i}.5\x14mark\x14".encode().ljust(32, b"\0")
        for i in range(5)
    ]
    both = write_edf(
        tmp_path / "c.edf",
        5,
        labels=[*NAMES, "EDF Annotations", "EDF Annotations"],
        eeg=np.zeros((21, 5 * 256)),
        body=b"".join(a.tobytes() + b for a, b in zip(eeg, rows)),
        count={19: "16", 20: "16"},
        reserved="EDF+C",
    )
    assert edf.read_annotations(edf.read_header(both)) == [
        (i + 0.5, None, "mark") for i in range(5)
    ]


def test_the_start_is_the_headers_where_it_is_a_date(tmp_path):
    for date, time, began in (
        ("02.03.24", "23.59.58", "2024-03-02 23:59:58"),
        ("01.01.85", "00.00.00", "1985-01-01 00:00:00"),
        ("01:01:85", "10:00:01", "1985-01-01 10:00:01"),
        ("31.02.24", "10.00.00", ""),
        ("XX.XX.yy", "10.00.00", ""),
        ("02.03.24", "25.00.00", ""),
        ("", "", ""),
    ):
        assert edf.read_header(write_edf(tmp_path / "a.edf", date=date, time=time)).began == began


def test_a_reduced_montage_takes_derivations_electrodes_and_labels_by_name(tmp_path):
    """Four channels of a wearable: a derivation of the file, the difference of two electrodes, an
    electrode, and a label outside the 10-20 system; refused are names that the file has not, or
    twice."""
    eeg = np.random.default_rng(0).normal(0, 300, (5, 20 * 256))
    labels = ["F8-T8", "EEG F7-REF", "EEG T7-REF", "BTEleft SD", "EKG"]
    path = write_edf(tmp_path / "a.edf", labels=labels, eeg=eeg)
    names = corpora.channel_names("f8-t4, F7-T7,T3, bteLEFT sd")
    assert names == ("F8-T4", "F7-T3", "T3", "bteLEFT sd")
    r = prepare(path, "reduced", reduced=names)
    assert r.channels == names and r.memory.shape[0] == 4
    alone = prepare(path, "reduced", reduced=("F7", "T3", "F8-T4"))
    x, y = microvolts(r), microvolts(alone)
    np.testing.assert_allclose(x[1], y[0] - y[1], atol=0.3)
    np.testing.assert_array_equal(x[0], y[2])
    assert "channel missing: Cz" in refusal(path, "reduced", reduced=("Cz",))
    assert "--montage reduced --channels" in refusal(path)
    write_edf(path, labels=["X", "x", "Cz", "Fz-Pz", "Pz-LE"], eeg=eeg)
    assert "channel missing: X" in refusal(path, "reduced", reduced=("X",))
    assert "different references" in refusal(
        write_edf(path, labels=["F7-REF", "T3-LE", "X", "Y", "Z"], eeg=eeg),
        "reduced",
        reduced=("F7-T3",),
    )
    for wrong in (
        dict(montage="reduced"),
        dict(reduced=("F7",)),
        dict(montage="reduced", reduced=("F7", "F7")),
        dict(montage="laplacian"),
        dict(notch="55"),
    ):
        with pytest.raises(edf.DataError):
            edf.Recipe(**wrong)


def test_a_reduced_montage_takes_the_very_ear_that_is_named(tmp_path):
    """A file of sleep holds C3 against one ear and against the other; whoever names one means it."""
    eeg = np.random.default_rng(0).normal(0, 300, (4, 20 * 256))
    path = write_edf(tmp_path / "a.edf", labels=["C3-A1", "C4-A1", "EEG C3-A2", "M1-M2"], eeg=eeg)
    names = corpora.channel_names("c3-a2,C4-A1|C4,EEG C3-REF")
    assert names == ("C3-A2", "C4-A1|C4", "C3")
    labels = ["C3", "C4", "F3"]
    wanted = prepare(write_edf(tmp_path / "b.edf", labels=labels, eeg=eeg[[2, 1, 0]]), "reduced",
                     reduced=tuple(labels))
    got = prepare(path, "reduced", reduced=names)
    np.testing.assert_array_equal(microvolts(got), microvolts(wanted))
    assert "channel missing: C4-A2" in refusal(path, "reduced", reduced=("C4-A2",))


def test_electrodes_of_a_reduced_montage_that_have_different_references_are_noted(tmp_path):
    path = write_edf(tmp_path / "a.edf", labels=["C3-A2", "C4-A1", "F3-A2"])
    wanted = "electrodes with different references: A1, A2"
    assert prepare(path, "reduced", reduced=("C3", "C4")).notes == wanted
    for named in (("C3", "F3"), ("C3-A2", "C4-A1"), ("C3-A2", "C4")):
        assert prepare(path, "reduced", reduced=named).notes == ""


def test_a_rate_that_no_amplifier_has_is_refused(tmp_path):
    assert "cannot be resampled to 256 Hz" in refusal(write_edf(tmp_path / "a.edf", duration="1e-9"))


def test_an_hour_in_records_of_a_third_of_a_second_is_no_drift(tmp_path):
    """A header has room for 0.333333; 256 Hz by it are 3.6 ms off after an hour."""
    rate = 128 / Fraction("0.333333")
    samples = edf.prepare_row(np.zeros(3600 * 384, np.float32), rate, ()).size
    assert abs(samples / 256 - 3600) < 0.1
    with pytest.raises(edf.DataError, match="without drift"):
        edf.prepare_row(np.zeros(7200 * 256, np.float32), 256 * Fraction(40001, 40000), ())


def test_a_gap_is_refused_where_the_header_has_lost_its_mark(tmp_path):
    for kind in ("", "edf+d"):
        assert "gap of 10 s" in refusal(plus(tmp_path / "a.edf", [*range(5), *range(15, 20)], kind))


@pytest.mark.parametrize("name", ["EDF_Annotations", "Annotations", "TAL"])
def test_an_annotation_signal_is_known_by_what_it_holds_whatever_it_is_called(tmp_path, name):
    path = plus(tmp_path / "a.edf", [*range(10), *range(20, 30)], "EDF+C", name=name)
    assert "gap of 10 s after 10 s" in refusal(path)
    path = plus(path, range(20), "EDF+C", {5: mark(5.5, "Seizure", 3)}, name=name)
    assert edf.read_annotations(edf.read_header(path)) == [(5.5, 3.0, "Seizure")]


@pytest.mark.parametrize("rest, events", [(b"+2\x14\x14\0", [(10.5, 3.0, "Seizure")]), (b"", None)])
def test_an_event_that_stands_before_the_onset_of_its_record_is_no_onset(tmp_path, rest, events):
    """In a file of one record no other tells that its clock would be wrong."""
    row = mark(12.5, "Seizure", 3) + rest
    eeg = np.random.default_rng(0).integers(-900, 900, 19 * 5120).astype("<i2")
    path = write_edf(tmp_path / "a.edf", 1, 5120, [*NAMES, "EDF Annotations"], np.zeros((20, 5120)),
                     body=eeg.tobytes() + row.ljust(64, b"\0"), duration="20", count={19: "32"},
                     reserved="EDF+C")
    if events is None:
        assert "record 1 has no onset" in refusal(path)
    else:
        assert edf.read_annotations(edf.read_header(path)) == events
        assert prepare(path).seconds == 20


def test_a_file_copied_as_text_is_refused(tmp_path):
    """Every line feed among the samples got a carriage return before it, which shifts all that
    follow."""
    whole = write_edf(tmp_path / "a.edf").read_bytes()
    damaged = whole.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert 0 < len(damaged) - len(whole) < 9728  # less than a record: else refused by the count
    (tmp_path / "b.edf").write_bytes(damaged)
    assert "copied as text" in refusal(tmp_path / "b.edf")


def test_the_hole_that_a_broken_copy_leaves_is_noted(tmp_path):
    """An amplifier may pause with zeros too, so it is read, but not in silence."""
    whole = write_edf(tmp_path / "a.edf").read_bytes()
    (tmp_path / "b.edf").write_bytes(whole[: 5120 + 15 * 9728] + bytes(5 * 9728))
    assert (
        "nothing but zeros in 5 records, the first at 15 s" in prepare(tmp_path / "b.edf").notes
    )


def test_the_pause_of_an_amplifier_changes_nothing_of_the_amplitude_of_its_eeg(tmp_path):
    eeg = np.random.default_rng(1).normal(0, 300, (19, 100 * 256))
    whole = prepare(write_edf(tmp_path / "a.edf", 100, eeg=eeg)).norm
    for share in (0.3, 0.45, 0.8):
        paused = eeg.copy()
        paused[:, :round(share * 100) * 256] = 0
        norm = prepare(write_edf(tmp_path / "b.edf", 100, eeg=paused)).norm
        assert norm == pytest.approx(whole, rel=0.2)        # most of it flat was refused, "the unit is wrong"


def test_annotations_only_and_foreign_files_are_refused(tmp_path):
    only = write_edf(
        tmp_path / "a.edf",
        1,
        60,
        labels=["EDF Annotations"],
        eeg=np.zeros((1, 60)),
        duration="0",
        reserved="EDF+C",
    )
    assert "annotations without EEG" in refusal(only)
    for content, reason in (
        (b"", "empty"),
        (b"<html>" * 99, "not an EDF"),
        (b"\xffBIOSEMI" + b" " * 400, "BDF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):
        (tmp_path / "b.edf").write_bytes(content)
        assert reason in refusal(tmp_path / "b.edf")


def test_random_damage_to_the_header_never_changes_samples_in_silence(tmp_path):
    """A byte of a field that the samples depend on, replaced: the file reads as before, is noted,
    or is refused."""
    whole = bytearray(write_edf(tmp_path / "a.edf", 3).read_bytes())
    right = microvolts(prepare(tmp_path / "a.edf"))
    rng = np.random.default_rng(0)
    places = [*range(0, 8), *range(184, 256)] + [
        256 + 19 * 16 + 19 * 80 + i for i in range(19 * 40)
    ]
    wrong = []
    for place in rng.choice(places, 120, replace=False):
        copy = bytearray(whole)
        copy[place] = rng.choice(list(b" ,x-9Z\xff\0"))
        (tmp_path / "b.edf").write_bytes(copy)
        try:
            r = prepare(tmp_path / "b.edf")
        except edf.DataError:
            continue
        x = microvolts(r)
        if x.shape != right.shape or abs(x - right).max() > 1:
            wrong.append(place)
    # a digit of a physical or digital range is beyond any reader
    ranges = 256 + 19 * (16 + 80 + 8)
    assert all(place >= ranges or 244 <= place < 252 for place in wrong), wrong


def test_the_shared_odd_files_are_read_like_the_good_one_or_refused(shared):
    folder = shared / "eeg" / "odd"
    right = microvolts(prepare(folder / "00_ok.edf"))
    refused = ("01", "02", "03", "06", "09", "11", "13", "15", "18", "19", "21", "37", "38")
    differs = ("20", "28", "30", "32", "33", "35")  # other channels, rates or lengths
    for path in sorted(folder.glob("*.edf")):
        if path.name[:2] in refused:
            refusal(path)
            continue
        x = microvolts(prepare(path))
        if path.name[:2] not in differs:
            np.testing.assert_allclose(x, right, atol=0.1, err_msg=path.name)
    assert abs(microvolts(prepare(folder / "35_512Hz.edf")) - right)[:, 2000:-2000].mean() < 1
    kept = [i for i, n in enumerate(NAMES) if n not in ("Fz", "Pz")]
    np.testing.assert_allclose(
        microvolts(prepare(folder / "20_missing_Fz_Pz.edf"))[kept], right[kept], atol=0.1
    )
    assert prepare(folder / "37_bipolar_CHB_names_T8-P8_twice.edf", "bipolar").notes == ""


def test_ear_and_mastoid_references_are_known_and_cancel_within_a_pair(tmp_path):
    """One reference for all is as good as REF; left and right ear are refused, but for the
    differences within one side the bipolar montage has no need of them."""
    eeg = np.random.default_rng(0).normal(0, 300, (19, 20 * 256))
    plain = prepare(write_edf(tmp_path / "a.edf", eeg=eeg))
    for ear in ("A1", "M2", "A1A2", "A1+A2", "M1M2"):
        path = write_edf(
            tmp_path / "b.edf", eeg=eeg, labels=[f"EEG {name}-{ear}" for name in NAMES]
        )
        np.testing.assert_array_equal(prepare(path).memory, plain.memory)
    sides = [f"{name}-{'A2' if name[-1] in '2468z' else 'A1'}" for name in NAMES]
    path = write_edf(tmp_path / "c.edf", eeg=eeg, labels=sides)
    assert "different references: A1, A2" in refusal(path)
    wanted = prepare(tmp_path / "a.edf", "bipolar")
    np.testing.assert_array_equal(prepare(path, "bipolar").memory, wanted.memory)
    crossed = [name.replace("T5-A1", "T5-A2") for name in sides]
    path = write_edf(tmp_path / "d.edf", eeg=eeg, labels=crossed)
    assert "different references: A1, A2" in refusal(path, "bipolar")


def test_a_file_that_is_cut_between_its_header_and_its_samples_is_refused(tmp_path):
    path = write_edf(tmp_path / "a.edf")
    header = edf.read_header(path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(edf.DataError, match="cut while it was read"):
        edf.prepare_edf(header, edf.Recipe())


@pytest.mark.parametrize("rate, text", [(256, "0.003906"), (1024, "0.000977"), (512, "0.001953"), (2048, ".0004883"), (128, "0.007813"), (256, "0,003906")])
def test_a_record_of_one_sample_lasts_longer_than_its_field_has_digits(tmp_path, rate, text):
    """By 0.000977 s an hour at 1024 Hz would have 1.6 s more, and all labels would be elsewhere."""
    seconds = 4
    eeg = np.random.default_rng(0).normal(0, 300, (19, seconds * rate))
    right = prepare(write_edf(tmp_path / "a.edf", seconds, rate, eeg=eeg))
    path = write_edf(tmp_path / "b.edf", seconds, rate, eeg=eeg, body=np.rint(eeg).astype("<i2").T.tobytes(),
                     records=str(seconds * rate), duration=text, count="1")
    r = prepare(path)
    assert f"record duration {text} read as 1/{rate} s" in r.notes
    assert r.source_fs == rate and np.array_equal(r.memory, right.memory)
    assert edf.read_header(path).seconds == seconds


@pytest.mark.parametrize("count, text", [(128, "0.333333"), (200, "1.001952"), (25, "0.1"), (1, "0.0039"), (500, "1.000000")])
def test_a_duration_that_is_no_rounded_one_is_taken_as_it_is_written(tmp_path, count, text):
    header = edf.read_header(write_edf(tmp_path / "a.edf", 3, count, duration=text))
    assert header.duration == Fraction(text) and not header.notes
