"""What `import flash_mla` gives, and what it must not cost."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import flash_mla

MHA_OPTIONS = "dropout_p=0.0 softmax_scale=None causal=False deterministic=False is_varlen=True"
SIGNATURES = {
    "flash_mla_with_kvcache": "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits=None "
    "softmax_scale=None causal=False is_fp8_kvcache=False indices=None attn_sink=None extra_k_cache=None "
    "extra_indices_in_kvcache=None topk_length=None extra_topk_length=None out=None enable_batch_invariant=False",
    "flash_mla_sparse_fwd": "q kv indices sm_scale d_v=512 attn_sink=None topk_length=None out=None",
    "flash_attn_varlen_func": f"q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv {MHA_OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen head_dim_qk {MHA_OPTIONS}",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv head_dim_qk "
    f"{MHA_OPTIONS}",
}


def test_every_public_name_exists():
    assert all(hasattr(flash_mla, name) for name in flash_mla.__all__)
    assert {*SIGNATURES, "get_mla_metadata", "FlashMLASchedMeta"} <= set(flash_mla.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_and_their_defaults_are_those_of_flashmla_in_order(name):
    parameters = inspect.signature(getattr(flash_mla, name)).parameters.values()
    told = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert told == SIGNATURES[name].split()


def test_the_names_are_also_where_flashmla_defines_them():
    from flash_mla import flash_mla_interface

    for name in {*SIGNATURES, "get_mla_metadata", "FlashMLASchedMeta"}:
        assert getattr(flash_mla_interface, name) is getattr(flash_mla, name)


def test_import_loads_no_compiler_and_no_terminal_library():
    heavy = "{'rich', 'cutlass', 'tvm_ffi', 'triton'}"
    code = (
        f"import torch, sys; before = set(sys.modules); import flash_mla; print({heavy} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
