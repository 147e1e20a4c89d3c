"""What dark_loss costs beside the form that one would first write: time and memory of one large batch.

python assets/suite/loss_cost.py
"""

import math
import resource
import sys
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import dark  # noqa: E402


def masked_form(image, text, scale, t_image, t_text, t_scale, *, beta):
    """The loss as one would first write it: every softmax anew for each direction, the diagonal taken by a mask."""
    image, text, t_image, t_text = (F.normalize(x, dim=-1) for x in (image, text, t_image, t_text))
    eye, labels = torch.eye(len(image), dtype=torch.bool), torch.arange(len(image))
    logits, t_logits = scale * image @ text.T, t_scale * t_image @ t_text.T
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    for s, t in ((logits, t_logits), (logits.T, t_logits.T)):
        terms = -(t / 5).softmax(1) * s.log_softmax(1)
        loss = loss + (terms[eye].sum() + beta * terms[~eye].sum()) / (2 * len(image))
    return loss, {}


def cost_of_loss(loss_of, n=4096):
    """Seconds (best of 5, forward and backward), the loss, MiB (growth of the peak resident size) on one batch."""
    torch.manual_seed(0)
    image, text, t_image, t_text = (torch.randn(n, width) for width in (512, 512, 768, 768))
    batch = [image, text, torch.tensor(20.0), t_image, t_text, torch.tensor(100.0)]
    batch = [x.requires_grad_(k < 3) for k, x in enumerate(batch)]
    once = lambda batch: torch.autograd.grad(loss_of(*batch, beta=-1.6)[0], batch[:3])
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    once([x[:64] if x.ndim else x for x in batch])
    before = peak()
    seconds = min(timeit.repeat(lambda: once(batch), number=1, repeat=5))
    return seconds, loss_of(*batch, beta=-1.6)[0].item(), peak() - before


if __name__ == "__main__":
    losses = []
    for form in (dark.dark_loss, masked_form):
        with torch.multiprocessing.get_context("spawn").Pool(1) as fresh:
            seconds, loss, mebibytes = fresh.apply(cost_of_loss, (form,))
        losses.append(loss)
        what = f"{form.__name__:11} N = 4096, D = 512, D_t = 768, forward and backward"
        print(f"{what}: {seconds:.2f} s, {mebibytes:.0f} MiB")
    assert math.isclose(*losses, rel_tol=1e-4), losses
