"""The oracle: every mode of the library in fp32 PyTorch, as plainly as its definition, slow, on any device.

Nothing but tests and `flash-mla check` imports this module.
"""

from __future__ import annotations
