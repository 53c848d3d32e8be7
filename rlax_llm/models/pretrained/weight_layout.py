"""Which published tensors make up which parameters, and how they lie in them.

Published linear layers are [out, in]; ours are [in, out], and what reads one
input is one matrix (models/transformer.py). Everything is a piece: a tensor
whose first axis is split, whose axes are permuted, and which fills a box of a
parameter. So reading and writing, whole or by shards, need one rule each.
"""

from collections.abc import Iterator
import math
from typing import NamedTuple

import numpy as np

from rlax_llm.config import ModelConfig

Box = tuple[slice, ...]


class Piece(NamedTuple):
  """One published tensor within one parameter.

  parameter[where] = tensor.reshape(split, rest).transpose(axes)
  """

  name: str  # of the published tensor
  shape: tuple[int, ...]  # of the published tensor
  split: tuple[int, ...]  # its first axis
  axes: tuple[int, ...]  # of the split tensor, in the parameter's order
  where: Box  # starts and stops are set


class Leaf(NamedTuple):
  """One parameter."""

  shape: tuple[int, ...]
  pieces: tuple[Piece, ...]


def _box(
  shape: tuple[int, ...], axis: int = 0, start: int = 0, stop: int | None = None
) -> Box:
  box = [slice(0, n) for n in shape]
  if stop is not None:
    box[axis] = slice(start, stop)
  return tuple(box)


def _same(name: str, *shape: int) -> Leaf:
  """A parameter that lies as published."""
  axes = tuple(range(len(shape)))
  return Leaf(shape, (Piece(name, shape, shape[:1], axes, _box(shape)),))


def _transposed(name: str, rows: int, columns: int) -> Leaf:
  """A parameter [rows, columns] that is published the other way round."""
  return Leaf(
    (rows, columns),
    (Piece(name, (columns, rows), (columns,), (1, 0), _box((rows, columns))),),
  )


def _query_key_value(
  prefix: str, model: ModelConfig, head_dim: int, *, bias: bool
) -> Leaf:
  group = model.heads // model.kv_heads
  rest = () if bias else (model.width,)
  shape = (*rest, model.kv_heads, group + 2, head_dim)
  pieces = []
  for name, first, count in (
    ('q', 0, group),
    ('k', group, 1),
    ('v', group + 1, 1),
  ):
    split = (model.kv_heads, count, head_dim)
    pieces.append(
      Piece(
        f'{prefix}.self_attn.{name}_proj.{"bias" if bias else "weight"}',
        (math.prod(split), *rest),
        split,
        (0, 1, 2) if bias else (3, 0, 1, 2),
        _box(shape, len(rest) + 1, first, first + count),
      )
    )
  return Leaf(shape, tuple(pieces))


def _gate_up(prefix: str, model: ModelConfig) -> Leaf:
  shape = (model.width, 2, model.mlp_width)
  return Leaf(
    shape,
    tuple(
      Piece(
        f'{prefix}.mlp.{name}_proj.weight',
        (model.mlp_width, model.width),
        (1, model.mlp_width),
        (2, 0, 1),
        _box(shape, 1, i, i + 1),
      )
      for i, name in enumerate(('gate', 'up'))
    ),
  )


EMBEDDING = 'model.embed_tokens.weight'
HEAD = 'lm_head.weight'


def leaves(model: ModelConfig) -> dict[str, Leaf]:
  """Returns every parameter by its path, 'layer_0/down/kernel', in file order.

  Args:
    model: with its vocabulary.
  """
  result = {'embedding': _same(EMBEDDING, model.vocabulary, model.width)}
  for i in range(model.layers):
    result |= _layer(model, f'layer_{i}', f'model.layers.{i}')
  result['final_norm/scale'] = _same('model.norm.weight', model.width)
  if not model.tied_head:
    result['head'] = _transposed(HEAD, model.width, model.vocabulary)
  return result


def rotary_buffers(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns names and shapes of the rotary frequencies that some files store.

  Old writers stored them for every layer (Llama 2 is published so), later ones
  once. They are no parameters: config.json implies them.

  Args:
    model: the architecture.
  """
  head_dim = model.head_dim or model.width // model.heads
  places = ['model'] + [
    f'model.layers.{i}.self_attn' for i in range(model.layers)
  ]
  return {f'{place}.rotary_emb.inv_freq': (head_dim // 2,) for place in places}


def drafter_leaves(model: ModelConfig) -> dict[str, Leaf]:
  """Returns a drafter's parameters by path; named and laid as EAGLE's are.

  What EAGLE has none of has names of its own.

  Args:
    model: the target.
  """
  norm = lambda name: _same(f'{name}.weight', model.width)
  return {
    'token_norm/scale': norm('token_norm'),
    'feature_norm/scale': norm('feature_norm'),
    'join/kernel': _transposed('fc.weight', 2 * model.width, model.width),
    **_layer(model, 'layer', 'layers.0'),
    'final_norm/scale': norm('norm'),
  }


def _layer(model: ModelConfig, ours: str, theirs: str) -> dict[str, Leaf]:
  """Returns the parameters of one decoder layer."""
  head_dim = model.head_dim or model.width // model.heads
  result = {
    f'{ours}/attention_norm/scale': _same(
      f'{theirs}.input_layernorm.weight', model.width
    ),
    f'{ours}/query_key_value/kernel': _query_key_value(
      theirs, model, head_dim, bias=False
    ),
  }
  if model.qkv_bias:
    result[f'{ours}/query_key_value/bias'] = _query_key_value(
      theirs, model, head_dim, bias=True
    )
  if model.qk_norm:
    for long, short in (('query', 'q'), ('key', 'k')):
      result[f'{ours}/{long}_norm/scale'] = _same(
        f'{theirs}.self_attn.{short}_norm.weight', head_dim
      )
  return result | {
    f'{ours}/output/kernel': _transposed(
      f'{theirs}.self_attn.o_proj.weight', model.heads * head_dim, model.width
    ),
    f'{ours}/mlp_norm/scale': _same(
      f'{theirs}.post_attention_layernorm.weight', model.width
    ),
    f'{ours}/gate_up/kernel': _gate_up(theirs, model),
    f'{ours}/down/kernel': _transposed(
      f'{theirs}.mlp.down_proj.weight', model.mlp_width, model.width
    ),
  }


def adapter_leaves(model: ModelConfig) -> dict[str, Leaf]:
  """Returns every adapter's parameters by path, as PEFT names and lays them.

  Args:
    model: with its adapters.
  """
  head_dim = model.head_dim or model.width // model.heads
  group, rank = model.heads // model.kv_heads, model.lora.rank
  result = {}
  for i in range(model.layers):
    for target in model.lora.targets:
      block = (
        'self_attn'
        if target in ('q_proj', 'k_proj', 'v_proj', 'o_proj')
        else 'mlp'
      )
      ours = f'layer_{i}/lora_{target}'
      theirs = f'base_model.model.model.layers.{i}.{block}.{target}'
      inputs = {
        'o_proj': model.heads * head_dim,
        'down_proj': model.mlp_width,
      }.get(target, model.width)
      outputs = {
        'q_proj': (model.kv_heads, group, head_dim),
        'k_proj': (model.kv_heads, head_dim),
        'v_proj': (model.kv_heads, head_dim),
        'gate_proj': (model.mlp_width,),
        'up_proj': (model.mlp_width,),
      }.get(target, (model.width,))
      last = len(outputs)
      result[f'{ours}/a'] = _transposed(f'{theirs}.lora_A.weight', inputs, rank)
      result[f'{ours}/b'] = Leaf(
        (rank, *outputs),
        (
          Piece(
            f'{theirs}.lora_B.weight',
            (math.prod(outputs), rank),
            outputs,
            (last, *range(last)),
            _box((rank, *outputs)),
          ),
        ),
      )
  return result


class Part(NamedTuple):
  """What a box of a parameter takes of one piece."""

  piece: Piece
  rows: slice  # of the published tensor's first axis: all that is read
  inner: Box  # of those rows, split
  target: Box  # of the box


def parts(leaf: Leaf, box: Box) -> Iterator[Part]:
  """Yields what fills a box of a parameter.

  Args:
    leaf: the parameter.
    box: starts and stops are set.
  """
  for piece in leaf.pieces:
    cuts = [
      slice(max(a.start, b.start), min(a.stop, b.stop))
      for a, b in zip(piece.where, box)
    ]
    if any(cut.start >= cut.stop for cut in cuts):
      continue
    target = tuple(
      slice(cut.start - b.start, cut.stop - b.start)
      for cut, b in zip(cuts, box)
    )
    # Back to the axes of the split tensor.
    inner = [slice(0)] * len(cuts)
    for cut, where, axis in zip(cuts, piece.where, piece.axes):
      inner[axis] = slice(cut.start - where.start, cut.stop - where.start)
    # What is read is whole in all but the first of the split axes.
    each = math.prod(piece.split[1:])
    rows = slice(inner[0].start * each, inner[0].stop * each)
    inner[0] = slice(0, inner[0].stop - inner[0].start)
    yield Part(piece, rows, tuple(inner), target)


def place(part: Part, rows: np.ndarray, out: np.ndarray) -> None:
  """Writes the rows of a published tensor into a box of a parameter.

  Args:
    part: from `parts`.
    rows: `part.rows` of the tensor, all other axes whole.
    out: the box.
  """
  split = rows.reshape(-1, *part.piece.split[1:], *part.piece.shape[1:])
  out[part.target] = split[part.inner].transpose(part.piece.axes)


def extract(piece: Piece, parameter: np.ndarray) -> np.ndarray:
  """Returns the published tensor of a piece, contiguous.

  Args:
    piece: which.
    parameter: the whole parameter.
  """
  back = np.argsort(piece.axes)
  tensor = parameter[piece.where].transpose(back)
  return np.ascontiguousarray(tensor.reshape(piece.shape))
