"""Command line: train the demonstration model, export it, evaluate it, write its card.

python -P -m llmos.services.trainer --out DIR --seed 0 --steps N
python -P -m llmos.services.trainer --out DIR --evaluate-only DIR
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from llmos.services.trainer.card import write_card
from llmos.services.trainer.export import TrainingRecord, export_model, read_record
from llmos.services.trainer.families import FAMILIES
from llmos.services.trainer.model import new_model, num_parameters
from llmos.services.trainer.schedule import CONTINUED, FRESH, Limits, Plan
from llmos.services.trainer.training import ROW_LENGTHS, Summary, train
from llmos.services.trainer.vocabulary import train_tokenizer

logger = logging.getLogger("llmos.services.trainer")


def main() -> None:
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if arguments.evaluate_only is None:
        _train(arguments)
    if not arguments.no_card:
        write_card(arguments.evaluate_only or arguments.out, arguments.items)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -P -m llmos.services.trainer", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the trained model")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training text; of tokenizer and weights if they are new"
    )
    parser.add_argument("--continue", dest="start", type=Path, metavar="DIR", help="go on from an exported model")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--minutes", type=float, help="stop after this much wall time")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens in one step")
    parser.add_argument("--focus", nargs="*", default=[], choices=[family.task for family in FAMILIES], metavar="TASK")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--machine", default=platform.machine(), help="how the card names the machine")
    parser.add_argument("--items", type=int, default=200, help="held-out items for each task")
    parser.add_argument("--no-card", action="store_true", help="train and export only")
    parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="evaluate DIR and rewrite its card")
    arguments = parser.parse_args()
    if arguments.evaluate_only is None and (arguments.out is None or not (arguments.steps or arguments.minutes)):
        parser.error("training needs --out, and --steps or --minutes")
    return arguments


def _train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.start is None:
        earlier, schedule = None, FRESH
        tokenizer = train_tokenizer(arguments.seed)
        model = new_model(arguments.seed, tokenizer.get_vocab_size())
    else:
        earlier, schedule = read_record(arguments.start), CONTINUED
        tokenizer = Tokenizer.from_file(str(arguments.start / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(arguments.start, local_files_only=True, dtype=torch.float32)
    logger.info("%d parameters, %d threads", num_parameters(model), arguments.threads)

    def export(summary: Summary) -> None:
        record = _record(arguments, summary, num_parameters(model), earlier)
        export_model(model, tokenizer, record, arguments.out)
        logger.info("exported after %d steps", record.steps)

    limits = Limits(arguments.steps, arguments.minutes)
    plan = Plan(arguments.seed, limits, schedule, arguments.batch_tokens, tuple(arguments.focus))
    export(train(model, tokenizer, plan, on_rest=export))


def _record(
    arguments: argparse.Namespace, summary: Summary, parameters: int, earlier: TrainingRecord | None
) -> TrainingRecord:
    """Of the whole training: a continued run adds to what the earlier one did."""
    limit = f"--steps {arguments.steps}" if arguments.steps else f"--minutes {arguments.minutes:g}"
    command = f"python -P -m llmos.services.trainer --out DIR --seed {arguments.seed} {limit}"
    command += f" --batch-tokens {arguments.batch_tokens}"
    if arguments.focus:
        command += f" --focus {' '.join(arguments.focus)}"
    return TrainingRecord(
        command=command if earlier is None else f"{earlier.command} && {command} --continue DIR",
        seed=arguments.seed if earlier is None else earlier.seed,
        steps=summary.steps + (earlier.steps if earlier else 0),
        tokens=summary.tokens + (earlier.tokens if earlier else 0),
        seconds=round(summary.seconds + (earlier.seconds if earlier else 0.0), 1),
        loss=round(summary.loss, 4),
        machine=arguments.machine,
        threads=arguments.threads,
        parameters=parameters,
        lengths=sorted(set(ROW_LENGTHS)),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
    )


if __name__ == "__main__":
    main()
