"""Does the reader say what other readers say? Every EDF of a folder, by eeg/edf.py and by those of pyedflib, edfio and mne that
are installed.

    python bench/edf.py FOLDER [--all]      --all: one line for each file that another reader reads otherwise

Compared are the voltages of every signal that is read, EEG or not, in uV, over the whole file, to 1e-5 of the range of the
signal or half a step of its samples. "otherwise" is not by itself a fault: mne takes a blank unit for volts, mne and edfio read
a gap as if it were none, pyedflib and edfio leave the unit aside (units are compared by what the header says). A file that we
refuse is listed with its reason; no voltage of it is believed.
"""
import argparse
import collections
import contextlib
import importlib.util
import io
import logging
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eeg import edf                     # noqa: E402

TOLERANCE = 1e-5                        # of the range from physical minimum to maximum


def ours(path):
    """(header, {place of a signal: (label, uV float64 (T,), uV that may differ)}) of what edf.py reads. DataError: why it
    refuses."""
    header = edf.read_header(path)
    body = header.body()
    edf.check_gaps(header, body)
    found, reasons = {}, []
    for i in signals(header):
        label = header.signals["label"][i]
        try:
            gain, offset = edf.calibration(header, body, i, "")
        except edf.DataError as refusal:
            reasons.append(str(refusal))
            continue
        span = abs(gain) * (edf.whole(header.signals["dmax"][i], label) - edf.whole(header.signals["dmin"][i], label))
        volts = header.block(body, i).astype(float).reshape(-1) * gain + offset
        found[i] = label, volts, max(TOLERANCE * span, abs(gain) / 2)
    if not found:
        raise edf.DataError(reasons[0])
    return header, found


def factor(header, i):
    """uV per unit of the header, for readers that leave units aside."""
    unit = header.signals["unit"][i].lower()
    return {"mv": 1e3, "v": 1e6, "nv": 1e-3}.get(unit, 1.0)


def signals(header):
    """Places of the signals that are no annotations, in the order in which other readers number them."""
    return [i for i, label in enumerate(header.signals["label"]) if label.lower() != "edf annotations"]


def by_pyedflib(path, header, places):
    import pyedflib
    names = signals(header)
    with pyedflib.EdfReader(str(path)) as reader:
        return {i: reader.readSignal(names.index(i)) * factor(header, i) for i in places}


def by_edfio(path, header, places):
    import edfio
    names, theirs = signals(header), edfio.read_edf(path).signals
    return {i: theirs[names.index(i)].data * factor(header, i) for i in places}


def by_mne(path, header, places):
    import mne
    names = signals(header)
    if len({header.signals["count"][i] for i in names}) > 1:
        raise ValueError("several rates: mne resamples")
    volts = mne.io.read_raw_edf(path, verbose="error", infer_types=False).get_data() * 1e6
    return {i: volts[names.index(i)] for i in places}


READERS = {"pyedflib": by_pyedflib, "edfio": by_edfio, "mne": by_mne}


def compared(read, path, header, found):
    """"agrees", "otherwise: ..." or "refused: ..." of another reader."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            theirs = read(path, header, list(found))
    except Exception as error:          # another library's reader may raise anything: told, never hidden
        return f"refused: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    for i, volts in theirs.items():
        label, mine, tolerance = found[i]
        if len(volts) != len(mine):
            return f"otherwise: {label} has {len(volts)} samples, {len(mine)} here"
        worst = float(abs(volts - mine).max())
        if not worst <= tolerance:
            return f"otherwise: {label} differs by {worst:.3g} uV"
    return "agrees"


def prepared(path):
    """referential, bipolar, or why neither montage can be made."""
    reasons = []
    for montage in ("referential", "bipolar"):
        try:
            edf.prepare_edf(edf.read_header(path), edf.Recipe(montage))
            return montage
        except edf.DataError as refusal:
            reasons.append(str(refusal))
    return reasons[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="also name each file that another reader reads otherwise")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    installed = {name: read for name, read in READERS.items() if importlib.util.find_spec(name)}
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() == ".edf" and path.is_file())
    if not paths:
        sys.exit(f"{args.folder}: no EDF file in it")
    counts = {name: collections.Counter() for name in installed}
    refused, montages, others = {}, collections.Counter(), []
    for path in paths:
        try:
            header, found = ours(path)
        except edf.DataError as refusal:
            refused[path] = str(refusal)
            continue
        kind = prepared(path)
        montages[kind if kind in edf.MONTAGES else "neither"] += 1
        if kind not in edf.MONTAGES:
            refused[path] = f"read, no montage: {kind}"
        for name, read in installed.items():
            verdict = compared(read, path, header, found)
            counts[name][verdict.split(":")[0]] += 1
            if verdict.startswith("otherwise"):
                others.append(f"{path.relative_to(args.folder)}: {name} {verdict}")
    tell(paths, counts, montages, refused, others if args.all else [])


def tell(paths, counts, montages, refused, others):
    read = sum(montages.values())
    print(f"{len(paths)} EDF files, {read} read, {len(paths) - read} refused\n")
    print("| reader | agrees | otherwise | refuses what we read |\n|---|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count['agrees']} | {count['otherwise']} | {count['refused']} |")
    missing = [name for name in READERS if name not in counts]
    if missing:
        print(f"\nnot installed: {', '.join(missing)}")
    print(f"\nmontage: {montages['referential']} referential, {montages['bipolar']} bipolar alone, {montages['neither']} neither")
    reasons = collections.defaultdict(list)
    for path, why in refused.items():
        reasons[why].append(path.name)
    for why, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names)} x {why} ({names[0]})")
    for line in others:
        print(f"  {line}")


if __name__ == "__main__":
    main()
