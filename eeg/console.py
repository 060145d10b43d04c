"""The terminal of a command, which may be closed, paused, in ASCII, or read by nobody.

    from eeg import console
    console.begin("train.py", "training")       # first of all: the imports that follow take seconds
    import torch
    ...
    console.install()                   # from here on no print ends the program or holds it up

The standard library alone: this file is imported before everything else.
"""
import collections
import contextlib
import io
import os
import select
import shlex
import signal
import sys
import threading
import time
from argparse import ArgumentTypeError
from pathlib import Path

# tqdm, which torch imports too, reads these as it is imported, and ends in a traceback at one that
# it cannot read: none acts here
for name in [name for name in os.environ if name.startswith("TQDM_")]:
    del os.environ[name]

UNREAD_SECONDS = 1.0                    # that a text waits for its reader before it is given up
KEPT_TEXTS = 1000                       # that wait for a reader; older ones are dropped


def begin(name, work):
    """Descriptors 0 to 2 exist from now on. Ctrl-C ends the command `name`, whose `work` has not
    begun yet, with one line."""
    take_descriptors()

    def leave(number, frame):
        os.write(2, f"\n{name}: stopped by SIGINT before {work} began\n".encode())
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


def begun():
    """Ctrl-C raises KeyboardInterrupt again: the command ends itself."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def take_descriptors():
    """0 to 2: a closed one would be given to the next file that is opened, a checkpoint, into which
    the next message goes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:                 # closed: open() takes the lowest free number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def install():
    """Put a Console in the place of sys.stdout and of sys.stderr. Streams of a notebook or a test
    stay what they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if type(stream) is io.TextIOWrapper:
            setattr(sys, name, Console(stream))


class Console:
    """A standard stream that never raises and never holds up for more than UNREAD_SECONDS.

    Texts go to the descriptor from a thread of their own. While nobody takes them (Ctrl-S, a
    selection in the window, a pipe that is full) the newest KEPT_TEXTS wait; where nobody will
    (`| head`, tmux kill-session) they are dropped. What its encoding lacks is escaped."""

    def __init__(self, stream):
        self.stream, self.descriptor = stream, stream.fileno()
        with contextlib.suppress(OSError):
            stream.flush()
        self.texts = collections.deque()        # not written yet; the first one is being written
        self.changed = threading.Condition()
        self.unread = False             # a text waited in vain: the next ones do not wait
        self.dropped = 0
        self.thread = None

    def write(self, text):
        with self.changed:
            self.texts.append(text)
            if len(self.texts) > KEPT_TEXTS:
                del self.texts[1]
                self.dropped += 1
            if not (self.thread and self.thread.is_alive()):        # at first, and after a fork
                self.thread = threading.Thread(target=self._write_out, name="console", daemon=True)
                try:
                    self.thread.start()
                except RuntimeError:    # no thread is to be had: whoever prints writes
                    self._write_here()
            self.changed.notify_all()
        self.flush()
        return len(text)

    def flush(self):
        with self.changed:
            if not self.unread:
                taken = self.changed.wait_for(lambda: not self.texts, UNREAD_SECONDS)
                self.unread = not taken

    def _write_out(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.texts)
                text = self.texts[0]
            self._put(text.encode(self.stream.encoding, "backslashreplace"))
            with self.changed:
                self.texts.popleft()
                if self.dropped and not self.texts:
                    self.texts.append(f"[{self.dropped} texts that nobody read are left out]\n")
                    self.dropped = 0
                self.unread = self.unread and bool(self.texts)
                self.changed.notify_all()

    def _write_here(self):
        while self.texts:
            text = self.texts.popleft()
            if select.select([], [self.descriptor], [], UNREAD_SECONDS)[1]:
                self._put(text.encode(self.stream.encoding, "backslashreplace"))

    def _put(self, rest):
        while rest:
            try:
                rest = rest[os.write(self.descriptor, rest):]
            except BlockingIOError:     # another program made the terminal non-blocking
                select.select([], [self.descriptor], [])
            except OSError:             # nobody will ever read it
                return

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def signals_wait(*numbers):
    """A signal that comes within this block is answered after it."""
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            os.kill(os.getpid(), number)


def how_many(number, noun):
    """"1 patient", "2 patients", "3 batches"; number: or as it is printed."""
    ending = "" if str(number) == "1" else "es" if noun.endswith("tch") else "s"
    return f"{number} {noun}{ending}"


def rounded(value, form=".4f"):
    """A number by its format; what only rounding would make 0 or 1 is "<0.0001", ">0.9999"."""
    text, step = format(value, form), 10 ** -int(form[1])
    if value > 0 and float(text) == 0:
        return f"<{step:{form}}"
    return f">{1 - step:{form}}" if value < 1 and float(text) == 1 else text


def hours(seconds):
    """"0.17 h", "40 s": two decimals of an hour say little of a minute."""
    return f"{seconds:.3g} s" if 0 < seconds < 90 else f"{seconds / 3600:.2f} h"


def typed(text):
    """The path of a command's argument. An unset variable of a shell leaves it empty, and that
    would be the current folder."""
    if not text:
        raise ArgumentTypeError("the path is empty: is a variable of the shell unset?")
    return Path(text)


def near(path):
    """`path` as one would type it here."""
    return os.path.relpath(path) if path and Path(path).is_relative_to(Path.cwd()) else str(path)


def elsewhere(path):
    """"; it lies at FILE" for a path as the pages print it that was typed in another folder than
    that of the scripts; else nothing."""
    there = Path(__file__).absolute().parent.parent / path
    return f"; it lies at {near(there)}" if os.path.exists(there) else ""


def command(script, *words):
    """What one would type here to start a script of this folder; its words are quoted."""
    place = near(Path(__file__).absolute().parent.parent / script)
    return shlex.join(["python", place, *map(str, words)])


def bar(total, title, unit, done=0, hidden=False, **options):
    """A progress bar on a terminal; `disable` tells where there is none, and lines are printed."""
    from tqdm import tqdm               # here, where its variables are gone
    hidden = hidden or not sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=title, unit=unit, disable=hidden, **options)


class Timer:
    """True now and then: for the plain lines that stand for a progress bar where there is none."""

    def __init__(self, seconds):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self):
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True
