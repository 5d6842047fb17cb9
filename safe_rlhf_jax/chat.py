"""Command line: `python -m safe_rlhf_jax.chat POLICY [POLICY]` talks to one policy, or to two side by side."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safe_rlhf_jax.cli import exit_status, prog
from safe_rlhf_jax.errors import ConfigError, UserError

HELP = """/reset             forget the conversation
/regenerate        answer the last message again
/temperature X     0 is greedy
/help              this list
/quit              leave (also Ctrl-D); Ctrl-C stops an answer"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; needs no JAX, so that `--help` starts no accelerator."""
    parser = argparse.ArgumentParser(
        prog=prog("chat"),
        description="Talks to one policy, or to two side by side, and scores each answer when scorers are given.",
        epilog="Examples: python -m safe_rlhf_jax.chat --config configs/quickstart.yaml sft ppo_lag\n"
        "          python -m safe_rlhf_jax.chat path/to/policy --reward path/to/rm --cost path/to/cm\n\n"
        f"Commands while talking:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policies", nargs="+", metavar="POLICY", help="a stage of --config, a folder, or a hub id")
    parser.add_argument("--config", metavar="FILE", help="config of a finished run: its stages may be named, its "
                        "template, reward and cost models are used")  # fmt: skip
    parser.add_argument("--reward", metavar="MODEL", help="reward model: a folder or a hub id")
    parser.add_argument("--cost", metavar="MODEL", help="cost model: a folder or a hub id")
    parser.add_argument(
        "--template",
        help="plain, beaver, alpaca, tokenizer or a .jinja file (default: that of --config, else the tokenizer's own, "
        "else plain)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help="give the best of N responses by the "
                        "reward model, with a cost model the best whose cost is within --cost-limit")  # fmt: skip
    parser.add_argument("--cost-limit", type=float, default=0.0, help="for --best-of (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a response (default %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the networks (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default %(default)s)")
    options = parser.parse_args(arguments)
    if len(options.policies) > 2:
        parser.error(f"one or two policies, not {len(options.policies)}")
    if options.temperature < 0:
        parser.error(f"--temperature {options.temperature}: must be 0 (greedy) or more")
    if options.best_of < 1:
        parser.error(f"--best-of {options.best_of}: must be 1 or more")
    return options


@dataclasses.dataclass
class Speaker:
    """One policy, its conversation so far, and its last answer."""

    name: str
    policy: Any  # a pipeline.Policy
    stream: Callable[..., Iterator[int]]
    max_positions: int  # tokens of prompt + response
    history: list[dict[str, str]] = dataclasses.field(default_factory=list)
    text: str = ""
    note: str = ""


@dataclasses.dataclass
class Chat:
    """State of a conversation."""

    speakers: list[Speaker]
    scorers: dict[str, Any]  # "reward", "cost": a pipeline.Scorer
    temperature: float
    max_tokens: int
    key: Any
    best_of: int = 1
    cost_limit: float = 0.0
    turns: int = 0

    def prompt_ids(self, speaker: Speaker) -> list[int]:
        """Returns the conversation in the policy's tokens; drops the oldest turns if it is too long."""
        from safe_rlhf_jax.data.conversations import encode

        while True:
            ids = encode(speaker.history, speaker.policy.template, speaker.policy.tokenizer).ids
            if len(ids) < speaker.max_positions:
                return ids
            if len(speaker.history) == 1:
                raise UserError(f"message of {len(ids)} tokens; {speaker.name} reads {speaker.max_positions - 1}")
            del speaker.history[:2]

    def answer(self, speaker: Speaker) -> Iterator[None]:
        """Streams an answer into `speaker.text`, then its scores into `speaker.note`; yields after every token.

        With `best_of` it streams that many answers, one after the other, and keeps the best.
        """
        import jax

        from safe_rlhf_jax.inference.sampling import Sampling

        speaker.text = speaker.note = ""
        prompt, tokenizer = self.prompt_ids(speaker), speaker.policy.tokenizer
        room = min(self.max_tokens, speaker.max_positions - len(prompt))
        answers: list[list[int]] = []
        key = jax.random.fold_in(self.key, self.turns)
        for i in range(self.best_of):
            answers.append([])
            for token in speaker.stream(
                prompt, jax.random.fold_in(key, i) if i else key, sampling=Sampling(self.temperature), max_tokens=room
            ):
                answers[-1].append(token)
                speaker.text = tokenizer.decode(answers[-1])
                speaker.note = f"answer {i + 1} of {self.best_of}" if self.best_of > 1 else ""
                yield
        scores = {
            signal: scorer.score_answers(speaker.policy, speaker.history, answers).tolist()
            for signal, scorer in self.scorers.items()
        }
        best = self.choose(scores) if self.best_of > 1 else 0
        speaker.text = tokenizer.decode(answers[best])
        ended = answers[best][-1] in speaker.policy.template.ends(tokenizer)
        cut = [] if ended else ["cut off at the length limit"]
        speaker.note = "  ".join([f"{signal} {values[best]:+.2f}" for signal, values in scores.items()] + cut)
        yield

    def choose(self, scores: dict[str, list[float]]) -> int:
        """Returns the index of the answer with the highest reward within the cost limit."""
        import jax.numpy as jnp

        from safe_rlhf_jax.inference.best_of_n import best_of_n

        costs = jnp.asarray([scores["cost"]], jnp.float32) if "cost" in scores else None
        index, _ = best_of_n(jnp.asarray([scores["reward"]], jnp.float32), costs, self.cost_limit)
        return int(index[0])

    def say(self, message: str, show: Callable[[], None]) -> None:
        """Sends a message to every policy; their answers stream side by side."""
        for speaker in self.speakers:
            speaker.history.append({"role": "user", "content": message})
        self.regenerate(show)

    def regenerate(self, show: Callable[[], None]) -> None:
        """Answers the last message (again)."""
        for speaker in self.speakers:
            if speaker.history and speaker.history[-1]["role"] == "assistant":
                speaker.history.pop()
        self.turns += 1
        running = [self.answer(speaker) for speaker in self.speakers]
        try:
            while running:
                running = [answer for answer in running if next(answer, "done") != "done"]
                show()
        except KeyboardInterrupt:
            pass  # partial answers stay
        except UserError:
            self.forget()
            raise
        for speaker in self.speakers:  # an empty answer is dropped: no template can write it
            if speaker.text.strip():
                speaker.history.append({"role": "assistant", "content": speaker.text})
            else:
                speaker.history.pop()

    def forget(self) -> None:
        """Ends the conversation."""
        for speaker in self.speakers:
            speaker.history.clear()


def load_chat(options: argparse.Namespace) -> Chat:
    """Opens the networks of a command line."""
    import jax

    from safe_rlhf_jax.inference.stream import Stream
    from safe_rlhf_jax.named_models import NamedModels

    models = NamedModels(options.config, options.template, options.dtype)
    policies = [models.policy(name) for name in options.policies]
    scorers = {}
    for signal in ("reward", "cost"):
        scorer_name = getattr(options, signal) or models.last_trained(signal)
        if scorer_name is not None:
            scorers[signal] = models.scorer(scorer_name, signal)
    rooms = [policy.module.config.generated_length for policy in policies]
    room = min(rooms + [scorer.module.config.max_positions for scorer in scorers.values()])
    speakers = [
        Speaker(name, p, Stream(p.module, p.variables["params"], eos_id=p.template.ends(p.tokenizer)), room)
        for name, p in zip(options.policies, policies, strict=True)
    ]
    if options.best_of > 1 and "reward" not in scorers:
        raise ConfigError(f"--best-of {options.best_of}: needs a reward model; name one with --reward")
    return Chat(
        speakers, scorers, options.temperature, options.max_tokens,
        jax.random.key(options.seed), options.best_of, options.cost_limit,
    )  # fmt: skip


def table(speakers: Sequence[Speaker]) -> Any:
    """Returns the answers as a table, one column for each policy."""
    from rich.table import Table
    from rich.text import Text

    out = Table(expand=True)
    for speaker in speakers:
        out.add_column(speaker.name, ratio=1)
    out.add_row(*(Text(speaker.text) for speaker in speakers))
    if any(speaker.note for speaker in speakers):
        out.add_row(*(Text(speaker.note, style="dim") for speaker in speakers))
    return out


def talk(chat: Chat) -> None:
    """Reads messages and commands until the end of the input."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    console.print("Type a message; /help lists the commands.", style="dim")
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        command, _, argument = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        if command == "/help":
            console.print(HELP)
        elif command == "/reset":
            chat.forget()
            console.print("Conversation reset.", style="dim")
        elif command == "/temperature":
            try:
                chat.temperature = parse_temperature(argument)
            except UserError as error:
                console.print(str(error), style="red")
        elif command == "/regenerate" and not all(speaker.history for speaker in chat.speakers):
            console.print("There is no message to answer yet.", style="red")
        elif command.startswith("/") and command != "/regenerate":
            console.print(f"{command}: no such command\n{HELP}", style="red")
        else:
            with Live(table(chat.speakers), console=console, refresh_per_second=12) as live:
                try:
                    show = lambda: live.update(table(chat.speakers))  # noqa: E731
                    chat.regenerate(show) if command == "/regenerate" else chat.say(line, show)
                except UserError as error:
                    console.print(f"{error}; conversation reset", style="red")
            if not console.is_terminal:
                console.print()  # Live leaves the line open


def parse_temperature(text: str) -> float:
    """Parses a temperature.

    Raises:
        UserError: If it is not a number from 0 on.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise UserError(f"/temperature {text!r}: give a number, 0 (greedy) or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chat; returns the exit status."""
    options = parse_arguments(arguments)

    def work() -> int:
        talk(load_chat(options))
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
