"""How the images, videos or frames of one sample share its visual tokens."""

from collections.abc import Sequence

__all__ = ["quotas"]


def quotas(total: int, segment_sizes: Sequence[int]) -> list[int]:
    """Divide `total` tokens over segments in proportion to their sizes, by largest remainder.

    Each segment gets the whole part of its share; what is left goes, one token each, to the largest
    fractional parts, the lowest index first where they are equal. No segment gets more than it has, and
    asking for more than there are gives all.

    Args:
        total: tokens to keep.
        segment_sizes: tokens of each image, video or frame.

    Returns:
        Tokens to keep of each, summing to min(total, sum(segment_sizes)).

    Raises:
        ValueError: a negative total or size.
    """
    if total < 0:
        raise ValueError(f"cannot keep {total} tokens")
    if any(size < 0 for size in segment_sizes):
        raise ValueError(f"segment sizes must not be negative: {list(segment_sizes)}")
    available = sum(segment_sizes)
    total = min(total, available)
    if total == 0:
        return [0] * len(segment_sizes)
    # In integers: with floats, equal fractional parts differ by rounding and ties are not ties.
    shares = [divmod(total * size, available) for size in segment_sizes]
    result = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (-shares[index][1], index))
    for index in by_remainder[: total - sum(result)]:
        result[index] += 1
    return result
