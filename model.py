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
BLOCK = 300_000             # numbers of a Mamba-2 stack's input at a time on a CPU: 1.2 MB


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


def drop_features(x, p, training):
    """Dropout of whole features: x (n, T, d), one draw per sequence and feature."""
    if not training or p == 0:
        return x
    return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), p)


def wavelets(taps, count):
    """(taps, count) windowed sines of unit energy, 1 to 64 Hz, random phases: where an EEG has its power."""
    time = torch.arange(taps)[:, None] / 256
    frequency = 64 ** (torch.arange(count) / max(1, count - 1))
    waves = torch.sin(2 * math.pi * (time * frequency + torch.rand(count)))
    waves = waves * torch.hann_window(taps + 2)[1:-1, None]
    return waves / waves.norm(dim=0)


# ---- Mamba-2 ----

def triangle(size, reverse, like):
    """(size, size) of 0 and 1, row i may see column j: lower for a scan forward in time, else upper."""
    ones = torch.ones(size, size, dtype=like.dtype, device=like.device)
    return ones.triu() if reverse else ones.tril()


def relay(added, kept, state, reverse):
    """The state before each chunk and the one after the last: a chunk keeps a share of it and adds its own.

    added (n, chunks, heads, size), kept (n, chunks, heads, 1), state (n, heads, size) before the first chunk.
    One pass over a few chunks is cheaper than the matrix of all pairs of chunks, and linear in the length."""
    before, parts = [], list(zip(added.unbind(1), kept.unbind(1)))
    for own, share in reversed(parts) if reverse else parts:
        before.append(state)
        state = torch.addcmul(own, state, share)
    return torch.stack(before[::-1] if reverse else before, 1), state


def chunk_length(steps):
    """Steps per chunk: of 12..24 the one that needs the least padding, then the largest."""
    return min(range(12, MAX_CHUNK + 1), key=lambda length: (-steps % length, -length))


def chunked(v, chunk):
    """(n, T, ...) -> (n, chunks, chunk, ...). Behind the end a = 0 and dt = 0: the state passes unchanged."""
    pad = -v.shape[1] % chunk
    v = F.pad(v, (0, 0) * (v.ndim - 2) + (0, pad)) if pad else v
    return v.reshape(len(v), -1, chunk, *v.shape[2:])


def ssd(x, dt, a, b, c, reverse=False, state=None, chunk=None):
    """Mamba-2's scan S_t = exp(a_t) S_t-1 + dt_t x_t b_t', y_t = S_t c_t, as matrix products over chunks.

    x (n, T, heads, headdim), dt and a (n, T, heads) with -MAX_DECAY <= a <= 0, b and c (n, T, states).
    reverse runs from the last step to the first; state (n, heads, headdim, states) is S before the first
    step. Returns y like x, and S after the last step (None without a state). Inside a chunk
    exp(a_j+1 + ... + a_i) is a factor of i times one of j, both measured from the chunk's middle so that
    neither overflows: all heads share one chunk x chunk matrix, and the rest is scaling of rows.
    Dao & Gu, ICML 2024, section 6."""
    return scan(x, dt, a, b, c, reverse, state, chunk or chunk_length(x.shape[1]))[:2]


def scan(x, dt, a, b, c, reverse, state, chunk):
    """ssd, and what scan_gradient needs of it."""
    n, steps, heads, headdim = x.shape
    x, dt, a, b, c = (chunked(v, chunk) for v in (x, dt, a, b, c))
    seen, total = triangle(chunk, reverse, x), a.sum(2)
    level = seen @ a - total[:, :, None] / 2
    fall, rise, half = dt * (-level).exp(), level.exp(), (total / 2).exp()[..., None]
    u = (x * fall[..., None]).flatten(-2)
    own = (u.transpose(-1, -2) @ b).view(n, -1, heads, headdim * b.shape[-1])       # of S, at the chunk's middle
    first = torch.zeros_like(own[:, 0]) if state is None else state.flatten(2)
    start, last = relay(own * half, half.square(), first, reverse)
    start = (start * half).view(n, -1, heads * headdim, b.shape[-1])
    mask = (c @ b.transpose(-1, -2)) * seen
    y = torch.baddbmm((mask @ u).flatten(0, 1), c.flatten(0, 1), start.transpose(-1, -2).flatten(0, 1))
    y = (y.view(x.shape) * rise[..., None]).flatten(1, 2)[:, :steps]
    last = None if state is None else last.view(state.shape)
    return y, last, (fall, rise, half, start, mask, last)


def scan_gradient(dy, after, x, b, c, y, reverse, kept):
    """Gradients of x, dt, a, b, c and state, from those of y and of the state after the last step.

    With A_t the log-decay from the start to step t, y_t holds exp(A_t), what x_t adds to the state holds
    exp(-A_t), and nothing else holds A_t: its gradient is dy_t y_t - dx_t x_t, summed over a head."""
    fall, rise, half, start, mask, last = kept
    steps, heads, chunk = x.shape[1], x.shape[2], fall.shape[2]
    growth = chunked((dy * y).sum(-1), chunk)
    dy, x, b, c = (chunked(v, chunk) for v in (dy, x, b, c))
    u, e = (x * fall[..., None]).flatten(-2), (dy * rise[..., None]).flatten(-2)
    d_start = (e.transpose(-1, -2) @ c).view(*half.shape[:3], -1)
    d_last = torch.zeros_like(d_start[:, 0]) if last is None else after.flatten(2)
    d_own, d_state = relay(d_start * half, half.square(), d_last, not reverse)
    d_own = (d_own * half).view(start.shape)
    seen = triangle(chunk, reverse, x)
    d_mask = (e @ u.transpose(-1, -2)) * seen
    du = torch.baddbmm((mask.transpose(-1, -2) @ e).flatten(0, 1), b.flatten(0, 1),
                       d_own.transpose(-1, -2).flatten(0, 1)).view(x.shape)
    db = d_mask.transpose(-1, -2) @ c + u @ d_own
    dc = d_mask @ b + e @ start
    d_fall = (du * x).sum(-1)
    growth = growth - d_fall * fall
    later = growth.sum(2)
    later = triangle(later.shape[1], not reverse, x) @ later - later        # in the chunks after this one
    if last is not None:
        later, d_state = later + (after * last).sum((-1, -2))[:, None], d_state.view(last.shape)
    da = seen.T @ growth + later[:, :, None]
    found = (du.mul_(fall[..., None]), d_fall / rise, da, db, dc)
    return *(v.flatten(1, 2)[:, :steps] for v in found), None if last is None else d_state


class Inner(torch.autograd.Function):
    """One direction of a Mamba-2 layer after its first matrix: short convolution, SiLU, scan, gate, RMS norm
    and second matrix. rows (n, T + CONV - 1, mixed) and gate (n, T, inner) may be 16 bits wide; dt and a
    (n, T, heads), taps (mixed, CONV), bias (mixed,), skip (heads,), out (inner, width) -> (n, T, width), state.

    Differentiated by hand: autograd would keep twice as much, and pass over memory more often."""

    @staticmethod
    def forward(ctx, rows, gate, dt, a, taps, bias, skip, out, state, reverse, chunk):
        image = rows.transpose(1, 2).unsqueeze(2)              # of height 1, channels last: nothing is copied
        kernel, bias = taps[:, None, None].to(rows.dtype), bias.to(rows.dtype)
        conv = F.conv2d(image, kernel, bias, groups=len(taps)).squeeze(2).transpose(1, 2)
        x, b, c = F.silu(conv.to(taps.dtype)).tensor_split((len(out), (len(out) + len(taps)) // 2), -1)
        z, after, kept = scan(x.unflatten(-1, (len(skip), -1)), dt, a, b, c, reverse, state, chunk)
        z = z.flatten(-2)
        y = torch.addcmul(z, x, skip[:, None].expand(-1, len(out) // len(skip)).flatten())
        y = y * F.silu(gate.to(taps.dtype))
        rms = torch.rsqrt(torch.linalg.vecdot(y, y)[..., None] / len(out) + 1e-5)
        ctx.save_for_backward(rows, gate, taps, skip, out, conv, z, rms, *kept)
        ctx.reverse = reverse
        return (y @ out) * rms, after                          # normalised after the matrix, where it is narrow

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, after):
        with torch.autocast(g.device.type, enabled=False):
            return Inner.gradient(g, after, ctx.reverse, *ctx.saved_tensors)

    @staticmethod
    def gradient(g, after, reverse, rows, gate, taps, skip, out, conv, z, rms, *kept):
        conv, gate = conv.to(taps.dtype), gate.to(taps.dtype)
        x, b, c = F.silu(conv).tensor_split((len(out), (len(out) + len(taps)) // 2), -1)
        heads = (len(skip), len(out) // len(skip))
        direct, opened = skip[:, None].expand(heads).flatten(), F.silu(gate)
        v = torch.addcmul(z, x, direct)
        y, g = v * opened, g * rms
        d_out = y.flatten(0, 1).T @ g.flatten(0, 1)
        dy = g @ out.T
        dy.addcmul_(y, rms.square() * torch.linalg.vecdot(dy, y)[..., None], value=-1 / len(out))
        d_gate = torch.ops.aten.silu_backward(v.mul_(dy), gate)
        dy.mul_(opened)
        d_skip = (dy * x).flatten(0, 1).sum(0).view(heads).sum(1)
        dx, ddt, da, db, dc, d_state = scan_gradient(
            dy.unflatten(-1, heads), after, x.unflatten(-1, heads), b, c, z.unflatten(-1, heads), reverse, kept)
        dx = dx.flatten(-2).addcmul_(dy, direct)
        d_conv = torch.ops.aten.silu_backward(torch.cat([dx, db, dc], -1), conv)
        d_rows, d_taps = torch.zeros_like(rows, dtype=taps.dtype), []
        for k, tap in enumerate(taps.T.contiguous()):
            d_rows[:, k:k + gate.shape[1]].addcmul_(d_conv, tap)
            d_taps.append((d_conv * rows[:, k:k + gate.shape[1]]).flatten(0, 1).sum(0))
        d_taps, d_bias = torch.stack(d_taps, 1), d_conv.flatten(0, 1).sum(0)
        d_rows, d_gate = d_rows.to(rows.dtype), d_gate.to(rows.dtype)
        return d_rows, d_gate, ddt, da, d_taps, d_bias, d_skip, d_out, d_state, None, None


class Mamba2(nn.Module):
    """A stack of residual, pre-norm Mamba-2 layers, (n, T, width) -> the same; bidirectional or causal.

    Nothing is flipped: the backward scan is the upper triangle, and both directions share one projection and
    one convolution. A causal stack can be streamed in pieces: `stream(x, state)`."""

    def __init__(self, width, layers, state, headdim, expand=2, bidirectional=True, dropout=0.0):
        super().__init__()
        if width * expand % headdim:
            raise ValueError(f"Mamba-2: headdim {headdim} must divide width x expand = {width * expand}")
        self.inner, self.state, self.headdim = width * expand, state, headdim
        self.heads, self.layers, self.dropout = self.inner // headdim, layers, dropout
        self.mixed, self.directions = self.inner + 2 * state, 2 if bidirectional else 1
        d = self.directions
        self.project = weight(layers, width, d * (self.mixed + self.inner + self.heads), fan_in=width)
        self.conv = weight(layers, d * self.mixed, CONV, fan_in=CONV)
        self.conv_bias = vector(layers, d * self.mixed)
        step = torch.exp(torch.empty(layers * d * self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))     # softplus gives `step`
        self.a_log = nn.Parameter(torch.empty(layers * d * self.heads).uniform_(1, 16).log())
        self.skip = vector(layers, d * self.heads, value=1)
        self.out = weight(layers, d, self.inner, width, fan_in=d * self.inner, gain=1 / math.sqrt(layers))

    def forward(self, x):
        if x.device.type != "cpu":
            return self.stream(x)[0]
        rows = max(1, BLOCK // x[0].numel())       # few sequences at a time: what a layer writes, the next finds in cache
        return torch.cat([self.stream(part)[0] for part in x.split(rows)])

    def stream(self, x, state=None):
        """(n, T, width) and the state of the call before (None: nothing came before) -> the same, and the
        state for the next call. In the causal direction, pieces in order give what one call would give."""
        if state is not None and self.directions == 2:
            raise ValueError("Mamba-2: a bidirectional stack has to see the whole window, it takes no state")
        vectors = (self.conv_bias, self.dt_bias, self.a_log.exp(), self.skip)
        vectors = (v.view(self.layers, -1) for v in vectors)
        following, chunk = [], chunk_length(x.shape[1])
        for i, parts in enumerate(zip(*(v.unbind(0) for v in (self.project, self.conv, self.out, *vectors)))):
            y, after = self._layer(norm(x), *parts, state[i] if state else (None, None), chunk)
            x = x + drop_features(y, self.dropout, self.training)
            following.append(after)
        return x, following

    def _layer(self, x, project, conv, out, conv_bias, dt_bias, decay, skip, state, chunk):
        n, steps, width = x.shape
        d, past, scan = self.directions, *state
        if d == 1 and scan is None:
            past, scan = x.new_zeros(n, CONV - 1, width), x.new_zeros(n, self.heads, self.headdim, self.state)
        seen = F.pad(x, (0, 0, CONV - 1, CONV - 1)) if d == 2 else torch.cat([past, x], 1)
        matrices = project.split([self.mixed] * d + [self.inner] * d + [self.heads] * d, -1)
        conv, conv_bias, dt_bias, decay, skip = (v.chunk(d) for v in (conv, conv_bias, dt_bias, decay, skip))
        result = 0
        for i in range(d):                         # forward sees CONV - 1 steps back, backward as many ahead
            rows = seen[:, i * (CONV - 1):][:, :steps + CONV - 1] @ matrices[i]
            dt = F.softplus((x @ matrices[2 * d + i]).float() + dt_bias[i])
            a = -MAX_DECAY * torch.tanh(dt * decay[i] / MAX_DECAY)
            gate = x @ matrices[d + i]
            with torch.autocast(x.device.type, enabled=False):
                y, scan = Inner.apply(rows, gate, dt, a, conv[i], conv_bias[i], skip[i], out[i],
                                      scan, i == 1, chunk)
            result = result + y
        return result, (seen[:, seen.shape[1] - CONV + 1:], scan)


# ---- TCN ----

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
        length, biases = x.shape[1], self.bias.view(len(self.taps), -1).unbind(0)
        for i, (taps, bias) in enumerate(zip(self.taps, biases)):
            dilation = 2 ** (i % 4)
            padded = F.pad(norm(x), (0, 0, dilation * (self.kernel // 2), dilation * (self.kernel // 2)))
            seen = torch.cat([padded[:, k * dilation:k * dilation + length] for k in range(self.kernel)], -1)
            x = x + drop_features(F.gelu(seen @ taps + bias), self.dropout, self.training)
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
        for mix, encode, bias in zip(self.mix, self.encode, self.bias.view(len(self.mix), -1)):
            h = norm(x) @ mix + encoding @ encode + bias
            h = F.gelu((operator.to(h.dtype) @ h.flatten(-2)).view(x.shape))
            x = x + drop_features(h.reshape(batch, -1, width), self.dropout, self.training).view(x.shape)
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
