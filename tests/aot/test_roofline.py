"""What a compiler says that ran out of memory."""

import pytest

from safe_rlhf_jax.aot.roofline import exhausted_memory


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5),
        ("the total memory required for HLO temporaries (72.00G) exceeds available HBM (15.75G).", 72),
    ],
)
def test_exhausted_memory_is_read_in_both_wordings(message, gibibytes):
    assert exhausted_memory(message, 16) == {"total": gibibytes * 2**30, "capacity": 16, "fits": False}


def test_another_error_is_no_exhausted_memory():
    assert exhausted_memory("INTERNAL: something else (72.00G)", 16) is None
