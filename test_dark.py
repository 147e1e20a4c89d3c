"""python -m pytest: the mathematics against plain references, and the three scripts end to end, offline."""

import argparse
import collections
import copy
import datetime
import hashlib
import inspect
import io
import itertools
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
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from PIL import Image, ImageEnhance, PngImagePlugin
from safetensors.torch import save_file
from torch.utils.data import default_collate

import dark
import evaluate
import export

torch.set_num_threads(1)  # Equal bits need equal threads.
HERE = Path(dark.__file__).parent
REAL = HERE.parent / "shared/real"
TEACHER = f"--teacher demo-teacher --teacher-weights {HERE}/assets/teacher.pt"
SMALL = "--student demo-vit --batch 8 --epochs 2 --warmup 2 --lr 1e-4 --workers 0 --log-every 1 --device cpu"
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(scope="session", autouse=True)
def phantom(tmp_path_factory):
    """The demonstration's data, small, for every test: FOLDER/train-*.tar, FETAL_PLANES_DB, HC18."""
    dark.PHANTOM = tmp_path_factory.mktemp("data") / "phantom"
    subprocess.run([sys.executable, HERE / "assets/phantom.py", dark.PHANTOM, "--pairs", "24"], check=True)
    return dark.PHANTOM


def one_line(capsys, call, *words, code=2):
    """The call must end with that exit code and one line on stderr that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == code, lines
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def contents(folder):
    """Of every file; names that begin with a dot are locks."""
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def unit(x):
    return F.normalize(x, dim=-1)


def log_of(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run(out, flags=""):
    """-> the checkpoint and the log."""
    dark.main(f"{SMALL} --out {out} {flags}".split())
    return torch.load(out / "student.pt", weights_only=True), log_of(out)


# ---------------------------------------------------------------- the loss


def random_batch(n=7, width=5, t_width=9):
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, n, width, generator=draw).double()
    t_image, t_text = torch.randn(2, n, t_width, generator=draw).double()
    scale, t_scale = torch.tensor([12.0, 40.0]).double()
    return [x.clone().requires_grad_() for x in (image, text, scale, t_image, t_text, t_scale)]


def loss_by_loops(image, text, scale, t_image, t_text, t_scale, beta, diag, clip, tau, smooth):
    n = len(image)
    parts = dict(clip=0, diag=0, off=0)
    for rows, columns, t_rows, t_columns in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        for i in range(n):
            s = [scale * unit(rows[i]) @ unit(columns[j]) for j in range(n)]
            t = [(t_scale / tau * unit(t_rows[i]) @ unit(t_columns[j])).exp().item() for j in range(n)]
            for j in range(n):
                log_q = s[j] - sum(x.exp() for x in s).log()
                p = (1 - smooth) * t[j] / sum(t) + smooth / n
                parts["diag" if i == j else "off"] -= p * log_q / (2 * n)
                parts["clip"] -= (i == j) * log_q / (2 * n)
    return clip * parts["clip"] + diag * parts["diag"] + beta * parts["off"], parts


@pytest.mark.parametrize(
    "beta, diag, clip, tau, smooth",
    [(2, 1, 1, 5, 0), (0.3, 0.3, 1, 5, 0.1), (-0.8, 1, 0.3, 1, 0), (-1.6, 2, 0, 5, 0)],
)
def test_loss_and_gradient_equal_the_loops(beta, diag, clip, tau, smooth):
    batch = random_batch()
    weights = dict(beta=beta, diag=diag, clip=clip, tau=tau, smooth=smooth)
    expected, expected_parts = loss_by_loops(*batch, **weights)

    loss, parts = dark.dark_loss(*batch, **weights)

    torch.testing.assert_close((loss, parts), (expected, expected_parts))
    gradient = torch.autograd.grad(loss, batch[:3], retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, batch[:3], retain_graph=True))
    of_teacher = torch.autograd.grad(loss, batch[3:], allow_unused=True)
    assert of_teacher == (None,) * 3


def test_the_loss_is_exact_in_fp32_whatever_the_autocast_compiles_and_lifts_out_of_the_file():
    batch = [x.detach() for x in random_batch(n=256, width=64, t_width=96)]
    batch[1] = batch[0] + 0.1 * batch[1]  # well aligned, and the teacher is confident: off nearly vanishes
    batch[4] = batch[3] + 0.1 * batch[4]
    batch[2] = batch[5] = torch.tensor(100.0).double()
    single = [x.float() for x in batch]
    halves = [x.bfloat16() for x in batch]
    pasted = {"torch": torch, "F": F}
    exec(inspect.getsource(dark.dark_loss), pasted)
    compiled = torch.compile(dark.dark_loss, fullgraph=True, backend="eager")

    exact, exact_parts = dark.dark_loss(*batch, beta=-1.6)
    found = dark.dark_loss(*single, beta=-1.6)

    assert found[0].item() == pytest.approx(exact.item(), abs=1e-6)
    assert found[1]["off"].item() == pytest.approx(exact_parts["off"].item(), rel=1e-4)
    equal(pasted["dark_loss"](*single, beta=-1.6), found)
    equal(compiled(*single, beta=-1.6), found)
    with torch.autocast("cpu", torch.bfloat16):
        equal(dark.dark_loss(*single, beta=-1.6), found)
        assert dark.dark_loss(*halves, beta=-1.6)[0].dtype == torch.float32
    assert dark.dark_loss(*random_batch(n=1), beta=2.0)[0] == 0  # one pair has no other to be taken for


# Weight of diag at the start and at the end, weight of off at the start and at the end.
TABLE_3 = """
no-kd        0  0     0  0
static       1  1     1  1
static-feat  1  1     1  1
decay        1  0.1   1  0.1
full-decay   1  0     1  0
conf-penalty 1  0.1   1  0.1
coupled      1 -0.8   1 -0.8
selective    1  1     2 -1.6
beta4        1  1     4 -3.2
beta8        1  1     8 -6.4
r-0.5        1  1     2 -1
r-0.4        1  1     2 -0.8
"""


def test_the_rows_of_table_3():
    rows = [line.split() for line in TABLE_3.strip().splitlines()]
    assert {name for name, *_ in rows} == {*dark.ABLATIONS}
    for name, *weights in rows:
        cfg = dark.parse_args(["--ablation", name])
        off = [dark.beta_at(step, 10, cfg.beta0, cfg.r) for step in (0, 10)]
        diag = off if cfg.coupled else [cfg.diag, cfg.diag]
        assert diag + off == pytest.approx([float(weight) for weight in weights], abs=1e-12), name


def test_the_weight_crosses_zero_and_the_rate_warms_up_and_falls():
    beta = [dark.beta_at(step, 90, 2.0, -0.8) for step in (0, 50, 90)]
    rate = [dark.lr_at(step, 1000, 1.0, 500) for step in (0, 499, 500, 750, 999)]

    assert beta == pytest.approx([2, 0, -1.6], abs=1e-12)  # zero at T / (1 - r)
    assert rate == pytest.approx([1 / 500, 1, 1, 0.5, 0], abs=1e-5)


def test_a_flag_wins_over_the_ablation_over_the_demonstration_over_the_default(capsys):
    small = dark.parse_args("--ablation conf-penalty --batch 16".split())
    paper = dark.parse_args(
        "--data x.tar --teacher-weights y.pt --ablation beta4 --beta0 3 --micro_batch 9".split()
    )
    by_end = dark.parse_args("--beta0 4 --r -0.8 --r-is-end".split())
    with pytest.raises(SystemExit, match="0"):
        dark.main(["--help"])

    assert "temperature" in capsys.readouterr().out
    assert (small.student, small.batch, small.beta0, small.smooth) == ("demo-fastvit", 16, 1, 0.1)
    assert (paper.student, paper.batch, paper.lr, paper.tau) == ("MobileCLIP2-S0", 1024, 1e-5, 5)
    assert (paper.beta0, paper.micro_batch) == (3, 9)
    assert (by_end.r, by_end.r_is_end) == (-0.2, False)  # r has one meaning in a checkpoint


# ---------------------------------------------------------------- data


def png(grey=9, kind="PNG", **options):
    file = io.BytesIO()
    Image.new("L", (40, 40), grey).save(file, kind, **options)
    return file.getvalue()


def tar(members):
    """Of (name, content); content None is a hard link."""
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.LNKTYPE
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return archive.fileobj.getvalue()


def pair_members(n, broken=()):
    members = []
    for i in range(n):
        members.append((f"{i:04d}.png", b"no image" if i in broken else png(i)))
        members.append((f"{i:04d}.txt", f"caption {i}".encode()))
    return members


@pytest.fixture
def pairs_of(tmp_path, monkeypatch):
    """A source in the test's folder -> the grey value and the caption of each of its pairs."""
    model = dark.open_model("demo-vit")
    monkeypatch.setattr(dark, "augment", lambda image, key: image)

    def pairs_of(source):
        pairs = dark.find_pairs([str(tmp_path / source)])
        data = dark.Pairs(pairs, 0, [model])
        found = []
        for i, (*_, caption) in enumerate(pairs):
            (view,), *_ = data[0, i]
            found.append((round(view.float().mean().item()), caption))
        return found

    return pairs_of


def test_tars_give_their_whole_pairs_and_say_what_is_left_out(tmp_path, pairs_of, capsys):
    members = [("b/1.png", png(200)), ("b/1.txt", b"in a folder"), ("a.seg.png", png()), ("._a.txt", b"x")]
    members += [
        ("a.txt", "\ufeffümlaut\n".encode()),
        ("alone.webp", png(kind="WEBP")),
        ("a.jpeg", png(5, "JPEG")),
    ]
    members += [("link.png", None), ("link.txt", b"x"), ("e.PNG", png(30)), ("e.txt", b" ")]
    (tmp_path / "sub").mkdir()
    for name in ("0.tar", "sub/1.tar", "sub/2.tar"):
        (tmp_path / name).write_bytes(tar(members))

    pairs = pairs_of("0.tar")
    told = capsys.readouterr().out

    assert pairs == [(200, "in a folder"), (5, "ümlaut"), (30, "")]
    assert "4 keys left out" in told
    assert "3 pairs, 1 with an empty caption" in told
    for pattern in ("sub/{1..2}.tar", "sub/*.tar", "**/[12].tar"):
        assert pairs_of(pattern) == pairs * 2


@pytest.mark.parametrize(
    "text",
    [
        '\ufeffimage,caption\na.png,"one, two"\nsub/b.png,"three; four"\n',
        'title, more,filepath \r\n"one, two",,a.png\r\nthree; four,x,sub/b.png\r\n',
        'image;caption\na.png;one, two\n\n./sub/b.png;"three; four"\n',
        "caption\timage\none, two\ta.png\nthree; four\tsub/b.png\n",
    ],
)
def test_tables_are_read_whatever_separates_them(tmp_path, pairs_of, text):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(png(10))
    (tmp_path / "sub/b.png").write_bytes(png(20))
    (tmp_path / "p.csv").write_bytes(text.encode())
    (tmp_path / "q.tsv").write_text('filepath\ttitle\na.png\t"quoted" is the first word\n')

    assert pairs_of("p.csv") == [(10, "one, two"), (20, "three; four")]
    assert pairs_of("q.tsv") == [(10, '"quoted" is the first word')]


class PaddedWithItsEnd:
    """A tokenizer of words that fills up with its mark of the end, 1, as SigLIP's does."""

    context_length = 4

    def __call__(self, texts, context_length=4):
        tokens = torch.ones(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            words = text.split()[: context_length - 1]
            row[: len(words)] = 2
        return tokens


@pytest.mark.parametrize("tokenizer, words", [(None, 38), (PaddedWithItsEnd(), 3)])
def test_captions_that_are_cut_off_are_told_from_those_that_just_fit(tokenizer, words):
    tokenizer = tokenizer or dark.open_model("demo-vit").tokenizer  # 40 tokens, two of them marks
    fits = "a " * words

    _, cut = dark.tokenize(tokenizer, ["a", "", fits, fits + "a", fits * 3])

    assert cut.tolist() == [False, False, False, True, True]


def test_a_view_depends_on_seed_epoch_and_index_and_is_one_for_all_models(phantom):
    pairs = dark.find_pairs([f"{phantom}/train-*.tar"])[:1] * 4  # one image, under four numbers
    small = dark.open_model("demo-vit")
    large = copy.copy(small)
    large.size = 2 * small.size

    def view(epoch, index, seed=42):
        (of_small, of_large), *_ = dark.Pairs(pairs, seed, [small, large])[epoch, index]
        return of_small.float(), F.avg_pool2d(of_large.permute(2, 0, 1).float(), 2).permute(1, 2, 0)

    first, shrunk = view(2, 3)
    distance = (first - shrunk).abs().mean()

    assert first.shape == (64, 64, 3)
    equal(view(2, 3), (first, shrunk))
    for other, _ in (view(1, 3), view(2, 2), view(2, 3, seed=7)):
        assert (other - shrunk).abs().mean() > 1.6 * distance


def test_the_augmentation_keeps_to_the_bounds_of_the_paper_and_reaches_them(monkeypatch):
    drawn = []

    def rotate(image, angle, resample, translate):
        drawn.append([angle, *translate])
        return image

    def enhance(self, factor):
        drawn[-1].append(factor - 1)
        return self.image

    monkeypatch.setattr(Image.Image, "rotate", rotate)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        monkeypatch.setattr(kind, "enhance", enhance)
    for key in range(1000):
        dark.augment(Image.new("RGB", (20, 20)), [key, 0, 0])

    share = np.array(drawn) / [7, 1, 1, 0.15, 0.15, 0.15]  # 7 degrees, 5 % of 20 pixels, 15 %
    assert np.abs(share).max() <= 1
    assert min(*share.max(0), *-share.min(0)) > 0.97


def squared(image, size=40, interpolation="bilinear"):
    return np.asarray(dark.square(image, size, interpolation), int)


@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBA CMYK YCbCr HSV LAB".split())
def test_an_image_of_every_mode_becomes_what_pillow_makes_of_it(mode):
    noise = np.random.default_rng(0).bytes(10800)
    image = Image.frombytes("RGB", (60, 60), noise).convert(mode)

    for name in ("bilinear", "bicubic"):
        expected = image.convert("RGB").resize((25, 25), Image.Resampling[name.upper()])
        assert np.abs(squared(image, 25, name) - expected).max() <= 1


@pytest.mark.parametrize(
    "kind, top", [("<u2", 255), ("<u2", 4095), (">u2", 65535), ("<i4", 4095), ("<f4", 1)]
)
def test_deep_greys_are_scaled(kind, top):
    ramp = np.tile(np.arange(256), (256, 1))
    deep = Image.fromarray((ramp / 255 * top).astype(kind))  # I;16, I;16B, I, F

    assert np.abs(squared(deep, 256)[..., 0] - ramp).max() <= 1


def test_an_image_is_padded_turned_as_its_camera_was_and_read_in_spite_of_broken_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was upright: to be turned by 90 degrees clockwise.
    wide = Image.new("L", (40, 20), 10)
    wide.paste(200, (0, 0, 8, 20))
    file = io.BytesIO()
    wide.save(file, "PNG", exif=exif)
    broken = PngImagePlugin.PngInfo()
    broken.add_text("Raw profile type exif", "\nexif\n 3\nzz")

    assert squared(wide)[:, 20, 0].tolist() == [0] * 10 + [10] * 20 + [0] * 10
    assert squared(Image.open(file))[[3, 36], 20, 0].tolist() == [200, 10]
    assert (squared(Image.open(io.BytesIO(png(77, pnginfo=broken)))) == 77).all()


# ---------------------------------------------------------------- models


def write_model(folder, name, **vision):
    """A model as open_clip writes its folders: assets/models/NAME with changes -> its name for --student."""
    config = json.loads((HERE / f"assets/models/{name}.json").read_text())
    config["vision_cfg"] |= vision
    preprocess = dict(mean=[0.2, 0.3, 0.4], std=[0.3, 0.2, 0.25], interpolation="bilinear")
    folder.mkdir()
    content = json.dumps(dict(model_cfg=config, preprocess_cfg=preprocess))
    (folder / "open_clip_config.json").write_text(content)
    return f"local-dir:{folder}"


def test_the_paper_student_takes_the_statistics_of_its_tag_also_from_a_file(tmp_path):
    model = dark.open_model("MobileCLIP2-S0", context_length=117)
    state = {key.removeprefix("text."): value for key, value in model.clip.state_dict().items()}
    torch.save(state, tmp_path / "s0.pt")  # with a plain CLIP's names
    loaded = dark.open_model("MobileCLIP2-S0", f"{tmp_path}/s0.pt", 117)

    equal(loaded.clip.state_dict(), model.clip.state_dict())
    assert loaded.tokenizer(["a"]).shape == (1, 117)
    for x in (model, loaded):  # not OpenAI's, which open_clip takes for a path
        assert (x.size, x.interpolation) == (256, "bilinear")
        assert [*x.mean, *x.std] == [0, 0, 0, 1, 1, 1]


def intrude():
    Path("intruder").mkdir()


class Intruder:
    """Unpickled as it asks to be, it would make a folder."""

    def __reduce__(self):
        return intrude, ()


def test_weights_open_in_every_form_and_no_code_of_the_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = dark.open_model("demo-fastvit", context_length=20)
    state = source.clip.state_dict()
    beside = {"args": argparse.Namespace(lr=1), "path": Path("x"), "when": datetime.datetime.now()}
    beside |= {"best": np.float64(1), "curve": np.zeros(3), "random": np.random.get_state()}
    beside |= {"counts": collections.defaultdict(int), "intruder": Intruder()}
    forms = [state | {"text.transformer.embeddings.position_ids": torch.arange(20)}]
    for form in (
        "model model.",
        "state_dict module.",
        "state_dict clip.",
        "ema net.",
        "module _forward_module.module.",
    ):
        key, prefix = form.split()
        forms.append(beside | {key: {prefix + name: value for name, value in state.items()}})
    apple = {"trunk.stem.": "trunk.patch_embed.", "conv_kxk": "rbr_conv", "head.fc": "head"}
    forms.append({re.sub("|".join(apple), lambda match: apple[match[0]], key): x for key, x in state.items()})
    for number, content in enumerate(forms):
        torch.save(content, f"{number}.pt")
    save_file({key: x.contiguous() for key, x in state.items()}, "safetensors.bin")

    for path in sorted(tmp_path.iterdir()):
        loaded = dark.open_model("demo-fastvit", str(path), 20)
        equal(loaded.clip.state_dict(), state, msg=path.name)
    assert not Path("intruder").exists()


# ---------------------------------------------------------------- one run, by hand


def begin_as_identity(layer):
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(layer.bias)


def plain_loss(logits, t_logits, diag, beta):
    loss = 0
    for s, t in ((logits, t_logits), (logits.T, t_logits.T)):
        entropy = -(0.9 * t.softmax(1) + 0.1 / 11) * s.log_softmax(1)
        matched = entropy.diagonal().mean()
        loss += F.cross_entropy(s, torch.arange(11)) / 2
        loss += diag * matched / 2
        loss += beta * (entropy.sum(1).mean() - matched) / 2
    return loss


@pytest.mark.parametrize(
    "flags, beta, diag, feature, scale",
    [
        ("--beta0 2 --r -0.8 --diag 0.7", [2, 1.1, 0.2, -0.7], [0.7] * 4, 0, 20),
        ("--ablation coupled", [1, 0.55, 0.1, -0.35], [1, 0.55, 0.1, -0.35], 0, 150),
        ("--ablation static-feat --feature 30", [1] * 4, [1] * 4, 30, 20),
    ],
)
def test_a_run_computes_what_plain_torch_does(
    tmp_path, phantom, monkeypatch, flags, beta, diag, feature, scale
):
    """A student with batch norm, of other size and statistics than its teacher; two epochs of two steps."""
    name = write_model(tmp_path / "student", "demo-fastvit", image_size=64)
    student = dark.open_model(name)
    student.clip.logit_scale.data.fill_(math.log(scale))
    torch.save(student.clip.state_dict(), tmp_path / "start.pt")
    teacher = dark.open_model("demo-teacher", f"{HERE}/assets/teacher.pt").eval()
    data = dark.Pairs(dark.find_pairs([f"{phantom}/train-*.tar"]), 42, [student, teacher])
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", begin_as_identity)  # of the projections
    flags += f" --student {name} --student-weights {tmp_path}/start.pt {TEACHER} --tau 3 --smooth 0.1"
    flags += " --batch 11 --warmup 2 --lr 1e-3 --weight-decay 3 --clip-norm 1e-3"

    checkpoint, _ = run(tmp_path / "out", flags)

    clip = student.clip.train()
    widths = [model.clip.text_projection.shape[1] for model in (student, teacher)]
    projections = torch.nn.ModuleList(torch.nn.Linear(*widths) for _ in range(2 if feature else 0))
    free = []
    decayed = []
    for name, parameter in [*clip.named_parameters(), *projections.named_parameters()]:
        is_free = re.search("bias|bn|norm|ln_|gamma|scale|identity", name)
        (free if is_free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 3}, {"params": free, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    mean, std = torch.tensor([[0.2, 0.3, 0.4], [0.3, 0.2, 0.25]]).view(2, 3, 1, 1)
    for step, lr in enumerate([5e-4, 1e-3, 1e-3, 5e-4]):
        epoch = step // 2
        order = np.random.default_rng([42, epoch]).permutation(24)
        (pixels, t_pixels), (tokens, t_tokens), _ = default_collate(
            [data[epoch, i] for i in order[step % 2 * 11 :][:11]]
        )
        image = unit(clip.encode_image((pixels.permute(0, 3, 1, 2) / 255 - mean) / std))
        text = unit(clip.encode_text(tokens))
        with torch.no_grad():
            t_image = unit(teacher.clip.encode_image(teacher.normalize(t_pixels.permute(0, 3, 1, 2) / 255)))
            t_text = unit(teacher.clip.encode_text(t_tokens))
            t_logits = teacher.clip.logit_scale.exp() / 3 * t_image @ t_text.T
        logits = clip.logit_scale.exp() * image @ text.T
        loss = plain_loss(logits, t_logits, diag[step], beta[step])
        for project, x, t in zip(projections, (image, text), (t_image, t_text)):
            loss += feature * F.mse_loss(unit(project(x)), t)

        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(decayed + free, 1e-3) > 1e-3
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
    found = checkpoint["state_dict"] | checkpoint["projections"]
    torch.testing.assert_close(found, clip.state_dict() | projections.state_dict(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, *run(out)


@pytest.fixture
def forked(tmp_path):
    """(main, flags, before) -> main(flags) after before(), in a process and process group of its own.

    Its stdout, on which only UTF-8 is allowed, and its stderr are files in the test's folder."""
    started = []

    def fork(main, flags, before):
        def child():
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = open(tmp_path / "stdout", "w", encoding="utf-8", errors="strict")
            sys.stderr = open(tmp_path / "stderr", "w", buffering=1)
            before()
            main(flags.split())

        (tmp_path / "stdout").touch()
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        started.append(process)
        return process

    yield fork
    for process in started:
        process.kill()


def ended(process):
    """Waits for the process and its loaders, which hold its sentinel open -> the exit code."""
    assert multiprocessing.connection.wait([process.sentinel], 60), "it, or a loader, is left"
    process.join()
    return process.exitcode


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def before_call(owner, name, number, action):
    """From now on action() comes before that call of owner.name."""
    real = getattr(owner, name)
    calls = itertools.count()

    def replaced(*args):
        if next(calls) == number:
            action()
        return real(*args)

    setattr(owner, name, replaced)


def test_a_run_leaves_what_it_says_and_is_not_overwritten(finished, tmp_path, capsys):
    out, checkpoint, log = finished
    before = contents(out)
    (tmp_path / "other.tar").write_bytes(tar(pair_members(24)))

    run(out, "--resume --workers 1")  # nothing is left to do
    told = capsys.readouterr().out
    one_line(capsys, lambda: run(out), "--resume", "--overwrite")
    one_line(capsys, lambda: run(out, "--resume --beta0 3"), "beta0", "2.0", "3.0")
    one_line(
        capsys, lambda: run(out, f"--resume --data {tmp_path}/other.tar {TEACHER}"), "holds another run: tau"
    )

    assert contents(out) == before
    assert {path.name for path in before} == {"student.pt", "log.jsonl", "curves.png"}
    assert (checkpoint["epoch"], checkpoint["log"]) == (2, log)
    assert [record["step"] for record in log] == list(range(6))
    for record in log:
        parts = record["clip"] + record["diag"] + record["beta"] * record["off"]
        assert record["loss"] == pytest.approx(parts, rel=1e-4)
    for words in ("24 pairs", "2 epochs of 3 steps", "2 -> -1.6", "demo-teacher", "64 px"):
        assert words in told


def test_without_a_teacher_the_loss_is_clip_alone_and_the_checkpoint_describes_the_student(tmp_path):
    name = write_model(tmp_path / "model", "demo-vit")

    _, log = run(tmp_path / "out", f"--ablation no-kd --student {name} --epochs 1 --warmup 0")
    model = dark.model_from_checkpoint(dark.load_checkpoint(tmp_path / "out/student.pt"))

    assert [record["loss"] for record in log] == [record["clip"] for record in log]
    assert "off" not in log[0]
    assert (model.size, model.interpolation, model.training) == (64, "bilinear", False)
    assert (*model.mean, *model.std) == (0.2, 0.3, 0.4, 0.3, 0.2, 0.25)


def test_killed_and_resumed_elsewhere_it_is_the_same_run_to_the_bit_with_dropout(
    tmp_path, phantom, forked, capsys
):
    student = write_model(tmp_path / "model", "demo-vit", patch_dropout=0.5)
    moved = shutil.copytree(phantom, tmp_path / "moved")
    flags = f"--student {student} {TEACHER} --resume --data"
    whole, log = run(tmp_path / "whole", f"{flags} {phantom}/train-*.tar")

    def stand_still():
        (tmp_path / "reached").touch()
        signal.pause()

    command = f"{SMALL} --out {tmp_path}/out {flags} {phantom}/train-*.tar"
    # It is killed while it writes the second checkpoint.
    process = forked(dark.main, command, partial(before_call, os, "replace", 3, stand_still))
    wait_for((tmp_path / "reached").exists)
    one_line(capsys, lambda: dark.main(command.split()), f"{tmp_path}/out", "another run")
    process.kill()
    ended(process)
    assert dark.load_checkpoint(tmp_path / "out/student.pt")["epoch"] == 1
    resumed, resumed_log = run(tmp_path / "out", f"{flags} {moved}/train-*.tar")

    assert resumed_log == log
    equal(resumed["state_dict"], whole["state_dict"])


def test_an_interrupted_run_in_a_notebook_lets_go_of_its_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130") as kept:  # with its frames
        patch.setattr(dark, "lr_at", Mock(side_effect=KeyboardInterrupt))
        run(tmp_path)

    run(tmp_path, "--epochs 1")
    del kept


NO_MEMORY = Mock(side_effect=RuntimeError("unable to allocate shared memory(shm)"))
NO_SPACE = Mock(side_effect=OSError(28, "No space left"))
OUR_FAULT = Mock(side_effect=ZeroDivisionError)
TROUBLE = [  # before which call, what happens; flags, the words of the last line
    ("lr_at", 1, NO_MEMORY, "--workers 1", "--workers 0"),
    ("write_atomically", 1, NO_SPACE, "--workers 1", "No space left"),
    ("augment", 4, OUR_FAULT, "", "ZeroDivisionError"),  # with its traceback
    ("lr_at", 0, partial(shutil.rmtree, "images"), "--data pairs.csv", "No such file"),
    ("lr_at", 9, None, "--lr 1e30 --warmup 0", "not finite"),
    ("lr_at", 9, None, "--data broken.tar --batch 50", "do not decode"),
    ("main", 0, partial(setattr, Image, "MAX_IMAGE_PIXELS", 100), "--data pairs.csv", "decompression bomb"),
]


@pytest.mark.parametrize("name, call, action, flags, words", TROUBLE)
def test_trouble_ends_a_run_with_its_loaders_and_leaves_the_old_one(
    finished, tmp_path, monkeypatch, forked, name, call, action, flags, words
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0], "out")
    Path("broken.tar").write_bytes(tar(pair_members(150, broken=(7, 99))))
    Path("images").mkdir()
    table = "image,caption\n"
    for i in range(24):
        Path(f"images/{i}.png").write_bytes(png(i))
        table += f"images/{i}.png,caption {i}\n"
    Path("pairs.csv").write_text(table)

    flags = f"{SMALL} --out out --overwrite --ablation no-kd --epochs 1 {flags}"
    process = forked(lambda argv: dark.main(argv), flags, partial(before_call, dark, name, call, action))

    assert ended(process) == 1
    lines = Path("stderr").read_text().splitlines()
    assert words in lines[-1]
    assert len(lines) == 1 or action == OUR_FAULT, lines
    assert Path("out/student.pt").read_bytes() == (finished[0] / "student.pt").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_it_with_one_line(tmp_path, forked, number):
    weights = tmp_path / os.fsdecode(b"\xff")  # A name that a strict terminal cannot show.
    weights.symlink_to(HERE / "assets/teacher.pt")
    flags = f"{SMALL} --workers 2 --teacher-weights {weights} --out {tmp_path}"

    process = forked(dark.main, flags, partial(before_call, dark, "lr_at", 4, signal.pause))
    wait_for(
        lambda: b"epoch 1.0/" in (tmp_path / "stdout").read_bytes()
    )  # A line is there when it is written.
    bash(f"pkill -P {process.pid}; sleep 0.3")  # It alone answers, not its loaders.
    os.killpg(process.pid, number)

    assert ended(process) == 130
    assert (tmp_path / "stderr").read_text() == "interrupted\n"


def test_loaders_may_be_spawned(finished, tmp_path, forked):
    process = forked(
        dark.main,
        f"{SMALL} --workers 1 --out {tmp_path}/out",
        partial(multiprocessing.set_start_method, "spawn", force=True),
    )

    assert ended(process) == 0, (tmp_path / "stderr").read_text()
    assert log_of(tmp_path / "out") == finished[2]


class HalfPrecision(torch.autocast):
    """On a CPU as on a GPU."""

    def __init__(self, device_type, dtype=None, enabled=True):
        super().__init__(device_type, dtype, enabled or dtype == torch.bfloat16)


def test_towers_in_bf16_give_the_loss_fp32(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", HalfPrecision)
    loss = Mock(wraps=dark.dark_loss)
    monkeypatch.setattr(dark, "dark_loss", loss)

    _, log = run(tmp_path, "--epochs 1 --micro-batch 4 --warmup 0")

    assert {x.dtype for x in loss.call_args.args} == {torch.float32}
    assert 1e-5 < abs(log[0]["loss"] - finished[2][0]["loss"]) < 0.05


def test_backward_keeps_the_activations_of_one_micro_batch():
    model = dark.open_model("demo-vit")
    pixels = torch.zeros(32, 64, 64, 3, dtype=torch.uint8)
    tokens = model.tokenizer(["a"] * 32)

    def bytes_kept(micro_batch):
        storages = {}

        def keep(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(pixels, tokens, micro_batch)
        return sum(storage.nbytes() for storage in storages.values())

    assert bytes_kept(4) < bytes_kept(32) / 10


def bash(command, folder=HERE):
    """With this Python."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )


TORCHRUN = """torchrun() { python -m torch.distributed.run --standalone "$@"; }
torchrun --nproc_per_node 2 -- dark.py --beta0 2 --r -0.8 """


def test_two_processes_and_micro_batches_give_what_one_gives(tmp_path):
    of_the_second = np.random.default_rng([42, 0]).permutation(100)[30]  # in its share of the first batch
    (tmp_path / "pairs.tar").write_bytes(tar(pair_members(100, broken=[of_the_second])))
    flags = f"--data {tmp_path}/pairs.tar {TEACHER} --batch 50 --feature 50"
    _, log = run(tmp_path / "one", flags)

    done = bash(f"{TORCHRUN} {SMALL} {flags} --micro-batch 10 --out {tmp_path}/two")

    assert done.returncode == 0, done.stderr
    assert log[0]["bad"] == 1
    assert log_of(tmp_path / "two") == [pytest.approx(record, rel=1e-6) for record in log]


def test_several_processes_may_be_a_mistake():
    command = f"python dark.py {SMALL}"

    done = bash(f"WORLD_SIZE=2 {command} & WORLD_SIZE=3 {command}")

    assert done.returncode == 2
    assert done.stderr.count("\n") == 2
    assert "torchrun" in done.stderr
    assert "--batch 8: not divisible" in done.stderr


# ---------------------------------------------------------------- evaluation

VIEWS = "abdomen femur heart cervix kidney spine lips_nose profile_patient".split()
BRAINS = "trans-thalamic trans-cerebellum trans-ventricular".split()
GREY = {name: 10 * place for place, name in enumerate(VIEWS + BRAINS, 1)}
# The rows to train on are exchanged.
PLANES = "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
PLANES += """abdomen;1;Fetal abdomen;Not A Brain;Op. 1;Aloka;0
femur;2;Fetal femur;Not A Brain;Op. 1;Aloka;0
heart;3;Fetal thorax;Not A Brain;Op. 1;Aloka;0
cervix;4;Maternal cervix;Not A Brain;Op. 1;Aloka;0
trans-thalamic;5;Fetal brain;Trans-thalamic;Op. 1;Aloka;0
trans-cerebellum;6;Fetal brain;Trans-cerebellum;Op. 1;Aloka;0
trans-ventricular;7;Fetal brain;Trans-ventricular;Op. 1;Aloka;0
trans-thalamic;8;Fetal brain;Trans-thalamic;Op. 1;Aloka;0
trans-cerebellum;9;Fetal brain;Trans-cerebellum;Op. 1;Aloka;0
trans-ventricular;9;Fetal brain;Trans-ventricular;Op. 1;Aloka;0
abdomen;10;Fetal femur;Not A Brain;Op. 1;Aloka;1
femur;11;Fetal abdomen;Not A Brain;Op. 1;Aloka;1
"""
TABLE = """image,label
Images/abdomen.png,abdomen
Images/femur.png,femur
Images/heart.png,heart
Images/cervix.png,cervix
Images/trans-thalamic.png,brain
Images/trans-cerebellum.png,brain
Images/trans-ventricular.png,brain
Images/trans-thalamic.png,brain
Images/trans-cerebellum.png,brain
Images/trans-ventricular.png,brain
Images/abdomen.png,femur
Images/femur.png,abdomen
"""
# An image shows the age, days after 14 weeks; at 0.08 mm a pixel 15 less. The true heads lie within the WHO's
# percentiles of that day, by 0.01 mm, four times; then above, by 0.01 mm; the last is too small to count.
HEADS = """filename,pixel size(mm),head circumference (mm)
30.png,0.2,166.0260
60.png,0.2,187.7713
70.png,0.08,263.8549
100.png,0.2,286.1697
130.png,0.2,322.5553
30.png,0.2,99.9
"""
VIDEOS = "video,label,patient,train\n" + "".join(f"v{i % 2},{i % 2},{i},{int(i < 10)}\n" for i in range(14))


class GreyReader(torch.nn.Module):
    """A CLIP and its tokenizer. An image is the grey value at its left edge, one direction of 256."""

    context_length = 3

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0).log())
        self.numbers = {"": 0}  # of the texts: their first tokens

    def forward(self, texts, context_length=3):
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            row[0] = self.numbers.setdefault(text, len(self.numbers))
        return tokens

    def encode_text(self, tokens):
        texts = list(self.numbers)
        return torch.stack([self.direction(texts[number]) for number in tokens[:, 0]])

    def encode_image(self, pixels):
        grey = (255 * (0.25 * pixels[:, 0] + 0.5)).round().long()
        is_padded = (grey[:, 0] == 0).all(1)  # above, as the images are wide
        return F.one_hot(grey[:, 32, 1] * is_padded, 256).bfloat16()

    def direction(self, text):
        """An age leads to its day, in one template three days early, in the other late; 0.01 mm are a day.
        The two prompts of a class are of unequal length and lead aside, but their mean does not."""
        age = re.fullmatch(r"(-?3) (\d+) w (\d) d ([\d.]+) mm", text)
        if age:
            late, weeks, day, mm = map(float, age.groups())
            center = 7 * weeks + day - 98 + 100 * (mm - 0.25) + late
            return (-((torch.arange(256) - center) ** 2) / 200).exp()
        name, which = text.split()
        own = torch.zeros(256)
        own[[GREY[part] for part in (BRAINS if name == "brain" else [name])]] = 1
        aside = F.one_hot(torch.tensor(200), 256)
        return 3 * (unit(own) + aside) if which == "long" else unit(own) - aside


@pytest.fixture
def known(tmp_path, monkeypatch):
    """We are in a folder with the data and the prompts of above."""
    monkeypatch.chdir(tmp_path)
    image = Image.new("L", (80, 60), 255)
    for folder in ("Images", "v0", "v1"):
        Path(folder).mkdir()
    Path("training_set").symlink_to("Images")
    for name, grey in [*GREY.items(), *((day, day) for day in range(30, 140, 10))]:
        image.paste(grey, (0, 0, 8, 60))
        image.save(f"Images/{name}.png")
    for video in ("v0", "v1"):
        for frame in (2, 9, 10):
            image.save(f"{video}/frame{frame}.png")
    labels = {name: [f"{name} long", f"{name} short"] for name in [*VIEWS, "brain"]}
    prompts = {name: [f"{name} long", f"{name} short"] for name in BRAINS} | labels
    prompts["ga"] = ["-3 {weeks} w {day} d {pixel_spacing} mm", "3 {weeks} w {day} d {pixel_spacing} mm"]
    Path("FETAL_PLANES_DB_data.csv").write_text(PLANES)
    Path("training_set_pixel_size_and_HC.csv").write_text(HEADS)
    Path("table.csv").write_text(TABLE)
    Path("labels.csv").write_text(VIDEOS)
    Path("prompts.json").write_text(json.dumps(prompts))
    Path("labels.json").write_text(json.dumps(labels), encoding="utf-8-sig")


def measured(flags):
    evaluate.main(f"{flags} --out results.json".split())
    return json.loads(Path("results.json").read_text(), parse_constant=pytest.fail)  # There must be no NaN.


def entropy(logit):
    """Of one logit beside eight that are 0."""
    p = torch.tensor([logit] + [0.0] * 8).softmax(0)
    return -(p * p.log()).sum().item()


@pytest.mark.parametrize("split, views, f1", [("test", 4, 1), ("all", 6, 0.8)])
def test_an_evaluation_with_known_answers(known, monkeypatch, split, views, f1):
    reader = dark.open_model("demo-vit")
    reader.clip = reader.tokenizer = GreyReader()

    def opened(name, weights, context_length, mean, std, interpolation):
        reader.mean = eval(mean)
        reader.std = eval(std)
        return reader

    monkeypatch.setattr(dark, "open_model", opened)
    flags = "--model grey --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --planes . --hc18 . --prompts prompts.json"
    (result,) = measured(f"{flags} --geometry --split {split} --table table.csv --labels labels.json")

    assert result["f1_5plane"] == pytest.approx(f1)
    assert result["f1_3brain"] == 1
    assert result["f1_all"] == pytest.approx((5 * f1 + 3) / 8)
    assert result["table_f1"] == pytest.approx(0.8)
    assert result["table_accuracy"] == pytest.approx(10 / 12)
    expected = (views * entropy(3) + 6 * entropy(math.sqrt(3))) / (
        views + 6
    )  # A brain is one of three directions.
    assert result["entropy"] == pytest.approx(expected, abs=1e-5)
    assert (result["hc18_valid"], result["hc18_n"], result["hc18_validity"]) == (4, 5, 80)
    assert result["hc18_interval"] == pytest.approx([37.5535, 96.3776])  # Wilson's, of 4 in 5
    assert result["hc18_spearman"] == pytest.approx(1)
    assert result["avg"] == pytest.approx((result["f1_all"] + 0.8) / 2)


def test_a_student_is_compared_with_its_teacher_by_ranks_and_probes_of_sixteen_frames(
    known, finished, monkeypatch
):
    embed_images = Mock(wraps=evaluate.embed_images)
    monkeypatch.setattr(evaluate, "embed_images", embed_images)
    monkeypatch.setattr(evaluate, "probe", lambda rows, label, features, score: (float(features.std()), 0))
    torch.save(dark.open_model("demo-fastvit").clip.state_dict(), "fastvit.pt")
    shutil.copy(finished[0] / "student.pt", ".")
    flags = "student.pt --model demo-fastvit --weights fastvit.pt"
    flags += " --teacher demo-fastvit --teacher-weights fastvit.pt"

    own, same = measured(f"{flags} --planes . --chd . --geometry --plots --table table.csv --labels planes")

    assert own["table_f1"] == own["f1_5plane"]
    retained = 100 * own["chd_auroc"] / same["chd_auroc"]
    assert own["chd_auroc_retention_percent"] == pytest.approx(retained) != 100
    assert own["teacher_rank_correlation"] < 0.9
    assert same["teacher_rank_correlation"] == pytest.approx(1)
    frames = [path.stem for path in embed_images.call_args.args[1]]
    assert frames[:16] == ["frame2"] * 4 + ["frame9"] * 8 + ["frame10"] * 4
    assert len(list(Path().glob("*.png"))) == 2  # a figure for each


def test_seeds_are_averaged_where_nothing_else_differs(known, finished):
    checkpoint = finished[1]
    for name, seed, beta0, epoch in (("a", 42, 2, 2), ("b", 7, 2, 2), ("c", 1, 4, 2), ("d", 9, 2, 1)):
        config = checkpoint["config"] | dict(seed=seed, beta0=beta0, out=name)
        weights = checkpoint["state_dict"] | {"text_projection": torch.eye(64, 128).roll(seed, 0)}
        torch.save(checkpoint | dict(epoch=epoch, config=config, state_dict=weights), f"{name}.pt")

    *records, mean = measured("a.pt b.pt c.pt d.pt --planes .")

    first, second = [record["f1_all"] for record in records[:2]]
    assert mean["seeds"] == [42, 7]
    assert mean["mean"]["f1_all"] == pytest.approx((first + second) / 2)
    assert mean["sd"]["f1_all"] == pytest.approx(abs(first - second) / math.sqrt(2)) != 0


def test_probes_keep_patients_together_and_are_scored_on_the_test_rows(monkeypatch):
    rows = [
        dict(label="ab"[i % 2] * (i > 0), patient=i // 3, train=i < 30) for i in range(42)
    ]  # one without label
    side = np.array([[(i + 0.1) * (-1) ** i] for i in range(42)])  # tells the label, and here the patient
    turned = side * [[1 if row["train"] else -1] for row in rows]
    patients = set()
    fit = evaluate.linear_model.LogisticRegression.fit

    def noted(layer, x, y):
        patients.add(len({int(abs(value)) // 3 for value in x[:, 0]}))
        return fit(layer, x, y)

    monkeypatch.setattr(evaluate.linear_model.LogisticRegression, "fit", noted)

    assert evaluate.probe(rows, "label", side) == (1, 0)
    assert patients == {8}  # of ten: two are held out whole
    assert evaluate.probe(rows, "label", turned) == (0, 0)


def test_validity_is_judged_at_the_median_of_the_fifteen_most_similar_days():
    def peak(*days):
        return torch.zeros(175).index_copy(0, torch.tensor(days), torch.rand(15) + 1)

    late = peak(*range(50, 65))
    edge = peak(*range(14), 174)
    gap = peak(*range(40, 48), *range(100, 107))
    similarity = torch.stack([late, edge, gap, late, torch.zeros(175), late, gap])
    # The percentiles are 182.771 and 216.114 mm on day 155, 165.7 and 197.759 mm on day 145.
    hc = torch.tensor([182.78, 342.01, 197.75, 216.12, 100.0, 182.76, 99.9])

    score = evaluate.validity(similarity, hc)

    assert score["days"].tolist() == [155, 105, 145, 155, 105, 155, 145]  # ties to the younger
    assert (score["valid"], score["n"], score["rate"]) == (3, 5, 0.6)  # The second and the last do not count.


def test_macro_f1_and_geometry_by_hand():
    cross = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    expected = dict(effective_dimension=2, rank95=2, silhouette=-0.5, intra_cosine=-1, inter_cosine=0)
    expected[
        "uniformity"
    ] = -4.3963490  # log of the mean of exp(-2 d), the squared distances being 4, 4, and 2

    f1 = evaluate.macro_f1([0, 0, 1, 2, 3, 1], [0, 1, 1, 1, 4, 4])  # 2 and 3 are no true label
    found = evaluate.geometry(cross, ["x", "x", "y", "y"])

    assert f1 == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.skipif(not REAL.exists(), reason="has no real images")
def test_the_published_tables_are_read_as_published():
    rows = evaluate.planes_table(REAL / "FETAL_PLANES_DB", "test")
    scored = [row for row in rows if row["scored"] and row["brain"]]

    assert (len(rows), len(scored)) == (1003, 462)


# ---------------------------------------------------------------- export

# What the operations of a converted FastViT mean (MIL's documentation): its graph runs without Core ML.
MIL = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "real_div": torch.div,
    "maximum": torch.clamp,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": torch.softmax,
    "reduce_mean": torch.mean,
    "reshape": torch.reshape,
    "tile": torch.tile,
    "linear": F.linear,
    "cast": lambda x, dtype: x,
    "gelu": lambda x, mode: {"EXACT": F.gelu}[mode](x),
    "reduce_l2_norm": lambda x, axes, keep_dims: x.norm(dim=axes, keepdim=keep_dims),
    "conv": lambda x, w, bias, step, _, pad, spread, groups: F.conv2d(
        x, w, bias, step, pad[::2], spread, groups
    ),
}


def opened(path):
    return export.ct.models.MLModel(str(path), skip_model_load=True)


def squares():
    """(4, 3, 48, 48) pixels of 0 to 255 in coarse squares, so that no two images look alike."""
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return (255 * F.interpolate(coarse, 48)).round()


def constant(value):
    value = np.asarray(value)
    if value.ndim and value.dtype.kind == "f":
        return torch.tensor(value).float()
    return value.tolist()


@torch.no_grad()
def computed(path):
    """What the package says to `squares` -> embeddings, probabilities, its operations."""
    spec = opened(path).get_spec()
    program = load_program(spec, spec.specificationVersion, opened(path).weights_dir).functions["main"]
    answers = []
    for image in squares().split(1):
        values = {"image": image}
        for operation in program.operations:
            result = operation.outputs[0]
            if operation.op_type == "const":
                values[result.name] = constant(result.val)
            else:
                inputs = [values[x.name] for x in operation.inputs.values() if x is not None]
                values[result.name] = MIL[operation.op_type](*inputs)
        answers.append([values[x.name] for x in program.outputs])
    embeddings, probabilities = map(torch.cat, zip(*answers))
    return embeddings, probabilities, program.operations


@torch.no_grad()
def expected(model, prompts):
    """-> embeddings, probabilities."""
    embeddings = unit(model.clip.encode_image(model.normalize(squares() / 255)))
    assert torch.pdist(embeddings).min() > 0.02  # The images are told apart.
    logits = model.clip.logit_scale.exp() * embeddings @ evaluate.class_embeddings(model, prompts).T
    return embeddings, logits.softmax(1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """-> a model with batch norms far from their start, its checkpoint, its package over an older one."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint = folder / "student.pt"
    content, _ = run(folder, "--ablation no-kd --student demo-fastvit --epochs 1 --warmup 0")
    content["preprocess"] |= dict(mean=(0.3, 0.4, 0.5), std=(0.2, 0.25, 0.3), interpolation="bilinear")
    for name, value in content["state_dict"].items():
        if name.endswith("running_var"):
            value.uniform_(0.2, 1)
    torch.save(content, checkpoint)
    package = folder / "MobileFetalCLIP.mlpackage"
    package.mkdir()
    (package / "Manifest.json").touch()
    export.main(f"{checkpoint} --labels planes --runs 3".split())
    return dark.model_from_checkpoint(content), checkpoint, package


def test_a_package_computes_what_pytorch_computes_and_says_what_it_is(exported):
    model, checkpoint, path = exported
    prompts = evaluate.PROMPTS["planes"]
    expected_embeddings, expected_probabilities = expected(model, prompts)

    embeddings, probabilities, operations = computed(path)
    about = opened(path).user_defined_metadata
    report = json.loads(path.with_name("export.json").read_text())

    assert (embeddings.norm(dim=1) - 1).abs().max() < 1e-6
    assert (embeddings - expected_embeddings).norm(dim=1).max() < 2e-2  # what weights in fp16 cost
    assert (probabilities - expected_probabilities).abs().max() < 1e-2
    precisions = {operation.op_type: operation.outputs[0].dtype.__name__ for operation in operations}
    assert [
        precisions[kind] for kind in ("conv", "gelu", "reduce_l2_norm", "softmax")
    ] == "fp16 fp16 fp32 fp32".split()
    assert json.loads(about["labels"]) == report["labels"] == list(prompts)
    assert (about["mean"], about["std"]) == ("[0.3, 0.4, 0.5]", "[0.2, 0.25, 0.3]")
    assert (about["interpolation"], about["source"], about["epoch"]) == ("bilinear", str(checkpoint), "1")
    assert about["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert [row["runtime"] for row in report["latency"]] == ["PyTorch unfused", "PyTorch fused"]
    assert 0 < report["fuse_difference"] < 1e-9
    files = contents(path)
    assert {file.name for file in files} == {"Manifest.json", "model.mlmodel", "weight.bin"}
    assert {file.stat().st_mode for file in files} == {checkpoint.stat().st_mode}  # as the umask says


def test_a_package_in_fp32_of_own_labels_is_exact(exported, tmp_path):
    model, checkpoint, _ = exported
    prompts = {"thigh": ["a femur", "a thigh"], "head": ["a fetal head"]}
    (tmp_path / "labels.json").write_text(
        json.dumps(prompts | {"ga": ["{weeks} w {day} d {pixel_spacing} mm"]})
    )

    flags = f"--out {tmp_path}/a.mlpackage --precision fp32 --labels {tmp_path}/labels.json --runs 1"
    export.main(f"{checkpoint} {flags}".split())

    *found, _ = computed(tmp_path / "a.mlpackage")
    torch.testing.assert_close(found, [*expected(model, prompts)], atol=1e-5, rtol=1e-4)


def test_a_model_in_a_folder_is_exported_beside_the_trained_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write_model(tmp_path / "model", "demo-vit", patch_dropout=0.5)  # not in eval mode
    torch.save(dark.open_model("demo-vit").clip.state_dict(), "model/open_clip_pytorch_model.bin")

    export.main(f"--model {name} --runs 2 --mean 0.1,0.2,0.3 --interpolation bicubic".split())

    (package,) = Path("out").glob("*.mlpackage")
    report = json.loads(package.with_suffix(".json").read_text())
    about = opened(package).user_defined_metadata
    assert package.stem != "MobileFetalCLIP"
    assert (about["mean"], about["std"]) == ("[0.1, 0.2, 0.3]", "[0.3, 0.2, 0.25]")
    assert about["interpolation"] == "bicubic"
    assert report["fuse_difference"] is None  # A ViT has nothing to fuse.
    attention = 4 * 2 * 65**2 * 128  # 65 tokens of width 128 in 4 layers
    assert report["gmacs_by_kind"]["attention"] == pytest.approx(attention / 1e9)


@torch.no_grad()
def test_fusing_is_checked_and_changes_nothing(exported, monkeypatch, capsys):
    tower = export.Phone(exported[0], None)
    images = squares() / 255

    fused, change = export.fuse(tower, images)

    assert 0 < change < 1e-12
    torch.testing.assert_close(fused(images), tower(images), rtol=0, atol=1e-5)
    next(fused.double().parameters()).mul_(1 + 1e-5)
    monkeypatch.setattr(timm.utils, "reparameterize_model", lambda tower: fused)
    one_line(capsys, lambda: export.fuse(tower, images), "fusing")


def test_what_cannot_be_written_or_converted_leaves_the_old_package(exported, tmp_path, monkeypatch, capsys):
    old = shutil.copytree(exported[2], tmp_path / "old.mlpackage")
    before = contents(tmp_path)
    call = partial(export.main, f"{exported[1]} --out {old} --runs 1".split())

    with monkeypatch.context() as patch:
        patch.setattr(export.ct.models.MLModel, "save", NO_SPACE)
        one_line(capsys, call, "No space left", code=1)
    monkeypatch.setattr(F, "normalize", lambda x, dim: x.cummax(dim)[0])  # is unknown to coremltools
    one_line(capsys, call, "cummax", "demo-fastvit")

    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == [old]


# ---------------------------------------------------------------- mistakes, imports, the README

MISTAKES = """
dark --bogus 1                                                | bogus
dark --beta0 nan                                              | --beta0 nan
dark --epochs many                                            | epochs many
dark --batch 1                                                | --batch 1
dark --epochs 0                                               | --epochs 0 1
dark --log-every 0                                            | --log-every 0 1
dark --workers -2                                             | --workers -2
dark --seed -1                                                | --seed -1
dark --micro-batch -1                                         | --micro-batch -1
dark --warmup -1                                              | --warmup -1
dark --tau 0                                                  | --tau 0
dark --lr 0                                                   | --lr 0
dark --clip-norm 0                                            | --clip-norm 0
dark --smooth 1                                               | --smooth 1
dark --r=-inf                                                 | --r -inf
dark --weight-decay -1                                        | --weight-decay -1
dark --device cuda:99                                         | cuda:99 cpu
dark --ablation nope                                          | nope selective
dark --r-is-end                                               | --r-is-end --beta0
dark --resume --overwrite                                     | --resume
dark --batch 25 --data good.tar                               | --batch 25 24
dark --warmup 6 --data good.tar                               | --warmup 6 5
dark --ablation selective --data good.tar                     | --teacher-weights no-kd
dark --student demo-vitt                                      | demo-vitt demo-vit
dark --student RN50 --student-weights nope                    | nope cc12m
dark --ablation static --teacher ViT-L-14 --teacher-weights openai    | openai ViT-L-14-quickgelu
dark --student-weights html.pt                                | html.pt web
dark --student-weights lfs.pt                                 | lfs.pt LFS
dark --student-weights whole.pt                               | whole.pt model
dark --student-weights two.pt                                 | two.pt student.logit_scale teacher.logit_scale
dark --student demo-fastvit --student-weights ours.pt         | ours.pt demo-vit
dark --student-weights bit.pt                                 | bit.pt damaged
dark --out good.tar                                           | good.tar
dark --data missing-*.tar                                     | missing-*.tar there
dark --data {0..9.tar                                         | {0..9.tar
dark --data folder.mlpackage                                  | folder.mlpackage
dark --data empty.tar                                         | empty.tar
dark --data cut.tar                                           | cut.tar truncated
dark --data dup.tar                                           | dup.tar 0000
dark --data latin1.tar                                        | latin1.tar x.txt UTF-8
dark --data header.csv                                        | header.csv image caption
dark --data ragged.csv                                        | ragged.csv line 3
dark --data quote.csv                                         | quote.csv
dark --data absent.csv                                        | absent.csv no.png
evaluate none.pt --table own.csv --labels brain               | none.pt
evaluate two.pt --table own.csv --labels brain                | two.pt version
evaluate ours.pt --table own.csv                              | --table --labels
evaluate ours.pt --table own.csv --labels brain --batch 0     | --batch 1
evaluate ours.pt --table own.csv --labels brain --probe       | --probe --planes
evaluate ours.pt --table own.csv --labels brain --weights a   | --weights --model
evaluate ours.pt --table own.csv --labels brain --out .       | --out folder
evaluate ours.pt --table own.csv --labels own.csv             | own.csv
evaluate ours.pt --planes .                                   | FETAL_PLANES_DB_data.csv
evaluate ours.pt --chd .                                      | labels.csv
evaluate nan.pt --table own.csv --labels brain                | finite
evaluate --model demo-vit --std 1,0,1 --table own.csv --labels brain   | --std 1,0,1
evaluate --model demo-vit --context-length 5 --table own.csv --labels brain   | prompt 5
evaluate --model demo-vit --hc18 .                            | 70.png nan
evaluate ours.pt --table own.csv --labels planes              | own.csv trans-thalamic femur
evaluate ours.pt --table own.csv --labels brain --out /proc/a | /proc/a
export nan.pt --labels brain                                  | nan.pt finite
export ours.pt --out folder.mlpackage                         | folder.mlpackage
export ours.pt --out /proc/dark/a.mlpackage                   | /proc/dark
export ours.pt --precision int8                               | int8 fp16
export ours.pt --model demo-vit                               | ours.pt demo-vit
export ours.pt --weights ours.pt                              | --weights --model
export ours.pt --runs 0                                       | --runs 0
export --team T                                               | --team --iphone
"""


@pytest.fixture(scope="module")
def wrong(finished, tmp_path_factory):
    """A folder of files that are wrong in some way."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "folder.mlpackage").mkdir()
    ours = finished[1]
    state = ours["state_dict"]
    nan = state | {"visual.proj": math.nan * state["visual.proj"]}
    scale = torch.zeros(99)
    weights = {
        "ours.pt": ours,
        "nan.pt": ours | {"state_dict": nan},
        "whole.pt": torch.nn.Linear(1, 1),
        "two.pt": {"student.logit_scale": scale, "teacher": {"logit_scale": scale}},
        "bit.pt": scale,
    }
    for name, content in weights.items():
        torch.save(content, folder / name)
    files = {
        "html.pt": b"\n<!DOCTYPE html>",
        "lfs.pt": b"version https://git-lfs.github.com/spec/v1",
        "bit.pt": (folder / "bit.pt").read_bytes().replace(bytes(396), b"1" + bytes(395)),
        "good.tar": tar(pair_members(24)),
        "empty.tar": b"",
        "cut.tar": tar(pair_members(3))[:1024],
        "dup.tar": tar([*pair_members(1), ("0000.jpg", png())]),
        "latin1.tar": tar([("x.png", png()), ("x.txt", b"\xfc")]),
        "header.csv": b"image,title\na,b\n",
        "ragged.csv": b"image,caption\na,b\na,b,c\n",
        "quote.csv": b'image,caption\nown.png,"a\n',
        "absent.csv": b"image,caption\nno.png,a\nno.png,b\n",
        "own.csv": b"image,label\nown.png,trans-thalamic\n",
        "own.png": png(),
        "training_set_pixel_size_and_HC.csv": HEADS.replace("0.08", "nan").encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_a_mistake_gets_one_line_and_nothing_is_written(wrong, monkeypatch, capsys, line):
    monkeypatch.chdir(wrong)
    flags, words = line.split("|")
    script, flags = flags.split(maxsplit=1)
    if script == "dark":
        flags = f"{SMALL} --ablation no-kd {flags}"
    main = {"dark": dark.main, "evaluate": evaluate.main, "export": export.main}[script]
    before = contents(wrong)

    one_line(capsys, lambda: main(flags.split()), *words.split())

    assert contents(wrong) == before


IMPORT = """
import logging, os, signal, sys, threading, warnings
logging.basicConfig(level=logging.INFO)
import coremltools.models.ml_program.experimental.perf_utils, matplotlib.figure, open_clip
import sklearn.linear_model, sklearn.model_selection, torch.distributed.nn, torchvision, tyro, timm

def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)]
    streams = sys.stdout, sys.stdout.line_buffering, sys.stdout.errors
    logs = logging.root.manager.disable, logging.root.level, logging.root.handlers
    threads = threading.active_count(), torch.get_num_threads()
    return handlers, streams, logs, threads, list(warnings.filters), dict(os.environ), os.getcwd()

before = state()
sys.modules["fcntl"] = None  # as on Windows
import dark, evaluate, export
assert state() == before
"""


def test_an_import_changes_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=HERE, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def readme(language):
    text = (HERE / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_command_of_the_readme_parses():
    shell = "".join(readme("sh")).replace("\\\n", " ").replace("...", "")
    options = {"dark": dark.Config, "evaluate": evaluate.Options, "export": export.Options}

    for script, flags in re.findall(r"(?:python|--) (\w+)\.py(.*)", shell):
        dark.parse_flags(options[script], shlex.split(flags, comments=True), "")


def test_the_first_commands_of_the_readme_run(tmp_path, phantom):
    """In a copy of the project with a small phantom, in few steps."""
    project = shutil.copytree(
        HERE, tmp_path / "project", ignore=shutil.ignore_patterns(".*", "phantom", "out")
    )
    (project / "phantom").symlink_to(phantom)
    commands = re.findall(r"(?m)^python \w+\.py.*", readme("sh")[0])
    train, measure, convert = commands
    train += " --epochs 1 --batch 8 --warmup 1"

    # The two others at a time.
    done = bash(f"{train} && {{ {measure} --probe & {convert} --runs 1 && wait $!; }}", project)

    assert done.returncode == 0, done.stderr
    assert (project / "out/results.json").exists()
    assert (project / "out/export.json").exists()


def test_the_snippets_of_the_readme_run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").symlink_to(finished[0])
    Path("assets").symlink_to(HERE / "assets")
    names = {}

    for snippet in readme("python")[1:]:  # The first are equations.
        exec(snippet, names)

    assert names["loss"].isfinite()
    assert names["log_scale"] <= math.log(100)
