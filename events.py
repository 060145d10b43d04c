"""From a track of probabilities to events: runs of samples, hysteresis, merging, cutting.

Events are int64 (N, 2), begin and end (exclusive) in samples, in order and apart.
"""
import numpy as np


def runs(mask):
    """Begin and end (exclusive) of each run of True: int64 (N, 2)."""
    padded = np.concatenate([[False], mask, [False]])
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)


def hysteresis(probability, on, off, onset, offset):
    """Runs that begin with `onset` samples >= on and end where `offset` samples < off begin:
    int64 (N, 2)."""
    high = runs(probability >= on)
    low = runs(~(probability >= off))                      # NaN ends an event
    begin = high[high[:, 1] - high[:, 0] >= max(1, onset), 0]
    end = low[low[:, 1] - low[:, 0] >= max(1, offset), 0]
    # all marks in order of time; only the first of several begins, or of several ends, counts
    marks = np.concatenate([begin, end])
    order = np.argsort(marks)
    marks = marks[order]
    begins = order < len(begin)
    inside = np.append(False, begins)[:-1]                  # the mark before it was a begin
    first = marks[begins & ~inside]
    last = marks[~begins & inside]
    if len(last) < len(first):                              # the recording ends within an event
        last = np.append(last, len(probability))
    return np.stack([first, last], 1).astype(np.int64)


def merge(events, gap):
    """Join neighbours whose gap is at most `gap` samples."""
    if len(events) < 2:
        return events
    apart = events[1:, 0] - events[:-1, 1] > gap
    begin = events[np.append(True, apart), 0]
    end = events[np.append(apart, True), 1]
    return np.stack([begin, end], 1)


def longer(events, shortest):
    return events[events[:, 1] - events[:, 0] >= shortest]


def split(events, longest):
    """Cut events into the fewest equal parts that are no longer than `longest` samples."""
    length = events[:, 1] - events[:, 0]
    parts = -(-length // longest)
    which = np.repeat(np.arange(len(events)), parts)        # the event of each part
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)     # within it
    begin = events[which, 0] + length[which] * number // parts[which]
    end = events[which, 0] + length[which] * (number + 1) // parts[which]
    return np.stack([begin, end], 1)
