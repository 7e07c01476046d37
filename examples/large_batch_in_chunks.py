"""A large contrastive batch with the memory of a small one: embeddings are made in chunks without a graph, the streaming loss gives its gradient for all of
them at once, and the chunks run again with that gradient (GradCache, 2021). The parameters get the gradient of the whole batch.

The streaming loss takes the matrix of similarities out of memory, this takes out the activations of the encoders: what is left grows with B x D alone.
"""

import torch
import torch.nn.functional as F

from modalign.ops import gram_contrastive_loss

torch.manual_seed(0)
B, CHUNK, WIDTH = 512, 32, 64
encoders = torch.nn.ModuleDict(
    {
        name: torch.nn.Sequential(torch.nn.Linear(width, 128), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(128, WIDTH))
        for name, width in {"text": 40, "video": 60, "audio": 20}.items()
    }
)
batch = {"text": torch.randn(B, 40), "video": torch.randn(B, 60), "audio": torch.randn(B, 20)}


def loss_of(embedded):
    return gram_contrastive_loss(embedded["text"], [embedded["video"], embedded["audio"]], normalize=True, label_smoothing=0.1)


def in_chunks(encoder, inputs, seed):
    """One chunk after the other. The seed of a chunk makes dropout the same when it runs again."""
    for number, piece in enumerate(inputs.split(CHUNK)):
        torch.manual_seed(1000 * seed + number)
        yield encoder(piece)


def step_of_the_whole_batch():
    with torch.random.fork_rng():
        embedded = {name: torch.cat(list(in_chunks(encoder, batch[name], seed))) for seed, (name, encoder) in enumerate(encoders.items())}
    loss = loss_of(embedded)
    loss.backward()
    return loss


def step_in_chunks():
    with torch.random.fork_rng():
        with torch.no_grad():
            embedded = {name: torch.cat(list(in_chunks(encoder, batch[name], seed))) for seed, (name, encoder) in enumerate(encoders.items())}
        leaves = {name: rows.requires_grad_() for name, rows in embedded.items()}
        loss = loss_of(leaves)
        loss.backward()  # gradients of the embeddings alone
        for seed, (name, encoder) in enumerate(encoders.items()):
            for rows, gradient in zip(in_chunks(encoder, batch[name], seed), leaves[name].grad.split(CHUNK), strict=True):
                rows.backward(gradient)  # one graph of CHUNK rows at a time; parameters add up
    return loss


gradients = []
for step in (step_of_the_whole_batch, step_in_chunks):
    encoders.zero_grad()
    loss = step()
    gradients.append(torch.cat([parameter.grad.flatten() for parameter in encoders.parameters()]))
    print(f"{step.__name__:<24} loss {loss.item():.6f}   norm of the gradient {gradients[-1].norm():.6f}")
apart = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
assert apart < 1e-5, apart
print(f"{B} samples in chunks of {CHUNK}: the gradients of the parameters agree to {apart:.0e}")
assert F.cosine_similarity(*gradients, dim=0) > 0.999999
