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
import csv
import dataclasses
import difflib
import functools
import glob
import inspect
import io
import json
import logging
import math
import pickle
import re
import struct
import sys
import tarfile
import time
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # not imported by torch.distributed itself
import torch.nn as nn
import torch.nn.functional as F
from braceexpand import braceexpand
from PIL import Image, ImageDraw, ImageFilter
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ---------------------------------------------------------------- configuration


@dataclass
class Config:
    """Every setting; `python dark.py --help` is made from these lines. The defaults are the paper's."""

    # the method
    beta0: float = 2.0  # beta_0 of Eq. 7: weight of the off-diagonal at step 0
    r: float = -0.8  # r of Eq. 7: the weight ends at r * beta0
    diag: float = 1.0  # weight of the diagonal (Eq. 5)
    coupled: bool = False  # give the diagonal the weight of the off-diagonal (the ablation's coupled rows)
    tau: float = 5.0  # tau of Eq. 2: temperature of the teacher's softmax, and of the teacher's only
    smooth: float = 0.0  # epsilon of the confidence-penalty row: share of the target that is spread evenly
    feature: float = 0.0  # weight of the feature-KD row's mean squared error (the paper: 2000)
    ablation: str = ""  # a row of Table 3, which sets the flags above; flags given beside it win
    # the models
    teacher: str = "ViT-L-14"  # any open_clip name
    teacher_weights: str = ""  # PATH or open_clip TAG; without it a teacher is trained first, on the same data
    teacher_mean: str = ""  # R,G,B; empty: what open_clip lists for the tag, else for the architecture
    teacher_std: str = ""  # R,G,B; empty: likewise
    student: str = "MobileCLIP2-S0"  # any open_clip name
    student_weights: str = ""  # PATH or open_clip TAG; without it the student starts at random
    student_mean: str = ""  # R,G,B; empty: as for the teacher
    student_std: str = ""  # R,G,B; empty: likewise
    context_length: int = 0  # tokens, both towers and tokenizers (FetalCLIP: 117); 0: each model's own
    # the data
    data: tuple[str, ...] = ("phantom",)  # phantom | planes:DIR | hc18:DIR | tar pattern, one or more
    phantom_pairs: int = 4096  # pairs in the phantom
    spacing_size: int = 0  # pixels: captions state mm per pixel at this input size; 0: the student's
    # the training
    epochs: int = 20  # passes over the data
    teacher_epochs: int = 0  # the same for a teacher that is trained first; 0: as many as epochs
    batch: int = 1024  # N, pairs in a batch over all processes; the loss sees all of them
    micro_batch: int = 0  # pairs that a process embeds at a time (batch norm sees these); 0: its whole share of N
    lr: float = 1e-5  # peak learning rate (AdamW, betas 0.9 and 0.98, eps 1e-6)
    warmup: int = 500  # optimizer steps of linear warm-up before the cosine
    weight_decay: float = 0.1  # on matrices and kernels only
    clip_norm: float = 1.0  # largest L2 norm of the gradient
    seed: int = 42  # of the weights, the order, the augmentation and the phantom
    # the run
    out: str = "out"  # folder for student.pt, log.jsonl, curves.png, and teacher.pt if one is trained
    workers: int = -1  # loader processes; -1: one less than the cores, 1 to 8
    device: str = "auto"  # auto: cuda where there is one, else cpu
    log_every: int = 10  # optimizer steps between two lines of log.jsonl
    resume: bool = False  # go on from the checkpoint in --out
    overwrite: bool = False  # discard the run in --out (a finished teacher that fits is kept)


# Table 3. Coupled rows give both weights one schedule lambda(t) = Eq. 7; r = 1 is a constant.
ABLATIONS = {
    "no-kd": dict(coupled=True, beta0=0.0, r=1.0),
    "static": dict(coupled=True, beta0=1.0, r=1.0),
    "static-feat": dict(coupled=True, beta0=1.0, r=1.0, feature=2000.0),
    "decay": dict(coupled=True, beta0=1.0, r=0.1),
    "full-decay": dict(coupled=True, beta0=1.0, r=0.0),
    "conf-penalty": dict(coupled=True, beta0=1.0, r=0.1, smooth=0.1),
    "coupled": dict(coupled=True, beta0=2.0, r=-0.8),
    "selective": dict(beta0=2.0, r=-0.8),
    "beta4": dict(beta0=4.0, r=-0.8),
    "beta8": dict(beta0=8.0, r=-0.8),
    "r-0.5": dict(beta0=2.0, r=-0.5),
    "r-0.4": dict(beta0=2.0, r=-0.4),
}

# Without real data or without teacher weights everything is trained from scratch: small models, a larger step.
DEMONSTRATION = dict(
    teacher="demo-vit", student="demo-fastvit", epochs=6, teacher_epochs=4, batch=32, lr=1e-3, warmup=50
)

# ---------------------------------------------------------------- schedules and loss


def beta_at(step: int, total: int, beta0: float, r: float) -> float:
    """Weight of the off-diagonal at optimizer step `step` of `total` (Eq. 7): beta0 at 0, r * beta0 at `total`.

    It crosses zero at step total / (1 - r).
    """
    return beta0 * (1 - step / total * (1 - r))


def lr_at(step: int, total: int, peak: float, warmup: int) -> float:
    """Learning rate of optimizer step `step` of `total`: linear over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def dark_loss(image, text, scale, t_image, t_text, t_scale, *, beta, diag=1.0, tau=5.0, smooth=0.0):
    """CLIP loss plus selective repulsive distillation over one batch of N matched pairs (arXiv 2603.05421).

    image, text      (N, D) student embeddings, normalised here
    scale            0-d, the student's logit scale. The caller must bound it (at most 100, after every optimizer
                     step): a negative `beta` rewards larger logits without end, and the bound is all that stops it
    t_image, t_text  (N, D_t) teacher embeddings, normalised here; no gradient reaches them
    t_scale          0-d, the teacher's logit scale
    beta, diag       weights of the off-diagonal and of the diagonal
    tau              temperature of the teacher alone: only its targets are to be softened, the student's logits
                     are those it is used with; hence no tau**2 either
    smooth           epsilon: the target becomes (1 - epsilon) p + epsilon / N

    Returns the loss, clip + diag * parts["diag"] + beta * parts["off"], and `parts`: the unweighted, detached
    clip, diag and off. With several processes pass gathered embeddings (see `gather`). All of it is fp32 under
    any autocast, for bf16 steps by 0.5 at logits of 100; float64 stays float64.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, t_image, t_text = (
            F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
            for x in (image, text, t_image, t_text)
        )

        # Eq. 2: the teacher's targets p, softmaxed over the texts (rows) and over the images (columns).
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

        loss = clip_loss + diag * kd_diag + beta * kd_off  # Eq. 5
    return loss, {"clip": clip_loss.detach(), "diag": kd_diag.detach(), "off": kd_off.detach()}


def gather(x):
    """(n, d) on each of `world` processes -> (world * n, d) on all, with gradient; the identity without a group.

    Every process then computes the loss of the whole batch. Backward sums the processes' (equal) gradients, which
    makes `world` times too much, and DDP's average over the processes takes that away again.
    """
    if not dist.is_initialized():
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x))


MAX_LOG_SCALE = math.log(100) - 1e-6  # a hair less, so that exp() stays at most 100 in fp32


@torch.no_grad()
def clamp_scale(clip):
    """Bounds the logit scale to 100: part of the method, see `dark_loss`."""
    clip.logit_scale.clamp_(max=MAX_LOG_SCALE)


# ---------------------------------------------------------------- processes and messages


def rank():
    return int(os.environ.get("RANK", 0))  # set by torchrun


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))  # likewise


def say(message):
    if rank() == 0:
        tqdm.write(message)


def fail(message):
    """A user's mistake: one line on stderr, exit code 2."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # on every machine: it may be the only one that lacks the file
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def stop(message):
    """Something went wrong in the middle of a run: one line on stderr, exit code 1."""
    sys.exit(f"\n{Path(sys.argv[0]).name}: stopped: {message}")


def one_line(error):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def barrier():
    if dist.is_initialized():
        dist.barrier()


def everyones(indices):
    """The union of a set of indices over the processes."""
    if not dist.is_initialized():
        return indices
    sets = [None] * world_size()
    dist.all_gather_object(sets, indices)
    return set().union(*sets)


# ---------------------------------------------------------------- data: what is read

VIEWS = {
    "trans-thalamic": "fetal brain, trans-thalamic plane",
    "trans-cerebellum": "fetal brain, trans-cerebellum plane",
    "trans-ventricular": "fetal brain, trans-ventricular plane",
    "abdomen": "fetal abdomen",
    "femur": "fetal femur",
    "heart": "fetal heart",
    "cervix": "maternal cervix",
}
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
    t = np.asarray(days) / 7
    return np.exp(curve[0] + curve[1] * t + curve[2] * t**2 + curve[3] * t**3)


def age_of(hc_mm):
    """The age in days, 10 to 42 weeks, whose median head circumference is nearest to hc_mm."""
    ages = np.arange(10 * 7, 42 * 7)
    return int(ages[np.abs(who_hc(ages) - hc_mm).argmin()])


def caption(index, view, days=None, spacing=None):
    """A sentence on `view`, with age (days) and spacing (mm per pixel) where known; the phrasing follows `index`."""
    text = CAPTIONS[index % 3].format(view=view)
    if days is None:
        return text + "."
    return DETAILS[index // 3 % 3].format(caption=text, weeks=days // 7, day=days % 7, spacing=spacing)


def model_spacing(image, pixel_mm, size):
    """mm per pixel after `image` (pixel_mm per pixel) is padded to a square and resized to size x size."""
    return max(image.size) / size * pixel_mm


# What the phantom shows: ovals (x, y, half-axis in x, in y, fill, wall) in half-lengths of the head; 0 is no wall.
SPINE = [(-0.75, 0, 0.06, 0.06, 230, 0), (-0.66, 0.1, 0.06, 0.06, 230, 0), (-0.66, -0.1, 0.06, 0.06, 230, 0)]
BRAIN = [(0, 0, 0.95, 0.01, 160, 0), (0.5, 0, 0.13, 0.07, 0, 180)]  # midline, cavum septi pellucidi
CHAMBERS = [(x, y, 0.17, 0.13, 0, 0) for x, y in ((0.3, 0.28), (0.3, -0.06), (-0.1, 0.26), (-0.1, -0.04))]
ANATOMY = {
    "trans-thalamic": [*BRAIN, (-0.05, 0.14, 0.24, 0.12, 0, 0), (-0.05, -0.14, 0.24, 0.12, 0, 0)],
    "trans-cerebellum": [*BRAIN, (-0.55, 0.24, 0.22, 0.24, 100, 230), (-0.55, -0.24, 0.22, 0.24, 100, 230)],
    "trans-ventricular": [*BRAIN, (-0.3, 0.38, 0.5, 0.16, 0, 210), (-0.35, 0.38, 0.28, 0.09, 230, 0)],
    "abdomen": [(0, 0, 0.9, 0.85, 75, 150), (-0.1, 0.42, 0.24, 0.17, 0, 0), (0.4, -0.08, 0.35, 0.05, 0, 0), *SPINE],
    "heart": [(0, 0, 0.95, 0.85, 75, 130), (0.1, 0.1, 0.5, 0.42, 140, 0), *CHAMBERS, *SPINE],
    "femur": [(0, 0, 1.3, 0.4, 80, 0), (0, 0, 0.6, 0.04, 255, 0)],
    "cervix": [(0, 0, 1.2, 0.6, 90, 0), (-1.2, 0.3, 0.6, 0.5, 0, 0), (0, 0, 0.75, 0.04, 0, 170)],
}


def phantom(seed, index, width=160, height=120):
    """A synthetic ultrasound, deterministic in (seed, index): an 'L' image, and its view, days, pixel_mm, hc_mm."""
    rng = np.random.default_rng([seed, index])
    view, days = str(rng.choice(list(ANATOMY))), int(rng.choice(GA_DAYS))
    hc_mm = float(who_hc(days)) * rng.normal(1, 0.02)
    ratio, radius = rng.uniform(0.72, 0.84), rng.uniform(0.2, 0.4) * width  # of the head's half-axes; pixels
    pixel_mm = hc_mm / (2 * math.pi * radius * math.sqrt((1 + ratio**2) / 2))  # so size alone does not tell the age
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
    contrast = rng.uniform(0.65, 1)  # to the tissue around; where it is low, planes of the brain can be confused
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
    return image, {"view": view, "days": days, "pixel_mm": pixel_mm, "hc_mm": hc_mm}


def read_phantom(seed, spacing_size, index):
    image, label = phantom(seed, index)
    view = VIEWS[label["view"]]
    if index // 9 % 4 == 0:  # not every caption tells the plane of the brain
        view = view.partition(",")[0]
    return image, caption(index, view, label["days"], model_spacing(image, label["pixel_mm"], spacing_size))


def index_tar(path):
    """The pairs of a WebDataset shard -> (n, 4) int64: offset and length of the image, then of the caption."""
    members, order = {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")  # WebDataset: a key ends at the first dot
                kind = {"txt": "text", **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image")}.get(extension.lower())
                if not (member.isfile() and key and kind):
                    continue
                if (folder, key, kind) in members:
                    fail(f"--data {path}: key {key} has more than one {kind}")
                members[folder, key, kind] = (member.offset_data, member.size)
                if kind == "image":
                    order.append((folder, key))
            tar.fileobj.seek(tar.offset)
            # tarfile takes a cut between two members for the end; a whole archive ends in blocks of zeros.
            whole = tar.fileobj.read(512) == bytes(512)
    except (tarfile.TarError, OSError) as error:
        fail(f"--data {path}: not a readable tar ({error})")
    if not whole:
        fail(f"--data {path}: truncated or damaged, the end-of-archive mark is missing")
    pairs = [members[*k, "image"] + members[*k, "text"] for k in order if (*k, "text") in members]
    if not pairs:
        fail(f"--data {path}: no pair of an image (jpg, jpeg, png, webp) and a txt with the same key")
    return np.array(pairs, np.int64)


def read_tar(path, index, i):
    offset, length, text_offset, text_length = index[i].tolist()
    with open(path, "rb") as file:
        file.seek(offset)
        image = file.read(length)
        file.seek(text_offset)
        text = file.read(text_length)
    return Image.open(io.BytesIO(image)), text.decode("utf-8").strip()


def read_table(path, columns, flag, delimiter=","):
    """The rows of a CSV file as dictionaries; fails when the file or one of `columns` is not there."""
    if not path.is_file():
        fail(f"{flag}: there is no {path}")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        missing = [c for c in columns if c not in (rows.fieldnames or [])]
        if missing:
            fail(f"{flag}: {path} has no column {missing[0]!r}; its columns are {rows.fieldnames}")
        return list(rows)


def require_files(paths, flag):
    missing = [p for p in paths if not p.is_file()]
    if missing:
        fail(f"{flag}: {len(missing)} of {len(paths)} images are not there, the first is {missing[0]}")


PLANES = {  # FETAL_PLANES_DB's `Plane` -> words
    "Fetal abdomen": "fetal abdomen",
    "Fetal brain": "fetal brain",
    "Fetal femur": "fetal femur",
    "Fetal thorax": "fetal heart",
    "Maternal cervix": "maternal cervix",
    "Other": "fetus, another view",
}
BRAIN_PLANES = ("Trans-thalamic", "Trans-cerebellum", "Trans-ventricular")


def planes_table(folder, flag):
    """FETAL_PLANES_DB in its published layout -> a list of dict(image, plane, brain_plane, patient, train)."""
    columns = ["Image_name", "Patient_num", "Plane", "Brain_plane", "Train "]  # the trailing space is theirs
    rows = read_table(Path(folder) / "FETAL_PLANES_DB_data.csv", columns, flag, delimiter=";")
    rows = [
        {
            "image": Path(folder) / "Images" / f"{row['Image_name']}.png",
            "plane": row["Plane"].strip(),
            "brain_plane": row["Brain_plane"].strip(),
            "patient": row["Patient_num"].strip(),
            "train": row["Train "].strip() == "1",
        }
        for row in rows
    ]
    unknown = sorted({row["plane"] for row in rows} - PLANES.keys())
    if unknown:
        fail(f"{flag}: unknown Plane {unknown[0]!r} in FETAL_PLANES_DB_data.csv; known are {', '.join(PLANES)}")
    require_files([row["image"] for row in rows], flag)
    return rows


def hc18_table(folder, flag):
    """HC18's training set in its published layout -> a list of dict(image, pixel_mm, hc_mm)."""
    columns = ["filename", "pixel size(mm)", "head circumference (mm)"]
    path = Path(folder) / "training_set_pixel_size_and_HC.csv"
    table = []
    for row in read_table(path, columns, flag):
        try:
            pixel_mm, hc_mm = float(row[columns[1]]), float(row[columns[2]])
        except (TypeError, ValueError):
            fail(f"{flag}: {path} has no number for {row[columns[0]]}")
        table.append({"image": Path(folder) / "training_set" / row[columns[0]], "pixel_mm": pixel_mm, "hc_mm": hc_mm})
    require_files([row["image"] for row in table], flag)
    return table


def read_planes(rows, index):
    row = rows[index]
    view = PLANES[row["plane"]]
    if row["brain_plane"] in BRAIN_PLANES:
        view += f", {row['brain_plane'].lower()} plane"
    return Image.open(row["image"]), caption(index, view)


def read_hc18(rows, spacing_size, index):
    row = rows[index]
    image = Image.open(row["image"])
    return image, caption(
        index, "fetal brain", age_of(row["hc_mm"]), model_spacing(image, row["pixel_mm"], spacing_size)
    )


def open_source(source, cfg):
    """One value of --data -> a list of (name, number of pairs, function of an index that reads image and caption)."""
    flag = f"--data {source}"
    if source == "phantom":
        return [(source, cfg.phantom_pairs, partial(read_phantom, cfg.seed, cfg.spacing_size))]
    if source.startswith("planes:"):
        rows = [row for row in planes_table(source.removeprefix("planes:"), flag) if row["train"]]
        if not rows:
            fail(f"{flag}: no row has `Train ` = 1")
        return [(source, len(rows), partial(read_planes, rows))]
    if source.startswith("hc18:"):
        rows = hc18_table(source.removeprefix("hc18:"), flag)
        if not rows:
            fail(f"{flag}: training_set_pixel_size_and_HC.csv has no rows")
        return [(source, len(rows), partial(read_hc18, rows, cfg.spacing_size))]
    paths = []
    for pattern in braceexpand(source):
        if os.path.isdir(pattern):
            fail(f"{flag}: {pattern} is a folder; give '{pattern}/*.tar', planes:{pattern} or hc18:{pattern}")
        found = sorted(glob.glob(pattern)) or [pattern] * os.path.isfile(pattern)
        if not found:
            fail(f"{flag}: no file matches {pattern} (valid: phantom, planes:DIR, hc18:DIR or a pattern of tars)")
        paths += found
    indices = [index_tar(path) for path in tqdm(paths, desc="indexing", leave=False, disable=len(paths) < 4)]
    return [(path, len(index), partial(read_tar, path, index)) for path, index in zip(paths, indices)]


# ---------------------------------------------------------------- data: what the models see


def to_8bit(image):
    """Any Pillow mode -> 'L' or 'RGB'. Deep greys are scaled to 0..255; what is transparent becomes black."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode[0] in "IF":  # I, I;16, I;16B, F: Pillow's own convert() would clip at 255
        values = np.asarray(image, np.float64)
        top = values.max(initial=0)
        shallow = top <= 255 and image.mode in ("I", "F")  # I;16 is always 16 bits deep
        full = 1 if image.mode == "F" and top <= 1 else 255 if shallow else 65535
        return Image.fromarray(np.clip(values * (255 / full) + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("1", "CMYK", "YCbCr", "LAB", "HSV"):
        return image.convert("L" if image.mode == "1" else "RGB")
    image = image.convert("RGBA")  # LA, PA, P, RGBA, RGBa, RGBX
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


def square(image, size, interpolation):
    """Zero-pads a 'L' or 'RGB' image to a centred square and resizes it to size x size."""
    side = max(image.size)
    if image.size != (side, side):
        padded = Image.new(image.mode, (side, side))
        padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = padded
    return image.resize((size, size), Image.Resampling[interpolation.upper()]) if side != size else image


def decode(image, size):
    """Decodes an opened image, a JPEG at half or less of its size where that still is twice what is needed."""
    if image.format == "JPEG":
        shrink = 2 * size / max(image.size)
        image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
    return to_8bit(image)


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
    x = (x * brightness).clamp(0, 1)
    grey = luminance(x).mean((2, 3), keepdim=True)  # (n, 1, 1, 1)
    x = (grey + contrast * (x - grey)).clamp(0, 1)
    grey = luminance(x)  # (n, 1, S, S)
    x = (grey + saturation * (x - grey)).clamp(0, 1)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def luminance(x):
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class Pairs(Dataset):
    """Image-caption pairs of all sources. An item is addressed by (epoch, index); its view depends on nothing else.

    Images come at the largest input size of `models`, with the draw of their augmentation; what is left, to augment
    and to resize for the smaller model, is done for whole batches on the device.
    """

    def __init__(self, cfg, models, sources=None):
        self.sources = sources or [part for source in cfg.data for part in open_source(source, cfg)]
        self.ends = np.cumsum([n for _, n, _ in self.sources])
        self.seed = cfg.seed
        largest = max(models, key=lambda m: m.size)  # of equals the first, the student
        self.size, self.interpolation = largest.size, largest.interpolation
        self.tokenizers = [m.tokenizer for m in models]

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, index):
        """-> name of the source, its function that reads a pair, and the index of the pair in it."""
        source = int(np.searchsorted(self.ends, index, side="right"))
        name, n, read = self.sources[source]
        return name, read, index - int(self.ends[source]) + n

    def where(self, index):
        name, _, i = self.locate(index)
        return f"pair {i} of {name}"

    def __getitem__(self, item):
        """-> (S, S, 3) uint8 image, (6,) view, caption, indices that did not decode."""
        epoch, index = item
        bad = []
        while True:
            _, read, i = self.locate((index + len(bad)) % len(self))
            try:
                image, text = read(i)
                image = square(decode(image, self.size), self.size, self.interpolation)
                break
            except UNDECODABLE:
                bad.append((index + len(bad)) % len(self))
                if len(bad) > len(self) // 100:  # the training loop stops at this many
                    image, text = Image.new("L", (self.size, self.size)), ""
                    break
        view = draw_view(np.random.default_rng([self.seed, epoch, index]))
        return torch.from_numpy(np.array(image.convert("RGB"))), torch.from_numpy(view), text, bad

    def collate(self, items):
        """-> (n, S, S, 3) images, (n, 6) views, (n, context) tokens per model, share of repeated captions, bad."""
        images, views, texts, bad = zip(*items)
        tokens = [self.tokenizers[0](list(texts))]
        for tokenizer in self.tokenizers[1:]:  # CLIP's own, which is slow, is often the teacher's and the student's
            tokens.append(tokens[0] if same_tokenizer(tokenizer, self.tokenizers[0]) else tokenizer(list(texts)))
        repeated = 1 - len(set(texts)) / len(texts)
        return torch.stack(images), torch.stack(views), tokens, repeated, sorted({i for b in bad for i in b})


def same_tokenizer(a, b):
    clip = open_clip.SimpleTokenizer
    return type(a) is type(b) is clip and (a.context_length, a.clean_fn, a.reduction_fn) == (
        b.context_length,
        b.clean_fn,
        b.reduction_fn,
    )


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


# ---------------------------------------------------------------- models


@dataclass
class Model:
    """An open_clip model with what belongs to it: its tokenizer and its preprocessing."""

    name: str
    clip: nn.Module
    tokenizer: object  # list of n strings -> (n, context_length)
    context_length: int  # tokens
    size: int  # pixels, the side of the square input
    mean: tuple  # R, G, B, of pixels in 0..1
    std: tuple
    interpolation: str  # bicubic or bilinear

    def pixels(self, images):
        """(n, H, H, 3) uint8 on any device -> (n, 3, size, size) float, resized and normalised."""
        x = (images.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=layout(images.device))
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode=self.interpolation, antialias=True).clamp(0, 1)
        mean, std = (constant(v, x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def layout(device):
    """Channels last is faster on a GPU. On a CPU torch 2.15 crashes in MobileCLIP2-S0's backward with it."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@functools.lru_cache
def constant(values, device):
    return torch.tensor(values, device=device)  # copied to the device once: each copy would wait for it


@timm.models.register_model
def fastvit_demo(num_classes, global_pool="avg", **_):
    """The demonstration's image tower: FastViT's own blocks, few and thin."""
    return timm.models.FastVit(
        layers=(1, 1, 2, 1),
        embed_dims=(24, 48, 96, 192),
        mlp_ratios=(2, 2, 2, 2),
        layer_scale_init_value=0.1,  # 1e-5 suits hundreds of epochs, not ten
        num_classes=num_classes,
        global_pool=global_pool,
    )


DEMO_MODELS = {
    "demo-vit": dict(
        embed_dim=128,
        vision_cfg=dict(image_size=64, layers=4, width=128, head_width=32, patch_size=8),
        text_cfg=dict(context_length=40, width=64, heads=2, layers=2),
    ),
    "demo-fastvit": dict(
        embed_dim=64,
        vision_cfg=dict(timm_model_name="fastvit_demo", timm_pool="avg", timm_proj=None, image_size=64),
        text_cfg=dict(context_length=40, width=64, heads=2, layers=2),
    ),
}


def open_model(name, weights="", context_length=0, mean="", std="", flag="--weights"):
    """Any open_clip model, or one of DEMO_MODELS, with weights from a PATH, an open_clip TAG, or at random.

    Size, mean, std and interpolation are those of the tag, else those that open_clip lists for the first tag of
    the architecture: for a path open_clip itself would take OpenAI's, which is wrong for MobileCLIP2. Fails with
    one line when the name, the tag, the file or its keys are not right.
    """
    schema = ":" in name  # hf-hub:... and local-dir:... bring their own weights
    name = name if schema else name.replace("/", "-")
    is_file = bool(weights) and Path(weights).is_file()
    tags = [] if schema else open_clip.list_pretrained_tags_by_model(name)
    if not schema and name not in DEMO_MODELS and name not in open_clip.list_models():
        valid = [*DEMO_MODELS, *open_clip.list_models()]
        near = difflib.get_close_matches(name, valid, n=5) or valid[:5]
        fail(f"{name!r} is no model; near it are {', '.join(near)}; open_clip.list_models() lists {len(valid) - 2}")
    if weights and not is_file and weights not in tags:
        fail(f"{flag} {weights}: neither a file nor a tag of {name} (tags: {', '.join(tags) or 'none'})")
    if name in DEMO_MODELS:
        arch = DEMO_MODELS[name]
        text_cfg = {**arch["text_cfg"], **({"context_length": context_length} if context_length else {})}
        clip = open_clip.CLIP(**{**arch, "text_cfg": text_cfg})
        tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
        preprocess = {
            "size": clip.visual.image_size,
            "mean": (0.2,) * 3,
            "std": (0.2,) * 3,
            "interpolation": "bilinear",
        }
    else:
        logging.disable(logging.ERROR)  # open_clip warns of random weights, which may well be wanted
        try:
            tag = weights if weights and not is_file else None
            clip = open_clip.create_model(
                name,
                pretrained=tag,
                force_context_length=context_length or None,
                require_pretrained=bool(tag) or (schema and not is_file),  # else a failed download is random weights
            )
            tokenizer = open_clip.get_tokenizer(name, context_length=context_length or None)
        except (RuntimeError, OSError, ValueError) as error:
            fail(f"{flag} {weights or name}: could not be loaded; {flag} PATH takes a local file ({one_line(error)})")
        finally:
            logging.disable(logging.NOTSET)
        preprocess = dict(clip.visual.preprocess_cfg)
        if not tag and tags:
            preprocess.update(open_clip.get_pretrained_cfg(name, tags[0]), size=preprocess["size"])
    if is_file:
        load_weights(clip, weights, flag)
    if getattr(clip, "logit_bias", None) is not None:
        clip.logit_bias.requires_grad_(False)  # SigLIP's; a softmax does not see it
    size = preprocess["size"]
    return Model(
        name,
        clip,
        tokenizer,
        tokenizer.context_length,
        size if isinstance(size, int) else size[0],
        parse_rgb(mean) or tuple(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        parse_rgb(std) or tuple(preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
        preprocess.get("interpolation", "bicubic"),
    )


def parse_rgb(text):
    """'0.5,0.5,0.5' -> (0.5, 0.5, 0.5); '' -> ()."""
    try:
        values = tuple(float(v) for v in text.split(",")) if text else ()
    except ValueError:
        values = (math.nan,)
    if text and not (len(values) == 3 and all(map(math.isfinite, values))):
        fail(f"{text!r}: a mean or std is three numbers with commas between them, such as 0.485,0.456,0.406")
    return values


def load_weights(clip, path, flag):
    """Loads a state dict (.pt, .safetensors, bare or under "state_dict") after open_clip's conversions; strict."""
    try:
        state = open_clip.factory.load_state_dict(path)
        positions = {v.shape[0] for k, v in state.items() if k in ("positional_embedding", "text.positional_embedding")}
    except (RuntimeError, OSError, EOFError, ValueError, AttributeError, TypeError, StopIteration) as error:
        fail(f"{flag} {path}: no state dict ({one_line(error)})")
    except (pickle.UnpicklingError, SafetensorError) as error:
        fail(f"{flag} {path}: no weights file that can be read safely ({type(error).__name__})")
    try:
        result = open_clip.load_checkpoint(clip, path, strict=False)
        wrong = [f"missing {k}" for k in result.missing_keys] + [f"unexpected {k}" for k in result.unexpected_keys]
    except (RuntimeError, AssertionError) as error:  # shapes; open_clip asserts that of the positions
        own = {k: tuple(v.shape) for k, v in clip.state_dict().items()}
        wrong = [f"{k} is {tuple(v.shape)}, not {own[k]}" for k, v in state.items() if k in own and v.shape != own[k]]
        wrong += [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
        wrong = wrong or [one_line(error)]
    if wrong:
        fail(
            f"{flag} {path}: {len(wrong)} keys do not match the model: {', '.join(wrong[:4])}"
            + ", ..." * (len(wrong) > 4)
        )
    if positions and positions != {clip.context_length}:
        say(
            f"note: {path} has {positions.pop()} text positions, resized to {clip.context_length}; see --context-length"
        )


# ---------------------------------------------------------------- checkpoints


def write_atomically(path, write):
    """Calls write(temporary path), then renames: a kill leaves the old file or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


FORMAT = "dark-1"


def save_checkpoint(path, model, step, epoch, cfg, **more):
    """Self-describing: `model_from_checkpoint` needs nothing else. `state_dict` is open_clip's, so that the file
    itself can be given to --teacher-weights or --student-weights."""
    preprocess = {k: getattr(model, k) for k in ("size", "mean", "std", "interpolation")}
    checkpoint = {
        "format": FORMAT,
        "architecture": model.name,
        "context_length": model.context_length,
        "preprocess": preprocess,
        "state_dict": model.clip.state_dict(),
        "step": step,
        "epoch": epoch,
        "config": dataclasses.asdict(cfg),
        **more,
    }
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def load_checkpoint(path):
    """Reads a checkpoint of this project on the CPU; fails when it is missing, truncated or something else."""
    if not Path(path).is_file():
        fail(f"{path}: there is no such checkpoint; python dark.py writes out/student.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        fail(f"{path}: not a readable checkpoint: truncated, damaged, or another kind of file")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        fail(
            f"{path}: not a checkpoint of dark.py (format {FORMAT}); plain weights go with --model NAME --weights FILE"
        )
    return checkpoint


def model_from_checkpoint(checkpoint):
    """The model that `save_checkpoint` was given, in eval mode."""
    model = open_model(checkpoint["architecture"], context_length=checkpoint["context_length"])
    try:
        model.clip.load_state_dict(checkpoint["state_dict"])
    except RuntimeError:
        fail(f"the checkpoint's weights do not fit {model.name} as it is in this version of dark.py and open_clip")
    model.clip.eval()
    return dataclasses.replace(model, **checkpoint["preprocess"])


# ---------------------------------------------------------------- training


class Towers(nn.Module):
    """What DDP wraps: a model from raw pixels to embeddings and, for the feature-KD row, two linear projections."""

    def __init__(self, model, project_to=0):
        super().__init__()
        self.model, self.clip = model, model.clip
        dim = embedding_size(model) if project_to else 0
        self.projections = nn.ModuleList(nn.Linear(dim, project_to) for _ in range(2 if project_to else 0))

    def forward(self, images, tokens):
        """(n, H, W, 3) uint8, (n, context) -> [image (n, D), text (n, D), and their (n, D_t) projections], scale."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            image, text = self.clip.encode_image(self.model.pixels(images)), self.clip.encode_text(tokens)
            projected = [project(F.normalize(x, dim=-1)) for project, x in zip(self.projections, (image, text))]
        return [image, text, *projected], self.clip.logit_scale.exp()


def embedding_size(model):
    with torch.no_grad():
        return model.clip.encode_text(model.tokenizer(["fetus"]).to(model.clip.logit_scale.device)).shape[1]


def batch_loss(cfg, beta, embeddings, scale, targets, t_scale):
    """The objective of one batch, from this process's embeddings and the whole batch's targets (None: CLIP alone)."""
    image, text, *projected = (gather(x) for x in embeddings)
    if targets is None:  # the student itself stands in, at weight 0
        loss, parts = dark_loss(image, text, scale, image.detach(), text.detach(), scale.detach(), beta=0, diag=0)
        return loss, {"clip": parts["clip"]}
    diag = beta if cfg.coupled else cfg.diag
    loss, parts = dark_loss(image, text, scale, *targets, t_scale, beta=beta, diag=diag, tau=cfg.tau, smooth=cfg.smooth)
    if projected:
        feature = sum(F.mse_loss(x.float(), F.normalize(t.float(), dim=-1)) for x, t in zip(projected, targets))
        loss, parts["feature"] = loss + cfg.feature * feature, feature.detach()
    return loss, parts


def forward_backward(net, images, tokens, chunk, seeds, objective):
    """Leaves the gradient of objective(embeddings, scale) of the whole batch in `net`, holding activations for at
    most `chunk` pairs.

    With several chunks the embeddings come first, without graph; the loss of all of them gives the gradient on
    each embedding; then every chunk is embedded again, with graph, to carry its rows of that gradient on. Plain
    accumulation would be another objective: its softmax would see no more than `chunk` negatives. (Batch norm, where a
    tower has it, still takes its statistics from each chunk, as it does from each process under DDP.)
    """
    if chunk >= len(tokens):
        torch.manual_seed(seeds[0])
        loss, parts = objective(*net(images, tokens))
        loss.backward()
        return loss.detach(), parts
    distributed = isinstance(net, DistributedDataParallel)
    towers = net.module if distributed else net
    chunks = list(zip(images.split(chunk), tokens.split(chunk), seeds, strict=True))
    running = [buffer.clone() for buffer in towers.buffers()]  # batch-norm statistics must move once, not twice
    first_pass = []
    with torch.no_grad():
        for chunk_images, chunk_tokens, seed in chunks:
            torch.manual_seed(seed)  # the same dropout in both passes
            first_pass.append(towers(chunk_images, chunk_tokens)[0])
        for buffer, before in zip(towers.buffers(), running):
            buffer.copy_(before)
    embeddings = [torch.cat(rows).requires_grad_() for rows in zip(*first_pass)]
    scale = towers.clip.logit_scale.exp().detach().requires_grad_()
    loss, parts = objective(embeddings, scale)
    loss.backward()
    gradients = zip(*(x.grad.split(chunk) for x in embeddings))
    for k, ((chunk_images, chunk_tokens, seed), gradient) in enumerate(zip(chunks, gradients), start=1):
        # DDP is to average over the processes once, when the last chunk has added its part
        with net.no_sync() if distributed and k < len(chunks) else nullcontext():
            torch.manual_seed(seed)
            outputs, chunk_scale = net(chunk_images, chunk_tokens)
            torch.autograd.backward([*outputs, chunk_scale], [*gradient, scale.grad / len(chunks)])
    return loss.detach(), parts


@torch.no_grad()
def embed(towers, images, tokens, chunk):
    """A frozen teacher's image (N, D_t) and text (N, D_t) embeddings of the whole batch, on every process."""
    outputs = [towers(i, t)[0] for i, t in zip(images.split(chunk), tokens.split(chunk))]
    return [gather(torch.cat(rows)) for rows in zip(*outputs)]


def step_seed(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def default_workers():
    return max(1, min(8, (os.cpu_count() or 2) // world_size() - 1))


def make_optimizer(cfg, net):
    # Biases, norms and gains (also those shaped (C, 1, 1)) and the logit scale are not decayed.
    matrices = [p for p in net.parameters() if p.requires_grad and p.squeeze().ndim >= 2]
    vectors = [p for p in net.parameters() if p.requires_grad and p.squeeze().ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6)


def restore(path, total, towers, optimizer):
    """Loads the checkpoint at `path`, if there is one -> the step to go on with, the indices that did not decode."""
    if not path.exists():
        return 0, set()
    checkpoint = load_checkpoint(path)
    if checkpoint["steps"] != total:
        fail(f"--resume: {path} is of a run of {checkpoint['steps']} steps, the data now gives {total}")
    towers.clip.load_state_dict(checkpoint["state_dict"])
    towers.projections.load_state_dict(checkpoint["projections"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], set(checkpoint["bad"])


def rewind_log(log_path, start):
    """Drops the lines of steps that will be done again, and half a line that a kill may have left."""
    lines = log_path.read_text().splitlines(keepends=True) if start and log_path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start]
    write_atomically(log_path, lambda temporary: temporary.write_text("".join(kept)))


def make_loader(cfg, data, steps, device):
    """This process's share of the batches of range(*steps), in order, from worker processes."""
    order = batches(len(data), cfg.batch, steps, cfg.seed, rank(), world_size())
    workers, pin = cfg.workers if cfg.workers >= 0 else default_workers(), device.type == "cuda"
    return DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=data.collate, pin_memory=pin)


def summary(record):
    """What the line of an epoch tells of its last step."""
    terms = " ".join(f"{k} {record[k]:.4f}" for k in ("loss", "clip", "diag", "off") if record[k] is not None)
    return terms + "  beta {beta:+.3f}  scale {logit_scale:.1f}  lr {lr:.1e}  {img_s:.0f} img/s".format(**record)


def train(cfg, device, student, teacher, data, path, log_path):
    """Trains `student` on `data`, against `teacher` or, where that is None, with the CLIP loss alone.

    Goes on from the checkpoint at `path` if there is one, writes it every epoch, and appends to `log_path`.
    """
    n = len(data)
    total = cfg.epochs * n // cfg.batch  # T of Eq. 7, optimizer steps
    share = cfg.batch // world_size()
    chunk = cfg.micro_batch or share
    t_towers = Towers(teacher).to(device, memory_format=layout(device)).eval() if teacher else None
    torch.manual_seed(cfg.seed)
    towers = Towers(student, embedding_size(teacher) if cfg.feature else 0)
    towers.to(device, memory_format=layout(device)).train()
    clamp_scale(student.clip)
    optimizer = make_optimizer(cfg, towers)
    start, bad = restore(path, total, towers, optimizer)
    if start == total:
        say(f"{path}: trained already, all {total} steps")
        return

    def save(step):
        projections, state = towers.projections.state_dict(), optimizer.state_dict()
        more = {"steps": total, "bad": sorted(bad), "projections": projections, "optimizer": state}
        save_checkpoint(path, student, step, step * cfg.batch / n, cfg, **more)

    barrier()  # all processes have looked for the checkpoint
    if rank() == 0:
        if start == 0:
            save(0)  # so that a kill in the first epoch can be resumed too
        rewind_log(log_path, start)
    if 2 * cfg.warmup > total:
        say(f"note: {cfg.warmup} warm-up steps are most of the {total} steps of this run; see --warmup")
    net = DistributedDataParallel(towers) if dist.is_initialized() else towers
    loader = iter(make_loader(cfg, data, (start, total), device))
    bar = tqdm(total=total, initial=start, desc=path.stem, unit="step", disable=rank() != 0, dynamic_ncols=True)
    since, waited, steps = time.perf_counter(), 0.0, 0

    for step in range(start, total):
        waiting = time.perf_counter()
        images, views, tokens, repeated, unreadable = next(loader)
        waited, steps = waited + time.perf_counter() - waiting, steps + 1
        bad.update(unreadable)
        if len(bad) > n // 100:
            stop(f"{len(bad)} of {n} pairs do not decode, more than 1 %: the first is {data.where(min(bad))}")

        lr, beta = lr_at(step, total, cfg.lr, cfg.warmup), beta_at(step, total, cfg.beta0, cfg.r)
        if beta < 0 <= beta_at(step - 1, total, cfg.beta0, cfg.r):
            say(f"step {step}: beta is negative from here on; the student repels, and the loss may fall below 0")
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, views, *tokens = (x.to(device, non_blocking=True) for x in (images, views, *tokens))
        images = torch.cat([augment(*part) for part in zip(images.split(chunk), views.split(chunk))])
        targets = embed(t_towers, images, tokens[1], chunk) if teacher else None
        t_scale = teacher.clip.logit_scale.exp() if teacher else None
        seeds = [step_seed(cfg.seed, step, rank(), k) for k in range(share // chunk)]
        objective = partial(batch_loss, cfg, beta, targets=targets, t_scale=t_scale)
        optimizer.zero_grad(set_to_none=True)
        loss, parts = forward_backward(net, images, tokens[0], chunk, seeds, objective)
        grad_norm = nn.utils.clip_grad_norm_(towers.parameters(), cfg.clip_norm)
        optimizer.step()
        clamp_scale(student.clip)
        bar.update()

        done = step + 1
        epoch_ends = done == total or done * cfg.batch // n > step * cfg.batch // n
        if step % cfg.log_every and not epoch_ends:
            continue
        # Only here does the host wait for the device.
        figures = {"loss": loss, **parts, "logit_scale": student.clip.logit_scale.exp(), "grad_norm": grad_norm}
        figures = {name: value.item() for name, value in figures.items()}
        if not all(map(math.isfinite, figures.values())):
            stop(f"not finite by step {step}: " + ", ".join(f"{name} {value:g}" for name, value in figures.items()))
        bad = everyones(bad)
        now = time.perf_counter()
        speed = {"img_s": steps * cfg.batch / (now - since), "data_wait": waited / (now - since)}
        since, waited, steps = now, 0.0, 0
        record = {"step": step, "epoch": step * cfg.batch / n, "diag": None, "off": None} | figures | speed
        record |= {"beta": beta, "lr": lr, "repeated_captions": repeated, "bad": len(bad)}
        bar.set_postfix_str("loss {loss:.3f} beta {beta:+.2f} {img_s:.0f} img/s wait {data_wait:.0%}".format(**record))
        if rank() == 0:
            with open(log_path, "a") as log:
                log.write(json.dumps(record) + "\n")
        if epoch_ends and rank() == 0:
            save(done)
            say(f"epoch {done * cfg.batch / n:.2f}/{cfg.epochs}  step {done}/{total}  {summary(record)}")
    bar.close()
    if bad:
        say(f"{len(bad)} of {n} pairs did not decode; their neighbours stood in; the first is {data.where(min(bad))}")


def draw_curves(log_path, cfg, path):
    """The two weights, with the zero crossing of beta, and the loss terms over epochs, from log.jsonl."""
    import matplotlib.pyplot as plt  # here, so that training needs no display and starts faster

    log = [json.loads(line) for line in log_path.read_text().splitlines()]
    epochs = [record["epoch"] for record in log]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    beta = [record["beta"] for record in log]
    top.plot(epochs, beta if cfg.coupled else [cfg.diag] * len(log), label="weight of diag")
    top.plot(epochs, beta, label="weight of off: beta", linestyle="--" if cfg.coupled else "-")
    top.axhline(0, color="gray", linewidth=0.8)
    if cfg.r < 0 and cfg.beta0:
        crossing = cfg.epochs / (1 - cfg.r)
        top.axvline(crossing, color="gray", linestyle=":")
        top.annotate(f" beta = 0 at epoch {crossing:.1f}", (crossing, 0), xytext=(4, 6), textcoords="offset points")
    for term in ("clip", "diag", "off"):
        values = [record[term] for record in log]
        if values[-1] is not None:
            bottom.plot(epochs, values, label=term)
    top.set_ylabel("weight")
    bottom.set(xlabel="epoch", ylabel="loss term, unweighted (nats)")
    top.legend()
    bottom.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    plt.close(figure)


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


def parse_args(argv=None):
    """The command line is the dataclass. Precedence: a flag given, then --ablation, the demonstration, the default."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type == tuple[str, ...]:
            kind = {"nargs": "+"}
        help_text = f"{help_of[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=help_text, **kind)
    given = vars(parser.parse_args(argv))
    if "data" in given:
        given["data"] = tuple(given["data"])
    ablation = given.get("ablation", "")
    if ablation and ablation not in ABLATIONS:
        fail(f"--ablation {ablation}: valid are {', '.join(ABLATIONS)}")
    asked = Config(**{**ABLATIONS.get(ablation, {}), **given})
    # Real data with a teacher, or with no need of one, is the paper's run; else everything starts at random.
    ready = asked.teacher_weights or ":" in asked.teacher or (asked.student_weights and not needs_teacher(asked))
    real = ready and set(asked.data) != {"phantom"}
    cfg = asked if real else Config(**{**DEMONSTRATION, **ABLATIONS.get(ablation, {}), **given})
    check(cfg)
    return cfg, real


def needs_teacher(cfg):
    return not (cfg.coupled and cfg.beta0 == 0 and cfg.feature == 0)  # no-kd gives it no weight anywhere


def check(cfg):
    """Fails on a setting that no run can use, naming the flag and what would be valid."""
    positive = ("tau", "phantom_pairs", "epochs", "lr", "clip_norm", "log_every")
    natural = (
        "teacher_epochs",
        "micro_batch",
        "warmup",
        "weight_decay",
        "context_length",
        "spacing_size",
        "seed",
        "feature",
    )
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        if field.type is float and not math.isfinite(value):
            fail(f"{flag} {value}: must be a finite number")
        if field.name in positive and value <= 0:
            fail(f"{flag} {value}: must be more than 0")
        if field.name in natural and value < 0:
            fail(f"{flag} {value}: must be 0 or more")
    if not 0 <= cfg.smooth < 1:
        fail(f"--smooth {cfg.smooth}: must be at least 0 and less than 1")
    if cfg.seed >= 2**32:
        fail(f"--seed {cfg.seed}: must be less than 2**32; the evaluation's phantom lies beyond")
    if cfg.batch < 2:
        fail(f"--batch {cfg.batch}: must be at least 2, a single pair has nothing to contrast with")
    if cfg.workers < -1:
        fail(f"--workers {cfg.workers}: must be -1 (chosen by cores) or more")
    if cfg.resume and cfg.overwrite:
        fail("--resume with --overwrite: give one of them")
    if cfg.batch % world_size():
        fail(f"--batch {cfg.batch}: not divisible by the {world_size()} processes")
    share = cfg.batch // world_size()
    if cfg.micro_batch and share % cfg.micro_batch:
        fail(f"--micro-batch {cfg.micro_batch}: does not divide the {share} pairs of a process")
    try:
        torch.empty(0, device="cpu" if cfg.device == "auto" else cfg.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {cfg.device}: not usable here ({one_line(error)}); valid are auto, cpu, cuda, cuda:N, mps")
    if cfg.device == "meta":
        fail("--device meta: holds no data; valid are auto, cpu, cuda, cuda:N, mps")
    if Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        fail(f"--out {cfg.out}: is a file; give a folder")


# How a run is carried out, not what it computes: these may change between a run and its --resume.
RUN_FIELDS = ("ablation", "out", "workers", "device", "log_every", "resume", "overwrite")


def claim(path, cfg, reuse=False):
    """What to do with a checkpoint at `path` -> True: discard it (--overwrite); False: go on with it (--resume).

    reuse: a finished run of the same configuration may stay without being asked for. Anything else is an error.
    """
    if not path.exists():
        return False
    if cfg.overwrite and not (reuse and zipfile.is_zipfile(path)):  # torch.save writes a zip; cut short, it is none
        return True
    checkpoint = load_checkpoint(path)
    before, now = checkpoint["config"], dataclasses.asdict(cfg)
    changed = [k for k in now if k not in RUN_FIELDS and now[k] != before.get(k)]
    finished = checkpoint["step"] == checkpoint["steps"]
    if (reuse and finished and not changed) or cfg.overwrite:
        return bool(changed) or not finished
    if not cfg.resume:
        state = "a finished run" if finished else f"a run at step {checkpoint['step']} of {checkpoint['steps']}"
        fail(f"--out {cfg.out} holds {state} ({path.name}): --resume goes on with it, --overwrite discards it")
    if changed:
        k = changed[0]
        fail(f"--resume: --{k.replace('_', '-')} was {before.get(k)!r} in {path}, is now {now[k]!r}")
    return False


def teacher_config(cfg):
    """The configuration of the run that trains the teacher: the same loop, with the teacher as a student of none."""
    return dataclasses.replace(
        cfg, student=cfg.teacher, student_weights="", student_mean=cfg.teacher_mean, student_std=cfg.teacher_std,
        teacher="", teacher_weights="", teacher_mean="", teacher_std="", epochs=cfg.teacher_epochs or cfg.epochs,
        teacher_epochs=0, coupled=True, beta0=0.0, r=1.0, diag=1.0, tau=5.0, smooth=0.0, feature=0.0,
    )  # fmt: skip


def introduce(cfg, real, trains_teacher, models):
    if not real:
        what = "a synthetic demonstration" if set(cfg.data) == {"phantom"} else "a demonstration on your images"
        say(f"This is {what}: small models, trained from scratch. The paper's run takes three flags:")
        say(
            "    --data 'shards/{000000..000024}.tar' --teacher-weights PATH --student-weights PATH  (FetalCLIP: and --context-length 117)"
        )
    for role, model in models.items():
        tower, whole = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.clip.visual, model.clip))
        say(
            f"{role}: {model.name}, image tower {tower:.2f} M parameters, {whole:.2f} M in all; {model.size} px, "
            f"mean {model.mean}, std {model.std}, {model.interpolation}; {model.context_length} tokens"
        )
    if trains_teacher:
        say("no --teacher-weights: the teacher is trained first, with the CLIP loss alone")


def prepare_device(cfg):
    """The device of this process; joins the process group when torchrun started several."""
    cuda = torch.cuda.is_available() and cfg.device.startswith(("auto", "cuda"))
    distributed = world_size() > 1
    device = torch.device("cpu" if cfg.device == "auto" else cfg.device)
    if cuda and (distributed or cfg.device == "auto"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def main(argv=None):
    cfg, real = parse_args(argv)
    device, out = prepare_device(cfg), Path(cfg.out)
    torch.manual_seed(cfg.seed)
    student = open_model(
        cfg.student, cfg.student_weights, cfg.context_length, cfg.student_mean, cfg.student_std, "--student-weights"
    )
    cfg.spacing_size = cfg.spacing_size or student.size
    teacher = None
    if needs_teacher(cfg):
        torch.manual_seed(cfg.seed)
        teacher = open_model(
            cfg.teacher, cfg.teacher_weights, cfg.context_length, cfg.teacher_mean, cfg.teacher_std, "--teacher-weights"
        )
    data = Pairs(cfg, [student, teacher] if teacher else [student])
    if cfg.batch > len(data):
        fail(f"--batch {cfg.batch}: more than the {len(data)} pairs of --data; at most {len(data)}")
    t_cfg, t_path, t_log = teacher_config(cfg), out / "teacher.pt", out / "teacher_log.jsonl"
    trains_teacher = bool(teacher) and not cfg.teacher_weights and ":" not in cfg.teacher
    if rank() == 0:
        discard = {out / "student.pt": claim(out / "student.pt", cfg)}
        discard[t_path] = trains_teacher and claim(t_path, t_cfg, reuse=True)
        for path in (path for path, unwanted in discard.items() if unwanted):
            path.unlink()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out {cfg.out}: cannot be made ({one_line(error)})")
    barrier()
    introduce(cfg, real, trains_teacher, {"student": student, **({"teacher": teacher} if teacher else {})})

    if trains_teacher:
        train(t_cfg, device, teacher, None, Pairs(t_cfg, [teacher], data.sources), t_path, t_log)
        barrier()  # batch norm's statistics are each process's own; what was saved is the teacher of all
        teacher.clip.load_state_dict(load_checkpoint(t_path)["state_dict"])
    if teacher:
        teacher.clip.requires_grad_(False).eval()
    train(cfg, device, student, teacher, data, out / "student.pt", out / "log.jsonl")
    if rank() == 0:
        draw_curves(out / "log.jsonl", cfg, out / "curves.png")
        say(f"wrote {out / 'student.pt'}, {out / 'log.jsonl'} and {out / 'curves.png'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
