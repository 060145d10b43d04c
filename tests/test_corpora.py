"""eeg/corpora.py: layouts, annotations, and the conversion to HDF5. Real files and real processes."""

import errno
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

from eeg import augmentation
from eeg import corpora, disk, store
import data
from eeg import edf
import forked
from conftest import CSV, ROOT, command, imported, mark, plus, said, tsv, write_edf
from helpers import rest, wait_for

# ---- layouts ----


def test_layouts_patients_splits_and_annotations_are_recognised(shared):
    base, found = shared / "eeg", {}
    for folder in (
        "layouts/tuh",
        "layouts/chbmit",
        "layouts/siena",
        "layouts/seizeit",
        "recordings",
    ):
        files, root, _, _ = corpora.find_edf(base / folder)
        found[folder] = [corpora.identify(path, root) for path in files]
    tuh = found["layouts/tuh"]
    assert len(tuh) == 217 and {s.layout for s in tuh} == {"tuh"}
    assert {s.annotation.suffix for s in tuh} == {".csv_bi"}
    assert {(s.patient, s.split) for s in tuh} == {
        (p.name, p.parent.name) for p in (base / "layouts/tuh").glob("*/*")
    }
    assert tuh[0].name.startswith("dev/aaaaahln/s001_2008/02_tcp_le/aaaaahln_s001")
    assert {s.patient for s in found["layouts/chbmit"] if s.layout == "chbmit"} == {
        "chb05",
        "chb08",
    }
    assert {(s.layout, s.patient) for s in found["layouts/siena"]} == {
        ("siena", "PN00"),
        ("siena", "PN16"),
    }
    assert {s.patient for s in found["layouts/seizeit"] if s.layout == "seizeit"} == {
        "P_ID64",
        "P_ID83",
    }
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
    assert (
        corpora.identify(
            Path("/c/edf/train/aaaaaaaa/s001_2000/01_tcp_ar/aaaaaaaa_s001_t000.edf"),
            Path("/c/edf/train"),
        ).split
        == "train"
    )


def test_the_real_layouts_are_refused_with_the_reason_where_the_signal_contradicts(
    shared, tmp_path
):
    for folder, montage in (
        ("siena", "referential"),
        ("chbmit", "bipolar"),
        ("seizeit", "referential"),
    ):
        report = imported(shared / "eeg" / "layouts" / folder, tmp_path / folder, montage=montage)
        reasons = " ".join(why for _, why in report.refused)
        assert report.refused and ("not the same recording" in reasons or "beyond" in reasons)
        assert (
            len(report.refused) + len(report.read)
            == {"siena": 7, "chbmit": 59, "seizeit": 24}[folder]
        )


# ---- import: command, files, resume ----


def test_siena_recording_whose_name_the_list_misspells(tmp_path):
    write_edf(tmp_path / "PN06" / "PN06-1.edf", 60, time="10.00.00")
    block = (
        "Seizure n 1\nFile name: PNO6-1.edf\nRegistration start time: 10.00.00\n"
        "Registration end time: 10.01.00\n"
        "Seizure start time: 10.00.10\nSeizure end time: 10.00.30\n"
    )
    (tmp_path / "PN06" / "Seizures-list-PN06.txt").write_text(block)
    report = imported(tmp_path / "PN06", tmp_path / "out")
    assert report.read == ["PN06-1"] and data.open_corpus(tmp_path / "out")[0].events.tolist() == [
        [10, 30]
    ]
    write_edf(tmp_path / "PN06" / "PN06-1.edf", 60, time="10.20.00")
    assert "its header" in imported(tmp_path / "PN06", tmp_path / "out").refused[0][1]


def test_command_line_codes_table_and_going_on(tmp_path):
    write_edf(tmp_path / "src" / "p1" / "good.edf", tail=b"more")
    write_edf(tmp_path / "src" / "p1" / "bad.edf", unit="")
    done = command("import", tmp_path / "src", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 read, 0 already there, 1 refused" in done.stdout
    assert "bad.edf: Fp1 has no unit" in done.stdout
    assert command("import", tmp_path / "src", tmp_path / "out", "--skip-bad").returncode == 0
    assert command("import", tmp_path / "nowhere", tmp_path / "out").returncode == 2
    assert command("import", tmp_path / "out", tmp_path / "out2").returncode == 2
    assert command("import", tmp_path / "src").returncode == 2
    told = command("info", tmp_path / "out")
    assert told.returncode == 0 and "refused: 1" in told.stdout and "bad.edf" in told.stdout
    note = "note p1/good: 4 bytes after the last record left out\n"
    assert note in done.stdout and "with notes: 1\n" in told.stdout and f"  {note}" in told.stdout
    one = imported(tmp_path / "src" / "p1" / "good.edf", tmp_path / "one")
    assert not one.refused
    assert [r.name for r in data.open_corpus(tmp_path / "one")] == ["good"]


def test_the_file_format_is_the_documented_one(synthetic, corpus):
    path = Path(corpus[0].path)
    with h5py.File(path) as f:
        assert (
            f["eeg"].dtype == np.int16
            and f["eeg"].chunks == (19, 2560)
            and f["eeg"].compression is None
        )
        assert f["eeg"].shape == (19, corpus[0].samples)
        assert f["events"].dtype == np.float64 and f["events"].shape[1] == 2
        assert {
            "scale",
            "fs",
            "channels",
            "montage",
            "patient",
            "labelled",
            "source",
            "format",
            "prepared",
            "split",
            "norm",
            "notes",
        } <= set(f.attrs) and f.attrs["scale"].dtype == np.float32
        np.testing.assert_array_equal(f["eeg"][:, 100:900], corpus[0].read(100, 800))
    source = synthetic[0] / (corpus[0].name + ".edf")
    assert source.is_file() and path == synthetic[1] / (corpus[0].name + ".h5")


def test_import_resumes_and_notices_changes(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    for name in "abc":
        write_edf(src / f"{name}_1.edf", 10)
    assert len(imported(src, out).read) == 3
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.h5")}
    assert imported(src, out).kept == 3
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*.h5")}
    write_edf(src / "a_1.edf", 12)  # another source
    (src / "b_1_events.tsv").write_text(tsv((2, 3, "sz")))  # an annotation that was not there
    again = imported(src, out)
    assert sorted(again.read) == ["a_1", "b_1"] and again.kept == 1
    assert len(imported(src, out, notch="50", replace=True).read) == 3
    (src / "b_1.edf").write_bytes(b"damaged")  # what an earlier state gave must not live on
    assert len(imported(src, out, notch="50").refused) == 1
    assert [r.name for r in data.open_corpus(out)] == ["a_1", "c_1"]


@pytest.mark.slow
def test_many_recordings_made_anew_with_other_labels_are_those_that_a_training_reads(tmp_path):
    """Their files have the sizes of before: more of them than are looked at when a folder is opened, as in a copy of it."""
    src, out, many = tmp_path / "src", tmp_path / "out", store.MAX_LOOKED_AT + 1
    write_edf(src / "a_1.edf", 10)
    for number in range(2, many + 1):
        shutil.copy(src / "a_1.edf", src / f"a_{number}.edf")
    for onset in (2, 5):
        for number in range(1, many + 1):
            (src / f"a_{number}_events.tsv").write_text(tsv((onset, 1, "sz")))
        assert len(imported(src, out).read) == many
        recordings = data.open_corpus(out)
        assert [r.events.tolist() for r in recordings] == [[[onset, onset + 1]]] * many
        recordings[0].read(0, 100)


def test_a_second_corpus_never_replaces_recordings_of_the_first(tmp_path):
    for corpus in "ab":
        write_edf(tmp_path / corpus / "sub-01" / "sub-01_eeg.edf", 10, size=30 + (corpus == "b"))
    for corpus, refused in (("a", 0), ("b", 1), ("a", 0)):
        report = imported(tmp_path / corpus, tmp_path / "out")
        assert len(report.refused) == refused
    assert "a folder of its own" in imported(tmp_path / "b", tmp_path / "out").refused[0][1]
    assert imported(tmp_path / "a", tmp_path / "out").kept == 1
    shutil.move(tmp_path / "a", tmp_path / "moved")  # the corpus itself may move, and change
    write_edf(tmp_path / "moved" / "sub-01" / "sub-01_eeg.edf", 12)
    assert len(imported(tmp_path / "moved", tmp_path / "out").read) == 1


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_full_disk_stops_the_import_with_one_line(tmp_path):
    """A limit on the size of files stands in for the disk: the write fails, nothing half written is
    left."""
    import resource

    write_edf(tmp_path / "src" / "a.edf", 60)
    done = command(
        "import",
        tmp_path / "src",
        tmp_path / "out",
        start=subprocess.run,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "stopped" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "import.json"]


def held_import(folder, number, workers, gate):
    """An import whose processes stand still before they write their `number`-th recording, once one
    does."""
    process = forked.Popen(
        [
            sys.executable,
            ROOT / "tests" / "held.py",
            "import",
            folder / "src",
            folder / "out",
            "--workers",
            str(workers),
        ],
        env={**os.environ, "HELD": f"write_recording {number} {gate}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(process, "held")
    return process


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_import_killed_at_any_moment_leaves_only_whole_recordings(tmp_path, kills):
    """Killed when a recording is begun or just finished, and a little later: what stands under a
    final name is whole, and the same command goes on."""
    src, out = tmp_path / "src", tmp_path / "out"
    for i in range(kills + 4):
        write_edf(src / f"p{i}" / "x.edf", 300)
    arguments = [sys.executable, ROOT / "data.py", "import", src, out, "--workers", "2"]
    rng, done = np.random.default_rng(0), set()
    for kill in range(kills):
        process = forked.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        began = time.monotonic()
        while not (set(out.rglob("*.part")) if kill % 2 else set(out.rglob("*.h5")) - done):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() - began < 300
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.communicate()
        began = time.monotonic()
        while any(alive(pid) for pid in workers):  # they follow the import
            assert time.monotonic() - began < 300
            time.sleep(0.02)
        done = set(out.rglob("*.h5"))
        for path in done:
            assert store.load_recording(path)["samples"] == 300 * 256
    ended = subprocess.run(arguments, capture_output=True, text=True)
    assert ended.returncode == 0 and f"{len(done)} already there" in ended.stdout, (
        ended.stdout + ended.stderr
    )
    assert len(data.open_corpus(out)) == kills + 4
    assert not list(out.rglob("*.part"))


def test_ctrl_c_while_data_py_is_loaded_is_one_line(tmp_path):
    (tmp_path / "h5py.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen([sys.executable, str(ROOT / "data.py"), "info", "x"], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    wait_for(process, "loading")
    process.send_signal(signal.SIGINT)
    out = rest(process)
    assert process.returncode == 130 and out.strip() == "data.py: stopped by SIGINT before the command began"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_import_with_one_line(tmp_path, workers):
    for i in range(5):
        write_edf(tmp_path / "src" / f"{i}.edf", 20)
    process = held_import(tmp_path, 2, workers, tmp_path / "gate")
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "gate").touch()  # a worker ends what it has begun
    error = rest(process)
    assert process.returncode == 130 and "Traceback" not in error
    # not the last line: how far it was, which is said after ten seconds, may be written out later
    assert "data.py: stopped: interrupted; the same command goes on from here" in error.splitlines()
    assert not list((tmp_path / "out").glob("*.part"))
    assert command("import", tmp_path / "src", tmp_path / "out").returncode == 0


def test_two_imports_at_once_are_refused(tmp_path):
    write_edf(tmp_path / "src" / "a.edf")
    imported(tmp_path / "src", tmp_path / "out")
    import fcntl

    with open(tmp_path / "out" / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = command("import", tmp_path / "src", tmp_path / "out")
    assert done.returncode == 2 and "another import" in done.stderr


def test_strange_folders(tmp_path):
    """A folder named x.edf, loops and dead links, a pipe, two files with one target, names outside
    ASCII, no permission."""
    src = tmp_path / "src"
    write_edf(src / "x.edf" / "inner.edf")
    write_edf(src / "zähler ü" / "größe.edf")
    write_edf(src / "twice.edf")
    shutil.copy(src / "twice.edf", src / "twice.EDF")
    write_edf(src / "twice_eeg.edf")
    (src / "x.edf" / "loop").symlink_to(src)
    (src / "gone.edf").symlink_to(src / "nothing")
    os.mkfifo(src / "pipe.edf")
    report = imported(src, tmp_path / "out")
    assert sorted(report.read) == ["twice", "x.edf/inner", "zähler ü/größe"]
    why = {Path(path).name: reason for path, reason in report.refused}
    assert why["gone.edf"] == "gone.edf: No such file or directory" and "regular" in why["pipe.edf"]
    assert len(why) == 4
    assert "same name as" in why["twice.edf"] + why.get("twice.EDF", "") and "same name as" in why["twice_eeg.edf"]
    named = tmp_path / "named"
    write_edf(named / "good.edf")
    for name in (b"not \xff utf-8.edf", b"two\nlines.edf"):
        shutil.copy(named / "good.edf", os.path.join(os.fsencode(named), name))
    write_edf(named / "unlabelled.edf")
    (named / "unlabelled_events.tsv").symlink_to(src / "nothing")  # labels that were not fetched
    done = command("import", named, tmp_path / "out3")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "1 read" in done.stdout
    assert done.stdout.count("its name holds a line break or is not UTF-8") == 2
    assert "unlabelled_events.tsv: No such file" in done.stdout
    assert "3 refused" in said(named, tmp_path / "out3")[1]
    if os.getuid():
        (src / "twice.EDF").chmod(0)
        assert "Permission" in str(imported(src, tmp_path / "out2").refused)


@pytest.mark.slow
def test_parallel_and_serial_import_agree(synthetic, tmp_path, corpus):
    imported(synthetic[0], tmp_path / "out", workers=2)
    again = data.open_corpus(tmp_path / "out")
    assert data.fingerprint(again) == data.fingerprint(corpus)
    assert all(
        np.array_equal(a.read(0, a.samples), b.read(0, b.samples)) for a, b in zip(again, corpus)
    )


@pytest.mark.slow
def test_the_real_recordings_import_in_the_bipolar_montage(shared, tmp_path):
    report = imported(shared / "eeg" / "recordings", tmp_path / "out", montage="bipolar")
    assert len(report.read) == 46 and len(report.unlabelled) == 1
    recordings = data.open_corpus(tmp_path / "out")
    train, dev = data.split_patients(recordings, ["chb02"])
    assert {r.patient for r in train} == {"chb01", "chb03", "mmi001"}
    assert {r.patient for r in dev} == {"chb02"}
    assert sum(len(r.events) for r in recordings) == 17
    w = data.Windows(train)
    assert len(w.epoch(0, 1)) > 0 and set(w.kind) == {0, 1, 2}


# ---- what the user may have meant otherwise ----


def test_another_preparation_over_a_folder_is_refused_naming_both_unless_asked_for(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    write_edf(src / "a.edf")
    said(src, out)
    before = (out / "a.h5").read_bytes()
    wearable = ("--montage", "reduced", "--channels", "Cz,F7-T7")
    done = command("import", src, out, *wearable)
    assert done.returncode == 2 and "--replace" in done.stderr
    assert "montage referential, notch both" in done.stderr
    assert "montage reduced of Cz, F7-T3, notch both" in done.stderr
    for options in (dict(montage="bipolar"), dict(notch="50"), dict(blank_unit="mV")):
        with pytest.raises(
            edf.DataError, match="of montage referential, notch both, this import is of"
        ):
            said(src, out, **options)
    (out / disk.INDEX).unlink()  # told by the recordings too
    with pytest.raises(edf.DataError, match="--replace"):
        said(src, out, notch="50")
    assert (out / "a.h5").read_bytes() == before
    done = command("import", src, out, *wearable, "--replace")
    assert done.returncode == 0 and data.open_corpus(out)[0].channels == ("Cz", "F7-T3")
    with pytest.raises(
        edf.DataError, match="of montage reduced of Cz, F7-T3, notch both, this import"
    ):
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
    assert x.shape == (2, 2, 60 * 256) and augmentation.mirror(recordings[0].channels).tolist() == [1, 0]
    assert augmentation.mirror(("Cz", "F7-T3")).tolist() == [0, 1]  # nothing to change sides with


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_an_import_is_done_where_its_streams_are_closed_or_nobody_reads_them(tmp_path, streams):
    write_edf(tmp_path / "src" / "anna" / "night1.edf")
    line = f'"$0" "$1" import "$2/src" "$2/out" {streams}'
    assert subprocess.run(["bash", "-c", line, sys.executable, ROOT / "data.py", tmp_path]).returncode == 0
    assert [r.name for r in data.open_corpus(tmp_path / "out")] == ["anna/night1"]


def test_an_edf_never_stands_twice_in_a_folder_under_two_names(tmp_path):
    write_edf(tmp_path / "src" / "anna" / "night1.edf")
    imported(tmp_path / "src" / "anna" / "night1.edf", tmp_path / "out")        # of the patient night1
    with pytest.raises(edf.DataError, match="out/night1.h5 is .*anna/night1.edf under another name"):
        imported(tmp_path / "src", tmp_path / "out")
    assert [r.name for r in data.open_corpus(tmp_path / "out")] == ["night1"]
    (tmp_path / "out" / "night1.h5").unlink()
    imported(tmp_path / "src", tmp_path / "out")
    assert [(r.name, r.patient) for r in data.open_corpus(tmp_path / "out")] == [("anna/night1", "anna")]


@pytest.mark.parametrize("first, second, stays", [("x_eeg.edf", "x.edf", "x"), ("x.edf", "x.EDF", "x"),
                                                  ("x.edf", "x_eeg.edf", "x")])
def test_of_two_edf_files_of_one_name_the_refused_one_leaves_the_folder(tmp_path, first, second, stays):
    write_edf(tmp_path / "src" / first, 5)
    imported(tmp_path / "src", tmp_path / "out")
    write_edf(tmp_path / "src" / second, 7)
    refused = imported(tmp_path / "src", tmp_path / "out").refused
    there = data.open_corpus(tmp_path / "out")
    assert [r.name for r in there] == [stays] and len(refused) == 1 and "same name" in refused[0][1]
    left = {first, second} - {Path(refused[0][0]).name}
    assert there[0].seconds == (5 if left == {first} else 7)


@pytest.mark.parametrize("length", [230, 242, 251])
def test_the_longest_of_names_stops_no_import(tmp_path, length):
    for name in ("a", "x" * length):
        write_edf(tmp_path / "src" / f"{name}.edf", 5)
    assert imported(tmp_path / "src", tmp_path / "out").read == ["a", "x" * length]


def test_eeg_under_two_names_is_said_by_the_import_and_by_info(tmp_path):
    """A link, a copy, and a patient's folder that was renamed between two imports."""
    src, out = tmp_path / "src", tmp_path / "out"
    for i, name in enumerate(("anna", "berta", "carl")):
        noise = np.random.default_rng(i).normal(0, 300, (19, 20 * 256))
        write_edf(src / name / "n1.edf", eeg=noise)
    assert "under another name" not in said(src, out)[1]
    (src / "dora").mkdir()
    (src / "dora" / "x.edf").symlink_to("../berta/n1.edf")
    shutil.copytree(src / "carl", src / "emil")
    (src / "anna").rename(src / "P01")
    gone = f"note anna/n1: stays in {out} though its EDF is no longer there"
    line = ("warning: 3 recordings under another name: anna/n1 is P01/n1, dora/x is berta/n1, "
            "emil/n1 is carl/n1: take one of the two away")
    told = []
    assert {line, gone} <= set(said(src, out)[1].splitlines())
    data.info(out, told.append)
    assert f"  {line}" in told


def test_what_other_programs_keep_in_folders_of_their_own_is_no_recording(tmp_path):
    """DataLad shows each file as a link into .git/annex, where it lies under the name of its hash."""
    src, place = tmp_path / "src", "sub-01/eeg/sub-01_run-1_eeg.edf"
    kept = write_edf(src / ".git" / "annex" / "objects" / "MD5E-s1--aa.edf" / "MD5E-s1--aa.edf")
    (src / place).parent.mkdir(parents=True)
    (src / place).symlink_to(kept)
    for folder in (".Trash-1000/files", "$RECYCLE.BIN/S-1", "@eaDir/n.edf", "#recycle"):
        write_edf(src / folder / "n1.edf")
    write_edf(src / "#12" / "n1.edf", 10)
    assert [path.relative_to(src).as_posix() for path in corpora.find_edf(src)[0]] == ["#12/n1.edf", place]


@pytest.mark.parametrize("at, root", [(".", "dev"), ("dev", "."), ("dev/aaaaaaaa", ".."), ("train", "../dev")])
def test_the_split_of_a_corpus_is_known_wherever_the_import_is_started(tmp_path, monkeypatch, at, root):
    write_edf(tmp_path / "dev" / "aaaaaaaa" / "aaaaaaaa_s001_t000.edf", 5)
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path / at)
    files, root, *_ = corpora.find_edf(root)
    assert [corpora.identify(path, root).split for path in files] == ["dev"]


def test_files_refused_for_one_reason_share_a_line(tmp_path):
    for i in range(5):
        write_edf(tmp_path / "src" / f"{i}.edf", unit="")
    write_edf(tmp_path / "src" / "odd.edf", signals="0")
    text = said(tmp_path / "src", tmp_path / "out")[1]
    assert text.count("has no unit") == 1 and "5 files: Fp1 has no unit" in text
    assert "odd.edf: the header says 0 signals" in text and "6 refused:" in text
    assert len(corpora.read_report(tmp_path / "out")) == 6
    for foreign in ('{"refused": 5}', '{"refused": [1]}', "[]", '{"unfinished": 5}', '{"unfinished": ["so far"]}'):
        (tmp_path / "out" / "import.json").write_text(foreign)
        assert corpora.read_report(tmp_path / "out") == []
        corpora.check_finished(tmp_path / "out")


def test_a_layout_that_fits_no_file_and_labels_of_no_file_are_hinted(tmp_path):
    write_edf(tmp_path / "src" / "night1.edf")
    (tmp_path / "src" / "night_1_events.tsv").write_text(tsv((2, 3, "sz")))
    report, text = said(tmp_path / "src", tmp_path / "out", layout="siena")
    assert "hint: no file is named as in siena (PN00-1.edf): leave --layout away" in text
    report, text = said(tmp_path / "src", tmp_path / "out2")
    assert "hint: 1 annotation file without an EDF, as night_1_events.tsv" in text
    write_edf(tmp_path / "src" / "night_1.edf")
    assert not said(tmp_path / "src" / "night1.edf", tmp_path / "out3")[0].hints
    (tmp_path / "src" / "night_1.edf").unlink()
    shutil.move(tmp_path / "src" / "night_1_events.tsv", tmp_path / "src" / "night1_events.tsv")
    report, text = said(tmp_path / "src", tmp_path / "out2")
    assert not report.hints and not report.unlabelled


@pytest.mark.parametrize("edf, files, alone", [
    ("a.edf", ["labels/a_events.tsv"], 1),
    ("eeg/anna/a.edf", ["labels/anna/a.csv", "labels/anna/b.csv", "participants.tsv"], 1),
    ("eeg/a_eeg.edf", ["a_events.tsv", "eeg/._b_events.tsv"], 1),
    ("anna.edf", ["night1_annotations.txt", "night2.set", "night2_events.tsv"], 1),
    ("anna_03.edf", ["chb01-summary.txt"], 1),
    ("anna.edf", ["night1.csv", "letter.txt"], 1),
    ("anna.edf", ["anna report.txt"], 1),
    ("p1/anna.edf", ["seizures.csv", "participants.tsv"], 1),
    ("chb01_03.edf", ["chb01-summary.txt", "chb02-summary.txt"], 0)])
def test_labels_that_lie_beside_no_edf_of_their_name_are_hinted(tmp_path, edf, files, alone):
    """Also where the EDF+ says itself that it holds no seizure."""
    plus(tmp_path / "src" / edf, range(5), "EDF+C", {0: mark(0, "background")})
    for name in files:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        # those of other names tell by what they hold
        a_list = "Onset,Duration,Text\n5,4,Seizure\n" if name in ("night1.csv", "anna report.txt", "seizures.csv") else ""
        (tmp_path / "src" / name).write_text(a_list or f"File Name: {edf}\nNumber of Seizures in File: 0\n")
    line, told = f"1 annotation file without an EDF, as {Path(files[0]).name}: labels are read where", []
    for _ in range(2):
        hints = said(tmp_path / "src", tmp_path / "out")[0].hints
        assert [hint.startswith(line) for hint in hints if "annotation" in hint] == [True] * alone
    data.info(tmp_path / "out", told.append)
    assert any(f"hint: {line}" in text for text in told) == alone
    if alone:                                           # also after an import of another folder, until it is gone
        write_edf(tmp_path / "other" / "b_1.edf", 5)
        imported(tmp_path / "other", tmp_path / "out")
        for there in (1, 0):
            told.clear()
            data.info(tmp_path / "out", told.append)
            assert any(f"hint: {line}" in text for text in told) == there
            (tmp_path / "src" / files[0]).unlink(missing_ok=True)


def test_raw_edf_files_in_place_of_an_imported_folder_are_told_apart(tmp_path):
    write_edf(tmp_path / "src" / "p1" / "a.EDF")
    with pytest.raises(edf.DataError, match="not imported: run python data.py import"):
        data.open_corpus(tmp_path / "src")


def test_control_characters_of_a_label_file_do_not_break_the_table(tmp_path):
    write_edf(tmp_path / "src" / "a.edf", 10)
    (tmp_path / "src" / "a_events.tsv").write_bytes(
        "on\0set\x08\x85\x1b[2Jevil\tduration\n1\t2\n".encode()
    )
    report, text = said(tmp_path / "src", tmp_path / "out")
    line = next(line for line in text.splitlines() if "a.edf" in line)
    assert "no column onset" in line and "evil" in line and "\x1b" not in text


# ---- version and time ----


def test_the_corpus_version_is_printed_stored_and_shown(tmp_path):
    folder = (
        tmp_path
        / "tuh_eeg_seizure"
        / "v2.0.3"
        / "edf"
        / "train"
        / "aaaaaaaa"
        / "s001_2010"
        / "01_tcp_ar"
    )
    write_edf(folder / "aaaaaaaa_s001_t000.edf", 30, date="02.03.10", time="11.12.13")
    (folder / "aaaaaaaa_s001_t000.csv_bi").write_text(CSV.format("30.0") + "TERM,0,30,bckg,1\n")
    src = tmp_path / "tuh_eeg_seizure" / "v2.0.3" / "edf"
    assert "version 2.0.3, labels csv_v1.0.0" in said(src, tmp_path / "a")[1]
    (src.parent / "AAREADME.txt").write_text(
        "File: AAREADME.txt\nDatabase: TUSZ\nVersion: 2.0.3\n\n"
        "20240207: released\n2025-06-18: annotations mended\n"
    )
    said_of = "version 2.0.3, newest date in its README 2025-06-18, labels csv_v1.0.0"
    assert said_of in said(src, tmp_path / "b")[1]
    r = data.open_corpus(tmp_path / "b")[0]
    assert r.release == said_of and r.began == "2010-03-02 11:12:13" and r.split == "train"
    lines = []
    data.info(tmp_path / "b", lines.append)
    assert f"  {said_of}: 1 recording" in lines


def test_what_is_no_edf_is_left_out_or_named(tmp_path):
    src = tmp_path / "src"
    write_edf(src / "x.edf")
    (src / "._x.edf").write_bytes(b"\0\5\x16\7" + bytes(4092))  # macOS beside every file
    assert imported(src, tmp_path / "out").read == ["x"]
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.bdf", "b.BDF", "c.edf.gz", "notes.txt"):
        (other / name).write_bytes(b"x")
    with pytest.raises(edf.DataError, match=r"no EDF file in it \(1 .edf.gz, 2 .bdf: convert or"):
        imported(other, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


UNREADABLE = "/proc/self/mem"           # a regular file that the kernel answers with EIO


@pytest.mark.parametrize("place", ["src/a.edf", "src/a.csv", "out/a.h5", "out/import.json"])
def test_what_cannot_be_read_once_loses_nothing_and_is_not_taken_for_whole(tmp_path, place):
    src, out, path = tmp_path / "src", tmp_path / "out", tmp_path / place
    write_edf(src / "a.edf")
    (src / "a.csv").write_text("onset,duration,label\n3,4,seizure\n")
    assert imported(src, out).read == ["a"]
    path.rename(tmp_path / "away")
    path.symlink_to(UNREADABLE)
    done = command("import", src, out) if place.startswith("src") else command("info", out)
    assert done.returncode == 1 and not done.stderr.count("\n") > 1 and "Traceback" not in done.stderr
    assert f"{path.name}: Input/output error" in done.stdout or f"Input/output error: '{path}'" in done.stderr
    path.unlink()
    (tmp_path / "away").rename(path)
    assert data.open_corpus(out)[0].events.tolist() == [[3, 7]]
    assert imported(src, out).kept == 1 and not corpora.read_report(out)


@pytest.mark.parametrize("call", ["lstat", "scandir"])
def test_a_file_or_folder_that_answers_once_with_a_fault_is_not_taken_for_absent(tmp_path, monkeypatch, call):
    src, out, real = tmp_path / "src", tmp_path / "out", getattr(os, call)
    write_edf(src / "p1" / "a.edf")
    (src / "p1" / "a.csv").write_text("onset,duration,label\n3,4,seizure\n")
    imported(src, out)

    def failing(path, *arguments, **options):
        if str(path).endswith(("p1/a.csv", "p1")):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *arguments, **options)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        if call == "scandir":
            with pytest.raises(OSError, match="Stale file handle"):
                data.open_corpus(out)
            patched.setattr(os, call, lambda path: real(path) if "out" in str(path) else failing(path))
            assert imported(src, out).refused == [(str(src / "p1"), "Stale file handle")]
        else:
            with pytest.raises(OSError, match="Stale file handle"):
                imported(src, out)
    report = imported(src, out)
    assert report.kept == 1 and not report.unlabelled and not corpora.read_report(out)
