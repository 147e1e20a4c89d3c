"""The suites of README.md beside this file: means, tables, a figure and verdicts.

python assets/suite/ablation.py assets/suite/real-planes.json   # records: means and registered claims
python assets/suite/ablation.py assets/suite/trained-start.json
python assets/suite/ablation.py assets/suite/follow-up.json
python assets/ablation.py runs   # in suite 1's checkout: what suite.sh leaves -> ablation.json, ablation.png
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

HERE = Path(__file__).parent

# Table 3 of the paper: F1-5, F1-3, HC18 %, Avg.
# `selective --r-is-end` runs the schedule of r-0.4, and ended with the same bits.
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
PLANES_METRICS = ("f1_3brain", "hc18_validity", "hc18_spearman")  # too few images there for the other scores

# Suite 1: number, data, metric, a row, the row it is compared with, what the paper claims of the difference.
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
# Suites 2 and 3, then suite 4 on real brain planes; for each start. Claim 14 is in `gain_of_start`.
PHANTOM_CLAIMS = [
    (1, "avg", "selective", "static", "above"),
    (2, "avg", "selective", "coupled", "above"),
    (8, "avg", "selective--r-is-end", "selective", "below"),
]
PLANES_CLAIMS = [
    (1, "f1_3brain", "selective", "static", "above"),
    (1, "hc18_validity", "selective", "static", "above"),
    (3, "f1_3brain", "coupled", "static", "above"),
    (8, "f1_3brain", "selective--r-is-end", "selective", "below"),
    (9, "f1_3brain", "selective", "teacher", "above"),
    (15, "f1_3brain", "static", "no-kd", "above"),
]


def read(runs):
    """-> a record of every run, and {(data, row): {seed: record}}, with the teacher under every seed."""
    commit = (runs / "commit").read_text().strip()
    records, table = [], {}
    results = lambda name: [
        r for path in sorted(runs.glob(f"{name}*.json")) for r in json.loads(path.read_text())
    ]
    epochs = results("epochs-")
    for data in ("phantom", "hc18"):
        for found in results(f"{data}-"):
            folder = Path(found["name"]).parent
            row, _, seed = folder.name.rpartition("-")
            about = dict(row=row, seed=int(seed), data=data, commit=commit)
            record = about | {
                key: value for key, value in found.items() if key not in ("name", "ablation", "seed")
            }
            record["seconds"] = int((runs / data / folder.name / "seconds").read_text())
            records.append(record)
            table.setdefault((data, row), {})[int(seed)] = record
        (teacher,) = results(f"teacher-{data}")
        records.append(dict(row="teacher", data=data, commit=commit) | teacher)
        table[data, "teacher"] = dict.fromkeys(sorted(table[data, "selective"]), teacher)
    for row in (
        "selective",
        "static",
    ):  # Avg per epoch, and what is gained from the checkpoint after the crossing
        for seed, record in table["phantom", row].items():
            mine = [r for r in epochs if Path(r.get("name", "")).parent.name == f"{row}-{seed}"]
            curve = {round(r["epoch"], 2): r["avg"] for r in [*mine, record]}
            record["epochs"] = dict(sorted(curve.items()))
            record["late_gain"] = record["avg"] - record["epochs"][4.0]
    for data in ("phantom", "hc18"):
        for seed, record in table.pop((data, "selective--r-is-end")).items():
            assert all(
                record[metric] == table[data, "r-0.4"][seed][metric] for metric in METRICS if metric in record
            )
    return records, table


def value(record, metric):
    if metric in record:
        return record[metric]
    return record["geometry"]["f1_5plane"][metric]


def t_interval(values):
    """Mean and half width of the 95 % Student-t interval; of a single value the half width is infinite."""
    if len(values) == 1:
        return values[0], float("inf")
    return np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def verdict_on(claim, mean, half):
    """A sign is decided where the interval lies on one side of zero; 'like' means within 0.05 of zero."""
    low = mean - half
    high = mean + half
    if claim == "above":
        holds = low > 0
        contrary = high < 0
    elif claim == "below":
        holds = high < 0
        contrary = low > 0
    else:
        holds = abs(mean) + half <= 0.05
        contrary = abs(mean) - half > 0
    if holds:
        return "holds"
    return "does not" if contrary else "undecided"


def verdicts(table, claims):
    """{(data, row): {seed: record}}, claims as in CLAIMS -> each claim with its difference and verdict."""
    for number, data, metric, row, other, claim in claims:
        ours, theirs = table[data, row], table[data, other]
        seeds = sorted(set(ours) & set(theirs))
        differences = [value(ours[seed], metric) - value(theirs[seed], metric) for seed in seeds]
        mean, half = t_interval(differences)
        digits = 1 if metric == "hc18_validity" else 3
        interval = f"{mean:+.{digits}f} +- {half:.{digits}f}"
        yield number, data, metric, row, other, claim, interval, verdict_on(claim, mean, half)


def shown(row):
    return {"coupled--beta02": "coupled --beta0 2", "r-0.4": "r-0.4 = selective --r-is-end"}.get(row, row)


def text(records, metric):
    """Mean and range over the seeds."""
    values = np.array([record[metric] for record in records.values()], float)
    digits = {"hc18_validity": 1, "hc18_spearman": 2}.get(metric, 3)
    low, mean, high = (f"{x:.{digits}f}" for x in (values.min(), values.mean(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw_rows(axis, table, data, metric, published):
    """Every row's seeds, mean and published value (column `published` of PAPER), and the teacher's line."""
    rows = [*reversed(PAPER)]
    for y, row in enumerate(rows):
        values = [record[metric] for record in table[data, row].values()]
        axis.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.5, label=None if y else "a seed")
        axis.plot(np.mean(values), y, "|", color="black", markersize=16, label=None if y else "mean")
        if PAPER[row]:
            label = "paper" if y == 1 else None
            axis.plot(PAPER[row][published], y, "D", color="tab:orange", fillstyle="none", label=label)
    teacher = next(iter(table[data, "teacher"].values()))
    axis.axvline(teacher[metric], color="gray", linestyle=":", label="teacher")
    axis.set_yticks(range(len(rows)), [shown(row) for row in rows] if data == "phantom" else [])


def draw(table, path):
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    draw_rows(left, table, "phantom", "avg", 3)
    left.legend(fontsize=8)
    left.set(xlabel="Avg (no unit)", title="(a) phantom")
    draw_rows(middle, table, "hc18", "hc18_validity", 2)
    middle.set(xlabel="HC18 validity (%)", title="(b) HC18 images")
    for row, color in (("static", "tab:gray"), ("selective", "tab:red")):
        curves = [record["epochs"] for record in table["phantom", row].values()]
        for curve in curves:
            right.plot([*curve], [*curve.values()], color=color, alpha=0.3)
        mean = np.mean([[*curve.values()] for curve in curves], axis=0)
        right.plot([*curves[0]], mean, "o-", color=color, label=row)
    right.axvline(7 / 1.8, color="gray", linestyle=":", label="beta = 0")
    right.set(xlabel="epoch", ylabel="Avg (no unit)", title="(a) by epoch: seeds and mean")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def gain_of_start(table, metric):
    """Claim 14: what selective gains over static is more where the student begins trained -> its verdict."""
    for start in ("random", "trained"):
        table["gain", start] = {}
        for seed, static in table[start, "static"].items():
            gain = value(table[start, "selective"][seed], metric) - value(static, metric)
            table["gain", start][seed] = {metric: gain}
    return verdicts(table, [(14, "gain", metric, "trained", "random", "above")])


def later_suite(path):
    """Prints the means and the registered claims of suite 2, 3 or 4, for each start."""
    records = json.loads(path.read_text())
    on_planes = records[0].get("data") == "planes"
    metrics = PLANES_METRICS if on_planes else METRICS
    claims = PLANES_CLAIMS if on_planes else PHANTOM_CLAIMS

    table = {}  # (start, row) -> {seed: record}
    for record in records:
        table.setdefault((record.get("start", "random"), record["row"]), {})[record["seed"]] = record
    for (start, row), by_seed in table.items():
        print(
            f"{start} start, {row}: " + ", ".join(f"{metric} {text(by_seed, metric)}" for metric in metrics)
        )

    starts = list(dict.fromkeys(start for start, _ in table))
    if on_planes:  # one teacher for all seeds and both starts
        (teacher,) = table["random", "teacher"].values()
        for start in starts:
            table[start, "teacher"] = dict.fromkeys(table[start, "selective"], teacher)
    elif ("random", "r-0.4") in table:  # the name of this schedule in suite 2
        claims = [
            (n, metric, row.replace("selective--r-is-end", "r-0.4"), *rest)
            for n, metric, row, *rest in claims
        ]
    for start in starts:
        for line in verdicts(table, [(number, start, *claim) for number, *claim in claims]):
            print(*line, sep=" | ")
    if "trained" in starts:
        for line in gain_of_start(table, claims[0][1]):
            print(*line, sep=" | ")


def first_suite(runs):
    """Writes ablation.json and ablation.png of what suite.sh left, and prints its table and verdicts."""
    records, table = read(runs)
    (HERE / "ablation.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    draw(table, HERE / "ablation.png")
    phantom_columns = "(a) F1-5 | (a) F1-3 | (a) HC18 % | (a) rho | (a) Avg"
    print(f"| row | {phantom_columns} | (b) HC18 % | (b) rho | paper: F1-5, F1-3, HC18 %, Avg |")
    print("|" + "---|" * 9)
    for row in ["teacher", *PAPER]:
        cells = [text(table["phantom", row], metric) for metric in METRICS]
        cells += [text(table["hc18", row], metric) for metric in ("hc18_validity", "hc18_spearman")]
        published = TEACHER if row == "teacher" else PAPER[row]
        cells.append("{:.3f}, {:.3f}, {:.1f}, {:.3f}".format(*published) if published else "-")
        print(f"| {shown(row)} | " + " | ".join(cells) + " |")
    for line in verdicts(table, CLAIMS):
        print(*line, sep=" | ")
    kept = np.mean([record["teacher_rank_correlation"] for record in table["phantom", "selective"].values()])
    print(f"12 | rank correlation of selective, mean {kept:.3f}: {'kept' if kept >= 0.8 else 'not kept'}")
    print(f"{len(records)} runs, {sum(r.get('seconds', 0) for r in records) / 3600:.1f} hours of one thread")


if __name__ == "__main__":
    given = Path(sys.argv[1])
    if given.is_file():
        later_suite(given)
    else:
        first_suite(given)
