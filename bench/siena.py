"""Recordings with seizures, put together from what public repositories hold of two data sets.

    python bench/siena.py PIECES OUT [--michigan FOLDER]
    python data.py import OUT /tmp/siena --montage reduced --channels "Fp1-F7,F7-T3,T3-T5,Fp2-F8,\\
        F8-T4,T4-T6,Fp1-F3,F3-C3,C3-P3,Fp2-F4,F4-C4,C4-P4,Fz-Cz,Cz-Pz"
    python bench/learn.py --on /tmp/siena

PIECES: preprocessed_data of github.com/liruixinxinxin/sienawork. Of the Siena Scalp EEG Database
(Detti, 2020, doi 10.13026/5d4a-j060) it has the first minute and the seizures of 40 recordings of
14 patients, in EDFs of 5 s of 17 electrodes (no O1, O2), with onset and end as Siena lists them.
PN10-1 was cut out of another file than its name says, and is left out.

One recording for each seizure: the background of all recordings of its patient, in pieces of 14.5 s
in random order, and in the middle at most the first minute of the seizure. So there are joins
inside the background too, and a join does not say that a seizure begins. What lies 1 s from the
edge of a part is left out: filters were applied after cutting.

FOLDER: dataset/eeg of github.com/biostatistics-kaust/kbiostats.brain_correlation_clustering_toolbox
(MIT): one recording of 500 s at 100 Hz (B. Malow, University of Michigan; Ombao et al., 2001), with
a seizure from 350 s, as is published, to 435 s, by eye.
"""
import argparse
import re
from pathlib import Path

import numpy as np
from pyedflib import EdfReader, highlevel

LENGTH = 5                              # s of a piece; the rest of its EDF is filling
EDGE = 1.0                              # s
BACKGROUND = 14.5                       # s of background in one go
LONGEST = 60.0                          # s of a seizure
WRONG = {"PN10-1"}
MICHIGAN = ("Fp1 Fp2 F3 F4 C3 C4 P3 P4 O1 O2 SP1 SP2 F7 F8 T3 T4 T5 T6 Fz Cz Pz".split(), 350, 435)
HEAD = "onset\tduration\teventType\n"


def joined(folder, run, kind):
    """(uV (C, samples), rate, labels) of the pieces of one part, edges left out; the channels by
    name, since each run has an order of its own."""
    pieces = sorted(Path(folder, kind).glob(f"{run}_trail*_{kind}.edf"),
                    key=lambda path: int(re.search(r"trail(\d+)", path.name)[1]))
    read = []
    for path in pieces:
        with EdfReader(str(path)) as file:
            rate = round(file.getSampleFrequency(0))
            place = {label.upper(): i for i, label in enumerate(file.getSignalLabels())}
            labels = sorted(place)
            read.append([file.readSignal(place[label])[:LENGTH * rate] for label in labels])
    edge = round(EDGE * rate)
    return np.concatenate(read, 1)[:, edge:-edge], rate, labels


def cut(part, rate):
    """Pieces of BACKGROUND seconds; what is left over goes."""
    size = round(BACKGROUND * rate)
    return [part[:, at:at + size] for at in range(0, part.shape[1] - size + 1, size)]


def recording(seizure, background, rate, rng):
    """(uV, onset, end) of the pieces of background in random order around the seizure."""
    pieces = [background[i] for i in rng.permutation(len(background))]
    half = len(pieces) // 2
    seizure = seizure[:, :round(LONGEST * rate)]
    onset = sum(piece.shape[1] for piece in pieces[:half]) / rate
    eeg = np.concatenate([*pieces[:half], seizure, *pieces[half:]], 1)
    return eeg, onset, onset + seizure.shape[1] / rate


def write(out, name, eeg, rate, labels, onset, end):
    size = np.ceil(np.abs(eeg).max()) + 1
    signals = highlevel.make_signal_headers(labels, dimension="uV", sample_frequency=rate,
                                            physical_min=-size, physical_max=size)
    seconds = eeg.shape[1] // rate      # of whole data records
    highlevel.write_edf(str(out / f"{name}.edf"), eeg[:, :seconds * rate], signals)
    row = f"{onset:.2f}\t{min(end, seconds) - onset:.2f}\tsz\n"
    (out / f"{name}_events.tsv").write_text(HEAD + row)


def siena(pieces, out):
    rng = np.random.default_rng(0)
    runs = sorted({path.name.split("_")[0] for path in Path(pieces, "pos").glob("*.edf")} - WRONG)
    parts = {run: joined(pieces, run, "neg") for run in runs}
    for run in runs:
        seizure, rate, labels = joined(pieces, run, "pos")
        patient = run.split("-")[0]
        own = [parts[other][0] for other in runs if other.startswith(f"{patient}-")]
        background = [piece for part in own for piece in cut(part, rate)]
        eeg, onset, end = recording(seizure, background, rate, rng)
        write(out, run.replace("-", "_"), eeg, rate, labels, onset, end)


def michigan(folder, out):
    labels, onset, end = MICHIGAN
    eeg = np.stack([np.loadtxt(Path(folder, f"ch{number:02d}.inp"))
                    for number in range(1, len(labels) + 1)])
    eeg -= np.median(eeg, 1, keepdims=True)         # each channel has an offset of its own
    write(out, "michigan_1", eeg, 100, labels, onset, end)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", metavar="PIECES")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--michigan", metavar="FOLDER")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    siena(args.pieces, args.out)
    if args.michigan:
        michigan(args.michigan, args.out)


if __name__ == "__main__":
    main()
