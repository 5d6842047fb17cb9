"""Text encodings of a run: its tokenizer and template, and those of scorers that have their own."""

import dataclasses
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.templates import PROBE, TEMPLATES, Template, default_template, load_template
from safe_rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer, stored_ends
from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.peft_heads import tokenizer_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A tokenizer and a template."""

    tokenizer: Tokenizer
    template: Template

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return self.template.ends(self.tokenizer)

    @property
    def identity(self) -> list[Any]:
        """The settings that determine the ids of a text, as plain values."""
        hf_tokenizer, template = self.tokenizer.hf, self.template
        vocabulary = (
            hf_tokenizer.backend_tokenizer.to_str() if hf_tokenizer.is_fast else sorted(hf_tokenizer.get_vocab())
        )
        source = template.source or hf_tokenizer.get_chat_template()
        written = [list(map(list, template.options)), template.date, template.control_tokens]
        return [vocabulary, str(hf_tokenizer.special_tokens_map), self.ends, self.tokenizer.rows, source, written]


def open_encodings(config: cfg.RunConfig) -> tuple[dict[str, Encoding], Encoding]:
    """Returns {scorer: encoding} of those that have their own, and the run's.

    Responses end at the end tokens of any policy of the run. A text is usable if all its readers have its tokens.

    Raises:
        ValueError: If a tokenizer or template cannot be opened.
    """
    folders, scorers = model_folders(config), named_scorers(config)
    tokenizer = load_tokenizer(config.tokenizer)
    ends = {end for folder in policy_folders(config).values() for end in stored_ends(folder)}
    tokenizer = dataclasses.replace(tokenizer, ends=(*tokenizer.ends, *(ends & tokenizer.texts.keys())))
    name = config.template or default_template(tokenizer)
    ours = Encoding(tokenizer, run_template(config, name, tokenizer, config.template_options))
    found = {reference: own_encoding(config, ours, reference, where) for reference, where in scorers.items()}
    own = {reference: encoding for reference, encoding in found.items() if encoding is not None}
    sizes = [stored_rows(folder) for reference, folder in folders.items() if reference not in own]
    rows = min((size for size in sizes if size is not None), default=tokenizer.vocab_size)
    return own, dataclasses.replace(ours, tokenizer=tokenizer.for_rows(rows))


def run_template(config: cfg.RunConfig, name: str, tokenizer: Tokenizer, options: dict[str, Any]) -> Template:
    """Returns a template with the run's date and the run's handling of control tokens."""
    date, control_tokens = config.template_date.isoformat(), config.control_tokens
    return load_template(name, tokenizer, options=options, date=date, control_tokens=control_tokens)


def model_folders(config: cfg.RunConfig) -> dict[str, storage.Path]:
    """Returns {model: folder} of all models of a run that are in folders."""
    named = dict.fromkeys(reference for stage in config.stages for reference in references(stage).values())
    return {reference: folder for reference in named if (folder := model_folder(reference)) is not None}


def named_scorers(config: cfg.RunConfig) -> dict[str, str]:
    """Returns {model: its first use} of the models in folders that score."""
    named = [(stage.name, *reference) for stage in config.stages for reference in references(stage).items()]
    return {
        reference: f"{stage}: {field} {reference!r}"
        for stage, field, reference in reversed(named)
        if is_scorer(field) and model_folder(reference) is not None
    }


def policy_folders(config: cfg.RunConfig) -> dict[str, storage.Path]:
    """Returns {model: folder} of the models that do not score."""
    scorers = named_scorers(config)
    return {reference: folder for reference, folder in model_folders(config).items() if reference not in scorers}


def is_scorer(field: str) -> bool:
    """Says whether a field of a stage names a model that scores."""
    return field.startswith(("reward_model", "cost_model", "judges"))


def model_folder(reference: str) -> storage.Path | None:
    """Returns the folder behind `path:…` or `hf:…`, None if there is none (the check reports it if needed)."""
    prefix, _, rest = reference.partition(":")
    if not rest or prefix not in ("path", "hf"):
        return None
    try:
        return tokenizer_folder(hf.resolve(rest))
    except FileNotFoundError:
        return None


def references(stage: cfg.StageBase) -> dict[str, str]:
    """Returns the models that a stage names, by field."""
    return {field: use.reference for field, use in stage.models().items()}


def has_tokenizer(folder: storage.Path) -> bool:
    """Says whether there is a tokenizer in a folder."""
    return any(storage.is_file(folder / name) for name in TOKENIZER_FILES)


def stored_rows(folder: storage.Path) -> int | None:
    """Returns the embedding rows of the model in a folder, None if its config.json does not say."""
    try:
        rows = hf.read_config(folder).get("vocab_size")
    except ModelError:
        return None
    return rows if isinstance(rows, int) else None


def own_encoding(config: cfg.RunConfig, ours: Encoding, reference: str, where: str) -> Encoding | None:
    """Returns the encoding of a scorer if it differs from the run's, else None.

    It differs if `templates` names the scorer, if an id is another token than the run's, if it lacks a token of the
    run's template, or if its tokenizer has another chat template than the run.

    Raises:
        ConfigError: If its template is unknown.
    """
    folder, named = model_folder(reference), config.templates.get(reference)
    if folder is None or not has_tokenizer(folder):
        return None
    theirs = load_tokenizer(str(folder))
    theirs = theirs.for_rows(stored_rows(folder) or theirs.vocab_size)
    written = encode(PROBE, ours.template, ours.tokenizer).ids
    same = not ours.tokenizer.differing(theirs) and theirs.texts.keys() >= set(written)
    chat = theirs.hf.chat_template
    as_ours = chat in (None, exported_template(ours)) if named is None else named == config.template
    if same and as_ours:
        return None
    name = named or ("tokenizer" if chat else config.template or "tokenizer")
    if name == "tokenizer" and not chat:
        raise cfg.ConfigError(
            f"{where} has a tokenizer of its own, without a chat template; say how its texts are written: "
            f"templates: {{{reference!r}: …}}, one of {', '.join(TEMPLATES)} or a .jinja file"
        )
    return Encoding(theirs, run_template(config, name, theirs, {}))


def exported_template(encoding: Encoding) -> str:
    """Returns the Jinja source that is exported with a model; it also writes the opening tokens of a text."""
    template, tokenizer = encoding.template, encoding.tokenizer
    source: str = template.source or tokenizer.hf.get_chat_template()
    opening = "".join(tokenizer.texts[i] for i in tokenizer.prefix)
    return source if template.opens or not opening else f"{{{{ {opening!r} }}}}{source}"


def taught_end(tokenizer: Tokenizer, template: Template) -> int:
    """Returns the end token that stands after the responses of training texts."""
    return template.end if template.end in tokenizer.ends else tokenizer.eos_id


def described(run: Any) -> list[str]:
    """Returns the messages, shown once, about a run's encoding and end of texts."""
    tokenizer, template, end = run.tokenizer, run.template, run.template.end
    lines = []
    if run.config.template is None and template.source is None:
        lines.append("template: the tokenizer's own chat template")
    if len(run.ends) > 1 or end not in (None, tokenizer.eos_id):
        others = [i for i in tokenizer.ends if i != tokenizer.eos_id]
        parts = [f"the tokenizer's eos_token is {tokenizer.quoted([tokenizer.eos_id])}"]
        parts += [f"the model's generation_config.json names {tokenizer.quoted(others)}"] if others else []
        parts += [f"the template ends a turn with {tokenizer.quoted([end])}"] if end is not None else []
        taught = taught_end(tokenizer, template)
        lines.append(
            f"ends of responses: {'; '.join(parts)}. Generation stops at each, training teaches "
            f"{tokenizer.quoted([taught])}"
        )
    beside = storage.expanded(run.config.tokenizer.removeprefix("path:"))
    for folder in dict.fromkeys((beside, *policy_folders(run.config).values())):
        if unknown := [i for i in stored_ends(folder) if i not in tokenizer.texts]:
            lines.append(f"ends of responses: {folder} names {unknown}, which is no token of the tokenizer: not an end")
    written = template.render(tokenizer, PROBE, False).rpartition(PROBE[-1]["content"])[2].strip()
    if end is None and written and not written.startswith(tokenizer.texts[tokenizer.eos_id]):
        lines.append(
            f"template: ends a turn with {written!r}, for which the tokenizer has no token: it stays text, and only "
            f"behind the last turn stands an end, {tokenizer.quoted([tokenizer.eos_id])}"
        )
    if tokenizer.rows is not None and tokenizer.rows < tokenizer.vocab_size:
        beyond = [i for i in sorted(tokenizer.texts) if i >= tokenizer.rows]
        lines.append(
            f"tokenizer: no row of an embedding for {len(beyond)} tokens, such as {tokenizer.quoted(beyond[:3])}; a "
            "text that has one cannot be used"
        )
    for reference, own in run.own.items():
        same = "template" if not tokenizer.differing(own.tokenizer) else "tokenizer"
        lines.append(f"{reference}: has a {same} of its own; responses are decoded, written in it, and scored apart")
    return lines
