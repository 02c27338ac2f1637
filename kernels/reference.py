"""Attention over pages in plain torch, one sequence at a time: the definition of correct for `paged_decode` and `paged_prefill`.

Only what the kernels may look at is read: pages before a window, slots behind the newest token and rows of inactive entries are not.
Values of arguments are read on the host, so a call synchronises: for checks, never for a hot path.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_decode_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: Tensor,
    context: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """`paged_decode` in type `compute`: [batch, heads, head_dim]."""
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    for entry, (row, length) in enumerate(zip(rows.tolist(), context.tolist())):
        if length:
            keys = _Keys(k_pages, v_pages, page_table[row], max(0, length - window) if window else 0, length)
            out[entry] = _attend(q[entry : entry + 1], keys, length - 1, scale, window, softcap, compute)[0]
    return out


def paged_prefill_reference(
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
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """`paged_prefill` in type `compute`: [tokens, heads, head_dim]; zeros where no sequence owns the token."""
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    for row, start, length, position in zip(rows.tolist(), q_start.tolist(), q_len.tolist(), q_pos.tolist()):
        if length:
            first = max(0, position - window + 1) if window else 0
            keys = _Keys(k_pages, v_pages, page_table[row], first, position + length)
            chunk = slice(start, start + length)
            out[chunk] = _attend(q[chunk], keys, position, scale, window, softcap, compute)
    return out


class _Keys:
    """K and V of positions [first, end) of one sequence, gathered from its pages: [tokens, kv_heads, head_dim]."""

    def __init__(self, k_pages: Tensor, v_pages: Tensor, table: Tensor, first: int, end: int) -> None:
        self.first = first
        self.positions = torch.arange(first, end, device=table.device)
        page_size = k_pages.shape[2]
        self._pages = table[self.positions // page_size].long()
        self._slots = self.positions % page_size
        self._k_pages, self._v_pages = k_pages, v_pages

    def get(self, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        k = self._k_pages[self._pages, :, self._slots].to(compute)
        v = self._v_pages[self._pages, :, self._slots].to(compute)
        return k, v


def _attend(
    q: Tensor, keys: _Keys, position: int, scale: float, window: int, softcap: float, compute: torch.dtype
) -> Tensor:
    """q: [queries, heads, head_dim] at positions `position`, `position` + 1, ..."""
    k, v = keys.get(compute)
    queries, heads, head_dim = q.shape
    grouped = q.to(compute).view(queries, k.shape[1], heads // k.shape[1], head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    own = torch.arange(position, position + queries, device=q.device)[:, None]
    hidden = keys.positions > own
    if window:
        hidden |= keys.positions <= own - window
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    return torch.einsum("hgqk,khd->qhgd", weights, v).reshape(queries, heads, head_dim)
