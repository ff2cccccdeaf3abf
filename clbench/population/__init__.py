"""Several runs of one shape that train at once in one process, their models as one.

Each run keeps its own strategy, memory, generators and order of data, and its own thread, which
works while the others wait: what a run does is written once, for one run. Where a run calls its
model or wants gradients, it waits until the others do too; then their models are called as one,
with stacked weights, by `torch.func.vmap`, and autograd goes back through all of them at once.
Whatever can't be stacked, or comes at another time than with the others, a run does alone.
"""
