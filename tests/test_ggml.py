"""Matrices in ggml's blocks: products and unpacked numbers, compared for every type of ggml."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from anydelta.ggml.library import PACKAGES, GgmlError, folders, library  # noqa: E402
from conftest import CPU_REASONS, without  # noqa: E402

if CPU_REASONS:
    pytest.skip("; ".join(CPU_REASONS), allow_module_level=True)  # tests/test_cpu.py fails then
if not folders():
    without(f"ggml's library is not here (pip install {next(iter(PACKAGES.values()))})")

from anydelta.ggml import torch_ops  # noqa: E402

KINDS = list(library().kinds.values())
ROWS, N = 70, 512
EIGHT_BITS = 2 * 3 / 127 / 12**0.5
"""Relative error of a product whose input was rounded to 8 bits (bench/measure/model.py), twice."""


@functools.cache  # some types are chosen slowly
def blocks(kind, rows: int = ROWS, n: int = N, seed: int = 0) -> torch.Tensor:
    """Blocks [rows, bytes], or numbers [rows, n], of random weights."""
    w = np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)
    if not kind.quantised:
        return torch.from_numpy(w).to(torch_ops.NUMBERS[kind.type])
    importance = np.ones(n, np.float32) if library().needs_matrix(kind) else None
    return torch.from_numpy(library().quantise(kind, w, importance))


def numbers(kind, w: torch.Tensor) -> torch.Tensor:
    return w.float() if not kind.quantised else torch_ops.numbers(w, kind.type, torch.float32)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_the_numbers_are_near_what_was_packed(kind):
    w = np.random.default_rng(0).standard_normal((ROWS, N)).astype(np.float32)
    bits = 8 * kind.bytes / kind.values
    error = relative(numbers(kind, blocks(kind)), torch.from_numpy(w))
    assert error < {True: 1.0, False: 0.4}[bits < 2.2]
    if bits >= 8:
        assert error < 0.01


@pytest.mark.parametrize("m", [1, 3, torch_ops.FEW_ROWS, torch_ops.FEW_ROWS + 1])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_products_are_those_of_the_numbers(kind, m):
    w = blocks(kind)
    x = torch.randn(m, N, generator=torch.Generator().manual_seed(m))
    want = x @ numbers(kind, w).T
    got = torch_ops.Blocks(w, kind.type).multiply(x)
    assert got.dtype == torch.float32
    assert relative(got, want) < EIGHT_BITS


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_results_do_not_depend_on_threads(name):
    kind = library().kind(name)
    w, before = torch_ops.Blocks(blocks(kind, rows=999), kind.type), torch.get_num_threads()
    x = torch.randn(4, N)
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((w.multiply(x), w.numbers(torch.bfloat16)))
    finally:
        torch.set_num_threads(before)
    for y, numbers_ in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(numbers_, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_picked(dtype):
    kind = library().kind("Q6_K")
    w = blocks(kind)
    whole = numbers(kind, w)
    rows = torch.tensor([[3, 0], [69, 3]])
    got = torch_ops.numbers(w, kind.type, dtype, rows)
    assert torch.equal(got, whole[rows.flatten()].to(dtype))
    with pytest.raises(IndexError, match="get_rows: requires indices from 0 to 69; got 70"):
        torch_ops.numbers(w, kind.type, dtype, torch.tensor([70]))


@pytest.mark.parametrize("T", [1, 5, 90])
def test_experts(T):
    """Few tokens go block by block, many expert by expert."""
    kind, E, k = library().kind("Q8_0"), 4, 2
    w = torch.stack([blocks(kind, rows=32, n=64, seed=e) for e in range(E)])
    dense = torch.stack([numbers(kind, x) for x in w])
    x = torch.randn(T, 64)
    ids = torch.randint(0, E, (T, k))
    got = torch_ops.experts(x, w, ids, kind.type)
    assert relative(got, torch.einsum("tn,tkrn->tkr", x, dense[ids])) < EIGHT_BITS
    with pytest.raises(IndexError, match="mul_mat_id: requires ids from 0 to 3; got 4"):
        torch_ops.experts(x[:1], w, torch.tensor([[0, E]]), kind.type)


def test_a_product_has_the_gradient_of_its_numbers():
    kind = library().kind("Q8_0")
    w, x = blocks(kind), torch.randn(3, N, requires_grad=True)
    torch_ops.linear(x, w, kind.type).sum().backward()
    assert torch.allclose(x.grad, numbers(kind, w).sum(0).expand(3, N), atol=1e-4)


def test_experts_have_the_gradient_of_their_numbers():
    kind = library().kind("Q8_0")
    w = torch.stack([blocks(kind, rows=32, n=64, seed=e) for e in range(3)])
    dense = torch.stack([numbers(kind, x) for x in w])
    x = torch.randn(4, 64, requires_grad=True)
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    got = torch_ops.experts(x, w, ids, kind.type)
    want = torch.einsum("tn,tkrn->tkr", x, dense[ids])
    assert torch.allclose(got, want, atol=1e-4)
    weights = torch.randn_like(got)
    for y in (got, want):
        y.backward(weights, retain_graph=True)
    assert x.grad is not None
    (one,) = torch.autograd.grad(got, x, weights)
    assert torch.allclose(x.grad, 2 * one, atol=1e-3)


def test_defaults_of_torch_do_not_count():
    """Nor does a default device: what ggml writes to lies beside what it reads."""
    kind = library().kind("Q8_0")
    w, x = blocks(kind), torch.randn(3, N)
    many = torch.randn(torch_ops.FEW_ROWS + 1, N)
    want = [torch_ops.linear(x, w, kind.type), torch_ops.linear(many, w, kind.type)]
    want.append(torch_ops.numbers(w, kind.type, torch.float32, torch.tensor([1])))
    rows = torch.tensor([1])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = [torch_ops.linear(x, w, kind.type), torch_ops.linear(many, w, kind.type)]
            got.append(torch_ops.numbers(w, kind.type, torch.float32, rows))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_operators_are_registered_as_torch_wants():
    kind = library().kind("Q8_0")
    w, x = blocks(kind), torch.randn(3, N)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.anydelta.ggml_linear, (x, w, kind.type), test_utils=checks)
    torch.library.opcheck(
        torch.ops.anydelta.ggml_numbers,
        (w, kind.type, torch.float32, torch.tensor([1, 2])),
        test_utils=checks,
    )
    ids = torch.tensor([[0, 1]])
    torch.library.opcheck(
        torch.ops.anydelta.ggml_experts, (x[:1], torch.stack([w, w]), ids, kind.type), test_utils=checks
    )


def test_what_is_no_matrix_is_refused():
    kind = library().kind("Q4_K")
    with pytest.raises(ValueError, match=r"requires blocks \[rows, bytes\] of Q4_K on the CPU"):
        torch_ops.Blocks(torch.zeros(3, 145, dtype=torch.uint8), kind.type)
    with pytest.raises(ValueError, match=r"requires a type of ggml .*; got 99"):
        torch_ops.kind_of(99)
    with pytest.raises(ValueError, match=r"requires x \[..., 512\] with these blocks; got \[1, 256\]"):
        torch_ops.linear(torch.zeros(1, 256), blocks(kind), kind.type)


def test_without_a_library_the_error_says_what_to_install(monkeypatch):
    from anydelta.ggml import library as module

    monkeypatch.setattr(module, "folders", dict)
    with pytest.raises(
        GgmlError, match=r"requires ggml's library; got: neither .* pip install 'anydelta\[gguf\]'"
    ):
        module.library.__wrapped__()
