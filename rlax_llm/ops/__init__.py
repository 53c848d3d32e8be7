"""Pure maths on arrays: no parameters, models, jit or files.

Functions of one row or one group leave the batch to `vmap`; functions by token
take any leading shape with a mask, and `segments` where rows are packed.
"""
