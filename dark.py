"""DARK: distil a large CLIP into a phone-sized one: imitate its matches and, later, repel its confusions.

    loss = CLIP + diag + beta(t) * off        beta(t) = beta0 * (1 - t/T * (1 - r))

`diag` and `off` are the matched and the non-matched terms of the teacher-student cross-entropy. The weight
of `diag` stays 1; that of `off` falls from beta0 > 0 (imitate) through zero to r * beta0 < 0 (repel).
Paper: arXiv 2603.05421.

    python dark.py --beta0 2 --r -0.8                  # the demonstration, which downloads nothing
    python dark.py --data 'shards/{000000..000024}.tar' --context-length 117 --micro-batch 256 \
        --teacher-weights FetalCLIP_weights.pt --student-weights dfndr2b   # the paper's run
    torchrun --nproc_per_node 4 -- dark.py ...         # on four GPUs; --batch is still the total

The file reads from top to bottom: configuration; schedules and loss; models; data; training; errors,
checkpoints and command line. To see the method alone, read `dark_loss` and `train`.
"""

import atexit
import csv
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import open_clip
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from braceexpand import braceexpand
from joblib import cpu_count
from PIL import Image, ImageEnhance, ImageOps
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK") or 0)  # set by torchrun, as WORLD_SIZE is
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
# Processes that read images, by default. joblib counts the cores that this container, job or process may use.
WORKERS = max(1, min(16, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1) - 1))

# ---------------------------------------------------------------- configuration

# The rows of Table 3. What a row leaves out keeps the default below; the defaults are the row `selective`.
# Coupled rows give both terms one weight, lambda(t) of Eq. 5; r = 1 keeps it constant.
ABLATIONS = {
    "no-kd": dict(coupled=True, beta0=0.0, r=1.0),
    "static": dict(coupled=True, beta0=1.0, r=1.0),
    "static-feat": dict(coupled=True, beta0=1.0, r=1.0, feature=2000.0),
    "decay": dict(coupled=True, beta0=1.0, r=0.1),
    "full-decay": dict(coupled=True, beta0=1.0, r=0.0),
    "conf-penalty": dict(coupled=True, beta0=1.0, r=0.1, smooth=0.1),
    "coupled": dict(coupled=True, beta0=1.0),
    "selective": dict(),
    "beta4": dict(beta0=4.0),
    "beta8": dict(beta0=8.0),
    "r-0.5": dict(r=-0.5),
    "r-0.4": dict(r=-0.4),
}


@dataclass
class Config:
    """Every setting; each is also a flag of the command line. The defaults are the paper's."""

    beta0: float = 2.0  # beta_0 of Eq. 7: weight of the off-diagonal at step 0
    r: float = -0.8  # r of Eq. 7: the weight ends at r * beta0
    r_is_end: bool = False  # take --r as the final weight, as the authors' configurations do
    diag: float = 1.0  # weight of the diagonal (Eq. 6)
    coupled: bool = False  # Eq. 4: the diagonal has the weight of the off-diagonal, lambda(t) of Eq. 5
    tau: float = 5.0  # tau of Eq. 2: temperature of the teacher's softmax only
    smooth: float = 0.0  # epsilon of the confidence-penalty row: share of the target that is spread evenly
    feature: float = 0.0  # weight of the feature-KD row's mean squared error (2000 in the paper)
    ablation: Literal[("", *ABLATIONS)] = ""  # a row of Table 3 sets the flags above; a flag beside it wins
    teacher: str = "ViT-L-14"  # open_clip name (of FetalCLIP: ViT-L-14; of OpenAI's: ViT-L-14-quickgelu)
    teacher_weights: str = ""  # PATH (a checkpoint of this script works too) or open_clip TAG
    student: str = "MobileCLIP2-S0"  # open_clip name; hf-hub:... and local-dir:... bring their weights
    student_weights: str = ""  # PATH or open_clip TAG; without either the student starts at random
    context_length: int = 0  # tokens, of both models (117 for FetalCLIP); 0: each model's own
    data: tuple[str, ...] = ()  # pairs.csv | pattern of tars, one or more; without it the demonstration runs
    epochs: int = 20  # passes over the data
    batch: int = 1024  # N, pairs in a batch over all processes; the loss sees all of them
    micro_batch: int = 0  # pairs whose activations a process keeps at a time; 0: its whole share of N
    lr: float = 1e-5  # peak learning rate (AdamW, betas 0.9 and 0.98, eps 1e-6)
    warmup: int = 500  # optimizer steps of linear warm-up before the cosine
    weight_decay: float = 0.1  # of matrices and kernels; vectors and scalars have none
    clip_norm: float = 1.0  # largest L2 norm of the gradient
    seed: int = 42  # of the weights, the order of the pairs and their augmentation
    out: str = "out"  # folder for student.pt, log.jsonl and curves.png
    workers: int = -1  # loader processes; -1: one fewer than this process's share of the cores, 1 to 16
    device: str = "auto"  # auto (cuda if available, else cpu) | cpu | cuda | cuda:N | mps
    log_every: int = 10  # optimizer steps between two lines of log.jsonl
    resume: bool = False  # go on from the checkpoint in --out, if there is one
    overwrite: bool = False  # replace the run in --out


# The defaults without --data. The teacher's logit scale is 19.3; 19.3 / 0.9 = 21 is near the paper's 100 / 5.
DEMONSTRATION = dict(
    student="demo-fastvit",
    teacher="demo-teacher",
    teacher_weights=str(HERE / "assets/teacher.pt"),
    epochs=5,
    batch=64,
    lr=3e-3,
    warmup=150,
    tau=0.9,
)
PHANTOM = HERE / "phantom"  # the demonstration's data, which assets/phantom.py draws

# ---------------------------------------------------------------- schedules and loss


def beta_at(step, total, beta0, r):
    """Weight of the off-diagonal at step `step` of `total`: Eq. 7, the same formula as lambda(t) of Eq. 5.

    For r < 0 it crosses zero at step total / (1 - r).
    """
    return beta0 * (1 - step / total * (1 - r))


def lr_at(step, total, peak, warmup):
    """Learning rate of optimizer step `step` of `total`: linear over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def dark_loss(image, text, scale, t_image, t_text, t_scale, *, beta, diag=1.0, clip=1.0, tau=5.0, smooth=0.0):
    """CLIP loss plus selective repulsive distillation over one batch of N matched image-text pairs.

    image, text       (N, D) embeddings of the student
    t_image, t_text   (N, D_t) embeddings of the teacher, which receives no gradient. All four are normalised
                      here; where several processes share a batch, gather them first (see `gather`)
    scale, t_scale    0-d logit scales. Bound `scale` to at most 100 after every optimizer step: a
                      negative `beta` rewards larger logits without end, and nothing else stops it
    beta              weight of the off-diagonal, the pairs that do not match (see `beta_at`)
    diag, clip        weights of the diagonal and of the CLIP loss; diag = beta gives Eq. 4
    tau               temperature of the teacher alone. The student is not softened, so its gradients do
                      not shrink, and no factor tau**2 makes up for it. Choose tau so that t_scale / tau is
                      near 20, as in the paper (100 / 5): 14 / 5 makes an almost uniform target, against
                      which repulsion pushes all pairs apart equally
    smooth            epsilon: the target becomes (1 - epsilon) * p + epsilon / N

    Returns the loss, clip * CLIP + diag * diagonal + beta * off-diagonal, and its three terms, detached. All
    is computed in fp32 under any autocast (bf16 steps by 0.5 at logits of 100); float64 inputs stay float64.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, t_image, t_text = (
            F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
            for x in (image, text, t_image, t_text)
        )
        logits = scale * image @ text.T  # (N, N): rows images, columns texts
        with torch.no_grad():
            t_logits = t_scale / tau * t_image @ t_text.T  # (N, N), softened by tau for Eq. 2

        # Each direction counts half: image to text, then, transposed, text to image.
        clip_loss = kd_diag = kd_off = 0.0
        for student_logits, teacher_logits in ((logits, t_logits), (logits.T, t_logits.T)):
            log_q = student_logits.log_softmax(1)  # (N, N), at the student's own scale
            p = teacher_logits.softmax(1)  # (N, N), Eq. 2: only the teacher is softened
            p = (1 - smooth) * p + smooth / len(p)
            cross_entropy = -p * log_q  # (N, N), Eq. 3: H(p, q) is the mean of its row sums
            matched = cross_entropy.diagonal()  # (N,)
            clip_loss = clip_loss - log_q.diagonal().mean() / 2  # Eq. 1
            kd_diag = kd_diag + matched.mean() / 2  # Eq. 6, first term: j = i
            kd_off = kd_off + (cross_entropy.sum(1) - matched).mean() / 2  # Eq. 6, second term: j != i
        loss = clip * clip_loss + diag * kd_diag + beta * kd_off  # Eq. 6; Eq. 4 where diag = beta
    return loss, {"clip": clip_loss.detach(), "diag": kd_diag.detach(), "off": kd_off.detach()}


def gather(x):
    """(n, d) on each of W processes -> (W * n, d) on all, with gradient. With one process, x itself.

    Every process computes the loss of the whole batch. Backward sums their equal gradients, which is W times
    too much; DDP's average over the processes divides that out.
    """
    if not dist.is_initialized():
        return x
    return torch.cat(all_gather(x))


# ---------------------------------------------------------------- models

PREPROCESS = ("size", "mean", "std", "interpolation")


class Model(nn.Module):
    """An open_clip model with its tokenizer and preprocessing: size in pixels; mean and std for 0..1."""

    def __init__(self, name, clip, tokenizer, preprocess):
        super().__init__()
        self.name = name
        self.clip = clip
        self.tokenizer = tokenizer
        vars(self).update({key: preprocess[key] for key in PREPROCESS})  # self.size, self.mean and so on

    def normalize(self, pixels):
        """(n, 3, size, size) in 0..1 -> the same shape, normalised for the image tower."""
        # Not blocking: the CPU need not wait for the GPU.
        mean, std = torch.tensor([self.mean, self.std]).view(2, 3, 1, 1).to(pixels.device, non_blocking=True)
        return (pixels - mean) / std

    def embed(self, pixels, tokens):
        """(n, size, size, 3) uint8, (n, context) -> image (n, D), text (n, D), both fp32."""
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
            image = self.clip.encode_image(self.normalize(pixels.permute(0, 3, 1, 2) / 255))
            text = self.clip.encode_text(tokens)
        return image.float(), text.float()

    def forward(self, pixels, tokens, micro_batch):
        """Returns what `embed` does, and the logit scale.

        Beyond `micro_batch` pairs activations are dropped: backward computes them again, one micro-batch at
        a time. The loss still sees all n embeddings at once, which gradient accumulation would not give.
        Batch norm sees one micro-batch at a time, and updates its running statistics twice.
        """
        if micro_batch >= len(tokens):
            image, text = self.embed(pixels, tokens)
        else:
            micro_batches = zip(pixels.split(micro_batch), tokens.split(micro_batch))
            embeddings = [recompute(self.embed, *inputs, use_reentrant=False) for inputs in micro_batches]
            image, text = map(torch.cat, zip(*embeddings))
        return image, text, self.clip.logit_scale.exp()


@timm.models.register_model
def fastvit_demo(num_classes, pretrained_cfg, **_):
    """The demonstration's image tower: FastViT's own blocks, few and thin."""
    width = int(pretrained_cfg)  # timm hands over what follows the dot in fastvit_demo.24
    return timm.models.FastVit(
        embed_dims=[width, 2 * width, 4 * width, 8 * width],
        layers=(1, 1, 2, 1),
        mlp_ratios=(2, 2, 2, 2),
        stem_use_scale_branch=False,
        layer_scale_init_value=0.1,
        num_classes=num_classes,
    )


open_clip.add_model_config(HERE / "assets/models")  # demo-fastvit, demo-teacher, demo-vit


def open_model(name, weights="", context_length=0, mean="", std="", interpolation=""):
    """Any model of open_clip, with weights from a PATH, a TAG, or at random -> Model.

    Size, mean, std and interpolation come from the tag or from a checkpoint of this script, else from the
    model's first tag (open_clip itself takes OpenAI's for a path). `mean` and `std`, such as
    "0.48,0.46,0.41", and `interpolation` override them.
    """
    if ":" not in name:  # hf-hub:a/b and local-dir:/a keep their slashes
        name = name.replace("/", "-")  # ViT-B/32 is listed as ViT-B-32
    tag = "" if os.path.isfile(weights) else weights
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        fail(f"{weights}: neither a file nor a tag of {name}, which has {', '.join(tags) or 'none'}")
    listed = open_clip.get_pretrained_cfg(name, tag or tags[0]) if tags else {}
    if tag and listed.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu"):
        fail(f"{tag}: was trained with QuickGELU, which {name} does not have; open it as {name}-quickgelu")

    with user_error(f"{name} {tag}: cannot be opened"):
        # open_clip goes on with random weights where a download fails, unless they are required.
        clip = open_clip.create_model(
            name, tag or None, force_context_length=context_length or None, require_pretrained=bool(tag)
        )
        tokenizer = open_clip.get_tokenizer(name, context_length=context_length or None)
    preprocess = clip.visual.preprocess_cfg | listed
    if weights and not tag:
        preprocess.update(load_weights(clip, name, weights))
    for key, text in (("mean", mean), ("std", std)):
        if text:
            wanted = f"--{key} {text}: needs three numbers (for --std above 0), such as 0.485,0.456,0.406"
            with user_error(wanted, ValueError):  # also where they are not three
                preprocess[key] = red, green, blue = [float(number) for number in text.split(",")]
            if key == "std" and not min(preprocess[key]) > 0:  # nan is not
                fail(wanted)
    if interpolation:
        preprocess["interpolation"] = interpolation
    # Some have one number there, some (height, width).
    height, preprocess["size"] = np.broadcast_to(preprocess["size"], 2).tolist()
    if height != preprocess["size"]:
        fail(f"{name}: takes {preprocess['size']} x {height} pixels; only square images are supported")
    return Model(name, clip, tokenizer, preprocess)


def load_weights(clip, name, path):
    """Loads a file's state dict strictly. Returns its `preprocess` (our checkpoints have one) or {}.

    What is published comes in wrappers, with prefixes, with Apple's names of FastViT's layers, or with a
    text tower of older names: each is converted to today's open_clip.
    """
    content = read_weights(path)
    states = list(find_states(content))
    if len(states) != 1:
        fail(f"{path}: needs one CLIP (logit_scale); has {[key for key, *_ in states] or list(content)[:9]}")
    _, holder, prefix = states[0]
    with user_error(f"{path}: a {content.get('architecture', 'model')} that does not fit {name}"):
        state = {key.removeprefix(prefix): x for key, x in holder.items() if key.startswith(prefix)}
        if "visual.trunk.patch_embed.0.rbr_conv.0.conv.weight" in state:
            trunk = {}
            for key in list(state):  # list, since pop changes the state
                if key.startswith("visual.trunk."):
                    trunk[key.removeprefix("visual.trunk.")] = state.pop(key)
            for key, x in timm.models.fastvit.checkpoint_filter_fn(trunk, clip.visual.trunk).items():
                state[f"visual.trunk.{key}"] = x
        state.pop("text.transformer.embeddings.position_ids", None)  # a buffer of older transformers
        state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
        state = open_clip.convert.convert_state_dict(clip, state)
        if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        open_clip.model.resize_pos_embed(state, clip)
        open_clip.model.resize_text_pos_embed(state, clip)
        clip.load_state_dict(state)
    return content.get("preprocess") or {}


def find_states(content, where=""):
    """Yields (path, dictionary, prefix) for every CLIP in nested dictionaries.

    {"model": {"module.logit_scale": x}} has one: "model.module.logit_scale", the inner dictionary, "module.".
    """
    for key, value in content.items():
        if isinstance(value, dict):
            yield from find_states(value, f"{where}{key}.")
        elif isinstance(value, torch.Tensor) and str(key).endswith("logit_scale"):
            yield where + key, content, key.removesuffix("logit_scale")


class Ignored(list):
    """Stands in for what training scripts leave beside the weights, such as a Namespace or a Path.

    It is a list because torch appends to nothing else.
    """

    def __init__(self, *_):
        pass

    __setstate__ = __init__


def read_weights(path):
    """A file of weights -> the dictionary in it, on the CPU. No code of the file is run."""
    with user_error(path, OSError), open(path, "rb") as file:
        head = file.read(64)
    if head[8:10] == b'{"':
        with user_error(f"{path}: not a valid safetensors file"):
            return safetensors.torch.load_file(path)
    if head.lstrip().startswith((b"<", b"version https://git-lfs")):
        fail(f"{path}: is a web page or a Git LFS pointer (`git lfs pull` brings the file): {head[:40]}")
    stand_ins = []
    dictionary = lambda *_: {}
    with user_error(f"{path}: not a file of weights"):
        if zipfile.is_zipfile(path):
            if zipfile.ZipFile(path).testzip():  # torch itself compares no checksum
                fail(f"{path}: damaged, a checksum is wrong")
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
                # The stand-in for a dictionary must itself be one, or torch does not fill it.
                stand_ins.append((dictionary if name == "collections.defaultdict" else Ignored, name))
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        fail(f"{path}: holds a whole model or other object, not weights; save its state_dict()")
    return content


# ---------------------------------------------------------------- data


class Pairs:
    """A dataset of the pairs of `find_pairs`, prepared for each model: dataset[epoch, index of the pair]."""

    def __init__(self, pairs, seed, models):
        self.pairs = pairs
        self.seed = seed
        self.sizes = [(model.size, model.interpolation) for model in models]
        self.tokens = [tokenize_captions(model, pairs) for model in models]

    def __getitem__(self, item):
        """-> views, one (S, S, 3) uint8 a model; tokens, one (context,) a model; a problem, "" for none.

        All models see the same view, each in its own size: its augmentation is drawn from seed, epoch and
        index alone. An image that does not decode is black, and the problem says why.
        """
        epoch, index = item
        path, offset, length, _ = self.pairs[index]
        with open(path, "rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))
        problem = ""
        try:
            image = Image.open(content)
            image.load()
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            image = Image.new("L", (1, 1))
            problem = f"{path}: {error}"
        views = []
        for view in squares(image, self.sizes):
            view = augment(view, [self.seed, epoch, index])
            views.append(torch.from_numpy(np.array(view)))
        return views, [tokens[index] for tokens in self.tokens], problem


def tokenize_captions(model, pairs):
    """-> (n, context) tokens. Prints the preprocessing, and how many captions are cut off or repeated."""
    tokens, is_cut = tokenize(model.tokenizer, [caption for *_, caption in pairs])
    n_repeated = len(tokens) - len(tokens.unique(dim=0))
    print(f"{model.name}: {model.size} px, mean {model.mean}, std {model.std}, {model.interpolation}")
    print(f"  {tokens.shape[1]} tokens: {is_cut.sum()} captions are cut off, {n_repeated} repeat others")
    if n_repeated > len(pairs) / 10:
        print("  equal captions count as pairs that do not match, and are repelled")
    return tokens


def tokenize(tokenizer, texts):
    """-> (n, context) tokens, and a mask (n,) of the texts that are cut off.

    Those are the texts that make use of one more token where the tokenizer allows it.
    """
    texts = ["", *texts]  # The empty text shows what padding looks like to this tokenizer.
    tokens = tokenizer(texts)
    longer = tokenizer(
        tqdm(texts, "tokens", leave=False, delay=2, disable=None), tokenizer.context_length + 1
    )
    n_used = lambda rows: (rows != rows[0]).sum(1)
    return tokens[1:], (n_used(longer) > n_used(tokens))[1:]


def batches(n, batch, epochs, seed, process=0, world=1):
    """Yields for every step of these epochs this process's share of the batch, a list of (epoch, index).

    An epoch is a permutation drawn from (seed, epoch), without its incomplete batch. So no batch holds a pair
    twice, but it may hold two pairs with equal captions.
    """
    for epoch in epochs:
        order = np.random.default_rng([seed, epoch]).permutation(n)[: n // batch * batch]
        shares = order.reshape(-1, world, batch // world)[:, process]  # (steps, batch / world)
        for share in shares.tolist():
            yield [(epoch, index) for index in share]


def augment(image, key):
    """The paper's augmentation (3.6): rotation, shift, brightness, contrast, saturation.

    They are drawn from `key`, the seed of a random generator: [seed of the run, epoch, index].
    """
    rng = np.random.default_rng(key)
    angle = rng.uniform(-7, 7)  # degrees
    shift = rng.uniform(-0.05, 0.05, 2) * image.width
    image = image.rotate(angle, Image.Resampling.BILINEAR, translate=shift.tolist())
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(0.85, 1.15))
    return image.convert("RGB")


def square(image, size, interpolation):
    """An opened image of any Pillow mode -> RGB, upright (EXIF), centred in a black square, resized.

    The opened image itself is turned upright.
    """
    return next(squares(image, [(size, interpolation)])).convert("RGB")


def squares(image, sizes):
    """Yields for each (size, interpolation) what `square` returns, but a grey image (mode L) in one channel.

    What the sizes share is done once. One channel is augmented faster, and to the same pixels as three.
    """
    image.load()  # here, so that the `except` below does not hide a broken image
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        # Pillow raises many kinds for broken metadata. What it cannot read leaves the image as it is; what it
        # cannot write back, which is not needed here, it finds only after it has turned the image.
        pass
    if image.mode[0] in "IF":  # high-bit-depth greys (I, I;16, F), which Pillow's convert would clip
        values = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        top = values.max()
        # White is the smallest usual maximum that this image does not exceed, or else its own.
        white = next(white for white in (1, 255, 4095, 65535, top) if white >= top)
        image = Image.fromarray((255 / white * values + 0.5).astype(np.uint8))
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    side = max(image.size)
    image = ImageOps.pad(image, (side, side))
    pixels = torch.from_numpy(np.array(image)).view(1, side, side, -1).permute(0, 3, 1, 2)
    for size, interpolation in sizes:
        # torch gives Pillow's pixels, to within 1 of 255, in less than a fifth of Pillow's time.
        resized = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
        yield to_pil_image(resized[0])


def find_pairs(sources):
    """--data -> a list of (path, offset and length of the image in it, caption)."""
    pairs = []
    for source in sources:
        with user_error(f"--data {source}", ValueError):
            patterns = list(braceexpand(source))
        for pattern in patterns:
            for path in sorted(glob.glob(pattern, recursive=True)) or [pattern]:
                if not os.path.exists(path):
                    fail(f"--data {path}: is not there")
                if path.lower().endswith((".csv", ".tsv", ".txt")):
                    pairs += find_in_table(path)
                else:
                    pairs += find_in_tar(path)
    print(f"{len(pairs)} pairs, {[caption for *_, caption in pairs].count('')} with an empty caption")
    return pairs


def find_in_table(path):
    """Columns `image`, relative to the table, and `caption`; or open_clip's `filepath` and `title`."""
    for name, caption in read_table(path, ("image", "caption"), ("filepath", "title")):
        image = Path(path).parent / name
        if not image.is_file():
            fail(f"--data {path}: the image {image} is not there")
        yield str(image), 0, image.stat().st_size, caption


def find_in_tar(path):
    """A WebDataset shard: a pair's image and txt share a key, their name without the extension.

    A key with a further dot is left out: WebDataset would take a.seg.png for another image of the key `a`.
    """
    images = {}
    texts = {}
    pairs = []
    with (
        user_error(f"--data {path}: neither a table (.csv, .tsv, .txt) nor a plain tar"),
        tarfile.open(path, "r:") as tar,
    ):
        for member in tar:
            if not member.isfile():
                continue
            key, extension = os.path.splitext(member.name)
            if extension.lower() == ".txt":
                texts[key] = tar.extractfile(member).read()
            elif extension.lower() in (".jpg", ".jpeg", ".png", ".webp"):
                if key in images:
                    fail(f"--data {path}: key {key} has more than one image")
                images[key] = member
        # tarfile notices neither a file that is cut between two members nor a second tar behind the first.
        tar.fileobj.seek(tar.offset)
        rest = tar.fileobj.read(2**20)
    if len(rest) < 512 or any(rest):
        fail(f"--data {path}: truncated, or followed by another tar: zeros must follow the last member")
    for key, image in images.items():
        if key in texts and "." not in os.path.basename(key):
            with user_error(f"--data {path}: {key}.txt is not UTF-8", UnicodeDecodeError):
                caption = texts[key].decode("utf-8-sig").strip()
            pairs.append((path, image.offset_data, image.size, caption))
    n_left_out = len(images.keys() | texts.keys()) - len(pairs)
    if n_left_out:
        print(
            f"{path}: {n_left_out} keys left out, with a dot or without a txt or image (jpg, jpeg, png, webp)"
        )
    return pairs


def read_table(path, *choices):
    """A table in UTF-8 -> for each row, the values of the first tuple of columns in `choices` that it has.

    The separator is `,` `;` or tab, whichever the header has most of, whatever the file is called.
    """
    with user_error(path):
        text = Path(path).read_text(encoding="utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        # Between tabs a quotation mark is usually a literal character, such as the first of a caption.
        quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
        reader = csv.DictReader(io.StringIO(text), delimiter=separator, quoting=quoting, strict=True)
        # The rows get these names too.
        header = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = list(reader)
    fitting = [columns for columns in choices if set(columns) <= set(header)]
    if not fitting or not rows:
        fail(f"{path}: has no rows, or none of the columns {' or '.join(map(str, choices))} in its header")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            fail(f"{path}: line {number} or near: needs {len(header)} values, as the header has")
    return [[row[column].strip() for column in fitting[0]] for row in rows]


# ---------------------------------------------------------------- training


def train(cfg, device, student, teacher, data, run, checkpoint):
    """Trains `student` against the frozen `teacher`, or by the CLIP loss alone where that is None.

    At the end of every epoch rank 0 replaces the log and the checkpoint in cfg.out. The last checkpoint is
    the result, which evaluate.py measures. A killed run loses the epoch it was in: --resume hands its last
    `checkpoint` in here, and the same number of processes goes on from there, on a CPU to the bit. `run`
    goes into every checkpoint, see `describe_run`.
    """
    steps_per_epoch = len(data.pairs) // cfg.batch
    total_steps = cfg.epochs * steps_per_epoch  # T of Eq. 5 and 7
    micro_batch = cfg.micro_batch or cfg.batch

    projections = make_projections(cfg, student, teacher).to(device)
    student.to(device).train()
    if teacher:
        teacher.to(device)
    if device.type == "cuda":
        # Together they make the student 1.64 times faster (NVIDIA H200, PyTorch 2.11); neither alone does.
        torch.backends.cudnn.benchmark = True
        student.clip.visual.to(memory_format=torch.channels_last)
    parameters = [*student.parameters(), *projections.parameters()]
    optimizer = make_optimizer(cfg, parameters)
    first_epoch = 0
    log = []
    if checkpoint:
        first_epoch = checkpoint["epoch"]
        log = checkpoint["log"]
        student.clip.load_state_dict(checkpoint["state_dict"])
        projections.load_state_dict(checkpoint["projections"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    model = student
    if WORLD > 1:
        # Some parameters (CoCa's decoder, SigLIP's bias) get no gradient. A static graph waits for none.
        model = nn.parallel.DistributedDataParallel(student, static_graph=True)
    workers = WORKERS if cfg.workers < 0 else cfg.workers
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=batches(
            len(data.pairs), cfg.batch, range(first_epoch, cfg.epochs), cfg.seed, RANK, WORLD
        ),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        prefetch_factor=1 if workers else None,  # a batch of the paper's run takes 340 MiB of shared memory
        pin_memory=device.type == "cuda",
    )
    first_step = first_epoch * steps_per_epoch
    # One process shows a bar. `None` shows it only on a terminal.
    bar = tqdm(loader, "steps", total_steps, initial=first_step, disable=RANK > 0 or None)
    undecodable = []  # why, for each broken image of this process in this epoch

    for step, (pixels, tokens, problems) in enumerate(bar, first_step):
        pixels = [x.to(device, non_blocking=True) for x in pixels]
        tokens = [x.to(device, non_blocking=True) for x in tokens]
        lr = lr_at(step, total_steps, cfg.lr, cfg.warmup)
        beta = beta_at(step, total_steps, cfg.beta0, cfg.r)
        diag = beta if cfg.coupled else cfg.diag
        torch.manual_seed(hash((cfg.seed, step, RANK)))  # so that --resume draws the same dropout

        # Both models see the same view of an image, each in its own size. On a GPU their towers run in bf16.
        # Beyond a micro-batch the student's forward pass is computed twice.
        image, text, scale = model(pixels[0], tokens[0], micro_batch)
        image = gather(image)  # (N, D), of the whole batch
        text = gather(text)
        if teacher:
            with torch.no_grad():
                t_image, t_text, t_scale = teacher(pixels[1], tokens[1], micro_batch)
            t_image = gather(t_image)  # (N, D_t)
            t_text = gather(t_text)
            embeddings = (image, text, scale, t_image, t_text, t_scale)
            loss, terms = dark_loss(*embeddings, beta=beta, diag=diag, tau=cfg.tau, smooth=cfg.smooth)
        else:
            loss = open_clip.ClipLoss()(F.normalize(image), F.normalize(text), scale)  # Eq. 1
            terms = {"clip": loss}
        if cfg.feature:
            terms["feature"] = feature_loss(projections, (image, text), (t_image, t_text))
            loss = loss + cfg.feature * terms["feature"]

        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            # Part of the method, see `dark_loss`. Just below 100, so that exp() in fp32 is not above it.
            student.clip.logit_scale.clamp_(max=math.log(100) - 1e-6)

        undecodable += filter(None, problems)
        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        if epoch_ends or done % cfg.log_every == 0:
            # Here, and to save a checkpoint, the CPU waits for the GPU.
            figures = dict(loss=loss, **terms, beta=beta, scale=scale, lr=lr, grad_norm=grad_norm)
            log.append(make_record(step, step / steps_per_epoch, figures, tokens[0], undecodable, data))
            line = " ".join(f"{name} {log[-1][name]:.3f}" for name in ("loss", *terms, "beta", "scale"))
            tqdm.write(f"epoch {done / steps_per_epoch:.1f}/{cfg.epochs}  step {done}/{total_steps}  {line}")
        if epoch_ends:
            undecodable = []
            save(cfg, student, run, done // steps_per_epoch, log, optimizer, projections)


def make_record(step, epoch, figures, tokens, undecodable, data):
    """A line of log.jsonl, whose steps count from 0.

    A figure that is not finite, or too many broken images, ends the run.
    """
    figures = {name: torch.as_tensor(value).item() for name, value in figures.items()}
    if not all(map(math.isfinite, figures.values())):
        fail(f"not finite by step {step}: {figures}", 1)
    n_bad = gather(tokens.new_tensor([len(undecodable)])).sum().item()
    if n_bad > len(data.pairs) // 100:
        fail(f"{n_bad} of {len(data.pairs)} images do not decode, over 1 %, such as {undecodable[:1]}", 1)
    tokens = gather(tokens)
    repeated = 1 - len(tokens.unique(dim=0)) / len(tokens)  # share of captions that repeat another one
    return dict(step=step, epoch=epoch, **figures, repeated=repeated, bad=n_bad)


def make_projections(cfg, student, teacher):
    """Linear maps of the student's image and text embeddings to the teacher's width (feature-KD row)."""
    projections = nn.ModuleList()
    if cfg.feature:
        width = lambda model: model.clip.encode_text(model.tokenizer([""])).shape[1]
        for _ in ("image", "text"):
            projections.append(nn.Linear(width(student), width(teacher)))
    return projections


def feature_loss(projections, embeddings, targets):
    """Mean squared error of the projected student's and the teacher's unit embeddings: images plus texts."""
    loss = 0.0
    for project, embedding, target in zip(projections, embeddings, targets):
        projected = project(F.normalize(embedding))
        loss = loss + F.mse_loss(F.normalize(projected), F.normalize(target))
    return loss


def make_optimizer(cfg, parameters):
    # Biases, norms, gains (also those shaped (C, 1, 1)) and the logit scale are not decayed.
    matrices = [p for p in parameters if p.squeeze().ndim >= 2]
    vectors = [p for p in parameters if p.squeeze().ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


# ---------------------------------------------------------------- errors, checkpoints, command line


def fail(message, code=2):
    """Prints one line on stderr and exits: code 2 for a user's mistake, 1 for what goes wrong in a run."""
    process = f"process {RANK}: " if WORLD > 1 else ""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {process}{message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def user_error(what, errors=Exception):
    """An error of these kinds in here becomes one line, 'what: what the library said', and exit code 2.

    Use it only around a library's work on what a user gave, so that our own faults keep their traceback.
    """
    try:
        yield
    except errors as error:
        text = " ".join(str(error).split()) or type(error).__name__
        # torch.load would go on to advise its unsafe mode.
        fail(f"{what}: {text.partition(' This file can still be loaded')[0]}")


@contextmanager
def script():
    """Wraps every main. Ctrl-C, SIGTERM, a full disk, too little memory and the like exit with one line.

    Signals, warnings and stdout stay as this sets them, so it must not run on import.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts as Ctrl-C
    atexit.register(kill_loaders)
    logging.disable(logging.WARNING)  # open_clip warns of random weights, which may well be wanted
    # DDP and `gather` warn of what is harmless.
    warnings.filterwarnings("ignore", "Grad strides|.*all_gather is deprecated")
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot do this
        # A line is in the file when it is written, and a path of any bytes can be printed, as on stderr.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        kill_loaders()  # now: os._exit skips atexit, and a notebook does not exit
        if WORLD > 1:
            os._exit(130)  # at once: the other processes may never answer
        sys.exit(130)
    except (OSError, MemoryError, subprocess.CalledProcessError) as error:
        message = str(error).strip() or type(error).__name__
        fail(message.splitlines()[-1], 1)  # a loader's error begins with its traceback
    except RuntimeError as error:
        if "shared memory" in str(error):
            fail("the loaders need more shared memory: --workers 0, or docker run --shm-size 8g", 1)
        if "by peer" in str(error):
            os._exit(1)  # another process has ended, and has said why
        raise
    finally:
        logging.disable(logging.NOTSET)


def ignore_signals(_):
    """Runs in each loader: the main process alone answers a SIGTERM that was sent to the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_loaders():
    """At its exit Python sends them SIGTERM, which they ignore, and waits for them. So this runs before that.

    Only daemons, which loaders are: a program that calls `main` may have other processes of its own.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call a killed loader an error
    for process in torch.multiprocessing.active_children():
        if process.daemon:
            process.kill()


FORMAT = "dark-4"
# These may change before a --resume. They do not change what a run computes, or it shows in other fields: the
# values that an ablation sets, and the digest of captions and weights.
RUN_FIELDS = (
    "ablation",
    "data",
    "teacher_weights",
    "student_weights",
    "out",
    "workers",
    "device",
    "log_every",
    "resume",
    "overwrite",
)


def write_atomically(path, content):
    """Writes bytes to a temporary file and renames it: a kill leaves the old file or the new, never half."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def describe_run(cfg, pairs):
    """The configuration, and a digest of pairs and weights, by which a run is recognised in moved folders."""
    digest = hashlib.sha256(repr([pair[2:] for pair in pairs]).encode())
    for weights in (cfg.teacher_weights, cfg.student_weights):
        digest.update(Path(weights).read_bytes() if os.path.isfile(weights) else weights.encode())
    return vars(cfg) | dict(pairs=len(pairs), processes=WORLD, sha256=digest.hexdigest())


def save(cfg, model, run, epoch, log, optimizer, projections):
    """Writes student.pt and log.jsonl.

    `model_from_checkpoint` needs nothing else (but of local-dir: and hf-hub: models where they came from),
    and --teacher-weights and --student-weights take the file. Its `state_dict` is open_clip's.
    """
    if RANK > 0:
        return
    content = dict(
        format=FORMAT,
        architecture=model.name,
        context_length=model.tokenizer.context_length,
        preprocess={key: getattr(model, key) for key in PREPROCESS},
        state_dict=model.clip.state_dict(),
        config=run,
        epoch=epoch,
        log=log,
        optimizer=optimizer.state_dict(),
        projections=projections.state_dict(),
    )
    file = io.BytesIO()
    torch.save(content, file)
    lines = "".join(json.dumps(record) + "\n" for record in log)
    write_atomically(f"{cfg.out}/log.jsonl", lines.encode())
    # The checkpoint comes last, so that a kill in between repeats the epoch.
    write_atomically(f"{cfg.out}/student.pt", file.getbuffer())


def load_checkpoint(path):
    content = read_weights(path)
    if content.get("format") != FORMAT:
        fail(f"{path}: no checkpoint of this version of dark.py ({FORMAT})")
    return content


def model_from_checkpoint(content):
    """The model that `save` was given, in eval mode."""
    model = open_model(content["architecture"], context_length=content["context_length"])
    model.clip.load_state_dict(content["state_dict"])
    vars(model).update(content["preprocess"])
    return model.eval()


def lock_folder(out):
    """Makes --out, and keeps every other run out of it until main ends, however that happens."""
    with user_error(f"--out {out}: cannot be written, or is in use by another run", OSError):
        os.makedirs(out, exist_ok=True)
        return filelock.FileLock(f"{out}/.lock{RANK}", timeout=0).acquire()


def find_checkpoint(cfg, run):
    """-> the checkpoint that the run goes on with, or None for a fresh one, which may overwrite."""
    path = f"{cfg.out}/student.pt"
    if cfg.overwrite or not os.path.exists(path):
        return None
    if not cfg.resume:
        fail(f"--out {cfg.out}: holds a run; --resume goes on with it, --overwrite replaces it")
    checkpoint = load_checkpoint(path)
    for key, value in run.items():
        old = checkpoint["config"].get(key)
        if old != value and key not in RUN_FIELDS:
            fail(f"--out {cfg.out} holds another run: {key} was {old!r}, is {value!r}")
    return checkpoint


def parse_flags(options, argv, description, default=None):
    """The command line of the dataclass `options` -> an instance. tyro makes the help from its comments."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(options, args=argv, description=description, default=default)
    except SystemExit as stop:
        if stop.code:  # tyro draws a box around its message, which becomes one line here
            fail(re.sub(r"[╭╮╰╯│─\s]+|-{9,}", " ", box.getvalue()).strip())
        raise


def parse_args(argv=None):
    """-> Config. Precedence: flag, then --ablation, then the demonstration, then the paper's defaults."""
    about = f"DARK, arXiv 2603.05421. Without --data, these defaults are replaced: {DEMONSTRATION}"
    given = parse_flags(Config, argv, about)
    preset = {} if given.data else DEMONSTRATION
    cfg = parse_flags(Config, argv, about, Config(**(preset | ABLATIONS.get(given.ablation, {}))))
    check_values(cfg)
    if cfg.r_is_end:  # from here on r is that of Eq. 7, which ends at r * beta0
        cfg.r /= cfg.beta0
        cfg.r_is_end = False
    if not (cfg.beta0 or cfg.feature or (cfg.diag and not cfg.coupled)):
        cfg.teacher = cfg.teacher_weights = ""  # the teacher would have weight 0 in every term
    elif not cfg.teacher or not (cfg.teacher_weights or ":" in cfg.teacher):
        fail(
            "--teacher NAME and --teacher-weights PATH or TAG: both are needed, or --ablation no-kd. To "
            "train a teacher: python dark.py --ablation no-kd --student NAME --data X --out teacher"
        )
    return cfg


def check_values(cfg):
    # What is not named here must be at least 0.
    least = dict(
        beta0=-1e300,
        r=-1e300,
        workers=-1,
        epochs=1,
        log_every=1,
        batch=2,
        tau=1e-12,
        lr=1e-12,
        clip_norm=1e-12,
    )
    for name, value in vars(cfg).items():
        smallest = least.get(name, 0)
        if isinstance(value, int | float) and not smallest <= value < math.inf:
            fail(f"--{name.replace('_', '-')} {value}: must be finite and at least {smallest}")
    if cfg.smooth >= 1:
        fail(f"--smooth {cfg.smooth}: must be less than 1")
    if cfg.r_is_end and not cfg.beta0:
        fail("--r-is-end: needs a --beta0 other than 0, for 0 stays 0 whatever r is")
    if cfg.batch % WORLD:
        fail(f"--batch {cfg.batch}: not divisible by the {WORLD} processes")
    if cfg.resume and cfg.overwrite:
        fail("--resume and --overwrite: go on with the run in --out, or replace it?")


def prepare_device(name):
    """The device of this process. Sets the number of threads, and joins the process group of torchrun.

    All processes but the first print to nowhere from then on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with user_error(f"--device {name} (valid are auto, cpu, cuda, cuda:N, mps)"):
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"  # set by torchrun
        device = torch.zeros(1, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # One core is left to the loader: a thread without a core would keep the others waiting for it.
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cpu_count() - 1)))
    if WORLD > 1:
        with user_error(f"WORLD_SIZE is {WORLD}: start with torchrun, or unset it", ValueError):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return device


def introduce(cfg, teacher, steps_per_epoch):
    """What a user should know before the long work."""
    print(
        f"student {cfg.student}, weights: "
        f"{cfg.student_weights or ('its own' if ':' in cfg.student else 'none given')}"
    )
    if not cfg.student_weights and cfg.lr < 1e-4:
        print(f"  --lr {cfg.lr:g} is meant for trained weights; 1e-3 is usual for one that starts at random")
    if teacher:
        softened = teacher.clip.logit_scale.exp().item() / cfg.tau
        advice = (
            "" if 10 < softened < 40 else f", far from 20: --tau {softened * cfg.tau / 20:.2g} gives that"
        )
        print(f"teacher {cfg.teacher}, weights: {cfg.teacher_weights or 'its own'}")
        print(f"  logit scale / tau: {softened * cfg.tau:.1f} / {cfg.tau:g} = {softened:.1f}{advice}")
    crossing = f", zero at epoch {cfg.epochs / (1 - cfg.r):.1f}" if cfg.r < 0 else ""
    print(
        f"{cfg.epochs} epochs of {steps_per_epoch} steps; "
        f"beta {cfg.beta0:g} -> {cfg.r * cfg.beta0:g}{crossing}"
    )


@script()
def main(argv=None):
    cfg = parse_args(argv)
    device = prepare_device(cfg.device)
    with lock_folder(cfg.out):
        if not cfg.data and RANK == 0 and not PHANTOM.exists():
            subprocess.run([sys.executable, HERE / "assets/phantom.py", PHANTOM], check=True)
        if WORLD > 1:
            dist.barrier()
        pairs = find_pairs(cfg.data or (f"{PHANTOM}/train-*.tar",))
        steps_per_epoch = len(pairs) // cfg.batch
        if not steps_per_epoch:
            fail(f"--batch {cfg.batch}: more than the {len(pairs)} pairs that there are")
        if cfg.warmup >= cfg.epochs * steps_per_epoch:
            fail(f"--warmup {cfg.warmup}: at most {cfg.epochs * steps_per_epoch - 1}, to end within the run")
        run = describe_run(cfg, pairs)
        checkpoint = find_checkpoint(cfg, run)

        torch.manual_seed(cfg.seed % 2**63)  # torch takes none above that
        student = open_model(cfg.student, cfg.student_weights, cfg.context_length)
        teacher = None
        if cfg.teacher:
            teacher = open_model(cfg.teacher, cfg.teacher_weights, cfg.context_length)
            teacher.eval().requires_grad_(False)
        introduce(cfg, teacher, steps_per_epoch)
        data = Pairs(pairs, cfg.seed, [student, teacher] if teacher else [student])
        train(cfg, device, student, teacher, data, run, checkpoint)
        if RANK == 0:
            runpy.run_path(HERE / "assets/curves.py")["draw"](cfg.out)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
