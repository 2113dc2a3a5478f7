#!/usr/bin/env bash
# Needs Python 3.11 or newer with pip, and nothing else: everything is installed into .venv here (or $VENV).
#
#   bash run.sh               set up, then verify the shipped checkpoints: accuracy, sparsity, operations, storage, score
#   bash run.sh test          set up, then run the tests (further words go to pytest)
#   bash run.sh quick         all stages in a few minutes on a CPU, on synthetic images, and a table of the results
#   bash run.sh train         train on CIFAR-100; ship the network if it is more accurate than the shipped one (or --ship)
#   bash run.sh ship [RUN]    quantize, pack, execute, export, record and verify the masked network of a run (runs/default)
#   bash run.sh baseline RUN  make the dense network of a run record/dense.pt, which the shipped one is compared with
#   bash run.sh setup         set up alone
#
# Each is python -m tools.WORD, whose --help says more. CIFAR-100 is downloaded to ./data.cifar100, or taken from the
# folder named by CIFAR100_DIR.
! grep -q $'\r' "$0" || { echo "run.sh: its lines end in CRLF; clone anew with: git clone -c core.autocrlf=false" >&2; exit 2; }  #
set -euo pipefail
unset CDPATH  # with it, cd may go elsewhere
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
venv=${VENV:-.venv}
word=${1:-verify}
[ $# -gt 0 ] && shift

case $word in verify|test|quick|train|ship|baseline|setup) ;; *)
    echo "run.sh: unknown command $word; known: verify (the default), test, quick, train, ship, baseline, setup" >&2; exit 2 ;;
esac

setup() {
    # installed once for each requirements.txt: the copy in .venv says for which
    cmp -s requirements.txt "$venv/requirements.txt" && [ -x "$venv/bin/python" ] && return
    local clear= python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "run.sh: $python is missing or older than Python 3.11; name a newer one: PYTHON=python3.12 bash run.sh" >&2; exit 2
    fi
    echo "run.sh: installing requirements.txt into $venv (torch is large: a minute or more)"
    # an environment whose Python was removed, or replaced by a newer one, is made anew
    if [ -f "$venv/pyvenv.cfg" ] && ! [ -x "$venv/bin/python" ]; then clear=--clear; fi
    "$python" -m venv $clear "$venv" || { echo "run.sh: $python cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 2; }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
        { echo "run.sh: pip could not install requirements.txt (network? disk: 6 GB are needed)" >&2; exit 2; }
    cp requirements.txt "$venv/requirements.txt"
}

setup
case $word in  # exec: a signal to this process reaches Python
    setup) ;;
    test) exec "$venv/bin/python" -m pytest "$@" ;;
    *) exec "$venv/bin/python" -m "tools.$word" "$@" ;;
esac
