"""python -m pytest: the mathematics against loop-written references, and the three scripts end to end, offline."""

import copy
import dataclasses
import hashlib
import inspect
import io
import json
import math
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from PIL import Image, ImageEnhance, PngImagePlugin
from safetensors.torch import save

import dark
import evaluate
import export

torch.set_num_threads(1)  # a run takes one away, for its loader; and equal bits need equal threads
HERE = Path(dark.__file__).parent


def fails(capsys, call, *words, code=2):
    """The call must end with that exit code and one line on stderr, after any progress bar, that holds all the words."""
    capsys.readouterr()
    try:
        found = call()
    except SystemExit as stopped:  # pytest.raises would keep the frames, and in them the lock of a run
        found = stopped.code
    lines = capsys.readouterr().err.rpartition("\r")[2].strip().splitlines()
    assert (found, len(lines)) == (code, 1) and all(str(word) in lines[0] for word in words), lines


def spied(monkeypatch, owner, name):
    """(arguments, result) of every call of owner.name, in a list that grows."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append((args, real(*args))) or calls[-1][1])
    return calls


@pytest.fixture(scope="session", autouse=True)
def phantom(tmp_path_factory):
    """The demonstration's data, small, for every test: FOLDER/train-*.tar, FETAL_PLANES_DB, HC18."""
    dark.PHANTOM = tmp_path_factory.mktemp("data") / "phantom"
    subprocess.run([sys.executable, HERE / "assets/phantom.py", dark.PHANTOM, "--pairs", "24"], check=True)
    return dark.PHANTOM


# ---------------------------------------------------------------- the loss

WEIGHTS = [(2, 1, 1, 5, 0), (0.3, 0.3, 1, 5, 0.1), (0, 0, 1, 5, 0), (-0.8, 1, 0.3, 1, 0), (-1.6, 2, 0, 5, 0)]
# Of Table 3: diag at the start and at the end, off at the start and at the end, and that end with --r-is-end.
ROWS = {"no-kd": (0, 0, 0, 0, 0), "static": (1, 1, 1, 1, 1), "static-feat": (1, 1, 1, 1, 1)}
ROWS |= {"full-decay": (1, 0, 1, 0, 0), "decay": (1, 0.1, 1, 0.1, 0.1), "conf-penalty": (1, 0.1, 1, 0.1, 0.1)}
ROWS |= {"coupled": (1, -0.8, 1, -0.8, -0.8), "selective": (1, 1, 2, -1.6, -0.8), "beta4": (1, 1, 4, -3.2, -0.8)}
ROWS |= {"beta8": (1, 1, 8, -6.4, -0.8), "r-0.5": (1, 1, 2, -1, -0.5), "r-0.4": (1, 1, 2, -0.8, -0.4)}


def random_batch(n=7, d=5, d_t=9):
    g = torch.Generator().manual_seed(0)
    image, text, t_image, t_text = (torch.randn(n, k, generator=g, dtype=torch.float64) for k in (d, d, d_t, d_t))
    batch = [image, text, torch.tensor(12.0).double(), t_image, t_text, torch.tensor(40.0).double()]
    return [x.requires_grad_() for x in batch]


def reference(image, text, scale, t_image, t_text, t_scale, beta, diag, clip, tau, smooth):
    n, unit, parts = len(image), lambda x: x / x.norm(), {"clip": 0, "diag": 0, "off": 0}
    for rows, cols, t_rows, t_cols in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        for i in range(n):
            s = [scale * unit(rows[i]) @ unit(cols[j]) for j in range(n)]
            t = [(t_scale / tau * unit(t_rows[i]) @ unit(t_cols[j])).exp().item() for j in range(n)]
            for j in range(n):
                log_q, p = s[j] - sum(x.exp() for x in s).log(), (1 - smooth) * t[j] / sum(t) + smooth / n
                parts["diag" if i == j else "off"] -= p * log_q / (2 * n)
                parts["clip"] -= (i == j) * log_q / (2 * n)
    return clip * parts["clip"] + diag * parts["diag"] + beta * parts["off"], parts


@pytest.mark.parametrize("weights", WEIGHTS)  # where beta equals diag: Eq. 4
def test_loss_and_gradient_equal_the_loops(weights):
    batch, weights = random_batch(), dict(zip(("beta", "diag", "clip", "tau", "smooth"), weights))
    (loss, parts), (expected, expected_parts) = dark.dark_loss(*batch, **weights), reference(*batch, **weights)
    torch.testing.assert_close((loss, parts), (expected, expected_parts))
    gradient, expected_gradient = (torch.autograd.grad(x, batch[:3], retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.autograd.grad(loss, batch[3:], allow_unused=True) == (None,) * 3  # the teacher learns nothing
    namespace = {"torch": torch, "F": F}
    exec(inspect.getsource(dark.dark_loss), namespace)  # it lifts out of the file
    assert torch.equal(namespace["dark_loss"](*batch, **weights)[0], loss)


def test_precision():
    batch = [x.detach() for x in random_batch(n=256, d=64, d_t=96)]
    batch[1], batch[4] = batch[0] + 0.1 * batch[1], batch[3] + 0.1 * batch[4]  # well aligned, teacher confident
    batch[2] = batch[5] = torch.tensor(100.0).double()
    exact, single = dark.dark_loss(*batch, beta=-1.6)[1]["off"], [x.float() for x in batch]
    loss, parts = dark.dark_loss(*single, beta=-1.6)
    assert abs(parts["off"] / exact - 1) < 1e-4 and exact < 0.01  # though the off-diagonal nearly vanishes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dark.dark_loss(*single, beta=-1.6)[0], loss)
        assert dark.dark_loss(*[x.bfloat16() for x in batch], beta=-1.6)[0].dtype == torch.float32


def test_schedules_and_ablation_rows():
    for step, beta in ((0, 2.0), (50, 0.2), (100 / 1.8, 0), (100, -1.6)):  # zero at T / (1 - r)
        assert dark.beta_at(step, 100, 2.0, -0.8) == pytest.approx(beta, abs=1e-12)
    for step, lr in ((0, 1 / 500), (499, 1), (500, 1), (750, 0.5), (999, 1e-5)):
        assert dark.lr_at(step, 1000, 1.0, 500) == pytest.approx(lr, abs=1e-5)

    def weights(*flags):
        cfg = dark.parse_args(flags)
        beta = [dark.beta_at(step, 10, cfg.beta0, cfg.r) for step in (0, 10)]
        return [*(beta if cfg.coupled else [cfg.diag] * 2), *beta]

    assert set(ROWS) == set(dark.ABLATIONS)
    for name, (*expected, end) in ROWS.items():
        assert weights("--ablation", name) == pytest.approx(expected), name
        if name != "no-kd":  # a mistake, below
            assert weights("--ablation", name, "--r-is-end")[2:] == pytest.approx([expected[2], end]), name


def test_flag_wins_over_ablation_over_demonstration_over_default(capsys):
    parse = lambda words: dark.parse_args(words.split())
    assert parse("--ablation conf-penalty").smooth == 0.1 and parse("--ablation static-feat").feature == 2000
    assert parse("--ablation beta4").beta0 == 4 and parse("--ablation beta4 --beta0 3").beta0 == 3
    small, paper = parse("--batch 16"), parse("--data x.tar --teacher-weights y.pt --epochs 3")
    assert (small.student, small.batch, small.lr) == ("demo-fastvit", 16, dark.DEMONSTRATION["lr"])
    assert (paper.student, paper.batch, paper.lr, paper.tau, paper.epochs) == ("MobileCLIP2-S0", 1024, 1e-5, 5, 3)
    assert not parse("--r-is-end").r_is_end  # once it is read, r has one meaning, in a checkpoint too
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    told = "".join(capsys.readouterr().out.split())  # as its lines are broken anywhere
    for name, value in dark.DEMONSTRATION.items():
        assert f"[{getattr(dark.Config(), name)};demonstration:{value}]" in told, name


# ---------------------------------------------------------------- data, models, the step

student = cache(lambda: dark.open_model("demo-vit"))
png = lambda grey=9, kind="PNG", **how: written(lambda file: Image.new("L", (40, 40), grey).save(file, kind, **how))
of_torch = lambda content: written(lambda file: torch.save(content, file))


def written(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def tar(members):
    """Of (name, content); content None is a hard link."""
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content or b""), tarfile.REGTYPE if content else tarfile.LNKTYPE
            archive.addfile(info, io.BytesIO(content or b""))
    return archive.fileobj.getvalue()


def pair_members(n, first=0, broken=()):
    images = {i: b"no image" if i in broken else png(i) for i in range(first, first + n)}
    return [x for i in images for x in ((f"{i:04d}.png", images[i]), (f"{i:04d}.txt", b"caption %d" % i))]


def test_tars_and_tables_of_pairs(tmp_path, monkeypatch, capsys):
    def look(source):
        pairs = dark.find_pairs([str(tmp_path / source)])
        views = [dark.Pairs(pairs, 0, [student()])[0, i][0][0].float() for i in range(len(pairs))]
        return [(round(x.mean().item()), caption) for x, (*_, caption) in zip(views, pairs)]  # grey value, caption

    monkeypatch.setattr(dark, "augment", lambda image, key: image)
    members = [("b/1.png", png(200)), ("b/1.txt", b"in a folder"), ("a.seg.png", png()), ("._a.txt", b"x")]
    members += [("a.txt", "\ufeffümlaut\n".encode()), ("alone.webp", png(kind="WEBP")), ("a.jpeg", png(5, "JPEG"))]
    members += [("link.png", None), ("link.txt", b"x"), ("e.PNG", png(30)), ("e.txt", b" ")]
    (tmp_path / os.fsdecode(b"\xff.tar")).write_bytes(tar(members) + tar(pair_members(1)))  # a name of no UTF-8
    assert look("*.tar") == [(200, "in a folder"), (5, "ümlaut"), (30, "")]
    told = capsys.readouterr().out.splitlines()[0]  # pairs, empty captions, and for each reason what is left out
    assert re.findall(r"\d+", told) == list("311111") and "without a txt" in told and "behind the end mark" in told
    (tmp_path / "sub").mkdir()
    files = {"sub/a.png": png(10), "b.png": png(20)}
    files |= {f"sub/s-{k:03d}.tar": tar(pair_members(4, 4 * k)) for k in range(3)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for pattern in ("sub/s-{000..002}.tar", "sub/s-*.tar", "**/s-*.tar"):
        assert look(pattern) == [(i, f"caption {i}") for i in range(12)]
    for text in (  # the separator is the one that gives the columns, whatever the name says
        '\ufeffimage,caption\nsub/a.png,"one, two"\n{}/b.png,"three\nfour"\n',
        'title, more,filepath \r\n"one, two",,sub/a.png\r\n"three\nfour",x,b.png\r\n',
        'image;caption\nsub/a.png;one, two\n\nb.png;"three\nfour"\n',
        'caption\timage\none, two\tsub/a.png\n"three\nfour"\tb.png\n',
    ):
        (tmp_path / "p.csv").write_bytes(text.format(tmp_path).encode())
        assert look("p.csv") == [(10, "one, two"), (20, "three\nfour")], text
    (tmp_path / "q.tsv").write_text('filepath\ttitle\nb.png\t"quoted" is the first word\nb.png\t"\n')
    assert look("q.tsv") == [(20, '"quoted" is the first word'), (20, '"')]


def test_captions_are_counted_as_the_model_reads_them(capsys):
    most = student().tokenizer.context_length - 2  # words, between the marks of start and end
    dark.tokenize(student(), ["a " * most, "a " * most + "cut", "a " * most + "also cut", "Alike", "alike", "", ""])
    assert "2 captions are cut off, 4 repeat others" in capsys.readouterr().out


def test_epochs_are_exact_no_pair_meets_itself_and_processes_share_a_batch():
    assert inspect.isgenerator(dark.batches(10, 4, range(6), 3))  # in the paper's run a list is five million tuples
    stream = list(dark.batches(10, 4, range(6), 3))
    orders = [[i for step in stream for e, i in step if e == epoch] for epoch in range(6)]
    assert all(len(order) == len({*order}) == 8 for order in orders) and orders[0] != orders[1]  # two are dropped
    assert [len(step) for step in stream] == [4] * 12 and {i for order in orders for i in order} == {*range(10)}
    assert list(dark.batches(10, 4, range(2, 6), 3)) == stream[4:] and list(dark.batches(10, 4, range(6), 4)) != stream
    halves = [list(dark.batches(10, 4, range(6), 3, process, 2)) for process in range(2)]
    assert [a + b for a, b in zip(*halves)] == stream and len(halves[0][0]) == 2


def test_views_depend_on_seed_epoch_and_index_are_one_for_all_models_and_bounded(phantom, monkeypatch):
    small, large, views = student(), dark.open_model("demo-vit"), []
    large.size *= 2
    pairs = dark.find_pairs([f"{phantom}/train-*.tar"])[:1] * 4  # one image, under four numbers
    view = lambda epoch, index, seed=42: dark.Pairs(pairs, seed, [small, large])[epoch, index][0]
    first, larger = view(2, 3)
    assert first.shape == (small.size, small.size, 3) and torch.equal(view(2, 3)[0], first)
    shrunk = F.avg_pool2d(larger.permute(2, 0, 1).float(), 2).permute(1, 2, 0)
    difference = lambda x: (x - shrunk).abs().mean()
    assert all(difference(first) < 0.6 * difference(x[0]) for x in (view(1, 3), view(2, 2), view(2, 3, seed=7)))
    rotate = lambda image, angle, how, translate: views.append([angle, *translate]) or image
    monkeypatch.setattr(Image.Image, "rotate", rotate)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        monkeypatch.setattr(kind, "enhance", lambda self, factor: views[-1].append(factor - 1) or self.image)
    for key in range(1000):
        dark.augment(Image.new("RGB", (20, 20)), [key, 0, 0])
    extremes = np.array([np.min(views, 0), np.max(views, 0)]) / [7, 1, 1, 0.15, 0.15, 0.15]  # 5 % of 20 pixels are 1
    assert (abs(extremes) <= 1).all() and (extremes * [[-1], [1]] > 0.97).all()


def test_square_takes_every_mode_pads_turns_and_forgives_broken_metadata():
    square = lambda image, size=40: np.asarray(dark.square(image, size, "bilinear"))
    for mode in "1 L LA P PA RGB RGBA CMYK YCbCr HSV LAB".split():
        white = Image.new("L" if mode in ("LA", "PA") else "RGB", (9, 9), "white").convert(mode)
        assert white.mode == mode and square(white).shape == (40, 40, 3) and square(white).min() > 250, mode
    for kind, top in (("<u2", 255), ("<u2", 4095), (">u2", 65535), ("<i4", 4095), ("<f4", 1)):
        deep = Image.fromarray((np.tile(np.arange(256), (256, 1)) / 255 * top).astype(kind))  # I;16, I;16B, I, F
        assert np.abs(square(deep, 256)[0].T - np.arange(256.0)).max() <= 1, (kind, top)
    assert square(Image.new("L", (80, 40), 255), 80)[:, 40, 0].tolist() == [0] * 20 + [255] * 40 + [0] * 20
    stripe, exif, broken = Image.new("L", (40, 20), 10), Image.Exif(), PngImagePlugin.PngInfo()
    stripe.paste(200, (0, 0, 8, 20))
    exif[0x0112] = 6  # the camera was upright: to be turned by 90 degrees clockwise
    turned = square(Image.open(io.BytesIO(written(lambda file: stripe.save(file, "PNG", exif=exif)))))
    assert turned[[3, 36], 20].tolist() == [[200] * 3, [10] * 3]
    broken.add_text("Raw profile type exif", "\nexif\n 3\nzz")
    assert (square(Image.open(io.BytesIO(png(77, pnginfo=broken)))) == 77).all()


def test_the_paper_student_and_preprocessing(tmp_path, monkeypatch, capsys):
    model = dark.open_model("MobileCLIP2-S0", context_length=117)
    millions = lambda module: round(sum(p.numel() for p in module.parameters()) / 1e6, 2)
    assert (millions(model.clip.visual), millions(model.clip)) == (11.41, 74.86)
    state = {k.removeprefix("text."): v for k, v in model.clip.state_dict().items()}  # a plain CLIP's names
    torch.save(state, tmp_path / "s0.pt")
    loaded = dark.open_model("MobileCLIP2-S0", str(tmp_path / "s0.pt"), 117)
    for x in (model, loaded):  # not OpenAI's, which open_clip takes for a path
        assert (x.size, x.mean, x.std, x.interpolation) == (256, (0, 0, 0), (1, 1, 1), "bilinear")
    assert all(torch.equal(loaded.clip.state_dict()[k], v) for k, v in model.clip.state_dict().items())
    assert loaded.tokenizer(["a"]).shape == (1, 117)
    model.mean, model.std = (0.1, 0.2, 0.3), (1.0, 1.0, 2.0)
    torch.testing.assert_close(model.normalize(torch.ones(1, 3, 2, 2))[0, :, 0, 0], torch.tensor([0.9, 0.8, 0.35]))
    monkeypatch.setattr(dark.open_clip, "create_model", mock.Mock(side_effect=ValueError("reached")))
    for name in ("ViT-L-14-quickgelu openai", "ViT-L-14 laion400m_e31"):  # each with its own activation
        fails(capsys, lambda: dark.open_model(*name.split()), "reached")


def test_weights_in_every_form_and_a_checkpoint_describes_its_model(tmp_path):
    torch.manual_seed(3)
    source = dark.open_model("demo-fastvit", context_length=20).eval()
    source.mean, source.std, source.interpolation = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear"
    state, numbers = source.clip.state_dict(), {"epoch": np.int64(3), "loss": np.float64(0.5), "best": np.float32(1)}
    keys = {"model": "model.", "state_dict": "module.", "model_state_dict": "", "module": "_orig_mod.module."}
    forms = {key: numbers | {key: {prefix + k: v for k, v in state.items()}} for key, prefix in keys.items()}
    stem = {"trunk.stem.": "trunk.patch_embed.", "conv_kxk": "rbr_conv", "head.fc": "head"}  # Apple's names for it
    forms |= {"apple": {re.sub("|".join(stem), lambda found: stem[found[0]], k): v for k, v in state.items()}}
    for name, content in forms.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "safetensors.bin").write_bytes(save({k: v.contiguous() for k, v in state.items()}))
    dark.save(dark.Config(out=str(tmp_path)), source, 8, epoch=3, log=[], projections={}, optimizer={})
    checkpoint = str(tmp_path / "student.pt")
    for path in map(str, [*tmp_path.glob("*.pt"), *tmp_path.glob("*.bin")]):
        loaded = dark.open_model("demo-fastvit", path, 20)
        assert all(torch.equal(value, loaded.clip.state_dict()[name]) for name, value in state.items()), path
        assert (loaded.mean == source.mean) == (path == checkpoint), path
    again = dark.model_from_checkpoint(dark.load_checkpoint(checkpoint))
    assert vars(again).items() >= {key: getattr(source, key) for key in dark.PREPROCESS}.items() and not again.training
    assert all(map(torch.equal, again.clip.state_dict().values(), state.values()))
    longer = dark.open_model("demo-fastvit", checkpoint).clip.positional_embedding  # resized
    assert again.tokenizer.context_length == 20 < len(longer)


def test_backward_keeps_two_matrices_of_the_loss_and_few_activations():
    def kept(call):
        tensors = []  # themselves, so that no address comes twice
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            call()
        return [*{x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()]

    batch = [x.detach().float().requires_grad_() for x in random_batch(n=64, d=8)]
    assert kept(lambda: dark.dark_loss(*batch, beta=-1.0)).count(4 * 64 * 64) == 2  # the logits, the teacher's p
    pixels = torch.zeros(32, student().size, student().size, 3, dtype=torch.uint8)
    whole, few = (sum(kept(lambda: student()(pixels, student().tokenizer(["a"] * 32), n))) for n in (32, 4))
    assert few < whole / 10


def test_optimizer_decays_matrices_only():
    model = dark.open_model("demo-fastvit")
    groups = dark.make_optimizer(dark.Config(), [*model.parameters()]).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0]
    assert all((group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6) for group in groups)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = (" ".join(names.pop(id(p)) for p in group["params"]) for group in groups)
    assert not names and "token_embedding.weight" in decayed and "bias" not in decayed and "logit_scale" in free
    assert "ln_final.weight" in free and "gamma" in free  # FastViT's layer scales, shaped (C, 1, 1)


# ---------------------------------------------------------------- the runs

SMALL = "--student demo-vit --batch 8 --epochs 2 --warmup 2 --lr 1e-4 --workers 0 --log-every 1 --device cpu".split()
REAL = ["--teacher", "demo-teacher", "--teacher-weights", str(HERE / dark.TEACHER), "--tau", "1", "--data"]
contents = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
log_of = lambda out: [json.loads(line) for line in open(Path(out, "log.jsonl"))]
# Up to fp32 rounding: plain accumulation, or a gather without gradient, is off by percents.
same = lambda log: [pytest.approx(record, rel=2e-4) for record in log]


def run(out, *flags):
    dark.main([*SMALL, "--out", str(out), *map(str, flags)])
    return torch.load(Path(out, "student.pt"), weights_only=True), log_of(out)


def forked(errors, owner, name, call, action, *flags):
    """A run in a process of its own, with stderr in the file `errors` and action() before that call of owner.name."""

    def child():
        sys.stderr, real, count = open(errors, "w", buffering=1), getattr(owner, name), iter(range(999))
        setattr(owner, name, lambda *args: (next(count) == call and action(), real(*args))[1])
        dark.main([*SMALL, *map(str, flags)])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert multiprocessing.connection.wait([process.sentinel], 60), "it, or a loader, is left"  # all hold it open
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, *run(out)


def test_a_run_leaves_what_it_says_and_is_not_overwritten(finished, capsys):
    out, checkpoint, log = finished
    assert set(contents(out)) == {"student.pt", "log.jsonl", "curves.png"} and Image.open(out / "curves.png")
    assert [record["step"] for record in log] == list(range(6))  # 2 epochs of 24 pairs in batches of 8
    for r in log:
        assert all(map(math.isfinite, r.values())) and r["grad_norm"] > 0 == r["bad"] and 0 <= r["repeated"] < 1
        assert r["loss"] == pytest.approx(r["clip"] + r["diag"] + r["beta"] * r["off"], rel=1e-4)
        now = dark.beta_at(r["step"], 6, 2.0, -0.8), dark.lr_at(r["step"], 6, 1e-4, 2)
        assert (r["beta"], r["lr"]) == pytest.approx(now)
    assert (checkpoint["epoch"], checkpoint["log"], checkpoint["format"]) == (2, log, dark.FORMAT)
    assert checkpoint["state_dict"].keys() == student().clip.state_dict().keys()  # no teacher, no projections
    assert str(HERE) not in str(checkpoint["config"])  # so that a clone may be moved
    before, cfg = contents(out), dark.parse_args([*SMALL, "--out", str(out), "--resume"])
    fails(capsys, lambda: run(out), "--resume", "--overwrite")
    fails(capsys, lambda: run(out, "--resume", "--beta0", "3"), "beta0 was 2.0, is 3.0")
    with mock.patch.multiple(dark, WORLD=2, RANK=1):  # whose mistakes are told as well
        fails(capsys, lambda: dark.open_run(cfg, 25), "process 1: ", "pairs was 24, is 25", "processes was 1, is 2")
    run(out, "--resume", "--workers", "1")  # nothing is left to do
    assert contents(out) == before
    told = capsys.readouterr().out
    for model in (student(), dark.open_model(dark.DEMONSTRATION["teacher"])):
        assert re.search(f"{model.name}, .*: {model.size} px, mean .*{model.mean[0]}.*{model.interpolation}", told)
    assert "24 pairs" in told and "random weights" in told and "2 epochs of 3 steps; beta 2 -> -1.6" in told


def test_no_kd_of_a_model_in_a_folder_without_locks_and_the_bound_of_the_scale(wrong, phantom, tmp_path, capsys):
    model = dark.open_model(f"local-dir:{wrong}/folder")
    model.clip.logit_scale.data.fill_(math.log(500))
    torch.save(model.clip.state_dict(), tmp_path / "hot.pt")
    flags = ["--ablation", "no-kd", "--student", model.name, "--student-weights", tmp_path / "hot.pt"]
    with mock.patch.object(dark.fcntl, "flock", side_effect=OSError(38, "Function not implemented")):
        checkpoint, log = run(tmp_path / "out", *flags, "--data", f"{phantom}/train-*.tar")
    told = capsys.readouterr().out
    assert "not protected" in told and "teacher" not in told and not {"diag", "off"} & log[0].keys()
    assert log[0]["scale"] == pytest.approx(500) and all(99 < record["scale"] <= 100 for record in log[1:])
    assert all(record["loss"] == record["clip"] for record in log)
    assert "mean [0.2, " in told and dark.model_from_checkpoint(checkpoint).interpolation == "bilinear"


def test_killed_while_writing_and_resumed_is_bit_identical_and_one_run_at_a_time(finished, tmp_path, capsys):
    kill, flags = lambda: os.kill(os.getpid(), signal.SIGKILL), ["--out", tmp_path, "--resume"]  # begins: nothing there
    assert forked(tmp_path / "errors", os, "replace", 3, kill, *flags) == -signal.SIGKILL  # the second checkpoint
    assert list(tmp_path.glob(".*.tmp")) and dark.load_checkpoint(tmp_path / "student.pt")["epoch"] == 1
    held, _ = dark.open_run(dark.parse_args([*SMALL, *map(str, flags)]), 24)
    fails(capsys, lambda: run(tmp_path, "--resume"), tmp_path, "in use by another run")
    held.close()
    checkpoint, log = run(tmp_path, "--resume")
    assert log == finished[2] and not list(tmp_path.glob(".*.tmp"))
    assert all(torch.equal(v, checkpoint["state_dict"][k]) for k, v in finished[1]["state_dict"].items())


TROUBLE = [  # what happens, before which function's second call; flags, exit code, the last line's words
    ("lr_at", lambda: os.kill(os.getpid(), signal.SIGTERM), "", 130, "interrupted"),
    ("lr_at", mock.Mock(side_effect=RuntimeError("out of shared memory")), "", 1, "--workers 0"),
    ("lr_at", mock.Mock(side_effect=ZeroDivisionError), "", 1, "ZeroDivisionError"),  # ours: with its traceback
    ("write_atomically", mock.Mock(side_effect=OSError(28, "No space left")), "", 1, "No space left"),
    ("lr_at", mock.Mock(), "--lr 1e30 --warmup 0", 1, "not finite by step"),
    ("lr_at", mock.Mock(), "--batch 50 --data {}/x.tar", 1, "2 images"),
]


@pytest.mark.parametrize("name, action, flags, code, words", TROUBLE)
def test_what_ends_a_run_ends_its_loaders_and_leaves_the_old_run(finished, tmp_path, name, action, flags, code, words):
    (tmp_path / "x.tar").write_bytes(tar(pair_members(150, broken=(7, 99))))
    out = shutil.copytree(finished[0], tmp_path / "out")
    flags = f"--out {out} --overwrite --ablation no-kd --epochs 1 --workers 2 {flags.format(tmp_path)}".split()
    assert forked(tmp_path / "errors", dark, name, 1, action, *flags) == code
    lines = (tmp_path / "errors").read_text().splitlines()
    assert words in lines[-1] and (len(lines) == 1 or "Zero" in words), lines
    assert (out / "student.pt").read_bytes() == (finished[0] / "student.pt").read_bytes()


def test_ctrl_c_without_docstrings(phantom, tmp_path):
    command = [sys.executable, "-OO", HERE / "dark.py", *SMALL, *REAL, f"{phantom}/train-*.tar"]
    command += ["--out", tmp_path / "out", "--epochs", "1000", "--workers", "1"]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    process = subprocess.Popen(command, env=os.environ | dict(RANK="", WORLD_SIZE="", PYTHONUNBUFFERED="1"), **how)
    assert any(line.startswith(b"epoch 1.0/") for line in process.stdout), process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loader as well
    _, errors = process.communicate(timeout=60)  # until nobody holds stderr
    assert (process.returncode, errors) == (130, b"interrupted\n")


def two_processes(folder, phantom):
    torch.set_num_threads(1)
    dark.PHANTOM, init, rank = Path(folder, "phantom"), torch.distributed.init_process_group, int(os.environ["RANK"])
    subprocess.run = lambda words, check: shutil.copytree(phantom, words[-1])  # fails if both draw
    runs = {"plain": [], "feature": ["--ablation", "static-feat", "--micro-batch", "3"]}
    for name, flags in (runs | {"broken": [*REAL, f"{folder}/broken.tar"]}).items():
        dark.main([*SMALL, "--out", f"{folder}/{name}", *flags])
        how = dict(backend="gloo", init_method=f"file://{folder}/after-{name}", rank=rank, world_size=2)
        torch.distributed.init_process_group = lambda: init(**how)  # torchrun's own is for one use


def test_micro_batches_and_two_processes_give_what_one_gives(finished, phantom, tmp_path, capsys):
    assert run(tmp_path / "micro", "--micro-batch", "3")[1] == same(finished[2])
    assert len(re.findall(r"^epoch .*loss", capsys.readouterr().out, re.MULTILINE)) == 6  # off a terminal
    checkpoint, log = run(tmp_path / "one", "--ablation", "static-feat")
    for r in log:
        kd = r["beta"] * (r["diag"] + r["off"])  # coupled
        assert r["loss"] == pytest.approx(r["clip"] + kd + 2000 * r["feature"], rel=1e-4)
        assert 0 < r["feature"] < 2 * 4 / len(checkpoint["projections"]["0.bias"])  # of units, the mean over D_t
    assert log[-1]["feature"] < log[0]["feature"] and len(checkpoint["projections"]) == 4
    index = list(dark.batches(24, 8, [0], 42, 1, 2))[0][0][1]  # in the share of the second
    (tmp_path / "broken.tar").write_bytes(tar(pair_members(24, broken=[index])))
    code = f"import {__name__} as tests; tests.two_processes({str(tmp_path)!r}, {str(phantom)!r})"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    command += [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and all(f"process {rank}: 1 images" in done.stderr for rank in (0, 1)), done.stderr
    assert (log_of(tmp_path / "plain"), log_of(tmp_path / "feature")) == (same(finished[2]), same(log))


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder, one, three = tmp_path_factory.mktemp("wrong"), [*pair_members(1)], tar(pair_members(3))
    other, script = of_torch({"logit_scale": torch.zeros(99)}), torch.jit.script(torch.nn.Linear(1, 1))
    files = {"html.pt": b"\n<!DOCTYPE html>", "lfs.pt": b"version https://git-lfs.github.com/spec/v1", "empty.pt": b""}
    files |= {"code.pt": of_torch(Path("x")), "script.pt": written(lambda file: torch.jit.save(script, file))}
    files |= {"cut.pt": other[:-99], "bit.pt": other.replace(bytes(396), b"1" + bytes(395)), "student.pt": other}
    files |= {"other.pt": other, "cut.bin": save({"x": torch.zeros(99)})[:-9], "cut.tar": three[: three.index(b"2.t")]}
    files |= {"latin1.tar": tar([*one, ("x.png", png()), ("x.txt", b"\xfc")]), "empty.csv": b""}
    files |= {"dup.tar": tar([*one, ("0000.jpg", png())]), "none.tar": tar([("a.png", png()), ("b.txt", b"b")])}
    tables = {"ragged": "a,b\na,b,c\n", "latin1": "a,\xfc\n", "absent": "no.png,a\nno.png,b\nnone.png,c\n", "rows": ""}
    files |= {f"{name}.csv": f"image,caption\n{rows}".encode("latin1") for name, rows in tables.items()}
    files |= {"header.csv": b"image,title\na,b\n"}
    model = json.loads((HERE / "assets/models/demo-vit.json").read_text())
    for name, size in (("folder", model["vision_cfg"]["image_size"]), ("wide", [32, 64])):  # models, as open_clip's
        (folder / name).mkdir()
        model["vision_cfg"]["image_size"] = size
        content = dict(model_cfg=model, preprocess_cfg=dict(mean=[0.2] * 3, std=[0.3] * 3, interpolation="bilinear"))
        files |= {f"{name}/open_clip_config.json": json.dumps(content).encode()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


NAMED = ["--bogus 1", "--beta0 nan", "--batch 1", "--lr 0", "--clip-norm 0", "--smooth 1", "--device cuda:99"]
MISTAKES = {flags: flags for flags in NAMED} | {"--epochs many": "--epochs", "--teacher=": "--teacher"}
MISTAKES |= {"--ablation nope": "selective", "--ablation no-kd --r-is-end": "--r-is-end", "--batch 25": "24"}
MISTAKES |= {"--resume --overwrite": "--resume", "--warmup 6": "at most 5", "--data {}/x.tar": "no-kd"}
MISTAKES |= {"--student demo-vitt": "demo-vit", "--student RN50 --student-weights nope": "nope|cc12m"}
MISTAKES |= {"--student local-dir:{}/wide": "64 x 32", "--teacher ViT-L-14 --teacher-weights openai": "-quickgelu"}
MISTAKES |= {"--out {}/empty.csv": "empty.csv", "--out {} --resume": "student.pt"}
FILES = {"html.pt": "web page", "lfs.pt": "LFS", "empty.pt": "", "code.pt": "", "script.pt": "TorchScript"}
FILES |= {"other.pt": "does not fit", "cut.pt": "", "bit.pt": "damaged", "cut.bin": "", "missing-*.tar": ""}
FILES |= {"latin1.tar": "x.txt|not UTF-8", "cut.tar": "", "dup.tar": "0000", "none.tar": "", "latin1.csv": "UTF-8"}
FILES |= {"header.csv": "'image', 'caption'", "ragged.csv": "line 3", "empty.csv": "", "rows.csv": "", "no.png": ""}
for name, words in FILES.items():
    flags = "--student-weights {}/" if name.endswith(("pt", "bin")) else "--ablation no-kd --data {}/"
    MISTAKES[flags + name.replace("no.png", "absent.csv")] = f"{{}}/{name}|{words}"


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_gets_one_line_and_nothing_is_written(wrong, tmp_path, capsys, flags):
    listing = lambda: {path: path.stat().st_mtime_ns for path in [*wrong.glob("[!.]*"), *tmp_path.glob("out/[!.]*")]}
    before, words = listing(), MISTAKES[flags].format(wrong).split("|")
    fails(capsys, lambda: dark.main([*SMALL, "--out", str(tmp_path / "out"), *flags.format(wrong).split()]), *words)
    assert before == listing()


# ---------------------------------------------------------------- evaluation


def test_validity_by_hand():
    peak = lambda *days: torch.zeros(175).index_copy(0, torch.tensor(days), torch.rand(15) + 1)  # the 15 largest
    median, edge, gap = peak(*range(50, 65)), peak(*range(0, 14), 174), peak(*range(40, 48), *range(100, 107))
    similarity = torch.stack([median, edge, gap, median, peak(*range(160, 175)), torch.zeros(175), median])
    weeks = (155 / 7) ** np.arange(4)  # the first row's age, and the WHO's percentiles of it
    low = math.exp(weeks @ (1.59317517131532, 0.29459800552433, -0.0073860372566707, 0.0000656951770216148))
    high = math.exp(weeks @ (2.50074069629423, 0.220067854715719, -0.00493623111462443, 0.0000389066000946519))
    hc = [low + 0.1, 342.01, evaluate.who_hc(145), high + 0.1, 99.9, 100.0, low - 0.1]  # two of them do not count
    score = evaluate.validity(similarity, torch.tensor(hc))
    assert (score["valid"], score["n"], score["rate"]) == (3, 5, 3 / 5)
    assert score["days"].tolist() == [155, 105, 145, 155, 265, 105, 155]  # the median of the days; ties to the younger
    with pytest.raises(ValueError):
        evaluate.validity(torch.zeros(2, 168), [200.0, 200.0])


@torch.no_grad()
def test_age_similarity_is_the_direct_form_with_every_prompt_encoded_once(monkeypatch, capsys):
    model = dark.open_model("demo-vit")
    clip, tokenizer, templates = model.clip.eval(), model.tokenizer, evaluate.PROMPTS["ga"][:2]
    images, pixel_mm = torch.randn(4, 3, 64, 64), [0.21, 1.004, 0.2149, 12.0]
    encoded = spied(monkeypatch, clip, "encode_text")
    similarity = evaluate.ga_similarity(clip, tokenizer, images, pixel_mm, templates)
    prompts = [tuple(row) for (tokens,), _ in encoded for row in tokens.tolist()]
    assert similarity.shape == (4, 175) and len(prompts) == len({*prompts}) == 3 * 2 * 175  # 0.2149 is stated as 0.21
    features = F.normalize(clip.encode_image(images), dim=-1)  # (4, D)
    again = evaluate.ga_similarity(clip, tokenizer, features, pixel_mm, templates)
    torch.testing.assert_close(again, similarity, atol=1e-5, rtol=0)
    for i, column in [(i, column) for i in range(4) for column in range(0, 175, 29)]:
        weeks, day = divmod(98 + column, 7)
        texts = [t.format(weeks=weeks, day=day, pixel_spacing=f"{pixel_mm[i]:.2f}") for t in templates]
        text = F.normalize(clip.encode_text(tokenizer(texts)), dim=-1)
        assert similarity[i, column] == pytest.approx((features[i] @ text.T).mean().item(), abs=1e-5)
    assert evaluate.embed_texts(clip, tokenizer, ["a " * 38]).isfinite().all()  # fills the context of 40
    fails(capsys, lambda: evaluate.embed_texts(clip, tokenizer, ["ok", "a " * 39]), "'a a a", "40 tokens")


@torch.no_grad()
def test_f1_class_embeddings_geometry_and_interval_by_hand():
    for kind in (list, np.array, torch.tensor, lambda labels: [*map(str, labels)]):
        predicted, actual = kind([0, 0, 1, 2, 3, 1]), kind([0, 1, 1, 1, 4, 4])  # 2 and 3 are no true label
        assert evaluate.macro_f1(predicted, actual) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
        for wrong in (predicted, kind([0, 1])), ([], []):
            with pytest.raises(ValueError):
                evaluate.macro_f1(*wrong)
    model = dark.open_model("demo-vit")
    one, two, three = F.normalize(model.clip.encode_text(model.tokenizer(["one", "a longer two", "three"])), dim=-1)
    found = evaluate.class_embeddings(model, {"a": ["one", "a longer two"], "b": ["three"]})
    torch.testing.assert_close(found, torch.stack([F.normalize(one + two, dim=-1), three]), atol=1e-6, rtol=1e-5)
    uniformity = math.log(sum(math.exp(-2 * d) for d in (4, 2, 2, 2, 2, 4)) / 6)  # of the squared distances
    found = evaluate.geometry(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]), ["x", "x", "y", "y"])
    expected = dict(effective_dimension=2, rank95=2, silhouette=-0.5, intra_cosine=-1, inter_cosine=0)
    assert found == pytest.approx({**expected, "uniformity": uniformity}, abs=1e-9)
    assert evaluate.t_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 3.182446 * math.sqrt(5 / 3) / 2), rel=1e-5)


def test_probes_keep_patients_together_and_are_scored_on_the_test_rows(monkeypatch):
    rows = [dict(label="ab"[i % 2] * (i > 0), patient=i // 3, train=i < 30) for i in range(42)]  # one has no label
    intervals, fitted = spied(monkeypatch, evaluate, "t_interval"), []
    layer = evaluate.linear_model.LogisticRegression.fit
    noted = lambda self, x, y: fitted.append({int(abs(a)) // 3 for a in x[:, 0]}) or layer(self, x, y)
    monkeypatch.setattr(evaluate.linear_model.LogisticRegression, "fit", noted)
    side = np.array([[(i + 0.1) * (-1) ** i] for i in range(42)])  # tells the label, and for `noted` the patient
    assert evaluate.probe(rows, "label", side) == (1, 0) and len(intervals[0][0][0]) * 3 == len(fitted) == 75
    assert {len(patients) for patients in fitted} == {8}  # of 10 with train rows, all of each: two are held out
    turned = np.where([[row["train"]] for row in rows], side, -side)  # in the test rows the sides are swapped
    auroc = evaluate.metrics.get_scorer("roc_auc")
    assert evaluate.probe(rows, "label", turned) == evaluate.probe(rows, "label", turned, auroc) == (0, 0)


NO_BRAIN, AGES = "Not A Brain", "{weeks} w {day} d {pixel_spacing} mm"
BRAINS = [("Fetal brain", plane) for plane in ("Trans-thalamic", "Trans-cerebellum", "Trans-ventricular", "Other")]
PARTS = [(part, NO_BRAIN) for part in ("Fetal abdomen", "Fetal femur", "Fetal thorax", "Maternal cervix", "Other")]
VIEWS, VIT, ONE = PARTS + BRAINS, "--model demo-vit", "--prompts planes.json brain.json ages.json"
CUT = "h.png,1,200\ncut.png,1,200\ncut.png,1,200"
TABLES = {  # the published layouts
    "planes": ("FETAL_PLANES_DB_data.csv", "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"),
    "hc18": ("training_set_pixel_size_and_HC.csv", "filename,pixel size(mm),head circumference (mm)\n"),
    "chd": ("labels.csv", "video,label,patient,train\n"),
}
strict = lambda path: json.loads(Path(path).read_text(), parse_constant=pytest.fail)  # there must be no NaN


def planes_of(views, train=(0, 1), patients=1):
    """The rows of FETAL_PLANES_DB's table: each patient shows all views; the images are p0.png ... p8.png."""
    rows = [(VIEWS.index(view), f"{i}-{x}", *view, x) for x in train for i in range(patients) for view in views]
    return "\n".join(f"p{n};{patient};{plane};{brain};Op. 1;Aloka;{x}" for n, patient, plane, brain, x in rows)


def write_layouts(folder, **tables):
    """Nine images of planes, a head of 80 x 54 pixels, two videos, and the tables that are given."""
    noise = lambda *size: Image.fromarray(np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8))
    images = {f"Images/p{i}.png": noise(30 + i, 40) for i in range(9)} | {"training_set/h.png": noise(54, 80)}
    images |= {f"v{v}/frame{i}.png": Image.new("L", (40, 30), 100 * v + i) for v in (0, 1) for i in (2, 10, 9)}
    broken = PngImagePlugin.PngInfo()
    broken.add_text("Raw profile type exif", "\nexif\n4\nno hex")
    for name, image in {**images, "training_set/exif.png": images["training_set/h.png"]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, pnginfo=broken if "exif" in name else None)
    os.truncate(shutil.copy(folder / "training_set/h.png", folder / "training_set/cut.png"), 400)  # enough for its size
    for kind, rows in tables.items():
        name, header = TABLES[kind]
        (folder / name).write_bytes(rows if isinstance(rows, bytes) else (header + rows).encode())


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    model, config = dark.open_model("demo-vit"), dataclasses.asdict(dark.Config(seed=42))
    preprocess = {key: getattr(model, key) for key in dark.PREPROCESS} | dict(mean=(0.2,) * 3, std=(0.2,) * 3)
    about = dict(format=dark.FORMAT, architecture="demo-vit", context_length=40, preprocess=preprocess, epoch=2)
    return about | dict(config=config, state_dict=model.clip.state_dict())


@pytest.fixture(scope="module")
def here(checkpoint, tmp_path_factory):
    """The folder we are in from now on: all three data sets, a student, and what is wrong in some way."""
    folder, heads = tmp_path_factory.mktemp("here"), "h.png,0.1,200\nh.png,0.1,99\nh.png,0.11,250"
    videos = "\n".join(f"v{i % 2},{'ab'[i % 2]},{i},{int(i < 16)}" for i in range(24))
    write_layouts(folder / "good", planes=planes_of(VIEWS, patients=5), hc18=heads, chd=videos)
    spoilt = checkpoint["state_dict"] | {"visual.proj": checkpoint["state_dict"]["visual.proj"] * math.nan}
    for name, content in {
        "student": checkpoint,
        "nan": checkpoint | {"state_dict": spoilt},
        "foreign": {"a": {}},
    }.items():
        torch.save(content, folder / f"{name}.pt")
    preprocess = dict(mean=[0.2] * 3, std=[0.2] * 3, interpolation=checkpoint["preprocess"]["interpolation"])
    config = dict(preprocess_cfg=preprocess, model_cfg=json.loads((HERE / "assets/models/demo-vit.json").read_text()))
    files = {f"{task}.json": {name: [f"my {name}"] for name in evaluate.PROMPTS[task]} for task in ("planes", "brain")}
    files |= {"ages.json": {"ga": [AGES]}, "odd.json": {"ga": ["{weeks}"]}, "list.json": ["a"], "text.json": {"a": "b"}}
    for name, content in {**files, "local/open_clip_config.json": config}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8-sig")  # with a byte order mark
    (folder / "local/open_clip_config.json").write_text(json.dumps(config))  # read by open_clip itself
    (folder / "half.json").write_text('{"a": ["b"')
    torch.save(checkpoint["state_dict"], folder / "local/open_clip_pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def measured(out, flags):
    evaluate.main(f"{flags} --out {out}/results.json --workers 0".split())
    return strict(out / "results.json")


def test_everything_of_a_student_and_its_teacher(here, tmp_path, monkeypatch, capsys):
    shutil.copy("student.pt", tmp_path)
    units, scored = spied(monkeypatch, evaluate, "unit"), spied(monkeypatch, evaluate, "macro_f1")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    flags = f"--planes good --hc18 good --chd good {ONE} --plots --geometry --probe --teacher student.pt --workers 0"
    evaluate.main(f"{tmp_path}/student.pt {VIT} {flags}".split())
    assert all(embeddings.dtype == torch.float32 for _, embeddings in units)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    own, other = strict(tmp_path / "results.json")  # beside the first checkpoint
    assert (own["name"], own["epoch"], own["seed"], other["name"]) == (f"{tmp_path}/student.pt", 2, 42, "demo-vit")
    for r in (own, other):
        assert 0 <= r["f1_5plane"] <= 1 and r["f1_all"] == pytest.approx((5 * r["f1_5plane"] + 3 * r["f1_3brain"]) / 8)
        assert r["avg"] == pytest.approx((r["f1_all"] + r["hc18_validity"] / 100) / 2) and r["hc18_n"] == 2
        assert r["hc18_interval"][0] <= r["hc18_validity"] == 50 * r["hc18_valid"] <= r["hc18_interval"][1]
        assert 1 < r["entropy"] <= math.log(9) and r["geometry"]["f1_3brain"]["rank95"] > 0
    assert own["teacher_rank_correlation"] == pytest.approx(1) and other["teacher_rank_correlation"] < 0.9
    for key in ("probe_planes", "probe_brain", "chd_auroc"):
        assert (own[key], own[f"{key}_retention_percent"]) == (1, 100)  # the images repeat
    assert {len(actual) for (_, actual), _ in scored} >= {80, 30, 45, 15}  # zero-shot, and the probes' test rows
    figures = [Image.open(path).size[0] for path in tmp_path.glob("*.png")]
    assert len(figures) == 2 and min(figures) >= 600  # one for each model
    table, *lines = capsys.readouterr().out.splitlines()
    assert table.split()[-4:] == ["F1-5Plane", "F1-3Brain", "F1-all", "Avg"] and "teacher_rank" in lines[2]


def test_published_layouts_broken_metadata_and_undefined_figures(here, tmp_path, monkeypatch, capsys):
    scored, embedded = (spied(monkeypatch, evaluate, name) for name in ("macro_f1", "embed_images"))
    (result,) = measured(tmp_path, f"student.pt --planes good --split test {ONE}")
    assert result["split"] == "test" and not {"hc18_validity", "avg"} & {*result}  # absent, not zero
    five, three = (actual for (_, actual), _ in scored)  # no `Other`, nothing that was trained on
    assert {*five} == {"abdomen", "brain", "cervix", "femur", "heart"} and {*three} == {*evaluate.BRAIN_WORDS}
    assert (len(five), len(three), len(embedded[0][1])) == (40, 15, 40)
    assert capsys.readouterr().out.splitlines()[1].split()[2] == "-"
    frames = evaluate.chd_table("good")[0]["frames"]
    assert [path.stem for path in frames] == ["frame2"] * 4 + ["frame9"] * 8 + ["frame10"] * 4
    hc18 = HERE.parent / "shared/hc18/val"  # as it is published
    assert not hc18.exists() or len(evaluate.hc18_table(hc18)) == 91
    write_layouts(tmp_path, hc18="h.png,0.1,200\nexif.png,0.1,200")
    assert measured(tmp_path, f"student.pt --hc18 {tmp_path} {ONE}")[0]["hc18_spearman"] is None  # undefined, never NaN
    assert torch.equal(*embedded[1][1])  # broken metadata: the pixels count


def test_models_with_their_own_preprocessing_and_in_folders(here, tmp_path, monkeypatch):
    seen = spied(monkeypatch, dark.Model, "normalize")
    how = "--weights student.pt --mean 0.5,0.4,0.3 --std 1,2,0.5 --interpolation bilinear"
    (own,) = measured(tmp_path, f"{VIT} {how} --hc18 good {ONE}")
    padded = Image.new("L", (80, 80))
    padded.paste(Image.open("good/training_set/h.png"), (0, 13))
    by_hand = torch.from_numpy(np.array(padded.resize((64, 64), Image.Resampling.BILINEAR), np.float32) / 255)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [1, 2, 0.5]]).view(2, 3, 1, 1)
    torch.testing.assert_close(seen[0][1][0], (by_hand.expand(3, 64, 64) - mean) / std)
    embedded, folder = spied(monkeypatch, evaluate, "embed_images"), "local-dir:local"
    measured(tmp_path, f"student.pt --hc18 good {ONE}")
    (same,) = measured(tmp_path, f"--planes good --hc18 good {ONE} --model {folder} --geometry --teacher {folder}")
    assert (own["name"], same["name"]) == ("demo-vit student.pt", folder)
    assert same["teacher_rank_correlation"] == pytest.approx(1)
    torch.testing.assert_close(embedded[0][1], embedded[2][1])  # of the heads: its weights and its preprocessing


def test_prompts_are_the_published_classes_and_files_are_merged(here, tmp_path, monkeypatch):
    ours, classes = evaluate.PROMPTS, "abdomen brain cervix femur heart kidney lips_nose profile_patient spine"
    assert sorted(ours["planes"]) == classes.split() and len(ours["brain"]) == 3
    assert {len({*texts}) for texts in [*ours["planes"].values(), *ours["brain"].values(), ours["ga"]]} == {5}
    averaged, aged = (spied(monkeypatch, evaluate, name) for name in ("class_embeddings", "ga_similarity"))
    command = "student.pt --planes good --hc18 good --prompts planes.json brain.json"
    measured(tmp_path, f"{command} --spacing-size 100")
    measured(tmp_path, f"{command} ages.json")
    expected = [{name: [f"my {name}"] for name in ours[task]} for task in ("planes", "brain")]
    assert [prompts for (_, prompts), _ in averaged] == expected * 2
    assert [arguments[4] for arguments, _ in aged] == [ours["ga"], [AGES]]  # ours remain without `ga`
    assert [arguments[3][0] for arguments, _ in aged] == pytest.approx([8 / 100, 8 / 64])  # mm per pixel


def test_seeds_are_averaged_where_nothing_else_differs(here, checkpoint, tmp_path):
    runs = {"a": (42, 2.0, 2), "b": (7, 2.0, 2), "c": (123, 2.0, 2), "d": (42, 4.0, 2), "e": (7, 4.0, 1)}
    for name, (seed, beta0, epoch) in runs.items():
        config = checkpoint["config"] | dict(seed=seed, beta0=beta0, out=name, workers=3, ablation="selective")
        weights = checkpoint["state_dict"] | {"text_projection": torch.eye(64, 128).roll(seed, 0)}
        torch.save(checkpoint | dict(epoch=epoch, config=config, state_dict=weights), tmp_path / f"{name}.pt")
    names = [str(tmp_path / f"{name}.pt") for name in runs]
    *records, mean = measured(tmp_path, f"{' '.join(names)} --planes good {ONE}")
    facts = dict(seeds=[42, 7, 123], epoch=2, ablation="selective", checkpoints=names[:3])
    assert facts == {key: mean[key] for key in mean if key not in ("name", "mean", "sd")} and len(records) == 5
    f1 = [record["f1_all"] for record in records[:3]]
    assert (mean["mean"]["f1_all"], mean["sd"]["f1_all"]) == pytest.approx((np.mean(f1), np.std(f1, ddof=1)))
    assert mean["sd"]["f1_all"] > 0 and not {"seed", "epoch"} & {*mean["mean"]}


def test_results_are_written_before_they_are_printed_under_python_oo(here, tmp_path):
    command = f"student.pt --hc18 good {ONE} --workers 0 --out {tmp_path}/r.json".split()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    running = subprocess.Popen([sys.executable, "-OO", HERE / "evaluate.py", *command], **pipes)
    running.stdout.close()  # as `| head` does, only sooner
    assert running.wait() and strict(tmp_path / "r.json")[0]["hc18_n"] == 2


def test_written_pairs_are_what_dark_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, heads = planes_of([BRAINS[1], PARTS[4], BRAINS[3]]), f"h.png,1,{evaluate.who_hc(20 * 7 + 3)}\nh.png,2,300"
    write_layouts(Path("made"), planes=rows, hc18=heads)
    for name, flags in (("a.csv", ""), ("b.csv", "--spacing-size 100")):
        evaluate.main(f"--planes made --hc18 made --write-pairs made/{name} {flags}".split())
    monkeypatch.chdir("made")
    paths, _, _, texts = zip(*dark.find_pairs(("a.csv", "b.csv")))
    assert [Path(path).name for path in paths] == ["p6.png", "p4.png", "p8.png", "h.png", "h.png"] * 2  # no Train 0
    views = ("fetal brain, trans-cerebellum plane", "another view", "fetal brain", "fetal brain", "fetal brain")
    assert all(view in text for view, text in zip(views, texts)) and "weeks" not in "".join(texts[:3])
    assert "20 weeks and 3 days" in texts[3] and "0.31 mm" in texts[3] and "0.80 mm" in texts[8]  # 80 / 256, 80 / 100


EVALUATE_MISTAKES = [  # flags, words of the one line, and the table in the folder `odd`
    *[("none.pt", "none.pt"), ("foreign.pt", "foreign.pt"), ("--batches 8", "--batches"), ("--batch 0", "--batch")],
    *[(f"{flag} 1", f"{flag} --model") for flag in ("--weights", "--mean", "--std", "--context-length")],
    *[(f"{VIT} {flag}", flag) for flag in ("--std 0,1,1", "--std 1,0,1", "--mean nan,0,0", "--mean 1,2", "--mean a,b,c")],
    *[("--hc18 odd", f"h.png {mm}", f"h.png,{mm},200") for mm in ("nan", "inf", "0.0", "-0.1", "wide")],
    *[("--hc18 odd", "h.png nan", "h.png,0.1,nan"), ("--hc18 odd", "1 rows 100 342", "h.png,0.1,99")],
    *[("--hc18 odd", "2 of 3 lost.png", "h.png,1,200\nlost.png,1,200\nb.png,1,200"), ("--hc18 odd", "no rows", "")],
    *[("--hc18 odd", "circumference", b"filename,pixel size(mm)\nh.png,0.1"), ("--hc18 odd", "line 3", "h.png,1,2\nh")],
    *[("--planes odd", "1 of 1 lost.png", "lost;1;Fetal brain;;;;1"), ("--planes odd", "abdomen", "p0;1;Fetal hand;;;;1")],
    *[(f"--planes odd {flags}", "odd", planes_of([BRAINS[0]] * 8, (1,))) for flags in ("--geometry", "--split test")],
    *[("--planes odd --geometry", "brain", planes_of(VIEWS, (1,))), ("--chd odd", "two labels", "v0,a,1,1\nv0,a,2,0")],
    *[("--planes odd --probe", "probe of planes", planes_of(VIEWS, train, n)) for train, n in (((0, 1), 4), ((1,), 5))],
    *[("--chd odd", "probe 5", "v0,a,1,1\nv1,b,2,1\nv0,a,3,0\nv1,b,4,0"), ("--chd odd", "lost", "lost,a,1,1")],
    *[(f"--planes good --prompts {name}.json", f"{name}.json") for name in ("none", "list", "text", "half")],
    *[("--planes good --prompts brain.json", "abdomen"), ("--hc18 good --prompts odd.json", "{day}")],
    *[(f"--hc18 good --out {out}", f"--out {out}") for out in ("good", "student.pt/a.json", "nowhere/a.json")],
    *[("--hc18 good --write-pairs a.tsv", "a.tsv .csv"), ("--write-pairs a.csv", "a.csv --hc18"), ("", "assets/phantom.py")],
    *[("--hc18 good --geometry", "--planes"), ("student.pt --hc18 good --teacher none.pt", "none.pt")],
    *[(f"{VIT} --context-length 20 --hc18 good", "14 weeks 20 tokens"), ("nan.pt --hc18 good", "not finite")],
    *[("student.pt --teacher nan.pt --planes good", "not finite"), ("student.pt --hc18 odd", "cut.png decode", CUT)],
]  # fmt: skip


@pytest.mark.parametrize("flags, words, table", [(*row, "")[:3] for row in EVALUATE_MISTAKES])
def test_mistakes_get_one_line_before_the_work(here, monkeypatch, capsys, recwarn, flags, words, table):
    for kind in [kind for kind in TABLES if f"--{kind} odd" in flags]:
        write_layouts(Path("odd"), **{kind: table})
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    monkeypatch.setattr(dark, "PHANTOM", Path("phantom"))
    if not {"finite", "decode", "tokens"} & {*words.split()}:
        monkeypatch.setattr(evaluate, "embed_images", lambda *_: pytest.fail("the work began"))
    needed = "" if not flags or any(flag in flags for flag in ("hc18", "planes", "chd", "write")) else " --hc18 good"
    fails(capsys, lambda: evaluate.main((flags + needed).split()), *words.split())
    assert not [warning for warning in recwarn if warning.category is UserWarning]  # more lines on stderr
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def checkpoint_of(path, model, **config):
    state = dict(epoch=3, log=[], n_pairs=8, projections={}, optimizer={})
    dark.save(dark.Config(out=str(path.parent), **config), model, **state)
    (path.parent / "student.pt").rename(path)


# ---------------------------------------------------------------- export

IPHONE = "--iphone --team T --bundle b"
opened = lambda path: export.ct.models.MLModel(str(path), skip_model_load=True)
listing = lambda folder: {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
BLOBS = (255 * F.interpolate(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), 48)).round()
# What the operations of a converted FastViT mean (MIL's documentation): so its graph runs where there is no Core ML.
MIL = dict(relu=torch.relu, sigmoid=torch.sigmoid, softmax=torch.softmax, add=torch.add, sub=torch.sub, mul=torch.mul)
MIL |= dict(real_div=torch.div, maximum=torch.clamp, reduce_mean=torch.mean, reshape=torch.reshape, tile=torch.tile)
MIL |= dict(reduce_l2_norm=lambda x, axes, keep_dims: x.norm(dim=axes, keepdim=keep_dims), cast=lambda x, dtype: x)
MIL |= dict(linear=F.linear, gelu=lambda x, mode: {"EXACT": F.gelu}[mode](x))
MIL["conv"] = lambda x, w, bias, step, _, pad, spread, groups: F.conv2d(x, w, bias, step, pad[::2], spread, groups)


@torch.no_grad()
def differences(path, model, prompts):
    """Largest difference of embeddings and of probabilities from PyTorch's, not fused; and the package's operations."""
    spec, found = opened(path).get_spec(), []
    program = load_program(spec, spec.specificationVersion, opened(path).weights_dir).functions["main"]
    read = lambda v: torch.tensor(v).float() if np.ndim(v) and v.dtype.kind == "f" else np.asarray(v).tolist()
    values = {op.name: read(op.outputs[0].val) for op in program.operations if op.op_type == "const"}
    for values["image"] in BLOBS.split(1):
        for operation in program.operations:
            if operation.op_type != "const":
                inputs = [values[var.name] for var in operation.inputs.values() if var is not None]
                values[operation.outputs[0].name] = MIL[operation.op_type](*inputs)
        found.append([values[var.name] for var in program.outputs])
    embedding, probability = map(torch.cat, zip(*found))
    expected = F.normalize(model.clip.encode_image(model.normalize(BLOBS / 255)), dim=-1)  # (4, D)
    likely = (20 * expected @ evaluate.class_embeddings(model, prompts).T).softmax(-1)  # (4, C)
    assert torch.pdist(expected).min() > 0.05 and likely.std(0).max() > 0.01  # the images are told apart
    assert (embedding.norm(dim=1) - 1).abs().max() < 1e-6
    return (embedding - expected).norm(dim=1).max(), (probability - likely).abs().max(), program.operations


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("export"), dark.open_model("demo-fastvit")
    model.mean, model.std, model.interpolation = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3), "bicubic"
    torch.nn.init.constant_(model.clip.logit_scale, math.log(20))
    for norm in (m for m in model.clip.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)):  # far from the start
        for values, low, high in ((norm.running_mean, -0.3, 0.3), (norm.running_var, 0.2, 1), (norm.weight, 0.5, 1.5)):
            torch.nn.init.uniform_(values, low, high)
    checkpoint, out = folder / "a.pt", folder / "deep/Student.mlpackage"
    checkpoint_of(checkpoint, model, beta0=2.0, r=-0.4)
    out.mkdir(parents=True)
    (out / "Manifest.json").write_text("of an older package")
    export.main(f"{checkpoint} --out {out} --labels planes --runs 3".split())
    return mock.Mock(out=out, checkpoint=checkpoint, model=model.eval())


def test_export_package_report_and_files(exported):
    spec, result = opened(exported.out).get_spec(), strict(exported.out.with_name("export.json"))
    (image,), user = spec.description.input, spec.description.metadata.userDefined
    kind, outputs = image.type.imageType, {o.name: o.type.multiArrayType for o in spec.description.output}
    assert spec.specificationVersion == 8 and (image.name, kind.width, kind.height) == ("image", 48, 48)  # 8: iOS 17
    assert {name: [*out.shape] for name, out in outputs.items()} == {"embedding": [1, 64], "probabilities": [1, 9]}
    assert all(out.dataType == export.ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32 for out in outputs.values())
    sha256 = hashlib.sha256(exported.checkpoint.read_bytes()).hexdigest()
    facts = dict(source=str(exported.checkpoint), checkpoint_sha256=sha256, epoch="3", beta0="2.0", r="-0.4")
    assert user.items() >= facts.items() and user["interpolation"] == "bicubic" in image.shortDescription
    lists, planes = [json.loads(user[key]) for key in ("mean", "std", "labels", "prompts")], evaluate.PROMPTS["planes"]
    assert lists == [[0.3, 0.4, 0.5], [0.2, 0.25, 0.3], [*planes], planes] and result["labels"] == [*planes]
    sizes = {path.name: path.stat().st_size for path in exported.out.rglob("*") if path.is_file()}
    assert {*sizes} == {"Manifest.json", "model.mlmodel", "weight.bin"} and len([*exported.out.parent.iterdir()]) == 2
    towers = exported.model.clip.visual, timm.utils.reparameterize_model(exported.model.clip.visual)
    before, after = (sum(p.numel() for p in tower.parameters()) for tower in towers)
    assert (result["visual_params_unfused"], result["visual_params"]) == (before, after) and after < before
    assert result["package_mb"] == sum(sizes.values()) / 1e6 and 0.95 < sizes["weight.bin"] / after / 2 < 1.05  # fp16
    unfused, fused = result["latency"]
    assert (unfused["runtime"], fused["runtime"], fused["runs"]) == ("PyTorch unfused", "PyTorch fused", 3)
    assert 0 < fused["median_ms"] <= fused["p90_ms"] and fused["device"] and fused["os"]
    assert result["fused_over_unfused"] == pytest.approx(fused["median_ms"] / unfused["median_ms"])
    assert 0 < result["fuse_difference"] < 1e-9 and result["export_seconds"] > 0.1


def test_export_computes_what_pytorch_computes_with_the_fused_weights(exported, tmp_path, capsys):
    prompts, labels = {"head": ["a fetal head"], "thigh": ["a femur", "a thigh"]}, tmp_path / "labels.json"
    labels.write_text(json.dumps(prompts | {"ga": ["{weeks} w {day} d {pixel_spacing} mm"]}))
    flags = f"--out {tmp_path}/a.mlpackage --precision fp32 --labels {labels} --runs 1"
    export.main([str(exported.checkpoint), *flags.split()])
    told = capsys.readouterr()
    table = [len(line) for line in told.out.splitlines() if line.startswith(("runtime", "PyTorch"))]
    assert table == table[:1] * 3 and told.err == ""  # no chatter of the converter, no bars off a terminal
    embedding, probability, _ = differences(tmp_path / "a.mlpackage", exported.model, prompts)
    assert embedding < 1e-5 and probability < 1e-4
    embedding, probability, operations = differences(exported.out, exported.model, evaluate.PROMPTS["planes"])
    assert embedding < 2e-2 and probability < 1e-2  # what weights in fp16 cost
    kinds = {op.op_type: op.outputs[0].dtype.__name__ for op in operations}  # of the last of each
    assert kinds.items() >= dict(conv="fp16", gelu="fp16", reduce_l2_norm="fp32", linear="fp32", softmax="fp32").items()


def test_export_of_a_folder_as_open_clip_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/MobileFetalCLIP.mlpackage").mkdir(parents=True)
    Path("out/export.json").write_text("of the trained model")
    config = {"model_cfg": json.loads((dark.HERE / "assets/models/demo-vit.json").read_text())}
    config["preprocess_cfg"] = {"mean": [0.2] * 3, "std": [0.3] * 3, "interpolation": "bicubic"}
    Path("open_clip_config.json").write_text(json.dumps(config))
    torch.save(dark.open_model("demo-vit").clip.state_dict(), "open_clip_pytorch_model.bin")
    head = mock.Mock(side_effect=[None, BrokenPipeError()])  # `| head -1`
    with mock.patch("builtins.print", head), pytest.raises(SystemExit):
        export.main(f"--model local-dir:{tmp_path} --runs 2 --mean 0.1,0.2,0.3 --labels brain".split())
    assert Path("out/export.json").read_text() == "of the trained model" and len([*Path("out").iterdir()]) == 4
    name = f"local-dir{str(tmp_path).replace('/', '-')}"
    user, result = opened(f"out/{name}.mlpackage").user_defined_metadata, strict(f"out/{name}.json")
    facts = dict(mean="[0.1, 0.2, 0.3]", std="[0.3, 0.3, 0.3]", interpolation="bicubic", source=f"local-dir:{tmp_path}")
    assert user.items() >= facts.items() and "checkpoint_sha256" not in user
    assert [row["runtime"] for row in result["latency"]] == ["PyTorch"] and result["fused_over_unfused"] is None
    macs = {"convolutions": 64 * 128 * 3 * 8**2, "attention": 4 * 2 * 65**2 * 128}  # 65 tokens, width 128, 4 layers
    macs["matrix products"] = 4 * 65 * 12 * 128**2 + 128 * 128 + 3 * 128  # qkv, out, MLP; projection, probabilities
    assert result["gmacs_by_kind"] == pytest.approx({kind: count / 1e9 for kind, count in macs.items()})
    assert torch.backends.mha.get_fastpath_enabled()  # was switched off to count, and is on again


def tower_of(function, *layers):
    last = type("Last", (torch.nn.Module,), {"forward": lambda self, x: function(x)})()
    model = mock.Mock(mean=(0.5,) * 3, std=(0.5,) * 3, **{"clip.visual": torch.nn.Sequential(*layers, last)})
    return export.Phone(model, None)


@torch.no_grad()
def test_export_checks_the_fusing(capsys):
    torch.manual_seed(0)  # as timm makes it: what the images change is tiny beside the bias of the projection
    trunk = timm.create_model("fastvit_t8", num_classes=32).eval()
    images, tower, plain = BLOBS / 255, tower_of(lambda x: x, trunk), tower_of(lambda x: x.flatten(1))
    before = copy.deepcopy(tower.state_dict())
    fused, change = export.fuse(tower, images)
    assert 0 < change < 1e-12 and fused.state_dict().keys() != before.keys() and export.fuse(plain, images)[1] is None
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in tower.state_dict().items())
    torch.testing.assert_close(fused(images)[0], tower(images)[0], rtol=0, atol=1e-6)
    wrong = timm.utils.reparameterize_model(copy.deepcopy(tower).double())
    wrong.visual[0].stages[1].blocks[0].token_mixer.reparam_conv.weight.mul_(1 + 1e-5)
    with mock.patch.object(timm.utils, "reparameterize_model", return_value=wrong):
        fails(capsys, lambda: export.fuse(tower, images), "fusing")
    trunk.head.fc.weight.zero_()
    fails(capsys, lambda: export.fuse(tower, images), "look alike")


CANNOT = [  # image tower, exit code, words
    (lambda x: x.cummax(-1)[0], 2, "demo-vit converted cummax"),  # unknown to coremltools
    (lambda x: x if x.sum() > 0 else x * 2, 2, "demo-vit converted"),  # stops torch.export, in various words
    (mock.Mock(side_effect=KeyboardInterrupt), 130, "interrupted"),
    # Converts, with tokens as in CoCa's towers and the alias of SigLIP's, but cannot be written.
    (lambda x: (torch.ops.aten.alias(x).flatten(1), x), 1, "File exists"),
]


@pytest.mark.parametrize("function, code, words", CANNOT)
def test_export_keeps_the_old_package(exported, tmp_path, monkeypatch, capsys, function, code, words):
    half = lambda package, path: os.mkdir(shutil.copytree(exported.out / "Data", path))  # of a package, then OSError
    out, model = shutil.copytree(exported.out, tmp_path / "old.mlpackage"), dark.open_model("demo-vit")
    before, model.clip.visual = listing(tmp_path), tower_of(function, torch.nn.AdaptiveAvgPool2d(2)).visual
    monkeypatch.setattr(dark, "open_model", lambda *_, **__: model)
    monkeypatch.setattr(export.ct.models.MLModel, "save", half)
    fails(capsys, lambda: export.main(f"{VIT} --out {out}".split()), *words.split(), code=code)
    assert listing(tmp_path) == before


def a_mac(monkeypatch, found):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    found = mock.Mock(side_effect=[found, found] if isinstance(found, list) else found)
    monkeypatch.setattr(export.remote_device.Device, "get_connected_devices", found)


def test_export_on_a_mac_with_a_phone(exported, tmp_path, monkeypatch, capsys):
    prepared, engine, calls = mock.Mock(os_version="18.1"), object.__new__(export.MLNeuralEngineComputeDevice), []
    prepared.name, prepare = "Test iPhone", mock.AsyncMock(return_value=prepared)
    a_mac(monkeypatch, [mock.Mock(prepare_for_model_debugging=prepare)])

    async def predict(model, device, inputs, iterations):
        kind = model.get_spec().description.input[0].type.WhichOneof("Type")
        calls.append((device, model.compute_unit.name, kind, inputs["image"]))
        return mock.Mock(samples=[1000] * export.WARM_UP + [*range(iterations - export.WARM_UP)])

    used = {"const": engine, "conv": engine, "gelu": engine, "softmax": "cpu", "cast": "cpu"}
    planned = [mock.Mock(**{"spec.type": k, "compute_device_usage.preferred_compute_device": used[k]}) for k in used]
    execution = mock.AsyncMock(return_value=[*planned, mock.Mock(compute_device_usage=None)])
    benchmarker = lambda model, device=None: mock.Mock(
        benchmark_predict=lambda **how: predict(model, device, **how), benchmark_operation_execution=execution
    )
    monkeypatch.setattr(export.perf_utils, "MLModelBenchmarker", benchmarker)
    monkeypatch.setattr(export.ct.models.MLModel, "predict", lambda self, inputs: {"embedding": np.zeros((1, 64))})
    call = lambda: export.main(f"{exported.checkpoint} --out {tmp_path}/a.mlpackage --runs 11 {IPHONE}".split())
    call()
    rows, (devices, units, kinds, images) = strict(tmp_path / "export.json")["latency"][2:], zip(*calls)
    assert [row["compute_units"] for row in rows] == [*units] == ["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"] * 2
    assert devices == (None,) * 3 + (prepared,) * 3  # of the Mac, of the phone
    assert kinds == ("imageType",) * 3 + ("multiArrayType",) * 3  # the phone's is a twin that takes an array
    pixels = torch.from_numpy(np.array(images[0])).permute(2, 0, 1) / 255
    np.testing.assert_allclose(images[3][0], pixels, atol=1e-6)
    embedding = F.normalize(exported.model.clip.encode_image(exported.model.normalize(pixels[None])), dim=-1)
    found = [(row["difference"], row["neural_engine_share"]) for row in rows[:3]]
    assert found == [(pytest.approx(embedding.abs().max().item(), abs=1e-5), 0.5)] * 3  # half of what is planned
    assert [(row["median_ms"], row["p90_ms"], row["runs"]) for row in rows] == [(5, 9, 11)] * 6
    assert (rows[5]["device"], rows[5]["os"]) == ("Test iPhone", "iOS 18.1") != (rows[2]["device"], rows[2]["os"])
    asked = prepare.await_args.kwargs["credentials"]
    assert (asked.development_team, asked.bundle_identifier) == ("T", "b") and prepared.session.stop.called
    prepare.side_effect = RuntimeError("why")  # locked, which is met after the work
    monkeypatch.setattr(export, "convert", lambda *_, twin=opened(exported.out): twin)
    fails(capsys, call, "--iphone", "why", "unlock")
    assert len(strict(tmp_path / "export.json")["latency"]) == 5


EXPORT_MISTAKES = [  # flags, words of the line, and what a Mac finds
    *[(f"{name}.pt", f"{name}.pt") for name in ("none", "cut", "foreign")],
    *[("nan.pt --labels brain", "nan.pt finite"), ("a.pt b.pt", "a.pt b.pt one"), ("--team T", "--team --iphone")],
    *[(f"{VIT} --std 1,0,1", "--std"), (f"{VIT} --interpolation nearest", "nearest bicubic"), ("--runs 0", "--runs 0")],
    *[("--model none", "none"), (f"foreign.pt {VIT}", "foreign.pt demo-vit"), ("--precision int8", "int8 fp16")],
    *[(f"--out {out}", f"{out} .mlpackage") for out in ("package", "folder.mlpackage", "list.json")],
    *[(f"--out {out}/a.mlpackage", out) for out in ("foreign.pt", "/proc/dark")],
    *[(f"--labels {name}.json", f"{name}.json") for name in ("none", "list", "ages")],
    *[("--iphone", "--bundle"), (IPHONE, "macOS"), (IPHONE, "none", []), (IPHONE, "why Xcode", RuntimeError("why"))],
]


@pytest.mark.parametrize("flags, words, found", [(*row, None)[:3] for row in EXPORT_MISTAKES])
def test_mistakes_in_the_commands_get_one_line(tmp_path, monkeypatch, capsys, recwarn, flags, words, found):
    monkeypatch.chdir(tmp_path)
    for name, text in {"list.json": "[]", "ages.json": '{"ga": ["{weeks} {day} {pixel_spacing}"]}'}.items():
        Path(name).write_text(text)
    for folder in ("out", "folder.mlpackage"):
        Path(folder).mkdir()
    model = dark.open_model("demo-vit")
    torch.save(model.clip.state_dict(), "foreign.pt")
    Path("cut.pt").write_bytes(Path("foreign.pt").read_bytes()[:-999])
    torch.nn.init.constant_(model.clip.visual.proj, math.nan)
    checkpoint_of(tmp_path / "nan.pt", model)
    monkeypatch.setattr(export, "convert", lambda *_: pytest.fail("got as far as converting"))
    if found is not None:
        a_mac(monkeypatch, found)
    before = listing(tmp_path)
    fails(capsys, lambda: export.main(flags.split()), *words.split())
    assert listing(tmp_path) == before and not [x for x in recwarn if x.category is UserWarning]  # more lines


# ---------------------------------------------------------------- the README


def test_the_commands_of_the_readme_parse():
    options = {"dark": dark.Config, "evaluate": evaluate.Options, "export": export.Options}
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", (HERE / "README.md").read_text(), re.DOTALL | re.MULTILINE))
    commands = re.findall(r"python (\w+)\.py(.*)", shell.replace("\\\n", " "))
    assert {script for script, _ in commands} == {*options} and len(commands) >= 8
    for script, flags in commands:
        dark.given(options[script], shlex.split(flags, comments=True), "")  # unknown flags and wrong values fail


def test_the_snippets_of_the_readme():
    readme, losses, namespace = (HERE / "README.md").read_text(), [], {}
    equations, *snippets = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    image, text, scale, t_image, t_text, t_scale = batch = random_batch()
    S, T = (x * F.normalize(y) @ F.normalize(z).T for x, y, z in ((scale, image, text), (t_scale, t_image, t_text)))
    for s, t in ((S, T), (S.T, T.T)):
        names = dict(student_logits=s, teacher_logits=t, tau=5, beta=-1.6, clip=F.cross_entropy(s, torch.arange(7)))
        exec(equations, names | dict(softmax=lambda x: x.softmax(1), log_softmax=lambda x: x.log_softmax(1)), names)
        losses.append(names["loss"])
    torch.testing.assert_close(sum(losses) / 2, dark.dark_loss(*batch, beta=-1.6)[0])
    for snippet in snippets:
        exec(snippet, namespace)
    assert len(snippets) == 2 and namespace["loss"].isfinite() and namespace["log_scale"] <= math.log(100)
