"""Tokenisation: text to token ids, once per request, and back.

Owns the tokenizer's files and what is known of the model without its weights. No PyTorch, no transformers. A short text
is encoded at once, a longer one in a thread, and the longest ones in processes (`encoding`): none of them delays a
stream, and no text waits for one of a longer class.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import tokenizers

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.checkpoint import Card, read_card
from tandem.errors import ContextExceeded, StartError
from tandem_frontend.preparation.chat_template import ChatTemplate
from tandem_frontend.preparation.encoding.pool import EncoderPool
from tandem_frontend.preparation.encoding.process import EncoderSpec
from tandem_frontend.preparation.encoding.texts import TextEncoder, TooManyTokens, open_backend, trim_memory
from tandem_frontend.preparation.encoding.turns import Turns
from tandem_frontend.response.token_table import BYTE_BY_LETTER, TokenTable

BLOCKING_CHARS_MAX = 4_096
"""Shorter texts are encoded at once (under 1 ms); longer ones in a thread, so that no stream waits for them."""
BLOCKING_TOKENS_MAX = 8_192
"""The same limit for decoding, in tokens."""
THREAD_CHARS_MAX = 65_536
"""Longer texts go to a process: a thread holds the interpreter's lock for 25 us per thousand tokens at the end of its
work, and cannot run at a lower priority than the event loop."""
THREADS_MAX = 2
"""Texts encoded in threads at a time."""
ENCODED_CONTEXTS_MAX = 4
"""Texts with more tokens than this many contexts are rejected while counting: each token takes a hundred bytes."""
SHRINK_MAX = 4
"""Factor by which normalisation may shorten a text before tokenisation (composed characters, collapsed spaces)."""
_BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """The tokenizer of the model that this frontend serves."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        card: Card,
        chat_template: ChatTemplate | None,
        pool: EncoderPool | None = None,
    ) -> None:
        """`pool` encodes the longest texts; None: a thread does, one of them at a time."""
        self._backend = backend
        self._card = card
        self.chat_template = chat_template
        """None where the model has none."""
        vocabulary = backend.get_vocab()
        self._token_bytes_max = max(len(token.encode()) for token in vocabulary)
        token_count = 1 + max(vocabulary.values())
        self.token_table = TokenTable.read(backend, token_count)
        """The text of each token; None where that depends on the tokens around it."""
        self.fits_vocabulary = token_count <= card.vocabulary_size
        """Whether all token ids are in the model's vocabulary: some checkpoints have added tokens beyond it."""
        added = backend.get_added_tokens_decoder().values()
        self._added_texts = frozenset(token.content for token in added)
        # Byte-level tokenizers spell a token's bytes in an alphabet of their own.
        self._is_byte_level = "ByteLevel" in repr(backend.decoder)
        self._special_texts = tuple(token.content for token in added if token.special and token.content)
        self._special_beginnings = frozenset(text[:2] for text in self._special_texts)
        self._texts = TextEncoder(backend, self._encoded_tokens_max)
        self._threads = Turns(THREADS_MAX)
        self._long_thread = Turns(1)
        self._pool = pool

    @classmethod
    def open(cls, model: Path, *, processes: int = 0) -> Tokenizer:
        """Read a model directory; its weights are not needed.

        Args:
            model: the directory.
            processes: limit of processes for the longest texts. They are started on demand, and `close` ends them.
                0: a thread encodes those too.

        Raises:
            StartError: names the unusable file.
        """
        card = read_card(model)
        file = model / "tokenizer.json"
        try:
            content = file.read_bytes()
            backend = open_backend(content)
        except (OSError, ValueError) as problem:
            raise StartError(f"{file} is not a readable tokenizer: {problem}", path=str(file)) from None
        tokenizer = cls(backend, card, ChatTemplate.read(model))
        if processes:
            digest = hashlib.sha256(content).hexdigest()
            tokenizer._pool = EncoderPool(EncoderSpec(file, digest, tokenizer._encoded_tokens_max), processes)
        del content
        trim_memory()
        return tokenizer

    async def close(self) -> None:
        """End the encoding processes, if there are any."""
        if self._pool is not None:
            await self._pool.close()

    @property
    def digest(self) -> str:
        """SHA-256 over the tokenizer's files, the same as in the workers' capabilities."""
        return self._card.tokenizer_digest

    @property
    def context_tokens_max(self) -> int:
        """Limit of prompt plus completion."""
        return self._card.context_tokens_max

    @property
    def vocabulary_size(self) -> int:
        """Rows of the model's embedding: all token ids are below it."""
        return self._card.vocabulary_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence tokens."""
        return self._card.eos_token_ids

    @property
    def prompt_bytes_max(self) -> int:
        """No text longer than this can fit the context, however it is tokenised."""
        return self.context_tokens_max * self._token_bytes_max * SHRINK_MAX

    async def encode(self, text: str, *, add_special_tokens: bool, field: str = "prompt") -> Sequence[int]:
        """Token ids of a text. Control tokens in it become their token ids.

        Returns a protobuf list, which a message copies as a whole: 100,000 ids take 20 us instead of 2 ms, and four
        bytes per id instead of 36.

        Raises:
            ContextExceeded: the text is far longer than the context; the error names `field`.
            ServiceError: an encoding process failed.
        """
        try:
            if len(text) <= BLOCKING_CHARS_MAX:
                return self._encode(text, add_special_tokens=add_special_tokens)
            if len(text) > THREAD_CHARS_MAX and self._pool is not None:
                return await self._pool.encode(text, add_special_tokens=add_special_tokens)
            turns = self._threads if len(text) <= THREAD_CHARS_MAX else self._long_thread
            encode = partial(self._encode, text, add_special_tokens=add_special_tokens)
            return await turns.run(partial(asyncio.to_thread, encode))
        except TooManyTokens:
            raise ContextExceeded(
                field,
                f"over {self._encoded_tokens_max} tokens exceed this model's maximum context length of "
                f"{self.context_tokens_max} tokens",
                limit=self.context_tokens_max,
            ) from None

    def _encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        return pb.TokenIds(ids=self._texts.encode(text, add_special_tokens=add_special_tokens)).ids

    async def decode_all(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """`decode` for a list of any length, without delaying streams."""
        if len(token_ids) <= BLOCKING_TOKENS_MAX:
            return self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        # decode_batch() releases the interpreter's lock; decode() holds it to its end.
        texts = await asyncio.to_thread(
            self._backend.decode_batch, [list(token_ids)], skip_special_tokens=skip_special_tokens
        )
        return str(texts[0])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete characters become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, also where they are only a part of a character; empty for an unknown id."""
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
        """A text without control tokens: an invisible joiner is inserted after the first character of each.

        For the content of messages, whose author must not be able to end a turn and begin another role's.
        """
        # Some models have hundreds of control tokens with the same beginning: most texts contain none.
        if not any(beginning in text for beginning in self._special_beginnings):
            return text
        for special in self._special_texts:
            # Nothing can be inserted into a token of one character: it is removed.
            harmless = f"{special[0]}\u2060{special[1:]}" if len(special) > 1 else ""
            # A replacement can complete the same token again, where the token ends as it begins.
            while special in text:
                text = text.replace(special, harmless)
        return text

    @property
    def _encoded_tokens_max(self) -> int:
        return ENCODED_CONTEXTS_MAX * self.context_tokens_max
