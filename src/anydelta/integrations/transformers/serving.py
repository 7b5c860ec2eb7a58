"""Transformers' continuous batching (generate_batch, ContinuousBatchingManager, transformers serve) for hybrid models.

Its cache gives each kind of layer an allocator of blocks. Here is the one for linear attention. A block holds the
convolution windows and the states of all those layers for one request: one row in a pool per layer. A step is a packed
batch. `write_index`, which Transformers passes on unchanged, says where each sequence's row is.

A prompt's states are kept at every INTERVAL-th token while there is room. A call reads one row and writes another
(`snapshot_indices`), so nothing is copied. Prompts with the same beginning continue from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from transformers.generation.continuous_batching import cache as paged
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash
from transformers.generation.continuous_batching.cache_allocators.full_attention import (
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

from ..switch import Patch, guarded
from .tensor_parallel import ranks_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.generation.continuous_batching.cache_allocators import CachePool

    from ..switch import Place

LINEAR = "linear_attention"
INTERVAL = 256
"""The least number of tokens between two kept states; a multiple of the page size."""
ALIGNED = 64
"""Windows and states begin at multiples of this many bytes."""
ZEROS = 0
"""The block of Transformers' read trash. It is always zero, and new requests begin from it."""
SOURCE = 1 << 31
"""A place in write_index is SOURCE * the block to read + the block to write."""


class Sizes(NamedTuple):
    """The sizes of a layer's states."""

    C: int
    HV: int
    K: int
    V: int
    W: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        """The sizes of a config's linear attention, of the heads that this process has.

        Raises:
            ValueError: the config names them in a way that is not known here, or its other layers do not fit into
                Transformers' cache.
        """
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(
                f"continuous batching: requires attention with keys and values; got the latent attention of "
                f"{type(config).__name__}, which Transformers' cache does not hold. Use generate()"
            )
        get = config.to_dict().get
        if get("linear_num_value_heads"):
            H, HV = config.linear_num_key_heads, config.linear_num_value_heads
            K, V = config.linear_key_head_dim, config.linear_value_head_dim
        elif getattr(config, "linear_num_heads", None):
            H = HV = config.linear_num_heads
            K = V = config.linear_head_dim
        else:
            raise ValueError(
                f"continuous batching: requires linear_num_value_heads or linear_num_heads in the config; got "
                f"{type(config).__name__} without. Use generate()"
            )
        ranks = ranks_of(config)
        share = 1 if ranks is None else ranks.size
        return cls((2 * H * K + HV * V) // share, HV // share, K, V, config.linear_conv_kernel_dim)


class Round(NamedTuple):
    """Sequences that can run in one call."""

    tokens: torch.Tensor | None
    """Positions of their tokens. None: all tokens, in order."""
    cu_seqlens: torch.Tensor | None
    """int32. None: one token per sequence."""
    read: torch.Tensor
    written: torch.Tensor | None
    """[1, N]. None: the rows that are read."""


class LinearAttentionCacheAllocator(CacheAllocator):
    """A request has its own block from its first step on. It reads its state there, or where a prefix was kept."""

    supports_block_sharing = True
    supports_block_table = False
    layer_type = LINEAR
    rows_per_token = 1

    def __init__(
        self,
        index: int,
        config: PreTrainedConfig,
        num_key_value_heads: int,
        cache_dtype: torch.dtype,
        page_size: int,
        layer_indices: list[int],
        allow_block_sharing: bool,
    ) -> None:
        self.sizes, self.cache_dtype = Sizes.of(config), cache_dtype
        C, HV, K, V, W = self.sizes
        self.window_bytes = _up(C * (W - 1) * cache_dtype.itemsize, ALIGNED)
        self.layer_bytes = self.window_bytes + _up(HV * K * V * torch.float32.itemsize, ALIGNED)
        kinds = [kind for kind in config.layer_types if kind != LINEAR]
        page = FullAttentionCacheAllocator.get_bytes_per_page(
            num_key_value_heads, paged.find_head_dim(config), cache_dtype, page_size
        )
        others = [kinds.count(kind) * page for kind in set(kinds)]
        # Transformers looks for prefixes only where all kinds of layers share blocks: sliding attention does not.
        all_share = all(paged.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_sharing for kind in set(kinds))
        self._before_cache_tensor_init(
            index=index,
            layer_indices=layer_indices,
            tokens_per_page=_up(INTERVAL, page_size),
            bytes_per_page=0,
            allow_block_sharing=allow_block_sharing and all_share,
        )
        # A block is not cut into pages: this class chooses where its layers are.
        self.pages_per_block, self.tokens_per_block = 1, self.tokens_per_page
        self.block_physical_stride = self.rows_per_token * self.tokens_per_block
        self.bytes_per_page = self.bytes_per_block = _block_bytes(
            self.layer_bytes * len(layer_indices), others
        )
        self.own: dict[str, int] = {}
        """The block of each request."""
        self.kept: dict[str, int] = {}
        """The block with a request's state, if it is one that other requests may read."""
        self.new: dict[str, dict[int, int]] = {}
        """Blocks that receive the state after a number of tokens, in the current step."""
        self._rounds: tuple[object, list[Round]] | None = None

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: torch.Tensor, pool: CachePool
    ) -> None:
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
        self.write_trash_index = SOURCE * ZEROS + self.blocks_per_sector
        C, HV, K, V, W = self.sizes
        self.pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for i, layer in enumerate(self.layer_indices):
            at = i * self.layer_bytes
            conv = self._copy_view[:, at : at + C * (W - 1) * self.cache_dtype.itemsize]
            at += self.window_bytes
            state = self._copy_view[:, at : at + HV * K * V * torch.float32.itemsize]
            self.pools[layer] = (
                conv.view(self.cache_dtype).unflatten(1, (C, W - 1)),
                state.view(torch.float32).unflatten(1, (HV, K, V)),
            )

    # ---- Blocks

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        return int(request_id not in self.own)

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        if request_id not in self.own:
            [self.own[request_id]] = self.pool.get_free_blocks(self.index, 1)
        if self.use_block_sharing:
            every = self.tokens_per_page
            new = self.new.setdefault(request_id, {})
            for end in range(_up(past_length + 1, every), past_length + query_length + 1, every):
                if not self._room():
                    break
                if end not in new:
                    [new[end]] = self.pool.get_free_blocks(self.index, 1)
        self._tell(request_id)

    def _room(self) -> bool:
        """Whether there is a block for a kept state. Kept states are optional: they leave half of the memory free."""
        if (
            not self.pool.count_free_blocks(self.index)
            and 2 * self.pool.num_free_sectors > self.pool.num_sectors
        ):
            self.pool.allocate_sector(self.index)
        return bool(self.pool.count_free_blocks(self.index))

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        freed = list(self.new.pop(request_id, {}).values())
        kept = self.kept.pop(request_id, None)
        # A request that ends on a new state, or whose step fails, has its state in one of those already.
        if kept is not None and kept not in freed and self.ledger.release(kept, no_cache):
            freed.append(kept)
        if (own := self.own.pop(request_id, None)) is not None:
            freed.append(own)
        self.block_table.pop(request_id, None)
        self.pool.free_blocks(self.index, freed)

    def _tell(self, request_id: str) -> None:
        """Update the table that offloading and forks read: the block with the state is the first one."""
        blocks = (self.kept.get(request_id), self.own.get(request_id))
        self.block_table[request_id] = [block for block in blocks if block is not None]

    def _keep(self, request_id: str, block: int | None) -> None:
        """Set the block of a request's state: one that is referred to, or for None its own."""
        before = self.kept.pop(request_id, None)
        if block is not None:
            self.kept[request_id] = block
        if before is not None and before != block and self.ledger.release(before):
            self.pool.free_blocks(self.index, [before])
        self._tell(request_id)

    # ---- Forks: a state belongs to one request

    def count_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        return 0

    def count_non_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        return 1

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        [block] = self.pool.get_free_blocks(self.index, 1)
        self.own[dest_request_id] = block
        self._tell(dest_request_id)
        return self.block_table[source_request_id][:1], [block]

    # ---- Prefixes

    def match_prefix_blocks(self, prompt_ids: list[int]) -> list[int | None]:
        """The blocks after each INTERVAL of the prompt, up to the last one that exists; None where one is missing."""
        found: list[int | None] = []
        last, parent, every = 0, None, self.tokens_per_page
        for i in range((len(prompt_ids) - 1) // every):
            parent = compute_block_hash(parent, prompt_ids[i * every : (i + 1) * every])
            found.append(self.ledger.hash_to_block.get(parent))
            last = last if found[-1] is None else i + 1
        return found[:last]

    def acquire_prefix_blocks(self, request_id: str, prefix_len: int, block_ids: list[int]) -> None:
        block = block_ids[prefix_len // self.tokens_per_page - 1]
        self.ledger.acquire(block)
        self._keep(request_id, block)

    def mark_complete_blocks(self, request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
        """Share the states that the last step kept with other requests."""
        new = self.new.pop(request_id, {})
        parent, at, every = None, 0, self.tokens_per_page
        for end, block in sorted(new.items()):
            while at < end:
                parent = compute_block_hash(parent, token_ids[at : at + every])
                at += every
            other = self.ledger.register_new_hash(block, parent)
            read = self.kept.get(request_id) == block
            if read and other is not None:
                self.ledger.acquire(other)
                self._keep(request_id, other)  # and release the duplicate
            elif not read and self.ledger.release(block):
                self.pool.free_blocks(self.index, [block])

    # ---- Steps

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        return query_length

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        return []

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """A place for each token: the block that its piece of the sequence reads, and the one that it writes."""
        self._rounds = None
        own = self.own[request_id]
        read = self.kept.get(request_id, own if past_length else ZEROS)
        at, end, places = past_length, past_length + query_length, []
        new = self.new.get(request_id, {})
        # Before a fork the last token waits for another step, with the block for the state after it.
        self.pool.free_blocks(self.index, [new.pop(stop) for stop in sorted(new) if stop > end])
        for stop, block in sorted(new.items()):
            places += [SOURCE * read + block] * (stop - at)
            at, read = stop, block
        places += [SOURCE * read + own] * (end - at)
        # If the step ends on a kept state, the next step reads it there.
        self._keep(request_id, read if at == end else None)
        return places

    def _no_keys(self, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            "continuous batching: requires a layer with keys and values; got linear attention"
        )

    # Transformers calls these for attention layers alone: `supports_block_table` is False here.
    fill_block_table = update = get_cache_for_block_table = _no_keys

    def rounds(self, write_index: torch.Tensor) -> list[Round]:
        """The pieces of a step's sequences; a later piece waits for the earlier one. Read once for all layers."""
        version = 0 if write_index.is_inference() else write_index._version  # inference tensors have none
        key = (write_index.data_ptr(), write_index.numel(), version)
        if self._rounds is None or self._rounds[0] != key:
            self._rounds = (key, _rounds(write_index))
        return self._rounds[1]


def _rounds(places: torch.Tensor) -> list[Round]:
    found, lengths = torch.unique_consecutive(places, return_counts=True)
    device = places.device
    sources, targets = (found // SOURCE).tolist(), (found % SOURCE).tolist()
    ends = lengths.cumsum(0).tolist()
    depth: list[int] = []
    for i, source in enumerate(sources):
        depth.append(depth[-1] + 1 if i and source == targets[i - 1] and source != targets[i] else 0)
    rounds = []
    for d in range(max(depth) + 1):
        these = [i for i, x in enumerate(depth) if x == d]
        pieces = [(ends[i - 1] if i else 0, ends[i]) for i in these]
        read = [sources[i] for i in these]
        written = [targets[i] for i in these]
        sizes = torch.tensor([0, *(b - a for a, b in pieces)], dtype=torch.int32)
        single = int(sizes.sum()) == len(these)
        tokens = None
        if len(these) < len(sources):
            tokens = torch.cat([torch.arange(a, b) for a, b in pieces]).to(device)
        rounds.append(
            Round(
                tokens,
                None if single else sizes.cumsum(0).int().to(device),
                torch.tensor(read, dtype=torch.int32, device=device),
                None if read == written else torch.tensor([written], dtype=torch.int32, device=device),
            )
        )
    return rounds


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _block_bytes(least: int, others: list[int]) -> int:
    """A size of at least `least` bytes, whose least common multiple with the other sizes stays small."""
    other = max(others, default=ALIGNED)
    if other <= least:
        return _up(least, other)
    parts = next(n for n in range(other // least, 0, -1) if other % (n * ALIGNED) == 0)
    return other // parts


# ---- Patches of Transformers


class Entry(Patch):
    """Our allocator in Transformers' table of them."""

    def __init__(self) -> None:
        super().__init__(paged, "ATTN_TYPE_TO_ALLOCATOR", lambda theirs: theirs)

    def put(self) -> None:
        paged.ATTN_TYPE_TO_ALLOCATOR.setdefault(LINEAR, LinearAttentionCacheAllocator)

    def take(self) -> list[str]:
        if paged.ATTN_TYPE_TO_ALLOCATOR.get(LINEAR) is LinearAttentionCacheAllocator:
            del paged.ATTN_TYPE_TO_ALLOCATOR[LINEAR]
        return []


def patches(place: Place) -> Iterator[Patch]:
    """Everything that `enable()` replaces."""

    def patch(owner: type, name: str, make: Callable[[Any], Callable[..., Any]]) -> Patch:
        return Patch(owner, name, lambda theirs: guarded(theirs, make(theirs), place, name=name))

    yield Entry()
    yield patch(ContinuousBatchingIOs, "_setup_static_tensors", _with_lengths)
    yield patch(paged.PagedAttentionCache, "search_prefix_match", _with_prefixes)


def _with_lengths(theirs: Callable[..., None]) -> Callable[..., None]:
    """Add lengths and masks of linear attention: Transformers' inputs name those of two kinds of layers only."""

    def setup(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        if LINEAR not in self.cache.cache_allocators:
            return
        lengths = torch.zeros(self.max_requests_per_batch + 1, dtype=torch.int32, device=self.device)
        self.cumulative_seqlens_k[LINEAR] = lengths
        self.total_seqlen_k[LINEAR] = self.max_length_k[LINEAR] = 0
        if self.attention_mask is not None:  # nobody reads this mask
            self.attention_mask[LINEAR] = torch.empty(
                (1, 1, 0, 0), dtype=self.model_dtype, device=self.device
            )

    return setup


def _with_prefixes(theirs: Callable[..., int]) -> Callable[..., int]:
    """The longest prefix that has keys and values, and a state at its end."""

    def search(self: Any, request_id: str, prompt_ids: list[int]) -> int:
        linear = self.cache_allocators.get(LINEAR)
        if linear is None or not self.use_prefix_sharing:
            return theirs(self, request_id, prompt_ids)
        found = {name: a.match_prefix_blocks(prompt_ids) for name, a in self.cache_allocators.items()}
        most = min(
            len(blocks) * self.cache_allocators[name].tokens_per_page for name, blocks in found.items()
        )
        every, states = linear.tokens_per_page, found[LINEAR]
        length = next((n * every for n in range(most // every, 0, -1) if states[n - 1] is not None), 0)
        if length:
            for name, blocks in found.items():
                self.cache_allocators[name].acquire_prefix_blocks(request_id, length, blocks)
        return length

    return search
