"""What the columns of a table of seizures, the lines above it and the file that describes it say
of its times: in which unit, counted from where, of which recording. What contradicts the seconds
from the recording's start is refused.
"""
import functools
import json
import re
import unicodedata
from pathlib import Path

from eeg.edf import NUMBER, DataError
from eeg.terms import marks, meaning_of, plain

# what a column of an exported list is called, without units
COLUMNS = {
    "onset": {"onset", "time", "start", "start time", "begin", "onset time", "t0", "beginn",
              "debut", "inicio", "inizio"},
    "end": {"end", "stop", "stop time", "end time", "offset", "t1", "ende", "fin", "fine", "fim"},
    "duration": {"duration", "length", "dauer", "duree", "duracion", "durata", "duracao"},
    "text": {"annotation", "annotations", "description", "text", "event", "label", "trial type",
             "comment", "note", "type", "eventtype", "event type", "beschreibung", "kommentar",
             "ereignis", "evenement", "commentaire", "evento", "descripcion", "descrizione"},
    "file": {what + end for end in ("", "name", "id", "path", " name", " id", " path", " no", " nr")
             for what in "file recording record run edf session patient subject study segment part "
                         "block datei fichier aufnahme".split()}}
FILE = re.compile(r"((edf|eeg) ?)?(file ?(name|path|id)?|path|datei(name)?|fichier|bname|edf)$")
OTHER_UNIT = r"(ms|min|minutes?|milli\w+|samples?|frames?|(data ?)?points?|h|hours?)\b"
SECONDS = (r"(s|secs?|seconds?)\.?( (from|after|since|of) (?!.*(clip|segm|epoch|window)).*"
           r"(start|begin|onset)\w*)?|")
# a cell that says nothing, or no
NOTHING = re.compile(r"(no?|none|nein|non|false|n/?a|nan|null|nil|-*|0+([.,]0*)?)", re.I)
# of another beginning than the recording's, where it is not 0
ORIGIN = re.compile(r"(clip|epoch|segment|file|window|chunk|page|edf|eeg) ?"
                    r"(start|begin|onset|offset|t0)( time| sec\w*)?|"
                    r"(?P<day>tag|day|jour|dia|giorno)( ?(no|nr|number))?")
# a row's place by samples
SAMPLES = re.compile(r"\b(samples?|latency|frames?|data ?points?)\b")
STARTS = re.compile(r"\b(onset|start|begin|offset)\b")
# a line above the titles that says so of all times
OTHERWISE = re.compile(
    r"(all )?(times?|onsets?|units?|values?|zeit(en)?|angaben|einheit(en)?|temps|tiempos?|tempos?|"
    rf"tempi|unites?|unidades?)\b(\W+\w+){{0,2}}\W+({OTHER_UNIT}|min(uten|utos|uti)\b|proben\b)|"
    r".*\b(relative to|from|since) (the )?(clip|segment|epoch|window)|"
    r"(clip|segment|epoch|window)s? (offset|start)\W+\d")
NEAR = 60.0                             # s between a seizure's clinical onset and its onset in EEG
SHORT = 2.0                             # s; a list of shorter ones alone is odd
# titles of a column that counts its rows
COUNTS = re.compile(r"(|\W|#|no\.?|nr\.?|n|id|index|idx|number|#|(seizure|sz|event|anfall|crise)"
                    r"( ?(no|nr|id|number|index|#))?\.?)")
EDGE_CODES = {"12", "01", "10", "se", "be", "ae", "df", "if", "ud", "+-", "1-1"}

# a description that speaks of seizures, and of none
DENIED = re.compile(r"\b(no|not|non|none|without|free|inter ?ictal)\b")

# ---- times of day ----

CLOCK = re.compile(r"(?<!\d)(?<!\d:)(\d?\d)(?::|h ?| uhr )([0-5]\d)(?:(?::|m(?:in)? ?)([0-5]\d)"
                   r"(?:\.\d*)?)?(?![\d:])(?: ?([ap])\.?m\b)?", re.I)
POINTED = re.compile(r"(?<![\w.])([01]?\d|2[0-3])\.([0-5]\d)\.([0-5]\d)(?!\.?\d)()")
DATED = re.compile(r"\bda[tu]|fecha|tarih|日期|дата")    # with points it may be a day: 05.03.24
# lines and columns with a time of day: of the recording's start, of a row
BEGINS = re.compile(r"^(?!.*\b(end|ende|fin|stop|dur\w*|length|dauer|software|version)\b).*("
                    r"orig|start|beg[aiu]n|record(ing|ed)|meas|aufnahme|debut|ini[cz]io|acqui|"
                    r"^t ?0\b|first sample|basla|kayit|开始|開始|начал|запис|rozpocz|zacat|"
                    r"date\W?time)")
OF_DAY = re.compile(r"^(?!.*(\bend|\bstop|creat|modif|chang|export|edit|updat|review|dur|clin))"
                    r"(?!.*video).*(onset|time|clock|date|stamp|start|begin|uhr|zeit|heure|hora|"
                    r"\bora\b|saat|czas|время|час|时[间刻]|時[間刻])")


def find_clock(text):
    """Match of the first time of day in a text; with points instead of colons where it is no day,
    or stands behind one."""
    text = unicodedata.normalize("NFKC", text)
    found = CLOCK.search(text) or POINTED.search(text)
    if found and found.re is POINTED and DATED.search(plain(text)):
        return found if re.search(r"\d[./-]\d", text[:found.start()]) else None
    return found


def seconds_of_day(text):
    """s of the day of the first time in a text, 0 where it has none."""
    found = find_clock(text)
    if not found:
        return 0
    seconds = sum(int(part or 0) * 60 ** k for k, part in enumerate(found.groups()[2::-1]))
    # 12:05 PM is 5 past 12, 12:05 AM 5 past 0
    return seconds % 43200 + 43200 * (found[4] in "pP") if found[4] else seconds


def another_clock(stamp, began, after=0.0):
    """Whether a time stamp is neither the recording's start, YYYY-MM-DD hh:mm:ss, nor `after` s
    later. A date may be shifted; midnight is no start: anonymised."""
    stamped, begin = map(seconds_of_day, (stamp, began))
    # hh:mm is a minute
    exact = 1 if stamped and find_clock(stamp)[3] else 60
    late = [(stamped - begin - later) % 86400 for later in (0, after)]
    return bool(stamped and begin) and all(1 < seconds < 86400 - exact for seconds in late)


def refuse_lines(lines, began):
    """Refuse a list whose lines above its titles say that its times are no seconds from the
    recording's start: MNE writes orig_time, others Start, of one that was cut since, perhaps."""
    for line in lines:
        said = line.strip("# ")
        found = find_clock(said)
        if (OTHERWISE.match(plain(said.strip("(")))
                or found and BEGINS.search(plain(found.string[:found.start()]))
                and another_clock(said, began)):
            raise DataError(f"{said[:60]!r}: the recording's seconds count from its start, {began}")


def refuse_times(titles, row, onset, began):
    """Refuse a row whose time of day is not `onset` s after the recording's start, nor so long."""
    for title, cell in zip(titles, row):
        # 13:32 may be minutes and seconds
        if (OF_DAY.search(title) and another_clock(f"{title} {cell}", began, onset)
                and min(abs(seconds_of_day(text) - onset) for text in (cell, f"0:{cell}")) > 1):
            raise DataError(f"{cell} is not {onset:g} s after the recording's start, {began}")


# ---- columns ----

@functools.lru_cache(1000)             # of every row
def title_of(cell):
    """A title without units, as it is compared."""
    return plain(re.sub(r"[(\[,].*", "", cell))


def kind_of(cell):
    """The kind of a column by its title; "" where it is not read."""
    title = title_of(cell)
    edge = meaning_of(title)[0]
    kinds = [kind for kind, titles in COLUMNS.items() if title in titles]
    return (kinds + [{"start": "onset", "end": "end"}.get(edge, "")])[0]


def refuse_others(rows, titles, name):
    """Refuse a table that has rows of another recording than the one it lies beside, or a column
    that gives its times in another unit than seconds or from another start."""
    titles = [title_of(title) for title in titles]
    cells = [(title, cell) for row in rows for title, cell in zip(titles, row)]
    odd = [cell for title, cell in cells if title in ("unit", "units", "time unit")
           and re.match(OTHER_UNIT, cell, re.I)]
    if odd:
        raise DataError(f"its times are in {odd[0]}, not in seconds")
    kinds = COLUMNS["file"]
    named = max(({cell for title, cell in cells if title == kind} for kind in kinds), key=len)
    edfs = {cell for title, cell in cells if cell.lower().endswith(".edf")
            or FILE.match(title) and re.search("[a-z]", cell, re.I) and not NOTHING.fullmatch(cell)}
    others = [cell for cell in sorted(edfs) if not name.lower().startswith(
        re.sub(r"(_eeg)?(\.\w{1,4})?$", "", re.split(r"[\\/]", cell.lower())[-1], count=1))]
    if len(named) > 1 or others:
        raise DataError(f"it has rows of {', '.join(others or sorted(named))[:60]}: one list for "
                        "each recording")
    place = next((i for i, title in enumerate(titles) if kind_of(title) == "onset"), None)
    if place is not None:
        _refuse_thousands([row[place] for row in rows if place < len(row)])
        for row in rows:
            _refuse_origin(dict(zip(titles, row)), *row[place:place + 1])


def _refuse_origin(row, onset="n/a"):
    """Refuse a row whose other columns say that its onset is no time from the recording's start."""
    if not NUMBER.match(onset):
        return
    for title, cell in row.items():
        other = float(cell) if NUMBER.match(cell) else 0.0
        origin = ORIGIN.fullmatch(title)
        # day 1 is that of the start
        if origin and other > bool(origin["day"]) and other != float(onset):
            raise DataError(f"{title} is {cell} beside an onset of {onset}: from which start?")
        # in minutes, hours, ms it is the same one, or another
        if STARTS.search(title) and other and not SAMPLES.search(title) and all(
                abs(other * scale - float(onset)) > near
                for scale, near in ((1, NEAR), (60, 1), (3600, 1), (0.001, 1))):
            raise DataError(f"{title} is {cell} beside an onset of {onset}: which of them?")
        if SAMPLES.search(title) and other and (other == float(onset) or title == "latency"):
            raise DataError(f"{title} is {cell} beside an onset of {onset}: seconds or samples?")


def with_points(rows, places):
    """Rows with a point for a decimal comma in the columns `places`. Where all could part
    thousands they stay, as no numbers."""
    commas = {row[place] for row in rows for place in places
              if place < len(row) and re.fullmatch(r"[+-]?\d+,\d+", row[place])}
    if all(re.fullmatch(r"[+-]?\d{1,3},\d{3}", cell) for cell in commas):
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


def refuse_edges(titles, rows):
    """Refuse (onset, duration, cells) of a table's rows on a seizure where all last as long and a
    column may tell its start from its end: by two values in turn, or of rows that are moments."""
    onsets, durations = {row[0] for row in rows}, {float(row[1] or 0) for row in rows}
    # two raters of one seizure have one onset
    if len(rows) < 2 or len(durations) != 1 or len(onsets) < len(rows):
        return
    lasts = max(durations)
    rows = [cells for *_, cells in sorted(rows)]
    for place, title in enumerate(titles):
        said = [re.sub(r"\.0+$", "", row[place]).lower() for row in rows if place < len(row)]
        pair, counts = said[:2], COUNTS.fullmatch(title_of(title))
        if len(set(said)) != 2:
            continue
        in_turn = len(said) % 2 == 0 and said == pair * (len(said) // 2)
        moments = 0 < lasts <= SHORT and not kind_of(title) and not any(
            find_clock(cell) or len(cell) > 3 and NUMBER.match(cell) for cell in said)
        if (in_turn and len(rows) > 2
                or not counts and (moments or in_turn and "".join(pair) in EDGE_CODES)):
            raise DataError(f"{title} is {pair[0]!r} or {(set(said) - {pair[0]}).pop()!r} in rows "
                            f"of {lasts:g} s: where these are a seizure's start and end, write "
                            "start and end")


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
    """(path of the nearest .json that describes a BIDS table, beside it or above its subject, what
    it says of each column); (None, {}) without one."""
    for folder in path.parents:
        for place in sorted(folder.glob("*events.json"), key=lambda place: -len(place.name)):
            if {*place.stem.split("_")} <= {*path.stem.split("_")}:
                try:
                    said = json.loads(place.read_text(encoding="utf-8-sig"))
                except (OSError, ValueError):
                    said = {}           # of what is not read the table says enough
                return place, said if isinstance(said, dict) else {}
        if not re.match("(sub|ses)-|eeg$", folder.name):
            break
    return None, {}


def refuse_described(path, text, meanings):
    """Refuse a BIDS table whose .json calls a code of its cells a seizure, or has its times in
    another unit than seconds."""
    place, said = described(Path(path))
    lines = filter(str.strip, text.split("\n"))
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines]
    for at, title in enumerate(rows[0] if rows else ()):
        column = said.get(title)
        if not isinstance(column, dict):
            continue
        unit, levels = str(column.get("Units", "")), column.get("Levels")
        if kind_of(title) in ("onset", "end", "duration") and re.match(OTHER_UNIT, unit, re.I):
            raise DataError(f"{place.name}: {title} is in {unit}, not in seconds")
        for code, meaning in (levels if isinstance(levels, dict) else {}).items():
            known = marks(code) or meanings.meaning(code)[0] or meanings.meaning(str(meaning))[0]
            if (any(code in row[at:at + 1] for row in rows[1:]) and marks(str(meaning))
                    and known in ("", "seizure") and known is not True
                    and not DENIED.search(plain(str(meaning)))):
                raise DataError(f"{place.name} says that {title} {code} is {str(meaning)[:40]!r}: "
                                "write so into the table")
