"""vLLM's steps (integrations/vllm) without vLLM: its metadata, pools and block tables are made here as it makes them.

What an engine does is played: requests of many lengths come and go, prompts in pieces, decodes, drafts that are
accepted in part, beside each other in one batch. Every output must be what the request's own tokens give in one call.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anydelta import gated_delta_mixer
from anydelta.integrations.vllm.core import Inputs, Parameters, run
from anydelta.integrations.vllm.step import step_of

W = 4


def parameters(H: int, HV: int, K: int, V: int, *, kda: bool, dtype: torch.dtype) -> Parameters:
    C = 2 * H * K + HV * V
    return Parameters(
        conv_weight=torch.randn(C, W).to(dtype) / 2,
        A_log=torch.rand(HV),
        dt_bias=torch.randn(HV * K if kda else HV).to(dtype),
        norm_weight=torch.rand(V).to(dtype) + 0.5,
        norm_eps=1e-6,
        norm_gate="sigmoid" if kda else "silu",
        conv_bias=torch.randn(C).to(dtype) / 4,
        lower_bound=-5.0 if kda else None,
        allow_neg_eigval=not kda,
    )


class Tokens:
    """The projections of some tokens."""

    def __init__(self, T: int, H: int, HV: int, K: int, V: int, *, kda: bool, dtype: torch.dtype):
        self.qkv = torch.randn(T, 2 * H * K + HV * V).to(dtype)
        self.g = torch.randn(*((T, HV, K) if kda else (T, HV))).to(dtype)
        self.beta = torch.randn(T, HV).to(dtype)
        self.z = torch.randn(T, HV * V).to(dtype)

    def __getitem__(self, some: slice) -> tuple[torch.Tensor, ...]:
        return self.qkv[some], self.g[some], self.beta[some], self.z[some]


class Request:
    def __init__(self, prompt: int, length: int, blocks: list[int], **shape: Any):
        self.tokens = Tokens(length, **shape)
        self.prompt, self.length, self.blocks = prompt, length, blocks
        self.done = 0
        """Tokens that the state has seen for good."""
        self.accepted = 1
        """Tokens of the last call that count, the first included."""
        self.outputs: list[torch.Tensor] = []


class Engine:
    """vLLM's runner for one layer, with a pool of pages that hold more than one layer's state."""

    def __init__(
        self, *, H: int, HV: int, K: int, V: int, kda: bool, dtype: torch.dtype, spec: int, dim_first: bool
    ):
        self.shape = dict(H=H, HV=HV, K=K, V=V, kda=kda, dtype=dtype)
        self.p = parameters(**self.shape)
        self.spec = spec
        C, S, blocks, page = 2 * H * K + HV * V, W - 1 + spec, 40, HV * K * V + 24
        self.free = list(range(1, blocks))
        pages = torch.full((blocks, 2 * page), torch.nan)
        self.state = pages[:, page : page + HV * K * V].view(blocks, HV, V, K).view(blocks, HV, K, V)
        conv = torch.full((blocks, 2, C * S), torch.nan, dtype=dtype)[:, 1]
        self.conv = conv.view(blocks, C, S) if dim_first else conv.view(blocks, S, C).transpose(1, 2)
        self.requests: list[Request] = []

    def add(self, prompt: int, length: int) -> Request:
        blocks = [self.free.pop(random.randrange(len(self.free))) for _ in range(self.spec + 1)]
        self.requests.append(Request(prompt, length, blocks, **self.shape))
        return self.requests[-1]

    def end(self, request: Request) -> None:
        self.requests.remove(request)
        self.free += request.blocks

    def step(self, budget: int) -> None:
        """Some tokens of each request, as a scheduler gives them out."""
        batch: list[tuple[Request, int, bool]] = []  # (request, tokens, whether drafted)
        for request in self.requests:
            if self.spec and request.done == 0 and request.prompt == 1:
                batch.append((request, 1, True))  # as vLLM does: a draft of none
                continue
            if request.done < request.prompt:
                count = min(request.prompt - request.done, budget)
            elif self.spec and (drafts := min(self.spec, request.length - request.done - 1)) >= 0:
                batch.append((request, 1 + random.randint(0, drafts), True))
                continue
            else:
                count = min(1, request.length - request.done)
            if count:
                budget -= count
                batch.append((request, count, False))
        # Decodes come first, and a first chunk counts as a prefill however short it is.
        batch.sort(key=lambda x: x[1] > 1 or x[0].done == 0)
        if any(drafted for *_, drafted in batch):
            random.shuffle(batch)
        if batch:
            self._call(batch)

    def _call(self, batch: list[tuple[Request, int, bool]]) -> None:
        given = []
        truth = []  # how many of the tokens are the request's own
        for request, count, drafted in batch:
            own = count
            tokens = request.tokens[request.done : request.done + count]
            if drafted:
                own = random.randint(1, count)
                other = Tokens(count, **self.shape)[0:count]
                tokens = tuple(torch.cat([x[:own], y[own:]]) for x, y in zip(tokens, other, strict=True))
            given.append(tokens)
            truth.append(own)
        padding = Tokens(3, **self.shape)[0:3]
        qkv, g, beta, z = (torch.cat(parts) for parts in zip(*given, padding, strict=True))
        out = torch.full_like(z, torch.nan)
        metadata = self._metadata(batch)
        run(step_of(metadata), Inputs(qkv, g, beta, z), self.conv, self.state, self.p, out)
        assert not out[metadata.num_actual_tokens :].any()
        at = 0
        for (request, count, _), own in zip(batch, truth, strict=True):
            request.outputs.append(out[at : at + own])
            at += count
            request.done += own
            request.accepted = own if request.done > request.prompt else 1

    def _metadata(self, batch: list[tuple[Request, int, bool]]) -> SimpleNamespace:
        lengths = torch.tensor([count for _, count, _ in batch])
        # A column of a block table that is longer, as vLLM's is.
        table = torch.zeros(len(batch), 7, dtype=torch.int32)
        for row, (request, *_) in enumerate(batch):
            table[row, : self.spec + 1] = torch.tensor(request.blocks)
        drafted = torch.tensor([x for *_, x in batch])
        new = torch.tensor([request.done == 0 for request, *_ in batch])
        m = SimpleNamespace(
            num_actual_tokens=int(lengths.sum()), spec_sequence_masks=None, num_spec_decodes=0,
            spec_query_start_loc=None, spec_state_indices_tensor=None, spec_token_indx=None, non_spec_token_indx=None,
            num_accepted_tokens=None, has_initial_state=None, num_decodes=0, num_prefills=0,
            non_spec_query_start_loc=None, non_spec_state_indices_tensor=None,
        )  # fmt: skip
        plain = ~drafted
        single = (lengths == 1) & ~new & plain
        m.num_decodes = int(single.sum()) if not drafted.any() else 0
        m.num_prefills = int(plain.sum()) - m.num_decodes
        if m.num_prefills:
            m.has_initial_state = ~new[plain]
        if plain.any():
            m.non_spec_query_start_loc = starts(lengths[plain])
            m.non_spec_state_indices_tensor = table[plain][:, 0] if drafted.any() else table[:, 0]
        if drafted.any():
            m.spec_sequence_masks = drafted
            m.num_spec_decodes = int(drafted.sum())
            m.spec_query_start_loc = starts(lengths[drafted])
            m.spec_state_indices_tensor = table[drafted][:, : self.spec + 1]
            m.num_accepted_tokens = torch.tensor([r.accepted for r, _, d in batch if d], dtype=torch.int32)
            m.anydelta_new = new[drafted]
            order = torch.argsort(torch.repeat_interleave(drafted, lengths), stable=True)
            count = int(lengths[plain].sum())
            m.non_spec_token_indx, m.spec_token_indx = order[:count], order[count:]
        return m

    def expected(self, request: Request) -> torch.Tensor:
        """The outputs of the request's own tokens, in one call of its own."""
        p, s = self.p, self.shape
        qkv, g, beta, z = (x.double().unsqueeze(0) for x in request.tokens[0 : request.done])
        conv = torch.zeros(1, qkv.shape[2], W - 1, dtype=torch.float64)
        state = torch.zeros(1, s["HV"], s["K"], s["V"], dtype=torch.float64)
        return gated_delta_mixer(
            qkv, conv, state, g=g, beta=beta, z=z, A_log=p.A_log.double(), dt_bias=p.dt_bias.double(),
            lower_bound=p.lower_bound, allow_neg_eigval=p.allow_neg_eigval, conv_weight=p.conv_weight.double(),
            conv_bias=p.conv_bias.double(), norm_weight=p.norm_weight.double(), norm_eps=p.norm_eps,
            norm_gate=p.norm_gate, backend="reference",
        )[0][0]  # fmt: skip


def starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()


SHAPES = {
    "gda": dict(H=2, HV=4, K=32, V=32, kda=False),
    "gda-odd": dict(H=1, HV=3, K=24, V=40, kda=False),
    "kda": dict(H=2, HV=2, K=32, V=32, kda=True),
}


@pytest.mark.parametrize("spec", [0, 1, 3])
@pytest.mark.parametrize("dim_first", [False, True], ids=["sd", "ds"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_gets_what_its_own_tokens_give(shape: str, dim_first: bool, spec: int):
    random.seed(0)
    torch.manual_seed(0)
    engine = Engine(**SHAPES[shape], dtype=torch.float32, spec=spec, dim_first=dim_first)
    seen = 0
    for turn in range(30):
        while len(engine.requests) < 4 and turn < 25:
            prompt = random.choice([1, 2, 3, 17, 64, 70])
            engine.add(prompt, prompt + random.choice([0, 1, 5, 9]))
        engine.step(budget=48)
        for request in list(engine.requests):
            if request.done == request.length or random.random() < 0.03:  # some leave early
                if request.done:
                    got = torch.cat(request.outputs).double()
                    torch.testing.assert_close(got, engine.expected(request), rtol=2e-4, atol=2e-5)
                    seen += 1
                engine.end(request)
    assert seen > 15
    assert engine.state[0].isnan().all()  # the null block
    assert engine.conv[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [0, 2])
def test_half_types(dtype: torch.dtype, spec: int):
    random.seed(1)
    torch.manual_seed(1)
    engine = Engine(**SHAPES["gda"], dtype=dtype, spec=spec, dim_first=False)
    request = engine.add(20, 30)
    while request.done < request.length:
        engine.step(budget=16)
    got, expected = torch.cat(request.outputs).double(), engine.expected(request)
    error = (got - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("spec", [0, 2])
def test_the_null_block_is_neither_read_nor_written(spec: int):
    torch.manual_seed(2)
    engine = Engine(**SHAPES["gda"], dtype=torch.float32, spec=spec, dim_first=False)
    here, nowhere = engine.add(5, 9), engine.add(5, 9)
    engine.step(budget=48)
    blocks, nowhere.blocks = nowhere.blocks, [0] * (spec + 1)
    engine.step(budget=48)
    torch.testing.assert_close(torch.cat(here.outputs).double(), engine.expected(here), rtol=2e-4, atol=2e-5)
    assert not nowhere.outputs[-1].any()
    assert engine.state[0].isnan().all()
    assert engine.conv[0].isnan().all()
    assert not engine.state[blocks[0]].isnan().any()


def test_groups_of_heads_are_taken_as_they_lie():
    """Qwen3-Next has q, k, v and z of a head beside each other."""
    torch.manual_seed(3)
    H, HV, K, V = 2, 4, 32, 16
    engine = Engine(H=H, HV=HV, K=K, V=V, kda=False, dtype=torch.float32, spec=2, dim_first=False)
    request = engine.add(6, 9)
    step = step_of(engine._metadata([(request, 6, False)]))
    qkv, g, beta, z = request.tokens[0:6]
    q, k, v = qkv.split([H * K, H * K, HV * V], -1)
    wide = torch.cat([x.view(6, H, -1) for x in (q, k, v, z)], -1)
    groups = wide.split([K, K, HV // H * V, HV // H * V], -1)
    out = torch.empty(6, HV * V)
    run(step, Inputs(groups[:3], g, beta, groups[3]), engine.conv, engine.state, engine.p, out)
    request.done = 6
    torch.testing.assert_close(out.double(), engine.expected(request), rtol=2e-4, atol=2e-5)
    # and drafted
    step = step_of(engine._metadata([(request, 3, True)]))
    qkv, g, beta, z = request.tokens[6:9]
    q, k, v = qkv.split([H * K, H * K, HV * V], -1)
    groups = torch.cat([x.view(3, H, -1) for x in (q, k, v, z)], -1).split(
        [K, K, HV // H * V, HV // H * V], -1
    )
    out = torch.empty(3, HV * V)
    run(step, Inputs(groups[:3], g, beta, groups[3]), engine.conv, engine.state, engine.p, out)
    request.done = 9
    torch.testing.assert_close(out.double(), engine.expected(request)[6:], rtol=2e-4, atol=2e-5)
