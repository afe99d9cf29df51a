"""Tags the wheel for a platform if it carries compiled kernels; everything else is in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import setup

carries_kernels = any(Path(__file__).parent.glob("flash_mla/_kernels/*/manifest.json"))
# The kernels need a loader and a libc no newer than those of 2018.
tag = {"bdist_wheel": {"plat_name": f"manylinux_2_28_{platform.machine()}"}}
setup(options=tag if carries_kernels else {})
