"""What a server allows each request, for its options, the protocol and the terminal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body_bytes: Of a request's body.
        body_seconds: Until the body must have come.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens to generate a choice.
        choices: Prompts times ``n`` of one request.
        stop_strings, stop_characters: How many stop strings, and how long each may be.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    prompt_tokens: int = 32768
    new_tokens: int = 4096
    choices: int = 128
    stop_strings: int = 16
    stop_characters: int = 256
