"""Does repulsion help on real brain planes? Suite 4 of README.md beside this file.

    python assets/suite/real-planes.py ../shared/real --tune   # how the settings were chosen: no test rows
    python assets/suite/real-planes.py ../shared/real          # the runs -> assets/suite/real-planes.json
    python assets/suite/ablation.py assets/suite/real-planes.json

To be called from the top of a checkout, with the folder of FETAL_PLANES_DB, HC18_train and HC18_val. The runs
follow each other with one thread each; finished ones are not repeated.
"""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REAL = Path(sys.argv[1])
RUNS = Path("runs/real-planes")
RECORDS = Path("assets/suite/real-planes.json")

ROWS = ("no-kd", "static", "coupled", "selective", "selective --r-is-end")
SEEDS = (42, 123, 7, 2024, 5)
TEACHER = "--ablation no-kd --student demo-teacher --seed 1000 --batch 64 --lr 2e-3 --warmup 100"
TEACHER_EPOCHS = 80
STUDENT = "--student demo-fastvit --teacher demo-teacher --batch 64 --tau 1.15"
EPOCHS, WARMUP, LR = 16, 50, 3e-3


def python(log, *arguments):
    """Runs a script of this project with one thread; what it says goes to the file `log`."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        subprocess.run([sys.executable, *arguments], check=True, env=one_thread, stdout=file, stderr=file)


def write_pairs(path, planes):
    """Pairs of the planes with `Train ` = 1 and of HC18_train, with mm per pixel at the models' 48 pixels."""
    if not path.exists():
        arguments = ["--planes", planes, "--hc18", REAL / "HC18_train", "--size", "48", "--out", path]
        python(path.with_suffix(".log"), "assets/pairs.py", *arguments)
    return path


def train(folder, pairs, flags):
    """A run, unless it is finished. `trained.json` in its folder says so, with the commit and the seconds."""
    finished = folder / "trained.json"
    if finished.exists():
        return
    arguments = ["--data", pairs, "--workers", "0", "--log-every", "1000", "--out", folder, "--overwrite"]
    began = time.time()
    python(RUNS / "train.log", "dark.py", *flags.split(), *arguments)
    seconds = round(time.time() - began)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    finished.write_text(json.dumps({"commit": git.stdout.strip(), "seconds": seconds}))
    print(f"{folder}: {seconds} s", flush=True)


def score(folder, flags):
    """-> what evaluate.py measures of a model, with the commit and the seconds of its training."""
    if not (folder / "results.json").exists():
        python(RUNS / "score.log", "evaluate.py", folder / "student.pt", *flags)
    (figures,) = json.loads((folder / "results.json").read_text())
    figures = {key: value for key, value in figures.items() if key not in ("name", "ablation", "seed")}
    return {**figures, **json.loads((folder / "trained.json").read_text())}


def suite():
    """The teacher, then all rows from random weights, then all from the no-kd student of their seed."""
    scored = ["--planes", REAL / "FETAL_PLANES_DB", "--split", "test", "--hc18", REAL / "HC18_val"]
    pairs = write_pairs(RUNS / "pairs.csv", REAL / "FETAL_PLANES_DB")
    teacher = RUNS / "teacher"
    train(teacher, pairs, f"{TEACHER} --epochs {TEACHER_EPOCHS}")
    student = f"{STUDENT} --teacher-weights {teacher}/student.pt --epochs {EPOCHS} --warmup {WARMUP}"
    about = {teacher: {"row": "teacher", "seed": 1000, "start": "random", "data": "planes"}}
    for start in ("random", "trained"):
        for seed in SEEDS:
            begin = f"--lr {LR}"
            if start == "trained":
                begin = f"--lr {LR / 5} --student-weights {RUNS}/random/no-kd-{seed}/student.pt"
            for row in ROWS:
                name = row.replace(" ", "")
                folder = RUNS / start / f"{name}-{seed}"
                train(folder, pairs, f"{student} --ablation {row} --seed {seed} {begin}")
                about[folder] = {"row": name, "seed": seed, "start": start, "data": "planes"}
        records = [{**told, **score(folder, scored)} for folder, told in about.items()]
        RECORDS.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


def hold_out(folder):
    """FETAL_PLANES_DB without its test rows; a fifth of the training patients becomes the test split."""
    with open(REAL / "FETAL_PLANES_DB/FETAL_PLANES_DB_data.csv", newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file, delimiter=";")
    patient = header.index("Patient_num")
    train = header.index("Train ")
    rows = [row for row in rows if row[train].strip() == "1"]
    patients = sorted({int(row[patient]) for row in rows})
    held_out = np.random.default_rng(0).permutation(patients)[: len(patients) // 5]
    for row in rows:
        row[train] = "0" if int(row[patient]) in held_out else "1"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "FETAL_PLANES_DB_data.csv", "w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([header, *rows])
    if not (folder / "Images").exists():
        (folder / "Images").symlink_to((REAL / "FETAL_PLANES_DB/Images").absolute())


def tune():
    """F1-3 on the fifth: the teacher by its epochs, then the static student of seed 1 by its settings."""
    planes = RUNS / "fifth"
    hold_out(planes)
    pairs = write_pairs(RUNS / "fifth.csv", planes)
    runs = {f"teacher-{epochs}": f"{TEACHER} --epochs {epochs}" for epochs in (20, 40, 80)}
    teacher = RUNS / "tune" / f"teacher-{TEACHER_EPOCHS}" / "student.pt"
    student = f"{STUDENT} --teacher-weights {teacher} --ablation static --seed 1"
    for epochs, warmup, lr in ((20, 100, 2e-3), (20, 100, 4e-3), (16, 50, 2e-3), (16, 50, 3e-3)):
        settings = f"--epochs {epochs} --warmup {warmup} --lr {lr}"
        runs[f"student-{epochs}-{warmup}-{lr}"] = f"{student} {settings}"
    for name, flags in runs.items():
        train(RUNS / "tune" / name, pairs, flags)
        figures = score(RUNS / "tune" / name, ["--planes", planes, "--split", "test"])
        print(f"{name}: F1-3 {figures['f1_3brain']:.3f}", flush=True)


RUNS.mkdir(parents=True, exist_ok=True)
if "--tune" in sys.argv:
    tune()
else:
    suite()
