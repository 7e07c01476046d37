"""The released GRAM and TRIANGLE functions: calls, shapes and values as people know them, and what is better here."""

import pytest
import torch

from modalign.compat import gram
from modalign.ops import triangle_area


def released_volume(language, *inputs):
    """What the released functions compute: a k x k determinant for every pair, abs, sqrt."""
    vectors = [language, *inputs]
    B1, B2 = len(language), len(inputs[0])
    expected = torch.empty(B1, B2, dtype=language.dtype)
    for i in range(B1):
        for j in range(B2):
            M = torch.stack([vectors[0][i], *(v[j] for v in vectors[1:])])
            expected[i, j] = torch.det(M @ M.T).abs().sqrt()
    return expected


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("k, function", [(3, gram.volume_computation3), (4, gram.volume_computation4), (5, gram.volume_computation5)])
def test_fixed_arities(k, function):
    language, *others = unit(4, 32), *(unit(6, 32) for _ in range(k - 1))
    value = function(language, *others)
    assert value.shape == (4, 6) and value.dtype is torch.float32
    torch.testing.assert_close(value, released_volume(language, *others), rtol=1e-5, atol=1e-6)
    assert torch.equal(value, gram.volume_computation(language, *others))
    assert torch.equal(value[:, :1], gram.volume_computation(language, *(o[:1] for o in others)))


@pytest.mark.parametrize("k", [2, 6, 9])
def test_any_number_of_inputs(k):
    language, *others = unit(3, 32), *(unit(5, 32) for _ in range(k - 1))
    torch.testing.assert_close(gram.volume_computation(language, *others), released_volume(language, *others), rtol=1e-5, atol=1e-6)


def test_no_inputs_is_an_error():
    with pytest.raises(ValueError, match="others must hold at least one tensor"):
        gram.volume_computation(unit(3, 8))


def test_area_is_twice_the_squared_area():
    """The released area_computation, written out: it leaves out the square root."""
    language, video, audio = unit(4, 32), unit(6, 32), unit(6, 32)
    u, v = language[:, None] - video, language[:, None] - audio
    expected = (u.square().sum(-1) * v.square().sum(-1) - (u * v).sum(-1) ** 2) / 2
    value = gram.area_computation(language, video, audio)
    assert value.shape == (4, 6)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, 2 * triangle_area(language, video, audio) ** 2, rtol=1e-5, atol=1e-6)


def test_identical_vectors_have_finite_gradients():
    """Where the released code returns NaN for every input."""
    x = unit(3, 16).requires_grad_()
    for value in (gram.volume_computation3(x, x, x), gram.area_computation(x, x, x)):
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert torch.isfinite(gradient).all() and not value.diagonal().count_nonzero()


def test_trains_as_a_loss():
    """A few steps of the usual objective pull the modalities of a tuple together."""
    torch.manual_seed(0)
    language, video, audio = (torch.randn(16, 8, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.Adam([language, video, audio], lr=0.05)
    target = torch.arange(16)
    losses = []
    for _ in range(40):
        language_unit, video_unit, audio_unit = (torch.nn.functional.normalize(x, dim=-1) for x in (language, video, audio))
        volume = gram.volume_computation3(language_unit, video_unit, audio_unit)
        loss = (torch.nn.functional.cross_entropy(-volume / 0.07, target) + torch.nn.functional.cross_entropy(-volume.T / 0.07, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], losses
