"""A run that stands still ends by itself, with the reason written down.

    with Watchdog(30.0, "results/v3/hang.txt", print) as watch:
        for batch in loader:
            step(batch)
            watch.progressed("step")            # the clock starts anew

When nothing has been done for the limit, the stack of every thread is printed and written to the
file, and the process ends with exit code 70; a save in progress is a temp file, so a resume goes
on. The limit adapts: never below 10 times the slowest thing done so far.
"""
import contextlib
import faulthandler
import os
import socket
import threading
import time
from concurrent.futures import Future, wait

REPORT = b"standstill:"                 # how the report of a process begins
EXIT_CODE = 70                          # EX_SOFTWARE of sysexits.h
SLOWEST_TIMES = 10                      # the slowest thing done so far: the limit is never below
REPORT_SECONDS = 20.0                   # that a dead disk or terminal may hold up the end
OTHERS_SECONDS = 60.0                   # in which the other processes of the job may write


class Watchdog:
    """Watches this process from a thread of its own, which a main thread stuck in C does not hold
    up (one that also keeps Python's global lock does; torch, NumPy and file reads let go of it).

    minutes     without progress that end the process; 0 = never
    path        file to which the stacks go, where its folder exists
    say         prints a line
    name        this process among those of a job, e.g. "process 1 of 8,"
    count       of the processes of the job: they wait for each other's words, since all stand still
                when one does, and the one that hangs may be the last whose clock runs out

    Time in which the whole process was stopped (SIGSTOP, a closed lid, a paused machine) does not
    count: the thread counts the ticks that it lived through, not the clock."""

    def __init__(self, minutes, path, say, name="", count=1):
        self.limit, self.path, self.say, self.name = 60 * minutes, path, say, name
        self.count = count
        self.older = 0                  # bytes that an earlier standstill left in the file
        if count > 1:
            self.older = len(self._written())
        self.last = "nothing yet"
        self.facts = lambda: "not in the loop yet"      # where the run stands, from its owner
        self.still = 0.0                # seconds since the last progress
        self.slowest = 0.0
        self.waits = False
        self.closed = threading.Event()

    def __enter__(self):
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.closed.set()

    @contextlib.contextmanager
    def waiting_for_others(self):
        """Within it this process waits for another one, which watches itself."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
            self.progressed("wait")

    def progressed(self, what):
        """Something ended: the clock starts anew."""
        self.slowest = max(self.slowest, self.still)
        self.still = 0.0
        self.last = what

    def allowed(self):
        return max(self.limit, SLOWEST_TIMES * self.slowest)

    def _watch(self):
        tick = min(1.0, self.limit / 10)
        before = time.monotonic()
        while not self.closed.wait(tick):
            now = time.monotonic()
            # a longer gap than a busy machine explains: all of the process was stopped
            self.still += min(now - before, 2 * tick)
            before = now
            if self.waits:
                self.still = 0.0
            if self.still > self.allowed():
                self._end()

    def _end(self):
        text = self._report()
        where = f"written to {self.path}"
        # what stands still may be the disk of the file and the log, and the end must come
        try:
            answered(REPORT_SECONDS, lambda: self._keep(text))
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            where = f"{self.path} could not be written ({reason})"
        words = f"{text}standstill: {where}; --resume goes on"
        with contextlib.suppress(Exception):
            try:
                answered(REPORT_SECONDS, lambda: self.say(words, every=True))
            except Exception:
                answered(REPORT_SECONDS, lambda: os.write(2, f"{words}\n".encode()))
        if self.count > 1:
            with contextlib.suppress(Exception):
                answered(OTHERS_SECONDS, self._wait_for_others)
        os._exit(EXIT_CODE)

    def _wait_for_others(self):
        while self._written()[self.older:].count(REPORT) < self.count:
            time.sleep(0.5)

    def _written(self):
        """What stands in the file, as bytes."""
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except OSError:                 # not there yet, or out of reach
            return b""

    def _report(self):
        who = f"{self.name} process id {os.getpid()} on {socket.gethostname()}".strip()
        line = (f"{REPORT.decode()} {who}: nothing has ended for {self.still / 60:.1f} min "
                f"(allowed: {self.allowed() / 60:.1f}); last done: {self.last}; {self.facts()}")
        return f"{line}\n{stacks()}"

    def _keep(self, text):
        with open(self.path, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def answered(seconds, work):
    """What work() returns or raises. TimeoutError after so long: its thread is left behind."""
    answer = Future()

    def ask():
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    wait([answer], seconds)
    if not answer.done():
        raise TimeoutError(f"no answer for {seconds:g} s")
    return answer.result()


def stacks():
    """The stack of every thread, as text. Works while threads are stuck in C, and needs no disk."""
    with open(os.memfd_create("stacks"), "w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
