"""The tokenizer: a thin class around one representation, a tokenizer.json, whether loaded, trained or plain bytes."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsIndex

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

# What the model families in use call the token that ends a document or a reply, most telling first.
_EOS_NAMES = (END_OF_TEXT, "<|role_end|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>")


class Tokenizer:
    """Turns text into ids and back; two tokenizers with equal `to_json()` do the same.

    `eos_ids` lists every token that ends a document or a reply. `eos_id` is the first of them (None: there is none), the one
    that training puts after each document. Known names come before what a config file adds, so that `eos_id` does not change
    when only the tokenizer.json travels on.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_ids: Iterable[int] = ()):
        # Documents and prompts go in whole: what a tokenizer.json says about padding and cutting is for other programs.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        known = [tokenizer.token_to_id(name) for name in _EOS_NAMES]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([id for id in known if id is not None] + list(eos_ids)))
        self.eos_id: int | None = self.eos_ids[0] if self.eos_ids else None

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Returns the tokenizer that the text of a tokenizer.json describes; ValueError if it describes none."""
        return cls(_parse(text, "tokenizer.json"))

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Returns the tokenizer of a tokenizer.json, or of a folder that holds one; ValueError naming the path otherwise.

        A tokenizer_config.json (`eos_token`) and a generation_config.json (`eos_token_id`) beside it may name more `eos_ids`.
        """
        path = pathlib.Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        tokenizer = _parse(_read(file), str(file))
        eos = _read_config(file.with_name("tokenizer_config.json")).get("eos_token")
        name = eos.get("content") if isinstance(eos, dict) else eos
        ids = _read_config(file.with_name("generation_config.json")).get("eos_token_id")
        ids = [tokenizer.token_to_id(name) if isinstance(name, str) else None, *(ids if isinstance(ids, list) else [ids])]
        return cls(tokenizer, [id for id in ids if isinstance(id, int) and tokenizer.id_to_token(id) is not None])

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Returns the tokenizer of plain UTF-8 bytes: ids 0..255 are the bytes, 256 is `<|endoftext|>`."""
        return cls(_byte_level([]))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Returns a byte-level BPE of at most `vocab_size` ids learnt from `texts`, the same for the same texts.

        Ids 0..256 are those of `bytes()`; the merges follow in the order learnt. It has fewer ids than asked when the texts
        have nothing left to merge. ValueError if `vocab_size` is below 257.
        """
        if vocab_size < 257:
            raise ValueError(f"tokenizer vocabulary {vocab_size}: expected at least 257 (256 bytes and {END_OF_TEXT})")
        learner = tokenizers.Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))
        return cls(_byte_level([tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]))

    def to_json(self) -> str:
        """Returns the text of the tokenizer.json, which `from_json` reads back."""
        return self._tokenizer.to_str()

    @functools.cached_property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included: every id is below it, also where the numbering has holes."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens, which `decode` leaves out."""
        return frozenset(id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, with nothing put before or after; names of special tokens in it become their ids."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, encoded in parallel."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[SupportsIndex], skip_special: bool = True) -> str:
        """Returns the text of `ids`: special tokens and unknown ids are left out, broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=skip_special)


class StreamDecoder:
    """Decodes a stream of ids one by one; the pieces and the final `flush()` join to `tokenizer.decode(ids)`.

    (Broken UTF-8 too where the tokenizer is byte-level; byte-fallback ones make a whole run of bytes one error.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self._left_out = tokenizer.special_ids if skip_special else frozenset()
        self._ids: list[int] = []  # the last few only, so that the cost of a token does not grow with the stream
        self._boundary = 0  # how many of them are context: up to here every character was whole
        self._num_emitted = 0  # characters of their text that are out

    def push(self, id: int) -> str:
        """Returns the text that `id` completes: empty while a character still lacks bytes."""
        if id in self._left_out:
            return ""
        self._ids.append(id)
        text = self._decode(self._ids)
        num_stable = len(text.rstrip("\ufffd"))  # replacement characters at the end may be the start of a character
        is_long = len(self._ids) > 24
        if is_long:  # but at most three of them may
            num_stable = max(num_stable, len(text) - 3)
        new = text[self._num_emitted : num_stable]
        self._num_emitted = max(self._num_emitted, num_stable)
        if num_stable == len(text):  # some decoders look one token back: keep those since the boundary before
            self._ids = self._ids[self._boundary :]
            self._boundary, self._num_emitted = len(self._ids), len(self._decode(self._ids))
        elif is_long:  # keep enough for three replacement characters, of three bytes each
            num_held = len(text) - self._num_emitted
            self._ids = self._ids[-12:]
            self._boundary, self._num_emitted = 0, max(len(self._decode(self._ids)) - num_held, 0)
        return new

    def flush(self) -> str:
        """Returns what is held back, ending the stream: the next `push` starts a new one."""
        rest = self._decode(self._ids)[self._num_emitted :]
        self._ids, self._boundary, self._num_emitted = [], 0, 0
        return rest


def make_tokenizer(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer that `spec` names: `bytes`, `train:N` (learnt from `texts()`), or the path of a tokenizer.json or its folder.

    ValueError for anything else, for N below 257 and for a file that is not a tokenizer.
    """
    if spec == "bytes":
        return Tokenizer.bytes()
    if spec.startswith("train:"):
        size = spec.removeprefix("train:")
        if not size.isdecimal() or int(size) < 257:
            raise ValueError(f"tokenizer {spec!r}: expected train:N with a whole number N of at least 257, as in train:4096")
        return Tokenizer.train(texts(), int(size))
    if not spec or not pathlib.Path(spec).exists():
        raise ValueError(f"tokenizer {spec!r}: expected bytes, train:N, or the path of a tokenizer.json or of a folder that holds one")
    return Tokenizer.from_file(spec)


def _byte_level(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Returns the byte-level BPE with these merges: the bytes in their order, `<|endoftext|>`, then a token for each merge."""
    # Byte-level BPE writes a byte as a printable character: itself where it is one, else the next from 256 on.
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
    vocab[END_OF_TEXT] = 256
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # Without merges, splitting into words changes nothing but the time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _parse(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{name}: not a tokenizer.json ({str(error).splitlines()[0]})") from error


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; expected a tokenizer.json or a folder that holds one") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text; expected a tokenizer.json") from error


def _read_config(file: pathlib.Path) -> dict:
    """Returns the JSON object in `file`, empty if there is no such file."""
    if not file.is_file():
        return {}
    text = _read(file)
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object ({error})") from error
