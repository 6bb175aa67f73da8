"""The alignment report: the bits of a token's log-probability from training, prefill, decode, any batch and any mesh.

The reference is the training program (value_and_grad with the configured remat) over the documents in a padded batch; each row of the
report is another way to the same log-probabilities. When an aligned row differs, the named values of both programs are compared and the
first layer and operator whose bits part is named.
"""

import argparse
import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import GRID
from pallas_kernels.cross_entropy import head_logits, token_logprobs
from ring_jax import numerics, scoring, sharding
from ring_jax.infer.generate import bucket
from ring_jax.infer.taps import Tap, tapped
from ring_jax.model import Ring
from ring_jax.numerics import Numerics, name
from ring_jax.scoring import Batch, host_batch

Documents = list[list[int]]
DECODE_BATCHES = (1, 64)
"""Batch sizes decoded besides the documents' own."""
PIECES = (100, 37, 128)
"""Lengths a prompt is cut into, in turn, for chunked prefill."""
PAGED_PIECES = (15, 1)
"""The same where keys and values are in pages: prefill and decode steps."""
SIMULATED_DEVICES = 4
"""Devices on a CPU, for the sharded rows."""


class Row(NamedTuple):
    """One line of the report."""

    name: str
    tokens: int
    differing_bits: int
    differing_values: int
    max_delta: float
    kl: float
    where: str


class Values(NamedTuple):
    """Named values of a program by (layer, operator), each [B, T, ...] rows; layer -1 is before the first, L after the last."""

    order: list[tuple[int, str]]
    rows: dict[tuple[int, str], np.ndarray]


class Variant(NamedTuple):
    """Another way to the log-probabilities: `logprobs` of each document, and `values` of each document (for the search), if wanted."""

    name: str
    documents: Documents
    logprobs: Callable[[Documents], list[np.ndarray]]
    values: Callable[[Documents, Callable[[int], bool]], list[Values]]


def pad(documents: Documents, left: bool = False) -> Batch:
    """Return the documents as a padded batch, a row each; padding has position -1 and segment 0."""
    width = bucket(max(len(d) for d in documents))
    tokens, positions = np.zeros((len(documents), width), np.int32), np.full((len(documents), width), -1, np.int32)
    for row, document in enumerate(documents):
        at = slice(width - len(document), width) if left else slice(0, len(document))
        tokens[row, at], positions[row, at] = document, np.arange(len(document))
    return host_batch(tokens, positions)


def pack(documents: Documents) -> tuple[Batch, list[tuple[int, int]]]:
    """Return the documents in one row, each from a multiple of GRID on, in reverse order, and where each one starts."""
    starts, at = [0] * len(documents), 0
    for index in reversed(range(len(documents))):
        starts[index] = at
        at += -(-len(documents[index]) // GRID) * GRID
    tokens, positions, segments = np.zeros((1, at), np.int32), np.full((1, at), -1, np.int32), np.zeros((1, at), np.int32)
    for index, (start, document) in enumerate(zip(starts, documents, strict=True)):
        span = slice(start, start + len(document))
        tokens[0, span], positions[0, span], segments[0, span] = document, np.arange(len(document)), index + 1
    return host_batch(tokens, positions, segments), [(0, start) for start in starts]


def _cut(rows: np.ndarray, documents: Documents, starts: Sequence[tuple[int, int]] | None = None) -> list[np.ndarray]:
    """The documents' parts of a [B, T, ...] array."""
    starts = [(row, 0) for row in range(len(documents))] if starts is None else starts
    return [np.asarray(rows)[row, first : first + len(d)] for (row, first), d in zip(starts, documents, strict=True)]


def layer_values(model: Ring, taps: Sequence[Tap], lead: tuple[int, int]) -> Values:
    """Return named values by layer and operator, from a forward's taps over [B, T] = lead tokens."""
    runs = [run for segment in model.pattern for run in segment]
    order, rows, number, inside = [], {}, -1, False
    for label, value, depth in taps:
        if label == "mixer_norm":
            number, inside = number + 1, True
        stacked = np.asarray(value).reshape(-1 if depth else 1, *lead, *_feature_shape(value, depth, lead))
        if inside and number < len(runs):
            layers = [layer for layers in runs[number].layers for layer in layers]
        else:
            layers = [-1 if number < 0 else model.config.num_layers]
        for layer, values in zip(layers, stacked, strict=True):
            if (layer, label) not in rows:  # a gradient's recomputation names its values again
                order.append((layer, label))
                rows[layer, label] = values
        inside = inside and label != "block"
    return Values(order, rows)


def _feature_shape(value: Any, depth: int, lead: tuple[int, int]) -> tuple[int, ...]:
    """What is left of a value's shape behind its scans' axes and its rows ([B, T, ...] or [B T, ...])."""
    shape = value.shape[depth:]
    return tuple(shape[2:] if shape[:2] == lead else shape[1:])


class Programs:
    """A model's programs over given weights: training, scoring, prefill and decode, plain and tapped."""

    def __init__(self, stacked: Ring, unstacked: Ring):
        self.stacked, self.unstacked = stacked, unstacked
        self._compiled: dict[Any, Any] = {}

    def _jit(self, key: Any, make: Callable[[], Callable], how: Numerics) -> Any:
        if key not in self._compiled:
            self._compiled[key] = numerics.jit(make(), how)
        return self._compiled[key]

    def train(self, batch: Batch, wanted: Callable[[int], bool] | None = None) -> tuple[np.ndarray, Any]:
        """Return the log-probabilities [B, T] of the training program, gradients and all, and its named values if wanted."""
        model = self.stacked
        graph, *state = scoring.split(model)

        def program(params, balance, tables, batch):
            total = scoring.totals(batch, len(model.mtp))

            def loss(params):
                merged = scoring.merge(graph, params, balance, tables, model.numerics.dtype)
                logprobs, output = scoring.next_token_logprobs(merged, batch)
                return -logprobs.sum() / total.scored, (logprobs, output.router)

            (_, (logprobs, _)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return jnp.roll(logprobs, 1, axis=1), jax.tree.map(lambda g: g.astype(jnp.float32).sum(), gradients)

        if wanted is None:
            return np.asarray(self._jit(("train",), lambda: program, model.numerics)(*state, batch)[0]), None
        return self._tapped(("train", "tapped"), program, model, (*state, batch), batch.tokens.shape, wanted)

    def score(self, batch: Batch, mesh: Any = None, wanted: Callable[[int], bool] | None = None) -> tuple[np.ndarray, Any]:
        """Return the log-probabilities [B, T] of the scoring program, over a mesh if there is one."""
        model = self.stacked
        graph, *state = scoring.split(model)

        def program(params, balance, tables, batch):
            return scoring.token_logprobs(scoring.merge(graph, params, balance, tables, model.numerics.dtype), batch)

        rows = sharding.batch_spec()
        in_specs = None
        if mesh is not None:
            in_specs = (*(sharding.specs(s, mesh) for s in state), rows)
            state = [jax.device_put(s, sharding.shardings(s, mesh)) for s in state]
        if wanted is None:
            sharded = lambda: sharding.on_mesh(program, mesh, in_specs, rows)
            return np.asarray(self._jit(("score", mesh), sharded, model.numerics)(*state, batch)), None
        if mesh is None:
            return self._tapped(("score", "tapped"), program, model, (*state, batch), batch.tokens.shape, wanted)
        return self._tapped_on_mesh(program, mesh, in_specs, model, (*state, batch), wanted)

    def _tapped(self, key: Any, program: Callable, model: Ring, args: Any, lead: tuple[int, ...], wanted: Any) -> tuple[np.ndarray, Values]:
        del key
        found: list[Tap] = []

        def run(*args):
            outputs, taps = tapped(program, wanted)(*args)
            found[:] = taps
            return outputs, [tap.value for tap in taps]

        outputs, values = numerics.jit(run, model.numerics)(*args)
        taps = [tap._replace(value=value) for tap, value in zip(found, values, strict=True)]
        return np.asarray(jax.tree.leaves(outputs)[0]), layer_values(model, taps, (lead[0], lead[1]))

    def _tapped_on_mesh(
        self, program: Callable, mesh: Any, in_specs: Any, model: Ring, args: Any, wanted: Any
    ) -> tuple[np.ndarray, Values]:
        """Each device's taps, with its rows brought to the front so that the devices' parts join there."""
        found: list[tuple[Tap, tuple[int, ...]]] = []
        shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        batch, length = args[-1].tokens.shape
        lead = (batch // shards, length)

        def run(*args):
            outputs, taps = tapped(program, wanted)(*args)
            keep = [tap for tap in taps if tap.value.shape[tap.depth] in (lead[0], lead[0] * lead[1])]  # not the dispatched rows
            found[:] = [(tap, _feature_shape(tap.value, tap.depth, lead)) for tap in keep]
            rows = [tap.value.reshape(-1, *lead, math.prod(shape)) for tap, shape in found]
            return outputs, [jnp.moveaxis(value, 0, 2) for value in rows]

        on_devices = sharding.on_mesh(run, mesh, in_specs, sharding.batch_spec())
        outputs, values = numerics.jit(on_devices, model.numerics)(*args)
        taps = [
            tap._replace(value=np.moveaxis(np.asarray(value), 2, 0).reshape(-1, batch, length, *shape), depth=1)
            for (tap, shape), value in zip(found, values, strict=True)
        ]
        return np.asarray(outputs), layer_values(model, taps, (batch, length))

    def prefill(
        self, batch: Batch, pieces: Sequence[int], wanted: Callable[[int], bool] | None = None, *, paged: bool = False
    ) -> tuple[np.ndarray, list[Values]]:
        """Return the log-probabilities [B, T] when the columns go through a cache in pieces of these widths, and each piece's values.

        paged: keys and values are in pages, of which each slot has some from all over the memory.
        """
        model = self.unstacked
        graph, state = nnx.split(model)

        def program(state, tokens, positions, targets, cache, on_grid):
            merged = nnx.merge(graph, state)
            output = merged(tokens, positions, cache, on_grid=on_grid)
            rows = output.hidden.reshape(-1, output.hidden.shape[-1])
            logprobs, _ = token_logprobs(rows, merged.head_weight(), targets.reshape(-1), **model.numerics.ops)
            return name(logprobs, "logprobs").reshape(targets.shape), output.cache

        def step(state, tokens, positions, targets, cache):
            merged = nnx.merge(graph, state)
            output = merged(tokens, positions, cache)
            logits, total = head_logits(output.hidden[:, 0], merged.head_weight(), **model.numerics.ops)
            logprobs = name(jnp.take_along_axis(logits, targets, axis=1)[:, 0] - total, "logprobs")
            return logprobs[:, None], output.cache

        num, length = batch.tokens.shape
        cache = model.init_cache(num, bucket(length))
        if paged:
            table = np.random.default_rng(0).permutation(num * bucket(length) // GRID).reshape(num, -1)
            cache = model.init_cache(num, bucket(length), table.size)._replace(pages=jnp.asarray(table, jnp.int32))
        targets, out, values, first = np.roll(batch.tokens, -1, axis=1), [], [], 0
        while first < length:
            width = min(pieces[len(out) % len(pieces)], length - first)
            columns = slice(first, first + width)
            on_grid = first % model.config.chunk_size == 0 and bool((batch.positions[:, first] == first).all())  # as the decoder does
            how, run = ("step", step) if width == 1 else (f"piece {on_grid=}", functools.partial(program, on_grid=on_grid))
            args = (state, batch.tokens[:, columns], batch.positions[:, columns], targets[:, columns], cache)
            if wanted is None:
                logprobs, cache = self._jit(("cached", how), lambda run=run: run, model.numerics)(*args)
            else:
                logprobs, cache, found = self._tapped_cached(f"{how} {paged=}", run, model, args, wanted)
                values.append(found)
            out.append(np.asarray(logprobs))
            first += width
        logprobs = np.roll(np.concatenate(out, axis=1), 1, axis=1)
        return np.where(np.roll(batch.positions, 1, axis=1) >= 0, logprobs, 0), values

    def _tapped_cached(self, how: str, run: Callable, model: Ring, args: Any, wanted: Any) -> tuple[Any, Any, Values]:
        key = ("cached tapped", how, args[1].shape, wanted)
        if key not in self._compiled:
            found: list[Tap] = []

            def program(*args):
                (logprobs, cache), taps = tapped(run, wanted)(*args)
                found[:] = taps
                return logprobs, cache, [tap.value for tap in taps]

            self._compiled[key] = numerics.jit(program, model.numerics), found
        program, found = self._compiled[key]
        logprobs, cache, values = program(*args)
        taps = [tap._replace(value=value) for tap, value in zip(found, values, strict=True)]
        return logprobs, cache, layer_values(model, taps, args[1].shape)


def _joined(pieces: list[Values]) -> Values:
    """The values of all pieces of a row, one behind the other."""
    return Values(pieces[0].order, {key: np.concatenate([p.rows[key] for p in pieces], axis=1) for key in pieces[0].order})


def _per_document(values: Values, documents: Documents, starts: Sequence[tuple[int, int]] | None = None) -> list[Values]:
    cut = {key: _cut(rows, documents, starts) for key, rows in values.rows.items()}
    return [Values(values.order, {key: parts[i] for key, parts in cut.items()}) for i in range(len(documents))]


def variants(programs: Programs, documents: Documents, meshes: Sequence[Any]) -> list[Variant]:
    """Return the rows of the report for these documents."""
    scored = lambda batch, starts=None: (
        lambda ds: _cut(programs.score(batch)[0], ds, starts),
        lambda ds, wanted: _per_document(programs.score(batch, None, wanted)[1], ds, starts),
    )

    def cached(label: str, batch: Batch, ds: Documents, pieces: Sequence[int], starts: Any = None, paged: bool = False) -> Variant:
        run = functools.partial(programs.prefill, batch, pieces, paged=paged)
        return Variant(
            label,
            ds,
            lambda ds: _cut(run()[0], ds, starts),
            lambda ds, wanted: _per_document(_joined(run(wanted)[1]), ds, starts),
        )

    batch, longest = pad(documents), max(documents, key=len)
    packed, starts = pack(documents)
    width = batch.tokens.shape[1]
    left = pad(documents, left=True)
    left_starts = [(row, width - len(d)) for row, d in enumerate(documents)]
    found = [
        Variant("scoring forward", documents, *scored(batch)),
        Variant("packed in one row", documents, *scored(packed, starts)),
        Variant("alone", [longest], *scored(pad([longest]))),
        cached("prefill", batch, documents, [width]),
        cached("prefill, left-padded", left, documents, [width], left_starts),
        cached(f"prefill in pieces of {', '.join(map(str, PIECES))}", batch, documents, PIECES),
        cached(f"pages, pieces of {', '.join(map(str, PAGED_PIECES))}", batch, documents, PAGED_PIECES, paged=True),
        cached(f"decode, batch {len(documents)}", batch, documents, [1]),
    ]
    for size in DECODE_BATCHES:
        share = max(2, min(len(longest), sum(map(len, documents)) // size)) if size > 1 else len(longest)
        prefixes = [documents[i % len(documents)][:share] for i in range(size)] if size > 1 else [longest]
        found.append(cached(f"decode, batch {size}", pad(prefixes), prefixes, [1]))
    for mesh in meshes:
        shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        rows = pad([*documents, *[[0]] * (-len(documents) % shards)])
        found.append(
            Variant(
                "sharded " + " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1),
                documents,
                lambda ds, rows=rows, mesh=mesh: _cut(programs.score(rows, mesh)[0], ds),
                lambda ds, wanted, rows=rows, mesh=mesh: _per_document(programs.score(rows, mesh, wanted)[1], ds),
            )
        )
    return found


def compare(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[int, int, int, float, float]:
    """Return tokens, differing bits, differing values, largest difference and KL (its unbiased estimate, mean of e^d - 1 - d)."""
    a, b = np.concatenate([x[1:] for x in reference]), np.concatenate([x[1:] for x in other])
    xor = a.astype(np.float32).view(np.uint32) ^ b.astype(np.float32).view(np.uint32)
    delta = b.astype(np.float64) - a
    kl = float(np.mean(np.expm1(delta) - delta)) if len(a) else 0.0
    return len(a), int(np.bitwise_count(xor).sum()), int((xor != 0).sum()), float(np.abs(delta).max(initial=0.0)), kl


def first_difference(model: Ring, reference: list[Values], other: list[Values], prefixes: Sequence[int]) -> str | None:
    """Return the first layer and operator whose bits part, None if all that both name agree."""
    layers = model.config.num_layers
    for layer, label in sorted(reference[0].order, key=lambda key: key[0]):
        for document, (a, b) in enumerate(zip(reference, other, strict=True)):
            if (layer, label) not in b.rows:
                continue
            x, y = a.rows[layer, label][: prefixes[document]], b.rows[layer, label][: prefixes[document]]
            if label == "logprobs":
                x, y = x[:-1], y[:-1]  # the last token has no target; its row holds anything
            differs = (x != y).reshape(len(x), -1).any(1)
            if differs.any():
                where = (
                    "before the layers"
                    if layer < 0
                    else "after the layers"
                    if layer == layers
                    else f"layer {layer} ({model.config.mixer(layer)})"
                )
                return f"{where}, {label}, document {document} position {int(np.argmax(differs))}"
    return None


def _source(documents: Documents, other: Documents) -> list[int]:
    """Which document each one of `other` is a prefix of."""
    return [next(i for i, d in enumerate(documents) if d[: len(o)] == o) for o in other]


def search(programs: Programs, documents: Documents, batch: Batch, variant: Variant) -> str:
    """Return where the training program and a variant part."""

    def at(wanted: Callable[[int], bool]) -> str | None:
        reference = _per_document(programs.train(batch, wanted)[1], documents)
        matching = [reference[i] for i in _source(documents, variant.documents)]
        return first_difference(programs.stacked, matching, variant.values(variant.documents, wanted), [len(d) for d in variant.documents])

    if found := at(_everything):
        return found
    # Tapping keeps values apart that the plain programs fuse. Look at one operator at a time, which leaves the rest as it was.
    labels = sum(1 for _ in _per_document(programs.train(batch, _everything)[1], documents)[0].order)
    for index in range(labels):
        if found := at(lambda i, index=index: i == index):
            return f"{found} (differs only untapped)"
    return "differs only untapped; no single operator shows it"


def _everything(_index: int) -> bool:
    return True


def report(programs: Programs, documents: Documents, meshes: Sequence[Any]) -> list[Row]:
    """Return all rows; the first one that differs says where."""
    batch = pad(documents)
    reference = _cut(programs.train(batch)[0], documents)
    rows, searched = [], False
    for variant in variants(programs, documents, meshes):
        matching = [reference[i][: len(o)] for i, o in zip(_source(documents, variant.documents), variant.documents, strict=True)]
        result = compare(matching, variant.logprobs(variant.documents))
        where = ""
        if result[1] and programs.stacked.numerics.aligned and not searched:
            where, searched = search(programs, documents, batch, variant), True
        rows.append(Row(variant.name, *result, where))
        print(_line(rows[-1]), flush=True)
    return rows


HEADER = f"{'against the training forward':40} {'tokens':>7} {'bits':>9} {'values':>8} {'max |delta|':>12} {'KL':>10}"


def _line(row: Row) -> str:
    line = f"{row.name:40} {row.tokens:7,} {row.differing_bits:9,} {row.differing_values:8,} {row.max_delta:12.3e} {row.kl:10.2e}"
    return f"{line}\n    first difference: {row.where}" if row.where else line


def split_documents(tokens: Sequence[int], limit: int) -> Documents:
    """Return a stream of tokens as eight documents of unequal, odd lengths, none longer than the limit."""
    shares = (27, 19, 15, 12, 10, 8, 6, 3)
    documents, at = [], 0
    for share in shares:
        length = min(limit, len(tokens) * share // 100 | 1)
        documents.append(list(tokens[at : at + length]))
        at += length
    return [d for d in documents if len(d) > 1]


def main(args: argparse.Namespace) -> int:
    """Run the command: print the report, return 1 if a row is not exactly zero."""
    sizes = sharding.parse_mesh(f"{SIMULATED_DEVICES}x1")
    simulated = sharding.prepare_devices(sizes) if not sharding.has_accelerator() else None
    from ring_jax import checkpoint

    remat = args.remat or checkpoint.training_remat(args.checkpoint)
    how = {"precision": args.precision, "kernels": args.kernels or "auto"}
    stacked, config, tokenizer = checkpoint.load(args.checkpoint, remat=remat, gradients=True, **how)
    unstacked = checkpoint.load(args.checkpoint, stacked=False, **how).model
    total = max(args.tokens, 16)
    if tokenizer is None:
        rng = np.random.default_rng(args.seed)
        tokens, source = rng.integers(0, config.vocab_size, total).tolist(), f"random ids, seed {args.seed} (the folder has no tokenizer)"
    else:
        text, source = _text(args.text, total * 16)
        tokens = tokenizer.encode(text)[:total]
        if len(tokens) < total:
            raise ValueError(f"{source} has {len(tokens)} tokens, fewer than --tokens {total}")
    documents = split_documents(tokens, config.num_positions)
    meshes = [sharding.make_mesh(m) for m in _meshes(jax.device_count(), config)]
    print(f"{args.checkpoint}: {sum(map(len, documents)):,} tokens of {source} in {len(documents)} documents")
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}" + (f", {simulated}" if simulated else "")
    print(f"{stacked.numerics.precision}, remat {remat}, {where}\n{HEADER}")
    rows = report(Programs(stacked, unstacked), documents, meshes)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps([row._asdict() for row in rows], indent=1))
    differing = [row.name for row in rows if row.differing_bits]
    if differing:
        print(f"not aligned: {', '.join(differing)}", file=sys.stderr)
        return 1
    print(
        "aligned: every log-probability has the same 32 bits. Next: python -m ring_jax.infer --checkpoint DIR --prompt TEXT",
        file=sys.stderr,
    )
    return 0


def _text(path: str | None, size: int) -> tuple[str, str]:
    if path is not None:
        file = pathlib.Path(path)
        if not file.is_file():
            raise ValueError(f"no text file {file}")
        return file.read_text(encoding="utf-8")[:size], str(file)
    import argparse as example

    assert example.__file__ is not None
    return pathlib.Path(example.__file__).read_text(encoding="utf-8")[:size], "the standard library's argparse.py"


def _meshes(devices: int, config: Any) -> list[dict[str, int]]:
    """Meshes of all devices: fsdp, expert, and both, as far as the model's experts divide."""
    found = []
    for expert in (1, devices, 2):
        if devices % expert == 0 and config.num_experts % expert == 0 and devices > 1:
            found.append(sharding.parse_mesh(f"{devices // expert}x{expert}"))
    return found if len(found) < 2 or found[-1] != found[-2] else found[:-1]
