"""Multi-head latent attention for serving DeepSeek-style models: a drop-in replacement for DeepSeek's FlashMLA."""

from flash_mla.decode import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.kv_cache import KVCacheFormat
from flash_mla.mha import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_mla.paged_kv_cache import PagedKVCache
from flash_mla.sparse_prefill import flash_mla_sparse_fwd

__version__ = "0.1.0"

__all__ = [
    "FlashMLASchedMeta",
    "KVCacheFormat",
    "PagedKVCache",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
