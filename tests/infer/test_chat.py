"""Conversations: the template, the thinking, and the command."""

import io
import json
import shutil

import pytest
import tokenizers

from ring_jax.infer.__main__ import main
from ring_jax.infer.chat import DIM, PLAIN, ChatTemplate, Thinking, chat
from ring_jax.infer.generate import _Reply
from ring_jax.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("all_unoptimised")

TEMPLATE = """{% for message in messages %}
{% if message.role == 'user' %}
<role>HUMAN</role>{{ message.content }}<|role_end|>{% else %}
<role>{{ message.role | upper }}</role>{{ message.content }}<|role_end|>{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<role>ASSISTANT</role>{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}
{% endif %}"""


def template(**config):
    found = ChatTemplate.of_files({"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE} | config)})
    assert found is not None
    return found


def test_template_of_files():
    assert ChatTemplate.of_files({}) is None
    assert ChatTemplate.of_files({"tokenizer_config.json": "{}"}) is None
    messages = [{"role": "user", "content": "hi"}]
    assert template().render(messages, None) == "<role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role>"
    assert template().render(messages, True).endswith("<role>ASSISTANT</role><think>")
    own = {"tokenizer_config.json": '{"chat_template": "other", "bos_token": {"content": "<s>"}}', "chat_template.jinja": "{{ bos_token }}"}
    found = ChatTemplate.of_files(own)
    assert found is not None
    assert found.render(messages, None) == "<s>"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert template(chat_template=several).render(messages, None) == "y"


def test_template_mistakes():
    with pytest.raises(ValueError, match="the chat template is not Jinja"):
        template(chat_template="{% if %}")
    with pytest.raises(ValueError, match="refuses this conversation: only users"):
        template(chat_template="{{ raise_exception('only users') }}").render([], None)
    with pytest.raises(ValueError, match="refuses this conversation"):  # a sandbox
        template(chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}").render([], None)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        ChatTemplate.of_files({"tokenizer_config.json": "{"})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thinking_is_told_from_the_answer(size):
    """However the tags are cut; what only looks like one is text."""
    text = "<think>a < b </thin </think>An <answer> with <think>more</think>.<thi"
    thinking, parts, inside = Thinking(False), {True: "", False: ""}, []
    for at in range(0, len(text), size):
        for kind, piece in thinking.push(text[at : at + size]):
            parts[kind] += piece
            inside.append(kind)
    for kind, piece in thinking.push("", True):
        parts[kind] += piece
    assert parts == {True: "a < b </thin more", False: "An <answer> with .<thi"}
    assert inside[0]


def test_turns_see_what_was_said():
    """Earlier answers go back without their thinking; what is shown is dimmed while it is thinking."""
    prompts, replies, shown = [], iter([["<th", "ink>hm", "</think>", "four"], ["five"]]), []

    def reply(tokens):
        prompts.append(Tokenizer.bytes().decode(tokens))
        yield from next(replies)

    options = {"system": "be brief", "write": shown.append, "dim": True}
    messages = chat(template(), Tokenizer.bytes(), reply, ["2 + 2?", "and 1?"], **options)
    start = "<role>SYSTEM</role>be brief<|role_end|><role>HUMAN</role>2 + 2?<|role_end|><role>ASSISTANT</role>"
    assert prompts == [start, start + "four<|role_end|><role>HUMAN</role>and 1?<|role_end|><role>ASSISTANT</role>"]
    assert "".join(shown) == f"{DIM}hm{PLAIN}four\nfive\n"
    assert messages[2] == {"role": "assistant", "content": "four", "reasoning_content": "hm"}


def test_a_template_that_opens_the_thinking():
    shown = []
    chat(template(), Tokenizer.bytes(), lambda tokens: iter(["hm</think>yes"]), ["?"], enable_thinking=True, write=shown.append, dim=True)
    assert "".join(shown) == f"{DIM}hm{PLAIN}yes\n"


def test_what_templates_of_others_use():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content | tojson(ensure_ascii=True, sort_keys=True) }}{% endgeneration %}{% endfor %}"
    )
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "\u00e9"}], None) == '"\\u00e9"'


def test_tags_that_are_special_tokens():
    """Some tokenizers hold the tags as special tokens: the text of a conversation keeps them."""
    library = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    library.add_special_tokens(["<think>", "</think>"])
    tokenizer = Tokenizer(library)
    reply, tokens = _Reply(tokenizer, [], skip_special=False), tokenizer.encode("<think>hm</think>yes")
    assert len(tokens) == 7
    text = "".join(reply.add(token, False)[0] for token in tokens) + reply.end()
    assert list(Thinking(False).push(text, last=True)) == [(True, "hm"), (False, "yes")]


def test_command(model, capsys, monkeypatch, tmp_path):
    arguments = ["--checkpoint", str(model.folder), "--chat", "--max-tokens", "12", "--temperature", "0"]
    assert main(arguments) == 2
    assert "has no chat template" in capsys.readouterr().err
    folder = shutil.copytree(model.folder, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    arguments[1] = str(folder)
    assert main([*arguments, "--prompt", "x"]) == 2
    assert "--chat reads its turns from stdin" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    assert main(arguments) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first
    # The second turn sees the first one and its answer, which is the first token's worth of another prompt.
    prompt = f"<role>HUMAN</role>hello<|role_end|><role>ASSISTANT</role>{first.strip()}<|role_end|><role>HUMAN</role>again<|role_end|>"
    prompt += "<role>ASSISTANT</role>"
    assert main(["--checkpoint", str(folder), "--prompt", prompt, "--max-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == [second]
