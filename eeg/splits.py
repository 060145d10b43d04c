"""Who trains and who validates: patient-disjoint unless asked otherwise, the same for the same
seed.

    train, dev = split(recordings, config["data"], seed)

By patient (the default): each corpus's own train and dev where it has them, else a draw. By
recording, by time or in folds where a corpus has too few patients. Unlabelled recordings and a
corpus's own eval split are in neither part."""
import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np

from eeg import console
from eeg.console import how_many
from eeg.disk import CHUNK
from eeg.edf import DataError

MAX_NAMED = 3                           # recordings without labels for one reason that are named
SAME_PERSON = {"chb21": "chb01"}        # CHB-MIT recorded one patient twice, 1.5 years apart
WARNINGS = {                            # of the splits that do not keep patients apart
    "recording": "data.split: recording: the same patients train and validate: scores say nothing "
                 "about new patients",
    "time": "data.split: time: the first part of each recording trains and its end validates: "
            "scores say nothing about new patients or recordings",
}
DIVIDED_ANEW = ("these recordings, their patients or labels are not those of the training: train "
                "and dev were drawn anew, and patients who trained may be among those of dev")
# a patient's name behind the folder of its corpus, where it is more than P01
OWN_NAME = re.compile(r"[^/]*[^\W\d_]{3}[^/]*$")


def person(patient):
    """The patient under one name; in a run on several corpora the folder stands before it."""
    folder, slash, own = patient.rpartition("/")
    return folder + slash + SAME_PERSON.get(own, own)


def patient_of(recording):
    return person(recording.patient)


def patients(recordings):
    return sorted({patient_of(r) for r in recordings})


def usable(recordings):
    """Those that may train or validate: with labels, and not of a corpus's own eval split."""
    return [r for r in recordings if r.labelled and r.split != "eval"]


def split(recordings, c, seed):
    """(train, dev) by the section `data` of a configuration; DataError where one of them would be
    empty."""
    kind, folds = c.get("split", "patient"), c.get("folds", 0)
    if c.get("fold", 1) > 1 and not folds:
        raise DataError(f"data.fold is {c['fold']} and data.folds is 0: no cross-validation")
    recordings = usable(recordings)
    if kind == "time":
        if folds:
            raise DataError("data.folds needs data.split: patient or recording")
        return _both(*split_time(recordings, c["dev_fraction"]), "recordings of 20 s and more")
    unit = patient_of if kind == "patient" else lambda r: r.name
    if folds:
        return _fold(recordings, unit, folds, c["fold"], seed)
    if kind == "recording":
        dev = _draw(recordings, unit, c["dev_fraction"], seed)
        return _divide(recordings, unit, dev, "recording")
    return split_patients(recordings, c["dev_patients"], c["dev_fraction"], seed)


def split_patients(recordings, dev_patients=(), dev_fraction=0.2, seed=0):
    """(train, dev), no person in both, unlabelled recordings and a corpus's own eval split in
    neither.

    Corpus by corpus: dev is `dev_patients` where some are its own, else the corpus's own train and
    dev, else a draw of `dev_fraction` of the patients, with seizures on both sides where two
    patients have any; 0 beside `dev_patients` of another corpus draws none. Who validates in one
    corpus does so in all. chb21 is chb01."""
    recordings = usable(recordings)
    people = patients(recordings)
    wanted = {person(p) for p in dev_patients}
    if wanted - set(people):
        unknown = ", ".join(sorted(wanted - set(people)))
        raise DataError(f"dev patients {unknown} are not among the labelled patients: "
                        f"{', '.join(people[:20])}")
    dev = set()
    kept = []
    for corpus in sorted({r.corpus for r in recordings}):
        mine = [r for r in recordings if r.corpus == corpus]
        named = wanted & {patient_of(r) for r in mine}
        if named:
            dev |= named
        elif {"train", "dev"} <= {r.split for r in mine}:
            mine = [r for r in mine if r.split]
            dev |= _own_dev(mine)
        elif dev_fraction or not wanted:
            dev |= _draw(mine, patient_of, dev_fraction, seed)
        kept += mine
    return _divide(kept, patient_of, dev, "patient")


def _own_dev(recordings):
    dev = {patient_of(r) for r in recordings if r.split == "dev"}
    both = dev & {patient_of(r) for r in recordings if r.split == "train"}
    if both:
        raise DataError(f"patients in both train and dev: {', '.join(sorted(both))}")
    return dev


def _divide(recordings, unit, dev, what):
    train = [r for r in recordings if unit(r) not in dev]
    chosen = [r for r in recordings if unit(r) in dev]
    count = len({unit(r) for r in recordings})
    return _both(train, chosen, how_many(count, f"labelled {what}"), what)


def _both(train, dev, what, unit="patient"):
    apart, way = "patient", "recording or time"
    if unit == "recording":
        apart, way = unit, "time"
    if not train and not dev:
        raise DataError(f"{what}: no recording has labels to train by; "
                        "data.py info FOLDER says why")
    if not train or not dev:
        raise DataError(f"{what}, {how_many(len(train), 'recording')} for training, {len(dev)} for "
                        f"validation: both are needed, of different {apart}s; for one {apart} "
                        f"set data.split to {way}")
    return train, dev


def _groups(recordings, unit):
    """(those with seizures, those without) of the patients or recordings, sorted."""
    everyone = sorted({unit(r) for r in recordings})
    having = {unit(r) for r in recordings if len(r.events)}
    return [u for u in everyone if u in having], [u for u in everyone if u not in having]


def _draw(recordings, unit, fraction, seed):
    """A share of those with seizures and of those without, at least one with where two have any."""
    with_seizures, without = _groups(recordings, unit)
    rng = np.random.default_rng([seed, 20])
    dev = set()
    for group in (with_seizures, without):
        count = round(fraction * len(group))
        if not dev:                     # one at least, and one stays: a lone one trains
            count = min(max(1, count), len(group) - 1)
        dev |= {group[i] for i in rng.permutation(len(group))[:count]}
    if not dev and len(with_seizures) + len(without) > 1:
        rest = without or with_seizures
        dev = {rest[rng.integers(len(rest))]}
    return dev


def _fold(recordings, unit, folds, fold, seed):
    """Cross-validation: everyone validates in one of the folds; those with seizures are dealt out
    evenly."""
    groups = _groups(recordings, unit)
    count = len(groups[0]) + len(groups[1])
    if count > 1 and not 2 <= folds <= count:
        raise DataError(f"data.folds is {folds}: 2 to {count}, as {count} have labels")
    if not 1 <= fold <= folds:
        raise DataError(f"data.fold is {fold}: 1 to {folds}, data.folds")
    rng = np.random.default_rng([seed, 21])
    order = [group[i] for group in groups for i in rng.permutation(len(group))]
    return _divide(recordings, unit, set(order[fold - 1::folds]), "part")


def split_time(recordings, fraction):
    """Each recording cut at a chunk: its last `fraction` validates. One too short to be cut
    trains."""
    train, dev = [], []
    for r in recordings:
        chunks = r.samples // CHUNK
        cut = min(max(1, round((1 - fraction) * chunks)), chunks - 1)
        if chunks < 2:
            train.append(r)
            continue
        train.append(cut_out(r, 0, cut * CHUNK))
        dev.append(cut_out(r, cut * CHUNK, r.samples))
    return train, dev


def cut_out(recording, begin, end):
    """The samples from `begin`, which begins a chunk, to `end` of a recording, as one of its
    own."""
    fs = recording.fs
    events = np.clip(recording.events, begin / fs, end / fs) - begin / fs
    events = events[events[:, 1] > events[:, 0]]
    name = f"{recording.name}_{begin // fs}-{end // fs}s"
    skipped = recording.skipped + begin // CHUNK
    return replace(recording, name=name, samples=end - begin, events=events, skipped=skipped)


def division(train, dev):
    """Hash of who trains, who validates, and on which EEG: the same names under other patients, of
    channels renamed otherwise, or drawn by another NumPy, give another one. Rounded, since another
    machine may filter to other last digits."""
    facts = [[[r.name, patient_of(r), *(f"{value:.4g}" for value in (r.norm, *r.scale))]
              for r in sorted(part, key=lambda r: r.name)] for part in (train, dev)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# ---- what is said of it ----

def instead(c):
    """What lets others validate, under the section `data` c of a configuration."""
    if c.get("folds"):
        return "set another data.fold or fewer data.folds"
    named = "name other patients with data.dev_patients, " if c["split"] == "patient" else ""
    return f"{named}raise data.dev_fraction"


def told(recordings, train, dev, c):
    """Lines on who was drawn for validation by the section `data` c of a configuration, what each
    of several corpora gives, and what is left out."""
    kind = c["split"]
    lines = [f"warning: {WARNINGS[kind]}"] if kind in WARNINGS else []
    lines.append("validation patients: " + _patients(dev))
    if not any(len(r.events) for r in dev):
        lines.append(f"warning: no patient of the validation has a seizure: {instead(c)}")
    used = {r.path for r in train + dev}
    for corpus in sorted({r.corpus for r in recordings}):
        mine = [r for r in recordings if r.corpus == corpus]
        out = [r for r in mine if r.path not in used]
        if corpus:
            parts = [[r for r in part if r.corpus == corpus] for part in (train, dev)]
            lines.append(f"{corpus}: train {amount(parts[0])}; validation {amount(parts[1])}")
        labelled = [r for r in out if r.labelled]
        if labelled:
            lines.append(f"{corpus or 'corpus'}: left out: {_reasons(labelled)}")
        lines += no_labels((r.name, r.unlabelled) for r in out if not r.labelled)
    return [*lines, *_same_person(train, dev), *_same_eeg(train, dev)]


def no_labels(recordings):
    """Lines on the recordings without labels, from (name, why); several for one reason share a
    line."""
    reasons = {}
    for name, why in recordings:
        reasons.setdefault(why or "no annotations", []).append(name)
    for why, names in reasons.items():
        if len(names) > MAX_NAMED:
            who = f"{len(names)} recordings, {names[0]} to {names[-1]}"
        else:
            who = ", ".join(names)
        yield f"NO LABELS, not used for training or scoring: {who} ({why})"


def twins(recordings):
    """A warning on EEG under two names, from (name, samples, norm, scales), as where an EDF was
    copied, or its folder renamed between two imports."""
    known, pairs = {}, []
    for name, samples, norm, scales in recordings:
        first = known.setdefault(_look(samples, norm, scales), name)
        if first != name:
            pairs.append(f"{name} is {first}")
    if pairs:
        yield (f"warning: {how_many(len(pairs), 'recording')} under another name: "
               f"{', '.join(pairs[:MAX_NAMED])}{', ...' * (len(pairs) > MAX_NAMED)}: take one of "
               "the two away")


def _look(samples, norm, scales):
    """What tells two recordings apart without reading them: how long, and how tall in each channel
    they are."""
    return samples, norm, *map(float, scales)


def same_eeg(some, others):
    """Pairs of one of the `others` and a recording of `some` that holds the same EEG."""
    known = {_look(r.samples, r.norm, r.scale): r for r in some}
    pairs = [(r, known.get(_look(r.samples, r.norm, r.scale))) for r in others]
    return [(r, twin) for r, twin in pairs if twin]


def _same_eeg(train, dev):
    """A warning on EEG of both sides, as where one corpus was imported into two folders."""
    pairs = [(r, twin) for r, twin in same_eeg(train, dev) if twin.path != r.path]
    return [f"warning: {how_many(len(pairs), 'recording')} of the validation train too, under "
            f"another name: {r.name} is {twin.name}: take one of them away"
            for r, twin in pairs[:1]]


def _same_person(train, dev):
    """Warnings on patients of both sides whom the EDF headers give one code, or two corpora one
    name, more than a P01."""
    for how, key in (("EDF headers", lambda r: r.patient_code),
                     ("names", lambda r: "".join(OWN_NAME.findall(patient_of(r))))):
        known = {key(r): patient_of(r) for r in train if key(r)}
        pairs = sorted({(known[key(r)], patient_of(r)) for r in dev
                        if known.get(key(r), patient_of(r)) != patient_of(r)})
        yield from (f"warning: {one}, who trains, and {other}, who validates, are one person by "
                    f"their {how}: data.same_person: [{other} = {one}]" for one, other in pairs)


def amount(recordings):
    """How much some recordings are, for a person who reads."""
    return f"{size(recordings)}, {seizures(recordings)}"


def size(recordings, of=" of "):
    people = how_many(len(patients(recordings)), "patient")
    return f"{how_many(len(recordings), 'recording')}{of}{people}, {hours(recordings)}"


def hours(recordings):
    return console.hours(sum(r.seconds for r in recordings))


def seizures(recordings):
    """Of those that have labels; of the others nothing is known."""
    labelled = [r for r in recordings if r.labelled]
    if recordings and not labelled:
        return "no labels"
    count = how_many(sum(len(r.events) for r in labelled), "seizure")
    if len(labelled) < len(recordings):
        count += f" in the {how_many(len(labelled), 'recording')} with labels"
    return count


def _patients(recordings, most=20):
    people = patients(recordings)
    counts = Counter()
    for r in recordings:
        counts[patient_of(r)] += len(r.events)
    shown = [f"{name} ({how_many(counts[name], 'seizure')})" for name in people[:most]]
    if len(people) > most:
        shown.append(f"and {len(people) - most} more")
    return ", ".join(shown)


def _reasons(recordings):
    """Counted: why recordings are in neither part."""
    counts = Counter("of its eval split" if r.split == "eval" else
                     "without a split in a corpus that has its own" for r in recordings)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


# ---- persons, by the EDF headers ----

# what stands where a patient would be named, and names nobody
NOBODY = re.compile(r"\W*([x0_\W]*|anonym|anonymous|anonymi[sz]ed|anon|deidentified|de-identified|"
                    r"removed|hidden|redacted|unknown|patient|subject|name|id|none|na|n/a|nn|test|"
                    r"default|male|female|m|f)\W*")
# a day of birth, which many share
DAY = re.compile(r"\d\d?[-./](\d\d?|[a-z]{3})[-./]\d{4}|\d{4}-\d\d-\d\d")


def person_code(header):
    """Hash of the code, or else of name and birthdate, in a header's field of the patient; "" where
    it names nobody. Short: it tells two patients apart and leads back to none."""
    words = [word.strip("_").lower() for word in re.split(r"[\0-\x20]+", header.patient) if word]
    if header.plus and len(words) >= 4:                 # EDF+: code, sex, birthdate, name
        code, _, born, name = words[:4]
        words = [born, name] if NOBODY.fullmatch(code) else [code]
    words = [word for word in words if not NOBODY.fullmatch(word)]
    if all(map(DAY.fullmatch, words)):
        return ""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


# what tells the parts of one recording apart, behind a digit: P01a, P01post, P01-2, P01 (2)
PART = re.compile(r"(.*\d)[a-z]+|(.*?[a-z].*?\d+)(([-. ]\w+)+| ?\(\d\d?\))", re.I)
# a word and a number, of a person where all have one word, of a recording where they have several;
# words of a group apart
NUMBERED = re.compile(
    r"(?!control|ctrl|healthy|normal|abnormal|case|epi|pat|sub|proband|focal|general|group|cohort)"
    r"([^\W\d]{3,}([-. ][^\W\d]+)*)[-. ]?[1-9]\d?", re.I)
# a day, or a recording: no person
OCCASION = re.compile(
    r"(19|20)\d\d[-.]?(0[1-9]|1[0-2])[-.]?(0[1-9]|[12]\d|3[01])[a-z]?|\d\d?[-.]\d\d?[-.]\d{2,4}|"
    r"(19|20)\d\d([-.](0[1-9]|1[0-2]))?|"
    r"(eeg|edf|rec(ording)?|file|export|session|ses|visit|day|night|tag|nacht|nuit|week|run|part|"
    r"block|segment|batch|disk|disc|fold|folder)[-. ]?\d+", re.I)


# a word before a person's number: P01, Pt 1, Patient-1
PERSON = r"(?:p|pts?|pat|patient(?:en)?|sub|subj|subject|proband|vp|id)"
CODED = re.compile(rf"(?:^|[/_ ])({PERSON}[-. ]?\d+)(?![^\W_])", re.I)


def _spelling(patient):
    """A name without what differs between hands and systems: capitals, forms of one letter, zeros
    before a number, marks and a word for a person before it, the order of names: p-1 is Pat01,
    Anna Meier Meier_Anna."""
    bare = unicodedata.normalize("NFKC", patient).casefold().strip()
    bare = bare.translate({0xe4: "ae", 0xf6: "oe", 0xfc: "ue"})
    bare = re.sub(r"(?<=[^\W\d])[\W_]*0*(?=\d)|(?<!\d)0+(?=\d)", "", bare)
    if re.search(r"\d", bare):
        return re.sub(rf"^{PERSON}(?=\d+$)", "", bare)
    return " ".join(sorted(re.findall(r"[^\W_]+", bare))) or bare


def _parts(recordings):
    """Lines on names that differ in a part alone, where no headers say who all of them are."""
    coded = {patient for patient, code in recordings if code}
    parts, names = {}, sorted({patient for patient, _ in recordings})
    words = {found[1] for name in names if (found := NUMBERED.fullmatch(name))}
    for patient in names:
        whole = PART.fullmatch(patient) or len(words) > 1 and NUMBERED.fullmatch(patient)
        parts.setdefault(whole[1] or whole[2] if whole else patient, []).append(patient)
    for first, *others in parts.values():
        if others and not coded.issuperset([first, *others]):
            more = ", ..." * (len(others) > 3)
            one = ", ".join(f"{other} = {first}" for other in others[:3])
            yield (f"warning: patients {', '.join([first, *others[:3]])}{more} count as "
                   f"{len(others) + 1}: if they are one person, give them one folder, or train "
                   f"with data.same_person: [{one}{more}]")


def _scattered(recordings):
    """Lines on a person's code, P01, in the names of several patients' files, one of whom is called
    otherwise, where no headers say who they are."""
    places = {}
    for patient, code, name in recordings:
        # BIDS says it itself
        if not code and not name.startswith("sub-") and (found := CODED.search(name)):
            places.setdefault(_spelling(found[1]), {})[person(patient)] = found[1]
    for found in places.values():
        if len(found) > 1 and not all(map(str.startswith, found, found.values())):
            yield (f"warning: files of {min(found.values())} count as {len(found)} patients: "
                   f"{', '.join(sorted(found))[:60]}: give each person one folder")


def _numbered(recordings, subjects):
    """Lines where no header says who they are: on patients that are numbers with one recording
    each, as EEG_1.edf and EEG_2.edf of one folder are, and on days and sessions. subjects: their
    names say that a number is a person's."""
    people = Counter(patient for patient, _ in recordings)
    coded = {patient for patient, code in recordings if code}
    days = sorted(patient for patient in people.keys() - coded if OCCASION.fullmatch(patient))
    if len(days) > 1:
        yield (f"warning: patients {', '.join(days[:3])}{', ...' * (len(days) > 3)} are called by "
               "a day or a recording: those of one person belong in one folder, or train with "
               "data.same_person")
    if (len(people) == len(recordings) > 1 and all(map(str.isdigit, people))
            and not subjects and not coded):
        yield (f"warning: each of {len(people)} recordings counts as a patient of its own, by its "
               "number: those of one person belong in one folder, or train with data.same_person")


def contradictions(recordings):
    """Lines on patients whom the EDF headers know better, from (patient, person_code, name of the
    recording): two under one code, or one under several; and, where these say nothing, on names
    that differ in spelling or in a part alone."""
    recordings = list(recordings)
    subjects = all(name.startswith("sub-") for *_, name in recordings)      # of BIDS
    yield from _scattered(recordings)
    recordings = [(person(patient), code) for patient, code, _ in recordings]
    spelled = {}
    for patient in sorted({patient for patient, _ in recordings}):
        spelled.setdefault(_spelling(patient), []).append(patient)
    for first, *others in spelled.values():
        for other in others:
            yield (f"warning: patients {first} and {other} differ in spelling alone: if they are "
                   f"one person, train with data.same_person: [{other} = {first}]")
    yield from _parts(recordings)
    yield from _numbered(recordings, subjects)
    of_code, of_patient = {}, {}
    for patient, code in sorted({pair for pair in recordings if pair[1]}):
        of_code.setdefault(code, []).append(patient)
        of_patient.setdefault(patient, []).append(code)
    for first, *others in of_code.values():
        if others:
            yield (f"warning: patients {', '.join([first, *others])} are one person by their EDF "
                   "headers: train with data.same_person: "
                   f"[{', '.join(f'{other} = {first}' for other in others)}], or give them one "
                   "folder")
    for patient, codes in of_patient.items():
        if len(codes) > 1:
            yield (f"warning: patient {patient} is {len(codes)} persons by the EDF headers: give "
                   "each a folder, or a name before the first underscore, of its own")
