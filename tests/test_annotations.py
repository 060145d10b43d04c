"""eeg/annotations.py, eeg/lists.py: which seizures a label file or an EDF+ marks, and what is refused. Real files."""

import re

import numpy as np
import pytest

import data
from eeg import edf
from eeg.annotations import (
    Unlabelled,
    Texts,
    finish,
    list_labels,
    parse_annotations,
    parse_csv,
    parse_events_tsv,
    parse_seizeit,
    read_beside,
    read_text,
)
from eeg.lists import parse_siena, parse_summary, siena_times, summary_labels
from eeg.release import release
from conftest import CSV, HEAD, command, imported, mark, plus, said, tsv, write_edf

# ---- label files ----


def test_szcore_events(shared):
    good = tsv(
        (20, 2, "sz"), (5, 10, "sz_foc_ia_nm"), (8, 12, "sz_gen_m_tonicClonic"), (0, 30, "bckg")
    )
    for text in (good, good.replace("\n", "\r\n"), "\ufeff" + good):
        text = text.encode().decode("utf-8-sig").replace("\r\n", "\n")
        np.testing.assert_array_equal(finish(parse_events_tsv(text), 30.0), [[5, 22]])
    for row, reason in (
        ((5, 2, "spkz"), "spkz"),
        ((5, -2, "sz"), "lasts -2"),
        ((5, 0, "sz"), "lasts 0"),
        ((-1, 2, "sz"), "-1"),
        (("n/a", 2, "sz"), "not a number"),
        (("5,500", 2, "sz"), "not a number"),
        ((5, "nan", "sz"), "number"),
        ((5, 2, "sz_"), "sz_"),
        ((5, 2, "SZ"), "SZ"),
        ((5,), "incomplete"),
    ):
        with pytest.raises(edf.DataError, match=reason):
            parse_events_tsv(tsv(row))
    with pytest.raises(edf.DataError, match="no row"):
        parse_events_tsv(HEAD)
    with pytest.raises(edf.DataError, match="eventType"):
        parse_events_tsv("onset\tduration\n1\t2\n")
    titled = "onset\tduration\teventType\ttrial_type\n0\t30\tbckg\t{}\n"
    assert parse_events_tsv(titled.format("no seizure")).events == []
    with pytest.raises(edf.DataError, match="'focal seizure' in a row that calls itself bckg"):
        parse_events_tsv(titled.format("focal seizure"))
    with pytest.raises(edf.DataError, match="impedance"):
        parse_events_tsv(tsv((0, 30, "impd"), (10, 5, "sz")))
    assert "impedance test" in parse_events_tsv(tsv((0, 5, "impd"), (10, 5, "sz"))).notes[0]


def test_a_decimal_comma_of_a_table_between_tabs_is_a_point():
    for rows, events in (("812,5\t43,0\tsz\n", [(812.5, 855.5)]), ("812,5\t43.5\tsz\n12\t4\tsz\n", [(812.5, 856), (12, 16)])):
        assert parse_events_tsv("onset\tduration\teventType\n" + rows).events == events
    for row in "1.812,5\t43", "1.812\t43,5", "812,500\t43", "812,500\t43.5":
        with pytest.raises(edf.DataError, match="not a number"):
            parse_events_tsv(f"onset\tduration\teventType\n{row}\tsz\n")


def test_a_lone_quote_swallows_no_event():
    text = tsv((5, 2, "sz", 1, '"Fp1'), (10, 2, "sz"))
    assert parse_events_tsv(text).events == [(5, 7), (10, 12)]


def test_label_files_that_were_cut_or_contradict_themselves_are_refused():
    for text in (tsv((5, 2, "sz"), (9, 2, "sz", 1))[:-1], tsv((5, 2, "sz", 1, "n/a"))[:-2]):
        with pytest.raises(edf.DataError, match="incomplete row"):
            parse_events_tsv(text)
    with pytest.raises(edf.DataError, match="incomplete row"):
        parse_csv(CSV.format("30") + "TERM,5,9,seiz")
    with pytest.raises(edf.DataError, match="60 s and 30 s"):
        parse_events_tsv(tsv((5, 2, "sz", 1, "n/a", "n/a", 60), (5, 2, "sz", 1, "n/a", "n/a", 30)))
    with pytest.raises(edf.DataError, match="not a number"):
        parse_events_tsv(tsv(("9" * 5000, 2, "sz")))


def test_events_beyond_the_end_are_cut_and_said_or_refused():
    labels = parse_events_tsv(tsv((25, 50, "sz")))
    np.testing.assert_array_equal(finish(labels, 30.0), [[25, 30]])
    assert "cut at the recording's end" in labels.notes[0]
    with pytest.raises(edf.DataError, match="beyond"):
        finish(parse_events_tsv(tsv((31, 5, "sz"))), 30.0)
    with pytest.raises(edf.DataError, match="not the same recording"):
        finish(parse_events_tsv(tsv((1, 5, "sz", 1, "n/a", "n/a", "600.00"))), 30.0)


def test_rows_that_end_long_before_the_recording_are_noted():
    """The file may have been cut between two rows, before a seizure."""
    for labels in (
        parse_csv(CSV.format(30) + "TERM,0,10,bckg,1\n"),
        parse_csv(CSV.format(30) + "TERM,0,5,bckg,1\nTERM,5,10,seiz,1\n"),
        parse_events_tsv(tsv((0, 10, "bckg"))),
        parse_annotations([(0, 5, "background"), (5, 5, "Seizure")], Texts()),
    ):
        finish(labels, 30.0)
        assert labels.notes == ["its rows end at 10 s of 30 s: the rest is taken for background"]
    for labels in (
        parse_csv(CSV.format(30) + "TERM,0,28.5,bckg,1\n"),
        parse_csv(CSV.format(30) + "FP1-F7,5,9,fnsz,1\n"),
        parse_events_tsv(tsv((5, 9, "sz"))),
        parse_events_tsv(tsv((0, 5, "bckg"), (5, 25, "sz"))),
        parse_annotations([(0, None, "background"), (5, 5, "Seizure")], Texts()),
    ):
        finish(labels, 30.0)
        assert not labels.notes


def test_rows_that_leave_a_hole_are_noted():
    """One on a seizure may have been deleted there."""
    labels = parse_csv(CSV.format(30) + "TERM,0,10,bckg,1\nTERM,14,30,bckg,1\n")
    assert not len(finish(labels, 30.0))
    assert labels.notes == ["no row tells of 10 s to 14 s: taken for background"]


def test_seizures_of_a_second_or_so_are_noted():
    """1.67 and 0.67 are minutes, perhaps: without a unit nothing else would tell."""
    for text, noted in (("1.67,0.67", True), ("100,40", False), ("1.67,0.67,Seizure\n5,3", False)):
        labels = list_labels(f"Onset,Duration,Text\n{text},Seizure\n", "a.csv")
        finish(labels, 300.0)
        assert labels.notes == ["no seizure lasts longer than 0.67 s: times in minutes?"] * noted


@pytest.mark.parametrize("titles, rows, seconds, why", [
    # 12.5 min and 45 s; minutes and minutes, or min.s; samples of 256 Hz, ms
    ("Onset,Duration,Text", ((12.5, 45), (33.25, 60)), 3600, "its seizures last 60 s and overlap: where these are seconds"),
    ("Onset,Duration,Text", ((12.5, 45), (33.25, 60)), 1800, ""), ("Onset (s),Duration,Text", ((12.5, 45), (33.25, 60)), 3600, ""),
    # ends that are called durations; two raters of one seizure
    ("onset,duration,label", ((512, 540), (1000, 1040)), 3600, "its seizures last 1.04e+03 s and overlap"), ("onset,duration,label", ((512, 30), (515, 28)), 3600, ""),
    ("Onset,Duration,Text", ((100, 45), (100, 40)), 9999, ""), ("onset,duration,unit,label", ((12.5, "45,s"), (33.25, "60,s")), 3600, ""),
    ("start,end,label", ((12.5, 13.25), (30, 31.5)), 3600, "its seizures last 1.5 s: where these are seconds"), ("start,end,label", ((12.5, 13.25),), 600, ""),
    ("onset [s],duration [s],label", ((12.5, 1.25),), 3600, ""), ("onset,duration,label", ((512, 11520),), 86400, "its seizures last 1.15e+04 s: where these are seconds"),
    ("onset,duration,label", ((3000, 45000),), 86400, "its seizures last 4.5e+04 s: where these are seconds"), ("onset,duration,label", ((3000, 1500),), 86400, "")])
def test_a_list_without_a_unit_whose_times_may_be_none_of_seconds_gives_no_labels(titles, rows, seconds, why):
    text = titles + "".join(f"\n{onset},{end},Seizure" for onset, end in rows) + "\n"
    if not why:
        assert len(list_labels(text, "a.csv", seconds=seconds).events) == len(rows)
        return
    with pytest.raises(Unlabelled, match=re.escape(why)):
        list_labels(text, "a.csv", seconds=seconds)


def test_a_seizure_of_more_than_half_an_hour_is_noted():
    for seconds, noted in ((2000, True), (1700, False)):
        labels = parse_annotations([(5, None, "sz start"), (5 + seconds, None, "sz end")], Texts())
        finish(labels, 9000.0)
        assert labels.notes == [f"a seizure lasts {seconds} s: is an end left out?"] * noted


def test_tusz_labels():
    text = (
        CSV.format("30.0000")
        + "TERM,0.0,10.0,bckg,1\nTERM,10.0,15.0,seiz,1\nTERM,15.0,30.0,bckg,1\n"
    )
    np.testing.assert_array_equal(finish(parse_csv(text), 30.0), [[10, 15]])
    union = (
        CSV.format("30.0")
        + "FP1-F7,5,9,fnsz,1\nF7-T3,7,12,gnsz,1\nT3-T5,0,30,bckg,1\nF3-C3,20,21,tcsz,1\n"
    )
    np.testing.assert_array_equal(finish(parse_csv(union), 30.0), [[5, 12], [20, 21]])
    for rows, reason in (
        ("TERM,15,10,seiz,1\n", "from 15 s to 10 s"),
        ("TERM,1,2,musc,1\n", "musc"),
        ("", "no row"),
        ("TERM,0,30,bckg,1\nTERM,5,9,seiz,1\n", "overlaps"),
        ("TERM,a,9,seiz,1\n", "not a number"),
        ("TERM,5,9,seiz,0.49\n", "confidence 0.49 of a seizure"),
        ("TERM,0,19,bckg,1TERM,19,21,seiz,1\n", "more cells than titles in 'TERM 0 19 bckg 1TERM"),
    ):
        with pytest.raises(edf.DataError, match=reason):
            parse_csv(CSV.format("30") + rows)
    with pytest.raises(edf.DataError, match="not the same"):
        finish(parse_csv(text), 300.0)


def test_a_heading_of_tusz_is_read_in_capitals_and_that_of_another_recording_is_noted():
    rows = "TERM,5,9,seiz,1\n"
    with pytest.raises(edf.DataError, match="not the same recording"):
        finish(parse_csv(CSV.format(300).replace("duration", "Duration") + rows), 30.0)
    assert parse_csv("# bname = b\n" + CSV.format(30) + rows, "a.csv_bi").notes == ["a.csv_bi says that it is of b"]
    assert not parse_csv("# bname = a\n" + CSV.format(30) + rows, "a.csv_bi").notes


def test_the_shared_odd_labels(shared):
    """What each of the odd label files gives for the 30 s recording: events, or a refusal."""
    right = {
        "00": [[10, 15]],
        "01": [[25, 30]],
        "03": [[5, 20]],
        "04": [[5, 7], [20, 22]],
        "09": [[10, 15]],
        "20": [[10, 15]],
        "21": [[10, 15]],
        "24": np.empty((0, 2)),
        "06": None,
        "07": None,
        "08": None,
        "12": None,
        "23": None,
    }
    for path in sorted((shared / "eeg" / "odd" / "labels").iterdir()):
        if right[path.name[:2]] is None:
            with pytest.raises(edf.DataError):
                read_beside(path, None)
        else:
            found = finish(read_beside(path, None), 30.0)
            np.testing.assert_array_equal(found, right[path.name[:2]], path.name)


def test_chb_summaries_in_both_forms(shared):
    folder = shared / "eeg" / "layouts" / "chbmit"
    five = parse_summary(read_text(folder / "chb05" / "chb05-summary.txt"))
    assert len(five) == 39 and summary_labels(five["chb05_06.edf"]).events == [(417.0, 532.0)]
    assert summary_labels(five["chb05_01.edf"]).events == []
    eight = parse_summary(read_text(folder / "chb08" / "chb08-summary.txt"))
    assert summary_labels(eight["chb08_02.edf"]).events == [(2670.0, 2841.0)]
    total = [summary_labels(blocks).events for files in (five, eight) for blocks in files.values()]
    assert sum(map(len, total)) == 10
    block = (
        " a.edf\nNumber of Seizures in File: {}\nSeizure 1 Start Time:   3 seconds\n"
        "Seizure 1 End Time: 9 seconds\n"
    )
    with pytest.raises(edf.DataError, match="2 seizures announced"):
        summary_labels([block.format(2)])
    one = block.format(1)
    for odd, why in (
        (one + "Seizure #2 Start: 12 seconds\n", "'Seizure #2 Start: 12 seconds' is not understood"),
        (one + "Ictal onset 12, end 20\n", "'Ictal onset 12, end 20' is not understood"),
        (block.format(0)[:37] + "Start Time: 3 seconds\n", "'Start Time: 3 seconds' is not understood"),
        (one + "Flie Name: b.edf\n", "'Flie Name: b.edf' is not understood"),
        (one.replace("seconds", "minutes"), "'Seizure 1 Start Time:   3 minutes' is not understood"),
        (one.replace("1 End", "2 End"), "'Seizure 2 End Time: 9 seconds' does not end 'Seizure 1"),
        (block.format(0).replace("Seizure 1", "  Seizure 1"), "0 seizures announced, 1 begin, 1 end"),
        (one + "Number of Seizures in File: 0\n", "1, 0 seizures announced"),
    ):
        with pytest.raises(edf.DataError, match=re.escape(why)):
            summary_labels([odd])
    assert sorted(parse_summary(f"File Name:{one}\n  File name : b.edf\n")) == ["a.edf", "b.edf"]
    no_clock = summary_labels([block.format(1).replace(" 1 ", " ")])
    assert no_clock.events == [(3.0, 9.0)] and no_clock.seconds is None


def test_siena_lists_are_read_over_midnight_and_contradictions_refused(shared):
    folder = shared / "eeg" / "layouts" / "siena"
    files = parse_siena(read_text(folder / "PN00" / "Seizures-list-PN00.txt"))
    assert sorted(files) == [f"PN00-{i}.edf" for i in range(1, 6)]
    assert siena_times(files["PN00-1.edf"][0], "") == (70773, 2605.0, 1143.0, 1213.0)
    with pytest.raises(
        edf.DataError, match="a seizure from 765 s to 4425 s in a recording of 2489 s"
    ):
        siena_times(files["PN00-3.edf"][0], "PN00-3")  # the list itself is wrong there
    night = parse_siena(read_text(folder / "PN16" / "Seizures-list-PN16.txt"))
    assert siena_times(night["PN16-1.edf"][0], "")[1:] == (8270.0, 7184.0, 7307.0)
    over = {
        "registration start": "23.00.00",
        "registration end": "01.00.00",
        "start": "00.10.00",
        "end": "00:11:30",
    }
    assert siena_times(over, "") == (82800, 7200.0, 4200.0, 4290.0)
    with pytest.raises(edf.DataError, match="not a time"):
        siena_times({**over, "end": "0011"}, "")


@pytest.mark.parametrize(
    "seizures, why",
    [
        ("Seizure start time: 00.01.00\n", "no end time"),
        ("Start time: 00.01.00\nStart time: 00.02.00\nEnd time: 00.02.09\n", "no end time"),
        ("Seizure 1 start: 00.01.00\nSeizure 1 end: 00.01.09\n", "'Seizure 1 start: 00.01.00' is not"),
        ("Sezure start time: 00.01\nSezure end time: 00.02\n", "'Sezure start time: 00.01' is not"),
        ("Seizure from 60 s to 69 s\n", "'Seizure from 60 s to 69 s' is not"),
        ("Seizure start: 60\nSeizure end: 69\n", "'Seizure start: 60' is not"),
        ("Flie name: PN00-9.edf\n", "'Flie name: PN00-9.edf' is not"),
        (
            "Start time: 00.01.00\nEnd time: 00.01.09\nRegistration start time: 09.00.00\n"
            "Registration end time: 09.05.00\nStart time: 09.01.00\nEnd time: 09.01.09\n",
            "its registration times are of two recordings",
        ),
    ],
)
def test_a_seizure_of_a_siena_list_that_is_not_ended_or_not_understood_is_no_background(
    tmp_path, seizures, why
):
    write_edf(tmp_path / "src" / "PN00-1.edf", 300)
    times = "Registration start time: 00.00.00\nRegistration end time: 00.05.00\n"
    text = f"File name: PN00-1.edf\n{times}{seizures}\nFile name: PN00-2.edf\n{times}"
    (tmp_path / "src" / "Seizures-list-PN00.txt").write_text(text)
    ((_, said_why),) = imported(tmp_path / "src", tmp_path / "out").refused
    assert why in said_why


@pytest.mark.parametrize("before, seizures, events", [
    ("Seizure n 1\n", "", None), ("", "\nSeizure n 2 (in sleep):\n", None),
    ("Seizure n 1\n", "Seizure start time: 00.01.00\nSeizure end time: 00.01.09\nSeizure n 2 (in sleep):\n", [[60, 69]])])
def test_a_recording_that_a_list_of_seizures_names_without_one_has_no_labels(tmp_path, before, seizures, events):
    write_edf(tmp_path / "src" / "PN00-1.edf", 300)
    times = "Registration start time: 00.00.00\nRegistration end time: 00.05.00\n"
    (tmp_path / "src" / "Seizures-list-PN00.txt").write_text(f"{before}File name: PN00-1.edf\n{times}{seizures}")
    text = said(tmp_path / "src", tmp_path / "out")[1]
    r, = data.open_corpus(tmp_path / "out")
    assert r.events.tolist() == events if events else not r.labelled
    assert ("Seizures-list-PN00.txt names it without a seizure's times" in text) == (not events)


@pytest.mark.parametrize("second, events", [
    ("PN0O-1.edf", [[60, 69], [120, 129]]), ("pn00-1.EDF", [[60, 69], [120, 129]]),
    ("PN0-1.edf", "a seizure of 'PN0-1.edf', of which there is no EDF, has PN00-1's registration times"),
    ("PN00-1.edf Registration start time: 00.00.00", "is two lines in one"), ("PN00-2.edf", [[60, 69]])])
def test_a_siena_list_that_spells_a_recording_in_two_ways_loses_none_of_its_seizures(tmp_path, second, events):
    for name in ("PN00-1", "PN00-2"):
        write_edf(tmp_path / "src" / f"{name}.edf", 300)
    times = "Registration start time: 00.00.00\nRegistration end time: 00.05.00\n"
    (tmp_path / "src" / "Seizures-list-PN00.txt").write_text("".join(
        f"File name: {name}\n{times}Start time: 00.0{minute}.00\nEnd time: 00.0{minute}.09\n"
        for minute, name in ((1, "PN00-1.edf"), (2, second))))
    report = imported(tmp_path / "src", tmp_path / "out")
    if isinstance(events, str):
        assert events in dict(report.refused)[str(tmp_path / "src" / "PN00-1.edf")]
    else:
        assert data.open_corpus(tmp_path / "out")[0].events.tolist() == events


def test_siena_lists_of_several_patients_in_one_folder_are_told_apart(tmp_path):
    """A recording that its own list does not name never has another patient's seizures."""
    times = "Registration start time: 0{0}.00.00\nRegistration end time: 0{0}.05.00\n"
    for patient, listed in (("PN00", "PN00-1 PN00-2"), ("PN01", "PN01-1 PNO1-2")):
        text = "".join(
            f"File name: {name}.edf\n{times.format(minute)}"
            f"Start time: 0{minute}.0{minute}.00\nEnd time: 0{minute}.0{minute}.09\n"
            for minute, name in enumerate(listed.split(), int(patient[-1]) + 1)
        )
        (tmp_path / "src" / f"Seizures-list-{patient}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "src" / f"Seizures-list-{patient}.txt").write_text(text)
    for name in ("PN00-1", "PN01-1", "PN01-2", "PN02-1"):
        write_edf(tmp_path / "src" / f"{name}.edf", 300)
    assert not imported(tmp_path / "src", tmp_path / "out").refused
    found = {
        r.name: r.events.tolist() if r.labelled else None for r in data.open_corpus(tmp_path / "out")
    }
    assert found == {
        "PN00-1": [[60, 69]], "PN01-1": [[120, 129]], "PN01-2": [[180, 189]], "PN02-1": None
    }


def test_seizeit_annotations(shared):
    text = (shared / "eeg" / "layouts" / "seizeit" / "P_ID64" / "P_ID64_r3_a1.tsv").read_text()
    assert parse_seizeit(text).events == [(781.0, 807.0), (7145.0, 7175.0)]
    assert parse_seizeit("# Source: SeizeIt1\n \n").events == []
    for line in "#781\t807\tFIA\tHem:L", "# Source: SeizeIt1 781\t807\tFIA":
        with pytest.raises(edf.DataError, match="commented out"):
            parse_seizeit(f"# Source: SeizeIt1\n{line}\n")
    for row in "non-epileptic\tHem:L", "FIA\tartefact", "no seizure":
        with pytest.raises(edf.DataError, match="in the row of a seizure at 781 s"):
            parse_seizeit(f"781\t807\t{row}\n")
    with pytest.raises(edf.DataError, match="more than a row in"):
        parse_seizeit("781\t807\tFIA\tHem:L7145\t7175\tFIA\n")
    with pytest.raises(edf.DataError, match="no end"):
        parse_seizeit("8971\tNone\tFIA\tHem:L\n")


def test_a_stamp_on_the_second_day_of_a_recording_is_of_its_clock():
    rows = tsv((90000, 9, "sz", 1, "n/a", "2024-03-06 23:30:00", 99999))
    assert not parse_events_tsv(rows, began="2024-03-05 22:30:00").notes
    assert parse_events_tsv(rows, began="2024-03-05 22:40:00").notes


# ---- texts inside an EDF+ ----


def test_annotations_inside_edf_plus_label_a_recording(tmp_path):
    """A text with a duration, a pair, a bare text with an end, several of them, a text that says
    background."""
    cases = {
        "duration": ({2: mark(2, "Seizure", 3)}, [[2, 5]]),
        "pair": ({1: mark(1, "Seizure start"), 6: mark(6, "SEIZURE END")}, [[1, 6]]),
        "bare": ({1: mark(1.5, "sz"), 6: mark(6.25, "sz_end")}, [[1.5, 6.25]]),
        "numbered": (
            {1: mark(1, "Seizure 1 onset"), 3: mark(3, "seizure 1 offset"), 5: mark(5, "sz 2", 2)},
            [[1, 3], [5, 7]],
        ),
        "ilae": ({2: mark(2, "sz_foc_ia_nm", 3), 3: mark(3, "fnsz", 4)}, [[2, 7]]),
        "german": ({1: mark(1, "Anfall Beginn"), 6: mark(6, "Anfall Ende")}, [[1, 6]]),
        "none": ({1: mark(1, "background")}, []),
    }
    for name, (texts, _) in cases.items():
        plus(tmp_path / "src" / f"{name}_1.edf", range(10), "EDF+C", texts)
    plus(tmp_path / "src" / "quiet_1.edf", range(10), "EDF+C", {1: mark(1, "eyes open")})
    report, text = said(tmp_path / "src", tmp_path / "out")
    assert not report.refused and len(report.unlabelled) == 1
    assert (
        "1 x 'eyes open'" in text
        and "--seizure-label TEXT" in text
        and "seizure start" not in text.lower()
    )
    recordings = {r.patient: r for r in data.open_corpus(tmp_path / "out")}
    for name, (_, events) in cases.items():
        assert recordings[name].labelled and recordings[name].events.tolist() == events, name
    assert not recordings["quiet"].labelled
    again, text = said(tmp_path / "src", tmp_path / "out")
    assert again.kept == 8 and "1 x 'eyes open'" in text


@pytest.mark.parametrize(
    "name", ["EDF annotations", "EDF Annotation", "EDF+ Annotations", "EDF Annotations 1", "BDF Annotations"]
)
def test_an_annotation_signal_is_known_by_the_names_that_makers_give_it(tmp_path, name):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", {2: mark(2, "sz", 3)}, name)
    plus(tmp_path / "src" / "b.edf", [0, 1, 2, 9, 10], "EDF+C", {2: mark(2, "sz", 3)}, name)
    ((_, why),) = imported(tmp_path / "src", tmp_path / "out").refused
    assert "gap of 6 s after 3 s" in why
    assert data.open_corpus(tmp_path / "out")[0].events.tolist() == [[2, 5]]


@pytest.mark.parametrize(
    "texts, why",
    [
        ({2: mark(2, "seizure")}, "'seizure' at 2 s has no end"),
        ({2: mark(2, "seizure end")}, "'seizure end' at 2 s has no start"),
        (
            {2: mark(2, "sz start"), 4: mark(4, "sz start"), 6: mark(6, "sz end")},
            "'sz start' at 2 s has no end",
        ),
        ({2: mark(2, "sz", 0)}, "'sz' at 2 s has no end"),
        ({2: mark(2, "sz", 3) + b"+x"}, "record 3 cannot be read"),
        ({2: mark(-2, "sz", 3)}, "event from -2 s"),
        ({2: mark(20, "sz", 3)}, "beyond the recording's 10 s"),
    ],
)
def test_annotations_that_contradict_themselves_leave_a_recording_unlabelled_and_are_said(
    tmp_path, texts, why
):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", texts)
    report, text = said(tmp_path / "src", tmp_path / "out")
    assert len(report.unlabelled) == 1 and why in text
    assert not data.open_corpus(tmp_path / "out")[0].labelled


@pytest.mark.parametrize(
    "text",
    [
        "no seizure",
        "Seizure?",
        "possible seizure",
        "post seizure",
        "seizure meds given",
        "sz detected by software",
        "seizures",
        "szene",
    ],
)
def test_texts_that_speak_of_seizures_are_not_taken_for_one(tmp_path, text):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", {2: mark(2, text, 3)})
    imported(tmp_path / "src", tmp_path / "out")
    r = data.open_corpus(tmp_path / "out")[0]
    assert r.labelled == (text == "no seizure") and not len(r.events)


def test_texts_given_by_the_user_label_and_a_change_of_them_is_noticed(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    plus(src / "a.edf", range(10), "EDF+C", {2: mark(2, "EVENT red-button", 3)})
    plus(src / "b.edf", range(10), "EDF+C", {1: mark(1, "on set"), 4: mark(4, "off set")})
    plus(src / "c.edf", range(10), "EDF+C", {0: mark(0, "Reviewed")})
    write_edf(src / "d.edf", 10)
    (src / "d_events.tsv").write_text(tsv((2, 3, "sz")))
    assert len(said(src, out)[0].unlabelled) == 3
    done = command(
        "import",
        src,
        out,
        "--seizure-label",
        "event Red-Button",
        "--seizure-label",
        "On Set..Off Set",
        "--background-label",
        "reviewed",
        "--background-label",
        "never there",
    )
    assert (
        done.returncode == 0 and "3 read, 1 already there" in done.stdout
    ), done.stdout
    assert "hint: no annotation is 'never there'" in done.stdout
    assert [r.events.tolist() for r in data.open_corpus(out)] == [[[2, 5]], [[1, 4]], [], [[2, 5]]]
    assert all(r.labelled for r in data.open_corpus(out))
    for seizure, background in (
        ("a..a", []),
        ("", []),
        ("x..y..z", []),
        ("a b", ["A_B"]),
        ("..b", []),
        ("a", ["-"]),
    ):
        with pytest.raises(edf.DataError, match="-label"):
            imported(src, out, seizure_labels=[seizure], background_labels=background)


def test_an_annotation_file_beside_an_edf_plus_counts_alone(tmp_path):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", {2: mark(2, "sz", 3)})
    (tmp_path / "src" / "a_events.tsv").write_text(tsv((6, 1, "sz")))
    imported(tmp_path / "src", tmp_path / "out")
    assert data.open_corpus(tmp_path / "out")[0].events.tolist() == [[6, 7]]


def test_a_long_list_of_texts_does_not_swell_the_table_or_the_file(tmp_path):
    plus(
        tmp_path / "src" / "a.edf",
        range(200),
        "EDF+C",
        {i: mark(i, f"note {i}" + "x" * 30) for i in range(200)},
    )
    report, text = said(tmp_path / "src", tmp_path / "out")
    assert not report.refused and "and 80 other texts" in text and len(text.splitlines()) < 30


def test_label_files_of_other_editors_are_read(tmp_path):
    for k, encoding in enumerate(("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1")):
        path = tmp_path / f"{k}_events.tsv"
        text = tsv((2, 3, "sz", 1, "F\xfc"))
        path.write_bytes((b"\xfe\xff" if encoding == "utf-16-be" else b"") + text.encode(encoding))
        assert read_beside(path, None).events == [(2, 5)], encoding


def test_any_list_of_annotations_gives_right_events_none_or_a_reason():
    """Events lie inside the recording, are disjoint and sorted, and each begins where a text of a
    seizure does; every seizure that has a duration lies inside one."""
    rng, read = np.random.default_rng(0), 0
    kinds = (
        "sz",
        "seizure start",
        "seizure end",
        "bckg",
        "eyes open",
        "fnsz",
        "Seizure 2",
        "end of seizure",
    )
    for _ in range(2000):
        found = [
            (
                float(rng.choice([rng.uniform(-1, 25), rng.integers(20)])),
                rng.choice([None, 0.0, rng.uniform(0, 9)]),
                str(rng.choice(kinds)),
            )
            for _ in range(rng.integers(1, 6))
        ]
        try:
            labels = parse_annotations(found, Texts())
            if labels is None:
                assert all(text == "eyes open" for _, _, text in found)
                continue
            events = finish(labels, 20.0)
        except edf.DataError as reason:
            assert str(reason)
            continue
        read += len(events)
        assert (
            (events[:, 0] >= 0).all()
            and (events[:, 1] <= 20).all()
            and (events[:, 0] < events[:, 1]).all()
        )
        assert (events[1:, 0] > events[:-1, 1]).all()
        assert set(events[:, 0]) <= {
            onset for onset, _, text in found if text not in ("bckg", "eyes open")
        }
        for onset, duration, text in found:
            if duration and text in ("sz", "fnsz", "Seizure 2"):
                assert any(
                    begin <= onset and min(onset + duration, 20) <= end for begin, end in events
                )
    assert read > 200


def test_any_bytes_among_the_annotations_are_read_or_said_never_a_traceback(tmp_path):
    rng, pieces = np.random.default_rng(0), [
        b"+1",
        b"-",
        b"\x14",
        b"\x15",
        b"\0",
        b"sz",
        b"2.5",
        b" ",
        b"\xff",
        b"\n",
    ]
    for _ in range(300):
        raw = b"".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(1, 12)))
        header = edf.read_header(plus(tmp_path / "a.edf", range(2), "EDF+C", {1: raw}))
        try:
            found = edf.read_annotations(header)
        except edf.DataError as reason:
            assert "cannot be read" in str(reason)
            continue
        assert all(text and "\x14" not in text and "\n" not in text for _, _, text in found), raw


# ---- the corpus's own version ----


def test_versions_of_other_corpora_and_files_that_say_nothing(tmp_path):
    for name, wanted in (
        ("siena-scalp-eeg-database-1.0.0", "version 1.0.0"),
        ("mine", ""),
        ("2024-01.02", ""),
    ):
        (tmp_path / name).mkdir()
        assert release(tmp_path / name, []) == wanted, name
    for content, wanted in (
        ("Mine, 2024-01-02, 20199999", ""),
        (
            "Version 1.4 of 20240103 and 20249999",
            "version 1.4, newest date in its README 2024-01-03",
        ),
    ):
        (tmp_path / "mine" / "README.md").write_text(content)
        assert release(tmp_path / "mine", []) == wanted, content
    bids = tmp_path / "bids"
    bids.mkdir()
    for content, wanted in (
        ('{"Name": "Own\\nset", "DatasetVersion": "1.2"}', "Own set 1.2"),
        ("{half", ""),
        ("[]", ""),
        ('{"BIDSVersion": "1.8"}', ""),
    ):
        (bids / "dataset_description.json").write_text(content)
        assert release(bids, []) == wanted, content
