#!/usr/bin/env bash
# Does repulsion need a student that already knows what it is told to repel? Five rows x three seeds x two starts, on the
# demonstration's data: from random weights, and from the no-kd student of the seed at a fifth of the learning rate. Two
# runs at a time, a thread each. From the top of the checkout:
#
#     bash assets/suite/trained-start.sh      # -> runs/, assets/suite/trained-start.json
#     python assets/suite/ablation.py assets/suite/trained-start.json
set -eu

run() { # START ROW SEED
    out=runs/$1/${2// /}-$3 more=
    [ "$1" = trained ] && more="--student-weights runs/random/no-kd-$3/student.pt --lr $lr"
    [ -e "$out/results.json" ] && return
    began=$(date +%s)
    python dark.py --ablation $2 --seed "$3" $more --workers 0 --log-every 1000 --out "$out" --overwrite > "$out.log"
    echo $(($(date +%s) - began)) > "$out/seconds"
    python evaluate.py "$out/student.pt" --geometry > /dev/null
}
export -f run
lr=$(python -c 'import dark; print(dark.DEMONSTRATION["lr"] / 5)')
export lr
mkdir -p runs/random runs/trained

seeds='42 123 7'
for seed in $seeds; do echo "random,no-kd,$seed"; done | xargs -P 2 -I {} bash -c 'IFS=, read -r a b c <<< "{}"; run "$a" "$b" "$c"'
for seed in $seeds; do
    for row in static coupled selective 'selective --r-is-end'; do echo "random,$row,$seed"; done
    for row in no-kd static coupled selective 'selective --r-is-end'; do echo "trained,$row,$seed"; done
done | xargs -P 2 -I {} bash -c 'IFS=, read -r a b c <<< "{}"; run "$a" "$b" "$c"'

python - << 'PY'
import json, pathlib, subprocess

commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
records = []
for path in sorted(pathlib.Path("runs").glob("*/*/results.json")):
    (found,) = json.loads(path.read_text())
    row, _, seed = path.parent.name.rpartition("-")
    about = dict(row=row, seed=int(seed), start=path.parts[1], data="phantom", commit=commit)
    metrics = {key: value for key, value in found.items() if key not in ("name", "ablation", "seed")}
    records.append(about | metrics | dict(seconds=int((path.parent / "seconds").read_text())))
text = "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"
pathlib.Path("assets/suite/trained-start.json").write_text(text)
PY
