"""Recordings as hospitals export them: what public reports and public files do, each kind with its right value. Real files."""
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import data
import evaluate
import forked
import model
import train
from conftest import CSV, NAMES, ROOT, command, imported, mark, microvolts, plus, prepare, said, tsv, write_edf
from eeg import annotations, corpora, disk, edf, lists, splits, terms
from eeg.disk import TemporaryFault
from helpers import loaded, rest
from test_corpora import held_import
from test_data import fake

# ---- the shared inputs ----

# the electrodes of a folder are those of 00_good, in these montages
LIKE_GOOD = {
    "05_chb12_27_cs2": ("referential", "bipolar"), "06_chb12_28_01": ("referential", "bipolar"),
    "07_chb_mne_T8-P8-0": ("bipolar",), "08_cadwell_Cz": ("bipolar",),
    "09_label_0_EEG_X_G2": ("referential",), "09_label_2_X_AA": ("referential",),
    "09_label_3_EEG_X_Vref": ("referential",), "09_label_6_X_Ave": ("referential",),
    "09_label_8__X_": ("referential",), "15_psg_derivations_beside": ("referential",)}


@pytest.mark.parametrize("name", LIKE_GOOD)
def test_a_spelling_of_the_field_gives_the_voltages_of_the_good_file(shared, name):
    for montage in LIKE_GOOD[name]:
        right = microvolts(prepare(shared / "eeg/field/00_good/p1_night.edf", montage))
        found = microvolts(prepare(shared / "eeg/field" / name / "p1_night.edf", montage))
        np.testing.assert_allclose(found, right, atol=0.3)


def test_an_electrode_as_common_reference_is_at_zero(shared):
    r = prepare(shared / "eeg/field/08_cadwell_Cz/p1_night.edf")
    assert "Cz is the reference of all: 0" in r.notes and not r.memory[NAMES.index("Cz")].any()
    good = microvolts(prepare(shared / "eeg/field/00_good/p1_night.edf"))
    np.testing.assert_allclose(microvolts(r), good - good[NAMES.index("Cz")], atol=0.3)


@pytest.mark.parametrize("name, events", [
    ("01_mne_channel_link", [[10, 18], [25, 29]]),
    ("02_second_seizure_in_words", [[3, 6], [15, 20]]),
    ("03_background_note", None),
    ("11_bids_trial_type", None),
    ("25_tusz_zero_row", [[5, 9]])])
def test_labels_of_the_field_are_right_or_there_are_none_and_that_is_said(shared, tmp_path, name, events):
    report, text = said(shared / "eeg/field" / name, tmp_path / "out")
    r, = data.open_corpus(tmp_path / "out")
    assert not report.refused
    if events is None:
        assert not r.labelled and f"NO LABELS, not used for training or scoring: {r.name} (" in text
    else:
        assert r.labelled and r.events.tolist() == events
    assert ("an empty row" in text) == (name[:2] == "25")


def test_a_slow_clock_is_no_gap_and_a_constant_reference_is_flat(shared):
    drifting = prepare(shared / "eeg/field/10_drift_96ppm/p1_night.edf")
    assert drifting.seconds == 120 and "the clock of its records is +0.0114 s off" in drifting.notes
    constant = prepare(shared / "eeg/field/14_reference_channel_constant/p1_night.edf")
    assert "Cz is constant" in constant.notes and not constant.memory[NAMES.index("Cz")].any()


# (list, recording): start by the EDF, its length in s, seizures or None: refused, or not labelled
SIENA = {
    "PN12/PN12-1.2": ("15.51.31", 11036, [[1312, 1375], [9570, 9638]]),
    "PN10/PN10-7.8.9": ("16.49.25", 13595, [[2748, 2796], [5459, 5477], [12923, 12936]]),
    "PN10/PN10-4.5.6": ("12.11.21", 12519, [[2309, 2314], [6544, 6563], [11225, 11282]]),
    "PN14/PN14-3": ("19.17.45", 41995, [[6740, 6781]]),
    "PN10/PN10-1": ("05.40.05", 8395, [[7545, 7614]]),
    "PN06/PN06-2": ("21.11.29", 12620, [[8860, 8929]]),
    "PN11/PN11-1": ("11.31.25", 8678, [[7554, 7609]]),
    "PN01/PN01-1": ("19.00.44", 48537, [[10218, 10272], [46353, 46427]]),
    "PN10/PN10-2": ("09.29.24", 8136, None),            # "11.41.04 opure 11.40.43": which of them?
    "PN10/PN10-3": ("13.33.18", 8202, None),            # two onsets
    "PN05/PN05-2": ("06.47.02", 9225, None),            # a minute off, and the length does not explain it
    "PN05/PN05-4": ("06.46.02", 9225, None)}            # not in the list


@pytest.mark.parametrize("name", SIENA)
def test_the_oddities_of_sienas_lists_are_read_where_they_are_not_ambiguous(shared, name):
    start, seconds, events = SIENA[name]
    path = shared / "eeg/field/24_siena_lists" / f"{name}.edf"
    header = types.SimpleNamespace(path=path, start=start, seconds=float(seconds))
    listed = next(path.parent.glob("Seizures-list*.txt"))
    try:
        labels = lists.read_siena(listed, header)
        found = None if labels is None else annotations.finish(labels, header.seconds).tolist()
    except edf.DataError as refusal:
        assert listed.name in str(refusal)
        found = None
    assert found == events
    if name in ("PN12/PN12-1.2", "PN10/PN10-7.8.9", "PN10/PN10-4.5.6", "PN14/PN14-3"):
        assert labels.notes


def test_the_public_layouts_import_as_before(shared, tmp_path):
    """As many as ever of the 2 s recordings whose labels fit them; the rest is refused for its length."""
    counts = {}
    for name, montage in (("tuh", "referential"), ("siena", "referential"), ("seizeit", "referential"), ("chbmit", "bipolar")):
        report = imported(shared / "eeg/layouts" / name, tmp_path / name, montage=montage)
        counts[name] = len(report.read), len(report.refused)
        assert all("not the same" in why or "beyond" in why or "channels" in why or "a seizure from" in why or "no end" in why
                   for _, why in report.refused), report.refused
    assert {name: sum(pair) for name, pair in counts.items()} == {"tuh": 217, "siena": 7, "seizeit": 24, "chbmit": 59}


# ---- spellings ----

SPELLINGS = """{}|EEG {}|EEG {}-REF|EEG {}-LE|EEG {}-Ref|EEG {}-G2|EEG {}-G1|EEG {}-AA|EEG {}-Vref|EEG {}-CPz|EEG {}-FCz|EEG {}-Ave
EEG {}-Avg|EEG {}-Av|EEG {}-AVERAGE|EEG {}-A1|EEG {}-M2|EEG {}-A1A2|EEG {}-A1+A2|EEG {}-Org|EEG {} - Ref|EEG {} Ref|EEG  {}
POL {}|POL {}-Ref|POL {}-G2|{}-AA|{}-Ave|{}-CS2|{}-A1A2|{}-(A1+A2)|({}-A1+A2)/2|{}-Ref|{}_REF|{}_Ref.|EEG.{}|EEG_{}|EEG-{}|EEG:{}
EEG{}|EEG{}-REF|[{}]|({})|EEG[{}]|EEG({})|{}.|{}..|{}(REF)|{}[A1]|{}/A2|{}:M1|{}-LER|{}-CLE|{}-x|{}-0|{}A2|{}M1|{}REF|1 {}
EEG1 {}-REF|CH_{}|{} (uV)|EEG {}-Nz""".replace("\n", "|").split("|")


def test_63_spellings_of_public_clinical_code_are_read(tmp_path):
    assert len(set(SPELLINGS)) == 63
    right = prepare(write_edf(tmp_path / "good.edf", 5)).memory
    wrong = []
    for spelling in SPELLINGS:
        path = write_edf(tmp_path / "a.edf", 5, labels=[spelling.format(name)[:16] for name in NAMES])
        try:
            if not np.array_equal(prepare(path).memory, right):
                wrong.append(spelling)
        except edf.DataError:
            wrong.append(spelling)
    assert len(SPELLINGS) - len(wrong) >= 58 and wrong == []


@pytest.mark.parametrize("both", ["{0}({1})", "{1}({0})", "{0}/{1}", "{1}-{0}", "{0} ({1})-REF", "EEG {1}({0})"])
def test_old_and_new_names_of_one_electrode_may_stand_together(tmp_path, both):
    new = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
    plain = "{0}-REF" if "REF" in both else "{0}"
    labels = [(both if name in new else plain).format(name, new.get(name)) for name in NAMES]
    right = prepare(write_edf(tmp_path / "good.edf", 5)).memory
    assert np.array_equal(prepare(write_edf(tmp_path / "a.edf", 5, labels=labels)).memory, right)


@pytest.mark.parametrize("label", ["C3'", "EEG C3P-REF", "O2 Sat", "Fp1h-Ref", "A1", "X1-C3", "EMG C3", "29"])
def test_what_only_looks_like_an_electrode_beside_the_others_is_not_taken(tmp_path, label):
    eeg = np.random.default_rng(0).normal(0, 300, (20, 5 * 256))
    good = prepare(write_edf(tmp_path / "good.edf", 5, eeg=eeg[:19]))
    r = prepare(write_edf(tmp_path / "a.edf", 5, labels=[*NAMES, label], eeg=eeg))
    assert np.array_equal(r.memory, good.memory)


@pytest.mark.parametrize("contacts", [["SEEG C3-Ref"], ["EEG SEEG C3-Ref"], ["iEEG C3-Ref"], ["ECoG C3"], [f"EEG C{i}-Ref" for i in range(1, 9)],
                                      [f"POL C{i}" for i in range(1, 13)]])
def test_contacts_inside_the_skull_are_no_scalp_electrodes_though_they_are_called_so(tmp_path, contacts):
    """Else --channels C3 takes them where the scalp has no C3, or the whole file is refused where it has one."""
    eeg = np.random.default_rng(0).normal(0, 300, (19 + len(contacts), 5 * 256))
    scalp = [f"EEG {name}-Ref" for name in NAMES]
    rest = [i for i, name in enumerate(NAMES) if name not in ("C3", "C4")]
    path = write_edf(tmp_path / "a.edf", 5, labels=[*(scalp[i] for i in rest), *contacts], eeg=eeg[[*rest, *range(19, len(eeg))]])
    assert np.array_equal(prepare(path, "reduced", reduced=("Fp1-O1",)).memory,
                          prepare(write_edf(tmp_path / "b.edf", 5, labels=scalp, eeg=eeg[:19]), "reduced", reduced=("Fp1-O1",)).memory)
    for channels in ("C3",), ("C3-O1",):
        with pytest.raises(edf.DataError, match="channel missing: C3"):
            prepare(path, "reduced", reduced=channels)
    if len(contacts) < 2 or "POL" in contacts[0]:
        r = prepare(write_edf(tmp_path / "c.edf", 5, labels=[*scalp, *contacts], eeg=eeg))
        assert np.array_equal(r.memory, prepare(tmp_path / "b.edf").memory)
        assert "C3" not in r.notes or "contacts, no scalp electrodes: " in r.notes
    # of a file that calls all of them so nothing else is known; 10-10 has places beyond C4, and large caps more
    for form in ("SEEG {}-Ref", "EEG {}-Ref"):
        labels = [*map(form.format, NAMES), *map(form.format, ("C5", "C6", "C7", *(f"{x}{i}" for x in "FPTO" for i in range(9, 13))))]
        prepare(write_edf(tmp_path / "d.edf", 5, labels=labels))


@pytest.mark.parametrize("form", ["{}", "EEG {}-Ref"])
def test_impedances_named_like_the_electrodes_are_not_taken_though_they_come_first(tmp_path, form):
    eeg = np.random.default_rng(1).normal(0, 300, (38, 5 * 256))
    labels = [*(f"{name} Imp" for name in NAMES), *map(form.format, NAMES)]
    r = prepare(write_edf(tmp_path / "a.edf", 5, labels=labels, eeg=eeg))
    good = prepare(write_edf(tmp_path / "good.edf", 5, eeg=eeg[19:]))
    assert np.array_equal(r.memory, good.memory) and "left out: Fp1 Imp" in r.notes


def test_a_suffix_that_only_a_few_share_is_no_reference(tmp_path):
    labels = ["EEG %s-%s" % (name, "K7" if name < "F" else "Q9") for name in NAMES]
    with pytest.raises(edf.DataError, match="channels missing|different references"):
        prepare(write_edf(tmp_path / "a.edf", 5, labels=labels))


@pytest.mark.parametrize("names", [[f"A{i}" for i in range(1, 33)] + [f"B{i}" for i in range(1, 33)],
                                   [f"{bank}{i}" for bank in "ABCD" for i in range(1, 33)]])
def test_places_of_a_cap_are_no_electrodes_and_the_hint_does_not_name_them(tmp_path, names):
    path = write_edf(tmp_path / "src" / "a.edf", 5, labels=names)
    for montage in ("referential", "bipolar"):
        with pytest.raises(edf.DataError, match="places of a cap") as refusal:
            prepare(path, montage)
        assert "--channels" not in str(refusal.value) and "--rename" in str(refusal.value)
    table = tmp_path / "names.txt"
    table.write_text("label\telectrode\n" + "".join(f"{names[i + 3]}\t{name}\n" for i, name in enumerate(NAMES)))
    report, text = said(tmp_path / "src", tmp_path / "out", renames=table)
    assert report.read == ["a"] and "A4 renamed Fp1" in text
    eeg = np.random.default_rng(1).normal(0, 300, (len(names), 5 * 256))
    right = prepare(write_edf(tmp_path / "good.edf", 5, eeg=eeg[3:22]))
    np.testing.assert_array_equal(data.open_corpus(tmp_path / "out")[0].read(0, 1280), right.memory)


def test_channels_of_other_names_are_read_by_a_table_and_a_changed_table_makes_them_anew(tmp_path):
    labels = [f"ch{i} left" for i in range(19)]
    write_edf(tmp_path / "src" / "a.edf", 5, labels=labels)
    assert "--rename FILE, two columns: label in the file, electrode" in said(tmp_path / "src", tmp_path / "out")[1]
    table = tmp_path / "names.csv"
    for delimiter in ("\t", ",", ";", " "):
        table.write_text("".join(f"{label.upper()}{delimiter}{name}\n" for label, name in zip(labels, NAMES)) + f"gone{delimiter}Cz\n")
        done = command("import", tmp_path / "src", tmp_path / "out", "--rename", table)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "hint: no imported file has a channel gone of --rename" in done.stdout
    assert "1 already there" in done.stdout
    table.write_text(table.read_text().replace("Fp1", "T8X").replace("F3\n", "F4\n").replace("T8X", "T7"))
    assert command("import", tmp_path / "src", tmp_path / "out", "--rename", table).returncode == 1
    for content, why in (("a\tb\n", "'a\\\\tb'"), ("", "empty"), ("a\tFp1\na\tFp2\n", "named Fp1 and Fp2"), ("one\n", "two columns"),
                         ("a 1\tFp1\nA 1\tFp2\n", "A 1 is named Fp1 and Fp2"),
                         ("# nothing\n", "no electrode")):
        table.write_text(content)
        with pytest.raises(edf.DataError, match=why):
            imported(tmp_path / "src", tmp_path / "out", renames=table)
    with pytest.raises(edf.DataError, match="No such file"):
        imported(tmp_path / "src", tmp_path / "out", renames=tmp_path / "nothing")


@pytest.mark.parametrize("reference", ["-Ref", " - G2", "-A1A2", "-Cz"])
def test_a_renamed_channel_keeps_its_reference_and_what_the_file_calls_so_gives_way(tmp_path, reference):
    names = [name for name in NAMES if not reference.endswith(name)]
    eeg = np.random.default_rng(1).normal(0, 300, (len(names) + 1, 5 * 256))
    right = eeg[:-1].copy()
    right[names.index("T3")] = eeg[-1]
    good = prepare(write_edf(tmp_path / "good.edf", 5, labels=[name + reference for name in names], eeg=right))
    table = tmp_path / "names.csv"
    table.write_text(f"EEG Foo{reference},T7\n")
    for there in (f"EEG T7{reference}", "X"):
        labels = [*(there if name == "T3" else name + reference for name in names), f"EEG Foo{reference}"]
        write_edf(tmp_path / "src" / "a.edf", 5, labels=labels, eeg=eeg)
        assert imported(tmp_path / "src", tmp_path / "out", renames=table).refused == []
        np.testing.assert_array_equal(data.open_corpus(tmp_path / "out")[0].read(0, 1280), good.memory)


def test_a_table_of_names_may_say_the_reference(tmp_path):
    table = tmp_path / "names.csv"
    for form, name, refused in (("EEG {}-Ref", "C3", "different references: REF, none"), ("EEG {}-Ref", "C3-Ref", ""),
                                ("POL {} REF1", "C3", "different references: REF1, none")):
        table.write_text(f"Foo,{name}\n")
        write_edf(tmp_path / "src" / "a.edf", 5, labels=[*map(form.format, NAMES), "Foo"])
        report = imported(tmp_path / "src", tmp_path / "out", renames=table)
        assert bool(report.refused) == bool(refused) and refused in str(report.refused)


def test_advice_on_montages_is_never_a_circle(tmp_path):
    """What a refusal names as the cure works."""
    bipolar = list(edf.BIPOLAR)
    for labels in (bipolar, bipolar[:17], bipolar[:9], [f"{name}-Cz" for name in NAMES if name != "Cz"]):
        path = write_edf(tmp_path / "a.edf", 5, labels=labels)
        for montage, other in (("referential", "bipolar"), ("bipolar", "referential")):
            try:
                prepare(path, montage)
            except edf.DataError as refusal:
                if f"--montage {other}" in str(refusal):
                    prepare(path, other)
                if "--montage reduced --channels " in str(refusal):
                    names = str(refusal).split("--channels ")[1].split(";")[0]
                    prepare(path, "reduced", reduced=corpora.channel_names(names))


def test_wearable_channels_may_have_alternatives(tmp_path):
    names = corpora.channel_names("BTEleft SD|BTEright SD,CROSStop SD|BTEright SD")
    for kinds in (("BTEleft SD", "CROSStop SD"), ("BTEleft SD", "BTEright SD"), ("BTEright SD", "CROSStop SD")):
        write_edf(tmp_path / "src" / f"{kinds[0]} {kinds[1]}.edf", 30, labels=[*kinds, "ECG SD"])
    write_edf(tmp_path / "src" / "one.edf", 30, labels=["BTEright SD", "ECG SD"])
    report, text = said(tmp_path / "src", tmp_path / "out", montage="reduced", channels=names)
    assert len(report.read) == 3 and len(report.refused) == 1
    assert "BTEright SD would be two channels" in report.refused[0][1]
    assert text.count("BTEright SD in the place of ") == 2
    recordings = data.open_corpus(tmp_path / "out")
    assert {r.channels for r in recordings} == {("BTEleft SD|BTEright SD", "CROSStop SD|BTEright SD")}
    assert data.Loader(data.Windows([fake("a")])).batches([[0]], 1)


def test_an_impedance_test_without_length_does_not_refuse_a_recording():
    labels = annotations.parse_events_tsv(tsv((5, 0, "impd"), (9, -3, "impd"), (10, 5, "sz")))
    assert labels.events == [(10, 15)] and len(labels.notes) == 2


# ---- headers ----

def test_a_digital_maximum_of_32768_is_read_as_it_is_written(tmp_path):
    right = microvolts(prepare(write_edf(tmp_path / "a.edf", 5)))
    r = prepare(write_edf(tmp_path / "b.edf", 5, dmin="-32767", dmax="32768", pmin="-3276.7", pmax="3276.8"))
    assert "digital maximum 32768" in r.notes
    np.testing.assert_allclose(microvolts(r), right, atol=0.02)


def test_an_empty_annotation_signal_of_a_continuous_file_is_read(tmp_path):
    path = plus(tmp_path / "a.edf", range(5), "EDF+C")
    raw = bytearray(path.read_bytes())
    for record in range(5):
        end = 256 * 21 + (record + 1) * (19 * 512 + 64)
        raw[end - 64:end] = bytes(64)
    path.write_bytes(raw)
    r = prepare(path)
    assert r.seconds == 5 and "its annotation signal is empty" in r.notes
    assert edf.read_annotations(edf.read_header(path)) == []
    path.write_bytes(bytes(raw).replace(b"EDF+C", b"EDF+D"))
    with pytest.raises(edf.DataError, match="no onset"):
        prepare(path)


def drifting(path, records, late, annotations=()):
    return plus(path, [round(i * (1 + late), 4) for i in range(records)], "EDF+C", annotations)


def test_drift_moves_labels_inside_to_their_samples_and_refuses_labels_of_an_unknown_clock(tmp_path):
    """9 ms a record, 2.7 s in all: a seizure at 200.79 s by the file's clock is at sample 199 s."""
    src = tmp_path / "src"
    drifting(src / "inside_1.edf", 300, 0.009, {199: mark(200.791, "sz", 10)})
    drifting(src / "beside_1.edf", 300, 0.009)
    (src / "beside_1_events.tsv").write_text(tsv((200, 10, "sz")))
    drifting(src / "none_1.edf", 300, 0.009)
    drifting(src / "little_1.edf", 100, 0.009)
    (src / "little_1_events.tsv").write_text(tsv((20, 10, "sz")))
    plus(src / "late_1.edf", range(10, 40), "EDF+C")
    (src / "late_1_events.tsv").write_text(tsv((15, 4, "sz")))
    plus(src / "late_2.edf", range(10, 40), "EDF+C", {5: mark(15, "sz", 4)})
    report, text = said(src, tmp_path / "out")
    assert [why for _, why in report.refused] == [
        "the clock of its records is 2.69 s off at the end, and which clock beside_1_events.tsv goes by is not known",
        "its first record is at 10 s by its own clock, and which clock late_1_events.tsv goes by is not known"]
    recordings = {r.name: r for r in data.open_corpus(tmp_path / "out")}
    assert abs(recordings["inside_1"].events[0, 0] - 199) < 0.01
    assert recordings["late_2"].events.tolist() == [[5, 9]]
    assert recordings["little_1"].labelled and not recordings["none_1"].labelled


# ---- labels ----

def parse(*found, seizure=(), background=()):
    """Events of (onset, duration, text), None for unlabelled, or the reason."""
    try:
        labels = annotations.parse_annotations(list(found), terms.user_texts(seizure, background))
    except edf.DataError as why:
        return str(why)
    return None if labels is None else labels.events


@pytest.mark.parametrize("start, end", [
    ("Anfallsbeginn", "Anfallsende"), ("Anfallsanfang", "Ende des Anfalls"), ("sz on", "sz off"), ("SZ-ON", "SZ_OFF"), ("Sz onset:", "Sz offset."),
    ("1st seizure start", "1st seizure end"), ("first seizure start", "seizure 1 end"), ("Anfall 2 Beginn", "zweiter Anfall Ende"),
    ("sz1 on", "sz1 off"), ("Seizure #3 start", "Seizure end"), ("début de crise", "fin de la crise"), ("inicio de crisis", "fin de crisis"),
    ("Seizure start@@F7", "Seizure end@@F7"), ("seizure started", "seizure ended"), ("de\u0301but crise", "fin crise"),
    ("Start aanval", "Einde aanval"), ("pocz\u0105tek napadu", "koniec napadu"), ("inizio della crisi", "fine della crisi"),
    ("Seizure \u2013 start", "Seizure \u2014 end")])
def test_pairs_of_a_seizure_in_common_words(start, end):
    assert parse((3, None, start), (9, None, end)) == [(3, 9)]


def test_numbers_of_a_pair_are_compared():
    assert "their numbers differ" in parse((1, None, "Sz 1 onset"), (5, None, "Sz 2 offset"))
    assert "their numbers differ" in parse((1, None, "first seizure start"), (5, None, "2nd seizure end"))
    assert parse((1, None, "Sz 1 onset"), (3, None, "Sz 2 onset"), (5, None, "Sz 1 offset"), (9, None, "Sz 2 offset")) == [(1, 5), (3, 9)]
    for text in ("No. 2 seizure", "2 sei\"zure", "seizure no 2", "Nr.2: Seizure", "\u2116 2 seizure", "seizure n\xb02"):
        assert parse((1, None, "background"), (5, 4, text)) == [(5, 9)], text
    assert parse((1, None, "seizure no. 1 start"), (5, None, "No 1 seizure end")) == [(1, 5)]
    assert "may end" in parse((1, None, "Sz 1 onset"), (3, None, "Sz 2 onset"), (5, None, "Sz offset"))


def test_a_seizure_as_short_as_a_sample_is_a_moment_whose_end_is_not_known(tmp_path):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", {2: mark(2, "Seizure", 0.004)})
    write_edf(tmp_path / "src" / "b.edf", 10)
    (tmp_path / "src" / "b_events.tsv").write_text(tsv((2, 0.004, "sz")))
    report, text = said(tmp_path / "src", tmp_path / "out")
    why = "event from 2 s to 2.004 s: a moment, not a seizure"
    assert f"NO LABELS, not used for training or scoring: a (its EDF+ annotations: {why})" in text and not report.read[1:]
    assert report.refused[0][1] == f"b_events.tsv: {why}"


@pytest.mark.parametrize("text", [
    "sz_foc_a_m_automatisms", "sz_foc_ia_nm_behavior", "sz_foc_f2b", "sz_uo_m_epilepticSpasms", "sz_gen_nm_atypical", "sz_gen_m_myoclonicTonicClonic",
    "sz_gen_nm_eyelidMyoclonia", "Sei\xadzure", "Seizure\u200b"])
def test_types_of_szcore_and_texts_with_marks_that_are_not_seen_are_seizures(text):
    assert parse((3, 4, text)) == [(3, 7)]


def test_what_denies_a_seizure_must_not_overlap_one():
    for denial in (0, 20, "no seizure"), (4, 2, "Seizure free"), (5, 4, "background"):
        assert f"{denial[2]!r} from {denial[0]} s" in parse(denial, (5, 4, "Seizure")), denial
    # two texts of one list of an EDF+
    assert "'false positive' from 5 s to 9 s, and a seizure" in parse((5, 4, "Seizure"), (5, 4, "false positive"))
    assert parse((5, 4, "Seizure"), (6, 1, "artefact"), (5, 4, "left temporal")) == [(5, 9)]
    assert parse((5, 4, "artefact")) is None
    for text in "false alarm", "PNES", "rejected", "non-epileptic":
        assert f"{text!r} from 6 s" in parse((5, 4, "Seizure"), (6, None, text)), text
        assert parse((5, 4, "Seizure"), (10, None, text), (10, 3, "artefact"), (6, None, "F7 rejected")) == [(5, 9)]
    assert "'no sz' from 6 s" in parse((5, None, "Seizure start"), (6, 1, "no sz"), (9, None, "Seizure end"))
    for denial in (0, 5, "no seizure"), (9, 5, "no seizure"), (6, None, "no seizure"), (0, 20, "background"):
        assert parse(denial, (5, 4, "Seizure")) == [(5, 9)], denial


def test_what_a_row_says_of_a_text_that_the_user_calls_a_seizure_belongs_to_it(tmp_path):
    write_edf(tmp_path / "src" / "a.edf", 20)
    for rows, events in (("5,1,Muster A,start\n9,1,Muster A,end\n", [[5, 9]]), ("5,4,Muster A,F7\n", [[5, 9]]), ("5,4,Muster A,rejected\n", None)):
        (tmp_path / "src" / "a.csv").write_text(f"onset,duration,label,status\n{rows}")
        text = said(tmp_path / "src", tmp_path / "out", seizure_labels=["Muster A"])[1]
        r, = data.open_corpus(tmp_path / "out")
        assert r.events.tolist() == events if events else not r.labelled and "'seizure rejected' at 5 s speaks" in text


def test_an_end_closes_whichever_start_is_open_built_in_or_given():
    focal = "Anfall Beginn (fokal li temporal)"
    pair = [f"{focal}..Anfall Ende"]
    both = ((1, None, "Anfall Beginn"), (5, None, "Anfall Ende"), (11, None, focal), (15, None, "Anfall Ende"))
    assert parse(*both, seizure=pair) == [(1, 5), (11, 15)]
    assert parse(*both[:2], seizure=pair) == [(1, 5)]
    two = ["fokal..Anfall Ende", "generalisiert..Anfall Ende"]
    assert parse((1, None, "fokal"), (5, None, "Anfall Ende"), (8, None, "generalisiert"), (9, None, "Anfall Ende"), seizure=two) == [(1, 5), (8, 9)]
    assert parse((1, None, "sz start"), (5, None, "red off"), seizure=["red on..red off"]) == [(1, 5)]
    assert "has no start" in parse((5, None, "red off"), seizure=["red on..red off"])


@pytest.mark.parametrize("text", ["Focal seizure L temporal", "SZ?", "Anfall unklar", "crise partielle complexe", "crisis focal",
                                  "ictal rhythm right", "Electrographic onset", "EEG onset", "postictal slowing", "GTCS / convulsion", "Anf\xe4lle",
                                  "GTCS", "sGTKA", "fnsz left", "ESz", "SzStart left", "szr", "Absence 12 s", "Absencen", "Status epilepticus",
                                  "Grand mal", "FBTCS", "tonic-clonic", "Epileptic spasms", "napad padaczkowy", "insult", "Iktus", "anfald", "ataque", "Attack", "Aura",
                                  "Anf. 2", "Krise?", "Приступ", "судороги", "επιληπτική κρίση", "癫痫发作", "発作開始", "발작", "نوبة صرع", "התקף",
                                  "nöbet", "criză", "roham", "siezure", "Sezure", "seisure L", "ceizure", "eizure", "seiure", "sebzure", "sei zure", "S Z", "foc\"al seizure", "seibzure", "seiuzre", "seazur", "szes", "fit", "CPS", "SPS 2", "NCSE", "FAS", "atonic",
                                  "gelastic", "clonus", "attacco", "clinical event", "Seizure 0", "0 seizure", "sz: 0", "Electrographic event", "no clinical seizures", "no further seizures",
                                  "sz_foc_start", "sz gen unlikely", "sz_foc: ruled out", "d\xe9but critique", "scarica critica", "evento cr\xedtico", "ikt. Muster", "ict start", "TKA", "TCS", "stuip", "ataky",
                                  "kriza", "konvulzija", "krambid", "l\u0113kme", "priepuolis", "kouristus", "serangan", "\u0111\u1ed9ng kinh", "padaczka", "staring spell", "n\x94bet", "z\xa0chvat", "An\xadfall L", "пристъп", "гърч", "судома",
                                  "痙攣", "痉挛", "けいれん", "경련", "दौरा", "ชัก", "פרכוס", "صرع", "n\xc3\xb6bet", "z\xc3\xa1chvat", "Epi event", "no. 2 seizures",
                                  # a denial with a number leaves room for another
                                  "no seizure 2", "no second seizure", "No. seizures: 3", "No, seizure", "keine 2. Anf\xe4lle",
                                  "\xe9tat de mal", "stato di male", "mal epil\xe9ptico", "secondarily generalized", "CTCG", "абсанс", "欠神", "癫痫", "frånvaro", "szr1", "spell #2",
                                  # spelt, run together or cut short as in none of the above; of Hindi as it is taken apart
                                  "FBTCSz", "FBTC", "PTCS", "SzDetect", "szstrt", "Anfal", "Kriz 2", "absense", "abscence", "ausencia", "assenza", "Absence during HV", "grandmal",
                                  "Klonien", "mioclonia", "astatic", "Subclinical", "electrographic", "Clinical end", "Clin. Beginn", "epileptisch", "event: typical", "CGTC", "kas\u0131lma", "\u3072\u304d\u3064\u3051", "habitual event", "Episode 3", "मिर्गी",
                                  "Приступ".encode("cp1251").decode("latin-1"), "発作".encode("shift-jis").decode("latin-1"),
                                  # in letters of which no word is known, and words of further languages
                                  "გულყრა", "ցնցում", "வலிப்பு", "మూర్ఛ", "ಸೆಳೆತ", "അപസ്മാരം", "খিঁচুনি", "આંચકી", "တက်", "ប្រកាច់", "ຊັກ", "የሚጥል", "دورہ", "مرگی", "छारे", "झटका",
                                  "ұстама", "таталт", "уналт", "tutma", "Hoog 2", "tutqanoq", "kombulsyon", "auras", "GTK", "Abs 12", "Epi", "Epilepsie", "Эпи"])
def test_a_text_that_speaks_of_a_seizure_and_stays_unused_leaves_no_labels(text):
    """Also beside others that are known; said, with what to do, and the user gets it out."""
    beside = (1, 2, "Seizure"), (5, None, "background")
    why = parse(*beside, (9, 3, text))
    assert repr(text) in why and "--seizure-label or --background-label" in why
    assert parse(*beside, (9, 3, text), background=[text]) == [(1, 3)]
    assert parse(*beside, (9, 3, text), seizure=[text]) == [(1, 3), (9, 12)]


@pytest.mark.parametrize("text", ["interictal spikes", "eyes open", "Spikes F7", "photic 10 Hz", "szene", "kein Anfall", "no electrographic seizures",
                                  "inter-ictal", "inter-critique", "critical care", "Szymanski, Anna", "spell the word", "no better", "etc.", "hoogte", "epileptiform", "эпилептиформная активность", "impedantie hoog", "nefes tutma", "눈 뜸", "epileptiform discharges", "epileptische Potentiale", "alpha 9 cps", "absence of alpha", "absence d'alpha", "clonidine", "static", "pseudoperiodic", "Status: awake", "consult", "profits", "6-7 cps", "cesser", "processor", "saisir", "measure", "mesure de pression", "F\xfc\xdfe", "глаза открыты", "发作间期", "眼を開けた"])
def test_other_texts_beside_a_seizure_leave_its_labels(text):
    assert parse((1, 2, "Seizure"), (9, 3, text)) == [(1, 3)]


def test_a_text_as_long_as_a_list_may_hold_is_read_once():
    """Not once for each of its letters: that took minutes."""
    assert terms.speaks("szszsz" * 20_000 + "gtc") and not terms.speaks("szszsz" * 20_000)


def test_a_bare_start_or_end_within_a_seizure_may_be_its_own():
    """Else two seizures and what lies between are one."""
    for inner in ("End", "Stop 1", "Ende"):
        why = parse((5, None, "sz start"), (9, None, inner), (20, None, "begin"), (30, None, "sz end"))
        assert f"{inner!r} at 9 s stands between 'sz start' at 5 s and its end" in why
    for outer in (3, None, "End"), (5, None, "start"), (40, None, "stop"):
        assert parse(outer, (5, None, "sz start"), (9, None, "HV end"), (30, None, "sz end")) == [(5, 30)]


@pytest.mark.parametrize("text", ["Patient Event", "Pushbutton", "PB", "Patientenereignis", "Bouton patient", "Pulsador", "Hasta butonu", "\u60a3\u8005\u6309\u952e", "Event 1", "XLEvent", "event 2 start"])
def test_a_button_pressed_where_no_seizure_is_labelled_is_noted(tmp_path, text):
    for onset in (5, 400):
        labels = annotations.parse_annotations([(1, 3, "Seizure"), (onset, None, text)], terms.Texts())
        assert labels.events == [(1, 4)]
        assert labels.notes == ["a button pressed at 400 s, where no seizure is labelled (1 in all): taken for background"] * (onset == 400)
    assert parse((400, None, text)) is None


def test_numbers_that_last_beside_known_texts_of_an_edf_may_be_labels(tmp_path):
    for name, duration in (("a", 2), ("b", None)):
        plus(tmp_path / "src" / f"{name}.edf", range(10), "EDF+C", {0: mark(0, "background", 2), 4: mark(4, "1", duration)})
    text = said(tmp_path / "src", tmp_path / "out")[1]
    a, b = data.open_corpus(tmp_path / "out")
    assert not a.labelled and b.labelled and "a (its EDF+ annotations: '1' at 4 s is a code: say what it means with --seizure-label" in text
    assert "codes inside its EDF+, taken for no labels: 1;" in b.notes and "codes" not in a.notes
    imported(tmp_path / "src", tmp_path / "out", seizure_labels=["1"])
    assert data.open_corpus(tmp_path / "out")[0].events.tolist() == [[4, 6]]


def test_texts_that_speak_of_a_seizure_come_first_in_the_list(tmp_path):
    notes = {i: mark(i, f"note {i // 2}") for i in range(100)}
    plus(tmp_path / "src" / "P03_EEG.edf", range(100), "EDF+C", notes | {50: mark(50, "Ictal rhythm L", 5)})
    text = said(tmp_path / "src", tmp_path / "out")[1]
    lines = text.splitlines()
    assert lines[lines.index("annotations that label nothing:") + 1] == "  1 x 'Ictal rhythm L'"
    again = said(tmp_path / "src", tmp_path / "out")[1]
    told = []
    data.info(tmp_path / "out", told.append)
    for said_of in (text, again, "\n".join(told)):
        assert "NO LABELS, not used for training or scoring: P03_EEG (its EDF+ annotations: 'Ictal rhythm L'" in said_of
        assert "0 seizures" not in said_of and "repaired" not in said_of
    assert any("P03: 0.03 h, no labels" in line for line in told) and " of them" not in "".join(told)


def test_training_names_the_recordings_without_labels():
    unlabelled = fake("c", labelled=False)
    unlabelled.unlabelled, unlabelled.path = "no annotations", "c.h5"
    lines = splits.told([fake("a"), fake("b"), unlabelled], [fake("a")], [fake("b")], {"split": "patient"})
    assert "NO LABELS, not used for training or scoring: c (no annotations)" in lines


@pytest.mark.parametrize("name, content, events", [
    ("a.tse_bi", "version = tse_v1.0.0\n\n0.0000 5.0000 bckg 1.0000\n5.0000 9.0000 seiz 1.0000\n9.0000 20.0000 bckg 1.0000\n", [[5, 9]]),
    ("a.tse", "version = tse_v1.0.0\n\n0.0 5.0 bckg 1.0\n5.0 9.0 cpsz 0.9\n", [[5, 9]]),
    ("a.csv", "Onset,Duration,Annotation\n+5.000000,4.0,Seizure\n1,,eyes open\n", [[5, 9]]),
    ("a_annotations.csv", "onset,duration,description\n5,4,sz\n", [[5, 9]]),
    ("a.csv", "Onset;Duration;Annotation\n5,5;3,25;Seizure\n1,000;0;eyes open\n", [[5.5, 8.75]]),
    ("a.csv", "Beginn;Dauer;Beschreibung\n5,5;3,5;Anfall\n", [[5.5, 9]]),
    ("a.csv", "Début (s);Durée (s);Événement\n5,5;3,5;crise\n", [[5.5, 9]]),
    ("a.csv", "Inicio;Fin;Evento\n5;9;crisis\n", [[5, 9]]),
    ("a.csv", "Beginn (min);Dauer (s);Beschreibung\n5,5;3,5;Anfall\n", "Beginn (min) is not in seconds"),
    ("a.csv", "Onset\tEnd\tAnnotation\n5,5\t9\tSeizure\n", [[5.5, 9]]),
    ("a.csv", "Onset;Duration;Annotation\n1,005;4;Seizure\n", "'1,005', not a number"),
    ("a.csv", "Onset;Duration;Annotation\n1.005,5;4;Seizure\n", "'1.005,5', not a number"),
    ("a.txt", "# MNE-Annotations\n# onset, duration, description\n5.0, 4.0, Seizure\n", [[5, 9]]),
    ("a.tsv", "Time [s]\tEvent\n5\tSeizure start\n9\tSeizure end\n", [[5, 9]]),
    ("a_events.tsv", "onset\tduration\ttrial_type\n5\t4\tseizure\n12\tn/a\teyes_open\n", [[5, 9]]),
    ("a.csv", "onset,duration,type,comment\n5,4,note,seizure\n1,1,background,\n", [[5, 9]]),
    ("a.csv", "onset,duration,type,comment\n5,4,background,focal seizure L\n", "'focal seizure L background' at 5 s speaks of a seizure"),
    ("a.csv", 'description,onset,duration\n"seizure, 1",5,4\n', [[5, 9]]),
    ("a.txt", "# onset, duration, description\n1,0,background\n5,4,eyes open, seizure L\n", "'eyes open, seizure L' at 5 s speaks"),
    ("a.csv", "Onset [min],Duration [min],Annotation\n5,1,Seizure\n", "a.csv: Onset [min] is not in seconds"),
    ("a_events.tsv", "# by hand\nOnset\tDuration\tTrial_type\n5\t4\tseizure\n", [[5, 9]]),
    ("a_events.tsv", "ONSET\tDURATION\tEVENTTYPE\n5\t4\tsz\n", [[5, 9]]),
    ("a_events.tsv", "onset\tduration\teventType\n0\tn/a\tbckg\n5\t4\tsz\n", [[5, 9]]),
    ("a_events.tsv", "onset\tduration\teventType\n5\tn/a\tsz\n", "a_events.tsv: duration of sz is 'n/a'"),
    ("a.edf.csv", "onset,duration,label\n5,4,sz\n", "not read as labels: a.edf.csv"),
    ("A_events.tsv", tsv((5, 4, "sz")), "not read as labels: A_events.tsv"),
    ("a_events.tsv", "onset\tduration\tvalue\n5\t4\tS 1\n", "a_events.tsv has no column eventType or trial_type"),
    ("a.txt", "Dear colleague,\nwe saw a seizure.\n", "a.txt is no table of onsets and texts"),
    ("a.csv", "x,y\n1,2\n", "a.csv is no table"),
    ("a.csv", "Time,Event\n22:15:03,Seizure\n", "(a.csv: onset is '22:15:03', not a number"),
    ("a.csv", "Onset,Annotation\n5," + 200_000 * "x" + "\n", "a.csv: field larger than"),
    ("a.csv", "Onset,Duration,Annotation\n1,1,background\n5,4\n", "incomplete row '5 4'"),
    ("a.csv", "Onset,Duration,Annotation,Channel\n1,1,background,F7\n5,4,sz", "incomplete row '5 4 sz'"),
    ("a.csv", "Onset,Duration,Annotation\n1,1,background\n#5,4,Seizure\n", "a.csv: '#5,4,Seizure' is commented out"),
    ("a.csv", "Onset,Duration,End,Annotation\n1,1,2,background\n5,4,19,Seizure\n", "times of the row '5 4 19 Seizure' do not agree"),
    ("a.csv", "Start,End,Label\n9,5,Seizure\n12,,Seizure end\n", "times of the row '9 5 Seizure' do not agree"),
    ("a.csv", "Onset,Duration,End,Annotation\n5,0,9,Seizure\n", [[5, 9]]),
    ("a.csv", "Onset,Duration,Rater,Label\n5,4,Seizure,\n7,1,,\n", [[5, 9]]),
    ("a.csv", "Time,Start,End,Label\n3,5,9,Seizure\n", "onset is 3 and 5 in one row"),
    ("a.csv", "Onset,Time,Duration,Annotation\n5,22:00:05,4,Seizure\n", [[5, 9]]),
    ("a_events.tsv", "onset\tduration\ttrial_type\tHED\n0\tn/a\tbackground\tn/a\n5\t4\tevent\tSeizure\n", [[5, 9]]),
    ("a.csv", "Onset,Duration,Event,Seizure\n1,1,background,no\n5,4,event,yes\n", "'Seizure=yes' at 5 s speaks"),
    ("a.csv", "Onset,Duration,Text,Channel\n1,1,background,\n5,4,eyes open, seizure L,F7\n", "a.csv: more cells than titles in '5 4 eyes open seizure L F7'"),
    ("a.csv", "Annotation,Onset,Duration,Channel\nSeizure,5,7,4,0,F7\n", "more cells than titles in 'Seizure 5 7 4 0 F7'"),
    # what else a row says of its seizure
    ("a.csv", "onset,duration,type,comment\n5,1,Seizure,start\n9,1,Seizure,end\n", [[5, 9]]),
    ("a.csv", "onset,duration,phase,label\n5,1,onset,sz\n9,1,offset,sz\n", [[5, 9]]),
    ("a.csv", "onset,duration,type,comment\n5,4,Seizure,muscle artefact\n", "'Seizure muscle artefact' at 5 s speaks"),
    ("a.csv", "onset,duration,label,certainty\n5,4,Seizure,possible\n", "'Seizure possible' at 5 s speaks"),
    ("a.csv", "onset,duration,label,review\n5,4,Seizure,false positive\n", "'Seizure false positive' at 5 s speaks"),
    ("a.csv", "onset,duration,label,Confirmed?\n5,4,Seizure,no\n", "'Seizure no' at 5 s speaks"),
    ("a.csv", "onset,duration,label,confirmed,video,comment,lateralisation\n5,4,Seizure,yes,no,artefacts at its end,unclear\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,Bemerkung\n5,4,Anfall,nicht epileptisch\n", "'Anfall nicht epileptisch' at 5 s speaks"),
    ("a.csv", "onset,duration,label,comment\n5,4,seizure,PNES\n", "'seizure PNES' at 5 s speaks"),
    ("a.csv", "onset,duration,label,status\n5,4,seizure,deleted\n", "'seizure deleted' at 5 s speaks"),
    ("a_events.tsv", "onset\tduration\teventType\tcomment\n5\t4\tsz\tnon-epileptic\n", "'non-epileptic' in a row that calls itself sz"),
    ("a_events.tsv", "onset\tduration\teventType\tcomment\n5\t4\tsz\tnot confirmed\n", "'not confirmed' in a row that calls itself sz"),
    ("a_events.tsv", "onset\tduration\teventType\ttrial_type\n5\t4\tsz\tno seizure\n", "'no seizure' in a row that calls itself sz"),
    ("a_events.tsv", "onset\tduration\teventType\tlateralization\tcomment\n5\t4\tsz\tunclear\tonset F7\n", [[5, 9]]),
    ("a.csv", "patient,onset,duration,label\nanna,5,4,Seizure\nbert,12,4,Seizure\n", "a.csv: it has rows of anna, bert"),
    ("a.csv", "Record;Onset;Duration;Label\n1;5;4;Seizure\n2;12;4;Seizure\n", "a.csv: it has rows of 1, 2"),
    ("a.csv", "onset,duration,label,Is_seizure\n5,4,sz,0\n", "'sz 0' at 5 s speaks"),
    ("a_events.tsv", "onset\tduration\teventType\tseizure\n5\t4\tsz\tno\n", "'no' in a row that calls itself sz"),
    ("a_events.tsv", "onset\tduration\teventType\tseizure\n0\t20\tbckg\tyes\n", "'seizure=yes' in a row that calls itself bckg"),
    ("a_events.tsv", "onset\tduration\teventType\tseizureType\tseizure\n0\t20\tbckg\tn/a\tno\n", []),
    ("a.tse", "version = tse_v1.0.0\n\n0.0 5.0 bckg 1.0 5.0 9.0 seiz 1.0\n", "more than a row in '0.0 5.0 bckg 1.0 5.0"),
    ("a.csv", "No;Patient;Onset;Duration;Label\n1;anna;5;4;Seizure\n2;anna;12;4;Seizure\n", [[5, 9], [12, 16]]),
    ("a.csv", "Onset,Duration,Text,Type of seizure\n5,4,Seizure,focal\n", [[5, 9]]),
    ("a.csv", "onset,duration,type,comment\n5,4,seizure,no seizure\n", "'seizure no seizure' at 5 s speaks"),
    # in whatever column, and by its title
    ("a.csv", "onset,duration,label,video\n5,4,Seizure,non-epileptic\n", "'Seizure non-epileptic' at 5 s speaks"),
    ("a.csv", "onset,duration,label,rater2\n5,4,Seizure,bckg\n", "'Seizure bckg' at 5 s speaks"),
    ("a.csv", "onset,duration,label,Exclude\n5,4,Seizure,x\n", "'Seizure exclude=x' at 5 s speaks"),
    ("a.csv", "onset,duration,label,Include\n5,4,Seizure,no\n", "'Seizure no' at 5 s speaks"),
    ("a.csv", "onset,duration,label,confidence\n5,4,Seizure,unsure\n", "'Seizure unsure' at 5 s speaks"),
    ("a_events.tsv", "onset\tduration\teventType\tconfidence\n5\t4\tsz\t0.00\n", "'0.00' in a row that calls itself sz"),
    ("a_events.tsv", "onset\tduration\teventType\tFalse positive\n5\t4\tsz\t1\n", "'false positive=1' in a row that calls itself sz"),
    ("a_events.tsv", "onset\tduration\teventType\tconfidence\tartifact\texclude\tepileptic\tprobability\n5\t4\tsz\t0.8\tmuscle\tno\tyes\t1.0\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,EEG onset,Seizure type,channels\n5,4,Seizure,F7,unclear,F7 excluded\n", [[5, 9]]),
    *(("a.csv", f"onset,duration,label,{title}\n5,4,Seizure,{cell}\n", f"'Seizure {said or cell}' at 5 s speaks") for title, cell, said in (
        ("Kommentar", "V.a. Artefakt", ""), ("Commentaire", "artefact ?", ""), ("Note", "artefatto", ""), ("Review", "rejected by AB", ""),
        ("Status", "draft", ""), ("Status", "pending review", ""), ("Reviewer 2", "disagree", ""), ("Consensus", "disagreement", ""),
        ("Final", "not seizure", ""), ("Video", "not a seizure", ""), ("Final label", "artifact", ""), ("Gold", "0", ""), ("Ground truth", "0", ""),
        ("TP/FP", "FP", ""), ("Ictal", "no", ""), ("Interictal", "yes", "interictal=yes"), ("Ignore", "1", "ignore=1"), ("Skip", "x", "skip=x"),
        ("Remove", "x", "remove=x"), ("Bad", "1", "bad=1"))),
    ("a.csv", "onset,duration,label,Final,Ictal,TP/FP,comment,quality\n5,4,Seizure,1,yes,TP,artefacts over the left side,bad\n", [[5, 9]]),
    # a probability below one half, and what a program found
    *(("a.csv", f"onset,duration,label,{title}\n5,4,Seizure,{cell}\n", right or f"'Seizure {cell}' at 5 s speaks") for title, cell, right in (
        *((title, cell, f"'Seizure {said}={cell}' at 5 s speaks") for title, cell, said in (
            ("Confidence", "0.49", "confidence"), ("p", ".2", "p"), ("Probability (%)", "12", "probability"), ("score", "30 %", "score"),
            ("p_seizure", "1e-3", "p seizure"), ("Sicherheit", "0.3", "sicherheit"))),
        ("prob", "0.5", [[5, 9]]), ("uncertainty", "0.3", [[5, 9]]), ("Proband", "0.3", [[5, 9]]), ("confidence", "2", [[5, 9]]), ("score", "80", [[5, 9]]),
        ("source", "persyst", ""), ("annotator", "Persyst 14", ""), ("Detector", "BESA", ""), ("created by", "encevis", ""), ("rater", "AI", ""),
        ("method", "automatic", ""), ("comment", "auto detection", ""), ("origin", "software", ""), ("Rater", "SeizureTransformer", ""),
        ("source", "manual", [[5, 9]]), ("annotator", "AB", [[5, 9]]), ("comment", "oral automatisms", [[5, 9]]), ("comment", "autonomic", [[5, 9]]),
        ("comment", "patient at computer", [[5, 9]]), ("severity score", "0", [[5, 9]]), ("predominance", "0.2", [[5, 9]]), ("model", "Nihon Kohden", [[5, 9]]),
        ("Software", "EDFbrowser", [[5, 9]]), ("channel", "AI", [[5, 9]]), ("comment", "seen later than the Persyst marker said it was", [[5, 9]]))),
    ("a.csv", "onset,duration,label,onset2,duration2\n5,4,Seizure,12,4\n", "onset2 is 12 beside an onset of 5: a row for each seizure"),
    ("a_events.tsv", "onset\tduration\teventType\tonset_2\n5\t4\tsz\tn/a\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,agreement\n5,4,Seizure,1/3\n", "'Seizure agreement=1/3' at 5 s speaks"),
    ("a.csv", "onset,duration,label,agreement,votes,lead\n5,4,Seizure,2 of 3,1/2,1/3\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,Automatic\n5,4,Seizure,yes\n", "'Seizure automatic=yes' at 5 s speaks"),
    ("a.csv", "onset,duration,label,Automatic\n5,4,Seizure,no\n", [[5, 9]]),
    ("a.csv", "Persyst seizure detections\nonset,duration,label\n5,4,Seizure\n", "'Persyst seizure detections': found by a program"),
    ("a.csv", "Recorded with machine 3, seizures: 1\nonset,duration,label\n5,4,Seizure\n", [[5, 9]]),
    ("a.csv", "Software: Persyst 14\nonset,duration,label\n5,4,Seizure\n", [[5, 9]]),
    ("a_events.tsv", "onset\tduration\teventType\tconfidence\n5\t4\tsz\t0.30\n", "'confidence=0.30' in a row that calls itself sz"),
    ("a_events.tsv", "onset\tduration\teventType\tannotator\n5\t4\tsz\tpersyst\n", "'persyst' in a row that calls itself sz"),
    ("a.tse", "version = tse_v1.0.0\n\n0.0 5.0 bckg 1.0\n5.0 9.0 seiz 0.0\n", "confidence 0.0 of a seizure"),
    # names in a column of no certain meaning; lines above that are of another recording
    ("a.csv", "Name,onset,duration,label\nanna,5,4,Seizure\nbert,12,4,Seizure\n", "a.csv: it has rows of anna, bert"),
    ("a.csv", "EEG,onset,duration,label\na1,5,4,Seizure\nb2,12,4,Seizure\n", "a.csv: it has rows of a1, b2"),
    ("a.csv", "Name,EEG,onset,duration,label\nSz 1,F7-T3,5,4,Seizure\nSz 2,T3,12,4,Seizure\n", [[5, 9], [12, 16]]),
    ("a.csv", "File: b\nonset,duration,label\n5,4,Seizure\n", "a.csv: it has rows of b"),
    ("a.csv", "File: A.trc\nPatient: Meier, Anna\nonset,duration,label\n5,4,Seizure\n", [[5, 9]]),
    *((f"P01_{end}", text, right) for end, text, right in (
        ("n.csv", "Patient: P02\nonset,duration,label\n5,4,Seizure\n", "P01_n.csv: it has rows of P02"), ("n.csv", "Patient: p1\nonset,duration,label\n5,4,Seizure\n", [[5, 9]]),
        ("n2.csv", "night,onset,duration,label\nn3,5,4,Seizure\n", "P01_n2.csv: it has rows of n3"),
        ("events.tsv", "subject\tonset\tduration\teventType\nP-02\t5\t4\tsz\n", "P01_events.tsv: it has rows of P-02"))),
    *(("a.csv", f"{line}\nonset,duration,label\n5,4,Seizure\n", right) for line, right in (
        ("Duration: 3600", "the annotation is of 3600 s, the signal has 20 s"), ("Recording length = 01:00:00", "the annotation is of 3600 s"),
        ("Duration: 20 s", [[5, 9]]), ("# Total duration: 1 min", [[5, 9]]), ("Length: 2 h", "the annotation is of 7200 s"), ("Duration of the seizures: 4 s", [[5, 9]]))),
    ("a.csv", "Onset;Duration;Text\n1.812;3,5;Seizure\n", "duration is '3,5', not a number"),
    # rows of another recording, or by another clock
    ("a_events.tsv", "filename\tonset\tduration\teventType\na.edf\t5\t4\tsz\nb.edf\t12\t4\tsz\n", "a_events.tsv: it has rows of b.edf"),
    ("a_events.tsv", "subject\tonset\tduration\teventType\n1\t5\t4\tsz\n2\t12\t4\tsz\n", "a_events.tsv: it has rows of 1, 2"),
    ("a.csv", "patient,channel,start_time,stop_time,label\nb,TERM,5,9,seiz\nc,TERM,12,16,seiz\n", "a.csv: it has rows of b, c"),
    ("a.csv", "channel,start_time,stop_time,label,unit\nTERM,1,2,seiz,min\n", "a.csv: its times are in min, not in seconds"),
    ("a.csv", "onset,duration,units,label\n5,4,s,Seizure\n", [[5, 9]]),
    ("a.csv", "Onset (s/10),Duration (s/10),Text\n50,40,Seizure\n", "Onset (s/10) is not in seconds"),
    ("a.csv", "Onset (sec since midnight),Duration (s),Text\n5,4,Seizure\n", "is not in seconds"),
    ("a.csv", "Onset (seconds from start),Duration (sec.),Text\n5,4,Seizure\n", [[5, 9]]),
    ("a.csv", "Times in samples (256 Hz)\nOnset,Duration,Text\n5,4,Seizure\n", "a.csv: 'Times in samples (256 Hz)'"),
    ("a.csv", "Recording of 20 min\nTime of study: noon\nOnset,Duration,Text\n5,4,Seizure\n", [[5, 9]]),
    ("a.csv", "Recording-ID,onset,duration,label\n1,5,4,Seizure\n2,12,4,Seizure\n", "a.csv: it has rows of 1, 2"),
    ("a.csv", "file,onset,duration,label\nb.trc,5,4,Seizure\n", "a.csv: it has rows of b.trc"),
    ("a_events.tsv", "EEG_file\tonset\tduration\teventType\nx/b\t5\t4\tsz\n", "a_events.tsv: it has rows of x/b"),
    ("a.csv", "File name,onset,duration,label\nx/A_eeg.trc,5,4,Seizure\n", [[5, 9]]),
    ("a.csv", "Time (hh:mm:ss),Duration (s),Text\n0.00006,4,Seizure\n", "Time (hh:mm:ss) is not in seconds"),
    ("a.csv", "Onset (s),Time (hh:mm:ss),Duration (s),Text\n5,0:00:05,4,Seizure\n", [[5, 9]]),
    # edges of a seizure under any title
    ("a.csv", "onset,duration,label,info\n5,5,Seizure,start\n15,5,Seizure,end\n", [[5, 15]]),
    ("a.csv", "onset,duration,label,value\n5,5,Seizure,on\n15,5,Seizure,off\n", [[5, 15]]),
    ("a.csv", "onset,duration,label,video\n5,4,Seizure,on\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,info\n5,5,Seizure,EEG onset\n15,5,Seizure,EEG offset\n", "'Seizure EEG onset' at 5 s speaks"),
    # seizures above the titles, or in their line
    ("a.csv", "Seizures: 5-9\nOnset,Duration,Text\n0,20,background\n", "'Seizures: 5-9' stands above rows that are on none"),
    ("a.csv", "Seizure list\nOnset,Duration,Text\n5,4,left temporal\n0,20,background\n", "'Seizure list' stands above rows that are on none"),
    ("a.csv", "Seizures of patient 3\nOnset,Duration,Text\n5,4,Seizure\n", [[5, 9]]),
    ("a_events.tsv", "onset\tduration\teventType\tnote2\t5\t4\tsz\n12\t4\tsz\tx\n", "incomplete row 'onset duration eventType note2 5"),
    ("a.csv", "Onset,Duration,Text\v1,1,background\v5,4,Seizure\v", [[5, 9]]),
    # rows that lost a cell, have one too many that is empty, or stand above the titles
    ("a.csv", "Onset,Duration,Annotation,Rater\n5,4,Seizure,A\n12,4,B\n", "a.csv: incomplete row '12 4 B'"),
    ("a.csv", "Onset,Duration,Annotation,Rater\n5,4,Seizure\n12,4,sz\n", [[5, 9], [12, 16]]),
    ("a.csv", "Onset,Duration,Annotation,Rater\n5,4,Seizure,A,\n12,4,eyes open,A,,\n", [[5, 9]]),
    ("a_events.tsv", "5\t4\tsz\n0\t20\tbckg\nonset\tduration\teventType\n", "'5 4 sz' stands above the titles"),
    ("a.csv", "file,onset,duration,label\na.edf,5,4,Seizure\nb.edf,12,4,Seizure\n", "a.csv: it has rows of b.edf"),
    ("a.csv", "recording,onset,duration,label\n1,5,4,Seizure\n2,12,4,Seizure\n", "a.csv: it has rows of 1, 2"),
    ("a.csv", "path,onset,duration,label\nC:\\sz\\A.EDF,5,4,Seizure\nC:\\sz\\A.EDF,1,1,background\n", [[5, 9]]),
    ("a_events.tsv", "onset\tduration\teventType\n0\t20\tbckg\n#5\t4\tsz\n", "a_events.tsv: '#5\\t4\\tsz' is commented out"),
    ("a.csv_bi", CSV.format("20") + "TERM,0,20,bckg,1\n#TERM,5,9,seiz,1\n", "is commented out"),
    ("a.tse", "version = tse_v1.0.0\n\n0.0 20.0 bckg 1.0\n# 5.0 9.0 cpsz 0.9\n", "'# 5.0 9.0 cpsz 0.9' is commented out"),
    ("a.tse", "version = tse_v1.0.0\n# seizures, 2 at most\n0.0 20.0 bckg 1.0\n", []),
    ("a.csv_bi", CSV.format("20") + "TERM,5,9,seiz,0.0000\n", "confidence 0.0000 of a seizure"),
    ("a.csv_bi", "# seizures, if any, by ab\n" + CSV.format("20") + "TERM,0,20,bckg,1\n", []),
    ("a.csv", '"Event, type","Onset","Duration","Text"\nx,5,4,Seizure\n', [[5, 9]]),
    ("a.csv", '"Onset, ms","Duration, ms","Text"\n5000,4000,Seizure\n', "Onset, ms is not in seconds"),
    ("a_events.tsv", "onset\tduration\teventType\teventType\n5\t4\tbckg\tsz\n", "several columns eventType"),
    # codes of edges and of labels
    ("a.csv", "onset,duration,label,code\n5,1,Seizure,1\n9,1,Seizure,2\n", "code is '1' or '2' in rows of 1 s: where these"),
    ("a.csv", "onset;duration;label;Phase\n5;1;Anfall;A\n9;1;Anfall;E\n12;1;Anfall;A\n15;1;Anfall;E\n", "Phase is 'a' or 'e' in rows of 1 s"),
    ("a_events.tsv", "onset\tduration\teventType\tvalue\n5\t1\tsz\t1.0\n9\t1\tsz\t0.0\n", "value is '1' or '0' in rows of 1 s"),
    ("a.csv", "onset,duration,label,No,Rater\n5,4,Seizure,1,1\n12,4,Seizure,2,1\n", [[5, 9], [12, 16]]),
    ("a.csv", "onset,duration,label,isStart,isEnd\n5,1,Seizure,x,\n9,1,Seizure,,x\n", "isStart is 'x' or '' in rows of 1 s"),
    ("a.csv", "onset,duration,label,\u72b6\u6001\n5,1,Seizure,\u5f00\u59cb\n9,1,Seizure,\u7ed3\u675f\n12,1,Seizure,\u5f00\u59cb\n", "in rows of 1 s: where these are"),
    ("a.csv", "Sz #,onset,duration,label,clock,channel\n1,5,1,Seizure,00:00:05,F7\n2,9,1,Seizure,00:00:09,F7\n", [[5, 6], [9, 10]]),
    # a line above, or a title, that says from where
    ("a.csv", "(values in samples)\nonset,duration,label\n5,4,Seizure\n", "a.csv: '(values in samples)'"),
    ("a.csv", "Zeiten in Minuten\nonset,duration,label\n5,4,Seizure\n", "a.csv: 'Zeiten in Minuten'"),
    ("a.csv", "Times are relative to clip start\nonset,duration,label\n5,4,Seizure\n", "'Times are relative to clip start'"),
    ("a.csv", "onset (s from clip start),duration,label\n5,4,Seizure\n", "onset (s from clip start) is not in seconds"),
    ("a.csv", "onset,duration,label,onset_in_recording\n5,4,Seizure,812\n", "onset in recording is 812 beside an onset of 5"),
    ("a.csv", "onset,duration,label,onset_frames\n5,4,Seizure,5\n", "onset frames is 5 beside an onset of 5"),
    ("a.csv", "onset,duration,label,clinical onset,onset_ms,onset_samples\n5,4,Seizure,7,5000,1280\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,Rater\n5,4,Seizure,1\n5,4,Seizure,2\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,value\n5,4,Seizure,1\n12,5,Seizure,2\n", [[5, 9], [12, 17]]),
    ("a.csv", "start,end,label,comment\n0,5,0,background\n5,9,1,\n9,20,0,background\n", "'1' at 5 s is a code"),
    ("a.csv", "onset,duration,label\n1280,1024,seizure\n", "event from 1280 s to 2304 s lies beyond the recording's 20 s: of another, or in samples or ms?"),
    # a second onset, or one from another start, in another unit, with a point of thousands
    ("a.csv", "t0,t1,label\n5,9,seizure\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,t0,t1\n0,10,seizure,5,9\n", "onset is 0 and 5 in one row"),
    ("a.csv", "Sz start,Sz end,Start,End,label\n5,9,0,10,Seizure\n", "onset is 0 and 5 in one row"),
    ("a.csv", "Seizure start,Seizure end,label\n5,9,left temporal\n", "'Seizure start=5' at 5 s speaks"),
    ("a.csv", "clip_start,onset,duration,label\n10,5,4,Seizure\n", "clip start is 10 beside an onset of 5"),
    ("a_events.tsv", "Day\tonset\tduration\teventType\n1\t2\t2\tsz\n2\t5\t4\tsz\n", "day is 2 beside an onset of 5"),
    ("a_events.tsv", "onset\tduration\ttrial_type\tsample\n15\t4\tseizure\t15\n", "sample is 15 beside an onset of 15"),
    ("a.csv", "latency,type,time,duration\n1280,Seizure,5,4\n", "latency is 1280 beside an onset of 5"),
    ("a.csv", "Onset;Duration;Text\n5;1;background\n812;4;Seizure\n1.200;4;Seizure\n", "is its point one of thousands?"),
    ("a.csv", "Epoch start,Day,sample,onset,duration,label\n0,1,1280,5,4,Seizure\n12,1,3072,12,4,Seizure\n", [[5, 9], [12, 16]]),
    # of several recordings or another one, by further titles and a line above
    *(("a.csv", f"{title};onset;duration;label\n1;5;4;Seizure\n2;12;4;Seizure\n", "a.csv: it has rows of 1, 2")
      for title in ("Case", "MRN", "EEG no.", "Night", "Visit", "Patienten-ID", "Fallnummer", "Aufzeichnung", "Enregistrement", "Paciente", "Registro")),
    ("a.csv", "# source: C:\\eeg\\night b.edf\nonset,duration,label\n5,4,Seizure\n", "it is of another recording"),
    ("a_events.tsv", "# source: b.edf\nonset\tduration\teventType\n5\t4\tsz\n", "a_events.tsv: 'source: b.edf': it is of another recording"),
    ("a_events.tsv", "# source: a_eeg.edf\nonset\tduration\teventType\n5\t4\tsz\n", [[5, 9]]),
    ("a.csv_bi", "# times in samples\n" + CSV.format("20") + "TERM,5,9,seiz,1\n", "a.csv_bi: 'times in samples'"),
    ("a_annotations.txt", "# source: C:\\eeg\\A_eeg.EDF of a.edf\nonset,duration,label\n5,4,Seizure\n", [[5, 9]]),
    ("a.csv", "EEG,onset,duration,label\nF7,5,4,Seizure\nT3,12,4,Seizure\n", [[5, 9], [12, 16]]),
    # of other units or another start by a line above, and parts of a day of a spreadsheet
    *(("a.csv", f"{line}\nonset,duration,label\n5,4,Seizure\n", f"a.csv: {line!r}")
      for line in ("Timebase: samples", "TimeUnit: ms", "Zeitbasis = min", "Offset: 100 s", "Time offset 0.5")),
    ("a.csv", "Offset: 0 s\nonset,duration,label\n5,4,Seizure\n", [[5, 9]]),
    ("a.csv", "Time;Duration;Text\n0,00009404;4;Seizure\n0,0002;1;eyes open\n", "onset is 0.00009404: seconds, or a part of a day?"),
    ("a.csv", "Time,Duration,Text\n0.500000,4,Seizure\n0,1,eyes open\n", [[0.5, 4.5]]),
    ("a.csv", "Time,Duration,Text\n0.00390625,4,Seizure\n12,1,eyes open\n", [[0.00390625, 4.00390625]]),
    ("a.csv", "onset,duration,label,time base\n5,4,Seizure,samples\n", "its times are in samples"),
    ("a.csv", "Beginn;Dauer;Ereignis;Einheit\n5;4;Anfall;min\n", "its times are in min"),
    *(("a.csv", f"{title},onset,duration,label\n{value},2.5,4,Seizure\n", f"{title.lower()} is {value} beside an onset of 2.5: from which start?")
      for title, value in (("Minute", 13), ("Hour", 1), ("Page", 27), ("Epoch no", 3), ("Clip", 4))),
    ("a.csv", "min,Minute,Page,Epoch,onset,duration,label\n0.2,0,2,1,12,4,Seizure\n", [[12, 16]]),
    # one of several raters, or all
    ("a.csv", "onset,duration,label,Confidence\n5,4,Seizure,high\n12,4,Seizure,low\n", "'Seizure low' at 12 s speaks"),
    ("a.csv", "onset,duration,label,Present\n5,4,Seizure,no\n", "'Seizure no' at 5 s speaks"),
    ("a.csv", "onset,duration,label,awareness,level\n5,4,Seizure,low,low\n", [[5, 9]]),
    ("a.csv", "onset,duration,label,Expert A,Expert B\n5,4,Seizure,1,0\n", "'Seizure 0' at 5 s speaks"),
    ("a.csv", "onset,duration,label,votes\n5,4,Seizure,3\n12,4,Seizure,0 of 3\n", "'Seizure 0 of 3' at 12 s speaks"),
    ("a.csv", "onset,duration,label,agreement\n5,4,Seizure,0/3\n", "'Seizure 0/3' at 5 s speaks"),
    ("a.csv", "onset,duration,label,votes,rater1,Rater\n5,4,Seizure,3,1,0\n", [[5, 9]]),
    ("a.lbl_bi", "version = lbl_v1.0.0\n", "not read as labels: a.lbl_bi"),
    ("a_annotations.xml", "<xml/>", "not read as labels: a_annotations.xml")])
def test_label_files_and_exported_lists_beside_an_edf_are_read_or_named(tmp_path, name, content, events):
    stem = re.match(r"P01(_n\d?)?", name)
    write_edf(tmp_path / "src" / f"{stem[0] if stem else 'a'}.edf", 20)
    (tmp_path / "src" / name).write_text(content)
    _, text = said(tmp_path / "src", tmp_path / "out", labels=corpora.LENIENT)
    r, = data.open_corpus(tmp_path / "out")
    if isinstance(events, str):
        assert not r.labelled and events in text
    else:
        assert r.labelled and r.events.tolist() == events


@pytest.mark.parametrize("time, noted", [("22.00.00", True), ("21.59.00", False), ("21.59.12", False), ("00.00.00", False)])
def test_a_label_file_of_another_start_is_noted_or_gives_no_labels(tmp_path, time, noted):
    """The dateTime of SzCORE, be it the recording's or the seizure's, and MNE's orig_time, in s from which its onsets count."""
    for name in "ab":
        write_edf(tmp_path / "src" / f"{name}.edf", 20, time=time)
    (tmp_path / "src" / "a_events.tsv").write_text(tsv((12, 4, "sz", 1, "n/a", "2024-03-05 21:59:00", 20)).replace("21:59:00", "21:59:24" if time == "21.59.12" else "21:59:00"))
    (tmp_path / "src" / "b_annotations.txt").write_text(
        f"# MNE-Annotations\n# orig_time : 2024-03-05 21:59:{'12' if time == '21.59.12' else '00'}+00:00\n# onset, duration, description\n12, 4, Seizure\n")
    text = said(tmp_path / "src", tmp_path / "out")[1]
    a, b = data.open_corpus(tmp_path / "out")
    assert a.events.tolist() == [[12, 16]] and b.labelled == (not noted)
    assert ("a_events.tsv is of a recording that begins at 2024-03-05 21:59:00" in text) == noted
    assert ("b_annotations.txt: 'orig_time : 2024-03-05 21:59:00+00:00'" in text) == noted


@pytest.mark.parametrize("above, titles, row, right", [
    ("Recording start: 2024-03-05 {}\n", "", "", None), ("# start;{} end 23:00:00\n", "", "", None), ("Study began 2024-03-05T{}Z\n", "", "", None),
    ("Aufnahmebeginn: 05.03.2024 {.}\n", "", "", None), ("Start der Aufnahme: {h}\n", "", "", None), ("\u5f00\u59cb\u65f6\u95f4\uff1a{}\n", "", "", None),
    ("", "Uhrzeit,", "{.}", 12), ("", "\u65f6\u95f4,", "{}", 12), ("", "Saat,", "{h}", 12), ("Datum der Aufnahme: 05.03.24\n", "Clock time,", "{}", 12),
    ("", "Clock time,", "{}", 12), ("", "dateTime,", "2024-03-05T{}.250", 12), ("", "Start,", "{}", 12)])
def test_a_list_whose_times_of_day_are_not_those_of_its_seconds_gives_no_labels(tmp_path, above, titles, row, right):
    """The recording was cut since: from its own start its seizures are elsewhere."""
    for name, hour, minute in (("a", "21", 59), ("b", "21", 30), ("c", "09", 59)):
        write_edf(tmp_path / "src" / f"{name}.edf", 20, time="21.59.00")
        written = "T" in above + row or "." in above + row.replace(".250", "") or "h}" in above + row
        clock = f"{hour}:{minute}:{right or 0:02d}" + " PM" * (hour == "09" and not written)
        (tmp_path / "src" / f"{name}.csv").write_text(
            f"Exported at 10:00:00\n{above}Onset,{titles}End time,Annotation,Created\n12,{row}{',' * bool(titles)}16,Seizure,2024-04-01 10:00:00\n"
            .replace("{}", clock).replace("{.}", clock.replace(":", ".")).replace("{h}", clock[:5].replace(":", "h")))
    text = said(tmp_path / "src", tmp_path / "out")[1]
    a, b, c = data.open_corpus(tmp_path / "out")
    assert a.events.tolist() == [[12, 16]] and not b.labelled and c.labelled == (not written)
    assert "NO LABELS, not used for training or scoring: b (b.csv: " in text and re.search("21[:.h]30", text)


@pytest.mark.parametrize("place", ["sub-01/eeg/sub-01_task-sz_events.json", "task-sz_events.json", "task-rest_events.json"])
@pytest.mark.parametrize("column, said, why", [
    ("trial_type", {"Levels": {"event": "epileptic seizure"}}, "trial_type event is 'epileptic seizure'"),
    ("value", {"Levels": {"1": {"Description": "Seizure"}, "0": "background"}}, "value 1 is"),
    ("onset", {"Units": "ms"}, "onset is in ms"), ("onset", {"Units": "s"}, ""), ("value", {"Levels": {"1": "no seizure", "9": "seizure"}}, "")])
def test_a_bids_description_that_calls_a_code_a_seizure_leaves_no_labels(tmp_path, place, column, said, why):
    write_edf(tmp_path / "sub-01" / "eeg" / "sub-01_task-sz_eeg.edf", 20)
    (tmp_path / "sub-01" / "eeg" / "sub-01_task-sz_events.tsv").write_text("onset\tduration\ttrial_type\tvalue\n0\t1\tbackground\t0\n5\t4\tevent\t1\n")
    (tmp_path / place).write_text(json.dumps({column: said}))
    imported(tmp_path, tmp_path / "out")
    r, = data.open_corpus(tmp_path / "out")
    assert why in r.unlabelled if why and "rest" not in place else r.labelled and not len(r.events)


def test_several_bids_descriptions_of_one_table_count_together_the_nearest_first(tmp_path):
    write_edf(tmp_path / "sub-01" / "eeg" / "sub-01_task-sz_eeg.edf", 20)
    (tmp_path / "sub-01" / "eeg" / "sub-01_task-sz_events.tsv").write_text("onset\tduration\ttrial_type\n0\t1\tbackground\n5\t4\tA\n")
    above, near = tmp_path / "task-sz_events.json", tmp_path / "sub-01" / "sub-01_task-sz_events.json"
    for far, close, labelled in (({"trial_type": {"Levels": {"A": "seizure"}}}, {"onset": {"Units": "s"}}, False),
                                 ({"trial_type": {"HED": {"A": "Seizure, Clinical"}}}, {}, False),
                                 ({"trial_type": {"Levels": {"A": "seizure"}}}, {"trial_type": {"Levels": {"A": "eyes open"}}}, True)):
        above.write_text(json.dumps(far))
        near.write_text(json.dumps(close))
        imported(tmp_path, tmp_path / "out", replace=True)
        (tmp_path / "sub-01" / "eeg" / "sub-01_task-sz_events.tsv").touch()
        r, = data.open_corpus(tmp_path / "out")
        assert r.labelled == labelled and (labelled or "task-sz_events.json says that trial_type A is" in r.unlabelled)


def test_what_an_annotation_file_that_counts_alone_keeps_from_being_read_is_said(tmp_path):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", {1: mark(1, "no seizure"), 2: mark(2, "Focal seizure", 3)})
    (tmp_path / "src" / "a_events.tsv").write_text(tsv((0, 10, "bckg")))
    (tmp_path / "src" / "a.csv").write_text("onset,duration,label\n5,4,sz\n")
    text = said(tmp_path / "src", tmp_path / "out")[1]
    assert "a_events.tsv counts alone, not a.csv" in text
    assert "a_events.tsv counts alone, not the 'Focal seizure' inside the EDF+" in text
    (tmp_path / "src" / "a_events.tsv").write_text(tsv((2, 3, "sz")))
    assert "inside the EDF+" not in said(tmp_path / "src", tmp_path / "out")[1]


@pytest.mark.parametrize("name, content", [
    ("a.csv", "Onset,Duration,Annotation\n5,4,Anfallsmuster\n"),
    ("a_events.tsv", "onset\tduration\ttrial_type\n5\t4\tAnfallsmuster\n"),
    ("a.txt", "a letter")])
def test_what_the_user_says_of_the_texts_of_a_list_is_heard_in_a_second_import(tmp_path, name, content):
    """Also where the file is no list and the texts are inside the EDF+."""
    plus(tmp_path / "src" / "a.edf", range(20), "EDF+C", {5: mark(5, "Anfallsmuster", 4)})
    write_edf(tmp_path / "src" / "b.edf", 20)
    (tmp_path / "src" / "b_events.tsv").write_text(tsv((2, 3, "sz")))
    (tmp_path / "src" / name).write_text(content)
    text = said(tmp_path / "src", tmp_path / "out")[1]
    assert "annotations that label nothing:\n  1 x 'Anfallsmuster'" in text and "NO LABELS" in text
    report, text = said(tmp_path / "src", tmp_path / "out", seizure_labels=["Anfallsmuster"])
    assert report.read == ["a"] and report.kept == 1 and "NO LABELS" not in text and "hint" not in text
    assert data.open_corpus(tmp_path / "out")[0].events.tolist() == [[5, 9]]
    assert imported(tmp_path / "src", tmp_path / "out", seizure_labels=["Anfallsmuster"]).kept == 2
    assert imported(tmp_path / "src", tmp_path / "out").read == ["a"]


@pytest.mark.parametrize("stem, inside, files, lines", [
    # labels inside an EDF+ keep from being read what lies beside it
    ("a", [(1, "background")], {"a_seizures.csv": "x"}, ["what its EDF+ says counts alone, not a_seizures.csv"]),
    ("a", [(1, "background")], {"a-sz.csv": "x", "a_scoring 2.csv": "x", "b.csv": "x"},
     ["what its EDF+ says counts alone, not a-sz.csv, a_scoring 2.csv"]),
    ("sz_2", [(1, "background")], {"sz_2_events.json": "{}", "sz_2.edf.md5": "x", "labels.csv": "x", "Seizures 2024.xlsx": "x", "labels.md": "x"},
     ["what its EDF+ says counts alone, not Seizures 2024.xlsx, labels.csv"]),
    ("a", [(1, "background")], {"a.csv": "Anfang;Notiz\n5;Anfall\n"}, ["what its EDF+ says counts alone, not a.csv"]),
    ("a", [(1, "background")], {"a_events.tsv.txt": tsv((5, 4, "sz")), "a_rater2_events.tsv": tsv((5, 4, "sz")), "a_channels.tsv": "x", "ab.csv": "x"},
     ["what its EDF+ says counts alone, not a_events.tsv.txt, a_rater2_events.tsv"]),
    ("P_ID01_r1", [], {"P_ID01_r1_a1.tsv": "# none\n", "P_ID01_r1_a2.tsv": "5\t9\tFIA\n"}, ["P_ID01_r1_a1.tsv counts alone, not P_ID01_r1_a2.tsv"]),
    ("a", [(1, "background")], {"a.json": "{}", "b.json": "{}"}, ["what its EDF+ says counts alone, not a.json"]),
    ("a", [(1, "sz start"), (4, "sz end")], {"a.xml": "<x/>", "a.png": ""}, ["what its EDF+ says counts alone, not a.xml"]),
    # files of another name or kind, and texts of another seizure
    ("a", [], {"a_events.tsv": tsv((0, 20, "bckg")), "a_annotations.xml": "<x/>"}, ["a_events.tsv counts alone, not a_annotations.xml"]),
    ("a", [(25, "Seizure")], {"a_events.tsv": tsv((2, 3, "sz"))}, ["a_events.tsv counts alone, not the 'Seizure' inside the EDF+"]),
    ("a", [(25, "no seizure"), (12, "Seizure end")], {"a_events.tsv": tsv((2, 3, "sz"))}, []),
    # of known corpora only what has another seizure
    ("aaaaaaaa_s001_t000", [], {".csv_bi": CSV.format("30") + "TERM,0,30,bckg,1\n", ".csv": CSV.format("30") + "FP1-F7,5,9,fnsz,1\n"},
     ["aaaaaaaa_s001_t000.csv_bi counts alone, not aaaaaaaa_s001_t000.csv"]),
    ("aaaaaaaa_s001_t000", [], {".csv_bi": CSV.format("30") + "TERM,5,9,seiz,1\n", ".csv": CSV.format("30") + "FP1-F7,5,8,fnsz,1\nF7-T3,6,9,fnsz,1\n"}, []),
    ("aaaaaaaa_s001_t000", [], {".tse_bi": "version = tse_v1.0.0\n0 30 bckg 1\n", ".lbl_bi": "version = lbl_v1.0.0\n"}, []),
    ("sub-01_eeg", [], {"sub-01_events.tsv": tsv((0, 30, "bckg")), ".csv_bi": CSV.format("30") + "TERM,5,9,seiz,1\n"},
     ["sub-01_events.tsv counts alone, not sub-01_eeg.csv_bi"]),
    ("chb01_03", [], {"chb01-summary.txt": "File Name: chb01_03.edf\nNumber of Seizures in File: 0\n", ".edf.seizures": "x"},
     ["chb01-summary.txt counts alone, not chb01_03.edf.seizures"])])
def test_labels_that_are_not_read_beside_those_that_count_are_said(tmp_path, stem, inside, files, lines):
    plus(tmp_path / "src" / f"{stem}.edf", range(30), "EDF+C", {onset: mark(onset, text) for onset, text in inside})
    for name, content in files.items():
        (tmp_path / "src" / (stem + name if name.startswith(".") else name)).write_text(content)
    _, text = said(tmp_path / "src", tmp_path / "out")
    r, = data.open_corpus(tmp_path / "out")
    assert r.labelled and [note for note in r.notes.split("; ") if "counts alone" in note] == lines
    assert all(line in text for line in lines)


@pytest.mark.parametrize("name, content", [
    ("a.csv", "Onset,Duration,Annotation\n5,4,Seizure"), ("a_events.tsv", "onset\tduration\teventType\n5\t4\tsz"),
    ("a.csv_bi", CSV.format("20") + "TERM,0,5,bckg,1\nTERM,5,9,seiz,1\nTERM,9,20,bckg,1")])
def test_a_label_file_whose_last_line_has_no_end_may_have_been_cut_and_is_noted(tmp_path, name, content):
    write_edf(tmp_path / "src" / "a.edf", 20)
    for text, noted in ((content, True), (content + "\n", False), (content.encode("utf-16"), True),
                        ((content + "\r\n").encode("utf-16"), False)):
        (tmp_path / "src" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        imported(tmp_path / "src", tmp_path / "out")
        r, = data.open_corpus(tmp_path / "out")
        assert r.events.tolist() == [[5, 9]]
        assert ("the last line of its label file has no end: it may have been cut" in r.notes) == noted, text


def test_a_siena_list_whose_last_line_has_no_end_may_have_lost_a_seizure_and_is_noted(tmp_path):
    write_edf(tmp_path / "src" / "PN00-1.edf", 300)
    times = "".join(f"{what} time: 00.0{minute}.00\n" for what, minute in (
        ("Registration start", 0), ("Registration end", 5), ("Seizure start", 1), ("Seizure end", 2)))
    for end, noted in (("", True), ("\n", False), ("\r\n\n  ", False)):
        (tmp_path / "src" / "Seizures-list-PN00.txt").write_bytes(f"File name: PN00-1.edf\n{times.strip()}{end}".encode())
        imported(tmp_path / "src", tmp_path / "out")
        r, = data.open_corpus(tmp_path / "out")
        assert r.events.tolist() == [[60, 120]] and ("it may have been cut" in r.notes) == noted


def test_what_a_bids_channels_file_says_and_the_import_does_not_act_on_is_noted(tmp_path):
    write_edf(tmp_path / "src" / "sub-01_eeg.edf", 5)
    (tmp_path / "src" / "sub-01_channels.tsv").write_text("name\ttype\tunits\tstatus\nFp1\tEEG\tmV\tbad\nF3\tEEG\tmV\tgood\n")
    text = said(tmp_path / "src", tmp_path / "out")[1]
    assert "sub-01_channels.tsv calls Fp1 bad: taken all the same" in text
    assert "sub-01_channels.tsv gives units mV: those of the EDF count" in text


def test_an_empty_row_is_dropped_and_alone_is_no_label():
    rows = CSV.format("30") + "TERM,0.0000,0.0000,seiz,1\n"
    with pytest.raises(edf.DataError, match="no row"):
        annotations.parse_csv(rows + rows.splitlines()[-1] + "\n")
    assert annotations.parse_csv(rows + "TERM,5,9,seiz,1\n").events == [(5, 9)]
    with pytest.raises(edf.DataError, match="its only seizure is an empty row"):
        annotations.parse_csv(rows + "TERM,0,30,bckg,1\n")


# ---- labels never change a prediction ----

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of an untrained small model that finds something in noise."""
    torch.manual_seed(0)
    config = {"model": model.SMALL, "experiment": {"seed": 0}, "data": {"path": ""},
              "evaluation": {**evaluate.DEFAULTS, "window_seconds": 20.0}}
    state = {"model": model.V3(19, **model.SMALL).state_dict(), "config": config, "montage": "referential",
             "channels": list(NAMES), "optimizer": {}, "scores": {"threshold": 0.02}}
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    checkpoint.atomic_save(state, path)
    return path


def test_labels_beside_or_inside_an_edf_do_not_change_the_events_that_are_written(weights, tmp_path, capsys):
    folder = tmp_path / "x"
    edf_file = plus(folder / "a.edf", range(60), "EDF+C", {2: mark(2, "seizure end")})
    written = []
    for labels in (None, tsv((5, 9, "sz")), tsv((5, 9, "sz", 1, "n/a", "n/a", "900.00")), "broken", "dead link"):
        beside = folder / "a_events.tsv"
        beside.unlink(missing_ok=True)
        if labels == "dead link":
            beside.symlink_to(tmp_path / "nothing")
        elif labels:
            beside.write_text(labels)
        arguments = ["--checkpoint", str(weights), "--data", str(edf_file)]
        assert evaluate.main([*arguments, "--events", str(tmp_path / "o.tsv")]) == 0
        written.append((tmp_path / "o.tsv").read_text())
        assert "background" not in capsys.readouterr().err
        assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 0
        written.append((tmp_path / "out" / "a_events.tsv").read_text())
        text = capsys.readouterr().out
        assert ("NO LABELS" in text) == ("no labels" in text) == (labels != tsv((5, 9, "sz"))) and "0 labelled" not in text
        assert (json.loads((tmp_path / "out" / "scores.json").read_text())["seizures"] is None) == ("NO LABELS" in text)
    assert len(set(written)) == 1 and "\tsz\t" in written[0]


# ---- patients ----

def test_header_codes_that_contradict_the_names_are_said_with_what_to_do_and_never_printed(tmp_path):
    src = tmp_path / "src"
    for name, patient in (("anna_1", "SECRET7 F 01-JAN-1980 Meier"), ("berta_1", "SECRET7 F 01-JAN-1980 Meier"),
                          ("carl_1", "SECRET8 M X X"), ("carl_2", "SECRET9 M X X"), ("dora_1", "X X X X"), ("emil_1", "X X X X")):
        plus(src / f"{name}.edf", range(5), "EDF+C", patient=patient)
    for _ in range(2):                                  # of a second import too
        text = said(src, tmp_path / "out")[1]
        assert ("warning: patients anna, berta are one person by their EDF headers: train with "
                "data.same_person: [berta = anna]") in text
        assert "warning: patient carl is 2 persons by the EDF headers" in text and "dora" not in text.split("warning", 1)[1]
    told = []
    data.info(tmp_path / "out", told.append)
    everything = text + "\n".join(told) + (tmp_path / "out" / disk.INDEX).read_text()
    assert "one person by their EDF headers" in "\n".join(told) and "SECRET" not in everything and "Meier" not in everything
    assert b"SECRET" not in b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.h5"))
    recordings = data.open_corpora(tmp_path / "out", ["berta = anna"])
    assert {r.patient for r in recordings if r.name in ("anna_1", "berta_1")} == {"anna"}
    one, two = fake("anna"), fake("berta")
    one.patient_code = two.patient_code = "0f0f0f0f"
    assert any("anna, who trains, and berta, who validates" in line for line in splits.told([one, two], [one], [two], {"split": "patient"}))


@pytest.mark.parametrize("one, other, said", [("tusz/aaaaaajy", "tuep/aaaaaajy", True), ("a/chb21", "b/chb01", True), ("a/P01", "b/P01", False), ("a/01", "b/01", False),
                                              ("a/Meier", "a/Schulz", False)])
def test_a_name_of_two_corpora_that_trains_and_validates_is_said(one, other, said):
    one, two = fake(one), fake(other)
    lines = splits.told([one, two], [one], [two], {"split": "patient"})
    assert any("are one person by their names: data.same_person: [" in line for line in lines) == said


@pytest.mark.parametrize("patient", ["00000000 X X X", "ANON M 01-JAN-1900 X", "XXXXXXX", "Unknown, Unknown", "^^^ ????", "Removed",
                                     "X F 01-JAN-1950 X_X", "de-identified M 1.1.1900", ""])
@pytest.mark.parametrize("kind", ["EDF+C", ""])
def test_what_stands_for_nobody_makes_no_two_patients_one_person(tmp_path, patient, kind):
    path = plus(tmp_path / "a.edf", range(5), kind, patient=patient)
    assert splits.person_code(edf.read_header(path)) == ""


def test_files_named_eeg_and_a_patient_are_of_several(tmp_path):
    for name in ("EEG_P01_a", "EEG_P02_a", "P03_EEG", "anna_1", "EEG"):
        write_edf(tmp_path / f"{name}.edf", 5)
    found = {corpora.identify(path, tmp_path).patient for path in tmp_path.iterdir()}
    assert found == {"P01", "P02", "P03", "anna", "EEG"}


def test_folders_that_hold_a_kind_of_files_name_no_patient(tmp_path):
    """Else all of EEG/ would be one, and P01 of train/ another than P01 of dev/."""
    for place, patient in (("EEG/P01_1", "P01"), ("EEG/P02_1", "P02"), ("train/P01/x", "P01"), ("dev/P01/x", "P01"), ("Seizures/anna_1", "anna"),
                           ("anna/EEG/x_1", "anna"), ("data/raw/EEG_P03_a", "P03"), ("seizure_1", "seizure"),
                           # nor do the words of a name, where a person's code follows
                           ("train_P01_a", "P01"), ("test_P01_b", "P01"), ("Ictal_EEG_P01", "P01"), ("seizure_left", "seizure"), ("P01_sleep", "P01"),
                           ("sleep/P01_1", "P01"), ("preictal/P01/x", "P01"), ("test_1", "test"),
                           *((f"{kind}/P01_1", "P01") for kind in ("pre", "post", "Pre-Ictal", "non_seizure", "no seizures", "sz", "bckg", "interictal", "control")),
                           # of BIDS, or nearly
                           ("sub-01/ses-2/eeg/sub-01_ses-2_task-sz_eeg", "01"), ("sub-01/ses-2/eeg/sub-01_ses-2_task-sz-mon_eeg", "01"),
                           ("sourcedata/sub-01/orig", "01"), ("derivatives/clean/sub-01_run-1_eeg", "01"), ("sub-/x", "sub-")):
        assert corpora.identify(tmp_path / f"{place}.edf", tmp_path).patient == patient, place


@pytest.mark.parametrize("first, other", [("P01", "p01"), ("P01", "P1"), ("P-01", "P01"), ("M\xfcller", "Mu\u0308ller"), ("01", "1"), ("Pat 3", "pat003"),
                                          ("P01", "Patient-1"), ("ID001", "001"), ("Pt 1", "pat01"), ("Anna Meier", "Meier, Anna"), ("M\xfcller", "Mueller")])
def test_patients_whose_names_differ_in_spelling_alone_are_said(tmp_path, first, other):
    first, other = sorted((first, other))
    for place in (f"{first}/a", f"{other}/b", "P02/c", "P020/d", "P-1-02/e", "P-10-2/f"):
        write_edf(tmp_path / "src" / f"{place}.edf", 5)
    line = f"warning: patients {first} and {other} differ in spelling alone: if they are one person, train with data.same_person: [{other} = {first}]"
    told = []
    text = said(tmp_path / "src", tmp_path / "out")[1]
    assert line in text.splitlines() and text.count("in spelling alone") == 1
    data.info(tmp_path / "out", told.append)
    assert f"  {line}" in told


def test_patients_whose_names_differ_in_a_part_alone_are_said(tmp_path):
    """Else P001a trains and P001b validates."""
    for name in ("P001a", "P001b", "P002", "P003-1_x", "P003-2_x", "20240305a", "20240305b", "PN00-1", "PN00-2", "sub1", "sub2", "01-1", "01-2"):
        write_edf(tmp_path / "src" / f"{name}.edf", 5)
    told = []
    text = said(tmp_path / "src", tmp_path / "out")[1]
    data.info(tmp_path / "out", told.append)
    for pair in (("P001a", "P001b"), ("P003-1", "P003-2"), ("20240305a", "20240305b")):
        line = (f"warning: patients {pair[0]}, {pair[1]} count as 2: if they are one person, give them one folder, or train with "
                f"data.same_person: [{pair[1]} = {pair[0]}]")
        assert line in text.splitlines() and f"  {line}" in told
    assert text.count("count as") == 3
    # where the headers of all say who they are
    assert not any("count as" in line for line in splits.contradictions([("A1", "x", ""), ("A1b", "y", "")]))
    assert "A1, A1b, A1c, A1d, ... count as 5" in list(splits.contradictions((f"A1{part}", "", "") for part in ("", *"bcde")))[0]


@pytest.mark.parametrize("kind, one, other", [
    # a day or a session before the person, or in the place of one
    ("called by", "2024-03-05_P01", "2024-03-06_P01"), ("called by", "20240305_Meier", "20240306_Meier"), ("called by", "session1/P01", "session2/P01"),
    ("called by", "Day 1/P01", "Day 2/P01"), ("called by", "2024-03/P01", "2024-04/P01"), ("called by", "2023/anna/x", "2024/anna/y"), ("called by", "fold1/P01", "fold2/P01"), ("called by", "EEG1_Meier", "EEG2_Meier"), ("called by", "5.3.24_a", "6.3.24_a"),
    ("count as 2", "P01-night1", "P01-night2"), ("count as 2", "P01-2024-03-05", "P01-2024-04-05"), ("count as 2", "P01 baseline", "P01 follow up"),
    ("count as 2", "Meier1", "Meier2"), ("count as 2", "Meier Anna 1", "Meier Anna 2"), ("count as 2", "meier-1", "meier-2"), ("count as 2", "P01pre", "P01post"),
    ("files of P01 count as 2 patients: classA, classB", "classA/P01_1", "classB/P01_2"), ("files of P01 count as 2 patients: P01, good", "good/P01_1", "P01/2"),
    ("files of P01 count as 2 patients: 1 P01, 2 P01", "1 P01", "2 P01"), ("", "Center1_P01", "Center1_P02"), ("", "anna/id1", "bert/id2"),
    ("", "P01/night1", "P01/night2"), ("", "anna/day1", "bert/day2"), ("", "Schulz11", "Schulz12"), ("", "AMC01", "AMC02"), ("", "20240305", "P02"), ("", "control1", "control2"), ("", "Epi 1", "control 1")])
def test_recordings_of_one_person_that_may_count_as_several_are_said(one, other, kind):
    """Else one of them trains and the other validates."""
    found = [corpora.identify(Path(f"{name}.edf"), Path()).patient for name in (one, other, *["Schulz1_a", "UKB01_a"] * (kind[:5] == "count" or one[:3] == "AMC"))]
    text = "\n".join(splits.contradictions((patient, "", name) for patient, name in zip(found, (one, other, "", ""))))
    assert text.count(kind) == 1 if kind else "warning" not in text
    assert not list(splits.contradictions((patient, str(i), "") for i, patient in enumerate(dict.fromkeys(found))))


@pytest.mark.parametrize("names, warned", [(["EEG_1", "EEG_2"], True), (["EEG_1"], False), (["1/a", "1/b", "2/a"], False), (["anna", "ben"], False),
                                           (["sub-001/eeg/sub-001_task-x_eeg", "sub-002/eeg/sub-002_task-x_eeg"], False)])
def test_files_that_are_numbered_in_one_folder_may_be_one_person_s(tmp_path, names, warned):
    for name in names:
        write_edf(tmp_path / "src" / f"{name}.edf", 5)
    report, text = said(tmp_path / "src", tmp_path / "out")
    assert len(report.read) == len(names) and ("counts as a patient of its own, by its number" in text) == warned
    assert not any("of its own" in line for line in splits.contradictions([("1", "x", ""), ("2", "y", "")]))


# ---- an import that has not finished ----

def test_training_on_a_corpus_still_being_imported_is_a_passing_fault(tmp_path):
    """Exit 1 while the import runs and after it was killed, with the command that finishes it; then as ever."""
    for name in "abcd":
        write_edf(tmp_path / "src" / f"{name}_1.edf", 60)
        (tmp_path / "src" / f"{name}_1_events.tsv").write_text(tsv((20, 20, "sz")))
    process = held_import(tmp_path, 3, 1, tmp_path / "gate")
    config = loaded(tmp_path / "out", tmp_path / "results", training__epochs=1)

    def start():
        return forked.run([sys.executable, ROOT / "train.py", "--config", tmp_path / "results" / "config.yaml"],
                          capture_output=True, text=True)
    running = start()
    assert running.returncode == 1 and "is being imported by process" in running.stderr + running.stdout
    os.killpg(process.pid, 9)
    rest(process)
    stopped = start()
    assert stopped.returncode == 1 and "Finish it: python data.py import" in stopped.stderr + stopped.stdout
    with pytest.raises(TemporaryFault, match="Finish it"):
        data.copy_corpus(tmp_path / "out", tmp_path / "fast")
    told = command("info", tmp_path / "out")
    assert told.returncode == 0 and "NOT WHOLE" in told.stdout and "2 recordings" in told.stdout
    again = (stopped.stderr + stopped.stdout).split("Finish it: ")[1].splitlines()[0].split()[3:]
    assert command("import", *again).returncode == 0
    assert len(data.open_corpora(config["data"]["path"])) == 4 and "NOT WHOLE" not in command("info", tmp_path / "out").stdout


def test_evaluating_a_corpus_whose_import_was_stopped_is_exit_1(weights, tmp_path, capsys):
    write_edf(tmp_path / "src" / "a.edf", 60)
    imported(tmp_path / "src", tmp_path / "out")
    disk.write_json(tmp_path / "out" / disk.REPORT, {"refused": [], "unfinished": "python data.py import src out"})
    assert evaluate.main(["--checkpoint", str(weights), "--data", str(tmp_path / "out"), "--out", str(tmp_path / "e")]) == 1
    assert "Finish it: python data.py import src out" in capsys.readouterr().err
    (tmp_path / "out" / "a.h5").unlink()                # stopped before the first recording
    (tmp_path / "out" / disk.INDEX).unlink(missing_ok=True)
    assert evaluate.main(["--checkpoint", str(weights), "--data", str(tmp_path / "out"), "--out", str(tmp_path / "e")]) == 1
    assert "Finish it: python data.py import src out" in capsys.readouterr().err
    told = command("info", tmp_path / "out")
    assert told.returncode == 1 and "Finish it: python data.py import src out" in told.stderr
    imported(tmp_path / "src", tmp_path / "out")
    disk.write_json(tmp_path / "out" / disk.REPORT, {"refused": []})                    # of an earlier version
    assert len(data.open_corpus(tmp_path / "out")) == 1


@pytest.mark.parametrize("second, whole", [("b", False), ("a/anna/x.edf", False), (".", True), ("a", True)])
def test_a_stopped_import_is_not_finished_by_one_of_another_source(tmp_path, second, whole):
    src, out = tmp_path / "src", tmp_path / "out"
    for place in ("a/anna/x", "b/berta/y"):
        write_edf(src / f"{place}.edf", 5)
    stopped = f"python data.py import {src / 'a'} {out}"
    out.mkdir()
    disk.write_json(out / disk.REPORT, {"refused": [], "unfinished": stopped})
    imported(src / second, out)
    if whole:
        corpora.check_finished(out)
        return
    with pytest.raises(TemporaryFault, match="Finish it: " + re.escape(stopped) + "$"):
        corpora.check_finished(out)
    if second == "b":                                   # and of it alone
        imported(src / "a", out)
        corpora.check_finished(out)


# ---- what an import leaves out ----

def test_recordings_of_other_kinds_beside_edf_files_are_said(tmp_path):
    write_edf(tmp_path / "src" / "a.edf", 5)
    for name in ("b.bdf", "c.BDF", "d.vhdr"):
        (tmp_path / "src" / name).write_bytes(b"x")
    assert "hint: not read: 2 .bdf, 1 .vhdr: convert or unpack them to .edf" in said(tmp_path / "src", tmp_path / "out")[1]


def test_info_ends_in_silence_where_nobody_reads_on(tmp_path):
    for i in range(3):
        write_edf(tmp_path / "src" / f"{'x' * 90}{i}.edf", 5)
    imported(tmp_path / "src", tmp_path / "out")
    line = f"'{sys.executable}' -u '{ROOT / 'data.py'}' info '{tmp_path / 'out'}' | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_edf_py_works_alone(tmp_path):
    shutil.copy(ROOT / "eeg" / "edf.py", tmp_path)
    write_edf(tmp_path / "x.edf", 5)
    code = ("import edf; h = edf.read_header('x.edf'); s = edf.prepare_edf(h, edf.Recipe('referential'));"
            "print(s.eeg.shape, edf.read_annotations(h))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "(19, 1280) []\n", done.stderr


assert train                                            # imported before anything is forked
