"""DynamicMaskAttention and flash_dmattn's call: against formulas in float64 that sort every query's keys, the gradients written out, steps against the whole at once, and how much the cache holds."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from modalign import masks, nn
from modalign.compat import flash_dmattn
from modalign.testing import peak_memory
from module_battery import F64, Case, battery, dense_attention, dense_rotation, opened, split


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def separated(B, N, width):
    """Tokens whose scores are so far apart that half types rank them as float64 does: along one direction, with rising or falling length."""
    sizes = torch.tensor([3.0, -4.0, 5.0, 1.0, -2.0, 4.0, 0.2, -3.0], dtype=F64)[:N]
    return randn(width, seed=3) * sizes[:, None] * torch.linspace(1, 1.2, B, dtype=F64)[:, None, None]


VALID = torch.tensor([False, True, True, True, False, True, True, True])
CASES = [
    Case("softplus", lambda: nn.DynamicMaskAttention(12, 4, key_heads=2, head_width=6, keep=3, rotary=100.0, bias=True), lambda B: ((separated(B, 8, 12),), {})),
    Case("exp", lambda: nn.DynamicMaskAttention(12, 4, key_heads=2, keep=3, state="exp"), lambda B: ((separated(B, 8, 12) / 8,), {"valid": VALID.expand(B, 8)})),
    Case("relu, q and k normalised", lambda: nn.DynamicMaskAttention(12, 4, head_width=6, mask_type="relu", qk_norm=True), lambda B: ((randn(B, 7, 12),), {})),
    Case("global", lambda: nn.DynamicMaskAttention(12, 2, keep=3, scope="global"), lambda B: ((separated(B, 7, 12),), {})),
]
TestBattery = battery(CASES)

OPTIONS = [
    dict(),
    dict(key_heads=2),
    dict(key_heads=1, qk_norm=True, rotary=50.0),
    dict(key_heads=2, state="exp", rotary=50.0),
    dict(state="exp", bias=True),
    dict(key_heads=2, scope="global", bias=True),
    dict(key_heads=2, state="exp", scope="global"),
    dict(key_heads=2, mask_type="relu", head_width=6, bias=True),
]


def make(seed, keep=3, width=12, heads=4, head_width=4, **options):
    """Weights of all signs, A too."""
    torch.manual_seed(seed)
    module = nn.DynamicMaskAttention(width, heads, head_width=head_width, keep=keep, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5))
    return module


def kept_by_hand(delta, keep, mask_type, scope):
    """[H, N, N] of delta [H, N]: for every query the keys, sorted by score and age."""
    heads, N = delta.shape
    kept = torch.zeros(heads, N, N, dtype=torch.bool)
    for h, i in itertools.product(range(heads), range(N)):
        row = delta[h].tolist()
        among = range(i + 1 if scope == "causal" else N)
        chosen = sorted(among, key=lambda j: (row[j], j), reverse=True)[:keep] if mask_type == "topk" else [j for j in among if row[j] > 0]
        kept[h, i, [j for j in chosen if j <= i and row[j] > -torch.inf]] = True
    return kept


def dense(module, weights, x, valid=None, positions=None):
    """The layer by its formula, and what it keeps; `weights` is its state_dict, or leaves in its place."""
    H, Hkv, N = module.heads, module.key_heads, x.shape[1]

    def project(name, y):
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(name, y):
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] if f"{name}.weight" in weights else y

    v = project("v_proj", x)
    q, k = norm("q_norm", split(project("q_proj", x), H)), norm("k_norm", split(project("k_proj", x), Hkv))
    if module.rotary is not None:
        positions = torch.arange(N) if positions is None else positions
        q, k = (dense_rotation(each, positions, module.rotary) for each in (q, k))
    delta = (weights["A"] * (1 + project("dt_proj", v).exp()).log()).transpose(1, 2)  # [B, key heads or heads, N]
    delta = delta.exp() if module.state == "exp" else delta
    if valid is not None:
        delta = delta.masked_fill(~valid[:, None], -torch.inf)
    kept = torch.stack([kept_by_hand(each.detach(), module.keep, module.mask_type, module.scope) for each in delta])
    delta, kept = (each.repeat_interleave(H // each.shape[1], 1) for each in (delta, kept))
    k, v = (each.repeat_interleave(H // Hkv, 1) for each in (k, split(v, Hkv)))
    z = (q @ k.mT / q.shape[-1] ** 0.5 + delta[:, :, None]).masked_fill(~kept, -torch.inf)
    out = z.softmax(-1).nan_to_num(0) @ v
    return project("o_proj", out.transpose(1, 2).flatten(2)), kept


def close(ours, want, tolerance=1e-10):
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_layer_is_its_formula(options, seed):
    """Outputs and the gradients of all weights and tokens."""
    module, x = make(seed, keep=seed + 2, **options), randn(2, 11, 12, seed=seed).requires_grad_()
    valid = None if seed == 0 else torch.rand(2, 11, generator=torch.Generator().manual_seed(seed)) < 0.7
    weights = {name: each for name, each in module.named_parameters()}
    want, _ = dense(module, weights, x, valid)
    out = module(x, valid=valid)
    close(out, want)
    leaves = [x, *weights.values()]
    up = randn(*out.shape, seed=9)
    for ours, theirs in zip(*(torch.autograd.grad((each * up).sum(), leaves) for each in (out, want)), strict=True):
        close(ours, theirs)


def test_gradcheck():
    for options in (dict(key_heads=1), dict(key_heads=1, state="exp")):
        module = make(1, keep=2, width=4, heads=2, **options)
        names, values = zip(*module.named_parameters(), strict=True)

        def function(x, *values, module=module, names=names):
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

        torch.autograd.gradcheck(function, (randn(1, 5, 4, seed=2).requires_grad_(), *values))


@pytest.mark.parametrize("state", ["softplus", "exp"])
def test_gradients_of_the_scores_are_column_sums(state):
    """dA = sum_j ddelta_j softplus(z_j), dz = ddelta A sigmoid(z), both times delta for "exp", where ddelta are column sums of ds; a value receives its own gradient and W_dt^T dz."""
    module, x = make(4, key_heads=2, state=state), randn(2, 9, 12, seed=5)
    group, value = (2 if state == "softplus" else 1), module.keys(x).value.detach().requires_grad_()
    module.v_proj.register_forward_hook(lambda *_: value.transpose(1, 2).flatten(2))
    out = module(x)
    up = randn(*out.shape, seed=6)
    grads = torch.autograd.grad((out * up).sum(), (module.A, module.dt_proj.weight, value))
    with torch.no_grad():
        z = (value.transpose(1, 2).flatten(2) @ module.dt_proj.weight.T).mT  # [B, S, N]
        A = module.A[:, None]
        delta = A * (1 + z.exp()).log()
        delta = delta.exp() if state == "exp" else delta
        kept = torch.stack([kept_by_hand(each, 3, "topk", "causal") for each in delta]).repeat_interleave(group, 1)
        q, k = module.queries(x), module.keys(x).key.repeat_interleave(2, 1)
        p = (q @ k.mT / 4**0.5 + delta.repeat_interleave(group, 1)[:, :, None]).masked_fill(~kept, -torch.inf).softmax(-1)
        wide = value.repeat_interleave(2, 1)
        do = split(up @ module.o_proj.weight, 4)
        dp = do @ wide.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        ddelta = ds.sum(2).unflatten(1, (-1, group)).sum(2)
        chain = ddelta * delta if state == "exp" else ddelta
        dz = chain * A * torch.sigmoid(z)
        close(ddelta.sum(-1), torch.zeros(2, module.A.shape[0], dtype=F64))
        close(grads[0], (chain * (1 + z.exp()).log()).sum((0, 2)))
        close(grads[1], torch.einsum("bsn,bnc->sc", dz, value.transpose(1, 2).flatten(2)))
        own = (p.mT @ do).unflatten(1, (2, 2)).sum(2)
        through_scores = split(dz.mT @ module.dt_proj.weight, 2)
        close(grads[2], own + through_scores)
        assert min(own.abs().max(), through_scores.abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------------------------------------------------ at the start


@pytest.mark.parametrize("state", ["softplus", "exp"])
@pytest.mark.parametrize("keep", [1, 4, 20])
def test_at_first_it_is_a_sliding_window_and_then_no_more(state, keep):
    torch.manual_seed(0)
    module = nn.DynamicMaskAttention(16, 4, key_heads=2, keep=keep, state=state, rotary=100.0).double()
    plain = nn.MaskedAttention(16, 4, key_heads=2, rotary=100.0).double()
    assert plain.load_state_dict(module.state_dict(), strict=False).unexpected_keys == ["A", "dt_proj.weight"]
    x = randn(2, 30, 16)
    window = plain(x, mask=masks.causal(30, window=keep))
    close(module(x), window)
    optimizer = torch.optim.SGD([module.A], lr=0.1)  # alone: the other weights are still those of the window
    (module(x) * randn(2, 30, 16, seed=1)).sum().backward()
    assert module.dt_proj.weight.grad.abs().max() == 0
    optimizer.step()
    if keep > 1:
        assert module.A.detach().abs().min() > 0 and (module(x) - window).abs().max() > 1e-3
    else:  # one key has the probability 1 whatever its score
        assert module.A.detach().abs().max() < 1e-12


def test_names_of_weights_are_the_published_ones():
    plain = {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "dt")} | {"A"}
    assert set(nn.DynamicMaskAttention(12, 4).state_dict()) == plain
    full = nn.DynamicMaskAttention(12, 4, key_heads=2, qk_norm=True, bias=True)
    assert set(full.state_dict()) == plain | {f"{name}_proj.bias" for name in ("q", "k", "v", "o", "dt")} | {"q_norm.weight", "k_norm.weight"}
    assert full.A.shape == (2,) and full.dt_proj.weight.shape == (2, 6) and full.keep == 2048 and full.state == "softplus"
    paper = nn.DynamicMaskAttention(12, 4, key_heads=2, state="exp")
    assert paper.A.shape == (4,) and paper.dt_proj.weight.shape == (4, 6)


def test_relu_keeps_the_heads_with_a_positive_A():
    module, x = make(0, key_heads=2, mask_type="relu"), randn(2, 9, 12)
    with torch.no_grad():
        module.A.copy_(torch.tensor([0.7, -0.7]))
        module.o_proj.weight.copy_(torch.eye(16)[:12])
        out = split(module(x), 3)  # of four heads
        assert out[:, 2:].abs().max() == 0 and out[:, :2].abs().min() > 0
        _, past = module(x, return_keys=True)
        assert past.key.shape[2] == 9


# -------------------------------------------------------------------------------------------------------------------------------------------- the cache

STEPS = [[23], [1] * 23, [3, 1, 7, 2, 10], [20, 1, 1, 1], [2, 19, 2]]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("options", [each for each in OPTIONS if "scope" not in each], ids=str)
def test_steps_are_the_whole_at_once(options, steps):
    """The choice exactly, numbers to rounding; with padding and with equal scores."""
    for seed, (keep, padded) in enumerate([(1, False), (4, True), (30, True)]):
        module, x = make(seed, keep=keep, **options), randn(2, 23, 12, seed=seed + 3)
        x[:, 5:9] = x[:, 12:13]  # equal tokens, equal scores
        generator = torch.Generator().manual_seed(seed)
        valid = torch.rand(2, 23, generator=generator) < 0.6 if padded else torch.ones(2, 23, dtype=torch.bool)
        valid[1] &= torch.arange(23) > 6  # from the left, as in batched generation
        positions = (valid.long().cumsum(1) - 1).clamp(0)
        with torch.no_grad():
            whole, all_at_once = module(x, valid=valid, positions=positions, return_keys=True)
            past, parts, start = None, [], 0
            for step in steps:
                rows = slice(start, start + step)
                out, past = module(x[:, rows], valid=valid[:, rows], positions=positions[:, rows], past=past, return_keys=True)
                parts.append(out)
                start += step
                assert past.key.shape[2] == (start if "mask_type" in options else min(keep, start)) and past.length == start
            close(torch.cat(parts, 1), whole)
            want, kept = dense(module, module.state_dict(), x, valid, positions)
            close(whole, want)
        assert torch.equal(past.index, all_at_once.index)
        if "mask_type" not in options:  # what the last query chose is what the cache has
            chosen = torch.zeros(past.score.shape[0], past.score.shape[1], 23, dtype=torch.bool).scatter(2, past.index, past.score > -torch.inf)
            assert torch.equal(chosen.repeat_interleave(4 // chosen.shape[1], 1), kept[:, :, -1])
        for ours, theirs in zip(past[:3], all_at_once[:3], strict=True):
            close(ours, theirs)


def test_positions_and_lengths_go_on_behind_the_cache():
    module, x = make(2, keep=2, rotary=50.0), randn(2, 12, 12)
    whole, lengths = module(x), torch.tensor([12, 8])
    _, past = module(x[:, :7], return_keys=True)
    close(module(x[:, 7:], past=past), whole[:, 7:])
    assert (module(x[:, 7:], past=past, positions=torch.arange(5)) - whole[:, 7:]).abs().max() > 1e-3
    short = module(x, valid=torch.arange(12) < lengths[:, None])
    assert (short - whole).abs().max() > 1e-3
    close(module(x, key_lengths=lengths), short)
    other = torch.arange(12).expand(2, 12) != 3
    close(module(x, key_lengths=lengths, valid=other), module(x, valid=other & (torch.arange(12) < lengths[:, None])))
    close(module(x[:, 7:], past=past, key_lengths=lengths), short[:, 7:])


def test_padding_does_not_count_and_what_sees_nothing_gives_0():
    module, x = make(3, keep=2), randn(1, 8, 12)
    valid = torch.tensor([[False, False, True, False, True, True, False, True]])
    out = module(x, valid=valid)
    close(out[valid], module(x[valid][None])[0])
    assert out[0, :2].abs().max() == 0
    changed = x.clone()
    changed[~valid] += 5
    assert torch.equal(module(changed, valid=valid)[valid], out[valid])


def test_steps_with_gradients_are_the_whole_at_once():
    """Training through the cache: the keys that are taken over keep theirs."""
    module, x = make(5, keep=3, key_heads=2, state="exp"), randn(2, 10, 12, seed=1)
    first, past = module(x[:, :6], return_keys=True)
    stepped = torch.cat([first, module(x[:, 6:], past=past)], 1)
    up = randn(2, 10, 12, seed=2)
    for ours, theirs in zip(*(torch.autograd.grad((each * up).sum(), list(module.parameters())) for each in (stepped, module(x))), strict=True):
        close(ours, theirs)


def test_global_scope_chooses_among_all_so_far():
    module, x = make(6, keep=3, scope="global"), randn(2, 12, 12)
    causal = make(6, keep=3)
    whole = module(x)
    assert (whole - causal(x)).abs().amax((0, 2))[:-1].max() > 1e-3  # early queries keep fewer
    close(whole[:, -1], causal(x)[:, -1])
    _, past = module(x[:, :11], return_keys=True)
    close(module(x[:, 11:], past=past), whole[:, 11:])


@pytest.mark.parametrize(("state", "heads"), [("softplus", 2), ("exp", 4)])
def test_the_cache_holds_keep_keys_however_many_tokens(state, heads):
    module = make(7, keep=5, key_heads=2, state=state)
    sizes = set()
    with torch.no_grad():
        _, past = module(randn(2, 40, 12), return_keys=True)
        for seed in range(30):
            _, past = module(randn(2, 1 + seed % 3, 12, seed=seed), past=past, return_keys=True)
            sizes.add(sum(each.untyped_storage().nbytes() for each in past))
    assert past.length == 100 and past.key.shape == past.value.shape == (2, heads, 5, 4) and past.score.shape == past.index.shape == (2, heads, 5)
    assert sizes == {2 * heads * 5 * (4 + 4 + 1 + 1) * 8 + 8}


def test_memory_of_decoding_does_not_grow_with_the_tokens():
    few, many = (peak_memory("test_dynamic_mask_module:probe", steps=steps).peak for steps in (4, 32))
    assert many < 1.3 * few + (4 << 20) and many < 32 * 1024 * 512 * 4 * 2  # less than all keys and values


def probe(steps):
    torch.manual_seed(0)
    module = nn.DynamicMaskAttention(512, 8, keep=512).eval()
    chunk = torch.randn(1, 1024, 512)

    @torch.no_grad()
    def call(count):
        past = None
        for _ in range(count):
            out, past = module(chunk, past=past, return_keys=True)
        return out, past

    return (lambda: call(steps)), (lambda: call(1))


def test_one_graph_for_all_steps_behind_a_full_cache():
    torch._dynamo.reset()  # what other tests compiled is not forgotten otherwise
    module, x = make(8, keep=4, rotary=50.0), randn(2, 12, 12)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        _, past = module(x[:, :6], return_keys=True)
        parts = []
        for at in range(6, 12):
            out, past = compiled(x[:, at : at + 1], past=past, return_keys=True)
            parts.append(out)
        close(torch.cat(parts, 1), module(x)[:, 6:])
    assert counter.frame_count == 1


def cache(width, heads, batch):
    return nn.DynamicMaskAttention(width, heads)(torch.ones(batch, 2, width), return_keys=True)[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.DynamicMaskAttention(12, 4, keep=0), ValueError, "DynamicMaskAttention: keep must be a whole number of at least 1, got 0"),
        (lambda: nn.DynamicMaskAttention(12, 4, state="zoh"), ValueError, 'DynamicMaskAttention: state must be "softplus" or "exp", got \'zoh\''),
        (lambda: nn.DynamicMaskAttention(12, 4, mask_type="top"), ValueError, 'DynamicMaskAttention: mask_type must be "topk" or "relu", got'),
        (lambda: nn.DynamicMaskAttention(12, 4, scope="row"), ValueError, 'DynamicMaskAttention: scope must be "causal" or "global", got'),
        (lambda: nn.DynamicMaskAttention(12, 4, mask_type="relu", state="exp"), ValueError, 'DynamicMaskAttention: state must be "softplus" with mask_type "relu"'),
        (lambda: nn.DynamicMaskAttention(12, 4, key_heads=3), ValueError, "MaskedAttention: key_heads must divide heads = 4, got 3"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 11)), ValueError, r"DynamicMaskAttention: x must be \[B, N, 12\], got"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 12), valid=torch.ones(2, 3)), ValueError, r"valid must be a bool tensor \[B, N\] = \[2, 3\]"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 12), valid=torch.ones(2, 1).bool()), ValueError, r"valid must be a bool tensor \[B, N\] = \[2, 3\]"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 12), key_lengths=torch.ones(2)), ValueError, r"key_lengths must be an int64 tensor \[B\] with B = 2, got"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 12), past=nn.KeyValues(*torch.ones(2, 2, 4, 3, 3))), TypeError, "past must be ScoredKeys, which return_keys gives"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 12), return_keys=1), TypeError, "DynamicMaskAttention: return_keys must be"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 12), past=cache(12, 4, 3)), ValueError, r"DynamicMaskAttention: past must be \[B, 4, M, 3\] with B = 2"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.ones(2, 3, 12), past=cache(12, 2, 2)), ValueError, r"DynamicMaskAttention: past must be \[B, 4, M, 3\], got"),
        (lambda: nn.DynamicMaskAttention(12, 4)(torch.full((1, 3, 12), torch.nan)), RuntimeError, "dynamic_mask_attention: bias must not hold NaN"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------------------------- flash_dmattn's interface


def problem(seed, B=2, H=4, Hkv=2, Nq=7, Nk=9, D=6):
    return [randn(*shape, seed=seed + n).requires_grad_() for n, shape in enumerate([(B, Nq, H, D), (B, Nk, Hkv, D), (B, Nk, Hkv, D)])]


def flash_by_hand(query, key, value, attn_mask=None, attn_bias=None, softmax_scale=None, is_causal=None, softcap=None):
    """All logits in float64, [B, N, H, D]."""
    (B, Nq, H, D), (Nk, Hkv) = query.shape, key.shape[1:3]
    q, k, v = query.transpose(1, 2), *(each.transpose(1, 2).repeat_interleave(H // Hkv, 1) for each in (key, value))
    s = q @ k.mT * (D**-0.5 if softmax_scale is None else softmax_scale)
    s = softcap * (s / softcap).tanh() if softcap else s

    def wide(each):
        return (each.repeat_interleave(H // Hkv, 1) if each.shape[1] == Hkv else each).expand(B, H, Nq, Nk)

    s = s if attn_bias is None else s + wide(attn_bias)
    keep = torch.ones(B, H, Nq, Nk, dtype=torch.bool) if attn_mask is None else wide(attn_mask)
    if is_causal:
        keep = keep & (torch.arange(Nk) <= torch.arange(Nq)[:, None] + Nk - Nq)
    s = s.masked_fill(~keep, -torch.inf)
    return (s.softmax(-1).nan_to_num(0) @ v).transpose(1, 2), s.logsumexp(-1)


SHAPES = [(B, H, Nq, Nk) for B in (1, 2) for H in (1, 2, 4) for Nq in (1, 7) for Nk in (1, 9)]


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_flash_dmattn_is_the_formula(seed):
    """Every shape of a bias with some shape of a mask, forward and backward, the lse too."""
    generator = torch.Generator().manual_seed(seed)
    inputs = problem(seed)
    bias, mask = randn(*SHAPES[seed], seed=seed + 5).requires_grad_(), torch.rand(SHAPES[-1 - seed], generator=generator) < 0.7
    options = dict(attn_mask=None if seed % 5 == 4 else mask, softmax_scale=(None, 0.3)[seed % 2], is_causal=(None, True, False)[seed % 3])
    out, lse, nothing = flash_dmattn.flash_dmattn_func(*inputs, attn_bias=bias, return_attn_probs=True, deterministic=seed % 2 == 0, **options)
    want, want_lse = flash_by_hand(*inputs, attn_bias=bias, **options)
    assert nothing is None
    close(out, want)
    close(lse, want_lse)
    up = randn(*out.shape, seed=seed + 6)
    for ours, theirs in zip(*(torch.autograd.grad((each * up).sum(), (*inputs, bias)) for each in (out, want)), strict=True):
        close(ours, theirs)


def test_flash_dmattn_by_its_options():
    inputs = problem(1)
    for softcap, causal in itertools.product((None, 0.0, 2.0), (None, True)):
        out = flash_dmattn.flash_dmattn_func(*inputs, softcap=softcap, is_causal=causal)
        close(out, flash_by_hand(*inputs, softcap=softcap, is_causal=causal)[0])
    long = problem(2, Nq=5, Nk=2)  # the first three queries see nothing
    out, lse, _ = flash_dmattn.flash_dmattn_func(*long, is_causal=True, return_attn_probs=True)
    assert out[:, :3].abs().max() == 0 and (lse[:, :, :3] == -torch.inf).all() and out[:, 3:].abs().min() > 0
    parameters = "query key value attn_mask attn_bias softmax_scale is_causal softcap deterministic return_attn_probs".split()
    assert list(inspect.signature(flash_dmattn.flash_dmattn_func).parameters) == parameters and flash_dmattn.flash_sparse_attn_func is flash_dmattn.flash_dmattn_func


def test_flash_dmattn_with_a_mask_made_outside_is_the_layer():
    """As code around the package does it: bias and top-w mask made first, then the call."""
    module, x = make(9, keep=3, key_heads=2), randn(2, 10, 12)
    with torch.no_grad():
        key, value = module.keys(x)
        score = module.scores(value)
        kept = torch.stack([kept_by_hand(each, 3, "topk", "causal") for each in score])
        q, k, v = (each.transpose(1, 2) for each in (module.queries(x), key, value))
        out = flash_dmattn.flash_sparse_attn_func(q, k, v, kept, score[:, :, None], is_causal=True)
        close(module.o_proj(out.flatten(2)), module(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(softcap=2.0, attn_bias=torch.zeros(1, 1, 1, 9, dtype=F64)), "flash_dmattn_func: softcap must be 0 where attn_bias is given, got 2.0"),
        (dict(query=torch.zeros(7, 4, 6)), r"flash_dmattn_func: query must have .* \[B, N, H, D\], got"),
        (dict(query=torch.zeros(1, 2, 7, 4, 6)), r"flash_dmattn_func: query must have 4 dimensions \[B, N, H, D\], got"),
        (dict(attn_mask=torch.zeros(2, 1, 1, 9)), "flash_dmattn_func: attn_mask must be a bool tensor, True where a pair is kept"),
        (dict(attn_bias=1.0), "flash_dmattn_func: attn_bias must be a tensor, got float"),
        (dict(is_causal="no"), "flash_dmattn_func: is_causal must be True, False or None"),
        (dict(softmax_scale="1"), "flash_dmattn_func: softmax_scale must be a number or None"),
        (dict(attn_mask=torch.ones(2, 3, 1, 9).bool()), r"mask must broadcast to \[B, H, Nq, Nk\] = \[2, 4, 7, 9\]"),
        (dict(attn_bias=torch.zeros(2, 1, 1, 128, dtype=F64)), "bias must broadcast to"),
        (dict(attn_bias=torch.zeros(2, 1, 1, 9, dtype=torch.int64)), "bias must be a tensor of torch.float64"),
    ],
)
def test_flash_dmattn_refuses_in_words(change, message):
    inputs = dict(zip(("query", "key", "value"), problem(3), strict=True))
    with pytest.raises((TypeError, ValueError), match=message):
        flash_dmattn.flash_dmattn_func(**(inputs | change))
