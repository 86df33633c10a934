"""Byte-pair tokenizers, CLIP's and a small one, that know which characters each token was read from."""

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import ftfy
import regex
import torch
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Encoding, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from fmfa.errors import ConfigError

CLIP_CONTEXT, CLIP_VOCABULARY = 77, 49408
SMALL_CONTEXT = 64
SMALL_VOCABULARY = Path(__file__).parents[2] / "data" / "vocabulary.json"
PAD, MASK, START, END = "<|pad|>", "<|mask|>", "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # CLIP's mark on the last piece of a word
# How CLIP cuts a cleaned caption into words before it merges bytes.
_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE | regex.VERSION0)
Span = tuple[int, int]
# Words and gaps. Repairs rarely reach over a gap, so each is aligned by itself.
_CHUNKS = re.compile(r"\s+|\S+")
_MOST_MATCHES = 20_000  # pairs of equal characters in chunks that are compared by letters; 500 letters of prose


class Tokenizer(Protocol):
    """What the data pipeline, the models and the analyses ask of a tokenizer.

    Attributes:
        context_length: most positions of an encoded row, start and end included.
        vocab_size: number of ids.
        start_id, end_id, mask_id, pad_id: the special ids. Ids in [1, mask_id) are ordinary tokens
            in the byte-pair tokenizers, and `end_id` is the largest of all.
    """

    context_length: int
    vocab_size: int
    start_id: int
    end_id: int
    mask_id: int
    pad_id: int

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids of the captions, int64 [B, L]; byte-pair tokenizers pad every row to the context."""

    def length(self, caption: str) -> int:
        """Positions that the whole caption needs, start and end included; more than the context are cut."""

    def offsets(self, caption: str) -> list[Span | None]:
        """Character span in `caption` of each position up to the last token; None for special tokens."""

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The token strings of a row of ids."""


class BytePairTokenizer:
    """A lower-casing byte-level BPE tokenizer: `start pieces end`, padded with id 0 to the context.

    Captions are cleaned as in CLIP (broken unicode repaired, HTML entities resolved, white space
    collapsed, lower case). Every caption can be encoded, since every byte is a token. An over-long
    caption loses its last pieces and keeps its end token. The name of a special token spelt out in a
    caption is ordinary text.

    Attributes:
        context_length, vocab_size, start_id, end_id, mask_id, pad_id: see `Tokenizer`.
    """

    pad_id = 0

    def __init__(self, backend: Backend, context_length: int) -> None:
        """`backend` holds the vocabulary; its last three ids are mask, start and end.

        Raises:
            ConfigError: the context has no room for start, end and one token.
        """
        if context_length < 3:
            raise ConfigError(f"a context of {context_length} positions: give at least 3 (start, token, end)")
        self._backend = backend
        self.context_length = context_length
        self.vocab_size = backend.get_vocab_size()
        self.mask_id, self.start_id, self.end_id = range(self.vocab_size - 3, self.vocab_size)
        self._bytes = {character: byte for byte, character in _byte_characters().items()}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids of the captions, int64 [B, context_length]."""
        ids = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(ids, captions):
            pieces = self._encode(clean_caption(caption))[0].ids[: self.context_length - 2]
            row[: len(pieces) + 2] = torch.tensor([self.start_id, *pieces, self.end_id])
        return ids

    def length(self, caption: str) -> int:
        """Positions that the whole caption needs, start and end included; more than the context are cut."""
        return len(self._encode(clean_caption(caption))[0].ids) + 2

    def offsets(self, caption: str) -> list[Span | None]:
        """Character span [start, end) in the caption as given, for each position up to the end token.

        None for start and end. Spans never run backwards; the tokens of one character that has
        several bytes share its span.
        """
        text, origin = cleaned_with_origin(caption)
        encoding, word_starts = self._encode(text)
        spans: list[Span | None] = [None]
        for word, (start, end) in list(zip(encoding.word_ids, encoding.offsets))[: self.context_length - 2]:
            begin = word_starts[word or 0]  # a token of given words always has one
            start, end = start + begin, end + begin
            spans.append((origin[start][0], origin[end - 1][1]))
        return [*spans, None]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The text of each token; a byte that is no character by itself becomes U+FFFD."""
        return [self._text(self._backend.id_to_token(int(i)) or "") for i in ids]

    def _encode(self, text: str) -> tuple[Encoding, list[int]]:
        words = list(_WORDS.finditer(text))
        encoding = self._backend.encode([word.group() for word in words], is_pretokenized=True)
        return encoding, [word.start() for word in words]

    def _text(self, token: str) -> str:
        if token in (PAD, MASK, START, END):
            return token
        return bytes(self._bytes[c] for c in token.removesuffix(WORD_END)).decode("utf-8", errors="replace")


def clip_tokenizer(context_length: int = CLIP_CONTEXT) -> BytePairTokenizer:
    """CLIP's tokenizer with FMFA's and IRRA's `<|mask|>` at id 49405; ids equal open_clip's otherwise.

    The mask takes the place of the last ordinary merge, "jeky" + "ll" at a word's end, so that the
    vocabulary keeps its 49408 entries. That merge is never made: a caption with the word "jekyll" has
    the two pieces instead of the one (the released code fails on it).

    Raises:
        ConfigError: the context has fewer than 3 positions.
    """
    return BytePairTokenizer(_clip_backend(), context_length)


def small_tokenizer(path: str | Path = SMALL_VOCABULARY, context_length: int = SMALL_CONTEXT) -> BytePairTokenizer:
    """The tokenizer of a vocabulary written by `train_small_vocabulary`; by default the shipped one.

    Raises:
        ConfigError: no such file, or not a vocabulary of this kind.
    """
    try:
        backend = Backend.from_str(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"vocabulary {path}: {error.strerror}; write one with fmfa.pretraining.vocabulary.train_small_vocabulary"
        ) from error
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ConfigError(f"vocabulary {path} is not a file of the tokenizers library: {error}") from error
    last = backend.get_vocab_size() - 1
    if [backend.id_to_token(i) for i in (0, last - 2, last - 1, last)] != [PAD, MASK, START, END]:
        raise ConfigError(
            f"vocabulary {path}: expected {PAD} at id 0 and {MASK}, {START}, {END} at the last three ids; "
            "write it with fmfa.pretraining.vocabulary.train_small_vocabulary"
        )
    return BytePairTokenizer(backend, context_length)


def backbone_tokenizer(text: Mapping, vocabulary: str | Path = "") -> BytePairTokenizer:
    """The tokenizer of a CLIP backbone, known by the size of its vocabulary.

    Args:
        text: the `text_cfg` of its open_clip configuration.
        vocabulary: of the small tokenizer; empty for the shipped one.

    Raises:
        ConfigError: no tokenizer of that size is known, or a vocabulary is given to a backbone with CLIP's own.
    """
    context, size = text.get("context_length", CLIP_CONTEXT), text.get("vocab_size", CLIP_VOCABULARY)
    if size == CLIP_VOCABULARY and not vocabulary:
        return clip_tokenizer(context)
    tokenizer = small_tokenizer(vocabulary or SMALL_VOCABULARY, context)
    if tokenizer.vocab_size != size:
        raise ConfigError(
            f"the backbone has a vocabulary of {size} tokens; known are CLIP's with {CLIP_VOCABULARY} and "
            f"{vocabulary or SMALL_VOCABULARY} with {tokenizer.vocab_size}"
        )
    return tokenizer


def phrase_tokens(tokenizer: Tokenizer, caption: str, span: Span) -> list[int]:
    """Positions of the caption's encoded row whose characters overlap the span [start, end).

    Empty where the phrase was truncated away or is white space.
    """
    start, end = span
    offsets = tokenizer.offsets(caption)
    return [i for i, token in enumerate(offsets) if token and token[0] < end and start < token[1]]


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return dict(sorted(characters.items()))


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


@lru_cache(maxsize=1)
def _clip_backend() -> Backend:
    source = SimpleTokenizer()
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.get)[:-1]
    ordinary = sorted(source.encoder, key=source.encoder.get)[: 512 + len(merges)]
    vocabulary = {token: i for i, token in enumerate([*ordinary, MASK, START, END])}
    return _byte_level(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=WORD_END))


def clean_caption(caption: str) -> str:
    """The text that a byte-pair tokenizer reads: CLIP's cleaning, as in open_clip."""
    return " ".join(_repair(caption).split()).lower()


def cleaned_with_origin(caption: str) -> tuple[str, list[Span]]:
    """`clean_caption`, and for each of its characters the span of `caption` that it came from.

    Spans are not empty, and neither their starts nor their ends ever run backwards.
    """
    repaired = _repair(caption)
    origin = _alignment(caption, repaired)
    spans: list[Span] = []
    previous_end = 0
    for word in re.finditer(r"\S+", repaired):
        if spans:
            spans.append((origin[previous_end][0], origin[word.start() - 1][1]))
        for i in range(*word.span()):
            # One letter may have a longer lower case: U+0130 becomes two.
            spans += [origin[i]] * len(repaired[i].lower())
        previous_end = word.end()
    return " ".join(repaired.split()).lower(), spans


def _repair(caption: str) -> str:
    # Printable ASCII without entities is what ftfy and unescape leave alone; they are most of the cost.
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return caption
    return html.unescape(html.unescape(ftfy.fix_text(caption)))


def _alignment(original: str, repaired: str) -> list[Span]:
    """For each character of `repaired` the non-empty span of `original` that it replaces, in order."""
    before, after = _CHUNKS.findall(original), _CHUNKS.findall(repaired)
    if [chunk.isspace() for chunk in before] != [chunk.isspace() for chunk in after]:
        before, after = [original], [repaired]
    changed = [(Counter(old), new) for old, new in zip(before, after) if len(old) != len(new)]
    matches = sum(counts[character] for counts, new in changed for character in new)
    spans: list[Span] = []
    start = 0
    for old, new in zip(before, after):
        if len(old) == len(new):
            spans += [(start + i, start + i + 1) for i in range(len(old))]
        elif matches > _MOST_MATCHES:  # difflib can take the cube of their number
            spans += [(start, start + len(old))] * len(new)
        else:
            spans += [(start + first, start + last) for first, last in _chunk_alignment(old, new)]
        start += len(old)
    return spans


def _chunk_alignment(old: str, new: str) -> list[Span]:
    spans: list[Span] = []
    for operation, start, end, first, last in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if operation == "equal":
            spans += [(i, i + 1) for i in range(start, end)]
        elif operation == "insert":  # what is new belongs to the character before it
            spans += [(max(start - 1, 0), max(start, 1))] * (last - first)
        else:
            spans += [(start, end)] * (last - first)
    return spans
