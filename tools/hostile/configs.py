"""YAML configs: nothing in them runs, what is read has the types of Detectron2's defaults."""

from __future__ import annotations

import copy
from pathlib import Path

import yaml

from iou_d2 import get_config
from iou_d2.errors import InputError

from .judge import READ, Surface, Try, refused, require_nothing_ran
from .mutate import edit_bytes, edit_tree

VALID = {
    "MODEL": {
        "META_ARCHITECTURE": "BoxLossRetinaNet",
        "WEIGHTS": "",
        "DEVICE": "cpu",
        "ANCHOR_GENERATOR": {"SIZES": [[12, 15, 19], [24, 30, 38]]},
        "RETINANET": {"NUM_CLASSES": 3, "IN_FEATURES": ["p3", "p4"], "PRIOR_PROB": 0.01},
    },
    "SOLVER": {"BASE_LR": 0.002, "STEPS": [100, 200], "MAX_ITER": 300},
    "DATASETS": {"TRAIN": ["shapes_train"], "TEST": ["shapes_val"]},
    "OUTPUT_DIR": "output/x",
    "VERSION": 2,
}
TAGS = (
    "MODEL: !!python/object/apply:os.system ['touch CANARY']\n",
    "MODEL: {WEIGHTS: !!python/object/apply:eval [\"__import__('os').system('touch CANARY')\"]}\n",
    "SEED: !!python/object/apply:eval [\"open('CANARY', 'w').close()\"]\n",
    "SEED: !!python/object/apply:eval ['9**9**9**9']\n",
    "SEED: !!python/object/apply:eval ['[0] * 10**12']\n",
    "SEED: !!python/object/apply:eval ['[x for x in range(10**12)]']\n",
    "SEED: !!python/object/apply:eval ['(lambda: 1)()']\n",
    "SEED: !!python/object/apply:eval ['1/0']\n",
    "SEED: !!python/object/apply:eval ['((((((((1' ]\n",
    "SEED: !!python/name:os.system\n",
    "SEED: !!python/module:antigravity\n",
    "SEED: !!python/object/new:os.system ['touch CANARY']\n",
    "SEED: !!python/object/apply:subprocess.check_output [['touch', 'CANARY']]\n",
    "SEED: !unknown 1\n",
    "_BASE_: config.yaml\n",
    "_BASE_: /dev/zero\n",
    "_BASE_: .\n",
    "_BASE_: [config.yaml, config.yaml]\n",
    "_BASE_: 7\n",
    "_BASE_: http://127.0.0.1:9/x.yaml\n",
    "_BASE_: nowhere.yaml\n",
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\n"
    "f: &f [*e, *e, *e, *e, *e, *e, *e, *e]\nSEED: [*f, *f, *f, *f, *f, *f, *f, *f]\n",
    "SEED: &a [*a]\n",
    "<<: &a {SEED: 1}\n<<: *a\n",
    "SEED: " + "[" * 100_000 + "\n",
    "SEED: " + "9" * 5000 + "\n",
    "SEED: 190:20:30\n",
    "? [SEED]\n: 1\n",
    "--- {SEED: 1}\n--- {SEED: 2}\n",
    "",
    "- SEED\n",
    "SEED\n",
)


def prepare(folder: Path) -> Path:
    return folder


def make(prepared: Path, one: Try) -> Path:
    plan, path = one.plan, one.folder / "config.yaml"
    canary = str(one.folder / "CANARY")
    if plan.special % 5 == 0:
        text = TAGS[plan.special // 5 % len(TAGS)].replace("CANARY", canary).encode()
        if plan.special % 2:
            text = edit_bytes(text, plan.edits[:1])
    elif plan.of_values:
        tree = edit_tree(copy.deepcopy(VALID), plan.edits)
        text = yaml.dump(tree).replace("@twice", "").encode("utf-8", "surrogatepass")
    else:
        text = edit_bytes(yaml.safe_dump(VALID).encode(), plan.edits)
    path.write_bytes(text)
    return path


def judge(path: Path) -> str:
    canary = path.parent / "CANARY"
    try:
        cfg = get_config(str(path))
    except InputError as error:
        require_nothing_ran(canary)
        return refused(error, path.name, str(path.parent))
    require_nothing_ran(canary)
    get_config("", ["SEED", str(int(cfg.SEED))])
    yaml.safe_load(cfg.dump())
    return READ


SURFACES = {
    "configs": Surface(
        "configs",
        "YAML configs: nothing runs, and what is read can be written and read again",
        tries=2500,
        prepare=prepare,
        make=make,
        judge=judge,
        chunks=2,
    )
}
