"""Draws FOLDER/curves.png of a run of dark.py: the weight of the off-diagonal and the terms of its loss.

python assets/curves.py out
"""

import json
import os
import sys
from pathlib import Path

from matplotlib.figure import Figure


def draw(folder):
    folder = Path(folder)
    log = [json.loads(line) for line in open(folder / "log.jsonl")]
    epochs = [record["epoch"] for record in log]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2)
    for axis, name in ((upper, "beta"), (lower, "clip"), (lower, "diag"), (lower, "off")):
        if name in log[0]:
            axis.plot(epochs, [record[name] for record in log], label=name)

    # beta is linear in the epoch, so a line through its first and last record gives where it crosses zero.
    first, last = log[0], log[-1]
    if last["beta"] < 0 < first["beta"]:
        share = first["beta"] / (first["beta"] - last["beta"])
        crossing = first["epoch"] + share * (last["epoch"] - first["epoch"])
        for axis in (upper, lower):
            axis.axvline(crossing, color="gray", linestyle=":", label="beta = 0")

    upper.set(xlabel="epoch", ylabel="weight of off")
    lower.set(xlabel="epoch", ylabel="nats")
    for axis in (upper, lower):
        axis.grid()
        axis.legend()
    figure.savefig(folder / ".curves.png", dpi=120)
    os.replace(folder / ".curves.png", folder / "curves.png")  # so that a kill leaves no half of it


if __name__ == "__main__":
    draw(sys.argv[1])
