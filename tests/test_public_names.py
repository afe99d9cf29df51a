"""What `import flash_mla` gives, and what it must not cost."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import flash_mla

SIGNATURES = {
    "flash_mla_with_kvcache": "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits "
    "softmax_scale causal is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length "
    "extra_topk_length out enable_batch_invariant",
    "flash_mla_sparse_fwd": "q kv indices sm_scale d_v attn_sink topk_length out",
    "flash_attn_varlen_func": "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv dropout_p softmax_scale "
    "causal deterministic is_varlen",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen head_dim_qk dropout_p softmax_scale causal "
    "deterministic is_varlen",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv head_dim_qk "
    "dropout_p softmax_scale causal deterministic is_varlen",
}


def test_every_public_name_exists():
    assert all(hasattr(flash_mla, name) for name in flash_mla.__all__)
    assert {*SIGNATURES, "get_mla_metadata", "FlashMLASchedMeta"} <= set(flash_mla.__all__)


def test_parameters_are_those_of_flashmla_in_order():
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(flash_mla, name)).parameters) == parameters.split(), name


def test_version_is_that_of_the_project_file():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    assert version[1] == flash_mla.__version__


def test_import_loads_no_compiler_and_no_terminal_library():
    heavy = "{'rich', 'cutlass', 'tvm_ffi', 'triton'}"
    code = (
        f"import torch, sys; before = set(sys.modules); import flash_mla; print({heavy} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
