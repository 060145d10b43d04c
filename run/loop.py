"""A Checkpointer for a loop over a torch DataLoader: a resume goes on at the next batch, whatever
the sampler, the workers and the random numbers that items draw.

    with Loop("checkpoints", mid_epoch_minutes=10) as saver, saver.signals():
        saver.unpack(parts, saver.resume())         # parts: {name: what has a state_dict()}
        while saver.position[0] <= epochs:          # (epoch in progress, batches trained in it)
            for number, (x, y) in saver.batches(loader):
                train(x, y)
                saver.boundary(parts)       # saves in time; after Ctrl-C or SIGTERM saves and exits
            saver.save_epoch(saver.pack(parts), metric=score())
        saver.settle()                      # the last save is durable, or this raises

Copy this file and checkpoint.py beside each other: it needs torch and nothing else of ours.
docs/copying.md has a whole script and recipes.
"""
import contextlib
import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from operator import index, length_hint

import torch

from checkpoint import PROGRESS, Checkpointer, IncompleteState, facts_of, random_states, \
    restore_random_states, spare_worker


class Loop(Checkpointer):
    """A Checkpointer that yields the batches of the epoch in progress, and packs and saves what the
    loop over them trains.

    position        (epoch in progress, batches trained in it) at the newest save; set between two
                    loops, it is where `batches` goes on
    global_step     batches that `batches` has yielded, in all"""

    global_step = 0
    _position = (1, 0)
    _in_progress = None     # place of the batch that `batches` yielded last, until the epoch's end
    _asked = None           # place of the last boundary()

    @property
    def position(self):
        return self._position

    @position.setter
    def position(self, place):
        try:
            place = epoch, batch = tuple(map(index, place))
        except (TypeError, ValueError):
            epoch = batch = -1
        if min(epoch, batch) < 0:
            raise ValueError(f"position must be (epoch in progress, from 1, batches trained in "
                             f"it), two whole numbers, not {place!r}")
        if place != self._place:
            self._in_progress = self._asked = None
        self._position = place

    @property
    def _place(self):
        """Where training is: after the batch yielded last, else at the newest save."""
        return self._in_progress or self._position

    def resume(self, resume=True):
        """As Checkpointer.resume."""
        self._in_progress = self._asked = None
        state = super().resume(resume)
        if state is None:
            self.global_step = 0
        return state

    def _follow(self, state, path, asked=False):
        super()._follow(state, path, asked)
        self.global_step = facts_of(state)["global_step"]
        ours = state.get("holdfast")
        order = ours.get("order", {}) if isinstance(ours, dict) else {}
        self.notes = {"order": order}       # {epoch in progress: a number made from its batches}

    def _expect_place(self, here):
        if self._in_progress not in (None, here):
            epoch, batch = self._in_progress
            raise ValueError(f"batches() yielded batch {batch} of epoch {epoch} last, not batch "
                             f"{here[1]} of epoch {here[0]}: count epochs and batches from "
                             f"saver.position, or save saver.pack(parts)")
        super()._expect_place(here)

    def _expect_epoch(self, epoch):
        super()._expect_epoch(epoch)
        if self._in_progress and epoch != self._in_progress[0]:
            raise ValueError(f"batches() yielded epoch {self._in_progress[0]}, which epoch {epoch} "
                             f"cannot end: count epochs from saver.position, or save "
                             f"saver.pack(parts)")

    def batches(self, loader, seed=0):
        """Yield (batch number from 1, batch) of the epoch in progress from the DataLoader `loader`,
        those trained already left out without being loaded.

        The order of an epoch depends on (seed, epoch) alone. The random numbers that dataset and
        collate_fn draw from torch, random and numpy.random depend on (seed, epoch, batch number)
        and, in a distributed training, on the rank: not on workers, nor on where a resume began.
        TypeError for an iterable dataset, which cannot skip, and for a sampler with random numbers
        of its own. ValueError where batches were trained of an epoch that has others now."""
        epoch, done = self._place
        order = _epoch_order(loader, seed, epoch)
        mark = _mixed(json.dumps(order, default=lambda item: getattr(item, "tolist", str)()))
        known = self.notes.get("order", {}).get(epoch, mark)
        if done > len(order) or done and known != mark:
            has = f"only {len(order)}" if done > len(order) else "others"
            raise ValueError(f"{done} batches of epoch {epoch} were trained, and it has {has} "
                             f"now: go on with the seed, batch size and items of before, or set "
                             f"saver.position = ({epoch}, 0) to train it from its beginning")
        if self._in_progress == (epoch, len(order)):
            raise ValueError(f"epoch {epoch} was trained to its end: save_epoch() ends it, and "
                             f"resume() goes back to the newest save")
        self._in_progress, self.notes = (epoch, done), {"order": {epoch: mark}}
        of_epoch = _SeededBatches(loader, order, seed, epoch, bool(self._signals.before))
        for number, batch in enumerate(_rest_of_epoch(loader, of_epoch, done), done + 1):
            if self._place != (epoch, number - 1):
                raise ValueError(f"another place is in progress than batch {number - 1} of epoch "
                                 f"{epoch}: leave the loop over batches() after resume(), "
                                 f"save_epoch() or a new position, and let no two loops alternate")
            self._in_progress = epoch, number
            self.global_step += 1
            yield number, batch

    def pack(self, parts, **values):
        """A state for save_mid and save_epoch, of a loop over `batches`: the state_dict() of each
        of `parts`, {name: object}, plain `values`, the random states and the place."""
        _expect_parts(parts, values)
        epoch, batch = self._place
        states = {name: part.state_dict() for name, part in parts.items()}
        return {**states, **values, "random": random_states(), "epoch": epoch, "batch": batch,
                "global_step": self.global_step}

    def unpack(self, parts, state):
        """Put what `pack` took back into `parts`; a `state` of None, a fresh start, changes
        nothing. Gradients go. IncompleteState, with nothing changed, where it lacks a part."""
        _expect_parts(parts)                # the first save would tell after minutes of training
        if state:
            absent = [name for name in (*parts, "random") if name not in state]
            if absent:
                raise IncompleteState(f"the checkpoint has no {', '.join(map(repr, absent))}: "
                                      f"unpack the parts that it was saved with")
            for name, part in parts.items():
                part.load_state_dict(state[name])
                if hasattr(part, "zero_grad"):
                    part.zero_grad()        # what a step that failed has left stands in no state
            restore_random_states(state["random"])

    def boundary(self, parts, **values):
        """After a step: save what `pack` makes of these when it is time; once a signal came, save
        and leave the process with its exit code. ValueError in a loop over anything but `batches`,
        of which nobody knows what was trained."""
        if not self._in_progress and self._asked == self.position:
            raise ValueError("boundary() follows each batch of saver.batches(): in a loop of "
                             "another kind save_mid() takes a count of your own")
        self._asked = self.position
        if self.due() or self.stopping():
            self.save_mid(self.pack(parts, **values))
            if self.stopping():             # asked again only here: after a save
                sys.exit(self.stopping())


def _expect_parts(parts, values=()):
    if not hasattr(parts, "items"):
        raise TypeError(f"parts must be a dict, {{name: object}}, not {type(parts).__name__}")
    names = Counter([*PROGRESS, "random", "holdfast", *parts, *values])
    taken = [name for name, count in names.items() if count > 1]
    if taken:
        raise ValueError(f"a part cannot be called {', '.join(map(repr, taken))}: that place of "
                         f"the state is taken")
    for name, part in parts.items():
        if not hasattr(part, "state_dict"):
            raise TypeError(f"part {name!r}, of {type(part).__name__}, has no state_dict(): a "
                            f"plain value goes beside the parts, as {name}=... of pack() and "
                            f"boundary()")


def _epoch_order(loader, seed, epoch):
    """The item numbers of each batch of one epoch, by the loader's own samplers."""
    kind, usual = type(loader), torch.utils.data.DataLoader
    # what a class of another way to iterate makes of the batches would be lost
    if not isinstance(loader, usual) or kind.__iter__ is not usual.__iter__ \
            or kind._get_iterator is not usual._get_iterator:
        raise TypeError(f"batches() takes a DataLoader of torch, and {kind.__name__} makes batches "
                        f"in a way of its own: have its dataset or collate_fn do that, or loop by "
                        f"saver.position")
    if isinstance(loader.dataset, torch.utils.data.IterableDataset) or loader.batch_sampler is None:
        raise TypeError("batches() takes a DataLoader that makes batches of numbered items: an "
                        "iterable dataset cannot skip what was trained, batch_size=None makes "
                        "none: loop by saver.position, and save_mid() with a count of your own")
    samplers = [loader.batch_sampler]
    while getattr(samplers[-1], "sampler", None) is not None:
        samplers.append(samplers[-1].sampler)
    order = _drawn(loader, samplers, seed, epoch)
    own = [s for s in samplers if not type(s).__module__.startswith("torch.")]
    if own and order != _drawn(loader, samplers, seed, epoch):
        raise TypeError(f"{type(own[0]).__name__} gives another order each time it is asked: have "
                        f"it draw from torch, random or numpy.random, or give it set_epoch(epoch)")
    return order


def _drawn(loader, samplers, seed, epoch):
    most = length_hint(loader.dataset)
    with contextlib.suppress(NotImplementedError):  # a length may be unknown, or a guess too low
        most = max(most, length_hint(loader.batch_sampler))
    with _seeded(seed, epoch):
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):       # a DistributedSampler has a seed of its own
                sampler.set_epoch(epoch)
            if isinstance(getattr(sampler, "generator", None), torch.Generator):
                sampler.generator.manual_seed(_mixed(seed, epoch))
        order = [list(batch) for batch in itertools.islice(loader.batch_sampler, most + 1)]
    if len(order) > most:
        raise TypeError(f"{type(samplers[-1]).__name__} gives more than {most} batches: batches() "
                        f"needs a sampler that ends, RandomSampler(dataset, num_samples=...) say, "
                        f"or has a __len__")
    return order


def _rest_of_epoch(loader, batches, done):
    same = {name: getattr(loader, name) for name in (
        "num_workers", "pin_memory", "timeout", "multiprocessing_context", "prefetch_factor")}
    # without a generator of its own a DataLoader draws from the global random numbers
    generator = torch.Generator().manual_seed(_mixed(*batches.key[:2]))
    numbers = range(len(batches.order))
    return torch.utils.data.DataLoader(
        numbers, batch_size=None, sampler=numbers[done:], collate_fn=batches.load,
        worker_init_fn=batches.begin_worker, generator=generator, **same)


class _SeededBatches:
    """The batches of one epoch: each draws random numbers by its own number."""

    def __init__(self, loader, order, seed, epoch, heard):
        self.fetcher = torch.utils.data._utils.fetch._MapDatasetFetcher(
            loader.dataset, True, loader.collate_fn, False)
        self.init = loader.worker_init_fn
        self.order = order
        self.heard = heard
        # processes of a distributed training load other items under the same number
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.key = seed, epoch, torch.distributed.get_rank() if ranks else 0

    def load(self, number):
        with _seeded(*self.key, number):
            return self.fetcher.fetch(self.order[number])

    def begin_worker(self, number):
        spare_worker(self.heard)           # one that was spawned knows nothing of it yet
        if self.init:
            # what it finds by get_worker_info() is the user's dataset, not this one
            info = torch.utils.data.get_worker_info()
            object.__setattr__(info, "dataset", self.fetcher.dataset)     # it is frozen
            self.init(number)


@contextlib.contextmanager
def _seeded(*numbers):
    """Inside, random numbers of Python, NumPy (if loaded) and torch on the CPU follow from
    `numbers`; after it they go on as before."""
    key = _mixed(*numbers)
    numpy = sys.modules.get("numpy")
    before = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    random.seed(key)
    torch.default_generator.manual_seed(key)        # torch.manual_seed would change GPUs' too
    if numpy:
        numpy.random.seed(key % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        if numpy:
            numpy.random.set_state(before[2])


def _mixed(*numbers):
    """A seed from several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")
