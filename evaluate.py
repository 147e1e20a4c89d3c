"""Measure a CLIP as the paper does: zero-shot plane F1, HC18 validity, linear probe, geometry (Tables 1, 4 and 5).

    python evaluate.py                                          # out/student.pt on phantom/FETAL_PLANES_DB and HC18
    python evaluate.py out/student.pt --planes FETAL_PLANES_DB --hc18 HC18 --plots
    python evaluate.py runs/*/student.pt                                  # with mean and sd over the seeds
    python evaluate.py --model ViT-L-14 --weights FetalCLIP_weights.pt --context-length 117 --planes ... --hc18 ...
    python evaluate.py --planes FETAL_PLANES_DB --hc18 HC18 --write-pairs pairs.csv    # for dark.py --data pairs.csv

Prints Table 1's columns and writes results.json beside the checkpoint. A task without data is absent, never zero.
"""

import csv
import io
import json
import math
import os
import re
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from sklearn import linear_model, metrics, model_selection
from sklearn.manifold import TSNE
from torch.nn.utils.stateless import _reparametrize_module
from tqdm import tqdm

import dark
from dark import fail


@dataclass
class Options:
    """What to measure, on what; `python evaluate.py --help` is made from these lines."""

    checkpoints: tuple[str, ...] = field(default=(), metadata={"positional": "*"})  # of dark.py; none: out/student.pt
    planes: str = ""  # folder of FETAL_PLANES_DB in its published layout
    hc18: str = ""  # folder of HC18 in its published layout
    split: str = "all"  # rows of --planes: all, or `Train ` = 0 only
    prompts: tuple[str, ...] = ()  # JSON files of class -> [prompts], merged; without `ga` in them ours remain
    model: str = ""  # any open_clip model, hf-hub:... too
    weights: str = ""  # PATH or open_clip TAG, of --model
    context_length: int = 0  # tokens, of --model and of a --teacher by name; 0: their own
    mean: str = ""  # R,G,B of --model; empty: what open_clip lists
    std: str = ""  # R,G,B of --model; empty: what open_clip lists
    interpolation: str = ""  # of --model; empty: what open_clip lists
    teacher: str = ""  # checkpoint or model, for retention (--probe, --chd) and rank correlation (--geometry)
    teacher_weights: str = ""  # PATH or open_clip TAG, of a --teacher by name
    spacing_size: int = 0  # pixels: texts state mm per pixel at this size; 0: the model's input, for --write-pairs 256
    probe: bool = False  # linear probes on --planes (Table 5)
    chd: str = ""  # folder of labels.csv and a folder of frames per video: linear probes on videos
    geometry: bool = False  # shape of the embeddings and of the logits on --planes (Table 4)
    plots: bool = False  # a figure for each model beside the results
    write_pairs: str = ""  # only writes this CSV of --planes and --hc18, for dark.py's --data
    out: str = ""  # file for the results; empty: results.json beside the first checkpoint
    batch: int = 64  # images at a time
    workers: int = -1  # threads that read images; -1: one less than the cores, 1 to 8


# ---------------------------------------------------------------- prompts

PHRASINGS = (
    "Ultrasound of the {}.",
    "Prenatal ultrasound image showing the {}.",
    "{} on ultrasound.",
    "An ultrasound image of the {}.",
    "Obstetric ultrasound, {}.",
)
PLANE_WORDS = {part: f"fetal {part}" for part in ("abdomen", "brain", "femur", "heart", "kidney", "spine")}
PLANE_WORDS |= dict(cervix="maternal cervix", lips_nose="fetal lips and nose", profile_patient="fetal facial profile")
BRAIN_PLANES = ("trans-thalamic", "trans-cerebellum", "trans-ventricular")
BRAIN_WORDS = {plane: f"fetal brain, {plane} plane" for plane in BRAIN_PLANES}
PROMPTS = {
    "planes": {name: [phrasing.format(words) for phrasing in PHRASINGS] for name, words in PLANE_WORDS.items()},
    "brain": {name: [phrasing.format(words) for phrasing in PHRASINGS] for name, words in BRAIN_WORDS.items()},
    "ga": [
        "Ultrasound of the fetal brain, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
        "An ultrasound image of the fetal brain at {weeks} weeks and {day} days with a pixel spacing of {pixel_spacing} mm.",
        "Fetal brain on ultrasound, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
        "Ultrasound of the fetal brain at {weeks} weeks and {day} days with a pixel spacing of {pixel_spacing} mm.",
        "{weeks} weeks and {day} days, {pixel_spacing} mm per pixel: fetal brain on ultrasound.",
    ],
}
GA_FIELDS = ("{weeks}", "{day}", "{pixel_spacing}")


def read_prompts(*paths, needed=()):
    """JSON files of an object class -> [prompts], as FetalCLIP publishes them, merged; `ga` has the age templates."""
    prompts = {}
    for path in paths:
        with dark.user_error(path):
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        lists = list(found.values()) if isinstance(found, dict) else []
        if not lists or not all(isinstance(v, list) and v and all(isinstance(p, str) and p for p in v) for v in lists):
            fail(f"{path}: not a JSON object class -> [prompts], with at least one prompt a class")
        prompts |= found
    for name in needed:
        if name not in prompts:
            fail(f"--prompts: no class {name!r}; needed are {', '.join(needed)}")
    for template in prompts.get("ga", []):
        if not all(part in template for part in GA_FIELDS):
            fail(f"--prompts: the `ga` template {template!r} lacks one of {', '.join(GA_FIELDS)}")
    return prompts


# ---------------------------------------------------------------- captions and growth

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


# ---------------------------------------------------------------- data sets

SCORES = {"planes": "f1_5plane", "brain": "f1_3brain"}  # field of a row that has its class, and of PROMPTS -> result
PLANES = {f"Fetal {part}": part for part in ("abdomen", "brain", "femur")}  # FETAL_PLANES_DB's `Plane` -> class
PLANES |= {"Fetal thorax": "heart", "Maternal cervix": "cervix", "Other": "other"}


def planes_table(folder):
    """FETAL_PLANES_DB in its published layout -> rows with image, patient, train, and the classes planes and brain."""
    columns, rows = ["Image_name", "Patient_num", "Plane", "Brain_plane", "Train "], []  # the trailing space is theirs
    for row in dark.read_table(Path(folder) / "FETAL_PLANES_DB_data.csv", columns, delimiter=";"):
        name, patient, plane, brain, train = (row[column].strip() for column in columns)
        image, brain = Path(folder) / "Images" / f"{name}.png", brain.lower()
        if plane not in PLANES:
            fail(f"--planes {folder}: {name} has the Plane {plane!r}; known are {', '.join(PLANES)}")
        if not image.is_file():
            fail(f"--planes {folder}: {name} has no file {image}")
        brain = brain if brain in BRAIN_WORDS else ""
        rows.append(dict(image=image, patient=patient, train=train == "1", planes=PLANES[plane], brain=brain))
    return rows


def hc18_table(folder):
    """HC18's training set in its published layout -> rows with image, side_mm (of the padded square) and hc_mm."""
    columns, rows = ["filename", "pixel size(mm)", "head circumference (mm)"], []
    path = Path(folder) / "training_set_pixel_size_and_HC.csv"
    for row in dark.read_table(path, columns):
        image = Path(folder) / "training_set" / row["filename"]
        with dark.user_error(f"{path}: {row['filename']}", ValueError):
            pixel_mm, hc_mm = (float(row[column]) for column in columns[1:])
            if not (0 < pixel_mm < math.inf and 0 < hc_mm < math.inf):
                raise ValueError(f"{pixel_mm} mm per pixel, {hc_mm} mm around: both must be finite and above 0")
        with dark.user_error(image), Image.open(image) as opened:
            rows.append(dict(image=image, side_mm=max(opened.size) * pixel_mm, hc_mm=hc_mm))
    if not any(100 <= row["hc_mm"] <= 342 for row in rows):
        fail(f"{path}: none of its {len(rows)} rows has a head circumference within 100 to 342 mm")
    return rows


def chd_table(folder):
    """labels.csv and a folder of frames per video -> rows with label, patient, train and 16 evenly spaced frames."""
    natural = lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    rows = []
    for row in dark.read_table(Path(folder) / "labels.csv", ["video", "label", "patient", "train"]):
        found = sorted((Path(folder) / row["video"]).glob("[!.]*"), key=natural)
        if not found:
            fail(f"--chd {folder}: the video {row['video']} has no frames")
        frames = [found[round(i)] for i in np.linspace(0, len(found) - 1, 16)]
        rows.append({**row, "train": row["train"].strip() == "1", "frames": frames})
    if not all(len({row["label"] for row in rows if row["train"] == train}) == 2 for train in (True, False)):
        fail(f"--chd {folder}: labels.csv needs rows of two labels with train = 1, and of both with train = 0")
    return rows


def age_of(hc_mm):
    """The age in days, 10 to 42 weeks, whose median head circumference is nearest to hc_mm."""
    ages = np.arange(10 * 7, 42 * 7)
    return int(ages[np.abs(who_hc(ages) - hc_mm).argmin()])


def write_pairs(path, planes, heads, size):
    """The images with captions made from their labels -> a CSV for dark.py's --data."""
    home, table = os.path.dirname(os.path.abspath(path)), io.StringIO(newline="")
    trained = [row for row in planes if row["train"]]
    views = [BRAIN_WORDS.get(row["brain"]) or PLANE_WORDS.get(row["planes"], "fetus, another view") for row in trained]
    texts = [caption(i, view) for i, view in enumerate(views)]
    for i, row in enumerate(heads):
        texts.append(caption(i, "fetal brain", age_of(row["hc_mm"]), row["side_mm"] / size))
    if not texts or Path(path).suffix != ".csv":
        fail(f"--write-pairs {path}: needs a name in .csv, and --hc18 DIR or --planes DIR with rows of `Train ` = 1")
    csv.writer(table).writerow(("image", "caption"))
    for row, text in zip(trained + heads, texts):
        image = Path(os.path.abspath(row["image"]))
        csv.writer(table).writerow((image.relative_to(home) if image.is_relative_to(home) else image, text))
    dark.write_atomically(path, table.getvalue().encode())
    print(f"wrote {path}: {len(texts)} pairs; mm per pixel are those at {size} pixels")


# ---------------------------------------------------------------- metrics


def macro_f1(predicted, actual):
    """Mean over the labels that occur in `actual` of F1 = 2 TP / (2 TP + FP + FN).

    predicted, actual: equally long sequences of labels, strings or ints. Raises ValueError otherwise.
    """
    predicted, actual = np.asarray(predicted), np.asarray(actual)
    if len(predicted) != len(actual) or not len(actual):
        raise ValueError(f"macro_f1: {len(predicted)} predicted for {len(actual)} actual labels")
    return float(metrics.f1_score(actual, predicted, labels=np.unique(actual), average="macro", zero_division=0))


WHO_HC_2_5 = (1.59317517131532, 0.29459800552433, -0.0073860372566707, 0.0000656951770216148)
WHO_HC_97_5 = (2.50074069629423, 0.220067854715719, -0.00493623111462443, 0.0000389066000946519)


def validity(similarity, hc_mm):
    """HC18 validity: is the true head within the WHO 2.5th to 97.5th percentile of the predicted age?

    similarity  (n, 175) image to age 14w0d ... 38w6d, one column a day
    hc_mm       (n,) true head circumference; images outside 100 to 342 mm are not counted
    Returns valid and n (counted images), rate (valid / n, NaN if none counts) and days (n,) LongTensor: for all
    images the predicted age in days, 98 to 272: the median of the 15 most similar days. `counted` and `inside`
    are the (n,) masks behind the numbers.
    """
    similarity, hc_mm = torch.as_tensor(similarity), torch.as_tensor(hc_mm, dtype=torch.float64)
    if similarity.shape != (len(hc_mm), len(GA_DAYS)):
        raise ValueError(f"validity: similarity is {tuple(similarity.shape)}, not ({len(hc_mm)}, {len(GA_DAYS)})")
    top = similarity.argsort(dim=1, descending=True, stable=True)[:, :15]  # (n, 15), ties to the younger age
    days = top.sort(dim=1).values[:, 7] + int(GA_DAYS[0])
    low, high = (torch.from_numpy(who_hc(days.cpu().numpy(), curve)) for curve in (WHO_HC_2_5, WHO_HC_97_5))
    counted = (hc_mm >= 100) & (hc_mm <= 342)
    inside = (low <= hc_mm) & (hc_mm <= high)
    n, valid = int(counted.sum()), int((counted & inside).sum())
    return dict(valid=valid, n=n, rate=valid / n if n else math.nan, days=days, counted=counted, inside=inside)


def geometry(features, labels):
    """Table 4 of unit-norm features (n, D) with n labels: shape of the cloud, and how the classes lie in it."""
    features, labels = features.double(), np.asarray(labels)
    variance = torch.linalg.svdvals(features - features.mean(0)).square()  # the covariance's spectrum times n - 1
    share = variance.cumsum(0) / variance.sum()
    cosine = features @ features.T  # (n, n)
    alike = torch.from_numpy(labels[:, None] == labels)  # (n, n): two images of one class
    others = ~torch.eye(len(labels), dtype=torch.bool)
    return {
        "effective_dimension": float(variance.sum().square() / variance.square().sum()),  # participation ratio
        "rank95": int((share < 0.95).sum()) + 1,
        "silhouette": float(metrics.silhouette_score(features.numpy(), labels, metric="cosine")),
        "intra_cosine": float(cosine[alike & others].mean()),
        "inter_cosine": float(cosine[~alike].mean()),
        "uniformity": float((4 * cosine[others] - 4).exp().mean().log()),  # of exp(-2 d^2), d^2 = 2 - 2 cosine
    }


def t_interval(values):
    """Mean and half width of the 95 % Student-t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


def fit_and_score(features, labels, groups, train, score, seeds=5, folds=5):
    """Linear probes: for each seed and each of 5 patient-grouped folds of the train rows, one linear layer is fitted
    on the other four, its regularisation chosen on the fold, and scored on the test rows -> 25 scores."""
    x, y, groups, train = np.asarray(features), np.asarray(labels), np.asarray(groups), np.asarray(train)
    scores = []
    for seed in tqdm(range(seeds), desc="probe", unit="seed", leave=False, disable=None):
        splitter = model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for fit, held_out in splitter.split(x[train], y[train], groups[train]):
            layers = [linear_model.LogisticRegression(C=c, max_iter=1000) for c in (1, 10, 100)]
            probes = [layer.fit(x[train][fit], y[train][fit]) for layer in layers]
            best = max(probes, key=lambda probe: macro_f1(probe.predict(x[train][held_out]), y[train][held_out]))
            scores.append(score(best, x[~train], y[~train]))
    return scores


# ---------------------------------------------------------------- embeddings: fp32, for bf16 moves half of the ages


def unit(embeddings):
    """Unit-norm fp32. What is not finite is refused: it would be scored as if it were something."""
    if not embeddings.isfinite().all():
        raise FloatingPointError("its embeddings are not finite numbers")
    return F.normalize(embeddings.float(), dim=-1)


@torch.no_grad()
def embed_images(model, images, args):
    """Paths -> (n, D) unit-norm features on the CPU."""

    def read(image):
        return torch.from_numpy(np.array(dark.square(Image.open(image), model.size, model.interpolation)))

    device, features = model.clip.logit_scale.device, []
    with ThreadPoolExecutor(max(1, args.workers)) as pool:  # Pillow decodes and resizes without Python's lock
        for start in tqdm(range(0, len(images), args.batch), desc="images", unit="batch", leave=False, disable=None):
            batch, pixels = images[start : start + args.batch], []
            for image, reading in zip(batch, [pool.submit(read, image) for image in batch]):
                with dark.user_error(f"{image}: does not decode"):
                    pixels.append(reading.result())
            pixels = torch.stack(pixels).to(device).permute(0, 3, 1, 2) / 255  # (n, 3, S, S)
            features.append(unit(model.clip.encode_image(model.normalize(pixels))).cpu())
    return torch.cat(features)


def reads_up_to_the_end(clip):
    """Whether a text's embedding depends on its tokens up to end-of-text alone: causal, and read out there."""
    tower = getattr(clip, "text", clip)
    causal = isinstance(getattr(tower, "attn_mask", None), torch.Tensor) and getattr(tower, "cls_emb", None) is None
    return causal and getattr(tower, "pool_type", getattr(tower, "text_pool_type", None)) == "argmax"


@torch.no_grad()
def embed_texts(clip, tokenizer, texts):
    """n strings -> (n, D) unit-norm features on the model's device. A text that would be cut off is an error.

    In a causal tower the padding cannot reach what is read out, and is left out: most of 77 tokens. open_clip's towers
    add all of their positions and their whole mask to whatever they are given, so these are shortened for the while.
    """
    context, tower, cut = tokenizer.context_length, getattr(clip, "text", clip), {}
    tokens = tokenizer(texts, context_length=context + 1)  # one more than fits shows what would be cut off
    too_long = (tokens[:, -1] != tokenizer([""])[0, -1]).tolist()
    if any(too_long):
        fail(f"the prompt {texts[too_long.index(True)]!r} is longer than the context of {context} tokens")
    tokens = tokens[:, :-1].to(clip.logit_scale.device)
    if reads_up_to_the_end(clip):
        n = int(tokens.argmax(1).max()) + 1  # the end-of-text token has the largest id
        tokens = tokens[:, :n]
        cut = {"positional_embedding": tower.positional_embedding[:n], "attn_mask": tower.attn_mask[:n, :n]}
    with _reparametrize_module(tower, cut):
        return unit(clip.encode_text(tokens))


def class_embeddings(model, prompts):
    """class -> [prompts] to (C, D): each prompt embedded, normalised, averaged per class, normalised."""
    return unit(torch.stack([embed_texts(model.clip, model.tokenizer, list(p)).mean(0) for p in prompts.values()]))


@torch.no_grad()
def ga_similarity(model, tokenizer, images, pixel_mm, templates):
    """Similarity of images to every age from 14w0d to 38w6d, averaged over the templates -> (n, 175), fp32, CPU.

    model      an open_clip model, in eval mode; `tokenizer` is its own
    images     (n, 3, S, S), padded, resized and normalised for the model, or their embeddings (n, D)
    pixel_mm   (n,) mm per pixel of those S x S images; it is stated with two decimals
    templates  strings with {weeks}, {day} and {pixel_spacing}

    Two decimals leave few distinct spacings, so each prompt is encoded once and not once an image.
    """
    device = model.logit_scale.device
    if images.ndim == 4:
        images = torch.cat([model.encode_image(part.to(device)) for part in images.split(64)])
    images, stated = unit(images).to(device), np.array([f"{float(mm):.2f}" for mm in pixel_mm])
    similarity = torch.zeros(len(images), len(GA_DAYS))  # rows images, columns days
    for spacing in tqdm(np.unique(stated), desc="age prompts", unit="spacing", leave=False, disable=None):
        mine = torch.from_numpy(stated == spacing)
        for template in templates:
            template = template.replace("{pixel_spacing}", spacing)
            weeks = [template.replace("{weeks}", str(days // 7)) for days in GA_DAYS]
            prompts = [text.replace("{day}", str(days % 7)) for text, days in zip(weeks, GA_DAYS)]
            ages = embed_texts(model, tokenizer, prompts)  # (175, D)
            similarity[mine] += (images[mine.to(device)] @ ages.T).cpu() / len(templates)
    return similarity


# ---------------------------------------------------------------- what is measured of a model


def zero_shot_rows(rows, task, split):
    """The numbers of the rows that have a class of the task and are in the split."""
    return [i for i, r in enumerate(rows) if r[task] in PROMPTS[task] and not (split == "test" and r["train"])]


def probe(rows, label, features, score):
    """Mean and 95 % t-interval over linear probes on the rows that have a label (Table 5)."""
    mine = [i for i, row in enumerate(rows) if row[label]]
    labels, groups, train = ([rows[i][key] for i in mine] for key in (label, "patient", "train"))
    return t_interval(fit_and_score(features[mine], labels, groups, train, score))


F1 = lambda layer, x, y: macro_f1(layer.predict(x), y)
AUROC = lambda layer, x, y: metrics.roc_auc_score(y == layer.classes_[1], layer.decision_function(x))


def rehearse(planes, videos, args):
    """All that is measured on labels, with random features: what the rows do not allow is told before the long work."""
    for task in SCORES if planes else ():
        labels = [planes[i][task] for i in zero_shot_rows(planes, task, args.split)]
        with dark.user_error(
            f"--planes, --probe or --geometry: too few rows for {task} in the split {args.split!r}", errors=ValueError
        ):
            macro_f1(labels, labels)
            if args.geometry:
                geometry(torch.randn(len(labels), 2), labels)
            if args.probe:
                probe(planes, task, torch.randn(len(planes), 2), F1)
    if videos:
        with dark.user_error("--chd: too few rows", ValueError):
            probe(videos, "label", torch.randn(len(videos), 2), AUROC)


def measure(model, planes, heads, videos, prompts, args, teacher_logits=None):
    """All that was asked for, of one model -> the figures, and what the plots are drawn from."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result, drawings = {"params": sum(p.numel() for p in model.clip.parameters())}, {}
    if heads:
        spacing = [row["side_mm"] / (args.spacing_size or model.size) for row in heads]
        hc_mm = torch.tensor([row["hc_mm"] for row in heads])
        features = embed_images(model, [row["image"] for row in heads], args)
        score = validity(ga_similarity(model.clip, model.tokenizer, features, spacing, prompts["ga"]), hc_mm)
        n, rate, counted = score["n"], score["rate"], score["counted"]
        draws = np.random.default_rng(0).binomial(n, rate, 10_000) / n  # a bootstrap of 0s and 1s
        result |= {"hc18_validity": 100 * rate, "hc18_n": n, "hc18_valid": score["valid"]}
        result["hc18_interval"] = [float(100 * v) for v in np.percentile(draws, (2.5, 97.5))]
        result["hc18_spearman"] = float(stats.spearmanr(score["days"][counted], hc_mm[counted]).statistic)
        drawings["heads"] = (score, hc_mm)
    if planes:
        features = embed_images(model, [row["image"] for row in planes], args)
        for task, key in SCORES.items():
            classes, mine = list(PROMPTS[task]), zero_shot_rows(planes, task, args.split)
            embeddings = class_embeddings(model, {name: prompts[name] for name in classes}).cpu()  # (C, D)
            logits = features[mine] @ embeddings.T  # (n, C): rows images, columns classes
            predicted, actual = [classes[c] for c in logits.argmax(1)], [planes[i][task] for i in mine]
            result[key], drawings[key] = macro_f1(predicted, actual), (features[mine], logits, predicted, actual)
        result["f1_all"] = (5 * result["f1_5plane"] + 3 * result["f1_3brain"]) / 8
    if heads and planes:
        result["avg"] = (result["f1_all"] + result["hc18_validity"] / 100) / 2
    for task in SCORES if args.probe else ():
        result[f"probe_{task}"], result[f"probe_{task}_t95"] = probe(planes, task, features, F1)
    if videos:
        features = embed_images(model, [frame for row in videos for frame in row["frames"]], args)
        features = features.reshape(len(videos), -1)  # (videos, 16 D)
        result["chd_auroc"], result["chd_auroc_t95"] = probe(videos, "label", features, AUROC)
    if args.geometry:  # and how decided and how teacher-like the nine-class logits are
        result["geometry"] = {key: geometry(drawings[key][0], drawings[key][3]) for key in SCORES.values()}
        logits = drawings["f1_5plane"][1]
        log_p = (logits * model.clip.logit_scale.exp().item()).log_softmax(1)
        result["entropy"] = float(-(log_p.exp() * log_p).sum(1).mean())  # nats
        if teacher_logits is not None:
            rho = [stats.spearmanr(*pair).statistic for pair in zip(logits, teacher_logits)]
            result["teacher_rank_correlation"] = float(np.mean(rho))
    model.cpu()
    return result, drawings


# ---------------------------------------------------------------- plots


def draw_model(path, name, drawings):
    """One figure of a model: age against head, confusion matrices, t-SNE of the brain planes (Figures 2b and 3)."""
    panels = [*drawings, "t-SNE"] if len(drawings.get("f1_3brain", [()])[0]) > 5 else [*drawings]
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure = Figure(figsize=(6 * columns, 5 * rows), layout="constrained")
    figure.suptitle(name)
    for panel, axis in zip(panels, figure.subplots(rows, columns, squeeze=False).flat):
        if panel == "heads":
            score, hc_mm = drawings["heads"]
            low, high = (who_hc(GA_DAYS, curve) for curve in (WHO_HC_2_5, WHO_HC_97_5))
            axis.fill_between(GA_DAYS / 7, low, high, color="tab:green", alpha=0.2, label="WHO 2.5 to 97.5 %")
            for label, inside in (("valid", score["inside"]), ("not valid", ~score["inside"])):
                mask = inside & score["counted"]
                axis.scatter(score["days"][mask] / 7, hc_mm[mask], s=10, label=f"{int(mask.sum())} {label}")
            axis.set(xlabel="predicted gestational age (weeks)", ylabel="true head circumference (mm)", title="HC18")
            axis.legend()
        elif panel == "t-SNE":
            features, *_, actual = drawings["f1_3brain"]
            tsne = TSNE(perplexity=min(30, len(features) / 4), metric="cosine", init="random", random_state=0)
            points = tsne.fit_transform(features)
            for plane in sorted(set(actual)):
                axis.scatter(*points[np.array(actual) == plane].T, s=10, label=plane)
            axis.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", title="embeddings of the brain planes")
            axis.legend()
        else:
            _, _, predicted, actual = drawings[panel]
            style = dict(normalize="true", values_format=".2f", colorbar=False, cmap="Blues", xticks_rotation=90)
            metrics.ConfusionMatrixDisplay.from_predictions(actual, predicted, ax=axis, **style)
            axis.set_title(f"{panel}, share of each true class")
    save_figure(figure, path)


def draw_epochs(path, records):
    """The scores of several checkpoints of one run over its epochs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, records = figure.subplots(), sorted(records, key=lambda record: record["epoch"])
    for key, top in (("hc18_validity", 100), ("f1_5plane", 1), ("f1_3brain", 1), ("avg", 1)):
        if key in records[0]:
            scores = [record[key] / top for record in records]
            axis.plot([record["epoch"] for record in records], scores, marker="o", label=key)
    axis.set(xlabel="epoch", ylabel="score (0 to 1)", ylim=(0, 1))
    axis.legend()
    save_figure(figure, path)


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    dark.write_atomically(path, buffer.getvalue())
    print(f"wrote {path}")


# ---------------------------------------------------------------- report

COLUMNS = dict(
    params="Params", hc18_validity="HC18 %", f1_5plane="F1-5Plane", f1_3brain="F1-3Brain", f1_all="F1-all", avg="Avg"
)


def numbers(record, prefix=""):
    """The scores of a record; those of a record in it under a dotted name."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and key not in ("epoch", "seed"):
            found[prefix + key] = value
    return found


def seed_means(records, runs):
    """Mean and sd over the checkpoints that differ in the seed alone -> a record for each such group of them."""
    groups, means = {}, []
    for record, run in zip(records, runs):
        groups.setdefault((run, record.get("epoch")), {})[record.get("seed")] = record
    for (run, epoch), group in groups.items():
        if run and len(group) > 1:
            scores = [numbers(record) for record in group.values()]
            shared = [key for key in scores[0] if all(key in s for s in scores)]
            mean = {key: float(np.mean([s[key] for s in scores])) for key in shared}
            sd = {key: float(np.std([s[key] for s in scores], ddof=1)) for key in shared}
            ablation = next(iter(group.values()))["ablation"]
            name = f"mean of {len(group)} seeds ({', '.join(map(str, group))}) {ablation}".strip()
            about = {"name": name, "epoch": epoch, "seeds": list(group), "ablation": ablation}
            means.append({**about, "checkpoints": [r["name"] for r in group.values()], "mean": mean, "sd": sd})
    return means


def aligned(lines, left=1):
    """Rows of cells, all strings -> text in columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    pad = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(line)) for line in lines)


def cell(record, key):
    """A number of a record as text, with its sd if it is the mean over seeds; `-` where there is none."""
    value, sd = record.get("mean", record).get(key), record.get("sd", {}).get(key)
    if value is None:
        return "-"
    if key == "params":
        return f"{value / 1e6:.2f}M"
    form = {"hc18_validity": ".1f"}.get(key, ".3f" if key in COLUMNS else ".4g")
    return f"{value:{form}}" + ("" if sd is None else f" +- {sd:{form}}")


def report(records):
    """Prints Table 1's columns, then what else there is of each record."""
    lines = [[record["name"], *(cell(record, key) for key in COLUMNS)] for record in records]
    print(aligned([["Model", *COLUMNS.values()], *lines]))
    for record in records:
        flat = record if "mean" in record else numbers(record)
        others = [f"{key} {cell(flat, key)}" for key in flat.get("mean", flat) if key not in COLUMNS]
        if "hc18_interval" in record:
            others.append("95 % bootstrap interval of HC18 {:.1f} to {:.1f} %".format(*record["hc18_interval"]))
        print(f"{record['name']}: {', '.join(others)}")


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    args = Options(**dark.given(Options, argv, __doc__.splitlines()[0]))
    if args.split not in ("all", "test") or args.interpolation not in ("", "bicubic", "bilinear"):
        fail("--split is all or test, --interpolation bicubic or bilinear")
    if not (args.planes or args.hc18 or args.chd or args.write_pairs):
        args.planes, args.hc18 = str(dark.PHANTOM / "FETAL_PLANES_DB"), str(dark.PHANTOM / "HC18")
    if args.batch < 1 or args.context_length < 0 or args.spacing_size < 0 or args.workers < -1:
        fail("--batch must be at least 1, --context-length and --spacing-size at least 0, --workers at least -1")
    if not args.model and (args.weights or args.mean or args.std or args.interpolation):
        fail("--weights, --mean, --std and --interpolation belong to --model NAME; a checkpoint brings its own")
    if args.context_length and not args.model and not args.teacher:
        fail("--context-length belongs to --model NAME or --teacher NAME; a checkpoint brings its own")
    if (args.probe or args.geometry) and (args.hc18 or args.chd) and not args.planes:
        fail("--probe and --geometry need --planes DIR")
    if not args.checkpoints and not args.model:
        args.checkpoints = ("out/student.pt",)
    if args.workers < 0:
        args.workers = dark.WORKERS
    return args


def results_path(args):
    """Where the results will go. Whether that can be written is found before the work, not after it."""
    first = args.checkpoints[0] if args.checkpoints else args.weights
    path = Path(args.out or (Path(first).with_name("results.json") if Path(first).is_file() else "results.json"))
    with dark.user_error(f"--out {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        fail(f"--out {path}: is a folder; give a file")
    return path


def set_preprocessing(model, mean="", std="", interpolation=""):
    """Puts --mean, --std and --interpolation, where they are given, in place of what open_clip lists."""
    for name, text in (("mean", mean), ("std", std)):
        if text:
            with dark.user_error(f"--{name} {text}", ValueError):
                values = tuple(map(float, text.split(",")))
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                fail(f"--{name} {text}: needs three finite numbers, such as 0.485,0.456,0.406; for --std above 0")
            setattr(model, name, values)
    model.interpolation = interpolation or model.interpolation


def open_checkpoint(path):
    """-> the Model, what its checkpoint tells of the run, and all of the run but its seed."""
    checkpoint = dark.load_checkpoint(path)
    model, config = dark.model_from_checkpoint(checkpoint), checkpoint["config"]
    model.name = path
    run = {key: value for key, value in config.items() if key not in (*dark.RUN_FIELDS, "seed")}
    facts = {"epoch": checkpoint["epoch"], "seed": config["seed"], "ablation": config["ablation"]}
    return model, facts, json.dumps(run, sort_keys=True)


def open_models(args):
    """-> what `open_checkpoint` returns of each checkpoint and of --model, and the teacher or None."""
    models, teacher = [open_checkpoint(path) for path in args.checkpoints], None
    if args.model:
        model = dark.open_model(args.model, args.weights, args.context_length).eval()
        set_preprocessing(model, args.mean, args.std, args.interpolation)
        model.name = f"{args.model} {args.weights}".strip()
        models.append((model, {}, ""))
    if Path(args.teacher).is_file():
        teacher, *_ = open_checkpoint(args.teacher)
    elif args.teacher:
        teacher = dark.open_model(args.teacher, args.teacher_weights, args.context_length).eval()
    return models, teacher


@dark.script()
def main(argv=None):
    # Of few rows, and of one age predicted for all: what matters of it is said in a line of ours.
    warnings.filterwarnings("ignore", module="sklearn")
    warnings.simplefilter("ignore", stats.ConstantInputWarning)  # is blamed on the caller, so on no module of SciPy's
    args = parse_args(argv)
    planes = planes_table(args.planes) if args.planes else []
    heads = hc18_table(args.hc18) if args.hc18 else []
    videos = chd_table(args.chd) if args.chd else []
    if args.write_pairs:
        return write_pairs(args.write_pairs, planes, heads, args.spacing_size or 256)
    rehearse(planes, videos, args)
    if not args.probe:
        planes = [row for row in planes if row["planes"] in PROMPTS["planes"]]
    path = results_path(args)
    needed = [*PLANE_WORDS, *BRAIN_WORDS] if planes and args.prompts else []
    prompts = {
        **PROMPTS["planes"],
        **PROMPTS["brain"],
        "ga": PROMPTS["ga"],
        **read_prompts(*args.prompts, needed=needed),
    }
    models, teacher = open_models(args)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    of_teacher, drawings = measure(teacher, planes, [], videos, prompts, args) if teacher else ({}, {})
    teacher_logits = drawings["f1_5plane"][1] if planes and teacher else None
    records, figures = [], []
    for model, facts, _ in models:
        with dark.user_error(model.name, FloatingPointError):
            result, drawings = measure(model, planes, heads, videos, prompts, args, teacher_logits)
        for key in ("probe_planes", "probe_brain", "chd_auroc"):
            if key in result and of_teacher.get(key):
                result[f"{key}_retention_percent"] = 100 * result[key] / of_teacher[key]
        records.append({"name": model.name, **facts, **result, "split": args.split})
        figures.append(drawings if args.plots else {})
    records = json.loads(json.dumps(records), parse_constant=lambda nan: None)  # JSON has no NaN: undefined is null
    runs = [run for *_, run in models]
    records += seed_means(records, runs)
    report(records)
    dark.write_atomically(path, (json.dumps(records, indent=2, allow_nan=False) + "\n").encode())
    print(f"wrote {path}")
    for record, drawings in zip(records, figures):  # last: a plot that fails loses nothing
        if drawings:
            picture = re.sub(r"[^\w.]+", "-", record["name"].removesuffix(".pt")).strip("-.")
            draw_model(path.with_name(f"{picture}.png"), record["name"], drawings)
    epochs = {record.get("epoch") for record in records}
    if args.plots and len(epochs) > 1 == len({(run, record.get("seed")) for run, record in zip(runs, records)}):
        draw_epochs(path.with_name("epochs.png"), records)


if __name__ == "__main__":
    main()
