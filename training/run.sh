#!/usr/bin/env bash
# The submission's training: dense, reweighted L1, masked retraining, 300 epochs each, with its options.
# The last two commands are the submission's, word for word. --no-tricks turns mixup, smoothing, warm-up and the
# cosine schedule off, in any position (as it did there). Our own recipe: `python training/main.py --recipe default`.
# Options given here go to every stage: bash training/run.sh --run runs/submission --data FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python

"$python" training/main.py --pretrain --batch-size 64 --epoch 300 --optmzr sgd --lr 0.1 --lr-scheduler cosine --warmup --warmup-epochs 5 --mixup --alpha 0.3 --smooth --smooth-eps 0.1 "$@"
"$python" training/main.py --arch mobilenetv2 --depth 17 --batch-size 64 --no-tricks --rew --sparsity-type irregular --epoch 300 --optmzr adam --lr 0.001 --lr-scheduler cosine --warmup --warmup-epochs 5 --mixup --alpha 0.3 --smooth --smooth-eps 0.1 "$@"
"$python" training/main.py --arch mobilenetv2 --depth 17 --batch-size 64 --no-tricks --masked-retrain --sparsity-type threshold --config-file config_mobile_v2_0.7 --epoch 300 --optmzr adam --lr 0.001 --lr-scheduler cosine --warmup --warmup-epochs 5 --mixup --alpha 0.3 --smooth --smooth-eps 0.1 "$@"
