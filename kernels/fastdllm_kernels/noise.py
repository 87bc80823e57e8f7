"""The noise of draws, in PyTorch: a counter-based generator and what is made of its words.

A draw at temperature T is argmax_v(z_v / T - ln E_v) with E_v exponential: exact for softmax(z / T)
(Gumbel-max). E_v comes from Philox4x32-10, keyed by the row's seed and counted by (column pair,
position), as the logarithm of a 64-bit uniform that keeps full relative precision where E is small:
a 32-bit uniform cuts that tail off and distorts rare tokens (arXiv 2409.02908).

The kernels compute the same words and the same logarithms (select_triton.py).
"""

import struct

import torch

_M0, _M1, _W0, _W1, _U32 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def inverse(temperature: float) -> float:
    """1 / temperature, which both backends multiply by; 0 for 0. Bounded: fp32 holds it too.

    Of the temperature as fp32 holds it: a row draws alike whether it comes as a number or a tensor.
    """
    if temperature == 0:
        return 0.0
    bounded = min(max(temperature, 1e-30), 1e38)
    (held,) = struct.unpack("f", struct.pack("f", bounded))
    return min(1 / held, 1e30)


def inverse_of_rows(temperature, like):
    """`inverse` for each row of `like`, [N] fp32; temperature: a number, or a tensor [N] fp32."""
    if isinstance(temperature, torch.Tensor):
        bounded = (1 / temperature).clamp(max=1e30)
        return torch.where(temperature > 0, bounded, 0)
    return torch.full((len(like),), inverse(temperature), dtype=torch.float32, device=like.device)


def philox(seed, x0, x1):
    """Philox4x32-10 (Salmon et al., SC 2011) of counters (x0, x1, 0, 0) under 64-bit keys.

    seed, x0, x1: int64 tensors that broadcast; of the counters the low 32 bits count. Returns four
    int64 tensors that hold 32 bits each.
    """
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    x0, x1, k0, k1 = torch.broadcast_tensors(x0 & _U32, x1 & _U32, k0, k1)
    return philox_rounds(x0, x1, torch.zeros_like(x0), torch.zeros_like(x0), k0, k1)


def philox_rounds(x0, x1, x2, x3, k0, k1):
    """The ten rounds of Philox4x32 on counters and keys of 32 bits, held in int64."""
    for _ in range(10):
        high0, low0 = _multiply(x0, _M0)
        high1, low1 = _multiply(x2, _M1)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return x0, x1, x2, x3


def _multiply(x, constant):
    """High and low 32 bits of a 32 x 32 bit product held in int64.

    By halves: the full product would overflow.
    """
    low, high = x * (constant & 0xFFFF), x * (constant >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def log_exponential(high, low):
    """ln E for E = -ln U, U = (high 2^32 + low + 1/2) / 2^64, as fp32.

    Accurate to fp32's relative precision in both tails. Near U = 1 the direct logarithm loses every
    digit; there E = -log1p(-(1 - U)) with 1 - U counted from the top.
    """
    near_one, scale = high >= 2**31, 2.0**-32
    high = torch.where(near_one, _U32 - high, high)
    low = torch.where(near_one, _U32 - low, low)
    # U, or 1 - U where that is smaller.
    value = (high.float() + (low.float() + 0.5) * scale) * scale
    return torch.log(torch.where(near_one, -torch.log1p(-value), -torch.log(value)))


def gumbel_noise(seed, position, vocab, start=0):
    """Gumbel variates -ln E [.., vocab] fp32 of the columns from `start` (even) on.

    seed [..], position [..] int64: the key of each row, and what its draws are counted by.
    """
    column = start // 2 + torch.arange((vocab + 1) // 2, device=seed.device)
    words = philox(seed[..., None], column, position[..., None])
    even, odd = log_exponential(words[0], words[1]), log_exponential(words[2], words[3])
    pairs = torch.stack([even, odd], dim=-1)
    return -pairs.flatten(-2)[..., :vocab]


def uniform(seed, position):
    """The variate in [0, 1) of the score "random", one for each row [..] fp32.

    From a counter that no pair of columns uses.
    """
    return (philox(seed, torch.full_like(position, _U32), position)[0] >> 8).float() * 2.0**-24
