#!/usr/bin/env bash
# The road of a user without a checkout: sdist, wheel, an environment of its own, and two iterations
# of training in an empty folder.
#   tools/check_wheel.sh PYTHON    PYTHON has torch, Detectron2 and the build tools
set -euo pipefail
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH DETECTRON2_DATASETS

"$python" setup.py -q sdist -d "$work"
"$python" -m pip wheel -q --no-build-isolation --no-cache-dir --no-deps -w "$work" "$work"/*.tar.gz

# The .pth file lends the environment all packages of PYTHON but iou_d2: an editable install is found
# by a .pth file of PYTHON, which is not read here.
"$python" -m venv --without-pip "$work/venv"
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
    > "$(echo "$work"/venv/lib/python*/site-packages)/lent.pth"
"$python" -m pip --python "$work/venv/bin/python" install -q --no-deps --ignore-installed \
    "$work"/*.whl

mkdir "$work/empty"
cd "$work/empty"
"$work/venv/bin/python" -c "
import iou_d2, iou_d2.layers, sys
assert iou_d2.__file__.startswith(sys.prefix), iou_d2.__file__
assert iou_d2.layers.HAS_EXTENSION"
"$work/venv/bin/iou-d2" train --config quick/iou_net_own_data --train shapes_train_8x64 \
    --test shapes_val_4x64 SOLVER.MAX_ITER 2
test -s output/iou_net_own_data/model_final.pth
echo "The wheel trains in an empty folder."
