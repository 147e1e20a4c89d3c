"""The suites of README.md beside this file: tables, figure and verdicts from the results of evaluate.py.

python assets/suite/ablation.py assets/suite/trained-start.json   # records alone: means, and the registered claims on them
python assets/suite/ablation.py assets/suite/follow-up.json
python assets/ablation.py runs      # in the checkout of README.md: what suite.sh leaves -> ablation.json, ablation.png
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
from evaluate import t_interval  # noqa: E402

# Table 3 of the paper: F1-5, F1-3, HC18 %, Avg. `selective --r-is-end` is the schedule of r-0.4, and ends with its bits.
PAPER = {
    "no-kd": (0.889, 0.712, 71.3, 0.768),
    "static": (0.946, 0.715, 79.4, 0.826),
    "static-feat": (0.946, 0.664, 75.9, 0.800),
    "decay": (0.902, 0.713, 74.6, 0.788),
    "full-decay": (0.842, 0.742, 73.1, 0.768),
    "conf-penalty": (0.854, 0.680, 74.9, 0.769),
    "coupled": (0.933, 0.763, 84.4, 0.857),
    "coupled--beta02": None,
    "selective": (0.946, 0.784, 88.6, 0.886),
    "beta4": (0.950, 0.709, 85.4, 0.857),
    "beta8": (0.943, 0.714, 78.6, 0.822),
    "r-0.5": (0.941, 0.725, 84.6, 0.853),
    "r-0.4": (0.938, 0.724, 78.4, 0.821),
}
TEACHER = (0.973, 0.702, 83.5, 0.853)
METRICS = ("f1_5plane", "f1_3brain", "hc18_validity", "hc18_spearman", "avg")

# Number, data, metric, a row, the row it is compared with, and what the paper claims of the difference.
CLAIMS = [
    (1, "phantom", "avg", "selective", "static", "above"),
    (1, "phantom", "hc18_validity", "selective", "static", "above"),
    (1, "hc18", "hc18_validity", "selective", "static", "above"),
    (2, "phantom", "avg", "selective", "coupled", "above"),
    (2, "hc18", "hc18_validity", "selective", "coupled", "above"),
    (3, "phantom", "f1_3brain", "coupled", "static", "above"),
    (4, "phantom", "avg", "decay", "static", "below"),
    (4, "phantom", "avg", "full-decay", "static", "below"),
    (5, "phantom", "avg", "conf-penalty", "no-kd", "like"),
    (6, "phantom", "avg", "static-feat", "static", "below"),
    (7, "phantom", "avg", "beta4", "selective", "below"),
    (7, "phantom", "avg", "beta8", "selective", "below"),
    (8, "phantom", "avg", "r-0.5", "selective", "below"),
    (8, "phantom", "avg", "r-0.4", "selective", "below"),
    (9, "phantom", "avg", "selective", "teacher", "above"),
    (9, "hc18", "hc18_validity", "selective", "teacher", "above"),
    (10, "phantom", "late_gain", "selective", "static", "above"),
    (11, "phantom", "silhouette", "selective", "static", "above"),
    (11, "phantom", "inter_cosine", "selective", "static", "below"),
    (11, "phantom", "uniformity", "selective", "static", "below"),
    (11, "phantom", "effective_dimension", "selective", "static", "above"),
    (12, "phantom", "entropy", "selective", "static", "below"),
    (13, "phantom", "avg", "coupled--beta02", "no-kd", "below"),
    (13, "hc18", "hc18_validity", "coupled--beta02", "no-kd", "below"),
]


def read(runs):
    """-> the records of all runs, one each, and {(data, row): {seed: record}}; the teacher has one for every seed."""
    commit = (runs / "commit").read_text().strip()
    records, table = [], {}
    results = lambda name: [r for path in sorted(runs.glob(f"{name}*.json")) for r in json.loads(path.read_text())]
    epochs = results("epochs-")
    for data in ("phantom", "hc18"):
        for found in results(f"{data}-"):
            folder = Path(found["name"]).parent
            row, _, seed = folder.name.rpartition("-")
            about = dict(row=row, seed=int(seed), data=data, commit=commit)
            record = about | {key: value for key, value in found.items() if key not in ("name", "ablation", "seed")}
            record["seconds"] = int((runs / data / folder.name / "seconds").read_text())
            records.append(record)
            table.setdefault((data, row), {})[int(seed)] = record
        (teacher,) = results(f"teacher-{data}")
        records.append(dict(row="teacher", data=data, commit=commit) | teacher)
        table[data, "teacher"] = dict.fromkeys(sorted(table[data, "selective"]), teacher)
    for row in ("selective", "static"):  # Avg per epoch, and what is gained from the checkpoint after the crossing
        for seed, record in table["phantom", row].items():
            mine = [r for r in epochs if Path(r.get("name", "")).parent.name == f"{row}-{seed}"]
            curve = {round(r["epoch"], 2): r["avg"] for r in [*mine, record]}
            record["epochs"] = dict(sorted(curve.items()))
            record["late_gain"] = record["avg"] - record["epochs"][4.0]
    for data in ("phantom", "hc18"):
        for seed, record in table.pop((data, "selective--r-is-end")).items():
            assert all(record[metric] == table[data, "r-0.4"][seed][metric] for metric in METRICS if metric in record)
    return records, table


def value(record, metric):
    return record[metric] if metric in record else record["geometry"]["f1_5plane"][metric]


def verdicts(table, claims=CLAIMS):
    for number, data, metric, row, other, claim in claims:
        ours, theirs = table[data, row], table[data, other]
        seeds = sorted(set(ours) & set(theirs))
        differences = [value(ours[seed], metric) - value(theirs[seed], metric) for seed in seeds]
        mean, half = t_interval(differences) if len(seeds) > 1 else (differences[0], float("inf"))
        holds = {"above": mean - half > 0, "below": mean + half < 0, "like": abs(mean) + half <= 0.05}[claim]
        contrary = {"above": mean + half < 0, "below": mean - half > 0, "like": abs(mean) - half > 0}[claim]
        verdict = "holds" if holds else "does not" if contrary else "undecided"
        digits = 1 if metric == "hc18_validity" else 3
        yield number, data, metric, row, other, claim, f"{mean:+.{digits}f} +- {half:.{digits}f}", verdict


def shown(row):
    return {"coupled--beta02": "coupled --beta0 2", "r-0.4": "r-0.4 = selective --r-is-end"}.get(row, row)


def text(records, metric):
    """Mean and range over the seeds."""
    values = np.array([record[metric] for record in records.values()], float)
    digits = {"hc18_validity": 1}.get(metric, 2 if metric == "hc18_spearman" else 3)
    low, mean, high = (f"{x:.{digits}f}" for x in (values.min(), values.mean(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(table, path):
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    rows = [*reversed(PAPER)]
    for axis, data, metric, published in ((left, "phantom", "avg", 3), (middle, "hc18", "hc18_validity", 2)):
        for y, row in enumerate(rows):
            values = [record[metric] for record in table[data, row].values()]
            axis.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.5, label="a seed" if not y else None)
            axis.plot(np.mean(values), y, "|", color="black", markersize=16, label="mean" if not y else None)
            if PAPER[row]:
                axis.plot(
                    PAPER[row][published],
                    y,
                    "D",
                    color="tab:orange",
                    fillstyle="none",
                    label="paper" if y == 1 else None,
                )
        axis.axvline(next(iter(table[data, "teacher"].values()))[metric], color="gray", linestyle=":", label="teacher")
        axis.set_yticks(range(len(rows)), [shown(row) for row in rows] if data == "phantom" else [])
    left.legend(fontsize=8)
    left.set(xlabel="Avg (no unit)", title="(a) phantom")
    middle.set(xlabel="HC18 validity (%)", title="(b) HC18 images")
    for row, color in (("static", "tab:gray"), ("selective", "tab:red")):
        curves = [record["epochs"] for record in table["phantom", row].values()]
        for curve in curves:
            right.plot([*curve], [*curve.values()], color=color, alpha=0.3)
        right.plot([*curves[0]], np.mean([[*curve.values()] for curve in curves], axis=0), "o-", color=color, label=row)
    right.axvline(7 / 1.8, color="gray", linestyle=":", label="beta = 0")
    right.set(xlabel="epoch", ylabel="Avg (no unit)", title="(a) by epoch: seeds and mean")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def follow_up(path):
    """The registered claims of the later suites, on Avg: of each start, and of the trained one against the random one."""
    table = {}
    for record in json.loads(path.read_text()):
        table.setdefault((record.get("start", "random"), record["row"]), {})[record["seed"]] = record
    for (start, row), records in table.items():
        print(f"{start} start, {row}: " + ", ".join(f"{metric} {text(records, metric)}" for metric in METRICS))
    end = "r-0.4" if ("random", "r-0.4") in table else "selective--r-is-end"
    starts = list(dict.fromkeys(start for start, _ in table))
    claims = [(1, "selective", "static", "above"), (2, "selective", "coupled", "above"), (8, end, "selective", "below")]
    for line in verdicts(table, [(n, start, "avg", *rows) for start in starts for n, *rows in claims]):
        print(*line, sep=" | ")
    if "trained" in starts:  # 14: what repulsion gains over imitation is more where the student begins trained
        gain = lambda start, seed: table[start, "selective"][seed]["avg"] - table[start, "static"][seed]["avg"]
        for start in starts:
            table["gain", start] = {seed: {"avg": gain(start, seed)} for seed in table[start, "static"]}
        for line in verdicts(table, [(14, "gain", "avg", "trained", "random", "above")]):
            print(*line, sep=" | ")


def main(runs):
    records, table = read(runs)
    (HERE / "ablation.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    draw(table, HERE / "ablation.png")
    print(
        "| row | (a) F1-5 | (a) F1-3 | (a) HC18 % | (a) rho | (a) Avg | (b) HC18 % | (b) rho | paper: F1-5, F1-3, HC18 %, Avg |"
    )
    print("|" + "---|" * 9)
    for row in ["teacher", *PAPER]:
        cells = [text(table["phantom", row], metric) for metric in METRICS]
        cells += [text(table["hc18", row], metric) for metric in ("hc18_validity", "hc18_spearman")]
        published = TEACHER if row == "teacher" else PAPER[row]
        cells.append("{:.3f}, {:.3f}, {:.1f}, {:.3f}".format(*published) if published else "-")
        print(f"| {shown(row)} | " + " | ".join(cells) + " |")
    for line in verdicts(table):
        print(*line, sep=" | ")
    kept = [record["teacher_rank_correlation"] for record in table["phantom", "selective"].values()]
    print(
        f"12 | rank correlation of selective, mean {np.mean(kept):.3f}: {'kept' if np.mean(kept) >= 0.8 else 'not kept'}"
    )
    print(f"{len(records)} runs, {sum(r.get('seconds', 0) for r in records) / 3600:.1f} hours of one thread")


given = Path(sys.argv[1])
follow_up(given) if given.is_file() else main(given)
