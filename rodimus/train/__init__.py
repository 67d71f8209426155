"""Pretraining on torch.distributed: one program for a laptop CPU, one GPU and many nodes.

Reading order: ``config`` (what can be set), ``shards`` and ``batches`` (what is read), ``loop``
(the training step), then ``parallel``, ``checkpoint`` and ``guard`` (what keeps a long run alive).
"""
