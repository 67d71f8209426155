"""``python -m rodimus_kernels``: which native operators are loaded, and why others are not."""

from . import build, native


def main() -> None:
    """Print a line a device."""
    for device_type in build.LIBRARIES:
        reason = native.problem(device_type)
        isa = f" ({native.cpu_isa()})" if device_type == "cpu" and reason is None else ""
        print(f"native operators, {device_type}: {reason or 'loaded'}{isa}")


if __name__ == "__main__":
    main()
