"""From a track of probabilities to events: smoothing, runs, hysteresis, merging, cutting.

Events are int64 (N, 2), begin and end (exclusive) in samples, in order and apart.
"""
import numpy as np

PIECE = 1 << 20                         # samples that are smoothed at a time


def smoothed(track, width):
    """Moving mean of a track (samples,) over `width` samples, fewer at its ends; in pieces, since
    sums over a day would be 500 MB."""
    if width < 2:
        return track
    before, after = width // 2, width - width // 2
    result = np.empty_like(track)
    for begin in range(0, len(track), PIECE):
        at = np.arange(begin, min(begin + PIECE, len(track)))
        first, last = np.maximum(at - before, 0), np.minimum(at + after, len(track))
        sums = np.cumsum(track[first[0]:last[-1]], dtype=np.float64)
        sums = np.concatenate([[0.0], sums])
        result[at] = (sums[last - first[0]] - sums[first - first[0]]) / (last - first)
    return result


def runs(mask):
    """Begin and end (exclusive) of each run of True: int64 (N, 2)."""
    padded = np.concatenate([[False], mask, [False]])
    changes = padded[1:] != padded[:-1]
    edges = np.flatnonzero(changes)
    return edges.reshape(-1, 2)


def hysteresis(probability, on, off, onset, offset):
    """Runs that begin with `onset` samples >= on and end where `offset` samples < off begin:
    int64 (N, 2)."""
    high = runs(probability >= on)
    low = runs(~(probability >= off))                       # NaN ends an event
    begin, _ = longer(high, max(1, onset)).T
    end, _ = longer(low, max(1, offset)).T

    # all marks in order of time; only the first of several begins, or of several ends, counts
    marks = np.concatenate([begin, end])
    order = np.argsort(marks)
    marks = marks[order]
    begins = order < len(begin)
    # whether the mark before it was a begin
    inside = np.roll(begins, 1)
    inside[:1] = False
    first = marks[begins & ~inside]
    last = marks[~begins & inside]
    if len(last) < len(first):                              # the recording ends within an event
        last = np.append(last, len(probability))
    return pairs(first, last)


def pairs(begin, end):
    events = np.stack([begin, end], axis=1)
    return events.astype(np.int64)


def merge(events, gap):
    """Join neighbours whose gap is at most `gap` samples."""
    if len(events) < 2:
        return events
    begin, end = events.T
    apart = begin[1:] - end[:-1] > gap                      # from the one before
    opens = np.append(True, apart)
    closes = np.append(apart, True)
    return pairs(begin[opens], end[closes])


def longer(events, shortest):
    """Those of at least `shortest` samples."""
    begin, end = events.T
    return events[end - begin >= shortest]


def split(events, longest):
    """Cut events into the fewest equal parts that are no longer than `longest` samples."""
    begin, end = events.T
    length = end - begin
    parts = -(-length // longest)                           # rounded up

    # one row per part: the event it is of, as long as that is, and its number within it
    before = np.cumsum(parts) - parts
    begin = np.repeat(begin, parts)
    length = np.repeat(length, parts)
    number = np.arange(len(begin))
    number -= np.repeat(before, parts)
    parts = np.repeat(parts, parts)
    first = begin + length * number // parts
    number += 1
    last = begin + length * number // parts
    return pairs(first, last)
