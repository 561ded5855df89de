"""Parts of a network by name."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from geomatch.errors import UsageError
from geomatch.nn.param_groups import check, path_of, within

PARAMS = {
    "encoder": {
        "fusion": {"kernel": np.zeros(1)},
        "trunk": {
            "stem": {"kernel": np.zeros(1)},
            "stage1_block1": {"conv1": {"kernel": np.zeros(1)}},
            "stage1_block2": {"conv1": {"kernel": np.zeros(1)}},
            "stage2_block1": {"conv1": {"kernel": np.zeros(1)}},
            "stage10": {"kernel": np.zeros(1)},
        },
        "head": {"Dense_0": {"kernel": np.zeros(1)}},
    },
    "pair_head": {"kernel": np.zeros(1)},
    "log_temperature": np.zeros(()),
}


def names(part):
    """What a part holds."""
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
    return {"/".join(path).removesuffix("/kernel") for path in paths if within(path, part)}


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ("fusion", {"encoder/fusion"}),
        (
            "trunk",
            {
                "encoder/trunk/stem",
                "encoder/trunk/stage1_block1/conv1",
                "encoder/trunk/stage1_block2/conv1",
                "encoder/trunk/stage2_block1/conv1",
                "encoder/trunk/stage10",
            },
        ),
        ("trunk/stem", {"encoder/trunk/stem"}),
        # Not the tenth.
        (
            "trunk/stage1",
            {"encoder/trunk/stage1_block1/conv1", "encoder/trunk/stage1_block2/conv1"},
        ),
        ("trunk/stage10", {"encoder/trunk/stage10"}),
        ("trunk/stage1_block2", {"encoder/trunk/stage1_block2/conv1"}),
        ("trunk/stage1_block2/conv1", {"encoder/trunk/stage1_block2/conv1"}),
        # Not the pair's.
        ("head", {"encoder/head/Dense_0"}),
        ("pair_head", {"pair_head"}),
        ("log_temperature", {"log_temperature"}),
        ("stage1", set()),
        ("trunk/stage3", set()),
        ("tru", set()),
        ("", set()),
        ("batch_norm", set()),
    ],
)
def test_a_part_holds_what_its_name_begins(part, wanted):
    assert names(part) == wanted


def test_a_module_is_of_a_part_with_and_without_the_encoder_around_it():
    assert within(("trunk", "stage2_block1"), "trunk/stage2")
    assert within(("encoder", "trunk", "stage2_block1"), "trunk/stage2")


def test_parts_that_are_there_pass():
    check(["trunk", "trunk/stage1", "head", "pair_head", "fusion"], PARAMS, "train.freeze")


@pytest.mark.parametrize("part", ["trnk", "trunk/stage3", "batch_norm", "stage1", ""])
def test_an_unknown_part_is_refused_and_the_known_ones_are_named(part):
    with pytest.raises(UsageError, match=r"train.freeze: .*no parameter group") as error:
        check(["trunk", part], PARAMS, "train.freeze")
    assert repr(part) in error.value.message
    assert "fusion, head, log_temperature, pair_head, trunk;" in error.value.hint
    assert "encoder" not in error.value.hint
