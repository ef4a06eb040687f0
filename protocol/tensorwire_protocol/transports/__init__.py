"""The two shells that move a connection's bytes: asyncio and a blocking socket."""
