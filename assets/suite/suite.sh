#!/usr/bin/env bash
# The suite of README.md, from the top of a checkout of bee394b: 2 teachers, then 14 rows x 3 seeds x 2 data sets, one thread for
# each data set; about 2 hours on 2 cores. HC18 is the folder with train-*.tar and val. Then: python assets/ablation.py runs
set -eu
export OMP_NUM_THREADS=1

rows() {    # DATA SEED FLAGS...: every row of one data set with one seed
    data=$1 seed=$2; shift 2
    for row in no-kd static selective coupled 'selective --r-is-end' 'coupled --beta0 2' static-feat decay full-decay \
        conf-penalty beta4 beta8 r-0.5 r-0.4; do
        run="runs/$data/${row// /}-$seed"; SECONDS=0
        python dark.py --ablation $row --teacher demo-teacher --teacher-weights runs/teacher-$data/student.pt \
            --teacher-cache runs/cache-$data-$seed --seed $seed --workers 0 --out "$run" "$@" &
        while sleep 1 && kill -0 $!; do    # keeps the checkpoint of every epoch
            if [ $data = phantom ] && [ -e "$run/student.pt" ]; then
                cp -n "$run/student.pt" "$run/at-$(stat -c %Y "$run/student.pt").pt" || true
            fi
        done 2>/dev/null
        wait $!
        echo $SECONDS > "$run/seconds"
    done
}

phantom() {
    for seed in 42 123 7; do
        rows phantom $seed
        python evaluate.py runs/phantom/*-$seed/student.pt --geometry --teacher runs/teacher-phantom/student.pt \
            --out runs/phantom-$seed.json
        python evaluate.py runs/phantom/{static,selective}-$seed/at-*.pt --out runs/epochs-$seed.json
    done
    python evaluate.py runs/teacher-phantom/student.pt --geometry --out runs/teacher-phantom.json
}

hc18() {
    scored="--hc18 HC18/val --spacing-size 224 --prompts assets/hc18-prompts.json"
    for seed in 42 123 7; do
        rows hc18 $seed --data 'HC18/train-*.tar' --student demo-fastvit --tau 0.7 --epochs 40 --batch 32 --lr 1e-3 --warmup 30
        python evaluate.py runs/hc18/*-$seed/student.pt $scored --out runs/hc18-$seed.json
    done
    python evaluate.py runs/teacher-hc18/student.pt $scored --out runs/teacher-hc18.json
}

python dark.py --ablation no-kd --student demo-teacher --epochs 16 --seed 1000 --out runs/teacher-phantom
python dark.py --ablation no-kd --student demo-teacher --student-weights runs/teacher-phantom/student.pt --seed 1000 \
    --epochs 40 --batch 32 --lr 5e-4 --data 'HC18/train-*.tar' --out runs/teacher-hc18
git rev-parse --short HEAD > runs/commit
phantom & a=$!
hc18 & b=$!
wait $a
wait $b
