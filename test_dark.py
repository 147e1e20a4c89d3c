"""python -m pytest: the mathematics against loop-written references, and the three scripts end to end, offline."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: models this small run faster so

import copy
import gzip
import hashlib
import inspect
import io
import json
import math
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import types
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from PIL import Image, ImageEnhance
from safetensors.torch import save

import dark
import evaluate
import export

HERE = Path(dark.__file__).parent


def fails(capsys, call, *words, code=2):
    """The call must end with that exit code and one line on stderr, after any progress bar, that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    lines = capsys.readouterr().err.rpartition("\r")[2].strip().splitlines()
    assert (stopped.value.code, len(lines)) == (code, 1), lines
    for word in words:
        assert str(word) in lines[0], lines[0]


def spied(monkeypatch, owner, name):
    """(arguments, result) of every call of owner.name, in a list that grows."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append((args, real(*args))) or calls[-1][1])
    return calls


# ---------------------------------------------------------------- the loss

# beta, diag, clip, tau, smooth
WEIGHTS = [(2, 1, 1, 5, 0), (0.3, 0.3, 1, 5, 0.1), (0, 0, 1, 5, 0), (-0.8, 1, 0.3, 1, 0), (-1.6, 2, 0, 5, 0)]
ROWS = {  # diag at the start and at the end, off at the start and at the end, and that end with --r-is-end
    "no-kd": (0, 0, 0, 0, 0),
    "static": (1, 1, 1, 1, 1),
    "static-feat": (1, 1, 1, 1, 1),
    "full-decay": (1, 0, 1, 0, 0),
    "decay": (1, 0.1, 1, 0.1, 0.1),
    "conf-penalty": (1, 0.1, 1, 0.1, 0.1),
    "coupled": (1, -0.8, 1, -0.8, -0.8),
    "selective": (1, 1, 2, -1.6, -0.8),
    "beta4": (1, 1, 4, -3.2, -0.8),
    "beta8": (1, 1, 8, -6.4, -0.8),
    "r-0.5": (1, 1, 2, -1, -0.5),
    "r-0.4": (1, 1, 2, -0.8, -0.4),
}


def random_batch(n=7, d=5, d_t=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    image, text, t_image, t_text = (torch.randn(n, k, generator=g, dtype=dtype) for k in (d, d, d_t, d_t))
    batch = [image, text, torch.tensor(12.0, dtype=dtype), t_image, t_text, torch.tensor(40.0, dtype=dtype)]
    return [x.requires_grad_(k < 3) for k, x in enumerate(batch)]


def reference(image, text, scale, t_image, t_text, t_scale, beta, diag, clip, tau, smooth):
    """The equations term by term."""
    n = len(image)
    unit = lambda x: x / x.norm()
    clip_loss = kd_diag = kd_off = 0
    for rows, cols, t_rows, t_cols in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        for i in range(n):
            s = [scale * (unit(rows[i]) * unit(cols[j])).sum() for j in range(n)]
            t = [(t_scale * (unit(t_rows[i]) * unit(t_cols[j])).sum()).item() / tau for j in range(n)]
            log_q = [s[j] - sum(x.exp() for x in s).log() for j in range(n)]
            p = [(1 - smooth) * math.exp(t[j]) / sum(map(math.exp, t)) + smooth / n for j in range(n)]
            clip_loss = clip_loss - log_q[i] / (2 * n)
            kd_diag = kd_diag - p[i] * log_q[i] / (2 * n)
            kd_off = kd_off - sum(p[j] * log_q[j] for j in range(n) if j != i) / (2 * n)
    return clip * clip_loss + diag * kd_diag + beta * kd_off, {"clip": clip_loss, "diag": kd_diag, "off": kd_off}


@pytest.mark.parametrize("weights", WEIGHTS)  # where beta equals diag: Eq. 4
def test_loss_and_gradient_equal_the_loops(weights):
    batch, weights = random_batch(), dict(zip(("beta", "diag", "clip", "tau", "smooth"), weights))
    loss, parts = dark.dark_loss(*batch, **weights)
    expected, expected_parts = reference(*batch, **weights)
    torch.testing.assert_close((loss, parts), (expected, expected_parts))
    gradient, expected_gradient = (torch.autograd.grad(x, batch[:3]) for x in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    namespace = {"torch": torch, "F": F}
    exec(inspect.getsource(dark.dark_loss), namespace)  # it lifts out of the file
    assert torch.equal(namespace["dark_loss"](*batch, **weights)[0], loss)


def test_precision():
    batch = [x.detach() for x in random_batch(n=256, d=64, d_t=96)]
    batch[1], batch[4] = batch[0] + 0.1 * batch[1], batch[3] + 0.1 * batch[4]  # well aligned, teacher confident
    batch[2] = batch[5] = torch.tensor(100.0, dtype=torch.float64)
    single = [x.float().requires_grad_() for x in batch]
    loss, parts = dark.dark_loss(*single, beta=-1.6)
    exact = dark.dark_loss(*batch, beta=-1.6)[1]["off"]
    assert abs(parts["off"] / exact - 1) < 1e-4 and exact < 0.01  # though the off-diagonal nearly vanishes
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = dark.dark_loss(*single, beta=-1.6)
        half, _ = dark.dark_loss(*[x.bfloat16() for x in batch], beta=-1.6)
    assert torch.equal(loss, mixed) and half.dtype == torch.float32
    mixed.backward()
    assert [x.grad is None for x in single] == [False] * 3 + [True] * 3  # none for the teacher
    assert not any(part.requires_grad for part in parts.values())


def test_schedules_and_the_bound_of_the_scale():
    for step, beta in ((0, 2.0), (50, 0.2), (100 / 1.8, 0), (100, -1.6)):  # zero at T / (1 - r)
        assert dark.beta_at(step, 100, 2.0, -0.8) == pytest.approx(beta, abs=1e-12)
    for step, lr in ((0, 1 / 500), (499, 1), (500, 1), (750, 0.5), (999, 1e-5)):
        assert dark.lr_at(step, 1000, 1.0, 500) == pytest.approx(lr, abs=1e-5)
    clip = torch.nn.Module()
    for scale in (90.0, 1000.0):
        clip.logit_scale = torch.nn.Parameter(torch.tensor(scale).log())
        dark.clamp_scale(clip)
        assert min(scale, 99.9) - 0.01 < clip.logit_scale.exp() <= 100


@pytest.mark.parametrize("name", dark.ABLATIONS)
def test_ablation_rows_are_choices_of_the_two_weights(name):
    def weights(*flags):
        cfg, *_ = dark.parse_args(["--ablation", name, *flags])
        beta = [dark.beta_at(step, 10, cfg.beta0, cfg.r) for step in (0, 10)]
        return [*(beta if cfg.coupled else [cfg.diag] * 2), *beta]

    *expected, end = ROWS[name]
    assert weights() == pytest.approx(expected)
    if name != "no-kd":  # a mistake, below
        assert weights("--r-is-end")[2:] == pytest.approx([expected[2], end])


def test_flag_wins_over_ablation_over_demonstration_over_default():
    parse = lambda words: dark.parse_args(words.split())[0]
    assert set(ROWS) == set(dark.ABLATIONS)
    assert parse("--ablation conf-penalty").smooth == 0.1 and parse("--ablation static-feat").feature == 2000
    assert parse("--ablation beta4").beta0 == 4 and parse("--ablation beta4 --beta0 3").beta0 == 3
    small, paper = parse("--batch 16"), parse("--data x.tar --teacher-weights y.pt --student-weights z.pt --epochs 3")
    assert (small.student, small.batch, small.lr) == ("demo-fastvit", 16, dark.DEMONSTRATION["lr"])
    assert (paper.student, paper.batch, paper.lr, paper.tau, paper.epochs) == ("MobileCLIP2-S0", 1024, 1e-5, 5, 3)


# ---------------------------------------------------------------- the step

VISION = dict(image_size=16, layers=1, width=32, head_width=16, patch_size=8)


def tiny_model(**vision):
    """A CLIP without batch norm, for gradients that must not depend on how a batch is cut."""
    torch.manual_seed(0)
    with mock.patch.dict(dark.DEMO_MODELS, tiny=dict(embed_dim=24, vision_cfg=VISION | vision)):
        model = dark.open_model("tiny")
    model.projections.extend(torch.nn.Linear(24, 40) for _ in range(2))
    return model


def tiny_batch(n=8):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 16, 16, 3), generator=g, dtype=torch.uint8)
    return images, torch.randint(1, 49000, (n, 40), generator=g), [torch.randn(n, 40, generator=g) for _ in range(2)]


def step(net, images, tokens, targets, chunk):
    """Embeddings, loss and backward as dark.train has them -> the gradients."""
    (image, text, *projected), scale = net(images, tokens, chunk)
    image, text, *projected = map(dark.gather, (image, text, *projected))
    loss, _ = dark.dark_loss(image, text, scale, *targets, torch.tensor(30.0), beta=-1.6)
    (loss + sum(map(F.mse_loss, projected, targets))).backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


def assert_same_gradient(found, expected):
    """Up to fp32 rounding: plain accumulation, or a gather without gradient, is off by tens of percent."""
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("chunk", [4, 3])
def test_micro_batches_give_the_full_batch_gradient(chunk):
    whole = step(tiny_model(), *tiny_batch(), 8)
    assert all(gradient.abs().max() > 0 or "bias" in name for name, gradient in whole.items())
    assert_same_gradient(step(tiny_model(), *tiny_batch(), chunk), whole)


def test_both_passes_of_a_micro_batch_drop_the_same_patches():
    seen, model = [], tiny_model(patch_dropout=0.5).train()
    model.clip.visual.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    step(model, *tiny_batch(), 4)
    assert len(seen) == 4 and not torch.equal(seen[0], model.clip.encode_image(model.pixels(tiny_batch()[0][:4])))
    assert all(any(torch.equal(again, first) for again in seen[2:4]) for first in seen[:2])


def test_running_statistics_move_once_with_micro_batches():
    model, images = dark.open_model("demo-fastvit").train(), torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    (image, text), _ = model(images, model.tokenizer(["a"] * 8), 4)
    moved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    (image.sum() + text.sum()).backward()  # computes every micro-batch again
    assert all(torch.equal(moved[name], buffer) for name, buffer in model.named_buffers())
    assert {int(v) for name, v in moved.items() if name.endswith("num_batches_tracked")} == {2}  # of micro-batches


def saved_for_backward(call):
    """Bytes of each storage that backward will need."""
    kept = []  # the tensors themselves, so that no address comes twice
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        call()
    storages = [x.untyped_storage() for x in kept]
    return [*{storage.data_ptr(): storage.nbytes() for storage in storages}.values()]


def test_backward_keeps_two_matrices_of_the_loss_and_few_activations():
    batch = [x.detach().float().requires_grad_() for x in random_batch(n=64, d=8)]
    kept = saved_for_backward(lambda: dark.dark_loss(*batch, beta=-1.0))
    assert kept.count(4 * 64 * 64) == 2  # the logits and the teacher's off-diagonal
    images, tokens, _ = tiny_batch(64)
    whole, chunked = (sum(saved_for_backward(lambda: tiny_model()(images, tokens, chunk))) for chunk in (64, 8))
    assert chunked < whole / 10


def distributed_worker(folder, *flags):
    """One of two processes: compares its gradients with those of one, then trains a run."""
    rank, (images, tokens, targets) = int(os.environ["RANK"]), tiny_batch()
    whole, mine = step(tiny_model(), images, tokens, targets, 8), slice(4 * rank, 4 * rank + 4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gathered = [dark.gather(t[mine]) for t in targets]
    for chunk in (4, 3):  # 3: with micro-batches
        net = torch.nn.parallel.DistributedDataParallel(tiny_model())
        assert_same_gradient(step(net, images[mine], tokens[mine], gathered, chunk), whole)
    torch.distributed.destroy_process_group()
    biased = {**dark.DEMO_MODELS["demo-fastvit"], "init_logit_bias": 0.0}  # SigLIP's bias, which gets no gradient
    with mock.patch.dict(dark.DEMO_MODELS, {"demo-fastvit": biased}):
        dark.main([*SMALL, "--out", f"{folder}/out", *flags])


def test_optimizer_decays_matrices_only():
    decayed, free = dark.make_optimizer(dark.Config(), student()).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert decayed["betas"] == (0.9, 0.98) and decayed["eps"] == 1e-6
    names = {id(p): name for name, p in student().named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in (decayed, free))
    assert decayed | free == set(names.values()) and {"clip.logit_scale", "clip.ln_final.weight"} <= free
    assert any("gamma" in name for name in free)  # FastViT's layer scales, shaped (C, 1, 1)
    assert not any("bias" in name for name in decayed) and "clip.token_embedding.weight" in decayed


# ---------------------------------------------------------------- the data


def written(write):
    """What write(file) writes."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


student = cache(lambda: dark.open_model("demo-fastvit"))
pairs_of = lambda *data, **how: dark.Pairs(dark.Config(data=tuple(map(str, data)), **how)).for_models(student())
png = lambda color=128, size=(40, 30), kind="PNG": written(lambda file: Image.new("L", size, color).save(file, kind))
saved = lambda content: written(lambda file: torch.save(content, file))


def tar(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def pair_members(n, first=0):
    for i in range(first, first + n):
        yield f"{i:04d}.jpg", png(i % 256, kind="JPEG")
        yield f"{i:04d}.json", b"{}"
        yield f"{i:04d}.txt", f"caption {i}".encode()


def look(*data):
    """The middle pixel and the caption of every pair."""
    pairs = pairs_of(*data)
    items = (pairs[0, i] for i in range(len(pairs)))
    return [(int(images[64, "bilinear"][32, 32, 0]), text) for images, _, text, *_ in items]


def test_tars_and_tables_of_pairs(tmp_path):
    members = [("b/1.png", png(200)), ("b/1.txt", b"in a folder"), ("a.seg.png", png()), ("._a.txt", b"x")]
    members += [("a.txt", "ümlaut\n".encode()), ("alone.webp", png(kind="WEBP")), ("a.jpeg", png(5, kind="JPEG"))]
    (tmp_path / "x.tar").write_bytes(tar(members))
    (tmp_path / "x.tar").rename(tmp_path / os.fsdecode(b"\xff.tar"))  # no UTF-8
    assert look(tmp_path / "*.tar") == [(200, "in a folder"), (5, "ümlaut")]
    for k in range(3):
        (tmp_path / f"s-{k:03d}.tar").write_bytes(tar(pair_members(4, 4 * k)))
    for pattern in ("s-{000..002}.tar", "s-*.tar"):
        assert look(tmp_path / pattern) == [(i, f"caption {i}") for i in range(12)]
    assert len(pairs_of(tmp_path / "s-000.tar", "phantom", phantom_pairs=3)) == 7
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(10))
    (tmp_path / "b.png").write_bytes(png(20))
    for name, text in (
        ("p.csv", '\ufeffimage,caption\nsub/a.png,"one, two"\n{}/b.png,"three\nfour"\n'),
        ("p.csv", 'title,more,filepath\r\n"one, two",,sub/a.png\r\n"three\nfour",x,b.png\r\n'),
        ("p.tsv", 'caption\timage\none, two\tsub/a.png\n"three\nfour"\tb.png\n'),
    ):
        (tmp_path / name).write_bytes(text.format(tmp_path).encode())
        assert look(tmp_path / name) == [(10, "one, two"), (20, "three\nfour")]
    (tmp_path / "p.csv").write_text("image,caption\n" + "b.png,a caption of some length\n" * 20_000)
    before = sys.getallocatedblocks()
    data = dark.Pairs(dark.Config(data=(str(tmp_path / "p.csv"),)))
    assert len(data) == 20_000 and sys.getallocatedblocks() - before < 2_000  # no objects per pair


def test_epochs_are_exact_and_steps_can_be_entered_anywhere():
    stream = list(dark.batches(10, 4, (0, 15), seed=3))  # six epochs, batches lie across their ends
    orders = [[i for step in stream for e, i in step if e == epoch] for epoch in range(6)]
    assert all(sorted(order) == list(range(10)) for order in orders) and orders[0] != orders[1]
    assert list(dark.batches(10, 4, (7, 15), seed=3)) == stream[7:]
    halves = [list(dark.batches(10, 4, (0, 15), seed=3, process=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == stream and all(len(a) == 2 for a in halves[0])
    assert list(dark.batches(10, 4, (0, 15), seed=4)) != stream


def test_augmentation_against_pillow():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    degrees, shift, factors = 5.0, (3, -2), (1.1, 0.9, 1.15)
    expected = smooth.rotate(degrees, Image.Resampling.BILINEAR, translate=shift)
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        expected = enhance(expected).enhance(factor)
    # grid_sample asks where a pixel comes from, rotate says where it goes: the shift is turned and negative
    a, dx, dy = math.radians(degrees), -shift[0] / 32, -shift[1] / 32
    view = torch.tensor([[a, math.cos(a) * dx - math.sin(a) * dy, math.sin(a) * dx + math.cos(a) * dy, *factors]])
    images = torch.from_numpy(np.array(smooth))[None]
    difference = dark.augment(images, view)[0].numpy().astype(float) - np.array(expected)
    assert np.abs(difference[8:-8, 8:-8]).max() < 6
    assert torch.equal(dark.augment(images, torch.tensor([[0.0, 0, 0, 1, 1, 1]])), images)


def test_views_are_one_for_both_models_depend_on_seed_epoch_and_index_and_stay_in_bounds():
    small, large = dark.open_model("demo-fastvit"), dark.open_model("demo-vit")
    small.mean, small.std, large.size = (0.0,) * 3, (1.0,) * 3, 128
    data = pairs_of("phantom", phantom_pairs=8).for_models(small, large)
    images, views, tokens, items, *_ = data.collate([data[1, i] for i in range(4)])
    assert len(tokens) == 2 and list(items) == [(1, i) for i in range(4)] and list(images) == [small.frame, large.frame]
    alone = pairs_of("phantom", phantom_pairs=8)
    assert torch.equal(images[small.frame], alone.collate([alone[1, i] for i in range(4)])[0][small.frame])
    seen = {frame: dark.augment(x, views) for frame, x in images.items()}
    assert [tuple(x.shape) for x in seen.values()] == [(4, 64, 64, 3), (4, 128, 128, 3)]
    found, expected = (small.pixels(x).flatten() for x in seen.values())  # the larger one, made smaller
    other = small.pixels(dark.augment(images[large.frame], views.roll(1, 0))).flatten()
    assert (found - expected).abs().mean() < 0.02 < 0.5 * (found - other).abs().mean()
    first = data[2, 3][1]
    alone[0, 0], np.random.rand(), torch.rand(1)
    assert torch.equal(alone[2, 3][1], first)
    others = data[1, 3], data[2, 2], pairs_of("phantom", phantom_pairs=8, seed=7)[2, 3]
    assert not any(torch.equal(other[1], first) for other in others)
    views = np.stack([dark.draw_view(np.random.default_rng(seed)) for seed in range(2000)])
    limits = np.array([math.radians(7), 0.1, 0.1, 0.15, 0.15, 0.15])  # 5 % of the side is 0.1 of its half
    spread = np.abs(views - [0, 0, 0, 1, 1, 1])
    assert (spread <= limits + 1e-6).all() and (spread.max(0) > 0.99 * limits).all()


@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBA CMYK YCbCr I I;16 I;16B F HSV LAB".split())
def test_every_mode_becomes_eight_bit(mode):
    ramp = np.tile(np.arange(256), (256, 1))
    deep = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}
    if mode in deep:
        image = Image.fromarray((ramp / 255 if mode == "F" else ramp * 257).astype(deep[mode]))
    else:
        image = Image.fromarray(ramp.astype(np.uint8)).convert("L" if mode in ("LA", "PA") else "RGB").convert(mode)
    assert image.mode == mode
    eight = dark.square(image, 256, "bilinear")
    values = np.asarray(eight.convert("L"), np.int64)[0]
    assert eight.mode in ("L", "RGB") and values[250] - values[5] > 200
    if mode not in ("1", "HSV", "LAB", "YCbCr", "P", "PA"):
        assert np.abs(values - np.arange(256)).max() <= 1


def test_square_pads_bounds_turns_and_blackens():
    column = np.asarray(dark.square(Image.new("L", (80, 40), 255), 80, "bicubic"))[:, 40]
    assert [column[i] for i in (0, 19, 20, 59, 60, 79)] == [0, 0, 255, 255, 0, 0]
    assert dark.square(Image.new("RGB", (30, 90), (1, 2, 3)), 32, "bilinear").size == (32, 32)
    assert dark.square(Image.new("RGBA", (4, 4), (250, 250, 250, 0)), 4, "bicubic").getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(dark.UNDECODABLE):  # its square would take 10^10 bytes
        dark.square(Image.new("L", (100_000, 1)), 64, "bicubic")
    stripe, exif, file = Image.new("L", (40, 20), 10), Image.Exif(), io.BytesIO()
    stripe.paste(200, (0, 0, 8, 20))
    exif[0x0112] = 6  # the camera was upright: to be turned by 90 degrees clockwise
    stripe.save(file, "PNG", exif=exif)
    turned = dark.square(stripe.transpose(Image.Transpose.ROTATE_270), 40, "bilinear")
    assert dark.square(Image.open(file), 40, "bilinear").tobytes() == turned.tobytes()
    assert turned.getpixel((20, 3)) == 200


@pytest.mark.parametrize("content", [b"", b"not an image", png(size=(100_000, 1)), png(kind="JPEG")[:300]])
def test_unreadable_samples_are_replaced_and_counted(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(tar((dict(pair_members(200)) | {"0007.jpg": content}).items()))
    assert look(tmp_path / "x.tar")[7] == (8, "caption 8")
    data = pairs_of(tmp_path / "x.tar")
    assert set(data.collate([data[0, 6], data[0, 7]])[-1]) == {7} and not data.collate([data[0, 8]])[-1]


def test_phantom_is_deterministic_and_to_scale():
    image, label = dark.phantom(5, 11)
    assert image.tobytes() == dark.phantom.__wrapped__(5, 11)[0].tobytes() != dark.phantom(5, 12)[0].tobytes()
    assert image.tobytes() != dark.phantom(6, 11)[0].tobytes()
    labels, data, ages = [dark.phantom(42, i)[1] for i in range(60)], pairs_of("phantom", phantom_pairs=60), 0
    assert {label["view"] for label in labels} == set(dark.VIEWS)
    for i, label in enumerate(labels):
        text, view, weeks, days = data[0, i][2], dark.VIEWS[label["view"]], *divmod(label["days"], 7)
        assert view.partition(",")[0] in text
        assert 98 <= label["days"] <= 272 and abs(label["hc_mm"] / dark.who_hc(label["days"]) - 1) < 0.1
        if "weeks" in text:
            ages, spacing = ages + 1, label["pixel_mm"] * max(image.size) / 64  # of the model's input
            assert f"{spacing:.2f} mm" in text and f"{weeks} weeks and {days} days" in text
    assert ages > 20


# ---------------------------------------------------------------- the models


def test_the_paper_student_and_preprocessing(tmp_path):
    model = dark.open_model("MobileCLIP2-S0", context_length=117)
    millions = lambda module: round(sum(p.numel() for p in module.parameters()) / 1e6, 2)
    assert millions(model.clip.visual) == 11.41 and millions(model.clip) == 74.86
    state = {k.removeprefix("text."): v for k, v in model.clip.state_dict().items()}  # a plain CLIP's names
    torch.save(state, tmp_path / "s0.pt")
    loaded = dark.open_model("MobileCLIP2-S0", str(tmp_path / "s0.pt"), 117)
    for x in (model, loaded):  # not OpenAI's, which open_clip takes for a path
        assert (x.size, x.mean, x.std, x.interpolation) == (256, (0, 0, 0), (1, 1, 1), "bilinear")
    assert all(torch.equal(loaded.clip.state_dict()[k], v) for k, v in model.clip.state_dict().items())
    images = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)  # channels last its backward crashes on a CPU
    tokens = loaded.tokenizer(["a", "b"])
    gradients = step(loaded.train(), images, tokens, [torch.eye(2)] * 2, 1)
    assert tokens.shape == (2, 117) and all(g is not None and g.isfinite().all() for g in gradients.values())
    other = dark.open_model("ViT-S-32")
    assert (other.interpolation, other.size) == ("bicubic", 224) and other.mean[0] == pytest.approx(0.481, abs=1e-3)
    other.mean, other.std = (0.1, 0.2, 0.3), (1.0, 1.0, 2.0)
    pixels = other.pixels(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.9, 0.8, 0.35]))


def apple_names(state):
    """FastViT's layers as Apple (and the authors' checkpoint) names them: timm's checkpoint_filter_fn, inverted."""
    words = "stem patch_embed conv_kxk rbr_conv conv_scale rbr_scale identity rbr_skip final_conv conv_exp large_conv "
    words += "lkb_origin mlp convffn se.fc1 se.reduce se.fc2 se.expand layer_scale.gamma layer_scale head.fc head"
    for name, value in state.items():
        if name.startswith("visual.trunk."):
            for ours, theirs in zip(words.split()[::2], words.split()[1::2]):
                name = name.replace(ours, theirs)
            place = lambda m: f"network.{2 * int(m[1]) - (m[2] == 'downsample')}"
            name = re.sub(r"stages\.(\d)\.(downsample|blocks)", place, name)
        yield name, value


def test_weights_in_every_form_and_a_checkpoint_describes_its_model(tmp_path, capsys):
    torch.manual_seed(3)
    source = dark.open_model("demo-fastvit", context_length=20).eval()
    source.mean, source.std, source.interpolation = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic"
    state = source.clip.state_dict()
    forms = {"bare": state, "state": {"state_dict": state, "epoch": 3}, "model": {"model": state}}
    forms |= {prefix: {prefix + k: v for k, v in state.items()} for prefix in ("module.", "_orig_mod.")}
    for name, content in (forms | {"apple": {"state_dict": dict(apple_names(state))}}).items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "x.safetensors").write_bytes(save({k: v.contiguous() for k, v in state.items()}))
    dark.save_checkpoint(tmp_path / "checkpoint.pt", source, dark.Config())
    for path in tmp_path.iterdir():
        loaded = dark.open_model("demo-fastvit", str(path), 20).clip.state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in state.items()), path
    again = dark.model_from_checkpoint(dark.load_checkpoint(tmp_path / "checkpoint.pt"))
    images, tokens = torch.randint(0, 256, (2, 80, 80, 3), dtype=torch.uint8), again.tokenizer(["a", "b"])
    with torch.no_grad():
        assert all(map(torch.equal, source(images, tokens, 2)[0], again(images, tokens, 2)[0])) and not again.training
    assert dark.open_model("demo-fastvit", str(tmp_path / "checkpoint.pt")).clip.positional_embedding.shape[0] == 40
    assert "20 text positions, resized to 40" in capsys.readouterr().out


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    dark.write_atomically(path, b"old")
    child = os.fork()
    if child == 0:  # dies when all is written and nothing is renamed
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        dark.write_atomically(path, b"half of the new")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and path.read_bytes() == b"old"


# ---------------------------------------------------------------- the runs

SMALL = "--phantom-pairs 36 --batch 8 --epochs 2 --teacher-epochs 1 --warmup 2 --workers 0 --log-every 1".split()
TROUBLE = [("", 2, "No space left"), ("--data {}/x.tar", 1, "1 of 40 {}/x.tar")]  # flags, exit code, words
TROUBLE += [("--lr 1e30 --warmup 0", 1, "not finite by step scale")]
contents = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def run(out, *flags):
    dark.main([*SMALL, "--out", str(out), *map(str, flags)])
    return torch.load(out / "student.pt", weights_only=True), [json.loads(line) for line in open(out / "log.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the default path, small; teacher first."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, *run(out)


def assert_same_run(found, expected):
    """Weights and log equal to the bit, timings apart."""
    for name, value in expected[0]["state_dict"].items():
        assert torch.equal(value, found[0]["state_dict"][name]), name
    timeless = lambda log: [{k: v for k, v in record.items() if k not in ("img_s", "data_wait")} for record in log]
    assert timeless(found[1]) == timeless(expected[1])


def signalled(number, at, out, *flags):
    """A run that sends itself a signal in that step of that many -> the exit code."""
    lr_at = dark.lr_at
    signalling = lambda *now: (now[:2] == at and os.kill(os.getpid(), number), lr_at(*now))[1]
    with mock.patch.object(dark, "lr_at", signalling), pytest.raises(SystemExit) as stopped:
        run(out, *flags)
    return stopped.value.code


def test_a_run_leaves_what_it_says_and_is_not_overwritten(finished, capsys):
    out, checkpoint, log = finished
    left = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert left == {"student.pt", "log.jsonl", "curves.png", "teacher.pt", "teacher_log.jsonl"}
    assert [record["step"] for record in log] == list(range(9))  # 2 epochs of 36 pairs in batches of 8
    wanted = "step epoch loss clip diag off beta logit_scale lr grad_norm img_s data_wait".split()
    for r in log:
        assert all(math.isfinite(r[k]) for k in wanted) and r["logit_scale"] <= 100
        assert r["loss"] == pytest.approx(r["clip"] + r["diag"] + r["beta"] * r["off"], rel=1e-4)
        assert r["beta"] == pytest.approx(dark.beta_at(r["step"], 9, 2.0, -0.8))
        assert r["lr"] == pytest.approx(dark.lr_at(r["step"], 9, checkpoint["config"]["lr"], 2))
    assert checkpoint["step"] == checkpoint["steps"] == 9 and checkpoint["epoch"] == 2 and checkpoint["log"] == log
    assert checkpoint["state_dict"].keys() == student().clip.state_dict().keys()  # no teacher, no projections
    assert Image.open(out / "curves.png").size[0] > 500
    before = contents(out)  # and is not overwritten
    fails(capsys, lambda: run(out), "finished", "--resume", "--overwrite")
    for flags, words in (("--beta0 3", "--beta0 2.0 3.0"), ("--lr 0.5", "--lr 0.5"), ("--r-is-end", "--r -0.8 -0.4")):
        fails(capsys, lambda: run(out, "--resume", *flags.split()), *words.split())
    assert contents(out) == before
    assert_same_run(run(out, "--resume"), finished[1:])  # nothing left to do
    assert (out / "student.pt").read_bytes() == before["student.pt"]


def test_no_kd_needs_no_teacher_and_changed_data_are_named(tmp_path, capsys):
    out, table, flags = tmp_path / "out", tmp_path / "p.csv", "--ablation no-kd --batch 4 --epochs 1".split()
    (tmp_path / "a.png").write_bytes(png())
    table.write_text("image,caption\n" + "a.png,one\n" * 8)
    _, log = run(out, "--resume", "--data", table, *flags)
    assert "so this run begins" in capsys.readouterr().out and not (out / "teacher.pt").exists()
    assert log[-1]["off"] is None and log[-1]["loss"] == pytest.approx(log[-1]["clip"])
    table.write_text("image,caption\n" + "a.png,one\n" * 7 + "a.png,two\n")
    fails(capsys, lambda: run(out, "--resume", "--data", table, *flags), "content of --data", "8 pairs")


def test_the_teacher_is_reused_and_the_feature_row_trains_its_projections(finished, tmp_path, capsys, monkeypatch):
    steps, compared = spied(monkeypatch, dark, "lr_at"), spied(monkeypatch, F, "mse_loss")
    shutil.copy(finished[0] / "teacher.pt", tmp_path)
    run(tmp_path)
    flags = "--ablation static-feat --beta0 4 --r -0.8 --r-is-end --epochs 1 --overwrite"
    checkpoint, log = run(tmp_path, *flags.split())  # another student of the same teacher
    assert "beta 4 -> -0.8, crossing zero at epoch 0.8 of 1" in capsys.readouterr().out
    assert [total for (_, total, *_), _ in steps] == [9] * 9 + [4] * 4  # and none of the teacher's
    assert (tmp_path / "teacher.pt").read_bytes() == (finished[0] / "teacher.pt").read_bytes()
    norms = [x.norm(dim=1) for pair, _ in compared for x in pair]  # of the image and the text of both, in four steps
    assert len(norms) == 4 * 4 and all(torch.allclose(norm, torch.ones(8)) for norm in norms)
    assert log[-1]["feature"] < log[0]["feature"]
    for r in log:
        kd = r["beta"] * (r["diag"] + r["off"])  # coupled
        assert r["loss"] == pytest.approx(r["clip"] + kd + 2000 * r["feature"], rel=1e-4)
    assert [v.shape for v in checkpoint["projections"].values()] == [(128, 64), (128,)] * 2
    (tmp_path / "student.pt").unlink()
    fails(capsys, lambda: run(tmp_path, "--seed", "1"), "teacher.pt", "--seed", "42")


def test_killed_and_resumed_is_bit_identical_and_a_second_run_is_refused(finished, tmp_path, capsys):
    for at in ((2, 4), (6, 9)):  # in the teacher's only epoch; in the student's second
        code = f"import {__name__} as tests; tests.signalled(tests.signal.SIGSTOP, {at}, '{tmp_path}', '--resume')"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.DEVNULL)
        try:
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            fails(capsys, lambda: run(tmp_path, "--resume"), tmp_path, f"in use by process {process.pid}")
        finally:
            process.kill()
            process.wait()
    assert torch.load(tmp_path / "student.pt", weights_only=True)["step"] == 5
    (tmp_path / ".student.pt.1.tmp").write_bytes(b"half of a file")
    assert_same_run(run(tmp_path, "--resume"), finished[1:])
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("flags, code, words", TROUBLE)
def test_overwrite_leaves_the_old_run_until_a_checkpoint(finished, tmp_path, capsys, monkeypatch, flags, code, words):
    out = shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "x.tar").write_bytes(tar((dict(pair_members(40)) | {"0003.jpg": b""}).items()))
    if not flags:
        monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError("No space left")))
    command = f"--overwrite --ablation no-kd --epochs 1 {flags}".format(tmp_path).split()
    fails(capsys, lambda: run(out, *command), *words.format(tmp_path).split(), code=code)
    assert contents(out) == contents(finished[0])  # and no temporary file


@pytest.fixture(scope="module")
def cold(finished, tmp_path_factory):
    """A run that fills a teacher's cache -> the flags, and what it gave."""
    folder = tmp_path_factory.mktemp("cold")
    flags = ["--teacher-weights", finished[0] / "teacher.pt", "--teacher-cache", folder / "cache"]
    return flags, run(folder / "out", *flags)


def test_a_complete_cache_gives_the_same_bits_without_the_teacher(finished, cold, tmp_path, capsys, monkeypatch):
    flags, expected = cold
    assert [r["off"] for r in expected[1]] == pytest.approx([r["off"] for r in finished[2]], rel=0.05)  # fp16
    opened = spied(monkeypatch, dark, "open_model")
    assert_same_run(run(tmp_path / "warm", *flags), expected)
    assert [name for (name, *_), _ in opened] == ["demo-fastvit"]
    dark.save_checkpoint(tmp_path / "t.pt", dark.open_model(dark.DEMONSTRATION["teacher"]), dark.Config())
    for key in ("--seed 7", "--teacher demo-vit", f"--teacher-weights {tmp_path}/t.pt", "--phantom-pairs 32"):
        name = key.split()[0].removeprefix("--").replace("teacher-", "").replace("phantom-pairs", "data")
        fails(capsys, lambda: run(tmp_path / "out", *flags, *key.split()), "--teacher-cache", f"made with {name}")
    cut = shutil.copytree(flags[3], tmp_path / "cut")
    os.truncate(cut / "text.npy", 500)
    fails(capsys, lambda: run(tmp_path / "out", *flags[:3], cut), f"{cut / 'text.npy'}")


@pytest.mark.parametrize("number, code, cached", [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)])
def test_interrupted_and_resumed_is_bit_identical(finished, cold, tmp_path, capsys, number, code, cached):
    flags = [tmp_path, *["--teacher-cache", tmp_path / "cache"] * cached]
    holes = lambda: cached and np.isnan(np.load(tmp_path / "cache" / "image-1.npy")).any()
    shutil.copy(finished[0] / "teacher.pt", tmp_path)
    assert signalled(number, (6, 9), *flags) == code and holes() == cached  # in the middle of the second epoch
    text = capsys.readouterr().out
    assert "beta 2 -> -1.6, crossing zero at epoch 1.1 of 2 (Eq. 7; the authors' own run ends at -0.8" in text
    assert "--resume goes on from step 7" in text
    assert torch.load(tmp_path / "student.pt", weights_only=True)["step"] == 7
    fails(capsys, lambda: run(*flags), "step 7 of 9", "--resume")
    (tmp_path / "log.jsonl").unlink()
    if code == 130:
        (tmp_path / "log.jsonl").write_bytes(b'{"step": 0, \xff\n\n')
    assert_same_run(run(*flags, "--resume"), cold[1] if cached else finished[1:])
    assert not holes()


def test_two_processes_give_what_one_gives(cold, tmp_path, capsys):
    flags = [*map(str, cold[0][:3]), f"{tmp_path}/cache", "--device", "cpu", "--micro-batch", "3"]
    code = f"import {__name__} as tests; tests.distributed_worker(*{[str(tmp_path), *flags]})"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert dark.load_checkpoint(tmp_path / "out" / "student.pt")["step"] == 9
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 9
    for name in ("image-0.npy", "image-1.npy", "text.npy"):  # each filled by both, with what one process found
        one, two = (np.load(cache / name) for cache in (cold[0][3], tmp_path / "cache"))
        np.testing.assert_allclose(one, two, atol=2e-3)
    fails(capsys, lambda: run(tmp_path / "out", "--resume", *flags), "number of processes was 2", "is now 1")


# ---------------------------------------------------------------- evaluation


def test_validity_by_hand():
    peak = lambda *days: torch.zeros(175).index_copy(0, torch.tensor(days), torch.rand(15) + 1)  # the 15 largest
    median, edge, gap = peak(*range(50, 65)), peak(*range(0, 14), 174), peak(*range(40, 48), *range(100, 107))
    similarity = torch.stack([median, edge, gap, median, peak(*range(160, 175)), torch.zeros(175), median])
    weeks = (155 / 7) ** np.arange(4)  # the first row's age, and the WHO's percentiles of it
    low = math.exp(weeks @ (1.59317517131532, 0.29459800552433, -0.0073860372566707, 0.0000656951770216148))
    high = math.exp(weeks @ (2.50074069629423, 0.220067854715719, -0.00493623111462443, 0.0000389066000946519))
    median_hc = math.exp(weeks @ (2.09924879247164, 0.253373656106037, -0.00605647816678282, 0.0000514256072059917))
    assert dark.who_hc(155) == pytest.approx(median_hc)
    hc = [low + 0.1, 342.01, dark.who_hc(145), high + 0.1, 99.9, 100.0, low - 0.1]  # the second and fifth do not count
    score = evaluate.validity(similarity, torch.tensor(hc))
    assert (score["valid"], score["n"], score["rate"]) == (3, 5, 3 / 5)
    assert score["days"].tolist() == [155, 105, 145, 155, 265, 105, 155]  # the median of the days; ties to the younger
    with pytest.raises(ValueError):
        evaluate.validity(torch.zeros(2, 168), [200.0, 200.0])


@pytest.mark.parametrize("name", ["causal", "causal custom", "bidirectional"])
@torch.no_grad()
def test_age_similarity_is_the_direct_form_with_every_prompt_encoded_once(name, monkeypatch):
    clip, tokenizer = dark.open_model("demo-fastvit").clip, dark.open_model("demo-fastvit").tokenizer
    if name != "causal":  # open_clip's other class of text tower, which MobileCLIP2 uses without a causal mask
        text = dict(context_length=40, width=64, heads=2, layers=2, no_causal_mask=name == "bidirectional")
        clip = open_clip.CustomTextCLIP(64, dark.DEMO_MODELS["demo-fastvit"]["vision_cfg"], text)
    images, pixel_mm, templates = torch.randn(4, 3, 64, 64), [0.21, 1.004, 0.2149, 12.0], evaluate.PROMPTS["ga"][:2]
    encoded = spied(monkeypatch, clip.eval(), "encode_text")
    similarity = evaluate.ga_similarity(clip, tokenizer, images, pixel_mm, templates)
    prompts = [tuple(filter(None, row)) for (tokens,), _ in encoded for row in tokens.tolist()]
    assert len(prompts) == len({*prompts}) == 3 * 2 * 175  # 0.21 and 0.2149 are stated alike
    assert max(tokens.shape[1] for (tokens,), _ in encoded) < 35 or name == "bidirectional"  # without padding
    features = F.normalize(clip.encode_image(images), dim=-1)  # (4, D)
    again = evaluate.ga_similarity(clip, tokenizer, features, pixel_mm, templates)
    torch.testing.assert_close(again, similarity, atol=1e-5, rtol=0)
    for i, column in [(i, column) for i in range(4) for column in range(0, 175, 29)]:
        weeks, day = divmod(98 + column, 7)
        texts = [t.format(weeks=weeks, day=day, pixel_spacing=f"{pixel_mm[i]:.2f}") for t in templates]
        text = F.normalize(clip.encode_text(tokenizer(texts)), dim=-1)
        assert similarity[i, column] == pytest.approx((features[i] @ text.T).mean().item(), abs=1e-5)


@torch.no_grad()
def test_f1_class_embeddings_geometry_and_interval_by_hand():
    for kind in (list, np.array, torch.tensor, lambda labels: [*map(str, labels)]):
        predicted, actual = kind([0, 0, 1, 2, 3, 1]), kind([0, 1, 1, 1, 4, 4])  # 2 and 3 are no true label
        assert evaluate.macro_f1(predicted, actual) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
        with pytest.raises(ValueError):
            evaluate.macro_f1(predicted, kind([0, 1]))
    model = dark.open_model("demo-fastvit")
    one, two, three = F.normalize(model.clip.encode_text(model.tokenizer(["one", "a longer two", "three"])), dim=-1)
    found = evaluate.class_embeddings(model, {"a": ["one", "a longer two"], "b": ["three"]})
    torch.testing.assert_close(found, torch.stack([F.normalize(one + two, dim=-1), three]), atol=1e-6, rtol=1e-5)
    uniformity = math.log(sum(math.exp(-2 * d) for d in (4, 2, 2, 2, 2, 4)) / 6)  # of the squared distances
    found = evaluate.geometry(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]), ["x", "x", "y", "y"])
    expected = dict(effective_dimension=2, rank95=2, silhouette=-0.5, intra_cosine=-1, inter_cosine=0)
    assert found == pytest.approx({**expected, "uniformity": uniformity}, abs=1e-9)
    assert evaluate.t_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 3.182446 * math.sqrt(5 / 3) / 2), rel=1e-5)


NO_BRAIN, AGES = "Not A Brain", "{weeks} w {day} d {pixel_spacing} mm"
BRAINS = [("Fetal brain", plane) for plane in ("Trans-thalamic", "Trans-cerebellum", "Trans-ventricular", "Other")]
PARTS = [(part, NO_BRAIN) for part in ("Fetal abdomen", "Fetal femur", "Fetal thorax", "Maternal cervix", "Other")]
TABLES = {  # the published layouts
    "planes": ("FETAL_PLANES_DB_data.csv", "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"),
    "hc18": ("training_set_pixel_size_and_HC.csv", "filename,pixel size(mm),head circumference (mm)\n"),
    "chd": ("labels.csv", "video,label,patient,train\n"),
}
IPHONE, VIT = "--iphone --team T --bundle b", "--model demo-vit"
NO_PHONE = export.remote_device._DeviceCtlError(b"why", error_code=1)
strict = lambda path: json.loads(Path(path).read_text(), parse_constant=pytest.fail)  # there must be no NaN
opened = lambda path: export.ct.models.MLModel(str(path), skip_model_load=True)


def planes_of(views, trains=(1,)):
    """The rows of FETAL_PLANES_DB's table; the images are p0.png, p1.png, ..."""
    rows = enumerate((*view, train) for train in trains for view in views)
    return "\n".join(f"p{i};{i // 2};{plane};{brain};Op. 1;Aloka;{train}" for i, (plane, brain, train) in rows)


def write_layouts(folder, **tables):
    """18 images of planes, a head of 80 x 54 pixels, two videos, and the tables that are given."""
    images = {f"Images/p{i}.png": dark.phantom(1, i)[0] for i in range(18)}
    images |= {f"v{v}/frame{i}.png": Image.new("L", (40, 30), 100 * v + i) for v in (0, 1) for i in (2, 10, 9)}
    for name, image in {**images, "training_set/h.png": dark.phantom(1, 0, 80, 54)[0]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    os.truncate(shutil.copy(folder / "Images/p0.png", folder / "training_set/cut.png"), 400)  # enough for its size
    for kind, rows in tables.items():
        name, header = TABLES[kind]
        (folder / name).write_bytes(rows if isinstance(rows, bytes) else (header + rows).encode())


@pytest.fixture(scope="module")
def here(finished, tmp_path_factory):
    """The folder we are in from now on: all three data sets, a student, and what is wrong in some way."""
    folder, heads = tmp_path_factory.mktemp("here"), "h.png,0.1,200\nh.png,0.1,99\nh.png,0.11,250"
    videos = "\n".join(f"v{i % 2},{'ab'[i % 2]},{i},{int(i < 16)}" for i in range(24))
    write_layouts(folder / "good", planes=planes_of(PARTS + BRAINS, (0, 1)), hc18=heads, chd=videos)
    spoilt = {k: v * math.nan if "head.fc" in k else v for k, v in finished[1]["state_dict"].items()}
    torch.save({**finished[1], "state_dict": spoilt}, folder / "nan.pt")
    torch.save({"state_dict": {}}, folder / "foreign.pt")
    shutil.copy(finished[0] / "student.pt", folder)
    mine = {f"{task}.json": {name: [f"my {name}"] for name in evaluate.PROMPTS[task]} for task in ("planes", "brain")}
    files = {name: json.dumps(prompts).encode() for name, prompts in {**mine, "ages.json": {"ga": [AGES]}}.items()}
    files |= {"odd.json": b'{"ga": ["{weeks}"]}', "list.json": b'["a"]', "text.json": b'{"a": "b"}', "half.json": b"[1"}
    files |= {"file.mlpackage": b"", "folder.mlpackage/keep": b"", "a.png": png()}
    files |= {name: content for kind in BROKEN.values() for name, (content, _) in kind.items()}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def measured(out, flags):
    evaluate.main(f"{flags} --out {out}/results.json --workers 0".split())
    return strict(out / "results.json")


@mock.patch.multiple(evaluate, BENCHMARK_SIZE=120, BENCHMARK_HEADS=4)
def test_evaluate_on_the_phantom_with_everything(finished, tmp_path, monkeypatch, capsys):
    image, text = (spied(monkeypatch, open_clip.CLIP, f"encode_{kind}") for kind in ("image", "text"))
    autocast, out = spied(monkeypatch, torch, "autocast"), shutil.copytree(finished[0], tmp_path / "run")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    everything = "--workers 0 --plots --geometry --probe --teacher"
    evaluate.main(f"{out}/student.pt {out}/teacher.pt {everything} {out}/teacher.pt".split())
    assert not autocast and all(embeddings.dtype == torch.float32 for _, embeddings in image + text)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    (student, teacher), printed = strict(out / "results.json"), capsys.readouterr().out  # beside the first checkpoint
    assert student["name"] == f"{out}/student.pt" and evaluate.BENCHMARK_SEED >= 2**32  # which no --seed reaches
    for r in (student, teacher):
        assert 0 <= r["f1_5plane"] <= 1 and r["f1_all"] == pytest.approx((5 * r["f1_5plane"] + 3 * r["f1_3brain"]) / 8)
        assert r["avg"] == pytest.approx((r["f1_all"] + r["hc18_validity"] / 100) / 2) and 0 < r["hc18_n"] <= 4
        assert 1 < r["entropy"] <= math.log(9) and r["geometry"]["f1_3brain"]["rank95"] > 0
    assert (teacher["teacher_rank_correlation"], teacher["probe_brain_retention_percent"]) == pytest.approx((1, 100))
    assert student["params"] == sum(p.numel() for p in dark.open_model("demo-fastvit").clip.parameters())
    figures = [path.name[-11:] for path in out.glob("*.png") if Image.open(path).size[0] >= 600]
    assert sorted(figures) == ["curves.png", "student.png", "teacher.png"]  # one for each model
    assert re.search("(?s)phantom.*F1-5Plane.*hc18_valid", printed)
    assert ("spearman" in printed) == any(r["hc18_spearman"] is not None for r in (student, teacher))  # else undefined


def test_evaluate_on_published_layouts(here, tmp_path, monkeypatch, capsys):
    scored = spied(monkeypatch, evaluate, "macro_f1")
    (result,) = measured(tmp_path, "student.pt --planes good --hc18 good --split test")
    assert (result["hc18_n"], result["split"], result["benchmark"]) == (2, "test", "public")
    five, three = (sorted(actual) for (_, actual), _ in scored[-2:])  # no `Other`, nothing that was trained on
    assert five == ["abdomen", *["brain"] * 4, "cervix", "femur", "heart"] and three == sorted(dark.BRAIN_PLANES)
    (result,) = measured(tmp_path, "student.pt --planes good")
    assert not {"hc18_validity", "avg"} & {*result} and len(scored[-1][0][1]) == 6  # absent, not zero
    assert capsys.readouterr().out.splitlines()[-3].split()[-5] == "-"
    frames, probed = evaluate.chd_table("good")[0]["frames"], spied(monkeypatch, evaluate, "fit_and_score")
    assert [path.stem for path in frames] == ["frame2"] * 4 + ["frame9"] * 8 + ["frame10"] * 4
    (result,) = measured(tmp_path, "student.pt --chd good")
    assert len(probed[-1][1]) == 25 and result["chd_auroc"] > 0.95 and "f1_all" not in result
    hc18 = HERE.parent / "shared" / "hc18" / "val"  # as it is published
    assert not hc18.exists() or len(evaluate.hc18_table(hc18)) == 91
    write_layouts(tmp_path, hc18="h.png,0.1,200")
    assert measured(tmp_path, f"student.pt --hc18 {tmp_path}")[0]["hc18_spearman"] is None  # undefined; never NaN


def test_a_model_with_its_own_preprocessing(here, tmp_path, monkeypatch):
    seen, model = spied(monkeypatch, dark.Model, "pixels"), "--hc18 good --model demo-fastvit --weights student.pt"
    (own,) = measured(tmp_path, f"{model} --mean 0.5,0.4,0.3 --std 1,2,0.5 --interpolation bicubic")
    (same,), (checkpoint,) = measured(tmp_path, model), measured(tmp_path, "student.pt --hc18 good")
    assert own["name"] == same.pop("name") == "demo-fastvit student.pt" and same == {k: checkpoint[k] for k in same}
    padded = Image.new("L", (80, 80))
    padded.paste(Image.open("good/training_set/h.png"), (0, 13))
    by_hand = lambda how: torch.from_numpy(np.array(padded.resize((64, 64), how), np.float32) / 255).expand(3, 64, 64)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [1, 2, 0.5]]).view(2, 3, 1, 1)
    torch.testing.assert_close(seen[0][1][0], (by_hand(Image.Resampling.BICUBIC) - mean) / std)
    torch.testing.assert_close(seen[1][1][0], (by_hand(Image.Resampling.BILINEAR) - 0.2) / 0.2)


def test_prompts_are_the_published_classes_and_files_are_merged(here, tmp_path, monkeypatch):
    ours, classes = evaluate.PROMPTS, "abdomen brain cervix femur heart kidney lips_nose profile_patient spine"
    assert sorted(ours["planes"]) == classes.split() and [*ours["brain"]] == [*dark.BRAIN_PLANES]
    assert {len({*texts}) for texts in [*ours["planes"].values(), *ours["brain"].values(), ours["ga"]]} == {5}
    averaged, aged = (spied(monkeypatch, evaluate, name) for name in ("class_embeddings", "ga_similarity"))
    command = "student.pt --planes good --hc18 good --prompts planes.json brain.json"
    measured(tmp_path, f"{command} --spacing-size 100")
    measured(tmp_path, f"{command} ages.json")
    assert [prompts for (_, prompts), _ in averaged] == [strict("planes.json"), strict("brain.json")] * 2
    assert [arguments[4] for arguments, _ in aged] == [ours["ga"], [AGES]]  # ours remain without `ga`
    assert [arguments[3][0] for arguments, _ in aged] == pytest.approx([8 / 100, 8 / 64])  # mm per pixel


def test_seeds_are_averaged_and_epochs_drawn_where_nothing_else_differs(here, finished, tmp_path, capsys):
    runs = {"a": (42, 2.0, 2), "b": (7, 2.0, 2), "c": (123, 2.0, 2), "d": (42, 4.0, 2), "e": (7, 4.0, 1)}
    for name, (seed, beta0, epoch) in runs.items():
        config = finished[1]["config"] | dict(seed=seed, beta0=beta0, out=name, workers=3, ablation="selective")
        weights = finished[1]["state_dict"] | {"text_projection": torch.eye(64).roll(seed, 0)}
        torch.save(finished[1] | dict(epoch=epoch, config=config, state_dict=weights), tmp_path / f"{name}.pt")
    names = [str(tmp_path / f"{name}.pt") for name in runs]
    with mock.patch.object(evaluate.Figure, "savefig", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        measured(tmp_path, f"{' '.join(names)} --planes good --geometry --plots")
    *records, mean = strict(tmp_path / "results.json")  # a plot that fails loses nothing
    facts = dict(seeds=[42, 7, 123], epoch=2, ablation="selective", checkpoints=names[:3])
    assert facts == {key: mean[key] for key in mean if key not in ("name", "mean", "sd")} and len(records) == 5
    f1, silhouette = zip(*((r["f1_all"], r["geometry"]["f1_3brain"]["silhouette"]) for r in records[:3]))
    for key, scores in {"f1_all": f1, "geometry.f1_3brain.silhouette": silhouette}.items():
        assert (mean["mean"][key], mean["sd"][key]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    assert mean["sd"]["f1_all"] > 0 and not {"seed", "epoch"} & {*mean["mean"]}
    torch.save({**finished[1], "epoch": 1.0}, tmp_path / "earlier.pt")
    measured(tmp_path, f"student.pt {tmp_path}/earlier.pt --hc18 good --plots")
    assert Image.open(tmp_path / "epochs.png").size[0] >= 600  # two epochs of one run
    assert re.search(r"\nmean of 3 seeds \(42, 7, 123\) selective .* 0\.\d+ \+- 0\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize("home, flags, mm", [("made", "", 0.31), ("made/Images", "--spacing-size 100", 0.8)])
def test_written_pairs_are_what_dark_reads(tmp_path, monkeypatch, home, flags, mm):
    monkeypatch.chdir(tmp_path)
    rows, heads = planes_of([BRAINS[1], PARTS[4], BRAINS[3]], (1, 0)), f"h.png,1,{dark.who_hc(20 * 7 + 3)}\nh.png,2,300"
    write_layouts(Path("made"), planes=rows, hc18=heads)
    evaluate.main(f"--planes made --hc18 made --write-pairs {home}/pairs.csv {flags}".split())
    if home == "made":  # images below the table's folder are named relative to it
        Path("made").rename("moved")
    pairs = dark.Pairs(dark.Config(data=(str(*tmp_path.rglob("pairs.csv")),)))
    paths, _, _, texts = zip(*map(pairs.place, range(len(pairs))))
    assert [Path(path).name for path in paths] == ["p0.png", "p1.png", "p2.png", "h.png", "h.png"]  # no Train 0
    views = ("fetal brain, trans-cerebellum plane", "another view", "fetal brain", "fetal brain", "fetal brain")
    assert all(view in text for view, text in zip(views, texts)) and "weeks" not in "".join(texts[:3])
    assert "20 weeks and 3 days" in texts[3] and f"{mm:.2f} mm" in texts[3]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch malice",)


TAR, TABLE, STATE = tar(pair_members(3)), b"image,caption\na.png,one\n", student().clip.state_dict()
END, WHOLE = TAR.index(b"caption 2") + 512, saved(STATE)  # END: of the last member
FLIPPED = WHOLE[: len(WHOLE) // 2] + bytes([WHOLE[len(WHOLE) // 2] ^ 1]) + WHOLE[len(WHOLE) // 2 + 1 :]
BROKEN = {  # flag: file: its content, and words of the line that names it
    "--data": {
        "empty.tar": (b"", ""),
        "tar.gz": (gzip.compress(TAR), "gunzip"),
        "mark.tar": (TAR[:END], "end-of-archive"),
        "member.tar": (TAR[: END - 700], ""),
        "pairless.tar": (tar([("a.jpg", png()), ("b.txt", b"x")]), "no pair"),
        "table.tar": (TABLE, ".csv"),
        "double.tar": (tar([("a.jpg", png()), ("a.png", png()), ("a.txt", b"x")]), "more than one image"),
        "latin.tar": (tar([("a.jpg", png()), ("a.txt", b"\xfc")]), "utf-8"),
        "empty.csv": (b"", ""),
        "caption.csv": (b"image,text\na.png,one\n", "'caption'; its columns are ['image', 'text']"),
        "image.csv": (b"picture,title\na.png,one\n", "'image'"),
        "rows.csv": (TABLE[:14], "no rows"),
        "short.csv": (TABLE + b"a.png\n", "line 3"),
        "long.csv": (TABLE + b"a.png,one, two\n", "line 3"),
        "quote.csv": (TABLE + b'a.png,"one\n', ""),
        "utf16.csv": (TABLE.decode().encode("utf-16"), "utf-8"),
        "lost.csv": (TABLE + b"b.png,two\n", "b.png"),
    },
    "--student-weights": {
        "evil.pt": (pickle.dumps(Malicious(), 2), ""),
        "evil-zip.pt": (saved({"state_dict": Malicious()}), "safely"),
        "cut.pt": (WHOLE[:-999], ""),
        "flipped.pt": (FLIPPED, "--student-weights damaged"),
        "cut.safetensors": (save({"x": torch.zeros(99)})[:-9], ""),
        "numpy.pt": (written(lambda f: np.savez(f, x=1)), ""),
        "keys.pt": (saved({k.replace("ln_final", "extra"): v for k, v in STATE.items()}), "ln_final.weight extra"),
        "shape.pt": (saved(STATE | {"text_projection": torch.zeros(2, 2)}), "text_projection [2, 2] [64, 64]"),
    },
    "--resume --out": {
        "flipped/student.pt": (FLIPPED, "damaged"),
        "foreign/student.pt": (WHOLE, "dark-2"),
        "part/student.pt": (saved({"format": dark.FORMAT}), "architecture"),
        "evil/student.pt": (saved(Malicious()), "safely"),
    },
}
RUN = [  # mistakes: flags, and words of the one line
    *[(flags, flags) for flags in ("--bet 3", "--beta0 nan", "--tau 0", "--smooth 1", "--batch 1", "--device tpu9")],
    *[(flags, flags) for flags in ("--resume --overwrite", "--student local-dir:nowhere", "--teacher-weights keys.pt")],
    ("--teacher-weights nowhere.pt", "--teacher-weights nowhere.pt"), ("--beta0 x", "beta0 'x'"),
    ("--ablation no-kd --r-is-end", "--r-is-end --beta0"), ("--ablation x", "--ablation x no-kd r-0.4"),
    ("--data .", "directory"), ("--student ViT-L-15", "ViT-L-15 ViT-L-14"), ("--data nowhere*.tar", "nowhere*.tar"),
    ("--teacher ViT-B-16-SigLIP", "SigLIP pip install transformers"), ("--context-length 1000000", "cannot be opened"),
    ("--student-weights .", "--student-weights neither a file"), ("--data nowhere-{0..3}.tar", "nowhere-0.tar"),
    ("--data x-{0..3.tar", "x-{0..3.tar"), ("--out a.png", "--out a.png is a file"), ("--out a.png/out", "a.png"),
    ("--out " + "x" * 300, "File name too long"), ("--out /proc/1", "/proc/1"), ("--batch 37", "--batch 37 36"),
]  # fmt: skip
for flag, files in BROKEN.items():
    RUN += [(f"{flag} {name.removesuffix('/student.pt')}", f"{name} {words}") for name, (_, words) in files.items()]
BOTH = [
    *[(f"{name}.pt", f"{name}.pt") for name in ("none", "cut", "foreign")],
    *[(f"{flag} 1", f"{flag} --model") for flag in ("--weights", "--mean", "--std", "--context-length")],
    *[(f"{VIT} {flag}", flag) for flag in ("--std 0", "--std 1,0,1", "--mean nan,0,0", "--mean 1,2", "--mean a,b,c")],
    *[("--interpolation bicubic", "--interpolation --model"), (f"{VIT} --interpolation nearest", "nearest bicubic")],
    *[("--model none", "'none'"), ("--model ViT-B-16-SigLIP", "transformers"), (f"{VIT} --weights a", "--weights a")],
]
EVALUATE = [  # and the table in the folder `odd`
    *[("--hc18 odd", f"h.png {mm}", f"h.png,{mm},200") for mm in ("nan", "inf", "0.0", "-0.1", "wide")],
    *[("--hc18 odd", "h.png nan", "h.png,0.1,nan"), ("--hc18 odd", "1 rows 100 342", "h.png,0.1,99")],
    *[("--hc18 odd", "lost.png", "lost.png,0.1,200"), ("--hc18 odd", "line 3", "h.png,0.1,200\nh.png,0.1")],
    *[("--hc18 odd", "no rows", ""), ("--hc18 odd", "circumference", b"filename,pixel size(mm)\nh.png,0.1")],
    *[("--hc18 odd", "HC.csv UTF-8", '"h.png,0.1,200'), ("--hc18 odd", "HC.csv UTF-8", "h.png".encode("utf-16"))],
    *[("--planes odd", "lost.png", "lost;1;Fetal brain;;;;1"), ("--planes odd", "p0 abdomen", "p0;1;Fetal hand;;;;1")],
    *[(f"--planes odd {flags}", flags[-4:], planes_of([BRAINS[0]] * 8)) for flags in ("--geometry", "--split test")],
    *[("--planes odd --probe", "--probe brain", planes_of([*BRAINS * 2, PARTS[0]], (0, 1))), ("--batch 0", "--batch")],
    *[("--chd odd", "--chd two labels", "v0,a,1,1\nv0,a,2,0"), ("--chd odd", "--chd lost frames", "lost,a,1,1")],
    *[("--chd odd", "--chd too few", "v0,a,1,1\nv1,b,2,1\nv0,a,3,0\nv1,b,4,0"), ("--split train", "train test")],
    *[(f"--{kind} .", name) for kind, (name, _) in TABLES.items()],
    *[(f"--planes good --prompts {name}.json", f"{name}.json") for name in ("none", "half", "list", "text")],
    *[("--planes good --prompts brain.json", "abdomen"), ("--hc18 good --prompts odd.json", "{day}")],
    *[(f"--hc18 good --out {out}", f"--out {out}") for out in ("good", "cut.pt/a.json", "/proc/a.json")],
    *[("--hc18 good --write-pairs a.tsv", "a.tsv .csv"), ("--write-pairs a.csv", "a.csv --hc18")],
    *[("--hc18 good --geometry", "--geometry --planes"), ("student.pt --teacher none.pt", "none.pt")],
    *[("nan.pt --hc18 good", "nan.pt not finite"), (f"{VIT} --context-length 20 --hc18 good", "14 weeks 20 tokens")],
    *[("student.pt --hc18 odd", "cut.png decode", "cut.png,1,200"), ("--batches 8", "--batches")],
]
EXPORT = [  # and what is wrong with the phone
    *[(f"foreign.pt {VIT}", "foreign.pt demo-vit"), ("--runs 0", "--runs 0"), ("--precision int8", "int8 fp16")],
    *[(f"--out {out}", f"{out} .mlpackage") for out in ("package", "folder.mlpackage", "file.mlpackage")],
    *[(f"--out {out}/a.mlpackage", out) for out in ("foreign.pt", "/proc/dark")],
    *[(f"--labels {name}.json", f"{name}.json") for name in ("none", "list", "ages")],
    *[("--team T", "--team --iphone"), ("--iphone", "--team --bundle"), (IPHONE, "--iphone macOS")],
    *[(IPHONE, "no unlock", "gone"), (IPHONE, "Test iPhone Developer", "disabled"), (IPHONE, "why Xcode", "devicectl")],
]
MISTAKES = [(dark, *row) for row in RUN]
MISTAKES += [(script, *row) for script, own in ((evaluate, EVALUATE), (export, EXPORT)) for row in BOTH + own]


@pytest.mark.parametrize("script, flags, words, table", [(*row, "")[:4] for row in MISTAKES])
def test_mistakes_in_the_commands_get_one_line(here, monkeypatch, capsys, recwarn, script, flags, words, table):
    for kind in [kind for kind in TABLES if f"--{kind} odd" in flags]:
        write_layouts(Path("odd"), **{kind: table})
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    a_mac(monkeypatch, table)
    monkeypatch.setitem(sys.modules, "transformers", None)  # not installed
    monkeypatch.setattr(export, "convert", lambda *_, **__: pytest.fail("got as far as converting"))
    if not {"finite", "decode", "tokens"} & {*words.split()}:
        monkeypatch.setattr(evaluate, "embed_images", lambda *_: pytest.fail("the work began"))
    command = [*SMALL, "--out", "out"] * (script is dark) + flags.split()
    fails(capsys, lambda: script.main(command), *words.split())
    assert not [warning for warning in recwarn if warning.category is UserWarning]  # more lines on stderr
    # Neither a run, nor results, nor the malice of a pickle.
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_surroundings_that_are_missing_get_one_line_and_our_faults_a_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", mock.Mock(side_effect=RuntimeError("no network")))
    words = ("openai", "--teacher-weights PATH", "no network")
    fails(capsys, lambda: dark.open_model("ViT-L-14", "openai", flag="--teacher-weights"), *words)
    monkeypatch.setattr(dark, "WORLD", 2)
    fails(capsys, lambda: run(tmp_path / "out"), "WORLD_SIZE")
    fails(capsys, lambda: run(tmp_path / "out", "--batch", "9"), "--batch 9", "2 processes")
    monkeypatch.setattr(dark, "WORLD", 1)
    for error, raised in ((ZeroDivisionError, ZeroDivisionError), (KeyboardInterrupt, SystemExit)):
        monkeypatch.setattr(dark, "Pairs", mock.Mock(side_effect=error))
        with pytest.raises(raised) as stopped:  # a fault of ours keeps its traceback
            run(tmp_path / "out")
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# ---------------------------------------------------------------- export

# What the operations of a converted FastViT mean (MIL's documentation): so its graph runs where there is no Core ML.
MIL = dict(relu=torch.relu, sigmoid=torch.sigmoid, softmax=torch.softmax, add=torch.add, sub=torch.sub, mul=torch.mul)
MIL |= dict(real_div=torch.div, maximum=torch.clamp, reduce_mean=torch.mean, reshape=torch.reshape, tile=torch.tile)
MIL |= dict(reduce_l2_norm=lambda x, axes, keep_dims: x.norm(dim=axes, keepdim=keep_dims), cast=lambda x, dtype: x)
MIL |= dict(linear=F.linear, gelu=lambda x, mode: {"EXACT": F.gelu}[mode](x))
MIL["conv"] = lambda x, w, bias, step, _, pad, spread, groups: F.conv2d(x, w, bias, step, pad[::2], spread, groups)
CANNOT = {  # unknown to coremltools; known and refused; stops torch.export, in various words; cannot be written
    "demo-vit cannot converted cummax": lambda x: x.cummax(-1)[0],
    "demo-vit cannot converted linalg_inv": lambda x: torch.linalg.inv(x),
    "demo-vit cannot converted": lambda x: x if x.sum() > 0 else x * 2,
    "File exists": lambda x: x.flatten(1),
}


@torch.no_grad()
def differences(path, model, prompts):
    """Largest difference of embeddings and of probabilities from PyTorch's, not fused; and the package's operations."""
    spec, images, found = opened(path).get_spec(), (export.probe_images(64) * 255).round(), []  # (4, 3, 64, 64)
    program = load_program(spec, spec.specificationVersion, opened(path).weights_dir).functions["main"]
    read = lambda v: torch.tensor(v).float() if np.ndim(v) and v.dtype.kind == "f" else np.asarray(v).tolist()
    values = {op.name: read(op.outputs[0].val) for op in program.operations if op.op_type == "const"}
    for values["image"] in images.split(1):
        for operation in program.operations:
            if operation.op_type != "const":
                inputs = [values[var.name] for var in operation.inputs.values() if var is not None]
                values[operation.outputs[0].name] = MIL[operation.op_type](*inputs)
        found.append([values[var.name] for var in program.outputs])
    embedding, probability = map(torch.cat, zip(*found))
    expected = F.normalize(model.clip.encode_image(model.pixels(images.byte().permute(0, 2, 3, 1))), dim=-1)  # (4, D)
    likely = (20 * expected @ evaluate.class_embeddings(model, prompts).T).softmax(-1)  # (4, C)
    assert torch.pdist(expected).min() > 0.05 and likely.std(0).max() > 0.01  # the images are told apart
    assert (embedding.norm(dim=1) - 1).abs().max() < 1e-6
    return (embedding - expected).norm(dim=1).max(), (probability - likely).abs().max(), program.operations


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`python export.py CHECKPOINT --labels planes` once, onto an older package."""
    folder, model, printed = tmp_path_factory.mktemp("export"), dark.open_model("demo-fastvit"), io.StringIO()
    model.mean, model.std, model.interpolation = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3), "bicubic"
    torch.nn.init.constant_(model.clip.logit_scale, math.log(20))
    for norm in (m for m in model.clip.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)):  # far from the start
        for values, low, high in ((norm.running_mean, -0.3, 0.3), (norm.running_var, 0.2, 1), (norm.weight, 0.5, 1.5)):
            torch.nn.init.uniform_(values, low, high)
    checkpoint, out = folder / "student.pt", folder / "deep" / "Student.mlpackage"
    dark.save_checkpoint(checkpoint, model, dark.Config(beta0=2.0, r=-0.4), step=30, epoch=3)
    out.mkdir(parents=True)
    for name in ("Manifest.json", "stale"):
        (out / name).write_text("of an older package")
    with mock.patch("sys.stdout", printed):
        export.main(f"{checkpoint} --out {out} --labels planes --runs 3".split())
    return types.SimpleNamespace(out=out, checkpoint=checkpoint, model=model.eval(), printed=printed.getvalue())


def test_export_package_report_and_files(exported):
    spec, types_of = opened(exported.out).get_spec(), export.ct.proto.FeatureTypes_pb2
    assert spec.specificationVersion == 8 and spec.WhichOneof("Type") == "mlProgram"  # iOS 17
    (image,), kind = spec.description.input, spec.description.input[0].type.imageType
    assert (image.name, kind.width, kind.height, kind.colorSpace) == ("image", 64, 64, types_of.ImageFeatureType.RGB)
    outputs = {output.name: output.type.multiArrayType for output in spec.description.output}
    assert {name: [*out.shape] for name, out in outputs.items()} == {"embedding": [1, 64], "probabilities": [1, 9]}
    assert {output.dataType for output in outputs.values()} == {types_of.ArrayFeatureType.FLOAT32}
    about, user = spec.description.metadata, dict(spec.description.metadata.userDefined)
    assert about.author and about.license and about.versionString and "demo-fastvit" in about.shortDescription
    sha256 = hashlib.sha256(exported.checkpoint.read_bytes()).hexdigest()
    facts = dict(source=str(exported.checkpoint), checkpoint_sha256=sha256, epoch="3", beta0="2.0", r="-0.4")
    assert user.items() >= facts.items() and user["interpolation"] == "bicubic" in image.shortDescription
    lists, planes = [json.loads(user[key]) for key in ("mean", "std", "labels", "prompts")], evaluate.PROMPTS["planes"]
    assert lists == [[0.3, 0.4, 0.5], [0.2, 0.25, 0.3], [*planes], planes]
    result, files = strict(exported.out.with_name("export.json")), [p for p in exported.out.rglob("*") if p.is_file()]
    towers = exported.model.clip.visual, timm.utils.reparameterize_model(exported.model.clip.visual)
    before, after = (sum(p.numel() for p in tower.parameters()) for tower in towers)
    assert (result["visual_params_unfused"], result["visual_params"]) == (before, after) and after < before
    size = sum(file.stat().st_size for file in files)
    assert result["package_mb"] == size / 1e6 and 2 * after * 0.95 < size < 2 * after + 150_000  # and the program
    assert {file.name for file in files} == {"Manifest.json", "model.mlmodel", "weight.bin"}  # none of the converter's
    assert {path.name for path in exported.out.parent.iterdir()} == {"Student.mlpackage", "export.json"}
    unfused, fused = result["latency"]
    assert (unfused["runtime"], fused["runtime"]) == ("PyTorch unfused", "PyTorch fused")
    assert 0 < fused["median_ms"] <= fused["p90_ms"] and fused["device"] and fused["os"] and fused["runs"] == 3
    assert result["fused_over_unfused"] == pytest.approx(fused["median_ms"] / unfused["median_ms"])
    assert 0 < result["fuse_difference"] < 1e-9 and result["labels"] == [*evaluate.PROMPTS["planes"]]
    table = [line for line in exported.printed.splitlines() if line.startswith(("runtime", "PyTorch"))]
    assert len(table) == 3 and len({*map(len, table)}) == 1 and f"{fused['median_ms']:.4g}" in table[2]


def test_export_computes_what_pytorch_computes_with_the_fused_weights(exported, tmp_path, capsys):
    prompts, labels = {"head": ["a fetal head"], "thigh": ["a femur", "a thigh"]}, tmp_path / "labels.json"
    labels.write_text(json.dumps(prompts | {"ga": [AGES]}))
    flags = f"--out {tmp_path}/a.mlpackage --precision fp32 --labels {labels} --runs 1"
    export.main([str(exported.checkpoint), *flags.split()])
    assert capsys.readouterr().err == ""  # no chatter of the converter, no bars off a terminal
    embedding, probability, _ = differences(tmp_path / "a.mlpackage", exported.model, prompts)
    assert embedding < 1e-5 and probability < 1e-4
    embedding, probability, operations = differences(exported.out, exported.model, evaluate.PROMPTS["planes"])
    assert embedding < 2e-2 and probability < 1e-2  # what weights in fp16 cost
    fused = timm.utils.reparameterize_model(copy.deepcopy(exported.model.clip.visual).double()).trunk
    weights = {"stem_0_reparam_conv_weight": fused.stem[0].reparam_conv.weight, "head_fc_weight": fused.head.fc.weight}
    for name, weight in weights.items():
        (stored,) = [op.outputs[0].val for op in operations if name in op.name and np.ndim(op.outputs[0].val) > 1]
        assert stored.dtype == np.float16 and np.array_equal(stored, weight.detach().float().half().numpy())
    kinds = {op.op_type: op.outputs[0].dtype.__name__ for op in operations}  # of the last of each
    assert kinds.items() >= dict(conv="fp16", gelu="fp16", reduce_l2_norm="fp32", linear="fp32", softmax="fp32").items()


def test_export_of_models_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "PAPER", "demo-fastvit")  # in place of MobileCLIP2-S0, to save time
    model, about = export.open_subject(export.parse_args([])[0])
    assert (model.name, about) == ("demo-fastvit", {"source": "Random weights, for timing only"})
    Path("out/MobileFetalCLIP.mlpackage").mkdir(parents=True)
    Path("out/export.json").write_text("of the trained model")
    export.main("--model demo-vit --runs 2 --interpolation bicubic --mean 0.1,0.2,0.3 --labels brain".split())
    assert len([*Path("out").iterdir()]) == 4  # and what the trained model has stays
    assert "trained" in Path("out/export.json").read_text() and not [*Path("out/MobileFetalCLIP.mlpackage").iterdir()]
    assert "\nRandom weights, for timing only: demo-vit" in capsys.readouterr().out
    user, result = opened("out/demo-vit.mlpackage").user_defined_metadata, strict("out/demo-vit.json")
    assert (user["interpolation"], user["mean"]) == ("bicubic", "[0.1, 0.2, 0.3]") and "checkpoint_sha256" not in user
    assert [row["runtime"] for row in result["latency"]] == ["PyTorch"] and result["fused_over_unfused"] is None
    macs = {"convolutions": 64 * 128 * 3 * 8**2, "attention": 4 * 2 * 65**2 * 128}  # 65 tokens, width 128, 4 layers
    macs["matrix products"] = 4 * 65 * 12 * 128**2 + 128 * 128 + 3 * 128  # qkv, out, MLP; projection, probabilities
    assert result["gmacs_by_kind"] == pytest.approx({kind: count / 1e9 for kind, count in macs.items()})
    assert torch.backends.mha.get_fastpath_enabled()  # was switched off to count, and is on again


def tower_of(function, *layers):
    """The phone's module for any image tower; the function comes last."""
    last = type("Last", (torch.nn.Module,), {"forward": lambda self, x: function(x)})()
    clip = types.SimpleNamespace(visual=torch.nn.Sequential(*layers, last))
    return export.Phone(types.SimpleNamespace(clip=clip, mean=(0.5,) * 3, std=(0.5,) * 3), None)


@torch.no_grad()
def test_export_checks_the_fusing(capsys):
    torch.manual_seed(0)  # as timm makes it: what the images change is tiny beside the bias of the projection
    trunk = timm.create_model("fastvit_t8", num_classes=32).eval()
    images, tower, merge = export.probe_images(64), tower_of(lambda x: x, trunk), timm.utils.reparameterize_model
    before = copy.deepcopy(tower.state_dict())
    fused, change = export.fuse(tower, images)
    assert 0 < change < 1e-12 and fused.state_dict().keys() != before.keys()
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in tower.state_dict().items())
    torch.testing.assert_close(fused(images)[0], tower(images)[0], rtol=0, atol=1e-6)
    plain = tower_of(lambda x: x.flatten(1))
    assert export.fuse(plain, images) == (plain, None)
    wrong = merge(copy.deepcopy(tower).double())
    wrong.visual[0].stages[1].blocks[0].token_mixer.reparam_conv.weight.mul_(1 + 1e-5)
    with mock.patch.object(timm.utils, "reparameterize_model", return_value=wrong):
        fails(capsys, lambda: export.fuse(tower, images), "fusing")
    for weight, word in ((0.0, "look alike"), (math.nan, "not finite")):
        trunk.head.fc.weight.fill_(weight)
        fails(capsys, lambda: export.fuse(tower, images), word)


@pytest.mark.parametrize("words", CANNOT)
def test_export_keeps_the_old_package_until_the_new_one_is_complete(exported, tmp_path, monkeypatch, capsys, words):
    half = lambda package, path: os.mkdir(shutil.copytree(exported.out / "Data", path))  # of a package, then OSError
    out, model = shutil.copytree(exported.out, tmp_path / "old.mlpackage"), dark.open_model("demo-vit")
    model.clip.visual = tower_of(CANNOT[words], torch.nn.AdaptiveAvgPool2d(2)).visual
    monkeypatch.setattr(dark, "open_model", lambda *_, **__: model)
    monkeypatch.setattr(export.ct.models.MLModel, "save", half)
    fails(capsys, lambda: export.main(f"--model demo-vit --out {out}".split()), *words.split())
    assert [path.name for path in tmp_path.iterdir()] == ["old.mlpackage"]
    assert (out / "Manifest.json").read_bytes() == (exported.out / "Manifest.json").read_bytes()


def test_export_takes_towers_with_tokens_and_with_aliases():
    alias, image = torch.ops.aten.alias, torch.rand(1, 3, 32, 32)  # as in SigLIP; CoCa's towers return tokens too
    tower = tower_of(lambda x: (alias(x).mean((2, 3)), x), torch.nn.Conv2d(3, 8, 8, 8))
    torch.testing.assert_close(tower(image)[0], F.normalize(tower.visual((image - 0.5) / 0.5)[0], dim=-1))
    graph = torch.export.export(tower, (image,)).run_decompositions({}).graph
    assert graph.find_nodes(op="call_function", target=alias.default)  # else this tests nothing
    (output,) = export.convert(tower, "tokens", 32, "fp16").get_spec().description.output
    assert (output.name, [*output.type.multiArrayType.shape]) == ("embedding", [1, 8])


def a_mac(monkeypatch, state="enabled"):
    """A Mac, where there is a state of its phone -> the phone once it is prepared, and the call that prepares it."""
    monkeypatch.setattr("platform.system", lambda: "Darwin" if state else "Linux")
    prepared = types.SimpleNamespace(name="Test iPhone", os_version="18.1", session=mock.Mock())
    prepare = mock.AsyncMock(return_value=prepared)
    phone = types.SimpleNamespace(name="Test iPhone", developer_mode_state=state, prepare_for_model_debugging=prepare)
    found = {"gone": [[]], "devicectl": NO_PHONE}.get(state, [[phone]] * 2)
    if state:
        monkeypatch.setattr(export.remote_device.Device, "get_connected_devices", mock.Mock(side_effect=found))
    return prepared, prepare


def test_export_on_a_mac_with_a_phone(exported, tmp_path, monkeypatch, capsys):
    (prepared, prepare), calls = a_mac(monkeypatch), []
    base = {"CPU_ONLY": 30.0, "CPU_AND_GPU": 20.0, "CPU_AND_NE": 10.0}

    async def predict(model, device, inputs, iterations):
        described = model.get_spec().description.input[0].type.WhichOneof("Type")
        calls.append((device, described, inputs["image"], iterations))
        return types.SimpleNamespace(samples=[base[model.compute_unit.name] + i for i in range(iterations)])

    benchmarker = lambda model, device=None: mock.Mock(benchmark_predict=lambda **how: predict(model, device, **how))
    engine, plan = object.__new__(export.MLNeuralEngineComputeDevice), mock.MagicMock()
    planned = {"const": engine, "conv": engine, "gelu": engine, "softmax": "cpu", "cast": "cpu", "unknown": None}
    operations = [mock.Mock(operator_name=name, preferred_compute_device=device) for name, device in planned.items()]
    plan.model_structure.program.functions["main"].block.operations = operations
    plan.get_compute_device_usage_for_mlprogram_operation = lambda o: o if o.preferred_compute_device else None
    monkeypatch.setattr(export.perf_utils, "MLModelBenchmarker", benchmarker)
    monkeypatch.setattr(export.MLComputePlan, "load_from_path", lambda path, compute_units: plan)
    monkeypatch.setattr(export.ct.models.MLModel, "get_compiled_model_path", lambda self: "a.mlmodelc")
    monkeypatch.setattr(export.ct.models.MLModel, "predict", lambda self, inputs: {"embedding": np.zeros((1, 64))})
    call = lambda: export.main(f"{exported.checkpoint} --out {tmp_path}/a.mlpackage --runs 11 {IPHONE}".split())
    call()
    rows, (devices, kinds, images, runs) = strict(tmp_path / "export.json")["latency"][2:], zip(*calls)
    assert [row["compute_units"] for row in rows] == [*base] * 2  # of the Mac, of the phone
    pixels = exported.model.pixels(torch.from_numpy(np.array(images[0]))[None])
    difference = F.normalize(exported.model.clip.encode_image(pixels), dim=-1).abs().max().item()
    found = [(row["difference"], row["neural_engine_share"]) for row in rows[:3]]
    assert found == [(pytest.approx(difference, abs=1e-5), 0.5)] * 3  # half of what is planned and no constant
    assert rows[5].items() >= dict(device="Test iPhone", os="iOS 18.1", median_ms=15.0, p90_ms=19.0, runs=11).items()
    assert devices == (None,) * 6 + (prepared,) * 6 and runs == (export.WARM_UP, 11) * 6
    assert kinds == ("imageType",) * 6 + ("multiArrayType",) * 6  # the phone's is a twin that takes an array
    np.testing.assert_allclose(images[6][0], np.array(images[0]).transpose(2, 0, 1) / 255, atol=1e-6)
    asked = prepare.await_args.kwargs["credentials"]
    assert (asked.development_team, asked.bundle_identifier) == ("T", "b") and prepared.session.stop.called
    assert re.search(r"(?s)neural_engine_share.*Test iPhone +iOS 18.1", capsys.readouterr().out)
    prepare.side_effect = NO_PHONE  # locked, which is met after the work
    fails(capsys, call, "--iphone", "why", "unlock")
    assert len(strict(tmp_path / "export.json")["latency"]) == 5


# ---------------------------------------------------------------- the README


def test_the_commands_of_the_readme_have_flags_that_exist(capsys):
    known = {"--nproc_per_node"}
    for script in (dark, evaluate, export):
        with pytest.raises(SystemExit, match="0"):
            script.main(["--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    commands = re.findall(r"(?:dark|evaluate|export)\.py (?:.*\\\n)*.*", (HERE / "README.md").read_text())
    assert len(commands) > 5 and set(re.findall(r"--[a-z][\w-]*", "\n".join(commands))) <= known
    assert all(f"--{name.replace('_', '-')}" in known for name in vars(dark.Config()))


def test_the_snippets_of_the_readme():
    readme, losses, namespace = (HERE / "README.md").read_text(), [], {}
    equations, *snippets = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    image, text, scale, t_image, t_text, t_scale = batch = random_batch()
    S, T = (x * F.normalize(y) @ F.normalize(z).T for x, y, z in ((scale, image, text), (t_scale, t_image, t_text)))
    for s, t in ((S, T), (S.T, T.T)):
        names = dict(S=s, T=t, tau=5, t=1, clip=F.cross_entropy(s, torch.arange(7)), beta=lambda t: -1.6)
        names |= dict(softmax=lambda x: x.softmax(1), log_softmax=lambda x: x.log_softmax(1))
        exec(equations, names)
        losses.append(names["loss"])
    torch.testing.assert_close(sum(losses) / 2, dark.dark_loss(*batch, beta=-1.6)[0])
    for snippet in snippets:
        exec(snippet, namespace)
    assert math.isfinite(namespace["loss"].item())
