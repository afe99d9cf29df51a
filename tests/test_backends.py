"""The choice between backends."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from flash_mla import backends
from flash_mla.problem import Mendable, SparsePrefillProblem

PROBLEM = SparsePrefillProblem(torch.device("cpu"), torch.bfloat16, 1, 1, 1, 576, 512, 1)


@pytest.fixture
def offer(monkeypatch):
    """Have these backends alone, each with its reason why not."""

    def give(**reasons):
        fakes = [SimpleNamespace(NAME=name, why_not=lambda _, why=why: why) for name, why in reasons.items()]
        monkeypatch.setattr(backends, "BACKENDS", tuple(fakes))
        monkeypatch.delenv("FLASH_MLA_BACKEND", raising=False)

    return give


def chosen():
    return backends.choose(PROBLEM).NAME


def test_the_first_that_can_serve_is_chosen(offer):
    offer(fast="cannot", middle=None, slow=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "middle"
    assert backends.explain(PROBLEM) == {"fast": "cannot", "middle": None, "slow": None}


def test_a_slower_one_for_a_reason_that_can_be_mended_gets_a_warning(offer):
    offer(fast=Mendable("its kernel is not compiled"), slow=None)
    with pytest.warns(UserWarning, match="sparse prefill runs on slow, slower than fast: its kernel is not compiled"):
        assert chosen() == "slow"


def test_a_forced_one_is_chosen_without_a_word(offer, monkeypatch):
    offer(fast=Mendable("its kernel is not compiled"), slow=None)
    monkeypatch.setenv("FLASH_MLA_BACKEND", "slow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "slow"


def test_an_unknown_name_is_refused_and_the_known_ones_told(offer, monkeypatch):
    offer(fast=None, slow=None)
    monkeypatch.setenv("FLASH_MLA_BACKEND", "quick")
    with pytest.raises(ValueError, match="FLASH_MLA_BACKEND: got 'quick', need one of fast, slow"):
        chosen()


def test_where_none_serves_each_tells_why(offer, monkeypatch):
    offer(fast="too old", slow=Mendable("its kernel is not compiled"))
    with pytest.raises(RuntimeError, match="no backend serves sparse prefill on cpu: fast: too old; slow: its kernel"):
        chosen()
    monkeypatch.setenv("FLASH_MLA_BACKEND", "fast")
    with pytest.raises(RuntimeError, match="the forced backend cannot serve sparse prefill on cpu: fast: too old"):
        chosen()
