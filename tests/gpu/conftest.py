"""GPU tests are collected everywhere and run where there is a Hopper GPU."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a Hopper GPU"))
