"""Writes training pairs for dark.py's --data: public images with captions that are made of their labels.

    python assets/pairs.py --planes FETAL_PLANES_DB --hc18 HC18 --out pairs.csv

They are the rows of FETAL_PLANES_DB with `Train ` = 1 and all of HC18. So of a model that was trained on them
only `evaluate.py --planes FETAL_PLANES_DB --split test` is a fair score.
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, where the next two lie
import dark
import evaluate
from dark import fail


@dataclass
class Options:
    out: str  # the table to write, in .csv
    planes: str = ""  # folder of FETAL_PLANES_DB in its published layout
    hc18: str = ""  # folder of HC18 in its published layout
    size: int = 256  # pixels: the captions of HC18 state mm per pixel at this size, the student's input


def plane_pairs(folder):
    rows = [row for row in evaluate.planes_table(folder, "all") if row["train"]]
    evaluate.check_images(rows)
    pairs = []
    for i, row in enumerate(rows):
        view = evaluate.PLANE_WORDS.get(row["planes"], "fetus, another view")
        view = evaluate.BRAIN_WORDS.get(row["brain"], view)
        pairs.append((row["image"].absolute(), evaluate.PHRASINGS[i % 5].format(view)))
    return pairs


def head_pairs(folder, size):
    rows = evaluate.hc18_table(folder)
    evaluate.check_images(rows)
    ages = np.arange(10 * 7, 42 * 7)  # days
    pairs = []
    for i, row in enumerate(rows):
        with dark.user_error(row["image"]):
            side = max(Image.open(row["image"]).size)  # of the square to which the image is padded
        mm = row["pixel_mm"] * side / size
        days = ages[np.abs(evaluate.who_hc(ages) - row["hc_mm"]).argmin()]  # whose median head is the nearest
        weeks, day = divmod(days, 7)
        caption = evaluate.AGE_PHRASES[i % 5].format(weeks=weeks, day=day, pixel_spacing=f"{mm:.2f}")
        pairs.append((row["image"].absolute(), caption))
    return pairs


@dark.script()
def main(argv=None):
    args = dark.parse_flags(Options, argv, __doc__)
    if not args.out.endswith(".csv"):
        fail(f"--out {args.out}: must end in .csv")
    if Path(args.out).exists():
        fail(f"--out {args.out}: exists and is not overwritten; give another name")
    if args.size < 1 or not (args.planes or args.hc18):
        fail("needs --planes DIR, --hc18 DIR or both, and --size of at least 1")
    pairs = plane_pairs(args.planes) if args.planes else []
    pairs += head_pairs(args.hc18, args.size) if args.hc18 else []
    if not pairs:
        fail(f"--planes {args.planes}: has no row with `Train ` = 1")
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("image", "caption"), *pairs])
    with dark.user_error(f"--out {args.out}: cannot be written", (OSError, UnicodeError)):
        dark.write_atomically(args.out, table.getvalue().encode())
    print(f"wrote {args.out}: {len(pairs)} pairs; mm per pixel are those at {args.size} pixels")


if __name__ == "__main__":
    main()
