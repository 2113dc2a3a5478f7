#!/usr/bin/env bash
# Needs Python 3.11 or newer with pip, and nothing else: everything is installed into .venv here (or $VENV).
#
#   bash run.sh             set up, then verify the shipped checkpoint: accuracy, sparsity, operations, storage, score
#   bash run.sh test        set up, then run the tests (further words go to pytest)
#   bash run.sh quick       all stages in a few minutes on a CPU, on made-up images: to see the machinery turn
#   bash run.sh train       the whole pipeline on CIFAR-100 (further words go to training/main.py)
#   bash run.sh ship [RUN]  quantize, pack, execute, export, record and verify the masked network of a run (runs/default),
#                           finished or as its last stop left it: some twelve minutes on two cores (further words go to quantize.py)
#   bash run.sh baseline RUN  the dense network of a run becomes record/dense.pt, which the shipped one is compared with
#   bash run.sh setup       set up alone
#
# CIFAR-100 is downloaded to ./data.cifar100, or taken from the folder named by CIFAR100_DIR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=${VENV:-.venv}
word=${1:-verify}
[ $# -gt 0 ] && shift

case $word in verify|test|quick|train|ship|baseline|setup) ;; *)
    echo "run.sh: unknown command $word; known: verify (the default), test, quick, train, ship, baseline, setup" >&2; exit 2 ;;
esac

setup() {
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "run.sh: $python is missing or older than Python 3.11; name a newer one: PYTHON=python3.12 bash run.sh" >&2; exit 2
    fi
    # installed once for each requirements.txt: the copy in .venv says for which
    cmp -s requirements.txt "$venv/requirements.txt" && return
    echo "run.sh: installing requirements.txt into $venv (torch is large: a minute or more)"
    "$python" -m venv "$venv" || { echo "run.sh: $python cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 2; }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
        { echo "run.sh: pip could not install requirements.txt (network? disk: 6 GB are needed)" >&2; exit 2; }
    cp requirements.txt "$venv/requirements.txt"
}

verify() {  # arguments go to testers.py
    local status=0 counted=0
    python testers.py "$@" || status=$?
    [ $status -le 2 ] || exit $status
    echo
    python check_model_operations.py || counted=$?
    [ $status -ne 0 ] || status=$counted
    if [ $status -eq 0 ]; then echo "run.sh: verified"; else echo "run.sh: NOT verified in full, see above" >&2; fi
    return $status
}

ship() {  # a run folder, options of quantize.py
    local run=$1 masked="$1/masked.average.pt"  # in float16: the file that is committed is the one that is quantized
    shift
    if [ ! -f "$masked" ]; then
        echo "run.sh: $masked is not there: nothing to ship yet; run.sh train goes on" >&2; exit 2
    fi
    python quantize.py --checkpoint "$masked" "$@"
    python -m tools.pack
    python -m tools.integer --record
    python -m tools.export_onnx --record
    rm -f record/{pretrain,rew,masked,quantized}{,-*}.{jsonl,options.json}  # a run folder tells of all stages behind it
    cp "$run"/*.json* record/
    [[ " $* " == *" --epochs"* ]] || rm -f record/quantized.*  # of another try: this network was not fine-tuned
    cp "$masked" record/masked.pt  # what further training starts from
    python -m tools.report --record
    verify
}

baseline() {  # a run folder
    if [ ! -f "$1/pretrain.average.pt" ]; then
        echo "run.sh: $1/pretrain.average.pt is not there: no dense network to compare with yet" >&2; exit 2
    fi
    cp "$1/pretrain.average.pt" record/dense.pt
    for kind in jsonl options.json; do cp "$1/pretrain.$kind" "record/dense.$kind"; done
    python testers.py --checkpoint record/dense.pt --json > record/dense.tested.json.tmp
    mv record/dense.tested.json.tmp record/dense.tested.json
    python -m tools.report
}

setup
python() { echo "run.sh: python $*" >&2; "$venv/bin/python" "$@"; }

case $word in
    setup) ;;
    verify) verify "$@" ;;
    test) python -m pytest "$@" ;;
    train)
        run=runs/default  # or the folder that --run names: what is trained is what is shipped
        for ((i = 1; i <= $#; i++)); do
            case ${!i} in
                --run=*|--run-folder=*) run=${!i#*=} ;;
                --run|--run-folder) next=$((i + 1)); run=${!next:-} ;;
            esac
        done
        python training/main.py "$@"
        ship "$run" ;;
    ship) ship "${@:-runs/default}" ;;
    baseline) baseline "${1:-runs/default}" ;;
    quick)
        rm -rf runs/quick
        common="--run runs/quick --made-up 1000 --batch-size 50 --augment plain --mixing none --sizes 16:0.7,32 --eval-every 9 --refresh 200"
        python training/main.py --pretrain --epochs 6 --lr 0.1 --warmup-epochs 1 $common
        python training/main.py --rew --epochs 2 --lr 0.05 --warmup-epochs 0 $common
        python training/main.py --masked-retrain --epochs 3 --lr 0.05 --warmup-epochs 0 $common
        python quantize.py --checkpoint runs/quick/masked.pt --out runs/quick/shipped.pt --made-up 1000 --calibration 200 --renew 200
        python -m tools.pack --checkpoint runs/quick/shipped.pt
        python testers.py --checkpoint runs/quick/shipped.mnet --made-up 1000
        python -m tools.integer --checkpoint runs/quick/shipped.mnet --made-up 1000
        python check_model_operations.py --checkpoint runs/quick/shipped.pt --summary ;;
esac
