"""A corpus from where it is published to recordings, without a stop at home.

    import_from("https://physionet.org/files/chbmit/1.0.0/", "/data/chbmit", "/data/raw", print)

From the web it comes one verified file after the other: SHA256SUMS.txt, which PhysioNet publishes
beside each of its databases, lists every file and its digest.

The same call again goes on from there: a file under its own name is whole and verified, the part of
one that was interrupted is continued.
"""
import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, InvalidURL
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

import data
from eeg import corpora
from eeg.console import Timer, how_many
from eeg.disk import Refused, TemporaryFault, fault, replace_durably
from eeg.edf import DataError

SUMS = "SHA256SUMS.txt"
CONNECTIONS = 8                         # files on their way at once
TRIES = 5                               # of a file, with pauses between
PAUSE = 5.0                             # seconds before the second, doubled each time
TIMEOUT = 60.0                          # seconds without a byte


def import_from(source, out, raw, progress, **options):
    """Import `source` to `out`, as data.py does: a folder, or the address of one, which is fetched
    to the folder `raw` first. Returns how many files were refused.

    progress(what) is called after each file. Raises Refused, TemporaryFault."""
    try:
        if urlsplit(source).scheme in ("https", "http"):
            fetch(source, raw, fetched=progress)
            source = raw
        report = corpora.import_corpus(source, out, progress=progress, **options)
        data.info(out)
    except DataError as refusal:
        raise Refused(str(refusal)) from None
    except OSError as error:
        raise fault(error, out) from None
    return len(report.refused)


def fetch(url, folder, say=print, fetched=lambda name: None):
    """Bring every file that `url`/SHA256SUMS.txt lists into `folder`; fetched(name) after each.
    Raises Refused where the address is none of such a folder, TemporaryFault where the network
    fails."""
    url, folder = url.rstrip("/") + "/", Path(folder)
    listed = {name: digest for digest, name in sums(url)}
    missing = [name for name in listed if not (folder / name).exists()]
    say(f"{url}: {how_many(len(listed), 'file')}, {len(missing)} of them to fetch to {folder}")
    plain, over = Timer(10), threading.Event()

    def one(name):
        return fetch_file(url, name, listed[name], folder, over)

    pool = ThreadPoolExecutor(CONNECTIONS, "fetch")
    try:
        for number, name in enumerate(pool.map(one, missing), 1):
            fetched(name)
            if plain.due():
                say(f"fetched {number} of {len(missing)} files")
    finally:
        over.set()                      # the parts stay: a grace of seconds waits for no file
        pool.shutdown(cancel_futures=True)


def sums(url):
    """[(digest, name)] of the files at `url`."""
    lines = b"".join(pieces(url + SUMS)).decode(errors="replace").splitlines()
    found = [line.split(maxsplit=1) for line in lines if line.strip()]
    if not found:
        raise Refused(f"{url}{SUMS} lists no file")
    for entry in found:
        if len(entry) != 2 or len(entry[0]) != 64 or not inside(entry[1].removeprefix("*")):
            raise Refused(f"{url}{SUMS}: a line is no digest and name: {' '.join(entry)[:80]!r}")
    return [(digest.lower(), name.removeprefix("*")) for digest, name in found]


def inside(name):
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "\0"} & {*path.parts, *name}


def pieces(url, begin=0):
    """The bytes at `url` from `begin` on, in pieces. Raises Refused for what stays so,
    TemporaryFault for what may pass."""
    headers = {"Range": f"bytes={begin}-"} if begin else {}
    try:
        asked = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
            left = int(answer.headers.get("Content-Length", 0))
            if begin and answer.status != 206:          # a server that knows no parts sends all
                left -= len(answer.read(begin))
            while piece := answer.read(1 << 20):
                left -= len(piece)
                yield piece
        if left > 0:
            raise TemporaryFault(f"{url}: ended {left} bytes early")
    except urllib.error.HTTPError as error:
        if error.code == 416:                           # the part was already the whole
            return
        kind = Refused if 400 <= error.code < 500 and error.code != 429 else TemporaryFault
        raise kind(corpora.one_line(f"{url}: {error.code} {error.reason}")) from None
    except (ValueError, InvalidURL) as error:
        raise Refused(corpora.one_line(f"{url}: {error}")) from None
    except (OSError, HTTPException) as error:
        raise TemporaryFault(corpora.one_line(f"{url}: {error}")) from None


def fetch_file(url, name, digest, folder, over):
    """Bring one file, verified, under its name, and return the name. Raises TemporaryFault once
    `over` is set, Refused where the same wrong bytes come twice: the server has no others."""
    target = folder / name
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    wrong = ""
    for number in range(TRIES):
        try:
            take(url + quote(name), part, over)
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == digest:
                break
            part.unlink()
            kind, wrong = Refused if found == wrong else TemporaryFault, found
            raise kind(f"{url}{name}: its SHA-256 is {found}, not that of {SUMS}")
        except TemporaryFault:
            if number == TRIES - 1 or over.wait(PAUSE * 2 ** number):
                raise
    # whole seconds, which every file system keeps: the import knows a file by its time
    os.utime(part, times=(int(time.time()),) * 2)
    replace_durably(part, target)
    return name


def take(url, part, over):
    """Append to `part` what it lacks of the file at `url`."""
    begin = part.stat().st_size if part.exists() else 0
    with open(part, "ab") as file:
        for piece in pieces(url, begin):
            file.write(piece)
            if over.is_set():
                raise TemporaryFault(f"{url}: interrupted")
