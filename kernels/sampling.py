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

import torch
from torch import Tensor

from llmos.kernels.row_table import DeviceRows

MAX_TOP = 20  # most best tokens that are reported with their log-probabilities


class Sampler:
    """Workspace and launches for batches up to `max_batch`. Make it once; its results are overwritten by the next call.

    adjusts: also room for changed logits (penalties, biases, masks): 8 bytes times max_batch times vocab_size.
    Results, by batch entry: `tokens` int32[max_batch] (-1 = none); where asked for `logprobs` float32[max_batch] of the chosen token, and
    `top_ids` int32, `top_logprobs` float32[max_batch, MAX_TOP], of which the row's own number is written, best first.
    """

    def __init__(
        self, device: torch.device | str, max_batch: int, vocab_size: int, *, adjusts: bool = True
    ) -> None:
        raise NotImplementedError

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
        raise NotImplementedError
