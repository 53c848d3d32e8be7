"""The nouns that pass between the packages.

Letters: B prompts in a step, G samples per prompt, N slots, T most new
tokens, S KV capacity, W nodes of one forward, V vocabulary, R packed rows,
L tokens of a packed row.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array
Params = Any  # a pytree of arrays
Metrics = dict[str, Array]


class DraftParams(flax.struct.PyTreeNode):
  """What drafting reads; `own` are the drafter's parameters, if it learns."""

  policy: Params
  own: Params = ()


class DraftTree(flax.struct.PyTreeNode):
  """W nodes to verify in one forward. Node 0 is the last committed token.

  `parents[i] < i`. A node whose parent is `UNUSED` (other than node 0, the
  root) is padding: it is evaluated and never followed. A chain is the tree
  with `parents[i] == i - 1`. Siblings that carry one token are allowed; the
  first of them is followed.
  """

  tokens: Array  # int32[..., W]
  parents: Array  # int32[..., W]; parents[0] == UNUSED


UNUSED = -1  # DraftTree.parents


class Path(flax.struct.PyTreeNode):
  """The nodes that verification kept, root first.

  Entries at or beyond `length` hold no meaning.
  """

  nodes: Array  # int32[..., W] indices into the draft tree
  tokens: Array  # int32[..., W] the target's token at each kept node
  length: Array  # int32[...] in [1, W]: tokens committed by this forward


class Slots(flax.struct.PyTreeNode):
  """N rows decoded together: the state of the segment loop.

  `text[n, :length[n]]` is the prompt followed by the completion so far; what
  lies beyond holds no meaning. The KV cache holds `length - 1` tokens of each
  row: the last one is the root of the next draft tree.
  """

  text: Array  # int32[N, S]
  logprobs: Array  # float32[N, S] behaviour log-probability, nats; by token
  drafted: Array  # bool[N, S]: the token was an accepted draft
  prompt_length: Array  # int32[N]
  length: Array  # int32[N] prompt + completion
  limit: Array  # int32[N] length at which the row is truncated
  key: Array  # uint32[N, 2] noise key of the row's sample
  prompt: Array  # int32[N] the prompt's place in the drafter's state
  index: Array  # int32[N] which of the prompt's samples
  done: Array  # bool[N]: nothing to decode (empty, finished or truncated)
  finished: Array  # bool[N]: emitted EOS
  forwards: Array  # int32[N] forwards spent on the sample
  cache: Any  # models.kv_cache.KVCache


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt, to be sampled `samples` times.

  A sample's noise key is a function of (seed, domain, step, request, index):
  see `ops.sampling.sample_keys`.
  """

  prompt: np.ndarray  # int32[prompt_length]
  samples: int
  domain: int  # TRAIN, EVALUATE, REHEARSE or FORCE
  step: int  # the step in which it was requested
  request: int  # index of the request within the step


# Request.domain. REHEARSE: the initial policy's samples that are kept; FORCE:
# answers asked for in the middle of a sample. DIAGNOSE is no request's: it
# draws the samples that metrics are measured on.
TRAIN, EVALUATE, REHEARSE, FORCE, DIAGNOSE = 0, 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One sample: the completion only. EOS, when emitted, is its last token."""

  tokens: np.ndarray  # int32[length]
  length: int
  finished: bool  # emitted EOS (False: truncated)
  token_version: np.ndarray  # int32[length] policy step that sampled each token
  behaviour_logprobs: np.ndarray  # float32[length] nats
  drafted: np.ndarray  # bool[length]: was an accepted draft (a speed value)
  forwards: int  # forwards spent (a speed value)
  request: Request
  index: int  # which of the request's samples
  # Not at its end: a later step may continue it.
  suspended: bool = False
  # float32[length] nats, from a pass of fixed shape under the weights that
  # sampled each token: a training value. None: not scored; shorter: up to
  # where the last scored step got.
  scored_logprobs: np.ndarray | None = None
  # The probability with which it was not pruned; 0: it was.
  survival: float = 1.0
  weight: float = 1.0  # of its loss


class Batch(flax.struct.PyTreeNode):
  """Samples packed into rows, several to a row, told apart by `segments`.

  Arrays are [M, R, L]: M microbatches, of which the first `count` hold
  anything. `targets` marks the tokens that are trained on (the completions,
  EOS included). Every per-token value stands at the token it is about:
  `old_logprobs[..., l]` is that of `tokens[..., l]` given the earlier tokens
  of its segment. `extra` holds what one objective needs and others lack, by
  name: arrays of the same shape, or scalars.
  """

  count: Array  # int32[]
  tokens: Array  # int32
  positions: Array  # int32, from 0 in each segment
  segments: Array  # int32, 0 = no token, else 1, 2, ... within the row
  targets: Array  # bool
  weights: Array  # float32: the loss is sum(weights * loss per token)
  advantages: Array  # float32
  old_logprobs: Array  # float32, nats
  behaviour_logprobs: Array  # float32, nats, the sampler's (a speed value)
  reference_logprobs: Array  # float32, nats
  # float32, nats, under the weights that sampled the token, where `scored`;
  # elsewhere the token is on-policy.
  scored_logprobs: Array
  scored: Array  # bool
  groups: Array  # int32, 1, 2, ... by prompt within the optimizer batch; 0
  extra: dict[str, Array] = flax.struct.field(default_factory=dict)


class TrainState(flax.struct.PyTreeNode):
  """What an optimizer step changes. Donated to `update`."""

  step: Array  # int32, optimizer steps taken
  params: Params
  opt_state: Any
