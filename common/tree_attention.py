"""
Attention over long token trees, branch by branch: what a dense mask would compute and throw away is not computed.

A branch is a child of the root with all that hangs below it (a candidate, its stems and replies). Its tokens attend to
the root and to the branch, never to another branch: C + 1 small attentions in place of one over the whole row.

Shapes: B rows, L tokens in a row, H heads.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.token_tree import Rows, path

NAME = "token_tree"
LONG = 1536                             # tokens; in shorter rows one dense attention is about as fast


@dataclass
class Branch:
    row: int
    queries: Tensor                     # [q] columns
    keys: Tensor                        # [k] columns
    mask: Tensor                        # [q, k] bool, True = may attend


def branches(rows: Rows, long: int) -> list[Branch] | None:
    """The branches of all rows; None where rows are shorter than `long`."""
    if rows.ids.shape[1] < long:
        return None
    found = []
    for b, tree in enumerate(rows.trees):
        own: dict[int, list[int]] = {}
        for s, segment in enumerate(tree):
            first = (path(tree, s) + [0])[1] if s else 0        # the child of the root that it belongs to; 0: the root
            own.setdefault(first, []).extend(range(rows.starts[b][s], rows.starts[b][s] + len(segment.ids)))
        for first, columns in own.items():
            queries = torch.tensor(columns, device=rows.ids.device)
            keys = torch.tensor(own[0] + columns if first else columns, device=rows.ids.device)
            found.append(Branch(b, queries, keys, rows.mask[b, 0][queries][:, keys]))
    return found


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              *, tree: list[Branch] | None = None, scaling: float | None = None, **rest) -> tuple[Tensor, None]:
    """As transformers' attention functions: query [B, H, L, d] -> [B, L, H, d]; without a tree it is plain SDPA."""
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    result = torch.zeros_like(query)                                                    # padding stays 0
    for branch in tree:
        q, k, v = (x[branch.row][None, :, columns] for x, columns in (
            (query, branch.queries), (key, branch.keys), (value, branch.keys)))
        result[branch.row][:, branch.queries] = scaled_dot_product_attention(
            q, k, v, attn_mask=branch.mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])[0]
    return result.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
