"""One long prompt through a linear attention layer, over several processes.

    torchrun --standalone --nproc-per-node 4 examples/context_parallel.py [TOKENS]

Each process makes its piece of the tokens and runs it. So that you can trust the result, each also runs all tokens by
itself afterwards and compares its piece; a program for prompts longer than one machine would leave that out.
"""

import sys

import torch
import torch.distributed as dist

import anydelta
import anydelta.distributed as over_ranks

H, HV, K, V, W = 2, 4, 64, 64, 4
C = 2 * H * K + HV * V


def tokens(T: int) -> dict[str, torch.Tensor]:
    """What the projections of a layer give for T tokens: the same in every process."""
    made = torch.Generator().manual_seed(0)
    sizes = {"qkv": C, "g": HV, "beta": HV, "z": HV * V}
    return {name: torch.randn(1, T, n, generator=made) for name, n in sizes.items()}


def main() -> None:
    T = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layer = dict(
        conv_weight=torch.full((C, W), 0.3), A_log=torch.linspace(-6, 0, HV), dt_bias=torch.zeros(HV),
        norm_weight=torch.ones(V),
    )  # fmt: skip
    conv_state, state = torch.zeros(1, C, W - 1), torch.zeros(1, HV, K, V)

    begin, end = rank * T // ranks, (rank + 1) * T // ranks
    piece = {name: x[:, begin:end] for name, x in tokens(T).items()}
    out, conv_last, last = over_ranks.gated_delta_mixer(piece.pop("qkv"), conv_state, state, **piece, **layer)

    one = tokens(T)
    want, conv_want, last_want = anydelta.gated_delta_mixer(one.pop("qkv"), conv_state, state, **one, **layer)
    same = (out - want[:, begin:end]).abs().max(), (last - last_want).abs().max()
    assert torch.equal(conv_last, conv_want)
    line = (
        f"rank {rank}: tokens {begin} to {end}; outputs differ by {same[0]:.0e}, the state by {same[1]:.0e}"
    )
    sys.stdout.write(line + "\n")  # at once, so that the lines of two processes stay apart
    assert max(same) < 1e-3
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
