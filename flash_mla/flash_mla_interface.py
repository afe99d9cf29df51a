"""The public names under the module name that FlashMLA defines them in, for code that imports them from there."""

from flash_mla.decode import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.mha import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_mla.sparse_prefill import flash_mla_sparse_fwd

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
