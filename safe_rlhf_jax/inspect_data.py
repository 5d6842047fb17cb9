"""Command line: `python -m safe_rlhf_jax.data` shows the data of the stages of a config, or of one stage."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from safe_rlhf_jax.cli import exit_status, prog
from safe_rlhf_jax.errors import ConfigError, UserError

KINDS = ("cost", "reward", "sft", "prompts")
TRIED = 100  # records, to find out which stages the data is for


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; needs no JAX."""
    parser = argparse.ArgumentParser(
        prog=prog("data"),
        description="Reads data as a stage would, and prints counts, lengths, truncation, labels, harm categories, "
        "what is skipped and why, duplicates, and two records as the model sees them: what the loss falls on is green, "
        "or in [[ ]] where the output is no terminal. The exit status is 1 where data cannot be used.",
        epilog="Examples: python -m safe_rlhf_jax.data --config configs/quickstart.yaml; "
        "python -m safe_rlhf_jax.data pairs.jsonl.gz --kind cost --tokenizer models/llama --template beaver",
    )
    parser.add_argument("name", nargs="?", help="a file, a folder, hf:OWNER/NAME, tfds:NAME or demo/…; or, with "
                        "--config, the first override")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="overrides of a config")
    parser.add_argument("--config", metavar="FILE", help="show the data of every stage of a config")
    parser.add_argument("--kind", choices=KINDS, help="kind of stage; default: the first one suited to the data")
    parser.add_argument("--split", default="train")
    parser.add_argument("--test-share", type=float, help="share of the prompts held out by --split test")
    parser.add_argument("--limit", type=int, help="take the first records only")
    parser.add_argument("--format", help="name of the format, if the columns are ambiguous")
    parser.add_argument("--field", action="append", default=[], metavar="FIELD=COLUMN", help="a column's other name")
    parser.add_argument("--unique", choices=("record", "prompt"), help="drop repeated records, or prompts")
    parser.add_argument("--tokenizer", default="demo", help="a folder or hub id; default: that of the embedded world, "
                        "which knows few other words")  # fmt: skip
    parser.add_argument("--template", help="plain, beaver, alpaca, tokenizer, or a .jinja file (default: the "
                        "tokenizer's own, else plain)")  # fmt: skip
    parser.add_argument("--max-length", type=int, default=512, help="maximum tokens of a text (default 512)")
    parser.add_argument(
        "--max-bad-records", type=float, default=0.05, help="share of records that may be unusable (default 0.05)"
    )
    options = parser.parse_args(arguments)
    if (options.name is None) == (options.config is None) and options.config is None:
        parser.error("name data, or a --config")
    if options.config is None and options.overrides:
        parser.error(f"one data set at a time; {options.overrides} are overrides of a --config")
    if not 0 <= options.max_bad_records <= 1 or options.max_length < 1:
        parser.error("--max-bad-records is a share from 0 to 1, --max-length a number of tokens above 0")
    for pair in options.field:
        if "=" not in pair:
            parser.error(f"--field {pair}: write FIELD=COLUMN")
    named = [pair.partition("=")[0] for pair in options.field]
    if twice := [field for field in named if named.count(field) > 1]:
        parser.error(f"--field: {twice[0]!r} is named twice")
    return options


@dataclasses.dataclass(frozen=True)
class Use:
    """A use of data by one stage."""

    title: str
    kind: str  # one of KINDS
    data: Any  # cfg.Mixture
    max_length: int  # tokens
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `load_prompts`


def uses_of(config: Any) -> Iterator[Use]:
    """Yields all uses of data by the stages of a config."""
    from safe_rlhf_jax.stages.common import located

    for stage in config.stages:
        options = {name: getattr(stage, name) for name in ("long_prompts", "group_field") if hasattr(stage, name)}
        for field, use in stage.datasets().items():
            more = options if use.reads == "prompts" else {}
            yield Use(f"{stage.name}: {field}", use.reads, located(config, use.data), use.max_length, more)


def use_of(options: argparse.Namespace, tokenizer: Any, template: Any) -> Use:
    """Returns the use given on the command line; without a kind, the first one that the data is suited for."""
    import pydantic

    from safe_rlhf_jax import config as cfg
    from safe_rlhf_jax.config.messages import explain_all
    from safe_rlhf_jax.stages.common import read_mixture

    fields = dict(pair.partition("=")[::2] for pair in options.field)
    try:
        data = cfg.Data(
            name=options.name, split=options.split, test_share=options.test_share, limit=options.limit,
            format=options.format, fields=fields, unique=options.unique,
        )  # fmt: skip
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(explain_all(cfg.Data, error.errors()).splitlines())) from None
    uses = [Use(kind, kind, data, options.max_length) for kind in KINDS if options.kind in (None, kind)]
    if len(uses) == 1:
        return uses[0]
    records = read_mixture(data)[:TRIED]
    for use in uses:
        with contextlib.suppress(UserError):
            load(use, records, tokenizer, template, max_bad=1.0)
            return use
    return uses[-1]


def load(use: Use, records: Sequence[Any], tokenizer: Any, template: Any, *, max_bad: float) -> Any:
    """Returns the examples of a stage from records."""
    from safe_rlhf_jax.data import examples
    from safe_rlhf_jax.stages.common import described

    shared: dict[str, Any] = {
        "max_length": use.max_length,
        "where": f"{use.title}: {described(use.data)}",
        "max_bad": max_bad,
    }
    if use.kind == "prompts":
        return examples.load_prompts(records, template, tokenizer, **shared, **use.options)
    if use.kind == "sft":
        return examples.load_supervised(records, template, tokenizer, **shared)
    return examples.load_pairs(records, template, tokenizer, safety=use.kind == "cost", **shared)


def main(arguments: Sequence[str] | None = None) -> int:
    """Shows data; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: inspect(options))


def inspect(options: argparse.Namespace) -> int:
    """Shows data; returns the exit status, 1 if some cannot be used."""
    from rich.console import Console

    from safe_rlhf_jax import config as cfg
    from safe_rlhf_jax.data.report import show
    from safe_rlhf_jax.data.sources import demo_tokenizer_warning
    from safe_rlhf_jax.data.templates import default_template, load_template
    from safe_rlhf_jax.data.tokenizer import load_tokenizer
    from safe_rlhf_jax.stages.common import described, read_mixture
    from safe_rlhf_jax.stages.encoding import open_encodings

    console, status = Console(highlight=False), 0
    if options.config is not None:
        run = cfg.load_config(options.config, [*filter(None, [options.name]), *options.overrides])
        named, max_bad, uses = run.tokenizer, run.max_bad_records, list(uses_of(run))
        _, encoding = open_encodings(run)
        tokenizer, template = encoding.tokenizer, encoding.template
    else:
        named, tokenizer = options.tokenizer, load_tokenizer(options.tokenizer)
        max_bad = options.max_bad_records
        template = load_template(options.template or default_template(tokenizer), tokenizer)
        uses = [use_of(options, tokenizer, template)]
    for use in uses:
        try:
            records = read_mixture(use.data)
            if warning := demo_tokenizer_warning(named, [part.name for part in cfg.parts_of(use.data)]):
                console.print(f"warning: {warning}", soft_wrap=True, markup=False)
            data = load(use, records, tokenizer, template, max_bad=max_bad)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        else:
            title = f"{use.title}: {described(use.data)}"
            show(console, title, records, data, tokenizer=tokenizer, max_length=use.max_length)
    return status


if __name__ == "__main__":
    sys.exit(main())
