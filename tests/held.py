"""train.py that stands still before the N-th call of a Trainer's method until a file appears, so that what a test does in the
middle of a run happens there on any machine: python held.py METHOD N FILE (train.py's own arguments)."""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402


def hold(method, number, gate):
    original, calls = getattr(train.Trainer, method), []

    def wrapped(self, *arguments):
        calls.append(1)
        if len(calls) == number and not os.path.exists(gate):
            print("held", flush=True)
            while not os.path.exists(gate):
                time.sleep(0.02)
        return original(self, *arguments)
    setattr(train.Trainer, method, wrapped)


if __name__ == "__main__":
    hold(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.exit(train.main(sys.argv[4:]))
