"""Tokens of a text, and text from tokens as they arrive: whole characters only, and no part of a
stop string."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as _Fast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import InputError
from ..loading import vocabulary_size

# An incomplete character decodes to this one, or each of its bytes does.
INCOMPLETE = "\ufffd"
# Tokens decoded again with each new one, so that joints between tokens come out right.
_CONTEXT, _MOST, _LONGEST = 6, 18, 256
# Distances at which to look back for the start of a character, which has at most four tokens.
_DISTANCES = (*range(_CONTEXT, _CONTEXT + 4), 27, 81, 243)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    vocab_size: int,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """The tokens of a prompt.

    Args:
        vocab_size: Tokens that the model knows.

    Raises:
        InputError: the text has no tokens, or one unknown to the model, or it is not Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is no UTF-8 text at character {error.start}") from error
    ids = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
    if not ids:
        raise InputError("the prompt has no tokens: there is nothing to continue")
    if max(ids) >= vocab_size:
        raise InputError(
            f"the tokenizer gives token {max(ids)}, and the model knows {vocab_size}: they do not"
            " belong together"
        )
    return ids


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text of tokens with every space: by default, some tokenizers remove spaces."""
    if _decodes_as_rust(tokenizer):
        return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def _decodes_as_rust(tokenizer):
    """Whether Python adds nothing to the Rust tokenizer: calling it directly halves the time."""
    return all(
        getattr(getattr(tokenizer, name), "__func__", None) is getattr(_Fast, name)
        for name in ("decode", "_decode")
    )


def skipped_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int = 0) -> frozenset[int]:
    """The tokens that texts always leave out: special ones, and ids below the model's
    ``vocab_size`` that the tokenizer does not know, which a tokenizer in Python would refuse to
    decode."""
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    unknown = range(vocabulary_size(tokenizer), vocab_size)
    return frozenset(x for x in special if not decode(tokenizer, [x])) | frozenset(unknown)


_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def bytes_of_part(name: str, text: str) -> bytes | None:
    """The bytes of a token that is only part of a character.

    Args:
        name: The tokenizer's name for it: in the alphabet of byte-level BPE, or ``<0xC3>``.
        text: What it decodes to.

    Returns:
        None if the name does not say.
    """
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
        return bytes.fromhex(name[3:5])
    if not all(character in _BYTES for character in name):
        return None
    data = bytes(_BYTES[character] for character in name)
    return data if data.decode(errors="replace") == text else None


class TextStream:
    """Text of a growing list of tokens; released text is never taken back.

    Bytes of an unfinished character, and text that may be the beginning of a stop string, are held
    back. New tokens are decoded all at once when ``text`` is read, or with stop strings one by one
    as they arrive. That takes a few decodings of at most a few hundred tokens each.

    Args:
        stop: Strings that end the text.
        prompt: Tokens that the text continues. Without them decoders would drop the space before
            the first word, as at the beginning of a text.
        skipped: ``skipped_tokens`` of the tokenizer, found once for many streams.

    Attributes:
        stopped: Whether a stop string was found; the text ends before it.
        error: What the tokenizer raised, if anything; the text then grows no further.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        skipped: frozenset[int] | None = None,
    ):
        self._tokenizer, self._stop = tokenizer, stop
        self._skipped = skipped_tokens(tokenizer) if skipped is None else skipped
        self._context, self._shown = [], 0
        self._new = 0
        self._held = ""
        self._text = ""
        self.stopped = False
        self.error: BaseException | None = None
        with self._keeping_errors():
            self._context, self._shown = self._anchor(prompt)

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        # a panic of a tokenizer in Rust is not an `Exception`
        except BaseException as error:
            self.error = error

    def _anchor(self, prompt):
        """The prompt's last token that is text by itself, and the length of that text."""
        for token in reversed(prompt[-_LONGEST:]):
            text = "" if token in self._skipped else decode(self._tokenizer, [token])
            if text and INCOMPLETE not in text:
                return [token], len(text)
        return [], 0

    @property
    def text(self) -> str:
        """The text released so far."""
        if self._new:
            self._decode_new()
        return self._text

    def push(self, token: int) -> None:
        """Take the next token."""
        if token in self._skipped or self.error is not None:
            return
        self._context.append(token)
        self._new += 1
        if self._stop:
            self._decode_new()

    def finish(self) -> None:
        """Release what was held back, because no token follows."""
        self._new = 0
        if self.stopped or self.error is not None:
            return
        with self._keeping_errors():
            self._release(self._decode()[self._shown :])
        if not self.stopped:
            self._text += self._held

    def _decode_new(self):
        self._new = 0
        with self._keeping_errors():
            self._take_new()

    def _take_new(self):
        whole = self._decode()
        decoded = whole.rstrip(INCOMPLETE)
        self._release(decoded[self._shown :])
        self._shown = max(self._shown, len(decoded))
        if len(self._context) > _MOST:
            # bytes of an unfinished character can turn those before them into marks, too
            self._forget(whole, is_settled=self._shown <= len(decoded))

    def _forget(self, whole, is_settled):
        """Keep only the last tokens, and some before them if they begin inside a character."""
        for distance in _DISTANCES if is_settled else ():
            kept = self._decode(-distance).rstrip(INCOMPLETE)
            if kept and INCOMPLETE not in kept:
                self._context, self._shown = self._context[-distance:], len(kept)
                return
            if distance >= len(self._context):
                break
        # bytes that are no text: wait for the rest of what is held back, but not forever
        held = whole[self._shown :]
        is_short = len(held) <= _LONGEST and len(self._context) <= 2 * _LONGEST
        if is_short and (held or not is_settled):
            return
        if len(held) > _LONGEST or not self._decode(-_LONGEST).endswith(held):
            self._release(held)
            held = ""
        self._context = self._context[-(_LONGEST if held else _CONTEXT) :]
        self._shown = len(self._decode()) - len(held)

    def _decode(self, start=0):
        return decode(self._tokenizer, self._context[start:])

    def _release(self, piece):
        if self.stopped or not piece:
            return
        held = self._held + piece
        found = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._text += held[: min(found)]
            return
        kept = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._text += held[: len(held) - kept]
        self._held = held[len(held) - kept :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
