"""
The reward model without shared prefixes: one plain row per leaf of a token tree, as transformers itself reads it.

The slow reference. Stage 02 compares the two ways when it starts (see prefix_check.py) and goes on with this one where
a model does not bear with token trees.
"""
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from common.token_tree import Rows, leaves, path


def encoded(judge, features: list[Tensor]) -> dict:
    """Image features, [tokens, S * D] each, as transformers' own vision tower would hand them on."""
    own, *deep = zip(*(f.split(judge.net.config.get_text_config().hidden_size, -1) for f in features))
    return {"image": BaseModelOutputWithDeepstackFeatures(pooler_output=list(own), deepstack_features=deep)}


def model_inputs(judge, texts: list[list[int]], images: list[list[tuple[Tensor, Tensor]]], side: str = "right") -> dict:
    """
    What `model(...)` and `generate` take for one row per text, padded on one side.

    images: (features, grid) of each row's images, in order.
    """
    ids, valid = (pad_sequence([torch.tensor(own) for own in values], batch_first=True, padding_side=side)
                  for values in (texts, [[True] * len(own) for own in texts]))                              # [B, L]
    ids, valid = ids.to(judge.device), valid.to(judge.device)
    features, grids = zip(*sum(images, []))
    return dict(input_ids=ids, attention_mask=valid.long(), image_grid_thw=torch.stack(grids).to(judge.device),
                mm_token_type_ids=((ids == judge.image_id) & valid).int(), mm_encoder_outputs=encoded(judge, features))


def hidden_states(judge, rows: Rows, features: list[Tensor]) -> Tensor:
    """As mllm.hidden_states, [B, L, D]; positions and causal mask are transformers' own. No key-value cache."""
    given, texts, images = iter(features), [], []
    source = torch.zeros(2, *rows.ids.shape, dtype=torch.long)             # of each tree token: plain row, place in it
    for b, tree in enumerate(rows.trees):
        own = {s: (next(given), segment.grid) for s, segment in enumerate(tree) if segment.grid is not None}
        for leaf in leaves(tree):
            branch = path(tree, leaf)
            columns = [rows.starts[b][s] + i for s in branch for i in range(len(tree[s].ids))]
            source[:, b, columns] = torch.stack([torch.full((len(columns),), len(texts)), torch.arange(len(columns))])
            texts.append([token for s in branch for token in tree[s].ids])
            images.append([own[s] for s in branch if s in own])
    hidden = judge.net.model(**model_inputs(judge, texts, images), use_cache=False).last_hidden_state
    return hidden[source[0].to(judge.device), source[1].to(judge.device)]
