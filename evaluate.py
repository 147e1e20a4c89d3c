"""Measure a CLIP as the paper does: zero-shot plane F1, HC18 validity, linear probe, geometry (Tables 1, 4 and 5).

    python evaluate.py                                  # out/student.pt on phantom/FETAL_PLANES_DB and phantom/HC18
    python evaluate.py runs/*/student.pt --planes FETAL_PLANES_DB --hc18 HC18    # with mean and sd over the seeds
    python evaluate.py --model ViT-L-14 --weights FetalCLIP_weights.pt --context-length 117 --planes ... --hc18 ...
    python evaluate.py --planes FETAL_PLANES_DB --hc18 HC18 --write-pairs pairs.csv    # for dark.py --data pairs.csv

Writes results.json beside the checkpoint and prints Table 1's columns. A task without data is absent, never zero.
"""

import csv
import json
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from sklearn import linear_model, metrics, model_selection
from tqdm import tqdm

import dark
from dark import fail


@dataclass
class Options:  # `python evaluate.py --help` is made from these lines
    checkpoints: tuple[str, ...] = field(default=(), metadata={"positional": "*"})  # of dark.py; none: out/student.pt
    planes: str = ""  # folder of FETAL_PLANES_DB in its published layout
    hc18: str = ""  # folder of HC18 in its published layout
    split: Literal["all", "test"] = "all"  # rows of --planes: all, or `Train ` = 0 only
    prompts: tuple[str, ...] = ()  # JSON files of class -> [prompts], merged; without `ga` in them ours remain
    model: str = ""  # any open_clip model, hf-hub:... too
    weights: str = ""  # PATH or open_clip TAG, of --model
    context_length: int = 0  # tokens, of --model and of a --teacher by name; 0: their own
    mean: str = ""  # R,G,B of --model; empty: what open_clip lists
    std: str = ""  # R,G,B of --model; empty: what open_clip lists
    interpolation: Literal["", "bicubic", "bilinear"] = ""  # of --model; empty: what open_clip lists
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
    workers: int = dark.WORKERS  # threads that read images


# ---------------------------------------------------------------- prompts, growth, data sets

PHRASINGS = ("Ultrasound of the {}.", "Prenatal ultrasound image showing the {}.", "{} on ultrasound.")
PHRASINGS += ("An ultrasound image of the {}.", "Obstetric ultrasound, {}.")
AGE_PHRASES = [
    "Ultrasound of the fetal brain, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
    "An ultrasound image of the fetal brain at {weeks} weeks and {day} days with a pixel spacing of {pixel_spacing} mm.",
    "Fetal brain on ultrasound, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
    "Ultrasound of the fetal brain at {weeks} weeks and {day} days with a pixel spacing of {pixel_spacing} mm.",
    "{weeks} weeks and {day} days, {pixel_spacing} mm per pixel: fetal brain on ultrasound.",
]
PLANE_WORDS = {part: f"fetal {part}" for part in ("abdomen", "brain", "femur", "heart", "kidney", "spine")}
PLANE_WORDS |= dict(cervix="maternal cervix", lips_nose="fetal lips and nose", profile_patient="fetal facial profile")
BRAIN_WORDS = {f"trans-{p}": f"fetal brain, trans-{p} plane" for p in ("thalamic", "cerebellum", "ventricular")}
phrased = lambda classes: {name: [p.format(words) for p in PHRASINGS] for name, words in classes.items()}
PROMPTS = {"planes": phrased(PLANE_WORDS), "brain": phrased(BRAIN_WORDS), "ga": AGE_PHRASES}


def read_prompts(*paths, needed=()):
    """JSON files of an object class -> [prompts], as FetalCLIP publishes them, merged; `ga` has the age templates."""
    prompts = {}
    for path in paths:
        with dark.user_error(path):
            found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict) or not all(isinstance(texts, list) and texts for texts in found.values()):
            fail(f"{path}: not a JSON object class -> [prompts], with at least one prompt a class")
        prompts |= found
    for name in needed:
        if name not in prompts:
            fail(f"--prompts: no class {name!r}; needed are {', '.join(needed)}")
    for text in prompts.get("ga", []):
        if not all(part in text for part in ("{weeks}", "{day}", "{pixel_spacing}")):
            fail(f"--prompts: the `ga` template {text!r} lacks {{weeks}}, {{day}} or {{pixel_spacing}}")
    return prompts


GA_DAYS = np.arange(14 * 7, 38 * 7 + 6 + 1)  # 14w0d to 38w6d
# The WHO growth chart: ln(head circumference in mm), a cubic of the age in weeks, at three percentiles.
WHO_HC_2_5 = (1.59317517131532, 0.29459800552433, -0.0073860372566707, 0.0000656951770216148)
WHO_HC_50 = (2.09924879247164, 0.253373656106037, -0.00605647816678282, 0.0000514256072059917)
WHO_HC_97_5 = (2.50074069629423, 0.220067854715719, -0.00493623111462443, 0.0000389066000946519)
who_hc = lambda days, curve=WHO_HC_50: np.exp(np.polyval(curve[::-1], np.asarray(days) / 7))  # mm at an age in days

SCORES = {"planes": "f1_5plane", "brain": "f1_3brain"}  # field of a row that has its class, and of PROMPTS -> result
PLANES = {f"Fetal {part}": part for part in ("abdomen", "brain", "femur")}  # FETAL_PLANES_DB's `Plane` -> class
PLANES |= {"Fetal thorax": "heart", "Maternal cervix": "cervix", "Other": "other"}


def planes_table(folder, split):
    """FETAL_PLANES_DB -> rows with image, patient, train, scored, and the classes `planes` and `brain`, "" for none."""
    path, rows = Path(folder, "FETAL_PLANES_DB_data.csv"), []
    table = dark.read_table(path, ("Image_name", "Patient_num", "Plane", "Brain_plane", "Train"))
    for name, patient, plane, brain, train in np.char.strip(table).tolist():
        if plane not in PLANES:
            fail(f"{path}: {name} has the Plane {plane!r}; known are {', '.join(PLANES)}")
        row = dict(image=Path(folder, "Images", f"{name}.png"), patient=patient, train=train == "1")
        row |= dict(planes=PLANES[plane], brain=brain.lower() if brain.lower() in BRAIN_WORDS else "")
        rows.append(row | dict(scored=split == "all" or not row["train"]))
    return rows


def hc18_table(folder):
    """HC18's training set -> rows with image, pixel_mm and hc_mm."""
    path, rows = Path(folder, "training_set_pixel_size_and_HC.csv"), []
    for name, *sizes in dark.read_table(path, ("filename", "pixel size(mm)", "head circumference (mm)")):
        with dark.user_error(f"{path}: {name}", ValueError):
            pixel_mm, hc_mm = map(float, sizes)
        if not (0 < pixel_mm < np.inf and 0 < hc_mm < np.inf):
            fail(f"{path}: {name}: {pixel_mm} mm per pixel, {hc_mm} mm around: both must be finite and above 0")
        rows.append(dict(image=Path(folder, "training_set", name.strip()), pixel_mm=pixel_mm, hc_mm=hc_mm))
    if not any(100 <= row["hc_mm"] <= 342 for row in rows):
        fail(f"{path}: none of its {len(rows)} rows has a head circumference within 100 to 342 mm")
    return rows


def chd_table(folder):
    """labels.csv and a folder of frames per video -> rows with label, patient, train and 16 evenly spaced frames."""
    path, natural, rows = Path(folder, "labels.csv"), lambda frame: (len(frame.name), frame.name), []  # frame9, frame10
    for video, label, patient, train in np.char.strip(dark.read_table(path, ("video", "label", "patient", "train"))):
        found = sorted(Path(folder, video).glob("[!.]*"), key=natural) or fail(f"{path}: {video} has no frames")
        frames = [found[round(i)] for i in np.linspace(0, len(found) - 1, 16)]
        rows.append(dict(frames=frames, label=label, patient=patient, train=train == "1"))
    if len({row["label"] for row in rows}) != 2:
        fail(f"{path}: AUROC needs two labels")
    return rows


def check_tables(planes, heads, videos, args):
    """What the tables do not allow is told before the long work."""
    missing = [row["image"] for row in planes + heads if not row["image"].is_file()]
    if missing:
        fail(f"{len(missing)} of {len(planes + heads)} images are not there, the first is {missing[0]}")
    for task in SCORES if planes and not args.write_pairs else ():
        labels = [row[task] for row in planes if row["scored"] and row[task] in PROMPTS[task]]
        if not labels or (args.geometry and not 1 < len(set(labels)) < len(labels)):
            fail(f"--planes {args.planes}: the split {args.split!r} has too few rows of {task}: {labels}")
    for rows, label in [(videos, "label")] * bool(videos) + [(planes, task) for task in SCORES if args.probe]:
        train, test = ([row for row in rows if row[label] and row["train"] == wanted] for wanted in (True, False))
        patients = Counter(label for label, _ in {(row[label], row["patient"]) for row in train})  # of each class
        if sum(n >= 5 for n in patients.values()) < 2 or len({row[label] for row in test}) < 2:
            fail(f"a linear probe of {label} needs two classes of 5 patients with train = 1, and two with train = 0")


def write_pairs(path, planes, heads, size):
    """The train images of planes and all heads, with captions made from their labels -> a CSV for dark.py's --data."""
    pairs, ages = [], np.arange(10 * 7, 42 * 7)
    for i, row in enumerate(row for row in planes if row["train"]):
        view = BRAIN_WORDS.get(row["brain"]) or PLANE_WORDS.get(row["planes"], "fetus, another view")
        pairs.append((row["image"], PHRASINGS[i % 5].format(view)))
    for i, row in enumerate(heads):
        days = ages[np.abs(who_hc(ages) - row["hc_mm"]).argmin()]  # the age whose median head is the nearest
        mm = f"{row['pixel_mm'] * max(Image.open(row['image']).size) / size:.2f}"
        pairs.append((row["image"], AGE_PHRASES[i % 5].format(weeks=days // 7, day=days % 7, pixel_spacing=mm)))
    if not pairs or not path.endswith(".csv"):
        fail(f"--write-pairs {path}: needs a name in .csv, and --hc18 DIR or --planes DIR with rows of `Train ` = 1")
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *((image.absolute(), text) for image, text in pairs)])
    print(f"wrote {path}: {len(pairs)} pairs; mm per pixel are those at {size} pixels")


# ---------------------------------------------------------------- metrics and embeddings


def macro_f1(predicted, actual):
    """Mean over the labels that occur in `actual` of F1 = 2 TP / (2 TP + FP + FN).
    predicted, actual: equally long sequences of labels, strings or ints. Raises ValueError otherwise."""
    return float(metrics.f1_score(actual, predicted, labels=np.unique(actual), average="macro", zero_division=0))


def validity(similarity, hc_mm):
    """HC18 validity: is the true head within the WHO 2.5th to 97.5th percentile of the predicted age?
    similarity (n, 175): image to age 14w0d ... 38w6d, a column a day. hc_mm (n,): true head circumference, counted from
    100 to 342 mm. Returns valid and n (of the counted), rate (valid / n, NaN if none counts), the masks counted and
    inside (n,), and days (n,) of all: the predicted age, 98 to 272, the median of the 15 most similar days."""
    similarity, hc_mm = torch.as_tensor(similarity), torch.as_tensor(hc_mm, dtype=torch.float64)
    if similarity.shape != (len(hc_mm), len(GA_DAYS)):
        raise ValueError(f"validity: similarity is {tuple(similarity.shape)}, not ({len(hc_mm)}, {len(GA_DAYS)})")
    top = similarity.argsort(dim=1, descending=True, stable=True)[:, :15]  # (n, 15), ties to the younger age
    days = top.sort(dim=1).values[:, 7] + int(GA_DAYS[0])
    low, high = (torch.from_numpy(who_hc(days.cpu().numpy(), curve)) for curve in (WHO_HC_2_5, WHO_HC_97_5))
    counted, inside = (hc_mm >= 100) & (hc_mm <= 342), (low <= hc_mm) & (hc_mm <= high)
    n, valid = int(counted.sum()), int((counted & inside).sum())
    return dict(valid=valid, n=n, rate=valid / n if n else np.nan, days=days, counted=counted, inside=inside)


def geometry(features, labels):
    """Table 4 of unit-norm features (n, D) with n labels: shape of the cloud, and how the classes lie in it."""
    features, labels = features.double(), np.asarray(labels)
    variance = torch.linalg.svdvals(features - features.mean(0)).square()  # the covariance's spectrum times n - 1
    cosine, alike = features @ features.T, torch.from_numpy(labels[:, None] == labels)  # (n, n) each
    others = ~torch.eye(len(labels), dtype=torch.bool)
    return {
        "effective_dimension": float(variance.sum().square() / variance.square().sum()),  # participation ratio
        "rank95": int((variance.cumsum(0) / variance.sum() < 0.95).sum()) + 1,
        "silhouette": float(metrics.silhouette_score(features.numpy(), labels, metric="cosine")),
        "intra_cosine": float(cosine[alike & others].mean()),
        "inter_cosine": float(cosine[~alike].mean()),
        "uniformity": float((4 * cosine[others] - 4).exp().mean().log()),  # of exp(-2 d^2), d^2 = 2 - 2 cosine
    }


def t_interval(values):
    """Mean and half width of the 95 % Student-t interval."""
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def probe(rows, label, features, score=None):
    """Linear probes of features (n, D) on the rows with a label (Table 5): for each of 5 seeds and 5 folds of the train
    rows' patients, fitted on the other four, regularisation chosen on the fold, scored (`score` or F1) on the test rows."""
    f1 = lambda layer, x, y: macro_f1(layer.predict(x), y)
    train, test = ([i for i, r in enumerate(rows) if r[label] and r["train"] == wanted] for wanted in (True, False))
    labels, patients = (np.array([row[key] for row in rows]) for key in (label, "patient"))
    x, y, scores = features[train], labels[train], []
    for seed in tqdm(range(5), "probe", leave=False, disable=None):
        splitter = model_selection.StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fit, fold in splitter.split(x, y, patients[train]):
            layers = [linear_model.LogisticRegression(C=c, max_iter=1000).fit(x[fit], y[fit]) for c in (1, 10, 100)]
            best = max(layers, key=lambda layer: f1(layer, x[fold], y[fold]))
            scores.append((score or f1)(best, features[test], labels[test]))
    return t_interval(scores)


def unit(embeddings):
    """Unit-norm fp32 (bf16 would move half of the ages). What is not finite is refused: it would be scored as well."""
    if not embeddings.isfinite().all():
        fail("an embedding is not finite numbers: these weights are of no use")
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


@torch.no_grad()
def embed_images(model, images, args):
    """Paths -> (n, D) unit-norm features on the CPU."""
    read = lambda image: np.array(dark.square(Image.open(image), model.size, model.interpolation))  # (S, S, 3)
    device, features = model.clip.logit_scale.device, []
    with ThreadPoolExecutor(max(1, args.workers)) as pool:  # Pillow decodes and resizes without Python's lock
        for start in tqdm(range(0, len(images), args.batch), "images", leave=False, disable=None):
            batch, pixels = images[start : start + args.batch], []
            for image, reading in zip(batch, [pool.submit(read, image) for image in batch]):
                with dark.user_error(f"{image}: does not decode"):
                    pixels.append(reading.result())
            pixels = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2) / 255  # (n, 3, S, S)
            features.append(unit(model.clip.encode_image(model.normalize(pixels))).cpu())
    return torch.cat(features)


@torch.no_grad()
def embed_texts(clip, tokenizer, texts):
    """n strings -> (n, D) unit-norm features on the model's device. A text that would be cut off is an error."""
    tokens, longer = tokenizer(texts), tokenizer(texts, context_length=tokenizer.context_length + 1)
    cut = (tokens != longer[:, :-1]).any(1).tolist()  # its last token gave way to the mark of the end
    if any(cut):
        fail(f"the prompt {texts[cut.index(True)]!r} is longer than the context of {tokenizer.context_length} tokens")
    return unit(clip.encode_text(tokens.to(clip.logit_scale.device)))


def class_embeddings(model, prompts):
    """class -> [prompts] to (C, D): each prompt embedded, normalised, averaged per class, normalised."""
    return unit(torch.stack([embed_texts(model.clip, model.tokenizer, list(p)).mean(0) for p in prompts.values()]))


@torch.no_grad()
def ga_similarity(model, tokenizer, images, pixel_mm, templates):
    """Similarity of images to every age from 14w0d to 38w6d, averaged over the templates -> (n, 175), fp32, CPU.

    model, tokenizer: an open_clip model in eval mode, and its own. images: (n, 3, S, S), padded, resized and normalised
    for it, or their embeddings (n, D). pixel_mm (n,): mm per pixel of those S x S images, stated with two decimals: few
    are distinct, so each prompt is encoded once and not once an image. templates: with {weeks}, {day}, {pixel_spacing}.
    """
    device = model.logit_scale.device
    if images.ndim == 4:
        images = torch.cat([model.encode_image(part.to(device)) for part in images.split(64)])
    images, stated = unit(images).to(device), np.array([f"{float(mm):.2f}" for mm in pixel_mm])
    similarity = torch.zeros(len(images), len(GA_DAYS))  # rows images, columns days
    for spacing in tqdm(np.unique(stated), "age prompts", leave=False, disable=None):
        mine = torch.from_numpy(stated == spacing)
        for template in templates:
            text = template.replace("{pixel_spacing}", spacing)
            texts = [text.replace("{weeks}", str(day // 7)).replace("{day}", str(day % 7)) for day in GA_DAYS]
            ages = embed_texts(model, tokenizer, texts)  # (175, D)
            similarity[mine] += (images[mine.to(device)] @ ages.T).cpu() / len(templates)
    return similarity


def measure(model, planes, heads, videos, prompts, args, of_teacher):
    """All that was asked for, of one model -> the figures, and what plots and students (`of_teacher`) take of it."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result, drawings = {"params": sum(p.numel() for p in model.clip.parameters())}, {}
    if heads:
        hc_mm = torch.tensor([row["hc_mm"] for row in heads])
        features = embed_images(model, [row["image"] for row in heads], args)
        size = args.spacing_size or model.size
        pixel_mm = [row["pixel_mm"] * max(Image.open(row["image"]).size) / size for row in heads]  # padded, resized
        score = validity(ga_similarity(model.clip, model.tokenizer, features, pixel_mm, prompts["ga"]), hc_mm)
        n, rate, counted = score["n"], score["rate"], score["counted"]
        draws = np.random.default_rng(0).binomial(n, rate, 10_000) / n  # a bootstrap of 0s and 1s
        result |= {"hc18_validity": 100 * rate, "hc18_n": n, "hc18_valid": score["valid"]}
        result["hc18_interval"] = [float(100 * v) for v in np.percentile(draws, (2.5, 97.5))]
        result["hc18_spearman"] = float(stats.spearmanr(score["days"][counted], hc_mm[counted]).statistic)
        drawings["hc18"] = score["days"][counted] / 7, hc_mm[counted]
    if planes:
        features = embed_images(model, [row["image"] for row in planes], args)
        for task, key in SCORES.items():
            classes = list(PROMPTS[task])
            mine = [i for i, row in enumerate(planes) if row["scored"] and row[task] in classes]
            embeddings = class_embeddings(model, {name: prompts[name] for name in classes}).cpu()  # (C, D)
            logits = features[mine] @ embeddings.T  # (n, C): rows images, columns classes
            predicted, actual = [classes[c] for c in logits.argmax(1)], [planes[i][task] for i in mine]
            result[key], drawings[task] = macro_f1(predicted, actual), (actual, predicted, logits)
            if args.probe:
                result[f"probe_{task}"], result[f"probe_{task}_t95"] = probe(planes, task, features.numpy())
            if args.geometry:
                result.setdefault("geometry", {})[key] = geometry(features[mine], actual)
        result["f1_all"] = (5 * result["f1_5plane"] + 3 * result["f1_3brain"]) / 8
    if heads and planes:
        result["avg"] = (result["f1_all"] + result["hc18_validity"] / 100) / 2
    if args.geometry:  # how decided and how teacher-like the nine-class logits are
        logits = drawings["planes"][2]
        log_p = (logits * model.clip.logit_scale.exp().item()).log_softmax(1)
        result["entropy"] = float(-(log_p.exp() * log_p).sum(1).mean())  # nats
        if of_teacher:
            rho = [stats.spearmanr(*pair).statistic for pair in zip(logits, of_teacher["planes"][2])]
            result["teacher_rank_correlation"] = float(np.mean(rho))
    if videos:
        features = embed_images(model, [frame for row in videos for frame in row["frames"]], args)
        features = features.reshape(len(videos), -1).numpy()  # (videos, 16 D)
        result["chd_auroc"], result["chd_auroc_t95"] = probe(videos, "label", features, metrics.get_scorer("roc_auc"))
    model.cpu()
    return result, drawings


def draw_model(path, drawings):
    """One figure of a model: age against head and where it is valid (Figure 2b), and the confusion matrices."""
    figure = Figure(figsize=(6 * len(drawings), 5), layout="constrained")
    for axis, (key, (x, y, *_)) in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings.items()):
        if key == "hc18":
            axis.fill_between(GA_DAYS / 7, who_hc(GA_DAYS, WHO_HC_2_5), who_hc(GA_DAYS, WHO_HC_97_5), alpha=0.2)
            axis.scatter(x, y, s=10)
            axis.set(xlabel="predicted gestational age (weeks)", ylabel="true head circumference (mm)")
        else:
            metrics.ConfusionMatrixDisplay.from_predictions(x, y, ax=axis, normalize="true", xticks_rotation=90)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- report and command line

COLUMNS = dict(params="Params", hc18_validity="HC18 %", f1_5plane="F1-5Plane", f1_3brain="F1-3Brain")
COLUMNS |= dict(f1_all="F1-all", avg="Avg")


def seed_means(records, runs):
    """Mean and sd of the checkpoints that differ in the seed alone, whose `runs` are equal -> a record a group."""
    means = []
    for run in dict.fromkeys(filter(None, runs)):
        group = list({record["seed"]: record for record, other in zip(records, runs) if other == run}.values())
        if len(group) > 1:
            about = {key: group[0][key] for key in ("epoch", "ablation")} | {"seeds": [r["seed"] for r in group]}
            about |= {"name": f"mean of seeds {about['seeds']}", "checkpoints": [r["name"] for r in group]}
            keys = [k for k, value in group[0].items() if isinstance(value, int | float) and k not in ("epoch", "seed")]
            mean = {key: float(np.mean([record[key] for record in group])) for key in keys}
            sd = {key: float(np.std([record[key] for record in group], ddof=1)) for key in keys}
            means.append({**about, "mean": mean, "sd": sd})
    return means


def aligned(lines, left=1):
    """Rows of cells, all strings -> text in columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    pad = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(line)) for line in lines)


def report(records):
    """Prints Table 1's columns, with the sd of a mean over seeds, then all that there is of each record, rounded."""
    lines, form = [["Model", *COLUMNS.values()]], lambda x: f"{x:,.0f}" if x > 1e4 else f"{x:#.3g}"
    for record in records:
        scores = record.get("mean", record), record.get("sd", {})
        cells = [" +- ".join(form(score[key]) for score in scores if key in score) for key in COLUMNS]
        lines.append([record["name"], *(cell or "-" for cell in cells)])
    print(aligned(lines))
    for record in json.loads(json.dumps(records), parse_float=lambda number: round(float(number), 4)):
        print(json.dumps(record))


def parse_args(argv=None):
    args = Options(**dark.given(Options, argv, (__doc__ or "").partition("\n")[0]))
    if not (args.planes or args.hc18 or args.chd or args.write_pairs):
        args.planes, args.hc18 = (str(dark.PHANTOM / name) for name in ("FETAL_PLANES_DB", "HC18"))
        if not dark.PHANTOM.exists():
            fail(f"no --planes or --hc18, and no {dark.PHANTOM}: `python assets/phantom.py phantom` draws it")
    if args.batch < 1 or min(args.context_length, args.spacing_size) < 0:
        fail("--batch must be at least 1, --context-length and --spacing-size at least 0")
    own = args.weights or args.mean or args.std or args.interpolation or (args.context_length and not args.teacher)
    if own and not args.model:
        fail("--weights, --context-length, --mean, --std and --interpolation belong to --model NAME")
    if (args.probe or args.geometry) and not args.planes:
        fail("--probe and --geometry need --planes DIR")
    args.checkpoints = args.checkpoints or (() if args.model else ("out/student.pt",))
    return args


def set_preprocessing(model, mean="", std="", interpolation=""):
    """Puts --mean, --std and --interpolation, where they are given, in place of what open_clip lists."""
    for name, text in (("mean", mean), ("std", std)):
        if text:
            with dark.user_error(f"--{name} {text}: needs three numbers, such as 0.485,0.456,0.406", ValueError):
                red, green, blue = map(float, text.split(","))
            if not np.isfinite(red + green + blue) or (name == "std" and min(red, green, blue) <= 0):
                fail(f"--{name} {text}: must be finite, and for --std above 0")
            setattr(model, name, (red, green, blue))
    model.interpolation = interpolation or model.interpolation


def open_subject(name, weights="", context_length=0):
    """A checkpoint or any open_clip model -> Model, what a checkpoint tells of its run, and all of the run but its seed."""
    if Path(name).suffix != ".pt" and not Path(name).is_file():
        return dark.open_model(name, weights, context_length).eval(), {}, ""
    content = dark.load_checkpoint(name)
    run = {key: value for key, value in content["config"].items() if key not in (*dark.RUN_FIELDS, "seed")}
    facts = {"epoch": content["epoch"]} | {key: content["config"][key] for key in ("seed", "ablation")}
    return dark.model_from_checkpoint(content), facts, json.dumps([run, content["epoch"]], sort_keys=True)


@dark.script()
def main(argv=None):
    warnings.simplefilter("ignore")  # of few rows, of one age predicted for all: nothing that a user could change
    args = parse_args(argv)
    planes = planes_table(args.planes, args.split) if args.planes else []
    heads = hc18_table(args.hc18) if args.hc18 else []
    videos = chd_table(args.chd) if args.chd else []
    check_tables(planes, heads, videos, args)
    if args.write_pairs:
        return write_pairs(args.write_pairs, planes, heads, args.spacing_size or 256)
    if not args.probe:
        planes = [row for row in planes if row["scored"] and row["planes"] in PROMPTS["planes"]]
    needed = [*PLANE_WORDS, *BRAIN_WORDS] if planes and args.prompts else []
    prompts = PROMPTS["planes"] | PROMPTS["brain"] | {"ga": PROMPTS["ga"]} | read_prompts(*args.prompts, needed=needed)
    out = Path(args.out or Path(*args.checkpoints[:1] or [args.weights]).parent / "results.json")
    if out.is_dir() or not out.parent.is_dir():
        fail(f"--out {out}: must be a file in a folder that exists")
    subjects = [(path, *open_subject(path)) for path in args.checkpoints]
    if args.model:
        name = f"{args.model} {args.weights}".strip()
        subjects.append((name, *open_subject(args.model, args.weights, args.context_length)))
        set_preprocessing(subjects[-1][1], args.mean, args.std, args.interpolation)
    teacher = open_subject(args.teacher, args.teacher_weights, args.context_length)[0] if args.teacher else None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    scores, of_teacher = measure(teacher, planes, [], videos, prompts, args, {}) if teacher else ({}, {})
    records, retained = [], [key for key in ("probe_planes", "probe_brain", "chd_auroc") if scores.get(key)]
    for name, model, facts, _ in subjects:
        result, drawings = measure(model, planes, heads, videos, prompts, args, of_teacher)
        result |= {f"{key}_retention_percent": 100 * result[key] / scores[key] for key in retained}
        records.append({"name": name, **facts, **result, "split": args.split})
        told = records + seed_means(records, [run for *_, run in subjects])
        told = json.loads(json.dumps(told), parse_constant=lambda nan: None)  # JSON has no NaN: undefined is null
        dark.write_atomically(out, (json.dumps(told, indent=2) + "\n").encode())
        if args.plots and drawings:
            draw_model(out.with_name(name.removesuffix(".pt").strip("./").replace("/", "-") + ".png"), drawings)
    report(told)  # last: whatever reads it may close the pipe
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
