"""What `flash-mla check` runs, on the GPU: nothing that is served there is wrong."""

import pytest
import torch

from flash_mla.selfcheck import run_checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_is_wrong(seed):
    rows = run_checks(torch.device("cuda"), seed)
    assert [row for row in rows if row.verdict == "WRONG"] == []
    assert {row.mode for row in rows} >= {"planner kernel", "combine kernel"}
