"""The conversion command: python -m ring_jax.convert from-hf HF_DIR OUT, or to-hf CHECKPOINT OUT."""

import pathlib
import sys

from ring_jax.command_line import Parser


def _parser() -> Parser:
    parser = Parser(prog="python -m ring_jax.convert", description="Convert checkpoints: Hugging Face in, Hugging Face out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="from-hf | to-hf")
    into = commands.add_parser("from-hf", help="a Hugging Face folder into a run folder with one checkpoint", allow_abbrev=False)
    into.add_argument("source", metavar="HF_DIR")
    into.add_argument("--check-finite", action="store_true", help="refuse values that are not finite")
    into.add_argument("--keep-fp8", action="store_true", help="store block-scaled FP8 tensors as they are (default: as bf16)")
    into.add_argument("--to-hybrid", action="store_true", help="from a softmax-only base of the family: the start of a hybrid")
    into.add_argument("--layer-group-size", type=int, metavar="G", help="with --to-hybrid: one softmax layer closes each group of G")
    into.add_argument("--group-norm-size", type=int, metavar="N", help="with --to-hybrid: groups of the new norms (default 4)")
    into.add_argument("--seed", type=int, help="with --to-hybrid: of the new gates (default 0)")
    out = commands.add_parser("to-hf", help="a run folder, or one of its checkpoints, into a Hugging Face folder", allow_abbrev=False)
    out.add_argument("source", metavar="CHECKPOINT")
    out.add_argument("--max-shard-size", metavar="SIZE", help="of a safetensors file (default: as it came, else 5GB)")
    for command in (into, out):
        command.add_argument("out", metavar="OUT", help="appears whole at the end; a stopped conversion is continued by the same command")
        command.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: as they are stored)")
        command.add_argument("--verify", action="store_true", help="compare both sides, layer by layer, afterwards")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a conversion and return its exit status: 0, 1 if a verification fails, or 2 with one line on stderr for a user's mistake."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    source, out = pathlib.Path(args.source), pathlib.Path(args.out)
    try:
        if args.command == "from-hf":
            from ring_jax.convert.from_hf import Hybrid, from_hf

            if args.to_hybrid != (args.layer_group_size is not None):
                raise ValueError("--to-hybrid and --layer-group-size go together")
            if not args.to_hybrid and not (args.group_norm_size is None and args.seed is None):
                raise ValueError("--group-norm-size and --seed go with --to-hybrid")
            if args.to_hybrid and args.verify:
                raise ValueError("--verify compares a model with itself: a hybrid computes other things than its base")
            if args.keep_fp8 and (args.dtype or args.to_hybrid):
                raise ValueError("--keep-fp8 keeps the weights as they are: it goes with neither --dtype nor --to-hybrid")
            hybrid = Hybrid(args.layer_group_size, args.group_norm_size or 4, args.seed or 0) if args.to_hybrid else None
            from_hf(source, out, dtype=args.dtype, keep_fp8=args.keep_fp8, check_finite=args.check_finite, hybrid=hybrid)
            after = f"python -m ring_jax.infer --checkpoint {out} --prompt TEXT, "
            after += f"or python -m ring_jax.train --model {out} --output {out}-trained"
        else:
            from ring_jax.convert.shards import parse_size
            from ring_jax.convert.to_hf import to_hf

            to_hf(source, out, dtype=args.dtype, max_shard_size=parse_size(args.max_shard_size) if args.max_shard_size else None)
            after = f"python -m ring_jax.infer --checkpoint {out} --prompt TEXT"
        if args.verify:
            from ring_jax.convert.verify import verify

            folders = (source, out) if args.command == "from-hf" else (out, source)
            if not verify(*folders, print):
                print(f"error: {out} does not compute what {source} does", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        done = f"{out} is whole, but not verified" if out.exists() else f"the same command continues (what is done is in {out}.partial)"
        print(f"stopped; {done}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"done: {out}. Next: {after}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
