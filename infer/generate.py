"""Generation: prompts go in pieces through the forward with a cache, then a token a step for the whole batch."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import GRID
from pallas_kernels.cross_entropy import head_logits
from ring_jax import numerics
from ring_jax.cache import Cache
from ring_jax.infer.sampling import Sampling, sample
from ring_jax.model import Ring
from ring_jax.tokenizer import StreamDecoder, Tokenizer

PIECE = 1024
"""Most tokens of a prompt that go through the forward at once."""
MOST_SLOTS = 64
"""Most prompts that decode together."""


class Step(NamedTuple):
    """One decode step of a batch: a token and its raw log-probability a slot."""

    tokens: np.ndarray
    logprobs: np.ndarray


class Timing(NamedTuple):
    """Tokens and seconds of prefill and decode, compilation left out."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


def bucket(length: int) -> int:
    """Return a length to compile for: the next multiple of GRID, or above 1024 of an eighth of the next power of two."""
    step = max(GRID, (1 << (length - 1).bit_length()) // 8) if length > 1 else GRID
    return -(-length // step) * step


class Decoder:
    """A model's compiled programs: prompts in, tokens out, for up to MOST_SLOTS sequences at once.

    `compile_seconds` is what compiling them has taken so far: whoever times the decoder can leave it out.
    """

    def __init__(self, model: Ring):
        self.model, self.compile_seconds = model, 0.0
        self._compiled: dict[Any, Any] = {}
        self._graph, state = nnx.split(model)
        self._leaves, self._structure = jax.tree.flatten(state)  # plain arrays: a jitted call need not walk the modules

        def piece(leaves, tokens, positions, cache, last, on_grid):
            end = jnp.max(jnp.where(positions >= 0, jnp.arange(tokens.shape[1]), -1), axis=1)
            output = self._merge(leaves)(tokens, positions, cache, only=jnp.maximum(end, 0), on_grid=on_grid)
            return output.cache, jnp.where((end >= 0)[:, None], output.hidden[:, 0], last)

        def choose(leaves, hidden, positions, seed, sampling):
            logits, total = head_logits(hidden, self._merge(leaves).head_weight(), **model.numerics.ops)
            tokens = sample(logits, positions, seed, sampling)
            return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - total

        def step(leaves, tokens, positions, cache, seed, sampling, may_fold):
            output = self._merge(leaves)(tokens[:, None], positions[:, None], cache, may_fold=may_fold)
            after = jnp.where(positions >= 0, positions + 1, -1)
            tokens, logprobs = choose(leaves, output.hidden[:, 0], after, seed, sampling)
            return tokens, logprobs, after, output.cache

        self._piece = numerics.jit(piece, model.numerics, static_argnums=5, donate_argnums=3)
        self._choose = numerics.jit(choose, model.numerics, static_argnums=4)
        self._step = numerics.jit(step, model.numerics, static_argnums=(5, 6), donate_argnums=3)

    def _call(self, program: Any, *args: Any, static: tuple[Any, ...] = ()) -> Any:
        """The program's result, compiled for these shapes and static arguments on first use."""
        key = (program, static, tuple(jnp.shape(x) for x in jax.tree.leaves(args)))
        if key not in self._compiled:
            started = time.perf_counter()
            self._compiled[key] = program.lower(self._leaves, *args, *static).compile()
            self.compile_seconds += time.perf_counter() - started
        return self._compiled[key](self._leaves, *args)

    def _merge(self, leaves: Sequence[Any]) -> Ring:
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))

    def init_cache(self, batch: int, size: int) -> Cache:
        """Return an empty cache."""
        return self.model.init_cache(batch, size)

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: Cache, starts: Sequence[int] | None = None, piece: int = PIECE
    ) -> tuple[Any, Any]:
        """Return the cache after the prompts (continuing at `starts`, default 0) and the hidden state of each one's last token."""
        batch = len(prompts)
        starts = [0] * batch if starts is None else starts
        hidden = jnp.zeros((batch, self.model.config.hidden_size), self.model.numerics.dtype)
        longest = max(len(prompt) for prompt in prompts)
        for first in range(0, longest, piece):
            width = bucket(min(longest - first, piece)) if piece >= GRID else piece
            tokens, positions = np.zeros((batch, width), np.int32), np.full((batch, width), -1, np.int32)
            for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
                part = prompt[first : first + piece]
                tokens[row, : len(part)] = part
                positions[row, : len(part)] = np.arange(start + first, start + first + len(part))
            absorbed = [start + min(first, len(prompt)) for prompt, start in zip(prompts, starts, strict=True)]
            on_grid = all(number % self.model.config.chunk_size == 0 for number in absorbed)
            cache, hidden = self._call(self._piece, tokens, positions, cache, hidden, static=(on_grid,))
        return cache, hidden

    def first_tokens(self, hidden: Any, positions: Sequence[int] | np.ndarray, sampling: Sampling, seed: int = 0) -> Step:
        """Return the tokens at these positions, after the hidden states of the tokens before."""
        tokens, logprobs = self._call(self._choose, hidden, np.asarray(positions, np.int32), np.uint32(seed), static=(sampling,))
        return Step(np.asarray(tokens), np.asarray(logprobs))

    def step(self, tokens: np.ndarray, positions: np.ndarray, cache: Cache, sampling: Sampling, seed: int = 0) -> tuple[Step, Cache]:
        """Return the tokens after these ones, at positions one further, and the cache; a slot with position -1 rests."""
        may_fold = bool(((positions + 1) % self.model.config.chunk_size == 0).any())
        tokens, logprobs, _, cache = self._call(self._step, tokens, positions, cache, np.uint32(seed), static=(sampling, may_fold))
        return Step(np.asarray(tokens), np.asarray(logprobs)), cache


class Piece(NamedTuple):
    """What a step added to one prompt's reply: new text (it may be empty), and whether the reply is finished."""

    index: int
    text: str
    token: int
    logprob: float
    finished: bool


class _Reply:
    """The text of one reply as it grows: holds back what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], skip_special: bool):
        self._decoder, self._stops, self._held = StreamDecoder(tokenizer, skip_special), [s for s in stops if s], ""

    def add(self, token: int, last: bool) -> tuple[str, bool]:
        """Return the text that is certain after one more token, and whether a stop string ended the reply."""
        return self._release(self._held + self._decoder.push(token) + (self._decoder.flush() if last else ""), last)

    def end(self) -> str:
        """Return what is still held back, when a stop token ends the reply."""
        return self._release(self._held + self._decoder.flush(), True)[0]

    def _release(self, text: str, last: bool) -> tuple[str, bool]:
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        longest = max(len(s) for s in self._stops) if self._stops else 0
        starts = (n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops))
        keep = 0 if last else next(starts, 0)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep], False


class Generation:
    """Replies to a batch of prompts, streamed; `timing` is filled when the pieces are exhausted.

    skip_special: leave special tokens out of the text (those that end a reply never are in it).
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        stops: Sequence[str],
        skip_special: bool = True,
    ):
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed must be from 0 to {(1 << 32) - 1}, not {seed}")
        limit, vocab = decoder.model.config.num_positions, decoder.model.config.vocab_size
        for prompt in prompts:
            if not prompt:
                raise ValueError("an empty prompt: it needs at least one token")
            if len(prompt) + max_tokens > limit:
                raise ValueError(
                    f"prompt of {len(prompt)} tokens and {max_tokens} new ones exceed the {limit} positions of the model: shorten it, "
                    "lower --max-tokens, or extend the positions (YaRN: rope_scaling in the checkpoint's config)"
                )
            if max(prompt) >= vocab:
                raise ValueError(f"token {max(prompt)} is outside the model's vocabulary of {vocab}")
        self.decoder, self.tokenizer, self.prompts = decoder, tokenizer, prompts
        self.max_tokens, self.sampling, self.seed, self.stops, self.skip_special = max_tokens, sampling, seed, stops, skip_special
        self.timing = Timing(0, 0.0, 0, 0.0)

    def __iter__(self) -> Iterator[Piece]:
        for first in range(0, len(self.prompts), MOST_SLOTS):
            yield from self._batch(first, self.prompts[first : first + MOST_SLOTS])

    def _batch(self, offset: int, prompts: Sequence[Sequence[int]]) -> Iterator[Piece]:
        stop_tokens = {*self.decoder.model.config.stop_tokens, *self.tokenizer.eos_ids}
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        clock = lambda: time.perf_counter() - self.decoder.compile_seconds
        started = clock()
        cache = self.decoder.init_cache(len(prompts), bucket(int(lengths.max()) + self.max_tokens))
        cache, hidden = self.decoder.prefill(prompts, cache)
        step = self.decoder.first_tokens(hidden, lengths, self.sampling, self.seed)
        prefill_seconds, started = clock() - started, clock()
        replies = [_Reply(self.tokenizer, self.stops, self.skip_special) for _ in prompts]
        live, positions, decoded = np.ones(len(prompts), bool), lengths.copy(), 0
        for count in range(1, self.max_tokens + 1):
            for slot in np.flatnonzero(live):
                token, last = int(step.tokens[slot]), count == self.max_tokens
                if token in stop_tokens:
                    text, live[slot] = replies[slot].end(), False
                else:
                    text, stopped = replies[slot].add(token, last)
                    live[slot] = not (stopped or last)
                yield Piece(offset + int(slot), text, token, float(step.logprobs[slot]), not live[slot])
            if not live.any():
                break
            at = np.where(live, positions, -1).astype(np.int32)
            step, cache = self.decoder.step(step.tokens, at, cache, self.sampling, self.seed)
            positions, decoded = positions + 1, decoded + int(live.sum())
        a = self.timing
        decode_seconds = clock() - started
        self.timing = Timing(
            a.prefill_tokens + int(lengths.sum()),
            a.prefill_seconds + prefill_seconds,
            a.decode_tokens + decoded,
            a.decode_seconds + decode_seconds,
        )
