"""Shared by every test: the project root on sys.path, one torch thread, the place of the shared
real EEG, slow tests asked for by name, EDF files written by hand, a recording in memory, and a
small synthetic corpus."""
import collections
import contextlib
import fcntl
import functools
import gc
import os
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
FOLDERS = ("run", "scoring", "eeg")
# every file of the program, by its path in the checkout
SOURCES = {str(path.relative_to(ROOT)): path for folder in ("", *FOLDERS) for path in sorted((ROOT / folder).glob("*.py"))}
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")          # the suite runs on 2 cores, often beside child processes

from eeg import corpora  # noqa: E402
from eeg import disk  # noqa: E402
import data  # noqa: E402
from eeg import edf  # noqa: E402
import forked  # noqa: E402
from eeg import synth  # noqa: E402

LONG = {"test_ddp", "test_copying", "test_pairs", "test_walk", "test_crash", "test_modal", "test_train", "test_checkpoint"}
NAMES = edf.CHANNELS["referential"]


# what a background job (&) or nohup ignores, every child process would ignore too: with a handler
# of its own this process still goes on, and children begin with the default
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run what takes long too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long, runs with --slow")


def pytest_collection_modifyitems(config, items):
    # what takes long begins first: at the end nobody waits for one test
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):     # keywords have the names of folders too
                item.add_marker(pytest.mark.skip(reason="takes long: run with --slow"))


def pytest_collection_finish():
    # what is imported by now stays: no later collection of garbage goes through it, nor copies its pages in a forked child
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped, one line for each reason."""
    reasons = collections.Counter(str(report.longrepr[2]).removeprefix("Skipped: ")
                                  for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture
def shared():
    """Folder of real EEG and the Modal stand-in, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("real EEG folder ../shared is absent")
    return SHARED


def copy_sources(folder):
    """The program's files in another folder, as a clone would give them."""
    for name, path in SOURCES.items():
        target = Path(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def write_edf(path, seconds=20, rate=256, labels=NAMES, eeg=None, size=30.0, tail=b"", **fields):
    """Write an EDF by hand: `fields` overrides header fields, given as text for all signals or
    {signal: text}."""
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


@dataclass
class Held(data.Recording):
    """A recording without a file: its samples, int16 (C, T), are in memory."""
    memory: np.ndarray = None

    def read_chunks(self, start, n, out):
        piece = self.memory[:, start - start % disk.CHUNK:][:, :len(out) * disk.CHUNK]
        rows = np.zeros((piece.shape[0], len(out) * disk.CHUNK), np.int16)
        rows[:, :piece.shape[1]] = piece
        out[:] = rows.reshape(piece.shape[0], len(out), disk.CHUNK).transpose(1, 0, 2)


def prepare(path, montage="referential", **settings):
    """One EDF as an unlabelled recording in memory, prepared as an import would. DataError names
    file and reason."""
    recipe = edf.Recipe(montage, **settings)
    try:
        header = edf.read_header(path)
        signal = edf.prepare_edf(header, recipe)
    except edf.DataError as error:
        raise edf.DataError(f"{path}: {error}") from None
    stem = Path(path).stem
    return Held(str(path), stem, stem.split("_")[0], "", montage, recipe.channels, edf.FS, signal.eeg.shape[1],
                signal.scale, signal.amplitude, False, np.empty((0, 2)), recipe.hash, "; ".join(header.notes),
                source_fs=signal.rate, memory=signal.eeg)


class Track:
    """A recording held in memory, with the attributes that evaluate.py reads."""

    def __init__(self, name, seconds, events=(), patient="p1", labelled=True, channels=2):
        self.name, self.patient, self.labelled = name, patient, labelled
        self.samples, self.fs = round(seconds * edf.FS), edf.FS
        self.seconds, self.events = self.samples / edf.FS, np.array(events, float).reshape(-1, 2)
        self.scale, self.norm = np.full(channels, 0.5, np.float32), 10.0
        self.began = ""

    @functools.cached_property
    def eeg(self):
        return np.random.default_rng(self.samples).integers(-99, 99, (len(self.scale), self.samples), np.int16)

    def read(self, start, n):
        piece = self.eeg[:, start:start + n]
        return np.pad(piece, ((0, 0), (0, n - piece.shape[1])))

    def labels(self, start, n):
        seconds = (start + np.arange(n)) / edf.FS
        inside = [(seconds >= a) & (seconds < b) for a, b in self.events]
        return np.any([np.zeros(n, bool), *inside], 0).astype(np.uint8)


def probability_of(track, events, height=0.99):
    p = np.full(track.samples, 0.01, np.float32)
    for begin, end in events:
        p[round(begin * edf.FS):round(end * edf.FS)] = height
    return p


def plus(path, onsets, kind="EDF+D", annotations=(), name="EDF Annotations", **fields):
    """EDF+ with an annotation signal that gives each record its onset, and {record: further
    bytes}."""
    eeg = np.random.default_rng(0).integers(-900, 900, (len(onsets), 19 * 256)).astype("<i2")
    rows = []
    for i, onset in enumerate(onsets):
        raw = f"+{onset:g}\x14\x14\0".encode() + dict(annotations).get(i, b"")
        rows.append(eeg[i].tobytes() + raw.ljust(64, b"\0")[:64])
    usual = dict(count={19: "32"}, reserved=kind, pmin={19: "-1"}, pmax={19: "1"}, unit={19: ""},
                 dmin={19: "-32768"})
    return write_edf(path, len(onsets), labels=[*NAMES, name],
                     eeg=np.zeros((20, len(onsets) * 256)), body=b"".join(rows), **(usual | fields))


HEAD = "onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration\n"
CSV = (
    "# version = csv_v1.0.0\n# duration = {} secs\n#\n"
    "channel,start_time,stop_time,label,confidence\n"
)


def tsv(*rows):
    return HEAD + "".join("\t".join(map(str, row)) + "\n" for row in rows)


def mark(onset, text, duration=None):
    """Bytes of one EDF+ annotation."""
    length = "" if duration is None else f"\x15{duration:g}"
    return f"{onset:+g}{length}\x14{text}\x14\0".encode()


def imported(src, out, **options):
    """The Report of an import that says nothing."""
    return corpora.import_corpus(src, out, say=lambda text: None, **options)


def said(src, out, **options):
    """(Report, the lines that an import prints)."""
    lines = []
    report = corpora.import_corpus(src, out, say=lines.append, **options)
    return report, "\n".join(lines)


def command(*args, start=forked.run, **kwargs):
    """data.py with its words; start=subprocess.run takes a new interpreter."""
    return start(
        [sys.executable, ROOT / "data.py", *map(str, args)],
        capture_output=True,
        text=True,
        **kwargs,
    )


def microvolts(recording):
    return recording.read(0, recording.samples) * recording.scale[:, None]


@contextlib.contextmanager
def once(tmp_path_factory, name):
    """(folder, whether it is to be filled): the first process of pytest-xdist fills it, the others wait and find it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent                  # of all of them
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = base / f"{name}.whole"
        yield base / name, not whole.exists()
        whole.touch()


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """Folder of 20 min of synthetic EDF, and the folder it was imported to."""
    with once(tmp_path_factory, "synthetic") as (base, empty):
        if empty:
            synth.synth(base / "edf", hours=0.5, patients=4, seed=3)
            report = corpora.import_corpus(base / "edf", base / "h5", say=lambda text: None)
            assert not report.refused and not report.notes
    return base / "edf", base / "h5"


@pytest.fixture(scope="session")
def corpus(synthetic):
    return data.open_corpus(synthetic[1])


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Folder of twenty minutes of four synthetic patients, imported: what the tests of training
    train on."""
    with once(tmp_path_factory, "corpus") as (root, empty):
        if empty:
            synth.synth(root / "edf", hours=0.35, patients=4, seed=3)
            corpora.import_corpus(root / "edf", root / "h5", say=lambda text: None)
    return root / "h5"


@pytest.fixture
def curves():
    """Curves are drawn: half of the time of an epoch."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """No curves in this process, but for the tests that ask for them."""
    if "train" in sys.modules and "curves" not in request.fixturenames:
        monkeypatch.setattr(sys.modules["train"].Trainer, "draw", lambda self: None)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def ext4_image(place):
    """A real ext4 file system of eight megabytes in an image, mounted at `place`, which `dies` can take away."""
    image = place.with_suffix(".img")
    place.mkdir()
    image.write_bytes(bytes(8 << 20))
    made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True) if shutil.which("mkfs.ext4") else None
    mount = ["mount", "-o", "loop", str(image), str(place)]
    if os.geteuid() or not made or made.returncode or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting an ext4 image needs root, mkfs.ext4 and loop devices")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def ext4_disk(tmp_path):
    with ext4_image(tmp_path / "ext4") as place:
        yield place


def dies(ext4_disk):
    """From now on every read and write of it fails with EIO, of open files too, as on a dead disk. Returns what mends it."""
    disk = os.open(ext4_disk, os.O_RDONLY)
    fcntl.ioctl(disk, 0x8004587D, struct.pack("I", 2))      # EXT4_IOC_SHUTDOWN, without a flush
    os.close(disk)

    def mend():
        subprocess.run(["umount", "-l", str(ext4_disk)], check=True)
        image = ext4_disk.with_suffix(".img")
        subprocess.run(["mount", "-o", "loop", str(image), str(ext4_disk)], check=True)
    return mend
