# Copyright 2026 The rlax_llm Authors. Apache-2.0 licence.
"""rlax_llm: reinforcement learning for language models in JAX.

Importing the package touches neither a device nor an optional dependency:
import the module you need, for instance `from rlax_llm.rollout import engine`.
"""

__version__ = '0.1.0'
