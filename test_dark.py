"""python -m pytest: the mathematics against loop-written references, and the three scripts end to end, offline."""

import asyncio
import copy
import dataclasses
import hashlib
import inspect
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import dark
import evaluate
import export
from export import ct

HERE = Path(__file__).parent
HC18 = HERE.parent / "shared" / "hc18"
needs_hc18 = pytest.mark.skipif(not HC18.exists(), reason="the HC18 subset is not here")


def fails(capsys, call, *words):
    """The call must end with exit code 2 and one line on stderr that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0], lines[0]


# ---------------------------------------------------------------- the loss


def random_batch(n=7, d=5, d_t=9, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    image, text = torch.randn(n, d, generator=g, dtype=dtype), torch.randn(n, d, generator=g, dtype=dtype)
    t_image, t_text = torch.randn(n, d_t, generator=g, dtype=dtype), torch.randn(n, d_t, generator=g, dtype=dtype)
    return [image, text, torch.tensor(12.0, dtype=dtype), t_image, t_text, torch.tensor(40.0, dtype=dtype)]


def reference(image, text, scale, t_image, t_text, t_scale, beta, diag=1.0, tau=5.0, smooth=0.0):
    """The equations term by term."""
    n = len(image)
    unit = lambda x: x / x.norm()
    clip = kd_diag = kd_off = 0
    for rows, cols, t_rows, t_cols in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        for i in range(n):
            s = [scale * (unit(rows[i]) * unit(cols[j])).sum() for j in range(n)]
            t = [(t_scale * (unit(t_rows[i]) * unit(t_cols[j])).sum()).item() / tau for j in range(n)]
            log_q = [s[j] - sum(x.exp() for x in s).log() for j in range(n)]
            p = [(1 - smooth) * math.exp(t[j]) / sum(map(math.exp, t)) + smooth / n for j in range(n)]
            clip = clip - log_q[i] / (2 * n)
            kd_diag = kd_diag - p[i] * log_q[i] / (2 * n)
            kd_off = kd_off - sum(p[j] * log_q[j] for j in range(n) if j != i) / (2 * n)
    return clip + diag * kd_diag + beta * kd_off, {"clip": clip, "diag": kd_diag, "off": kd_off}


WEIGHTS = [
    dict(beta=2.0),
    dict(beta=-1.6),
    dict(beta=0.3, diag=0.3, smooth=0.1),
    dict(beta=0.0, diag=0.0),
    dict(beta=-0.8, tau=1.0),
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradient_equal_the_loops(weights):
    ours, loops = random_batch(), random_batch()
    for batch in (ours, loops):
        for x in batch[:3]:
            x.requires_grad_()
    loss, parts = dark.dark_loss(*ours, **weights)
    expected, expected_parts = reference(*loops, **weights)
    torch.testing.assert_close(loss, expected)
    for name in ("clip", "diag", "off"):
        torch.testing.assert_close(parts[name], expected_parts[name].detach())
    loss.backward()
    expected.backward()
    for x, y in zip(ours[:3], loops[:3]):
        torch.testing.assert_close(x.grad, y.grad)


def masked_form(image, text, scale, t_image, t_text, t_scale, *, beta, diag=1.0, tau=5.0):
    """The loss as one would first write it: every softmax anew for each direction, the diagonal taken by a mask."""
    image, text, t_image, t_text = (F.normalize(x, dim=-1) for x in (image, text, t_image, t_text))
    eye, labels = torch.eye(len(image), dtype=torch.bool), torch.arange(len(image))
    logits, t_logits = scale * image @ text.T, t_scale * t_image @ t_text.T
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    for s, t in ((logits, t_logits), (logits.T, t_logits.T)):
        terms = -(t / tau).softmax(1) * s.log_softmax(1)
        loss = loss + (diag * terms[eye].sum() + beta * terms[~eye].sum()) / (2 * len(image))
    return loss, {}


def test_loss_equals_the_masked_form():
    batch = random_batch(n=50)
    torch.testing.assert_close(dark.dark_loss(*batch, beta=-1.6)[0], masked_form(*batch, beta=-1.6)[0])


def test_diag_and_off_sum_to_the_cross_entropy():
    image, text, scale, t_image, t_text, t_scale = batch = random_batch(n=33)
    logits = scale * F.normalize(image) @ F.normalize(text).T
    t_logits = t_scale * F.normalize(t_image) @ F.normalize(t_text).T
    whole = sum(F.cross_entropy(s, (t / 5).softmax(1)) for s, t in ((logits, t_logits), (logits.T, t_logits.T))) / 2
    _, parts = dark.dark_loss(*batch, beta=-1.0)
    torch.testing.assert_close(parts["diag"] + parts["off"], whole)


def test_fp32_is_close_to_fp64_where_the_off_diagonal_nearly_vanishes():
    batch = random_batch(n=256, d=64, d_t=96)
    batch[1], batch[4] = batch[0] + 0.1 * batch[1], batch[3] + 0.1 * batch[4]  # well aligned, teacher confident
    batch[2] = batch[5] = torch.tensor(100.0, dtype=torch.float64)
    exact = dark.dark_loss(*batch, beta=-1.6)[1]["off"]
    single = dark.dark_loss(*[x.float() for x in batch], beta=-1.6)[1]["off"]
    assert abs(single / exact - 1) < 1e-4 and exact < 0.01


def test_autocast_changes_nothing_and_the_teacher_gets_no_gradient():
    batch = [x.float() for x in random_batch(n=16)]
    for x in batch:
        x.requires_grad_()
    plain, _ = dark.dark_loss(*batch, beta=-1.6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, parts = dark.dark_loss(*batch, beta=-1.6)
        half, _ = dark.dark_loss(*[x.bfloat16() for x in batch], beta=-1.6)
    assert torch.equal(plain, mixed) and half.dtype == torch.float32
    assert not any(v.requires_grad for v in parts.values())
    mixed.backward()
    assert all(x.grad is not None for x in batch[:3]) and all(x.grad is None for x in batch[3:])


def test_beta_decides_whether_a_confusion_is_imitated_or_repelled():
    # The teacher takes image 0 for text 1. The student's similarity of the two must rise with beta > 0, else fall.
    t_image = torch.eye(3)
    t_text = torch.tensor([[0.6, 0.0, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for beta, sign in ((1.0, -1), (-1.0, 1)):
        gradient = []
        for weight in (beta, 0.0):
            image = (torch.eye(3) + 0.1).requires_grad_()
            text = (torch.eye(3) + 0.1).detach()
            args = (image, text, torch.tensor(5.0), t_image, t_text, torch.tensor(20.0))
            dark.dark_loss(*args, beta=weight)[0].backward()
            gradient.append((image.grad[0] * F.normalize(text, dim=-1)[1]).sum())
        assert torch.sign(gradient[0] - gradient[1]) == sign


def test_backward_keeps_only_two_matrices():
    n, kept = 64, {}
    batch = [x.float() for x in random_batch(n=n, d=8)]
    batch[0].requires_grad_()

    def remember(x):
        if x.shape == (n, n):
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        dark.dark_loss(*batch, beta=-1.0)
    assert len(kept) == 2  # the logits and the teacher's off-diagonal


def test_the_loss_lifts_out_of_the_file():
    namespace = {"torch": torch, "F": F}
    exec(inspect.getsource(dark.dark_loss), namespace)
    batch = random_batch()
    assert torch.equal(namespace["dark_loss"](*batch, beta=-1.6)[0], dark.dark_loss(*batch, beta=-1.6)[0])


def test_schedules():
    assert dark.beta_at(0, 100, 2.0, -0.8) == 2.0
    assert dark.beta_at(100, 100, 2.0, -0.8) == pytest.approx(-1.6)
    assert dark.beta_at(50, 100, 2.0, -0.8) == pytest.approx(0.2)
    for r, crossing in ((-0.8, 11.1), (-0.4, 14.3)):  # epochs of 20, as README states
        assert round(20 / (1 - r), 1) == crossing
        assert dark.beta_at(20 / (1 - r), 20, 2.0, r) == pytest.approx(0, abs=1e-12)
    assert dark.lr_at(0, 1000, 1.0, 500) == pytest.approx(1 / 500)
    assert dark.lr_at(499, 1000, 1.0, 500) == dark.lr_at(500, 1000, 1.0, 500) == 1.0
    assert dark.lr_at(750, 1000, 1.0, 500) == pytest.approx(0.5)
    assert 0 < dark.lr_at(999, 1000, 1.0, 500) < 1e-4


def test_clamp_is_needed_and_holds():
    # Repulsion alone, free embeddings: the scale grows without end unless it is clamped.
    clip = torch.nn.Module()
    clip.logit_scale = torch.nn.Parameter(torch.tensor(4.0))
    batch = [x.float() for x in random_batch()]
    optimizer = torch.optim.SGD([clip.logit_scale], lr=0.1)
    largest = []
    for clamp in (False, True):
        for _ in range(60):
            optimizer.zero_grad()
            dark.dark_loss(batch[0], batch[1], clip.logit_scale.exp(), *batch[3:], beta=-3.0)[0].backward()
            clip.logit_scale.grad.clamp_(-1, 1)
            optimizer.step()
            if clamp:
                dark.clamp_scale(clip)
        largest.append(clip.logit_scale.exp().item())
    assert largest[0] > 1000 and 99 < largest[1] <= 100


def test_ablation_rows_are_choices_of_the_two_weights():
    def weights(name, t):
        cfg, _ = dark.parse_args(["--ablation", name])
        beta = dark.beta_at(t, 10, cfg.beta0, cfg.r)
        return pytest.approx(beta if cfg.coupled else cfg.diag), pytest.approx(beta)

    table = {
        "no-kd": [(0, 0), (0, 0)],
        "static": [(1, 1), (1, 1)],
        "static-feat": [(1, 1), (1, 1)],
        "decay": [(1, 1), (0.1, 0.1)],
        "full-decay": [(1, 1), (0, 0)],
        "conf-penalty": [(1, 1), (0.1, 0.1)],
        "coupled": [(2, 2), (-1.6, -1.6)],
        "selective": [(1, 2), (1, -1.6)],
        "beta4": [(1, 4), (1, -3.2)],
        "beta8": [(1, 8), (1, -6.4)],
        "r-0.5": [(1, 2), (1, -1)],
        "r-0.4": [(1, 2), (1, -0.8)],
    }
    assert table.keys() == dark.ABLATIONS.keys()
    for name, (start, end) in table.items():
        assert weights(name, 0) == start and weights(name, 10) == end, name
    assert dark.parse_args(["--ablation", "conf-penalty"])[0].smooth == 0.1
    assert dark.parse_args(["--ablation", "static-feat"])[0].feature == 2000
    assert dark.parse_args(["--ablation", "beta4", "--beta0", "3"])[0].beta0 == 3  # a given flag wins


# ---------------------------------------------------------------- the step


def tiny_model(seed=0, patch_dropout=0.0):
    """A CLIP without batch norm, for gradients that must not depend on how a batch is cut."""
    import open_clip

    torch.manual_seed(seed)
    vision = dict(image_size=16, layers=1, width=32, head_width=16, patch_size=8, patch_dropout=patch_dropout)
    clip = open_clip.CLIP(24, vision, dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1))
    return dark.Model("tiny", clip, None, 8, 16, (0.5,) * 3, (0.5,) * 3, "bilinear")


def tiny_batch(n=8):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 16, 16, 3), generator=g, dtype=torch.uint8)
    return images, torch.randint(1, 50, (n, 8), generator=g)


def tiny_step(net, images, tokens, targets, chunk, **settings):
    cfg = dark.Config(**settings)
    objective = lambda embeddings, scale: dark.batch_loss(cfg, -1.6, embeddings, scale, targets, torch.tensor(30.0))
    seeds = list(range(-(-len(tokens) // chunk)))
    return dark.forward_backward(net, images, tokens, chunk, seeds, objective)


def tiny_towers(project_to=0, **more):
    model = tiny_model(**more)
    dark.embedding_size, original = (lambda _: 24), dark.embedding_size
    try:
        return dark.Towers(model, project_to)
    finally:
        dark.embedding_size = original


def same(a, b):
    """Up to fp32 rounding: plain accumulation, or a gather without gradient, is off by tens of percent."""
    return (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("feature", [0.0, 2000.0])
def test_micro_batches_give_the_full_batch_gradient(feature):
    images, tokens = tiny_batch()
    targets = [torch.randn(8, 40, generator=torch.Generator().manual_seed(k)) for k in (2, 3)]
    found = []
    for chunk in (8, 2):
        net = tiny_towers(40 if feature else 0)
        for p in net.projections.parameters():
            torch.nn.init.constant_(p, 0.01)
        loss, parts = tiny_step(net, images, tokens, targets, chunk, feature=feature)
        found.append((loss, parts, gradients(net)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert ("feature" in found[0][1]) == bool(feature)
    for name, gradient in found[0][2].items():
        assert gradient.abs().max() > 0 or "bias" in name, name
        assert same(found[1][2][name], gradient), name


def test_both_passes_of_a_micro_batch_drop_the_same_patches():
    images, tokens = tiny_batch()
    seen = []
    net = tiny_towers(patch_dropout=0.5).train()
    net.register_forward_hook(lambda module, args, output: seen.append(output[0][0].detach()))
    tiny_step(net, images, tokens, None, 4)
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0][:4], net(images[:4], tokens[:4])[0][0])  # it does drop


def test_batch_norm_statistics_move_once_with_micro_batches():
    torch.manual_seed(0)
    model = dark.open_model("demo-fastvit")
    net = dark.Towers(model).train()
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    tiny_step(net, images, model.tokenizer(["a"] * 8), None, 4)
    counts = {int(b) for name, b in net.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}  # once per chunk


def distributed_worker(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, tokens = tiny_batch()
    targets = [torch.randn(8, 40, generator=torch.Generator().manual_seed(k)) for k in (2, 3)]
    mine = slice(4 * rank, 4 * rank + 4)
    gathered = [dark.gather(t[mine]) for t in targets]
    assert all(torch.equal(a, b) for a, b in zip(gathered, targets))
    for chunk in (4, 2):
        net = torch.nn.parallel.DistributedDataParallel(tiny_towers())
        tiny_step(net, images[mine], tokens[mine], gathered, chunk)
        torch.save(gradients(net.module), f"{folder}/gradient{chunk}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    images, tokens = tiny_batch()
    targets = [torch.randn(8, 40, generator=torch.Generator().manual_seed(k)) for k in (2, 3)]
    net = tiny_towers()
    tiny_step(net, images, tokens, targets, 8)
    mp.spawn(distributed_worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for chunk in (4, 2):  # 2: with micro-batches
            for name, gradient in torch.load(tmp_path / f"gradient{chunk}-{rank}.pt", weights_only=True).items():
                assert same(gradient, net.get_parameter(name).grad), name


def test_the_paper_student_takes_a_step():
    torch.manual_seed(0)
    model = dark.open_model("MobileCLIP2-S0")  # in channels-last memory its backward crashes torch on a CPU
    net = dark.Towers(model).to("cpu", memory_format=dark.layout(torch.device("cpu"))).train()
    images = torch.randint(0, 256, (4, 256, 256, 3), dtype=torch.uint8)
    loss, _ = tiny_step(net, images, model.tokenizer(["a", "b", "c", "d"]), None, 2)
    assert math.isfinite(loss.item()) and all(p.grad is not None for p in net.parameters())


def test_gather_is_the_identity_without_a_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert dark.gather(x) is x


def test_optimizer_decays_matrices_only():
    model = dark.open_model("demo-fastvit")
    net = dark.Towers(model)
    decayed, free = dark.make_optimizer(dark.Config(), net).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert decayed["betas"] == (0.9, 0.98) and decayed["eps"] == 1e-6
    names = {id(p): name for name, p in net.named_parameters()}
    free = {names[id(p)] for p in free["params"]}
    assert "clip.logit_scale" in free and "clip.ln_final.weight" in free
    assert all("bias" not in names[id(p)] for p in decayed["params"])
    assert any("gamma" in name for name in free)  # FastViT's layer scales, shaped (C, 1, 1)
    assert len(free) + len(decayed["params"]) == len(names)


# ---------------------------------------------------------------- the data


def png(color=128, size=(40, 30), mode="L", format="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair_members(n, first=0):
    for i in range(first, first + n):
        yield f"{i:04d}.jpg", png(i % 256, format="JPEG")
        yield f"{i:04d}.json", b"{}"
        yield f"{i:04d}.txt", f"caption {i}".encode()


def pairs_of(data, **settings):
    student = dark.open_model("demo-fastvit")
    cfg = dark.Config(data=(str(data),), spacing_size=64, **settings)
    return dark.Pairs(cfg, [student, student])


def test_tar_pairs_are_found_and_read(tmp_path):
    members = [
        ("b/1.png", png(200)), ("b/1.txt", b"in a folder"), ("a.seg.png", png()), ("a.jpeg", png(50, format="JPEG")),
        ("a.txt", "ümlaut\n".encode()), ("alone.webp", png(format="WEBP")), ("._a.txt", b"x"), ("c.cls", b"3"),
    ]  # fmt: skip
    index = dark.index_tar(write_tar(tmp_path / "x.tar", members))
    read = [dark.read_tar(tmp_path / "x.tar", index, i) for i in range(len(index))]
    assert [(image.getpixel((0, 0)), text) for image, text in read] == [(200, "in a folder"), (50, "ümlaut")]


def test_tars_by_braces_and_globs_are_the_same_pairs(tmp_path):
    for k in range(3):
        write_tar(tmp_path / f"s-{k:03d}.tar", pair_members(4, 4 * k))
    braces, stars = pairs_of(tmp_path / "s-{000..002}.tar"), pairs_of(tmp_path / "s-*.tar")
    assert len(braces) == len(stars) == 12
    for data in (braces, stars):
        captions = [data[0, i][2] for i in range(12)]
        assert captions == [f"caption {i}" for i in range(12)]


def test_bad_tars_are_named(tmp_path, capsys):
    whole = write_tar(tmp_path / "whole.tar", pair_members(3)).read_bytes()
    size = tarfile.open(tmp_path / "whole.tar").getmembers()[-1].offset_data + 512
    broken = tmp_path / "broken.tar"
    for cut in (size, size - 512, size - 700, size - 1024, 100):  # after, at and in a member, its header, the first
        broken.write_bytes(whole[:cut])
        fails(capsys, lambda: dark.index_tar(broken), "broken.tar")
    broken.write_bytes(b"")
    fails(capsys, lambda: dark.index_tar(broken), "broken.tar")
    write_tar(broken, [])
    fails(capsys, lambda: dark.index_tar(broken), "broken.tar", "no pair")
    write_tar(broken, [("a.jpg", png()), ("b.txt", b"x")])
    fails(capsys, lambda: dark.index_tar(broken), "broken.tar", "no pair")
    write_tar(broken, [("a.jpg", png()), ("a.png", png()), ("a.txt", b"x")])
    fails(capsys, lambda: dark.index_tar(broken), "broken.tar", "more than one image")


def test_epochs_are_exact_and_steps_can_be_entered_anywhere():
    n, batch, steps = 10, 4, 15  # six epochs, batches lie across their ends
    stream = list(dark.batches(n, batch, (0, steps), seed=3))
    flat = [pair for step in stream for pair in step]
    for epoch in range(6):
        assert sorted(i for e, i in flat if e == epoch) == list(range(n))
    orders = [[i for e, i in flat if e == epoch] for epoch in range(6)]
    assert orders[0] != orders[1]
    assert list(dark.batches(n, batch, (7, steps), seed=3)) == stream[7:]
    halves = [list(dark.batches(n, batch, (0, steps), seed=3, process=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == stream and all(len(a) == 2 for a in halves[0])
    assert list(dark.batches(n, batch, (0, steps), seed=4)) != stream


def test_views_depend_on_seed_epoch_and_index_alone(tmp_path):
    write_tar(tmp_path / "x.tar", pair_members(4))
    data, again = pairs_of(tmp_path / "x.tar"), pairs_of(tmp_path / "x.tar")
    first = data[2, 3][1]
    again[0, 0], np.random.rand(), torch.rand(1)
    assert torch.equal(again[2, 3][1], first)
    assert not torch.equal(data[1, 3][1], first) and not torch.equal(data[2, 2][1], first)
    assert not torch.equal(pairs_of(tmp_path / "x.tar", seed=7)[2, 3][1], first)


def test_draws_stay_in_the_paper_bounds():
    views = np.stack([dark.draw_view(np.random.default_rng(seed)) for seed in range(2000)])
    limits = np.array([math.radians(7), 0.1, 0.1, 0.15, 0.15, 0.15])  # 5 % of the side is 0.1 of its half
    spread = np.abs(views - [0, 0, 0, 1, 1, 1])
    assert (spread <= limits + 1e-6).all() and (spread.max(0) > 0.99 * limits).all()


def test_augmentation_against_pillow():
    from PIL import ImageEnhance

    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    degrees, shift, factors = 5.0, (3, -2), (1.1, 0.9, 1.15)
    expected = smooth.rotate(degrees, Image.Resampling.BILINEAR, translate=shift)
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        expected = enhance(expected).enhance(factor)
    # grid_sample asks where a pixel comes from, rotate says where it goes: the shift is turned and negative
    a = math.radians(degrees)
    dx, dy = -shift[0] / 32, -shift[1] / 32
    view = torch.tensor([[a, math.cos(a) * dx - math.sin(a) * dy, math.sin(a) * dx + math.cos(a) * dy, *factors]])
    found = dark.augment(torch.from_numpy(np.array(smooth))[None], view)[0].numpy()
    inner = (slice(8, -8), slice(8, -8))
    assert np.abs(found[inner].astype(float) - np.array(expected)[inner]).max() < 6
    still = torch.tensor([[0.0, 0, 0, 1, 1, 1]])
    assert np.array_equal(dark.augment(torch.from_numpy(np.array(smooth))[None], still)[0].numpy(), np.array(smooth))


def test_teacher_and_student_see_one_view_at_their_own_sizes():
    small, large = dark.open_model("demo-fastvit", mean="0,0,0", std="1,1,1"), dark.open_model("demo-vit")
    large.size = 128
    data = dark.Pairs(dark.Config(data=("phantom",), phantom_pairs=8, spacing_size=64), [small, large])
    images, views, tokens, _, _ = data.collate([data[1, i] for i in range(4)])
    seen = dark.augment(images, views)
    assert seen.shape == (4, 128, 128, 3) and len(tokens) == 2
    assert large.pixels(seen).shape == (4, 3, 128, 128)
    for image, pixels in zip(seen, small.pixels(seen)):
        expected = np.array(Image.fromarray(image.numpy()).resize((64, 64), Image.Resampling.BILINEAR))
        assert np.abs(pixels.permute(1, 2, 0).numpy() * 255 - expected).max() <= 1


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "HSV", "LAB"]
)
def test_every_mode_becomes_eight_bit(mode):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(ramp.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32) / 255)
    else:
        image = Image.fromarray(ramp).convert("L" if mode in ("LA", "PA") else "RGB").convert(mode)
    assert image.mode == mode
    eight = dark.to_8bit(image)
    assert eight.mode in ("L", "RGB")
    values = np.asarray(eight.convert("L"), np.int64)[0]
    if mode == "1":
        assert set(values) == {0, 255}
    elif mode not in ("HSV", "LAB", "YCbCr", "P", "PA"):
        assert np.abs(values - np.arange(256)).max() <= 1, mode
    else:
        assert values[250] - values[5] > 200


def test_transparent_pixels_are_black():
    image = Image.new("RGBA", (4, 4), (250, 250, 250, 0))
    assert dark.to_8bit(image).getpixel((0, 0)) == (0, 0, 0)


def test_square_pads_with_zeros_in_the_centre():
    image = dark.square(Image.new("L", (80, 40), 255), 80, "bicubic")
    column = np.asarray(image)[:, 40]
    assert (
        image.size == (80, 80)
        and (column[:20] == 0).all()
        and (column[20:60] == 255).all()
        and (column[60:] == 0).all()
    )
    assert dark.square(Image.new("RGB", (30, 90), (1, 2, 3)), 32, "bilinear").size == (32, 32)


def test_large_jpegs_are_decoded_at_reduced_size():
    big = Image.open(io.BytesIO(png(90, (2000, 1500), format="JPEG")))
    assert dark.decode(big, 200).size == (500, 375)  # the smallest that still is twice what is needed
    small = Image.open(io.BytesIO(png(90, (300, 200), format="JPEG")))
    assert dark.decode(small, 200).size == (300, 200)


def test_unreadable_samples_are_replaced_and_counted(tmp_path):
    members = list(pair_members(200))
    members[3 * 7] = (members[3 * 7][0], b"not an image")
    data = pairs_of(write_tar(tmp_path / "x.tar", members))
    _, _, text, bad = data[0, 7]
    assert text == "caption 8" and bad == [7] and data[0, 8][3] == []
    assert data.collate([data[0, 6], data[0, 7]])[4] == [7]
    assert data.where(7) == f"pair 7 of {tmp_path / 'x.tar'}"


def test_phantom_is_deterministic_and_to_scale():
    image, label = dark.phantom(5, 11)
    again, _ = dark.phantom(5, 11)
    assert image.tobytes() == again.tobytes() != dark.phantom(5, 12)[0].tobytes() != dark.phantom(6, 12)[0].tobytes()
    assert {dark.phantom(0, i)[1]["view"] for i in range(60)} == set(dark.VIEWS)
    for i in range(40):
        label = dark.phantom(0, i)[1]
        assert 98 <= label["days"] <= 272
        assert abs(label["hc_mm"] / dark.who_hc(label["days"]) - 1) < 0.1
        text = dark.read_phantom(0, 64, i)[1]
        assert f"{160 / 64 * label['pixel_mm']:.2f} mm" in text and f"{label['days'] // 7} weeks" in text
        assert (dark.VIEWS[label["view"]] if i // 9 % 4 else dark.VIEWS[label["view"]].split(",")[0]) in text


def test_who_curve():
    t = 20.0
    by_hand = math.exp(
        2.09924879247164 + 0.253373656106037 * t - 0.00605647816678282 * t**2 + 0.0000514256072059917 * t**3
    )
    assert dark.who_hc(140) == pytest.approx(by_hand) and 170 < by_hand < 180


def write_planes(folder, rows):
    (folder / "Images").mkdir(parents=True)
    lines = ["Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train "]
    for i, (plane, brain, train) in enumerate(rows):
        (folder / "Images" / f"p{i}.png").write_bytes(png(i))
        lines.append(f"p{i};{i // 2};{plane};{brain};Op. 1;Voluson E6;{train}")
    (folder / "FETAL_PLANES_DB_data.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_hc18(folder, rows):
    (folder / "training_set").mkdir(parents=True)
    lines = ["filename,pixel size(mm),head circumference (mm)"]
    for i, (pixel, hc) in enumerate(rows):
        (folder / "training_set" / f"{i:03d}_HC.png").write_bytes(png(i, (80, 54)))
        lines.append(f"{i:03d}_HC.png,{pixel},{hc}")
    (folder / "training_set_pixel_size_and_HC.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_planes_and_hc18_captions(tmp_path):
    rows = [("Fetal brain", "Trans-cerebellum", 1), ("Fetal thorax", "Not A Brain", 0), ("Other", "Not A Brain", 1)]
    data = pairs_of(f"planes:{write_planes(tmp_path / 'p', rows)}")
    assert len(data) == 2  # `Train ` = 1 only
    assert "fetal brain, trans-cerebellum plane" in data[0, 0][2]
    hc = float(dark.who_hc(20 * 7 + 3))
    data = pairs_of(f"hc18:{write_hc18(tmp_path / 'h', [(0.1, hc), (0.2, 300)])}")
    assert "20 weeks and 3 days" in data[0, 0][2] and f"{80 / 64 * 0.1:.2f} mm" in data[0, 0][2]


@needs_hc18
def test_ages_agree_with_the_shipped_shards():
    index = dark.index_tar(HC18 / "train-000000.tar")
    assert len(index) > 100
    with tarfile.open(HC18 / "train-000000.tar") as tar:
        for name in [n for n in tar.getnames() if n.endswith(".json")]:
            truth = json.loads(tar.extractfile(name).read())
            assert abs(dark.age_of(truth["hc_mm"]) - truth["ga_days"]) <= 1


# ---------------------------------------------------------------- the models


def test_paper_student_and_preprocessing(tmp_path):
    model = dark.open_model("MobileCLIP2-S0", context_length=117)
    millions = lambda module: round(sum(p.numel() for p in module.parameters()) / 1e6, 2)
    assert millions(model.clip.visual) == 11.41
    assert millions(model.clip) == 74.86
    assert (model.size, model.mean, model.std, model.interpolation) == (256, (0, 0, 0), (1, 1, 1), "bilinear")
    assert model.tokenizer(["a"]).shape == (1, 117) and model.clip.context_length == 117
    path = tmp_path / "s0.pt"
    torch.save(model.clip.state_dict(), path)
    loaded = dark.open_model("MobileCLIP2-S0", str(path), 117)
    assert (loaded.mean, loaded.std, loaded.interpolation) == ((0, 0, 0), (1, 1, 1), "bilinear")  # not OpenAI's
    assert all(torch.equal(a, b) for a, b in zip(model.clip.parameters(), loaded.clip.parameters()))


def test_preprocessing_of_other_models():
    model = dark.open_model("ViT-S-32", mean="0.1,0.2,0.3", std="1,1,2")
    assert (
        model.mean == (0.1, 0.2, 0.3)
        and model.std == (1, 1, 2)
        and model.interpolation == "bicubic"
        and model.size == 224
    )
    pixels = model.pixels(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.9, 0.8, 0.35]))


@pytest.mark.parametrize("form", ["bare", "state_dict", "module", "safetensors", "checkpoint"])
def test_weights_in_every_form(tmp_path, form):
    torch.manual_seed(3)
    source = dark.open_model("demo-vit")
    state = source.clip.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    elif form == "checkpoint":
        dark.save_checkpoint(path, source, 0, 0.0, dark.Config())
    else:
        state = {f"module.{k}": v for k, v in state.items()} if form == "module" else state
        torch.save({"state_dict": state} if form != "bare" else state, path)
    torch.manual_seed(4)
    loaded = dark.open_model("demo-vit", str(path))
    for name, value in loaded.clip.state_dict().items():
        assert torch.equal(value, source.clip.state_dict()[name]), name


def test_weights_that_do_not_match_are_an_error(tmp_path, capsys):
    state = dark.open_model("demo-vit").clip.state_dict()
    path = tmp_path / "w.pt"
    torch.save({k: v for k, v in state.items() if k != "ln_final.weight"} | {"extra": torch.zeros(1)}, path)
    fails(
        capsys,
        lambda: dark.open_model("demo-vit", str(path)),
        "w.pt",
        "2 keys",
        "missing ln_final.weight",
        "unexpected extra",
    )
    fails(
        capsys,
        lambda: dark.open_model("demo-fastvit", str(path)),
        "w.pt",
        "keys",
        "text_projection is (64, 128), not (64, 64)",
    )
    path.write_bytes(b"garbage")
    fails(capsys, lambda: dark.open_model("demo-vit", str(path)), "w.pt")
    fails(
        capsys,
        lambda: dark.open_model("demo-vit", "nowhere.pt", flag="--student-weights"),
        "--student-weights nowhere.pt",
    )
    fails(capsys, lambda: dark.open_model("MobileCLIP2-S0", "openai"), "openai", "dfndr2b")
    fails(capsys, lambda: dark.open_model("ViT-L-15"), "ViT-L-15", "ViT-L-14")
    fails(capsys, lambda: dark.open_model("ViT-S-32", mean="1,2"), "1,2")


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    dark.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def die(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dark.write_atomically(path, die)
    assert path.read_text() == "old"


# ---------------------------------------------------------------- the runs

SMALL = "--phantom-pairs 36 --batch 8 --epochs 2 --teacher-epochs 1 --warmup 2 --workers 0 --log-every 1".split()


def run(out, *flags):
    dark.main([*SMALL, "--out", str(out), *flags])
    return torch.load(out / "student.pt", weights_only=True), [json.loads(line) for line in open(out / "log.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the default path, small; teacher first."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, *run(out)


def test_a_run_leaves_what_it_says(finished):
    out, checkpoint, log = finished
    assert {p.name for p in out.iterdir()} == {
        "student.pt",
        "log.jsonl",
        "curves.png",
        "teacher.pt",
        "teacher_log.jsonl",
    }
    assert [record["step"] for record in log] == list(range(9))  # 2 epochs of 36 pairs in batches of 8
    wanted = "step epoch loss clip diag off beta logit_scale lr grad_norm img_s data_wait".split()
    for record in log:
        assert set(wanted) <= record.keys() and all(math.isfinite(record[k]) for k in wanted)
        assert record["loss"] == pytest.approx(
            record["clip"] + record["diag"] + record["beta"] * record["off"], rel=1e-4
        )
        assert record["beta"] == pytest.approx(dark.beta_at(record["step"], 9, 2.0, -0.8))
        assert record["logit_scale"] <= 100
    assert log[0]["beta"] > 0 > log[-1]["beta"]
    assert checkpoint["step"] == checkpoint["steps"] == 9 and checkpoint["config"]["r"] == -0.8
    assert checkpoint["architecture"] == "demo-fastvit" and checkpoint["preprocess"]["size"] == 64
    student = dark.open_model("demo-fastvit").clip
    assert checkpoint["state_dict"].keys() == student.state_dict().keys()  # no teacher, no projections
    assert sum(len(g["params"]) for g in checkpoint["optimizer"]["param_groups"]) == len(list(student.parameters()))
    assert Image.open(out / "curves.png").size[0] > 500


def test_a_finished_run_is_not_overwritten(finished, capsys):
    out, checkpoint, log = finished
    before = (out / "student.pt").read_bytes()
    fails(capsys, lambda: run(out), "finished", "--resume", "--overwrite")
    fails(capsys, lambda: run(out, "--resume", "--beta0", "3"), "--beta0", "2.0", "3.0")
    fails(capsys, lambda: run(out, "--resume", "--lr", "0.5"), "--lr", "0.5")
    run(out, "--resume")  # nothing left to do
    assert (out / "student.pt").read_bytes() == before


def test_the_teacher_is_reused(finished, tmp_path, capsys):
    out, checkpoint, log = finished
    other = tmp_path / "other"
    other.mkdir()
    teacher = (out / "teacher.pt").read_bytes()
    (other / "teacher.pt").write_bytes(teacher)
    again, again_log = run(other)
    assert (other / "teacher.pt").read_bytes() == teacher
    assert all(torch.equal(v, checkpoint["state_dict"][k]) for k, v in again["state_dict"].items())
    run(other, "--beta0", "4", "--overwrite")  # another student of the same teacher
    assert (other / "teacher.pt").read_bytes() == teacher
    fails(capsys, lambda: run(tmp_path / "other", "--seed", "1"), "holds")


def test_no_kd_needs_no_teacher(tmp_path):
    checkpoint, log = run(tmp_path / "out", "--ablation", "no-kd", "--epochs", "1")
    assert not (tmp_path / "out" / "teacher.pt").exists()
    assert log[-1]["off"] is None and log[-1]["loss"] == pytest.approx(log[-1]["clip"])


def test_feature_row_trains_its_projections(finished, tmp_path):
    out = finished[0]
    weights = ["--teacher", "demo-vit", "--teacher-weights", str(out / "teacher.pt")]
    checkpoint, log = run(tmp_path / "out", "--ablation", "static-feat", "--micro-batch", "4", *weights)
    assert log[-1]["feature"] < log[0]["feature"]
    r = log[3]
    assert r["loss"] == pytest.approx(r["clip"] + r["diag"] + r["off"] + 2000 * r["feature"], rel=1e-4)
    assert [v.shape for v in checkpoint["projections"].values()] == [(128, 64), (128,)] * 2


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_killed_and_resumed_is_bit_identical(finished, tmp_path, stage):
    out = tmp_path / "out"
    log = out / ("log.jsonl" if stage == "student" else "teacher_log.jsonl")
    command = [sys.executable, str(HERE / "dark.py"), *SMALL, "--out", str(out)]
    if stage == "student":  # a teacher that needs no training saves the time
        out.mkdir()
        (out / "teacher.pt").write_bytes((finished[0] / "teacher.pt").read_bytes())
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = 6 if stage == "student" else 2  # in the middle of the second epoch, or of the teacher's only one
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= lines):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = torch.load(out / f"{stage}.pt", weights_only=True)["step"]
    assert step == (5 if stage == "student" else 0)
    checkpoint, records = run(out, "--resume")
    for name, value in finished[1]["state_dict"].items():
        assert torch.equal(value, checkpoint["state_dict"][name]), name
    assert [r["step"] for r in records] == list(range(9))
    without_timing = lambda log: [{k: v for k, v in r.items() if k not in ("img_s", "data_wait")} for r in log]
    assert without_timing(records) == without_timing(finished[2])


def test_two_processes_train(tmp_path):
    out = tmp_path / "out"
    flags = [*SMALL, "--ablation", "no-kd", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29517",
        str(HERE / "dark.py"),
        *flags,
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    assert torch.load(out / "student.pt", weights_only=True)["step"] == 4


def test_too_many_unreadable_samples_stop_the_run(tmp_path, capsys):
    members = [(name, b"" if name == "0003.jpg" else content) for name, content in pair_members(40)]
    data = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", "--data", str(data), "--ablation", "no-kd", "--epochs", "1")
    assert "1 of 40" in str(stopped.value.code) and str(data) in str(stopped.value.code)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", "--ablation", "no-kd", "--lr", "1e30", "--warmup", "0")
    assert "not finite by step" in str(stopped.value.code) and "logit_scale" in str(stopped.value.code)


@needs_hc18
def test_real_shards_train(tmp_path):
    flags = [
        "--data",
        str(HC18 / "train-{000000..000001}.tar"),
        f"hc18:{HC18 / 'val'}",
        "--ablation",
        "no-kd",
        "--batch",
        "32",
        "--epochs",
        "1",
    ]
    checkpoint, log = run(tmp_path / "out", *flags)
    assert len(log) == (290 + 91) // 32 and log[-1]["clip"] < log[0]["clip"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag", "3"], ["--no-such-flag"]),
        (["--bet", "3"], ["--bet"]),
        (["--beta0", "x"], ["beta0", "x"]),
        (["--beta0", "nan"], ["--beta0", "nan"]),
        (["--tau", "0"], ["--tau 0"]),
        (["--ablation", "x"], ["--ablation x", "no-kd", "r-0.4"]),
        (["--smooth", "1"], ["--smooth 1"]),
        (["--batch", "37"], ["--batch 37", "36"]),
        (["--batch", "1"], ["--batch 1"]),
        (["--micro-batch", "3"], ["--micro-batch 3", "8"]),
        (["--device", "tpu9"], ["--device tpu9"]),
        (["--data", "nowhere-{0..3}.tar"], ["nowhere-0.tar"]),
        (["--data", "nowhere*.tar"], ["nowhere*.tar"]),
        (["--data", "planes:nowhere"], ["planes:nowhere", "FETAL_PLANES_DB_data.csv"]),
        (["--data", "hc18:nowhere"], ["hc18:nowhere", "training_set_pixel_size_and_HC.csv"]),
        (["--teacher-weights", "nowhere.pt"], ["--teacher-weights nowhere.pt"]),
        (["--student", "nothing"], ["nothing"]),
        (["--resume", "--overwrite"], ["--resume"]),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, flags, words):
    fails(capsys, lambda: run(tmp_path / "out", *flags), *words)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_the_data_get_one_line(tmp_path, capsys):
    planes = write_planes(tmp_path / "p", [("Fetal brain", "Trans-thalamic", 1)] * 3)
    table = planes / "FETAL_PLANES_DB_data.csv"
    good = table.read_text()
    table.write_text(good.replace("Brain_plane", "Brainplane"))
    fails(capsys, lambda: run(tmp_path / "out", "--data", f"planes:{planes}"), "'Brain_plane'")
    table.write_text(good)
    (planes / "Images" / "p1.png").unlink()
    fails(capsys, lambda: run(tmp_path / "out", "--data", f"planes:{planes}"), "1 of 3", "p1.png")
    heads = write_hc18(tmp_path / "h", [(0.1, 200), ("", 200)])
    fails(capsys, lambda: run(tmp_path / "out", "--data", f"hc18:{heads}"), "001_HC.png")


def test_a_tag_without_network_names_the_flag(capsys, monkeypatch):
    import open_clip

    def refuse(*args, **more):
        raise RuntimeError("Failed to download weights for tag 'openai': no network")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    fails(
        capsys,
        lambda: dark.open_model("ViT-L-14", "openai", flag="--teacher-weights"),
        "--teacher-weights openai",
        "--teacher-weights PATH",
    )


# ---------------------------------------------------------------- evaluation


def test_macro_f1_against_scikit_learn():
    from sklearn.metrics import f1_score

    assert evaluate.macro_f1(["a", "a", "b", "c"], ["a", "b", "b", "b"]) == pytest.approx(
        (2 / 3 + 1 / 2) / 2
    )  # c occurs in neither
    rng = np.random.default_rng(0)
    for _ in range(20):
        actual, predicted = rng.integers(0, 4, 50), rng.integers(0, 9, 50)  # nine to choose from, four occur
        expected = f1_score(actual, predicted, labels=np.unique(actual), average="macro", zero_division=0)
        assert evaluate.macro_f1(predicted, actual) == pytest.approx(expected)
        assert evaluate.macro_f1(list(map(str, predicted)), list(map(str, actual))) == pytest.approx(expected)
        assert evaluate.macro_f1(torch.tensor(predicted), torch.tensor(actual)) == pytest.approx(expected)
    with pytest.raises(ValueError):
        evaluate.macro_f1([1], [1, 2])


def test_validity_by_hand():
    def peak(*days):  # similarities whose 15 largest are at these days
        row = torch.full((175,), -1.0)
        row[torch.tensor(days)] = torch.rand(len(days)) + 1
        return row

    similarity = torch.stack([
        peak(*range(50, 65)),  # the median of the days is 57, that of their ranks by similarity is not
        peak(*range(0, 14), 174),
        peak(*range(40, 48), *range(100, 107)),  # element 7 is 47
        peak(*range(50, 65)),
        peak(*range(160, 175)),
    ])  # fmt: skip
    days = [98 + 57, 98 + 7, 98 + 47, 98 + 57, 98 + 167]
    hc = [float(dark.who_hc(d)) for d in days]
    hc[1] = 400.0  # too large to count
    hc[3] = hc[3] * 1.25  # beyond the 97.5th percentile
    hc[4] = 99.9  # too small to count
    score = evaluate.validity(similarity, torch.tensor(hc))
    assert score["days"].tolist() == days and score["days"].dtype == torch.int64
    assert (score["valid"], score["n"], score["rate"]) == (2, 3, pytest.approx(2 / 3))
    with pytest.raises(ValueError):
        evaluate.validity(torch.zeros(2, 168), torch.tensor([200.0, 200.0]))


def test_percentiles_enclose_the_median():
    t = dark.GA_DAYS
    assert len(t) == 175 and t[0] == 98 and t[-1] == 272
    low, high = dark.who_hc(t, evaluate.WHO_HC_2_5), dark.who_hc(t, evaluate.WHO_HC_97_5)
    assert (low < dark.who_hc(t)).all() and (dark.who_hc(t) < high).all()
    assert high[0] == pytest.approx(
        math.exp(2.50074069629423 + 0.220067854715719 * 14 - 0.00493623111462443 * 196 + 0.0000389066000946519 * 2744)
    )


@pytest.mark.parametrize("name", ["demo-fastvit", "causal-custom", "bidirectional"])
def test_age_similarity_equals_the_direct_form(name):
    import open_clip

    torch.manual_seed(0)
    model = dark.open_model("demo-fastvit")
    clip, context = model.clip, model.context_length
    if name != "demo-fastvit":  # open_clip's other class of text tower, which MobileCLIP2 uses without a causal mask
        text = dict(context_length=context, width=64, heads=2, layers=2, no_causal_mask=name == "bidirectional")
        clip = open_clip.CustomTextCLIP(64, dark.DEMO_MODELS["demo-fastvit"]["vision_cfg"], text)
    clip.eval()
    assert evaluate.reads_up_to_the_end(clip) == (name != "bidirectional")
    images, pixel_mm = torch.randn(4, 3, 64, 64), [0.21, 1.004, 0.2149, 12.0]
    templates = evaluate.PROMPTS["ga"][:2]
    similarity = evaluate.ga_similarity(clip, model.tokenizer, images, pixel_mm, templates)
    assert similarity.shape == (4, 175)
    with torch.no_grad():
        for i in range(4):
            image = F.normalize(clip.encode_image(images[i : i + 1]), dim=-1)
            for column in range(0, 175, 29):
                weeks, day = divmod(98 + column, 7)
                texts = [t.format(weeks=weeks, day=day, pixel_spacing=f"{pixel_mm[i]:.2f}") for t in templates]
                text = F.normalize(clip.encode_text(model.tokenizer(texts)), dim=-1)
                assert similarity[i, column] == pytest.approx((image @ text.T).mean().item(), abs=1e-5)
    features = F.normalize(clip.encode_image(images), dim=-1).detach()
    torch.testing.assert_close(
        evaluate.ga_similarity(clip, model.tokenizer, features, pixel_mm, templates), similarity, atol=1e-5, rtol=0
    )


def test_a_grid_prompt_that_would_be_cut_is_an_error(capsys):
    model = dark.open_model("demo-fastvit", context_length=20)
    features = torch.randn(1, 64)
    call = lambda: evaluate.ga_similarity(model.clip, model.tokenizer, features, [0.2], evaluate.PROMPTS["ga"])
    fails(capsys, call, "20 tokens", "14 weeks")


def test_class_embeddings_average_normalised_prompts():
    torch.manual_seed(0)
    model = dark.open_model("demo-fastvit")
    prompts = {"a": ["one", "a much longer prompt on two"], "b": ["three"]}
    with torch.no_grad():
        encode = lambda text: F.normalize(model.clip.encode_text(model.tokenizer([text]))[0], dim=-1)
        expected = torch.stack(
            [F.normalize(encode("one") + encode("a much longer prompt on two"), dim=-1), encode("three")]
        )
    torch.testing.assert_close(evaluate.class_embeddings(model, prompts), expected, atol=1e-6, rtol=1e-5)


def test_geometry_by_hand():
    square = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    found = evaluate.geometry(square, ["x", "x", "y", "y"])
    assert found["effective_dimension"] == pytest.approx(2)
    assert found["rank95"] == 2
    assert found["intra_cosine"] == pytest.approx(-1) and found["inter_cosine"] == pytest.approx(0)
    pairs = [math.exp(-2 * d) for d in (4, 2, 2, 2, 2, 4)]
    assert found["uniformity"] == pytest.approx(math.log(sum(pairs) / 6), abs=1e-5)


def test_t_interval():
    mean, half = evaluate.t_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-5)


def test_default_prompts_have_the_published_classes():
    assert set(evaluate.PROMPTS["planes"]) == set(
        "abdomen brain femur heart kidney lips_nose profile_patient spine cervix".split()
    )
    assert list(evaluate.PROMPTS["brain"]) == ["trans-thalamic", "trans-cerebellum", "trans-ventricular"]
    assert all(len(set(p)) == 5 for task in ("planes", "brain") for p in evaluate.PROMPTS[task].values())
    assert len(set(evaluate.PROMPTS["ga"])) == 5 and all(
        f in t for t in evaluate.PROMPTS["ga"] for f in evaluate.GA_FIELDS
    )


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(evaluate, "BENCHMARK_SIZE", 120)
    monkeypatch.setattr(evaluate, "BENCHMARK_HEADS", 4)


def test_evaluate_end_to_end_on_the_phantom(finished, benchmark, capsys):
    out = finished[0]
    options = ["--workers", "0", "--plots", "--geometry", "--probe", "--teacher", str(out / "teacher.pt")]
    evaluate.main([str(out / "student.pt"), str(out / "teacher.pt"), *options])
    results = json.loads((out / "results.json").read_text())
    assert [r["name"] for r in results] == [str(out / "student.pt"), str(out / "teacher.pt")]
    for r in results:
        assert 0 <= r["f1_5plane"] <= 1 and r["f1_all"] == pytest.approx((5 * r["f1_5plane"] + 3 * r["f1_3brain"]) / 8)
        assert r["avg"] == pytest.approx((r["f1_all"] + r["hc18_validity"] / 100) / 2) and 0 < r["hc18_n"] <= 4
        assert 0 <= r["entropy"] <= math.log(9) and r["geometry"]["f1_3brain"]["rank95"] > 0
    assert results[1]["teacher_rank_correlation"] == pytest.approx(1)  # the teacher with itself
    assert results[1]["probe_brain_retention_percent"] == pytest.approx(100)
    assert results[0]["params"] == sum(p.numel() for p in dark.open_model("demo-fastvit").clip.parameters())
    for what in ("student_age", "student_confusion", "student_tsne", "teacher_age", "epochs"):
        assert Image.open(out / f"{what}.png").size[0] >= 600
    printed = capsys.readouterr().out
    assert "phantom" in printed and "F1-5Plane" in printed and "Spearman" in printed


def test_the_benchmark_is_not_trained_on():
    assert evaluate.BENCHMARK_SEED >= 2**32
    with pytest.raises(SystemExit):
        dark.parse_args(["--seed", str(evaluate.BENCHMARK_SEED)])


def test_evaluate_on_published_layouts(finished, tmp_path, capsys):
    views = [("Fetal abdomen", ""), ("Fetal femur", ""), ("Fetal thorax", ""), ("Maternal cervix", ""), ("Other", "")]
    views += [("Fetal brain", plane) for plane in dark.BRAIN_PLANES] + [("Fetal brain", "Other")]
    rows = [(plane, brain or "Not A Brain", i % 2) for i in range(2) for plane, brain in views]
    planes = write_planes(tmp_path / "p", rows)
    heads = write_hc18(tmp_path / "h", [(0.1, 200), (0.1, 99), (0.11, 250)])
    student = str(finished[0] / "student.pt")
    seen = {}
    original = evaluate.macro_f1
    try:
        evaluate.macro_f1 = lambda p, a: seen.setdefault(len(set(a)), (p, a)) and original(p, a)
        evaluate.main([student, "--planes", str(planes), "--hc18", str(heads), "--workers", "0", "--split", "test"])
    finally:
        evaluate.macro_f1 = original
    (result,) = json.loads((finished[0] / "results.json").read_text())
    assert result["hc18_n"] == 2 and result["split"] == "test"
    assert sorted(seen[5][1]) == sorted(
        ["abdomen", "femur", "heart", "cervix"] + ["brain"] * 4
    )  # `Other` is out, Train 0 in
    assert sorted(seen[3][1]) == sorted(evaluate.PROMPTS["brain"])
    evaluate.main([student, "--planes", str(planes), "--workers", "0"])
    (result,) = json.loads((finished[0] / "results.json").read_text())
    assert "hc18_validity" not in result and "avg" not in result  # absent, not zero
    assert capsys.readouterr().out.splitlines()[-2].split()[-5] == "-"


def test_any_model_with_its_own_statistics(finished, benchmark, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    weights = str(finished[0] / "student.pt")
    evaluate.main(
        ["--model", "demo-fastvit", "--weights", weights, "--mean", "0.5,0.5,0.5", "--std", "1,1,1", "--workers", "0"]
    )
    (other,) = json.loads((finished[0] / "results.json").read_text())
    evaluate.main(["--model", "demo-fastvit", "--weights", weights, "--workers", "0"])
    (same,) = json.loads((finished[0] / "results.json").read_text())
    evaluate.main([weights, "--workers", "0"])
    (checkpoint,) = json.loads((finished[0] / "results.json").read_text())
    assert same["f1_all"] == checkpoint["f1_all"] and same["hc18_validity"] == checkpoint["hc18_validity"]
    assert other["name"] == f"demo-fastvit {weights}"


def test_chd_videos(finished, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["video,label,patient,train"]
    for i in range(24):
        folder = tmp_path / "chd" / f"v{i}"
        folder.mkdir(parents=True)
        for k in range(3):  # fewer than 16 frames: some are taken again
            pixels = rng.integers(0, 60, (32, 32)) + 190 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"frame{k}.png")
        lines.append(f"v{i},{'chd' if i % 2 else 'normal'},{i},{int(i < 16)}")
    (tmp_path / "chd" / "labels.csv").write_text("\n".join(lines))
    evaluate.main([str(finished[0] / "student.pt"), "--chd", str(tmp_path / "chd"), "--workers", "0"])
    (result,) = json.loads((finished[0] / "results.json").read_text())
    assert result["chd_auroc"] > 0.95 and "f1_all" not in result


def test_probe_separates_what_is_separable():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    features = torch.from_numpy(
        F.normalize(torch.tensor(rng.normal(size=(200, 8)) + 3 * labels[:, None]), dim=-1).numpy()
    )
    f1 = lambda probe, x, y: evaluate.macro_f1(probe.predict(x), y)
    scores = evaluate.fit_and_score(features, labels, np.arange(200) // 2, np.arange(200) < 150, f1)
    assert len(scores) == 25 and np.mean(scores) > 0.95
    shuffled = evaluate.fit_and_score(
        features, rng.permutation(labels), np.arange(200) // 2, np.arange(200) < 150, f1, seeds=1
    )
    assert np.mean(shuffled) < 0.7


def test_evaluation_mistakes_get_one_line(finished, tmp_path, capsys):
    student = str(finished[0] / "student.pt")
    measure = lambda *flags: lambda: evaluate.main([*flags, "--workers", "0"])
    results = finished[0] / "results.json"
    results.unlink(missing_ok=True)
    fails(capsys, measure(str(tmp_path / "none.pt")), "none.pt")
    (tmp_path / "cut.pt").write_bytes(Path(student).read_bytes()[:5000])
    fails(capsys, measure(str(tmp_path / "cut.pt")), "cut.pt")
    torch.save({"a": 1}, tmp_path / "foreign.pt")
    fails(capsys, measure(str(tmp_path / "foreign.pt")), "foreign.pt")
    fails(capsys, measure(student, "--planes", str(tmp_path)), "FETAL_PLANES_DB_data.csv")
    fails(capsys, measure(student, "--hc18", str(tmp_path)), "training_set_pixel_size_and_HC.csv")
    heads = write_hc18(tmp_path / "h", [(0.1, 200), (0.1, 210)])
    (heads / "training_set" / "001_HC.png").write_bytes(b"no image")
    fails(capsys, measure(student, "--hc18", str(heads)), "001_HC.png")
    (heads / "training_set" / "001_HC.png").unlink()
    fails(capsys, measure(student, "--hc18", str(heads)), "1 of 2", "001_HC.png")
    prompts = tmp_path / "prompts.json"
    whole = {**evaluate.PROMPTS["planes"], **evaluate.PROMPTS["brain"], "ga": evaluate.PROMPTS["ga"]}
    prompts.write_text(json.dumps({k: v for k, v in whole.items() if k != "spine"}))
    fails(capsys, measure(student, "--prompts", str(prompts)), "spine")
    prompts.write_text(json.dumps({**whole, "ga": ["{weeks} weeks"]}))
    fails(capsys, measure(student, "--prompts", str(prompts)), "{day}")
    prompts.write_text("[1")
    fails(capsys, measure(student, "--prompts", str(prompts)), "prompts.json")
    prompts.write_text('{"brain": "text"}')
    fails(capsys, measure(student, "--prompts", str(prompts)), "prompts.json")
    fails(capsys, measure(student, "--split", "train"), "train", "test")
    fails(capsys, measure(student, "--weights", "x.pt"), "--model")
    fails(capsys, measure(student, "--geometry", "--hc18", str(heads)), "--planes")
    assert not results.exists()


@needs_hc18
def test_evaluate_on_real_heads(finished, capsys):
    rows = dark.hc18_table(HC18 / "val", "--hc18")
    assert len(rows) == 91
    evaluate.heads_task, original = (lambda model, rows, *rest: original(model, rows[::30], *rest)), evaluate.heads_task
    try:
        evaluate.main([str(finished[0] / "student.pt"), "--hc18", str(HC18 / "val"), "--workers", "0"])
    finally:
        evaluate.heads_task = original
    (result,) = json.loads((finished[0] / "results.json").read_text())
    assert 1 <= result["hc18_n"] <= 4 and "f1_all" not in result


# ---------------------------------------------------------------- export


def export_main(*flags):
    export.main([str(flag) for flag in flags])


@pytest.fixture(autouse=True)  # export.py computes with one thread; the other tests keep theirs
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def export_checkpoint(path, name="demo-fastvit"):
    """A FastViT whose batch norms and layer scales are far from their initial values, in a checkpoint of dark.py."""
    torch.manual_seed(3)
    model = dark.open_model(name, mean="0.3,0.4,0.5", std="0.2,0.25,0.3")
    for module in model.clip.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.2, 1.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    nn.init.constant_(model.clip.logit_scale, np.log(20.0))
    cfg = dark.Config(beta0=2.0, r=-0.4)
    dark.save_checkpoint(path, model, step=30, epoch=3, cfg=cfg)
    return path


def export_images(n, size):
    """(n, S, S, 3) uint8: blobs of one colour each on noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (n, size, size, 3))
    for i, image in enumerate(images):
        image[i * 8 : i * 8 + 24, 10:50] += rng.integers(20, 190, 3)
    return torch.from_numpy(images.astype(np.uint8))


# What the operations of a converted FastViT mean, from the MIL documentation. Core ML runs on macOS only; with these
# the package itself, its graph and its stored weights, can be evaluated anywhere.
EXPORT_MIL = {
    "conv": lambda x, weight, strides, pad_type, pad, dilations, groups, bias=None: F.conv2d(
        F.pad(x, [*pad[2:], *pad[:2]] if pad_type == "custom" else [0] * 4), weight, bias, strides, 0, dilations, groups
    ),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)
    ),
    "batch_norm": lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(
        x, mean, variance, gamma, beta, eps=epsilon
    ),
    "gelu": lambda x, mode: F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode]),
    "relu": lambda x: x.relu(),
    "sigmoid": lambda x: x.sigmoid(),
    "softmax": lambda x, axis: x.softmax(axis),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "maximum": lambda x, y: x.clamp_min(float(y)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    "reduce_l2_norm": lambda x, axes, keep_dims: x.norm(dim=axes, keepdim=keep_dims),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, perm: x.permute(perm),
    "squeeze": lambda x, axes: x.squeeze(axes),
    "tile": lambda x, reps: x.repeat(reps),
    "split": lambda x, num_splits, axis: x.chunk(num_splits, axis),
    "cast": lambda x, dtype: x,  # the arithmetic here is fp32 throughout; the weights are as stored
}


def export_program(path):
    """The package's program, read back from disk: its operations, in order, with the weights as numpy arrays."""
    from coremltools.converters.mil.frontend.milproto.load import load

    package = ct.models.MLModel(str(path), skip_model_load=True)
    return load(package.get_spec(), package.get_spec().specificationVersion, package.weights_dir).functions["main"]


def export_run(program, pixels):
    """(S, S, 3) uint8 -> output name -> tensor, by the stored graph and weights."""
    values = {"image": pixels.permute(2, 0, 1)[None].float()}

    def value(var):
        if var.name in values:
            return values[var.name]
        if isinstance(var.val, np.ndarray):
            return torch.from_numpy(var.val.copy()).float() if var.val.dtype.kind == "f" else var.val.tolist()
        return var.val.item() if isinstance(var.val, np.generic) else var.val

    for operation in program.operations:
        if operation.op_type != "const":
            out = EXPORT_MIL[operation.op_type](**{k: value(v) for k, v in operation.inputs.items() if v is not None})
            for var, tensor in zip(operation.outputs, out if isinstance(out, tuple) else [out]):
                assert tuple(tensor.shape) == tuple(var.shape)
                values[var.name] = tensor
    return {var.name: values[var.name] for var in program.outputs}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`python export.py CHECKPOINT --labels planes` once, onto an older package."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint = export_checkpoint(folder / "student.pt")
    out = folder / "deep" / "Student.mlpackage"
    out.mkdir(parents=True)
    (out / "Manifest.json").write_text("{}")
    (out / "stale").write_text("of the older package")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        export_main(checkpoint, "--out", out, "--labels", "planes", "--runs", 3)
    model = dark.model_from_checkpoint(dark.load_checkpoint(checkpoint))
    return types.SimpleNamespace(
        out=out, checkpoint=checkpoint, model=model, printed=printed.getvalue(), program=export_program(out),
        spec=ct.models.MLModel(str(out), skip_model_load=True).get_spec(),
        result=json.loads((out.parent / "export.json").read_text()),
    )  # fmt: skip


# ---------------------------------------------------------------- export: the package


def test_export_names_shapes_and_types(exported):
    description = exported.spec.description
    assert exported.spec.specificationVersion == 8  # iOS 17
    assert exported.spec.WhichOneof("Type") == "mlProgram"
    (image,), (embedding, probabilities) = description.input, description.output
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == ("image", 64, 64)
    assert image.type.imageType.colorSpace == ct.proto.FeatureTypes_pb2.ImageFeatureType.RGB
    fp32 = ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
    assert (embedding.name, list(embedding.type.multiArrayType.shape)) == ("embedding", [1, 64])
    assert (probabilities.name, list(probabilities.type.multiArrayType.shape)) == ("probabilities", [1, 9])
    assert embedding.type.multiArrayType.dataType == probabilities.type.multiArrayType.dataType == fp32


def test_export_metadata(exported):
    metadata, user = exported.spec.description.metadata, dict(exported.spec.description.metadata.userDefined)
    assert (
        metadata.author and metadata.license and metadata.versionString and "demo-fastvit" in metadata.shortDescription
    )
    assert user["checkpoint_sha256"] == hashlib.sha256(exported.checkpoint.read_bytes()).hexdigest()
    assert json.loads(user["mean"]) == [0.3, 0.4, 0.5] and json.loads(user["std"]) == [0.2, 0.25, 0.3]
    assert json.loads(user["labels"]) == list(evaluate.PROMPTS["planes"])
    assert json.loads(user["prompts"]) == evaluate.PROMPTS["planes"]
    assert (float(user["beta0"]), float(user["r"])) == (2.0, -0.4)


def test_export_computes_what_pytorch_computes(exported):
    model, images = exported.model, export_images(4, 64)
    with torch.no_grad():
        expected = F.normalize(model.clip.encode_image(model.pixels(images)), dim=-1)  # (4, 64), not fused
        classes = evaluate.class_embeddings(model, evaluate.PROMPTS["planes"])  # (9, 64)
        likely = (model.clip.logit_scale.exp() * expected @ classes.T).softmax(-1)  # (4, 9)
    outputs = [export_run(exported.program, image) for image in images]
    embedding = torch.cat([out["embedding"] for out in outputs])
    assert torch.pdist(expected).min() > 0.05  # the images are told apart, by far more than the tolerance
    assert (embedding - expected).norm(dim=1).max() < 2e-2  # what weights in fp16 cost; fp32 is compared below
    assert (embedding.norm(dim=1) - 1).abs().max() < 1e-6
    assert likely.std(0).max() > 0.01
    torch.testing.assert_close(torch.cat([out["probabilities"] for out in outputs]), likely, atol=1e-2, rtol=0)


def test_export_stores_the_fused_weights(exported):
    consts = {op.name: op.outputs[0].val for op in exported.program.operations if op.op_type == "const"}
    fused = timm.utils.reparameterize_model(exported.model.clip.visual)
    stem, projection = fused.trunk.stem[0].reparam_conv.weight, fused.trunk.head.fc.weight
    for name, weight in (("stem_0_reparam_conv_weight", stem), ("trunk_head_fc_weight", projection)):
        (stored,) = [v for key, v in consts.items() if name in key and isinstance(v, np.ndarray) and v.ndim > 1]
        assert stored.dtype == np.float16
        np.testing.assert_array_equal(stored, weight.detach().half().numpy())
    (classes,) = [v for v in consts.values() if isinstance(v, np.ndarray) and v.shape == (9, 64)]
    with torch.no_grad():
        matrix = exported.model.clip.logit_scale.exp() * evaluate.class_embeddings(
            exported.model, evaluate.PROMPTS["planes"]
        )
    assert classes.dtype == np.float32
    np.testing.assert_allclose(classes, matrix.numpy(), rtol=1e-5, atol=1e-5)


def test_export_head_is_fp32_and_tower_fp16(exported):
    kinds = {}
    for operation in exported.program.operations:
        kinds.setdefault(operation.op_type, []).append(operation.outputs[0].dtype.__name__)
    assert set(kinds["conv"]) == set(kinds["gelu"]) == {"fp16"}
    assert kinds["reduce_l2_norm"] == ["fp32"]
    assert kinds["softmax"][-1] == "fp32" and kinds["linear"][-1] == "fp32"


def test_export_size_and_replacement(exported):
    size = sum(file.stat().st_size for file in exported.out.rglob("*") if file.is_file())
    parameters = sum(p.numel() for p in timm.utils.reparameterize_model(exported.model.clip.visual).parameters())
    assert exported.result["package_mb"] == size / 1e6
    assert 2 * parameters * 0.95 < size < 2 * parameters + 150_000  # two bytes each, and the program
    files = sorted(file.name for file in exported.out.rglob("*") if file.is_file())
    assert files == [
        "Manifest.json",
        "model.mlmodel",
        "weight.bin",
    ]  # nothing stale, nothing of the converter's debugging
    assert sorted(p.name for p in exported.out.parent.iterdir()) == ["Student.mlpackage", "export.json"]


def test_export_report(exported):
    result, model = exported.result, exported.model
    assert result["visual_params_unfused"] == sum(p.numel() for p in model.clip.visual.parameters())
    assert result["visual_params"] < result["visual_params_unfused"]
    assert result["labels"] == list(evaluate.PROMPTS["planes"])
    assert 0 < result["fuse_difference"] < 1e-5
    unfused, fused = result["latency"]
    assert (unfused["runtime"], fused["runtime"]) == ("PyTorch unfused", "PyTorch fused")
    for row in (unfused, fused):
        assert 0 < row["median_ms"] <= row["p90_ms"] and row["runs"] == 3
        assert row["precision"] == "fp32" and "CPU" in row["compute_units"] and row["device"] and row["os"]
    assert result["fused_over_unfused"] == pytest.approx(fused["median_ms"] / unfused["median_ms"])
    table = [line for line in exported.printed.splitlines() if line.startswith(("runtime", "PyTorch"))]
    assert len(table) == 3 and len({len(line) for line in table}) == 1  # aligned
    assert f"{fused['median_ms']:.2f}" in table[2]
    assert "attention" in exported.printed and "epoch 3" in exported.printed.splitlines()[0]


def test_export_fp32_with_labels_from_a_file(exported, tmp_path, capsys):
    labels = tmp_path / "labels.json"
    templates = ["{weeks} weeks, {day} days, {pixel_spacing} mm"]
    labels.write_text(json.dumps({"head": ["a fetal head"], "thigh": ["a femur", "a thigh bone"], "ga": templates}))
    out = tmp_path / "fp32.mlpackage"
    export_main(exported.checkpoint, "--out", out, "--precision", "fp32", "--labels", labels, "--runs", 1)
    program, images = export_program(out), export_images(2, 64)
    with torch.no_grad():
        expected = F.normalize(exported.model.clip.encode_image(exported.model.pixels(images)), dim=-1)
    outputs = [export_run(program, image) for image in images]
    assert (torch.cat([out["embedding"] for out in outputs]) - expected).abs().max() < 1e-5
    classes = evaluate.class_embeddings(
        exported.model, {c: p for c, p in json.loads(labels.read_text()).items() if c != "ga"}
    )
    with torch.no_grad():
        likely = (exported.model.clip.logit_scale.exp() * expected @ classes.T).softmax(-1)  # (2, 2)
    torch.testing.assert_close(torch.cat([out["probabilities"] for out in outputs]), likely, atol=1e-4, rtol=0)
    user = ct.models.MLModel(str(out), skip_model_load=True).user_defined_metadata
    assert json.loads(user["labels"]) == ["head", "thigh"]
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert size > 1.8 * 1e6 * exported.result["package_mb"]
    assert capsys.readouterr().err == ""  # no chatter of the converter, no bars off a terminal


# ---------------------------------------------------------------- export: without a checkpoint


def test_export_without_a_checkpoint_says_random_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "PAPER", "demo-fastvit")  # in place of MobileCLIP2-S0, to save time
    export_main("--runs", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].lower().startswith("random weights") and "timing" in lines[0] and "demo-fastvit" in lines[0]
    assert (tmp_path / "out" / "MobileFetalCLIP.mlpackage" / "Manifest.json").is_file()
    spec = ct.models.MLModel(str(tmp_path / "out" / "MobileFetalCLIP.mlpackage"), skip_model_load=True).get_spec()
    assert [output.name for output in spec.description.output] == ["embedding"]
    user = dict(spec.description.metadata.userDefined)
    assert "andom" in user["source"] and not {"labels", "checkpoint_sha256", "beta0"} & set(user)


def test_export_of_a_vit_has_one_latency_and_counts_attention(tmp_path, capsys):
    out = tmp_path / "ViT.mlpackage"
    export_main("--model", "demo-vit", "--out", out, "--runs", 2)
    result = json.loads((tmp_path / "export.json").read_text())
    assert [row["runtime"] for row in result["latency"]] == ["PyTorch"] and result["fused_over_unfused"] is None
    visual = dark.open_model("demo-vit").clip.visual
    d, layers = visual.conv1.out_channels, len(visual.transformer.resblocks)
    n = (visual.image_size[0] // visual.conv1.kernel_size[0]) ** 2 + 1  # tokens
    patches = (n - 1) * d * 3 * visual.conv1.kernel_size[0] ** 2
    products = layers * n * 12 * d * d + d * visual.output_dim  # qkv, out, and the fourfold MLP; the projection
    attention = layers * 2 * n * n * d  # queries by keys, weights by values
    by_kind = {"convolutions": patches, "matrix products": products, "attention": attention}
    assert result["gmacs_by_kind"] == pytest.approx({kind: macs / 1e9 for kind, macs in by_kind.items()})
    assert result["gmacs"] == pytest.approx(sum(by_kind.values()) / 1e9)
    assert torch.backends.mha.get_fastpath_enabled()  # was switched off to count, and is on again


# ---------------------------------------------------------------- export: fusing


def export_fresh_fastvit():
    """As timm and open_clip make it: what the images change is tiny beside the bias of the projection."""
    torch.manual_seed(0)
    trunk = timm.models.FastVit(layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), mlp_ratios=(2, 2, 2, 2))
    trunk.reset_classifier(32)
    clip = types.SimpleNamespace(visual=trunk)
    return export.Phone(types.SimpleNamespace(clip=clip, mean=(0.5,) * 3, std=(0.5,) * 3), None)


@pytest.mark.parametrize("weights", ["fresh", "trained"])
def test_export_stops_when_fusing_is_wrong(monkeypatch, capsys, weights):
    images = export.probe_images(64)
    tower = export_fresh_fastvit()
    if weights == "trained":
        export.livened(tower, images)
    with torch.no_grad():
        before = copy.deepcopy(tower)(images)[0]
    _, difference = export.fuse_and_check(tower, images)
    assert 0 < difference < 1e-5
    torch.testing.assert_close(tower(images)[0], before, rtol=0, atol=0)  # the tower itself is left as it was

    def wrong(model):
        model = right(model)
        model.visual.stages[1].blocks[0].token_mixer.reparam_conv.weight.data *= 1.01
        return model

    right = timm.utils.reparameterize_model
    monkeypatch.setattr(timm.utils, "reparameterize_model", wrong)
    unseen = export.fuse(tower, images)[1] < export.TOLERANCE  # by a comparison of the tower as it is
    assert unseen == (weights == "fresh")
    fails(capsys, lambda: export.fuse_and_check(tower, images), "fusing")


def test_export_fresh_fastvit_is_why_the_copy_is_livened():
    images, tower = export.probe_images(64), export_fresh_fastvit()
    fresh = export.fuse(tower, images)[2]
    assert fresh < export.SPREAD < 0.1 < export.fuse(export.livened(tower, images), images)[2]


def test_export_stops_when_no_image_matters(capsys):
    tower = export_fresh_fastvit()
    tower.visual.head.fc.weight.data.zero_()
    fails(capsys, lambda: export.fuse_and_check(tower, export.probe_images(64)), "look alike")


# ---------------------------------------------------------------- export: mistakes


@pytest.mark.parametrize(
    "flags, words",
    [
        (["gone.pt"], ["gone.pt"]),
        (["foreign.pt"], ["foreign.pt"]),
        (["truncated.pt"], ["truncated.pt"]),
        (["foreign.pt", "--model", "demo-vit"], ["foreign.pt", "demo-vit"]),
        (["--weights", "x.pt"], ["--weights", "--model"]),
        (["--mean", "0,0,0"], ["--mean", "--model"]),
        (["--model", "demo-vit", "--weights", "gone.pt"], ["gone.pt"]),
        (["--model", "no-such-model"], ["no-such-model"]),
        (["--runs", "0"], ["--runs", "0"]),
        (["--precision", "int8"], ["int8", "fp16"]),
        (["--prec", "fp16"], ["--prec"]),
        (["--out", "package"], ["package", ".mlpackage"]),
        (["--out", "folder.mlpackage"], ["folder.mlpackage"]),
        (["--out", "file.mlpackage"], ["file.mlpackage"]),
        (["--out", "foreign.pt/a.mlpackage", "--model", "demo-vit"], ["foreign.pt"]),
        (["--labels", "gone.json"], ["gone.json"]),
        (["--labels", "list.json"], ["list.json", "class"]),
        (["--labels", "ages.json"], ["ages.json", "class"]),
        (["--iphone", "--team", "T", "--bundle", "b"], ["--iphone", "macOS"]),
        (["--team", "T"], ["--team", "--iphone"]),
    ],
)
def test_export_mistakes_get_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(export, "PAPER", "demo-fastvit")
    monkeypatch.setattr(export, "convert", lambda *_, **__: pytest.fail("got as far as converting"))
    torch.save({"state_dict": {}}, "foreign.pt")
    Path("truncated.pt").write_bytes(Path("foreign.pt").read_bytes()[:100])
    Path("folder.mlpackage").mkdir()
    Path("folder.mlpackage/keep").write_text("mine")
    Path("file.mlpackage").write_text("mine")
    Path("list.json").write_text('["a fetal head"]')
    Path("ages.json").write_text('{"ga": ["{weeks} {day} {pixel_spacing}"]}')
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    fails(capsys, lambda: export_main(*flags), *words)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert Path("folder.mlpackage/keep").read_text() == Path("file.mlpackage").read_text() == "mine"


class ExportUnconvertible(nn.Module):
    """An image tower with one operation that cannot go to Core ML."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.project = operation, nn.Linear(12, 8)

    def forward(self, x):
        return self.project(self.operation(F.adaptive_avg_pool2d(x, 2)).flatten(1))


@pytest.mark.parametrize(
    "operation, name",
    [
        (lambda x: x.cummax(-1)[0], "cummax"),  # unknown to coremltools
        (lambda x: torch.linalg.inv(x + torch.eye(2)), "linalg_inv"),  # known, and refused
        (lambda x: x * 2 if x.sum() > 0 else x, "data-dependent"),  # stops torch.export
    ],
    ids=["unknown", "refused", "branch"],
)
def test_export_names_the_operation_it_cannot_convert(exported, tmp_path, monkeypatch, capsys, operation, name):
    out = tmp_path / "old.mlpackage"
    shutil.copytree(exported.out, out)
    model = dark.open_model("demo-vit")
    model.clip.visual = ExportUnconvertible(operation)
    monkeypatch.setattr(dark, "open_model", lambda *_, **__: model)
    call = lambda: export_main("--model", "demo-vit", "--out", out)
    fails(capsys, call, "demo-vit", "cannot be converted", name)
    assert [p.name for p in tmp_path.iterdir()] == ["old.mlpackage"]
    assert (out / "Manifest.json").read_bytes() == (exported.out / "Manifest.json").read_bytes()


def test_export_takes_towers_with_tokens_and_with_aliases():
    class Tower(nn.Module):  # CoCa's return their tokens too; a slice of everything becomes aten.alias in SigLIP's
        def __init__(self):
            super().__init__()
            self.embed, self.project = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)

        def forward(self, x):
            tokens = self.embed(x).flatten(2).mT[:, 0:]  # (n, 16, 8)
            return self.project(tokens.mean(1)), tokens

    torch.manual_seed(0)
    model = types.SimpleNamespace(clip=types.SimpleNamespace(visual=Tower()), mean=(0.5,) * 3, std=(0.5,) * 3)
    tower = export.Phone(model, None)
    image = torch.rand(1, 3, 32, 32)
    expected = F.normalize(model.clip.visual((image - 0.5) / 0.5)[0], dim=-1)
    torch.testing.assert_close(tower(image)[0], expected)
    program = torch.export.export(tower, (image,)).run_decompositions({})
    assert program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default)  # else this tests nothing
    package = export.convert(tower, "tokens", 32, "fp16")
    (output,) = package.get_spec().description.output
    assert (output.name, list(output.type.multiArrayType.shape)) == ("embedding", [1, 4])


def test_export_keeps_the_old_package_until_the_new_one_is_complete(exported, tmp_path):
    out = tmp_path / "old.mlpackage"
    shutil.copytree(exported.out, out)
    (out / "mark").write_text("old")

    class DiskFull:
        def save(self, path):
            shutil.copytree(exported.out / "Data", Path(path) / "Data")  # half of a package
            assert (out / "mark").exists()
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        export.save(DiskFull(), out)
    assert (out / "mark").exists() and [p.name for p in tmp_path.iterdir()] == ["old.mlpackage"]
    size = export.save(ct.models.MLModel(str(exported.out), skip_model_load=True), out)
    assert not (out / "mark").exists() and [p.name for p in tmp_path.iterdir()] == ["old.mlpackage"]
    assert size == sum(file.stat().st_size for file in exported.out.rglob("*") if file.is_file())


def test_export_keeps_real_warnings_and_restores_the_bars(capsys, caplog):
    def call():
        with export.converting("model-x"):
            export.log.warning("a value overflows")
            export.log.error("converting 'op-y'")
            list(tqdm(range(3)))
            assert not logging.getLogger("torch.fx").isEnabledFor(logging.WARNING)  # torch.export's own account
            raise ValueError("bad shape")

    fails(capsys, call, "model-x", "op-y", "bad shape")  # one line: no bar
    assert "overflows" in caplog.text and "op-y" not in caplog.text
    with pytest.raises(ZeroDivisionError), export.converting("model-x"):
        raise ZeroDivisionError  # a fault of ours is not passed off as the model's
    assert logging.getLogger("torch.fx").isEnabledFor(logging.WARNING)
    list(tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err


# ---------------------------------------------------------------- export: Core ML on a Mac and on a phone, by stand-ins


@dataclasses.dataclass
class ExportPhone:
    name: str = "Test iPhone"
    os_version: str = "18.1"
    developer_mode_state: str = "enabled"
    session: object = None
    asked: dict = dataclasses.field(default_factory=dict)

    async def prepare_for_model_debugging(self, credentials=None, working_directory=None):
        assert working_directory.is_dir()
        self.asked |= {"credentials": credentials}
        return dataclasses.replace(self, session=types.SimpleNamespace(stop=lambda: self.asked.update(stopped=True)))


def export_mac(monkeypatch, phones, tools=("xcodebuild", "devicectl")):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}" if tool in tools else None)
    device = export.remote_device.Device
    monkeypatch.setattr(device, "get_connected_devices", lambda kind: phones if kind.name == "IPHONE" else [])


@pytest.mark.parametrize(
    "state, words",
    [
        (dict(phones=[ExportPhone()], flags=[]), ["--team", "--bundle"]),
        (dict(phones=[ExportPhone()], tools=["devicectl"]), ["xcodebuild", "Xcode"]),
        (dict(phones=[ExportPhone()], tools=["xcodebuild"]), ["devicectl", "PATH"]),
        (dict(phones=[]), ["no connected iPhone", "unlock"]),
        (dict(phones=[ExportPhone(developer_mode_state="disabled")]), ["Test iPhone", "Developer Mode"]),
    ],
    ids=["credentials", "xcode", "devicectl", "phone", "developer"],
)
def test_export_says_what_the_phone_needs(monkeypatch, capsys, tmp_path, state, words):
    flags = state.pop("flags", ["--team", "T", "--bundle", "b"])
    export_mac(monkeypatch, **state)
    monkeypatch.setattr(export, "open_subject", lambda args: pytest.fail("work began"))
    fails(capsys, lambda: export_main("--iphone", *flags, "--out", tmp_path / "a.mlpackage"), "--iphone", *words)


def test_export_says_when_devicectl_fails(monkeypatch, capsys, tmp_path):
    def broken(kind):
        raise export.remote_device._DeviceCtlError(b"no CoreDevice", error_code=72)

    export_mac(monkeypatch, [])
    monkeypatch.setattr(export.remote_device.Device, "get_connected_devices", broken)
    call = lambda: export_main("--iphone", "--team", "T", "--bundle", "b", "--out", tmp_path / "a.mlpackage")
    fails(capsys, call, "--iphone", "no CoreDevice", "Xcode")


def test_export_on_a_mac_with_a_phone(exported, tmp_path, monkeypatch, capsys):
    phone, out, calls, programs = ExportPhone(), tmp_path / "a.mlpackage", [], {}
    export_mac(monkeypatch, [phone])

    class Benchmarker:
        def __init__(self, model, device=None):
            self.model, self.device = model, device

        async def benchmark_predict(self, inputs, iterations):
            calls.append(
                (self.model.compute_unit.name, self.device, self.model.get_spec(), inputs["image"], iterations)
            )
            base = {"CPU_ONLY": 30.0, "CPU_AND_GPU": 20.0, "CPU_AND_NE": 10.0}[self.model.compute_unit.name]
            return types.SimpleNamespace(samples=[base + i for i in range(iterations)])

    monkeypatch.setattr(export.perf_utils, "MLModelBenchmarker", Benchmarker)

    def predict(self, inputs):  # what Core ML would answer: the stored program, here 1e-3 off in one value
        program = programs.setdefault("mac", export_program(out))
        embedding = export_run(program, torch.from_numpy(np.array(inputs["image"])))["embedding"].numpy().copy()
        embedding[0, 0] += 0.1
        return {"embedding": embedding}

    engine = object.__new__(export.MLNeuralEngineComputeDevice)
    usage = {"const": "cpu", "ios17.conv": engine, "ios17.gelu": engine, "ios17.softmax": "cpu", "ios17.cast": "cpu"}
    operations = [types.SimpleNamespace(operator_name=name) for name in [*usage, "unknown"]]
    block = types.SimpleNamespace(block=types.SimpleNamespace(operations=operations))
    plan = types.SimpleNamespace(
        model_structure=types.SimpleNamespace(program=types.SimpleNamespace(functions={"main": block})),
        get_compute_device_usage_for_mlprogram_operation=lambda o: types.SimpleNamespace(
            preferred_compute_device=usage[o.operator_name]) if o.operator_name in usage else None,
    )  # fmt: skip
    monkeypatch.setattr(ct.models.MLModel, "predict", predict)
    monkeypatch.setattr(ct.models.MLModel, "get_compiled_model_path", lambda self: "a.mlmodelc")
    monkeypatch.setattr(export.MLComputePlan, "load_from_path", lambda path, compute_units: plan)
    export_main(exported.checkpoint, "--out", out, "--runs", 11, "--iphone", "--team", "TEAM1", "--bundle", "org.x.y")

    rows = json.loads((tmp_path / "export.json").read_text())["latency"]
    units = ["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"]
    mac, on_phone = rows[2:5], rows[5:]
    assert [row["compute_units"] for row in mac] == [row["compute_units"] for row in on_phone] == units
    assert all(row["difference"] == pytest.approx(0.1, abs=5e-3) for row in mac)
    assert all(row["neural_engine_share"] == 0.5 for row in mac)  # constants and unplanned operations aside
    assert all((row["device"], row["os"]) == ("Test iPhone", "iOS 18.1") for row in on_phone)
    assert (on_phone[2]["median_ms"], on_phone[2]["p90_ms"], on_phone[2]["runs"]) == (15.0, 19.0, 11)

    assert [call[4] for call in calls] == [export.WARM_UP, 11] * 6
    for _, device, spec, image, _ in calls[:6]:
        assert device is None and isinstance(image, Image.Image)
        assert spec.description.input[0].type.WhichOneof("Type") == "imageType"
    for _, device, spec, image, _ in calls[6:]:  # the prepared device, and a twin that takes an array
        assert device is not phone and device.session is not None
        assert spec.description.input[0].type.WhichOneof("Type") == "multiArrayType"
        assert image.dtype == np.float32 and image.shape == (1, 3, 64, 64) and 0.5 < image.max() <= 1
    assert (phone.asked["credentials"].development_team, phone.asked["credentials"].bundle_identifier) == (
        "TEAM1",
        "org.x.y",
    )
    assert phone.asked["stopped"]
    printed = capsys.readouterr().out
    assert "50% of the operations prefer the Neural Engine" in printed and re.search(r"Test iPhone +iOS 18.1", printed)


def test_export_phone_that_refuses_gets_one_line(exported, monkeypatch, capsys):
    class Locked(ExportPhone):
        async def prepare_for_model_debugging(self, **_):
            raise export.remote_device._DeviceCtlError(b"device is locked", error_code=1)

    monkeypatch.setattr(export, "convert", lambda *_, **__: None)  # the twin: not reached
    tower = export.Phone(exported.model, None)
    args = types.SimpleNamespace(precision="fp16", runs=1, team="T", bundle="b")
    pixels = torch.zeros(64, 64, 3, dtype=torch.uint8)
    call = lambda: asyncio.run(export.on_iphone(Locked(), tower, exported.model, pixels, args))
    fails(capsys, call, "--iphone", "locked", "unlock")


# ---------------------------------------------------------------- the README


def test_readme_knows_every_flag_and_its_snippet_runs():
    readme = (HERE / "README.md").read_text()
    for field in dataclasses.fields(dark.Config):
        assert f"| `--{field.name.replace('_', '-')}` |" in readme
    for name in dark.ABLATIONS:
        assert f"`{name}`" in readme
    snippet = re.search(r"```python\n(import torch\nfrom dark import .*?)```", readme, re.DOTALL)[1]
    namespace = {}
    exec(snippet, namespace)
    assert math.isfinite(namespace["loss"].item()) and namespace["log_scale"].grad is not None


# ---------------------------------------------------------------- measurements: python test_dark.py


def cost_of_loss(name, n=4096, d=512, d_t=768, runs=5):
    """Seconds (best of `runs`, forward and backward) and MiB (growth of the peak resident size) on one batch."""
    import resource

    loss_of = {"dark_loss": dark.dark_loss, "masked form": masked_form}[name]
    batch = [x.float() for x in random_batch(n, d, d_t)]
    for x in batch[:3]:
        x.requires_grad_()
    loss_of(*[x[:64] if x.ndim else x for x in batch], beta=-1.6)[0].backward()
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, seconds = peak(), []
    for _ in range(runs):
        for x in batch[:3]:
            x.grad = None
        start = time.perf_counter()
        loss_of(*batch, beta=-1.6)[0].backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds), peak() - before


def loader_speed(n=300):
    """Images a second of one worker's work, and of a loop that only decodes, resizes to 256 and makes a tensor."""
    models = [dark.open_model(name, context_length=77) for name in ("MobileCLIP2-S0", "ViT-B-32")]
    data = dark.Pairs(dark.Config(data=(str(HC18 / "train-{000000..000003}.tar"),), spacing_size=256), models)
    start = time.perf_counter()
    for k in range(0, n, 50):
        data.collate([data[0, i] for i in range(k, k + 50)])
    ours = n / (time.perf_counter() - start)
    start = time.perf_counter()
    for i in range(n):
        _, read, k = data.locate(i)
        image = read(k)[0].convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    return ours, n / (time.perf_counter() - start)


if __name__ == "__main__":
    for name in ("dark_loss", "masked form"):
        with mp.get_context("spawn").Pool(1) as fresh:
            seconds, mebibytes = fresh.apply(cost_of_loss, (name,))
        print(f"{name:12} N = 4096, D = 512, D_t = 768, forward and backward: {seconds:.2f} s, {mebibytes:.0f} MiB")
    if HC18.exists():
        torch.set_num_threads(1)
        print("HC18 JPEGs: {:.0f} img/s from a loader process, {:.0f} from the bare loop".format(*loader_speed()))
