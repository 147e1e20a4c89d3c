"""DARK: distil a large CLIP into a phone-sized one by imitating its matches and, later, repelling its confusions.

    loss = CLIP + diag + beta(t) * off        beta(t) = beta0 * (1 - t/T * (1 - r))

`diag` and `off` are the matched and the non-matched terms of the teacher-student cross-entropy. The weight of
`diag` stays 1; the weight of `off` falls from beta0 > 0 (imitate) through zero to r * beta0 < 0 (repel).
Method: Diagonal-Anchored Repulsive Knowledge Distillation, arXiv 2603.05421 (also: Selective Repulsive KD).

    python dark.py --beta0 2 --r -0.8                                    # demonstration: nothing is downloaded
    python dark.py --data 'shards/{000000..000024}.tar' --context-length 117 \
        --teacher-weights FetalCLIP_weights.pt --student-weights dfndr2b   # the paper's run
    torchrun --nproc_per_node 4 dark.py ...                              # the same on four GPUs, --batch is global
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads leave the cores to the loader

import argparse
import copy
import csv
import dataclasses
import difflib
import glob
import hashlib
import inspect
import io
import json
import math
import pickle
import re
import signal
import struct
import sys
import tarfile
import time
import typing
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import filelock
import numpy as np
import open_clip
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # not imported by torch.distributed itself
import torch.nn as nn
import torch.nn.functional as F
from braceexpand import braceexpand
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ---------------------------------------------------------------- configuration


@dataclass
class Config:
    """Every setting; `python dark.py --help` is made from these lines. The defaults are the paper's."""

    # the method
    beta0: float = 2.0  # beta_0 of Eq. 7: weight of the off-diagonal at step 0
    r: float = -0.8  # r of Eq. 7: the weight ends at r * beta0
    r_is_end: bool = False  # r is the final weight itself, as in the authors' Figure 2a and configurations; else Eq. 7
    diag: float = 1.0  # weight of the diagonal (Eq. 6)
    coupled: bool = False  # Eq. 4: the diagonal has the weight of the off-diagonal, lambda(t) of Eq. 5
    tau: float = 5.0  # tau of Eq. 2: temperature of the teacher's softmax, and of the teacher's only
    smooth: float = 0.0  # epsilon of the confidence-penalty row: share of the target that is spread evenly
    feature: float = 0.0  # weight of the feature-KD row's mean squared error (the paper: 2000)
    ablation: str = ""  # a row of Table 3, which sets the flags above; flags given beside it win
    # the models
    teacher: str = "ViT-L-14"  # any open_clip name
    teacher_weights: str = ""  # PATH or open_clip TAG; without it a teacher is trained first, on the same data
    teacher_cache: str = ""  # folder that keeps the teacher's embeddings, for other runs with the same teacher and seed
    student: str = "MobileCLIP2-S0"  # any open_clip name
    student_weights: str = ""  # PATH or open_clip TAG; without it the student starts at random
    context_length: int = 0  # tokens, both towers and tokenizers (FetalCLIP: 117); 0: each model's own
    # the data
    data: tuple[str, ...] = ("phantom",)  # phantom | pairs.csv | pairs.tsv | pattern of tars, one or more
    phantom_pairs: int = 4096  # pairs in the phantom
    # the training
    epochs: int = 20  # passes over the data
    teacher_epochs: int = 0  # the same for a teacher that is trained first; 0: as many as epochs
    batch: int = 1024  # N, pairs in a batch over all processes; the loss sees all of them
    micro_batch: int = 0  # pairs whose activations a process holds at a time (batch norm sees these); 0: its share of N
    lr: float = 1e-5  # peak learning rate (AdamW, betas 0.9 and 0.98, eps 1e-6)
    warmup: int = 500  # optimizer steps of linear warm-up before the cosine
    weight_decay: float = 0.1  # on matrices and kernels only
    clip_norm: float = 1.0  # largest L2 norm of the gradient
    seed: int = 42  # of the weights, the order, the augmentation and the phantom
    # the run
    out: str = "out"  # folder for student.pt, log.jsonl, curves.png, and teacher.pt if one is trained
    workers: int = -1  # loader processes; -1: one less than the cores, 1 to 8
    device: str = "auto"  # auto: cuda where there is one, else cpu
    log_every: int = 10  # optimizer steps between two lines of log.jsonl (which is written with the checkpoint)
    resume: bool = False  # go on from the checkpoint in --out
    overwrite: bool = False  # replace the run in --out (a teacher that fits is kept or gone on with)


# Table 3. Coupled rows give both weights one schedule, lambda(t) of Eq. 5 with lambda0 = beta0; r = 1 is a constant.
ABLATIONS = {
    "no-kd": dict(coupled=True, beta0=0.0, r=1.0),
    "static": dict(coupled=True, beta0=1.0, r=1.0),
    "static-feat": dict(coupled=True, beta0=1.0, r=1.0, feature=2000.0),
    "decay": dict(coupled=True, beta0=1.0, r=0.1),
    "full-decay": dict(coupled=True, beta0=1.0, r=0.0),
    "conf-penalty": dict(coupled=True, beta0=1.0, r=0.1, smooth=0.1),
    "coupled": dict(coupled=True, beta0=1.0, r=-0.8),
    "selective": dict(beta0=2.0, r=-0.8),
    "beta4": dict(beta0=4.0, r=-0.8),
    "beta8": dict(beta0=8.0, r=-0.8),
    "r-0.5": dict(beta0=2.0, r=-0.5),
    "r-0.4": dict(beta0=2.0, r=-0.4),
}

# Without real data or without teacher weights everything is trained from scratch: small models, a larger step. tau:
# the paper's teacher has a logit scale of 100, softened 100 / 5 = 20; one trained for minutes stays near the 20 that it
# starts at, and 20 / 5 would be a nearly uniform target, whose repulsion drives all pairs apart alike.
DEMONSTRATION = dict(
    teacher="demo-teacher", student="demo-fastvit", tau=1.0, epochs=7, teacher_epochs=8, batch=64, lr=2e-3, warmup=100
)

# ---------------------------------------------------------------- schedules and loss


def beta_at(step: int, total: int, beta0: float, r: float) -> float:
    """Weight of the off-diagonal at optimizer step `step` of `total` (Eq. 7): beta0 at 0, r * beta0 at `total`.

    It crosses zero at step total / (1 - r). Eq. 5, the coupled lambda(t), is the same line.
    """
    return beta0 * (1 - step / total * (1 - r))


def lr_at(step: int, total: int, peak: float, warmup: int) -> float:
    """Learning rate of optimizer step `step` of `total`: linear over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def dark_loss(image, text, scale, t_image, t_text, t_scale, *, beta, diag=1.0, clip=1.0, tau=5.0, smooth=0.0):
    """CLIP loss plus selective repulsive distillation over one batch of N matched pairs (arXiv 2603.05421).

    image, text       (N, D) student embeddings; t_image, t_text (N, D_t) the teacher's, which get no gradient; all are
                      normalised here. With several processes pass gathered ones (see `gather`)
    scale, t_scale    0-d logit scales. The caller must bound `scale` (at most 100, after every optimizer step): a
                      negative `beta` rewards larger logits without end, and the bound is all that stops it
    beta, diag, clip  weights of the off-diagonal, of the diagonal and of the CLIP term; beta = diag is Eq. 4
    tau               temperature of the teacher alone: its targets are to be softened, while the student's logits stay
                      those it is used with; hence no tau**2 either
    smooth            epsilon: the target becomes (1 - epsilon) p + epsilon / N

    Returns the loss, clip * parts["clip"] + diag * parts["diag"] + beta * parts["off"], and the detached `parts`. All
    in fp32 under any autocast (bf16 would step by 0.5 at logits of 100); float64 stays float64.
    """
    with torch.autocast(image.device.type, enabled=False):
        unit = lambda x: F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        image, text, t_image, t_text = map(unit, (image, text, t_image, t_text))

        # Eq. 2: the teacher's targets p, over the texts (rows) and over the images (columns). tau softens only them.
        with torch.no_grad():
            t_logits = (t_scale / tau * t_image) @ t_text.T  # (N, N): rows images, columns texts
            p_rows, p_cols = t_logits.softmax(1), t_logits.softmax(0)  # (N, N) each
            del t_logits
            if smooth:
                p_rows.mul_(1 - smooth).add_(smooth / len(image))
                p_cols.mul_(1 - smooth).add_(smooth / len(image))
            match_rows, match_cols = p_rows.diagonal().clone(), p_cols.diagonal().clone()  # p_ii, (N,) each
            p_rows.fill_diagonal_(0)
            p_cols.fill_diagonal_(0)
            rest_rows, rest_cols = p_rows.sum(1), p_cols.sum(0)  # sum of p_ij over j != i, (N,) each
            p_off = p_rows.add_(p_cols)  # both meet the same logits below; in place, which spares an (N, N)

        # -log softmax(S) = lse - S. Both directions share S: the other one's logits are its transpose.
        logits = (scale * image) @ text.T  # (N, N): rows images, columns texts
        lse_rows, lse_cols = logits.logsumexp(1), logits.logsumexp(0)  # (N,) each
        nll_rows, nll_cols = lse_rows - logits.diagonal(), lse_cols - logits.diagonal()

        # Eq. 1
        clip_loss = (nll_rows + nll_cols).mean() / 2
        # Eq. 3, H(p, q) = sum_j p_ij (lse_i - S_ij), split as in Eq. 6. Its j = i term is p_ii nll_i; its j != i terms
        # are (sum of their p_ij) lse_i - sum of p_ij S_ij.
        kd_diag = (match_rows * nll_rows + match_cols * nll_cols).mean() / 2
        kd_off = (rest_rows * lse_rows + rest_cols * lse_cols - torch.linalg.vecdot(p_off, logits)).mean() / 2

        loss = clip * clip_loss + diag * kd_diag + beta * kd_off  # Eq. 6; Eq. 4 where diag = beta
    return loss, {"clip": clip_loss.detach(), "diag": kd_diag.detach(), "off": kd_off.detach()}


def gather(x):
    """(n, d) on each of `world` processes -> (world * n, d) on all, with gradient; the identity without a group.

    Every process then computes the loss of the whole batch. Backward sums the processes' (equal) gradients, which
    makes `world` times too much, and DDP's average over the processes takes that away again.
    """
    if not dist.is_initialized():
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x))


@torch.no_grad()
def clamp_scale(clip):
    """Bounds the logit scale to 100: part of the method, see `dark_loss`. A hair less, so that fp32's exp() agrees."""
    clip.logit_scale.clamp_(max=math.log(100) - 1e-6)


# ---------------------------------------------------------------- models

PREPROCESS = ("size", "mean", "std", "interpolation")


class Model(nn.Module):
    """An open_clip model with its tokenizer and preprocessing: from raw pixels and tokens to embeddings.

    size: pixels, of the square input. mean, std: of R, G, B in 0..1. interpolation: bicubic or bilinear.
    width: D, of the embeddings. projections: two linear layers to the teacher's for the feature-KD row, else none.
    """

    def __init__(self, name, clip, tokenizer, preprocess):
        super().__init__()
        self.name, self.clip, self.tokenizer, self.context_length = name, clip, tokenizer, tokenizer.context_length
        self.size, self.mean, self.std, self.interpolation = (preprocess[key] for key in PREPROCESS)
        self.projections = nn.ModuleList()
        with torch.no_grad():
            self.width = clip.eval().encode_text(tokenizer([""])).shape[1]

    @property
    def frame(self):
        """What images are brought to for this model, see `square`."""
        return self.size, self.interpolation

    def preprocess(self):
        return {key: getattr(self, key) for key in PREPROCESS}

    def pixels(self, images):
        """(n, H, H, 3) uint8 on any device -> (n, 3, size, size) float, resized and normalised."""
        # In memory channels last, fast on a GPU. On a CPU torch crashes with it in MobileCLIP2-S0's backward, where a
        # 1x1 convolution of stride 2 has 3 channels (seen with 2.15).
        x = images.permute(0, 3, 1, 2).float() / 255
        x = x if x.is_cuda else x.contiguous()
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode=self.interpolation, antialias=True).clamp(0, 1)
        return (x - constant(self.mean, x.device)) / constant(self.std, x.device)

    def embed(self, images, tokens):
        """(n, H, H, 3) uint8, (n, context) -> image (n, D), text (n, D), and their (n, D_t) projections if any."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            image, text = self.clip.encode_image(self.pixels(images)), self.clip.encode_text(tokens)
            return image, text, *(f(F.normalize(x, dim=-1)) for f, x in zip(self.projections, (image, text)))

    def forward(self, images, tokens, chunk):
        """-> `embed` of all n pairs, and the logit scale. Backward holds the activations of `chunk` pairs at a time.

        For that it embeds each chunk again, with the same dropout. The loss between sees all n pairs, so the gradient
        is the whole batch's; plain accumulation would be another objective, whose softmax sees only `chunk` negatives.
        """
        embed = self.embed
        if torch.is_grad_enabled() and chunk < len(tokens):
            # Batch norm's running statistics move in the first pass alone: the second one gets copies of them.
            spare = lambda: {name: buffer.clone() for name, buffer in self.named_buffers()}
            contexts = lambda: (nullcontext(), _reparametrize_module(self, spare()))
            embed = partial(checkpoint, self.embed, use_reentrant=False, context_fn=contexts)
        parts = [embed(*part) for part in zip(images.split(chunk), tokens.split(chunk))]
        return [torch.cat(rows) for rows in zip(*parts)], self.clip.logit_scale.exp()


@lru_cache
def constant(values, device):
    return torch.tensor(values, device=device).view(3, 1, 1)  # copied to the device once: each copy would wait for it


@timm.models.register_model
def fastvit_demo(num_classes, embed_dims=(24, 48, 96, 192), **_):
    """The demonstration's image tower: FastViT's own blocks, few and thin, with layer scales that suit few epochs."""
    shape = dict(layers=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2), layer_scale_init_value=0.1)
    tower = timm.models.FastVit(embed_dims=embed_dims, num_classes=num_classes, **shape)
    # A CPU takes two thirds of the time in this format (not in the first block: torch crashes there, see `pixels`).
    tower.stem[0].register_forward_hook(lambda block, x, y: y.contiguous(memory_format=torch.channels_last))
    return tower


@timm.models.register_model
def fastvit_demo_wide(num_classes, **_):
    return fastvit_demo(num_classes, (40, 80, 160, 320))


TEXT = dict(context_length=40, width=64, heads=2, layers=2)
VIT = dict(image_size=64, layers=4, width=128, head_width=32, patch_size=8)
FASTVIT = dict(timm_model_name="fastvit_demo", timm_pool="avg", timm_proj=None, image_size=64)
DEMO_MODELS = {
    "demo-vit": dict(embed_dim=128, vision_cfg=VIT, text_cfg=TEXT),
    "demo-fastvit": dict(embed_dim=64, vision_cfg=FASTVIT, text_cfg=TEXT),
    "demo-teacher": dict(embed_dim=128, vision_cfg={**FASTVIT, "timm_model_name": "fastvit_demo_wide"}, text_cfg=TEXT),
}


def open_model(name, weights="", context_length=0, flag="--weights"):
    """Any open_clip model, or one of DEMO_MODELS, with weights from a PATH, an open_clip TAG, or at random -> Model.

    Preprocessing is the tag's, else what open_clip lists for the architecture's first tag: for a path open_clip itself
    would take OpenAI's, which is wrong for MobileCLIP2. `flag`: what the weights were given by.
    """
    schema, tag = ":" in name, "" if Path(weights).is_file() else weights  # hf-hub:, local-dir: bring their weights
    name = name if schema else name.replace("/", "-")
    known, tags = [*DEMO_MODELS, *open_clip.list_models()], open_clip.list_pretrained_tags_by_model(name)
    if not schema and name not in known:
        fail(f"{name!r} is no model; near it are {', '.join(difflib.get_close_matches(name, known, 5, 0))}")
    if tag and tag not in tags:
        fail(f"{flag} {weights}: neither a file nor a tag of {name} (tags: {', '.join(tags) or 'none'})")
    with words(f"{name} {tag} cannot be opened ({flag} PATH takes a local file)"):
        if name in DEMO_MODELS:
            text = {**TEXT, "context_length": context_length or TEXT["context_length"]}
            # The logit scale hardly moves in a training of minutes: it begins where DEMONSTRATION wants it.
            clip = open_clip.CLIP(**{**DEMO_MODELS[name], "text_cfg": text}, init_logit_scale=math.log(20))
            tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
            preprocess = dict(size=clip.visual.image_size, mean=(0.2,) * 3, std=(0.2,) * 3, interpolation="bilinear")
        else:
            tokenizer = open_clip.get_tokenizer(name, context_length=context_length or None)
            required = bool(tag) or (schema and not weights)  # else a failed download would be random weights
            more = dict(force_context_length=context_length or None, require_pretrained=required)
            with mock.patch("logging.warning"):  # of random weights, which may well be wanted
                clip = open_clip.create_model(name, pretrained=tag or None, **more)
            listed = open_clip.get_pretrained_cfg(name, tags[0]) if tags and not tag else {}
            preprocess = {**clip.visual.preprocess_cfg, **listed}
        preprocess["size"] = np.ravel(preprocess["size"]).tolist()[0]
    if weights and not tag:
        load_weights(clip, weights, f"{flag} {weights}")
    return Model(name, clip, tokenizer, preprocess)


def load_weights(clip, path, what):
    """Loads a state dict, bare or under "state_dict" or "model", strictly, after the conversions that bring what is
    published to open_clip's names: wrappers' prefixes, Apple's names of FastViT's layers, custom text towers."""
    state = read_file(path, what)
    with words(f"{what}: no state dict of this model"):
        state = next((state[key] for key in ("state_dict", "model") if key in state), state)
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
        if "visual.trunk.patch_embed.0.rbr_conv.0.conv.weight" in state:
            trunk = {k.removeprefix("visual.trunk."): state.pop(k) for k in [*state] if k.startswith("visual.trunk.")}
            trunk = timm.models.fastvit.checkpoint_filter_fn(trunk, clip.visual.trunk)
            state |= {f"visual.trunk.{key}": value for key, value in trunk.items()}
        state = open_clip.convert.convert_state_dict(clip, state)
        if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
        tokens = [len(state[k]) for k in ("positional_embedding", "text.positional_embedding") if k in state]
        open_clip.model.resize_pos_embed(state, clip)
        open_clip.model.resize_text_pos_embed(state, clip)
        clip.load_state_dict(state)
    if tokens and tokens != [clip.context_length]:
        say(f"note: {path} has {tokens[0]} text positions, resized to {clip.context_length}; see --context-length")


# ---------------------------------------------------------------- data

UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class Pairs(Dataset):
    """The image-caption pairs of all sources. An item is an (epoch, index); its view depends on it and the seed alone.

    Where each pair lies is one line of one long text: ten million Python objects would be copied to every worker.
    Images come at the size of each model with the draw of their augmentation, which is done for whole batches on the
    device. So what the student sees does not depend on whether a teacher is there to see the same at its own size.
    """

    def __init__(self, cfg):
        text, ends, digest = bytearray(), [0], hashlib.sha256()
        for path, *rest in find_pairs(cfg):
            text += "\0".join(map(str, (path, *rest))).encode(errors="surrogateescape")  # a path may be any bytes
            ends.append(len(text))
            # Not the folder, which may move under a teacher cache.
            digest.update(f"{os.path.basename(path)} {rest}".encode(errors="surrogateescape"))
        self.seed, self.ends, self.text = cfg.seed, np.array(ends), bytes(text)
        self.fingerprint = f"{len(self)} pairs, {digest.hexdigest()[:16]}"

    def for_models(self, *models):
        data = copy.copy(self)
        data.frames, data.tokenizers = list(dict.fromkeys(m.frame for m in models)), [m.tokenizer for m in models]
        return data

    def __len__(self):
        return len(self.ends) - 1

    def place(self, index):
        """-> path, offset, length of the image, caption."""
        return self.text[self.ends[index] : self.ends[index + 1]].decode(errors="surrogateescape").split("\0", 3)

    def __getitem__(self, item):
        """-> {frame: (S, S, 3) uint8 image}, (6,) view, caption, the item, the indices that did not decode."""
        text, bad = "", []
        while len(bad) <= len(self) // 100:  # the training stops at more
            index = (item[1] + len(bad)) % len(self)
            try:
                opened, text = read_pair(self.seed, *self.place(index))
                if opened.format == "JPEG":  # decoded at half its size or less where that is twice what is needed
                    share = 2 * max(self.frames)[0] / max(opened.size)
                    opened.draft(None, [math.ceil(share * side) for side in opened.size])
                images = {frame: square(opened, *frame) for frame in self.frames}
                break
            except UNDECODABLE:
                bad.append(index)
        else:
            images = {frame: Image.new("L", (frame[0], frame[0])) for frame in self.frames}
        pixels = {frame: torch.from_numpy(np.array(image.convert("RGB"))) for frame, image in images.items()}
        view = draw_view(np.random.default_rng([self.seed, *item]))
        return pixels, torch.from_numpy(view), text, item, bad

    def collate(self, samples):
        """-> {frame: (n, S, S, 3)}, (n, 6) views, (n, context) tokens per model, items, share of repeats, undecodable."""
        images, views, texts, items, bad = zip(*samples)
        images = {frame: torch.stack([image[frame] for image in images]) for frame in self.frames}
        tokens = [tokenizer(list(texts)) for tokenizer in self.tokenizers]
        repeated = 1 - len(set(texts)) / len(texts)  # false negatives, which a negative beta repels most
        return images, torch.stack(views), tokens, items, repeated, {i for b in bad for i in b}


def batches(n, batch, steps, seed, process=0, world=1):
    """Yields the (epoch, index) pairs of every optimizer step in range(*steps), this process's share of each.

    The epochs are permutations of n that depend on (seed, epoch) alone, laid end to end and cut into batches:
    every pair once an epoch, all batches of one size, and any step can be entered without those before it.
    """
    order = {}
    for step in range(*steps):
        first = step * batch + process * (batch // world)
        positions = range(first, first + batch // world)
        epochs = {positions[0] // n, positions[-1] // n}
        order = {e: order[e] if e in order else np.random.default_rng([seed, e]).permutation(n) for e in epochs}
        yield [(p // n, int(order[p // n][p % n])) for p in positions]


def draw_view(rng):
    """The random part of the coupled augmentation (paper, 3.6), once per sample and so alike for both models: angle
    in radians, shift in x and y as shares of the half side, factors of brightness, contrast and saturation."""
    angle, shift = math.radians(rng.uniform(-7, 7)), 2 * rng.uniform(-0.05, 0.05, 2)
    return np.array([angle, *shift, *rng.uniform(0.85, 1.15, 3)], np.float32)


def augment(images, views):
    """(n, S, S, 3) uint8 and n draws of `draw_view` (n, 6) -> the images so seen, on their device."""
    x = images.permute(0, 3, 1, 2).float() / 255  # (n, 3, S, S)
    angle, dx, dy, brightness, contrast, saturation = (v.view(-1, 1, 1, 1) for v in views.unbind(1))
    rotation = torch.cat([angle.cos(), -angle.sin(), dx, angle.sin(), angle.cos(), dy], 1).view(-1, 2, 3)
    x = F.grid_sample(x, F.affine_grid(rotation, x.shape, align_corners=False), align_corners=False)
    luminance = lambda x: 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]  # (n, 1, S, S)
    x = (x * brightness).clamp(0, 1)
    grey = luminance(x).mean((2, 3), keepdim=True)  # (n, 1, 1, 1)
    x = (grey + contrast * (x - grey)).clamp(0, 1)
    grey = luminance(x)
    x = (grey + saturation * (x - grey)).clamp(0, 1)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


MAX_SIDE = 16_384  # pixels; padded to a square, a longer image would fill the memory


def square(image, size, interpolation):
    """An opened image of any Pillow mode -> 'L' or 'RGB', upright (EXIF), zero-padded to a centred square, resized.

    Deep greys are scaled to 0..255 (Pillow's own convert would clip them); what is transparent becomes black.
    """
    side = max(image.size)
    if side > MAX_SIDE:
        raise Image.DecompressionBombError(f"a side of {side} pixels, more than {MAX_SIDE}")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        values = np.asarray(image, np.float64)
        ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))  # the I;16 are always that deep
        full = next((r for r in ranges if values.max() <= r), 65535)
        image = Image.fromarray(np.clip(values * (255 / full) + 0.5, 0, 255).astype(np.uint8))
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    padded = Image.new(image.mode, (side, side))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded.resize((size, size), Image.Resampling[interpolation.upper()])


def find_pairs(cfg):
    """--data -> path, offset, length (-1: all of it) of the image, and caption, of every pair."""
    for source in cfg.data:
        with words(f"--data {source}"):
            patterns = list(braceexpand(source))
        for pattern in patterns:
            paths = sorted(glob.glob(pattern)) or [pattern] * Path(pattern).is_file()
            if pattern == "phantom":
                yield from ((pattern, i, 0, "") for i in range(cfg.phantom_pairs))
            elif not paths:
                fail(f"--data {source}: no file matches {pattern} (valid: phantom, pairs.csv, a pattern of tars)")
            for path in tqdm(paths, desc="indexing", leave=False, delay=2):
                yield from find_in_table(path) if path.endswith((".csv", ".tsv")) else find_in_tar(path)


def find_in_tar(path):
    """A WebDataset shard: a key is one image (jpg, jpeg, png, webp) and one txt; other members are passed over."""
    found, kinds = {}, {"txt": "txt", **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image")}
    advice = "gunzip it" if path.endswith("gz") else "not a readable tar; a table must be named .csv or .tsv"
    with words(f"--data {path}: {advice}"), tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            key, _, extension = base.partition(".")  # WebDataset: a key ends at the first dot
            kind = kinds.get(extension.lower())
            if member.isfile() and key and kind:
                pair = found.setdefault((folder, key), {})
                if kind in pair:
                    fail(f"--data {path}: key {key} has more than one {kind}")
                pair[kind] = member
        tar.fileobj.seek(tar.offset)
        # tarfile takes a cut between two members for the end; a whole archive ends in blocks of zeros.
        if tar.fileobj.read(512) != bytes(512):
            fail(f"--data {path}: truncated or damaged, the end-of-archive mark is missing")
        pairs = [pair for pair in found.values() if len(pair) == 2]
        if not pairs:
            fail(f"--data {path}: no pair of an image (jpg, jpeg, png, webp) and a txt with the same key")
        for pair in pairs:
            caption = tar.extractfile(pair["txt"]).read().decode()
            yield path, pair["image"].offset_data, pair["image"].size, caption.strip()


def find_in_table(path):
    """A CSV (.tsv: by tabs) with `image`, relative to the file, and `caption`; open_clip's `filepath` and `title`."""
    missing = []
    for row in read_table(path, delimiter="\t" if path.endswith(".tsv") else ","):
        image, caption = row.get("image", row.get("filepath")), row.get("caption", row.get("title"))
        if image is None or caption is None:
            fail(f"--data {path}: has no column {'caption' if image else 'image'!r}; its columns are {[*row]}")
        image = Path(path).parent / image
        missing += [image] * (not image.is_file())
        yield image, 0, -1, caption.strip()
    if missing:
        fail(f"--data {path}: {len(missing)} images are not there, the first is {missing[0]}")


def read_table(path, columns=(), delimiter=","):
    """Yields the rows of a CSV file in UTF-8 as dictionaries of strings; fails where a column or a value is missing."""
    row = None
    with words(f"{path}: no CSV in UTF-8"), open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter=delimiter, strict=True)
        absent = [c for c in columns if c not in (table.fieldnames or [])]
        if absent:
            fail(f"{path}: has no column {absent[0]!r}; its columns are {table.fieldnames}")
        for row in table:
            if None in row or None in row.values():
                fail(f"{path}: line {table.line_num} has too many or too few values (a comma in one needs quotes)")
            yield row
    if not row:
        fail(f"{path}: has no rows")


def read_pair(seed, path, offset, length, caption):
    """-> the opened image, and the caption."""
    if path == "phantom":
        return phantom_pair(seed, int(offset))
    with open(path, "rb") as file:
        file.seek(int(offset))
        return Image.open(io.BytesIO(file.read(int(length)))), caption


# ---------------------------------------------------------------- data: a synthetic ultrasound

BRAIN_PLANES = ("trans-thalamic", "trans-cerebellum", "trans-ventricular")
VIEWS = {plane: f"fetal brain, {plane} plane" for plane in BRAIN_PLANES}
VIEWS |= {"abdomen": "fetal abdomen", "femur": "fetal femur", "heart": "fetal heart", "cervix": "maternal cervix"}
CAPTIONS = ("Ultrasound of the {view}", "Prenatal ultrasound image showing the {view}", "{view} on ultrasound")
DETAILS = (
    "{caption}, {weeks} weeks and {day} days, {spacing:.2f} mm per pixel.",
    "{caption} at {weeks} weeks and {day} days with a pixel spacing of {spacing:.2f} mm.",
    "{weeks} weeks and {day} days, {spacing:.2f} mm per pixel: {caption}.",
)
GA_DAYS = np.arange(14 * 7, 38 * 7 + 6 + 1)  # 14w0d to 38w6d
WHO_HC50 = (2.09924879247164, 0.253373656106037, -0.00605647816678282, 0.0000514256072059917)


def who_hc(days, curve=WHO_HC50):
    """Head circumference in mm at a gestational age in days: the WHO growth chart, 50th percentile by default."""
    return np.exp(np.polyval(curve[::-1], np.asarray(days) / 7))


def caption(index, view, days=None, spacing=None):
    """A sentence on `view`, with age (days) and spacing (mm per pixel) where known; the phrasing follows `index`."""
    text = CAPTIONS[index % 3].format(view=view)
    if days is None:
        return text + "."
    return DETAILS[index // 3 % 3].format(caption=text, weeks=days // 7, day=days % 7, spacing=spacing)


# What the phantom shows: ovals (x, y, half-axis in x, in y, fill, wall) in half-lengths of the head; 0 is no wall.
SPINE = [(-0.75, 0, 0.06, 0.06, 230, 0), (-0.66, 0.1, 0.06, 0.06, 230, 0), (-0.66, -0.1, 0.06, 0.06, 230, 0)]
BRAIN = [(0, 0, 0.95, 0.01, 160, 0), (0.5, 0, 0.13, 0.07, 0, 180)]  # midline, cavum septi pellucidi
CHAMBERS = [(x, y, 0.17, 0.13, 0, 0) for x, y in ((0.3, 0.28), (0.3, -0.06), (-0.1, 0.26), (-0.1, -0.04))]
ANATOMY = {
    "trans-thalamic": [*BRAIN, (-0.05, 0.17, 0.3, 0.15, 0, 0), (-0.05, -0.17, 0.3, 0.15, 0, 0)],
    "trans-cerebellum": [*BRAIN, (-0.55, 0.24, 0.22, 0.24, 100, 230), (-0.55, -0.24, 0.22, 0.24, 100, 230)],
    "trans-ventricular": [*BRAIN, (-0.3, 0.38, 0.5, 0.16, 0, 210), (-0.35, 0.38, 0.28, 0.09, 230, 0)],
    "abdomen": [(0, 0, 0.9, 0.85, 75, 150), (-0.1, 0.42, 0.24, 0.17, 0, 0), (0.4, -0.08, 0.35, 0.05, 0, 0), *SPINE],
    "heart": [(0, 0, 0.95, 0.85, 75, 130), (0.1, 0.1, 0.5, 0.42, 140, 0), *CHAMBERS, *SPINE],
    "femur": [(0, 0, 1.3, 0.4, 80, 0), (0, 0, 0.6, 0.04, 255, 0)],
    "cervix": [(0, 0, 1.2, 0.6, 90, 0), (-1.2, 0.3, 0.6, 0.5, 0, 0), (0, 0, 0.75, 0.04, 0, 170)],
}


@lru_cache(maxsize=8192)  # 160 MB in a loader process, which so draws each only once and not every epoch
def phantom(seed, index, width=160, height=120):
    """A synthetic ultrasound, deterministic in (seed, index): an 'L' image, and its view, days, pixel_mm, hc_mm."""
    rng = np.random.default_rng([seed, index])
    view, days = str(rng.choice([*ANATOMY, *BRAIN_PLANES])), int(rng.choice(GA_DAYS))  # six in ten are heads
    hc_mm = float(who_hc(days)) * rng.normal(1, 0.02)
    # As a sonographer does, one of two depths, so that the head fills the sector: size alone does not tell the age.
    pixel_mm = (0.55 if hc_mm * rng.uniform(0.95, 1.05) <= 185 else 0.98) * rng.uniform(0.98, 1.02)
    ratio = rng.uniform(0.72, 0.84)  # of the head's half-axes
    radius = hc_mm / (2 * math.pi * pixel_mm * math.sqrt((1 + ratio**2) / 2))  # pixels, half of the head's length
    tilt, mirror = rng.uniform(-math.pi / 4, math.pi / 4), rng.choice([-1, 1])
    center = np.array([width, height]) / 2 + rng.uniform(-0.08, 0.08, 2) * width
    turn = radius * np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    angles = np.linspace(0, 2 * math.pi, 40)
    circle = np.stack([np.cos(angles), mirror * np.sin(angles)], 1)
    tissue = Image.new("L", (width, height), int(rng.uniform(25, 60)))
    pen = ImageDraw.Draw(tissue)

    def oval(x, y, rx, ry, fill, wall=0, thick=2):
        points = [tuple(p) for p in (circle * (rx, ry) + (x, mirror * y)) @ turn + center]
        pen.polygon(points, fill=int(fill), outline=int(fill))
        pen.line(points, fill=int(wall or fill), width=thick if wall else 1)

    if view.startswith("trans"):
        oval(0, 0, 1, ratio, 60, rng.uniform(170, 255), 3)  # skull
    for _ in range(rng.integers(0, 4)):  # clutter
        oval(*rng.uniform(-0.6, 0.6, 2), *rng.uniform(0.04, 0.15, 2), rng.uniform(10, 130))
    contrast = rng.uniform(0.75, 1)  # to the tissue around; where it is low, planes of the brain can be confused
    for *shape, fill, wall in ANATOMY[view]:
        oval(*shape, 60 + contrast * (fill - 60), wall and 60 + contrast * (wall - 60))

    speckle = rng.rayleigh(0.8, (height, width))
    speckle = (speckle + np.roll(speckle, 1, 1)) / 2  # a resolution cell is wider than deep
    gain = np.linspace(1.15, rng.uniform(0.4, 0.9), height)[:, None] * rng.uniform(0.8, 1.3)  # fades with depth
    top = rng.uniform(-0.5, -0.1) * height  # of the sector, above the image
    reach, spread = 1.05 * (height - top), rng.uniform(35, 55)
    sector, box = Image.new("L", (width, height)), (width / 2 - reach, top - reach, width / 2 + reach, top + reach)
    ImageDraw.Draw(sector).pieslice(box, 90 - spread, 90 + spread, fill=1)
    echo = np.asarray(tissue.filter(ImageFilter.GaussianBlur(1))) * speckle * gain * np.asarray(sector)
    image = Image.fromarray(np.clip(echo, 0, 255).astype(np.uint8))
    bar = [(width / 2 + side * 25 / pixel_mm, height - 4) for side in (-1, 1)]
    ImageDraw.Draw(image).line(bar, fill=255, width=3)  # the machine's scale, 50 mm
    return image, {"view": view, "days": days, "pixel_mm": pixel_mm, "hc_mm": hc_mm}


def phantom_pair(seed, index):
    """-> an image, and a caption that tells the plane of a brain or the age, seldom both: so each has to be learnt."""
    image, label = phantom(seed, index)
    view, kind = VIEWS[label["view"]], index // 9 % 8
    if kind not in (3, 4, 5, 6):
        view = view.partition(",")[0]
    if kind > 3:
        return image, caption(index, view)
    return image, caption(index, view, label["days"], label["pixel_mm"] * max(image.size) / 64)  # of the 64 px input


# ---------------------------------------------------------------- training


def train(cfg, device, student, teacher, data, path, caught):
    """Trains `student` on `data` against `teacher` or, where that is None, with the CLIP loss alone -> its log.

    Goes on from the checkpoint at `path` where `previous` allows it; writes it after every epoch and when a signal
    has been `caught`.
    """
    n, chunk = len(data), cfg.micro_batch or cfg.batch // WORLD
    total = cfg.epochs * n // cfg.batch  # T of Eq. 5 and 7, optimizer steps
    torch.manual_seed(cfg.seed)
    if cfg.feature:
        student.projections.extend(nn.Linear(student.width, teacher.width) for _ in ("image", "text"))
    student.to(device).train()
    clamp_scale(student.clip)
    optimizer = make_optimizer(cfg, student)
    run = Run(cfg, data, path, total, student, optimizer)
    # static_graph: some parameters get no gradient (CoCa's decoder, SigLIP's bias), and DDP would wait for it.
    net = DistributedDataParallel(student, static_graph=True) if dist.is_initialized() else student
    order = batches(n, cfg.batch, (run.step, total), cfg.seed, RANK, WORLD)
    how = dict(num_workers=WORKERS if cfg.workers < 0 else cfg.workers, pin_memory=device.type == "cuda")
    loader = iter(DataLoader(data, batch_sampler=order, collate_fn=data.collate, worker_init_fn=ignore_signals, **how))

    for step in range(run.step, total):
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, RANK]).generate_state(1)[0]))  # of any dropout
        images, views, tokens, items, repeated = run.wait_for(loader)  # tokens: the student's, the teacher's
        views, *tokens = (x.to(device, non_blocking=True) for x in (views, *tokens))
        for frame, x in images.items():
            parts = zip(x.to(device, non_blocking=True).split(chunk), views.split(chunk))
            images[frame] = torch.cat([augment(*part) for part in parts])
        (image, text, *projected), scale = net(images[student.frame], tokens[0], chunk)
        lr, beta = lr_at(step, total, cfg.lr, cfg.warmup), beta_at(step, total, cfg.beta0, cfg.r)
        if teacher:
            t_image, t_text, t_scale = *teacher(items, images, tokens[-1], chunk), teacher.scale
            weights = dict(beta=beta, diag=beta if cfg.coupled else cfg.diag, tau=cfg.tau, smooth=cfg.smooth)
        else:  # the student itself stands in, at weight 0
            t_image, t_text, t_scale, weights = image.detach(), text.detach(), scale.detach(), dict(beta=0, diag=0)
        image, text, t_image, t_text, *projected = map(gather, (image, text, t_image, t_text, *projected))
        loss, parts = dark_loss(image, text, scale, t_image, t_text, t_scale, **weights)
        if projected:  # feature KD: mean squared error between embeddings of unit norm, (N, D_t)
            pairs = [(F.normalize(x.float(), dim=-1) for x in pair) for pair in zip(projected, (t_image, t_text))]
            parts["feature"] = sum(F.mse_loss(*pair) for pair in pairs)
            loss = loss + cfg.feature * parts["feature"]

        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip_norm)
        optimizer.step()
        clamp_scale(student.clip)

        parts = parts if teacher else {"clip": parts["clip"]}
        figures = dict(loss=loss, **parts, beta=beta, lr=lr, grad_norm=grad_norm, repeated_captions=repeated)
        run.after_step({**figures, "logit_scale": student.clip.logit_scale.exp()}, caught)
    return run.log


def make_optimizer(cfg, model):
    # Biases, norms and gains (also those shaped (C, 1, 1)) and the logit scale are not decayed.
    matrices, vectors = ([p for p in model.parameters() if (p.squeeze().ndim >= 2) == large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


class Teacher:
    """A frozen model's embeddings of batches, kept in a folder where --teacher-cache names one.

    The view of a pair is a function of (seed, epoch, index), and so are a frozen teacher's embeddings: `image-E.npy`
    holds those of epoch E, `text.npy` the captions', (n, D_t) in fp16, NaN where not yet computed. What is used is
    always what is stored, so cold and warm runs end with the same bits. Where nothing is missing, no model is loaded.
    """

    def __init__(self, cfg, weights, data, device):
        self.folder, self.maps, self.n, self.device = cfg.teacher_cache, {}, len(data), device
        self.model, key, known = None, {}, {}
        if self.folder:
            key = dict(teacher=cfg.teacher, weights=hash_of(weights), context_length=cfg.context_length, seed=cfg.seed)
            key |= dict(data=data.fingerprint)
            self.folder, path = Path(self.folder), Path(self.folder, "key.json")
            with words(f"--teacher-cache {self.folder}"):
                known = json.loads(path.read_text()) if path.exists() else {}
        self.width, steps = known.get("width"), (0, cfg.epochs * self.n // cfg.batch)
        self.same(known, key)
        if not known or any(np.isnan(self.read(i)).any() for i in batches(self.n, cfg.batch, steps, cfg.seed)):
            self.model = open_model(cfg.teacher, weights, cfg.context_length, "--teacher-weights")
            self.model.requires_grad_(False).eval().to(device)
            self.width = self.model.width
            key |= dict(width=self.width, scale=self.model.clip.logit_scale.exp().item())
            key |= dict(preprocess=str(self.model.preprocess()))
            self.same(known, key)
        known |= key
        self.scale = torch.tensor(known["scale"], device=device)
        if self.folder and self.model:
            gigabytes = 2e-9 * self.n * self.width * (cfg.epochs + 1)
            say(f"--teacher-cache {self.folder}: {gigabytes:.2f} GB when all {cfg.epochs} epochs are there")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known, indent=2).encode())

    def same(self, known, key):
        for name in [name for name in key if name in known and known[name] != key[name]]:
            fail(f"--teacher-cache {self.folder}: made with {name} {known[name]!r}, this run has {key[name]!r}")

    def map(self, name):
        """The (n, D_t) file of that name, mapped into memory; made if it is not there."""
        if name not in self.maps:
            path, memmap = self.folder / f"{name}.npy", np.lib.format.open_memmap
            with words(f"--teacher-cache {path}"), filelock.FileLock(self.folder / ".lock"):
                if not path.exists():
                    write_atomically(path, self.write_empty)
                memmap(path, "r")  # refuses a file that was cut short; "r+" would fill it up with zeros
                self.maps[name] = memmap(path, "r+")
        return self.maps[name]

    def write_empty(self, file):
        shape = {"descr": "<f2", "fortran_order": False, "shape": (self.n, self.width)}
        np.lib.format.write_array_header_1_0(file, shape)
        row = np.full(self.width, np.nan, "<f2").tobytes()
        for _ in range(self.n):  # written, not mapped: on a full disk a map would end the process without a word
            file.write(row)

    def read(self, items):
        """n (epoch, index) -> their image and text embeddings (n, 2, D_t)."""
        return np.array([[self.map(f"image-{epoch}")[i], self.map("text")[i]] for epoch, i in items])

    @torch.no_grad()
    def __call__(self, items, images, tokens, chunk):
        """n (epoch, index), {frame: (n, S, S, 3) uint8}, (n, context) -> image (n, D_t), text (n, D_t)."""
        compute = lambda: self.model(images[self.model.frame], tokens, chunk)[0]
        if not self.folder:
            return compute()
        stored = self.read(items)
        if np.isnan(stored).any():
            new = [F.normalize(x.float(), dim=-1).cpu().numpy() for x in compute()]
            for k, kind in np.argwhere(np.isnan(stored).any(2)):
                epoch, i = items[k]
                self.map("text" if kind else f"image-{epoch}")[i] = new[kind][k]
            stored = self.read(items)
        return torch.from_numpy(stored).to(self.device).float().unbind(1)


def hash_of(weights):
    """A tag, or the hash of a file; of a checkpoint's tensors alone, by their checksums: its log holds times."""
    if not Path(weights).is_file():
        return weights
    if zipfile.is_zipfile(weights):
        content = str([r.CRC for r in zipfile.ZipFile(weights).infolist() if "/data/" in r.filename]).encode()
    else:
        content = Path(weights).read_bytes()
    return hashlib.sha256(content).hexdigest()


class Run:
    """The files of a run, and what they hold beside the weights: its log, and the pairs that did not decode."""

    def __init__(self, cfg, data, path, total, student, optimizer):
        self.cfg, self.data, self.path, self.student, self.optimizer = cfg, data, path, student, optimizer
        self.total, self.step, self.log, self.bad = total, 0, [], set()
        self.log_path = path.with_name("log.jsonl" if path.stem == "student" else f"{path.stem}_log.jsonl")
        found = previous(path, cfg, data)
        everyones(set())  # all processes have looked before one of them writes
        if found:
            with words(f"{path}: cannot be gone on with"):
                student.clip.load_state_dict(found["state_dict"])
                student.projections.load_state_dict(found["projections"])
                optimizer.load_state_dict(found["optimizer"])
                self.step, self.log, self.bad = found["step"], found["log"], set(found["bad"])
            say(f"{path}: goes on from step {self.step} of {total}")
        elif cfg.resume and path.stem == "student":
            say(f"--resume: there is no {path}, so this run begins")
        self.since, self.waited, self.counted = time.perf_counter(), 0.0, self.step
        self.bar = tqdm(total=total, initial=self.step, desc=path.stem, disable=RANK > 0 or None, dynamic_ncols=True)

    def save(self):
        """Writes the checkpoint, which carries the log, and the log; what an earlier run left there goes only now."""
        if RANK == 0:
            epoch = self.step * self.cfg.batch / len(self.data)
            more = dict(steps=self.total, log=self.log, bad=sorted(self.bad), identity=identity(self.cfg, self.data))
            more |= dict(optimizer=self.optimizer.state_dict(), projections=self.student.projections.state_dict())
            save_checkpoint(self.path, self.student, self.cfg, self.step, epoch, **more)
            write_atomically(self.log_path, "".join(json.dumps(record) + "\n" for record in self.log).encode())

    def wait_for(self, loader):
        """-> the next batch. Stops when more than 1 % of the pairs did not decode."""
        start = time.perf_counter()
        *batch, undecodable = next(loader)
        self.waited, self.bad = self.waited + time.perf_counter() - start, self.bad | undecodable
        if len(self.bad) > len(self.data) // 100:
            first = f"pair {min(self.bad)}, in {self.data.place(min(self.bad))[0]}"
            fail(f"{len(self.bad)} of {len(self.data)} pairs do not decode, more than 1 %: the first is {first}", 1)
        return batch

    def after_step(self, figures, caught):
        """Logs, saves at the end of an epoch, and ends the run after a signal. The host waits for the device only here."""
        n, batch, step, self.step = len(self.data), self.cfg.batch, self.step, self.step + 1
        epoch_ends = self.step == self.total or self.step * batch // n > step * batch // n
        signals, logs = everyones(caught), epoch_ends or step % self.cfg.log_every == 0
        self.bar.update()
        if logs or signals:
            figures = {name: x.item() if torch.is_tensor(x) else x for name, x in figures.items()}
            if not all(map(math.isfinite, figures.values())):
                fail(f"not finite by step {step}: " + ", ".join(f"{name} {x:g}" for name, x in figures.items()), 1)
        if logs:
            self.bad, seconds = everyones(self.bad), time.perf_counter() - self.since
            speed = {"img_s": (self.step - self.counted) * batch / seconds, "data_wait": self.waited / seconds}
            self.since, self.waited, self.counted = time.perf_counter(), 0.0, self.step
            record = {"step": step, "epoch": step * batch / n, "diag": None, "off": None, **figures, **speed}
            self.log.append(record | {"bad": len(self.bad)})
            terms = " ".join(f"{k} {record[k]:.3f}" for k in ("loss", "clip", "diag", "off") if record[k] is not None)
            told = terms + " beta {beta:+.2f} scale {logit_scale:.1f} {img_s:.0f} img/s".format(**record)
            self.bar.set_postfix_str(told)
            if epoch_ends:
                say(f"epoch {self.step * batch / n:.2f}/{self.cfg.epochs}  step {self.step}/{self.total}  {told}")
        if epoch_ends or signals:
            self.save()
        if signals and self.step < self.total:
            say(f"{self.path}: --resume goes on from step {self.step}")
            sys.exit(128 + max(signals))


def draw_curves(log, cfg, path):
    """The two weights, with the zero crossing of beta, and the loss terms over epochs."""
    import matplotlib.pyplot as plt  # here, so that training needs no display and starts faster

    column = lambda name: [record[name] for record in log]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    top.plot(column("epoch"), column("beta") if cfg.coupled else [cfg.diag] * len(log), label="weight of diag")
    top.plot(column("epoch"), column("beta"), label="weight of off: beta", linestyle="--" if cfg.coupled else "-")
    top.axhline(0, color="gray", linewidth=0.8)
    if cfg.r < 0 and cfg.beta0:
        crossing = cfg.epochs / (1 - cfg.r)
        top.axvline(crossing, color="gray", linestyle=":", label=f"beta = 0 at epoch {crossing:.1f}")
    for term in ("clip", "diag", "off"):
        if log[-1][term] is not None:
            bottom.plot(column("epoch"), column(term), label=term)
    top.set_ylabel("weight")
    bottom.set(xlabel="epoch", ylabel="loss term, unweighted (nats)")
    for axis in (top, bottom):
        axis.legend()
    write_atomically(path, partial(figure.savefig, dpi=120, format="png"))
    plt.close(figure)


# ---------------------------------------------------------------- processes


RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))  # by torchrun
WORKERS = max(1, min(8, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))  # loaders, by default


def everyones(values):
    """The union of a set over the processes, which all wait for each other here."""
    sets = [values] * WORLD
    if dist.is_initialized():
        dist.all_gather_object(sets, values)
    return set().union(*sets)


def prepare_device(cfg):
    """The device of this process; joins the process group when torchrun started several."""
    cuda = torch.cuda.is_available() and cfg.device.startswith(("auto", "cuda"))
    device = torch.device("cpu" if cfg.device == "auto" else cfg.device)
    if cuda and (WORLD > 1 or cfg.device == "auto"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if WORLD > 1:
        with words("WORLD_SIZE is set, but not what torchrun sets beside it"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # gloo: sets pass without the GPU
    return device


@contextmanager
def signals_held():
    """Ctrl-C and SIGTERM wait in the set that this yields, so that a step is finished and saved first."""
    caught = set()
    before = {s: signal.signal(s, lambda number, _: caught.add(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):  # a loader process lets the training finish its step
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------- mistakes


def say(message):
    if RANK == 0:
        tqdm.write(message)


def fail(message, code=2):
    """One line on stderr, and the end: exit code 2 for a user's mistake, 1 for what goes wrong in the middle of a run."""
    if code == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # a mistake is met by every process of a machine
        bar = "\n" * (code == 1)  # ends the progress bar's line
        print(f"{bar}{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


MAIN_ERRORS = (OSError, MemoryError)  # what may happen to any script at any time


@contextmanager
def words(what="", errors=Exception):
    """Words every mistake: an error in here becomes 'what: what the library said', one line, exit code 2 (Ctrl-C: 130).

    For calls of libraries with what a user gave, and with MAIN_ERRORS as a decorator of every main: so a fault of this
    project keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except errors as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            text = f"needs {error.name}: pip install {error.name}"
        if isinstance(error, pickle.UnpicklingError):  # torch's text goes on to advise what would run foreign code
            text = "holds what cannot be loaded safely"
        fail(f"{what}: {text[:300]}".removeprefix(": "))


# ---------------------------------------------------------------- checkpoints


def write_atomically(path, content):
    """Writes bytes, or what content(file) writes, to a temporary file and renames it: a kill leaves the old file or the
    new, never half of one."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, what):
    """A .pt or .safetensors file -> what it holds, on the CPU. No code in it runs, and a flipped bit is found."""
    with words(f"{what}: no weights or checkpoint"):
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()  # torch compares no checksum
        if damaged:
            fail(f"{what}: its record {damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)


FORMAT = "dark-2"


def save_checkpoint(path, model, cfg, step=0, epoch=0.0, **more):
    """Self-describing: `model_from_checkpoint` needs nothing else (for local-dir: and hf-hub: models, their source).
    `state_dict` is open_clip's, so that the file itself can be given to --teacher-weights or --student-weights."""
    content = dict(format=FORMAT, architecture=model.name, context_length=model.context_length, step=step, epoch=epoch)
    content |= dict(preprocess=model.preprocess(), config=dataclasses.asdict(cfg))
    content |= dict(state_dict=model.clip.state_dict(), **more)
    buffer = io.BytesIO()  # for on a full disk torch.save itself does not say what is wrong
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    """Reads a checkpoint of this project on the CPU; fails when it is missing, damaged or something else."""
    if not Path(path).is_file():
        fail(f"{path}: there is no such checkpoint; python dark.py writes out/student.pt")
    content = read_file(path, path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        fail(f"{path}: no checkpoint of dark.py (format {FORMAT}); plain weights go with --model NAME --weights FILE")
    missing = {"architecture", "context_length", "preprocess", "config", "state_dict", "step", "epoch"} - set(content)
    if missing:
        fail(f"{path}: a checkpoint without {', '.join(sorted(missing))}")
    return content


def model_from_checkpoint(content):
    """The model that `save_checkpoint` was given, in eval mode."""
    model = open_model(content["architecture"], context_length=content["context_length"])
    with words(f"the checkpoint does not fit {model.name}"):
        model.clip.load_state_dict(content["state_dict"])
        for key in PREPROCESS:
            setattr(model, key, content["preprocess"][key])
    return model.eval()


# How a run is carried out, not what it computes: these may change between a run and its --resume.
RUN_FIELDS = ("ablation", "teacher_cache", "out", "workers", "device", "log_every", "resume", "overwrite")


def identity(cfg, data):
    """What must be the same for a run to go on: its settings, its data, and the processes, which batch norm sees."""
    settings = {f"--{k.replace('_', '-')}": v for k, v in dataclasses.asdict(cfg).items() if k not in RUN_FIELDS}
    return settings | {"content of --data": data.fingerprint, "number of processes": WORLD}


def previous(path, cfg, data):
    """The checkpoint at `path` that a run of `cfg` goes on with, or None where it begins and may replace what is there."""
    if not path.exists() or (cfg.overwrite and not (cfg.resume and zipfile.is_zipfile(path))):
        return None
    found, now = load_checkpoint(path), identity(cfg, data)
    before, finished = found.get("identity", {}), found["step"] == found.get("steps")
    changed = [name for name in now if now[name] != before.get(name)]
    if changed and cfg.overwrite:
        return None
    if not cfg.resume:
        state = "a finished run" if finished else f"a run at step {found['step']} of {found.get('steps')}"
        fail(f"--out {cfg.out} holds {state} ({path.name}): --resume goes on with it, --overwrite replaces it")
    if changed:
        what = ", ".join(f"{name} was {before.get(name)!r}, is now {now[name]!r}" for name in changed)
        fail(f"--out {cfg.out} holds another run ({path.name}): {what}")
    return found


def lock(out):
    """Holds the folder for this process, in a `with`; the system lets go of it too, however the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    holder = out / ".lock"
    owner = holder.read_text() if holder.exists() else ""
    try:
        held = filelock.FileLock(holder).acquire(blocking=False)
    except filelock.Timeout:
        fail(f"--out {out}: is in use by process {owner or 'another'}")
    holder.write_text(str(os.getpid()))
    for leftover in out.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    return held


# ---------------------------------------------------------------- command line


def given(options, argv, description):
    """The fields of the dataclass `options` that the command line gives -> a dict. The parser is made from its lines:
    names, types and defaults from the fields, the help from their comments."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(options), re.MULTILINE))
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)")
    for field in dataclasses.fields(options):
        name, more = "--" + field.name.replace("_", "-"), {"type": field.type}
        if field.type is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif field.type == tuple[str, ...]:
            more = {"nargs": "+"}
        elif typing.get_args(field.type):
            more = {"choices": typing.get_args(field.type)}  # of a Literal
        if "positional" in field.metadata:
            name, more = field.name, {"nargs": field.metadata["positional"]}
        help_text = f"{help_of[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(name, default=argparse.SUPPRESS, help=help_text, **more)
    values = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def parse_args(argv=None):
    """-> the configuration, and whether it is a real run. Precedence: flag, --ablation, demonstration, default."""
    flags = given(Config, argv, f"{__doc__.splitlines()[0]} The demonstration's defaults: {DEMONSTRATION}.")
    ablation = flags.get("ablation", "")
    if ablation and ablation not in ABLATIONS:
        fail(f"--ablation {ablation}: valid are {', '.join(ABLATIONS)}")
    flags = {**ABLATIONS.get(ablation, {}), **flags}
    cfg = Config(**flags)
    if cfg.coupled and cfg.beta0 == 0 and cfg.feature == 0:
        flags["teacher"] = cfg.teacher = ""  # it would have no weight anywhere
    # Real data with a teacher, or with no need of one, is the paper's run; else everything starts at random.
    ready = cfg.teacher_weights or ":" in cfg.teacher or (cfg.student_weights and not cfg.teacher)
    real = bool(ready) and set(cfg.data) != {"phantom"}
    cfg = cfg if real else Config(**{**DEMONSTRATION, **flags})
    check(cfg)
    if cfg.r_is_end:
        cfg.r /= cfg.beta0  # from here on r is that of Eq. 7, which ends at r * beta0
    return cfg, real


def check(cfg):
    """Fails on a setting that no run can use, naming the flag and what would be valid."""
    least = dict(batch=2, epochs=1, teacher_epochs=0, phantom_pairs=2, log_every=1, workers=-1, seed=0, micro_batch=0)
    least |= dict(lr=0, warmup=0, weight_decay=0, clip_norm=0, feature=0, context_length=0)
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"--{name.replace('_', '-')} {value}: must be a finite number")
        if name in least and value < least[name]:
            fail(f"--{name.replace('_', '-')} {value}: must be at least {least[name]}")
    for wrong, message in (
        (cfg.tau <= 0, f"--tau {cfg.tau}: must be more than 0"),
        (not 0 <= cfg.smooth < 1, f"--smooth {cfg.smooth}: must be at least 0 and less than 1"),
        (cfg.r_is_end and cfg.beta0 == 0, "--r-is-end: needs a --beta0 other than 0, which stays 0 whatever r is"),
        (cfg.seed >= 2**32, f"--seed {cfg.seed}: must be less than 2**32; the evaluation's phantom lies beyond"),
        (cfg.resume and cfg.overwrite, "--resume with --overwrite: give one of them"),
        (cfg.batch % WORLD, f"--batch {cfg.batch}: not divisible by the {WORLD} processes"),
        (os.path.exists(cfg.out) and not os.path.isdir(cfg.out), f"--out {cfg.out}: is a file; give a folder"),
    ):
        if wrong:
            fail(message)
    with words(f"--device {cfg.device} (valid are auto, cpu, cuda, cuda:N, mps)"):
        torch.zeros(1, device="cpu" if cfg.device == "auto" else cfg.device).item()


def teacher_config(cfg):
    """The run that trains the teacher: the same loop, with the teacher as a student of none. It goes on with a teacher
    that is there and fits, finished or not."""
    neutral = dict(coupled=True, beta0=0.0, r=1.0, r_is_end=False, diag=1.0, tau=5.0, smooth=0.0, feature=0.0)
    models = dict(student=cfg.teacher, student_weights="", teacher="", teacher_weights="", teacher_epochs=0)
    return dataclasses.replace(cfg, epochs=cfg.teacher_epochs or cfg.epochs, resume=True, **models, **neutral)


def introduce(cfg, real, student):
    """The first lines of a run: what it is, and its schedule in numbers."""
    if not real:
        say("A demonstration: small models from scratch. For more: --data, --teacher-weights and --student-weights.")
    line = f"beta {cfg.beta0:g} -> {cfg.r * cfg.beta0:g}"
    if cfg.r < 0 and cfg.beta0:
        line += f", crossing zero at epoch {cfg.epochs / (1 - cfg.r):.1f} of {cfg.epochs} "
        line += "(r is the end)" if cfg.r_is_end else f"(Eq. 7; the authors' own run ends at {cfg.r:g}: --r-is-end)"
    tower, whole = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (student.clip.visual, student.clip))
    about = f"{whole:.2f} M parameters, {tower:.2f} M of them for {student.size} px images"
    say(f"{line}\nstudent: {student.name}, {about}")


@words(errors=MAIN_ERRORS)
def main(argv=None):
    cfg, real = parse_args(argv)
    device, out, data, teacher = prepare_device(cfg), Path(cfg.out), Pairs(cfg), None
    if cfg.batch > len(data):
        fail(f"--batch {cfg.batch}: more than the {len(data)} pairs of --data; at most {len(data)}")
    torch.manual_seed(cfg.seed)
    student = open_model(cfg.student, cfg.student_weights, cfg.context_length, "--student-weights")
    trains_teacher = cfg.teacher and not cfg.teacher_weights and ":" not in cfg.teacher
    if trains_teacher:
        torch.manual_seed(cfg.seed)
        model = open_model(cfg.teacher, "", cfg.context_length, "--teacher-weights")
    elif cfg.teacher:
        teacher = Teacher(cfg, cfg.teacher_weights, data, device)
    previous(out / "student.pt", cfg, data)  # fails before a teacher is trained for nothing
    introduce(cfg, real, student)
    with lock(out) if RANK == 0 else nullcontext(), signals_held() as caught:
        if trains_teacher:
            say("no --teacher-weights: the teacher is trained first, with the CLIP loss alone")
            train(teacher_config(cfg), device, model, None, data.for_models(model), out / "teacher.pt", caught)
            everyones(set())  # the file is whole before another process reads it
            teacher = Teacher(cfg, str(out / "teacher.pt"), data, device)
        data = data.for_models(student, teacher.model) if teacher and teacher.model else data.for_models(student)
        log = train(cfg, device, student, teacher, data, out / "student.pt", caught)
        if RANK == 0:
            draw_curves(log, cfg, out / "curves.png")
            say(f"wrote {out / 'student.pt'}, {out / 'log.jsonl'} and {out / 'curves.png'}")
    if dist.is_initialized():
        time.sleep(0.1)  # else torch 2.6 may wait forever: its threads still let go of what was gathered last
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
