"""A GPU that is pretended: tensors on `cuda` have shapes and no values, tensors on the CPU are real.

It needs a process of its own, in which `load` comes before torch: autograd asks the device's guard for its stream, and
a build of torch for CPUs has none. What a GPU would do slowly or not at all is found: an operation on tensors of two
devices raises as it would there, and where the host waits for the device, `Cuda.waits` says at which line. What
comes back is then 1, or true, so that the code goes on; a response ends after TOKENS tokens.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import traceback
from contextlib import contextmanager
from itertools import count
from pathlib import Path

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {  // found by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>);
}
"""


TOKENS = 3


def build(folder: Path) -> Path | None:
    """The guard as a library; None where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    torch = Path(importlib.util.find_spec("torch").origin).parent
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    words = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", str(source), "-o", str(library)]
    subprocess.run([compiler, *words, f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
    return library


def load(library: Path) -> None:
    """To be called before torch is imported."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    for path in (torch / "lib" / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def pretended_cuda():
    """A context in which `cuda` is such a device, and autocast, attention and transformers' masks know of it; gives the
    `Cuda` whose `waits` grow."""
    import torch
    import transformers.utils.import_utils as of_transformers
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import GenerationMixin

    from discobeta.run.memory import attention_on_gpu

    aten = torch.ops.aten
    INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)

    class Cuda(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.device = FakeTensorMode(allow_non_fake_inputs=True)
            self.waits: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            there = any(isinstance(tensor, FakeTensor) for tensor in tensors)
            target = kwargs.get("device")
            target = None if target is None else torch.device(target).type
            if function in (aten._pin_memory.default, aten.is_pinned.default):
                return args[0] if function is aten._pin_memory.default else False
            if not there and target != "cuda":
                return function(*args, **kwargs)
            if there and (function is aten._local_scalar_dense.default):
                self.wait(function)
                return torch.ones((), dtype=args[0].dtype).item()
            if there and function is aten.equal.default:
                self.wait(function)
                return True
            if there and target == "cpu":
                self.wait(function)
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if function is aten.copy_.default and not isinstance(args[0], FakeTensor):
                self.wait(function)
                return args[0].fill_(1)
            if function is aten._to_copy.default and not there:
                return self.upload(args[0], kwargs)
            if function in INDEXING:
                self.check_indices(function, args)
            try:
                with self.device:
                    return function(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                self.wait(function)
                raise

        def upload(self, tensor, kwargs):
            if not kwargs.get("non_blocking"):
                self.wait("blocking copy to the device")
            with self.device:
                return aten._to_copy.default(self.device.from_tensor(tensor.detach()), **kwargs)

        def move(self, module: torch.nn.Module, device, *_, **__) -> torch.nn.Module:
            """`Module.to`, which would exchange a real tensor for one without values only in part."""
            assert torch.device(device).type == "cuda"
            moved = {}
            dictionaries = [kept for part in module.modules() for kept in (part._parameters, part._buffers)]
            for place, name in [(kept, name) for kept in dictionaries for name in kept]:
                tensor = place[name]
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    if id(tensor) not in moved:
                        there = torch.empty_like(tensor, device="cuda", requires_grad=False)
                        is_weight = isinstance(tensor, torch.nn.Parameter)
                        there = torch.nn.Parameter(there, tensor.requires_grad) if is_weight else there
                        moved[id(tensor)] = there, tensor
                    place[name], _ = moved[id(tensor)]  # tied weights stay tied
            return module

        def check_indices(self, function, args):
            """A mask as index is looked for on the device, how many it picks; indices of the host are copied there."""
            for index in args[1]:
                if index is not None and not isinstance(index, FakeTensor):
                    self.wait(f"{function}, indices of the host")
                elif index is not None and index.dtype in (torch.bool, torch.uint8):
                    is_fill = function is not aten.index.Tensor and args[2].numel() == 1  # nothing is looked for
                    self.waits += [] if is_fill else [self.place(f"{function}, a mask")]

        def wait(self, what) -> None:
            self.waits.append(self.place(what))

        def place(self, what) -> str:
            frames = [
                frame for frame in traceback.extract_stack()
                if "/torch/" not in frame.filename and frame.filename != __file__
            ]  # fmt: skip
            ours = [frame for frame in frames if "/discobeta/" in frame.filename] or frames
            where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (ours[-1], frames[-1])]
            return f"{what} at {' < '.join(dict.fromkeys(reversed(where)))}: {frames[-1].line}"

    cuda, before = Cuda(), {}

    def replace(owner, name, value):
        before[owner, name] = getattr(owner, name)
        setattr(owner, name, value)

    replace(torch.nn.Module, "to", lambda module, *words, **named: cuda.move(module, *words, **named))
    replace(torch.cuda, "_lazy_init", lambda: None)
    replace(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    replace(torch.nn.functional, "scaled_dot_product_attention", attention_on_gpu)
    replace(of_transformers, "is_fake_tensor", lambda tensor: False)  # which would leave out what a GPU is asked
    asked = count(1)
    replace(GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: next(asked) % (TOKENS + 1) != 0)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes by here as a copy
    try:
        with torch.autograd.set_multithreading_enabled(False), cuda:  # a mode holds for its thread alone
            yield cuda
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        for (owner, name), value in before.items():
            setattr(owner, name, value)
