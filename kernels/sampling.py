"""From logits to tokens on the device: the same rules, the same noise and so the same tokens as `services/executor/sampler.py`.

Order for a row: penalties (repetition, then presence and frequency), logit bias, no stop tokens before the least number of tokens, only
allowed tokens; temperature, top-k, top-p over what top-k left, min-p; then the largest of logit plus Gumbel noise. Temperature 0 takes the
largest logit, the smallest id of equals. Tokens that tie with the last one that a filter keeps are kept too. Log-probabilities are of the
model's own logits. A row's token depends on its own logits and record only: sums are cut into fixed tiles, whatever the batch is.

Parameters are read from the rows' records, so the launches can live in a CUDA graph: a batch bucket fixes their geometry, entries whose
row is -1 are skipped. A row whose logits are not finite, or of which every token is masked, gets the token -1 and harms nobody.
`sampling_reference.py` is the same in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from llmos.kernels.checks import FLOATS, INT32, Arguments, check_range
from llmos.kernels.row_table import RECORD_WORDS, DeviceRows
from llmos.kernels.sampling_adjust import bias_kernel, copy_kernel, count_kernel, penalise_kernel
from llmos.kernels.sampling_choose import choose_kernel
from llmos.kernels.sampling_report import report_kernel
from llmos.kernels.sampling_scan import FLOAT_FIELDS, INT_FIELDS, scan_kernel
from llmos.kernels.variants import TYPES, Variant

MAX_TOP = 20  # most best tokens that are reported with their log-probabilities
MAX_VOCAB = 2**24
TILE = 4096  # tokens of a program of the pass over all logits
LIST_TILE = 2048  # tokens of one step over listed groups
MAX_GROUPS = 4096  # a program holds the peaks of a row
HISTORY_PROGRAMS = 8  # per entry, that walk over its tokens
HISTORY_BLOCK = 1024
BIAS_BLOCK = 128
SCAN_WARPS, CHOOSE_WARPS, REPORT_WARPS, ADJUST_WARPS = 8, 8, 4, 4


def group_size(vocab_size: int) -> int:
    """Tokens that share a peak."""
    return max(64, triton.next_power_of_2(triton.cdiv(vocab_size, MAX_GROUPS)))


class Sampler:
    """Workspace and launches for batches up to `max_batch`. Make it once; its results are overwritten by the next call.

    adjusts: also room for changed logits (penalties, biases, masks): 8 bytes times max_batch times vocab_size.
    Results, by batch entry: `tokens` int32[max_batch] (-1 = none); where asked for `logprobs` float32[max_batch] of the chosen token, and
    `top_ids` int32, `top_logprobs` float32[max_batch, MAX_TOP], of which the row's own number is written, best first.
    """

    def __init__(self, device: torch.device | str, max_batch: int, vocab_size: int, *, adjusts: bool = True) -> None:
        check_range("max_batch", max_batch, 1, 65535)
        check_range("vocab_size", vocab_size, 1, MAX_VOCAB)
        self.max_batch, self.vocab_size, self.adjusts = max_batch, vocab_size, adjusts
        self.group = group_size(vocab_size)
        self.tile = min(TILE, max(self.group, triton.next_power_of_2(vocab_size)))
        self.num_tiles, self.num_groups = triton.cdiv(vocab_size, self.tile), triton.cdiv(vocab_size, self.group)
        self._list_groups = min(max(1, LIST_TILE // self.group), triton.next_power_of_2(self.num_groups))
        self._device = device
        self.tokens = self._ints(max_batch).fill_(-1)
        self.logprobs = self._floats(max_batch)
        self.top_ids, self.top_logprobs = self._ints(max_batch, MAX_TOP), self._floats(max_batch, MAX_TOP)
        self._tile_floats = self._floats(max_batch, FLOAT_FIELDS, self.num_tiles)
        self._tile_ints = self._ints(max_batch, INT_FIELDS, self.num_tiles)
        self._peaks, self._raw_peaks = (self._floats(max_batch, self.num_groups) for _ in range(2))
        self._lists = self._ints(max_batch, self.num_groups)
        size = max_batch * vocab_size if adjusts else 0
        self._adjusted = self._floats(size)
        self._counts = self._ints(size)  # all zeros between steps

    def _floats(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self._device)

    def _ints(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    @property
    def workspace_bytes(self) -> int:
        owned = (
            self._tile_floats,
            self._tile_ints,
            self._peaks,
            self._raw_peaks,
            self._lists,
            self._adjusted,
            self._counts,
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in owned)

    def sample(
        self,
        logits: Tensor,
        rows: Tensor,
        table: DeviceRows,
        *,
        adjust: bool = True,
        report: bool = True,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Choose a token for each entry; returns `tokens[:batch]`.

        logits: [batch, vocab_size] of any float type, any distance between rows, not changed. rows: int32[batch], -1 = skip.
        adjust, report: whether any row may have ADJUSTED set, or LOGPROBS; without, launches are saved and those columns ignored, so
        that a graph for plain batches does not pay for them. allowed: int32[masks, ceil(vocab_size / 32)], bit t % 32 of word t // 32
        is token t, for rows whose MASK is an index into it. The noise's position is the row's LENGTH.
        """
        sizes = Arguments(vocab_size=self.vocab_size, record_words=RECORD_WORDS)
        sizes.tensor("tokens", self.tokens, "max_batch", INT32)
        sizes.tensor("logits", logits, "batch vocab_size", FLOATS)
        sizes.tensor("rows", rows, "batch", INT32)
        sizes.tensor("table", table.records, "max_rows record_words", INT32, contiguous=2)
        check_range("batch", sizes["batch"], 0, self.max_batch)
        if allowed is not None:
            check_range("adjust (needed for allowed)", adjust, 1, 1)
            sizes.tensor("allowed", allowed, f"masks {triton.cdiv(self.vocab_size, 32)}", INT32)
        if adjust:
            check_range("adjusts (needed for adjust)", self.adjusts, 1, 1)
        batch = sizes["batch"]
        if not batch:
            return self.tokens[:0]
        if adjust:
            self._adjust(logits, rows, table, allowed)
        self._scan(logits, rows, table, adjust, report)
        self._choose(logits, rows, table, adjust)
        if report:
            self._report(logits, rows, table)
        return self.tokens[:batch]

    def _adjust(self, logits: Tensor, rows: Tensor, table: DeviceRows, allowed: Tensor | None) -> None:
        batch, vocab_size = logits.shape
        records, adjusted, counts = table.records, self._adjusted, self._counts
        masks = records if allowed is None else allowed
        copy_kernel[(batch, self.num_tiles)](
            logits,
            adjusted,
            rows,
            records,
            masks,
            logits.stride(0),
            masks.stride(0),
            vocab_size,
            MASKS=allowed is not None,
            TILE=self.tile,
            num_warps=SCAN_WARPS,
            enable_fp_fusion=False,
        )
        history = (table.tokens, counts, table.tokens.stride(0), vocab_size, HISTORY_PROGRAMS, HISTORY_BLOCK)
        grid = (batch, HISTORY_PROGRAMS)
        count_kernel[grid](rows, records, *history, num_warps=ADJUST_WARPS, enable_fp_fusion=False)
        penalise_kernel[grid](adjusted, rows, records, *history, num_warps=ADJUST_WARPS, enable_fp_fusion=False)
        bias_kernel[(batch,)](
            adjusted,
            rows,
            records,
            table.stops,
            table.bias_ids,
            table.bias_values,
            table.stops.stride(0),
            table.bias_ids.stride(0),
            vocab_size,
            BLOCK=BIAS_BLOCK,
            num_warps=ADJUST_WARPS,
            enable_fp_fusion=False,
        )

    def _scan(self, logits: Tensor, rows: Tensor, table: DeviceRows, adjust: bool, report: bool) -> None:
        scan_kernel[(len(logits), self.num_tiles)](
            logits,
            self._adjusted,
            rows,
            table.records,
            self._tile_floats,
            self._tile_ints,
            self._peaks,
            self._raw_peaks,
            logits.stride(0),
            self.vocab_size,
            self.num_tiles,
            self.num_groups,
            TILE=self.tile,
            GROUP=self.group,
            ADJUST=adjust,
            REPORT=report,
            FLOATS=FLOAT_FIELDS,
            INTS=INT_FIELDS,
            num_warps=SCAN_WARPS,
            enable_fp_fusion=False,
        )

    def _choose(self, logits: Tensor, rows: Tensor, table: DeviceRows, adjust: bool) -> None:
        choose_kernel[(len(logits),)](
            logits,
            self._adjusted,
            rows,
            table.records,
            self._tile_floats,
            self._tile_ints,
            self._peaks,
            self._lists,
            self.tokens,
            logits.stride(0),
            self.vocab_size,
            self.num_tiles,
            self.num_groups,
            GROUP=self.group,
            LIST_GROUPS=self._list_groups,
            BLOCK_TILES=triton.next_power_of_2(self.num_tiles),
            BLOCK_GROUPS=triton.next_power_of_2(self.num_groups),
            ADJUST=adjust,
            FLOATS=FLOAT_FIELDS,
            INTS=INT_FIELDS,
            num_warps=CHOOSE_WARPS,
            enable_fp_fusion=False,
        )

    def _report(self, logits: Tensor, rows: Tensor, table: DeviceRows) -> None:
        report_kernel[(len(logits),)](
            logits,
            rows,
            table.records,
            self._tile_floats,
            self._raw_peaks,
            self.tokens,
            self.logprobs,
            self.top_ids,
            self.top_logprobs,
            logits.stride(0),
            self.vocab_size,
            self.num_tiles,
            self.num_groups,
            GROUP=self.group,
            BLOCK_TILES=triton.next_power_of_2(self.num_tiles),
            BLOCK_GROUPS=triton.next_power_of_2(self.num_groups),
            MAX_TOP=MAX_TOP,
            FLOATS=FLOAT_FIELDS,
            num_warps=REPORT_WARPS,
            enable_fp_fusion=False,
        )


def variants() -> Iterator[Variant]:
    """Logits in bfloat16, plain and with everything, and in float32, for a vocabulary of 128 Ki to 256 Ki tokens."""
    history = "*i32 *i32 *i32 *i32 i32 i32 i32"
    block = {"BLOCK": HISTORY_BLOCK}
    yield Variant("sampling count", count_kernel, history, block, ADJUST_WARPS)
    yield Variant("sampling penalise", penalise_kernel, f"*fp32 {history}", block, ADJUST_WARPS)
    bias = "*fp32 *i32 *i32 *i32 *i32 *fp32 i32 i32 i32"
    yield Variant("sampling bias", bias_kernel, bias, {"BLOCK": BIAS_BLOCK}, ADJUST_WARPS)
    fields = {"FLOATS": FLOAT_FIELDS, "INTS": INT_FIELDS}
    group, tiles, groups = 64, 64, 4096
    for dtype in (torch.bfloat16, torch.float32):
        name = TYPES[dtype]
        masks = {"MASKS": True, "TILE": TILE}
        yield Variant(
            f"sampling copy {name}", copy_kernel, f"*{name} *fp32 *i32 *i32 *i32 i32:16 i32 i32", masks, SCAN_WARPS
        )
        types = f"*{name} *fp32 *i32 *i32 *fp32 *i32 *fp32 *{{}} i32:16 i32 i32 i32"
        for full in (False, True) if dtype == torch.bfloat16 else (True,):
            kind = f"{name}{' adjust report' if full else ''}"
            constants = {"TILE": TILE, "GROUP": group, "ADJUST": full, "REPORT": full, **fields}
            yield Variant(f"sampling scan {kind}", scan_kernel, types.format("fp32"), constants, SCAN_WARPS)
            constants = {
                "GROUP": group,
                "LIST_GROUPS": LIST_TILE // group,
                "BLOCK_TILES": tiles,
                "BLOCK_GROUPS": groups,
                "ADJUST": full,
                **fields,
            }
            choose = types.format("i32 *i32")
            yield Variant(f"sampling choose {kind}", choose_kernel, choose, constants, CHOOSE_WARPS)
        report = f"*{name} *i32 *i32 *fp32 *fp32 *i32 *fp32 *i32 *fp32 i32:16 i32 i32 i32"
        constants = {
            "GROUP": group,
            "BLOCK_TILES": tiles,
            "BLOCK_GROUPS": groups,
            "MAX_TOP": MAX_TOP,
            "FLOATS": FLOAT_FIELDS,
        }
        yield Variant(f"sampling report {name}", report_kernel, report, constants, REPORT_WARPS)
