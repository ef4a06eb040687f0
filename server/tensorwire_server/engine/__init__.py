"""How models run: the only room (with kernels and compress) that imports torch.

Nothing is imported here: a worker process imports `tensorwire_server.engine.loading` by name.
"""
