"""GPUs that runs are planned for and measured on."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Figures from the manufacturer's data sheet."""

    flops: float
    """Dense bf16 FLOP/s."""
    memory: float
    """Bytes."""


# keyed by a part of the device's name; the first match counts
DEVICES = {
    "H200 NVL": Gpu(835e12, 141e9),
    "H200": Gpu(989e12, 141e9),
    "H100 NVL": Gpu(835e12, 94e9),
    "H100 PCIe": Gpu(756e12, 80e9),
    "H100": Gpu(989e12, 80e9),
    "A100": Gpu(312e12, 80e9),
    "GB200": Gpu(2500e12, 186e9),
    "B200": Gpu(2250e12, 180e9),
}
