"""A conversation on a terminal: the checkpoint's Jinja chat template, several turns, thinking shown dimmed."""

import datetime
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ring_jax.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
DIM, PLAIN = "\033[2m", "\033[0m"
Message = dict[str, str]


class ChatTemplate:
    """A chat template as Hugging Face tokenizers state it: Jinja, in a sandbox, with the names that templates expect."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not Jinja: {error}") from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def of_files(cls, files: Mapping[str, str]) -> "ChatTemplate | None":
        """Return the template of a checkpoint's files (chat_template.jinja, else tokenizer_config.json), None if they have none."""
        try:
            config = dict(json.loads(files.get("tokenizer_config.json", "{}")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"tokenizer_config.json is not JSON: {error}") from None
        source = files.get("chat_template.jinja") or config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}.get("default")
        if not source:
            return None
        tokens = {name: config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(name)}
        return cls(source, {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()})

    def render(self, messages: Iterable[Message], enable_thinking: bool | None) -> str:
        """Return the prompt of a conversation, up to where the reply begins. Raises ValueError for messages the template refuses."""
        options: dict[str, Any] = {"tools": None, "documents": None}
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **options, **self._special_tokens)
        except Exception as error:  # templates run code of their own
            raise ValueError(f"the chat template refuses this conversation: {error}") from None


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: marks what a model says, for training; here its body is text like all other."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class Thinking:
    """Tells the thinking in a streamed reply from the answer; tags may be cut anywhere."""

    def __init__(self, inside: bool):
        self.inside, self._held = inside, ""

    def push(self, text: str, last: bool = False) -> Iterator[tuple[bool, str]]:
        """Yield (whether it is thinking, text) for what is certain after one more piece; the tags themselves are left out."""
        self._held += text
        while True:
            tag = END_THINK if self.inside else THINK
            before, found, after = self._held.partition(tag)
            if not found:
                break
            if before:
                yield self.inside, before
            self.inside, self._held = not self.inside, after
        keep = 0 if last else next((n for n in range(len(tag) - 1, 0, -1) if self._held.endswith(tag[:n])), 0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if certain:
            yield self.inside, certain


def chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    reply: Callable[[list[int]], Iterator[str]],
    turns: Iterable[str],
    *,
    system: str | None = None,
    enable_thinking: bool | None = None,
    write: Callable[[str], Any] = sys.stdout.write,
    dim: bool = False,
) -> list[Message]:
    """Answer each turn of the user as it comes, and return the conversation; reply(tokens) streams the model's text.

    Earlier turns go back to the model without their thinking, as the template's `reasoning_content`.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        prompt = template.render(messages, enable_thinking)
        thinking, parts = Thinking(prompt.rstrip().endswith(THINK)), {True: "", False: ""}
        shown = False
        try:
            for piece, last in _with_last(reply(tokenizer.encode(prompt))):
                for inside, text in thinking.push(piece, last):
                    if dim and inside != shown:
                        write(DIM if inside else PLAIN)
                    shown = inside
                    parts[inside] += text
                    write(text)
        finally:
            write((PLAIN if dim and shown else "") + "\n")
        message = {"role": "assistant", "content": parts[False].strip()}
        messages.append(message | {"reasoning_content": parts[True].strip()} if parts[True].strip() else message)
    return messages


def _with_last(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each piece, and an empty last one."""
    for piece in pieces:
        yield piece, False
    yield "", True


def typed_turns() -> Iterator[str]:
    """Yield what the user types, a line a turn, until the end of input; on a terminal after a prompt."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
