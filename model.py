"""V3: EEG seizure detector in pure torch. (B, C, T) normalised EEG at 256 Hz -> (B, T) logits, one per sample.

    python bench/model.py                  speed, memory and parameters beside other detectors
    python -m pytest tests/test_model.py

    EEG (B, C, T)
      stem           per electrode, 256 -> 32 Hz -> 4 steps/s            (B, C, L, 64)     L = T / 64
      TCN            all electrodes together, 8 dilated residual blocks  (B, L, 496)
      streams        one per electrode: its own features + what the TCN says of it         (B, C, L, 64)
      node stream    bidirectional Mamba-2 over time, one sequence per electrode           (B, C, L, 64)
      edge stream    similarity of each pair of electrodes, once a second, lifted and filtered by a small
                     bidirectional Mamba-2                               (B, L / 4, C, C)  sparse, symmetric
      graph          Laplacian positional encoding, two graph convolutions                 (B, C, L, 64)
      head           graph + TCN at 4 steps/s, local detail at 32 Hz     (B, T)

What was chosen, and why
- 4 stream steps and 1 graph a second. Seizures last seconds; what is faster (spikes, rhythm) is read by the stem,
  whose 32 Hz features go around the streams to the head. 16 steps and 16 graphs a second would cost 4 and 16 times
  the memory traffic, which is what bounds narrow sequence layers, and 16 times the eigenvectors.
- Nine tenths of the parameters are the TCN's wide matrices at 4 steps/s: large matrix products that run near the
  peak of the machine, 7 GFLOP a window.
- Mamba-2 heads of 32 channels: the work that is no matrix product goes with the number of heads.
- Both directions, and all layers of a stack, share one parameter tensor per kind: few tensors make an optimizer step
  and a snapshot of the weights cheap. Norms carry no gain: the matrix behind each one would only repeat it.
- Dropout drops a feature for a whole sequence: on a CPU, drawing a random number per element costs more than the
  layer it follows.

Stable by construction: the input is companded (asinh), every stream enters its layers normalised, similarities are
cosines, edges lie in (0, 1), the graph operator has norm <= 1, decays are bounded so that no exponential overflows,
eigenvectors carry no gradient. Scans, edges and eigenvectors stay in fp32 under autocast. A NaN in the input gives NaN
logits, never a number. Deterministic: matrix products, pads and elementwise operations only (no scatter, cumsum or
interpolation), so torch.use_deterministic_algorithms(True) holds on a GPU too.

Papers: Mamba-2 / SSD (Dao & Gu, ICML 2024), TCN (Bai et al., 2018), Laplacian encoding (Dwivedi & Bresson, 2021), SSGC
(Zhu & Koniusz, ICLR 2021), prior of the last bias (Lin et al., ICCV 2017).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

DEFAULTS = {
    "hop": 64,              # samples per stream step: 4 steps a second
    "graph_steps": 4,       # stream steps per graph: one graph a second
    "stem_width": 64,       # filters per electrode at 32 Hz
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
    "head_width": 376,      # hidden units of the head
    "dropout": 0.1,         # share of features dropped, per sequence
    "prior": 0.05,          # probability of seizure that an untrained model gives
}
SMALL = {**DEFAULTS, "stem_width": 16, "tcn_width": 64, "tcn_blocks": 4, "tcn_kernel": 5, "node_width": 16,
         "node_layers": 1, "node_state": 8, "node_headdim": 16, "edge_heads": 2, "edge_width": 8, "edge_layers": 1,
         "edge_headdim": 8, "eigenvectors": 4, "graph_layers": 1, "head_width": 64, "dropout": 0.05}

STRIDE = 8                  # samples per stem step: 32 Hz
TAPS = 4                    # a stem filter sees TAPS * STRIDE samples, 125 ms
CONV = 4                    # taps of Mamba-2's short convolution
CHUNK = 16                  # steps per matrix of the chunked scan
MAX_DECAY = 4.0             # largest log-decay per step, 1.8 % is left: keeps exp() in range for chunks up to 32


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


# ---- Mamba-2 ----

def triangles(directions, size, like):
    """(directions, size, size) of 0 and 1: row i may see column j. Lower for time forward, upper for time backward."""
    lower = torch.ones(size, size, dtype=like.dtype, device=like.device).tril()
    return torch.stack([lower, lower.T])[:directions]


def carry(total):
    """What is left of chunk j's own state at the start of chunk k, both measured from the middle of their chunk.

    total (d, n, chunks, heads): log-decay over each chunk. Returns (d, n, heads, chunks, chunks) and the log-decays
    (d, n, heads, chunks) from the start of the scan to the middle of each chunk."""
    seen = triangles(total.shape[0], total.shape[2], total)[:, None]
    upto = (seen @ total).transpose(-1, -2)
    half = total.transpose(-1, -2) / 2
    middle = upto - half
    earlier = (seen - torch.eye(total.shape[2], dtype=total.dtype, device=total.device)) > 0
    log = (middle[..., :, None] - middle[..., None, :]).masked_fill(~earlier[:, :, None], -math.inf)
    return log.exp(), middle


def ssd(x, dt, a, b, c, chunk=CHUNK, state=None):
    """Mamba-2's scan S_t = exp(a_t) S_t-1 + dt_t b_t x_t', y_t = c_t S_t, as matrix products over chunks of time.

    x (d, n, T, heads, headdim), dt and a <= 0 (d, n, T, heads), b and c (d, n, T, states); d = 0 runs forward in time,
    d = 1 backward; state (d, n, states, heads, headdim) is the one before the first step. Returns y like x, and the
    state after the last step. Inside a chunk exp(a_j+1 + ... + a_i) is split into a factor of i and one of j, measured
    from the chunk's middle: all heads then share one chunk x chunk matrix, and the rest is scaling of rows. The split
    needs |a| <= MAX_DECAY and chunk <= 32 to stay inside fp32. Dao & Gu, ICML 2024, section 6."""
    d, n, steps, heads, headdim = x.shape
    pad, states = -steps % chunk, b.shape[-1]
    if pad:                                            # a = 0 and dt = 0: the state passes unchanged
        x, dt, a, b, c = (F.pad(v, (0, 0) * (v.ndim - 3) + (0, pad)) for v in (x, dt, a, b, c))
    x, dt, a, b, c = (v.reshape(d, n, -1, chunk, *v.shape[3:]) for v in (x, dt, a, b, c))
    chunks = x.shape[2]
    seen = triangles(d, chunk, x)[:, None, None]
    total = a.sum(-2)
    level = seen @ a - total[..., None, :] / 2
    u = (x * (dt * (-level).exp())[..., None]).flatten(-2)
    own = (b.transpose(-1, -2) @ u).view(d, n, chunks, states, heads, headdim)
    left, middle = carry(total)
    own = own.permute(0, 1, 4, 2, 3, 5).reshape(d, n, heads, chunks, -1)
    start = left @ own
    if state is not None:
        start = start + middle.exp()[..., None] * state.transpose(2, 3).reshape(d, n, heads, 1, -1)
    last = None if state is None else scan_end(own, total, middle, state)
    start = start.view(d, n, heads, chunks, states, headdim).permute(0, 1, 3, 4, 2, 5).reshape(d, n, chunks, states, -1)
    y = ((c @ b.transpose(-1, -2)) * seen) @ u + c @ start
    y = y.unflatten(-1, (heads, headdim)) * level.exp()[..., None]
    return y.reshape(d, n, -1, heads, headdim)[:, :, :steps], last


def scan_end(own, total, middle, state):
    """State after the last chunk, (d, n, states, heads, headdim); own, middle as in `ssd`, total (d, n, chunks, heads)."""
    d, n, states, heads, headdim = state.shape
    whole = total.sum(2)
    left = (whole[..., None] - middle).exp()
    new = (left[..., None, :] @ own).view(d, n, heads, states, headdim).transpose(2, 3)
    return state * whole.exp()[:, :, None, :, None] + new


class Mamba2(nn.Module):
    """A stack of residual, pre-norm Mamba-2 layers, (n, T, width) -> the same; bidirectional or causal.

    Both directions read the same projection's input and are summed by one output matrix, without flipping anything:
    the backward scan is the upper triangle. A causal stack can be streamed: `stream(x, state)`."""

    def __init__(self, width, layers, state, headdim, expand=2, bidirectional=True, dropout=0.0, chunk=CHUNK):
        super().__init__()
        if width * expand % headdim:
            raise ValueError(f"Mamba-2: headdim {headdim} must divide width x expand = {width * expand}")
        if not 1 <= chunk <= 32:
            raise ValueError(f"Mamba-2: chunk {chunk} is outside 1..32, the range that fp32 allows")
        self.inner, self.state, self.headdim = width * expand, state, headdim
        self.heads, self.dropout, self.chunk = self.inner // headdim, dropout, chunk
        self.layers, self.directions = layers, 2 if bidirectional else 1
        d, mixed = self.directions, self.inner + 2 * state
        self.project = weight(layers, d, width, self.inner + mixed + self.heads, fan_in=width)
        self.conv = weight(layers, d, mixed, CONV, fan_in=CONV)
        self.conv_bias = vector(layers, d, mixed)
        step = torch.exp(torch.empty(layers * d * self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))     # softplus gives `step`
        self.a_log = nn.Parameter(torch.empty(layers * d * self.heads).uniform_(1, 16).log())
        self.skip = vector(layers, d, self.heads, value=1)
        self.out = weight(layers, d, self.inner, width, fan_in=d * self.inner, gain=1 / math.sqrt(layers))

    def forward(self, x):
        return self.stream(x)[0]

    def stream(self, x, state=None):
        """(n, T, width) and the state of an earlier call (None: nothing came before) -> the same, and the next state.

        Causal stacks only carry a state; pieces of a recording streamed in order give what one call gives."""
        if state is not None and self.directions == 2:
            raise ValueError("Mamba-2: a bidirectional stack cannot be streamed, it has to see the whole window")
        per_layer = (self.layers, self.directions)
        shared = zip(self.project.unbind(0), self.conv.unbind(0), self.conv_bias.view(*per_layer, -1).unbind(0),
                     self.dt_bias.view(*per_layer, -1).unbind(0), self.a_log.view(*per_layer, -1).unbind(0),
                     self.skip.view(*per_layer, -1).unbind(0), self.out.unbind(0))
        following = []
        for i, parts in enumerate(shared):
            y, after = self._layer(norm(x), *parts, None if state is None else state[i])
            x = x + drop_features(y, self.dropout, self.training)
            following.append(after)
        return x, following

    def _layer(self, x, project, conv, conv_bias, dt_bias, a_log, skip, out, state):
        d, n, steps = self.directions, x.shape[0], x.shape[1]
        past, scan = (None, None) if state is None else state
        if scan is None and d == 1:
            scan = x.new_zeros(d, n, self.state, self.heads, self.headdim)
        projected = torch.matmul(x.reshape(1, n * steps, -1), project).view(d, n, steps, -1)
        gate, mixed, dt = projected.split([self.inner, self.inner + 2 * self.state, self.heads], -1)
        mixed, past = self._short_conv(mixed, conv, conv_bias, past)
        with torch.autocast(x.device.type, enabled=False):
            u, b, c = F.silu(mixed.float()).split([self.inner, self.state, self.state], -1)
            u = u.unflatten(-1, (self.heads, self.headdim))
            dt = F.softplus(dt.float() + dt_bias[:, None, None])
            a = -MAX_DECAY * torch.tanh(dt * a_log.exp()[:, None, None] / MAX_DECAY)
            y, scan = ssd(u, dt, a, b, c, self.chunk, scan)
            y = (y + u * skip[:, None, None, :, None]).flatten(-2) * F.silu(gate.float())
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        return sum(y[i] @ out[i] for i in range(d)), (past, scan)

    def _short_conv(self, x, taps, bias, past):
        """Depthwise convolution over the present and CONV - 1 earlier steps (later ones in the backward direction)."""
        if past is None:
            past = x.new_zeros(x.shape[0], x.shape[1], CONV - 1, x.shape[3])
        results = []
        for i in range(self.directions):
            padded = torch.cat([past[i], x[i]] if i == 0 else [x[i], past[i]], 1)
            image = padded.transpose(1, 2).unsqueeze(2)                        # channels last in memory: no copy
            result = F.conv2d(image, taps[i][:, None, None], bias[i], groups=x.shape[3])
            results.append(result.squeeze(2).transpose(1, 2))
        return torch.stack(results), torch.cat([past[:1], x[:1]], 2)[:, :, -(CONV - 1):]


# ---- TCN ----

class TCN(nn.Module):
    """Residual dilated convolutions, (B, L, width) -> the same. Each convolution is one matrix product over its taps."""

    def __init__(self, width, blocks, kernel, dropout):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"TCN: tcn_kernel {kernel} must be odd, so that a block sees as much before as after")
        self.kernel, self.dropout = kernel, dropout
        self.taps = nn.ParameterList(weight(kernel * width, width, fan_in=kernel * width) for _ in range(blocks))
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
    """(channels^2, pairs) of 0 and 1 that picks the pairs i < j. A gather whose backward is a matrix product as well:
    deterministic everywhere."""
    i, j = torch.triu_indices(channels, channels, 1)
    return F.one_hot(i * channels + j, channels * channels).T.float()


def sparse_adjacency(edges, neighbours):
    """Dense (..., C, C) edge weights -> symmetric, each electrode's strongest `neighbours` kept. Ties go by position."""
    channels = edges.shape[-1]
    strongest = edges.detach().argsort(dim=-1, descending=True, stable=True)[..., :min(neighbours, channels - 1)]
    kept = (strongest[..., None] == torch.arange(channels, device=edges.device)).any(-2)
    edges = edges * kept
    return (edges + edges.transpose(-1, -2)) / 2


def normalised(adjacency):
    """D^-1/2 (A + I) D^-1/2 (Kipf & Welling, ICLR 2017). The self-loop keeps every degree >= 1."""
    looped = adjacency + torch.eye(adjacency.shape[-1], device=adjacency.device)
    scale = looped.sum(-1).rsqrt()
    return scale[..., :, None] * looped * scale[..., None, :]


@torch.no_grad()
def laplacian_encoding(operator, count):
    """Eigenvectors of I - operator for the `count` smallest eigenvalues, (..., C, C) -> (..., C, count), fp32.

    Sign: the largest entry is positive. No gradient: it goes with 1 / (eigenvalue gap). Fewer than `count` electrodes
    leave zeros. NaN would stop the solver with its own error; here it is left to reach the logits by the streams."""
    vectors = torch.linalg.eigh(-torch.nan_to_num(operator.float())).eigenvectors[..., :count]
    largest = vectors.abs().argmax(-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, largest).sign()
    return F.pad(vectors, (0, count - vectors.shape[-1]))


class DynamicGraph(nn.Module):
    """Electrode streams (B, C, L, width) -> one sparse symmetric adjacency per `graph_steps` steps, (B, G, C, C)."""

    def __init__(self, channels, width, steps, heads, edge_width, layers, state, headdim, neighbours, dropout):
        super().__init__()
        if width % heads:
            raise ValueError(f"edge stream: edge_heads {heads} must divide node_width {width}")
        self.steps, self.heads, self.neighbours = steps, heads, neighbours
        self.query = weight(width, width, fan_in=width)
        self.lift = weight(heads, edge_width, fan_in=heads)
        self.lift_bias = vector(edge_width)
        self.scan = Mamba2(edge_width, layers, state, headdim, dropout=dropout)
        self.score = weight(edge_width, 1, fan_in=edge_width)
        self.score_bias = vector(1)
        self.register_buffer("pairs", pairs(channels), persistent=False)

    def similarity(self, streams):
        """Cosines of every pair of electrodes over each graph's steps, per head: (B, G, heads, C^2), within [-1, 1]."""
        batch, channels, length, _ = streams.shape
        q = (streams @ self.query).float().view(batch, channels, length // self.steps, self.steps, self.heads, -1)
        q = q.permute(0, 2, 4, 1, 3, 5).flatten(-2)
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

    SSGC: (0.05 I + 0.95 / 2 (A + A^2)) x W. The two hops are one C x C operator, shared by the steps of a graph."""

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
            encoding = laplacian_encoding(hop, self.eigenvectors)[..., None, :]       # (B, G, C, 1, eigenvectors)
        x = x.view(batch, channels, -1, self.steps, width).transpose(1, 2)            # (B, G, C, steps, width)
        for mix, encode, bias in zip(self.mix.unbind(0), self.encode.unbind(0), self.bias.view(len(self.mix), -1)):
            h = norm(x) @ mix + encoding @ encode + bias
            h = F.gelu((operator.to(h.dtype) @ h.flatten(-2)).view(x.shape))
            x = x + drop_features(h.reshape(batch, -1, width), self.dropout, self.training).view(x.shape)
        return x.transpose(1, 2).reshape(batch, channels, length, width)


# ---- the detector ----

class V3(nn.Module):
    """The detector for `channels` electrodes or derivations. Keyword arguments override DEFAULTS.

    forward: (B, channels, T) float32 EEG at 256 Hz in units of the recording's own amplitude -> (B, T) logits. T >= 1;
    what is missing to a whole second is filled with zeros and cut off again."""

    def __init__(self, channels=19, **config):
        super().__init__()
        unknown = sorted(set(config) - set(DEFAULTS))
        if unknown:
            raise ValueError(f"model: unknown setting {unknown[0]!r}; known are {', '.join(DEFAULTS)}")
        if channels < 2:
            raise ValueError(f"model: {channels} channel, a graph needs at least 2")
        c = {**DEFAULTS, **config}
        if c["hop"] % STRIDE:
            raise ValueError(f"model: hop {c['hop']} must be a multiple of {STRIDE} samples")
        self.channels, self.hop, self.graph_steps = channels, c["hop"], c["graph_steps"]
        stem, node, tcn, head, drop = (c[k] for k in ("stem_width", "node_width", "tcn_width", "head_width", "dropout"))
        fine = self.fine = c["hop"] // STRIDE                          # stem steps per stream step
        self.filters = weight(TAPS * STRIDE, stem, fan_in=TAPS * STRIDE, gain=2)
        self.filters_bias = nn.Parameter(torch.empty(stem).uniform_(-0.5, 0.5))
        self.embed = weight(2 * fine * stem, 2 * node, fan_in=2 * fine * stem, gain=2)
        self.embed_bias = vector(2 * node)
        self.reduce = weight(2 * node, node, fan_in=2 * node)
        self.gather = weight(channels * node, tcn, fan_in=channels * node)
        self.tcn = TCN(tcn, c["tcn_blocks"], c["tcn_kernel"], drop)
        self.spread = weight(tcn, channels * node, fan_in=tcn)
        self.spread_bias = nn.Parameter(torch.randn(channels * node) * 0.1)
        self.nodes = Mamba2(node, c["node_layers"], c["node_state"], c["node_headdim"], dropout=drop)
        self.graph = DynamicGraph(channels, node, c["graph_steps"], c["edge_heads"], c["edge_width"], c["edge_layers"],
                                  c["edge_state"], c["edge_headdim"], c["neighbours"], drop)
        self.convolve = GraphConvolutions(node, c["graph_layers"], c["graph_steps"], c["eigenvectors"], drop)
        self.head = Head(channels, node, tcn, stem, head, fine, c["prior"])

    def forward(self, x):
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise ValueError(f"model: input of shape {tuple(x.shape)}, expected (batch, {self.channels}, samples)")
        batch, channels, samples = x.shape
        x = F.pad(x.float(), (0, -samples % (self.hop * self.graph_steps)))
        local = self.stem(x)                                           # (B, C, T / 8, stem)
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
        """(B, C, T) -> (B, C, T / 8, stem): companded, then overlapping filters of 125 ms, 32 times a second.

        asinh is linear below one amplitude and logarithmic above: an artefact of 1000 amplitudes becomes 7.6."""
        frames = F.pad(torch.asinh(x), (STRIDE, (TAPS - 2) * STRIDE)).unflatten(-1, (-1, STRIDE))
        steps = frames.shape[2] - TAPS + 1
        frames = torch.cat([frames[:, :, k:k + steps] for k in range(TAPS)], -1)
        return F.gelu(frames @ self.filters + self.filters_bias)

    def electrodes(self, local):
        """(B, C, T / 8, stem) -> (B, C, L, node): each step embeds its own and the preceding stretch of `hop`."""
        patches = local.view(*local.shape[:2], -1, self.fine * local.shape[-1])
        before = F.pad(patches, (0, 0, 1, 0))[:, :, :-1]
        return F.gelu(torch.cat([before, patches], -1) @ self.embed + self.embed_bias) @ self.reduce


class Head(nn.Module):
    """Graph streams (B, C, L, node), TCN (B, L, tcn) and stem (B, C, L * fine, stem) -> logits (B, L * fine * 8).

    Electrodes are seen twice: each by its own weights, and pooled with an attention that does not care which electrode
    a seizure is on. The same attention pools the stem's 32 Hz features, which place onset and end."""

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
