"""model.py: the chunked scan against a plain recurrence, the graph, numerical limits, what a checkpoint holds."""
import functools
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import evaluate
import forked
import model as v3
import train as training
from bench.model import Launches
from conftest import ROOT
from helpers import loaded

TINY = {**v3.SMALL, "stem_width": 8, "tcn_width": 16, "tcn_blocks": 2, "tcn_kernel": 3, "node_width": 8,
        "node_headdim": 8, "head_width": 16}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    evaluate.exact_fp32()               # as in every run


def tiny(channels=4, **config):
    return v3.V3(channels, **{**TINY, **config})


def recurrence(x, dt, a, b, c, reverse):
    """The definition, one step after another: S = exp(a) S + dt x b', y = S c."""
    order = range(x.shape[1])[::-1] if reverse else range(x.shape[1])
    rows = [None] * x.shape[1]
    state = x.new_zeros(len(x), *x.shape[2:], b.shape[-1])
    for t in order:
        state = state * a[:, t].exp()[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, None, None]
        rows[t] = state @ c[:, t, None, :, None]
    return torch.stack(rows, 1).squeeze(-1)


def scanned(x, dt, a, b, c, reverse=False, chunk=None):
    """The same by the chunked scan, in one direction."""
    steps = x.shape[1]
    order = v3.order_of(steps, chunk or v3.chunk_length(steps), (reverse,), x)
    y, _ = v3.scan(*(v[:, None] for v in (x, dt, a, b, c)), order)
    return y[:, 0]


def scan_inputs(steps, decay, n=2, heads=3, headdim=4, states=5, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)
    dt = F.softplus(draw(n, steps, heads))
    a = -v3.MAX_DECAY * torch.rand(n, steps, heads, dtype=dtype) * decay
    inputs = [draw(n, steps, heads, headdim), dt, a, draw(n, steps, states), draw(n, steps, states)]
    return [v.requires_grad_() for v in inputs]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps,chunk",
                         [(48, 16), (48, 24), (50, 16), (1, 16), (5, 16), (17, None), (240, None)])
def test_the_chunked_scan_equals_the_recurrence_forward_and_backward(steps, chunk, reverse):
    inputs = scan_inputs(steps, decay=0.5)
    expected = recurrence(*inputs, reverse)
    found = scanned(*inputs, reverse=reverse, chunk=chunk)
    assert torch.allclose(expected, found, rtol=1e-9, atol=1e-10)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    got = torch.autograd.grad((found * weights).sum(), inputs)
    for one, other in zip(wanted, got):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_in_fp32_the_fastest_decay_neither_overflows_nor_loses_digits(reverse):
    inputs = scan_inputs(240, decay=1, n=1)
    inputs[2].data.fill_(-v3.MAX_DECAY)
    expected = recurrence(*inputs, reverse)
    single = [v.detach().float().requires_grad_() for v in inputs]
    found = scanned(*single, reverse=reverse, chunk=v3.MAX_CHUNK)
    assert torch.allclose(expected.float(), found, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    got = torch.autograd.grad(found.square().sum(), single)
    for one, other in zip(wanted, got):
        assert (one.float() - other).abs().max() <= 1e-4 * one.abs().max() + 1e-4


@pytest.mark.slow
def test_in_fp32_no_digit_is_lost_over_an_hour_long_window():
    inputs = scan_inputs(14400, decay=1, n=1, heads=1, headdim=1, states=1)
    inputs[2].data[:, ::2] = 0                           # near steps remember, far ones lie 14,000 log-decays apart
    expected = recurrence(*inputs, False)
    found = scanned(*(v.float() for v in inputs))
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("steps,reverse", [(24, (False,)), (31, (False,)), (24, (False, True)), (31, (False, True)),
                                           (1, (False, True))])
def test_the_layer_differentiated_by_hand_has_the_gradients_of_autograd(steps, reverse):
    n, heads, headdim, states, width, directions = 2, 2, 3, 4, 5, len(reverse)
    inner, rows = heads * headdim, directions * (heads * headdim + 2 * states)
    per_head = (directions, 1, heads)
    shapes = ((n, steps, rows + directions * (inner + heads)), (rows, v3.CONV), (rows,),
              per_head, per_head, per_head, (directions, inner, width))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[4].exp_().mul_(0.1)                           # decay: a rate, not a logarithm
    inputs = [v.requires_grad_() for v in inputs]
    order = v3.order_of(steps, 12, reverse, inputs[0].detach())

    def layer(*inputs):
        return v3.Inner.apply(*inputs, order)
    assert torch.autograd.gradcheck(layer, inputs, nondet_tol=0, fast_mode=True)
    plain = SimpleNamespace(save_for_backward=lambda *kept: None)
    traced = v3.Inner.forward(plain, *inputs, order)     # differentiated by autograd, and the first part by itself
    assert torch.equal(layer(*inputs), traced)


def test_a_causal_stack_does_not_see_the_future():
    stack = v3.Mamba2(8, layers=2, state=4, headdim=8, bidirectional=False)
    x = torch.randn(1, 60, 8)
    later = torch.cat([x[:, :30], torch.randn(1, 30, 8)], 1)
    assert torch.allclose(stack(x)[:, :30], stack(later)[:, :30], atol=1e-5)


def test_the_backward_direction_is_the_forward_one_in_reversed_time():
    stack, mirror = (v3.Mamba2(8, layers=1, state=4, headdim=4) for _ in range(2))
    sizes = (2 * stack.mixed, 2 * stack.inner, 2 * stack.heads)
    kinds = dict(stack.named_parameters())
    with torch.no_grad():
        for name, p in mirror.named_parameters():
            swap = {"project": lambda v: torch.cat([part.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
                                                    for part in v.split(sizes, -1)], -1),
                    "out": lambda v: v.flip(1),
                    "conv": lambda v: v.unflatten(1, (2, -1)).flip(1).flatten(1, 2)}
            p.copy_(swap.get(name, lambda v: v.unflatten(0, (2, -1)).flip(0).flatten())(kinds[name]))
        # the taps of a backward direction are stored present first, those of a forward one past first
        stack.conv.copy_(stack.conv + stack.conv.flip(2))
        mirror.conv.copy_(stack.conv.unflatten(1, (2, -1)).flip(1).flatten(1, 2))
    x = torch.randn(3, 50, 8)
    assert torch.allclose(stack(x), mirror(x.flip(1)).flip(1), atol=1e-5)


def test_a_layer_equals_the_mamba2_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    config = transformers.Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=8, expand=2,
                                       n_groups=1, chunk_size=16, num_hidden_layers=1, use_bias=False)
    theirs = Mamba2Mixer(config, 0).eval()
    ours = v3.Mamba2(16, layers=1, state=8, headdim=8, bidirectional=False)
    with torch.no_grad():
        theirs.dt_bias.sub_(3)                           # slow decays, where the bound on them does not show
        gate, rest, dt = theirs.in_proj.weight.split([32, 48, 4])
        ours.project.copy_(torch.cat([rest, gate, dt]).T[None])
        ours.conv.copy_(theirs.conv1d.weight.squeeze(1)[None])
        for mine, value in ((ours.conv_bias, theirs.conv1d.bias), (ours.dt_bias, theirs.dt_bias),
                            (ours.a_log, theirs.A_log), (ours.skip, theirs.D),
                            (ours.out, theirs.out_proj.weight.T)):
            mine.copy_(value.view(mine.shape))
        x = v3.norm(torch.randn(2, 45, 16))
        assert torch.allclose(ours(x) - x, theirs(x), rtol=1e-3, atol=1e-4)


# ---- the graph ----

def test_the_adjacency_is_sparse_symmetric_and_bounded():
    net = tiny(channels=19, neighbours=3)
    adjacency = net.graph(torch.randn(2, 19, 16, 8) * 100)
    assert adjacency.shape == (2, 4, 19, 19)
    assert torch.equal(adjacency, adjacency.transpose(-1, -2))
    assert (adjacency.diagonal(dim1=-2, dim2=-1) == 0).all() and 0 <= adjacency.min() and adjacency.max() < 1
    edges = (adjacency > 0).flatten(-2).sum(-1) // 2
    assert (edges <= 3 * 19).all() and (edges >= 3 * 19 / 2).all()
    assert ((adjacency > 0).sum(-1) >= 3).all()


def test_equal_edges_leave_a_sparse_graph_too():
    kept = v3.sparse_adjacency(torch.ones(19, 19) - torch.eye(19), 3)
    assert (kept > 0).sum() <= 2 * 3 * 19


def test_similarities_are_cosines_at_any_amplitude():
    net = tiny(channels=5)
    for amplitude in (0, 1e-6, 1, 1e6):
        similar = net.graph.similarity(torch.randn(1, 5, 8, 8) * amplitude)
        assert similar.isfinite().all() and similar.abs().max() <= 1 + 1e-5


def test_the_encoding_solves_the_laplacian_with_a_fixed_sign_and_no_gradient():
    weights = torch.rand(7, 19, 19).requires_grad_()
    hop = v3.normalised(v3.sparse_adjacency(weights + weights.transpose(-1, -2), 3))
    vectors = v3.laplacian_encoding(hop, 16)
    assert vectors.shape == (7, 19, 16) and not vectors.requires_grad
    assert torch.allclose(vectors.transpose(-1, -2) @ vectors, torch.eye(16), atol=1e-4)
    image = vectors - hop @ vectors
    values = (vectors * image).sum(-2, keepdim=True)
    assert torch.allclose(image, vectors * values, atol=1e-4) and (values.diff(dim=-1) >= -1e-4).all()
    assert (vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all()
    assert torch.equal(v3.laplacian_encoding(hop[..., :3, :3], 16)[..., 3:], torch.zeros(7, 3, 13))


def test_the_graph_operator_never_amplifies():
    hop = v3.normalised(v3.sparse_adjacency(torch.rand(50, 19, 19).triu(1), 3))
    assert torch.linalg.matrix_norm(hop, 2).max() <= 1 + 1e-5


@pytest.mark.slow
def test_the_encoding_costs_under_a_twentieth_of_a_training_step():
    net, x = v3.V3(19), torch.randn(1, 19, 15360)

    def clock(work):
        work()
        start = time.process_time()
        work()
        return time.process_time() - start
    hop = v3.normalised(torch.rand(1, 60, 19, 19))
    encoding = min(clock(lambda: v3.laplacian_encoding(hop, 16)) for _ in range(3))
    assert encoding < 0.05 * clock(lambda: net(x).square().mean().backward())


# ---- parameters and checkpoints ----

@pytest.mark.parametrize("channels,config",
                         [(19, {}), (18, {}), (19, v3.SMALL), (18, v3.SMALL), (5, v3.SMALL)])
def test_every_parameter_receives_a_gradient(channels, config):
    net = v3.V3(channels, **config)
    net(torch.randn(2, channels, 4096)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0 and p.grad.isfinite().all(), name


@pytest.mark.parametrize("channels", [19, 18])
def test_weights_and_moments_make_a_checkpoint_of_195_mb(channels):
    net = v3.V3(channels)
    assert 193e6 < 12 * sum(p.numel() for p in net.parameters()) < 194.7e6
    assert len(list(net.parameters())) <= 60


def test_the_state_holds_the_parameters_alone_and_loads_strictly_after_any_forward():
    net = tiny()
    for batch, samples in ((1, 700), (3, 2048)):
        net(torch.randn(batch, 4, samples))
    state = net.state_dict()
    assert set(state) == {name for name, _ in net.named_parameters()}
    fresh = tiny()
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(2, 4, 1000)
    assert torch.equal(fresh.eval()(x), net.eval()(x))


def test_only_matrices_have_two_axes_so_that_weight_decay_spares_every_vector():
    for name, p in v3.V3(19).named_parameters():
        vector = any(word in name for word in ("bias", "a_log", "skip", "logit"))
        assert vector == (p.ndim == 1), name


def test_an_untrained_model_gives_the_prior():
    probability = torch.sigmoid(v3.V3(19).eval()(torch.randn(2, 19, 4096))).mean()
    assert 0.03 < probability < 0.08


# ---- inputs ----

@pytest.mark.parametrize("channels", [2, 3, 18, 23])
@pytest.mark.parametrize("samples", [1, 255, 256, 1000])
def test_any_number_of_channels_and_samples_gives_one_logit_per_sample(channels, samples):
    assert tiny(channels)(torch.randn(2, channels, samples)).shape == (2, samples)


def test_wrong_input_and_settings_are_refused_in_one_line():
    for wrong in (lambda: tiny()(torch.randn(1, 5, 256)), lambda: tiny()(torch.randn(4, 256)),
                  lambda: tiny(1), lambda: tiny(tcn_widht=3), lambda: tiny(tcn_kernel=4),
                  lambda: tiny(node_headdim=7),
                  lambda: tiny(hop=50), lambda: tiny(edge_heads=3)):
        with pytest.raises(ValueError) as refusal:
            wrong()
        assert "\n" not in str(refusal.value)


def test_weights_tell_the_size_of_their_model():
    for size in v3.SIZES:
        with torch.device("meta"):
            weights = v3.build(19, {"size": size}).state_dict()
        assert v3.size_of(weights, 19) == size
        assert v3.size_of(weights, 18) == ""
    assert v3.size_of(tiny().state_dict(), 19) == "" and v3.size_of({}, 19) == ""


def awkward():
    normal = torch.randn(2, 19, 2048)
    flat, spike, same = normal.clone(), normal.clone(), normal[:, :1].expand(2, 19, 2048)
    flat[:, 3:9] = 0
    spike[:, 2, 1000] = 1e5
    return {"1000 sigma": 1000 * normal, "flat channels": flat, "all zeros": torch.zeros_like(normal),
            "all channels alike": same, "one spike": spike, "tiny": 1e-20 * normal, "huge": 1e6 * normal}


@pytest.mark.parametrize("kind", list(awkward()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_awkward_input_gives_finite_logits_and_gradients(kind, dtype):
    net, x = v3.V3(19, **v3.SMALL), awkward()[kind]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = net(x)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


# error over the deviation of the logits, their correlation, and the cosine of each parameter's gradient, at worst:
# those of the graph come through a choice of the strongest edges, which a rounded similarity can turn
BOUNDS = {torch.float32: (1e-3, 0.99999, 0.99, 0.99), torch.float16: (0.04, 0.999, 0.9, 0.9),
          torch.bfloat16: (0.09, 0.995, 0.6, 0.1)}


def logits_and_gradients(net, x, weights, dtype):
    """In `dtype` on the device of `x`, returned on the CPU."""
    net.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        logits = net(x)
    (logits * weights).mean().backward()
    return logits.detach().cpu(), {name: p.grad.flatten().cpu() for name, p in net.named_parameters()}


def beyond_bounds(exact, found, dtype):
    """What of `found` lies further from `exact` than numbers of `dtype` explain: a list of names."""
    (expected, right), (logits, gradients) = exact, found
    error, correlation, cosine, of_graph = BOUNDS[dtype]
    wrong = []
    if (logits - expected).std() > error * expected.std():
        wrong.append("error")
    if torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] < correlation:
        wrong.append("correlation")
    for name, g in gradients.items():
        bound = of_graph if name.startswith("graph.") else cosine
        # of a single number there is only the sign, which a sum near zero may change
        if g.numel() > 1 and F.cosine_similarity(g, right[name], 0) < bound:
            wrong.append(name)
    return wrong


def trial(settings, samples=4096):
    net = v3.V3(19, **settings).eval()
    weights = torch.randn(2, samples // 256).repeat_interleave(256, 1)
    return net, torch.randn(2, 19, samples), weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_every_gradient_in_16_bits_are_those_of_fp32_within_its_rounding(dtype):
    net, x, weights = trial(v3.SMALL)
    exact = logits_and_gradients(net, x, weights, torch.float32)
    assert not beyond_bounds(exact, logits_and_gradients(net, x, weights, dtype), dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("settings", [pytest.param(v3.SMALL, id="small"), pytest.param({}, id="full", marks=pytest.mark.slow)])
def test_a_zeroed_edge_score_lies_beyond_the_bounds_of_every_precision(settings, dtype):
    net, x, weights = trial(settings, 2048)
    exact = logits_and_gradients(net, x, weights, torch.float32)
    net.graph.score.data.zero_()
    wrong = beyond_bounds(exact, logits_and_gradients(net, x, weights, torch.float32), dtype)
    assert {"error", "correlation", "graph.query"} <= set(wrong)


def test_logits_under_autocast_have_the_steps_of_fp32():
    net, x = v3.V3(19, **v3.SMALL).eval(), torch.randn(1, 19, 4096)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    assert len(logits.unique()) > 0.95 * logits.numel()


def test_a_nan_channel_shows_in_the_logits():
    x = torch.randn(2, 4, 1024)
    x[0, 1] = math.nan
    logits = tiny().eval()(x)
    assert logits[0].isnan().all() and logits[1].isfinite().all()


# ---- training ----

def bursts(batch, channels, samples, generator):
    """Noise with a 4 Hz rhythm of random place and length, and the labels."""
    x = torch.randn(batch, channels, samples, generator=generator)
    start = torch.randint(0, samples // 2, (batch, 1), generator=generator)
    time = torch.arange(samples)
    y = ((time >= start) & (time < start + samples // 3)).float()
    return x + 2 * torch.sin(2 * math.pi * 4 * time / 256) * y[:, None], y


def train(steps, batch=4, channels=4, samples=1024):
    net, generator = tiny(channels), torch.Generator().manual_seed(1)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=5e-3), []
    for _ in range(steps):
        x, y = bursts(batch, channels, samples, generator)
        loss = F.binary_cross_entropy_with_logits(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert loss.isfinite() and norm.isfinite()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_200_training_steps_are_finite_and_learn():
    losses = train(200)
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])


@pytest.mark.slow
def test_2000_training_steps_are_finite():
    losses = train(2000)
    assert sum(losses[-100:]) / 100 < 0.1


def same_twice(device):
    def once():
        torch.manual_seed(3)
        net = v3.V3(19, **v3.SMALL).to(device)
        logits = net(torch.randn(2, 19, 2048, device=device))
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in net.parameters())]
    torch.use_deterministic_algorithms(True)
    try:
        return all(torch.equal(a, b) for a, b in zip(once(), once()))
    finally:
        torch.use_deterministic_algorithms(False)


def test_forward_and_backward_are_bit_identical_from_run_to_run():
    assert same_twice("cpu")


@cuda
def test_forward_and_backward_are_bit_identical_on_a_gpu(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert same_twice("cuda")


@cuda
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_a_gpu_gives_the_logits_and_gradients_of_the_cpu_within_each_precision(dtype):
    net, x, weights = trial({}, 15360)
    exact = logits_and_gradients(net, x, weights, torch.float32)
    found = logits_and_gradients(net.cuda(), x.cuda(), weights.cuda(), dtype)
    assert not beyond_bounds(exact, found, dtype)


# ---- what a training step asks of a GPU, counted on a CPU ----

@pytest.mark.slow
def test_a_training_step_launches_at_most_1500_kernels_and_touches_under_5_gb_a_window(monkeypatch):
    monkeypatch.setattr(v3, "BLOCK", 10**12)             # as on a GPU: all sequences at once
    net, x = v3.V3(19), torch.randn(1, 19, 15360)
    with Launches() as launches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
    print(f"{launches.count} launches, {launches.bytes / 1e9:.2f} GB")
    assert 500 < launches.count <= 1500
    assert 1e9 < launches.bytes < 5e9


@pytest.mark.slow
def test_compiled_forward_and_backward_are_one_graph_without_a_break():
    net, x = tiny(tcn_blocks=1), torch.randn(2, 4, 1024)
    plain = tiny(tcn_blocks=1)
    plain.load_state_dict(net.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=False)
    net.eval()
    plain.eval()
    for model in (compiled, plain):
        for _ in range(2):
            model.zero_grad()
            model(x).square().mean().backward()
    assert counter.frame_count == 1
    for p, q in zip(net.parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_layer_has_the_gradients_of_an_eager_one():
    stack, x = v3.Mamba2(8, layers=1, state=4, headdim=8), torch.randn(2, 24, 8)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    inputs = list(stack.parameters())
    eager = torch.autograd.grad(stack(x).square().sum(), inputs)
    for one, other in zip(eager, torch.autograd.grad(compiled(x).square().sum(), inputs)):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_under_compile_makes_one_graph_though_its_last_batch_is_smaller(small_corpus, tmp_path, monkeypatch, capfd):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    config = loaded(small_corpus, tmp_path, training__batch_size=3, training__epochs=1, model__tcn_blocks=2)
    config["training"]["compile"] = True
    assert training.run(config) == 0
    assert counter.frame_count == 1
    assert "compiled: the first step took" in capfd.readouterr().out


# ---- bench/gpu.py, tried on a CPU ----

def test_without_a_gpu_its_bench_is_one_line_and_exit_2():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = forked.run([sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "GPU" in done.stderr


@pytest.mark.slow
def test_the_sections_of_the_gpu_bench_that_start_no_other_program_run_on_a_cpu(monkeypatch):
    from bench import gpu
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    args = gpu.arguments()
    args.batches = (1,)
    monkeypatch.setattr(v3, "BLOCK", v3.BLOCK)
    found = {name: gpu.SECTIONS[name][0](args)
             for name in ("machine", "numerics", "training", "parts", "seizuretransformer", "saves")}
    assert [row["precision"] for row in found["training"]] == list(gpu.PRECISIONS)
    assert all(row["windows/s"] > 0 and row["launches"] > 100 for row in found["training"])
    assert all(row["correlation"] > 0.99 for row in found["numerics"])
    assert found["saves"][-1]["file holds what was saved"]
    claims = {row["claim"]: row for row in gpu.claims(found)}
    assert claims["stall of a save after the first, ms"]["measured"] > 0
    assert not claims["V3 / SeizureTransformer, windows/s"]["met"], "nothing was measured"
    assert gpu.markdown(found["machine"]).count("\n") == len(found["machine"]) + 1
    json.dumps(found)


def test_the_gpu_bench_names_tests_that_exist():
    from bench import gpu
    for name in gpu.TESTS["cuda"] + gpu.TESTS["cpu"]:
        file, test = name.split("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.slow
def test_the_whole_gpu_bench_runs_on_a_cpu_and_keeps_what_a_cut_left(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, "bench/gpu.py", "--device", "cpu", "--seconds", "3600", "--out", str(out)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert all("failed" not in row for rows in found.values() for row in rows), found
    short = subprocess.run([sys.executable, "bench/gpu.py", "--device", "cpu", "--seconds", "1", "--out", str(out)],
                           cwd=ROOT, capture_output=True, text=True)
    assert short.returncode == 1 and all("failed" in rows[0] for name, rows in json.loads(out.read_text()).items()
                                         if name != "claims")
