#!/usr/bin/env bash
# A whole training run on two CPU cores, in pieces: the same command resumes a stage, on this machine or another.
#
#   bash training/two_cores.sh pretrain --max-minutes 150   dense training: constant rate, 24x24, four teachers, open-ended
#   bash training/two_cores.sh rew                          reweighted L1, from the dense weights
#   bash training/two_cores.sh sparse                       the mask and a cooldown of 5 epochs: the first network to ship
#   bash training/two_cores.sh masked                       masked retraining, from the network that was shipped last
#   bash training/two_cores.sh freed                        that network trained on without a mask: the dense baseline
#
# On a GPU, the same commands with larger batches and more epochs (--batch-size 256 --epochs 122 ...: record/README.md).
# RUN is the run folder (runs/two-cores). sparse, masked and freed have run folders of their own, and print the command that ships the result.
# masked can be repeated after each shipping: the rate rises, falls to zero, and leaves a better network to ship and to start from.
# Results, and the probes before it: record/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
run=${RUN:-runs/two-cores}
stage=${1:-}
[ $# -gt 0 ] && shift

options="--batch-size 128 --lr 0.1 --schedule constant --augment plain --refresh 5000 --eval-every 4 --save-seconds 300
    --teacher micronet_v2_pr_15.t7 micronet_v2_pr_30.t7 micronet_v2_pr_45.t7 micronet_v2_pr_60.t7"
case $stage in
    pretrain) options="--pretrain --run-folder $run --epochs 60 --warmup-epochs 1 --sizes 24:0.95,32 $options" ;;
    rew) options="--rew --run-folder $run --start $run/pretrain.state --epochs 13 --warmup-epochs 0 --target-sparsity 0.795 --sizes 24:0.9,32 $options" ;;
    sparse)
        folder=$run-sparse
        mkdir -p "$folder"
        cp "$run"/{pretrain,rew}.{jsonl,options.json} "$folder"  # a folder tells of all stages behind it: quantize.py records them
        options="--masked-retrain --run-folder $folder --start $run/rew.pt --epochs 5 --cooldown 5 --warmup-epochs 0 --target-sparsity 0.803 --sizes 24:0.4,32 --optimizer muon $options"
        echo "two_cores.sh: once it is done, bash run.sh ship $folder" ;;
    masked)
        logs=(record/masked*.jsonl) count=${#logs[@]}
        folder=$run-masked-$((count + 1))
        if [ ! -d "$folder" ]; then
            mkdir -p "$folder.new"
            cp record/{pretrain,rew,masked}*.{jsonl,options.json} "$folder.new"
            for kind in jsonl options.json; do mv "$folder.new/masked.$kind" "$folder.new/masked-$count.$kind"; done
            mv "$folder.new" "$folder"
        fi
        options="--masked-retrain --run-folder $folder --start record/masked.pt --epochs 25 --cooldown 21 --warmup-epochs 0.5 --target-sparsity 0.803 --sizes 24:0.7,32 --optimizer muon --turn 0.004 $options --lr 0.05"
        echo "two_cores.sh: once it is done, bash run.sh ship $folder" ;;
    freed)
        folder=$run-freed
        options="--pretrain --run-folder $folder --start record/masked.pt --epochs 12 --cooldown 10 --warmup-epochs 0.5 --sizes 24:0.6,32 --optimizer muon --turn 0.003 $options --lr 0.04"
        echo "two_cores.sh: once it is done, bash run.sh baseline $folder" ;;
    *) echo "two_cores.sh: unknown stage '$stage'; known: pretrain, rew, sparse, masked, freed" >&2; exit 2 ;;
esac
# shellcheck disable=SC2086
exec "$python" training/main.py $options "$@"
