"""The tokenization hop: text to token ids, once for each request, and the way back.

Owns the tokenizer's files and what is known of the model without its weights. No PyTorch, no transformers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from tandem.checkpoint import Card, read_card
from tandem.errors import ContextExceeded, StartError
from tandem_frontend.chat_template import ChatTemplate
from tandem_frontend.token_table import BYTE_BY_LETTER, TokenTable

BLOCKING_CHARS_MAX = 8_192
"""Shorter texts are encoded at once (under 3 ms); longer ones in a thread, so that no stream waits for them."""
BLOCKING_TOKENS_MAX = 8_192
"""The same for the way back."""
ENCODED_CONTEXTS_MAX = 4
"""No text is made into more tokens than so many contexts hold: each takes a hundred bytes on the way."""
COUNTED_CHARS = 16_384
"""A text that may be longer than that is counted first, in pieces of this size."""
SHRINK_MAX = 4
"""Normalisation may make a text shorter before it is cut into tokens (composed characters, collapsed spaces)."""
_BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """The tokenizer of the model this frontend speaks for."""

    def __init__(self, backend: tokenizers.Tokenizer, card: Card, chat_template: ChatTemplate | None) -> None:
        self._backend = backend
        self._card = card
        self.chat_template = chat_template
        """None where the model has none."""
        vocabulary = backend.get_vocab()
        self._token_bytes_max = max(len(token.encode()) for token in vocabulary)
        self.token_table = TokenTable.read(backend, 1 + max(vocabulary.values()))
        """What each token adds to a text; None where that depends on the tokens around it."""
        added = backend.get_added_tokens_decoder().values()
        self._added_texts = frozenset(token.content for token in added)
        # A tokenizer writes a token's bytes in letters of its own when its decoder is of this kind.
        self._is_byte_level = "ByteLevel" in repr(backend.decoder)
        self._special_texts = tuple(token.content for token in added if token.special and token.content)

    @classmethod
    def open(cls, model: Path) -> Tokenizer:
        """Read a model directory; its weights are not needed.

        Raises:
            StartError: names the file at fault.
        """
        card = read_card(model)
        file = model / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as problem:  # the library raises bare Exception
            raise StartError(f"{file} is not a tokenizer: {problem}", path=str(file)) from None
        # A file may say that texts are cut or padded; here neither may happen unseen.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, card, ChatTemplate.read(model))

    @property
    def digest(self) -> str:
        """SHA-256 over the tokenizer's files, as workers tell theirs."""
        return self._card.tokenizer_digest

    @property
    def context_tokens_max(self) -> int:
        """Prompt plus completion."""
        return self._card.context_tokens_max

    @property
    def vocabulary_size(self) -> int:
        """Rows of the model's embedding: token ids are below it."""
        return self._card.vocabulary_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens at which the model ends."""
        return self._card.eos_token_ids

    @property
    def prompt_bytes_max(self) -> int:
        """No text longer than this can fit the context, however it is cut into tokens."""
        return self.context_tokens_max * self._token_bytes_max * SHRINK_MAX

    async def encode(self, text: str, *, add_special_tokens: bool, field: str = "prompt") -> list[int]:
        """Token ids of a text. Control tokens in it are read as such.

        Raises:
            ContextExceeded: it is far beyond the context; `field` is what the refusal names.
        """
        if len(text) <= BLOCKING_CHARS_MAX:
            return self._encode(text, add_special_tokens, field)
        return await asyncio.to_thread(self._encode, text, add_special_tokens, field)

    async def decode_all(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """`decode` for a list of any length: no stream waits for it."""
        if len(token_ids) <= BLOCKING_TOKENS_MAX:
            return self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        # A batch, even of one, lets other threads run; decode() holds the interpreter's lock to its end.
        texts = await asyncio.to_thread(
            self._backend.decode_batch, [token_ids], skip_special_tokens=skip_special_tokens
        )
        return str(texts[0])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no whole character show as U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, also where they are only a part of a character; empty for an unknown id."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token in self._added_texts:
            return token.encode()
        if _BYTE_FALLBACK.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self._is_byte_level and all(character in BYTE_BY_LETTER for character in token):
            return bytes(BYTE_BY_LETTER[character] for character in token)
        return token.replace("\u2581", " ").encode()

    def without_control(self, text: str) -> str:
        """A text in which no control token can be read: each one gets an invisible joiner behind its first character.

        For the content of messages, whose author must not be able to end a turn or to begin another's.
        """
        for special in self._special_texts:
            # A token of one character has no inside.
            harmless = f"{special[0]}\u2060{special[1:]}" if len(special) > 1 else ""
            # What is left may make the same token again, where its end is its beginning too.
            while special in text:
                text = text.replace(special, harmless)
        return text

    def _encode(self, text: str, add_special_tokens: bool, field: str = "prompt") -> list[int]:
        if len(text) > self._encoded_tokens_max:
            self._check_count(text, field)
        return self._encoding(text, add_special_tokens).ids

    def _check_count(self, text: str, field: str) -> None:
        """Count the tokens of a long text without holding more than a piece of them."""
        count = 0
        for begin in range(0, len(text), COUNTED_CHARS):
            count += len(self._encoding(text[begin : begin + COUNTED_CHARS], False))
            if count > self._encoded_tokens_max:
                raise ContextExceeded(
                    field,
                    f"over {self._encoded_tokens_max} tokens are beyond this model's maximum context length of "
                    f"{self.context_tokens_max} tokens",
                    limit=self.context_tokens_max,
                )

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        # A batch, even of one, lets other threads run; encode() holds the interpreter's lock to its end, in whatever
        # thread it is, and everybody waits.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]

    @property
    def _encoded_tokens_max(self) -> int:
        return ENCODED_CONTEXTS_MAX * self.context_tokens_max
