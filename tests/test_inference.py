"""Rows through a model a batch at a time: the rows' order, whole tensors or one a row, no gradients, memory."""

import numpy as np
import pytest
import torch

from discobeta.data.batches import PerToken
from discobeta.errors import UserError
from discobeta.model.inference import in_batches

LENGTHS = np.array([3, 9, 1, 9, 5])


def test_values_come_back_in_the_order_of_the_rows_though_the_longest_go_first():
    seen = []

    def of_batch(indices):
        seen.append(indices.tolist())
        rows = torch.from_numpy(indices)
        return {"number": rows * 10, "pair": torch.stack([rows, -rows], 1).float()}

    found = in_batches(LENGTHS, 2, of_batch, step="a test")
    assert seen == [[1, 3], [4, 0], [2]]
    assert found["number"].tolist() == [0, 10, 20, 30, 40] and found["number"].dtype == torch.int64
    assert found["pair"].tolist() == [[0, 0], [1, -1], [2, -2], [3, -3], [4, -4]]


def test_what_is_said_of_tokens_comes_back_in_the_order_of_the_rows():
    def of_batch(indices):
        sizes = LENGTHS[indices]
        return {"tokens": PerToken(torch.arange(sizes.sum()), sizes)}

    found = in_batches(LENGTHS, 2, of_batch, step="a test")["tokens"]
    assert [len(values) for values in found] == found.sizes.tolist() == [3, 9, 1, 9, 5]
    assert found[0].tolist() == [5, 6, 7] and found[3].tolist() == list(range(9, 18))  # the second of their batches
    assert found.of(np.array([4, 2])).tolist() == [0, 1, 2, 3, 4, 0]
    assert found.values.untyped_storage().nbytes() == 8 * 27


def test_no_gradient_is_kept():
    weight = torch.ones(1, requires_grad=True)
    found = in_batches(LENGTHS, 2, lambda indices: {"value": weight.expand(len(indices)) * 2}, step="a test")
    assert not found["value"].requires_grad and found["value"].tolist() == [2.0] * 5


def test_what_is_never_said_is_not_there():
    assert in_batches(LENGTHS, 2, lambda indices: {}, step="a test") == {}


def test_lack_of_memory_is_one_line_that_says_what_to_lower():
    def of_batch(indices):
        raise MemoryError

    with pytest.raises(UserError, match="^out of memory in a test: lower the batch$"):
        in_batches(LENGTHS, 2, of_batch, step="a test", lower="the batch")
