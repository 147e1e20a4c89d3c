"""DARK: distil a large CLIP into a phone-sized one by imitating its matches and, later, repelling its confusions.

    loss = CLIP + diag + beta(t) * off        beta(t) = beta0 * (1 - t/T * (1 - r))

`diag` and `off` are the matched and the non-matched terms of the teacher-student cross-entropy. The weight of `diag`
stays 1, that of `off` falls from beta0 > 0 (imitate) through zero to r * beta0 < 0 (repel). arXiv 2603.05421.

    python dark.py --beta0 2 --r -0.8                                    # demonstration: nothing is downloaded
    python dark.py --data 'shards/{000000..000024}.tar' --context-length 117 --micro-batch 256 \
        --teacher-weights FetalCLIP_weights.pt --student-weights dfndr2b   # the paper's run
    torchrun --nproc_per_node 4 dark.py ...                              # the same on four GPUs, --batch is global
"""

import argparse
import csv
import dataclasses
import difflib
import fcntl
import glob
import inspect
import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args, get_origin

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
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
env = lambda name, alone: int(os.environ.get(name) or alone)  # of torchrun
RANK, LOCAL_RANK, WORLD = env("RANK", 0), env("LOCAL_RANK", 0), env("WORLD_SIZE", 1)
WORKERS = max(1, min(8, (os.cpu_count() or 2) // env("LOCAL_WORLD_SIZE", 1) - 1))  # loader processes, by default

# ---------------------------------------------------------------- configuration


@dataclasses.dataclass
class Config:
    """Every setting; `python dark.py --help` is made from these lines. The defaults are the paper's."""

    beta0: float = 2.0  # beta_0 of Eq. 7: weight of the off-diagonal at step 0
    r: float = -0.8  # r of Eq. 7: the weight ends at r * beta0
    r_is_end: bool = False  # --r gives the final weight itself, as in the authors' Figure 2a and configurations
    diag: float = 1.0  # weight of the diagonal (Eq. 6)
    coupled: bool = False  # Eq. 4: the diagonal has the weight of the off-diagonal, lambda(t) of Eq. 5
    tau: float = 5.0  # tau of Eq. 2: temperature of the teacher's softmax, and of the teacher's only
    smooth: float = 0.0  # epsilon of the confidence-penalty row: share of the target that is spread evenly
    feature: float = 0.0  # weight of the feature-KD row's mean squared error (the paper: 2000)
    ablation: str = ""  # a row of Table 3, which sets the flags above; flags given beside it win
    teacher: str = "ViT-L-14"  # any open_clip name. FetalCLIP is ViT-L-14; OpenAI's own weights, ViT-L-14-quickgelu
    teacher_weights: str = ""  # PATH (also of a checkpoint of this script) or open_clip TAG
    student: str = "MobileCLIP2-S0"  # any open_clip name
    student_weights: str = ""  # PATH or open_clip TAG; without it the student starts at random
    context_length: int = 0  # tokens, both towers and tokenizers (FetalCLIP: 117); 0: each model's own
    data: tuple[str, ...] = ()  # pairs.csv | pattern of tars, one or more; without it the demonstration
    epochs: int = 20  # passes over the data
    batch: int = 1024  # N, pairs in a batch over all processes; the loss sees all of them
    micro_batch: int = 0  # pairs whose activations a process holds at a time (batch norm sees these); 0: its share of N
    lr: float = 1e-5  # peak learning rate (AdamW, betas 0.9 and 0.98, eps 1e-6)
    warmup: int = 500  # optimizer steps of linear warm-up before the cosine
    weight_decay: float = 0.1  # on matrices and kernels only
    clip_norm: float = 1.0  # largest L2 norm of the gradient
    seed: int = 42  # of the weights, the order and the augmentation
    out: str = "out"  # folder for student.pt, log.jsonl and curves.png
    workers: int = -1  # loader processes; -1: one less than the cores, 1 to 8
    device: str = "auto"  # auto: cuda where there is one, else cpu; with torchrun each process takes its own card
    log_every: int = 10  # optimizer steps between two lines of log.jsonl (which is written with the checkpoint)
    resume: bool = False  # go on from the checkpoint in --out, if there is one
    overwrite: bool = False  # replace the run in --out


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

# Without --data. This teacher's logit scale is near 20, the paper's softened one too (100 / tau 5): hence tau 1.
PHANTOM, TEACHER = HERE / "phantom", "assets/teacher.pt"  # drawn by assets/phantom.py; trained by this script
DEMONSTRATION = dict(student="demo-fastvit", teacher="demo-teacher", teacher_weights=TEACHER)
DEMONSTRATION |= dict(epochs=4, batch=64, lr=3e-3, warmup=150, tau=1.0)

# ---------------------------------------------------------------- schedules and loss


def beta_at(step: int, total: int, beta0: float, r: float) -> float:
    """Weight of the off-diagonal at step `step` of `total`, Eq. 7; zero at total / (1 - r). Eq. 5 is the same line."""
    return beta0 * (1 - step / total * (1 - r))


def lr_at(step: int, total: int, peak: float, warmup: int) -> float:
    """Learning rate of optimizer step `step` of `total`: linear over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def dark_loss(image, text, scale, t_image, t_text, t_scale, *, beta, diag=1.0, clip=1.0, tau=5.0, smooth=0.0):
    """CLIP loss plus selective repulsive distillation over one batch of N matched pairs (arXiv 2603.05421).

    image, text       (N, D) student embeddings; t_image, t_text (N, D_t) the teacher's, which get no gradient. All are
                      normalised here; those of several processes are gathered before (see `gather`)
    scale, t_scale    0-d logit scales. The caller must bound `scale` (at most 100, after every optimizer step): a
                      negative `beta` rewards larger logits without end, and the bound is all that stops it
    beta, diag, clip  weights of the off-diagonal, of the diagonal and of the CLIP term; beta = diag is Eq. 4
    tau               temperature of the teacher alone: its targets are to be softened, while the student's logits stay
                      those it is used with; hence no tau**2 either
    smooth            epsilon: the target becomes (1 - epsilon) p + epsilon / N

    Returns clip * parts["clip"] + diag * parts["diag"] + beta * parts["off"], and the detached `parts`. All in fp32
    under any autocast (bf16 would step by 0.5 at logits of 100); float64 stays float64.
    """
    with torch.autocast(image.device.type, enabled=False):
        unit = lambda x: F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        image, text, t_image, t_text = map(unit, (image, text, t_image, t_text))
        # The plain form, of the rows (of the columns with the transposes; the two are averaged):
        #     Eq. 3: H(p, q) = -(p * log_softmax(S, 1)).sum(1).mean(); Eq. 6: diag has its j = i terms, off the others.
        # As log q_ij = S_ij - lse_i, backward needs one S and the sum of both directions' p: 40 % of time and memory.

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
        # -log q = lse - S. Both directions share S: the other one's logits are its transpose.
        logits = (scale * image) @ text.T  # (N, N): rows images, columns texts
        lse_rows, lse_cols = logits.logsumexp(1), logits.logsumexp(0)  # (N,) each
        nll_rows, nll_cols = lse_rows - logits.diagonal(), lse_cols - logits.diagonal()
        clip_loss = (nll_rows + nll_cols).mean() / 2  # Eq. 1
        # Eq. 3, split as in Eq. 6: p_ii nll_i, and over j != i (sum of p_ij) lse_i - sum of p_ij S_ij.
        kd_diag = (match_rows * nll_rows + match_cols * nll_cols).mean() / 2
        kd_off = (rest_rows * lse_rows + rest_cols * lse_cols - torch.linalg.vecdot(p_off, logits)).mean() / 2
        loss = clip * clip_loss + diag * kd_diag + beta * kd_off  # Eq. 6; Eq. 4 where diag = beta
    return loss, {"clip": clip_loss.detach(), "diag": kd_diag.detach(), "off": kd_off.detach()}


def gather(x):
    """(n, d) on each of `world` processes -> (world * n, d) on all, with gradient; the identity without a group. Every
    process computes the loss of the whole batch. Backward sums their (equal) gradients, `world` times too much, which
    DDP's average over the processes takes away again."""
    if not dist.is_initialized():
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x))


# ---------------------------------------------------------------- models

PREPROCESS = ("size", "mean", "std", "interpolation")


class Model(nn.Module):
    """An open_clip model with its tokenizer and preprocessing: size in pixels, mean and std in 0..1, interpolation."""

    def __init__(self, name, clip, tokenizer, preprocess, source):
        super().__init__()
        self.name, self.clip, self.tokenizer, self.source = name, clip, tokenizer, source  # source: of the weights
        self.size, self.mean, self.std, self.interpolation = (preprocess[key] for key in PREPROCESS)

    def normalize(self, pixels):
        """(n, 3, size, size) in 0..1 -> the same, as the image tower expects it."""
        return torch.stack([(pixels[:, c] - self.mean[c]) / self.std[c] for c in range(3)], 1)

    def embed(self, pixels, tokens):
        """(n, size, size, 3) uint8, (n, context) -> image (n, D), text (n, D)."""
        # Inside what is checkpointed, so that backward's second pass runs under the same autocast as the first.
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
            pixels = self.normalize(pixels.permute(0, 3, 1, 2) / 255)
            return self.clip.encode_image(pixels), self.clip.encode_text(tokens)

    def forward(self, pixels, tokens, micro_batch):
        """As `embed`, and the logit scale. Beyond `micro_batch` pairs activations are dropped: backward computes them
        again, one micro-batch at a time. The loss sees all n embeddings, so its gradient is the whole batch's, which
        gradient accumulation would not give. Batch norm sees each micro-batch by itself, and twice."""
        again, embeddings = torch.is_grad_enabled() and micro_batch < len(tokens), []
        for some in zip(pixels.split(micro_batch), tokens.split(micro_batch)):
            embeddings.append(checkpoint(self.embed, *some, use_reentrant=False) if again else self.embed(*some))
        image, text = (torch.cat(rows) for rows in zip(*embeddings))
        return image, text, self.clip.logit_scale.exp()


@timm.models.register_model
def fastvit_demo(num_classes, pretrained_cfg, **_):
    """The demonstration's image tower, fastvit_demo.24 where 24 is the width: FastViT's own blocks, few and thin."""
    dims = [int(pretrained_cfg) * 2**i for i in range(4)]  # timm calls so what follows the dot
    shape = dict(embed_dims=dims, layers=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2), stem_use_scale_branch=False)
    tower = timm.models.FastVit(**shape, layer_scale_init_value=0.1, num_classes=num_classes)
    # A CPU takes two thirds of the time in this format (not in the first convolution: torch crashes in its backward).
    tower.stem[0].act.register_forward_pre_hook(lambda act, x: x[0].contiguous(memory_format=torch.channels_last))
    return tower


open_clip.add_model_config(HERE / "assets/models")  # demo-fastvit, demo-teacher, demo-vit
logging.disable(logging.WARNING)  # open_clip warns of random weights, which may well be wanted


def open_model(name, weights="", context_length=0):
    """Any model of open_clip with weights from a PATH, a TAG, or at random -> Model. Size, mean, std, interpolation are
    those of the tag or in a checkpoint of this script; else of the first tag: open_clip takes OpenAI's with a path."""
    schema, tag = name.rpartition(":")[0], "" if Path(weights).is_file() else weights
    name = name if schema else name.replace("/", "-")
    known, tags = open_clip.list_models(), open_clip.list_pretrained_tags_by_model(name)
    if not schema and name not in known:
        fail(f"{name!r}: no model of open_clip; near it are {', '.join(difflib.get_close_matches(name, known, 5, 0))}")
    if tag and tag not in tags:
        fail(f"{weights}: neither a file nor a tag of {name}, which has {', '.join(tags) or 'none'}")
    listed = open_clip.get_pretrained_cfg(name, tag or tags[0]) if tags else {}
    if tag and listed.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu"):
        fail(f"{tag}: was trained with QuickGELU, which {name} has not; open it as {name}-quickgelu")
    with user_error(f"{name}{tag and ' ' + tag}: cannot be opened"):
        required = bool(tag) or (schema == "hf-hub" and not weights)  # else a failed download would be random weights
        how = dict(force_context_length=context_length or None, require_pretrained=required)
        clip = open_clip.create_model(name, tag or None, **how)
        tokenizer = open_clip.get_tokenizer(name, context_length=context_length or None)
    preprocess = {**clip.visual.preprocess_cfg, **listed}
    if weights and not tag:
        preprocess |= load_weights(clip, weights)
    height, preprocess["size"] = np.broadcast_to(preprocess["size"], 2).tolist()
    if height != preprocess["size"]:
        fail(f"{name}: takes images of {preprocess['size']} x {height} pixels; only square ones are supported")
    return Model(name, clip, tokenizer, preprocess, weights or ("what it brings" if schema else "random weights"))


def load_weights(clip, path):
    """Loads a file's state dict strictly, after the conversions that bring what is published to open_clip's names:
    wrappers' keys and prefixes, Apple's names of FastViT's layers, custom text towers. -> the preprocessing in it."""
    content = read_weights(path)
    preprocess = content["preprocess"] if str(content.get("format")).startswith("dark-") else {}
    for key in ("state_dict", "model_state_dict", "model", "module"):
        content = content[key] if isinstance(content.get(key), dict) else content
    state = {re.sub(r"^((module|model|_orig_mod)\.)+", "", str(key)): value for key, value in content.items()}
    if "visual.trunk.patch_embed.0.rbr_conv.0.conv.weight" in state:
        trunk = {k.removeprefix("visual.trunk."): state.pop(k) for k in [*state] if k.startswith("visual.trunk.")}
        trunk = timm.models.fastvit.checkpoint_filter_fn(trunk, clip.visual.trunk)
        state |= {f"visual.trunk.{key}": value for key, value in trunk.items()}
    with user_error(f"{path}: does not fit the model", (RuntimeError, KeyError, AttributeError)):
        state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
        state = open_clip.convert.convert_state_dict(clip, state)
        if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        open_clip.model.resize_pos_embed(state, clip)
        open_clip.model.resize_text_pos_embed(state, clip)
        clip.load_state_dict(state)
    return preprocess


def read_weights(path):
    """A file of weights -> the dictionary in it, on the CPU. No code in it runs, and a flipped bit is found."""
    with user_error(path, OSError), open(path, "rb") as file:
        head = file.read(64)
    if head.lstrip().startswith((b"<", b"version https://git-lfs")):
        fail(f"{path}: is a web page or a Git LFS pointer (`git lfs pull` brings the file): {head[:40]}")
    if head[8:10] == b'{"':
        with user_error(f"{path}: no safetensors"):
            return safetensors.torch.load_file(path)
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
        fail(f"{path}: damaged, a checksum is wrong")  # torch itself compares none
    # Of numpy only plain numbers, which most training scripts leave in their checkpoints.
    scalar, types = np.float64().__reduce__()[0], [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    plain = [np.dtype, *types, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]
    with user_error(f"{path}: no weights"), torch.serialization.safe_globals(plain):
        return dict(torch.load(path, map_location="cpu", weights_only=True))


# ---------------------------------------------------------------- data


class Pairs:
    """The pairs that `find_pairs` found, as the given models take them. An item is an (epoch, index)."""

    def __init__(self, pairs, seed, models):
        self.pairs, self.seed, captions = pairs, seed, [caption for *_, caption in pairs]
        self.models = [(model.size, model.interpolation, tokenize(model, captions)) for model in models]

    def __getitem__(self, item):
        """-> for each model an image (S, S, 3) uint8, black if it does not decode, and tokens (context,); the index if
        it does not, else -1. All models see one view of it, which depends on seed, epoch and index alone."""
        epoch, index = item
        path, offset, length, _ = self.pairs[index]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                opened = Image.open(io.BytesIO(file.read(length)))
            views, bad = [augment(square(opened, *how), [self.seed, epoch, index]) for *how, _ in self.models], -1
        except Exception:  # Pillow has a dozen kinds for a broken file
            views, bad = [Image.new("RGB", (size, size)) for size, *_ in self.models], index
        return [torch.from_numpy(np.array(x)) for x in views], [tokens[index] for *_, tokens in self.models], bad


def tokenize(model, captions):
    """-> (n, context) tokens. Says how many captions are cut off, and how many are alike as this model reads them."""
    tokenizer, chunks = model.tokenizer, [captions[i : i + 1024] for i in range(0, len(captions), 1024)]
    tokens = torch.cat([tokenizer(texts) for texts in tqdm(chunks, "tokens", leave=False, delay=2, disable=None)]).int()
    full = (tokens[:, -1] != tokenizer([""])[0, -1]).nonzero()[:, 0].tolist()  # the others end in padding
    longer = tokenizer(["", *(captions[i] for i in full)], context_length=tokenizer.context_length + 1)
    cut, repeated = int((longer[:, -1] != longer[0, -1]).sum()), len(tokens) - len(tokens.unique(dim=0))
    tqdm.write(f"{model.name}, {tokenizer.context_length} tokens: {cut} captions are cut off, {repeated} repeat others")
    return tokens


def batches(n, batch, epochs, seed, process=0, world=1):
    """The (epoch, index) items of every step of `epochs`, this process's share of each. An epoch is a permutation drawn
    from (seed, epoch) without its incomplete batch: so no batch holds a pair twice, and no match is repelled."""
    for epoch in epochs:
        order = np.random.default_rng([seed, epoch]).permutation(n)[: n // batch * batch]
        for share in order.reshape(-1, world, batch // world)[:, process]:
            yield [(epoch, int(index)) for index in share]


def augment(image, key):
    """The paper's augmentation (3.6), drawn from `key`: rotation, shift, brightness, contrast, saturation."""
    rng = np.random.default_rng(key)
    angle, shift, factors = rng.uniform(-7, 7), rng.uniform(-0.05, 0.05, 2), rng.uniform(0.85, 1.15, 3)
    image = image.rotate(angle, Image.Resampling.BILINEAR, translate=(shift * image.width).tolist())
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        image = enhance(image).enhance(factor)
    return image


def square(image, size, interpolation):
    """An opened image of any Pillow mode -> 'RGB', upright (EXIF), zero-padded to a centred square, resized. Deep greys
    are scaled, which Pillow's own convert would clip."""
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # of as many kinds again: metadata that cannot be read is no metadata
        pass
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        values = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        tops = (1, 255, 4095, 65535)[image.mode != "F" :]
        full = next((top for top in tops if values.max() <= top), values.max())
        image = Image.fromarray((255 / full * values + 0.5).astype(np.uint8))
    padded = ImageOps.pad(image.convert("RGB"), (max(image.size),) * 2)
    return padded.resize((size, size), Image.Resampling[interpolation.upper()])


def find_pairs(sources):
    """--data -> a list of (path, offset and length of the image in it, caption); says what it leaves out."""
    pairs, left_out = [], Counter()
    for source in sources:
        with user_error(f"--data {source}"):
            paths = [path for part in braceexpand(source) for path in sorted(glob.glob(part, recursive=True)) or [part]]
        for path in tqdm(paths, "indexing", leave=False, delay=2, disable=None):
            if path.lower().endswith((".csv", ".tsv", ".txt")):
                rows = read_table(path, ("image", "caption"), ("filepath", "title"))  # images are relative to the table
                pairs += [(os.path.join(os.path.dirname(path), name), 0, -1, text.strip()) for name, text in rows]
            else:
                pairs += find_in_tar(path, left_out)
    missing = [path for path in dict.fromkeys(path for path, *_ in pairs) if not os.path.isfile(path)]
    if missing:
        fail(f"--data: {len(missing)} images are not there, the first is {missing[0]}")
    told = "".join(f"; left out: {count} {reason}" for reason, count in left_out.items() if count)
    tqdm.write(f"{len(pairs)} pairs, {sum(not caption for *_, caption in pairs)} with an empty caption{told}")
    return pairs


def find_in_tar(path, left_out):
    """A WebDataset shard: a key, up to the first dot, is one image and one txt; other members are passed over."""
    images, captions, pairs = {}, {}, []
    with user_error(f"--data {path}: no plain tar", (OSError, tarfile.TarError)), tarfile.open(path, "r:") as tar:
        for member in tar:
            name = re.fullmatch(r"((?:.*/)?([^/]+))\.(txt|jpe?g|png|webp)", member.name, re.IGNORECASE)
            if not name or not member.isfile():
                continue
            kind = captions if name[3].lower() == "txt" else images
            if "." in name[2]:
                left_out["keys with a dot"] += kind is images
            elif kind.setdefault(name[1], member) is not member:
                fail(f"--data {path}: key {name[1]} has more than one image or txt")
        tar.fileobj.seek(tar.offset)
        # tarfile takes a cut between two members for the end; a whole archive ends in blocks of zeros.
        if tar.fileobj.read(512) != bytes(512):
            fail(f"--data {path}: truncated or damaged, the end-of-archive mark is missing")
        left_out["tars behind the end mark of another in one file"] += any(tar.fileobj.read(2**20))
        for key in (key for key in images if key in captions):
            with user_error(f"--data {path}: {captions[key].name} is not UTF-8", UnicodeDecodeError):
                caption = tar.extractfile(captions[key]).read().decode("utf-8-sig").strip()
            pairs.append((path, images[key].offset_data, images[key].size, caption))
    left_out["keys without a txt"] += len(images) - len(pairs)
    left_out["keys without an image (jpg, jpeg, png, webp; no link)"] += len(captions) - len(pairs)
    return pairs or fail(f"--data {path}: no pair of an image (jpg, jpeg, png, webp) and a txt with the same key")


def read_table(path, *choices):
    """A table in UTF-8 -> for each row the values of the first of `choices`, tuples of columns, that its header has.
    The separator is the one of `,` `;` and tab that gives them, whatever the file is called."""
    with user_error(f"{path}: no table in UTF-8", (OSError, UnicodeDecodeError)):
        text = Path(path).read_text(encoding="utf-8-sig")
    wrong, quoted = f"none of the columns {' or '.join(map(str, choices))} in its header", csv.QUOTE_MINIMAL
    # Between tabs a quotation mark is most often just that: such a table is read without quoting where it can be.
    for separator, quoting in (",", quoted), (";", quoted), ("\t", csv.QUOTE_NONE), ("\t", quoted):
        reader = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting, strict=True)
        try:
            header, rows = [name.strip() for name in next(reader, [])], []
            columns = next((columns for columns in choices if {*columns} <= {*header}), ())
            for row in filter(None, reader if columns else ()):
                if len(row) != len(header):
                    raise csv.Error(f"{len(row)} values, the header has {len(header)}")
                rows.append(tuple(row[header.index(column)] for column in columns))
            if columns:
                return rows or fail(f"{path}: has no rows")
        except csv.Error as error:
            wrong = f"line {reader.line_num}: {error}"
    fail(f"{path}: {wrong}")


# ---------------------------------------------------------------- training


def train(cfg, device, student, teacher, data, found):
    """Trains `student` against the frozen `teacher` (None: with the CLIP loss alone) -> the log. After each epoch
    rank 0 replaces the log and the checkpoint. A killed run loses the epoch it was in: --resume goes on from that
    checkpoint, `found`, with the same number of processes. The last one is the result; evaluate.py measures it."""
    n, per_epoch = len(data.pairs), len(data.pairs) // cfg.batch
    total = cfg.epochs * per_epoch  # T of Eq. 5 and 7, optimizer steps
    student.to(device).train()
    projections = nn.ModuleList()  # of the student's embeddings to the teacher's width, for the feature-KD row
    if cfg.feature:
        width = lambda model: model.clip.encode_text(model.tokenizer([""]).to(device)).shape[1]
        projections.extend(nn.Linear(width(student), width(teacher), device=device) for _ in ("image", "text"))
    parameters = [*student.parameters(), *projections.parameters()]
    optimizer = make_optimizer(cfg, parameters)
    epoch, log, failed = 0, [], []
    if found:
        epoch, log = found["epoch"], found["log"]
        student.clip.load_state_dict(found["state_dict"])
        projections.load_state_dict(found["projections"])
        optimizer.load_state_dict(found["optimizer"])
    # static_graph: some parameters get no gradient (CoCa's decoder, SigLIP's bias), and DDP would wait for it.
    net = nn.parallel.DistributedDataParallel(student, static_graph=True) if WORLD > 1 else student
    order = batches(n, cfg.batch, range(epoch, cfg.epochs), cfg.seed, RANK, WORLD)
    how = dict(num_workers=WORKERS if cfg.workers < 0 else cfg.workers, pin_memory=device.type == "cuda")
    micro_batch = cfg.micro_batch or cfg.batch // WORLD
    loader, first = torch.utils.data.DataLoader(data, batch_sampler=order, **how), epoch * per_epoch
    bar = tqdm(loader, "steps", total, initial=first, disable=RANK > 0 or None, dynamic_ncols=True)

    for step, (pixels, tokens, bad) in enumerate(bar, first):
        torch.manual_seed(hash((cfg.seed, step, RANK)))  # of any dropout: the same bits after --resume
        lr, beta = lr_at(step, total, cfg.lr, cfg.warmup), beta_at(step, total, cfg.beta0, cfg.r)
        pixels, tokens = ([x.to(device, non_blocking=True) for x in kind] for kind in (pixels, tokens))
        image, text, scale = net(pixels[0], tokens[0], micro_batch)
        with torch.no_grad():  # without a teacher the student itself stands in: diag and beta are 0 then
            targets = teacher(pixels[1], tokens[1], micro_batch) if teacher else (image, text, scale)
        image, text, t_image, t_text = map(gather, (image, text, *targets[:2]))  # (N, D), of the whole batch
        weights = dict(beta=beta, diag=beta if cfg.coupled else cfg.diag, tau=cfg.tau, smooth=cfg.smooth)
        loss, terms = dark_loss(image, text, scale, t_image, t_text, targets[2], **weights)
        if cfg.feature:  # mean squared error of unit embeddings (N, D_t)
            unit = lambda x: F.normalize(x.float(), dim=-1)
            triples = zip(projections, (image, text), (t_image, t_text))
            terms["feature"] = sum(F.mse_loss(unit(project(unit(x))), unit(t)) for project, x, t in triples)
            loss = loss + cfg.feature * terms["feature"]

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():  # part of the method, see `dark_loss`; a hair below 100, so that fp32's exp() agrees
            student.clip.logit_scale.clamp_(max=math.log(100) - 1e-6)

        failed = (failed if step % per_epoch else []) + bad[bad >= 0].tolist()  # pairs of this epoch and process
        done, ends = step + 1, (step + 1) % per_epoch == 0
        if ends or done % cfg.log_every == 0:
            terms = terms if teacher else {"clip": terms["clip"]}
            figures = dict(loss=loss, **terms, beta=beta, scale=scale, lr=lr, grad_norm=norm)
            figures = {name: float(value) for name, value in figures.items()}
            if not all(map(math.isfinite, figures.values())):
                fail(f"not finite by step {step}: {figures}", 1)
            repeated = 1 - len(gather(tokens[0]).unique(dim=0)) / cfg.batch  # false negatives, which are repelled most
            n_failed = int(gather(torch.tensor([len(failed)], device=device)).sum())
            if n_failed > n // 100:
                some = [data.pairs[index][0] for index in failed[:3]]
                fail(f"{n_failed} images do not decode, more than 1 % of {n}, such as in {some}", 1)
            log.append(dict(step=step, epoch=step / per_epoch, **figures, repeated=repeated, bad=n_failed))
            told = " ".join(f"{name} {figures[name]:.3f}" for name in ("loss", *terms, "beta", "scale"))
            bar.set_postfix_str(told)
            if ends or bar.disable:
                tqdm.write(f"epoch {done / per_epoch:.1f}/{cfg.epochs}  step {done}/{total}  {told}")
        if ends and RANK == 0:
            state = dict(optimizer=optimizer.state_dict(), projections=projections.state_dict())
            save(cfg, student, n, epoch=done // per_epoch, log=log, **state)
    return log


def make_optimizer(cfg, parameters):
    # Biases, norms and gains (also those shaped (C, 1, 1)) and the logit scale are not decayed.
    matrices, vectors = ([p for p in parameters if (p.squeeze().ndim >= 2) == large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def draw_curves(log, path):
    """The weight of the off-diagonal and the loss terms, in nats, over epochs."""
    figure, buffer = Figure(figsize=(8, 6), layout="constrained"), io.BytesIO()
    panels = (["beta"], "weight of off"), (["clip", "diag", "off"], "nats")
    for axis, (names, unit) in zip(figure.subplots(2, 1), panels):
        for name in (name for name in names if name in log[0]):
            axis.plot([record["epoch"] for record in log], [record[name] for record in log], label=name)
        axis.set(xlabel="epoch", ylabel=unit)
        axis.grid()
        axis.legend()
    figure.savefig(buffer, dpi=120)
    write_atomically(path, buffer.getbuffer())


# ---------------------------------------------------------------- mistakes, checkpoints, command line


def prepare_device(name):
    """The device of this process; joins the process group when torchrun started several."""
    name = name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    with user_error(f"--device {name} (valid are auto, cpu, cuda, cuda:N, mps)"):
        device = torch.zeros(1, device=f"cuda:{LOCAL_RANK}" if name == "cuda" else name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # a core for the loader: OpenMP's threads spin while they wait for one that has none
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    if WORLD > 1:
        dist.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return device


def fail(message, code=2):
    """One line on stderr, and the end: exit code 2 for a user's mistake, 1 for what goes wrong during a run."""
    which = f"process {RANK}: " if WORLD > 1 else ""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {which}{message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def user_error(what, errors=Exception):
    """An error of these kinds in here becomes 'what: what the library said' and exit code 2. Only around calls of
    libraries with what a user gave: a fault of ours keeps its traceback."""
    try:
        yield
    except errors as error:
        text = " ".join(str(error).split()) or type(error).__name__
        fail(f"{what}: {text.partition('. ')[0][:300]}")  # torch.load's goes on to unsafe advice


@contextmanager
def script():
    """Around every main: Ctrl-C, SIGTERM and what can go wrong at any time end it with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        yield
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        loaders = torch.multiprocessing.active_children()
        for loader in loaders:
            loader.kill()
        sys.stdout.flush()
        (os._exit if loaders or WORLD > 1 else sys.exit)(130)  # at once: what other processes do may never end
    except (OSError, MemoryError, subprocess.CalledProcessError) as error:
        fail(error, 1)
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        fail("the loaders need more shared memory: --workers 0, or a larger /dev/shm (docker run --shm-size 2g)", 1)


FORMAT = "dark-4"
# How a run is carried out, not what it computes: these may change between a run and its --resume.
RUN_FIELDS = ("ablation", "out", "workers", "device", "log_every", "resume", "overwrite")


def write_atomically(path, content):
    """Writes bytes to a temporary file and renames it: a kill leaves the old file or the new, never half of one."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save(cfg, model, n_pairs, **state):
    """student.pt and log.jsonl. The checkpoint is self-describing: `model_from_checkpoint` needs nothing else. Its
    `state_dict` is open_clip's, so that the file itself can be given to --teacher-weights or --student-weights."""
    content = dict(format=FORMAT, architecture=model.name, context_length=model.tokenizer.context_length, **state)
    content |= dict(preprocess={key: getattr(model, key) for key in PREPROCESS})
    content |= dict(
        state_dict=model.clip.state_dict(), config=dataclasses.asdict(cfg) | dict(pairs=n_pairs, processes=WORLD)
    )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(Path(cfg.out, "log.jsonl"), "".join(json.dumps(x) + "\n" for x in state["log"]).encode())
    write_atomically(Path(cfg.out, "student.pt"), buffer.getbuffer())  # last: a kill in between repeats the epoch


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


def open_run(cfg, n_pairs):
    """Holds --out for this process, until the file that it returns is closed, however that happens -> that file; the
    checkpoint that the run goes on with, or None where it begins and may replace what is there."""
    path = Path(cfg.out, "student.pt")
    with user_error(f"--out {cfg.out}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".lock{RANK}"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {cfg.out}: in use by another run")
    except OSError as error:  # Lustre and some NFS have no locks
        tqdm.write(f"--out {cfg.out}: not protected against a second run ({error})")
    if cfg.overwrite or not path.exists():
        return lock, None
    if not cfg.resume:
        fail(f"--out {cfg.out}: holds a run; --resume goes on with it, --overwrite replaces it")
    found = load_checkpoint(path)
    old, now = found["config"], dataclasses.asdict(cfg) | dict(pairs=n_pairs, processes=WORLD)
    told = [f"{k} was {old.get(k)!r}, is {now[k]!r}" for k in now if now[k] != old.get(k) and k not in RUN_FIELDS]
    if told:
        fail(f"--out {cfg.out} holds another run: {', '.join(told)}")
    return lock, found


def given(options, argv, description, other=()):
    """The fields of the dataclass `options` that the command line gives -> a dict. The help is their comments and
    defaults (in the demonstration: `other`)."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(options), re.MULTILINE))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)")
    for field in dataclasses.fields(options):
        name, more = "--" + field.name.replace("_", "-"), {"type": field.type}
        if field.type is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif field.type == tuple[str, ...]:
            more = {"nargs": "+"}
        elif get_origin(field.type) is Literal:
            more = {"choices": get_args(field.type)}
        if "positional" in field.metadata:
            name, more = field.name, {"nargs": field.metadata["positional"]}
        also = f"; demonstration: {other[field.name]}" if field.name in other else ""
        about = f"{help_of[field.name]} [{field.default}{also}]".replace("%", "%%")
        parser.add_argument(name, default=argparse.SUPPRESS, help=about, **more)
    return vars(parser.parse_args(argv))


def parse_args(argv=None):
    """-> the configuration. Precedence: flag, --ablation, without --data the demonstration, default."""
    flags = given(Config, argv, "DARK, arXiv 2603.05421. Without --data: the demonstration.", DEMONSTRATION)
    cfg = Config(**{**({} if "data" in flags else DEMONSTRATION), **ABLATIONS.get(flags.get("ablation"), {}), **flags})
    least = dict(batch=2, epochs=1, log_every=1, workers=-1, seed=0, micro_batch=0, context_length=0, warmup=0)
    least |= dict(tau=1e-12, lr=1e-12, clip_norm=1e-12)
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, int | float) and not least.get(name, -math.inf) <= value < math.inf:
            fail(f"--{name.replace('_', '-')} {value}: must lie between {least.get(name, '-infinity')} and infinity")
    for wrong, message in (
        (cfg.ablation not in ("", *ABLATIONS), f"--ablation {cfg.ablation}: valid are {', '.join(ABLATIONS)}"),
        (not 0 <= cfg.smooth < 1, f"--smooth {cfg.smooth}: must be at least 0 and less than 1"),
        (cfg.r_is_end and cfg.beta0 == 0, "--r-is-end: needs a --beta0 other than 0, which stays 0 whatever r is"),
        (cfg.batch % WORLD, f"--batch {cfg.batch}: not divisible by the {WORLD} processes"),
        (not cfg.student or not cfg.teacher, "--student and --teacher need a name; for no teacher: --ablation no-kd"),
        (cfg.resume and cfg.overwrite, "--resume and --overwrite: go on with the run in --out, or replace it?"),
    ):
        if wrong:
            fail(message)
    if cfg.r_is_end:  # one reading from here on: r is that of Eq. 7, which ends at r * beta0
        cfg.r, cfg.r_is_end = cfg.r / cfg.beta0, False
    if not (cfg.beta0 or cfg.feature or (cfg.diag and not cfg.coupled)):
        cfg.teacher = cfg.teacher_weights = ""  # they would have no weight anywhere
    elif not cfg.teacher_weights and ":" not in cfg.teacher:
        one = "python dark.py --ablation no-kd --student NAME --data ... --out teacher; then --teacher NAME"
        fail(f"--teacher-weights: needs a PATH or TAG. To train one: {one} --teacher-weights teacher/student.pt")
    return cfg


@script()
def main(argv=None):
    warnings.simplefilter("ignore")  # of torch, on foreign pickles and on `gather`: nothing that a user could change
    cfg = parse_args(argv)
    device, teacher = prepare_device(cfg.device), None
    if not cfg.data and RANK == 0 and not PHANTOM.exists():
        subprocess.run([sys.executable, HERE / "assets/phantom.py", PHANTOM], check=True)
    if WORLD > 1:
        dist.barrier()
    pairs = find_pairs(cfg.data or (f"{PHANTOM}/train-*.tar",))
    total = cfg.epochs * (len(pairs) // cfg.batch)
    if cfg.warmup >= total:
        most = f"--batch {cfg.batch}: at most {len(pairs)}; --warmup {cfg.warmup}: at most {max(total - 1, 0)}"
        fail(f"{most}, for {len(pairs)} pairs make {total} steps in {cfg.epochs} epochs")
    lock, found = open_run(cfg, len(pairs))
    torch.manual_seed(cfg.seed % 2**63)
    student = open_model(cfg.student, cfg.student_weights, cfg.context_length)
    if cfg.teacher:
        weights = str(HERE / TEACHER) if cfg.teacher_weights == TEACHER else cfg.teacher_weights
        teacher = open_model(cfg.teacher, weights, cfg.context_length).requires_grad_(False).eval().to(device)
    models = [student, teacher] if teacher else [student]
    for model in models:
        seen = f"{model.size} px, mean {model.mean}, std {model.std}, {model.interpolation}"
        tqdm.write(f"{'student' if model is student else 'teacher'} {model.name}, {model.source}: {seen}")
    data = Pairs(pairs, cfg.seed, models)
    crossing = f", zero at epoch {cfg.epochs / (1 - cfg.r):.1f}" if cfg.r < 0 else ""
    tqdm.write(
        f"{cfg.epochs} epochs of {total // cfg.epochs} steps; beta {cfg.beta0:g} -> {cfg.r * cfg.beta0:g}{crossing}"
    )
    log = train(cfg, device, student, teacher, data, found)
    if RANK == 0:
        draw_curves(log, Path(cfg.out, "curves.png"))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
