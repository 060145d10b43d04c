"""V3: EEG seizure detector in pure torch, (B, C, T) normalised EEG at 256 Hz -> (B, T) logits.

    python bench/model.py                      speed, memory and parameters beside other detectors
    python -m pytest tests/test_model.py

    EEG (B, C, T)
      stem          per electrode, 256 -> 16 Hz -> L = T / 64 steps, 4 a second         (B, C, L, 64)
      TCN           all electrodes together, 8 dilated residual blocks                  (B, L, 496)
      streams       one per electrode: its own features + what the TCN says of it       (B, C, L, 64)
      node stream   bidirectional Mamba-2 over time, one sequence per electrode         (B, C, L, 64)
      edge stream   similarity of each pair of electrodes, once a second, lifted and filtered by a
                    small bidirectional Mamba-2; the strongest 3 per electrode          (B, L / 4, C, C)
      graph         Laplacian positional encoding, two graph convolutions               (B, C, L, 64)
      head          graph and TCN at 4 steps a second, local detail at 16 Hz            (B, T)

What was chosen, and why
- 4 stream steps and 1 graph a second. Seizures last seconds; what is faster (spikes, rhythm) is read by
  the stem, whose 16 Hz features also reach the head directly. Narrow sequence layers are bound by memory
  traffic: 16 steps and 16 graphs a second would cost 4 and 16 times as much of it.
- Nine tenths of the parameters are the TCN's wide matrices at 4 steps a second: 7 GFLOP a window in large
  matrix products, which run near the peak of the machine.
- Mamba-2 heads of 32 channels: the work that is no matrix product grows with the number of heads.
- Both directions, and all layers of a Mamba-2 stack, share one parameter tensor per kind: few tensors make
  an optimizer step and a snapshot cheap. Norms carry no gain: the next matrix would only repeat it.
- Dropout drops a feature for a whole sequence: on a CPU, drawing a random number per element costs more
  than the layer it follows.

Stable by construction: the input is companded, every stream enters its layers normalised, similarities are
cosines, edges lie in (0, 1), the graph operator has norm <= 1, decays are bounded so that no exponential
overflows, eigenvectors carry no gradient. Scans, edges and eigenvectors stay in fp32 under autocast. A NaN
in the input gives NaN logits, never a number. Deterministic on CPU and GPU: matrix products, pads, stable
sorts and elementwise operations; no scatter, cumsum or interpolation.

Papers: Mamba-2 (Dao & Gu, ICML 2024), TCN (Bai et al., 2018), Laplacian encoding (Dwivedi & Bresson, 2021),
SSGC (Zhu & Koniusz, ICLR 2021), prior of the last bias (Lin et al., ICCV 2017).
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

DEFAULTS = {
    "hop": 64,              # samples per stream step: 4 steps a second
    "graph_steps": 4,       # stream steps per graph: one graph a second
    "stem_width": 64,       # filters per electrode at 16 Hz
    "tcn_width": 496,       # channels of the TCN
    "tcn_blocks": 8,        # residual blocks, dilation 1, 2, 4, 8, 1, 2, ...
    "tcn_kernel": 7,        # taps; 8 blocks see 45 s
    "node_width": 64,       # features of an electrode stream
    "node_layers": 6,       # bidirectional Mamba-2 layers over each electrode
    "node_state": 16,       # state size of a node scan
    "node_headdim": 32,     # channels per head of a node scan
    "edge_heads": 4,        # similarities per pair of electrodes
    "edge_width": 16,       # features of an edge stream
    "edge_layers": 2,       # bidirectional Mamba-2 layers over each edge
    "edge_state": 8,        # state size of an edge scan
    "edge_headdim": 16,     # channels per head of an edge scan
    "neighbours": 3,        # strongest edges kept per electrode
    "eigenvectors": 16,     # Laplacian encoding: eigenvectors of the smallest eigenvalues
    "graph_layers": 2,      # graph convolutions
    "head_width": 424,      # hidden units of the head
    "dropout": 0.1,         # share of features dropped, per sequence
    "prior": 0.05,          # probability of seizure that an untrained model gives
}
SMALL = {                   # 160,000 parameters, for smoke runs and tests on a CPU
    **DEFAULTS, "stem_width": 16, "tcn_width": 64, "tcn_blocks": 4, "tcn_kernel": 5, "node_width": 16,
    "node_layers": 1, "node_state": 8, "edge_heads": 2, "edge_width": 4, "edge_layers": 1, "edge_state": 4,
    "edge_headdim": 8, "eigenvectors": 4, "graph_layers": 1, "head_width": 64, "dropout": 0.05}

STRIDE = 16                 # samples per stem step: 16 Hz
TAPS = 4                    # a stem filter sees TAPS * STRIDE samples, 250 ms
CONV = 4                    # taps of Mamba-2's short convolution
MAX_DECAY = 2.5             # largest log-decay per step: 8 % is left
MAX_CHUNK = 24              # MAX_DECAY * MAX_CHUNK = 60: any two factors of a scan multiply inside fp32
BLOCK = 150_000             # numbers at a time that a CPU works on, so that they stay in its cache: 0.6 MB


def settings(config):
    """DEFAULTS overridden by `config`, checked. Raises ValueError."""
    unknown = sorted(set(config) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"model: unknown setting {unknown[0]!r}; known are {', '.join(DEFAULTS)}")
    c = {**DEFAULTS, **config}
    for name, default in DEFAULTS.items():
        if type(default) is int and c[name] < 1:
            raise ValueError(f"model: {name} must be at least 1, not {c[name]}")
    if not 0 <= c["dropout"] < 1 or not 0 < c["prior"] < 1:
        raise ValueError(f"model: dropout and prior must lie between 0 and 1, not be {c['dropout']} and {c['prior']}")
    if c["hop"] % STRIDE:
        raise ValueError(f"model: hop {c['hop']} must be a multiple of {STRIDE} samples")
    return c


def build(channels, settings):
    """The detector for `channels` electrodes or derivations; another model is put in its place here alone."""
    return V3(channels, **settings)


def norm(x):
    """Layer normalisation without gain and bias, over the last axis, as fp32."""
    return F.layer_norm(x.float(), x.shape[-1:])


def weight(*shape, fan_in, gain=1.0):
    """A matrix (or a stack of them) with standard deviation gain / sqrt(fan_in)."""
    return nn.Parameter(torch.randn(*shape) * (gain / math.sqrt(fan_in)))


def vector(*shape, value=0.0):
    """A stack of vectors kept flat: optimizers know by ndim what not to decay."""
    return nn.Parameter(torch.full((math.prod(shape),), float(value)))


def keep_features(layers, x, p, training):
    """Dropout of whole features for every layer of a stack: a factor (n, 1, d) for x (n, T, d) each, one
    draw per sequence and feature; None where nothing is dropped."""
    if not training or p == 0:
        return [None] * layers
    return F.dropout(x.new_ones(layers, x.shape[0], 1, x.shape[2]), p)


def residual(x, y, kept):
    """x + y, of which the features that `kept` gives are left."""
    return x + y if kept is None else torch.addcmul(x, y, kept)


def wavelets(taps, count):
    """(taps, count) windowed sines of unit energy, 1 to 64 Hz, random phases: where an EEG has its power."""
    time = torch.arange(taps)[:, None] / 256
    frequency = 64 ** (torch.arange(count) / max(1, count - 1))
    waves = torch.sin(2 * math.pi * (time * frequency + torch.rand(count)))
    waves = waves * torch.hann_window(taps + 2)[1:-1, None]
    return waves / waves.norm(dim=0)


# ---- Mamba-2 ----

class Order(NamedTuple):
    """How the scans of a stack run through their chunks; made once for all layers. D directions."""
    reverse: tuple              # of D: from the last step to the first?
    chunk: int                  # steps of a chunk
    seen: torch.Tensor          # (D, chunk, chunk) of 0 and 1: row i sees column j
    middle: torch.Tensor        # (D, chunk, chunk): log-decays of a chunk -> levels from its middle
    before: torch.Tensor        # (D, chunks, chunks) of 0 and 1: chunk j comes before chunk i
    half: torch.Tensor          # before, and 1/2 on the diagonal: up to the middle of chunk i


def triangles(size, reverse, like):
    """(D, size, size) of 0 and 1, row i may see column j: lower for a scan ahead, else upper."""
    ones = torch.ones(size, size, dtype=like.dtype, device=like.device)
    return torch.stack([ones.triu() if back else ones.tril() for back in reverse])


def order_of(steps, chunk, reverse, like, streamed=False):
    """The Order of scans over `steps`, in the dtype of `like`. A streamed one has two more chunks,
    which hold the state before the first step and the one after the last."""
    chunks = -(-steps // chunk) + 2 * streamed
    seen = triangles(chunk, reverse, like)
    upto = triangles(chunks, reverse, like)
    itself = torch.eye(chunks, dtype=like.dtype, device=like.device)
    before = upto - itself
    return Order(reverse, chunk, seen, (seen - 0.5).transpose(1, 2), before, before + itself / 2)


def chunk_length(steps):
    """Steps per chunk: of 12..24 the one that needs the least padding, then the largest."""
    return min(range(12, MAX_CHUNK + 1), key=lambda length: (-steps % length, -length))


def chunked(v, chunk, dim):
    """(..., T, ...) -> (..., chunks, chunk, ...). Behind the end dt = a = 0: nothing is added or lost."""
    pad = -v.shape[dim] % chunk
    if pad:
        v = F.pad(v, (0, 0) * (v.ndim - 1 - dim) + (0, pad))
    return v.unflatten(dim, (-1, chunk))


def per_row(v):
    """(D, n, heads, chunks, chunk) -> (n, D, chunks, chunk, heads, 1), to scale rows by. A view."""
    return v.permute(1, 0, 3, 4, 2)[..., None]


def per_step(v):
    """(n, D, T, heads) -> (D, n, heads, T), as dt and a are laid out. A view."""
    return v.permute(1, 0, 3, 2)


def relay(added, links, state, reverse):
    """States at the middle of each chunk, from what each adds there: (n, D, chunks, size, states) both.

    links (D x n x heads, chunks, chunks) is the share of chunk j's that is left at chunk i. A state
    (n, heads, headdim, states) is a chunk of its own before the first one, and a last one shows what
    is left behind the end: one product over the chunks, whatever their number."""
    n, directions, chunks, size, states = added.shape
    heads = len(links) // (n * directions)
    added = added.view(n, directions, chunks, heads, -1).permute(1, 0, 3, 2, 4)
    if state is not None:
        first = state.reshape(1, n, heads, 1, -1)
        parts = [first, added, torch.zeros_like(first)]
        added = torch.cat(parts[::-1] if reverse[0] else parts, 3)
    found = (links @ added.reshape(len(links), links.shape[1], -1)).view(added.shape)
    last = None
    if state is not None:
        last = found[0, :, :, 0 if reverse[0] else -1].reshape(state.shape)
        found = found[:, :, :, 1:-1]
    return found.permute(1, 0, 3, 2, 4).reshape(n, directions, chunks, size, states), last


def ssd(x, dt, a, b, c, reverse=False, state=None, chunk=None):
    """Mamba-2's scan S_t = exp(a_t) S_t-1 + dt_t x_t b_t', y_t = S_t c_t, as matrix products over chunks.

    x (n, T, heads, headdim), dt and a (n, T, heads) with -MAX_DECAY <= a <= 0, b and c (n, T, states).
    reverse runs from the last step to the first; state (n, heads, headdim, states) is S before the
    first step. Returns y like x, and S after the last step (None without a state). Dao & Gu, ICML
    2024, section 6."""
    chunk = chunk or chunk_length(x.shape[1])
    order = order_of(x.shape[1], chunk, (reverse,), x, state is not None)
    x, dt, a, b, c = (v[:, None] for v in (x, dt, a, b, c))
    y, last, _ = scan(x, per_step(dt), per_step(a), b, c, state, order)
    return y[:, 0], last


def scan(x, dt, a, b, c, state, order):
    """ssd in D directions at once, and what scan_gradient needs of it.

    x (n, D, T, heads, headdim), dt and a (D, n, heads, T), b and c (n, D, T, states). Inside a chunk
    exp(a_j+1 + ... + a_i) is a factor of i times one of j, both measured from the chunk's middle so
    that neither overflows: all heads share one chunk x chunk matrix, and the rest is scaling of rows.
    Between the middles of two chunks the decay is a sum of negative numbers: no digit is lost."""
    n, directions, steps, heads, headdim = x.shape
    x, b, c = (chunked(v, order.chunk, 2) for v in (x, b, c))
    dt, a = (chunked(v, order.chunk, 3) for v in (dt, a))
    links = chunk_links(a.sum(-1), order)

    level = a.reshape(directions, -1, order.chunk) @ order.middle
    rise = level.exp().view(a.shape)
    fall = dt / rise
    u = (x * per_row(fall)).flatten(-2)                        # (n, D, chunks, chunk, heads x headdim)
    start, last = relay(u.transpose(-1, -2) @ b, links, state, order.reverse)

    mask = (c @ b.transpose(-1, -2)) * order.seen[:, None]
    own = (mask @ u).flatten(0, 2)
    y = torch.baddbmm(own, c.flatten(0, 2), start.flatten(0, 2).transpose(1, 2))
    y = (y.view(x.shape) * per_row(rise)).flatten(2, 3)[:, :, :steps]
    return y, last, (fall, rise, links, start, mask, last)


def chunk_links(total, order):
    """exp of the log-decay from the middle of chunk j to that of i, 0 unless j comes before i.

    total (D, n, heads, chunks) of each chunk -> (D x n x heads, chunks, chunks)."""
    directions, chunks = len(order.reverse), order.before.shape[1]
    if chunks > total.shape[-1]:                               # the chunks of the states decay nothing
        total = F.pad(total, (1, 1))
    steps = total.reshape(directions, -1, 1, chunks) * order.half[:, None]
    decay = (steps.flatten(1, 2) @ order.half).view(directions, -1, chunks, chunks)
    return (decay.exp() * order.before[:, None]).flatten(0, 1)


def scan_gradient(dy, growth, after, x, b, c, order, kept):
    """Gradients of x, dt, a, b, c and state, from those of y and of the state after the last step;
    growth (n, D, T, heads) is dy y summed over a head.

    With A_t the log-decay from the start to step t, y_t holds exp(A_t), what x_t adds to the state holds
    exp(-A_t), and nothing else holds A_t: its gradient is dy_t y_t - dx_t x_t, summed over a head."""
    fall, rise, links, start, mask, last = kept
    steps, chunk = x.shape[2], order.chunk
    dy, growth, x, b, c = (chunked(v, chunk, 2) for v in (dy, growth, x, b, c))
    u = (x * per_row(fall)).flatten(-2)
    e = (dy * per_row(rise)).flatten(-2)

    backwards = tuple(not back for back in order.reverse)
    d_own, d_state = relay(e.transpose(-1, -2) @ c, links.transpose(1, 2), after, backwards)
    d_mask = (e @ u.transpose(-1, -2)) * order.seen[:, None]
    du = (mask.transpose(-1, -2) @ e).flatten(0, 2)
    du = torch.baddbmm(du, b.flatten(0, 2), d_own.flatten(0, 2).transpose(1, 2)).view(x.shape)
    db = torch.baddbmm((u @ d_own).flatten(0, 2), d_mask.flatten(0, 2).transpose(1, 2), c.flatten(0, 2))
    dc = torch.baddbmm((e @ start).flatten(0, 2), d_mask.flatten(0, 2), b.flatten(0, 2))

    d_fall = (du * x).sum(-1)                                  # (n, D, chunks, chunk, heads)
    growth = torch.addcmul(growth, d_fall, per_row(fall)[..., 0], value=-1)
    d_fall, growth = (v.permute(1, 0, 4, 2, 3) for v in (d_fall, growth))
    da = accumulate(growth, after, last, order)
    dx = du.mul_(per_row(fall))
    ahead = (v.flatten(2, 3)[:, :, :steps] for v in (dx, db.view(b.shape), dc.view(c.shape)))
    late = (v.flatten(3, 4)[..., :steps] for v in (d_fall / rise, da))
    return *ahead, *late, d_state


def accumulate(growth, after, last, order):
    """Gradient of each log-decay: the growth of its own and of all later steps, (D, n, heads, chunks,
    chunk) both. What the state after the last step gains is later than all of them."""
    directions, n, heads, chunks, chunk = growth.shape
    growth = growth.reshape(directions, -1, chunk)
    before = order.before if last is None else order.before[:, 1:-1, 1:-1]
    later = growth.sum(-1).view(directions, -1, chunks) @ before
    later = later.view(directions, n, heads, chunks, 1)
    if last is not None:
        later = later + (after * last).sum((-1, -2)).view(1, n, heads, 1, 1)
    return (growth @ order.seen).view(directions, n, heads, chunks, chunk) + later


def in_directions(v, directions, first, steps):
    """(n, L, D x size), contiguous -> (n, D, steps, size), a view: row t of direction 0 is row first + t,
    that of direction 1, which looks ahead where the other looks back, stands CONV - 1 rows later."""
    n, length, row = v.shape
    size = row // directions
    strides = (length * row, (CONV - 1) * row + size, row, 1)
    return v[:, first:].as_strided((n, directions, steps, size), strides)


def split_mixed(mixed, taps, out, steps):
    """rows (n, T, D x (inner + 2 states)), gate (n, steps, D, inner) and raw dt (D, n, heads, steps)."""
    directions, inner, _ = out.shape
    heads = mixed.shape[2] - len(taps) - directions * inner
    rows, gate, raw = mixed.split([len(taps), directions * inner, heads], -1)
    gate = gate[:, -steps:].unflatten(-1, (directions, inner))
    raw = raw[:, -steps:].unflatten(-1, (directions, -1))
    return rows, gate, per_step(raw.transpose(1, 2)).contiguous()


def split_inputs(conv, out, skip, first, steps):
    """The convolution's rows after SiLU: x (n, D, steps, heads, headdim), b and c (n, D, steps, states).
    x keeps its 16 bits, b and c enter matrix products as fp32."""
    directions, inner, _ = out.shape
    active = F.silu(in_directions(conv, directions, first, steps))
    x = active[..., :inner].unflatten(-1, (len(skip) // directions, -1))
    b, c = active[..., inner:].to(out.dtype).chunk(2, -1)
    return x, b, c


def taps_gradient(d_conv, rows):
    """(channels, CONV) from the gradient of all rows that a tap sees, (n, T + CONV - 1, channels), and the
    rows (n, T, channels) before the convolution."""
    n, length, channels = rows.shape
    strides = (d_conv.shape[1] * channels, channels, channels, 1)
    windows = d_conv.as_strided((n, length, CONV, channels), strides)
    pieces = zip(*(v.split(at_a_time(windows)) for v in (windows, rows)))
    return sum((window * row[:, :, None]).sum((0, 1)) for window, row in pieces).flip(0).T


def at_a_time(x):
    """Sequences of x (n, ...) that are worked on together: on a CPU few, so that what one operation
    writes, the next finds in cache."""
    return max(1, BLOCK // x[0].numel()) if x.device.type == "cpu" else len(x)


def per_direction(v):
    """(n, T, D, size) -> (D, n x T, size), a view: the rows of one matrix product per direction."""
    return v.flatten(0, 1).transpose(0, 1)


class Inner(torch.autograd.Function):
    """A Mamba-2 layer between its first matrix and its residual end, all D directions: short
    convolution, SiLU, scan, gate, RMS norm and last matrix.

    mixed (n, T, D x (inner + 2 states) + D x inner + D x heads) holds rows of the convolution, gates,
    and step sizes before softplus; it and taps (D x (inner + 2 states), CONV) and bias may be 16 bits
    wide. dt_bias, decay and skip (D x heads,), out (D, inner, width), state or None -> (n, steps,
    width), state. T is `steps`, or `steps` and the CONV - 1 before them.

    Differentiated by hand: autograd would keep twice as much, and pass over memory more often."""

    @staticmethod
    def forward(ctx, mixed, taps, bias, dt_bias, decay, skip, out, state, order, steps):
        directions, inner, width = out.shape
        rows, gate, raw = split_mixed(mixed, taps, out, steps)
        image = rows.transpose(1, 2).unsqueeze(2)              # of height 1, channels last
        conv = F.conv2d(image, taps[:, None, None], bias, padding=(0, CONV - 1), groups=len(taps))
        # (n, T + CONV - 1, ...): all rows that a tap sees
        conv = conv.squeeze(2).transpose(1, 2).contiguous()
        x, b, c = split_inputs(conv, out, skip, mixed.shape[1] - steps, steps)

        dt = F.softplus(raw + dt_bias.view(directions, 1, -1, 1))
        fade = torch.tanh(dt * decay.view(directions, 1, -1, 1))
        z, after, kept = scan(x, dt, fade * -MAX_DECAY, b, c, state, order)
        v = torch.addcmul(z, x, skip.view(directions, 1, -1, 1)).flatten(-2)
        y = F.silu(gate) * v.transpose(1, 2)                   # (n, steps, D, inner)

        square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_()
        rms = per_direction(torch.rsqrt(square.div_(inner).add_(1e-5)))
        # normalised after the matrix, where it is narrow
        h = torch.bmm(per_direction(y), out).mul_(rms)
        ctx.save_for_backward(
            mixed, taps, dt_bias, decay, skip, out, conv, v, h, rms, raw, dt, fade, *kept)
        ctx.order, ctx.steps = order, steps
        return h.sum(0).view(-1, steps, width), after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, after):
        with torch.autocast(g.device.type, enabled=False):
            return Inner.gradient(g, after, ctx.order, ctx.steps, *ctx.saved_tensors)

    @staticmethod
    def gradient(g, after, order, steps, mixed, taps, dt_bias, decay, skip, out, conv, v, h, rms,
                 raw, dt, fade, *kept):
        directions, inner, width = out.shape
        first = mixed.shape[1] - steps
        rows, gate, _ = split_mixed(mixed, taps, out, steps)
        x, b, c = split_inputs(conv, out, skip, first, steps)
        per_head = (directions, 1, -1, 1)
        d_mixed = torch.zeros_like(mixed) if first else torch.empty_like(mixed)
        d_rows, d_gate, d_raw = (
            part for part in d_mixed.split([len(taps), directions * inner, len(skip)], -1))

        # last matrix, norm and gate
        opened = F.silu(gate)
        y = per_direction(opened * v.transpose(1, 2))
        g = g.reshape(1, -1, width)
        dot = (g * h).sum(-1, keepdim=True)
        g = g * rms
        d_out = y.transpose(1, 2) @ g
        dy = torch.bmm(g, out.transpose(1, 2))
        dy.addcmul_(y, rms.square() * dot, value=-1 / inner)
        dy = dy.view(directions, -1, steps, inner).permute(1, 2, 0, 3)
        d_opened = dy * v.transpose(1, 2)
        torch.ops.aten.silu_backward.grad_input(
            d_opened, gate, grad_input=d_gate[:, first:].unflatten(-1, (directions, inner)))
        dv = torch.mul(dy.transpose(1, 2), opened.transpose(1, 2), out=torch.empty_like(v))
        dv = dv.view(x.shape)

        # skip and scan
        through = (dv * x).sum(-1)
        growth = (dv * v.view(x.shape)).sum(-1)
        growth = torch.addcmul(growth, through, skip.view(directions, 1, -1), value=-1)
        d_skip = through.sum((0, 2)).flatten()
        dx, db, dc, ddt, da, d_state = scan_gradient(dv, growth, after, x, b, c, order, kept)
        dx.addcmul_(dv, skip.view(per_head))

        # step sizes
        da = torch.ops.aten.tanh_backward(da, fade).mul_(-MAX_DECAY)
        d_decay = (da * dt).sum((1, 3)).flatten()
        ddt = torch.addcmul(ddt, da, decay.view(per_head))
        inside = raw + dt_bias.view(per_head)
        d_inside = torch.ops.aten.softplus_backward(ddt, inside, 1, 20)
        d_dt_bias = d_inside.sum((1, 3)).flatten()
        d_raw[:, first:].unflatten(-1, (directions, -1)).copy_(d_inside.permute(1, 3, 0, 2))

        # convolution
        d_conv = torch.zeros_like(conv)
        d_active = in_directions(d_conv, directions, first, steps)
        before = in_directions(conv, directions, first, steps)
        torch.ops.aten.silu_backward.grad_input(dx.flatten(-2), before[..., :inner],
                                                grad_input=d_active[..., :inner])
        torch.ops.aten.silu_backward.grad_input(torch.cat([db, dc], -1), before[..., inner:],
                                                grad_input=d_active[..., inner:])
        image = d_conv.transpose(1, 2).unsqueeze(2)
        image = F.conv2d(image, taps.flip(1)[:, None, None], groups=len(taps))
        d_rows.copy_(image.squeeze(2).transpose(1, 2))
        d_taps = taps_gradient(d_conv, rows)
        d_bias = d_conv.sum((0, 1))
        return (d_mixed, d_taps, d_bias, d_dt_bias, d_decay, d_skip, d_out, d_state, None, None)


class Mamba2(nn.Module):
    """A stack of residual, pre-norm Mamba-2 layers, (n, T, width) -> the same; bidirectional or causal.

    Nothing is flipped: the backward scan is the upper triangle, and both directions share one projection,
    one convolution and every product. A causal stack can be streamed in pieces: `stream(x, state)`."""

    def __init__(self, width, layers, state, headdim, expand=2, bidirectional=True, dropout=0.0):
        super().__init__()
        if width * expand % headdim:
            raise ValueError(f"Mamba-2: headdim {headdim} must divide width x expand = {width * expand}")
        d = self.directions = 2 if bidirectional else 1
        self.inner, self.state, self.headdim = width * expand, state, headdim
        self.heads, self.layers, self.dropout = self.inner // headdim, layers, dropout
        self.mixed = self.inner + 2 * state
        self.project = weight(layers, width, d * (self.mixed + self.inner + self.heads), fan_in=width)
        self.conv = weight(layers, d * self.mixed, CONV, fan_in=CONV)
        self.conv_bias = vector(layers, d * self.mixed)
        step = torch.empty(layers * d * self.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))     # softplus gives `step`
        self.a_log = nn.Parameter(torch.empty(layers * d * self.heads).uniform_(1, 16).log())
        self.skip = vector(layers, d * self.heads, value=1)
        self.out = weight(layers, d, self.inner, width, fan_in=d * self.inner, gain=1 / math.sqrt(layers))

    def forward(self, x):
        parts = [self.stream(part)[0] for part in x.split(at_a_time(x))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stream(self, x, state=None):
        """(n, T, width) and the state of the call before (None: nothing came before) -> the same, and the
        state for the next call. In the causal direction, pieces in order give what one call would give."""
        causal = self.directions == 1
        if state is not None and not causal:
            raise ValueError("Mamba-2: a bidirectional stack has to see the whole window, it takes no state")
        if state is None:
            state = [None] * self.layers
            if causal:
                past = x.new_zeros(len(x), CONV - 1, x.shape[2])
                scan = x.new_zeros(len(x), self.heads, self.headdim, self.state)
                state = [(past, scan)] * self.layers
        narrow = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            narrow = torch.get_autocast_dtype(x.device.type)
        reverse = (False,) if causal else (False, True)
        order = order_of(x.shape[1], chunk_length(x.shape[1]), reverse, x, causal)
        # the parameters of all layers are cast and prepared at once
        parts = [v.unbind(0) for v in (
            self.project.to(narrow), self.conv.to(narrow), self.conv_bias.to(narrow).view(self.layers, -1),
            self.dt_bias.view(self.layers, -1), (self.a_log.exp() / MAX_DECAY).view(self.layers, -1),
            self.skip.view(self.layers, -1), self.out)]
        kept = keep_features(self.layers, x, self.dropout, self.training)
        following = []
        for i, (project, *rest) in enumerate(zip(*parts)):
            y, after = self._layer(norm(x), project, rest, state[i], order)
            x = residual(x, y, kept[i])
            following.append(after)
        return x, following

    def _layer(self, x, project, rest, state, order):
        steps = x.shape[1]
        past, scan = state or (None, None)
        if past is not None:
            x = torch.cat([past, x], 1)
        mixed = x @ project
        with torch.autocast(x.device.type, enabled=False):
            y, scan = Inner.apply(mixed, *rest, scan, order, steps)
        return y, (x[:, x.shape[1] - CONV + 1:], scan)


# ---- TCN ----

class Windows(torch.autograd.Function):
    """(n, L, width) -> (n, L, kernel x width): around each step, `kernel` steps `dilation` apart, zeros
    beyond the ends. One copy; its gradient is a sum of slices, in place."""

    @staticmethod
    def forward(ctx, x, kernel, dilation):
        ctx.kernel, ctx.dilation = kernel, dilation
        n, length, width = x.shape
        reach = dilation * (kernel // 2)
        padded = F.pad(x, (0, 0, reach, reach))
        sample, row, _ = padded.stride()
        windows = padded.as_strided((n, length, kernel, width), (sample, row, dilation * row, 1))
        return windows.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        n, length, _ = g.shape
        reach = ctx.dilation * (ctx.kernel // 2)
        g = g.view(n, length, ctx.kernel, -1)
        d_padded = g.new_zeros(n, length + 2 * reach, g.shape[-1])
        for k in range(ctx.kernel):
            start = k * ctx.dilation
            d_padded[:, start:start + length] += g[:, :, k]
        return d_padded[:, reach:reach + length], None, None


class TCN(nn.Module):
    """Residual dilated convolutions, (B, L, width) -> the same. Each is one matrix product over its taps."""

    def __init__(self, width, blocks, kernel, dropout):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"TCN: tcn_kernel {kernel} must be odd, to see as much before as after")
        self.kernel, self.dropout = kernel, dropout
        seen = kernel * width
        self.taps = nn.ParameterList(weight(seen, width, fan_in=seen) for _ in range(blocks))
        self.bias = vector(blocks, width)

    def forward(self, x):
        biases = self.bias.view(len(self.taps), -1).unbind(0)
        kept = keep_features(len(self.taps), x, self.dropout, self.training)
        for i, (taps, bias) in enumerate(zip(self.taps, biases)):
            seen = Windows.apply(norm(x), self.kernel, 2 ** (i % 4))
            y = F.gelu(F.linear(seen, taps.T, bias))
            x = residual(x, y, kept[i])
        return x


# ---- graph ----

def pairs(channels):
    """(channels^2, pairs) of 0 and 1, picks the pairs i < j: a gather whose backward is a matrix product."""
    i, j = torch.triu_indices(channels, channels, 1)
    return F.one_hot(i * channels + j, channels * channels).T.float()


def sparse_adjacency(edges, neighbours):
    """Dense (..., C, C) -> symmetric, each electrode's strongest `neighbours` kept. Ties go by position."""
    channels = edges.shape[-1]
    order = edges.detach().argsort(dim=-1, descending=True, stable=True)
    strongest = order[..., :min(neighbours, channels - 1), None]
    kept = (strongest == torch.arange(channels, device=edges.device)).any(-2)
    edges = edges * kept
    return (edges + edges.transpose(-1, -2)) / 2


def normalised(adjacency):
    """D^-1/2 (A + I) D^-1/2 (Kipf & Welling, ICLR 2017). The self-loop keeps every degree >= 1."""
    looped = adjacency + torch.eye(adjacency.shape[-1], device=adjacency.device)
    scale = looped.sum(-1).rsqrt()
    return scale[..., :, None] * looped * scale[..., None, :]


@torch.no_grad()
def laplacian_encoding(operator, count):
    """Eigenvectors of I - operator for the smallest eigenvalues, (..., C, C) -> (..., C, count), fp32.

    Sign: the largest entry is positive. No gradient: it goes with 1 / (eigenvalue gap). Fewer than `count`
    electrodes leave zeros. NaN, at which the solver would stop, reaches the logits by the streams instead."""
    vectors = torch.linalg.eigh(-torch.nan_to_num(operator.float())).eigenvectors[..., :count]
    largest = vectors.abs().argmax(-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, largest).sign()
    return F.pad(vectors, (0, count - vectors.shape[-1]))


class DynamicGraph(nn.Module):
    """Electrode streams (B, C, L, width) -> a sparse symmetric adjacency per graph, (B, G, C, C)."""

    def __init__(self, channels, c):
        super().__init__()
        width, edge, self.heads = c["node_width"], c["edge_width"], c["edge_heads"]
        if width % self.heads:
            raise ValueError(f"model: edge_heads {self.heads} must divide node_width {width}")
        self.steps, self.neighbours = c["graph_steps"], c["neighbours"]
        self.query = weight(width, width, fan_in=width)
        self.lift = weight(self.heads, edge, fan_in=self.heads)
        self.lift_bias = vector(edge)
        self.scan = Mamba2(edge, c["edge_layers"], c["edge_state"], c["edge_headdim"], dropout=c["dropout"])
        self.score = weight(edge, 1, fan_in=edge)
        self.score_bias = vector(1)
        self.register_buffer("pairs", pairs(channels), persistent=False)

    def similarity(self, streams):
        """Cosine of every pair of electrodes over each graph's steps, per head: (B, G, heads, C^2)."""
        batch, channels, length, _ = streams.shape
        q = (streams @ self.query).view(batch, channels, length // self.steps, self.steps, self.heads, -1)
        q = q.permute(0, 2, 4, 1, 3, 5).flatten(-2)                # (B, G, heads, C, steps * width / heads)
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-3)
        return (q @ q.transpose(-1, -2)).flatten(-2)

    def forward(self, streams):
        batch, channels, length, _ = streams.shape
        picked = self.pairs.shape[1]
        with torch.autocast(streams.device.type, enabled=False):
            similar = self.similarity(streams.float()) @ self.pairs                    # (B, G, heads, pairs)
            series = similar.permute(0, 3, 1, 2).reshape(batch * picked, -1, self.heads)
            lifted = self.scan(series @ self.lift + self.lift_bias)
            edges = torch.sigmoid(norm(lifted) @ self.score + self.score_bias)
            edges = edges.view(batch, picked, -1).transpose(1, 2) @ self.pairs.T
            edges = edges.unflatten(-1, (channels, channels))
            return sparse_adjacency(edges + edges.transpose(-1, -2), self.neighbours)


class GraphConvolutions(nn.Module):
    """Residual graph convolutions over electrode streams (B, C, L, width), with a positional encoding.

    SSGC: (0.05 I + 0.95 / 2 (A + A^2)) x W. The two hops are one C x C operator for all steps of a graph."""

    def __init__(self, width, layers, steps, eigenvectors, dropout):
        super().__init__()
        self.steps, self.eigenvectors, self.dropout = steps, eigenvectors, dropout
        self.mix = weight(layers, width, width, fan_in=width)
        self.encode = weight(layers, eigenvectors, width, fan_in=eigenvectors)
        self.bias = vector(layers, width)

    def forward(self, x, adjacency):
        batch, channels, length, width = x.shape
        with torch.autocast(x.device.type, enabled=False):
            hop = normalised(adjacency)
            operator = 0.05 * torch.eye(channels, device=x.device) + 0.475 * (hop + hop @ hop)
            encoding = laplacian_encoding(hop, self.eigenvectors)[..., None, :]   # (B, G, C, 1, eigenvectors)
        x = x.view(batch, channels, -1, self.steps, width).transpose(1, 2)        # (B, G, C, steps, width)
        layers = len(self.mix)
        kept = keep_features(layers, x.reshape(batch, -1, width), self.dropout, self.training)
        biases = self.bias.view(layers, -1)
        for i in range(layers):
            h = norm(x) @ self.mix[i] + encoding @ self.encode[i] + biases[i]
            h = F.gelu((operator.to(h.dtype) @ h.flatten(-2)).view(x.shape))
            x = residual(x, h, None if kept[i] is None else kept[i][:, :, None, None])
        return x.transpose(1, 2).reshape(batch, channels, length, width)


# ---- the detector ----

class V3(nn.Module):
    """The detector for `channels` electrodes or derivations. Keyword arguments override DEFAULTS.

    forward: (B, channels, T) float32 EEG at 256 Hz, in units of the recording's own amplitude, to (B, T)
    logits. T >= 1; what is missing to a whole graph is filled with zeros and cut off again."""

    def __init__(self, channels=19, **config):
        super().__init__()
        c = settings(config)
        if channels < 2:
            raise ValueError(f"model: {channels} channel, a graph needs at least 2")
        self.channels, self.hop, self.graph_steps = channels, c["hop"], c["graph_steps"]
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
        self.nodes = Mamba2(node, c["node_layers"], c["node_state"], c["node_headdim"], dropout=drop)
        self.graph = DynamicGraph(channels, c)
        self.convolve = GraphConvolutions(node, c["graph_layers"], c["graph_steps"], c["eigenvectors"], drop)
        self.head = Head(channels, node, tcn, stem, c["head_width"], fine, c["prior"])

    def forward(self, x):
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise ValueError(f"model: input is {tuple(x.shape)}, expected (batch, {self.channels}, samples)")
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

    def stem(self, x):
        """(B, C, T) -> (B, C, T / 16, stem): companded, then filters of 250 ms, 16 times a second.

        x / (1 + x^2)^1/4 is linear below one amplitude and a square root above: 1000 amplitudes become 32."""
        x = x * torch.rsqrt(torch.hypot(x, x.new_ones(())))
        frames = F.pad(x, (STRIDE, (TAPS - 2) * STRIDE)).unflatten(-1, (-1, STRIDE))
        steps = frames.shape[2] - TAPS + 1
        frames = torch.cat([frames[:, :, k:k + steps] for k in range(TAPS)], -1)
        return F.gelu(F.linear(frames, self.filters.T, self.filters_bias))

    def electrodes(self, local):
        """(B, C, T / 16, stem) -> (B, C, L, node): each step embeds its own and the preceding `hop`."""
        patches = local.view(*local.shape[:2], -1, self.fine * local.shape[-1])
        before, here = F.linear(patches, self.embed.T, self.embed_bias).chunk(2, -1)
        return F.gelu(here + F.pad(before, (0, 0, 1, 0))[:, :, :-1]) @ self.reduce


class Head(nn.Module):
    """Graph streams (B, C, L, node), TCN (B, L, tcn) and stem (B, C, L * fine, stem) -> logits (B, T).

    Electrodes are seen twice: each by its own weights, and pooled by an attention that does not care where
    a seizure is. The same attention pools the stem's 16 Hz features, which place onset and end."""

    def __init__(self, channels, node, tcn, stem, width, fine, prior, local=16):
        super().__init__()
        self.fine, self.local = fine, local
        self.attend = weight(node, 1, fan_in=node)
        self.from_all = weight(channels * node, width, fan_in=channels * node)
        self.from_pooled = weight(node, width, fan_in=node)
        self.from_tcn = weight(tcn, width, fan_in=tcn)
        self.bias = vector(width)
        self.to_fine = weight(width, fine * local, fan_in=width)
        self.from_stem = weight(stem, local, fan_in=stem)
        self.fine_bias = vector(local)
        self.to_samples = weight(local, STRIDE, fan_in=local, gain=0.1)
        self.to_step = weight(width, 1, fan_in=width, gain=0.1)
        self.logit = vector(1, value=math.log(prior / (1 - prior)))

    def forward(self, streams, wide, local):
        batch, channels, length, _ = streams.shape
        streams = norm(streams)
        share = torch.softmax((streams @ self.attend).float(), 1)                      # (B, C, L, 1)
        pooled = (streams * share).sum(1)
        h = streams.transpose(1, 2).flatten(2) @ self.from_all + pooled @ self.from_pooled
        h = F.gelu(h + norm(wide) @ self.from_tcn + self.bias)
        detail = (local @ self.from_stem).view(batch, channels, length, -1)
        detail = (detail * share).sum(1) + h @ self.to_fine                            # (B, L, fine * local)
        detail = F.gelu(detail.unflatten(-1, (self.fine, self.local)) + self.fine_bias) @ self.to_samples
        return (detail.flatten(2) + h @ self.to_step).float().flatten(1) + self.logit
