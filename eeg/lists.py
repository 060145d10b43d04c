"""Lists of a patient's seizures that name the EDF of each: CHB-MIT's summaries, by seconds, and
Siena's, by the clock on the wall.
"""
import re

from eeg.annotations import Labels, Unlabelled, read_text
from eeg.edf import DataError, number
from eeg.terms import speaks


def clock(text, what):
    """hh.mm.ss or hh:mm:ss, hours beyond 23 allowed, in s."""
    found = re.fullmatch(r"(\d{1,2})[.:](\d{1,2})[.:](\d{1,2})", text.strip(), re.A)
    if not found or int(found[2]) > 59 or int(found[3]) > 59:
        raise DataError(f"{what} is {text.strip()!r}, not a time")
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])


def read_summary(path, header, texts=None):
    blocks = parse_summary(read_text(path)).get(header.path.name)
    return summary_labels(blocks, path.name) if blocks else None


def parse_summary(text):
    """CHB-MIT chbNN-summary.txt: {file name: [its blocks of lines]}."""
    files = {}
    for block in re.split(r"^[ \t]*File Name *:", text, flags=re.M | re.I)[1:]:
        files.setdefault(block.split("\n")[0].strip(), []).append(block)
    return files


SUMMARY = re.compile(
    r"Number of Seizures in File\s*:\s*(?P<count>\d+)|"
    r"Seizure\s*(?P<number>\d*)\s*(?P<edge>Start|End) Time\s*:\s*(?P<time>\S+) sec.*", re.I)


def summary_labels(blocks, name="summary"):
    """Labels from the block of one file: "Seizure Start Time" or "Seizure 1 Start Time". Another
    line on a seizure or a file is not understood."""
    block = blocks[0]
    file = block.split("\n")[0].strip()
    what = f"{name}, {file}"
    if len(blocks) > 1:
        raise DataError(f"{what}: named {len(blocks)} times")
    found = {"start": [], "end": [], "": []}
    for line in map(str.strip, block.split("\n")[1:]):
        if match := SUMMARY.fullmatch(line):
            found[(match["edge"] or "").lower()].append(match)
        elif speaks(line) or re.search(r"\.edf|\d *sec", line, re.I):
            raise DataError(f"{what}: {line!r} is not understood")
    starts, ends = found["start"], found["end"]
    counts = [int(match["count"]) for match in found[""]]
    if counts != [len(starts)] or len(starts) != len(ends):
        raise DataError(f"{what}: {', '.join(map(str, counts)) or 'no'} seizures announced, "
                        f"{len(starts)} begin, {len(ends)} end")
    labels = Labels()
    for start, end in zip(starts, ends):
        if start["number"] != end["number"]:
            raise DataError(f"{what}: {end[0]!r} does not end {start[0]!r}")
        onset, stop = (float(number(edge["time"], what)) for edge in (start, end))
        labels.events.append((onset, stop))

    # clock times of the file are off by 10 s and more: only a gross difference counts
    begin = re.search(r"^File Start Time:\s*(\S+)", block, re.M)
    end = re.search(r"^File End Time:\s*(\S+)", block, re.M)
    if begin and end:
        labels.seconds = float((clock(end[1], what) - clock(begin[1], what)) % 86400)
        labels.slack = max(60.0, labels.seconds / 2)
    return labels


SIENA = re.compile(r"\s*(File name|Registration start time|Registration end time|"
                   r"(?:Seizure )?start time|(?:Seizure )?end time)\s*:\s*(.*?)\s*$", re.I)
# Seizure n 2 (in sleep):
HEADING = re.compile(r"^\s*seizures? *(n|no|nr|number)?\W*\d+\W*(\(.*\)\W*)?$", re.I)


def parse_siena(text, name="Seizures-list"):
    """Siena Seizures-list-PNxx.txt: {file name: [{"registration start", "registration end",
    "start", "end": text}]}. One without "end" was not ended, one with "odd" is a line with a time
    or a file that is not understood."""
    files, entry = {}, {}
    for line in [*text.split("\n"), "File name: "]:
        found = SIENA.match(line)
        if found and re.search(r"\d.*time *:", found[2], re.I):
            raise DataError(f"{name}: {line.strip()!r} is two lines in one")
        if not found:
            timed = re.search(r"\d[.:]\d+[.:]\d|\.edf", line, re.I)
            if entry and (timed or speaks(HEADING.sub("", line)) and re.search(r"\d", line)):
                files[entry["file"]].append({"file": entry["file"], "odd": line.strip()})
            continue
        key = found[1].lower().removeprefix("seizure ").removesuffix(" time")
        if "start" in entry and key in ("file name", "start"):
            files[entry["file"]].append(entry)
        if key == "file name":
            entry = {"file": found[2]}
            files.setdefault(found[2], [])
            continue
        if not entry:
            raise DataError(f"{name}: {found[1]} stands before any file name")
        entry = entry | {key: found[2]}
        if key == "end":
            files[entry["file"]].append(entry)
            # the next seizure of this file has its own times
            entry = {k: v for k, v in entry.items() if k not in ("start", "end")}
    del files[""]
    return files


def siena_times(entry, what):
    """(registration start in s of the day, its length, seizure onset and end in s after it)."""
    times = []
    for key in ("registration start", "registration end", "start", "end"):
        if key not in entry:
            raise DataError(f"{what}: no {key} time")
        times.append(clock(_bare(entry[key]), f"{what}: {key} time"))
    begin = times[0]
    length, onset, end = ((time - begin) % 86400 for time in times[1:])
    if not onset < end <= length:
        raise DataError(f"{what}: a seizure from {onset} s to {end} s in a recording of {length} s")
    return begin, float(length), float(onset), float(end)


def _bare(text):
    """A time without text in brackets and without blanks: 1 6.49.25, 15.18.26 (CLINICAL ONSET)."""
    return re.sub(r"\(.*?\)|\s", "", text)


def read_siena(path, header, texts=None):
    """Seizures of a Siena recording, from the wall clock."""
    listed = {}                         # PN00-1.edf and PNO0-1.EDF are one
    for name, entries in parse_siena(read_text(path), path.name).items():
        listed.setdefault(_siena_name(name), []).extend(entries)
    labels = Labels(slack=60.0)
    key = _listed_as(header.path, path.name, listed, labels)
    if not key:
        return None
    if not listed[key]:
        raise Unlabelled(f"{path.name} names it without a seizure's times")
    for entry in listed[key]:
        if "odd" in entry:
            raise DataError(f"{path.name}, {entry['file']}: {entry['odd']!r} is not understood")
    registered = None
    for entry in _whole_entries(listed[key], labels):
        _correct_start(entry, path.name, header, labels)
        where = f"{path.name}, {entry['file']}"
        begin, length, onset, end = siena_times(entry, where)
        registered = registered or (begin, length)
        if max(abs(begin - registered[0]), abs(length - registered[1])) > labels.slack:
            raise DataError(f"{where}: its registration times are of two recordings")
        labels.seconds = length
        labels.events.append((onset, end))
    return labels


def _listed_as(edf, source, listed, labels):
    """The name of `listed` that stands for an EDF, None without one. Some are spelt wrongly (O for
    0, no number): a lone one left over is taken for the lone recording left over, and noted."""
    key = _siena_name(edf.name)
    edfs = [other for other in edf.parent.iterdir() if other.suffix.lower() == ".edf"]
    # of the same patient: a folder may hold several
    there = {name for other in edfs if (name := _siena_name(other.name))[:4] == key[:4]}
    if key not in listed:
        left = [name for name in listed if name not in there and name[:4] == key[:4]]
        if len(left) != 1 or len(there - set(listed)) != 1:
            return None
        key = left[0]
        labels.notes.append(f"taken for {key} of {source}")
    times = [_registered(entry) for entry in listed[key]]
    for entry in (entry for name in listed if name not in there | {key} for entry in listed[name]):
        if "start" in entry and _registered(entry) in times:
            raise DataError(f"{source}: a seizure of {entry['file']!r}, of which there is no EDF, "
                            f"has {key}'s registration times: one of them is misspelt")
    return key


def _registered(entry):
    """The registration times of an entry as they are written, its own where it has none."""
    return [_bare(entry.get(f"registration {edge}", repr(entry))) for edge in ("start", "end")]


def _whole_entries(entries, labels):
    """Copies of a file's entries; a block without registration times has those of the others."""
    times = {}
    for entry in entries:
        times = {key: entry[key] for key in entry if key.startswith("registration")} | times
    for entry in entries:
        lacking = times.keys() - entry.keys()
        if lacking:
            labels.notes.append("a seizure listed without registration times: those of the other")
        for key, text in entry.items():
            note = f"{text} read as {_bare(text)}"
            if key != "file" and text != _bare(text) and note not in labels.notes:
                labels.notes.append(note)
    return [times | entry for entry in entries]


def _correct_start(entry, name, header, labels):
    """The EDF's own start counts where it fits the list's end and the EDF's length better than the
    list's start; else the list is of another recording. Midnight is no start: anonymised."""
    start = clock(header.start, "start time of the EDF")
    listed = entry.get("registration start", "")
    begin = clock(_bare(listed), f"{name}: registration start time")
    if not start or start == begin % 86400:
        return
    last = clock(_bare(entry.get("registration end", "")), f"{name}: registration end time")
    by_edf, by_list = [abs((last - time) % 86400 - header.seconds) for time in (start, begin)]
    if by_edf > labels.slack or by_edf >= by_list:
        raise DataError(f"{name} says it begins at {listed}, its header {header.start}")
    entry["registration start"] = header.start
    labels.notes.append(f"{name} says it begins at {listed}: {header.start} by its header and "
                        "its length")


def _siena_name(name):
    return name.upper().replace("O", "0").removesuffix(".EDF").rstrip("-")
