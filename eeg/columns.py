"""What the columns of a table of seizures, the lines above it and the file that describes it say
of its times: in which unit, counted from where, of which recording. What contradicts the seconds
from the recording's start is refused.
"""
import functools
import json
import re
import unicodedata
from pathlib import Path

from eeg.edf import NUMBER, DataError, split_label
from eeg.terms import PROGRAM, marks, meaning_of, plain, speaks

# what a column of an exported list is called, without units
COLUMNS = {
    "onset": {"onset", "time", "start", "start time", "begin", "onset time", "t0", "beginn",
              "debut", "inicio", "inizio"},
    "end": {"end", "stop", "stop time", "end time", "offset", "t1", "ende", "fin", "fine", "fim"},
    "duration": {"duration", "length", "dauer", "duree", "duracion", "durata", "duracao"},
    "text": {"annotation", "annotations", "description", "text", "event", "label", "trial type",
             "comment", "note", "type", "eventtype", "event type", "beschreibung", "kommentar",
             "ereignis", "evenement", "commentaire", "evento", "descripcion", "descrizione"},
    "file": {what + end for what in (
        "file recording record run edf session patient subject study segment part block case exam "
        "mrn night visit datei fichier aufnahme aufzeichnung untersuchung patienten fall nacht "
        "enregistrement nuit registro registrazione paciente paziente sujeto eeg").split()
        for end in ("", "name", "id", "path", "nummer", " name", " id", " path", " no", " nr")
        if what + end != "eeg"}}        # F7, where a seizure begins
TIMES = ("onset", "end", "duration")
# the title of a column of files
FILE = re.compile(r"((edf|eeg) ?)?(file ?(name|path|id)?|path|datei(name)?|fichier|bname|edf)$")
# a person's or a recording's code: P01
CODE = re.compile(r"([^\W\d_]+)[-_. ]?0*(\d+)")
# titles of a column of units
UNITS = ("unit", "units", "time unit", "time units", "time base", "timebase", "time format",
         "einheit", "zeiteinheit", "zeitbasis", "unite", "unidad")
# what is no unit of seconds, and what is one: with the start that they count from, or left away
OTHER_UNIT = r"(ms|min|minutes?|milli\w+|samples?|frames?|(data ?)?points?|h|hours?)\b"
SECONDS = (r"(s|secs?|seconds?)\.?( (from|after|since|of) (?!.*(clip|segm|epoch|window)).*"
           r"(start|begin|onset)\w*)?|")
# a cell that says nothing, or no
NOTHING = re.compile(r"(no?|none|nein|non|false|n/?a|nan|null|nil|-*|0+([.,]0*)?)", re.I)
# of another beginning than the recording's, where it is not 0, or the larger part of a time
ORIGIN = re.compile(r"(clip|epoch|segment|file|window|chunk|page|edf|eeg) ?"
                    r"(start|begin|onset|offset|t0)( time| sec\w*)?|"
                    r"(?P<day>tag|day|jour|dia|giorno)( ?(no|nr|number))?|"
                    r"(?P<part>h|hours?|min|minut[eo][sn]?|stunden?|heures?|horas?|or[ae])|"
                    r"(?P<page>page|seite|epoch|window|chunk|clip|segment)( ?(no|nr|number|id))?")
# a row's place by samples
SAMPLES = re.compile(r"\b(samples?|latency|frames?|data ?points?)\b")
STARTS = re.compile(r"\b(onset|start|begin|offset)\b")
# a line above the titles that gives all times another unit or beginning
_ALL = (r"(all )?(time(s|base|units?)?|onsets?|units?|values?|zeit(en|basis|einheit)?|angaben|"
        r"einheit(en)?|temps|tiempos?|tempos?|tempi|unites?|unidades?)")
_CLIP = "(clip|segment|epoch|window)"
OTHERWISE = re.compile(
    rf"{_ALL}\b(\W+\w+){{0,2}}\W+({OTHER_UNIT}|min(uten|utos|uti)\b|proben\b)|"
    rf".*\b(relative to|from|since) (the )?{_CLIP}|{_CLIP}s? (offset|start)\W+\d|"
    r"(time )?offset\W+(0*\.)?0*[1-9]")
# a line with the length of the recording
LENGTH = re.compile(r"^\W*(?:(?:total|recording|file|eeg|study)\W*)*(?:duration|length|dauer|duree)"
                    r"\W*[:=]\W*(\d+:\d\d:\d\d|\d+(?:\.\d+)?) *([smh]?)[a-z]*\W*$", re.M | re.I)
NEAR = 60.0                             # s between a seizure's clinical onset and its onset in EEG
SHORT = 2.0                             # s; a list of shorter ones alone is odd
LONG = 1800.0                           # s; without a unit one so long may be in samples or ms
# titles of a column that counts its rows
COUNTS = re.compile(r"(|\W|n|no\.?|nr\.?|id|index|idx|number|"
                    r"(seizure|sz|event|anfall|crise)( ?(no|nr|id|number|index|#))?\.?)")
# two values that tell a start from an end
EDGE_CODES = {"12", "01", "10", "se", "be", "ae", "df", "if", "ud", "+-", "1-1"}
# a description that speaks of seizures, and of none
DENIED = re.compile(r"\b(no|not|non|none|without|free|inter ?ictal)\b")

# ---- times of day ----

CLOCK = re.compile(r"""
    (?<!\d)(?<!\d:)(?P<hour>\d?\d)
    (: | h\ ? | \ uhr\ )(?P<minute>[0-5]\d)
    ((: | m(in)?\ ?)(?P<second>[0-5]\d)(\.\d*)?)?
    (?![\d:])
    (\ ?(?P<half>[ap])\.?m\b)?""", re.I | re.X)
POINTED = re.compile(r"(?<![\w.])(?P<hour>[01]?\d|2[0-3])\.(?P<minute>[0-5]\d)\."
                     r"(?P<second>[0-5]\d)(?!\.?\d)(?P<half>)")
DATED = re.compile(r"\bda[tu]|fecha|tarih|日期|дата")    # with points it may be a day: 05.03.24
# a line with the time of day of the recording's start
BEGINS = re.compile(
    r"^(?!.*\b(end|ende|fin|stop|dur\w*|length|dauer|software|version)\b)"
    r".*(orig|start|beg[aiu]n|record(ing|ed)|meas|aufnahme|debut|ini[cz]io|acqui|^t ?0\b|"
    r"first sample|basla|kayit|开始|開始|начал|запис|rozpocz|zacat|date\W?time)")
# the title of a column with the time of day of each row
OF_DAY = re.compile(
    r"^(?!.*(\bend|\bstop|creat|modif|chang|export|edit|updat|review|dur|clin|video))"
    r".*(onset|time|clock|date|stamp|start|begin|uhr|zeit|heure|hora|\bora\b|saat|czas|время|час|"
    r"时[间刻]|時[間刻])")


def find_clock(text):
    """Match of the first time of day in a text; with points instead of colons where it is no day,
    or stands behind one."""
    text = unicodedata.normalize("NFKC", text)
    if found := CLOCK.search(text):
        return found
    found = POINTED.search(text)
    day = found and DATED.search(plain(text))
    return None if day and not re.search(r"\d[./-]\d", text[:found.start()]) else found


def seconds_of_day(text):
    """s of the day of the first time in a text, 0 where it has none."""
    found = find_clock(text)
    if not found:
        return 0
    hour, minute, second = (int(found[part] or 0) for part in ("hour", "minute", "second"))
    # 12:05 PM is 5 past 12, 12:05 AM 5 past 0
    if found["half"]:
        hour = hour % 12 + 12 * (found["half"] in "pP")
    return 3600 * hour + 60 * minute + second


def another_clock(stamp, began, after=0.0):
    """Whether a time stamp is neither the recording's start, YYYY-MM-DD hh:mm:ss, nor `after` s
    later. A date may be shifted; midnight is no start: anonymised."""
    stamped, begin = map(seconds_of_day, (stamp, began))
    # hh:mm is a minute
    exact = 1 if stamped and find_clock(stamp)["second"] else 60
    late = [(stamped - begin - later) % 86400 for later in (0, after)]
    return bool(stamped and begin) and all(1 < seconds < 86400 - exact for seconds in late)


def refuse_lines(lines, began, name):
    """Refuse a list whose lines above its titles name another recording than `name`, or a program
    that found its seizures, or say that its times are no seconds from the recording's start: MNE
    writes orig_time, others Start, of one that was cut since, perhaps."""
    for line in lines:
        said = line.strip("# ")
        files = re.findall(r"([^\s\\/]+)\.edf\b", said.lower())
        if files and not any(file.removesuffix("_eeg") in name.lower() for file in files):
            raise DataError(f"{said[:60]!r}: it is of another recording")
        title, _, cell = said.partition(":")
        if not files:
            _refuse_files({title_of(title): {cell.strip(' "'): None}}, name)
        if PROGRAM.search(plain(said)) and marks(said):
            raise DataError(f"{said[:60]!r}: found by a program")
        found = find_clock(said)
        starts = found and BEGINS.search(plain(found.string[:found.start()]))
        if OTHERWISE.match(plain(said.strip("("))) or starts and another_clock(said, began):
            raise DataError(f"{said[:60]!r}: the recording's seconds count from its start, {began}")


def refuse_times(titles, row, onset, began):
    """Refuse a row whose time of day is not `onset` s after the recording's start, nor so long."""
    for title, cell in zip(titles, row):
        if OF_DAY.search(title) and another_clock(f"{title} {cell}", began, onset):
            # 13:32 may be minutes and seconds
            if all(abs(seconds_of_day(text) - onset) > 1 for text in (cell, f"0:{cell}")):
                raise DataError(f"{cell} is not {onset:g} s after the recording's start, {began}")


# ---- columns ----

@functools.lru_cache(1000)             # of every row
def title_of(cell):
    """A title without units, as it is compared."""
    return plain(re.sub(r"[(\[,].*", "", cell)).rstrip(".: ")


def kind_of(cell):
    """The kind of a column by its title; "" where it is not read."""
    title = title_of(cell)
    for kind, titles in COLUMNS.items():
        if title in titles:
            return kind
    return {"start": "onset", "end": "end"}.get(meaning_of(title)[0], "")


def refuse_others(rows, titles, name):
    """Refuse a table that has rows of another recording than the one it lies beside, or a column
    that gives its times in another unit than seconds or from another start."""
    titles = [title_of(title) for title in titles]
    below = {}                          # title -> {what stands below it: None}, each once
    for row in rows:
        for title, cell in zip(titles, row):
            below.setdefault(title, {})[cell] = None
    for unit in (cell for title in UNITS for cell in below.get(title, ())):
        if re.match(OTHER_UNIT, unit, re.I):
            raise DataError(f"its times are in {unit}, not in seconds")
    _refuse_files(below, name)
    kinds = list(map(kind_of, titles))
    if "onset" in kinds:
        place = kinds.index("onset")
        timed = [row for row in rows if place < len(row)]
        _refuse_thousands([row[place] for row in timed])
        _refuse_days([row[place] for row in timed])
        for row in timed:
            _refuse_origin(dict(zip(titles, row)), row[place])


def _refuse_files(below, name):
    """Refuse a table, title -> cells, that names several recordings, or another than `name`."""
    files = {cell for title, cells in below.items() for cell in cells
             if cell.lower().endswith(".edf") or FILE.match(title)
             and re.search("[a-z]", cell, re.I) and not NOTHING.fullmatch(cell)}
    titles = below.keys() & COLUMNS["file"]
    others = sorted(cell for cell in files if not name.lower().startswith(
        re.sub(r"(_eeg)?(\.\w{1,4})?$", "", re.split(r"[\\/]", cell.lower())[-1], count=1)))
    others += [cell for title in titles for cell in below[title] if _of_another(cell, name)]
    # of a recording, a person, a channel or an event
    titles |= {title for title in below.keys() & {"name", "eeg"} if not any(
        split_label(cell) or speaks(cell) or NUMBER.match(cell) for cell in below[title])}
    named = max((below[title] for title in titles), key=len, default=())
    if len(named) > 1 or others:
        raise DataError(f"it has rows of {', '.join(others or sorted(named))[:60]}: one list for "
                        "each recording")


def _of_another(cell, name):
    """Whether a cell is a code, P02, of a word that stands with another number in `name`."""
    code = CODE.fullmatch(cell.lower())
    numbers = {number for word, number in CODE.findall(name.lower()) if code and word == code[1]}
    return bool(numbers) and code[2] not in numbers


def _refuse_origin(row, onset):
    """Refuse a row whose other columns say that its onset is no time from the recording's start."""
    if not NUMBER.match(onset):
        return
    for title, cell in row.items():
        other = float(cell) if NUMBER.match(cell) else 0.0
        if not other:
            continue
        beside = f"{title} is {cell} beside an onset of {onset}"
        same = other == float(onset)
        # in minutes, hours, ms it is the same one, or another
        scaled = any(abs(other * scale - float(onset)) <= 1 for scale in (60, 3600, 0.001))
        origin = ORIGIN.fullmatch(title)
        # day 1 is that of the start, and so may be page 12 of 15 s
        first = origin and (max(1.0, float(onset)) if origin["page"] else bool(origin["day"]))
        if origin and other > first and not same and not (origin["part"] and scaled):
            raise DataError(f"{beside}: from which start?")
        if kind_of(re.sub(r"\W?\d+$", "", title)) == "onset" != kind_of(title):
            raise DataError(f"{beside}: a row for each seizure")
        sampled = SAMPLES.search(title)
        near = scaled or abs(other - float(onset)) <= NEAR
        if STARTS.search(title) and not sampled and not near:
            raise DataError(f"{beside}: which of them?")
        if sampled and (same or title == "latency"):
            raise DataError(f"{beside}: seconds or samples?")


def with_points(rows, places):
    """Rows with a point for a decimal comma in the columns `places`. Where all could part
    thousands, or a point beside them, they stay, as no numbers."""
    cells = {row[place] for row in rows for place in places if place < len(row)}
    commas = {cell for cell in cells if re.fullmatch(r"[+-]?\d+,\d+", cell)}
    thousands = {cell for cell in cells if re.fullmatch(r"[+-]?\d{1,3}[.,]\d{3}", cell)}
    if commas <= thousands or thousands - commas:
        return rows
    return [[cell.replace(",", ".") if place in places and cell in commas else cell
             for place, cell in enumerate(row)] for row in rows]


def _refuse_thousands(cells):
    """Refuse onsets such as 812 and 2.400 that rise only where the point parts thousands."""
    if all(re.fullmatch(r"\d{1,3}(\.\d{3})?", cell) for cell in cells):
        read, whole = [[float(cell.replace(".", by)) for cell in cells] for by in (".", "")]
        if read != whole and read != sorted(read) and whole == sorted(whole):
            pointed = next(cell for cell in cells if "." in cell)
            raise DataError(f"onset is {pointed}, before which there is {cells[0]}: is its point "
                            "one of thousands?")


def _refuse_days(cells):
    """Refuse onsets that are all below 1, one of them finer than a sample: spreadsheets keep a time
    as a part of the day."""
    fine = [cell for cell in cells if re.fullmatch(r"0?\.\d{4,}[1-9]", cell)]
    if fine and all(re.fullmatch(r"0?\.\d+|0", cell) for cell in cells):
        raise DataError(f"onset is {fine[0]}: seconds, or a part of a day?")


def said_length(text):
    """(s of the recording by a line of a list, None without one; how exact that is in s)."""
    found = LENGTH.search(text)
    unit = {"m": 60.0, "h": 3600.0}.get(found[2].lower(), 1.0) if found else 1.0
    return found and (seconds_of_day(found[1]) or float(found[1]) * unit), max(2.0, unit)


def refuse_scale(events, titles, seconds):
    """Refuse seizures of a list whose titles name no unit, where they last or overlap as minutes,
    samples or ms would in a recording of `seconds`."""
    said = any(title_of(title) in UNITS or kind_of(title) == "onset"
               and re.search(r"[(\[,]\s*\w", title) for title in titles)
    events = sorted({*events})
    lasts = max((end - begin for begin, end in events), default=SHORT)
    # their onsets, as minutes
    fit = all(60 * begin + end - begin <= seconds for begin, end in events)
    # two raters of one differ by less; by more where a column of ends is called duration
    inside = any(begin < other < end and (fit or 2 * other > begin + end)
                 for (begin, end), (other, _) in zip(events, events[1:]))
    if not said and (lasts > LONG or inside or fit and lasts < SHORT):
        raise DataError(f"its seizures last {lasts:.3g} s{' and overlap' * inside}: where these "
                        "are seconds, call the column Onset (s)")


def refuse_edges(titles, rows):
    """Refuse (onset, duration, cells) of a table's rows on a seizure where all last as long and a
    column may tell its start from its end: by two values in turn, or of rows that are moments."""
    onsets = {onset for onset, *_ in rows}
    durations = {float(duration or 0) for _, duration, _ in rows}
    # two raters of one seizure have one onset
    if len(rows) < 2 or len(durations) != 1 or len(onsets) < len(rows):
        return
    lasts = durations.pop()
    rows = [cells for *_, cells in sorted(rows)]
    for place, title in enumerate(titles):
        said = [re.sub(r"\.0+$", "", row[place]).lower() for row in rows if place < len(row)]
        if len(set(said)) != 2:
            continue
        first, other = dict.fromkeys(said)
        in_turn = said == [first, other] * (len(said) // 2)
        timed = any(find_clock(cell) or len(cell) > 3 and NUMBER.match(cell) for cell in said)
        moments = 0 < lasts <= SHORT and not timed and not kind_of(title)
        coded = in_turn and first + other in EDGE_CODES
        counts = COUNTS.fullmatch(title_of(title))
        if in_turn and len(rows) > 2 or (moments or coded) and not counts:
            raise DataError(f"{title} is {first!r} or {other!r} in rows of {lasts:g} s: where "
                            "these are a seizure's start and end, write start and end")


def codes(found, meanings):
    """Those of (onset, duration, text) whose text is a number that means nothing known."""
    return [mark for mark in found
            if NUMBER.match(mark[2]) and not meanings.meaning(mark[2])[0]]


def refuse_codes(found, meanings):
    """Refuse (onset, duration, text) beside others that are known where a number is all that is
    said at its onset."""
    known = {onset for onset, _, text in found if meanings.meaning(text)[0]}
    for onset, _, text in codes(found, meanings):
        if onset not in known:
            raise DataError(f"{text!r} at {onset:g} s is a code: say what it means with "
                            "--seizure-label or --background-label of data.py import")


# ---- the .json of BIDS that describes a table ----

def described(path):
    """{column: (the .json that describes it, what it says)} of a BIDS table, by those beside it and
    above its subject; of several on one column the nearest."""
    found = {}
    for folder in path.parents:
        for place in sorted(folder.glob("*events.json"), key=lambda place: -len(place.name)):
            if {*place.stem.split("_")} <= {*path.stem.split("_")}:
                try:
                    said = json.loads(place.read_text(encoding="utf-8-sig"))
                except (OSError, ValueError):
                    said = {}           # of what is not read the table says enough
                for title in said if isinstance(said, dict) else ():
                    found.setdefault(title, (place, said[title]))
        if not re.match("(sub|ses)-|eeg$", folder.name):
            break
    return found


def refuse_described(path, text, meanings):
    """Refuse a BIDS table whose .json calls a code of its cells a seizure, or has its times in
    another unit than seconds."""
    said = described(Path(path))
    lines = filter(str.strip, text.split("\n"))
    titles, *rows = [[cell.strip() for cell in line.split("\t")] for line in lines]
    for at, title in enumerate(titles):
        place, column = said.get(title, (None, None))
        if not isinstance(column, dict):
            continue
        unit = str(column.get("Units", ""))
        if kind_of(title) in TIMES and re.match(OTHER_UNIT, unit, re.I):
            raise DataError(f"{place.name}: {title} is in {unit}, not in seconds")
        used = {row[at] for row in rows if at < len(row)}
        levels = [column.get(key) for key in ("Levels", "HED")]
        for code, meaning in (pair for level in levels if isinstance(level, dict)
                              for pair in level.items()):
            meaning = str(meaning)
            known = marks(code) or meanings.meaning(code)[0] or meanings.meaning(meaning)[0]
            speaks = marks(meaning) and not DENIED.search(plain(meaning))
            if code in used and speaks and known in ("", "seizure"):
                raise DataError(f"{place.name} says that {title} {code} is {meaning[:40]!r}: "
                                "write so into the table")
