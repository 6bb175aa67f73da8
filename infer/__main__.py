"""The inference commands: python -m ring_jax.infer [score | align] --checkpoint DIR ..."""

import argparse
import json
import os
import pathlib
import sys
import typing

from ring_jax.command_line import KERNELS, Parser, show_kernels
from ring_jax.hugepages import use_huge_pages

COMMANDS = ("score", "align")


def _common(command: str, description: str) -> Parser:
    prog = "python -m ring_jax.infer" + (f" {command}" if command else "")
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), help="of products (default: the checkpoint's)")
    kernels = "how ops are computed (default: auto, the platform's best; pallas on a CPU is interpreted); then the log names what runs"
    parser.add_argument("--kernels", choices=KERNELS, help=kernels)
    if command != "align":
        parser.add_argument("--numerics", choices=("aligned", "fast"), default="aligned", help="aligned: the trainer's bits (default)")
    return parser


def _generate_parser() -> Parser:
    parser = _common("", "Generate text. Other commands: score (log-probabilities of given tokens), align (the alignment report).")
    parser.add_argument("--prompt", metavar="TEXT", help="default: read from stdin")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help='a batch: lines {"prompt": ...}; prints one JSON a line, in order')
    parser.add_argument("--chat", action="store_true", help="a conversation: each line typed is a turn, in the checkpoint's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--thinking", choices=("on", "off"), help="with --chat: the template's enable_thinking (default: the template's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default 256, with --chat 4096")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives a prompt the same text, whatever the batch")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the reply before this text; may be repeated")
    return parser


def _score_parser() -> Parser:
    parser = _common("score", "Print the raw log-probability of each token of each line, one JSON a line.")
    parser.add_argument("--input", required=True, metavar="FILE.jsonl", help='lines {"tokens": [...]} or {"text": ...}')
    return parser


def _align_parser() -> Parser:
    parser = _common("align", "Compare the bits of log-probabilities from training, prefill and decode; exit 1 if one differs.")
    parser.add_argument("--text", metavar="FILE", help="text to score (default: the standard library's; random ids without a tokenizer)")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens to compare (default 2048)")
    parser.add_argument("--remat", choices=("none", "mixers", "full"), help="of the training forward (default: the run's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the report's rows")
    return parser


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if args.prompts is None:
        text = args.prompt if args.prompt is not None else sys.stdin.read()
        if not text:
            raise ValueError("no prompt: give --prompt TEXT, --prompts FILE.jsonl, or text on stdin")
        return [text]
    path = pathlib.Path(args.prompts)
    if not path.is_file():
        raise ValueError(f"no prompts file {path}")
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            value = json.loads(line.decode("utf-8"))
            prompts.append(value["prompt"] if isinstance(value, dict) else None)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError):
            prompts.append(None)
        if not isinstance(prompts[-1], str) or not prompts[-1]:
            raise ValueError(f'{path}:{number}: expected {{"prompt": text}}')
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts


def generate(args: argparse.Namespace) -> int:
    """Run the generation command."""
    from ring_jax.infer.sampling import Sampling

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.max_tokens is None:
        args.max_tokens = 4096 if args.chat else 256
    if args.max_tokens < 1:
        raise ValueError(f"max-tokens must be at least 1, not {args.max_tokens}")
    if args.chat:
        return converse(args, sampling)
    texts = _prompts(args)
    from ring_jax import checkpoint
    from ring_jax.infer.generate import Decoder, Generation

    model, _, tokenizer = checkpoint.load(args.checkpoint, stacked=False, **_numerics(args))
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer.json; `score` takes token ids")
    prompts = [tokenizer.encode(text) for text in texts]
    options = {"max_tokens": args.max_tokens, "sampling": sampling, "seed": args.seed, "stops": args.stop}
    decoder = Decoder(model)
    generation = Generation(decoder, tokenizer, prompts, **options)
    replies: list[dict[str, typing.Any]] = [{"prompt": text, "text": "", "tokens": [], "logprobs": []} for text in texts]
    streamed = args.prompts is None
    for piece in generation:
        reply = replies[piece.index]
        reply["text"] += piece.text
        reply["tokens"].append(piece.token)
        reply["logprobs"].append(float(f"{piece.logprob:.9g}"))
        if streamed:
            print(piece.text, end="", flush=True)
    print("" if streamed else "\n".join(json.dumps(reply) for reply in replies))
    t = generation.timing
    print(
        f"prefill {t.prefill_tokens} tokens, {t.prefill_tokens / t.prefill_seconds:,.1f} tokens/s; "
        f"decode {t.decode_tokens} tokens, {t.decode_tokens / max(t.decode_seconds, 1e-9):,.1f} tokens/s "
        f"({args.numerics} numerics, {model.numerics.precision}; without {decoder.compile_seconds:.1f} s of compilation)",
        file=sys.stderr,
    )
    return 0


def converse(args: argparse.Namespace, sampling: typing.Any) -> int:
    """Run the conversation of --chat."""
    if args.prompt is not None or args.prompts is not None:
        raise ValueError("--chat reads its turns from stdin: give no --prompt or --prompts")
    from ring_jax import checkpoint
    from ring_jax.infer.chat import ChatTemplate, chat, typed_turns
    from ring_jax.infer.generate import Decoder, Generation

    template = ChatTemplate.of_files(checkpoint.text_files(args.checkpoint))
    if template is None:
        raise ValueError(f"{args.checkpoint} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)")
    model, config, tokenizer = checkpoint.load(args.checkpoint, stacked=False, **_numerics(args))
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer.json")
    decoder = Decoder(model)

    def reply(tokens: list[int]) -> typing.Iterator[str]:
        room = config.num_positions - len(tokens)
        options = {"max_tokens": max(1, min(args.max_tokens, room)), "sampling": sampling, "seed": args.seed, "stops": args.stop}
        # In some tokenizers <think> is a special token.
        for piece in Generation(decoder, tokenizer, [tokens], skip_special=False, **options):
            yield piece.text

    thinking = None if args.thinking is None else args.thinking == "on"
    write = lambda text: print(text, end="", flush=True)
    try:
        chat(template, tokenizer, reply, typed_turns(), system=args.system, enable_thinking=thinking, write=write, dim=sys.stdout.isatty())
    except KeyboardInterrupt:
        return 130
    return 0


def _numerics(args: argparse.Namespace) -> dict[str, typing.Any]:
    """What the arguments say about how to compute."""
    return {"precision": args.precision, "aligned": args.numerics == "aligned", "kernels": args.kernels or "auto"}


def score(args: argparse.Namespace) -> int:
    """Run the scoring command."""
    from ring_jax import checkpoint
    from ring_jax.infer.score import Scorer, read_lines, score_lines

    path = pathlib.Path(args.input)
    if not path.is_file():
        raise ValueError(f"no input file {path}")
    model, config, tokenizer = checkpoint.load(args.checkpoint, **_numerics(args))
    for line in score_lines(Scorer(model), read_lines(path, tokenizer, config.vocab_size, config.num_positions)):
        print(line)
    return 0


def align(args: argparse.Namespace) -> int:
    """Run the alignment report; 1 if an aligned row is not exactly zero."""
    from ring_jax.infer import align as report

    return report.main(args)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 with one line on stderr for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    parser, run = {"": (_generate_parser, generate), "score": (_score_parser, score), "align": (_align_parser, align)}[command]
    args = parser().parse_args(arguments[1:] if command else arguments)
    if args.kernels:
        show_kernels()
    try:
        return run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing to say
            return 0
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main())
