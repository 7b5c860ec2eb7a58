"""Run anydelta_torch on another torch than the one it was built with, without Python's part of that torch.

    python scripts/other_torch.py LIBRARY...

LIBRARY: shared libraries in the order to load them, libtorch_cpu.so last, for instance from the unpacked wheels
nvidia-cuda-runtime, nvidia-cuda-cupti (where torch is a CUDA build) and torch:

    LIB/libcudart.so.13 LIB/libcupti.so.13 torch/lib/libc10.so torch/lib/libtorch_cpu.so

Loading registers the operators with that torch. One call through the stable C interface is compared with the float64
oracle, and a wrong one must be refused.
"""

from __future__ import annotations

import ctypes as c
import sys

import numpy as np

from anydelta.rule import reference, torch_library

B, T, H, HV, K, V = 2, 5, 2, 4, 8, 16


def main(paths: list[str]) -> None:
    ours, reason = torch_library.find()
    if ours is None:
        sys.exit(f"other_torch requires anydelta_torch; there is none: {reason}")
    try:
        torch = [c.CDLL(path, mode=c.RTLD_GLOBAL) for path in paths][-1]
    except OSError as error:
        sys.exit(f"other_torch requires shared libraries that load; got {error}")
    call = c.CDLL(str(ours), mode=c.RTLD_GLOBAL).aoti_torch_cpu_gated_delta_rule_
    assert "torch" not in sys.modules

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, n, d)) for n, d in ((H, K), (H, K), (HV, V)))
    g, beta = -rng.random((B, T, HV)), rng.random((B, T, HV))
    state = rng.standard_normal((B, HV, K, V))
    arrays = [np.ascontiguousarray(x, np.float32) for x in (q, k / 3, v, g, beta, state)]
    exact = [x.astype(np.float64) for x in arrays]
    want = reference.gated_delta_rule(
        *exact[:3], g=exact[3], beta=exact[4], initial_state=exact[5], decay="log"
    )

    def tensor(x: np.ndarray) -> c.c_void_p:
        handle, n = c.c_void_p(), x.ndim
        sizes, strides = (c.c_int64 * n)(*x.shape), (c.c_int64 * n)(*(s // x.itemsize for s in x.strides))
        kinds = c.c_int32(torch.aoti_torch_dtype_float32()), c.c_int32(torch.aoti_torch_device_type_cpu())
        data = x.ctypes.data_as(c.c_void_p)
        assert not torch.aoti_torch_create_tensor_from_blob(
            data, c.c_int64(n), sizes, strides, c.c_int64(0), *kinds, c.c_int32(0), c.byref(handle)
        )
        return handle

    # as the schemas have them: scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, its eps, layout, backend
    flags = (None, b"log", None, c.c_int32(0), b"interleaved", c.c_int32(0), c.c_double(1e-6), b"kv", b"auto")
    inputs, o, data = [tensor(x) for x in arrays], c.c_void_p(), c.c_void_p()
    assert call(*inputs, *[None] * 7, *flags, c.byref(o)) == 0
    assert not torch.aoti_torch_get_data_ptr(o, c.byref(data))
    got = np.ctypeslib.as_array(c.cast(data, c.POINTER(c.c_float)), (B, T, HV, V))
    errors = abs(got - want.o).max(), abs(arrays[5] - want.state).max()
    print(f"largest error: o {errors[0]:.1e}, state {errors[1]:.1e}")
    assert max(errors) < 1e-5
    refused = call(*inputs[:5], tensor(arrays[5][:, :, :4]), *[None] * 7, *flags, c.byref(o))
    assert refused == 1
    print("a wrong state was refused")


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
