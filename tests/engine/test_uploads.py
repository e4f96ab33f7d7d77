"""Index arrays sent to a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmfast.engine import uploads

CPU, META = torch.device("cpu"), torch.device("meta")
ARRAYS = [
    np.arange(5),
    np.arange(3, dtype=np.int32),
    np.zeros(0, np.int64),
    np.array([True, False, True]),
    np.ones((2, 3)),
]


@pytest.mark.parametrize("send", [uploads.sent, uploads._in_one_copy])
def test_arrays_keep_dtype_shape_and_values(send):
    for array, got in zip(ARRAYS, send(ARRAYS, CPU)):
        want = torch.from_numpy(array)
        assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)


def test_on_a_cpu_nothing_is_copied_and_elsewhere_all_at_once():
    assert all(t.data_ptr() == a.ctypes.data for a, t in zip(ARRAYS, uploads.sent(ARRAYS, CPU)) if a.size)
    there = uploads.sent(ARRAYS, META)
    assert [(t.dtype, tuple(t.shape)) for t in there] == [(torch.from_numpy(a).dtype, a.shape) for a in ARRAYS]
    assert len({t.untyped_storage()._cdata for t in there}) == 1 and all(
        t.storage_offset() * t.itemsize % 16 == 0 for t in there
    )


def test_what_is_sent_says_when_it_changes_in_inference_mode_too():
    with torch.inference_mode():
        there = uploads.sent(ARRAYS, META)
        before = [t._version for t in there]
        there[0].add_(1)
    assert not any(t.is_inference() for t in there) and there[0]._version > before[0]


def test_a_buffer_is_filled_where_it_lies():
    with torch.inference_mode():
        buffer = uploads.Buffer(ARRAYS, CPU)
        there, before = [t.data_ptr() for t in buffer.tensors], [t._version for t in buffer.tensors]
        buffer.fill([array + 1 if array.dtype != bool else ~array for array in ARRAYS])
    for array, t in zip(ARRAYS, buffer.tensors):
        want = torch.from_numpy(array)
        assert torch.equal(t, ~want if want.dtype == torch.bool else want + 1) and not t.is_inference()
    assert [t.data_ptr() for t in buffer.tensors] == there and all(
        t._version > version for t, version in zip(buffer.tensors, before)
    )
    with pytest.raises(ValueError, match=r"Expected torch.int64 of shape \(5,\), got torch.int64 of \(6,\)"):
        buffer.fill([np.arange(6), *ARRAYS[1:]])


def test_strided_arrays_are_sent_as_they_read():
    turned = np.arange(12).reshape(3, 4).T[::-1]
    assert uploads.sent([turned], CPU)[0].tolist() == turned.tolist()


def test_a_plan_adds_and_then_sends():
    made = uploads.Uploads()
    first, second = made.add(np.arange(3)), made.add(np.arange(2))
    made.send(CPU)
    assert made[second].tolist() == [0, 1] and made[first].tolist() == [0, 1, 2]
