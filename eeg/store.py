"""The HDF5 file of a recording, and the index of a folder of them.

    write_recording(Path("data/tusz/a.h5"), eeg, events, attributes)    # whole, or not at all
    entries(Path("data/tusz"))      # {name: (state of the file, what stands in it)}, one read

Format 2: `eeg` int16 (C, T) lies in chunks of (C, CHUNK), uncompressed, one after the other behind
all else, so that a window of training is one read.
"""
import hashlib
import json
import os
import re
import stat
import sys

import h5py
import numpy as np

from eeg.console import how_many
from eeg.disk import CHUNK, INDEX, LASTING, file_state, replace_durably, walk, write_json
from eeg.edf import FS, DataError

FORMAT = 2                              # version of the HDF5 layout


def write_recording(target, eeg, events, attributes):
    """One recording, eeg int16 (C, T), under its final name, complete and durable, or not at all.
    DataError where HDF5 does not lay it as format 2."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f".{os.getpid()}.h5.part")     # no longer than the name of any EDF
    try:
        with h5py.File(temp, "w", libver="latest") as f:
            f.attrs.update(attributes)
            f.create_dataset("events", data=events)
            # all that stands about the recording takes its place before the samples
            f.flush()
            _write_chunks(make_dataset(f, *eeg.shape), eeg)
            begin = _first_chunk(target, f["eeg"])
        if os.path.getsize(temp) != begin + 2 * len(eeg) * CHUNK * whole_chunks(eeg.shape[1]):
            raise DataError(f"{target}: HDF5 put something behind the samples")
        replace_durably(temp, target)
    except (OSError, RuntimeError) as error:    # RuntimeError: of a full disk while h5py closes
        number = errno_of(error)
        if number:
            raise OSError(number, os.strerror(number), str(target)) from None
        raise OSError(f"{target}: {error}") from None
    finally:
        temp.unlink(missing_ok=True)


def whole_chunks(samples):
    """How many chunks hold so many samples, a number or an array of them."""
    return -(-samples // CHUNK)


def make_dataset(file, channels, samples):
    """The empty dataset `eeg` of an open HDF5 file."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((channels, CHUNK))
    # all room is taken at once: that puts the chunks in a row
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # the shape may not be smaller than a chunk, but what it may grow to counts
    shape = h5py.h5s.create_simple((channels, samples), (channels, max(samples, CHUNK)))
    return h5py.h5d.create(file.id, b"eeg", h5py.h5t.STD_I16LE, shape, layout)


def _write_chunks(dataset, eeg):
    """The last chunk is padded with zeros."""
    for start in range(0, eeg.shape[1], CHUNK):
        part = eeg[:, start:start + CHUNK]
        chunk = np.zeros((len(eeg), CHUNK), "<i2")
        chunk[:, :part.shape[1]] = part
        dataset.write_direct_chunk((0, start), chunk.tobytes())


def _first_chunk(path, eeg):
    """Where in the file the samples of the dataset `eeg` begin, bytes. DataError where they are not
    whole chunks in a row, as write_recording lays them."""
    size = 2 * eeg.shape[0] * CHUNK
    found = []
    plain = eeg.dtype == np.dtype("<i2") and eeg.compression is None
    if plain and eeg.chunks == (eeg.shape[0], CHUNK):
        eeg.id.chunk_iter(lambda chunk: found.append((chunk.chunk_offset[1], chunk.byte_offset)))
    found.sort()
    offset = found[0][1] if found else 0
    count = whole_chunks(eeg.shape[1])
    if not offset or found != [(k * CHUNK, offset + k * size) for k in range(count)]:
        raise DataError(f"{path}: its samples are not whole chunks of int16, one after the other: "
                        "import it again")
    return offset


ENTRY = set("patient split montage prepared notes channels fs labelled scale norm source_fs "
            "samples offset events size mtime digest began release".split())
OLDER = {1: "a window lay in 19 places of a format 1 file, and reading it from a disk or a network "
            "took up to 100 times as long"}


def load_recording(path):
    """What stands about a recording in its HDF5 file, checked, as plain values for the index."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):         # opening a pipe would wait for ever
            raise DataError(f"{path} is no file: move it away")
        with h5py.File(path, "r") as f:
            entry = _entry(path, f)
        with open(path, "rb") as raw:
            now = os.fstat(raw.fileno())
            entry["size"] = now.st_size
            entry["mtime"] = now.st_mtime_ns
            entry["digest"] = digest(raw.read(entry["offset"]))
    except DataError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise_passing(error, path)
        raise DataError(f"{path} is not a whole recording of data.py import ({error})") from None
    samples = len(entry["channels"]) * CHUNK * whole_chunks(entry["samples"])
    if entry["size"] < entry["offset"] + 2 * samples:
        raise DataError(f"{path}: its samples are not whole: import it again")
    values = np.array([*entry["scale"], entry["norm"], entry["source_fs"]])
    if not (np.isfinite(values) & (values > 0)).all() or entry["fs"] != FS:
        raise DataError(f"{path}: scale, norm or rate is not what it may be: import it again")
    for begin, end in entry["events"]:
        if not 0 <= begin <= end <= entry["samples"] / FS + 1:
            raise DataError(f"{path}: an event from {begin:g} s to {end:g} s does not lie inside "
                            "it: import it again")
    return entry


def errno_of(error):
    """That of an error of HDF5, which says it in a page of its own words; 0: of no system call."""
    found = re.search(r"errno = (\d+)", str(error))
    return getattr(error, "errno", None) or int(found[1] if found else 0)


def raise_passing(error, path):
    """Raise what may pass as an OSError: it says nothing of the file at `path`."""
    if (number := errno_of(error)) and number not in LASTING:
        raise OSError(number, os.strerror(number), str(path)) from None


def attributes(path):
    """All that an HDF5 file says of itself; {} where it is none. Raises what may pass."""
    try:
        with h5py.File(path, "r") as f:
            return dict(f.attrs)
    except (OSError, RuntimeError, LookupError) as error:
        raise_passing(error, path)
        return {}


def _entry(path, file):
    """The index's values of one open HDF5 file."""
    a, eeg = dict(file.attrs), file["eeg"]
    form = int(a["format"])
    if form != FORMAT:
        why = f" ({OLDER[form]})" if form in OLDER else ""
        raise DataError(f"{path} has format {form}, not {FORMAT}: import it again{why}")
    entry = {key: str(a[key]) for key in ("patient", "split", "montage", "prepared")}
    optional = ("began", "release", "unlabelled", "patient_code")
    entry |= {key: str(a.get(key, "")) for key in optional}
    entry["notes"] = str(a.get("notes", a.get("repaired", "")))
    entry |= {
        "channels": [str(name) for name in a["channels"]],
        "fs": int(a["fs"]),
        "labelled": bool(a["labelled"]),
        "scale": [float(value) for value in a["scale"]],
        "norm": float(a["norm"]),
        "source_fs": float(a["source_fs"]),
        "samples": eeg.shape[1],
        "offset": _first_chunk(path, eeg),
        "events": file["events"][()].astype(float).reshape(-1, 2).tolist(),
    }
    if not eeg.shape[0] == len(entry["channels"]) == len(entry["scale"]):
        raise DataError(f"{path}: {eeg.shape[0]} rows of samples for "
                        f"{len(entry['channels'])} channels")
    return entry


def digest(header):
    """Of the bytes before the samples: all that stands about a recording lies there."""
    return hashlib.sha256(header).hexdigest()


MAX_LOOKED_AT = 32                      # files of another time: read, not taken for a copy


def entries(root, made=False):
    """{name: ((size, mtime_ns) of the file now, what load_recording says)} of every recording below
    an imported folder, sorted by name.

    The latter comes from the index that the import wrote beside the files and that travels with
    them: opening 6,500 recordings is one read. A file that is not in it, or of another size, is
    read again. So are a few of another time, and all of them where an import may have `made` them
    anew; a copy changes the time of every file, and then each is compared with the index's digest
    when its samples are first read."""
    index, fresh = read_index(root / INDEX), {}
    files = dict(sorted(_walk(root)))
    states = {name: file_state(os.stat(file)) for name, file in files.items()}
    moved = {name for name in files if name in index and index[name]["mtime"] != states[name][1]}
    for name, file in files.items():
        known = index.get(name)
        if not known or known["size"] != states[name][0]:
            fresh[name] = load_recording(file)
        elif name in moved and (made or len(moved) <= MAX_LOOKED_AT):
            fresh[name] = _looked_at(file, known)
        else:
            fresh[name] = known
    if lost := [] if made else sorted(index.keys() - files.keys()):
        # once: the index forgets them
        print(f"{root}: {how_many(len(lost), 'recording')} missing that its index names, as "
              f"{lost[0]}: deleted, or not copied yet", file=sys.stderr)
    if fresh != index:
        _write_index(root, fresh)
    return {name: (states[name], entry) for name, entry in fresh.items()}


def _looked_at(file, known):
    """The index's entry where the file's header is the one that it describes, else that of the
    file."""
    with open(file, "rb") as raw:
        if digest(raw.read(known["offset"])) == known["digest"]:
            return known | {"mtime": os.fstat(raw.fileno()).st_mtime_ns}
    return load_recording(file)


def _write_index(root, recordings):
    try:
        write_json(root / INDEX, {"format": FORMAT, "recordings": recordings,
                                  "sha256": _seal(recordings)})
    except OSError:
        pass                            # a read-only folder: opening it just takes longer


def _walk(root):
    """(name, path) of every .h5 file, links followed. Raises OSError where a folder is closed: the
    patients in it would be missed in silence."""
    base = len(str(root)) + 1

    def stop(error):
        raise error
    for folder, files in walk(root, stop):
        for file in files:
            if file.endswith(".h5"):
                full = f"{folder}/{file}"
                yield full[base:-3].replace(os.sep, "/"), full


def _seal(recordings):
    return digest(json.dumps(recordings, sort_keys=True).encode())


def read_index(path):
    try:
        content = json.loads(path.read_text())
        recordings = content["recordings"] if content["format"] == FORMAT else {}
        whole = all(ENTRY <= entry.keys() for entry in recordings.values())
        if "sha256" in content:         # scales and events stand in it: a flipped bit is found
            whole = whole and content["sha256"] == _seal(recordings)
        return recordings if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
