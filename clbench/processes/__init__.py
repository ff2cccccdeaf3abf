"""One run over several processes: every process does all of it but for the model's work.

Each has the same strategy, seeds, data, memory and generators, and so does the same; the rows of a
batch that a model is called on are shared out among them, the outputs gathered, and the gradients
of its weights summed. So whatever a method computes of outputs, losses and gradients is computed of
the whole batch, as in one process, up to the order in which numbers are added.
"""
