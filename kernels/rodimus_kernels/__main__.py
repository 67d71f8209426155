"""``python -m rodimus_kernels``: which native operators are loaded, and why others are not; with
``build``, build them."""

import sys

from . import build, native


def main() -> None:
    """Print one line per device, or build."""
    if sys.argv[1:2] == ["build"]:
        del sys.argv[1]
        return build.main()
    for device_type in build.LIBRARIES:
        reason = native.problem(device_type)
        isa = f" ({native.cpu_isa()})" if device_type == "cpu" and reason is None else ""
        print(f"native operators, {device_type}: {reason or 'loaded'}{isa}")


if __name__ == "__main__":
    main()
