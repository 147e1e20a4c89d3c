"""Measure a CLIP as the paper does (Tables 1, 4 and 5): planes, head sizes, linear probes, geometry.

    python evaluate.py                                                  # out/student.pt on the phantom
    python evaluate.py runs/*/student.pt --planes FETAL_PLANES_DB --hc18 HC18       # mean and sd over seeds
    python evaluate.py --model ViT-L-14 --weights FetalCLIP_weights.pt --context-length 117 --planes ...
    python evaluate.py mine/student.pt --table test.csv --labels labels.json    # your own images and classes

Prints Table 1 and writes results.json beside the checkpoint. A task without data is absent, never zero.
"""

import io
import json
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from sklearn import linear_model, metrics, model_selection
from tqdm import tqdm

import dark
from dark import fail

# Bars disappear when they are done, and are shown on a terminal only.
progress = partial(tqdm, leave=False, disable=None)


@dataclass
class Options:
    """The command line: `python evaluate.py --help` is made from these comments."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()  # written by dark.py; without any: out/student.pt
    planes: str = ""  # folder of FETAL_PLANES_DB in its published layout
    hc18: str = ""  # folder of HC18 in its published layout
    split: Literal["all", "test"] = "all"  # rows of --planes to score: all, or only those with `Train ` = 0
    table: str = ""  # your own images: a table with the columns `image` (relative to the table) and `label`
    labels: str = ""  # classes of --table: planes, brain, or a JSON file class -> [prompts], as for export.py
    # JSON files class -> [prompts], merged, in place of our prompts; without `ga`, our age templates stay
    prompts: tuple[str, ...] = ()
    model: str = ""  # any open_clip model, hf-hub:... too
    weights: str = ""  # PATH or open_clip TAG for --model
    context_length: int = 0  # tokens, for --model and for a --teacher given by name; 0: the model's own
    mean: str = ""  # R,G,B for --model; empty: what open_clip lists
    std: str = ""  # R,G,B for --model; empty: what open_clip lists
    interpolation: Literal["", "bicubic", "bilinear"] = ""  # for --model; empty: what open_clip lists
    # checkpoint or open_clip model to compare with: retention with --probe and --chd, ranks with --geometry
    teacher: str = ""
    teacher_weights: str = ""  # PATH or open_clip TAG for a --teacher given by name
    spacing_size: int = 0  # pixels: age prompts state mm per pixel at this size; 0: the model's input size
    probe: bool = False  # linear probes on --planes (Table 5)
    chd: str = ""  # folder with labels.csv and a folder of frames for each video: linear probes on videos
    geometry: bool = False  # shape of the embeddings and of the logits on --planes (Table 4)
    plots: bool = False  # draw a figure for each model, beside the results
    out: str = ""  # file for the results; empty: results.json beside the first checkpoint
    batch: int = 64  # images at a time
    workers: int = dark.WORKERS  # threads that read images


# ---------------------------------------------------------------- prompts

PHRASINGS = (
    "Ultrasound of the {}.",
    "Prenatal ultrasound image showing the {}.",
    "{} on ultrasound.",
    "An ultrasound image of the {}.",
    "Obstetric ultrasound, {}.",
)
AGE_PHRASES = [
    "Ultrasound of the fetal brain, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
    "An ultrasound image of the fetal brain at {weeks} weeks and {day} days "
    "with a pixel spacing of {pixel_spacing} mm.",
    "Fetal brain on ultrasound, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
    "Ultrasound of the fetal brain at {weeks} weeks and {day} days "
    "with a pixel spacing of {pixel_spacing} mm.",
    "{weeks} weeks and {day} days, {pixel_spacing} mm per pixel: fetal brain on ultrasound.",
]
PLANE_WORDS = {
    "abdomen": "fetal abdomen",
    "brain": "fetal brain",
    "femur": "fetal femur",
    "heart": "fetal heart",
    "kidney": "fetal kidney",
    "spine": "fetal spine",
    "cervix": "maternal cervix",
    "lips_nose": "fetal lips and nose",
    "profile_patient": "fetal facial profile",
}
BRAIN_WORDS = {
    "trans-thalamic": "fetal brain, trans-thalamic plane",
    "trans-cerebellum": "fetal brain, trans-cerebellum plane",
    "trans-ventricular": "fetal brain, trans-ventricular plane",
}
phrased = lambda words: {name: [text.format(view) for text in PHRASINGS] for name, view in words.items()}
PROMPTS = {"planes": phrased(PLANE_WORDS), "brain": phrased(BRAIN_WORDS), "ga": AGE_PHRASES}


def read_prompts(*paths):
    """Merges JSON files of objects class -> [prompts], as FetalCLIP publishes them. The class `ga` holds age
    templates. Ends the program where a file is something else."""
    prompts = {}
    for path in paths:
        with dark.user_error(f"{path}: needs a JSON object class -> [prompts]"):
            classes = dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        for name, texts in classes.items():
            if not isinstance(texts, list) or {*map(type, texts)} != {str}:
                fail(f"{path}: the class {name!r} needs a list of prompts, at least one")
        for text in classes.get("ga", []):
            if not all(part in text for part in ("{weeks}", "{day}", "{pixel_spacing}")):
                fail(f"{path}: the `ga` template {text!r} lacks {{weeks}}, {{day}} or {{pixel_spacing}}")
        prompts |= classes
    return prompts


def read_labels(labels):
    """--labels -> class -> [prompts]: ours of `planes` or `brain`, or a file's without its age templates."""
    if labels in SCORES:
        return PROMPTS[labels]
    classes = read_prompts(labels)
    classes.pop("ga", None)
    return classes


# ---------------------------------------------------------------- head sizes and data sets

GA_DAYS = np.arange(14 * 7, 38 * 7 + 6 + 1)  # 14w0d to 38w6d
# The WHO growth chart: ln(head circumference in mm), a cubic of the age in weeks, at three percentiles.
WHO_HC_2_5 = (1.59317517131532, 0.29459800552433, -0.0073860372566707, 0.0000656951770216148)
WHO_HC_50 = (2.09924879247164, 0.253373656106037, -0.00605647816678282, 0.0000514256072059917)
WHO_HC_97_5 = (2.50074069629423, 0.220067854715719, -0.00493623111462443, 0.0000389066000946519)
# Ages in days -> mm.
who_hc = lambda days, curve=WHO_HC_50: np.exp(np.polyval(curve[::-1], np.asarray(days) / 7))

# Task, which is a column of the rows with a class -> the figure that scores it.
SCORES = {"planes": "f1_5plane", "brain": "f1_3brain"}
PLANES = {  # FETAL_PLANES_DB's `Plane` -> class
    "Fetal abdomen": "abdomen",
    "Fetal brain": "brain",
    "Fetal femur": "femur",
    "Fetal thorax": "heart",
    "Maternal cervix": "cervix",
    "Other": "other",
}


def planes_table(folder, split):
    """FETAL_PLANES_DB -> rows with image, patient, train, scored; `planes` and `brain`, a class or ""."""
    path = f"{folder}/FETAL_PLANES_DB_data.csv"
    columns = ("Image_name", "Patient_num", "Plane", "Brain_plane", "Train")
    rows = []
    for name, patient, plane, brain_plane, train in dark.read_table(path, columns):
        if plane not in PLANES:
            fail(f"{path}: {name} has the Plane {plane!r}; known are {', '.join(PLANES)}")
        brain = brain_plane.lower()
        rows.append(
            {
                "image": Path(f"{folder}/Images/{name}.png"),
                "patient": patient,
                "train": train == "1",
                "scored": split == "all" or train != "1",
                "planes": PLANES[plane],
                "brain": brain if brain in BRAIN_WORDS else "",
            }
        )
    return rows


def hc18_table(folder):
    """HC18's training set -> rows with image, pixel_mm and hc_mm."""
    path = f"{folder}/training_set_pixel_size_and_HC.csv"
    rows = []
    for name, *sizes in dark.read_table(path, ("filename", "pixel size(mm)", "head circumference (mm)")):
        with dark.user_error(f"{path}: {name}", ValueError):
            pixel_mm, hc_mm = map(float, sizes)
        if not (0 < pixel_mm < np.inf and 0 < hc_mm < np.inf):
            fail(f"{path}: {name}: {pixel_mm} mm per pixel and {hc_mm} mm must be finite and above 0")
        rows.append({"image": Path(f"{folder}/training_set/{name}"), "pixel_mm": pixel_mm, "hc_mm": hc_mm})
    if not any(100 <= row["hc_mm"] <= 342 for row in rows):
        fail(f"{path}: none of its {len(rows)} rows has a head circumference within 100 to 342 mm")
    return rows


def chd_table(folder):
    """labels.csv and a folder of frames per video -> rows with label, patient, train and 16 of the frames."""
    path = f"{folder}/labels.csv"
    by_number = lambda frame: (len(frame.name), frame.name)  # frame9 comes before frame10
    rows = []
    for video, label, patient, train in dark.read_table(path, ("video", "label", "patient", "train")):
        frames = sorted(Path(folder, video).glob("[!.]*"), key=by_number)
        if not frames:
            fail(f"{path}: {video} has no frames")
        frames = [frames[round(position)] for position in np.linspace(0, len(frames) - 1, 16)]
        rows.append({"frames": frames, "label": label, "patient": patient, "train": train == "1"})
    if len({row["label"] for row in rows}) != 2:
        fail(f"{path}: AUROC needs two labels")
    check_probe(rows, "label")
    return rows


def labelled_table(path, labels):
    """A table of your own -> rows with image and label. A label without prompts ends the program."""
    rows = []
    for image, label in dark.read_table(path, ("image", "label")):
        if label not in labels:
            fail(f"{path}: {image} has the label {label!r}; --labels has prompts for {', '.join(labels)}")
        rows.append({"image": Path(path).parent / image, "label": label})
    return rows


def check_images(rows):
    """Ends the program where images are missing: a user wants to know before the long work, not within it."""
    missing = [row["image"] for row in rows if not row["image"].is_file()]
    if missing:
        fail(f"{len(missing)} of {len(rows)} images are not there, the first is {missing[0]}")


def scored_rows(rows, task):
    """The rows that count for `planes` or `brain`: their indices and their classes."""
    scored = [i for i, row in enumerate(rows) if row["scored"] and row[task] in PROMPTS[task]]
    return scored, [rows[i][task] for i in scored]


def check_planes(rows, args):
    """Ends the program where the rows do not allow what `measure_planes` is to measure."""
    for task in SCORES:
        _, labels = scored_rows(rows, task)
        # Geometry compares images of one class with each other, and with those of other classes.
        if not labels or (args.geometry and not 1 < len(set(labels)) < len(labels)):
            fail(f"--planes {args.planes}: the split {args.split!r} has too few rows of {task}: {labels[:9]}")
        if args.probe:
            check_probe(rows, task)


def check_probe(rows, label):
    """Ends the program where the rows do not allow `probe`: every fold needs patients of two classes."""
    labels, patients, train, test = probe_rows(rows, label)
    large = [name for name in set(labels[train]) if len(set(patients[train & (labels == name)])) >= 5]
    if len(large) < 2 or len(set(labels[test])) < 2:
        fail(f"a probe of {label} needs two classes of 5 patients with train = 1, and two with train = 0")


def probe_rows(rows, label):
    """n rows -> labels and patients (n,); the masks (n,) of the training and test rows that have a label."""
    labels = np.array([row[label] for row in rows])
    patients = np.array([row["patient"] for row in rows])
    train = np.array([row["train"] for row in rows])
    labelled = labels != ""
    return labels, patients, labelled & train, labelled & ~train


def read_tasks(args):
    """Reads and checks all tables and prompts, so that a mistake is told before the long work.
    -> for each task that was asked for: the function that measures it, its rows, its prompts"""
    tasks = []
    given = read_prompts(*args.prompts)
    if args.hc18:
        heads = hc18_table(args.hc18)
        check_images(heads)
        tasks.append((measure_heads, heads, given.get("ga", AGE_PHRASES)))
    if args.planes:
        planes = planes_table(args.planes, args.split)
        check_images(planes)
        check_planes(planes, args)
        missing = {*PLANE_WORDS, *BRAIN_WORDS} - {*given}
        if args.prompts and missing:
            fail(f"--prompts: no class {', '.join(sorted(missing))}")
        if not args.probe:
            planes = [row for row in planes if row["scored"] and row["planes"] in PLANE_WORDS]
        tasks.append((measure_planes, planes, PROMPTS["planes"] | PROMPTS["brain"] | given))
    if args.table:
        labels = read_labels(args.labels)
        table = labelled_table(args.table, labels)
        check_images(table)
        tasks.append((measure_table, table, labels))
    if args.chd:
        tasks.append((measure_videos, chd_table(args.chd), {}))
    return tasks


# ---------------------------------------------------------------- metrics


def macro_f1(predicted, actual):
    """Mean over the labels that occur in `actual` of F1 = 2 TP / (2 TP + FP + FN).
    predicted, actual: equally long sequences of labels, strings or ints. Raises ValueError otherwise."""
    labels = np.unique(actual)
    return float(metrics.f1_score(actual, predicted, labels=labels, average="macro", zero_division=0))


def validity(similarity, hc_mm):
    """HC18 validity: is the true head within the WHO 2.5th to 97.5th percentile of the predicted age?

    similarity (n, 175): image to age 14w0d ... 38w6d, a column a day. hc_mm (n,): true head circumference,
    counted from 100 to 342 mm. Raises ValueError where the shapes do not fit.
    Returns valid and n (of those counted), rate (valid / n, NaN if none counts), the masks counted and inside
    (n,), and days (n,) of all: the predicted age, 98 to 272, which is the median of the 15 most similar days.
    """
    similarity = torch.as_tensor(similarity).cpu()
    hc_mm = torch.as_tensor(hc_mm, dtype=torch.float64)
    if similarity.shape != (len(hc_mm), len(GA_DAYS)):
        raise ValueError(f"validity: {tuple(similarity.shape)} is not ({len(hc_mm)}, {len(GA_DAYS)})")
    top = similarity.argsort(dim=1, descending=True, stable=True)[:, :15]  # (n, 15), ties to the younger age
    days = top.median(dim=1).values + int(GA_DAYS[0])
    low = torch.from_numpy(who_hc(days, WHO_HC_2_5))
    high = torch.from_numpy(who_hc(days, WHO_HC_97_5))
    counted = (hc_mm >= 100) & (hc_mm <= 342)
    inside = (low <= hc_mm) & (hc_mm <= high)
    valid = int((counted & inside).sum())
    n = int(counted.sum())
    rate = valid / n if n else np.nan
    return {"valid": valid, "n": n, "rate": rate, "days": days, "counted": counted, "inside": inside}


def geometry(features, labels):
    """Table 4 of unit-norm features (n, D) with n labels: shape of the cloud, and how classes lie in it."""
    features = features.double()
    labels = np.asarray(labels)
    # The spectrum of the covariance, times n - 1; the effective dimension is its participation ratio.
    variance = torch.linalg.svdvals(features - features.mean(0)).square()
    cosine = features @ features.T  # (n, n)
    same_class = torch.from_numpy(labels[:, None] == labels)  # (n, n)
    others = ~torch.eye(len(labels), dtype=torch.bool)
    return {
        "effective_dimension": float(variance.sum().square() / variance.square().sum()),
        "rank95": int((variance.cumsum(0) / variance.sum() < 0.95).sum()) + 1,
        "silhouette": metrics.silhouette_score(features.numpy(), labels, metric="cosine"),
        "intra_cosine": float(cosine[same_class & others].mean()),
        "inter_cosine": float(cosine[~same_class].mean()),
        # The mean of exp(-2 d^2), where the squared distance d^2 is 2 - 2 cosine.
        "uniformity": float((4 * cosine[others] - 4).exp().mean().log()),
    }


def t_interval(values):
    """Mean and half width of the 95 % Student-t interval."""
    _, standard_half = stats.t.interval(0.95, len(values) - 1)
    return np.mean(values), standard_half * stats.sem(values)


def probe(rows, label, features, score=None):
    """Linear probes of features (n, D), on the rows that have a label (Table 5).

    For each of 5 seeds and 5 folds of the training rows' patients a probe is fitted on the other four folds,
    its regularisation chosen on the fold, and scored on the test rows: by F1, or by score(layer, x, y).
    -> mean and half width of the 95 % interval
    """
    f1 = lambda layer, x, y: macro_f1(layer.predict(x), y)
    labels, patients, train, test = probe_rows(rows, label)
    x = features[train]
    y = labels[train]
    scores = []
    unfinished = 0
    for seed in progress(range(5), "probe"):
        splitter = model_selection.StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fit, fold in splitter.split(x, y, patients[train]):
            layers = [
                linear_model.LogisticRegression(C=c, max_iter=1000).fit(x[fit], y[fit]) for c in (1, 10, 100)
            ]
            best = max(layers, key=lambda layer: f1(layer, x[fold], y[fold]))
            scores.append((score or f1)(best, features[test], labels[test]))
            unfinished += sum(layer.n_iter_.max() >= 1000 for layer in layers)
    if unfinished:
        tqdm.write(f"{unfinished} of 75 linear probes of {label} had not converged after 1,000 iterations")
    return t_interval(scores)


# ---------------------------------------------------------------- embeddings


def unit(embeddings):
    """Unit-norm fp32, for bf16 would move half of the ages. What is not finite ends the program: it would be
    scored like anything else."""
    if not embeddings.isfinite().all():
        fail("an embedding is not finite: these weights are unusable")
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


@torch.no_grad()
def embed_images(model, images, args):
    """n paths -> (n, D) unit-norm features on the CPU. args: `batch` images at a time, `workers` threads."""
    read = lambda path: np.array(dark.square(Image.open(path), model.size, model.interpolation))  # (S, S, 3)
    features = []
    with ThreadPoolExecutor(max(1, args.workers)) as pool:  # decoding and resizing release Python's lock
        for start in progress(range(0, len(images), args.batch), "images"):
            paths = images[start : start + args.batch]
            decoded = pool.map(read, paths)
            batch = []
            for path in paths:
                with dark.user_error(f"{path}: does not decode"):
                    batch.append(next(decoded))
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 255  # (n, 3, S, S)
            pixels = model.normalize(pixels.to(model.clip.logit_scale.device))
            features.append(unit(model.clip.encode_image(pixels)).cpu())
    return torch.cat(features)


@torch.no_grad()
def embed_texts(clip, tokenizer, texts):
    """n strings -> (n, D) unit-norm features on the model's device. A text that would be cut is refused."""
    tokens, cut = dark.tokenize(tokenizer, texts)
    for text, is_cut in zip(texts, cut):
        if is_cut:
            fail(f"the prompt {text!r} is longer than the context of {tokenizer.context_length} tokens")
    return unit(clip.encode_text(tokens.to(clip.logit_scale.device)))


def class_embeddings(model, prompts):
    """class -> [prompts] to (C, D): each prompt embedded, normalised, averaged per class, normalised."""
    encode = lambda texts: embed_texts(model.clip, model.tokenizer, texts).mean(0)
    return unit(torch.stack(list(map(encode, prompts.values()))))


class Answers(NamedTuple):
    """Zero-shot classification of n images into C classes."""

    actual: list  # n labels
    predicted: list  # n labels
    similarity: torch.Tensor  # (n, C): rows images, columns classes


def zero_shot(model, features, actual, prompts):
    """Features (n, D) of images with n known labels, class -> [prompts] -> Answers."""
    classes = list(prompts)
    similarity = features @ class_embeddings(model, prompts).cpu().T
    predicted = [classes[column] for column in similarity.argmax(1)]
    return Answers(actual, predicted, similarity)


@torch.no_grad()
def ga_similarity(model, tokenizer, images, pixel_mm, templates):
    """Similarity of images to every age from 14w0d to 38w6d, averaged over templates -> (n, 175), fp32, CPU.

    model, tokenizer   an open_clip model in eval mode, and its own tokenizer
    images             (n, 3, S, S), padded, resized and normalised for it, or their embeddings (n, D)
    pixel_mm           (n,): mm per pixel of those S x S images, stated to two decimals: few values differ, so
                       each prompt is encoded once and not once an image
    templates          strings with {weeks}, {day} and {pixel_spacing}
    """
    if images.ndim == 4:
        parts = images.to(model.logit_scale.device).split(64)
        images = torch.cat([model.encode_image(part) for part in parts])
    images = unit(images).cpu()  # (n, D)
    stated = np.array([f"{float(mm):.2f}" for mm in pixel_mm])
    similarity = torch.zeros(len(images), len(GA_DAYS))  # rows images, columns days
    for spacing in progress(np.unique(stated), "age prompts"):
        chosen = torch.from_numpy(stated == spacing)
        for template in templates:
            text = template.replace("{pixel_spacing}", spacing)
            texts = [text.replace("{weeks}", str(day // 7)).replace("{day}", str(day % 7)) for day in GA_DAYS]
            ages = embed_texts(model, tokenizer, texts).cpu()  # (175, D)
            similarity[chosen] += images[chosen] @ ages.T / len(templates)
    return similarity


# ---------------------------------------------------------------- tasks


def measure_heads(model, features, rows, templates, args):
    """HC18 -> figures; `heads` -> predicted weeks and true mm of the heads that count."""
    hc_mm = torch.tensor([row["hc_mm"] for row in rows])
    size = args.spacing_size or model.size
    # Mm per pixel once an image is padded to a square, whose side is the longer one, and resized to `size`.
    pixel_mm = [row["pixel_mm"] * max(Image.open(row["image"]).size) / size for row in rows]
    result = validity(ga_similarity(model.clip, model.tokenizer, features, pixel_mm, templates), hc_mm)
    days = result["days"][result["counted"]]
    hc_mm = hc_mm[result["counted"]]
    low, high = stats.binomtest(result["valid"], result["n"]).proportion_ci(method="wilson")
    figures = {
        "hc18_validity": 100 * result["rate"],
        "hc18_n": result["n"],
        "hc18_valid": result["valid"],
        "hc18_interval": [100 * low, 100 * high],
        "hc18_spearman": stats.spearmanr(days, hc_mm).statistic,
    }
    return figures, {"heads": (days / 7, hc_mm)}


def measure_planes(model, features, rows, prompts, args):
    """FETAL_PLANES_DB -> figures; `planes` and `brain` -> Answers."""
    figures = {}
    answers = {}
    shapes = {}
    for task, key in SCORES.items():
        scored, actual = scored_rows(rows, task)
        classes = {name: prompts[name] for name in PROMPTS[task]}
        answers[task] = zero_shot(model, features[scored], actual, classes)
        figures[key] = macro_f1(answers[task].predicted, actual)
        if args.probe:
            figures[f"probe_{task}"], figures[f"probe_{task}_t95"] = probe(rows, task, features.numpy())
        if args.geometry:
            shapes[key] = geometry(features[scored], actual)
    figures["f1_all"] = (5 * figures["f1_5plane"] + 3 * figures["f1_3brain"]) / 8
    if args.geometry:
        # How decided the model is between the nine planes.
        scale = model.clip.logit_scale.exp().item()
        log_p = (answers["planes"].similarity * scale).log_softmax(1)  # (n, 9)
        figures["entropy"] = float(-(log_p.exp() * log_p).sum(1).mean())  # nats
        figures["geometry"] = shapes
    return figures, answers


def measure_table(model, features, rows, labels, args):
    """A table of your own -> figures; `table` -> Answers."""
    answers = zero_shot(model, features, [row["label"] for row in rows], labels)
    figures = {
        "table_f1": macro_f1(answers.predicted, answers.actual),
        "table_accuracy": metrics.accuracy_score(answers.actual, answers.predicted),
        "table_n": len(rows),
    }
    return figures, {"table": answers}


def measure_videos(model, features, rows, prompts, args):
    """Videos -> figures: AUROC of linear probes on the embeddings of a video's 16 frames side by side."""
    features = features.reshape(len(rows), -1).numpy()  # (videos, 16 D)
    mean, half_width = probe(rows, "label", features, metrics.get_scorer("roc_auc"))
    return {"chd_auroc": mean, "chd_auroc_t95": half_width}, {}


def measure(model, tasks, args):
    """All tasks of `read_tasks` -> figures for results.json; answers, what was predicted in each task."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    figures = {"params": sum(parameter.numel() for parameter in model.clip.parameters())}
    answers = {}
    for measure_task, rows, prompts in tasks:
        images = []
        for row in rows:
            images += row["frames"] if "frames" in row else [row["image"]]
        features = embed_images(model, images, args)  # (n, D), n rows or all their frames
        task_figures, task_answers = measure_task(model, features, rows, prompts, args)
        figures |= task_figures
        answers |= task_answers
    if "hc18_validity" in figures and "f1_all" in figures:
        figures["avg"] = (figures["f1_all"] + figures["hc18_validity"] / 100) / 2
    model.cpu()
    return figures, answers


def compare(figures, answers, teacher_figures, teacher_answers):
    """Adds to a student's figures the retention of its teacher's scores and the rank correlation."""
    for key in ("probe_planes", "probe_brain", "chd_auroc"):
        if teacher_figures.get(key):
            figures[f"{key}_retention_percent"] = 100 * figures[key] / teacher_figures[key]
    if "geometry" in figures:
        pairs = zip(answers["planes"].similarity, teacher_answers["planes"].similarity)
        figures["teacher_rank_correlation"] = np.mean([stats.spearmanr(*pair).statistic for pair in pairs])


# ---------------------------------------------------------------- report


def draw_model(path, answers):
    """One figure for a model: ages and heads, with the band in which an age is valid; confusion matrices."""
    figure = Figure(figsize=(6 * len(answers), 5), layout="constrained")
    axes = figure.subplots(1, len(answers), squeeze=False)[0]
    for axis, (task, (x, y, *_)) in zip(axes, answers.items()):
        if task == "heads":  # x: weeks, y: mm; elsewhere x are the actual labels and y the predicted ones
            low = who_hc(GA_DAYS, WHO_HC_2_5)
            high = who_hc(GA_DAYS, WHO_HC_97_5)
            axis.fill_between(GA_DAYS / 7, low, high, alpha=0.2)
            axis.scatter(x, y, s=10)
            axis.set(xlabel="predicted gestational age (weeks)", ylabel="true head circumference (mm)")
        else:
            metrics.ConfusionMatrixDisplay.from_predictions(
                x, y, ax=axis, normalize="true", xticks_rotation=90
            )
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    dark.write_atomically(path, image.getvalue())


COLUMNS = {
    "params": "Params",
    "hc18_validity": "HC18 %",
    "f1_5plane": "F1-5Plane",
    "f1_3brain": "F1-3Brain",
    "f1_all": "F1-all",
    "avg": "Avg",
    "table_f1": "Table F1",
    "table_accuracy": "Accuracy",
}
FORMATS = {"params": ",.0f", "hc18_validity": ".1f"}  # all others: .3f


def seed_means(records, runs):
    """A record with mean and sd for each group of checkpoints with equal `runs`, which differ in the seed.

    Of checkpoints with one seed the last counts; `checkpoints` names those that did.
    """
    groups = {}
    for record, run in zip(records, runs):
        if run:
            groups.setdefault(run, {})[record["seed"]] = record
    means = []
    for by_seed in groups.values():
        if len(by_seed) < 2:
            continue
        group = list(by_seed.values())
        mean = {}
        sd = {}
        for key, value in group[0].items():
            if isinstance(value, int | float) and key not in ("epoch", "seed"):
                values = [record[key] for record in group]
                mean[key] = np.mean(values)
                sd[key] = np.std(values, ddof=1)
        means.append(
            {
                "name": f"mean of seeds {list(by_seed)}",
                "epoch": group[0]["epoch"],
                "ablation": group[0]["ablation"],
                "seeds": list(by_seed),
                "checkpoints": [record["name"] for record in group],
                "mean": mean,
                "sd": sd,
            }
        )
    return means


def aligned(lines, left=1):
    """Rows of cells, all strings -> text in columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = "<" * left + ">" * len(widths)
    rows = []
    for line in lines:
        rows.append("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)))
    return "\n".join(rows)


def report(records):
    """Prints a table, with the sd beside a mean over seeds, then everything in each record, rounded."""
    columns = [key for key in COLUMNS if key in records[0]]  # all models are measured on the same tasks
    lines = [["Model", *(COLUMNS[key] for key in columns)]]
    for record in records:
        cells = [record["name"]]
        for key in columns:
            form = FORMATS.get(key, ".3f")
            text = format(record.get("mean", record)[key], form)
            if "sd" in record and key != "params":
                text += f" +- {record['sd'][key]:{form}}"
            cells.append(text)
        lines.append(cells)
    print(aligned(lines))
    for record in json.loads(json.dumps(records), parse_float=lambda number: round(float(number), 4)):
        print(json.dumps(record))


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    args = dark.parse_flags(Options, argv, __doc__)
    if args.batch < 1 or args.context_length < 0 or args.spacing_size < 0:
        fail("--batch must be at least 1, --context-length and --spacing-size at least 0")
    of_model = args.weights or args.mean or args.std or args.interpolation
    if not args.model and (of_model or (args.context_length and not args.teacher)):
        fail("--weights, --context-length, --mean, --std and --interpolation belong to --model NAME")
    if bool(args.table) != bool(args.labels):
        fail("--table TABLE.csv and --labels (planes, brain or FILE.json) go together")
    if not (args.planes or args.hc18 or args.chd or args.table):
        if not dark.PHANTOM.exists():
            fail(f"no --planes or --hc18, and no {dark.PHANTOM}: `python assets/phantom.py phantom` draws it")
        args.planes = f"{dark.PHANTOM}/FETAL_PLANES_DB"
        args.hc18 = f"{dark.PHANTOM}/HC18"
    if (args.probe or args.geometry) and not args.planes:
        fail("--probe and --geometry need --planes DIR")
    if not args.checkpoints and not args.model:
        args.checkpoints = ("out/student.pt",)
    if not args.out:
        first = args.checkpoints[0] if args.checkpoints else args.weights
        args.out = f"{Path(first).parent}/results.json"
    return args


def open_subject(name, weights="", context_length=0):
    """A checkpoint or an open_clip name -> Model; facts of its run; what runs of other seeds share."""
    if not name.endswith(".pt") and not Path(name).is_file():
        return dark.open_model(name, weights, context_length).eval(), {}, ""
    content = dark.load_checkpoint(name)
    config = content["config"]
    facts = {"epoch": content["epoch"], "seed": config["seed"], "ablation": config["ablation"]}
    shared = {**config, **dict.fromkeys([*dark.RUN_FIELDS, "seed"]), "epoch": content["epoch"]}
    return dark.model_from_checkpoint(content), facts, json.dumps(shared, sort_keys=True)


@dark.script()
def main(argv=None):
    args = parse_args(argv)
    # What these warn of is known: few rows of a class and one age for all heads show in the figures, `probe`
    # itself tells what did not converge, and metadata that Pillow cannot read does no harm.
    known = "The least populated class|The number of unique classes|An input array is const|lbfgs failed"
    warnings.filterwarnings("ignore", known)
    warnings.filterwarnings("ignore", module="PIL")
    tasks = read_tasks(args)
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        fail(f"--out {out}: must be a file in a folder that exists, by default in the first checkpoint's")
    with dark.user_error(f"--out {out}: cannot be written", OSError):
        tempfile.TemporaryFile(dir=out.parent).close()

    subjects = [(path, *open_subject(path)) for path in args.checkpoints]
    if args.model:
        model = dark.open_model(
            args.model, args.weights, args.context_length, args.mean, args.std, args.interpolation
        )
        subjects.append((f"{args.model} {args.weights}".strip(), model.eval(), {}, ""))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if args.teacher:
        teacher, *_ = open_subject(args.teacher, args.teacher_weights, args.context_length)
        compared = [task for task in tasks if task[0] in (measure_planes, measure_videos)]
        of_teacher = measure(teacher, compared, args)

    records = []
    for name, model, facts, _ in subjects:
        figures, answers = measure(model, tasks, args)
        if args.teacher:
            compare(figures, answers, *of_teacher)
        records.append({"name": name, **facts, **figures, "split": args.split})
        results = records + seed_means(records, [run for *_, run in subjects])
        # JSON has no NaN: what is undefined becomes null.
        results = json.loads(json.dumps(results), parse_constant=lambda nan: None)
        dark.write_atomically(out, (json.dumps(results, indent=2) + "\n").encode())
        if args.plots and answers:
            figure_name = name.removesuffix(".pt").strip("./").replace("/", "-")
            draw_model(out.with_name(f"{figure_name}.png"), answers)
    report(results)  # at the end, for whoever reads it may close the pipe
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
