"""The matching head: pairs and labels, gradients, missing modalities, chunks, and that it learns and re-ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modalign.metrics import joint_retrieval
from modalign.nn import GramMatching
from modalign.ops import HardNegatives, clip_hard_negatives


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


class Spy:
    """A fusion encoder that remembers which rows it saw: the first number of a row is its index."""

    def __init__(self):
        self.seen = []

    def __call__(self, words, clips):
        self.seen += list(zip(words["ids"][:, 0].tolist(), clips[0][:, 0].tolist(), strict=True))
        return words["ids"].float() + clips[0]


def problem(B, D=8):
    words = {"ids": torch.arange(B)[:, None].expand(B, D).clone(), "mask": None, "length": 7}
    clips = (torch.arange(B, dtype=torch.float32)[:, None].expand(B, D).clone(),)
    return words, clips, unit(B, 16), [unit(B, 16) for _ in range(2)]


def test_pairs_and_labels_in_the_published_order():
    B, spy = 5, Spy()
    words, clips, anchor, others = problem(B)
    out = GramMatching(8)(spy, anchor, others, anchor_inputs=words, data_inputs=clips)
    own, negatives = list(range(B)), out.negatives
    assert spy.seen == [*zip(own, own, strict=True), *zip(own, negatives.candidates.tolist(), strict=True), *zip(negatives.anchors.tolist(), own, strict=True)]
    assert out.labels.tolist() == [1] * B + [0] * 2 * B and out.logits.shape == (3 * B, 2)
    assert all(a != b for a, b in spy.seen[B:])
    assert torch.allclose(out.loss, F.cross_entropy(out.logits, out.labels))


def test_gradients_reach_the_inputs_and_not_the_draw():
    matching, anchor, others = GramMatching(8), unit(6, 8).requires_grad_(), [unit(6, 8).requires_grad_() for _ in range(2)]
    features = torch.randn(6, 8, requires_grad=True)
    matching(lambda a, b: a * b, anchor, others, anchor_inputs=features, data_inputs=torch.randn(6, 8)).loss.backward()
    assert features.grad.abs().sum() > 0 and anchor.grad is None and others[0].grad is None
    assert all(parameter.grad is not None for parameter in matching.parameters())


def test_chunks_change_nothing_and_the_generator_decides():
    matching, (words, clips, anchor, others) = GramMatching(8), problem(7)

    def run(seed, chunk=None):
        given = {"anchor_inputs": words, "data_inputs": clips, "chunk": chunk, "generator": torch.Generator().manual_seed(seed)}
        return matching(lambda a, b: a["ids"].float() * b[0], anchor, others, **given)

    whole = run(1)
    for chunk in (1, 4, 21, 100):
        assert torch.allclose(run(1, chunk).logits, whole.logits, atol=1e-5)
    assert any(not torch.equal(run(seed).negatives.candidates, whole.negatives.candidates) for seed in range(2, 8))


def test_samples_without_data_take_no_part():
    matching, (words, clips, anchor, others) = GramMatching(8), problem(5)
    present = torch.ones(5, 2, dtype=torch.bool)
    present[3] = False
    out = matching(Spy(), anchor, others, anchor_inputs=words, data_inputs=clips, present=present)
    assert out.labels[3] == -1 and out.labels[8] == -1 and out.labels[13] == -1 and not (out.negatives.candidates == 3).any()
    kept = out.labels >= 0
    assert torch.allclose(out.loss, F.cross_entropy(out.logits[kept], out.labels[kept]))
    nobody = HardNegatives(torch.full((5,), -1), torch.full((5,), -1))
    alone = matching(Spy(), anchor, others, anchor_inputs=words, data_inputs=clips, present=torch.zeros(5, 2, dtype=torch.bool), negatives=nobody)
    assert alone.loss == 0 and (alone.labels == -1).all()
    alone.loss.backward()


def test_image_text_matching_with_negatives_by_cosine():
    image, text = unit(6, 8), unit(6, 8)
    negatives = clip_hard_negatives(image, text, logit_scale=14.0)
    out = GramMatching(8)(lambda a, b: a * b, image, [text], anchor_inputs=image, data_inputs=text, negatives=negatives)
    assert out.negatives is negatives


def test_it_learns_and_ranks_again():
    """Pairs match where their signs agree, which volumes do not see: a vector and its negative span the same. The head does."""
    torch.manual_seed(0)
    B, D = 64, 16
    anchor = unit(B // 2, D)
    anchor = torch.cat([anchor, -anchor])  # twins that volumes cannot tell apart
    data = F.normalize(anchor + 0.05 * torch.randn(B, D), dim=1)
    matching = GramMatching(D, temperature=0.05)
    optimizer = torch.optim.Adam(matching.parameters(), 1e-2)
    before = joint_retrieval(anchor, [data], score="volume").to_tuples
    for _ in range(150):
        optimizer.zero_grad()
        matching(lambda a, b: a * b * D**0.5, anchor, [data], anchor_inputs=anchor, data_inputs=data).loss.backward()
        optimizer.step()
    rerank = matching.reranker(lambda a, b: a * b * D**0.5, anchor, data, chunk=37)
    after = joint_retrieval(anchor, [data], score="volume", rerank=rerank, rerank_top=4)
    assert before.r1 < 0.75 and after.to_tuples.r1 > 0.95 and after.to_anchors.r1 > 0.95
    assert matching.training and not rerank(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)).requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"anchor_inputs": torch.randn(4, 8)}, "anchor_inputs, data_inputs and anchor must have as many rows, got 4, 3 and 3"),
        ({"anchor_inputs": (torch.randn(3, 8), torch.randn(2, 8))}, r"anchor_inputs must hold tensors with the batch first, of one size, got sizes \[2, 3\]"),
        ({"anchor_inputs": 7}, r"anchor_inputs must hold tensors with the batch first, of one size, got sizes \[\]"),
        ({"chunk": 0}, "chunk must be None or a whole number of at least 1, got 0"),
        ({"negatives": HardNegatives(torch.zeros(2), torch.zeros(3))}, r"negatives must be two int64 tensors \[3\], got \[\[2\], \[3\]\]"),
    ],
)
def test_bad_input(change, message):
    given = {"anchor_inputs": torch.randn(3, 8), "data_inputs": torch.randn(3, 8)} | change
    with pytest.raises(ValueError, match=f"GramMatching: {message}"):
        GramMatching(8)(lambda a, b: a * b, unit(3, 8), [unit(3, 8)], **given)
    with pytest.raises(ValueError, match=r"GramMatching: fuse must give a tensor \[9, 8\], got \[9, 4\]"):
        GramMatching(8)(lambda a, b: a[:, :4], unit(3, 8), [unit(3, 8)], anchor_inputs=torch.randn(3, 8), data_inputs=torch.randn(3, 8))
    with pytest.raises(ValueError, match="gram_hard_negatives: anchor must have at least 2 rows, got a batch of one"):
        GramMatching(8)(lambda a, b: a, unit(1, 8), [unit(1, 8)], anchor_inputs=torch.randn(1, 8), data_inputs=torch.randn(1, 8))
    with pytest.raises(ValueError, match="GramMatching: width must be a whole number"):
        GramMatching(0)
