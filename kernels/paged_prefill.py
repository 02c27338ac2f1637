"""Prefill attention over pages: chunks of several sequences, causal, each against its whole context so far.

`paged_prefill_reference` in `reference.py` says the same in plain torch.
"""

from __future__ import annotations

from torch import Tensor


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: Tensor,
    q_start: Tensor,
    q_len: Tensor,
    q_pos: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor,
) -> Tensor:
    """Attend, write the owned tokens of `out` [tokens, heads, head_dim] and return it.

    q: [tokens, heads, head_dim]. k_pages, v_pages: [num_pages, kv_heads, page_size, head_dim] of q's type, any distance between pages;
    the chunks' own K and V are in their pages already. page_table: int32[max_rows, max_pages].
    rows, q_start, q_len, q_pos: int32[sequences]: sequence i reads row rows[i] of the page table and owns tokens
    [q_start[i], q_start[i] + q_len[i]), which stand at positions q_pos[i], q_pos[i] + 1, ... of it. The caller vouches for:
    q_start ascending, q_start[i] + q_len[i] <= q_start[i + 1]; q_len may be 0. Tokens that no sequence owns keep what `out` held.
    """
    raise NotImplementedError
