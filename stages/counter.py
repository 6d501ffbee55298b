"""Counter-based random numbers: keyed by a tensor's name and an element's place, the same on every device and split."""

from __future__ import annotations

import zlib

import torch


def seed_of(name: str) -> int:
    """A seed (31 bits) from a tensor's name."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def hash_(x: torch.Tensor) -> torch.Tensor:
    """Mixes int32 counters, in place: the finaliser ``lowbias32`` of Chris Wellons' hash-prospector.

    Right shifts of int32 carry the sign along; the masks cut it off.
    """
    x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15) & 0x1FFFF).mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def bits(shape: tuple[int, int], key: tuple[int, int], device: torch.device, first_row: int = 0) -> torch.Tensor:
    """Int32 (m, n) random bits of rows from ``first_row`` on; ``key`` is a seed and a number that tells draws apart."""
    start = start_of(*key)
    rows = hash_(torch.arange(first_row, first_row + shape[0], dtype=torch.int32, device=device) + start)
    return hash_(rows[:, None] + torch.arange(shape[1], dtype=torch.int32, device=device))


def start_of(seed: int, draw: int) -> int:
    """The counter that a draw begins with, as an int32."""
    return int(hash_(torch.tensor([_signed(seed + draw * 0x3C6EF372)], dtype=torch.int32)))


def uniform(shape: tuple[int, int], key: tuple[int, int], device: torch.device, first_row: int = 0) -> torch.Tensor:
    """Float32 (m, n) in [0, 1): 24 random bits each."""
    return bits(shape, key, device, first_row).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def signs(shape: tuple[int, int], seed: int, device: torch.device) -> torch.Tensor:
    """Float32 (m, n) of -1 and 1."""
    return bits(shape, (seed, 0), device).bitwise_and_(2).sub_(1).float()


def _signed(value: int) -> int:
    """The low 32 bits as an int32."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value
