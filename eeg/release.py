"""What a corpus says of its own version and of the date of its annotations."""
import datetime
import json
import re
from pathlib import Path

# tuh_eeg_seizure/v2.0.3, siena-scalp-eeg-database-1.0.0
NAMED = re.compile(r"(?:^|[-_])v?(\d+\.\d+\.\d+)$")
DATE = re.compile(r"\b(20\d\d)[-/]?([01]\d)[-/]?([0-3]\d)\b")


def release(root, labels):
    """What a corpus says of its own version and its annotations' date, in one line or "": a README
    (TUSZ: AAREADME.txt), dataset_description.json, a folder named v2.0.3, the head of a .csv_bi."""
    root = Path(root).resolve()
    said = _of_files(root)
    for place in (root, *root.parents[:2]):
        named = NAMED.search(place.name)
        if named and not said:
            said = f"version {named[1]}"
    # TUSZ's label files say their own
    head = _head(labels[0]) if labels and labels[0] else ""
    found = re.search(r"^#\s*version\s*=\s*(\S+)", head, re.M)
    parts = [said, f"labels {found[1]}"] if found else [said]
    return " ".join(", ".join(filter(None, parts)).split())[:200]


def _of_files(root):
    """Of the files that describe a corpus; what cannot be read says nothing."""
    for path in sorted(root.glob("*")):
        if path.name.lower().startswith("readme"):
            return _of_readme(_head(path))
    for place in (root, *root.parents[:2]):
        for path in sorted(place.glob("AAREADME*")):
            return _of_readme(_head(path))
    try:
        described = json.loads(_head(root / "dataset_description.json"))
        parts = [str(described[key]) for key in ("Name", "DatasetVersion") if key in described]
        return " ".join(parts)
    except (ValueError, TypeError):
        return ""


def _head(path):
    try:
        with open(path, errors="replace") as f:
            return f.read(1_000_000)
    except OSError:
        return ""


def _of_readme(text):
    """Version and newest date; "" where it names no version, as the README of something else."""
    version = re.search(r"\bversion\s*[:=]?\s*v?(\d+(?:\.\d+)+)|\bv(\d+\.\d+\.\d+)", text, re.I)
    if not version:
        return ""
    said = f"version {version[1] or version[2]}"
    dates = []
    for found in DATE.finditer(text):
        try:
            dates.append(datetime.date(*(int(part) for part in found.groups())))
        except ValueError:
            continue                    # a number that only looks like one
    if dates:
        said += f", newest date in its README {max(dates)}"
    return said
