"""What recorded_call.c compares, hands over and refuses."""

import pytest
import torch
import tvm_ffi

CONSTANT, WORKSPACE = -1, -2


class Kernel:
    """Notes what it is launched with."""

    def __init__(self):
        self.launches = []
        self.function = tvm_ffi.convert(lambda *arguments: self.launches.append(list(map(self.seen, arguments))))

    @staticmethod
    def seen(value):
        if isinstance(value, tvm_ffi.Tensor):
            return value.data_ptr(), tuple(value.shape), tuple(value.strides)
        return value

    @staticmethod
    def is_given(tensor):
        return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


class TestReplay:
    def test_the_kernel_gets_views_of_later_tensors_and_the_same_constants(self, record_call):
        kernel = Kernel()
        x, constant = torch.rand(4, 3, 6), torch.rand(5)
        flat = x[:, :, :2].transpose(0, 1)
        replay = record_call(
            kernel.function, 3, x, None, 0.5, 0, flat, CONSTANT, constant, 2, 0.5, CONSTANT, 7, 0, x, CONSTANT, 2.5
        )
        address = constant.data_ptr()
        del x, flat, constant
        assert not kernel.launches, "recording launches nothing"
        for scale in (1.5, -3.0):
            y = torch.rand(4, 3, 6)
            assert replay(y, None, scale) is True
            view, given, same, *rest = kernel.launches.pop()
            assert view == Kernel.is_given(y[:, :, :2].transpose(0, 1))
            assert given == (address, (5,), (1,))
            assert [same, *rest] == [scale, 7, Kernel.is_given(y), 2.5]

    def test_each_launch_has_a_workspace_of_its_own(self, record_call):
        kernel = Kernel()
        x, workspace = torch.rand(4), torch.rand(3, 50)
        replay = record_call(kernel.function, 1, x, 0, x, WORKSPACE, workspace)
        for _ in range(2):
            assert replay(x) is True
        for _, (address, *layout) in kernel.launches:
            assert layout == [(3, 50), (50, 1)]
            assert address not in (0, x.data_ptr(), workspace.data_ptr())

    @pytest.mark.parametrize(
        "other",
        [
            None,
            1,
            [1.0],
            torch.rand(4, 3, 8),
            torch.rand(4, 18),
            torch.rand(4, 3, 6, 1),
            torch.rand(3, 4, 6).transpose(0, 1),
            torch.rand(4, 3, 12)[:, :, ::2],
            torch.rand(4, 3, 6).double(),
            torch.rand(4, 3, 6).view(torch.int32),
        ],
        ids=lambda value: f"{type(value).__name__}{list(value.stride()) if isinstance(value, torch.Tensor) else ''}",
    )
    def test_what_looks_different_is_left_alone(self, record_call, other):
        kernel = Kernel()
        x = torch.rand(4, 3, 6)
        replay = record_call(kernel.function, 2, x, None, 0, x)
        assert replay(other, None) is False
        assert replay(x, other if other is not None else x) is False
        assert replay(x) is False
        assert replay(x, None, None) is False
        assert not kernel.launches
        assert replay(x, None) is True

    @pytest.mark.parametrize(("dtype", "launched"), [(torch.uint8, 0), (torch.bfloat16, 0), (torch.int32, 1)])
    def test_rows_of_narrow_elements_stay_aligned(self, record_call, dtype, launched):
        kernel = Kernel()
        x = torch.zeros(80, dtype=dtype)
        x = x[(-x.data_ptr() % 16) // x.element_size() :][:65]
        replay = record_call(kernel.function, 1, x[:64], 0, x[:64])
        assert replay(x[1:]) is bool(launched)
        assert len(kernel.launches) == launched

    def test_what_a_kernel_raises_is_raised(self, record_call):
        def fail(*arguments):
            raise RuntimeError("CUDA error 1 at a kernel launch")

        replay = record_call(tvm_ffi.convert(fail), 1, 1.0, 0, 1.0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="CUDA error 1 at a kernel launch"):
                replay(1.0)

    def test_more_than_fits_is_refused(self, record_call):
        kernel = Kernel().function
        with pytest.raises(ValueError, match="more dimensions than are recorded"):
            record_call(kernel, 1, torch.zeros(1, 1, 1, 1, 1, 1), 0, 0)
        with pytest.raises(ValueError, match="more arguments than are recorded"):
            record_call(kernel, 41, *[1] * 41)
        with pytest.raises(ValueError, match="more arguments than are recorded"):
            record_call(kernel, 0, *[1] * 82)
