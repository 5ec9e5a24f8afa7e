"""
Photographs that look alike, found by a hash of their low frequencies, so that a burst does not spread over splits.

Two pictures are near-duplicates if their hashes differ in at most NEAR of 63 bits, also when one is mirrored. It finds
other sizes, compression, brightness, and slightly moved cameras; not other crops of one scene, nor rotations.
"""
import numpy as np
from scipy.fft import dctn

from common.images import resize

SIDE, LOW = 32, 8       # px of the shrunk picture; frequencies kept per direction
NEAR = 10               # bits


def dct_hash(image: np.ndarray) -> list[str]:
    """
    [hash, hash of the mirrored picture], hexadecimal, of uint8 [H, W, 3].

    A bit for each of the LOW x LOW lowest frequencies of the luma but the constant one: above their median or not.
    """
    luma = resize(image, (SIDE, SIDE), "area") @ np.array([0.299, 0.587, 0.114])
    hashes = []
    for view in (luma, luma[:, ::-1]):
        low = dctn(view, norm="ortho")[:LOW, :LOW].flatten()[1:]                     # [63]
        bits = low > np.median(low)
        hashes.append(f"{int(''.join('01'[bit] for bit in bits.astype(int)), 2):016x}")
    return hashes


def near_pairs(pictures: list[dict]) -> list[dict]:
    """[{a, b, bits}] of sources whose pictures {source, hash} are near-duplicates; the smallest difference of each."""
    own, mirrored = (np.array([int(picture["hash"][i], 16) for picture in pictures], dtype=np.uint64) for i in (0, 1))
    found = {}
    for i, picture in enumerate(pictures):
        rest = slice(i + 1, None)
        bits = np.minimum(np.bitwise_count(own[rest] ^ own[i]), np.bitwise_count(mirrored[rest] ^ own[i]))
        for j in np.nonzero(bits <= NEAR)[0]:
            pair = tuple(sorted((picture["source"], pictures[i + 1 + j]["source"])))
            if pair[0] != pair[1]:
                found[pair] = min(int(bits[j]), found.get(pair, 64))
    return [{"a": a, "b": b, "bits": bits} for (a, b), bits in sorted(found.items())]


def families(names: list[str], pairs: list[dict]) -> dict[str, str]:
    """Source -> the first name of those that near-duplicates link it to; they share a split."""
    family = {name: name for name in names}
    for pair in pairs:
        first, other = sorted((family[pair["a"]], family[pair["b"]]))
        family = {name: first if own == other else own for name, own in family.items()}
    return family
