"""V3: EEG seizure detector in pure torch, (B, C, T) normalised EEG at 256 Hz -> (B, T) logits.

    python bench/model.py                      speed, memory and parameters beside other detectors
    python -m pytest tests/test_model.py

    EEG (B, C, T)
      stem          per electrode, 256 -> 16 Hz -> L = T / 64 steps, 4 a second     (B, C, L, 64)
      TCN           all electrodes together, 8 dilated residual blocks              (B, L, 496)
      streams       one per electrode: stem + what the TCN says of it               (B, C, L, 64)
      node stream   bidirectional Mamba-2 over time, one sequence per electrode     (B, C, L, 64)
      edge stream   similarity of each pair of electrodes, once a second, lifted
                    and filtered by a small bidirectional Mamba-2; the strongest
                    3 per electrode                                                 (B, L / 4, C, C)
      graph         Laplacian positional encoding, two graph convolutions           (B, C, L, 64)
      head          graph and TCN at 4 steps a second, local detail at 16 Hz        (B, T)

What was chosen, and why
- 4 stream steps and 1 graph a second. Seizures last seconds; what is faster (spikes, rhythm) is
  read by the stem, whose 16 Hz features also reach the head directly. Narrow sequence layers are
  bound by memory traffic: 16 steps and 16 graphs a second would cost 4 and 16 times as much of it.
- Nine tenths of the parameters are the TCN's wide matrices at 4 steps a second: 7 GFLOP a window in
  large matrix products, which run near the peak of the machine.
- Mamba-2 heads of 32 channels: the work that is no matrix product grows with the number of heads.
- What the EEG is divided by is the model's choice, stored with it: the recording's amplitude, or
  its own baseline in every band (eeg/baseline.py). A seizure is a change against what is usual for
  that patient and amplifier.
- Both directions, and all layers of a Mamba-2 stack, share one parameter tensor per kind: few
  tensors make an optimizer step and a snapshot cheap. Norms carry no gain: the next matrix would
  only repeat it.
- Dropout drops a feature for a whole sequence: on a CPU, drawing a random number per element costs
  more than the layer it follows.

Stable by construction: the input is companded, every stream enters its layers normalised,
similarities are cosines, edges lie in (0, 1), the graph operator has norm <= 1, decays are bounded
so that no exponential overflows, eigenvectors carry no gradient. Scans, edges, eigenvectors and
the last products stay in fp32 under autocast. A NaN in the input gives NaN logits, never a number.
Deterministic on CPU and GPU: matrix products, pads, stable sorts and elementwise operations; no
scatter, cumsum or interpolation.

Papers: Mamba-2 (Dao & Gu, ICML 2024), TCN (Bai et al., 2018), Laplacian encoding (Dwivedi &
Bresson, 2021), SSGC (Zhu & Koniusz, ICLR 2021), prior of the last bias (Lin et al., ICCV 2017).
"""
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHOLE = (1, math.inf)
SHARE = (0, 1)
KEYS: dict[str, tuple] = {   # name: default, meaning, limits
    "size": ("full", "what the keys below are by default", ("full", "small")),
    "hop": (64, "samples per stream step: 4 steps a second", WHOLE),
    "graph_steps": (4, "stream steps per graph: one graph a second", WHOLE),
    "stem_width": (64, "filters per electrode at 16 Hz", WHOLE),
    "tcn_width": (496, "channels of the TCN", WHOLE),
    "tcn_blocks": (8, "residual blocks, dilation 1, 2, 4, 8, 1, 2, ...", WHOLE),
    "tcn_kernel": (7, "taps; 8 blocks see 45 s", WHOLE),
    "node_width": (64, "features of an electrode stream", WHOLE),
    "node_layers": (6, "bidirectional Mamba-2 layers over each electrode", WHOLE),
    "node_state": (16, "state size of a node scan", WHOLE),
    "node_headdim": (32, "channels per head of a node scan", WHOLE),
    "edge_heads": (4, "similarities per pair of electrodes", WHOLE),
    "edge_width": (16, "features of an edge stream", WHOLE),
    "edge_layers": (2, "bidirectional Mamba-2 layers over each edge", WHOLE),
    "edge_state": (8, "state size of an edge scan", WHOLE),
    "edge_headdim": (16, "channels per head of an edge scan", WHOLE),
    "neighbours": (3, "strongest edges kept per electrode", WHOLE),
    "eigenvectors": (16, "Laplacian encoding: eigenvectors of the smallest eigenvalues", WHOLE),
    "graph_layers": (2, "graph convolutions", WHOLE),
    "head_width": (424, "hidden units of the head", WHOLE),
    "dropout": (0.1, "share of features dropped, per sequence", SHARE),
    "prior": (0.05, "probability of seizure that an untrained model gives", SHARE),
    "baseline": (1.0, "share of the recording's own baseline spectrum that its EEG is divided by, "
                 "0 = by its amplitude alone", SHARE),
}
DEFAULTS = {name: default for name, (default, _, _) in KEYS.items()}
OLDER = {"baseline": 0.0}       # what a model was that was saved without this key
SMALL = {                   # 160,000 parameters, for a CPU, smoke runs and tests
    "stem_width": 16, "tcn_width": 64, "tcn_blocks": 4, "tcn_kernel": 5, "node_width": 16,
    "node_layers": 1, "node_state": 8, "edge_heads": 2, "edge_width": 4, "edge_layers": 1,
    "edge_state": 4, "edge_headdim": 8, "eigenvectors": 4, "graph_layers": 1, "head_width": 64,
    "dropout": 0.05}
SIZES = {"full": {}, "small": SMALL}

STRIDE = 16                 # samples per stem step: 16 Hz
TAPS = 4                    # a stem filter sees TAPS * STRIDE samples, 250 ms
CONV = 4                    # taps of Mamba-2's short convolution
MAX_DECAY = 2.5             # largest log-decay per step: 8 % is left
LOCAL = 16                  # features of the head at 16 Hz
MAX_CHUNK = 24              # MAX_DECAY * MAX_CHUNK = 60: two factors of a scan multiply inside fp32
BLOCK = 150_000             # numbers that a CPU works on at a time, to keep them in its cache


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """DEFAULTS, or those of the named size in `given`, overridden by `given`; checked. The size
    itself is left out: two ways to write one model are equal. Raises ValueError."""
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        raise ValueError(f"model: unknown setting {unknown[0]!r}; known are {', '.join(KEYS)}")
    size = given.get("size", DEFAULTS["size"])
    if size not in SIZES:
        raise ValueError(f"model: size must be one of {', '.join(SIZES)}, not {size!r}")
    c = {**DEFAULTS, **SIZES[size], **older(given), **given}
    del c["size"]
    for name, value in c.items():
        lowest, highest = KEYS[name][2]
        if not lowest <= value <= highest:
            raise ValueError(f"model: {name} must lie between {lowest} and {highest}, not {value}")
    # nothing may be dropped wholly; a prior of 0 or 1 has no logit
    for name, at in (("dropout", 1), ("prior", 0), ("prior", 1)):
        if c[name] == at:
            raise ValueError(f"model: {name} must not be {at}")
    if c["hop"] % STRIDE:
        raise ValueError(f"model: hop {c['hop']} must be a multiple of {STRIDE} samples")
    return c


def older(saved: dict[str, Any]) -> dict[str, Any]:
    """{setting: what it was} of those that the whole settings of a saved model lack; {} for
    settings that are not whole: those of a configuration."""
    if not DEFAULTS.keys() - OLDER.keys() - {"size"} <= saved.keys():
        return {}
    return {name: value for name, value in OLDER.items() if name not in saved}


def build(channels: int, settings: dict[str, Any]) -> nn.Module:
    """The detector for `channels` electrodes or derivations; another model is put in its place here
    alone."""
    return V3(channels, **settings)


def size_of(weights: dict[str, Tensor], channels: int) -> str:
    """The name in SIZES whose model has weights of these shapes, "" where none has."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    for size in SIZES:
        with torch.device("meta"):              # shapes without memory or random numbers
            other = build(channels, {"size": size}).state_dict()
        if {name: tuple(value.shape) for name, value in other.items()} == shapes:
            return size
    return ""


def norm(x: Tensor) -> Tensor:
    """Layer normalisation without gain and bias, over the last axis, as fp32."""
    return F.layer_norm(x.float(), x.shape[-1:])


def weight(*shape: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
    """A matrix (or a stack of them) with standard deviation gain / sqrt(fan_in)."""
    return nn.Parameter(torch.randn(*shape) * (gain / math.sqrt(fan_in)))


def vector(*shape: int, value: float = 0.0) -> nn.Parameter:
    """A stack of vectors kept flat: optimizers know by ndim what not to decay."""
    return nn.Parameter(torch.full((math.prod(shape),), float(value)))


def keep_features(layers: int, x: Tensor, p: float, training: bool) -> Sequence[Tensor | None]:
    """Dropout of whole features for every layer of a stack: a factor (n, 1, d) for x (n, T, d)
    each, one draw per sequence and feature; None where nothing is dropped."""
    if not training or p == 0:
        return [None] * layers
    kept = torch.empty(layers, len(x), 1, x.shape[2], dtype=x.dtype, device=x.device)
    return (kept.bernoulli_(1 - p) / (1 - p)).unbind()


def residual(x: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
    """x + y, of which the features that `kept` gives are left."""
    return x + y if kept is None else torch.addcmul(x, y, kept)


def wavelets(taps: int, count: int) -> Tensor:
    """(taps, count) windowed sines of unit energy, 1 to 64 Hz, random phases: where an EEG has its
    power."""
    time = torch.arange(taps)[:, None] / 256
    frequency = 64 ** (torch.arange(count) / max(1, count - 1))
    turns = time * frequency + torch.rand(count)
    waves = torch.sin(2 * math.pi * turns)
    waves = waves * torch.hann_window(taps + 2)[1:-1, None]
    return waves / waves.norm(dim=0)


# ---- Mamba-2 ----

class Order(NamedTuple):
    """How the scans of a stack run through their chunks; made once for all layers. D directions."""
    reverse: tuple    # of D: does it run from the last step to the first?
    chunk: int        # steps of a chunk
    seen: Tensor      # (D, chunk, chunk) of 0 and 1: row i sees column j
    middle: Tensor    # (D, chunk, chunk): log-decays of a chunk -> levels from its middle
    before: Tensor    # (D, chunks, chunks) of 0 and 1: chunk j comes before chunk i
    half: Tensor      # before, and 1/2 on the diagonal: up to the middle of chunk i


def triangles(size: int, reverse: tuple[bool, ...], like: Tensor) -> Tensor:
    """(D, size, size) of 0 and 1, row i may see column j: lower for a scan ahead, else upper."""
    ones = torch.ones(size, size, dtype=like.dtype, device=like.device)
    return torch.stack([ones.triu() if back else ones.tril() for back in reverse])


def order_of(steps: int, chunk: int, reverse: tuple[bool, ...], like: Tensor) -> Order:
    """The Order of scans over `steps`, in the dtype of `like`."""
    chunks = -(-steps // chunk)
    seen = triangles(chunk, reverse, like)
    middle = (seen - 0.5).transpose(1, 2)
    upto = triangles(chunks, reverse, like)
    itself = torch.eye(chunks, dtype=like.dtype, device=like.device)
    return Order(reverse, chunk, seen, middle, upto - itself, upto - itself / 2)


def chunk_length(steps: int) -> int:
    """Steps per chunk: of 12..24 the one that needs the least padding, then the largest."""
    return min(range(12, MAX_CHUNK + 1), key=lambda length: (-steps % length, -length))


def chunked(v: Tensor, chunk: int) -> Tensor:
    """(n, D, T, ...) -> (n, D, chunks, chunk, ...). Behind the end dt = a = 0: nothing is added or
    lost."""
    pad = -v.shape[2] % chunk
    if pad:
        v = F.pad(v, (0, 0) * (v.ndim - 3) + (0, pad))
    return v.unflatten(2, (-1, chunk))


def by_head(v: Tensor) -> Tensor:
    """(n, D, chunks, chunk, heads) -> (D, n, heads, chunks, chunk), to multiply with one matrix per
    direction."""
    return v.permute(1, 0, 4, 2, 3).contiguous()


def by_row(v: Tensor) -> Tensor:
    """by_head's inverse: to scale rows by."""
    return v.permute(1, 0, 3, 4, 2).contiguous()


class Scanned(NamedTuple):
    """What scan_gradient needs of a scan."""
    u: Tensor         # (n, D, chunks, chunk, heads x headdim): x from the middle
    fall: Tensor      # (n, D, chunks, chunk, heads): u = x fall
    rise: Tensor      # the same: from the chunk's middle to a row
    links: Tensor     # (D x n x heads, chunks, chunks): between two middles
    start: Tensor     # (n, D, chunks, heads x headdim, states): before a chunk
    mask: Tensor      # (n, D, chunks, chunk, chunk): c_i b_j' where row i sees column j


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor,
         order: Order) -> tuple[Tensor, Scanned]:
    """Mamba-2's scan S_t = exp(a_t) S_t-1 + dt_t x_t b_t', y_t = S_t c_t, in D directions at once,
    as matrix products over chunks (Dao & Gu, section 6): y, like x, and a Scanned.

    x (n, D, T, heads, headdim), dt and a (n, D, T, heads) with -MAX_DECAY <= a <= 0, b and c (n, D,
    T, states). Inside a chunk exp(a_j+1 + ... + a_i) is a factor of i times one of j, both measured
    from the chunk's middle so that neither overflows: all heads share one chunk x chunk matrix, and
    the rest is scaling of rows."""
    steps = x.shape[2]
    x, dt, a, b, c = (chunked(v, order.chunk) for v in (x, dt, a, b, c))
    a = by_head(a)
    links = chunk_links(a.sum(-1), order)
    level = a.flatten(1, 3) @ order.middle
    rise = by_row(level.view(a.shape)).exp()
    fall = dt / rise

    u = x * fall[..., None]
    u = u.flatten(-2)
    own = u.transpose(-1, -2) @ b
    start = relay(own, links)
    mask = c @ b.transpose(-1, -2)
    mask = mask * order.seen[:, None]
    inside = (mask @ u).flatten(0, 2)
    inherited = start.flatten(0, 2).transpose(1, 2)
    y = torch.baddbmm(inside, c.flatten(0, 2), inherited)
    y = y.view(x.shape) * rise[..., None]
    y = y.flatten(2, 3)[:, :, :steps]
    return y, Scanned(u, fall, rise, links, start, mask)


def chunk_links(total: Tensor, order: Order) -> Tensor:
    """exp of the log-decay from the middle of chunk j to that of i, 0 unless j comes before i.

    total (D, n, heads, chunks) of each chunk -> (D x n x heads, chunks, chunks). A sum of what lies
    between the two and no difference of two sums: no digit is lost, however long the window."""
    directions, chunks, _ = order.before.shape
    between = total.reshape(directions, -1, 1, chunks) * order.half[:, None]
    decay = between.flatten(1, 2) @ order.half
    decay = decay.unflatten(1, (-1, chunks))
    links = decay.exp() * order.before[:, None]
    return links.flatten(0, 1)


def relay(added: Tensor, links: Tensor) -> Tensor:
    """States at the middle of each chunk, from what each chunk adds there: (n, D, chunks, size,
    states) both. One product over the chunks, whatever their number."""
    n, directions, chunks, size, states = added.shape
    heads = len(links) // (n * directions)
    added = added.view(n, directions, chunks, heads, -1)
    added = added.permute(1, 0, 3, 2, 4).reshape(len(links), chunks, -1)
    found = torch.bmm(links, added).view(directions, n, heads, chunks, -1)
    found = found.permute(1, 0, 3, 2, 4)
    return found.reshape(n, directions, chunks, size, states)


def scan_gradient(dy: Tensor, growth: Tensor, x: Tensor, b: Tensor, c: Tensor, order: Order,
                  kept: Scanned) -> list[Tensor]:
    """Gradients of x, dt, a, b and c from that of y; growth (n, D, T, heads) is dy y summed over a
    head.

    With A_t the log-decay from the start to step t, y_t holds exp(A_t), what x_t adds to the state
    holds exp(-A_t), and nothing else holds A_t: its gradient is dy_t y_t - dx_t x_t, summed over a
    head."""
    steps = x.shape[2]
    dy, growth, x, b, c = (chunked(v, order.chunk) for v in (dy, growth, x, b, c))
    # the first factor gives e its layout, rows of one chunk after another
    e = kept.rise[..., None] * dy
    e = e.flatten(-2)

    d_start = e.transpose(-1, -2) @ c
    d_own = relay(d_start, kept.links.transpose(1, 2)).flatten(0, 2)
    d_mask = e @ kept.u.transpose(-1, -2)
    d_mask = (d_mask * order.seen[:, None]).flatten(0, 2)
    du = (kept.mask.transpose(-1, -2) @ e).flatten(0, 2)
    b, c, e = b.flatten(0, 2), c.flatten(0, 2), e.flatten(0, 2)
    du = torch.baddbmm(du, b, d_own.transpose(1, 2)).view(x.shape)
    db = torch.baddbmm(kept.u.flatten(0, 2) @ d_own, d_mask.transpose(1, 2), c)
    dc = torch.baddbmm(e @ kept.start.flatten(0, 2), d_mask, b)

    d_fall = (du * x).sum(-1)
    growth = torch.addcmul(growth, d_fall, kept.fall, value=-1)
    da = accumulate(growth, order)
    dx = du.mul_(kept.fall[..., None])
    d_dt = d_fall / kept.rise
    db, dc = (v.view(*x.shape[:4], -1) for v in (db, dc))
    found = [v.flatten(2, 3) for v in (dx, d_dt, da, db, dc)]
    return [v[:, :, :steps] for v in found]


def accumulate(growth: Tensor, order: Order) -> Tensor:
    """Gradient of each log-decay: the growth of its own and of all later steps, (n, D, chunks,
    chunk, heads) both."""
    growth = by_head(growth)
    later = growth.sum(-1).flatten(1, 2) @ order.before
    own = growth.flatten(1, 3) @ order.seen
    growth = own.view(growth.shape) + later.view(*growth.shape[:4], 1)
    return growth.permute(1, 0, 3, 4, 2)


def in_directions(v: Tensor, directions: int, steps: int) -> Tensor:
    """(n, T + CONV - 1, D x size), contiguous -> (n, D, T, size), a view: direction 1, which looks
    ahead where the other looks back, begins CONV - 1 rows later."""
    n, length, row = v.shape
    size = row // directions
    strides = (length * row, (CONV - 1) * row + size, row, 1)
    return v.as_strided((n, directions, steps, size), strides)


def per_direction(v: Tensor) -> Tensor:
    """(n, T, D, size) -> (D, n x T, size), a view: the rows of one matrix product per direction."""
    return v.flatten(0, 1).transpose(0, 1)


def at_a_time(x: Tensor) -> int:
    """Sequences of x (n, ...) that are worked on together: on a CPU few, so that what one operation
    writes, the next finds in cache."""
    if x.device.type != "cpu":
        return len(x)
    return max(1, BLOCK // x[0].numel())


class Kept(NamedTuple):
    """What Inner's gradient needs, beside what it needs of the scan."""
    mixed: Tensor
    taps: Tensor
    decay: Tensor
    skip: Tensor
    out: Tensor
    conv: Tensor      # (n, T + CONV - 1, D x (inner + 2 states)): after the convolution
    x: Tensor         # (n, D, T, heads, headdim): after SiLU
    b: Tensor         # (n, D, T, states)
    c: Tensor
    inside: Tensor    # (n, D, T, heads): step sizes before softplus
    dt: Tensor
    fade: Tensor      # tanh(dt decay)
    opened: Tensor    # (n, T, D, inner): gates after SiLU
    v: Tensor         # (n, D, T, inner): before the gate
    y: Tensor         # (n, T, D, inner): behind it
    h: Tensor         # (D, n x T, width): result of each direction
    rms: Tensor       # (D, n x T, 1)


class Inner(torch.autograd.Function):
    """A Mamba-2 layer between its first matrix and its residual end, all D directions: short
    convolution, SiLU, scan, gate, RMS norm and last matrix.

    mixed (n, T, D x (inner + 2 states) + D x inner + D x heads) holds rows of the convolution,
    gates, and step sizes before softplus; it, taps (D x (inner + 2 states), CONV) and bias may be
    16 bits wide. dt_bias, decay, skip (D, 1, heads), out (D, inner, width) -> (n, T, width).

    Differentiated by hand: autograd would keep twice as much, and pass over memory more often."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, taps: Tensor, bias: Tensor, dt_bias: Tensor,
                decay: Tensor, skip: Tensor, out: Tensor, order: Order) -> Tensor:
        directions, inner, width = out.shape
        n, steps, _ = mixed.shape
        rows, gate, raw = split_mixed(mixed, taps, out)
        image = rows.transpose(1, 2).unsqueeze(2)              # of height 1, channels last
        kernel = taps[:, None, None]
        conv = F.conv2d(image, kernel, bias, padding=(0, CONV - 1), groups=len(taps))
        conv = conv.squeeze(2).transpose(1, 2).contiguous()    # all rows that a tap sees
        active = F.silu(in_directions(conv, directions, steps))
        x = active[..., :inner].unflatten(-1, (skip.shape[-1], -1))
        states = active[..., inner:].to(out.dtype)
        b, c = states.chunk(2, -1)

        inside = raw.transpose(1, 2) + dt_bias
        dt = F.softplus(inside)
        fade = torch.tanh(dt * decay)
        z, scanned = scan(x, dt, fade * -MAX_DECAY, b, c, order)
        v = torch.addcmul(z, x, skip[..., None]).flatten(-2)
        opened = F.silu(gate)
        y = opened * v.transpose(1, 2)

        square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_()
        mean = square.div_(inner).add_(1e-5)
        rms = per_direction(torch.rsqrt(mean))
        # normalised behind the matrix, where it is narrow
        h = torch.bmm(per_direction(y), out).mul_(rms)
        kept = Kept(mixed, taps, decay, skip, out, conv, x, b, c, inside, dt, fade,
                    opened, v, y, h, rms)
        ctx.save_for_backward(*kept, *scanned)
        ctx.order = order
        return h.sum(0).view(n, steps, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        count = len(Kept._fields)
        kept = Kept(*ctx.saved_tensors[:count])
        scanned = Scanned(*ctx.saved_tensors[count:])
        with torch.autocast(g.device.type, enabled=False):
            # the parts of one tensor are filled in place: nothing is put together afterwards
            d_mixed = torch.empty(kept.mixed.shape, dtype=kept.mixed.dtype, device=g.device)
            d_rows, d_gate, d_raw = split_mixed(d_mixed, kept.taps, kept.out)
            dv, d_out = gate_gradient(g, d_gate, kept)
            dx, ddt, da, d_states, d_skip = inputs_gradient(dv, ctx.order, kept, scanned)
            d_dt_bias, d_decay = step_gradient(ddt, da, d_raw, kept)
            d_taps, d_bias = conv_gradient(dx, d_states, d_rows, kept)
        return d_mixed, d_taps, d_bias, d_dt_bias, d_decay, d_skip, d_out, None


def split_mixed(mixed: Tensor, taps: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows (n, T, D x (inner + 2 states)), gate (n, T, D, inner) and raw (n, T, D, heads),
    views."""
    directions, inner, _ = out.shape
    heads = mixed.shape[2] - len(taps) - directions * inner
    rows, gate, raw = mixed.split([len(taps), directions * inner, heads], -1)
    gate = gate.unflatten(-1, (directions, -1))
    raw = raw.unflatten(-1, (directions, -1))
    return rows, gate, raw


def gate_gradient(g: Tensor, d_gate: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """Back through the last matrix, the norm and the gate: fills d_gate, returns the gradients of
    v, as (n, T, D, inner), and of the matrix."""
    inner = kept.v.shape[3]
    _, gate, _ = split_mixed(kept.mixed, kept.taps, kept.out)
    y = per_direction(kept.y)
    g = g.reshape(1, -1, g.shape[-1])
    g = g * kept.rms
    dot = (g * kept.h).sum(-1, keepdim=True)
    d_out = y.transpose(1, 2) @ g
    dy = torch.bmm(g, kept.out.transpose(1, 2))
    dy.addcmul_(y, kept.rms * dot, value=-1 / inner)

    dy = dy.transpose(0, 1).view_as(kept.y)
    d_opened = dy * kept.v.transpose(1, 2)
    fill_silu_gradient(d_opened, gate, d_gate)
    return kept.opened * dy, d_out


def fill_silu_gradient(g: Tensor, x: Tensor, place: Tensor) -> None:
    """Back through silu(x), into `place`, a view of any layout."""
    if torch.compiler.is_compiling():
        # a compiler knows no results in place, and makes one kernel of both
        place.copy_(torch.ops.aten.silu_backward(g, x))
    else:
        torch.ops.aten.silu_backward.grad_input(g, x, grad_input=place)


def inputs_gradient(dv: Tensor, order: Order, kept: Kept, scanned: Scanned) -> tuple[Tensor, ...]:
    """Back through the skip and the scan: gradients of x, dt, a, of b and c together, of skip."""
    x = kept.x
    dv = dv.transpose(1, 2).unflatten(-1, x.shape[3:])
    through = (dv * x).sum(-1)
    d_skip = through.sum((0, 2)).view_as(kept.skip)
    # v is y of the scan and what the skip adds
    growth = (dv * kept.v.view(x.shape)).sum(-1)
    growth = torch.addcmul(growth, through, kept.skip, value=-1)
    dx, ddt, da, db, dc = scan_gradient(dv, growth, x, kept.b, kept.c, order, scanned)
    dx.addcmul_(dv, kept.skip[..., None])
    return dx, ddt, da, torch.cat([db, dc], -1), d_skip


def step_gradient(ddt: Tensor, da: Tensor, d_raw: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """Back through a = -MAX_DECAY tanh(softplus(raw + bias) decay): fills d_raw, returns the
    gradients of bias and decay."""
    d_fade = torch.ops.aten.tanh_backward(da, kept.fade)
    d_fade.mul_(-MAX_DECAY)
    d_decay = (d_fade * kept.dt).sum((0, 2))
    ddt = torch.addcmul(ddt, d_fade, kept.decay)
    d_inside = torch.ops.aten.softplus_backward(ddt, kept.inside, 1, 20)
    d_raw.copy_(d_inside.transpose(1, 2))
    d_dt_bias = d_inside.sum((0, 2))
    return d_dt_bias.view_as(kept.decay), d_decay.view_as(kept.decay)


def conv_gradient(dx: Tensor, d_states: Tensor, d_rows: Tensor,
                  kept: Kept) -> tuple[Tensor, Tensor]:
    """Back through SiLU and the short convolution: fills d_rows, returns the gradients of taps and
    bias."""
    conv, taps = kept.conv, kept.taps
    directions, inner, _ = kept.out.shape
    d_conv = torch.zeros(conv.shape, dtype=conv.dtype, device=conv.device)
    found = in_directions(d_conv, directions, dx.shape[2])
    silent = in_directions(conv, directions, dx.shape[2])
    fill_silu_gradient(dx.flatten(-2), silent[..., :inner], found[..., :inner])
    fill_silu_gradient(d_states, silent[..., inner:], found[..., inner:])

    image = d_conv.transpose(1, 2).unsqueeze(2)
    kernel = taps.flip(1)[:, None, None]
    image = F.conv2d(image, kernel, groups=len(taps))
    d_rows.copy_(image.squeeze(2).transpose(1, 2))
    rows, _, _ = split_mixed(kept.mixed, taps, kept.out)
    return taps_gradient(d_conv, rows), d_conv.sum((0, 1))


def taps_gradient(d_conv: Tensor, rows: Tensor) -> Tensor:
    """(channels, CONV) from the gradient of all rows that a tap sees, (n, T + CONV - 1, channels),
    and the rows (n, T, channels) before the convolution."""
    windows = d_conv.unfold(1, CONV, 1).transpose(2, 3)        # (n, T, CONV, channels)
    size = at_a_time(windows)
    parts = [(window * row[:, :, None]).sum((0, 1))
             for window, row in zip(windows.split(size), rows.split(size))]
    found = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return found.flip(0).T                                     # the first tap sees the earliest row


def working_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x compute in: 16 bits under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Mamba2(nn.Module):
    """A stack of residual, pre-norm Mamba-2 layers, (n, T, width) -> the same; bidirectional or
    causal.

    Nothing is flipped: the backward scan is the upper triangle, and both directions share one
    projection, one convolution and every product."""

    def __init__(self, width: int, layers: int, state: int, headdim: int,
                 bidirectional: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        inner = 2 * width
        if inner % headdim:
            raise ValueError(f"Mamba-2: headdim {headdim} must divide 2 x width = {inner}")
        self.reverse = (False, True) if bidirectional else (False,)
        self.layers, self.dropout = layers, dropout
        self.inner, self.mixed, self.heads = inner, inner + 2 * state, inner // headdim
        d = len(self.reverse)
        columns = d * (self.mixed + inner + self.heads)
        heads = layers * d * self.heads
        self.project = weight(layers, width, columns, fan_in=width)
        self.conv = weight(layers, d * self.mixed, CONV, fan_in=CONV)
        self.conv_bias = vector(layers, d * self.mixed)
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        # softplus of it is `step`
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = vector(heads, value=1)
        self.out = weight(layers, d, inner, width, fan_in=d * inner, gain=1 / math.sqrt(layers))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.run(part) for part in x.split(at_a_time(x))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run(self, x: Tensor) -> Tensor:
        """All layers over a part of the sequences."""
        steps = x.shape[1]
        order = order_of(steps, chunk_length(steps), self.reverse, x)
        kept = keep_features(self.layers, x, self.dropout, self.training)
        parts = self.parts(working_dtype(x))
        for factor, project, *rest in zip(kept, *parts):
            mixed = norm(x) @ project
            with torch.autocast(x.device.type, enabled=False):
                y = Inner.apply(mixed, *rest, order)
            x = residual(x, y, factor)
        return x

    def parts(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """The parameters of each layer, those of all layers cast and prepared at once."""
        d = len(self.reverse)
        decay = self.a_log.exp() / MAX_DECAY
        bias = self.conv_bias.view(self.layers, -1)
        narrow = [v.to(dtype) for v in (self.project, self.conv, bias)]
        heads = [v.view(self.layers, d, 1, -1) for v in (self.dt_bias, decay, self.skip)]
        return [v.unbind(0) for v in (*narrow, *heads, self.out)]


# ---- TCN ----

class Windows(torch.autograd.Function):
    """(n, L, width) -> (n, L, kernel x width) of `dtype`: around each step, `kernel` steps
    `dilation` apart, zeros beyond the ends. One copy; its gradient is a sum of slices, in place and
    in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, dilation: int, dtype: torch.dtype) -> Tensor:
        ctx.kernel, ctx.dilation = kernel, dilation
        reach = dilation * (kernel // 2)
        padded = F.pad(x.to(dtype), (0, 0, reach, reach))
        windows = padded.unfold(1, 2 * reach + 1, 1)[..., ::dilation]
        return windows.transpose(2, 3).contiguous().flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        n, length, _ = g.shape
        reach = ctx.dilation * (ctx.kernel // 2)
        g = g.unflatten(2, (ctx.kernel, -1))
        shape = (n, length + 2 * reach, g.shape[3])
        d_padded = torch.zeros(shape, dtype=torch.float32, device=g.device)
        for k in range(ctx.kernel):
            start = k * ctx.dilation
            d_padded[:, start:start + length].add_(g[:, :, k])
        return d_padded[:, reach:reach + length], None, None, None


class TCN(nn.Module):
    """Residual dilated convolutions, (B, L, width) -> the same. Each is one matrix product over its
    taps."""

    def __init__(self, width: int, blocks: int, kernel: int, dropout: float) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(
                f"TCN: tcn_kernel {kernel} must be odd, to see as much before as after")
        self.kernel, self.dropout = kernel, dropout
        seen = kernel * width
        self.taps = nn.ParameterList(weight(seen, width, fan_in=seen) for _ in range(blocks))
        self.bias = vector(blocks, width)

    def forward(self, x: Tensor) -> Tensor:
        dtype = working_dtype(x)
        biases = self.bias.to(dtype).view(len(self.taps), -1)
        kept = keep_features(len(self.taps), x, self.dropout, self.training)
        for i, (taps, bias, factor) in enumerate(zip(self.taps, biases, kept)):
            seen = Windows.apply(norm(x), self.kernel, 2 ** (i % 4), dtype)
            y = F.gelu(F.linear(seen, taps.T, bias))
            x = residual(x, y, factor)
        return x


# ---- graph ----

def pairs(channels: int) -> Tensor:
    """(channels^2, pairs) of 0 and 1, picks the pairs i < j: a gather whose backward is a matrix
    product."""
    i, j = torch.triu_indices(channels, channels, 1)
    return F.one_hot(i * channels + j, channels * channels).T.float()


def sparse_adjacency(edges: Tensor, neighbours: int) -> Tensor:
    """Dense (..., C, C) -> symmetric, each electrode's strongest `neighbours` kept. Ties go by
    position."""
    channels = edges.shape[-1]
    order = edges.detach().argsort(dim=-1, descending=True, stable=True)
    strongest = order[..., :min(neighbours, channels - 1), None]
    kept = (strongest == torch.arange(channels, device=edges.device)).any(-2)
    edges = edges * kept
    return (edges + edges.transpose(-1, -2)) / 2


def normalised(adjacency: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 (Kipf & Welling, ICLR 2017). The self-loop keeps every degree >= 1."""
    looped = adjacency + torch.eye(adjacency.shape[-1], device=adjacency.device)
    scale = looped.sum(-1).rsqrt()
    return scale[..., :, None] * looped * scale[..., None, :]


@torch.no_grad()
def laplacian_encoding(operator: Tensor, count: int) -> Tensor:
    """Eigenvectors of I - operator for the smallest eigenvalues, (..., C, C) -> (..., C, count),
    fp32.

    Sign: the largest entry is positive. No gradient: it goes with 1 / (eigenvalue gap). Fewer than
    `count` electrodes leave zeros. NaN, at which the solver would stop, reaches the logits by the
    streams instead."""
    operator = torch.nan_to_num(operator.float())
    vectors = torch.linalg.eigh(-operator).eigenvectors
    vectors = vectors[..., :count]
    largest = vectors.abs().argmax(-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, largest).sign()
    return F.pad(vectors, (0, count - vectors.shape[-1]))


class DynamicGraph(nn.Module):
    """Electrode streams (B, C, L, width) -> a sparse symmetric adjacency per graph, (B, G, C,
    C)."""
    pairs: Tensor

    def __init__(self, channels: int, c: dict[str, Any]) -> None:
        super().__init__()
        width, edge, self.heads = c["node_width"], c["edge_width"], c["edge_heads"]
        if width % self.heads:
            raise ValueError(f"model: edge_heads {self.heads} must divide node_width {width}")
        self.steps, self.neighbours = c["graph_steps"], c["neighbours"]
        self.query = weight(width, width, fan_in=width)
        self.lift = weight(self.heads, edge, fan_in=self.heads)
        self.lift_bias = vector(edge)
        self.scan = Mamba2(
            edge, c["edge_layers"], c["edge_state"], c["edge_headdim"], dropout=c["dropout"])
        self.score = weight(edge, 1, fan_in=edge)
        self.score_bias = vector(1)
        self.register_buffer("pairs", pairs(channels), persistent=False)

    def similarity(self, streams: Tensor) -> Tensor:
        """Cosine of every pair of electrodes over each graph's steps, per head: (B, G, heads,
        C^2)."""
        batch, channels, length, _ = streams.shape
        graphs = length // self.steps
        q = streams @ self.query
        q = q.view(batch, channels, graphs, self.steps, self.heads, -1)
        # (B, G, heads, C, steps * width / heads)
        q = q.permute(0, 2, 4, 1, 3, 5).flatten(-2)
        square = q.square().sum(-1, keepdim=True)
        q = q * torch.rsqrt(square + 1e-3)
        similar = q @ q.transpose(-1, -2)
        return similar.flatten(-2)

    def forward(self, streams: Tensor) -> Tensor:
        batch, channels, length, _ = streams.shape
        picked = self.pairs.shape[1]
        with torch.autocast(streams.device.type, enabled=False):
            # (B, G, heads, pairs) -> a series per pair, (B * pairs, G, heads)
            similar = self.similarity(streams.float()) @ self.pairs
            series = similar.permute(0, 3, 1, 2)
            series = series.reshape(batch * picked, -1, self.heads)
            series = F.linear(series, self.lift.T, self.lift_bias)
            lifted = self.scan(series)
            edges = F.linear(norm(lifted), self.score.T, self.score_bias)
            edges = torch.sigmoid(edges).view(batch, picked, -1)
            edges = edges.transpose(1, 2) @ self.pairs.T
            edges = edges.unflatten(-1, (channels, channels))
            edges = edges + edges.transpose(-1, -2)
            return sparse_adjacency(edges, self.neighbours)


class GraphConvolutions(nn.Module):
    """Residual graph convolutions over electrode streams (B, C, L, width), with a positional
    encoding.

    SSGC: (0.05 I + 0.95 / 2 (A + A^2)) x W. The two hops are one C x C operator for all steps of a
    graph."""

    def __init__(self, width: int, layers: int, steps: int, eigenvectors: int,
                 dropout: float) -> None:
        super().__init__()
        self.steps, self.eigenvectors, self.dropout = steps, eigenvectors, dropout
        self.mix = weight(layers, width, width, fan_in=width)
        self.encode = weight(layers, eigenvectors, width, fan_in=eigenvectors)
        self.bias = vector(layers, width)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        batch, channels, length, width = x.shape
        with torch.autocast(x.device.type, enabled=False):
            hop = normalised(adjacency)
            itself = torch.eye(channels, device=x.device)
            operator = 0.05 * itself + 0.475 * (hop + hop @ hop)
            encoding = laplacian_encoding(hop, self.eigenvectors)
            encoding = encoding[..., None, :]                      # (B, G, C, 1, eigenvectors)
        x = x.view(batch, channels, -1, self.steps, width)
        x = x.transpose(1, 2)                                      # (B, G, C, steps, width)
        layers = len(self.mix)
        kept = keep_features(layers, x.reshape(batch, -1, width), self.dropout, self.training)
        biases = self.bias.view(layers, -1)
        for mix, encode, bias, factor in zip(self.mix, self.encode, biases, kept):
            h = norm(x) @ mix + F.linear(encoding, encode.T, bias)
            h = operator.to(h.dtype) @ h.flatten(-2)
            h = F.gelu(h.view(x.shape))
            if factor is not None:
                factor = factor[:, :, None, None]
            x = residual(x, h, factor)
        return x.transpose(1, 2).reshape(batch, channels, length, width)


# ---- the detector ----

class V3(nn.Module):
    """The detector for `channels` electrodes or derivations. Keyword arguments override DEFAULTS.

    forward: (B, channels, T) float32 EEG at 256 Hz, in units of the recording's own amplitude, to
    (B, T) logits. T >= 1; what is missing to a whole graph is filled with zeros and cut off
    again."""

    def __init__(self, channels: int = 19, **config: Any) -> None:
        super().__init__()
        c = settings(config)
        if channels < 2:
            raise ValueError(f"model: {channels} channel, a graph needs at least 2")
        self.channels, self.hop, self.graph_steps = channels, c["hop"], c["graph_steps"]
        self.baseline = c["baseline"]           # what x is divided by, see eeg/baseline.py
        stem, node, tcn, drop = c["stem_width"], c["node_width"], c["tcn_width"], c["dropout"]
        fine = self.fine = c["hop"] // STRIDE                          # stem steps per stream step
        self.filters = nn.Parameter(wavelets(TAPS * STRIDE, stem))
        self.filters_bias = nn.Parameter(torch.empty(stem).uniform_(-0.5, 0.5))
        self.embed = weight(fine * stem, 4 * node, fan_in=2 * fine * stem, gain=2)
        self.embed_bias = vector(4 * node)
        self.reduce = weight(2 * node, node, fan_in=2 * node)
        self.gather = weight(channels * node, tcn, fan_in=channels * node)
        self.tcn = TCN(tcn, c["tcn_blocks"], c["tcn_kernel"], drop)
        self.spread = weight(tcn, channels * node, fan_in=tcn)
        self.spread_bias = nn.Parameter(torch.randn(channels * node) * 0.1)
        self.nodes = Mamba2(
            node, c["node_layers"], c["node_state"], c["node_headdim"], dropout=drop)
        self.graph = DynamicGraph(channels, c)
        self.convolve = GraphConvolutions(
            node, c["graph_layers"], c["graph_steps"], c["eigenvectors"], drop)
        self.head = Head(channels, node, tcn, stem, c["head_width"], fine, c["prior"])

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise ValueError(
                f"model: input is {tuple(x.shape)}, expected (batch, {self.channels}, samples)")
        batch, channels, samples = x.shape
        x = F.pad(x.float(), (0, -samples % (self.hop * self.graph_steps)))
        local = self.stem(x)                                           # (B, C, T / 16, stem)
        streams = self.electrodes(local)                               # (B, C, L, node)
        length = streams.shape[2]
        wide = self.tcn(norm(streams.transpose(1, 2).flatten(2)) @ self.gather)
        spread = (norm(wide) @ self.spread + self.spread_bias).view(batch, length, channels, -1)
        streams = norm(streams + spread.transpose(1, 2))
        adjacency = self.graph(streams)
        streams = self.nodes(streams.flatten(0, 1)).view(streams.shape)
        streams = self.convolve(streams, adjacency)
        return self.head(streams, wide, local)[:, :samples]

    def stem(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T / 16, stem): companded, then filters of 250 ms, 16 times a second.

        x / (1 + x^2)^1/4 is linear below one amplitude and a square root above: 1000 amplitudes
        become 32."""
        x = x * torch.rsqrt(torch.hypot(x, x.new_ones(())))
        x = x.to(working_dtype(x))
        x = F.pad(x, (STRIDE, (TAPS - 2) * STRIDE))
        frames = x.unfold(-1, TAPS * STRIDE, STRIDE).contiguous()
        return F.gelu(F.linear(frames, self.filters.T, self.filters_bias))

    def electrodes(self, local: Tensor) -> Tensor:
        """(B, C, T / 16, stem) -> (B, C, L, node): each step embeds its own and the preceding
        `hop`."""
        patches = local.unflatten(2, (-1, self.fine)).flatten(3)
        both = F.linear(patches, self.embed.T, self.embed_bias)
        before, here = both.chunk(2, -1)
        before = F.pad(before, (0, 0, 1, 0))[:, :, :-1]
        return F.gelu(here + before) @ self.reduce


class Head(nn.Module):
    """Graph streams (B, C, L, node), TCN (B, L, tcn) and stem (B, C, L * fine, stem) -> logits (B,
    T).

    Electrodes are seen twice: each by its own weights, and pooled by an attention that does not
    care where a seizure is. The same attention pools the stem's 16 Hz features, which place onset
    and end."""

    def __init__(self, channels: int, node: int, tcn: int, stem: int, width: int, fine: int,
                 prior: float) -> None:
        super().__init__()
        self.fine = fine
        self.attend = weight(node, 1, fan_in=node)
        self.from_all = weight(channels * node, width, fan_in=channels * node)
        self.from_pooled = weight(node, width, fan_in=node)
        self.from_tcn = weight(tcn, width, fan_in=tcn)
        self.bias = vector(width)
        self.to_fine = weight(width, fine * LOCAL, fan_in=width)
        self.from_stem = weight(stem, LOCAL, fan_in=stem)
        self.fine_bias = vector(LOCAL)
        self.to_samples = weight(LOCAL, STRIDE, fan_in=LOCAL, gain=0.1)
        self.to_step = weight(width, 1, fan_in=width, gain=0.1)
        self.logit = vector(1, value=math.log(prior / (1 - prior)))

    def forward(self, streams: Tensor, wide: Tensor, local: Tensor) -> Tensor:
        batch, channels, length, _ = streams.shape
        streams = norm(streams).to(working_dtype(streams))
        share = torch.softmax((streams @ self.attend).float(), 1)      # (B, C, L, 1)
        pooled = (streams * share).sum(1)
        every = streams.transpose(1, 2).flatten(2)
        h = F.linear(every, self.from_all.T, self.bias)
        h = F.gelu(h + pooled @ self.from_pooled + norm(wide) @ self.from_tcn)
        detail = (local @ self.from_stem).view(batch, channels, length, -1)
        detail = (detail * share).sum(1) + h @ self.to_fine            # (B, L, fine * local)
        detail = detail.unflatten(-1, (self.fine, LOCAL))
        # 16 bits have too few values for logits: the last products are fp32
        with torch.autocast(streams.device.type, enabled=False):
            detail = F.gelu(detail.float() + self.fine_bias) @ self.to_samples
            logits = detail.flatten(2) + h.float() @ self.to_step
            return logits.flatten(1) + self.logit
