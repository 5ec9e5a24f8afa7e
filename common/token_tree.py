"""
Token trees: everything that shares a prefix, in one row of a causal language model.

A segment attends to its ancestors and causally to itself, never to its siblings, and its positions continue from the
end of its parent. In exact arithmetic this equals one row per leaf, with the shared prefix computed once. It is right
for softmax attention only: a recurrent or linear-attention decoder would leak from one sibling into the next.

Long rows attend branch by branch, so that what a dense mask would compute and throw away is not computed. A branch is a
child of the root with all that hangs below it (a candidate, its stems and replies). Its tokens attend to the root and
to the branch, never to another branch: C + 1 small attentions in place of one over the whole row.

Shapes: B rows, L tokens in the longest row, H heads.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass
class Segment:
    ids: list[int]                  # n token ids
    positions: np.ndarray           # [3, n] time, height, width, relative to the segment's start
    span: int                       # by how much the next position grows
    parent: int                     # index of the parent segment in the row, -1 for the root
    grid: Tensor | None = None      # [3] patches of the image in it, if there is one


def text_segment(ids: list[int], parent: int) -> Segment:
    return Segment(ids, np.tile(np.arange(len(ids)), (3, 1)), len(ids), parent)


def image_segment(before: list[int], image: list[int], after: list[int], *, grid: Tensor, merge: int,
                  parent: int) -> Segment:
    """Text, the tokens of an image of grid (1, gh, gw) patches, text; numbered as Qwen's multimodal RoPE does."""
    n, m, w = len(before), len(after), int(grid[2]) // merge
    rows, columns = np.divmod(np.arange(len(image)), w)
    end = n + max(len(image) // w, w)
    positions = np.concatenate([np.tile(np.arange(n), (3, 1)),
                                np.stack([np.full(len(image), n), n + rows, n + columns]),
                                np.tile(end + np.arange(m), (3, 1))], axis=1)
    return Segment(before + image + after, positions, end + m, parent, grid)


@dataclass
class Rows:
    ids: Tensor                     # [B, L]
    positions: Tensor               # [3, B, L]
    mask: Tensor                    # [B, 1, L, L] bool, True = may attend
    valid: Tensor                   # [B, L] bool, False = padding
    starts: list[list[int]]         # per row, where each segment begins
    ends: list[list[int]]           # per row, the next position after each segment
    trees: list[list[Segment]]      # what the rows were made from


def collate(rows: list[list[Segment]], device: torch.device) -> Rows:
    """Token trees -> padded tensors; padding attends to itself only, so that no softmax row is empty."""
    length = max(sum(len(s.ids) for s in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    starts, ends = [], []
    for b, row in enumerate(rows):
        at, starts_b, begin, spans = 0, [], [], []
        for s in row:
            first = begin[s.parent] + spans[s.parent] if s.parent >= 0 else 0
            n = len(s.ids)
            ids[b, at:at + n] = torch.tensor(s.ids)
            positions[:, b, at:at + n] = torch.from_numpy(s.positions + first)
            mask[b, at:at + n, at:at + n] = torch.ones(n, n, dtype=torch.bool).tril()
            parent = s.parent
            while parent >= 0:
                p = starts_b[parent]
                mask[b, at:at + n, p:p + len(row[parent].ids)] = True
                parent = row[parent].parent
            starts_b.append(at)
            begin.append(first)
            spans.append(s.span)
            at += n
        valid[b, :at] = True
        starts.append(starts_b)
        ends.append([first + span for first, span in zip(begin, spans)])
    return Rows(ids.to(device), positions.to(device), mask[:, None].to(device), valid.to(device), starts, ends, rows)


def path(row: list[Segment], leaf: int) -> list[int]:
    """Indices of the segments from the root to the leaf."""
    indices = [leaf]
    while row[indices[0]].parent >= 0:
        indices.insert(0, row[indices[0]].parent)
    return indices


def last_tokens(rows: Rows, segments: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(row index, column index) of the last token of each listed segment, in order."""
    where = [(b, starts[s] + len(tree[s].ids) - 1)
             for b, (tree, starts, chosen) in enumerate(zip(rows.trees, rows.starts, segments)) for s in chosen]
    b, column = torch.tensor(where, device=rows.ids.device).T
    return b, column


def reply_tokens(rows: Rows, written: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """
    Where each token of the given (row, segment) replies is predicted: (row [n], column [n], token id [n]).

    The first token is predicted at the last token of the parent, the others at their left neighbor.
    """
    b, column, token = [], [], []
    for row, segment in written:
        tree, start = rows.trees[row], rows.starts[row][segment]
        ids, parent = tree[segment].ids, tree[segment].parent
        b += [row] * len(ids)
        column += [rows.starts[row][parent] + len(tree[parent].ids) - 1, *range(start, start + len(ids) - 1)]
        token += ids
    return tuple(torch.tensor(x, device=rows.ids.device) for x in (b, column, token))


NAME = "token_tree"
LONG = 1536                             # tokens; in shorter rows one dense attention is about as fast
PAD_TO = {"cpu": 1, "cuda": 64}         # tokens of a branch are filled up to a multiple: a GPU prefers few shapes


@dataclass
class Branch:
    row: int
    count: int                          # of the queries, less those that fill up
    queries: Tensor                     # [q] columns; the last one fills up
    keys: Tensor                        # [k] columns; likewise
    mask: Tensor                        # [q, k] bool, True = may attend; what fills up keys is never seen


def branches(rows: Rows) -> list[Branch] | None:
    """The branches of all rows; None where rows are shorter than LONG."""
    if rows.ids.shape[1] < LONG:
        return None
    result, multiple = [], PAD_TO[rows.ids.device.type]
    for b, tree in enumerate(rows.trees):
        columns: dict[int, list[int]] = {}                      # of the root, 0, and of each of its children
        for s, segment in enumerate(tree):
            child = path(tree, s)[1] if s else 0                # which child of the root the segment belongs to
            columns.setdefault(child, []).extend(range(rows.starts[b][s], rows.starts[b][s] + len(segment.ids)))
        for child, queries in columns.items():
            keys = columns[0] + queries if child else queries
            filled = [torch.tensor(own + own[-1:] * (-len(own) % multiple), device=rows.ids.device)
                      for own in (queries, keys)]
            mask = rows.mask[b, 0][filled[0]][:, filled[1]]
            mask[:, len(keys):] = False
            result.append(Branch(b, len(queries), *filled, mask))
    return result


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              *, tree: list[Branch] | None = None, scaling: float | None = None, **rest) -> tuple[Tensor, None]:
    """
    As transformers' attention functions: query [B, H, L, d] -> [B, L, H, d]; without a tree it is plain SDPA.

    Grouped key heads are repeated, as transformers does with a mask: enable_gqa would mean CUDA's slowest kernel.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    result = torch.zeros_like(query)                                                    # padding stays 0
    for branch in tree:
        q, k, v = (x[branch.row][None, :, columns] for x, columns in (
            (query, branch.queries), (key, branch.keys), (value, branch.keys)))
        k, v = (repeat_kv(x, module.num_key_value_groups) for x in (k, v))
        seen, own = scaled_dot_product_attention(q, k, v, branch.mask, scale=scaling)[0], branch.queries[:branch.count]
        result[branch.row][:, own] = seen[:, :branch.count]
    return result.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
