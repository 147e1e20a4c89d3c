"""Measure a CLIP as the paper does: zero-shot plane F1, HC18 validity, linear probe, geometry (Tables 1, 4 and 5).

    python evaluate.py                                                    # out/student.pt on the phantom benchmark
    python evaluate.py out/student.pt --planes FETAL_PLANES_DB --hc18 HC18 --plots
    python evaluate.py --model ViT-L-14 --weights FetalCLIP_weights.pt --context-length 117 --planes ... --hc18 ...

Prints Table 1's columns and writes results.json beside the checkpoint. A task without data is absent, never zero.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import dark
from dark import fail

# ---------------------------------------------------------------- prompts

PHRASINGS = (
    "Ultrasound of the {}.",
    "Prenatal ultrasound image showing the {}.",
    "{} on ultrasound.",
    "An ultrasound image of the {}.",
    "Obstetric ultrasound, {}.",
)
WORDS = {
    "planes": {  # the five of F1-5Plane, and four distractors
        "abdomen": "fetal abdomen",
        "brain": "fetal brain",
        "femur": "fetal femur",
        "heart": "fetal heart",
        "cervix": "maternal cervix",
        "kidney": "fetal kidney",
        "lips_nose": "fetal lips and nose",
        "profile_patient": "fetal facial profile",
        "spine": "fetal spine",
    },
    "brain": {plane.lower(): f"fetal brain, {plane.lower()} plane" for plane in dark.BRAIN_PLANES},
}
PROMPTS = {task: {c: [p.format(w) for p in PHRASINGS] for c, w in words.items()} for task, words in WORDS.items()}
PROMPTS["ga"] = [
    "Ultrasound of the fetal brain, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
    "An ultrasound image of the fetal brain at {weeks} weeks and {day} days with a pixel spacing of {pixel_spacing} mm.",
    "Fetal brain on ultrasound, {weeks} weeks and {day} days, {pixel_spacing} mm per pixel.",
    "Ultrasound of the fetal brain at {weeks} weeks and {day} days with a pixel spacing of {pixel_spacing} mm.",
    "{weeks} weeks and {day} days, {pixel_spacing} mm per pixel: fetal brain on ultrasound.",
]
GA_FIELDS = ("{weeks}", "{day}", "{pixel_spacing}")
PLANE_CLASS = {  # FETAL_PLANES_DB's `Plane` -> class; `Other` has none
    "Fetal abdomen": "abdomen",
    "Fetal brain": "brain",
    "Fetal femur": "femur",
    "Fetal thorax": "heart",
    "Maternal cervix": "cervix",
}


def read_prompts(path, needed=()):
    """A JSON file with an object class -> [prompts], as FetalCLIP publishes it; `ga` holds the age templates."""
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: no readable JSON ({dark.one_line(error)}); needed is an object class -> [prompts]")
    lists = prompts.values() if isinstance(prompts, dict) else [None]
    if not prompts or not all(isinstance(v, list) and v and all(isinstance(p, str) and p for p in v) for v in lists):
        fail(f"{path}: not a JSON object class -> [prompts], with at least one prompt a class")
    missing = [c for c in needed if c not in prompts]
    if missing:
        fail(f"{path}: has no class {missing[0]!r}; needed are {', '.join(needed)}")
    for template in prompts.get("ga", []):
        absent = [field for field in GA_FIELDS if field not in template]
        if absent:
            fail(f"{path}: the `ga` template {template!r} lacks {absent[0]}; needed are {', '.join(GA_FIELDS)}")
    return prompts


# ---------------------------------------------------------------- metrics


def macro_f1(predicted, actual):
    """Mean over the labels that occur in `actual` of F1 = 2 TP / (2 TP + FP + FN).

    predicted, actual: equally long sequences of labels, strings or ints. Raises ValueError otherwise.
    """
    predicted, actual = list(np.asarray(predicted).tolist()), list(np.asarray(actual).tolist())
    if len(predicted) != len(actual) or not actual:
        raise ValueError(f"macro_f1: {len(predicted)} predicted for {len(actual)} actual labels")
    scores = []
    for label in set(actual):
        hits = sum(p == a == label for p, a in zip(predicted, actual))
        scores.append(2 * hits / (predicted.count(label) + actual.count(label)))  # TP + FP and TP + FN
    return math.fsum(scores) / len(scores)


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
    if similarity.shape != (len(hc_mm), len(dark.GA_DAYS)):
        raise ValueError(f"validity: similarity is {tuple(similarity.shape)}, not ({len(hc_mm)}, {len(dark.GA_DAYS)})")
    top = similarity.argsort(dim=1, descending=True, stable=True)[:, :15]  # (n, 15), ties to the younger age
    days = top.sort(dim=1).values[:, 7] + int(dark.GA_DAYS[0])
    low, high = (torch.from_numpy(dark.who_hc(days.cpu().numpy(), curve)) for curve in (WHO_HC_2_5, WHO_HC_97_5))
    counted = (hc_mm >= 100) & (hc_mm <= 342)
    inside = (low <= hc_mm) & (hc_mm <= high)
    n, valid = int(counted.sum()), int((counted & inside).sum())
    return {
        "valid": valid,
        "n": n,
        "rate": valid / n if n else math.nan,
        "days": days,
        "counted": counted,
        "inside": inside,
    }


def geometry(features, labels):
    """Table 4 of unit-norm features (n, D) with n labels: shape of the cloud, and how the classes lie in it."""
    from sklearn.metrics import silhouette_score

    features, labels = features.double(), np.asarray(labels)
    variance = torch.linalg.svdvals(features - features.mean(0)).square()  # the covariance's spectrum times n - 1
    share = variance.cumsum(0) / variance.sum()
    sums = torch.stack([features[torch.from_numpy(labels == c)].sum(0) for c in np.unique(labels)])  # (C, D)
    sizes = torch.tensor([(labels == c).sum() for c in np.unique(labels)], dtype=torch.float64)
    n, within = sizes.sum(), sums.square().sum()
    return {
        "effective_dimension": float(variance.sum().square() / variance.square().sum()),  # participation ratio
        "rank95": int((share < 0.95).sum()) + 1,
        "silhouette": float(silhouette_score(features.numpy(), labels, metric="cosine")),
        "intra_cosine": float((within - n) / (sizes * (sizes - 1)).sum()),  # pairs of two images of one class
        "inter_cosine": float((sums.sum(0).square().sum() - within) / (n * n - sizes.square().sum())),
        "uniformity": float(torch.pdist(features.float()).square().mul(-2).exp().mean().log()),
    }


def t_interval(values):
    """Mean and half width of the 95 % Student-t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


# ---------------------------------------------------------------- embeddings


class Images(Dataset):
    """Rows with an `image`, a path or an index of the phantom benchmark -> (H, W, 3) uint8, and whether it decoded."""

    def __init__(self, rows, model):
        self.sources, self.size, self.interpolation = [row["image"] for row in rows], model.size, model.interpolation

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, index):
        source = self.sources[index]
        try:
            image = dark.phantom(BENCHMARK_SEED, source)[0] if isinstance(source, int) else Image.open(source)
            pixels = np.array(dark.square(dark.to_8bit(image), self.size, self.interpolation).convert("RGB"))
        except dark.UNDECODABLE:
            return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), False
        return torch.from_numpy(pixels), True


@torch.no_grad()
def embed_images(model, rows, args):
    """-> (n, D) unit-norm fp32 features on the CPU. An image that does not decode is an error that names it."""
    device = model.clip.logit_scale.device
    loader = DataLoader(Images(rows, model), args.batch, num_workers=args.workers, pin_memory=device.type == "cuda")
    features, seen = [], 0
    with tqdm(total=len(rows), desc="images", unit="img", leave=False) as bar:
        for pixels, decoded in loader:
            if not decoded.all():
                fail(f"{rows[seen + int(decoded.int().argmin())]['image']}: does not decode")
            seen += len(pixels)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                embedding = model.clip.encode_image(model.pixels(pixels.to(device, non_blocking=True)))
            features.append(F.normalize(embedding.float(), dim=-1))
            bar.update(len(pixels))
    return torch.cat(features).cpu()


@torch.no_grad()
def embed_texts(clip, tokenizer, texts, batch=256):
    """n strings -> (n, D) unit-norm fp32 features on the model's device."""
    return torch.cat([embed_tokens(clip, tokens) for tokens in tokenizer(texts).split(batch)])


@torch.no_grad()
def embed_tokens(clip, tokens):
    device = clip.logit_scale.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return F.normalize(clip.encode_text(tokens.to(device)).float(), dim=-1)


def class_embeddings(model, prompts):
    """class -> [prompts] to (C, D): each prompt embedded, normalised, averaged per class, normalised."""
    means = [embed_texts(model.clip, model.tokenizer, list(p)).mean(0) for p in prompts.values()]
    return F.normalize(torch.stack(means), dim=-1)


def grid_tokens(tokenizer, template, spacings):
    """The tokens of a template at every age and spacing -> (175, S, context). A prompt that is too long is an error.

    Tokenisers are slow. So every age is tokenised at the first spacing, every spacing at the first age, and the rest
    is put together from those, provided that age and spacing stand in different places and change no lengths.
    """
    context = tokenizer.context_length + 1  # one more than fits shows what would be cut

    def prompt(days, spacing):
        values = dict(zip(GA_FIELDS, (str(days // 7), str(days % 7), spacing)))
        return re.sub("|".join(map(re.escape, GA_FIELDS)), lambda field: values[field[0]], template)

    ages = tokenizer([prompt(days, spacings[0]) for days in dark.GA_DAYS], context_length=context)  # (175, context)
    steps = tokenizer(
        [prompt(dark.GA_DAYS[0], spacing) for spacing in spacings], context_length=context
    )  # (S, context)
    padding = tokenizer([""], context_length=context)[0, -1]
    by_age, by_spacing = (ages != ages[0]).any(0), (steps != steps[0]).any(0)
    lengths = (torch.cat([ages, steps]) != padding).sum(1)
    if (by_age & by_spacing).any() or (lengths != lengths[0]).any():
        texts = [prompt(days, spacing) for days in dark.GA_DAYS for spacing in spacings]
        grid = tokenizer(texts, context_length=context).view(len(ages), len(steps), context)
    else:
        grid = torch.where(by_spacing, steps[None], ages[:, None])
    if (grid[..., -1] != padding).any():
        text = prompt(dark.GA_DAYS[0], spacings[0])
        fail(f"the age prompt {text!r} is longer than the context of {context - 1} tokens: its end would be cut off")
    return grid[..., :-1]


def reads_up_to_the_end(clip):
    """Whether a text's embedding depends on its tokens up to end-of-text alone: causal, and read out there."""
    tower = getattr(clip, "text", clip)
    causal = isinstance(getattr(tower, "attn_mask", None), torch.Tensor) and getattr(tower, "cls_emb", None) is None
    return causal and getattr(tower, "pool_type", getattr(tower, "text_pool_type", None)) == "argmax"


@torch.no_grad()
def embed_grid(clip, tokens):
    """Texts that differ in their last tokens, (A, S, context) -> their embeddings (A, S, D), unit norm.

    In a causal tower the S texts of a row share all that comes before their first difference. So a row becomes one
    sequence, its common prefix and then the S rests without padding, and a mask hides the rests from each other.
    """
    if not reads_up_to_the_end(clip):
        flat = tokens.flatten(0, 1)
        return torch.cat([embed_tokens(clip, part) for part in flat.split(256)]).unflatten(0, tokens.shape[:2])
    tower, device = getattr(clip, "text", clip), clip.logit_scale.device
    ends = tokens.argmax(2)  # (A, S); the end-of-text token has the largest id
    n, length = tokens.shape[1], int(ends.max()) + 1
    prefix = int((tokens == tokens[:, :1]).all(1).all(0).int().cumprod(0).sum())
    prefix = min(prefix, int(ends.min()))
    rest = length - prefix
    ids = torch.cat([tokens[:, 0, :prefix], tokens[:, :, prefix:length].flatten(1)], 1).to(device)  # (A, L)
    place = torch.cat([torch.arange(prefix), torch.arange(prefix, length).repeat(n)])  # (L,) in the text
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(n).repeat_interleave(rest)])  # (L,) which text
    seen = (place <= place[:, None]) & ((owner == -1) | (owner == owner[:, None]))  # (L, L): rows look at columns
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        x = tower.token_embedding(ids) + tower.positional_embedding[place.to(device)]  # (A, L, width)
        x = tower.transformer(x, attn_mask=mask)
        read = (prefix + torch.arange(n) * rest + ends - prefix).to(device)  # (A, S)
        x = tower.ln_final(x.gather(1, read[..., None].expand(-1, -1, x.shape[-1])))  # (A, S, width)
        if tower.text_projection is not None:
            linear = isinstance(tower.text_projection, torch.nn.Linear)
            x = tower.text_projection(x) if linear else x @ tower.text_projection  # (A, S, D)
    return F.normalize(x.float(), dim=-1)


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
    stated = [f"{float(mm):.2f}" for mm in pixel_mm]
    spacings = sorted(set(stated))
    grids = [grid_tokens(tokenizer, template, spacings) for template in templates]  # (175, spacings, context) each
    if images.ndim == 4:
        images = torch.cat([model.encode_image(part.to(device)).float() for part in images.split(64)])
    images = F.normalize(images.float(), dim=-1).to(device)
    prompts = len(dark.GA_DAYS) * len(templates) * len(spacings)
    ages = torch.zeros(len(dark.GA_DAYS), len(spacings), images.shape[1], device=device)  # (175, spacings, D)
    with tqdm(total=prompts, desc="age prompts", unit="prompt", leave=False) as bar:
        for grid in grids:
            for some, mean in zip(grid.split(10, 1), ages.split(10, 1)):  # `mean` is a view into ages
                rows = max(1, 16384 // some[0].numel())
                mean += torch.cat([embed_grid(model, part) for part in some.split(rows)]) / len(templates)
                bar.update(some.shape[0] * some.shape[1])
    mine = torch.tensor([spacings.index(s) for s in stated], device=device)
    return torch.einsum("nd,and->na", images, ages[:, mine]).cpu()  # (n, 175): rows images, columns days


# ---------------------------------------------------------------- the tasks

BENCHMARK_SEED, BENCHMARK_SIZE, BENCHMARK_HEADS = 2**40 + 1, 700, 100  # --seed is below 2**32: never trained on


def phantom_tables():
    """The phantom benchmark in the form of the two data sets: a list of plane rows, a list of head rows."""
    planes, heads = [], []
    names = {c: plane for plane, c in PLANE_CLASS.items()}
    for i in range(BENCHMARK_SIZE):
        image, label = dark.phantom(BENCHMARK_SEED, i)
        brain = label["view"].startswith("trans")
        plane, brain_plane = names["brain" if brain else label["view"]], label["view"].capitalize() if brain else ""
        planes.append(
            {"image": i, "plane": plane, "brain_plane": brain_plane, "patient": str(i // 2), "train": i % 4 > 1}
        )
        if brain and len(heads) < BENCHMARK_HEADS:
            heads.append(
                {"image": i, "pixel_mm": label["pixel_mm"], "hc_mm": label["hc_mm"], "longest": max(image.size)}
            )
    return planes, heads


def longest_side(path):
    try:
        with Image.open(path) as image:
            return max(image.size)
    except dark.UNDECODABLE:
        fail(f"{path}: does not decode")


def heads_task(model, rows, templates, args, result, drawings):
    """HC18 validity, its bootstrap interval, and the rank correlation of predicted age and true HC."""
    size = args.spacing_size or model.size
    spacing = [row["longest"] / size * row["pixel_mm"] for row in rows]
    hc_mm = torch.tensor([row["hc_mm"] for row in rows])
    similarity = ga_similarity(model.clip, model.tokenizer, embed_images(model, rows, args), spacing, templates)
    score = validity(similarity, hc_mm)
    if not score["n"]:
        fail("--hc18: no image has a head circumference within 100 to 342 mm")
    draws = (
        np.random.default_rng(0).binomial(score["n"], score["rate"], 10_000) / score["n"]
    )  # a bootstrap of 0s and 1s
    counted = score["counted"]
    ages, sizes = score["days"][counted], hc_mm[counted]
    defined = len(set(ages.tolist())) > 1 and len(set(sizes.tolist())) > 1  # not when one age is predicted for all
    result |= {
        "hc18_validity": 100 * score["rate"],
        "hc18_n": score["n"],
        "hc18_valid": score["valid"],
        "hc18_interval": [float(100 * v) for v in np.percentile(draws, (2.5, 97.5))],
        "hc18_spearman": float(stats.spearmanr(ages, sizes).statistic) if defined else None,
    }
    drawings["heads"] = (score, hc_mm)


def planes_task(model, rows, features, prompts, args, result, drawings):
    """F1-5Plane and F1-3Brain of the rows of the split. `features` belong to `rows`."""
    for key, classes, label in (
        ("f1_5plane", prompts["planes"], lambda row: PLANE_CLASS.get(row["plane"])),
        (
            "f1_3brain",
            prompts["brain"],
            lambda row: row["brain_plane"].lower() if row["brain_plane"] in dark.BRAIN_PLANES else None,
        ),
    ):
        chosen = [i for i, row in enumerate(rows) if label(row) and (args.split == "all" or not row["train"])]
        if not chosen:
            fail(f"--planes: no image for {key} in the split {args.split!r}")
        logits = features[chosen] @ class_embeddings(model, classes).cpu().T  # (n, C): rows images, columns classes
        predicted = [list(classes)[c] for c in logits.argmax(1).tolist()]
        actual = [label(rows[i]) for i in chosen]
        result[key] = macro_f1(predicted, actual)
        drawings[key] = (features[chosen], logits, predicted, actual)
    result["f1_all"] = (5 * result["f1_5plane"] + 3 * result["f1_3brain"]) / 8


# ---------------------------------------------------------------- beyond zero-shot


def fit_and_score(features, labels, groups, train, score, seeds=5, folds=5):
    """Linear probes: for each seed and each of 5 patient-grouped folds of the train rows, one linear layer is fitted
    on the other four, its regularisation chosen on the fold, and scored on the test rows -> 25 scores."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    x, y, groups, train = np.asarray(features), np.asarray(labels), np.asarray(groups), np.asarray(train)
    scores = []
    with tqdm(total=seeds * folds, desc="probe", unit="fit", leave=False) as bar:
        for seed in range(seeds):
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            for fit, held_out in splitter.split(x[train], y[train], groups[train]):
                probes = [
                    LogisticRegression(C=c, max_iter=1000).fit(x[train][fit], y[train][fit]) for c in (1, 10, 100)
                ]
                best = max(probes, key=lambda probe: macro_f1(probe.predict(x[train][held_out]), y[train][held_out]))
                scores.append(score(best, x[~train], y[~train]))
                bar.update()
    return scores


def probe_task(rows, features, result):
    """Table 5: macro F1 of linear probes on the plane labels (with `Other`) and on the three brain planes."""
    f1 = lambda probe, x, y: macro_f1(probe.predict(x), y)
    for key, field, labels in (
        ("probe_planes", "plane", sorted({row["plane"] for row in rows})),
        ("probe_brain", "brain_plane", dark.BRAIN_PLANES),
    ):
        chosen = [i for i, row in enumerate(rows) if row[field] in labels]
        picked = [rows[i] for i in chosen]
        train = [row["train"] for row in picked]
        if len({row["patient"] for row in picked if row["train"]}) < 5 or all(train):
            fail("--probe: needs at least five patients with `Train ` = 1, and images with 0")
        y, groups = [row[field] for row in picked], [row["patient"] for row in picked]
        result[key], result[key + "_t95"] = t_interval(fit_and_score(features[chosen], y, groups, train, f1))


def chd_task(model, folder, args, result):
    """AUROC of linear probes on videos: 16 evenly spaced frames, their features concatenated."""
    from sklearn.metrics import roc_auc_score

    table = dark.read_table(Path(folder) / "labels.csv", ["video", "label", "patient", "train"], f"--chd {folder}")
    natural = lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    frames = []
    for row in table:
        images = sorted(
            (p for p in (Path(folder) / row["video"]).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES), key=natural
        )
        if not images:
            fail(f"--chd {folder}: the video {row['video']} has no frames ({', '.join(sorted(IMAGE_SUFFIXES))})")
        frames += [{"image": images[round(i)]} for i in np.linspace(0, len(images) - 1, 16)]
    features = embed_images(model, frames, args).reshape(len(table), -1)  # (videos, 16 D)
    labels, train = [row["label"] for row in table], [row["train"].strip() == "1" for row in table]
    if len(set(labels)) != 2 or all(train) or not any(train):
        fail(f"--chd {folder}: labels.csv needs two labels, and rows with train = 1 and with train = 0")
    auroc = lambda probe, x, y: roc_auc_score(y == probe.classes_[1], probe.decision_function(x))
    groups = [row["patient"] for row in table]
    result["chd_auroc"], result["chd_auroc_t95"] = t_interval(fit_and_score(features, labels, groups, train, auroc))


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def geometry_task(model, drawings, result, teacher_drawings):
    """Table 4, and how decided and how teacher-like the nine-class logits are."""
    result["geometry"] = {key: geometry(drawings[key][0], drawings[key][3]) for key in ("f1_5plane", "f1_3brain")}
    logits = drawings["f1_5plane"][1] * model.clip.logit_scale.exp().item()
    log_p = logits.log_softmax(1)
    result["entropy"] = float(-(log_p.exp() * log_p).sum(1).mean())  # nats
    if teacher_drawings:
        ranks = [stats.rankdata(x.numpy(), axis=1) for x in (logits, teacher_drawings["f1_5plane"][1])]
        a, b = (r - r.mean(1, keepdims=True) for r in ranks)
        rho = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))  # Spearman's, per image over the classes
        result["teacher_rank_correlation"] = float(rho.mean())


# ---------------------------------------------------------------- plots


def draw(path, drawings):
    """Per model: age against head, confusion matrices, t-SNE of the brain planes (Figures 2b and 3)."""
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE
    from sklearn.metrics import ConfusionMatrixDisplay

    def save(figure, what):
        target = path.with_name(f"{path.name}_{what}.png")
        dark.write_atomically(target, lambda temporary: figure.savefig(temporary, dpi=120))
        plt.close(figure)
        print(f"wrote {target}")

    if "heads" in drawings:
        score, hc_mm = drawings["heads"]
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        axis.fill_between(
            dark.GA_DAYS / 7, dark.who_hc(dark.GA_DAYS, WHO_HC_2_5), dark.who_hc(dark.GA_DAYS, WHO_HC_97_5),
            color="tab:green", alpha=0.2, label="WHO 2.5th to 97.5th percentile",
        )  # fmt: skip
        for name, mask, color in (("valid", score["inside"], "tab:green"), ("invalid", ~score["inside"], "tab:red")):
            mask = mask & score["counted"]
            axis.scatter(score["days"][mask] / 7, hc_mm[mask], s=10, color=color, label=f"{name} ({int(mask.sum())})")
        axis.set(xlabel="predicted gestational age (weeks)", ylabel="true head circumference (mm)")
        axis.legend()
        save(figure, "age")
    if "f1_5plane" in drawings:
        figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        for axis, key in zip(axes, ("f1_5plane", "f1_3brain")):
            _, _, predicted, actual = drawings[key]
            ConfusionMatrixDisplay.from_predictions(
                actual,
                predicted,
                normalize="true",
                values_format=".2f",
                ax=axis,
                xticks_rotation=45,
                colorbar=False,
                cmap="Blues",
            )
            axis.set_title(f"{key}, share of each true class")
        save(figure, "confusion")
        features, _, _, actual = drawings["f1_3brain"]
        if len(features) > 5:
            points = TSNE(
                perplexity=min(30, len(features) / 4), metric="cosine", init="random", random_state=0
            ).fit_transform(features)
            figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
            for plane in sorted(set(actual)):
                axis.scatter(*points[np.array(actual) == plane].T, s=10, label=plane)
            axis.set(
                xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", title="image embeddings of the brain planes"
            )
            axis.legend()
            save(figure, "tsne")


def draw_epochs(results, path):
    """The scores of several checkpoints over their epochs."""
    import matplotlib.pyplot as plt

    rows = sorted((r for r in results if "epoch" in r), key=lambda r: r["epoch"])
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, factor in (("hc18_validity", 0.01), ("f1_5plane", 1), ("f1_3brain", 1), ("avg", 1)):
        points = [(r["epoch"], factor * r[key]) for r in rows if key in r]
        if points:
            axis.plot(*zip(*points), marker="o", label=key + (" / 100" if factor != 1 else ""))
    axis.set(xlabel="epoch", ylabel="score (0 to 1)", ylim=(0, 1))
    axis.legend()
    dark.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    plt.close(figure)
    print(f"wrote {path}")


# ---------------------------------------------------------------- command line

COLUMNS = {
    "params": "Params",
    "hc18_validity": "HC18 %",
    "f1_5plane": "F1-5Plane",
    "f1_3brain": "F1-3Brain",
    "f1_all": "F1-all",
    "avg": "Avg",
}


def aligned(lines, left=1):
    """Rows of cells, all strings -> text in columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    pad = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(line)) for line in lines)


def table(results):
    """Table 1's columns, aligned; `-` where a task has not been measured."""
    shown = {"params": lambda v: f"{v / 1e6:.2f}M", "hc18_validity": "{:.1f}".format}
    lines = [["Model", *COLUMNS.values()]]
    for result in results:
        cells = [shown.get(key, "{:.3f}".format)(result[key]) if key in result else "-" for key in COLUMNS]
        lines.append([result["name"], *cells])
    return aligned(lines)


def details(result):
    """What the options added, a line each."""
    known = {*COLUMNS, "name", "split", "hc18_n", "hc18_valid", "hc18_interval", "hc18_spearman", "epoch", "benchmark"}
    if "hc18_n" in result:
        low, high = result["hc18_interval"]
        rho = result["hc18_spearman"]
        yield (
            f"HC18: {result['hc18_valid']} of {result['hc18_n']} valid, 95 % bootstrap interval {low:.1f} to {high:.1f} %, "
            f"Spearman's rho of age and HC {'undefined' if rho is None else format(rho, '.3f')}"
        )
    for key, value in result.items():
        if key in known or key.endswith("_t95"):
            continue
        spread = f" +- {result[key + '_t95']:.3f} (95 % t-interval)" if key + "_t95" in result else ""
        for part, number in value.items() if key == "geometry" else [("", value)]:
            numbers = (
                ", ".join(f"{k} {v:.3f}" for k, v in number.items()) if isinstance(number, dict) else f"{number:.3f}"
            )
            yield f"{key} {part}: {numbers}{spread}" if part else f"{key}: {numbers}{spread}"


def parse_args(argv=None):
    parser = dark.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="of dark.py; default out/student.pt")
    add("--planes", metavar="DIR", help="FETAL_PLANES_DB in its published layout")
    add("--hc18", metavar="DIR", help="HC18 in its published layout")
    add("--split", choices=("all", "test"), default="all", help="rows of --planes: all, or `Train ` = 0 only")
    add("--prompts", metavar="FILE", help="JSON object class -> [prompts], with `ga` for the age templates")
    add("--model", metavar="NAME", help="any open_clip model, hf-hub:... too")
    add("--weights", metavar="FILE|TAG", default="", help="weights of --model")
    add("--context-length", type=int, default=0, help="tokens, of --model and of a --teacher by name; 0: their own")
    add("--mean", default="", help="R,G,B of --model; default: what open_clip lists")
    add("--std", default="", help="R,G,B of --model; default: what open_clip lists")
    add("--teacher", metavar="CHECKPOINT|NAME", help="for retention (--probe) and rank correlation (--geometry)")
    add("--teacher-weights", metavar="FILE|TAG", default="", help="weights of a --teacher by name")
    add(
        "--spacing-size",
        type=int,
        default=0,
        help="pixels: prompts state mm per pixel at this size; 0: the model's input",
    )
    add("--probe", action="store_true", help="linear probes (Table 5)")
    add("--chd", metavar="DIR", help="DIR/labels.csv and a folder of frames per video: linear probes on videos")
    add("--geometry", action="store_true", help="shape of the embeddings and of the logits (Table 4)")
    add("--plots", action="store_true", help="figures beside results.json")
    add("--batch", type=int, default=64, help="images at a time")
    add("--workers", type=int, default=-1, help="loader processes; -1: one less than the cores, 1 to 8")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.context_length < 0 or args.spacing_size < 0 or args.workers < -1:
        fail("--batch must be at least 1, --context-length and --spacing-size at least 0, --workers at least -1")
    if not args.model and (args.weights or args.mean or args.std):
        fail("--weights, --mean and --std belong to --model NAME; a checkpoint brings its own")
    if args.context_length and not args.model and not args.teacher:
        fail("--context-length belongs to --model NAME or --teacher NAME; a checkpoint brings its own")
    if args.teacher_weights and not args.teacher:
        fail("--teacher-weights belongs to --teacher NAME")
    if not args.checkpoints and not args.model:
        args.checkpoints = ["out/student.pt"]
    if args.workers < 0:
        args.workers = dark.default_workers()
    args.phantom = not (args.planes or args.hc18 or args.chd)
    if (args.probe or args.geometry) and not (args.planes or args.phantom):
        fail(f"--{'probe' if args.probe else 'geometry'}: needs --planes DIR")
    return args


def open_models(args):
    """-> [(name, Model, epoch or None)] of the checkpoints and of --model, and the teacher or None."""
    models = []
    for path in args.checkpoints:
        checkpoint = dark.load_checkpoint(path)
        models.append((path, dark.model_from_checkpoint(checkpoint), checkpoint["epoch"]))
    if args.model:
        model = dark.open_model(args.model, args.weights, args.context_length, args.mean, args.std)
        models.append((f"{args.model} {args.weights}".strip(), model, None))
    teacher = None
    if args.teacher and Path(args.teacher).is_file():
        teacher = dark.model_from_checkpoint(dark.load_checkpoint(args.teacher))
    elif args.teacher:
        teacher = dark.open_model(args.teacher, args.teacher_weights, args.context_length, flag="--teacher-weights")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in [model for _, model, _ in models] + [teacher] * bool(teacher):
        model.clip.eval().to(device)
    return models, teacher


def measure(model, planes, heads, prompts, args):
    """All that was asked for, of one model -> the figures, and what the plots are drawn from."""
    result = {"params": sum(p.numel() for p in model.clip.parameters())}
    drawings, features = {}, None
    if heads:
        heads_task(model, heads, prompts["ga"], args, result, drawings)
    if planes:
        features = embed_images(model, planes, args)
        planes_task(model, planes, features, prompts, args, result, drawings)
    if heads and planes:
        result["avg"] = (result["f1_all"] + result["hc18_validity"] / 100) / 2
    if args.probe:
        probe_task(planes, features, result)
    if args.chd:
        chd_task(model, args.chd, args, result)
    return result, drawings


def main(argv=None):
    args = parse_args(argv)
    planes, heads = phantom_tables() if args.phantom else ([], [])
    if args.planes:
        planes = dark.planes_table(args.planes, f"--planes {args.planes}")
        planes = planes if args.probe else [row for row in planes if row["plane"] in PLANE_CLASS]
    if args.hc18:
        heads = dark.hc18_table(args.hc18, f"--hc18 {args.hc18}")
        for row in heads:
            row["longest"] = longest_side(row["image"])
    needed = [*PROMPTS["planes"], *PROMPTS["brain"]] * bool(planes) + ["ga"] * bool(heads)
    prompts = PROMPTS
    if args.prompts:
        given = read_prompts(args.prompts, needed)
        prompts = {task: {c: given[c] for c in PROMPTS[task]} for task in ("planes", "brain") if planes} | {
            "ga": given.get("ga")
        }
    models, teacher = open_models(args)
    if args.phantom:
        print(f"No --planes or --hc18: the phantom benchmark, {len(planes)} synthetic images that no run trains on.")
    teacher_result, teacher_drawings = measure(teacher, planes, [], prompts, args) if teacher else ({}, {})

    home = Path(
        args.checkpoints[0] if args.checkpoints else args.weights if Path(args.weights).is_file() else "results.json"
    ).parent
    results = []
    for name, model, epoch in models:
        result, drawings = measure(model, planes, heads, prompts, args)
        if args.geometry:
            geometry_task(model, drawings, result, teacher_drawings)
        for key in [
            k for k in result if k.startswith(("probe_", "chd_")) and not k.endswith("_t95") and k in teacher_result
        ]:
            result[f"{key}_retention_percent"] = 100 * result[key] / teacher_result[key]
        benchmark = "phantom" if args.phantom else "public"
        results.append(
            {
                "name": name,
                **({} if epoch is None else {"epoch": epoch}),
                **result,
                "split": args.split,
                "benchmark": benchmark,
            }
        )
        if args.plots:
            label = Path(name).stem if epoch is not None else re.sub(r"[^\w.-]+", "-", args.model)
            if sum(Path(other).stem == label for other, _, _ in models) > 1:
                label = f"{Path(name).parent.name}_{label}"  # a/student.pt beside b/student.pt
            draw(home / label, drawings)
    print(table(results))
    for result in results:
        for line in details(result):
            print(f"{result['name']}: {line}" if len(results) > 1 else line)
    path = home / "results.json"
    dark.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(results, indent=2) + "\n"))
    print(f"wrote {path}")
    if args.plots and sum("epoch" in r for r in results) > 1:
        draw_epochs(results, home / "epochs.png")


if __name__ == "__main__":
    main()
