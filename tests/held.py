"""train.py or an import that stands still until a file appears, so that what a test does in the middle happens there on any
machine: before the N-th call of a Trainer's method, or of the writing of a recording in each process of an import.

    HELD="METHOD N FILE" python held.py (train.py's arguments)
    HELD="write_recording N FILE" python held.py (data.py's arguments)
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def hold(owner, method, number, gate):
    original, calls = getattr(owner, method), []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == number and not os.path.exists(gate):
            print("held", flush=True)
            while not os.path.exists(gate):
                time.sleep(0.02)
        return original(*arguments)
    setattr(owner, method, wrapped)


method, number, gate = os.environ["HELD"].split(" ", 2)
if method == "write_recording":
    from eeg import corpora
    import data as program
    owner = corpora
else:
    import train as program
    owner = program.Trainer
    owner.draw = lambda self: None              # half of the time of an epoch, and no picture is looked at
hold(owner, method, int(number), gate)          # in the workers of an import too: they read this file again

if __name__ == "__main__":
    sys.exit(program.main())
