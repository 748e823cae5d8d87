from __future__ import annotations

import hashlib
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from iou_d2.engine import pretrained


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's folder of checkpoints, empty, on a machine without the package."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "PACKAGES", {})
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def offline(monkeypatch):
    def fail(url, path, hash_prefix):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


@pytest.fixture
def publish(cache, monkeypatch, tmp_path):
    """A function: name of a network -> torchvision's model of random weights, which are then what
    is to be downloaded under that name."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                # Small ones, so that an epsilon too many or too few shows.
                nn.init.uniform_(module.running_var, 0.01, 0.5)
                nn.init.uniform_(module.weight, 0.05, 0.3)
        torch.save(model.state_dict(), tmp_path / "new.pth")
        digest = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()
        path = tmp_path / f"{name}-{digest[:8]}.pth"
        (tmp_path / "new.pth").rename(path)
        real = torchvision.models.get_weight(f"{pretrained.NETWORKS[name][0]}.IMAGENET1K_V1")
        entry = SimpleNamespace(url=path.as_uri(), transforms=real.transforms)
        monkeypatch.setattr(pretrained, "get_weight", lambda _: entry)
        return model

    return make
