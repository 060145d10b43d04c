"""Where the files of an evaluation go, and that they harm no others.

    --out FOLDER    of each recording its events, pictures and probabilities; scores.json
    --events FILE   the events of one EDF

What lies where a corpus has its labels would be read as labels by the next import.
"""
import contextlib
import io
import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np

import checkpoint
from eeg import annotations, console, edf, splits
from eeg.disk import Refused, fault, walk, write_file
from eeg.layouts import labelled_by

EVENTS = "_events.tsv"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def default_out(path, state):
    """Beside a file of weights; in the run directory for a checkpoint of a run."""
    folder = path.absolute().parent
    if folder.name == "checkpoints" and "optimizer" in state:
        folder = folder.parent
    return folder / "evaluation"


def output(out, recording, ending):
    """File of one recording in the folder of an evaluation: SzCORE's name for events."""
    return out / (recording.name.removesuffix("_eeg") + ending)


def take_folder(out, recordings, source):
    """Make the folder `out` and hold it: a checkpoint.Lock. Refused where it holds the events of
    other recordings, which would lie beside these scores, where events would lie where a corpus has
    its labels, or where another evaluation is writing."""
    _make(out, "--out")
    ours = set()
    if not _of_another_set(out, recordings, source):
        ours = {output(out, r, EVENTS) for r in recordings if not _of_another(out, r)}
    # links are followed: through them lie the folders of a corpus that is put together
    there = [Path(folder, name) for folder, names in walk(out, lambda error: None)
             for name in names]
    edfs = {str(path.with_suffix("")).removesuffix("_eeg") for path in there
            if path.suffix.lower() == ".edf"}
    beside = [output(out, r, EVENTS).name for r in recordings if str(output(out, r, "")) in edfs]
    if beside:
        raise Refused(f"--out {out}: {beside[0]} would lie beside its EDF and be read as its "
                      "labels: give another folder")
    foreign = sorted({path for path in there if path.name.endswith(EVENTS)} - ours)
    if foreign:
        raise Refused(f"--out {out} already holds the events of other recordings "
                      f"({foreign[0].name}; {len(foreign)} in all): "
                      f"give another folder, such as --out {shlex.quote(f'{out}_{source.stem}')}")
    try:
        return checkpoint.lock(out)
    except checkpoint.InUse as error:
        raise Refused(f"--out {error.strerror}, or give another folder") from None
    except OSError as error:
        raise fault(error, out, asked=f"--out {out}") from None


def _of_another_set(out, recordings, source):
    """Whether the scores there are of another place and of other EEG: recordings of one name may
    have one length and one start, as where both are anonymised clips."""
    try:
        before = json.loads((out / "scores.json").read_text())
        place, eeg = before["data"], before.get("eeg", "")
    except OSError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"--out {out} holds a scores.json of another program: give another "
                      "folder") from None
    elsewhere = os.path.realpath(place) != os.path.realpath(source)
    return eeg != "" and elsewhere and eeg != splits.division(recordings, [])


def _of_another(out, recording):
    """Whether the events there are of a recording of the same name, but of another length or
    start, or are none that this program writes."""
    try:
        lines = output(out, recording, EVENTS).read_text().splitlines()
        *_, began, seconds = "".join(lines[1:2]).split("\t")
        return (abs(float(seconds) - recording.seconds) > 0.01
                or began != recording.began and "" not in (began.strip("n/a"), recording.began))
    except OSError:
        return False
    except ValueError:
        return True


def trade_off_picture(out, recordings, plot):
    """File of the picture of the whole evaluation: that of no recording, whatever it is called."""
    taken, name = {output(out, r, "") for r in recordings}, "trade_off"
    while out / name in taken:
        name += "_of_all"
    return out / f"{name}.{plot}"


def _make(folder, option):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fault(error, folder, asked=f"{option} {folder}") from None


def take_file(path, source):
    """Refused where --data is no single file, and where --events would be written over anything but
    the events of an earlier call or be read as labels, perhaps over the labels that are there."""
    if not source.is_file():
        raise Refused(f"--events takes one EDF: {source} is no file")
    _make(path.parent, "--events")
    try:
        there = path.resolve()
    except RuntimeError:
        raise Refused(f"--events {path}: its links lead in a circle") from None
    if there == Path(os.path.realpath(source)):
        raise Refused(f"--events {path} would be written over the EDF itself")
    # of a link, its own place counts too
    beside = labelled_by(there) or labelled_by(path.parent.resolve() / path.name)
    if beside:
        raise Refused(f"--events {path} would lie beside {beside.name} and be read as its labels: "
                      "give another folder")
    if path.is_dir():
        raise Refused(f"--events {path}: Is a directory")
    if not os.access(path if path.exists() else there.parent, os.W_OK):
        raise Refused(f"--events {path}: may not be written")
    if path.is_file() and path.read_bytes()[:5] not in (b"", b"onset"):
        raise Refused(f"--events {path} holds something else: name another file")


def write_events(path, found, probability, recording):
    """SzCORE events file of events (N, 2) in samples; confidence is the mean probability inside."""
    confidence = [probability[begin:end].mean() for begin, end in found]
    start = recording.began or "n/a"
    annotations.write_events_tsv(path, found / edf.FS, recording.seconds, confidence, start)


def write_background(path, source):
    """Events file of an EDF that cannot be prepared: one row, as long as its header says. Returns
    the seconds."""
    seconds, start = 0.0, ""
    with contextlib.suppress(edf.DataError, OSError):
        header = edf.read_header(source)
        seconds, start = header.seconds, header.began
    annotations.write_events_tsv(path, [], seconds, start=start or "n/a")
    return seconds


def write(recording, probability, found, c, out, plot, save):
    """The files of one recording; those that an earlier evaluation made stay until these are, but
    for its scores.json, which is not of these events."""
    (out / "scores.json").unlink(missing_ok=True)
    write_events(output(out, recording, EVENTS), found, probability, recording)
    if plot:
        with drawing() as pictures:
            pictures.draw(recording, probability, found, c["threshold"],
                          output(out, recording, f".{plot}"))
    if save:
        content = io.BytesIO()
        np.save(content, probability)
        write_file(output(out, recording, "_probability.npy"), content.getbuffer())


@contextlib.contextmanager
def drawing():
    """scoring/pictures.py. A signal waits: within matplotlib it would become another error."""
    with console.signals_wait(*STOPS):
        from scoring import pictures    # here: matplotlib takes a second to import
        yield pictures
