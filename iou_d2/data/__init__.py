"""Data sets: the user's own (COCO JSON, Pascal VOC folder), Detectron2's, and generated shapes."""
