"""BERT's WordPiece as IVT feeds it to the network: `[CLS] pieces`, without `[SEP]`."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Encoding, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pieces
from torch import Tensor

from fmfa.errors import ConfigError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 512  # rows of BERT's position table


class WordPieceTokenizer:
    """Uncased BERT WordPiece behind the project's tokenizer interface.

    Captions are lower-cased, stripped of accents and split at punctuation. A caption becomes
    `[CLS] pieces` (no `[SEP]`, as IVT's released code feeds it). A batch is padded to its longest
    caption and nothing is truncated below `context_length` positions, the rows of the position table.
    A special token spelt out in a caption is ordinary text.

    Attributes:
        context_length: most positions of a row (512 for BERT).
        vocab_size: entries of the vocabulary.
        start_id, end_id, mask_id, pad_id: ids of `[CLS]`, `[SEP]` (never produced), `[MASK]`, `[PAD]`.
    """

    def __init__(self, vocabulary: dict[str, int], context_length: int = POSITIONS) -> None:
        """`vocabulary` maps each piece to its id. Raises ConfigError if a special token is missing."""
        if missing := [token for token in SPECIAL if token not in vocabulary]:
            raise ConfigError(
                f"not a BERT vocabulary: {', '.join(missing)} missing among {len(vocabulary)} entries; "
                "give a vocab.txt with one piece per line"
            )
        self._pieces = _uncased(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        self.context_length = context_length
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_id, _, self.start_id, self.end_id, self.mask_id = (vocabulary[token] for token in SPECIAL)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids of the captions, int64 [B, longest of the batch], padded with `pad_id`."""
        rows = [self._ids(encoding) for encoding in self._pieces.encode_batch(list(map(_whole, captions)))]
        ids = torch.full((len(rows), max(map(len, rows), default=1)), self.pad_id, dtype=torch.int64)
        for row, values in zip(ids, rows):
            row[: len(values)] = torch.tensor(values)
        return ids

    def attention_mask(self, ids: Tensor) -> Tensor:
        """1 where `ids` has a piece, 0 where it is padding; int64, shape of `ids`."""
        return (ids != self.pad_id).long()

    def length(self, caption: str) -> int:
        """Positions that the whole caption needs, `[CLS]` included; more than the context are cut."""
        return len(self._pieces.encode(_whole(caption)).ids) + 1

    def offsets(self, caption: str) -> list[tuple[int, int] | None]:
        """Character span [start, end) in `caption` of every position of its row; None for `[CLS]`."""
        return [None, *self._pieces.encode(_whole(caption)).offsets[: self.context_length - 1]]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every piece with its id."""
        return self._pieces.get_vocab(with_added_tokens=False)

    def vocabulary_file(self) -> str:
        """The content of a `vocab.txt` of this vocabulary, which `wordpiece_tokenizer` reads."""
        pieces = self.vocabulary
        return "\n".join(sorted(pieces, key=pieces.__getitem__)) + "\n"

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The token strings of a row of ids, special tokens and padding included."""
        return [self._pieces.id_to_token(int(i)) or "" for i in ids]

    def _ids(self, encoding: Encoding) -> list[int]:
        return [self.start_id, *encoding.ids[: self.context_length - 1]]


def wordpiece_tokenizer(
    vocab: str | Path, context_length: int = POSITIONS, size: int | None = None
) -> WordPieceTokenizer:
    """The WordPiece tokenizer of a vocabulary file, or of a model on the Hugging Face hub.

    Args:
        vocab: path of a `vocab.txt` (UTF-8, one piece per line, the line number is its id), or the name
            of a hub model that has one, such as "google-bert/bert-base-uncased".
        context_length: most positions of a row.
        size: pieces that the model has; None takes any number.

    Raises:
        ConfigError: the file is not a BERT vocabulary, or of another size, or the name cannot be fetched.
    """
    path = Path(vocab)
    if not path.is_file():
        path = _fetch_vocabulary(str(vocab))
    try:
        vocabulary = models.WordPiece.read_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ConfigError(f"{path}: {error}; expected a vocab.txt, UTF-8 with one piece per line") from error
    if size is not None and len(vocabulary) != size:
        raise ConfigError(
            f"the vocabulary {str(vocab)!r} has {len(vocabulary)} pieces, the model {size}; give the vocab.txt that "
            "belongs to the backbone"
        )
    return WordPieceTokenizer(vocabulary, context_length)


def _whole(caption: str) -> str:
    """The caption with U+FFFD for every half of a surrogate pair, which is no character."""
    return re.sub("[\ud800-\udfff]", "\ufffd", caption)


def _uncased(model: models.WordPiece) -> Pieces:
    pieces = Pieces(model)
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    return pieces


def _fetch_vocabulary(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "vocab.txt"))
    except Exception as error:
        raise ConfigError(
            f"vocabulary {name!r}: no such file here, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); without a network, give the path of a local vocab.txt"
        ) from error
