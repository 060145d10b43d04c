"""corpora.py: layouts, annotations, and the conversion to HDF5. Real files and real processes."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import annotations
import corpora
import data
import edf
from conftest import ROOT, plus, write_edf

HEAD = "onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration\n"



def command(*args, **kwargs):
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, args)], capture_output=True,
                          text=True, **kwargs)


# ---- annotations ----

def tsv(*rows):
    return HEAD + "".join("\t".join(map(str, row)) + "\n" for row in rows)


def test_szcore_events(shared):
    good = tsv((20, 2, "sz"), (5, 10, "sz_foc_ia_nm"), (8, 12, "sz_gen_m_tonicClonic"), (0, 30, "bckg"))
    for text in (good, good.replace("\n", "\r\n"), "\ufeff" + good):
        text = text.encode().decode("utf-8-sig").replace("\r\n", "\n")
        np.testing.assert_array_equal(annotations.finish(annotations.parse_events_tsv(text), 30.0), [[5, 22]])
    for row, reason in (((5, 2, "spkz"), "spkz"), ((5, -2, "sz"), "lasts -2"), ((5, 0, "sz"), "lasts 0"),
                        ((-1, 2, "sz"), "-1"),
                        (("n/a", 2, "sz"), "not a number"), (("5,5", 2, "sz"), "not a number"),
                        ((5, "nan", "sz"), "number"),
                        ((5, 2, "sz_"), "sz_"), ((5, 2, "SZ"), "SZ"), ((5,), "incomplete")):
        with pytest.raises(edf.DataError, match=reason):
            annotations.parse_events_tsv(tsv(row))
    with pytest.raises(edf.DataError, match="no row"):
        annotations.parse_events_tsv(HEAD)
    with pytest.raises(edf.DataError, match="eventType"):
        annotations.parse_events_tsv("onset\tduration\n1\t2\n")
    with pytest.raises(edf.DataError, match="impedance"):
        annotations.parse_events_tsv(tsv((0, 30, "impd"), (10, 5, "sz")))
    assert "impedance test" in annotations.parse_events_tsv(tsv((0, 5, "impd"), (10, 5, "sz"))).notes[0]


def test_a_lone_quote_swallows_no_event():
    text = tsv((5, 2, "sz", 1, '"Fp1'), (10, 2, "sz"))
    assert annotations.parse_events_tsv(text).events == [(5, 7), (10, 12)]


def test_label_files_that_were_cut_or_contradict_themselves_are_refused():
    for text in (tsv((5, 2, "sz"), (9, 2, "sz", 1))[:-1], tsv((5, 2, "sz", 1, "n/a"))[:-2]):
        with pytest.raises(edf.DataError, match="incomplete row"):
            annotations.parse_events_tsv(text)
    with pytest.raises(edf.DataError, match="incomplete row"):
        annotations.parse_csv(CSV.format("30") + "TERM,5,9,seiz")
    with pytest.raises(edf.DataError, match="60 s and 30 s"):
        annotations.parse_events_tsv(tsv((5, 2, "sz", 1, "n/a", "n/a", 60), (5, 2, "sz", 1, "n/a", "n/a", 30)))
    with pytest.raises(edf.DataError, match="not a number"):
        annotations.parse_events_tsv(tsv(("9" * 5000, 2, "sz")))


def test_events_beyond_the_end_are_cut_and_said_or_refused():
    labels = annotations.parse_events_tsv(tsv((25, 50, "sz")))
    np.testing.assert_array_equal(annotations.finish(labels, 30.0), [[25, 30]])
    assert "cut at the recording's end" in labels.notes[0]
    with pytest.raises(edf.DataError, match="beyond"):
        annotations.finish(annotations.parse_events_tsv(tsv((31, 5, "sz"))), 30.0)
    with pytest.raises(edf.DataError, match="not the same recording"):
        annotations.finish(annotations.parse_events_tsv(tsv((1, 5, "sz", 1, "n/a", "n/a", "600.00"))), 30.0)


CSV = "# version = csv_v1.0.0\n# duration = {} secs\n#\nchannel,start_time,stop_time,label,confidence\n"


def test_tusz_labels():
    text = CSV.format("30.0000") + "TERM,0.0,10.0,bckg,1\nTERM,10.0,15.0,seiz,1\nTERM,15.0,30.0,bckg,1\n"
    np.testing.assert_array_equal(annotations.finish(annotations.parse_csv(text), 30.0), [[10, 15]])
    union = CSV.format("30.0") + \
        "FP1-F7,5,9,fnsz,1\nF7-T3,7,12,gnsz,1\nT3-T5,0,30,bckg,1\nF3-C3,20,21,tcsz,1\n"
    np.testing.assert_array_equal(annotations.finish(annotations.parse_csv(union), 30.0), [[5, 12], [20, 21]])
    for rows, reason in (("TERM,15,10,seiz,1\n", "from 15 s to 10 s"), ("TERM,1,2,musc,1\n", "musc"),
                         ("", "no row"),
                         ("TERM,0,30,bckg,1\nTERM,5,9,seiz,1\n", "overlaps"),
                         ("TERM,a,9,seiz,1\n", "not a number")):
        with pytest.raises(edf.DataError, match=reason):
            annotations.parse_csv(CSV.format("30") + rows)
    with pytest.raises(edf.DataError, match="not the same"):
        annotations.finish(annotations.parse_csv(text), 300.0)


def test_the_shared_odd_labels(shared):
    """What each of the odd label files gives for the 30 s recording: events, or a refusal."""
    right = {"00": [[10, 15]], "01": [[25, 30]], "03": [[5, 20]], "04": [[5, 7], [20, 22]],
             "09": [[10, 15]], "20": [[10, 15]],
             "21": [[10, 15]], "24": np.empty((0, 2)), "06": None, "07": None, "08": None, "12": None,
             "23": None}
    for path in sorted((shared / "eeg" / "odd" / "labels").iterdir()):
        if right[path.name[:2]] is None:
            with pytest.raises(edf.DataError):
                annotations.read_beside(path, None)
        else:
            found = annotations.finish(annotations.read_beside(path, None), 30.0)
            np.testing.assert_array_equal(found, right[path.name[:2]], path.name)


def test_chb_summaries_in_both_forms(shared):
    folder = shared / "eeg" / "layouts" / "chbmit"
    five = annotations.parse_summary(annotations.read_text(folder / "chb05" / "chb05-summary.txt"))
    assert len(five) == 39 and annotations.summary_labels(five["chb05_06.edf"]).events == [(417.0, 532.0)]
    assert annotations.summary_labels(five["chb05_01.edf"]).events == []
    eight = annotations.parse_summary(annotations.read_text(folder / "chb08" / "chb08-summary.txt"))
    assert annotations.summary_labels(eight["chb08_02.edf"]).events == [(2670.0, 2841.0)]
    total = [annotations.summary_labels(blocks).events for files in (five, eight) for blocks in files.values()]
    assert sum(map(len, total)) == 10
    block = " a.edf\nNumber of Seizures in File: {}\nSeizure 1 Start Time:   3 seconds\n" \
        "Seizure 1 End Time: 9 seconds\n"
    with pytest.raises(edf.DataError, match="2 seizures announced"):
        annotations.summary_labels([block.format(2)])
    no_clock = annotations.summary_labels([block.format(1).replace(" 1 ", " ")])
    assert no_clock.events == [(3.0, 9.0)] and no_clock.seconds is None


def test_siena_lists_are_read_over_midnight_and_contradictions_refused(shared):
    folder = shared / "eeg" / "layouts" / "siena"
    files = annotations.parse_siena(annotations.read_text(folder / "PN00" / "Seizures-list-PN00.txt"))
    assert sorted(files) == [f"PN00-{i}.edf" for i in range(1, 6)]
    assert annotations.siena_times(files["PN00-1.edf"][0], "") == (70773, 2605.0, 1143.0, 1213.0)
    with pytest.raises(edf.DataError, match="a seizure from 765 s to 4425 s in a recording of 2489 s"):
        annotations.siena_times(files["PN00-3.edf"][0], "PN00-3")      # the list itself is wrong there
    night = annotations.parse_siena(annotations.read_text(folder / "PN16" / "Seizures-list-PN16.txt"))
    assert annotations.siena_times(night["PN16-1.edf"][0], "")[1:] == (8270.0, 7184.0, 7307.0)
    over = {"registration start": "23.00.00", "registration end": "01.00.00", "start": "00.10.00",
            "end": "00:11:30"}
    assert annotations.siena_times(over, "") == (82800, 7200.0, 4200.0, 4290.0)
    with pytest.raises(edf.DataError, match="not a time"):
        annotations.siena_times({**over, "end": "0011"}, "")


def test_siena_recording_whose_name_the_list_misspells(tmp_path):
    write_edf(tmp_path / "PN06" / "PN06-1.edf", 60, time="10.00.00")
    block = "Seizure n 1\nFile name: PNO6-1.edf\nRegistration start time: 10.00.00\n" \
            "Registration end time: 10.01.00\nSeizure start time: 10.00.10\nSeizure end time: 10.00.30\n"
    (tmp_path / "PN06" / "Seizures-list-PN06.txt").write_text(block)
    report = corpora.import_corpus(tmp_path / "PN06", tmp_path / "out", say=lambda text: None)
    assert report.read == ["PN06-1"] and data.open_corpus(tmp_path / "out")[0].events.tolist() == [[10, 30]]
    write_edf(tmp_path / "PN06" / "PN06-1.edf", 60, time="10.20.00")
    assert "its header" in corpora.import_corpus(tmp_path / "PN06", tmp_path / "out",
                                              say=lambda text: None).refused[0][1]


def test_seizeit_annotations(shared):
    text = (shared / "eeg" / "layouts" / "seizeit" / "P_ID64" / "P_ID64_r3_a1.tsv").read_text()
    assert annotations.parse_seizeit(text).events == [(781.0, 807.0), (7145.0, 7175.0)]
    assert annotations.parse_seizeit("# Source: SeizeIt1\n \n").events == []
    with pytest.raises(edf.DataError, match="no end"):
        annotations.parse_seizeit("8971\tNone\tFIA\tHem:L\n")


# ---- layouts ----

def test_layouts_patients_splits_and_annotations_are_recognised(shared):
    base, found = shared / "eeg", {}
    for folder in ("layouts/tuh", "layouts/chbmit", "layouts/siena", "layouts/seizeit", "recordings"):
        files, root, _ = corpora.find_edf(base / folder)
        found[folder] = [corpora.identify(path, root) for path in files]
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
        return corpora.identify(Path("/r", folder, name), Path("/r")).patient
    assert patient("chb17a_03.edf") == "chb17" and patient("chb02_16+.edf") == "chb02"
    assert patient("PN10-4.5.6.edf") == "PN10"
    assert patient("sub-07_ses-01_task-szMonitoring_run-00_eeg.edf") == "07"
    assert corpora.identify(Path("/r/anna_1.edf"), Path("/r")).patient == "anna"
    assert corpora.identify(Path("/r/p1/night/1.edf"), Path("/r")).patient == "p1"
    assert corpora.identify(Path("/c/edf/train/aaaaaaaa/s001_2000/01_tcp_ar/aaaaaaaa_s001_t000.edf"),
                         Path("/c/edf/train")).split == "train"


def test_the_real_layouts_are_refused_with_the_reason_where_the_signal_contradicts(shared, tmp_path):
    for folder, montage in (("siena", "referential"), ("chbmit", "bipolar"), ("seizeit", "referential")):
        report = corpora.import_corpus(shared / "eeg" / "layouts" / folder, tmp_path / folder, montage=montage,
                                    say=lambda text: None)
        reasons = " ".join(why for _, why in report.refused)
        assert report.refused and ("not the same recording" in reasons or "beyond" in reasons)
        assert len(report.refused) + len(report.read) == {"siena": 7, "chbmit": 59, "seizeit": 24}[folder]


# ---- import: command, files, resume ----

def test_command_line_codes_table_and_going_on(tmp_path):
    write_edf(tmp_path / "src" / "p1" / "good.edf")
    write_edf(tmp_path / "src" / "p1" / "bad.edf", unit="")
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
        assert f["eeg"].dtype == np.int16 and f["eeg"].chunks == (19, 2560) and f["eeg"].compression is None
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
        write_edf(src / f"{name}_1.edf", 10)
    assert len(corpora.import_corpus(src, out, **quiet).read) == 3
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.h5")}
    assert corpora.import_corpus(src, out, **quiet).kept == 3
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*.h5")}
    write_edf(src / "a_1.edf", 12)                            # another source
    (src / "b_1_events.tsv").write_text(tsv((2, 3, "sz")))      # an annotation that was not there
    again = corpora.import_corpus(src, out, **quiet)
    assert sorted(again.read) == ["a_1", "b_1"] and again.kept == 1
    assert len(corpora.import_corpus(src, out, notch="50", replace=True, **quiet).read) == 3
    (src / "b_1.edf").write_bytes(b"damaged")           # what an earlier state gave must not live on
    assert len(corpora.import_corpus(src, out, notch="50", **quiet).refused) == 1
    assert [r.name for r in data.open_corpus(out)] == ["a_1", "c_1"]


def test_a_second_corpus_never_replaces_recordings_of_the_first(tmp_path):
    for corpus in "ab":
        write_edf(tmp_path / corpus / "sub-01" / "sub-01_eeg.edf", 10, size=30 + (corpus == "b"))
    for corpus, refused in (("a", 0), ("b", 1), ("a", 0)):
        report = corpora.import_corpus(tmp_path / corpus, tmp_path / "out", say=lambda text: None)
        assert len(report.refused) == refused
    assert "a folder of its own" in corpora.import_corpus(tmp_path / "b", tmp_path / "out",
                                                       say=lambda text: None).refused[0][1]
    assert corpora.import_corpus(tmp_path / "a", tmp_path / "out", say=lambda text: None).kept == 1
    shutil.move(tmp_path / "a", tmp_path / "moved")     # the corpus itself may move, and change
    write_edf(tmp_path / "moved" / "sub-01" / "sub-01_eeg.edf", 12)
    assert len(corpora.import_corpus(tmp_path / "moved", tmp_path / "out", say=lambda text: None).read) == 1


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_full_disk_stops_the_import_with_one_line(tmp_path):
    """A limit on the size of files stands in for the disk: the write fails, nothing half written is left."""
    import resource
    write_edf(tmp_path / "src" / "a.edf", 60)
    done = command("import", tmp_path / "src", tmp_path / "out",
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "stopped" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_import_killed_at_any_moment_leaves_only_whole_recordings(tmp_path, kills):
    """Killed when a recording is begun or just finished, and a little later: what stands under a final name is
    whole, and the same command goes on."""
    src, out = tmp_path / "src", tmp_path / "out"
    for i in range(kills + 4):
        write_edf(src / f"p{i}" / "x.edf", 300)
    arguments = [sys.executable, ROOT / "data.py", "import", src, out, "--workers", "2"]
    rng, done = np.random.default_rng(0), set()
    for kill in range(kills):
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        began = time.monotonic()
        while not (set(out.rglob("*.part")) if kill % 2 else set(out.rglob("*.h5")) - done):
            assert process.poll() is None and time.monotonic() - began < 300, process.communicate()[0]
        time.sleep(rng.uniform(0, 0.05))
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.communicate()
        began = time.monotonic()
        while any(alive(pid) for pid in workers):       # they follow the import
            assert time.monotonic() - began < 300
            time.sleep(0.02)
        done = set(out.rglob("*.h5"))
        for path in done:
            assert corpora.load_recording(path)["samples"] == 300 * 256
    ended = subprocess.run(arguments, capture_output=True, text=True)
    assert ended.returncode == 0 and f"{len(done)} already there" in ended.stdout, ended.stdout + ended.stderr
    assert len(data.open_corpus(out)) == kills + 4
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_import_with_one_line(tmp_path, workers):
    for i in range(16):
        write_edf(tmp_path / "src" / f"{i}.edf", 120)
    arguments = [sys.executable, ROOT / "data.py", "import", tmp_path / "src", tmp_path / "out",
                 "--workers", str(workers)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any((tmp_path / "out").glob("*.h5")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "data.py: stopped: interrupted; the same command goes on from here"
    assert not list((tmp_path / "out").glob("*.part"))
    assert subprocess.run(arguments, capture_output=True).returncode == 0


def test_two_imports_at_once_are_refused(tmp_path):
    write_edf(tmp_path / "src" / "a.edf")
    corpora.import_corpus(tmp_path / "src", tmp_path / "out", say=lambda text: None)
    import fcntl
    with open(tmp_path / "out" / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = command("import", tmp_path / "src", tmp_path / "out")
    assert done.returncode == 2 and "another import" in done.stderr


def test_strange_folders(tmp_path):
    """A folder named x.edf, loops and dead links, a pipe, two files with one target, names outside ASCII,
    no permission."""
    src = tmp_path / "src"
    write_edf(src / "x.edf" / "inner.edf")
    write_edf(src / "zähler ü" / "größe.edf")
    write_edf(src / "twice.edf")
    shutil.copy(src / "twice.edf", src / "twice.EDF")
    (src / "x.edf" / "loop").symlink_to(src)
    (src / "gone.edf").symlink_to(src / "nothing")
    os.mkfifo(src / "pipe.edf")
    report = corpora.import_corpus(src, tmp_path / "out", say=lambda text: None)
    assert sorted(report.read) == ["twice", "x.edf/inner", "zähler ü/größe"]
    why = {Path(path).name: reason for path, reason in report.refused}
    assert why["gone.edf"] == "gone.edf: No such file or directory" and "regular" in why["pipe.edf"]
    assert len(why) == 3
    assert "same name as" in why["twice.edf"] + why.get("twice.EDF", "")
    named = tmp_path / "named"
    write_edf(named / "good.edf")
    for name in (b"not \xff utf-8.edf", b"two\nlines.edf"):
        shutil.copy(named / "good.edf", os.path.join(os.fsencode(named), name))
    write_edf(named / "unlabelled.edf")
    (named / "unlabelled_events.tsv").symlink_to(src / "nothing")       # labels that were not fetched
    done = command("import", named, tmp_path / "out3")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "1 read" in done.stdout
    assert done.stdout.count("its name holds a line break or is not UTF-8") == 2
    assert "unlabelled_events.tsv: No such file" in done.stdout
    assert "3 refused" in command("import", named, tmp_path / "out3").stdout
    if os.getuid():
        (src / "twice.EDF").chmod(0)
        assert "Permission" in str(corpora.import_corpus(src, tmp_path / "out2", say=lambda text: None).refused)


def test_parallel_and_serial_import_agree(synthetic, tmp_path, corpus):
    corpora.import_corpus(synthetic[0], tmp_path / "out", workers=2, say=lambda text: None)
    again = data.open_corpus(tmp_path / "out")
    assert data.fingerprint(again) == data.fingerprint(corpus)
    assert all(np.array_equal(a.read(0, a.samples), b.read(0, b.samples)) for a, b in zip(again, corpus))


def test_the_real_recordings_import_in_the_bipolar_montage(shared, tmp_path):
    report = corpora.import_corpus(shared / "eeg" / "recordings", tmp_path / "out", montage="bipolar",
                                say=lambda text: None)
    assert len(report.read) == 46 and report.unlabelled == 1
    recordings = data.open_corpus(tmp_path / "out")
    train, dev = data.split_patients(recordings, ["chb02"])
    assert {r.patient for r in train} == {"chb01", "chb03", "mmi001"}
    assert {r.patient for r in dev} == {"chb02"}
    assert sum(len(r.events) for r in recordings) == 17
    w = data.Windows(train)
    assert len(w.epoch(0, 1)) > 0 and set(w.kind) == {0, 1, 2}


# ---- annotations inside EDF+ ----

def mark(onset, text, duration=None):
    """Bytes of one EDF+ annotation."""
    length = "" if duration is None else f"\x15{duration:g}"
    return f"{onset:+g}{length}\x14{text}\x14\0".encode()


def said(src, out, **options):
    """(Report, the lines that an import prints)."""
    lines = []
    report = corpora.import_corpus(src, out, say=lines.append, **options)
    return report, "\n".join(lines)


def test_annotations_inside_edf_plus_label_a_recording(tmp_path):
    """A text with a duration, a pair, a bare text with an end, several of them, a text that says background."""
    cases = {"duration": ({2: mark(2, "Seizure", 3)}, [[2, 5]]),
             "pair": ({1: mark(1, "Seizure start"), 6: mark(6, "SEIZURE END")}, [[1, 6]]),
             "bare": ({1: mark(1.5, "sz"), 6: mark(6.25, "sz_end")}, [[1.5, 6.25]]),
             "numbered": ({1: mark(1, "Seizure 1 onset"), 3: mark(3, "seizure 1 offset"), 5: mark(5, "sz 2", 2)},
                          [[1, 3], [5, 7]]),
             "ilae": ({2: mark(2, "sz_foc_ia_nm", 3), 3: mark(3, "fnsz", 4)}, [[2, 7]]),
             "german": ({1: mark(1, "Anfall Beginn"), 6: mark(6, "Anfall Ende")}, [[1, 6]]),
             "none": ({1: mark(1, "background")}, [])}
    for name, (texts, _) in cases.items():
        plus(tmp_path / "src" / f"{name}_1.edf", range(10), "EDF+C", texts)
    plus(tmp_path / "src" / "quiet_1.edf", range(10), "EDF+C", {1: mark(1, "eyes open")})
    report, text = said(tmp_path / "src", tmp_path / "out")
    assert not report.refused and report.unlabelled == 1
    assert "1 x 'eyes open'" in text and "--seizure-label TEXT" in text and "seizure start" not in text.lower()
    recordings = {r.patient: r for r in data.open_corpus(tmp_path / "out")}
    for name, (_, events) in cases.items():
        assert recordings[name].labelled and recordings[name].events.tolist() == events, name
    assert not recordings["quiet"].labelled
    again, text = said(tmp_path / "src", tmp_path / "out")
    assert again.kept == 8 and "1 x 'eyes open'" in text


@pytest.mark.parametrize("texts, why", [
    ({2: mark(2, "seizure")}, "'seizure' at 2 s has no end"),
    ({2: mark(2, "seizure end")}, "'seizure end' at 2 s has no start"),
    ({2: mark(2, "sz start"), 4: mark(4, "sz start"), 6: mark(6, "sz end")}, "'sz start' at 2 s has no end"),
    ({2: mark(2, "sz", 0)}, "'sz' at 2 s has no end"),
    ({2: mark(2, "sz", 3) + b"+x"}, "record 3 cannot be read"),
    ({2: mark(-2, "sz", 3)}, "event from -2 s"),
    ({2: mark(20, "sz", 3)}, "beyond the recording's 10 s")])
def test_annotations_that_contradict_themselves_leave_a_recording_unlabelled_and_are_said(tmp_path, texts, why):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", texts)
    report, text = said(tmp_path / "src", tmp_path / "out")
    assert report.unlabelled == 1 and why in text
    assert not data.open_corpus(tmp_path / "out")[0].labelled


@pytest.mark.parametrize("text", ["no seizure", "Seizure?", "possible seizure", "post seizure", "seizure meds given",
                                  "sz detected by software", "seizures", "szene"])
def test_texts_that_speak_of_seizures_are_not_taken_for_one(tmp_path, text):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", {2: mark(2, text, 3)})
    corpora.import_corpus(tmp_path / "src", tmp_path / "out", say=lambda text: None)
    r = data.open_corpus(tmp_path / "out")[0]
    assert r.labelled == (text == "no seizure") and not len(r.events)


def test_texts_given_by_the_user_label_and_a_change_of_them_is_noticed(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    plus(src / "a.edf", range(10), "EDF+C", {2: mark(2, "EVENT red-button", 3)})
    plus(src / "b.edf", range(10), "EDF+C", {1: mark(1, "on set"), 4: mark(4, "off set")})
    plus(src / "c.edf", range(10), "EDF+C", {0: mark(0, "Reviewed")})
    write_edf(src / "d.edf", 10)
    (src / "d_events.tsv").write_text(tsv((2, 3, "sz")))
    assert said(src, out)[0].unlabelled == 3
    done = command("import", src, out, "--seizure-label", "event Red-Button", "--seizure-label", "On Set..Off Set",
                   "--background-label", "reviewed", "--background-label", "never there")
    assert done.returncode == 0 and "3 read, 0 repaired, 1 already there" in done.stdout, done.stdout
    assert "hint: no EDF+ annotation is 'never there'" in done.stdout
    assert [r.events.tolist() for r in data.open_corpus(out)] == [[[2, 5]], [[1, 4]], [], [[2, 5]]]
    assert all(r.labelled for r in data.open_corpus(out))
    for seizure, background in (("a..a", []), ("", []), ("x..y..z", []), ("a b", ["A_B"]), ("..b", []), ("a", ["-"])):
        with pytest.raises(edf.DataError, match="-label"):
            corpora.import_corpus(src, out, seizure_labels=[seizure], background_labels=background)


def test_an_annotation_file_beside_an_edf_plus_counts_alone(tmp_path):
    plus(tmp_path / "src" / "a.edf", range(10), "EDF+C", {2: mark(2, "sz", 3)})
    (tmp_path / "src" / "a_events.tsv").write_text(tsv((6, 1, "sz")))
    corpora.import_corpus(tmp_path / "src", tmp_path / "out", say=lambda text: None)
    assert data.open_corpus(tmp_path / "out")[0].events.tolist() == [[6, 7]]


def test_a_long_list_of_texts_does_not_swell_the_table_or_the_file(tmp_path):
    plus(tmp_path / "src" / "a.edf", range(200), "EDF+C", {i: mark(i, f"note {i}" + "x" * 30) for i in range(200)})
    report, text = said(tmp_path / "src", tmp_path / "out")
    assert not report.refused and "and 80 other texts" in text and len(text.splitlines()) < 30


# ---- what the user may have meant otherwise ----

def test_another_preparation_over_a_folder_is_refused_naming_both_unless_asked_for(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    write_edf(src / "a.edf")
    said(src, out)
    before = (out / "a.h5").read_bytes()
    done = command("import", src, out, "--montage", "reduced", "--channels", "Cz,F7-T7")
    assert done.returncode == 2 and "--replace" in done.stderr
    assert "montage referential, notch both" in done.stderr
    assert "montage reduced of Cz, F7-T3, notch both" in done.stderr
    for options in (dict(montage="bipolar"), dict(notch="50"), dict(blank_unit="mV")):
        with pytest.raises(edf.DataError, match="of montage referential, notch both, this import is of"):
            said(src, out, **options)
    (out / corpora.INDEX).unlink()                      # told by the recordings too
    with pytest.raises(edf.DataError, match="--replace"):
        said(src, out, notch="50")
    assert (out / "a.h5").read_bytes() == before
    done = command("import", src, out, "--montage", "reduced", "--channels", "Cz,F7-T3", "--replace")
    assert done.returncode == 0 and data.open_corpus(out)[0].channels == ("Cz", "F7-T3")
    with pytest.raises(edf.DataError, match="of montage reduced of Cz, F7-T3, notch both, this import"):
        said(src, out)


def test_a_corpus_of_a_wearables_channels_is_imported_and_gives_windows(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    for name in "ab":
        write_edf(src / f"{name}_1.edf", 120, labels=["F7-T3", "F8-T4", "T3-T5", "T4-T6"])
        (src / f"{name}_1_events.tsv").write_text(tsv((20, 30, "sz")))
    assert "--montage reduced --channels F7-T3,F8-T4,T3-T5,T4-T6" in said(src, out)[1]
    assert not said(src, out, montage="reduced", channels=("F7-T3", "F8-T4"))[0].refused
    recordings = data.open_corpus(out)
    assert {r.channels for r in recordings} == {("F7-T3", "F8-T4")}
    loader = data.Loader(data.Windows(recordings, 60, 10), augment=True)
    x, y, mask = next(loader.batches([[0, 1]], 1))
    assert x.shape == (2, 2, 60 * 256) and data.mirror(recordings[0].channels).tolist() == [1, 0]
    assert data.mirror(("Cz", "F7-T3")).tolist() == [0, 1]      # nothing to change sides with


def test_files_refused_for_one_reason_share_a_line(tmp_path):
    for i in range(5):
        write_edf(tmp_path / "src" / f"{i}.edf", unit="")
    write_edf(tmp_path / "src" / "odd.edf", signals="0")
    text = said(tmp_path / "src", tmp_path / "out")[1]
    assert text.count("has no unit") == 1 and "5 files: Fp1 has no unit" in text
    assert "odd.edf: the header says 0 signals" in text and "6 refused:" in text
    assert len(corpora.read_report(tmp_path / "out")) == 6


def test_a_layout_that_fits_no_file_and_labels_of_no_file_are_hinted(tmp_path):
    write_edf(tmp_path / "src" / "night1.edf")
    (tmp_path / "src" / "night_1_events.tsv").write_text(tsv((2, 3, "sz")))
    report, text = said(tmp_path / "src", tmp_path / "out", layout="siena")
    assert "hint: no file is named as in siena (PN00-1.edf): leave --layout away" in text
    report, text = said(tmp_path / "src", tmp_path / "out2")
    assert "hint: 1 annotation files belong to no EDF, night_1_events.tsv" in text
    shutil.move(tmp_path / "src" / "night_1_events.tsv", tmp_path / "src" / "night1_events.tsv")
    report, text = said(tmp_path / "src", tmp_path / "out2")
    assert not report.hints and not report.unlabelled


def test_raw_edf_files_in_place_of_an_imported_folder_are_told_apart(tmp_path):
    write_edf(tmp_path / "src" / "p1" / "a.EDF")
    with pytest.raises(edf.DataError, match="not imported: run python data.py import"):
        data.open_corpus(tmp_path / "src")


# ---- version and time ----

def test_the_corpus_version_is_printed_stored_and_shown(tmp_path):
    folder = tmp_path / "tuh_eeg_seizure" / "v2.0.3" / "edf" / "train" / "aaaaaaaa" / "s001_2010" / "01_tcp_ar"
    write_edf(folder / "aaaaaaaa_s001_t000.edf", 30, date="02.03.10", time="11.12.13")
    (folder / "aaaaaaaa_s001_t000.csv_bi").write_text(CSV.format("30.0") + "TERM,0,30,bckg,1\n")
    src = tmp_path / "tuh_eeg_seizure" / "v2.0.3" / "edf"
    assert "version 2.0.3, labels csv_v1.0.0" in said(src, tmp_path / "a")[1]
    (src.parent / "AAREADME.txt").write_text("File: AAREADME.txt\nDatabase: TUSZ\nVersion: 2.0.3\n\n"
                                             "20240207: released\n2025-06-18: annotations mended\n")
    said_of = "version 2.0.3, newest date in its README 2025-06-18, labels csv_v1.0.0"
    assert said_of in said(src, tmp_path / "b")[1]
    r = data.open_corpus(tmp_path / "b")[0]
    assert r.release == said_of and r.began == "2010-03-02 11:12:13" and r.split == "train"
    assert said_of + ": 1 recordings" in command("info", tmp_path / "b").stdout


def test_versions_of_other_corpora_and_files_that_say_nothing(tmp_path):
    for name, wanted in (("siena-scalp-eeg-database-1.0.0", "version 1.0.0"), ("mine", ""), ("2024-01.02", "")):
        (tmp_path / name).mkdir()
        assert annotations.release(tmp_path / name, []) == wanted, name
    for content, wanted in (("Mine, 2024-01-02, 20199999", ""), ("Version 1.4 of 20240103 and 20249999",
                                                              "version 1.4, newest date in its README 2024-01-03")):
        (tmp_path / "mine" / "README.md").write_text(content)
        assert annotations.release(tmp_path / "mine", []) == wanted, content
    bids = tmp_path / "bids"
    bids.mkdir()
    for content, wanted in (('{"Name": "Own\\nset", "DatasetVersion": "1.2"}', "Own set 1.2"), ("{half", ""),
                            ("[]", ""), ('{"BIDSVersion": "1.8"}', "")):
        (bids / "dataset_description.json").write_text(content)
        assert annotations.release(bids, []) == wanted, content


# ---- anything else that a label file or an annotation signal may hold ----

def test_label_files_of_other_editors_are_read(tmp_path):
    for k, encoding in enumerate(("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1")):
        path = tmp_path / f"{k}_events.tsv"
        text = tsv((2, 3, "sz", 1, "F\xfc"))
        path.write_bytes((b"\xfe\xff" if encoding == "utf-16-be" else b"") + text.encode(encoding))
        assert annotations.read_beside(path, None).events == [(2, 5)], encoding


def test_control_characters_of_a_label_file_do_not_break_the_table(tmp_path):
    write_edf(tmp_path / "src" / "a.edf", 10)
    (tmp_path / "src" / "a_events.tsv").write_bytes("on\0set\x0b\x85\u2028\x1b[2Jevil\tduration\n1\t2\n".encode())
    report, text = said(tmp_path / "src", tmp_path / "out")
    line = next(line for line in text.splitlines() if "a.edf" in line)
    assert "no column onset" in line and "evil" in line and "\x1b" not in text


def test_any_list_of_annotations_gives_right_events_none_or_a_reason():
    """Events lie inside the recording, are disjoint and sorted, and each begins where a text of a seizure does;
    every seizure that has a duration lies inside one."""
    rng, read = np.random.default_rng(0), 0
    kinds = ("sz", "seizure start", "seizure end", "bckg", "eyes open", "fnsz", "Seizure 2", "end of seizure")
    for _ in range(2000):
        found = [(float(rng.choice([rng.uniform(-1, 25), rng.integers(20)])), rng.choice([None, 0.0, rng.uniform(0, 9)]),
                  str(rng.choice(kinds))) for _ in range(rng.integers(1, 6))]
        try:
            labels = annotations.parse_annotations(found, annotations.Texts())
            if labels is None:
                assert all(text == "eyes open" for _, _, text in found)
                continue
            events = annotations.finish(labels, 20.0)
        except edf.DataError as reason:
            assert str(reason)
            continue
        read += len(events)
        assert (events[:, 0] >= 0).all() and (events[:, 1] <= 20).all() and (events[:, 0] < events[:, 1]).all()
        assert (events[1:, 0] > events[:-1, 1]).all()
        assert set(events[:, 0]) <= {onset for onset, _, text in found if text not in ("bckg", "eyes open")}
        for onset, duration, text in found:
            if duration and text in ("sz", "fnsz", "Seizure 2"):
                assert any(begin <= onset and min(onset + duration, 20) <= end for begin, end in events)
    assert read > 200


def test_any_bytes_among_the_annotations_are_read_or_said_never_a_traceback(tmp_path):
    rng, pieces = np.random.default_rng(0), [b"+1", b"-", b"\x14", b"\x15", b"\0", b"sz", b"2.5", b" ", b"\xff", b"\n"]
    for _ in range(300):
        raw = b"".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(1, 12)))
        header = edf.read_header(plus(tmp_path / "a.edf", range(2), "EDF+C", {1: raw}))
        try:
            found = edf.read_annotations(header)
        except edf.DataError as reason:
            assert "cannot be read" in str(reason)
            continue
        assert all(text and "\x14" not in text and "\n" not in text for _, _, text in found), raw
