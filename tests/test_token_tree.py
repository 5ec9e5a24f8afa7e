"""
Token trees against transformers' own forward pass with one plain row per leaf.

Run     python -m pytest tests/test_token_tree.py       # 15 s
"""

import pytest
import torch

from common import mllm, token_tree
from conftest import build_judge, make_images
from plain_rows import leaves


def build_trees(judge) -> tuple[list, list]:
    """Two rows of unlike image sizes; below each candidate two replies, and the first goes on in two ways."""
    groups = [make_images(1, 32, 32, count=2), make_images(2, 32, 64, count=3)]
    _, grids = mllm.pixel_patches(judge, groups)
    trees, at = [], 0
    for group in groups:
        row = mllm.prompt_row(judge, grids[at], grids[at + 1:at + len(group)])
        for candidate in range(1, len(group)):
            row += [token_tree.text_segment(judge.encode("<thinking>close; good"), candidate),
                    token_tree.text_segment(judge.encode("consistency: 7, naturalness"), candidate)]
            first = len(row) - 2
            row += [token_tree.text_segment(judge.encode(end), first) for end in ("; far off", "</answer>1")]
        trees.append(row)
        at += len(group)
    return groups, trees


def plain_hidden(judge, group: list, row: list, *, leaf: int) -> torch.Tensor:
    """Hidden states [n, D] of one leaf's row, all by transformers: images, positions and causal mask."""
    path = token_tree.path(row, leaf)
    ids = torch.tensor([[token for s in path for token in row[s].ids]])
    pixels, grids = mllm.pixel_patches(judge, [[group[0], group[path[1]]]])
    output = judge.net.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                             image_grid_thw=grids, mm_token_type_ids=(ids == judge.image_id).int())
    return output.last_hidden_state[0]


def gradients(judge, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    judge.net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in judge.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("view", ["image", "clip"])
def test_a_tree_equals_one_row_per_leaf_in_values_and_gradients(view):
    judge, _ = build_judge(view)
    groups, trees = build_trees(judge)
    rows = token_tree.collate(trees, judge.device)
    hidden = mllm.hidden_states(judge, rows, mllm.image_features(judge, groups)[0])
    tree_loss, plain_loss, compared = 0.0, 0.0, 0
    for b, (group, row) in enumerate(zip(groups, trees)):
        for leaf in leaves(row):
            plain = plain_hidden(judge, group, row, leaf=leaf)
            path = token_tree.path(row, leaf)
            columns = [rows.starts[b][s] + i for s in path for i in range(len(row[s].ids))]
            torch.testing.assert_close(hidden[b, columns], plain, rtol=1e-5, atol=1e-5)
            direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(100 * b + leaf))
            tree_loss = tree_loss + (hidden[b, columns] * direction).sum()
            plain_loss = plain_loss + (plain * direction).sum()
            compared += 1
    assert compared == 3 * 2 + 3 * 3                                    # three leaves per candidate
    ours, theirs = gradients(judge, tree_loss), gradients(judge, plain_loss)
    assert ours.keys() == theirs.keys() and any("visual" in name for name in ours)
    for name, gradient in theirs.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * max(size, 1), msg=name)


def test_siblings_do_not_see_each_other_and_padding_changes_nothing():
    judge, _ = build_judge()
    groups, trees = build_trees(judge)
    with torch.no_grad():
        features, _ = mllm.image_features(judge, groups)
        rows = token_tree.collate(trees, judge.device)
        before = mllm.hidden_states(judge, rows, features)
        alone = mllm.hidden_states(judge, token_tree.collate(trees[:1], judge.device), features[:3])
        torch.testing.assert_close(alone[0], before[0, :alone.shape[1]], rtol=1e-5, atol=1e-5)

        changed = [list(row) for row in trees]
        target = len(groups[0])                                 # the first reply, in the middle of the row
        changed[0][target] = token_tree.text_segment(judge.encode("broken bad" * 3), 1)
        rows_after = token_tree.collate(changed, judge.device)
        after = mllm.hidden_states(judge, rows_after, features)
    for s, segment in enumerate(trees[0]):
        n, (i, j) = len(segment.ids), (rows.starts[0][s], rows_after.starts[0][s])
        same = torch.allclose(before[0, i:i + n], after[0, j:j + n], atol=1e-5)
        assert same == (s != target and segment.parent != target), f"segment {s}"


def test_where_a_reply_is_predicted():
    judge, _ = build_judge()
    _, trees = build_trees(judge)
    rows = token_tree.collate(trees, judge.device)
    written = [(1, 5), (0, 3)]
    b, column, token = token_tree.reply_tokens(rows, written)
    assert token.tolist() == trees[1][5].ids + trees[0][3].ids
    at = 0
    for row, s in written:
        n, parent, start = len(trees[row][s].ids), trees[row][s].parent, rows.starts[row][s]
        assert b[at:at + n].tolist() == [row] * n
        last_of_parent = rows.starts[row][parent] + len(trees[row][parent].ids) - 1
        assert column[at:at + n].tolist() == [last_of_parent, *range(start, start + n - 1)]
        at += n

    b, column = token_tree.last_tokens(rows, [[3], [5, 0]])
    places = [(0, 3), (1, 5), (1, 0)]
    assert b.tolist() == [row for row, _ in places]
    assert column.tolist() == [rows.starts[row][s] + len(trees[row][s].ids) - 1 for row, s in places]
    assert rows.ids[b, column].tolist() == [trees[row][s].ids[-1] for row, s in places]
