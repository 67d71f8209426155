"""What a server allows each request; shared by its options, the protocol and the terminal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body_bytes: Size of a request's body.
        body_seconds: Time in which the body must arrive.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens to generate per choice.
        choices: Number of prompts times ``n`` in one request.
        stop_strings, stop_characters: How many stop strings, and how long each may be.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    prompt_tokens: int = 32768
    new_tokens: int = 4096
    choices: int = 128
    stop_strings: int = 16
    stop_characters: int = 256
