"""Vectors for the tests of the operators on features."""
import torch


def vectors(kind: str, n: int, c: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    """[n, c] for the operators on features: ordinary ones, or of a kind that tempts them into a mistake."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=g, dtype=dtype)
    centres = torch.randn(7, c, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if kind == "clustered":  # far more near-ties than float32 can tell apart
        x = centres[torch.randint(7, (n,), generator=g)] + 1e-4 * x
    elif kind == "duplicates":
        x = torch.cat([centres, x[: n // 3 + 1]])[torch.randint(7 + n // 3 + 1, (n,), generator=g)]
        x[::5] = 0
    elif kind == "ties":  # dot products and distances of small integers tie exactly, between different vectors too
        x = torch.randint(-1, 2, (n, c), generator=g).to(dtype)
    elif kind == "ranges":  # products leave the range of float32
        x *= 10.0 ** torch.randint(-18, 19, (n, 1), generator=g).to(dtype)
    elif kind == "tiny":  # every distance is at the floor
        x *= 1e-25
    return x
