"""PagedKVCache against a model of it: a list of tokens for each request."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flash_mla.kv_cache import KVCacheFormat
from flash_mla.paged_kv_cache import OutOfPages, PagedKVCache

FORMATS = [one for one in KVCacheFormat if one is not KVCacheFormat.FP4_V41]
names = st.integers(0, 5)


class Serving(RuleBasedStateMachine):
    """Any order of operations, valid or not: tokens read back right, and no page has two owners."""

    @initialize(
        num_pages=st.integers(1, 9),
        page_size=st.sampled_from([1, 2, 3, 8]),
        kv_format=st.sampled_from(FORMATS),
        seed=st.integers(0, 2**32),
    )
    def make(self, num_pages, page_size, kv_format, seed):
        self.pool = PagedKVCache(num_pages, page_size, kv_format)
        # What nobody wrote must not be read.
        self.pool.cache.view(torch.uint8).fill_(0xFF)
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens: dict[int, torch.Tensor] = {}
        self.reserved: dict[int, int] = {}

    def random_kv(self, n):
        return torch.randn(n, self.pool.d, generator=self.generator)

    def stored(self, kv):
        """What the format keeps of `kv`."""
        kv_format = self.pool.kv_format
        return kv_format.unpack(kv_format.pack(kv.view(len(kv), 1, 1, self.pool.d))).view_as(kv)

    def pages(self, tokens):
        return -(-tokens // self.pool.page_size)

    def held(self, name, more=0):
        return max(self.pages(self.reserved[name]), self.pages(len(self.tokens[name]) + more))

    @rule(name=names, num_tokens=st.integers(0, 30))
    def allocate(self, name, num_tokens):
        if name in self.tokens:
            with pytest.raises(ValueError, match=f"request: {name} is in the cache already"):
                self.pool.allocate(name, num_tokens)
        elif self.pages(num_tokens) > self.pool.num_free_pages:
            with pytest.raises(OutOfPages):
                self.pool.allocate(name, num_tokens)
        else:
            self.pool.allocate(name, num_tokens)
            self.tokens[name] = torch.empty(0, self.pool.d)
            self.reserved[name] = num_tokens

    @rule(chosen=st.lists(st.tuples(names, st.integers(0, 12)), max_size=4), bad_kv=st.booleans())
    def append(self, chosen, bad_kv):
        requests, counts = [name for name, _ in chosen], [count for _, count in chosen]
        kv = self.random_kv(sum(counts) + bad_kv)
        if bad_kv:
            with pytest.raises(ValueError, match=f"kv: got {len(kv)} tokens, need {sum(counts)}"):
                self.pool.append(requests, kv, counts)
        elif len(set(requests)) != len(requests):
            with pytest.raises(ValueError, match="got a request twice"):
                self.pool.append(requests, kv, counts)
        elif not set(requests) <= set(self.tokens):
            with pytest.raises(KeyError, match="is not in the cache"):
                self.pool.append(requests, kv, counts)
        elif sum(self.held(*one) - self.held(one[0]) for one in chosen) > self.pool.num_free_pages:
            with pytest.raises(OutOfPages, match="more pages of"):
                self.pool.append(requests, kv, counts)
        else:
            self.pool.append(requests, kv, counts)
            for (name, _), rows in zip(chosen, self.stored(kv).split(counts) if chosen else (), strict=True):
                self.tokens[name] = torch.cat([self.tokens[name], rows])

    @precondition(lambda self: self.tokens)
    @rule()
    def decode_step(self):
        """One token for everybody."""
        if sum(self.held(name, 1) - self.held(name) for name in self.tokens) > self.pool.num_free_pages:
            return
        kv = self.random_kv(len(self.tokens))
        self.pool.append(list(self.tokens), kv.unsqueeze(1))
        for name, row in zip(self.tokens, self.stored(kv).split(1), strict=True):
            self.tokens[name] = torch.cat([self.tokens[name], row])

    @rule(name=names)
    def free(self, name):
        if name not in self.tokens:
            with pytest.raises(KeyError, match=f"request: {name} is not in the cache"):
                self.pool.free(name)
        else:
            self.pool.free(name)
            del self.tokens[name], self.reserved[name]

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "pool"):
            return
        requests = list(self.tokens)
        table, seqlens = self.pool.block_table(requests), self.pool.seqlens(requests)
        assert table.dtype == seqlens.dtype == torch.int32
        assert seqlens.tolist() == [len(tokens) for tokens in self.tokens.values()]
        held = [[page for page in row if page != -1] for row in table.tolist()]
        assert [len(pages) for pages in held] == [self.held(name) for name in requests]
        owned = [page for pages in held for page in pages]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(self.pool.num_pages))
        assert self.pool.num_free_pages == self.pool.num_pages - len(owned)
        for name, row in zip(requests, table, strict=True):
            positions = torch.arange(len(self.tokens[name]))
            expected = row[positions // self.pool.page_size] * self.pool.page_size + positions % self.pool.page_size
            slots = self.pool.slots(name, positions)
            assert torch.equal(slots, expected.int())
            assert torch.equal(self.pool.kv_format.gather(self.pool.cache, slots), self.tokens[name])


Serving.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestServing = Serving.TestCase


def test_failed_append_changes_nothing():
    pool = PagedKVCache(3, page_size=2)
    pool.allocate("a", 1)
    pool.append(["a"], torch.ones(1, 576))
    pool.allocate("b")
    before = pool.cache.clone()
    with pytest.raises(OutOfPages, match="3 more pages of 2 tokens are needed, 2 are free"):
        pool.append(["a", "b"], torch.zeros(6, 576), counts=[3, 3])
    with pytest.raises(ValueError, match="kv: got shape"):
        pool.append(["a", "b"], torch.zeros(5, 512), counts=[1, 4])
    assert torch.equal(pool.cache, before)
    assert (pool.length("a"), pool.length("b"), pool.num_free_pages) == (1, 0, 2)
    pool.append(["b", "a"], torch.zeros(5, 576), counts=[4, 1])
    assert (pool.length("a"), pool.length("b"), pool.num_free_pages) == (2, 4, 0)


def test_pages_are_used_again():
    pool = PagedKVCache(2, page_size=4, kv_format=KVCacheFormat.FP8_V4)
    for request in range(10):
        pool.allocate(request)
        pool.append([request], torch.full((8, 512), float(request)), counts=[8])
        assert pool.num_free_pages == 0
        values = pool.kv_format.gather(pool.cache, pool.slots(request, range(8)))
        assert torch.equal(values, torch.full((8, 512), float(request)))
        pool.free(request)


def test_descriptions_of_nobody():
    pool = PagedKVCache(2)
    pool.append([], torch.empty(0, 576))
    assert pool.block_table([]).shape == (0, 0)
    assert pool.seqlens([]).shape == (0,)
    pool.allocate("new")
    assert "new" in pool
    assert pool.block_table(["new"]).shape == (1, 0)
    assert pool.slots("new", []).shape == (0,)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="num_pages: got 0"):
        PagedKVCache(0)
    with pytest.raises(TypeError, match="page_size: got float"):
        PagedKVCache(1, page_size=64.0)
    with pytest.raises(ValueError, match="d: got 512, need 576 for NVFP4"):
        PagedKVCache(1, kv_format=KVCacheFormat.NVFP4, d=512)
    with pytest.raises(ValueError, match="need fewer than 2\\^31 tokens"):
        PagedKVCache(2**25)
    pool = PagedKVCache(4, page_size=2)
    pool.allocate("a")
    pool.append(["a"], torch.zeros(3, 576), [3])
    with pytest.raises(ValueError, match="num_tokens: got -1"):
        pool.allocate("b", -1)
    with pytest.raises(ValueError, match="counts: got 2 of them, need 1"):
        pool.append(["a"], torch.zeros(2, 576), [1, 1])
    with pytest.raises(ValueError, match="counts: got -1"):
        pool.append(["a"], torch.zeros(0, 576), [-1])
    with pytest.raises(TypeError, match="counts: got float, need an int"):
        pool.append(["a"], torch.zeros(2, 512), [2.0])
    with pytest.raises(TypeError, match="positions: got float32, need whole numbers"):
        pool.slots("a", [0.5, 1])
    with pytest.raises(TypeError, match="kv_format: got str, need a KVCacheFormat"):
        PagedKVCache(1, 4, "bf16")
    with pytest.raises(ValueError, match="positions: got 3, need 0 to 2, tokens of 'a'"):
        pool.slots("a", [0, 3])
    with pytest.raises(ValueError, match="positions: got -1"):
        pool.slots("a", torch.tensor([-1]))
    with pytest.raises(KeyError, match="request: 'b' is not in the cache"):
        pool.block_table(["a", "b"])
