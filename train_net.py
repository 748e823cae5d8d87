"""Train or evaluate a detector of iou_d2, as in any Detectron2 project.

    python train_net.py --config-file configs/quick/iou_retinanet_shapes.yaml
    python train_net.py --config-file output/x/config.yaml --eval-only \\
        MODEL.WEIGHTS output/x/model_final.pth
    python train_net.py --config-file configs/iou_retinanet_R_50_FPN_1x.yaml \\
        DATASETS.TRAIN "('coco:train.json:images',)" DATASETS.TEST "('voc:VOC2007:test',)"
"""

from iou_d2.commands.threads import limit_spinning

limit_spinning()

from iou_d2.commands.errors import ending_in_a_sentence  # noqa: E402
from iou_d2.commands.train import main  # noqa: E402

if __name__ == "__main__":
    with ending_in_a_sentence():
        main(epilog=__doc__)
